"""Losses against values worked out by hand, against verl's and TRL's, and against naive loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_agents.losses import (
    clipped_policy_loss,
    entropy_bonus,
    kl_estimate,
    kl_penalised_rewards,
    next_token_loss,
    reinforce_loss,
    sequence_ratio_loss,
    token_weights,
    truncated_importance,
    value_loss,
)


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([math.log(p) for p in probabilities], dtype=torch.float64, requires_grad=True)


def test_clipped_loss_by_hand():
    # ratios 1, 1.5, 0.5, 1.5 with advantages 2, 1, -1, -1; clip 0.2
    # min(r A, clip(r) A): 2; min(1.5, 1.2) = 1.2; min(-0.5, -0.8) = -0.8; min(-1.5, -1.2) = -1.5  -> sum 0.9
    old = logs(0.2, 0.2, 0.4, 0.2).detach()
    new = logs(0.2, 0.3, 0.2, 0.3)
    loss = clipped_policy_loss(new, old, torch.tensor([2.0, 1.0, -1.0, -1.0], dtype=torch.float64), normaliser=4, clip_coef=0.2)
    assert loss.loss.item() == pytest.approx(-0.9 / 4)
    assert loss.clipfrac.item() == pytest.approx(2 / 4)  # the second and third
    kl = sum(r - 1 - math.log(r) for r in (1, 1.5, 0.5, 1.5)) / 4
    assert loss.approx_kl.item() == pytest.approx(kl)
    loss.loss.backward()
    # d/dlogp of r A is r A; clipped tokens have no gradient
    assert new.grad.tolist() == pytest.approx([-2 / 4, 0, 0, 1.5 / 4])


def test_the_upper_clip_can_be_higher():
    old, new = logs(0.2).detach(), logs(0.3)
    loss = clipped_policy_loss(new, old, torch.tensor([1.0], dtype=torch.float64), 1, clip_coef=0.2, clip_coef_high=0.4)
    assert loss.loss.item() == pytest.approx(-1.4)


def test_masked_tokens_have_no_value_and_no_gradient_whatever_their_log_probability():
    mask = torch.tensor([1, 0, 1, 0])
    advantages = torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    old = logs(0.5, 0.5, 0.5, 0.5).detach()
    losses = []
    for other in (0.1, 0.9):
        new = logs(0.6, other, 0.4, other)
        loss = clipped_policy_loss(new, old, advantages, normaliser=2, mask=mask)
        loss.loss.backward()
        assert new.grad[mask == 0].tolist() == [0, 0]
        assert (new.grad[mask == 1] != 0).all()
        losses.append([value.item() for value in loss])
    assert losses[0] == losses[1]
    unmasked = clipped_policy_loss(logs(0.6, 0.1, 0.4, 0.1), old, advantages, normaliser=2).loss.item()
    assert unmasked != pytest.approx(losses[0][0])


def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch():
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)
    old = logs(0.5, 0.4, 0.3, 0.2, 0.6).detach()
    whole, parts = logs(0.5, 0.41, 0.3, 0.25, 0.6), logs(0.5, 0.41, 0.3, 0.25, 0.6)
    clipped_policy_loss(whole, old, advantages, 5).loss.backward()
    for part in (slice(0, 1), slice(1, 5)):  # of different sizes: a mean of means would be wrong
        clipped_policy_loss(parts[part], old[part], advantages[part], 5).loss.backward()
    assert torch.allclose(whole.grad, parts.grad)


def test_next_token_loss_by_hand():
    assert next_token_loss(logs(0.5, 0.25), 2).item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert next_token_loss(logs(0.5, 0.25), 1, torch.tensor([1, 0])).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", math.log(0.5 / 0.25)), ("k2", math.log(0.25 / 0.5) ** 2 / 2), ("k3", 0.25 / 0.5 - 1 - math.log(0.25 / 0.5))],
)
def test_kl_estimators_by_hand(estimator, expected):
    assert kl_estimate(logs(0.5), logs(0.25), estimator).item() == pytest.approx(expected)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    assert (policy * kl_estimate(policy.log(), reference.log(), estimator)).sum().item() == pytest.approx(exact.item())


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(logs(0.5), logs(0.5), "k4")


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def close(actual: torch.Tensor, expected, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual.detach().double(), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def value_and_gradient(loss_of, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    variable = at.detach().clone().requires_grad_()
    loss = loss_of(variable)
    loss.backward()
    return loss.detach(), variable.grad


# --- by hand


def test_dual_clip_bounds_the_loss_of_a_negative_advantage():
    # ratios 4, 2, 4, 0.5 with advantages -1, -1, 1, -1; clip 0.2, dual clip 3
    # min(r A, clip A): -4, -2, 1.2, -0.8; not less than 3 A for negative A: -3, -2, 1.2, -0.8 -> sum -4.6
    old, new = logs(0.2, 0.2, 0.2, 0.2).detach(), logs(0.8, 0.4, 0.8, 0.1)
    loss = clipped_policy_loss(new, old, double(-1, -1, 1, -1), 4, dual_clip_coef=3.0)
    assert loss.loss.item() == pytest.approx(4.6 / 4)
    assert loss.clipfrac.item() == pytest.approx(3 / 4)  # all but the second
    loss.loss.backward()
    assert new.grad.tolist() == pytest.approx([0, 2 / 4, 0, 0])


def test_a_dual_clip_of_one_or_less_is_refused():
    with pytest.raises(ValueError, match="more than 1"):
        clipped_policy_loss(logs(0.5), logs(0.5), double(1), 1, dual_clip_coef=1.0)


def test_weights_are_factors_of_the_tokens_losses():
    # ratios 1 and 1 with advantages 2, -1 and weights 0.5, 3: -(1 - 3) / 2 = 1
    old, new = logs(0.2, 0.4).detach(), logs(0.2, 0.4)
    assert clipped_policy_loss(new, old, double(2, -1), 2, weights=double(0.5, 3)).loss.item() == pytest.approx(1)


def test_sequence_ratio_loss_by_hand():
    # sequence 0: ratios 2 and 0.5 -> geometric mean 1, A = 3; sequence 1: one ratio 1.5, A = 1, clipped at 1.2
    # -(3 + 1.2) / 2 = -2.1; gradient of token t in sequence 0: -s A / (2 tokens * 2 sequences) = -0.75
    old, new = logs(0.2, 0.2, 0.4).detach(), logs(0.4, 0.3, 0.2)
    loss = sequence_ratio_loss(new, old, double(3, 1, 3), ids(0, 1, 0), 2, clip_coef=0.1, clip_coef_high=0.2)
    assert loss.loss.item() == pytest.approx(-2.1)
    assert loss.clipfrac.item() == pytest.approx(0.5)
    # k3 of old against new, r - 1 - log r, in the means over sequences: ((2 - 1 - log 2) + (0.5 - 1 + log 2)) / 2 = 0.25 and 0.5 - log 1.5
    assert loss.approx_kl.item() == pytest.approx((0.25 + 0.5 - math.log(1.5)) / 2)
    loss.loss.backward()
    assert new.grad.tolist() == pytest.approx([-0.75, 0, -0.75])


def test_reinforce_loss_by_hand():
    new = logs(0.5, 0.25)
    loss = reinforce_loss(new, double(2, -1), 2)  # -(2 log 0.5 - log 0.25) / 2 = 0
    assert loss.item() == pytest.approx(0)
    loss.backward()
    assert new.grad.tolist() == [-1, 0.5]


def test_value_loss_by_hand():
    # old 0; values 0.1, 1, 1, -1; returns 1, 2, 0, -0.1; clip 0.2 -> clipped values 0.1, 0.2, 0.2, -0.2
    # errors 0.81, 1, 1, 0.81 and clipped 0.81, 3.24, 0.04, 0.01 -> larger: 0.81, 3.24, 1, 0.81 = 5.86; half of the mean 0.7325
    values = double(0.1, 1, 1, -1).requires_grad_()
    loss = value_loss(values, torch.zeros(4, dtype=torch.float64), double(1, 2, 0, -0.1), 4)
    assert loss.loss.item() == pytest.approx(0.7325)
    assert loss.clipfrac.item() == pytest.approx(1 / 4)
    loss.loss.backward()
    close(values.grad, [-0.9 / 4, 0, 1 / 4, -0.9 / 4])
    assert value_loss(values, values.detach(), double(1, 2, 0, -0.1), 4, clip_coef=None).loss.item() == pytest.approx(3.62 / 8)


def test_entropy_bonus_by_hand():
    assert entropy_bonus(double(1, 2, 6), 2, mask=ids(1, 0, 1)).item() == 3.5
    assert entropy_bonus(double(1, 2, 6), 2, mask=ids(1, 0, 1), weights=double(2, 1, 0.5)).item() == 2.5


@pytest.mark.parametrize(
    ("how", "length", "expected"),
    [
        ("token-mean", None, [1, 1, 1, 1]),
        ("sequence-mean", None, [4 / (2 * 3), 4 / (2 * 3), 4 / (2 * 1), 4 / (2 * 3)]),
        ("constant-length", 8, [4 / (2 * 8)] * 4),
    ],
)
def test_token_weights_by_hand(how, length, expected):
    close(token_weights(ids(5, 5, 2, 5), how, length=length), expected, 1e-6)
    masked = token_weights(ids(5, 5, 7, 2, 5), how, length=length, mask=ids(1, 1, 0, 1, 1))
    close(masked, [*expected[:2], 0, *expected[2:]], 1e-6)


def test_token_weights_refuse_a_missing_length_and_an_unknown_name():
    with pytest.raises(ValueError, match="only then"):
        token_weights(ids(0), "constant-length")
    with pytest.raises(ValueError, match="only then"):
        token_weights(ids(0), "token-mean", length=3)
    with pytest.raises(ValueError, match="token-mean, sequence-mean or constant-length"):
        token_weights(ids(0), "mean")


def test_truncated_importance_by_hand_and_without_gradient():
    weights = truncated_importance(logs(0.2, 0.9, 0.3), logs(0.4, 0.1, 0.3).detach(), cap=2.0)
    close(weights, [0.5, 2, 1])
    assert not weights.requires_grad


def test_a_clamped_estimate_is_bounded_and_has_a_finite_gradient():
    policy = torch.tensor([-200.0, -3.0, -0.5], requires_grad=True)  # exp(199) is infinite in float32
    estimate = kl_estimate(policy, torch.full((3,), -1.0), "k3", clamp=10.0)
    # exp(2) - 1 - 2 = 4.389; exp(-0.5) - 1 + 0.5 = 0.1065
    close(estimate, [10, math.exp(2) - 3, math.exp(-0.5) - 0.5], 1e-6)
    estimate.sum().backward()
    close(policy.grad, [0, 1 - math.exp(2), 1 - math.exp(-0.5)], 1e-6)
    assert kl_estimate(logs(1e-9), logs(1.0), "k1", clamp=10.0).item() == -10


def test_kl_penalised_rewards_by_hand():
    # k1 = log p - log ref: log 2, -log 2, log 4 at coefficient 0.5; reward 3 on trajectory 0's last token, -1 on trajectory 1's
    new, reference = logs(0.5, 0.2, 0.4), logs(0.25, 0.4, 0.1)
    rewards = kl_penalised_rewards(double(3, -1), new, reference, ids(0, 1, 0), 0.5)
    close(rewards, [-0.5 * math.log(2), -1 + 0.5 * math.log(2), 3 - 0.5 * math.log(4)])
    assert not rewards.requires_grad


def test_environment_tokens_have_no_penalty_and_do_not_carry_the_reward():
    rewards = kl_penalised_rewards(double(3), logs(0.5, 0.5, 0.5), logs(0.25, 0.25, 0.25), ids(0, 0, 0), 1.0, mask=ids(0, 1, 0))
    close(rewards, [0, 3 - math.log(2), 0])


def test_a_trajectory_without_a_token_for_its_reward_is_refused():
    with pytest.raises(ValueError, match="trajectory 1 has none"):
        kl_penalised_rewards(double(1, 1), logs(0.5), logs(0.5), ids(0), 0.1)
    with pytest.raises(ValueError, match=r"0\.\.0; got 0\.\.3"):
        kl_penalised_rewards(double(1), logs(0.5, 0.5), logs(0.5, 0.5), ids(0, 3), 0.1)


# --- other implementations: values and gradients of verl 0.9.1 (verl.trainer.ppo.core_algos) and TRL 1.16.0 (GRPOTrainer._compute_loss) for
# padded tensors, 4 sequences by 5 positions, with environment tokens between the policy's
SEQUENCE = ids(0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3)
LOGPROBS = double(-0.19, -0.95, -0.33, -0.71, -1.31, -2.16, -1.69, -2.49, -1.97, -1.2, -1.6, -1.72, -1.82)
OLD = double(-0.12, -1.4, 0.17, -1.06, -1.7, -1.85, -1.4, -2.19, -2.06, -0.98, -2.09, -1.96, -2.13)
REFERENCE = double(-2.39, -1.04, -1.48, -1.38, -0.84, -2.34, -0.65, -1.17, -2.43, -2.56, -1.6, -0.34, -1.34)
ADVANTAGES = double(-1.33, 1.91, 0.25, 1.88, 1.48, -1.08, 0.85, -0.22, 0.13, -1.4, 0.63, -1.82, 0)
ONE_PER_SEQUENCE = double(-1.33, 1.88, 0.85, -1.82)[SEQUENCE]
VALUES = double(-0.46, -0.92, -0.32, -0.07, 0.99, 0.76, 0.53, -0.49, -0.62, 0.98, 0.56, -0.28, 0.13)
OLD_VALUES = double(-0.73, -1.01, -0.64, -0.05, 1.03, 0.46, 0.46, -0.13, -0.2, 0.52, 0.76, -0.6, -0.19)
RETURNS = double(-0.22, -0.009, 0.885, -0.067, 0.047, 0.232, 0.104, 0.132, -0.046, -0.136, -0.5, 0.138, 0.798)


def weights_for(how, length=None):
    return token_weights(SEQUENCE, how, length=length, dtype=torch.float64)


# fmt: off
VERL_CLIPPED = {
    ("token-mean", None): (
        -0.21563764,
        [0.09539106, 0, -0.01166405, 0, 0, 0, -0.04892493, 0, -0.01094174, 0.0864251, 0, 0, 0],
    ),
    ("sequence-mean", None): (
        -0.12931109,
        [0.10334031, 0, -0.01263606, 0, 0, 0, -0.0318012, 0, -0.00711213, 0.05617632, 0, 0, 0],
    ),
    ("constant-length", 5): (
        -0.14016446,
        [0.06200419, 0, -0.00758163, 0, 0, 0, -0.0318012, 0, -0.00711213, 0.05617632, 0, 0, 0],
    ),
}
TRL_CLIPPED = {  # with weights of truncated importance
    ("sequence-mean", None): (
        -0.06342726,
        [0.20668063, 0, -0.02527211, 0, 0, 0, -0.01502182, 0, -0.01029648, 0.11235263, 0, 0.05723412, 0],
    ),
    ("token-mean", None): (
        -0.03584707,
        [0.19078212, 0, -0.0233281, 0, 0, 0, -0.0231105, 0, -0.01584074, 0.1728502, 0, 0.035221, 0],
    ),
    ("constant-length", 8): (
        -0.01456287,
        [0.07750524, 0, -0.00947704, 0, 0, 0, -0.00938864, 0, -0.0064353, 0.07022039, 0, 0.01430853, 0],
    ),
}
# fmt: on


@pytest.mark.parametrize(("how", "length"), VERL_CLIPPED)
def test_clip_higher_dual_clip_and_token_weights_equal_verl(how, length):
    loss, gradient = value_and_gradient(
        lambda x: (
            clipped_policy_loss(
                x, OLD, ADVANTAGES, 13, clip_coef=0.2, clip_coef_high=0.28, dual_clip_coef=1.25, weights=weights_for(how, length)
            ).loss
        ),
        LOGPROBS,
    )
    close(loss, VERL_CLIPPED[how, length][0], 1e-8)
    close(gradient, VERL_CLIPPED[how, length][1], 1e-8)


@pytest.mark.parametrize(("how", "length"), TRL_CLIPPED)
def test_grpo_dapo_and_dr_grpo_losses_with_truncated_importance_equal_trl(how, length):
    weights = truncated_importance(OLD, REFERENCE, 2.0) * weights_for(how, length)
    loss, gradient = value_and_gradient(
        lambda x: clipped_policy_loss(x, OLD, ADVANTAGES, 13, clip_coef=0.2, clip_coef_high=0.28, weights=weights).loss, LOGPROBS
    )
    close(loss, TRL_CLIPPED[how, length][0], 1e-8)
    close(gradient, TRL_CLIPPED[how, length][1], 1e-8)


def test_the_loss_with_k3_equals_trl():
    def loss_of(x):
        weights = truncated_importance(OLD, REFERENCE, 2.0)
        policy = clipped_policy_loss(x, OLD, ADVANTAGES, 13, clip_coef=0.2, clip_coef_high=0.28, weights=weights).loss
        return policy + 0.1 * kl_estimate(x, REFERENCE, "k3").sum() / 13

    loss, gradient = value_and_gradient(loss_of, LOGPROBS)
    close(loss, 0.01615219, 1e-8)
    expected = [0.1976221, 0.00066207, -0.01807146, 0.00375609, -0.00461534, 0.00126715, -0.0371814]
    expected += [-0.02110324, -0.01300446, 0.1785682, 0, 0.01233714, -0.00473903]
    close(gradient, expected, 1e-8)


def test_sequence_ratio_loss_equals_verl_and_trl():
    def loss_of(weights):
        return lambda x: (
            sequence_ratio_loss(x, OLD, ONE_PER_SEQUENCE, SEQUENCE, 4, clip_coef=0.05, clip_coef_high=0.1, weights=weights).loss
        )

    loss, gradient = value_and_gradient(loss_of(None), LOGPROBS)  # verl
    close(loss, 0.19853753, 1e-8)
    close(gradient, [0.1064875] * 3 + [0] * 3 + [-0.04058928] * 5 + [0.29951073] * 2, 1e-8)

    importance = truncated_importance(OLD, REFERENCE, 2.0)  # TRL multiplies its one loss per sequence by their mean
    means = torch.stack([importance[s == SEQUENCE].mean() for s in range(4)])[SEQUENCE]
    loss, gradient = value_and_gradient(loss_of(means), LOGPROBS)
    close(loss, -0.09472094, 1e-8)
    close(gradient, [0.16674793] * 3 + [0] * 3 + [-0.03972329] * 5 + [0.09760208] * 2, 1e-8)


def test_reinforce_loss_with_truncated_importance_equals_verl():
    weights = truncated_importance(OLD, REFERENCE, 2.0)
    loss, gradient = value_and_gradient(lambda x: reinforce_loss(x, ADVANTAGES, 13, weights=weights), LOGPROBS)
    close(loss, -0.21030046, 1e-8)
    expected = [0.20461538, -0.10250475, -0.03846154, -0.19915386, -0.04817538, 0.13560781, -0.03088551]
    expected += [0.00610238, -0.01447735, 0.21538462, -0.02968882, 0.02770582, 0]
    close(gradient, expected, 1e-8)


def test_value_loss_equals_verl():
    loss, gradient = value_and_gradient(lambda x: value_loss(x, OLD_VALUES, RETURNS, 13, clip_coef=0.25).loss, VALUES)
    close(loss, 0.29772569, 1e-8)
    assert value_loss(VALUES, OLD_VALUES, RETURNS, 13, clip_coef=0.25).clipfrac.item() == pytest.approx(0.30769231)
    expected = [0, -0.07007692, 0, -0.00023077, 0.07253846, 0.04061538, 0.03276923]
    expected += [-0.04784615, -0.04415385, 0.08584615, 0.08153846, 0, 0]
    close(gradient, expected, 1e-8)


def test_kl_estimates_and_penalised_rewards_equal_verl():
    k3 = [1.31080316, 0.00393119, 0.46663677, 0.18170858, 0.12999419, 0.01527021, 0.78921701]
    k3 += [1.42342138, 0.09128365, 0.61666078, 0, 1.59490163, 0.1360744]
    close(kl_estimate(LOGPROBS, REFERENCE, "k3", clamp=10.0), k3, 1e-8)
    k2 = [2.42, 0.00405, 0.66125, 0.22445, 0.11045, 0.0162, 0.5408, 0.8712, 0.1058, 0.9248, 0, 0.9522, 0.1152]
    close(kl_estimate(LOGPROBS, REFERENCE, "k2"), k2, 1e-8)
    close(kl_penalised_rewards(double(1.0, 0.25, -0.5, 0.75), LOGPROBS, REFERENCE, SEQUENCE, 0.1), RETURNS)


# --- properties

unit = st.floats(-1, 1, width=32)


@st.composite
def tokens(draw, smallest=1):
    """(logprobs, old logprobs, advantages, sequence ids, weights, mask), all [N]."""
    n = draw(st.integers(smallest, 24))
    column = st.lists(unit, min_size=n, max_size=n)
    new, old, advantages = (double(*draw(column)) for _ in range(3))
    sequence = ids(*draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    return new - 1, old - 1, advantages, sequence, double(*draw(column)).abs(), mask


LOSSES = {
    "clipped": lambda x, old, a, s, w, m: clipped_policy_loss(x, old, a, 7, dual_clip_coef=1.5, weights=w, mask=m).loss,
    "sequence": lambda x, old, a, s, w, m: sequence_ratio_loss(x, old, a, s, 7, clip_coef=0.2, weights=w, mask=m).loss,
    "reinforce": lambda x, old, a, s, w, m: reinforce_loss(x, a, 7, weights=w, mask=m),
    "value": lambda x, old, a, s, w, m: value_loss(x, old, a, 7, weights=w, mask=m).loss,
    "entropy": lambda x, old, a, s, w, m: entropy_bonus(x, 7, weights=w, mask=m),
}


def naive(name, x, old, a, s, w, m):
    """The same losses, one token (or sequence) after the other."""
    total = x.new_zeros(()) * x.sum()
    for i in range(len(x)):
        if not m[i]:
            continue
        ratio, length = (x[i] - old[i]).exp(), 1
        if name == "sequence":
            same = (s == s[i]) & m
            length = int(same.sum())
            own = x[i] - old[i]
            mean = ((x - old)[same].sum() / length).detach()
            ratio = (mean + own - own.detach()).exp()
        if name in ("clipped", "sequence"):
            term = ratio * a[i]
            bounded = min(max(ratio, ratio.new_tensor(0.8)), ratio.new_tensor(1.2 if name == "clipped" else 1.0004)) * a[i]
            term = bounded if bounded < term else term
            if name == "clipped" and a[i] < 0 and term < 1.5 * a[i]:
                term = 1.5 * a[i] + 0 * x[i]
            term = -term
        elif name == "reinforce":
            term = -a[i] * x[i]
        elif name == "value":
            bounded = old[i] + min(max(x[i] - old[i], x.new_tensor(-0.2)), x.new_tensor(0.2))
            term = 0.5 * max((x[i] - a[i]) ** 2, (bounded - a[i]) ** 2)
        else:
            term = x[i]
        total = total + w[i] * term / length / 7
    return total


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None)
@given(batch=tokens())
def test_values_and_gradients_are_those_of_a_naive_loop(name, batch):
    new, *rest = batch
    # ratios on the edge of a clip have two right gradients
    new = new + 1e-4 * torch.sin(torch.arange(len(new), dtype=torch.float64) + 1)
    loss, gradient = value_and_gradient(lambda x: LOSSES[name](x, *rest), new)
    expected, expected_gradient = value_and_gradient(lambda x: naive(name, x, *rest), new)
    close(loss, expected)
    close(gradient, expected_gradient)


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None)
@given(batch=tokens(), outside=st.sampled_from([5.0, math.inf, -math.inf, math.nan]))
def test_masked_tokens_have_no_value_and_no_gradient_even_when_infinite(name, batch, outside):
    new, old, advantages, sequence, weights, mask = batch
    loss, gradient = value_and_gradient(lambda x: LOSSES[name](x, old, advantages, sequence, weights, mask), new)
    assert (gradient[~mask] == 0).all()
    spoilt = new.masked_fill(~mask, outside)
    again, its_gradient = value_and_gradient(
        lambda x: LOSSES[name](x, old, advantages.masked_fill(~mask, outside), sequence, weights.masked_fill(~mask, outside), mask), spoilt
    )
    assert torch.equal(loss, again)
    assert torch.equal(gradient, its_gradient)


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None)
@given(batch=tokens(), split=st.integers(0, 3), how=st.sampled_from(["token-mean", "sequence-mean", "constant-length"]))
def test_micro_batches_of_whole_sequences_add_up_to_the_batch(name, batch, split, how):
    new, old, advantages, sequence, factors, mask = batch
    weights = factors * token_weights(sequence, how, length=9 if how == "constant-length" else None, mask=mask, dtype=torch.float64)
    whole, gradient = value_and_gradient(lambda x: LOSSES[name](x, old, advantages, sequence, weights, mask), new)
    sums, parts = torch.zeros((), dtype=torch.float64), torch.zeros_like(new)
    for at in (sequence < split, sequence >= split):
        rest = [column[at] for column in (old, advantages, sequence, weights, mask)]
        loss, part = value_and_gradient(lambda x, rest=rest: LOSSES[name](x, *rest), new[at])
        sums += loss
        parts[at] = part
    close(sums, whole)
    close(parts, gradient)


@settings(deadline=None)
@given(tokens())
def test_token_weights_give_the_means_they_are_named_after(batch):
    values, _, _, sequence, _, mask = batch
    if not mask.any():
        return
    number = int(mask.sum())
    means = torch.stack([values[(sequence == s) & mask].mean() for s in sequence[mask].unique()])
    by_sequence = token_weights(sequence, "sequence-mean", mask=mask, dtype=torch.float64)
    close((by_sequence * values).sum() / number, means.mean())
    constant = token_weights(sequence, "constant-length", length=50, mask=mask, dtype=torch.float64)
    close((constant * values).sum() / number, values[mask].sum() / (50 * len(means)))
    close((token_weights(sequence, "token-mean", mask=mask) * values).sum() / number, values[mask].mean())


@settings(deadline=None)
@given(tokens(), st.permutations(range(4)))
def test_the_order_and_names_of_sequences_change_nothing(batch, order):
    new, old, advantages, sequence, weights, mask = batch
    moved = torch.cat([(sequence == which).nonzero().flatten() for which in order])
    renamed = ids(*(order.index(which) for which in range(4)))[sequence]
    for loss in LOSSES.values():
        plain, gradient = value_and_gradient(lambda x, loss=loss: loss(x, old, advantages, sequence, weights, mask), new)
        rest = [column[moved] for column in (old, advantages, renamed, weights, mask)]
        again, its_gradient = value_and_gradient(lambda x, loss=loss, rest=rest: loss(x, *rest), new[moved])
        close(plain, again)
        close(gradient[moved], its_gradient)


@settings(deadline=None)
@given(tokens())
def test_reinforce_has_the_gradient_of_the_clipped_loss_at_ratio_one(batch):
    new, _, advantages, *_ = batch
    one = value_and_gradient(lambda x: reinforce_loss(x, advantages, 5), new)[1]
    other = value_and_gradient(lambda x: clipped_policy_loss(x, new, advantages, 5).loss, new)[1]
    close(one, other)


@settings(deadline=None)
@given(tokens(smallest=4))
def test_penalised_rewards_sum_to_the_reward_minus_the_penalty(batch):
    new, reference, advantages, sequence, _, _ = batch
    sequence = torch.cat([ids(0, 1, 2, 3), sequence[4:]])  # every trajectory has a token
    rewards = kl_penalised_rewards(advantages[:4], new, reference, sequence, 0.3, "k3")
    for which in range(4):
        own = sequence == which
        close(rewards[own].sum(), advantages[which] - 0.3 * kl_estimate(new[own], reference[own], "k3").sum())


def test_losses_keep_float32():
    new, old, advantages = LOGPROBS.float(), OLD.float(), ADVANTAGES.float()
    results = [*clipped_policy_loss(new, old, advantages, 13, dual_clip_coef=3.0), *value_loss(new, old, advantages, 13)]
    results += [*sequence_ratio_loss(new, old, advantages, SEQUENCE, 4), reinforce_loss(new, advantages, 13), entropy_bonus(new, 13)]
    results += [truncated_importance(new, old), kl_penalised_rewards(double(1, 1, 1, 1), new, old, SEQUENCE, 0.1)]
    assert {result.dtype for result in results} == {torch.float32}
