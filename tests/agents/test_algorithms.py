"""The algorithms: their numbers by hand, their exact gradients, their masks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import log_softmax

from searchqa_agents.algorithm import ALGORITHMS, Algorithm, AlgorithmConfig, Totals, check_settings, get_algorithm, register
from searchqa_agents.batch import make_batch
from searchqa_agents.learner import Learner
from searchqa_agents.models import make_tiny_model
from searchqa_agents.policy import Policy, TokenStats
from searchqa_agents.trainer import backward, minibatches, totals_of
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers.byte import ByteTokenizer

TOKENIZER = ByteTokenizer()
VARIANTS = {
    "ppo": ("ppo", {}),
    "ppo, reward KL, constant length": ("ppo", {"kl_coef": 0.05, "token_weighting": "constant-length", "constant_length": 20, "lam": 0.9, "gamma": 0.98}),
    "ppo, shared critic, entropy": ("ppo", {"critic": "shared", "entropy_coef": 0.02, "value_coef": 0.3, "value_clip_coef": 0.1}),
    "ppo, environment tokens": ("ppo", {"environment_tokens": True, "kl_coef": 0.05, "lam": 0.9}),
    "ppo, by turn": ("ppo", {"credit": "turn", "lam": 0.8, "whiten": False}),
    "grpo": ("grpo", {}),
    "grpo, KL and entropy": ("grpo", {"kl_coef": 0.1, "entropy_coef": 0.02, "token_weighting": "sequence-mean"}),
    "dr. grpo": ("grpo", {"normalise_std": False, "token_weighting": "constant-length", "constant_length": 30}),
    "grpo, k1 in the loss": ("grpo", {"kl_coef": 0.1, "kl_estimator": "k1"}),
    "dapo": ("grpo", {"clip_coef_high": 0.28}),
    "gigpo": ("grpo", {"credit": "turn", "gamma": 0.9, "omega": 0.7}),
    "gspo": ("gspo", {"clip_coef": 0.02, "clip_coef_high": 0.03, "kl_coef": 0.1, "kl_estimator": "k2"}),
    "reinforce": ("reinforce", {"kl_coef": 0.1, "gamma": 0.95}),
    "reinforce++": ("reinforce_plus_plus", {"kl_coef": 0.05}),
    "reinforce++ with baseline": ("reinforce_plus_plus", {"baseline": "group"}),
    "rloo": ("rloo", {"kl_coef": 0.05}),
    "raft": ("raft", {"token_weighting": "sequence-mean"}),
}  # fmt: skip
by_variant = pytest.mark.parametrize("variant", VARIANTS)


def of(variant, **changes):
    """An algorithm and its settings."""
    name, arguments = VARIANTS[variant]
    algorithm = get_algorithm(name)
    return algorithm, algorithm.config(**{**arguments, **changes})


# -- by hand ----------------------------------------------------------------------------------------------------------------------------------
# Two groups of two. In the first, both episodes search from the same question, and then read different passages.

DEVIATION = 0.5 / (math.sqrt(0.5) + 1e-6)  # of rewards 1 and 0: mean 0.5, sample standard deviation sqrt(0.5)
SMALLER = 0.25 / (math.sqrt(0.125) + 1e-6)  # of rewards 0.5 and 0


@pytest.fixture(scope="session")
def hand(episode):
    return make_batch(
        [
            episode([1, 2], [3, 4], [5, 6], [7], reward=1.0),
            episode([1, 2], [3, 8], [5, 9], [7], reward=0.0),
            episode([2, 2], [3], reward=0.5),
            episode([2, 2], [4], reward=0.0),
        ],
        [0, 0, 1, 1],
    )  # 3 + 3 + 1 + 1 tokens of the policy, each sampled with probability 0.5


def advantages_of(batch, name, **arguments):
    algorithm = get_algorithm(name)
    return algorithm.advantages(batch, algorithm.config(**arguments))


D, E = DEVIATION, SMALLER


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("grpo", {}, [D, D, D, -D, -D, -D, E, -E]),
        ("grpo", {"normalise_std": False}, [0.5, 0.5, 0.5, -0.5, -0.5, -0.5, 0.25, -0.25]),
        # the first turns of group 0 began in an equal state, with returns 1 and 0; the second turns are alone in theirs;
        # those of group 1 began in an equal state, with returns 0.5 and 0
        ("grpo", {"credit": "turn"}, [2 * D, 2 * D, D, -2 * D, -2 * D, -D, 2 * E, -2 * E]),
        # gamma 0.5: the first turn's return is 0.5 * 1, relative to 0: 0.25 without std; omega 2 doubles it
        ("grpo", {"credit": "turn", "gamma": 0.5, "omega": 2.0, "normalise_std": False}, [1, 1, 0.5, -1, -1, -0.5, 0.75, -0.75]),
        ("gspo", {}, [D, D, D, -D, -D, -D, E, -E]),
        ("reinforce", {}, [1, 1, 1, 0, 0, 0, 0.5, 0]),
        ("reinforce", {"gamma": 0.5}, [0.25, 0.5, 1, 0, 0, 0, 0.5, 0]),
        # returns 1 1 1 0 0 0 .5 0: mean 3.5 / 8; squares 3 * .5625^2 + 4 * .4375^2 + .0625^2 = 1.71875; over 7: std 0.4955156
        ("reinforce_plus_plus", {}, np.array([0.5625] * 3 + [-0.4375] * 3 + [0.0625, -0.4375]) / math.sqrt(1.71875 / 7)),
        # minus the groups' means: .5 .5 .5 -.5 -.5 -.5 .25 -.25: mean 0; squares 6 * .25 + 2 * .0625 = 1.625; over 7
        ("reinforce_plus_plus", {"baseline": "group"}, np.array([0.5] * 3 + [-0.5] * 3 + [0.25, -0.25]) / math.sqrt(1.625 / 7)),
        ("rloo", {}, [1, 1, 1, -1, -1, -1, 0.5, -0.5]),
    ],
)  # fmt: skip
def test_advantages_by_hand(hand, name, arguments, expected):
    assert advantages_of(hand, name, **arguments).advantages.tolist() == pytest.approx(list(expected), rel=1e-6)


VALUES = torch.tensor([0.2, 0.4, 0.6, 0.1, 0.1, 0.1, 0.5, 0.5])


@pytest.mark.parametrize(
    ("arguments", "advantages", "returns"),
    [
        # lambda 1: reward minus value
        ({}, [0.8, 0.6, 0.4, -0.1, -0.1, -0.1, 0.0, -0.5], [1, 1, 1, 0, 0, 0, 0.5, 0]),
        # lambda 0: next value minus value, at the last token reward minus value
        ({"lam": 0.0}, [0.2, 0.2, 0.4, 0, 0, -0.1, 0, -0.5], [0.4, 0.6, 1, 0.1, 0.1, 0, 0.5, 0]),
        # by turn, lambda 0: values where turns begin are .2 and .6, .1 and .1, .5, .5
        ({"credit": "turn", "lam": 0.0}, [0.4, 0.4, 0.4, 0, 0, -0.1, 0, -0.5], [0.6, 0.6, 1, 0.1, 0.1, 0, 0.5, 0]),
    ],
)  # fmt: skip
def test_ppos_advantages_by_hand(hand, arguments, advantages, returns):
    batch = advantages_of(hand._replace(values=VALUES), "ppo", whiten=False, **arguments)
    assert batch.advantages.tolist() == pytest.approx(advantages, abs=1e-6)
    assert batch.returns.tolist() == pytest.approx(returns, abs=1e-6)


def test_ppos_whitening_by_hand(hand):
    # advantages .8 .6 .4 -.1 -.1 -.1 0 -.5: mean 1 / 8; squares .675^2 + .475^2 + .275^2 + 3 * .225^2 + .125^2 + .625^2 = 1.315; over 7
    batch = advantages_of(hand._replace(values=VALUES), "ppo")
    expected = np.array([0.675, 0.475, 0.275, -0.225, -0.225, -0.225, -0.125, -0.625]) / math.sqrt(1.315 / 7)
    assert batch.advantages.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert batch.returns.tolist() == pytest.approx([1, 1, 1, 0, 0, 0, 0.5, 0])  # the critic's targets are not whitened


def test_with_environment_tokens_ppos_critic_sees_them_as_search_r1s(episode):
    # three tokens of the policy and two of the environment, values .2 .4 .1 .3 .6, reward 1 at the last: lambda 0 gives .2 -.3 .2 .3 .4,
    # while over the policy's tokens alone it is .2 .2 .4
    batch = make_batch([episode([1, 2], [3, 4], [5, 6], [7], reward=1.0)], [0], environment_tokens=True)
    batch = advantages_of(
        batch._replace(values=torch.tensor([0.2, 0.4, 0.1, 0.3, 0.6])), "ppo", lam=0.0, whiten=False, environment_tokens=True
    )
    assert batch.advantages.tolist() == pytest.approx([0.2, -0.3, 0.2, 0.3, 0.4])
    # and whitening counts them: mean .16, squares .04^2 + .46^2 + .04^2 + .14^2 + .24^2 = .292; over 4
    whitened = advantages_of(batch, "ppo", lam=0.0, environment_tokens=True).advantages
    assert whitened.tolist() == pytest.approx((np.array([0.04, -0.46, 0.04, 0.14, 0.24]) / math.sqrt(0.292 / 4)).tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        # k1 = log p - log reference = log 2 at each token of episodes 0 and 2, times coefficient 0.1: penalties p = 0.0693 per token
        ("reinforce", {"gamma": 1.0}, lambda p: [1 - 3 * p, 1 - 2 * p, 1 - p, 0, 0, 0, 0.5 - p, 0]),
        # the episode's reward minus the sum of its penalties; then relative to the other one's
        ("rloo", {}, lambda p: [1 - 3 * p] * 3 + [3 * p - 1] * 3 + [0.5 - p, p - 0.5]),
        ("grpo", {"normalise_std": False}, lambda p: [0.5 - 1.5 * p] * 3 + [1.5 * p - 0.5] * 3 + [0.25 - p / 2, p / 2 - 0.25]),
    ],
)
def test_kl_in_the_reward_by_hand(hand, name, arguments, expected):
    reference = torch.tensor([0.25] * 3 + [0.5] * 3 + [0.25, 0.5]).log()
    batch = hand._replace(reference_logprobs=reference)
    found = advantages_of(batch, name, kl_coef=0.1, kl_in="reward", kl_estimator="k1", **arguments).advantages
    assert found.tolist() == pytest.approx(expected(0.1 * math.log(2)), abs=1e-6)


def test_raft_keeps_the_right_episodes(hand):
    def kept(**arguments):
        batch = advantages_of(hand, "raft", **arguments)
        assert batch.advantages.tolist() == [1] * len(batch.sequence_ids)
        return [(group, reward) for group, reward in zip(batch.group_ids.tolist(), batch.rewards.tolist(), strict=True)]

    assert kept() == [(0, 1), (1, 0.5)]
    assert kept(threshold=1.0) == [(0, 1)]
    assert kept(threshold=2.0) == []
    assert kept(threshold=0.0) == [(0, 1), (0, 0), (1, 0.5), (1, 0)]
    assert kept(threshold=0.0, best_only=True) == [(0, 1), (1, 0.5)]
    equal = hand._replace(rewards=torch.ones(4))
    assert advantages_of(equal, "raft", best_only=True).token_ids[1].tolist() == [2, 2, 3]  # of equals the first


RATIOS = torch.tensor([1.5, 1, 1, 0.5, 1, 1, 1, 1])


def loss_of(batch, name, ratios=RATIOS, value=None, entropy=None, step=0, **arguments):
    """The loss at given ratios, and its gradient with respect to the log-probabilities."""
    algorithm = get_algorithm(name)
    config = algorithm.config(**arguments)
    logprob = (batch.old_logprobs + ratios.log()).requires_grad_()
    stats = TokenStats(logprob, torch.zeros(len(ratios)) if entropy is None else entropy, value)
    [minibatch] = minibatches(batch, replace(config, num_minibatches=1), 0)
    terms = algorithm.loss(stats, minibatch, totals_of(minibatch, step), config)
    gradient = torch.autograd.grad(terms.loss, logprob, allow_unused=True)[0]
    return terms, gradient


@pytest.mark.parametrize(
    ("arguments", "weights"),
    [
        ({}, [1 / 8] * 8),  # every token the same
        ({"token_weighting": "sequence-mean"}, [1 / 12] * 6 + [1 / 4] * 2),  # 4 sequences of 3, 3, 1, 1 tokens
        ({"token_weighting": "constant-length", "constant_length": 10}, [1 / 40] * 8),  # 4 sequences
    ],
)
def test_the_clipped_loss_by_hand(hand, arguments, weights):
    # clip 0.2: at ratio 1.5 and a positive advantage 1.2 counts, without gradient; at 0.5 and a negative one 0.8, without gradient
    batch = hand._replace(advantages=torch.tensor([2.0, 2, 2, -1, -1, -1, 3, -3]))
    counted = np.array([1.2 * 2, 2, 2, -0.8, -1, -1, 3, -3])
    terms, gradient = loss_of(batch, "grpo", **arguments)
    assert terms.loss.item() == pytest.approx(-(counted * weights).sum(), rel=1e-6)
    assert terms.metrics["clipfrac"].item() == pytest.approx(2 / 8)
    assert gradient.tolist() == pytest.approx(-np.array([0, 2, 2, 0, -1, -1, 3, -3]) * weights, rel=1e-6)
    for name in ("reinforce", "reinforce_plus_plus", "rloo"):
        assert loss_of(batch, name, **arguments)[0].loss.item() == pytest.approx(terms.loss.item())
    _, gradient = loss_of(batch, "grpo", clip_coef_high=0.5001, **arguments)
    assert gradient[0].item() == pytest.approx(-1.5 * 2 * weights[0], rel=1e-6)


def test_kl_and_entropy_in_the_loss_by_hand(hand):
    # reference probabilities twice those of the policy at two tokens: k3 = 2 - 1 - log 2 each; entropies 1 at four tokens
    reference = hand.old_logprobs + torch.tensor([math.log(2)] * 2 + [0] * 6)
    batch = hand._replace(advantages=torch.zeros(8), reference_logprobs=reference)
    entropy = torch.tensor([1.0] * 4 + [0] * 4)
    terms, gradient = loss_of(batch, "grpo", torch.ones(8), entropy=entropy, kl_coef=0.5, entropy_coef=0.1)
    k3 = 1 - math.log(2)
    assert terms.loss.item() == pytest.approx(0.5 * 2 * k3 / 8 - 0.1 * 4 / 8)
    assert terms.metrics["kl"].item() == pytest.approx(2 * k3 / 8)
    # the policy is to become more likely where the reference is more so: d k3 / d log p = 1 - reference / p = -1
    assert gradient.tolist() == pytest.approx([-0.5 / 8] * 2 + [0] * 6)


def test_zerosearchs_kl_sign_is_not_repeated(hand):
    further = hand._replace(advantages=torch.zeros(8), reference_logprobs=hand.old_logprobs - 1)
    near = hand._replace(advantages=torch.zeros(8), reference_logprobs=hand.old_logprobs)
    losses = [loss_of(batch, "reinforce", torch.ones(8), kl_coef=1.0)[0].loss.item() for batch in (further, near)]
    assert losses[0] > losses[1] == 0


def test_gspos_loss_by_hand(hand):
    # geometric means of the ratios: 1.5^(1/3) = 1.1447, 0.5^(1/3) = 0.7937, 1, 1; clips 0.9 and 1.1 count for the first two, without gradient
    batch = hand._replace(advantages=torch.tensor([2.0, 2, 2, -1, -1, -1, 3, -3]))
    terms, gradient = loss_of(batch, "gspo", clip_coef=0.1, clip_coef_high=0.1)
    assert terms.loss.item() == pytest.approx(-(1.1 * 2 - 0.9 * 1 + 3 - 3) / 4)
    assert gradient.tolist() == pytest.approx([0] * 6 + [-3 / 4, 3 / 4])
    assert terms.metrics["clipfrac"].item() == pytest.approx(2 / 4)
    # no clip: every token of the first has gradient -ratio * A / (3 tokens * 4 sequences)
    _, gradient = loss_of(batch, "gspo", clip_coef=0.5, clip_coef_high=0.5)
    assert gradient[:3].tolist() == pytest.approx([-(1.5 ** (1 / 3)) * 2 / 12] * 3)


def test_rafts_loss_by_hand(hand):
    # episodes 0 and 2 are kept, 4 tokens: mean of -log p at probabilities .75 .5 .5 .5
    terms, gradient = loss_of(advantages_of(hand, "raft"), "raft", torch.tensor([1.5, 1, 1, 1]))
    assert terms.loss.item() == pytest.approx(-(math.log(0.75) + 3 * math.log(0.5)) / 4)
    assert gradient.tolist() == [-0.25] * 4


def test_ppos_loss_by_hand(hand):
    # values .3 everywhere, old values .2 .4 .6 .1 .1 .1 .5 .5, targets 1 1 1 0 0 0 .5 0; value clip .1: clipped values .3 .3 .5 .2 .2 .2 .4 .4
    # larger of (.3 - R)^2 and (clipped - R)^2: .49 .49 .49 .09 .09 .09 .04 .16 = 1.94
    batch = advantages_of(hand._replace(values=VALUES), "ppo", whiten=False)
    value = torch.full((8,), 0.3, requires_grad=True)
    terms, _ = loss_of(batch, "ppo", torch.ones(8), value=value, value_clip_coef=0.1, value_coef=0.5)
    assert terms.metrics["value_loss"].item() == pytest.approx(0.5 * 1.94 / 8)
    policy = -sum([0.8, 0.6, 0.4, -0.1, -0.1, -0.1, 0.0, -0.5]) / 8
    assert terms.loss.item() == pytest.approx(policy + 0.5 * 0.5 * 1.94 / 8)
    # by turn: only where the 6 turns begin; targets 1 1 0 0 .5 0, no clip: .49 .49 .09 .09 .04 .09 = 1.29
    batch = advantages_of(hand._replace(values=VALUES), "ppo", credit="turn")
    terms, _ = loss_of(batch, "ppo", torch.ones(8), value=value, value_clip_coef=None, credit="turn")
    assert terms.metrics["value_loss"].item() == pytest.approx(0.5 * 1.29 / 6)


def test_in_the_critics_warm_up_only_the_critic_learns(hand):
    batch = advantages_of(hand._replace(values=VALUES), "ppo")
    for step, learns in ((0, False), (1, False), (2, True)):
        value = torch.zeros(8, requires_grad=True)
        terms, gradient = loss_of(batch, "ppo", value=value, step=step, critic_warmup=2)
        assert bool(gradient.any()) == learns
        assert terms.metrics["value_loss"] > 0


# -- exact gradients --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def policy():
    torch.set_num_threads(1)
    model = make_tiny_model(
        TOKENIZER.vocab_size,
        0,
        pad_id=TOKENIZER.pad_id,
        eos_id=TOKENIZER.eos_id,
        hidden_size=32,
        feed_forward_size=48,
        initializer_range=0.2,
    )
    return Policy(model, TOKENIZER)


def prepared(variant, policy, episodes, **changes):
    """A learner, and a batch with advantages whose ratios, values and KL are off policy, so that clips decide something."""
    algorithm, config = of(variant, **changes)
    learner = Learner(policy, config, has_critic=algorithm.critic)
    noise = torch.Generator().manual_seed(0)
    if algorithm.critic:  # values of 0 everywhere would hide errors
        head = policy.scorer.value_head if config.critic == "shared" else learner.critic.value_head
        with torch.no_grad():
            head.weight.copy_(0.3 * torch.randn(head.weight.shape, generator=noise))
    batch = make_batch(episodes, [i // 3 for i in range(len(episodes))], environment_tokens=algorithm.environment_tokens(config))
    batch = learner.annotate(batch)
    with torch.no_grad():
        logprobs = learner.evaluate(batch).logprob

    def near(values, scale):
        return values + scale * torch.randn(values.shape, generator=noise)

    batch = batch._replace(old_logprobs=near(logprobs, 0.2) * batch.policy_mask)
    if batch.reference_logprobs is not None:
        batch = batch._replace(reference_logprobs=near(logprobs, 0.3))
    if batch.values is not None:
        batch = batch._replace(values=near(batch.values, 0.2))
    batch = batch._replace(weights=torch.rand(len(logprobs), generator=noise) + 0.5)  # as importance weights
    if algorithm.name == "gspo":
        batch = batch._replace(weights=torch.ones_like(batch.weights))
    return algorithm, config, learner, algorithm.advantages(batch, config)


def gradients(learner):
    """Of the policy and of the critic, flat."""
    own = [p.grad for name, p in learner.policy.scorer.named_parameters() if not name.startswith("value_head.")]
    head = learner.policy.scorer.value_head
    critic = [] if learner.critic is None else [p.grad for p in learner.critic.parameters()]
    critic += [] if head is None else [p.grad for p in head.parameters()]
    return tuple(torch.cat([torch.zeros(0), *(g.flatten() for g in part if g is not None)]).clone() for part in (own, critic))


def step_gradients(algorithm, config, learner, batch):
    learner.discard()
    [minibatch] = minibatches(batch, replace(config, num_minibatches=1), 0)
    backward(learner, algorithm, minibatch, totals_of(minibatch, 0), config)
    found = gradients(learner)
    learner.discard()
    return found


def padded(batch, values, fill=0.0):
    """One row per sequence, [S, T - 1]: what stands at token t + 1 is in column t."""
    width = max(map(len, batch.token_ids))
    grid = torch.full((len(batch.token_ids), width), fill, dtype=values.dtype)
    mask = torch.zeros(grid.shape, dtype=torch.bool)
    for row, one in enumerate(batch.token_masks):
        mask[row, : len(one)] = torch.from_numpy(one == 1)
    grid[mask] = values
    return grid[:, 1:]


def plain_gradients(config, learner, batch, name):
    """The same step written as one would without this package: padded rows, whole logits, a softmax, sums over a mask."""
    learner.discard()
    ids = torch.full((len(batch.token_ids), max(map(len, batch.token_ids))), TOKENIZER.pad_id)
    for row, one in enumerate(batch.token_ids):
        ids[row, : len(one)] = torch.from_numpy(one.astype(np.int64))
    inputs, attention = ids[:, :-1], (ids[:, :-1] != TOKENIZER.pad_id).long()
    logits = learner.policy.model(input_ids=inputs, attention_mask=attention, use_cache=False).logits.float()
    logits[..., TOKENIZER.pad_id] = -1e9  # the policy never writes it
    every = log_softmax(logits / config.temperature, -1)
    logprob = every.gather(-1, ids[:, 1:, None])[..., 0]
    seen = padded(batch, torch.ones(len(batch.weights)))  # all evaluated tokens
    mask = padded(batch, batch.policy_mask.float())
    advantages, old = padded(batch, batch.advantages), padded(batch, batch.old_logprobs)
    importance = padded(batch, batch.weights)
    lengths = mask.sum(1, keepdim=True)

    def mean(values):  # over the policy's tokens, as the settings say
        if config.token_weighting == "sequence-mean":
            return (values * importance * mask / lengths).sum() / len(values)
        if config.token_weighting == "constant-length":
            return (values * importance * mask).sum() / (len(values) * config.constant_length)
        return (values * importance * mask).sum() / mask.sum()

    log_ratio = (logprob - old) * mask
    if name == "raft":
        loss = mean(-logprob)
    elif name == "gspo":
        ratio = (log_ratio.sum(1) / lengths[:, 0]).exp()
        own = (advantages * mask).sum(1) / lengths[:, 0]
        clipped = ratio.clamp(1 - config.clip_coef, 1 + config.clip_coef_high)
        loss = -torch.minimum(ratio * own, clipped * own).mean()
    else:
        high = getattr(config, "clip_coef_high", None) or config.clip_coef
        ratio = log_ratio.exp()
        loss = mean(-torch.minimum(ratio * advantages, ratio.clamp(1 - config.clip_coef, 1 + high) * advantages))
    if config.kl_coef and config.kl_in == "loss":
        difference = (padded(batch, batch.reference_logprobs) - logprob) * mask
        kl = {"k1": -difference, "k2": difference**2 / 2, "k3": difference.exp() - 1 - difference}[config.kl_estimator]
        loss = loss + config.kl_coef * mean(kl)
    if config.entropy_coef:
        loss = loss - config.entropy_coef * mean(-(every.exp() * every).sum(-1))
    if name == "ppo":
        trunk = learner.policy.model.get_decoder() if config.critic == "shared" else learner.critic.trunk
        head = learner.policy.scorer.value_head if config.critic == "shared" else learner.critic.value_head
        value = head(trunk(input_ids=inputs, attention_mask=attention, use_cache=False).last_hidden_state)[..., 0]
        returns, before = padded(batch, batch.returns), padded(batch, batch.values)
        read = seen
        if config.credit == "turn":  # a policy token after one that is not
            read = mask * (torch.cat([torch.zeros(len(mask), 1), mask[:, :-1]], 1) == 0)
        clipped = before + (value - before).clamp(-config.value_clip_coef, config.value_clip_coef)
        error = torch.maximum((value - returns) ** 2, (clipped - returns) ** 2)
        loss = loss + config.value_coef * 0.5 * (error * read).sum() / read.sum()
    loss.backward()
    found = gradients(learner)
    learner.discard()
    return found


def assert_equal_gradients(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other)
        if len(other):
            assert other.norm() > 0
            assert (one - other).norm() <= 1e-5 * other.norm()


WAYS = [
    {"max_tokens": 100_000},
    {"max_tokens": 150},
    {"max_tokens": 40},
    {"max_tokens": 150, "gradient_checkpointing": True},
    {"max_tokens": 150, "packing": "always"},
]


@by_variant
def test_every_way_to_compute_the_gradient_gives_that_of_a_plain_padded_step(variant, policy, random_episodes, monkeypatch):
    episodes = random_episodes(12, 256, seed=3)
    for number, way in enumerate(WAYS):
        if number:  # the logits of so many tokens at once
            monkeypatch.setattr("searchqa_agents.token_logprobs.chunk_rows", lambda vocab_size, device: 9)
        algorithm, config, learner, batch = prepared(variant, policy, episodes, temperature=0.9, **way)
        assert len(learner.micro_batches(batch)) >= (1, 2, 6, 2, 2)[number]
        found = step_gradients(algorithm, config, learner, batch)
        assert_equal_gradients(found, plain_gradients(config, learner, batch, algorithm.name))


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(VARIANTS)), st.data())
def test_no_partition_into_micro_batches_changes_the_gradient(random_episodes, variant, data):
    model = make_tiny_model(TOKENIZER.vocab_size, 1, pad_id=TOKENIZER.pad_id, eos_id=TOKENIZER.eos_id, hidden_size=16, feed_forward_size=16)
    algorithm, config, learner, batch = prepared(
        variant, Policy(model, TOKENIZER), random_episodes(7, 256, seed=data.draw(st.integers(0, 99)))
    )
    if not batch.token_ids:  # RAFT kept none
        return
    whole = step_gradients(algorithm, config, learner, batch)
    parts = data.draw(st.lists(st.integers(0, 3), min_size=len(batch.token_ids), max_size=len(batch.token_ids)))
    learner.micro_batches = lambda batch: [[i for i, part in enumerate(parts) if part == number] for number in range(4)]  # some are empty
    divided = step_gradients(algorithm, config, learner, batch)
    for one, other in zip(divided, whole, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-9


# -- masks ------------------------------------------------------------------------------------------------------------------------------------


def evaluating_environment_tokens(variant, policy, episodes):
    """A step in which environment tokens are evaluated too, whether the algorithm asks for it or not, with random numbers at all tokens."""
    algorithm, config = of(variant)
    learner = Learner(policy, config, has_critic=algorithm.critic)
    batch = learner.annotate(make_batch(episodes, [i // 3 for i in range(len(episodes))], environment_tokens=True))
    noise = torch.Generator().manual_seed(1)
    names = [name for name in ("old_logprobs", "weights", "reference_logprobs", "values") if getattr(batch, name) is not None]
    names += ["advantages"] + ["returns"] * algorithm.critic
    return algorithm, config, learner, batch._replace(**{name: torch.randn(len(batch.weights), generator=noise) for name in names}), names


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("ppo") or name == "ppo, environment tokens"])
def test_no_number_at_an_environment_token_reaches_the_policys_gradient(variant, policy, random_episodes):
    algorithm, config, learner, batch, names = evaluating_environment_tokens(variant, policy, random_episodes(9, 256, seed=4))
    outside, evaluate = ~batch.policy_mask, learner.evaluate
    assert outside.any()
    own, critic = step_gradients(algorithm, config, learner, batch)
    for value in (3.0, math.inf, math.nan):
        changed = batch._replace(**{name: getattr(batch, name).masked_fill(outside, value) for name in names})
        found, critics = step_gradients(algorithm, config, learner, changed)
        assert torch.equal(found, own)
        assert len(critic) == 0 or not torch.equal(critics, critic)  # Search-R1's critic sees them

    def other_losses(part, last):
        stats = evaluate(part, last=last)
        return stats._replace(logprob=torch.where(part.policy_mask, stats.logprob, 7 * stats.logprob - 2), entropy=stats.entropy)

    learner.evaluate = other_losses
    found, critics = step_gradients(algorithm, config, learner, batch)
    assert torch.equal(found, own)
    assert torch.equal(critics, critic)
    learner.evaluate = evaluate
    assert not torch.equal(step_gradients(algorithm, config, learner, batch._replace(policy_mask=torch.ones_like(outside)))[0], own)


@by_variant
def test_what_a_trajectory_records_at_environment_tokens_changes_nothing(variant, policy, random_episodes):
    episodes = random_episodes(9, 256, seed=5)
    algorithm, config = of(variant)
    learner = Learner(policy, config, has_critic=algorithm.critic)

    def found(some):
        groups = [i // 3 for i in range(len(some))]
        batch = learner.annotate(make_batch(some, groups, environment_tokens=algorithm.environment_tokens(config)))
        return step_gradients(algorithm, config, learner, algorithm.advantages(batch, config))

    garbage = [replace(t, logprobs=np.where(t.loss_mask == 1, t.logprobs, 17.0).astype(np.float32)) for t in episodes]
    for one, other in zip(found(episodes), found(garbage), strict=True):
        assert torch.equal(one, other)


@by_variant
def test_the_loss_and_advantages_of_no_trajectory_are_0(variant):
    """A process may get an empty micro-batch."""
    algorithm, config = of(variant)
    nothing = torch.zeros(0)
    stats = TokenStats(torch.zeros(0, requires_grad=True), nothing, torch.zeros(0, requires_grad=True))
    part = make_batch([], [])._replace(values=nothing, returns=nothing, advantages=nothing, reference_logprobs=nothing)
    terms = algorithm.loss(stats, part, Totals(10, 3, 4, 12, 0), config)
    assert terms.loss.item() == 0
    terms.loss.backward()
    assert all(value == 0 for value in terms.metrics.values())


# -- settings ---------------------------------------------------------------------------------------------------------------------------------


def test_all_algorithms_are_registered_under_their_names():
    for name in ("ppo", "grpo", "gspo", "reinforce", "reinforce_plus_plus", "rloo", "raft"):
        assert get_algorithm(name).name == name
    with pytest.raises(ConfigurationError, match=r"must be one of .*'rloo'.* got 'grp'"):
        get_algorithm("grp")


def test_a_registered_algorithm_is_found_by_its_name():
    mine = Algorithm("test_mine", AlgorithmConfig, lambda batch, config: batch, lambda stats, part, totals, config: None)
    try:
        assert register(mine) is mine
        assert get_algorithm("test_mine") is mine
    finally:
        del ALGORITHMS["test_mine"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("grpo", {"questions_per_step": 0}, "questions_per_step must be at least 1; got 0"),
        ("grpo", {"dynamic_sampling": 2, "group_size": 1}, "group_size must be at least 2"),
        ("grpo", {"token_weighting": "constant-length"}, "constant_length must be given"),
        ("grpo", {"constant_length": 3.0}, "constant_length must be given"),
        ("grpo", {"top_p": 0.0}, "0 < top_p <= 1"),
        ("gspo", {"token_weighting": "sequence-mean"}, "leave out token_weighting; got 'sequence-mean'"),
        ("ppo", {"credit": "turn", "environment_tokens": True}, "environment_tokens must be false"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(name, arguments, message):
    algorithm = get_algorithm(name)
    with pytest.raises(ConfigurationError, match=message):
        check_settings(algorithm, algorithm.config(**arguments))


def test_settings_of_another_algorithm_are_refused():
    with pytest.raises(ConfigurationError, match="ppo needs settings of type PPOConfig; got GRPOConfig"):
        check_settings(get_algorithm("ppo"), get_algorithm("grpo").config())
