"""The three systems' normal forms, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_envs.normalise import normalise_r1_searcher, normalise_squad


@pytest.mark.parametrize(
    ("text", "squad", "r1_searcher", "reason"),
    [
        ("", "", "", "nothing stays nothing"),
        ("  Paris \n", "paris", "paris", "lower case, blanks collapsed"),
        ("U.S.", "us", "u s", "punctuation deleted, or made a blank"),
        ("Paris, France", "paris france", "paris france", "a blank beside punctuation is enough for both"),
        ("twenty-one", "twentyone", "twenty one", "deleting joins words"),
        ("O'Brien", "obrien", "o brien", "ASCII quote"),
        ("O’Brien", "o’brien", "o brien", "typographic quote: only R1-Searcher knows it"),
        ("snake_case", "snakecase", "snake case", "underscore is ASCII punctuation"),
        ("The Beatles", "beatles", "beatles", "article"),
        ("a", "", "", "a text of articles is nothing"),
        ("Theatre an anthem", "theatre anthem", "theatre anthem", "articles as whole words only"),
        ("A.", "", "", "punctuation goes before the articles"),
        ("A.B.", "ab", "b", "the article appears where punctuation makes a blank"),
        ("True", "true", "yes", "R1-Searcher maps exactly True and False"),
        ("False", "false", "no", "the same"),
        ("true", "true", "true", "the same: not in lower case"),
        ("True.", "true", "true", "the same: not with a point"),
        ("Đà Nẵng", "đà nẵng", "đà nẵng", "accents stay"),
        ("東京、日本", "東京、日本", "東京、日本", "other scripts' punctuation stays"),
        ("1,024.5", "10245", "1 024 5", "numbers lose their marks"),
    ],
)
def test_normal_forms(text: str, squad: str, r1_searcher: str, reason: str) -> None:
    assert normalise_squad(text) == squad, reason
    assert normalise_r1_searcher(text) == r1_searcher, reason


@given(st.text())
def test_normal_forms_have_single_blanks_inside_only(text: str) -> None:
    for normal in (normalise_squad(text), normalise_r1_searcher(text)):
        assert normal == " ".join(normal.split())
        assert not {"a", "an", "the"} & set(normal.split())
