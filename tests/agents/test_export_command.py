"""Episodes as Parquet: what was written comes back, rows mean what they say, and what cannot be exported is said."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from searchqa_agents import parquet_export
from searchqa_agents.data_command import main
from searchqa_agents.export_command import episodes_of, found_files, run_of
from searchqa_agents.parquet_export import TableError, read_parquet
from searchqa_agents.trajectory import Trajectory, append_trajectories
from searchqa_envs.errors import ConfigurationError, DataNotFoundError


def rich_episode(episode: Any) -> Trajectory:
    """Prompt 1 2; segment 3 4 5, reply 6; segment 7 8."""
    made = episode([1, 2], [3, 4, 5], [6], [7, 8], reward=0.25, logprobs=[-0.1, -0.2, -0.3, -0.4, -0.5])
    spread = np.where(made.loss_mask == 1, 0.5, 0).astype(np.float32)
    first, second = made.turns
    values: dict[str, Any] = {
        "advantages": spread,
        "sampling_logprobs": spread * -1,
        "turns": (
            first._replace(content="who [bold]?\x1b[2J", segment="<search>…\x00", passages=(("p1", "Tïtle"),)),
            second._replace(action="answer", content="Lisbon"),
        ),
        "golden_answers": ("Lisbon", "Lisboa"),
        "answer": "Lisbon",
        "reward_terms": {"em": 0.25},
        "metrics": {"em": 1.0, "searches": 1.0},
        "usage": {"calls": 2.0},
        "stamp": {"seed": 3, "retriever": {"name": "bm25", "k1": 0.9}},
    }
    return Trajectory(**{**{name: getattr(made, name) for name in Trajectory.__dataclass_fields__}, **values})


@pytest.fixture
def run_folder(tmp_path: Path, episode: Any, random_episodes: Any) -> Path:
    """A run with three files; one episode of them lost its back end."""
    folder = tmp_path / "mine"
    lost = episode([1], [2], backend_error="gone")
    for name, trajectories in {
        "before": random_episodes(3, 50),
        "rollouts-000005": [rich_episode(episode), lost],
        "after": random_episodes(4, 50, 1),
    }.items():
        append_trajectories(folder / "trajectories" / f"{name}.jsonl.gz", trajectories)
    (folder / "config.yaml").write_text("env: {id: SearchQA-World-v0}\n")
    (folder / "stamp.json").write_text('{"seed": 3}\n')
    return folder


def test_episodes_come_back_equal_and_lost_ones_are_left_out(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "out" / "mine.parquet"
    assert main(["export", str(run_folder), "--to", "parquet", str(table)]) == 0
    said = capsys.readouterr().out
    assert "8 episodes of 3 files, 8 rows (episodes)" in said
    assert "Left out: 1 episode that lost the search back end." in said
    written = [episode.trajectory for episode in episodes_of(found_files([run_folder]), Counter())]
    assert list(read_parquet(table)) == written
    file = pq.ParquetFile(table)
    assert json.loads(file.schema_arrow.metadata[b"searchqa.stamp"]) == {"seed": 3}
    assert file.schema_arrow.metadata[b"searchqa.schema_version"] == b"1"
    row = file.read().filter(pq.read_table(table)["file"].to_numpy() == "rollouts-000005").to_pylist()[0]
    assert (row["run"], row["line"], dict(row["metrics"])["searches"]) == ("mine", 0, 1.0)


def test_rows_of_turns_are_what_an_offline_algorithm_needs(run_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "turns.parquet"
    assert main(["export", str(run_folder), "--to", "parquet", str(table), "--rows", "turns", "--only", "rollouts-*"]) == 0
    first, second = pq.read_table(table).to_pylist()
    assert (first["observation"], first["action"], first["reply"]) == ([1, 2], [3, 4, 5], [6])
    assert (second["observation"], second["action"], second["reply"]) == ([1, 2, 3, 4, 5, 6], [7, 8], [])
    assert [(row["reward"], row["terminated"], row["truncated"]) for row in (first, second)] == [(0.0, False, False), (0.25, True, False)]
    assert second["logprobs"] == pytest.approx([-0.4, -0.5])
    assert second["advantages"] == [0.5, 0.5]
    assert (second["kind"], second["content"], second["turn"]) == ("answer", "Lisbon", 1)


def test_rows_of_tokens_are_the_context_in_order(run_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "tokens.parquet"
    assert main(["export", str(run_folder), "--to", "parquet", str(table), "--rows", "tokens", "--only", "rollouts-*"]) == 0
    rows = pq.read_table(table).to_pydict()
    assert rows["token_id"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rows["loss_mask"] == [0, 0, 1, 1, 1, 0, 1, 1]
    assert rows["turn"] == [None, None, 0, 0, 0, 0, 1, 1]
    assert rows["reward"] == [0.0] * 7 + [0.25]
    assert rows["terminated"] == [False] * 7 + [True]
    assert rows["logprobs"][:3] == [None, None, pytest.approx(-0.1)]


def test_a_table_is_written_in_groups_so_that_memory_stays_flat(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_export, "ROWS_PER_GROUP", 3)
    table = tmp_path / "mine.parquet"
    assert main(["export", str(run_folder), "--to", "parquet", str(table)]) == 0
    assert pq.ParquetFile(table).num_row_groups == 3
    assert len(list(read_parquet(table))) == 8


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["--to", "parquet", "mine.csv"], "something.parquet"),
        (["--to", "csv", "mine.csv"], "parquet FILE or minari NAME"),
        (["--to", "parquet", "mine.parquet", "--rows", "words"], "episodes, turns, tokens"),
        (["--to", "minari", "mine"], "name-vN"),
        (["--to", "minari", "x-v0", "--rows", "turns"], "always a segment"),
    ],
)
def test_what_cannot_be_written_is_said(run_folder: Path, line: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run_folder), *line]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_table_that_is_there_is_kept(run_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "mine.parquet"
    table.write_text("mine")
    assert main(["export", str(run_folder), "--to", "parquet", str(table)]) == 2
    assert table.read_text() == "mine"


def test_no_file_is_an_error_that_lists_those_there_are(run_folder: Path) -> None:
    with pytest.raises(DataNotFoundError, match="after, before, rollouts-000005"):
        found_files([run_folder], "during")
    with pytest.raises(DataNotFoundError, match="not there"):
        found_files([run_folder / "nowhere"])
    assert run_of(run_folder / "trajectories" / "after.jsonl.gz") == run_folder


def test_a_broken_line_leaves_no_table(run_folder: Path, tmp_path: Path) -> None:
    with gzip.open(run_folder / "trajectories" / "rollouts-000005.jsonl.gz", "at") as file:
        file.write('{"token_ids": [1\n')
    with pytest.raises(ValueError, match="line 3: not a trajectory"):
        main(["export", str(run_folder), "--to", "parquet", str(tmp_path / "mine.parquet")])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_table_of_other_rows_is_not_read(run_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "turns.parquet"
    main(["export", str(run_folder), "--to", "parquet", str(table), "--rows", "turns"])
    with pytest.raises(TableError, match="rows 'turns'"):
        next(read_parquet(table))
    table.write_text("no table")
    with pytest.raises(TableError, match="cannot be read"):
        next(read_parquet(table))


def test_half_a_surrogate_pair_cannot_stop_an_export(tmp_path: Path, episode: Any) -> None:
    file = tmp_path / "odd.jsonl"
    file.write_text(json.dumps({**episode([1], [2]).to_json(), "question": "who \ud800?"}) + "\n")
    table = tmp_path / "odd.parquet"
    assert main(["export", str(file), "--to", "parquet", str(table)]) == 0
    assert next(read_parquet(table)).question == "who ??"


def test_a_file_without_its_run_needs_to_be_told(tmp_path: Path, episode: Any, capsys: pytest.CaptureFixture[str]) -> None:
    append_trajectories(tmp_path / "loose.jsonl", [episode([1], [2])])
    assert main(["export", str(tmp_path / "loose.jsonl"), "--to", "minari", f"{tmp_path}/x-v0"]) == 2
    assert "--run FOLDER" in " ".join(capsys.readouterr().err.split())


def test_a_missing_library_is_named(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from searchqa_agents import minari_export

    monkeypatch.setitem(__import__("sys").modules, "minari", None)
    with pytest.raises(ConfigurationError, match=r"searchqa-gym\[minari\]"):
        minari_export.place_of("x-v0")
