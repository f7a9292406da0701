"""Advantages against values worked out by hand, against verl's, and against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_agents.advantages import (
    discounted_returns,
    gae,
    group_advantages,
    group_baseline_advantages,
    leave_one_out_advantages,
    reinforce_plus_plus_advantages,
    segment_gae,
    segment_starts,
    state_group_advantages,
    whiten,
)


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


@pytest.mark.parametrize("reward", [0.1, 0.3, 2 / 3, 0.7, 1.1])
def test_rewards_that_are_equal_but_no_binary_fractions_have_advantage_exactly_zero(reward):
    for size in range(2, 17):
        rewards, groups = torch.full((size,), reward), torch.zeros(size, dtype=torch.int64)
        assert not group_advantages(rewards, groups).any()
        assert not leave_one_out_advantages(rewards, groups).any()
        assert not state_group_advantages(rewards, torch.arange(size), groups, [()] * size).any()


def test_equal_rewards_have_advantage_zero_and_a_group_of_one_has_its_reward():
    rewards = torch.tensor([0.7, 0.7, 0.7, 0.5], dtype=torch.float64)
    advantages = group_advantages(rewards, torch.tensor([0, 0, 0, 1]))
    assert advantages[:3].abs().max() < 1e-9
    assert advantages[3].item() == pytest.approx(0.5 / (1 + 1e-6))


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="one length"):
        group_advantages(torch.zeros(3), torch.zeros(2, dtype=torch.int64))


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def close(actual: torch.Tensor, expected, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


# --- by hand


def test_discounted_returns_by_hand_whatever_the_order_of_trajectories():
    # trajectory 5: rewards 1, 0, 4 at gamma 0.5 -> 4; 0 + 0.5 * 4 = 2; 1 + 0.5 * 2 = 2
    # trajectory 2: rewards 3, -2 -> -2; 3 + 0.5 * -2 = 2
    assert discounted_returns(double(1, 0, 4, 3, -2), ids(5, 5, 5, 2, 2), 0.5).tolist() == [2, 2, 4, 2, -2]
    assert discounted_returns(double(1, 3, 0, -2, 4), ids(5, 2, 5, 2, 5), 0.5).tolist() == [2, 2, 2, -2, 4]  # interleaved


def test_gae_by_hand():
    # one trajectory, rewards 0, 1; values 0.5, 0.25; gamma 0.5, lambda 0.5
    # delta_1 = 1 + 0 - 0.25 = 0.75; delta_0 = 0 + 0.5 * 0.25 - 0.5 = -0.375
    # A_1 = 0.75; A_0 = -0.375 + 0.25 * 0.75 = -0.1875; returns A + V = 0.3125, 1
    estimate = gae(double(0, 1), double(0.5, 0.25), ids(0, 0), 0.5, 0.5)
    assert estimate.advantages.tolist() == [-0.1875, 0.75]
    assert estimate.returns.tolist() == [0.3125, 1.0]


def test_gae_of_a_truncated_episode_continues_with_the_value_of_where_it_stopped():
    # trajectory 0 (tokens 0, 2) terminated; trajectory 1 (tokens 1, 3) stopped where the value is 2: delta_last = 0 + 0.5 * 2 - 0.25 = 0.75,
    # delta_first = 0 + 0.5 * 0.25 - 0.5 = -0.375 -> the numbers above
    sequence = ids(0, 1, 0, 1)
    estimate = gae(double(0, 0, 1, 0), double(0.5, 0.5, 0.25, 0.25), sequence, 0.5, 0.5, bootstrap_values=double(0, 2))
    assert estimate.advantages.tolist() == [-0.1875, -0.1875, 0.75, 0.75]


def test_gae_refuses_bootstrap_values_that_are_not_indexed_by_sequence_id():
    with pytest.raises(ValueError, match=r"bootstrap_values is indexed by sequence id, so ids must lie in 0\.\.0; got 0\.\.1"):
        gae(double(0, 0), double(0, 0), ids(0, 1), bootstrap_values=double(1))


def test_segment_gae_by_hand():
    # two turns of 2 and 3 tokens; token rewards -0.5, 0 | 0.5, 0, 1 -> step rewards -0.5, 1.5
    # values at the first tokens: 1 and 0.5; gamma 1, lambda 0.5
    # delta_1 = 1.5 - 0.5 = 1; delta_0 = -0.5 + 0.5 - 1 = -1; A_1 = 1; A_0 = -1 + 0.5 * 1 = -0.5; returns 1.5, 0.5
    rewards, values = double(-0.5, 0, 0.5, 0, 1), double(1, 9, 0.5, 9, 9)
    estimate = segment_gae(rewards, values, ids(3, 3, 3, 3, 3), ids(0, 0, 1, 1, 1), 1.0, 0.5)
    assert estimate.advantages.tolist() == [-0.5, -0.5, 1, 1, 1]
    assert estimate.returns.tolist() == [0.5, 0.5, 1.5, 1.5, 1.5]


def test_segment_numbers_may_be_equal_in_different_trajectories():
    sequence, segment = ids(1, 0, 1, 0, 1), ids(0, 0, 1, 0, 1)
    assert segment_starts(sequence, segment).tolist() == [True, True, True, False, False]
    # rewards of trajectory 0: one segment, 4 + 5 = 9; of trajectory 1: 1, then 2 + 3 = 5 -> to go 6 and 5
    estimate = segment_gae(double(1, 4, 2, 5, 3), torch.zeros(5, dtype=torch.float64), sequence, segment)
    assert estimate.advantages.tolist() == [6, 9, 5, 9, 5]


def test_whiten_by_hand():
    # 1, 2, 6: mean 3, sample variance (4 + 1 + 9) / 2 = 7; the masked 100 does not count
    root = math.sqrt(7)
    close(whiten(double(1, 2, 100, 6), ids(1, 1, 0, 1), epsilon=0), [-2 / root, -1 / root, 0, 3 / root])


def test_whitening_equal_values_one_value_or_none_gives_zeros():
    assert whiten(torch.full((1000,), 0.7)).abs().max() < 1e-6
    assert whiten(torch.tensor([3.0])).tolist() == [0]
    assert whiten(torch.tensor([3.0, 4.0]), ids(0, 0)).tolist() == [0, 0]


def test_leave_one_out_by_hand():
    # group 7: 1, 0, 5 -> 1 - 2.5, 0 - 3, 5 - 0.5; group 3: 2, 4 -> -2, 2; group 9 alone keeps its reward
    advantages = leave_one_out_advantages(double(1, 2, 0, 4, 5, 0.5), ids(7, 3, 7, 3, 7, 9))
    close(advantages, [-1.5, -2, -3, 2, 4.5, 0.5])


def test_group_baseline_by_hand():
    close(group_baseline_advantages(double(1, 2, 0, 4, 5, 0.5), ids(7, 3, 7, 3, 7, 9)), [-1, -1, -2, 1, 3, 0.5])


def test_reinforce_plus_plus_by_hand():
    # to go at gamma 1: trajectory 0: 0.5, 1; trajectory 1: -1.5 -> mean 0, sample variance (0.25 + 1 + 2.25) / 2 = 1.75
    root = math.sqrt(1.75)
    close(reinforce_plus_plus_advantages(double(-0.5, 1, -1.5), ids(0, 0, 1)), [0.5 / root, 1 / root, -1.5 / root], 1e-7)


def test_state_groups_by_hand():
    # trajectories 0, 1 (group 4) and 2 (group 5). Rewards at the end: 1, 0; 3. gamma 0.5
    # episode: group 4 has mean 0.5 -> 0.5, -0.5; group 5 is one episode -> 3
    # discounted returns: trajectory 0 (two segments): 0.5, 1; trajectory 1 (three): 0, 0, 0; trajectory 2: 3
    # step groups in group 4: "start" {0.5, 0} -> 0.25, -0.25; "a" {1, 0, 0} -> 2/3, -1/3, -1/3. "start" of group 5 is another group: alone, 0
    advantages = state_group_advantages(
        double(0, 1, 0, 0, 0, 3),
        ids(0, 0, 1, 1, 1, 2),
        ids(4, 4, 4, 4, 4, 5),
        ["start", "a", "start", "a", "a", "start"],
        gamma=0.5,
        omega=3.0,
        normalise_std=False,
    )
    close(advantages, [0.5 + 0.75, 0.5 + 2, -0.5 - 0.75, -0.5 - 1, -0.5 - 1, 3])


def test_state_groups_divide_by_the_standard_deviations():
    # totals 1, 0: deviation 0.5, sample standard deviation sqrt(0.5); the same for the returns in "start"; "b" and "c" are alone
    advantages = state_group_advantages(double(0, 1, 0, 0), ids(0, 0, 1, 1), ids(0, 0, 0, 0), ["start", "b", "start", "c"], epsilon=0.0)
    root = math.sqrt(0.5)
    close(advantages, [0.5 / root * 2, 0.5 / root, -0.5 / root * 2, -0.5 / root])


def test_with_no_weight_on_the_step_state_groups_are_those_of_grpo():
    rewards, groups = double(0, 1, 0, 0.5, 0.25), ids(0, 0, 0, 0, 0)
    advantages = state_group_advantages(rewards, ids(0, 0, 1, 1, 2), groups, list("abcde"), omega=0.0)
    episode = group_advantages(double(1, 0.5, 0.25), ids(0, 0, 0))
    close(advantages, episode[ids(0, 0, 1, 1, 2)])


def test_state_groups_refuse_a_trajectory_in_two_groups_and_missing_states():
    with pytest.raises(ValueError, match="same group id"):
        state_group_advantages(double(0, 1), ids(0, 0), ids(0, 1), ["a", "b"])
    with pytest.raises(ValueError, match="one entry per segment: 2; got 1"):
        state_group_advantages(double(0, 1), ids(0, 0), ids(0, 0), ["a"])


# --- other implementations: numbers that verl 0.9.1 (verl.trainer.ppo.core_algos) gave for padded tensors with environment tokens between
# the policy's. Four trajectories, in two groups; token rewards with k1 * 0.1 taken off.
SEQUENCE = ids(0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3)
REWARDS = double(-0.22, -0.009, 0.885, -0.067, 0.047, 0.232, 0.104, 0.132, -0.046, -0.136, -0.5, 0.138, 0.798)
VALUES = double(-0.46, -0.92, -0.32, -0.07, 0.99, 0.76, 0.53, -0.49, -0.62, 0.98, 0.56, -0.28, 0.13)
OUTCOMES, GROUPS = double(1.0, 0.25, -0.5, 0.75), ids(0, 0, 1, 1)


# fmt: off
VERL_GAE = {
    (0.99, 0.95): (
        [0.4939161, 0.8075025, 0.885, 0.26680345, 0.302816, 0.232, -0.3040377,
         -0.40806242, -0.54159747, -0.57853, -0.5, 0.894954, 0.798],
        [0.83015911, 1.60017256, 1.08008333, 0.2158967, -0.80336127, -0.64491249, -0.94953671,
         -0.03779202, -0.04131074, -1.67068281, -1.17445536, 1.05017611, 0.54556357],
    ),
    (0.9, 0.5): (
        [-0.5236375, 0.24525, 0.885, 0.60053, 0.4934, 0.232, -0.11259513,
         0.0086775, 0.34595, -0.109, -0.5, 0.5556, 0.798],
        [-0.27039355, 1.19070479, 1.23796596, 0.60250239, -0.78516873, -0.82250208, -0.95875112,
         0.39817661, 0.95374502, -1.48950876, -1.45502891, 0.79876406, 0.59949433],
    ),
}
# fmt: on


@pytest.mark.parametrize(("gamma", "lam"), VERL_GAE)
def test_gae_equals_verl(gamma, lam):
    returns, whitened = VERL_GAE[gamma, lam]
    estimate = gae(REWARDS, VALUES, SEQUENCE, gamma, lam)
    close(estimate.returns, returns, 1e-8)
    close(whiten(estimate.advantages), whitened, 2e-8)


def test_reinforce_plus_plus_equals_verl():
    expected = [0.5615445, 1.08424166, 1.25482901, -0.00800731, 0.15397195, 0.11233113, -0.71638049]
    expected += [-0.96553601, -1.2968079, -1.31885304, -1.16838624, 1.20444013, 1.1026126]
    close(reinforce_plus_plus_advantages(REWARDS, SEQUENCE, 0.9), expected, 2e-8)


def test_group_estimators_equal_verl():
    close(leave_one_out_advantages(OUTCOMES, GROUPS), [0.75, -0.75, -1.25, 1.25])
    close(leave_one_out_advantages(OUTCOMES, ids(0, 0, 0, 1)), [1.125, 0.0, -1.125, 0.75])
    close(group_advantages(OUTCOMES, GROUPS), [0.70710545, -0.70710545, -0.70710598, 0.70710598], 1e-8)
    whitened = whiten(group_baseline_advantages(OUTCOMES, GROUPS)[SEQUENCE])
    close(whitened, [0.98898222] * 3 + [-0.43954765] * 3 + [-0.91572428] * 5 + [1.46515885] * 2, 2e-8)


# --- properties

numbers = st.floats(-10, 10, width=32)
discounts = st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0])


@st.composite
def batches(draw):
    """Tokens of up to 5 trajectories in a random interleaving: (rewards, values, sequence ids, segment ids)."""
    sequence = draw(st.lists(st.integers(0, 4), min_size=1, max_size=40))
    token = st.tuples(numbers, numbers, st.booleans())
    rewards, values, starts = zip(*draw(st.lists(token, min_size=len(sequence), max_size=len(sequence))), strict=True)
    turn = dict.fromkeys(range(5), 0)
    segments = []
    for which, start in zip(sequence, starts, strict=True):
        turn[which] += start
        segments.append(turn[which])
    return double(*rewards), double(*values), ids(*sequence), ids(*segments)


def naive_gae(rewards, values, sequence, gamma, lam):
    """The definition: for each token, the sum of (gamma lam)^l delta over the later tokens of its trajectory."""
    advantages = torch.zeros_like(rewards)
    for which in sequence.unique():
        at = (sequence == which).nonzero().flatten().tolist()
        following = [values[i].item() for i in at[1:]] + [0.0]
        delta = [rewards[i].item() + gamma * after - values[i].item() for i, after in zip(at, following, strict=True)]
        for t, i in enumerate(at):
            advantages[i] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(at)))
    return advantages


@settings(deadline=None)
@given(batches(), discounts, discounts)
def test_gae_is_its_definition(batch, gamma, lam):
    rewards, values, sequence, _ = batch
    estimate = gae(rewards, values, sequence, gamma, lam)
    close(estimate.advantages, naive_gae(rewards, values, sequence, gamma, lam))
    close(estimate.returns - values, estimate.advantages)


@settings(deadline=None)
@given(batches(), discounts)
def test_gae_at_lambda_one_is_the_return_minus_the_value(batch, gamma):
    rewards, values, sequence, _ = batch
    close(gae(rewards, values, sequence, gamma, 1.0).returns, discounted_returns(rewards, sequence, gamma))


@settings(deadline=None)
@given(batches(), discounts, discounts)
def test_segment_gae_is_gae_where_every_segment_has_one_token(batch, gamma, lam):
    rewards, values, sequence, _ = batch
    by_segment = segment_gae(rewards, values, sequence, torch.arange(len(rewards)), gamma, lam)
    for one, other in zip(by_segment, gae(rewards, values, sequence, gamma, lam), strict=True):
        assert torch.equal(one, other)


@settings(deadline=None)
@given(batches(), discounts, discounts)
def test_segment_gae_gives_all_tokens_of_a_segment_the_estimate_of_its_step(batch, gamma, lam):
    rewards, values, sequence, segments = batch
    estimate = segment_gae(rewards, values, sequence, segments, gamma, lam)
    starts = segment_starts(sequence, segments)
    steps = sorted(set(zip(sequence.tolist(), segments.tolist(), strict=True)))
    assert int(starts.sum()) == len(steps)
    members = [((sequence == s) & (segments == k)).nonzero().flatten() for s, k in steps]
    assert all(starts[at].tolist() == [True] + [False] * (len(at) - 1) for at in members)
    step_rewards = torch.stack([rewards[at].sum() for at in members])
    step_values = torch.stack([values[at[0]] for at in members])
    expected = naive_gae(step_rewards, step_values, ids(*(s for s, _ in steps)), gamma, lam)
    for at, advantage in zip(members, expected, strict=True):
        close(estimate.advantages[at], advantage.expand(len(at)))
        close(estimate.returns[at], (advantage + values[at[0]]).expand(len(at)))


@settings(deadline=None)
@given(batches(), st.permutations(range(5)))
def test_the_order_of_trajectories_changes_nothing(batch, order):
    rewards, values, sequence, segments = batch
    moved = torch.cat([(sequence == which).nonzero().flatten() for which in order])
    bootstrap = double(0.5, -1, 2, 0, 1)
    names = ids(*(order.index(which) for which in range(5)))  # and they get new numbers

    for estimate in (
        lambda r, v, s, k, b: gae(r, v, s, 0.9, 0.8, bootstrap_values=b).advantages,
        lambda r, v, s, k, b: segment_gae(r, v, s, k, 0.9, 0.8, bootstrap_values=b).advantages,
        lambda r, v, s, k, b: discounted_returns(r, s, 0.9),
    ):
        plain = estimate(rewards, values, sequence, segments, bootstrap)
        renamed = bootstrap[ids(*order)]
        again = estimate(rewards[moved], values[moved], names[sequence[moved]], segments[moved], renamed)
        assert torch.equal(plain[moved], again)


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, st.booleans()), min_size=2, max_size=50))
def test_whitened_values_have_mean_zero_and_standard_deviation_one(pairs):
    values, mask = double(*(v for v, _ in pairs)), torch.tensor([m for _, m in pairs])
    whitened = whiten(values, mask)
    assert (whitened[~mask] == 0).all()
    if mask.sum() < 2 or values[mask].std() < 1e-2:
        return
    assert whitened[mask].mean().abs() < 1e-9
    assert whitened[mask].std().item() == pytest.approx(1, abs=1e-4)  # epsilon 1e-8 against a variance of at least 1e-4
    close(whiten(values.masked_fill(~mask, math.nan), mask), whitened)


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, st.integers(0, 3)), min_size=1, max_size=30))
def test_group_estimators_are_their_definitions(pairs):
    rewards, groups = double(*(r for r, _ in pairs)), ids(*(g for _, g in pairs))
    for i in range(len(pairs)):
        same = groups == groups[i]
        others = same.clone()
        others[i] = False
        if not others.any():
            continue
        close(leave_one_out_advantages(rewards, groups)[i], rewards[i] - rewards[others].mean())
        close(group_baseline_advantages(rewards, groups)[i], rewards[i] - rewards[same].mean())


@settings(deadline=None)
@given(batches())
def test_state_groups_are_their_definition(batch):
    rewards, _, sequence, segments = batch
    groups, states = sequence % 2, [int(s) % 3 for s in segments]
    returns = discounted_returns(rewards, sequence, 0.9)
    advantages = state_group_advantages(rewards, sequence, groups, states, gamma=0.9, omega=0.5, normalise_std=False)
    present = sequence.unique()
    total = {int(s): rewards[sequence == s].sum() for s in present}
    for i in range(len(rewards)):
        fellows = [total[int(s)] for s in present if s % 2 == groups[i]]
        episode = total[int(sequence[i])] - (sum(fellows) / len(fellows) if len(fellows) > 1 else 0)
        equal = [returns[j] for j in range(len(rewards)) if groups[j] == groups[i] and states[j] == states[i]]
        close(advantages[i], episode + 0.5 * (returns[i] - sum(equal) / len(equal)))


def test_float32_keeps_its_type_and_nothing_carries_a_gradient():
    values = VALUES.float().requires_grad_()
    rewards = REWARDS.float().requires_grad_()
    results = [*gae(rewards, values, SEQUENCE, 0.99, 0.95), *segment_gae(rewards, values, SEQUENCE, SEQUENCE)]
    results += [whiten(values), discounted_returns(rewards, SEQUENCE), reinforce_plus_plus_advantages(rewards, SEQUENCE)]
    results.append(state_group_advantages(rewards, SEQUENCE, SEQUENCE, SEQUENCE.tolist()))
    assert all(result.dtype == torch.float32 and not result.requires_grad for result in results)
    close(gae(rewards, values, SEQUENCE, 0.99, 0.95).advantages, gae(REWARDS, VALUES, SEQUENCE, 0.99, 0.95).advantages, 1e-6)


def test_a_hundred_thousand_tokens_at_discount_one_stay_exact_in_float32():
    rewards = torch.full((100_000,), 0.1)
    returns = discounted_returns(rewards, torch.arange(2).repeat_interleave(50_000))
    assert returns[0].item() == pytest.approx(5000, rel=1e-6)
    assert returns[0] == returns[50_000]


@pytest.mark.parametrize("function", [discounted_returns, leave_one_out_advantages, reinforce_plus_plus_advantages])
def test_lengths_that_differ_are_refused(function):
    with pytest.raises(ValueError, match="1-D and of one length"):
        function(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
