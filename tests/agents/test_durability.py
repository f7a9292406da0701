"""What a training run survives: kill -9 at any moment, a full disk, a loss that is not a number. And what resuming gives: the same bytes."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from searchqa_agents.cli import main
from searchqa_agents.runs import RunFolder, list_checkpoints, read_metrics

STEPS = 5
SMOKE = (
    *("train", "recipe=smoke", "threads=1", "env.num_worlds=8", "start=shipped", "env.max_turns=4", "env.max_segment_tokens=16"),
    *(f"algo.steps={STEPS}", "algo.questions_per_step=4", "algo.group_size=3", "algo.num_worlds=2", "evaluation.questions=4"),
)
ALGORITHMS = {"grpo": ["algo=grpo"], "ppo": ["algo=ppo", "algo.num_minibatches=2", "algo.kl_coef=0.01"]}

PROGRAM = """
import os, sys
{before}
from searchqa_agents.cli import main
sys.exit(main(sys.argv[1:]))
"""
SLOW_DISK = """
import time
fsync = os.fsync
def slow(descriptor):
    time.sleep(0.03)
    fsync(descriptor)
os.fsync = slow
"""
KILLED_AT_WRITE = """
import signal
fsync, calls = os.fsync, 0
def killing(descriptor):
    global calls
    calls += 1
    if calls == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = killing
"""


def start(words: list[str], before: str = "") -> subprocess.Popen[str]:
    program = PROGRAM.format(before=before)
    return subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def metrics_of(run: Path) -> list[dict[str, object]]:
    """All lines, times apart."""
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "search/")) and k != "seconds"} for line in read_metrics(run)]


def assert_same_end(run: Path, whole: Path) -> None:
    """The same metrics, weights and trainer's state (optimisers, critic, reference, random generators) to the last bit."""
    assert metrics_of(run) == metrics_of(whole)
    ours, theirs = (one / "checkpoints" / f"train-{STEPS:06d}" for one in (run, whole))
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    states = [torch.load(folder / "trainer.pt", weights_only=True) for folder in (ours, theirs)]
    assert_equal(states[0], states[1])


def assert_equal(a: object, b: object, where: str = "state") -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor), where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict), where
        assert a.keys() == b.keys(), where
        for key in a:
            # "random" is of the process, which has run other things before; "fused" is torch's own note on how it computes
            if key not in ("random", "fused"):
                assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple)), where
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_equal(one, other, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run of each algorithm."""
    runs = {}
    for name, words in ALGORITHMS.items():
        runs[name] = tmp_path_factory.mktemp("whole") / name
        assert main([*SMOKE, *words, f"run_dir={runs[name]}"]) == 0
    return runs


def stop_at_line(monkeypatch: pytest.MonkeyPatch, words: list[str], line: int) -> None:
    """Run until a line of metrics would be written, and no further."""
    original, count = RunFolder.log, 0

    def log(self: RunFolder, phase: str, step: int, values: dict[str, float]) -> None:
        nonlocal count
        count += 1
        if count > line:
            raise KeyboardInterrupt
        original(self, phase, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", log)
        assert main(words) == 130


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_resumed_run_ends_with_the_same_bytes(
    algorithm: str, whole_run: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The global generators are disturbed in between: nothing may depend on them."""
    run = tmp_path / "run"
    stop_at_line(monkeypatch, [*SMOKE, *ALGORITHMS[algorithm], f"run_dir={run}"], 3)
    torch.manual_seed(99)
    assert list_checkpoints(run)[-1].step == 2
    assert main(["train", f"resume={run}"]) == 0
    assert_same_end(run, whole_run[algorithm])


def kill_when(process: subprocess.Popen[str], condition: object, limit: float = 120.0) -> bool:
    """SIGKILL a process once ``condition()``; False if it ended before."""
    began = time.monotonic()
    while time.monotonic() - began < limit:
        if process.poll() is not None:
            return False
        if condition():  # type: ignore[operator]
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.002)
    process.kill()
    process.communicate()
    raise AssertionError("the moment to kill at never came")


def check_what_is_left(run: Path) -> None:
    """Every checkpoint of a killed run is complete, and at most the steps since the last one are lost."""
    checkpoints = [checkpoint for checkpoint in list_checkpoints(run) if checkpoint.phase == "train"]
    for checkpoint in checkpoints:
        assert torch.load(checkpoint.path / "trainer.pt", weights_only=True)["steps_done"] == checkpoint.step
    steps = [line["step"] for line in read_metrics(run) if line["phase"] == "train"] or [0]
    assert max(steps) - (checkpoints[-1].step if checkpoints else 0) <= 1  # a checkpoint every step


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_to_the_same_end(whole_run: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start([*SMOKE, f"run_dir={run}"], SLOW_DISK)
    half_written = run / "checkpoints" / ".partial-train-000003" / "model.safetensors"
    assert kill_when(process, half_written.exists)
    assert half_written.exists()
    check_what_is_left(run)
    assert main(["train", f"resume={run}"]) == 0
    assert not half_written.parent.exists()
    assert_same_end(run, whole_run["grpo"])


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_killed_again_and_again_ends_the_same(algorithm: str, whole_run: dict[str, Path], tmp_path: Path) -> None:
    """Every start is killed at another of its writes to disk, until one gets through."""
    run, rng, kills = tmp_path / "run", random.Random(0), 0
    words = [*SMOKE, *ALGORITHMS[algorithm], f"run_dir={run}"]
    for _ in range(20):
        process = start(words, KILLED_AT_WRITE.format(number=rng.randint(2, 40)))
        _, said = process.communicate(timeout=300)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said
        kills += 1
        check_what_is_left(run)
    assert kills >= 3
    assert main([*words]) == 0
    assert_same_end(run, whole_run[algorithm])


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        "metrics.jsonl",
        "before.json",
        "checkpoints/.partial-train-000001",
        "checkpoints/.partial-train-000002/trainer.pt",
        "checkpoints/.partial-train-000002/checkpoint.json",
        "checkpoints/train-000002",
        "checkpoints/train-000005",
        "after.json",
        "trajectories/after.jsonl.gz",
        "summary.json",
        "learning_curve.png",
    ],
)
def test_a_run_killed_at_each_of_its_files_ends_the_same(moment: str, whole_run: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert kill_when(start([*SMOKE, f"run_dir={run}"], SLOW_DISK), (run / moment).exists)
    check_what_is_left(run)
    assert main(["train", f"resume={run}"]) == 0
    assert_same_end(run, whole_run["grpo"])
    assert (
        json.loads((run / "summary.json").read_text())["measures"]
        == json.loads((whole_run["grpo"] / "summary.json").read_text())["measures"]
    )


@contextlib.contextmanager
def longest_file(bytes_: int) -> Iterator[None]:
    """No file of this process may become longer: what a full disk does, without filling one."""
    resource = pytest.importorskip("resource", reason="resource limits are a thing of POSIX")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("bytes_", [pytest.param(1_000_000, marks=pytest.mark.slow), 2_500_000])
def test_a_full_disk_stops_with_its_cause_and_the_way_on(
    bytes_: int, whole_run: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model (1.9 MB), or only the trainer's state (5.7 MB), cannot be written any more."""
    run = tmp_path / "run"
    stop_at_line(monkeypatch, [*SMOKE, f"run_dir={run}"], 3)
    kept = list_checkpoints(run)[-1]
    capsys.readouterr()
    with longest_file(bytes_):
        assert main(["train", f"resume={run}"]) == 1
    said = capsys.readouterr().err
    [message] = [line for line in said.splitlines() if line.startswith("searchqa: ")]
    assert "File too large" in message
    assert f"The last good checkpoint is {kept.path}" in message
    assert f"`searchqa train resume={run}` goes on from it" in message
    assert "Traceback" not in said
    assert list_checkpoints(run)[-1] == kept
    assert main(["train", f"resume={run}"]) == 0
    assert_same_end(run, whole_run["grpo"])


DIVERGES = '''
from dataclasses import dataclass
from searchqa_agents.algorithm import Algorithm, register
from searchqa_agents.algorithms import grpo

@dataclass
class DivergingConfig(grpo.GRPOConfig):
    """Its loss is not a number from the third step on, at a high learning rate."""

def loss(stats, part, totals, config):
    terms = grpo.loss(stats, part, totals, config)
    factor = float("nan") if totals.step >= 2 and config.learning_rate > 1e-4 else 0.0
    return terms._replace(loss=terms.loss + factor * stats.logprob.sum())

register(Algorithm("diverging", DivergingConfig, grpo.advantages, loss, silent_without_advantage=False))
'''


def test_a_loss_that_is_no_number_stops_and_a_lower_learning_rate_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from searchqa_agents.algorithm import ALGORITHMS as REGISTERED

    monkeypatch.setattr("searchqa_agents.algorithm.ALGORITHMS", dict(REGISTERED))
    (tmp_path / "diverging.py").write_text(DIVERGES)
    run = tmp_path / "run"
    assert main([*SMOKE, f"plugins=[{tmp_path / 'diverging.py'}]", "algo=diverging", f"run_dir={run}"]) == 1
    error = capsys.readouterr().err
    assert "diverged in step 3: the loss is nan" in error
    last = list_checkpoints(run)[-1]
    assert last.step == 2
    assert f"The last good checkpoint is {last.path}: `searchqa train resume={run} algo.learning_rate=0.00025` goes on" in error
    assert main(["train", f"resume={run}", "algo.learning_rate=1e-5"]) == 0
    rates = [line["charts/learning_rate"] for line in read_metrics(run) if line["phase"] == "train"]
    assert len(rates) == STEPS
    assert rates[1] > 1e-4 > rates[2]


def test_weights_that_are_not_finite_never_become_a_checkpoint(tmp_path: Path) -> None:
    from searchqa_agents.optimisation import TrainingDivergedError
    from searchqa_agents.training_run import check_finite

    check_finite({"a": torch.zeros(3)}, 7)
    with pytest.raises(TrainingDivergedError, match="after step 7, 1 of 2 weights are not finite, first b"):
        check_finite({"a": torch.zeros(3), "b": torch.tensor([1.0, float("inf")])}, 7)


def test_more_steps_or_other_settings_on_the_line_of_a_finished_run_take_it_further(
    whole_run: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [*SMOKE, "algo.steps=1", f"run_dir={run}"]
    assert main(words) == 0
    summary = (run / "summary.json").read_text()
    assert main(words) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert (run / "summary.json").read_text() == summary
    assert main(["train", f"resume={run}", "algo.steps=2"]) == 0
    assert [line["step"] for line in read_metrics(run) if line["phase"] == "train"] == [1, 2]
    assert main([*SMOKE, "algo=ppo", f"run_dir={run}"]) == 1
    assert "another algo" in capsys.readouterr().err
    assert main(["train", f"resume={run}", "algo.steps=3", "algo.kl_coef=0.1"]) == 1
    assert "begun with algo.kl_coef=0" in capsys.readouterr().err
