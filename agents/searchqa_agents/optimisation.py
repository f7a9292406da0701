"""What all trainers share: the optimiser, its learning rate, one update, the state to resume from, and the hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from searchqa_agents.policy import Policy
from searchqa_agents.trajectory import Trajectory
from searchqa_envs.errors import ConfigurationError

OnStep = Callable[[int, Mapping[str, float]], None]
"""Called after every step with the number of steps done and the metrics."""
OnCheckpoint = Callable[[int, Mapping[str, Any]], None]
"""Called every ``checkpoint_every`` steps and at the end with the number of steps done and a state that ``torch.save`` can hold."""


class AdamW(NamedTuple):
    """Settings of the optimiser and of its linear schedule."""

    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    warmup_steps: int
    final_fraction: float
    total_steps: int
    max_grad_norm: float


class Optimiser:
    """AdamW with linear warm-up, linear decay and gradient clipping, for one policy."""

    def __init__(self, policy: Policy, settings: AdamW) -> None:
        self.policy = policy
        self.settings = settings
        parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
        if not parameters:
            raise ConfigurationError("The policy has no trainable parameters; unfreeze some before training.")
        self._adamw = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay)
        self._parameters = parameters

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear from 0 to the peak in ``warmup_steps``, then linear to its ``final_fraction``."""
        settings = self.settings
        if step < settings.warmup_steps:
            return settings.learning_rate * (step + 1) / settings.warmup_steps
        decaying = max(1, settings.total_steps - settings.warmup_steps)
        done = min(1.0, (step - settings.warmup_steps) / decaying)
        return settings.learning_rate * (1 - done * (1 - settings.final_fraction))

    def update(self, step: int, scale: float = 1.0) -> float:
        """Apply the accumulated gradients at ``scale`` times the learning rate of ``step`` and clear them; returns their norm before clipping."""
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate(step) * scale
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.max_grad_norm)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self, steps_done: int) -> dict[str, Any]:
        """A copy of weights and optimiser. There is no random state: every draw is a function of the seed and the step."""
        return {
            "steps_done": steps_done,
            "model": {name: tensor.detach().clone() for name, tensor in self.policy.model.state_dict().items()},
            "optimiser": _copied(self._adamw.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> int:
        """Continue from a state; returns the number of steps done."""
        self.policy.model.load_state_dict(state["model"])
        self._adamw.load_state_dict(_copied(state["optimiser"]))
        return int(state["steps_done"])


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def trainable(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Those that ended by their own doing: an episode whose search back end was lost says nothing about the policy.

    Raises
    ------
    ConfigurationError
        If one is ``retokenized``: its ids are not those that were sampled.
    """
    for trajectory in trajectories:
        if trajectory.retokenized:
            raise ConfigurationError(
                f"Trajectories whose text was encoded anew cannot be trained on; that of question {trajectory.question_id!r} was. "
                "Use a backend with returns_ids."
            )
    return [trajectory for trajectory in trajectories if trajectory.backend_error is None]
