"""The language model on transformers, with its own decode loop.

The decode loop keeps the attention cache between turns, so that each token is fed once, and prompts that begin alike are fed once for all; rows join
and leave it one by one; it stops each row at the token that completes a closing tag; and a row's noise is a function of (seed, position), so that
its samples do not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from searchqa_agents.language_model import IntArray, Sampling, Segment, Session
from searchqa_agents.slot_cache import Feed, SlotCache, attention_over_slots, check_attention
from searchqa_envs.errors import ConfigurationError, SearchQAError
from searchqa_envs.tokenizers.base import Tokenizer

BANNED = -1e9
"""Logit of ids that must never be sampled. Finite, so that entropies and gradients stay finite."""

_SHARED_AT_LEAST = 8
"""A row waits for another one's prompt, for one more forward pass, if it can take over more than so many tokens."""
_COLLECTED_SHARE = 0.125
"""Written segments are handed over when they are this share of those asked for: earlier, and the environment is stepped for few; later, and slots idle."""
_FEED_TOKENS = {"cpu": 2048}
"""Tokens in one forward pass over contexts: a bound on memory; more of them are no faster on a CPU."""
_FEED_TOKENS_OTHERWISE = 16_384


class NotANumberError(SearchQAError, ArithmeticError):
    """The model's log-probabilities are not numbers."""


class TransformersLM:
    """A causal language model of transformers, for generation.

    It computes in the model's own dtype (load a bf16 model on CUDA) and samples in float32. The attention cache has static shapes between the rare
    moments when it grows; log-probabilities are those of the same weights under one forward pass over the whole context, up to rounding.

    Parameters
    ----------
    model
        A decoder with a linear output layer, whose layers all attend to the whole context. Set to evaluation mode: dropout would make sampled and
        evaluated log-probabilities differ.
    tokenizer
        Its ``pad_id``, and ids the model has but the tokenizer has not, are never sampled.
    """

    returns_ids = True
    returns_logprobs = True

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(model.config, name, None) not in (None, 1, 1.0):
                raise ConfigurationError(f"Models that rescale their logits are not supported; this one has {name}. Use another model.")
        if model.config.vocab_size < tokenizer.vocab_size:
            raise ConfigurationError(
                f"The model must know every id of the tokenizer; it has {model.config.vocab_size} ids, "
                f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size}. Resize the embeddings or choose the model's own tokenizer."
            )
        model.train(False)
        self.model = model
        self.tokenizer = tokenizer
        self._banned = torch.arange(model.config.vocab_size) >= tokenizer.vocab_size  # bool[V]
        self._banned[tokenizer.pad_id] = True
        self._banned_ids = self._banned.nonzero()[:, 0]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def start(self, seeds: Sequence[int], sampling: Sampling) -> Session:
        """Be ready for as many episodes as there are seeds (each in [0, 2**63))."""
        check_attention(self.model)
        return TransformersSession(self, seeds, sampling)

    def hidden_states(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Last hidden states, before the output layer: int64[B, T] -> [B, T, D]."""
        decoder: Any = self.model.get_decoder()  # type: ignore[no-untyped-call]
        hidden: Tensor = decoder(input_ids=input_ids, **kwargs).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [..., V] of hidden states [..., D]; ids that must not be sampled have ``BANNED``."""
        output_layer: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        logits: Tensor = output_layer(hidden).float()
        self._banned_ids = self._banned_ids.to(logits.device)
        if torch.is_grad_enabled():
            return logits.index_fill(-1, self._banned_ids, BANNED)
        return logits.index_fill_(-1, self._banned_ids, BANNED)  # a copy of all logits would cost as much as the softmax


class _Writing:
    """A segment being written."""

    def __init__(self, row: int, slot: int, seed: int, context: IntArray) -> None:
        self.row, self.slot, self.seed, self.context = row, slot, seed, context
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.sampling_logprobs: list[float] = []
        self.tail = b""
        """the last bytes, which may be the beginning of a stop string"""

    @property
    def position(self) -> int:
        """Of the next token."""
        return len(self.context) + len(self.ids)


class TransformersSession(Session):
    """Episodes under way on a :class:`TransformersLM`; their attention cache lives here, so weights must not change during a session.

    A row takes a slot of the cache with its first :meth:`submit` and gives it back with :meth:`release`; what a free slot holds can still be shared.
    An error or an interrupt in :meth:`collect` drops the segments being written; the same rows can then be submitted again, and write the same.
    """

    def __init__(self, lm: TransformersLM, seeds: Sequence[int], sampling: Sampling) -> None:
        self._lm = lm
        self._sampling = sampling
        self._seeds = list(seeds)
        self._stops = _Stops(lm.tokenizer, sampling.stop)
        self._cache = SlotCache()
        self._slot: dict[int, int] = {}  # by row
        self._known: list[IntArray] = []  # by slot: the ids whose cells it surely holds
        self._writing: list[_Writing] = []
        self._hidden = torch.empty(0)  # [len(_writing), D]: what the next token of each is sampled from
        self._written: list[tuple[int, Segment]] = []

    @torch.inference_mode()
    def submit(self, rows: Sequence[int], contexts: Sequence[IntArray], infos: Sequence[Mapping[str, Any]]) -> None:
        """See :meth:`Session.submit`. Only tokens that are not in the cache are fed, and beginnings that new rows share only once."""
        self._check_rows(rows)
        if not rows:
            return
        new = [row not in self._slot for row in rows]
        for row, context, is_new in zip(rows, contexts, new, strict=True):
            if is_new:
                self._slot[row] = self._free_slot(context)
            slot = self._slot[row]
            # what the environment dropped behind a closing tag is forgotten; the last token is always fed, for its hidden state
            self._known[slot] = context[: _shared_length(self._known[slot], context[:-1])]
        self._cache.reserve(len(self._known), 1 + max(map(len, contexts)))
        slots = [self._slot[row] for row in rows]
        hidden = self._feed_contexts(slots, contexts, new)
        started = [_Writing(row, slot, self._seeds[row], context) for row, slot, context in zip(rows, slots, contexts, strict=True)]
        self._hidden = torch.cat([self._hidden, hidden]) if self._writing else hidden
        self._writing += started

    @torch.inference_mode()
    def collect(self) -> list[tuple[int, Segment]]:
        """See :meth:`Session.collect`: decodes until a share of the segments is written; the next call goes on with the others."""
        asked = len(self._writing) + len(self._written)
        try:
            while self._writing and len(self._written) < _COLLECTED_SHARE * asked:
                self._step()
        except BaseException:
            self._writing = []
            raise
        written, self._written = self._written, []
        return written

    def release(self, rows: Sequence[int]) -> None:
        """Free the slots of these rows; what they were writing is dropped."""
        ended = set(rows)
        for row in ended:
            self._slot.pop(row, None)
        self._written = [(row, segment) for row, segment in self._written if row not in ended]
        kept = [index for index, segment in enumerate(self._writing) if segment.row not in ended]
        if len(kept) < len(self._writing):
            self._writing = [self._writing[index] for index in kept]
            self._hidden = self._hidden[kept]

    def _check_rows(self, rows: Sequence[int]) -> None:
        busy = {segment.row for segment in self._writing} | {row for row, _ in self._written}
        wrong = [row for row in rows if row in busy or not 0 <= row < len(self._seeds)]
        if wrong or len(set(rows)) != len(rows):
            raise ValueError(
                f"rows must be different, in [0, {len(self._seeds)}), and not being written; got {wrong or list(rows)}. "
                "Collect a row's segment before the next one is submitted, and start a session with a seed for every episode."
            )

    def _free_slot(self, context: IntArray) -> int:
        """The free slot that holds the longest beginning of ``context``; a new one if none is free."""
        taken = set(self._slot.values())
        free = [slot for slot in range(len(self._known)) if slot not in taken]
        if not free:
            self._known.append(np.empty(0, dtype=np.int32))
            return len(self._known) - 1
        return max(free, key=lambda slot: _shared_length(self._known[slot], context))

    def _feed_contexts(self, slots: Sequence[int], contexts: Sequence[IntArray], new: Sequence[bool]) -> Tensor:
        """Feed what is new of each context; hidden states [rows, D] at the contexts' ends.

        New rows with the same context are fed once; one whose context begins like another one's waits for that one, and copies its cells.
        """
        first: dict[bytes, int] = {}
        same = {i: first.setdefault(contexts[i].tobytes(), i) for i in range(len(slots)) if new[i]}
        pending = [i for i in range(len(slots)) if same.get(i, i) == i]
        hidden: dict[int, Tensor] = {}
        while pending:
            now: list[int] = []
            later: list[int] = []
            for i in pending:
                if new[i]:
                    self._copy_known(slots[i], contexts[i])
                    enough = len(self._known[slots[i]]) + _SHARED_AT_LEAST
                    if any(_shared_length(contexts[i][:-1], contexts[j]) > enough for j in now if new[j]):
                        later.append(i)
                        continue
                now.append(i)
            hidden.update(zip(now, self._feed_rows([slots[i] for i in now], [contexts[i] for i in now]), strict=True))
            pending = later
        for i, leader in same.items():
            if i != leader:
                self._cache.copy(slots[leader], slots[i], 0, len(contexts[i]))
                self._known[slots[i]] = contexts[i]
        return torch.stack([hidden[same.get(i, i)] for i in range(len(slots))])

    def _copy_known(self, slot: int, context: IntArray) -> None:
        """Copy cells from the slot that holds the longest beginning of ``context``."""
        shared = [_shared_length(known, context[:-1]) for known in self._known]
        source, start = int(np.argmax(shared)), len(self._known[slot])
        if shared[source] > start:
            self._cache.copy(source, slot, start, shared[source])
            self._known[slot] = context[: shared[source]]

    def _feed_rows(self, slots: Sequence[int], contexts: Sequence[IntArray]) -> list[Tensor]:
        """Feed what is not known of each context, a bounded number of tokens at a time; hidden states [D] at the ends."""
        limit = _FEED_TOKENS.get(self._lm.device.type, _FEED_TOKENS_OTHERWISE)
        hidden: list[Tensor] = []
        first = 0
        while first < len(slots):
            # as many rows as fit; the last one may be fed in part, and goes on in the next pass
            last, width, ends = first, 0, []
            while last < len(slots) and width < limit:
                new = len(contexts[last]) - len(self._known[slots[last]])
                ends.append(len(self._known[slots[last]]) + min(new, limit - width))
                width += min(new, limit - width)
                last += 1
            fed = range(first, last)
            starts = [len(self._known[slots[i]]) for i in fed]
            ids = np.concatenate([contexts[i][start:end] for i, start, end in zip(fed, starts, ends, strict=True)]).astype(np.int64)
            feed = Feed([slots[i] for i in fed], starts, [end - start for start, end in zip(starts, ends, strict=True)], self._lm.device)
            states = self._forward(torch.from_numpy(ids).to(self._lm.device), feed)
            for i, end, state in zip(fed, ends, states, strict=True):
                self._known[slots[i]] = contexts[i][:end]
                if end == len(contexts[i]):
                    hidden.append(state)
            first += len(fed) if ends[-1] == len(contexts[last - 1]) else len(fed) - 1
        return hidden

    def _forward(self, ids: Tensor, feed: Feed) -> Tensor:
        """Feed packed tokens int64[N]; hidden states [rows, D] of each row's last one."""
        self._cache.feed = feed
        with attention_over_slots(self._lm.model):
            hidden = self._lm.hidden_states(
                ids[None], position_ids=feed.positions[None], past_key_values=self._cache, use_cache=True, feed=feed
            )
        return hidden[0].index_select(0, feed.ends)

    def _step(self) -> None:
        """One token for every segment being written. The last id of a segment is not fed: it comes first in the row's next feed."""
        segments, device = self._writing, self._hidden.device
        seeds = torch.tensor([segment.seed for segment in segments], device=device)
        positions = torch.tensor([segment.position for segment in segments], device=device)
        tokens, full, truncated = sample(self._lm.logits(self._hidden), seeds, positions, self._sampling)  # [B] each
        # the only wait for the device in a step; float64 holds ids and float32 exactly
        numbers = torch.stack([tokens.double(), full.double(), (full if truncated is None else truncated).double()]).tolist()
        going: list[int] = []
        for index, (segment, token, logprob, sampling_logprob) in enumerate(zip(segments, *numbers, strict=True)):
            if logprob != logprob:
                raise NotANumberError(
                    "The model's log-probabilities must be numbers; got NaN. Its weights, or its dtype's range, are broken."
                )
            segment.ids.append(int(token))
            segment.logprobs.append(logprob)
            segment.sampling_logprobs.append(sampling_logprob)
            segment.tail, stopped = self._stops.after(segment.tail, int(token))
            if stopped or len(segment.ids) == self._sampling.max_new_tokens:
                self._finish(segment)
            else:
                going.append(index)
        if len(going) < len(segments):
            self._writing = [segments[index] for index in going]
            tokens = tokens[going]
        if going:
            slots, starts = [segment.slot for segment in self._writing], [segment.position - 1 for segment in self._writing]
            self._cache.reserve(len(self._known), 1 + max(starts))
            self._hidden = self._forward(tokens, Feed(slots, starts, [1] * len(slots), device))

    def _finish(self, segment: _Writing) -> None:
        ids = np.array(segment.ids, dtype=np.int32)
        self._known[segment.slot] = np.concatenate([segment.context, ids[:-1]])
        behaviour = np.array(segment.sampling_logprobs, dtype=np.float32) if self._sampling.truncated else None
        self._written.append((segment.row, Segment(ids, np.array(segment.logprobs, dtype=np.float32), behaviour)))


class _Stops:
    """Finds the token that ends a segment. Bytes are compared, because a tag may be cut into tokens in any way; most tokens cost one look-up."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stop.encode() for stop in stops)
        self._last_bytes = {stop[-1] for stop in self._stops}
        self._kept = max(map(len, self._stops), default=1) - 1
        self._pieces: dict[int, tuple[bytes, bool]] = {}

    def after(self, tail: bytes, token: int) -> tuple[bytes, bool]:
        """The bytes to remember after ``token``, and whether it ends the segment."""
        if token == self._tokenizer.eos_id:
            return b"", True
        known = self._pieces.get(token)
        if known is None:
            piece = self._tokenizer.pieces([token])[0]
            known = self._pieces[token] = piece, not self._last_bytes.isdisjoint(piece)
        piece, may_end = known
        text = tail + piece
        return text[-self._kept :] if self._kept else b"", may_end and any(stop in text for stop in self._stops)


def _shared_length(a: IntArray, b: IntArray) -> int:
    """Length of the longest common beginning."""
    shortest = min(len(a), len(b))
    if shortest == 0 or a[0] != b[0]:
        return 0
    different = a[:shortest] != b[:shortest]
    first = int(different.argmax())
    return first if different[first] else shortest


def sample(logits: Tensor, seeds: Tensor, positions: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw one token per row, by the inverse of its distribution function.

    Parameters
    ----------
    logits
        float32[B, V].
    seeds, positions
        int64[B]: what the noise of each row is a function of.

    Returns
    -------
    tokens, logprobs, sampling_logprobs
        int64[B]; float32[B] under the full softmax at the temperature (plain softmax at temperature 0); float32[B] under the distribution cut by
        top-k and then top-p, None where neither cuts. A token of probability 0 is never drawn.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, _of_tokens(logits, tokens) - logits.logsumexp(-1), None
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    noise = uniform_noise(seeds, positions)
    if not sampling.truncated:
        probabilities = logits.softmax(-1)
        tokens = draw(probabilities, noise)
        return tokens, _of_tokens(probabilities, tokens).log(), None
    if 0 < sampling.top_k < logits.shape[-1]:
        ordered, ids = logits.topk(sampling.top_k)
    else:
        ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    if sampling.top_p < 1:
        mass_before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(mass_before >= sampling.top_p, 0)
        probabilities /= probabilities.sum(-1, keepdim=True)
    drawn = draw(probabilities, noise)
    return _of_tokens(ids, drawn), _of_tokens(ordered, drawn) - logits.logsumexp(-1), _of_tokens(probabilities, drawn).log()


def _of_tokens(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(-1, tokens[:, None])[:, 0]


_BLOCK = 128


def draw(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The column int64[B] in which the running sum of float32[B, V] passes ``noise`` (float64[B] in [0, 1)) times the whole sum.

    First among blocks of columns, then inside one block: adding up every column in float64 would take longer than the softmax did.
    """
    size = probabilities.shape[-1]
    whole = size // _BLOCK * _BLOCK
    sums = probabilities[:, :whole].reshape(len(probabilities), -1, _BLOCK).sum(-1)
    if whole < size:
        sums = torch.cat([sums, probabilities[:, whole:].sum(-1, keepdim=True)], dim=-1)
    sums = sums.double()  # [B, blocks]
    block, rest = _passed(sums, noise * sums.sum(-1))
    columns = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=block.device)  # [B, 128]
    inside = probabilities.gather(-1, columns.clamp(max=size - 1)).double().masked_fill(columns >= size, 0)
    return block * _BLOCK + _passed(inside, rest)[0]


def _passed(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first column of positive weight whose running sum is above ``target`` (the last one, if rounding left the target too high), and the rest."""
    sums = weights.cumsum(-1)
    last = sums.masked_fill(weights <= 0, 0).amax(-1)
    target = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    column = ((sums > target[:, None]) & (weights > 0)).to(torch.uint8).argmax(-1)  # the first of equal ones
    return column, target - (_of_tokens(sums, column) - _of_tokens(weights, column))


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit integers; sums and products wrap
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def uniform_noise(seeds: Tensor, positions: Tensor) -> Tensor:
    """Uniform float64[B] in [0, 1), a pure function of (seed, position): the generator SplitMix64 (Steele, Lea and Flood 2014), a stream for each seed."""
    bits = _mix(_mix(seeds + _GOLDEN) + positions * _GOLDEN)
    return _shift(bits, 11).double() * 2.0**-53


def _shift(bits: Tensor, by: int) -> Tensor:
    """Logical right shift of int64."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)) * _MIX[0]
    bits = (bits ^ _shift(bits, 27)) * _MIX[1]
    return bits ^ _shift(bits, 31)
