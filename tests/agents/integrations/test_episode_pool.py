"""Many coroutines play episodes in one vector environment; each gets its own, and the retriever is asked for all at once."""

from __future__ import annotations

import asyncio

import gymnasium as gym
import numpy as np
import pytest

import searchqa_envs  # noqa: F401, registers the ids
from searchqa_agents.integrations.episode_pool import EpisodePool, shared_pool
from searchqa_agents.integrations.played_episode import EpisodeLostError, Generated, play_episode
from searchqa_envs.errors import ConfigurationError, EpisodeStateError, InvalidSegmentError
from searchqa_retrievers import Hit, Passage


class Pages:
    """One made-up page for each query."""

    def __init__(self):
        self.calls = []

    def __deepcopy__(self, memo):
        return self

    def search(self, requests):
        self.calls.append([request.query for request in requests])
        return [[Hit(Passage("1", "Title", f"about {request.query}"), 1.0)] for request in requests]


def make_pool(places):
    venv = gym.make_vec("SearchQA-World-v0", num_envs=places, autoreset_mode="DISABLED", retriever=Pages())
    return EpisodePool(venv.unwrapped)


async def play(pool, index, *texts):
    async with pool.episode({"index": index}, seed=0) as episode:
        for text in texts:
            await episode.step(pool.venv.tokenizer.encode(text))
        return episode


TEXTS = ("<search> a </search>", "<search> b </search>", "<answer> c </answer>")


def test_each_coroutine_plays_the_episode_that_the_plain_environment_plays():
    pool = make_pool(3)

    async def all_of_them():
        return await asyncio.gather(*(play(pool, index, *TEXTS) for index in range(8)))

    for index, episode in enumerate(asyncio.run(all_of_them())):
        env = gym.make("SearchQA-World-v0", retriever=pool.venv.rules.retriever).unwrapped
        env.reset(seed=0, options={"index": index})
        for text in TEXTS:
            observation, _, terminated, truncated, info = env.step(env.tokenizer.encode(text))
        assert np.array_equal(episode.observation, observation)
        assert np.array_equal(episode.info["turn_record"].loss_mask, info["turn_record"].loss_mask)
        assert episode.info["question_id"] == info["question_id"]
        assert episode.ended == (terminated or truncated)


def test_steps_that_wait_together_are_one_call_of_the_retriever():
    pool = make_pool(4)
    calls = pool.venv.rules.retriever.calls

    async def all_of_them():
        await asyncio.gather(*(play(pool, index, f"<search> q{index} </search>") for index in range(4)))

    asyncio.run(all_of_them())
    assert len(calls) == 1
    assert sorted(calls[0]) == ["q0", "q1", "q2", "q3"]


def test_a_bad_segment_or_question_is_an_error_of_its_own_coroutine_only():
    pool = make_pool(4)

    async def bad_segment():
        async with pool.episode({"index": 0}) as episode:
            with pytest.raises(InvalidSegmentError):
                await episode.step([10**9])
            await episode.step(pool.venv.tokenizer.encode("<answer> x </answer>"))
            assert episode.ended

    async def bad_question():
        with pytest.raises(ConfigurationError):
            await play(pool, 10**9)

    async def all_of_them():
        return await asyncio.gather(bad_segment(), bad_question(), play(pool, 1, *TEXTS), play(pool, 2, *TEXTS))

    assert all(episode.ended for episode in asyncio.run(all_of_them())[2:])
    assert sorted(pool._free) == [0, 1, 2, 3]


def test_places_come_back_when_a_coroutine_is_cancelled_and_the_pool_serves_another_event_loop():
    pool = make_pool(1)

    async def hold():
        async with pool.episode({"index": 0}):
            await asyncio.sleep(60)

    async def cancelled():
        holder = asyncio.create_task(hold())
        waiter = asyncio.create_task(play(pool, 1, *TEXTS))
        await asyncio.sleep(0.05)
        assert not waiter.done()
        holder.cancel()
        return await waiter

    for _ in range(2):
        assert asyncio.run(cancelled()).ended
    assert pool._free == [0]


def test_a_second_event_loop_is_refused_while_episodes_of_the_first_go_on():
    pool = make_pool(2)

    async def hold():
        async with pool.episode({"index": 0}):
            with pytest.raises(EpisodeStateError, match="one event loop at a time"):
                await asyncio.to_thread(asyncio.run, play(pool, 1, *TEXTS))
        return await play(pool, 1, *TEXTS)

    assert asyncio.run(hold()).ended


def test_the_shared_pool_is_made_once():
    arguments = {"num_envs": 2, "hops": 2, "split": "dev"}
    assert shared_pool("SearchQA-World-v0", **arguments) is shared_pool("SearchQA-World-v0", **arguments)
    assert shared_pool("SearchQA-World-v0", num_envs=2, hops=1, split="dev") is not shared_pool("SearchQA-World-v0", **arguments)


@pytest.mark.parametrize("logprobs", [[None], [float("nan")], [float("-inf")], []])
def test_an_engine_that_gives_no_numbers_loses_the_episode(logprobs):
    pool = make_pool(1)
    answer = pool.venv.tokenizer.encode("<answer> x </answer>")
    question_id = pool.venv.source[0].id
    tries = []

    async def generate(context):
        tries.append(context)
        return Generated(answer, logprobs and logprobs * len(answer))

    with pytest.raises(EpisodeLostError, match="log-probabilities"):
        asyncio.run(play_episode(pool, question_id, generate, retries=1))
    assert len(tries) == 2


def test_log_probabilities_may_be_an_array():
    pool = make_pool(1)
    answer = pool.venv.tokenizer.encode("<answer> x </answer>")

    async def generate(context):
        return Generated(np.array(answer), np.full(len(answer), -0.5, dtype=np.float32))

    played = asyncio.run(play_episode(pool, pool.venv.source[0].id, generate, retries=0))
    assert played.logprobs.tolist() == [0.0] * played.prompt_length + [-0.5] * len(answer)
