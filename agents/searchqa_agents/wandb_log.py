"""Weights & Biases beside ``metrics.jsonl``: the same numbers, the settings, sample episodes, the table and the page; a run goes on under its old id.

Whatever happens to W&B or the network, the training goes on: a failure is a warning, and what was not sent lies in the run's folder for ``wandb sync``.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import secrets
import string
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from searchqa_agents.runs import read_stamp, replace_file
from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    from searchqa_agents.trajectory import Trajectory

logger = logging.getLogger(__name__)

ID_FILE, STEP_FILE = "wandb_id.txt", "wandb_step.txt"
ATTEMPTS = 6
MODES = ("online", "offline", "disabled")
BEYOND = 1_000
"""A run that goes on logs from so many steps behind the last noted one: what a killed process logged after its note must not stand in the way."""


@dataclass
class WandbSettings:
    """The key ``wandb`` of a run."""

    project: str = "searchqa-gym"
    """the project on the server; made if it is not there"""
    entity: str | None = None
    """user or team; null: the default of the account"""
    group: str | None = None
    """runs that belong together; null: in a sweep, the name of its folder"""
    name: str | None = None
    """the run's name there; null: that of its folder"""
    mode: str = "online"
    """online, offline (files only, for `wandb sync`), or disabled"""
    tags: list[str] = field(default_factory=list)
    """words to find the run by"""
    report: bool = True
    """upload report.html at the end, as an artifact"""
    timeout: float = 60.0
    """seconds to wait for the server at the beginning and, for uploads, at the end"""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigurationError(f"wandb.mode must be one of {list(MODES)}; got {self.mode!r}.")
        texts = {"project": self.project, "entity": self.entity, "group": self.group, "name": self.name}
        for key, value in texts.items():
            if not (value is None and key != "project") and not (isinstance(value, str) and value):
                raise ConfigurationError(f"wandb.{key} must be a word; got {value!r}.")
        tags: Any = self.tags
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise ConfigurationError(f"wandb.tags must be a list of words, such as [first,small]; got {self.tags!r}.")
        if not isinstance(self.report, bool):
            raise ConfigurationError(f"wandb.report must be true or false; got {self.report!r}.")
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, int | float) or not 0 < self.timeout < math.inf:
            raise ConfigurationError(f"wandb.timeout must be a number of seconds above 0; got {self.timeout!r}.")


def wandb_settings(value: Any) -> WandbSettings | None:
    """What the key ``wandb`` asks for: null or false nothing, true the defaults, a mapping some of the fields of :class:`WandbSettings`.

    Raises
    ------
    ConfigurationError
        For anything else, or if W&B is asked for and not installed.
    """
    if value is None or value is False:
        return None
    if value is not True and not isinstance(value, Mapping):
        raise ConfigurationError(f"wandb must be true, null, or a mapping such as {{project: mine, mode: offline}}; got {value!r}.")
    given = {} if value is True else {str(key): own for key, own in value.items()}
    known = [f.name for f in fields(WandbSettings)]
    for key in given:
        if key not in known:
            raise ConfigurationError(f"wandb.{key} is not known; wandb has {known}.")
    settings = WandbSettings(**given)
    if importlib.util.find_spec("wandb") is None:
        raise ConfigurationError("wandb=... logs to Weights & Biases, which is not installed: pip install 'searchqa-gym[wandb]'.")
    return settings


class WandbLog:
    """A run of W&B, open for logging; a watcher of a run's folder (:class:`searchqa_agents.runs.Watcher`).

    Each phase logs under its name (``train/charts/em``) over its own steps (``train/step``). W&B's own step only counts up, also over a stop: steps that are
    taken again are logged again.

    Parameters
    ----------
    folder
        The run's; ``config.yaml`` and ``stamp.json`` are in it already. W&B's files go into its folder ``wandb``.
    group
        Of a sweep, where the settings name none.

    Raises
    ------
    ConfigurationError
        If the account's key is missing.
    """

    def __init__(self, folder: Path, settings: WandbSettings, group: str | None = None) -> None:
        self.folder = folder
        self.settings = settings
        self._phases: set[str] = set()
        self._samples = 0
        self._step = self._noted_step()
        self._run = self._begin(group)

    def _noted_step(self) -> int:
        file = self.folder / STEP_FILE
        text = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
        return int(text) + BEYOND if text.isdecimal() else 0

    def _begin(self, group: str | None) -> Any:
        import wandb
        import yaml

        config = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))
        arguments: dict[str, Any] = {
            "project": self.settings.project,
            "entity": self.settings.entity,
            "group": self.settings.group or group,
            "name": self.settings.name or self.folder.name,
            "tags": list(self.settings.tags),
            "id": run_id(self.folder),
            "resume": "allow",
            "allow_val_change": True,
            "dir": str(self.folder),
            "config": {**config, "stamp": read_stamp(self.folder)},
            "settings": wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                init_timeout=self.settings.timeout,
                finish_timeout=self.settings.timeout,
            ),
        }
        try:
            return wandb.init(mode=cast(Any, self.settings.mode), **arguments)
        except wandb.errors.UsageError as error:
            raise ConfigurationError(
                f"W&B: {error} Log in (`wandb login`, or WANDB_API_KEY), or write files only: wandb.mode=offline"
            ) from error
        except Exception as error:  # noqa: BLE001, whatever W&B raises: a training does not end for its log
            logger.warning(
                "Weights & Biases cannot be reached, so that this run is written to %s only; send it later with `wandb sync`. The error was: %s",
                self.folder / "wandb",
                error,
            )
            return self._begin_offline(arguments)

    def _begin_offline(self, arguments: Mapping[str, Any]) -> Any:
        """A run without the server; None, with a warning, if that cannot be either."""
        import wandb

        for attempt in range(ATTEMPTS):
            wandb.teardown()  # its process still holds the id, and for a moment longer
            time.sleep(0.5 * attempt)
            try:
                return wandb.init(mode="offline", **arguments)
            except Exception as error:  # noqa: BLE001, as above
                last = error
        logger.warning("Weights & Biases cannot write files either, and is left alone: %s", last)
        return None

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Log what a line of ``metrics.jsonl`` has."""
        if phase not in self._phases:
            self._phases.add(phase)
            self._try(lambda run: run.define_metric(f"{phase}/step"))
            self._try(lambda run: run.define_metric(f"{phase}/*", step_metric=f"{phase}/step"))
        self._log({f"{phase}/{name}": value for name, value in values.items()} | {f"{phase}/step": step})

    def episode(self, phase: str, step: int, trajectory: Trajectory, *, kept: bool) -> None:
        """Log an episode as a row of a table, where the run keeps its episodes."""
        if not kept:
            return
        from searchqa_agents.episode_text import episode_text, plain_text

        row = {
            "step": step,
            "question": plain_text(trajectory.question),
            "golden answers": plain_text(" / ".join(trajectory.golden_answers)),
            "answer": plain_text(trajectory.answer or ""),
            "reward": float(trajectory.reward),
            "em": trajectory.metrics.get("em"),
            "episode": episode_text(trajectory),
        }
        self._log_table(f"{phase}/samples", list(row), [list(row.values())], {f"{phase}/step": step})

    def _log_table(self, name: str, columns: list[str], rows: list[list[Any]], beside: Mapping[str, Any] | None = None) -> None:
        def table(run: Any) -> dict[str, Any]:
            import wandb

            return {name: wandb.Table(columns=list(columns), data=rows, allow_mixed_types=True), **(beside or {})}

        self._log(table)

    def _log(self, values: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]) -> None:
        self._try(lambda run: run.log(values(run) if callable(values) else values, step=self._step))
        self._step += 1
        replace_quickly(self.folder / STEP_FILE, f"{self._step}\n")

    def _try(self, call: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # noqa: BLE001, whatever W&B raises: a training does not end for its log
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning(
            "Weights & Biases failed and is left alone from here on; the run goes on, and its numbers are in metrics.jsonl. The error was: %s: %s",
            type(error).__name__,
            error,
        )
        self._run = None

    def finished(self, summary: Mapping[str, Any], page: Path | None) -> None:
        """Log the table at the end, and the page."""
        if summary.get("columns"):
            self._log_table("summary", [column or "-" for column in summary["columns"]], [list(row) for row in summary["rows"]])
        if page is not None and page.is_file() and self.settings.report:

            def upload(run: Any) -> None:
                import wandb

                artifact = wandb.Artifact(f"report-{run.id}", type="report")
                artifact.add_file(str(page))
                run.log_artifact(artifact)

            self._try(upload)

    def close(self, failed: bool) -> None:
        """End the run there; waits for uploads, at most ``timeout`` seconds."""
        self._try(lambda run: run.finish(exit_code=int(failed)))
        self._run = None


def run_id(folder: Path) -> str:
    """The id of a run at W&B, kept in its folder from the first time on."""
    file = folder / ID_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    name = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    replace_file(file, lambda partial: partial.write_text(f"{name}\n", encoding="utf-8"))
    return name


def replace_quickly(path: Path, text: str) -> None:
    """Replace a small file in one go, without waiting for the disk; a failure is a warning."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        logger.warning("%s could not be written: %s", path, error)
