"""An evaluation: which episodes there are, playing those that are not played yet, and the results once none is missing.

An episode is a set, a question's place in it, and a sample. With the seed they decide all that is random in it, so it does not matter in which process it is
played, after which stop, beside which others, or from which list of questions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from searchqa_agents.answers import Answers, Journal, Part, read_answers, read_trajectories, way_on
from searchqa_agents.hydra_app import AGENT_MECHANICS
from searchqa_agents.lost_back_end import LostBackEndError, last_error
from searchqa_agents.measures import score_row, time_row
from searchqa_agents.results import Key, Row
from searchqa_agents.runs import OtherSearchError, RunFolder, RunFolderError, run_stamp, stamp_differences
from searchqa_agents.settings import LANGUAGE_MODELS, AgentSettings, BaselineSettings, EnvSettings, EvalSettings, LMAgentSettings
from searchqa_envs.errors import ConfigurationError, SearchQAError
from searchqa_retrievers.types import SERVER_NOT_REACHED, RetrieverError

if TYPE_CHECKING:
    from searchqa_agents.language_model import LanguageModel
    from searchqa_agents.trajectory import Trajectory
    from searchqa_envs.questions import QuestionSource
    from searchqa_envs.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)

SCORING_VERSION = 1
"""Of how answers are scored. Raised with every change of a normaliser or a measure that can change a number."""
PUBLISHED_ORDER = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
"""The seven sets as the published tables have them."""
CHUNK = 2048
"""Most episodes of one rollout: a bound on memory, since a rollout keeps its trajectories."""
SECONDS_BETWEEN_COUNTS = 3.0
"""How often what searching costs is kept: a kill loses so much of it at most."""
LOST_ROUNDS = 3
"""How often episodes that lost their search back end are played again."""
LOST_BATCHES = 3
"""So many times ``num_envs`` episodes in a row without an answered search, and the back end is gone."""
OWN_TO_A_LIST = frozenset({"samples", "questions_played", "question_list", "name"})
"""Parts of a stamp that may change when a run goes on with more questions or samples."""

Advance = Callable[[int, str], object]


# -- which episodes --------------------------------------------------------------------------------------------------------------------------


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


# -- playing ---------------------------------------------------------------------------------------------------------------------------------


class Players:
    """Makes the environment and the agent of each set; a language model is loaded once."""

    def __init__(self, settings: EvalSettings) -> None:
        self.settings = settings
        self.tokenizer = given_tokenizer(settings)
        self._agent: LanguageModel | None = None

    def make(self, env: EnvSettings) -> tuple[Any, LanguageModel]:
        """The vector environment of a set, and the agent in it."""
        from searchqa_agents.loading import agent_env, build_agent, make_venv
        from searchqa_agents.scripted import ScriptedAgent

        settings = self.settings
        changed = agent_env(settings.agent, env) | ({} if self.tokenizer is None else {"tokenizer": self.tokenizer})
        venv = make_venv(env, settings.num_envs, **changed)
        if self._agent is None or isinstance(self._agent, ScriptedAgent):  # a script reads the questions of its set
            writer = None if self._agent is None else self._agent.writer
            model = None if writer is None else writer.model
            self._agent = build_agent(settings.agent, venv, settings.device, settings.dtype, model)
        return venv, self._agent


def given_tokenizer(settings: EvalSettings) -> Tokenizer | None:
    """The tokenizer that the settings or the agent's checkpoint name; None for the environment's own."""
    from searchqa_agents.hub import check_on_hub, is_hub_name
    from searchqa_agents.loading import agent_env
    from searchqa_envs.tokenizers import build_tokenizer

    name: str | None = settings.env.tokenizer or agent_env(settings.agent, settings.env).get("tokenizer")
    if name is None:
        return None
    if is_hub_name(name):
        check_on_hub(name)
    return build_tokenizer(name)


def set_stamp(settings: EvalSettings, plan: SetPlan, base: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The flat stamp of a set's numbers; ``weights`` are those of :func:`weights_stamp`."""
    from searchqa_agents.loading import agent_stamp

    stamp = run_stamp(base.stamp(), seed=settings.seed, threads=settings.threads)
    agent = {**agent_stamp(settings.agent, base.tokenizer, base.source.name), **weights}
    stamp |= {"agent": agent, "temperature": temperature_of(settings)} | list_stamp(settings, plan)
    stamp["scoring_version"] = SCORING_VERSION
    if base.rules.needs_gold:
        stamp["told_the_answer"] = True
    plain: dict[str, Any] = json.loads(json.dumps(stamp, default=str))
    return plain


def list_stamp(settings: EvalSettings, plan: SetPlan) -> dict[str, Any]:
    """The parts of a stamp that say which episodes were played."""
    from searchqa_agents.question_lists import ids_stamp

    listed = {"kind": plan.kind, **ids_stamp(plan.ids)}
    return {"samples": settings.samples, "questions_played": len(plan.ids), "question_list": listed}


def weights_stamp(settings: EvalSettings) -> dict[str, Any]:
    """Of a model that is loaded here, the type of its numbers, and where its weights are files of this machine their sha256. Nothing of other agents.

    A folder can hold other weights later, and in another type a model writes other tokens.
    """
    from searchqa_agents.loading import checkpoint_path

    model = _model_of(settings)
    if not isinstance(model, LMAgentSettings):
        return {}
    folder = checkpoint_path(model.checkpoint)
    return {"dtype": settings.dtype} | ({"weights_sha256": _folder_sha256(folder)} if isinstance(folder, Path) else {})


def _folder_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for pattern in ("*.safetensors", "*.bin", "*config.json") for path in folder.glob(pattern)):
        with file.open("rb") as opened:
            digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _model_of(settings: EvalSettings) -> AgentSettings:
    return settings.agent.lm if isinstance(settings.agent, BaselineSettings) else settings.agent


def temperature_of(settings: EvalSettings) -> float | None:
    """At which the agent's language model is sampled; None for a script without one. A baseline that has a temperature of its own samples at that."""
    from searchqa_agents.loading import configured_baseline

    if isinstance(settings.agent, BaselineSettings):
        own: float | None = getattr(configured_baseline(settings.agent)[1], "temperature", None)
        if own is not None:
            return own
    model = _model_of(settings)
    return model.temperature if isinstance(model, LANGUAGE_MODELS) else None


def check_stamp(path: Path, name: str, begun: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a set that was begun with another agent, data, search engine or other rules; other package versions are a warning.

    Raises
    ------
    OtherSearchError
        Naming each difference.
    """
    for before in begun:
        unplaced, unplaced_now = _unplaced(before), _unplaced(now)
        different = [
            (key, old, new)
            for key, old, new in stamp_differences(unplaced, unplaced_now)
            if SERVER_NOT_REACHED not in (old, new)
            and key.partition(".")[0] not in OWN_TO_A_LIST
            and not (key.startswith("agent.") and key.rpartition(".")[2] in AGENT_MECHANICS)
        ]
        if before.get("seed") != now.get("seed"):
            different.append(("seed", before.get("seed"), now.get("seed")))
        if different:
            listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in different)
            raise OtherSearchError(
                f"{path} holds answers on {name} that were made with another agent, search engine, corpus or data, and its numbers would mix both: {listed}. "
                "Bring back what was there and resume, or begin a new run in another run_dir."
            )
    if begun:
        versions = [{"searchqa_gym": one.get("searchqa_gym"), **one.get("packages", {})} for one in (begun[-1], now)]
        changed = [key for key in versions[1] if versions[0].get(key) not in (None, versions[1][key])]
        if changed:
            listed = ", ".join(f"{key} was {versions[0][key]}, is {versions[1][key]}" for key in changed)
            logger.warning("%s goes on with other package versions: %s.", path, listed)
        before_at, now_at = _untold(begun[-1]), _untold(now)
        if before_at != now_at:
            logger.warning(
                "%s goes on with the search server %s, before %s; it does not say what it searches, so make sure that it is the same.",
                path,
                ", ".join(sorted(now_at)),
                ", ".join(sorted(before_at)),
            )


def _unplaced(stamp: Any) -> Any:
    """A stamp without where its search servers are: what they say that they search is in it."""
    if isinstance(stamp, Mapping):
        left_out = ("url",) if stamp.get("retriever") == "http" else ()
        return {name: _unplaced(own) for name, own in stamp.items() if name not in left_out}
    return [_unplaced(own) for own in stamp] if isinstance(stamp, list) else stamp


def _untold(stamp: Any) -> set[str]:
    """The addresses of search servers that do not say what they search."""
    if isinstance(stamp, Mapping):
        own = {str(stamp.get("url"))} if stamp.get("retriever") == "http" and stamp.get("server") is None else set()
        return own.union(*map(_untold, stamp.values()))
    return set().union(*map(_untold, stamp)) if isinstance(stamp, list) else set()


def play(settings: EvalSettings, journal: Journal, plans: Sequence[SetPlan], advance: Advance) -> int:
    """Play what is missing of a part, and keep each episode in its journal as it ends.

    Parameters
    ----------
    advance
        Told how many episodes have been played by this call, and a few words.

    Returns
    -------
    int
        How many episodes were played.

    Raises
    ------
    RunFolderError
        If the journals cannot be gone on with.
    LostBackEndError
        If episodes lost their search back end each time that they were played. All others are kept.
    """
    from searchqa_agents.results import remove_results
    from searchqa_envs.datasets import clear_cache

    answers = read_answers(journal.path, whole=False)
    todo = missing_episodes(plans, settings.samples, answers.rows, journal.part)
    stamps = answers.stamps
    players = Players(settings)
    weights = weights_stamp(settings) if todo else {}
    player = _Player(settings, journal, advance)
    for missing in todo:
        venv, agent = players.make(missing.plan.env)
        try:
            stamp = set_stamp(settings, missing.plan, venv.unwrapped, weights)
            check_stamp(journal.path, missing.plan.name, stamps.get(missing.plan.name, ()), stamp)
            remove_results(journal.path)
            journal.begin(missing.plan.name, stamp)
            player.play(venv, agent, missing, stamp)
            after = set_stamp(settings, missing.plan, venv.unwrapped, weights)
            if after != stamp:  # what could not be asked at first, such as a server that was not there yet
                journal.end(missing.plan.name, after)
                check_stamp(journal.path, missing.plan.name, [*stamps.get(missing.plan.name, ()), stamp], after)
        finally:
            venv.close()
        if len(plans) > 1:  # passages of the sets that are done; what a later set needs of its questions is read again
            clear_cache()
    return player.played


class _Player:
    """Plays one set after another, and counts."""

    def __init__(self, settings: EvalSettings, journal: Journal, advance: Advance) -> None:
        self.settings = settings
        self.journal = journal
        self.advance = advance
        self.played = 0

    def play(self, venv: Any, agent: LanguageModel, missing: Missing, stamp: Mapping[str, Any]) -> None:
        """All missing episodes of a set; those that lose their back end again, in rounds."""
        todo, error = missing.episodes, ""
        self._counted: dict[str, float] = {}
        self._counted_at = time.monotonic()
        self._scored, self._exact = 0, 0.0
        for _ in range(1 + LOST_ROUNDS):
            if todo:
                todo, error = self._round(venv, agent, missing.plan, todo, stamp, error)
        if todo:
            raise LostBackEndError(
                f"The search back end was lost in {len(todo)} episodes of {missing.plan.name}, also when they were played again ({LOST_ROUNDS} times), and "
                f"no question is left out of a result. The last error: {error}. Bring the back end back first."
            )

    def _round(
        self, venv: Any, agent: LanguageModel, plan: SetPlan, todo: Sequence[tuple[int, int]], stamp: Mapping[str, Any], error: str
    ) -> tuple[list[tuple[int, int]], str]:
        """Play episodes once; those that lost the back end, and its last error."""
        from searchqa_agents.rollout import rollout

        settings, base = self.settings, venv.unwrapped
        most_in_a_row = LOST_BATCHES * settings.num_envs
        lost: list[tuple[int, int]] = []
        in_a_row = 0
        size = max(CHUNK, 16 * settings.num_envs)
        for start in range(0, len(todo), size):
            chunk = todo[start : start + size]

            def ended(number: int, _: int, trajectory: Trajectory, chunk: Sequence[tuple[int, int]] = chunk) -> None:
                nonlocal error, in_a_row
                place, sample = chunk[number]
                if trajectory.backend_error is not None:
                    lost.append((place, sample))
                    error, in_a_row = last_error([trajectory]), in_a_row + 1
                    if in_a_row >= most_in_a_row:
                        raise LostBackEndError(
                            f"The search back end is gone: {in_a_row} episodes in a row had no search answered. The last error: {error}. Bring it back first."
                        )
                    return
                if trajectory.metrics.get("searches", 1.0) > 0:
                    in_a_row = 0
                row = score_row(plan.name, sample, base.source[plan.indices[place]], trajectory, base.dialect)
                shown = settings.save is None or place * settings.samples + sample < settings.save
                self.journal.add(row, time_row(plan.name, sample, trajectory), trajectory if shown else None)
                self.played += 1
                if time.monotonic() - self._counted_at >= SECONDS_BETWEEN_COUNTS:
                    self._keep_searches(plan.name, base)
                self._scored, self._exact = self._scored + 1, self._exact + row["metrics"]["em"]
                self.advance(self.played, f"{plan.name} em {self._exact / self._scored:.3f}")

            try:
                rollout(
                    venv,
                    agent,
                    [plan.indices[place] for place, _ in chunk],
                    seed=settings.seed,
                    temperature=temperature_of(settings) or 0.0,
                    stamp=stamp,
                    places=[plan.indices[place] for place, _ in chunk],
                    members=[sample for _, sample in chunk],
                    on_trajectory=ended,
                )
            finally:
                self._keep_searches(plan.name, base)
        return sorted(lost), error

    def _keep_searches(self, name: str, base: Any) -> None:
        from searchqa_retrievers.counted import counted_since

        now: Mapping[str, float] = base.search_counters().sums
        self.journal.add_searches(name, counted_since(now, self._counted))
        self._counted = dict(now)
        self._counted_at = time.monotonic()


@contextmanager
def telling_what_is_kept(path: Path, part: Part | None = None) -> Iterator[None]:
    """Let the message of an error in the middle of playing end with what is safe and how to go on."""
    try:
        yield
    except RunFolderError:  # these say it themselves
        raise
    except (RetrieverError, SearchQAError) as error:
        raise type(error)(f"{str(error).rstrip('. ')}. {way_on(path, part)}") from error


# -- results ---------------------------------------------------------------------------------------------------------------------------------


class EvalFolder(RunFolder):
    """The folder of an evaluation, open for the process that writes its results."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, command="eval")

    def way_on(self, *overrides: str) -> str:
        """What is safe after a stop, and the line that goes on from it."""
        return way_on(self.path)


def write_all(settings: EvalSettings, folder: RunFolder, plans: Sequence[SetPlan], answers: Answers, console: Any) -> dict[str, Any]:
    """Write the results of an evaluation of which nothing is missing, with its table and page, and show them. Returns the summary."""
    from searchqa_agents.eval_report import finish
    from searchqa_agents.results import JUDGEMENTS_FILE, read_results, remove_results, write_results
    from searchqa_agents.runs import SEARCHES_FILE, read_searches

    keys = [(plan.name, name, sample) for plan in plans for name in plan.ids for sample in range(settings.samples)]
    rows: list[Row] = [answers.rows[key] for key in keys]
    times: list[Row] = [answers.times[key] for key in keys]
    unstamped = [plan.name for plan in plans if plan.name not in answers.stamps]
    if unstamped:
        raise RunFolderError(
            f"{folder.path}: the journals in answers/ do not say with what {', '.join(unstamped)} was played; a file of theirs was removed or cut. "
            "Choose another run_dir."
        )
    stamps = {plan.name: _known_best(answers.stamps[plan.name]) | list_stamp(settings, plan) for plan in plans}
    remove_results(folder.path)
    write_results(folder.path, rows, times, stamps)
    if (folder.path / JUDGEMENTS_FILE).is_file():  # of an earlier end of this run
        rows = read_results(folder.path).rows
    counted = [counters for name, counters in answers.searches if name in stamps]
    lines = [json.dumps({"phase": "eval", "step": 0, **counters}) + "\n" for counters in counted]
    folder.write_text(SEARCHES_FILE, "".join(lines))
    kept = read_trajectories(folder.path)
    shown = {plan.name: [kept[key] for key in keys if key[0] == plan.name and key in kept][: settings.save] for plan in plans}
    for stale in (folder.path / "trajectories").glob("*.jsonl.gz"):  # of an earlier end, with other sets
        stale.unlink()
    for name, trajectories in shown.items():
        if trajectories:
            folder.write_trajectories(name if len(plans) > 1 else "eval", trajectories)
    tokenizer = given_tokenizer(settings)
    if tokenizer is not None:
        folder.write_tokenizer(tokenizer)
    summary = finish(folder, settings.name, rows, times, stamps, shown, read_searches(folder.path), console)
    told = _as_far_as_counted(rows, counted)
    if told:
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    return summary


def _as_far_as_counted(rows: Sequence[Row], counted: Sequence[Mapping[str, float]]) -> str:
    """What to say where not just the searches of these rows were counted: after a kill, with fewer samples, or where episodes were played again."""
    searches = sum(row["metrics"].get("searches", 0.0) for row in rows)
    known = sum(counters.get("search/searches", 0.0) for counters in counted)
    if searches == known:
        return ""
    return (
        f"These episodes have {searches:,.0f} searches. What searching cost is told as far as it was counted, of {known:,.0f}: a process that is killed loses "
        "its last seconds, and episodes that were played again, or are not shown, count too."
    )


def _known_best(stamps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last stamp that knows all servers; the last where none does."""
    from searchqa_retrievers.wrapped import not_reached

    return next((stamp for stamp in reversed(stamps) if not not_reached(stamp)), stamps[-1])
