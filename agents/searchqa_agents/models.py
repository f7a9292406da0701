"""Models: the tiny Llama of the generated world, and models from a name or a folder."""

from __future__ import annotations

import math
import os

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel


def make_tiny_model(
    vocab_size: int,
    seed: int,
    *,
    pad_id: int,
    eos_id: int,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    feed_forward_size: int = 352,
    max_positions: int = 4096,
    initializer_range: float = 0.05,
    rope_theta: float = 1000.0,
    copying_start: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> LlamaForCausalLM:
    """A randomly initialised Llama with tied embeddings; about 0.45 million parameters by default.

    The same ``seed`` gives the same weights; the global random state of torch is left as it was. ``copying_start`` draws the attention weights
    near those that copy (:func:`start_near_copying`), which shortens the warm-up from about a thousand steps to about a hundred and fifty.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=feed_forward_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_positions,
        initializer_range=initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=True,
        pad_token_id=pad_id,
        bos_token_id=None,
        eos_token_id=eos_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        if copying_start:
            start_near_copying(model, rope_theta)
    model.to(device=device, dtype=dtype)  # type: ignore[call-arg]  # transformers wraps it without types
    model.train(False)
    return model


@torch.no_grad()
def start_near_copying(
    model: LlamaForCausalLM, rope_theta: float, *, previous_heads: int = 2, sharpness: float = 3.0, common: float = 0.1
) -> None:
    """Draw the attention weights of a fresh model's first two layers again: still random, but with the signs of an induction circuit.

    What copying needs (Elhage et al. 2021, "A mathematical framework for transformer circuits"): heads of the first layer that look at the token
    before, and heads of the second that look for the token which *followed* an earlier occurrence of the present one. Learned from scratch, that takes
    most of a warm-up. Here:

    - all embeddings get a common part, so that queries and keys can be the same for every token;
    - ``previous_heads`` heads of layer 0 have queries and keys that read only this part, turned so that their product, under rotary positions, is
      largest at distance 1 (by ``sharpness`` over distance 0). They write what they see with the opposite sign;
    - in layer 1 queries are the negative of keys: a token is repelled by its equal and so attracted to the token behind its equal,
      which carries it with the opposite sign. Output is the transpose of value: what is looked at becomes more likely.
    """
    config = model.config
    size: int = config.hidden_size
    head_size = size // config.num_attention_heads
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    embeddings = model.model.embed_tokens.weight
    direction = torch.randn(size)
    direction /= direction.norm()
    embeddings += common * math.sqrt(size) * direction
    # after normalisation every token has about this much of the common part
    strength = math.sqrt(size) * common / math.hypot(common, config.initializer_range)

    half = head_size // 2
    frequencies = rope_theta ** (-torch.arange(half) / half)
    fast = (frequencies > 0.05).float()  # slow ones cannot tell distance 1 from 0
    # of keys (1, 0) and queries turned by one position, the product falls by sum(1 - cos) from distance 1 to distance 0
    scale = (sharpness * math.sqrt(head_size) / (fast * (1 - frequencies.cos())).sum()).sqrt() / strength
    for head in range(previous_heads):
        real, imaginary = slice(head * head_size, head * head_size + half), slice(head * head_size + half, (head + 1) * head_size)
        first.q_proj.weight[real] += (scale * fast * frequencies.cos())[:, None] * direction
        first.q_proj.weight[imaginary] -= (scale * fast * frequencies.sin())[:, None] * direction
        first.k_proj.weight[real] += (scale * fast)[:, None] * direction

    def random_readers(rows: int, std: float) -> torch.Tensor:
        """Rows that do not see the common part."""
        weight = torch.randn(rows, size) * std
        return weight - (weight @ direction)[:, None] * direction

    rows = slice(0, previous_heads * head_size)
    read = random_readers(previous_heads * head_size, 0.04)
    first.v_proj.weight[rows] = read
    first.o_proj.weight[:, rows] = -read.T
    keys, values = random_readers(size, 0.09), random_readers(size, 0.09)
    second.k_proj.weight.copy_(keys)
    second.q_proj.weight.copy_(-keys)
    second.v_proj.weight.copy_(values)
    second.o_proj.weight.copy_(values.T)


def load_model(
    name_or_path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """A causal language model from a folder of ours or from the model hub, without dropout."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it without types
    model.train(False)
    return model
