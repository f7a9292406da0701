"""What the project exists for, in the small: a policy learns to search by reinforcement learning, and only with a search engine."""

import json

import gymnasium as gym
import pytest
import torch

import searchqa_envs  # noqa: F401, registers the ids
from searchqa_agents.algorithms.grpo import GRPOConfig
from searchqa_agents.cli import main
from searchqa_agents.evaluate import evaluate
from searchqa_agents.loading import shipped_checkpoint
from searchqa_agents.policy import Policy
from searchqa_agents.rollout import draw_questions
from searchqa_agents.trainer import train


def make_env(split, **arguments):
    return gym.make_vec("SearchQA-World-v0", num_envs=128, split=split, autoreset_mode="DISABLED", **arguments)


def sampled(policy, **arguments):
    """Exact match and searches on 128 two-hop questions of the dev worlds, which no training sees; temperature 1."""
    venv = make_env("dev", hops=2, **arguments)
    metrics = evaluate(venv, policy, draw_questions(venv.unwrapped.source, 128, seed=3, num_worlds=16), temperature=1.0, seed=1).metrics
    return metrics["em"], metrics["searches"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(venv):
    return Policy.load(shipped_checkpoint(), venv.unwrapped.tokenizer)


def test_the_shipped_checkpoint_is_small_and_learns_to_search_in_a_few_steps():
    assert sum(file.stat().st_size for file in shipped_checkpoint().glob("*.safetensors")) <= 3_000_000
    venv = make_env("train")
    policy = load(venv)
    em_before, searches_before = sampled(policy)
    assert 0.1 <= em_before <= 0.55
    train(policy, venv, "grpo", GRPOConfig(steps=10, seed=7, final_fraction=1.0))
    em_after, searches_after = sampled(policy)
    assert em_after >= em_before + 0.3
    assert em_after >= 0.75
    assert searches_after >= searches_before + 0.3
    assert sampled(policy, retriever="none")[0] <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_the_main_job_learns_for_seeds_on_which_nothing_was_tuned(seed, tmp_path):
    assert main(["train", f"seed={seed}", f"run_dir={tmp_path}", "threads=1"]) == 0
    before, after = (json.loads((tmp_path / f"{when}.json").read_text()) for when in ("before", "after"))
    assert before["hops=2/sampled/em"] <= 0.55
    assert after["hops=2/sampled/em"] >= 0.85
    assert after["hops=2/sampled/searches"] > before["hops=2/sampled/searches"] + 0.3
    assert after["hops=2/off/em"] <= 0.05
