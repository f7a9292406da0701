"""The page of trajectories: everything is in it, nothing from outside, and no text in it can become markup."""

from __future__ import annotations

import base64
import gzip
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_agents.curves import Panel, Series
from searchqa_agents.page_data import outcome, rounded
from searchqa_agents.report import run_parts, write_page
from searchqa_agents.trajectory import Trajectory, TurnSpan
from searchqa_agents.viewer import build_page, embedded_json
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
    """The elements of a page, what its data script says, and the trajectories that are packed in it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.title, self._inside = "", ""
        self.feed(text)
        self.close()
        self.data: dict[str, Any] = json.loads(self.scripts["data"])
        packed = {
            name: gzip.decompress(base64.b64decode(self.scripts[name])) for name in ("trajectories", "cuts", "logprobs", "advantages")
        }
        self.packed: dict[str, Any] = json.loads(packed["trajectories"])
        self.cuts = np.frombuffer(packed["cuts"], "<u4")
        self.numbers = {name: np.frombuffer(packed[name], "<f4") for name in ("logprobs", "advantages")}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") or "" if tag == "script" else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "title":
            self.title += data
        elif self._inside:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data

    @property
    def items(self) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.packed["items"]
        return items

    def text(self, place: int) -> str:
        return "" if place < 0 else str(self.packed["texts"][place])

    def tokens(self, place: int) -> list[tuple[str, int]]:
        """Text and mask of each token of a text; none where it is whole."""
        units = self.text(place).encode("utf-16-le", "surrogatepass")
        tokens, at = [], 0
        for cut in self.cuts[self.packed["starts"][place] : self.packed["starts"][place + 1]].tolist():
            tokens.append((units[at : at + 2 * (cut >> 1)].decode("utf-16-le", "surrogatepass"), cut & 1))
            at += 2 * (cut >> 1)
        assert not tokens or at == len(units)
        return tokens


def page_of(*trajectories: Trajectory, tokenizer: Any = BYTE) -> Page:
    return Page(build_page({"eval": trajectories}, tokenizer, title="t"))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_adds_no_element_and_comes_back_as_it_was(text: str) -> None:
    segment = text.encode("utf-8", "replace").decode()
    one = trajectory(question=text, segment=segment, reply=segment, answer=text, golden_answers=(text,), prompt=text, backend_error=text)
    curves = [Panel(text, [Series(text, [1.0], [2.0])], [], text, [], text, False, False, text)]
    page = Page(build_page({text: [one]}, BYTE, title=text, subtitle=text, table=((text,), ((text,),)), stamp={text: text}, curves=curves))
    assert page.elements == Page(build_page({"eval": []}, None, title="plain")).elements
    [item] = page.items
    assert item["question"] == item["answer"] == item["ending"] == item["gold"][0] == item["set"] == text
    assert page.text(item["turns"][0][2]) == page.text(item["turns"][0][3]) == segment
    assert page.data["stamp"] == {text: text}
    assert page.data["sets"] == [text]
    assert page.data["curves"][0]["series"] == [[text, [1.0], [2.0]]]


def test_a_prompt_without_a_tokenizer_comes_back_as_it_was() -> None:
    for text in HOSTILE:
        page = page_of(trajectory(prompt=text), tokenizer=None)
        assert page.text(page.items[0]["prompt"]) == text


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
    assert "unsafe" not in policy
    assert not [tag for tag, attributes in page.elements if tag in ("link", "iframe", "object", "embed") or attributes.get("src")]
    assert "http://" not in text
    assert "https://" not in text
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert unsafe not in text


def test_tokens_of_a_segment_are_its_text_with_their_logprobs() -> None:
    segment = "<think>naïve 東京 🙂</think><answer>Ada</answer>"
    page = page_of(trajectory(segment=segment))
    tokens = page.tokens(page.items[0]["turns"][0][2])
    assert "".join(text for text, _ in tokens) == segment
    assert all(mask == 1 for _, mask in tokens)
    assert page.numbers["logprobs"].tolist() == [-0.25] * len(tokens)
    assert len(tokens) == len(BYTE.encode(segment))  # of a character of several bytes, the last carries it


def test_numbers_of_tokens_stand_behind_each_other_and_advantages_only_where_there_are() -> None:
    one = trajectory()
    weighed = trajectory(advantages=np.where(one.loss_mask == 1, np.float32(-1.5), np.float32(0)).astype(np.float32))
    page = page_of(one, weighed, trajectory(logprobs=None))
    sampled = int(one.loss_mask.sum())
    assert [(item["logprobs"], item["advantages"]) for item in page.items] == [(0, -1), (sampled, 0), (-1, -1)]
    assert page.numbers["advantages"].tolist() == [-1.5] * sampled
    assert len(page.numbers["logprobs"]) == 2 * sampled
    assert page.packed["advantage_scale"] == 1.5
    assert [item["peak"] for item in page.items] == [-1, 1.5, -1]


def test_every_text_is_in_the_page_once() -> None:
    page = page_of(*[trajectory(reply="a passage")] * 50)
    assert sorted(page.packed["texts"]) == sorted({"Who?\n", "<answer>Ada</answer>", "a passage"})
    assert len(page.items) == 50


def test_a_token_inside_a_segment_that_is_not_the_policys_is_marked() -> None:
    one = trajectory()
    mask = one.loss_mask.copy()
    start = one.turns[0].start
    mask[start + 1] = 0
    page = page_of(trajectory(loss_mask=mask))
    tokens = page.tokens(page.items[0]["turns"][0][2])
    assert [own for _, own in tokens[:3]] == [1, 0, 1]
    assert len(page.numbers["logprobs"]) == len(tokens) - 1


def test_environment_text_has_tokens_that_the_policy_did_not_sample() -> None:
    page = page_of(trajectory(reply="Ada is"))
    assert page.tokens(page.items[0]["turns"][0][3]) == [(one, 0) for one in "Ada is"]


def test_without_logprobs_or_tokenizer_segments_are_whole() -> None:
    for page in (page_of(trajectory(logprobs=None)), page_of(trajectory(), tokenizer=None)):
        segment = page.items[0]["turns"][0][2]
        assert page.text(segment) == "<answer>Ada</answer>"
        assert page.tokens(segment) == []
        assert page.items[0]["logprobs"] == -1 or len(page.numbers["logprobs"]) == 0


def test_each_set_has_its_own_tokenizer() -> None:
    page = Page(build_page({"a": [trajectory()], "b": [trajectory()]}, {"a": BYTE, "b": None}, title="t"))
    assert [bool(page.tokens(item["turns"][0][2])) for item in page.items] == [True, False]


@given(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False))
def test_rounded_numbers_are_off_by_less_than_one_part_in_four_thousand(value: float) -> None:
    [found] = rounded(np.array([value], dtype=np.float32)).tolist()
    assert abs(found - value) <= abs(value) / 4096


def test_rounding_leaves_what_is_no_number_as_it_is() -> None:
    values = np.array([np.inf, -np.inf, np.nan, 0.0], dtype=np.float32)
    assert np.array_equal(rounded(values), values, equal_nan=True)


def test_a_page_of_the_same_trajectories_is_the_same() -> None:
    assert build_page({"eval": [trajectory()]}, BYTE, title="t") == build_page({"eval": [trajectory()]}, BYTE, title="t")


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


def test_sets_keep_their_order_and_items_their_number() -> None:
    page = Page(build_page({"before": [trajectory(), trajectory()], "after": [trajectory()]}, BYTE, title="t"))
    assert page.data["sets"] == ["before", "after"]
    assert [(item["set"], item["number"]) for item in page.items] == [("before", 0), ("before", 1), ("after", 0)]


def test_a_page_of_a_run_says_below_its_title_what_the_run_is(tmp_path: Path) -> None:
    config = "algo: {name: grpo}\nenv: {id: SearchQA-World-v0}\nstart: shipped\nseed: 0\nsets: null\n"
    for name in ("mine", "2026-01-02_03-04-05-train"):
        run = tmp_path / name
        (run / "tensorboard" / "train").mkdir(parents=True)
        (run / "tensorboard" / "train" / "events.out.tfevents.86400.host.1.0").touch()
        (run / "config.yaml").write_text(config, encoding="utf-8")
        own = [{"phase": "warmup", "step": 90, "seconds": 1.0}, *({"phase": "train", "step": i, "seconds": 2.0} for i in (1, 2))]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own), encoding="utf-8")
        data = Page(write_page(run).read_text(encoding="utf-8")).data
        day = "1970-01-02 · " if name == "mine" else ""
        assert data["subtitle"] == f"grpo · SearchQA-World-v0 · start shipped · 2 steps · seed 0 · {day}folder {name}"
        assert data["notes"] == []
    (run / "config.yaml").write_text("agent: {kind: oracle}\nenv: {id: a}\nsets: [nq, hotpotqa]\n", encoding="utf-8")
    assert run_parts(run, {"kind": "eval"}, []) == ["oracle", "nq, hotpotqa", f"folder {run.name}"]
