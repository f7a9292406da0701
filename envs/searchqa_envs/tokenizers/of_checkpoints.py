"""Tokenizers of checkpoints that were made with an embedded one, by the record that lies beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers import build_tokenizer
from searchqa_envs.tokenizers.base import Tokenizer
from searchqa_envs.tokenizers.huggingface import RECORD_FILE

_EMBEDDED = ("world", "byte")


def embedded_tokenizer(folder: Path) -> Tokenizer | None:
    """The embedded tokenizer that a checkpoint's folder names; None for a folder with files of a tokenizer that ``transformers`` loads.

    Raises
    ------
    ConfigurationError
        The folder names another version of an embedded tokenizer, whose ids would mean something else.
    """
    record = folder / RECORD_FILE
    if not record.is_file() or (folder / "tokenizer_config.json").is_file():
        return None
    if (folder / "tokenizer.json").is_file():
        return build_tokenizer(folder)
    name = json.loads(record.read_text(encoding="utf-8"))["name"]
    embedded = next((one for one in _EMBEDDED if name == one or name.startswith(f"{one}-")), None)
    if embedded is None:
        return None
    tokenizer = build_tokenizer(embedded)
    if tokenizer.name != name:
        raise ConfigurationError(
            f"{folder} was made with the tokenizer {name!r}, but this version of the package has {tokenizer.name!r}: make the checkpoint anew."
        )
    return tokenizer
