"""Runs a command as a Hydra application, and explains what Hydra says about a wrong line."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import searchqa_conf  # noqa: F401, registers resolvers, also in a launcher's processes
from searchqa_agents.launch import place
from searchqa_agents.multirun import (
    NO_TRIALS,
    OPTUNA,
    SWEEP_FILE,
    JobFailedError,
    Launch,
    conclude,
    launching,
    stopped,
    wants_values,
    with_optuna_defaults,
)
from searchqa_agents.objective import ObjectiveError, objective_of
from searchqa_agents.runs import SUMMARY_FILE, RunFolder, RunFolderError, check_run_folder, replace_file
from searchqa_agents.settings import with_parts
from searchqa_agents.sweeps import FAILED, FINISHED, KILLED, REFUSED, JobRecord, SameFolderError, Sweep, SweepRecordError, one_line
from searchqa_agents.threads import set_threads
from searchqa_envs.errors import ConfigurationError

CONFIG_PATH = "pkg://searchqa_conf"
OVERRIDES_FILE = "overrides.yaml"
"""What ``resume=`` begins with. Hydra's own record is no use: it is also written for a line that is then refused."""
FIXED_KEYS = ("env", "seed", "agent", "start", "lora", "questions", "stages", "evaluation")
"""What is the same in all of a run: its numbers must not be mixed with those of other settings."""
LATER_FIXED_KEYS = (
    "random",
    "demonstrations",
    "dtype",
    "model",
    "rows",
    "by",
    "prompt",
    "documents",
    "titles",
    "notes",
    "system",
    "max_tokens",
    "suite",
    "task",
)
"""The same, of which folders of some commands or of earlier versions have none."""
TRAINING_KEYS = ("warmup", "sft", "algo")
"""Settings of a training phase. A run that is not finished may go on with others, where the line says ``resume=``."""
FREE = ("steps", "max_steps", "checkpoint_every")
"""Of these, what any line may change, but for steps of a finished run: fewer ones, and those of what comes before its last phase."""
MECHANICS = ("timeout", "deadline", "retries", "concurrency", "batch_size")
"""Of ``judge``, what no verdict depends on."""
AGENT_MECHANICS = ("url", "timeout", "deadline", "retries", "concurrency")
"""Of ``agent``, and of the language model that it asks, what no answer depends on: where the server is, and how it is asked."""
RETRIEVER_MECHANICS = (*AGENT_MECHANICS, "hedge_after", "token")
"""The same of ``env.retriever`` and of what is in it, where its name is http: an evaluation compares what the server says that it searches."""
OWN_TO_A_PROCESS = ("shard",)
"""Keys that ``resume=`` does not begin with: they say what one process of several does."""
logger = logging.getLogger(__name__)
_resumed: ContextVar[bool] = ContextVar("resumed", default=False)
"""Whether the line of this job said ``resume=``."""


def run_app(
    config_name: str,
    task: Callable[[Any, Path], object],
    line: Sequence[str],
    before: Callable[[Sequence[str]], object] | None = None,
    multirun: bool = False,
    current: Callable[[DictConfig, Path], str | None] | None = None,
) -> int:
    """Compose the configuration ``config_name`` with the overrides of ``line`` and call ``task(config, folder)`` for each job.

    ``config`` is the composed configuration, its types checked; ``folder`` is the job's run folder. ``before`` gets the whole line, also that of
    a run that is resumed, before anything is composed. In a multirun, a job that fails or is killed does not stop the others. ``multirun`` is for a
    configuration that is one without ``-m`` (its ``hydra.mode`` says so): it names the jobs' folders itself, by ``hydra.sweep.subdir``. ``current(config,
    folder)`` is asked about a job of a multirun that its folder says is finished, in whichever process runs it: it returns None, or why what the folder
    holds is no longer what the line asks for, with the way out. Then the job is refused with these words, and the folder stays as it is.

    Raises
    ------
    SweepFailedError
        At the end of a multirun of which some jobs did not finish.
    """
    if place().world_size > 1 and config_name != "train":
        raise ConfigurationError(
            f"`searchqa {config_name}` works in one process; start it without torchrun. `searchqa train` works in several."
        )
    launch = Launch.of(config_name.replace("_", " "), line)
    resumed = _last_value(line, "resume", "null") not in ("", "null")
    line = with_parts(_with_resume(list(line)))
    if before is not None:
        before(line)
    line = _with_sweep_folders(line, multirun)
    dry_run = _last_value(line, "dry_run", "false").lower() in ("true", "yes", "on", "1")
    sweep_file = Path(_last_value(line, "hydra.sweep.dir", "nowhere")) / SWEEP_FILE
    sweep = sweep_file.read_bytes() if sweep_file.is_file() else None
    full_error, arguments = os.environ.get("HYDRA_FULL_ERROR"), sys.argv
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of ending the process
    try:
        with tempfile.TemporaryDirectory() as nowhere:
            if dry_run or place().rank:  # leaves no folder behind; of several processes, the first writes
                line += [f"hydra.run.dir='{nowhere}'", f"hydra.sweep.dir='{nowhere}'", "hydra.output_subdir=null", "hydra/job_logging=none"]
            with launching(launch):
                _carry_out(launch, line, _Job(task, config_name, resumed, line, launch.id, current))
                if launch.sweep is not None:
                    _write(conclude(launch))
    except _JobFailed as failed:
        raise failed.error from None
    finally:
        if sweep is not None and launch.sweep is not None and _was_refused(launch):
            # Hydra has written the line that was refused over the one that the sweep was begun with
            replace_file(sweep_file, lambda partial: partial.write_bytes(sweep))
        sys.argv = arguments
        for handler in root.handlers:
            if handler not in handlers:  # Hydra's, of this run
                handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
    return 0


def _carry_out(launch: Launch, line: Sequence[str], job: _Job) -> None:
    """Let Hydra run the jobs of a line. A launcher that gives up because a job's process was killed is started again for the others."""
    import hydra

    words = _options_first(line)
    while True:
        sys.argv = [f"searchqa {job.__name__}", *words]
        try:
            hydra.main(config_path=CONFIG_PATH, config_name=job.__name__, version_base="1.3")(job)()
        except JobFailedError:  # of a sweeper that has seen too many; the records say which
            return
        except KeyboardInterrupt:
            if launch.sweep is not None:
                _write(stopped(launch))
            raise
        except Exception as error:
            if launch.sweep is not None and isinstance(error, ValueError) and str(error).startswith(NO_TRIALS):
                return  # every trial failed; the records say how
            killed = launch.sweep.settle(launch.id) if launch.sweep is not None else []
            if launch.sweep is None:
                raise
            if not killed:
                launch.sweep.end_launch(launch.id, one_line(error))
                raise
            logger.warning("Killed: %s (%s: %s). Going on.", ", ".join(killed), type(error).__name__, " ".join(str(error).split()))
            words = [*_options_first(line), f"hydra.sweep.dir='{launch.sweep.folder}'"]
        else:
            return


def _was_refused(launch: Launch) -> bool:
    """Whether a job's folder holds something else than this line asks for."""
    jobs = launch.sweep.readable_jobs()[0] if launch.sweep is not None else []
    return any(attempt.status == REFUSED and attempt.launch == launch.id for job in jobs for attempt in job.history)


def _write(text: str) -> None:
    from rich.console import Console

    Console().print(text, markup=False, highlight=False, soft_wrap=True)


class _JobFailed(BaseException):
    """Carries a job's error past Hydra, which would print a trace of its own; no ``Exception``, so that Hydra lets it through."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class _Job:
    """The task function; a class, so that launchers can send it to other processes."""

    def __init__(
        self,
        task: Callable[[Any, Path], object],
        config_name: str,
        resumed: bool,
        line: Sequence[str],
        launch: str,
        current: Callable[[DictConfig, Path], str | None] | None = None,
    ) -> None:
        self.task = task
        self.current = current
        self.resumed = resumed
        self.line = list(line)
        self.launch = launch
        self.__module__ = task.__module__
        self.__name__ = config_name

    def __call__(self, config: DictConfig) -> object:
        hydra_config = HydraConfig.get()
        sys.argv = ["searchqa", *self.__name__.split("_"), *self.line]  # for the stamp, also in a launcher's process
        token = _resumed.set(self.resumed)
        try:
            set_threads(config.get("threads"))
            if hydra_config.mode == RunMode.MULTIRUN and not config.get("dry_run"):
                return self._recorded(config, hydra_config)
            done = self.task(config, Path(hydra_config.runtime.output_dir))
            return 0.0 if hydra_config.mode == RunMode.MULTIRUN else done  # of a dry run; a sweeper that looks at values wants one
        except Exception as raised:
            if isinstance(raised, JobFailedError):
                raise
            if isinstance(raised, SameFolderError):
                Sweep(hydra_config.sweep.dir).end_launch(self.launch, one_line(raised))
            raise _JobFailed(_with_whole_key(raised, config)) from raised
        finally:
            _resumed.reset(token)

    def _recorded(self, config: DictConfig, hydra_config: Any) -> float | None:
        """A job of a sweep: its objective; None where none is asked for, or where it did not finish and the sweeper goes on regardless."""
        path = Path(hydra_config.runtime.output_dir)
        folder = Path(hydra_config.sweep.dir)
        name = Path(os.path.relpath(path, folder)).as_posix()
        sweep, key = Sweep(folder), config.get("objective")

        def outdated() -> str | None:
            finished = self.current is not None and _has_settings(path, config) and _has_results(path)
            return self.current(config, path) if self.current is not None and finished else None

        def done(record: JobRecord | None) -> bool:
            finished = is_finished(path, config) if record is None else _has_settings(path, config) and _has_results(path)
            return finished and outdated() is None

        def value() -> float | None:
            return objective_of(path, key) if key is not None or wants_values(hydra_config) else None

        def work() -> float | None:
            reason = outdated()
            if reason is not None:
                raise RunFolderError(reason)
            try:
                self.task(config, path)
            except MissingMandatoryValue as raised:
                raise _with_whole_key(raised, config) from raised
            return value()

        retry = bool(config.get("retry", True))
        overrides = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)  # as the sweep's list of its jobs has them
        found: float | None = None
        try:
            left = sweep.begin(name, cast("list[str]", overrides), self.launch, retry=retry, done=done)
        except (SweepRecordError, SameFolderError) as raised:
            if isinstance(raised, SameFolderError) and not wants_values(hydra_config):
                raise
            left = str(raised)
        error: str | None = f"left as it is: {left}"
        if left is None:
            found, error = sweep.carry_out(name, work)
        elif left == FINISHED:
            _write(f"{path} is finished: nothing to do.")
            try:
                found, error = value(), None
            except (ConfigurationError, ObjectiveError) as raised:
                error = str(raised)
        if error is not None:
            if left not in (FAILED, KILLED):  # of which the end of the sweep tells
                logger.error("Job %s (%s): %s", hydra_config.job.num, name, error)
            if wants_values(hydra_config):
                raise JobFailedError(f"{name}: {error}")
        return found


def _with_whole_key(error: Exception, config: DictConfig) -> Exception:
    """An error about a value that is not given says only the last part of its key: the same error with the whole."""
    missing = sorted(OmegaConf.missing_keys(config)) if isinstance(error, MissingMandatoryValue) else []
    said = [key for key in missing if re.search(rf"\b{re.escape(key.rpartition('.')[2])}\b", str(error))]
    return MissingMandatoryValue(f"missing mandatory value: {said[0]}") if said else error


def write_config(folder: RunFolder, config: DictConfig, free: Sequence[str] = ()) -> None:
    """Write ``config.yaml``, resolved, and the overrides that led to it, if the folder may hold this run (:func:`check_config`)."""
    check_config(folder.path, config, free)
    (folder.path / SUMMARY_FILE).unlink(missing_ok=True)  # of an earlier end: from here on it would stand for another run
    keep_config(folder, config)


def keep_config(folder: RunFolder, config: DictConfig) -> None:
    """Write ``config.yaml``, resolved, and the overrides that led to it, over those of an earlier line."""
    folder.write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.create(_resolved(config))))
    kept = [word for word in HydraConfig.get().overrides.task if word.lstrip("+").partition("=")[0] not in OWN_TO_A_PROCESS]
    folder.write_text(OVERRIDES_FILE, OmegaConf.to_yaml(OmegaConf.create(kept)))


def check_config(path: Path, config: DictConfig, free: Sequence[str] = (), grows: Sequence[str] = (), *, moves: bool = False) -> None:
    """Refuse the folder of a run with other settings: its numbers must not be mixed with those of these, nor told under their name.

    More steps are a way on for every run. Other settings of the training (:data:`TRAINING_KEYS`) are one for a run that is resumed by ``resume=``
    and not finished, or has steps to come. ``free`` are keys that a command's runs may change all the same, ``grows`` those that a run may change which
    is resumed by ``resume=``. With ``moves``, the server of an HTTP retriever may be elsewhere, and asked in another way.
    """
    file = path / "config.yaml"
    if not file.exists():
        return
    now, before = _resolved(config), _resolved(OmegaConf.load(file))
    different = [key for key in FIXED_KEYS if key not in free and _answers(key, before, moves) != _answers(key, now, moves)]
    fixed_later = dict.fromkeys([*LATER_FIXED_KEYS, *(key for key in grows if key not in FIXED_KEYS)])
    different += [key for key in fixed_later if key in before and before[key] != now.get(key)]
    if grows and different and set(different) <= set(grows):
        if _resumed.get():
            return
        raise RunFolderError(
            f"{path} holds a run with another {' and another '.join(different)}; go on with resume={path}, which plays what is asked for beside what is "
            "played already and writes the results anew, or choose another run_dir."
        )
    different += [f"judge.{key}" for key in _differing(before.get("judge"), now.get("judge")) if key not in MECHANICS]
    if _algorithm_name(before) not in (None, _algorithm_name(now)):
        different.append("algo")
    fixed = bool(different)
    if not fixed:
        different = list(_retrained(before, now, finished=(path / SUMMARY_FILE).is_file() or (path / "model").is_dir()))
    if different:
        way = "" if fixed else f"go on with resume={path}, which takes other settings for the steps that are still to come, "
        raise RunFolderError(
            f"{path} holds a run with another {' and another '.join(different)}; {way}choose another run_dir, or remove the folder."
        )


def _answers(key: str, config: Mapping[str, Any], moves: bool = False) -> Any:
    """The value of a key, of an agent without its mechanics; with ``moves``, of an environment without those of an HTTP retriever."""
    value = config.get(key)
    if key == "env" and moves and isinstance(value, Mapping):
        return {name: _unplaced(own) if name == "retriever" else own for name, own in value.items()}
    if key != "agent" or not isinstance(value, Mapping):
        return value
    plain = {name: own for name, own in value.items() if name not in AGENT_MECHANICS}
    return {name: _answers("agent", {"agent": own}) if name == "lm" else own for name, own in plain.items()}


def _unplaced(retriever: Any) -> Any:
    """The settings of a retriever without where HTTP servers are and how they are asked, also of the retrievers in it."""
    if isinstance(retriever, Mapping):
        left_out = RETRIEVER_MECHANICS if retriever.get("name") == "http" else ()
        return {name: _unplaced(own) for name, own in retriever.items() if name not in left_out}
    return [_unplaced(own) for own in retriever] if isinstance(retriever, list) else retriever


def _differing(before: Any, now: Any) -> list[str]:
    """The keys that two mappings both have, with other values."""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return []
    return [str(key) for key in before if key in now and before[key] != now[key]]


def _retrained(before: Mapping[str, Any], now: Mapping[str, Any], *, finished: bool) -> Iterator[str]:
    """The settings of the training that differ and that this run may not go on with, such as ``algo.learning_rate``."""
    last = "algo" if "algo" in now else "sft"
    for section in TRAINING_KEYS:
        keys = _differing(before.get(section), now.get(section))
        more = now[section]["steps"] - before[section]["steps"] if "steps" in keys else 0
        if not finished or (section == last and more > 0):
            refused = [] if _resumed.get() else [key for key in keys if key not in FREE]
        else:
            refused = [key for key in keys if key != "checkpoint_every"]
        yield from (f"{section}.{key}" for key in refused)


def is_finished(path: Path, config: DictConfig) -> bool:
    """Whether the folder holds a run of this very configuration that came to its end."""
    return (path / SUMMARY_FILE).is_file() and _has_settings(path, config)


def _has_results(path: Path) -> bool:
    return (path / SUMMARY_FILE).is_file() or (path / "model").is_dir()


def _has_settings(path: Path, config: DictConfig) -> bool:
    """Whether the folder is that of a run of this very configuration."""
    file = path / "config.yaml"
    if not file.is_file():
        return False
    try:
        before = _resolved(OmegaConf.load(file))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException):  # the job itself says what is wrong with it
        return False
    now = _resolved(config)
    own = (
        "run_dir",
        "name",
        "dry_run",
        "plan",
        "retry",
        "objective",
        "threads",
        "wandb",
        "dashboard",
        "plugins",
    )  # when, how and under what name a run was begun change nothing
    return {k: v for k, v in now.items() if k not in own} == {k: v for k, v in before.items() if k not in own}


def _resolved(config: Any) -> dict[str, Any]:
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    return {str(key): value for key, value in resolved.items()}


def _algorithm_name(config: Any) -> str | None:
    algo = config.get("algo")
    return algo.get("name") if isinstance(algo, dict) else None


def _last_value(line: Sequence[str], key: str, default: str) -> str:
    values = [word.partition("=")[2] for word in line if word.lstrip("+").partition("=")[0] == key]
    return values[-1].strip("'\"") if values else default


def _with_resume(line: list[str]) -> list[str]:
    """``resume=FOLDER`` as ``run_dir=FOLDER`` with the overrides that the run or sweep was begun with; overrides on the line win."""
    folder = _last_value(line, "resume", "")
    line = [word for word in line if word.partition("=")[0] != "resume"]
    if not folder or folder == "null":
        return line
    sweep_file = Path(folder) / SWEEP_FILE
    if sweep_file.is_file():
        overrides = _as_written(sweep_file)["hydra"]["overrides"]
        begun = ["-m", *overrides["hydra"], *overrides["task"]]
    else:
        path = check_run_folder(folder)
        saved_file = path / OVERRIDES_FILE
        if not saved_file.is_file():
            raise RunFolderError(
                f"{path} cannot be resumed: {saved_file} is missing. Give the same line as before with run_dir={folder} instead."
            )
        begun = _as_written(saved_file)
    theirs = {word.partition("=")[0] for word in line} | {
        "run_dir",
        "resume",
        "retry",
        "hydra.sweep.dir",
        "hydra.sweep.subdir",
        "hydra.mode",
    }
    saved = [str(word) for word in begun if str(word).partition("=")[0] not in theirs]
    return [*saved, *line, f"run_dir='{folder}'"]


def _as_written(file: Path) -> Any:
    """What a YAML file says, with its interpolations as they are: ``questions=ids-${seed}.jsonl`` means another file in each job of a sweep."""
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False)


WITH_VALUE = (
    "--config-dir",
    "-cd",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--package",
    "-p",
    "--cfg",
    "-c",
    "--experimental-rerun",
)
"""Options of Hydra that are followed by a value."""


def _options_first(line: Sequence[str]) -> list[str]:
    """Options before overrides: Hydra's parser takes no override behind an option that stands behind another override."""
    options: list[str] = []
    overrides: list[str] = []
    for before, word in zip(("", *line), line, strict=False):
        (options if word.startswith("-") or before in WITH_VALUE else overrides).append(word)
    return [*options, *overrides]


def _with_sweep_folders(line: list[str], multirun: bool = False) -> list[str]:
    """In a multirun: ``run_dir`` is the sweep's folder, and jobs' folders are named by what differs between them, such as ``algo-ppo_seed-1``.

    With ``multirun``, the configuration names the jobs' folders. A search by Optuna has its defaults.
    """
    ablation = _last_value(line, "ablation", "null")
    if not multirun and not {"-m", "--multirun"} & set(line):
        if ablation != "null" and not {"-c", "--cfg"} & set(line):
            raise ConfigurationError(f"ablation={ablation} is a comparison of several runs: `searchqa train -m ablation={ablation}`.")
        return line
    given = {word.partition("=")[0] for word in line}
    folder = _last_value(line, "run_dir", "")
    line = [word for word in line if word.partition("=")[0] != "run_dir"]
    if folder and "hydra.sweep.dir" not in given:
        line.append(f"hydra.sweep.dir='{folder}'")
    line = with_optuna_defaults(line)
    if multirun and OPTUNA not in line:
        return line
    overrides = OverridesParser.create().parse_overrides([word for word in line if not word.startswith("-") and "=" in word])
    swept = [override for override in overrides if override.is_sweep_override()]
    plain = all(re.fullmatch(r"[\w.:+~=-]{1,60}", choice) for override in swept for choice in _choices(override))
    if (swept or ablation != "null") and plain and "hydra.sweep.subdir" not in given:
        same = sorted({override.key_or_group for override in overrides} - {override.key_or_group for override in swept})
        kept = "seed" if ablation != "null" else None  # so that a line with one seed and a later one with all have the same folders
        same = [key for key in same if not key.startswith("hydra") and key != kept]
        naming = "hydra.job.config.override_dirname"  # no = and no commas in names: a path should need no quotes on a line
        line += ["hydra.sweep.subdir=${hydra.job.override_dirname}", f"{naming}.exclude_keys=[{','.join(same)}]"]
        line += [f"{naming}.kv_sep='-'", f"{naming}.item_sep='_'"]
    return line


def _choices(override: Override) -> list[str]:
    """The values that a swept key takes, as they would stand in a folder's name; ``?`` for those that cannot be known yet."""
    if override.is_interval_sweep():
        return []
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP or not override.is_discrete_sweep():
        return ["?"]
    return [str(value) for value in override.sweep_string_iterator()]


def explained_override(error: BaseException) -> str | None:
    """What is wrong with a line and the way out, for errors of Hydra and OmegaConf; None for other errors."""
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    said = " ".join(str(cause) for cause in causes)
    override = re.search(r"Could not override '([^']+)'", said)
    missing = re.search(r"Could not find '([^']+)'", said)
    mandatory = re.search(r"missing mandatory value: (\S+)", said, re.IGNORECASE)
    if override is not None and "not in" in said:
        return _unknown_key(override.group(1))
    if missing is not None:
        return _unknown_option(missing.group(1), said)
    if mandatory is not None:
        return f"{mandatory.group(1)} has no value; give one: {mandatory.group(1)}=..."
    texts = list(dict.fromkeys(line.strip() for cause in causes for line in str(cause).splitlines() if line.strip()))
    texts = [text for text in texts if not text.startswith(("object_type", "reference_type", "full_key"))]
    key = re.search(r"full_key: (\S+)", said)
    return f"{'key ' + key.group(1) + ': ' if key else ''}{' '.join(texts)} (`--cfg job` shows the whole configuration.)"


def _unknown_key(wrong: str) -> str:
    known, key = _known_keys(), wrong
    if key in known:
        return f"the key {key!r} belongs to another choice of {key.partition('.')[0]} than yours.{_of_model(key)} `--cfg job` shows the keys of your choice."
    key = re.sub(r"\blr$", "learning_rate", key)
    close = [key] if key in known else difflib.get_close_matches(key, known, n=3, cutoff=0.55)
    close = close or [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]][:3]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"there is no configuration key {wrong!r}.{hint} `--cfg job` shows all keys of a command."


def _of_model(key: str) -> str:
    """Where a key of a language model stands with a baseline, which has its model inside."""
    from dataclasses import fields

    from searchqa_agents.settings import LANGUAGE_MODELS

    group, _, name = key.partition(".")
    known = {field.name for settings in LANGUAGE_MODELS for field in fields(settings)}
    return f" Of a baseline's model it is agent.lm.{name}." if group == "agent" and name in known else ""


def _unknown_option(option: str, said: str) -> str:
    from searchqa_agents.config_help import options, published_recipes

    group, _, name = option.partition("/") if option.startswith("recipe/") else option.rpartition("/")
    known = options(group) if group else []
    if group == "recipe":
        known += published_recipes()
    if known and group == "algo":  # those of plugins have no file
        nodes = [node.removesuffix(".yaml") for node in ConfigStore.instance().repo.get("algo", {})]
        known = sorted({*known, *(node for node in nodes if not node.endswith("_types"))})
    if not known:
        return said.splitlines()[0]
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(f'{group}={found}' for found in close)}?" if close else ""
    yours = "plugins=[FILE.py] or --config-dir adds" if group == "algo" else "--config-dir adds"
    return f"{group}={name} is not known.{hint} {group} can be: {', '.join(known)}; {yours} your own."


def _known_keys() -> list[str]:
    """All keys that the configurations of this package have."""
    from searchqa_agents.config_help import conf_dir

    keys: set[str] = set()
    for path in conf_dir().rglob("*.yaml"):
        group = path.parent.relative_to(conf_dir()).as_posix()
        prefix = "" if group == "." else f"{group}."
        if not group.startswith(
            ("hydra", "env/", "recipe", "ablation", "variant", "task", "suite")
        ):  # env's keys are those of its types; the others' stand elsewhere
            keys.update(f"{prefix}{name}" for name in _flat(OmegaConf.load(path)))
    for group, nodes in ConfigStore.instance().repo.items():  # the types: fields that no file mentions
        if (conf_dir() / group).is_dir() and not group.startswith(("hydra", "_")):
            keys.update(f"{group}.{name}" for node in nodes.values() for name in _flat(node.node))
    return sorted(keys)


def _flat(config: Any, prefix: str = "") -> list[str]:
    names = []
    for name in config:
        if str(name) in ("defaults", "hydra"):
            continue
        names.append(f"{prefix}{name}")
        if isinstance(config._get_node(name), DictConfig) and not OmegaConf.is_missing(config, name):
            names += _flat(config._get_node(name), f"{prefix}{name}.")
    return names
