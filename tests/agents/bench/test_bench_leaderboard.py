"""``searchqa bench leaderboard``: the table of the shipped entries, and that the README has it as the command prints it."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from searchqa_agents.bench import results
from searchqa_agents.bench.results import BenchResultError, shipped, write_entry
from searchqa_agents.bench_leaderboard_command import BEGIN, END, as_markdown, block_of, leaderboard, write_block
from searchqa_agents.cli import main

_spec = importlib.util.spec_from_file_location("entries_by_hand", Path(__file__).with_name("entries_by_hand.py"))
assert _spec is not None
assert _spec.loader is not None
by_hand: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(by_hand)

README = Path(__file__).resolve().parents[3] / "README.md"
TASKS = ("deep", "noisy", "sparse")
GRPO = by_hand.entry_of(dict.fromkeys(TASKS, (0.1, 0.2, 0.3, 0.4, 0.5)), "grpo")
PPO = by_hand.entry_of(dict.fromkeys(TASKS, (0.5, 0.6, 0.7, 0.8, 0.9)), "ppo", label="PPO | ours")


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "hand-v1").mkdir()
    for entry in (GRPO, PPO):
        write_entry(tmp_path / "hand-v1" / f"{entry.algorithm}.json", entry)
    monkeypatch.setattr(results, "LEADERBOARD", tmp_path)
    monkeypatch.setattr("searchqa_agents.bench_leaderboard_command.RESAMPLES", 50)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_the_table_has_the_entries_with_the_best_above(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "leaderboard", "--suite", "hand-v1", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| algorithm | rank | IQM | deep | noisy | sparse | difference from grpo | tokens to 0.5 | collapsed |")
    assert lines[2].startswith("| PPO &#124; ours | 1 | 0.700 (")
    assert lines[3].startswith("| grpo | 2 | 0.300 (")
    assert "| +0.400 (+0.400 to +0.400) |" in lines[2]
    assert "searchqa bench suite=hand-v1 algorithm=grpo 'seed=range(5)'" in lines
    assert main(["bench", "leaderboard", "--suite", "hand-v1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "PPO | ours" in said
    assert "P(better than grpo)" in said


def test_a_file_gets_the_table_between_its_markers_and_nothing_else(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = board / "README.md"
    file.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    assert main(["bench", "leaderboard", "--suite", "hand-v1", "--write", str(file)]) == 0
    capsys.readouterr()
    assert main(["bench", "leaderboard", "--suite", "hand-v1", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert file.read_text() == f"# Title\n\n{BEGIN}\n{printed}{END}\n\nafter\n"
    assert block_of(file) == printed.rstrip("\n")
    assert main(["bench", "leaderboard", "--suite", "hand-v1", "--write", str(file)]) == 0
    assert block_of(file) == printed.rstrip("\n")


@pytest.mark.parametrize("text", ["none", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}"])
def test_a_file_without_both_markers_is_left_as_it_is(text: str, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(text)
    with pytest.raises(BenchResultError, match="each once"):
        write_block(file, "table")
    assert file.read_text() == text


def test_the_readme_has_what_the_command_prints() -> None:
    entries = shipped("world-v1")
    has_block = BEGIN in README.read_text(encoding="utf-8")
    assert has_block == bool(entries), (
        "a leaderboard and its place in the README come together: searchqa bench leaderboard --write README.md"
    )
    if entries:
        assert block_of(README) == as_markdown("world-v1", leaderboard("world-v1", entries)), "searchqa bench leaderboard --write README.md"


def test_what_is_not_complete_is_told_beneath(board: Path) -> None:
    part = replace(PPO, runs=PPO.runs[:-1])
    text = as_markdown("hand-v1", leaderboard("hand-v1", {"grpo": GRPO, "ppo": part}, resamples=20))
    assert "PPO &#124; ours has 14 of 15 runs; missing: sparse seed 4." in text


def test_the_table_comes_out_the_same_each_time() -> None:
    first, second = (as_markdown("hand-v1", leaderboard("hand-v1", {"grpo": GRPO, "ppo": PPO}, resamples=50)) for _ in range(2))
    assert first == second


def test_commands_cannot_end_the_block_that_they_stand_in() -> None:
    text = as_markdown("hand-v1", leaderboard("hand-v1", {"grpo": replace(GRPO, command="x\n```\n# Heading")}, resamples=20))
    assert text.count("```") == 2


def test_a_suite_without_results_says_which_have_some(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "leaderboard", "--suite", "nothing"]) == 1
    assert "there are some of: hand-v1" in capsys.readouterr().err
