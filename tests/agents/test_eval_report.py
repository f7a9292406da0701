"""What an evaluation leaves to read: the summary's numbers, a table that says all of them, a picture and a page, and the same again from the files."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from searchqa_agents.cli import main
from searchqa_agents.eval_report import finish, is_evaluation, refresh, summarise
from searchqa_agents.plots import _dots, scores
from searchqa_agents.results import write_results
from searchqa_agents.runs import RunFolder, RunFolderError
from searchqa_agents.table import METRIC_TITLES, amount, in_parts, is_heading, markdown

_spec = importlib.util.spec_from_file_location("results_by_hand", Path(__file__).with_name("results_by_hand.py"))
assert _spec is not None
assert _spec.loader is not None
by_hand: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(by_hand)

TURNS = [
    {"action": "search", "content": "a", "passages": [["p", "A"]], "title_recall": 0.5},
    {"action": "search", "content": "b", "passages": [["q", "B"]], "title_recall": 1.0},
]


def rows_of(*names: str) -> list[dict[str, Any]]:
    """Four questions of each set; the first half with one hop, the others with two; the first set right where the second is wrong."""
    return [
        by_hand.score(name, f"q{i}", em=float((i < 3) != (place > 0)), groups={"hops": 1 + i // 2}, turns=TURNS, tokens=1234.5)
        for place, name in enumerate(names)
        for i in range(4)
    ]


def cells(summary: dict[str, Any], title: str) -> list[str]:
    [row] = [row for row in summary["rows"] if row[0] == title]
    return list(row[1:])


def finished(
    folder: Path, rows: list[dict[str, Any]], changes: dict[str, Any] | None = None, width: int = 100, trajectories: Any = ()
) -> tuple[dict[str, Any], str]:
    """An evaluation's folder as the engine leaves it, and what was printed."""
    names = list(dict.fromkeys(row["set"] for row in rows))
    stamps = {name: {"dataset": name, **by_hand.STAMP, **(changes or {})} for name in names}
    console = Console(file=io.StringIO(), width=width)
    times = [by_hand.seconds(row) for row in rows]
    with RunFolder(folder, command="eval") as opened:
        opened.write_text("config.yaml", "seed: 0\n")
        write_results(folder, rows, times, stamps)
        for name in names:
            if trajectories:
                opened.write_trajectories(name if len(names) > 1 else "eval", trajectories)
        summary = finish(opened, "mine", rows, times, stamps, {name: list(trajectories) for name in names}, {}, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return summary, " ".join(text.split())


# -- summary -----------------------------------------------------------------------------------------------------------------------------------


def test_several_sets_have_their_exact_match_by_hops_and_type(tmp_path: Path) -> None:
    def rows(name: str, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [by_hand.score(name, f"q{i}", em=float(i == 0), groups=own) for i, own in enumerate(groups)]

    two = rows("hotpotqa", [{"type": "bridge", "hops": 2}, {"type": "bridge", "hops": 2}, {"type": "comparison", "hops": 2}])
    three = rows("musique", [{"type": "3hop1", "hops": 3}, {"type": "2hop", "hops": 2}])
    many = rows("popqa", [{"type": f"relation {i}", "hops": 1} for i in range(7)])
    summary, text = finished(tmp_path, [*two, *three, *many], width=200)
    shown = {row[0]: row[1:] for row in summary["rows"] if row[0].startswith(("hops", "type"))}
    assert shown == {
        "hops 1": ["–", "–", "0.143", "–"],
        "hops 2": ["0.333", "0.000", "–", "–"],
        "hops 3": ["–", "1.000", "–", "–"],
        "type bridge": ["0.500", "–", "–", "–"],
        "type comparison": ["0.000", "–", "–", "–"],
    }
    assert "exact match by hops" in text


def test_of_one_set_numbers_intervals_and_groups() -> None:
    rows = rows_of("hotpotqa")
    summary = summarise("mine", rows, [by_hand.seconds(row) for row in rows], {})
    assert (summary["kind"], summary["name"]) == ("eval", "mine")
    assert summary["metrics"]["em"] == 0.75
    assert (summary["metrics"]["questions"], summary["metrics"]["episodes"], summary["metrics"]["backend_errors"]) == (4.0, 4.0, 0.0)
    assert summary["groups"]["hops=2"]["em"] == 0.5
    assert summary["groups"]["hops=2"]["questions"] == 2.0
    assert summary["title_recall_by_turn"] == [0.5, 1.0]
    assert summary["latency"]["mean"] == 1.0
    assert "sets" not in summary
    assert summary["columns"] == ["", "mean", "95% interval", "hops 1", "hops 2"]
    low, high = summary["intervals"]["em"]
    assert cells(summary, "exact match") == ["0.750", f"{low:.3f} to {high:.3f}", "1.000", "0.500"]
    assert cells(summary, "titles found by turn 2, share") == ["1.000", "", "–", "–"]
    assert cells(summary, "tokens sampled")[0] == "1,234.5"
    assert cells(summary, "of these, search")[0] == "0.750"
    assert cells(summary, "questions") == ["4", "", "2", "2"]


def test_of_several_sets_each_counts_alike() -> None:
    rows = [*rows_of("hotpotqa", "bamboogle"), by_hand.score("nq", "q0", em=1.0)]
    summary = summarise("mine", rows, [], {})
    assert {name: own["metrics"]["em"] for name, own in summary["sets"].items()} == {"hotpotqa": 0.75, "bamboogle": 0.25, "nq": 1.0}
    assert summary["metrics"]["em"] == pytest.approx(2 / 3)
    assert summary["columns"] == ["", "HotpotQA", "Bamboogle", "NQ", "mean"]
    assert cells(summary, "exact match") == ["0.750", "0.250", "1.000", "0.667"]
    assert cells(summary, "questions") == ["4", "4", "1", "9"]
    assert "tokens" not in summary["metrics"]  # of one set they are not known
    assert cells(summary, "tokens sampled") == ["1,234.5", "1,234.5", "–", "–"]
    assert cells(summary, "titles found by turn 1, share") == ["0.500", "0.500", "–", "–"]


def test_samples_give_pass_at_k_and_the_majoritys_answer() -> None:
    answers = [["Ada", "Ada", "Bob", "Ada"], ["Bob", "Ada", "Bob", "Cem"]]
    rows = [
        by_hand.score("nq", f"q{i}", sample, answer, em=float(answer == "Ada"))
        for i, own in enumerate(answers)
        for sample, answer in enumerate(own)
    ]
    summary = summarise("mine", rows, [], {})
    assert summary["pass_at"]["em"] == {"1": 0.5, "2": 0.75, "4": 1.0}  # of 4 samples 3 and 1 are right: 1 and 1/2 for two
    assert summary["majority"]["em"] == 0.5
    low, high = summary["pass_at_intervals"]["em"]["2"]
    assert cells(summary, "exact match, any of 2 (pass@2)") == ["0.750", f"{low:.3f} to {high:.3f}"]
    assert cells(summary, "exact match, any of 4 (pass@4)")[0] == "1.000"
    assert cells(summary, "exact match, majority of 4")[0] == "0.500"
    assert cells(summary, "episodes") == ["8", ""]


def test_one_sample_has_no_such_rows() -> None:
    titles = [row[0] for row in summarise("mine", rows_of("nq"), [], {})["rows"]]
    assert not [title for title in titles if "pass@" in title or "majority" in title]
    assert "episodes" not in titles


def test_many_groups_do_not_fill_the_table_but_are_in_the_summary() -> None:
    kinds = [f"{hops}hop{i}" for hops in (2, 3, 4) for i in (1, 2)]
    rows = [by_hand.score("musique", f"q{i}", groups={"type": kind, "hops": int(kind[0])}) for i, kind in enumerate(kinds)]
    summary = summarise("mine", rows, [], {})
    assert summary["columns"] == ["", "mean", "95% interval", "hops 2", "hops 3", "hops 4"]
    assert len(summary["groups"]) == 9


def test_many_turns_have_rows_for_the_first_and_the_last() -> None:
    turns = [{"action": "search", "content": "", "passages": [], "title_recall": i / 10} for i in range(10)]
    summary = summarise("mine", [by_hand.score("nq", "q0", turns=turns)], [], {})
    assert [row[0] for row in summary["rows"] if row[0].startswith("titles")] == [
        f"titles found by turn {i}, share" for i in (1, 2, 3, 4, 5, 10)
    ]


def test_headings_stand_over_rows_only() -> None:
    rows = summarise("mine", [by_hand.score("nq", "q0")], [], {})["rows"]
    headings = [i for i, row in enumerate(rows) if is_heading(row)]
    assert [rows[i][0] for i in headings] == ["answers", "search"]
    assert rows[0][0] == "questions"
    assert not any(is_heading(rows[i + 1]) for i in headings)


# -- files -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("hotpotqa",), ("hotpotqa", "bamboogle")])
def test_files_are_written_and_come_out_the_same_again(tmp_path: Path, names: tuple[str, ...], episode: Any) -> None:
    trajectories = [episode([1, 2], [3, 4], [5, 6], [7])]
    summary, said = finished(tmp_path / "run", rows_of(*names), trajectories=trajectories)
    files = {name: (tmp_path / "run" / name).read_bytes() for name in ("summary.json", "scores.png", "report.html")}
    assert json.loads(files["summary.json"]) == summary
    assert files["scores.png"].startswith(b"\x89PNG")
    assert is_evaluation(tmp_path / "run")
    assert refresh(tmp_path / "run") == summary
    for name, content in files.items():
        assert (tmp_path / "run" / name).read_bytes() == content, name
    page = files["report.html"].decode()
    assert '"sets":["hotpotqa","bamboogle"]' in page if len(names) > 1 else '"sets":["eval"]' in page
    assert "exact match" in page
    assert "data:image/png;base64," in page
    assert "Page: " in said


def test_what_is_printed_says_the_stamp_and_what_others_call_it(tmp_path: Path) -> None:
    _, said = finished(tmp_path / "one", rows_of("hotpotqa"))
    assert "data hotpotqa/dev, corpus aaaaaaaaaaaa, retriever bm25, top_k 3" in said
    assert "substring match is what ZeroSearch's code prints as EM; cover match is R1-Searcher's ACC_R" in said
    _, said = finished(tmp_path / "two", rows_of("hotpotqa", "bamboogle"))
    assert "retriever bm25, top_k 3" in said
    assert "data hotpotqa/dev, corpus aaaaaaaaaaaa" in said
    assert "data bamboogle/dev, corpus aaaaaaaaaaaa" in said
    assert "told the golden answers" not in said


def test_numbers_of_a_search_engine_that_was_told_the_answers_are_marked(tmp_path: Path) -> None:
    _, said = finished(tmp_path / "run", rows_of("hotpotqa"), {"told_the_answer": True})
    assert "was told the golden answers" in said


def test_no_part_of_the_table_is_wider_than_the_terminal(tmp_path: Path) -> None:
    names = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
    summary = summarise("mine", rows_of(*names), [], {})
    parts = in_parts(80, summary["columns"], summary["rows"])
    assert len(parts) == 2
    assert sorted({i for part in parts for i in part}) == list(range(9))
    assert in_parts(200, summary["columns"], summary["rows"]) == [list(range(9))]
    for part in parts:
        width = 1 + sum(3 + max(len(row[i]) for row in [summary["columns"], *summary["rows"]]) for i in part)
        assert width <= 80


def test_judgements_are_in_table_and_summary_after_a_refresh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path / "run", rows_of("hotpotqa"))
    lines = [{"set": "hotpotqa", "id": f"q{i}", "sample": 0, "correct": i == 0} for i in range(2)]
    (tmp_path / "run" / "judgements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run" / "judge.json").write_text('{"model": "wise"}')
    assert refresh(tmp_path / "run")["metrics"]["judge"] == 0.5
    assert main(["report", str(tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert METRIC_TITLES["judge"] in said
    assert "Judged by wise. mine: 2 of 4 answers are judged." in said
    again, said = finished(tmp_path / "run", rows_of("hotpotqa"))  # as when the evaluation is gone on with
    assert again["metrics"]["judge"] == 0.5
    assert "Judged by wise." in said
    again, said = finished(tmp_path / "run", rows_of("musique"))
    assert "judge" not in again["metrics"]


def judge_some(folder: Path, keys: list[tuple[str, str, int]]) -> None:
    lines = [{"set": name, "id": question, "sample": sample, "correct": True} for name, question, sample in keys]
    (folder / "judgements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "judge.json").write_text('{"model": "wise"}')


def test_what_is_judged_in_part_says_of_how_many_and_has_no_mean_over_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    finished(folder, rows_of("hotpotqa", "bamboogle"))
    whole = [("bamboogle", f"q{i}", 0) for i in range(4)]
    judge_some(folder, [("hotpotqa", "q0", 0), *whole])
    summary = refresh(folder)
    assert cells(summary, "judged right") == ["1.000 (1 of 4)", "1.000", "– (5 of 8)"]
    assert "judge" not in summary["metrics"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "1.000 (1 of 4)" in page
    assert "HotpotQA: 1 of 4 answers are judged." in page
    assert main(["report", str(folder)]) == 0
    assert "HotpotQA: 1 of 4 answers are judged." in capsys.readouterr().out
    judge_some(folder, [*(("hotpotqa", f"q{i}", 0) for i in range(4)), *whole])
    assert cells(refresh(folder), "judged right") == ["1.000", "1.000", "1.000"]


def test_a_set_without_any_verdict_is_told_beside_one_that_has(tmp_path: Path) -> None:
    finished(tmp_path / "run", rows_of("hotpotqa", "bamboogle"))
    judge_some(tmp_path / "run", [("hotpotqa", f"q{i}", 0) for i in range(4)])
    summary = refresh(tmp_path / "run")
    assert cells(summary, "judged right") == ["1.000", "– (0 of 4)", "– (4 of 8)"]


def test_of_samples_it_is_answers_that_are_judged(tmp_path: Path) -> None:
    rows = [by_hand.score("nq", f"q{i}", sample, groups={"hops": 1 + i}) for i in range(2) for sample in range(2)]
    finished(tmp_path / "run", rows)
    judge_some(tmp_path / "run", [("nq", f"q{i}", 0) for i in range(2)])
    summary = refresh(tmp_path / "run")
    found = cells(summary, "judged right")
    assert [found[0], *found[2:]] == ["1.000 (2 of 4)", "1.000 (1 of 2)", "1.000 (1 of 2)"]
    assert "mine: 2 of 4 answers are judged." in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_the_picture_and_the_means_of_several_runs_leave_out_what_is_judged_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import searchqa_agents.plots

    drawn: list[Any] = []

    def keep(results: Any, *others: Any) -> bytes:
        drawn.append(results)
        return scores(results, *others)

    monkeypatch.setattr(searchqa_agents.plots, "scores", keep)
    for seed in range(2):
        finished(tmp_path / f"run{seed}", rows_of("hotpotqa"), {"seed": seed})
        judge_some(tmp_path / f"run{seed}", [("hotpotqa", "q0", 0)])
    refresh(tmp_path / "run0")
    assert all("judged right" not in own for own in drawn[-1].values())
    assert main(["report", str(tmp_path)]) == 0
    assert "judged right" not in capsys.readouterr().out
    judge_some(tmp_path / "run0", [("hotpotqa", f"q{i}", 0) for i in range(4)])
    refresh(tmp_path / "run0")
    assert all("judged right" in own for own in drawn[-1].values())


def test_no_judge_is_named_while_no_answer_is_judged(tmp_path: Path) -> None:
    finished(tmp_path / "run", rows_of("hotpotqa"))
    judge_some(tmp_path / "run", [])
    summary, said = finished(tmp_path / "run", rows_of("hotpotqa"))
    assert "judged_by" not in summary
    assert "Judged by" not in said


def test_a_page_says_what_a_reader_has_to_know(tmp_path: Path) -> None:
    finished(tmp_path / "one", rows_of("hotpotqa"), {"told_the_answer": True})
    finished(tmp_path / "two", rows_of("hotpotqa", "bamboogle"))
    pages = [(tmp_path / name / "report.html").read_text(encoding="utf-8") for name in ("one", "two")]
    assert ["was told the golden answers" in page for page in pages] == [True, False]
    assert all("cover match is R1-Searcher" in page for page in pages)


def test_a_narrow_terminal_is_spared_play_and_cost_of_many_sets_and_told_where_they_are(tmp_path: Path) -> None:
    names = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
    summary, narrow = finished(tmp_path / "narrow", rows_of(*names), width=80)
    _, wide = finished(tmp_path / "wide", rows_of(*names), width=200)
    _, one = finished(tmp_path / "one", rows_of("nq"), width=80)
    assert cells(summary, "tokens sampled")
    for text, shown in ((narrow, False), (wide, True), (one, True)):
        assert "searches per question" in text
        assert ("tokens sampled" in text) == shown
        assert ("seconds, share of batch" in text) == shown
        assert ("in summary.json and report.html" in text) != shown


def test_report_of_several_sets_prints_and_gives_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path / "run", rows_of("hotpotqa", "bamboogle"))
    (tmp_path / "run" / "summary.json").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "Bamboogle" in capsys.readouterr().out
    assert main(["report", "--markdown", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "|  | HotpotQA | Bamboogle | mean |" in out
    assert "| **answers** |  |  |  |" in out
    assert "| exact match | 0.750 | 0.250 | 0.500 |" in out


def test_several_evaluations_are_put_together_as_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        finished(tmp_path / f"run{seed}", rows_of("hotpotqa", "bamboogle"), {"seed": seed})
    assert main(["report", str(tmp_path)]) == 0
    assert "Mean over 2 runs" in capsys.readouterr().out


def test_an_unfinished_evaluation_is_gone_on_with_by_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "answers").mkdir()
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert main(["report", str(tmp_path)]) == 1
    assert "searchqa eval resume=" in capsys.readouterr().err


def test_damaged_results_are_no_summary(tmp_path: Path) -> None:
    finished(tmp_path / "run", rows_of("hotpotqa"))
    scores_file = tmp_path / "run" / "scores.jsonl"
    scores_file.write_bytes(scores_file.read_bytes()[:-5])
    with pytest.raises(RunFolderError):
        refresh(tmp_path / "run")


# -- table and picture -------------------------------------------------------------------------------------------------------------------------


def test_large_numbers_are_short() -> None:
    assert [amount(value) for value in (None, 0.5, 99.5, 12345.67)] == ["–", "0.500", "99.500", "12,345.7"]


def test_a_heading_in_markdown_is_bold() -> None:
    assert markdown(["", "a"], [["x", ""], ["y", "1"]]).splitlines()[2:] == ["| **x** |  |", "| y | 1 |"]


def test_the_picture_takes_names_as_they_are_and_does_without_intervals_and_turns() -> None:
    for found in ({}, {"$\\frac{": [0.1, 0.2, 0.2]}, {"a": [0.5]}):
        picture = scores({"$\\frac{": {"exact match": (0.5, None)}, "b": {"F1": (0.0, (0.0, 1.0))}}, found, "$ x", "b")
        assert picture.startswith(b"\x89PNG")


def test_zeros_are_drawn_on_the_whole_scale() -> None:
    axes = Figure().subplots()
    _dots(axes, {"a": {"exact match": (0.0, (0.0, 0.0))}}, ["exact match"], "")
    assert axes.get_xlim() == (0, 1)
