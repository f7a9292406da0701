"""Chunked log-probabilities and entropies against plain ones, their gradients, types and memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from searchqa_agents.token_logprobs import checkpointed_token_stats, linear_token_stats
from searchqa_agents.transformers_lm import BANNED


def plain(hidden, weight, bias, targets, banned, temperature):
    """With the logits of all tokens over the ids that are not banned, by autograd."""
    logits = torch.nn.functional.linear(hidden, weight, bias)[:, ~banned] / temperature
    logprobs = torch.log_softmax(logits, -1)
    places = banned.logical_not().cumsum(0) - 1
    return logprobs.gather(-1, places[targets][:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def tensors(count, size, vocab, *, bias, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, size, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, size, generator=generator, dtype=dtype).requires_grad_()
    offset = torch.randn(vocab, generator=generator, dtype=dtype).requires_grad_() if bias else None
    banned = torch.zeros(vocab, dtype=torch.bool)
    banned[[0, vocab - 1]] = True
    return hidden, weight, offset, torch.randint(1, vocab - 1, (count,), generator=generator), banned


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 9),
    vocab=st.integers(4, 12),
    rows=st.integers(1, 10),
    bias=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
    entropy_gradient=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_plain_softmax_whatever_the_chunks(
    count, vocab, rows, bias, temperature, entropy_gradient, seed
):
    hidden, weight, offset, targets, banned = tensors(count, 3, vocab, bias=bias, seed=seed)
    leaves = [tensor for tensor in (hidden, weight, offset) if tensor is not None]
    factors = torch.linspace(-1, 2, count, dtype=torch.float64)  # each token has a gradient of its own
    results = []
    for chunked in (False, True):
        if chunked:
            logprob, entropy = linear_token_stats(
                hidden, weight, offset, targets, banned=banned, temperature=temperature, entropy_gradient=entropy_gradient,
                chunk_floats=rows * vocab,
            )  # fmt: skip
        else:
            logprob, entropy = plain(hidden, weight, offset, targets, banned, temperature)
        assert entropy.requires_grad == (entropy_gradient or not chunked)
        loss = (logprob * factors).sum() + (entropy * factors.flip(0)).sum() * entropy_gradient
        results.append([logprob, entropy, *torch.autograd.grad(loss, leaves, allow_unused=True)])
    for ours, expected in zip(results[1], results[0], strict=True):
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_gradients_are_those_of_finite_differences(entropy_gradient):
    hidden, weight, bias, targets, banned = tensors(5, 3, 7, bias=True)

    def stats(*inputs):
        logprob, entropy = linear_token_stats(
            *inputs, targets, banned=banned, temperature=0.7, entropy_gradient=entropy_gradient, chunk_floats=14
        )
        return (logprob, entropy) if entropy_gradient else logprob

    assert torch.autograd.gradcheck(stats, (hidden, weight, bias))


def test_banned_ids_have_no_probability_and_no_gradient_even_as_targets():
    hidden, weight, _, targets, banned = tensors(4, 3, 6, bias=False)
    targets[0] = 0  # banned
    logprob, _ = linear_token_stats(hidden, weight, None, targets, banned=banned)
    assert logprob[0] < BANNED / 2
    assert (logprob[1:] > -100).all()
    logprob.sum().backward()
    assert (weight.grad[banned] == 0).all()
    assert (weight.grad[~banned] != 0).all()


def test_only_the_gradients_asked_for_are_computed():
    hidden, weight, bias, targets, banned = tensors(4, 3, 6, bias=True)
    logprob, _ = linear_token_stats(hidden, weight.detach(), bias.detach(), targets, banned=banned)
    logprob.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    logprob, _ = linear_token_stats(hidden.detach(), weight, None, targets, banned=banned)
    logprob.sum().backward()
    assert weight.grad is not None


def test_bfloat16_weights_give_float32_results_whose_sums_over_chunks_are_float32():
    hidden, weight, _, targets, banned = (None if t is None else t.detach() for t in tensors(512, 16, 50, bias=False, dtype=torch.float32))
    expected, _ = plain(hidden.bfloat16().float(), weight.bfloat16().float(), None, targets, banned, 1.0)
    gradients = []
    for floats in (50 * 512, 50):  # one chunk, and a chunk per token
        leaf = weight.bfloat16().requires_grad_()
        logprob, entropy = linear_token_stats(hidden.bfloat16(), leaf, None, targets, banned=banned, chunk_floats=floats)
        assert logprob.dtype == entropy.dtype == torch.float32
        assert torch.allclose(logprob, expected, atol=0.1)
        logprob.sum().backward()
        assert leaf.grad.dtype == torch.bfloat16
        gradients.append(leaf.grad.float())
    # a bfloat16 running sum over 512 chunks would be off by several percent
    assert (gradients[0] - gradients[1]).norm() < 0.005 * gradients[0].norm()


def test_autocast_computes_the_products_in_bfloat16_in_both_passes():
    hidden, weight, _, targets, banned = tensors(64, 16, 50, bias=False, dtype=torch.float32)
    exact = linear_token_stats(hidden.bfloat16().float(), weight.bfloat16().float(), None, targets, banned=banned)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprob, entropy = linear_token_stats(hidden, weight, None, targets, banned=banned, entropy_gradient=True)
    assert logprob.dtype == entropy.dtype == torch.float32
    assert not torch.equal(logprob, exact)
    assert torch.allclose(logprob, exact, atol=0.1)
    (logprob.sum() + entropy.sum()).backward()
    other = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight)]
    logprob, entropy = plain(*other, None, targets, banned, 1.0)
    (logprob.sum() + entropy.sum()).backward()
    for ours, expected in zip((hidden, weight), other, strict=True):
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - expected.grad).norm() < 0.02 * expected.grad.norm()


def test_any_output_layer_gives_the_same_through_checkpoints(monkeypatch):
    monkeypatch.setattr("searchqa_agents.token_logprobs.chunk_rows", lambda *_: 2)
    hidden, weight, _, targets, banned = tensors(5, 3, 6, bias=False)
    both = (
        linear_token_stats(hidden, weight, None, targets, banned=banned, temperature=0.7, entropy_gradient=True),
        checkpointed_token_stats(
            hidden, targets, lambda h: (h @ weight.T).masked_fill(banned, BANNED), temperature=0.7, entropy_gradient=True
        ),
    )
    gradients = [torch.autograd.grad(logprob.sum() + entropy.square().sum(), (hidden, weight)) for logprob, entropy in both]
    for ours, other in zip(both[0] + gradients[0], both[1] + gradients[1], strict=True):
        assert torch.allclose(ours, other, rtol=1e-9, atol=1e-9)


def test_no_tensor_of_all_tokens_and_ids_is_ever_made():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            for result in results if isinstance(results, tuple) else (results,):
                self.elements = max(self.elements, result.numel() if isinstance(result, torch.Tensor) else 0)
            return results

    hidden, weight, _, targets, banned = tensors(300, 4, 40, bias=False, dtype=torch.float32)
    with Largest() as largest:
        logprob, entropy = linear_token_stats(hidden, weight, None, targets, banned=banned, entropy_gradient=True, chunk_floats=10 * 40)
        (logprob.sum() + entropy.sum()).backward()
    assert largest.elements == 300 * 4  # the hidden states and their gradient
