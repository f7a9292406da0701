"""Search controls: what a search may say, what is refused, and that nothing changes where they are off."""

from __future__ import annotations

import copy
import json
import pickle
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import searchqa_envs  # noqa: F401 - registers the ids
from searchqa_envs.configuration import build_rules
from searchqa_envs.dialects import BARE_PROMPT, DIALECTS, SEARCH_R1_INVALID, get_dialect
from searchqa_envs.episode_types import Action, ControlledSearch, restored_action
from searchqa_envs.errors import ConfigurationError, EpisodeStateError
from searchqa_envs.search_controls import Controls, SearchControls
from searchqa_envs.testing import SearchEnvContract
from searchqa_retrievers import Cached, Hit, Passage, SearchRequest
from searchqa_retrievers.filtered import Filtered, words

ALL = {"top_k": 10, "sources": ["wiki", "news"], "filters": ["title"]}
SOURCES = {
    "name": "sources",
    "sources": {"wiki": {"name": "filtered", "retriever": "bm25"}, "news": {"name": "filtered", "retriever": "bm25"}},
    "default": "wiki",
}


class Recorder:
    """Remembers the requests and answers with as many passages as were asked for."""

    filter_keys = ("source", "title")
    sources = ("wiki", "news")

    def __init__(self) -> None:
        self.requests: list[SearchRequest] = []

    def __deepcopy__(self, memo: object) -> Recorder:
        return self

    def search(self, requests: Sequence[SearchRequest]) -> list[list[Hit]]:
        self.requests += requests
        return [[Hit(Passage(f"d{i}", "T", "|| k=9 ||"), -float(i)) for i in range(request.top_k)] for request in requests]

    def cache_key(self, request: SearchRequest) -> Any:
        return (request.query, request.top_k, tuple(sorted((request.filters or {}).items())))


def make(small_data: Path, **arguments: Any) -> Any:
    return gym.make(
        "SearchQA-HotpotQA-v0", data_dir=str(small_data), **{"search_controls": ALL, "retriever": Recorder(), **arguments}
    ).unwrapped


def step(env: Any, segment: str) -> Any:
    return env.step(env.tokenizer.encode(segment))


def parse(content: str, **controls: Any) -> Any:
    return SearchControls.from_argument(controls or ALL).parse(content)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "query", "controls"),
    [
        ("a query", "a query", None),
        ("a | query; k=5", "a | query; k=5", None),  # nothing without the separator
        ("a query || k=5", "a query", Controls(5)),
        ("a query||k=10", "a query", Controls(10)),
        ("q || source=news", "q", Controls(None, (("source", "news"),))),
        ("q ||  title = Lisbon, Portugal ; k = 1;source=wiki", "q", Controls(1, (("source", "wiki"), ("title", "Lisbon, Portugal")))),
        ("q || title=a=b", "q", Controls(None, (("title", "a=b"),))),
        ("q || title=東京", "q", Controls(None, (("title", "東京"),))),
        ("|| k=2", "", Controls(2)),
    ],
)
def test_what_is_understood(content: str, query: str, controls: Controls | None) -> None:
    assert parse(content) == (query, controls)


@pytest.mark.parametrize(
    "content",
    [
        "q ||",  # nothing said
        "q || ;",
        "q || k=5;",
        "q || k",
        "q || k=",
        "q || =5",
        "q || k=0",
        "q || k=11",  # over the greatest
        "q || k=-1",
        "q || k=+5",
        "q || k=05",
        "q || k=5.0",
        "q || k=1e1",
        "q || k=five",
        "q || k=\u0665",  # five in Arabic digits
        "q || k=\uff15",  # in full width
        "q || k=5 5",
        f"q || k={'9' * 100_000}",
        "q || k=5; k=5",  # twice
        "q || K=5",
        "q || top_k=5",
        "q || source=web",
        "q || source=Wiki",
        "q || source=",
        "q || title=",
        "q || title=!?",
        "q || title=_",
        "q || title=\ufc5e",  # an Arabic ligature that has no letter once it is normalised
        "q || year=1999",
        "q || k=5 || k=6",  # the separator twice
        "q || || k=5",
        "q ||| k=5 |||",
        "q || k=5, source=wiki",
    ],
)
def test_what_is_refused(content: str) -> None:
    assert parse(content) is None


def test_only_what_is_allowed_is_understood() -> None:
    assert parse("q || k=5", sources=["wiki"]) is None
    assert parse("q || source=wiki", top_k=5) is None
    assert parse("q || title=a", top_k=5) is None
    assert parse("q || year=1999", filters=["year"]) == ("q", Controls(None, (("year", "1999"),)))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("q |;=k5title source wiki٥")) | st.text())
def test_any_text_has_a_query_or_is_refused(content: str) -> None:
    understood = parse(content)
    if understood is not None and understood[1] is not None:
        controls = understood[1]
        assert controls.top_k is None or 1 <= controls.top_k <= 10
        assert all(key in ("source", "title") for key, _ in controls.filters)
        assert understood[0] == content.partition("||")[0].strip()


def test_a_title_that_is_understood_has_a_word_for_the_filter() -> None:
    """Else the retriever would refuse the request, which would end the run."""
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if re.match(r"\w", unicodedata.normalize("NFKC", character)) and parse(f"q || title={character}") is not None:
            assert words(character)


@pytest.mark.parametrize(
    "content",
    ["q || " + "k=5;" * 250_000, "q ||" + "||" * 500_000, "q || title=" + "ﷺ" * 300_000, "|" * 1_000_000, "q || " + "=" * 1_000_000],
)
def test_a_million_characters_are_read_or_refused(content: str) -> None:
    understood = parse(content)
    assert understood is None or understood[1] is None or len(content) > 300_000


# What the environment makes of it


def test_a_search_is_made_as_it_says(small_data: Path) -> None:
    env = make(small_data, top_k=2)
    env.reset(options={"question_id": "q1"})
    info = step(env, "<search> who built it || k=5; source=news; title=Lisbon </search>")[4]
    request = env.rules.retriever.requests[0]
    assert (request.query, request.top_k, request.filters) == ("who built it", 5, {"source": "news", "title": "Lisbon"})
    assert (info["action"], info["query"], len(info["turn_record"].passages)) == ("search", "who built it", 5)
    step(env, "<search> plain </search>")
    assert (env.rules.retriever.requests[1].top_k, env.rules.retriever.requests[1].filters) == (2, None)


def test_an_invalid_action_costs_a_turn_and_asks_nothing(small_data: Path) -> None:
    env = make(small_data)
    env.reset()
    _, reward, terminated, truncated, info = step(env, "<search> q || k=999 </search>")
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert (info["action"], info["query"], info["turn"]) == ("invalid", None, 1)
    assert env.tokenizer.decode(list(info["turn_record"].env_tokens)) == SEARCH_R1_INVALID
    assert env.rules.retriever.requests == []


def test_an_invalid_action_ends_an_episode_of_r1_searcher(small_data: Path) -> None:
    env = make(small_data, dialect="r1-searcher")
    env.reset()
    _, _, terminated, _, info = step(env, "<|begin_of_query|> q || source=web <|end_of_query|>")
    assert (terminated, info["action"]) == (True, "invalid")
    env.reset()
    assert step(env, "<|begin_of_query|> || k=3 <|end_of_query|>")[4]["action"] == "invalid"  # an empty query, as ever
    env.reset()
    assert step(env, "<|begin_of_query|> q || k=3 <|end_of_query|>")[4]["action"] == "search"
    assert env.rules.retriever.requests[-1].top_k == 3


def test_an_answer_is_never_read_for_controls(small_data: Path) -> None:
    env = make(small_data)
    env.reset()
    assert step(env, "<answer> a || b || c </answer>")[4]["answer"] == "a || b || c"


def test_the_separator_in_a_passage_does_nothing(small_data: Path) -> None:
    env = make(small_data)
    env.reset()
    info = step(env, "<search> q || k=2 </search>")[4]
    assert len(info["turn_record"].passages) == 2
    assert "|| k=9 ||" in env.tokenizer.decode(list(info["turn_record"].env_tokens))
    assert step(env, "<search> next </search>")[4]["query"] == "next"


def test_the_same_episode_in_a_vector_environment(small_data: Path) -> None:
    vector = gym.make_vec("SearchQA-HotpotQA-v0", num_envs=3, data_dir=str(small_data), search_controls=ALL, retriever=Recorder())
    vector.reset(seed=0)
    segments = ["<search> q || k=4 </search>", "<search> q </search>", "<search> q || k=4 </search>"]
    _, _, _, _, infos = vector.step([vector.tokenizer.encode(segment) for segment in segments])  # type: ignore[attr-defined]
    assert [len(record.passages) for record in infos["turn_record"]] == [4, 3, 4]
    assert len(vector.rules.retriever.requests) == 2  # type: ignore[attr-defined]


def test_our_own_retrievers_serve_it(small_data: Path) -> None:
    env = make(small_data, retriever=SOURCES)
    env.reset(options={"question_id": "q1"})
    info = step(env, "<search> river in Poland || k=4; source=news; title=vistula </search>")[4]
    assert [passage.title for passage in info["turn_record"].passages] == ["Vistula"]


def test_the_world_lets_a_search_choose_k() -> None:
    env: Any = gym.make("SearchQA-World-v0", search_controls={"top_k": 4}).unwrapped
    _, info = env.reset(seed=0)
    info = step(env, f"<search> {info['question']} || k=4 </search>")[4]
    assert info["action"] == "search"
    assert len(info["turn_record"].passages) > 1
    assert len(make_world_passages(info["question"])) == 1


def make_world_passages(question: str) -> Any:
    env: Any = gym.make("SearchQA-World-v0").unwrapped
    env.reset(seed=0)
    return step(env, f"<search> {question} </search>")[4]["turn_record"].passages


# State


def test_an_episode_goes_on_from_its_state(small_data: Path) -> None:
    env, again = make(small_data), make(small_data)
    env.reset(seed=3)
    again.reset(seed=0)
    step(env, "<search> q || k=2; title=a </search>")
    state = json.loads(json.dumps(env.get_state()))
    again.set_state(state)
    assert again.episode_view() == env.episode_view()
    assert again.episode_view().turns[0].action.controls == Controls(2, (("title", "a"),))
    assert step(again, "<answer> x </answer>")[1:4] == step(env, "<answer> x </answer>")[1:4]


def test_a_state_goes_on_only_where_the_controls_are_the_same(small_data: Path) -> None:
    env = make(small_data)
    env.reset(seed=3)
    for other in (None, {"top_k": 5}):
        with pytest.raises(EpisodeStateError, match="same arguments"):
            make(small_data, search_controls=other).set_state(env.get_state())


def test_states_of_plain_searches_are_as_they_were(small_data: Path) -> None:
    env = make(small_data, search_controls=None)
    env.reset(seed=3)
    step(env, "<search> q || k=2 </search>")
    assert env.get_state()["episode"]["turns"][0]["action"] == ["search", "q || k=2"]
    assert restored_action(["search", "q"]) == Action("search", "q") == ("search", "q")


def test_a_controlled_search_is_an_action_that_remembers() -> None:
    action = ControlledSearch("q", Controls(2))
    kind, text = action
    assert (kind, text, action.kind, action.text, action.controls) == ("search", "q", "search", "q", Controls(2))
    assert action not in (Action("search", "q"), ControlledSearch("q", Controls(3)))
    assert Action("search", "q") != action
    for twin in (pickle.loads(pickle.dumps(action)), copy.deepcopy(action), restored_action(json.loads(json.dumps(action.saved())))):
        assert (twin, hash(twin), type(twin)) == (action, hash(action), ControlledSearch)
    assert Action("search", "q").controls is None


# Prompt and stamp


@pytest.mark.parametrize(
    ("name", "end"),
    [("search-r1", " Question: Who?\n"), ("zerosearch", " Question: Who?\n"), ("r1-searcher", "\n\nUser:Who\nAssistant: <think>")],
)
def test_the_published_prompt_gets_one_sentence_before_the_question(small_data: Path, name: str, end: str) -> None:
    dialect = make(small_data, dialect=name).dialect
    sentence = dialect.controls.sentence(dialect.search_open, dialect.search_close)
    told, plain = dialect.render_question("published", "Who"), DIALECTS[name].render_question("published", "Who")
    assert told.endswith(f"{sentence}{end}")
    assert told.replace(f" {sentence}", "") == plain
    assert dialect.render_question("bare", "Who") == BARE_PROMPT.format(question="Who")
    assert dialect.render_question("Own {question}", "Who") == DIALECTS[name].render_question("Own {question}", "Who")


def test_the_sentence_names_what_may_be_said_and_its_example_is_understood() -> None:
    for argument in (ALL, {"top_k": 3}, {"sources": ["wiki"]}, {"filters": ["title", "year"]}):
        controls = SearchControls.from_argument(argument)
        assert controls is not None
        sentence = controls.sentence("<search>", "</search>")
        example = sentence.partition("<search>")[2].partition("</search>")[0].strip()
        understood = controls.parse(example)
        assert understood is not None
        assert understood[0] == "query"
        assert {key for key, _ in understood[1].filters} == set(controls.keys)  # type: ignore[union-attr]
        assert all(source in sentence for source in controls.sources)


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_nothing_changes_where_they_are_off(small_data: Path, name: str) -> None:
    env = make(small_data, dialect=name, search_controls=None)
    assert env.dialect is DIALECTS[name]
    assert "search_controls" not in env.stamp()
    on = make(small_data, dialect=name).stamp()
    assert on.pop("search_controls") == ALL
    assert on == env.stamp()
    content = "q || k=5; source=news"
    assert env.dialect.parse(f"{env.dialect.search_open}{content}{env.dialect.search_close}") == ("search", content)


def test_a_dialect_with_controls_is_known_by_the_plain_one(small_data: Path) -> None:
    dialect = make(small_data).dialect
    assert get_dialect(dialect) is dialect
    assert get_dialect("search-r1") is DIALECTS["search-r1"]
    assert DIALECTS["search-r1"].controls is None


def test_rewards_and_metrics_are_those_of_the_plain_search(small_data: Path) -> None:
    ends = []
    for controls, segment in (
        (ALL, "<think>t</think><search> Vistula || k=3 </search>"),
        (None, "<think>t</think><search> Vistula </search>"),
    ):
        env = make(small_data, search_controls=controls, retriever={**SOURCES}, reward="search_r1_format", prompt="bare")
        env.reset(options={"question_id": "q1"})
        step(env, segment)
        info = step(env, "<think>t</think><answer> Vistula </answer>")[4]
        ends.append((info["metrics"], info["reward_terms"]))
    assert ends[0] == ends[1]


# Configuration


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ({}, "must have top_k, sources or filters"),
        ([], "must be a mapping"),
        ("title", "must be a mapping"),
        ({"k": 5}, "must be a mapping with"),
        ({"top_k": 0}, "top_k.*0"),
        ({"top_k": True}, "top_k.*True"),
        ({"top_k": "5"}, "top_k.*'5'"),
        ({"sources": "wiki"}, "sources must be a list"),
        ({"sources": 0}, "sources must be a list"),
        ({"sources": [[]]}, "different names"),
        ({"filters": [{}]}, "different names"),
        ({"sources": ["wiki", "wiki"]}, "different names"),
        ({"sources": ["a;b"]}, "a;b"),
        ({"sources": ["<answer>"]}, "<answer>"),
        ({"sources": [3]}, "3"),
        ({"filters": ["k"]}, "cannot have 'k'"),
        ({"filters": ["source"]}, "cannot have 'k' or 'source'"),
        ({"filters": [" title"]}, "title"),
    ],
)
def test_controls_that_cannot_be_are_errors(small_data: Path, controls: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(small_data, search_controls=controls)


@pytest.mark.parametrize(
    ("retriever", "controls", "message"),
    [
        ("bm25", {"filters": ["title"]}, "say title, which the retriever cannot serve"),
        ("bm25", {"sources": ["wiki"]}, "say source, which the retriever cannot serve"),
        (SOURCES, {"filters": ["year"]}, "say year, which the retriever cannot serve"),
        (SOURCES, {"sources": ["wiki", "web"]}, r"wiki, news; got \['web'\]"),
        ({"name": "filtered", "retriever": SOURCES}, {"sources": ["web"]}, r"wiki, news; got \['web'\]"),
        ({"name": "filtered", "retriever": "bm25"}, {"sources": ["wiki"]}, "say source, which"),
    ],
)
def test_what_the_retriever_cannot_serve_is_an_error_at_the_beginning(
    small_data: Path, retriever: Any, controls: Any, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(small_data, retriever=retriever, search_controls=controls)


def test_more_than_the_retriever_gives_is_an_error_at_the_beginning(small_data: Path) -> None:
    class Short(Recorder):
        max_top_k = 7

    for retriever in (Short(), Cached(Short()), Filtered(Short(), max_candidates=7)):
        with pytest.raises(ConfigurationError, match=r"top_k must be at most 7, .*; got 8"):
            make(small_data, retriever=retriever, search_controls={"top_k": 8})
        assert make(small_data, retriever=retriever, search_controls={"top_k": 7}).dialect.controls.top_k == 7


def test_an_integer_of_numpy_is_an_integer() -> None:
    controls = SearchControls.from_argument({"top_k": np.int64(5)})
    assert controls == SearchControls(5)
    assert json.dumps(controls.stamp()) == json.dumps(SearchControls(5).stamp())  # type: ignore[union-attr]


def test_a_retriever_that_does_not_say_what_it_serves_is_believed(small_data: Path) -> None:
    class Silent(Recorder):
        filter_keys = sources = None  # type: ignore[assignment]

    env = make(small_data, retriever=Silent())
    env.reset()
    assert step(env, "<search> q || source=news </search>")[4]["action"] == "search"


def test_a_server_is_believed_too(small_data: Path) -> None:
    env = make(small_data, retriever={"name": "filtered", "retriever": "http"})
    assert env.dialect.controls.keys == ("source", "title")


def test_the_world_takes_no_source_or_filter() -> None:
    with pytest.raises(ConfigurationError, match="top_k only"):
        build_rules("world", search_controls={"filters": ["title"]})


class TestControlledEnvironments(SearchEnvContract):
    @pytest.fixture(autouse=True, params=sorted(DIALECTS))
    def _choose(self, request: pytest.FixtureRequest, small_data: Path) -> None:
        self.arguments = {"dialect": request.param, "data_dir": str(small_data), "search_controls": ALL, "retriever": SOURCES}

    def make_env(self) -> gym.Env[Any, Any]:
        return gym.make("SearchQA-HotpotQA-v0", **self.arguments)

    def texts(self, env: Any) -> Sequence[str]:
        dialect = env.dialect
        return (
            f"{dialect.search_open} a question || k=2; source=news {dialect.search_close}",
            f"{dialect.search_open} another || title=Vistula {dialect.search_close} and what nobody reads",
            f"{dialect.answer_open} an answer {dialect.answer_close}",
        )
