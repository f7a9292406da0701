"""One generated world: its facts, pages and questions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from searchqa_envs.errors import ConfigurationError
from searchqa_envs.questions import Question
from searchqa_envs.world.names import SPLITS, Draws, draw_names
from searchqa_envs.world.schema import (
    ALIAS_OPENINGS,
    COMPARED,
    DISTRACTOR,
    NUMBER,
    OPENINGS,
    PERSON_COMPARED,
    PLURALS,
    RELATIONS,
    Kind,
    Relation,
    WorldPreset,
)
from searchqa_retrievers.types import Passage

GENERATOR_VERSION = 1
"""Raised whenever some seed gives other pages or questions than before."""

_ATTEMPTS = 5_000
Path = tuple[Relation, ...]


@dataclass(frozen=True, slots=True)
class Draft:
    """A question before it has its place. ``subjects`` are the entities whose pages are needed."""

    key: Any
    text: str
    answers: tuple[str, ...]
    chain: list[dict[str, Any]]
    subjects: list[int]


@dataclass(frozen=True, slots=True)
class Slot:
    """A place among the questions of every world, and what kind of question stands there."""

    number: int
    kind: Kind
    hops: int


@lru_cache(maxsize=64)
def question_slots(preset: WorldPreset) -> tuple[Slot, ...]:
    """The slots of a preset. Kinds and hops are spread evenly, so that the first questions of a world are a fair sample of all."""
    places = [
        ((position + 0.5) / number, group, kind, hops)
        for group, (kind, hops, number) in enumerate(preset.questions)
        for position in range(number)
    ]
    return tuple(Slot(number, kind, hops) for number, (_, _, kind, hops) in enumerate(sorted(places)))


@lru_cache(maxsize=256)
def _paths(preset: WorldPreset, length: int, start: str | None = None) -> tuple[Path, ...]:
    """All ways from kind to kind of ``length`` relations; a number can only be the last object; distractors are on none."""
    relations = [RELATIONS[key] for key in preset.relations if RELATIONS[key].subject != DISTRACTOR and RELATIONS[key].object != DISTRACTOR]
    if length == 0:
        return ((),)
    return tuple(
        (relation, *rest)
        for relation in relations
        if start in (None, relation.subject) and (length == 1 or relation.object != NUMBER)
        for rest in _paths(preset, length - 1, relation.object)
    )


@lru_cache(maxsize=256)
def _pairs_to(preset: WorldPreset, length: int) -> dict[str, tuple[Path, ...]]:
    """Paths of a length by the kind of their last object, without those whose last object belongs to one subject alone."""
    by_kind: dict[str, list[Path]] = {}
    for path in _paths(preset, length):
        if path[-1].object != NUMBER and path[-1].key not in ("person.spouse", "country.capital"):
            by_kind.setdefault(path[-1].object, []).append(path)
    return {kind: tuple(paths) for kind, paths in by_kind.items()}


class World:
    """Entities, facts, pages and questions of one world, the same for equal arguments on every machine.

    Attributes
    ----------
    names : list of str
        The name of each entity; entities of one kind are neighbours, see ``first``.
    aliases : list of str
        The second name of each entity, or ``""``.
    facts : dict
        For each relation's key the objects of its subjects in order: entity numbers, or plain numbers.
    first : dict
        The first entity of each kind.
    passages : list of Passage
        One page per entity, in the order of their ids.
    questions : list of Question
    """

    def __init__(self, preset: WorldPreset, split: str, world_seed: int, index: int) -> None:
        self.preset = preset
        self.split = split
        self.prefix = f"{preset.name}-{split}-{world_seed}-{index}"
        self._draws = Draws(world_seed, SPLITS.index(split), index, GENERATOR_VERSION)
        self._counts = dict(preset.counts)
        self._make_entities()
        self.facts = self._make_facts()
        total = len(self.names)
        self._relations = {kind: preset.relations_of(kind) for kind, _ in preset.counts}
        self._wording: list[int] = (self._draws.raw(total) >> np.uint64(8)).tolist()
        page_order = self._draws.order(total)
        self._place: list[int] = np.argsort(page_order, kind="stable").tolist()
        self._inverse: dict[str, dict[int, list[int]]] = {}
        self._pages: list[Passage] | None = None
        self._page_order: list[int] = page_order.tolist()
        self.questions = self._make_questions()

    # facts

    def _make_entities(self) -> None:
        self.first: dict[str, int] = {}
        self.kinds: list[str] = []
        for kind, count in self.preset.counts:
            self.first[kind] = len(self.kinds)
            self.kinds += [kind] * count
        total = len(self.kinds)
        aliased = sorted(self._draws.order(total)[: round(self.preset.aliases * total)].tolist()) if self.preset.aliases else []
        names = draw_names(self._draws, total + len(aliased), self.split)
        self.names = names[:total]
        self.aliases = [""] * total
        for entity, alias in zip(aliased, names[total:], strict=True):
            self.aliases[entity] = alias

    def _make_facts(self) -> dict[str, list[int]]:
        counts, draws = self._counts, self._draws
        facts: dict[str, list[int]] = {}
        on_page: dict[tuple[str, str], list[Any]] = {}
        capitals = "country.capital" in self.preset.relations
        for key in self.preset.relations:
            relation = RELATIONS[key]
            size, choices = counts[relation.subject], counts.get(relation.object, 0)
            if relation.object == NUMBER:
                facts[key] = (1000 + draws.below(9000 if relation.word == "population" else 1000, size)).tolist()
                continue
            if key == "person.spouse":
                order = draws.order(size)
                objects = np.empty(size, dtype=np.int64)
                objects[order[0::2]], objects[order[1::2]] = order[1::2], order[0::2]
            elif key == "country.capital":
                objects = np.arange(size, dtype=np.int64)  # the first cities are the capitals of the countries in turn
            else:
                objects = draws.below(choices, size)
                if key == "city.country" and capitals:
                    objects[:choices] = np.arange(choices)
            others = on_page.setdefault((relation.subject, relation.object), [])
            # The objects on one page are distinct: two mentions would let it outrank the page of what it mentions.
            while others and (clash := np.any([objects == other for other in others], axis=0)).any():
                objects[clash] = draws.below(choices, int(clash.sum()))
            others.append(objects)
            facts[key] = (objects + self.first[relation.object]).tolist()
        return facts

    def value(self, relation: Relation, subject: int) -> int:
        """The object of a fact: an entity, or a number."""
        return self.facts[relation.key][subject - self.first[relation.subject]]

    # texts

    @property
    def passages(self) -> list[Passage]:
        """One page per entity; made when first asked for."""
        if self._pages is None:
            self._pages = [self._page(entity) for entity in self._page_order]
        return self._pages

    def page_id(self, entity: int) -> str:
        """The id of an entity's page."""
        return f"{self.prefix}-p{self._place[entity]:05d}"

    def written(self, relation: Relation, subject: int) -> str:
        """The object of a fact as the subject's page has it: a name, an alias, or digits."""
        value = self.value(relation, subject)
        if relation.object == NUMBER:
            return str(value)
        alias = self.aliases[value]
        return alias if alias and (self._wording[subject] ^ value) & 1 else self.names[value]

    def _page(self, entity: int) -> Passage:
        name, alias, kind = self.names[entity], self.aliases[entity], self.kinds[entity]
        natural = self.preset.style == "natural"
        wording = self._wording[entity] >> 1
        if natural:
            openings = ALIAS_OPENINGS if alias else OPENINGS
            sentences = [openings[wording % len(openings)].format(s=name, a=alias, type=kind)]
        else:
            sentences = [f"{name} also {alias} is a {kind} ." if alias else f"{name} is a {kind} ."]
        for position, relation in enumerate(self._relations[kind]):
            written = self.written(relation, entity)
            # Name and alias take turns, so that for either the page itself comes first in a search.
            subject = alias if alias and position % 2 == 0 else name
            if natural:
                wording //= 3
                sentences.append(relation.sentences[wording % len(relation.sentences)].format(s=subject, o=written))
            elif alias:
                sentences.append(f"{subject} {relation.word} {written} .")
            else:
                sentences.append(f"{relation.word} {written} .")
        return Passage(self.page_id(entity), name, " ".join(sentences))

    def _mention(self, entity: int) -> str:
        """An entity as a question calls it."""
        alias = self.aliases[entity]
        return alias if alias and self._draws.one(2) else self.names[entity]

    # questions

    def _make_questions(self) -> list[Question]:
        slots = question_slots(self.preset)
        drawn: dict[int, Question] = {}
        seen: set[Any] = set()
        makers = {"bridge": self._bridge, "comparison": self._comparison, "yes_no": self._yes_no}
        for kind, hops, number in self.preset.questions:
            waiting = [slot.number for slot in slots if (slot.kind, slot.hops) == (kind, hops)]
            for _ in range(_ATTEMPTS):
                drafts = makers[kind](hops)
                if drafts and not any(draft.key in seen for draft in drafts):
                    for draft in drafts:
                        seen.add(draft.key)
                        slot = waiting.pop(0)
                        drawn[slot] = self._question(slot, kind, hops, draft)
                if not waiting:
                    break
            else:
                raise ConfigurationError(
                    f"a world of preset {self.preset.name!r} with {self.preset.entities} entities has too few {kind} questions of {hops} hops; "
                    f"ask for fewer than {number}, or for more entities or relations."
                )
        return [drawn[slot.number] for slot in slots]

    def _question(self, slot: int, kind: Kind, hops: int, draft: Draft) -> Question:
        metadata = {
            "type": kind,
            "level": self.preset.name,
            "split": self.split,
            "hops": hops,
            "chain": draft.chain,
            "supporting_titles": [self.names[entity] for entity in draft.subjects],
            "supporting_ids": [self.page_id(entity) for entity in draft.subjects],
        }
        return Question(f"{self.prefix}-{slot}", draft.text, draft.answers, metadata)

    def _bridge(self, hops: int) -> list[Draft]:
        paths = _paths(self.preset, hops)
        if not paths:
            return []
        path = paths[self._draws.one(len(paths))]
        start = self._any(path[0].subject)
        walk = self._walk(path, start)
        if walk is None:
            return []
        mention = self._mention(start)
        if self.preset.style == "short":
            text = f"what is {_possessive(mention, path)} ?"
        else:
            text = self._ask(path, self._introduced(start, mention))
        key = (start, *(relation.key for relation in path))
        return [Draft(key, text, self._answers(path, walk), self._chain(path, walk, mention), walk[: len(path)])]

    def _comparison(self, hops: int) -> list[Draft]:
        compared = [
            RELATIONS[key] for key in self.preset.relations if RELATIONS[key].word in COMPARED and RELATIONS[key].subject != DISTRACTOR
        ]
        if not compared:
            return []
        relation = compared[self._draws.one(len(compared))]
        paths = [path for path in _paths(self.preset, hops - 1, relation.subject) if path[0] is not relation]
        if not paths:
            return []
        path = paths[self._draws.one(len(paths))]
        pair = (self._any(relation.subject), self._any(relation.subject))
        lower, higher = sorted(pair, key=lambda entity: self.value(relation, entity))
        if self.value(relation, lower) == self.value(relation, higher):
            return []
        want_higher = self._draws.one(2)
        winner, loser = (higher, lower) if want_higher else (lower, higher)
        walk = self._walk(path, winner)
        if walk is None or loser in walk:
            return []
        mentions = {entity: self._mention(entity) for entity in pair}
        adjective = (PERSON_COMPARED if relation.subject == "person" else COMPARED[relation.word])[want_higher]
        named = " and ".join(mentions[entity] for entity in pair)
        if self.preset.style == "short":
            text = f"of {named} , what is {_possessive(f'the {adjective} one', path)} ?"
        else:
            text = self._ask(path, f"the {adjective} of the {PLURALS[relation.subject]} {named}", plain=False)
        chain = [self._read(relation, entity, mentions[entity]) for entity in pair]
        first, *rest = self._chain(path, walk, mentions[winner])
        chain[pair.index(winner)]["also"] = {"relation": first["relation"], "object": first["object"]}
        key = (frozenset(pair), relation.key, want_higher, *(step.key for step in path))
        return [Draft(key, text, self._answers(path, walk), chain + rest, [*pair, *walk[1 : len(path)]])]

    def _yes_no(self, hops: int) -> list[Draft]:
        """One question to be answered with yes, and one of the same form with no, so that the form tells nothing."""
        left_length = 1 + self._draws.one(hops - 1)
        left_paths = [path for paths in _pairs_to(self.preset, left_length).values() for path in paths]
        if not left_paths:
            return []
        left = left_paths[self._draws.one(len(left_paths))]
        right_paths = _pairs_to(self.preset, hops - left_length).get(left[-1].object, ())
        if not right_paths:
            return []
        right = right_paths[self._draws.one(len(right_paths))]
        drafts = []
        for same in (True, False):
            for _ in range(20):
                draft = self._same(left, right, same)
                if draft is not None:
                    drafts.append(draft)
                    break
        return drafts if len(drafts) == 2 else []

    def _same(self, left: Path, right: Path, same: bool) -> Draft | None:
        left_start = self._any(left[0].subject)
        left_walk = self._walk(left, left_start)
        if left_walk is None:
            return None
        right_start = self._origin(right, left_walk[-1]) if same else self._any(right[0].subject)
        right_walk = None if right_start is None else self._walk(right, right_start)
        if right_start is None or right_walk is None:
            return None
        subjects = left_walk[:-1] + right_walk[:-1]
        values = (left_walk[-1], right_walk[-1])
        if len(set(subjects)) < len(subjects) or set(values) & set(subjects) or (values[0] == values[1]) != same:
            return None
        left_mention, right_mention = self._mention(left_start), self._mention(right_start)
        chain = self._chain(left, left_walk, left_mention) + self._chain(right, right_walk, right_mention)
        if same and chain[len(left) - 1]["object"] != chain[-1]["object"]:
            return None  # one page has the name, the other the alias: not to be told from these pages alone
        if self.preset.style == "short":
            text = f"is {_possessive(left_mention, left)} the same as {_possessive(right_mention, right)} ?"
        else:
            x, y = self._introduced(left_start, left_mention), self._introduced(right_start, right_mention)
            text = self._ask_same(left, right, x, y)
        key = frozenset(((left_start, *(r.key for r in left)), (right_start, *(r.key for r in right))))
        return Draft(key, text, ("yes" if same else "no",), chain, subjects)

    # walking

    def _any(self, kind: str) -> int:
        return self.first[kind] + self._draws.one(self._counts[kind])

    def _walk(self, path: Path, start: int) -> list[int] | None:
        """The entities on the way and the last object; None where an entity comes twice."""
        walk = [start]
        for relation in path:
            value = self.value(relation, walk[-1])
            if relation.object != NUMBER and value in walk:
                return None
            walk.append(value)
        return walk

    def _origin(self, path: Path, value: int) -> int | None:
        """Some entity from which ``path`` leads to ``value``; None where there is none."""
        for relation in reversed(path):
            if relation.key not in self._inverse:
                inverse: dict[int, list[int]] = {}
                for subject, found in enumerate(self.facts[relation.key], start=self.first[relation.subject]):
                    inverse.setdefault(found, []).append(subject)
                self._inverse[relation.key] = inverse
            subjects = self._inverse[relation.key].get(value)
            if subjects is None:
                return None
            value = subjects[self._draws.one(len(subjects))]
        return value

    def _chain(self, path: Path, walk: list[int], mention: str) -> list[dict[str, Any]]:
        chain = []
        for relation, subject in zip(path, walk, strict=False):
            chain.append(self._read(relation, subject, mention))
            mention = chain[-1]["object"]
        return chain

    def _read(self, relation: Relation, subject: int, mention: str) -> dict[str, Any]:
        return {"query": mention, "title": self.names[subject], "relation": relation.word, "object": self.written(relation, subject)}

    def _answers(self, path: Path, walk: list[int]) -> tuple[str, ...]:
        """What the last page says, first; then the other name of the same entity."""
        written = self.written(path[-1], walk[-2])
        if path[-1].object == NUMBER:
            return (written,)
        return (written, *(name for name in (self.names[walk[-1]], self.aliases[walk[-1]]) if name and name != written))

    # wording

    def _introduced(self, entity: int, mention: str) -> str:
        return f"the {self.kinds[entity]} {mention}" if self._draws.one(2) else mention

    def _phrase(self, path: Path, x: str, plain: bool = True) -> str:
        """``the birthplace of Mako's director``; a possessive only on a plain name, where it has one meaning."""
        for position, relation in enumerate(path):
            if position == 0 and plain and self._draws.one(2):
                x = f"{x}'s {relation.word}"
            else:
                x = f"the {relation.word} of {x}"
        return x

    def _ask(self, path: Path, x: str, plain: bool = True) -> str:
        asks = path[-1].asks
        return asks[self._draws.one(len(asks))].format(x=self._phrase(path[:-1], x, plain))

    def _ask_same(self, left: Path, right: Path, x: str, y: str) -> str:
        last = left[-1]
        if last is right[-1] and last.same and self._draws.one(2):
            return last.same[self._draws.one(len(last.same))].format(x=self._phrase(left[:-1], x), y=self._phrase(right[:-1], y))
        return f"Is {self._phrase(left, x)} the same as {self._phrase(right, y)}?"


def _possessive(x: str, path: Path) -> str:
    return " 's ".join([x, *(relation.word for relation in path)])
