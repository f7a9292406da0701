"""What refuses two stamps, what is only told, and that nothing is taken to be equal because it is not known."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_agents.comparable import Difference, notes, refusals, shown

CORPUS = "a" * 64
BM25: dict[str, Any] = {
    "retriever": "bm25",
    "backend": "memory",
    "k1": 1.5,
    "b": 0.75,
    "method": "lucene",
    "analyzer": {"version": 1, "stopwords": "en", "stemmer": "english"},
    "corpus_sha256": CORPUS,
    "passages": 100,
}
STAMP: dict[str, Any] = {
    "dataset": "hotpotqa",
    "split": "dev",
    "revision": "1",
    "questions": 847,
    "questions_sha256": "b" * 64,
    "passages": 100,
    "corpus_sha256": CORPUS,
    "retriever": BM25,
    "top_k": 3,
    "dialect": "search-r1",
    "prompt": "published",
    "reward": {"name": "em", "parts": []},
    "tokenizer": "byte",
    "max_turns": 5,
    "max_segment_tokens": 2048,
    "max_observation_tokens": 2048,
    "max_context_tokens": 20480,
    "forced_answer": False,
    "searchqa_gym": "0.1.0",
    "seed": 0,
    "threads": 1,
    "packages": {"numpy": "2.0"},
    "commit": "c" * 40,
    "python": "3.11.7",
    "command": "searchqa eval",
    "agent": {"kind": "lm", "checkpoint": "one", "temperature": 0.0, "lm": {"kind": "server", "url": "http://127.0.0.1:1"}},
    "temperature": 0.0,
    "samples": 1,
    "questions_played": 100,
    "question_list": {"kind": "fixed", "count": 100, "sha256": "d" * 64},
    "scoring_version": 1,
}
PUBLISHED: dict[str, Any] = {
    "dataset": "hotpotqa",
    "split": "dev",
    "questions_played": 100,
    "described_questions": "a sample",
    "corpus": "wiki-18",
    "retriever": "E5",
    "top_k": 3,
    "metrics": ["em"],
}


def changed(path: str, value: Any, stamp: dict[str, Any] = STAMP) -> dict[str, Any]:
    """A copy with one place changed; None removes it."""
    made = copy.deepcopy(stamp)
    *parents, last = path.split(".")
    place = made
    for name in parents:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return made


def keys(differences: list[Difference]) -> list[str]:
    return [one.key for one in differences]


@pytest.mark.parametrize("stamp", [STAMP, PUBLISHED, {**STAMP, "retriever": {"retriever": "none"}}])
def test_a_stamp_agrees_with_itself(stamp: dict[str, Any]) -> None:
    assert refusals(stamp, copy.deepcopy(stamp)) == notes(stamp, copy.deepcopy(stamp)) == []


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        ("dataset", "musique", "dataset"),
        ("split", "train", "split"),
        ("revision", "2", "revision"),
        ("questions_sha256", "e" * 64, "questions_sha256"),
        ("questions_played", 50, "questions_played"),
        ("question_list.sha256", "e" * 64, "question_list.sha256"),
        ("retriever.corpus_sha256", "e" * 64, "corpus"),
        ("retriever.k1", 0.9, "retriever.k1"),
        ("retriever.method", "robertson", "retriever.method"),
        ("retriever.analyzer.stemmer", "porter", "retriever.analyzer.stemmer"),
        ("retriever", {"retriever": "dense", "dimension": 8, "corpus_sha256": CORPUS}, "retriever"),
        ("top_k", 5, "top_k"),
        ("search_controls", {"top_k": 5}, "search_controls"),
        ("told_the_answer", True, "told_the_answer"),
        ("samples", 4, "samples"),
        ("scoring_version", 2, "scoring_version"),
        ("of_a_data_set_of_ones_own", 1, None),
        ("max_turns", 4, "max_turns"),
        ("max_context_tokens", 99, "max_context_tokens"),
        ("forced_answer", True, "forced_answer"),
    ],
)
def test_what_decides_a_number_refuses(path: str, value: Any, key: str | None) -> None:
    other = changed(path, value)
    here = STAMP if key else {**STAMP, "of_a_data_set_of_ones_own": 2}
    assert keys(refusals(here, other)) == [key or path]
    assert notes(here, other) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("agent.checkpoint", "two"),
        ("dialect", "r1-searcher"),
        ("prompt", "bare"),
        ("reward.name", "f1"),
        ("tokenizer", "world-1"),
        ("temperature", 1.0),
        ("seed", 1),
        ("searchqa_gym", "0.2.0"),
        ("commit", "f" * 40),
    ],
)
def test_what_is_compared_or_chance_is_only_told(path: str, value: Any) -> None:
    other = changed(path, value)
    assert refusals(STAMP, other) == []
    assert [key.partition(".")[0] for key in keys(notes(STAMP, other))] == [path.partition(".")[0]]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("threads", 8),
        ("packages.numpy", "2.1"),
        ("python", "3.13"),
        ("command", "another"),
        ("agent.lm.url", "http://127.0.0.1:2"),
        ("question_list.kind", "file"),
        ("passages", 101),
    ],
)
def test_what_changes_no_number_is_not_told(path: str, value: Any) -> None:
    assert refusals(STAMP, changed(path, value)) == notes(STAMP, changed(path, value)) == []


@pytest.mark.parametrize(("path", "value"), [("agent.kind", "search_once"), ("dialect", "r1-searcher")])
def test_budgets_of_different_systems_are_told_and_refuse_nothing(path: str, value: str) -> None:
    other = changed("max_turns", 9, changed(path, value))
    assert refusals(STAMP, other) == []
    assert set(keys(notes(STAMP, other))) == {path.partition(".")[0], "max_turns"}


def test_budgets_of_two_checkpoints_of_one_system_refuse() -> None:
    other = changed("max_turns", 9, changed("agent.checkpoint", "two"))
    assert keys(refusals(STAMP, other)) == ["max_turns"]
    assert keys(notes(STAMP, other)) == ["agent.checkpoint"]


def test_baselines_are_told_apart_by_their_method() -> None:
    def baseline(method: str, turns: int) -> dict[str, Any]:
        return {**STAMP, "max_turns": turns, "agent": {"kind": "baseline", "method": method, "options": {}}}

    assert refusals(baseline("rag", 2), baseline("ircot", 11)) == []
    assert notes(baseline("rag", 2), baseline("ircot", 2)) == [Difference("agent", "rag", "ircot")]
    assert notes(STAMP, baseline("ircot", 5))[0] == Difference("agent", "lm", "ircot")
    assert keys(refusals(baseline("ircot", 9), baseline("ircot", 11))) == ["max_turns"]


def test_a_setting_that_is_off_is_not_one_that_is_unknown() -> None:
    off = copy.deepcopy(STAMP)
    off["retriever"]["analyzer"]["stemmer"] = None
    assert refusals(STAMP, off) == [Difference("retriever.analyzer.stemmer", "english", "none")]
    unknown = changed("retriever.analyzer.stemmer", None)
    assert refusals(STAMP, unknown) == [Difference("retriever.analyzer.stemmer", "english", None, unknown=True)]


@pytest.mark.parametrize("path", ["dataset", "top_k", "retriever", "questions_sha256", "questions_played", "question_list"])
def test_what_matters_most_refuses_where_one_does_not_know_it(path: str) -> None:
    found = refusals(STAMP, changed(path, None))
    assert (found[0].key, found[0].unknown) == (path, True)
    assert "not known" in found[0].told()


@pytest.mark.parametrize("path", ["revision", "samples", "scoring_version"])
def test_what_else_is_not_known_is_told(path: str) -> None:
    assert refusals(STAMP, changed(path, None)) == []
    assert notes(STAMP, changed(path, None)) == [Difference(path, STAMP[path], None, unknown=True)]


def test_a_search_server_is_what_is_behind_it() -> None:
    def over(url: str, server: Any) -> dict[str, Any]:
        stamp = changed("corpus_sha256", None)
        stamp["retriever"] = {"retriever": "http", "format": "searchqa", "url": url, "server": server}
        return stamp

    assert refusals(STAMP, over("http://one", BM25)) == []
    assert refusals(over("http://one", BM25), over("http://two", BM25)) == []
    assert keys(refusals(STAMP, over("http://one", {**BM25, "k1": 0.9}))) == ["retriever.k1"]
    assert keys(refusals(STAMP, over("http://one", {**BM25, "corpus_sha256": "e" * 64}))) == ["corpus"]
    silent = over("http://one", None)
    assert [(one.key, one.unknown) for one in refusals(silent, silent)] == [("corpus", True)]
    away = over("http://one", "not reached")
    assert [(one.key, one.unknown) for one in refusals(away, away)] == [("corpus", True), ("retriever.server", True)]


def test_passages_of_every_part_of_a_combined_retriever_count() -> None:
    def hybrid(second: str) -> dict[str, Any]:
        parts = [BM25, {"retriever": "dense", "corpus_sha256": second}]
        return {**STAMP, "retriever": {"retriever": "hybrid", "retrievers": parts}}

    assert refusals(hybrid(CORPUS), hybrid(CORPUS)) == []
    assert keys(refusals(hybrid(CORPUS), hybrid("e" * 64))) == ["corpus"]


def test_words_of_a_table_in_print_are_not_taken_for_settings() -> None:
    found = refusals({**STAMP, "metrics": ["em", "f1"]}, PUBLISHED)
    assert {one.key: one.unknown for one in found} == {"questions": True, "corpus": True, "retriever": True}
    other_count = {**PUBLISHED, "questions_played": 7405}
    assert {one.key: one.unknown for one in refusals(STAMP, other_count)} == {"questions": False, "corpus": True, "retriever": True}


def test_rows_in_print_are_compared_by_their_words() -> None:
    other = {**PUBLISHED, "corpus": "the web", "retriever": "Google", "top_k": 5, "described_questions": "another", "metrics": ["sub_em"]}
    other["printed_as"] = {"sub_em": "EM"}
    found = refusals(PUBLISHED, other)
    assert keys(found) == ["questions", "corpus", "retriever", "metric", "top_k"]
    assert not any(one.unknown for one in found)
    assert found[3].b == "sub_em (printed as EM)"


SEARCHING_NOTHING: dict[str, Any] = {**STAMP, "retriever": {"retriever": "none"}, "top_k": 9, "search_controls": {"top_k": 5}}


@pytest.mark.parametrize("none", [SEARCHING_NOTHING, {**SEARCHING_NOTHING, "retriever": "none"}])
def test_where_one_searches_nothing_the_search_of_the_other_is_told(none: dict[str, Any]) -> None:
    assert refusals(STAMP, none) == refusals(none, STAMP) == []
    assert notes(STAMP, none) == [Difference("retriever", "bm25", "none")]
    silent = changed("retriever", None)
    assert refusals(silent, none) == []
    assert notes(silent, none) == [Difference("retriever", None, "none", unknown=True)]
    assert keys(refusals(STAMP, {**none, "told_the_answer": True, "split": "train"})) == ["split", "told_the_answer"]


def test_two_that_search_nothing_agree_whatever_they_would_have_searched() -> None:
    other = {**SEARCHING_NOTHING, "retriever": "none", "top_k": 3, "corpus_sha256": "e" * 64}
    assert refusals(SEARCHING_NOTHING, other) == notes(SEARCHING_NOTHING, other) == []


def test_who_judged_matters() -> None:
    judged = {**STAMP, "judge": {"model": "one", "url": "http://a", "prompt": {"name": "p"}}}
    assert refusals(judged, {**judged, "judge": {**judged["judge"], "url": "http://b"}}) == []
    assert keys(refusals(judged, {**judged, "judge": {**judged["judge"], "model": "two"}})) == ["judge.model"]
    assert keys(refusals(judged, STAMP)) == ["judge"]


@pytest.mark.parametrize(
    ("key", "by", "allowed"),
    [
        ("retriever.k1", ["retriever.k1"], True),
        ("retriever.k1", ["retriever"], True),
        ("retriever.k1", ["retriever.b"], False),
        ("retriever", ["retriever.k1"], False),
        ("top_k", ["top"], False),
        ("top_k", ["seed", "all"], True),
        ("question_list.sha256", ["questions"], True),
        ("questions_played", ["data"], True),
        ("max_turns", ["budgets"], True),
        ("top_k", [], False),
    ],
)
def test_what_allows_a_difference(key: str, by: list[str], allowed: bool) -> None:
    assert Difference(key, 1, 2).allowed(by) is allowed


def test_values_are_told_short() -> None:
    assert shown("c" * 40 + "+changes") == f"{'c' * 12}+changes"
    assert Difference("top_k", 3, 5).told("b") == "top_k: 3 and 5 (b)"
    assert Difference("corpus", "x", "y", unknown=True).told() == "corpus: x and y (cannot be compared)"


PLACES = st.sampled_from([*STAMP, "retriever.k1", "retriever.analyzer.version", "agent.kind", "reward.name", "judge", "told_the_answer"])
VALUES = st.one_of(st.integers(0, 3), st.sampled_from(["x", "y"]), st.just({"kind": "x", "k1": 2}))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(PLACES, VALUES, max_size=4), st.dictionaries(PLACES, VALUES, max_size=4))
def test_the_order_of_two_stamps_is_no_matter(first: dict[str, Any], second: dict[str, Any]) -> None:
    def made(changes: dict[str, Any]) -> dict[str, Any]:
        stamp = copy.deepcopy(STAMP)
        for path, value in changes.items():
            parent, _, last = path.rpartition(".")
            place = stamp
            for name in filter(None, parent.split(".")):
                place = place.get(name, {}) if isinstance(place, dict) else {}
            if isinstance(place, dict):
                place[last] = copy.deepcopy(value)
        return stamp

    a, b = made(first), made(second)
    for compare in (refusals, notes):
        there, back = compare(a, b), compare(b, a)
        assert {(one.key, str(one.a), str(one.b), one.unknown) for one in there} == {
            (one.key, str(one.b), str(one.a), one.unknown) for one in back
        }
