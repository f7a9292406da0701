"""Which package may import which, and what stays unloaded until it is used."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def loaded(code: str, *names: str) -> set[str]:
    """Which of the modules a fresh Python has loaded after the code."""
    script = f"{code}\nimport sys\nprint('loaded:', *sorted({set(names)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


AN_EPISODE = """
import gymnasium, searchqa_envs
env = gymnasium.make("SearchQA-World-v0")
env.reset(seed=0)
encode = env.unwrapped.tokenizer.encode
for text in ("<search> Who </search>", "nothing", "<answer> nobody </answer>"):
    *_, terminated, truncated, info = env.step(encode(text))
assert terminated
"""


def test_an_episode_loads_no_learning_library() -> None:
    assert loaded(AN_EPISODE, "torch", "transformers", "datasets", "searchqa_agents", "searchqa_conf", "hydra", "omegaconf") == set()


def test_importing_the_environments_is_light() -> None:
    heavy = ("numba", "bm25s", "pyarrow", "huggingface_hub", "rich", "Stemmer", "filelock", "platformdirs", "tokenizers")
    assert loaded("import searchqa_envs", *heavy, "torch", "transformers", "datasets", "searchqa_agents", "hydra") == set()


def test_importing_the_retrievers_is_light_and_needs_no_environment() -> None:
    heavy = ("bm25s", "numba", "faiss", "torch", "Stemmer", "filelock", "platformdirs", "rich", "transformers")
    assert loaded("import searchqa_retrievers", *heavy, "gymnasium", "searchqa_envs", "searchqa_agents") == set()


def test_the_check_itself_sees_what_is_loaded() -> None:
    assert loaded("import gymnasium", "gymnasium", "searchqa_envs") == {"gymnasium"}


def imported(package: str) -> Iterator[tuple[str, str]]:
    """File and top-level name of each import statement, at the top of a module or within a function."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    for folder in spec.submodule_search_locations:
        for path in Path(folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from ((path.name, alias.name.partition(".")[0]) for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    yield path.name, node.module.partition(".")[0]


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("searchqa_retrievers", {"searchqa_envs", "searchqa_agents", "searchqa_conf", "gymnasium", "hydra"}),
        ("searchqa_envs", {"searchqa_agents", "searchqa_conf", "torch", "datasets", "hydra"}),
    ],
)
def test_no_module_imports_what_stands_above_it(package: str, never: set[str]) -> None:
    found = set(imported(package))
    assert len(found) > 10
    assert {(file, name) for file, name in found if name in never} == set()
