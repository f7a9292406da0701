"""Train a simulator in a run's folder: induction warm-up where it begins from nothing, then next-token loss on the documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from searchqa_agents.demonstrations import recorded_demonstrations
from searchqa_agents.policy import Policy
from searchqa_agents.progress import progress
from searchqa_agents.runs import RunFolder, list_checkpoints
from searchqa_agents.sft import SFTConfig, train_sft
from searchqa_agents.training_run import STATE_FILE, check_finite, load_state, save_policy, save_state
from searchqa_agents.trajectory import Trajectory
from searchqa_agents.warmup import WarmupConfig, train_warmup

WARMUP, SFT = "warmup", "sft"


def train_simulator(
    folder: RunFolder, policy: Policy, sequences: Sequence[Trajectory], sft: SFTConfig, warmup: WarmupConfig | None = None
) -> None:
    """Train ``policy`` in place on ``sequences``, each epoch in a new order. Goes on from the last checkpoint of the folder, identically.

    ``warmup``: the model is new and learns to copy first. Metrics in ``metrics.jsonl``, phases ``warmup`` and ``sft``.
    """
    checkpoints = list_checkpoints(folder.path)
    last = checkpoints[-1] if checkpoints else None
    folder.rewind(last)
    state = load_state(last.path / STATE_FILE) if last is not None else None
    warming = state if last is not None and last.phase == WARMUP else None
    if warmup is not None and (last is None or last.phase == WARMUP):
        if warming is not None and _copies(folder, warmup):
            policy.load_weights(warming["model"])
        else:
            with progress("induction warm-up (at most)", warmup.max_steps) as advance:
                train_warmup(
                    policy,
                    warmup,
                    on_step=_log(folder, WARMUP, "losses/warmup_loss", advance),
                    on_checkpoint=_save(folder, policy, WARMUP),
                    state=warming,
                )
    tuning = state if last is not None and last.phase == SFT else None
    if tuning is not None and int(tuning["steps_done"]) >= sft.steps:
        policy.load_weights(tuning["model"])
        return
    batches = recorded_demonstrations(sequences, batch_size=sft.batch_size, seed=sft.seed)
    with progress("tuning the simulator", sft.steps) as advance:
        on_step = _log(folder, SFT, "losses/sft_loss", advance)
        train_sft(policy, batches, sft, on_step=on_step, on_checkpoint=_save(folder, policy, SFT), state=tuning)


def _copies(folder: RunFolder, config: WarmupConfig) -> bool:
    """Whether the warm-up had come to its end."""
    looks = [line for line in folder.metrics() if "losses/shuffled_loss" in line]
    return bool(looks) and max(looks[-1]["losses/copying_loss"], looks[-1]["losses/shuffled_loss"]) < config.target_loss


def _log(folder: RunFolder, phase: str, shown: str, advance: Callable[[int, str], None]) -> Callable[[int, Mapping[str, float]], None]:
    def on_step(step: int, metrics: Mapping[str, float]) -> None:
        folder.log(phase, step, metrics)
        advance(step, f"{shown.rpartition('/')[2].replace('_', ' ')} {metrics[shown]:.3f}")

    return on_step


def _save(folder: RunFolder, policy: Policy, phase: str) -> Callable[[int, Mapping[str, Any]], None]:
    def on_checkpoint(step: int, state: Mapping[str, Any]) -> None:
        check_finite(state["model"], step)

        def write(path: Path) -> None:
            save_policy(policy, path)
            save_state(path / STATE_FILE, state)

        folder.save_checkpoint(phase, step, write)

    return on_checkpoint
