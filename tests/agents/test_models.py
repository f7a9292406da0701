"""The tiny model, its warm-up, and loading."""

import inspect

import pytest
import torch

from searchqa_agents.models import load_model, make_tiny_model
from searchqa_agents.policy import Policy
from searchqa_agents.settings import ModelSettings
from searchqa_agents.warmup import WarmupConfig, copying_losses, train_warmup
from searchqa_envs.tokenizers import build_tokenizer


def test_the_same_seed_gives_the_same_weights_and_leaves_torch_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, two, other = (make_tiny_model(300, seed, pad_id=0, eos_id=1).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_size_of_the_default_model():
    model = make_tiny_model(554, 0, pad_id=0, eos_id=1)
    assert sum(parameter.numel() for parameter in model.parameters()) * 4 < 3_000_000  # bytes


def test_the_settings_of_runs_have_the_names_and_defaults_of_the_function():
    parameters = inspect.signature(make_tiny_model).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    not_set_by_runs = {"max_positions", "dtype", "device"}
    assert vars(ModelSettings()) == {name: value for name, value in defaults.items() if name not in not_set_by_runs}


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
    config = WarmupConfig(seed=seed)
    assert train_warmup(policy, config) < 2000
    assert max(copying_losses(policy, config, seed=99)) < 0.2
