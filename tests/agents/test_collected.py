"""Supervised fine-tuning on collected trajectories: what is kept, what is refused, how long it takes, and that it goes on exactly."""

import json
import math
from collections import Counter
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents.cli import main
from searchqa_agents.collected import collect, fitting, trajectory_files, vocabulary
from searchqa_agents.demonstrations import demonstrate, recorded_demonstrations
from searchqa_agents.models import make_tiny_model
from searchqa_agents.policy import Policy
from searchqa_agents.runs import RunFolder
from searchqa_agents.supervised import SupervisedConfig, train_supervised
from searchqa_agents.trajectory import append_trajectories
from searchqa_envs.errors import ConfigurationError


def world(**arguments):
    return gym.make_vec("SearchQA-World-v0", num_envs=8, autoreset_mode="DISABLED", **{"num_worlds": 1, **arguments})


def small_policy(venv, seed=0):
    torch.set_num_threads(1)
    tokenizer = venv.unwrapped.tokenizer
    ids = {"pad_id": tokenizer.pad_id, "eos_id": tokenizer.eos_id}
    return Policy(make_tiny_model(tokenizer.vocab_size, seed, **ids, hidden_size=16, num_heads=2, feed_forward_size=24), tokenizer)


@pytest.fixture(scope="module")
def venv():
    return world()


@pytest.fixture(scope="module")
def episodes(venv):
    """Three each on eight questions by the lazy oracle: some right, some wrong."""
    stamp = venv.unwrapped.stamp()
    played = [demonstrate(venv, "lazy_oracle", range(8), seed=seed) for seed in range(3)]
    return [replace(t, stamp=stamp) for one in played for t in one]


@pytest.fixture
def file(tmp_path, episodes):
    append_trajectories(tmp_path / "all.jsonl.gz", episodes)
    return tmp_path / "all.jsonl.gz"


# -- which files -------------------------------------------------------------------------------------------------------------------------


def test_files_are_found_by_folder_file_pattern_and_list_but_not_those_of_a_runs_evaluations(tmp_path, episodes):
    for name in ("one", "two"):
        with RunFolder(tmp_path / name) as folder:
            for part in ("eval", "rollouts-000005", "before", "after", "after-retrieval"):
                folder.write_trajectories(part, episodes[:1])
    one, two = ([tmp_path / name / "trajectories" / f"{part}.jsonl.gz" for part in ("eval", "rollouts-000005")] for name in ("one", "two"))
    assert trajectory_files(str(tmp_path / "one")) == one
    assert trajectory_files(f"{tmp_path}/*") == one + two
    assert trajectory_files(str(one[0])) == one[:1]
    assert trajectory_files(f"{tmp_path}/*/trajectories/eval*") == [one[0], two[0]]
    assert trajectory_files([str(tmp_path / "two"), str(two[0])]) == two


@pytest.mark.parametrize("given", ["nowhere", [], 7, [3], "nowhere/*.jsonl.gz"])
def test_files_that_there_are_not_are_refused_when_the_settings_are_made(given):
    with pytest.raises(ConfigurationError, match="trajectories"):
        SupervisedConfig(trajectories=given)


# -- what is kept ------------------------------------------------------------------------------------------------------------------------


def test_right_ones_are_kept_in_order_and_lost_ones_never(file, episodes):
    lost = replace(episodes[0], backend_error="gone", metrics={}, reward_terms={})
    append_trajectories(file, [lost])
    right = [t for t in episodes if t.metrics["em"] == 1]
    assert 0 < len(right) < len(episodes)
    kept = collect(file)
    assert list(kept.trajectories) == right
    assert kept.counts == {
        "collected/read": 25, "collected/lost": 1, "collected/right": len(right), "collected/trajectories": len(right),
        "collected/questions": len({t.question_id for t in right}), "collected/with_search": len(right),
        "collected/tokens": sum(int(t.loss_mask.sum()) for t in right),
    }  # fmt: skip
    assert list(collect(file, keep="all").trajectories) == episodes
    assert list(collect(file, metric="searches", right_at=2).trajectories) == [t for t in episodes if t.metrics["searches"] >= 2]


def test_of_each_question_at_most_so_many_are_kept_the_first(file, episodes):
    kept = collect(file, keep="all", max_per_question=2).trajectories
    assert set(Counter(t.question_id for t in kept).values()) == {2}
    assert list(kept) == episodes[:16]


def test_answers_without_a_search_are_told_apart(tmp_path, venv):
    append_trajectories(tmp_path / "direct.jsonl", demonstrate(venv, "direct", range(3)))
    assert collect(tmp_path / "direct.jsonl", keep="all").counts["collected/with_search"] == 0


def test_when_none_is_right_it_says_so(tmp_path, venv):
    append_trajectories(tmp_path / "wrong.jsonl", demonstrate(venv, "direct", range(3)))
    with pytest.raises(ConfigurationError, match=r"None of the 3 trajectories .* 0 have em of at least 1.*keep=all"):
        collect(tmp_path / "wrong.jsonl")


def test_a_metric_that_there_is_not_is_refused(file):
    with pytest.raises(ConfigurationError, match="metric must be one that every episode has; got 'beauty'"):
        collect(file, metric="beauty")


# -- what fits ---------------------------------------------------------------------------------------------------------------------------


def fit(tmp_path, venv, *trajectories):
    file = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    append_trajectories(file, trajectories)
    return fitting(collect(file, keep="all"), venv)


def test_what_fits_is_counted_by_hops(tmp_path, venv, episodes):
    hops = Counter(venv.unwrapped.source[venv.unwrapped.source.index_of(t.question_id)].metadata["hops"] for t in episodes)
    counts = fit(tmp_path, venv, *episodes).counts
    assert {key: value for key, value in counts.items() if "hops" in key} == {f"collected/hops={n}": count for n, count in hops.items()}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("tokenizer", "byte-1", "was made with 'byte-1', and this run has 'world-1'"),
        ("dialect", "r1-searcher", "dialect"),
        ("prompt", "full", "prompt"),
    ],
)
def test_another_tokenizer_dialect_or_prompt_is_refused(tmp_path, venv, episodes, name, value, said):
    other = replace(episodes[0], stamp={**episodes[0].stamp, name: value})
    with pytest.raises(ConfigurationError, match=said):
        fit(tmp_path, venv, episodes[1], other)


def test_base_and_instruct_models_whose_tokens_are_the_same_have_one_vocabulary():
    assert vocabulary("owner/model-7b-instruct@1f2e") == vocabulary("owner/model-3b@1f2e") != vocabulary("owner/model-3b@77aa")
    assert vocabulary("world-1") != vocabulary("byte-1")


def test_held_out_questions_are_refused(tmp_path, venv, episodes):
    held_out = world(split="test")
    [asked] = demonstrate(held_out, "oracle", [0])
    asked = replace(asked, stamp=held_out.unwrapped.stamp())
    with pytest.raises(ConfigurationError, match=r"never from held-out ones: .*'easy-test-0-0-0' is none of world, split train"):
        fit(tmp_path, venv, episodes[0], asked)


def test_a_question_of_the_same_id_in_another_set_is_another_question(tmp_path, venv, episodes):
    with pytest.raises(ConfigurationError, match="never from held-out ones"):
        fit(tmp_path, venv, replace(episodes[0], question="who wrote Faust?"))


def test_text_that_was_encoded_is_learned_from_as_the_environment_masked_it(tmp_path, venv, episodes):
    [ready] = fit(tmp_path, venv, replace(episodes[0], retokenized=True)).trajectories
    assert not ready.retokenized
    assert np.array_equal(ready.loss_mask, episodes[0].loss_mask)


# -- how long ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "size", "steps"), [(3, 4, 18), (1, 5, 5), (1, 24, 1), (0.5, 4, 3), (2, 48, 1)])
def test_steps_follow_from_epochs_and_what_is_kept(file, epochs, size, steps):
    config = SupervisedConfig(trajectories=str(file), keep="all", epochs=epochs, questions_per_step=size, group_size=1, steps=99)
    assert config.steps == steps == math.ceil(epochs * 24 / size)


def test_every_trajectory_is_seen_in_every_epoch(file, episodes):
    config = SupervisedConfig(trajectories=str(file), keep="all", epochs=3, questions_per_step=5, group_size=1)
    batches = recorded_demonstrations(episodes, batch_size=5, seed=0)
    places = {id(t): place for place, t in enumerate(episodes)}
    seen = [places[id(t)] for step in range(config.steps) for t in batches(step)]
    assert [sorted(seen[start : start + 24]) for start in (0, 24, 48)] == [list(range(24))] * 3
    assert seen[:24] != seen[24:48]
    assert len(seen) == 75  # the last batch runs on


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": 3}, "without trajectories"),
        ({"trajectories": "FILE", "epochs": 0}, "epochs must be above 0"),
        ({"trajectories": "FILE", "metric": "emm"}, "metric must be one of .*Did you mean em"),
        ({"trajectories": "FILE", "max_per_question": 0}, "max_per_question must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said, file):
    with pytest.raises(ConfigurationError, match=said):
        SupervisedConfig(**{key: str(file) if value == "FILE" else value for key, value in settings.items()})


# -- training ----------------------------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_policys_tokens_alone_and_the_first_step_tells_what_is_kept(file, venv, episodes):
    policy = small_policy(venv)
    with torch.no_grad():
        stats = policy.evaluate([t.token_ids for t in episodes], [t.loss_mask for t in episodes], max_tokens=10**6)
    assert len(stats.logprob) == sum(int(t.loss_mask.sum()) for t in episodes)
    logged = []
    config = SupervisedConfig(trajectories=str(file), keep="all", questions_per_step=8, group_size=3, steps=2, learning_rate=1e-3)
    train_supervised(policy, venv, config, on_step=lambda step, metrics: logged.append(metrics))
    assert logged[0]["losses/sft_loss"] == pytest.approx(-float(stats.logprob.mean()), rel=1e-5)
    assert logged[0]["collected/trajectories"] == 24
    assert logged[0]["charts/tokens"] == sum(len(t.token_ids) for t in episodes)
    assert not any(key.startswith("collected/") for key in logged[1])


def test_bfloat16_and_checkpointing_give_nearly_and_exactly_the_same_first_loss(file, venv):
    losses = []
    for changes in ({}, {"gradient_checkpointing": True}, {"precision": "bfloat16"}):
        config = SupervisedConfig(trajectories=str(file), questions_per_step=4, group_size=2, steps=1, **changes)
        policy = small_policy(venv)
        train_supervised(policy, venv, config, on_step=lambda step, metrics: losses.append(metrics["losses/sft_loss"]))
        assert all(weight.dtype == torch.float32 for weight in policy.model.parameters())
    plain, checkpointed, rounded = losses
    assert checkpointed == pytest.approx(plain, rel=1e-6)
    assert rounded == pytest.approx(plain, rel=0.02)
    assert rounded != plain


def test_it_goes_on_bit_for_bit_and_only_with_the_same_trajectories(file, venv, episodes):
    config = SupervisedConfig(trajectories=str(file), epochs=2, questions_per_step=2, group_size=2, learning_rate=1e-2, checkpoint_every=3)
    states, whole, resumed = {}, small_policy(venv), small_policy(venv, seed=1)
    train_supervised(whole, venv, config, on_checkpoint=lambda step, state: states.update({step: state}))
    assert config.steps > 4
    train_supervised(resumed, venv, config, state=states[3])
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    other = replace(config, keep="all")
    with pytest.raises(ConfigurationError, match="begun with"):
        train_supervised(resumed, venv, other, state=states[3])
    with pytest.raises(ConfigurationError, match="begun with"):
        train_supervised(resumed, venv, SupervisedConfig(steps=4), state=states[3])
    append_trajectories(file, [t for t in episodes if t.metrics["em"] == 1][:1])
    with pytest.raises(ConfigurationError, match="begun with"):
        train_supervised(resumed, venv, replace(config), state=states[3])


SMOKE = ["recipe=smoke", "threads=1", "start=shipped", "evaluation.questions=4", "env.max_turns=3"]


def test_rejection_sampling_from_the_command_line(tmp_path, capsys):
    """Five samples a question by one agent; the right ones teach another."""
    collected, run = tmp_path / "collected", tmp_path / "run"
    line = ["eval", "agent=oracle", "agent.kind=lazy_oracle", "env.split=train", "samples=5", "questions=16", "save=null", "threads=1"]
    assert main([*line, f"run_dir={collected}"]) == 0
    kept = collect(collected)
    assert kept.counts["collected/read"] == 80
    train = [
        "train",
        *SMOKE,
        "algo=sft",
        f"algo.trajectories={collected}",
        "algo.epochs=2",
        "algo.questions_per_step=16",
        "algo.group_size=1",
    ]
    assert main([*train, f"run_dir={run}"]) == 0
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if line["phase"] == "train"]
    assert len(steps) == math.ceil(2 * len(kept.trajectories) / 16)
    assert steps[0]["collected/right"] == len(kept.trajectories)
    capsys.readouterr()
    assert main([*train, f"run_dir={run}2", f"algo.trajectories={collected}/nothing", "dry_run=true"]) == 1
    assert "There are no trajectories" in capsys.readouterr().err


def test_trajectories_that_do_not_fit_are_found_before_anything_is_measured(tmp_path, file, capsys):
    line = ["train", *SMOKE, "algo=sft", f"algo.trajectories={file}", "env.preset=medium", "dry_run=true", f"run_dir={tmp_path / 'run'}"]
    assert main(line) == 1
    assert "never from held-out ones" in " ".join(capsys.readouterr().err.split())


def test_a_stage_that_others_follow_ends_with_its_epochs(tmp_path, file, capsys):
    stages = "stages=[{name: one, algo: {epochs: 2}}, {name: two, algo: {epochs: null, steps: 1}}]"
    line = [
        "train",
        *SMOKE,
        "algo=sft",
        f"algo.trajectories={file}",
        "algo.keep=all",
        "algo.questions_per_step=5",
        "algo.group_size=1",
        stages,
    ]
    assert main([*line, "dry_run=true", f"run_dir={tmp_path / 'run'}"]) == 0
    assert "10 steps of" in " ".join(capsys.readouterr().out.split())  # 2 epochs of 24 trajectories, 5 in a step


def test_steps_of_a_stage_and_epochs_cannot_both_be_given(tmp_path, file, capsys):
    stages = "stages=[{name: one, algo: {epochs: 2}, until: {steps: 3}}, {name: two}]"
    line = ["train", *SMOKE, "algo=sft", f"algo.trajectories={file}", stages, "dry_run=true", f"run_dir={tmp_path / 'run'}"]
    assert main(line) == 1
    assert "cannot both be given" in " ".join(capsys.readouterr().err.split())
