"""Stable-Baselines3 trains language models here, unmodified: a policy, a vector environment, and callbacks.

>>> from stable_baselines3 import PPO
>>> from searchqa_agents.sb3 import SearchQAPolicy, make_vec_env
>>> PPO(SearchQAPolicy, make_vec_env("SearchQA-World-v0", 16), gamma=1.0, n_steps=8).learn(10_000)
"""

from searchqa_agents.integrations import engine_module

engine_module("stable_baselines3", "sb3", "Stable-Baselines3")

from searchqa_agents.sb3.callbacks import EpisodeMetricsCallback, ProgressCallback  # noqa: E402
from searchqa_agents.sb3.policy import SearchQAPolicy  # noqa: E402
from searchqa_agents.sb3.vec_env import SearchQAVecEnv, make_vec_env  # noqa: E402

__all__ = ["EpisodeMetricsCallback", "ProgressCallback", "SearchQAPolicy", "SearchQAVecEnv", "make_vec_env"]
