"""The table of a comparison: cells worked out by hand, what is said in words, what is not complete, and names that are no markup."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_agents.bench.table import (
    DASH,
    MARK,
    as_json,
    as_text,
    columns,
    compared,
    in_words,
    markdown_table,
    notes,
    one_line,
    text_rows,
)

_spec = importlib.util.spec_from_file_location("entries_by_hand", Path(__file__).with_name("entries_by_hand.py"))
assert _spec is not None
assert _spec.loader is not None
by_hand: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(by_hand)

TASKS = ("deep", "noisy", "sparse")
LOW = [0.1, 0.2, 0.3, 0.4, 0.5]
GRPO = by_hand.entry_of(dict.fromkeys(TASKS, LOW), "grpo")
MINE = by_hand.entry_of({"deep": [0.5, 0.6, 0.7, 0.8, 0.9], "noisy": LOW, "sparse": [0.3, 0.4, 0.5, 0.6, 0.7]}, "mine")
_ppo = by_hand.entry_of(dict.fromkeys(TASKS, [0.31] * 5), "ppo")
PPO = replace(
    _ppo,
    runs=tuple(
        by_hand.run_of("noisy", 0, 0.31, best=0.9, algorithm="ppo") if (run.task, run.seed) == ("noisy", 0) else run for run in _ppo.runs
    ),
)


def comparison_of(*entries: Any, mine: tuple[str, ...] = ("mine",), baseline: str | None = "grpo", tasks: tuple[str, ...] = TASKS) -> Any:
    return compared({entry.label: entry for entry in entries}, tasks=tasks, seeds=range(5), mine=mine, baseline=baseline, resamples=200)


@pytest.fixture(scope="module")
def three() -> Any:
    return comparison_of(MINE, GRPO, PPO)


def cells(comparison: Any, name: str) -> dict[str, Any]:
    return {column.title: column.cell(comparison.of(name)) for column in columns(comparison)}


def test_every_cell_is_what_the_runs_say(three: Any) -> None:
    mine = cells(three, "mine")
    assert mine["rank"].text == "1"
    assert mine["IQM"].text == "0.500"  # of 15 values the nine in the middle: .3 .4 .4 .5 .5 .5 .6 .6 .7
    assert [mine[task].text for task in TASKS] == ["0.700", "0.300", "0.500"]
    assert mine["mean"].text == "0.500"
    assert mine["best"].text == "0.500"
    assert mine["difference from grpo"].line == "+0.200 (+0.200 to +0.200)"  # +.4, 0 and +.2 in every pair of a task
    assert mine["P(better than grpo)"].text == "0.767"  # (24.5 + 12.5 + 20.5) of 75 pairs
    assert mine["tokens to 0.5"].line == "8,000 (9 of 15)"  # 5 5 6 6 7 7 8 8 8 thousand, and six that never do
    assert mine["collapsed"].text == "0%"
    assert (mine["CPU seconds"].text, mine["seconds"].text, mine["environment tokens"].text) == ("80", "120", "4,000")
    assert mine["runs"].text == "15"


def test_a_baseline_is_not_compared_with_itself_and_a_collapse_is_counted(three: Any) -> None:
    grpo, ppo = cells(three, "grpo"), cells(three, "ppo")
    assert grpo["difference from grpo"].text == grpo["P(better than grpo)"].text == DASH
    assert grpo["tokens to 0.5"].line == "never (3 of 15)"
    assert grpo["tokens to 0.5"].value is None
    assert ppo["rank"].text == "2"
    assert ppo["difference from grpo"].text == "+0.010"
    assert ppo["best"].text == "0.349"  # (14 x .31 + .9) / 15
    assert ppo["collapsed"].line == "7% (1 of 15)"  # .31 is less than half of .9


def test_standings_are_in_the_order_of_the_iqm_and_mine_is_marked(three: Any) -> None:
    assert [one.name for one in three.standings] == ["mine", "ppo", "grpo"]
    assert [row[0] for row in text_rows(three, columns(three))] == [f"{MARK} mine", "ppo", "grpo"]
    lines = markdown_table(three, columns(three)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| **mine**", "| ppo", "| grpo"]


def test_words_say_what_is_told_apart_and_what_is_not(three: Any) -> None:
    rank, apart, *rest = in_words(three, "mine")
    assert rank.startswith("mine is number 1 of 3 by the IQM of its final scores, 0.500 (")
    assert rank.endswith("over 5 seeds and 3 tasks.")
    assert "better than grpo by +0.200 (+0.200 to +0.200) and ppo by +0.190 (" in apart
    assert any("not corrected for the 2 comparisons" in sentence for sentence in rest)
    _, apart, *rest = in_words(three, "ppo")
    assert "it is worse than mine by -0.190" in apart
    assert "it cannot be told apart from grpo (+0.010, -0." in apart
    assert any("overlaps with" in sentence and "grpo" in sentence for sentence in rest)


@pytest.mark.parametrize("seeds", [1, 2])
def test_with_one_or_two_seeds_nothing_is_told_apart(seeds: int) -> None:
    high, low = (dict.fromkeys(TASKS, (score,) * seeds) for score in (0.9, 0.1))
    words = " ".join(in_words(comparison_of(by_hand.entry_of(high), by_hand.entry_of(low, "grpo")), "mine"))
    assert "nothing can be said beside grpo: fewer than 3 seeds" in words
    assert "better" not in words


def test_a_difference_that_is_rounding_tells_nothing_apart() -> None:
    entries = [by_hand.entry_of(dict.fromkeys(TASKS, (score,) * 5), name) for name, score in (("mine", 0.5), ("grpo", 0.5 + 1e-12))]
    assert "cannot be told apart from grpo (+0.000, +0.000 to +0.000)" in " ".join(in_words(comparison_of(*entries), "mine"))


def test_with_one_seed_there_is_no_interval() -> None:
    one = comparison_of(by_hand.entry_of(dict.fromkeys(TASKS, (0.9,))), by_hand.entry_of(dict.fromkeys(TASKS, (0.1,)), "grpo"))
    assert "over 1 seed and 3 tasks" in " ".join(in_words(one, "mine"))
    assert cells(one, "mine")["IQM"].line == "0.900"
    assert cells(one, "mine")["difference from grpo"].line == "+0.800"


def test_missing_runs_are_told_and_never_counted_as_zero() -> None:
    runs = [run for run in MINE.runs if (run.task, run.seed) not in (("deep", 4), ("noisy", 4))]
    lacking = comparison_of(replace(by_hand.with_runs(runs, "mine"), unfinished=(Path("somewhere/seed-4"),)), GRPO)
    mine = cells(lacking, "mine")
    assert mine["runs"].text == "13 of 15"
    assert mine["deep"].text == "0.650"  # of the seeds 0 to 3
    said = notes(lacking)
    assert "mine has 13 of 15 runs; missing: deep seed 4, noisy seed 4." in said
    assert any("somewhere/seed-4" in line for line in said)
    assert any("the seeds that have them all, 0, 1, 2, 3" in line for line in said)


def test_an_entry_without_a_task_has_no_rank_and_stands_last() -> None:
    part = by_hand.entry_of({"deep": [1.0] * 5}, "part")
    beside = comparison_of(part, GRPO, mine=("part",))
    assert [one.name for one in beside.standings] == ["grpo", "part"]
    assert (cells(beside, "part")["rank"].text, cells(beside, "part")["IQM"].text) == (DASH, DASH)
    assert cells(beside, "part")["deep"].text == "1.000"
    assert in_words(beside, "part") == ["part has no place over all tasks yet: it has no run on noisy, sparse."]


def test_a_diverged_run_is_named() -> None:
    runs = [*MINE.runs[1:], replace(MINE.runs[0], status="diverged")]
    found = comparison_of(by_hand.with_runs(runs, "mine"), GRPO)
    assert cells(found, "mine")["collapsed"].line == "7% (1 of 15)"
    assert "mine diverged on deep seed 0: the score is 0 from there." in notes(found)


def test_the_protocol_page_defines_every_column(three: Any) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "benchmark.md").read_text(encoding="utf-8")
    defined = page.partition("## Statistics")[2].partition("## Compare")[0]
    titles = [
        column.title.replace("grpo", "*baseline*") for column in columns(three) if column.title not in (*TASKS, "algorithm", "rank", "runs")
    ]
    assert [title for title in titles if title not in defined] == []


def test_without_a_baseline_there_are_no_columns_of_one() -> None:
    alone = comparison_of(MINE, baseline=None)
    assert not [title for title in cells(alone, "mine") if "grpo" in title or "P(" in title]
    assert len(in_words(alone, "mine")) == 1


def test_json_has_all_numbers(three: Any) -> None:
    found = json.loads(json.dumps(as_json(three), allow_nan=False))
    assert (found["baseline"], found["tasks"]) == ("grpo", list(TASKS))
    mine, _, grpo = found["entries"]
    assert (mine["name"], mine["rank"], mine["mine"], mine["runs"]) == ("mine", 1, True, 15)
    assert mine["final"]["iqm"]["value"] == pytest.approx(0.5)
    assert mine["difference"]["difference"]["value"] == pytest.approx(0.2)
    assert mine["tokens_to_half"] == {"median": 8000.0, "reached": 9, "runs": 15}
    assert grpo["difference"] is None


HOSTILE = "a|b <script>alert(1)</script> [x](javascript:y) `c` **d** \\|"


def test_a_hostile_label_is_text_in_markdown_and_adds_no_column() -> None:
    label = one_line(HOSTILE)
    table = markdown_table(comparison_of(replace(MINE, label=label), GRPO, mine=()), columns(comparison_of(GRPO, mine=())))
    line = next(line for line in table.splitlines() if "script" in line)
    assert line.count("|") == table.splitlines()[0].count("|")
    assert "<" not in line
    assert "&#60;script&#62;" in line
    assert "&#124;" in line
    assert "[" not in line
    assert "`" not in line


@given(st.text())
def test_text_has_no_markup_no_line_break_and_no_control_character(text: str) -> None:
    shown = as_text(text)
    assert not set("<>|\\`*[]\n\r\x1b\u202e") & set(shown)
    assert all(ord(character) >= 32 for character in shown)
