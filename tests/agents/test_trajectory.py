"""Trajectories: equality, checks, and files that survive a crash."""

import gzip
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_agents.trajectory import Trajectory, TrajectoryFileError, TurnSpan, append_trajectories, load_trajectories


def make(logprobs=(-0.1, -2.5), question="who?", **changes) -> Trajectory:
    mask = np.array([0, 0, 1, 1, 0], dtype=np.int8)
    spread = None if logprobs is None else np.zeros(5, dtype=np.float32)
    if spread is not None:
        spread[mask == 1] = logprobs
    trajectory = Trajectory(
        token_ids=np.arange(5, dtype=np.int32),
        loss_mask=mask,
        logprobs=spread,
        turns=(TurnSpan(2, 4, 5, "search", "x", "<search>x</search>", "\n"),),
        prompt="who?\n",
        reward=0.5,
        question_id="q1",
        question=question,
        golden_answers=("a", "b"),
        answer=None,
        terminated=False,
        truncated=True,
        reward_terms={"em": 0.5},
        metrics={"em": 0.0},
        seconds={"model": 0.25},
        stamp={"seed": 3},
    )
    return replace(trajectory, **changes)


def test_equality_compares_arrays_and_ignores_time():
    assert make() == make()
    assert make() == make(seconds={"model": 9.0})
    assert make() != make(token_ids=np.array([0, 1, 2, 3, 9], dtype=np.int32))
    assert make() != make(logprobs=None)
    assert make() != make(token_ids=np.arange(5, dtype=np.int64))


def test_repr_is_short_and_tells_shapes():
    text = repr(make())
    assert "int32[5]" in text
    assert "sampled=2" in text
    assert len(text) < 300


def test_arrays_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"loss_mask must have one entry per token, shape \(5,\); got \(4,\)"):
        make(loss_mask=np.zeros(4, dtype=np.int8))


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_files_give_back_what_was_appended(tmp_path, name):
    first = [make(), make(logprobs=None), make(backend_error="lost", retokenized=True)]
    second = [make(sampling_logprobs=np.array([0, 0, -1, -1, 0], dtype=np.float32))]
    append_trajectories(tmp_path / name, first)
    append_trajectories(tmp_path / name, second)
    assert load_trajectories(tmp_path / name) == first + second


@given(st.lists(st.floats(-100, 0, width=32), min_size=2, max_size=2), st.text())
def test_json_keeps_every_bit_of_log_probabilities_and_every_text(logprobs, question):
    trajectory = make(logprobs=logprobs, question=question)
    assert Trajectory.from_json(trajectory.to_json()) == trajectory


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=2))
def test_advantages_of_sampled_tokens_come_back_with_every_bit(advantages):
    spread = np.array([0, 0, *advantages, 0], dtype=np.float32)
    trajectory = make(advantages=spread)
    assert len(trajectory.to_json()["advantages"]) == 2
    assert Trajectory.from_json(trajectory.to_json()) == trajectory
    assert trajectory != make()


def test_without_advantages_a_line_is_what_earlier_versions_wrote_and_read():
    assert "advantages" not in make().to_json()
    assert Trajectory.from_json(make().to_json()).advantages is None


def test_appending_after_a_crash_removes_the_unfinished_line(tmp_path):
    path = tmp_path / "t.jsonl"
    append_trajectories(path, [make()])
    with path.open("ab") as file:
        file.write(b'{"schema_version": 1, "token')
    append_trajectories(path, [make(reward=1.0)])
    assert load_trajectories(path) == [make(), make(reward=1.0)]


def test_a_malformed_line_names_file_and_line(tmp_path):
    path = tmp_path / "t.jsonl"
    append_trajectories(path, [make()])
    with path.open("a") as file:
        file.write('{"schema_version": 1}\n')
    with pytest.raises(TrajectoryFileError, match=r"t\.jsonl, line 2: .*loss_mask"):
        load_trajectories(path)
    path.write_text('{"schema_version": 99}\n')
    with pytest.raises(TrajectoryFileError, match="schema_version must be 1; got 99"):
        load_trajectories(path)


def test_a_torn_gzip_member_is_an_error(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    append_trajectories(path, [make()])
    path.write_bytes(path.read_bytes() + gzip.compress(b'{"a": 1}\n')[:-4])
    with pytest.raises(TrajectoryFileError, match="line 2"):
        load_trajectories(path)


def test_files_keep_passages_and_usage_and_those_of_earlier_versions_have_none(tmp_path):
    turn = TurnSpan(2, 4, 5, "search", "x", "<search>x</search>", "\n", (("p1", "Ada"), ("p2", "Bob")))
    trajectory = make(turns=(turn,), usage={"calls": 2.0, "prompt_tokens": 40.0, "generated_tokens": 7.0})
    append_trajectories(tmp_path / "t.jsonl", [trajectory])
    assert load_trajectories(tmp_path / "t.jsonl") == [trajectory]
    values = make().to_json()
    del values["usage"], values["turns"][0]["passages"]
    assert Trajectory.from_json(values) == make()
