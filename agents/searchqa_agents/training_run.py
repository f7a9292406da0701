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
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from searchqa_agents.alarms import AlarmConfig, Alarms
from searchqa_agents.algorithm import AlgorithmConfig, check_settings, get_algorithm
from searchqa_agents.demonstrations import Batches, fresh_demonstrations
from searchqa_agents.evaluate import evaluate
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
from searchqa_agents.optimisation import TrainingDivergedError
from searchqa_agents.parallel import Parallel, shared_rollout
from searchqa_agents.policy import Policy
from searchqa_agents.progress import Advance, progress
from searchqa_agents.rollout import draw_questions
from searchqa_agents.runs import Checkpoint, RunFolder, RunFolderError, list_checkpoints
from searchqa_agents.settings import EnvSettings, TrainSettings, WarmStartSettings, built, changed_arguments, check_at_least
from searchqa_agents.sft import SFTConfig, train_sft
from searchqa_agents.supervised import SupervisedConfig, train_supervised
from searchqa_agents.trainer import train
from searchqa_agents.trajectory import Trajectory
from searchqa_agents.transformers_lm import NotANumberError
from searchqa_agents.warmup import WarmupConfig, train_warmup
from searchqa_envs.datasets import DATASETS
from searchqa_envs.errors import ConfigurationError
from searchqa_retrievers.counted import added_counters, counted_since

if TYPE_CHECKING:
    from searchqa_agents.optimisation import OnCheckpoint, OnStep
    from searchqa_envs.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)

PHASES = ("warmup", "sft", "train")
STATE_FILE = "trainer.pt"
SUPERVISED = "sft"
"""the name of supervised fine-tuning among the algorithms"""


def prepare(settings: WarmStartSettings) -> None:
    """Check what can be checked before any data is loaded, and take over the tokenizer of the checkpoint that is started from."""
    built(WarmupConfig, settings.warmup)
    built(SFTConfig, settings.sft)
    check_at_least(1, num_envs=settings.num_envs)
    check_at_least(0, max_lost_rollouts=settings.max_lost_rollouts)
    if isinstance(settings, TrainSettings):
        name, config = algorithm_of(settings)
        if name == SUPERVISED:
            check_script("algo.demonstrations", config.demonstrations, settings.env, "env=world")
        built(AlarmConfig, settings.alarms)
        lora_arguments(settings)
        check_at_least(1, evaluation__questions=settings.evaluation.questions, keep_last=settings.keep_last)
        settings.evaluation.split = settings.evaluation.split or held_out_split(settings.env)
        measured_arguments(settings)
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


def algorithm_of(settings: TrainSettings) -> tuple[str, Any]:
    """Name and configuration of the algorithm. Raises ``ConfigurationError`` for settings that cannot be."""
    name = settings.algo.name
    if name != type(settings.algo).__dataclass_fields__["name"].default:
        raise ConfigurationError(f"algo.name cannot be changed, because each algorithm has its own settings; write algo={name}.")
    if name == SUPERVISED:
        return name, built(SupervisedConfig, settings.algo)
    algorithm = get_algorithm(name)
    config = built(algorithm.config, settings.algo)
    check_settings(algorithm, config)
    return name, config


def start_of(settings: WarmStartSettings) -> str | None:
    """The checkpoint that is started from; None: from nothing."""
    return settings.start if isinstance(settings, TrainSettings) and settings.start != "nothing" else None


def check_phases(settings: WarmStartSettings, venv: Any) -> None:
    """Find before the first step what would fail after minutes: no held-out split, no demonstrations for these questions, no back end for them."""
    if isinstance(settings, TrainSettings):
        make_measured_venv(settings, 1).close()
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
        parallel.broadcast((dict(stamp), str(self.last.path / STATE_FILE) if self.last is not None and begun else None))
        parallel.broadcast_weights(self.policy.scorer)

    def run_algorithm(self, settings: TrainSettings, stamp: Mapping[str, Any], parallel: Parallel, title: str) -> None:
        """The algorithm that the run is about."""
        name, config = algorithm_of(settings)
        self.alarms = alarms = Alarms(built(AlarmConfig, settings.alarms), self.venv.unwrapped.rules.max_turns)
        for line in self.folder.metrics():
            if line["phase"] == "train":
                alarms.update(line["step"], line)

        def on_rollout(step: int, trajectories: Sequence[Trajectory]) -> None:
            if settings.rollouts_every and (step + 1) % settings.rollouts_every == 0:
                self.folder.write_trajectories(f"rollouts-{step + 1:06d}", trajectories)

        def on_search(step: int, counters: Mapping[str, float]) -> None:
            self.folder.log_searches("train", step + 1, counters)
            self._counted = self._counters()

        shown = "losses/sft_loss" if name == SUPERVISED else "charts/em"
        with self._phase("train", config.steps, shown, title) as (state, on_step, on_checkpoint):
            hooks: dict[str, Any] = {"on_step": on_step, "on_checkpoint": on_checkpoint, "state": state}
            if state is not None and name != SUPERVISED:
                check_reference(state, config, self.policy)
            if name == SUPERVISED:
                train_supervised(self.policy, self.venv, config, lost=self._count_lost(config.steps, state), **hooks)
            else:
                hooks |= {"on_rollout": on_rollout, "on_search": on_search, "max_lost_rollouts": settings.max_lost_rollouts}
                train(self.policy, self.venv, name, config, stamp=stamp, parallel=parallel, **hooks)

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
    def _phase(self, phase: str, steps: int, shown: str, title: str) -> Iterator[tuple[Mapping[str, Any] | None, OnStep, OnCheckpoint]]:
        """Where the phase begins (a trainer's state or None), and its hooks."""
        state = None
        if self.last is not None and self.last.phase == phase:
            state = load_state(self.last.path / STATE_FILE)
        latest: dict[str, float] = {}

        with progress(title, steps) as advance:

            def on_step(step: int, metrics: Mapping[str, float]) -> None:
                latest.clear()  # a step whose back end was lost has no exact match
                latest.update(metrics)
                alarms = self._watch(step, metrics, advance) if phase == "train" else {}
                lost = {} if self._lost is None or not self._lost.episodes else {"charts/backend_errors": float(self._lost.episodes)}
                self.folder.log(phase, step, {**metrics, **lost, **alarms})
                self._log_searches(phase, step)
                advance(step, f"{shown.rpartition('/')[2].replace('_', ' ')} {metrics.get(shown, float('nan')):.3f}")

            def on_checkpoint(step: int, trainer_state: Mapping[str, Any]) -> None:
                if self._lost is not None and self._lost.in_a_row and step < steps:
                    return  # these steps are taken again by a run that stops for it
                check_finite(trainer_state["model"], step)

                def write(path: Path) -> None:
                    save_policy(self.policy, path)
                    save_state(path / STATE_FILE, trainer_state)

                keep = phase == "sft" and step == steps
                saved = self.folder.save_checkpoint(phase, step, write, score=latest.get("charts/em"), keep=keep)
                self.saved = saved.path

            try:
                yield state, on_step, on_checkpoint
            except (TrainingDivergedError, NotANumberError) as error:
                group = "algo" if phase == "train" else phase
                rate = getattr(self.settings, group).learning_rate
                raise type(error)(f"{error} {self.folder.way_on(f'{group}.learning_rate={rate / 2:g}')}") from error
            finally:
                self._lost = None

    # -- measuring -----------------------------------------------------------------------------------------------------------------------

    def measure(self, settings: TrainSettings, when: str, stamp: Mapping[str, Any], parallel: Parallel) -> dict[str, float]:
        """Evaluate the policy on questions it never trains on; logs, saves trajectories, and returns the measures by key.

        Keys: ``hops=2/sampled/em`` (or ``sampled/em`` where the set knows no hops), greedy likewise, ``.../off/em`` with the retriever off.
        """
        file = self.folder.path / f"{when}.json"
        if when == "before" and self.last is not None and self.last.phase == "train":
            if not file.is_file():  # the policy it measured is gone
                raise RunFolderError(f"{file} is missing: this run cannot be continued. Begin a new one.")
            values: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
            return values
        if when == "after":
            parallel.broadcast_weights(self.policy.scorer)  # an algorithm of one process may have trained it
        measures, trajectories, searched = measured(self.policy, settings, f"evaluation, {when}", {**stamp, "measured": when}, parallel)
        self.folder.log_searches(when, 0, searched)
        self.folder.write_json(f"{when}.json", measures)
        self.folder.log(when, 0, measures)
        if trajectories:
            self.folder.write_trajectories(when, trajectories)
        return measures


def follow(settings: TrainSettings, parallel: Parallel) -> None:
    """What the processes beside the first do: their part of the evaluations and of the algorithm's training, in step with it."""
    name, config = algorithm_of(settings)
    venv = make_venv(settings.env, settings.num_envs)
    policy = first_policy(settings, venv.unwrapped.tokenizer)
    nothing: tuple[dict[str, Any], str | None] = ({}, None)
    stamp, file = parallel.broadcast(nothing)
    parallel.broadcast_weights(policy.scorer)
    if file is None:
        measured(policy, settings, "", stamp, parallel)
    if name != SUPERVISED:  # which one process does
        state = None if file is None else load_state(Path(file))
        # a hook that writes nothing: all processes together make the state that the first one saves
        hooks: dict[str, Any] = {"on_checkpoint": lambda step, state: None, "max_lost_rollouts": settings.max_lost_rollouts}
        train(policy, venv, name, config, state=state, stamp=stamp, parallel=parallel, **hooks)
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
            questions = draw_questions(source, min(evaluation.questions, len(source)), seed=evaluation.seed)
            found = evaluate(
                venv,
                policy,
                questions,
                temperature=temperature,
                seed=evaluation.seed,
                stamp={**stamp, **venv.unwrapped.stamp()},
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
