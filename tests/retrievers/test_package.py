"""The package as a whole: what it exports and what importing it loads."""

import subprocess
import sys

import pytest

import searchqa_retrievers


def test_all_public_names_exist():
    for name in searchqa_retrievers.__all__:
        assert getattr(searchqa_retrievers, name) is not None
    assert set(searchqa_retrievers.__all__) <= set(dir(searchqa_retrievers))
    with pytest.raises(AttributeError, match="Nothing"):
        _ = searchqa_retrievers.Nothing


def test_import_loads_only_numpy_and_the_standard_library():
    code = (
        "import sys, searchqa_retrievers\n"
        "from searchqa_retrievers import Cached, Corpus, NoRetriever, build_retriever, from_function\n"
        "heavy = {'bm25s', 'numba', 'Stemmer', 'filelock', 'platformdirs', 'rich', 'torch', 'gymnasium', 'searchqa_envs', 'searchqa_agents'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
