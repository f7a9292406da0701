"""Hydra configuration groups, found as pkg://searchqa_conf, and the resolvers that they use.

``${shipped_simulator:}`` is the folder of the simulator that comes with the package; ``${data_name:${sets},env}`` what an evaluation is called by its data;
``${file_name:name}`` a name without slashes.
"""

from collections.abc import Sequence

from omegaconf import OmegaConf


def _shipped_simulator() -> str:
    from searchqa_agents.simulator_command import shipped_simulator

    return str(shipped_simulator())


def _data_name(sets: str | Sequence[str] | None, env: str) -> str:
    """``all``, the names of up to three sets, or their number; the environment's where no sets are named."""
    if not sets:
        return env
    names = [sets] if isinstance(sets, str) else list(sets)
    return "-".join(map(str, names)) if len(names) <= 3 else f"{len(names)}-sets"


def _file_name(name: str) -> str:
    return name.replace("/", "-")


OmegaConf.register_new_resolver("shipped_simulator", _shipped_simulator, replace=True)
OmegaConf.register_new_resolver("data_name", _data_name, replace=True)
OmegaConf.register_new_resolver("file_name", _file_name, replace=True)
