"""The one number of a finished run that a sweep looks for the best of: ``objective=`` names it, the run's files have it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from searchqa_agents.runs import SUMMARY_FILE
from searchqa_envs.errors import ConfigurationError, SearchQAError

SCORE_FILE = "score.json"


class ObjectiveError(SearchQAError):
    """A run's objective is not a number."""


def objective_of(path: Path, key: str | None = None) -> float:
    """The objective of the finished run in the folder ``path``.

    Parameters
    ----------
    key
        A measure: of a training run one of those after it, such as ``hops=2/greedy/em``; of an evaluation one of its metrics, such as ``f1``; of a
        benchmark's job a column of its points, such as ``em``. None: sampled exact match of the questions with most hops; exact match; the score at
        full budget.

    Raises
    ------
    ConfigurationError
        If the run has no such measure; the message lists those it has.
    ObjectiveError
        If it is not a number.
    """
    name, measures = _measures(path)
    if not measures:
        raise ConfigurationError(
            f"{path} has no measures, so that there is nothing to be an objective; `searchqa train`, `eval` and `bench` have some."
        )
    key = name if key is None else key
    if key not in measures:
        raise ConfigurationError(f"objective={key} is no measure of {path}. It has: {', '.join(measures)}.")
    value = measures[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ObjectiveError(f"The objective {key} of {path} is {value!r}, which is not a finite number.")
    return float(value)


def _measures(path: Path) -> tuple[str, Mapping[str, Any]]:
    """The name of the measure that counts where none is chosen, and all of them."""
    score = path / SCORE_FILE
    if score.is_file():
        last = json.loads(score.read_text(encoding="utf-8"))["points"][-1]
        return "score", last
    file = path / SUMMARY_FILE
    summary = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if summary.get("kind") == "eval":
        return "em", summary["metrics"]
    after = summary.get("measures", {}).get("after", {})
    return next((name for name in summary.get("titles", {}) if name.endswith("sampled/em")), "sampled/em"), after
