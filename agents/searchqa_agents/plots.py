"""Pictures: the learning curve of a training run, several variants beside each other, and the scores of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREY = "#1f5fbf", "#c8571b", "#6b6f75"

PALETTE = (
    "#1f5fbf",
    "#c8571b",
    "#2b8a3e",
    "#8e44ad",
    "#b8860b",
    "#0f8b8d",
    "#c2185b",
    "#5b6770",
    "#7a3e12",
    "#4b4ba8",
    "#6a994e",
    "#000000",
)

Lines = Sequence[Mapping[str, Any]]


def learning_curve(lines: Lines, measures: Mapping[str, Mapping[str, float]], title: str) -> bytes | None:
    """The picture as PNG, or None where there is nothing to draw.

    Parameters
    ----------
    lines
        Of ``metrics.jsonl``; the phases warmup, sft, and any others with ``charts/em`` (reinforcement learning), where stages are told apart by a line.
    measures
        What was measured "before" and "after", and "after <stage>" between stages, by keys such as ``hops=2/sampled/em``.
    """
    losses = [line for line in lines if {"losses/warmup_loss", "losses/sft_loss"} & line.keys()]
    steps = [line for line in lines if "charts/em" in line]
    panels = ([_losses] if losses else []) + ([_success, _searches] if steps else [])
    if not panels:
        return None
    figure = Figure(figsize=(4.6 * len(panels), 3.7), dpi=140, layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, lines, measures)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e0", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(_literal(title), x=0.01, ha="left", fontsize=11)
    file = BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()


def _literal(text: str) -> str:
    """Text that is drawn as it is: matplotlib reads what stands between dollar signs as a formula."""
    return text.replace("$", r"\$")


def _losses(axes: Axes, lines: Lines, measures: Mapping[str, Mapping[str, float]]) -> None:
    offset = 0
    for phase, name, colour, label in (
        ("warmup", "losses/warmup_loss", GREY, "induction warm-up"),
        ("sft", "losses/sft_loss", BLUE, "fine-tuning"),
        ("train", "losses/sft_loss", ORANGE, "further fine-tuning"),
    ):
        points = [(offset + line["step"], line[name]) for line in lines if line["phase"] == phase and name in line]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, label=label)
            offset = points[-1][0]
    axes.set_yscale("log")
    axes.set_title("Supervised phases: loss per token", fontsize=10, loc="left")
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=8)


def _success(axes: Axes, lines: Lines, measures: Mapping[str, Mapping[str, float]]) -> None:
    steps = [line for line in lines if "charts/em" in line]
    x = [line["step"] for line in steps]
    em = [line["charts/em"] for line in steps]
    reward = [line.get("charts/episodic_return", line["charts/em"]) for line in steps]
    axes.plot(x, em, color=BLUE, linewidth=1.6, label="exact match, training questions")
    if any(abs(a - b) > 1e-9 for a, b in zip(em, reward, strict=True)):
        axes.plot(x, reward, color=GREY, linewidth=1.2, linestyle="--", label="reward, training questions")
    _marks(axes, lines, measures, "em", max(x))
    axes.set_ylim(min(-0.02, *reward), max(1.08, *reward))
    _switches(axes, lines)
    axes.set_title("Exact match", fontsize=10, loc="left")
    axes.set_xlabel("step of reinforcement learning")
    axes.legend(frameon=False, fontsize=8, loc="lower right" if em[-1] > 0.4 else "upper left")


def _searches(axes: Axes, lines: Lines, measures: Mapping[str, Mapping[str, float]]) -> None:
    steps = [line for line in lines if "charts/searches" in line]
    x = [line["step"] for line in steps]
    axes.plot(x, [line["charts/searches"] for line in steps], color=BLUE, linewidth=1.6, label="training questions")
    rates = [(line["step"], line["charts/search_rate"]) for line in steps if "charts/search_rate" in line]
    if rates:
        axes.plot(*zip(*rates, strict=True), color=GREY, linewidth=1.2, linestyle="--", label="share of them with a search")
    _marks(axes, lines, measures, "searches", max(x, default=1))
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]) * 1.08)
    _switches(axes, lines)
    axes.set_title("Searches per question", fontsize=10, loc="left")
    axes.set_xlabel("step of reinforcement learning")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


Interval = tuple[float, float]


def scores(
    results: Mapping[str, Mapping[str, tuple[float, Interval | None]]],
    found: Mapping[str, Sequence[float]],
    title: str,
    emphasised: str = "",
) -> bytes:
    """What an evaluation measured, as PNG: a dot with its interval for each measure, in a row for each set; and titles found by turn.

    Parameters
    ----------
    results
        Row (a set, or a group of questions) -> title of a measure -> value from 0 to 1, and its 95% interval.
    found
        Row -> mean share of the supporting titles found up to turn 1, 2, ...; drawn in a panel of its own where there is one with several turns.
    emphasised
        The row that stands for all others, such as a mean; drawn apart, with its values.
    """
    curves = {name: points for name, points in found.items() if len(points) > 1}
    measures = list(dict.fromkeys(measure for own in results.values() for measure in own))
    height = 1.5 + (0.3 + 0.12 * len(measures)) * len(results)
    figure = Figure(figsize=(11.5 if curves else 7.4, max(3.2, height)), dpi=140, layout="constrained")
    panels = figure.subplots(1, 2 if curves else 1, squeeze=False, width_ratios=(1.35, 1) if curves else (1,))[0]
    _dots(panels[0], results, measures, emphasised)
    if curves:
        _found_by_turn(panels[1], curves)
    for axes, grid in zip(panels, ("x", "y"), strict=False):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, color="#e4e4e0", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9)
    figure.suptitle(_literal(title), x=0.01, ha="left", fontsize=11)
    file = BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()


def _dots(axes: Axes, results: Mapping[str, Mapping[str, tuple[float, Interval | None]]], measures: Sequence[str], emphasised: str) -> None:
    step = 0.62 / max(1, len(measures))
    highest = 0.0
    for row, own in enumerate(reversed(list(results.values()))):
        for place, measure in enumerate(measures):
            if measure not in own:
                continue
            value, interval = own[measure]
            height = row + step * ((len(measures) - 1) / 2 - place)
            colour = PALETTE[place % len(PALETTE)]
            if interval is not None:
                axes.plot(interval, [height, height], color=colour, linewidth=3.4, alpha=0.35, solid_capstyle="butt")
            axes.scatter([value], [height], color=colour, s=26, zorder=3, clip_on=False, label=measure if row == len(results) - 1 else None)
            end = max(value, interval[1] if interval else value)
            axes.annotate(f"{value:.2f}", (end, height), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7.5, color=colour)
            highest = max(highest, end)
    labels = list(results)[::-1]
    axes.set_yticks(range(len(labels)), [_literal(label) for label in labels])
    for tick, label in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if label == emphasised else "normal")
    if emphasised in labels and len(labels) > 1:
        axes.axhline(labels.index(emphasised) + (0.5 if labels.index(emphasised) == 0 else -0.5), color=GREY, linewidth=0.8)
    axes.set_ylim(-0.55, len(labels) - 0.45)
    axes.set_xlim(0, min(1.09, 1.12 * highest + 0.05) if highest else 1.0)
    axes.set_title("Dot: mean over questions; bar: 95% interval", fontsize=10, loc="left")
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(measures) > 1:
        axes.legend(
            handles.values(), handles, frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(measures)
        )


def _found_by_turn(axes: Axes, curves: Mapping[str, Sequence[float]]) -> None:
    for place, (name, points) in enumerate(curves.items()):
        axes.plot(
            range(1, len(points) + 1),
            points,
            color=PALETTE[place % len(PALETTE)],
            marker="o",
            markersize=3.5,
            linewidth=1.5,
            label=_literal(name),
        )
    axes.set_ylim(-0.02, 1.04)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("turn", fontsize=9)
    axes.set_title("Supporting titles found so far, share", fontsize=10, loc="left")
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8.5, loc="best")


Curves = Mapping[str, Sequence[Sequence[tuple[int, float]]]]
"""For each variant, for each of its runs that has them: pairs of step and value."""

OVERLAID = 5
"""Up to this many variants are drawn over each other; more get a panel each."""


def comparison(
    curves: Mapping[str, Curves],
    results: Mapping[str, Sequence[tuple[float, float]]],
    intervals: Mapping[str, tuple[float, float | None]],
    measure: str | None,
) -> bytes:
    """Variants beside each other, as PNG.

    Parameters
    ----------
    curves
        ``em`` and ``searches`` on training questions. Drawn as mean and range over the runs.
    results
        For each variant, for each of its runs: exact match on held-out questions before and after. Drawn as a dot for each run; NaN is not drawn.
    intervals
        For each variant the mean of the latter, or NaN, and the half-width of its interval, or None. Drawn as a bar.
    measure
        What the results are of, such as ``hops=2/sampled``.
    """
    colours = {label: PALETTE[i % len(PALETTE)] for i, label in enumerate(results)}
    drawn = {name: {label: _mean_and_range(runs) for label, runs in own.items() if any(runs)} for name, own in curves.items()}
    overlaid = len(results) <= OVERLAID
    rows = 2 if overlaid else max(1, math.ceil(len(drawn["em"]) / math.ceil(math.sqrt(max(1, len(drawn["em"]))))))
    figure = Figure(figsize=(12, max(4.6 if overlaid else 3.6, 1.2 + 1.5 * rows, 1.3 + 0.34 * len(results))), dpi=140, layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    curves_part, results_part = parts
    panels = _overlaid_curves(curves_part, drawn, colours) if overlaid else _small_multiples(curves_part, drawn["em"], colours, rows)
    curves_part.supxlabel("step", fontsize=9)
    right = results_part.subplots()
    _held_out(right, results, intervals, colours, in_order=overlaid)
    hops = f"{measure.partition('/')[0].removeprefix('hops=')}-hop " if measure and measure.startswith("hops=") else ""
    results_part.suptitle(f"Held-out {hops}questions: before ○, after ●, mean and 95% interval ▬", fontsize=10, x=0.01, ha="left")
    results_part.supxlabel("exact match", fontsize=9)
    for axes, grid in (*((panel, "y") for panel in panels), (right, "x")):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, color="#e4e4e0", linewidth=0.8)
        axes.set_axisbelow(True)
    file = BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()


Bands = Mapping[str, Sequence[tuple[int, float, float, float]]]


def _overlaid_curves(part: Any, drawn: Mapping[str, Bands], colours: Mapping[str, str]) -> list[Axes]:
    """Exact match above searches, all variants in one panel each."""
    panels = list(part.subplots(2, 1, sharex=True, height_ratios=(1.6, 1)))
    for panel, (name, title) in zip(panels, (("em", "exact match"), ("searches", "searches per question")), strict=True):
        for label, points in drawn[name].items():
            steps, means, lows, highs = zip(*points, strict=True)
            panel.fill_between(steps, lows, highs, color=colours[label], alpha=0.18, linewidth=0)
            panel.plot(steps, means, color=colours[label], linewidth=1.8, label=_literal(label))
        panel.set_ylabel(title, fontsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.tick_params(labelsize=8)
    panels[0].set_ylim(-0.02, 1.02)
    panels[1].set_ylim(bottom=0)
    if drawn["em"]:
        panels[0].legend(frameon=False, fontsize=8.5, loc="best")
    part.suptitle("Training questions, sampled: mean and range over seeds", fontsize=10, x=0.01, ha="left")
    return panels


def _small_multiples(part: Any, drawn: Bands, colours: Mapping[str, str], rows: int) -> list[Axes]:
    """Exact match, a panel for each variant, the others in grey."""
    columns = max(1, math.ceil(len(drawn) / rows))
    panels = list(part.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten())
    lowest = min((low for points in drawn.values() for _, _, low, _ in points), default=0.0)
    for panel, label in zip(panels, drawn, strict=False):
        for other, points in drawn.items():
            if other != label:
                panel.plot([step for step, *_ in points], [mean for _, mean, *_ in points], color="#cfd2d6", linewidth=0.8)
        steps, means, lows, highs = zip(*drawn[label], strict=True)
        panel.fill_between(steps, lows, highs, color=colours[label], alpha=0.22, linewidth=0)
        panel.plot(steps, means, color=colours[label], linewidth=1.8)
        panel.set_title(_literal(label), fontsize=9 if len(label) < 22 else 6.5, loc="left", color=colours[label], fontweight="bold")
        panel.set_ylim(max(-0.02, lowest - 0.05), 1.02)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.tick_params(labelsize=8, labelbottom=True)
    for panel in panels[len(drawn) :]:
        panel.set_visible(False)
    title = "Exact match on training questions, sampled: mean and range over seeds; the others in grey"
    part.suptitle(title, fontsize=10, x=0.01, ha="left")
    return panels


def _held_out(
    axes: Axes,
    results: Mapping[str, Sequence[tuple[float, float]]],
    intervals: Mapping[str, tuple[float, float | None]],
    colours: Mapping[str, str],
    in_order: bool,
) -> None:
    """A row for each variant: in their order from above, or the best above."""
    means = {label: mean for label, (mean, _) in intervals.items()}
    order = list(results)[::-1] if in_order else sorted(results, key=lambda label: -1.0 if math.isnan(means[label]) else means[label])
    for row, label in enumerate(order):
        befores, afters = zip(*results[label], strict=True)
        mean, half = intervals[label]
        known = [value for value in befores if not math.isnan(value)]
        if known:
            axes.plot([sum(known) / len(known), mean], [row, row], color=colours[label], linewidth=1.2, alpha=0.35)
        if half is not None:
            low, high = max(0.0, mean - half), min(1.0, mean + half)
            axes.plot([low, high], [row, row], color=colours[label], linewidth=7, alpha=0.3, solid_capstyle="butt")
        axes.scatter(befores, [row] * len(befores), facecolors="white", edgecolors=colours[label], s=26, zorder=3)
        axes.scatter(afters, [row] * len(afters), color=colours[label], s=20, zorder=4)
        if math.isnan(mean):
            continue
        axes.scatter([mean], [row], color=colours[label], marker="|", s=220, zorder=5)
        axes.annotate(f"{mean:.3f}", (mean, row), xytext=(0, 12), textcoords="offset points", ha="center", fontsize=9, color=colours[label])
    axes.set_yticks(range(len(order)), [_literal(label) for label in order])
    for tick, label in zip(axes.get_yticklabels(), order, strict=True):
        tick.set_color(colours[label])
        tick.set_fontweight("bold")
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.set_xlim(-0.03, 1.06)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.tick_params(labelsize=8.5)


def _mean_and_range(runs: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float, float, float]]:
    """For each step its number, and mean, lowest and highest over the runs."""
    by_step: dict[int, list[float]] = {}
    for step, value in (point for run in runs for point in run):
        by_step.setdefault(step, []).append(value)
    return [(step, sum(values) / len(values), min(values), max(values)) for step, values in sorted(by_step.items())]


def headline(measures: Mapping[str, Mapping[str, float]]) -> str | None:
    """The measure that a run is judged by: sampled, on the questions with the most hops. ``hops=2/sampled`` or ``sampled``."""
    keys = [key.rpartition("/")[0] for key in measures.get("before", measures.get("after", {})) if key.endswith("sampled/em")]
    return max(keys, default=None)


def stage_ends(lines: Lines) -> list[tuple[int, str, str]]:
    """Where a run changed to another stage: the last step of the one that ended, its name, and the name of the next."""
    steps = [line for line in lines if line.get("stage")]
    return [(int(one["step"]), one["stage"], other["stage"]) for one, other in pairwise(steps) if one["stage"] != other["stage"]]


def _switches(axes: Axes, lines: Lines) -> None:
    """A labelled vertical line where a stage ends and the next begins."""
    for step, name, following in stage_ends(lines):
        axes.axvline(step + 0.5, color=GREY, linewidth=1.0, linestyle=":", label="_switch")
        for text, side in ((name, "right"), (following, "left")):
            axes.annotate(
                _literal(text),
                (step + 0.5, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-4 if side == "right" else 4, -2),
                textcoords="offset points",
                color=GREY,
                fontsize=8,
                ha=side,
                va="top",
            )


def _marks(axes: Axes, lines: Lines, measures: Mapping[str, Mapping[str, float]], metric: str, last_step: int) -> None:
    """Before and after, and between stages, on questions never trained on."""
    prefix = headline(measures)
    between = [(step, f"after {name}") for step, name, _ in stage_ends(lines)]
    points = [
        (x, measures[when][f"{prefix}/{metric}"], when)
        for x, when in ((0, "before"), *between, (last_step, "after"))
        if f"{prefix}/{metric}" in measures.get(when, {})
    ]
    if not points:
        return
    hops = f"{prefix.partition('/')[0].removeprefix('hops=')}-hop " if prefix and prefix.startswith("hops=") else ""
    x, y, _ = zip(*points, strict=True)
    axes.scatter(x, y, color=ORANGE, zorder=3, s=38, label=f"held-out {hops}questions, sampled")
    for place, value, when in points:
        left = place == 0
        axes.annotate(
            f"{when if when in ('before', 'after') else ''} {value:.2f}".strip(),
            (place, value),
            xytext=(6 if left else -6, 8 if value < 0.9 or metric != "em" else -14),
            textcoords="offset points",
            color=ORANGE,
            fontsize=9,
            ha="left" if left else "right",
        )
