"""``searchqa bench submit``: everything that is wrong is told at once, and what is written is an entry that can be read and compared."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from searchqa_agents.bench import results
from searchqa_agents.bench.results import read_entry, shipped, write_entry
from searchqa_agents.bench.sides import pasteable, wanted_tasks
from searchqa_agents.bench_submit_command import wrong_with
from searchqa_agents.cli import main

_spec = importlib.util.spec_from_file_location("entries_by_hand", Path(__file__).with_name("entries_by_hand.py"))
assert _spec is not None
assert _spec.loader is not None
by_hand: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(by_hand)

TASKS = ("deep", "noisy", "sparse")
SCORES = (0.5, 0.6, 0.7, 0.8, 0.9)
PLUGIN = "print('an algorithm')\n"
HASH = hashlib.sha256(PLUGIN.encode()).hexdigest()
SHIPPED = shipped("world-v1")
MINE = by_hand.entry_of(dict.fromkeys(TASKS, SCORES), "mine", stamp={"plugins": {"mine.py": HASH}})


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a leaderboard, and a plugin; the current one."""
    (tmp_path / "board" / "hand-v1").mkdir(parents=True)
    write_entry(tmp_path / "board" / "hand-v1" / "grpo.json", by_hand.entry_of(dict.fromkeys(TASKS, SCORES), "grpo"))
    monkeypatch.setattr(results, "LEADERBOARD", tmp_path / "board")
    monkeypatch.setattr("searchqa_agents.bench.sides.DEFAULT_SUITE", "hand-v1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PLUGIN)
    return tmp_path


def submitted(*runs: Any, line: tuple[str, ...] = ()) -> int:
    by_hand.sweep(Path("runs/bench/hand-v1"), by_hand.with_runs(runs, "mine"))
    return main(["bench", "submit", "mine", *line])


def test_what_is_written_is_the_entry_with_what_was_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submitted(*MINE.runs, line=("--label", "Mine, lr 5e-4", "--tried", "8", "--code", "mine.py", "--out", "sent.json")) == 0
    said = capsys.readouterr().out
    assert "Written: sent.json (15 runs, " in said
    assert f"Command: {MINE.command}" in said
    assert f"Plugin: sha256 {HASH}" in said
    assert "bench/leaderboard/hand-v1/mine.json" in said
    entry = read_entry("sent.json")
    assert (entry.label, entry.command, len(entry.runs)) == ("Mine, lr 5e-4", MINE.command, 15)
    assert entry.stamp["configurations_tried"] == 8
    assert entry.stamp["code"] == {"file": "mine.py", "sha256": HASH}
    assert [run.points for run in entry.runs] == [run.points for run in MINE.runs]
    assert main(["bench", "compare", "sent.json", "--json"]) == 0
    assert '"Mine, lr 5e-4"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ("searchqa bench algo=grpo seed=range(5)", "searchqa bench algo=grpo 'seed=range(5)'"),
        ("searchqa bench 'seed=range(5)' plugins=['/a/b.py']", "searchqa bench 'seed=range(5)' plugins=['/a/b.py']"),
        ("searchqa bench seed=0 && searchqa bench seed=[1,2]", "searchqa bench seed=0 && searchqa bench 'seed=[1,2]'"),
    ],
)
def test_a_command_can_be_given_to_a_shell_as_it_is_told(told: str, line: str) -> None:
    assert pasteable(told) == line


def test_what_is_not_told_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert submitted(*MINE.runs) == 0
    said = capsys.readouterr().out
    assert "--tried N" in said
    assert "--code FILE_OR_URL" in said
    assert Path("mine.json").is_file()


def test_runs_beyond_the_protocol_are_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    more = [by_hand.run_of("deep", 7, 0.9), by_hand.run_of("extra", 0, 0.9)]
    assert submitted(*MINE.runs, *more) == 0
    assert "Left out, as no part of the leaderboard: deep seed 7, extra seed 0." in capsys.readouterr().out
    assert len(read_entry("mine.json").runs) == 15


def test_everything_that_is_wrong_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    runs = {(run.task, run.seed): run for run in MINE.runs}
    del runs["noisy", 3], runs["noisy", 4]
    runs["deep", 1] = replace(runs["deep", 1], settings={**runs["deep", 1].settings, "learning_rate": 1e-3})
    runs["deep", 2] = replace(runs["deep", 2], stamp={**runs["deep", 2].stamp, "searchqa_gym": "0.0.9"})
    for seed in range(5):
        runs["sparse", seed] = replace(runs["sparse", seed], task_version=2, budget=4000, stamp={**runs["sparse", seed].stamp, "top_k": 5})
    assert submitted(*runs.values()) == 1
    said = capsys.readouterr().err
    for part in (
        "noisy: there is no result of seeds 3 4.",
        f"runs what is missing, with the settings of the line that made the others: `{MINE.command}`",
        "settings.learning_rate must be one for all tasks and seeds",
        "0.001 (deep seed 1)",
        "sparse: task_version must be 1; it is 2.",
        "sparse: budget must be 8000; it is 4000.",
        "sparse seed 0: used 8,000 sampled tokens of a budget of 4,000",
        "Not measured alike: top_k: 1 and 5",
        "must be of one version of searchqa-gym; they are of 0.0.9, 0.1.0",
    ):
        assert part in said, part
    assert not Path("mine.json").exists()


def test_the_protocol_of_the_suite_is_what_its_files_say() -> None:
    tasks = wanted_tasks("world-v1", {})
    assert len(tasks) == 3
    for name, wanted in tasks.items():
        file = files("searchqa_conf").joinpath("task", f"{name}.yaml").read_text(encoding="utf-8")
        assert f"version: {wanted.version}\n" in file
        assert f"budget: {wanted.budget} " in file


@pytest.mark.parametrize("algorithm", sorted(SHIPPED))
def test_every_shipped_entry_follows_the_protocol(algorithm: str) -> None:
    assert wrong_with(SHIPPED[algorithm], wanted_tasks("world-v1", SHIPPED), SHIPPED) == []


def test_seeds_and_budgets_may_differ_in_the_settings() -> None:
    runs = [replace(run, settings={**run.settings, "token_budget": 1000 * len(run.task)}) for run in MINE.runs]
    assert submitted(*runs) == 0


def test_a_setting_that_only_some_runs_have_is_another_setting(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [MINE.runs[0], *(replace(run, settings={**run.settings, "clip_coef": 0.3}) for run in MINE.runs[1:])]
    assert submitted(*runs) == 1
    assert "settings.clip_coef must be one" in capsys.readouterr().err


def test_unfinished_runs_are_named_with_the_line_that_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand.sweep(Path("runs/bench/hand-v1"), MINE)
    Path("runs/bench/hand-v1/mine/deep/seed-4/score.json").unlink()
    assert main(["bench", "submit", "mine"]) == 1
    said = capsys.readouterr().err
    assert "deep: there is no result of seed 4." in said
    assert "runs/bench/hand-v1/mine/deep/seed-4 was begun" in said


def test_another_file_than_the_plugin_of_the_runs_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mine.py").write_text("print('changed since')\n")
    assert submitted(*MINE.runs, line=("--code", "mine.py")) == 1
    assert "is not the plugin that the runs were made with" in capsys.readouterr().err


@pytest.mark.parametrize("line", [[], ["--out", "mine.txt"], ["--tried", "-1"], ["--code", "nowhere.py"], ["--unknown"]])
def test_a_wrong_line_is_a_wrong_line(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    write_entry("mine.json", MINE)
    assert main(["bench", "submit", *(["mine.json"] if line else []), *line]) == 2
    assert capsys.readouterr().err


def test_a_suite_that_nothing_is_known_of_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    write_entry("mine.json", by_hand.with_runs([replace(run, suite="my-suite") for run in MINE.runs], "mine"))
    assert main(["bench", "submit", "mine.json"]) == 1
    assert "my-suite" in capsys.readouterr().err
