"""Runs that differ in a setting, beside each other: grouped into variants, kept as one small file of results, and told as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchqa_agents.runs import OWN_TO_A_RUN, RunFolderError, read_metrics, replace_file
from searchqa_agents.table import mean_and_each, number

if TYPE_CHECKING:
    from searchqa_agents.report import Run

OF_NO_MATTER = frozenset(
    {"seed", "name", "run_dir", "threads", "device", "dry_run", "plugins", "keep_last", "rollouts_every", "max_lost_rollouts", "plan"}
)
"""Parts of a configuration that change no result, or only by chance."""

CURVES = {"em": "charts/em", "searches": "charts/searches", "search_rate": "charts/search_rate", "reward": "charts/episodic_return"}
"""What is kept of every step, by its name in ``metrics.jsonl``."""

SCHEMA = 1


@dataclass(frozen=True)
class Outcome:
    """What one run contributes to a comparison."""

    variant: str
    seed: int
    before: dict[str, float]
    """measures of held-out questions by keys such as ``hops=2/sampled/em``"""
    after: dict[str, float]
    curves: dict[str, list[float]]
    """``step`` and, where the run has them, those of :data:`CURVES`: a number for each step"""
    tokens: float
    """all that were sampled and read while training"""
    seconds: float
    """of rollouts and updates"""

    def points(self, curve: str) -> list[tuple[int, float]]:
        """Pairs of step and value; empty for a curve that the run does not have."""
        return [(int(step), value) for step, value in zip(self.curves["step"], self.curves.get(curve, ()), strict=False)]

    def while_training(self) -> float:
        """Mean exact match on training questions over all steps; NaN where there is none, as in supervised fine-tuning."""
        values = self.curves.get("em", [])
        return math.fsum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class Comparison:
    """Runs by variant. The first variant is the one that the others are compared with."""

    by: str
    """what the variants are: ``algorithm``, or ``variant``"""
    settings: dict[str, dict[str, Any]]
    """for each variant, in order, the settings in which it differs from others"""
    measure: str
    """what runs are judged by, such as ``hops=2/sampled``"""
    outcomes: list[Outcome]
    stamp: dict[str, Any] = field(default_factory=dict)
    """what the stamps of all runs have in common"""
    command: str = ""
    """the line that began the runs, where one line did"""

    def of(self, variant: str) -> list[Outcome]:
        """A variant's runs, by seed."""
        return sorted((one for one in self.outcomes if one.variant == variant), key=lambda one: one.seed)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration makes a difference between runs, beside the seed; flat, such as ``algo.steps``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in OF_NO_MATTER:
            continue
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": part for name, part in value.items() if name != "seed" or key not in ("algo", "warmup", "sft")}
        else:
            flat[key] = value
    return flat


def compared(runs: Sequence[Run], command: str = "") -> Comparison | None:
    """Training runs by variant, in their order; None where they cannot be compared.

    They can where they are of one environment, measured on the same questions, and differ in some setting beside the seed. Variants are called
    by the runs' names where these were given and say the same, otherwise by what differs.
    """
    from searchqa_agents.plots import headline

    if any(run.summary["kind"] != "train" for run in runs):
        return None
    settings = [settings_of(run.config) for run in runs]
    asked = {json.dumps([one.get("env.id"), *(one.get(f"evaluation.{key}") for key in ("split", "questions", "seed"))]) for one in settings}
    measures = {headline(run.summary["measures"]) for run in runs}
    keys = [json.dumps([run.summary["algorithm"], one], sort_keys=True) for run, one in zip(runs, settings, strict=True)]
    if len(asked) > 1 or len(measures) > 1 or None in measures or len(set(keys)) < 2:
        return None
    differing = [_differing(i, runs, settings) for i in range(len(runs))]
    labels = _labels(runs, keys, differing)
    outcomes = [_outcome(run, label) for run, label in zip(runs, labels, strict=True)]
    only_algorithm = all(set(own) <= {"algo"} for own in differing)
    return Comparison(
        by="algorithm" if only_algorithm else "variant",
        settings=dict(zip(labels, differing, strict=True)),
        measure=str(measures.pop()),
        outcomes=outcomes,
        stamp=_common([run.stamp for run in runs]),
        command=command,
    )


def _differing(i: int, runs: Sequence[Run], settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings in which run ``i`` differs from others. Those of algorithms are compared within the same algorithm only: each has its own."""
    algorithms = [run.summary["algorithm"] for run in runs]
    found: dict[str, Any] = {"algo": algorithms[i]} if len(set(algorithms)) > 1 else {}
    for key, value in settings[i].items():
        others = [own for own, name in zip(settings, algorithms, strict=True) if not key.startswith("algo.") or name == algorithms[i]]
        if any(other.get(key) != value for other in others):
            found[key] = value
    return found


def _labels(runs: Sequence[Run], keys: Sequence[str], differing: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [run.name for run in runs]
    given = not any(
        name.startswith("train-") and name.endswith(f"-{run.summary['algorithm']}") for name, run in zip(names, runs, strict=True)
    )
    if given and len(set(names)) == len(set(keys)) == len(set(zip(names, keys, strict=True))):
        return names
    all_keys = {key for own in differing for key in own}
    last = [key.rpartition(".")[2] for key in all_keys]
    short = {key: part if last.count(part) == 1 else key for key, part in zip(all_keys, last, strict=True)}
    return [
        " ".join(_shown(value) if key == "algo" else f"{short[key]}={_shown(value)}" for key, value in own.items()) for own in differing
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _common(stamps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = OWN_TO_A_RUN - {"commit", "searchqa_gym"}
    return {key: value for key, value in stamps[0].items() if key not in own and all(stamp.get(key) == value for stamp in stamps)}


def _outcome(run: Run, variant: str) -> Outcome:
    lines = [line for line in read_metrics(run.path) if line["phase"] == "train"]
    curves: dict[str, list[float]] = {"step": []}
    steps = [line for line in lines if CURVES["em"] in line]
    if steps:
        curves["step"] = [int(line["step"]) for line in steps]
        curves |= {
            name: [round(float(line[key]), 5) for line in steps] for name, key in CURVES.items() if all(key in line for line in steps)
        }
    before, after = (dict(run.summary["measures"].get(when, {})) for when in ("before", "after"))
    summary = run.summary
    return Outcome(variant, int(summary["seed"]), before, after, curves, float(summary["tokens"]), float(summary["seconds_training"]))


# -- one file of results ---------------------------------------------------------------------------------------------------------------------


def write_results(file: Path, comparison: Comparison) -> None:
    """Write a comparison as JSON, one run on a line, so that it can be kept, read and drawn where the runs' folders are not."""
    values = asdict(comparison)
    runs = [json.dumps(outcome) for outcome in values.pop("outcomes")]
    head = json.dumps({"schema": SCHEMA, **values}, indent=1)
    text = head.removesuffix("\n}") + ',\n "outcomes": [\n  ' + ",\n  ".join(runs) + "\n ]\n}\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_results(file: Path) -> Comparison:
    """A comparison from its file. Raises ``RunFolderError`` for a file that holds none."""
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if values.pop("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        outcomes = [Outcome(**one) for one in values.pop("outcomes")]
        return Comparison(outcomes=outcomes, **values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{file} holds no results of `searchqa report FOLDER --save FILE.json`: {error}") from error


# -- table -----------------------------------------------------------------------------------------------------------------------------------


def comparison_table(comparison: Comparison) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: for each variant means over its runs with intervals, each run's value, and paired differences from the first variant."""
    variants = list(comparison.settings)
    seeds = sorted({one.seed for one in comparison.outcomes})
    key = comparison.measure
    hops = f"{key.partition('/')[0].removeprefix('hops=')}-hop " if key.startswith("hops=") else ""
    asked = f"{hops}held-out questions, sampled; mean and each run (seeds {', '.join(map(str, seeds))})"
    title = f"By {comparison.by}: {asked}; differences are from the first, seed by seed"
    changed = [name for name in ("search_rate", "reward") if any(f"{key}/{name}" in one.after for one in comparison.outcomes)]
    columns = [comparison.by, "EM before", "EM after", "95% interval", "difference", "EM while training"]
    columns += ["difference while training", "searches", *(name.replace("_", " ") for name in changed), "tokens", "seconds"]
    first = comparison.of(variants[0])
    rows = []
    for variant in variants:
        own = comparison.of(variant)
        after = [one.after.get(f"{key}/em", math.nan) for one in own]
        training = [one.while_training() for one in own]
        rows.append(
            [
                variant,
                mean_and_each([one.before.get(f"{key}/em", math.nan) for one in own]),
                mean_and_each(after),
                interval_text(after),
                "" if own == first else difference_text(*_paired(first, own, lambda one: one.after.get(f"{key}/em", math.nan))),
                number(_mean(training)) if not math.isnan(_mean(training)) else "–",
                "" if own == first else difference_text(*_paired(first, own, Outcome.while_training)),
                *(_before_and_after(own, f"{key}/{name}") for name in ("searches", *changed)),
                f"{_mean([one.tokens for one in own]) / 1e6:.2f} M",
                f"{_mean([one.seconds for one in own]):.0f}",
            ]
        )
    return title, columns, rows


def _paired(first: Sequence[Outcome], other: Sequence[Outcome], value: Any) -> tuple[dict[int, float], dict[int, float]]:
    return {one.seed: value(one) for one in first}, {one.seed: value(one) for one in other}


def paired_difference(first: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float | None] | None:
    """Mean of ``other`` minus ``first`` over the seeds that both have, and the half-width of its 95% interval; None without such seeds."""
    differences = [other[seed] - first[seed] for seed in sorted(first.keys() & other.keys()) if not math.isnan(other[seed] - first[seed])]
    return mean_and_interval(differences) if differences else None


def difference_text(first: Mapping[int, float], other: Mapping[int, float]) -> str:
    """A paired difference for a table: ``+0.021 (-0.003 to +0.045)``."""
    found = paired_difference(first, other)
    if found is None:
        return "–"
    mean, half = found
    return f"{mean:+.3f}" if half is None else f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def interval_text(values: Sequence[float]) -> str:
    """The 95% interval of a mean of shares, for a table, cut to what a share can be; a dash for a single value."""
    mean, half = mean_and_interval(values)
    return "–" if half is None or math.isnan(mean) else f"{max(mean - half, 0.0):.3f} to {min(mean + half, 1.0):.3f}"


def _before_and_after(own: Sequence[Outcome], key: str) -> str:
    before, after = (_mean([getattr(one, when).get(key, math.nan) for one in own]) for when in ("before", "after"))
    return " → ".join("–" if math.isnan(value) else f"{value:.2f}" for value in (before, after))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


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


# -- picture ---------------------------------------------------------------------------------------------------------------------------------


def draw_comparison(file: Path, comparison: Comparison) -> Path:
    """Draw learning curves and held-out results by variant, as PNG."""
    from searchqa_agents.plots import comparison as drawn

    key = comparison.measure
    curves = {
        name: {variant: [points for one in comparison.of(variant) if (points := one.points(name))] for variant in comparison.settings}
        for name in ("em", "searches")
    }
    results = {
        variant: [(one.before.get(f"{key}/em", math.nan), one.after.get(f"{key}/em", math.nan)) for one in comparison.of(variant)]
        for variant in comparison.settings
    }
    intervals = {variant: mean_and_interval([after for _, after in values]) for variant, values in results.items()}
    picture = drawn(curves, results, intervals, key)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda partial: partial.write_bytes(picture))
    return file
