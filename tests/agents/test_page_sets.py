"""Which trajectories a page shows: evaluations alike, rollouts whole and evenly over the run, and it says what it leaves out."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_agents.page_sets import count_lines, cut_sets, folder_sets, how_many, set_name, trajectory_files
from searchqa_agents.trajectory import Trajectory, TrajectoryFileError, append_trajectories


def trajectory(name: str) -> Trajectory:
    return Trajectory(
        token_ids=np.zeros(1, np.int32),
        loss_mask=np.zeros(1, np.int8),
        logprobs=None,
        turns=(),
        prompt="",
        reward=0.0,
        question_id=name,
        question="?",
        golden_answers=(),
        answer=None,
        terminated=False,
        truncated=True,
    )


@pytest.mark.parametrize(
    ("counts", "most", "expected"),
    [
        ({"before": 100, "after": 100}, 5000, {"before": 100, "after": 100}),
        ({"before": 100, "after": 100}, 60, {"before": 30, "after": 30}),  # the same questions stay side by side
        ({"a": 10, "b": 500, "c": 500}, 210, {"a": 10, "b": 100, "c": 100}),  # what a small set leaves is for the others
        ({"before": 10, "rollouts-1": 20, "rollouts-2": 20, "rollouts-3": 20}, 50, {"before": 10, "rollouts-1": 20, "rollouts-3": 20}),
        ({f"rollouts-{i}": 10 for i in range(9)}, 30, {"rollouts-0": 10, "rollouts-4": 10, "rollouts-8": 10}),
        ({"before": 10, "rollouts-1": 20, "rollouts-2": 20}, 15, {"before": 10, "rollouts-2": 5}),
        ({"run/rollouts-1": 20, "run/after": 10}, 10, {"run/after": 10}),
        ({}, 10, {}),
    ],
)
def test_how_many_of_each_set(counts: dict[str, int], most: int, expected: dict[str, int]) -> None:
    assert how_many(counts, most) == expected


@given(
    st.dictionaries(st.sampled_from(["before", "after", *(f"rollouts-{i}" for i in range(12))]), st.integers(0, 40)), st.integers(1, 200)
)
def test_a_page_never_has_more_than_it_may_and_all_where_they_fit(counts: dict[str, int], most: int) -> None:
    shown = how_many(counts, most)
    assert sum(shown.values()) <= most
    assert all(shown[name] <= counts[name] for name in shown)
    assert list(shown) == [name for name in counts if name in shown]
    if sum(counts.values()) <= most:
        assert shown == counts


def test_a_folder_is_read_in_the_order_of_the_page_and_the_page_says_what_is_left_out(tmp_path: Path) -> None:
    for name, count in (("after", 2), ("before", 2), ("rollouts-000010", 3), ("rollouts-000005", 3), ("nq", 1), ("hotpotqa", 1)):
        append_trajectories(tmp_path / "trajectories" / f"{name}.jsonl.gz", [trajectory(f"{name}{i}") for i in range(count)])
    (tmp_path / "trajectories" / ".partial-1-after.jsonl.gz").write_bytes(b"half")
    sets, notes = folder_sets(tmp_path, ["nq", "hotpotqa"])
    assert list(sets) == ["before", "after", "nq", "hotpotqa", "rollouts-000005", "rollouts-000010"]
    assert [one.question_id for one in sets["after"]] == ["after0", "after1"]
    assert notes == []
    sets, notes = folder_sets(tmp_path, ["nq", "hotpotqa"], most=9)
    assert [len(own) for own in sets.values()] == [2, 2, 1, 1, 3]
    assert len(notes) == 1
    assert notes[0].startswith("The page has 9 of 12 trajectories (rollouts-000005: none).")


def test_trajectories_at_hand_are_cut_and_counted() -> None:
    sets, notes = cut_sets({"eval": [trajectory(str(i)) for i in range(8)]}, most=5)
    assert [one.question_id for one in sets["eval"]] == ["0", "1", "2", "3", "4"]
    assert notes[0].startswith("The page has 5 of 8 trajectories (eval: the first 5 of 8).")


def test_names_of_sets_are_those_of_their_files_without_endings(tmp_path: Path) -> None:
    for name in ("step.1.jsonl", "after.jsonl.gz"):
        append_trajectories(tmp_path / "trajectories" / name, [trajectory("q")])
    assert [set_name(file) for file in trajectory_files(tmp_path)] == ["after", "step.1"]


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "torn.jsonl.gz"
    file.write_bytes(gzip.compress(b"{}\n" * 100)[:-9])
    with pytest.raises(TrajectoryFileError, match=r"torn\.jsonl\.gz is torn"):
        count_lines(file)
