"""Evaluation of tokens, micro-batches, saving."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, Qwen2Config, Qwen2ForCausalLM

import searchqa_agents.token_logprobs as token_logprobs
from searchqa_agents.micro_batches import length_sorted_batches, packed_batches
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


def qwen2_policy(**changes):
    """Grouped queries, biases, an output layer of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=TOKENIZER.pad_id, eos_token_id=TOKENIZER.eos_id, initializer_range=0.2, **changes,
        )  # fmt: skip
        return Policy(Qwen2ForCausalLM(config), TOKENIZER)


def gradient(policy, **arguments):
    ids, masks = sequences()
    policy.model.zero_grad()
    stats = policy.evaluate(ids, masks, entropy_gradient=True, **arguments)
    (stats.logprob.sum() + stats.entropy.sum()).backward()
    return stats.logprob.detach(), torch.cat([p.grad.flatten() for p in policy.model.parameters()])


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("max_tokens", [None, 50])
def test_one_packed_row_equals_padded_rows(policy, kind, max_tokens):
    policy = policy if kind == "llama" else qwen2_policy()
    (logprob, grad), (packed_logprob, packed_grad) = (gradient(policy, packed=packed, max_tokens=max_tokens) for packed in (False, True))
    assert torch.allclose(packed_logprob, logprob, atol=1e-5)
    assert (packed_grad - grad).norm() < 1e-5 * grad.norm()


def varlen_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **_):
    """What a variable-length kernel does with what transformers hands it: each sequence of the one row by itself, without a mask."""
    assert attention_mask is None
    assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    assert cu_seq_lens_q.dtype == torch.int32
    lengths = cu_seq_lens_q.diff().tolist()
    assert max_length_q == max_length_k == max(lengths)
    parts = [torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)]
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True) for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def test_a_variable_length_kernel_is_told_where_sequences_begin():
    AttentionInterface.register("varlen_of_the_test", varlen_attention)
    AttentionMaskInterface.register("varlen_of_the_test", lambda *_, **__: None)
    logprob, grad = gradient(qwen2_policy())
    kernel_logprob, kernel_grad = gradient(qwen2_policy(attn_implementation="varlen_of_the_test"), packed=True, gradient_checkpointing=True)
    assert torch.allclose(kernel_logprob, logprob, atol=1e-5)
    assert (kernel_grad - grad).norm() < 1e-5 * grad.norm()


def test_gradient_checkpointing_is_exact_keeps_less_and_leaves_dropout_off_and_caches_usable():
    policy = qwen2_policy(attention_dropout=0.5)
    kept = []
    results = []
    for checkpointing in (False, True):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
            results.append(gradient(policy, gradient_checkpointing=checkpointing))
        kept.append(sum(sizes.values()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)
    assert kept[1] < 0.5 * kept[0]
    assert not any(module.training for module in policy.model.modules())
    assert policy.model(torch.tensor([[1, 2]]), use_cache=True).past_key_values.get_seq_length() == 2


def test_gradient_checkpointing_refuses_layers_that_it_would_switch_dropout_on_in(policy):
    for layer in policy.model.model.layers:
        layer.dropout = 0.1  # as OPT's layers have
    with pytest.raises(ConfigurationError, match=r"must be 0; got 0\.1"):
        gradient(policy, gradient_checkpointing=True)


def test_a_subclass_that_changes_logits_changes_what_is_evaluated(policy):
    class Louder(Policy):
        def logits(self, hidden):
            return 2 * super().logits(hidden)

    ids, masks = sequences()
    with torch.no_grad():
        louder = Louder(policy.model, TOKENIZER).evaluate(ids, masks, temperature=2.0)
        assert torch.allclose(louder.logprob, policy.evaluate(ids, masks).logprob, atol=1e-5)


def test_tied_embeddings_get_the_gradients_of_both_uses(policy):
    ids, masks = sequences(2)
    policy.evaluate(ids, masks).logprob.sum().backward()
    tied = policy.model.lm_head.weight.grad.clone()
    untied = copy.deepcopy(policy)
    untied.model.lm_head.weight = torch.nn.Parameter(policy.model.lm_head.weight.detach().clone())
    untied.model.zero_grad()
    untied.evaluate(ids, masks).logprob.sum().backward()
    both = untied.model.lm_head.weight.grad + untied.model.model.embed_tokens.weight.grad
    assert (tied - both).norm() < 1e-5 * both.norm()
    assert untied.model.model.embed_tokens.weight.grad.norm() > 0.01 * both.norm()


def test_bfloat16_weights_are_evaluated_as_they_are_sampled(policy):
    ids, masks = sequences()
    with torch.no_grad():
        exact = policy.evaluate(ids, masks)
        policy.model.bfloat16()
        rounded = policy.evaluate(ids, masks)
    assert rounded.logprob.dtype == rounded.entropy.dtype == torch.float32
    assert 0 < (rounded.logprob - exact.logprob).abs().max() < 0.5


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=8), max_tokens=st.integers(1, 120), pass_cost=st.integers(0, 100))
def test_length_sorted_batches_are_the_cheapest_cut_of_the_sorted_lengths(lengths, max_tokens, pass_cost):
    batches = length_sorted_batches(lengths, max_tokens, pass_cost=pass_cost)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))

    def cost(parts):
        return sum(len(part) * max(part) + pass_cost for part in parts)

    ordered = sorted(lengths)
    cheapest = 0
    if lengths:
        ways = []
        for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
            places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(lengths)]
            parts = [ordered[a:b] for a, b in itertools.pairwise(places)]
            if all(len(part) == 1 or len(part) * max(part) <= max_tokens for part in parts):
                ways.append(cost(parts))
        cheapest = min(ways)
    assert cost([[lengths[i] for i in batch] for batch in batches]) == cheapest


@given(lengths=st.lists(st.integers(1, 50), max_size=12), max_tokens=st.integers(1, 120))
def test_packed_batches_hold_every_index_once_within_the_limit(lengths, max_tokens):
    batches = packed_batches(lengths, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= max_tokens for batch in batches)
