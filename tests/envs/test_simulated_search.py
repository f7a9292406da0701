"""Episodes on a simulated search engine: each row's own question, nothing of the answer in the context, and the world's own tokenizer."""

from __future__ import annotations

import hashlib
import json
import pickle
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

import searchqa_envs  # noqa: F401  # registers ids and tokenizers
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers import build_tokenizer
from searchqa_envs.tokenizers.huggingface import RECORD_FILE
from searchqa_envs.vector import SearchQAVectorEnv
from searchqa_envs.world import WorldSource
from searchqa_envs.world.source import _scope
from searchqa_retrievers.curriculum import Curriculum
from searchqa_retrievers.simulated import Simulated
from searchqa_retrievers.simulation_prompts import PROMPTS
from searchqa_retrievers.text_model import TextJob, TextModel
from searchqa_retrievers.types import RetrieverError, RetrieverUnavailable, SearchRequest, follows_progress

ECHO = "{question}|{answer}|{query}"


class Writer:
    """Writes a hash of each prompt, or always the same text."""

    def __init__(self, text: str | None = None) -> None:
        self.text = text
        self.prompts: list[str] = []

    def write(self, jobs: Sequence[TextJob]) -> tuple[list[str], int]:
        self.prompts += [job.prompt for job in jobs]
        return [f"Doc 1: {hashed(job.prompt)}" if self.text is None else self.text for job in jobs], 0

    def stamp(self) -> dict[str, Any]:
        return {"writer": self.text}

    def counters(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def hashed(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:20]


def make_vector(small_data: Path, num_envs: int, **arguments: Any) -> SearchQAVectorEnv:
    return SearchQAVectorEnv(
        num_envs=num_envs, autoreset_mode=AutoresetMode.DISABLED, dataset="hotpotqa", data_dir=str(small_data), split="train", **arguments
    )


QUESTION_IDS = ("q1", "q2", "q3", "q4", "q5")


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.sampled_from(["search", "same search", "answer", "nothing"]), min_size=5, max_size=5),
    st.lists(st.sampled_from(["search", "same search", "answer", "nothing"]), min_size=5, max_size=5),
    st.permutations(range(5)),
)
def test_each_rows_documents_are_of_its_own_question(small_data: Path, first: list[str], second: list[str], order: list[int]) -> None:
    """Some rows answer, or write nothing that counts, while others search on; rows are also stepped in part and in any order."""
    env = make_vector(small_data, 5, retriever=Simulated(Writer(), ECHO), max_turns=4)
    env.reset(seed=3, options={"question_id": list(QUESTION_IDS)})
    encode, decode = env.unwrapped.tokenizer.encode, env.unwrapped.tokenizer.decode
    ended: set[int] = set()
    for turn, acts in enumerate((first, second)):
        rows = [row for row in order if row not in ended]
        for some in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            queries = {row: f"of row {row} turn {turn}" if acts[row] == "search" else "the same" for row in some}
            texts = {"answer": "<answer> x </answer>", "nothing": "nothing"}
            segments = [encode(texts.get(acts[row], f"<search>{queries[row]}</search>")) for row in some]
            if not some:
                continue
            observations, *_ = env.step_at(some, segments)
            for row, observation in zip(some, observations, strict=True):
                slot = env._slots[row].episode
                assert slot is not None
                question = slot.question
                text = decode(observation.tolist())
                if acts[row] == "answer":
                    ended.add(row)
                elif acts[row] != "nothing":
                    assert hashed(f"{question.question}|{question.golden_answers[0]}|{queries[row]}") in text.rsplit("<information>", 1)[1]
    env.close()


def test_nothing_that_the_simulator_is_told_reaches_the_policy(small_data: Path) -> None:
    """With documents that say nothing, no golden answer is in any observation, in ``info`` before the end, or in what is rendered."""
    writer = Writer("Doc 1: a text of no use")
    env = make_vector(small_data, 5, retriever=Simulated(writer, "sft"), max_turns=3)
    observations, infos = env.reset(seed=0, options={"question_id": list(QUESTION_IDS)})
    encode, decode = env.unwrapped.tokenizer.encode, env.unwrapped.tokenizer.decode
    answers = [env._slots[row].episode.question.golden_answers for row in range(5)]  # type: ignore[union-attr]
    for turn in range(2):
        observations, _, _, _, infos = env.step(tuple(encode(f"<search>words {turn}</search>") for _ in range(5)))
        for row, observation in enumerate(observations):
            text = decode(observation.tolist())
            assert "a text of no use" in text
            kept = {key: infos[key][row] for key in infos if not key.startswith("_") and key != "question"}
            shown = text + repr(kept)
            assert not any(answer in shown for answer in answers[row] if answer not in infos["question"][row]), row
    assert all(f"whose answer is {answers[row][0]}." in "".join(writer.prompts) for row in range(5))
    assert "golden_answers" not in infos
    env.close()


def test_progress_of_training_reaches_the_curriculum(small_data: Path) -> None:
    retriever = Simulated(Writer(), "{quality} {query}", Curriculum(0, 1))
    env = make_vector(small_data, 1, retriever=retriever)
    assert retriever.noise_probability == 0
    env.unwrapped.set_progress(203, 203)
    assert retriever.noise_probability == 1
    env.close()


# -- within a composition over the pages of a world ------------------------------------------------------------------------------------


def mixed(simulated: Any, **options: Any) -> dict[str, Any]:
    return {"name": "hybrid", "retrievers": ["bm25", {"name": "filtered", "retriever": simulated}], "depth": 5, **options}


def in_world(number: int, **more: str) -> SearchRequest:
    return SearchRequest("the mayor", 5, "q", "who is the mayor", golden_answers=("Kova",), filters={"world": str(number), **more})


def told(retriever: Any, request: SearchRequest) -> set[str]:
    """The first words of the prompts that came back as documents."""
    [hits] = retriever.search([request])
    return {hit.passage.text.split()[0] for hit in hits if hit.passage.id.startswith("simulated-")}


class Repeats(Writer):
    """Writes the prompt back."""

    def write(self, jobs: Sequence[TextJob]) -> tuple[list[str], int]:
        return [f"Doc 1: {job.prompt}" for job in jobs], 0


def test_the_curriculum_goes_on_within_a_composition_in_each_world_of_each_split() -> None:
    source = WorldSource("train")
    retriever = source.build_retriever(mixed(Simulated(Repeats(), "{quality} {query}", Curriculum(0, 1))))
    elsewhere = {"split": "dev", "recipe": _scope(source)["recipe"]}
    before = [in_world(1), in_world(1, **elsewhere)]
    assert follows_progress(retriever)
    assert [told(retriever, request) for request in before] == [{"useful"}] * 2
    key = retriever.cache_key(in_world(1))
    retriever.set_progress(9, 9)  # type: ignore[attr-defined]
    after = [*before, in_world(2), in_world(2, **elsewhere)]
    assert [told(retriever, request) for request in after] == [{"noisy"}] * 4
    assert retriever.cache_key(in_world(1)) != key
    again = pickle.loads(pickle.dumps(retriever))
    assert told(again, in_world(1)) == {"noisy"}
    with pytest.raises(RetrieverError, match="number of all steps"):
        retriever.set_progress(9, 0)  # type: ignore[attr-defined]


def test_a_memory_round_such_worlds_forgets_when_the_curriculum_moves() -> None:
    config = mixed(Simulated(Repeats(), "{quality} {query}", Curriculum(0, 1)), cache_entries=100)
    env: Any = gym.make("SearchQA-World-v0", split="train", retriever=config).unwrapped
    assert told(env.rules.retriever, in_world(1)) == {"useful"}
    env.set_progress(9, 9)
    assert told(env.rules.retriever, in_world(1)) == {"noisy"}
    env.close()


def test_counts_are_those_of_all_worlds_also_of_those_that_are_no_longer_kept() -> None:
    source = WorldSource("train")
    source.worlds_in_memory = 1
    retriever: Any = source.build_retriever(mixed(Simulated(Repeats(), "{quality} {query}", Curriculum(1, 1)), cache_entries=0))
    assert retriever.counters()["search/simulated_answers"] == 0
    for number in (0, 1, 0, 2):
        retriever.search([in_world(number), replace(in_world(number), query="the river")])
    counted = retriever.counters()
    assert (counted["search/simulated_answers"], counted["search/simulated_noisy"]) == (8, 8)
    assert (counted["search/backend_calls"], counted["search/backend_requests"]) == (8, 16)  # of bm25 and of filtered


def test_a_retriever_of_pages_alone_follows_no_progress_and_keeps_its_memory() -> None:
    for config in ({"name": "bm25"}, {"name": "hybrid", "retrievers": ["bm25", "random"]}):
        retriever: Any = WorldSource("train").build_retriever({**config, "cache_entries": 9})
        assert not follows_progress(retriever)
        retriever.search([in_world(1)])
        retriever.set_progress(1, 2)
        retriever.search([in_world(1)])
        assert (retriever.hits, retriever.misses) == (1, 1)


def test_worlds_share_one_client_of_an_endpoint_which_can_be_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    config = {"name": "simulated", "url": f"http://127.0.0.1:{port}", "retries": 0, "deadline": 5}
    retriever: Any = WorldSource("train").build_retriever(mixed(config))

    def clients() -> int:
        return sum(thread.name == "searchqa-online" for thread in threading.enumerate())

    before = clients()
    for number in range(3):
        with pytest.raises(RetrieverUnavailable):
            retriever.search([in_world(number)])
    assert clients() == before + 1
    assert retriever.counters()["search/simulator_calls"] == 3
    retriever.close()
    assert clients() == before


# -- the generated world, with a model of its own ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the world's tokenizer, as this project's trainers save it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer("world")
    folder = tmp_path_factory.mktemp("world_simulator")
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    (folder / RECORD_FILE).write_text(json.dumps({"name": tokenizer.name, "vocab_size": tokenizer.vocab_size}), encoding="utf-8")
    return folder


@pytest.fixture
def config(checkpoint: Path) -> dict[str, Any]:
    return {"name": "simulated", "checkpoint": str(checkpoint), "prompt": "world", "max_tokens": 20, "noise": {"start": 0.5, "end": 0.5}}


@pytest.fixture
def world(config: dict[str, Any]) -> Iterator[Any]:
    env = gym.make_vec("SearchQA-World-v0", num_envs=6, retriever=config, autoreset_mode="DISABLED")
    yield env
    env.close()


def test_a_world_checkpoint_is_read_with_the_worlds_tokenizer(checkpoint: Path) -> None:
    model = TextModel(checkpoint)
    assert model.tokenizer == build_tokenizer("world")


def test_another_version_of_the_tokenizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / RECORD_FILE).write_text(json.dumps({"name": "world-0", "vocab_size": 554}), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="world-0"):
        TextModel(tmp_path)


def test_the_worlds_prompt_is_short(world: Any) -> None:
    """Beside question, answer and query it has eight tokens."""
    encode = build_tokenizer("world").encode
    question, answer, query = "what is Tuki 's star ?", "Moso", "Tuki"
    for noisy, word in ((False, " yes"), (True, " no")):
        ids = encode(PROMPTS["world"].write(noisy, 5, query, question, answer))
        assert len(ids) == 8 + len(encode(f" {question}")) + len(encode(f" {answer}")) + len(encode(f" {query}"))
        assert build_tokenizer("world").decode(ids).startswith(f"{word} 5<answer> Moso</answer>")


def test_rows_of_a_generated_world_get_what_they_would_get_alone(world: Any, config: dict[str, Any]) -> None:
    """With a real model, while other rows end: the text of a row is that of its request alone."""
    _, infos = world.reset(seed=11)
    encode = world.unwrapped.tokenizer.encode
    questions = [str(question) for question in infos["question"]]
    retriever = world.unwrapped.rules.retriever
    asked = []
    keep = retriever.search

    def search(requests: Any) -> Any:
        asked.extend(requests)
        return keep(requests)

    retriever.search = search
    finished = [2, 3]
    first = [f"<search>{question}</search>" if row not in finished else "<answer> x </answer>" for row, question in enumerate(questions)]
    world.step(tuple(np.array(encode(text), dtype=np.int32) for text in first))
    going = [row for row in range(6) if row not in finished]
    world.unwrapped.step_at(going, [encode(f"<search>{questions[row]} again</search>") for row in going])
    assert sorted(request.query for request in asked) == sorted(f"{questions[row]}{more}" for row in going for more in ("", " again"))
    assert all(request.query.removesuffix(" again") == request.question and request.golden_answers for request in asked)
    from searchqa_retrievers import Corpus, build_retriever

    alone = build_retriever({**config, "cache_entries": 0, "batch_size": 1}, Corpus.from_passages([]))
    assert keep(asked) == [alone.search([request])[0] for request in asked]
    assert sum(map(len, keep(asked))) > 0


def test_runs_can_log_the_share_of_noisy_answers(world: Any) -> None:
    _, infos = world.reset(seed=1)
    encode = world.unwrapped.tokenizer.encode
    world.step(tuple(np.array(encode(f"<search>{question}</search>"), dtype=np.int32) for question in infos["question"]))
    counted = world.unwrapped.search_counters()
    assert counted["search/simulated_answers"] == 6
    assert 0 <= counted["search/simulated_noisy"] <= 6
    assert counted["search/simulated_expected_noisy"] == 3


def test_the_spec_of_an_environment_keeps_the_configuration(world: Any, config: dict[str, Any]) -> None:
    assert pickle.loads(pickle.dumps(world.unwrapped.rules.retriever)).stamp() == world.unwrapped.rules.retriever.stamp()
