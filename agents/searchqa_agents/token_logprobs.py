"""Log-probabilities and entropies of tokens without the logits of all tokens at once.

For N tokens and V ids the logits are float32[N, V]: with a vocabulary of 150,000, 1 GB for 1,700 tokens, and a plain backward pass holds several
copies. Here a chunk of tokens at a time goes through the output layer; what is kept for the backward pass is the hidden states and one or two
numbers per token, and each chunk's logits are computed again there. (The idea is that of memory-efficient cross-entropies such as Liger Kernel's,
arXiv 2410.10989, and Cut Your Losses, arXiv 2411.09009, in plain PyTorch and for each token's own gradient.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from searchqa_agents.transformers_lm import BANNED


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    banned: Tensor,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    chunk_floats: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution under ``softmax((hidden @ weight.T + bias) / temperature)``.

    Parameters
    ----------
    hidden
        [N, D].
    weight, bias
        [V, D] and [V] of the output layer, in any floating type; products are computed in that type, or autocast's, everything else and the sums
        over chunks in at least float32.
    targets
        int64[N].
    banned
        bool[V]: ids of probability 0.
    entropy_gradient
        Whether a gradient flows through the entropies.
    chunk_floats
        Logits that are held at once; default by device.

    Returns
    -------
    logprob, entropy
        [N] each; at least float32.
    """
    kind = hidden.device.type
    product_type = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    rows = chunk_rows(len(weight), hidden.device) if chunk_floats is None else max(1, chunk_floats // len(weight))
    with torch.autocast(kind, enabled=False):
        logprob, entropy = _LinearTokenStats.apply(hidden, weight, bias, targets, banned, temperature, rows, product_type, entropy_gradient)  # type: ignore[no-untyped-call]
    return logprob, entropy if entropy_gradient else entropy.detach()


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Tokens in a chunk: few enough to stay near the processor's caches, enough for an efficient matrix product."""
    return max(128, (2**22 if device.type == "cpu" else 2**26) // vocab_size)


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        banned: Tensor,
        temperature: float,
        rows: int,
        product_type: torch.dtype,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.settings = temperature, rows, product_type, entropy_gradient
        accumulator = torch.promote_types(weight.dtype, torch.float32)
        logprob, entropy, normaliser = (hidden.new_empty(len(hidden), dtype=accumulator) for _ in range(3))
        product_weight = weight.to(product_type)
        for begin in range(0, len(hidden), rows):
            part = slice(begin, begin + rows)
            logits = _logits(hidden[part], product_weight, bias, banned, temperature, accumulator)  # [n, V]
            chosen = logits.gather(-1, targets[part, None])[:, 0]
            normaliser[part] = logits.logsumexp(-1)
            logprob[part] = chosen - normaliser[part]
            probabilities = (logits - normaliser[part, None]).exp_()
            entropy[part] = normaliser[part] - torch.linalg.vecdot(probabilities, logits)
        ctx.save_for_backward(hidden, weight, bias, targets, banned, normaliser, entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logprob_gradient: Tensor, entropy_gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(logprob_gradient.device.type, enabled=False):  # the products are of the type that they had
            return _LinearTokenStats._backward(ctx, logprob_gradient, entropy_gradient)

    @staticmethod
    def _backward(ctx: Any, logprob_gradient: Tensor, entropy_gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, banned, normaliser, entropy = ctx.saved_tensors
        temperature, rows, product_type, through_entropy = ctx.settings
        accumulator = normaliser.dtype
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=accumulator) if needs_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=accumulator) if needs_bias else None
        product_weight = weight.to(product_type)
        for begin in range(0, len(hidden), rows):
            part = slice(begin, begin + rows)
            logits = _logits(hidden[part], product_weight, bias, banned, temperature, accumulator)
            logits -= normaliser[part, None]  # log-probabilities
            outer = logprob_gradient[part, None] / temperature
            if through_entropy:
                # d log p_t / d z_j = [j = t] - p_j  and  d H / d z_j = -p_j (log p_j + H)
                factor = logits + entropy[part, None]
                factor *= entropy_gradient[part, None] / temperature
                factor += outer
                gradient = logits.exp_().mul_(factor).neg_()
            else:
                gradient = logits.exp_().mul_(-outer)
            gradient.scatter_add_(-1, targets[part, None], outer.masked_fill(banned[targets[part]][:, None], 0.0))
            product_gradient = gradient.to(product_type)  # [n, V]
            if hidden_gradient is not None:
                hidden_gradient[part] = product_gradient @ product_weight
            if weight_gradient is not None:
                product_hidden = hidden[part].to(product_type)
                if product_type == accumulator:
                    weight_gradient.addmm_(product_gradient.T, product_hidden)
                else:
                    weight_gradient += product_gradient.T @ product_hidden
            if bias_gradient is not None:
                bias_gradient += gradient.sum(0)
        return (
            hidden_gradient,
            None if weight_gradient is None else weight_gradient.to(weight.dtype),
            None if bias_gradient is None else bias_gradient.to(bias.dtype),
            *(None,) * 6,
        )


def _logits(
    hidden: Tensor, product_weight: Tensor, bias: Tensor | None, banned: Tensor, temperature: float, accumulator: torch.dtype
) -> Tensor:
    """[n, V], a tensor of its own."""
    logits = hidden.to(product_weight.dtype) @ product_weight.T
    if bias is not None:
        logits += bias.to(logits.dtype)
    logits = logits.to(accumulator).masked_fill_(banned, BANNED)
    return logits if temperature == 1 else logits.div_(temperature)


def checkpointed_token_stats(
    hidden: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor], *, temperature: float = 1.0, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """The same for any output layer: ``logits_of`` hidden states [n, D] is float32[n, V]; each chunk is computed again in the backward pass."""

    def token_stats(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(hidden) / temperature  # [n, V]
        normaliser = logits.logsumexp(-1)
        logprob = logits.gather(-1, targets[:, None])[:, 0] - normaliser
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy = normaliser - ((logits - normaliser[:, None]).exp() * logits).sum(-1)
        return logprob, entropy

    vocab_size = logits_of(hidden[:0]).shape[-1]
    rows = chunk_rows(vocab_size, hidden.device)
    parts = [
        checkpoint(token_stats, h, t, use_reentrant=False)
        for h, t in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
