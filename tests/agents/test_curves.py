"""Panels of curves: each measure where it belongs, none invented, alike ones once, long ones thinned out."""

from __future__ import annotations

import math
from pathlib import Path

from searchqa_agents.curves import FURTHER, MOST_POINTS, SUPERVISED, TRAINING, Mark, Series, panels_of_runs, run_panels
from searchqa_agents.trainer import SEARCH_FIGURES


def lines(*values: float, key: str = "charts/em", **rest: object) -> list[dict[str, object]]:
    return [{"phase": "train", "step": i + 1, key: value, **rest} for i, value in enumerate(values)]


def test_a_run_has_the_panels_that_it_has_measures_for_and_the_others_on_demand() -> None:
    panels = run_panels(lines(0.1, 0.2, **{"losses/policy_loss": 1.0, "odd": 2.0, "stage": ""}), {})
    assert [(panel.title, panel.more) for panel in panels] == [("Exact match and reward", False), ("Policy loss", False), ("odd", True)]
    assert panels[0].series == [Series("exact match on training questions", [1.0, 2.0], [0.1, 0.2])]


def test_measures_that_are_alike_are_one_curve_under_both_names() -> None:
    own = [line | {"charts/episodic_return": line["charts/em"]} for line in lines(0.1, 0.2)]
    assert [series.name for series in run_panels(own, {})[0].series] == ["exact match on training questions, reward"]
    own[1]["charts/episodic_return"] = 0.3
    assert [series.name for series in run_panels(own, {})[0].series] == ["exact match on training questions", "reward"]


def test_held_out_measures_stand_before_between_and_after() -> None:
    own = lines(0.1, 0.2, 0.3)
    for line, stage in zip(own, "aab", strict=True):
        line["stage"] = stage
    measures = {
        "before": {"hops=1/sampled/em": 0.9, "hops=2/sampled/em": 0.0},
        "after a": {"hops=2/sampled/em": 0.5},
        "after": {"hops=2/sampled/em": 1.0},
    }
    panel = run_panels(own, measures)[0]
    assert panel.marks == [Mark(0, 0.0, "before"), Mark(2, 0.5, "after a"), Mark(3, 1.0, "after")]
    assert panel.marks_name == "2-hop held-out questions, sampled"
    assert panel.switches == [(2, "a", "b")]


def test_a_panel_says_that_its_marks_are_of_other_questions_than_its_curve() -> None:
    measures = {"before": {"hops=1/sampled/em": 0.9, "hops=2/sampled/em": 0.0}}
    marks = "Marks: held-out questions of 2 hops only."
    notes = {hops: run_panels(lines(0.1, 0.2), measures, hops)[0].note for hops in ((), (1, 2), (2,))}
    assert notes == {(): f"Curve: training questions. {marks}", (1, 2): f"Curve: training questions (1 and 2 hops). {marks}", (2,): ""}
    assert run_panels(lines(0.1), {"before": {"sampled/em": 0.5}}, (1, 2))[0].note == ""


def test_a_kl_divergence_of_nothing_but_rounding_is_under_more() -> None:
    for values, hidden in (((-3e-7, 9e-7), True), ((1e-9, 2e-6), False)):
        [panel] = run_panels(lines(*values, key="losses/approx_kl"), {})
        assert (panel.title, panel.more, panel.note) == ("KL divergence", hidden, "All below 0.000001." if hidden else "")


def test_what_is_under_more_has_a_title_and_the_name_of_its_measure() -> None:
    [panel] = run_panels(lines(0.5, key="charts/groups_with_spread"), {})
    assert (panel.title, panel.series[0].name) == ("Groups whose rewards differ, share", "charts/groups_with_spread")


def test_the_docs_explain_every_measure_that_a_page_knows() -> None:
    page = (Path(__file__).parents[2] / "docs" / "watching.md").read_text(encoding="utf-8")
    known = {*FURTHER, *SEARCH_FIGURES, *(key for names in TRAINING.values() for key in names), *(key for _, key, _ in SUPERVISED)}
    assert not [key for key in known if f"`{key}`" not in page]


def test_supervised_phases_follow_each_other_on_a_logarithmic_scale() -> None:
    own = [
        *({"phase": "warmup", "step": i, "losses/warmup_loss": 4.0} for i in (1, 2)),
        *({"phase": "sft", "step": i, "losses/sft_loss": 2.0} for i in (5, 10)),
    ]
    [panel] = run_panels(own, {})
    assert panel.logarithmic
    assert [(series.name, series.x) for series in panel.series] == [("induction warm-up", [1.0, 2.0]), ("fine-tuning", [7.0, 12.0])]


def test_what_is_no_number_is_a_gap() -> None:
    [panel] = run_panels(lines(0.1, math.nan, math.inf, 0.2), {})
    assert panel.series[0].y == [0.1, None, None, 0.2]


def test_a_long_run_is_thinned_out_to_its_last_step_and_says_so() -> None:
    [panel] = run_panels(lines(*(i / 3000 for i in range(2500))), {})
    [series] = panel.series
    assert len(series.x) <= MOST_POINTS
    assert series.x[-1] == 2500
    assert {b - a for a, b in zip(series.x, series.x[1:], strict=False)} == {3.0}
    assert panel.note == "Drawn at one step in 3."


def test_several_runs_have_a_curve_each_in_the_panel_of_a_measure() -> None:
    panels = panels_of_runs({"a": lines(0.1, 0.2), "b": lines(0.3, 0.4, **{"charts/episodic_return": 1.0})})
    assert [(panel.title, panel.more, [series.name for series in panel.series]) for panel in panels] == [
        ("Exact match and reward: exact match on training questions", False, ["a", "b"]),
        ("Exact match and reward: reward", True, ["b"]),
    ]


def test_a_run_without_lines_has_no_panels() -> None:
    assert run_panels([], {}) == panels_of_runs({}) == []
