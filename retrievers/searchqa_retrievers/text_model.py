"""A local causal language model of ``transformers`` that writes texts, each with noise of its own."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from searchqa_retrievers.text_model_tokenizers import load_text_tokenizer
from searchqa_retrievers.types import RetrieverError, RetrieverUnavailable
from searchqa_retrievers.wrapped import begin_in_forks

DTYPES = ("float32", "bfloat16", "float16")
_TAIL = 32
"""Tokens at the end of a text in which a stop string is looked for; one of a few characters is never longer."""
_KEPT_SHARE = 0.75
"""Rows that have ended leave the batch when no more than this share still writes: each time costs a copy of the attention cache."""


def without_thoughts(text: str) -> str:
    """A model's text without its thoughts: what stands before the last ``</think>``, and what follows a ``<think>`` that does not end."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


class TextJob(NamedTuple):
    """One text to write."""

    prompt: str
    seed: int
    """of its noise, in [0, 2**63)"""
    max_tokens: int
    stop: str
    """the text ends before it"""


class TextModel:
    """Writes texts with a causal language model, several at once.

    A row's noise is a function of (seed, position) and is turned into tokens by the inverse of the distribution function, so that its text
    depends on nothing else in the batch, up to the rounding of the model's arithmetic.

    Parameters
    ----------
    checkpoint
        A folder, or a name on the hub.
    temperature
        0 takes the likeliest token.
    batch_size
        Most texts at once.
    device
        As PyTorch names it. Default: ``cuda`` where there is one, else ``cpu``.
    dtype
        ``float32``, ``bfloat16`` or ``float16``. Default: bfloat16 on CUDA, else float32.
    system
        System message where the tokenizer has a chat template; None: there is none.

    Raises
    ------
    RetrieverError
        A setting is out of its range, PyTorch or transformers is missing, the device is not there, or the model cannot be loaded or is not complete.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        temperature: float = 0.8,
        batch_size: int = 64,
        device: str | None = None,
        dtype: str | None = None,
        system: str | None = "",
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise RetrieverError(f"dtype of a text model must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if not 0 <= temperature < float("inf") or batch_size < 1:
            raise RetrieverError(
                f"a text model needs a temperature of at least 0 and a batch_size of at least 1, got {temperature}, {batch_size}"
            )
        self.checkpoint = str(checkpoint)
        self.temperature = float(temperature)
        self.batch_size = batch_size
        self._loaded = _shared(self.checkpoint, device, dtype)
        self.tokenizer = load_text_tokenizer(self.checkpoint, system)
        size = self._loaded.model.config.get_text_config().vocab_size
        if size < self.tokenizer.vocab_size:
            raise RetrieverError(
                f"the model {self.checkpoint!r} has {size} ids, fewer than the {self.tokenizer.vocab_size} of its tokenizer {self.tokenizer.name}"
            )
        self._ends = frozenset({self.tokenizer.eos_id, *self._loaded.ends})

    @property
    def sha256(self) -> str:
        """Hash of the weights; 16 digits."""
        return self._loaded.sha256

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return str(self._loaded.model.dtype).removeprefix("torch.")

    def write(self, jobs: Sequence[TextJob]) -> tuple[list[str], int]:
        """The texts without thoughts, see :func:`without_thoughts`, and how many prompts had to be cut.

        Raises
        ------
        RetrieverUnavailable
            The device failed, such as for want of memory.
        RetrieverError
            The model's probabilities are not numbers.
        """
        prompts = [self.tokenizer.encode(job.prompt) for job in jobs]
        cut = 0
        positions = self._loaded.positions
        rooms = [job.max_tokens for job in jobs]
        if positions is not None:
            for number, job in enumerate(jobs):
                most = positions - min(job.max_tokens, positions // 2)
                if len(prompts[number]) > most:  # the end has the query
                    prompts[number] = prompts[number][-most:]
                    cut += 1
                rooms[number] = min(job.max_tokens, positions - len(prompts[number]))
        texts = [""] * len(jobs)
        order = sorted(range(len(jobs)), key=lambda number: len(prompts[number]))
        with self._loaded.lock:
            for start in range(0, len(order), self.batch_size):
                some = order[start : start + self.batch_size]
                rows = [_Row(prompts[number], jobs[number], rooms[number]) for number in some]
                self._write_batch(rows)
                for number, row in zip(some, rows, strict=True):
                    texts[number] = without_thoughts(self.tokenizer.decode(row.ids)).split(row.job.stop, 1)[0]
        return texts, cut

    def _write_batch(self, rows: list[_Row]) -> None:
        import torch

        try:
            with torch.inference_mode():
                self._decode(rows)
        except torch.OutOfMemoryError as error:
            raise RetrieverUnavailable(
                f"the device of the text model {self.checkpoint!r} has no memory left for {len(rows)} texts at once: {error}; lower batch_size"
            ) from error

    def _decode(self, rows: list[_Row]) -> None:
        import torch
        from transformers import DynamicCache

        model, device = self._loaded.model, self._loaded.device
        longest = max(len(row.prompt) for row in rows)
        ids = torch.full((len(rows), longest), self.tokenizer.pad_id, dtype=torch.long)  # [B, T]
        mask = torch.zeros((len(rows), longest), dtype=torch.long)  # [B, T]
        for number, row in enumerate(rows):
            ids[number, longest - len(row.prompt) :] = torch.tensor(row.prompt, dtype=torch.long)
            mask[number, longest - len(row.prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # [B, T]
        cache = DynamicCache(config=model.config)
        while True:
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]  # [B, V]
            noise = torch.tensor([row.noise() for row in rows], dtype=torch.float64, device=device)  # [B]
            chosen = self._sample(logits, noise)  # [B]
            for row, token in zip(rows, chosen.tolist(), strict=True):
                if not row.ended:
                    self._add(row, token)
            going = [number for number, row in enumerate(rows) if not row.ended]
            if not going:
                return
            if len(going) <= _KEPT_SHARE * len(rows):
                kept = torch.tensor(going, device=device)
                cache.batch_select_indices(kept)
                rows, chosen, mask, positions = [rows[number] for number in going], chosen[kept], mask[kept], positions[kept]
            ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1

    def _sample(self, logits: Any, noise: Any) -> Any:
        """int64[B] tokens of float[B, V] logits, by float64[B] noise in (0, 1]."""
        import torch

        logits = logits.float()
        logits[:, self.tokenizer.vocab_size :] = -torch.inf
        if self.tokenizer.pad_id not in self._ends:
            logits[:, self.tokenizer.pad_id] = -torch.inf
        if not bool(torch.isfinite(logits.amax(-1)).all()):
            raise RetrieverError(
                f"the text model {self.checkpoint!r} gives probabilities that are not numbers; its weights are damaged or overflow in {self.dtype}"
            )
        if not self.temperature:
            return logits.argmax(-1)
        sums = torch.softmax(logits / self.temperature, dim=-1).double().cumsum(-1)  # [B, V]
        return torch.searchsorted(sums, (noise * sums[:, -1])[:, None])[:, 0].clamp(max=sums.shape[-1] - 1)

    def _add(self, row: _Row, token: int) -> None:
        if token in self._ends:
            row.ended = True
            return
        row.ids.append(token)
        row.ended = len(row.ids) >= row.room or self._has_stop(row)

    def _has_stop(self, row: _Row) -> bool:
        """Whether the stop string stands in the text, and not only in thoughts."""
        if row.job.stop not in self.tokenizer.decode(row.ids[-_TAIL:]):
            return False
        return row.job.stop in without_thoughts(self.tokenizer.decode(row.ids))


class _Row:
    """A text being written."""

    def __init__(self, prompt: list[int], job: TextJob, room: int) -> None:
        self.prompt, self.job, self.room = prompt, job, room
        self.ids: list[int] = []
        self.ended = False
        self._generator = np.random.Generator(np.random.Philox(job.seed))

    def noise(self) -> float:
        """The next number of the row, in (0, 1]."""
        return 1.0 - float(self._generator.random())


class _Loaded:
    """A model in memory."""

    def __init__(self, checkpoint: str, device: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        loader: Any = AutoModelForCausalLM
        try:
            network, report = loader.from_pretrained(checkpoint, dtype=getattr(torch, dtype), output_loading_info=True)
        except (OSError, ValueError) as error:
            raise RetrieverError(
                f"cannot load the text model {checkpoint!r}: {error}; give a folder with model and tokenizer, or a name on the hub that can be "
                "reached or is in its cache"
            ) from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise RetrieverError(
                f"the weights of {checkpoint!r} lack {', '.join(missing[:5])} ({len(missing)} in all); give a complete model"
            )
        self.model: Any = network.to(device).eval()
        self.device = device
        begin_in_forks(self)
        self.positions: int | None = getattr(network.config.get_text_config(), "max_position_embeddings", None)
        ends = getattr(network.generation_config, "eos_token_id", None)
        self.ends = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)

    def begin_process(self) -> None:
        """A lock is that of one process."""
        self.lock = threading.Lock()

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights, by name, and in the order of the modules."""
        import torch

        digest = hashlib.sha256()
        for name, weights in self.model.named_parameters():
            digest.update(repr([name, list(weights.shape), str(weights.dtype)]).encode())
            digest.update(weights.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
        return digest.hexdigest()[:16]


_MODELS: WeakValueDictionary[tuple[Any, ...], _Loaded] = WeakValueDictionary()
_LOADING = threading.Lock()


def _shared(checkpoint: str, device: str | None, dtype: str | None) -> _Loaded:
    """The model in memory; the same one for all environments of a process while its files do not change."""
    try:
        import torch
        import transformers  # noqa: F401  # said to be missing here, before anything is loaded
    except ImportError as error:
        raise RetrieverError("a local text model needs PyTorch and transformers: pip install 'searchqa-gym[agents]'") from error
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        reason = str(error).splitlines()[0]
        raise RetrieverError(f"the device {device!r} of a text model is not there: {reason}; give 'cpu', 'cuda' or 'cuda:1'") from error
    dtype = dtype or ("bfloat16" if torch.device(device).type == "cuda" else "float32")
    folder = Path(checkpoint)
    files = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(folder.glob("*")) if file.is_file())
    key = (checkpoint, device, dtype, files)
    with _LOADING:
        loaded = _MODELS.get(key)
        if loaded is None:
            loaded = _MODELS[key] = _Loaded(checkpoint, device, dtype)
        return loaded
