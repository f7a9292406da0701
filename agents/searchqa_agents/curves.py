"""Curves of training as a page draws them: panels of numbers from the lines of ``metrics.jsonl``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

MOST_POINTS = 1000
"""A curve with more is thinned out to every second, third, ... step, and the panel says so."""
KL = "KL divergence"
NEGLIGIBLE = 1e-6
"""A KL divergence that stays below, in nats per token, is the rounding of one update for each rollout: its panel is under "more"."""
TRAINING: dict[str, dict[str, str]] = {
    "Exact match and reward": {"charts/em": "exact match on training questions", "charts/episodic_return": "reward"},
    "Searches per question": {"charts/searches": "searches", "charts/search_rate": "questions with a search"},
    "Policy loss": {"losses/policy_loss": "policy loss"},
    KL: {"losses/kl": "to the reference", "losses/approx_kl": "to what sampled"},
    "Entropy per token": {"charts/entropy": "entropy"},
    "Tokens sampled per episode": {"charts/sampled_tokens": "tokens"},
    "Invalid turns per question": {"charts/invalid_turns": "invalid turns"},
    "Seconds per step": {"time/rollout": "rollout", "time/update": "update", "time/data": "data"},
}
"""Panels of a training run: title -> name of a measure in ``metrics.jsonl`` -> what the legend calls it. All other measures are under "more"."""
FURTHER = {
    "charts/backend_errors": "Episodes that lost the search engine",
    "charts/explained_variance": "Share of the returns' variance that the critic explains",
    "charts/f1": "F1",
    "charts/groups_with_spread": "Groups whose rewards differ, share",
    "charts/learning_rate": "Learning rate",
    "charts/policy_tokens": "Tokens sampled since training began",
    "charts/reward_std": "Standard deviation of rewards",
    "charts/stage": "Number of the stage",
    "charts/tokens": "Tokens of a rollout, sampled and read",
    "charts/trained_share": "Episodes learned from, share",
    "charts/updates": "Updates of a step",
    "losses/clipfrac": "Tokens whose ratio was clipped, share",
    "losses/critic_grad_norm": "Norm of the critic's gradient",
    "losses/entropy": "Entropy per token, in the loss",
    "losses/grad_norm": "Norm of the gradient",
    "losses/value_clipfrac": "Values that were clipped, share",
    "losses/value_loss": "Loss of the critic",
    "search/backend_calls": "Calls of the search engine",
    "search/disk_hit_fraction": "Requests answered by the cache file, share",
    "search/duplicate_fraction": "Searches equal to another of their step, share",
    "search/hit_fraction": "Requests answered from memory, share",
    "search/money": "Price of the searches",
    "search/noise": "Simulated search: probability of noise",
    "search/noisy_fraction": "Simulated search: noisy answers, share",
    "search/p50_ms": "A call of the search engine, median, ms",
    "search/p99_ms": "A call of the search engine, 99th percentile, ms",
    "search/searches": "Searches of a rollout",
    "search/seconds": "Seconds of waiting for searches",
    "time/environment": "Seconds of the environment, summed over episodes",
    "time/model": "Seconds of sampling, summed over episodes",
    "time/search": "Seconds of searching, summed over episodes",
}
"""Titles of the panels under "more"; the legend has the name of the measure, and so has the title of one that is not here."""
SUPERVISED = (
    ("warmup", "losses/warmup_loss", "induction warm-up"),
    ("sft", "losses/sft_loss", "fine-tuning"),
    ("train", "losses/sft_loss", "further fine-tuning"),
)
"""Phase, measure and name of each part of the curve of the supervised loss, one behind the other."""
_NO_MEASURE = ("phase", "step", "seconds", "stage")

Lines = Sequence[Mapping[str, Any]]


class Series(NamedTuple):
    """One line. ``x`` are steps; None in ``y`` is a gap."""

    name: str
    x: list[float]
    y: list[float | None]


class Mark(NamedTuple):
    """A single point, with a word beside it."""

    x: float
    y: float
    label: str


class Panel(NamedTuple):
    """One picture of curves.

    Attributes
    ----------
    marks, marks_name
        Points beside the curves, and what the legend calls them.
    switches
        Where a stage ended: the last step, its name, the name of the next.
    logarithmic
        Whether values are on a logarithmic scale.
    more
        Whether the panel is shown only when asked for.
    note
        A line beneath the panel.
    """

    title: str
    series: list[Series]
    marks: list[Mark]
    marks_name: str
    switches: list[tuple[int, str, str]]
    x_name: str
    logarithmic: bool
    more: bool
    note: str


def run_panels(lines: Lines, measures: Mapping[str, Mapping[str, float]], hops: Sequence[int] = ()) -> list[Panel]:
    """The panels of one run.

    Parameters
    ----------
    lines
        Of ``metrics.jsonl``: supervised phases, and reinforcement learning in the phase ``train``.
    measures
        What was measured "before" and "after", and "after <stage>" between stages, on held-out questions, by keys such as ``hops=2/sampled/em``.
    hops
        Of the training questions, where they are known and the same all along; see the note of panels with marks.
    """
    steps = [line for line in lines if line["phase"] == "train"]
    panels = [_supervised(lines)]
    for title, names in TRAINING.items():
        name = {"charts/em": "em", "charts/searches": "searches"}.get(next(iter(names)), "")
        marks, marks_name = _held_out(steps, measures, name) if name else ([], "")
        panel = _panel(title, {label: (steps, key) for key, label in names.items()}, marks, marks_name, _switches(steps))
        panels.append(_asides(panel, hops))
    panels += [_panel(FURTHER.get(key, key), {key: (steps, key)}, switches=_switches(steps), more=True) for key in _others(steps)]
    return [panel for panel in panels if panel.series]


def panels_of_runs(runs: Mapping[str, Lines]) -> list[Panel]:
    """The panels of several runs: one for each measure, with a curve for each run."""
    steps = {name: [line for line in lines if line["phase"] == "train"] for name, lines in runs.items()}
    panels = []
    for title, names in TRAINING.items():
        found = [key for key in names if any(key in line for lines in steps.values() for line in lines)]
        for key in found:
            own = title if len(names) == 1 else f"{title}: {names[key]}"
            panel = _panel(own, {name: (lines, key) for name, lines in steps.items()}, more=key != found[0])
            panels.append(_asides(panel) if title == KL else panel)
    every = {key: None for lines in steps.values() for key in _others(lines)}
    panels += [_panel(FURTHER.get(key, key), {name: (lines, key) for name, lines in steps.items()}, more=True) for key in every]
    return [panel for panel in panels if panel.series]


def _panel(
    title: str,
    curves: Mapping[str, tuple[Lines, str]],
    marks: Sequence[Mark] = (),
    marks_name: str = "",
    switches: Sequence[tuple[int, str, str]] = (),
    *,
    more: bool = False,
) -> Panel:
    """A panel of curves, each of the lines that have its measure; curves that are alike are drawn as one, under all their names."""
    series: list[Series] = []
    every = 1
    for name, (lines, key) in curves.items():
        points = [(float(line["step"]), _value(line[key])) for line in lines if key in line]
        own = max(1, math.ceil(len(points) / MOST_POINTS))
        points = points[::-1][::own][::-1]  # the last one stays
        every = max(every, own)
        if not points:
            continue
        x, y = [x for x, _ in points], [y for _, y in points]
        alike = next((place for place, one in enumerate(series) if (one.x, one.y) == (x, y)), None)
        if alike is None:
            series.append(Series(name, x, y))
        else:
            series[alike] = series[alike]._replace(name=f"{series[alike].name}, {name}")
    note = f"Drawn at one step in {every}." if every > 1 else ""
    return Panel(title, series, list(marks), marks_name, list(switches), "step", False, more, note)


def _asides(panel: Panel, hops: Sequence[int] = ()) -> Panel:
    """A panel with what a reader has to know of it: marks that are not of the same questions as the curve, and numbers that are nothing but rounding."""
    values = [abs(y) for series in panel.series for y in series.y if y is not None]
    if panel.title.startswith(KL) and values and max(values) < NEGLIGIBLE:
        panel = panel._replace(more=True, note=f"{panel.note} All below {NEGLIGIBLE:.6f}.".strip())
    held_out = re.match(r"(\d+)-hop", panel.marks_name)
    if held_out and list(hops) != [int(held_out[1])]:
        kinds = f" ({' and '.join(map(str, hops))} hops)" if hops else ""
        note = f"Curve: training questions{kinds}. Marks: held-out questions of {held_out[1]} hops only."
        panel = panel._replace(note=f"{panel.note} {note}".strip())
    return panel


def _supervised(lines: Lines) -> Panel:
    series, offset = [], 0.0
    for phase, key, name in SUPERVISED:
        own = [line for line in lines if line["phase"] == phase and key in line]
        if own:
            curve = _panel("", {name: (own, key)}).series[0]
            series.append(curve._replace(x=[offset + x for x in curve.x]))
            offset = series[-1].x[-1]
    return Panel("Supervised phases: loss per token", series, [], "", [], "step", True, False, "")


def _value(value: Any) -> float | None:
    """To five digits; None for what is no number."""
    return float(f"{value:.5g}") if isinstance(value, (int, float)) and math.isfinite(value) else None


def _others(steps: Lines) -> list[str]:
    shown = {key for names in TRAINING.values() for key in names} | {key for _, key, _ in SUPERVISED} | set(_NO_MEASURE)
    names = {key for line in steps for key, value in line.items() if isinstance(value, (int, float))}
    return sorted(names - shown)


def _switches(steps: Lines) -> list[tuple[int, str, str]]:
    """Where a run changed to another stage."""
    staged = [line for line in steps if line.get("stage")]
    return [(int(one["step"]), one["stage"], other["stage"]) for one, other in pairwise(staged) if one["stage"] != other["stage"]]


def _held_out(steps: Lines, measures: Mapping[str, Mapping[str, float]], metric: str) -> tuple[list[Mark], str]:
    """What was measured before, between stages and after, sampled, on the questions with the most hops."""
    keys = [key.rpartition("/")[0] for key in measures.get("before", measures.get("after", {})) if key.endswith("sampled/em")]
    prefix = max(keys, default=None)
    if prefix is None or not steps:
        return [], ""
    whens = [(0, "before"), *((step, f"after {name}") for step, name, _ in _switches(steps)), (int(steps[-1]["step"]), "after")]
    marks = [
        Mark(step, float(measures[when][f"{prefix}/{metric}"]), when)
        for step, when in whens
        if f"{prefix}/{metric}" in measures.get(when, {})
    ]
    hops = f"{prefix.partition('/')[0].removeprefix('hops=')}-hop " if prefix.startswith("hops=") else ""
    return marks, f"{hops}held-out questions, sampled"
