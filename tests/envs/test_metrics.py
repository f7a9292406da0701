"""Metrics of answers and searches, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_envs import metrics
from searchqa_envs.episode_types import Action, EpisodeView, Turn
from searchqa_envs.questions import Question
from searchqa_retrievers.types import Passage

TWO_THIRDS = pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("prediction", "gold", "em", "sub_em", "cover_em", "f1", "f1_r1_searcher", "reason"),
    [
        ("Paris", ["Paris"], 1, 1, 1, 1, 1, "equal"),
        ("the PARIS.", ["Paris"], 1, 1, 1, 1, 1, "equal once normalised"),
        ("Paris, France", ["Paris"], 0, 1, 1, TWO_THIRDS, TWO_THIRDS, "precision 1/2, recall 1: 2·½·1/1½"),
        ("Paris", ["Paris, France"], 0, 0, 0, TWO_THIRDS, TWO_THIRDS, "the other way round, gold is not covered"),
        ("Rome", ["Paris", "Rome"], 1, 1, 1, 1, 1, "the best golden answer counts"),
        ("Rome", ["Paris"], 0, 0, 0, 0, 0, "nothing in common"),
        ("France Paris", ["Paris, France"], 0, 0, 1, 1, 1, "order matters to a substring, not to tokens"),
        ("Norway", ["no"], 0, 1, 0, 0, 0, "a substring of characters, not a token"),
        ("US", ["U.S."], 1, 1, 0, 1, 0, "R1-Searcher blanks the points: u s"),
        ("O'Brien", ["O’Brien"], 0, 0, 1, 0, 1, "typographic quote: only R1-Searcher knows it"),
        ("yes", ["yes it is"], 0, 0, 0, pytest.approx(0.5), 0, "R1-Searcher: a closed answer is right or wrong"),
        ("yes it is", ["yes"], 0, 1, 1, pytest.approx(0.5), 0, "the same with a closed golden answer"),
        ("True", ["yes"], 0, 0, 1, 0, 1, "R1-Searcher: True means yes"),
        ("noanswer", ["noanswer"], 1, 1, 1, 1, 1, "closed and equal"),
        ("a b b", ["b b c"], 0, 0, 0, pytest.approx(4 / 5), pytest.approx(4 / 5), "bags: b counts twice, article gone: 2·2/(2+3)"),
        ("b b b", ["b"], 0, 1, 1, pytest.approx(1 / 2), pytest.approx(1 / 2), "repeating does not help: 2·1/(3+1)"),
        ("東京", ["東京"], 1, 1, 1, 1, 1, "any script"),
        ("ÉCOLE", ["école"], 1, 1, 1, 1, 1, "lower case of any script"),
        ("", ["Paris"], 0, 0, 0, 0, 0, "blank answer"),
        (" \n", ["Paris"], 0, 0, 0, 0, 0, "blank answer"),
        ("", ["", "The"], 0, 0, 0, 0, 0, "a blank answer is never right"),
        ("Paris", ["The"], 0, 0, 0, 0, 0, "a golden answer that normalises to nothing is not in everything"),
        ("A", ["a"], 1, 1, 1, 1, 1, "such an answer can still be given"),
        ("Paris", [], 0, 0, 0, 0, 0, "no golden answer"),
    ],
)
def test_answer_metrics(
    prediction: str, gold: list[str], em: float, sub_em: float, cover_em: float, f1: float, f1_r1_searcher: float, reason: str
) -> None:
    assert metrics.em(prediction, gold) == em, reason
    assert metrics.sub_em(prediction, gold) == sub_em, reason
    assert metrics.cover_em(prediction, gold) == cover_em, reason
    assert metrics.f1(prediction, gold) == f1, reason
    assert metrics.f1_r1_searcher(prediction, gold) == f1_r1_searcher, reason


@pytest.mark.parametrize(
    ("prediction", "gold", "em_r1_searcher", "sub_em_r1_searcher", "cover_em_squad", "reason"),
    [
        ("the PARIS.", ["Paris"], 1, 1, 1, "equal once normalised"),
        ("U S", ["U.S."], 1, 1, 0, "R1-Searcher blanks the points: u s; SQuAD deletes them: us"),
        ("US", ["U.S."], 0, 0, 1, "the other way round"),
        ("the U.S. Army", ["US"], 0, 0, 1, "u s army has no us; SQuAD: us army"),
        ("O'Brien", ["O’Brien"], 1, 1, 0, "typographic quote: only R1-Searcher knows it"),
        ("snake case", ["snake_case"], 1, 1, 0, "an underscore is a blank: only for R1-Searcher"),
        ("True", ["yes"], 1, 1, 0, "R1-Searcher: True means yes"),
        ("France Paris", ["Paris, France"], 0, 0, 1, "order matters to a substring, not to tokens"),
        ("Norway", ["no"], 0, 1, 0, "a substring of characters, not a token"),
        ("Rome", ["Paris", "Rome"], 1, 1, 1, "the best golden answer counts"),
        ("", ["", "The"], 0, 0, 0, "a blank answer is never right"),
        ("Paris", ["!!!"], 0, 0, 0, "a golden answer that normalises to nothing is not in everything"),
        ("---", ["!!!"], 1, 1, 1, "such an answer can still be given"),
        ("Paris", [], 0, 0, 0, "no golden answer"),
    ],
)
def test_answer_metrics_after_the_other_normalisation(
    prediction: str, gold: list[str], em_r1_searcher: float, sub_em_r1_searcher: float, cover_em_squad: float, reason: str
) -> None:
    assert metrics.em_r1_searcher(prediction, gold) == em_r1_searcher, reason
    assert metrics.sub_em_r1_searcher(prediction, gold) == sub_em_r1_searcher, reason
    assert metrics.cover_em_squad(prediction, gold) == cover_em_squad, reason


@given(st.text(), st.lists(st.text(), max_size=3))
def test_an_exact_match_is_also_every_looser_match(prediction: str, gold: list[str]) -> None:
    if metrics.em(prediction, gold):
        assert metrics.sub_em(prediction, gold) == metrics.f1(prediction, gold) == metrics.cover_em_squad(prediction, gold) == 1
    if metrics.em_r1_searcher(prediction, gold):
        looser = (metrics.sub_em_r1_searcher, metrics.f1_r1_searcher, metrics.cover_em)
        assert all(metric(prediction, gold) == 1 for metric in looser)
    for value in (metrics.f1(prediction, gold), metrics.f1_r1_searcher(prediction, gold)):
        assert 0 <= value <= 1


@given(st.text(), st.lists(st.text(), max_size=3), st.text())
def test_more_golden_answers_never_lower_a_metric(prediction: str, gold: list[str], more: str) -> None:
    for metric in (metrics.em, metrics.sub_em, metrics.cover_em, metrics.f1, metrics.f1_r1_searcher):
        assert metric(prediction, [*gold, more]) >= metric(prediction, gold)


def passage(title: str) -> Passage:
    return Passage(id=title, title=title, text=f"Text about {title}.")


def search(query: str, *titles: str, searched: bool = True) -> Turn:
    return Turn(
        f"<search>{query}</search>", Action("search", query), searched, tuple(map(passage, titles)), "<information>...</information>"
    )


ANSWER = Turn("<answer>Paris</answer>", Action("answer", "Paris"), False, (), "")
INVALID = Turn("hm", Action("invalid", ""), False, (), "\nMy previous action is invalid. ...\n")
QUESTION = Question("q1", "Which?", ("Paris",), {"supporting_titles": ["Paris", "France", "Seine"]})


def episode(*turns: Turn, question: Question = QUESTION, answer: str | None = None) -> EpisodeView:
    return EpisodeView(question, "Which?\n", turns, answer, "search-r1", True)


@pytest.mark.parametrize(
    ("titles", "supporting", "expected", "reason"),
    [
        (["Paris", "Rome"], ["Paris", "France", "Seine"], (0, 1, 1 / 3), "one of three"),
        (["Seine", "Paris", "France"], ["Paris", "France", "Seine"], (1, 1, 1), "all, in any order"),
        (["Paris", "Paris"], ["Paris", "France"], (0, 1, 1 / 2), "a title found twice counts once"),
        (["Paris"], ["Paris", "Paris"], (1, 1, 1), "a title wanted twice counts once"),
        (["paris"], ["Paris"], (0, 0, 0), "titles as they are"),
        ([], ["Paris"], (0, 0, 0), "nothing retrieved"),
    ],
)
def test_title_recall(titles: list[str], supporting: list[str], expected: tuple[float, float, float], reason: str) -> None:
    assert tuple(metrics.title_recall(titles, supporting).values()) == expected, reason


def test_metrics_of_an_episode() -> None:
    turns = (search("a", "Paris", "Rome"), INVALID, search("b", "Seine", "Paris"), ANSWER)
    assert metrics.episode_metrics(episode(*turns, answer="Paris, France")) == {
        "em": 0.0,
        "f1": TWO_THIRDS,
        "cover_em": 1.0,
        "sub_em": 1.0,
        "searches": 2.0,
        "invalid_turns": 1.0,
        "title_recall_all": 0.0,
        "title_recall_any": 1.0,
        "title_recall_mean": TWO_THIRDS,  # Paris and Seine of three, over both searches
    }


def test_metrics_without_an_answer_and_without_supporting_titles() -> None:
    question = replace(QUESTION, metadata={})
    turns = (search("a", "Paris"), search("b", searched=False))
    expected = {"em": 0.0, "f1": 0.0, "cover_em": 0.0, "sub_em": 0.0, "searches": 1.0, "invalid_turns": 0.0}
    assert metrics.episode_metrics(episode(*turns, question=question)) == expected  # the second search was not executed


def test_every_metric_is_a_float() -> None:
    assert {type(value) for value in metrics.episode_metrics(episode(search("a", "Paris"), ANSWER, answer="Paris")).values()} == {float}
