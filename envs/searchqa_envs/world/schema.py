"""What there is in a generated world: kinds of entities, their relations, how sentences and questions are worded, and the presets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from searchqa_envs.errors import ConfigurationError
from searchqa_envs.world.names import SPLITS

Style = Literal["short", "natural"]
Kind = Literal["bridge", "comparison", "yes_no"]
STYLES: tuple[Style, ...] = ("short", "natural")
KINDS: tuple[Kind, ...] = ("bridge", "comparison", "yes_no")
NUMBER = "number"


@dataclass(frozen=True, slots=True)
class Relation:
    """One relation of one kind of entity, and its wordings.

    ``sentences`` have ``{s}`` (the page's entity) and ``{o}`` (the object), ``asks`` have ``{x}``; ``same`` asks whether ``{x}`` and ``{y}``
    have one object. ``key`` is ``"film.director"``.
    """

    subject: str
    word: str
    object: str
    sentences: tuple[str, ...]
    asks: tuple[str, ...]
    same: tuple[str, ...] = ()
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.subject}.{self.word}")


_RELATIONS = (
    Relation(
        "film", "director", "person", ("{s} was directed by {o}.", "The director of {s} is {o}."),
        ("Who directed {x}?", "Who is the director of {x}?"), ("Were {x} and {y} directed by the same person?",),
    ),
    Relation(
        "film", "star", "person", ("{s} stars {o}.", "The star of {s} is {o}."),
        ("Who stars in {x}?", "Who is the star of {x}?"), ("Do {x} and {y} have the same star?",),
    ),
    Relation("film", "year", NUMBER, ("{s} came out in {o}.", "The year of {s} is {o}."), ("In what year did {x} come out?",)),
    Relation(
        "person", "birthplace", "city", ("{s} was born in {o}.", "The birthplace of {s} is {o}."),
        ("Where was {x} born?", "In which city was {x} born?"), ("Were {x} and {y} born in the same city?",),
    ),
    Relation(
        "person", "spouse", "person", ("{s} is married to {o}.", "The spouse of {s} is {o}."),
        ("Who is married to {x}?", "Who is the spouse of {x}?"),
    ),
    Relation(
        "person", "employer", "company", ("{s} works for {o}.", "The employer of {s} is {o}."),
        ("Which company does {x} work for?", "What is the employer of {x}?"), ("Do {x} and {y} work for the same company?",),
    ),
    Relation("person", "year", NUMBER, ("{s} was born in the year {o}.",), ("In what year was {x} born?",)),
    Relation(
        "city", "country", "country", ("{s} lies in {o}.", "The country of {s} is {o}."),
        ("In which country does {x} lie?", "What is the country of {x}?"), ("Do {x} and {y} lie in the same country?",),
    ),
    Relation("city", "mayor", "person", ("{s} is led by {o}.", "The mayor of {s} is {o}."), ("Who is the mayor of {x}?",)),
    Relation("city", "population", NUMBER, ("{s} has {o} inhabitants.", "The population of {s} is {o}."), ("What is the population of {x}?",)),
    Relation("country", "capital", "city", ("{s} is governed from {o}.", "The capital of {s} is {o}."), ("What is the capital of {x}?",)),
    Relation("country", "leader", "person", ("{s} is led by {o}.", "The leader of {s} is {o}."), ("Who is the leader of {x}?", "Who leads {x}?")),
    Relation(
        "company", "founder", "person", ("{s} was founded by {o}.", "The founder of {s} is {o}."),
        ("Who founded {x}?", "Who is the founder of {x}?"), ("Were {x} and {y} founded by the same person?",),
    ),
    Relation(
        "company", "seat", "city", ("{s} is based in {o}.", "The seat of {s} is {o}."),
        ("In which city is {x} based?", "What is the seat of {x}?"), ("Do {x} and {y} have the same seat?",),
    ),
    Relation("company", "year", NUMBER, ("{s} was founded in {o}.", "The year of {s} is {o}."), ("In what year was {x} founded?",)),
    Relation(
        "book", "author", "person", ("{s} was written by {o}.", "The author of {s} is {o}."),
        ("Who wrote {x}?", "Who is the author of {x}?"), ("Were {x} and {y} written by the same person?",),
    ),
    Relation(
        "book", "publisher", "company", ("{s} was published by {o}.", "The publisher of {s} is {o}."),
        ("Which company published {x}?", "What is the publisher of {x}?"), ("Do {x} and {y} have the same publisher?",),
    ),
    Relation("book", "year", NUMBER, ("{s} came out in {o}.", "The year of {s} is {o}."), ("In what year did {x} come out?",)),
    Relation(
        "festival", "host", "person", ("{s} was opened by {o}.", "The host of {s} was {o}."), ("Who was the host of {x}?",),
    ),
    Relation("festival", "guest", "person", ("{s} was visited by {o}.", "A guest of {s} was {o}."), ("Who was a guest of {x}?",)),
    Relation("festival", "film", "film", ("{s} showed {o}.", "The film of {s} was {o}."), ("What film did {x} show?",)),
)  # fmt: skip
RELATIONS: dict[str, Relation] = {relation.key: relation for relation in _RELATIONS}

DISTRACTOR = "festival"
"""The kind of page that mentions others and is never on the way to an answer."""

COMPARED = {"year": ("older", "newer"), "population": ("smaller", "larger")}
"""Relations that are compared, with the words for the lower and the higher number."""
PERSON_COMPARED = ("older", "younger")
PLURALS = {"film": "films", "person": "persons", "city": "cities", "country": "countries", "company": "companies", "book": "books"}

OPENINGS = ("{s} is a {type}.", "There is a {type} called {s}.")
ALIAS_OPENINGS = ("{s}, also known as {a}, is a {type}.", "{s} is a {type}, also called {a}.")


@dataclass(frozen=True)
class WorldPreset:
    """A recipe for worlds.

    Parameters
    ----------
    name : str
        First part of the ids of its questions.
    counts
        ``(kind of entity, how many)`` pairs.
    relations
        Keys of :data:`RELATIONS`, in the order in which a page tells them.
    questions
        ``(kind, hops, how many in a world)`` triples. Hops are searches: a comparison has two for its candidates and one for each step
        from the winner on; a yes/no question those of both its sides. Yes/no numbers are even: half of them are "yes".
    style : {"short", "natural"}
    aliases : float
        Share of entities that go by a second name.
    top_k : int
        Passages per search where the caller names no number.

    Raises
    ------
    ConfigurationError
        A field is out of its range, or names what is not there.
    """

    name: str
    counts: tuple[tuple[str, int], ...]
    relations: tuple[str, ...]
    questions: tuple[tuple[Kind, int, int], ...]
    style: Style = "short"
    aliases: float = 0.0
    top_k: int = 1

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("- \n"):
            raise ConfigurationError(
                f"the name of a world preset must not be empty or hold '-' or blanks, for it begins question ids; got {self.name!r}."
            )
        if self.style not in STYLES:
            raise ConfigurationError(f"style must be one of {list(STYLES)}; got {self.style!r}.")
        if not 0 <= self.aliases <= 1:
            raise ConfigurationError(f"aliases must be a share between 0 and 1; got {self.aliases!r}.")
        if self.top_k < 1:
            raise ConfigurationError(f"top_k must be at least 1; got {self.top_k!r}.")
        self._check_counts()
        if len({(kind, hops) for kind, hops, _ in self.questions}) < len(self.questions):
            raise ConfigurationError(f"each kind and number of hops can stand once in questions; got {self.questions}.")
        for kind, hops, number in self.questions:
            least = 1 if kind == "bridge" else 2
            if kind not in KINDS or not least <= hops <= 4 or number < 1:
                raise ConfigurationError(
                    f"questions must be (one of {list(KINDS)}, hops, number) with 1 to 4 hops (2 to 4 unless bridge); got {(kind, hops, number)!r}."
                )
            if kind == "yes_no" and number % 2:
                raise ConfigurationError(
                    f"the number of yes_no questions must be even, half of them are yes; got {number} with {hops} hops."
                )

    def _check_counts(self) -> None:
        counts = dict(self.counts)
        for key in self.relations:
            relation = RELATIONS.get(key)
            if relation is None:
                raise ConfigurationError(f"relations must be among {sorted(RELATIONS)}; got {key!r}.")
            missing = {relation.subject, relation.object} - {NUMBER, *counts}
            if missing:
                raise ConfigurationError(
                    f"relation {key!r} needs entities of the kind {sorted(missing)[0]!r}; add it to counts or drop the relation."
                )
        if any(count < 4 for count in counts.values()):
            raise ConfigurationError(f"a world needs at least 4 entities of each kind; got {counts}.")
        if "person.spouse" in self.relations and counts["person"] % 2:
            raise ConfigurationError(f"persons marry in pairs, so their number must be even; got {counts['person']}.")
        if "country.capital" in self.relations and "city.country" in self.relations and counts["city"] < counts["country"]:
            raise ConfigurationError(f"each country has its own capital, so there must be as many cities; got {counts}.")

    @property
    def entities(self) -> int:
        """Entities, and pages, in a world."""
        return sum(count for _, count in self.counts)

    @property
    def questions_per_world(self) -> int:
        """Questions in a world."""
        return sum(number for _, _, number in self.questions)

    def scaled(self, entities: int) -> WorldPreset:
        """The same recipe with ``entities`` entities in a world, in the same proportions as far as they go."""
        if not 100 <= entities <= 100_000:
            raise ConfigurationError(f"entities must be between 100 and 100,000; got {entities!r}.")
        counts = {kind: max(4, count * entities // self.entities) for kind, count in self.counts}
        counts["person"] -= counts["person"] % 2
        counts["film"] += entities - sum(counts.values())
        return replace(self, counts=tuple(counts.items()))

    def relations_of(self, subject: str) -> tuple[Relation, ...]:
        """The relations that a page of this kind tells, in order."""
        return tuple(RELATIONS[key] for key in self.relations if RELATIONS[key].subject == subject)


_SMALL = (
    "film.director",
    "film.star",
    "person.birthplace",
    "person.spouse",
    "city.country",
    "city.mayor",
    "country.capital",
    "country.leader",
)
PRESETS: dict[str, WorldPreset] = {
    preset.name: preset
    for preset in (
        WorldPreset(
            name="easy",
            counts=(("film", 24), ("person", 40), ("city", 20), ("country", 8)),
            relations=_SMALL,
            questions=(("bridge", 1, 24), ("bridge", 2, 24)),
        ),
        WorldPreset(
            name="deep",
            counts=(("film", 24), ("person", 40), ("city", 20), ("country", 8)),
            relations=_SMALL,
            questions=(("bridge", 1, 16), ("bridge", 2, 16), ("bridge", 3, 16)),
        ),
        WorldPreset(
            name="medium",
            counts=(("film", 40), ("person", 80), ("city", 40), ("country", 12), ("company", 20), ("book", 24), ("festival", 24)),
            relations=(
                *("film.director", "film.star", "film.year", "person.birthplace", "person.spouse", "person.employer", "person.year"),
                *("city.country", "city.mayor", "city.population", "country.capital", "country.leader"),
                *("company.founder", "company.seat", "book.author", "book.publisher", "book.year"),
                *("festival.host", "festival.guest", "festival.film"),
            ),
            questions=(
                *(("bridge", 1, 8), ("bridge", 2, 16), ("bridge", 3, 8)),
                *(("comparison", 2, 8), ("comparison", 3, 8), ("yes_no", 2, 8), ("yes_no", 3, 8)),
            ),
            aliases=0.25,
            top_k=2,
        ),
        WorldPreset(
            name="hard",
            counts=(("film", 80), ("person", 160), ("city", 64), ("country", 16), ("company", 40), ("book", 60), ("festival", 60)),
            relations=tuple(RELATIONS),
            questions=(
                *(("bridge", 1, 4), ("bridge", 2, 8), ("bridge", 3, 12), ("bridge", 4, 12)),
                *(("comparison", 2, 4), ("comparison", 3, 8), ("comparison", 4, 8)),
                *(("yes_no", 2, 4), ("yes_no", 3, 6), ("yes_no", 4, 6)),
            ),
            style="natural",
            aliases=0.4,
            top_k=3,
        ),
    )
}
"""``easy``: the world of the two-minute training runs. ``deep``: the same with questions of up to three hops. ``medium``: more relations, aliases,
distractor pages, every kind of question.
``hard``: natural sentences and up to four hops."""


def get_preset(preset: str | WorldPreset, style: str | None = None, entities: int | None = None) -> WorldPreset:
    """The preset of that name, or the one given, with its style or size changed where asked."""
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ConfigurationError(f"preset must be one of {sorted(PRESETS)} or a WorldPreset; got {preset!r}.")
        preset = PRESETS[preset]
    if entities is not None:
        preset = preset.scaled(entities)
    return preset if style is None else replace(preset, style=style)  # type: ignore[arg-type]  # __post_init__ checks it


def check_split(split: str) -> int:
    """The number of a split."""
    if split not in SPLITS:
        raise ConfigurationError(
            f"the world's split must be one of {list(SPLITS)}; got {split!r}. Its worlds are made as they are asked for."
        )
    return SPLITS.index(split)


def template_texts() -> Iterable[str]:
    """Every text that pages and questions are made of, for the tokenizer's vocabulary."""
    for relation in _RELATIONS:
        yield from (*relation.sentences, *relation.asks, *relation.same, relation.word, relation.subject)
    for words in (*COMPARED.values(), PERSON_COMPARED, tuple(PLURALS.values())):
        yield from words
    yield from (*OPENINGS, *ALIAS_OPENINGS)
    yield "what is the one 's of and , also : same as ? . Is What yes no"
