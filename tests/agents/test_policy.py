"""Evaluation of tokens, micro-batches, saving."""

import numpy as np
import pytest
import torch

import searchqa_agents.token_logprobs as token_logprobs
from searchqa_agents.micro_batches import length_sorted_batches
from searchqa_agents.models import make_tiny_model
from searchqa_agents.policy import Policy
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers.byte import ByteTokenizer

TOKENIZER = ByteTokenizer()


@pytest.fixture
def policy() -> Policy:
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


def sequences(count=6):
    rng = np.random.default_rng(1)
    ids = [rng.integers(0, 256, rng.integers(5, 40)).astype(np.int32) for _ in range(count)]
    masks = [np.r_[0, rng.integers(0, 2, len(row) - 1)].astype(np.int8) for row in ids]
    return ids, masks


def test_evaluate_equals_a_plain_forward_pass_in_the_order_given(policy):
    ids, masks = sequences()
    with torch.no_grad():
        stats = policy.evaluate(ids, masks, temperature=0.8, max_tokens=64)
    logprobs, entropies = [], []
    for row, mask in zip(ids, masks, strict=True):
        with torch.no_grad():
            logits = policy.model(torch.from_numpy(row.astype(np.int64))[None]).logits[0, :-1]
        logits[:, TOKENIZER.pad_id] = -torch.inf
        distribution = torch.distributions.Categorical(logits=logits / 0.8)
        keep = torch.from_numpy(mask[1:] == 1)
        logprobs.append(distribution.log_prob(torch.from_numpy(row[1:].astype(np.int64)))[keep])
        probabilities = distribution.probs[keep]
        entropies.append(-(probabilities * probabilities.clamp(min=1e-30).log()).sum(-1))
    assert torch.allclose(stats.logprob, torch.cat(logprobs), atol=1e-5)
    assert torch.allclose(stats.entropy, torch.cat(entropies), atol=1e-4)
    assert stats.value is None


def test_micro_batches_and_chunks_change_neither_values_nor_gradients(policy, monkeypatch):
    ids, masks = sequences()
    results = []
    for max_tokens, rows in ((10_000, 1000), (50, 1000), (10_000, 7)):
        monkeypatch.setattr(token_logprobs, "chunk_rows", lambda *_, rows=rows: rows)
        stats = policy.evaluate(ids, masks, entropy_gradient=True, max_tokens=max_tokens)
        policy.model.zero_grad()
        (stats.logprob.sum() + stats.entropy.sum()).backward()
        results.append((stats.logprob.detach(), torch.cat([p.grad.flatten() for p in policy.model.parameters()])))
    for logprob, gradient in results[1:]:
        assert torch.allclose(logprob, results[0][0], atol=1e-5)
        assert torch.allclose(gradient, results[0][1], atol=1e-3)


def test_entropy_has_a_gradient_only_where_asked_for(policy):
    ids, masks = sequences()
    assert not policy.evaluate(ids, masks).entropy.requires_grad
    assert policy.evaluate(ids, masks, entropy_gradient=True).entropy.requires_grad


def test_tokens_under_a_zero_mask_get_no_gradient_as_targets(policy):
    ids, masks = sequences(1)
    masks = [np.zeros_like(masks[0])]
    masks[0][5] = 1
    changed = ids[0].copy()
    changed[6:] = 65  # what comes after the only policy token
    stats = [policy.evaluate([row], masks).logprob for row in (ids[0], changed)]
    assert torch.equal(stats[0], stats[1])
    unmasked = [policy.evaluate([row], [np.r_[0, np.ones(len(row) - 1)].astype(np.int8)]).logprob.sum() for row in (ids[0], changed)]
    assert unmasked[0] != unmasked[1]


def test_a_policy_token_without_context_is_refused(policy):
    with pytest.raises(ValueError, match="first token"):
        policy.evaluate([np.zeros(3, np.int32)], [np.ones(3, np.int8)])


def test_length_sorted_batches_hold_every_index_once_within_the_limit():
    lengths = [5, 100, 7, 7, 1, 30]
    batches = length_sorted_batches(lengths, 32)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 32
    assert batches == [[4, 0, 2, 3], [5], [1]]


def test_a_saved_policy_loads_with_the_same_outputs_and_knows_its_tokenizer(policy, tmp_path):
    policy.save(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = Policy.load(tmp_path, TOKENIZER)
    ids, masks = sequences()
    assert torch.equal(loaded.evaluate(ids, masks).logprob, policy.evaluate(ids, masks).logprob)

    class Other(ByteTokenizer):
        name = "other"

    with pytest.raises(ConfigurationError, match="trained with tokenizer 'byte'"):
        Policy.load(tmp_path, Other())


def test_the_tiny_model_is_a_function_of_its_seed_and_leaves_the_global_generator_alone():
    arguments = {"pad_id": 0, "eos_id": 1, "hidden_size": 32, "feed_forward_size": 48}
    before = torch.random.get_rng_state()
    a, b, c = (make_tiny_model(20, seed, **arguments) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert a.lm_head.weight.data_ptr() == a.model.embed_tokens.weight.data_ptr()
