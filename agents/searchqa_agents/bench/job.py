"""One job of the benchmark: a task, an algorithm, a seed. It trains until its budget is spent, and is measured at each eighth of it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from searchqa_agents.algorithm import AlgorithmConfig, get_algorithm
from searchqa_agents.bench.results import SHARES, Point, ScoreRun, normalised_score, write_run
from searchqa_agents.bench.task import BenchSettings, HeldOut
from searchqa_agents.loading import checkpoint_path, checkpoint_tokenizer, chosen_device, chosen_dtype, make_venv
from searchqa_agents.optimisation import TrainingDivergedError
from searchqa_agents.policy import Policy
from searchqa_agents.progress import Advance, progress
from searchqa_agents.runs import SUMMARY_FILE, RunFolder, list_checkpoints, run_stamp
from searchqa_agents.settings import built
from searchqa_agents.trainer import train
from searchqa_agents.training_run import STATE_FILE, load_state, save_policy, save_state
from searchqa_agents.transformers_lm import NotANumberError
from searchqa_agents.watching import check_watching, watched_run
from searchqa_envs.errors import ConfigurationError

logger = logging.getLogger(__name__)

MOST_STEPS = 1_000_000
"""No task has a budget for so many rollouts: schedules are over the budget, and the budget ends the training."""
SB3 = "sb3_ppo"
"""What Stable-Baselines3's PPO is called as an algorithm."""


class Course:
    """What a job has spent and reached so far: it measures where a share of the budget is spent, and writes it all to the run's folder.

    Parameters
    ----------
    folder
        The job's; lines of ``metrics.jsonl`` that it has from before belong to the course.
    measure
        Measures the policy as it is now: exact match and searches.
    """

    def __init__(
        self, folder: RunFolder, budget: int, references: Mapping[str, float], measure: Callable[[], Mapping[str, float]], advance: Advance
    ) -> None:
        self.folder, self.budget, self.references, self.measure, self.advance = folder, budget, references, measure, advance
        lines = folder.metrics()
        self.points = [_point(line) for line in lines if line["phase"] == "measured"]
        taken = [line for line in lines if line["phase"] == "train"]
        last: Mapping[str, Any] = taken[-1] if taken else {}
        self.steps = int(last.get("step", 0))
        self.policy_tokens, self.environment_tokens = (
            int(last.get("charts/policy_tokens", 0)),
            int(last.get("charts/environment_tokens", 0)),
        )
        self.seconds, self.cpu_seconds = float(last.get("time/training", 0.0)), float(last.get("time/training_cpu", 0.0))
        self.start_clock()
        if not self.points:
            self._measured(0.0)

    def start_clock(self) -> None:
        """What is done from here on is training; before, it was measuring or writing."""
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def stop_clock(self) -> None:
        """What was done since the clock was started was training."""
        self.seconds += time.perf_counter() - self._began
        self.cpu_seconds += time.process_time() - self._cpu_began

    def step(self, metrics: Mapping[str, float], policy_tokens: int, environment_tokens: int) -> None:
        """A step of training has ended, with so many tokens since the training began."""
        self.stop_clock()
        self.steps += 1
        self.policy_tokens, self.environment_tokens = policy_tokens, environment_tokens
        spent = {"charts/policy_tokens": float(policy_tokens), "charts/environment_tokens": float(environment_tokens)}
        self.folder.log("train", self.steps, {**metrics, **spent, "time/training": self.seconds, "time/training_cpu": self.cpu_seconds})
        due = [share for share in SHARES[len(self.points) :] if policy_tokens >= share * self.budget]
        if due:
            self._measured(*due)
        self.advance(min(policy_tokens, self.budget), f"score {self.points[-1].score:.3f}")
        self.start_clock()

    def _measured(self, *shares: float) -> None:
        found = self.measure()
        for share in shares:  # a large rollout can spend several
            spent = (self.policy_tokens, self.environment_tokens, self.steps, self.seconds, self.cpu_seconds)
            em = found["em"]
            point = Point(share, *spent, em, found.get("searches", 0.0), normalised_score(em, self.references))
            self.points.append(point)
            self.folder.log("measured", self.steps, asdict(point))

    def whole(self, status: str) -> tuple[Point, ...]:
        """All nine points; of a run that diverged those that are missing have a score of 0."""
        rest = SHARES[len(self.points) :]
        short = any(point.policy_tokens < point.share * self.budget for point in self.points)
        if (rest or short) and status == "finished":
            raise ConfigurationError(
                f"{self.folder.path}: the training ended after {self.policy_tokens} of {self.budget} policy tokens, before its budget was spent."
            )
        spent = (self.policy_tokens, self.environment_tokens, self.steps, self.seconds, self.cpu_seconds)
        return (*self.points, *(Point(share, *spent, 0.0, 0.0, 0.0) for share in rest))


def _point(line: Mapping[str, Any]) -> Point:
    values: dict[str, Any] = {f.name: line[f.name] for f in fields(Point)}
    return Point(**values)


def run_job(
    settings: BenchSettings, folder: RunFolder, label: str, line_says: Sequence[str] = (), begun: Callable[[], object] = lambda: None
) -> ScoreRun:
    """Train and measure; returns what it has also written as ``score.json``.

    ``line_says`` are the keys that the command line sets itself. ``begun`` is called once it is clear that the folder may hold this job.

    Raises
    ------
    ConfigurationError
        A setting is out of its range, or the start or the environment cannot be had.
    """
    task = settings.task
    disable_progress_bar()  # type: ignore[no-untyped-call] # transformers' own, of files that are read and written in a moment
    settings.env.tokenizer = settings.env.tokenizer or checkpoint_tokenizer(task.start)
    check_task(settings)
    checkpoints = list_checkpoints(folder.path)
    last = checkpoints[-1] if checkpoints else None
    if last is not None:
        logger.warning("Going on from %s.", last.path)
    folder.rewind(last)
    venv = make_venv(settings.env, settings.num_envs)
    held_out = HeldOut(settings)
    algorithm, config = algorithm_of(settings, line_says)
    stamp = job_stamp(settings, venv, held_out, label, config)
    folder.write_stamp(stamp)
    begun()
    folder.write_tokenizer(venv.unwrapped.tokenizer)
    start = Policy.load(
        checkpoint_path(task.start), venv.unwrapped.tokenizer, dtype=chosen_dtype(settings.dtype), device=chosen_device(settings.device)
    )
    references = _references(folder, held_out, start)
    kept: dict[str, list[Any]] = {}

    def measure() -> Mapping[str, float]:
        found, trajectories = held_out.measure(start, stamp)
        kept["after" if kept or last is not None else "before"] = trajectories
        return found

    status = "finished"
    shown = progress(f"{label}, {task.name}, seed {settings.seed}", task.budget)
    with watched_run(settings, folder), shown as advance:
        course = Course(folder, task.budget, references, measure, advance)
        try:
            if algorithm is None:
                from searchqa_agents.bench.sb3_job import learn

                learn(settings, config, folder, start, course)
            else:
                _learn(settings, algorithm, config, folder, start, venv, course, stamp)
        except (TrainingDivergedError, NotANumberError) as error:
            status = "diverged"
            logger.warning("%s, seed %d on %s has diverged: %s", label, settings.seed, task.name, error)
    for name, trajectories in kept.items():
        if settings.save:
            folder.write_trajectories(name, trajectories[: settings.save])
    venv.close()
    held_out.close()
    points = course.whole(status)
    of_the_job = ("seed", "steps", "token_budget")
    known = {key: value for key, value in asdict(config).items() if key not in of_the_job}
    run = ScoreRun(
        suite=settings.suite,
        task=task.name,
        task_version=task.version,
        algorithm=label,
        seed=settings.seed,
        budget=task.budget,
        references=references,
        points=points,
        settings=_plain(known),
        stamp=_plain(stamp),
        status=status,
    )
    write_run(folder.path, run)
    folder.write_json(SUMMARY_FILE, summary_of(run, folder))
    return run


def check_task(settings: BenchSettings) -> None:
    """Raise ``ConfigurationError`` for numbers of a task that cannot be."""
    check_watching(settings)
    task = settings.task
    for name in ("budget", "questions_per_step", "questions", "version"):
        value = getattr(task, name)
        if value < 1:
            raise ConfigurationError(f"task.{name} must be at least 1; got {value}.")
    if not 0 <= task.temperature < math.inf:
        raise ConfigurationError(f"task.temperature must be a number of at least 0; got {task.temperature}.")


def algorithm_of(settings: BenchSettings, line_says: Sequence[str]) -> tuple[str | None, Any]:
    """The algorithm's name and its settings, with the task's budget and rollouts; the name is None for Stable-Baselines3's."""
    name = str(settings.algo.name)
    if name == SB3:
        from searchqa_agents.bench.sb3_job import SB3PPOConfig

        return None, built(SB3PPOConfig, settings.algo)
    config = built(get_algorithm(name).config, settings.algo)
    own_default = type(config).questions_per_step != AlgorithmConfig.questions_per_step
    if not own_default and "algo.questions_per_step" not in line_says:
        config = replace(config, questions_per_step=settings.task.questions_per_step)
    refused = [key for key in ("steps", "token_budget") if f"algo.{key}" in line_says]
    if refused:
        raise ConfigurationError(f"algo.{refused[0]} is the task's in a benchmark: all algorithms have its budget. Leave it out.")
    return name, replace(config, steps=MOST_STEPS, token_budget=settings.task.budget, seed=settings.seed)


def job_stamp(settings: BenchSettings, venv: Any, held_out: HeldOut, label: str, config: Any) -> dict[str, Any]:
    """What a score needs to be comparable: the environment that is trained in, how it was measured, where it began, and with which algorithm."""
    from searchqa_agents.eval_stamps import folder_sha256

    task = settings.task
    start = checkpoint_path(task.start)
    own: dict[str, Any] = {
        "suite": settings.suite,
        "task": f"{task.name}-v{task.version}",
        "start": task.start,
        "measured_on": held_out.stamp(),
        "algorithm": label,
        "plugins": plugins_stamp(settings),
    }
    if isinstance(start, Path):
        own["start_sha256"] = folder_sha256(start)
    stamp = {**run_stamp(venv.unwrapped.stamp(), seed=settings.seed, threads=settings.threads), **own}
    return {**stamp, "command": as_given(stamp["command"], label, own["plugins"])}


def plugins_stamp(settings: BenchSettings) -> dict[str, str]:
    """The name and sha256 of the file that registers the job's algorithm, where it is a plugin; others on the line do not matter to it."""
    name = str(settings.algo.name)
    module = None if name == SB3 else sys.modules.get(get_algorithm(name).config.__module__)
    file = Path(getattr(module, "__file__", None) or "").resolve()
    files = [Path(plugin).expanduser().resolve() for plugin in settings.plugins]
    return {file.name: file_sha256(file)} if file in files else {}


def file_sha256(file: Path) -> str:
    """Of the bytes of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def as_given(command: str, label: str, plugins: Mapping[str, str]) -> str:
    """A command line as a person gives it: ``algorithm=mine.py`` where Hydra was told ``algo=mine`` and the place of the file on this machine."""
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    given = []
    for word in words:
        key, _, value = word.partition("=")
        if key == "algo":
            names = [next(iter(plugins), name) if name == label else name for name in value.split(",")]
            given.append(f"algorithm={','.join(names)}")
        elif key == "hydra.sweep.dir":
            given.append(f"run_dir={value.strip(chr(39))}")
        elif key != "plugins" or not plugins:
            given.append(word)
    return shlex.join(given)


def _references(folder: RunFolder, held_out: HeldOut, start: Policy) -> dict[str, float]:
    """Measured once in a job; a job that goes on reads them, for its policy is no longer the start."""
    file = folder.path / "references.json"
    if file.is_file():
        values: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return values
    values = held_out.references(start)
    folder.write_json(file.name, values)
    return values


def _learn(
    settings: BenchSettings,
    algorithm: str,
    config: Any,
    folder: RunFolder,
    policy: Policy,
    venv: Any,
    course: Course,
    stamp: Mapping[str, Any],
) -> None:
    """Train by one of our algorithms."""
    checkpoints = list_checkpoints(folder.path)
    state = load_state(checkpoints[-1].path / STATE_FILE) if checkpoints else None

    def on_step(step: int, metrics: Mapping[str, float]) -> None:
        spent = int(metrics["charts/policy_tokens"])
        environment = course.environment_tokens + int(metrics["charts/tokens"]) - (spent - course.policy_tokens)
        course.step(metrics, spent, environment)

    def on_checkpoint(step: int, trainer_state: Mapping[str, Any]) -> None:
        def write(path: Path) -> None:
            save_policy(policy, path)
            save_state(path / STATE_FILE, trainer_state)

        folder.save_checkpoint("train", step, write)
        course.start_clock()

    train(policy, venv, algorithm, config, on_step=on_step, on_checkpoint=on_checkpoint, state=state, stamp=stamp)


def summary_of(run: ScoreRun, folder: RunFolder) -> dict[str, Any]:
    """What reports read of any run that trains."""
    first, last = run.points[0], run.points[-1]
    best = max(point.score for point in run.points)
    titles = {"score": "score", "em": "exact match, sampled", "searches": "searches per question"}
    measures = {when: {key: getattr(point, key) for key in titles} for when, point in (("before", first), ("after", last))}
    rows = [[title, f"{measures['before'][key]:.3f}", f"{measures['after'][key]:.3f}"] for key, title in titles.items()]
    return {
        "kind": "bench",
        "name": f"{run.algorithm}, {run.task}, seed {run.seed}",
        "algorithm": run.algorithm,
        "task": run.task,
        "seed": run.seed,
        "status": run.status,
        "score": last.score,
        "best_score": best,
        "seconds": folder.seconds,
        "tokens": last.policy_tokens + last.environment_tokens,
        "seconds_training": round(last.seconds, 3),
        "alarms": [],
        "lost_episodes": {},
        "search": {},
        "columns": ["held-out questions", "before", "after"],
        "rows": rows,
        "titles": titles,
        "measures": measures,
    }


def _plain(value: Any) -> Any:
    """As JSON would have it."""
    return json.loads(json.dumps(value, default=str))
