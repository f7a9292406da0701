"""``searchqa report``: picture, page and table of finished runs; and the functions by which runs make theirs."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchqa_agents.runs import RunFolderError, check_run_folder, read_metrics, replace_file

if TYPE_CHECKING:
    from searchqa_agents.trajectory import Trajectory
    from searchqa_envs.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)

OWN_TO_A_RUN = frozenset({"seed", "command", "commit", "threads", "cpus", "packages", "python", "platform", "searchqa_gym"})
"""Parts of a stamp that may differ between runs whose mean is still meaningful."""


def main(line: Sequence[str]) -> int:
    """Run ``searchqa report <line>``."""
    from rich.console import Console

    from searchqa_agents.cli import UsageError
    from searchqa_agents.table import show, stamp_line

    if not line or any(word.startswith("-") for word in line):
        raise UsageError("report needs the folders of runs: `searchqa report RUN [RUN ...]`. See `searchqa report --help`.")
    console = Console()
    runs = [read_run(path) for path in line]
    for run in runs:
        write_picture(run.path)
        write_page(run.path)
    if len(runs) == 1:
        show(console, runs[0].name, runs[0].summary["columns"], runs[0].summary["rows"], stamp_line(runs[0].stamp))
    else:
        for title, columns, rows in combined(runs):
            show(console, title, columns, rows)
    for run in runs:
        console.print(f"Page: {run.path / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    return 0


class Run(argparse.Namespace):
    """A finished run, read from its folder."""

    path: Path
    name: str
    stamp: dict[str, Any]
    summary: dict[str, Any]


def read_run(folder: str | Path) -> Run:
    """What a run's folder says; raises ``RunFolderError`` if the run has no results yet."""
    path = check_run_folder(folder)
    if not (path / "summary.json").is_file():
        raise RunFolderError(
            f"{path} has no results yet (summary.json is missing). `searchqa train resume={path}` goes on with a training run."
        )
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    return Run(path=path, name=summary["name"], stamp=_stamp(path), summary=summary)


def _stamp(path: Path) -> dict[str, Any]:
    file = path / "stamp.json"
    stamp: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return stamp


def combined(runs: Sequence[Run]) -> list[tuple[str, list[str], list[list[str]]]]:
    """One table (title, columns, rows): means over runs that differ in their seed only, otherwise a column for each run."""
    from searchqa_agents.table import number

    stamps = [{key: value for key, value in run.stamp.items() if key not in OWN_TO_A_RUN} for run in runs]
    values = [run_values(run) for run in runs]
    titles = {name: None for one in values for name in one}
    if all(stamp == stamps[0] for stamp in stamps[1:]):
        seeds = ", ".join(str(run.stamp.get("seed")) for run in runs)
        rows = []
        for title in titles:
            whens = {when: None for one in values for when in one.get(title, {})}
            for when in whens:
                found = [one[title][when] for one in values if when in one.get(title, {})]
                mean, half = mean_and_interval(found)
                interval = "–" if half is None else f"{mean - half:.3f} to {mean + half:.3f}"
                rows.append([f"{title}{', ' + when if when else ''}", number(mean), interval, *(number(value) for value in found)])
        columns = ["", "mean", "95% interval", *(f"seed {run.stamp.get('seed')}" for run in runs)]
        return [(f"Mean over {len(runs)} runs (seeds {seeds})", columns, rows)]
    rows = []
    for title in titles:
        whens = {when: None for one in values for when in one.get(title, {})}
        for when in whens:
            rows.append([f"{title}{', ' + when if when else ''}", *(number(one.get(title, {}).get(when)) for one in values)])
    return [("Runs with different settings", ["", *(run.path.name for run in runs)], rows)]


def run_values(run: Run) -> dict[str, dict[str, float]]:
    """The numbers of a run: title of the measure -> "before", "after" (training) or "" (evaluation) -> value."""
    from searchqa_agents.table import METRIC_TITLES

    if run.summary["kind"] == "eval":
        return {title: {"": run.summary["metrics"][name]} for name, title in METRIC_TITLES.items() if name in run.summary["metrics"]}
    measures = run.summary["measures"]
    return {
        title: {when: measures[when][key] for when in ("before", "after") if key in measures.get(when, {})}
        for key, title in run.summary["titles"].items()
    }


T_975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95% interval (Student's t, runs as independent draws); None for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    quantile = T_975[len(values) - 2] if len(values) - 2 < len(T_975) else 1.96
    return mean, quantile * math.sqrt(variance / len(values))


def write_picture(path: Path) -> Path | None:
    """Draw ``learning_curve.png`` of a training run; None where there is nothing to draw, as in an evaluation."""
    from searchqa_agents.plots import learning_curve

    lines = read_metrics(path)
    if not lines:
        return None
    summary_file = path / "summary.json"
    summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.is_file() else {}
    picture = learning_curve(lines, summary.get("measures", {}), summary.get("name", path.name))
    if picture is None:
        return None
    file = path / "learning_curve.png"
    replace_file(file, lambda partial: partial.write_bytes(picture))
    return file


def write_page(path: Path, sets: Mapping[str, Sequence[Trajectory]] | None = None) -> Path:
    """Write ``report.html``: the table, the picture, and the trajectories (those given, else those in the folder)."""
    from searchqa_agents.trajectory import load_trajectories
    from searchqa_agents.viewer import build_page

    if sets is None:
        files = sorted(
            (path / "trajectories").glob("[!.]*.jsonl*"), key=lambda file: (file.stem.partition("-")[0] == "rollouts", file.name)
        )
        sets = {file.name.partition(".")[0]: load_trajectories(file) for file in files}
        order = [name for name in ("before", "after") if name in sets]
        sets = {name: sets[name] for name in [*order, *(name for name in sets if name not in order)]}
    summary_file, picture_file = path / "summary.json", path / "learning_curve.png"
    summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.is_file() else {"columns": [], "rows": []}
    stamp = _stamp(path)
    page = build_page(
        sets,
        page_tokenizer(path, stamp),
        title=str(summary.get("name", path.name)),
        subtitle=path.name,
        table=(summary["columns"], summary["rows"]),
        stamp=stamp,
        picture=picture_file.read_bytes() if picture_file.is_file() else None,
    )
    file = path / "report.html"
    replace_file(file, lambda partial: partial.write_text(page, encoding="utf-8"))
    return file


def page_tokenizer(path: Path, stamp: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of a run's trajectories; None, with a warning, where it cannot be had: the page then shows segments whole."""
    from searchqa_agents.runs import TOKENIZER_FOLDER
    from searchqa_agents.tokenizer_files import own_tokenizer, saved_tokenizer
    from searchqa_envs.errors import SearchQAError
    from searchqa_envs.tokenizers import build_tokenizer

    name = str(stamp.get("tokenizer", ""))
    if not name:
        return None
    saved = path / TOKENIZER_FOLDER
    try:
        return build_tokenizer(saved_tokenizer(saved) if saved.is_dir() else own_tokenizer(name) or name)
    except (SearchQAError, OSError, ImportError) as error:
        logger.warning("%s: the page shows no single tokens, because the tokenizer %r cannot be had: %s", path, name, error)
        return None
