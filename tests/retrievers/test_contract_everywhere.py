"""One contract for every retriever: each name of a configuration, what stands round them, and retrievers of a user's own."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn

from searchqa_retrievers import BM25Retriever, Corpus, Hit, Passage, build_retriever, from_function
from searchqa_retrievers.build import RETRIEVERS
from searchqa_retrievers.http_server import create_app
from searchqa_retrievers.testing import HOSTILE_QUERIES, LostBackEndContract, RetrieverContract
from searchqa_retrievers.types import default_cache_key

WORDS = ["capital", "river", "novel", "city", "bridge", "harbour", "winter", "song", "bread", "king", "queen", "train"]


def passages(number):
    """Short texts, some of them equal, so that there are ties."""
    return [
        (f"p{i}", f"Title {i % 10}", f"The {WORDS[i % 12]} of France and the {WORDS[i // 2 % 7]} that somebody wrote. {i // 3}")
        for i in range(number)
    ]


SMALL = Corpus.from_passages(passages(30))
LARGE = Corpus.from_passages(passages(1000))  # the fewest that approximate indexes take
BARE = {"cache_entries": 0}


def by_words(queries, top_k):
    """A user's search function: passages in the order of the words that they share with the query."""
    ranked = []
    for query in queries:
        wanted = set(query.split()[:100])
        ranked.append([(*passage, float(len(wanted & set(passage.text.split())))) for passage in SMALL][: top_k + 5])
    return ranked


class HandWritten:
    """A user's class with nothing but what the protocol asks for, and __deepcopy__."""

    def search(self, requests):
        return [[Hit(Passage("1", "Title", request.query[:20]), 1.0)] for request in requests]

    def cache_key(self, request):
        return default_cache_key(request)

    def __deepcopy__(self, memo):
        return self


@contextmanager
def served(retriever):
    """A real search server over loopback; gives its address."""
    server = uvicorn.Server(uvicorn.Config(create_app(retriever), port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def addresses():
    """A server with all passages, and two with half of them each."""
    halves = [Corpus.from_passages(passage for passage in SMALL if (int(passage.id[1:]) % 2 == half)) for half in (0, 1)]
    with served(BM25Retriever(SMALL)) as whole, served(BM25Retriever(halves[0])) as first, served(BM25Retriever(halves[1])) as second:
        yield whole, first, second


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tiny encoder and a tiny cross-encoder with random weights and a vocabulary of words and letters."""
    import torch
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    vocabulary = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *letters, *(f"##{letter}" for letter in letters)])
    core = Tokenizer(WordPiece({piece: number for number, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=inputs, **special)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5, **sizes)
    folders = []
    for kind in (BertModel, BertForSequenceClassification):
        torch.manual_seed(0)
        folders.append(str(tmp_path_factory.mktemp("model")))
        tokenizer.save_pretrained(folders[-1])
        kind(config).save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("indexes")


NAMES = (
    "bm25",
    "bm25 on disk",
    "cached",
    "cache file",
    "dense",
    "dense hnsw",
    "filtered",
    "filtered by title",
    "from_function",
    "hand-written",
    "http",
    "hybrid",
    "milvus",
    "noisy",
    "none",
    "random",
    "recorded",
    "replay",
    "rerank",
    "shards",
    "sources",
    "sources by name",
    "filtered rerank of hybrid sources",
)


def configuration(name, addresses, models, folder):
    """The configuration, or the retriever itself, and the corpus."""
    encoder, cross_encoder = models
    dense = {
        "name": "dense",
        "encoder": {"model": encoder, "max_tokens": 64},
        "device": "cpu",
        "cache_dir": str(folder),
        "show_progress": False,
    }
    rerank = {"name": "rerank", "model": cross_encoder, "max_tokens": 64, "device": "cpu", "candidates": 5}
    milvus = {"name": "milvus", "uri": str(folder / "index.db"), "encoder": dense["encoder"], "device": "cpu", "show_progress": False}
    sources = {"name": "sources", "sources": {"wiki": "bm25", "news": {"name": "random", "seed": 2}}, "default": "wiki"}
    whole, *halves = addresses
    return {
        "bm25": {"name": "bm25", "backend": "memory", "show_progress": False},
        "bm25 on disk": {"name": "bm25", "backend": "disk", "cache_dir": str(folder), "show_progress": False},
        "cached": {"name": "bm25", "cache_entries": 5},
        "cache file": {"name": "bm25", "cache_file": str(folder / "answers.db")},
        "dense": dense,
        "dense hnsw": {**dense, "index": "hnsw"},
        "filtered": {"name": "filtered", "retriever": "bm25"},
        "filtered by title": {"name": "filtered", "retriever": "bm25", "max_candidates": 20},
        "from_function": from_function(by_words),
        "hand-written": HandWritten(),
        "http": {"name": "http", "url": whole},
        "hybrid": {"name": "hybrid", "retrievers": ["bm25", dense, {"name": "random"}], "depth": 8, "weights": [2, 1, 0.5]},
        "milvus": milvus,
        "noisy": {"name": "noisy", "retriever": "bm25", "skip": 2},
        "none": {"name": "none"},
        "random": {"name": "random", "seed": 3},
        "recorded": {"name": "bm25", "record": str(folder / "recorded.jsonl")},
        "replay": {"name": "replay", "file": str(folder / "replayed.jsonl")},
        "rerank": {**rerank, "retriever": "bm25"},
        "shards": {"name": "shards", "urls": halves},
        "sources": sources,
        "sources by name": sources,
        "filtered rerank of hybrid sources": {
            "name": "filtered",
            "retriever": {**rerank, "retriever": {"name": "hybrid", "retrievers": [sources, sources]}},
        },
    }[name]


FILTERS = {
    "filtered by title": {"title": "title 3"},
    "sources by name": {"source": "news"},
    "filtered rerank of hybrid sources": {"source": "wiki", "title": "Title"},
}


class TestEveryRetriever(RetrieverContract):
    @pytest.fixture(autouse=True, params=NAMES)
    def _choose(self, request, addresses, models, folder):
        name = request.param
        if name == "milvus":
            pytest.importorskip("milvus_lite")
        if name == "bm25 on disk":
            pytest.importorskip("tantivy")
        self.filters = FILTERS.get(name)
        self.corpus = LARGE if name == "dense hnsw" else SMALL
        self.config = configuration(name, addresses, models, folder)
        if name == "replay" and not (folder / "replayed.jsonl").exists():
            recorded = build_retriever({"name": "bm25", "record": str(folder / "replayed.jsonl")}, SMALL)
            recorded.search([self.request(query, top_k) for query in self.queries for top_k in (1, 2, 3, 4, 5, 10, 10_000)])
            recorded.search([self.request(query) for query in HOSTILE_QUERIES])
        self.made = []
        yield
        for retriever in self.made:
            getattr(retriever, "close", lambda: None)()

    def make_retriever(self):
        config = {**BARE, **self.config} if isinstance(self.config, dict) else self.config
        self.made.append(build_retriever(config, self.corpus))
        return self.made[-1]

    def request(self, query, top_k=3):
        from searchqa_retrievers import SearchRequest

        return SearchRequest(query, top_k, filters=self.filters)


def test_every_name_of_a_configuration_is_here(addresses, models, folder):
    """Online and simulated search have the contract in their own tests, with servers in the place of the providers and models."""
    there = {config["name"] for config in (configuration(name, addresses, models, folder) for name in NAMES) if isinstance(config, dict)}
    assert there == set(RETRIEVERS) - {"online", "simulated"}


LOST = ("http", "hybrid", "rerank", "shards", "sources", "filtered", "noisy", "cached")


class TestEveryLostBackEnd(LostBackEndContract):
    """A composition with one lost part is lost: it never answers with the rest."""

    @pytest.fixture(autouse=True, params=LOST)
    def _choose(self, request, addresses, models):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        http = {"name": "http", "url": url, "timeout": 1.0, "deadline": 1.0, "retries": 0}
        self.config = {
            "http": {**http, **BARE},
            "hybrid": {"name": "hybrid", "retrievers": ["bm25", http], **BARE},
            "rerank": {"name": "rerank", "retriever": http, "model": models[1], "max_tokens": 64, "device": "cpu", **BARE},
            "shards": {"name": "shards", "urls": [addresses[1], url], "timeout": 1.0, "deadline": 1.0, "retries": 0, **BARE},
            "sources": {"name": "sources", "sources": {"a": http}, "default": "a", **BARE},
            "filtered": {"name": "filtered", "retriever": http, **BARE},
            "noisy": {"name": "noisy", "retriever": http, **BARE},
            "cached": http,
        }[request.param]

    def make_lost_retriever(self):
        return build_retriever(self.config, SMALL)
