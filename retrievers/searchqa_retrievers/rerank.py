"""A second look at what another retriever found: a cross-encoder reads query and passage together."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from searchqa_retrievers.checks import check_request
from searchqa_retrievers.composition import Composition, ask, build_inner, stamp_of, whole_number
from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.encoders import DTYPES
from searchqa_retrievers.types import Hit, Passage, Retriever, RetrieverError, SearchRequest

DEFAULT_MODEL = "cross-encoder/ms-marco-MiniLM-L12-v2"

_BUCKET = 16
_CUDA_ROWS = 32


class CrossEncoder:
    """Scores of pairs of query and passage by a sequence classifier of ``transformers`` with one output.

    A pair is padded to the next multiple of 16 tokens, never to its neighbours' length. On the CPU each pair has the model to itself, and
    on CUDA every pass has the same number of rows: the score of a pair does not depend on the other pairs of a call. Can be shared by
    threads, which take turns, and pickled: it comes back by loading the model again.

    Parameters
    ----------
    model : str
        A name on the Hugging Face Hub, or a folder.
    device : str or None
        As PyTorch names it. Default: ``cuda`` where there is one, else ``cpu``.
    dtype : str or None
        ``float32``, ``bfloat16`` or ``float16``. Default: bfloat16 on CUDA, else float32.
    max_tokens : int
        Longer pairs lose the end of the passage; special tokens count. Of a query at most half of it is read.

    Attributes
    ----------
    fingerprint : str
        Hash of weights, vocabulary and ``max_tokens``, without the name or place of the model and the dtype.

    Raises
    ------
    RetrieverError
        A setting is out of its range, PyTorch or transformers is missing, the device is not there, or the model cannot be loaded, is not complete, or has not
        exactly one output; in scoring: a score is not finite.
    """

    def __init__(self, model: str = DEFAULT_MODEL, device: str | None = None, dtype: str | None = None, max_tokens: int = 512) -> None:
        if not isinstance(model, str | os.PathLike):
            raise RetrieverError(f"model of a cross-encoder must be a folder or a name on the Hub, got {model!r:.200}")
        if dtype is not None and dtype not in DTYPES:
            raise RetrieverError(f"dtype of a cross-encoder must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if whole_number("max_tokens of a cross-encoder", max_tokens) < 16:
            raise RetrieverError(f"max_tokens of a cross-encoder must be at least 16, got {max_tokens}")
        try:
            import torch
        except ImportError as error:
            raise RetrieverError("a cross-encoder needs PyTorch and transformers: pip install 'searchqa-gym[agents]'") from error
        self._arguments = (model, device, dtype, max_tokens)
        self.model = str(model)
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else _checked_device(device)
        self.dtype = dtype or ("bfloat16" if self.device.startswith("cuda") else "float32")
        self.max_tokens = max_tokens
        self._lock = threading.Lock()
        self._tokenizer, network = _load(self.model, max_tokens)
        self.fingerprint = _fingerprint(max_tokens, self._tokenizer, network)
        self._network = network.to(device=self.device, dtype=getattr(torch, self.dtype)).eval()

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The model's output for each ``(query, passage)``, a logit: the greater, the better the passage answers."""
        import torch

        with self._lock, torch.inference_mode():
            rows = [self._tokens(query, passage) for query, passage in pairs]
            members: dict[int, list[int]] = {}
            for position, row in enumerate(rows):
                members.setdefault(-(-len(row["input_ids"]) // _BUCKET) * _BUCKET, []).append(position)
            size = _CUDA_ROWS if self.device.startswith("cuda") else 1
            scores = [0.0] * len(rows)
            for length, positions in sorted(members.items()):
                length = max(min(length, self.max_tokens), max(len(rows[position]["input_ids"]) for position in positions))
                for start in range(0, len(positions), size):
                    batch = positions[start : start + size]
                    for position, score in zip(batch, self._forward([rows[i] for i in batch], length, size), strict=True):
                        scores[position] = score
        if not all(map(math.isfinite, scores)):
            raise RetrieverError(f"{self!r} gave scores that are not finite; its weights are damaged or overflow: use dtype='float32'")
        return scores

    def stamp(self) -> dict[str, Any]:
        """The settings that a score depends on, for the record of a run."""
        return {"model": self.model, "fingerprint": self.fingerprint, "max_tokens": self.max_tokens, "dtype": self.dtype}

    def __deepcopy__(self, memo: dict[int, Any]) -> CrossEncoder:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return CrossEncoder, self._arguments

    def __repr__(self) -> str:
        return f"CrossEncoder({self.model!r}, device={self.device!r}, dtype={self.dtype!r})"

    def _tokens(self, query: str, passage: str) -> dict[str, list[int]]:
        """Ids of a pair, and what else the model takes beside them; only the passage is cut, unless the query fills half the room."""
        query, passage = (text.encode("utf-8", "replace").decode() for text in (query, passage))  # tokenizers refuse lone surrogates
        longest = self.max_tokens // 2
        read = self._tokenizer(query, add_special_tokens=False, truncation=True, max_length=longest, return_offsets_mapping=True)
        if len(read["input_ids"]) == longest:
            query = query[: read["offset_mapping"][-1][1]]
        encoded = self._tokenizer(query, passage, truncation="only_second", max_length=self.max_tokens)
        return {name: list(values) for name, values in encoded.items()}

    def _forward(self, rows: list[dict[str, list[int]]], length: int, size: int) -> list[float]:
        """Scores of token rows, each padded to ``length``, in a pass of ``size`` rows."""
        import torch

        padding = {"input_ids": self._tokenizer.pad_token_id}
        inputs = {}
        for name in rows[0]:
            values = torch.full((size, length), padding.get(name, 0), dtype=torch.long)  # [B, T]
            for number in range(size):
                row = rows[number if number < len(rows) else 0][name]
                values[number, : len(row)] = torch.tensor(row, dtype=torch.long)
            inputs[name] = values.to(self.device)
        logits = self._network(**inputs).logits.float()  # [B, 1]
        return [float(score) for score in logits[: len(rows), 0].tolist()]


class Rerank(Composition):
    """The ``candidates`` best of another retriever in the order of a cross-encoder (Nogueira and Cho 2019, arXiv 1901.04085).

    The model reads the query and the passage's contents (title in double quotes, line break, text). Each query is paired with its own
    passages only. The inner retriever is asked for ``max(candidates, top_k)`` passages: up to ``candidates``, a smaller ``top_k`` gives
    the beginning of the answer to a larger one. The object can be shared by threads, and pickled.

    Parameters
    ----------
    retriever : Retriever
    encoder : CrossEncoder
    candidates : int
        At least 1.
    memo_entries : int
        Scores of this many pairs are kept in memory, the least recently used are forgotten first; at least 1.

    Raises
    ------
    RetrieverError
        A setting is out of its range.
    """

    name = "rerank"

    def __init__(self, retriever: Retriever, encoder: CrossEncoder, candidates: int = 10, memo_entries: int = 100_000) -> None:
        super().__init__([retriever])
        self.retriever = retriever
        self.encoder = encoder
        self.candidates = self._within_reach("candidates", whole_number("candidates of retriever 'rerank'", candidates))
        self.memo_entries = whole_number("memo_entries of retriever 'rerank'", memo_entries)
        self._lock = threading.Lock()
        self._memo: OrderedDict[tuple[str, Passage], float] = OrderedDict()

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        """Answer all requests; each distinct pair is scored once."""
        if not requests:
            return []
        found = ask(self.retriever, [self._deep(request) for request in requests])
        pairs = {(request.query, hit.passage): 0.0 for request, hits in zip(requests, found, strict=True) for hit in hits}
        with self._lock:
            known = {pair: self._memo[pair] for pair in pairs if pair in self._memo}
        missing = [pair for pair in pairs if pair not in known]
        fresh = self.encoder.scores([(query, _contents(passage)) for query, passage in missing])
        known.update(zip(missing, fresh, strict=True))
        with self._lock:
            for pair in pairs:
                self._memo[pair] = known[pair]
                self._memo.move_to_end(pair)
            while len(self._memo) > self.memo_entries:
                self._memo.popitem(last=False)
        answers = []
        for request, hits in zip(requests, found, strict=True):
            ranked = [Hit(hit.passage, known[request.query, hit.passage]) for hit in hits]
            answers.append(sorted(ranked, key=lambda hit: (-hit.score, hit.passage.id))[: request.top_k])
        return answers

    def cache_key(self, request: SearchRequest) -> Hashable:
        return (request.query, request.top_k, self.retriever.cache_key(self._deep(request)))

    def stamp(self) -> dict[str, Any]:
        """The settings that a result depends on, for the record of a run."""
        return {"retriever": self.name, **self.encoder.stamp(), "candidates": self.candidates, "inner": stamp_of(self.retriever)}

    def __reduce__(self) -> tuple[Any, ...]:
        return Rerank, (self.retriever, self.encoder, self.candidates, self.memo_entries)

    def __repr__(self) -> str:
        return f"Rerank({self.retriever!r}, {self.encoder!r}, candidates={self.candidates})"

    def _deep(self, request: SearchRequest) -> SearchRequest:
        check_request(replace(request, filters=None), self.name)
        return replace(request, top_k=max(self.candidates, request.top_k))


def make(
    corpus: Callable[[], Corpus],
    retriever: str | Mapping[str, Any] | Retriever,
    model: str = DEFAULT_MODEL,
    candidates: int = 10,
    device: str | None = None,
    dtype: str | None = None,
    max_tokens: int = 512,
    memo_entries: int = 100_000,
) -> Retriever:
    """The retriever ``"rerank"`` of a configuration; ``retriever`` is the configuration of the inner one."""
    whole_number("candidates of retriever 'rerank'", candidates)  # before anything is loaded
    whole_number("memo_entries of retriever 'rerank'", memo_entries)
    inner = build_inner(retriever, corpus, Rerank.name)
    return Rerank(inner, CrossEncoder(model, device, dtype, max_tokens), candidates, memo_entries)


def _contents(passage: Passage) -> str:
    return f'"{passage.title}"\n{passage.text}'


def _checked_device(device: object) -> str:
    """``device``, where a tensor can be put."""
    import torch

    if not isinstance(device, str):
        raise RetrieverError(f"device of a cross-encoder must be a name such as 'cpu' or 'cuda:1', got {device!r:.200}")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RetrieverError(f"device of a cross-encoder must be one that PyTorch has here, got {device!r}: {error}") from error
    return device


def _load(model: str, max_tokens: int) -> tuple[Any, Any]:
    """Tokenizer and model (float32, on the CPU); a model with weights left to chance is refused."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise RetrieverError("a cross-encoder needs PyTorch and transformers: pip install 'searchqa-gym[agents]'") from error
    try:
        outputs = AutoConfig.from_pretrained(model).num_labels
        if outputs != 1:
            raise RetrieverError(f"a cross-encoder must have one output, but {model!r} has {outputs}; give a model trained to score pairs")
        tokenizer = AutoTokenizer.from_pretrained(model)
        network, report = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise RetrieverError(
            f"cannot load the cross-encoder {model!r}: {error}; give a folder with model and tokenizer, or a name on the Hub that "
            "can be reached or is in its cache"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise RetrieverError(f"the weights of {model!r} lack {', '.join(missing[:5])} ({len(missing)} in all); give a complete model")
    if tokenizer.pad_token_id is None or not tokenizer.is_fast:
        raise RetrieverError(f"the tokenizer of {model!r} has no padding token or is not one of the library tokenizers; give another model")
    limit = getattr(network.config, "max_position_embeddings", None)
    if limit is not None and max_tokens > limit:
        raise RetrieverError(f"max_tokens must be at most the {limit} positions of {model!r}, got {max_tokens}")
    return tokenizer, network


def _fingerprint(max_tokens: int, tokenizer: Any, network: Any) -> str:
    """Weights in the order of the modules, without their names, which change between versions of transformers."""
    digest = hashlib.sha256()
    for weights in network.parameters():
        digest.update(repr(list(weights.shape)).encode())
        digest.update(weights.detach().numpy().tobytes())
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode("utf-8", "surrogatepass"))
    digest.update(repr(max_tokens).encode())
    return digest.hexdigest()
