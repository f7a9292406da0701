"""A training run in its folder: phases that log, save checkpoints, and go on where a killed run stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.logging import disable_progress_bar

from searchqa_agents.demonstrations import Batches, fresh_demonstrations
from searchqa_agents.evaluate import evaluate
from searchqa_agents.grpo import GRPOConfig, train_grpo
from searchqa_agents.loading import check_script, checkpoint_path, checkpoint_tokenizer, chosen_device, make_venv, missing_data
from searchqa_agents.models import make_tiny_model
from searchqa_agents.policy import Policy
from searchqa_agents.progress import progress
from searchqa_agents.rollout import draw_questions
from searchqa_agents.runs import Checkpoint, RunFolder, RunFolderError, list_checkpoints
from searchqa_agents.settings import TrainSettings, WarmStartSettings, built, check_at_least
from searchqa_agents.sft import SFTConfig, train_sft
from searchqa_agents.trajectory import Trajectory
from searchqa_agents.warmup import WarmupConfig, train_warmup

if TYPE_CHECKING:
    from searchqa_agents.optimisation import OnCheckpoint, OnStep
    from searchqa_envs.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)

PHASES = ("warmup", "sft", "grpo")
STATE_FILE = "trainer.pt"


def prepare(settings: WarmStartSettings) -> None:
    """Check what can be checked before any data is loaded, and take over the tokenizer of the checkpoint that is started from."""
    built(WarmupConfig, settings.warmup)
    built(SFTConfig, settings.sft)
    check_at_least(1, num_envs=settings.num_envs)
    if isinstance(settings, TrainSettings):
        built(GRPOConfig, settings.algo)
        check_at_least(1, evaluation__questions=settings.evaluation.questions)
    start = start_of(settings)
    if start is None:
        instead = "env=world, start=<checkpoint>" if isinstance(settings, TrainSettings) else "env=world"
        check_script("demonstrations", settings.demonstrations, settings.env, instead)
    else:
        settings.env.tokenizer = settings.env.tokenizer or checkpoint_tokenizer(start)


def start_of(settings: WarmStartSettings) -> str | None:
    """The checkpoint that is started from; None: from nothing."""
    return settings.start if isinstance(settings, TrainSettings) and settings.start != "nothing" else None


def check_phases(settings: WarmStartSettings, venv: Any) -> None:
    """Find before the first step what would fail after minutes: no held-out split, no demonstrations for these questions."""
    if isinstance(settings, TrainSettings):
        make_venv(settings.env, 1, split=settings.evaluation.split).close()
    if start_of(settings) is None:
        demonstrations(settings, venv)(0)


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
    """The policy of the checkpoint that is started from, or a new one."""
    disable_progress_bar()  # type: ignore[no-untyped-call] # transformers' own, of files that are read and written in a moment
    start, device = start_of(settings), chosen_device(settings.device)
    if start is not None:
        return Policy.load(checkpoint_path(start), tokenizer, device=device)
    shape: dict[str, Any] = vars(settings.model)
    model = make_tiny_model(tokenizer.vocab_size, settings.seed, pad_id=tokenizer.pad_id, eos_id=tokenizer.eos_id, device=device, **shape)
    return Policy(model, tokenizer)


class Training:
    """The phases of one run. Each ``run_*`` method trains ``policy`` in place, skips what the last checkpoint has behind it, and logs."""

    def __init__(self, settings: WarmStartSettings, folder: RunFolder, venv: Any) -> None:
        checkpoints = list_checkpoints(folder.path)
        self.settings = settings
        self.warmup, self.sft = built(WarmupConfig, settings.warmup), built(SFTConfig, settings.sft)
        self.grpo = built(GRPOConfig, settings.algo) if isinstance(settings, TrainSettings) else None
        self.folder = folder
        self.venv = venv
        self.last: Checkpoint | None = checkpoints[-1] if checkpoints else None
        if self.last is not None:
            logger.warning("Going on from %s.", self.last.path)
        check_phases(settings, venv)
        folder.rewind(self.last)
        self.policy = first_policy(settings, venv.unwrapped.tokenizer)
        self.saved: Path | None = self.last.path if self.last is not None else None

    # -- phases --------------------------------------------------------------------------------------------------------------------------

    def run_warmup(self) -> None:
        """Induction warm-up."""
        config = self.warmup
        with self._phase("warmup", config.max_steps, "losses/warmup_loss") as (state, on_step, on_checkpoint):
            looks = [line for line in self.folder.metrics() if "losses/shuffled_loss" in line]
            copied = looks and max(looks[-1]["losses/copying_loss"], looks[-1]["losses/shuffled_loss"]) < config.target_loss
            if state is not None and copied:
                self.policy.model.load_state_dict(state["model"])  # it was finished; only its end was not noted
            elif not self._behind("warmup"):
                train_warmup(self.policy, config, on_step=on_step, on_checkpoint=on_checkpoint, state=state)

    def run_sft(self) -> None:
        """Supervised fine-tuning on scripted demonstrations. Its last checkpoint is kept."""
        config = self.sft
        with self._phase("sft", config.steps, "losses/sft_loss") as (state, on_step, on_checkpoint):
            if not self._behind("sft"):
                batches = demonstrations(self.settings, self.venv)
                train_sft(self.policy, batches, config, on_step=on_step, on_checkpoint=on_checkpoint, state=state)

    def run_grpo(self, settings: TrainSettings, stamp: Mapping[str, Any]) -> None:
        """GRPO."""
        config = self.grpo or built(GRPOConfig, settings.algo)

        def on_rollout(step: int, trajectories: Sequence[Trajectory]) -> None:
            if settings.rollouts_every and (step + 1) % settings.rollouts_every == 0:
                self.folder.write_trajectories(f"rollouts-{step + 1:06d}", trajectories)

        with self._phase("grpo", config.steps, "charts/em") as (state, on_step, on_checkpoint):
            train_grpo(
                self.policy,
                self.venv,
                config,
                on_step=on_step,
                on_checkpoint=on_checkpoint,
                on_rollout=on_rollout,
                state=state,
                stamp=stamp,
            )

    def _behind(self, phase: str) -> bool:
        return self.last is not None and PHASES.index(self.last.phase) > PHASES.index(phase)

    @contextmanager
    def _phase(self, phase: str, steps: int, shown: str) -> Iterator[tuple[Mapping[str, Any] | None, OnStep, OnCheckpoint]]:
        """Where the phase begins (a trainer's state or None), and its hooks."""
        state = None
        if self.last is not None and self.last.phase == phase:
            device = self.policy.device
            state = torch.load(self.last.path / STATE_FILE, map_location=device, weights_only=True)
        latest: dict[str, float] = {}

        with progress(_TITLES[phase], steps) as advance:

            def on_step(step: int, metrics: Mapping[str, float]) -> None:
                latest.update(metrics)
                self.folder.log(phase, step, metrics)
                advance(step, f"{shown.rpartition('/')[2].replace('_', ' ')} {metrics.get(shown, float('nan')):.3f}")

            def on_checkpoint(step: int, trainer_state: Mapping[str, Any]) -> None:
                def write(path: Path) -> None:
                    self.policy.save(path)
                    torch.save(dict(trainer_state), path / STATE_FILE)

                keep = phase == "sft" and step == steps
                saved = self.folder.save_checkpoint(phase, step, write, score=latest.get("charts/em"), keep=keep)
                self.saved = saved.path

            yield state, on_step, on_checkpoint

    # -- measuring -----------------------------------------------------------------------------------------------------------------------

    def measure(self, settings: TrainSettings, when: str, stamp: Mapping[str, Any]) -> dict[str, float]:
        """Evaluate the policy on questions it never trains on; logs, saves trajectories, and returns the measures by key.

        Keys: ``hops=2/sampled/em`` (or ``sampled/em`` where the set knows no hops), greedy likewise, ``.../off/em`` with the retriever off.
        """
        file = self.folder.path / f"{when}.json"
        if when == "before" and self.last is not None and self.last.phase == "grpo":
            if not file.is_file():  # the policy it measured is gone
                raise RunFolderError(f"{file} is missing: this run cannot be continued. Begin a new one.")
            values: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
            return values
        measures, trajectories = measured(self.policy, settings, f"evaluation, {when}", {**stamp, "measured": when})
        self.folder.write_json(f"{when}.json", measures)
        self.folder.log(when, 0, measures)
        if trajectories:
            self.folder.write_trajectories(when, trajectories)
        return measures


_TITLES = {"warmup": "induction warm-up (at most)", "sft": "fine-tuning on demonstrations", "grpo": "GRPO"}


def measured(policy: Policy, settings: TrainSettings, title: str, stamp: Mapping[str, Any]) -> tuple[dict[str, float], list[Trajectory]]:
    """Measures by key, and the sampled trajectories that are worth keeping."""
    evaluation = settings.evaluation
    held_out = make_venv(settings.env, settings.num_envs, split=evaluation.split)
    groups: list[Any] = sorted(held_out.unwrapped.source.stamp().get("hops") or [], reverse=True) or [None]
    held_out.close()
    plan: list[tuple[Any, str, float]] = [(hops, mode, t) for hops in groups for mode, t in (("sampled", 1.0), ("greedy", 0.0))]
    plan.append((groups[0], "off", 1.0))
    measures: dict[str, float] = {}
    kept: list[Trajectory] = []
    with progress(title, len(plan)) as advance:
        for done, (hops, mode, temperature) in enumerate(plan):
            changed: dict[str, Any] = {"split": evaluation.split} | ({} if hops is None else {"hops": hops})
            venv = make_venv(settings.env, settings.num_envs, **changed, **({"retriever": "none"} if mode == "off" else {}))
            source = venv.unwrapped.source
            questions = draw_questions(source, min(evaluation.questions, len(source)), seed=evaluation.seed)
            found = evaluate(
                venv, policy, questions, temperature=temperature, seed=evaluation.seed, stamp={**stamp, **venv.unwrapped.stamp()}
            )
            venv.close()
            prefix = mode if hops is None else f"hops={hops}/{mode}"
            measures |= {f"{prefix}/{name}": found.metrics[name] for name in ("em", "f1", "searches", "reward") if name in found.metrics}
            if mode == "sampled":
                kept += found.trajectories[: evaluation.save // len(groups)]
            advance(done + 1, f"{prefix} em {found.metrics.get('em', 0.0):.3f}")
    return measures, kept


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
    return titles, ["held-out questions", "before", "after"], rows
