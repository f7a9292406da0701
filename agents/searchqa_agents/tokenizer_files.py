"""Tokenizers beside what was made with them: in a policy's folder, and in a run's, whose page shows single tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers.base import Tokenizer
from searchqa_envs.tokenizers.huggingface import RECORD_FILE, HuggingFaceTokenizer

ADAPTER_FILE = "adapter_config.json"
"""What peft writes beside adapters."""
_FILES = ("tokenizer.json", "tokenizer_config.json")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what :func:`saved_tokenizer` reads: a tokenizer of ``transformers`` or ``tokenizers`` itself, of any other name and size."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.save(folder)
    else:
        record = {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size}
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def saved_record(folder: Path) -> dict[str, Any] | None:
    """The name and size (and more) of the tokenizer saved in a folder; None for a folder of another library, or a name on the hub."""
    file = folder / RECORD_FILE
    if not file.is_file():
        return None
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def check_record(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise ``ConfigurationError`` if a folder records another tokenizer than the one given."""
    record = saved_record(folder)
    if record is not None and (record["name"], record["vocab_size"]) != (tokenizer.name, tokenizer.vocab_size):
        raise ConfigurationError(
            f"The policy in {folder} was trained with tokenizer {record['name']!r} ({record['vocab_size']} ids); got {tokenizer.name!r} "
            f"({tokenizer.vocab_size} ids). Make the environment with the policy's tokenizer."
        )


def saved_tokenizer(folder: Path) -> str:
    """What ``build_tokenizer`` takes for the tokenizer of a folder (or name on the hub). Raises ``ConfigurationError`` if it is not there."""
    record = saved_record(folder)
    if any((folder / name).is_file() for name in _FILES):
        return str(folder)
    if record is None:
        return base_model(folder) or str(folder)
    own = own_tokenizer(record["name"])
    if own is None:
        raise ConfigurationError(
            f"{folder} was made with the tokenizer {record['name']!r}, which is not in the folder. Name it: env.tokenizer=..."
        )
    return own


def base_model(folder: Path) -> str | None:
    """The folder or name on the hub of the model that a folder's adapters are of; None for a folder without adapters, or a name on the hub."""
    file = folder / ADAPTER_FILE
    if not file.is_file():
        return None
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return None if base is None else str(base)


def own_tokenizer(name: str) -> str | None:
    """``world`` or ``byte``, the embedded tokenizer that a name means; None for any other."""
    return next((own for own in ("world", "byte") if name == own or name.startswith(f"{own}-")), None)
