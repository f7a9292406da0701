"""The environment's contract: actions, turns, budgets, information, state."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence

import searchqa_envs
from searchqa_envs.dialects import SEARCH_R1_INVALID
from searchqa_envs.env import SearchQAEnv
from searchqa_envs.errors import ConfigurationError, EpisodeStateError, InvalidSegmentError, UnknownQuestionError
from searchqa_envs.slot import shuffled
from searchqa_envs.tokenizers import build_tokenizer
from searchqa_retrievers import Hit, Passage, RetrieverUnavailable, SearchRequest, from_function

Info = dict[str, Any]


class Fixed:
    """A retriever that gives the same passages to every query and remembers the requests."""

    def __init__(self, *passages: tuple[str, str]) -> None:
        self.hits = [Hit(Passage(f"d{i}", title, text), 1.0 - i) for i, (title, text) in enumerate(passages)]
        self.requests: list[SearchRequest] = []

    def __deepcopy__(self, memo: object) -> Fixed:
        return self

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        self.requests += requests
        return [self.hits[: request.top_k] for request in requests]

    def cache_key(self, request: SearchRequest) -> str:
        return request.query


def make(small_data: Path, **arguments: Any) -> SearchQAEnv:
    env = gym.make("SearchQA-HotpotQA-v0", data_dir=str(small_data), **arguments).unwrapped
    assert isinstance(env, SearchQAEnv)
    return env


def play(env: SearchQAEnv, *segments: str, **reset: Any) -> list[tuple[Any, float, bool, bool, Info]]:
    env.reset(**reset)
    return [env.step(env.tokenizer.encode(segment)) for segment in segments]


def text(env: SearchQAEnv, ids: Any) -> str:
    return env.tokenizer.decode(list(ids))


@pytest.mark.parametrize("env_id", searchqa_envs.ENV_IDS)
@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore:.*render.*:UserWarning")
def test_check_env_passes(env_id: str, small_data: Path) -> None:
    arguments: Info = {}
    if env_id == "SearchQA-Custom-v0":
        arguments = {"questions": str(small_data / "nq" / "questions.jsonl"), "corpus": str(small_data / "nq" / "corpus.jsonl.gz")}
    elif env_id != "SearchQA-World-v0":
        arguments = {"data_dir": str(small_data)}
    env = gym.make(env_id, **arguments)
    check_env(env.unwrapped)


def test_an_episode_of_two_turns(small_data: Path) -> None:
    env = make(small_data, top_k=2)
    observation, info = env.reset(seed=3, options={"question_id": "q2"})
    assert observation.dtype == np.int32
    assert text(env, observation).endswith("Question: Who was the husband of Marie Curie?\n")
    assert set(info) == {"question_id", "question", "turn", "turn_record"}
    assert info["turn"] == 0
    assert not info["turn_record"].loss_mask.any()
    assert np.array_equal(info["turn_record"].env_tokens, observation)

    segment = "<think> who? </think> <search> husband of Marie Curie </search>"
    after, reward, terminated, truncated, info = env.step(env.tokenizer.encode(segment))
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert type(terminated) is bool
    assert type(truncated) is bool
    assert set(info) == {"question_id", "question", "turn", "action", "query", "backend_error", "turn_record"}
    assert (info["action"], info["query"], info["turn"], info["backend_error"]) == ("search", "husband of Marie Curie", 1, None)
    record = info["turn_record"]
    assert text(env, record.env_tokens) == (
        '\n\n<information>Doc 1(Title: "Pierre Curie") Pierre Curie was a French physicist born in Paris, the husband of Marie Curie.\n'
        'Doc 2(Title: "Marie Curie") Marie Curie was a physicist born in Warsaw. She married Pierre Curie.</information>\n\n'
    )
    assert [passage.title for passage in record.passages] == ["Pierre Curie", "Marie Curie"]
    assert text(env, after) == text(env, observation) + segment + text(env, record.env_tokens)
    assert "".join(text(env, after[record.loss_mask == 1])) == segment

    last, reward, terminated, truncated, info = env.step(env.tokenizer.encode("<answer> Pierre Curie </answer>"))
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert (info["answer"], info["golden_answers"], info["reward_terms"]) == ("Pierre Curie", ("Pierre Curie",), {"em": 1.0})
    assert info["metrics"] == {
        "em": 1.0,
        "f1": 1.0,
        "cover_em": 1.0,
        "sub_em": 1.0,
        "title_recall_all": 1.0,
        "title_recall_any": 1.0,
        "title_recall_mean": 1.0,
        "searches": 1,
        "invalid_turns": 0,
    }
    assert len(info["turn_record"].env_tokens) == 0
    with pytest.raises(EpisodeStateError, match="reset"):
        env.step([])
    assert len(last) > len(after)


def test_metrics_that_a_question_does_not_define_are_absent(small_data: Path) -> None:
    info = play(make(small_data), "<answer> x </answer>", options={"question_id": "q5"})[-1][4]
    assert not any(name.startswith("title_recall") for name in info["metrics"])


def test_an_invalid_segment_gets_the_published_reply_and_costs_a_turn(small_data: Path) -> None:
    env = make(small_data, max_turns=2)
    first, second = play(env, "no tags here", "still none")
    assert first[4]["action"] == "invalid"
    assert first[4]["query"] is None
    assert text(env, first[4]["turn_record"].env_tokens) == SEARCH_R1_INVALID
    assert second[1:4] == (0.0, False, True)
    assert second[4]["metrics"]["invalid_turns"] == 2
    assert second[4]["answer"] is None


def test_a_search_in_the_last_turn_is_recorded_and_not_executed(small_data: Path) -> None:
    retriever = Fixed(("A", "a"))
    env = make(small_data, max_turns=2, retriever=retriever)
    first, second = play(env, "<search> one </search>", "<search> two </search>")
    assert [request.query for request in retriever.requests] == ["one"]
    assert (first[4]["action"], second[4]["action"], second[4]["query"]) == ("search", "search", "two")
    assert second[2:4] == (False, True)
    assert second[4]["metrics"]["searches"] == 1


def test_forced_answer_announces_the_last_turn(small_data: Path) -> None:
    env = make(small_data, max_turns=2, forced_answer=True, retriever=Fixed(("A", "a")))
    ((observation, *_),) = play(env, "<search> one </search>")
    assert text(env, observation).endswith(
        "</information>\n\n\nThis is my last turn. I should put the final answer between <answer> and </answer> now.\n"
    )
    alone = make(small_data, max_turns=1, forced_answer=True)
    assert "This is my last turn" in text(alone, alone.reset()[0])


def test_r1_searcher_ends_at_a_segment_that_is_no_action_and_repeats_no_closer(small_data: Path) -> None:
    env = make(small_data, dialect="r1-searcher", retriever=Fixed(("A", "a"), ("B", "b")))
    first, second = play(env, "x</think> <|begin_of_query|> q <|end_of_query|>", "nothing")
    reply = text(env, first[4]["turn_record"].env_tokens)
    assert reply == "\n\n<|begin_of_documents|>\n(1)A a\n(2)B b\n<|end_of_documents|>\n\n"
    assert second[2:4] == (True, False)
    assert second[4]["action"] == "invalid"
    assert second[4]["answer"] is None


def test_what_follows_the_first_closing_tag_is_dropped(small_data: Path) -> None:
    env = make(small_data)
    head = "<answer> wrong </answer>"
    ((observation, reward, _, _, info),) = play(env, head + " <answer> Pierre Curie </answer>", options={"question_id": "q2"})
    assert info["turn_record"].segment_tokens_used == len(env.tokenizer.encode(head))
    assert info["answer"] == "wrong"
    assert reward == 0.0
    assert text(env, observation).endswith(head)


def test_an_end_of_sequence_id_is_kept_and_ends_the_segment(small_data: Path) -> None:
    env = make(small_data)
    eos = env.tokenizer.eos_id
    answer = env.tokenizer.encode("<answer> x </answer>")
    env.reset(seed=0)
    info = env.step([*answer, eos, *answer])[4]
    assert info["turn_record"].segment_tokens_used == len(answer) + 1
    env.reset()
    observation, _, _, _, info = env.step([*env.tokenizer.encode("I stop"), eos, *answer])
    assert info["action"] == "invalid"
    assert info["turn_record"].segment_tokens_used == len(env.tokenizer.encode("I stop")) + 1
    assert info["turn_record"].loss_mask[np.flatnonzero(observation == eos)].all()


def test_a_closing_tag_spelt_in_bytes_is_a_closing_tag(small_data: Path) -> None:
    env = make(small_data)
    spelt = list(b"<answer> Paris </answer> and more")
    env.reset(options={"question_id": "q4"})
    _, reward, terminated, _, info = env.step(spelt)
    assert (reward, terminated) == (1.0, True)
    assert info["turn_record"].segment_tokens_used == len(b"<answer> Paris </answer>")


@pytest.mark.parametrize(
    "segment",
    [[-1], [10**6], [2**70], np.array([1.5]), ["a"], "text", b"bytes", [[1, 2]], [1, None], np.array([[1]]), [True, "x"], {"a": 1}, 5],
)
def test_a_segment_that_is_no_ids_raises_and_leaves_the_episode_as_it_was(small_data: Path, segment: Any) -> None:
    env = make(small_data)
    env.reset(seed=0)
    env.step(env.tokenizer.encode("<search> Warsaw </search>"))
    before = env.get_state()
    with pytest.raises(InvalidSegmentError):
        env.step(segment)
    assert env.get_state() == before


def test_an_empty_segment_is_an_invalid_action(small_data: Path) -> None:
    env = make(small_data)
    env.reset()
    for empty in ([], np.empty(0, dtype=np.int64)):
        assert env.step(empty)[4]["action"] == "invalid"


def test_an_overlong_segment_is_cut(small_data: Path) -> None:
    env = make(small_data, max_segment_tokens=20)
    ((observation, _, _, _, info),) = play(env, "x" * 100 + "<answer> y </answer>")
    assert info["turn_record"].segment_tokens_used == 20
    assert info["action"] == "invalid"
    assert int(info["turn_record"].loss_mask.sum()) == 20
    assert observation in env.observation_space


@pytest.mark.parametrize("budget", [60, 90, 150, 400])
def test_passages_are_cut_to_the_observation_budget_and_tags_never(small_data: Path, budget: int) -> None:
    env = make(small_data, retriever=Fixed(("T", "東京 word " * 100), ("U", "more " * 50)), max_observation_tokens=budget)
    ((_, _, _, _, info),) = play(env, "<search> q </search>")
    reply = info["turn_record"].env_tokens
    assert budget - 4 <= len(reply) <= budget  # as full as a whole character allows
    assert text(env, reply).startswith("\n\n<information>Doc 1(Title:")
    assert text(env, reply).endswith("</information>\n\n")
    assert "�" not in text(env, reply)


def test_the_context_budget_always_leaves_room_for_a_whole_segment(small_data: Path) -> None:
    env = make(
        small_data, prompt="bare", retriever=Fixed(("T", "word " * 200)), max_context_tokens=600, max_segment_tokens=100, max_turns=50
    )
    observation, _ = env.reset(seed=1)
    done = False
    while not done:
        assert len(observation) + 100 <= 600
        observation, _, terminated, truncated, info = env.step(env.tokenizer.encode("<search> q </search>"))
        done = terminated or truncated
    assert (terminated, truncated) == (False, True)
    assert info["turn"] < 50
    assert len(observation) <= 600
    assert set(info["reward_terms"]) == {"em"}
    assert info["backend_error"] is None


def test_a_prompt_that_does_not_fit_says_what_to_raise(small_data: Path) -> None:
    env = make(small_data, max_context_tokens=300, max_segment_tokens=100)
    with pytest.raises(ConfigurationError, match="Raise max_context_tokens"):
        env.reset()


@pytest.mark.parametrize(
    "failure",
    [
        RetrieverUnavailable("the engine is down"),
        ConnectionResetError("reset by peer"),
        TimeoutError("late"),
        RuntimeError("out of memory"),
    ],
)
def test_a_lost_back_end_truncates_without_reward_and_is_never_shown(small_data: Path, failure: Exception) -> None:
    class Lost(Fixed):
        def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
            raise failure

    env = make(small_data, retriever=Lost())
    env.reset(seed=0)
    segment = env.tokenizer.encode("<search> q </search>")
    before, _ = env.reset()
    observation, reward, terminated, truncated, info = env.step(segment)
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert str(failure) in info["backend_error"]
    assert info["reward_terms"] == {}
    assert np.array_equal(observation, np.concatenate([before, segment]))
    assert len(info["turn_record"].env_tokens) == 0


def test_a_retriever_function_that_raises_is_a_lost_back_end(small_data: Path) -> None:
    def broken(queries: list[str], top_k: int) -> list[list[tuple[str, str, str, float]]]:
        raise RuntimeError("no index")

    env = make(small_data, retriever=from_function(broken))
    ((_, _, _, truncated, info),) = play(env, "<search> q </search>")
    assert truncated
    assert "no index" in info["backend_error"]


def test_a_faulty_retriever_leaves_the_episode_as_it_was(small_data: Path) -> None:
    class Faulty(Fixed):
        def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
            raise KeyError("a bug")

    env = make(small_data, retriever=Faulty())
    env.reset(seed=0)
    before = env.get_state()
    with pytest.raises(KeyError):
        env.step(env.tokenizer.encode("<search> q </search>"))
    assert env.get_state() == before


def test_gold_answers_reach_only_a_retriever_that_declares_it_needs_them(small_data: Path) -> None:
    class NeedsGold(Fixed):
        needs_gold = True

    for retriever, expected in ((Fixed(("A", "a")), ()), (NeedsGold(("A", "a")), ("Paris",))):
        env = make(small_data, retriever=retriever)
        play(env, "<search> q </search>", seed=5, options={"question_id": "q4"})
        (request,) = retriever.requests
        assert request.golden_answers == expected
        assert (request.question_id, request.turn, request.top_k) == ("q4", 0, 3)


def test_questions_come_once_each_in_an_order_that_the_seed_decides(small_data: Path) -> None:
    def order(seed: int) -> list[str]:
        env = make(small_data)
        return [env.reset(seed=seed if i == 0 else None)[1]["question_id"] for i in range(10)]

    assert sorted(order(1)[:5]) == ["q1", "q2", "q3", "q4", "q5"]
    assert sorted(order(1)[5:]) == ["q1", "q2", "q3", "q4", "q5"]
    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(6)}) > 1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_shuffled_is_a_permutation(size: int) -> None:
    for key in (0, 1, 2**61 + 12345):
        assert sorted(shuffled(i, size, key) for i in range(size)) == list(range(size))


def test_shuffled_spreads_every_question_over_every_place() -> None:
    counts = np.zeros((7, 7))
    for key in np.random.default_rng(0).integers(2**62, size=7000).tolist():
        counts[[shuffled(i, 7, key) for i in range(7)], range(7)] += 1
    assert abs(counts - 1000).max() < 120  # four standard deviations of a binomial(7000, 1/7)


def test_options_choose_the_question(small_data: Path) -> None:
    env = make(small_data)
    assert env.reset(options={"question_id": "q3"})[1]["question_id"] == "q3"
    assert env.reset(options={"index": 1})[1]["question_id"] == "q2"
    assert env.reset(options={"index": np.int64(4)})[1]["question_id"] == "q5"
    with pytest.raises(UnknownQuestionError):
        env.reset(options={"question_id": "none"})
    for wrong in ({"index": 5}, {"index": -1}, {"index": "1"}, {"index": True}, {"nothing": 1}, {"index": 1, "question_id": "q1"}):
        with pytest.raises(ConfigurationError):
            env.reset(options=wrong)


def test_the_same_seed_and_segments_give_the_same_bytes_and_no_global_rng_is_touched(small_data: Path) -> None:
    segments = ["<search> Poland </search>", "hm", "<search> Curie river </search>", "<answer> x </answer>"]
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    runs = [play(make(small_data), *segments, seed=11) for _ in range(2)]
    assert data_equivalence(runs[0], runs[1], exact=True)
    assert np.array_equal(np.random.get_state()[1], before)


def test_every_call_returns_fresh_arrays(small_data: Path) -> None:
    env = make(small_data)
    observation, info = env.reset(seed=0)
    observation[:] = 0
    info["turn_record"].loss_mask[:] = 1
    assert env.get_state()["episode"]["tokens"][:5] != [0] * 5
    after, *_, info = env.step(env.tokenizer.encode("hm"))
    assert after[0] != 0
    assert info["turn_record"].loss_mask[0] == 0


CONTINUE = """
import json, sys
import gymnasium as gym
import searchqa_envs
request = json.loads(sys.stdin.read())
env = gym.make("SearchQA-HotpotQA-v0", data_dir=request["data"]).unwrapped
env.set_state(request["state"])
seen = []
for segment in request["segments"]:
    observation, reward, terminated, truncated, info = env.step(env.tokenizer.encode(segment))
    seen.append([observation.tolist(), reward, terminated, truncated, info["turn_record"].loss_mask.tolist()])
    if terminated or truncated:
        seen.append([env.reset()[0].tolist()])
print(json.dumps([seen, env.get_state()]))
"""


def test_a_state_of_any_step_continues_identically_in_another_process(small_data: Path) -> None:
    segments = ["<search> Poland </search>", "hm", "<answer> Vistula </answer>", "<search> Baltic </search>"]
    env = make(small_data)
    env.reset(seed=2, options={"question_id": "q1"})
    env.set_progress(3, 10)
    states, seen = [env.get_state()], []
    for segment in segments:
        observation, reward, terminated, truncated, info = env.step(env.tokenizer.encode(segment))
        seen.append([[observation.tolist(), reward, terminated, truncated, info["turn_record"].loss_mask.tolist()]])
        if terminated or truncated:
            seen[-1].append([env.reset()[0].tolist()])
        states.append(env.get_state())
    assert states[0]["progress"] == [3, 10]
    for start in (0, 1, 3):  # at the beginning, in the middle, and just after a new episode began
        request = json.dumps({"data": str(small_data), "state": json.loads(json.dumps(states[start])), "segments": segments[start:]})
        output = subprocess.run([sys.executable, "-c", CONTINUE], input=request, capture_output=True, text=True, check=True).stdout
        continued, final = json.loads(output)
        assert continued == [entry for step in seen[start:] for entry in step]
        assert final == json.loads(json.dumps(states[-1]))


def test_a_state_forks_and_belongs_to_its_data_set(small_data: Path) -> None:
    env = make(small_data)
    play(env, "<search> Poland </search>", seed=0)
    state = pickle.loads(pickle.dumps(env.get_state()))
    one = env.step(env.tokenizer.encode("<answer> a </answer>"))
    env.set_state(state)
    two = env.step(env.tokenizer.encode("<answer> a </answer>"))
    assert data_equivalence(one, two, exact=True)
    other = gym.make("SearchQA-NQ-v0", data_dir=str(small_data)).unwrapped
    with pytest.raises(EpisodeStateError, match="data set"):
        other.set_state(state)


def test_a_state_of_other_rules_is_refused(small_data: Path) -> None:
    env = make(small_data)
    play(env, "<search> Poland </search>", seed=0)
    state = env.get_state()
    for arguments in ({"dialect": "r1-searcher"}, {"tokenizer": "world"}, {"prompt": "bare"}, {"max_turns": 2}):
        with pytest.raises(EpisodeStateError, match="same arguments"):
            make(small_data, **arguments).set_state(state)
    for broken in ({}, {**state, "version": 0}, {key: value for key, value in state.items() if key != "rng"}):
        with pytest.raises(EpisodeStateError):
            env.set_state(broken)
    assert env.get_state() == state


def test_numpy_integers_are_integers(small_data: Path) -> None:
    env = make(small_data, top_k=np.int64(2), max_turns=np.int32(3))
    assert (env.rules.top_k, env.rules.max_turns) == (2, 3)
    json.dumps(env.stamp())


def test_the_last_turns_announcement_counts_as_what_stands_round_passages(small_data: Path) -> None:
    with pytest.raises(ConfigurationError, match="max_observation_tokens"):
        make(small_data, forced_answer=True, max_observation_tokens=50)
    env = make(small_data, forced_answer=True, max_observation_tokens=150, max_turns=2, retriever=Fixed(("T", "word " * 99)))
    ((observation, _, _, truncated, _),) = play(env, "<search> q </search>")
    assert not truncated
    assert "This is my last turn" in text(env, observation)


def test_an_empty_query_ends_r1_searcher_and_is_searched_by_search_r1(small_data: Path) -> None:
    ((_, _, terminated, _, info),) = play(make(small_data, dialect="r1-searcher"), "x</think><|begin_of_query|> <|end_of_query|>")
    assert (info["action"], terminated) == ("invalid", True)
    ((_, _, terminated, _, info),) = play(make(small_data), "<search> </search>")
    assert (info["action"], info["query"], terminated) == ("search", "", False)
    assert "<information></information>" in text(make(small_data), info["turn_record"].env_tokens)


def test_files_of_the_custom_set_lie_below_data_dir(small_data: Path) -> None:
    env = gym.make("SearchQA-Custom-v0", data_dir=str(small_data), questions="nq/questions.jsonl", corpus="nq/corpus.jsonl.gz").unwrapped
    assert env.reset(options={"question_id": "q4"})[1]["question"] == "What is the capital of France?"


def test_the_tokenizers_own_normal_form_cannot_bring_a_tag_back(small_data: Path) -> None:
    class Folding(type(build_tokenizer("byte"))):
        encode_array = None

        def normalise(self, text: str) -> str:
            return text.replace("＜", "<").replace("＞", ">")

        def encode(self, text: str) -> list[int]:
            return super().encode(self.normalise(text))

    env = make(small_data, tokenizer=Folding(), retriever=Fixed(("T", "＜answer＞Paris＜/answer＞")))
    ((_, _, _, _, info),) = play(env, "<search> q </search>")
    assert "[answer]Paris[/answer]" in text(env, info["turn_record"].env_tokens)


def test_a_book_of_a_page_is_cut_before_it_is_encoded(small_data: Path) -> None:
    class Watching(type(build_tokenizer("byte"))):
        encode_array = None
        longest_piece = 24
        longest_text = 0

        def encode(self, text: str) -> list[int]:
            self.longest_text = max(self.longest_text, len(text))
            return super().encode(text)

    tokenizer = Watching()
    env = make(small_data, tokenizer=tokenizer, retriever=Fixed(("T", "word " * 500_000)), prompt="bare")
    ((_, _, _, _, info),) = play(env, "<search> q </search>")
    assert len(info["turn_record"].env_tokens) == env.rules.max_observation_tokens
    assert tokenizer.longest_text < 60_000


def test_step_before_reset_is_a_clear_error(small_data: Path) -> None:
    with pytest.raises(EpisodeStateError, match="reset"):
        make(small_data).step([1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k"),
        ({"max_turns": 2.5}, "max_turns"),
        ({"max_segment_tokens": True}, "max_segment_tokens"),
        ({"max_observation_tokens": 3}, "max_observation_tokens"),
        ({"dialect": "react"}, "dialect"),
        ({"reward": "bleu"}, "bleu"),
        ({"retriever": "lucene"}, "lucene"),
        ({"retriever": 3}, "retriever must be"),
        ({"prompt": "x"}, "prompt must be"),
        ({"render_mode": "rgb_array"}, "render_mode"),
        ({"forced_answer": "no"}, "forced_answer"),
    ],
)
def test_an_impossible_argument_is_named(small_data: Path, arguments: Info, message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        SearchQAEnv("hotpotqa", data_dir=str(small_data), **arguments)
    assert type(caught.value).__module__.startswith("searchqa_")


@pytest.mark.parametrize("arguments", [{"topk": 3}, {"preset": "easy"}])
def test_an_unknown_argument_is_an_error(small_data: Path, arguments: Info) -> None:
    with pytest.raises(TypeError, match=next(iter(arguments))):
        gym.make("SearchQA-HotpotQA-v0", data_dir=str(small_data), **arguments)


def test_objects_survive_the_copy_that_gymnasium_makes_of_a_spec(small_data: Path) -> None:
    retriever = Fixed(("A", "a"))
    tokenizer = build_tokenizer("byte")
    env = gym.make("SearchQA-HotpotQA-v0", data_dir=str(small_data), retriever=retriever, tokenizer=tokenizer)
    assert env.unwrapped.rules.retriever is retriever
    again = gym.make(env.spec)
    assert again.unwrapped.rules.retriever is retriever
    assert again.unwrapped.tokenizer is tokenizer
    named = gym.make("SearchQA-HotpotQA-v0", data_dir=str(small_data), retriever="bm25")
    assert gym.envs.registration.EnvSpec.from_json(named.spec.to_json()).kwargs["retriever"] == "bm25"


def test_rendering_shows_the_episode_and_lets_no_text_steer_the_terminal(small_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = make(small_data, render_mode="ansi", retriever=Fixed(("T", "\x1b[2J\x07 cleared")))
    play(env, "<search> q </search>", "<answer> \x1b[31mred </answer>", options={"question_id": "q4"})
    shown = env.render()
    assert shown is not None
    assert "Question: What is the capital of France?" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "gold: Paris" in shown
    human = make(small_data, render_mode="human")
    play(human, "<answer> Paris </answer>")
    assert "<answer> Paris </answer>" in capsys.readouterr().out
    assert human.render() is None


def test_the_stamp_says_what_a_number_needs(small_data: Path) -> None:
    stamp = make(small_data).stamp()
    assert {"retriever", "top_k", "dialect", "prompt", "reward", "tokenizer", "max_turns", "searchqa_gym"} <= set(stamp)
    json.dumps(stamp)


@pytest.mark.parametrize("fault", [NotImplementedError("to do"), RecursionError("too deep")])
def test_a_fault_of_a_program_is_no_lost_back_end(small_data: Path, fault: Exception) -> None:
    class Faulty(Fixed):
        def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
            raise fault

    env = make(small_data, retriever=Faulty())
    env.reset(seed=0)
    with pytest.raises(type(fault), match=str(fault)):
        env.step(env.tokenizer.encode("<search> q </search>"))


def test_the_trace_of_the_first_error_that_counts_as_a_lost_back_end_is_logged(small_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    failures = iter([RetrieverUnavailable("down"), RuntimeError("perhaps a fault"), OSError("reset")])

    class Lost(Fixed):
        def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
            raise next(failures)

    env = make(small_data, retriever=Lost())
    for _ in range(3):
        env.reset(seed=0)
        assert env.step(env.tokenizer.encode("<search> q </search>"))[3]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "RuntimeError: perhaps a fault" in caplog.text
    assert caplog.text.count("Traceback") == 1
