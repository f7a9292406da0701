"""Spaces of token ids and of text."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from searchqa_envs.spaces import TokenSequence, UnicodeText


def test_samples_are_members_and_come_from_the_spaces_own_generator() -> None:
    space = TokenSequence(300, 0, 4096, seed=7)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    samples = [space.sample() for _ in range(200)]
    assert all(sample in space and 1 <= len(sample) <= 17 for sample in samples)
    assert np.array_equal(np.random.get_state()[1], before)
    again = TokenSequence(300, 0, 4096, seed=7)
    assert all(np.array_equal(sample, again.sample()) for sample in samples)


@pytest.mark.parametrize(
    ("x", "inside"),
    [
        (np.array([0, 9], dtype=np.int32), True),
        (np.array([0, 9], dtype=np.int64), True),
        (np.array([0, 10]), False),  # outside the vocabulary
        (np.array([-1]), False),
        (np.array([], dtype=np.int32), False),  # shorter than min_length
        (np.array([1, 2, 3, 4]), False),  # longer than max_length
        (np.array([[1]]), False),
        (np.array([1.0]), False),
        ([1, 2], False),  # a list is accepted by step, but is no member
    ],
)
def test_membership(x: object, inside: bool) -> None:
    assert (x in TokenSequence(10, 1, 3)) is inside


def test_equality_repr_json_and_pickle() -> None:
    space = TokenSequence(10, 1, 3)
    assert space == TokenSequence(10, 1, 3, seed=5)
    assert space != TokenSequence(11, 1, 3)
    assert space != spaces.Discrete(10)
    assert eval(repr(space)) == space
    samples = [np.array([1, 2], dtype=np.int32), np.array([3], dtype=np.int32)]
    restored = space.from_jsonable(space.to_jsonable(samples))
    assert all(np.array_equal(a, b) and b.dtype == np.int32 for a, b in zip(samples, restored, strict=True))
    assert pickle.loads(pickle.dumps(space)) == space


def test_batching_gives_a_tuple_and_flattening_is_refused() -> None:
    batched = batch_space(TokenSequence(10, 1, 3), 4)
    assert isinstance(batched, spaces.Tuple)
    assert len(batched.spaces) == 4
    with pytest.raises(ValueError, match="cannot be flattened"):
        spaces.utils.flatdim(TokenSequence(10, 1, 3))


def test_impossible_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="min_length <= max_length"):
        TokenSequence(10, 4, 3)


def test_unicode_text_holds_any_text() -> None:
    space = UnicodeText(30)
    assert "Où est 東京 🙂?" in space
    assert "x" * 31 not in space
    assert 3 not in space
    assert all(space.sample() in space for _ in range(50))
    assert space == UnicodeText(30)
    assert space != UnicodeText(31)
    assert pickle.loads(pickle.dumps(space)) == space
