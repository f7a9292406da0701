"""An evaluation: playing the episodes that are not played yet, and the results once none is missing.

An episode is a set, a question's place in it, and a sample. With the seed they decide all that is random in it, so it does not matter in which process it is
played, after which stop, beside which others, or from which list of questions.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchqa_agents.answers import Answers, Journal, Part, read_answers, read_trajectories, way_on
from searchqa_agents.eval_plan import Missing, SetPlan, missing_episodes
from searchqa_agents.eval_stamps import check_stamp, list_stamp, set_stamp, weights_stamp
from searchqa_agents.lost_back_end import LostBackEndError, last_error
from searchqa_agents.measures import score_row, time_row
from searchqa_agents.results import Row
from searchqa_agents.runs import RunFolder, RunFolderError
from searchqa_agents.settings import EnvSettings, EvalSettings
from searchqa_envs.errors import SearchQAError
from searchqa_retrievers.types import RetrieverError

if TYPE_CHECKING:
    from searchqa_agents.language_model import LanguageModel
    from searchqa_agents.trajectory import Trajectory
    from searchqa_envs.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)

CHUNK = 2048
"""Most episodes of one rollout: a bound on memory, since a rollout keeps its trajectories."""
SECONDS_BETWEEN_COUNTS = 3.0
"""How often what searching costs is kept: a kill loses so much of it at most."""
LOST_ROUNDS = 3
"""How often episodes that lost their search back end are played again."""
LOST_BATCHES = 3
"""So many times ``num_envs`` episodes in a row without an answered search, and the back end is gone."""

Advance = Callable[[int, str], object]


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
        from searchqa_agents.loading import agent_temperature
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
                    temperature=agent_temperature(settings.agent) or 0.0,
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
