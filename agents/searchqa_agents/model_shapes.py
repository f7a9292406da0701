"""The shapes of published models: their configurations without their weights, so that a plan or a model of random weights needs no hub."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_QWEN: Mapping[str, Any] = {
    "model_type": "qwen2",
    "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "rms_norm_eps": 1e-6,
}


def _llama(factor: float) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "model_type": "llama",
        "max_position_embeddings": 131_072,
        "rope_parameters": {**rope, "original_max_position_embeddings": 8192},
        "rms_norm_eps": 1e-5,
        "vocab_size": 128_256,
        "num_key_value_heads": 8,
    }


def _layers(hidden_size: int, num_hidden_layers: int, num_attention_heads: int, intermediate_size: int) -> dict[str, int]:
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "intermediate_size": intermediate_size,
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen2.5-0.5b": {**_QWEN, **_layers(896, 24, 14, 4864), "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
    "qwen2.5-1.5b": {**_QWEN, **_layers(1536, 28, 12, 8960), "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
    "qwen2.5-3b": {**_QWEN, **_layers(2048, 36, 16, 11_008), "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
    "qwen2.5-7b": {**_QWEN, **_layers(3584, 28, 28, 18_944), "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False},
    "qwen2.5-14b": {
        **_QWEN, **_layers(5120, 48, 40, 13_824), "num_key_value_heads": 8, "vocab_size": 152_064, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    },
    "llama-3.2-1b": {**_llama(32.0), **_layers(2048, 16, 32, 8192), "head_dim": 64, "tie_word_embeddings": True},
    "llama-3.2-3b": {**_llama(32.0), **_layers(3072, 28, 24, 8192), "head_dim": 128, "tie_word_embeddings": True},
    "llama-3.1-8b": {**_llama(8.0), **_layers(4096, 32, 32, 14_336), "head_dim": 128, "tie_word_embeddings": False},
}  # fmt: skip
"""Configurations by name, as the models' ``config.json`` on the hub have them (Qwen/Qwen2.5-*, meta-llama/Llama-3.2-*, meta-llama/Llama-3.1-8B).

Base and instruct models have one shape. Of Qwen the positions are those that both kinds have; the base models of 1.5B, 7B and 14B say 131,072.
"""


def shape_name(model: str) -> str | None:
    """The name in :data:`SHAPES` of a model's name, such as ``Qwen/Qwen2.5-3B-Instruct``; None for any other."""
    name = model.rpartition("/")[2].lower().removesuffix("-instruct").replace("meta-llama-", "llama-")
    return name if name in SHAPES else None


def shape_config(like: str | None, *, num_hidden_layers: int | None = None, vocab_size: int | None = None) -> PreTrainedConfig:
    """The configuration of a published model, whole or cut.

    Parameters
    ----------
    like
        A name of :data:`SHAPES`, or of a model on the hub that has one of these shapes.
    num_hidden_layers, vocab_size
        Fewer layers, another vocabulary; None: as published.

    Raises
    ------
    ConfigurationError
        For another name, and for counts that cannot be.
    """
    from transformers import AutoConfig

    name = shape_name(like) if like is not None else None
    if name is None:
        raise ConfigurationError(f"random.like (or llm) must be a shape that is known, one of {', '.join(SHAPES)}; got {like!r}.")
    values = copy.deepcopy(dict(SHAPES[name]))
    for key, cut in (("num_hidden_layers", num_hidden_layers), ("vocab_size", vocab_size)):
        if cut is not None and cut < 1:
            raise ConfigurationError(f"random.{key} must be at least 1, or null for that of {name}; got {cut}.")
        if cut is not None and key == "num_hidden_layers" and cut > values[key]:
            raise ConfigurationError(f"random.{key} cuts the {values[key]} layers of {name} and adds none; got {cut}.")
        values[key] = values[key] if cut is None else cut
    config: PreTrainedConfig = AutoConfig.for_model(**values)
    return config


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: all its tensors have a shape and a type, and no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


def random_model(
    config: PreTrainedConfig, seed: int, *, pad_id: int, eos_id: int, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """A model of random weights, made in ``dtype`` on ``device`` at once, so that each weight is in memory once.

    The same ``seed`` gives the same weights on one kind of device; the global random state of torch is left as it was.
    """
    import torch
    from transformers import AutoModelForCausalLM

    place = torch.device(device)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = pad_id, None, eos_id
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.train(False)
    return model
