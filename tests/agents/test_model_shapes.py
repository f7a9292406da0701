"""Shapes of published models, whole on the meta device and cut with random weights."""

from __future__ import annotations

import pytest
import torch

from searchqa_agents.model_shapes import SHAPES, empty_model, random_model, shape_config, shape_name
from searchqa_envs.errors import ConfigurationError

PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
}
"""What the hub says of each model's safetensors."""


def test_every_shape_has_a_published_count() -> None:
    assert set(SHAPES) == set(PUBLISHED)


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_a_whole_shape_has_as_many_parameters_as_published_and_takes_no_memory(name: str, count: int) -> None:
    model = empty_model(shape_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen2.5-3B", "qwen2.5-3b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("meta-llama/Llama-3.2-3B-Instruct", "llama-3.2-3b"),
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("qwen2.5-14b", "qwen2.5-14b"),
        ("Qwen/Qwen2.5-Math-7B", None),
        ("shipped", None),
    ],
)
def test_names_of_the_hub_mean_shapes(model: str, name: str | None) -> None:
    assert shape_name(model) == name


def test_llama_keeps_its_scaled_rotary_positions() -> None:
    config = shape_config("llama-3.2-3b")
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.rope_parameters["factor"] == 32.0
    assert config.rope_parameters["rope_theta"] == 500_000.0
    assert config.head_dim == 128


@pytest.mark.parametrize("name", SHAPES)
def test_a_cut_shape_of_random_weights_has_the_real_width_and_one_type(name: str) -> None:
    config = shape_config(name, num_hidden_layers=1, vocab_size=300)
    before = torch.random.get_rng_state()
    model = random_model(config, 3, pad_id=0, eos_id=1, dtype=torch.bfloat16) if SHAPES[name]["hidden_size"] < 2048 else empty_model(config)
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.config.hidden_size == SHAPES[name]["hidden_size"]
    assert len(model.get_decoder().layers) == 1
    assert model.get_input_embeddings().weight.shape == (300, SHAPES[name]["hidden_size"])


def test_the_seed_determines_random_weights() -> None:
    def made(seed: int) -> torch.Tensor:
        config = shape_config("qwen2.5-0.5b", num_hidden_layers=1, vocab_size=64)
        model = random_model(config, seed, pad_id=0, eos_id=1, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert not model.training
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    first = made(1)
    assert torch.equal(first, made(1))
    assert not torch.equal(first, made(2))
    assert torch.isfinite(first).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"like": None}, "must be a shape that is known"),
        ({"like": "gpt-2"}, "'gpt-2'"),
        ({"like": "qwen2.5-3b", "num_hidden_layers": 0}, "random.num_hidden_layers must be at least 1"),
        ({"like": "qwen2.5-3b", "vocab_size": -1}, "random.vocab_size must be at least 1"),
    ],
)
def test_shapes_that_cannot_be_are_refused(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        shape_config(**arguments)  # type: ignore[arg-type]
