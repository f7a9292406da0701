"""Evaluations beside each other: refused where they were not measured alike, and the numbers of those that were."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from searchqa_agents.cli import main
from searchqa_agents.compare_command import MEAN, paired_over
from searchqa_agents.eval_statistics import DifferentQuestionsError
from searchqa_agents.published_results import published_row
from searchqa_agents.results import write_results

_spec = importlib.util.spec_from_file_location("results_by_hand", Path(__file__).with_name("results_by_hand.py"))
assert _spec is not None
assert _spec.loader is not None
by_hand: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(by_hand)

SETS = {"hotpotqa": [0.0, 0.0, 0.0, 1.0], "bamboogle": [0.0, 1.0]}
BETTER = {"hotpotqa": [1.0, 1.0, 0.0, 1.0], "bamboogle": [1.0, 0.0]}
RAG = "search-r1/qwen2.5-7b/rag"


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    """Two evaluations on the same questions with different agents."""
    first = by_hand.results(tmp_path / "first", SETS)
    second = by_hand.results(tmp_path / "second", BETTER, {"agent": {"kind": "oracle"}, "seed": 1})
    return str(first), str(second)


def compared(*line: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["report", "compare", *line, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# -- refusals ----------------------------------------------------------------------------------------------------------------------------------


def test_runs_that_were_not_measured_alike_are_refused_with_all_that_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = by_hand.results(tmp_path / "first", SETS)
    retriever = {"retriever": "bm25", "k1": 0.9, "corpus_sha256": "a" * 64}
    second = by_hand.results(tmp_path / "second", SETS, {"top_k": 5, "retriever": retriever, "agent": {"kind": "oracle"}})
    assert main(["report", "compare", str(first), str(second)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "retriever.k1: 1.5 and 0.9\n" in said.err
    assert "top_k: 3 and 5\n" in said.err
    assert "--allow retriever.k1,top_k" in said.err
    assert "agent" not in said.err


def test_what_is_allowed_is_told_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = str(by_hand.results(tmp_path / "first", SETS))
    second = str(by_hand.results(tmp_path / "second", BETTER, {"top_k": 5, "samples": 2}))
    assert main(["report", "compare", first, second, "--allow", "top_k"]) == 1
    assert "samples: 1 and 2" in capsys.readouterr().err
    assert main(["report", "compare", first, second, "--allow", "top_k,samples", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| second ≠ |") for line in lines) == 2 * 3
    assert sum(line.startswith("| first |") for line in lines) == 2 * 3
    assert [line for line in lines if line.startswith("| **≠ top_k: 3 and 5**")]
    assert main(["report", "compare", first, second, "--allow", "all"]) == 0
    assert "NOT MEASURED ALIKE in top_k, samples" in " ".join(capsys.readouterr().out.split())


def test_a_difference_in_some_sets_only_says_in_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = by_hand.results(tmp_path / "first", SETS)
    second = by_hand.results(tmp_path / "second", SETS)
    stamp = json.loads((second / "stamp.json").read_text())
    stamp["sets"]["bamboogle"]["top_k"] = 7
    (second / "stamp.json").write_text(json.dumps(stamp))
    assert main(["report", "compare", str(first), str(second)]) == 1
    assert "top_k: 3 and 7 [Bamboogle]" in capsys.readouterr().err


def test_a_published_row_and_a_run_are_refused_for_what_cannot_be_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(by_hand.results(tmp_path / "run", {"hotpotqa": [0.0, 1.0]}))
    assert main(["report", "compare", run, f"published:{RAG}"]) == 1
    said = capsys.readouterr().err
    for key in ("questions", "corpus", "retriever"):
        assert f"  {key}: " in said
    assert "E5-base-v2 (cannot be compared)" in said
    assert "top_k" not in said


def test_tables_of_two_papers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "compare", f"published:{RAG}", "published:zerosearch/qwen2.5-7b/rag"]) == 1
    said = capsys.readouterr().err
    for line in ("metric: em and sub_em (printed as EM)", "top_k: 3 and 5", "corpus: wiki-18", "retriever: E5-base-v2 and Google"):
        assert line in said


def test_a_training_run_is_sent_to_report(tmp_path: Path, two: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "summary.json").write_text('{"kind": "train"}')
    assert main(["report", "compare", two[0], str(tmp_path / "training")]) == 1
    assert "training run" in capsys.readouterr().err


def test_runs_without_a_common_set_are_refused(tmp_path: Path, two: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    other = by_hand.results(tmp_path / "other", {"nq": [1.0]})
    assert main(["report", "compare", two[0], str(other), "--allow", "all"]) == 1
    assert "no set that all have" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", [[], ["--metric", "em"], ["{first}"], ["{first}", "{second}", "--metric", "judge"], ["{first}", "--alow", "x"]]
)
def test_a_wrong_line_is_a_wrong_line(line: list[str], two: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [word.format(first=two[0], second=two[1]) for word in line]
    assert main(["report", "compare", *words]) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "said"), [("published:search-r1/rag", "no published row"), ("nowhere", "nowhere"), ("{first}", "named twice")]
)
def test_what_is_not_there_is_explained(word: str, said: str, two: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "compare", two[0], word.format(first=two[0])]) == 1
    assert said in capsys.readouterr().err


def test_who_judged_matters_to_judgements_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [by_hand.results(tmp_path / name, {"nq": [0.0, 1.0]}) for name in ("one", "two")]
    for folder, model in zip(folders, ("small", "large"), strict=True):
        lines = [{"set": "nq", "id": f"q{i}", "sample": 0, "correct": i == 1} for i in range(2)]
        (folder / "judgements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "judge.json").write_text(json.dumps({"model": model, "url": f"http://{model}"}))
    words = [str(folder) for folder in folders]
    assert main(["report", "compare", *words]) == 1
    assert "judge.model: small and large" in capsys.readouterr().err
    found = compared(*words, "--metric", "em", capsys=capsys)
    assert list(found["tables"]) == ["em"]
    found = compared(*words, "--allow", "judge", capsys=capsys)
    assert list(found["tables"]) == ["em", "f1", "judge"]


def test_answers_of_which_only_some_are_judged_are_paired_where_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [by_hand.results(tmp_path / name, {"nq": [0.0, 1.0, 1.0]}) for name in ("one", "two")]
    for folder, count in zip(folders, (2, 3), strict=True):
        lines = [{"set": "nq", "id": f"q{i}", "sample": 0, "correct": True} for i in range(count)]
        (folder / "judgements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "judge.json").write_text('{"model": "wise"}')
    words = [str(folder) for folder in folders]
    assert main(["report", "compare", *words]) == 1
    said = capsys.readouterr().err
    assert "  judged: 2 of 3 answers (hash " in said
    assert " and all answers\n" in said
    assert "--allow judged " in said
    for key in ("questions", "judged"):
        own = compared(*words, "--allow", key, capsys=capsys)["tables"]["judge"]["nq"]
        assert (own["two"]["questions"], own["two"]["paired"]["questions"]) == (3, 2)
        assert [(own[name]["judged"], own[name]["answers"]) for name in ("one", "two")] == [(2, 3), (None, None)]
    for line in (words, words[::-1]):
        assert main(["report", "compare", *line, "--allow", "judged", "--markdown"]) == 0
        out = capsys.readouterr().out
        assert "| **≠ one: only 2 of 3 answers are judged** |" in out
        assert f"| **≠ {Path(line[1]).name}: some differences are of the questions in common, 2 of 3** |" in out
    assert main(["report", "compare", *words, "--metric", "em"]) == 0
    assert "judged" not in capsys.readouterr().out


def judged(folder: Path, keys: list[tuple[str, str, int]]) -> str:
    lines = [{"set": name, "id": question, "sample": sample, "correct": True} for name, question, sample in keys]
    (folder / "judgements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "judge.json").write_text('{"model": "wise"}')
    return str(folder)


def test_two_that_are_partly_judged_alike_are_told_and_have_no_mean_over_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [("hotpotqa", "q0", 0), ("hotpotqa", "q2", 0), ("bamboogle", "q0", 0), ("bamboogle", "q1", 0)]
    words = [judged(by_hand.results(tmp_path / name, SETS), keys) for name in ("one", "two")]
    found = compared(*words, "--metric", "judge", capsys=capsys)
    assert found["differs"] == []
    assert list(found["tables"]["judge"]) == ["hotpotqa", "bamboogle"]
    assert [(cell["judged"], cell["answers"]) for cell in found["tables"]["judge"]["hotpotqa"].values()] == [(2, 4)] * 2
    assert main(["report", "compare", *words, "--metric", "judge", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "≠ one: only 2 of 4 answers are judged [HotpotQA]" in out
    assert "≠ two: only 2 of 4 answers are judged [HotpotQA]" in out
    assert "| 2 of 4 answers |" in out
    other = judged(by_hand.results(tmp_path / "three", SETS), [("hotpotqa", "q1", 0), *keys[1:]])
    assert main(["report", "compare", words[0], other]) == 1  # as many, but not the same
    assert "judged: 2 of 4 answers" in capsys.readouterr().err


def test_of_samples_the_answers_count_that_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for name, samples in (("one", 1), ("two", 2)):
        rows = [by_hand.score("nq", f"q{i}", sample) for i in range(3) for sample in range(2)]
        (tmp_path / name).mkdir()
        write_results(tmp_path / name, rows, [], {"nq": {"dataset": "nq", **by_hand.STAMP, "samples": 2}})
        folders.append(judged(tmp_path / name, [("nq", f"q{i}", sample) for i in range(3) for sample in range(samples)]))
    assert main(["report", "compare", *folders]) == 1
    assert "judged: 3 of 6 answers" in capsys.readouterr().err


def test_a_run_without_a_search_engine_stands_beside_those_that_search_and_these_must_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    direct = str(by_hand.results(tmp_path / "direct", SETS, {"retriever": {"retriever": "none"}, "top_k": 5, "agent": {"kind": "direct"}}))
    rag = str(by_hand.results(tmp_path / "rag", BETTER))
    more = str(by_hand.results(tmp_path / "more", BETTER, {"top_k": 5}))
    for line in ([direct, rag], [rag, direct], [direct, more]):
        found = compared(*line, capsys=capsys)
        assert found["differs"] == []
        assert {one["key"] for one in found["noted"]} == {"agent", "retriever"}
    assert main(["report", "compare", direct, rag, more]) == 1
    said = capsys.readouterr().err
    assert "rag and more were not measured alike" in said
    assert "  top_k: 3 and 5\n" in said
    assert main(["report", "compare", direct, rag, more, "--allow", "top_k"]) == 0


@pytest.mark.parametrize("table", ["search-r1/qwen2.5-7b", "zerosearch/qwen2.5-3b"])
def test_retrieval_and_none_of_one_published_table_stand_side_by_side(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(f"published:{table}/direct", f"published:{table}/rag", capsys=capsys)
    assert found["differs"] == []
    assert [one["a"] for one in found["noted"] if one["key"] == "retriever"] == ["none"]


def test_a_key_to_allow_that_is_none_is_a_wrong_line(two: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(
        by_hand.results(tmp_path / "other", SETS, {"top_k": 5, "retriever": {"retriever": "bm25", "k1": 2, "corpus_sha256": "a" * 64}})
    )
    for key, near in (("topk", "top_k"), ("retriever.k2", "retriever.k1"), ("question", "questions")):
        assert main(["report", "compare", two[0], other, "--allow", key]) == 2
        said = capsys.readouterr().err
        assert f"--allow {key} names no part" in said
        assert f"Nearest to it: {near}" in said
    assert main(["report", "compare", two[0], other, "--allow", "seed,budgets,retriever"]) == 1
    assert "--allow retriever,top_k (or" in capsys.readouterr().err  # without what allows nothing here


def test_a_title_speaks_of_questions_only_where_pairs_are(two: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "compare", *two]) == 0
    assert "question by question" in " ".join(capsys.readouterr().out.split())
    assert main(["report", "compare", f"published:{RAG}", "published:search-r1/qwen2.5-7b/ircot"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "differences are from the first" in out
    assert "question by question" not in out


# -- numbers -----------------------------------------------------------------------------------------------------------------------------------


def test_numbers_by_hand(two: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(*two, capsys=capsys)
    assert found["differs"] == []
    assert {one["key"] for one in found["noted"]} == {"agent", "seed"}
    assert found["sets"] == ["hotpotqa", "bamboogle"]
    assert list(found["tables"]) == ["em", "f1"]
    table = found["tables"]["em"]
    cells = {name: [own[side]["value"] for side in ("first", "second")] for name, own in table.items()}
    assert cells == {"hotpotqa": [0.25, 0.75], "bamboogle": [0.5, 0.5], MEAN: [0.375, 0.625]}
    differences = {name: own["second"]["difference"] for name, own in table.items()}
    assert differences == {"hotpotqa": 0.5, "bamboogle": 0.0, MEAN: 0.25}
    pairs = {name: (own["second"]["paired"]["better"], own["second"]["paired"]["worse"]) for name, own in table.items()}
    assert pairs == {"hotpotqa": (2, 0), "bamboogle": (1, 1), MEAN: (3, 1)}
    assert table["hotpotqa"]["second"]["paired"]["p_value"] == 0.5  # 2 of the 4 assignments of signs
    low, high = table["hotpotqa"]["second"]["paired"]["interval"]
    assert 0 <= low < 0.5 < high <= 1
    assert table["hotpotqa"]["first"]["paired"] is None
    assert table[MEAN]["second"]["questions"] == 6


def test_a_question_of_a_small_set_weighs_more_in_the_mean_over_sets(tmp_path: Path) -> None:
    rows = [
        {"large": [by_hand.score("large", f"q{i}", em=0.0) for i in range(4)], "small": [by_hand.score("small", "q0", em=0.0)]},
        {"large": [by_hand.score("large", f"q{i}", em=float(i < 2)) for i in range(4)], "small": [by_hand.score("small", "q0", em=1.0)]},
    ]
    pair = paired_over(*rows, ["large", "small"], "em")
    assert pair is not None
    assert (pair.first, pair.second, pair.difference) == (0.0, 0.75, 0.75)
    assert (pair.questions, pair.better, pair.worse, pair.equal) == (5, 3, 0, 2)
    # of 1/4, 1/4 and 1 with any signs, only all alike are as far from 0: 2 of 8; unweighted it would be the same, so also with one turned round
    assert pair.p_value == 0.25
    rows[1]["large"] = [by_hand.score("large", f"q{i}", em=(-1.0, -1.0, 0.0, 0.0)[i]) for i in range(4)]
    pair = paired_over(*rows, ["large", "small"], "em")
    assert pair is not None
    assert pair.difference == 0.25
    assert pair.p_value == 1.0  # |1 - 1/4 - 1/4| is the least there can be
    assert pair.interval[0] >= (-1.0 + 1.0) / 2  # the one question of the small set is in every resample of it


def test_samples_of_a_question_are_averaged_before_pairing() -> None:
    first = {"nq": [by_hand.score("nq", "q0", sample, em=float(sample == 0)) for sample in range(4)]}
    second = {"nq": [by_hand.score("nq", "q0", sample, em=float(sample < 3)) for sample in range(4)]}
    pair = paired_over(first, second, ["nq"], "em")
    assert pair is not None
    assert (pair.questions, pair.difference, pair.better) == (1, 0.5, 1)


def test_different_questions_are_paired_where_allowed_only() -> None:
    def rows(names: str) -> dict[str, list[dict[str, Any]]]:
        return {"nq": [by_hand.score("nq", name, em=1.0) for name in names]}

    with pytest.raises(DifferentQuestionsError):
        paired_over(rows("abc"), rows("bcd"), ["nq"], "em")
    pair = paired_over(rows("abc"), rows("bcd"), ["nq"], "em", common=True)
    assert pair is not None
    assert pair.questions == 2
    assert paired_over(rows("ab"), rows("cd"), ["nq"], "em", common=True) is None


def test_pairs_of_some_questions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = str(by_hand.results(tmp_path / "first", {"nq": [1.0, 0.0]}))
    second = str(by_hand.results(tmp_path / "second", {"nq": [1.0, 0.0, 1.0]}, {"questions_played": 3}))
    assert main(["report", "compare", first, second, "--allow", "questions", "--markdown", "--metric", "em"]) == 0
    out = capsys.readouterr().out
    assert "differences are of the questions in common, 2 of 3" in out
    assert "| second ≠ | 0.667 |" in out


def test_published_rows_have_differences_without_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(f"published:{RAG}", "published:search-r1/qwen2.5-7b/ircot", capsys=capsys)
    cell = found["tables"]["em"]["hotpotqa"]["search-r1/qwen2.5-7b/ircot"]
    assert cell["difference"] == pytest.approx(0.133 - 0.299)
    assert (cell["interval"], cell["paired"], cell["questions"]) == (None, None, 7405)
    assert found["tables"]["em"][MEAN][RAG]["value"] == published_row(RAG).average("em")
    assert found["sides"][RAG]["source"] == published_row(RAG).source


def test_averages_of_ablations_stand_in_the_row_of_the_mean(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"search-r1-ablations/qwen2.5-3b/{name}" for name in ("mask-on", "mask-off")]
    table = compared(*(f"published:{name}" for name in names), capsys=capsys)["tables"]["em"]
    assert list(table) == [MEAN]
    assert table[MEAN][names[1]]["difference"] == pytest.approx(0.262 - 0.303)


def test_a_run_beside_a_published_row_shows_the_published_metric_over_common_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(by_hand.results(tmp_path / "run", {"bamboogle": [0.0, 1.0], "nq": [1.0, 1.0]}, cover_em=1.0))
    line = [run, "published:r1-searcher/qwen2.5-7b/rl-zero", "--allow", "all"]
    found = compared(*line, capsys=capsys)
    assert found["sets"] == ["bamboogle"]
    assert list(found["tables"]) == ["cover_em"]
    own = found["tables"]["cover_em"]["bamboogle"]
    assert own["run"]["value"] == 1.0
    assert own["r1-searcher/qwen2.5-7b/rl-zero"]["difference"] == pytest.approx(0.528 - 1)
    assert main(["report", "compare", *line]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "run has other sets too, which are left out: NQ." in said
    assert "arXiv 2503.05592" in said


def test_other_metrics_side_by_side_have_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(f"published:{RAG}", "published:zerosearch/qwen2.5-7b/rag", "--allow", "all", capsys=capsys)
    own = found["tables"]["em | sub_em"]["nq"]
    assert {side: (cell["metric"], cell["difference"]) for side, cell in own.items()} == {
        RAG: ("em", None),
        "zerosearch/qwen2.5-7b/rag": ("sub_em", None),
    }


def test_every_form_of_the_results_gives_the_same(two: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    whole = compared(*two, capsys=capsys)["tables"]
    assert compared(f"{two[0]}/scores.jsonl", f"{two[1]}/results.parquet", capsys=capsys)["tables"] == whole


def test_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "compare", "--help"]) == 0
    assert "--allow" in capsys.readouterr().out
