"""The page of trajectories: everything is in it, nothing from outside, and no text in it can become markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_agents.trajectory import Trajectory, TurnSpan
from searchqa_agents.viewer import build_page, embedded_json, item_of, outcome
from searchqa_envs.tokenizers import build_tokenizer

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt; &amp;",
    "\u2028\u2029",
    "\ud800 lone",
    "__DATA__ __TITLE__",
    "\x00\x1b[31m",
    "\\u003c/script>",
)
BYTE = build_tokenizer("byte")


def trajectory(
    question: str = "Who?", segment: str = "<answer>Ada</answer>", reply: str = "", answer: str | None = "Ada", **changed
) -> Trajectory:
    prompt = BYTE.encode("Who?\n")
    written, environment = BYTE.encode(segment), BYTE.encode(reply)
    ids = np.array([*prompt, *written, *environment], dtype=np.int32)
    mask = np.array([0] * len(prompt) + [1] * len(written) + [0] * len(environment), dtype=np.int8)
    end = len(prompt) + len(written)
    values = {
        "token_ids": ids,
        "loss_mask": mask,
        "logprobs": np.where(mask == 1, np.float32(-0.25), np.float32(0)).astype(np.float32),
        "turns": (TurnSpan(len(prompt), end, len(ids), "answer", answer or "", segment, reply),),
        "prompt": "Who?\n",
        "reward": 1.0,
        "question_id": "q1",
        "question": question,
        "golden_answers": ("Ada",),
        "answer": answer,
        "terminated": True,
        "truncated": False,
        "metrics": {"em": 1.0, "searches": 0.0},
        "reward_terms": {"em": 1.0},
    }
    return Trajectory(**(values | changed))


class Page(HTMLParser):
    """The elements of a page and the text of its data script."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data, self.title, self._inside = "", "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = "data" if dict(attrs).get("id") == "data" else "title" if tag == "title" else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data += data
        elif self._inside == "title":
            self.title += data


def plain_elements() -> list[tuple[str, dict[str, str | None]]]:
    return Page(build_page({"eval": []}, None, title="plain")).elements


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_adds_no_element_and_comes_back_as_it_was(text: str) -> None:
    segment = text.encode("utf-8", "replace").decode()
    one = trajectory(question=text, segment=segment, reply=segment, answer=text, golden_answers=(text,), prompt=text, backend_error=text)
    page = Page(build_page({text: [one]}, BYTE, title=text, subtitle=text, table=((text,), ((text,),)), stamp={text: text}))
    assert page.elements == plain_elements()
    data = json.loads(page.data)
    item = data["items"][0]
    assert item["question"] == item["answer"] == item["prompt"] == item["ending"] == item["gold"][0] == text
    assert item["turns"][0]["reply"] == segment
    assert data["stamp"] == {text: text}
    assert data["sets"] == [text]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_embedded_json_cannot_end_its_element_and_round_trips(text: str) -> None:
    embedded = embedded_json({"a": [text], text: 1.5})
    assert not set("<>&") & set(embedded)
    assert embedded.isascii()
    assert json.loads(embedded) == {"a": [text], text: 1.5}


def test_numbers_that_json_cannot_say_become_null() -> None:
    assert json.loads(embedded_json({"a": [float("nan"), float("-inf"), 2.0]})) == {"a": [None, None, 2.0]}


def test_the_page_asks_for_nothing_from_outside() -> None:
    text = build_page({"eval": [trajectory()]}, BYTE, title="t", picture=b"\x89PNG")
    page = Page(text)
    policy = next(attributes["content"] for tag, attributes in page.elements if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert not [tag for tag, attributes in page.elements if tag in ("link", "iframe", "object", "embed") or attributes.get("src")]
    assert "http://" not in text
    assert "https://" not in text
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert unsafe not in text


def test_tokens_of_a_segment_are_its_text_with_their_logprobs() -> None:
    segment = "<think>naïve 東京 🙂</think><answer>Ada</answer>"
    [turn] = item_of(trajectory(segment=segment), BYTE, "eval")["turns"]
    assert "".join(token[0] for token in turn["tokens"]) == segment
    assert all(token[1:] == [-0.25, 1] for token in turn["tokens"])


def test_a_token_inside_a_segment_that_is_not_the_policys_is_marked() -> None:
    one = trajectory()
    mask = one.loss_mask.copy()
    start = one.turns[0].start
    mask[start + 1] = 0
    [turn] = item_of(trajectory(loss_mask=mask), BYTE, "eval")["turns"]
    assert turn["tokens"][1][1:] == [None, 0]
    assert turn["tokens"][2][1:] == [-0.25, 1]


def test_without_logprobs_or_tokenizer_segments_are_whole() -> None:
    for item in (item_of(trajectory(logprobs=None), BYTE, "eval"), item_of(trajectory(), None, "eval")):
        assert item["turns"][0]["tokens"] == [["<answer>Ada</answer>", None, 1]]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "correct"),
        ({"metrics": {"em": 0.0, "f1": 0.5}}, "partly"),
        ({"metrics": {"em": 0.0, "f1": 0.0}}, "wrong"),
        ({"answer": None, "metrics": {"em": 0.0}}, "none"),
        ({"backend_error": "RetrieverUnavailable: gone", "metrics": {}}, "lost"),
    ],
)
def test_outcomes(changed: dict, expected: str) -> None:
    assert outcome(trajectory(**changed)) == expected


def test_sets_keep_their_order_and_items_their_place() -> None:
    page = Page(build_page({"before": [trajectory(), trajectory()], "after": [trajectory()]}, BYTE, title="t"))
    data = json.loads(page.data)
    assert data["sets"] == ["before", "after"]
    assert [(item["set"], item["place"]) for item in data["items"]] == [("before", 0), ("before", 1), ("after", 2)]
