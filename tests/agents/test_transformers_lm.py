"""Generation: the cache changes nothing, samples do not depend on the batch, stops and noise are exact."""

import numpy as np
import pytest
import torch

from searchqa_agents.language_model import Sampling, Segment
from searchqa_agents.models import make_tiny_model
from searchqa_agents.transformers_lm import TransformersLM, sample
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers.byte import ByteTokenizer

TOKENIZER = ByteTokenizer()
STOP = ("</search>", "</answer>")


@pytest.fixture(scope="module")
def lm() -> TransformersLM:
    torch.set_num_threads(1)
    model = make_tiny_model(
        TOKENIZER.vocab_size,
        0,
        pad_id=TOKENIZER.pad_id,
        eos_id=TOKENIZER.eos_id,
        hidden_size=32,
        feed_forward_size=48,
        initializer_range=0.2,
    )
    return TransformersLM(model, TOKENIZER)


def play(lm, count, batch_size, sampling, turns=3):
    """Episodes of several turns with ragged environment text, some ending early: [(ids, mask, logprobs, sampling_logprobs)] each."""
    rng = np.random.default_rng(0)
    contexts = [rng.integers(0, 256, rng.integers(3, 30)).astype(np.int32) for _ in range(count)]
    replies = [[rng.integers(0, 256, rng.integers(1, 40)).astype(np.int32) for _ in range(turns)] for _ in range(count)]
    masks = [np.zeros(len(context), dtype=np.int8) for context in contexts]
    segments: list[list[Segment]] = [[] for _ in range(count)]
    for first in range(0, count, batch_size):
        live = list(range(first, min(count, first + batch_size)))
        session = lm.start([100 + i for i in live], sampling)
        for turn in range(turns):
            generated = session.generate([i - first for i in live], [contexts[i] for i in live], [{} for _ in live])
            for i, segment in zip(live, generated, strict=True):
                segments[i].append(segment)
                contexts[i] = np.concatenate([contexts[i], segment.ids, replies[i][turn]])
                masks[i] = np.concatenate([masks[i], np.ones(len(segment.ids), np.int8), np.zeros(len(replies[i][turn]), np.int8)])
            live = [i for i in live if (i + turn) % 3]
            if not live:
                break
    return contexts, masks, segments


def full_forward_logprobs(lm, ids, mask, temperature=1.0):
    with torch.no_grad():
        logits = lm.logits(lm.hidden_states(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False))[0]
    logprobs = torch.log_softmax(logits[:-1] / temperature, -1).gather(-1, torch.from_numpy(ids[1:].astype(np.int64))[:, None])[:, 0]
    return logprobs.numpy()[mask[1:] == 1]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probabilities_from_the_cache_equal_one_full_forward_pass(lm, temperature):
    contexts, masks, segments = play(lm, 7, 7, Sampling(9, STOP, temperature))
    assert len({len(context) for context in contexts}) > 3  # ragged
    for ids, mask, own in zip(contexts, masks, segments, strict=True):
        assert np.concatenate([s.logprobs for s in own]) == pytest.approx(full_forward_logprobs(lm, ids, mask, temperature), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_samples_do_not_depend_on_the_batch(lm, batch_size):
    together, _, together_segments = play(lm, 8, 8, Sampling(12, STOP))
    apart, _, apart_segments = play(lm, 8, batch_size, Sampling(12, STOP))
    for a, b in zip(together, apart, strict=True):
        assert a.tolist() == b.tolist()
    for a, b in zip(together_segments, apart_segments, strict=True):
        assert [x.logprobs for x in a] == [pytest.approx(x.logprobs, abs=1e-5) for x in b]


def test_other_seeds_and_positions_give_other_samples(lm):
    context = np.arange(10, dtype=np.int32)
    a, b = lm.start([1, 2], Sampling(12, ())).generate([0, 1], [context, context], [{}, {}])
    assert a.ids.tolist() != b.ids.tolist()
    assert len(set(a.ids.tolist())) > 3


def test_only_new_tokens_are_fed_each_turn(lm, monkeypatch):
    fed = []
    original = lm.hidden_states
    monkeypatch.setattr(lm, "hidden_states", lambda ids, **kwargs: fed.append(ids.shape[1]) or original(ids, **kwargs))
    session = lm.start([5], Sampling(3, ()))
    context = np.arange(30, dtype=np.int32)
    [segment] = session.generate([0], [context], [{}])
    assert fed == [30, 1, 1]
    session.generate([0], [np.concatenate([context, segment.ids, np.arange(4, dtype=np.int32)])], [{}])
    assert fed[3:] == [5, 1, 1]  # the last sampled id and the reply


def test_ids_that_the_environment_dropped_are_forgotten(lm):
    session = lm.start([5, 6], Sampling(6, ()))
    context = np.arange(12, dtype=np.int32)
    first, second = session.generate([0, 1], [context, context], [{}, {}])
    cut = np.concatenate([context, first.ids[:2], np.array([9, 8, 7], dtype=np.int32)])
    whole = np.concatenate([context, second.ids, np.array([9, 8, 7], dtype=np.int32)])
    again = session.generate([0, 1], [cut, whole], [{}, {}])
    for ids, segment in ((cut, again[0]), (whole, again[1])):
        mask = np.r_[np.zeros(len(ids), np.int8), np.ones(len(segment.ids), np.int8)]
        assert segment.logprobs == pytest.approx(full_forward_logprobs(lm, np.concatenate([ids, segment.ids]), mask), abs=1e-5)


class Parrot(TransformersLM):
    """A model whose next token is given: what is tested is where it stops."""

    def __init__(self, lm, text):
        super().__init__(lm.model, lm.tokenizer)
        self.text, self.calls = text, 0

    def logits(self, hidden):
        logits = torch.full((hidden.shape[0], TOKENIZER.vocab_size), -50.0)
        logits[:, self.text[self.calls]] = 50.0
        self.calls += 1
        return logits


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([*b"a</search> more"], [*b"a</search>"]),  # byte by byte: the tag's last byte
        (TOKENIZER.encode("<search>x</search>y"), TOKENIZER.encode("<search>x</search>")),  # the tag as one token
        ([*b"</sear", *b"</answer>", *b"x"], [*b"</sear</answer>"]),  # a tag begun and dropped
        ([*b"ab", TOKENIZER.eos_id, *b"cd"], [*b"ab", TOKENIZER.eos_id]),  # end of sequence is kept
        ([*b"</information></think>" * 3], [*b"</information></think>" * 3][:24]),  # other tags do not stop; the longest segment does
    ],
)
def test_generation_stops_at_the_token_that_completes_a_closing_tag(lm, ids, expected):
    parrot = Parrot(lm, ids)
    [segment] = parrot.start([0], Sampling(24, STOP)).generate([0], [np.arange(5, dtype=np.int32)], [{}])
    assert segment.ids.tolist() == expected


def test_greedy_takes_the_most_likely_token_and_reports_plain_log_probabilities(lm):
    contexts, masks, segments = play(lm, 4, 4, Sampling(5, STOP, temperature=0))
    for ids, mask, own in zip(contexts, masks, segments, strict=True):
        assert np.concatenate([s.logprobs for s in own]) == pytest.approx(full_forward_logprobs(lm, ids, mask), abs=1e-5)
    again, _, _ = play(lm, 4, 2, Sampling(5, STOP, temperature=0))
    assert [c.tolist() for c in contexts] == [c.tolist() for c in again]


def test_padding_is_never_sampled_even_when_the_model_wants_it(lm):
    hidden = torch.zeros(1, 32)
    with torch.no_grad():
        assert lm.logits(hidden)[0, TOKENIZER.pad_id] < -1e8


def test_samples_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    count = 20_000
    tokens, logprobs, truncated = sample(
        logits.expand(count, 4), torch.full((count,), 17), torch.arange(count), Sampling(1, (), temperature=0.5)
    )
    expected = torch.softmax(logits[0] / 0.5, -1)
    statistic = ((torch.bincount(tokens, minlength=4) - expected * count).square() / (expected * count)).sum()
    assert statistic < 16.27  # chi-square with 3 degrees of freedom: exceeded once in 1,000 seeds
    assert torch.allclose(logprobs, expected.log()[tokens])
    assert truncated is None


def test_top_k_and_top_p_cut_and_both_log_probabilities_are_kept():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(2000, 4)
    seeds, positions = torch.zeros(2000, dtype=torch.int64), torch.arange(2000)
    tokens, full, cut = sample(logits, seeds, positions, Sampling(1, (), top_k=3, top_p=0.8))
    assert set(tokens.tolist()) == {0, 1}  # of the three left, two have a mass of .84 >= .8
    assert torch.allclose(full, logits[0].log_softmax(-1)[tokens])
    assert torch.allclose(cut, torch.log(torch.tensor([0.625, 0.375]))[tokens])
    tokens, _, _ = sample(logits, seeds, positions, Sampling(1, (), top_p=0.01))
    assert set(tokens.tolist()) == {0}  # the most likely token always stays


def test_impossible_settings_are_refused(lm):
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}):
        with pytest.raises(ConfigurationError, match="Sampling needs"):
            Sampling(4, (), **wrong)
    small = make_tiny_model(10, 0, pad_id=0, eos_id=1, hidden_size=32, feed_forward_size=48)
    with pytest.raises(ConfigurationError, match="must know every id of the tokenizer"):
        TransformersLM(small, TOKENIZER)
