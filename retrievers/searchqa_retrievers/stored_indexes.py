"""What indexes and corpora lie in a folder, and whether their files are what was written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from searchqa_retrievers.dense_approximate import KINDS, damaged_files
from searchqa_retrievers.dense_index import BLOCK, damaged_blocks
from searchqa_retrievers.stored_folder import checksum

COMPLETE = "complete"
_STORED = {"bm25": "bm25", "bm25-disk": "bm25-disk", "corpora": "corpus"}
"""Folders of the cache whose own folders are written by ``stored_folder``, and what these hold."""


class StoredIndex(NamedTuple):
    """One index or corpus on disk."""

    kind: str
    """``bm25``, ``bm25-disk``, ``corpus``, ``dense`` (vectors) or ``dense-`` with the kind of a FAISS index over them"""
    folder: Path
    state: str
    """:data:`COMPLETE`, or how far it is"""
    size: int
    """bytes on disk"""
    passages: int | None
    """None where that is not recorded"""
    corpus: str | None
    """hash of the corpus, where it is recorded"""
    settings: dict[str, Any]


class Verified(NamedTuple):
    """The checksums of an index."""

    stored: StoredIndex
    problems: tuple[str, ...]
    """one for each damaged file or block; an index that is not complete has none, since building it goes on"""


def find_indexes(root: Path) -> list[StoredIndex]:
    """All indexes and corpora in ``root``: a cache, one of its folders, or the folder of an index; a folder that is not there has none."""
    if not root.is_dir():
        return []
    here = list(_of_folder(root))
    if here:
        return here
    found: list[StoredIndex] = []
    for folder in sorted(folder for folder in root.iterdir() if folder.is_dir()):
        below = list(_of_folder(folder))
        if not below and root.name not in (*_STORED, "dense"):
            below = [index for inner in sorted(folder.iterdir()) if inner.is_dir() for index in _of_folder(inner)]
        found += below
    return found


def verify(index: StoredIndex) -> Verified:
    """Compare every file of an index with its checksum; this reads them all."""
    if index.state != COMPLETE:
        return Verified(index, ())
    if index.kind == "dense":
        return Verified(index, tuple(damaged_blocks(index.folder)))
    if index.kind.startswith("dense-"):
        return Verified(index, tuple(damaged_files(index.folder, index.kind.removeprefix("dense-"))))
    return Verified(index, tuple(_damaged_stored(index.folder)))


def _of_folder(folder: Path) -> Iterator[StoredIndex]:
    if (folder / "meta.json").is_file() and folder.parent.name in _STORED:
        yield _stored(folder)
    elif ".part-" in folder.name and folder.parent.name in _STORED:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        yield StoredIndex(_STORED[folder.parent.name], folder, "partial, being written or left behind", size, None, None, {})
    elif (
        (folder / "vectors.npy").is_file()
        or (folder / "manifest.json").is_file()
        or any((folder / f"{kind}.json").is_file() for kind in KINDS)
    ):
        yield from _dense(folder)


def _stored(folder: Path) -> StoredIndex:
    meta = _json(folder / "meta.json")
    passages = meta.get("passages", meta.get("num_passages"))
    sizes = meta.get("sizes")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    facts = {
        key: value
        for key, value in meta.items()
        if key not in ("sizes", "checksums", "passages", "num_passages", "sha256", "corpus_sha256")
    }
    corpus = meta.get("corpus_sha256", meta.get("sha256"))
    state = COMPLETE if isinstance(sizes, dict) else "of another version" if meta else "damaged: meta.json cannot be read"
    return StoredIndex(_STORED[folder.parent.name], folder, state, size, passages, corpus, facts)


def _dense(folder: Path) -> Iterator[StoredIndex]:
    manifest, vectors = folder / "manifest.json", folder / "vectors.npy"
    passages, corpus = None, None
    if manifest.is_file():
        facts = _json(manifest)
        passages, corpus = facts.get("passages"), facts.get("corpus_sha256")
        encoder = facts.get("encoder", {})
        settings = {key: encoder.get(key) for key in ("model", "dtype") if encoder.get(key)}
        settings |= {key: facts.get(key) for key in ("storage", "dimension")}
        state = COMPLETE if facts else "damaged: manifest.json cannot be read"
        size = manifest.stat().st_size + (vectors.stat().st_size if vectors.is_file() else 0)
        yield StoredIndex("dense", folder, state, size, passages, corpus, settings)
    elif vectors.is_file():
        record = folder / "progress.jsonl"
        blocks = max(0, record.read_text().count("\n") - 1) if record.is_file() else 0
        yield StoredIndex("dense", folder, f"partial, {blocks * BLOCK:,} passages", vectors.stat().st_size, None, None, {})
    for kind in KINDS:
        meta, file = folder / f"{kind}.json", folder / f"{kind}.faiss"
        under_way = sorted(folder.glob(f"{kind}.checkpoint-*.faiss"))
        if meta.is_file():
            factory = _json(meta).get("factory")
            size = file.stat().st_size if file.is_file() else 0
            yield StoredIndex(f"dense-{kind}", folder, COMPLETE, size, passages, corpus, {"factory": factory})
        elif under_way:
            done = max(int(one.stem.rpartition("-")[2]) for one in under_way)
            size = sum(one.stat().st_size for one in under_way)
            yield StoredIndex(f"dense-{kind}", folder, f"partial, {done:,} passages", size, passages, corpus, {})


def _damaged_stored(folder: Path) -> Iterator[str]:
    meta = _json(folder / "meta.json")
    for name, wanted in meta.get("checksums", {}).items():
        file = folder / name
        if not file.is_file():
            yield f"{name} is missing"
        elif file.stat().st_size != meta["sizes"].get(name):
            yield f"{name} has {file.stat().st_size} bytes, not {meta['sizes'].get(name)}"
        elif checksum(file) != wanted:
            yield f"{name} has a wrong checksum"


def _json(file: Path) -> dict[str, Any]:
    """Empty where the file is damaged, which is for the caller to say."""
    try:
        value = json.loads(file.read_bytes())
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
