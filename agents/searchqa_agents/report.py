"""``searchqa report``: picture, page and table of finished runs, and several beside each other; and the functions by which runs make theirs."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchqa_agents.eval_report import PICTURE_FILE, is_evaluation, lines_beneath, partly_judged, print_table, refresh
from searchqa_agents.runs import OWN_TO_A_RUN, SUMMARY_FILE, RunFolderError, check_run_folder, read_metrics, read_searches, replace_file
from searchqa_agents.table import markdown
from searchqa_agents.variants import (
    compared,
    comparison_table,
    draw_comparison,
    notes,
    read_results,
    seed_row,
    settings_of,
    write_results,
)

if TYPE_CHECKING:
    from rich.console import Console

    from searchqa_agents.trajectory import Trajectory
    from searchqa_envs.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)


def main(line: Sequence[str]) -> int:
    """Run ``searchqa report <line>``."""
    from rich.console import Console

    from searchqa_agents.cli import UsageError
    from searchqa_agents.table import legible, show, stamp_line

    words, kept_as = _words(line)
    as_markdown, folders = "--markdown" in words, [word for word in words if word != "--markdown"]
    results = [Path(word) for word in folders if word.endswith(".json")]
    if not folders or any(word.startswith("-") for word in folders) or (results and (kept_as or len(results) < len(folders))):
        raise UsageError(
            "report needs the folders of runs or sweeps: `searchqa report [--markdown] [--save FILE.json] FOLDER [FOLDER ...]`, or files that "
            "--save has written: `searchqa report [--markdown] FILE.json [FILE.json ...]`. See `searchqa report --help`."
        )
    console = legible(Console())
    if results:
        _report_results(results, as_markdown, console)
        return 0
    paths = [path for folder in folders for path in runs_beneath(Path(folder))]
    evaluations = [path for path in paths if is_evaluation(path)]
    for path in evaluations:
        refresh(path)
    unfinished = [path for path in paths if not (path / SUMMARY_FILE).is_file()]
    runs = [read_run(path) for path in paths if len(paths) == 1 or path not in unfinished] or [read_run(paths[0])]
    for run in runs:
        if run.path not in evaluations:
            write_picture(run.path)
            write_page(run.path)
    files = [("Page", run.path / "report.html") for run in runs]
    comparison = compared(runs, _command(folders), single=bool(kept_as))
    if kept_as and comparison is None:
        raise UsageError(
            "--save keeps training runs that were measured on the same questions: variants beside each other, or the seeds of one."
        )
    if len(runs) == 1 and comparison is None:
        tables = [(runs[0].name, runs[0].summary["columns"], runs[0].summary["rows"])]
    elif comparison is not None:
        tables = [comparison_table(comparison)]
        folder = Path(os.path.commonpath([Path(folder).resolve() for folder in folders]))
        files.append(("Comparison", draw_comparison(folder / "comparison.png", comparison)))
        if kept_as:
            write_results(Path(kept_as), comparison)
            files += [("Results", Path(kept_as)), ("Picture", draw_comparison(Path(kept_as).with_suffix(".png"), comparison))]
    else:
        tables = combined(runs)
    if len(runs) == 1 and runs[0].path in evaluations and not as_markdown:
        print_table(console, runs[0].summary, runs[0].stamp)
        console.print(f"Page: {runs[0].path / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
        return 0
    beneath = notes(comparison) if comparison is not None else []
    for title, columns, rows in tables:
        if as_markdown:
            _print_markdown(console, columns, rows, beneath)
        else:
            show(console, title, columns, rows, "\n".join(beneath) or (stamp_line(runs[0].stamp) if len(runs) == 1 else ""))
    if not as_markdown:
        for run in runs:
            if searches := read_searches(run.path):
                name = f"{run.path.name}: " if len(runs) > 1 else ""
                console.print(f"{name}{search_line(searches['total'])}", markup=False, highlight=False, soft_wrap=True)
        for run in runs:
            if line_of_lost := lost_line(run.summary.get("lost_episodes", {})):
                console.print(f"{run.path.name}: {line_of_lost}", style="bold", markup=False, highlight=False, soft_wrap=True)
        for title, file in files:
            console.print(f"{title}: {file}", markup=False, highlight=False, soft_wrap=True)
    for path in unfinished:
        logger.warning("%s has no results yet and is left out; `searchqa %s resume=%s` goes on with it.", path, _command_of(path), path)
    return 0


def _words(line: Sequence[str]) -> tuple[list[str], str | None]:
    """The words of a line without ``--save FILE``, and that file."""
    from searchqa_agents.cli import UsageError

    words = list(line)
    if "--save" not in words:
        return words, None
    place = words.index("--save")
    file = words[place + 1] if place + 1 < len(words) else ""
    if not file.endswith(".json"):
        raise UsageError(f"--save needs the name of a file that ends in .json, such as results/mask.json; got {file!r}.")
    return words[:place] + words[place + 2 :], file


def _report_results(files: Sequence[Path], as_markdown: bool, console: Console) -> None:
    """Tables, and pictures beside them, of comparisons that were kept."""
    from searchqa_agents.table import show, stamp_line

    for file in files:
        comparison = read_results(file)
        title, columns, rows = comparison_table(comparison)
        if as_markdown:
            _print_markdown(console, columns, rows, notes(comparison))
            continue
        origin = ", ".join(filter(None, [comparison.command, stamp_line(comparison.stamp)]))
        show(console, f"{file.stem}. {title}", columns, rows, "\n".join(filter(None, [*notes(comparison), origin])))
        picture = draw_comparison(file.with_suffix(".png"), comparison)
        console.print(f"Picture: {picture}", markup=False, highlight=False, soft_wrap=True)


def _print_markdown(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], beneath: Sequence[str]) -> None:
    text = "\n\n".join([markdown(columns, rows), *beneath])
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _command(folders: Sequence[str]) -> str:
    """The line that began a sweep, without its folder; empty where the runs are not those of one sweep."""
    import yaml

    file = Path(folders[0]) / "multirun.yaml"
    if len(folders) > 1 or not file.is_file():
        return ""
    overrides = yaml.safe_load(file.read_text(encoding="utf-8"))["hydra"]["overrides"]["task"]
    return " ".join(["searchqa train -m", *overrides])


def runs_beneath(folder: Path) -> list[Path]:
    """A run's folder itself, or those of all runs beneath a folder: a sweep's in the order of its line, others by name."""
    if (folder / "config.yaml").is_file():
        return [folder]
    found = sorted((file.parent for file in folder.glob("**/config.yaml") if file.parent.name != ".hydra"), key=_place_in_sweep)
    return found or [check_run_folder(folder)]  # which raises


def _place_in_sweep(path: Path) -> tuple[int, str]:
    import yaml

    file = path / ".hydra" / "hydra.yaml"
    number = yaml.safe_load(file.read_text(encoding="utf-8"))["hydra"]["job"].get("num", 0) if file.is_file() else 0
    return int(number or 0), str(path)


class Run(argparse.Namespace):
    """A finished run, read from its folder."""

    path: Path
    name: str
    stamp: dict[str, Any]
    summary: dict[str, Any]
    config: dict[str, Any]


def read_run(folder: str | Path) -> Run:
    """What a run's folder says; raises ``RunFolderError`` if the run has no results yet."""
    path = check_run_folder(folder)
    if not (path / "summary.json").is_file():
        raise RunFolderError(
            f"{path} has no results yet (summary.json is missing). `searchqa {_command_of(path)} resume={path}` goes on with it."
        )
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    return Run(path=path, name=summary["name"], stamp=_stamp(path), summary=summary, config=_config(path))


def _command_of(path: Path) -> str:
    """What goes on with an unfinished run."""
    return "eval" if (path / "answers").is_dir() else "train"


def _stamp(path: Path) -> dict[str, Any]:
    file = path / "stamp.json"
    stamp: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return stamp


def _config(path: Path) -> dict[str, Any]:
    import yaml

    config: dict[str, Any] = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    return config


def totals_of_training(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """``tokens`` (all that were sampled and read) and ``seconds_training`` (rollouts and updates) of the lines of the training phase."""
    own = [line for line in lines if line["phase"] == "train"]
    seconds = math.fsum(line.get(f"time/{part}", 0.0) for line in own for part in ("rollout", "data", "update"))
    return {"tokens": math.fsum(line.get("charts/tokens", 0.0) for line in own), "seconds_training": round(seconds, 3)}


def lost_episodes(lines: Sequence[Mapping[str, Any]], measures: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
    """How many episodes lost their search back end: by phase of the lines of a run, ``before`` and ``after`` of the evaluations; only those above 0."""
    counts: dict[str, float] = dict.fromkeys(("sft", "before", "train", "after"), 0.0)
    for line in lines:
        if line["phase"] in ("sft", "train"):
            counts[line["phase"]] += line.get("charts/backend_errors", 0.0)
    for when, values in measures.items():
        counts[when] = math.fsum(value for key, value in values.items() if key.endswith("/backend_errors"))
    return {when: int(count) for when, count in counts.items() if count}


def lost_line(lost: Mapping[str, int]) -> str:
    """The counts of :func:`lost_episodes` in one line; empty for none."""
    names = {"sft": "demonstrations", "before": "evaluation before", "train": "training", "after": "evaluation after"}
    parts = ", ".join(f"{names.get(when, when)} {count:,}" for when, count in lost.items())
    if not parts:
        return ""
    return f"The search back end was lost in {sum(lost.values()):,} episodes ({parts}): they are left out of all means, and nothing was learned from them."


def search_line(searches: Mapping[str, float]) -> str:
    """What searching cost, in one line: calls, duplicates, seconds, money. ``searches`` are the figures of ``searchqa_retrievers.counted``."""
    asked = searches.get("search/searches", 0.0)
    if not asked:
        return "Search: none."
    parts = [f"{asked:,.0f} searches ({searches.get('search/duplicate_fraction', 0.0):.0%} doubles within a step"]
    if "search/hit_fraction" in searches:
        parts[0] += f", {searches['search/hit_fraction']:.0%} of the others from memory"
    if "search/disk_hit_fraction" in searches:
        parts[0] += f", {searches['search/disk_hit_fraction']:.0%} of the rest from the cache file"
    parts[0] += ")"
    if "search/backend_calls" in searches:
        calls, requests = searches["search/backend_calls"], searches["search/backend_requests"]
        parts.append(f"{requests:,.0f} requests in {calls:,.0f} calls of the back end")
    if searches.get("search/errors"):
        parts.append(f"{searches['search/errors']:,.0f} lost")
    parts.append(f"{searches['search/seconds']:,.1f} s")
    if "search/p50_ms" in searches:
        parts.append(f"a call {_milliseconds(searches['search/p50_ms'])} (p50), {_milliseconds(searches['search/p99_ms'])} (p99)")
    if searches.get("search/money"):
        parts.append(f"cost {searches['search/money']:,.2f}")
    return f"Search: {', '.join(parts)}."


def _milliseconds(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.3g} ms" if value < 1000 else f"{value:,.0f} ms"


def combined(runs: Sequence[Run]) -> list[tuple[str, list[str], list[list[str]]]]:
    """One table (title, columns, rows): means over runs that differ in their seed only, otherwise a column for each run."""
    from searchqa_agents.table import number

    stamps = [_without_own(run.stamp) | settings_of(run.config) for run in runs]
    values = [run_values(run) for run in runs]
    titles = {name: None for one in values for name in one}
    if all(stamp == stamps[0] for stamp in stamps[1:]):
        seeds = ", ".join(str(run.stamp.get("seed")) for run in runs)
        rows = []
        for title in titles:
            for when in {when: None for one in values for when in one.get(title, {})}:
                own = [one.get(title, {}).get(when, math.nan) for one in values]
                rows.append(seed_row(f"{title}{', ' + when if when else ''}", own))
        columns = ["", "mean", "95% interval", *(f"seed {run.stamp.get('seed')}" for run in runs)]
        return [(f"Mean over {len(runs)} runs (seeds {seeds})", columns, rows)]
    rows = []
    for title in titles:
        whens = {when: None for one in values for when in one.get(title, {})}
        for when in whens:
            rows.append([f"{title}{', ' + when if when else ''}", *(number(one.get(title, {}).get(when)) for one in values)])
    return [("Runs with different settings", ["", *(run.path.name for run in runs)], rows)]


def _without_own(stamp: Mapping[str, Any]) -> dict[str, Any]:
    """A stamp, and that of each set in it, without what may differ between runs whose mean is still meaningful."""
    own = {key: value for key, value in stamp.items() if key not in OWN_TO_A_RUN}
    return own | {"sets": {name: _without_own(value) for name, value in stamp["sets"].items()}} if "sets" in stamp else own


def run_values(run: Run) -> dict[str, dict[str, float]]:
    """The numbers of a run: title of the measure -> "before", "after <stage>", "after" (training) or "" (evaluation) -> value.

    Of an evaluation of which only some answers are judged, the share of those that are right is left out.
    """
    from searchqa_agents.table import METRIC_TITLES

    if run.summary["kind"] == "eval":
        whole = {name: value for name, value in run.summary["metrics"].items() if name != "judge" or not partly_judged(run.summary)}
        return {title: {"": whole[name]} for name, title in METRIC_TITLES.items() if name in whole}
    measures = run.summary["measures"]
    return {title: {when: own[key] for when, own in measures.items() if key in own} for key, title in run.summary["titles"].items()}


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
    """Write ``report.html``: the table, curves or picture, and the trajectories (those given, else those in the folder), as many as a page shows."""
    from searchqa_agents.curves import run_panels
    from searchqa_agents.page_sets import cut_sets, folder_sets
    from searchqa_agents.viewer import build_page

    summary_file = path / SUMMARY_FILE
    summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.is_file() else {}
    chosen, left_out = folder_sets(path, summary.get("sets", {})) if sets is None else cut_sets(sets)
    picture_file = path / PICTURE_FILE
    stamp, searches, lines = _stamp(path), read_searches(path), read_metrics(path)
    page = build_page(
        chosen,
        page_tokenizer(path, stamp),
        title=str(summary.get("name", path.name)),
        subtitle=" · ".join(run_parts(path, summary, lines)),
        table=(summary.get("columns", ()), summary.get("rows", ())),
        stamp=stamp,
        picture=picture_file.read_bytes() if is_evaluation(path) and picture_file.is_file() else None,
        notes=[*lines_beneath(summary, stamp), *([search_line(searches["total"])] if searches else []), *left_out],
        curves=run_panels(lines, summary.get("measures", {}), hops=() if summary.get("stages") else stamp.get("hops") or ()),
    )
    file = path / "report.html"
    replace_file(file, lambda partial: partial.write_text(page, encoding="utf-8"))
    return file


def run_parts(path: Path, summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a run is, in a few words each: its algorithm or agent, data, start, steps, seed, day, and folder; what is not known is left out."""
    config = _config(path) or {}
    algorithm, agent, env = (config.get(key) or {} for key in ("algo", "agent", "env"))
    sets = config.get("sets")
    steps = max((int(line["step"]) for line in lines if line["phase"] == "train"), default=0)
    parts = [
        summary.get("algorithm") or algorithm.get("name") or agent.get("baseline") or agent.get("kind"),
        ", ".join(map(str, sets)) if isinstance(sets, list) else sets or env.get("id"),
        f"start {config['start']}" if config.get("start") else None,
        f"{steps:,} step{'s' if steps > 1 else ''}" if steps else None,
        f"seed {config['seed']}" if config.get("seed") is not None else None,
        _day(path),
        f"folder {path.name}",
    ]
    return [str(part) for part in parts if part]


def _day(path: Path) -> str:
    """When a run began, in UTC, by its first file of TensorBoard; "" where there is none, and where the folder's name begins with the day."""
    seconds = [int(file.name.split(".")[3]) for file in path.glob("tensorboard/*/events.out.tfevents.[0-9]*.*")]
    if not seconds or re.match(r"\d{4}-\d\d-\d\d_", path.name):
        return ""
    return datetime.fromtimestamp(min(seconds), UTC).date().isoformat()


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
