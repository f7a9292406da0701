"""Statistics of the benchmark: hand-worked values, properties, and equality with rliable."""

import importlib.util
import math
import subprocess
import sys
import types
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from searchqa_agents.bench import statistics
from searchqa_agents.bench.results import SHARES, BenchResultError, Entry, Point, ScoreRun
from searchqa_agents.bench.statistics import (
    IncompleteEntryError,
    aggregates,
    best_score,
    collapsed,
    collapses,
    curve_by_time,
    final_score,
    missing_cells,
    paired,
    performance_profile,
    probability_of_improvement,
    sample_efficiency,
    score_matrix,
    seconds_grid,
    tokens_to_reach,
)
from searchqa_envs.errors import ConfigurationError

REFERENCES = {"no_search": 0.0, "oracle": 1.0}


def run_of(task="a", seed=0, scores=None, final=0.5, status="finished", pace=1.0):
    """A run whose eighths take ``pace`` seconds of the processor each, and half of that by the clock."""
    scores = [final * share for share in SHARES] if scores is None else scores
    points = tuple(
        Point(share, place * 1000, 0, place, place * pace / 2, place * pace, max(score, 0.0), 1.0, score)
        for place, (share, score) in enumerate(zip(SHARES, scores, strict=True))
    )
    return ScoreRun("world-v1", task, 1, "mine", seed, 8000, REFERENCES, points, {}, {}, status)


def entry(*runs, label="mine"):
    return Entry("mine", "world-v1", tuple(runs), "searchqa bench", {}, label)


def entry_of(matrix, label="mine", tasks="abcdefgh", first_seed=0):
    """An entry with these final scores: rows are seeds, columns are tasks."""
    return entry(
        *(run_of(tasks[t], first_seed + s, final=float(v)) for s, row in enumerate(matrix) for t, v in enumerate(row)), label=label
    )


def without(one, *cells):
    return entry(*(run for run in one.runs if (run.task, run.seed) not in cells), label=one.label)


# -- hand-worked -----------------------------------------------------------------------------------------------------------------------------


def test_the_matrix_has_a_row_for_each_seed_and_a_column_for_each_task():
    scores = score_matrix(entry(run_of("b", 1, final=0.4), run_of("a", 0, final=0.1), run_of("b", 0, final=0.2), run_of("a", 1, final=0.3)))
    assert scores.values.tolist() == [[0.1, 0.2], [0.3, 0.4]]
    assert (scores.seeds, scores.tasks) == ((0, 1), ("a", "b"))
    assert score_matrix(entry_of([[0.1, 0.2]]), tasks=["b"]).values.tolist() == [[0.2]]


def test_aggregates_of_eight_runs_are_those_worked_by_hand():
    told = aggregates(entry_of([[0.0, 0.8], [0.1, 0.2], [0.3, 1.4], [0.4, 0.6]]), resamples=50)
    assert told.iqm.value == pytest.approx((0.2 + 0.3 + 0.4 + 0.6) / 4)  # of 8, the 2 lowest and the 2 highest are cut
    assert told.mean.value == pytest.approx(3.8 / 8)
    assert told.median.value == pytest.approx((0.2 + 0.75) / 2)  # tasks' means 0.2 and 0.75
    assert told.optimality_gap.value == pytest.approx(1 - 3.4 / 8)  # 1.4 counts as 1
    assert (told.seeds, told.tasks) == ((0, 1, 2, 3), ("a", "b"))


def test_of_six_runs_one_is_cut_at_each_end():
    told = aggregates(entry_of([[0.0, 0.1, 0.2], [0.4, 0.5, 0.9]]), resamples=10)
    assert told.iqm.value == pytest.approx((0.1 + 0.2 + 0.4 + 0.5) / 4)


def test_an_interval_of_two_seeds_is_that_of_their_four_drawings():
    told = aggregates(entry_of([[0.0], [1.0]]), resamples=4000)
    assert told.mean.interval == (0.0, 1.0)  # means 0, 1/2, 1/2, 1: a quarter of the drawings lie at each end
    profile = performance_profile(entry_of([[0.0], [1.0]]), [0.5], resamples=4000)
    assert (profile.y.tolist(), profile.low.tolist(), profile.high.tolist()) == ([0.5], [0.0], [1.0])


def test_best_is_the_highest_measured_score():
    run = run_of(scores=[0, 0.1, 0.9, 0.2, 0.2, 0.2, 0.2, 0.2, 0.5])
    assert (final_score(run), best_score(run)) == (0.5, 0.9)
    assert aggregates(entry(run), "best").mean.value == pytest.approx(0.9)
    assert aggregates(entry(run)).mean.value == pytest.approx(0.5)
    with pytest.raises(ConfigurationError, match="final, best"):
        aggregates(entry(run), "last")


def test_the_profile_counts_the_runs_above_each_threshold():
    profile = performance_profile(entry_of([[0.0, 0.5], [0.5, 1.0]]), [-1.0, 0.0, 0.25, 0.5, 0.75, 1.0], resamples=20)
    assert profile.y.tolist() == [1.0, 0.75, 0.75, 0.25, 0.25, 0.0]  # a score of just the threshold is not above it


def test_the_probability_of_improvement_is_that_of_all_pairs_with_ties_as_halves():
    mine, other = entry_of([[0.1, 0.9], [0.5, 0.9], [0.7, 0.2]]), entry_of([[0.5, 0.1], [0.2, 0.9]], first_seed=7)
    # task a: 0.1 wins neither; 0.5 ties and wins; 0.7 wins both: 3.5 of 6. task b: 0.9 wins and ties, twice; 0.2 wins one: 4 of 6
    told = probability_of_improvement(mine, other, resamples=50)
    assert told.value == pytest.approx((3.5 / 6 + 4 / 6) / 2)
    assert probability_of_improvement(other, mine, resamples=50).value == pytest.approx(1 - told.value)
    assert probability_of_improvement(mine, mine, resamples=50).value == pytest.approx(0.5)


def test_the_curve_by_share_is_the_iqm_at_each_point():
    runs = [run_of("a", seed, scores=[level * place for place in range(9)]) for seed, level in enumerate((0.0, 0.1, 0.2, 0.9))]
    curve = sample_efficiency(entry(*runs), resamples=20)
    assert curve.x.tolist() == [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1]
    assert curve.y == pytest.approx([0.15 * place for place in range(9)])  # the middle two of four


def test_the_curve_by_seconds_goes_straight_between_points_and_stays_after_the_end():
    slow, quick = run_of(seed=0, scores=[0.1 * place for place in range(9)], pace=2), run_of(seed=1, scores=[0.0] * 8 + [0.8], pace=1)
    both = entry(slow, quick)
    assert seconds_grid([both], points=3).tolist() == [0, 8, 16]
    assert seconds_grid([both], "seconds", points=3).tolist() == [0, 4, 8]
    curve = curve_by_time(both, [0, 1, 7.5, 8, 16, 20], resamples=20)
    assert curve.y == pytest.approx([0, 0.025, (0.375 + 0.4) / 2, (0.4 + 0.8) / 2, 0.8, 0.8])
    assert curve_by_time(both, [0, 0.5, 3.75], "seconds", resamples=20).y == pytest.approx(curve.y[:3])
    assert curve_by_time(both, resamples=2).x.tolist() == np.linspace(0, 16, 41).tolist()


def test_a_run_that_fell_in_no_time_falls_at_that_second():
    run = run_of(scores=[0.0, 0.4, 0, 0, 0, 0, 0, 0, 0], status="diverged")
    points = [*run.points[:2], *(Point(p.share, 2000, 0, 2, 0.5, 1.0, 0.0, 0.0, 0.0) for p in run.points[2:])]
    fallen = entry(ScoreRun(**{**vars(run), "points": tuple(points)}))
    assert curve_by_time(fallen, [0, 0.5, 0.75, 1, 2]).y == pytest.approx([0, 0.2, 0.3, 0, 0])


def test_tokens_to_a_score_are_those_at_the_first_point_that_has_it():
    runs = [run_of("a", seed, scores=[0] * place + [0.7] * (9 - place)) for seed, place in enumerate((4, 2, 8))]
    reached = tokens_to_reach(entry(*runs, run_of("a", 3, final=0.1)), 0.7)
    assert reached.tokens == {("a", 0): 4000, ("a", 1): 2000, ("a", 2): 8000, ("a", 3): None}
    assert (reached.reached, reached.runs, reached.median) == (3, 4, 6000)
    assert tokens_to_reach(entry(*runs[:2], run_of("a", 3, final=0.1)), 0.7).median == 4000
    half = tokens_to_reach(entry(*runs[:1], run_of("a", 3, final=0.1)), 0.7)
    assert (half.reached, half.median) == (1, None)
    assert tokens_to_reach(entry(run_of(final=0.1)), 0.7).median is None
    assert tokens_to_reach(entry(run_of(final=0.1)), 0.0).tokens == {("a", 0): 0}


COLLAPSES = [
    ([0, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.4], "finished", False, "just half is kept"),
    ([0, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.39], "finished", True, "less than half"),
    ([0.8, 0, 0, 0, 0, 0, 0, 0, 0.3], "finished", True, "lost what the start had"),
    ([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], "diverged", True, "diverged"),
    ([0.0] * 9, "finished", False, "never had anything"),
    ([-0.1] * 8 + [-0.5], "finished", False, "never above 0"),
    ([0.0] * 9, "diverged", True, "diverged without anything"),
]


@pytest.mark.parametrize(("scores", "status", "expected", "reason"), COLLAPSES, ids=[reason for *_, reason in COLLAPSES])
def test_a_collapse_is_a_loss_of_more_than_half_or_a_divergence(scores, status, expected, reason):
    assert collapsed(run_of(scores=scores, status=status)) is expected


def test_the_collapse_rate_is_the_share_of_runs():
    told = collapses(entry(run_of("a", 0), run_of("a", 1, status="diverged"), run_of("b", 0, scores=[0.8] + [0.1] * 8), run_of("b", 1)))
    assert (told.rate, told.cells, told.diverged, told.runs) == (0.5, (("a", 1), ("b", 0)), (("a", 1),), 4)


def test_paired_differences_are_those_worked_by_hand():
    mine, baseline = entry_of([[0.5, 0.2], [0.7, 0.2], [0.9, 0.2]]), entry_of([[0.4, 0.4], [0.5, 0.2], [0.6, 0.2]])
    told = paired(mine, baseline, resamples=200)
    assert told.tasks["a"].difference.value == pytest.approx(0.2)  # 0.1, 0.2, 0.3: deviation 0.1, t(0.975, 2) = 4.302653
    assert told.tasks["a"].difference.interval == pytest.approx((0.2 - 4.302653 * 0.1 / math.sqrt(3), 0.2 + 4.302653 * 0.1 / math.sqrt(3)))
    assert told.tasks["b"].difference.value == pytest.approx(-0.2 / 3)
    assert told.difference.value == pytest.approx((0.2 - 0.2 / 3) / 2)
    assert (told.pairs, told.wins, told.losses, told.ties) == (6, 3, 1, 2)
    assert (told.tasks["b"].pairs, told.tasks["b"].wins, told.tasks["b"].losses, told.tasks["b"].ties) == (3, 0, 1, 2)
    low, high = told.difference.interval
    assert (0.1 - 0.2) / 2 <= low < told.difference.value < high <= (0.3 - 0) / 2


def test_pairs_that_only_one_has_are_left_out_and_told():
    mine, baseline = entry_of([[0.5, 0.9], [0.7, 0.9]]), without(entry_of([[0.4, 0.1], [0.5, 0.1], [0.5, 0.1]]), ("b", 0))
    told = paired(mine, baseline, resamples=50)
    assert (told.pairs, told.alone, told.baseline_alone) == (3, (("b", 0),), (("a", 2), ("b", 2)))
    assert told.difference.value == pytest.approx((0.15 + 0.8) / 2)  # each task alike, however many pairs it has
    assert told.difference.interval is None  # task b has one pair, of which nothing can be told
    with pytest.raises(IncompleteEntryError, match="no run with the same task and seed"):
        paired(mine, entry_of([[0.5, 0.9]], first_seed=9))


# -- what is missing -------------------------------------------------------------------------------------------------------------------------


def test_missing_runs_are_told_by_task_and_seed():
    one = without(entry_of([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), ("b", 1))
    assert missing_cells(one) == [("b", 1)]
    assert missing_cells(one, ["a", "c"]) == [("c", 0), ("c", 1), ("c", 2)]
    for statistic in (score_matrix, aggregates, performance_profile, sample_efficiency, curve_by_time):
        with pytest.raises(IncompleteEntryError, match=r"mine: .*missing: b seed 1\. .*complete=False"):
            statistic(one)
    with pytest.raises(BenchResultError, match="missing: c seed 0, c seed 1, c seed 2"):
        aggregates(one, tasks=["a", "c"], complete=False)


def test_seeds_that_have_all_tasks_count_where_that_is_asked():
    one = without(entry_of([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), ("b", 1))
    scores = score_matrix(one, complete=False)
    assert (scores.values.tolist(), scores.seeds, scores.tasks) == ([[0.1, 0.2], [0.5, 0.6]], (0, 2), ("a", "b"))
    assert aggregates(one, complete=False, resamples=10) == aggregates(entry(*(run for run in one.runs if run.seed != 1)), resamples=10)


def test_improvement_is_told_on_the_same_tasks():
    mine, other = entry_of([[0.1, 0.9], [0.5, 0.9]]), entry_of([[0.2], [0.3]])
    with pytest.raises(IncompleteEntryError, match="missing: b seed 0, b seed 1"):
        probability_of_improvement(mine, other)
    assert probability_of_improvement(mine, other, complete=False, resamples=10).value == pytest.approx(0.5)
    with pytest.raises(IncompleteEntryError, match="no task in common"):
        probability_of_improvement(mine, entry_of([[0.2]], tasks="z"), complete=False)


def test_a_single_seed_or_task_gives_numbers_without_intervals_that_could_not_be_told():
    alone, baseline = entry_of([[0.25]]), entry_of([[0.5]], label="baseline")
    told = aggregates(alone)
    assert (told.iqm, told.mean, told.median, told.optimality_gap) == ((0.25, None), (0.25, None), (0.25, None), (0.75, None))
    assert probability_of_improvement(alone, baseline) == (0.0, None)
    assert paired(alone, baseline).difference == (-0.25, None)
    assert paired(alone, baseline).tasks["a"].difference == (-0.25, None)
    for curve in (performance_profile(alone), sample_efficiency(alone), curve_by_time(alone)):
        assert curve.low is None
        assert curve.high is None
        assert len(curve.x) == len(curve.y)
    assert aggregates(entry_of([[0.25, 0.75]])).iqm == (0.5, None)  # two tasks, one seed
    low, high = aggregates(entry_of([[0.25], [0.75]])).iqm.interval  # one task, two seeds
    assert (low, high) == (0.25, 0.75)
    assert probability_of_improvement(entry_of([[0.25], [0.75]]), alone).interval is None


# -- random --------------------------------------------------------------------------------------------------------------------------------


def all_numbers(one, other, seed):
    profile = performance_profile(one, resamples=40, seed=seed)
    curve = sample_efficiency(one, resamples=40, seed=seed)
    return (
        *aggregates(one, resamples=40, seed=seed).iqm.interval,
        *probability_of_improvement(one, other, resamples=40, seed=seed).interval,
        *paired(one, other, resamples=40, seed=seed).difference.interval,
        *profile.low,
        *profile.high,
        *curve.low,
        *curve.high,
    )


def test_the_same_seed_gives_the_same_intervals_and_the_global_state_is_left_alone():
    rng = np.random.default_rng(0)
    one, other = entry_of(rng.random((5, 3))), entry_of(rng.random((5, 3)))
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()
    first = all_numbers(one, other, 3)
    np.random.random(5)
    assert all_numbers(one, other, 3) == first
    assert all_numbers(one, other, 4) != first
    np.random.seed(1)
    all_numbers(one, other, 3)
    assert np.random.get_state()[1].tolist() == before


def test_intervals_do_not_depend_on_how_many_are_drawn_at_a_time(monkeypatch):
    rng = np.random.default_rng(0)
    one, other = entry_of(rng.random((5, 3))), entry_of(rng.random((4, 3)))
    whole = all_numbers(one, other, 0)
    monkeypatch.setattr(statistics, "_NUMBERS_AT_A_TIME", 100)
    assert all_numbers(one, other, 0) == whole


# -- properties ------------------------------------------------------------------------------------------------------------------------------

VALUES = st.sampled_from([-0.25, 0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.25])
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 3))
MATRICES = SHAPES.flatmap(lambda shape: arrays(np.float64, shape, elements=VALUES))
PAIRS = SHAPES.flatmap(lambda shape: st.tuples(*[arrays(np.float64, shape, elements=VALUES)] * 2))
quick = settings(max_examples=40, deadline=None)


@quick
@given(MATRICES)
def test_aggregates_lie_within_the_scores_and_within_their_intervals(matrix):
    told = aggregates(entry_of(matrix), resamples=60)
    for estimate in (told.iqm, told.mean, told.median):
        assert matrix.min() - 1e-12 <= estimate.value <= matrix.max() + 1e-12
        if estimate.interval is not None:
            low, high = estimate.interval
            assert matrix.min() - 1e-12 <= low <= high <= matrix.max() + 1e-12
    assert told.optimality_gap.value >= -1e-12
    assert (told.mean.interval is None) is (len(matrix) == 1)


def exact_iqm(values):
    """The interquartile mean in fractions, by its definition."""
    ordered = sorted(map(Fraction, values))
    cut = len(ordered) // 4
    middle = ordered[cut : len(ordered) - cut]
    return float(sum(middle) / len(middle))


@quick
@given(MATRICES)
def test_the_iqm_is_that_of_its_definition_in_aggregates_and_curves(matrix):
    one = entry_of(matrix)
    expected = exact_iqm(matrix.ravel().tolist())
    assert aggregates(one, resamples=2).iqm.value == pytest.approx(expected)
    assert sample_efficiency(one, resamples=2).y[-1] == pytest.approx(expected)
    assert curve_by_time(one, [8.0], resamples=2).y[0] == pytest.approx(expected)


@quick
@given(PAIRS)
def test_the_probability_of_improvement_is_that_of_counting_pairs(pair):
    mine, other = pair
    wins = [
        sum(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in product(mine[:, task], other[:, task])) / (len(mine) * len(other))
        for task in range(mine.shape[1])
    ]
    told = probability_of_improvement(entry_of(mine), entry_of(other), resamples=30)
    assert told.value == pytest.approx(np.mean(wins))
    assert told.interval is None or 0 <= told.interval[0] <= told.interval[1] <= 1


@quick
@given(MATRICES, st.randoms(use_true_random=False))
def test_neither_the_order_of_runs_nor_the_names_of_seeds_change_a_number(matrix, random):
    one = entry_of(matrix)
    shuffled = list(one.runs)
    random.shuffle(shuffled)
    assert aggregates(entry(*shuffled), resamples=20) == aggregates(one, resamples=20)
    rows = list(matrix)
    random.shuffle(rows)
    renamed = entry_of(rows)
    assert aggregates(renamed, resamples=2).iqm.value == pytest.approx(aggregates(one, resamples=2).iqm.value)
    assert performance_profile(renamed, resamples=2).y.tolist() == performance_profile(one, resamples=2).y.tolist()
    assert sample_efficiency(renamed, resamples=2).y == pytest.approx(sample_efficiency(one, resamples=2).y)


@quick
@given(MATRICES, st.lists(VALUES, min_size=1, max_size=6))
def test_a_profile_counts_and_never_rises(matrix, thresholds):
    x = sorted(thresholds)
    profile = performance_profile(entry_of(matrix), x, resamples=30)
    assert profile.y == pytest.approx([sum(value > threshold for value in matrix.ravel()) / matrix.size for threshold in x])
    lines = [profile.y] if profile.low is None else [profile.y, profile.low, profile.high]
    for line in lines:
        assert all(before >= after - 1e-12 for before, after in pairwise(line))
    if profile.low is not None:
        assert (profile.low <= profile.high).all()


@quick
@given(PAIRS, st.sampled_from([-0.5, 0.25, 2.0]))
def test_a_constant_more_in_each_run_is_a_constant_more_in_the_paired_difference(pair, constant):
    mine, other = pair
    before, after = (paired(entry_of(one), entry_of(other), resamples=30) for one in (mine, mine + constant))
    assert after.difference.value == pytest.approx(before.difference.value + constant)
    if before.difference.interval is not None:
        assert after.difference.interval == pytest.approx(tuple(bound + constant for bound in before.difference.interval))
    for task, difference in before.tasks.items():
        assert after.tasks[task].difference.value == pytest.approx(difference.difference.value + constant)
    assert before.difference.value == pytest.approx(float((mine - other).mean()))
    back = paired(entry_of(other), entry_of(mine), resamples=30)
    assert (back.wins, back.losses, back.ties) == (before.losses, before.wins, before.ties)


# -- rliable ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rliable_library():
    """``rliable.library`` over ``arch.bootstrap`` alone: what it cannot load beside pandas 3 are other parts of arch."""
    names = [name for name in sys.modules if name.split(".")[0] == "arch" or name == "rliable.library"]
    before = {name: sys.modules.pop(name) for name in names}
    bare = types.ModuleType("arch")
    bare.__path__ = list(importlib.util.find_spec("arch").submodule_search_locations)
    sys.modules["arch"] = bare
    import absl.logging
    import rliable.library

    # Whoever sets up logging later closes all handlers, and absl's would close what stands for stderr during this test.
    absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__
    yield rliable.library
    for name in [name for name in sys.modules if name.split(".")[0] == "arch" or name == "rliable.library"]:
        del sys.modules[name]
    sys.modules.update(before)


def test_intervals_of_aggregates_are_those_of_rliable(rliable_library):
    from rliable import metrics

    matrix = np.random.default_rng(2).random((5, 3)) * 1.2
    told = aggregates(entry_of(matrix), resamples=200, seed=11)
    for name, function in (
        ("iqm", metrics.aggregate_iqm),
        ("mean", metrics.aggregate_mean),
        ("median", metrics.aggregate_median),
        ("optimality_gap", metrics.aggregate_optimality_gap),
    ):
        np.random.seed(11)
        points, intervals = rliable_library.get_interval_estimates({"m": matrix}, lambda x, f=function: np.array([f(x)]), reps=200)
        assert getattr(told, name).value == pytest.approx(points["m"][0])
        assert getattr(told, name).interval == pytest.approx(tuple(intervals["m"][:, 0]))


def test_the_interval_of_the_probability_of_improvement_is_that_of_rliable(rliable_library):
    from rliable import metrics

    rng = np.random.default_rng(3)
    mine, other = rng.integers(0, 5, (5, 2)) / 4, rng.integers(0, 5, (4, 2)) / 4
    told = probability_of_improvement(entry_of(mine), entry_of(other), resamples=100, seed=11)
    np.random.seed(11)
    points, intervals = rliable_library.get_interval_estimates({"m": (mine, other)}, metrics.probability_of_improvement, reps=100)
    assert told.value == pytest.approx(points["m"])
    assert told.interval == pytest.approx(tuple(np.ravel(intervals["m"])))


def test_profiles_and_their_bands_are_those_of_rliable(rliable_library):
    matrix = np.random.default_rng(4).random((5, 3))
    x = np.linspace(0, 1, 7)
    told = performance_profile(entry_of(matrix), x, resamples=100, seed=11)
    np.random.seed(11)
    profiles, bands = rliable_library.create_performance_profile({"m": matrix}, x, reps=100)
    assert told.y == pytest.approx(profiles["m"])
    assert np.array([told.low, told.high]) == pytest.approx(bands["m"])


@pytest.mark.filterwarnings("ignore:random_state is deprecated")
def test_rliable_does_not_draw_from_the_state_that_it_is_given(rliable_library):
    """Why the bootstrap is not rliable's: where this fails, rliable has been mended."""
    matrix = np.random.default_rng(2).random((5, 3))
    both = [
        rliable_library.get_interval_estimates(
            {"m": matrix}, lambda x: np.array([x.mean()]), reps=50, random_state=np.random.RandomState(0)
        )[1]["m"].tolist()
        for _ in range(2)
    ]
    assert both[0] != both[1]


def test_rliable_is_loaded_only_when_needed_and_asked_for_by_its_extra(monkeypatch):
    code = "import sys, searchqa_agents.bench.statistics; print([name for name in ('rliable', 'scipy', 'pandas', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    monkeypatch.setitem(sys.modules, "rliable.metrics", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'searchqa-gym\[bench\]'"):
        aggregates(entry_of([[0.5]]))
