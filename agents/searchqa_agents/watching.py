"""Who watches a run beside its files: a dashboard in the terminal, and Weights & Biases, as the keys ``dashboard`` and ``wandb`` say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from searchqa_agents.dashboard import Dashboard, check_setting, on_terminal, terminal
from searchqa_agents.runs import RunFolder
from searchqa_agents.wandb_log import WandbLog, wandb_settings


class Watched(Protocol):
    """The keys of a run's settings that are read here."""

    name: str
    dashboard: str
    wandb: Any


def check_watching(settings: Watched) -> None:
    """Raise ``ConfigurationError`` for what cannot be, before a run begins."""
    check_setting(settings.dashboard)
    wandb_settings(settings.wandb)


@contextmanager
def watched_run(settings: Watched, folder: RunFolder) -> Iterator[None]:
    """Let a run be watched that has its ``config.yaml`` and ``stamp.json``; the dashboard ends with the context, W&B with the folder.

    In a sweep, whose jobs may share a terminal, there is no dashboard; W&B groups its jobs by the sweep's folder.
    """
    folder.describe()
    sweep = sweep_name()
    asked = wandb_settings(settings.wandb)
    if asked is not None:
        folder.watchers.append(WandbLog(folder.path, asked, group=sweep))
    console = terminal() if settings.dashboard == "auto" and sweep is None else None
    if console is None:
        yield
        return
    dashboard = Dashboard(settings.name, console, folder.metrics(), folder.seconds)
    folder.watchers.append(dashboard)
    try:
        with on_terminal(dashboard):
            yield
    finally:
        folder.watchers.remove(dashboard)


def sweep_name() -> str | None:
    """The name of the sweep's folder that this job is one of; None outside of a sweep."""
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().sweep.dir).name
