"""A training run in its folder: phases that log, save checkpoints, and go on where a killed run stopped.

A checkpoint holds the weights (as a plain ``from_pretrained`` folder, and once more in the trainer's state), critic, reference, optimisers, the number
of steps done, and the global random generators. Nothing else is needed to continue identically: questions, their order, samples and minibatches
are functions of the seed and the step; episodes end within a step, so that no environment is in the middle of one; learning rates and the
stages of rewards and retrievers are functions of the step, which trainers tell them (``set_progress``); alarms are fed with ``metrics.jsonl`` again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from searchqa_agents.alarms import AlarmConfig, Alarms
from searchqa_agents.algorithm import AlgorithmConfig
from searchqa_agents.collected import fitting
from searchqa_agents.demonstrations import Batches, fresh_demonstrations
from searchqa_agents.episode_text import sample_of
from searchqa_agents.evaluate import TOLD_THE_ANSWER, evaluate
from searchqa_agents.loading import (
    RANDOM,
    check_script,
    checkpoint_path,
    checkpoint_tokenizer,
    chosen_device,
    chosen_dtype,
    make_venv,
    missing_data,
    published_set,
    random_policy,
)
from searchqa_agents.lora import add_lora, has_lora
from searchqa_agents.lost_back_end import LostRollouts, check_measured, watched
from searchqa_agents.models import make_tiny_model
from searchqa_agents.optimisation import TrainingDivergedError, set_random_state
from searchqa_agents.parallel import Parallel, shared_rollout
from searchqa_agents.policy import Policy, Scorer
from searchqa_agents.progress import Advance, progress
from searchqa_agents.question_lists import ids_stamp, indices_of
from searchqa_agents.ranges import check_ranges
from searchqa_agents.rollout import draw_questions
from searchqa_agents.runs import Checkpoint, RunFolder, RunFolderError, list_checkpoints
from searchqa_agents.settings import EnvSettings, TrainSettings, WarmStartSettings, built, changed_arguments, check_at_least, env_arguments
from searchqa_agents.sft import SFTConfig, train_sft
from searchqa_agents.stages import SUPERVISED, SearchRate, Stage, lines_of, search_rate_of, stages_of
from searchqa_agents.supervised import train_supervised
from searchqa_agents.trainer import Until, train
from searchqa_agents.trajectory import Trajectory
from searchqa_agents.transformers_lm import NotANumberError
from searchqa_agents.warmup import WarmupConfig, train_warmup
from searchqa_agents.watching import check_watching
from searchqa_envs.datasets import DATASETS
from searchqa_envs.errors import ConfigurationError
from searchqa_retrievers.counted import added_counters, counted_since

if TYPE_CHECKING:
    from searchqa_agents.optimisation import OnCheckpoint, OnStep
    from searchqa_envs.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)

PHASES = ("warmup", "sft", "train")
STATE_FILE = "trainer.pt"


def prepare(settings: WarmStartSettings) -> None:
    """Check what can be checked before any data is loaded, and take over the tokenizer of the checkpoint that is started from."""
    check_ranges(built(WarmupConfig, settings.warmup), "warmup.")
    check_ranges(built(SFTConfig, settings.sft), "sft.")
    check_at_least(1, num_envs=settings.num_envs)
    check_at_least(0, max_lost_rollouts=settings.max_lost_rollouts)
    check_watching(settings)
    if isinstance(settings, TrainSettings):
        env_arguments(settings.env)
        for stage in stages_of(settings):
            env_arguments(stage.env)
            if stage.algorithm == SUPERVISED and getattr(stage.config, "trajectories", None) is None:
                check_script("algo.demonstrations", stage.config.demonstrations, settings.env, "env=world")
        built(AlarmConfig, settings.alarms)
        lora_arguments(settings)
        check_at_least(1, evaluation__questions=settings.evaluation.questions, keep_last=settings.keep_last)
        settings.evaluation.split = settings.evaluation.split or held_out_split(settings.env)
        env_arguments(settings.env, **measured_arguments(settings))
    start = start_of(settings)
    if start is None:
        instead = "env=world, start=<checkpoint>" if isinstance(settings, TrainSettings) else "env=world"
        check_script("demonstrations", settings.demonstrations, settings.env, instead)
    else:
        settings.env.tokenizer = settings.env.tokenizer or checkpoint_tokenizer(start)


def held_out_split(env: EnvSettings) -> str:
    """What training is measured on: test, or dev of a published set that has questions to train on and dev, but no test."""
    dataset = published_set(env)
    return "dev" if dataset is not None and "test" not in DATASETS[dataset].sizes else "test"


def measured_arguments(settings: TrainSettings) -> dict[str, Any]:
    """The environment arguments that differ when training is measured. Raises ``ConfigurationError`` for some that it does not know."""
    return changed_arguments("evaluation.env", settings.evaluation.env, settings.env, other_keys={"split": "write evaluation.split"})


def make_measured_venv(settings: TrainSettings, num_envs: int, **changed: Any) -> Any:
    """The vector environment that training is measured in; ``changed`` arguments win over ``evaluation.env``, and that over ``env``."""
    return make_venv(settings.env, num_envs, **{"split": settings.evaluation.split, **measured_arguments(settings), **changed})


def make_stage_venv(stage: Stage, venv: Any, num_envs: int) -> Any:
    """The vector environment of a stage: the run's own, ``venv``, where nothing differs, and one with its search engine where only the reward does."""
    if not stage.changed:
        return venv
    shared = {"retriever": venv.unwrapped.rules.retriever} if set(stage.changed) <= {"reward", "reward_weights"} else {}
    return make_venv(stage.env, num_envs, **shared)


def epoch_of(stage: Stage, venv: Any) -> Sequence[int] | None:
    """The indices of the questions that a stage goes through in epochs: those of its list, or all of its set; None: it draws from generated worlds.

    Raises ``ConfigurationError`` that names the first question of the list that is not there.
    """
    source = venv.unwrapped.source
    if stage.questions is not None:
        return indices_of(stage.ids, source, stage.questions)
    return None if getattr(source, "num_worlds", None) is not None else range(len(source))


def stages_stamp(settings: TrainSettings, stamp: Mapping[str, Any], venv: Any) -> dict[str, Any]:
    """What a run's stamp says of its lists of questions and its stages: of these, where they differ from the rest of the run, in ``venv``."""
    stages = stages_of(settings)
    if settings.stages is None:
        return {} if not stages[0].ids else {"questions": ids_stamp(stages[0].ids)}
    rows = []
    for stage in stages:
        own: dict[str, Any] = {}
        if stage.changed:
            stage_venv = make_stage_venv(stage, venv, 1)
            own = {key: value for key, value in stage_venv.unwrapped.stamp().items() if stamp.get(key) != value}
            stage_venv.close()
        listed = {"questions": ids_stamp(stage.ids)} if stage.ids else {}
        rows.append({"name": stage.name, "algorithm": stage.algorithm, **own, **listed})
    return {"stages": rows}


def start_of(settings: WarmStartSettings) -> str | None:
    """The checkpoint that is started from; None: from nothing."""
    return settings.start if isinstance(settings, TrainSettings) and settings.start != "nothing" else None


def check_phases(settings: WarmStartSettings, venv: Any) -> None:
    """Find before the first step what would fail after minutes: no held-out split, no demonstrations for these questions, no back end for them."""
    if isinstance(settings, TrainSettings):
        make_measured_venv(settings, 1).close()
        for stage in stages_of(settings):
            stage_venv = make_stage_venv(stage, venv, 1)
            epoch_of(stage, stage_venv)
            if stage.algorithm == SUPERVISED and stage.config.trajectories is not None:
                fitting(stage.config.collected(), stage_venv)
            if stage_venv is not venv:
                stage_venv.close()
    if start_of(settings) is None:
        check_measured(demonstrations(settings, venv)(0), "a look at the demonstrations")


def check_start(settings: WarmStartSettings) -> str | None:
    """Raise what a real start would, writing nothing. Returns the data set that would have to be downloaded first, if any."""
    prepare(settings)
    missing = missing_data(settings.env)
    if missing is None:
        venv = make_venv(settings.env, settings.num_envs)
        check_phases(settings, venv)
        first_policy(settings, venv.unwrapped.tokenizer)
        venv.close()
    return missing


def demonstrations(settings: WarmStartSettings, venv: Any) -> Batches:
    """The batches of supervised fine-tuning."""
    sft = built(SFTConfig, settings.sft)
    return fresh_demonstrations(venv, settings.demonstrations, batch_size=sft.batch_size, seed=sft.seed, num_worlds=sft.num_worlds)


def first_policy(settings: WarmStartSettings, tokenizer: Tokenizer) -> Policy:
    """The policy of the checkpoint that is started from, or a new one; with ``lora``, with adapters."""
    disable_progress_bar()  # type: ignore[no-untyped-call] # transformers' own, of files that are read and written in a moment
    start, device, dtype = start_of(settings), chosen_device(settings.device), chosen_dtype(settings.dtype)
    lora = lora_arguments(settings) if isinstance(settings, TrainSettings) else {}
    if start == RANDOM and isinstance(settings, TrainSettings):
        policy = random_policy(settings.random, tokenizer, settings.seed, dtype=dtype, device=device)
    elif start is not None:
        policy = Policy.load(checkpoint_path(start), tokenizer, dtype=dtype, device=device)
    else:
        shape: dict[str, Any] = vars(settings.model)
        ids = {"pad_id": tokenizer.pad_id, "eos_id": tokenizer.eos_id}
        policy = Policy(make_tiny_model(tokenizer.vocab_size, settings.seed, **ids, dtype=dtype, device=device, **shape), tokenizer)
    if lora:
        add_lora(policy, seed=settings.seed, **lora)
    return policy


def lora_arguments(settings: TrainSettings) -> dict[str, Any]:
    """What to call ``add_lora`` with; empty without LoRA. Raises ``ConfigurationError`` for names that it does not know."""
    known = ("rank", "alpha", "target_modules")
    if settings.lora is None:
        return {}
    if start_of(settings) is None:
        raise ConfigurationError(
            "lora trains adapters of a checkpoint's model: give start=shipped, start=<folder>, start=<owner/model> or start=random too."
        )
    if not isinstance(settings.lora, Mapping) or not settings.lora or not set(settings.lora) <= set(known):
        raise ConfigurationError(
            f"lora must be a mapping with some of {list(known)}, such as {{rank: 16, alpha: 32}}; got {settings.lora!r}."
        )
    for name, whole in (("rank", True), ("alpha", False)):
        value = settings.lora.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not (value >= 1 if whole else value > 0):
            raise ConfigurationError(
                f"lora.{name} must be {'a whole number of at least 1' if whole else 'a number above 0'}; got {value!r}."
            )
    return {str(key): value for key, value in settings.lora.items()}


class Training:
    """The phases of one run. Each ``run_*`` method trains ``policy`` in place, skips what the last checkpoint has behind it, and logs."""

    def __init__(self, settings: WarmStartSettings, folder: RunFolder, venv: Any) -> None:
        checkpoints = list_checkpoints(folder.path)
        self.settings = settings
        self.warmup, self.sft = built(WarmupConfig, settings.warmup), built(SFTConfig, settings.sft)
        self.alarms: Alarms | None = None
        self.folder = folder
        self.venv = venv
        self.last: Checkpoint | None = checkpoints[-1] if checkpoints else None
        if self.last is not None:
            logger.warning("Going on from %s.", self.last.path)
        check_phases(settings, venv)
        folder.rewind(self.last)
        self.policy = first_policy(settings, venv.unwrapped.tokenizer)
        self.stages: list[dict[str, Any]] = []
        """of the stages that have ended: their name, first and last step, and why they ended"""
        self.saved: Path | None = self.last.path if self.last is not None else None
        self._counted = self._counters()
        self._lost: LostRollouts | None = None  # of demonstrations

    # -- phases --------------------------------------------------------------------------------------------------------------------------

    def run_warmup(self) -> None:
        """Induction warm-up."""
        config = self.warmup
        with self._phase("warmup", config.max_steps, "losses/warmup_loss", "induction warm-up (at most)") as (
            state,
            on_step,
            on_checkpoint,
        ):
            looks = [line for line in self.folder.metrics() if "losses/shuffled_loss" in line]
            copied = looks and max(looks[-1]["losses/copying_loss"], looks[-1]["losses/shuffled_loss"]) < config.target_loss
            if state is not None and copied:
                self.policy.load_weights(state["model"])  # it was finished; only its end was not noted
            elif not self._behind("warmup"):
                train_warmup(self.policy, config, on_step=on_step, on_checkpoint=on_checkpoint, state=state)

    def run_sft(self) -> None:
        """Supervised fine-tuning on scripted demonstrations. Its last checkpoint is kept."""
        config = self.sft
        with self._phase("sft", config.steps, "losses/sft_loss", "fine-tuning on demonstrations") as (state, on_step, on_checkpoint):
            if not self._behind("sft"):
                batches = watched(demonstrations(self.settings, self.venv), self._count_lost(config.steps, state))
                train_sft(self.policy, batches, config, on_step=on_step, on_checkpoint=on_checkpoint, state=state)

    def lead(self, stamp: Mapping[str, Any], parallel: Parallel) -> None:
        """Tell the other processes where the run stands; from here on they do the same (:func:`follow`). Before, they wait."""
        begun = self.last is not None and self.last.phase == "train"
        file = str(self.last.path / STATE_FILE) if self.last is not None and begun else None
        parallel.broadcast((dict(stamp), file, self.folder.metrics() if begun else []))
        parallel.broadcast_weights(self.policy.scorer)

    def run_algorithm(
        self, settings: TrainSettings, stamp: Mapping[str, Any], parallel: Parallel, title: str
    ) -> dict[str, dict[str, float]]:
        """The algorithm that the run is about, in all its stages; returns what was measured after each: ``after``, before that ``after <stage>``."""
        self.alarms = alarms = Alarms(built(AlarmConfig, settings.alarms), self.venv.unwrapped.rules.max_turns)
        begun = self.last is not None and self.last.phase == "train"
        saved = load_state(self.last.path / STATE_FILE) if self.last is not None and begun else None
        position, lines, measures = Position.of(saved), self.folder.metrics(), {}
        self.stages = [dict(row) for row in position.ended]
        for stage in stages_of(settings):
            venv = make_stage_venv(stage, self.venv, settings.num_envs)
            alarms.begin(venv.unwrapped.rules.max_turns)
            for line in lines_of(stage, lines):
                alarms.update(line["step"], line)
            if position.goes_on(stage):
                del self.stages[stage.number - 1 :]  # it had ended, and goes on with more steps
                own_title = f"{title if stage.algorithm == settings.algo.name else stage.algorithm}, {stage.name}" if stage.name else title
                state = position.state_of(stage, saved)
                self._run_stage(settings, stage, venv, state, search_rate_of(stage, lines), stamp, parallel, own_title)
            elif position.number == stage.number and saved is not None:
                resume_at_switch(self.policy, saved)
            if venv is not self.venv:
                venv.close()
            measures[stage.measured] = self.measure(settings, stage.measured, stamp, parallel, again=position.number <= stage.number)
        return measures

    def _run_stage(
        self,
        settings: TrainSettings,
        stage: Stage,
        venv: Any,
        state: Mapping[str, Any] | None,
        rate: SearchRate | None,
        stamp: Mapping[str, Any],
        parallel: Parallel,
        title: str,
    ) -> None:
        config, before = stage.config, self.stages[-1]["last_step"] if self.stages else 0
        run_venv, self.venv = self.venv, venv
        self._counted = self._counters()

        def on_rollout(step: int, trajectories: Sequence[Trajectory]) -> None:
            number = before + step + 1
            kept = bool(settings.rollouts_every) and number % settings.rollouts_every == 0
            if kept:
                self.folder.write_trajectories(f"rollouts-{number:06d}", trajectories)
            sample = sample_of(trajectories, number)
            if sample is not None:
                self.folder.show_episode("train", number, sample, kept=kept)

        def on_search(step: int, counters: Mapping[str, float]) -> None:
            self.folder.log_searches("train", before + step + 1, counters)
            self._counted = self._counters()

        shown = "losses/sft_loss" if stage.algorithm == SUPERVISED else "charts/search_rate" if rate is not None else "charts/em"
        try:
            with self._phase("train", config.steps, shown, title, (stage, before, rate)) as (_, on_step, on_checkpoint):
                hooks: dict[str, Any] = {"on_step": on_step, "on_checkpoint": on_checkpoint, "state": state}
                if state is not None and stage.algorithm != SUPERVISED:
                    check_reference(state, config, self.policy)
                if state is None:
                    forget_value_head(self.policy)
                if stage.algorithm == SUPERVISED:
                    train_supervised(self.policy, venv, config, lost=self._count_lost(config.steps, state), **hooks)
                else:
                    hooks |= {"on_rollout": on_rollout, "on_search": on_search, "max_lost_rollouts": settings.max_lost_rollouts}
                    hooks |= {"questions": epoch_of(stage, venv), "until": until_of(rate)}
                    train(self.policy, venv, stage.algorithm, config, stamp=stamp_in(stage, venv, stamp), parallel=parallel, **hooks)
        finally:
            self.venv = run_venv
            self._counted = self._counters()

    def _count_lost(self, steps: int, state: Mapping[str, Any] | None) -> LostRollouts:
        self._lost = LostRollouts(self.settings.max_lost_rollouts, steps - (0 if state is None else int(state["steps_done"])))
        return self._lost

    def _watch(self, step: int, metrics: Mapping[str, float], advance: Advance) -> dict[str, float]:
        """Warn of what the alarms see, keep the checkpoint from before it; returns a metric for each alarm."""
        new = self.alarms.update(step, metrics) if self.alarms is not None else []
        for alarm in new:
            kept = self.folder.keep_checkpoint(alarm.since, "train")
            where = f" The checkpoint from before is kept: {kept.path}" if kept is not None else ""
            text = f"Step {step}: {alarm.message}{where}"
            logger.info("Alarm, %s. %s", alarm.name, text)
            advance.say(f"Warning: {text}")
        return {f"alarms/{alarm.name.replace(' ', '_')}": 1.0 for alarm in new}

    def _counters(self) -> Mapping[str, float]:
        counters: Mapping[str, float] = self.venv.unwrapped.search_counters().sums
        return counters

    def _log_searches(self, phase: str, step: int) -> None:
        """Log what was searched since the last time, as demonstrations do."""
        now = self._counters()
        self.folder.log_searches(phase, step, counted_since(now, self._counted))
        self._counted = now

    def _behind(self, phase: str) -> bool:
        return self.last is not None and PHASES.index(self.last.phase) > PHASES.index(phase)

    @contextmanager
    def _phase(
        self, phase: str, steps: int, shown: str, title: str, staged: tuple[Stage, int, SearchRate | None] | None = None
    ) -> Iterator[tuple[Mapping[str, Any] | None, OnStep, OnCheckpoint]]:
        """Where the phase begins (a trainer's state or None), and its hooks. ``staged``: the stage, the steps before it, and what ends it."""
        stage, before, rate = staged or (None, 0, None)
        state = None
        if staged is None and self.last is not None and self.last.phase == phase:
            state = load_state(self.last.path / STATE_FILE)
        latest: dict[str, float] = {}

        with progress(title, steps) as advance:

            def on_step(step: int, metrics: Mapping[str, float]) -> None:
                latest.clear()  # a step whose back end was lost has no exact match
                latest.update(metrics)
                alarms = self._watch(before + step, metrics, advance) if phase == "train" else {}
                lost = {} if self._lost is None or not self._lost.episodes else {"charts/backend_errors": float(self._lost.episodes)}
                place = {"charts/stage": stage.number, "stage": stage.name} if stage is not None and stage.name else {}
                self.folder.log(phase, before + step, {**metrics, **lost, **alarms, **place})
                self._log_searches(phase, before + step)
                advance(step, f"{shown.rpartition('/')[2].replace('_', ' ')} {metrics.get(shown, float('nan')):.3f}")

            def on_checkpoint(step: int, trainer_state: Mapping[str, Any]) -> None:
                if self._lost is not None and self._lost.in_a_row and step < steps:
                    return  # these steps are taken again by a run that stops for it
                check_finite(trainer_state["model"], before + step)
                place, switches = {}, False
                if stage is not None and stage.name:
                    ended = end_of(stage, before, step, rate)
                    if ended is not None:
                        self.stages.append(ended)
                        self._tell_end(stage, ended, rate, advance)
                    place = {"stage": stage.number, "stages": self.stages}
                    switches = ended is not None and not stage.last

                def write(path: Path) -> None:
                    save_policy(self.policy, path)
                    save_state(path / STATE_FILE, {**trainer_state, **place})

                keep = (phase == "sft" and step == steps) or switches
                saved = self.folder.save_checkpoint(phase, before + step, write, score=latest.get("charts/em"), keep=keep)
                self.saved = saved.path

            try:
                yield state, on_step, on_checkpoint
            except (TrainingDivergedError, NotANumberError) as error:
                group = "algo" if phase == "train" else phase
                learning_rate = getattr(self.settings, group).learning_rate
                own = stage is not None and stage.config.learning_rate != learning_rate  # the stage's, which cannot change during a run
                raise type(error)(
                    f"{error} {self.folder.way_on(*([] if own else [f'{group}.learning_rate={learning_rate / 2:g}']))}"
                ) from error
            finally:
                self._lost = None

    def _tell_end(self, stage: Stage, ended: Mapping[str, Any], rate: SearchRate | None, advance: Advance) -> None:
        """Say that a stage has ended, and why; a rate that was not reached is a warning."""
        text = f"Stage {stage.number} of {stage.of}, {stage.name}, ends after step {ended['last_step']}: {ended['reason']}."
        missed = rate is not None and not rate.reached
        (logger.warning if missed else logger.info)(text)
        if not missed:  # a warning is shown by itself
            advance.say(text)

    # -- measuring -----------------------------------------------------------------------------------------------------------------------

    def measure(
        self, settings: TrainSettings, when: str, stamp: Mapping[str, Any], parallel: Parallel, *, again: bool = True
    ) -> dict[str, float]:
        """Evaluate the policy on questions it never trains on; logs, saves trajectories, and returns the measures by key.

        Keys: ``hops=2/sampled/em`` (or ``sampled/em`` where the set knows no hops), greedy likewise, ``.../off/em`` with the retriever off.
        Not ``again``: it was measured before the run was stopped, and is read.
        """
        name = when.replace(" ", "-")
        file = self.folder.path / f"{name}.json"
        if not again or (when == "before" and self.last is not None and self.last.phase == "train"):
            if not file.is_file():  # the policy it measured is gone
                raise RunFolderError(f"{file} is missing: this run cannot be continued. Begin a new one.")
            values: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
            return values
        if when != "before":
            parallel.broadcast_weights(self.policy.scorer)  # an algorithm of one process may have trained it
        measures, trajectories, searched = measured(self.policy, settings, f"evaluation, {when}", {**stamp, "measured": when}, parallel)
        self.folder.log_searches(name, 0, searched)
        self.folder.write_json(f"{name}.json", measures)
        self.folder.log(name, 0, measures)
        if trajectories:
            self.folder.write_trajectories(name, trajectories)
        return measures


class Position(NamedTuple):
    """Where the state of the last checkpoint stands: the stage, whether it has ended, and the stages that have."""

    number: int
    steps_done: int
    ended: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, state: Mapping[str, Any] | None) -> Position:
        """That of a trainer's state; None: before the first stage."""
        return cls(0, 0, ()) if state is None else cls(state.get("stage", 1), state["steps_done"], state.get("stages", ()))

    def goes_on(self, stage: Stage) -> bool:
        """Whether steps of a stage are still to be taken."""
        if self.number != stage.number:
            return self.number < stage.number
        row = self.ended[-1] if len(self.ended) == stage.number else None
        if row is None:
            return True
        return stage.last and not row["reached"] and self.steps_done < stage.config.steps  # the line that goes on may ask for more steps

    def state_of(self, stage: Stage, state: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """The state, if it is of this stage."""
        return state if self.number == stage.number else None


def end_of(stage: Stage, before: int, step: int, rate: SearchRate | None) -> dict[str, Any] | None:
    """What is noted of a stage that ends after so many of its steps; None if it goes on."""
    reached = rate is not None and rate.reached
    if not reached and step < stage.config.steps:
        return None
    reason = f"all of its {stage.config.steps} steps are done"
    if rate is not None:
        told = f"the search rate is {'unknown' if rate.mean is None else f'{rate.mean:.3f}'} over the last {stage.over} rollouts"
        reason = f"{told}, at least {stage.search_rate:g}" if reached else f"{told}, and {stage.search_rate:g} was never reached; {reason}"
    row = {
        "name": stage.name,
        "algorithm": stage.algorithm,
        "seed": stage.config.seed,
        "first_step": before + 1,
        "last_step": before + step,
    }
    return {**row, "reached": reached, "reason": reason}


def until_of(rate: SearchRate | None) -> Until | None:
    """What tells a trainer that the rate is reached."""
    if rate is None:
        return None

    def until(step: int, metrics: Mapping[str, float]) -> bool:
        rate.add(metrics)
        return rate.reached

    return until


def stamp_in(stage: Stage, venv: Any, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """The stamp of what is played in a stage."""
    return {**stamp, **venv.unwrapped.stamp(), "algorithm": stage.algorithm, "stage": stage.name} if stage.name else dict(stamp)


def resume_at_switch(policy: Policy, state: Mapping[str, Any]) -> None:
    """Give the policy what it was when a stage ended."""
    policy.load_weights(state["model"])
    set_random_state(state["random"])


def forget_value_head(policy: Policy) -> None:
    """A stage's critic begins anew, also one that shares the policy's trunk."""
    assert isinstance(policy.scorer, Scorer)
    policy.scorer.value_head = None


def follow(settings: TrainSettings, parallel: Parallel) -> None:
    """What the processes beside the first do: their part of the evaluations and of the algorithm's training, in step with it."""
    venv = make_venv(settings.env, settings.num_envs)
    policy = first_policy(settings, venv.unwrapped.tokenizer)
    nothing: tuple[dict[str, Any], str | None, list[Any]] = ({}, None, [])
    stamp, file, lines = parallel.broadcast(nothing)
    parallel.broadcast_weights(policy.scorer)
    if file is None:
        measured(policy, settings, "", stamp, parallel)
    saved = None if file is None else load_state(Path(file))
    position = Position.of(saved)
    for stage in stages_of(settings):
        if position.goes_on(stage) and stage.algorithm != SUPERVISED:  # which one process does
            own = make_stage_venv(stage, venv, settings.num_envs)
            state = position.state_of(stage, saved)
            if state is None:
                forget_value_head(policy)
            # a hook that writes nothing: all processes together make the state that the first one saves
            hooks: dict[str, Any] = {"on_checkpoint": lambda step, state: None, "max_lost_rollouts": settings.max_lost_rollouts}
            hooks |= {"questions": epoch_of(stage, own), "until": until_of(search_rate_of(stage, lines))}
            train(policy, own, stage.algorithm, stage.config, state=state, stamp=stamp_in(stage, own, stamp), parallel=parallel, **hooks)
        if position.number <= stage.number:
            parallel.broadcast_weights(policy.scorer)
            measured(policy, settings, "", stamp, parallel)
    venv.close()


def check_reference(state: Mapping[str, Any], config: AlgorithmConfig, policy: Policy) -> None:
    """Raise ``ConfigurationError`` if a KL term is asked for that the run was begun without: the policy that it refers to is gone."""
    if config.kl_coef and "reference" not in state and not has_lora(policy.model):
        raise ConfigurationError(
            f"This run was begun with algo.kl_coef=0, so that its checkpoints hold no reference policy; got algo.kl_coef={config.kl_coef}. Begin a "
            "new run with start=<one of its checkpoints>, which is then the reference."
        )


def load_state(file: Path) -> Mapping[str, Any]:
    """A trainer's state, on the CPU; optimisers bring it to where their parameters are."""
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def save_state(file: Path, state: Mapping[str, Any]) -> None:
    """``torch.save``, but a write that fails is an ``OSError`` with its cause, which torch hides behind a ``RuntimeError``."""
    with file.open("wb") as opened:
        try:
            torch.save(dict(state), opened)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def save_policy(policy: Policy, folder: Path) -> None:
    """``policy.save``; a write that fails is an ``OSError``, which safetensors replaces by an error of its own."""
    try:
        policy.save(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def check_finite(weights: Mapping[str, torch.Tensor], step: int) -> None:
    """Raise ``TrainingDivergedError`` for weights that are not all finite: they must not replace a good checkpoint."""
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise TrainingDivergedError(
            f"Training has diverged: after step {step}, {len(bad)} of {len(weights)} weights are not finite, first {bad[0]}; they are not saved."
        )


def measured(
    policy: Policy, settings: TrainSettings, title: str, stamp: Mapping[str, Any], parallel: Parallel
) -> tuple[dict[str, float], list[Trajectory], dict[str, float]]:
    """Measures by key, the sampled trajectories that are worth keeping, and what was searched; the same in all processes, which share the questions."""
    evaluation = settings.evaluation
    held_out = make_measured_venv(settings, settings.num_envs)
    groups: list[Any] = sorted(held_out.unwrapped.source.stamp().get("hops") or [], reverse=True) or [None]
    held_out.close()
    plan: list[tuple[Any, str, float]] = [(hops, mode, t) for hops in groups for mode, t in (("sampled", 1.0), ("greedy", 0.0))]
    plan.append((groups[0], "off", 1.0))
    measures: dict[str, float] = {}
    kept: list[Trajectory] = []
    searched: dict[str, float] = {}
    with progress(title, len(plan), None if parallel.main else Console(quiet=True)) as advance:
        for done, (hops, mode, temperature) in enumerate(plan):
            changed: dict[str, Any] = {} if hops is None else {"hops": hops}
            venv = make_measured_venv(settings, settings.num_envs, **changed, **({"retriever": "none"} if mode == "off" else {}))
            source = venv.unwrapped.source
            told = {"told_the_answer": True} if venv.unwrapped.rules.needs_gold else {}
            if told and done == 0 and parallel.main:
                logger.warning("%s: %s", title, TOLD_THE_ANSWER)
            questions = draw_questions(source, min(evaluation.questions, len(source)), seed=evaluation.seed)
            found = evaluate(
                venv,
                policy,
                questions,
                temperature=temperature,
                seed=evaluation.seed,
                stamp={**stamp, **venv.unwrapped.stamp(), **told},
                play=partial(shared_rollout, parallel),
            )
            searched = added_counters(searched, venv.unwrapped.search_counters().sums)
            venv.close()
            prefix = mode if hops is None else f"hops={hops}/{mode}"
            check_measured(found.trajectories, f"the evaluation {prefix}")
            measures |= {f"{prefix}/{name}": found.metrics[name] for name in ("em", "f1", "searches", "reward") if name in found.metrics}
            if found.metrics["backend_errors"]:
                measures[f"{prefix}/backend_errors"] = found.metrics["backend_errors"]
            if mode == "sampled":
                kept += found.trajectories[: evaluation.save // len(groups)]
            advance(done + 1, f"{prefix} em {found.metrics.get('em', 0.0):.3f}")
    return measures, kept, parallel.summed(searched)


def table_of(measures: Mapping[str, Mapping[str, float]]) -> tuple[dict[str, str], list[str], list[list[str]]]:
    """Titles by key, columns and rows of the table at the end."""
    from searchqa_agents.table import number

    titles: dict[str, str] = {}
    keys = list(measures["after"])
    prefixes = sorted({key.rpartition("/")[0].rpartition("/")[0] for key in keys}, reverse=True)  # most hops first
    for prefix in prefixes:
        hops = f"{prefix.removeprefix('hops=')}-hop " if prefix else ""
        start = f"{prefix}/" if prefix else ""
        titles[f"{start}sampled/em"] = f"{hops}exact match, sampled (T=1)"
        titles[f"{start}greedy/em"] = f"{hops}exact match, greedy"
        titles[f"{start}sampled/searches"] = f"searches per {hops}question, sampled"
        titles[f"{start}off/em"] = f"{hops}exact match, sampled, retriever off"
    titles = {key: title for key, title in titles.items() if key in keys}
    rows = [[title, *(number(measures[when].get(key)) for when in ("before", "after"))] for key, title in titles.items()]
    lost = {when: sum(value for key, value in values.items() if key.endswith("/backend_errors")) for when, values in measures.items()}
    if any(lost.values()):
        rows.append(["episodes that lost the search back end, left out", *(f"{lost[when]:.0f}" for when in ("before", "after"))])
    return titles, ["held-out questions", "before", "after"], rows
