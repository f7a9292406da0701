"""Stable-Baselines3's PPO, unmodified, as an algorithm of the benchmark: one step of its environment is one segment."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from searchqa_agents.ranges import check_ranges
from searchqa_agents.runs import RunFolder
from searchqa_agents.settings import env_arguments
from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    from searchqa_agents.bench.job import Course
    from searchqa_agents.bench.task import BenchSettings
    from searchqa_agents.policy import Policy


@dataclass
class SB3PPOConfig:
    """Arguments of Stable-Baselines3's PPO."""

    n_envs: int = 32
    """environments that are played at the same time"""
    n_steps: int = 8
    """segments of each in a rollout"""
    batch_size: int = 128
    """segments in a minibatch"""
    n_epochs: int = 2
    """passes over each rollout"""
    learning_rate: float = 3e-4
    """of Adam"""
    gamma: float = 1.0
    """discount per segment"""
    gae_lambda: float = 1.0
    """of generalised advantage estimation"""
    clip_range: float = 0.2
    """ratios are clipped to 1 - clip_range and 1 + clip_range"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """gradients are scaled down to this norm"""
    logprob_reduction: str = "sum"
    """a segment's log-probability: sum or mean over its tokens"""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("n_envs", "n_steps", "n_epochs"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"algo.{name} must be at least 1; got {getattr(self, name)}.")


def learn(settings: BenchSettings, config: SB3PPOConfig, folder: RunFolder, policy: Policy, course: Course) -> None:
    """Train until the budget is spent. ``policy`` has the weights of the moment whenever the course measures it, and those of the end afterwards.

    It saves no checkpoints, so that a job that was stopped begins again: its library keeps an optimiser and environments that cannot be saved midway.
    """
    try:
        sb3 = import_module("stable_baselines3")
    except ModuleNotFoundError as error:
        raise ConfigurationError("algorithm=sb3_ppo needs Stable-Baselines3; install it: pip install 'searchqa-gym[sb3]'") from error
    from searchqa_agents.sb3 import SearchQAPolicy, make_vec_env

    venv = make_vec_env(settings.env.id, config.n_envs, **env_arguments(settings.env))
    arguments = {name: value for name, value in vars(config).items() if name not in ("n_envs", "logprob_reduction")}
    start = {"checkpoint": settings.task.start, "logprob_reduction": config.logprob_reduction}
    model = sb3.PPO(SearchQAPolicy, venv, seed=settings.seed, policy_kwargs=start, **arguments)
    spending = _spending(course, policy, model)
    try:
        model.learn(_MOST_SEGMENTS, callback=spending)
    finally:
        venv.close()


_MOST_SEGMENTS = 10**9
"""More than any budget allows; the budget ends the training."""


def _spending(course: Course, policy: Policy, model: Any) -> Any:
    """A callback that counts tokens, tells the course of each rollout once it has been learned from, and ends the training."""
    import numpy as np
    from stable_baselines3.common.callbacks import BaseCallback

    class Spending(BaseCallback):  # type: ignore[misc, unused-ignore]
        """The rollout's tokens count, and are learned from, before the course is told: at the beginning of the next rollout."""

        def __init__(self) -> None:
            super().__init__()
            self.policy_tokens = self.environment_tokens = 0
            self.own = np.zeros(model.n_envs, dtype=np.int64)  # of each environment's episode
            self.returns: list[float] = []
            self.began = False

        def _on_rollout_start(self) -> None:
            if self.began:
                self.tell()
            self.began = True
            self.training_env.env_method("set_progress", min(self.policy_tokens + 1, course.budget), course.budget)

        def tell(self) -> None:
            """Of the rollout before, which has been learned from."""
            self.copy_weights()
            metrics = {"charts/em": float(np.mean(self.returns))} if self.returns else {}
            self.returns = []
            course.step(metrics, self.policy_tokens, self.environment_tokens)

        def _on_step(self) -> bool:
            pad = policy.tokenizer.pad_id
            written = (self.locals["actions"] != pad).sum(axis=1)
            self.policy_tokens += int(written.sum())
            self.own += written
            for i, (info, done) in enumerate(zip(self.locals["infos"], self.locals["dones"], strict=True)):
                if done:
                    self.environment_tokens += int(info["terminal_observation"]["attention_mask"].sum() - self.own[i])
                    self.own[i] = 0
                    self.returns.append(float(info.get("metrics", {}).get("em", 0.0)))
            return course.policy_tokens < course.budget

        def copy_weights(self) -> None:
            policy.load_weights({name: weight.detach() for name, weight in model.policy.language_model.model.state_dict().items()})

    return Spending()
