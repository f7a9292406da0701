"""BM25Retriever: scores of bm25s bit for bit, a fixed order among equals, and no difference between its two ways of searching."""

import pickle
import random
import subprocess
import sys
import threading

import bm25s
import numpy as np
import pytest
import Stemmer
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_retrievers import BM25Retriever, Corpus, RetrieverError, SearchRequest
from searchqa_retrievers.analysis import ANALYZER_VERSION
from searchqa_retrievers.testing import RetrieverContract

VOCABULARY = ["river", "rivers", "city", "naïve", "mountain", "lake", "the", "of", "who", "2001", "alpha", "beta", "gamma", "delta"]


def made_up_corpus(passages, seed=0, words=30, vocabulary=3000):
    """Passages of Zipf-distributed made-up words; several passages are equal but for their id, so that there are ties."""
    generator = np.random.default_rng(seed)
    texts = []
    for number in range(passages):
        if number % 10 == 9:
            texts.append(texts[-1])
        else:
            numbers = generator.zipf(1.2, size=generator.integers(0, words)) % vocabulary
            texts.append(" ".join(f"w{n}" for n in numbers.tolist()))
    return Corpus.from_passages((f"{(number * 7919) % passages}", "", text) for number, text in enumerate(texts))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    corpus = made_up_corpus(6000)
    return BM25Retriever(corpus, cache_dir=tmp_path_factory.mktemp("indexes"))


def reference_index(corpus, **settings):
    index = bm25s.BM25(**settings)
    texts = [corpus.contents(i) for i in range(len(corpus))]
    stemmer = Stemmer.Stemmer("english")
    index.index(bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, show_progress=False), show_progress=False)
    return index


def reference_scores(index, query):
    stemmer = Stemmer.Stemmer("english")
    terms = bm25s.tokenize([query], stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)[0]
    ids = [number for number in index.get_tokens_ids(terms) if number < len(index.scores["indptr"]) - 1]
    return index.get_scores_from_ids(ids)


def expected_hits(corpus, scores, top_k):
    """All passages sorted by (score descending, id ascending), without those of score 0."""
    order = sorted(range(len(corpus)), key=lambda i: (-scores[i], corpus.ids[i]))[:top_k]
    return [(corpus.ids[i], float(scores[i])) for i in order if scores[i] > 0]


def found(hits):
    return [(hit.passage.id, hit.score) for hit in hits]


class TestSmallBM25(RetrieverContract):
    queries = ("river city", "mountain", "rivers of the 2001 lake", "unknownword")

    def make_retriever(self):
        generator = random.Random(0)
        return BM25Retriever(
            Corpus.from_passages((f"p{i}", f"Title {i % 7}", " ".join(generator.choices(VOCABULARY, k=8))) for i in range(100))
        )


class TestLargeBM25(RetrieverContract):
    queries = ("w1 w2", "w3", "w40 w41 w500", "unknownword")

    @pytest.fixture(autouse=True)
    def _retriever(self, large):
        self.retriever = large

    def make_retriever(self):
        return self.retriever


def test_score_computed_by_hand():
    corpus = Corpus.from_passages([("1", "Cats", "purr"), ("2", "Dogs", "bark bark"), ("3", "Fish", "swim silently")])
    # N = 3, df = 1: idf = ln(1 + 2.5 / 1.5). Lengths 2, 3, 3: average 8/3. tf(bark) = 2 in passage 2 of length 3.
    idf = np.log(1 + 2.5 / 1.5)
    weight = 2 / (1.5 * (0.25 + 0.75 * 3 / (8 / 3)) + 2)
    [[hit]] = BM25Retriever(corpus).search([SearchRequest("Who barked?", 3)])
    assert hit.passage == corpus[1]
    assert hit.score == pytest.approx(idf * weight, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(VOCABULARY), max_size=12).map(" ".join), min_size=1, max_size=90),
    st.lists(st.sampled_from([*VOCABULARY, "unknown"]), max_size=8).map(" ".join),
    st.integers(1, 100),
    st.sampled_from([(1.5, 0.75, "lucene"), (0.9, 0.4, "lucene"), (1.2, 0.0, "robertson"), (0.0, 1.0, "atire"), (2, 1, "robertson")]),
)
def test_small_corpora_score_as_bm25s_bit_for_bit(texts, query, top_k, scoring):
    k1, b, method = scoring
    corpus = Corpus.from_passages((str(number), "of the", text) for number, text in enumerate(texts))
    [hits] = BM25Retriever(corpus, k1=k1, b=b, method=method).search([SearchRequest(query, top_k)])
    if not any(BM25Retriever(corpus).index.indptr):  # bm25s cannot index a corpus without a single term
        assert hits == []
        return
    scores = reference_scores(reference_index(corpus, k1=k1, b=b, method=method), query)
    assert found(hits) == expected_hits(corpus, scores, top_k)


def test_large_corpora_score_as_bm25s_bit_for_bit(large):
    index = reference_index(large.corpus)
    generator = random.Random(1)
    queries = [" ".join(f"w{int(generator.paretovariate(0.5)) % 3000}" for _ in range(generator.randint(1, 12))) for _ in range(150)]
    queries += ["w1", "w1 w1 w1", "w2999", " ".join(f"w{n}" for n in range(200))]
    scores = [reference_scores(index, query) for query in queries]
    for top_k in (1, 3, 10, 400):
        answers = large.search([SearchRequest(query, top_k) for query in queries])
        assert [found(hits) for hits in answers] == [expected_hits(large.corpus, row, top_k) for row in scores]


def test_both_ways_of_searching_give_the_same(large):
    """The compiled search against the NumPy one on one index, down to the last bit."""
    generator = random.Random(2)
    terms = len(large.index.vocabulary)
    queries = [[generator.randrange(-1, terms) for _ in range(generator.randint(0, 9))] for _ in range(200)]
    queries += [[generator.randrange(30) for _ in range(9)] for _ in range(50)]  # frequent terms: the dense scan
    for top_k in (1, 3, 64, 6000):
        assert large._rank_large(queries, top_k) == large._rank_small(queries, top_k)


def test_ties_are_broken_by_id_as_strings(tmp_path):
    small = BM25Retriever(Corpus.from_passages((str(number), "Same", "river") for number in range(30)))
    expected = sorted(str(number) for number in range(30))
    assert [hit.passage.id for hit in small.search([SearchRequest("river", 12)])[0]] == expected[:12]
    many = Corpus.from_passages((str(number), "Same", "river" if number % 50 else "lake") for number in range(6000))
    large = BM25Retriever(many, cache_dir=tmp_path)
    rivers = sorted(str(number) for number in range(6000) if number % 50)
    lakes = sorted(str(number) for number in range(6000) if not number % 50)
    dense, sparse = large.search([SearchRequest("river", 12), SearchRequest("lake", 12)])
    assert [hit.passage.id for hit in dense] == rivers[:12]
    assert [hit.passage.id for hit in sparse] == lakes[:12]


def test_passages_without_a_query_term_are_not_returned():
    retriever = BM25Retriever(Corpus.from_passages([("1", "River", ""), ("2", "Lake", ""), ("3", "", "")]))
    answers = retriever.search([SearchRequest(query, 3) for query in ("river", "river lake", "unknown", "the of", "")])
    assert [[hit.passage.id for hit in hits] for hits in answers] == [["1"], ["1", "2"], [], [], []]


def test_empty_corpus_answers_nothing():
    assert BM25Retriever(Corpus.from_passages([])).search([SearchRequest("river", 3)]) == [[]]
    assert BM25Retriever(Corpus.from_passages([("1", "", "")])).search([SearchRequest("river", 3)]) == [[]]


def test_queries_of_equal_terms_are_searched_once_in_a_call():
    retriever = BM25Retriever(Corpus.from_passages([("1", "River", "")]))
    ranked = []
    rank = retriever._rank_small
    retriever._rank_small = lambda queries, top_k: ranked.append(queries) or rank(queries, top_k)
    retriever.search([SearchRequest("river", 1), SearchRequest("The Rivers!", 2), SearchRequest("lake", 1), SearchRequest("river", 1)])
    assert ranked == [[[0], [-1]]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k1": -0.1}, "k1 .*-0.1"),
        ({"k1": float("nan")}, "k1 .*nan"),
        ({"b": 1.1}, r"b .*1\.1"),
        ({"method": "bm25+"}, "lucene, robertson, atire.*bm25"),
        ({"stemmer": "klingon"}, "klingon"),
        ({"stopwords": "klingon"}, "klingon"),
    ],
)
def test_wrong_settings_are_errors(settings, message):
    with pytest.raises(RetrieverError, match=message):
        BM25Retriever(Corpus.from_passages([]), **settings)


def test_wrong_requests_are_errors():
    retriever = BM25Retriever(Corpus.from_passages([("1", "River", "")]))
    with pytest.raises(RetrieverError, match="top_k must be at least 1"):
        retriever.search([SearchRequest("river", 0)])
    with pytest.raises(RetrieverError, match="filters"):
        retriever.search([SearchRequest("river", 1, filters={"lang": "en"})])


def test_pickled_copies_answer_the_same(large):
    requests = [SearchRequest("w1 w2 w300", 5), SearchRequest("w40", 2)]
    small = BM25Retriever(made_up_corpus(50), k1=0.9, b=0.4)
    for retriever in (small, large):
        copy = pickle.loads(pickle.dumps(retriever))
        assert copy.search(requests) == retriever.search(requests)
        assert copy.stamp() == retriever.stamp()


def test_stamp_has_what_a_result_depends_on():
    corpus = Corpus.from_passages([("1", "River", "")])
    assert BM25Retriever(corpus, k1=0.9, b=0.4).stamp() == {
        "retriever": "bm25",
        "backend": "memory",
        "k1": 0.9,
        "b": 0.4,
        "method": "lucene",
        "analyzer": {"version": ANALYZER_VERSION, "stopwords": "en", "stemmer": "english"},
        "corpus_sha256": corpus.sha256,
        "passages": 1,
    }


def test_threads_share_one_retriever(large):
    generator = random.Random(3)
    requests = [SearchRequest(" ".join(f"w{generator.randrange(500)}" for _ in range(6)), 5) for _ in range(300)]
    expected = large.search(requests)
    answers = [None] * 4

    def work(slot):
        answers[slot] = [large.search([request])[0] for request in requests]

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 4


def test_small_corpora_load_no_compiler_and_leave_no_files(tmp_path):
    code = (
        "import sys\n"
        "from searchqa_retrievers import BM25Retriever, Corpus, SearchRequest\n"
        "retriever = BM25Retriever(Corpus.from_passages((str(i), 'River', 'x') for i in range(100)))\n"
        "assert len(retriever.search([SearchRequest('river', 3)])[0]) == 3\n"
        "assert not {'numba', 'bm25s', 'filelock', 'rich'} & set(sys.modules), sys.modules.keys()\n"
    )
    environment = {"SEARCHQA_CACHE": str(tmp_path), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert list(tmp_path.iterdir()) == []
