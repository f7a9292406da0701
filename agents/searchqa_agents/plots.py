"""The learning-curve picture of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREY = "#1f5fbf", "#c8571b", "#6b6f75"

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
    losses = [line for line in lines if line["phase"] in ("warmup", "sft")]
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
    ):
        points = [(offset + line["step"], line[name]) for line in lines if line["phase"] == phase and name in line]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, label=label)
            offset = points[-1][0]
    axes.set_yscale("log")
    axes.set_title("Before reinforcement learning: loss per token", fontsize=10, loc="left")
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
