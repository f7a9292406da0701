"""The language model on transformers, with its own decode loop.

The decode loop keeps the attention cache between turns, so that each token is fed once; stops each row at the token that completes a closing
tag; and draws a row's noise from a counter (seed, position), so that a row's samples do not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from searchqa_agents.growing_cache import GrowingCache
from searchqa_agents.language_model import IntArray, Sampling, Segment, Session
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers.base import Tokenizer

BANNED = -1e9
"""Logit of ids that must never be sampled. Finite, so that entropies and gradients stay finite."""


class TransformersLM:
    """A causal language model of transformers, for generation.

    Parameters
    ----------
    model
        A decoder with a linear output layer. Set to evaluation mode: dropout would make sampled and evaluated log-probabilities differ.
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
        self._banned = torch.arange(model.config.vocab_size) >= tokenizer.vocab_size
        self._banned[tokenizer.pad_id] = True

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def start(self, seeds: Sequence[int], sampling: Sampling) -> Session:
        """Begin as many episodes as there are seeds (each in [0, 2**63))."""
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
        self._banned = self._banned.to(logits.device)
        return logits.masked_fill(self._banned, BANNED)


class TransformersSession:
    """Episodes under way on a :class:`TransformersLM`; the batch's attention cache lives here.

    The cache has one row per live episode and one column per token fed to any of them; ``_attended`` says which cells hold a token of the
    row (rows that stopped earlier, and the left padding of shorter environment texts, leave holes).
    """

    def __init__(self, lm: TransformersLM, seeds: Sequence[int], sampling: Sampling) -> None:
        self._lm = lm
        self._sampling = sampling
        self._seeds = torch.tensor(seeds, dtype=torch.int64, device=lm.device)
        self._cache = GrowingCache()
        self._rows = list(range(len(seeds)))
        self._attended = torch.zeros(len(seeds), 0, dtype=torch.int64, device=lm.device)  # [B, columns of the cache]
        self._known: list[IntArray] = [np.empty(0, dtype=np.int32)] * len(seeds)  # by row: the ids in the cache
        self._stop = tuple(stop.encode() for stop in sampling.stop)
        self._tail = max(map(len, self._stop), default=1) - 1  # bytes that may be the beginning of a stop string
        self._pieces: dict[int, bytes] = {}

    @torch.inference_mode()
    def generate(self, rows: Sequence[int], contexts: Sequence[IntArray], infos: Sequence[Mapping[str, Any]] = ()) -> list[Segment]:
        """See :meth:`Session.generate`. Only tokens that are not in the cache are fed."""
        if not rows:
            return []
        self._keep(rows)
        hidden = self._feed_contexts(contexts)  # [B, D]
        return self._decode(hidden, contexts)

    def _keep(self, rows: Sequence[int]) -> None:
        unknown = set(rows) - set(self._rows)
        if unknown or len(set(rows)) != len(rows):
            raise ValueError(
                f"rows must be distinct and still live; {sorted(unknown) or list(rows)} are not. Start another session for new episodes."
            )
        if list(rows) == self._rows:
            return
        chosen = torch.tensor([self._rows.index(row) for row in rows], device=self._attended.device)
        attended = self._attended[chosen]
        columns = attended.any(0).nonzero()[:, 0]  # those of ended rows alone are dropped
        self._cache.select(chosen, columns)
        self._attended = attended[:, columns]
        self._rows = list(rows)

    def _feed_contexts(self, contexts: Sequence[IntArray]) -> Tensor:
        """Feed what is new of each context, left-padded to one block; hidden states [B, D] at the contexts' ends."""
        device = self._attended.device
        new: list[IntArray] = []
        for index, (row, context) in enumerate(zip(self._rows, contexts, strict=True)):
            shared = _shared_length(self._known[row], context[:-1])
            if shared < len(self._known[row]):  # the environment dropped ids behind a closing tag: forget their cells
                self._attended[index] *= self._attended[index].cumsum(0) <= shared
            new.append(context[shared:])
            self._known[row] = context
        width = max(map(len, new))
        block = np.full((len(new), width), self._lm.tokenizer.pad_id, dtype=np.int64)  # [B, W]
        filled = np.zeros((len(new), width), dtype=np.int64)  # [B, W]
        for index, ids in enumerate(new):
            block[index, width - len(ids) :] = ids
            filled[index, width - len(ids) :] = 1
        return self._feed(torch.from_numpy(block).to(device), torch.from_numpy(filled).to(device))

    def _feed(self, ids: Tensor, filled: Tensor) -> Tensor:
        """Append columns to the cache: ids int64[B, W], ``filled`` 1 where a row really has a token. Hidden states [B, D] of the last one."""
        before = self._attended.sum(1, keepdim=True)  # [B, 1]
        position_ids = (before + filled.cumsum(1) - 1).clamp(min=0)
        self._attended = torch.cat([self._attended, filled], dim=1)
        hidden = self._lm.hidden_states(
            ids, attention_mask=self._attended, position_ids=position_ids, past_key_values=self._cache, use_cache=True
        )
        return hidden[:, -1]

    def _decode(self, hidden: Tensor, contexts: Sequence[IntArray]) -> list[Segment]:
        """Sample until every row has stopped. A row's last id is not fed: it comes first in its next block."""
        count = len(contexts)
        positions = torch.tensor([len(context) for context in contexts], device=hidden.device)  # of the token being sampled
        ids: list[list[int]] = [[] for _ in range(count)]
        logprobs: list[list[float]] = [[] for _ in range(count)]
        truncated_logprobs: list[list[float]] = [[] for _ in range(count)]
        tails = [b""] * count
        going = [True] * count
        for length in range(1, self._sampling.max_new_tokens + 1):
            seeds = self._seeds[self._rows]
            tokens, full, truncated = sample(self._lm.logits(hidden), seeds, positions, self._sampling)  # [B] each
            listed, full_list = tokens.tolist(), full.tolist()
            truncated_list = truncated.tolist() if truncated is not None else full_list
            for index, token in enumerate(listed):
                if going[index]:
                    ids[index].append(token)
                    logprobs[index].append(full_list[index])
                    truncated_logprobs[index].append(truncated_list[index])
                    tails[index], stopped = self._stops(tails[index], token)
                    going[index] = not stopped
            if length == self._sampling.max_new_tokens or not any(going):
                break
            filled = torch.tensor(going, dtype=torch.int64, device=hidden.device)[:, None]  # [B, 1]
            hidden = self._feed(tokens[:, None], filled)
            positions = positions + filled[:, 0]
        segments = []
        for index, row in enumerate(self._rows):
            segment = np.array(ids[index], dtype=np.int32)
            self._known[row] = np.concatenate([contexts[index], segment[:-1]])
            behaviour = np.array(truncated_logprobs[index], dtype=np.float32) if self._sampling.truncated else None
            segments.append(Segment(segment, np.array(logprobs[index], dtype=np.float32), behaviour))
        return segments

    def _stops(self, tail: bytes, token: int) -> tuple[bytes, bool]:
        """The bytes to remember after ``token``, and whether it ends the segment."""
        tokenizer = self._lm.tokenizer
        if token == tokenizer.eos_id:
            return b"", True
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = tokenizer.pieces([token])[0]
        text = tail + piece
        return text[-self._tail :] if self._tail else b"", any(stop in text for stop in self._stop)


def _shared_length(a: IntArray, b: IntArray) -> int:
    """Length of the longest common beginning."""
    shortest = min(len(a), len(b))
    different = np.flatnonzero(a[:shortest] != b[:shortest])
    return int(different[0]) if len(different) else shortest


def sample(logits: Tensor, seeds: Tensor, positions: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw one token per row.

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
        top-k and then top-p, None where neither cuts.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, _of_tokens(F.log_softmax(logits, dim=-1), tokens), None
    full = F.log_softmax(logits / sampling.temperature, dim=-1)
    kept = _truncate(full, sampling) if sampling.truncated else full
    # the smallest of exponential variables with rates p is distributed as p (an exponential race, the same as Gumbel-max)
    tokens = (kept - exponential_noise(seeds, positions, logits.shape[-1]).log()).argmax(-1)
    return tokens, _of_tokens(full, tokens), _of_tokens(kept, tokens) if sampling.truncated else None


def _of_tokens(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(-1, tokens[:, None])[:, 0]


def _truncate(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities renormalised over the tokens that top-k and then top-p keep; -inf elsewhere."""
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = -torch.inf
        ordered = F.log_softmax(ordered, dim=-1)
    if sampling.top_p < 1:
        mass_before = ordered.exp().cumsum(-1) - ordered.exp()
        ordered = ordered.masked_fill(mass_before >= sampling.top_p, -torch.inf)
    return torch.full_like(logprobs, -torch.inf).scatter(-1, order, F.log_softmax(ordered, dim=-1))


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit integers; sums and products wrap
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def exponential_noise(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """Standard exponential variables float32[B, size], a pure function of (seed, position, column).

    The bits are SplitMix64's (Steele, Lea and Flood 2014), a stream for each (seed, position).
    """
    streams = _mix(_mix(seeds + _GOLDEN) + positions * _GOLDEN)  # [B]
    counters = torch.arange(1, size + 1, device=seeds.device) * _GOLDEN  # [size]
    bits = _mix(streams[:, None] + counters)
    uniform = (_shift(bits, 1).float() * 2.0**-63).clamp(2.0**-64, 1 - 2.0**-24)
    return -torch.log1p(-uniform)


def _shift(bits: Tensor, by: int) -> Tensor:
    """Logical right shift of int64."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)) * _MIX[0]
    bits = (bits ^ _shift(bits, 27)) * _MIX[1]
    return bits ^ _shift(bits, 31)
