"""``searchqa report``: picture, page and table of finished runs, and comparisons of several; and the functions by which runs make theirs."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchqa_agents.runs import OWN_TO_A_RUN, SUMMARY_FILE, RunFolderError, check_run_folder, read_metrics, read_searches, replace_file

if TYPE_CHECKING:
    from searchqa_agents.trajectory import Trajectory
    from searchqa_envs.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)

OF_NO_MATTER = frozenset(
    {"seed", "name", "run_dir", "threads", "device", "dry_run", "plugins", "keep_last", "rollouts_every", "max_lost_rollouts"}
)
"""Parts of a configuration that may."""


def main(line: Sequence[str]) -> int:
    """Run ``searchqa report <line>``."""
    from rich.console import Console

    from searchqa_agents.cli import UsageError
    from searchqa_agents.table import markdown, show, stamp_line

    folders = [word for word in line if word != "--markdown"]
    if not folders or any(word.startswith("-") for word in folders):
        raise UsageError(
            "report needs the folders of runs or sweeps: `searchqa report [--markdown] FOLDER [FOLDER ...]`. See `searchqa report --help`."
        )
    console = Console()
    paths = [path for folder in folders for path in runs_beneath(Path(folder))]
    unfinished = [path for path in paths if not (path / SUMMARY_FILE).is_file()]
    runs = [read_run(path) for path in paths if len(paths) == 1 or path not in unfinished] or [read_run(paths[0])]
    for run in runs:
        write_picture(run.path)
        write_page(run.path)
    files = [("Page", run.path / "report.html") for run in runs]
    if len(runs) == 1:
        tables = [(runs[0].name, runs[0].summary["columns"], runs[0].summary["rows"])]
    elif (groups := algorithm_groups(runs)) is not None:
        tables = [algorithm_table(groups)]
        files.append(("Comparison", write_comparison(Path(os.path.commonpath([Path(folder).resolve() for folder in folders])), groups)))
    else:
        tables = combined(runs)
    for title, columns, rows in tables:
        if "--markdown" in line:
            console.print(markdown(columns, rows), markup=False, highlight=False, soft_wrap=True)
        else:
            show(console, title, columns, rows, stamp_line(runs[0].stamp) if len(runs) == 1 else "")
    if "--markdown" not in line:
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
        logger.warning("%s has no results yet and is left out; `searchqa train resume=%s` goes on with it.", path, path)
    return 0


def runs_beneath(folder: Path) -> list[Path]:
    """A run's folder itself, or those of all runs beneath a folder, such as a sweep's, in the order of their names."""
    if (folder / "config.yaml").is_file():
        return [folder]
    found = sorted(file.parent for file in folder.glob("**/config.yaml") if file.parent.name != ".hydra")
    return found or [check_run_folder(folder)]  # which raises


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
            f"{path} has no results yet (summary.json is missing). `searchqa train resume={path}` goes on with a training run."
        )
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    return Run(path=path, name=summary["name"], stamp=_stamp(path), summary=summary, config=_config(path))


def _stamp(path: Path) -> dict[str, Any]:
    file = path / "stamp.json"
    stamp: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return stamp


def _config(path: Path) -> dict[str, Any]:
    import yaml

    config: dict[str, Any] = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    return config


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration makes a difference between runs, beside the seed; flat, such as ``algo.steps``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": part for name, part in value.items() if name != "seed" or key not in ("algo", "warmup", "sft")}
        elif key not in OF_NO_MATTER:
            flat[key] = value
    return flat


def algorithm_groups(runs: Sequence[Run]) -> dict[str, list[Run]] | None:
    """Training runs by algorithm, where they differ in nothing but the algorithm with its settings and the seed; else None.

    Where an algorithm comes with several settings, its name is followed by those that differ.
    """
    if any(run.summary["kind"] != "train" for run in runs):
        return None
    settings = [_settings(run.config) for run in runs]
    others = [{key: value for key, value in one.items() if not key.startswith("algo.")} for one in settings]
    if any(other != others[0] for other in others):
        return None
    groups: dict[str, list[Run]] = {}
    for run, own in zip(runs, settings, strict=True):
        label = run.summary["algorithm"]
        alike = [one for other, one in zip(runs, settings, strict=True) if other.summary["algorithm"] == label]
        differing = [key for key in own if any(one.get(key) != own[key] for one in alike)]
        parts = [label, *(f"{key.removeprefix('algo.')}={own[key]}" for key in differing)]
        groups.setdefault(" ".join(parts), []).append(run)
    return groups if len(groups) > 1 else None


def algorithm_table(groups: Mapping[str, Sequence[Run]]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: for each algorithm the means over its runs, and behind those of exact match each run's value."""
    from searchqa_agents.plots import headline
    from searchqa_agents.table import mean_and_each

    runs = [run for group in groups.values() for run in group]
    prefix = headline(runs[0].summary["measures"])
    hops = f"{prefix.partition('/')[0].removeprefix('hops=')}-hop " if prefix and prefix.startswith("hops=") else ""
    seeds = sorted({run.summary["seed"] for run in runs})
    title = f"By algorithm: {hops}held-out questions, sampled; mean and each run (seeds {', '.join(map(str, seeds))})"
    columns = ["algorithm", "EM before", "EM after", "searches", "tokens", "seconds"]
    rows = []
    for label, group in groups.items():
        ordered = sorted(group, key=lambda run: int(run.summary["seed"]))
        before, after = ([run.summary["measures"][when] for run in ordered] for when in ("before", "after"))
        em = [mean_and_each([measures.get(f"{prefix}/em", math.nan) for measures in one]) for one in (before, after)]
        searches = " → ".join(f"{_mean([measures.get(f'{prefix}/searches', math.nan) for measures in one]):.2f}" for one in (before, after))
        tokens = f"{_mean([run.summary['tokens'] for run in ordered]) / 1e6:.2f} M"
        rows.append([label, *em, searches, tokens, f"{_mean([run.summary['seconds_training'] for run in ordered]):.0f}"])
    return title, columns, rows


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def write_comparison(folder: Path, groups: Mapping[str, Sequence[Run]]) -> Path:
    """Draw ``comparison.png`` into a folder: learning curves and held-out results by algorithm."""
    from searchqa_agents.plots import comparison, headline

    curves, results = {}, {}
    for label, group in groups.items():
        lines = [[line for line in read_metrics(run.path) if line["phase"] == "train" and "charts/em" in line] for run in group]
        curves[label] = [[(int(line["step"]), float(line["charts/em"])) for line in one] for one in lines if one]
        prefix = headline(group[0].summary["measures"])
        results[label] = [tuple(run.summary["measures"][when][f"{prefix}/em"] for when in ("before", "after")) for run in group]
    picture = comparison(curves, results, prefix)
    file = folder / "comparison.png"
    replace_file(file, lambda partial: partial.write_bytes(picture))
    return file


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

    stamps = [{key: value for key, value in run.stamp.items() if key not in OWN_TO_A_RUN} | _settings(run.config) for run in runs]
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
    stamp, searches = _stamp(path), read_searches(path)
    page = build_page(
        sets,
        page_tokenizer(path, stamp),
        title=str(summary.get("name", path.name)),
        subtitle=f"{path.name} · {search_line(searches['total'])}" if searches else path.name,
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
