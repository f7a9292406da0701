"""Where the files of a set are on this machine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchqa_envs.datasets.formats import canonical_split
from searchqa_envs.errors import DataError
from searchqa_retrievers.paths import cache_root

RECORD_NAME = "searchqa-data.json"
"""Beside downloaded or merged files: where they came from, and the sha256 of each."""

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_SPLIT_WORD = re.compile(r"(?<![a-z])(train|dev|validation|valid|val|test)(?![a-z])")


@dataclass(frozen=True, slots=True)
class SetFiles:
    """The files of one set.

    ``questions`` are (path, split) pairs; the split is None where the rows name their own. ``record`` is the content of the set's
    ``searchqa-data.json``, empty without one.
    """

    name: str
    folder: Path
    questions: tuple[tuple[Path, str | None], ...]
    extra: Path | None
    corpus: Path | None
    record: Mapping[str, Any]


def data_roots(data_dir: str | Path | None) -> list[tuple[str, Path]]:
    """Folders that can hold sets, in the order in which they are looked at, each with what names it.

    An explicit ``data_dir``, or else ``$SEARCHQA_DATA``, is followed only by the user's cache when it was not given.
    """
    if data_dir is not None:
        return [("data_dir", Path(data_dir).expanduser())]
    roots = []
    variable = os.environ.get("SEARCHQA_DATA")
    if variable:
        roots.append(("$SEARCHQA_DATA", Path(variable).expanduser()))
    roots.append(("the cache", cache_data_root()))
    return roots


def cache_data_root() -> Path:
    """Where downloads go: ``data`` in ``$SEARCHQA_CACHE``, or in the user's cache folder."""
    return cache_root() / "data"


def find_set(name: str, root: Path) -> SetFiles | None:
    """The files of a set in ``<root>/<name>``; None when there are none, or a download there was never finished.

    Files called ``questions.jsonl[.gz]``, ``questions_extra.jsonl[.gz]`` and ``corpus.jsonl[.gz]`` are ours. Without the first,
    all ``.jsonl``, ``.json`` and ``.parquet`` files (directly in the folder, else one level down) whose names tell a split are taken,
    as they are published: ``dev.jsonl``, ``hotpot_dev_distractor_v1.json``, ``train-00000-of-00002.parquet``.
    """
    folder = root / name
    if not folder.is_dir():
        return None
    record = read_record(folder)
    if record.get("complete") is False or not all((folder / file).is_file() for file in record.get("files", {})):
        return None
    ours = _one_of(folder, "questions")
    questions: list[tuple[Path, str | None]] = [(ours, None)] if ours else []
    for level in ("*", "*/*"):
        questions = questions or _published_files(folder, level)
    if not questions:
        return None
    return SetFiles(name, folder, tuple(questions), _one_of(folder, "questions_extra"), _one_of(folder, "corpus"), record)


def find_corpus(name: str, root: Path) -> Path | None:
    """The corpus file of a folder that holds nothing else, such as ``wiki18``."""
    folder = root / name
    if not folder.is_dir() or read_record(folder).get("complete") is False:
        return None
    found = sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])
    if len(found) > 1:
        raise DataError(f"{folder} must hold one corpus, found {', '.join(path.name for path in found)}. Give corpus=<path>.")
    return found[0] if found else None


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a folder's record; empty where there is none."""
    path = folder / RECORD_NAME
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} must be a JSON object, found: {error}. Delete it; the revision is then recorded anew.") from None
    if not isinstance(record, dict) or not isinstance(record.get("files", {}), dict):
        raise DataError(f"{path} must be a JSON object whose 'files' is one too. Delete it; the revision is then recorded anew.")
    return record


def _one_of(folder: Path, stem: str) -> Path | None:
    found = [path for path in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz") if path.is_file()]
    if len(found) == 2:
        raise DataError(f"{folder} has both {stem}.jsonl and {stem}.jsonl.gz, and they may differ. Keep one of them.")
    return found[0] if found else None


def _published_files(folder: Path, level: str) -> list[tuple[Path, str | None]]:
    by_split: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(folder.glob(level)):
        if path.is_file() and path.name.removesuffix(".gz").endswith((".jsonl", ".json", ".parquet")) and path.name != RECORD_NAME:
            stem = path.name.split(".", 1)[0] if path.suffix == ".parquet" else path.name.removesuffix(".gz").rsplit(".", 1)[0]
            family = _SHARD.sub("", stem)
            words = set(_SPLIT_WORD.findall(family.lower().replace("_", " ")))
            if len(words) == 1:
                by_split.setdefault(canonical_split(words.pop()), {}).setdefault(f"{path.parent.name}/{family}", []).append(path)
    files: list[tuple[Path, str | None]] = []
    for split, families in by_split.items():
        if len(families) > 1:
            names = ", ".join(str(path.relative_to(folder)) for paths in families.values() for path in paths)
            raise DataError(
                f"{folder} must have one file (or one series of shards) for the split {split!r}, found {names}. "
                "Keep one, or give the one you mean to SearchQA-Custom-v0 as questions=<path>."
            )
        files += [(path, split) for paths in families.values() for path in paths]
    return files
