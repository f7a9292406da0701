"""Prompts of simulators: the published text to the letter, what is told in which form, templates of a user's own."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_retrievers import RetrieverError
from searchqa_retrievers.simulation_prompts import MOST_QUERY_CHARACTERS, PROMPTS, number_word, simulation_prompt

USEFUL = """You are the Google search engine.
Given a query, you need to generate five useful documents for the query.

The user is trying to answer the question: "who wrote Hamlet" whose answer is Shakespeare.
Each document should contain about 30 words, and these documents should contain useful information.

Query: author of Hamlet
Useful Output:
"""
ASKED = {"query": "author of Hamlet", "question": "who wrote Hamlet", "answer": "Shakespeare"}


def test_the_published_prompt_in_both_forms():
    assert PROMPTS["sft"].write(False, 5, **ASKED) == USEFUL
    assert PROMPTS["sft"].write(True, 5, **ASKED) == USEFUL.replace("useful", "noisy").replace("Useful", "Noisy")


@pytest.mark.parametrize(
    ("number", "word"),
    [(1, "one"), (3, "three"), (5, "five"), (12, "twelve"), (20, "twenty"), (21, "twenty-one"), (99, "ninety-nine"), (100, "100")],
)
def test_the_number_of_documents_is_spelled(number, word):
    assert number_word(number) == word
    assert f"generate {word} useful documents" in PROMPTS["sft"].write(False, number, **ASKED)


def test_without_tuning_question_and_answer_are_told_in_the_useful_form_only():
    useful, noisy = (PROMPTS["prompted"].write(is_noisy, 5, **ASKED) for is_noisy in (False, True))
    for told in ("who wrote Hamlet", "Shakespeare"):
        assert told in useful
        assert told not in noisy
    for prompt, quality, other in ((useful, "useful", "noisy"), (noisy, "noisy", "useful")):
        assert f"generate five {quality} documents" in prompt
        assert other not in prompt.lower()
        assert prompt.endswith(f"Query: author of Hamlet\n{quality.capitalize()} Output:\n")
        assert prompt.count("Output:\n") == 2
        assert [f"\nDoc {n}: " in prompt for n in range(1, 7)] == [True] * 5 + [False]


def test_the_demonstration_shows_as_many_documents_as_are_asked_for():
    for count in (1, 3, 5, 9):
        assert PROMPTS["prompted"].write(False, count, **ASKED).count("\nDoc ") == min(count, 5)


def test_documents_of_the_demonstration_have_about_thirty_words():
    lengths = [len(text.split()) for texts in PROMPTS["prompted"].examples for text in texts]
    assert len(lengths) == 10
    assert all(25 <= length <= 42 for length in lengths)


def test_a_template_of_ones_own():
    prompt = simulation_prompt("{Quality}/{quality} {count}: {query} ({question}: {answer})")
    assert prompt.write(True, 3, "q", "Q", "A") == "Noisy/noisy three: q (Q: A)"
    assert prompt.fields == {"Quality", "quality", "count", "query", "question", "answer"}
    assert simulation_prompt("{query}").fields == {"query"}


@pytest.mark.parametrize("prompt", ["SFT", "", "no field", "{query} {gold}", "{question}"])
def test_other_templates_are_refused(prompt):
    with pytest.raises(RetrieverError, match="prompt"):
        simulation_prompt(prompt)


@given(st.text(), st.text(), st.text())
def test_what_is_filled_in_is_filled_in_once(query, question, answer):
    """A question that has ``{answer}`` in it stays as it is."""
    query = f"{{answer}}{query}"[:MOST_QUERY_CHARACTERS]
    prompt = simulation_prompt("{query}|{question}|{answer}")
    assert prompt.write(False, 5, query, question, answer) == f"{query}|{question}|{answer}".encode("utf-8", "replace").decode()


def test_long_queries_are_cut_and_lone_surrogates_replaced():
    prompt = simulation_prompt("{query}")
    assert prompt.write(False, 5, "x" * 5_000, "", "") == "x" * MOST_QUERY_CHARACTERS
    assert prompt.write(False, 5, "a\ud800b", "", "") == "a?b"


def test_hashes_tell_prompts_apart():
    templates = [*PROMPTS, "{query}", "{query} "]
    assert len({simulation_prompt(prompt).sha256 for prompt in templates}) == len(templates)
    assert all(character in string.hexdigits for character in PROMPTS["sft"].sha256)
