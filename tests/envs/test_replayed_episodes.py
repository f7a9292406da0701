"""A run that is recorded and its replay: the same trajectories to the byte, outages and a back end that changes its mind included."""

import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import searchqa_envs  # noqa: F401 - registers the ids
from searchqa_envs.tokenizers.byte import ByteTokenizer
from searchqa_retrievers import Cached, Hit, Passage, RetrieverUnavailable, default_cache_key
from searchqa_retrievers.counted import Counted
from searchqa_retrievers.recording import Recorded

QUESTIONS = [{"id": f"q{i}", "question": f"Which river is number {i}?", "golden_answers": ["Vistula"], "metadata": {}} for i in range(20)]
CORPUS = [{"id": "a", "contents": '"T"\ntext'}]


class Moody:
    """Another answer each time it is asked, and every third call is lost."""

    name = "moody"

    def __init__(self):
        self.calls = 0

    def search(self, requests):
        self.calls += 1
        if self.calls % 3 == 0:
            raise RetrieverUnavailable(f"call {self.calls} was lost")
        return [
            [Hit(Passage(str(i), f"Rivers {self.calls}", request.query), 1 / (i + 3)) for i in range(request.top_k)] for request in requests
        ]

    def cache_key(self, request):
        return default_cache_key(request)

    def stamp(self):
        return {"retriever": "moody", "corpus_sha256": "of an online search engine"}

    def __deepcopy__(self, memo):
        return self


def play(retriever, episodes=12, num_envs=4):
    """Episodes as bytes: tokens, masks, rewards, and all that is plain in their infos."""
    venv = gym.make_vec(
        "SearchQA-Custom-v0", num_envs=num_envs, autoreset_mode=AutoresetMode.DISABLED, questions=QUESTIONS, corpus=CORPUS, retriever=retriever,
        prompt="bare", top_k=2, max_turns=6,
    ).unwrapped  # fmt: skip
    tokenizer, draw, played = ByteTokenizer(), np.random.default_rng(0), []
    for number in range(episodes):
        venv.reset_at(range(num_envs), seed=number)
        going = list(range(num_envs))
        while going:
            queries = [f"<search> {draw.integers(30)} </search>" if draw.random() < 0.8 else "<answer> Vistula </answer>" for _ in going]
            observations, rewards, terminated, truncated, infos = venv.step_at(going, [tokenizer.encode(query) for query in queries])
            for observation, reward, info in zip(observations, rewards, infos, strict=True):
                record = info.pop("turn_record")
                plain = dict(info)
                played.append(
                    json.dumps([observation.tolist(), record.loss_mask.tolist(), record.passages, float(reward), plain], default=str)
                )
            going = [i for i, ended in zip(going, terminated | truncated, strict=True) if not ended]
    counters = venv.search_counters()
    stamp = venv.stamp()
    venv.close()
    return "\n".join(played).encode(), counters, stamp


@pytest.mark.parametrize("cache_entries", [0, 3, 10_000])
def test_a_replayed_run_is_the_run_byte_for_byte(tmp_path, cache_entries):
    file = tmp_path / "record.jsonl"
    inner = Moody()
    retriever = Recorded(Counted(inner, price=1.0), file)
    recorded, counted, stamp = play(Cached(retriever, cache_entries) if cache_entries else retriever)
    assert counted["search/errors"] > 1
    assert recorded.count(b"was lost") > 1
    assert counted["search/money"] == counted["search/backend_requests"] >= 30  # each query, and those of lost calls
    calls = inner.calls
    replayed, again, stamp_again = play({"name": "replay", "file": str(file), "cache_entries": cache_entries})
    assert replayed == recorded
    assert stamp_again == stamp
    assert again["search/errors"] == counted["search/errors"]
    assert "search/money" not in again
    assert inner.calls == calls


def test_a_run_whose_back_end_changes_its_mind_is_consistent_when_recorded(tmp_path):
    recorded, _, _ = play(Recorded(Moody(), tmp_path / "record.jsonl"))
    titles = {}
    for line in recorded.decode().splitlines():
        _, _, passages, _, info = json.loads(line)
        if passages:
            titles.setdefault(info["query"], set()).add(passages[0][1])
    assert len(titles) > 20
    assert all(len(own) == 1 for own in titles.values())
