"""Pictures: the learning curve of a training run, and several algorithms beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
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
        Of ``metrics.jsonl``; the phases warmup, sft, and any others with ``charts/em`` (reinforcement learning).
    measures
        What was measured "before" and "after", by keys such as ``hops=2/sampled/em``.
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
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    file = BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()


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
    _marks(axes, measures, "em", max(x))
    axes.set_ylim(-0.02, max(1.08, *reward))
    axes.set_title("Exact match", fontsize=10, loc="left")
    axes.set_xlabel("step of reinforcement learning")
    axes.legend(frameon=False, fontsize=8, loc="lower right" if em[-1] > 0.4 else "upper left")


def _searches(axes: Axes, lines: Lines, measures: Mapping[str, Mapping[str, float]]) -> None:
    steps = [line for line in lines if "charts/searches" in line]
    x = [line["step"] for line in steps]
    axes.plot(x, [line["charts/searches"] for line in steps], color=BLUE, linewidth=1.6, label="training questions")
    _marks(axes, measures, "searches", max(x, default=1))
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]) * 1.08)
    axes.set_title("Searches per question", fontsize=10, loc="left")
    axes.set_xlabel("step of reinforcement learning")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def comparison(
    curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]], results: Mapping[str, Sequence[tuple[float, ...]]], measure: str | None
) -> bytes:
    """Algorithms beside each other, as PNG.

    Parameters
    ----------
    curves
        For each algorithm, for each of its runs: pairs of step and exact match on training questions. Drawn as mean and range, a panel for each.
    results
        For each algorithm, for each of its runs: exact match on held-out questions before and after. Drawn as a dot for each run.
    measure
        What the results are of, such as ``hops=2/sampled``.
    """
    colours = {label: PALETTE[i % len(PALETTE)] for i, label in enumerate(results)}
    drawn = {label: _mean_and_range(runs) for label, runs in curves.items() if any(runs)}
    columns = max(1, math.ceil(math.sqrt(len(drawn))))
    rows = max(1, math.ceil(len(drawn) / columns))
    figure = Figure(figsize=(12, max(3.6, 1.2 + 1.5 * rows, 1.3 + 0.34 * len(results))), dpi=140, layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    curves_part, results_part = parts
    panels = curves_part.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    lowest = min((low for points in drawn.values() for _, _, low, _ in points), default=0.0)
    for panel, label in zip(panels, drawn, strict=False):
        for other, points in drawn.items():  # the others in grey, to compare with
            if other != label:
                panel.plot([step for step, *_ in points], [mean for _, mean, *_ in points], color="#cfd2d6", linewidth=0.8)
        steps, means, lows, highs = zip(*drawn[label], strict=True)
        panel.fill_between(steps, lows, highs, color=colours[label], alpha=0.22, linewidth=0)
        panel.plot(steps, means, color=colours[label], linewidth=1.8)
        panel.set_title(label, fontsize=9 if len(label) < 22 else 6.5, loc="left", color=colours[label], fontweight="bold")
        panel.set_ylim(max(-0.02, lowest - 0.05), 1.02)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.tick_params(labelsize=8, labelbottom=True)
    for panel in panels[len(drawn) :]:
        panel.set_visible(False)
    curves_part.suptitle(
        "Exact match on training questions, sampled: mean and range over seeds; the others in grey", fontsize=10, x=0.01, ha="left"
    )
    curves_part.supxlabel("step", fontsize=9)
    right = results_part.subplots()
    order = sorted(results, key=lambda label: sum(after for _, after in results[label]) / len(results[label]))
    for row, label in enumerate(order):
        befores, afters = zip(*results[label], strict=True)
        before, after = sum(befores) / len(befores), sum(afters) / len(afters)
        right.plot([before, after], [row, row], color=colours[label], linewidth=1.4, alpha=0.45)
        right.scatter(befores, [row] * len(befores), facecolors="white", edgecolors=colours[label], s=26, zorder=3)
        right.scatter(afters, [row] * len(afters), color=colours[label], s=26, zorder=4)
        right.annotate(
            f"{after:.3f}", (max(afters), row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9, color=colours[label]
        )
    right.set_yticks(range(len(order)), order)
    for tick, label in zip(right.get_yticklabels(), order, strict=True):
        tick.set_color(colours[label])
        tick.set_fontweight("bold")
    right.set_ylim(-0.7, len(order) - 0.3)
    right.set_xlim(-0.02, 1.18)
    right.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    hops = f"{measure.partition('/')[0].removeprefix('hops=')}-hop " if measure and measure.startswith("hops=") else ""
    right.tick_params(labelsize=8.5)
    results_part.suptitle(f"Held-out {hops}questions, sampled: before ○, after ● (each seed)", fontsize=10, x=0.01, ha="left")
    results_part.supxlabel("exact match", fontsize=9)
    for axes, grid in (*((panel, "y") for panel in panels), (right, "x")):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, color="#e4e4e0", linewidth=0.8)
        axes.set_axisbelow(True)
    file = BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()


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


def _marks(axes: Axes, measures: Mapping[str, Mapping[str, float]], metric: str, last_step: int) -> None:
    """Before and after, on questions never trained on."""
    prefix = headline(measures)
    points = [
        (x, measures[when][f"{prefix}/{metric}"], when)
        for x, when in ((0, "before"), (last_step, "after"))
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
            f"{when} {value:.2f}",
            (place, value),
            xytext=(6 if left else -6, 8 if value < 0.9 or metric != "em" else -14),
            textcoords="offset points",
            color=ORANGE,
            fontsize=9,
            ha="left" if left else "right",
        )
