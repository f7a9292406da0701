"""Tokenizers: the embedded ones, and any of ``transformers`` or ``tokenizers``."""

from __future__ import annotations

import os
from typing import Any

from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers.base import Tokenizer
from searchqa_envs.tokenizers.byte import ByteTokenizer

__all__ = ["ByteTokenizer", "Tokenizer", "build_tokenizer"]


def build_tokenizer(config: str | os.PathLike[str] | Tokenizer | Any) -> Tokenizer:
    """The tokenizer that ``config`` names or is.

    Parameters
    ----------
    config
        ``"byte"``, ``"world"``, a path (``tokenizer.json`` or the folder of a model), a name on the model hub, a ``transformers`` or
        ``tokenizers`` object, or an object with the methods of :class:`Tokenizer`.

    Raises
    ------
    ConfigurationError
        If no tokenizer can be made of it.
    """
    if config == "byte":
        return ByteTokenizer()
    if config == "world":
        from searchqa_envs.tokenizers.world import WorldTokenizer

        return WorldTokenizer()
    if isinstance(config, Tokenizer):
        return config
    from searchqa_envs.tokenizers.huggingface import HuggingFaceTokenizer, is_huggingface

    if isinstance(config, (str, os.PathLike)) or is_huggingface(config):
        return HuggingFaceTokenizer(config)
    raise ConfigurationError(
        "tokenizer must be 'byte', 'world', a path, a name on the model hub, a transformers or tokenizers object, or an object with the "
        f"methods of searchqa_envs.tokenizers.Tokenizer; got {type(config).__name__}."
    )
