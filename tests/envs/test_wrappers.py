"""The other views give the same episodes as the environment itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from searchqa_envs.errors import ConfigurationError, InvalidSegmentError
from searchqa_envs.wrappers import PaddedTokens, TextView, TokenLevel

WRAPPERS = {
    "PaddedTokens": PaddedTokens,
    "TextView": TextView,
    "TokenLevel": TokenLevel,
    "PaddedTokens(TokenLevel)": lambda env: PaddedTokens(TokenLevel(env)),
}
SEGMENTS = ["<search> Poland </search> dropped", "hm", "<search> river </search>", "<answer> Vistula </answer>"]


@pytest.fixture
def env(small_data: Path) -> Any:
    return gym.make("SearchQA-HotpotQA-v0", data_dir=str(small_data), max_context_tokens=4096, max_segment_tokens=256)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("env_id", ["SearchQA-HotpotQA-v0", "SearchQA-World-v0"])
@pytest.mark.filterwarnings("ignore:.*(render|unwrapped).*:UserWarning")
def test_check_env_passes_for_every_wrapper(name: str, env_id: str, small_data: Path) -> None:
    arguments = {} if "World" in env_id else {"data_dir": str(small_data)}
    check_env(WRAPPERS[name](gym.make(env_id, **arguments)))


def base_episode(env: Any) -> list[tuple[Any, ...]]:
    steps = [env.reset(seed=1, options={"question_id": "q1"})]
    return steps + [env.step(env.unwrapped.tokenizer.encode(segment)) for segment in SEGMENTS]


def test_padded_tokens_hold_the_same_episode(env: Any) -> None:
    plain = base_episode(env)
    padded = PaddedTokens(env)
    observation, info = padded.reset(seed=1, options={"question_id": "q1"})
    pad = env.unwrapped.tokenizer.pad_id
    for step, segment in zip(plain, [*SEGMENTS, None], strict=True):
        length = len(step[0])
        assert observation in padded.observation_space
        assert np.array_equal(observation["input_ids"][-length:], step[0])
        assert (observation["input_ids"][:-length] == pad).all()
        assert observation["attention_mask"].sum() == length
        assert observation["attention_mask"][-length:].all()
        assert info["turn_record"] == step[-1]["turn_record"]
        if segment is not None:
            action = np.full(256, pad)
            ids = env.unwrapped.tokenizer.encode(segment)
            action[: len(ids)] = ids
            assert action in padded.action_space
            observation, reward, terminated, _, info = padded.step(action)
    assert (reward, terminated) == (1.0, True)


def test_text_view_holds_the_same_episode(env: Any) -> None:
    plain = base_episode(env)
    view = TextView(env)
    observation, _ = view.reset(seed=1, options={"question_id": "q1"})
    assert observation == env.unwrapped.tokenizer.decode(plain[0][0])
    for segment, step in zip(SEGMENTS, plain[1:], strict=True):
        observation, reward, terminated, truncated, info = view.step(segment)
        assert observation in view.observation_space
        assert observation == env.unwrapped.tokenizer.decode(step[0])
        assert (reward, terminated, truncated) == step[1:4]
        assert info["turn_record"] == step[4]["turn_record"]


def test_token_level_holds_the_same_episode(env: Any) -> None:
    plain = base_episode(env)
    tokens = TokenLevel(env)
    context, _ = tokens.reset(seed=1, options={"question_id": "q1"})
    turns = []
    for segment in [*SEGMENTS[:1], "hm" + "x" * 254, *SEGMENTS[2:]]:  # a segment without a tag ends when it is full
        for token in env.unwrapped.tokenizer.encode(segment):
            previous = context
            context, reward, terminated, _, info = tokens.step(token)
            assert context in tokens.observation_space
            if "action" in info:
                turns.append(info)
                break
            assert reward == 0.0
            assert np.array_equal(context, np.append(previous, token))
    assert [info["action"] for info in turns] == ["search", "invalid", "search", "answer"]
    assert turns[0]["turn_record"] == plain[1][-1]["turn_record"]
    assert (reward, terminated) == (1.0, True)


def test_token_level_ends_a_segment_at_end_of_sequence_and_refuses_foreign_ids(env: Any) -> None:
    tokens = TokenLevel(env)
    tokens.reset(seed=0)
    assert "action" not in tokens.step(65)[4]
    with pytest.raises(InvalidSegmentError):
        tokens.step(10**6)
    assert tokens.step(env.unwrapped.tokenizer.eos_id)[4]["turn_record"].segment_tokens_used == 2


def test_wrappers_survive_the_spec_round_trip(env: Any) -> None:
    again = gym.make(PaddedTokens(env).spec)
    assert isinstance(again, PaddedTokens)
    assert again.observation_space == PaddedTokens(env).observation_space


def test_a_foreign_environment_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="CartPole"):
        PaddedTokens(gym.make("CartPole-v1"))
