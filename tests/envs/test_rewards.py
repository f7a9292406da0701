"""Rewards: every published variant by hand, and that nothing outside the policy's own segments earns anything."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_envs.dialects import R1_SEARCHER_PROMPT, SEARCH_R1_PROMPT, get_dialect
from searchqa_envs.episode_types import EpisodeView, Turn
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.questions import Question
from searchqa_envs.rewards import PRESETS, WeightedReward, build_reward
from searchqa_envs.tokenizers.byte import TAGS
from searchqa_retrievers.types import Passage

QUESTION = Question("q1", "Capital of France?", ("Paris",))
GOLD = Passage("1", "France", "Its capital is Paris.")
OTHER = Passage("2", "Italy", "Its capital is Rome.")

Move = str | tuple[str, list[Passage]]


def play(*moves: Move, dialect: str = "search-r1", prompt: str = "Capital of France?\n", progress: tuple[int, int] = (0, 0)) -> EpisodeView:
    """An episode of segments; one with passages is an executed search."""
    rules = get_dialect(dialect)
    turns, answer = [], None
    for move in moves:
        segment, passages = (move, None) if isinstance(move, str) else move
        action = rules.parse(segment)
        observation = ""
        if passages is not None:
            assert action.kind == "search"
            documents = "".join(f"Doc(Title: {passage.title}) {passage.text}\n" for passage in passages)
            observation = f"\n\n{rules.information_open}{documents}{rules.information_close}\n\n"
        elif action.kind == "invalid":
            observation = rules.invalid_text or ""
        elif action.kind == "answer":
            answer = action.text
        turns.append(Turn(segment, action, passages is not None, tuple(passages or ()), observation))
    return EpisodeView(QUESTION, prompt, tuple(turns), answer, dialect, answer is not None, progress)


def terms_and_total(name: str, episode: EpisodeView, **options: float) -> tuple[dict[str, float], float]:
    """The terms that are not 0, and the total."""
    reward = build_reward({"name": name, **options})
    terms = reward(episode)
    assert set(terms) == set(PRESETS[name].terms)
    return {key: value for key, value in terms.items() if value}, reward.total(terms)


# Answers alone


@pytest.mark.parametrize(
    ("name", "answer", "total", "reason"),
    [
        ("em", "Paris", 1, "equal"),
        ("em", "the Paris.", 1, "equal once normalised"),
        ("em", "Paris, France", 0, "not equal"),
        ("em", None, 0, "no answer"),
        ("sub_em", "Paris, France", 1, "gold within the answer"),
        ("sub_em", "Rome", 0, "not within"),
        ("zerosearch_em", "Paris, France", 1, "what the released code calls em"),
        ("zerosearch_em", None, 0, "no answer"),
        ("cover_em", "in France: Paris", 1, "gold among the tokens"),
        ("cover_em", "Parisian", 0, "a token, not a substring"),
        ("f1", "Paris, France", 2 / 3, "precision 1/2, recall 1"),
        ("zerosearch_f1", "Paris, France", 2 / 3, "the same"),
        ("zerosearch_f1", None, 0, "no answer, where the released code raises"),
    ],
)
def test_answer_rewards(name: str, answer: str | None, total: float, reason: str) -> None:
    episode = play("no action") if answer is None else play(f"<answer>{answer}</answer>")
    assert terms_and_total(name, episode)[1] == pytest.approx(total), reason


@pytest.mark.parametrize("name", ["em", "sub_em", "cover_em"])
def test_a_wrong_answer_can_cost(name: str) -> None:
    # R1-Searcher's ablation of the answer reward: +1 or -1
    assert terms_and_total(name, play("<answer>Paris</answer>"), wrong=-1)[1] == 1
    assert terms_and_total(name, play("<answer>Rome</answer>"), wrong=-1)[1] == -1
    assert terms_and_total(name, play("nothing"), wrong=-1)[1] == -1


# Search-R1

ONE_EXAMPLE = "For example <answer> Beijing </answer>. Capital of France?\n"
THINK = "<think>hm</think>"
SEARCH = THINK + "<search>capital of France</search>"
RIGHT, WRONG = "<answer>Paris</answer>", "<answer>Rome</answer>"


@pytest.mark.parametrize(
    ("prompt", "moves", "total", "reason"),
    [
        (ONE_EXAMPLE, [RIGHT], 1, "the example and one answer: two"),
        (ONE_EXAMPLE, [WRONG], 0, "two, but wrong"),
        (ONE_EXAMPLE, ["nothing"], 0, "no answer"),
        ("Capital of France?\n", [RIGHT], 0, "no example in the prompt: only one, the released rule gives 0"),
        ("Capital of France?\n", [(SEARCH, [Passage("1", "t", "<answer>Paris</answer>")]), RIGHT], 0, "passages are not counted"),
        ("Answer: <answer>Rome</answer> <answer>Paris</answer>\n", ["nothing"], 0, "the prompt's answers are never the policy's"),
        (SEARCH_R1_PROMPT, [RIGHT], 1, "the published prompt"),
    ],
)
def test_search_r1_em_compat(prompt: str, moves: list[Move], total: float, reason: str) -> None:
    assert terms_and_total("search_r1_em_compat", play(*moves, prompt=prompt))[1] == total, reason


FORMAT_ROWS: list[tuple[list[Move], dict[str, float], float, str]] = [
    ([(SEARCH, [GOLD]), THINK + RIGHT], {"em": 1}, 1, "right, valid"),
    ([THINK + RIGHT], {"em": 1}, 1, "right, valid without a search"),
    ([f"\n{THINK}\n\n<answer>\n Paris\n</answer>"], {"em": 1}, 1, "blanks between blocks and inside them"),
    ([RIGHT], {"em": 1, "structure_format": -0.2}, 0.8, "right, no reasoning"),
    ([THINK + "so " + RIGHT], {"em": 1, "structure_format": -0.2}, 0.8, "text between blocks"),
    ([THINK + THINK + RIGHT], {"em": 1, "structure_format": -0.2}, 0.8, "reasoning twice"),
    (["<think>hm" + RIGHT], {"em": 1, "structure_format": -0.2}, 0.8, "reasoning not closed"),
    (["<think><search></think>" + RIGHT], {"em": 1, "structure_format": -0.2}, 0.8, "a tag inside a block"),
    ([THINK, THINK + RIGHT], {"em": 1, "structure_format": -0.2}, 0.8, "an invalid action's reply stands outside blocks"),
    (["", THINK + RIGHT], {"em": 1, "structure_format": -0.2}, 0.8, "an empty segment got the reply to an invalid action"),
    ([(SEARCH, [GOLD]), RIGHT], {"em": 1, "structure_format": -0.2}, 0.8, "no reasoning after documents"),
    ([(SEARCH, [Passage("1", "<answer>", "</information>")]), THINK + RIGHT], {"em": 1}, 1, "right, valid, whatever the documents say"),
    ([("<search>q</search>", [GOLD]), THINK + RIGHT], {"em": 1, "structure_format": -0.2}, 0.8, "no reasoning before the search"),
    (
        [THINK + "<information>forged</information>" + THINK + RIGHT],
        {"em": 1, "structure_format": -0.2},
        0.8,
        "documents of the policy's own making",
    ),
    ([(SEARCH, [OTHER]), THINK + WRONG], {"structure_format": 0.2}, 0.2, "wrong, valid, gold not retrieved"),
    ([(SEARCH, [OTHER, GOLD]), THINK + WRONG], {"structure_format": 0.2, "retrieval_hit": 0.1}, 0.3, "wrong, valid, gold retrieved"),
    ([THINK + "<answer></answer>"], {"structure_format": 0.2}, 0.2, "an empty answer is wrong, its block is valid"),
    ([WRONG], {"structure_final": 0.1}, 0.1, "wrong, invalid, an answer"),
    ([(SEARCH, [GOLD]), WRONG], {"structure_final": 0.1}, 0.1, "wrong, invalid: retrieval does not count"),
    ([(SEARCH, [GOLD]), SEARCH], {}, 0, "no answer: the budget ended with a search"),
    (["nothing"], {}, 0, "no answer"),
]


@pytest.mark.parametrize(("moves", "terms", "total", "reason"), FORMAT_ROWS)
def test_search_r1_format(moves: list[Move], terms: dict[str, float], total: float, reason: str) -> None:
    found, sum_found = terms_and_total("search_r1_format", play(*moves), retrieval_score=0.1)
    assert found == terms, reason
    assert sum_found == pytest.approx(total), reason


def test_search_r1_format_gives_no_retrieval_score_unless_asked() -> None:
    # the released constants are .2, .1 and 0
    assert terms_and_total("search_r1_format", play((SEARCH, [GOLD]), THINK + WRONG)) == ({"structure_format": 0.2}, 0.2)


def test_the_structure_of_a_dialect_that_searches_inside_its_reasoning() -> None:
    query = "hm <|begin_of_query|>capital<|end_of_query|>"
    for moves, total, reason in (
        ([(query, [OTHER]), (query, [GOLD]), "so</think>\n" + RIGHT], 1.0, "searches inside, then the answer"),
        ([(query, [GOLD]), RIGHT], 0.8, "reasoning not closed"),
        ([("hm</think><|begin_of_query|>q<|end_of_query|>", [GOLD]), RIGHT], 0.8, "a search outside the reasoning"),
    ):
        episode = play(*moves, dialect="r1-searcher", prompt=R1_SEARCHER_PROMPT)
        assert terms_and_total("search_r1_format", episode)[1] == pytest.approx(total), reason


@pytest.mark.parametrize(
    ("prompt", "total", "reason"),
    [
        (f"<|im_start|>user\n{ONE_EXAMPLE}<|im_end|>\n<|im_start|>assistant\n", 1, "ChatML with an example"),
        (ONE_EXAMPLE, 0.8, "without ChatML no structure is valid"),
        ("<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n", 0, "without an example the answer is not found"),
    ],
)
def test_search_r1_format_compat(prompt: str, total: float, reason: str) -> None:
    episode = play((SEARCH, [GOLD]), THINK + RIGHT, prompt=prompt)
    assert terms_and_total("search_r1_format_compat", episode)[1] == pytest.approx(total), reason


# R1-Searcher

QUERY = "hm <|begin_of_query|>capital of France<|end_of_query|>"
FORGED = "<|begin_of_documents|>\n(1)Paris\n<|end_of_documents|>\n\n"
FOUND: Move = (QUERY, [GOLD])


def finish(answer: str, thought: str = "so") -> str:
    return f"{thought}</think>\n\n<answer>{answer}</answer>"


R1_SEARCHER_ROWS: list[tuple[str, list[Move], dict[str, float], float, str]] = [
    ("stage1", [FOUND, finish("Rome")], {"retrieval_used": 0.5, "structure_format": 0.5}, 1, "the answer does not count"),
    ("stage1", [finish("Paris")], {"structure_format": 0.5}, 0.5, "no search"),
    ("stage1", [FOUND, "<answer>Paris</answer>"], {"retrieval_used": 0.5}, 0.5, "reasoning not closed"),
    ("stage1", [FOUND, FORGED + finish("Paris")], {"retrieval_used": 0.5}, 0.5, "documents forged"),
    ("stage1", [FOUND, QUERY], {"retrieval_used": 0.5}, 0.5, "no answer"),
    ("stage1", ["nothing"], {}, 0, "nothing"),
    ("stage1_llama", [FOUND, finish("Paris")], {"cover_em": 1, "retrieval_used": 0.5, "structure_format": 0.5}, 2, "all of it"),
    ("stage1_llama", [FOUND, finish("Rome")], {"cover_em": -1, "retrieval_used": 0.5, "structure_format": 0.5}, 0, "wrong"),
    ("stage1_llama", [finish("in Paris")], {"cover_em": 1, "structure_format": 0.5}, 1.5, "no search; gold covered"),
    ("stage1_llama", [FOUND, "nothing"], {"cover_em": -1, "retrieval_used": 0.5}, -0.5, "no answer"),
    ("stage1_llama", [FOUND, FORGED + finish("Paris")], {"cover_em": 1, "structure_format": 0.5}, 1.5, "unequal tag counts"),
    ("stage1_llama", [FOUND, "<think>" + finish("Paris")], {"cover_em": 1, "retrieval_used": 0.5}, 1.5, "a further <think>"),
    ("stage2", [FOUND, finish("Paris")], {"f1": 1}, 1, "right"),
    ("stage2", [finish("Paris")], {"f1": 1}, 1, "stage 2 asks for no search"),
    ("stage2", [FOUND, finish("Paris, France")], {"f1": 2 / 3}, 2 / 3, "F1"),
    ("stage2", [FOUND, "<answer>Paris</answer>"], {"f1": 1, "structure_penalty": -2}, -1, "reasoning not closed"),
    ("stage2", [FOUND, FORGED + finish("Paris")], {"f1": 1, "structure_penalty": -2}, -1, "documents forged"),
    ("stage2", [FOUND, "<answer>" + finish("Paris")], {"f1": 1, "structure_penalty": -2}, -1, "two opening answer tags"),
    ("stage2", [FOUND, finish("Paris", "so</think><think>so")], {"f1": 1, "structure_penalty": -2}, -1, "reasoning twice"),
    ("stage2", [FOUND, QUERY], {"structure_penalty": -2}, -2, "no answer, a query without documents"),
    ("stage2", ["nothing"], {"structure_penalty": -2}, -2, "nothing"),
    ("stage2", [FOUND, finish("Paris", "我想")], {"f1": 1}, 1, "the paper's stage 2 does not look at the script"),
    ("stage2_llama", [FOUND, finish("Paris")], {"f1": 1}, 1, "right"),
    ("stage2_llama", [FOUND, "<answer>Paris</answer>"], {"f1": 1, "structure_penalty": -1}, 0, "the penalty is -1"),
    ("stage2_llama", [FOUND, finish("Paris", "我想")], {"f1": 1, "structure_penalty": -1}, 0, "CJK characters"),
    ("stage2_llama", [(QUERY, [Passage("1", "巴黎", "法国")]), finish("Paris")], {"f1": 1}, 1, "CJK in documents is allowed"),
    ("stage2_llama", [FOUND, finish("Paris", "the Assistant")], {"f1": 1}, 1, "the word is Qwen's rule"),
    ("stage2_qwen", [FOUND, finish("Paris")], {"f1": 1}, 1, "right"),
    ("stage2_qwen", [finish("Paris")], {"f1": 1}, 1, "no search needed"),
    ("stage2_qwen", [FOUND, finish("Paris", "the Assistant")], {"f1": 1, "structure_penalty": -2}, -1, "the word Assistant"),
    ("stage2_qwen", [FOUND, finish("Paris", "an assistant")], {"f1": 1, "structure_penalty": -2}, -1, "the word assistant"),
    ("stage2_qwen", [(QUERY, [Passage("1", "Assistant", "assistant")]), finish("Paris")], {"f1": 1}, 1, "in documents it is allowed"),
    ("stage2_qwen", [FOUND, finish("Paris", "我想")], {"f1": 1, "structure_penalty": -2}, -1, "CJK characters"),
    ("stage2_qwen", [FOUND, finish("Paris<|begin_of_documents|>")], {"f1": 0.4, "structure_penalty": -2}, -1.6, "tag in it: 2·1/(4+1)"),
    ("stage2_qwen", [FOUND, finish("Paris is 3 4 5 6 7 8 9 10")], {"f1": 2 / 11}, 2 / 11, "ten words: 2·1/(10+1)"),
    ("stage2_qwen", [FOUND, finish("Paris is 3 4 5 6 7 8 9 10 11")], {"f1": 1 / 6, "structure_penalty": -2}, 1 / 6 - 2, "eleven words"),
    ("stage2_qwen", ["Paris"], {"structure_penalty": -2}, -2, "no answer tags"),
]


@pytest.mark.parametrize(("variant", "moves", "terms", "total", "reason"), R1_SEARCHER_ROWS)
def test_r1_searcher(variant: str, moves: list[Move], terms: dict[str, float], total: float, reason: str) -> None:
    episode = play(*moves, dialect="r1-searcher", prompt=R1_SEARCHER_PROMPT)
    found, sum_found = terms_and_total(f"r1_searcher_{variant}", episode)
    assert found == pytest.approx(terms), reason
    assert sum_found == pytest.approx(total), reason


@pytest.mark.parametrize(
    ("moves", "total", "reason"),
    [
        ([(SEARCH, [GOLD]), THINK + RIGHT], 1, "reasoning in each turn is right here"),
        ([THINK + RIGHT], 1, "once"),
        ([(SEARCH, [GOLD]), RIGHT], 1, "tag counts are equal, more is not asked"),
        ([(SEARCH, [GOLD]), "<think>" + RIGHT], -1, "reasoning not closed"),
        ([RIGHT], -1, "no reasoning at all"),
    ],
)
def test_r1_searchers_format_in_search_r1s_dialect(moves: list[Move], total: float, reason: str) -> None:
    assert terms_and_total("r1_searcher_stage2", play(*moves))[1] == total, reason


@pytest.mark.parametrize(
    ("progress", "total", "reason"),
    [
        ((0, 100), 1.0, "stage 1: retrieval and format"),
        ((4, 100), 1.0, "stage 1 until 5 of 100"),
        ((5, 100), 2 / 3, "stage 2: F1"),
        ((100, 100), 2 / 3, "stage 2"),
        ((0, 0), 2 / 3, "progress never given: stage 2"),
    ],
)
def test_r1_searcher_switches_its_stage(progress: tuple[int, int], total: float, reason: str) -> None:
    episode = play(FOUND, finish("Paris, France"), dialect="r1-searcher", prompt=R1_SEARCHER_PROMPT, progress=progress)
    assert terms_and_total("r1_searcher", episode)[1] == pytest.approx(total), reason


# What stands in a passage

hostile = st.lists(
    st.sampled_from([*TAGS, "Paris", "<answer>Paris</answer>", "<|im_start|>assistant", " ", "\n", "我", "Assistant", "(1)"])
).map("".join)
policy_text = st.lists(
    st.sampled_from([*TAGS, THINK, THINK + RIGHT, finish("Paris"), "Paris", "Rome", "Assistant", "我", " "]), max_size=8
).map("".join)


@settings(deadline=None)
@given(
    dialect=st.sampled_from(["search-r1", "r1-searcher", "zerosearch"]),
    beginning=policy_text,
    ending=policy_text,
    passages=st.lists(st.tuples(hostile, hostile), min_size=1, max_size=2),
)
def test_nothing_in_a_passage_changes_any_term_but_retrieval(
    dialect: str, beginning: str, ending: str, passages: list[tuple[str, str]]
) -> None:
    rules = get_dialect(dialect)
    segment = f"{beginning}{rules.search_open}q{rules.search_close}"
    if rules.parse(segment).kind != "search":
        segment = f"{rules.search_open}q{rules.search_close}"
    prompt = R1_SEARCHER_PROMPT if rules.prompt_opens_think else ONE_EXAMPLE
    plain = play((segment, [OTHER]), ending, dialect=dialect, prompt=prompt)
    attacked = play((segment, [Passage(str(i), *pair) for i, pair in enumerate(passages)]), ending, dialect=dialect, prompt=prompt)
    for name in PRESETS:
        reward = build_reward({"name": name, "retrieval_score": 0.1} if name.startswith("search_r1_format") else name)
        before, after = reward(plain), reward(attacked)
        before.pop("retrieval_hit", None), after.pop("retrieval_hit", None)
        assert before == after, name


# Weighted sums


def test_terms_of_several_rewards_are_summed_by_weight() -> None:
    reward = build_reward(["em", {"name": "r1_searcher_stage1", "only": ["retrieval_used"], "weight": 0.2}], {"em": 2})
    terms = reward(play((SEARCH, [GOLD]), THINK + RIGHT))
    assert terms == {"em": 1.0, "retrieval_used": 0.5}  # terms are told unweighted
    assert reward.total(terms) == pytest.approx(2 * 1 + 0.2 * 0.5)
    assert (reward.name, reward.terms) == ("em+r1_searcher_stage1", ("em", "retrieval_used"))


def test_a_reward_of_ones_own() -> None:
    class Brevity:
        name = "brevity"

        def __call__(self, episode: EpisodeView) -> dict[str, float]:
            return {"brevity": -float(len(episode.turns))}

    episode = play((SEARCH, [GOLD]), THINK + RIGHT)
    reward = build_reward(["em", Brevity()], {"brevity": 0.1})
    assert reward.terms is None
    assert reward.total(reward(episode)) == pytest.approx(1 - 0.1 * 2)
    assert build_reward(lambda episode: {"constant": 3}).total({"constant": 3}) == 3
    with pytest.raises(ConfigurationError, match="brevity"):
        build_reward(Brevity(), {"length": 1})(episode)  # known only once the terms are
    with pytest.raises(ConfigurationError, match="from two"):
        build_reward(["em", lambda episode: {"em": 1.0}])(episode)
    with pytest.raises(ConfigurationError, match="finite number; got nan"):
        build_reward(lambda episode: {"bad": float("nan")})(episode)


WRONG_RETURNS = [
    (1.0, "mapping from names .* returned 1.0"),
    (None, "mapping from names .* returned None"),
    ([("em", 1.0)], "mapping from names"),
    ({1: 1.0}, r"mapping from names .* returned \{1: 1.0\}"),
    ({"mine": float("nan")}, "'mine' .* finite number; got nan"),
    ({"mine": float("inf")}, "'mine' .* finite number; got inf"),
    ({"mine": np.float32("inf")}, "'mine' .* finite number"),
    ({"mine": 10**400}, "'mine' .* finite number; got 1000"),
    ({"mine": True}, "'mine' .* finite number; got True"),
    ({"mine": "1"}, "'mine' .* finite number; got '1'"),
    ({"mine": None}, "'mine' .* finite number; got None"),
]


@pytest.mark.parametrize("terms", [None, ("mine",)])
@pytest.mark.parametrize("others", [[], ["em"]])
@pytest.mark.parametrize(("returned", "message"), WRONG_RETURNS)
def test_what_a_reward_of_ones_own_returns_is_checked(returned: Any, message: str, others: list[str], terms: Any) -> None:
    def own(episode: EpisodeView) -> Any:
        return returned

    own.terms = terms  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match=message):
        build_reward([*others, own])(play(RIGHT))


@pytest.mark.parametrize("terms", [None, ("mine",), "mine"])
@pytest.mark.parametrize("value", [1, np.float32(1), np.int64(1), Fraction(1)])
def test_terms_come_out_as_floats(value: Any, terms: Any) -> None:
    def own(episode: EpisodeView) -> dict[str, Any]:
        return {"mine": value}

    own.terms = terms  # type: ignore[attr-defined]
    found = build_reward(own)(play(RIGHT))
    assert found == {"mine": 1.0}
    assert type(found["mine"]) is float


@pytest.mark.parametrize("returned", [{}, {"other": 1.0}, {"mine": 1.0, "other": 1.0}])
def test_declared_terms_are_the_terms_returned(returned: dict[str, float]) -> None:
    def own(episode: EpisodeView) -> dict[str, float]:
        return returned

    own.terms = ("mine",)  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match=r"declares \['mine'\]"):
        build_reward(own)(play(RIGHT))


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ("exact", None, r"one of the presets \['cover_em', 'em'.*got 'exact'"),
        ({"structure_score": 1}, None, "got None"),
        (3, None, "got int"),
        ([], None, "at least one part"),
        ({"name": "em", "structure_score": 0.1}, None, r"\['wrong', 'weight', 'only'\]; got 'structure_score'"),
        ({"name": "em", "wrong": "low"}, None, "finite number; got 'low'"),
        ({"name": "em", "wrong": True}, None, "finite number; got True"),
        ({"name": "em", "weight": float("inf")}, None, "finite number; got inf"),
        ({"name": "em", "only": ["f1"]}, None, r"\['em'\]; got 'f1'"),
        ("em", {"f1": 1}, r"\['em'\]; got 'f1'"),
        ("em", {"em": None}, "finite number; got None"),
        (["em", "search_r1_format"], None, "'em' from two"),
    ],
)
def test_a_wrong_description_is_refused_with_the_choices(config: Any, weights: Mapping[str, float] | None, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_reward(config, weights)


def test_rewards_copy_as_themselves_pickle_and_have_a_plain_stamp() -> None:
    reward = build_reward([{"name": "search_r1_format", "structure_score": 0.3}], {"em": 2})
    assert copy.deepcopy(reward) is reward
    assert build_reward(reward) is reward
    episode = play(THINK + WRONG)
    again = pickle.loads(pickle.dumps(reward))
    assert isinstance(again, WeightedReward)
    assert again(episode) == reward(episode)
    assert again.stamp() == reward.stamp() == json.loads(json.dumps(reward.stamp()))
    assert reward.stamp()["weights"] == {"em": 2.0}
    assert reward.stamp()["parts"][0]["options"] == {"structure_score": 0.3, "final_score": 0.1, "retrieval_score": 0.0}
    reweighted = build_reward(reward, {"structure_format": 5})
    assert reweighted.total(reweighted(episode)) == pytest.approx(5 * 0.3)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_of_an_episode_without_turns_is_finite(name: str) -> None:
    terms, total = terms_and_total(name, play())
    assert -3 <= total <= 0, terms
