"""Callbacks for Stable-Baselines3: the schedules of rewards and retrievers, and what episodes were like."""

from __future__ import annotations

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback


class ProgressCallback(BaseCallback):
    """Tells the environments before each rollout how far training is, so that schedules of rewards and retrievers move.

    The numbers are environment steps: those taken so far, and those that ``learn`` was asked for.
    """

    def _on_rollout_start(self) -> None:
        self.training_env.env_method("set_progress", self.model.num_timesteps, self.model._total_timesteps)

    def _on_step(self) -> bool:
        return True


class EpisodeMetricsCallback(BaseCallback):
    """Logs the mean metrics of the episodes that ended in each rollout: ``rollout/em``, ``rollout/searches`` and the others.

    ``rollout/backend_errors`` counts the episodes of the rollout that lost their search back end. It is also the attribute ``backend_errors``, of the
    whole training.
    """

    def __init__(self, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.backend_errors = 0
        self._metrics: dict[str, list[float]] = {}
        self._lost = 0

    def _on_rollout_start(self) -> None:
        self._metrics, self._lost = {}, 0

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            self._lost += info.get("backend_error") is not None
            for name, value in info.get("metrics", {}).items():
                self._metrics.setdefault(name, []).append(value)
        return True

    def _on_rollout_end(self) -> None:
        self.backend_errors += self._lost
        self.logger.record("rollout/backend_errors", self._lost)
        for name, values in self._metrics.items():
            self.logger.record(f"rollout/{name}", float(np.mean(values)))
