"""Adapters to other people's training engines, one file each. None is imported before it is used, and none is needed by the rest."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from searchqa_envs.errors import SearchQAError


class EngineNotFoundError(SearchQAError, ImportError):
    """An engine that an adapter is for is not installed, or does not import."""


def engine_module(name: str, extra: str, requirement: str) -> ModuleType:
    """The module ``name`` of an engine.

    Raises
    ------
    EngineNotFoundError
        If it does not import; the message says what to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise EngineNotFoundError(
            f"This adapter needs {requirement}, and `import {name}` failed: {error}. Install it: pip install 'searchqa-gym[{extra}]'"
        ) from error
