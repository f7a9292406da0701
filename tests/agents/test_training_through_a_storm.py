"""Training whose searches go over HTTP: without faults the same run, bit for bit; in a storm the lost episodes are dropped, and nothing else changes."""

from __future__ import annotations

import importlib.util
import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents.algorithms.grpo import GRPOConfig
from searchqa_agents.loading import shipped_checkpoint
from searchqa_agents.policy import Policy
from searchqa_agents.trainer import train
from searchqa_envs.world import WorldSource
from searchqa_retrievers import http_client

spec = importlib.util.spec_from_file_location("bench_http", Path(__file__).parents[1] / "benchmarks" / "bench_http.py")
bench_http = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_http)

WORDS = ["env=world", "env.preset=easy"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def served():
    """A real server of the world's own retriever, and the way to it through a proxy that is honest until told otherwise."""
    port = bench_http.free_port()
    servers = [bench_http.start_server(port, *WORDS)]
    try:
        with bench_http.proxy(port, share=0.0, late=2.0) as url:
            bench_http.until_ready(port, servers[-1])
            yield SimpleNamespace(port=port, servers=servers, url=url, spoil=lambda share: _spoil(url, share))
    finally:
        servers[-1].kill()
        servers[-1].communicate()


def _spoil(url, share):
    """Let the proxy spoil a share of the answers; gives what it has spoilt so far."""
    status, counts = bench_http.get(f"{url}/proxy?share={share}")
    assert status == 200
    return json.loads(counts)


def run(retriever, steps, before_step=lambda step: None, questions=4, group_size=3, reward="em"):
    """GRPO from the shipped checkpoint; metrics, trajectories and weights of each step."""
    venv = gym.make_vec("SearchQA-World-v0", num_envs=questions * group_size, autoreset_mode="DISABLED", retriever=retriever, reward=reward)
    policy = Policy.load(shipped_checkpoint(), venv.unwrapped.tokenizer)
    metrics, played, weights = [], [], [_weights(policy)]

    def on_step(step, values):
        metrics.append(values)
        weights.append(_weights(policy))
        before_step(step)

    before_step(0)
    train(
        policy,
        venv,
        "grpo",
        GRPOConfig(steps=steps, questions_per_step=questions, group_size=group_size, seed=5, num_worlds=50),
        on_step=on_step,
        on_rollout=lambda step, trajectories: played.append(list(trajectories)),
        max_lost_rollouts=0,
    )
    return SimpleNamespace(metrics=metrics, played=played, weights=weights)


def _weights(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()]).clone()


def timeless(metrics):
    return [{name: value for name, value in values.items() if not name.startswith(("time/", "search/"))} for values in metrics]


def over_http(url, **options):
    return {"name": "http", "url": url, "timeout": 1.5, "deadline": 5.0, "retries": 1, **options}


def replayed(env, trajectory):
    """The context that an environment which searches by itself gives to the same segments."""
    context, _ = env.reset(options={"question_id": trajectory.question_id})
    for turn in trajectory.turns:
        context, *_ = env.step(trajectory.token_ids[turn.start : turn.segment_end])
    return context


def test_over_http_a_run_is_the_run_in_one_process_bit_for_bit(served):
    ours, theirs = run("bm25", 3), run(over_http(served.url, timeout=20.0, deadline=60.0), 3)
    assert sum(values["charts/searches"] for values in ours.metrics) > 1
    assert timeless(theirs.metrics) == timeless(ours.metrics)
    for left, right in zip(ours.weights, theirs.weights, strict=True):
        assert torch.equal(left, right)
    for mine, other in zip(chain(*ours.played), chain(*theirs.played), strict=True):
        for field in ("token_ids", "loss_mask", "logprobs"):
            assert np.array_equal(getattr(mine, field), getattr(other, field))
        assert (mine.question_id, mine.reward, mine.turns) == (other.question_id, other.reward, other.turns)


def test_a_storm_costs_the_episodes_that_it_hits_and_nothing_else(served, monkeypatch):
    monkeypatch.setattr(http_client, "BREAK_SECONDS", 0.2)
    faults = {}

    def before_step(step):
        if step == 1:
            served.spoil(0.8)
        elif step == 4:
            faults.update(served.spoil(0.0))
            served.servers[-1].kill()  # SIGKILL
            served.servers[-1].communicate()
        elif step == 5:
            served.servers.append(bench_http.start_server(served.port, *WORDS))
            bench_http.until_ready(served.port, served.servers[-1])

    stormy = run(over_http(served.url), 7, before_step)
    calm = run("bm25", 1)
    assert sum(faults[name] for name in bench_http.FAULTS if name in faults) > 3
    errors = [values["charts/backend_errors"] for values in stormy.metrics]
    assert len(errors) == 7  # it went on to its end
    assert errors[0] == errors[5] == errors[6] == 0
    assert sum(errors[1:4]) > 0
    assert errors[4] > 0
    assert timeless(stormy.metrics)[0] == timeless(calm.metrics)[0]

    env = gym.make("SearchQA-World-v0")
    for values, trajectories, before, after in zip(stormy.metrics, stormy.played, stormy.weights[:-1], stormy.weights[1:], strict=True):
        assert all(np.isfinite(value) for value in values.values())
        assert torch.isfinite(after).all()
        lost = [trajectory for trajectory in trajectories if trajectory.backend_error is not None]
        assert len(lost) == values["charts/backend_errors"]
        if len(lost) == len(trajectories):
            assert torch.equal(before, after)  # nothing to learn from
        for trajectory in trajectories:
            expected = replayed(env, trajectory)
            if trajectory.backend_error is None:
                assert np.array_equal(trajectory.token_ids, expected)
            else:
                # it ends with what the policy wrote: nothing about the failure was put into it
                assert trajectory.truncated
                assert trajectory.reward == 0
                assert trajectory.turns[-1].end == trajectory.turns[-1].segment_end == len(trajectory.token_ids)
                assert np.array_equal(trajectory.token_ids, expected[: len(trajectory.token_ids)])
    assert not torch.equal(stormy.weights[-1], stormy.weights[-3])  # it learns again


class Killing:
    """The client of a server that is killed before one of its calls."""

    name = "killing"

    def __init__(self, client, call, kill):
        self.client, self.call, self.kill = client, call, kill
        self.calls = 0

    def search(self, requests):
        self.calls += 1
        if self.calls == self.call:
            self.kill()
        return self.client.search(requests)

    def cache_key(self, request):
        return self.client.cache_key(request)

    def __deepcopy__(self, memo):
        return self


def paid_searches(episode):
    """A reward by which a lost episode, whose reward is 0, would stand out among those that searched once."""
    return {"searches": float(episode.searches)}


def test_a_server_that_is_killed_within_a_step_leaves_what_it_answered_to_learn_from(served):
    """The second turn is lost: episodes that answered after one search are trained on, those that searched again are not."""

    def kill():
        served.servers[-1].kill()
        served.servers[-1].communicate()

    client = WorldSource("train").build_retriever(over_http(served.url, deadline=2.0))
    stormy = run(Killing(client, 2, kill), 1, questions=8, group_size=8, reward=paid_searches)
    served.servers.append(bench_http.start_server(served.port, *WORDS))
    bench_http.until_ready(served.port, served.servers[-1])
    [played] = stormy.played
    kept = [[t.reward for t in played[start : start + 8] if t.backend_error is None] for start in range(0, 64, 8)]
    assert any(1 < len(rewards) < 8 and set(rewards) == {1.0} for rewards in kept)
    learned_from = sum(len(rewards) for rewards in kept if len(set(rewards)) > 1)
    assert stormy.metrics[0]["charts/trained_share"] == learned_from / 64
    assert stormy.metrics[0]["charts/backend_errors"] == 64 - sum(map(len, kept)) > 0
