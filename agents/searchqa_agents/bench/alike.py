"""Whether entries of the benchmark were measured alike: one suite, and for each task one version, budget, pair of references, environment, questions."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from searchqa_agents.bench.results import Entry, ScoreRun
from searchqa_agents.comparable import Difference, notes, refusals
from searchqa_envs.errors import SearchQAError

OF_THE_TASK = frozenset({"dialect", "prompt", "reward", "tokenizer", "model", "temperature"})
"""Parts of a stamp that an evaluation may choose, but that are the task's here."""

OF_THE_ALGORITHM = frozenset(
    {"algorithm", "algorithm_name", "settings", "plugin", "plugins", "plugin_sha256", "code", "configurations_tried"}
)
"""Parts of a stamp that are what is compared."""


REFERENCES_WITHIN = 0.02
"""References are measured with a policy that samples, which rounds otherwise on another machine: so much is told, and more refuses."""


class NotAlikeError(SearchQAError):
    """Results were asked for side by side that were not measured alike."""


@dataclass(frozen=True)
class Unlike:
    """A part in which an entry was not measured as the first one: on these tasks."""

    first: str
    name: str
    difference: Difference
    tasks: tuple[str, ...]

    def told(self) -> str:
        """In words."""
        where = f" [{', '.join(self.tasks)}]" if self.tasks else ""
        return f"{self.difference.told(self.name)}{where}"


def unlike(entries: Mapping[str, Entry]) -> tuple[list[Unlike], list[Unlike]]:
    """What refuses to put entries side by side, and what else differs and is only told; both against the first that has the task.

    Parameters
    ----------
    entries
        By name; the first is what the others are compared with.
    """
    names = list(entries)
    first = entries[names[0]]
    against = [
        Unlike(names[0], name, Difference("suite", first.suite, entry.suite), ())
        for name, entry in entries.items()
        if entry.suite != first.suite
    ]
    told: list[Unlike] = []
    models: dict[str, tuple[str, ScoreRun]] = {}
    found: dict[tuple[bool, str, str, str, str, str], tuple[Difference, list[str]]] = {}
    for name, entry in entries.items():
        for run in entry.runs:
            origin, model = models.setdefault(run.task, (name, run))
            for difference, matters in _differences(model, run):
                key = (matters, origin, name, difference.key, repr(difference.a), repr(difference.b))
                tasks = found.setdefault(key, (difference, []))[1]
                if run.task not in tasks:
                    tasks.append(run.task)
    for (matters, origin, name, *_), (difference, tasks) in found.items():
        (against if matters else told).append(Unlike(origin, name, difference, tuple(tasks)))
    return against, told


def _differences(model: ScoreRun, run: ScoreRun) -> Iterator[tuple[Difference, bool]]:
    """All differences of two runs on one task, each with whether it refuses."""
    for key in ("task_version", "budget"):
        a, b = getattr(model, key), getattr(run, key)
        if a != b:
            yield Difference(key, a, b), True
    for key, value in model.references.items():
        if value != run.references[key]:
            yield Difference(f"references.{key}", value, run.references[key]), abs(value - run.references[key]) > REFERENCES_WITHIN
    stamps = [_of_measuring(one.stamp) for one in (model, run)]
    for difference in refusals(*stamps):
        yield difference, True
    for difference in notes(*stamps):
        root = difference.key.partition(".")[0]
        if root != "seed":
            yield difference, root in OF_THE_TASK and not difference.unknown


def _of_measuring(stamp: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stamp.items() if key not in OF_THE_ALGORITHM}


def check_alike(against: Sequence[Unlike], allowed: Sequence[str]) -> None:
    """Raise ``NotAlikeError`` that lists what was not allowed to differ, with both values and the ways out."""
    refused = [one for one in against if not one.difference.allowed(allowed)]
    if not refused:
        return
    of_use = [key for key in allowed if any(one.difference.allowed([key]) for one in against)]
    keys = ",".join(dict.fromkeys([*of_use, *(one.difference.key for one in refused)]))
    names = ", ".join(dict.fromkeys(name for one in refused for name in (one.first, one.name)))
    lines = "\n".join(f"  {one.told()}" for one in refused)
    raise NotAlikeError(
        f"{names} were not measured alike, so their numbers are not comparable:\n{lines}\n"
        f"Run them again on one version of the tasks, or see them side by side all the same with --allow {keys} (or --allow all): "
        "the table then says what differs."
    )


def check_allowed(against: Sequence[Unlike], entries: Mapping[str, Entry], allowed: Sequence[str]) -> None:
    """Raise ``UsageError`` that names what is near for a key that is no part of what could differ."""
    from searchqa_agents.cli import UsageError

    known = {"all", "suite", "task_version", "budget", "references", "questions", "data", "budgets", *OF_THE_TASK}
    known |= {path for entry in entries.values() for run in entry.runs for path in _paths(run.stamp)} | {
        one.difference.key for one in against
    }
    for key in allowed:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=2, cutoff=0.6)
            hint = f" Nearest to it: {', '.join(near)}." if near else ""
            differing = ", ".join(dict.fromkeys(one.difference.key for one in against)) or "nothing"
            raise UsageError(f"--allow {key} names no part of these results.{hint} What differs is: {differing}.")


def _paths(stamp: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, part in stamp.items():
        yield f"{above}{key}"
        if isinstance(part, Mapping):
            yield from _paths(part, f"{above}{key}.")
