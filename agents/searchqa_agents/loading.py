"""From the name of an agent, a checkpoint or a device to the thing itself."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchqa_agents.settings import AgentSettings, LMAgentSettings
from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    from searchqa_agents.language_model import LanguageModel


def shipped_checkpoint() -> Path:
    """The fine-tuned checkpoint of the world that comes with the package."""
    path = Path(str(files("searchqa_agents"))) / "checkpoints" / "world-sft"
    if not path.is_dir():
        raise ConfigurationError(f"This installation has no shipped checkpoint ({path} is missing); make one with `searchqa sft`.")
    return path


def checkpoint_path(name: str) -> str | Path:
    """``shipped``, a folder, or a hub name, as what ``Policy.load`` takes. A path that looks like a folder but is none is an error."""
    if name == "shipped":
        return shipped_checkpoint()
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigurationError(
                f"{path} holds no model (config.json is missing). Name a checkpoint, such as runs/<run>/checkpoints/<phase>-<step>."
            )
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigurationError(
            f"There is no folder {name}. A checkpoint is 'shipped', a folder, or a name on the hub such as owner/model."
        )
    return name


def agent_tokenizer(agent: AgentSettings) -> str | None:
    """The tokenizer that a language model was made with, where the configuration names none; None leaves the environment's default."""
    if not isinstance(agent, LMAgentSettings):
        return None
    path = checkpoint_path(agent.checkpoint)
    record = Path(path) / "searchqa_tokenizer.json"
    if record.is_file():
        name = str(json.loads(record.read_text(encoding="utf-8"))["name"])
        return next((own for own in ("world", "byte") if name == own or name.startswith(f"{own}-")), name)
    return str(path)


def build_agent(agent: AgentSettings, venv: Any, device: str) -> LanguageModel:
    """The agent for an environment. Raises ``ConfigurationError`` for a kind that is not known or does not fit the data set."""
    from searchqa_agents.scripted import SCRIPTS, ScriptedAgent

    base = venv.unwrapped
    if isinstance(agent, LMAgentSettings):
        from rich.console import Console

        with Console(stderr=True).status("Loading torch ..."):  # shown in a terminal, for some seconds
            from searchqa_agents.policy import Policy

        return Policy.load(checkpoint_path(agent.checkpoint), base.tokenizer, device=chosen_device(device))
    if agent.kind not in SCRIPTS:
        raise ConfigurationError(f"agent.kind must be one of {[*SCRIPTS, 'lm']}; got {agent.kind!r}.")
    return ScriptedAgent.for_env(agent.kind, venv)


def chosen_device(name: str) -> str:
    """``auto`` is the first that there is of cuda, mps, cpu."""
    if name != "auto":
        return name
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
