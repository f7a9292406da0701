"""Scores in the style of each published system: by hand, against a second implementation, and on real golden answers."""

from __future__ import annotations

import collections
import gzip
import itertools
import json
import os
import re
import string
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from searchqa_envs import metrics
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.scoring import HEADLINE, MEASURES, PUBLISHED_AS, STYLES, is_unanswered, score

# Each line: answer, golden answers, and (em, f1, cover_em, sub_em) under SQuAD's normal form (search-r1, zerosearch) and under R1-Searcher's.
CASES = [
    ("Paris", ["Paris"], (1, 1, 1, 1), (1, 1, 1, 1), "equal"),
    (" the PARIS. ", ["Paris"], (1, 1, 1, 1), (1, 1, 1, 1), "blanks, article, case and point do not count"),
    # Two tokens said, one wanted, one in common: 2*1/(2+1)
    ("Paris, France", ["Paris"], (0, 2 / 3, 1, 1), (0, 2 / 3, 1, 1), "the golden answer and more"),
    (
        "Paris",
        ["Paris, France"],
        (0, 2 / 3, 0, 0),
        (0, 2 / 3, 0, 0),
        "less than the golden answer: cover looks for golden tokens, not for the answer's",
    ),
    ("France Paris", ["Paris, France"], (0, 1, 1, 0), (0, 1, 1, 0), "order does not matter to tokens"),
    # b c b said, b b c wanted: all three in common
    ("b c b", ["b b c"], (0, 1, 1, 0), (0, 1, 1, 0), "bags: the same tokens as often"),
    # b said, b b wanted: 2*1/(1+2); cover does not count how often
    ("b", ["b b"], (0, 2 / 3, 1, 0), (0, 2 / 3, 1, 0), "cover is of sets, F1 of bags"),
    ("parish", ["Paris"], (0, 0, 0, 1), (0, 0, 0, 1), "a substring of characters, not a token"),
    ("Rome", ["Paris"], (0, 0, 0, 0), (0, 0, 0, 0), "nothing in common"),
    # Several golden answers: each measure takes its own best. Against x: 2*1/(3+1); against w x y z: 2*3/(3+4)
    ("x y z", ["x", "w x y z"], (0, 6 / 7, 1, 1), (0, 6 / 7, 1, 1), "the best golden answer may differ between measures"),
    ("Roma", ["Rome", "Roma"], (1, 1, 1, 1), (1, 1, 1, 1), "any golden answer"),
    # Punctuation is deleted (SQuAD) or becomes a blank (R1-Searcher)
    ("US", ["U.S."], (1, 1, 1, 1), (0, 0, 0, 0), "us, and u s"),
    ("U S", ["U.S."], (0, 0, 0, 0), (1, 1, 1, 1), "u s against us, and u s"),
    ("twenty one", ["twenty-one"], (0, 0, 0, 0), (1, 1, 1, 1), "a hyphen is deleted, or a blank"),
    # R1-Searcher: 1 000 against 1000
    ("1,000", ["1000"], (1, 1, 1, 1), (0, 0, 0, 0), "a comma in a number"),
    ("snake case", ["snake_case"], (0, 0, 0, 0), (1, 1, 1, 1), "an underscore"),
    ("OBrien", ["O'Brien"], (1, 1, 1, 1), (0, 0, 0, 0), "an ASCII quote"),
    ("O'Brien", ["O’Brien"], (0, 0, 0, 0), (1, 1, 1, 1), "curly quotes are punctuation to R1-Searcher alone"),
    ("O´Brien", ["O‘Brien"], (0, 0, 0, 0), (1, 1, 1, 1), "and so are an accent and the other curly quote"),
    # “lisbon” keeps its double quotes under both; it is one token, and holds lisbon
    ("“Lisbon”", ["Lisbon"], (0, 0, 0, 1), (0, 0, 0, 1), "curly double quotes are kept by both"),
    ("東京。", ["東京"], (0, 0, 0, 1), (0, 0, 0, 1), "and so is the punctuation of other scripts"),
    ("ÉCOLE", ["école"], (1, 1, 1, 1), (1, 1, 1, 1), "any script has its lower case"),
    ("ecole", ["école"], (0, 0, 0, 0), (0, 0, 0, 0), "accents are kept"),
    ("New\u00a0York\u2003City", ["New York City"], (1, 1, 1, 1), (1, 1, 1, 1), "any kind of blank"),
    # Articles go as whole words: theatre stays. SQuAD: aclass, R1-Searcher: class, since the hyphen makes a word of A
    ("The Theatre", ["theatre"], (1, 1, 1, 1), (1, 1, 1, 1), "articles go, words that begin with one stay"),
    ("A-class", ["class"], (0, 0, 0, 1), (1, 1, 1, 1), "an article that punctuation sets free"),
    # yes, no and noanswer. SQuAD: 2*1/(1+3)
    ("yes", ["Yes."], (1, 1, 1, 1), (1, 1, 1, 1), "yes is yes"),
    ("yes it is", ["yes"], (0, 1 / 2, 1, 1), (0, 0, 1, 1), "R1-Searcher's F1: yes or nothing; its cover match does not mind"),
    ("yes", ["yes it is"], (0, 1 / 2, 0, 0), (0, 0, 0, 0), "the same with yes as the answer"),
    ("No, he was not", ["no"], (0, 2 / 5, 1, 1), (0, 0, 1, 1), "no among four tokens: 2*1/(4+1), or nothing"),
    ("noanswer", ["noanswer given"], (0, 2 / 3, 0, 0), (0, 0, 0, 0), "noanswer is closed as well"),
    ("yes and no", ["yes"], (0, 1 / 2, 1, 1), (0, 0, 1, 1), "both words"),
    ("yes", ["no", "yes"], (1, 1, 1, 1), (1, 1, 1, 1), "a golden answer that is closed does not hurt another"),
    ("Norway", ["no"], (0, 0, 0, 1), (0, 0, 0, 1), "no in Norway"),
    # True and False, exactly so
    ("True", ["yes"], (0, 0, 0, 0), (1, 1, 1, 1), "True means yes to R1-Searcher"),
    ("no", ["False"], (0, 0, 0, 0), (1, 1, 1, 1), "and False no, as a golden answer too"),
    ("True", ["True"], (1, 1, 1, 1), (1, 1, 1, 1), "either way equal"),
    ("true", ["yes"], (0, 0, 0, 0), (0, 0, 0, 0), "not in lower case"),
    (" True", ["yes"], (0, 0, 0, 0), (0, 0, 0, 0), "not with a blank: the answer is not stripped before"),
    ("true", ["True"], (1, 1, 1, 1), (0, 0, 0, 0), "so that true and True are not equal to R1-Searcher"),
    # Nothing, or what normalises to nothing
    (None, ["Paris"], (0, 0, 0, 0), (0, 0, 0, 0), "no answer"),
    ("", ["Paris"], (0, 0, 0, 0), (0, 0, 0, 0), "an empty answer"),
    (" \n", ["Paris", "The"], (0, 0, 0, 0), (0, 0, 0, 0), "a blank one; ours: whatever the golden answers"),
    ("", ["!!!"], (0, 0, 0, 0), (0, 0, 0, 0), "the same"),
    ("the", ["Paris"], (0, 0, 0, 0), (0, 0, 0, 0), "an answer that normalises to nothing"),
    ("?", ["!!!"], (1, 0, 1, 1), (1, 0, 1, 1), "two of that kind are equal, without a token in common"),
    ("Paris", ["!!!"], (0, 0, 0, 1), (0, 0, 0, 1), "as released, nothing is a substring of everything"),
    ("Paris", ["!!!", "Paris"], (1, 1, 1, 1), (1, 1, 1, 1), "and does not spoil the other golden answers"),
    # i, don, t, know under R1-Searcher; i, dont, know under SQuAD
    ("I don't know.", ["Paris"], (0, 0, 0, 0), (0, 0, 0, 0), "what R1-Searcher writes where there is no answer"),
    ("I don't know.", ["I know"], (0, 4 / 5, 1, 0), (0, 2 / 3, 1, 0), "an answer like others: 2*2/(3+2), 2*2/(4+2)"),
]


@pytest.mark.parametrize(("prediction", "golden", "squad", "r1_searcher", "reason"), CASES)
def test_scores_by_hand(
    prediction: str | None, golden: list[str], squad: tuple[float, ...], r1_searcher: tuple[float, ...], reason: str
) -> None:
    for style, expected in zip(("search-r1", "zerosearch", "r1-searcher"), (squad, squad, r1_searcher), strict=True):
        assert score(prediction, golden, style) == pytest.approx(dict(zip(("em", "f1", "cover_em", "sub_em"), expected, strict=True))), (
            style,
            reason,
        )


def test_a_golden_answer_may_be_a_string() -> None:
    for style in STYLES:
        assert score("Paris", "Paris", style) == score("Paris", ["Paris"], style)
        assert score("P", "Paris", style)["em"] == 0  # not one golden answer per character


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"search-r1, r1-searcher, zerosearch; got 'squad'"):
        score("Paris", ["Paris"], "squad")
    with pytest.raises(ConfigurationError, match="at least one golden answer"):
        score("Paris", [], "search-r1")


def test_every_style_says_what_its_tables_show() -> None:
    assert HEADLINE == {"search-r1": "em", "r1-searcher": "cover_em", "zerosearch": "sub_em"}
    assert set(PUBLISHED_AS) == set(HEADLINE) == set(STYLES)
    assert set(HEADLINE.values()) <= set(MEASURES)


# -- a second implementation, in the way of SQuAD's evaluation script ----------------------------------------------------------------------


def squad_form(text: str) -> list[str]:
    words = "".join(character for character in text.lower() if character not in string.punctuation)
    return [word for word in re.sub(r"\b(a|an|the)\b", " ", words).split() if word]


def r1_searcher_form(text: str) -> list[str]:
    if text in ("True", "False"):
        return ["yes" if text == "True" else "no"]
    marks = set(string.punctuation) | {"\u2018", "\u2019", "\u00b4", "\u0060"}
    words = "".join(" " if character in marks else character for character in text.replace("_", " ").lower())
    return [word for word in re.sub(r"\b(a|an|the)\b", " ", words).split() if word]


def second_opinion(prediction: str, golden: list[str], style: str) -> dict[str, float]:
    form = r1_searcher_form if style == "r1-searcher" else squad_form
    said = form(prediction)
    best = dict.fromkeys(("em", "f1", "cover_em", "sub_em"), 0.0)
    if not prediction.strip():
        return best
    for gold in golden:
        wanted = form(gold)
        common = sum(min(said.count(word), wanted.count(word)) for word in set(said))
        f1 = 0.0
        if common:
            precision, recall = common / len(said), common / len(wanted)
            f1 = 2 * precision * recall / (precision + recall)
        closed = {"yes", "no", "noanswer"} & {" ".join(said), " ".join(wanted)}
        if style == "r1-searcher" and closed and said != wanted:
            f1 = 0.0
        found = {
            "em": said == wanted,
            "f1": f1,
            "cover_em": all(word in said for word in wanted) if wanted else not said,
            "sub_em": " ".join(said).find(" ".join(wanted)) >= 0,
        }
        best = {name: max(best[name], float(value)) for name, value in found.items()}
    return best


PIECES = [
    "yes",
    "no",
    "noanswer",
    "True",
    "False",
    "the",
    "A",
    "an",
    "b",
    "B",
    "paris",
    "Paris",
    "1",
    "é",
    "É",
    "東",
    "İ",
    "ẞ",
    "'",
    "’",
    "_",
    "-",
    ".",
    " ",
    "\t",
]
TEXTS = st.one_of(
    st.text(max_size=12),
    st.lists(st.sampled_from(PIECES), max_size=7).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=5).map(" ".join),
)
GOLDEN = st.lists(TEXTS, min_size=1, max_size=3)


@given(TEXTS, GOLDEN, st.sampled_from(STYLES))
@example("yes", ["yes", "yes it is"], "r1-searcher")
@example("?", ["!"], "zerosearch")
def test_a_second_implementation_agrees(prediction: str, golden: list[str], style: str) -> None:
    assert score(prediction, golden, style) == pytest.approx(second_opinion(prediction, golden, style), abs=1e-12)


@given(TEXTS, GOLDEN, st.sampled_from(STYLES))
def test_measures_are_bounded_and_an_exact_match_is_every_looser_one(prediction: str, golden: list[str], style: str) -> None:
    scores = score(prediction, golden, style)
    assert all(0 <= value <= 1 and type(value) is float for value in scores.values())
    assert scores["em"] <= min(scores["sub_em"], scores["cover_em"])
    if any(second_opinion(prediction, [gold], style)["em"] and squad_form(gold) and r1_searcher_form(gold) for gold in golden):
        assert scores["f1"] == 1


@given(TEXTS, GOLDEN, st.sampled_from(STYLES), st.randoms(use_true_random=False))
def test_neither_order_nor_repetition_of_golden_answers_counts(prediction: str, golden: list[str], style: str, random) -> None:
    mixed = [*golden, random.choice(golden)]
    random.shuffle(mixed)
    assert score(prediction, mixed, style) == score(prediction, golden, style)


@given(TEXTS, GOLDEN, TEXTS, st.sampled_from(STYLES))
def test_another_golden_answer_never_lowers_a_score(prediction: str, golden: list[str], more: str, style: str) -> None:
    before, after = score(prediction, golden, style), score(prediction, [*golden, more], style)
    assert all(after[name] >= before[name] for name in MEASURES)


@given(TEXTS, GOLDEN)
def test_styles_agree_with_the_metrics_of_episodes_wherever_a_golden_answer_is_something(prediction: str, golden: list[str]) -> None:
    golden = [gold for gold in golden if squad_form(gold) and r1_searcher_form(gold)]
    if golden:
        squad = [metric(prediction, golden) for metric in (metrics.em, metrics.f1, metrics.cover_em_squad, metrics.sub_em)]
        assert list(score(prediction, golden, "search-r1").values()) == list(score(prediction, golden, "zerosearch").values()) == squad
        other = (metrics.em_r1_searcher, metrics.f1_r1_searcher, metrics.cover_em, metrics.sub_em_r1_searcher)
        assert list(score(prediction, golden, "r1-searcher").values()) == [metric(prediction, golden) for metric in other]


@given(st.one_of(st.none(), TEXTS))
def test_unanswered_is_nothing_or_blank(prediction: str | None) -> None:
    assert is_unanswered(prediction) == (prediction is None or prediction.isspace() or prediction == "")


@pytest.mark.data
@pytest.mark.parametrize("style", STYLES)
def test_on_real_golden_answers(style: str) -> None:
    """Each question is answered by its own golden answers, by those of the next question, by both, and by the question itself."""
    counted: collections.Counter[str] = collections.Counter()
    for file in sorted(Path(os.environ["SEARCHQA_DATA"]).glob("*/questions.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        for row, following in itertools.pairwise(rows):
            golden = row["golden_answers"]
            for gold in golden[:5]:
                scores = score(gold, golden, style)
                assert scores["em"] == scores["cover_em"] == scores["sub_em"] == 1, (file.parent.name, row["id"])
                assert scores["f1"] == 1, (file.parent.name, row["id"])
            for answer in (following["golden_answers"][0], f"{golden[0]} ({following['golden_answers'][0]})", row["question"]):
                scores = score(answer, golden, style)
                assert scores == pytest.approx(second_opinion(answer, golden, style), abs=1e-12), (file.parent.name, row["id"])
                counted["pairs"] += 1
                counted["partly"] += 0 < scores["f1"] < 1
    assert counted["pairs"] > 3_000
    assert counted["partly"] > 1_000
