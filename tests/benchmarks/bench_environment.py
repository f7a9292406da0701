"""The environment's own time per step, tokenizer and retriever taken out: python tests/benchmarks/bench_environment.py

Each episode is three searches and an answer, on a retriever and a tokenizer that are timed themselves; what is left is the environment (the timers' own cost
is measured and taken out too).
A vector of 64 is stepped with ``step_at`` (infos as dicts) and with ``step`` (infos as Gymnasium's arrays).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

import searchqa_envs  # noqa: F401
from searchqa_envs.tokenizers.byte import ByteTokenizer
from searchqa_retrievers import Hit, Passage, SearchRequest

spent = 0.0
calls = 0


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, counting its calls and adding their seconds to ``spent``."""

    def call(*arguments: Any) -> Any:
        global spent, calls
        started = time.perf_counter()
        result = function(*arguments)
        spent += time.perf_counter() - started
        calls += 1
        return result

    return call


def cost_of_timing() -> float:
    """Seconds that a timed call costs beside what it adds to ``spent``."""
    global spent
    empty = timed(lambda: None)
    costs = []
    for _ in range(200):
        spent, started = 0.0, time.perf_counter()
        for _ in range(100):
            empty()
        costs.append((time.perf_counter() - started - spent) / 100)
    return median(costs)


class TimedTokenizer(ByteTokenizer):
    """The byte tokenizer, its time taken."""

    encode = timed(ByteTokenizer.encode)
    encode_array = timed(ByteTokenizer.encode_array)
    decode = timed(ByteTokenizer.decode)
    pieces = timed(ByteTokenizer.pieces)


class TimedRetriever:
    """Three passages of 80 words from a constant, its time taken."""

    hits: ClassVar = [Hit(Passage(f"p{i}", f"Title {i}", "passage words " * 40), 1.0 - i / 10) for i in range(3)]

    def __deepcopy__(self, memo: object) -> TimedRetriever:
        return self

    @timed
    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        return [self.hits for _ in requests]

    @timed
    def cache_key(self, request: SearchRequest) -> str:
        return request.query


def measure(num_envs: int, repeats: int, how: str) -> list[float]:
    """Microseconds per environment-step: median and quietest tenth of the episodes, for steps alone and with the reset."""
    global spent, calls
    questions = [
        {"id": f"q{i}", "question": f"Which river is number {i}?", "golden_answers": ["Vistula"], "metadata": {}} for i in range(100)
    ]
    arguments: dict[str, Any] = {
        "questions": questions,
        "corpus": [{"id": "a", "contents": '"T"\ntext'}],
        "retriever": TimedRetriever(),
        "tokenizer": TimedTokenizer(),
        "prompt": "bare",
    }
    if how == "single":
        env: Any = gym.make("SearchQA-Custom-v0", **arguments).unwrapped
    else:
        env = gym.make_vec("SearchQA-Custom-v0", num_envs=num_envs, autoreset_mode=AutoresetMode.DISABLED, **arguments).unwrapped
    encode = ByteTokenizer().encode
    script = [np.array(encode(f"<search> river {i} </search>"), dtype=np.int32) for i in range(3)]
    script.append(np.array(encode("<answer> Vistula </answer>"), dtype=np.int32))
    indices = range(num_envs)
    steps, episodes = [], []
    timing = cost_of_timing()
    for _ in range(repeats):
        spent, calls, began = 0.0, 0, time.perf_counter()
        env.reset()
        own_reset, reset_done = spent + calls * timing, time.perf_counter()
        for segment in script:
            if how == "single":
                env.step(segment)
            elif how == "step_at":
                env.step_at(indices, [segment] * num_envs)
            else:
                env.step([segment] * num_envs)
        ended = time.perf_counter()
        others = spent + calls * timing
        steps.append((ended - reset_done - (others - own_reset)) / len(script) / num_envs)
        episodes.append((ended - began - others) / len(script) / num_envs)
    return [1e6 * quantile for timings in (steps, episodes) for quantile in (median(timings), sorted(timings)[len(timings) // 10])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=300, help="episodes measured")
    repeats = parser.parse_args().repeats
    print("microseconds per environment-step (aim: at most 10); the quietest tenth says what a busy machine hides")
    print(f"{'environments':>14} {'call':>8} | {'step: median':>12} {'quiet':>6} | {'with reset: median':>18} {'quiet':>6}")
    for num_envs, how in ((1, "single"), (64, "step_at"), (64, "step")):
        step, quiet_step, episode, quiet_episode = measure(num_envs, repeats if num_envs > 1 else 10 * repeats, how)
        print(f"{num_envs:>14} {how:>8} | {step:12.1f} {quiet_step:6.1f} | {episode:18.1f} {quiet_episode:6.1f}")


if __name__ == "__main__":
    main()
