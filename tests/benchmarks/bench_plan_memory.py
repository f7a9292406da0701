"""What a plan says of memory against what a process takes: python tests/benchmarks/bench_plan_memory.py [--quick]

Each row is a process of its own on one CPU thread: a published shape, cut to few layers, with random weights; GRPO or PPO; all trajectories as long as
the context. ``update`` is everything from micro-batches to AdamW's step, twice (AdamW's means come with the first), ``rollout`` an attention cache
that is filled and decoded from, ``checkpoint`` the trainer's state. Peaks are the high-water mark of resident memory (VmHWM, reset before each
phase); what is estimated includes the program itself. The factor is measured by estimated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

PAD, EOS = 0, 1


@dataclass(frozen=True)
class Setting:
    """One row."""

    like: str = "qwen2.5-0.5b"
    layers: int = 2
    vocab_size: int = 16_384
    dtype: str = "float32"
    precision: str = "float32"
    rank: int = 0
    checkpointing: bool = False
    critic: str | None = None
    kl_coef: float = 0.0
    context: int = 256
    sequences: int = 8
    max_tokens: int = 1024


SETTINGS = (
    Setting(),
    Setting(checkpointing=True),
    Setting(precision="bfloat16"),
    Setting(rank=16, dtype="bfloat16"),
    Setting(rank=16, dtype="bfloat16", precision="bfloat16", checkpointing=True),
    Setting(critic="separate", kl_coef=0.001),
    Setting(layers=6, vocab_size=512, context=1024, sequences=2),
    Setting(layers=6, vocab_size=512, context=1024, sequences=2, checkpointing=True),
    Setting(vocab_size=151_936, sequences=2),
    Setting(like="llama-3.2-1b", vocab_size=512),
    Setting(like="qwen2.5-7b", layers=1, vocab_size=512, rank=16, dtype="bfloat16"),
)
QUICK = (Setting(vocab_size=512, context=256, sequences=4, max_tokens=512),)


def estimated(setting: Setting) -> dict[str, float]:
    """By phase, in bytes."""
    from searchqa_agents.model_shapes import shape_config
    from searchqa_agents.plan_memory import Work, measure_shape, memory

    config = shape_config(setting.like, num_hidden_layers=setting.layers, vocab_size=setting.vocab_size)
    work = Work(
        measure_shape(config, {"rank": setting.rank} if setting.rank else None),
        4 if setting.dtype == "float32" else 2,
        setting.precision == "bfloat16",
        "cpu",
        reference=bool(setting.kl_coef) and not setting.rank,
        critic=setting.critic,
        checkpointing=setting.checkpointing,
        max_tokens=setting.max_tokens,
        context=setting.context,
        prompt=setting.context - 8,
        slots=setting.sequences,
        sequences=setting.sequences,
    )
    return memory(work).peaks


def measured(setting: Setting) -> dict[str, float]:
    """The same of this process."""
    import ctypes

    import numpy as np
    import torch
    from bench_training_step import Ids
    from processes import peak_memory

    from searchqa_agents.algorithm import get_algorithm
    from searchqa_agents.batch import make_batch
    from searchqa_agents.language_model import Sampling
    from searchqa_agents.learner import Learner
    from searchqa_agents.lora import add_lora
    from searchqa_agents.model_shapes import random_model, shape_config
    from searchqa_agents.policy import Policy
    from searchqa_agents.trainer import backward, minibatches, totals_of
    from searchqa_agents.trajectory import Trajectory, TurnSpan

    torch.set_num_threads(1)
    shape = shape_config(setting.like, num_hidden_layers=setting.layers, vocab_size=setting.vocab_size)
    model = random_model(shape, 0, pad_id=PAD, eos_id=EOS, dtype=torch.float32 if setting.dtype == "float32" else torch.bfloat16)
    tokenizer: Any = Ids(setting.vocab_size)
    policy = Policy(model, tokenizer)
    if setting.rank:
        add_lora(policy, rank=setting.rank)
    algorithm = get_algorithm("ppo" if setting.critic else "grpo")
    config = algorithm.config(
        steps=10, group_size=setting.sequences, learning_rate=1e-6, max_tokens=setting.max_tokens, kl_coef=setting.kl_coef,
        gradient_checkpointing=setting.checkpointing, precision=setting.precision, **({"critic": setting.critic} if setting.critic else {}),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    half = setting.context // 2

    def trajectory(number: int) -> Trajectory:
        ids = rng.integers(2, setting.vocab_size, setting.context).astype(np.int32)
        mask = (np.arange(setting.context) >= half).astype(np.int8)
        span = TurnSpan(half, setting.context, setting.context, "answer", "", "", "")
        return Trajectory(
            token_ids=ids, loss_mask=mask, logprobs=np.full(setting.context, -8.0, dtype=np.float32), turns=(span,), prompt="",
            reward=float(number % 2), question_id="", question="", golden_answers=(), answer=None, terminated=True, truncated=False,
        )  # fmt: skip

    trajectories = [trajectory(number) for number in range(setting.sequences)]
    peaks: dict[str, float] = {}

    def watch(phase: str, what: Callable[[], Any]) -> None:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        what()
        peaks[phase] = peak_memory()

    learner = Learner(policy, config, has_critic=algorithm.critic)

    def update() -> None:
        for step in range(2):
            batch = learner.annotate(make_batch(trajectories, [0] * len(trajectories)))
            batch = algorithm.advantages(batch, config)
            for minibatch in minibatches(batch, config, step):
                backward(learner, algorithm, minibatch, totals_of(minibatch, step), config)
                learner.update(step)

    def play() -> None:
        session = policy.start(list(range(len(trajectories))), Sampling(4, ()))
        session.submit(range(len(trajectories)), [t.token_ids[:-8] for t in trajectories], [{}] * len(trajectories))
        while len(session.collect()):
            pass

    watch("update", update)
    watch("rollout", play)
    watch("checkpoint", lambda: learner.state_dict(1))
    return peaks


def child(setting: Setting) -> dict[str, float]:
    """Measured in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(asdict(setting))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The run of {setting} failed:\n{done.stderr[-4000:]}")
    peaks: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small row: does it run?")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child is not None:
        sys.stdout.write(json.dumps(measured(Setting(**json.loads(chosen.child)))) + "\n")
        return
    console = Console(width=150)
    console.print("Peak memory in MB: measured / estimated = factor. Where nothing else is said: " + words_of(Setting(), None))
    factors: list[float] = []
    for setting in QUICK if chosen.quick else SETTINGS:
        found, said = child(setting), estimated(setting)
        factors += [found[phase] / said[phase] for phase in said]
        cells = [f"{phase} {found[phase] / 1e6:.0f} / {said[phase] / 1e6:.0f} = {found[phase] / said[phase]:.2f}" for phase in said]
        console.print(f"{'; '.join(cells)}: {words_of(setting, Setting()) or 'as said'}", highlight=False)
    console.print(f"Factors from {min(factors):.2f} to {max(factors):.2f}.")


def words_of(setting: Setting, plain: Setting | None) -> str:
    """What is different about a row."""
    return ", ".join(f"{key} {value}" for key, value in asdict(setting).items() if plain is None or value != getattr(plain, key))


if __name__ == "__main__":
    main()
