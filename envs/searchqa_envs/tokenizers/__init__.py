"""Tokenizers: the embedded ones, and any of ``transformers`` or ``tokenizers``."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers.base import Tokenizer
from searchqa_envs.tokenizers.byte import ByteTokenizer

if TYPE_CHECKING:
    from searchqa_envs.tokenizers.huggingface import HuggingFaceTokenizer

__all__ = ["ByteTokenizer", "Tokenizer", "build_tokenizer"]

# A tokenizer holds the object that it was made of, so that the identity of that object is taken as long as the entry is there.
_of_objects: WeakValueDictionary[tuple[Any, ...], HuggingFaceTokenizer] = WeakValueDictionary()


def build_tokenizer(config: str | os.PathLike[str] | Tokenizer | Any) -> Tokenizer:
    """The tokenizer that ``config`` names or is.

    Making one of ``transformers`` or ``tokenizers`` can take seconds, so that the same name, path (while its files do not change) or object
    gives the same tokenizer within a process.

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
    from searchqa_envs.tokenizers.huggingface import is_huggingface

    if isinstance(config, (str, os.PathLike)):
        return _named(os.fspath(config), _files(Path(config)))
    if is_huggingface(config):
        return _of_object(config)
    raise ConfigurationError(
        "tokenizer must be 'byte', 'world', a path, a name on the model hub, a transformers or tokenizers object, or an object with the "
        f"methods of searchqa_envs.tokenizers.Tokenizer; got {type(config).__name__}."
    )


@lru_cache(maxsize=8)
def _named(name: str, files: tuple[tuple[Any, ...], ...]) -> HuggingFaceTokenizer:
    from searchqa_envs.tokenizers.huggingface import HuggingFaceTokenizer

    return HuggingFaceTokenizer(name)


def _files(path: Path) -> tuple[tuple[Any, ...], ...]:
    """What changes when a file of a tokenizer does; nothing for a name on the hub."""
    if not path.exists():
        return ()
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    return tuple((str(file.resolve()), file.stat().st_mtime_ns, file.stat().st_size) for file in found if file.is_file())


def _of_object(source: Any) -> HuggingFaceTokenizer:
    from searchqa_envs.tokenizers.huggingface import HuggingFaceTokenizer

    size = source.get_vocab_size() if hasattr(source, "get_vocab_size") else len(source)  # grows when its owner adds tokens
    key = (id(source), size, getattr(source, "eos_token_id", None), getattr(source, "pad_token_id", None))
    made = _of_objects.get(key)
    if made is None:
        made = _of_objects[key] = HuggingFaceTokenizer(source)
    return made
