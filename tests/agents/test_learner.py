"""The training step: exact gradients however a batch is cut, annotations, divergence, schedules, states."""

import random

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import searchqa_agents.token_logprobs as token_logprobs
from searchqa_agents.algorithm import AlgorithmConfig
from searchqa_agents.batch import Batch, make_batch, select, without_mask
from searchqa_agents.learner import Learner
from searchqa_agents.losses import truncated_importance
from searchqa_agents.optimisation import (
    AdamW,
    Optimiser,
    TrainingDivergedError,
    learning_rate,
    load_training_state,
    random_state,
    set_random_state,
    training_state,
)
from searchqa_agents.policy import Policy
from searchqa_agents.trajectory import Trajectory, TurnSpan
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers.byte import ByteTokenizer

torch.set_num_threads(1)
TOKENIZER = ByteTokenizer()
SHAPE = {
    "vocab_size": TOKENIZER.vocab_size,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": TOKENIZER.pad_id,
    "eos_token_id": TOKENIZER.eos_id,
    "initializer_range": 0.2,
}


def make_policy(kind="llama"):
    """Llama with tied embeddings; or Qwen2: grouped queries, biases, an output layer of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=False))
    return Policy(model, TOKENIZER)


def make_trajectory(rng, *, truncated=False):
    """A few turns of random tokens with a prompt and environment text of random lengths."""
    ids, mask, turns = list(rng.integers(0, 256, rng.integers(3, 12))), [], []
    mask += [0] * len(ids)
    for turn in range(rng.integers(1, 4)):
        start = len(ids)
        segment, reply = rng.integers(0, 256, rng.integers(1, 6)), rng.integers(0, 256, rng.integers(0, 20))
        ids += [*segment, *reply]
        mask += [1] * len(segment) + [0] * len(reply)
        turns.append(TurnSpan(start, start + len(segment), len(ids), "search", str(turn), "", ""))
    loss_mask = np.array(mask, dtype=np.int8)
    logprobs = (-rng.random(len(ids)) * loss_mask).astype(np.float32)
    return Trajectory(
        token_ids=np.array(ids, dtype=np.int32), loss_mask=loss_mask, logprobs=logprobs, turns=tuple(turns), prompt="", reward=float(rng.random()),
        question_id="q", question="", golden_answers=(), answer=None, terminated=True, truncated=False,
        sampling_logprobs=logprobs / 2 if truncated else None,
    )  # fmt: skip


def make_test_batch(count=7, *, environment_tokens=False, truncated=False) -> Batch:
    rng = np.random.default_rng(0)
    batch = make_batch(
        [make_trajectory(rng, truncated=truncated) for _ in range(count)], [0] * count, environment_tokens=environment_tokens
    )
    generator = torch.Generator().manual_seed(1)
    return batch._replace(
        advantages=torch.randn(len(batch.weights), generator=generator), returns=torch.randn(len(batch.weights), generator=generator)
    )


def loss_of(stats, part):
    """A bit of everything that losses use."""
    loss = -(stats.logprob * part.advantages * part.weights)[part.policy_mask].sum() + 0.3 * (stats.entropy * part.advantages).sum()
    return loss if stats.value is None else loss + (stats.value - part.returns).square().sum()


def accumulate(learner, batch):
    micro_batches = learner.micro_batches(batch)
    for number, indices in enumerate(micro_batches):
        part = select(batch, indices)
        learner.backward(loss_of(learner.evaluate(part, last=number == len(micro_batches) - 1), part))
    return micro_batches


def gradients(learner):
    modules = [learner.policy.scorer] + ([] if learner.critic is None else [learner.critic])
    return torch.cat([p.grad.flatten() for module in modules for p in module.parameters()])


def plain_gradient(policy, critic, batch, temperature):
    """One padded batch with a mask, all logits, by autograd alone."""
    width = max(map(len, batch.token_ids))
    ids = torch.full((len(batch.token_ids), width), TOKENIZER.pad_id)
    attention, chosen = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (sequence, mask) in enumerate(zip(batch.token_ids, batch.token_masks, strict=True)):
        ids[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        attention[row, : len(sequence)] = 1
        chosen[row, : len(sequence)] = torch.from_numpy(mask == 1)
    output = policy.model(input_ids=ids, attention_mask=attention, use_cache=False, output_hidden_states=True)
    allowed = torch.arange(TOKENIZER.vocab_size) != TOKENIZER.pad_id
    logprobs = torch.log_softmax((output.logits[:, :-1] / temperature).masked_fill(~allowed, -1e9), -1)
    logprob = logprobs.gather(-1, ids[:, 1:, None])[..., 0][chosen[:, 1:]]
    entropy = -(logprobs.exp() * logprobs).sum(-1)[chosen[:, 1:]]
    value = None
    if isinstance(critic, torch.nn.Linear):
        value = critic(output.hidden_states[-1][:, :-1])[..., 0][chosen[:, 1:]]
    elif critic is not None:
        hidden = critic.trunk(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        value = critic.value_head(hidden[:, :-1])[..., 0][chosen[:, 1:]]
    loss_of(type("Stats", (), {"logprob": logprob, "entropy": entropy, "value": value}), batch).backward()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("critic", [None, "shared", "separate"])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 60},
        {"packing": "always", "max_tokens": 90},
        {"packing": "always", "gradient_checkpointing": True},
        {"gradient_checkpointing": True, "max_tokens": 60},
    ],
    ids=str,
)
def test_the_gradient_of_a_batch_is_that_of_one_plain_padded_pass(kind, critic, settings, monkeypatch):
    monkeypatch.setattr(token_logprobs, "chunk_rows", lambda *_: 5)
    batch = make_test_batch(environment_tokens=critic is not None)
    config = AlgorithmConfig(temperature=0.8, entropy_coef=0.1, critic=critic or "separate", **settings)
    learner = Learner(make_policy(kind), config, has_critic=critic is not None)
    head = learner.critic.value_head if critic == "separate" else learner.policy.scorer.value_head
    if critic:
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    plain_gradient(learner.policy, learner.critic if critic == "separate" else head, batch, 0.8)
    expected = gradients(learner)
    learner.discard()
    micro_batches = accumulate(learner, batch)
    assert len(micro_batches) > 1 or "max_tokens" not in settings
    assert (gradients(learner) - expected).norm() < 1e-5 * expected.norm()


def test_packed_micro_batches_count_real_tokens_only():
    batch = make_test_batch(12)
    last = [int(np.flatnonzero(mask)[-1]) for mask in batch.token_masks]
    for packing in ("always", "never"):
        learner = Learner(make_policy(), AlgorithmConfig(packing=packing, max_tokens=100))
        micro_batches = learner.micro_batches(batch)
        assert sorted(i for part in micro_batches for i in part) == list(range(12))
        for part in micro_batches:
            rows = [last[i] for i in part]
            assert (sum(rows) if packing == "always" else len(rows) * max(rows)) <= 100
        forward = learner.policy.lay_out(
            [batch.token_ids[i] for i in micro_batches[0]], [batch.token_masks[i] for i in micro_batches[0]], packed=packing == "always"
        )
        if packing == "always":
            assert forward.input_ids.shape == (1, sum(last[i] for i in micro_batches[0]))  # nothing behind the last evaluated token is read


def test_an_empty_micro_batch_evaluates_nothing_and_adds_no_gradient():
    learner = Learner(make_policy(), AlgorithmConfig(critic="separate"), has_critic=True)
    part = select(make_test_batch(), [])
    stats = learner.evaluate(part)
    assert len(stats.logprob) == len(stats.value) == 0
    learner.backward(loss_of(stats, part))
    assert all((p.grad == 0).all() for p in learner.policy.scorer.parameters())


def test_annotations_are_those_of_the_policy_as_training_begins():
    batch = make_test_batch(environment_tokens=True)
    policy = make_policy("qwen2")
    learner = Learner(policy, AlgorithmConfig(kl_coef=0.1, recompute_logprobs=True, temperature=0.7, max_tokens=60), has_critic=True)
    annotated = learner.annotate(batch)
    with torch.no_grad():
        expected = policy.evaluate(batch.token_ids, batch.token_masks, temperature=0.7).logprob
    mask = batch.policy_mask
    assert torch.allclose(annotated.reference_logprobs, expected, atol=1e-5)
    assert torch.allclose(annotated.old_logprobs[mask], expected[mask], atol=1e-5)
    assert (annotated.old_logprobs[~mask] == 0).all()
    assert torch.equal(annotated.sampling_logprobs, batch.old_logprobs)
    assert (annotated.values == 0).all()
    assert not annotated.values.requires_grad
    # after an update the reference stays
    accumulate(learner, batch)
    learner.update(0)
    again = learner.annotate(batch)
    assert torch.equal(again.reference_logprobs, annotated.reference_logprobs)
    assert not torch.allclose(again.old_logprobs, annotated.old_logprobs, atol=1e-4)
    assert again.values.std() > 0


def test_nothing_is_annotated_that_nobody_asked_for():
    batch = make_test_batch()
    assert Learner(make_policy(), AlgorithmConfig()).annotate(batch) is batch


def test_where_sampling_was_cut_the_weights_compare_new_log_probabilities_with_what_sampled():
    batch = make_test_batch(truncated=True)
    policy = make_policy()
    annotated = Learner(policy, AlgorithmConfig(top_p=0.9)).annotate(batch)
    with torch.no_grad():
        expected = policy.evaluate(batch.token_ids, batch.token_masks).logprob
    assert torch.equal(annotated.sampling_logprobs, batch.sampling_logprobs)
    assert torch.allclose(annotated.old_logprobs, expected, atol=1e-5)
    weights = truncated_importance(annotated.old_logprobs, annotated.sampling_logprobs, 2.0)
    assert torch.allclose(weights, (expected - batch.sampling_logprobs).exp().clamp(max=2.0), atol=1e-5)


def test_old_log_probabilities_that_the_sampler_did_not_know_are_evaluated():
    known = make_test_batch(truncated=True)
    unknown = known._replace(old_logprobs=torch.full_like(known.old_logprobs, torch.nan))
    expected, annotated = (Learner(make_policy(), AlgorithmConfig()).annotate(batch) for batch in (known, unknown))
    assert torch.equal(annotated.old_logprobs, expected.old_logprobs)
    assert torch.equal(annotated.sampling_logprobs, known.sampling_logprobs)


@pytest.mark.parametrize("truncated", [False, True])
def test_without_mask_environment_tokens_are_the_policys_with_log_probabilities_of_their_own(truncated):
    masked = make_test_batch(environment_tokens=True, truncated=truncated)
    policy = make_policy("qwen2")
    annotated = Learner(policy, AlgorithmConfig(mask_environment=False, max_tokens=60)).annotate(without_mask(masked))
    with torch.no_grad():
        expected = policy.evaluate(masked.token_ids, masked.token_masks).logprob
    assert annotated.policy_mask.all()
    environment = ~masked.policy_mask
    assert environment.any()
    assert torch.allclose(annotated.old_logprobs[environment], expected[environment], atol=1e-5)
    if truncated:
        weights = truncated_importance(annotated.old_logprobs, annotated.sampling_logprobs, 2.0)
        assert (weights[environment] == 1).all()
        assert torch.equal(annotated.sampling_logprobs[masked.policy_mask], masked.sampling_logprobs[masked.policy_mask])
    else:
        assert torch.equal(annotated.old_logprobs[masked.policy_mask], masked.old_logprobs[masked.policy_mask])


def test_bfloat16_autocast_is_near_float32_with_float32_losses_and_weights():
    batch = make_test_batch(environment_tokens=True)
    results = []
    for precision in ("float32", "bfloat16"):
        learner = Learner(make_policy(), AlgorithmConfig(precision=precision, critic="shared", entropy_coef=0.1), has_critic=True)
        torch.nn.init.ones_(learner.policy.scorer.value_head.weight)
        stats = learner.evaluate(batch)
        assert {stat.dtype for stat in stats} == {torch.float32}
        accumulate(learner, batch)
        results.append((stats.logprob.detach(), stats.value.detach(), gradients(learner)))
        assert all(parameter.dtype == torch.float32 for parameter in learner.policy.scorer.parameters())
    for exact, rounded in zip(*results, strict=True):
        assert torch.isfinite(rounded).all()
        assert 0 < (exact - rounded).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("what", ["loss", "loss alone", "gradient"])
def test_a_divergence_is_named_and_changes_no_weight(what):
    batch = make_test_batch()
    learner = Learner(make_policy(), AlgorithmConfig(critic="separate"), has_critic=True)
    before = {name: p.detach().clone() for module in (learner.policy.scorer, learner.critic) for name, p in module.named_parameters()}
    loss = loss_of(learner.evaluate(batch), batch)
    learner.backward({"loss": loss * float("nan"), "loss alone": loss + float("inf"), "gradient": loss}[what])
    name = "model.model.layers.0.self_attn.q_proj.weight"
    if what == "gradient":
        dict(learner.policy.scorer.named_parameters())[name].grad[0, 0] = float("inf")
    with pytest.raises(TrainingDivergedError, match=r"step 3.*no weight") as error:
        learner.update(2)
    message = str(error.value)
    assert ("the loss is nan" in message) == (what == "loss")
    assert ("the loss is inf, and all gradients are finite" in message) == (what == "loss alone")
    assert "learning_rate" in message
    if what == "gradient":
        assert f"1 of {len(list(learner.policy.scorer.parameters()))} parameters are not finite, first that of {name}" in message
    for module in (learner.policy.scorer, learner.critic):
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_the_critic_has_its_own_learning_rate_and_clipping():
    batch = make_test_batch()
    learner = Learner(make_policy(), AlgorithmConfig(critic="separate", critic_learning_rate=0.0, max_grad_norm=1e-3), has_critic=True)
    policy_before, critic_before = (module.state_dict()[name].clone() for module, name in _weights(learner))
    accumulate(learner, batch)
    metrics = learner.update(0)
    assert set(metrics) == {"grad_norm", "critic_grad_norm"}
    assert metrics["grad_norm"] != metrics["critic_grad_norm"]
    policy_after, critic_after = (module.state_dict()[name] for module, name in _weights(learner))
    assert not torch.equal(policy_before, policy_after)
    assert torch.equal(critic_before, critic_after)


def test_warm_ups_are_shares_of_all_steps_rounded_down_and_the_critics_may_be_another():
    # Search-R1's: 286 of 1,005 steps, and 15 for the critic
    config = AlgorithmConfig(
        steps=1005, warmup_ratio=0.285, critic_warmup_ratio=0.015, schedule="constant", learning_rate=1e-6, critic_learning_rate=1e-5
    )
    learner = Learner(make_policy(), config, has_critic=True)
    assert [learner.learning_rate(step) for step in (0, 142, 285, 286, 1004)] == pytest.approx([1e-6 / 286, 143e-6 / 286, 1e-6, 1e-6, 1e-6])
    critic = learner._critic_optimiser
    assert [critic.learning_rate(step) for step in (0, 14, 15, 1004)] == pytest.approx([1e-5 / 15, 1e-5, 1e-5, 1e-5])


def test_a_schedule_may_be_longer_than_the_run():
    learner = Learner(make_policy(), AlgorithmConfig(steps=10, schedule="cosine", schedule_steps=1_270_000, learning_rate=2e-6))
    assert learner.learning_rate(9) == pytest.approx(2e-6, rel=1e-9)


def _weights(learner):
    return (learner.policy.model, "model.norm.weight"), (learner.critic, "trunk.norm.weight")


def test_gradients_that_are_all_zero_change_no_weight_by_momentum_or_decay():
    weight = torch.nn.Parameter(torch.ones(2))
    settings = AdamW(0.1, (0.9, 0.98), 0.5, warmup_steps=0, final_fraction=1.0, total_steps=9, max_grad_norm=1.0)
    optimiser = Optimiser({"weight": weight}, settings)
    weight.grad = torch.ones(2)
    optimiser.update(0, torch.zeros(()))
    before = weight.detach().clone()
    weight.grad = torch.zeros(2)
    assert optimiser.update(1, torch.zeros(())) == 0
    assert torch.equal(weight, before)
    assert weight.grad is None


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules(schedule):
    settings = AdamW(1.0, (0.9, 0.98), 0.0, warmup_steps=4, final_fraction=0.2, total_steps=12, max_grad_norm=1.0, schedule=schedule)
    rates = [learning_rate(settings, step) for step in (0, 1, 3, 4, 6, 8, 12, 99)]
    expected = {
        "linear": [0.25, 0.5, 1.0, 1.0, 0.8, 0.6, 0.2, 0.2],
        "cosine": [0.25, 0.5, 1.0, 1.0, 0.2 + 0.8 * (1 + 0.5**0.5) / 2, 0.6, 0.2, 0.2],
        "constant": [0.25, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    }
    assert rates == pytest.approx(expected[schedule])


def test_gradients_are_clipped_to_the_norm_and_applied_at_the_rate_of_the_step():
    parameter = torch.nn.Parameter(torch.zeros(2))
    settings = AdamW(0.1, (0.0, 0.0), 0.0, warmup_steps=0, final_fraction=0.5, total_steps=2, max_grad_norm=1.0)
    optimiser = Optimiser({"w": parameter}, settings)
    parameter.grad = torch.tensor([3.0, 4.0])
    assert optimiser.finite_norm(0, torch.zeros(())) == 5
    torch.nn.utils.clip_grads_with_norm_([parameter], 1.0, torch.tensor(5.0))
    assert parameter.grad.norm() == pytest.approx(1.0, abs=1e-5)
    optimiser.update(1, torch.zeros(()))
    assert torch.allclose(parameter, torch.tensor([-0.075, -0.075]), atol=1e-6)  # Adam without memory: the sign, times the rate
    assert parameter.grad is None


@pytest.mark.parametrize("critic", [None, "shared", "separate"])
def test_a_run_goes_on_bit_for_bit_from_a_saved_state(critic, tmp_path):
    batch = make_test_batch()
    config = AlgorithmConfig(kl_coef=0.1, critic=critic or "separate", learning_rate=1e-2, steps=4)

    def make():
        return Learner(make_policy(), config, has_critic=critic is not None)

    def updates(learner, steps):
        for step in steps:
            accumulate(learner, batch)
            learner.update(step)

    whole = make()
    updates(whole, range(4))
    first = make()
    updates(first, range(2))
    torch.save(first.state_dict(2), tmp_path / "state.pt")
    drawn = torch.rand(3), np.random.rand(3), random.random()
    second = make()
    torch.nn.init.zeros_(second._reference.model.model.norm.weight)  # must come from the state
    assert second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)) == 2
    assert torch.equal(torch.rand(3), drawn[0])
    assert np.array_equal(np.random.rand(3), drawn[1])
    assert random.random() == drawn[2]
    updates(second, range(2, 4))
    states = [learner.state_dict(4) for learner in (whole, second)]
    for part in ("model", "reference", "critic") if critic else ("model", "reference"):
        weights = [state[part].get("model", state[part]) for state in states]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.equal(whole.annotate(batch).reference_logprobs, second.annotate(batch).reference_logprobs)


def test_random_states_are_plain_and_go_back(tmp_path):
    torch.save(random_state(), tmp_path / "random.pt")
    drawn = torch.rand(2), np.random.rand(2), random.gauss(0, 1)
    set_random_state(torch.load(tmp_path / "random.pt", weights_only=True))
    assert torch.equal(torch.rand(2), drawn[0])
    assert np.array_equal(np.random.rand(2), drawn[1])
    assert random.gauss(0, 1) == drawn[2]


def test_supervised_training_goes_on_with_the_generators_where_they_were():
    policy = make_policy()
    parameters = dict(policy.model.named_parameters())
    optimiser = Optimiser(parameters, AdamW(0.1, (0.9, 0.98), 0.0, 0, 1.0, 1, 1.0))
    state = training_state(policy.model, optimiser, 3)
    drawn, weight = torch.rand(2), parameters["model.norm.weight"].clone()
    torch.nn.init.zeros_(parameters["model.norm.weight"])
    assert load_training_state(policy.model, optimiser, state) == 3
    assert torch.equal(torch.rand(2), drawn)
    assert torch.equal(parameters["model.norm.weight"], weight)


def test_training_weights_in_bfloat16_is_warned_of(caplog):
    settings = AdamW(1e-6, (0.9, 0.98), 0.0, warmup_steps=0, final_fraction=1.0, total_steps=9, max_grad_norm=1.0)
    Optimiser({"weight": torch.nn.Parameter(torch.ones(2))}, settings)
    assert not caplog.records
    Optimiser({"weight": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}, settings)
    assert "Load the model in float32" in caplog.text


def test_a_frozen_policy_cannot_be_trained():
    policy = make_policy()
    policy.model.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="no trainable parameters"):
        Learner(policy, AlgorithmConfig())


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ({"has_critic": True, "critic": "shared"}, {"has_critic": True, "critic": "separate"}),
        ({"has_critic": True, "critic": "separate"}, {"has_critic": True, "critic": "shared"}),
        ({}, {"has_critic": True}),
        ({"has_critic": True}, {}),
        ({}, {"kl_coef": 0.1}),
        ({"kl_coef": 0.1}, {}),
    ],
)
def test_a_state_with_other_parts_is_refused_with_their_names(saved, resumed):
    def make(has_critic=False, **settings):
        return Learner(make_policy(), AlgorithmConfig(**settings), has_critic=has_critic)

    with pytest.raises(ConfigurationError, match=r"these settings have critic .* the state has critic"):
        make(**resumed).load_state_dict(make(**saved).state_dict(1))
