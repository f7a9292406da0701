"""What an example is run for: exact match before and after its training, measured as for the README's tables."""

import argparse
import json
import time
from collections.abc import Callable

import gymnasium as gym
import torch

from searchqa_agents.evaluate import evaluate
from searchqa_agents.loading import shipped_checkpoint
from searchqa_agents.policy import Policy
from searchqa_agents.rollout import draw_questions


def exact_match(policy: Policy | None, split: str = "test") -> float:
    """Of samples at temperature 1, on 256 two-hop questions of worlds that training never sees; None: of the shipped policy."""
    venv = gym.make_vec("SearchQA-World-v0", num_envs=256, autoreset_mode="DISABLED", hops=2, split=split)
    questions = draw_questions(venv.unwrapped.source, 256, seed=1000)
    policy = policy or Policy.load(shipped_checkpoint(), venv.unwrapped.tokenizer)
    return evaluate(venv, policy, questions, temperature=1.0, seed=1000).metrics["em"]


def run(train: Callable[[int], Policy]) -> None:
    """Train with the seed of the command line; the last line printed is JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="the questions that exact match is measured on")
    line = parser.parse_args()
    torch.set_num_threads(1)
    before, started = exact_match(None, line.split), time.perf_counter()
    policy = train(line.seed)
    seconds = time.perf_counter() - started
    result = {
        "seed": line.seed,
        "em_before": round(before, 3),
        "em_after": round(exact_match(policy, line.split), 3),
        "seconds": round(seconds),
    }
    print(json.dumps(result))
