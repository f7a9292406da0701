"""Sources: a request goes to the one that it names, and to no other."""

import json
import pickle

import pytest

from searchqa_retrievers import BM25Retriever, Corpus, RetrieverError, SearchRequest, build_retriever
from searchqa_retrievers.filtered import Filtered
from searchqa_retrievers.sources import Sources
from searchqa_retrievers.testing import RetrieverContract

WIKI = Corpus.from_passages([("1", "Paris", "Paris is the capital of France."), ("2", "Rome", "Rome is the capital of Italy.")])
NEWS = Corpus.from_passages([("1", "Strike", "A strike in the capital."), ("2", "Weather", "Rain over the river.")])


def make():
    return Sources({"wiki": BM25Retriever(WIKI), "news": BM25Retriever(NEWS)}, default="wiki")


def titles(retriever, source=None, query="capital", **filters):
    if source is not None:
        filters["source"] = source
    [hits] = retriever.search([SearchRequest(query, 1, filters=filters or None)])
    return [hit.passage.title for hit in hits]


class TestDefaultSource(RetrieverContract):
    def make_retriever(self):
        return make()


class TestNamedSource(RetrieverContract):
    def make_retriever(self):
        return make()

    def request(self, query, top_k=3):
        return SearchRequest(query, top_k, filters={"source": "news"})


def test_a_request_goes_to_the_source_it_names_or_the_default():
    assert titles(make()) == titles(make(), "wiki") == ["Paris"]
    assert titles(make(), "news") == ["Strike"]


def test_answers_of_a_mixed_batch_stay_with_their_requests():
    retriever = make()
    requests = [SearchRequest(q, 1, filters=f) for q in ("capital", "rain") for f in (None, {"source": "news"}, {"source": "wiki"})]
    assert retriever.search(requests) == [retriever.search([request])[0] for request in requests]
    assert len({retriever.cache_key(request) for request in requests}) == 4  # no source is the default source


def test_each_source_is_asked_once():
    calls = []

    class Counting(BM25Retriever):
        def search(self, requests):
            calls.append(len(requests))
            return super().search(requests)

    retriever = Sources({"wiki": Counting(WIKI), "news": Counting(NEWS)}, default="wiki")
    retriever.search([SearchRequest("a", 1, filters={"source": source}) for source in ("wiki", "news", "wiki", "wiki", "news")])
    assert sorted(calls) == [2, 3]


def test_an_unknown_source_and_none_without_default_are_errors():
    with pytest.raises(RetrieverError, match="wiki, news, got 'web'"):
        titles(make(), "web")
    with pytest.raises(RetrieverError, match="got None"):
        titles(Sources({"wiki": BM25Retriever(WIKI)}))


def test_other_filters_go_on_to_the_source():
    retriever = Sources({"wiki": Filtered(BM25Retriever(WIKI)), "news": Filtered(BM25Retriever(NEWS))}, default="wiki")
    assert titles(retriever, title="rome") == ["Rome"]
    assert titles(retriever, "news", "rain", title="weather") == ["Weather"]
    assert (retriever.serves_filter("source"), retriever.serves_filter("title")) == (True, True)
    with pytest.raises(RetrieverError, match="has no filters"):
        titles(make(), title="rome")
    assert (make().serves_filter("source"), make().serves_filter("title")) == (True, False)


def test_a_configuration_with_a_corpus_of_its_own(tmp_path):
    path = tmp_path / "news.jsonl"
    path.write_text("".join(json.dumps({"id": p.id, "title": p.title, "text": p.text}) + "\n" for p in NEWS))
    config = {"name": "sources", "sources": {"wiki": "bm25", "news": {"name": "bm25", "corpus": str(path)}}, "default": "wiki"}
    built = build_retriever({**config, "cache_entries": 0}, WIKI)
    requests = [SearchRequest("capital", 2, filters=filters) for filters in (None, {"source": "news"})]
    assert built.search(requests) == make().search(requests)
    assert built.stamp() == make().stamp() == json.loads(json.dumps(built.stamp()))
    assert built.stamp()["sources"]["news"]["corpus_sha256"] == NEWS.sha256
    assert pickle.loads(pickle.dumps(built)).search(requests) == built.search(requests)
    assert config["sources"]["news"] == {"name": "bm25", "corpus": str(path)}  # the caller's configuration is as it was


@pytest.mark.parametrize(("sources", "default"), [(5, None), (["wiki"], None), ({"wiki": BM25Retriever(WIKI)}, ["wiki"])])
def test_the_class_itself_refuses_other_types(sources, default):
    with pytest.raises(RetrieverError, match="of retriever 'sources' must be"):
        Sources(sources, default)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs the option sources"),
        ({"sources": {}}, "sources"),
        ({"sources": {"wiki": "bm25"}, "default": ["wiki"]}, "default"),
        ({"sources": ["bm25"]}, "sources.*bm25"),
        ({"sources": {"wiki": "bm25"}, "default": "news"}, "default.*wiki, got 'news'"),
        ({"sources": {"wiki": {"name": "bm25", "corpus": 3}}}, "corpus of the source 'wiki'.*3"),
        ({"sources": {"": "bm25"}}, "sources"),
    ],
)
def test_settings_out_of_range_are_errors(options, message):
    with pytest.raises(RetrieverError, match=message):
        build_retriever({"name": "sources", **options}, WIKI)
