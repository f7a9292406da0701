"""Stable-Baselines3 trains the shipped policy: PPO and A2C on whole segments, sb3-contrib's TRPO on tokens.

python tests/examples/sb3_train.py --algorithm ppo --seed 0
"""

import argparse
import json
import time
from typing import Any

import torch
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from searchqa_agents.sb3 import EpisodeMetricsCallback, ProgressCallback, SearchQAPolicy, make_vec_env

ALGORITHMS: dict[str, type[OnPolicyAlgorithm]] = {"ppo": PPO, "a2c": A2C, "trpo": TRPO}
TIMESTEPS = {"ppo": 10_240, "a2c": 20_480, "trpo": 20_480}
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"n_steps": 8, "batch_size": 256, "n_epochs": 2, "learning_rate": 3e-4},
    "a2c": {"n_steps": 8, "learning_rate": 1e-3, "use_rms_prop": False, "normalize_advantage": True},
    "trpo": {"n_steps": 32, "batch_size": 512, "learning_rate": 1e-3, "policy_kwargs": {"detach_value": True}},
}


def train(algorithm: str = "ppo", seed: int = 0, timesteps: int | None = None, n_envs: int = 64, **changed: Any) -> SearchQAPolicy:
    """The shipped policy after training on two-hop questions; ``changed`` arguments of the algorithm win over the settings."""
    env = make_vec_env("SearchQA-World-v0", n_envs, hops=2, level="token" if algorithm == "trpo" else "segment")
    settings = {"gamma": 1.0, "gae_lambda": 1.0, "seed": seed, **SETTINGS[algorithm], **changed}
    model = ALGORITHMS[algorithm](SearchQAPolicy, env, verbose=1, **settings)
    model.learn(timesteps or TIMESTEPS[algorithm], callback=[ProgressCallback(), EpisodeMetricsCallback()], log_interval=5)
    env.close()
    assert isinstance(model.policy, SearchQAPolicy)
    return model.policy


if __name__ == "__main__":
    from measure import exact_match

    parser = argparse.ArgumentParser()
    parser.add_argument("--algorithm", choices=sorted(ALGORITHMS), default="ppo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timesteps", type=int, help="environment steps; default: what the figures were measured with")
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="the questions that exact match is measured on")
    line = parser.parse_args()
    torch.set_num_threads(1)
    before, started = exact_match(None, line.split), time.perf_counter()
    policy = train(line.algorithm, line.seed, line.timesteps)
    seconds = time.perf_counter() - started
    result = {
        "algorithm": line.algorithm,
        "seed": line.seed,
        "em_before": round(before, 3),
        "em_after": round(exact_match(policy.language_model, line.split), 3),
        "seconds": round(seconds),
    }
    print(json.dumps(result))
