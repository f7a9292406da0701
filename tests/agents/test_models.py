"""The tiny model, its start near copying, and loading."""

import pytest
import torch

from searchqa_agents.models import load_model, make_tiny_model
from searchqa_agents.policy import Policy
from searchqa_agents.warmup import WarmupConfig, copying_loss, train_warmup
from searchqa_envs.tokenizers import build_tokenizer


def attention(model, length=12):
    """Attention weights of both layers on random tokens, averaged over sequences: [layers][heads, T, T]."""
    model.set_attn_implementation("eager")
    ids = torch.randint(5, 300, (64, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weights = model(input_ids=ids, output_attentions=True).attentions
    return [layer.mean(0) for layer in weights]


def test_the_start_near_copying_looks_at_the_token_before():
    plain, started = (make_tiny_model(300, 0, pad_id=0, eos_id=1, copying_start=start) for start in (False, True))
    for model, least, most in ((plain, 0.0, 0.3), (started, 0.5, 1.0)):
        first = attention(model)[0]
        before = first[:2].diagonal(offset=-1, dim1=-2, dim2=-1).mean()  # two heads of layer 0, all positions
        assert least <= before <= most


def test_the_start_keeps_the_architecture_and_shape_of_a_plain_llama():
    plain, started = (make_tiny_model(300, 0, pad_id=0, eos_id=1, copying_start=start) for start in (False, True))
    assert [(name, p.shape) for name, p in plain.named_parameters()] == [(name, p.shape) for name, p in started.named_parameters()]
    assert type(started).__name__ == "LlamaForCausalLM"


def test_size_of_the_default_model():
    model = make_tiny_model(554, 0, pad_id=0, eos_id=1)
    assert sum(parameter.numel() for parameter in model.parameters()) * 4 < 3_000_000  # bytes


def test_a_model_loads_from_its_folder(tmp_path):
    model = make_tiny_model(300, 0, pad_id=0, eos_id=1, hidden_size=32, feed_forward_size=48)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert load_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_warm_up_teaches_the_default_model_to_copy(seed):
    torch.set_num_threads(1)
    tokenizer = build_tokenizer("world")
    policy = Policy(make_tiny_model(tokenizer.vocab_size, seed, pad_id=tokenizer.pad_id, eos_id=tokenizer.eos_id), tokenizer)
    assert train_warmup(policy, WarmupConfig(seed=seed)) <= 400
    assert copying_loss(policy, seed=99) < 0.3
