"""Rewards: one preset per published variant, and weighted sums of their terms.

A preset is a function of the finished episode that returns named terms. Answers come from the episode's answer action alone, never from a
prompt or an observation, so that a passage that says ``<answer>gold</answer>`` earns nothing. Tags are counted in the policy's segments; the
environment's reply to an executed search counts as one block of documents, whatever is written in it. Only terms named ``retrieval_*`` read
passages.

Papers and released code differ, so that each variant has its own preset. Code means Search-R1 at a14dc3a, R1-Searcher at 631167c and
ZeroSearch at 2d4cdca.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from typing import Any

from searchqa_envs import metrics
from searchqa_envs.dialects import Dialect, get_dialect
from searchqa_envs.episode_types import EpisodeView, Reward
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.normalise import normalise_squad

Terms = dict[str, float]


@dataclass(frozen=True, slots=True)
class Preset:
    """A published reward: its function (options are keyword-only, numbers, with the published values as defaults) and its terms' names."""

    function: Callable[..., Terms]
    terms: tuple[str, ...]

    @property
    def options(self) -> dict[str, float]:
        """The options and their defaults."""
        return dict(self.function.__kwdefaults__ or {})


PRESETS: dict[str, Preset] = {}


def _preset(*terms: str) -> Callable[[Callable[..., Terms]], Callable[..., Terms]]:
    """Register a function as the preset of its own name."""

    def register(function: Callable[..., Terms]) -> Callable[..., Terms]:
        PRESETS[function.__name__] = Preset(function, terms)
        return function

    return register


# Answers alone


@_preset("em")
def em(episode: EpisodeView, *, wrong: float = 0.0) -> Terms:
    """1 for an exact match, else ``wrong``: Search-R1's outcome reward. R1-Searcher's ablation has ``wrong=-1``."""
    return {"em": metrics.em(episode.answer or "", episode.question.golden_answers) or wrong}


@_preset("sub_em")
def sub_em(episode: EpisodeView, *, wrong: float = 0.0) -> Terms:
    """1 if a golden answer is a substring of the answer (normalised), else ``wrong``."""
    return {"sub_em": metrics.sub_em(episode.answer or "", episode.question.golden_answers) or wrong}


@_preset("cover_em")
def cover_em(episode: EpisodeView, *, wrong: float = 0.0) -> Terms:
    """1 if every token of a golden answer is in the answer, else ``wrong`` (R1-Searcher's ACC_R; its ablation has ``wrong=-1``)."""
    return {"cover_em": metrics.cover_em(episode.answer or "", episode.question.golden_answers) or wrong}


@_preset("f1")
def f1(episode: EpisodeView) -> Terms:
    """Token F1, SQuAD's normalisation, best golden answer."""
    return {"f1": metrics.f1(episode.answer or "", episode.question.golden_answers)}


@_preset("f1")
def zerosearch_f1(episode: EpisodeView) -> Terms:
    """ZeroSearch's default. No answer gives 0, where the released code raises."""
    return f1(episode)


@_preset("sub_em")
def zerosearch_em(episode: EpisodeView) -> Terms:
    """What ZeroSearch's released code calls ``em``: a substring match. The paper says exact match; that is ``em``."""
    return sub_em(episode)


# Search-R1


@_preset("em")
def search_r1_em_compat(episode: EpisodeView) -> Terms:
    """Search-R1's released ``qa_em``: exact match, and 0 unless prompt and response hold two ``<answer>...</answer>`` together.

    The rule stands for "the prompt's example and one of your own", and fails with prompts of other wording: under a prompt without any example
    it is always 0. Use ``em``. Two things are not reproduced: text of passages is not counted, and an episode without an answer of its own
    scores 0 (the published prompt has two matches by itself, so that the released code takes "Beijing" for the answer).
    """
    if _answer_blocks(episode) < 2:
        return {"em": 0.0}
    return em(episode)


@_preset("em", "structure_format", "structure_final", "retrieval_hit")
def search_r1_format(
    episode: EpisodeView, *, structure_score: float = 0.2, final_score: float = 0.1, retrieval_score: float = 0.0
) -> Terms:
    """Search-R1 v0.3's ``qa_em_format``, read from the policy's own turns; any chat template.

    ============================ =================================================
    right, structure valid       1
    right, structure invalid     1 - structure_score
    wrong, valid                 structure_score (+ retrieval_score if a golden
                                 answer is in a retrieved passage)
    wrong, invalid, an answer    final_score
    no answer                    0
    ============================ =================================================

    Valid: think, (search, documents, think)*, answer, each block closed, nothing but blanks between them. Where the dialect searches inside
    the reasoning (R1-Searcher): think with (search, documents)* inside, answer.
    """
    return _search_r1_format(episode, _structure_is_valid(episode), structure_score, final_score, retrieval_score)


@_preset("em", "structure_format", "structure_final", "retrieval_hit")
def search_r1_format_compat(
    episode: EpisodeView, *, structure_score: float = 0.2, final_score: float = 0.1, retrieval_score: float = 0.0
) -> Terms:
    """``search_r1_format`` with the released code's quirks: ChatML only, and the two-answers rule of ``search_r1_em_compat``.

    Without the literal ``<|im_start|>assistant`` in the prompt no structure is valid. The released code also calls a structure invalid
    when anything follows ``</answer>``; here nothing can, because a segment ends at its closing tag.
    """
    if _answer_blocks(episode) < 2:
        return {"em": 0.0, "structure_format": 0.0, "structure_final": 0.0, "retrieval_hit": 0.0}
    valid = "<|im_start|>assistant" in episode.prompt and _structure_is_valid(episode)
    return _search_r1_format(episode, valid, structure_score, final_score, retrieval_score)


def _search_r1_format(episode: EpisodeView, valid: bool, structure_score: float, final_score: float, retrieval_score: float) -> Terms:
    terms = {"em": 0.0, "structure_format": 0.0, "structure_final": 0.0, "retrieval_hit": 0.0}
    if episode.answer is None:
        return terms
    terms["em"] = metrics.em(episode.answer, episode.question.golden_answers)
    if terms["em"]:
        if not valid:
            terms["structure_format"] = -structure_score
    elif valid:
        terms["structure_format"] = structure_score
        if retrieval_score and _gold_was_retrieved(episode):
            terms["retrieval_hit"] = retrieval_score
    else:
        terms["structure_final"] = final_score
    return terms


def _answer_blocks(episode: EpisodeView) -> int:
    """Number of ``<answer>...</answer>`` in the prompt and the policy's segments."""
    dialect = get_dialect(episode.dialect)
    block = re.escape(dialect.answer_open) + ".*?" + re.escape(dialect.answer_close)
    return len(re.findall(block, episode.prompt + _policy_text(episode), re.DOTALL))


def _gold_was_retrieved(episode: EpisodeView) -> bool:
    """Whether a golden answer is a substring of a retrieved passage, both normalised."""
    golden = [form for form in map(normalise_squad, episode.question.golden_answers) if form]
    for turn in episode.turns:
        for passage in turn.passages:
            # __wrapped__: passages are many and long, they would push the golden answers out of the cache
            text = normalise_squad.__wrapped__(f"{passage.title}\n{passage.text}")
            if any(gold in text for gold in golden):
                return True
    return False


# R1-Searcher


@_preset("retrieval_used", "structure_format")
def r1_searcher_stage1(episode: EpisodeView, *, retrieval_score: float = 0.5, format_score: float = 0.5) -> Terms:
    """R1-Searcher's paper, stage 1: ``retrieval_score`` for at least one search, ``format_score`` for the format. Answers do not count.

    Format: reasoning closed, one answer, and each query's tags in order with its documents (see ``r1_searcher_stage2``).
    """
    return {
        "retrieval_used": retrieval_score if episode.searches else 0.0,
        "structure_format": format_score if _tags_match_searches(episode) and _one_reasoning_and_answer(episode) else 0.0,
    }


@_preset("cover_em", "retrieval_used", "structure_format")
def r1_searcher_stage1_llama(episode: EpisodeView, *, retrieval_score: float = 0.5, format_score: float = 0.5) -> Terms:
    """R1-Searcher's code, stage 1 on Llama: +1 or -1 by cover match, which the paper's stage 1 does not have, and the two scores.

    ``retrieval_used`` needs at least one search and equal counts of query and document tags; ``structure_format`` needs the reasoning
    closed once and exactly one answer.
    """
    return {
        **cover_em(episode, wrong=-1.0),
        "retrieval_used": retrieval_score if episode.searches and _tags_match_searches(episode) else 0.0,
        "structure_format": format_score if _one_reasoning_and_answer(episode) else 0.0,
    }


@_preset("f1", "structure_penalty")
def r1_searcher_stage2(episode: EpisodeView, *, penalty: float = -2.0) -> Terms:
    """R1-Searcher's paper, stage 2: F1 by its own normaliser, and ``penalty`` for a wrong format.

    The format is wrong when tags of queries and documents do not match the searches made (a forged document, an unclosed query), or when
    the reasoning is not closed or there is not exactly one answer.
    """
    return _f1_and_penalty(episode, not (_tags_match_searches(episode) and _one_reasoning_and_answer(episode)), penalty)


@_preset("f1", "structure_penalty")
def r1_searcher_stage2_llama(episode: EpisodeView, *, penalty: float = -1.0) -> Terms:
    """R1-Searcher's code, stage 2 on Llama: as the paper's with a penalty of -1, and CJK characters outside documents are wrong too."""
    wrong = not (_tags_match_searches(episode) and _one_reasoning_and_answer(episode)) or _has_cjk(episode)
    return _f1_and_penalty(episode, wrong, penalty)


@_preset("f1", "structure_penalty")
def r1_searcher_stage2_qwen(episode: EpisodeView, *, penalty: float = -2.0, max_answer_words: float = 10) -> Terms:
    """R1-Searcher's code for Qwen, which has this one stage.

    Wrong formats are those of ``r1_searcher_stage2_llama``, and: the word "Assistant" or "assistant"; tags of queries or documents inside the
    answer; an answer of more than ``max_answer_words`` words.
    """
    dialect, text, answer = get_dialect(episode.dialect), _policy_text(episode), episode.answer or ""
    wrong = (
        not (_tags_match_searches(episode) and _one_reasoning_and_answer(episode))
        or _has_cjk(episode)
        or "Assistant" in text
        or "assistant" in text
        or any(tag in answer for tag in _query_and_document_tags(dialect))
        or len(answer.split()) > max_answer_words
    )
    return _f1_and_penalty(episode, wrong, penalty)


@_preset("retrieval_used", "structure_format", "f1", "structure_penalty")
def r1_searcher(episode: EpisodeView, *, stage1_fraction: float = 0.05, penalty: float = -2.0) -> Terms:
    """The paper's two stages in one run: stage 1 until ``stage1_fraction`` of training is done, then stage 2.

    Needs ``set_progress``; where it was never called (evaluation), stage 2 counts. The terms of the other stage are 0. The authors switch by
    hand; their stage 1 has 350 of 8,498 questions, hence the default.
    """
    step, total = episode.progress
    terms = {"retrieval_used": 0.0, "structure_format": 0.0, "f1": 0.0, "structure_penalty": 0.0}
    if total and step < stage1_fraction * total:
        terms.update(r1_searcher_stage1(episode))
    else:
        terms.update(r1_searcher_stage2(episode, penalty=penalty))
    return terms


def _f1_and_penalty(episode: EpisodeView, wrong: bool, penalty: float) -> Terms:
    score = metrics.f1_r1_searcher(episode.answer or "", episode.question.golden_answers)
    return {"f1": score, "structure_penalty": penalty if wrong else 0.0}


_CJK = re.compile("[\u4e00-\u9fff]")


def _has_cjk(episode: EpisodeView) -> bool:
    return _CJK.search(_policy_text(episode)) is not None


def _query_and_document_tags(dialect: Dialect) -> tuple[str, str, str, str]:
    return (dialect.search_open, dialect.search_close, dialect.information_open, dialect.information_close)


def _tags_match_searches(episode: EpisodeView) -> bool:
    """Whether the policy opened and closed one query per executed search, and wrote no document tag itself."""
    text, dialect = _policy_text(episode), get_dialect(episode.dialect)
    return [text.count(tag) for tag in _query_and_document_tags(dialect)] == [episode.searches, episode.searches, 0, 0]


def _one_reasoning_and_answer(episode: EpisodeView) -> bool:
    """Whether reasoning is opened and closed as the dialect wants (R1-Searcher: once; others: once or more) and there is one answer."""
    text, dialect = _policy_text(episode), get_dialect(episode.dialect)
    opened = text.count(dialect.think_open) + _prompt_opens_think(episode, dialect)
    closed = text.count(dialect.think_close)
    most = 1 if dialect.prompt_opens_think else opened
    return 1 <= opened == closed <= most and text.count(dialect.answer_open) == 1 == text.count(dialect.answer_close)


# The structure of an episode, on its typed turns


_SEPARATE: dict[tuple[str | None, str], str] = {
    ("start", "think_open"): "thinking",
    ("thinking", "text"): "thinking",
    ("thinking", "think_close"): "thought",
    ("thought", "search_open"): "querying",
    ("querying", "text"): "querying",
    ("querying", "search_close"): "asked",
    ("asked", "information"): "start",
    ("thought", "answer_open"): "answering",
    ("answering", "text"): "answering",
    ("answering", "answer_close"): "end",
}
"""Search-R1: state and symbol give the next state; a pair that is not here is invalid."""

_NESTED: dict[tuple[str | None, str], str] = {
    **{key: state for key, state in _SEPARATE.items() if key != ("thought", "search_open")},
    ("thinking", "search_open"): "querying",
    ("asked", "information"): "thinking",
}
"""R1-Searcher: searches are made inside one stretch of reasoning."""


def _structure_is_valid(episode: EpisodeView) -> bool:
    dialect = get_dialect(episode.dialect)
    transitions = _NESTED if dialect.prompt_opens_think else _SEPARATE
    split, symbols = _tag_splitter(dialect.tags)
    state: str | None = "thinking" if _prompt_opens_think(episode, dialect) else "start"
    for turn in episode.turns:
        for part in split(turn.segment):
            if not part.strip():
                continue
            state = transitions.get((state, symbols.get(part, "text")))
            if state is None:
                return False
        if turn.searched:
            state = transitions.get((state, "information"))
        elif turn.observation.strip():  # the reply to an invalid action stands outside every block
            return False
        if state is None:
            return False
    return state == "end"


_SYMBOLS = (
    "think_open",
    "think_close",
    "search_open",
    "search_close",
    "information_open",
    "information_close",
    "answer_open",
    "answer_close",
)
"""What the tags of ``Dialect.tags`` are called above, in their order."""


@lru_cache(maxsize=16)
def _tag_splitter(tags: tuple[str, ...]) -> tuple[Callable[[str], list[str | Any]], dict[str, str]]:
    return re.compile("(" + "|".join(map(re.escape, tags)) + ")").split, dict(zip(tags, _SYMBOLS, strict=True))


def _prompt_opens_think(episode: EpisodeView, dialect: Dialect) -> bool:
    return episode.prompt.rstrip().endswith(dialect.think_open)


def _policy_text(episode: EpisodeView) -> str:
    # a line break between segments, so that the ends of two never make a tag that neither holds
    return "\n".join([turn.segment for turn in episode.turns])


# Weighted sums


@dataclass(frozen=True)
class RewardPart:
    """One preset, or a reward of your own, inside a :class:`WeightedReward`.

    ``terms`` are the names it gives, None where a reward of your own does not declare them.
    """

    name: str
    function: Callable[..., Mapping[str, float]]
    terms: tuple[str, ...] | None
    options: Mapping[str, float] = field(default_factory=dict)
    weight: float = 1.0

    def __call__(self, episode: EpisodeView) -> Terms:
        values = self.function(episode, **self.options)
        if self.terms is not None and self.name in PRESETS and PRESETS[self.name].function is self.function:
            return {name: values[name] for name in self.terms}  # the terms of presets are known to be finite floats
        return self._checked(values)

    def _checked(self, values: object) -> Terms:
        """What a reward of your own gave, as floats. Raises ``ConfigurationError`` where it is not what it must be."""
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise ConfigurationError(
                f"A reward must return a mapping from names (str) to finite numbers, such as {{'em': 1.0}}; {self.name!r} returned {values!r:.200}."
            )
        if self.terms is not None and set(values) != set(self.terms):
            raise ConfigurationError(
                f"A reward that declares its terms must return these, no more and no fewer; {self.name!r} declares {sorted(self.terms)} "
                f"and returned {sorted(values)}."
            )
        return {name: _number(values[name], f"the term {name!r} of reward {self.name!r}") for name in self.terms or values}


class WeightedReward:
    """Named terms of one or more rewards; the reward of an episode is their weighted sum.

    Attributes
    ----------
    name
        The parts' names joined by ``+``.
    terms
        Names of all terms, None when a part does not declare its own.
    """

    def __init__(self, parts: Sequence[RewardPart], weights: Mapping[str, float] | None = None) -> None:
        if not parts:
            raise ConfigurationError("A reward needs at least one part; got none. Name a preset, for instance 'em'.")
        self.parts = tuple(parts)
        self.name = "+".join(part.name for part in parts)
        declared = [part.terms for part in parts if part.terms is not None]
        self.terms = tuple(name for terms in declared for name in terms) if len(declared) == len(parts) else None
        self._given_weights = {name: _number(value, f"the weight of the term {name!r}") for name, value in (weights or {}).items()}
        self._weights = {name: part.weight for part in parts for name in part.terms or ()} | self._given_weights
        seen: set[str] = set()
        for name in (name for terms in declared for name in terms):
            if name in seen:
                raise ConfigurationError(_twice(name))
            seen.add(name)
        if self.terms is not None:
            self._check_weights(self.terms)

    def __call__(self, episode: EpisodeView) -> Terms:
        """The terms, unweighted: finite Python floats. Raises ``ConfigurationError`` where a reward of your own gives anything else."""
        if len(self.parts) == 1 and self.terms is not None:
            return self.parts[0](episode)
        terms: Terms = {}
        for part in self.parts:
            for name, value in part(episode).items():
                if name in terms:
                    raise ConfigurationError(_twice(name))
                terms[name] = value
                self._weights.setdefault(name, part.weight)
        if self.terms is None:
            self._check_weights(tuple(terms))
        return terms

    def total(self, terms: Mapping[str, float]) -> float:
        """The reward: the weighted sum of the terms."""
        return float(sum(self._weights.get(name, 1.0) * value for name, value in terms.items()))

    def stamp(self) -> dict[str, Any]:
        """What makes a number that used this reward comparable, as plain values."""
        parts = [
            {"name": part.name, "options": dict(part.options), "weight": part.weight, "terms": part.terms and list(part.terms)}
            for part in self.parts
        ]
        return {"name": self.name, "parts": parts, "weights": dict(self._given_weights)}

    def _check_weights(self, terms: tuple[str, ...]) -> None:
        for name in self._given_weights:
            if name not in terms:
                raise ConfigurationError(f"reward_weights must name terms of the reward {self.name!r}: {sorted(terms)}; got {name!r}.")

    def __deepcopy__(self, memo: dict[int, object]) -> WeightedReward:
        return self

    def __repr__(self) -> str:
        return f"WeightedReward({self.name!r}, terms={self.terms})"


def _twice(name: str) -> str:
    return f"Each term of a reward must have one source; got {name!r} from two. Choose terms with 'only', for instance {{'name': ..., 'only': [...]}}."


def build_reward(config: str | Mapping[str, Any] | Sequence[Any] | Reward, weights: Mapping[str, float] | None = None) -> WeightedReward:
    """A reward from its description.

    Parameters
    ----------
    config
        A preset's name (``"em"``); a mapping with its options (``{"name": "search_r1_format", "structure_score": 0.1}``); a list of these,
        whose terms are summed; or an object of your own that takes an :class:`EpisodeView` and returns named terms (it may declare ``name``,
        ``terms`` and ``stamp``). In a mapping, ``weight`` multiplies all terms of the preset and ``only`` names those to keep.
    weights
        Weights of single terms, in place of 1 or of the preset's ``weight``.

    Raises
    ------
    ConfigurationError
        For a preset, option, term or weight that does not exist, or a value that is not a finite number.

    Examples
    --------
    >>> reward = build_reward(["em", {"name": "r1_searcher_stage1", "only": ["retrieval_used"], "weight": 0.2}])
    >>> reward.name, reward.terms
    ('em+r1_searcher_stage1', ('em', 'retrieval_used'))
    """
    if isinstance(config, WeightedReward):
        return WeightedReward(config.parts, {**config._given_weights, **weights}) if weights else config
    if isinstance(config, Sequence) and not isinstance(config, str):
        return WeightedReward([_build_part(item) for item in config], weights)
    return WeightedReward([_build_part(config)], weights)


def _build_part(config: Any) -> RewardPart:
    if isinstance(config, str):
        config = {"name": config}
    if not isinstance(config, Mapping):
        if not callable(config):
            raise ConfigurationError(
                f"reward must be a preset's name, a mapping with 'name', a list of these, or a callable object; got {type(config).__name__}. "
                f"Presets: {sorted(PRESETS)}."
            )
        terms = getattr(config, "terms", None)
        terms = (terms,) if isinstance(terms, str) else terms
        name = getattr(config, "name", None) or getattr(config, "__name__", None) or type(config).__name__
        return RewardPart(str(name), config, None if terms is None else tuple(terms))
    options = dict(config)
    name = options.pop("name", None)
    if name not in PRESETS:
        raise ConfigurationError(f"reward must name one of the presets {sorted(PRESETS)}; got {name!r}.")
    preset = PRESETS[name]
    weight = _number(options.pop("weight", 1.0), f"the weight of reward {name!r}")
    only = options.pop("only", preset.terms)
    only = (only,) if isinstance(only, str) else tuple(only)
    for term in only:
        if term not in preset.terms:
            raise ConfigurationError(f"'only' must name terms of the reward {name!r}: {list(preset.terms)}; got {term!r}.")
    for option, value in options.items():
        if option not in preset.options:
            raise ConfigurationError(f"Options of the reward {name!r} are {[*preset.options, 'weight', 'only']}; got {option!r}.")
        options[option] = _number(value, f"the option {option!r} of reward {name!r}")
    return RewardPart(name, preset.function, only, {**preset.options, **options}, weight)


def _number(value: Any, what: str) -> float:
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond all floats
            number = math.inf
        if math.isfinite(number):
            return number
    raise ConfigurationError(f"{what[0].upper()}{what[1:]} must be a finite number; got {value!r:.200}.")
