"""``searchqa eval score``: rows of other code, of R1-Searcher and of our own runs; what cannot be scored; figures and intervals."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_agents.answer_rows import read_answers
from searchqa_agents.cli import main
from searchqa_agents.score_command import bootstrap_interval
from searchqa_envs.errors import MalformedRowError

ROWS: list[dict[str, Any]] = [
    {"question": "a", "answer": "Paris", "pred_ans": "Paris, France", "stop_reason_final": "finished", "type": "bridge"},
    {"question": "b", "answer": ["yes", "yes sir"], "prediction": "yes it is", "type": "comparison"},
    {"question": "c", "golden_answers": ["U.S."], "prediction": "u s", "metadata": {"hops": 2}},
    {"question": "d", "golden_answers": "Rome", "prediction": None, "type": "bridge"},
    {"question": "e", "answer": True, "pred_ans": "yes"},
]
# Against SQuAD's form:   em 0 0 0 0 1, f1 2/3 1/2 0 0 1 (yes it is against yes sir: 2*1/(3+2), against yes: 2*1/(3+1)), cover 1 1 0 0 1, sub 1 1 0 0 1.
SQUAD = {"em": 1 / 5, "f1": (2 / 3 + 1 / 2 + 1) / 5, "cover_em": 3 / 5, "sub_em": 3 / 5}
# Against R1-Searcher's:  em 0 0 1 0 1, f1 2/3 2/5 1 0 1 (against yes alone it would be 0), cover 1 1 1 0 1, sub 1 1 1 0 1.
R1_SEARCHER = {"em": 2 / 5, "f1": (2 / 3 + 2 / 5 + 2) / 5, "cover_em": 4 / 5, "sub_em": 4 / 5}


def write(path: Path, rows: list[Any]) -> str:
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def scored(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["eval", "score", *words, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    result: dict[str, Any] = json.loads(out)
    return result


@pytest.mark.parametrize(("style", "expected"), [("search-r1", SQUAD), ("zerosearch", SQUAD), ("r1-searcher", R1_SEARCHER)])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "packed.gz", "unnamed"])
def test_figures_are_means_over_all_rows(
    style: str, expected: dict[str, float], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = scored(capsys, write(tmp_path / name, ROWS), "--style", style)
    assert {measure: result[measure] for measure in expected} == pytest.approx(expected, abs=1e-15)
    assert (result["n"], result["questions"], result["unanswered"], result["style"]) == (5, 5, 1, style)
    assert result["headline"] == {"search-r1": "em", "zerosearch": "sub_em", "r1-searcher": "cover_em"}[style]
    for measure, (low, high) in result["intervals"].items():
        assert 0 <= low <= result[measure] <= high <= 1


def test_figures_have_all_their_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"answer": "Paris", "prediction": "Paris" if number < 327 else "Rome"} for number in range(500)]
    assert scored(capsys, write(tmp_path / "rows.jsonl", rows), "--style", "r1-searcher")["cover_em"] == 0.654
    assert scored(capsys, write(tmp_path / "rows.jsonl", rows[:333]), "--style", "search-r1")["em"] == 327 / 333


def test_the_table_shows_figures_intervals_and_what_the_system_publishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "score", write(tmp_path / "rows.jsonl", ROWS), "--style", "r1-searcher", "--by", "type"]) == 0
    out = capsys.readouterr().out
    assert "5 answers, 1 of them none" in out
    assert "0.8000" in out
    assert "cover_em" in out
    assert "ACC_R" in out
    assert "95% interval" in out
    assert "bridge" in out
    assert "(none)" in out


def test_groups_by_a_field_or_a_field_of_a_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "rows.jsonl", [*ROWS, {"answer": "x", "prediction": "x", "metadata.hops": "said so"}])
    result = scored(capsys, file, "--style", "search-r1", "--by", "type")
    assert {name: (group["n"], group["em"], group["unanswered"]) for name, group in result["groups"].items()} == {
        "bridge": (2, 0, 1),
        "comparison": (1, 0, 0),
        "(none)": (3, 2 / 3, 0),
    }
    assert sum(group["n"] for group in result["groups"].values()) == result["n"]
    assert set(scored(capsys, file, "--style", "search-r1", "--by", "metadata.hops")["groups"]) == {"2", "(none)", "said so"}


def test_verdicts_that_a_file_keeps_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"question": "q", "answer": "Yes", "pred_ans": " Yes ", "stop_reason_final": "finished", "gen_text_store": "..."}
    said = ["True", "True", "False", "Hm", None]
    file = write(tmp_path / "rows.jsonl", [names, *({**names, "gpt4o_output": one} for one in said)])
    result = scored(capsys, file, "--style", "r1-searcher")
    assert (result["n"], result["cover_em"]) == (6, 1)
    assert result["recorded_judge"] == {"n": 6, "judge": 2 / 6, "unreadable": 2, "missing": 1}
    assert main(["eval", "score", file, "--style", "r1-searcher"]) == 0
    said = "recorded verdicts (gpt4o_output): 0.3333 of all 6 rows are True; 2 are unreadable and 1 missing"
    assert said in capsys.readouterr().out
    assert "recorded_judge" not in scored(capsys, write(tmp_path / "rows.jsonl", ROWS), "--style", "r1-searcher")


def test_rows_of_our_own_runs_are_scored_and_samples_of_a_question_averaged_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def own(question: str, sample: int, answer: str | None, set_name: str = "nq") -> dict[str, Any]:
        names = {"schema_version": 1, "set": set_name, "id": question, "sample": sample, "question": "?", "golden_answers": ["Paris"]}
        return {**names, "answer": answer, "groups": {"type": "bridge"}, "metrics": {}, "turns": []}

    rows = [
        own("1", 0, "Paris"),
        own("1", 1, "Rome"),
        own("1", 2, None),
        own("1", 3, "Paris"),
        own("2", 0, "Paris"),
        own("1", 0, "", "popqa"),
    ]
    result = scored(capsys, write(tmp_path / "scores.jsonl", rows), "--style", "search-r1", "--by", "set")
    assert (result["n"], result["questions"], result["unanswered"]) == (6, 3, 2)
    assert result["em"] == pytest.approx((2 / 4 + 1 + 0) / 3)
    assert {name: group["em"] for name, group in result["groups"].items()} == pytest.approx({"nq": (2 / 4 + 1) / 2, "popqa": 0})


def test_the_standard_input_plain_or_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = scored(capsys, write(tmp_path / "rows.jsonl", ROWS), "--style", "r1-searcher")
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        with Path(write(tmp_path / name, ROWS)).open("rb") as file:
            words = [sys.executable, "-m", "searchqa_agents.cli", "eval", "score", "-", "--style", "r1-searcher", "--json"]
            done = subprocess.run(words, stdin=file, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout) == expected


def test_scoring_loads_nothing_heavy(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS)
    code = (
        f"import sys; from searchqa_agents import cli; assert cli.main(['eval', 'score', {file!r}, '--style', 'search-r1', '--json']) == 0; "
        "heavy = {'torch', 'hydra', 'transformers', 'omegaconf', 'scipy', 'pyarrow', 'numba'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_empty_lines_a_byte_order_mark_and_other_line_ends_are_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"answer": "x", "prediction": "x"}\r\n\r\n  \n{"answer": "y", "pred_ans": "y"}')
    assert [(row.line, row.golden_answers, row.prediction) for row in read_answers(str(file))] == [(1, ("x",), "x"), (4, ("y",), "y")]


def test_both_names_of_a_prediction_may_agree(tmp_path: Path) -> None:
    [row] = read_answers(
        write(tmp_path / "rows.jsonl", [{"answer": "x", "golden_answers": ["x", "y"], "prediction": "y", "pred_ans": "y"}])
    )
    assert (row.golden_answers, row.prediction) == (("x", "y"), "y")


def test_numbers_and_truth_values_are_text_on_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"answer": 1988, "prediction": "1988"},
        {"answer": "1988", "pred_ans": 1988},
        {"golden_answers": [2.5, "x"], "prediction": 2.5},
        {"answer": True, "prediction": "Yes"},
        {"answer": "no", "prediction": False},
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    assert [(row.golden_answers, row.prediction) for row in read_answers(file)] == [
        (("1988",), "1988"),
        (("1988",), "1988"),
        (("2.5", "x"), "2.5"),
        (("yes",), "Yes"),
        (("no",), "no"),
    ]
    assert scored(capsys, file, "--style", "search-r1")["em"] == 1


def test_the_strings_true_and_false_are_what_the_style_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "rows.jsonl", [{"answer": "yes", "prediction": "True"}])
    assert [scored(capsys, file, "--style", style)["em"] for style in ("r1-searcher", "search-r1")] == [1, 0]


def test_golden_answers_of_null_fall_back_to_the_answer(tmp_path: Path) -> None:
    rows = read_answers(write(tmp_path / "rows.jsonl", [{"golden_answers": None, "answer": "x", "prediction": "y"}]))
    assert [(row.golden_answers, row.prediction) for row in rows] == [(("x",), "y")]


def test_a_first_line_of_a_byte_order_mark_alone_is_empty(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf\n{"answer": "x", "prediction": "x"}\n')
    assert [row.line for row in read_answers(str(file))] == [2]


def test_a_file_without_any_answer_given_is_no_file_of_wrong_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "q", "answer": "x", "output": "x"}] * 3
    assert main(["eval", "score", write(tmp_path / "rows.jsonl", rows), "--style", "search-r1", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "none of its 3 rows has prediction or pred_ans" in captured.err
    assert "question, answer, output" in captured.err
    one_has = write(tmp_path / "rows.jsonl", [*rows, {"answer": "x", "prediction": None}])
    assert scored(capsys, one_has, "--style", "search-r1")["unanswered"] == 4


def test_parquet_is_sent_to_the_lines_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.parquet").write_bytes(b"PAR1\x15\x04PAR1")
    assert main(["eval", "score", str(tmp_path / "results.parquet"), "--style", "search-r1"]) == 1
    assert f"its {tmp_path / 'scores.jsonl'}" in capsys.readouterr().err


def test_a_terminal_of_ascii_shows_the_table(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS)
    words = [sys.executable, "-m", "searchqa_agents.cli", "eval", "score", file, "--style", "search-r1", "--by", "type"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "0.2000" in done.stdout


GOOD = {"question": "q", "answer": "x", "prediction": "x"}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"answer": "x", "prediction": ', "not JSON"),
        ("[1]", "must be an object.*got list"),
        ('"text"', "must be an object.*got str"),
        ({"question": "q", "prediction": "x"}, "must have golden_answers or answer.*it has question, prediction"),
        ({}, "it has nothing"),
        ({"answer": [], "prediction": "x"}, "answer is an empty list"),
        ({"golden_answers": ["x", [3]], "prediction": "x"}, "golden_answers must be a string or a list of strings.*3"),
        ('{"answer": NaN, "prediction": "x"}', "answer must be a string or a list of strings.*float nan"),
        ({"golden_answers": None, "answer": None, "prediction": "x"}, "answer must be a string or a list of strings.*NoneType"),
        ({"golden_answers": ["x"], "answer": None}, "not clear what was answered"),
        ({"answer": None, "prediction": "x"}, "answer must be a string or a list of strings.*NoneType"),
        ({"golden_answers": ["x", " "], "prediction": "x"}, "none of them blank"),
        ({"answer": "x", "prediction": ["x"]}, r"prediction must be a string, or null.*list \['x'\]"),
        ({"answer": "x", "pred_ans": {"text": "x"}}, "pred_ans must be a string, or null.*dict"),
        ({"answer": "x", "prediction": "x", "pred_ans": "y"}, "prediction and pred_ans must not differ; got 'x' and 'y'"),
        ({"question": 3, "answer": "x", "prediction": "x"}, "question must be a string; got int 3"),
        ({"question": "q", "golden_answers": ["x"], "answer": "x"}, "not clear what was answered.*'prediction'"),
        ({"schema_version": 2, "golden_answers": ["x"], "answer": "x"}, "schema_version is 2; this version of searchqa-gym reads 1"),
        ({"schema_version": 1, "golden_answers": ["x"], "answer": "x"}, "must have set, id, sample, golden_answers and answer"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_malformed_row_is_an_error_that_names_file_line_and_fault(
    bad: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(write(tmp_path / "rows.jsonl", [GOOD, "", GOOD]))
    file.write_bytes(
        file.read_bytes() + (bad if isinstance(bad, bytes) else (bad if isinstance(bad, str) else json.dumps(bad)).encode()) + b"\n"
    )
    with pytest.raises(MalformedRowError, match=rf"rows\.jsonl, line 4: .*{said}"):
        list(read_answers(str(file)))
    assert main(["eval", "score", str(file), "--style", "search-r1", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""  # no figure of the rows before it
    assert "rows.jsonl, line 4: " in captured.err


def test_one_json_array_is_told_from_lines(tmp_path: Path) -> None:
    with pytest.raises(MalformedRowError, match="seems to be one JSON array; write one object per line"):
        list(read_answers(write(tmp_path / "rows.json", ["[", json.dumps(GOOD), "]"])))


@pytest.mark.parametrize("style", [["--style", "search-r2"], []])
def test_a_wrong_line_is_a_usage_error(style: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "score", write(tmp_path / "rows.jsonl", ROWS), *style]) == 2
    assert "--style" in capsys.readouterr().err


def test_nothing_to_score_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in [
        ([write(tmp_path / "empty.jsonl", [])], "empty.jsonl holds no rows"),
        ([str(tmp_path)], f"{tmp_path} is a folder; name a file"),
        ([str(tmp_path / "none.jsonl")], "none.jsonl"),
    ]:
        assert main(["eval", "score", *words, "--style", "search-r1"]) == 1
        assert said in capsys.readouterr().err
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(GOOD).encode())[:-9])
    assert main(["eval", "score", str(cut), "--style", "search-r1"]) == 1
    assert "damaged or cut off" in capsys.readouterr().err


def test_help_names_styles_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "score", "--help"]) == 0
    out = capsys.readouterr().out
    for word in ("search-r1", "r1-searcher", "zerosearch", "pred_ans", "golden_answers", "--json", "--by"):
        assert word in out
    assert main(["eval", "--help"]) == 0
    assert "searchqa eval score" in capsys.readouterr().out


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=50))
def test_an_interval_holds_the_mean_and_the_same_values_give_the_same(values: list[float]) -> None:
    low, high = bootstrap_interval(Counter(values))
    assert min(values) <= low <= high <= max(values)
    assert bootstrap_interval(Counter(reversed(values))) == (low, high)


def test_the_interval_is_that_of_the_plain_bootstrap() -> None:
    values = np.array([0.0] * 173 + [1.0] * 287 + [0.5] * 40)
    generator = np.random.default_rng(3)
    means = [generator.choice(values, len(values)).mean() for _ in range(4_000)]
    assert bootstrap_interval(Counter(values.tolist())) == pytest.approx(
        np.percentile(means, [2.5, 97.5]), abs=0.004
    )  # about 0.04 to each side


@pytest.mark.data
def test_a_run_scored_again_in_the_style_that_its_metrics_have_gives_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    line = ["env=hotpotqa", "env.split=all", "agent=search_once", "questions=60", "threads=1", f"run_dir={folder}"]
    assert main(["eval", *line]) == 0
    capsys.readouterr()
    metrics = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["metrics"]
    assert 0 < metrics["em"] < 1
    squad = scored(capsys, str(folder / "scores.jsonl"), "--style", "search-r1")
    own = scored(capsys, str(folder / "scores.jsonl"), "--style", "r1-searcher")
    assert [squad[name] for name in ("em", "f1", "cover_em", "sub_em")] == pytest.approx(
        [metrics[name] for name in ("em", "f1", "cover_em_squad", "sub_em")]
    )
    assert [own[name] for name in ("em", "f1", "cover_em", "sub_em")] == pytest.approx(
        [metrics[name] for name in ("em_r1_searcher", "f1_r1_searcher", "cover_em", "sub_em_r1_searcher")]
    )
