"""The algorithms, one file each; importing this registers them all."""

from searchqa_agents.algorithms import grpo, gspo, ppo, raft, reinforce, reinforce_plus_plus, rloo

__all__ = ["grpo", "gspo", "ppo", "raft", "reinforce", "reinforce_plus_plus", "rloo"]
