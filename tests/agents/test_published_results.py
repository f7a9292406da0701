"""The published tables: their numbers agree with each other and with the pages they were taken from, and each row says how it was measured."""

from __future__ import annotations

import json
import math

import pytest

from searchqa_agents.cli import main
from searchqa_agents.published_results import PREFIX, UnknownPublishedRowError, published_row, published_rows
from searchqa_agents.table import METRIC_TITLES, SET_TITLES

ROWS = published_rows()


def test_every_printed_average_is_the_mean_of_its_columns_but_one() -> None:
    off = []
    for row in ROWS.values():
        for metric, printed in row.printed_average.items():
            own = row.values.get(metric, {})
            if len(own) == len(row.columns) and abs(math.fsum(own.values()) / len(own) - printed) > 0.00105:  # both are rounded
                off.append(row.name)
    assert off == ["search-r1/qwen2.5-7b/ircot"]


def test_the_exception_takes_the_mean_of_its_columns() -> None:
    row = ROWS["search-r1/qwen2.5-7b/ircot"]
    assert row.average("em") == pytest.approx((0.224 + 0.478 + 0.301 + 0.133 + 0.149 + 0.072 + 0.224) / 7)
    assert row.printed_average["em"] == 0.239
    assert any(".239" in note for note in row.notes)


@pytest.mark.parametrize(
    ("name", "metric", "set_name", "value"),
    [
        ("search-r1/qwen2.5-7b/direct", "em", "nq", 0.134),
        ("search-r1/qwen2.5-7b/search-r1-base-ppo", "em", "2wikimultihopqa", 0.382),
        ("search-r1/qwen2.5-7b/search-r1-instruct-grpo", "em", "bamboogle", 0.400),
        ("search-r1/qwen2.5-3b/cot", "em", "bamboogle", 0.0),
        ("search-r1/qwen2.5-3b/rejection-sampling", "em", "musique", 0.059),
        ("search-r1/qwen2.5-3b/search-r1-instruct-ppo", "em", "triviaqa", 0.545),
        ("r1-searcher/llama-3.1-8b-instruct/rl", "judge", "hotpotqa", 0.746),
        ("r1-searcher/qwen2.5-7b/rl-zero", "cover_em", "musique", 0.282),
        ("r1-searcher/gpt-4o-mini/ircot", "judge", "2wikimultihopqa", 0.114),
        ("r1-searcher/llama-3.1-8b-instruct/self-ask", "cover_em", "bamboogle", 0.360),
        ("r1-searcher-online/bamboogle/qwen2.5-7b-online", "cover_em", "bamboogle", 0.624),
        ("r1-searcher-algorithms/llama-3.1-8b-instruct/reinforce-plus-plus", "f1", "2wikimultihopqa", 0.629),
        ("zerosearch/qwen2.5-7b/zerosearch-base", "sub_em", "popqa", 0.604),
        ("zerosearch/qwen2.5-3b/ra-agent", "sub_em", "hotpotqa", 0.126),
        ("zerosearch/llama-3.2-3b/search-r1-instruct", "sub_em", "bamboogle", 0.2778),
        ("flashrag/qwen2.5-7b/r1-searcher", "f1", "2wikimultihopqa", 0.491),
        ("flashrag/qwen2.5-7b/search-r1", "em", "popqa", 0.492),
        ("tinker/qwen2.5-7b-instruct/search-r1", "em", "hotpotqa", 0.497),
        ("search-r1-issue-46/qwen2.5-3b/grpo", "em", "nq", 0.470),
    ],
)
def test_cells_picked_by_hand(name: str, metric: str, set_name: str, value: float) -> None:
    assert ROWS[name].values[metric][set_name] == pytest.approx(value)


@pytest.mark.parametrize(
    ("name", "metric", "average"),
    [
        ("search-r1-ablations/qwen2.5-7b/top-k-5", "em", 0.400),
        ("search-r1-ablations/qwen2.5-7b/mask-off", "em", 0.343),
        ("search-r1-ablations/qwen2.5-14b/base-ppo", "em", 0.479),
        ("r1-searcher-ablations/qwen2.5-7b/reward-em", "cover_em", 0.397),
        ("zerosearch-ablations/qwen2.5-3b/simulator-untuned", "sub_em", 0.0882),
        ("zerosearch-ablations/llama-3.2-3b/mask-off", "sub_em", 0.3453),
    ],
)
def test_averages_of_ablations(name: str, metric: str, average: float) -> None:
    assert ROWS[name].average(metric) == pytest.approx(average)


@pytest.mark.parametrize(
    ("ablation", "main_row", "metric", "sets"),
    [
        ("search-r1-ablations/qwen2.5-7b/base-ppo", "search-r1/qwen2.5-7b/search-r1-base-ppo", "em", 7),
        ("search-r1-ablations/qwen2.5-3b/instruct-grpo", "search-r1/qwen2.5-3b/search-r1-instruct-grpo", "em", 7),
        ("zerosearch-ablations/qwen2.5-3b/reinforce", "zerosearch/qwen2.5-3b/zerosearch-base", "sub_em", 7),
        ("zerosearch-ablations/qwen2.5-3b/google", "zerosearch/qwen2.5-3b/search-r1-base", "sub_em", 7),
        ("zerosearch-ablations/llama-3.2-3b/curriculum", "zerosearch/llama-3.2-3b/zerosearch-base", "sub_em", 7),
        ("r1-searcher-ablations/qwen2.5-7b/rl", "r1-searcher/qwen2.5-7b/rl-zero", "cover_em", 3),
        ("r1-searcher-ablations/llama-3.1-8b-instruct/rl", "r1-searcher/llama-3.1-8b-instruct/rl", "cover_em", 3),
    ],
)
def test_ablations_agree_with_the_main_tables(ablation: str, main_row: str, metric: str, sets: int) -> None:
    one, other = ROWS[ablation], ROWS[main_row]
    assert len(one.columns) == sets
    columns = [other.values[metric][name] for name in one.columns]
    assert one.average(metric) == pytest.approx(sum(columns) / sets, abs=0.00105)


def test_bamboogle_of_zerosearch_is_in_whole_questions_of_those_that_were_scored() -> None:
    rows = [row for row in ROWS.values() if row.system == "zerosearch"]
    assert len(rows) == 33
    for row in rows:
        scored = row.stamps["bamboogle"]["questions_played"]
        assert scored == (72 if row.method.startswith(("R1-", "Search-R1", "ZeroSearch")) else 125), row.name
        right = row.values["sub_em"]["bamboogle"] * scored
        assert right == pytest.approx(round(right), abs=0.00006 * scored), row.name
        assert any("only 72 of the 125 Bamboogle questions count" in note for note in row.notes) == (scored == 72)
        assert row.stamps["bamboogle"]["described_questions"] == ("of the 125 those in whole batches" if scored == 72 else "all of the set")
        assert row.stamps["nq"]["described_questions"] == "ZeroSearch's sample of 500"


def test_rows_without_retrieval_searched_nothing() -> None:
    without = {row.name for row in ROWS.values() if all(stamp.get("retriever") == "none" for stamp in row.stamps.values())}
    in_main_tables = [row for row in ROWS.values() if row.system in ("search-r1", "zerosearch")]
    names = ("direct", "cot", "sft", "r1-base", "r1-instruct")
    assert {row.name for row in in_main_tables} & without == {
        row.name for row in in_main_tables if row.name.endswith(tuple(f"/{one}" for one in names))
    }
    assert without - {row.name for row in in_main_tables} == {
        "search-r1-ablations/qwen2.5-14b/r1-base",
        "r1-searcher/llama-3.1-8b-instruct/naive",
        "r1-searcher/gpt-4o-mini/naive",
    }
    for name in without:
        for stamp in ROWS[name].stamps.values():
            assert stamp["corpus"] == "none"
            assert "top_k" not in stamp


def test_metrics_are_named_by_what_the_code_computes() -> None:
    metrics = {row.system: {metric for stamp in row.stamps.values() for metric in stamp["metrics"]} for row in ROWS.values()}
    assert metrics["search-r1"] == {"em"}
    assert metrics["zerosearch"] == {"sub_em"}
    assert metrics["r1-searcher"] == {"cover_em", "judge"}
    assert ROWS["zerosearch/qwen2.5-7b/rag"].stamps["nq"]["printed_as"] == {"sub_em": "EM"}
    assert ROWS["r1-searcher/qwen2.5-7b/rl-zero"].stamps["musique"]["printed_as"] == {"cover_em": "ACC_R", "judge": "ACC_L"}


def test_search_r1_of_zerosearchs_tables_is_told_to_be_another() -> None:
    own = [row for row in ROWS.values() if row.system == "zerosearch" and row.method.startswith("Search-R1")]
    assert len(own) == 6
    assert all(any("Google and an F1 reward" in note for note in row.notes) for row in own)


def test_every_row_is_sound() -> None:
    assert len(ROWS) == 131
    assert sum(row.system == "search-r1" for row in ROWS.values()) == 26
    assert sum(row.system == "r1-searcher" for row in ROWS.values()) == 10
    for row in ROWS.values():
        assert row.name == row.name.lower()
        assert row.source
        assert set(row.columns) <= set(SET_TITLES)
        assert row.values or row.printed_average
        assert set(row.stamps) == set(row.columns)
        for own in row.values.values():
            assert all(0 <= value <= 1 for value in own.values()), row.name
        for name, stamp in row.stamps.items():
            assert stamp["dataset"] == name
            assert set(stamp["metrics"]) <= set(METRIC_TITLES)
            assert None not in stamp.values()


def test_what_is_not_established_is_not_in_the_stamp() -> None:
    baseline, own = ROWS["r1-searcher/gpt-4o-mini/standard-rag"].stamps["musique"], ROWS["r1-searcher/qwen2.5-7b/rl-zero"].stamps
    assert not {"corpus", "retriever", "top_k"} & baseline.keys()
    assert own["hotpotqa"]["corpus"] != own["musique"]["corpus"]
    assert own["musique"]["top_k"] == 5


def test_a_row_is_found_by_its_name_and_a_wrong_name_told_what_is_near() -> None:
    assert published_row(f"{PREFIX}Search-R1/Qwen2.5-7B/IRCoT") is ROWS["search-r1/qwen2.5-7b/ircot"]
    with pytest.raises(UnknownPublishedRowError, match=r"search-r1/qwen2\.5-7b/ircot"):
        published_row(f"{PREFIX}search-r1/qwen2.5-7b/ircott")


def test_the_listing_has_every_row_with_metric_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "published", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(ROWS)
    assert main(["report", "published", "--system", "ZeroSearch", "--model=qwen2.5-3b", "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "| search-r1-base | 0.406 | 0.600 | 0.442 | 0.292 | 0.320 | 0.112 | 0.125 | 0.328 |" in text
    assert "sub_em (printed as EM)" in text
    assert "arXiv 2505.04588" in text
    assert "qwen2.5-7b" not in text


@pytest.mark.parametrize("line", [["--system", "nobody"], ["--system", "tinker", "--model", "qwen2.5-3b"], ["--sytem", "tinker"], ["x"]])
def test_a_wrong_line_is_a_wrong_line(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "published", *line]) == 2
    assert capsys.readouterr().err
