"""Milvus: equal to exact dense search, filled once, resumed where it was killed, and lost in bounded time."""

import json
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from searchqa_retrievers import (
    BM25Retriever,
    Cached,
    Corpus,
    DenseRetriever,
    Encoder,
    RetrieverError,
    RetrieverUnavailable,
    SearchRequest,
    build_retriever,
)
from searchqa_retrievers.composition import max_top_k
from searchqa_retrievers.counted import Counted
from searchqa_retrievers.filtered import Filtered
from searchqa_retrievers.hybrid import Hybrid
from searchqa_retrievers.testing import LostBackEndContract, RetrieverContract

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

import grpc
import pymilvus

from searchqa_retrievers import milvus as module
from searchqa_retrievers.milvus import MilvusCollectionError, MilvusRetriever

CITIES = ("Paris", "Rome", "Lima", "Oslo", "Cairo", "Quito", "Delhi", "Tokyo", "Accra", "Sofia")
FACTS = (
    "is the capital of its country",
    "lies on a wide river",
    "has a famous opera house",
    "was founded by settlers",
    "is known for its bread",
    "was the home of a novelist",
    "has a harbour on the sea",
    "held the winter games",
    "is twinned with a port",
    "has an old university",
)
CORPUS = Corpus.from_passages((f"p{100 + i}", f"{city} {j}", f"{city} {fact}.") for i, (city, j, fact) in enumerate(
    (city, j, fact) for city in CITIES for j, fact in enumerate(FACTS)
))  # fmt: skip
QUERIES = ("capital of Peru", "Who wrote the novel?", "river in Rome", "zyzzyva", "", "a harbour by the sea in Norway")


@pytest.fixture(scope="module")
def encoder(minilm_folder):
    """MiniLM, which remembers the vectors of passages: most tests fill a collection with the same ones."""
    encoder = Encoder("minilm", model=minilm_folder, device="cpu")
    encode, known = encoder.encode_passages, {}

    def encode_passages(texts):
        missing = [text for text in texts if text not in known]
        known.update(zip(missing, encode(missing), strict=True))
        return np.stack([known[text] for text in texts])

    encoder.encode_passages = encode_passages
    return encoder


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return str(tmp_path_factory.mktemp("milvus") / "index.db")


@pytest.fixture(scope="module")
def milvus(uri, encoder):
    return MilvusRetriever(CORPUS, encoder, uri, show_progress=False)


class TestMilvus(RetrieverContract):
    @pytest.fixture(autouse=True)
    def _parts(self, milvus, encoder, uri):
        self.make_retriever = lambda: MilvusRetriever(CORPUS, encoder, uri, show_progress=False)

    def make_retriever(self):
        raise NotImplementedError


class TestMilvusLost(LostBackEndContract):
    @pytest.fixture(autouse=True)
    def _parts(self, encoder):
        self.encoder = encoder

    def make_lost_retriever(self):
        class Late:
            """Connects at the first search, so that the contract sees what that raises."""

            def search(_, requests):
                return MilvusRetriever(CORPUS, self.encoder, f"http://127.0.0.1:{free_port()}", timeout=1.0).search(requests)

        return Late()


@pytest.mark.parametrize("top_k", [1, 3, 20, 100, 200])
def test_it_gives_what_exact_dense_search_gives(milvus, encoder, top_k):
    dense = DenseRetriever(CORPUS, encoder, show_progress=False)
    requests = [SearchRequest(query, top_k) for query in QUERIES]
    for ours, theirs in zip(milvus.search(requests), dense.search(requests), strict=True):
        assert [hit.passage for hit in ours] == [hit.passage for hit in theirs]
        assert [hit.score for hit in ours] == pytest.approx([hit.score for hit in theirs], abs=1e-5)


def test_a_configuration_gives_the_same_retriever(milvus, uri, minilm_folder):
    config = {"name": "milvus", "uri": uri, "encoder": "minilm", "model": minilm_folder, "device": "cpu", "cache_entries": 0}
    retriever = build_retriever(config, CORPUS)
    requests = [SearchRequest(query, 3) for query in QUERIES]
    assert retriever.search(requests) == milvus.search(requests)
    assert retriever.stamp() == milvus.stamp()
    assert uri not in json.dumps(retriever.stamp())


def test_equal_vectors_past_the_first_reply_come_in_the_order_of_ids(encoder, tmp_path):
    """Forty equal passages and a top_k of 3: the server may give any of them, the answer has the first ids."""
    corpus = Corpus.from_passages([(f"{i:02d}", "Same", "The same text.") for i in range(40)] + [("zz", "Other", "A goat.")])
    retriever = MilvusRetriever(corpus, encoder, str(tmp_path / "ties.db"), show_progress=False)
    [hits] = retriever.search([SearchRequest("same text", 3)])
    assert [hit.passage.id for hit in hits] == ["00", "01", "02"]
    assert len({hit.score for hit in hits}) == 1


@pytest.mark.parametrize(
    ("index", "index_params", "search_params"),
    [("HNSW", {"M": 8, "efConstruction": 64}, {"ef": 8}), ("IVF_FLAT", {"nlist": 64}, {"nprobe": 32}), ("AUTOINDEX", None, None)],
)
def test_approximate_indexes_find_nearly_all_of_the_best(encoder, uri, milvus, index, index_params, search_params):
    retriever = MilvusRetriever(
        CORPUS, encoder, uri, f"c_{index}", index, index_params, search_params, show_progress=False
    )  # fmt: skip
    requests = [SearchRequest(query, 5) for query in QUERIES]
    pairs = zip(retriever.search(requests), milvus.search(requests), strict=True)
    shared = [len({hit.passage.id for hit in ours} & {hit.passage.id for hit in exact}) / 5 for ours, exact in pairs]
    assert np.mean(shared) > 0.9
    assert retriever.stamp()["index"] == index


@pytest.mark.parametrize("index", ["IVF_FLAT", "IVF_SQ8"])
def test_lists_of_the_embedded_engine_that_are_all_probed_lose_no_row(tmp_path, index):
    """Its lists are as many as ``nlist`` says: with the engine's own 128, eight of them would hold a few of these rows."""
    corpus = Corpus.from_passages((f"{i:04d}", "T", f"text {i}") for i in range(400))
    retriever = MilvusRetriever(corpus, Drawn(), str(tmp_path / "a.db"), "c", index, {"nlist": 8}, {"nprobe": 8}, show_progress=False)  # noqa: F821 - defined by DRAWN
    for hits in retriever.search([SearchRequest(query, 400) for query in QUERIES]):
        assert sorted(hit.passage.id for hit in hits) == list(corpus.ids)


@pytest.mark.parametrize("index", ["IVF_PQ", "DISKANN"])
def test_indexes_that_the_embedded_engine_does_not_have_are_refused(tmp_path, index):
    with pytest.raises(RetrieverError, match=f"no index '{index}'; choose one of FLAT"):
        MilvusRetriever(CORPUS, Drawn(), str(tmp_path / "a.db"), index=index)  # noqa: F821 - defined by DRAWN
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["ef", "search_list"])
def test_no_search_asks_for_more_than_its_breadth(encoder, uri, key):
    """Servers refuse a limit above ``ef``; equal texts make the search widen to more than it asked for first."""
    corpus = Corpus.from_passages((f"{i:03d}", "Same", "The same text.") for i in range(90))
    retriever = MilvusRetriever(corpus, encoder, uri, f"c_{key}", "HNSW", {"M": 8}, {key: 40}, show_progress=False)
    asked = watched(retriever)
    [hits] = retriever.search([SearchRequest("same text", 3)])
    assert [hit.passage.id for hit in hits] == ["000", "001", "002"]
    assert [(call["limit"], call["search_params"]["params"]) for call in asked] == [(28, {key: 40}), (90, {key: 90})]
    assert retriever.stamp()["search_params"] == {key: 40}


def watched(retriever):
    """The arguments of each search that the retriever asks its client for from now on."""
    asked, search = [], retriever._client.search

    def watch(collection, **arguments):
        asked.append(arguments)
        return search(collection, **arguments)

    retriever._client.search = watch
    return asked


def test_another_corpus_encoder_or_index_is_refused(milvus, encoder, uri):
    other = Corpus.from_passages([("1", "A", "b")])
    with pytest.raises(MilvusCollectionError, match="corpus_sha256"):
        MilvusRetriever(other, encoder, uri)
    with pytest.raises(MilvusCollectionError, match="index 'FLAT' instead of 'HNSW'"):
        MilvusRetriever(CORPUS, encoder, uri, index="HNSW")

    class Other(type(encoder)):
        def __init__(self):
            self.__dict__.update(encoder.__dict__, fingerprint="another")

    with pytest.raises(MilvusCollectionError, match="fingerprint"):
        MilvusRetriever(CORPUS, Other(), uri)


def test_a_collection_of_somebody_else_is_refused_and_left_alone(milvus, encoder, uri):
    milvus._client.create_collection("theirs", dimension=encoder.dimension)
    with pytest.raises(MilvusCollectionError, match="no record"):
        MilvusRetriever(CORPUS, encoder, uri, "theirs")
    assert milvus._client.has_collection("theirs")


def test_rows_too_many_are_refused(milvus, encoder, uri):
    MilvusRetriever(CORPUS, encoder, uri, "more", show_progress=False)
    milvus._client.upsert("more", [{"position": 1000, "vector": [0.0] * encoder.dimension}])
    with pytest.raises(MilvusCollectionError, match="101 rows"):
        MilvusRetriever(CORPUS, encoder, uri, "more", show_progress=False)


def test_rows_that_are_gone_are_filled_in_before_any_search(milvus, encoder, uri):
    MilvusRetriever(CORPUS, encoder, uri, "fewer", show_progress=False)
    milvus._client.delete("fewer", filter="position < 30")
    again = MilvusRetriever(CORPUS, encoder, uri, "fewer", show_progress=False)
    requests = [SearchRequest(query, 100) for query in QUERIES]
    assert again.search(requests) == milvus.search(requests)


def test_a_full_collection_is_opened_without_encoding(milvus, uri, encoder, monkeypatch):
    monkeypatch.setattr(encoder, "encode_passages", lambda _: pytest.fail("encoded again"))
    again = MilvusRetriever(CORPUS, encoder, uri)
    assert again.search([SearchRequest("river", 3)]) == milvus.search([SearchRequest("river", 3)])


def test_pickled_it_connects_again(milvus):
    again = pickle.loads(pickle.dumps(milvus))
    assert again.search([SearchRequest("river", 3)]) == milvus.search([SearchRequest("river", 3)])


DRAWN = """
import zlib
import numpy as np

class Drawn:
    dimension, fingerprint = 16, "drawn"

    def encode_queries(self, texts):
        drawn = np.array([np.random.default_rng(zlib.crc32(text.encode())).normal(size=16) for text in texts], dtype=np.float32)
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    encode_passages = encode_queries
"""
exec(DRAWN)
KILLED = """
import os, signal, sys
import searchqa_retrievers.milvus as module
from searchqa_retrievers import Corpus

class Deadly(Drawn):
    calls = 0

    def encode_passages(self, texts):
        self.calls += 1
        if self.calls == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_passages(texts)

module._BATCH = 16
module.MilvusRetriever(Corpus.from_jsonl(sys.argv[2]), Deadly(), sys.argv[1], show_progress=False)
"""


def test_a_build_that_was_killed_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """With vectors that follow from the text alone, so that the process that is killed needs no model."""
    rows = tmp_path / "corpus.jsonl"
    rows.write_text("".join(json.dumps({"id": p.id, "title": p.title, "text": p.text}) + "\n" for p in CORPUS))
    where = str(tmp_path / "killed.db")
    killed = subprocess.run([sys.executable, "-c", DRAWN + KILLED, where, str(rows)], timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL

    monkeypatch.setattr(module, "_BATCH", 16)
    encoder, encoded = Drawn(), []  # noqa: F821 - defined by DRAWN
    encode = encoder.encode_passages
    encoder.encode_passages = lambda texts: encoded.append(len(texts)) or encode(texts)
    retriever = MilvusRetriever(CORPUS, encoder, where, show_progress=False)
    assert sum(encoded) == 100 - 3 * 16
    vectors = encode([CORPUS.contents(i) for i in range(100)])
    for query, [best, *_] in zip(QUERIES, retriever.search([SearchRequest(query, 1) for query in QUERIES]), strict=True):
        assert best.passage == CORPUS[int(np.argmax(vectors @ encode([query])[0]))]


def test_several_that_fill_one_collection_at_once_fill_it_once(tmp_path):
    made, barrier = [], threading.Barrier(3)

    def make():
        barrier.wait()
        made.append(MilvusRetriever(CORPUS, Drawn(), str(tmp_path / "together.db"), show_progress=False))  # noqa: F821 - defined by DRAWN

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [retriever._count() for retriever in made] == [100] * 3
    answers = [retriever.search([SearchRequest("river", 100)]) for retriever in made]
    assert answers == [answers[0]] * 3
    assert len({hit.passage.id for hit in answers[0][0]}) == 100


def test_a_server_that_cannot_be_reached_is_a_lost_back_end_after_the_timeout(encoder, monkeypatch):
    asked = []

    class Watched(pymilvus.MilvusClient):
        def __init__(self, uri, **arguments):
            asked.append(arguments["timeout"])
            super().__init__(uri, **arguments)

    monkeypatch.setattr(pymilvus, "MilvusClient", Watched)
    with pytest.raises(RetrieverUnavailable, match="Milvus"):
        MilvusRetriever(CORPUS, encoder, f"http://127.0.0.1:{free_port()}", timeout=1.0)
    assert asked == [1.0]


def test_what_milvus_refuses_is_no_lost_back_end(milvus, encoder, uri, tmp_path):
    for make, match in (
        (lambda: milvus._call("search", data=[[0.0]], anns_field="vector", limit=1), "refuses"),  # another dimension
        (lambda: milvus._call("query", filter="no such (", output_fields=["position"]), "refuses"),
        (lambda: MilvusRetriever(CORPUS, encoder, str(tmp_path / "none" / "a.db")), "not exists"),
        (lambda: MilvusRetriever(CORPUS, encoder, str(tmp_path / "folder")), "illegal"),
        (lambda: MilvusRetriever(CORPUS, encoder, "ftp://127.0.0.1:1"), "illegal"),
    ):
        with pytest.raises(RetrieverError, match=match) as caught:
            make()
        assert not isinstance(caught.value, RetrieverUnavailable)


def test_search_parameters_that_are_refused_show_at_the_beginning(encoder, uri):
    with pytest.raises(RetrieverError, match="far") as caught:
        MilvusRetriever(CORPUS, encoder, uri, "probed", search_params={"radius": "far"}, show_progress=False)
    assert not isinstance(caught.value, RetrieverUnavailable)


def test_a_collection_that_is_dropped_is_no_lost_back_end(encoder, uri):
    retriever = MilvusRetriever(CORPUS, encoder, uri, "dropped", show_progress=False)
    retriever._client.drop_collection("dropped")
    with pytest.raises(MilvusCollectionError, match="dropped"):
        retriever.search([SearchRequest("river", 3)])


@pytest.mark.parametrize(
    ("status", "lost"),
    [
        ("UNAVAILABLE", True),
        ("DEADLINE_EXCEEDED", True),
        ("UNAUTHENTICATED", False),
        ("PERMISSION_DENIED", False),
        ("INVALID_ARGUMENT", False),
    ],
)
def test_a_real_server_s_status_tells_a_lost_back_end_from_a_refusal(encoder, status, lost):
    """A server that answers every call with this status, a wrong token's among them."""

    class Refusing(grpc.GenericRpcHandler):
        def service(self, details):
            return grpc.unary_unary_rpc_method_handler(lambda request, context: context.abort(grpc.StatusCode[status], "no"))

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Refusing()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(RetrieverError, match="Milvus") as caught:
            MilvusRetriever(CORPUS, encoder, f"http://127.0.0.1:{port}", timeout=1.0)
        assert isinstance(caught.value, RetrieverUnavailable) == lost
    finally:
        server.stop(None).wait()


def test_a_missing_engine_names_the_extra(encoder, tmp_path, monkeypatch):
    for missing, name in (("milvus_lite", "milvus-lite"), ("pymilvus", "pymilvus")):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(RetrieverError, match=rf"needs {name} .*searchqa-gym\[milvus\]"):
            MilvusRetriever(CORPUS, encoder, str(tmp_path / "a.db"))


def test_a_server_that_stops_is_a_lost_back_end_and_one_that_comes_back_answers(encoder, tmp_path):
    port = free_port()
    server = _serve(tmp_path / "data", port)
    try:
        retriever = MilvusRetriever(CORPUS, encoder, f"http://127.0.0.1:{port}", timeout=3.0, show_progress=False)
        expected = retriever.search([SearchRequest("river", 3)])
        assert len(expected[0]) == 3
        server.send_signal(signal.SIGSTOP)  # it takes connections and answers nothing
        asked = watched(retriever)
        with pytest.raises(RetrieverUnavailable):
            retriever.search([SearchRequest("river", 3)])
        assert [0 < call["timeout"] <= 3 for call in asked] == [True]  # one try, within what is left of the timeout
        server.send_signal(signal.SIGCONT)
        assert _patiently(lambda: retriever.search([SearchRequest("river", 3)])) == expected
        server.kill()
        server.wait()
        for _ in range(2):
            with pytest.raises(RetrieverUnavailable):
                retriever.search([SearchRequest("river", 3)])
        server = _serve(tmp_path / "data", port)
        assert _patiently(lambda: retriever.search([SearchRequest("river", 3)])) == expected
    finally:
        server.kill()
        server.wait()


def _serve(folder, port):
    code = (
        "import sys, threading\nfrom milvus_lite.adapter.grpc.server import start_server_in_thread\n"
        "kept = start_server_in_thread(data_dir=sys.argv[1], host='127.0.0.1', port=int(sys.argv[2]))\nthreading.Event().wait()"
    )
    server = subprocess.Popen([sys.executable, "-c", code, str(folder), str(port)])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return server
        except OSError:
            time.sleep(0.1)
    server.kill()
    raise AssertionError("the server did not start")


def _patiently(search):
    for _ in range(20):
        try:
            return search()
        except RetrieverUnavailable:
            time.sleep(0.3)
    return search()


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs the option uri"),
        ({"uri": ""}, "needs uri"),
        ({"uri": 5}, "uri"),
        ({"uri": "./a.db", "collection": 5}, "collection"),
        ({"uri": "./a.db", "encoder": 5}, "encoder"),
        ({"uri": "./a.db", "index_params": 5}, "index_params"),
        ({"uri": "./a.db", "search_params": 5}, "search_params"),
        ({"uri": "./a.db", "index_params": {"M": "many"}}, "M in index_params.*'many'"),
        ({"uri": "./a.db", "search_params": {"ef": 0}}, "ef in search_params.*0"),
        ({"uri": "./a.db", "index": "flat"}, "index of retriever 'milvus' must be one of FLAT"),
        ({"uri": "./a.db", "timeout": 0}, "timeout"),
        ({"uri": "./a.db", "collection": "wiki-18"}, "collection.*'wiki-18'"),
        ({"uri": "./a.db", "rescore_factor": 0}, "rescore_factor"),
    ],
)
def test_settings_out_of_range_are_errors(options, message, minilm_folder):
    with pytest.raises(RetrieverError, match=message):
        build_retriever({"name": "milvus", "encoder": "minilm", "model": minilm_folder, "device": "cpu", **options}, CORPUS)


@pytest.mark.parametrize("options", [{name: 5} for name in ("uri", "encoder", "collection", "index", "index_params", "search_params")])
def test_the_class_itself_refuses_other_types(options, encoder):
    with pytest.raises(RetrieverError, match=next(iter(options))):
        MilvusRetriever(**{"corpus": CORPUS, "encoder": encoder, "uri": "./never-made.db", **options})


def test_compositions_know_how_much_milvus_gives(milvus):
    assert max_top_k(Cached(Counted(Filtered(Hybrid([BM25Retriever(CORPUS), Cached(milvus)]))))) == 16_384
    assert max_top_k(Hybrid([BM25Retriever(CORPUS)])) is None
    with pytest.raises(RetrieverError, match="depth of retriever 'hybrid' must be at most 16384"):
        Hybrid([milvus], depth=20_000)
    with pytest.raises(RetrieverError, match="max_candidates of retriever 'filtered' must be at most 16384"):
        Filtered(milvus, max_candidates=20_000)


def test_an_empty_corpus_and_more_than_milvus_gives_are_errors(milvus, encoder, uri):
    with pytest.raises(RetrieverError, match="at least one passage"):
        MilvusRetriever(Corpus.from_passages([]), encoder, uri)
    with pytest.raises(RetrieverError, match="16384"):
        milvus.search([SearchRequest("river", 20_000)])
