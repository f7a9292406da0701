"""A Minari data set made of played episodes: it loads, and its actions in its environment are the same episodes again."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest

import searchqa_envs  # noqa: F401, registers the ids
from searchqa_agents.data_command import main
from searchqa_agents.demonstrations import demonstrate
from searchqa_agents.minari_export import why_left_out
from searchqa_agents.trajectory import Trajectory, append_trajectories, load_trajectories

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def played(split: str, hops: int | None, count: int) -> list[Trajectory]:
    venv: Any = gym.make_vec(
        "SearchQA-World-v0", num_envs=8, autoreset_mode="DISABLED", split=split, hops=hops, max_turns=3, max_context_tokens=400
    )
    stamp = {**venv.unwrapped.stamp(), "seed": 1}
    trajectories = [replace(trajectory, stamp=stamp) for trajectory in demonstrate(venv, "oracle", range(count), seed=1)]
    venv.close()
    return trajectories


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, episode: Any) -> Path:
    """A run of the world with rollouts, of which one is lost, and an evaluation of questions of one and of two hops."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    rollouts = played("train", None, 6)
    lost = episode([5], [6], backend_error="gone")
    append_trajectories(folder / "trajectories" / "rollouts-000001.jsonl.gz", [*rollouts, lost])
    append_trajectories(folder / "trajectories" / "after.jsonl.gz", [*played("test", 2, 3), *played("test", 1, 3)])
    (folder / "config.yaml").write_text(
        "env: {id: SearchQA-World-v0, max_turns: 3, max_context_tokens: 400, retriever: null}\nalgo: {name: grpo}\n"
    )
    return folder


def test_actions_played_again_in_the_recovered_environment_are_the_same_episodes(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    for name, files, episodes in (("searchqa/rollouts-v0", "rollouts-*", 6), ("searchqa/after-v0", "after", 6)):
        assert main(["export", str(run_folder), "--to", "minari", name, "--only", files]) == 0
        dataset = minari.load_dataset(name)
        env = dataset.recover_environment()
        assert dataset.total_episodes == episodes
        recorded = [
            t
            for t in load_trajectories(run_folder / "trajectories" / f"{'rollouts-000001' if 'roll' in name else 'after'}.jsonl.gz")
            if t.turns
        ]
        rewards = []
        for data, about, trajectory in zip(
            dataset.iterate_episodes(), dataset.storage.get_episode_metadata(dataset.episode_indices), recorded, strict=False
        ):
            observation, _ = env.reset(options=about["options"])
            for step, action in enumerate(data.actions):
                assert all(np.array_equal(observation[key], data.observations[key][step]) for key in observation)
                observation, reward, terminated, truncated, _ = env.step(action)
                assert (reward, terminated, truncated) == (data.rewards[step], data.terminations[step], data.truncations[step])
            assert all(np.array_equal(observation[key], data.observations[key][-1]) for key in observation)
            assert data.rewards.sum() == trajectory.reward
            assert [kind.decode() for kind in data.infos["kind"]] == ["reset", *(turn.action for turn in trajectory.turns)]
            assert about["metrics"]["searches"] == trajectory.metrics["searches"]
            rewards.append(float(data.rewards.sum()))
        assert 1.0 in rewards
        assert dataset.total_steps == sum(len(data) for data in dataset)
        assert len(list(dataset.sample_episodes(2))) == 2
        env.close()
    assert "Left out: 1 episode that lost the search back end." in capsys.readouterr().out


def test_a_folder_is_a_data_set_that_a_process_without_this_package_imported_can_load(run_folder: Path, tmp_path: Path) -> None:
    assert main(["export", str(run_folder), "--to", "minari", str(tmp_path / "root" / "world-v3"), "--only", "after"]) == 0
    code = (
        "import minari; d = minari.load_dataset('world-v3'); e = d.recover_environment(); o, _ = e.reset(seed=0);"
        "print(type(e).__name__, d.action_space == e.action_space, sorted(o), d.total_episodes)"
    )
    environment = {**os.environ, "MINARI_DATASETS_PATH": str(tmp_path / "root"), "OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert told.strip() == "PaddedTokens True ['attention_mask', 'input_ids'] 6"
    assert main(["export", str(run_folder), "--to", "minari", str(tmp_path / "root" / "world-v3"), "--only", "after"]) == 2


def test_episodes_of_two_environments_are_not_mixed(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run_folder), "--to", "minari", str(tmp_path / "both-v0")]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "split 'test' and 'train'" in told
    assert "--only 'rollouts-*'" in told
    assert not (tmp_path / "both-v0").exists()


def test_an_episode_that_does_not_say_where_it_was_played_is_refused(
    run_folder: Path, tmp_path: Path, episode: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    append_trajectories(tmp_path / "loose.jsonl", [episode([1], [2])])
    assert main(["export", str(tmp_path / "loose.jsonl"), "--to", "minari", str(tmp_path / "loose-v0"), "--run", str(run_folder)]) == 2
    assert "line 1: the episode's stamp does not say" in " ".join(capsys.readouterr().err.split())


def test_an_environment_that_is_not_as_it_was_is_refused(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["export", str(run_folder), "--only", "after", "--to", "minari", str(tmp_path / "other-v0")]
    assert main([*line, "--tokenizer", "byte"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "tokenizer was 'world-1', is 'byte" in told
    assert "--tokenizer NAME_OR_FOLDER" in told
    assert list(tmp_path.iterdir()) == []


def test_hostile_text_and_marks_are_kept(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    [first, *_] = load_trajectories(run_folder / "trajectories" / "after.jsonl.gz")
    turns = (first.turns[0]._replace(content="\x00[/bold]\x1b[2J"), *first.turns[1:])
    odd = {**first.to_json(), "turns": [turn._asdict() for turn in turns], "retokenized": True}
    append_trajectories(folder / "trajectories" / "after.jsonl.gz", [Trajectory.from_json(odd)])
    (folder / "config.yaml").write_text((run_folder / "config.yaml").read_text())
    assert main(["export", str(folder), "--to", "minari", str(tmp_path / "odd-v0")]) == 0
    dataset = minari.MinariDataset(tmp_path / "odd-v0" / "data")
    assert dataset[0].infos["content"][1].decode() == "␀[/bold]\x1b[2J"
    assert bool(next(iter(dataset.storage.get_episode_metadata([0])))["retokenized"]) is True
    assert "logprobs" not in dataset[0].infos


def test_what_a_padded_action_cannot_say_is_left_out(episode: Any) -> None:
    whole = episode([5], [6, 7], [8], [9])
    assert why_left_out(whole, pad_id=0, length=2) is None
    assert why_left_out(whole, pad_id=0, length=1) == "with a segment longer than the action"
    assert why_left_out(whole, pad_id=7, length=2) == "with a segment that ends in the padding id"
    assert why_left_out(episode([5]), pad_id=0, length=2) == "without a turn"
