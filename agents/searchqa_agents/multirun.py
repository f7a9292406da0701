"""A line that is a sweep, from its beginning to its end: which jobs it has, what is done by it, and what is said of those that did not finish."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.experimental.callback import Callback

from searchqa_agents.sweeps import DONE, FAILED, FINISHED, LOST, NOT_BEGUN, REFUSED, RUNNING, STOPPED, JobRecord, Sweep
from searchqa_agents.threads import cores, set_threads, too_many_threads
from searchqa_envs.errors import ConfigurationError, SearchQAError

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)

SWEEP_FILE = "multirun.yaml"
OPTUNA = "hydra/sweeper=optuna"
NO_TRIALS = "No trials are completed"
"""How Optuna's error begins at the end of a search of which every trial failed."""
OPTUNA_DEFAULTS = {"direction": "maximize", "max_failure_rate": "1.0", "sampler.seed": "0"}
"""What a line with Optuna says unless it says otherwise: our measures are better when higher; a trial that fails is told to Optuna as failed and the
search goes on; and the same line asks for the same trials again, so that finished ones are skipped."""


class SweepFailedError(SearchQAError):
    """Some jobs of a sweep did not finish; all others did."""


class JobFailedError(SearchQAError):
    """A job's error, for a sweeper that wants to know: with one text, so that it can be sent from process to process."""


@dataclass
class Launch:
    """One time that a line is given. ``sweep`` is None until Hydra has found out that it is one."""

    id: str
    command: str
    line: list[str]
    sweep: Sweep | None = None

    @staticmethod
    def of(command: str, line: Sequence[str]) -> Launch:
        """One that begins now, in this process."""
        return Launch(f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{os.getpid()}", command, list(line))


_launch: ContextVar[Launch | None] = ContextVar("launch", default=None)


@contextlib.contextmanager
def launching(launch: Launch) -> Iterator[None]:
    """While a line is carried out: Hydra's callback tells its :class:`Launch` which sweep it is."""
    token = _launch.set(launch)
    try:
        yield
    finally:
        _launch.reset(token)


class SweepCallback(Callback):
    """Tells the launch which sweep it is, before its first job; ``run.yaml`` names it to Hydra."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Write ``sweep.json``, limit the threads of the processes to come, and warn where the machine is too small for all of them."""
        from omegaconf import OmegaConf

        launch = _launch.get()
        if launch is None or config.get("dry_run"):
            return
        try:
            set_threads(config.get("threads"))
        except ConfigurationError:  # Hydra makes a warning of what a callback raises; the first job says it, and ends the line
            return
        if launch.sweep is not None:  # begun again, after one of its processes was killed
            return
        folder = Path(str(config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_basic(config):  # such a sweeper does not keep its line, and resume= wants it
            OmegaConf.save(config, folder / SWEEP_FILE)
        jobs = planned_jobs(config)
        launch.sweep = Sweep(folder)
        launch.sweep.add_launch(launch.id, launch.command, launch.line, _launcher(config), jobs)
        warning = too_many_threads(jobs_at_a_time(config, jobs), config.get("threads"), cores())
        if warning:
            logger.warning("%s", warning)


def _is_basic(config: DictConfig) -> bool:
    return str(config.hydra.sweeper.get("_target_", "")).endswith(".BasicSweeper")


def wants_values(hydra_config: Any) -> bool:
    """Whether the sweeper chooses its jobs by what earlier ones were worth."""
    return not str(hydra_config.sweeper.get("_target_", "")).endswith(".BasicSweeper")


def _launcher(config: DictConfig) -> str:
    return str(config.hydra.runtime.choices.get("hydra/launcher") or "basic")


def planned_jobs(config: DictConfig) -> list[list[str]] | None:
    """The overrides of each job of a sweep over all combinations; None for a sweeper that finds its jobs while it goes on."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    if not _is_basic(config):
        return None
    words = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    words += cast("list[str]", OmegaConf.to_container(config.hydra.overrides.task, resolve=False))
    try:
        overrides = OverridesParser.create().parse_overrides(words)
        return [list(job) for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]
    except HydraException:  # such as glob(*), which needs the files of the configuration
        return None


def jobs_at_a_time(config: DictConfig, jobs: Sequence[Sequence[str]] | None) -> int:
    """How many jobs a launcher runs side by side on this machine; 1 for those on other machines."""
    launcher = _launcher(config)
    if launcher == "joblib":
        asked = int(config.hydra.launcher.n_jobs)
        most = asked if asked > 0 else max(1, cores() + 1 + asked)
    elif launcher == "submitit_local":  # begins all of a batch at once
        most = int(config.hydra.sweeper.get("max_batch_size") or len(jobs or ()) or 1)
    else:
        return 1
    return max(1, min(most, len(jobs) if jobs is not None else int(config.hydra.sweeper.get("n_jobs") or most)))


def with_optuna_defaults(line: list[str]) -> list[str]:
    """A line with ``hydra/sweeper=optuna``, with :data:`OPTUNA_DEFAULTS` for what it does not say."""
    if OPTUNA not in line:
        return line
    given = {word.lstrip("+").partition("=")[0] for word in line}
    defaults = {key: value for key, value in OPTUNA_DEFAULTS.items() if key != "sampler.seed" or "hydra/sweeper/sampler=grid" not in line}
    return [*line, *(f"hydra.sweeper.{key}={value}" for key, value in defaults.items() if f"hydra.sweeper.{key}" not in given)]


def conclude(launch: Launch) -> str:
    """The end of a line that was a sweep: waits for the jobs that still run, and says in one line how many ended how.

    Raises
    ------
    SweepFailedError
        If a job of this launch did not finish. The message lists those, each with its error, and the way on.
    """
    sweep = _sweep_of(launch)
    sweep.wait_for(launch.id)
    sweep.settle(launch.id)
    sweep.end_launch(launch.id)
    said, bad, more = _told(launch)
    if not bad:
        return f"{said} `searchqa report multirun {sweep.folder}` shows it."
    if not more:
        raise SweepFailedError("\n".join([said, *bad, "The same line would be told the same: each job above says the way out."]))
    again = f"`searchqa {launch.command} resume={sweep.folder}` does what is left and tries again what failed; with retry=false it leaves what failed."
    raise SweepFailedError("\n".join([said, *bad, again]))


def stopped(launch: Launch) -> str:
    """The end of a line that was stopped, as by Ctrl-C: what was done until then, and the way on."""
    sweep = _sweep_of(launch)
    sweep.settle(launch.id, STOPPED)
    sweep.end_launch(launch.id)
    return f"{_told(launch)[0]} `searchqa {launch.command} resume={sweep.folder}` goes on with it."


def _sweep_of(launch: Launch) -> Sweep:
    if launch.sweep is None:
        raise ValueError("this launch was no sweep")
    return launch.sweep


def _told(launch: Launch) -> tuple[str, list[str], bool]:
    """How the jobs of a launch stand, in one line; a line for each that did not finish; and whether the same line would do something about them."""
    sweep = _sweep_of(launch)
    entry = sweep.launched(launch.id)
    left: Mapping[str, str] = entry["left"]
    records, damaged = sweep.readable_jobs()
    own = [job for job in records if job.name in left or any(attempt.launch == launch.id for attempt in job.history)]
    states = {job.name: _state(job, launch.id) for job in own}
    counts = Counter(states.values())
    planned = len({tuple(words) for words in entry["jobs"]}) if entry["jobs"] is not None else 0  # agent=oracle,oracle is one job
    counts[NOT_BEGUN] = max(0, planned - len(own) - len(damaged))
    earlier = sum(left.get(job.name) == FINISHED and not any(attempt.launch == launch.id for attempt in job.history) for job in own)
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no job was begun"
    said = f"Sweep {sweep.folder}: {said}{f' ({earlier} of them before)' if earlier else ''}."
    bad, more = [], bool(counts[NOT_BEGUN])
    for job in own:
        state = states[job.name]
        if state not in DONE:
            more |= job.history[-1].status != REFUSED or job.history[-1].launch != launch.id
            why = left.get(job.name) if state in (RUNNING, LOST) else job.history[-1].error
            trace = f", trace {sweep.error_file(job.name)}" if state == FAILED and sweep.error_file(job.name).is_file() else ""
            bad.append(f"  {job.name}: {state}{f': {why}' if why else ''} (folder {sweep.folder / job.name}{trace})")
    bad += [f"  {error}" for error in damaged]
    if counts[NOT_BEGUN]:
        bad.append(f"  {counts[NOT_BEGUN]} of {planned} jobs were not begun")
    return said, bad, more


def _state(job: JobRecord, launch: str) -> str:
    """How a job stands at the end of a launch, which may have been refused what an earlier one had finished."""
    last = job.history[-1] if job.history else None
    return FAILED if last is not None and last.launch == launch and last.status == REFUSED else job.state()
