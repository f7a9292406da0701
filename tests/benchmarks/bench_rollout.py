"""Rollouts against re-prefilling every turn, and against a floor: python tests/benchmarks/bench_rollout.py

On a GPU: ``--device cuda --dtype bfloat16 --shape 0.5b``. Does it run at all: ``--quick``.

The environment is the real one: groups of 8 episodes share a prompt of 100 tokens, each turn but the last is answered by a passage of 500 tokens, segments
have 1 to 64 tokens (32 in the mean, geometric), and 32 environments play 64 episodes, so that slots are refilled. The model is randomly initialised.

- ``generate()``: the loop without a cache between turns: transformers' ``generate`` on the whole contexts, 32 episodes at a time, then one step of all.
- floor: one forward pass over each context token once (a shared prompt counts once), at the batch shape that is fastest here, and decode steps for
  the same number of tokens, in full batches, at the mean length of the contexts, without environment, tokenizer and sampling.
- memory floor: decoding reads all weights and the batch's attention cache once for each token; at the rate at which this device copies memory.

Seconds are of the processor on CPU (one thread), so that other work on the machine disturbs less, and of the clock on CUDA. Ratios are medians over
``--repeats`` rounds, in each of which everything is run once.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents.rollout import episode_seed, rollout
from searchqa_agents.slot_cache import Feed, SlotCache, attention_over_slots
from searchqa_agents.trajectory import Trajectory
from searchqa_agents.transformers_lm import TransformersLM
from searchqa_envs.dialects import get_dialect
from searchqa_envs.tokenizers.byte import TAGS
from searchqa_envs.tokenizers.table import TableTokenizer
from searchqa_retrievers import Hit, Passage, SearchRequest

LONGEST_SEGMENT, MEAN_SEGMENT = 64, 32


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model."""

    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 704
    vocab: int = 8192


SHAPES = {
    "small": Shape(),
    "0.5b": Shape(896, 24, 14, 2, 4864, 151_936),
    "3b": Shape(2048, 36, 16, 2, 11_008, 151_936),
}


@dataclass(frozen=True)
class Setting:
    """What is played."""

    shape: Shape = SHAPES["small"]
    turns: int = 4
    passage: int = 500
    prompt: int = 100
    group_size: int = 8
    num_envs: int = 32
    episodes: int = 64


class WordTokenizer(TableTokenizer):
    """Words " w0", " w1", ... of one token each, the tags, and one token that is a whole search, so that a random model can end a segment."""

    name = "bench-words"
    pad_id, eos_id = 256, 257
    reserved = TAGS
    longest_piece = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        tags = [tag.encode() for tag in TAGS]
        self.search_id = 258 + len(tags)
        self._first_word = self.search_id + 1
        words = [f" w{i}".encode() for i in range(vocab_size - self._first_word)]
        super().__init__([bytes([value]) for value in range(256)] + [b"", b""] + tags + [b"<search> w0 </search>"] + words)
        self._tag_ids = {tag: 258 + i for i, tag in enumerate(TAGS)}

    def encode(self, text: str) -> list[int]:
        """Words and tags where the text is made of them, else bytes."""
        ids: list[int] = []
        for piece in text.replace("<", " <").replace(">", "> ").split():
            if piece in self._tag_ids:
                ids.append(self._tag_ids[piece])
            elif piece[0] == "w" and piece[1:].isdigit():
                ids.append(self._first_word + int(piece[1:]) % (self.vocab_size - self._first_word))
            else:
                ids += piece.encode()
        return ids


class Passages:
    """Another passage for every question and turn, at no cost."""

    def __init__(self, words: int) -> None:
        rng = np.random.default_rng(0)
        self._pool = [" ".join(f"w{word}" for word in rng.integers(0, 4000, words)) for _ in range(97)]

    def __deepcopy__(self, memo: object) -> Passages:
        return self

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        return [[Hit(Passage("p", "w1", self._pool[hash(self.cache_key(request)) % 97]), 1.0)] for request in requests]

    def cache_key(self, request: SearchRequest) -> tuple[int, int]:
        return int(request.question_id or 0), request.turn


def make_venv(setting: Setting, tokenizer: WordTokenizer) -> Any:
    rng = np.random.default_rng(1)
    questions = [
        {"id": str(i), "question": " ".join(f"w{word}" for word in rng.integers(0, 4000, setting.prompt)), "golden_answers": ["w0"]}
        for i in range(-(-setting.episodes // setting.group_size))
    ]
    return gym.make_vec(
        "SearchQA-Custom-v0",
        num_envs=setting.num_envs,
        autoreset_mode="DISABLED",
        questions=questions,
        corpus=[{"id": "p", "contents": '"T"\ntext'}],
        retriever=Passages(setting.passage + 50),
        tokenizer=tokenizer,
        # a segment that was cut before it searched is answered at the same length
        dialect=replace(get_dialect("search-r1"), name=f"bench-{setting.passage}", invalid_text=" ".join(["w1"] * setting.passage)),
        prompt="{question}",
        top_k=1,
        max_turns=setting.turns,
        max_segment_tokens=LONGEST_SEGMENT,
        max_observation_tokens=setting.passage,
        max_context_tokens=setting.prompt + setting.turns * (setting.passage + LONGEST_SEGMENT) + 64,
    )


def make_lm(shape: Shape, device: str, dtype: torch.dtype) -> tuple[TransformersLM, WordTokenizer]:
    """A model that ends a segment with each token with probability 1 / MEAN_SEGMENT, and otherwise takes any other token."""
    tokenizer = WordTokenizer(shape.vocab)
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32_768,
        initializer_range=0.02,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_id,
        eos_token_id=tokenizer.eos_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    model.to(device=device, dtype=dtype)
    bias = torch.zeros(shape.vocab)
    bias[tokenizer.search_id] = math.log(shape.vocab / (MEAN_SEGMENT - 1))
    bias[[tokenizer.eos_id, *range(258, tokenizer.search_id)]] = -30.0  # no other way to end
    model.lm_head.bias = torch.nn.Parameter(bias.to(device=device, dtype=dtype))
    with torch.no_grad():
        model.lm_head.weight[tokenizer.search_id] = 0
    return TransformersLM(model, tokenizer), tokenizer


def regenerate(venv: Any, lm: TransformersLM, search_id: int, setting: Setting, seed: int) -> int:
    """The loop without a cache between turns; tokens sampled."""
    sampled = 0
    model: Any = lm.model
    torch.manual_seed(seed)
    jobs = [question for question in range(setting.episodes // setting.group_size) for _ in range(setting.group_size)]
    for first in range(0, len(jobs), setting.num_envs):
        wave = jobs[first : first + setting.num_envs]
        contexts, _ = venv.reset_at(
            range(len(wave)), seed=[episode_seed(seed, i) % 2**31 for i in range(len(wave))], options={"index": wave}
        )
        live, of = list(range(len(wave))), dict(enumerate(contexts))
        while live:
            width = max(len(of[i]) for i in live)
            ids = np.full((len(live), width), lm.tokenizer.pad_id, dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, i in enumerate(live):
                ids[row, width - len(of[i]) :], mask[row, width - len(of[i]) :] = of[i], 1
            written = model.generate(
                input_ids=torch.from_numpy(ids).to(lm.device),
                attention_mask=torch.from_numpy(mask).to(lm.device),
                do_sample=True,
                top_k=0,
                max_new_tokens=LONGEST_SEGMENT,
                eos_token_id=[search_id, lm.tokenizer.eos_id],
                pad_token_id=lm.tokenizer.pad_id,
            )
            segments = [row[row != lm.tokenizer.pad_id] for row in written[:, width:].cpu().numpy()]
            sampled += sum(map(len, segments))
            observations, _, terminated, truncated, _ = venv.step_at(live, segments)
            of.update(zip(live, observations, strict=True))
            live = [i for i, ended in zip(live, terminated | truncated, strict=True) if not ended]
    return sampled


class Clock:
    """Seconds of a call: of the processor on CPU, of the clock on CUDA."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if self._cuda else time.process_time()

    def __call__(self, call: Callable[[], Any], least: float = 0.0) -> float:
        """Of the fastest of several calls that take at least ``least`` seconds together (one call for 0)."""
        best, spent = math.inf, 0.0
        while spent <= least:
            started = self.now()
            call()
            best, spent = min(best, self.now() - started), spent + self.now() - started
        return best


@torch.inference_mode()
def decode_seconds(lm: TransformersLM, clock: Clock, rows: int, length: int, least: float) -> float:
    """Of one decode step of ``rows`` contexts of ``length`` tokens, logits included."""
    cache = SlotCache()
    cache.reserve(rows, length + 1)
    tokens = torch.zeros(1, rows, dtype=torch.int64, device=lm.device)
    cache.feed = Feed(range(rows), [length] * rows, [1] * rows, lm.device)

    def step() -> None:
        with attention_over_slots(lm.model):
            hidden = lm.hidden_states(
                tokens, position_ids=cache.feed.positions[None], past_key_values=cache, use_cache=True, feed=cache.feed
            )
        lm.model.get_output_embeddings()(hidden[0])  # type: ignore[no-untyped-call]

    step()
    return clock(step, least)


@torch.inference_mode()
def prefill_rate(lm: TransformersLM, clock: Clock, trajectories: Sequence[Trajectory], least: float) -> float:
    """Tokens per second of one forward pass over whole trajectories, at the fastest number of them."""
    longest = sorted((t.token_ids for t in trajectories), key=len)[-32:]
    best = 0.0
    for rows in (1, 2, 4, 8, 32):
        batch = longest[-rows:]
        width = min(map(len, batch))
        ids = torch.from_numpy(np.stack([one[:width] for one in batch]).astype(np.int64)).to(lm.device)
        best = max(best, ids.numel() / clock(lambda ids=ids: lm.hidden_states(ids, use_cache=False), least))  # type: ignore[misc]
    return best


class Floor:
    """Seconds that the trajectories' tokens cost at least."""

    def __init__(self, lm: TransformersLM, clock: Clock, setting: Setting, trajectories: Sequence[Trajectory], least: float) -> None:
        prompts = {t.question_id: t.turns[0].start for t in trajectories}
        replies = sum(t.turns[i + 1].start - t.turns[i].segment_end for t in trajectories for i in range(len(t.turns) - 1))
        self.fed = (
            sum(prompts.values()) + replies + sum(len(t.turns) - 1 for t in trajectories)
        )  # and the last token of each segment but the last
        self.prefill = self.fed / prefill_rate(lm, clock, trajectories, least)
        self.decode = 0.0
        self.memory = 0.0
        weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
        weights -= lm.model.get_input_embeddings().weight.numel() * next(lm.model.parameters()).element_size()
        config: Any = lm.model.config
        cell = 2 * config.num_hidden_layers * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        cell *= next(lm.model.parameters()).element_size()
        rate = memory_rate(lm.device, clock, least)
        for turn in range(setting.turns):
            spans = [t.turns[turn] for t in trajectories if turn < len(t.turns)]
            steps = sum(span.segment_end - span.start - 1 for span in spans) / setting.num_envs
            length = round(float(np.mean([(span.start + span.segment_end) / 2 for span in spans])))
            self.decode += steps * decode_seconds(lm, clock, setting.num_envs, length, least)
            self.memory += steps * (weights + setting.num_envs * length * cell) / rate


def memory_rate(device: torch.device, clock: Clock, least: float) -> float:
    """Bytes per second that one copy of a large tensor reads and writes."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / clock(lambda: target.copy_(source), least)


class Result(NamedTuple):
    """Of a round; medians over the rounds."""

    sampled: float
    rollout_seconds: float
    speedup: float
    of_floor: float
    of_memory: float


def measure(setting: Setting, device: str, dtype: torch.dtype, repeats: int, *, baseline: bool, least: float) -> Result:
    lm, tokenizer = make_lm(setting.shape, device, dtype)
    venv = make_venv(setting, tokenizer)
    clock = Clock(device)
    questions = list(range(setting.episodes // setting.group_size))
    rollout(venv, lm, questions[:1], group_size=2, seed=99)  # warm up
    rounds = []
    for repeat in range(repeats):
        started = clock.now()
        trajectories = rollout(venv, lm, questions, group_size=setting.group_size, seed=repeat)
        seconds = clock.now() - started
        sampled = sum(int(t.loss_mask.sum()) for t in trajectories)
        assert all(len(t.turns) == setting.turns for t in trajectories)
        speedup = math.nan
        if baseline:
            started = clock.now()
            tokens = regenerate(venv, lm, tokenizer.search_id, setting, repeat)
            speedup = (clock.now() - started) / tokens * sampled / seconds
        floor = Floor(lm, clock, setting, trajectories, least)
        rounds.append(Result(sampled, seconds, speedup, (floor.prefill + floor.decode) / seconds, floor.memory / floor.decode))
    return Result(*(median(column) for column in zip(*rounds, strict=True)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few episodes: does it run at all")
    parser.add_argument("--repeats", type=int, default=1, help="rounds")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shape", default="small", choices=sorted(SHAPES), help="Qwen2 shapes: 6 x 256, or those of Qwen2.5-0.5B and 3B")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, default=True, help="also how the cost grows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    setting = Setting(shape=SHAPES[options.shape])
    repeats, least = options.repeats, 0.2  # seconds that each timing of the floor takes at least
    if options.quick:
        setting = replace(setting, shape=Shape(32, 2, 2, 1, 48, 512), passage=40, prompt=20, num_envs=4, episodes=8, group_size=4)
        repeats, least = 1, 0.0
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    console = Console()
    table = Table(title=f"Rollout: {setting.num_envs} environments, {options.dtype}, {where}")
    for column in ("turns", "vocabulary", "tokens/s", "times generate()", "of the floor", "decode step, of the memory floor"):
        table.add_column(column, justify="right")
    bigger = [] if options.quick or options.shape != "small" else [replace(setting, shape=replace(setting.shape, vocab=65_536))]
    for one in (replace(setting, turns=2), setting, *bigger):
        result = measure(one, options.device, dtype, repeats, baseline=one not in bigger, least=least)
        table.add_row(
            str(one.turns),
            f"{one.shape.vocab:,}",
            f"{result.sampled / result.rollout_seconds:,.0f}",
            "" if one in bigger else f"{result.speedup:.2f}",
            f"{result.of_floor:.0%}",
            f"{result.of_memory:.0%}",
        )
    console.print(table)
    if not options.growth:
        return
    table = Table(title="As context, group and model grow (4 turns)")
    for column in ("what", "ms per sampled token", "of the floor"):
        table.add_column(column, justify="right" if column != "what" else "left")
    shape = setting.shape
    variants = [(f"passages of {setting.passage * n // 4} tokens", replace(setting, passage=setting.passage * n // 4)) for n in (1, 4, 8)]
    variants += [(f"groups of {n}", replace(setting, group_size=n)) for n in (1, setting.episodes // 4)]
    variants += [
        (
            f"{n} layers of {n * shape.hidden // shape.layers}",
            replace(setting, shape=replace(shape, layers=n, hidden=n * shape.hidden // shape.layers // 16 * 16)),
        )
        for n in (shape.layers // 2, shape.layers * 2)
    ]
    for name, one in variants[:1] if options.quick else variants:
        result = measure(one, options.device, dtype, 1, baseline=False, least=least)
        table.add_row(name, f"{1e3 * result.rollout_seconds / result.sampled:.2f}", f"{result.of_floor:.0%}")
    console.print(table)


if __name__ == "__main__":
    main()
