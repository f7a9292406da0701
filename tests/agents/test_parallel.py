"""Several processes do what one does: the same trajectories, gradients and weights, by DDP and by FSDP2, through torchrun on the CPU."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from searchqa_agents.cli import main
from searchqa_agents.parallel import Parallel, processes
from searchqa_agents.runs import read_metrics
from searchqa_envs.errors import ConfigurationError

WORKER = Path(__file__).with_name("parallel_worker.py")
_spec = importlib.util.spec_from_file_location("parallel_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)
EACH = pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind in worker.KINDS for case in worker.CASES])
EACH_RUN = pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind in worker.KINDS for case in worker.RUNS])


def torchrun(*words, processes=2, timeout=150):
    """Run a script under torchrun; a run that the operating system aborted is started once more (seen on a loaded machine)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    if done.returncode and "SIGABRT" in done.stderr:
        done = subprocess.run(line, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    return done


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process finds by case, and what each of two finds; computed once, whatever the number of test processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "two-processes"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "one.pt").exists():
            one = {case: {"update": worker.one_update(case, Parallel())} for case in worker.CASES}
            for case in worker.RUNS:
                one[case]["run"] = worker.two_steps(case, Parallel())
            torch.save({case: one[case]["run"]["states"][1] for case in worker.RUNS}, folder / "states.pt")
            done = torchrun(WORKER, "compare", folder)
            assert done.returncode == 0, done.stderr
            torch.save(one, folder / "one.pt")
    return [torch.load(folder / name, weights_only=False) for name in ("one.pt", "process0.pt", "process1.pt")]


@EACH
def test_the_gradient_is_that_of_one_process_on_the_same_batch(results, kind, case):
    one, *two = results
    for found in two:
        assert found[kind][case]["update"]["gradients"].keys() == one[case]["update"]["gradients"].keys()
        assert any(expected.any() for expected in one[case]["update"]["gradients"].values())
        for name, expected in one[case]["update"]["gradients"].items():
            assert relative(found[kind][case]["update"]["gradients"][name], expected) < 1e-5, name
        for name, expected in one[case]["update"]["metrics"].items():
            assert found[kind][case]["update"]["metrics"][name] == pytest.approx(expected, rel=1e-5, abs=1e-6), name


@EACH
def test_annotations_are_those_of_one_process(results, kind, case):
    one, *two = results
    for name in ("values", "reference"):
        expected = one[case]["update"][name]
        for found in two:
            own = found[kind][case]["update"][name]
            assert own is expected is None or torch.allclose(own, expected, atol=1e-5)


@EACH_RUN
def test_trajectories_and_two_steps_of_training_are_those_of_one_process(results, kind, case):
    one, *two = results
    expected = one[case]["run"]
    assert any(len({t["reward"] for t in played}) > 1 for played in expected["trajectories"])  # else nothing would be trained
    assert relative(expected["weights"], worker.weights(worker.policy_of(case))) > 1e-4
    for found in two:
        own = found[kind][case]["run"]
        for step, other in zip(expected["trajectories"], own["trajectories"], strict=True):
            assert [t["token_ids"] for t in step] == [t["token_ids"] for t in other]
            assert [t["question_id"] for t in step] == [t["question_id"] for t in other]
        assert relative(own["weights"], expected["weights"]) < 1e-5
        assert own["metrics"][1]["charts/episodic_return"] == expected["metrics"][1]["charts/episodic_return"]


@EACH_RUN
def test_weights_are_exactly_equal_in_all_processes(results, kind, case):
    _, first, second = results
    assert torch.equal(first[kind][case]["run"]["weights"], second[kind][case]["run"]["weights"])
    assert torch.equal(first[kind][case]["continued"], second[kind][case]["continued"])


@EACH_RUN
def test_a_checkpoint_goes_on_in_another_number_of_processes(results, kind, case):
    one, first, second = results
    expected = one[case]["run"]
    assert relative(first[kind][case]["continued"], expected["weights"]) < 1e-5  # of one process, in two
    state = first[kind][case]["run"]["states"][1]
    policy = worker.policy_of(case)
    policy.load_weights(state["model"])
    assert torch.equal(worker.weights(policy), first[kind][case]["run"]["states"]["policy-1"])
    assert not any(tensor.numel() for tensor in second[kind][case]["run"]["states"][1]["model"].values())  # one copy is enough
    assert relative(worker.two_steps(case, Parallel(), state)["weights"], expected["weights"]) < 1e-5  # of two processes, in one


@pytest.mark.parametrize("kind", worker.KINDS)
def test_a_loss_that_is_not_a_number_in_one_process_stops_all_before_any_weight_changes(results, kind):
    for found in results[1:]:
        assert "diverged" in found[kind]["diverged"]["said"]
        assert torch.equal(found[kind]["diverged"]["weights"], worker.weights(worker.make_policy()))


def test_plain_data_is_shared_and_gathered(results):
    for found in results[1:]:
        assert found["shares"] == list(range(7))
        assert found["sum"] == {"a": 2.0, "0": 2.0, "1": 2.0}


def test_each_process_gets_as_many_micro_batches_and_together_every_sequence_once(results):
    for size, everyones in enumerate(results[1]["micro_batches"]):
        first, second = everyones
        assert len(first) == len(second)
        assert sorted(index for micro_batches in everyones for part in micro_batches for index in part) == list(range(size))
        sizes = [sum(map(len, micro_batches)) for micro_batches in everyones]
        assert max(sizes) - min(sizes) <= 1


def test_one_process_alone_is_its_own_share():
    with processes() as parallel:
        assert type(parallel) is Parallel
        assert parallel.main
        assert parallel.share([1, 2, 3]) == parallel.gather([1, 2, 3]) == [1, 2, 3]


@pytest.mark.parametrize(("kind", "words"), [("ddp", "torchrun"), ("fsdp2", "torchrun"), ("horovod", "'auto', 'ddp', 'fsdp2'")])
def test_a_form_for_several_processes_needs_torchrun(kind, words):
    with pytest.raises(ConfigurationError, match=words), processes(kind):
        pass


def test_a_command_that_works_in_one_process_says_so_under_torchrun_and_which_process_it_is(monkeypatch, capsys, tmp_path):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["eval", f"run_dir={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("searchqa, process 1 of 2: ")
    assert "without torchrun" in said


@pytest.mark.slow
def test_a_killed_process_ends_the_job_with_an_error_and_no_hang(tmp_path):
    started = time.monotonic()
    done = torchrun(WORKER, "die", tmp_path, timeout=90)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_the_command_line_trains_with_torchrun_as_alone_and_goes_on_alone(tmp_path):
    line = ["recipe=smoke", "start=shipped", "threads=1", "env.max_turns=4", "env.max_segment_tokens=24", "algo.questions_per_step=6"]
    line += ["algo.group_size=4", "algo.kl_coef=0.01"]
    assert main(["train", *line, f"run_dir={tmp_path / 'alone'}"]) == 0
    assert sum(line["charts/trained_share"] for line in training_lines(tmp_path / "alone")) > 0
    for kind in worker.KINDS:
        folder = tmp_path / kind
        done = torchrun("-m", "searchqa_agents.cli", "train", *line, f"run_dir={folder}", f"parallel={kind}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Checkpoint:") == 1  # one process shows and writes
        assert_same_run(folder, tmp_path / "alone")
        for written in ("summary.json", "after.json"):
            (folder / written).unlink()
        shutil.rmtree(folder / "checkpoints" / "train-000002")
        assert main(["train", f"resume={folder}", "parallel=auto"]) == 0
        assert_same_run(folder, tmp_path / "alone")


@pytest.mark.slow
def test_the_processes_agree_when_a_stage_ends_and_go_on_from_there(tmp_path):
    """Two stages, of which the first ends early; each of the second's updates is that of one process, so none is left over from the first."""
    line = ["recipe=smoke", "start=shipped", "threads=1", "env.max_turns=4", "env.max_segment_tokens=24", "algo.questions_per_step=6"]
    line += ["algo.group_size=4", "algo.steps=2", "evaluation.questions=4"]
    line += [
        "stages=[{name: a, algo: {steps: 5}, until: {search_rate: 0.3, over: 2}}, {name: b, algo: {name: ppo, kl_coef: 0.01, critic: shared}}]"
    ]
    assert main(["train", *line, f"run_dir={tmp_path / 'alone'}"]) == 0
    assert [line["charts/stage"] for line in training_lines(tmp_path / "alone")] == [1, 1, 2, 2]
    for kind in worker.KINDS:
        folder = tmp_path / kind
        done = torchrun("-m", "searchqa_agents.cli", "train", *line, f"run_dir={folder}", f"parallel={kind}")
        assert done.returncode == 0, done.stderr
        assert_same_run(folder, tmp_path / "alone", "train-000004")
        for stopped_at in (2, 3):  # at the switch, and in the second stage
            (folder / "summary.json").unlink()
            for later in range(stopped_at + 1, 5):
                shutil.rmtree(folder / "checkpoints" / f"train-{later:06d}", ignore_errors=True)
            done = torchrun("-m", "searchqa_agents.cli", "train", f"resume={folder}")
            assert done.returncode == 0, done.stderr
            assert_same_run(folder, tmp_path / "alone", "train-000004")
            assert (folder / "after-a.json").read_text() == (tmp_path / "alone" / "after-a.json").read_text()


def training_lines(folder):
    return [line for line in read_metrics(folder) if line["phase"] == "train"]


def assert_same_run(folder, expected, last="train-000002"):
    for own, other in zip(training_lines(folder), training_lines(expected), strict=True):
        names = [name for name in other if name.startswith(("charts/", "losses/"))]
        assert {name: own[name] for name in names} == pytest.approx({name: other[name] for name in names}, rel=1e-4, abs=1e-6)
    weights = [load_file(run / "checkpoints" / last / "model.safetensors") for run in (folder, expected)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[1].items():
        assert relative(weights[0][name], tensor) < 1e-5, name
    assert (folder / "before.json").read_text() == (expected / "before.json").read_text()
