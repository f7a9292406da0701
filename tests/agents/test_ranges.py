"""Settings out of range are found when settings are checked: in a dry run too, before a model is loaded or a step is taken."""

import math

import pytest

from searchqa_agents.algorithm import check_settings, get_algorithm
from searchqa_agents.cli import main
from searchqa_agents.ranges import RANGES, check_ranges
from searchqa_agents.sft import SFTConfig
from searchqa_agents.supervised import SupervisedConfig
from searchqa_envs.errors import ConfigurationError

WRONG = [
    ("learning_rate", -1e-3), ("learning_rate", math.nan), ("critic_learning_rate", -1.0), ("beta1", 1.0), ("beta2", -0.1),
    ("clip_coef", 0.0), ("clip_coef", -0.2), ("kl_clamp", 0.0), ("kl_clamp", -1.0), ("weight_decay", -0.01), ("max_grad_norm", 0.0),
    ("final_fraction", 1.5), ("final_fraction", -0.1), ("importance_cap", 0.0), ("warmup_steps", -1), ("checkpoint_every", -5),
    ("num_worlds", 0), ("kl_coef", math.inf), ("entropy_coef", math.nan), ("gamma", 1.1), ("lam", -0.1), ("max_kl", 0.0),
    ("schedule_steps", 0), ("warmup_ratio", 1.1), ("reward_clip", 0.0), ("value_clip_coef", -0.5), ("max_tokens", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_that_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(ConfigurationError, match=f"{name} must be .*; got {value}"):
        check_settings(get_algorithm("ppo"), get_algorithm("ppo").config(**{name: value}))


def test_a_length_that_losses_are_divided_by_is_above_0():
    with pytest.raises(ConfigurationError, match="constant_length must be a number above 0; got 0"):
        check_settings(get_algorithm("grpo"), get_algorithm("grpo").config(token_weighting="constant-length", constant_length=0.0))


def test_what_recipes_use_can_be():
    """The KL term with the sign of ZeroSearch's released code, no bounds, no decay, an entropy that is pushed down, and all defaults."""
    fine = {
        "kl_coef": -0.001,
        "kl_clamp": None,
        "entropy_coef": -0.01,
        "weight_decay": 0.0,
        "max_grad_norm": math.inf,
        "final_fraction": 1.0,
    }
    check_settings(get_algorithm("grpo"), get_algorithm("grpo").config(**fine))
    for name in ("grpo", "gspo", "ppo", "raft", "reinforce", "reinforce_plus_plus", "rloo"):
        check_settings(get_algorithm(name), get_algorithm(name).config())
    check_ranges(SFTConfig())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", -1),
        ("questions_per_step", 0),
        ("group_size", 0),
        ("learning_rate", -1.0),
        ("max_grad_norm", 0.0),
        ("beta2", 1.0),
    ],
)
def test_fine_tuning_refuses_them_too(name, value):
    with pytest.raises(ConfigurationError, match=f"{name} must be"):
        SupervisedConfig(**{name: value})


@pytest.mark.parametrize("name", RANGES)
def test_every_range_has_a_setting(name):
    """Another name in the table than in the settings would check nothing."""
    from searchqa_agents.warmup import WarmupConfig

    configs = [get_algorithm(algorithm).config for algorithm in ("grpo", "ppo")]
    assert any(name in config.__dataclass_fields__ for config in (*configs, SupervisedConfig, SFTConfig, WarmupConfig))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["algo.beta1=1"], "beta1 must be"),
        (["algo=sft", "algo.steps=-1"], "steps must be at least 1; got -1"),
        (["algo=sft", "algo.questions_per_step=0"], "questions_per_step must be at least 1; got 0"),
        (["sft.learning_rate=-1"], "sft.learning_rate must be"),
        (["warmup.batch_size=0"], "warmup.batch_size must be at least 1; got 0"),
        (["start=shipped", "lora={rank: -2}"], "lora.rank must be a whole number of at least 1; got -2"),
        (["start=shipped", "lora={rank: 2, alpha: 0}"], "lora.alpha must be a number above 0; got 0"),
    ],
)
def test_a_dry_run_says_so(words, said, capsys):
    assert main(["train", "recipe=smoke", *words, "dry_run=true"]) == 1
    assert said in " ".join(capsys.readouterr().err.split())
