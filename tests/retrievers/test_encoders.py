"""Encoder: the published recipe of each model, against plain transformers; vectors that depend on their own text alone."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="encoders need PyTorch")
pytest.importorskip("transformers", reason="encoders need transformers")
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

from searchqa_retrievers import RetrieverError
from searchqa_retrievers.encoders import ENCODER_PRESETS, Encoder, EncoderSettings
from searchqa_retrievers.testing import HOSTILE_QUERIES

TEXTS = (
    "Marie Curie was a physicist born in Warsaw.",
    "",
    "The Vistula is the longest river of Poland; it flows into the Baltic Sea. " * 6,
    "Łódź 東京",
    "Paris",
    "word " * 400,
)


@pytest.fixture(scope="module")
def minilm(minilm_folder):
    return Encoder("minilm", model=minilm_folder, device="cpu")


def plain_vectors(folder, texts, pooling, max_tokens):
    """One text at a time and without padding, straight from transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    vectors = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state[0]
        pooled = hidden.mean(dim=0) if pooling == "mean" else hidden[0]
        vectors.append((pooled / pooled.norm()).numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("preset", ["e5", "search-r1", "bge", "minilm"])
def test_every_preset_follows_its_published_recipe(minilm_folder, preset):
    """The weights are those of MiniLM for all; prefixes, pooling and length are the preset's."""
    recipe = {
        "e5": ("query: ", "passage: ", "mean", 512),
        "search-r1": ("query: ", "passage: ", "mean", 256),
        "bge": ("Represent this sentence for searching relevant passages: ", "", "cls", 512),
        "minilm": ("", "", "mean", 256),
    }
    query_prefix, passage_prefix, pooling, max_tokens = recipe[preset]
    encoder = Encoder(preset, model=minilm_folder, device="cpu")
    expected = plain_vectors(minilm_folder, [query_prefix + text for text in TEXTS], pooling, max_tokens)
    np.testing.assert_allclose(encoder.encode_queries(TEXTS), expected, atol=2e-6)
    expected = plain_vectors(minilm_folder, [passage_prefix + text for text in TEXTS], pooling, max_tokens)
    np.testing.assert_allclose(encoder.encode_passages(TEXTS), expected, atol=2e-6)


def test_vectors_are_those_of_sentence_transformers(minilm_folder, minilm):
    library = pytest.importorskip("sentence_transformers", reason="the second reference is not installed")
    expected = library.SentenceTransformer(minilm_folder, device="cpu").encode(list(TEXTS))
    np.testing.assert_allclose(minilm.encode_passages(TEXTS), expected, atol=2e-6)


def test_vectors_are_of_unit_length_and_float32(minilm):
    vectors = minilm.encode_queries(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), minilm.dimension) == (len(TEXTS), 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert minilm.encode_queries([]).shape == (0, 384)


@pytest.mark.parametrize(
    ("query", "near", "far"),
    [
        ("who wrote the novel", "The book's author is Jane Austen.", "The river flows into the sea."),
        ("capital city of France", "Paris is the French capital.", "Warsaw is on the Vistula."),
        ("a doctor treats patients", "The physician cares for the sick.", "The engine burns petrol."),
        ("how tall is the mountain", "The peak is 4,810 metres high.", "The recipe needs two eggs."),
    ],
)
def test_related_texts_are_nearer_than_unrelated_ones(minilm, query, near, far):
    vector = minilm.encode_queries([query])[0]
    close, distant = minilm.encode_passages([near, far]) @ vector
    assert close > distant + 0.2


@given(
    st.lists(
        st.lists(st.sampled_from(["river", "city", "of", "the", "1867", "Poland", "naïve", "a", "b"]), max_size=40).map(" ".join),
        min_size=1,
        max_size=6,
    ),
    st.integers(min_value=1, max_value=600),
)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_vector_depends_on_its_own_text_alone(minilm_folder, minilm, texts, batch_tokens):
    """Not on its neighbours, on the order, nor on the size of the batches: queries on the CPU bit for bit, passages up to rounding."""
    alone = np.concatenate([minilm.encode_queries([text]) for text in texts])
    before, minilm.batch_tokens = minilm.batch_tokens, batch_tokens
    try:
        assert np.array_equal(minilm.encode_queries(texts), alone)
        assert np.array_equal(minilm.encode_queries([*texts, "x " * 200])[: len(texts)], alone)
        assert np.array_equal(minilm.encode_queries(texts[::-1])[::-1], alone)
        np.testing.assert_allclose(minilm.encode_passages([*texts, "x " * 200])[: len(texts)], alone, atol=1e-6)
    finally:
        minilm.batch_tokens = before


def test_hostile_texts_have_vectors(minilm):
    vectors = minilm.encode_queries(HOSTILE_QUERIES)
    assert np.isfinite(vectors).all()
    assert len(vectors) == len(HOSTILE_QUERIES)


def test_bfloat16_is_near_float32(minilm_folder, minilm):
    rough = Encoder("minilm", model=minilm_folder, device="cpu", dtype="bfloat16")
    assert rough.fingerprint == minilm.fingerprint
    assert np.einsum("nd,nd->n", rough.encode_queries(TEXTS), minilm.encode_queries(TEXTS)).min() > 0.999
    assert not np.array_equal(rough.encode_queries(TEXTS), minilm.encode_queries(TEXTS))


def test_a_pass_of_queries_on_an_accelerator_has_the_same_shape_whatever_is_in_the_call(minilm, monkeypatch):
    """Shapes are those of an accelerator, the arithmetic is the CPU's, where the vectors must be the same up to rounding."""
    alone = minilm.encode_queries(TEXTS)
    monkeypatch.setattr(minilm, "_query_rows", 32)
    shapes = []
    hook = minilm._network.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    try:
        np.testing.assert_allclose(minilm.encode_queries(["Paris"]), alone[4:5], atol=1e-6)
        assert shapes == [(32, 16)]
        np.testing.assert_allclose(minilm.encode_queries(["Paris", "river"] * 17), minilm.encode_queries(["Paris", "river"])[[0, 1] * 17])
        assert shapes == [(32, 16)] * 4  # 34 queries are two passes
        np.testing.assert_allclose(minilm.encode_queries([TEXTS[0], TEXTS[3]]), alone[[0, 3]], atol=1e-6)
        monkeypatch.setattr(minilm, "batch_tokens", 100)
        del shapes[:]
        minilm.encode_queries(["Paris", "river"])
        assert shapes == [(6, 16)]  # 96 tokens
    finally:
        hook.remove()


def test_the_first_cpu_is_the_cpu(minilm_folder, minilm):
    named = Encoder("minilm", model=minilm_folder, device="cpu:0")
    assert named.device == "cpu"
    assert np.array_equal(named.encode_queries(TEXTS), minilm.encode_queries(TEXTS))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_vector_of_a_query_does_not_depend_on_the_call(minilm_folder):
    fast = Encoder("minilm", model=minilm_folder)
    together = fast.encode_queries([*TEXTS, *TEXTS[::-1]])
    assert np.array_equal(together[: len(TEXTS)], np.concatenate([fast.encode_queries([text]) for text in TEXTS]))
    assert np.array_equal(together[: len(TEXTS)], together[len(TEXTS) :][::-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_runs_in_bfloat16_near_the_cpu(minilm_folder, minilm):
    fast = Encoder("minilm", model=minilm_folder)
    assert (fast.device, fast.dtype) == ("cuda", "bfloat16")
    assert np.einsum("nd,nd->n", fast.encode_queries(TEXTS), minilm.encode_queries(TEXTS)).min() > 0.999


def test_the_fingerprint_knows_weights_and_settings_but_not_the_place(minilm_folder, minilm, tmp_path):
    copied = shutil.copytree(minilm_folder, tmp_path / "elsewhere")
    assert Encoder("minilm", model=str(copied), device="cpu").fingerprint == minilm.fingerprint
    for change in ({"pooling": "cls"}, {"max_tokens": 128}, {"query_prefix": "q: "}, {"passage_prefix": "p: "}):
        other = Encoder(replace(minilm.settings, **change), device="cpu")
        assert other.fingerprint != minilm.fingerprint
    model = AutoModel.from_pretrained(minilm_folder)
    layers = model.encoder.layer
    layers[2], layers[3] = layers[3], layers[2]  # the same weights at other places
    model.save_pretrained(tmp_path / "elsewhere")
    assert Encoder("minilm", model=str(copied), device="cpu").fingerprint != minilm.fingerprint
    layers[2], layers[3] = layers[3], layers[2]
    with torch.no_grad():
        layers[3].output.dense.bias[5] += 1e-3
    model.save_pretrained(tmp_path / "elsewhere")
    assert Encoder("minilm", model=str(copied), device="cpu").fingerprint != minilm.fingerprint


def test_threads_get_the_vectors_of_their_own_texts(minilm):
    expected = minilm.encode_queries(TEXTS)
    found = {}

    def ask(number):
        found[number] = minilm.encode_queries([TEXTS[number]])[0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(TEXTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(np.stack([found[number] for number in range(len(TEXTS))]), expected)


def test_a_pickled_encoder_gives_the_same_vectors(minilm):
    again = pickle.loads(pickle.dumps(minilm))
    assert again.fingerprint == minilm.fingerprint
    assert np.array_equal(again.encode_queries(TEXTS[:2]), minilm.encode_queries(TEXTS[:2]))


def test_a_model_that_lacks_weights_is_refused(minilm_folder, tmp_path):
    folder = shutil.copytree(minilm_folder, tmp_path / "deeper")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}))
    with pytest.raises(RetrieverError, match="lack"):
        Encoder("minilm", model=str(folder), device="cpu")


def test_vectors_that_are_not_finite_are_never_given(minilm_folder, tmp_path):
    model = AutoModel.from_pretrained(minilm_folder)
    with torch.no_grad():
        model.encoder.layer[5].output.LayerNorm.weight[0] = float("nan")
    folder = shutil.copytree(minilm_folder, tmp_path / "damaged")
    model.save_pretrained(folder)
    with pytest.raises(RetrieverError, match="NaN"):
        Encoder("minilm", model=str(folder), device="cpu").encode_queries(["river"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": "word2vec"}, "must be one of e5, search-r1, bge, minilm"),
        ({"settings": "minilm", "dtype": "int8"}, "dtype of an encoder"),
        ({"settings": 5}, "must be one of e5, search-r1, bge, minilm"),
        ({"settings": {"model": "x", "max_tokens": "5"}}, "max_tokens must be at least 8"),
        ({"settings": {"max_tokens": 64}}, "a mapping with 'model' and any of model, query_prefix"),
        ({"settings": "minilm", "model": 5}, "model of an encoder"),
        ({"settings": "minilm", "device": "zz"}, "device 'zz' of an encoder is not there"),
        ({"settings": "minilm", "device": "meta"}, "device 'meta' of an encoder is not there"),
        ({"settings": "minilm", "device": 0}, "device of an encoder must be a string"),
        ({"settings": "minilm", "batch_tokens": 0}, "batch_tokens"),
        ({"settings": "minilm", "batch_tokens": "5"}, "batch_tokens"),
        ({"settings": "minilm", "model": "/nowhere/at/all"}, "cannot load the encoder '/nowhere/at/all'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(RetrieverError, match=message):
        Encoder(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling": "max"}, "pooling must be"),
        ({"max_tokens": 2}, "max_tokens must be at least"),
        ({"max_tokens": "5"}, "max_tokens must be at least 8, a whole number"),
        ({"max_tokens": True}, "max_tokens must be at least 8, a whole number"),
        ({"query_prefix": 5}, "query_prefix of an encoder must be a string"),
        ({"passage_prefix": None}, "passage_prefix of an encoder must be a string"),
        ({"model": 5}, "model of an encoder must be a string"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(RetrieverError, match=message):
        EncoderSettings(**{"model": "model", **change})


def test_more_tokens_than_the_model_has_positions_are_refused(minilm_folder):
    with pytest.raises(RetrieverError, match="at most the 512 positions"):
        Encoder(replace(ENCODER_PRESETS["minilm"], model=minilm_folder, max_tokens=513), device="cpu")
