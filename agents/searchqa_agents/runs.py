"""A run's folder: all that a run leaves behind, written so that a killed run loses nothing it had earned.

    runs/<date-time>-<name>/
        config.yaml  stamp.json     what was run, and what a number from it needs to be comparable
        overrides.yaml              the line that began it, for resume=
        stamps.json                 the stamp of each time that it was begun or gone on with
        metrics.jsonl               one line per logged step, appended and flushed
        tensorboard/<phase>/        the same for TensorBoard, with a sample episode now and then; run/ has the settings and the table at the end
        checkpoints/<phase>-<step>/ the last few, the best, and those marked to be kept
        searches.jsonl              what searching has cost, one line per rollout; kept also of steps that are taken again
    trajectories/*.jsonl.gz     episodes as tokens
        tokenizer/                  what reads them, unless it is embedded
        summary.json                the table at the end
        learning_curve.png  report.html

Whole files are written beside their place and then renamed; a line that a killed process left unfinished is dropped when the folder is opened again.
So are half-written files and checkpoints, and the lines of steps behind the last checkpoint: these steps are taken again.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from searchqa_envs.errors import SearchQAError
from searchqa_retrievers.types import RetrieverError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from searchqa_agents.trajectory import Trajectory
    from searchqa_envs.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)

PACKAGES = ("searchqa-gym", "gymnasium", "numpy", "bm25s", "numba", "torch", "transformers", "hydra-core")
METRICS_FILE = "metrics.jsonl"
SEARCHES_FILE = "searches.jsonl"
STAMPS_FILE = "stamps.json"
SUMMARY_FILE = "summary.json"
TOKENIZER_FOLDER = "tokenizer"
RUN_WRITER = "run"
"""TensorBoard's folder of what is said once of a run."""
OWN_TO_A_RUN = frozenset({"seed", "command", "commit", "threads", "cpus", "packages", "python", "platform", "searchqa_gym"})
"""Parts of a stamp that may differ between runs whose mean is still meaningful."""


class RunFolderError(SearchQAError):
    """A folder is not a run's, is in use by another process, or holds a file that cannot be read."""


class StorageError(RunFolderError):
    """A file could not be written: the disk is full, a quota is used up, or the folder is gone."""


class OtherSearchError(RunFolderError):
    """A run would go on with another search engine, corpus or data than it was begun with."""


class Checkpoint(NamedTuple):
    """A saved state. ``metrics_lines`` is how many lines ``metrics.jsonl`` had when it was taken."""

    path: Path
    phase: str
    step: int
    metrics_lines: int
    created: float
    score: float | None
    keep: bool


class Watcher(Protocol):
    """Who is told what a run logs, beside its files: a terminal, or Weights & Biases. It raises nothing, so that no run ends for who watches it."""

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """A line of ``metrics.jsonl``: ``values`` without phase and step."""

    def episode(self, phase: str, step: int, trajectory: Trajectory, *, kept: bool) -> None:
        """A sample episode; ``kept`` where the run keeps the episodes of this step."""

    def finished(self, summary: Mapping[str, Any], page: Path | None) -> None:
        """The run has come to its end."""

    def close(self, failed: bool) -> None:
        """The folder is closed, after an error if ``failed``."""


class RunFolder:
    """One run's folder, open for writing; a second process that opens it gets a ``RunFolderError``.

    Parameters
    ----------
    path
        The folder; made if it is not there.
    keep_last
        How many of the latest checkpoints stay, beside the best and those saved with ``keep=True``.
    command
        The command that makes this run and can resume it.
    """

    def __init__(self, path: str | os.PathLike[str], keep_last: int = 2, command: str = "train") -> None:
        from filelock import FileLock, Timeout

        self.path = Path(path)
        self.command = command
        self.keep_last = keep_last
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise RunFolderError(f"{self.path} is in use by another running process; wait for it, or choose another run_dir.") from error
        self._clear_partial_files()
        self._started = time.monotonic() - self._seconds_so_far()
        self._lines = len(drop_unfinished_line(self.path / METRICS_FILE))
        _cut_unfinished_line(self.path / SEARCHES_FILE)
        self._writers: dict[str, SummaryWriter] = {}
        self.watchers: list[Watcher] = []

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """Close the TensorBoard files and those who watch, and let other processes in."""
        try:
            for watcher in self.watchers:
                watcher.close(failed)
            for writer in self._writers.values():
                writer.close()
        except OSError as error:  # what metrics.jsonl holds is not lost by it
            logger.warning("%s: TensorBoard's files could not be closed: %s", self.path, error)
        finally:
            self._writers.clear()
            self.watchers.clear()
            self._lock.release()

    def _clear_partial_files(self) -> None:
        """Remove what a killed process left half written."""
        for replaced in self._checkpoint_dir.glob(f"{_REPLACED}*"):  # killed between two renames: the old one is still good
            final = self._checkpoint_dir / replaced.name.removeprefix(_REPLACED)
            if not final.exists():
                os.replace(replaced, final)
        for stale in self._checkpoint_dir.glob(".partial-*"):
            shutil.rmtree(stale)
        for folder in (self.path, self.path / "trajectories"):
            for file in folder.glob(".partial-*"):
                file.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an ``OSError`` into a ``StorageError`` that says what is safe and how to go on."""
        try:
            yield
        except OSError as error:
            raise StorageError(f"A file of the run could not be written: {error}. Make room first. {self.way_on()}") from error

    def way_on(self, *overrides: str) -> str:
        """What is safe after a stop, and the line that goes on from it."""
        line = " ".join([f"searchqa {self.command} resume={self.path}", *overrides])
        checkpoints = list_checkpoints(self.path)
        if not checkpoints:
            return f"There is no checkpoint yet: `{line}` begins again."
        return f"The last good checkpoint is {checkpoints[-1].path}: `{line}` goes on from it."

    @contextmanager
    def telling_way_on(self) -> Iterator[None]:
        """Let the message of an error of the search back end end with what is safe and how to go on."""
        from searchqa_agents.lost_back_end import LostBackEndError

        try:
            yield
        except (RetrieverError, LostBackEndError) as error:
            raise type(error)(f"{str(error).rstrip('. ')}. {self.way_on()}") from error

    @property
    def seconds(self) -> float:
        """Seconds since the run began, without the time between a stop and its resumption."""
        return round(time.monotonic() - self._started, 3)

    @property
    def _checkpoint_dir(self) -> Path:
        return self.path / "checkpoints"

    def _seconds_so_far(self) -> float:
        lines = drop_unfinished_line(self.path / METRICS_FILE)
        return float(lines[-1].get("seconds", 0.0)) if lines else 0.0

    # -- files ---------------------------------------------------------------------------------------------------------------------------

    def write_text(self, name: str, text: str) -> Path:
        """Write a whole file at once: it is either the old or the new one, never half of it."""
        path = self.path / name
        with self._writing():
            replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file at once."""
        return self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")

    def write_stamp(self, stamp: Mapping[str, Any]) -> None:
        """Write ``stamp.json``, and add it to ``stamps.json``, which has one for each time that the run went on from a checkpoint.

        Raises
        ------
        OtherSearchError
            If the run would go on from a checkpoint with another retriever, corpus, data set or other rules than in any of those stamps. A part that
            one of the two does not know (None, or not there) is no difference. Other package versions are a warning.
        """
        earlier = self._stamps() if any(checkpoint.phase != "warmup" for checkpoint in list_checkpoints(self.path)) else []
        now = json.loads(json.dumps(stamp, default=str))  # as those that were written
        for one in earlier:
            different = stamp_differences(one, now)
            if different:
                told = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in different)
                raise OtherSearchError(
                    f"{self.path} cannot go on with another search engine, corpus or data than it was begun with, because its numbers would mix both: "
                    f"{told}. Bring back what was there (the same line of `searchqa serve`, the same plugin, the same files) and resume, or begin "
                    f"a new run in another run_dir, with start={list_checkpoints(self.path)[-1].path} if from this policy."
                )
        if earlier:
            versions = [{"searchqa_gym": one.get("searchqa_gym"), **one.get("packages", {})} for one in (earlier[-1], stamp)]
            changed = [name for name in versions[1] if versions[0].get(name) not in (None, versions[1][name])]
            if changed:
                told = ", ".join(f"{name} was {versions[0][name]}, is {versions[1][name]}" for name in changed)
                logger.warning("%s goes on with other package versions: %s.", self.path, told)
        self.write_json(STAMPS_FILE, [*earlier, stamp])
        self.write_json("stamp.json", stamp)

    def _stamps(self) -> list[dict[str, Any]]:
        """Those of each time; of a run that was begun before they were kept, the last."""
        file, last = self.path / STAMPS_FILE, self.path / "stamp.json"
        if file.is_file():
            stamps: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
            return stamps
        return [json.loads(last.read_text(encoding="utf-8"))] if last.is_file() else []

    def write_trajectories(self, name: str, trajectories: Iterable[Trajectory]) -> Path:
        """Write ``trajectories/<name>.jsonl.gz`` at once."""
        from searchqa_agents.trajectory import append_trajectories

        path = self.path / "trajectories" / f"{name}.jsonl.gz"
        with self._writing():
            path.parent.mkdir(exist_ok=True)
            replace_file(path, lambda partial: append_trajectories(partial, trajectories), suffix=".jsonl.gz")
        return path

    def write_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Keep with the trajectories what reads them, unless it is embedded."""
        from searchqa_agents.tokenizer_files import own_tokenizer, save_tokenizer

        if own_tokenizer(tokenizer.name) is None:
            with self._writing():
                save_tokenizer(tokenizer, self.path / TOKENIZER_FOLDER)

    # -- metrics -------------------------------------------------------------------------------------------------------------------------

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl`` and to TensorBoard: ``phase``, ``step``, ``seconds`` since the run began, and the values."""
        line = {"phase": phase, "step": int(step), "seconds": self.seconds, **values}
        with self._writing():
            with (self.path / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False, default=float) + "\n")
            self._lines += 1
            writer = self._tensorboard(phase, step)
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    writer.add_scalar(name, value, step)
            writer.flush()
        for watcher in self.watchers:
            watcher.log(phase, int(step), {"seconds": line["seconds"], **values})

    def show_episode(self, phase: str, step: int, trajectory: Trajectory, *, kept: bool) -> None:
        """Show a sample episode to who watches; where ``kept``, also as text in TensorBoard."""
        from searchqa_agents.episode_text import episode_text

        if kept:
            with self._writing():
                self._tensorboard(phase, step).add_text("sample episode", indented(episode_text(trajectory)), step)
        for watcher in self.watchers:
            watcher.episode(phase, step, trajectory, kept=kept)

    def describe(self) -> None:
        """Put ``config.yaml`` and ``stamp.json`` into TensorBoard, as text."""
        with self._writing():
            writer = self._tensorboard(RUN_WRITER, 0)
            for name in ("config.yaml", "stamp.json"):
                file = self.path / name
                if file.is_file():
                    writer.add_text(name, indented(file.read_text(encoding="utf-8")), 0)
            writer.flush()

    def finished(self, summary: Mapping[str, Any], measures: Mapping[str, float], page: Path | None = None) -> None:
        """Tell TensorBoard and who watches how the run ended.

        Parameters
        ----------
        summary
            With ``columns`` and ``rows`` of the table.
        measures
            The last measured values, which TensorBoard's HPARAMS tab sets beside the settings.
        page
            ``report.html``.
        """
        import yaml
        from torch.utils.tensorboard.summary import hparams

        with self._writing():
            writer = self._tensorboard(RUN_WRITER, 0)
            config = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
            found = {f"measured/{name}": float(value) for name, value in measures.items()}
            for part in hparams(_flat(config), found):  # type: ignore[no-untyped-call]
                writer._get_file_writer().add_summary(part)  # type: ignore[no-untyped-call]
            for name, value in found.items():
                writer.add_scalar(name, value, 0)
            rows = [summary.get("columns", []), *summary.get("rows", [])]
            writer.add_text("summary", indented("\n".join(" | ".join(map(str, row)) for row in rows)), 0)
            writer.flush()
        for watcher in self.watchers:
            watcher.finished(summary, page)

    def log_searches(self, phase: str, step: int, counters: Mapping[str, float]) -> None:
        """Append what some searches were to ``searches.jsonl``: sums, see ``searchqa_retrievers.counted``. Nothing, where there was none."""
        if any(counters.values()):
            with self._writing(), (self.path / SEARCHES_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"phase": phase, "step": int(step), **counters}) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines logged so far."""
        return read_metrics(self.path)

    def _tensorboard(self, phase: str, step: int) -> SummaryWriter:
        if phase not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[phase] = SummaryWriter(str(self.path / "tensorboard" / phase), purge_step=step)
        return self._writers[phase]

    # -- checkpoints ---------------------------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self, phase: str, step: int, write: Callable[[Path], object], *, score: float | None = None, keep: bool = False
    ) -> Checkpoint:
        """Save a state: ``write(folder)`` fills a folder that gets its name only once it is complete and on disk.

        Checkpoints beyond the last few are then removed, except the one with the highest ``score`` and those with ``keep``.

        Raises
        ------
        StorageError
            If ``write`` raised an ``OSError``. The checkpoints from before are still there.
        """
        name = f"{phase}-{step:06d}"
        partial, final = self._checkpoint_dir / f".partial-{name}", self._checkpoint_dir / name
        if partial.exists():
            shutil.rmtree(partial)
        checkpoint = Checkpoint(final, phase, int(step), self._lines, time.time(), score, keep)
        with self._writing():
            try:
                partial.mkdir(parents=True)
                write(partial)
                _write_record(partial, checkpoint)
                _sync(partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            if final.exists():  # saved before and taken again after a rewind
                replaced = self._checkpoint_dir / f"{_REPLACED}{name}"
                os.replace(final, replaced)
                os.replace(partial, final)
                shutil.rmtree(replaced)
            else:
                os.replace(partial, final)
            _sync_names(self._checkpoint_dir)
        self._remove_old_checkpoints()
        return checkpoint

    def keep_checkpoint(self, before_step: int, phase: str) -> Checkpoint | None:
        """Keep for good the last checkpoint of a phase that was taken before a step, or its oldest; None if the phase has none."""
        checkpoints = [checkpoint for checkpoint in list_checkpoints(self.path) if checkpoint.phase == phase]
        if not checkpoints:
            return None
        chosen = ([checkpoint for checkpoint in checkpoints if checkpoint.step < before_step] or checkpoints[:1])[-1]
        kept = chosen._replace(keep=True)
        with self._writing():
            _write_record(kept.path, kept)
        return kept

    def _remove_old_checkpoints(self) -> None:
        checkpoints = list_checkpoints(self.path)
        scored = [checkpoint for checkpoint in checkpoints if checkpoint.score is not None]
        best = max(scored, key=lambda checkpoint: checkpoint.score or 0.0).path if scored else None
        for checkpoint in checkpoints[: -self.keep_last]:
            if not checkpoint.keep and checkpoint.path != best:
                removed = self._checkpoint_dir / f".partial-removed-{checkpoint.path.name}"
                os.replace(checkpoint.path, removed)  # half a checkpoint must not look like one
                shutil.rmtree(removed)

    def rewind(self, checkpoint: Checkpoint | None) -> None:
        """Before going on from a checkpoint (None: from the beginning): drop the lines of the steps that will be taken again."""
        lines = self.metrics()[: checkpoint.metrics_lines if checkpoint is not None else 0]
        self.write_text(METRICS_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        self._lines = len(lines)
        self._started = time.monotonic() - (float(lines[-1]["seconds"]) if lines else 0.0)


def indented(text: str) -> str:
    """Text as TensorBoard shows it unchanged: in Markdown, lines that are indented are no markup."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """The single values of nested mappings, by dotted key; lists as text, null left out."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            flat[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def read_stamp(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """``stamp.json`` of a run; empty where there is none."""
    file = Path(folder) / "stamp.json"
    stamp: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return stamp


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; a last line that is unfinished is left out. Raises ``RunFolderError`` for any other bad line."""
    return _read_lines(Path(folder) / METRICS_FILE)


def read_searches(folder: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """What the searches of a run were, by phase, and ``total``: counters with their figures (``searchqa_retrievers.counted``).

    Searches of steps that were taken again after a stop count each time. Raises ``RunFolderError`` for a bad line.
    """
    from searchqa_retrievers.counted import added_counters, search_figures

    phases: dict[str, list[dict[str, float]]] = {}
    for line in _read_lines(Path(folder) / SEARCHES_FILE):
        counters = {key: value for key, value in line.items() if key not in ("phase", "step")}
        for phase in (line["phase"], "total"):
            phases.setdefault(phase, []).append(counters)
    return {phase: search_figures(added_counters(*parts)) for phase, parts in phases.items()}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    *complete, _ = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(complete, start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise RunFolderError(f"{path}, line {number}: not JSON ({error}). Remove the line to read the others.") from error
    return lines


def drop_unfinished_line(path: Path) -> list[dict[str, Any]]:
    """Cut off what a killed process left behind the last line break of ``metrics.jsonl``; returns the lines that stay."""
    _cut_unfinished_line(path)
    return read_metrics(path.parent)


def _cut_unfinished_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            logger.warning("%s: dropped an unfinished last line of %d bytes.", path, len(content) - complete)
            with path.open("rb+") as file:
                file.truncate(complete)


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    records = (Path(folder) / "checkpoints").glob("[!.]*/checkpoint.json")
    found = [Checkpoint(path=record.parent, **json.loads(record.read_text(encoding="utf-8"))) for record in records]
    return sorted(found, key=lambda checkpoint: (checkpoint.metrics_lines, checkpoint.created))  # clocks can be set back


def check_run_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder of a run that exists; raises ``RunFolderError`` for anything else."""
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        raise RunFolderError(
            f"{path} is not the folder of a run: it holds no config.yaml. Runs are made by `searchqa train`, `sft` and `eval`."
        )
    return path


def run_stamp(environment: Mapping[str, Any], *, seed: int, threads: int | None) -> dict[str, Any]:
    """What a number needs to be comparable: the environment's stamp, seed, threads, package versions, commit, platform, and the command line."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # an extra that is not installed
            continue
    return {
        **environment,
        "seed": seed,
        "threads": threads,
        "packages": versions,
        "commit": git_commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "command": shlex.join(["searchqa", *sys.argv[1:]]),
    }


def stamp_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where two stamps differ in what a number depends on: the key, such as ``retriever.k1``, the old and the new value.

    What is own to a run (:data:`OWN_TO_A_RUN`), or None or missing on one side, is no difference.
    """
    own = OWN_TO_A_RUN | {"algorithm"}
    before, now = ({key: value for key, value in stamp.items() if key not in own} for stamp in (old, new))
    return _differences(before, now)


def _differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if old is None or new is None:
        return []
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        inner = [_differences(old[name], new[name], f"{key}.{name}" if key else str(name)) for name in old if name in new]
        return [difference for differences in inner for difference in differences]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, pair in enumerate(zip(old, new, strict=True)) for d in _differences(pair[0], pair[1], f"{key}.{i}")]
    return [] if old == new else [(key, old, new)]


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with ``+changes`` if it differs; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("The commit could not be read: %s", error)
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changes else commit


def replace_file(path: Path, write: Callable[[Path], object], suffix: str = "") -> None:
    """Write a file beside its place and rename it, so that the name never stands for half a file. ``suffix`` ends the temporary name."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}{suffix}")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_names(path.parent)
    finally:
        partial.unlink(missing_ok=True)


_REPLACED = ".partial-replaced-"


def _write_record(folder: Path, checkpoint: Checkpoint) -> None:
    record = {name: value for name, value in checkpoint._asdict().items() if name != "path"}
    replace_file(folder / "checkpoint.json", lambda partial: partial.write_text(json.dumps(record) + "\n", encoding="utf-8"))


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_names(folder)


def _sync_names(folder: Path) -> None:
    """Bring a folder's list of names to disk, where the system can (Windows cannot open folders)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
