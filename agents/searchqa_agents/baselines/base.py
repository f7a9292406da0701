"""What a baseline is, and the baselines by name.

A baseline's module has them in a tuple ``BASELINES`` and is imported when one of them is asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, Generic, TypeVar

from searchqa_agents.scripted import Script
from searchqa_envs.errors import ConfigurationError

Config = TypeVar("Config")


@dataclass(frozen=True)
class Baseline(Generic[Config]):
    """One baseline: ``make`` gives its script from its configuration, ``turns`` the segments that it needs of the environment, the answer included."""

    name: str
    summary: str
    config: type[Config]
    """a frozen dataclass whose defaults are the published values"""
    make: Callable[[Config], Script]
    turns: Callable[[Config, str], int]
    """of a configuration and the name of the question's set"""
    resolved: Callable[[Config, str], Config] = lambda config, set_name: config
    """the configuration with what it leaves to the question's set said, for stamps: the same play has the same one"""

    def configured(self, options: Mapping[str, Any]) -> Config:
        """The configuration with ``options`` in place of defaults.

        Raises
        ------
        ConfigurationError
            For an option that the baseline does not know, or a value that cannot be.
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        from searchqa_agents.settings import built, structured

        known = [field.name for field in fields(self.config)]  # type: ignore[arg-type]
        for name in options:
            if name not in known:
                raise ConfigurationError(
                    f"agent.options.{name} is not an option of baseline {self.name}.{_meant(str(name), known)} It has {', '.join(known) or 'none'}."
                )
        try:
            values = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(structured(self.config)), dict(options)))
        except OmegaConfBaseException as error:
            raise ConfigurationError(f"agent.options.{error.full_key} cannot be: {str(error).partition(chr(10))[0]}.") from error
        try:
            return built(self.config, values)
        except ConfigurationError as error:
            raise ConfigurationError(f"agent.options: {error}") from error


BASELINES = {
    "direct": "searchqa_agents.baselines.direct",
    "cot": "searchqa_agents.baselines.direct",
    "rag": "searchqa_agents.baselines.direct",
    "ircot": "searchqa_agents.baselines.ircot",
    "ircot_flashrag": "searchqa_agents.baselines.ircot",
    "search_o1": "searchqa_agents.baselines.search_o1",
    "ra_agent": "searchqa_agents.baselines.ra_agent",
}
"""The module of each baseline."""


def get_baseline(name: str) -> Baseline[Any]:
    """The baseline called ``name``: one of ``BASELINES``, or one of your own as ``module:name``.

    Raises
    ------
    ConfigurationError
        If there is none.
    """
    module_name, colon, own = name.partition(":")
    if not colon:
        if name not in BASELINES:
            raise ConfigurationError(
                f"agent.method must be one of {', '.join(BASELINES)}, or module:name for one of your own; got {name!r}.{_meant(name, list(BASELINES))}"
            )
        module_name, own = BASELINES[name], name
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ConfigurationError(f"agent.method={name}: there is no module {module_name}. It must be one that Python finds.") from error
    for baseline in getattr(module, "BASELINES", ()):
        if isinstance(baseline, Baseline) and baseline.name == own:
            return baseline
    raise ConfigurationError(f"agent.method={name}: {module_name} has no baseline {own!r} in its tuple BASELINES.")


def _meant(given: str, known: list[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""
