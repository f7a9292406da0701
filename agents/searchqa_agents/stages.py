"""Stages of one run: the settings of each, and when it ends.

Each stage is a training of its own, as the published recipes run them (R1-Searcher: two scripts, the second from the checkpoint of the first): it has
its own environment, a fresh optimiser and critic, the policy as it begins for its reference, and learning rates and other schedules over its own steps.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from searchqa_agents.algorithm import ALGORITHMS, AlgorithmConfig, check_settings, get_algorithm
from searchqa_agents.loading import make_venv, missing_data
from searchqa_agents.question_lists import read_question_ids
from searchqa_agents.rollout import episode_seed
from searchqa_agents.settings import EnvSettings, TrainSettings, WorldSettings, built, changed_arguments, structured
from searchqa_agents.supervised import SupervisedConfig
from searchqa_envs.errors import ConfigurationError

SUPERVISED = "sft"
"""the name of supervised fine-tuning among the algorithms"""
KEYS = ("name", "env", "algo", "questions", "until")
_SIZES: dict[str, int] = {}
"""Numbers of questions that were counted, by the environment's settings: a run asks several times."""
RULES = ({"steps"}, {"epochs"}, {"search_rate", "over"})


@dataclass(frozen=True)
class Stage:
    """One stage, all settings resolved.

    Attributes
    ----------
    number, of
        Its place, from 1, and how many there are.
    name
        Empty for the one stage of a run without ``stages``.
    env
        The run's environment with the stage's changes.
    changed
        Those changes.
    algorithm, config
        The algorithm's name and settings; ``config.steps`` is the most steps that the stage has.
    questions
        File with the questions to train on; None: all.
    ids
        Those questions.
    search_rate, over
        The stage ends once the mean of ``charts/search_rate`` over the last ``over`` rollouts is at least this; None: only by its steps.
    """

    number: int
    of: int
    name: str
    env: EnvSettings
    changed: Mapping[str, Any]
    algorithm: str
    config: Any
    questions: str | None = None
    ids: tuple[str, ...] = ()
    search_rate: float | None = None
    over: int = 1

    @property
    def last(self) -> bool:
        """Whether no stage follows."""
        return self.number == self.of

    @property
    def measured(self) -> str:
        """What the evaluation at its end is called: ``after``, or before another stage ``after <name>``."""
        return "after" if self.last else f"after {self.name}"


def stages_of(settings: TrainSettings) -> list[Stage]:
    """The stages of a run, in order; one without a name where ``stages`` is null. Raises ``ConfigurationError`` for settings that cannot be."""
    name, config = algorithm_of(settings)
    ids = _ids(settings.questions)
    if settings.questions is not None and name == SUPERVISED:
        raise ConfigurationError("questions is for algorithms that play episodes; supervised fine-tuning (algo=sft) has demonstrations.")
    if settings.stages is None:
        return [Stage(1, 1, "", settings.env, {}, name, config, settings.questions, ids)]
    rows = settings.stages
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ConfigurationError(f"stages must be a list of mappings with some of {list(KEYS)}, or null; got {rows!r}.")
    stages = [_stage(row, number, len(rows), settings) for number, row in enumerate(rows, start=1)]
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"Each stage needs a name of its own; got {names}.")
    return stages


def algorithm_of(settings: TrainSettings) -> tuple[str, Any]:
    """Name and configuration of the run's algorithm. Raises ``ConfigurationError`` for settings that cannot be."""
    name = settings.algo.name
    if name != type(settings.algo).__dataclass_fields__["name"].default:
        raise ConfigurationError(f"algo.name cannot be changed, because each algorithm has its own settings; write algo={name}.")
    return name, _checked(name, built(_config_class(name), settings.algo))


def _config_class(name: str) -> type[Any]:
    return SupervisedConfig if name == SUPERVISED else get_algorithm(name).config


def _checked(name: str, config: Any) -> Any:
    if name != SUPERVISED:
        check_settings(get_algorithm(name), config)
    return config


def _stage(row: Mapping[str, Any], number: int, of: int, settings: TrainSettings) -> Stage:
    key = f"stages.{number - 1}"
    for word in row:
        if word not in KEYS:
            raise ConfigurationError(f"{key} can have {list(KEYS)}; got {word!r}.")
    name = row.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,40}", name):
        raise ConfigurationError(f"{key}.name must be a word of letters, digits, dots and dashes, which files are named by; got {name!r}.")
    changed = changed_arguments(f"{key}.env", row.get("env"), settings.env)
    algorithm, config = _algorithm(f"{key}.algo", row.get("algo"), settings, number)
    questions = row.get("questions", settings.questions)
    if questions is not None and algorithm == SUPERVISED:
        raise ConfigurationError(f"{key}.questions is for algorithms that play episodes; supervised fine-tuning has demonstrations.")
    stage = Stage(number, of, name, replace(settings.env, **changed), changed, algorithm, config, questions, _ids(questions))
    return _until(f"{key}.until", row.get("until"), stage)


def _ids(file: str | None) -> tuple[str, ...]:
    return () if file is None else tuple(read_question_ids(file))


def _algorithm(key: str, changes: Any, settings: TrainSettings, number: int) -> tuple[str, Any]:
    """The run's algorithm with a stage's changes; under another name, with what the run says of all that every algorithm can be told, and those changes."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    changes = {} if changes is None else changes
    if not isinstance(changes, Mapping):
        raise ConfigurationError(f"{key} must be a mapping of the algorithm's settings, and may have its name; got {changes!r}.")
    own, _ = algorithm_of(settings)
    name = str(changes.get("name", own))
    if name != SUPERVISED and name not in ALGORITHMS:
        raise ConfigurationError(f"{key}.name must be one of {sorted([*ALGORITHMS, SUPERVISED])}; got {name!r}.")
    config_class = _config_class(name)
    known = {f.name for f in fields(config_class)}
    for word in changes:
        if word != "name" and word not in known:
            close = difflib.get_close_matches(str(word), known, n=1)
            raise ConfigurationError(f"{key}.{word} is not a setting of {name}.{f' Did you mean {close[0]}?' if close else ''}")
    values = {f.name: getattr(settings.algo, f.name) for f in fields(settings.algo) if f.name in known}
    if name != own:  # what only some have can mean another thing under the same name, such as credit
        common = {f.name for f in fields(AlgorithmConfig)}
        values = {word: value for word, value in values.items() if word in common}
    if number > 1:  # other questions and samples than in the stage before
        values["seed"] = episode_seed(settings.algo.seed, number)
    values |= {word: value for word, value in changes.items() if word != "name"}
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(structured(config_class)), values))
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"{key}: {str(error).splitlines()[0]}") from error
    return name, _checked(name, built(config_class, typed))


def _until(key: str, rule: Any, stage: Stage) -> Stage:
    """The stage with its end."""
    ways = "{steps: N}, {epochs: X}, or {search_rate: R, over: N}"
    if rule is None and (stage.last or getattr(stage.config, "epochs", None) is not None):
        return stage
    if not isinstance(rule, Mapping) or set(rule) not in RULES:
        raise ConfigurationError(f"{key} says when a stage that others follow ends: {ways}; got {rule!r}.")
    for name, value in rule.items():
        least: float = 1 if name in ("steps", "over") else 0
        whole = isinstance(value, int) if least else isinstance(value, (int, float))
        if isinstance(value, bool) or not whole or value < least or (not least and value <= 0) or (name == "search_rate" and value > 1):
            said = {"search_rate": "a share above 0, at most 1", "epochs": "a number above 0"}.get(name, "a whole number of at least 1")
            raise ConfigurationError(f"{key}.{name} must be {said}; got {value!r}.")
    if "steps" in rule:
        if getattr(stage.config, "epochs", None) is not None:
            raise ConfigurationError(
                f"{key}.steps and algo.epochs, from which steps follow, cannot both be given; got {rule['steps']} and {stage.config.epochs:g}."
            )
        return replace(stage, config=replace(stage.config, steps=rule["steps"]))
    if "epochs" in rule:
        if stage.algorithm == SUPERVISED:
            raise ConfigurationError(
                f"{key}.epochs counts how often questions are gone through; supervised fine-tuning has demonstrations: give algo.epochs, and no until."
            )
        steps = math.ceil(rule["epochs"] * (len(stage.ids) or _size(key, stage.env)) / stage.config.questions_per_step)
        return replace(stage, config=replace(stage.config, steps=steps))
    if stage.algorithm == SUPERVISED:
        raise ConfigurationError(f"{key}.search_rate needs an algorithm that plays episodes; supervised fine-tuning has demonstrations.")
    return replace(stage, search_rate=float(rule["search_rate"]), over=rule["over"])


def _size(key: str, env: EnvSettings) -> int:
    """How many questions a set has that is gone through in epochs."""
    way = "give questions=FILE, for the stage or the run"
    if isinstance(env, WorldSettings):
        raise ConfigurationError(
            f"{key}.epochs counts how often a list of questions is gone through, and those of generated worlds are drawn: {way}."
        )
    missing = missing_data(env)
    if missing is not None:
        raise ConfigurationError(
            f"{key}.epochs needs to know how many questions {missing} has, which is not on this machine. Fetch it with "
            f"`searchqa data download {missing}`, {way}, or say until={{steps: N}}."
        )
    budgets: dict[str, Any] = {
        "max_context_tokens": None,
        "max_segment_tokens": None,
        "max_observation_tokens": None,
    }  # of another tokenizer
    counted = replace(env, retriever="none", search_controls=None, tokenizer="byte", **budgets)
    if repr(counted) not in _SIZES:
        venv = make_venv(counted, 1)
        _SIZES[repr(counted)] = len(venv.unwrapped.source)
        venv.close()
    return _SIZES[repr(counted)]


class SearchRate:
    """Whether a policy searches often enough: the mean share of episodes that searched, over the last rollouts.

    It is told ``charts/search_rate`` of each step, and nothing else; a rollout whose back end was lost has none and is no rollout here. Fed with the
    lines of ``metrics.jsonl``, that of a resumed run is where it was.
    """

    def __init__(self, least: float, over: int) -> None:
        self.least = least
        self._recent: deque[float] = deque(maxlen=over)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take in a step."""
        if "charts/search_rate" in metrics:
            self._recent.append(metrics["charts/search_rate"])

    @property
    def mean(self) -> float | None:
        """None before there were enough rollouts."""
        return sum(self._recent) / len(self._recent) if len(self._recent) == self._recent.maxlen else None

    @property
    def reached(self) -> bool:
        """Whether it is time."""
        return self.mean is not None and self.mean >= self.least


def search_rate_of(stage: Stage, lines: Iterable[Mapping[str, Any]]) -> SearchRate | None:
    """What ends a stage, told the lines of it that there are so far; None where only its steps end it."""
    if stage.search_rate is None:
        return None
    rate = SearchRate(stage.search_rate, stage.over)
    for line in lines_of(stage, lines):
        rate.add(line)
    return rate


def lines_of(stage: Stage, lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of the lines of ``metrics.jsonl``, the steps of a stage."""
    return [line for line in lines if line["phase"] == "train" and line.get("charts/stage", 1) == stage.number]
