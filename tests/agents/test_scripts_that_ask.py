"""Scripts that ask a language model: their segments mean what they say whatever the text, and asks of all rows go out together."""

import functools
import logging
import threading
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents.completion_server import CompletionServerLM
from searchqa_agents.language_model import Sampling
from searchqa_agents.rollout import episode_seed, rollout
from searchqa_agents.scripted import Ask, ScriptedAgent, Task, ask_seed
from searchqa_agents.writer import PromptTooLong, Writer
from searchqa_envs.dialects import DIALECTS, get_dialect
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers import ByteTokenizer, build_tokenizer

BYTES = ByteTokenizer()
TAGS = [tag for dialect in DIALECTS.values() for tag in dialect.tags]
HOSTILE = st.lists(
    st.one_of(
        st.sampled_from(
            [*TAGS, "<|im_end|>", "</s>", "<", ">", "</", "<answer", "/search>", "|", "||", "|| k=3", "[search]", " ", "\n", "̸", "\ud800"]
        ),
        st.text(max_size=8),
    ),
    max_size=12,
).map("".join)


@functools.cache
def nfc_tokenizer():
    """Bytes as tokens behind a normaliser that puts letters and marks together, as Qwen's does; its tags are ordinary text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_end|>", "<|pad|>"]
    core = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<|im_end|>", "<|pad|>"])
    return build_tokenizer(core)


@functools.cache
def environment(dialect, tokenizer, max_segment_tokens=None):
    """An environment of one question that has a search engine, and whose prompt is the published one."""
    return gym.make(
        "SearchQA-Custom-v0",
        questions=[{"id": "q", "question": "Who?", "golden_answers": ["x"]}],
        corpus=[{"id": "p", "title": "Who", "contents": '"Who"\nNobody.'}],
        dialect=dialect,
        tokenizer={"byte": BYTES, "world": "world", "nfc": nfc_tokenizer()}[tokenizer],
        max_segment_tokens=max_segment_tokens,
        max_context_tokens=40_000,
    ).unwrapped


def stepped(env, kind, text, thought):
    """A segment for the environment's first turn, and the environment's info on it."""
    env.reset(options={"index": 0})
    rules = env.rules
    thinking = rules.dialect.prompt_opens_think
    task = Task(env.source[0], rules.dialect, np.random.default_rng(0), 5, rules.max_segment_tokens, rules.tokenizer, thinking)
    segment = task.segment(kind, text, thought)
    return segment, env.step(rules.tokenizer.encode(segment))[-1]


@pytest.mark.parametrize("tokenizer", ["byte", "world", "nfc"])
@pytest.mark.parametrize("dialect", sorted(DIALECTS))
@given(kind=st.sampled_from(["search", "answer"]), text=HOSTILE, thought=HOSTILE, limit=st.sampled_from([120, 250, 2000]))
@example(kind="answer", text="̸x", thought="̸", limit=2000)
@example(kind="search", text="</search><answer>x</answer>", thought="<|end_of_query|></answer>", limit=2000)
@settings(max_examples=60, deadline=None)
def test_a_segment_is_the_action_that_it_says_whatever_the_text(dialect, tokenizer, kind, text, thought, limit):
    env = environment(dialect, tokenizer, limit)
    segment, info = stepped(env, kind, text, thought)
    ids = env.tokenizer.encode(segment)
    assert len(ids) <= limit
    if kind == "search" and not info["query"] and get_dialect(dialect).empty_query_is_invalid:
        assert info["action"] == "invalid"
        assert not text.encode("utf-8", "replace").decode().strip()
        return
    assert info["action"] == kind
    assert info["turn_record"].segment_tokens_used == len(ids)  # nothing stands behind the action
    said = info["query"] if kind == "search" else info["answer"]
    assert not any(tag in said for tag in get_dialect(dialect).tags)
    if not any(character in text for character in "<|[̸\ud800") and tokenizer != "nfc" and len(segment) < limit / 4:
        assert said == text.strip()


@pytest.mark.parametrize(
    ("dialect", "kind", "thought", "segment"),
    [
        ("search-r1", "search", "", "<search>where</search>"),
        ("search-r1", "search", "hm", "<think>hm</think><search>where</search>"),
        ("zerosearch", "answer", "hm", "<think>hm</think><answer>where</answer>"),
        ("r1-searcher", "search", "hm", "hm<|begin_of_query|>where<|end_of_query|>"),  # its prompt ends with <think>
        ("r1-searcher", "answer", "hm", "hm</think>\n\n<answer>where</answer>"),
        ("r1-searcher", "answer", "", "</think>\n\n<answer>where</answer>"),
    ],
)
def test_where_the_thought_stands(dialect, kind, thought, segment):
    assert stepped(environment(dialect, "byte"), kind, " where ", thought)[0] == segment


def test_the_thought_is_cut_before_the_text():
    env = environment("search-r1", "byte", 20)  # each tag is one token
    assert stepped(env, "answer", "123456", "abcdefghijklmnop")[0] == "<think>abcdefghij</think><answer>123456</answer>"
    assert stepped(env, "answer", "123456789012345", "abcdef")[0] == "<think>a</think><answer>123456789012345</answer>"
    assert stepped(env, "answer", "1234567890123456789", "abcdef")[0] == "<answer>123456789012345678</answer>"
    with pytest.raises(ConfigurationError, match="max_segment_tokens must hold at least the tags"):
        stepped(environment("search-r1", "nfc", 12), "answer", "x", "")


def test_a_query_cannot_say_controls():
    env = gym.make("SearchQA-World-v0", search_controls={"top_k": 5}).unwrapped
    _, info = stepped(env, "search", "Naru || k=99 || k=1", "")
    assert info["action"] == "search"
    assert "||" not in info["query"]


# -- sessions --------------------------------------------------------------------------------------------------------------------------------


def made_venv(small_data, **arguments):
    arguments = {"num_envs": 3, "split": "all", "data_dir": small_data, **arguments}
    return gym.make_vec("SearchQA-HotpotQA-v0", autoreset_mode="DISABLED", **arguments)


def asks_and_searches(task):
    """Questions of even numbers are searched for, those of odd ones thought about twice before they are answered."""
    first = yield Ask((("user", task.question.question),), 200)
    if int(task.question.id[1:]) % 2 == 0:
        info = yield task.segment("search", first.text)
        second = yield Ask((("user", info["turn_record"].passages[0].title),), 200)
    else:
        second = yield Ask((("user", first.text),), 200)
        second = yield Ask((("user", second.text),), 200)
    yield task.segment("answer", second.text)


def test_asks_of_all_rows_are_one_batch_and_segments_are_handed_over_first(scripted_lm, small_data):
    venv = made_venv(small_data, num_envs=4)
    lm = scripted_lm.ScriptedLM(BYTES, lambda prompt: f"{prompt}!")
    played = rollout(venv, ScriptedAgent.for_env(asks_and_searches, venv, Writer(lm, BYTES)), ["q1", "q2", "q3", "q4"])
    # all four; then q2 and q4 have segments, which go first, and their next ask joins the others' second; then q1 and q3 their third
    assert lm.batches == [4, 4, 2]
    assert [len(trajectory.turns) for trajectory in played] == [1, 2, 1, 2]
    assert played[0].answer == "On which river lies the birthplace of Marie Curie?!!!"
    assert played[1].answer == f"{played[1].turns[0].passages[0][1]}!"


def test_usage_is_what_each_rows_asks_took(scripted_lm, small_data):
    venv = made_venv(small_data)
    lm = scripted_lm.ScriptedLM(BYTES, lambda prompt: f"{prompt}!")
    played = rollout(venv, ScriptedAgent.for_env(asks_and_searches, venv, Writer(lm, BYTES)), ["q1", "q2"])
    question = len("On which river lies the birthplace of Marie Curie?")
    generated = 3 * question + 1 + 2 + 3 + 3
    assert played[0].usage == {"calls": 3, "failed_calls": 0, "prompt_tokens": 3 * question + 3, "generated_tokens": generated}
    assert played[1].usage["calls"] == 2
    [without] = rollout(venv, ScriptedAgent.for_env("search_once", venv), ["q1"])
    assert without.usage == {}


def test_a_query_that_fills_the_model_costs_a_reply_and_not_the_run(scripted_lm, small_data):
    def script(task):
        first = yield Ask((("user", task.question.question),), 10_000, max_prompt_tokens=100)
        second = yield Ask((("user", first.text),), 200, max_prompt_tokens=100)
        yield task.segment("answer", second.text)

    venv = made_venv(small_data)
    lm = scripted_lm.ScriptedLM(BYTES, lambda prompt: "x" * 5000 if "Marie Curie" in prompt else "short")
    played = rollout(venv, ScriptedAgent.for_env(script, venv, Writer(lm, BYTES)), ["q1", "q3"])
    assert [trajectory.answer for trajectory in played] == ["", "short"]
    assert [trajectory.usage["failed_calls"] for trajectory in played] == [1, 0]

    def too_long_for_all(task):
        yield Ask((("user", "x" * 101),), 10, max_prompt_tokens=100)

    with pytest.raises(PromptTooLong):
        rollout(venv, ScriptedAgent.for_env(too_long_for_all, venv, Writer(lm, BYTES)), ["q1"])


def test_a_query_or_answer_that_is_cut_is_said_once_and_a_thought_is_not(scripted_lm, small_data, caplog):
    def script(task):
        yield task.segment("search", "where", thought="t" * 500)
        yield task.segment("search", "w" * 500)
        yield task.segment("answer", "a" * 500)

    venv = made_venv(small_data, max_segment_tokens=40)
    with caplog.at_level(logging.WARNING):
        rollout(venv, ScriptedAgent.for_env(script, venv), ["q1", "q2", "q3", "q4"])
    said = [record.getMessage() for record in caplog.records if "cut" in record.getMessage()]
    assert said == ["A query was longer than a segment of 40 tokens (env.max_segment_tokens) and was cut. This is said once."]


def test_released_rows_are_forgotten(scripted_lm, small_data):
    def script(task):
        reply = yield Ask((("user", task.question.question),), 200)
        yield task.segment("answer", reply.text)

    venv = made_venv(small_data)
    lm = scripted_lm.ScriptedLM(BYTES, str.upper)
    session = ScriptedAgent.for_env(script, venv, Writer(lm, BYTES)).start([1, 2, 3], Sampling(500, ()))
    infos = [{"question_id": "q1"}, {"question_id": "q2"}, {"question_id": "q3"}]
    session.submit([0, 1, 2], [np.array([1])] * 3, infos)
    session.release([1])
    assert sorted(row for row, _ in session.collect()) == [0, 2]
    assert len(lm.prompts) == 2  # what was released is not asked for any more
    assert session.usage(0)["calls"] == 1
    session.submit([0], [np.array([1])], infos[:1])
    session.release([0, 2])
    assert session.collect() == []  # a segment that was written already went too
    kept = [value for value in vars(session).values() if isinstance(value, (dict, set, list)) and value is not session._seeds]
    assert kept
    assert not any(kept)


def test_seeds_are_a_function_of_the_episodes_seed_and_of_which_ask_it_is(scripted_lm, small_data):
    asked = {}
    for num_envs in (1, 4):
        venv = made_venv(small_data, num_envs=num_envs)
        lm = scripted_lm.ScriptedLM(BYTES, lambda prompt: f"{prompt}!")
        rollout(venv, ScriptedAgent.for_env(asks_and_searches, venv, Writer(lm, BYTES)), ["q1", "q2", "q3"], seed=5, group_size=2)
        asked[num_envs] = sorted(zip(lm.prompts, lm.seeds, strict=True))
    assert asked[1] == asked[4]
    assert len({seed for _, seed in asked[1]}) == len(asked[1])
    assert ask_seed(episode_seed(5, 0, 0), 0) in {seed for _, seed in asked[1]}
    assert all(0 <= seed < 2**31 for _, seed in asked[1])


def test_with_a_server_no_script_waits_for_another_ones_reply(scripted_lm, small_data):
    third_turn = threading.Event()

    def answer(prompt):
        if prompt == "slow":
            assert third_turn.wait(20), "the other script had to wait"
        if prompt == "3":
            third_turn.set()
        return prompt

    def script(task):
        if task.question.id == "q1":
            yield Ask((("user", "slow"),), 10)
        else:
            for number in range(4):
                reply = yield Ask((("user", str(number)),), 10)
                yield task.segment("search", reply.text)
        yield task.segment("answer", "done")

    venv = made_venv(small_data, num_envs=2)
    with scripted_lm.serving_lm(answer) as (url, bodies):
        lm = CompletionServerLM(url, BYTES, "search-r1", protocol="chat", retries=0)
        try:
            played = rollout(venv, ScriptedAgent.for_env(script, venv, Writer(lm, BYTES)), ["q1", "q2"])
        finally:
            third_turn.set()
            lm.close()
    assert [trajectory.answer for trajectory in played] == ["done", "done"]
    assert len(bodies) == 5


def test_the_task_says_how_many_segments_there_are(small_data):
    seen = []

    def script(task):
        seen.append((task.max_turns, task.max_segment_tokens, task.thinking))
        yield task.segment("answer", "")

    for arguments in ({"max_turns": 7, "max_segment_tokens": 99}, {"dialect": "r1-searcher"}):
        venv = made_venv(small_data, **arguments)
        rollout(venv, ScriptedAgent.for_env(script, venv), ["q1"])
    assert seen == [(7, 99, False), (5, 2048, True)]


def test_a_script_that_asks_without_a_model_is_an_error(small_data):
    venv = made_venv(small_data)
    with pytest.raises(ConfigurationError, match="writer=Writer"):
        rollout(venv, ScriptedAgent.for_env(asks_and_searches, venv), ["q1"])


def test_control_tokens_of_any_dialect_are_defused_for_a_dialect_of_ones_own():
    own = replace(get_dialect("search-r1"), name="own-tags", search_open="{{find", search_close="}}")
    task = Task(environment("search-r1", "byte").source[0], own, np.random.default_rng(0), 5, 100, BYTES, False)
    segment = task.segment("search", "a }} b {{find c", "{{find d}}")
    assert own.parse(segment).kind == "search"
    assert segment.count("}}") == 1
