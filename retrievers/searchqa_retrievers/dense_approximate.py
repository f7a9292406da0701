"""Dense search past brute force: candidates from a FAISS graph, from lists or from codes, scored again exactly."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchqa_retrievers.dense_index import DenseIndex, _bar, mapped_anew
from searchqa_retrievers.needs import Needs
from searchqa_retrievers.stored_folder import DamagedIndexError, checksum
from searchqa_retrievers.types import RetrieverError

logger = logging.getLogger(__name__)

KINDS = ("hnsw", "ivf", "pq", "ivf-pq")
MIN_PASSAGES = 1000
"""Fewer cannot be clustered, and are searched exactly in less than a millisecond."""

_LINKS = 32
_ADDED_ROWS = 1 << 16
_TRAINING_ROWS = 1 << 16
_TRAINING_ROWS_PER_LIST = 40  # FAISS warns below 39
_LEAST_PROBED = 64  # of 656 lists of real embeddings, 16 find 86% of the best 10, and 64 find 95%, at nearly the same cost
_PROBED_SHARE = 16
_CHECKPOINT_SECONDS = 120.0
_CHECKPOINT_SHARE = 10  # what writing a checkpoint took, so many times over, passes before the next


def estimate(kind: str, passages: int, dimension: int, storage: str = "float32") -> Needs:
    """Needs of a ``kind`` of index (``"flat"`` or one of :data:`KINDS`) from the sizes of its parts, before anything is built.

    The vectors are on disk only, memory-mapped: what of them is in memory can be taken back by the system at any time, and is not counted.
    """
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
    # What is added is there as it is, as residuals, and once more on its way.
    return Needs(vectors + size, size, size + max(_sample_size(kind, passages), 3 * min(passages, _ADDED_ROWS)) * dimension * 4)


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
        Lists that are read, of an index that has lists. Default: one in 16, at least 64.
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
            candidates.nprobe = min(candidates.nlist, nprobe or max(_LEAST_PROBED, candidates.nlist // _PROBED_SHARE))

    def search(self, queries: npt.NDArray[np.float32], top_k: int) -> list[tuple[list[int], list[float]]]:
        width = min(len(self.vectors), top_k * self._rescore_factor)
        # By name, since the type stubs of FAISS do not have it.
        parameters = import_module("faiss").SearchParametersHNSW(efSearch=max(64, width)) if self._is_graph else None
        found = []
        for query in queries:
            rows = self._candidates.search(query[None], width, params=parameters)[1][0]
            found.append(self._rescore(query, rows[rows >= 0], top_k))  # FAISS fills up with -1
        return found


def open_or_train(folder: Path, kind: str, vectors: npt.NDArray[Any], show_progress: bool = False) -> Any:
    """The FAISS index of a ``kind`` of candidates over ``vectors`` in ``folder``; where there is none, train, fill and store it.

    The trained index is stored before it is filled, and every two minutes after that (seldom enough that writing takes a tenth of the
    time at most): a build that was stopped goes on from there. Lists and codes are then those of an undisturbed build; a graph is one of
    equal quality.

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
                    _train(folder, kind, vectors, needs, show_progress)
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


def _sample_size(kind: str, passages: int) -> int:
    """Rows that an index is trained on."""
    return min(passages, _TRAINING_ROWS if kind in ("hnsw", "pq") else max(_TRAINING_ROWS, _TRAINING_ROWS_PER_LIST * _lists(passages)))


def _train(folder: Path, kind: str, vectors: npt.NDArray[Any], needs: Needs, show_progress: bool) -> None:
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
    checkpoint = _Checkpoint(folder, kind, _factory(kind, n, dimension))
    index = checkpoint.load(n, dimension)
    if 2 * needs.memory > free + checkpoint.size():
        raise RetrieverError(
            f"the {kind} index needs about {2 * needs.memory / 1e9:.2f} GB in {folder} while it is built, half of it after that, but "
            f"{free / 1e9:.2f} GB are free"
        )
    if index is None:
        index = faiss.index_factory(dimension, checkpoint.factory, faiss.METRIC_INNER_PRODUCT)
        index.train(_sample(vectors, _sample_size(kind, n)))
        checkpoint.save(index)
    else:
        logger.info("an earlier build of the %s index in %s is continued at passage %d", kind, folder, index.ntotal)
    with _bar(n, index.ntotal, show_progress, "Indexing vectors") as advance:
        while index.ntotal < n:
            start, end = index.ntotal, min(index.ntotal + _ADDED_ROWS, n)
            index.add(np.ascontiguousarray(mapped_anew(vectors)[start:end], dtype=np.float32))
            logger.info("%s index: %d of %d passages", kind, end, n)
            advance(end - start)
            if end < n and checkpoint.is_due():
                checkpoint.save(index)
    file, part = folder / f"{kind}.faiss", folder / f"{kind}.faiss.part"
    faiss.write_index(index, str(part))
    os.replace(part, file)
    _write_json(folder / f"{kind}.json", {"factory": checkpoint.factory, "faiss": faiss.__version__, "checksum": checksum(file)})
    checkpoint.remove()


def _sample(vectors: npt.NDArray[Any], size: int) -> npt.NDArray[np.float32]:
    """Rows float32[size, D], drawn anew in the same way every time; no more of ``vectors`` than a block is in memory at once."""
    chosen = np.sort(np.random.default_rng(0).choice(len(vectors), size=size, replace=False))
    sample = np.empty((size, vectors.shape[1]), dtype=np.float32)
    for start in range(0, len(vectors), _ADDED_ROWS):
        first, last = np.searchsorted(chosen, [start, start + _ADDED_ROWS])
        sample[first:last] = mapped_anew(vectors)[chosen[first:last]]
    return sample


class _Checkpoint:
    """An index under way. Its record is replaced at once and names the file, so that one of the two last ones is always whole."""

    def __init__(self, folder: Path, kind: str, factory: str) -> None:
        self.factory = factory
        self._folder, self._kind = folder, kind
        self._record = folder / f"{kind}.checkpoint.json"
        self._saved = time.monotonic()
        self._pause = _CHECKPOINT_SECONDS

    def load(self, n: int, dimension: int) -> Any:
        """What an earlier build has stored, or None where there is nothing that can be used."""
        import faiss

        try:
            record = json.loads(self._record.read_bytes())
            file = self._folder / record["file"]
            if (record["factory"], record["faiss"], record["checksum"]) != (self.factory, faiss.__version__, checksum(file)):
                return None
            index = faiss.read_index(str(file))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            logger.warning("the checkpoint %s cannot be used (%s); building anew", self._record, error)
            return None
        return index if index.ntotal <= n and index.d == dimension else None

    def is_due(self) -> bool:
        return time.monotonic() - self._saved >= self._pause

    def save(self, index: Any) -> None:
        import faiss

        started = time.monotonic()
        file = self._folder / f"{self._kind}.checkpoint-{index.ntotal}.faiss"
        faiss.write_index(index, str(file))
        _write_json(self._record, {"file": file.name, "factory": self.factory, "faiss": faiss.__version__, "checksum": checksum(file)})
        for other in self._files():
            if other != file:
                other.unlink()
        self._saved = time.monotonic()
        self._pause = max(_CHECKPOINT_SECONDS, _CHECKPOINT_SHARE * (self._saved - started))

    def size(self) -> int:
        return sum(file.stat().st_size for file in self._files())

    def remove(self) -> None:
        self._record.unlink(missing_ok=True)
        for file in self._files():
            file.unlink()

    def _files(self) -> list[Path]:
        return list(self._folder.glob(f"{self._kind}.checkpoint-*.faiss"))


def _write_json(file: Path, value: dict[str, Any]) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(value))
    os.replace(part, file)


def _open(folder: Path, kind: str, n: int, dimension: int) -> Any:
    import faiss

    file = folder / f"{kind}.faiss"
    try:
        meta = json.loads((folder / f"{kind}.json").read_bytes())
        if meta["checksum"] != checksum(file):  # FAISS would follow a wrong link out of its memory
            raise DamagedIndexError(f"{file.name} has a wrong checksum")
        index = faiss.read_index(str(file))
        if (index.ntotal, index.d) != (n, dimension):
            raise DamagedIndexError(f"it has {index.ntotal} vectors of {index.d} numbers, not {n} of {dimension}")
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, DamagedIndexError) as error:
        raise DamagedIndexError(f"the {kind} index {file} cannot be used: {error}; delete {kind}.json there to build it again") from error
    return index


def damaged_files(folder: Path, kind: str) -> list[str]:
    """What is wrong with the stored index of a kind, by its checksum, without loading it; empty where all is well."""
    file = folder / f"{kind}.faiss"
    try:
        wanted = json.loads((folder / f"{kind}.json").read_bytes())["checksum"]
        return [] if checksum(file) == wanted else [f"{file.name} has a wrong checksum"]
    except FileNotFoundError:
        return [f"{file.name} is missing"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{kind}.json cannot be read: {type(error).__name__}: {error}"]
