"""``searchqa report page``: trajectories of any runs and files on one page, to see two runs or two checkpoints beside each other on a question."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from searchqa_agents.page_sets import MOST, read_sets, set_name, trajectory_files
from searchqa_agents.results import joined_stamp
from searchqa_agents.runs import METRICS_FILE, RunFolderError, read_metrics, replace_file
from searchqa_agents.table import amount

if TYPE_CHECKING:
    from searchqa_agents.trajectory import Trajectory
    from searchqa_envs.tokenizers.base import Tokenizer

PAGE_FILE = "page.html"
COLUMNS = {"em": "exact match", "f1": "F1", "searches": "searches", "invalid_turns": "invalid turns"}
"""Measures of trajectories that the table has a column for, and its title."""


class Source(NamedTuple):
    """A file of trajectories, and the folder whose name, stamp and tokenizer stand for it."""

    file: Path
    folder: Path

    @property
    def stem(self) -> str:
        """The name of its set within its folder."""
        return set_name(self.file)


def main(line: Sequence[str]) -> int:
    """Run ``searchqa report page <line>``."""
    from rich.console import Console

    from searchqa_agents.table import in_parts, show

    options = _parser().parse_args(line)
    found = [source for place in options.places for source in sources_at(place)]
    named = name_sources(list(dict.fromkeys(found)))
    sets, left_out = read_sets({name: source.file for name, source in named.items()}, options.most)
    columns, rows = table_of(sets)
    page = build(named, sets, left_out)
    file = options.out if options.out is not None else _common_folder(named.values()) / PAGE_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda partial: partial.write_text(page, encoding="utf-8"))
    console = Console()
    for part in in_parts(console.width, columns, rows):
        show(console, "Means over the trajectories of the page", [columns[i] for i in part], [[row[i] for i in part] for row in rows])
    for note in left_out:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Page: {file}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="searchqa report page",
        description="Writes one page of the trajectories of runs or files: two runs, or two checkpoints, side by side on the same questions.",
        epilog="Examples: searchqa report page runs/a runs/b;  "
        "searchqa report page runs/a/trajectories/after.jsonl.gz runs/b/trajectories/after.jsonl.gz --out both.html",
    )
    parser.add_argument("places", nargs="+", type=Path, metavar="RUN_OR_TRAJECTORIES", help="a run's folder, or a file of trajectories")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page; default: {PAGE_FILE} in the folder that all have in common")
    parser.add_argument("--most", type=_positive, default=MOST, metavar="N", help="trajectories in the page at most (default: %(default)s)")
    return parser


def _positive(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0; got {word!r}")
    return int(word)


def sources_at(place: Path) -> list[Source]:
    """The files of trajectories of a run, or a file itself; raises ``RunFolderError`` where there are none."""
    if place.is_file():
        inside = place.parent.name == "trajectories"
        return [Source(place, place.parent.parent if inside else place.parent)]
    files = trajectory_files(place)
    if not files:
        raise RunFolderError(
            f"{place} has no trajectories. Name the folder of a run, in which there is trajectories/*.jsonl.gz, or such a file; "
            "`searchqa eval save=200` keeps those of 200 questions of each set."
        )
    return [Source(file, place) for file in files]


def name_sources(sources: Sequence[Source]) -> dict[str, Source]:
    """The name of each set: its file's where all are of one folder, its folder's where all files are called alike, else both."""
    folders = [source.folder.resolve() for source in sources]
    if len(set(folders)) == 1:
        names = [source.stem for source in sources]
    elif len(set(folders)) == len(sources) and len({source.stem for source in sources}) == 1:
        names = _told_apart(folders)
    else:
        short = dict(zip(dict.fromkeys(folders), _told_apart(list(dict.fromkeys(folders))), strict=True))
        names = [f"{short[folder]}/{source.stem}" for folder, source in zip(folders, sources, strict=True)]
    if len(set(names)) < len(names):
        names = [str(source.file) for source in sources]
    return dict(zip(names, sources, strict=True))


def _told_apart(folders: Sequence[Path]) -> list[str]:
    """The ends of different paths, as long as it takes to tell them apart."""
    length = 1
    while len({folder.parts[-length:] for folder in folders}) < len(folders):
        length += 1
    return ["/".join(folder.parts[-length:]) for folder in folders]


def _common_folder(sources: Any) -> Path:
    return Path(os.path.commonpath([source.folder.resolve() for source in sources]))


def build(named: Mapping[str, Source], sets: Mapping[str, Sequence[Trajectory]], notes: Sequence[str]) -> str:
    """The page: the curves of the runs that have some, a table of means over the trajectories, and these."""
    from searchqa_agents.curves import panels_of_runs, run_panels
    from searchqa_agents.viewer import build_page

    stamps = {name: _stamp(named[name], own) for name, own in sets.items()}
    folders = list(dict.fromkeys(source.folder for source in named.values()))
    runs = {folder: read_metrics(folder) for folder in folders if (folder / METRICS_FILE).is_file()}
    labels = dict(zip(runs, _told_apart([folder.resolve() for folder in runs]), strict=True))
    curves = (
        run_panels(next(iter(runs.values())), {})
        if len(runs) == 1
        else panels_of_runs({labels[folder]: own for folder, own in runs.items()})
    )
    return build_page(
        sets,
        {name: _tokenizer(named[name], stamps[name]) for name in sets},
        title=" and ".join(dict.fromkeys(folder.resolve().name for folder in folders)) if len(folders) <= 3 else f"{len(folders)} runs",
        subtitle="Means over the trajectories of this page, and these one by one.",
        table=table_of(sets),
        stamp=joined_stamp(stamps) if stamps else {},
        notes=notes,
        curves=curves,
    )


def _stamp(source: Source, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Of the set of a run that its file is of, of the run, or of a file's first trajectory."""
    file = source.folder / "stamp.json"
    if not file.is_file():
        return dict(trajectories[0].stamp) if trajectories else {}
    stamp: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    own: dict[str, Any] = stamp.get("sets", {}).get(source.stem, stamp)
    return own


def _tokenizer(source: Source, stamp: Mapping[str, Any]) -> Tokenizer | None:
    from searchqa_agents.report import page_tokenizer

    return page_tokenizer(source.folder, stamp)


def table_of(sets: Mapping[str, Sequence[Trajectory]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: means over the trajectories of each set. Those that lost their search back end are counted, and left out of all means."""
    rows = []
    for name, trajectories in sets.items():
        whole = [one for one in trajectories if one.backend_error is None]
        values = [_mean([one.metrics[metric] for one in whole if metric in one.metrics]) for metric in COLUMNS]
        values += [_mean([one.reward for one in whole]), _mean([float(one.loss_mask.sum()) for one in whole])]
        questions = len({(one.question_id, one.question) for one in trajectories})
        counts = [f"{len(trajectories):,}", f"{questions:,}", f"{len(trajectories) - len(whole):,}"]
        rows.append([name, *counts, *(amount(value) for value in values)])
    columns = ["", "trajectories", "questions", "search lost", *COLUMNS.values(), "reward", "tokens sampled"]
    lost = [row[3] for row in rows]
    if all(count == "0" for count in lost):
        return columns[:3] + columns[4:], [row[:3] + row[4:] for row in rows]
    return columns, rows


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
