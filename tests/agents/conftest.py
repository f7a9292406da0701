"""Episodes made by hand, for tests of batches and algorithms; and a real server."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from searchqa_agents.trajectory import Trajectory, TurnSpan


def made_episode(prompt, *runs, reward=0.0, logprobs=None, **changes):
    """A trajectory from a prompt and alternating runs of ids: what the policy wrote, what the environment replied, ...

    ``logprobs`` are those of the policy's tokens, default log 0.5 each.
    """
    ids, mask, turns = list(prompt), [0] * len(prompt), []
    for number, run in enumerate(runs):
        if number % 2 == 0:
            turns.append([len(ids), len(ids) + len(run), len(ids) + len(run)])
        else:
            turns[-1][2] += len(run)
        ids += run
        mask += [1 - number % 2] * len(run)
    loss_mask = np.array(mask, dtype=np.int8)
    of_tokens = np.zeros(len(ids), dtype=np.float32)
    of_tokens[loss_mask == 1] = np.log(0.5) if logprobs is None else logprobs
    fields = {
        "token_ids": np.array(ids, dtype=np.int32),
        "loss_mask": loss_mask,
        "logprobs": of_tokens,
        "turns": tuple(TurnSpan(*turn, "search", "", "", "") for turn in turns),
        "prompt": "",
        "reward": reward,
        "question_id": "q",
        "question": "?",
        "golden_answers": (),
        "answer": None,
        "terminated": True,
        "truncated": False,
    }
    return Trajectory(**{**fields, **changes})


def made_random_episodes(count, vocab_size, seed=0, longest=14):
    """Ragged episodes of random ids, each of one to three turns."""
    rng = np.random.default_rng(seed)

    def run(least=1):
        return rng.integers(3, vocab_size, rng.integers(least, longest)).tolist()

    episodes = []
    for _ in range(count):
        prompt, turns = run(2), int(rng.integers(1, 4))
        runs = [run() for _ in range(2 * turns - int(rng.integers(0, 2)))]
        tokens = sum(len(one) for one in runs[::2])
        episodes.append(
            made_episode(prompt, *runs, reward=float(rng.choice([0.0, 0.5, 1.0])), logprobs=rng.normal(-3, 0.5, tokens).astype(np.float32))
        )
    return episodes


@pytest.fixture(scope="session")
def episode():
    """See :func:`made_episode`."""
    return made_episode


@pytest.fixture(scope="session")
def random_episodes():
    """See :func:`made_random_episodes`."""
    return made_random_episodes


@pytest.fixture(scope="session")
def scripted_lm():
    """The module ``scripted_lm.py``: a language model that says what a function of the prompt says, in this process and behind HTTP."""
    spec = importlib.util.spec_from_file_location("scripted_lm", Path(__file__).with_name("scripted_lm.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server(model_folder, tmp_path_factory):
    """The address of ``transformers serve`` on the module's ``model_folder``; it ends with the module's tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "serve.txt"
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(model_folder)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"],
            stdout=output, stderr=output, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        else:
            pytest.fail(log.read_text())
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
