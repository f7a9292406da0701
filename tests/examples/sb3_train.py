"""Stable-Baselines3's PPO and A2C train the shipped policy, a step of theirs being a whole segment.

python tests/examples/sb3_train.py --algorithm ppo --seed 0
"""

import argparse
import json
import time
from typing import Any

import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from searchqa_agents.sb3 import EpisodeMetricsCallback, ProgressCallback, SearchQAPolicy, make_vec_env

ALGORITHMS: dict[str, type[OnPolicyAlgorithm]] = {"ppo": PPO, "a2c": A2C}
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"n_steps": 8, "batch_size": 256, "n_epochs": 2, "learning_rate": 3e-4},
    "a2c": {"n_steps": 8, "learning_rate": 5e-4, "use_rms_prop": False, "normalize_advantage": True},
}
POLICY = {"logprob_reduction": "sum"}  # these segments have about five tokens; for long ones leave it at "mean"


def train(algorithm: str = "ppo", seed: int = 0, timesteps: int = 5120, n_envs: int = 64, **changed: Any) -> SearchQAPolicy:
    """The shipped policy after so many segments about two-hop questions; ``changed`` arguments of the algorithm win over the settings."""
    env = make_vec_env("SearchQA-World-v0", n_envs, hops=2)
    settings = {"gamma": 1.0, "gae_lambda": 1.0, "policy_kwargs": POLICY, "seed": seed, "verbose": 1, **SETTINGS[algorithm], **changed}
    model = ALGORITHMS[algorithm](SearchQAPolicy, env, **settings)
    model.learn(timesteps, callback=[ProgressCallback(), EpisodeMetricsCallback()], log_interval=1)
    env.close()
    assert isinstance(model.policy, SearchQAPolicy)
    return model.policy


if __name__ == "__main__":
    from measure import exact_match

    parser = argparse.ArgumentParser()
    parser.add_argument("--algorithm", choices=sorted(ALGORITHMS), default="ppo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timesteps", type=int, default=5120)
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
