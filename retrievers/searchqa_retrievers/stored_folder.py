"""Folders of the cache that hold what can be made again: written once among all processes, complete or not there, and checked."""

from __future__ import annotations

import json
import logging
import mmap
import shutil
import uuid
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from searchqa_retrievers.types import RetrieverError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_META = "meta.json"


class DamagedIndexError(RetrieverError):
    """The files of a stored index or corpus are not what was written; they must be made again."""


def open_or_write(folder: Path, write: Callable[[Path], Mapping[str, Any]], load: Callable[[Path], T], called: str) -> T:
    """``load(folder)``; where the folder is missing or damaged, it is written first, once among all processes that ask.

    The folder appears only when it is complete: it is written elsewhere and renamed. What a killed process left is deleted.

    Parameters
    ----------
    folder
    write
        Fills an empty folder, and returns what is to be kept about it (JSON), which :func:`read_meta` gives back.
    load
        Opens the folder; raises :class:`DamagedIndexError`, as :func:`read_meta` does, where it is not what was written.
    called
        What the folder holds, for messages.

    Raises
    ------
    OSError, NotImplementedError
        The folder cannot be written; NotImplementedError where the file system has no locks.
    """
    import filelock

    if folder.is_dir():
        try:
            return load(folder)
        except DamagedIndexError:  # another process may be writing it anew: look again under the lock
            pass
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(folder.name + ".lock")):
        if folder.is_dir():  # another process may have written it while this one waited
            try:
                return load(folder)
            except DamagedIndexError as error:
                logger.warning("the stored %s %s is damaged (%s); building it again", called, folder, error)
                aside = _aside(folder)
                folder.rename(aside)  # at once, also where another process has files of it open
                shutil.rmtree(aside, ignore_errors=True)
        for leftover in folder.parent.glob(f"{folder.name}.part-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        part = _aside(folder)
        part.mkdir()  # unlike tempfile's folders, for all whom the umask lets in: caches are shared
        try:
            facts = write(part)
            files = sorted(file for file in part.rglob("*") if file.is_file() and not _is_lock(file))
            meta = {
                **facts,
                "sizes": {str(file.relative_to(part)): file.stat().st_size for file in files},
                "checksums": {str(file.relative_to(part)): checksum(file) for file in files},
            }
            (part / _META).write_text(json.dumps(meta, indent=1))
            part.rename(folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            if part.exists():
                logger.warning("%s could not be deleted; the next process that makes %s does", part, folder)
            raise
        return load(folder)


def read_meta(folder: Path, sizes_only: Collection[str] = ()) -> dict[str, Any]:
    """What was kept about a folder, once all its files are seen to be what was written; of ``sizes_only`` only the sizes are looked at."""
    try:
        meta: dict[str, Any] = json.loads((folder / _META).read_bytes())
        for name, size in meta["sizes"].items():
            if (folder / name).stat().st_size != size:
                raise DamagedIndexError(f"{name} has a wrong size")
            if name not in sizes_only and checksum(folder / name) != meta["checksums"][name]:
                raise DamagedIndexError(f"{name} has a wrong checksum")
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        raise DamagedIndexError(f"{type(error).__name__}: {error}") from error
    return meta


def checksum(file: Path) -> int:
    """CRC-32 of a file; without it a flipped bit in an index could make a search read or write outside its memory."""
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value


def map_file(file: Path) -> mmap.mmap | bytes:
    """The bytes of a file, read as they are asked for."""
    if not file.stat().st_size:
        return b""  # an empty file cannot be mapped
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _aside(folder: Path) -> Path:
    """A name beside a folder for what is not complete; what is left of it is deleted by the next process that writes the folder."""
    return folder.with_name(f"{folder.name}.part-{uuid.uuid4().hex}")


def _is_lock(file: Path) -> bool:
    return file.name.startswith(".") and file.name.endswith(".lock")
