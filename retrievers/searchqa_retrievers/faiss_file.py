"""A published FAISS file as it is, such as Search-R1's E5 indexes of Wikipedia: row i is line i of a corpus file."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from searchqa_retrievers.corpus import Corpus
from searchqa_retrievers.dense_index import PassageEncoder
from searchqa_retrievers.stored_corpus import sort_ids
from searchqa_retrievers.types import RetrieverError

_LEAST_COSINE = 0.95  # E5 gives unrelated texts 0.7 to 0.85; half precision and another cut of long texts cost far less
_SAMPLE = 256


class FaissFile(NamedTuple):
    """An opened file. ``vectors`` and ``index`` share memory: keep the whole tuple for as long as either is used."""

    index: Any
    vectors: npt.NDArray[np.float32]
    """unit vectors [N, D], memory-mapped, read-only"""
    places: npt.NDArray[np.int64]
    """position in the corpus of the passage of each row [N]"""
    is_graph: bool
    """whether ``index`` is an HNSW graph and not only the vectors"""
    key: str
    """hash of shape, corpus and a sample of the rows"""


def open_faiss_file(file: str | Path, rows: str | Path, corpus: Corpus, encoder: PassageEncoder) -> FaissFile:
    """Open an ``IndexFlatIP`` or an HNSW graph over one, without reading it into memory.

    Parameters
    ----------
    file
        What ``faiss.write_index`` wrote. Parts of a split download must be joined first (``cat part_* > e5_Flat.index``).
    rows
        The ``.jsonl`` or ``.jsonl.gz`` corpus whose line i, blank lines apart, is row i.
    corpus
        The same passages, read.
    encoder
        The encoder of the vectors. A few passages are encoded and compared with their rows, which shows an index of another corpus,
        order or encoder.

    Raises
    ------
    RetrieverError
        The file cannot be read, is of another type, or does not belong to the corpus or to the encoder.
    """
    import faiss

    try:
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise RetrieverError(
            f"cannot read the FAISS file {file}: {str(error).splitlines()[-1]}; join the parts of a split download"
        ) from error
    is_graph = isinstance(index, faiss.IndexHNSWFlat)
    storage = faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSWFlat) else index
    if not isinstance(storage, faiss.IndexFlat) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise RetrieverError(
            f"the FAISS file {file} must hold an IndexFlatIP or an IndexHNSWFlat with inner products, not a {type(index).__name__} with "
            f"metric {index.metric_type}; build an index of this corpus instead (leave faiss_file out)"
        )
    n, dimension = int(index.ntotal), int(index.d)
    if dimension != encoder.dimension:
        raise RetrieverError(
            f"the vectors of {file} have {dimension} numbers, those of the encoder {encoder.dimension}; name its own encoder"
        )
    places = _places(Path(rows), n, corpus, str(file))
    vectors: npt.NDArray[np.float32] = faiss.rev_swig_ptr(storage.get_xb(), n * dimension).reshape(n, dimension)
    vectors.flags.writeable = False  # a write to the mapped file would end the process
    opened = FaissFile(index, vectors, places, is_graph, "")
    sample = np.unique(np.linspace(0, n - 1, _SAMPLE).astype(np.int64))
    _check_vectors(opened, sample, corpus, encoder, str(file))
    digest = hashlib.sha256(json.dumps([n, dimension, corpus.sha256]).encode())
    digest.update(vectors[sample].tobytes())
    return opened._replace(key=digest.hexdigest()[:32])


def _places(rows: Path, n: int, corpus: Corpus, file: str) -> npt.NDArray[np.int64]:
    """Position in the corpus of the passage of each line. Tens of millions of ids are kept as bytes, never as so many objects."""
    ids, ends = bytearray(), array("q", [0])
    try:
        with gzip.open(rows, "rb") if rows.suffix == ".gz" else rows.open("rb") as lines:
            for line in lines:
                if line.strip():
                    ids += str(json.loads(line)["id"]).encode("utf-8", "surrogatepass")
                    ends.append(len(ids))
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise RetrieverError(
            f"cannot read the ids of {rows}: {type(error).__name__}: {error}; give the corpus file of the index"
        ) from error
    if len(ends) != n + 1:
        raise RetrieverError(f"{file} has {n} vectors, but {rows} has {len(ends) - 1} lines; they must be of one publication")
    order, repeated = sort_ids(np.frombuffer(ids, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64))
    in_order = (ids[ends[row] : ends[row + 1]] for row in order)
    known = (id_.encode("utf-8", "surrogatepass") for id_ in corpus.ids)
    if len(corpus) != n or len(repeated) or any(one != other for one, other in zip(in_order, known, strict=True)):
        raise RetrieverError(f"the ids of {rows} are not those of the corpus of {len(corpus)} passages; read the corpus from that file")
    places = np.empty(n, dtype=np.int64)
    places[order] = np.arange(n)
    return places


def _check_vectors(opened: FaissFile, sample: npt.NDArray[np.int64], corpus: Corpus, encoder: PassageEncoder, name: str) -> None:
    lengths = np.linalg.norm(opened.vectors[sample], axis=1)
    if not np.allclose(lengths, 1, atol=0.01):
        raise RetrieverError(f"the vectors of {name} must be of length 1, but there are some of {lengths.min():.3g} to {lengths.max():.3g}")
    few = sample[:: max(1, len(sample) // 4)]
    places = opened.places[few].tolist()
    cosines = (encoder.encode_passages([corpus.contents(place) for place in places]) * opened.vectors[few]).sum(axis=1)
    for row, place, cosine in zip(few.tolist(), places, cosines.tolist(), strict=True):
        if not cosine >= _LEAST_COSINE:
            raise RetrieverError(
                f"row {row} of {name} is not the vector of passage {corpus.ids[place]!r} (cosine {cosine:.3f}); corpus, order of its "
                "lines and encoder must be those of the publication"
            )
