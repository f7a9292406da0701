"""Questions of a set with the corpus they are asked about: what environments draw from."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from searchqa_envs.datasets.formats import QuestionRows, canonical_split, read_questions
from searchqa_envs.datasets.location import SetFiles, data_roots, find_corpus, find_set
from searchqa_envs.datasets.registry import QUESTION_COLLECTIONS, SPLITS, dataset_info
from searchqa_envs.datasets.rows import Row, shown
from searchqa_envs.errors import ConfigurationError, DataError, DataNotFoundError, MalformedRowError, UnknownQuestionError
from searchqa_envs.questions import Question
from searchqa_retrievers.types import Passage, Retriever

if TYPE_CHECKING:
    from searchqa_retrievers.corpus import Corpus

T = TypeVar("T")

CorpusGiven = str | Path | Sequence[Passage | Mapping[str, Any]]
QuestionsGiven = str | Path | Sequence[str | Path] | Sequence[Mapping[str, Any]]

_cache: dict[Hashable, Any] = {}
_lock = threading.RLock()


def clear_cache() -> None:
    """Forget all sources and corpora that were read; the next call reads the files again."""
    with _lock:
        _cache.clear()


def _cached(key: Hashable, make: Callable[[], T]) -> T:
    with _lock:
        if key not in _cache:
            _cache[key] = make()
        found: T = _cache[key]
        return found


class DatasetSource:
    """A :class:`~searchqa_envs.questions.QuestionSource` over questions that are in memory and a corpus that is read when first needed.

    Made by :func:`load_source` and :func:`load_custom`; equal arguments give the same object, so that all environments of a process share it.
    Copies are the object itself.

    Attributes
    ----------
    name : str
        Hydra name of the set.
    split : str
        The split the questions are of.
    revision : str or None
        Revision of the downloaded files, where a record tells it.
    """

    def __init__(
        self, name: str, split: str, questions: Sequence[Question], load_corpus: Callable[[], Corpus], revision: str | None = None
    ) -> None:
        if not questions:
            raise DataError(f"{name}: the split {split!r} has no question. Choose another split.")
        self.name = name
        self.split = split
        self.revision = revision
        self._questions = tuple(questions)
        self._index: dict[str, int] = {}
        for index, question in enumerate(self._questions):
            if self._index.setdefault(question.id, index) != index:
                raise DataError(
                    f"{name}: ids of questions must be unique, but {question.id!r} occurs twice. "
                    "'searchqa data merge' joins files and keeps their ids apart."
                )
        self._load_corpus = load_corpus
        self._corpus: Corpus | None = None
        self._questions_sha256: str | None = None

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> Question:
        try:
            return self._questions[index]
        except IndexError:
            raise UnknownQuestionError(
                f"{self.name}, split {self.split!r}, has the indexes 0 to {len(self) - 1}; got {index}. Choose one of them."
            ) from None

    def __iter__(self) -> Iterator[Question]:
        return iter(self._questions)

    def __repr__(self) -> str:
        return f"DatasetSource({self.name!r}, split={self.split!r}, {len(self)} questions)"

    def __deepcopy__(self, memo: dict[int, Any]) -> DatasetSource:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_corpus": None}  # read again where it is needed

    def index_of(self, question_id: str) -> int:
        """Index of a question; raises :class:`UnknownQuestionError`."""
        try:
            return self._index[question_id]
        except KeyError:
            raise UnknownQuestionError(
                f"{self.name}, split {self.split!r}, has no question with the id {question_id!r} among its {len(self)}. "
                f"An id of this split is {self._questions[0].id!r}; split='all' has every question of the set."
            ) from None

    def filters(self, question: Question) -> Mapping[str, str] | None:
        """None: one corpus serves all questions of a set."""
        return None

    def corpus(self) -> Corpus:
        """The passages, read at the first call. Raises :class:`DataNotFoundError` where the set comes without any."""
        with _lock:
            if self._corpus is None:
                self._corpus = self._load_corpus()
            return self._corpus

    def build_retriever(self, config: Mapping[str, Any]) -> Retriever:
        """The retriever ``{"name": ..., **settings}`` over this source's corpus, which is read only if that retriever needs it."""
        from searchqa_retrievers import build_retriever

        return build_retriever(config, self.corpus)

    def stamp(self) -> dict[str, Any]:
        """What identifies the questions and the passages. The corpus hash is there once the corpus was needed."""
        if self._questions_sha256 is None:
            digest = hashlib.sha256()
            for question in self._questions:
                row = [question.id, question.question, list(question.golden_answers)]
                digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self._questions_sha256 = digest.hexdigest()
        stamp: dict[str, Any] = {
            "dataset": self.name,
            "split": self.split,
            "questions": len(self),
            "questions_sha256": self._questions_sha256,
        }
        if self.revision is not None:
            stamp["revision"] = self.revision
        if self._corpus is not None:
            stamp["passages"] = len(self._corpus)
            stamp["corpus_sha256"] = self._corpus.sha256
        return stamp


def load_source(
    name: str,
    split: str | None = None,
    data_dir: str | Path | None = None,
    corpus: CorpusGiven | None = None,
    *,
    questions: QuestionsGiven | None = None,
    format: str | None = None,
    download: bool = True,
) -> DatasetSource:
    """The questions of a set, found on this machine or else downloaded.

    Parameters
    ----------
    name
        Hydra name of the set, or one of :data:`~searchqa_envs.datasets.registry.QUESTION_COLLECTIONS`; ``custom`` for files of one's own (then see
        :func:`load_custom`).
    split
        ``train``, ``dev``, ``test``, ``all`` (every row of the question files), or ``extra`` (``questions_extra.jsonl``: questions whose passages
        are mostly not in the corpus). Default: ``train``, or the only one the set has; ``all`` where no row names a split.
    data_dir
        Folder with one folder per set. Default: ``$SEARCHQA_DATA``, else the user's cache (``$SEARCHQA_CACHE`` moves it), else download there.
    corpus
        Another corpus than the set's own: a ``.jsonl[.gz]`` file, a list of passages, or ``"wiki18"``.
    questions, format
        For ``custom`` only.
    download
        Whether a set that is nowhere on this machine is downloaded.

    Raises
    ------
    DataNotFoundError
        The set is not on this machine and cannot be downloaded; the message names every way out.
    ConfigurationError
        No such set, or no such split (the message lists those there are).
    MalformedRowError
        A question file has a row that cannot be read.
    """
    if name == "custom":
        if questions is None:
            raise ConfigurationError("the set 'custom' needs questions=<path or list of rows>; corpus=<path> gives it passages.")
        if data_dir is not None:
            raise ConfigurationError(f"the set 'custom' takes paths as questions and corpus, not data_dir; got data_dir={str(data_dir)!r}.")
        return load_custom(questions, corpus, split, format=format)
    if name not in QUESTION_COLLECTIONS:
        dataset_info(name)
    if questions is not None or format is not None:
        raise ConfigurationError(f"questions and format belong to the set 'custom'; got them with {name!r}. Use SearchQA-Custom-v0.")
    files = locate(name, data_dir, download=download)
    _check_split_name(name, split)
    stamps = tuple((str(path), *_file_stamp(path)) for path in _files_of(files))
    key = ("source", name, split, stamps, _corpus_key(corpus), str(data_dir))
    return _cached(key, lambda: _load_set(files, split, corpus, data_dir))


def load_custom(
    questions: QuestionsGiven,
    corpus: CorpusGiven | None = None,
    split: str | None = None,
    *,
    format: str | None = None,
    name: str = "custom",
) -> DatasetSource:
    """Questions and passages of one's own.

    Parameters
    ----------
    questions
        A file in any format of :data:`~searchqa_envs.datasets.formats.FORMATS`, several of them, or a list of such rows
        (``{"id": ..., "question": ..., "golden_answers": [...]}``).
    corpus
        A ``.jsonl[.gz]`` file (``id``, and ``title`` with ``text``, or ``contents``), a list of such rows or of
        :class:`~searchqa_retrievers.types.Passage`, or ``"wiki18"``. Default: the contexts that the questions bring, if they do.
    split
        As for :func:`load_source`.
    format
        Format of the question rows, where its detection from the fields of the first row is not wanted.
    """
    _check_split_name(name, split)
    given = _question_rows(questions)
    key = ("custom", name, split, format, tuple(map(_rows_key, given)), _corpus_key(corpus))

    def make() -> DatasetSource:
        chosen, of = _choose(name, [entry.question for rows in given for entry in read_questions(rows, format)], split)
        return DatasetSource(name, of, chosen, partial(_load_corpus, name, corpus, None, [(rows, None) for rows in given], format, None))

    return _cached(key, make)


def locate(name: str, data_dir: str | Path | None = None, *, download: bool = True) -> SetFiles:
    """The files of a set: in ``data_dir``, else in ``$SEARCHQA_DATA``, else in the cache, else downloaded to the cache."""
    tried = []
    for called, root in data_roots(data_dir):
        found = find_set(name, root)
        if found is not None:
            return found
        tried.append(f"{called}: {root / name}")
    reason = "not tried" if data_dir is None else "not tried, because data_dir was given"
    if download and data_dir is None:
        from searchqa_envs.datasets.download import DownloadError, download_set

        try:
            return download_set(name)
        except DownloadError as error:
            reason = str(error)
    _not_found(name, tried, reason)


def _not_found(name: str, tried: Sequence[str], reason: str) -> NoReturn:
    looked = "\n".join(f"  - {place}: no question files" for place in tried)
    raise DataNotFoundError(
        f"The data set {name!r} is not on this machine. Looked at:\n{looked}\n  - download: {reason}\n"
        "Ways out:\n"
        f"  1. with a network: searchqa data download {name}\n"
        f"  2. put {name}/questions.jsonl[.gz] and {name}/corpus.jsonl[.gz], or the published files, into a folder and set "
        "SEARCHQA_DATA=<folder> or data_dir=<folder>\n"
        f"  3. on a machine with a network: searchqa data download {name} --data-dir <folder>, and copy that folder here\n"
        "  4. files of your own: SearchQA-Custom-v0 with questions=<path>, corpus=<path>\n"
        "  5. SearchQA-World-v0 is embedded and needs no data."
    )


def _load_set(files: SetFiles, split: str | None, corpus: CorpusGiven | None, data_dir: str | Path | None) -> DatasetSource:
    if split == "extra":
        if files.extra is None:
            raise ConfigurationError(
                f"{files.name} in {files.folder} has no questions_extra.jsonl[.gz]. {_splits_line(_all_questions(files))}"
            )
        chosen, of = [entry.question for entry in read_questions(files.extra)], "extra"
    else:
        wanted = canonical_split(split) if split else None
        named = [file_split for _, file_split in files.questions]
        if wanted is None and "train" in named:
            wanted = "train"
        if wanted in named:  # a file per split: leave the others alone
            pairs = [pair for pair in files.questions if pair[1] == wanted]
            chosen, of = _choose(files.name, _read_all(pairs), wanted)
        else:
            chosen, of = _choose(files.name, _all_questions(files), wanted)
    revision = files.record.get("revision")
    load_corpus = partial(_load_corpus, files.name, corpus, files.corpus, list(files.questions), None, data_dir)
    return DatasetSource(files.name, of, chosen, load_corpus, revision if isinstance(revision, str) else None)


def _read_all(pairs: Iterable[tuple[QuestionRows, str | None]]) -> list[Question]:
    return [entry.question for rows, split in pairs for entry in read_questions(rows, split=split)]


def _all_questions(files: SetFiles) -> list[Question]:
    return _read_all(files.questions)


def _check_split_name(name: str, split: str | None) -> None:
    if split is not None and (not isinstance(split, str) or not split):
        raise ConfigurationError(f"{name}: split must be one of {', '.join(SPLITS)}, all, extra; got {split!r}.")


def _choose(name: str, questions: list[Question], split: str | None) -> tuple[list[Question], str]:
    """The questions of a split, and its name."""
    present = Counter(question.metadata.get("split") for question in questions)
    named = [value for value in present if value is not None]
    if split is None:
        if not named:
            return questions, "all"
        if "train" in named or len(named) == 1:
            split = "train" if "train" in named else named[0]
        else:
            raise ConfigurationError(f"{name} has no split 'train', and more than one other: choose one. {_splits_line(questions)}")
    if split == "all":
        return questions, "all"
    split = canonical_split(split)
    chosen = [question for question in questions if question.metadata.get("split") == split]
    if not chosen:
        raise ConfigurationError(f"{name} has no split {split!r}. {_splits_line(questions)}")
    return chosen, split


def _splits_line(questions: list[Question]) -> str:
    present = Counter(question.metadata.get("split") for question in questions)
    splits = [f"{split} ({rows} rows)" for split, rows in sorted(present.items(), key=str) if split is not None]
    return f"Splits here: {', '.join([*splits, f'all ({len(questions)} rows)'])}."


def _load_corpus(
    name: str,
    corpus: CorpusGiven | None,
    own: Path | None,
    questions: list[tuple[QuestionRows, str | None]],
    format: str | None,
    data_dir: str | Path | None,
) -> Corpus:
    """The corpus asked for; else the set's own file; else the contexts of all its question files; else ``wiki18`` where it is on this machine."""
    if corpus is not None:
        return _given_corpus(corpus, data_dir)
    if own is not None:
        return _corpus_file(own)
    key = ("contexts", format, tuple(_rows_key(rows) for rows, _ in questions))
    from_contexts = _cached(key, lambda: corpus_from_contexts((rows for rows, _ in questions), format))
    if from_contexts is not None:
        return from_contexts
    if name != "custom":
        wiki = _find_wiki(data_dir)
        if wiki is not None:
            return _corpus_file(wiki)
    raise DataNotFoundError(
        f"{name} has no passages: there is no corpus.jsonl[.gz] beside its questions, and the questions bring no contexts. Ways out:\n"
        "  1. corpus=<path of a .jsonl or .jsonl.gz file with id, title and text, or contents>\n"
        "  2. 'searchqa data download wiki18' (Wikipedia of 2018 in 21 million passages; it takes tens of gigabytes of disk and memory)\n"
        "  3. a retriever object that brings its own passages (searchqa_retrievers.from_function makes one of a function)\n"
        "  4. retriever='none', which finds nothing and needs no passages."
    )


def load_set_corpus(files: SetFiles) -> Corpus:
    """The passages of a set that was located: its own file, or else the contexts of its questions.

    Raises :class:`DataNotFoundError` when it has neither.
    """
    return _load_corpus(files.name, None, files.corpus, list(files.questions), None, files.folder.parent)


def corpus_from_contexts(sources: Iterable[QuestionRows], format: str | None = None) -> Corpus | None:
    """All different passages that questions bring with them; None when they bring none."""
    from searchqa_retrievers.corpus import Corpus

    passages: dict[str, Passage] = {}
    for rows in sources:
        for entry in read_questions(rows, format):
            for passage in entry.passages:
                passages.setdefault(passage.id, passage)
    return Corpus.from_passages(passages.values()) if passages else None


def _given_corpus(corpus: CorpusGiven, data_dir: str | Path | None) -> Corpus:
    if isinstance(corpus, str) and corpus == "wiki18":
        wiki = _find_wiki(data_dir)
        if wiki is None:
            looked = ", ".join(str(root / "wiki18") for _, root in data_roots(data_dir))
            raise DataNotFoundError(f"corpus='wiki18' is not on this machine (looked at {looked}). Fetch it: searchqa data download wiki18")
        return _corpus_file(wiki)
    if isinstance(corpus, (str, Path)):
        path = Path(corpus).expanduser()
        if not path.exists():
            raise DataNotFoundError(f"no corpus file at {path}. Give the path of a .jsonl or .jsonl.gz file, or a list of passages.")
        return _corpus_file(path)
    from searchqa_retrievers.corpus import Corpus

    return Corpus.from_passages(_passage(number, item) for number, item in enumerate(corpus, start=1))


def _passage(number: int, item: Passage | Mapping[str, Any]) -> Passage:
    if isinstance(item, tuple) and len(item) == 3:
        return Passage(*item)
    place = f"passage {number} of the list given"
    if not isinstance(item, Mapping):
        raise MalformedRowError(f"{place}: expected a Passage or an object with id, title, text, found {shown(item)}.")
    row = Row(place, item)
    if "text" in item:
        return Passage(row.identifier("id"), row.optional_text("title") or "", row.text("text"))
    title, newline, text = row.text("contents").partition("\n")
    if not newline:
        title, text = "", title
    return Passage(row.identifier("id"), row.optional_text("title") or title.removeprefix('"').removesuffix('"'), text)


def _find_wiki(data_dir: str | Path | None) -> Path | None:
    for _, root in data_roots(data_dir):
        found = find_corpus("wiki18", root)
        if found is not None:
            return found
    return None


def _corpus_file(path: Path) -> Corpus:
    from searchqa_retrievers.stored_corpus import open_corpus

    return _cached(("corpus", str(path.resolve()), *_file_stamp(path)), lambda: open_corpus(path))


def _question_rows(questions: QuestionsGiven) -> list[QuestionRows]:
    if isinstance(questions, (str, Path)):
        return [Path(questions).expanduser()]
    items: list[Any] = list(questions)
    if not items:
        raise ConfigurationError("questions must be a path, paths, or a list of at least one row; got an empty list.")
    if all(isinstance(item, (str, Path)) for item in items):
        return [Path(item).expanduser() for item in items]
    if all(isinstance(item, Mapping) for item in items):
        return [items]
    wrong = next(item for item in items if not isinstance(item, Mapping))
    raise ConfigurationError(f"questions must be a path, a list of paths, or a list of rows (dicts); found in the list {shown(wrong)}.")


def _file_stamp(path: Path) -> tuple[int, int]:
    """Changes when a file does, so that a changed file is read again."""
    if not path.exists():
        return (0, 0)
    status = path.stat()
    return (status.st_mtime_ns, status.st_size)


def _files_of(files: SetFiles) -> list[Path]:
    others = [path for path in (files.extra, files.corpus) if path is not None]
    return [*(path for path, _ in files.questions), *others]


def _rows_key(rows: QuestionRows) -> Hashable:
    if isinstance(rows, Path):
        return (str(rows.resolve()), *_file_stamp(rows))
    return hashlib.sha256(json.dumps(rows, default=str, sort_keys=True).encode()).hexdigest()


def _corpus_key(corpus: CorpusGiven | None) -> Hashable:
    if corpus is None or isinstance(corpus, (str, Path)):
        return None if corpus is None else (str(corpus), *_file_stamp(Path(corpus).expanduser()))
    return hashlib.sha256(json.dumps(list(corpus), default=str, sort_keys=True).encode()).hexdigest()
