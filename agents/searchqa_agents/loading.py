"""From the name of an agent, a checkpoint or a device to the thing itself."""

from __future__ import annotations

import os
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchqa_agents.hub import check_on_hub, hub_revision, is_hub_name
from searchqa_agents.settings import (
    LANGUAGE_MODELS,
    AgentSettings,
    BaselineSettings,
    EnvSettings,
    LMAgentSettings,
    RandomSettings,
    ServerAgentSettings,
    env_arguments,
)
from searchqa_agents.tokenizer_files import ADAPTER_FILE, saved_tokenizer
from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

    from searchqa_agents.baselines.base import Baseline
    from searchqa_agents.language_model import LanguageModel
    from searchqa_agents.policy import Policy
    from searchqa_envs.tokenizers.base import Tokenizer

RANDOM = "random"
"""the ``start`` that is a model of random weights"""


SHIPPED = {"shipped": "world-sft", "shipped/shy": "world-shy", "shipped/deep": "world-deep"}
"""Fine-tuned checkpoints of the world that come with the package, and their folders: the usual one, one that seldom searches, one for up to three hops."""


def shipped_checkpoint(name: str = "shipped") -> Path:
    """A fine-tuned checkpoint of the world that comes with the package; one of :data:`SHIPPED`."""
    path = Path(str(files("searchqa_agents"))) / "checkpoints" / SHIPPED[name]
    if not path.is_dir():
        raise ConfigurationError(f"This installation has no shipped checkpoint ({path} is missing); make one with `searchqa sft`.")
    return path


def checkpoint_path(name: str) -> str | Path:
    """One of :data:`SHIPPED`, a folder, or a hub name, as what ``Policy.load`` takes. A path that looks like a folder but is none is an error."""
    if name in SHIPPED:
        return shipped_checkpoint(name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", ADAPTER_FILE)):
            raise ConfigurationError(
                f"{path} holds no model (config.json is missing). Name a checkpoint, such as runs/<run>/checkpoints/<phase>-<step>."
            )
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigurationError(
            f"There is no folder {name}. A checkpoint is 'shipped' (or 'shipped/shy', 'shipped/deep'), a folder, or a name on the hub such as owner/model."
        )
    return name


def checkpoint_tokenizer(checkpoint: str) -> str | None:
    """What ``build_tokenizer`` takes for the tokenizer that a checkpoint's model was made with; None for random weights, which know none."""
    return None if checkpoint == RANDOM else saved_tokenizer(Path(checkpoint_path(checkpoint)))


def random_policy(random: RandomSettings, tokenizer: Tokenizer, seed: int, *, dtype: torch.dtype, device: str) -> Policy:
    """A policy of a published shape with random weights.

    Raises ``ConfigurationError`` for a shape that cannot be, or whose vocabulary does not cover the tokenizer's.
    """
    from searchqa_agents.model_shapes import random_model, shape_config
    from searchqa_agents.policy import Policy

    config = shape_config(random.like, num_hidden_layers=random.num_hidden_layers, vocab_size=random.vocab_size)
    if config.vocab_size < tokenizer.vocab_size:  # before seconds go into weights
        raise ConfigurationError(
            f"The model must know every id of the tokenizer; random.vocab_size is {config.vocab_size}, tokenizer {tokenizer.name!r} has "
            f"{tokenizer.vocab_size}. Raise it, or leave it null."
        )
    model = random_model(config, seed, pad_id=tokenizer.pad_id, eos_id=tokenizer.eos_id, dtype=dtype, device=device)
    return Policy(model, tokenizer)


def make_venv(env: EnvSettings, num_envs: int, **changed: Any) -> Any:
    """The vector environment of a run; ``changed`` arguments win over the settings.

    Raises ``ConfigurationError`` where the hub does not give out the tokenizer that a name means.
    """
    import gymnasium as gym

    import searchqa_envs  # noqa: F401, registers the ids

    arguments = env_arguments(env, **changed)
    if is_hub_name(arguments.get("tokenizer")):
        check_on_hub(arguments["tokenizer"])
    return gym.make_vec(env.id, num_envs=num_envs, autoreset_mode="DISABLED", **arguments)


def published_set(env: EnvSettings) -> str | None:
    """The name of the published data set that an environment plays; None for the world and for questions of your own."""
    import gymnasium as gym

    import searchqa_envs  # noqa: F401, registers the ids
    from searchqa_envs.datasets import DATASETS

    name = gym.spec(env.id).kwargs.get("dataset")
    return name if name in DATASETS else None


def missing_data(env: EnvSettings) -> str | None:
    """The data set that an environment would download when it is made; None if it needs none or has it on this machine."""
    from searchqa_envs.datasets import locate
    from searchqa_envs.datasets.registry import QUESTION_COLLECTIONS
    from searchqa_envs.errors import DataNotFoundError

    named = getattr(env, "questions", None)
    dataset = named if named in QUESTION_COLLECTIONS else published_set(env)
    if dataset is None:
        return None
    try:
        locate(dataset, env.data_dir, download=False)
    except DataNotFoundError:
        if env.data_dir is not None:  # then nothing is downloaded
            raise
        return dataset
    return None


def check_script(key: str, script: str, env: EnvSettings, instead: str = "env=world") -> None:
    """Find before any data is loaded that a script does not exist, or needs the gold chain that published data sets lack.

    ``instead`` is the way out that the message names first.
    """
    from searchqa_agents.scripted import NEED_CHAIN, SCRIPTS

    if script not in SCRIPTS:
        raise ConfigurationError(f"{key} must be one of {sorted(SCRIPTS)}; got {script!r}.")
    if script in NEED_CHAIN and published_set(env) is not None:
        others = " or ".join(name for name in SCRIPTS if name not in NEED_CHAIN)
        raise ConfigurationError(
            f"{key}={script} follows a question's gold chain, which {env.id} has not. Use {instead}, or {key}={others}."
        )


_PROMPT_ROOM = 4096
"""Tokens that the prompt of an environment takes at most, one to a byte."""
_LONGEST_PART = 2048
"""The longest segment, and the longest observation, of any environment's defaults."""


def configured_baseline(agent: BaselineSettings) -> tuple[Baseline[Any], Any]:
    """The baseline that is meant, and its configuration. Raises ``ConfigurationError`` for a method, option or language model that cannot be."""
    from searchqa_agents.baselines.base import get_baseline

    baseline = get_baseline(agent.method)
    config = baseline.configured(agent.options or {})
    if not isinstance(agent.lm, LANGUAGE_MODELS) or (isinstance(agent.lm, ServerAgentSettings) and agent.lm.protocol == "tools"):
        kind = agent.lm.protocol if isinstance(agent.lm, ServerAgentSettings) else agent.lm.kind
        raise ConfigurationError(
            f"A baseline asks a language model that writes text; agent.lm cannot be {kind!r}. Use agent@agent.lm=lm agent.lm.checkpoint=... or "
            "agent@agent.lm=server agent.lm.url=... agent.lm.protocol=chat."
        )
    return baseline, config


def check_agent(agent: AgentSettings, env: EnvSettings) -> None:
    """Find before any data is loaded that an agent cannot be, as far as its settings tell. Raises ``ConfigurationError``."""
    if isinstance(agent, BaselineSettings):
        configured_baseline(agent)
    elif not isinstance(agent, LANGUAGE_MODELS):
        check_script("agent.kind", agent.kind, env)


def agent_env(agent: AgentSettings, env: EnvSettings) -> dict[str, Any]:
    """The environment's arguments that an agent decides where they are null: the tokenizer of its model; turns and context that a baseline needs.

    A baseline's language model does not see the environment's context, which only has to hold all turns.
    """
    changed: dict[str, Any] = {}
    model = agent.lm if isinstance(agent, BaselineSettings) else agent
    if env.tokenizer is None and isinstance(model, LMAgentSettings):
        changed["tokenizer"] = checkpoint_tokenizer(model.checkpoint)
    if isinstance(agent, BaselineSettings):
        baseline, config = configured_baseline(agent)
        turns = baseline.turns(config, published_set(env) or "") if env.max_turns is None else env.max_turns
        each = (env.max_segment_tokens or _LONGEST_PART) + (env.max_observation_tokens or _LONGEST_PART)
        changed |= {"max_turns": turns} if env.max_turns is None else {}
        changed |= {"max_context_tokens": _PROMPT_ROOM + turns * each} if env.max_context_tokens is None else {}
    return changed


def agent_temperature(agent: AgentSettings) -> float | None:
    """At which an agent's language model is sampled; None for a script without one. A baseline that has a temperature of its own samples at that."""
    if isinstance(agent, BaselineSettings):
        own: float | None = getattr(configured_baseline(agent)[1], "temperature", None)
        if own is not None:
            return own
        agent = agent.lm
    return agent.temperature if isinstance(agent, LANGUAGE_MODELS) else None


def agent_stamp(agent: AgentSettings, tokenizer: Tokenizer, set_name: str = "") -> dict[str, Any]:
    """An agent's settings as plain values; of a baseline with all its options, and how its prompts go out (:func:`~searchqa_agents.writer.sent_as`).

    Options that depend on the question's set are said for ``set_name``. With the commit of a checkpoint from the hub, once it is there.
    """
    stamp = asdict(agent)
    model = agent.lm if isinstance(agent, BaselineSettings) else agent
    revision = hub_revision(model.checkpoint) if isinstance(model, LMAgentSettings) else None
    if revision is not None:
        stamp["revision"] = revision
    if isinstance(agent, BaselineSettings):
        from searchqa_agents.writer import sent_as

        baseline, config = configured_baseline(agent)
        stamp["options"] = asdict(baseline.resolved(config, set_name))
        stamp |= sent_as(tokenizer, agent.lm.protocol if isinstance(agent.lm, ServerAgentSettings) else None)
    return stamp


def build_agent(agent: AgentSettings, venv: Any, device: str, dtype: str = "float32", model: LanguageModel | None = None) -> LanguageModel:
    """The agent for an environment. Raises ``ConfigurationError`` for a kind that is not known or a checkpoint that does not fit.

    ``model`` is the language model of a baseline that is already there, ``agent.writer.model`` of one that this made for another environment.
    """
    from searchqa_agents.scripted import ScriptedAgent

    base = venv.unwrapped
    if isinstance(agent, BaselineSettings):
        from searchqa_agents.writer import Writer

        baseline, config = configured_baseline(agent)
        assert isinstance(agent.lm, LANGUAGE_MODELS)
        asked = build_agent(agent.lm, venv, device, dtype) if model is None else model
        writer = Writer(asked, base.tokenizer, temperature=agent.lm.temperature)
        return ScriptedAgent.for_env(baseline.make(config), venv, writer)
    if isinstance(agent, LMAgentSettings):
        from rich.console import Console

        with Console(stderr=True).status("Loading torch ..."):  # shown in a terminal, for some seconds
            from searchqa_agents.policy import Policy

        numbers = chosen_dtype(measuring_dtype(dtype, device, agent.checkpoint), measuring=True)
        return Policy.load(checkpoint_path(agent.checkpoint), base.tokenizer, dtype=numbers, device=chosen_device(device))
    if isinstance(agent, ServerAgentSettings):
        from searchqa_agents.completion_server import CompletionServerLM

        return CompletionServerLM(
            agent.url,
            base.tokenizer,
            base.dialect,
            protocol=agent.protocol,
            model=agent.model,
            logprobs=agent.logprobs,
            concurrency=agent.concurrency,
            timeout=agent.timeout,
            retries=agent.retries,
            deadline=agent.deadline,
            api_key=os.environ.get("SEARCHQA_SERVER_KEY"),
        )
    return ScriptedAgent.for_env(agent.kind, venv)


def chosen_device(name: str) -> str:
    """``auto`` is the first that there is of cuda, mps, cpu. Raises ``ConfigurationError`` for a device that PyTorch does not know or find."""
    import torch

    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:  # AssertionError: a build without CUDA
            raise ConfigurationError(
                f"device={name} is not to be had here ({str(error).splitlines()[0]}); device=auto takes the first there is of cuda, mps and cpu."
            ) from error
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def chosen_dtype(name: str, *, measuring: bool = False) -> torch.dtype:
    """``float32`` or ``bfloat16``; for a model that is only measured, ``float64`` too. Raises ``ConfigurationError`` for any other."""
    if name not in ("float32", "bfloat16") and not (measuring and name == "float64"):
        known = "float32, bfloat16, float64 or auto" if measuring else "float32 or bfloat16"
        raise ConfigurationError(f"dtype must be {known}; got {name!r}.")
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


SMALL_WEIGHTS = 200 << 20
"""Bytes of weight files up to which a model is measured in float64 on a CPU."""


def measuring_dtype(dtype: str, device: str, checkpoint: str) -> str:
    """The type of numbers that ``dtype=auto`` stands for where a model is measured.

    On a CPU a small model computes in float64, so that rounding, which depends on the batch, does not decide a draw: in float32 it does so about once in ten
    thousand tokens, where the model is as unsure as the world's is of real questions. Larger models, and those on other devices, compute in float32.
    """
    if dtype != "auto":
        return dtype
    folder = checkpoint_path(checkpoint)
    if not isinstance(folder, Path) or (folder / "adapter_config.json").is_file() or not device.startswith(("auto", "cpu")):
        return "float32"
    if chosen_device(device) != "cpu":
        return "float32"
    return "float64" if sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= SMALL_WEIGHTS else "float32"
