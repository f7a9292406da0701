"""The settings of a benchmark job, and how its policy is measured: the task's held-out questions, with what no search and the oracle reach on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from searchqa_agents.evaluate import evaluate
from searchqa_agents.language_model import LanguageModel
from searchqa_agents.loading import make_venv
from searchqa_agents.question_lists import ids_stamp
from searchqa_agents.rollout import draw_questions
from searchqa_agents.scripted import ScriptedAgent
from searchqa_agents.settings import EnvSettings, RunSettings, changed_arguments
from searchqa_agents.trajectory import Trajectory
from searchqa_envs.errors import ConfigurationError


@dataclass
class TaskSettings:
    """A task of a suite; a change of any of these makes a new version."""

    name: str = MISSING
    version: int = MISSING
    summary: str = MISSING
    start: str = MISSING
    budget: int = MISSING
    """tokens that the policy may sample in training"""
    questions_per_step: int = 8
    """questions of a rollout, of which each algorithm plays a group, where neither the line nor the algorithm's own defaults say another number"""
    measured: Any = field(default_factory=dict)
    """arguments of the environment that differ when it is measured; with ``split``"""
    questions: int = 200
    question_seed: int = 2000
    """draws the held-out questions, and the samples on them"""
    temperature: float = 1.0


@dataclass
class BenchSettings(RunSettings):
    """``searchqa bench``. ``algo`` is the algorithm's own configuration."""

    suite: str = MISSING
    task: TaskSettings = field(default_factory=TaskSettings)
    env: EnvSettings = MISSING
    algo: Any = MISSING
    plugins: list[str] = field(default_factory=list)
    num_envs: int = MISSING
    keep_last: int = MISSING
    save: int = MISSING
    dashboard: str = "off"
    wandb: Any = None


class HeldOut:
    """The questions that a task is measured on, and everything needed to play them again and again, always in the same way.

    Raises
    ------
    ConfigurationError
        The oracle is no better than a policy that cannot search: no score can be made of such a task.
    """

    def __init__(self, settings: BenchSettings) -> None:
        task = settings.task
        changed = changed_arguments("task.measured", task.measured, settings.env, other_keys={})
        if not changed.get("split"):
            raise ConfigurationError("task.measured must name the split whose questions training never sees, such as {split: test}.")
        self.settings = settings
        self.arguments = changed
        self.venv = make_venv(settings.env, settings.num_envs, **changed)
        source = self.venv.unwrapped.source
        self.questions = draw_questions(source, min(task.questions, len(source)), seed=task.question_seed)

    def measure(self, model: LanguageModel, stamp: Mapping[str, Any] | None = None) -> tuple[dict[str, float], list[Trajectory]]:
        """Means over the held-out questions, each played once, and the trajectories."""
        return self._play(self.venv, model, stamp)

    def references(self, start: LanguageModel) -> dict[str, float]:
        """Exact match of ``no_search``, the policy as training begins with a search engine that finds nothing, and of the ``oracle``.

        The oracle searches its way to the answer where questions have a gold chain, as those of the world; elsewhere it is told the answer.
        """
        off = make_venv(self.settings.env, self.settings.num_envs, **{**self.arguments, "retriever": "none"})
        has_chain = bool(self.venv.unwrapped.source[self.questions[0]].metadata.get("chain"))
        oracle = ScriptedAgent.for_env("oracle" if has_chain else "answer", self.venv)
        try:
            no_search = self._play(off, start)[0]["em"]
        finally:
            off.close()
        best = self._play(self.venv, oracle)[0]["em"]
        if best <= no_search:
            raise ConfigurationError(
                f"Task {self.settings.task.name}: the oracle reaches {best:.3f} and no search {no_search:.3f}, so that no score can be made of it; "
                "choose an environment in which searching helps."
            )
        return {"no_search": no_search, "oracle": best}

    def stamp(self) -> dict[str, Any]:
        """What of the measuring makes numbers comparable."""
        source = self.venv.unwrapped.source
        own = {"split": self.arguments["split"], "questions": ids_stamp([source[index].id for index in self.questions])}
        environment = self.venv.unwrapped.stamp()
        return {**environment, **own, "seed": self.settings.task.question_seed, "temperature": self.settings.task.temperature}

    def close(self) -> None:
        """Close the environment."""
        self.venv.close()

    def _play(self, venv: Any, model: LanguageModel, stamp: Mapping[str, Any] | None = None) -> tuple[dict[str, float], list[Trajectory]]:
        task = self.settings.task
        found = evaluate(venv, model, self.questions, temperature=task.temperature, seed=task.question_seed, stamp=stamp)
        return found.metrics, found.trajectories
