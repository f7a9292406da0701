"""Dense search past brute force: candidates from a FAISS graph, from lists or from codes, scored again exactly."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from searchqa_retrievers.bm25_index import DamagedIndexError
from searchqa_retrievers.dense_index import DenseIndex
from searchqa_retrievers.types import RetrieverError

logger = logging.getLogger(__name__)

KINDS = ("hnsw", "ivf", "pq", "ivf-pq")
MIN_PASSAGES = 1000
"""Fewer cannot be clustered, and are searched exactly in less than a millisecond."""

_LINKS = 32
_ADDED_ROWS = 1 << 16
_TRAINING_ROWS = 1 << 16
_TRAINING_ROWS_PER_LIST = 40  # FAISS warns below 39


class Needs(NamedTuple):
    """What an index takes, in bytes; the vectors themselves are on disk only, memory-mapped."""

    disk: int
    memory: int
    """resident while searching"""
    building: int
    """resident at most while the candidates' index is built"""


def estimate(kind: str, passages: int, dimension: int, storage: str = "float32") -> Needs:
    """Needs of a ``kind`` of index (``"flat"`` or one of :data:`KINDS`) from the sizes of its parts, before anything is built."""
    vectors = passages * dimension * np.dtype(storage).itemsize
    if kind == "flat":
        block = _ADDED_ROWS * dimension * 4
        return Needs(vectors, min(block, passages * dimension * 4), 0)
    lists = _lists(passages)
    centroids = lists * dimension * 4
    codebook = 16 * dimension * 4
    sizes = {
        "hnsw": passages * (dimension * 2 + 2 * _LINKS * 4 + 16),
        "ivf": passages * (dimension * 2 + 8) + centroids,
        "pq": passages * dimension // 16 + codebook,
        # On average half of a list's last block of 32 codes is empty.
        "ivf-pq": passages * (dimension // 16 + 8) + lists * dimension + centroids + codebook,
    }
    if kind not in sizes:
        raise RetrieverError(f"the kind of a dense index must be one of flat, {', '.join(KINDS)}, got {kind!r}")
    size = sizes[kind]
    sample = min(passages, _TRAINING_ROWS if kind in ("hnsw", "pq") else max(_TRAINING_ROWS, _TRAINING_ROWS_PER_LIST * lists))
    return Needs(vectors + size, size, size + max(sample, _ADDED_ROWS) * dimension * 4)


class ApproximateIndex(DenseIndex):
    """Candidates from a FAISS index, ``rescore_factor * top_k`` of them, ranked by their exact scores.

    A score is that of :class:`DenseIndex` bit for bit; a passage can be missed. Queries go to FAISS one by one, so that an answer does
    not depend on the batch.

    Parameters
    ----------
    vectors, places
        As for :class:`DenseIndex`.
    candidates
        The FAISS index over the rows of ``vectors``.
    rescore_factor : int
    nprobe : int or None
        Lists that are read, of an index that has lists. Default: one in 32, at least 16.
    """

    def __init__(
        self,
        vectors: npt.NDArray[Any],
        candidates: Any,
        rescore_factor: int = 32,
        nprobe: int | None = None,
        places: npt.NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__(vectors, places, use_gpus=False)
        import faiss

        self._candidates = candidates
        self._rescore_factor = rescore_factor
        self._is_graph = isinstance(candidates, faiss.IndexHNSW)
        if isinstance(candidates, faiss.IndexIVF):
            candidates.nprobe = min(candidates.nlist, nprobe or max(16, candidates.nlist // 32))

    def search(self, queries: npt.NDArray[np.float32], top_k: int) -> list[tuple[list[int], list[float]]]:
        width = min(len(self.vectors), top_k * self._rescore_factor)
        # By name, since the type stubs of FAISS do not have it.
        parameters = import_module("faiss").SearchParametersHNSW(efSearch=max(64, width)) if self._is_graph else None
        found = []
        for query in queries:
            rows = self._candidates.search(query[None], width, params=parameters)[1][0]
            found.append(self._rescore(query, rows[rows >= 0], top_k))  # FAISS fills up with -1
        return found


def open_or_train(folder: Path, kind: str, vectors: npt.NDArray[Any]) -> Any:
    """The FAISS index of a ``kind`` of candidates over ``vectors`` in ``folder``; where there is none, train, fill and store it.

    Raises
    ------
    DamagedIndexError
        The stored index is not what was written.
    RetrieverError
        The kind is unknown or not made for so few passages or this dimension, or the folder cannot be written or has no room.
    """
    import filelock

    n, dimension = vectors.shape
    needs = estimate(kind, n, dimension)
    if n < MIN_PASSAGES:
        raise RetrieverError(f"an index of kind {kind!r} needs at least {MIN_PASSAGES} passages, but there are {n}; use 'flat'")
    if dimension % 8:
        raise RetrieverError(f"an index of kind {kind!r} needs vectors of a multiple of 8 numbers, but they have {dimension}; use 'flat'")
    meta = folder / f"{kind}.json"
    try:
        if not meta.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder.with_name(f"{folder.name}.{kind}.lock")):
                if not meta.exists():
                    _train(folder, kind, vectors, needs)
    except (OSError, NotImplementedError) as error:  # filelock: NotImplementedError where the file system has no locks
        raise RetrieverError(
            f"the {kind} index cannot be written to {folder}: {error}; set SEARCHQA_CACHE to a writable folder with room"
        ) from error
    return _open(folder, kind, n, dimension)


def _lists(passages: int) -> int:
    """About 4 sqrt(N), as the guidelines of FAISS say, with enough passages to train each."""
    return max(1, min(4 * math.isqrt(passages), passages // _TRAINING_ROWS_PER_LIST))


def _factory(kind: str, passages: int, dimension: int) -> str:
    lists = _lists(passages)
    codes = f"PQ{dimension // 8}x4fs"
    return {"hnsw": f"HNSW{_LINKS}_SQfp16", "ivf": f"IVF{lists},SQfp16", "pq": codes, "ivf-pq": f"IVF{lists},{codes}"}[kind]


def _train(folder: Path, kind: str, vectors: npt.NDArray[Any], needs: Needs) -> None:
    import faiss

    n, dimension = vectors.shape
    free = shutil.disk_usage(folder).free
    logger.info(
        "%s index of %d passages: about %.2f GB of disk, %.2f GB of memory to search, %.2f GB to build",
        kind,
        n,
        needs.memory / 1e9,
        needs.memory / 1e9,
        needs.building / 1e9,
    )
    if needs.memory > free:
        raise RetrieverError(f"the {kind} index needs about {needs.memory / 1e9:.2f} GB in {folder}, but {free / 1e9:.2f} GB are free")
    index = faiss.index_factory(dimension, _factory(kind, n, dimension), faiss.METRIC_INNER_PRODUCT)
    size = min(n, _TRAINING_ROWS if kind in ("hnsw", "pq") else max(_TRAINING_ROWS, _TRAINING_ROWS_PER_LIST * _lists(n)))
    sample = np.sort(np.random.default_rng(0).choice(n, size=size, replace=False))
    index.train(np.ascontiguousarray(vectors[sample], dtype=np.float32))
    for start in range(0, n, _ADDED_ROWS):
        index.add(np.ascontiguousarray(vectors[start : start + _ADDED_ROWS], dtype=np.float32))
        logger.info("%s index: %d of %d passages", kind, min(start + _ADDED_ROWS, n), n)
    file, part, meta = folder / f"{kind}.faiss", folder / f"{kind}.faiss.part", folder / f"{kind}.json"
    faiss.write_index(index, str(part))
    os.replace(part, file)
    part = meta.with_name(f"{kind}.json.part")
    part.write_text(json.dumps({"factory": _factory(kind, n, dimension), "faiss": faiss.__version__, "checksum": _checksum(file)}))
    os.replace(part, meta)


def _open(folder: Path, kind: str, n: int, dimension: int) -> Any:
    import faiss

    file = folder / f"{kind}.faiss"
    try:
        meta = json.loads((folder / f"{kind}.json").read_bytes())
        if meta["checksum"] != _checksum(file):  # FAISS would follow a wrong link out of its memory
            raise DamagedIndexError(f"{file.name} has a wrong checksum")
        index = faiss.read_index(str(file))
        if (index.ntotal, index.d) != (n, dimension):
            raise DamagedIndexError(f"it has {index.ntotal} vectors of {index.d} numbers, not {n} of {dimension}")
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, DamagedIndexError) as error:
        raise DamagedIndexError(f"the {kind} index {file} cannot be used: {error}; delete {kind}.json there to build it again") from error
    return index


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value
