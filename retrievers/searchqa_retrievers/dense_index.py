"""Vectors of passages on disk: built block by block so that a killed build goes on, searched memory-mapped with exact scores."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.stored_folder import DamagedIndexError
from searchqa_retrievers.types import RetrieverError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
STORAGE = ("float32", "float16")

BLOCK = 1024
"""Passages between two records of progress: what a killed build loses at most."""

_SCAN_ROWS = 1 << 16  # 100 to 200 MB at a time as float32
_VERIFIED_BYTES = 1 << 30  # up to this size all checksums are compared at every opening (a second)
_GPU_WIDTH = 2048  # the most that FAISS selects on a GPU
_MARGIN = 16  # candidates beyond top_k, so that a search seldom has to be widened


class PassageEncoder(Protocol):
    """What building needs of :class:`searchqa_retrievers.encoders.Encoder`."""

    dimension: int
    fingerprint: str
    dtype: str

    def encode_passages(self, texts: Sequence[str]) -> npt.NDArray[np.float32]: ...

    def stamp(self) -> dict[str, Any]: ...


class DenseIndex:
    """Exact search for the greatest inner products with unit vectors.

    FAISS finds candidates in float32, in blocks; these are scored again in float64 and rounded to float32, so that a score depends on
    query and passage alone and equal vectors have equal scores. Where the rounding error of the first pass could hide a better
    passage or an equal one of lower position, more candidates are taken until it cannot.

    Parameters
    ----------
    vectors : float32 or float16 [N, D]
        One unit vector a passage; may be memory-mapped.
    places : int64 [N] or None
        Position in the corpus of the passage of each row. Default: the rows are in the order of the corpus.
    use_gpus : bool
        Find candidates on all GPUs that FAISS sees, where it sees any.
    """

    def __init__(self, vectors: npt.NDArray[Any], places: npt.NDArray[np.int64] | None = None, use_gpus: bool = True) -> None:
        self.vectors = vectors
        self._places = places
        # Bound of the error of a float32 inner product of unit vectors (Higham 2002, section 3.1), with room for float16 norms.
        self._tolerance = 1.01 * vectors.shape[1] * 2.0**-23
        self._gpus = _on_gpus(vectors) if use_gpus else None
        self._gpu_lock = threading.Lock()
        if self._gpus is not None:
            self._tolerance = max(self._tolerance, 2.0**-9)  # the products may be of TF32 numbers, with 10 bits

    def search(self, queries: npt.NDArray[np.float32], top_k: int) -> list[tuple[list[int], list[float]]]:
        """Positions and scores of the best ``min(top_k, N)`` passages of each query [Q, D]: score descending, then position ascending."""
        n = len(self.vectors)
        found: list[tuple[list[int], list[float]]] = [([], [])] * len(queries)
        pending = list(range(len(queries))) if n else []
        width = top_k + _MARGIN
        while pending:
            width = min(width, n)
            candidates, worst = self._scan(queries[pending], width)
            unsettled = []
            for number, rows, bound in zip(pending, candidates, worst.tolist(), strict=True):
                found[number] = self._rescore(queries[number], rows, top_k)
                if width < n and found[number][1][-1] <= bound + 2 * self._tolerance:
                    unsettled.append(number)
            pending = unsettled
            width *= 4
        return found

    def _scan(self, queries: npt.NDArray[np.float32], width: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Rows int64[Q, width] of the greatest approximate products, unordered, and the least product [Q] among them."""
        import faiss

        if self._gpus is not None and width <= _GPU_WIDTH:
            with self._gpu_lock:  # unlike on the CPU, FAISS on GPUs serves one thread at a time
                products, rows = self._gpus.search(queries, width)
            return rows, products.min(axis=1)
        best = np.empty((len(queries), 0), dtype=np.float32)
        rows = np.empty((len(queries), 0), dtype=np.int64)
        for start in range(0, len(self.vectors), _SCAN_ROWS):
            block = np.ascontiguousarray(self.vectors[start : start + _SCAN_ROWS], dtype=np.float32)
            products, positions = faiss.knn(queries, block, min(width, len(block)), faiss.METRIC_INNER_PRODUCT)
            best = np.concatenate([best, products], axis=1)
            rows = np.concatenate([rows, positions + start], axis=1)
            if best.shape[1] > width:
                kept = np.argpartition(best, -width, axis=1)[:, -width:]
                best, rows = np.take_along_axis(best, kept, axis=1), np.take_along_axis(rows, kept, axis=1)
        return rows, best.min(axis=1)

    def _rescore(self, query: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], top_k: int) -> tuple[list[int], list[float]]:
        places = rows if self._places is None else self._places[rows]
        # Not a matrix product: its last bits depend on the number of rows.
        scores = (self.vectors[rows].astype(np.float64) * query.astype(np.float64)).sum(axis=1).astype(np.float32)
        order = np.lexsort((places, -scores))[:top_k]
        return places[order].tolist(), scores[order].tolist()


def _on_gpus(vectors: npt.NDArray[Any]) -> Any:
    """A FAISS index of the vectors, cut into one part for each GPU; None where FAISS has no GPU. Not tested on a GPU yet."""
    import faiss

    if faiss.get_num_gpus() == 0:
        return None
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    options.useFloat16 = vectors.dtype == np.float16
    index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(vectors.shape[1]), options)
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))  # at once: parts with successive ids cannot be added to later
    return index


def index_folder(root: Path, corpus: Corpus, encoder: PassageEncoder, storage: str) -> Path:
    """Where the vectors of a corpus are kept below ``root``: named by a hash of all that they depend on."""
    parts = [FORMAT_VERSION, corpus.sha256, encoder.fingerprint, storage, sys.byteorder]
    return root / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def open_or_build(folder: Path, corpus: Corpus, encoder: PassageEncoder, storage: str, show_progress: bool = False) -> npt.NDArray[Any]:
    """The vectors [N, D] in ``folder``, memory-mapped and read-only; those that are missing are computed first.

    A build that was stopped, in whatever way, goes on after the last complete block; its vectors are those of an undisturbed build
    (bit for bit where the encoder's are). ``manifest.json`` is written last, at once: a folder without it is not complete. Among all
    processes that ask, one builds.

    Raises
    ------
    DamagedIndexError
        The folder is complete, but does not hold what was written. It is not built again unasked, since that can take days.
    RetrieverError
        The folder cannot be written or has no room, or the build was begun in another dtype.
    """
    import filelock

    if not len(corpus):
        raise RetrieverError("a dense index needs at least one passage, but the corpus has none")
    wanted = _manifest(corpus, encoder, storage)
    try:
        if not (folder / "manifest.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder.with_name(folder.name + ".lock")):
                if not (folder / "manifest.json").exists():
                    _build(folder, corpus, encoder, storage, wanted, show_progress)
    except (OSError, NotImplementedError) as error:  # filelock: NotImplementedError where the file system has no locks
        raise RetrieverError(
            f"the dense index cannot be written to {folder}: {error}; set SEARCHQA_CACHE to a writable folder with room"
        ) from error
    return _open(folder, wanted)


def _manifest(corpus: Corpus, encoder: PassageEncoder, storage: str) -> dict[str, Any]:
    return {
        "format": FORMAT_VERSION,
        "corpus_sha256": corpus.sha256,
        "passages": len(corpus),
        "dimension": encoder.dimension,
        "storage": storage,
        "encoder": encoder.stamp(),
    }


def _build(folder: Path, corpus: Corpus, encoder: PassageEncoder, storage: str, manifest: dict[str, Any], show_progress: bool) -> None:
    n = len(corpus)
    file, record = folder / "vectors.npy", folder / "progress.jsonl"
    checksums = _complete_blocks(file, record, encoder, (n, encoder.dimension), storage)
    done = len(checksums) * BLOCK
    needed = max(0, n - done) * encoder.dimension * np.dtype(storage).itemsize
    free = shutil.disk_usage(folder).free
    logger.info("encoding %d of %d passages: %.2f GB of disk in %s", max(0, n - done), n, needed / 1e9, folder)
    if needed > free:  # else the mapped file would be cut off under the writing process, which kills it
        raise RetrieverError(f"the vectors need {needed / 1e9:.2f} GB more in {folder}, but {free / 1e9:.2f} GB are free")
    if checksums:
        logger.info("an earlier build of %s is continued at passage %d", folder, done)
    else:
        np.lib.format.open_memmap(file, mode="w+", dtype=storage, shape=(n, encoder.dimension)).flush()
        record.write_text(json.dumps({"encoder_dtype": encoder.dtype}) + "\n")
    with record.open("a") as progress, _bar(n, done, show_progress) as advance:
        for start in range(done, n, BLOCK):
            end = min(start + BLOCK, n)
            vectors = np.load(file, mmap_mode="r+")  # anew for each block, which leaves memory with the one before
            vectors[start:end] = encoder.encode_passages([corpus.contents(i) for i in range(start, end)])
            vectors.flush()
            checksums.append(_checksum(vectors[start:end]))
            progress.write(f"{checksums[-1]}\n")
            progress.flush()
            advance(end - start)
    temporary = folder / "manifest.json.part"
    temporary.write_text(json.dumps({**manifest, "block": BLOCK, "checksums": checksums}))
    os.replace(temporary, folder / "manifest.json")
    record.unlink()


def _complete_blocks(file: Path, record: Path, encoder: PassageEncoder, shape: tuple[int, int], storage: str) -> list[int]:
    """Checksums of the blocks, from the first on, that an earlier build finished and that are on the disk as recorded."""
    try:
        # The last line may be cut off; a number that is cut off is a wrong checksum.
        head, *lines = record.read_text().split("\n")
        begun_in = json.loads(head)["encoder_dtype"]
        vectors = np.load(file, mmap_mode="r")
    except (FileNotFoundError, ValueError, KeyError):
        return []
    if vectors.shape != shape or vectors.dtype != storage:
        return []
    if begun_in != encoder.dtype:
        raise RetrieverError(
            f"the build of {record.parent} was begun with the encoder in {begun_in}, not {encoder.dtype}; go on with dtype={begun_in!r} "
            "or delete the folder"
        )
    checksums: list[int] = []
    for start, line in zip(range(0, shape[0], BLOCK), lines, strict=False):
        checksum = _checksum(vectors[start : start + BLOCK])
        if line != str(checksum):
            break
        checksums.append(checksum)
    record.write_text("\n".join([head, *map(str, checksums)]) + "\n")
    return checksums


def _open(folder: Path, wanted: dict[str, Any]) -> npt.NDArray[Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        for key in ("format", "corpus_sha256", "passages", "dimension", "storage"):
            if manifest[key] != wanted[key]:
                raise DamagedIndexError(f"its {key} is {manifest[key]!r}, not {wanted[key]!r}")
        if manifest["encoder"]["fingerprint"] != wanted["encoder"]["fingerprint"]:
            raise DamagedIndexError(f"its encoder is {manifest['encoder']}, not {wanted['encoder']}")
        vectors: npt.NDArray[Any] = np.load(folder / "vectors.npy", mmap_mode="r").view(np.ndarray)
        if vectors.shape != (wanted["passages"], wanted["dimension"]) or vectors.dtype != wanted["storage"]:
            raise DamagedIndexError(f"vectors.npy has shape {vectors.shape} and dtype {vectors.dtype}")
        if vectors.nbytes <= _VERIFIED_BYTES:
            for number, checksum in enumerate(manifest["checksums"]):
                start = number * manifest["block"]
                if _checksum(vectors[start : start + manifest["block"]]) != checksum:
                    raise DamagedIndexError(f"vectors.npy has a wrong checksum in the block from passage {start} on")
    except (ValueError, KeyError, TypeError, OSError, DamagedIndexError) as error:
        raise DamagedIndexError(f"the dense index {folder} cannot be used: {error}; delete the folder to build it again") from error
    return vectors


def _checksum(rows: npt.NDArray[Any]) -> int:
    return zlib.crc32(rows.data)


def mapped_anew(vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same vectors, of a memory-mapped file by a mapping of their own: what is read through it leaves memory together with it."""
    base = vectors.base
    if isinstance(base, np.memmap) and base.filename is not None and vectors.shape == base.shape:
        return np.memmap(base.filename, dtype=base.dtype, mode="r", offset=base.offset, shape=base.shape)
    return vectors


def damaged_blocks(folder: Path) -> list[str]:
    """What is wrong with the vectors of a complete folder, by all their checksums; empty where all is well."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        file, block, wanted = folder / "vectors.npy", int(manifest["block"]), manifest["checksums"]
        vectors = np.load(file, mmap_mode="r").view(np.ndarray)
        if vectors.shape != (manifest["passages"], manifest["dimension"]) or vectors.dtype != manifest["storage"]:
            return [f"vectors.npy has shape {vectors.shape} and dtype {vectors.dtype}"]
        starts = range(0, len(vectors), block)
        if len(starts) != len(wanted):
            return [f"manifest.json has {len(wanted)} checksums for {len(starts)} blocks"]
        return [
            f"vectors.npy has a wrong checksum in the block from passage {start} on"
            for start, expected in zip(starts, wanted, strict=True)
            if _checksum(mapped_anew(vectors)[start : start + block]) != expected
        ]
    except FileNotFoundError as error:
        return [f"{Path(str(error.filename)).name} is missing"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{type(error).__name__}: {error}"]


class _Advance(Protocol):
    def __call__(self, passages: int) -> object: ...


@contextmanager
def _bar(total: int, done: int, wanted: bool, called: str = "Encoding passages") -> Iterator[_Advance]:
    """A bar on stderr where a person looks at it."""
    if not (wanted and total > done and sys.stderr.isatty()):
        yield lambda passages: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(called, total=total, completed=done)
        yield lambda passages: shown.advance(task, passages)
