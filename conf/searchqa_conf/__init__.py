"""Hydra configuration groups, found as pkg://searchqa_conf. In them ``${shipped_simulator:}`` is the folder of the simulator that comes with the package."""

from omegaconf import OmegaConf


def _shipped_simulator() -> str:
    from searchqa_agents.simulator_command import shipped_simulator

    return str(shipped_simulator())


OmegaConf.register_new_resolver("shipped_simulator", _shipped_simulator, replace=True)
