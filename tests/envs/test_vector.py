"""The vector environment: identical to single ones, one retriever call per step, subsets, autoreset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode

from searchqa_envs.env import SearchQAEnv
from searchqa_envs.errors import ConfigurationError, EpisodeStateError, InvalidSegmentError, UnknownQuestionError
from searchqa_envs.vector import SearchQAVectorEnv, columns
from searchqa_retrievers import Hit, Passage, RetrieverUnavailable, SearchRequest

SEGMENTS = [
    "<search> Poland </search>",
    "<search> Marie Curie </search>",
    "no action",
    "<answer> Vistula </answer>",
    "<answer> Paris </answer>",
    "<search> Baltic Sea </search> trailing",
    "",
]


class Counting:
    """Counts calls and requests; fails while ``down``."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.down = False

    def __deepcopy__(self, memo: object) -> Counting:
        return self

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        self.calls.append([request.query for request in requests])
        if self.down:
            raise RetrieverUnavailable("down")
        return [[Hit(Passage(request.query, request.query, "text"), 1.0)] for request in requests]

    def cache_key(self, request: SearchRequest) -> str:
        return request.query


def make_vector(small_data: Path, num_envs: int, mode: AutoresetMode = AutoresetMode.DISABLED, **arguments: Any) -> SearchQAVectorEnv:
    env = gym.make_vec("SearchQA-HotpotQA-v0", num_envs=num_envs, autoreset_mode=mode, data_dir=str(small_data), **arguments)
    assert isinstance(env.unwrapped, SearchQAVectorEnv)
    return env.unwrapped


def script(rng: np.random.Generator, tokenizer: Any, count: int) -> list[list[int]]:
    return [tokenizer.encode(SEGMENTS[i]) for i in rng.integers(len(SEGMENTS), size=count)]


def plain(value: Any) -> Any:
    """Object arrays as lists, so that Gymnasium's own comparison reaches what is in them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) and value.dtype == object else value


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_a_vector_equals_gymnasiums_vector_of_single_environments(small_data: Path, mode: AutoresetMode) -> None:
    ours = make_vector(small_data, 5, mode)
    theirs = gym.make_vec(
        "SearchQA-HotpotQA-v0", num_envs=5, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, data_dir=str(small_data)
    )
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    ours_reset, theirs_reset = ours.reset(seed=7), theirs.reset(seed=7)
    assert data_equivalence(ours_reset[0], theirs_reset[0], exact=True)
    assert data_equivalence(plain(ours_reset[1]), plain(theirs_reset[1]), exact=True)
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(40):
        segments = tuple(np.array(ids, dtype=np.int32) for ids in script(rng, ours.tokenizer, 5))
        mine, other = ours.step(segments), theirs.step(segments)
        for ours_part, theirs_part in zip(mine[:4], other[:4], strict=True):
            assert data_equivalence(ours_part, theirs_part, exact=True)
        assert data_equivalence(plain(mine[4]), plain(other[4]), exact=True)
        ended += int((mine[2] | mine[3]).sum())
    assert ended > 20


def test_a_vector_equals_single_environments_step_by_step(small_data: Path) -> None:
    vector = make_vector(small_data, 4)
    singles = [SearchQAEnv("hotpotqa", data_dir=str(small_data)) for _ in range(4)]
    observations, infos = vector.reset_at(range(4), seed=3)
    for i, single in enumerate(singles):
        assert data_equivalence(single.reset(seed=3 + i), (observations[i], infos[i]), exact=True)
    rng = np.random.default_rng(1)
    alive = list(range(4))
    while alive:
        segments = script(rng, vector.tokenizer, len(alive))
        observations, rewards, terminated, truncated, infos = vector.step_at(alive, segments)
        for place, (i, segment) in enumerate(zip(alive, segments, strict=True)):
            expected = (observations[place], float(rewards[place]), bool(terminated[place]), bool(truncated[place]), infos[place])
            assert data_equivalence(tuple(singles[i].step(segment)), expected, exact=True)
        alive = [i for place, i in enumerate(alive) if not (terminated[place] or truncated[place])]


def test_asynchronous_environments_work_too(small_data: Path) -> None:
    env = gym.make_vec(
        "SearchQA-HotpotQA-v0", num_envs=2, vectorization_mode="async", vector_kwargs={"shared_memory": False}, data_dir=str(small_data)
    )
    try:
        observations, _ = env.reset(seed=5)
        reference, _ = make_vector(small_data, 2).reset(seed=5)
        assert data_equivalence(tuple(observations), reference, exact=True)
        _, _, terminated, _, infos = env.step((np.array([65], dtype=np.int32), np.array([66], dtype=np.int32)))
        assert not terminated.any()
        assert list(infos["action"]) == ["invalid", "invalid"]
    finally:
        env.close()


def test_one_retriever_call_per_step_and_equal_queries_once(small_data: Path) -> None:
    retriever = Counting()
    env = make_vector(small_data, 4, retriever=retriever)
    env.reset(seed=0)
    queries = ["same", "other", "same"]
    segments = [env.tokenizer.encode(f"<search> {query} </search>") for query in queries] + [env.tokenizer.encode("hm")]
    _, _, _, _, infos = env.step_at(range(4), segments)
    assert [sorted(call) for call in retriever.calls] == [["other", "same"]]
    assert [info["turn_record"].passages[0].title for info in infos[:3]] == queries


def test_subsets_give_the_trajectories_of_whole_steps(small_data: Path) -> None:
    rng = np.random.default_rng(2)
    whole, parts = make_vector(small_data, 3, max_turns=4), make_vector(small_data, 3, max_turns=4)
    texts = ["<search> Poland </search>", "<search> Curie </search>", "no action", "<search> never closed"]
    segments = [[whole.tokenizer.encode(texts[i]) for i in rng.integers(4, size=3)] for _ in range(4)]
    whole.reset(seed=0)
    parts.reset(seed=0)
    whole_steps = [whole.step(step) for step in segments]
    for i in (2, 0, 1):  # each environment runs to its end before the next begins
        for step, expected in zip(segments, whole_steps, strict=True):
            observations, rewards, *_ = parts.step_at([i], [step[i]])
            assert np.array_equal(observations[0], expected[0][i])
            assert rewards[0] == expected[1][i]


def test_a_reset_mask_and_question_ids_choose(small_data: Path) -> None:
    env = make_vector(small_data, 3)
    first, infos = env.reset(seed=0, options={"question_id": ["q1", "q1", "q1"]})
    assert list(infos["question_id"]) == ["q1", "q1", "q1"]
    env.step([env.tokenizer.encode("<answer> x </answer>")] * 3)
    observations, infos = env.reset(options={"reset_mask": np.array([False, True, False]), "question_id": [None, "q4", None]})
    assert infos["question_id"][1] == "q4"
    assert infos["_question_id"].tolist() == [False, True, False]
    assert len(observations[0]) > len(first[0])  # what was not reset keeps its last observation
    with pytest.raises(EpisodeStateError, match=r"\[0, 2\]"):
        env.step([[1], [1], [1]])
    with pytest.raises(ConfigurationError, match="reset_mask"):
        env.reset(options={"reset_mask": [True, False, False]})


def test_one_bad_segment_moves_no_environment(small_data: Path) -> None:
    env = make_vector(small_data, 2)
    env.reset(seed=0)
    before = json.dumps(env.get_state())
    with pytest.raises(InvalidSegmentError):
        env.step([env.tokenizer.encode("<answer> x </answer>"), [10**6]])
    assert json.dumps(env.get_state()) == before
    with pytest.raises(ConfigurationError, match="one segment per index"):
        env.step([[1]])
    with pytest.raises(ConfigurationError, match="different numbers"):
        env.step_at([0, 0], [[1], [1]])


def test_a_lost_back_end_truncates_only_those_that_searched(small_data: Path) -> None:
    retriever = Counting()
    env = make_vector(small_data, 3, retriever=retriever)
    env.reset(seed=0)
    retriever.down = True
    segments = [env.tokenizer.encode(text) for text in ("<search> a </search>", "hm", "<answer> b </answer>")]
    _, rewards, terminated, truncated, infos = env.step_at(range(3), segments)
    assert truncated.tolist() == [True, False, False]
    assert terminated.tolist() == [False, False, True]
    assert rewards.tolist() == [0.0, 0.0, 0.0]
    assert [info["backend_error"] is not None for info in infos] == [True, False, False]


def test_a_retriever_needs_no_more_than_search(small_data: Path) -> None:
    class Bare:
        def __deepcopy__(self, memo: object) -> Bare:
            return self

        def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
            assert len({(request.query, request.top_k) for request in requests}) == len(requests)
            return [[Hit(Passage("p", request.query, "t"), 1.0)] for request in requests]

    env = make_vector(small_data, 3, retriever=Bare())
    env.reset(seed=0)
    _, _, _, _, infos = env.step_at(range(3), [env.tokenizer.encode(f"<search> {query} </search>") for query in "aba"])
    assert [info["turn_record"].passages[0].title for info in infos] == ["a", "b", "a"]


def test_a_bad_choice_of_question_resets_no_environment(small_data: Path) -> None:
    env = make_vector(small_data, 3)
    env.reset(seed=0)
    before = json.dumps(env.get_state())
    for options in ({"index": [0, 1, 99]}, {"question_id": ["q1", "q2", "none"]}):
        with pytest.raises((ConfigurationError, UnknownQuestionError)):
            env.reset_at(range(3), options=options)
    assert json.dumps(env.get_state()) == before
    assert list(env.reset(options={"index": np.int64(1)})[1]["question_id"]) == ["q2"] * 3


def test_a_column_of_numbers_is_wide_enough_for_all_of_them() -> None:
    merged = columns([{"a": 0}, {"a": 0.5}, {}])
    assert merged["a"].tolist() == [0.0, 0.5, 0.0]
    assert merged["_a"].tolist() == [True, True, False]


def test_states_move_between_vector_and_single_environments(small_data: Path) -> None:
    single = SearchQAEnv("hotpotqa", data_dir=str(small_data))
    single.reset(seed=4)
    single.step(single.tokenizer.encode("<search> Poland </search>"))
    vector = make_vector(small_data, 3)
    vector.set_state_at(range(3), [single.get_state()] * 3)
    segment = vector.tokenizer.encode("<search> Curie </search>")
    observations, *_ = vector.step_at(range(3), [segment] * 3)
    expected, *_ = single.step(segment)
    assert all(np.array_equal(observation, expected) for observation in observations)
    assert vector.get_state_at([1])[0] == single.get_state()
    saved = json.loads(json.dumps(vector.get_state()))
    again = make_vector(small_data, 3)
    again.set_state(saved)
    assert json.dumps(again.get_state()) == json.dumps(vector.get_state())


def test_progress_reaches_retriever_and_state(small_data: Path) -> None:
    class Scheduled(Counting):
        seen: tuple[int, int] | None = None

        def set_progress(self, step: int, total: int) -> None:
            self.seen = (step, total)

    retriever = Scheduled()
    env = make_vector(small_data, 2, retriever=retriever)
    env.set_progress(2, 9)
    assert retriever.seen == (2, 9)
    assert env.get_state_at([0])[0]["progress"] == [2, 9]
    with pytest.raises(ConfigurationError):
        env.set_progress(-1, 9)


def test_gymnasiums_vector_wrappers_go_round_it(small_data: Path) -> None:
    env = gym.wrappers.vector.RecordEpisodeStatistics(make_vector(small_data, 2, AutoresetMode.NEXT_STEP))
    env.reset(seed=0, options={"question_id": "q4"})
    tokenizer = env.unwrapped.tokenizer
    *_, infos = env.step((tokenizer.encode("<answer> Paris </answer>"), tokenizer.encode("hm")))
    assert infos["episode"]["r"].tolist() == [1.0, 0.0]


def test_rendering_and_bad_modes(small_data: Path) -> None:
    env = make_vector(small_data, 2, render_mode="ansi")
    env.reset(seed=0)
    shown = env.render()
    assert shown is not None
    assert len(shown) == 2
    with pytest.raises(ConfigurationError, match="autoreset_mode"):
        SearchQAVectorEnv("hotpotqa", autoreset_mode="never", data_dir=str(small_data))
    assert SearchQAVectorEnv("hotpotqa", autoreset_mode="same_step", data_dir=str(small_data)).autoreset_mode is AutoresetMode.SAME_STEP


def test_a_place_that_is_used_again_shows_nothing_of_the_episode_before(small_data: Path) -> None:
    """Buffers pass from one episode to the next; what was handed out, and what a failed reset leaves, must not change."""
    env = make_vector(small_data, 1)
    env.reset_at([0], options={"question_id": ["q1"]})
    long = env.tokenizer.encode("<search> Poland Vistula Curie </search>")
    first, *_, infos = env.step_at([0], [long])
    kept, mask = first[0].copy(), infos[0]["turn_record"].loss_mask.copy()
    again, _ = env.reset_at([0], options={"question_id": ["q4"]})
    fresh, _ = make_vector(small_data, 1).reset_at([0], options={"question_id": ["q4"]})
    assert np.array_equal(again[0], fresh[0])
    assert np.array_equal(first[0], kept)
    assert np.array_equal(infos[0]["turn_record"].loss_mask, mask)
    before = env.get_state_at([0])[0]["episode"]
    with pytest.raises(UnknownQuestionError):
        env.reset_at([0], options={"question_id": ["none"]})
    assert env.get_state_at([0])[0]["episode"] == before
