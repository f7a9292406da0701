"""build_retriever: names, configurations, objects, and errors that list the choices."""

import pytest

from searchqa_retrievers import BM25Retriever, Cached, Corpus, NoRetriever, RandomRetriever, RetrieverError, SearchRequest, build_retriever
from searchqa_retrievers.build import has_back_end
from searchqa_retrievers.counted import Counted
from searchqa_retrievers.disk_cache import DiskCached
from searchqa_retrievers.recording import Recorded, Replay

CORPUS = Corpus.from_passages([("1", "River", "Thames"), ("2", "City", "London")])


@pytest.mark.parametrize(("name", "kind"), [("bm25", BM25Retriever), ("random", RandomRetriever), ("none", NoRetriever)])
def test_a_name_gives_a_cached_retriever(name, kind):
    for config in (name, {"name": name}):
        retriever = build_retriever(config, CORPUS)
        assert isinstance(retriever, Cached)
        inner = retriever.retriever
        if kind is not NoRetriever:  # which has no back end
            assert isinstance(inner, Counted)
            inner = inner.retriever
        assert isinstance(inner, kind)
        assert retriever.name == name


def test_options_reach_the_retriever():
    bm25 = {"name": "bm25", "cache_entries": 0}
    assert build_retriever(bm25, CORPUS).stamp()["k1"] == 1.5
    preset = build_retriever({**bm25, "preset": "search-r1"}, CORPUS).stamp()
    assert (preset["k1"], preset["b"]) == (0.9, 0.4)
    mixed = build_retriever({**bm25, "preset": "search-r1", "b": 0.75, "stopwords": None, "stemmer": None}, CORPUS).stamp()
    assert (mixed["k1"], mixed["b"], mixed["analyzer"]["stopwords"], mixed["analyzer"]["stemmer"]) == (0.9, 0.75, None, None)
    assert build_retriever({"name": "random", "seed": 4, "cache_entries": 0}, CORPUS).retriever.seed == 4
    assert build_retriever({"name": "none", "cache_entries": 12}, CORPUS).max_entries == 12


def test_the_number_of_passages_chooses_where_the_index_lies_unless_told(tmp_path, monkeypatch):
    bm25 = {"name": "bm25", "cache_entries": 0, "cache_dir": str(tmp_path)}
    assert build_retriever(bm25, CORPUS).stamp()["backend"] == "memory"
    assert build_retriever({**bm25, "backend": "disk", "rescore_factor": 5}, CORPUS).stamp()["rescore_factor"] == 5
    monkeypatch.setattr("searchqa_retrievers.sparse.MEMORY_PASSAGES", 1)
    large = build_retriever(bm25, CORPUS)
    assert large.stamp()["backend"] == "disk"
    small = build_retriever({**bm25, "backend": "memory"}, CORPUS)
    assert small.stamp()["backend"] == "memory"
    assert large.search([SearchRequest("river", 2)]) == small.search([SearchRequest("river", 2)])


def test_an_object_is_returned_as_it_is():
    retriever = NoRetriever()
    assert build_retriever(retriever, CORPUS) is retriever


@pytest.mark.parametrize(("name", "calls"), [("bm25", 1), ("random", 1), ("none", 0)])
def test_a_corpus_given_as_a_function_is_made_only_where_it_is_needed(name, calls):
    made = []

    def corpus():
        made.append(name)
        return CORPUS

    lazy, direct = build_retriever(name, corpus), build_retriever(name, CORPUS)
    assert len(made) == calls
    assert lazy.search([SearchRequest("river", 2)]) == direct.search([SearchRequest("river", 2)])


def test_a_wrong_option_is_told_before_the_corpus_is_read():
    def corpus():
        raise AssertionError("read")

    with pytest.raises(RetrieverError, match="no option k_1"):
        build_retriever({"name": "bm25", "k_1": 1.0}, corpus)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("bm26", "bm25, dense.*'bm26'"),
        ({"k1": 1.0}, "bm25, dense.*None"),
        ({"name": "bm25", "k_1": 1.0}, "no option k_1; it has .*k1.*cache_entries"),
        ({"name": "none", "k1": 1.0}, "no option k1"),
        ({"name": "bm25", "corpus": 1}, "no option corpus"),
        ({"name": "bm25", "preset": "lucene"}, "bm25s, search-r1.*'lucene'"),
        ({"name": "bm25", "backend": "tape"}, "auto, memory, disk.*'tape'"),
        ({"name": "bm25", "backend": "disk", "rescore_factor": 0}, "rescore_factor.*0"),
        ({"name": "bm25", "cache_entries": -1}, "cache_entries.*-1"),
        ({"name": "bm25", "cache_entries": "many"}, "cache_entries.*'many'"),
        ({"name": "bm25", "price": -1}, "price.*-1"),
        ({"name": "bm25", "price": "free"}, "price.*'free'"),
        ({"name": "bm25", "price": float("nan")}, "price.*nan"),
        ({"name": "bm25", "cache_file": 3}, "cache_file.*3"),
        ({"name": "bm25", "record": True}, "record.*True"),
        (3, "got int"),
        (None, "got NoneType"),
    ],
)
def test_wrong_configurations_are_errors_that_list_the_choices(config, message):
    with pytest.raises(RetrieverError, match=message):
        build_retriever(config, CORPUS)


def test_memory_is_round_the_recording_round_the_cache_file_round_the_count(tmp_path):
    files = {"cache_file": tmp_path / "cache.db", "record": str(tmp_path / "record.jsonl")}
    retriever = build_retriever({"name": "random", "price": 0.5, **files}, CORPUS)
    kinds = []
    while retriever is not None:
        kinds.append(type(retriever))
        retriever = getattr(retriever, "retriever", None)
    assert kinds == [Cached, Recorded, DiskCached, Counted, RandomRetriever]


def test_a_nested_retriever_has_its_own_file_and_price(tmp_path):
    inner = {"name": "random", "cache_file": str(tmp_path / "cache.db"), "price": 2}
    retriever = build_retriever({"name": "hybrid", "retrievers": ["bm25", inner], "price": 1}, CORPUS)
    retriever.search([SearchRequest("river", 1), SearchRequest("city", 1)])
    counters = retriever.counters()
    assert counters["search/money"] == 2 * 2 + 2 * 1
    assert counters["search/disk_misses"] == 2
    assert (counters["search/backend_calls"], counters["search/backend_requests"]) == (2, 4)  # of the parts, not of the whole once more
    assert (tmp_path / "cache.db").is_file()


def test_a_replay_has_no_back_end_to_count(tmp_path):
    file = str(tmp_path / "record.jsonl")
    recorded = build_retriever({"name": "bm25", "record": file}, CORPUS)
    answers = recorded.search([SearchRequest("river", 2)])
    replay = build_retriever({"name": "replay", "file": file}, CORPUS)
    assert isinstance(replay.retriever, Replay)
    assert replay.search([SearchRequest("river", 2)]) == answers
    assert "search/backend_calls" not in replay.counters()
    assert replay.stamp() == recorded.stamp()


def test_what_has_nothing_to_ask_has_no_back_end():
    assert [has_back_end(config) for config in ("none", {"name": "replay"}, "bm25", {"name": "http"}, "unknown", {})] == [False] * 2 + [
        True
    ] * 4
