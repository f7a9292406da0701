"""Scripted agents in the real environment: what they write, and how far it gets them."""

import gymnasium as gym
import pytest

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents.evaluate import evaluate
from searchqa_agents.rollout import draw_questions, rollout
from searchqa_agents.scripted import ScriptedAgent, oracle
from searchqa_envs.errors import ConfigurationError


def make(num_envs=16, **arguments):
    return gym.make_vec("SearchQA-World-v0", num_envs=num_envs, autoreset_mode="DISABLED", **arguments)


def em_of(venv, script, count=24, **arguments):
    questions = draw_questions(venv.unwrapped.source, count, seed=1, num_worlds=2)
    return evaluate(venv, ScriptedAgent.for_env(script, venv), questions, **arguments)


@pytest.mark.parametrize("preset", ["easy", "deep", "medium", "hard"])
@pytest.mark.parametrize("dialect", ["search-r1", "zerosearch", "r1-searcher"])
def test_the_oracle_is_always_right(preset, dialect):
    result = em_of(make(preset=preset, dialect=dialect), "oracle")
    assert result.metrics["em"] == 1.0
    assert result.metrics["invalid_turns"] == 0
    assert result.metrics["title_recall_all"] == 1.0


def test_the_oracle_closes_the_thought_that_r1_searchers_prompt_opens():
    venv = make(dialect="r1-searcher", prompt="published", num_envs=4, max_context_tokens=4096)
    questions = draw_questions(venv.unwrapped.source, 4, seed=1, num_worlds=1)
    [first, *_] = rollout(venv, ScriptedAgent.for_env("oracle", venv), questions)
    assert first.prompt.endswith("<think>")
    assert first.turns[0].segment.startswith("</think><|begin_of_query|>")
    assert first.metrics["em"] == 1.0


def test_demonstrations_read_like_this():
    venv = make(num_envs=1)
    source = venv.unwrapped.source
    question = next(source[i] for i in range(len(source)) if source[i].metadata["hops"] == 2)
    a, b = question.metadata["chain"]
    [trajectory] = rollout(venv, ScriptedAgent.for_env("oracle", venv), [question.id])
    assert [turn.segment for turn in trajectory.turns] == [
        f"<search>{a['query']}</search>",
        f"<think> {a['query']} 's {a['relation']} {a['object']} .</think><search>{b['query']}</search>",
        f"<think> {b['query']} 's {b['relation']} {b['object']} .</think><answer>{question.golden_answers[0]}</answer>",
    ]
    assert trajectory.logprobs is None
    assert not trajectory.retokenized


def test_the_lazy_oracle_answers_early_as_often_as_asked():
    venv = make(num_envs=64, hops=2)
    questions = draw_questions(venv.unwrapped.source, 400, seed=2, num_worlds=20)
    trajectories = rollout(venv, ScriptedAgent.for_env(oracle(lazy=0.7), venv), questions)
    early = [t for t in trajectories if t.metrics["searches"] == 1]
    assert 0.63 < len(early) / 400 < 0.77  # 3 standard deviations
    for trajectory in early:
        link = venv.unwrapped.source[venv.unwrapped.source.index_of(trajectory.question_id)].metadata["chain"][0]
        assert trajectory.answer == link["object"]


def test_direct_and_search_once():
    venv = make()
    assert em_of(venv, "direct").metrics["em"] == 0
    once = em_of(venv, "search_once")
    assert once.metrics["searches"] == 1
    assert once.groups["hops=1"]["title_recall_all"] == 1
    [trajectory, *_] = once.trajectories
    assert trajectory.turns[0].content == trajectory.question
    assert trajectory.answer  # the title of the first passage


def test_search_once_on_a_real_set(small_data):
    venv = gym.make_vec(
        "SearchQA-HotpotQA-v0", num_envs=2, autoreset_mode="DISABLED", data_dir=small_data, split="all", max_context_tokens=40_000
    )
    result = evaluate(venv, ScriptedAgent.for_env("search_once", venv), group_by="type")
    assert result.metrics["questions"] == 5  # all of them, though two at a time
    assert result.metrics["searches"] == 1
    assert 0 < result.metrics["title_recall_mean"] <= 1
    assert list(result.groups) == ["type=bridge"]


def test_errors_name_the_way_out(small_data):
    venv = gym.make_vec("SearchQA-HotpotQA-v0", num_envs=1, autoreset_mode="DISABLED", data_dir=small_data, split="all")
    with pytest.raises(ConfigurationError, match="use SearchQA-World-v0"):
        rollout(venv, ScriptedAgent.for_env("oracle", venv), ["q1"])
    with pytest.raises(ConfigurationError, match="script must be one of"):
        ScriptedAgent.for_env("orakle", venv)
    with pytest.raises(ConfigurationError, match="probability"):
        oracle(lazy=1.5)
