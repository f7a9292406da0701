"""Without the engine, an adapter says what to install, and the rest of the package works."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from searchqa_agents.integrations import EngineNotFoundError


@pytest.mark.parametrize(
    ("adapter", "engine", "requirement"),
    [
        ("verl", "verl.experimental.agent_loop.agent_loop", "verl >=0.9,<0.10"),
        ("openrlhf", "openrlhf.utils.agent", "openrlhf >=0.11,<0.12"),
    ],
)
def test_an_absent_engine_is_a_typed_error_that_names_its_environment(adapter, engine, requirement, monkeypatch):
    monkeypatch.setitem(sys.modules, engine, None)  # as if it were not installed, in either environment
    monkeypatch.delitem(sys.modules, f"searchqa_agents.integrations.{adapter}", raising=False)
    with pytest.raises(EngineNotFoundError) as caught:
        import_module(f"searchqa_agents.integrations.{adapter}")
    assert requirement in str(caught.value)
    assert "scripts/engines_environment.sh" in str(caught.value)
    assert f"pip install 'searchqa-gym[{adapter}]'" in str(caught.value)
    assert isinstance(caught.value, ImportError)
    import_module("searchqa_agents.integrations.rows")
