"""Pictures of a comparison: an algorithm has one colour in all of them, and odd values are drawn too."""

from __future__ import annotations

import numpy as np
import pytest

from searchqa_agents.bench.pictures import Dot, by_cpu_seconds, final_scores, looks, profiles, sample_efficiency_curves
from searchqa_agents.bench.statistics import Curve, Estimate
from searchqa_agents.plots import GREY, ORANGE

NAMES = [f"algorithm {i}" for i in range(10)]


def test_mine_is_orange_the_baseline_grey_and_no_other_is() -> None:
    look = looks(NAMES, ["algorithm 7"], "algorithm 2")
    assert look["algorithm 7"].colour == ORANGE
    assert look["algorithm 2"].colour == GREY
    assert len({one.colour for one in look.values()}) == len(NAMES)


def test_a_colour_does_not_depend_on_the_rank() -> None:
    assert looks(NAMES, ["algorithm 7"], "algorithm 2") == looks(NAMES[::-1], ["algorithm 7"], "algorithm 2")


@pytest.mark.parametrize("count", [1, 6])
def test_curves_without_bands_dots_without_intervals_and_odd_names_are_drawn(count: int) -> None:
    x = np.linspace(0, 1, 9)
    names = ["$\\frac{1}$ a very long name that would squeeze what it labels", *NAMES[: count - 1]]
    look = looks(names, names[:1], None)
    curves = {name: Curve(x, x - 0.5, None, None) for name in names}
    dots = {name: Dot(Estimate(-0.2, None), (0.1,)) for name in names}
    drawn = (
        final_scores(dots, {"a_task$": dots}, look),
        sample_efficiency_curves(curves, {"a_task$": curves}, look),
        profiles(curves, look),
        by_cpu_seconds(curves, look),
    )
    assert all(png.startswith(b"\x89PNG") for png in drawn)
