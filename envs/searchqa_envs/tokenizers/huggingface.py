"""Any tokenizer of ``transformers`` or ``tokenizers``, by object, path or name on the model hub.

Neither library is imported before one of these is made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers.byte import without_surrogates
from searchqa_envs.tokenizers.table import longest_text, look_up, outside_vocabulary

logger = logging.getLogger(__name__)

RECORD_FILE = "searchqa_tokenizer.json"
"""In the folder of a saved tokenizer: its name, and which tokens are padding and end of sequence."""

_EOS_NAMES = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "</s>", "<eos>", "[EOS]", "[SEP]")
_PAD_NAMES = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|endoftext|>",
    "<|finetune_right_pad_id|>",
    "<|fim_pad|>",
    "<|reserved_special_token_0|>",
    "<unk>",
)
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "▁"
_PROBE = " Two  blanks\n\ta tab, isn't it? <answer> Tōkyō 東京 🙂 </answer>\n\nDoc 1: U.S. 1,024.5\n"


def is_huggingface(tokenizer: object) -> bool:
    """Whether an object is a tokenizer of ``transformers`` or ``tokenizers``; imports neither."""
    return any(base.__module__.partition(".")[0] in ("transformers", "tokenizers") for base in type(tokenizer).__mro__)


class HuggingFaceTokenizer:
    """A tokenizer of somebody's model, as environments need it.

    Text is encoded as it stands: no begin or end of sequence, no blank put in front, no truncation. The object given is not changed.
    Byte-level BPE (GPT-2, Qwen, Llama 3, ...) and SentencePiece with byte fallback (Llama 2, Gemma, ...) know the exact bytes of each id
    and give all text back, save for what their own normaliser changes (Qwen: NFC; SentencePiece: "▁" is a blank). Others (WordPiece, Unigram
    without bytes) lose text; ``lossless`` tells, and a warning is logged.

    Parameters
    ----------
    tokenizer
        A ``transformers`` tokenizer, a ``tokenizers.Tokenizer``, the path of a ``tokenizer.json`` or of a model's folder, or a name on the hub.
        Code from the hub is never run.
    revision
        The revision of a name on the hub.
    pad_token, eos_token
        Tokens of the vocabulary to use instead of those the tokenizer declares. Where it declares no padding, or its end of sequence,
        another token that never stands for text is taken.

    Attributes
    ----------
    name
        Where it comes from and a hash of its vocabulary, for stamps.
    lossless
        Whether ordinary text comes back unchanged.

    Raises
    ------
    ConfigurationError
        If it cannot be found or loaded, or has no end of sequence or no padding.
    """

    def __init__(
        self,
        tokenizer: Any,
        revision: str | None = None,
        *,
        pad_token: str | None = None,
        eos_token: str | None = None,
    ) -> None:
        shared = is_huggingface(tokenizer)
        source, origin = _load(tokenizer, revision)
        saved = _saved_record(tokenizer)
        if saved is not None:
            origin = saved["name"].rpartition("@")[0]
            pad_token, eos_token = pad_token or saved["pad_token"], eos_token or saved["eos_token"]
        vocabulary: dict[str, int] = source.get_vocab()
        added = _added_tokens(source)
        self._source = source
        self._backend, settings = _plain_backend(source, shared)
        self._tokens_by_id = {token_id: token for token, token_id in vocabulary.items()} | added
        table = _piece_table(self._tokens_by_id, added, settings)
        self._marks_spaces = _space_marks(settings) == {_SPACE_MARK}

        self.vocab_size: int = max(self._tokens_by_id) + 1
        self.eos_id: int = self._choose_eos(vocabulary, eos_token, origin)
        self.pad_id: int = self._choose_pad(vocabulary, pad_token, origin, table)
        # the normaliser works on added tokens too: under lower case "<search>" finds the token "<Search>"
        self.reserved: tuple[str, ...] = tuple(sorted({*added.values(), *map(self.normalise, added.values())} - {""}))
        self.name: str = f"{origin}@{_hash(self._tokens_by_id)}"
        self._pieces: dict[int, bytes] | None = None
        if table is not None:
            self._pieces = dict.fromkeys(range(self.vocab_size), b"") | table | {self.pad_id: b"", self.eos_id: b""}
        self.lossless: bool = self.decode(self.encode(_PROBE)) == _PROBE
        if not self.lossless:
            logger.warning(
                "Tokenizer %s does not give text back unchanged, so tags and answers may be misread. Use a byte-level or byte-fallback "
                "tokenizer, or add the dialect's tags to it as tokens.",
                self.name,
            )

    def encode(self, text: str) -> list[int]:
        """Ids of the text, nothing added. Lone surrogates become U+FFFD."""
        text = without_surrogates(text)
        if self._backend is not None:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return ids
        return list(self._source.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; padding and end of sequence give nothing, other control tokens their own text."""
        if self._pieces is not None:
            return b"".join(self.pieces(ids)).decode("utf-8", "replace")
        kept = self._checked(ids)
        if self._backend is not None:
            return str(self._backend.decode(kept, skip_special_tokens=False))
        return str(self._source.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def normalise(self, text: str) -> str:
        """The text as it comes back from ``decode(encode(text))``, so far as the normaliser decides: under NFKC ``＜`` becomes ``<``.

        Text from outside must be normalised before tags in it are looked for.
        """
        text = without_surrogates(text)
        normalizer = getattr(self._backend, "normalizer", None)
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        return text.replace(_SPACE_MARK, " ") if self._marks_spaces else text

    @cached_property
    def longest_piece(self) -> int | None:
        """The most characters that one id stands for; None where ids have no bytes of their own, or text is lost."""
        if self._pieces is None or not self.lossless:
            return None
        return max(longest_text(list(self._pieces.values())), *map(len, self.reserved), 1)

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each id.

        Control tokens give their own text, so that a forged marker is seen; padding and end of sequence give ``b""``. Where ids have no bytes
        of their own (WordPiece, ...), what each adds to the text of those before it.
        """
        if self._pieces is None:
            return list(self._growth(ids))
        return look_up(self._pieces, ids, self.vocab_size)

    def chat_prompt(self, text: str, system: str | None = None) -> str | None:
        """The text as a user's message in the model's chat template, behind a system message if given, up to where it speaks; None without a template."""
        if getattr(self._source, "chat_template", None) is None:
            return None
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": text})
        return str(self._source.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer into a folder. ``HuggingFaceTokenizer(path)`` is the same again: name, padding, end of sequence."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(self._source, "save_pretrained"):
            self._source.save_pretrained(folder)
        else:
            self._source.save(str(folder / "tokenizer.json"))
        record = {
            "name": self.name,
            "vocab_size": self.vocab_size,
            "pad_token": self._tokens_by_id[self.pad_id],
            "eos_token": self._tokens_by_id[self.eos_id],
        }
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _growth(self, ids: Sequence[int]) -> Iterator[bytes]:
        known = ""
        for end in range(1, len(ids) + 1):
            text = self.decode(ids[:end])
            if end < len(ids):
                text = text.rstrip("\ufffd")  # perhaps the first bytes of a character: they come with the id that completes it
            grown = text[len(known) :] if text.startswith(known) else ""
            known += grown
            yield grown.encode()

    def _checked(self, ids: Sequence[int]) -> list[int]:
        kept = [int(token) for token in ids if token != self.pad_id and token != self.eos_id]
        for token in kept:
            if not 0 <= token < self.vocab_size:
                raise outside_vocabulary(token, self.vocab_size)
        return kept

    def _choose_eos(self, vocabulary: Mapping[str, int], given: str | None, origin: str) -> int:
        if given is not None:
            return _token_id(vocabulary, given, "eos_token")
        declared = getattr(self._source, "eos_token_id", None)
        if declared is not None:
            return int(declared)
        for token in _EOS_NAMES:
            if token in vocabulary:
                return vocabulary[token]
        raise ConfigurationError(
            f"A tokenizer needs an end-of-sequence token; {origin} declares none and has none of {_EOS_NAMES}. "
            "Name one: HuggingFaceTokenizer(..., eos_token='...')."
        )

    def _choose_pad(self, vocabulary: Mapping[str, int], given: str | None, origin: str, table: Mapping[int, bytes] | None) -> int:
        if given is not None:
            pad_id = _token_id(vocabulary, given, "pad_token")
            if pad_id == self.eos_id:
                raise ConfigurationError(f"pad_token must differ from the end of sequence, {given!r} here. Choose another token.")
            return pad_id
        declared = getattr(self._source, "pad_token_id", None)
        if declared is not None and declared != self.eos_id:
            return int(declared)
        for token in _PAD_NAMES:
            if vocabulary.get(token, self.eos_id) != self.eos_id:
                return vocabulary[token]
        # the byte 0xFF is in no UTF-8 text, so that its token is never encoded
        for token_id, piece in (table or {}).items():
            if piece == b"\xff":
                return token_id
        raise ConfigurationError(
            f"A tokenizer needs a padding token other than its end of sequence; {origin} has none and none of {_PAD_NAMES}. "
            "Name a token that never stands for text: HuggingFaceTokenizer(..., pad_token='...')."
        )

    def __deepcopy__(self, memo: dict[int, object]) -> HuggingFaceTokenizer:
        return self

    def __repr__(self) -> str:
        return f"HuggingFaceTokenizer({self.name!r}, vocab_size={self.vocab_size})"


def _load(tokenizer: Any, revision: str | None) -> tuple[Any, str]:
    """A tokenizer of either library, and what to call it (never a folder of this machine)."""
    if is_huggingface(tokenizer):
        name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
        return tokenizer, Path(name).name if os.path.exists(name) else name
    if not isinstance(tokenizer, (str, os.PathLike)):
        raise ConfigurationError(
            f"tokenizer must be a transformers or tokenizers object, a path, or a name on the model hub; got {type(tokenizer).__name__}."
        )
    text, path = os.fspath(tokenizer), Path(tokenizer)
    if path.is_file():
        return _load_file(path), path.parent.resolve().name if path.name == "tokenizer.json" else path.stem
    is_folder = path.is_dir()
    if (
        is_folder
        and (path / "tokenizer.json").is_file()
        and (path / RECORD_FILE).is_file()
        and not (path / "tokenizer_config.json").is_file()
    ):
        return _load_file(path / "tokenizer.json"), path.resolve().name  # saved by us, of an object of ``tokenizers``
    if not is_folder and (text.startswith((".", "~", os.sep)) or text.endswith(".json") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text)):
        raise ConfigurationError(f"tokenizer names the path {text!r}, which does not exist. {_WAYS}")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigurationError(
            f"The tokenizer {text!r} needs transformers: pip install 'searchqa-gym[agents]'. A tokenizer.json needs only tokenizers."
        ) from error
    try:
        loaded = AutoTokenizer.from_pretrained(text, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        where = "the folder" if is_folder else "the model hub or its cache"
        raise ConfigurationError(f"The tokenizer {text!r} cannot be loaded from {where}: {error} {_WAYS}") from error
    return loaded, path.resolve().name if is_folder else text


def _saved_record(tokenizer: Any) -> dict[str, Any] | None:
    """What :meth:`HuggingFaceTokenizer.save` noted in a folder; None for anything else."""
    if not isinstance(tokenizer, (str, os.PathLike)) or not (Path(tokenizer) / RECORD_FILE).is_file():
        return None
    record: dict[str, Any] = json.loads((Path(tokenizer) / RECORD_FILE).read_text(encoding="utf-8"))
    return record if "pad_token" in record else None


_WAYS = (
    "Give 'byte' or 'world' (both embedded), the path of a tokenizer.json or of a model's folder, a name on the hub, or the object itself."
)


def _load_file(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigurationError(f"The tokenizer {path.name!r} needs tokenizers: pip install tokenizers.") from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # what the library raises for a malformed file is Exception itself
        raise ConfigurationError(f"{path.name!r} is not a tokenizer.json: {error}. {_WAYS}") from error


def _plain_backend(source: Any, shared: bool) -> tuple[Any, dict[str, Any]]:
    """The ``tokenizers`` object inside, freed of truncation, padding and the blank put in front of a text; and its settings.

    A copy where others hold it (``shared``: ``transformers`` sets truncation on it at each call) or where settings change; copying takes
    seconds for a large vocabulary. None and no settings for a tokenizer written in Python.
    """
    backend = source if hasattr(source, "to_str") else getattr(source, "backend_tokenizer", None)
    if backend is None:
        return None, {}
    found = {name: _settings(getattr(backend, name)) for name in ("normalizer", "pre_tokenizer", "decoder")}
    plain = _without_prefix(found)
    if shared or plain != found:
        state = json.loads(backend.to_str())
        backend = type(backend).from_str(json.dumps(state | plain))
    backend.no_truncation()
    backend.no_padding()
    return backend, plain


def _settings(component: Any) -> Any:
    """The settings of a part of a ``tokenizers`` object, as in a tokenizer.json."""
    return None if component is None else json.loads(component.__getstate__())


def _without_prefix(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under which nothing is put in front of a text, and decoding never rewrites what earlier ids gave."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    normalizers = _components(plain["normalizer"], "normalizers")
    kept = [part for part in normalizers if part["type"] != "Prepend"]
    if len(kept) < len(normalizers):
        plain["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for part in [*kept, *_components(plain["pre_tokenizer"], "pretokenizers")]:
        if part["type"] == "ByteLevel" and "add_prefix_space" in part:
            part["add_prefix_space"] = False
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
    for part in _components(plain["decoder"], "decoders"):
        if part["type"] == "WordPiece":
            part["cleanup"] = False
    return plain


def _components(component: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a sequence of normalisers, pre-tokenizers or decoders, however nested."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]  # type: ignore[list-item]
    return [part for inner in component[key] for part in _components(inner, key)]


def _piece_table(tokens: Mapping[int, str], added: Mapping[int, str], settings: Mapping[str, Any]) -> dict[int, bytes] | None:
    """The bytes of every id, or None where an id has no bytes of its own."""
    decoders = _components(settings.get("decoder"), "decoders")
    kinds = {part["type"] for part in decoders}
    literal = {token_id: token.encode() for token_id, token in added.items()}
    if "ByteLevel" in kinds:
        values = _byte_alphabet()
        return {token_id: _byte_level(token, values) for token_id, token in tokens.items()} | literal
    if _space_marks(settings) == {_SPACE_MARK}:
        fallback = "ByteFallback" in kinds
        return {token_id: _sentencepiece(token, fallback) for token_id, token in tokens.items()} | literal
    return None


def _space_marks(settings: Mapping[str, Any]) -> set[str | None]:
    """What the decoder turns into blanks."""
    decoders = _components(settings.get("decoder"), "decoders")
    marks = {part.get("replacement") for part in decoders if part["type"] == "Metaspace"}
    return marks | {part["pattern"].get("String") for part in decoders if part["type"] == "Replace" and part["content"] == " "}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 for itself, the others from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(0x100 + index): value for index, value in enumerate(others)}


def _byte_level(token: str, values: Mapping[str, int]) -> bytes:
    if all(character in values for character in token):
        return bytes([values[character] for character in token])
    return token.encode()


def _sentencepiece(token: str, fallback: bool) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token) if fallback else None
    if match:
        return bytes([int(match.group(1), 16)])
    return token.replace(_SPACE_MARK, " ").encode()


def _added_tokens(source: Any) -> dict[int, str]:
    """Tokens outside the model's own vocabulary, and control tokens, with their text."""
    if hasattr(source, "get_added_tokens_decoder"):
        decoder = source.get_added_tokens_decoder()
    else:
        decoder = source.added_tokens_decoder
    return {int(token_id): token.content for token_id, token in decoder.items()}


def _token_id(vocabulary: Mapping[str, int], token: str, argument: str) -> int:
    if token not in vocabulary:
        raise ConfigurationError(f"{argument} must be a token of the vocabulary; got {token!r}. Add it to the tokenizer first.")
    return vocabulary[token]


def _hash(tokens: Mapping[int, str]) -> str:
    listed = json.dumps([[token_id, tokens[token_id]] for token_id in sorted(tokens)])
    return hashlib.sha256(listed.encode()).hexdigest()[:12]
