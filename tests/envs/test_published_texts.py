"""The published texts, whole and letter by letter: a changed word in the middle of a prompt would make results incomparable.

Sources: the released code of Search-R1 at a14dc3a, R1-Searcher at 631167c, ZeroSearch at 2d4cdca.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest

import searchqa_envs
from searchqa_envs.dialects import Dialect, get_dialect
from searchqa_retrievers import from_function

assert searchqa_envs.ENV_IDS

SEARCH_R1 = """\
Answer the given question. \
You must conduct reasoning inside <think> and </think> first every time you get new information. \
After reasoning, if you find you lack some knowledge, \
you can call a search engine by <search> query </search> \
and it will return the top searched results between <information> and </information>. \
You can search as many times as your want. \
If you find no further external knowledge needed, \
you can directly provide the answer inside <answer> and </answer>, without detailed illustrations. \
For example, <answer> Beijing </answer>. \
Question: Who wrote Hamlet?
"""
NO_SEARCH = """\
Answer the given question. \
You should first have a reasoning process in mind and then provides the answer. \
Show your reasoning in <think> </think> tags \
and return the final answer in <answer> </answer> tags, for example <answer> Beijing </answer>. \
Question: Who wrote Hamlet?
"""
R1_SEARCHER = """\
The User asks a question, and the Assistant solves it.
The Assistant first thinks about the reasoning process in the mind and then provides the User with the final answer.
The output format of reasoning process and final answer are enclosed within <think> </think> and <answer> </answer> tags, \
respectively, i.e., "<think> reasoning process here </think>

<answer> final answer here </answer>".
During the thinking process, **the Assistant can perform searching** for uncertain knowledge if necessary \
with the format of "<|begin_of_query|> search query (only list keywords, such as **"keyword_1 keyword_2 ..."**)<|end_of_query|>". \
**A query must involve only a single triple**.
Then, the search system will provide the Assistant with the retrieval information \
with the format of "<|begin_of_documents|> ...search results... <|end_of_documents|>".

User:Who wrote Hamlet?
Assistant: <think>"""


@pytest.mark.parametrize(
    ("dialect", "prompt", "expected"),
    [
        ("search-r1", "published", SEARCH_R1),
        ("search-r1", "no_search", NO_SEARCH),
        ("zerosearch", "published", SEARCH_R1),
        ("zerosearch", "no_search", NO_SEARCH),
        ("r1-searcher", "published", R1_SEARCHER),
    ],
)
def test_prompts(dialect: str, prompt: str, expected: str) -> None:
    assert get_dialect(dialect).render_question(prompt, "Who wrote Hamlet?") == expected


INVALID = """
My previous action is invalid. \
If I want to search, I should put the query between <search> and </search>. \
If I want to give the final answer, I should put the answer between <answer> and </answer>. \
Let me try again.
"""


def test_the_reply_to_an_invalid_action() -> None:
    assert {name: get_dialect(name).invalid_text for name in REPLIES} == {
        "search-r1": INVALID,
        "zerosearch": INVALID,
        "r1-searcher": None,  # the episode ends instead
    }


def tags(dialect: Dialect) -> list[str]:
    return [
        *(dialect.think_open, dialect.think_close, dialect.search_open, dialect.search_close),
        *(dialect.information_open, dialect.information_close, dialect.answer_open, dialect.answer_close),
    ]


def test_tags() -> None:
    plain = ["<think>", "</think>", "<search>", "</search>", "<information>", "</information>", "<answer>", "</answer>"]
    assert tags(get_dialect("search-r1")) == tags(get_dialect("zerosearch")) == plain
    assert tags(get_dialect("r1-searcher")) == (
        [
            "<think>",
            "</think>",
            "<|begin_of_query|>",
            "<|end_of_query|>",
            "<|begin_of_documents|>",
            "<|end_of_documents|>",
            "<answer>",
            "</answer>",
        ]
    )


REPLIES = {
    "search-r1": """

<information>Doc 1(Title: "Hamlet") Hamlet is a play by Shakespeare.
Doc 2(Title: "Denmark") Its prince is Hamlet.</information>

""",
    "zerosearch": """

<information>Doc 1: Hamlet Hamlet is a play by Shakespeare.
Doc 2: Denmark Its prince is Hamlet.</information>

""",
    "r1-searcher": """

<|begin_of_documents|>
(1)Hamlet Hamlet is a play by Shakespeare.
(2)Denmark Its prince is Hamlet.
<|end_of_documents|>

""",
}


@pytest.mark.parametrize("dialect", sorted(REPLIES))
def test_what_is_inserted_after_a_query(dialect: str) -> None:
    pages = [("1", "Hamlet", "Hamlet is a play by Shakespeare.", 2.0), ("2", "Denmark", "Its prince is Hamlet.", 1.0)]
    env: Any = gym.make(
        "SearchQA-Custom-v0",
        questions=[{"id": "q", "question": "Who wrote Hamlet?", "golden_answers": ["Shakespeare"]}],
        retriever=from_function(lambda queries, top_k: [pages[:top_k] for _ in queries]),
        dialect=dialect,
    ).unwrapped
    env.reset(seed=0)
    query = f"{env.dialect.search_open} Hamlet {env.dialect.search_close}"
    *_, info = env.step(env.tokenizer.encode(query))
    assert env.tokenizer.decode(info["turn_record"].env_tokens) == REPLIES[dialect]
