"""What all trainers share: the optimiser with its schedule, clipping and check for divergence, the state to resume from, and the hooks."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from searchqa_agents.trajectory import Trajectory
from searchqa_envs.errors import ConfigurationError, SearchQAError

logger = logging.getLogger(__name__)

OnStep = Callable[[int, Mapping[str, float]], None]
"""Called after every step with the number of steps done and the metrics."""
OnCheckpoint = Callable[[int, Mapping[str, Any]], None]
"""Called every ``checkpoint_every`` steps and at the end with the number of steps done and a state that ``torch.save`` can hold."""
Schedule = Literal["linear", "cosine", "constant"]


class TrainingDivergedError(SearchQAError, RuntimeError):
    """A loss or a gradient is not finite. The weights are those before the update."""


class AdamW(NamedTuple):
    """Settings of the optimiser and of its schedule. Weight decay is on every parameter, as in verl; OpenRLHF spares biases and norms."""

    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    warmup_steps: int
    final_fraction: float
    total_steps: int
    max_grad_norm: float
    schedule: Schedule = "linear"


def learning_rate(settings: AdamW, step: float) -> float:
    """Learning rate of a step, counted from 0: linear from 0 to the peak in ``warmup_steps``, then along ``schedule``.

    ``linear`` and ``cosine`` (half a period; Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5) end at ``final_fraction`` of the peak at
    ``total_steps``; ``constant`` stays at the peak.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    done = min(1.0, (step - settings.warmup_steps) / max(1, settings.total_steps - settings.warmup_steps))
    left = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.learning_rate * (settings.final_fraction + (1 - settings.final_fraction) * left)


class Optimiser:
    """AdamW for those of the named parameters that require gradients."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: AdamW) -> None:
        self.settings = settings
        self._parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        if not self._parameters:
            raise ConfigurationError("The policy has no trainable parameters; unfreeze some before training.")
        if any(parameter.dtype == torch.bfloat16 for parameter in self._parameters.values()):
            logger.warning(
                "Weights in bfloat16 are trained: a step that is smaller than 1/512 of a weight is rounded away, at low learning rates nearly all "
                "of them. Load the model in float32 (dtype=float32) and compute in bfloat16 (algo.precision=bfloat16), or train adapters (lora)."
            )
        self.adamw = torch.optim.AdamW(
            self._parameters.values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=all(parameter.is_cuda for parameter in self._parameters.values()),  # the default there holds copies of all gradients
        )

    def learning_rate(self, step: float) -> float:
        """See :func:`learning_rate`."""
        return learning_rate(self.settings, step)

    def update(self, step: int, loss: Tensor, scale: float = 1.0) -> float:
        """Apply the accumulated gradients at ``scale`` times the learning rate of ``step`` and clear them; returns their norm before clipping.

        Raises
        ------
        TrainingDivergedError
            If the loss or a gradient is not finite; then no weight has changed.
        """
        norm = self.finite_norm(step, loss)
        self.apply(step, norm, scale)
        return float(norm)

    def finite_norm(self, step: int, loss: Tensor) -> Tensor:
        """The norm of all gradients. Raises ``TrainingDivergedError`` if it, or the loss that they are of, is not finite."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients
        if not (torch.isfinite(norm) and torch.isfinite(loss).all()):
            raise TrainingDivergedError(self._diagnosis(step, loss, norm))
        return norm

    def _diagnosis(self, step: int, loss: Tensor, norm: Tensor) -> str:
        bad = [name for name, p in self._parameters.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
        if bad:
            gradient = f"the gradients of {len(bad)} of {len(self._parameters)} parameters are not finite, first that of {bad[0]}"
        elif not torch.isfinite(norm):
            gradient = "all gradients are finite, but their norm is too large to compute"
        else:
            gradient = "all gradients are finite"
        return (
            f"Training has diverged in step {step + 1}: the loss is {float(loss):g}, and {gradient}. Loss and gradients must be finite; no weight has "
            "been changed by this update. Resume from the last checkpoint with a lower learning_rate, a lower max_grad_norm, a longer warm-up "
            "or precision=float32."
        )

    def apply(self, step: float, norm: Tensor, scale: float = 1.0) -> None:
        """Clip gradients of this ``norm``, apply and clear them. Where all are 0 nothing changes, by momentum or weight decay neither."""
        if norm > 0:
            for group in self.adamw.param_groups:
                group["lr"] = self.learning_rate(step) * scale
            torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self.settings.max_grad_norm, norm)
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)


def training_state(module: nn.Module, optimiser: Optimiser, steps_done: int) -> dict[str, Any]:
    """A copy, on the CPU, of all that a run in one process needs to go on: weights, optimiser, and the states of the random generators."""
    return {
        "steps_done": steps_done,
        "model": _copied(module.state_dict()),
        "optimiser": _copied(optimiser.adamw.state_dict()),
        "random": random_state(),
    }


def load_training_state(module: nn.Module, optimiser: Optimiser, state: Mapping[str, Any]) -> int:
    """Continue from what :func:`training_state` made; returns the number of steps done."""
    module.load_state_dict(state["model"])
    optimiser.adamw.load_state_dict(_copied(dict(state["optimiser"])))
    set_random_state(state["random"])
    return int(state["steps_done"])


def random_state() -> dict[str, Any]:
    """The global random generators of torch, CUDA, NumPy and Python, as tensors and plain values.

    Draws of ours are functions of seed and step; these are for what others draw, such as a model's or an environment's own code.
    """
    generator: Any = np.random.get_state(legacy=True)  # noqa: NPY002, others draw from it
    name, keys, position, has_gauss, gauss = generator
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.tensor(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the global generators where :func:`random_state` saw them; those of GPUs only where there are as many."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
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
