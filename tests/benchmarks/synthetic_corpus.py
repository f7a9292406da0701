"""Made-up passages and vectors of any number for the benchmarks, written to files block by block.

Words are drawn by Zipf's law (exponent 1.05, 1.5 million ranks) of which the first 33 are Lucene's stop words; a passage has a title of two words
and 50 to 150 words of text. A query is 3 to 8 words of one passage, stop words left out. Vectors are those of a mixture: a cluster's centre, a part in
32 directions that all share, and a little noise; a query is a vector with more noise. Real embeddings are harder to search than these.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from searchqa_retrievers.analysis import ENGLISH_STOP_WORDS

ZIPF_EXPONENT = 1.05
RANKS = 1_500_000
DIMENSION = 384
QUERIES = 512
BLOCK = 10_000

_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aou"]  # no ending that a stemmer takes off


def _word(rank: int) -> str:
    if rank < len(ENGLISH_STOP_WORDS):
        return ENGLISH_STOP_WORDS[rank]
    number, syllables = rank, []
    while number or len(syllables) < 2:
        number, digit = divmod(number, len(_SYLLABLES))
        syllables.append(_SYLLABLES[digit])
    return "".join(syllables)


def passages(count: int) -> Iterator[tuple[str, str, str, str | None]]:
    """``(id, title, text, query)``: a query from one of every ``count // QUERIES`` passages, else None. The first ones are the same for any ``count``."""
    words = [_word(rank) for rank in range(RANKS)]
    cumulative = np.cumsum(np.arange(1, RANKS + 1, dtype=np.float64) ** -ZIPF_EXPONENT)
    cumulative /= cumulative[-1]
    every = max(1, count // QUERIES)
    for start in range(0, count, BLOCK):
        generator = np.random.default_rng([7, start])
        lengths = generator.integers(50, 151, size=BLOCK) + 2
        ends = np.cumsum(lengths).tolist()
        ranks = np.searchsorted(cumulative, generator.random(ends[-1])).tolist()
        begin = 0
        for number, end in enumerate(ends[: count - start], start=start):
            drawn = ranks[begin:end]
            begin = end
            text = [words[rank] for rank in drawn]
            query = None
            if number % every == 0:
                content = [words[rank] for rank in drawn if rank >= len(ENGLISH_STOP_WORDS)]
                size = min(len(content), int(generator.integers(3, 9)))
                query = " ".join(generator.choice(content, size=size, replace=False))
            yield f"{number:08}", " ".join(text[:2]), " ".join(text[2:]), query


def write_passages(folder: Path, count: int) -> Path:
    """``corpus.jsonl`` of so many passages in ``folder``, beside it ``queries.json``; what is there already is left."""
    file, queries = folder / "corpus.jsonl", folder / "queries.json"
    if not queries.exists():
        folder.mkdir(parents=True, exist_ok=True)
        asked = []
        part = folder / "corpus.jsonl.part"
        with part.open("w", encoding="utf-8") as lines:
            for id_, title, text, query in passages(count):
                lines.write(json.dumps({"id": id_, "title": title, "text": text}) + "\n")
                if query:
                    asked.append(query)
        os.replace(part, file)
        np.random.default_rng(1).shuffle(asked)
        queries.write_text(json.dumps(asked[:QUERIES]))
    return file


def read_queries(folder: Path) -> list[str]:
    queries: list[str] = json.loads((folder / "queries.json").read_text())
    return queries


def write_vectors(folder: Path, count: int, storage: str = "float32") -> Path:
    """``vectors.npy`` of so many unit vectors, beside it ``query_vectors.npy``; what is there already is left."""
    file, queries = folder / "vectors.npy", folder / "query_vectors.npy"
    if not queries.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shared = np.random.default_rng(3)
        centres = shared.standard_normal((max(64, count // 256), DIMENSION)).astype(np.float32)
        directions = (shared.standard_normal((32, DIMENSION)) / np.sqrt(32)).astype(np.float32)
        np.lib.format.open_memmap(file, mode="w+", dtype=storage, shape=(count, DIMENSION)).flush()
        every = max(1, count // QUERIES)
        asked = []
        for start in range(0, count, BLOCK):
            generator = np.random.default_rng([11, start])
            rows = centres[generator.integers(0, len(centres), size=BLOCK)] * np.float32(0.8)
            rows += np.float32(0.6) * (generator.standard_normal((BLOCK, 32), dtype=np.float32) @ directions)
            rows += generator.standard_normal((BLOCK, DIMENSION), dtype=np.float32) * np.float32(0.2)
            rows = _unit(rows)[: count - start]
            mapped = np.load(file, mmap_mode="r+")
            mapped[start : start + len(rows)] = rows
            mapped.flush()
            members = rows[-start % every :: every]
            asked.append(_unit(members + np.float32(0.02) * generator.standard_normal(members.shape, dtype=np.float32)))
        np.save(queries, np.random.default_rng(1).permutation(np.concatenate(asked))[:QUERIES])
    return file


def _unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
