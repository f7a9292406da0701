"""Files and modules of your own that register algorithms: ``searchqa train plugins=[my_algorithm.py] algo=mine``.

They are imported before Hydra composes the configuration, which must know an algorithm's settings, and again in each process of a sweep.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from searchqa_envs.errors import ConfigurationError, SearchQAError


class PluginError(SearchQAError):
    """A plugin cannot be imported, or registers a name that is taken."""


def plugins_on(line: Sequence[str]) -> list[str]:
    """The value of ``plugins=[...]`` on a command line; the last one counts."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = [word for word in line if word.lstrip("+").partition("=")[0] == "plugins"]
    if not words:
        return []
    value = OverridesParser.create().parse_override(words[-1]).value()
    if not isinstance(value, list):
        raise ConfigurationError(f"plugins must be a list, such as plugins=[my_algorithm.py]; got plugins={value}.")
    return [str(item) for item in value]


def register_with_plugins(line: Sequence[str]) -> None:
    """Make the types of ``train`` known to Hydra, and the settings of every algorithm, those of the line's plugins among them; loads torch."""
    from searchqa_agents.settings import register_training

    register_training()
    plugins = plugins_on(line)
    if plugins:
        load_plugins(plugins)
        register_training()  # their settings too


def load_plugins(plugins: Sequence[str]) -> None:
    """Import files (``my_algorithm.py``) and modules (``my_package.my_algorithm``), each once.

    Raises
    ------
    PluginError
        If there is no such file or module, if it raises, or if it registers the name of an algorithm that is there already.
    """
    import searchqa_agents.algorithms  # noqa: F401, registers our own
    from searchqa_agents.algorithm import ALGORITHMS
    from searchqa_agents.config_help import options

    for plugin in plugins:
        before = dict(ALGORITHMS)
        if plugin.endswith(".py") or "/" in plugin:
            _import_file(plugin)
        else:
            _import_module(plugin)
        taken = [name for name, algorithm in before.items() if ALGORITHMS.get(name) is not algorithm]
        taken += [name for name in options("algo") if name in ALGORITHMS and name not in before]  # settings of another algorithm, or sft
        if taken:
            ALGORITHMS.clear()
            ALGORITHMS.update(before)
            raise PluginError(
                f"{plugin} registers the name {taken[0]!r}, which another algorithm has. Choose another name in its register(...)."
            )


def _import_file(plugin: str) -> None:
    path = Path(plugin).expanduser().resolve()
    if not path.is_file():
        raise PluginError(f"There is no plugin {plugin} ({path} is no file). Paths are relative to the folder that you are in.")
    name = f"searchqa_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"The plugin {plugin} is no Python file; give a .py file or the name of a module.")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while they are made
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PluginError(f"The plugin {plugin} cannot be imported: {_reason(error)} (--debug shows where.)") from error


def _import_module(plugin: str) -> None:
    try:
        import_module(plugin)
    except ModuleNotFoundError as error:
        if error.name is None or not plugin.startswith(error.name):
            raise PluginError(f"The plugin {plugin} cannot be imported: {_reason(error)} (--debug shows where.)") from error
        raise PluginError(f"There is no module {plugin}. Give a .py file or the name of a module that Python finds.") from error
    except Exception as error:
        raise PluginError(f"The plugin {plugin} cannot be imported: {_reason(error)} (--debug shows where.)") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(":. ") + "."
