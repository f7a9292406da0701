"""Generated worlds as a source of questions, and the search over their pages."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

from searchqa_envs.errors import ConfigurationError, UnknownQuestionError
from searchqa_envs.questions import Question
from searchqa_envs.world.generate import GENERATOR_VERSION, World, question_slots
from searchqa_envs.world.names import SPLITS
from searchqa_envs.world.schema import WorldPreset, check_split, get_preset
from searchqa_retrievers.composition import Composition, stamp_of
from searchqa_retrievers.counted import added_counters, counted_since, merged_counters
from searchqa_retrievers.types import Hit, Retriever, RetrieverError, SearchRequest, follows_progress
from searchqa_retrievers.wrapped import Wrapped, begin_in_forks

DEFAULT_NUM_WORLDS = {"train": 100_000, "dev": 64, "test": 64}
"""Training worlds are made fresh as training goes: a fixed few are learned by heart."""

_ENTITIES_IN_MEMORY = 50_000
_MAX_WORLDS_IN_MEMORY = 512
_MANY = 10**18

Value = TypeVar("Value")


class _Recent(Generic[Value]):
    """The last few values that ``make`` made, by number. Can be shared by threads."""

    def __init__(self, make: Callable[[int], Value], size: int) -> None:
        self._make = make
        self._size = size
        self._values: OrderedDict[int, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> Value:
        with self._lock:
            if number in self._values:
                self._values.move_to_end(number)
                return self._values[number]
        value = self._make(number)
        with self._lock:
            self._values[number] = value
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        return value


class WorldSource:
    """Questions about generated worlds, each with its own pages.

    A world is made when one of its questions or pages is first asked for, from ``(world_seed, split, its number)`` alone. The splits share
    no name, aliases included. A question's id, ``easy-train-0-17-5``, is preset, split, seed, world, and place in the world; it stays the same
    whatever ``hops`` keeps.

    Metadata of a question: ``type`` ("bridge", "comparison" or "yes_no"), ``hops``, ``level`` (the preset), ``split``, ``supporting_titles``,
    ``supporting_ids``, and ``chain``: the searches that lead to the answer, in order, each ``{"query", "title", "relation", "object"}`` (what to
    search for, whose page it is, what to read there, as it is written there). On the winner's page of a comparison there is a second thing to
    read: ``"also": {"relation", "object"}``.

    No answer leaks: no golden answer of a bridge or comparison question is in the question. A comparison names two candidates and asks for
    something of the winner, never for the winner. Answers to yes/no questions are yes for exactly half, and each form is asked once with
    either answer.

    Parameters
    ----------
    split : {"train", "dev", "test"}
    preset : str or WorldPreset
        ``"easy"``, ``"deep"``, ``"medium"``, ``"hard"``, or a recipe of your own.
    world_seed : int
        At least 0. Different seeds give different worlds.
    num_worlds : int or None
        Default: 100,000 for train, 64 for dev and test.
    hops : int, sequence of int, str such as ``"1,2"``, or None
        Keep only questions with these numbers of hops.
    style : {"short", "natural"} or None
        Wording of pages and questions; default: the preset's.
    entities : int or None
        Entities in a world, 100 to 100,000; default: the preset's.

    Raises
    ------
    ConfigurationError
        An argument is out of its range.
    """

    name = "world"

    def __init__(
        self,
        split: str = "train",
        preset: str | WorldPreset = "easy",
        world_seed: int = 0,
        num_worlds: int | None = None,
        hops: int | Sequence[int] | str | None = None,
        style: str | None = None,
        entities: int | None = None,
    ) -> None:
        check_split(split)
        self.preset = get_preset(preset, style, entities)
        if isinstance(world_seed, bool) or not isinstance(world_seed, int) or world_seed < 0:
            raise ConfigurationError(f"world_seed must be a whole number of at least 0; got {world_seed!r}.")
        if num_worlds is None:
            num_worlds = DEFAULT_NUM_WORLDS[split]
        if isinstance(num_worlds, bool) or not isinstance(num_worlds, int) or num_worlds < 1:
            raise ConfigurationError(f"num_worlds must be a whole number of at least 1; got {num_worlds!r}.")
        self.split = split
        self.world_seed = world_seed
        self.num_worlds = num_worlds
        self.hops = _parse_hops(hops, self.preset)
        self.top_k = self.preset.top_k
        self._slots = [slot.number for slot in question_slots(self.preset) if slot.hops in self.hops]
        self._place_of_slot = {slot: place for place, slot in enumerate(self._slots)}
        self._id = re.compile(re.escape(f"{self.preset.name}-{split}-{world_seed}-") + r"(0|[1-9][0-9]*)-(0|[1-9][0-9]*)", re.ASCII)
        self.worlds_in_memory = max(2, min(_MAX_WORLDS_IN_MEMORY, _ENTITIES_IN_MEMORY // self.preset.entities))
        self._worlds = _Recent(self._make_world, self.worlds_in_memory)

    def __len__(self) -> int:
        return self.num_worlds * len(self._slots)

    def __getitem__(self, index: int) -> Question:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}, the number of questions; got {index}.")
        number, place = divmod(index % len(self), len(self._slots))
        return self._worlds[number].questions[self._slots[place]]

    def index_of(self, question_id: str) -> int:
        """Index of a question; raises ``UnknownQuestionError``."""
        match = self._id.fullmatch(question_id) if isinstance(question_id, str) else None
        if match is not None and len(match[1]) <= 18 and len(match[2]) <= 18:
            number, slot = int(match[1]), int(match[2])
            if number < self.num_worlds and slot in self._place_of_slot:
                return number * len(self._slots) + self._place_of_slot[slot]
        example = f"{self.preset.name}-{self.split}-{self.world_seed}-{self.num_worlds - 1}-{self._slots[-1]}"
        raise UnknownQuestionError(
            f"{question_id!r} is no question of this source ({self.num_worlds} worlds, hops {list(self.hops)}); its last one is {example!r}."
        )

    def world(self, number: int) -> World:
        """One world, made where it is not in memory."""
        if not 0 <= number < self.num_worlds:
            raise IndexError(f"a world's number must be below {self.num_worlds}; got {number}.")
        return self._worlds[number]

    def filters(self, question: Question) -> Mapping[str, str]:
        """The world in which to search."""
        return {"world": question.id.rsplit("-", 2)[1]}

    def build_retriever(self, config: Mapping[str, Any]) -> Retriever:
        """The retriever ``{"name": ..., **settings}`` over the pages of the world that a request's ``filters`` name.

        One that asks somebody else, such as ``{"name": "http"}``, is made once for all worlds and told which of them; see :class:`WorldsElsewhere`.
        A recording is asked as it was made: with the filters of the environment.
        """
        from searchqa_retrievers.build import build_retriever, has_back_end, searches_corpus, split_options, with_options

        if config.get("name") == "replay":
            return build_retriever({**config, "stamp": self._recorded_stamps(config.get("stamp"))}, _no_corpus)
        settings, common = split_options(config)
        retriever: Retriever
        if searches_corpus(settings):
            retriever = WorldRetriever(self, settings)
        else:
            retriever = WorldsElsewhere(self, build_retriever({**settings, "cache_entries": 0}, _no_corpus))
        return with_options(retriever, common, counted=has_back_end(settings))

    def _recorded_stamps(self, asked: Any) -> Any:
        """What tells the searches of this source from others of the same recording, as a run records the worlds of its evaluations too."""
        if not (asked is None or isinstance(asked, Mapping)):
            return asked
        here, elsewhere = {"corpus_sha256": self.stamp()["corpus_sha256"]}, {"worlds": _scope(self)}
        return [{**own, **(asked or {})} for own in (here, elsewhere)]

    def stamp(self) -> dict[str, Any]:
        """What decides the questions and pages; ``corpus_sha256`` hashes these settings, from which all pages follow."""
        settings = {
            "dataset": self.name,
            "revision": f"generator-{GENERATOR_VERSION}",
            "split": self.split,
            "preset": self.preset.name,
            "world_seed": self.world_seed,
            "num_worlds": self.num_worlds,
            "style": self.preset.style,
            "entities": self.preset.entities,
        }
        digest = hashlib.sha256(json.dumps([settings, asdict(self.preset)], sort_keys=True).encode()).hexdigest()
        return {**settings, "hops": list(self.hops), "corpus_sha256": digest}

    def _make_world(self, number: int) -> World:
        return World(self.preset, self.split, self.world_seed, number)

    def _arguments(self) -> tuple[Any, ...]:
        return (self.split, self.preset, self.world_seed, self.num_worlds, self.hops)

    def __deepcopy__(self, memo: dict[int, Any]) -> WorldSource:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return WorldSource, self._arguments()

    def __repr__(self) -> str:
        return (
            f"WorldSource(split={self.split!r}, preset={self.preset.name!r}, world_seed={self.world_seed}, num_worlds={self.num_worlds}, "
            f"hops={list(self.hops)}, style={self.preset.style!r}, entities={self.preset.entities})"
        )


class WorldRetriever:
    """A search engine for each world, made when it is first asked; ``filters={"world": "17"}`` of a request says which.

    A request that comes from another process names its world in full, as :class:`WorldsElsewhere` does; it may then be of any split, and any number.

    Parts of a composition that ask somebody else, such as a simulator, are made once for all worlds. Engines that follow the progress of training
    are told it before they search.

    Parameters
    ----------
    source : WorldSource
    config : mapping
        As for ``searchqa_retrievers.build_retriever``: ``{"name": "bm25", "k1": 1.5}``, ``{"name": "random"}``, ``{"name": "none"}``;
        without ``cache_entries``.

    Raises
    ------
    RetrieverError
        The name or a setting is unknown; when searching: a request does not name a world of the source, or one of other settings.
    """

    def __init__(self, source: WorldSource, config: Mapping[str, Any]) -> None:
        from searchqa_retrievers.build import build_retriever
        from searchqa_retrievers.corpus import Corpus

        self.source = source
        self.config = {**config, "cache_entries": 0}
        self._shared: list[Retriever] = []
        parts = {key: self._with_shared(value) for key, value in self.config.items()}

        def make(world_source: WorldSource, number: int) -> _Engine:
            return _Engine(build_retriever(parts, Corpus.from_passages(world_source.world(number).passages)))

        empty: Any = build_retriever(parts, Corpus.from_passages([]))  # a mistake in the settings shows here, not at the first search
        self.name: str = empty.name
        self.needs_gold: bool = getattr(empty, "needs_gold", False)
        self.follows_progress = follows_progress(empty)
        self._empty = empty
        self._progress = (0, 0)
        self._settings: dict[str, Any] = _without_corpus(empty.stamp())
        self._make = make
        self._engines = self._recent(source)
        self._recipe = _recipe(source)
        self._splits: dict[str, _Recent[_Engine]] = {}
        self._counts = hasattr(empty, "counters")
        self._counted = merged_counters(empty)
        begin_in_forks(self)

    def begin_process(self) -> None:
        """A lock is that of one process."""
        self._lock = threading.Lock()

    def _recent(self, source: WorldSource) -> _Recent[_Engine]:
        return _Recent(partial(self._make, source), source.worlds_in_memory)

    def _with_shared(self, value: Any) -> Any:
        """A setting, with what in it asks somebody else made already, for all worlds."""
        from searchqa_retrievers.build import build_retriever, searches_corpus

        if isinstance(value, Retriever) or (isinstance(value, Mapping) and not searches_corpus(value)):
            self._shared.append(build_retriever(value, _no_corpus, cache_entries=0))
            return _Shared(self._shared[-1])
        if isinstance(value, Mapping):
            return {key: self._with_shared(one) for key, one in value.items()}
        return [self._with_shared(one) for one in value] if isinstance(value, list | tuple) else value

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        """Answer all requests, those about one world together."""
        by_world: dict[tuple[str | None, int], list[int]] = {}
        for position, request in enumerate(requests):
            by_world.setdefault(self._world_of(request), []).append(position)
        answers: list[list[Hit]] = [[] for _ in requests]
        for (split, world), positions in by_world.items():
            engine = (self._engines if split is None else self._engines_of(split))[world]
            if engine.progress != self._progress:
                engine.follow(self._progress)
            try:
                found = engine.retriever.search([replace(requests[position], filters=None) for position in positions])
            finally:
                if self._counts:
                    self._count(engine)
            for position, hits in zip(positions, found, strict=True):
                answers[position] = hits
        return answers

    def set_progress(self, step: int, total: int) -> None:
        """Pass the progress of training on to the engines of all worlds, those still to be made included; only where they follow it."""
        if self.follows_progress:
            self._empty.set_progress(step, total)  # raises here, and not in the middle of an episode
            self._progress = (step, total)

    def counters(self) -> dict[str, float]:
        """The sums of what the engines counted, those of worlds that are no longer kept included; nothing where they count nothing."""
        with self._lock:
            return added_counters(self._counted, merged_counters(*self._shared)) if self._counts else {}

    def close(self) -> None:
        """Close what asks somebody else."""
        for retriever in self._shared:
            close = getattr(retriever, "close", None)
            if close is not None:
                close()

    def _count(self, engine: _Engine) -> None:
        """Add what an engine has counted since it was last asked."""
        with self._lock:
            now = merged_counters(engine.retriever)
            self._counted = added_counters(self._counted, counted_since(now, engine.counted))
            engine.counted = now

    def _world_of(self, request: SearchRequest) -> tuple[str | None, int]:
        """Split and number of the world; no split: the source's."""
        filters = request.filters or {}
        world = filters.get("world", "")
        if set(filters) not in ({"world"}, {"world", "split", "recipe"}) or not (world.isascii() and world.isdigit() and len(world) <= 18):
            raise RetrieverError(
                f'a search among generated worlds must say in which: filters={{"world": "17"}}, as WorldSource.filters(question) gives; '
                f"got filters={request.filters!r}"
            )
        if "split" in filters:
            if filters["recipe"] != self._recipe or filters["split"] not in SPLITS:
                raise RetrieverError(
                    f"the worlds here are {self.source!r} of generator {GENERATOR_VERSION}, in any split of {list(SPLITS)}; the search is about "
                    f"worlds of the split {filters['split']!r} that are made with other settings. Give both sides the same preset, world_seed, "
                    "style and entities, and the same version of this package"
                )
            return filters["split"], int(world)
        if int(world) >= self.source.num_worlds:
            raise RetrieverError(
                f"there are {self.source.num_worlds} worlds, so the last is {self.source.num_worlds - 1}; got world {world}"
            )
        return None, int(world)

    def _engines_of(self, split: str) -> _Recent[_Engine]:
        """The engines of a split that requests name in full: as many worlds as anybody may ask for."""
        if split not in self._splits:
            source = WorldSource(split, self.source.preset, self.source.world_seed, num_worlds=_MANY)
            self._splits.setdefault(split, self._recent(source))
        return self._splits[split]

    def cache_key(self, request: SearchRequest) -> Hashable:
        key: Hashable = self._empty.cache_key(request)
        return key

    def stamp(self) -> dict[str, Any]:
        """The settings that a result depends on; the pages are in the source's stamp."""
        return {**self._settings, "corpus_sha256": self.source.stamp()["corpus_sha256"], "passages": self.source.preset.entities}

    def __deepcopy__(self, memo: dict[int, Any]) -> WorldRetriever:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.source, self.config, self._progress)

    def __repr__(self) -> str:
        return f"WorldRetriever({self.source!r}, {self.config!r})"


def _again(source: WorldSource, config: Mapping[str, Any], progress: tuple[int, int]) -> WorldRetriever:
    """A pickled one."""
    retriever = WorldRetriever(source, config)
    retriever.set_progress(*progress)
    return retriever


class _Engine:
    """The search engine of one world, with the progress that it was told, and what it had counted when it was last read."""

    def __init__(self, retriever: Retriever) -> None:
        self.retriever = retriever
        self.progress = (0, 0)
        self.counted: dict[str, float] = {}

    def follow(self, progress: tuple[int, int]) -> None:
        follower: Any = self.retriever
        follower.set_progress(*progress)
        self.progress = progress


class _Shared(Wrapped):
    """A part of several engines; it counts nothing, as otherwise the counts of each engine would have those of the others in them."""

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        return self.retriever.search(requests)


class WorldsElsewhere(Composition):
    """One retriever for all worlds of a source, such as the client of ``searchqa serve env=world``.

    It adds to the ``filters`` of a request the source's split and a hash of what the pages of its worlds follow from, so that a server with worlds
    of other settings refuses the search, where it would otherwise answer from pages that have nothing to do with the question.

    Parameters
    ----------
    source : WorldSource
    retriever : Retriever
        One that takes ``filters``.
    """

    def __init__(self, source: WorldSource, retriever: Retriever) -> None:
        super().__init__([retriever])
        self.source = source
        self.retriever = retriever
        self.name: str = getattr(retriever, "name", type(retriever).__name__)
        self._scope = _scope(source)

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        return self.retriever.search([replace(request, filters={**(request.filters or {}), **self._scope}) for request in requests])

    def cache_key(self, request: SearchRequest) -> Hashable:
        return self.retriever.cache_key(request)

    def stamp(self) -> dict[str, Any]:
        """The stamp of the inner retriever, and which worlds it is asked about."""
        return {**stamp_of(self.retriever), "worlds": dict(self._scope)}

    @property
    def billed_calls(self) -> int:
        """Those of the inner retriever; an ``AttributeError`` where it has none."""
        billed: int = self.retriever.billed_calls  # type: ignore[attr-defined] # optional, see Retriever
        return billed

    def __repr__(self) -> str:
        return f"WorldsElsewhere({self.source!r}, {self.retriever!r})"


def _scope(source: WorldSource) -> dict[str, str]:
    """What tells the worlds of a source from all others."""
    return {"split": source.split, "recipe": _recipe(source)}


def _recipe(source: WorldSource) -> str:
    """Hash of what, beside the split and the number, the pages of a world follow from."""
    settings = [GENERATOR_VERSION, source.world_seed, asdict(source.preset)]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _without_corpus(stamp: Any) -> Any:
    """A stamp, those of inner retrievers included, without the corpus, which is another one in each world."""
    if isinstance(stamp, Mapping):
        return {key: _without_corpus(value) for key, value in stamp.items() if key not in ("corpus_sha256", "passages")}
    return [_without_corpus(value) for value in stamp] if isinstance(stamp, list) else stamp


def _no_corpus() -> NoReturn:
    raise RetrieverError("generated worlds have a corpus each; a retriever for all of them cannot be made over one")


def _parse_hops(hops: int | Sequence[int] | str | None, preset: WorldPreset) -> tuple[int, ...]:
    """The numbers of hops to keep, ascending."""
    there = sorted({hops for _, hops, _ in preset.questions})
    if hops is None:
        return tuple(there)
    wanted: list[Any]
    if isinstance(hops, str):
        wanted = [int(part) if part.strip().isdecimal() else part for part in hops.split(",")]
    elif isinstance(hops, Sequence):
        wanted = list(hops)
    else:
        wanted = [hops]
    if not wanted or any(isinstance(number, bool) or not isinstance(number, int) or number not in there for number in wanted):
        raise ConfigurationError(
            f"hops must be one or several of {there}, the numbers of hops of preset {preset.name!r} (as 2, [1, 2] or '1,2'); got {hops!r}."
        )
    return tuple(sorted(set(wanted)))
