"""The analyzer gives the terms of bm25s.tokenize for every text."""

import bm25s
import pytest
import Stemmer
from hypothesis import example, given
from hypothesis import strategies as st

from searchqa_retrievers import RetrieverError
from searchqa_retrievers.analysis import ENGLISH_STOP_WORDS, MAX_QUERY_CHARACTERS, Analyzer
from searchqa_retrievers.testing import HOSTILE_QUERIES

words = st.sampled_from(
    [
        "The",
        "running",
        "runs",
        "CITY's",
        "of",
        "naïve",
        "ﬁnance",
        "İstanbul",
        "Straße",
        "北京",
        "x",
        "_a",
        "snake_case",
        "3.14",
        "U.S.A.",
        "don't",
    ]
)
texts = st.one_of(st.text(), st.lists(words).map(" ".join), st.text(alphabet=st.characters(max_codepoint=127)))


def reference(text, stopwords="en", stemmer="english"):
    stem = None if stemmer is None else Stemmer.Stemmer(stemmer)
    return bm25s.tokenize([text], stopwords=stopwords, stemmer=stem, return_ids=False, show_progress=False)[0]


@given(texts)
@example("\ud800 lone \udfff")
@example("e\u0301te\u0301 \x1c\x1d\x85\u2028words\u00a0here")
def test_terms_are_those_of_bm25s(text):
    assert Analyzer().terms(text) == reference(text)


@given(texts)
def test_terms_are_those_of_bm25s_with_other_settings(text):
    assert Analyzer(None, None).terms(text) == reference(text, stopwords=None, stemmer=None)
    assert Analyzer(["the", "city"], "porter").terms(text) == reference(text, stopwords=["the", "city"], stemmer="porter")
    assert Analyzer("de", "german").terms(text) == reference(text, stopwords="de", stemmer="german")


@pytest.mark.parametrize("text", [text[:MAX_QUERY_CHARACTERS] for text in HOSTILE_QUERIES])
def test_terms_of_hostile_texts_are_those_of_bm25s(text):
    assert Analyzer().terms(text) == reference(text)


@given(st.lists(texts))
def test_corpus_terms_are_those_of_each_text(documents):
    analyzed = Analyzer().analyze_corpus(documents)
    for number, text in enumerate(documents):
        terms = [analyzed.terms[term] for term in analyzed.flat[analyzed.documents == number]]
        assert terms == Analyzer().terms(text)
        assert analyzed.lengths[number] == len(terms)
    assert len(analyzed.lengths) == len(documents)
    assert len(set(analyzed.terms)) == len(analyzed.terms)


@given(texts)
def test_query_terms_are_those_of_the_text(text):
    analyzer = Analyzer()
    terms_of = analyzer.query_terms()
    for _ in range(2):  # the second time from memory
        assert terms_of(text) == tuple(analyzer.terms(text))


def test_query_is_cut_after_its_limit():
    terms_of = Analyzer().query_terms()
    long = "x" * (MAX_QUERY_CHARACTERS - 6)
    assert terms_of(long + " river") == (long, "river")
    assert terms_of("x" + long + " river") == ("x" + long, "rive")


def test_memo_of_words_stays_bounded(monkeypatch):
    monkeypatch.setattr("searchqa_retrievers.analysis._MEMO_ENTRIES", 10)
    analyzer = Analyzer()
    for number in range(100):
        assert analyzer.terms(f"word{number} rivers") == [f"word{number}", "river"]
        assert len(analyzer._memo) <= 10
    analyzer.terms("long" * 1000)
    assert all(len(word) <= 64 for word in analyzer._memo)


def test_english_stop_words_are_those_of_bm25s():
    assert set(ENGLISH_STOP_WORDS) == set(bm25s.stopwords.STOPWORDS_EN)


def test_unknown_language_is_an_error():
    with pytest.raises(RetrieverError, match="klingon"):
        Analyzer("klingon")
    with pytest.raises(RetrieverError, match="klingon"):
        Analyzer("en", "klingon")
