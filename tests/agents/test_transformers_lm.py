"""Generation: whatever is fed together, shared, reused or interrupted, a row writes what it would alone; samples, stops and log-probabilities are exact."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from searchqa_agents import slot_cache
from searchqa_agents.language_model import Sampling, Segment
from searchqa_agents.models import make_tiny_model
from searchqa_agents.transformers_lm import NotANumberError, TransformersLM, _Stops, draw, sample, uniform_noise
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers.byte import ByteTokenizer

TOKENIZER = ByteTokenizer()
STOP = ("</search>", "</answer>")
SHAPE = {
    "vocab_size": TOKENIZER.vocab_size,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": TOKENIZER.pad_id,
    "eos_token_id": TOKENIZER.eos_id,
    "bos_token_id": None,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=TOKENIZER.vocab_size,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=TOKENIZER.eos_id,
        )
    ),
}


def tiny(name: str = "qwen2", attention: str = "sdpa") -> TransformersLM:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MODELS[name]()
    model.set_attn_implementation(attention)
    return TransformersLM(model, TOKENIZER)


@pytest.fixture(scope="module")
def lm() -> TransformersLM:
    return tiny()


def ids(*values):
    return np.array([value for part in values for value in np.atleast_1d(part)], dtype=np.int32)


def play(lm, count, together, sampling, turns=3):
    """Episodes of several turns with ragged environment text, some ending early: contexts, masks and segments of each."""
    rng = np.random.default_rng(0)
    contexts = [rng.integers(0, 256, rng.integers(3, 30)).astype(np.int32) for _ in range(count)]
    replies = [[rng.integers(0, 256, rng.integers(1, 40)).astype(np.int32) for _ in range(turns)] for _ in range(count)]
    masks = [np.zeros(len(context), dtype=np.int8) for context in contexts]
    segments: list[list[Segment]] = [[] for _ in range(count)]
    session = lm.start(range(100, 100 + count), sampling)
    for first in range(0, count, together):
        live = list(range(first, min(count, first + together)))
        for turn in range(turns):
            generated = session.generate(live, [contexts[i] for i in live], [{} for _ in live])
            for i, segment in zip(live, generated, strict=True):
                segments[i].append(segment)
                contexts[i] = ids(contexts[i], segment.ids, replies[i][turn])
                masks[i] = np.concatenate([masks[i], np.ones(len(segment.ids), np.int8), np.zeros(len(replies[i][turn]), np.int8)])
            session.release([i for i in live if not (i + turn) % 3])
            live = [i for i in live if (i + turn) % 3]
            if not live:
                break
        session.release(live)
    return contexts, masks, segments


def full_forward_logprobs(lm, context, mask, temperature=1.0):
    with torch.no_grad():
        logits = lm.logits(lm.hidden_states(torch.from_numpy(context.astype(np.int64))[None], use_cache=False))[0]
    logprobs = torch.log_softmax(logits[:-1] / temperature, -1).gather(-1, torch.from_numpy(context[1:].astype(np.int64))[:, None])[:, 0]
    return logprobs.numpy()[mask[1:] == 1]


# -- the cache -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_log_probabilities_from_the_cache_equal_one_full_forward_pass(name, temperature):
    lm = tiny(name, attention="eager" if temperature == 1.0 else "sdpa")
    contexts, masks, segments = play(lm, 7, 4, Sampling(9, STOP, temperature))
    assert len({len(context) for context in contexts}) > 3  # ragged
    for context, mask, own in zip(contexts, masks, segments, strict=True):
        assert np.concatenate([s.logprobs for s in own]) == pytest.approx(full_forward_logprobs(lm, context, mask, temperature), abs=1e-5)
    assert lm.model.config._attn_implementation in ("eager", "sdpa")  # the model's own attention is back


@pytest.mark.parametrize("calls", [0, 2**40])
def test_decoding_row_by_row_equals_decoding_all_slots_in_one_call(lm, calls, monkeypatch):
    monkeypatch.setattr(slot_cache, "_CALL_FLOATS", calls)
    contexts, masks, segments = play(lm, 6, 6, Sampling(9, STOP))
    for context, mask, own in zip(contexts, masks, segments, strict=True):
        assert np.concatenate([s.logprobs for s in own]) == pytest.approx(full_forward_logprobs(lm, context, mask), abs=1e-5)


@pytest.mark.parametrize("limit", [1, 7, 300])
def test_long_contexts_are_fed_in_parts(lm, limit, monkeypatch):
    monkeypatch.setattr("searchqa_agents.transformers_lm._FEED_TOKENS", {"cpu": limit})
    rng = np.random.default_rng(1)
    contexts = [rng.integers(0, 256, length).astype(np.int32) for length in (290, 3, 40)]
    for context, segment in zip(contexts, lm.start([1, 2, 3], Sampling(4, ())).generate(range(3), contexts, [{}] * 3), strict=True):
        mask = np.r_[np.zeros(len(context), np.int8), np.ones(4, np.int8)]
        assert segment.logprobs == pytest.approx(full_forward_logprobs(lm, ids(context, segment.ids), mask), abs=1e-5)


class Episode:
    """What a row of the schedules below goes through: a prompt that may begin like others', and replies that may drop ids of a segment."""

    def __init__(self, row, group, turns):
        rng = np.random.default_rng([row, turns])
        own = [] if turns % 2 else rng.integers(0, 256, row % 4)  # some have the group's prompt and no more
        self.context = ids(np.arange(20), np.random.default_rng(group).integers(0, 256, 15), own)
        self.replies = [rng.integers(0, 256, rng.integers(1, 30)) for _ in range(turns)]
        self.dropped = rng.integers(0, 3, turns)
        self.segments = []

    def add(self, segment):
        turn = len(self.segments)
        self.segments.append(segment)
        kept = max(1, len(segment.ids) - int(self.dropped[turn]))
        self.context = ids(self.context, segment.ids[:kept], self.replies[turn])

    @property
    def ended(self):
        return len(self.segments) == len(self.replies)


@torch.inference_mode()
def scribble(session):
    """Change every cell that no row has: what a slot's last row left, and what padding wrote."""
    for layer in session._cache.layers:
        for slot, known in enumerate(session._known):
            layer.keys[slot, :, len(known) :] = 50
            layer.values[slot, :, len(known) :] = 50


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=9), st.integers(1, 5), st.randoms(use_true_random=False)
)
def test_a_row_writes_the_same_alone_and_in_any_schedule(lm, shapes, places, random):
    sampling = Sampling(8, ("e", "t", "\x00"))  # many segments end early
    alone = [Episode(row, *shape) for row, shape in enumerate(shapes)]
    for row, episode in enumerate(alone):
        session = lm.start([row], sampling)
        while not episode.ended:
            episode.add(session.generate([0], [episode.context], [{}])[0])
    mixed = [Episode(row, *shape) for row, shape in enumerate(shapes)]
    session = lm.start(range(len(mixed)), sampling)
    waiting, asked, answered = list(range(len(mixed))), set(), []
    while waiting or asked or answered:
        while waiting and len(asked) + len(answered) < places:
            answered.append(waiting.pop(0))
        random.shuffle(answered)
        now = answered[: random.randint(0 if asked else 1, len(answered))]
        if not asked:
            scribble(session)
        session.submit(now, [mixed[row].context for row in now], [{}] * len(now))
        answered = [row for row in answered if row not in now]
        asked |= set(now)
        for row, segment in session.collect():
            asked.remove(row)
            mixed[row].add(segment)
            if mixed[row].ended:
                session.release([row])
            else:
                answered.append(row)
    for a, b in zip(alone, mixed, strict=True):
        assert a.context.tolist() == b.context.tolist()
        for x, y in zip(a.segments, b.segments, strict=True):
            assert x.ids.tolist() == y.ids.tolist()
            assert x.logprobs == pytest.approx(y.logprobs, abs=1e-5)


def count_fed(lm, monkeypatch):
    fed = []
    original = lm.hidden_states
    monkeypatch.setattr(lm, "hidden_states", lambda tokens, **kwargs: fed.append(tokens.numel()) or original(tokens, **kwargs))
    return fed


def test_only_new_tokens_are_fed_each_turn(lm, monkeypatch):
    fed = count_fed(lm, monkeypatch)
    session = lm.start([5], Sampling(3, ()))
    context = np.arange(30, dtype=np.int32)
    [segment] = session.generate([0], [context], [{}])
    assert fed == [30, 1, 1]
    session.generate([0], [ids(context, segment.ids, np.arange(4))], [{}])
    assert fed[3:] == [5, 1, 1]  # the last sampled id and the reply


def test_the_prompt_of_a_group_is_fed_once_also_for_members_that_come_later(lm, monkeypatch):
    fed = count_fed(lm, monkeypatch)
    preamble, a, b = np.arange(50), np.arange(100, 120), np.arange(130, 140)
    contexts = [ids(preamble, a)] * 3 + [ids(preamble, b)] * 2
    session = lm.start(range(7), Sampling(1, ()))
    session.generate(range(5), contexts, [{}] * 5)
    assert fed == [70, 10]  # the first prompt, and what is new of the second one
    session.release(range(5))
    session.generate([5, 6], [contexts[0], contexts[4]], [{}, {}])  # slots were freed, but hold their prompts
    assert fed[2:] == [2]  # the last token of each, for its hidden state


def test_ids_that_the_environment_dropped_are_forgotten(lm):
    session = lm.start([5, 6], Sampling(6, ()))
    context = np.arange(12, dtype=np.int32)
    first, second = session.generate([0, 1], [context, context], [{}, {}])
    cut = ids(context, first.ids[:2], [9, 8, 7])
    whole = ids(context, second.ids, [9, 8, 7])
    again = session.generate([0, 1], [cut, whole], [{}, {}])
    for kept, segment in ((cut, again[0]), (whole, again[1])):
        mask = np.r_[np.zeros(len(kept), np.int8), np.ones(len(segment.ids), np.int8)]
        assert segment.logprobs == pytest.approx(full_forward_logprobs(lm, ids(kept, segment.ids), mask), abs=1e-5)


def test_segments_that_stopped_are_handed_over_while_others_are_written(lm):
    contexts = [np.random.default_rng(row).integers(0, 256, 9).astype(np.int32) for row in range(16)]
    session = lm.start(range(16), Sampling(60, ("a", "e", "i", "o", "u", "\x00", "\x01")))
    session.submit(range(16), contexts, [{}] * 16)
    first = dict(session.collect())
    assert 2 <= len(first) < 16
    longest = max(len(segment.ids) for segment in first.values())
    rest = {}
    while written := session.collect():
        rest.update(written)
    assert sorted([*first, *rest]) == list(range(16))
    assert all(len(segment.ids) >= longest for segment in rest.values())


def test_an_interrupt_leaves_rows_that_can_be_submitted_again(lm, monkeypatch):
    contexts = [np.arange(row, row + 20, dtype=np.int32) for row in range(3)]
    expected = lm.start(range(3), Sampling(8, ())).generate(range(3), contexts, [{}] * 3)
    session = lm.start(range(3), Sampling(8, ()))
    calls = []

    def interrupted(hidden):
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return TransformersLM.logits(lm, hidden)

    monkeypatch.setattr(lm, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.generate(range(3), contexts, [{}] * 3)
    assert session.collect() == []
    for a, b in zip(session.generate(range(3), contexts, [{}] * 3), expected, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_rows_that_cannot_be_submitted_are_refused(lm):
    context = np.arange(4, dtype=np.int32)
    session = lm.start([0, 1], Sampling(2, ()))
    session.submit([0], [context], [{}])
    for rows in ([0], [2], [-1], [1, 1]):
        with pytest.raises(ValueError, match="rows must be different"):
            session.submit(rows, [context] * len(rows), [{}] * len(rows))
    session.release([0])
    assert session.collect() == []
    session.submit([0], [context], [{}])  # released, it begins again
    assert len(session.collect()) == 1


# -- models ----------------------------------------------------------------------------------------------------------------------------------


def test_models_that_forget_are_refused_and_a_longer_window_can_be_switched_off():
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=16))
    lm, context = TransformersLM(model, TOKENIZER), np.arange(4, dtype=np.int32)
    with pytest.raises(ConfigurationError, match="sliding_window"):
        lm.start([0], Sampling(2, ())).generate([0], [context], [{}])
    windows = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    with pytest.raises(ConfigurationError, match=r"layers of .*sliding_attention"):
        TransformersLM(Qwen2ForCausalLM(windows), TOKENIZER).start([0], Sampling(2, ()))
    for layer in model.model.layers:
        layer.self_attn.config.sliding_window = None
    assert len(lm.start([0], Sampling(2, ())).generate([0], [context], [{}])[0].ids) == 2


def test_a_broken_model_is_an_error(monkeypatch):
    lm = tiny()
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(NotANumberError, match="got NaN"):
        lm.start([0], Sampling(2, ())).generate([0], [np.arange(4, dtype=np.int32)], [{}])


def test_bfloat16_models_generate_and_sample_in_float32():
    lm = tiny()
    lm.model.to(torch.bfloat16)
    contexts, masks, segments = play(lm, 5, 3, Sampling(6, STOP))
    for context, mask, own in zip(contexts, masks, segments, strict=True):
        assert np.concatenate([s.logprobs for s in own]) == pytest.approx(full_forward_logprobs(lm, context, mask), abs=0.3)


def test_impossible_settings_are_refused():
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}):
        with pytest.raises(ConfigurationError, match="Sampling needs"):
            Sampling(4, (), **wrong)
    small = make_tiny_model(10, 0, pad_id=0, eos_id=1, hidden_size=32, feed_forward_size=48)
    with pytest.raises(ConfigurationError, match="must know every id of the tokenizer"):
        TransformersLM(small, TOKENIZER)


# -- stops -----------------------------------------------------------------------------------------------------------------------------------


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
    ("written", "expected"),
    [
        ([*b"a</search> more"], [*b"a</search>"]),  # byte by byte: the tag's last byte
        (TOKENIZER.encode("<search>x</search>y"), TOKENIZER.encode("<search>x</search>")),  # the tag as one token
        ([*b"</sear", *b"</answer>", *b"x"], [*b"</sear</answer>"]),  # a tag begun and dropped
        ([*b"ab", TOKENIZER.eos_id, *b"cd"], [*b"ab", TOKENIZER.eos_id]),  # end of sequence is kept
        ([*b"</information></think>" * 3], [*b"</information></think>" * 3][:24]),  # other tags do not stop; the longest segment does
    ],
)
def test_generation_stops_at_the_token_that_completes_a_closing_tag(lm, written, expected):
    parrot = Parrot(lm, written)
    [segment] = parrot.start([0], Sampling(24, STOP)).generate([0], [np.arange(5, dtype=np.int32)], [{}])
    assert segment.ids.tolist() == expected


class Pieces:
    """A tokenizer with the given pieces."""

    eos_id = -1

    def __init__(self, pieces):
        self._table = pieces

    def pieces(self, tokens):
        return [self._table[token] for token in tokens]


@given(
    st.lists(st.text("ab<>/", min_size=0, max_size=4), min_size=1, max_size=30),
    st.lists(st.text("ab<>/", min_size=1, max_size=5), max_size=3),
)
def test_a_stop_string_is_found_however_it_is_cut_into_tokens(pieces, stops):
    finder = _Stops(Pieces([piece.encode() for piece in pieces]), stops)
    tail = b""
    for token in range(len(pieces)):
        tail, stopped = finder.after(tail, token)
        assert stopped == any(stop in "".join(pieces[: token + 1]) for stop in stops)
        if stopped:
            break


# -- sampling --------------------------------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_most_likely_token_and_reports_plain_log_probabilities(lm):
    contexts, masks, segments = play(lm, 4, 4, Sampling(5, STOP, temperature=0))
    for context, mask, own in zip(contexts, masks, segments, strict=True):
        assert np.concatenate([s.logprobs for s in own]) == pytest.approx(full_forward_logprobs(lm, context, mask), abs=1e-5)
    again, _, _ = play(lm, 4, 2, Sampling(5, STOP, temperature=0))
    assert [c.tolist() for c in contexts] == [c.tolist() for c in again]


def test_padding_is_never_sampled_even_when_the_model_wants_it(lm):
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            assert lm.logits(torch.zeros(1, 32))[0, TOKENIZER.pad_id] < -1e8


def test_other_seeds_and_positions_give_other_samples(lm):
    context = np.arange(10, dtype=np.int32)
    a, b = lm.start([1, 2], Sampling(12, ())).generate([0, 1], [context, context], [{}, {}])
    assert a.ids.tolist() != b.ids.tolist()
    assert len(set(a.ids.tolist())) > 3


def chi_square(tokens, probabilities):
    expected = probabilities.double() * len(tokens)
    return float(((torch.bincount(tokens, minlength=len(expected)) - expected).square() / expected).sum())


@pytest.mark.parametrize("size", [4, 300])
def test_samples_follow_the_softmax_over_positions_and_over_seeds(size):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size))
    count = 40_000
    many = torch.arange(count)
    one = torch.full((count,), 17)
    expected = torch.softmax(logits / 0.5, -1)
    degrees = size - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3  # exceeded once in 1,000 (Wilson and Hilferty 1931)
    for seeds, positions in ((one, many), (many, one)):
        tokens, logprobs, truncated = sample(logits.expand(count, size), seeds, positions, Sampling(1, (), temperature=0.5))
        assert chi_square(tokens, expected) < limit
        assert torch.allclose(logprobs, expected.log()[tokens], atol=1e-6)
        assert truncated is None


def test_noise_is_uniform_and_independent_of_the_position_before():
    noise = uniform_noise(torch.arange(200).repeat_interleave(100), torch.arange(100).repeat(200)).reshape(200, 100)
    counts = torch.histc(noise, 50, 0, 1)
    assert ((counts - 400).square() / 400).sum() < 85.4  # 49 degrees of freedom, once in 1,000
    assert noise.unique().numel() == noise.numel()
    assert abs(torch.corrcoef(torch.stack([noise[:, 1:].flatten(), noise[:, :-1].flatten()]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([noise[1:].flatten(), noise[:-1].flatten()]))[0, 1]) < 0.03


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(2.0**-100, 1, width=32)), min_size=1, max_size=400).filter(any),
    st.one_of(st.sampled_from([0.0, 1 - 2.0**-53]), st.floats(0, 1, exclude_max=True)),
)
def test_draw_inverts_the_distribution_function_and_never_takes_a_token_of_probability_zero(weights, noise):
    row = torch.tensor([weights], dtype=torch.float32)
    token = int(draw(row, torch.tensor([noise], dtype=torch.float64)))
    assert row[0, token] > 0
    sums = np.cumsum(row[0].double().numpy())
    tolerance = 1e-6 * sums[-1]  # sums over blocks are float32
    assert (sums[token - 1] if token else 0.0) - tolerance <= noise * sums[-1] <= sums[token] + tolerance


def test_top_k_and_top_p_cut_and_both_log_probabilities_are_kept():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(2000, 4)
    seeds, positions = torch.zeros(2000, dtype=torch.int64), torch.arange(2000)
    tokens, full, cut = sample(logits, seeds, positions, Sampling(1, (), top_k=3, top_p=0.8))
    assert set(tokens.tolist()) == {0, 1}  # of the three left, two have a mass of .84 >= .8
    assert torch.allclose(full, logits[0].log_softmax(-1)[tokens])
    assert torch.allclose(cut, torch.log(torch.tensor([0.625, 0.375]))[tokens])
    assert chi_square(tokens, torch.tensor([0.625, 0.375])) < 10.8  # 1 degree of freedom, once in 1,000
    tokens, _, _ = sample(logits, seeds, positions, Sampling(1, (), top_p=0.01))
    assert set(tokens.tolist()) == {0}  # the most likely token always stays


@settings(deadline=None)
@given(st.integers(2, 300), st.integers(0, 40), st.floats(0.05, 1), st.floats(0.3, 2), st.integers(0, 2**31))
def test_truncation_keeps_what_its_definition_keeps(size, top_k, top_p, temperature, seed):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3
    sampling = Sampling(1, (), temperature, top_p, top_k)
    tokens, full, cut = sample(logits.expand(50, size), torch.full((50,), seed), torch.arange(50), sampling)
    expected = torch.softmax(logits.double() / temperature, -1)
    kept = torch.zeros(size, dtype=torch.bool)
    order = expected.argsort(descending=True)[: top_k or size]
    mass, whole = 0.0, float(expected[order].sum())
    for token in order.tolist():
        if mass / whole >= top_p:
            break
        kept[token] = True
        mass += float(expected[token])
    edge = abs(mass / whole - top_p) < 1e-5 or abs((mass - float(expected[kept].min())) / whole - top_p) < 1e-5  # rounding decides
    if not edge:
        assert kept[tokens].all()
        if cut is not None:
            assert torch.allclose(cut.double(), (expected / mass).log()[tokens], atol=1e-4)
    assert torch.allclose(full.double(), expected.log()[tokens], atol=1e-4)
    assert (cut is None) == (not sampling.truncated)


def test_truncated_episodes_record_both_log_probabilities(lm):
    contexts, masks, segments = play(lm, 5, 3, Sampling(9, STOP, top_p=0.8, top_k=20))
    for context, mask, own in zip(contexts, masks, segments, strict=True):
        full = np.concatenate([s.logprobs for s in own])
        assert full == pytest.approx(full_forward_logprobs(lm, context, mask), abs=1e-5)
        assert (np.concatenate([s.sampling_logprobs for s in own]) > full).all()
