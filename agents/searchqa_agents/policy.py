"""A trainable language model: it writes segments, and evaluates the log-probabilities of what was written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from searchqa_agents.language_model import IntArray
from searchqa_agents.models import load_model
from searchqa_agents.tokenizer_files import save_tokenizer, saved_record
from searchqa_agents.transformers_lm import TransformersLM
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers.base import Tokenizer
from searchqa_envs.tokenizers.huggingface import RECORD_FILE

_CHUNK_FLOATS = 2**25  # logits that are held at once: 128 MiB


class TokenStats(NamedTuple):
    """Flat over the policy's tokens (loss mask 1): the sequences in the order given, in each its tokens in order; float32[N] each.

    ``value`` is None for a policy without a value head.
    """

    logprob: Tensor
    entropy: Tensor
    value: Tensor | None


def length_sorted_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in micro-batches of similar length, each of at most ``max_tokens`` tokens with its padding (or a single sequence)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


class Policy(TransformersLM):
    """A :class:`TransformersLM` that can be trained, saved and loaded.

    ``evaluate`` is the one path by which algorithms get log-probabilities of given tokens.
    """

    def evaluate(
        self,
        token_ids: Sequence[IntArray],
        loss_masks: Sequence[NDArray[np.int8]],
        *,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
        max_tokens: int = 16_384,
    ) -> TokenStats:
        """Log-probability and entropy of every policy token, given all tokens before it.

        Parameters
        ----------
        token_ids, loss_masks
            int32[T_i] and int8[T_i] of each sequence. The first token has nothing before it, so its mask must be 0.
        temperature
            Of the softmax; the one sampled with, 1 for temperature 0.
        entropy_gradient
            Whether a gradient flows through the entropies.
        max_tokens
            Size of a micro-batch, padding included. Under a gradient all micro-batches' activations are kept: a trainer that needs less
            memory calls ``evaluate`` per micro-batch (:func:`length_sorted_batches`).
        """
        if any(len(mask) and mask[0] for mask in loss_masks):
            raise ValueError("The first token of a sequence cannot be evaluated; its loss_mask must be 0. Begin sequences with the prompt.")
        parts: dict[int, tuple[Tensor, ...]] = {}
        for batch in length_sorted_batches([len(ids) for ids in token_ids], max_tokens):
            stats = self._evaluate_batch([token_ids[i] for i in batch], [loss_masks[i] for i in batch], temperature, entropy_gradient)
            counts = [int(loss_masks[i].sum()) for i in batch]
            parts.update(zip(batch, zip(*(torch.split(stat, counts) for stat in stats), strict=True), strict=True))
        if not parts:
            return TokenStats(torch.empty(0), torch.empty(0), None)
        logprob, entropy = (torch.cat([parts[i][which] for i in range(len(token_ids))]) for which in (0, 1))
        return TokenStats(logprob, entropy, None)

    def _evaluate_batch(
        self, token_ids: Sequence[IntArray], loss_masks: Sequence[NDArray[np.int8]], temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        width = max(map(len, token_ids))
        ids = np.full((len(token_ids), width), self.tokenizer.pad_id, dtype=np.int64)  # [B, T], padded on the right, where nothing looks
        mask = np.zeros((len(token_ids), width), dtype=bool)  # [B, T]
        for row, (sequence, loss_mask) in enumerate(zip(token_ids, loss_masks, strict=True)):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = loss_mask
        inputs = torch.from_numpy(ids).to(self.device)
        sampled = torch.from_numpy(mask[:, 1:]).to(self.device)  # [B, T-1]: the next token is the policy's
        hidden = self.hidden_states(inputs[:, :-1], use_cache=False)[sampled]  # [N, D]
        targets = inputs[:, 1:][sampled]  # [N]
        chunk = max(1, _CHUNK_FLOATS // self.model.config.vocab_size)
        if len(targets) <= chunk:
            return self._token_stats(hidden, targets, temperature, entropy_gradient)
        # a chunk's logits are computed again in the backward pass instead of being kept
        parts = [
            checkpoint(self._token_stats, h, t, temperature, entropy_gradient, use_reentrant=False)
            for h, t in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
        ]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _token_stats(self, hidden: Tensor, targets: Tensor, temperature: float, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        logits = self.logits(hidden) / temperature  # [N, V]
        normaliser = logits.logsumexp(-1)
        logprob = logits.gather(-1, targets[:, None])[:, 0] - normaliser
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy = normaliser - ((logits - normaliser[:, None]).exp() * logits).sum(-1)
        return logprob, entropy

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model (safetensors and its configuration) and its tokenizer (:func:`~searchqa_agents.tokenizer_files.save_tokenizer`)."""
        folder = Path(path)
        self.model.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)
        mode = (folder / RECORD_FILE).stat().st_mode
        for file in folder.glob("*.safetensors"):  # written for their owner's eyes only
            file.chmod(mode)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        tokenizer: Tokenizer,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Policy:
        """A policy from a folder that :meth:`save` wrote, or from any folder or hub name that transformers can load.

        Raises
        ------
        ConfigurationError
            If the folder records another tokenizer than the one given.
        """
        record = saved_record(Path(path))
        if record is not None and (record["name"], record["vocab_size"]) != (tokenizer.name, tokenizer.vocab_size):
            raise ConfigurationError(
                f"The policy in {path} was trained with tokenizer {record['name']!r} ({record['vocab_size']} ids); got {tokenizer.name!r} "
                f"({tokenizer.vocab_size} ids). Make the environment with the policy's tokenizer."
            )
        return cls(load_model(path, dtype=dtype, device=device), tokenizer)
