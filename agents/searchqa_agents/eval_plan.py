"""Which episodes an evaluation has: its sets, their questions, and what of them is not played yet."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from searchqa_agents.answers import Part
from searchqa_agents.results import Key
from searchqa_agents.settings import EnvSettings, EvalSettings
from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    from searchqa_envs.questions import QuestionSource

PUBLISHED_ORDER = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
"""The seven sets as the published tables have them."""


@dataclass(frozen=True)
class SetPlan:
    """What is played of one set.

    Attributes
    ----------
    name
        Of the set, as results call it.
    env
        The set's environment, with the split that is played.
    indices, ids
        The questions: their places in their source, ascending, and their ids.
    kind
        What chose them: ``all``, ``first``, ``fixed`` or ``file``.
    place
        Of the first question in the whole evaluation.
    note
        What a reader should know about the choice; mostly empty.
    """

    name: str
    env: EnvSettings
    indices: tuple[int, ...]
    ids: tuple[str, ...]
    kind: str
    place: int
    note: str = ""


class Missing(NamedTuple):
    """The episodes of a set that are not played yet: (place in ``SetPlan.indices``, sample) each."""

    plan: SetPlan
    episodes: list[tuple[int, int]]


def set_names(sets: Any) -> tuple[str, ...] | None:
    """The sets that the key ``sets`` names, in order; None for null. Raises ``ConfigurationError`` for anything else."""
    import difflib

    if sets is None:
        return None
    if sets == "all":
        return PUBLISHED_ORDER
    names = (sets,) if isinstance(sets, str) else tuple(sets) if isinstance(sets, Sequence) else ()
    if not names:
        raise ConfigurationError(f"sets must be all, or a list such as [nq,hotpotqa] of {', '.join(PUBLISHED_ORDER)}; got {sets!r}.")
    for name in names:
        if name not in PUBLISHED_ORDER:
            close = difflib.get_close_matches(str(name), PUBLISHED_ORDER, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigurationError(f"sets can name {', '.join(PUBLISHED_ORDER)}, or be all; got {name!r}.{hint}")
        if names.count(name) > 1:
            raise ConfigurationError(f"sets must name each set once; got {name} twice.")
    return names


def set_environments(settings: EvalSettings) -> list[EnvSettings]:
    """The environment of each set that is played, in order; splits that are null are not chosen yet.

    Raises ``ConfigurationError`` for ``sets`` with an environment that is none of a published set.
    """
    import gymnasium as gym

    import searchqa_envs
    from searchqa_agents.loading import published_set

    names = set_names(settings.sets)
    if names is None:
        return [settings.env]
    if published_set(settings.env) is None:
        raise ConfigurationError(
            f"sets={settings.sets} plays published sets, and the environment is {settings.env.id}. Leave env= out, or give one of theirs, such as "
            "env=hotpotqa, whose other keys (env.top_k, env.retriever, ...) then hold for all sets; or leave sets= out."
        )
    ids = {gym.spec(name).kwargs.get("dataset"): name for name in searchqa_envs.ENV_IDS}
    return [replace(settings.env, id=ids[name]) for name in names]


def plan_sets(settings: EvalSettings) -> list[SetPlan]:
    """All that the evaluation is to play, set by set. Reads the questions, not the passages."""
    from searchqa_agents.question_lists import choice_of, chosen_questions

    environments = set_environments(settings)
    names = set_names(settings.sets) or ()
    plans: list[SetPlan] = []
    place = 0
    for env in environments:
        env, note = _with_evaluation_split(env)
        source = _question_source(env)
        choice = choice_of(settings.questions, source.name, [name for name in names if name != source.name])
        indices, kind = chosen_questions(choice, source)
        plans.append(SetPlan(source.name, env, tuple(indices), tuple(source[index].id for index in indices), kind, place, note))
        place += len(indices)
    return plans


def _with_evaluation_split(env: EnvSettings) -> tuple[EnvSettings, str]:
    """The environment with a split where none is given: that which results on a published set are published on, or the test worlds.

    And what to say where the files do not have it.
    """
    from searchqa_agents.loading import published_set
    from searchqa_envs.datasets import load_source, locate
    from searchqa_envs.datasets.registry import dataset_info

    name = published_set(env)
    if env.split is None and env.id.startswith("SearchQA-World"):
        return replace(env, split="test"), ""
    if env.split is not None or name is None:
        return env, ""
    wanted = "test" if "test" in dataset_info(name).sizes else "dev"
    here: set[Any] = {split for _, split in locate(name, env.data_dir).questions}
    if None in here:
        here = {question.metadata.get("split") for question in load_source(name, "all", env.data_dir)}
    if wanted in here:
        return replace(env, split=wanted), ""
    note = (
        f"{name}: the files have no rows of the split {wanted!r}, which results are published on; all their rows are played (split 'all')."
    )
    return replace(env, split="all"), note


def _question_source(env: EnvSettings) -> QuestionSource:
    """The questions of an environment, without its retriever where that can be."""
    import inspect

    import gymnasium as gym

    import searchqa_envs  # noqa: F401, registers the ids
    from searchqa_agents.loading import make_venv
    from searchqa_agents.settings import env_arguments
    from searchqa_envs.configuration import build_rules, build_source

    dataset = gym.spec(env.id).kwargs.get("dataset")
    if dataset is None:  # an environment of somebody else's
        venv = make_venv(env, 1)
        source: QuestionSource = venv.unwrapped.source
        venv.close()
        return source
    arguments = env_arguments(env)
    common = inspect.signature(build_rules).parameters
    options = {name: value for name, value in arguments.items() if name not in common}
    return build_source(dataset, arguments.get("split"), arguments.get("data_dir"), options)


def missing_episodes(plans: Sequence[SetPlan], samples: int, played: Container[Key], part: Part | None = None) -> list[Missing]:
    """What is not played yet, of a part or of all; sets of which nothing is missing are left out."""
    part = part or Part()
    found = []
    for plan in plans:
        episodes = [
            (number, sample)
            for number, name in enumerate(plan.ids)
            if part.has(plan.place + number)
            for sample in range(samples)
            if (plan.name, name, sample) not in played
        ]
        if episodes:
            found.append(Missing(plan, episodes))
    return found


def told(plans: Sequence[SetPlan], samples: int) -> str:
    """What is to be played, in words."""
    sets = ", ".join(f"{len(plan.indices):,} of {plan.name}{f' ({plan.env.split})' if plan.env.split else ''}" for plan in plans)
    total = samples * sum(len(plan.indices) for plan in plans)
    return f"{total:,} episodes: {samples} on each of the questions ({sets})"
