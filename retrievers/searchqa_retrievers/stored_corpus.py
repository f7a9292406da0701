"""Corpora past memory: passages in files of the cache, read as they are asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import shutil
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from searchqa_retrievers.corpus import Corpus, check_repetition
from searchqa_retrievers.corpus_formats import corpus_files, read_passages
from searchqa_retrievers.paths import cache_root
from searchqa_retrievers.stored_folder import DamagedIndexError, map_file, open_or_write, read_meta
from searchqa_retrievers.types import CorpusError, Passage

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
STORED_BYTES = 1_000_000_000
"""A corpus file of more bytes is left on disk unless told otherwise."""
STORED_COMPRESSED_BYTES = 300_000_000
"""The same of a compressed file."""

_COMPRESSED = (".gz", ".bz2", ".zst", ".tgz", ".tbz", ".tbz2")
_EXPANSION = 5
"""Bytes of text in a compressed byte, at most: of HotpotQA's passages gzip makes 2.8 times less, bzip2 3.6."""
_PIECE = 1 << 20


def open_corpus(
    path: str | Path,
    format: str = "auto",
    stored: bool | None = None,
    cache_dir: str | Path | None = None,
    show_progress: bool = True,
    *,
    fields: Mapping[str, str] | None = None,
) -> Corpus:
    """The passages of a corpus in any known format: in memory, or, where they are many, on disk.

    Parameters
    ----------
    path
        A file, an archive or a folder, as :func:`~searchqa_retrievers.corpus_formats.read_passages` reads them.
    format
        ``"auto"`` or one of :data:`~searchqa_retrievers.corpus_formats.FORMATS`.
    stored
        Whether the passages stay on disk (see :class:`StoredCorpus`). Default: where the file has more than :data:`STORED_BYTES`
        (compressed: :data:`STORED_COMPRESSED_BYTES`). A corpus that is stored is read from the file once; a changed file is read again.
    cache_dir
        Folder for stored corpora. Default: ``$SEARCHQA_CACHE``, else the user's cache folder for ``searchqa``.
    show_progress
        A progress bar on stderr, in a terminal, while a corpus is stored.
    fields
        For JSON lines with other names: the names in the file of ``id``, ``title`` and ``text``.

    Raises
    ------
    CorpusError
        The file cannot be read, a row is malformed (the message names file, line, field), or the cache cannot hold the passages.
    """
    path = Path(path).expanduser()
    try:
        files = [(file, file.stat()) for file in corpus_files(path)]
    except OSError as error:
        raise CorpusError(f"cannot read the corpus {path}: {error}; give an existing .jsonl or .jsonl.gz file") from error
    size = sum(status.st_size for _, status in files)
    compressed = any(file.suffix in _COMPRESSED for file, _ in files)
    if stored is None:
        stored = size > (STORED_COMPRESSED_BYTES if compressed else STORED_BYTES)
    if not stored:
        return Corpus.from_rows(read_passages(path, format, fields))
    root = cache_root() if cache_dir is None else Path(cache_dir).expanduser()
    identity = [(str(file.resolve()), status.st_size, status.st_mtime_ns) for file, status in files]
    settings = [FORMAT_VERSION, sys.byteorder, identity, format, sorted(fields.items()) if fields else None]
    folder = root / "corpora" / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]

    def write(part: Path) -> Mapping[str, Any]:
        needed = size * (_EXPANSION if compressed else 1)
        free = shutil.disk_usage(part).free
        logger.info("storing the corpus %s: at most about %.2f GB of disk in %s", path, needed / 1e9, folder)
        if needed > free:
            raise CorpusError(
                f"the passages of {path} can need {needed / 1e9:.2f} GB in {folder}, but {free / 1e9:.2f} GB are free; "
                "set SEARCHQA_CACHE to a folder with room"
            )
        with _progress(size, show_progress) as advance:
            return _write(part, path, format, fields, advance)

    try:
        return open_or_write(folder, write, StoredCorpus, "corpus")
    except (OSError, NotImplementedError, DamagedIndexError) as error:
        raise CorpusError(
            f"the corpus {path} cannot be stored in {folder}: {error}; set SEARCHQA_CACHE to a writable folder with room, or read it "
            "into memory with stored=False"
        ) from error


class StoredCorpus(Corpus):
    """A corpus whose passages lie in files; it has the interface and the hash of :class:`Corpus`.

    Made by :func:`open_corpus`. Of each, 28 bytes are memory-mapped arrays. Every passage is checked against its checksum when it
    is read. The object can be shared by threads; a pickled copy opens the same folder.

    Parameters
    ----------
    folder
        What :func:`open_corpus` has written.

    Raises
    ------
    DamagedIndexError
        The folder does not hold what was written.
    """

    def __init__(self, folder: Path) -> None:
        meta = read_meta(folder, sizes_only=("rows.bin",))
        self.folder = folder
        try:
            self._length = int(meta["passages"])
            self._sha256 = str(meta["sha256"])
            # Plain views: np.memmap's own indexing is slower, and the mapping lives as long as the view.
            self._id_ends, self._starts, self._title_bytes, self._text_bytes, self._checksums = (
                np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in _ARRAYS
            )
            self._id_blob = map_file(folder / "ids.bin")
            self._rows = map_file(folder / "rows.bin")
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:  # another process may be making it again
            raise DamagedIndexError(f"{type(error).__name__}: {error}") from error
        self.ids = _Column(self._length, self._id)
        self.titles = _Column(self._length, lambda index: self._row(index)[0])
        self.texts = _Column(self._length, lambda index: self._row(index)[1])

    @property
    def sha256(self) -> str:
        """As of the same passages in memory."""
        return self._sha256

    def __getitem__(self, index: int) -> Passage:
        index = _place(index, self._length)
        return Passage(self._id(index), *self._row(index))

    def __iter__(self) -> Iterator[Passage]:
        return map(self.__getitem__, range(self._length))

    def __contains__(self, id_: object) -> bool:
        return isinstance(id_, str) and self._find(id_) is not None

    def by_id(self, id_: str) -> Passage:
        index = self._find(id_)
        if index is None:
            raise CorpusError(f"no passage has the id {id_!r} among the {len(self)} of this corpus")
        return self[index]

    def contents(self, index: int) -> str:
        title, text = self._row(_place(index, self._length))
        return f'"{title}"\n{text}'

    def __repr__(self) -> str:
        return f"StoredCorpus({len(self)} passages)"

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredCorpus, (self.folder,)

    def _id(self, index: int) -> str:
        return self._id_blob[self._id_ends[index] : self._id_ends[index + 1]].decode("utf-8", "surrogatepass")

    def _row(self, index: int) -> tuple[str, str]:
        start, length = int(self._starts[index]), int(self._title_bytes[index])
        row = self._rows[start : start + length + int(self._text_bytes[index])]
        if zlib.crc32(row) != self._checksums[index]:
            raise CorpusError(f"passage {self._id(index)!r} in {self.folder} is damaged; delete that folder, and it is made again")
        return row[:length].decode("utf-8", "surrogatepass"), row[length:].decode("utf-8", "surrogatepass")

    def _find(self, id_: str) -> int | None:
        """By halves: in UTF-8 the order of the bytes is that of the characters."""
        wanted = id_.encode("utf-8", "surrogatepass")
        low, high = 0, self._length
        while low < high:
            middle = (low + high) // 2
            if self._id_blob[self._id_ends[middle] : self._id_ends[middle + 1]] < wanted:
                low = middle + 1
            else:
                high = middle
        return low if low < self._length and self._id(low) == id_ else None


class _Column(Sequence[str]):
    """One field of all passages, in the order of their ids."""

    def __init__(self, length: int, read: Callable[[int], str]) -> None:
        self._length = length
        self._read = read

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return list(map(self._read, range(self._length)[index]))
        return self._read(_place(index, self._length))


def _place(index: int, length: int) -> int:
    """The place from the front of one that may count from the end."""
    if not -length <= index < length:
        raise IndexError(f"there are {length} passages, but passage {index} is asked for")
    return int(index) % length


_ARRAYS = ("id_ends", "starts", "title_bytes", "text_bytes", "checksums")
"""Each in the order of the ids: where an id ends in ``ids.bin`` (int64[N + 1]), where a row starts in ``rows.bin`` (int64[N]), the bytes
of its title and of its text (uint32[N]), and the CRC-32 of both (uint32[N])."""


def _write(
    folder: Path, path: Path, format: str, fields: Mapping[str, str] | None, advance: Callable[[int], object] | None
) -> dict[str, Any]:
    """Copy the rows in the order of the file, and note where each lies in the order of the ids; no text is held."""
    starts, id_ends = array("q"), array("q", [0])
    title_bytes, text_bytes, checksums = array("I"), array("I"), array("I")
    characters = [array("I") for _ in Passage._fields]
    place = 0
    unsorted = folder / "unsorted-ids.bin"
    with (folder / "rows.bin").open("wb") as rows, unsorted.open("wb") as ids:
        for _, passage in read_passages(path, format, fields, advance):
            id_, title, text = (field.encode("utf-8", "surrogatepass") for field in passage)
            for column, field in zip(characters, passage, strict=True):
                column.append(len(field))
            row = title + text
            starts.append(place)
            title_bytes.append(len(title))
            text_bytes.append(len(text))
            checksums.append(zlib.crc32(row))
            place += rows.write(row)
            id_ends.append(id_ends[-1] + ids.write(id_))
    id_blob = np.fromfile(unsorted, dtype=np.uint8)
    unsorted.unlink()
    ends = _of(id_ends)
    order, repeated = sort_ids(id_blob, ends)
    contents = map_file(folder / "rows.bin")
    sizes = _of(title_bytes).astype(np.int64) + _of(text_bytes)

    def row_of(number: int) -> tuple[int, bytes]:
        return title_bytes[number], contents[starts[number] : starts[number] + int(sizes[number])]

    different = [second for first, second in repeated.tolist() if row_of(first) != row_of(second)]
    if different:
        _raise_repetition(path, format, fields, min(different))
    kept = {"starts": _of(starts)[order], "title_bytes": _of(title_bytes)[order]}
    kept |= {"text_bytes": _of(text_bytes)[order], "checksums": _of(checksums)[order]}
    id_sizes = np.diff(ends)[order]
    kept["id_ends"] = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(id_sizes)])
    with (folder / "ids.bin").open("wb") as ids:
        for start in range(0, len(order), _PIECE):
            piece = order[start : start + _PIECE]
            ids.write(_gather(id_blob, ends[piece], id_sizes[start : start + _PIECE]))
    for name, values in kept.items():
        np.save(folder / f"{name}.npy", values)
    digest = hashlib.sha256()
    id_bytes = (folder / "ids.bin").read_bytes()
    title_starts, text_starts = kept["starts"], kept["starts"] + kept["title_bytes"]
    columns: list[Iterator[bytes] | list[bytes]] = [
        [id_bytes],
        _slices(contents, title_starts, kept["title_bytes"]),
        _slices(contents, text_starts, kept["text_bytes"]),
    ]
    for lengths, parts in zip(characters, columns, strict=True):
        digest.update(_of(lengths)[order].astype("<i8").tobytes())
        for part in parts:
            digest.update(part)
    return {"passages": len(order), "sha256": digest.hexdigest()}


def _of(values: array[int]) -> npt.NDArray[Any]:
    """Without a copy."""
    return np.frombuffer(values, dtype=values.typecode) if len(values) else np.zeros(0, dtype=values.typecode)


def _slices(contents: mmap.mmap | bytes, starts: npt.NDArray[np.int64], sizes: npt.NDArray[Any]) -> Iterator[bytes]:
    for begin in range(0, len(starts), _PIECE):
        pairs = zip(starts[begin : begin + _PIECE].tolist(), sizes[begin : begin + _PIECE].tolist(), strict=True)
        for start, size in pairs:
            yield contents[start : start + size]


def _gather(blob: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> bytes:
    """The pieces of ``blob`` one after another."""
    ends = np.cumsum(sizes)
    where = np.repeat(starts - (ends - sizes), sizes) + np.arange(int(ends[-1]) if len(ends) else 0)
    return blob[where].tobytes()


def sort_ids(blob: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The order of ids by their bytes, without making an object of each.

    Eight bytes of every id at a time, as one number: at each step only those go on that are equal so far.

    Parameters
    ----------
    blob : uint8[B]
        All ids one after another.
    ends : int64[N + 1]
        Id i is ``blob[ends[i]:ends[i + 1]]``.

    Returns
    -------
    order : int64[M]
        Numbers of the different ids, ascending; of equal ones the first.
    repeated : int64[R, 2]
        For every id that was there before, the number of the first of its kind and its own.
    """
    order = np.arange(len(ends) - 1)
    group = np.zeros(len(order), dtype=np.int64)  # equal numbers: not told apart so far
    tied = np.arange(len(order))  # places in `order`
    depth = 0
    while len(tied):
        rows = order[tied]
        starts, stops = ends[rows] + depth, ends[rows + 1]
        key = np.zeros(len(rows), dtype=np.uint64)
        for offset in range(8):
            where = starts + offset
            inside = where < stops
            byte = np.zeros(len(rows), dtype=np.uint64)
            byte[inside] = blob[where[inside]]
            key = key << np.uint64(8) | byte
        length = np.clip(stops - starts, 0, 9)  # an id that ends is before one that goes on with zeros
        sorting = np.lexsort((length, key, group[tied]))
        order[tied] = rows[sorting]
        key, length, before = key[sorting], length[sorting], group[tied]
        new = np.ones(len(tied), dtype=bool)
        new[1:] = (np.diff(before) != 0) | (key[1:] != key[:-1]) | (np.diff(length) != 0)
        first = np.maximum.accumulate(np.where(new, np.arange(len(tied)), 0))
        group[tied] = tied[first]
        alone = new & np.append(new[1:], True)
        tied = tied[~alone & (length == 9)]
        depth += 8
    first = np.flatnonzero(np.diff(group, prepend=-1))
    repeats = np.flatnonzero(np.diff(group, prepend=-1) == 0)
    return order[first], np.stack([order[group[repeats]], order[repeats]], axis=1)


def _raise_repetition(path: Path, format: str, fields: Mapping[str, str] | None, number: int) -> None:
    """Read up to the row of that number again, to name its place and the row before it."""
    wanted = next(islice(read_passages(path, format, fields), number, None))
    for _, passage in read_passages(path, format, fields):
        if passage.id == wanted.passage.id:
            check_repetition(passage, wanted.passage, wanted.where)
            break
    raise CorpusError(f"{path} changed while it was read; try again")


@contextlib.contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[int], object] | None]:
    """A bar of bytes on stderr where a person looks at it, else None."""
    if not (wanted and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Storing passages", total=total)
        yield lambda read: bar.update(task, completed=read)
