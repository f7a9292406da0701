"""Reports of finished runs: means over seeds, tables, pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from searchqa_agents.cli import main
from searchqa_agents.plots import headline, learning_curve
from searchqa_agents.report import Run, combined, totals_of_training
from searchqa_agents.table import markdown
from searchqa_agents.variants import mean_and_interval


def test_mean_and_interval_by_hand() -> None:
    mean, half = mean_and_interval([0.8, 0.9, 1.0])
    assert mean == pytest.approx(0.9)
    assert half == pytest.approx(4.303 * 0.1 / math.sqrt(3))  # sample deviation .1, t with 2 degrees of freedom
    assert mean_and_interval([0.5]) == (0.5, None)


def train_run(seed: int, after: float, algorithm: str = "grpo", algo: dict[str, object] | None = None, **stamp: object) -> Run:
    measures = {
        "before": {"hops=2/sampled/em": 0.3, "hops=2/sampled/searches": 1.25},
        "after": {"hops=2/sampled/em": after, "hops=2/sampled/searches": 2.0},
    }
    titles = {"hops=2/sampled/em": "2-hop exact match"}
    return Run(
        path=Path(f"runs/{seed}"),
        config={"seed": seed, "env": {"id": "w"}, "algo": {"name": algorithm, "seed": seed, **(algo or {})}, "run_dir": f"runs/{seed}"},
        name="train",
        stamp={"dataset": "world", "seed": seed, "command": f"seed={seed}", **stamp},
        summary={"kind": "train", "measures": measures, "titles": titles, "columns": [], "rows": []}
        | {"algorithm": algorithm, "seed": seed, "tokens": 1e6 + seed, "seconds_training": 60.0 + 2 * seed},
    )


def test_runs_that_differ_in_their_seed_are_averaged() -> None:
    [(title, columns, rows)] = combined([train_run(0, 0.8), train_run(1, 0.9), train_run(2, 1.0)])
    assert "3 runs" in title
    assert columns == ["", "mean", "95% interval", "seed 0", "seed 1", "seed 2"]
    assert rows == [
        ["2-hop exact match, before", "0.300", "0.300 to 0.300", "0.300", "0.300", "0.300"],
        ["2-hop exact match, after", "0.900", "0.652 to 1.148", "0.800", "0.900", "1.000"],
    ]


def test_measures_between_stages_have_rows_and_a_run_without_one_a_dash() -> None:
    runs = [train_run(0, 0.8), train_run(1, 0.9)]
    own = runs[1].summary["measures"]
    runs[1].summary["measures"] = {"before": own["before"], "after one": {"hops=2/sampled/em": 0.5}, "after": own["after"]}
    [(_, _, rows)] = combined(runs[::-1])
    assert rows[1] == ["2-hop exact match, after one", "0.500, 1 of 2 seeds", "–", "0.500", "–"]


def test_a_title_with_dollars_is_drawn_as_it_is() -> None:
    lines = [{"phase": "train", "step": i, "stage": f"${i} \\frac{{", "charts/em": 0.5, "charts/searches": 1.0} for i in (1, 2)]
    picture = learning_curve(lines, {}, "cost $\\frac{ $")
    assert picture is not None
    assert picture.startswith(b"\x89PNG")


def test_runs_with_other_settings_are_never_averaged() -> None:
    [(title, columns, rows)] = combined([train_run(0, 0.8), train_run(1, 0.9, top_k=5)])
    assert "different settings" in title
    assert columns == ["", "0", "1"]
    assert rows[1] == ["2-hop exact match, after", "0.800", "0.900"]


def test_tokens_and_seconds_are_those_of_the_training_phase() -> None:
    lines = [
        {"phase": "sft", "charts/tokens": 5, "time/update": 3.0},
        {"phase": "train", "charts/tokens": 10, "time/rollout": 1.0, "time/update": 0.5},
        {"phase": "train", "charts/tokens": 20, "time/data": 1.0, "time/update": 0.5},
    ]
    assert totals_of_training(lines) == {"tokens": 30, "seconds_training": 3.0}


def test_a_table_in_markdown() -> None:
    assert markdown(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"


def test_the_headline_is_the_sampled_measure_with_most_hops() -> None:
    assert headline({"before": {"hops=1/sampled/em": 0.9, "hops=2/sampled/em": 0.3, "hops=2/greedy/em": 0.0}}) == "hops=2/sampled"
    assert headline({"after": {"sampled/em": 0.3, "off/em": 0.0}}) == "sampled"
    assert headline({}) is None


def test_the_picture_is_a_png_and_needs_something_to_draw() -> None:
    lines = [
        {"phase": "grpo", "step": i, "charts/em": i / 10, "charts/searches": 1.0, "charts/episodic_return": i / 20} for i in range(1, 11)
    ]
    lines += [{"phase": "warmup", "step": 1, "losses/warmup_loss": 4.0}, {"phase": "before", "step": 0, "sampled/em": 0.1}]
    picture = learning_curve(lines, {"before": {"sampled/em": 0.1}, "after": {"sampled/em": 0.9}}, "t")
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    assert learning_curve([{"phase": "eval", "step": 0}], {}, "t") is None


def test_report_makes_page_and_table_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [tmp_path / "oracle0", tmp_path / "oracle1"]
    for seed, run in enumerate(runs):
        assert main(["eval", "env.num_worlds=1", "questions=6", f"seed={seed}", f"run_dir={run}", "threads=1"]) == 0
    page = (runs[0] / "report.html").read_text()
    (runs[0] / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", str(runs[0])]) == 0
    assert "exact match" in capsys.readouterr().out
    assert (runs[0] / "report.html").read_text() == page
    assert main(["report", *map(str, runs)]) == 0
    assert "Mean over 2 runs (seeds 0, 1)" in capsys.readouterr().out


def test_a_run_without_results_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "stamp.json").write_text(json.dumps({}))
    assert main(["report", str(tmp_path)]) == 1
    assert "no results yet" in capsys.readouterr().err
