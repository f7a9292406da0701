"""``searchqa report multirun``: one table and one page of a sweep, with what became of each job."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from searchqa_agents.objective import SCORE_FILE
from searchqa_agents.runs import SUMMARY_FILE, RunFolderError, read_metrics, replace_file
from searchqa_agents.sweeps import (
    DONE,
    FAILED,
    FINISHED,
    JOBS_FOLDER,
    KILLED,
    LOST,
    NOT_BEGUN,
    RUNNING,
    SKIPPED,
    STOPPED,
    JobRecord,
    Sweep,
    is_alive,
    visible,
)
from searchqa_agents.table import markdown, number

logger = logging.getLogger(__name__)

PAGE_FILE = "multirun.html"
PICTURE_FILE = "comparison.png"
BEST_FILE = "optimization_results.yaml"
HELP = """usage: searchqa report multirun [--markdown] FOLDER

One table of a sweep (`searchqa train -m`, `eval -m`, `sft -m`, `bench`): each job with what it differs in, how it ended, how often it was begun, how
long it took, and what it measured; beneath it what happened: jobs that failed, were killed, stopped or tried again. Of training runs that can be
compared, also the table of `searchqa report`. Writes FOLDER/multirun.html, one page with the same, the learning curves, and a link to each job's page.
  --markdown               print the tables in Markdown"""

OF_A_LINE = ("retry", "threads", "objective", "device", "run_dir", "plugins", "wandb", "dashboard")
"""Keys that say how a line goes about its jobs: where they are not swept, they tell no job from another."""
STATES = (FINISHED, SKIPPED, FAILED, KILLED, STOPPED, RUNNING, LOST, NOT_BEGUN)
UNREADABLE = "unreadable"
TRACE_CHARACTERS = 4000
"""of the end of a trace, on the page"""

Table = tuple[str, list[str], list[list[str]]]


@dataclass(frozen=True)
class Job:
    """A row: a job that has a record, or one that was asked for and not begun."""

    label: str
    """the overrides that differ between the jobs"""
    variant: str
    """the same without the seed"""
    state: str
    attempts: int = 0
    seconds: float | None = None
    error: str | None = None
    name: str = ""
    measures: dict[str, str] = field(default_factory=dict)
    curve: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """All that is told of a sweep."""

    folder: Path
    jobs: list[Job]
    events: list[str]
    lines: list[str]
    """the lines that were given, the last first"""
    comparison: Table | None = None
    notes: list[str] = field(default_factory=list)
    comparison_picture: bytes | None = None
    unreadable: list[str] = field(default_factory=list)
    """what is wrong with records that cannot be read"""

    @property
    def counts(self) -> str:
        """Such as ``12 jobs: 10 finished, 1 failed, 1 killed``."""
        counts = Counter(job.state for job in self.jobs)
        return f"{len(self.jobs)} jobs: {', '.join(f'{counts[state]} {state}' for state in STATES if counts[state])}"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows."""
        measures = list(dict.fromkeys(title for job in self.jobs for title in job.measures))
        columns = ["job", "state", "tries", "s", *measures]
        rows = [
            [
                job.label,
                job.state,
                str(job.attempts),
                "–" if job.seconds is None else f"{job.seconds:,.1f}",
                *(job.measures.get(title, "–") for title in measures),
            ]
            for job in self.jobs
        ]
        return columns, rows


def main(line: Sequence[str]) -> int:
    """Run ``searchqa report multirun <line>``."""
    from rich.console import Console

    from searchqa_agents.cli import UsageError
    from searchqa_agents.table import legible, show

    console = legible(Console())

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if any(word in ("-h", "--help") for word in line):
        say(HELP)
        return 0
    folders = [word for word in line if word != "--markdown"]
    if len(folders) != 1 or folders[0].startswith("-"):
        raise UsageError("report multirun needs the folder of one sweep: `searchqa report multirun [--markdown] FOLDER`.")
    report = read_report(Path(folders[0]))
    if "--markdown" in line:
        parts = [markdown(*report.table()), f"{report.counts}.", "\n".join(f"- {event}" for event in report.events)]
        parts += [f"{report.comparison[0]}:", markdown(*report.comparison[1:])] if report.comparison is not None else []
        say("\n\n".join(part for part in [*parts, *report.notes, *report.unreadable] if part))
        _write_or_warn(report)
        return 0
    console.print(_terminal_table(report))
    say(f"{report.counts}.")
    for event in report.events:
        say(event)
    if report.comparison is not None:
        show(console, *report.comparison, caption="\n".join(report.notes))
    elif report.notes:
        say("\n".join(report.notes))
    if report.unreadable:
        say("\n".join(report.unreadable))
    page = _write_or_warn(report)
    if page is not None:
        say(f"Page: {page}")
    return 0


def _write_or_warn(report: Report) -> Path | None:
    """The page; None, with a warning, where it cannot be written."""
    try:
        return write_page(report)
    except OSError as error:
        logger.warning("The page was not written: %s. Copy %s to where it can be written for one.", visible(str(error)), report.folder)
        return None


def _terminal_table(report: Report) -> Any:
    """The table for a terminal: the settings of a job stay whole, what does not fit is cut off at the right."""
    from rich.table import Table as RichTable
    from rich.text import Text

    columns, rows = report.table()
    table = RichTable(title=Text(f"Sweep {report.folder}"), title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if place > 1 else "left", no_wrap=place < 2, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def read_report(folder: Path) -> Report:
    """All that a sweep's folder tells. Raises ``RunFolderError`` for a folder without jobs' records."""
    sweep = Sweep(folder)
    (records, damaged), launches = sweep.readable_jobs(), sweep.launches()
    if not records and not launches and not damaged:
        raise RunFolderError(
            f"{folder} is not the folder of a sweep that kept records: it has neither {JOBS_FOLDER}/*.json nor sweep.json. "
            f"`searchqa report {folder}` tells of the runs beneath a folder."
        )
    planned = [words for launch in launches for words in launch["jobs"] or ()]
    swept = list(dict.fromkeys(key for launch in launches for key in _differing(launch["jobs"] or ())))
    places = {_label(words, swept): place for place, words in reversed(list(enumerate(planned)))}
    begun = {_label(record.overrides, swept) for record in records}
    waiting = [planned[place] for label, place in sorted(places.items(), key=lambda item: item[1]) if label not in begun]
    records.sort(key=lambda record: places.get(_label(record.overrides, swept), len(planned)))
    differing = [key for key in _differing([*(record.overrides for record in records), *waiting]) if key in swept or key not in OF_A_LINE]
    jobs = [_job(sweep, record, differing) for record in records]
    whole = [
        record for record, job in zip(records, jobs, strict=True) if record.state() in DONE and UNREADABLE not in job.measures.values()
    ]
    jobs += [Job(_label(words, differing) or "job", _label(words, differing, "seed"), NOT_BEGUN) for words in waiting]
    lines = [f"searchqa {launch['command']} {shlex.join(launch['line'])}" for launch in reversed(launches)]
    comparison, notes, picture = _comparison(folder, whole)
    events = [visible(event) for event in _events(folder, records, launches)]
    unreadable = [visible(str(error)) for error in damaged]
    return Report(folder, jobs, events, list(dict.fromkeys(map(visible, lines))), comparison, notes, picture, unreadable)


def _pairs(words: Sequence[str]) -> dict[str, str]:
    return {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in words)}


def _differing(jobs: Sequence[Sequence[str]]) -> list[str]:
    """The keys that have more than one value, in the order of the jobs' lines."""
    values = [_pairs(words) for words in jobs]
    return [key for key in {key: None for one in values for key in one} if len({one.get(key) for one in values}) > 1]


def _label(words: Sequence[str], keys: Sequence[str], *left_out: str) -> str:
    """Such as ``algo=grpo seed=1``: the last part of each key, where that is enough to tell them apart."""
    own, last = _pairs(words), Counter(key.rpartition(".")[2] for key in keys)
    names = {key: key if last[key.rpartition(".")[2]] > 1 else key.rpartition(".")[2] for key in keys}
    return " ".join(f"{names[key]}={own[key]}" for key in keys if key in own and key not in left_out)


def _job(sweep: Sweep, record: JobRecord, differing: Sequence[str]) -> Job:
    path, state = sweep.folder / record.name, record.state()
    try:
        measures, curve = _measured(path) if state in DONE else ({}, [])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RunFolderError) as raised:
        logger.warning("What %s measured cannot be read: %r.", path, raised)
        measures, curve = {"note": UNREADABLE}, []
    if record.value is not None:
        measures |= {"objective": number(record.value)}
    label = visible(_label(record.overrides, differing) or record.name)
    variant = visible(_label(record.overrides, differing, "seed"))
    error = None if record.error is None else visible(record.error)
    return Job(label, variant, state, len(record.history), record.seconds, error, record.name, measures, curve)


def _measured(path: Path) -> tuple[dict[str, str], list[tuple[float, float]]]:
    """What a finished job measured, by the titles of columns, and its learning curve."""
    score, file = path / SCORE_FILE, path / SUMMARY_FILE
    if score.is_file():
        kept = json.loads(score.read_text(encoding="utf-8"))
        points = kept["points"]
        values = {"score": points[-1]["score"], "best": max(point["score"] for point in points), "EM": points[-1]["em"]}
        diverged = {"note": "diverged"} if kept.get("status") == "diverged" else {}
        return {title: number(value) for title, value in values.items()} | diverged, [(point["share"], point["score"]) for point in points]
    summary = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if summary.get("kind") == "eval":
        titles = {"em": "EM", "f1": "F1", "searches": "searches"}
        return {title: number(summary["metrics"].get(key)) for key, title in titles.items() if key in summary["metrics"]}, []
    measures = summary.get("measures", {})
    key = next((key for key in summary.get("titles", {}) if key.endswith("sampled/em")), None)
    if key is None:
        return {}, []
    prefix = key.removesuffix("sampled/em")
    before, after = measures["before"], measures["after"]
    found = {"EM before": before.get(key), "EM after": after.get(key), "greedy": after.get(f"{prefix}greedy/em")}
    found["searches"] = after.get(f"{prefix}sampled/searches")
    lines = [line for line in read_metrics(path) if "charts/em" in line]
    return {title: number(value) for title, value in found.items()}, [(line["step"], line["charts/em"]) for line in lines]


def _comparison(folder: Path, records: Sequence[JobRecord]) -> tuple[Table | None, list[str], bytes | None]:
    """The table of training runs that can be compared, lines beneath it, and its picture; None where there are none."""
    from searchqa_agents.report import read_run
    from searchqa_agents.variants import compared, comparison_table, notes

    paths = [folder / record.name for record in records if (folder / record.name / SUMMARY_FILE).is_file()]
    paths = [path for path in paths if not (path / SCORE_FILE).is_file()]
    if len(paths) < 2:
        return None, [], None
    try:
        comparison = compared([read_run(path) for path in paths])
    except RunFolderError as error:  # two runs of one variant with one seed
        return None, [str(error)], None
    if comparison is None:
        return None, [], None
    return comparison_table(comparison), notes(comparison), _picture(comparison)


def _picture(comparison: Any) -> bytes:
    from searchqa_agents.variants import draw_comparison

    with TemporaryDirectory() as folder:
        return draw_comparison(Path(folder) / PICTURE_FILE, comparison).read_bytes()


def _events(folder: Path, records: Sequence[JobRecord], launches: Sequence[Mapping[str, Any]]) -> list[str]:
    """What did not go the plain way from begun to finished, in the order in which it began, a line each."""
    events: list[tuple[str, str]] = []
    for launch in launches:
        jobs = f", {len(launch['jobs'])} jobs" if launch["jobs"] is not None else ""
        words = shlex.join(launch["line"])
        events.append(
            (launch["started"], f"begun{_end_of(launch)}{jobs}, launcher {launch['launcher']}: searchqa {launch['command']} {words}")
        )
        tried = {record.name for record in records if any(attempt.launch == launch["id"] for attempt in record.history)}
        left = {name: why for name, why in launch["left"].items() if why != FINISHED and name not in tried}
        events += [(launch["started"], f"{name}: left as it was, {why}") for name, why in left.items()]
    for record in records:
        for place, attempt in enumerate(record.history):
            state = attempt.status if attempt.status != RUNNING else record.state()
            if state == FINISHED and not place:
                continue
            again = f", begun for the {_ordinal(place + 1)} time" if place else ""
            after = "" if attempt.seconds is None else f" after {attempt.seconds:,.1f} s"
            why = f": {attempt.error}" if attempt.error and state != KILLED else ""
            where = f" (process {attempt.pid} on {attempt.host})" if state in (KILLED, LOST, RUNNING) else ""
            events.append((attempt.started, f"{record.name}{again}: {state}{after}{where}{why}"))
    told = [f"{_clock(when)}  {what}" for when, what in sorted(events, key=lambda event: event[0])]
    best = folder / BEST_FILE
    return [*told, *_best(best)] if best.is_file() else told


def _end_of(launch: Mapping[str, Any]) -> str:
    """How a line ended, where it did not come to its end."""
    if launch["ended"]:
        return f", given up ({launch['error']})" if launch.get("error") else ""  # sweeps of earlier versions have no such key
    return ", which was killed" if is_alive(launch["host"], launch["pid"], launch["process"]) is False else ", still going on"


def _ordinal(count: int) -> str:
    ending = "th" if count % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"{count}{ending}"


def _clock(when: str) -> str:
    return datetime.fromisoformat(when).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _best(file: Path) -> list[str]:
    """What Optuna found."""
    import yaml

    kept = yaml.safe_load(file.read_text(encoding="utf-8"))
    if "best_params" not in kept:
        return []
    settings = " ".join(f"{key}={value}" for key, value in kept["best_params"].items())
    return [f"Best of the search: {kept['best_value']:.4g} with {settings}"]


# -- the page ----------------------------------------------------------------------------------------------------------------------------


def write_page(report: Report) -> Path:
    """Write ``multirun.html`` into the sweep's folder, self-contained but for the links to the jobs' own pages, and the comparison's picture."""
    file = report.folder / PAGE_FILE
    page = build_page(report)
    replace_file(file, lambda partial: partial.write_text(page, encoding="utf-8"))
    if report.comparison_picture is not None:
        (report.folder / PICTURE_FILE).write_bytes(report.comparison_picture)
    return file


def build_page(report: Report) -> str:
    """The page. Names, errors and lines are escaped, and its content security policy lets nothing run or load."""
    title = f"Sweep {report.folder.name}"
    picture = learning_curves(report.jobs)
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(report.counts)}</p>']
    parts += [f"<pre>{escape(line)}</pre>" for line in report.lines[:1]]
    parts += ["<h2>Jobs</h2>", _jobs_table(report)]
    if picture is not None:
        parts += ["<h2>Learning curves</h2>", _image(picture, "Learning curves of all jobs")]
    if report.comparison is not None:
        name, columns, rows = report.comparison
        body = [[escape(cell) for cell in row] for row in rows]
        parts += [f"<h2>{escape(name)}</h2>", _table([escape(column) for column in columns], body)]
    parts += [f'<p class="soft">{escape(note)}</p>' for note in [*report.notes, *report.unreadable]]
    if report.comparison_picture is not None:
        parts.append(_image(report.comparison_picture, "Variants beside each other"))
    if report.events:
        parts += ["<h2>What happened</h2>", "<ul>", *(f"<li>{escape(event)}</li>" for event in report.events), "</ul>"]
    for job in report.jobs:
        trace = Sweep(report.folder).error_file(job.name) if job.name and job.state not in DONE else None
        if trace is not None and trace.is_file():
            text = trace.read_text(encoding="utf-8", errors="replace")[-TRACE_CHARACTERS:]
            parts.append(f"<details><summary>Trace of {escape(job.name)}</summary><pre>{escape(visible(text))}</pre></details>")
    style = _part("multirun.css")
    page = _part("multirun.html").replace("__STYLE_HASH__", _hash(style)).replace("__STYLE__", style)
    return page.replace("__TITLE__", escape(title)).replace("__BODY__", "\n".join(parts))


def _part(name: str) -> str:
    return files("searchqa_agents").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"


def _image(picture: bytes, title: str) -> str:
    return f'<p><img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(picture).decode("ascii")}"></p>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], errors: Sequence[str] = ()) -> str:
    """A table of cells that are HTML already; ``errors`` stand behind the rows, in a column without a name."""
    head = "".join(f"<th>{column}</th>" for column in [*columns, *([""] if errors else [])])
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    lines = [f'{line}<td class="error">{error}</td>' for line, error in zip(lines, errors, strict=True)] if errors else lines
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _jobs_table(report: Report) -> str:
    from urllib.parse import quote

    columns, rows = report.table()
    body = []
    for job, row in zip(report.jobs, rows, strict=True):
        cells = [escape(cell) for cell in row]
        if job.name and (report.folder / job.name / "report.html").is_file():
            cells[0] = f'<a href="{escape(quote(f"{job.name}/report.html"))}">{cells[0]}</a>'
        if job.state not in DONE:
            cells[1] = f'<span class="bad">{cells[1]}</span>'
        body.append(cells)
    errors = [escape(job.error or "") for job in report.jobs]
    return _table([escape(column) for column in columns], body, errors if any(errors) else [])


def learning_curves(jobs: Sequence[Job]) -> bytes | None:
    """The curves of all jobs as PNG, a colour for each variant; None where no job has one."""
    drawn = [job for job in jobs if len(job.curve) > 1]
    if not drawn:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from searchqa_agents.plots import PALETTE

    variants = list(dict.fromkeys(job.variant for job in drawn))
    figure = Figure(figsize=(9.2, 4.2), dpi=140, layout="constrained")
    axes = figure.subplots()
    shares = all(job.curve[-1][0] <= 1 for job in drawn)
    for place, variant in enumerate(variants):
        for count, job in enumerate(one for one in drawn if one.variant == variant):
            label = (variant or "all jobs").replace("$", r"\$") if not count else None
            points = [(x, y) for x, y in job.curve if math.isfinite(y)]
            axes.plot(*zip(*points, strict=True), color=PALETTE[place % len(PALETTE)], linewidth=1.3, alpha=0.8, label=label)
    axes.set_ylim(min(-0.02, *(y for job in drawn for _, y in job.curve if math.isfinite(y))), 1.04)
    axes.xaxis.set_major_locator(MaxNLocator(integer=not shares))
    axes.set_xlabel("share of the budget" if shares else "step")
    axes.set_title("score on held-out questions" if shares else "exact match on training questions", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e0", linewidth=0.8)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    file = BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()
