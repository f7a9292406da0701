"""Models: the tiny Llama of the generated world, and models from a name or a folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from searchqa_agents.hub import hub_errors
from searchqa_agents.lora import has_lora, merged_model, with_adapters
from searchqa_agents.tokenizer_files import base_model


def make_tiny_model(
    vocab_size: int,
    seed: int,
    *,
    pad_id: int,
    eos_id: int,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 8,
    feed_forward_size: int = 352,
    max_positions: int = 4096,
    initializer_range: float = 0.05,
    rope_theta: float = 10_000.0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> LlamaForCausalLM:
    """A randomly initialised Llama with tied embeddings; about 0.45 million parameters by default.

    The same ``seed`` gives the same weights; the global random state of torch is left as it was.
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
    model.to(device=device, dtype=dtype)  # type: ignore[call-arg]  # transformers wraps it without types
    model.train(False)
    return model


def load_model(
    name_or_path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """A causal language model from a folder or from the model hub, without dropout.

    A folder of LoRA adapters, as peft saves them, gives the model that they are of with the adapters added to its weights.

    Raises
    ------
    ConfigurationError
        If the hub does not give out the model, or the folder's files are none that transformers can load.
    """
    folder = Path(name_or_path)
    base = base_model(folder)
    with hub_errors(name_or_path if base is None else base):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name_or_path if base is None else base, dtype=dtype)
    if base is not None:
        model = with_adapters(model, folder)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it without types
    model.train(False)
    return model


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write what transformers' ``from_pretrained`` reads; LoRA adapters are added to the weights."""
    (merged_model(model) if has_lora(model) else model).save_pretrained(folder)
    mode = (folder / "config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):  # written for their owner's eyes only
        file.chmod(mode)
