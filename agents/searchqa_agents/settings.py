"""The typed configuration of runs. The YAML files in ``searchqa_conf`` hold the values; these dataclasses hold names and types.

Nothing heavy is imported before it is needed: a misspelt key of ``eval`` is found before torch is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from searchqa_envs.errors import ConfigurationError

Config = TypeVar("Config")


@dataclass
class EnvSettings:
    """Arguments of an environment; null leaves the environment's own default."""

    id: str = MISSING
    split: str | None = None
    retriever: Any = None
    top_k: int | None = None
    max_turns: int | None = None
    max_context_tokens: int | None = None
    max_segment_tokens: int | None = None
    max_observation_tokens: int | None = None
    tokenizer: str | None = None
    dialect: str | None = None
    prompt: str | None = None
    reward: Any = None
    reward_weights: Any = None
    forced_answer: bool | None = None
    search_controls: Any = None
    data_dir: str | None = None


@dataclass
class WorldSettings(EnvSettings):
    """The generated world's own arguments."""

    preset: str | None = None
    world_seed: int | None = None
    num_worlds: int | None = None
    hops: Any = None
    style: str | None = None
    entities: int | None = None


@dataclass
class CustomSettings(EnvSettings):
    """Your own questions and corpus."""

    questions: str | None = None
    corpus: str | None = None


def env_arguments(env: EnvSettings, **changed: Any) -> dict[str, Any]:
    """What to call ``gym.make`` with, beside the id: what is not null, and ``changed``."""
    values = {f.name: getattr(env, f.name) for f in fields(env) if f.name != "id"} | changed
    weights = values.get("reward_weights")
    if weights is not None and not isinstance(weights, Mapping):
        raise ConfigurationError(
            f"env.reward_weights must be a mapping from the reward's terms to numbers, such as {{em: 2}}; got {weights!r}."
        )
    retriever = values.get("retriever")
    if isinstance(retriever, Mapping) and retriever.get("name") is None:
        raise ConfigurationError(
            f"env.retriever (or that of evaluation.env or of a stage) has options but no name; got {dict(retriever)!r}. Say which retriever they are of, "
            "such as env.retriever.name=http, or all in one: env.retriever={name: http, url: ...}."
        )
    return {name: value for name, value in values.items() if value is not None}


def changed_arguments(key: str, changed: Any, env: EnvSettings, *, other_keys: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The environment arguments that ``key`` changes, as a plain mapping; null changes none.

    ``other_keys`` are arguments that it cannot change, each with the reason. Raises ``ConfigurationError`` for those, and for names that the
    environment does not know.
    """
    if changed is None:
        return {}
    if not isinstance(changed, Mapping):
        raise ConfigurationError(
            f"{key} must be a mapping of environment arguments, such as {{retriever: bm25, top_k: 5}}; got {changed!r}."
        )
    refused = {
        "id": "one run has one environment",
        "tokenizer": "the policy has one tokenizer, that of env.tokenizer",
        **(other_keys or {}),
    }
    known = [f.name for f in fields(env) if f.name not in refused]
    for name in changed:
        if name in refused:
            raise ConfigurationError(f"{key}.{name} cannot be set: {refused[name]}. It can change {known}.")
        if name not in known:
            raise ConfigurationError(f"{key}.{name} is not an argument of {env.id}. It can change {known}.")
    return {str(name): value for name, value in changed.items()}


MAPPINGS = (
    "env.retriever",
    "env.reward",
    "env.reward_weights",
    "env.search_controls",
    "evaluation.env",
    "lora",
    "stages",
    "wandb",
    "agent.options",
)
"""Keys whose value can be a mapping with names that no file of ours lists."""


REPLACED = tuple(key for key in MAPPINGS if key != "evaluation.env") + tuple(
    key.replace("env.", "evaluation.env.", 1) for key in MAPPINGS if key.startswith("env.")
)
"""Those of which a whole mapping on a line takes the place of a recipe's, where Hydra would merge the two."""
_REPLACED_IN_STAGE = re.compile(r"stages\.\d+\.(until|algo|env(\.(retriever|reward|reward_weights|search_controls))?)=\{")
"""The same of one stage."""


def with_parts(line: Sequence[str]) -> list[str]:
    """The words of a line as Hydra must see them.

    ``env.reward_weights.em=2`` becomes ``++env.reward_weights.em=2``, so that Hydra takes a name that it does not know. Before a whole mapping, such as
    ``env.retriever={name: bm25}`` or ``stages.0.until={steps: 5}``, the key is set to null.
    """
    # evaluation.env is a mapping to begin with; what the others replace is null or a name
    beginnings = (*(f"{key}." for key in MAPPINGS), "evaluation.env=")
    words = []
    for word in line:
        given = f"++{word}" if word.startswith(beginnings) else word
        bare = word.lstrip("+")
        replaces = bare.startswith(tuple(f"{key}={{" for key in REPLACED)) or _REPLACED_IN_STAGE.match(bare)
        if replaces and not _is_swept(given):
            words.append(f"{given.partition('=')[0]}=null")
        words.append(given)
    return words


def _is_swept(word: str) -> bool:
    """Whether a word has several values, for a multirun. One that cannot be parsed is left to Hydra's own message."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return bool(OverridesParser.create().parse_override(word).is_sweep_override())
    except HydraException:
        return True


def check_at_least(least: int, **values: int | None) -> None:
    """Raise ``ConfigurationError`` for a count below ``least``; None stands for all and passes."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ConfigurationError(f"{name.replace('__', '.')} must be at least {least}; got {value}.")


@dataclass
class AgentSettings:
    """Who answers: ``kind`` is a script (direct, search_once, oracle), lm, server or baseline."""

    kind: str = MISSING


@dataclass
class LMAgentSettings(AgentSettings):
    """A language model and how it is sampled."""

    checkpoint: str = MISSING
    temperature: float = MISSING


@dataclass
class ServerAgentSettings(AgentSettings):
    """A language model behind HTTP; names and meanings are those of ``CompletionServerLM``."""

    url: str = MISSING
    protocol: str = MISSING
    model: str | None = MISSING
    temperature: float = MISSING
    logprobs: str | None = MISSING
    concurrency: int = MISSING
    timeout: float = MISSING
    retries: int = MISSING
    deadline: float = MISSING


@dataclass
class BaselineSettings(AgentSettings):
    """A script that asks a language model: ``method`` is one of ``searchqa_agents.baselines.base.BASELINES``, ``options`` are its configuration."""

    method: str = MISSING
    options: Any = None
    lm: AgentSettings = MISSING


LANGUAGE_MODELS = (LMAgentSettings, ServerAgentSettings)
"""The agents that are sampled; the others are scripts."""


@dataclass
class RunSettings:
    """What every run has."""

    name: str = MISSING
    run_dir: str = MISSING
    seed: int = MISSING
    threads: int | None = MISSING
    device: str = MISSING
    dtype: str = MISSING
    dry_run: bool = MISSING
    retry: bool = True
    objective: str | None = None


@dataclass
class EvalSettings(RunSettings):
    """``searchqa eval``."""

    env: EnvSettings = MISSING
    agent: AgentSettings = MISSING
    sets: Any = None
    questions: Any = None
    samples: int = MISSING
    num_envs: int = MISSING
    processes: int = MISSING
    shard: str | None = MISSING
    save: int | None = MISSING


@dataclass
class ModelSettings:
    """The tiny model of the world; names and defaults are those of ``make_tiny_model``."""

    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 8
    feed_forward_size: int = 352
    initializer_range: float = 0.05
    rope_theta: float = 10_000.0


@dataclass
class WarmStartSettings(RunSettings):
    """``searchqa sft``, and the beginning of ``searchqa train``. ``warmup`` and ``sft`` are a ``WarmupConfig`` and an ``SFTConfig``."""

    env: EnvSettings = MISSING
    model: ModelSettings = field(default_factory=ModelSettings)
    demonstrations: str = MISSING
    warmup: Any = MISSING
    sft: Any = MISSING
    num_envs: int = MISSING
    keep_last: int = MISSING
    max_lost_rollouts: int = MISSING
    dashboard: str = "auto"
    wandb: Any = None


@dataclass
class EvaluationSettings:
    """How training is measured, before and after."""

    split: str | None = MISSING
    questions: int = MISSING
    seed: int = MISSING
    save: int = MISSING
    env: Any = None


@dataclass
class RandomSettings:
    """The model of random weights of ``start=random``: a published shape (:mod:`searchqa_agents.model_shapes`), whole or cut."""

    like: str | None = None
    num_hidden_layers: int | None = None
    vocab_size: int | None = None


@dataclass
class PlanSettings:
    """The machine that ``dry_run=true`` plans for; null: this one, and this launch. See :mod:`searchqa_agents.plan`."""

    processes: int | None = None
    device: str | None = None
    memory_gb: float | None = None
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    utilisation: float = 0.4


@dataclass
class TrainSettings(WarmStartSettings):
    """``searchqa train``. ``algo`` is the algorithm's own configuration, such as a ``GRPOConfig``, and its name; ``alarms`` an ``AlarmConfig``."""

    start: str = MISSING
    random: RandomSettings = field(default_factory=RandomSettings)
    plan: PlanSettings = field(default_factory=PlanSettings)
    plugins: list[str] = MISSING
    algo: Any = MISSING
    lora: Any = MISSING
    parallel: str = MISSING
    evaluation: EvaluationSettings = MISSING
    alarms: Any = MISSING
    rollouts_every: int = MISSING
    questions: str | None = None
    stages: Any = None


def register() -> None:
    """Make the types of ``eval`` known to Hydra."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="eval_types", node=EvalSettings)
    store.store(group="env", name="types", node=EnvSettings)
    store.store(group="env", name="world_types", node=WorldSettings)
    store.store(group="env", name="custom_types", node=CustomSettings)
    store.store(group="agent", name="types", node=AgentSettings)
    store.store(group="agent", name="lm_types", node=LMAgentSettings)
    store.store(group="agent", name="server_types", node=ServerAgentSettings)
    store.store(group="agent", name="baseline_types", node=BaselineSettings)


def register_training() -> None:
    """Make the types of ``sft`` and ``train`` known to Hydra, and every algorithm that is registered by now; loads torch."""
    from hydra.core.config_store import ConfigStore
    from rich.console import Console

    with Console(stderr=True).status("Loading torch ..."):  # shown in a terminal, for some seconds
        import searchqa_agents.algorithms  # noqa: F401, registers our own
        from searchqa_agents.alarms import AlarmConfig
        from searchqa_agents.algorithm import ALGORITHMS
        from searchqa_agents.sft import SFTConfig
        from searchqa_agents.supervised import SupervisedConfig
        from searchqa_agents.warmup import WarmupConfig

    from searchqa_agents.config_help import options

    store = ConfigStore.instance()
    store.store(name="sft_types", node=WarmStartSettings)
    store.store(name="train_types", node=TrainSettings)
    store.store(group="warmup", name="types", node=structured(WarmupConfig))
    store.store(group="sft", name="types", node=structured(SFTConfig))
    store.store(group="alarms", name="types", node=structured(AlarmConfig))
    with_files = options("algo")
    for name, config_class in {**{name: algorithm.config for name, algorithm in ALGORITHMS.items()}, "sft": SupervisedConfig}.items():
        store.store(group="algo", name=f"{name}_types", node=structured(config_class, name=name))
        if name not in with_files:
            store.store(group="algo", name=name, node={"defaults": [f"{name}_types", "_self_"], "checkpoint_every": 5, "seed": "${seed}"})


def structured(config_class: type, **constants: str) -> type:
    """A dataclass with the same fields for OmegaConf, which knows no ``Literal``: those become ``str``; :func:`built` checks them.

    ``constants`` are further fields, such as an algorithm's name.
    """
    hints = get_type_hints(config_class)
    columns: list[Any] = [(name, str, field(default=value)) for name, value in constants.items()]
    for f in fields(config_class):
        kind = str if get_origin(hints[f.name]) is Literal else hints[f.name]
        default = MISSING if f.default is NO_DEFAULT else f.default
        columns.append((f.name, kind, field(default=default)))
    return make_dataclass(config_class.__name__, columns)


def built(config_class: type[Config], values: Any) -> Config:
    """The real configuration from an instance of its :func:`structured` form. Raises ``ConfigurationError`` for a value that cannot be."""
    hints = get_type_hints(config_class)
    arguments = {f.name: getattr(values, f.name) for f in fields(config_class)}  # type: ignore[arg-type]
    for name, value in arguments.items():
        if get_origin(hints[name]) is Literal and value not in get_args(hints[name]):
            raise ConfigurationError(f"{name} must be one of {list(get_args(hints[name]))}; got {value!r}.")
    return config_class(**arguments)
