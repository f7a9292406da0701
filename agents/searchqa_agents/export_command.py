"""``searchqa data export``: the episodes of runs as Parquet or as a Minari data set."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchqa_envs.errors import ConfigurationError, DataNotFoundError

if TYPE_CHECKING:
    from searchqa_agents.parquet_export import Episode

LOST = "that lost the search back end"
ABOUT = "Episodes of runs as Parquet (a row per episode, turn or token) or as a Minari data set, for offline RL and for looking at them elsewhere."
EXAMPLES = """Examples:
  searchqa data export runs/mine --to parquet mine.parquet
  searchqa data export runs/mine --to parquet turns.parquet --rows turns --only 'rollouts-*'
  searchqa data export runs/mine --to minari searchqa/world-v0 --only 'rollouts-*'
  searchqa data export runs/mine/trajectories/after.jsonl.gz --to minari ./datasets/world-after-v0"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``searchqa data export``."""
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="a run's folder, one with runs beneath it, or a .jsonl[.gz] file of trajectories",
    )
    parser.add_argument(
        "--to",
        nargs=2,
        required=True,
        metavar=("FORMAT", "NAME"),
        help="parquet FILE.parquet; or minari [namespace/]name-vN (beneath $MINARI_DATASETS_PATH) or a folder that begins with ./ or /",
    )
    parser.add_argument("--rows", default="episodes", help="parquet: a row per episodes (default), turns or tokens")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="only files of this name: before, after, 'rollouts-*', ...")
    parser.add_argument("--run", dest="made_by", type=Path, metavar="FOLDER", help="minari: the run that made files which lie elsewhere")
    parser.add_argument(
        "--tokenizer", help="minari: name or folder of the run's tokenizer, where it is neither embedded nor in the run's folder"
    )


def run(arguments: argparse.Namespace) -> int:
    """Export, and tell what was written and what was left out."""
    from rich.console import Console

    kind, name = arguments.to
    files = found_files(arguments.paths, arguments.only)
    left_out: Counter[str] = Counter()
    if kind == "parquet":
        text = _to_parquet(files, Path(name), arguments.rows, left_out)
    elif kind == "minari":
        text = _to_minari(files, name, arguments, left_out)
    else:
        raise ConfigurationError(f"--to must be parquet FILE or minari NAME; got {kind!r}.")
    console = Console()
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    for reason, count in left_out.items():
        console.print(
            f"Left out: {count:,} {'episode' if count == 1 else 'episodes'} {reason}.", markup=False, highlight=False, soft_wrap=True
        )
    return 0


def found_files(paths: Sequence[Path], only: str = "*") -> list[Path]:
    """The files of trajectories at or beneath some paths whose name, without endings, fits a pattern; each once.

    Raises
    ------
    DataNotFoundError
        If a path is not there, or there is no such file.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise DataNotFoundError(f"{path} is not there; a run's folder or a file of trajectories is wanted.")
        files = [path] if path.is_file() else sorted(path.glob("**/trajectories/[!.]*.jsonl*"))
        found |= dict.fromkeys(file for file in files if fnmatchcase(_stem(file), only))
    if not found:
        there = sorted({_stem(file) for path in paths if path.is_dir() for file in path.glob("**/trajectories/[!.]*.jsonl*")})
        raise DataNotFoundError(
            f"There is no file of trajectories called {only!r} in {', '.join(map(str, paths))}; there are: {', '.join(there) or 'none'}. "
            "Training keeps them with rollouts_every=N and evaluation.save=N, evaluations with save=N."
        )
    return list(found)


def _stem(file: Path) -> str:
    return file.name.partition(".")[0]


def run_of(file: Path) -> Path | None:
    """The folder of the run that a file of trajectories lies in; None if it lies elsewhere."""
    folder = file.resolve().parent.parent
    return folder if (folder / "config.yaml").is_file() else None


def episodes_of(files: Sequence[Path], left_out: Counter[str]) -> Iterator[Episode]:
    """The episodes of files, in order, one by one; those that lost their search back end have no reward to learn from, are left out and counted."""
    from searchqa_agents.parquet_export import Episode
    from searchqa_agents.trajectory import iterate_trajectories

    for file in files:
        folder = run_of(file)
        for line, trajectory in enumerate(iterate_trajectories(file)):
            if trajectory.backend_error is not None:
                left_out[LOST] += 1
                continue
            yield Episode(folder.name if folder is not None else "", _stem(file), line, trajectory)


def _to_parquet(files: Sequence[Path], target: Path, rows: Any, left_out: Counter[str]) -> str:
    from searchqa_agents.parquet_export import ROWS, write_parquet

    if rows not in ROWS:
        raise ConfigurationError(f"--rows must be one of {', '.join(ROWS)}; got {rows!r}.")
    if target.suffix != ".parquet":
        raise ConfigurationError(f"A Parquet file is called something.parquet; got {target}.")
    if target.exists():
        raise ConfigurationError(f"{target} is there already. Remove it, or choose another name.")
    episodes, written = write_parquet(target, episodes_of(files, left_out), rows, _common_stamp(files))
    return f"{episodes:,} episodes of {len(files):,} files, {written:,} rows ({rows}), {target.stat().st_size / 1e6:,.1f} MB: {target}"


def _common_stamp(files: Sequence[Path]) -> dict[str, Any]:
    """The stamp of the run, where all files are of one."""
    from searchqa_agents.runs import read_stamp

    folders = {run_of(file) for file in files}
    folder = folders.pop() if len(folders) == 1 else None
    return {} if folder is None else read_stamp(folder)


def _to_minari(files: Sequence[Path], name: str, arguments: argparse.Namespace, left_out: Counter[str]) -> str:
    from searchqa_agents.minari_export import Plan, place_of, write_minari

    if arguments.rows != "episodes":
        raise ConfigurationError("--rows is for parquet; a step of a Minari data set is always a segment.")
    place = place_of(name)
    folder, config = _config(files, arguments.made_by)
    plan = Plan(config, _tokenizer(folder, config, arguments.tokenizer))
    for episode in episodes_of(files, Counter()):
        plan.add(episode)
    algorithm = (config.get("algo") or {}).get("name")
    written, steps = write_minari(place, plan, episodes_of(files, left_out), left_out, algorithm=algorithm)
    root = place.folder.parents[place.dataset_id.count("/")]
    return (
        f"{written:,} episodes of {len(files):,} files, {steps:,} steps: {place.folder}\n"
        f"Load it: MINARI_DATASETS_PATH={root}, minari.load_dataset({place.dataset_id!r})"
    )


def _config(files: Sequence[Path], given: Path | None) -> tuple[Path, Mapping[str, Any]]:
    """The folder and configuration of the run that made the files; of several runs, of the first (their stamps are compared later)."""
    import yaml

    folder = given or run_of(files[0])
    if folder is None or not (folder / "config.yaml").is_file():
        raise ConfigurationError(
            f"{given or files[0]} {'is no' if given else 'lies in no'} run's folder, whose config.yaml says which environment it was. Name it: --run FOLDER"
        )
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "id" not in (config.get("env") or {}):
        raise ConfigurationError(
            f"{folder / 'config.yaml'} names no environment (env.id); it is not the configuration of a training or an evaluation."
        )
    return folder, config


def _tokenizer(folder: Path, config: Mapping[str, Any], given: str | None) -> str | None:
    from searchqa_agents.runs import TOKENIZER_FOLDER
    from searchqa_agents.tokenizer_files import saved_tokenizer

    if given is not None:
        return given
    saved = folder / TOKENIZER_FOLDER
    if saved.is_dir():
        return saved_tokenizer(saved.resolve())
    named = config["env"].get("tokenizer")
    return None if named is None else str(named)
