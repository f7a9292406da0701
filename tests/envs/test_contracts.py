"""The contracts that ship with the package: our rewards and environments keep them, and they catch what breaks them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import searchqa_envs
from searchqa_envs.env import SearchQAEnv
from searchqa_envs.episode_types import EpisodeView
from searchqa_envs.rewards import PRESETS
from searchqa_envs.testing import RewardContract, SearchEnvContract

assert searchqa_envs.ENV_IDS


class TestPresets(RewardContract):
    @pytest.fixture(autouse=True, params=sorted(PRESETS))
    def _choose(self, request: pytest.FixtureRequest) -> None:
        self.name = request.param

    def make_reward(self) -> Any:
        return {"name": self.name, "retrieval_score": 0.1} if "retrieval_score" in PRESETS[self.name].options else self.name


class TestSum(RewardContract):
    def make_reward(self) -> Any:
        return ["em", {"name": "r1_searcher_stage1", "weight": 0.2}, brevity]


def brevity(episode: EpisodeView) -> dict[str, float]:
    return {"brevity": -len(episode.turns)}


ENVIRONMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "world": ("SearchQA-World-v0", {"reward": "f1"}),
    "world, the last turn announced": ("SearchQA-World-v0", {"max_turns": 2, "forced_answer": True, "prompt": "published"}),
    "custom, search-r1": ("SearchQA-Custom-v0", {"reward": "search_r1_format"}),
    "custom, r1-searcher": ("SearchQA-Custom-v0", {"dialect": "r1-searcher", "reward": "r1_searcher"}),
    "custom, little room": ("SearchQA-Custom-v0", {"dialect": "zerosearch", "max_context_tokens": 1600, "max_segment_tokens": 100}),
    "custom, no search": ("SearchQA-Custom-v0", {"retriever": "none"}),
}


class TestEnvironments(SearchEnvContract):
    @pytest.fixture(autouse=True, params=sorted(ENVIRONMENTS))
    def _choose(self, request: pytest.FixtureRequest, small_data: Path) -> None:
        self.env_id, arguments = ENVIRONMENTS[request.param]
        files = {"questions": str(small_data / "nq" / "questions.jsonl"), "corpus": str(small_data / "nq" / "corpus.jsonl.gz")}
        self.arguments = {**files, **arguments} if "Custom" in self.env_id else arguments

    def make_env(self) -> gym.Env[Any, Any]:
        return gym.make(self.env_id, **self.arguments)


# What breaks a contract is caught


class ReadsPassages:
    def __deepcopy__(self, memo: object) -> ReadsPassages:
        return self

    def __call__(self, episode: EpisodeView) -> dict[str, float]:
        return {"hit": float("Vistula" in episode.response)}


class Copied:
    def __call__(self, episode: EpisodeView) -> dict[str, float]:
        return {"em": 0.0}


class Counting:
    def __init__(self) -> None:
        self.calls = count()

    def __call__(self, episode: EpisodeView) -> dict[str, float]:
        return {"calls": float(next(self.calls))}


def changing_terms(episode: EpisodeView) -> dict[str, float]:
    return {"answered": 1.0} if episode.answer else {}


@pytest.mark.parametrize(
    ("reward", "test", "message"),
    [
        (ReadsPassages, "test_passages_change_no_term_but_those_about_retrieval_and_structure", "retrieval_"),
        (Copied, "test_deepcopy_returns_the_object_itself", "__deepcopy__"),
        (Counting, "test_equal_episodes_have_equal_terms", "equal episodes"),
        (lambda: changing_terms, "test_every_episode_has_the_same_terms", "same terms"),
    ],
)
def test_a_broken_reward_is_caught(reward: Callable[[], Any], test: str, message: str) -> None:
    class Contract(RewardContract):
        def make_reward(self) -> Any:
            return reward()

    with pytest.raises(AssertionError, match=message):
        getattr(Contract(), test)()


class SharedArrays(SearchQAEnv):
    def step(self, action: Any) -> Any:
        observation, *rest, info = super().step(action)
        info["turn_record"].env_tokens.fill(0)
        return observation, *rest, info


class BothEnds(SearchQAEnv):
    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or truncated, terminated or truncated, info


class ExtraKey(SearchQAEnv):
    def step(self, action: Any) -> Any:
        *result, info = super().step(action)
        return *result, {**info, "mine": 1}


class ForgetsProgress(SearchQAEnv):
    def set_state(self, state: Any) -> None:
        super().set_state({**state, "progress": [0, 0]})


class OwnRandomness(SearchQAEnv):
    numbers = count()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return super().reset(seed=None if seed is None else seed + next(self.numbers), options=options)


class TakesAnything(SearchQAEnv):
    def step(self, action: Any) -> Any:
        return super().step(action if isinstance(action, list) and action and isinstance(action[0], int) and 0 <= action[0] < 9 else [5])


@pytest.mark.parametrize(
    ("kind", "test"),
    [
        (SharedArrays, "test_any_segment_of_valid_ids_is_taken"),
        (BothEnds, "test_any_segment_of_valid_ids_is_taken"),
        (ExtraKey, "test_info_has_the_same_keys_at_each_kind_of_call"),
        (ForgetsProgress, "test_an_episode_continues_from_its_state"),
        (OwnRandomness, "test_the_same_seed_gives_the_same_episodes"),
        (TakesAnything, "test_what_is_no_segment_is_refused"),
    ],
)
def test_a_broken_environment_is_caught(kind: type[SearchQAEnv], test: str) -> None:
    class Contract(SearchEnvContract):
        def make_env(self) -> gym.Env[Any, Any]:
            return kind(dataset="world")

    with pytest.raises(AssertionError):
        getattr(Contract(), test)()
