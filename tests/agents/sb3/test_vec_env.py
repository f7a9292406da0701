"""Stable-Baselines3's view of the vector environment: the same episodes, one retriever call, and a lost search back end."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

import searchqa_envs  # noqa: F401, registers the ids
from searchqa_agents.sb3 import SearchQAVecEnv, make_vec_env
from searchqa_envs.errors import ConfigurationError, InvalidSegmentError
from searchqa_envs.world.source import WorldSource
from searchqa_envs.wrappers import PaddedTokens, TokenLevel
from searchqa_retrievers.types import RetrieverUnavailable

WORLD = {"hops": 2, "num_worlds": 3}
SCRIPT = (
    "<search> Who is it </search>",
    "",
    "<answer> nobody </answer>",
    "no tag at all",
    "<search> a </search> and more <answer> b </answer>",
    "<search> other words </search>",
)


class Flaky:
    """A real retriever that counts its calls, and loses those whose number ``lost`` accepts."""

    def __init__(self, lost=lambda call: False):
        self.inner = WorldSource(**WORLD).build_retriever({"name": "bm25"})
        self.lost = lost
        self.calls = 0

    def search(self, requests):
        self.calls += 1
        if self.lost(self.calls):
            raise ConnectionError("no route to the index")
        return self.inner.search(requests)


def single(level="segment", **arguments):
    env = gym.make("SearchQA-World-v0", **WORLD, **arguments)
    return PaddedTokens(TokenLevel(env) if level == "token" else env)


def padded(env, *texts):
    """Texts as an action of all environments."""
    tokenizer = env.get_attr("tokenizer")[0]
    actions = np.full((env.num_envs, len(env.action_space.nvec)), tokenizer.pad_id, dtype=np.int64)
    for row, text in zip(actions, texts, strict=True):
        ids = tokenizer.encode(text)[: len(row)]
        row[: len(ids)] = ids
    return actions


def assert_equal_observations(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        np.testing.assert_array_equal(left[name], right[name])


@pytest.mark.parametrize("level", ["segment", "token"])
def test_episodes_are_those_of_single_environments_under_the_wrappers(level):
    singles = DummyVecEnv([lambda: single(level, max_segment_tokens=12, max_turns=3)] * 4)
    env = make_vec_env("SearchQA-World-v0", 4, level=level, max_segment_tokens=12, max_turns=3, **WORLD)
    assert env.observation_space == singles.observation_space
    assert env.action_space == singles.action_space
    singles.seed(5)
    env.seed(5)
    assert_equal_observations(env.reset(), singles.reset())
    rng = np.random.default_rng(0)
    tokenizer = env.get_attr("tokenizer")[0]
    words = np.array(tokenizer.encode("".join(SCRIPT)))
    ends = 0
    for _ in range(40 if level == "segment" else 150):
        if level == "segment":
            actions = padded(env, *(SCRIPT[i] for i in rng.integers(len(SCRIPT), size=4)))
        else:
            actions = rng.choice(words, size=4)
        observations, rewards, dones, infos = env.step(actions)
        theirs = singles.step(actions)
        assert_equal_observations(observations, theirs[0])
        np.testing.assert_array_equal(rewards, theirs[1])
        np.testing.assert_array_equal(dones, theirs[2])
        for done, info, other in zip(dones, infos, theirs[3], strict=True):
            assert {name: info[name] for name in ("question_id", "turn")} == {name: other[name] for name in ("question_id", "turn")}
            assert info.get("action") == other.get("action")
            if done:
                ends += 1
                assert info["metrics"] == other["metrics"]
                assert_equal_observations(info["terminal_observation"], other["terminal_observation"])
    assert ends > 5
    env.close()


def test_budgets_are_part_of_the_task_and_nothing_is_bootstrapped_beyond_them():
    env = make_vec_env("SearchQA-World-v0", 2, max_turns=1, **WORLD)
    env.reset()
    _, _, dones, infos = env.step(padded(env, "<search> a </search>", "<answer> b </answer>"))
    assert dones.all()
    assert [info["TimeLimit.truncated"] for info in infos] == [False, False]


def test_the_whole_step_is_one_retriever_call():
    retriever = Flaky()
    env = make_vec_env("SearchQA-World-v0", 5, retriever=retriever, **WORLD)
    env.reset()
    env.step(padded(env, *(f"<search> word {i} </search>" for i in range(5))))
    assert retriever.calls == 1


def test_infos_are_plain_and_monitored(tmp_path):
    env = make_vec_env("SearchQA-World-v0", 2, seed=1, monitor_dir=tmp_path / "log", **WORLD)
    env.reset()
    env.step(padded(env, "<search> a </search>", "<answer> nobody </answer>"))
    _, _, dones, infos = env.step(padded(env, "<answer> nobody </answer>", "<answer> nobody </answer>"))
    assert dones.all()
    assert infos[0]["episode"]["l"] == 2
    assert infos[0]["searches"] == 1.0
    assert infos[0]["is_success"] is False
    allowed = (str, int, float, bool, type(None), tuple, dict, np.float32)
    for info in infos:
        assert all(isinstance(value, allowed) for value in info.values()), info
    env.close()
    results = load_results(str(tmp_path / "log"))
    assert results["searches"].tolist() == [0.0, 1.0, 0.0]
    assert set(results["em"]) == {0.0}


def test_padding_and_nonsense_are_actions_like_any_other():
    env = make_vec_env("SearchQA-World-v0", 4, **WORLD)
    env.reset()
    length, size = len(env.action_space.nvec), int(env.action_space.nvec[0])
    pad_id = env.observation_space.pad_id
    hole = np.full(length, pad_id)
    hole[-1] = 5
    env.action_space.seed(0)
    actions = np.stack([np.full(length, pad_id), env.action_space.sample(), hole, np.full(length, size - 1)])
    _, rewards, dones, infos = env.step(actions)
    assert [info["action"] for info in infos] == ["invalid"] * 4
    assert not dones.any()
    assert not rewards.any()
    with pytest.raises(InvalidSegmentError, match="vocabulary"):
        env.step(np.full((4, length), size))


def test_a_lost_search_begins_the_episode_again_with_the_same_question():
    retriever = Flaky(lost=lambda call: call % 3 == 0)
    env = make_vec_env("SearchQA-World-v0", 2, seed=3, retriever=retriever, **WORLD)
    opening = env.reset()
    search = padded(env, "<search> a </search>", "<search> b </search>")
    env.step(search)
    env.step(search)
    observations, rewards, dones, infos = env.step(padded(env, "<search> a </search>", "<answer> nobody </answer>"))
    assert "no route to the index" in infos[0]["backend_error"]
    assert (dones.tolist(), rewards.tolist()) == ([False, True], [0.0, 0.0])
    np.testing.assert_array_equal(observations["input_ids"][0], opening["input_ids"][0])
    assert infos[1]["backend_error"] is None
    assert env.backend_errors == 1
    _, _, _, infos = env.step(search)
    assert (infos[0]["turn"], infos[0]["backend_error"]) == (1, None)


@pytest.mark.parametrize("level", ["segment", "token"])
def test_a_back_end_that_stays_away_is_an_error(level):
    env = make_vec_env("SearchQA-World-v0", 2, level=level, retriever=Flaky(lost=lambda call: True), max_backend_errors=3, **WORLD)
    env.reset()
    action = padded(env, "<search> a </search>", "<search> b </search>") if level == "segment" else None
    tokens = env.get_attr("tokenizer")[0].encode("<search> a </search>")

    def play():
        for _ in range(10):
            if level == "segment":
                env.step(action)
            else:
                for token in tokens:
                    env.step(np.array([token, token]))

    with pytest.raises(RetrieverUnavailable, match=r"3 steps in a row.*no route.*max_backend_errors is 3"):
        play()
    assert env.backend_errors == 6


def test_an_answered_search_in_between_starts_the_count_anew():
    retriever = Flaky(lost=lambda call: call % 2 == 1)
    env = make_vec_env("SearchQA-World-v0", 1, retriever=retriever, max_backend_errors=2, **WORLD)
    env.reset()
    for _ in range(12):
        env.step(padded(env, "<search> a </search>"))
    assert env.backend_errors >= 4


def test_questions_of_ones_own_and_their_seeds():
    env = make_vec_env("SearchQA-World-v0", 2, seed=7, **WORLD)
    env.reset()
    first = [info["question_id"] for info in env.unwrapped.reset_infos]
    env.seed(7)
    env.reset()
    assert [info["question_id"] for info in env.unwrapped.reset_infos] == first
    env.reset()  # seeds are used once
    assert [info["question_id"] for info in env.unwrapped.reset_infos] != first
    env.set_options([{"question_id": first[1]}, {}])
    env.reset()
    assert env.unwrapped.reset_infos[0]["question_id"] == first[1]


def test_what_stable_baselines3_asks_of_single_environments():
    env = make_vec_env("SearchQA-World-v0", 3, **WORLD)
    assert isinstance(env, VecMonitor)
    assert env.env_is_wrapped(Monitor) == [False] * 3
    assert not is_wrapped(env, Monitor)
    assert env.get_attr("max_segment_tokens") == [48, 48, 48]
    assert env.get_attr("max_segment_tokens", indices=1) == [48]
    assert env.get_attr("backend_errors", indices=[0]) == [0]
    assert env.has_attr("stamp")
    assert not env.has_attr("nothing_like_that")
    assert env.env_method("set_progress", 3, 9) == [None] * 3
    assert env.get_attr("rules")[0].progress == (3, 9)
    with pytest.raises(ConfigurationError, match=r"indices=1.*DummyVecEnv"):
        env.env_method("set_progress", 3, 9, indices=1)
    with pytest.raises(ConfigurationError, match="share their rules"):
        env.set_attr("anything", 3, indices=[0, 2])


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ConfigurationError, match="level must be 'segment' or 'token'; got 'word'"):
        make_vec_env("SearchQA-World-v0", 1, level="word", **WORLD)
    with pytest.raises(ConfigurationError, match="make_vec_env"):
        SearchQAVecEnv(gym.make_vec("SearchQA-World-v0", num_envs=1, **WORLD))
    with pytest.raises(ConfigurationError, match="num_envs"):
        make_vec_env("SearchQA-World-v0", 0, **WORLD)
    with pytest.raises(ConfigurationError, match="max_backend_errors"):
        make_vec_env("SearchQA-World-v0", 1, max_backend_errors=0, **WORLD)


@pytest.mark.parametrize(("env_id", "arguments"), [("CartPole-v1", {}), ("SearchQA-World-v0", {"autoreset_mode": "SAME_STEP"})])
def test_what_make_vec_env_cannot_make_is_named(env_id, arguments):
    with pytest.raises(ConfigurationError, match=env_id):
        make_vec_env(env_id, 2, **arguments)
