"""ZeroSearch's curriculum: the published values, its ends, and what it refuses."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_retrievers import RetrieverError
from searchqa_retrievers.curriculum import Curriculum


@pytest.mark.parametrize(("step", "probability"), [(20, 0.024), (50, 0.068), (101, 0.166), (152, 0.304), (203, 0.5)])
def test_the_published_values_from_0_to_a_half_in_203_steps(step, probability):
    assert round(Curriculum(0, 0.5).probability(step, 203), 3) == probability


@pytest.mark.parametrize(
    ("start", "end", "half_way", "last"),
    [(0, 0.75, 0.25, 0.75), (0, 0.25, 0.25 / 3, 0.25), (0.25, 0.5, 0.25 + 0.25 / 3, 0.5)],
    ids=["Qwen-7B", "Qwen-3B", "Llama-3B"],
)
def test_the_published_settings_by_policy(start, end, half_way, last):
    """Half way, 4^(1/2) = 2, and a third of the way is gone."""
    curriculum = Curriculum(start, end)
    assert curriculum.probability(100, 200) == pytest.approx(half_way)
    assert curriculum.probability(200, 200) == pytest.approx(last)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 100), st.integers(1, 10_000), st.data())
def test_it_goes_from_start_to_end_without_turning_back(start, end, base, total, data):
    curriculum = Curriculum(start, end, base)
    steps = sorted(data.draw(st.lists(st.integers(0, total), min_size=2, max_size=6)))
    values = [curriculum.probability(step, total) for step in steps]
    assert all(min(start, end) - 1e-9 <= value <= max(start, end) + 1e-9 for value in values)
    assert all((b - a) * (1 if end >= start else -1) >= -1e-9 for a, b in pairwise(values))
    assert curriculum.probability(total, total) == pytest.approx(end)
    assert curriculum.probability(2 * total, total) == pytest.approx(end)


def test_a_base_of_one_is_a_straight_line():
    assert Curriculum(0.2, 0.6, base=1).probability(25, 100) == pytest.approx(0.3)


def test_before_the_first_step_it_is_the_start_and_fixed_noise_needs_no_progress():
    assert Curriculum(0.25, 0.5).probability(0, 0) == Curriculum(0.25, 0.5).probability(0, 100) == 0.25
    fixed = Curriculum(0.5, 0.5)
    assert fixed.fixed
    assert fixed.probability(7, 0) == fixed.probability(0, 0) == 0.5
    assert not Curriculum(0, 0.5).fixed


def test_a_curriculum_of_an_unknown_number_of_steps_is_refused():
    with pytest.raises(RetrieverError, match="number of all steps, got 3 of 0"):
        Curriculum(0, 0.5).probability(3, 0)


@pytest.mark.parametrize(
    "noise", [{"start": -0.1}, {"end": 1.1}, {"base": 0}, {"start": float("nan")}, {"end": True}, {"base": float("inf")}, {"b": 4}]
)
def test_what_is_out_of_range_is_refused(noise):
    with pytest.raises(RetrieverError):
        Curriculum.of(noise)


def test_a_configuration_may_leave_out_what_is_usual():
    assert Curriculum.of(None) == Curriculum(0.0, 0.0, 4.0)
    assert Curriculum.of({"end": 0.5}) == Curriculum(0.0, 0.5, 4.0)
