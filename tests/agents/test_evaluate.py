"""Evaluation: nothing is dropped, means and intervals are right."""

from dataclasses import replace

import gymnasium as gym
import pytest

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents.evaluate import evaluate, summarise
from searchqa_agents.rollout import rollout
from searchqa_agents.scripted import ScriptedAgent


@pytest.fixture(scope="module")
def trajectories():
    venv = gym.make_vec("SearchQA-World-v0", num_envs=8, autoreset_mode="DISABLED")
    return rollout(venv, ScriptedAgent.for_env("lazy_oracle", venv), list(range(40)))


def test_every_question_is_played_though_the_last_batch_is_not_full():
    venv = gym.make_vec("SearchQA-World-v0", num_envs=7, autoreset_mode="DISABLED", num_worlds=1)
    done = []
    result = evaluate(venv, ScriptedAgent.for_env("oracle", venv), on_done=done.append)
    assert len(venv.unwrapped.source) % 7
    assert done == sorted(set(done))
    assert done[-1] == len(venv.unwrapped.source)
    assert result.metrics["questions"] == len(venv.unwrapped.source) == len(result.trajectories)
    assert result.metrics["em"] == 1


def test_means_by_hand(trajectories):
    result = summarise(trajectories, [len(t.turns) for t in trajectories], "turns")
    assert result.metrics["em"] == pytest.approx(sum(t.metrics["em"] for t in trajectories) / 40)
    assert "tokens" not in result.metrics  # a script's
    sampled = [replace(t, logprobs=t.loss_mask * 0.0, answer=" " if i < 4 else "x") for i, t in enumerate(trajectories)]
    by_model = summarise(sampled, [None] * 40).metrics
    assert by_model["tokens"] == pytest.approx(sum(t.loss_mask.sum() for t in trajectories) / 40)
    assert by_model["answered"] == 0.9  # a blank answer is none
    assert list(result.groups) == ["turns=2", "turns=3"]
    assert sum(group["episodes"] for group in result.groups.values()) == 40


def test_lost_episodes_are_counted_and_not_averaged(trajectories):
    lost = replace(trajectories[0], backend_error="gone", metrics={}, reward=0.0)
    result = summarise([*trajectories, lost], [None] * 41)
    assert result.metrics["backend_errors"] == 1
    assert result.metrics["episodes"] == 41
    assert result.metrics["em"] == summarise(trajectories, [None] * 40).metrics["em"]
    assert result.groups == {}


def test_an_undefined_metric_is_averaged_over_the_others(trajectories):
    without = replace(trajectories[0], metrics={k: v for k, v in trajectories[0].metrics.items() if k != "title_recall_all"})
    with_it = replace(trajectories[1], metrics={**trajectories[1].metrics, "title_recall_all": 0.25})
    assert summarise([without, with_it], [None, None]).metrics["title_recall_all"] == 0.25


def test_intervals_hold_the_mean_and_resample_questions_not_episodes(trajectories):
    once = summarise(trajectories, [None] * 40)
    low, high = once.intervals["em"]
    assert low < once.metrics["em"] < high
    assert high - low == pytest.approx(2 * 1.96 * (once.metrics["em"] * (1 - once.metrics["em"]) / 40) ** 0.5, rel=0.2)
    assert summarise(trajectories * 4, [None] * 160).intervals["em"] == pytest.approx((low, high))  # four equal samples tell nothing new
