"""Rows of scores: what is measured in an episode, and that nothing else counts."""

import json
import os
from dataclasses import replace

import gymnasium as gym
import pytest
from hypothesis import given
from hypothesis import strategies as st

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents.lost_back_end import LostBackEndError
from searchqa_agents.measures import SCHEMA_VERSION, forged_tags, model_use, question_groups, score_row, time_row
from searchqa_agents.rollout import rollout
from searchqa_agents.scripted import ScriptedAgent
from searchqa_agents.trajectory import TurnSpan
from searchqa_envs.dialects import R1_SEARCHER, SEARCH_R1, ZEROSEARCH
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.questions import Question


def turn(segment="", action="search", content="", observation="", passages=(), start=0):
    return TurnSpan(start, start + 1, start + 2, action, content, segment, observation, tuple(passages))


@pytest.fixture
def question():
    metadata = {"type": "bridge", "level": "hard", "supporting_titles": ["Ada", "Bob"], "split": "dev"}
    return Question("q1", "Who?", ("New York City", "NYC"), metadata)


@pytest.fixture
def trajectory(episode):
    turns = (
        turn(
            "<think>a</think>\n<search>x</search>", "search", "x", "<information>Doc</information>", [("p1", "Bob"), ("p2", "Cy")], start=3
        ),
        turn("<information>I say so</information> hm", "invalid", start=10),
        turn("<search>y</search>", "search", "y", passages=[("p3", "Bob"), ("p4", "Ada")], start=20),
        turn("<answer>City-New, York</answer>", "answer", "City-New, York", start=30),
    )
    return episode(
        [1, 2, 3], [4, 5], [6], [7, 8, 9], turns=turns, question_id="q1", answer="City-New, York", reward=0.5,
        metrics={"em": 0.0, "f1": 0.4, "searches": 2.0, "invalid_turns": 1.0, "title_recall_mean": 1.0},
        seconds={"model": 1.5, "search": 0.25, "environment": 0.125},
    )  # fmt: skip


def test_a_row_by_hand(question, trajectory):
    row = score_row("hotpotqa", 2, question, trajectory, SEARCH_R1)
    assert row == {
        "schema_version": SCHEMA_VERSION,
        "set": "hotpotqa",
        "id": "q1",
        "sample": 2,
        "question": "Who?",
        "golden_answers": ["New York City", "NYC"],
        "answer": "City-New, York",
        "groups": {"type": "bridge", "level": "hard", "hops": 2},
        "metrics": {
            "em": 0.0,
            "f1": 0.4,
            "searches": 2.0,
            "invalid_turns": 1.0,
            "title_recall_mean": 1.0,
            "em_r1_searcher": 0.0,  # "city new york" is not "new york city"
            "f1_r1_searcher": 1.0,
            "sub_em_r1_searcher": 0.0,
            "cover_em_squad": 0.0,  # "citynew york" lacks "new" and "city"
            "reward": 0.5,
            "answered": 1.0,
            "turns": 4.0,
            "invalid_rate": 0.25,
            "forged_tags": 2.0,
            "forged": 1.0,
            "tokens": 5.0,
            "model_calls": 4.0,
            "prompt_tokens": 63.0,  # 3 + 10 + 20 + 30
            "generated_tokens": 5.0,
        },
        "turns": [
            {"action": "search", "content": "x", "passages": [["p1", "Bob"], ["p2", "Cy"]], "title_recall": 0.5},
            {"action": "invalid", "content": "", "passages": [], "title_recall": 0.5},
            {"action": "search", "content": "y", "passages": [["p3", "Bob"], ["p4", "Ada"]], "title_recall": 1.0},
            {"action": "answer", "content": "City-New, York", "passages": [], "title_recall": 1.0},
        ],
        "terminated": True,
        "truncated": False,
        "retokenized": False,
    }
    assert json.loads(json.dumps(row)) == row


def test_times_are_beside_the_row_and_not_in_it(question, trajectory):
    row, slower = (
        score_row("s", 0, question, one, SEARCH_R1)
        for one in (trajectory, trajectory.__class__(**{**vars(trajectory), "seconds": {"model": 9.0}}))
    )
    assert row == slower
    expected = {"set": "s", "id": "q1", "sample": 0, "seconds": {"model": 1.5, "search": 0.25, "environment": 0.125}}
    assert time_row("s", 0, trajectory) == expected


def test_an_episode_without_an_answer_is_scored_zero(question, episode):
    row = score_row("s", 0, question, episode([1], [2], question_id="q1", terminated=False, truncated=True), SEARCH_R1)
    assert row["answer"] is None
    for name in ("answered", "em_r1_searcher", "f1_r1_searcher", "sub_em_r1_searcher", "cover_em_squad"):
        assert row["metrics"][name] == 0


def test_what_a_set_does_not_know_is_an_absent_key(episode):
    row = score_row("s", 0, Question("q", "Who?", ("a",)), episode([1], [2]), SEARCH_R1)
    assert row["groups"] == {}
    assert all("title_recall" not in one for one in row["turns"])
    assert not any(name.startswith("title_recall") for name in row["metrics"])


@pytest.mark.parametrize(
    ("dialect", "segment", "count"),
    [
        (SEARCH_R1, "<information>x</information><answer>x</answer>", 2),
        (SEARCH_R1, "<information><information>", 2),
        (SEARCH_R1, "<information", 0),  # breaks off
        (SEARCH_R1, "information>", 0),
        (SEARCH_R1, "< information >", 0),  # blanks in it
        (SEARCH_R1, "<Information>", 0),  # other letters
        (SEARCH_R1, "<|begin_of_documents|>", 0),  # another dialect's
        (SEARCH_R1, "<think></think><search></search><answer></answer>", 0),  # the policy's own
        (ZEROSEARCH, "</information>", 1),
        (R1_SEARCHER, "<|begin_of_documents|>\n(1)x\n<|end_of_documents|>", 2),
        (R1_SEARCHER, "<information></information>", 0),
        (R1_SEARCHER, "<|begin_of_query|>x<|end_of_query|>", 0),
    ],
)
def test_forged_tags_are_whole_tags_of_the_environment_in_the_dialect(dialect, segment, count):
    assert forged_tags([turn(segment), turn("")], dialect) == count


def test_what_the_environment_writes_is_not_forged():
    assert forged_tags([turn("<search>x</search>", observation="<information>Doc 1</information>")], SEARCH_R1) == 0


def test_halves_of_a_tag_in_two_segments_are_none():
    assert forged_tags([turn("<infor"), turn("mation>")], SEARCH_R1) == 0


def test_model_use_is_what_the_agent_says_else_what_the_context_tells(episode):
    segments = (turn(start=2), turn(start=7))
    assert model_use(episode([1, 1], [2, 2, 2], [3], [4], turns=segments)) == {
        "model_calls": 2.0,
        "prompt_tokens": 9.0,
        "generated_tokens": 4.0,
    }
    asked = episode([1], [2], usage={"calls": 3.0, "prompt_tokens": 90.0, "generated_tokens": 12.0})
    assert model_use(asked) == {"model_calls": 3.0, "prompt_tokens": 90.0, "generated_tokens": 12.0}
    script = episode([1], [2])
    assert model_use(script.__class__(**{**vars(script), "logprobs": None})) == {}
    assert model_use(replace(script, logprobs=None, retokenized=True, turns=segments)) == {"model_calls": 2.0}  # its tokens are not known


@pytest.mark.parametrize(
    ("changes", "tokens", "forged"),
    [
        ({}, 1.0, 2.0),  # a model of this process
        ({"logprobs": None, "usage": {"calls": 1.0, "sampled_tokens": 1.0}}, 1.0, 2.0),  # a server with ids and no log-probabilities
        ({"logprobs": None, "retokenized": True}, None, 2.0),  # text: the tokens are not the model's
        ({"logprobs": None, "retokenized": True, "usage": {"calls": 1.0, "prompt_tokens": 50.0, "generated_tokens": 9.0}}, None, 2.0),
        ({"logprobs": None}, None, None),  # a script
        ({"logprobs": None, "usage": {"calls": 3.0, "failed_calls": 1.0}}, None, None),  # a baseline
    ],
)
def test_tokens_and_forged_tags_are_those_that_a_model_wrote(question, episode, changes, tokens, forged):
    turns = (turn("<information>x</information>", "invalid", start=1),)
    metrics = score_row("s", 0, question, replace(episode([1], [2], turns=turns, question_id="q1"), **changes), SEARCH_R1)["metrics"]
    assert (metrics.get("tokens"), metrics.get("forged_tags")) == (tokens, forged)
    assert ("forged" in metrics) == (forged is not None)
    assert metrics.get("generated_tokens") == (9.0 if "generated_tokens" in changes.get("usage", {}) else tokens if not changes else None)
    assert metrics.get("failed_calls") == changes.get("usage", {}).get("failed_calls")


@pytest.mark.parametrize(("answer", "answered"), [(None, 0), ("", 0), (" \n", 0), ("no", 1)])
def test_a_blank_answer_is_none(question, episode, answer, answered):
    row = score_row("s", 0, question, episode([1], [2], question_id="q1", answer=answer), SEARCH_R1)
    assert row["metrics"]["answered"] == answered


def test_a_lost_episode_has_no_row(question, episode):
    with pytest.raises(LostBackEndError, match=r"q1.*nq.*played again.*no route"):
        score_row("nq", 0, question, episode([1], [2], question_id="q1", backend_error="no route"), SEARCH_R1)


def test_a_trajectory_of_another_question_is_refused(question, episode):
    with pytest.raises(ConfigurationError, match="'q1'; got one of 'q2'"):
        score_row("nq", 0, question, episode([1], [2], question_id="q2"), SEARCH_R1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_does_not_have_is_refused_at_once(question, episode, value):
    with pytest.raises(ConfigurationError, match=r"reward must be a finite number; got (nan|inf) for question 'q1' of nq"):
        score_row("nq", 0, question, episode([1], [2], question_id="q1", reward=value), SEARCH_R1)


@pytest.mark.parametrize(
    ("set_name", "metadata", "groups"),
    [
        ("hotpotqa", {"type": "comparison", "level": "easy", "split": "dev"}, {"type": "comparison", "level": "easy", "hops": 2}),
        ("2wikimultihopqa", {"type": "bridge_comparison"}, {"type": "bridge_comparison", "hops": 4}),
        ("2wikimultihopqa", {"type": "inference"}, {"type": "inference", "hops": 2}),
        ("musique", {"type": "3hop2"}, {"type": "3hop2", "hops": 3}),
        ("musique", {"type": "2hop"}, {"type": "2hop", "hops": 2}),
        ("musique", {"type": "2hop", "hops": 4}, {"type": "2hop", "hops": 4}),
        ("musique", {}, {}),
        ("bamboogle", {}, {"hops": 2}),
        ("nq", {}, {"hops": 1}),
        ("popqa", {"type": "place of birth"}, {"type": "place of birth", "hops": 1}),
        ("custom", {"type": "place of birth"}, {"type": "place of birth"}),
        ("world", {"hops": 1, "type": None}, {"hops": 1}),
        ("world", {"type": ["a"], "hops": 2.5}, {"type": "['a']", "hops": "2.5"}),
    ],
)
def test_groups_of_a_question(set_name, metadata, groups):
    assert question_groups(set_name, Question("q", "?", ("a",), metadata)) == groups


@given(
    wanted=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6),
    retrieved=st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=4), min_size=1, max_size=6),
)
def test_recall_by_turn_never_falls_and_ends_at_that_of_the_episode(episode, wanted, retrieved):
    question = Question("q", "?", ("a",), {"supporting_titles": wanted})
    turns = tuple(turn(passages=[(title, title) for title in titles]) for titles in retrieved)
    row = score_row("s", 0, question, episode([1], [2], turns=turns), SEARCH_R1)
    recalls = [one["title_recall"] for one in row["turns"]]
    assert recalls == sorted(recalls)
    seen = {title for titles in retrieved for title in titles}
    assert recalls[-1] == len(set(wanted) & seen) / len(set(wanted))


def played(env_id, agent, count, **settings):
    venv = gym.make_vec(env_id, num_envs=8, autoreset_mode="DISABLED", **settings)
    source, dialect = venv.unwrapped.source, venv.unwrapped.dialect
    trajectories = rollout(venv, ScriptedAgent.for_env(agent, venv), list(range(count)))
    venv.close()
    return [score_row("set", 0, source[i], t, dialect) for i, t in enumerate(trajectories)], trajectories


def test_rows_of_played_episodes_agree_with_the_environment():
    rows, trajectories = played("SearchQA-World-v0", "lazy_oracle", 40)
    assert {row["metrics"]["title_recall_mean"] for row in rows} > {1.0}
    for row, trajectory in zip(rows, trajectories, strict=True):
        assert row["turns"][-1]["title_recall"] == trajectory.metrics["title_recall_mean"]
        assert trajectory.metrics.items() <= row["metrics"].items()
        assert sum(bool(one["passages"]) for one in row["turns"]) == trajectory.metrics["searches"]
        assert row["groups"].keys() == {"type", "hops", "level"}


@pytest.mark.data
def test_rows_of_real_questions():
    data = os.environ["SEARCHQA_DATA"]
    rows, trajectories = played("SearchQA-HotpotQA-v0", "search_once", 24, data_dir=data, retriever="bm25")
    assert any(row["metrics"]["title_recall_mean"] > 0 for row in rows)
    for row, trajectory in zip(rows, trajectories, strict=True):
        assert row["turns"][-1]["title_recall"] == trajectory.metrics["title_recall_mean"]
        assert row["groups"]["type"] in ("bridge", "comparison")
        assert "forged" not in row["metrics"]  # a script wrote the segments
    rows, _ = played("SearchQA-MuSiQue-v0", "direct", 200, data_dir=data, split="all")
    assert {row["groups"]["hops"] for row in rows} == {2, 3, 4}
    assert all(row["groups"]["type"].startswith(f"{row['groups']['hops']}hop") for row in rows)
