"""Losses against values worked out by hand."""

import math

import pytest
import torch

from searchqa_agents.losses import clipped_policy_loss, kl_estimate, next_token_loss


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
