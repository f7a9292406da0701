"""The values that settings of training can have, by the setting's name; what lies outside is found before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from searchqa_envs.errors import ConfigurationError

_Range = tuple[Callable[[float], bool], str]
_COUNT: _Range = (lambda value: value >= 1, "at least 1")
_NUMBER: _Range = (lambda value: value >= 0, "at least 0")
_FROM_0: _Range = (lambda value: 0 <= value < math.inf, "a number of at least 0")
_ABOVE_0: _Range = (lambda value: 0 < value < math.inf, "a number above 0")
_LIMIT: _Range = (lambda value: value > 0, "above 0")
_DECAY: _Range = (lambda value: 0 <= value < 1, "at least 0 and below 1")
_SHARE: _Range = (lambda value: 0 <= value <= 1, "between 0 and 1")
_FINITE: _Range = (math.isfinite, "a finite number")

RANGES: dict[str, _Range] = {
    **dict.fromkeys(("steps", "max_steps", "batch_size", "questions_per_step", "group_size", "dynamic_sampling", "num_worlds"), _COUNT),
    "token_budget": _COUNT,
    **dict.fromkeys(("update_epochs", "num_minibatches", "max_tokens", "schedule_steps", "check_every"), _COUNT),
    **dict.fromkeys(("warmup_steps", "checkpoint_every", "settling_steps", "critic_warmup"), _NUMBER),
    **dict.fromkeys(("learning_rate", "critic_learning_rate", "weight_decay", "value_coef"), _FROM_0),
    **dict.fromkeys(("constant_length", "importance_cap", "reward_clip"), _ABOVE_0),
    **dict.fromkeys(("max_grad_norm", "clip_coef", "clip_coef_high", "value_clip_coef", "kl_clamp", "max_kl", "epochs"), _LIMIT),
    **dict.fromkeys(("beta1", "beta2"), _DECAY),
    **dict.fromkeys(("final_fraction", "warmup_ratio", "critic_warmup_ratio", "gamma", "lam"), _SHARE),
    # of either sign: ZeroSearch's released code pays for divergence, which recipes repeat
    **dict.fromkeys(("kl_coef", "entropy_coef"), _FINITE),
}
"""Whether a value can be, and the words for what can."""


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise ``ConfigurationError`` for the first field of a dataclass that lies outside :data:`RANGES`; null, where a field may be it, passes.

    ``prefix`` is what the keys of the line begin with.
    """
    for name in config.__dataclass_fields__:
        value = getattr(config, name)
        if value is None or name not in RANGES:
            continue
        holds, words = RANGES[name]
        if not holds(value):
            raise ConfigurationError(f"{prefix}{name} must be {words}; got {value}.")
