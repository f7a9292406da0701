"""The benchmark of the training step runs; against TRL, whose gradient it must have, where TRL is installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "bench_training_step.py"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--alone"], *([[]] if importlib.util.find_spec("trl") else [])])
def test_it_runs(arguments):
    finished = subprocess.run(
        [sys.executable, SCRIPT, "--quick", *arguments], env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    expected = "as things grow" if arguments else "relative difference of the gradients"
    assert expected in " ".join(finished.stdout.split())
