"""A trainable language model: it writes segments, and evaluates the log-probabilities of what was written."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from searchqa_agents.language_model import IntArray
from searchqa_agents.lora import has_lora
from searchqa_agents.micro_batches import ForwardPass, evaluated_length, lay_out, length_sorted_batches, packed_batches
from searchqa_agents.models import load_model, save_model
from searchqa_agents.token_logprobs import checkpointed_token_stats, linear_token_stats
from searchqa_agents.tokenizer_files import check_record, save_tokenizer
from searchqa_agents.transformers_lm import TransformersLM
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers.base import Tokenizer


class TokenStats(NamedTuple):
    """Flat over the evaluated tokens: the sequences in the order given, in each its tokens in order; float32[N] each.

    ``value`` is that of the state in which the token is chosen; None without a critic.
    """

    logprob: Tensor
    entropy: Tensor
    value: Tensor | None


class Scorer(nn.Module):
    """Everything of a policy that an update trains, as one module whose forward pass evaluates tokens.

    So DDP may wrap it (``policy.scorer = DistributedDataParallel(policy.scorer)``) and FSDP2 shard it (each decoder layer, then the scorer, but not
    the output layer alone: its weight is used as a tensor in this forward pass). Nothing else calls the parameters under a gradient.

    Parameters
    ----------
    model
        The language model.
    logits
        From hidden states [n, D] to logits float32[n, V]; used where ``plain`` is False.
    banned
        bool[V], ids of probability 0.
    plain
        Whether the logits are the output layer's linear function.
    """

    banned: Tensor

    def __init__(self, model: PreTrainedModel, logits: Callable[[Tensor], Tensor], banned: Tensor, *, plain: bool) -> None:
        super().__init__()
        self.model = model
        self.value_head: nn.Linear | None = None
        self.value_detached = False
        self.register_buffer("banned", banned.to(next(model.parameters()).device), persistent=False)
        self._logits = logits
        self._plain = plain

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        chosen: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
        gradient_checkpointing: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :class:`~searchqa_agents.micro_batches.ForwardPass`; log-probabilities, entropies and values (with a value head), float32[N] each."""
        decoder: Any = self.model.get_decoder()  # type: ignore[no-untyped-call]
        hidden = last_hidden_states(decoder, input_ids, position_ids, gradient_checkpointing=gradient_checkpointing)[chosen]  # [N, D]
        output_layer: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if self._plain and type(output_layer) is nn.Linear:
            logprob, entropy = linear_token_stats(
                hidden,
                output_layer.weight,
                output_layer.bias,
                targets,
                banned=self.banned,
                temperature=temperature,
                entropy_gradient=entropy_gradient,
            )
        else:
            logprob, entropy = checkpointed_token_stats(
                hidden, targets, self._logits, temperature=temperature, entropy_gradient=entropy_gradient
            )
        if self.value_head is None:
            return logprob, entropy, None
        return logprob, entropy, values_of(self.value_head, hidden.detach() if self.value_detached else hidden)


def make_value_head(hidden_size: int, device: torch.device) -> nn.Linear:
    """A linear layer in float32 that says 0 of every state, until it is trained."""
    head = nn.Linear(hidden_size, 1, device=device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def values_of(head: nn.Linear, hidden: Tensor) -> Tensor:
    """float32[N] from hidden states [N, D], under autocast too."""
    with torch.autocast(hidden.device.type, enabled=False):
        values: Tensor = head(hidden.float())[:, 0].clone()  # FSDP2 warns of outputs that are views
    return values


def last_hidden_states(decoder: Any, input_ids: Tensor, position_ids: Tensor | None, *, gradient_checkpointing: bool = False) -> Tensor:
    """[B, T, D] of a decoder, without a cache.

    Without a mask: padding stands on the right, where causal attention never looks; positions that begin again tell transformers, or a
    variable-length kernel, where one sequence ends and the next begins. With a cache transformers would not look for that.
    """
    lengths: dict[str, Any] = {}
    if position_ids is not None:  # said once here; else each layer's kernel finds it out again, and waits for the device
        starts = (position_ids[0] == 0).nonzero()[:, 0].to(torch.int32)
        bounds = nn.functional.pad(starts, (0, 1), value=input_ids.shape[1])
        longest = int(bounds.diff().max())
        lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    with checkpointed_layers(decoder) if gradient_checkpointing and torch.is_grad_enabled() else contextlib.nullcontext():
        hidden: Tensor = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, **lengths).last_hidden_state
    return hidden


@contextlib.contextmanager
def checkpointed_layers(decoder: nn.Module) -> Iterator[None]:
    """Layers keep only their inputs for the backward pass and compute the rest again there.

    transformers does so in training mode only. Our models are in evaluation mode, because dropout would make sampled and evaluated
    log-probabilities differ; so for this forward pass the layers alone, not the modules in them, are told to be in training mode.
    """
    layers: list[Any] = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigurationError(
            f"gradient_checkpointing needs a model whose layers transformers can checkpoint; {type(decoder).__name__} has none. "
            "Set gradient_checkpointing=false."
        )
    for layer in layers:
        if isinstance(rate := getattr(layer, "dropout", 0), float) and rate > 0:
            raise ConfigurationError(
                f"gradient_checkpointing would switch on a dropout that {type(layer).__name__} does itself, and that must be 0; got {rate}. "
                "Set it to 0 in the model's configuration, or gradient_checkpointing=false."
            )
    before = [(layer.gradient_checkpointing, layer.training) for layer in layers]
    for layer in layers:
        layer.gradient_checkpointing, layer.training = True, True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for layer, (checkpointing, training) in zip(layers, before, strict=True):
            layer.gradient_checkpointing, layer.training = checkpointing, training


class Policy(TransformersLM):
    """A :class:`TransformersLM` that can be trained, saved and loaded.

    ``evaluate`` is the one path by which algorithms get log-probabilities of given tokens; it goes through ``scorer``.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        super().__init__(model, tokenizer)
        plain = type(self).logits is TransformersLM.logits  # else a subclass changes them
        self.scorer: nn.Module = Scorer(model, self.logits, self._banned, plain=plain)

    def evaluate(
        self,
        token_ids: Sequence[IntArray],
        token_masks: Sequence[NDArray[np.int8]],
        *,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
        gradient_checkpointing: bool = False,
        packed: bool = False,
        max_tokens: int | None = 16_384,
    ) -> TokenStats:
        """Log-probability and entropy of every token to evaluate, given all tokens before it.

        Parameters
        ----------
        token_ids, token_masks
            int32[T_i] and int8[T_i] of each sequence; a 1 marks a token to evaluate. The first token has nothing before it: its mask must be 0.
        temperature
            Of the softmax; the one sampled with, 1 for temperature 0.
        entropy_gradient
            Whether a gradient flows through the entropies.
        gradient_checkpointing
            Keep only the layers' inputs for the backward pass.
        packed
            One row without padding instead of rows of similar length. Exact everywhere, but fast only with a variable-length attention kernel.
        max_tokens
            Size of a forward pass, padding included; None: a single one. Under a gradient all passes' activations are kept: a trainer that needs
            less memory calls ``evaluate`` per micro-batch.
        """
        lengths = [evaluated_length(mask) for mask in token_masks]
        if max_tokens is None:
            batches = [list(range(len(lengths)))]
        else:
            batches = packed_batches(lengths, max_tokens) if packed else length_sorted_batches(lengths, max_tokens)
        parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for batch in batches:
            forward = self.lay_out([token_ids[i] for i in batch], [token_masks[i] for i in batch], packed=packed)
            parts.append(self.scorer(*forward, temperature, entropy_gradient, gradient_checkpointing))
        order = [i for batch in batches for i in batch]
        counts = [int(token_masks[i].sum()) for i in order]
        logprob, entropy, value = (_in_order([part[which] for part in parts], order, counts) for which in (0, 1, 2))
        return TokenStats(logprob, entropy, value)

    def lay_out(self, token_ids: Sequence[IntArray], token_masks: Sequence[NDArray[np.int8]], *, packed: bool) -> ForwardPass:
        """The tensors of one forward pass over these sequences."""
        return lay_out(token_ids, token_masks, self.tokenizer.pad_id, packed=packed, device=self.device)

    def add_value_head(self, *, detached: bool = False) -> nn.Linear:
        """Make ``evaluate`` give values too, from a value head on the policy's own trunk; it says 0 of every state until it is trained.

        ``detached`` keeps the values' gradient out of the trunk.
        """
        assert isinstance(self.scorer, Scorer)
        if self.scorer.value_head is None:
            self.scorer.value_head = make_value_head(self.model.config.hidden_size, self.device)
        self.scorer.value_detached = detached
        return self.scorer.value_head

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model (safetensors and its configuration) and its tokenizer (:func:`~searchqa_agents.tokenizer_files.save_tokenizer`).

        LoRA adapters are added to the weights, so that the folder holds a plain model.
        """
        folder = Path(path)
        save_model(self.model, folder)
        save_tokenizer(self.tokenizer, folder)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the ``model`` of a trainer's state: all weights, or under LoRA those of the adapters."""
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        absent = trained.intersection(missing) if has_lora(self.model) else missing
        if absent or unexpected:
            wrong = sorted([*absent, *unexpected])
            raise ConfigurationError(
                f"The state must have the weights of this model, and they do not match in {len(wrong)} names, first {wrong[0]}. "
                "Resume with the model and the LoRA settings that the run began with."
            )

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
        check_record(Path(path), tokenizer)
        return cls(load_model(path, dtype=dtype, device=device), tokenizer)


def _in_order(parts: Sequence[Tensor | None], order: Sequence[int], counts: Sequence[int]) -> Any:
    """The parts' tokens, which stand in ``order`` with so many per sequence, in the order of the sequences; None for values without a critic."""
    if any(part is None for part in parts):
        return None
    if not parts:
        return torch.empty(0)
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))  # type: ignore[arg-type]  # none is None
    if list(order) == list(range(len(order))):
        return whole
    pieces = dict(zip(order, torch.split(whole, list(counts)), strict=True))  # type: ignore[arg-type]
    return torch.cat([pieces[i] for i in range(len(order))])
