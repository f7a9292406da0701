"""``searchqa report page``: sets of any runs and files on one page, named so that they can be told apart."""

from __future__ import annotations

import base64
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from searchqa_agents.cli import main
from searchqa_agents.page_command import name_sources, sources_at, table_of
from searchqa_agents.trajectory import Trajectory, TurnSpan, append_trajectories
from searchqa_envs.tokenizers import build_tokenizer

BYTE = build_tokenizer("byte")


def trajectory(name: str = "q1", right: bool = True) -> Trajectory:
    ids = np.array(BYTE.encode("Who?\n<answer>Ada</answer>"), dtype=np.int32)
    start = len(BYTE.encode("Who?\n"))
    mask = (np.arange(len(ids)) >= start).astype(np.int8)
    return Trajectory(
        token_ids=ids,
        loss_mask=mask,
        logprobs=(-0.5 * mask).astype(np.float32),
        turns=(TurnSpan(start, len(ids), len(ids), "answer", "Ada", "<answer>Ada</answer>", ""),),
        prompt="Who?\n",
        reward=float(right),
        question_id=name,
        question="Who?",
        golden_answers=("Ada",),
        answer="Ada",
        terminated=True,
        truncated=False,
        metrics={"em": float(right), "searches": 0.0},
        stamp={"tokenizer": "byte", "top_k": 3},
    )


def run_folder(path: Path, names: tuple[str, ...] = ("before", "after"), **stamp: Any) -> Path:
    for name in names:
        append_trajectories(path / "trajectories" / f"{name}.jsonl.gz", [trajectory(right=name == "after")])
    (path / "stamp.json").write_text(json.dumps({"tokenizer": "byte", "top_k": 1} | stamp))
    return path


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a page's data script says, and what is packed in it."""
    text = file.read_text()
    data, packed = (re.search(f'id="{name}">([^<]*)<', text) for name in ("data", "trajectories"))
    assert data is not None
    assert packed is not None
    return json.loads(data[1]), json.loads(gzip.decompress(base64.b64decode(packed[1])))


def test_two_runs_stand_on_one_page_with_their_stamps_and_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run_folder(tmp_path / "a", seed=0), run_folder(tmp_path / "b", seed=1)
    for run, em in ((a, 0.5), (b, 0.75)):
        (run / "metrics.jsonl").write_text(json.dumps({"phase": "train", "step": 1, "charts/em": em}) + "\n")
    assert main(["report", "page", str(a), str(b)]) == 0
    assert f"Page: {tmp_path / 'page.html'}" in capsys.readouterr().out
    data, packed = contents(tmp_path / "page.html")
    assert data["sets"] == ["a/before", "a/after", "b/before", "b/after"]
    assert [(item["set"], item["id"]) for item in packed["items"]] == [(name, "q1") for name in data["sets"]]
    assert data["curves"][0]["series"] == [["a", [1.0], [0.5]], ["b", [1.0], [0.75]]]
    assert data["stamp"]["top_k"] == 1
    assert data["stamp"]["sets"]["b/after"]["seed"] == 1
    assert [row[:4] for row in data["table"]["rows"]][:2] == [["a/before", "1", "1", "0.000"], ["a/after", "1", "1", "1.000"]]
    assert all(item["logprobs"] >= 0 for item in packed["items"])  # the runs' tokenizer was found


def test_files_anywhere_are_read_with_the_stamp_of_their_trajectories(tmp_path: Path) -> None:
    for name in ("one", "two"):
        append_trajectories(tmp_path / f"{name}.jsonl", [trajectory(name) for _ in range(3)])
    out = tmp_path / "new" / "both.html"
    assert main(["report", "page", str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl"), "--out", str(out), "--most", "4"]) == 0
    data, packed = contents(out)
    assert data["sets"] == ["one", "two"]
    assert data["stamp"]["top_k"] == 3
    assert len(packed["items"]) == 4
    assert "4 of 6 trajectories" in data["notes"][0]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a/trajectories/before", "a/trajectories/after"], ["before", "after"]),
        (["a/trajectories/eval", "b/trajectories/eval"], ["a", "b"]),
        (["a/trajectories/before", "b/trajectories/after"], ["a/before", "b/after"]),
        (["x/s0/trajectories/eval", "y/s0/trajectories/eval"], ["x/s0", "y/s0"]),
        (["a/trajectories/before", "a/trajectories/after", "b/trajectories/after"], ["a/before", "a/after", "b/after"]),
    ],
)
def test_sets_have_the_shortest_names_that_tell_them_apart(tmp_path: Path, files: list[str], expected: list[str]) -> None:
    sources = []
    for name in files:
        append_trajectories(tmp_path / f"{name}.jsonl.gz", [trajectory()])
        sources += sources_at(tmp_path / f"{name}.jsonl.gz")
    assert list(name_sources(sources)) == expected


def test_the_table_leaves_lost_episodes_out_of_means_and_counts_them() -> None:
    lost = replace(trajectory("q2"), backend_error="gone", metrics={}, reward=0.0)
    columns, rows = table_of({"eval": [trajectory(), trajectory(right=False), lost]})
    assert dict(zip(columns, rows[0], strict=True)) == {
        "": "eval",
        "trajectories": "3",
        "questions": "2",
        "search lost": "1",
        "exact match": "0.500",
        "F1": "–",
        "searches": "0.000",
        "invalid turns": "–",
        "reward": "0.500",
        "tokens sampled": f"{trajectory().loss_mask.sum():.3f}",
    }
    assert "search lost" not in table_of({"eval": [trajectory()]})[0]


def test_what_has_no_trajectories_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "page", str(tmp_path)]) == 1
    assert f"{tmp_path} has no trajectories" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", "page", str(tmp_path), "--most", "0"])
