"""The report page in a real browser: its filters, search, colours and sides say what the trajectories say, and hostile text stays text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from searchqa_agents.curves import Mark, Panel, Series, run_panels
from searchqa_agents.trajectory import Trajectory, TurnSpan
from searchqa_agents.viewer import build_page
from searchqa_envs.tokenizers import build_tokenizer

BYTE = build_tokenizer("byte")
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "\u202eabc\u2066\x00\x1b[31m",
    "\ud800 lone",
    "__DATA__ __SCRIPT__",
    "\u2028\u2029 &lt;b&gt;",
    "a\u200b\u200c\u200d\u2060\u2064\u00ad\u180e\u034f\u115f\u1160\u3164\uffa0z",
    "tags \U000e0001\U000e0041\U000e007f \U000e0100",
)
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\u00ad\u034f\u115f\u1160\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\u3164\uffa0\U000e0000-\U000e01ef]"
)
Turn = tuple[str, str, str]  # action, segment, reply


def play(
    turns: Sequence[Turn], *, name: str = "q0", question: str = "Who?", right: bool = False, advantage: float | None = None, **changed: Any
) -> Trajectory:
    """A trajectory of these turns; the log-probability of its n-th token is -n/100."""
    ids, mask, spans = BYTE.encode(question + "\n"), [0] * len(BYTE.encode(question + "\n")), []
    for action, segment, reply in turns:
        start, own, environment = len(ids), BYTE.encode(segment), BYTE.encode(reply)
        ids = [*ids, *own, *environment]
        mask += [1] * len(own) + [0] * len(environment)
        spans.append(TurnSpan(start, start + len(own), len(ids), action, re.sub("<[^>]*>", "", segment), segment, reply))
    flat = np.array(mask, dtype=np.int8)
    answer = spans[-1].content if spans[-1].action == "answer" else None
    values: dict[str, Any] = {
        "token_ids": np.array(ids, dtype=np.int32),
        "loss_mask": flat,
        "logprobs": (-np.arange(len(ids)) / 100 * flat).astype(np.float32),
        "advantages": None if advantage is None else (advantage * flat).astype(np.float32),
        "turns": tuple(spans),
        "prompt": question + "\n",
        "reward": float(right),
        "question_id": name,
        "question": question,
        "golden_answers": ("Ada",),
        "answer": answer,
        "terminated": answer is not None,
        "truncated": answer is None,
        "metrics": {"em": float(right), "f1": float(right), "searches": float(sum(span.action == "search" for span in spans))},
        "reward_terms": {"em": float(right)},
    }
    return Trajectory(**(values | changed))


SEARCH, ANSWER = (
    ("search", "<search>Zazo</search>", "\n\n<information>Zazo was a Poet</information>\n\n"),
    ("answer", "<answer>Ada</answer>", ""),
)
INVALID = ("invalid", "hmm", "\nTry again.\n")


def varied() -> dict[str, list[Trajectory]]:
    """Two checkpoints on twelve questions, and four rollouts of one question with advantages."""
    shapes: list[list[Turn]] = [
        [ANSWER],
        [SEARCH, ANSWER],
        [SEARCH, SEARCH, ANSWER],
        [INVALID, ANSWER],
        [INVALID, SEARCH],
        [SEARCH, SEARCH],
    ]
    sets: dict[str, list[Trajectory]] = {}
    for place, name in enumerate(("before", "after")):
        sets[name] = []
        for i in range(12):
            turns = shapes[(i + 2 * place) % len(shapes)]
            right = turns[-1] is ANSWER and (i + place) % 3 == 0
            question = f"What is question {i} about?"
            sets[name].append(play(turns, name=f"q{i}", question=question, right=right, reward=float(i % 5)))
    lost = {"backend_error": "RetrieverUnavailable: gone", "metrics": {}, "reward_terms": {}, "reward": 0.0, "answer": None}
    sets["after"][7] = play([SEARCH], name="q7", question="What is question 7 about?", truncated=True, terminated=False, **lost)
    sets["rollouts-000005"] = [
        play([SEARCH, ANSWER], name="t1", question="Trained on?", right=advantage > 0, advantage=advantage)
        for advantage in (1.5, -0.5, 0.0, 2.0)
    ]
    return sets


SETS = varied()
NAMED = [(f"{name}.{i}", name, one) for name, own in SETS.items() for i, one in enumerate(own)]


def outcome(one: Trajectory) -> str:
    if one.backend_error:
        return "lost"
    return "none" if one.answer is None else "correct" if one.metrics["em"] else "partly" if one.metrics["f1"] else "wrong"


def longest() -> set[str]:
    found: set[str] = set()
    for name, own in SETS.items():
        order = sorted(range(len(own)), key=lambda i: -len(own[i].token_ids))
        found |= {f"{name}.{i}" for i in order[: -(-len(own) // 10)]}
    return found


def changed(name: str, one: Trajectory) -> bool:
    others = [other for _, set_name, other in NAMED if set_name != name and other.question_id == one.question_id]
    return outcome(one) != "lost" and any(
        outcome(other) != "lost" and (outcome(other) == "correct") != (outcome(one) == "correct") for other in others
    )


FITS: dict[str, Callable[[str, str, Trajectory], bool]] = {
    "wrong": lambda at, name, one: outcome(one) in ("wrong", "partly", "none"),
    "no search": lambda at, name, one: all(turn.action != "search" for turn in one.turns),
    "invalid": lambda at, name, one: any(turn.action == "invalid" for turn in one.turns),
    "truncated": lambda at, name, one: one.truncated and not one.backend_error,
    "search lost": lambda at, name, one: one.backend_error is not None,
    "changed": lambda at, name, one: changed(name, one),
    "longest": lambda at, name, one: at in longest(),
}
PAGE = build_page(SETS, BYTE, title="A run")


def shown(page: Any) -> list[str]:
    found: list[str] = page.evaluate("shown.map((item) => item.set + '.' + item.number)")
    assert page.inner_text("#count") == f"{len(found)} of {len(NAMED)}"
    return found


def button(page: Any, name: str) -> Any:
    return page.locator("#quick button", has_text=re.compile(f"^{name}"))


def wait_until(page: Any, expression: str) -> None:
    """Playwright's own way needs eval(), which the page's policy forbids."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(25)
    pytest.fail(f"never true: {expression}")


def colour_of(span: Any) -> str:
    return str(span.evaluate("(span) => getComputedStyle(span).backgroundColor"))


def test_every_filter_alone_and_with_every_other_shows_exactly_what_fits(open_page: Callable[..., Any]) -> None:
    page = open_page(PAGE)
    assert sorted(shown(page)) == sorted(at for at, _, _ in NAMED)
    for names in [(name,) for name in FITS] + list(combinations(FITS, 2)):
        expected = {at for at, name, one in NAMED if all(FITS[each](at, name, one) for each in names)}
        page.evaluate("(only) => { state.only = new Set(only); filter(); }", list(names))
        assert set(shown(page)) == expected, names
        rest = {each: sum(FITS[each](at, name, one) for at, name, one in NAMED if at in expected) for each in FITS}
        assert {each: int(button(page, each).locator("span").inner_text()) for each in FITS} == rest
    assert all(any(FITS[each](*one) for one in NAMED) for each in FITS)


def test_a_click_on_a_filter_switches_it_and_a_second_click_switches_it_off(open_page: Callable[..., Any]) -> None:
    page = open_page(PAGE)
    button(page, "invalid").click()
    assert button(page, "invalid").get_attribute("aria-pressed") == "true"
    rows = page.locator(".item .q").all_inner_texts()
    assert sorted(rows) == sorted(one.question for at, name, one in NAMED if FITS["invalid"](at, name, one))
    button(page, "search lost").click(force=True)  # nothing would be left: it cannot be chosen
    assert len(shown(page)) == len(rows)
    button(page, "invalid").click()
    assert len(shown(page)) == len(NAMED)


def test_menus_filter_and_count(open_page: Callable[..., Any]) -> None:
    page = open_page(PAGE)
    page.select_option("#set", "after")
    assert set(shown(page)) == {at for at, name, _ in NAMED if name == "after"}
    page.select_option("#outcome", "none")
    expected = {at for at, name, one in NAMED if name == "after" and outcome(one) == "none"}
    assert set(shown(page)) == expected
    of_before = sum(name == "before" and outcome(one) == "none" for _, name, one in NAMED)
    assert page.locator("#set option").all_inner_texts()[1] == f"before ({of_before})"  # with all else that is chosen
    page.select_option("#outcome", "")
    page.select_option("#searches", "2")
    assert set(shown(page)) == {at for at, name, one in NAMED if name == "after" and one.metrics.get("searches") == 2}


def test_orders(open_page: Callable[..., Any]) -> None:
    page = open_page(PAGE)
    page.select_option("#sort", "high")
    assert shown(page) == [at for at, _, one in sorted(NAMED, key=lambda named: -named[2].reward)]
    page.select_option("#sort", "long")
    lengths = [len({name: one for name, _, one in NAMED}[at].token_ids) for at in shown(page)]
    assert lengths == sorted(lengths, reverse=True)
    page.select_option("#sort", "advantage")
    assert shown(page)[:4] == [f"rollouts-000005.{number}" for number in (3, 0, 1, 2)]


FOUND: dict[str, Callable[[Trajectory], bool]] = {
    "QUESTION 3 ": lambda one: one.question_id == "q3",
    "zazo": lambda one: any(turn.action == "search" for turn in one.turns),
    "was a poet": lambda one: any("Poet" in turn.observation for turn in one.turns),
    "try again": lambda one: any(turn.action == "invalid" for turn in one.turns),
    "ada": lambda one: True,
    "<answer>": lambda one: one.answer is not None,
    "nowhere at all": lambda one: False,
}


def test_find_looks_in_questions_queries_answers_and_passages(open_page: Callable[..., Any]) -> None:
    page = open_page(PAGE)
    for words, fits in FOUND.items():
        page.fill("#find", words)
        assert set(shown(page)) == {at for at, _, one in NAMED if fits(one)}, words
    assert page.inner_text("#question") == "No trajectory fits."
    assert page.locator(".episode").count() == 0


def test_find_leaves_prompts_out(open_page: Callable[..., Any]) -> None:
    page = open_page(build_page({"eval": [play([ANSWER], prompt="Think step by step")]}, None, title="t"))
    page.fill("#find", "step by step")
    assert page.inner_text("#count") == "0 of 1"


def test_keys_go_through_the_list_and_to_the_search_box(open_page: Callable[..., Any]) -> None:
    page = open_page(PAGE, "#at=before.0&set=before")
    for key, expected in (("j", 1), ("j", 2), ("k", 1), ("k", 0), ("k", 0)):
        page.keyboard.press(key)
        assert page.inner_text("#question") == SETS["before"][expected].question
    page.keyboard.press("/")
    page.keyboard.type("jk/")
    assert page.input_value("#find") == "jk/"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement === document.body")


def test_the_address_keeps_what_is_shown(open_page: Callable[..., Any]) -> None:
    page = open_page(PAGE)
    page.select_option("#set", "before")
    page.fill("#find", "about")
    button(page, "wrong").click()
    page.check("#colour-logprob")
    page.keyboard.press("j")
    question = page.inner_text("#question")
    wait_until(page, "location.hash.includes('colour=logprob') && location.hash.includes('at=before.' + current.number)")
    again = open_page(PAGE, page.evaluate("location.hash"))
    assert again.inner_text("#question") == question
    assert again.input_value("#find") == "about"
    assert again.input_value("#set") == "before"
    assert again.is_checked("#colour-logprob")
    assert button(again, "wrong").get_attribute("aria-pressed") == "true"
    assert shown(again) == shown(page)


def test_an_address_from_another_page_shows_what_there_is(open_page: Callable[..., Any]) -> None:
    page = open_page(PAGE, "#set=gone&at=gone.3&only=nothing,wrong&sort=best&colour=toString&right=x")
    assert set(shown(page)) == {at for at, name, one in NAMED if FITS["wrong"](at, name, one)}
    assert page.is_checked("#colour-mask")


def test_two_checkpoints_stand_side_by_side_on_one_question(open_page: Callable[..., Any]) -> None:
    page = open_page(PAGE, "#at=before.4")
    assert page.locator(".episode").count() == 2
    assert [page.input_value("#left"), page.input_value("#right")] == ["before", "after"]
    for card, one in zip(page.locator(".episode").all(), (SETS["before"][4], SETS["after"][4]), strict=True):
        texts = card.locator(".policy").all()
        assert ["".join(text.locator("span").all_text_contents()) for text in texts] == [turn.segment for turn in one.turns]
        assert "question q4" in card.inner_text()
    page.select_option("#left", "after")
    assert [page.input_value("#left"), page.input_value("#right")] == ["after", "before"]
    page.uncheck("#beside")
    assert page.locator(".episode").count() == 1
    assert not page.is_visible("#right")


def test_two_samples_of_one_question_stand_side_by_side(open_page: Callable[..., Any]) -> None:
    page = open_page(PAGE, "#at=rollouts-000005.1")
    assert page.locator(".episode").count() == 2
    assert page.locator("#leftnumber option:checked").inner_text() == "2 of 4"
    assert page.locator("#rightnumber option").all_inner_texts() == ["1 of 4", "3 of 4", "4 of 4"]
    page.select_option("#rightnumber", label="4 of 4")
    page.check("#colour-advantage")
    page.locator(".episode >> nth=1").locator(".policy span >> nth=0").hover()
    assert "advantage +2.000" in page.inner_text("#tip")


def test_advantages_above_zero_are_blue_below_zero_orange_and_underlined(open_page: Callable[..., Any]) -> None:
    page = open_page(PAGE, "#at=rollouts-000005.0&beside=no&colour=advantage")
    first = page.locator(".policy span").first
    seen = {}
    for number, advantage in enumerate((1.5, -0.5, 0.0, 2.0)):
        page.select_option("#leftnumber", str(number))
        assert page.evaluate(
            "[...document.querySelectorAll('.policy span')].every((span) => span.style.background === document.querySelector('.policy span').style.background)"
        )
        red, _, blue, *rest = map(float, re.findall(r"[\d.]+", colour_of(first)))
        seen[advantage] = (blue > red, red > blue, rest[0] if rest else 1.0)
        assert ("underline" in first.evaluate("(span) => getComputedStyle(span).textDecorationLine")) == (advantage < 0)
        first.hover()
        assert f"advantage {'+' if advantage > 0 else ''}{advantage:.3f}" in page.inner_text("#tip")
    assert seen[1.5][0]
    assert seen[2.0][0]
    assert seen[-0.5][1]
    assert seen[0.0][2] == 0
    assert seen[2.0][2] > seen[1.5][2] > seen[-0.5][2] > 0
    assert colour_of(page.locator(".text.env span").first) == "rgba(0, 0, 0, 0)"


def test_where_there_are_no_advantages_the_page_says_so(open_page: Callable[..., Any]) -> None:
    page = open_page(PAGE, "#at=before.1&colour=advantage")
    assert "has no advantages" in page.inner_text("#reason")
    page = open_page(build_page({"eval": SETS["before"]}, BYTE, title="t"))
    assert page.is_disabled("#colour-advantage")
    assert "only rollouts of training" in page.locator("label", has=page.locator("#colour-advantage")).get_attribute("title")


def test_where_all_advantages_are_0_the_page_says_why(open_page: Callable[..., Any]) -> None:
    page = open_page(PAGE, "#at=rollouts-000005.2&beside=no&colour=advantage")
    assert page.inner_text("#reason") == "All advantages are 0."  # the rewards of the group differ
    page.check("#beside")
    assert page.inner_text("#reason") == "All advantages of rollouts-000005, 3 of 4, are 0."
    alike = [play([ANSWER], right=True, advantage=0.0) for _ in range(3)]
    page = open_page(build_page({"rollouts-000001": alike, "eval": [play([ANSWER])]}, BYTE, title="t"), "#colour=advantage")
    assert page.inner_text("#reason").startswith("eval has no advantages: ")
    assert page.inner_text("#reason").endswith("are 0: the samples of this question had the same reward.")
    page.select_option("#right", "rollouts-000001")
    assert page.inner_text("#reason") == "All advantages are 0: the samples of this question had the same reward."
    page.check("#colour-mask")
    assert not page.is_visible("#reason")
    assert open_page(build_page({"eval": [play([ANSWER])]}, BYTE, title="t")).is_disabled("#byadvantage")


def test_less_likely_tokens_have_a_stronger_colour_and_the_pointer_tells_the_log_probability(open_page: Callable[..., Any]) -> None:
    one = SETS["before"][2]
    page = open_page(PAGE, "#at=before.2&beside=no&colour=logprob")
    spans = page.locator(".policy span")
    places = np.flatnonzero(one.loss_mask)
    assert spans.count() == len(places)
    shares = [float([*re.findall(r"[\d.]+", colour_of(spans.nth(i))), "1"][3]) for i in (0, len(places) - 1)]
    assert shares[1] > shares[0]
    spans.nth(3).hover()
    logprob = float(one.logprobs[places[3]])
    assert page.inner_text("#tip").splitlines()[1:] == [
        f"token {places[3] + 1} of {len(one.token_ids)}, sampled by the policy",
        f"log-prob {logprob:.3f}, p = {np.exp(logprob):.3f}",
    ]


def test_by_mask_tokens_of_the_environment_are_told_from_those_of_the_policy(open_page: Callable[..., Any]) -> None:
    page = open_page(PAGE, "#at=before.1&beside=no&colour=mask")
    reply = page.locator(".text.env")
    assert "".join(reply.locator("span").all_text_contents()) == SEARCH[2].replace("\n", "↵")
    own, other = colour_of(page.locator(".policy span").first), colour_of(reply.locator("span").first)
    assert own != other
    reply.locator("span").nth(2).hover()
    assert "environment, masked" in page.inner_text("#tip")
    page.locator("summary", has_text="Prompt").click()
    page.locator("details .env span").first.wait_for()
    assert "".join(page.locator("details .env span").all_text_contents()) == SETS["before"][1].question + "↵"


def test_a_token_inside_a_segment_that_is_not_the_policys_is_told(open_page: Callable[..., Any]) -> None:
    one = play([ANSWER])
    mask = one.loss_mask.copy()
    mask[one.turns[0].start + 1] = 0
    page = open_page(build_page({"eval": [play([ANSWER], loss_mask=mask)]}, BYTE, title="t"))
    spans = page.locator(".policy span")
    assert colour_of(spans.nth(1)) != colour_of(spans.nth(3))
    spans.nth(1).hover()
    assert "environment, masked" in page.inner_text("#tip")
    spans.nth(2).hover()
    assert f"log-prob {-(one.turns[0].start + 2) / 100:.3f}" in page.inner_text("#tip")


def test_a_segment_that_is_whole_has_no_tokens_to_count(open_page: Callable[..., Any]) -> None:
    page = open_page(build_page({"eval": [play([SEARCH, ANSWER], logprobs=None)]}, BYTE, title="t"), "#colour=mask")
    assert page.locator(".policy span").all_text_contents() == [SEARCH[1], ANSWER[1]]
    assert page.is_disabled("#colour-logprob")
    page.locator(".policy span").first.hover()
    assert page.inner_text("#tip").splitlines()[1:] == ["sampled by the policy"]
    page.locator(".text.env span").nth(4).hover()
    assert page.inner_text("#tip").splitlines()[1:] == ["environment, masked"]


def hostile(text: str, place: int) -> Trajectory:
    own = text.encode("utf-8", "replace").decode()  # a tokenizer has no lone surrogates
    turns: list[Turn] = [("search", own, own), ("answer", own, "")]
    one = play(turns, question=own, golden_answers=(text,), backend_error=text if place % 2 else None)
    return replace(one, question=text, answer=text, question_id=text)


def test_hostile_text_stays_text(open_page: Callable[..., Any]) -> None:
    every = "".join(HOSTILE)
    curves = [
        Panel(
            every, [Series(every, [1.0, 2.0], [1.0, None])], [Mark(1, 0.5, every)], every, [(1, every, every)], every, False, False, every
        )
    ]
    trajectories = [hostile(text, place) for place, text in enumerate(HOSTILE)]
    page = open_page(
        build_page(
            {every: trajectories, "other": trajectories},
            BYTE,
            title=every,
            subtitle=every,
            table=((every,), ((every,),)),
            stamp={every: every},
            notes=[every],
            curves=curves,
        )
    )
    page.locator(".curve svg").hover()
    for place, text in enumerate(HOSTILE):
        page.evaluate("(place) => open(items[place])", place)
        assert page.locator("#question").evaluate("(heading) => heading.textContent.toWellFormed()") == legible(text)
        segments = page.locator(".policy").all_text_contents()
        assert segments == [legible(text.encode("utf-8", "replace").decode())] * 4
        page.locator(".policy span:not(:empty)").first.hover()
        everything = page.evaluate("document.body.textContent")
        assert not HIDDEN.search(everything)
    assert page.evaluate("[document.querySelectorAll('#browser img, main script, #tip *').length, document.scripts.length]") == [0, 2]


def legible(text: str) -> str:
    """Characters that hide or reorder text by their number; lone surrogates as browsers show them."""
    shown = HIDDEN.sub(lambda found: f"‹{ord(found[0]):02X}›", text)
    return re.sub("[\ud800-\udfff]", "\ufffd", shown)


def test_a_token_of_100_kb_does_not_burst_the_page(open_page: Callable[..., Any]) -> None:
    class Long:
        name, vocab_size, pad_id, eos_id, reserved = "long", 2, -2, -1, ()

        def encode(self, text: str) -> list[int]:
            return [0]

        def decode(self, ids: Sequence[int]) -> str:
            return b"".join(self.pieces(ids)).decode()

        def pieces(self, ids: Sequence[int]) -> list[bytes]:
            return [b"x" * 100_000 if i == 1 else "é".encode() for i in ids]

    one = play([ANSWER])
    start, end = one.turns[0].start, one.turns[0].segment_end
    ids = np.zeros(len(one.token_ids), dtype=np.int32)
    ids[start + 1] = 1
    page = open_page(build_page({"eval": [play([ANSWER], token_ids=ids)]}, Long(), title="t"))
    lengths = page.evaluate("[...document.querySelectorAll('.policy span')].map((span) => span.textContent.length)")
    assert lengths == [1, 100_000, *[1] * (end - start - 2)]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_no_script_but_the_pages_own_runs_and_nothing_is_fetched(browser: Any, tmp_path: Any) -> None:
    file = tmp_path / "page.html"
    file.write_text(
        PAGE.replace("</main>", "</main><script>window.ran = 1</script><img src=http://127.0.0.1:9/x onerror='window.ran = 2'>"),
        encoding="utf-8",
    )
    page = browser.new_page()
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]")
    assert page.inner_text("#count") == f"{len(NAMED)} of {len(NAMED)}"
    assert page.evaluate("window.ran") is None
    assert page.evaluate("fetch('data:,x').then(() => 'fetched', () => 'refused')") == "refused"
    page.close()


def test_of_5000_trajectories_only_rows_in_sight_are_in_the_page(open_page: Callable[..., Any]) -> None:
    many = [play([ANSWER], name=f"q{i}", question=f"Question {i}?", right=i % 4 == 0) for i in range(5000)]
    page = open_page(build_page({"eval": many}, BYTE, title="t"))
    assert page.inner_text("#count") == "5,000 of 5,000"
    assert page.locator(".item").count() < 40
    page.evaluate("document.getElementById('list').scrollTop = 1e9")
    wait_until(page, "[...document.querySelectorAll('.item .q')].some((row) => row.textContent === 'Question 4999?')")
    assert page.locator(".item").count() < 40
    button(page, "wrong").click()
    assert page.inner_text("#count") == "3,750 of 5,000"
    assert page.locator(".item .q").first.inner_text() == "Question 1?"


def test_curves_tell_the_values_of_the_step_under_the_pointer(open_page: Callable[..., Any]) -> None:
    lines = [{"phase": "train", "step": i, "charts/em": i / 10, "charts/searches": 1.0 + i, "losses/odd": float(i)} for i in range(1, 6)]
    measures = {"before": {"sampled/em": 0.25, "sampled/searches": 1.0}, "after": {"sampled/em": 0.75, "sampled/searches": 2.0}}
    page = open_page(build_page({"eval": []}, None, title="t", curves=run_panels(lines, measures)))
    svg = page.locator(".curve", has_text="Exact match").locator("svg")
    box = svg.bounding_box()
    svg.hover(position={"x": box["width"] - 12, "y": 30})
    assert page.inner_text("#tip") == "step 5\nexact match on training questions: 0.5\nheld-out questions, sampled, after: 0.750"
    svg.focus()
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#tip") == "step 4\nexact match on training questions: 0.4"
    assert page.locator(".curve").count() == 2
    page.click("#morecurves")
    assert page.locator("#more figcaption").all_inner_texts() == ["losses/odd"]


def test_in_the_dark_text_is_light_on_dark(open_page: Callable[..., Any]) -> None:
    def lightness(page: Any, selector: str, what: str) -> float:
        numbers = re.findall(r"[\d.]+", page.evaluate("([s, w]) => getComputedStyle(document.querySelector(s))[w]", [selector, what]))
        return sum(map(float, numbers[:3]))

    for scheme, darker in (("light", False), ("dark", True)):
        page = open_page(PAGE, scheme=scheme)
        for selector, behind in (("body", "body"), (".policy span", ".episode"), (".item", ".list")):
            assert (lightness(page, behind, "backgroundColor") < lightness(page, selector, "color")) == darker


def test_on_a_narrow_screen_nothing_is_wider_than_it(open_page: Callable[..., Any]) -> None:
    page = open_page(PAGE, width=390, height=800)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    heights = page.evaluate("[...document.querySelectorAll('.colours label')].map((label) => label.offsetHeight)")
    assert len(set(heights)) == 1


def test_a_long_name_of_a_set_ends_in_an_ellipsis_inside_its_row(open_page: Callable[..., Any]) -> None:
    page = open_page(build_page({"a": SETS["before"], "b" * 80: SETS["after"]}, BYTE, title="t"))
    assert page.evaluate("[...document.querySelectorAll('.item .m')].every((marks) => marks.scrollWidth <= marks.clientWidth)")


def test_the_search_box_shows_all_of_what_it_says(open_page: Callable[..., Any]) -> None:
    page = open_page(PAGE)
    assert page.evaluate(
        "() => { const box = byId('find'), style = getComputedStyle(box), pen = document.createElement('canvas').getContext('2d');"
        " pen.font = style.font; return pen.measureText(box.placeholder).width <= box.clientWidth - 2 * parseFloat(style.paddingLeft) - 20; }"
    )


def test_a_page_without_trajectories_opens(open_page: Callable[..., Any]) -> None:
    page = open_page(build_page({}, None, title="t"))
    assert page.inner_text("#count") == "0 of 0"
    assert page.inner_text("#question") == "No trajectory fits."
