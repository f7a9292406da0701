"""Collect what a search engine finds for an agent: episodes played, each search with its documents as a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gymnasium.vector import VectorEnv

from searchqa_agents.language_model import IntArray, LanguageModel, Sampling, Segment, Session
from searchqa_agents.rollout import rollout
from searchqa_agents.simulator.rows import SearchRow
from searchqa_agents.trajectory import Trajectory
from searchqa_envs.questions import Question
from searchqa_retrievers.types import Passage

Searches = dict[int, list[tuple[str, tuple[Passage, ...]]]]
"""By episode: the queries that it asked, in order, each with the passages that it was shown."""


class Listener:
    """A language model that notes what each episode was shown; it acts as the one given."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.returns_ids = model.returns_ids
        self.returns_logprobs = model.returns_logprobs
        self.searches: Searches = {}

    def start(self, seeds: Sequence[int], sampling: Sampling) -> Session:
        """Begin episodes; what was noted before is forgotten."""
        self.searches = {}
        return _ListeningSession(self.model.start(seeds, sampling), self.searches)


class _ListeningSession(Session):
    def __init__(self, session: Session, searches: Searches) -> None:
        self._session = session
        self._searches = searches

    def submit(self, rows: Sequence[int], contexts: Sequence[IntArray], infos: Sequence[Mapping[str, Any]]) -> None:
        for row, info in zip(rows, infos, strict=True):
            if info.get("action") == "search":
                self._searches.setdefault(row, []).append((info["query"], info["turn_record"].passages))
        self._session.submit(rows, contexts, infos)

    def collect(self) -> list[tuple[int, Segment]]:
        return self._session.collect()

    def release(self, rows: Sequence[int]) -> None:
        self._session.release(rows)


def collect_searches(
    venv: VectorEnv[Any, Any, Any],
    model: LanguageModel,
    questions: Sequence[int],
    *,
    samples: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    metric: str = "em",
    right_at: float = 1.0,
    stamp: str = "",
) -> tuple[list[SearchRow], list[Trajectory]]:
    """Play ``samples`` episodes on each question; one row for each search that found something, and the episodes.

    Parameters
    ----------
    venv
        With a real search engine; its ``top_k`` is the number of documents.
    metric, right_at
        An episode is right where this metric, or ``reward``, has at least this value.
    stamp
        Written into each row.

    Episodes whose search back end was lost give no rows.
    """
    listener = Listener(model)
    trajectories = rollout(venv, listener, questions, group_size=samples, seed=seed, temperature=temperature)
    source = venv.unwrapped.source  # type: ignore[attr-defined]
    rows: list[SearchRow] = []
    for episode, trajectory in enumerate(trajectories):
        if trajectory.backend_error is not None:
            continue
        question: Question = source[source.index_of(trajectory.question_id)]
        searches = listener.searches.get(episode, [])
        right = (trajectory.reward if metric == "reward" else trajectory.metrics.get(metric, 0.0)) >= right_at
        for turn, (query, passages) in enumerate(searches):
            if passages and query.strip():
                rows.append(
                    SearchRow(
                        id=f"{question.id}/{episode % samples}/{turn}",
                        question_id=question.id,
                        question=question.question,
                        golden_answers=question.golden_answers,
                        query=query.strip(),
                        turn=turn,
                        last=turn + 1 == len(searches),
                        documents=passages,
                        answer=trajectory.answer,
                        right=bool(right),
                        supporting_titles=tuple(question.metadata.get("supporting_titles") or ()),
                        note=_note(question, query.strip()),
                        stamp=stamp,
                    )
                )
    return rows, trajectories


def _note(question: Question, query: str) -> str:
    """What the gold chain looks for with this query, as a tiny model can copy it from the question, a mark for each thing that it must decide.

    ``Mako 's director 's`` of what the question names, ``Rimu , birthplace ?`` of what was found; the end is a question mark where the answer is there.
    Empty where the chain has no such query.
    """
    chain = question.metadata.get("chain") or ()
    place = next((place for place, link in enumerate(chain) if link["query"] == query), None)
    if place is None:
        return ""
    named = "'s" if query in question.question.split() else ","
    end = "?" if place + 1 == len(chain) else "'s"
    return f"{query} {named} {chain[place]['relation']} {end}"
