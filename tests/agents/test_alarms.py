"""Alarms: silent in a healthy run, loud where a policy collapses, each once, and the checkpoint from before stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from searchqa_agents.alarms import AlarmConfig, Alarms
from searchqa_agents.cli import main
from searchqa_agents.runs import RunFolder, list_checkpoints, read_metrics
from searchqa_envs.errors import ConfigurationError

HEALTHY = (
    # step, exact match, searches, sampled tokens, entropy, share with an advantage: the main job from the shipped checkpoint, seed 0
    (1, 0.652, 1.168, 19.33, 0.035, 0.500), (2, 0.824, 1.473, 23.22, 0.032, 0.656), (3, 0.961, 1.434, 22.69, 0.015, 0.219),
    (4, 0.965, 1.555, 24.36, 0.017, 0.156), (5, 0.949, 1.551, 24.32, 0.029, 0.281), (6, 0.945, 1.590, 24.93, 0.022, 0.188),
    (7, 0.973, 1.434, 22.63, 0.017, 0.156), (8, 0.910, 1.660, 25.76, 0.038, 0.375), (9, 0.977, 1.500, 23.55, 0.019, 0.156),
    (10, 0.965, 1.398, 22.18, 0.021, 0.250), (11, 0.980, 1.434, 22.64, 0.013, 0.094), (12, 0.941, 1.590, 24.64, 0.019, 0.281),
    (13, 0.961, 1.531, 23.75, 0.020, 0.312), (14, 0.965, 1.488, 23.36, 0.023, 0.188), (15, 0.906, 1.363, 21.71, 0.042, 0.281),
    (16, 0.992, 1.562, 24.30, 0.005, 0.062), (17, 0.965, 1.430, 22.55, 0.016, 0.219), (18, 0.980, 1.406, 22.28, 0.014, 0.094),
    (19, 0.992, 1.438, 22.70, 0.006, 0.062), (20, 0.941, 1.516, 23.69, 0.017, 0.094), (21, 0.965, 1.434, 22.62, 0.024, 0.250),
)  # fmt: skip


def metrics(em=0.5, searches=1.5, sampled_tokens=20.0, entropy=0.05, trained_share=0.4, reward_std=0.5):
    return {f"charts/{name}": value for name, value in locals().items()}


def fed(alarms: Alarms, *curve):
    """Names of the alarms that a curve of changed metrics raises, with their steps."""
    return [(alarm.name, alarm.step) for step, changed in enumerate(curve, start=1) for alarm in alarms.update(step, metrics(**changed))]


def test_a_healthy_run_raises_nothing() -> None:
    alarms = Alarms(AlarmConfig(), max_turns=5)
    for step, em, searches, tokens, entropy, share in HEALTHY:
        spread = (em * (1 - em)) ** 0.5
        assert alarms.update(step, metrics(em, searches, tokens, entropy, share, spread)) == []


@pytest.mark.parametrize(
    ("name", "collapsed"),
    [
        ("entropy", {"entropy": 0.001}),
        ("length", {"sampled_tokens": 90.0}),
        ("length", {"sampled_tokens": 3.0}),
        ("no searches", {"searches": 0.0}),
        ("all searches", {"searches": 4.0}),
        ("reward spread", {"reward_std": 0.0}),
        ("reward spread", {"trained_share": 0.0}),
    ],
)
def test_each_collapse_raises_its_alarm_once_and_tells_since_when(name: str, collapsed: dict[str, float]) -> None:
    alarms = Alarms(AlarmConfig(window=3), max_turns=5)
    found = fed(alarms, *[{}] * 6, *[collapsed] * 10)
    assert [alarm for alarm, _ in found] == [name]
    assert 7 <= found[0][1] <= 9  # within a window of its beginning
    assert alarms.raised[0].since == found[0][1] - 2
    assert len(alarms.raised[0].message) > 40


def test_equal_rewards_at_the_top_are_no_fault() -> None:
    alarms = Alarms(AlarmConfig(window=2), max_turns=5)
    assert fed(alarms, *[{"em": 0.99, "reward_std": 0.0, "trained_share": 0.0}] * 8) == []


def test_a_threshold_of_zero_switches_an_alarm_off_and_a_short_dip_is_none() -> None:
    off = AlarmConfig(window=2, entropy_share=0, length_factor=0, fewest_searches=0, search_budget_share=0, reward_spread=0)
    wild = [{"entropy": 0.0, "sampled_tokens": 900.0, "searches": 0.0, "reward_std": 0.0, "trained_share": 0.0}] * 5
    assert fed(Alarms(off, 5), {}, {}, *wild) == []
    assert fed(Alarms(AlarmConfig(), 5), *[{}] * 6, {"searches": 0.0, "entropy": 0.0}, *[{}] * 6) == []


def test_fed_with_the_same_lines_again_they_stand_where_they_were() -> None:
    curve = [{}] * 5 + [{"searches": 0.0}] * 4
    whole, resumed = Alarms(AlarmConfig(window=3), 5), Alarms(AlarmConfig(window=3), 5)
    fed(whole, *curve)
    fed(resumed, *curve)
    assert resumed.raised == whole.raised
    assert resumed.update(10, metrics(searches=0.0)) == []


@pytest.mark.parametrize("wrong", [{"window": 0}, {"entropy_share": -1}, {"length_factor": 0.5}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=rf"alarms\.{next(iter(wrong))} must be"):
        AlarmConfig(**wrong)  # type: ignore[arg-type]


def test_the_checkpoint_from_before_the_alarm_is_kept(tmp_path: Path) -> None:
    with RunFolder(tmp_path, keep_last=2) as folder:
        assert folder.keep_checkpoint(5, "train") is None
        for step in (1, 2, 3):
            folder.save_checkpoint("train", step, lambda path: None)
        kept = folder.keep_checkpoint(3, "train")
        assert kept is not None
        assert kept.step == 2
        for step in (4, 5, 6):
            folder.save_checkpoint("train", step, lambda path: None)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [2, 5, 6]


def test_a_run_that_never_searches_says_so_in_the_terminal_the_metrics_and_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of random weights writes no tags: no searches, no reward."""
    words = ["recipe=smoke", "threads=1", "env.num_worlds=20", "algo.steps=6", "alarms.window=2", f"run_dir={tmp_path}"]
    assert main(["train", *words]) == 0
    said = capsys.readouterr().err
    assert "Warning: Step 2: 0 searches per episode" in said
    assert said.count("0 searches per episode") == 1
    lines = [line["step"] for line in read_metrics(tmp_path) if "alarms/no_searches" in line]
    assert lines == [2]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"no searches", "reward spread"} <= {alarm["name"] for alarm in summary["alarms"]}
    steps = [checkpoint.step for checkpoint in list_checkpoints(tmp_path) if checkpoint.phase == "train"]
    assert steps == [1, 5, 6]


def test_a_policy_that_searches_in_every_turn_raises_the_alarm() -> None:
    """With real episodes: the query in the last turn is not searched for, so that there is one search fewer than turns."""
    import gymnasium as gym

    import searchqa_envs  # noqa: F401, registers the ids
    from searchqa_agents.rollout import rollout
    from searchqa_agents.scripted import ScriptedAgent
    from searchqa_agents.trainer import rollout_metrics

    def always_searching(task):
        while True:
            yield task.search("capital")

    venv = gym.make_vec("SearchQA-World-v0", num_envs=4, autoreset_mode="DISABLED", num_worlds=2)
    alarms = Alarms(AlarmConfig(window=2), venv.unwrapped.rules.max_turns)
    agent = ScriptedAgent.for_env(always_searching, venv)
    searching = [rollout_metrics(rollout(venv, agent, [0, 1, 2, 3], seed=step)) for step in range(3)]
    venv.close()
    assert searching[0]["charts/searches"] == venv.unwrapped.rules.max_turns - 1
    seen = [alarm.name for step, found in enumerate(searching) for alarm in alarms.update(step, found)]
    assert "all searches" in seen
