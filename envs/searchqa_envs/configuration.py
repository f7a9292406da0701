"""From the arguments of an environment to its rules: defaults, and what each argument may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from searchqa_envs.dialects import Dialect, get_dialect
from searchqa_envs.episode_types import Reward
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.questions import QuestionSource
from searchqa_envs.rewards import build_reward
from searchqa_envs.rules import Rules
from searchqa_envs.search_controls import SearchControls
from searchqa_envs.tokenizers import build_tokenizer
from searchqa_envs.tokenizers.base import Tokenizer
from searchqa_envs.tokenizers.byte import ByteTokenizer
from searchqa_retrievers.types import Retriever

DATASETS = ("world", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle", "nq", "triviaqa", "popqa", "custom")
WORLD_OPTIONS = ("preset", "world_seed", "num_worlds", "hops", "style", "entities")
CUSTOM_OPTIONS = ("questions", "corpus")

# Budgets (segment, observation, context), in tokens.
WORLD_BUDGETS = (48, 256, 1536)
BYTE_BUDGETS = (2048, 2048, 20_480)  # about four bytes to a token; holds five full turns
TOKEN_BUDGETS = {  # published response and observation limits; contexts as Search-R1's engine had them (4096 + 500)
    "search-r1": (500, 500, 4596),
    "zerosearch": (500, 2048, 4596),
    "r1-searcher": (512, 2048, 4608),
}


class UnknownArgumentError(ConfigurationError, TypeError):
    """An environment does not know an argument."""


def build_source(dataset: str, split: str | None, data_dir: str | Path | None, options: Mapping[str, Any]) -> QuestionSource:
    """The questions of a data set; ``options`` are the arguments that only the world or the custom set takes."""
    if dataset not in DATASETS:
        raise ConfigurationError(f"dataset must be one of {list(DATASETS)}; got {dataset!r}.")
    allowed = WORLD_OPTIONS if dataset == "world" else CUSTOM_OPTIONS if dataset == "custom" else ()
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise UnknownArgumentError(
            f"unexpected argument {unknown[0]!r} for the data set {dataset!r}; beside the common arguments it takes {list(allowed) or 'none'}."
        )
    if dataset == "world":
        from searchqa_envs.world import WorldSource

        return WorldSource(
            split="train" if split is None else split, **{name: value for name, value in options.items() if value is not None}
        )
    from searchqa_envs.datasets import load_custom, load_source
    from searchqa_envs.datasets.registry import QUESTION_COLLECTIONS

    if dataset == "custom":
        if options.get("questions") is None:
            raise ConfigurationError(
                "The custom data set needs questions=<path, rows or nq_hotpotqa_train>; corpus=<path> too, unless the questions carry contexts or the "
                "retriever asks a server."
            )
        questions, corpus = (_below(data_dir, options.get(name)) for name in ("questions", "corpus"))
        if options["questions"] in QUESTION_COLLECTIONS:
            return load_source(options["questions"], split=split, data_dir=data_dir, corpus=corpus)
        return load_custom(questions=questions, corpus=corpus, split=split)
    return load_source(dataset, split=split, data_dir=data_dir)


def _below(data_dir: str | Path | None, given: Any) -> Any:
    """A relative path of the custom set is looked for below ``data_dir``."""
    if data_dir is None or not isinstance(given, (str, Path)):
        return given
    return Path(data_dir) / given


def default_budgets(dataset: str, tokenizer: Tokenizer, dialect: Dialect) -> tuple[int, int, int]:
    """Segment, observation and context budgets where the caller names none."""
    from searchqa_envs.tokenizers.world import WorldTokenizer

    if isinstance(tokenizer, WorldTokenizer) and dataset == "world":
        return WORLD_BUDGETS
    if isinstance(tokenizer, (ByteTokenizer, WorldTokenizer)):
        return BYTE_BUDGETS
    return TOKEN_BUDGETS.get(dialect.name, TOKEN_BUDGETS["search-r1"])


def _check_served(controls: SearchControls, retriever: Retriever, world: bool) -> None:
    """Raise ``ConfigurationError`` for a ``top_k``, source or filter that the retriever cannot serve, as far as that can be known."""
    from searchqa_retrievers.composition import max_top_k, serves_filter, source_names_of

    limit = max_top_k(retriever)
    if controls.top_k is not None and limit is not None and controls.top_k > limit:
        raise ConfigurationError(
            f"search_controls.top_k must be at most {limit}, the most passages that the retriever gives for one query; got {controls.top_k}."
        )
    if world and controls.keys:
        raise ConfigurationError(
            f"search_controls of the generated world can have top_k only, since its filter is the world itself; got {list(controls.keys)}."
        )
    missing = [key for key in controls.keys if serves_filter(retriever, key) is False]
    if missing:
        raise ConfigurationError(
            f"search_controls lets a search say {', '.join(missing)}, which the retriever cannot serve. Put it into "
            "{'name': 'filtered', 'retriever': ...} for titles, or {'name': 'sources', 'sources': {...}} for sources."
        )
    sources = source_names_of(retriever) if controls.sources else None
    unknown = [name for name in controls.sources if sources is not None and name not in sources]
    if unknown:
        raise ConfigurationError(
            f"search_controls.sources must be among those of the retriever, {', '.join(sources or ())}; got {unknown}."
        )


def build_rules(
    dataset: str,
    split: str | None = None,
    retriever: str | Mapping[str, Any] | Retriever = "bm25",
    top_k: int | None = None,
    max_turns: int = 5,
    max_context_tokens: int | None = None,
    max_segment_tokens: int | None = None,
    max_observation_tokens: int | None = None,
    tokenizer: Any = None,
    dialect: str | Dialect = "search-r1",
    prompt: str | None = None,
    reward: str | Mapping[str, Any] | Sequence[Any] | Reward = "em",
    reward_weights: Mapping[str, float] | None = None,
    forced_answer: bool = False,
    search_controls: SearchControls | Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    **options: Any,
) -> Rules:
    """The rules of an environment from its arguments. Raises ``ConfigurationError`` for a value that cannot be."""
    world = dataset == "world"
    source = build_source(dataset, split, data_dir, options)
    chosen_dialect = get_dialect(dialect)
    chosen_tokenizer = build_tokenizer(tokenizer if tokenizer is not None else "world" if world else "byte")
    budgets = default_budgets(dataset, chosen_tokenizer, chosen_dialect)
    if isinstance(retriever, str):
        built = source.build_retriever({"name": retriever})
    elif isinstance(retriever, Mapping):
        built = source.build_retriever(dict(retriever))
    elif callable(getattr(retriever, "search", None)):
        built = retriever
    else:
        raise ConfigurationError(
            f"retriever must be a name, a mapping with 'name', or an object with search(requests); got {type(retriever).__name__}. "
            "Wrap a plain function in searchqa_retrievers.from_function."
        )
    controls = SearchControls.from_argument(search_controls)
    if controls is not None:
        _check_served(controls, built, world)
        chosen_dialect = replace(chosen_dialect, controls=controls)
    return Rules(
        source=source,
        retriever=built,
        tokenizer=chosen_tokenizer,
        dialect=chosen_dialect,
        prompt=prompt if prompt is not None else "bare" if world else "published",
        reward=build_reward(reward, reward_weights),
        top_k=top_k if top_k is not None else getattr(source, "top_k", 3),
        max_turns=max_turns,
        max_segment_tokens=max_segment_tokens if max_segment_tokens is not None else budgets[0],
        max_observation_tokens=max_observation_tokens if max_observation_tokens is not None else budgets[1],
        max_context_tokens=max_context_tokens if max_context_tokens is not None else budgets[2],
        forced_answer=forced_answer,
    )
