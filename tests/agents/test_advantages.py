"""Advantages against values worked out by hand."""

import math

import pytest
import torch

from searchqa_agents.advantages import group_advantages


def test_group_advantages_by_hand_with_sample_standard_deviation():
    # group 7: rewards 1, 0, 0 -> mean 1/3, sample variance ((2/3)^2 + 2 (1/3)^2) / 2 = 1/3
    # group 3: rewards 2, 4    -> mean 3, sample variance 2
    rewards = torch.tensor([1.0, 2.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    groups = torch.tensor([7, 3, 7, 3, 7])
    std = math.sqrt(1 / 3)
    expected = [
        (2 / 3) / (std + 1e-6),
        -1 / (math.sqrt(2) + 1e-6),
        (-1 / 3) / (std + 1e-6),
        1 / (math.sqrt(2) + 1e-6),
        (-1 / 3) / (std + 1e-6),
    ]
    assert group_advantages(rewards, groups).tolist() == pytest.approx(expected, rel=1e-12)


def test_without_std_the_deviation_from_the_mean_is_left():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert group_advantages(rewards, torch.zeros(4, dtype=torch.int64), normalise_std=False).tolist() == [0.75, -0.25, -0.25, -0.25]


def test_equal_rewards_have_advantage_zero_and_a_group_of_one_has_its_reward():
    rewards = torch.tensor([0.7, 0.7, 0.7, 0.5], dtype=torch.float64)
    advantages = group_advantages(rewards, torch.tensor([0, 0, 0, 1]))
    assert advantages[:3].abs().max() < 1e-9
    assert advantages[3].item() == pytest.approx(0.5 / (1 + 1e-6))


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="one length"):
        group_advantages(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
