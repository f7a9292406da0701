"""Pictures of a comparison of algorithms: final scores, sample efficiency, performance profiles, score by CPU seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from searchqa_agents.bench.statistics import (
    Curve,
    Estimate,
    curve_by_time,
    final_score,
    performance_profile,
    sample_efficiency,
    seconds_grid,
)
from searchqa_agents.bench.table import Comparison, Standing
from searchqa_agents.plots import GREY, ORANGE, PALETTE

BANDED = 4
"""Up to this many curves in a panel all have a band; of more, only the marked ones and the baseline, and the others would be hidden behind them."""


class Dot(NamedTuple):
    """A value with its 95% interval, and the single values that it summarises."""

    estimate: Estimate
    singles: Sequence[float] = ()


class Picture(NamedTuple):
    """A PNG: the name of its file, its title and what it shows."""

    file: str
    title: str
    caption: str
    png: bytes


class Look(NamedTuple):
    """How an algorithm is drawn, the same in all pictures."""

    colour: str
    mine: bool
    baseline: bool

    @property
    def stands_out(self) -> bool:
        """Whether it is one of those that the comparison is about."""
        return self.mine or self.baseline


def looks(names: Sequence[str], mine: Sequence[str], baseline: str | None) -> dict[str, Look]:
    """Orange for the first of ``mine``, grey for the baseline, other colours for others, in alphabetical order of their names."""
    rest = [colour for colour in PALETTE if colour not in (ORANGE, "#5b6770")]
    fixed = ({} if baseline is None else {baseline: GREY}) | ({mine[0]: ORANGE} if mine else {})
    others = sorted(name for name in names if name not in fixed)
    colours = fixed | {name: rest[i % len(rest)] for i, name in enumerate(others)}
    return {name: Look(colours[name], name in mine, name == baseline) for name in names}


def pictures(comparison: Comparison) -> list[Picture]:
    """All pictures of a comparison. Entries that have no seed with all tasks are only in the panels of single tasks."""
    mine = [one.name for one in comparison.standings if one.mine]
    look = looks([one.name for one in comparison.standings], mine, comparison.baseline)
    placed = [one for one in comparison.standings if one.final is not None]
    bands = "Bands are 95% intervals, bootstrapped over seeds within each task."
    if len(placed) > BANDED:
        bands += " With so many curves only those of the compared algorithm and of the baseline are drawn."
    overall, single = _efficiency(comparison, placed)
    scores = {one.name: Dot(one.final.iqm) for one in placed if one.final is not None}
    grid = seconds_grid([one.entry for one in placed]) if placed else None
    tasks, resamples = comparison.tasks, comparison.resamples

    def of_all(curve: Callable[..., Curve], *more: object) -> dict[str, Curve]:
        return {one.name: curve(one.entry, *more, tasks=tasks, complete=False, resamples=resamples) for one in placed}

    return [
        Picture(
            "final_scores.png",
            "Final scores",
            "Left: interquartile mean over all tasks and seeds, with its 95% interval. Others: the mean of each task, its 95% interval, and each seed (○).",
            final_scores(scores, {task: _of_task(comparison, task) for task in tasks}, look),
        ),
        Picture(
            "sample_efficiency.png",
            "Sample efficiency",
            f"Interquartile mean of the scores on held-out questions as the budget of sampled tokens is spent. {bands}",
            sample_efficiency_curves(overall, single, look),
        ),
        Picture(
            "performance_profiles.png",
            "Performance profiles",
            f"Share of runs, over all tasks and seeds, whose final score is above a threshold. Higher is better. {bands}",
            profiles(of_all(performance_profile), look),
        ),
        Picture(
            "cpu_seconds.png",
            "Score by CPU seconds",
            f"Interquartile mean over all runs by the CPU seconds of training; a run that is over keeps its score. Of different machines, seconds cannot be "
            f"compared. {bands}",
            by_cpu_seconds(of_all(curve_by_time, grid), look),
        ),
    ]


def _efficiency(comparison: Comparison, placed: Sequence[Standing]) -> tuple[dict[str, Curve], dict[str, dict[str, Curve]]]:
    """Over all tasks by share of the budget, and for each task by tokens."""
    resamples = comparison.resamples
    overall = {one.name: sample_efficiency(one.entry, tasks=comparison.tasks, complete=False, resamples=resamples) for one in placed}
    single: dict[str, dict[str, Curve]] = {}
    for task in comparison.tasks:
        for one in comparison.standings:
            budgets = [run.budget for run in one.entry.runs if run.task == task]
            if budgets:
                curve = sample_efficiency(one.entry, tasks=[task], complete=False, resamples=resamples)
                single.setdefault(task, {})[one.name] = replace(curve, x=curve.x * budgets[0])
    return overall, single


def _of_task(comparison: Comparison, task: str) -> dict[str, Dot]:
    return {
        one.name: Dot(one.tasks[task], [final_score(run) for run in one.entry.runs if run.task == task])
        for one in comparison.standings
        if task in one.tasks
    }


def final_scores(overall: Mapping[str, Dot], tasks: Mapping[str, Mapping[str, Dot]], look: Mapping[str, Look]) -> bytes:
    """A row for each algorithm, the best above: the IQM over all runs with its interval, then for each task the mean and each seed. A PNG.

    Parameters
    ----------
    overall
        Algorithm -> IQM of the final scores.
    tasks
        Task -> algorithm -> mean of the final scores, with those of the seeds.
    """
    names = list(overall)[::-1]
    panels = {"IQM over all tasks, 95% interval": overall, **{f"{title}: mean and seeds": own for title, own in tasks.items()}}
    figure = Figure(figsize=(3.0 + 2.7 * len(panels), 1.5 + 0.36 * len(names)), dpi=140, layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True, width_ratios=(1.35, *[1] * len(tasks)))[0]
    for place, (axes, (title, own)) in enumerate(zip(all_axes, panels.items(), strict=True)):
        for row, name in enumerate(names):
            if name in own:
                _dot(axes, row, own[name], look[name], labelled=place == 0)
        axes.set_title(_plain(title), fontsize=9.5, loc="left")
        axes.set_yticks(range(len(names)), [_plain(name) for name in names])
        axes.tick_params(labelsize=8.5)
        _frame(axes, grid="x")
        axes.xaxis.set_major_locator(MaxNLocator(5))
    for tick, name in zip(all_axes[0].get_yticklabels(), names, strict=True):
        tick.set_color(look[name].colour)
        tick.set_fontweight("bold" if look[name].mine else "normal")
    all_axes[0].set_ylim(-0.6, len(names) - 0.4)
    figure.supxlabel("score: 0 is without search, 1 the oracle", fontsize=9)
    return _png(figure)


def sample_efficiency_curves(overall: Mapping[str, Curve], tasks: Mapping[str, Mapping[str, Curve]], look: Mapping[str, Look]) -> bytes:
    """Scores as the budget is spent: a panel over all tasks, by share of the budget, and one for each task, by tokens. A PNG.

    Parameters
    ----------
    overall
        Algorithm -> IQM over all runs, ``x`` a share of the budget from 0 to 1.
    tasks
        Task -> algorithm -> IQM over its seeds, ``x`` in tokens that the policy sampled.
    """
    panels = len(tasks) + 1
    columns = panels if panels <= 2 else 2
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(5.6 * columns, 3.7 * rows + 0.5), dpi=140, layout="constrained")
    flat = list(figure.subplots(rows, columns, squeeze=False).flatten())
    _curves(flat[0], overall, look)
    flat[0].set_title("All tasks: IQM", fontsize=10, loc="left")
    flat[0].set_xlabel("share of the budget", fontsize=9)
    flat[0].xaxis.set_major_formatter(PercentFormatter(1.0))
    for axes, (title, own) in zip(flat[1:], tasks.items(), strict=False):
        _curves(axes, own, look)
        axes.set_title(_plain(title), fontsize=10, loc="left")
        axes.set_xlabel("tokens sampled by the policy", fontsize=9)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _thousands(value)))
    for axes in flat[panels:]:
        axes.set_visible(False)
    for axes in flat[0:panels:columns]:
        axes.set_ylabel("score", fontsize=9)
    _legend(figure, overall, look)
    return _png(figure)


def profiles(curves: Mapping[str, Curve], look: Mapping[str, Look]) -> bytes:
    """Performance profiles: the share of runs whose final score is above a threshold, for all thresholds. A PNG."""
    figure = Figure(figsize=(7.4, 4.5), dpi=140, layout="constrained")
    axes = figure.subplots()
    _curves(axes, curves, look, steps=True)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("threshold: a final score", fontsize=9)
    axes.set_ylabel("share of runs above it", fontsize=9)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(figure, curves, look)
    return _png(figure)


def by_cpu_seconds(curves: Mapping[str, Curve], look: Mapping[str, Look]) -> bytes:
    """The IQM over all runs by the CPU seconds that training took. A PNG."""
    figure = Figure(figsize=(7.4, 4.5), dpi=140, layout="constrained")
    axes = figure.subplots()
    _curves(axes, curves, look)
    axes.set_xlabel("CPU seconds of training, a run", fontsize=9)
    axes.set_ylabel("score, IQM", fontsize=9)
    axes.set_xlim(left=0)
    _legend(figure, curves, look)
    return _png(figure)


def _dot(axes: Axes, row: int, dot: Dot, look: Look, labelled: bool) -> None:
    value, interval = dot.estimate
    if interval is not None:
        axes.plot(interval, [row, row], color=look.colour, linewidth=6, alpha=0.35, solid_capstyle="butt")
    axes.scatter(dot.singles, [row] * len(dot.singles), facecolors="white", edgecolors=look.colour, linewidths=0.9, s=18, zorder=3)
    axes.scatter([value], [row], color=look.colour, marker="D" if look.mine else "o", s=30, zorder=4)
    if labelled:
        axes.annotate(f"{value:.2f}", (value, row), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8, color=look.colour)


def _curves(axes: Axes, curves: Mapping[str, Curve], look: Mapping[str, Look], steps: bool = False) -> None:
    drawn_as = "steps-post" if steps else "default"
    for name in sorted(curves, key=lambda name: (look[name].mine, look[name].baseline)):  # what matters most on top
        curve, own = curves[name], look[name]
        if curve.low is not None and curve.high is not None and (own.stands_out or len(curves) <= BANDED):
            axes.fill_between(curve.x, curve.low, curve.high, color=own.colour, alpha=0.2, linewidth=0, step="post" if steps else None)
        axes.plot(
            curve.x,
            curve.y,
            color=own.colour,
            linewidth=2.4 if own.mine else 1.7 if own.baseline else 1.2,
            linestyle="--" if own.baseline else "-",
            drawstyle=drawn_as,
        )
    _frame(axes, grid="y")


def _frame(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if grid == "x" else "y", color="#e4e4e0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5)


def _legend(figure: Figure, names: Mapping[str, object], look: Mapping[str, Look]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=look[name].colour, linewidth=2.4 if look[name].mine else 1.5, linestyle="--" if look[name].baseline else "-")
        for name in names
    ]
    labels = [f"{_plain(name)}{' (baseline)' if look[name].baseline else ''}" for name in names]
    legend = figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8.5, alignment="left")
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_fontweight("bold" if look[name].mine else "normal")


def _plain(text: str) -> str:
    """Text that is drawn as it is: not as a formula, and not so long that it squeezes what it labels."""
    cut = text if len(text) <= 32 else f"{text[:31]}…"
    return cut.replace("$", r"\$")


def _thousands(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def _png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()
