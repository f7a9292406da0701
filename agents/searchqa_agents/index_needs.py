"""What the indexes of a retriever's configuration take, and what of the configuration is wrong, before anything is built."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from searchqa_retrievers import Corpus, Encoder
    from searchqa_retrievers.needs import Needs

_SAMPLE = 1000
_ENCODED = 16


@dataclass(frozen=True)
class Part:
    """What one index of a configuration takes."""

    name: str
    root: Path
    """the cache that it lies in"""
    key: str
    """equal for two configurations with one index"""
    needs: Needs
    """of disk and of memory to build it, 0 where the index is complete"""
    seconds: float | None = None
    """of encoding, as measured on a few passages; 0 where the vectors are there, None where nothing is encoded"""


@dataclass(frozen=True)
class _Opened:
    """What several parts of a configuration may share, and takes its time."""

    corpora: dict[str, Corpus] = field(default_factory=dict)
    encoders: dict[str, Encoder] = field(default_factory=dict)
    seconds: dict[tuple[Path, str], float] = field(default_factory=dict)
    """of encoding, by root and key of the vectors"""


class _CorpusAskedFor(Exception):
    """All that a retriever checks before it reads the corpus is well."""


def check_config(config: Mapping[str, Any]) -> None:
    """Raise :class:`~searchqa_retrievers.types.RetrieverError` for what can be seen to be wrong without the corpus.

    That is a name or an option that is unknown, a value of another type, and what a retriever checks before it reads the corpus; the
    inner retrievers' too. Options of those that ask somebody else, such as a server, are not looked at: to make one is to ask.
    """
    from searchqa_retrievers import build_retriever
    from searchqa_retrievers.build import searches_corpus, split_options

    def read() -> Corpus:
        raise _CorpusAskedFor

    if not searches_corpus(config):
        return
    options, _ = split_options(config)
    with contextlib.suppress(_CorpusAskedFor):
        build_retriever(options, read, cache_entries=0)
    for inner in _inner(config):
        check_config({key: value for key, value in inner.items() if key != "corpus"})


def parts(config: Mapping[str, Any], corpus: Corpus, root: Path) -> list[Part]:
    """The needs of all BM25 and dense indexes that a configuration names, its inner retrievers included; an index of several once.

    Parameters
    ----------
    config
        As :func:`check_config` has found it well.
    corpus
        The environment's; a source that names a corpus of its own is estimated over that.
    root
        The cache, for what has no ``cache_dir``.
    """
    return list({(part.root, part.key): part for part in _parts(config, corpus, root, _Opened())}.values())


def _parts(config: Mapping[str, Any], corpus: Corpus, root: Path, opened: _Opened) -> Iterator[Part]:
    from searchqa_retrievers.stored_corpus import open_corpus

    place = root if config.get("cache_dir") is None else Path(config["cache_dir"]).expanduser()
    if config["name"] == "bm25":
        yield _bm25_part(config, corpus, place)
    elif config["name"] == "dense":
        yield from _dense_parts(config, corpus, place, opened)
    for inner in _inner(config):
        passages, path = corpus, inner.get("corpus")
        if isinstance(path, str):
            if path not in opened.corpora:
                opened.corpora[path] = open_corpus(path)
            passages = opened.corpora[path]
        yield from _parts(inner, passages, root, opened)


def _inner(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The configurations inside a composition's; a name alone as a mapping."""
    inner = [*config.get("retrievers", ()), *config.get("sources", {}).values()]
    if "retriever" in config:
        inner.append(config["retriever"])
    for one in inner:
        yield {"name": one} if isinstance(one, str) else one


def _bm25_part(config: Mapping[str, Any], corpus: Corpus, root: Path) -> Part:
    from searchqa_retrievers import bm25, bm25_disk, bm25_index, sparse
    from searchqa_retrievers.analysis import Analyzer

    stemmer = config.get("stemmer", "english")
    analyzer = Analyzer(config.get("stopwords", "en"), stemmer)
    step = max(1, len(corpus) // _SAMPLE)
    lengths = [len(analyzer.terms(corpus.contents(index))) for index in range(0, len(corpus), step)]
    mean = sum(lengths) / max(1, len(lengths))
    terms = {"stopwords": sorted(analyzer.stop_words), "stemmer": stemmer}
    backend = config.get("backend", "auto")
    if backend == "disk" or (backend == "auto" and len(corpus) > sparse.MEMORY_PASSAGES):
        version = import_module("tantivy").__version__ if find_spec("tantivy") else None
        key = f"bm25-disk/{bm25_index.index_key(corpus, {'disk': bm25_disk.FORMAT_VERSION, 'tantivy': version, **terms})}"
        name, needs = "bm25 on disk", bm25_disk.estimate(len(corpus), mean)
    else:
        preset = bm25.BM25_PRESETS[config.get("preset", "bm25s")]
        numbers = {name: float(preset[name] if config.get(name) is None else config[name]) for name in ("k1", "b")}
        key = f"bm25/{bm25_index.index_key(corpus, {**numbers, 'method': config.get('method', 'lucene'), **terms})}"
        name, needs = "bm25 in memory", bm25_index.estimate(len(corpus), mean)
        if len(corpus) <= bm25.SMALL_CORPUS:
            needs = needs._replace(disk=0)
    if (root / key / "meta.json").is_file():
        needs = needs._replace(disk=0, building=0)
    return Part(name, root, key, needs)


def _dense_parts(config: Mapping[str, Any], corpus: Corpus, root: Path, opened: _Opened) -> Iterator[Part]:
    """The vectors, and the index over them where there is one."""
    from searchqa_retrievers import Encoder
    from searchqa_retrievers.dense_approximate import estimate
    from searchqa_retrievers.dense_index import index_folder

    described = (config.get("encoder", "search-r1"), config.get("model"), config.get("device"), config.get("dtype"))
    if repr(described) not in opened.encoders:
        opened.encoders[repr(described)] = Encoder(*described)
    encoder = opened.encoders[repr(described)]
    kind, storage, file = config.get("index", "flat"), config.get("storage", "float32"), config.get("faiss_file")
    folder = index_folder(root / "dense", corpus, encoder, storage)
    vectors = estimate("flat", len(corpus), encoder.dimension, storage)
    if file is not None:
        key, complete = f"{file} {corpus.sha256}", True
    else:
        key, complete = f"dense/{folder.name}", (folder / "manifest.json").is_file()
    if (root, key) not in opened.seconds:
        opened.seconds[root, key] = 0.0 if complete else _encoding_seconds(encoder, corpus)
    yield Part(f"vectors, {storage}", root, key, vectors._replace(disk=0, building=0) if complete else vectors, opened.seconds[root, key])
    if kind == "flat":
        return
    needs = estimate(kind, len(corpus), encoder.dimension, storage)
    if file is None and (folder / f"{kind}.json").is_file():
        needs = needs._replace(disk=0, building=0)
    else:
        own = needs.disk - vectors.disk
        needs = needs._replace(disk=2 * own)  # a checkpoint beside the index, until it is complete
    yield Part(kind, root, f"{key} {kind}", needs)


def _encoding_seconds(encoder: Encoder, corpus: Corpus) -> float:
    few = [corpus.contents(index) for index in range(0, len(corpus), max(1, len(corpus) // _ENCODED))][:_ENCODED]
    encoder.encode_passages(few[:2])
    started = time.perf_counter()
    encoder.encode_passages(few)
    return (time.perf_counter() - started) / max(1, len(few)) * len(corpus)
