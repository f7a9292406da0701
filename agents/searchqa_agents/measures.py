"""What one episode measured: a row of scores, and a row of times beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from searchqa_agents.lost_back_end import LostBackEndError
from searchqa_agents.trajectory import Trajectory, TurnSpan
from searchqa_envs.dialects import Dialect
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.metrics import cover_em_squad, em_r1_searcher, f1_r1_searcher, sub_em_r1_searcher
from searchqa_envs.questions import Question
from searchqa_envs.scoring import is_unanswered

SCHEMA_VERSION = 1
"""Of rows of scores."""

GROUPS = ("type", "hops", "level")
"""What of a question's metadata its row keeps, where the set knows it."""

HOPS = {"nq": 1, "triviaqa": 1, "popqa": 1, "hotpotqa": 2, "2wikimultihopqa": 2, "bamboogle": 2}
"""How many facts a question of a set asks for, by the sets' papers; the exceptions are in :func:`question_groups`."""

_MUSIQUE_TYPE = re.compile(r"([1-9])hop[1-9]?")


def score_row(set_name: str, sample: int, question: Question, trajectory: Trajectory, dialect: Dialect) -> dict[str, Any]:
    """The scores of one episode as plain values, without times.

    Parameters
    ----------
    set_name
        What the results call the set.
    sample
        Which of the question's episodes this is, from 0.
    question
        With all its metadata: ``type``, ``hops``, ``level`` and ``supporting_titles`` are read.
    dialect
        In which the episode was played; it says which tags are the environment's.

    Returns
    -------
    dict
        ``schema_version, set, id, sample, question, golden_answers, answer, groups, metrics, turns, terminated, truncated, retokenized``. In ``metrics``
        and ``groups`` and in each turn's ``title_recall``, what is not defined or not known is an absent key. ``metrics`` has

        - those of :func:`searchqa_envs.metrics.episode_metrics`;
        - ``em_r1_searcher, f1_r1_searcher, sub_em_r1_searcher, cover_em_squad``: the same measures under the other normaliser;
        - ``reward, answered, turns``, and ``invalid_rate``: invalid turns by turns;
        - ``forged_tags``: see :func:`forged_tags`; and ``forged``, 1 if there is any; where a language model wrote the segments, since scripts defuse tags;
        - ``tokens``: those that the policy sampled into the context, see :func:`sampled_tokens`;
        - ``model_calls, prompt_tokens, generated_tokens``, and ``failed_calls``: all that a language model did for the episode, see :func:`model_use`.

    Raises
    ------
    LostBackEndError
        For an episode that lost its search back end: it measured nothing.
    ConfigurationError
        If the trajectory is another question's, or one of its metrics is not a finite number.
    """
    if trajectory.backend_error is not None:
        raise LostBackEndError(
            f"An episode that lost its search back end has no scores; question {question.id!r} of {set_name} has to be played again. "
            f"The error was: {trajectory.backend_error}"
        )
    if trajectory.question_id != question.id:
        raise ConfigurationError(f"score_row needs a trajectory of the question {question.id!r}; got one of {trajectory.question_id!r}.")
    turns = len(trajectory.turns)
    metrics = {name: float(value) for name, value in trajectory.metrics.items()}
    metrics |= _other_normaliser(trajectory.answer, question.golden_answers)
    metrics |= {"reward": float(trajectory.reward), "answered": float(not is_unanswered(trajectory.answer)), "turns": float(turns)}
    if turns:
        metrics["invalid_rate"] = sum(turn.action == "invalid" for turn in trajectory.turns) / turns
    if trajectory.retokenized or sampled_tokens(trajectory) is not None:
        forged = forged_tags(trajectory.turns, dialect)
        metrics |= {"forged_tags": float(forged), "forged": float(forged > 0)}
    tokens = sampled_tokens(trajectory)
    metrics |= {} if tokens is None else {"tokens": float(tokens)}
    metrics |= model_use(trajectory)
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise ConfigurationError(
                f"{name} must be a finite number; got {value} for question {question.id!r} of {set_name}. "
                "A reward or metric that is not defined must be left out, not given as such a value."
            )
    return {
        "schema_version": SCHEMA_VERSION,
        "set": set_name,
        "id": question.id,
        "sample": int(sample),
        "question": question.question,
        "golden_answers": list(question.golden_answers),
        "answer": trajectory.answer,
        "groups": question_groups(set_name, question),
        "metrics": metrics,
        "turns": _turns(trajectory.turns, question.supporting_titles),
        "terminated": trajectory.terminated,
        "truncated": trajectory.truncated,
        "retokenized": trajectory.retokenized,
    }


def time_row(set_name: str, sample: int, trajectory: Trajectory) -> dict[str, Any]:
    """``set, id, sample``, and ``seconds`` by part (``model, search, environment``): a batched call's time is shared equally by its episodes."""
    seconds = {name: float(value) for name, value in trajectory.seconds.items()}
    return {"set": set_name, "id": trajectory.question_id, "sample": int(sample), "seconds": seconds}


def question_groups(set_name: str, question: Question) -> dict[str, str | int]:
    """``type``, ``hops`` and ``level`` of a question, those of them that are known.

    Where the question does not say its hops, they are those of its set (:data:`HOPS`). 2WikiMultiHopQA's bridge comparisons have four (arXiv 2011.01060),
    and MuSiQue says the number in the type ("3hop1" is one of its two kinds of three hops).
    """
    groups: dict[str, str | int] = {}
    for name in GROUPS:
        value = question.metadata.get(name)
        if value is not None:
            groups[name] = value if isinstance(value, str | int) and not isinstance(value, bool) else str(value)
    hops = _MUSIQUE_TYPE.fullmatch(str(groups.get("type", "")))
    if hops is not None:
        groups.setdefault("hops", int(hops.group(1)))
    elif set_name in HOPS:
        groups.setdefault("hops", 4 if groups.get("type") == "bridge_comparison" else HOPS[set_name])
    return groups


def forged_tags(turns: Sequence[TurnSpan], dialect: Dialect) -> int:
    """How many tags that only the environment writes stand in the policy's own segments.

    These are the tags of the dialect round what was retrieved (``<information>`` and ``</information>``, R1-Searcher's ``<|begin_of_documents|>`` and
    ``<|end_of_documents|>``), each opening and each closing one counted. Only whole tags as the dialect writes them count: a tag that breaks off, has
    blanks in it or is in other letters, and one of another dialect, is text like any other, to a reader of the context as to the parser.
    """
    return sum(turn.segment.count(tag) for turn in turns for tag in (dialect.information_open, dialect.information_close))


def sampled_tokens(trajectory: Trajectory) -> int | None:
    """How many tokens a language model sampled into the context.

    None where the tokens there are not its own: those of scripts, baselines too, and those of text that was encoded again.
    """
    own = trajectory.logprobs is not None or "sampled_tokens" in trajectory.usage
    return int(trajectory.loss_mask.sum()) if own and not trajectory.retokenized else None


def model_use(trajectory: Trajectory) -> dict[str, float]:
    """``model_calls, prompt_tokens, generated_tokens``: what a language model did for an episode. Empty where none is known to have played.

    An agent whose model is asked beside the recorded tokens, or counts tokens itself, says so (``Trajectory.usage``), a baseline with ``failed_calls``, those
    that got no reply. Else, where a language model sampled the tokens, each segment is one call whose prompt is the whole context before it: what a server
    without a cache of earlier turns would read. Of text that was encoded again only the calls are known.
    """
    if trajectory.usage:
        names = {
            "calls": "model_calls",
            "failed_calls": "failed_calls",
            "prompt_tokens": "prompt_tokens",
            "generated_tokens": "generated_tokens",
        }
        return {name: float(trajectory.usage[key]) for key, name in names.items() if key in trajectory.usage}
    if trajectory.retokenized:
        return {"model_calls": float(len(trajectory.turns))}
    if trajectory.logprobs is None:
        return {}
    return {
        "model_calls": float(len(trajectory.turns)),
        "prompt_tokens": float(sum(turn.start for turn in trajectory.turns)),
        "generated_tokens": float(trajectory.loss_mask.sum()),
    }


def _turns(turns: Sequence[TurnSpan], supporting_titles: Sequence[str]) -> list[dict[str, Any]]:
    wanted, found = set(supporting_titles), set[str]()
    rows: list[dict[str, Any]] = []
    for turn in turns:
        row: dict[str, Any] = {"action": turn.action, "content": turn.content, "passages": [list(pair) for pair in turn.passages]}
        if wanted:
            found.update(title for _, title in turn.passages if title in wanted)
            row["title_recall"] = len(found) / len(wanted)
        rows.append(row)
    return rows


def _other_normaliser(answer: str | None, golden_answers: Sequence[str]) -> dict[str, float]:
    functions = {
        "em_r1_searcher": em_r1_searcher,
        "f1_r1_searcher": f1_r1_searcher,
        "sub_em_r1_searcher": sub_em_r1_searcher,
        "cover_em_squad": cover_em_squad,
    }
    return {name: measured(answer or "", golden_answers) for name, measured in functions.items()}
