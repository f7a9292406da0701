"""``searchqa bench compare``: what a word names, what is refused, and the files that come of it."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from searchqa_agents.bench import results
from searchqa_agents.bench.results import write_entry
from searchqa_agents.cli import main

_spec = importlib.util.spec_from_file_location("entries_by_hand", Path(__file__).with_name("entries_by_hand.py"))
assert _spec is not None
assert _spec.loader is not None
by_hand: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(by_hand)

TASKS = ("deep", "noisy", "sparse")
LOW, HIGH = (0.1, 0.2, 0.3, 0.4, 0.5), (0.5, 0.6, 0.7, 0.8, 0.9)
GRPO = by_hand.entry_of(dict.fromkeys(TASKS, LOW), "grpo")
PPO = by_hand.entry_of(dict.fromkeys(TASKS, (0.31,) * 5), "ppo")
MINE = by_hand.entry_of(dict.fromkeys(TASKS, HIGH), "mine")
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;\ud800\x1b[31m $\\frac{1}$"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a leaderboard of two and the runs of one more; the current one."""
    for entry in (GRPO, PPO):
        write(tmp_path / "board" / "hand-v1" / f"{entry.algorithm}.json", entry)
    monkeypatch.setattr(results, "LEADERBOARD", tmp_path / "board")
    monkeypatch.setattr("searchqa_agents.bench_compare_command.RESAMPLES", 50)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("searchqa_agents.bench.sides.DEFAULT_SUITE", "hand-v1")
    monkeypatch.chdir(tmp_path)
    by_hand.sweep(tmp_path / "runs" / "bench" / "hand-v1", MINE)
    return tmp_path


def write(path: Path, entry: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_entry(path, entry)
    return path


def compared(*line: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["bench", "compare", *line, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(*line: str, capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    assert main(["bench", "compare", *line]) == code
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def edited(entry: Any, **changes: Any) -> Any:
    """With these parts of each run changed."""
    return by_hand.with_runs([replace(run, **changes) for run in entry.runs], entry.label)


def stamped(entry: Any, **changes: Any) -> Any:
    return by_hand.with_runs([replace(run, stamp={**run.stamp, **changes}) for run in entry.runs], entry.label)


# -- what a word names -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["mine", "runs/bench/hand-v1/mine", "runs/bench/hand-v1", "./runs/bench", "kept.json"])
def test_a_name_a_folder_and_a_file_are_the_same_runs(word: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "kept.json", MINE)
    found = compared(word, capsys=capsys)
    assert [entry["name"] for entry in found["entries"] if entry["mine"]] == ["mine"]
    assert {entry["name"] for entry in found["entries"]} == {"mine", "grpo", "ppo"}
    assert found["entries"][0]["final"]["mean"]["value"] == pytest.approx(0.7)
    assert found["entries"][0]["difference"]["difference"]["value"] == pytest.approx(0.4)


def test_an_entry_of_the_leaderboard_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    found = compared("ppo", capsys=capsys)
    assert [(entry["name"], entry["mine"]) for entry in found["entries"]] == [("ppo", True), ("grpo", False)]


def test_runs_of_yours_that_are_called_as_an_entry_stand_beside_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_hand.sweep(place / "elsewhere", replace(GRPO, runs=GRPO.runs[:15]))
    found = compared("grpo", "--runs", "elsewhere", capsys=capsys)
    assert {entry["name"] for entry in found["entries"]} == {"grpo", "grpo (yours)", "ppo"}
    assert found["baseline"] == "grpo"
    [own] = [entry for entry in found["entries"] if entry["mine"]]
    assert own["difference"]["difference"]["value"] == 0


def test_several_of_yours_and_another_baseline(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "other.json", by_hand.entry_of(dict.fromkeys(TASKS, LOW), "other"))
    found = compared("mine", "other.json", "--baseline", "ppo", capsys=capsys)
    assert found["baseline"] == "ppo"
    assert len(found["sentences"]) == 2


def test_the_suite_of_a_file_is_the_one_compared_in(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "elsewhere.json", edited(MINE, suite="my-suite"))
    found = compared("elsewhere.json", capsys=capsys)
    assert found["suite"] == "my-suite"
    assert [entry["name"] for entry in found["entries"]] == ["mine"]
    assert "no grpo here" in " ".join(found["notes"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["nowhere"], ["no results of 'nowhere'", "mine", "grpo, ppo", "algorithm=nowhere"]),
        (["mien"], ["Did you mean mine?"]),
        (["mine.py"], ["is a plugin", "the name of the algorithm"]),
        (["mine", "./runs/bench/hand-v1/mine", "./runs/bench/hand-v1/mine"], ["named twice"]),
        (["missing.json"], ["missing.json", "no such file"]),
        (["runs/nothing/"], ["runs/nothing"]),
    ],
)
def test_what_is_not_there_is_explained(line: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(*line, capsys=capsys)
    assert [part for part in said if part not in told] == []


def test_a_folder_of_several_algorithms_asks_which(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_hand.sweep(place / "many", MINE, by_hand.entry_of({"deep": LOW}, "other"))
    assert "has runs of mine, other: name one" in refused("many/", capsys=capsys)


@pytest.mark.parametrize(
    "line", [[], ["mine", "--markdown", "--json"], ["mine", "--baseline", "x"], ["mine", "--alow", "x"], ["mine", "--allow", "budgte"]]
)
def test_a_wrong_line_is_a_wrong_line(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(*line, capsys=capsys, code=2)


# -- refusals ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key", "told"),
    [
        (lambda entry: edited(entry, budget=9000), "budget", "budget: 8000 and 9000 (mine) [deep, noisy, sparse]"),
        (lambda entry: edited(entry, task_version=2), "task_version", "task_version: 1 and 2 (mine)"),
        (lambda entry: stamped(entry, top_k=3), "top_k", "top_k: 1 and 3 (mine)"),
        (lambda entry: stamped(entry, corpus_sha256="d" * 64), "corpus", "corpus: cccccccccccc and dddddddddddd (mine)"),
        (lambda entry: stamped(entry, dialect="r1-searcher"), "dialect", "dialect: search-r1 and r1-searcher (mine)"),
    ],
)
def test_what_was_not_measured_alike_is_refused_and_allowed_by_name(
    change: Any, key: str, told: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write(place / "unlike.json", change(MINE)))
    said = refused(file, capsys=capsys)
    assert told in said
    assert f"--allow {key} (or --allow all)" in said
    found = compared(file, "--allow", key, capsys=capsys)
    assert {one["key"] for one in found["differs"]} == {key}
    assert any(note.startswith("≠ Not measured alike") and told in note for note in found["notes"])


def test_other_references_are_refused_with_both_values(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        replace(run, references={"no_search": 0.0, "oracle": 0.5}, points=tuple(replace(p, em=p.em / 2) for p in run.points))
        for run in MINE.runs
    ]
    file = str(write(place / "unlike.json", by_hand.with_runs(runs, "mine")))
    assert "references.oracle: 1.0 and 0.5 (mine)" in refused(file, capsys=capsys)
    assert compared(file, "--allow", "references", capsys=capsys)["differs"]


def test_another_suite_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write(place / "elsewhere.json", edited(MINE, suite="my-suite")))
    assert "suite: hand-v1 and my-suite (mine)" in refused(file, "--suite", "hand-v1", capsys=capsys)


def test_the_algorithm_its_plugin_and_its_seeds_are_what_is_compared(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write(place / "plugin.json", stamped(MINE, plugins={"mine.py": "e" * 64}, commit="f" * 40)))
    found = compared(file, capsys=capsys)
    assert found["differs"] == []
    assert [note for note in found["notes"] if "commit" in note] == ["Noted: commit: 0123456789ab (grpo); ffffffffffff (mine)."]


def test_a_run_that_is_unlike_its_own_entry_is_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [*MINE.runs[:-1], replace(MINE.runs[-1], stamp={**MINE.runs[-1].stamp, "max_turns": 9})]
    said = refused(str(write(place / "mixed.json", by_hand.with_runs(runs, "mine"))), capsys=capsys)
    assert "max_turns: 4 and 9 (mine) [sparse]" in said


# -- what is left out ----------------------------------------------------------------------------------------------------------------------------


def test_tasks_that_are_missing_or_no_part_of_the_leaderboard_are_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = by_hand.entry_of({"deep": HIGH, "sparse": HIGH, "extra": HIGH}, "part")
    found = compared(str(write(place / "part.json", part)), capsys=capsys)
    assert found["tasks"] == ["deep", "sparse"]
    said = " ".join(found["notes"])
    assert "No run on noisy, and so all numbers are of the other tasks: part." in said
    assert "Runs on extra too, which are no part of the leaderboard and left out: part." in said


def test_without_a_common_task_there_is_nothing_to_compare(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write(place / "part.json", by_hand.entry_of({"extra": HIGH}, "part")))
    assert "no task that all have of deep, noisy, sparse" in refused(file, capsys=capsys)


def test_unfinished_jobs_are_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "runs/bench/hand-v1/mine/sparse/seed-4/score.json").unlink()
    found = compared("mine", capsys=capsys)
    said = " ".join(found["notes"])
    assert "mine has 14 of 15 runs; missing: sparse seed 4." in said
    assert "seed-4" in said


# -- files ---------------------------------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements of a page, and the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def page_of(folder: Path) -> tuple[str, Page]:
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_the_table_and_the_words_are_printed_and_the_files_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compare", "mine"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "► mine" in said
    assert "mine is number 1 of 3" in said
    folder = place / "runs/bench/hand-v1/comparison"
    names = {"final_scores.png", "sample_efficiency.png", "performance_profiles.png", "cpu_seconds.png", "report.html"}
    assert {file.name for file in folder.iterdir()} == names
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in folder.glob("*.png"))
    _, page = page_of(folder)
    assert page.count("img") == 4
    assert page.count("tr") == 1 + 3
    assert "+0.400" in page.text
    assert "searchqa bench suite=hand-v1 algorithm=mine" in page.text
    assert '"learning_rate": 0.0005' in page.text


def test_hostile_labels_add_no_element_and_nothing_is_asked_for_from_outside(place: Path) -> None:
    content = json.loads(write(place / "hostile.json", MINE).read_text())
    (place / "hostile.json").write_text(json.dumps({**content, "label": HOSTILE, "command": HOSTILE}))
    assert main(["bench", "compare", "hostile.json", "--out", "out"]) == 0
    text, page = page_of(place / "out")
    assert (page.count("script"), page.count("img"), page.count("tr")) == (1, 4, 1 + 3)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script><img src=x onerror=alert(1)>") >= 3
    policy = next(attributes["content"] for _, attributes in page.elements if attributes.get("http-equiv") == "Content-Security-Policy")
    script = re.search(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    sources = [attributes[name] for _, attributes in page.elements for name in ("src", "href") if name in attributes]
    assert all(source is not None and source.startswith("data:image/png;base64,") for source in sources)
    assert "http://" not in text
    assert "https://" not in text


def test_a_task_whose_name_is_no_word_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write(place / "odd.json", by_hand.entry_of({"deep": HIGH, "\x1b[31m": HIGH}, "odd")))
    assert "task: must be letters" in refused(file, capsys=capsys)


def test_markdown_prints_the_table_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compare", "mine", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| algorithm | rank | IQM | deep | noisy | sparse | mean | best | difference from grpo |")
    assert lines[2].startswith("| **mine** | 1 | 0.700 (")
    assert not (place / "runs/bench/hand-v1/comparison").exists()
