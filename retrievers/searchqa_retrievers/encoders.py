"""Texts to unit vectors by a sentence encoder, with the settings that its authors published."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from searchqa_retrievers.types import RetrieverError

POOLINGS = ("mean", "cls")
DTYPES = ("float32", "bfloat16", "float16")

# A text is padded to the next multiple, whatever stands beside it in the batch, so that its vector does not depend on that.
_BUCKET = 16
# Of a pass of queries on an accelerator, whatever their number: a matrix product's last bits depend on its shape.
_QUERY_ROWS = 32


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """What turns a text into a vector; all of it belongs to the published model and none may be changed between passages and queries."""

    model: str
    """a name on the Hugging Face Hub, or a folder"""
    query_prefix: str = ""
    passage_prefix: str = ""
    pooling: str = "mean"
    """``mean`` of the last layer over the tokens of the text, or ``cls``: its first vector"""
    max_tokens: int = 512
    """longer texts are cut; special tokens count"""

    def __post_init__(self) -> None:
        for name in ("model", "query_prefix", "passage_prefix"):
            if not isinstance(getattr(self, name), str):
                raise RetrieverError(f"{name} of an encoder must be a string, got {getattr(self, name)!r:.200}")
        if self.pooling not in POOLINGS:
            raise RetrieverError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 8:
            raise RetrieverError(f"max_tokens must be at least 8, a whole number, got {self.max_tokens!r:.200}")


_E5 = EncoderSettings("intfloat/e5-base-v2", query_prefix="query: ", passage_prefix="passage: ")

ENCODER_PRESETS: Mapping[str, EncoderSettings] = MappingProxyType(
    {
        "e5": _E5,
        "search-r1": replace(_E5, max_tokens=256),
        "bge": EncoderSettings(
            "BAAI/bge-large-en-v1.5", query_prefix="Represent this sentence for searching relevant passages: ", pooling="cls"
        ),
        "minilm": EncoderSettings("sentence-transformers/all-MiniLM-L6-v2", max_tokens=256),
    }
)
"""``e5``: Wang et al. 2022, model card of e5-base-v2; ``search-r1``: the same, cut at 256 tokens as Search-R1's server and index are;
``bge``: Xiao et al. 2023, model card of bge-large-en-v1.5 (R1-Searcher's encoder); ``minilm``: model card of all-MiniLM-L6-v2."""


class Encoder:
    """A sentence encoder of ``transformers``.

    Each text is padded to a length of its own, never to its neighbours'. A query has the model to itself on the CPU, where its vector is
    the same bit for bit whatever else is encoded in the same call; elsewhere every pass of queries of one length has the same number of
    rows, to the same end. Vectors of passages are the same up to rounding. Can be shared by threads, which take turns, and pickled: it
    comes back by loading the model again.

    Parameters
    ----------
    settings : str, mapping or EncoderSettings
        A name of :data:`ENCODER_PRESETS`, or settings for any other sentence encoder.
    model : str or None
        Folder or name to load instead of the preset's ``model``, for weights that are already on disk.
    device : str or None
        As PyTorch names it. Default: ``cuda`` where there is one, else ``cpu``.
    dtype : str or None
        ``float32``, ``bfloat16`` or ``float16``. Default: bfloat16 on CUDA, else float32. Vectors are always given in float32.
    batch_tokens : int
        At most this many tokens, padding included, go through the model at once (or one text); of queries at most 32, and on the CPU
        one.

    Attributes
    ----------
    dimension : int
        Length of a vector.
    fingerprint : str
        Hash of weights, vocabulary and settings, without the name or place of the model and the dtype: vectors of two encoders can be
        compared if and only if it is equal.

    Raises
    ------
    RetrieverError
        A setting is out of its range, PyTorch or transformers is missing, the device is not there, or the model cannot be loaded or is
        not complete; in encoding: a vector is not finite.
    """

    def __init__(
        self,
        settings: str | Mapping[str, Any] | EncoderSettings = "search-r1",
        model: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_tokens: int = 16_384,
    ) -> None:
        self.settings = encoder_settings(settings)
        if model is not None:
            if not isinstance(model, str | os.PathLike):
                raise RetrieverError(f"model of an encoder must be a folder or a name on the Hub, got {model!r:.200}")
            self.settings = replace(self.settings, model=str(model))
        if dtype is not None and dtype not in DTYPES:
            raise RetrieverError(f"dtype of an encoder must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
            raise RetrieverError(f"batch_tokens must be at least 1, a whole number, got {batch_tokens!r:.200}")
        try:
            import torch
        except ImportError as error:
            raise RetrieverError("an encoder needs PyTorch and transformers: pip install 'searchqa-gym[agents]'") from error
        self._arguments = (self.settings, None, device, dtype, batch_tokens)
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else _checked_device(device)
        self.dtype = dtype or ("bfloat16" if self.device.startswith("cuda") else "float32")
        self.batch_tokens = batch_tokens
        self._query_rows = 1 if self.device == "cpu" else _QUERY_ROWS
        self._lock = threading.Lock()
        self._tokenizer, network = _load(self.settings)
        self.dimension = int(network.config.hidden_size)
        self.fingerprint = _fingerprint(self.settings, self._tokenizer, network)
        self._network = network.to(device=self.device, dtype=getattr(torch, self.dtype)).eval()

    def encode_queries(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors of queries, float32[N, dimension]."""
        return self._encode([self.settings.query_prefix + text for text in texts], self._query_rows)

    def encode_passages(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors of passages, float32[N, dimension]."""
        return self._encode([self.settings.passage_prefix + text for text in texts], None)

    def stamp(self) -> dict[str, Any]:
        """The settings that a vector depends on, for the record of a run."""
        return {**asdict(self.settings), "fingerprint": self.fingerprint, "dtype": self.dtype}

    def __deepcopy__(self, memo: dict[int, Any]) -> Encoder:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoder, self._arguments

    def __repr__(self) -> str:
        return f"Encoder({self.settings.model!r}, device={self.device!r}, dtype={self.dtype!r})"

    def _encode(self, texts: list[str], fixed_rows: int | None) -> npt.NDArray[np.float32]:
        """``fixed_rows``: every pass has so many, as far as ``batch_tokens`` allows; None: as many as there are, and as it allows."""
        import torch

        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        if not texts:
            return vectors
        with self._lock, torch.inference_mode():
            clean = [text.encode("utf-8", "replace").decode() for text in texts]  # tokenizers refuse lone surrogates
            rows: list[list[int]] = self._tokenizer(clean, truncation=True, max_length=self.settings.max_tokens)["input_ids"]
            for length, members in _buckets([len(row) for row in rows], self.settings.max_tokens):
                most = max(1, self.batch_tokens // length)
                size = most if fixed_rows is None else min(most, fixed_rows)
                for start in range(0, len(members), size):
                    batch = members[start : start + size]
                    passed = [rows[i] for i in batch]
                    if fixed_rows is not None:
                        passed += passed[:1] * (size - len(batch))
                    vectors[batch] = self._forward(passed, length)[: len(batch)].cpu().numpy()
        if not np.isfinite(vectors).all():
            raise RetrieverError(
                f"{self!r} gave vectors with NaN; its weights are damaged or overflow in {self.dtype}: use dtype='float32'"
            )
        return vectors

    def _forward(self, rows: list[list[int]], length: int) -> Any:
        """Unit vectors float32[B, dimension] of token rows, each padded to ``length``."""
        import torch

        ids = torch.full((len(rows), length), self._tokenizer.pad_token_id, dtype=torch.long)  # [B, T]
        mask = torch.zeros((len(rows), length), dtype=torch.long)  # [B, T]
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[number, : len(row)] = 1
        mask = mask.to(self.device)
        hidden = self._network(input_ids=ids.to(self.device), attention_mask=mask).last_hidden_state.float()  # [B, T, D]
        if self.settings.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return torch.nn.functional.normalize(pooled, dim=-1)


def encoder_settings(encoder: str | Mapping[str, Any] | EncoderSettings) -> EncoderSettings:
    """The settings that a preset's name, or a mapping with the fields of :class:`EncoderSettings`, stands for.

    Raises
    ------
    RetrieverError
        The preset is unknown, or a field is unknown, missing or of another type.
    """
    if isinstance(encoder, EncoderSettings):
        return encoder
    if isinstance(encoder, Mapping):
        names = [field.name for field in fields(EncoderSettings)]
        if "model" not in encoder or set(encoder) - set(names):
            raise RetrieverError(f"encoder must be a preset or a mapping with 'model' and any of {', '.join(names)}, got {encoder!r:.200}")
        return EncoderSettings(**encoder)
    if not isinstance(encoder, str) or encoder not in ENCODER_PRESETS:
        raise RetrieverError(
            f"an encoder must be one of {', '.join(ENCODER_PRESETS)} or EncoderSettings, got {encoder!r:.200}; "
            "for another model pass EncoderSettings(model=...)"
        )
    return ENCODER_PRESETS[encoder]


def _checked_device(device: str) -> str:
    """The name of a device that is there; of the CPU it is ``"cpu"``."""
    import torch

    if not isinstance(device, str):
        raise RetrieverError(f"device of an encoder must be a string, such as 'cpu' or 'cuda:1', got {device!r:.200}")
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        reason = str(error).splitlines()[0]
        raise RetrieverError(f"the device {device!r} of an encoder is not there: {reason}; give 'cpu', 'cuda' or 'cuda:1'") from error
    return "cpu" if torch.device(device).type == "cpu" else device


def _load(settings: EncoderSettings) -> tuple[Any, Any]:
    """Tokenizer and model (float32, on the CPU); a model with weights left to chance is refused."""
    try:
        import torch
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise RetrieverError("an encoder needs PyTorch and transformers: pip install 'searchqa-gym[agents]'") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        network, report = AutoModel.from_pretrained(settings.model, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise RetrieverError(
            f"cannot load the encoder {settings.model!r}: {error}; give a folder with model and tokenizer, or a name on the Hub that "
            "can be reached or is in its cache"
        ) from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise RetrieverError(
            f"the weights of {settings.model!r} lack {', '.join(missing[:5])} ({len(missing)} in all); give a complete model"
        )
    # Not used here, and in some checkpoints absent and so drawn at random.
    if getattr(network, "pooler", None) is not None:
        network.pooler = None
    if tokenizer.pad_token_id is None:
        raise RetrieverError(f"the tokenizer of {settings.model!r} has no padding token; give a sentence encoder")
    limit = getattr(network.config, "max_position_embeddings", None)
    if limit is not None and settings.max_tokens > limit:
        raise RetrieverError(f"max_tokens must be at most the {limit} positions of {settings.model!r}, got {settings.max_tokens}")
    return tokenizer, network


def _fingerprint(settings: EncoderSettings, tokenizer: Any, network: Any) -> str:
    """Weights by name, in the order of the modules: two layers of one shape that change places make another model."""
    digest = hashlib.sha256()
    for name, weights in network.named_parameters():
        digest.update(repr([name, list(weights.shape)]).encode())
        digest.update(weights.detach().numpy().tobytes())
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode("utf-8", "surrogatepass"))
    digest.update(repr([settings.query_prefix, settings.passage_prefix, settings.pooling, settings.max_tokens]).encode())
    return digest.hexdigest()


def _buckets(lengths: list[int], longest: int) -> list[tuple[int, list[int]]]:
    """``(padded length, positions of the texts)``, the shortest first."""
    members: dict[int, list[int]] = {}
    for position, length in enumerate(lengths):
        members.setdefault(min(-(-length // _BUCKET) * _BUCKET, max(longest, length)), []).append(position)
    return sorted(members.items())
