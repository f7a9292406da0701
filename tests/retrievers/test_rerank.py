"""Reranking: scores of a real (tiny, random) BERT, each query with its own passages only, independent of the batch."""

import json
import pickle

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from searchqa_retrievers import BM25Retriever, Corpus, Hit, Passage, RetrieverError, SearchRequest, build_retriever
from searchqa_retrievers.rerank import CrossEncoder, Rerank
from searchqa_retrievers.testing import RetrieverContract

CORPUS = Corpus.from_passages(
    (f"p{i:02d}", f"City {i}", f"{'The capital city lies on a river. ' * (1 + i % 7)}It has {i} bridges and a novel was set there.")
    for i in range(24)
)
QUERIES = ("capital of France", "who wrote the novel", "river", "bridges " * 20)


def save_model(folder, outputs=1, seed=0):
    """A BERT with random weights and a tokenizer of words and letters, as files."""
    words = sorted({word for i in range(len(CORPUS)) for word in CORPUS.contents(i).lower().replace('"', "").replace(".", "").split()})
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), *words])
    core = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        num_labels=outputs,
        initializer_range=0.4,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("cross-encoder"))


@pytest.fixture(scope="module")
def encoder(folder):
    return CrossEncoder(folder, device="cpu", max_tokens=64)


def direct_score(folder, query, passage):
    """One pair, no padding."""
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        inputs = tokenizer(query, passage, truncation="only_second", max_length=64, return_tensors="pt")
        return float(network(**inputs).logits[0, 0])


class TestRerank(RetrieverContract):
    @pytest.fixture(autouse=True)
    def _parts(self, encoder):
        self.encoder = encoder

    def make_retriever(self):
        return Rerank(BM25Retriever(CORPUS), self.encoder, candidates=5)


class Counting:
    """Counts the pairs that reach the model."""

    def __init__(self, encoder):
        self.encoder = encoder
        self.pairs = []

    def scores(self, pairs):
        self.pairs += pairs
        return self.encoder.scores(pairs)


def test_scores_are_those_of_a_direct_forward_pass(folder, encoder):
    pairs = [(query, CORPUS.contents(i)) for query in QUERIES for i in (0, 5, 6)]
    scores = encoder.scores(pairs)
    assert scores == pytest.approx([direct_score(folder, *pair) for pair in pairs], abs=1e-5)
    assert len(set(scores)) == len(scores)


def test_a_score_does_not_depend_on_the_other_pairs(encoder):
    pairs = [(query, CORPUS.contents(i)) for query in QUERIES for i in range(len(CORPUS))]
    together = encoder.scores(pairs)
    assert together == [encoder.scores([pair])[0] for pair in pairs]
    assert encoder.scores(pairs[::-1]) == together[::-1]


def test_passes_of_several_rows_give_each_pair_its_own_score(encoder, monkeypatch):
    """As on CUDA, where every pass has the same number of rows; the last one is filled up."""
    pairs = [(query, CORPUS.contents(i)) for query in QUERIES for i in range(5)]
    one_by_one = encoder.scores(pairs)
    rows = [encoder._tokens(*pair) for pair in pairs]
    assert encoder._forward(rows, 64, 32) == pytest.approx(one_by_one, abs=1e-4)


def test_only_the_passage_is_cut(encoder):
    query = "capital river novel"
    ids = encoder._tokenizer(query, add_special_tokens=False)["input_ids"]
    row = encoder._tokens(query, "bridges " * 500)["input_ids"]
    assert len(row) == 64
    assert row[1 : 1 + len(ids)] == ids
    long_query = encoder._tokens("river " * 500, "bridges " * 500)
    assert len(long_query["input_ids"]) == 64
    assert long_query["token_type_ids"].count(0) == 32 + 2  # half the room, and the special tokens round it


def test_each_query_is_paired_with_its_own_passages_only(encoder):
    """Not with those of the whole batch, as in a published rerank server."""
    answers = {"a": ["p00", "p01"], "b": ["p02"]}

    class Fixed:
        name = "fixed"

        def search(self, requests):
            return [[Hit(CORPUS.by_id(id_), 1.0) for id_ in answers[request.query]] for request in requests]

        def cache_key(self, request):
            return request.query

    counting = Counting(encoder)
    found = Rerank(Fixed(), counting).search([SearchRequest("a", 5), SearchRequest("b", 5)])
    assert [sorted(hit.passage.id for hit in hits) for hits in found] == [["p00", "p01"], ["p02"]]
    expected = [(query, CORPUS.contents(CORPUS.ids.index(id_))) for query, ids in answers.items() for id_ in ids]
    assert counting.pairs == expected


def test_the_order_is_that_of_the_scores_over_the_candidates(folder, encoder):
    inner = BM25Retriever(CORPUS)
    [hits] = Rerank(inner, encoder, candidates=6).search([SearchRequest("capital river", 3)])
    [candidates] = inner.search([SearchRequest("capital river", 6)])
    scores = {hit.passage.id: direct_score(folder, "capital river", f'"{hit.passage.title}"\n{hit.passage.text}') for hit in candidates}
    assert [hit.passage.id for hit in hits] == sorted(scores, key=lambda id_: (-scores[id_], id_))[:3]
    assert [hit.score for hit in hits] == pytest.approx(sorted(scores.values(), reverse=True)[:3], abs=1e-5)


def test_more_than_the_candidates_are_reranked_where_more_are_wanted(encoder):
    [hits] = Rerank(BM25Retriever(CORPUS), encoder, candidates=2).search([SearchRequest("capital river", 7)])
    assert len(hits) == 7


def test_a_pair_is_scored_once_and_the_oldest_are_forgotten(encoder):
    counting = Counting(encoder)
    retriever = Rerank(BM25Retriever(CORPUS), counting, candidates=4, memo_entries=4)
    requests = [SearchRequest("river", 2), SearchRequest("river", 3), SearchRequest("river", 2)]
    first = retriever.search(requests)
    assert len(counting.pairs) == 4
    assert retriever.search(requests) == first
    assert len(counting.pairs) == 4
    retriever.search([SearchRequest("novel", 1)])
    assert retriever.search(requests) == first
    assert len(counting.pairs) == 12


def test_equal_scores_come_in_the_order_of_ids(encoder):
    twins = Corpus.from_passages((id_, "City", "The same river.") for id_ in ("9", "10", "a"))
    [hits] = Rerank(BM25Retriever(twins), encoder).search([SearchRequest("river", 3)])
    assert [hit.passage.id for hit in hits] == ["10", "9", "a"]


def test_a_passage_that_changed_under_its_id_is_scored_anew(encoder):
    texts = iter(["river", "bridges and a capital"])

    class Changing:
        name = "changing"

        def search(self, requests):
            text = next(texts)
            return [[Hit(Passage("1", "T", text), 1.0)] for _ in requests]

        def cache_key(self, request):
            return request.query

    retriever = Rerank(Changing(), encoder)
    [[first]], [[second]] = (retriever.search([SearchRequest("river", 1)]) for _ in range(2))
    assert first.score != second.score


def test_a_configuration_gives_the_same_retriever(folder):
    config = {"name": "rerank", "retriever": "bm25", "model": folder, "candidates": 5, "device": "cpu", "max_tokens": 64}
    built = build_retriever({**config, "cache_entries": 0}, CORPUS)
    requests = [SearchRequest(query, 3) for query in QUERIES]
    expected = Rerank(BM25Retriever(CORPUS), CrossEncoder(folder, "cpu", max_tokens=64), 5)
    assert built.search(requests) == expected.search(requests)
    stamp = built.stamp()
    assert stamp == json.loads(json.dumps(stamp))
    assert (stamp["retriever"], stamp["candidates"], stamp["inner"]["retriever"]) == ("rerank", 5, "bm25")
    assert pickle.loads(pickle.dumps(built)).search(requests) == built.search(requests)


def test_the_fingerprint_tells_weights_and_settings_apart_but_not_places(folder, encoder, tmp_path):
    assert CrossEncoder(save_model(tmp_path / "same"), "cpu", max_tokens=64).fingerprint == encoder.fingerprint
    assert CrossEncoder(save_model(tmp_path / "other", seed=1), "cpu", max_tokens=64).fingerprint != encoder.fingerprint
    assert CrossEncoder(folder, "cpu", max_tokens=32).fingerprint != encoder.fingerprint


@pytest.mark.parametrize("options", [{"device": "zz"}, {"device": 5}, {"device": ""}, {"model": 5}, {"dtype": 5}, {"max_tokens": "64"}])
def test_the_class_itself_refuses_other_types(options, folder):
    with pytest.raises(RetrieverError, match=next(iter(options))):
        CrossEncoder(**{"model": folder, "max_tokens": 64, **options})


def test_models_that_are_no_cross_encoders_are_refused(tmp_path, minilm_folder):
    with pytest.raises(RetrieverError, match=r"one output, but .* has 2"):
        CrossEncoder(save_model(tmp_path / "two", outputs=2), "cpu", max_tokens=64)
    with pytest.raises(RetrieverError, match="cannot load"):
        CrossEncoder(str(tmp_path / "nothing"), "cpu")
    with pytest.raises(RetrieverError):
        CrossEncoder(minilm_folder, "cpu")  # an encoder without a classifier


def test_weights_that_give_no_number_are_an_error(tmp_path):
    encoder = CrossEncoder(save_model(tmp_path / "damaged"), "cpu", max_tokens=64)
    encoder._network.classifier.bias.data.fill_(float("nan"))
    with pytest.raises(RetrieverError, match="not finite"):
        encoder.scores([("a", "b")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retriever": "bm25", "candidates": 0}, "candidates.*0"),
        ({"retriever": "bm25", "memo_entries": 0}, "memo_entries.*0"),
        ({"retriever": "bm25", "max_tokens": 8}, "max_tokens.*8"),
        ({"retriever": "bm25", "max_tokens": 512}, "128 positions"),
        ({"retriever": "bm25", "dtype": "int8"}, "dtype.*int8"),
        ({"retriever": "bm25", "device": "zz"}, "device.*'zz'"),
        ({"retriever": "bm25", "device": 5}, "device.*5"),
        ({"retriever": "bm25", "model": "nowhere", "candidates": 0}, "candidates.*0"),  # before the model is loaded
        ({}, "needs the option retriever"),
    ],
)
def test_settings_out_of_range_are_errors(options, message, folder):
    with pytest.raises(RetrieverError, match=message):
        build_retriever({"name": "rerank", "model": folder, "device": "cpu", "max_tokens": 64, **options}, CORPUS)
