"""Prompts, tags, parsing and the defusing of text from outside."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_envs.dialects import DIALECTS, SEARCH_R1, get_dialect, neutralise, reserved_strings
from searchqa_envs.errors import ConfigurationError
from searchqa_retrievers import Passage

ALL_TAGS = tuple(sorted({tag for dialect in DIALECTS.values() for tag in dialect.tags}))


@pytest.mark.parametrize(
    ("text", "kind", "content"),
    [
        ("<search> capital of Poland </search>", "search", "capital of Poland"),
        ("<think> hm </think>\n<answer>\nWarsaw\n</answer>", "answer", "Warsaw"),  # blanks round the content do not count
        ("<search> a </search> <answer> b </answer>", "search", "a"),  # the first closing tag decides
        ("<answer> b </answer> <search> a </search>", "answer", "b"),
        ("Warsaw </answer>", "invalid", ""),  # a closer without its opener
        ("</search> <answer> b </answer>", "invalid", ""),  # ... although a whole answer follows
        ("<answer> b </search>", "invalid", ""),  # the opener of the other tag does not count
        ("<answer> b", "invalid", ""),  # never closed
        ("", "invalid", ""),
        ("<search></search>", "search", ""),  # an empty query is a search
        ("<search> a <search> b </search>", "search", "a <search> b"),  # the first opener, as the published regular expression
        ("<Answer> b </Answer>", "invalid", ""),  # tags are case-sensitive
        ("<answer> 東京 🙂 </answer>", "answer", "東京 🙂"),
    ],
)
def test_search_r1_reads_the_first_closed_action(text: str, kind: str, content: str) -> None:
    assert SEARCH_R1.parse(text) == (kind, content)


@pytest.mark.parametrize(
    ("text", "kind", "content"),
    [
        ("hm <|begin_of_query|> Curie birthplace <|end_of_query|>", "search", "Curie birthplace"),
        ("<|begin_of_query|> a <|begin_of_query|> b <|end_of_query|>", "search", "b"),  # the last opener, as the published split
        ("</think>\n\n<answer> Warsaw </answer>", "answer", "Warsaw"),
        ("<search> a </search>", "invalid", ""),  # another dialect's tags mean nothing
    ],
)
def test_r1_searcher_reads_its_own_tags(text: str, kind: str, content: str) -> None:
    assert get_dialect("r1-searcher").parse(text) == (kind, content)


def test_search_r1_prompt_strips_the_question_and_ends_it_in_a_question_mark() -> None:
    prompt = SEARCH_R1.render_question("published", "  Who wrote Hamlet ")
    assert prompt.startswith("Answer the given question. You must conduct reasoning inside <think> and </think> first")
    assert prompt.endswith("For example, <answer> Beijing </answer>. Question: Who wrote Hamlet?\n")
    assert SEARCH_R1.render_question("published", "Who?").endswith("Question: Who?\n")


def test_r1_searcher_prompt_ends_with_an_open_think() -> None:
    assert get_dialect("r1-searcher").render_question("published", "Who?").endswith("User:Who?\nAssistant: <think>")


def test_a_prompt_may_be_a_template_and_braces_in_a_question_are_kept() -> None:
    assert SEARCH_R1.render_question("Q: {question} A:", "what is {x}") == "Q: what is {x}? A:"
    with pytest.raises(ConfigurationError, match="prompt must be one of"):
        SEARCH_R1.render_question("nonsense", "who?")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("search-r1", 'Doc 2(Title: "A {text} <b>") body {title}\n'),
        ("r1-searcher", "(2)A {text} <b> body {title}\n"),
        ("zerosearch", "Doc 2: A {text} <b> body {title}\n"),
    ],
)
def test_a_passage_is_written_in_the_published_format(name: str, expected: str) -> None:
    dialect = get_dialect(name)
    assert dialect.document_text(2, Passage("x", "A {text} <b>", "body {title}"), dialect.quoted_titles) == expected


def test_a_simulated_passage_without_title_is_its_text_alone() -> None:
    assert get_dialect("zerosearch").document_text(1, Passage("x", "", "body"), quoted_titles=False) == "Doc 1: body\n"


def test_an_unknown_dialect_names_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="r1-searcher"):
        get_dialect("react")


@pytest.mark.parametrize(
    ("text", "defused"),
    [
        ("see <answer>Paris</answer>", "see [answer]Paris[/answer]"),
        ("<|im_start|>system", "[|im_start|]system"),
        ("<<answer>answer>", "<[answer]answer>"),
        ("<ans<answer>wer>", "<ans[answer]wer>"),
        ("[CLS] x", "(CLS) x"),
        ("a < b and c > d", "a < b and c > d"),
    ],
)
def test_reserved_strings_lose_their_brackets(text: str, defused: str) -> None:
    reserved = reserved_strings(SEARCH_R1.tags, ["<|im_start|>", "[CLS]", "   ", "the"])
    assert neutralise(text, reserved) == defused


@given(
    st.lists(st.sampled_from([*ALL_TAGS, "<", ">", "/", "answer", "search", "x", "|", "<|im_end|>", "[", "]"]), max_size=40).map("".join)
)
def test_nothing_reserved_survives_neutralising(text: str) -> None:
    reserved = reserved_strings(ALL_TAGS, ["<|im_end|>", "[answer]"])
    assert not any(tag in neutralise(text, reserved) for tag in reserved)


@given(st.text())
def test_text_without_tags_is_left_alone(text: str) -> None:
    if not any(tag in text for tag in ALL_TAGS):
        assert neutralise(text, reserved_strings(ALL_TAGS, [])) == text


def test_a_dialect_of_ones_own_is_known_by_its_name_and_may_not_take_anothers() -> None:
    own = replace(SEARCH_R1, name="test-own", search_open="<find>", search_close="</find>")
    try:
        assert get_dialect(own) is own
        assert get_dialect("test-own") is own
        assert own.parse("<find> x </find>") == ("search", "x")
        assert "<find>" in own.tags
        with pytest.raises(ConfigurationError, match="name of its own"):
            get_dialect(replace(SEARCH_R1, search_open="<find>"))
    finally:
        DIALECTS.pop("test-own", None)
