"""Statistics of rows: hand-worked values, properties, and equality with independent implementations."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from searchqa_agents import eval_statistics
from searchqa_agents.eval_statistics import (
    DifferentQuestionsError,
    majority_vote,
    mean_over_sets,
    paired,
    pass_at_k,
    sign_flip_p_value,
    summarise_rows,
)
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.normalise import normalise_r1_searcher


def row(question, sample=0, answer="a", set_name="s", groups=None, turns=(), golden_answers=("a",), **metrics):
    return {
        "set": set_name,
        "id": str(question),
        "sample": sample,
        "question": f"{question}?",
        "golden_answers": list(golden_answers),
        "answer": answer,
        "groups": groups or {},
        "metrics": metrics,
        "turns": [{"action": "search", "content": "", "passages": []} | one for one in turns],
    }


def rows_of(values, **settings):
    return [row(i, em=float(value), **settings) for i, value in enumerate(values)]


# -- summary ---------------------------------------------------------------------------------------------------------------------------------


def test_samples_of_a_question_are_averaged_before_questions_are():
    rows = [row("x", 0, em=1.0), row("x", 1, em=1.0), row("x", 2, em=1.0), row("y", 0, em=0.0)]
    summary = summarise_rows(rows)
    assert summary.metrics == {"em": 0.5}
    assert summary.counts == {"questions": 2, "episodes": 4, "samples": 1}


def test_a_metric_that_a_question_does_not_define_is_averaged_over_the_others():
    summary = summarise_rows([row("x", em=1.0, title_recall_all=0.25), row("y", em=0.0), row("z", em=0.0, title_recall_all=0.75)])
    assert summary.metrics == {"em": pytest.approx(1 / 3), "title_recall_all": 0.5}
    assert summary.defined == {"em": 3, "title_recall_all": 2}
    low, high = summary.intervals["title_recall_all"]
    assert (low, high) == (0.25, 0.75)


def test_one_question_in_two_sets_is_two_questions():
    assert summarise_rows([row("x", em=1.0), row("x", set_name="t", em=0.0)]).counts["questions"] == 2


def test_groups_by_type_and_hops():
    rows = [
        row(1, em=1.0, groups={"type": "bridge", "hops": 10}),
        row(2, em=0.0, groups={"type": "bridge", "hops": 2}),
        row(3, em=1.0, groups={"type": "comparison", "hops": 2}),
        row(3, sample=1, em=0.0, groups={"type": "comparison", "hops": 2}),
        row(4, em=0.0),
    ]
    groups = summarise_rows(rows).groups
    assert list(groups) == ["type=bridge", "type=comparison", "hops=2", "hops=10"]
    assert groups["type=bridge"].metrics == {"em": 0.5}
    assert groups["type=bridge"].intervals == {"em": (0.0, 1.0)}
    assert (groups["hops=2"].metrics["em"], groups["hops=2"].questions, groups["hops=2"].episodes) == (0.25, 2, 3)
    assert list(summarise_rows(rows, group_by=()).groups) == []


def test_recall_by_turn_by_hand():
    def turns(*recalls):
        return [{"title_recall": recall} for recall in recalls]

    rows = [
        row("x", 0, turns=turns(0.5, 1.0)),
        row("x", 1, turns=turns(0.0)),  # ended: stays at 0
        row("y", 0, turns=turns(0.0, 0.0, 1.0)),
        row("z", 0, turns=[{}, {}, {}, {}]),  # does not know its titles
    ]
    assert summarise_rows(rows).title_recall_by_turn == (0.125, 0.25, 0.75)
    assert summarise_rows(rows[3:]).title_recall_by_turn == ()


def test_latency_by_hand_of_the_rows_alone():
    rows = rows_of(range(11))
    times = [{"set": "s", "id": str(i), "sample": 0, "seconds": {"model": 0.75 * i, "search": 0.25 * i}} for i in range(20)]
    latency = summarise_rows(rows, times).latency
    assert latency == pytest.approx({"mean": 5, "p50": 5, "p90": 9, "p99": 9.9, "mean_model": 3.75, "mean_search": 1.25})
    assert summarise_rows(rows).latency == {}
    for i, one in enumerate(times):
        one["seconds"]["wall"] = 10.0 * i  # no part of the sum
    walls = {"mean_wall": 50, "p50_wall": 50, "p90_wall": 90, "p99_wall": 99}
    assert summarise_rows(rows, times).latency == pytest.approx(latency | walls)


def test_nothing_cannot_be_summarised():
    for summarise in (summarise_rows, mean_over_sets):
        with pytest.raises(ConfigurationError, match="at least one row"):
            summarise([])


def test_one_sample_has_no_pass_at_and_no_majority():
    summary = summarise_rows(rows_of([0, 1]))
    assert (summary.pass_at, summary.pass_at_intervals, summary.majority, summary.majority_intervals) == ({}, {}, {}, {})


def test_pass_at_and_majority_by_hand():
    rows = [
        row("x", 0, "Paris", em=1.0, f1=1.0),
        row("x", 1, "Rome", em=0.0, f1=0.0),
        row("x", 2, "the rome!", em=0.0, f1=0.0),
        row("y", 0, None, em=0.0, f1=0.0),
        row("y", 1, "Bonn", em=1.0, f1=0.5),
        row("y", 2, None, em=0.0, f1=0.0),
    ]
    summary = summarise_rows(rows)
    assert summary.pass_at == {"em": {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3), 3: 1.0}}
    assert summary.majority == {"em": 0.5, "f1": 0.25}
    assert summary.majority_intervals["em"] == (0.0, 1.0)
    assert summary.pass_at_intervals["em"][3] == (1.0, 1.0)
    assert summary.metrics["em"] == summary.pass_at["em"][1]


def test_pass_at_goes_to_the_fewest_samples_of_a_question():
    rows = [row("x", i, em=0.0) for i in range(6)] + [row("y", i, em=1.0) for i in range(5)]
    assert list(summarise_rows(rows).pass_at["em"]) == [1, 2, 4, 5]


def test_a_judge_that_has_not_judged_all_has_no_majority():
    rows = [row("x", 0, em=0.0, judge=1.0), row("x", 1, em=0.0)]
    assert list(summarise_rows(rows).majority) == ["em"]


values = st.lists(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=3), min_size=1, max_size=6)


@given(values=values, order=st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_means_do_not_depend_on_the_order_of_rows(values, order):
    rows = [row(i, k, answer=str(one), em=one) for i, own in enumerate(values) for k, one in enumerate(own)]
    mixed = rows[:]
    order.shuffle(mixed)
    first, second = summarise_rows(rows, resamples=2), summarise_rows(mixed, resamples=2)
    assert first.metrics["em"] == pytest.approx(second.metrics["em"])
    assert first.metrics["em"] == pytest.approx(np.mean([np.mean(own) for own in values]))
    assert first.majority == pytest.approx(second.majority)


# -- sets ------------------------------------------------------------------------------------------------------------------------------------


def test_sets_weigh_alike_in_their_mean():
    rows = [*rows_of([1, 1, 1, 0], set_name="nq"), *rows_of([0, 0], set_name="hotpotqa")]
    assert summarise_rows(rows).metrics["em"] == 0.5
    macro = mean_over_sets(rows)
    assert macro.metrics == {"em": 0.375}
    assert macro.counts == {"questions": 6, "episodes": 6, "samples": 1}
    low, high = macro.intervals["em"]
    own_low, own_high = summarise_rows(rows[:4]).intervals["em"]
    assert (low, high) == (own_low / 2, own_high / 2)  # the other set is 0 however it is drawn
    assert macro.groups == {}


def test_what_one_set_does_not_define_has_no_mean_over_sets():
    rows = [row(1, set_name="nq", em=1.0), row(1, set_name="hotpotqa", em=0.0, title_recall_all=1.0)]
    assert mean_over_sets(rows).metrics == mean_over_sets(rows[::-1]).metrics == {"em": 0.5}


def test_pass_at_and_majority_over_sets():
    rows = [row(1, k, set_name=name, em=float(k < right)) for name, right in (("nq", 1), ("hotpotqa", 2)) for k in range(2)]
    macro = mean_over_sets(rows)
    assert macro.pass_at == {"em": {1: 0.75, 2: 1.0}}
    assert macro.majority == {"em": 1.0}


@pytest.mark.parametrize("sizes", [(200, 50), (100, 100)])
def test_the_interval_of_a_mean_over_sets_draws_each_set_by_itself(sizes):
    rows = [one for name, size in zip("ab", sizes, strict=True) for one in rows_of([i % 2 for i in range(size)], set_name=name)]
    low, high = mean_over_sets(rows).intervals["em"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(sum(0.25 / size for size in sizes)) / 2, rel=0.1)


# -- samples ---------------------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(numbers):
    n, c, k = numbers
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_of_many_samples_is_exact():
    assert pass_at_k(1000, 1, 10) == 0.01
    assert pass_at_k(2000, 2000, 1) == 1.0
    assert pass_at_k(2000, 0, 2000) == 0.0


@pytest.mark.parametrize("numbers", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_impossible_counts_are_refused(numbers):
    with pytest.raises(ConfigurationError, match="needs 0 <= c <= n"):
        pass_at_k(*numbers)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["Rome"], 0),
        (["Rome", "Paris", "paris."], 1),  # one form
        (["Rome", "Paris"], 0),  # a tie: the first given
        (["Rome", "Paris", "the Paris", "ROME"], 0),
        ([None, None, None, "Rome"], 3),  # no answer has no vote
        (["", " \n", "Rome"], 2),  # nor has a blank one
        ([None, None], 0),
        (["", None], 0),
        (["The", "a", "Rome"], 2),  # nothing is left of the first two
        ([None, "The", " ", "a"], 1),  # but where there is no other
        (["U.S.", "us", "u s"], 0),
        (["u s", "U.S.", "us"], 1),
    ],
)
def test_majority_votes(answers, winner):
    assert majority_vote(answers) == winner


def test_a_majority_by_another_normaliser():
    assert majority_vote(["us", "u s", "U.S."], normalise_r1_searcher) == 1


def test_nobody_cannot_vote():
    with pytest.raises(ConfigurationError, match="at least one answer"):
        majority_vote([])


# -- intervals -------------------------------------------------------------------------------------------------------------------------------


def table(*columns):
    return [
        row(i, **{f"m{m}": value for m, value in enumerate(one) if value is not None}) for i, one in enumerate(zip(*columns, strict=True))
    ]


def test_intervals_are_those_of_a_plain_loop_over_resamples():
    rng = np.random.default_rng(5)
    full = rng.random(30)
    partly = [None if i % 3 else float(value) for i, value in enumerate(rng.random(30))]
    summary = summarise_rows(table(full, partly), resamples=200, seed=7)
    draws = np.random.default_rng(7).integers(30, size=(200, 30))
    for name, column in (("m0", full), ("m1", partly)):
        means = [np.mean([column[i] for i in draw if column[i] is not None]) for draw in draws]
        assert summary.intervals[name] == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))


def test_intervals_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    data = np.random.default_rng(2).exponential(size=300)
    theirs = stats.bootstrap((data,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    low, high = summarise_rows(table(data), resamples=10_000).intervals["m0"]
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.1 * (theirs.high - theirs.low))


def test_memory_is_bounded_and_changes_no_interval(monkeypatch):
    rows = table(np.random.default_rng(0).random(40), [1.0, None] * 20)
    whole = summarise_rows(rows)
    monkeypatch.setattr(eval_statistics, "_NUMBERS_AT_A_TIME", 130)  # three resamples at a time
    parts = summarise_rows(rows)
    assert parts.intervals == {name: pytest.approx(interval, rel=1e-12) for name, interval in whole.intervals.items()}


def test_equal_samples_tell_nothing_new():
    rows = rows_of([0, 1] * 20)
    more = [{**one, "sample": k} for one in rows for k in range(4)]
    assert summarise_rows(rows).intervals == summarise_rows(more).intervals


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        low, high = summarise_rows(table(rng.normal(size=60)), resamples=200).intervals["m0"]
        held += low <= 0 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_the_same_seed_gives_the_same_intervals_and_another_seed_others():
    rows = table(np.random.default_rng(0).random(40))
    assert summarise_rows(rows) == summarise_rows(rows)
    assert summarise_rows(rows, seed=1).intervals != summarise_rows(rows).intervals


# -- two runs --------------------------------------------------------------------------------------------------------------------------------


def test_a_comparison_by_hand():
    found = paired(rows_of([1, 0, 0, 0, 1]), rows_of([1, 1, 1, 1, 0]), "em")
    assert (found.metric, found.questions, found.better, found.worse, found.equal) == ("em", 5, 3, 1, 1)
    assert (found.first, found.second, found.difference) == (pytest.approx(0.4), pytest.approx(0.8), pytest.approx(0.4))
    assert found.p_value == 10 / 16  # sums 4, 2, -2, -4 of four signs: 1 + 4 + 4 + 1 of 16
    low, high = found.interval
    assert -0.4 <= low <= 0.4 <= high <= 1


def test_samples_are_averaged_before_runs_are_compared():
    a = [row("x", k, em=float(k == 0)) for k in range(4)]
    b = [row("x", k, em=float(k < 2)) for k in range(2)]
    assert paired(a, b, "em").difference == 0.75


def test_the_order_of_rows_and_the_sign_do_not_matter():
    rng = np.random.default_rng(0)
    a, b = rows_of(rng.integers(0, 2, 100)), rows_of(rng.integers(0, 2, 100))
    forth, back = paired(a, b, "em"), paired(b, a[::-1], "em")
    assert forth.difference == -back.difference
    assert forth.p_value == back.p_value
    assert (forth.better, forth.worse, forth.equal) == (back.worse, back.better, back.equal)
    assert paired(a, a, "em")[4:7] == (0.0, (0.0, 0.0), 1.0)


def test_other_questions_are_refused_and_counted():
    a, b = rows_of([1, 0, 1, 0]), rows_of([1, 0, 1])
    with pytest.raises(
        DifferentQuestionsError, match=r"1 of 4 questions with em are the first run's only and 0 of 3 .*'3' of s.* the 3 in common"
    ):
        paired(a, b, "em")
    assert paired(a, b, "em", common=True).questions == 3


@pytest.mark.parametrize("change", [{"set_name": "t"}, {"golden_answers": ["b"]}])
def test_an_id_in_another_set_or_with_other_answers_is_another_question(change):
    a, b = [row(1, em=1.0), row(2, em=1.0)], [row(1, em=0.0), row(2, em=0.0, **change)]
    with pytest.raises(DifferentQuestionsError, match="1 of 2 questions"):
        paired(a, b, "em")
    assert paired(a, b, "em", common=True).questions == 1


def test_runs_without_a_common_question_cannot_be_compared():
    with pytest.raises(DifferentQuestionsError, match="no question in common"):
        paired([row(1, em=1.0)], [row(2, em=1.0)], "em", common=True)


def test_a_metric_that_a_run_does_not_have_is_named():
    with pytest.raises(ConfigurationError, match=r"the second run has no 'judge', only em"):
        paired([row(1, em=1.0, judge=1.0)], [row(1, em=1.0)], "judge")


def test_a_question_for_which_one_run_alone_defines_the_metric_is_refused():
    a = [row(1, judge=1.0), row(2, judge=1.0), row(3, em=0.0)]
    b = [row(1, judge=0.0), row(2, em=1.0), row(3, em=0.0)]
    with pytest.raises(DifferentQuestionsError, match="for 1 of 3 questions only one"):
        paired(a, b, "judge")
    assert paired(a, b, "judge", common=True).questions == 1
    assert paired(a[::2], b[::2], "judge").questions == 1  # neither defines it for the third


@pytest.mark.parametrize(
    ("differences", "p_value"),
    [([0.0, 0.0], 1.0), ([], 1.0), ([1.0], 1.0), ([1.0, 1.0, 1.0], 0.25), ([1.0, 1.0, -1.0], 1.0), ([2.0, 1.0, 1.0, 0.0, 0.0], 0.25)],
)
def test_exact_p_values_by_hand(differences, p_value):
    assert sign_flip_p_value(np.array(differences)) == p_value


few = st.lists(st.integers(-3, 3).map(lambda number: number / 3), min_size=2, max_size=9)


@given(differences=few)
@settings(max_examples=40, deadline=None)
def test_exact_p_values_agree_with_scipy(differences):
    stats = pytest.importorskip("scipy.stats")
    assume(any(differences))

    def statistic(a, b, axis):
        return np.round(np.mean(a - b, axis=axis), 9)

    data = (np.array(differences), np.zeros(len(differences)))
    theirs = stats.permutation_test(data, statistic, permutation_type="samples", vectorized=True, n_resamples=np.inf)
    assert sign_flip_p_value(np.array(differences)) == pytest.approx(float(theirs.pvalue))


def test_drawn_p_values_agree_with_exact_ones_and_are_never_zero():
    differences = np.random.default_rng(4).normal(0.4, 1.0, 12)
    exact = sign_flip_p_value(differences)
    drawn = sign_flip_p_value(differences, permutations=4000)
    assert 2**12 > 4000
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000))
    assert sign_flip_p_value(np.ones(100)) == 1 / 10_001


def test_drawn_p_values_of_zeros_and_ones_agree_with_the_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    differences = np.array([1.0] * 120 + [-1.0] * 90 + [0.0] * 5000)
    exact = float(stats.binomtest(120, 210).pvalue)
    assert sign_flip_p_value(differences) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000))


def test_p_values_of_many_questions_are_near_those_of_the_normal_law(monkeypatch):
    differences = np.random.default_rng(6).normal(0.02, 1.0, 5000)
    z = abs(differences.sum()) / math.sqrt((differences**2).sum())
    normal = 2 * (1 - NormalDist().cdf(z))
    whole = sign_flip_p_value(differences)
    assert whole == pytest.approx(normal, abs=0.02)
    monkeypatch.setattr(eval_statistics, "_NUMBERS_AT_A_TIME", 60_000)
    assert sign_flip_p_value(differences) == pytest.approx(whole, abs=0.02)


def test_runs_that_do_not_differ_have_p_values_spread_evenly():
    rng = np.random.default_rng(1)
    found = [sign_flip_p_value(rng.normal(size=20), permutations=199) for _ in range(400)]
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.035)
    assert np.mean(found) == pytest.approx(0.5, abs=0.06)
