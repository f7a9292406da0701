"""Which trajectories a page shows: all of a few evaluations, and of a long training as many rollouts, evenly over it, as a browser opens quickly."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from pathlib import Path

from searchqa_agents.trajectory import Trajectory, TrajectoryFileError, iterate_trajectories

MOST = 5000
"""So many trajectories are in a page, unless it is told another number."""
ROLLOUTS = "rollouts-"


def folder_sets(path: Path, order: Collection[str] = (), most: int = MOST) -> tuple[dict[str, list[Trajectory]], list[str]]:
    """The trajectories of a run's folder that its page shows, and a line on those that it leaves out.

    ``before`` and ``after`` come first, then the sets in ``order``, then others by name, and rollouts last. See :func:`how_many`.
    """
    return read_sets({set_name(file): file for file in trajectory_files(path, order)}, most)


def read_sets(files: Mapping[str, Path], most: int = MOST) -> tuple[dict[str, list[Trajectory]], list[str]]:
    """What a page shows of some files, by the name of their set, and a line on what it leaves out."""
    counts = {name: count_lines(file) for name, file in files.items()}
    shown = how_many(counts, most)
    sets = {name: list(islice(iterate_trajectories(files[name]), count)) for name, count in shown.items()}
    return sets, _left_out(counts, shown)


def cut_sets(sets: Mapping[str, Sequence[Trajectory]], most: int = MOST) -> tuple[dict[str, Sequence[Trajectory]], list[str]]:
    """The same of trajectories at hand."""
    counts = {name: len(own) for name, own in sets.items()}
    shown = how_many(counts, most)
    return {name: sets[name][:count] for name, count in shown.items()}, _left_out(counts, shown)


def trajectory_files(path: Path, order: Collection[str] = ()) -> list[Path]:
    """Those in ``path/trajectories``, in the order of the page."""
    names = ["before", "after", *order]
    found = [*(path / "trajectories").glob("[!.]*.jsonl"), *(path / "trajectories").glob("[!.]*.jsonl.gz")]

    def key(file: Path) -> tuple[bool, int, str]:
        name = set_name(file)
        return name.startswith(ROLLOUTS), names.index(name) if name in names else len(names), name

    return sorted(found, key=key)


def set_name(file: Path) -> str:
    """What a page calls the trajectories of a file: its name without the endings."""
    return file.name.removesuffix(".gz").removesuffix(".jsonl")


def count_lines(file: Path) -> int:
    """How many trajectories a file has, without reading what they are; raises ``TrajectoryFileError`` where it is torn."""
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            return sum(1 for _ in lines)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TrajectoryFileError(f"{file} is torn or not gzip: {error}. Write the file again, or remove it.") from error


def how_many(counts: Mapping[str, int], most: int = MOST) -> dict[str, int]:
    """How many trajectories of each set a page shows, from the first on.

    Evaluations come first: all, or an equal share each, so that the same questions stay side by side. The room that they leave is for rollouts, each set of
    them whole: the first, the last, and others evenly between.
    """
    evaluations = {name: count for name, count in counts.items() if not _is_rollouts(name)}
    shown, room = {}, most
    for place, (name, count) in enumerate(sorted(evaluations.items(), key=lambda one: one[1])):
        shown[name] = min(count, room // (len(evaluations) - place))
        room -= shown[name]
    rollouts = {name: count for name, count in counts.items() if _is_rollouts(name)}
    number = len(rollouts)
    while number and sum(rollouts[name] for name in _evenly(list(rollouts), number)) > room:
        number -= 1
    shown |= {name: rollouts[name] for name in _evenly(list(rollouts), number)}
    if rollouts and not number and room > 0:
        last = list(rollouts)[-1]
        shown[last] = min(rollouts[last], room)
    return {name: shown[name] for name in counts if name in shown}


def _is_rollouts(name: str) -> bool:
    return name.rpartition("/")[2].startswith(ROLLOUTS)


def _evenly(names: Sequence[str], number: int) -> list[str]:
    """So many of the names, the last and (of several) the first among them."""
    if number <= 1:
        return list(names[-1:]) if number else []
    return [names[round(place * (len(names) - 1) / (number - 1))] for place in range(number)]


def _left_out(counts: Mapping[str, int], shown: Mapping[str, int]) -> list[str]:
    absent = [name for name in counts if name not in shown]
    cut = [f"{name}: the first {shown[name]:,} of {counts[name]:,}" for name in shown if shown[name] < counts[name]]
    if not absent and not cut:
        return []
    parts = [
        *cut,
        *([f"{absent[0]} and {len(absent) - 1} other sets: none" if len(absent) > 1 else f"{absent[0]}: none"] if absent else []),
    ]
    return [
        f"The page has {sum(shown.values()):,} of {sum(counts.values()):,} trajectories ({'; '.join(parts)}). "
        "`searchqa report page --most N FILE` shows those of any file."
    ]
