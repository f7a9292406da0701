"""What searching costs is logged per rollout, kept over a kill, and told at the end."""

import json
import re

import pytest

from searchqa_agents.cli import main
from searchqa_agents.report import search_line
from searchqa_agents.runs import RunFolder, RunFolderError, read_metrics, read_searches
from searchqa_agents.trainer import search_metrics

SMOKE = ("train", "recipe=smoke", "threads=1", "env.num_worlds=20")
COUNTS = ("search/searches", "search/distinct", "search/errors", "search/backend_requests", "search/money")


def counters(searches=4.0, **more):
    return {"search/searches": searches, "search/distinct": 3.0, "search/seconds": 0.5, **more}


def test_sums_by_phase_and_over_the_run_by_hand(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.log_searches("train", 1, counters(**{"search/money": 0.25, "search/latency/40": 3.0}))
        folder.log_searches("train", 2, counters(**{"search/latency/44": 1.0}))
        folder.log_searches("after", 0, counters(searches=2.0, **{"search/distinct": 2.0}))
        folder.log_searches("after", 0, dict.fromkeys(counters(), 0.0))  # no line
    found = read_searches(tmp_path)
    assert list(found) == ["train", "total", "after"]
    assert found["train"] == {
        "search/searches": 8.0,
        "search/distinct": 6.0,
        "search/seconds": 1.0,
        "search/money": 0.25,
        "search/duplicate_fraction": 0.25,
        "search/p50_ms": 1.024,
        "search/p90_ms": 2.048,
        "search/p99_ms": 2.048,
    }
    assert (found["total"]["search/searches"], found["total"]["search/duplicate_fraction"]) == (10, pytest.approx(0.2))
    assert len((tmp_path / "searches.jsonl").read_text().splitlines()) == 3


def test_a_step_that_is_taken_again_counts_again_and_half_a_line_is_cut(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.log("train", 1, {"charts/em": 0.5})
        folder.log_searches("train", 1, counters())
    with (tmp_path / "searches.jsonl").open("a") as file:
        file.write('{"phase": "train", "st')
    with RunFolder(tmp_path) as folder:
        folder.rewind(None)  # killed before its first checkpoint
        assert read_metrics(tmp_path) == []
        folder.log_searches("train", 1, counters())
    assert read_searches(tmp_path)["total"]["search/searches"] == 8


def test_a_bad_line_is_an_error_and_no_file_no_searches(tmp_path):
    assert read_searches(tmp_path) == {}
    (tmp_path / "searches.jsonl").write_text("not json\n")
    with pytest.raises(RunFolderError, match="line 1"):
        read_searches(tmp_path)


def test_what_is_logged_of_a_rollout_by_hand():
    cache = {"search/cache_hits": 1.0, "search/cache_joins": 0.0, "search/cache_misses": 3.0}
    logged = search_metrics(counters(**cache, **{"search/backend_calls": 2.0, "search/money": 0.5, "search/latency/40": 2.0}))
    assert logged == {
        "search/searches": 4,
        "search/duplicate_fraction": 0.25,
        "search/hit_fraction": 0.25,
        "search/p50_ms": 1.024,
        "search/p99_ms": 1.024,
        "search/seconds": 0.5,
        "search/backend_calls": 2,
        "search/money": 0.5,
    }
    assert search_metrics({"search/searches": 0.0, "search/distinct": 0.0, "search/seconds": 0.0}) == {
        "search/searches": 0,
        "search/seconds": 0,
    }


def test_the_line_at_the_end_by_hand():
    assert search_line({}) == search_line({"search/searches": 0.0}) == "Search: none."
    assert search_line({"search/searches": 4.0, "search/duplicate_fraction": 0.25, "search/seconds": 0.5}) == (
        "Search: 4 searches (25% doubles within a step), 0.5 s."
    )
    figures = {
        "search/searches": 12_000.0,
        "search/duplicate_fraction": 0.125,
        "search/hit_fraction": 0.5,
        "search/disk_hit_fraction": 0.2,
        "search/backend_calls": 300.0,
        "search/backend_requests": 4200.0,
        "search/errors": 3.0,
        "search/seconds": 61.5,
        "search/p50_ms": 1.024,
        "search/p99_ms": 181.02,
        "search/money": 4.2,
    }
    assert search_line(figures) == (
        "Search: 12,000 searches (12% doubles within a step, 50% of the others from memory, 20% of the rest from the cache file), 4,200 requests "
        "in 300 calls of the back end, 3 lost, 61.5 s, a call 1.02 ms (p50), 181 ms (p99), cost 4.20."
    )
    assert "a call 0.0312 ms (p50), 12,346 ms (p99)" in search_line({**figures, "search/p50_ms": 0.03121, "search/p99_ms": 12345.6})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    assert main([*SMOKE, f"run_dir={path}"]) == 0
    return path


def test_a_training_run_logs_each_rollout_and_its_evaluations(run):
    logged = [line for line in read_metrics(run) if line["phase"] == "train"]
    assert all({"search/searches", "search/seconds"} <= set(line) for line in logged)
    found = read_searches(run)
    assert set(found) <= {"sft", "before", "train", "after", "total"}
    assert found["sft"]["search/searches"] > 0  # demonstrations search
    trained = sum(line["search/searches"] for line in logged)
    assert found.get("train", {"search/searches": 0})["search/searches"] == trained
    assert found["total"]["search/searches"] == sum(figures["search/searches"] for phase, figures in found.items() if phase != "total")
    assert search_line(found["total"]) in (run / "report.html").read_text()
    assert json.loads((run / "summary.json").read_text())["search"] == found


def test_the_report_and_an_evaluation_tell_the_cost(run, tmp_path, capsys):
    assert main(["report", str(run)]) == 0
    assert search_line(read_searches(run)["total"]) in capsys.readouterr().out
    line = ["eval", "agent=search_once", "env=world", "questions=8", "num_envs=4", "env.num_worlds=4", f"run_dir={tmp_path / 'eval'}"]
    assert main(line) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert summary["search"]["total"]["search/searches"] == 8
    assert search_line(summary["search"]["total"]) in said
