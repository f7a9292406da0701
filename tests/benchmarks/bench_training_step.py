"""The training step against TRL's GRPOTrainer, and what it costs as things grow: python tests/benchmarks/bench_training_step.py [--quick] [--alone]

Both get the same randomly initialised Qwen2 and the same made-up trajectories: groups of 8 that share a prompt of 100 tokens, 1 to 4 turns of
segments of 1 to 64 tokens (32 in the mean, geometric) and, but for the last, passages of 1/2 to 3/2 of ``--passage`` tokens. Rewards differ, so that
no trajectory is without advantage. The step is all micro-batches of one update: forward, backward, clipping, AdamW. GRPO with the mean over all
tokens (TRL: ``loss_type="dapo"``, ``beta=0``, ``scale_rewards="none"``), on-policy, the same learning rate. TRL's trainer runs as it is
(``train()``); trajectories come in through ``rollout_func`` with ``env_mask``, and the time of that part is taken out. Its micro-batches are rows
padded to the longest of the batch; ours have at most as many tokens as one of those. Gradients are compared first.

Every run is a process of its own. Seconds are of the processor on CPU (one thread), so that other work on the machine disturbs less, and of the
clock on CUDA; the first step warms up. Ratios are medians over ``--repeats`` rounds of one run of each. Peak memory is that of the first step: on CPU
the high-water mark of resident memory (VmHWM, reset before the step) minus what was resident before, plus the weights; on CUDA the allocator's peak.
The FLOP floor is 6 times weights times tokens, output layer for sampled tokens only, plus causal attention; its seconds are at the rate of a large
matrix product, measured in the same process.

``--device cuda --shape 0.5b`` or ``3b`` uses bfloat16 autocast. ``--alone`` leaves TRL out (it needs the extra ``bench``).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

from searchqa_agents.algorithm import get_algorithm
from searchqa_agents.algorithms.grpo import GRPOConfig
from searchqa_agents.batch import make_batch
from searchqa_agents.learner import Learner
from searchqa_agents.policy import Policy
from searchqa_agents.trainer import backward, minibatches, totals_of
from searchqa_agents.trajectory import Trajectory, TurnSpan
from searchqa_envs.tokenizers.table import TableTokenizer

GROUP, LONGEST_SEGMENT, MEAN_SEGMENT, PROMPT = 8, 64, 32, 100
PAD, EOS = 0, 1
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocab: int


SHAPES = {
    "tiny": Shape(128, 2, 4, 2, 352, 2048),
    "small": Shape(256, 6, 4, 2, 704, 8192),
    "0.5b": Shape(896, 24, 14, 2, 4864, 151_936),
    "3b": Shape(2048, 36, 16, 2, 11_008, 151_936),
}


@dataclass(frozen=True)
class Setting:
    """One run."""

    system: str = "ours"
    shape: str = "small"
    trajectories: int = 16
    turns: int = 4
    passage: int = 300
    rows: int = 4
    checkpointing: bool = False
    device: str = "cpu"
    attention: str = "sdpa"
    steps: int = 2


class Ids(TableTokenizer):
    """So many one-token words."""

    name = "bench-ids"

    def __init__(self, count: int) -> None:
        super().__init__([f" w{i}".encode() for i in range(count)])
        self.vocab_size, self.pad_id, self.eos_id = count, PAD, EOS

    def encode(self, text: str) -> list[int]:
        return [int(word[1:]) for word in text.split()]


def make_trajectories(setting: Setting) -> list[Trajectory]:
    """Ragged multi-turn trajectories; the members of a group are neighbours and share their prompt."""
    rng = np.random.default_rng(0)
    vocab = SHAPES[setting.shape].vocab
    trajectories = []
    for number in range(setting.trajectories):
        if number % GROUP == 0:
            prompt = rng.integers(2, vocab, PROMPT)
        ids, mask, turns = [*prompt], [0] * PROMPT, []
        count = int(rng.integers(1, setting.turns + 1))
        for turn in range(count):
            segment = rng.integers(2, vocab, min(LONGEST_SEGMENT, rng.geometric(1 / MEAN_SEGMENT)))
            passage = rng.integers(2, vocab, rng.integers(setting.passage // 2, 3 * setting.passage // 2) if turn < count - 1 else 0)
            start = len(ids)
            ids += [*segment, *passage]
            mask += [1] * len(segment) + [0] * len(passage)
            turns.append(TurnSpan(start, start + len(segment), len(ids), "search", "", "", ""))
        loss_mask = np.array(mask, dtype=np.int8)
        trajectories.append(
            Trajectory(
                token_ids=np.array(ids, dtype=np.int32), loss_mask=loss_mask, logprobs=np.zeros(len(ids), dtype=np.float32), turns=tuple(turns),
                prompt="", reward=float(rng.random()), question_id=str(number // GROUP), question="", golden_answers=(), answer=None,
                terminated=True, truncated=False,
            )
        )  # fmt: skip
    return trajectories


def make_model(setting: Setting) -> Qwen2ForCausalLM:
    """Without dropout, with an output layer of its own, always the same weights."""
    shape = SHAPES[setting.shape]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.feed_forward, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=32_768, pad_token_id=PAD, eos_token_id=EOS,
        bos_token_id=None, tie_word_embeddings=False, attn_implementation=setting.attention,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).to(setting.device)


def flops(setting: Setting, trajectories: Sequence[Trajectory]) -> float:
    """Of forward and backward of one step over real tokens."""
    shape = SHAPES[setting.shape]
    head = shape.hidden // shape.heads
    layer = shape.hidden * head * (2 * shape.heads + 2 * shape.kv_heads) + 3 * shape.hidden * shape.feed_forward
    total = 0.0
    for trajectory in trajectories:
        read, sampled = len(trajectory.token_ids) - 1, int(trajectory.loss_mask.sum())
        total += 6 * (read * layer * shape.layers + sampled * shape.hidden * shape.vocab)
        total += 6 * shape.layers * read**2 * shape.heads * head  # two products of T x T / 2, forward once and backward twice
    return total


class Meter:
    """Seconds and peak memory of steps."""

    def __init__(self, setting: Setting) -> None:
        self.cuda = setting.device == "cuda"
        self.seconds: list[float] = []
        self.peak = 0.0

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def begin(self) -> None:
        if not self.seconds:
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            else:
                ctypes.CDLL(None).malloc_trim(0)  # what was freed before goes back to the system
                self._before = _resident("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self._started = self.now()

    def end(self, weights: float) -> None:
        self.seconds.append(self.now() - self._started)
        if len(self.seconds) == 1:
            self.peak = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else _resident("VmHWM") - self._before + weights

    def leave_out(self, seconds: float) -> None:
        self._started += seconds


def _resident(name: str) -> float:
    """MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def matrix_rate(setting: Setting, meter: Meter) -> float:
    """Floating-point operations per second of a large matrix product, in the type of training."""
    cuda = setting.device == "cuda"
    size, kind = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a = torch.randn(size, size, device=setting.device, dtype=kind)
    a @ a
    seconds = []
    for _ in range(5):
        started = meter.now()
        a @ a
        seconds.append(meter.now() - started)
    return 2 * size**3 / min(seconds)


def ours(setting: Setting, trajectories: list[Trajectory], meter: Meter) -> dict[str, Any]:
    """Our learner under the loop of our trainer."""
    policy = Policy(make_model(setting), Ids(SHAPES[setting.shape].vocab))
    policy.scorer.banned.zero_()  # TRL bans no id
    longest = max(len(trajectory.token_ids) for trajectory in trajectories)
    config = GRPOConfig(
        steps=10**6,
        group_size=GROUP,
        normalise_std=False,
        recompute_logprobs=True,
        learning_rate=LEARNING_RATE,
        beta2=0.999,
        max_grad_norm=1e9,
        max_tokens=setting.rows * longest,
        gradient_checkpointing=setting.checkpointing,
        precision="bfloat16" if setting.device == "cuda" else "float32",
    )
    learner, algorithm = Learner(policy, config), get_algorithm("grpo")
    batch = make_batch(trajectories, [number // GROUP for number in range(len(trajectories))])
    batch = learner.annotate(batch)  # on-policy, as in TRL, which takes the step's own log-probabilities for the old ones
    batch = algorithm.advantages(batch, config)
    (minibatch,) = minibatches(batch, config, 0)
    parameters = list(policy.model.parameters())
    weights = sum(parameter.numel() for parameter in parameters) * 4 / 2**20
    gradient = None
    for step in range(setting.steps + 1):
        meter.begin()
        shares = backward(learner, algorithm, minibatch, totals_of(minibatch, step), config)
        if step == 0:
            loss, paused = shares["policy_loss"], meter.now()
            gradient = kept(parameters)
            meter.leave_out(meter.now() - paused)
        learner.update(step)
        meter.end(weights)
    return {"loss": loss, "gradient": gradient}


def kept(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor | None:
    """The gradient on the CPU; of models that are not too large for it."""
    if sum(parameter.numel() for parameter in parameters) > 2**25:
        return None
    return torch.cat([parameter.grad.detach().flatten().cpu() for parameter in parameters if parameter.grad is not None])


def trl(setting: Setting, trajectories: list[Trajectory], meter: Meter) -> dict[str, Any]:
    """TRL's trainer with its own loop."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig as TRLConfig
    from trl import GRPOTrainer

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SHAPES[setting.shape].vocab)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w2")
    found: dict[str, Any] = {"loss": 0.0}

    def rollout_func(prompts: list[str], trainer: Any) -> dict[str, Any]:
        assert len(prompts) == len(trajectories)
        return {
            "prompt_ids": [t.token_ids[:PROMPT].tolist() for t in trajectories],
            "completion_ids": [t.token_ids[PROMPT:].tolist() for t in trajectories],
            "logprobs": [t.logprobs[PROMPT:].tolist() for t in trajectories],  # type: ignore[index]
            "env_mask": [t.loss_mask[PROMPT:].tolist() for t in trajectories],
        }

    class Timed(GRPOTrainer):  # type: ignore[misc]
        def _prepare_inputs(self, generation_batch: Any) -> Any:
            started = meter.now()
            inputs = super()._prepare_inputs(generation_batch)
            meter.leave_out(meter.now() - started)
            return inputs

        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            loss = super().compute_loss(*arguments, **named)
            if not meter.seconds:
                found["loss"] += float(loss.detach())
            return loss

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            meter.begin()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            if not meter.seconds:
                started = meter.now()
                found["gradient"] = kept(list(model.parameters()))
                meter.leave_out(meter.now() - started)

        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            meter.end(sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20)

    model = make_model(setting)
    groups = len(trajectories) // GROUP
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=model,
            reward_funcs=lambda prompts, completions, **named: [t.reward for t in trajectories],
            args=TRLConfig(
                output_dir=folder, per_device_train_batch_size=setting.rows, gradient_accumulation_steps=len(trajectories) // setting.rows,
                num_generations=GROUP, max_completion_length=max(len(t.token_ids) for t in trajectories), max_steps=setting.steps + 1, beta=0.0,
                loss_type="dapo", scale_rewards="none", learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=1e9,
                gradient_checkpointing=setting.checkpointing, bf16=setting.device == "cuda", use_cpu=setting.device == "cpu", temperature=1.0,
                save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, seed=0,
            ),
            train_dataset=Dataset.from_list([{"prompt": f"w{i + 2}"} for i in range(groups)]),
            processing_class=tokenizer,
            rollout_func=rollout_func,
            callbacks=[Watch()],
        )  # fmt: skip
        trainer.train()
    return found


def run(setting: Setting, gradient_file: Path | None = None) -> dict[str, Any]:
    """One run in this process."""
    torch.set_num_threads(1)
    trajectories = make_trajectories(setting)
    meter = Meter(setting)
    systems: dict[str, Callable[..., dict[str, Any]]] = {"ours": ours, "trl": trl}
    found = systems[setting.system](setting, trajectories, meter)
    gradient = found.pop("gradient")
    if gradient_file is not None and gradient is not None:
        torch.save(gradient, gradient_file)
    seconds = median(meter.seconds[1:])
    tokens = sum(len(trajectory.token_ids) for trajectory in trajectories)
    work = flops(setting, trajectories)
    return {
        **found,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_mib": meter.peak,
        "tokens": tokens,
        "filled": tokens / len(trajectories) / max(len(trajectory.token_ids) for trajectory in trajectories),
        "floor_share": work / matrix_rate(setting, meter) / seconds,
    }


def child(setting: Setting, gradient_file: Path | None = None) -> dict[str, Any]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--child", json.dumps(asdict(setting)), "--out", str(out)]
        command += [] if gradient_file is None else ["--gradient", str(gradient_file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TRL_EXPERIMENTAL_SILENCE": "1"}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise RuntimeError(f"The run of {setting} failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def compare(setting: Setting, repeats: int, console: Console) -> None:
    """Gradients, speed and memory against TRL."""
    with tempfile.TemporaryDirectory() as folder:
        files = {system: Path(folder) / system for system in ("ours", "trl")}
        rounds = [{s: child(replace(setting, system=s), file if not n else None) for s, file in files.items()} for n in range(repeats)]
        first = rounds[0]
        line = f"loss {first['ours']['loss']:.6g} and {first['trl']['loss']:.6g}"
        if all(file.exists() for file in files.values()):
            gradients = [torch.load(file, weights_only=True) for file in files.values()]
            error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
            line += f", relative difference of the gradients {error:.1e}"
            if not error < (0.05 if setting.device == "cuda" else 1e-4):
                raise SystemExit(f"The steps are not the same: {line}.")
    table = Table(
        title=f"{setting.shape}, {setting.trajectories} trajectories, checkpointing {'on' if setting.checkpointing else 'off'}: {line}"
    )
    for name in ("", "s per step", "tokens/s", "peak MiB", "share of FLOP floor"):
        table.add_column(name)
    for system in ("ours", "trl"):
        middle = {name: median(r[system][name] for r in rounds) for name in ("seconds", "tokens_per_second", "peak_mib", "floor_share")}
        label = "searchqa-gym" if system == "ours" else f"TRL, {setting.rows} rows"
        table.add_row(
            label,
            f"{middle['seconds']:.2f}",
            f"{middle['tokens_per_second']:.0f}",
            f"{middle['peak_mib']:.0f}",
            f"{middle['floor_share']:.0%}",
        )
    speed = median(r["ours"]["tokens_per_second"] / r["trl"]["tokens_per_second"] for r in rounds)
    memory = median(r["ours"]["peak_mib"] / r["trl"]["peak_mib"] for r in rounds)
    table.add_row("ratio", "", f"{speed:.2f}", f"{memory:.2f}", "")
    console.print(table)
    console.print(
        f"{first['ours']['tokens']} tokens; padded to the longest, rows would be {first['ours']['filled']:.0%} full. "
        f"Aims: at least 1.5 and at most .7."
    )


def growth(setting: Setting, console: Console) -> None:
    """Our step as context, group and model grow. To the step a larger group is more trajectories."""
    table = Table(title="searchqa-gym as things grow")
    for name in (
        "model",
        "trajectories",
        "turns",
        "passage",
        "checkpointing",
        "tokens",
        "s per step",
        "tokens/s",
        "peak MiB",
        "share of FLOP floor",
    ):
        table.add_column(name)
    base = replace(setting, system="ours", steps=1)
    cells = [
        base,
        replace(base, passage=2 * base.passage),
        replace(base, passage=4 * base.passage),
        replace(base, trajectories=2 * base.trajectories),
        replace(base, trajectories=4 * base.trajectories),
        replace(base, checkpointing=not base.checkpointing),
        *([replace(base, shape="tiny")] if base.shape == "small" else []),
    ]
    for cell in cells:
        found = child(cell)
        table.add_row(
            cell.shape, str(cell.trajectories), str(cell.turns), str(cell.passage), "on" if cell.checkpointing else "off", str(found["tokens"]),
            f"{found['seconds']:.2f}", f"{found['tokens_per_second']:.0f}", f"{found['peak_mib']:.0f}", f"{found['floor_share']:.0%}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: does it run?")
    parser.add_argument("--alone", action="store_true", help="without TRL")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--trajectories", type=int, default=16)
    parser.add_argument("--passage", type=int, default=300)
    parser.add_argument("--rows", type=int, default=4, help="of TRL's micro-batches")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of transformers, such as flash_attention_2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--gradient", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child is not None:
        chosen.out.write_text(json.dumps(run(Setting(**json.loads(chosen.child)), chosen.gradient)))
        return
    console = Console(width=140)
    setting = Setting(
        shape=chosen.shape, trajectories=chosen.trajectories, passage=chosen.passage, rows=chosen.rows, device=chosen.device, attention=chosen.attention
    )  # fmt: skip
    if chosen.quick:
        setting, chosen.repeats = replace(setting, shape="tiny", trajectories=8, passage=40, steps=1), 1
    if chosen.device == "cuda":
        console.print(f"On {torch.cuda.get_device_name()}, torch {torch.__version__}.")
    if not chosen.alone:
        for checkpointing in (False, True):
            compare(replace(setting, checkpointing=checkpointing), chosen.repeats, console)
    if chosen.alone or not chosen.quick:
        growth(setting, console)


if __name__ == "__main__":
    main()
