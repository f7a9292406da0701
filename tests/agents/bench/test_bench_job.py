"""A job of the benchmark: its budget, its measurements, going on after a stop, algorithms from files, Stable-Baselines3, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import pytest

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents import cli
from searchqa_agents.bench import job
from searchqa_agents.bench.results import SHARES, Point, read_run
from searchqa_agents.models import make_tiny_model
from searchqa_agents.optimisation import TrainingDivergedError
from searchqa_agents.policy import Policy
from searchqa_agents.runs import list_checkpoints, read_metrics
from searchqa_agents.trajectory import load_trajectories
from searchqa_envs.errors import ConfigurationError

SMALL = ("task=penalty", "task.budget=1600", "task.questions=12", "num_envs=64", "save=4")
"""Two rollouts of 64 episodes."""

OWN_ALGORITHM = '''
"""REINFORCE with the mean reward of the rollout as baseline."""
from dataclasses import dataclass

from searchqa_agents.algorithm import Algorithm, AlgorithmConfig, clipped_loss, register


@dataclass
class MeanBaselineConfig(AlgorithmConfig):
    clip_coef: float = 0.3
    """how far ratios may go"""


def advantages(batch, config):
    centred = batch.rewards - batch.rewards.mean()
    return batch._replace(advantages=centred[batch.sequence_ids])


def loss(stats, part, totals, config):
    return clipped_loss(stats, part, totals, config, clip_coef=config.clip_coef)


register(Algorithm("NAME", MeanBaselineConfig, advantages, loss))
'''


def bench(folder: Path, *words: str) -> int:
    return cli.main(["bench", *SMALL, f"run_dir={folder}", *words])


def without_times(folder: Path):
    told = json.loads((folder / "score.json").read_text())
    for point in told["points"]:
        del point["seconds"], point["cpu_seconds"]
    for key in ("command", "commit"):
        told["stamp"].pop(key, None)
    return told


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    assert bench(folder, "algorithm=grpo", "seed=3") == 0
    return folder / "grpo" / "penalty" / "seed-3"


def test_a_run_is_measured_at_every_eighth_and_ends_with_the_rollout_that_spends_the_budget(finished):
    run = read_run(finished)
    assert (run.suite, run.task, run.task_version, run.algorithm, run.seed, run.status) == ("world-v1", "penalty", 1, "grpo", 3, "finished")
    assert tuple(point.share for point in run.points) == SHARES
    first, last = run.points[0], run.points[-1]
    assert (first.policy_tokens, first.environment_tokens, first.steps, first.cpu_seconds) == (0, 0, 0, 0.0)
    assert last.policy_tokens >= 1600
    before_last = [line for line in read_metrics(finished) if line["phase"] == "train"][-2]
    assert before_last["charts/policy_tokens"] < 1600
    for point in run.points:
        assert point.policy_tokens >= point.share * 1600
        assert point.score == pytest.approx(point.em)  # no search is worth nothing here, and the oracle is always right
    assert run.references == {"no_search": 0.0, "oracle": 1.0}
    assert run.settings["questions_per_step"] == 8
    assert not {"steps", "token_budget", "seed"} & run.settings.keys()


def test_its_folder_is_that_of_a_run_with_episodes_from_before_and_after(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["kind"] == "bench"
    assert summary["measures"]["after"]["score"] == read_run(finished).points[-1].score
    assert {name: len(load_trajectories(finished / "trajectories" / f"{name}.jsonl.gz")) for name in ("before", "after")} == {
        "before": 4,
        "after": 4,
    }
    assert read_run(finished).stamp["measured_on"]["split"] == "test"
    assert read_run(finished).stamp["split"] == "train"


def test_a_job_that_was_stopped_goes_on_to_the_same_numbers(finished, tmp_path, monkeypatch):
    original = job.Course.step

    def stops(course, *arguments):
        original(course, *arguments)
        if course.steps == 2 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt

    stopped = []
    monkeypatch.setattr(job.Course, "step", stops)
    words = ("algorithm=grpo", "seed=3", "algo.checkpoint_every=1")
    assert bench(tmp_path, *words) != 0
    folder = tmp_path / "grpo" / "penalty" / "seed-3"
    assert stopped
    assert [checkpoint.step for checkpoint in list_checkpoints(folder)] == [1]
    assert not (folder / "score.json").exists()
    assert bench(tmp_path, *words) == 0
    expected, found = without_times(finished), without_times(folder)
    expected["settings"]["checkpoint_every"] = 1
    assert found == expected


def test_a_finished_job_is_not_played_again(finished, capsys):
    before = (finished / "score.json").stat().st_mtime_ns
    assert bench(finished.parents[2], "algorithm=grpo", "seed=3") == 0
    assert (finished / "score.json").stat().st_mtime_ns == before
    assert "finished" in capsys.readouterr().out


def test_an_algorithm_in_a_file_takes_part_by_one_word(tmp_path):
    (tmp_path / "mine.py").write_text(OWN_ALGORITHM.replace("NAME", "mean_baseline"))
    assert bench(tmp_path / "runs", f"algorithm={tmp_path / 'mine.py'}", "seed=0", "task.budget=200") == 0
    run = read_run(tmp_path / "runs" / "mean_baseline" / "penalty" / "seed-0")
    assert (run.algorithm, run.settings["clip_coef"]) == ("mean_baseline", 0.3)
    assert set(run.stamp["plugins"]) == {"mine.py"}
    assert len(run.stamp["plugins"]["mine.py"]) == 64


def test_a_file_that_registers_none_is_refused(tmp_path, capsys):
    (tmp_path / "empty.py").write_text("")
    assert bench(tmp_path / "runs", f"algorithm={tmp_path / 'empty.py'}", "seed=0") != 0
    assert "registers no algorithm" in capsys.readouterr().err


def test_ppo_of_stable_baselines3_is_an_algorithm(tmp_path):
    assert bench(tmp_path, "algorithm=sb3_ppo", "seed=0", "algo.n_envs=16", "algo.n_steps=4", "algo.batch_size=32", "task.budget=500") == 0
    folder = tmp_path / "sb3_ppo" / "penalty" / "seed-0"
    run = read_run(folder)
    assert run.points[-1].policy_tokens >= 500
    assert run.points[-1].environment_tokens > 0
    assert tuple(point.share for point in run.points) == SHARES
    assert run.settings["n_envs"] == 16


def test_a_run_that_diverges_has_a_score_of_0_from_there_on(tmp_path, monkeypatch):
    original = job.Course.step

    def diverges(course, *arguments):
        original(course, *arguments)
        raise TrainingDivergedError("not a number")

    monkeypatch.setattr(job.Course, "step", diverges)
    assert bench(tmp_path, "algorithm=reinforce", "seed=0") == 0
    run = read_run(tmp_path / "reinforce" / "penalty" / "seed-0")
    assert run.status == "diverged"
    assert run.points[-1].score == 0.0


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("algo.steps=3", "the task's"),
        ("algo.token_budget=3", "the task's"),
        ("task.budget=0", "at least 1"),
        ("task.questions=0", "at least 1"),
        ("task.measured.split=null", "split"),
        ("algo.learning_rate=-1", "learning_rate"),
        ("env.max_turns=1", "no score"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, word, told, capsys):
    assert bench(tmp_path, "algorithm=grpo", "seed=0", word) != 0
    written = capsys.readouterr()
    assert told in written.err + written.out


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert bench(tmp_path / "runs", "algorithm=grpo,ppo", "seed=0,1", "dry_run=true") == 0
    assert not (tmp_path / "runs").exists()
    assert capsys.readouterr().out.count("Would train") == 4


@pytest.mark.data
def test_a_task_of_a_real_set_is_played_with_its_own_passages(tmp_path):
    """A tiny random model learns nothing there; where no question has a gold chain, the oracle is told the answers."""
    tokenizer = gym.make("SearchQA-HotpotQA-v0").unwrapped.tokenizer
    shape = {"hidden_size": 32, "feed_forward_size": 48, "pad_id": tokenizer.pad_id, "eos_id": tokenizer.eos_id}
    Policy(make_tiny_model(tokenizer.vocab_size, 0, **shape), tokenizer).save(tmp_path / "model")
    words = ["task=real_hotpotqa", "suite=real-v1", f"task.start={tmp_path / 'model'}", "task.questions=6", "task.budget=2000"]
    words += ["task.questions_per_step=2", "algo.group_size=2", "env.split=all", "task.measured.split=all", "env.max_segment_tokens=96"]
    assert cli.main(["bench", *words, "algorithm=grpo", "seed=0", f"run_dir={tmp_path / 'runs'}"]) == 0
    run = read_run(tmp_path / "runs" / "grpo" / "real_hotpotqa" / "seed-0")
    assert run.references == {"no_search": 0.0, "oracle": 1.0}
    assert run.stamp["dataset"] == "hotpotqa"
    assert run.suite == "real-v1"


def test_a_file_that_was_changed_does_not_stand_for_its_old_results(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(OWN_ALGORITHM.replace("NAME", "edited"))
    words = (f"algorithm={file}", "seed=0", "task.budget=200")
    assert bench(tmp_path / "runs", *words) == 0
    assert bench(tmp_path / "runs", "algorithm=grpo", "seed=0", "task.budget=200", f"plugins=[{file}]") == 0
    stamp = read_run(tmp_path / "runs" / "grpo" / "penalty" / "seed-0").stamp
    assert stamp["plugins"] == {}  # another one's file is no part of its results
    file.write_text(file.read_text() + "\n# a thought\n")
    capsys.readouterr()
    assert bench(tmp_path / "runs", *words) != 0
    assert "mine.py has changed since" in "".join(capsys.readouterr())


def test_the_stamp_has_the_line_as_it_was_given_without_the_place_of_the_file(tmp_path):
    folder = tmp_path / "it's here"
    folder.mkdir()
    (folder / "mine.py").write_text(OWN_ALGORITHM.replace("NAME", "placed"))
    told = """searchqa bench algo=grpo,placed 'seed=range(5)' "hydra.sweep.dir='runs/small'" plugins=[/a/mine.py]"""
    assert job.as_given(told, "placed", {"mine.py": "0"}) == "searchqa bench algorithm=grpo,mine.py 'seed=range(5)' run_dir=runs/small"
    assert bench(tmp_path / "runs", f"algorithm={folder / 'mine.py'}", "seed=0", "dry_run=true") == 0


@pytest.mark.parametrize("words", [("algorithm=grpo", "algorithm=ppo"), ("algorithm=grpo", "algo=ppo")])
def test_algorithms_in_two_words_are_refused_with_the_one_word(tmp_path, words, capsys):
    assert bench(tmp_path, *words, "seed=0") == 2
    assert "algorithm=grpo,ppo" in capsys.readouterr().err


def test_a_dry_run_finds_what_a_run_would_refuse(tmp_path, capsys):
    assert bench(tmp_path, "algorithm=grpo", "seed=0", "task.budget=0", "dry_run=true") != 0
    assert "at least 1" in "".join(capsys.readouterr())


def test_every_point_of_a_finished_run_has_spent_its_share(tmp_path):
    point = Point(0.5, 10, 0, 1, 0.0, 0.0, 0.0, 0.0, 0.0)
    course = object.__new__(job.Course)
    course.budget, course.points, course.policy_tokens = 100, [point] * 9, 10
    course.folder = SimpleNamespace(path=tmp_path)
    with pytest.raises(ConfigurationError, match="before its budget"):
        course.whole("finished")
