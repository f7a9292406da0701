"""Sweeps: what is kept of each job, what the same line does again, and what is told of it."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from searchqa_agents.cli import main
from searchqa_agents.hydra_app import _with_sweep_folders, check_config, is_finished, run_app
from searchqa_agents.multirun import SweepFailedError, with_optuna_defaults
from searchqa_agents.objective import ObjectiveError, objective_of
from searchqa_agents.runs import RunFolderError, run_stamp
from searchqa_agents.sweeps import (
    FAILED,
    FINISHED,
    KILLED,
    LOST,
    RUNNING,
    SKIPPED,
    STOPPED,
    Attempt,
    JobRecord,
    SameFolderError,
    Sweep,
    SweepRecordError,
    process_mark,
)
from searchqa_agents.threads import too_many_threads
from searchqa_envs.errors import ConfigurationError

JOB = ("env=world", "env.num_worlds=1", "agent=search_once", "questions=ids-${seed}.jsonl", "save=0", "threads=1")
"""An evaluation that takes a moment, and whose questions are named by a file of each seed."""
QUESTIONS = '{"id": "easy-test-0-0-0"}\n{"id": "easy-test-0-0-1"}\n'
posix = pytest.mark.skipif(os.name != "posix", reason="named pipes and kill -9")


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def lists(*seeds: int) -> None:
    for seed in seeds:
        Path(f"ids-{seed}.jsonl").unlink(missing_ok=True)
        Path(f"ids-{seed}.jsonl").write_text(QUESTIONS)


def stuck(seed: int) -> None:
    """A list of questions that is never there to be read: the job of this seed waits until it is killed."""
    Path(f"ids-{seed}.jsonl").unlink(missing_ok=True)
    os.mkfifo(f"ids-{seed}.jsonl")


def job(sweep: str, name: str) -> JobRecord:
    return next(one for one in Sweep(sweep).jobs() if one.name == name)


def states(sweep: str) -> dict[str, str]:
    return {one.name: one.state() for one in Sweep(sweep).jobs()}


def wait_until(what: Callable[[], bool], seconds: float = 400.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def is_running(sweep: str, name: str) -> bool:
    return Sweep(sweep).record_file(name).is_file() and job(sweep, name).state() == RUNNING


def searchqa(*words: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "searchqa_agents.cli", *words]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


# -- records -----------------------------------------------------------------------------------------------------------------------------


def begun(folder: Path, launch: str = "one", line: tuple[str, ...] = ()) -> Sweep:
    sweep = Sweep(folder)
    sweep.add_launch(launch, "eval", line, "basic", None)
    return sweep


def begin(sweep: Sweep, name: str, launch: str = "one", *, retry: bool = True, done: bool = False) -> str | None:
    return sweep.begin(name, [f"name={name}"], launch, retry=retry, done=lambda record: done)


def test_a_job_that_finished_is_left_and_one_whose_results_are_gone_is_done_again(tmp_path: Path) -> None:
    sweep = begun(tmp_path)
    assert begin(sweep, "a") is None
    assert sweep.carry_out("a", lambda: 0.5) == (0.5, None)
    [record] = sweep.jobs()
    assert (record.state(), record.value, len(record.history), record.error) == (FINISHED, 0.5, 1, None)
    sweep.add_launch("two", "eval", [], "basic", None)
    assert begin(sweep, "a", "two", done=True) == FINISHED
    assert sweep.jobs() == [record]
    assert sweep.launched("two")["left"] == {"a": FINISHED}
    assert begin(sweep, "a", "two", done=False) is None


def test_a_job_that_failed_keeps_its_error_and_trace_and_is_retried_unless_told_not_to(tmp_path: Path) -> None:
    sweep = begun(tmp_path)

    def fails() -> float:
        raise ValueError("two\nlines")

    assert begin(sweep, "x/y/seed-0") is None
    assert sweep.carry_out("x/y/seed-0", fails) == (None, "ValueError: two lines")
    kept = json.loads((tmp_path / "jobs" / "x__y__seed-0.json").read_text())
    assert (kept["status"], kept["error"], kept["attempts"], kept["pid"]) == (FAILED, "ValueError: two lines", 1, os.getpid())
    assert (kept["name"], kept["folder"], kept["overrides"]) == ("x/y/seed-0", str(tmp_path / "x/y/seed-0"), ["name=x/y/seed-0"])
    assert "in fails" in (tmp_path / "jobs" / "x__y__seed-0.error.txt").read_text()
    assert begin(sweep, "x/y/seed-0") == FAILED, "the same line tries it once"
    sweep.add_launch("two", "eval", [], "basic", None)
    assert begin(sweep, "x/y/seed-0", "two", retry=False) == FAILED
    assert begin(sweep, "x/y/seed-0", "two", retry=True) is None
    assert sweep.carry_out("x/y/seed-0", lambda: None) == (None, None)
    [record] = sweep.jobs()
    assert [attempt.status for attempt in record.history] == [FAILED, FINISHED]


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, RUNNING),
        ({"pid": 2**22 + 7}, KILLED),  # beyond the highest number that Linux gives
        ({"process": "another boot:17"}, KILLED),  # a later process with the same number
        ({"host": "elsewhere"}, LOST),
    ],
)
@posix
def test_a_job_runs_as_long_as_its_very_process_is_there(changes: dict[str, Any], state: str, tmp_path: Path) -> None:
    sweep = begun(tmp_path)
    begin(sweep, "a")
    [record] = sweep.jobs()
    changed = replace(record, history=(replace(record.history[0], **changes),))
    assert changed.state() == state
    assert changed.status == RUNNING


@posix
def test_a_process_that_was_killed_and_not_asked_about_has_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert process_mark(child.pid)
    child.kill()
    wait_until(lambda: process_mark(child.pid) is None)  # a zombie now
    child.wait()
    assert process_mark(child.pid) is None


@posix
def test_a_killed_job_is_begun_again_by_a_later_line_and_once_more_by_the_same(tmp_path: Path) -> None:
    sweep = begun(tmp_path)

    def kill(launch: str) -> None:
        record = job(str(tmp_path), "a")
        gone = replace(record.history[-1], pid=2**22 + 7)
        sweep._write(replace(record, history=(*record.history[:-1], gone)))

    assert begin(sweep, "a") is None
    kill("one")
    assert begin(sweep, "a") is None
    kill("one")
    assert sweep.settle("one") == ["a"]
    assert begin(sweep, "a") == KILLED
    sweep.add_launch("two", "eval", [], "basic", None)
    assert begin(sweep, "a", "two", retry=False) is None, "retry is about jobs that failed"
    assert [attempt.status for attempt in job(str(tmp_path), "a").history] == [KILLED, KILLED, RUNNING]


def test_a_job_that_another_process_does_is_left_to_it(tmp_path: Path) -> None:
    sweep = begun(tmp_path)
    assert begin(sweep, "a") is None
    before = sweep.jobs()
    sweep.add_launch("two", "eval", [], "basic", None)
    reason = begin(sweep, "a", "two")
    assert reason is not None
    assert reason.startswith(f"in use by process {os.getpid()} on ")
    assert sweep.jobs() == before
    assert sweep.launched("two")["left"] == {"a": reason}


def test_a_job_of_another_machine_is_left_only_while_its_folder_is_open(tmp_path: Path) -> None:
    from filelock import FileLock

    sweep = begun(tmp_path)
    begin(sweep, "a")
    [record] = sweep.jobs()
    sweep._write(replace(record, history=(replace(record.history[0], host="elsewhere"),)))
    (tmp_path / "a").mkdir()
    with FileLock(tmp_path / "a" / ".lock"):
        assert str(begin(sweep, "a")).startswith("in use by process")
    assert begin(sweep, "a") is None


def test_what_is_refused_stays_finished_and_what_finished_before_there_were_records_is_skipped(tmp_path: Path) -> None:
    sweep = begun(tmp_path)
    assert begin(sweep, "old", done=True) == FINISHED
    assert job(str(tmp_path), "old").state() == SKIPPED
    begin(sweep, "a")
    sweep.carry_out("a", lambda: None)
    sweep.add_launch("two", "eval", [], "basic", None)

    def refuses() -> float:
        raise RunFolderError("a holds a run with another seed")

    assert begin(sweep, "a", "two") is None
    assert sweep.carry_out("a", refuses)[1] == "a holds a run with another seed"
    assert job(str(tmp_path), "a").state() == FINISHED


def test_ctrl_c_is_recorded_and_goes_on_its_way(tmp_path: Path) -> None:
    sweep = begun(tmp_path)
    begin(sweep, "a")

    def stops() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.carry_out("a", stops)
    assert job(str(tmp_path), "a").state() == STOPPED


def _take(folder: str, names: list[str], results: Any) -> None:
    sweep = Sweep(folder)
    results.put([name for name in names if begin(sweep, name) is None])
    time.sleep(5)  # alive until all have asked


@posix
def test_of_several_processes_that_want_a_job_exactly_one_gets_it(tmp_path: Path) -> None:
    begun(tmp_path)
    names = [f"job-{place}" for place in range(6)]
    context = get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_take, args=(str(tmp_path), names, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    taken = [name for _ in workers for name in results.get(timeout=60)]
    for worker in workers:
        worker.terminate()
        worker.join()
    assert sorted(taken) == names
    assert set(Sweep(tmp_path).launched("one")["left"]) <= set(names)


@pytest.mark.parametrize("text", ["", "[]", '{"name": "a"}', '{"name": "a", "overrides": [], "value": null, "history": [{"status": "x"}]}'])
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "a.json").write_text(text)
    with pytest.raises(SweepRecordError, match=r"jobs/a\.json is not the record of a job"):
        Sweep(tmp_path).jobs()
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(SweepRecordError, match=r"sweep\.json cannot be read"):
        Sweep(tmp_path).launches()


def test_a_record_that_was_being_written_when_its_process_was_killed_is_no_record(tmp_path: Path) -> None:
    sweep = begun(tmp_path)
    begin(sweep, "a")
    (tmp_path / "jobs" / ".partial-77-b.json").write_text('{"name": "b"')
    assert [record.name for record in sweep.jobs()] == ["a"]


def test_a_record_that_is_removed_while_the_folder_is_listed_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = begun(tmp_path)
    begin(sweep, "a")
    begin(sweep, "b")
    listed = sorted((tmp_path / "jobs").glob("*.json"))
    sweep.record_file("a").unlink()
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter(listed))
    assert [record.name for record in sweep.jobs()] == ["b"]


def test_a_damaged_record_does_not_hide_the_others_and_its_job_is_left(tmp_path: Path) -> None:
    sweep = begun(tmp_path)
    begin(sweep, "a")
    begin(sweep, "b")
    sweep.record_file("a").write_text("[]")
    records, [error] = sweep.readable_jobs()
    assert [record.name for record in records] == ["b"]
    assert "a.json is not the record of a job" in str(error)
    with pytest.raises(SweepRecordError):
        begin(sweep, "a")
    assert "Remove it" in sweep.launched("one")["left"]["a"]


@pytest.mark.parametrize("names", [("b/c", "b__c"), ("a_/b", "a/_b"), ("x" * 250, "x" * 249 + "y"), ("é" * 100 + "/1", "é" * 100 + "/2")])
def test_different_jobs_have_different_records(names: tuple[str, str], tmp_path: Path) -> None:
    sweep = begun(tmp_path)
    for name in names:
        assert begin(sweep, name) is None
        sweep.carry_out(name, _raises)
    assert sorted(record.name for record in sweep.jobs()) == sorted(names)
    assert all(sweep.error_file(name).is_file() for name in names)


def _raises() -> float:
    raise ValueError("\x1b[31mred\x1b[0m \udc80")


def test_control_characters_of_an_error_do_not_reach_a_terminal(tmp_path: Path) -> None:
    sweep = begun(tmp_path)
    begin(sweep, "a")
    assert sweep.carry_out("a", _raises)[1] == r"ValueError: \x1b[31mred\x1b[0m \udc80"
    assert "\x1b" not in sweep.error_file("a").read_text()


def test_two_jobs_of_one_line_with_one_folder_are_refused_and_equal_ones_are_one(tmp_path: Path) -> None:
    sweep = begun(tmp_path)

    def begin_with(*words: str) -> str | None:
        return sweep.begin("a", words, "one", retry=True, done=lambda record: bool(record))

    assert begin_with("x=1", "seed=0") is None
    sweep.carry_out("a", lambda: None)
    assert begin_with("seed=0", "x=1") == FINISHED
    with pytest.raises(SameFolderError, match=r"two jobs of this line have the folder .*a: x=1 seed=0, and x=2 seed=0\."):
        begin_with("x=2", "seed=0")


def test_an_earlier_version_s_list_of_lines_is_read_and_another_s_is_named(tmp_path: Path) -> None:
    entry = {"id": "one", "line": ["-m"], "started": "2026-01-01T00:00:00+00:00"}
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps({"launches": [entry]}))
    [launch] = Sweep(tmp_path).launches()
    assert (launch["jobs"], launch["left"], launch["error"], launch["launcher"]) == (None, {}, None, "basic")
    wrong: list[dict[str, Any]] = [{"jobs": 3}, {"left": []}, {"started": "yesterday"}, {"line": "eval"}, {"pid": "1"}, {"jobs": [[1]]}]
    for changes in wrong:
        file.write_text(json.dumps({"launches": [{**entry, **changes}]}))
        with pytest.raises(SweepRecordError, match=r"sweep\.json cannot be read"):
            Sweep(tmp_path).launches()


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(threads: int, capsys: pytest.CaptureFixture[str]) -> None:
    lists(0, 1)
    for line in (["seed=0", "run_dir=one"], ["-m", "seed=0,1", "run_dir=sweep"]):
        assert main(["eval", *JOB, *line, f"threads={threads}"]) == 1
        assert f"threads must be at least 1; got {threads}." in capsys.readouterr().err


def test_a_sweep_with_equal_jobs_completes_and_goes_on_beside_a_damaged_record(capsys: pytest.CaptureFixture[str]) -> None:
    lists(0, 1)
    line = ["eval", "-m", *JOB, "agent=oracle,oracle", "seed=0,1", "run_dir=sweep"]
    line.remove("agent=search_once")
    assert main(line) == 0
    assert "Sweep sweep: 2 finished." in capsys.readouterr().out
    file = Sweep("sweep").record_file(Sweep("sweep").jobs()[0].name)
    file.write_text("{")
    assert main(line) == 1
    said = capsys.readouterr().err
    assert f"{file} is not the record of a job" in said
    assert "1 finished (1 of them before)" in said
    assert main(["report", "multirun", "sweep"]) == 0
    assert "is not the record of a job" in " ".join(capsys.readouterr().out.split())
    file.unlink()
    assert main(line) == 0


def test_a_line_that_is_refused_altogether_is_not_told_to_come_again(capsys: pytest.CaptureFixture[str]) -> None:
    lists(0, 1)
    line = ["eval", "-m", *JOB, "seed=0,1", "run_dir=sweep"]
    assert main(line) == 0
    assert main([*line, "env.top_k=2", "hydra.sweep.subdir=seed-${seed}"]) == 1
    said = capsys.readouterr().err
    assert "holds a run with another env" in said
    assert "does what is left" not in said


# -- lines -------------------------------------------------------------------------------------------------------------------------------


def subdir(line: list[str], **changes: Any) -> list[str]:
    return [word for word in _with_sweep_folders(line, **changes) if word.startswith("hydra.sweep.subdir")]


def test_jobs_of_a_range_are_named_by_their_values() -> None:
    assert subdir(["-m", "seed=range(3)"]) == ["hydra.sweep.subdir=${hydra.job.override_dirname}"]
    assert subdir(["-m", "seed=choice(0,1)"]) == ["hydra.sweep.subdir=${hydra.job.override_dirname}"]
    assert subdir(["-m", "agent=baseline/cot,baseline/rag"]) == []


def test_a_configuration_that_is_a_multirun_names_its_jobs_itself() -> None:
    line = _with_sweep_folders(["task=a,b", "run_dir=here"], multirun=True)
    assert line == ["task=a,b", "hydra.sweep.dir='here'"]


def test_a_search_maximises_goes_on_after_failures_and_asks_for_the_same_trials_again_unless_told_otherwise() -> None:
    line = ["-m", "hydra/sweeper=optuna", "algo.learning_rate=interval(1e-4,1e-3)"]
    defaults = ["hydra.sweeper.direction=maximize", "hydra.sweeper.max_failure_rate=1.0", "hydra.sweeper.sampler.seed=0"]
    assert with_optuna_defaults(line) == [*line, *defaults]
    assert with_optuna_defaults([*line, "hydra.sweeper.direction=minimize"])[3:] == ["hydra.sweeper.direction=minimize", *defaults[1:]]
    assert defaults[2] not in with_optuna_defaults([*line, "hydra/sweeper/sampler=grid"])
    assert with_optuna_defaults(["-m", "seed=0,1"]) == ["-m", "seed=0,1"]
    assert subdir(line) == ["hydra.sweep.subdir=${hydra.job.override_dirname}"]


@pytest.mark.parametrize(
    ("jobs", "threads", "cores", "said"),
    [
        (1, 2, 2, None),
        (2, 1, 2, None),
        (4, 2, 8, None),
        (2, 2, 2, "threads=1 gives each its share"),
        (2, None, 8, "threads=4 gives each its share"),
        (12, 1, 2, "hydra.launcher.n_jobs"),
    ],
)
def test_more_threads_than_cores_are_told_with_the_way_out(jobs: int, threads: int | None, cores: int, said: str | None) -> None:
    warning = too_many_threads(jobs, threads, cores)
    assert (warning is None) if said is None else (said in str(warning))


@pytest.mark.slow
def test_threads_are_limited_also_in_libraries_that_are_loaded_already() -> None:
    code = (
        "import numpy, torch; torch.set_num_threads(2)\n"
        "from searchqa_agents.threads import set_threads; set_threads(1)\n"
        "from threadpoolctl import threadpool_info; import os, subprocess, sys\n"
        "assert {pool['num_threads'] for pool in threadpool_info()} == {1}, threadpool_info()\n"
        "assert torch.get_num_threads() == torch.get_num_interop_threads() == 1\n"
        "assert {os.environ[name] for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')} == {'1'}\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=environment)


# -- objectives --------------------------------------------------------------------------------------------------------------------------


def test_the_objective_of_each_kind_of_run(tmp_path: Path) -> None:
    train = {"kind": "train", "titles": {"hops=2/sampled/em": "a", "hops=1/sampled/em": "b"}}
    train["measures"] = {
        "before": {"hops=2/sampled/em": 0.1},
        "after": {"hops=2/sampled/em": 0.7, "hops=1/sampled/em": 0.9, "hops=2/greedy/em": 0.8},
    }
    (tmp_path / "summary.json").write_text(json.dumps(train))
    assert objective_of(tmp_path) == 0.7
    assert objective_of(tmp_path, "hops=2/greedy/em") == 0.8
    (tmp_path / "summary.json").write_text(json.dumps({"kind": "eval", "metrics": {"em": 0.5, "f1": math.nan}}))
    assert objective_of(tmp_path) == 0.5
    with pytest.raises(ObjectiveError, match=r"f1 .* is nan"):
        objective_of(tmp_path, "f1")
    with pytest.raises(ConfigurationError, match=r"objective=f2 is no measure of .* em, f1"):
        objective_of(tmp_path, "f2")
    (tmp_path / "score.json").write_text(json.dumps({"points": [{"score": 0.1, "em": 0.2}, {"score": 0.6, "em": 0.4}]}))
    assert (objective_of(tmp_path), objective_of(tmp_path, "em")) == (0.6, 0.4)


def test_a_run_without_measures_has_no_objective(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has no measures"):
        objective_of(tmp_path)


# -- real sweeps -------------------------------------------------------------------------------------------------------------------------


@posix
def test_twelve_jobs_with_one_that_crashes_and_one_that_is_killed_are_completed_by_the_same_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The whole process is killed with kill -9 in the middle of job 5; job 3 has a list with a question that does not exist."""
    lists(*range(12))
    Path("ids-3.jsonl").write_text('{"id": "nowhere"}\n')
    stuck(5)
    line = ["eval", "-m", *JOB, "seed=range(12)", "run_dir=sweep"]
    process = searchqa(*line)
    wait_until(lambda: is_running("sweep", "seed-5"))
    process.kill()
    process.communicate()
    assert states("sweep") == {f"seed-{seed}": FINISHED for seed in (0, 1, 2, 4)} | {"seed-3": FAILED, "seed-5": KILLED}
    summaries = {seed: Path(f"sweep/seed-{seed}/summary.json").stat().st_mtime_ns for seed in (0, 1, 2, 4)}

    assert main(["report", "multirun", "sweep"]) == 0
    told = capsys.readouterr().out
    assert "12 jobs: 4 finished, 1 failed, 1 killed, 6 not begun" in told
    assert re.search(r"begun, which was killed, 12 jobs, launcher basic: searchqa eval -m .*'seed=range\(12\)'", told)
    assert re.search(r"seed-3: failed after 0\.\d s: ids-3\.jsonl asks for the question 'nowhere'", told)

    lists(5)
    assert main([*line, "retry=false"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("is finished: nothing to do") == 4
    assert "11 finished, 1 failed (4 of them before)" in captured.err
    assert "seed-3: failed: ids-3.jsonl asks for the question 'nowhere'" in captured.err
    assert "`searchqa eval resume=sweep` does what is left" in captured.err

    lists(3)
    assert main(line) == 0
    captured = capsys.readouterr()
    assert captured.out.count("is finished: nothing to do") == 11
    assert "12 finished (11 of them before)" in captured.out
    assert set(states("sweep").values()) == {FINISHED}
    assert {seed: Path(f"sweep/seed-{seed}/summary.json").stat().st_mtime_ns for seed in summaries} == summaries
    histories = {name: [attempt.status for attempt in job("sweep", name).history] for name in ("seed-2", "seed-3", "seed-5")}
    assert histories == {"seed-2": [FINISHED], "seed-3": [FAILED, FINISHED], "seed-5": [KILLED, FINISHED]}

    assert main(["report", "multirun", "--markdown", "sweep"]) == 0
    told = capsys.readouterr().out
    assert "| seed=3 | finished | 2 |" in told
    assert "12 jobs: 12 finished." in told
    assert re.search(r"seed-5: killed \(process \d+ on .*\)", told)
    assert "seed-5, begun for the 2nd time: finished" in told
    page = Path("sweep/multirun.html").read_text()
    links = re.findall(r'href="([^"]+)"', page)
    assert len(links) == 12
    assert all((Path("sweep") / link).is_file() for link in links)
    assert "default-src 'none'" in page
    assert "<script" not in page


@posix
def test_ctrl_c_ends_a_sweep_and_resume_goes_on_with_each_job_s_own_interpolations(capsys: pytest.CaptureFixture[str]) -> None:
    lists(0)
    Path("ids-2.jsonl").write_text('{"id": "easy-test-0-0-2"}\n')
    stuck(1)

    def interrupt() -> None:
        wait_until(lambda: is_running("sweep", "seed-1"))
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(["eval", "-m", *JOB, "seed=0,1,2", "run_dir=sweep"]) == 130
    thread.join()
    assert "1 finished, 1 stopped, 1 not begun. `searchqa eval resume=sweep` goes on with it." in capsys.readouterr().out
    assert states("sweep") == {"seed-0": FINISHED, "seed-1": STOPPED}
    lists(1)
    assert main(["eval", "resume=sweep"]) == 0
    assert set(states("sweep").values()) == {FINISHED}
    rows = [json.loads(text) for text in Path("sweep/seed-2/scores.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["easy-test-0-0-2"]


@posix
def test_a_job_that_another_sweep_is_doing_does_not_stop_this_one(capsys: pytest.CaptureFixture[str]) -> None:
    lists(0, 1)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        sweep = begun(Path("sweep"), "another")
        mark = str(process_mark(other.pid))
        history = (Attempt(RUNNING, "another", "2026-01-01T00:00:00+00:00", other.pid, mark, os.uname().nodename),)
        sweep._write(JobRecord("seed-0", ("seed=0",), history))
        assert main(["eval", "-m", *JOB, "seed=0,1", "run_dir=sweep"]) == 1
        captured = capsys.readouterr()
        assert f"seed-0: running: in use by process {other.pid}" in captured.err
        assert states("sweep") == {"seed-0": RUNNING, "seed-1": FINISHED}
        assert not Path("sweep/seed-0/summary.json").exists()
    finally:
        other.kill()
        other.wait()
    assert main(["eval", "-m", *JOB, "seed=0,1", "run_dir=sweep"]) == 0
    assert [attempt.status for attempt in job("sweep", "seed-0").history] == [KILLED, FINISHED]


def test_optuna_finds_the_best_agent_is_told_of_failures_and_skips_what_it_has_tried(capsys: pytest.CaptureFixture[str]) -> None:
    """Trials with no questions fail."""
    words = ["env=world", "env.num_worlds=1", "threads=1", "agent=choice(direct,oracle)", "questions=choice(2,0)"]
    line = ["eval", "-m", "hydra/sweeper=optuna", *words, "hydra.sweeper.n_jobs=1", "run_dir=sweep"]
    assert main([*line, "hydra.sweeper.n_trials=5"]) == 1
    assert "questions must be at least 1; got 0." in capsys.readouterr().err
    found = yaml.safe_load(Path("sweep/optimization_results.yaml").read_text())
    assert (found["best_params"]["agent"], found["best_value"]) == ("oracle", 1.0)
    tried = {one.name: (one.state(), one.value) for one in Sweep("sweep").jobs()}
    expected: dict[str, tuple[str, float | None]] = {
        "agent-direct_questions-2": (FINISHED, 0.0),
        "agent-oracle_questions-2": (FINISHED, 1.0),
    }
    expected |= {f"agent-{name}_questions-0": (FAILED, None) for name in ("direct", "oracle")}
    assert tried == {name: expected[name] for name in tried}
    assert {FINISHED, FAILED} == {state for state, _ in tried.values()}
    assert main([*line, "hydra.sweeper.n_trials=5", "retry=false"]) == 1  # the same seed asks for the same trials
    assert {one.name for one in Sweep("sweep").jobs()} == set(tried)
    assert all(len(one.history) == 1 for one in Sweep("sweep").jobs() if one.state() == FINISHED)
    assert main(["report", "multirun", "sweep"]) == 0
    assert "Best of the search: 1 with agent=oracle" in " ".join(capsys.readouterr().out.split())


def test_a_search_whose_trials_all_fail_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["env=world", "env.num_worlds=1", "threads=1", "questions=choice(0,-1)", "hydra.sweeper.n_trials=1", "hydra.sweeper.n_jobs=1"]
    assert main(["eval", "-m", "hydra/sweeper=optuna", *words, "run_dir=sweep"]) == 1
    told = r"Sweep sweep: 1 failed\.\n  questions-\S+: failed: questions must be at least 1; got"
    assert re.search(told, capsys.readouterr().err)
    assert main(["eval", "resume=sweep", "hydra.sweeper.max_failure_rate=0.0"]) == 1  # Hydra raises the trial's error then
    assert re.search(told, capsys.readouterr().err)


def test_a_line_that_asks_for_what_cannot_be_composed_is_told_as_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "-m", *JOB[1:], "env=world,nowhere", "seed=0", "run_dir=sweep"]) == 2
    assert "env=nowhere is not known" in capsys.readouterr().err
    [launch] = Sweep("sweep").launches()
    assert launch["ended"]
    assert "env=nowhere is not known" in launch["error"]
    assert main(["report", "multirun", "sweep"]) == 0
    assert "begun, given up (env=nowhere is not known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "key"), [(["task.budget=300"], "task"), (["task.measured.split=train"], "task"), (["suite=other"], "suite")]
)
def test_a_benchmark_s_folder_takes_no_other_task(words: list[str], key: str, tmp_path: Path) -> None:
    task = {"name": "sparse", "budget": 200, "measured": {"split": "test"}}
    path = tmp_path / "grpo"
    path.mkdir()
    (path / "config.yaml").write_text(
        yaml.safe_dump({"suite": "world-v1", "task": task, "seed": 0, "plugins": [], "algo": {"name": "grpo"}})
    )
    changed = OmegaConf.merge(OmegaConf.load(path / "config.yaml"), OmegaConf.from_dotlist(words))
    assert isinstance(changed, DictConfig)
    with pytest.raises(RunFolderError, match=f"holds a run with another {key}; choose another run_dir"):
        check_config(path, changed)


def test_a_second_budget_or_split_in_a_benchmark_s_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["bench", "task=sparse", "algorithm=grpo", "seed=0", "task.questions=4", "run_dir=bench"]
    assert main([*line, "task.budget=200"]) == 0
    before = Path("bench/grpo/sparse/seed-0/score.json").read_bytes()
    for words in (["task.budget=300"], ["task.budget=200", "task.measured.split=dev"]):
        assert main([*line, *words]) == 1
        assert "holds a run with another task; choose another run_dir" in capsys.readouterr().err
    assert main([*line, "task.budget=200"]) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert Path("bench/grpo/sparse/seed-0/score.json").read_bytes() == before


def test_two_jobs_with_one_folder_end_the_line_which_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    lists(0, 1)
    assert main(["eval", "-m", *JOB, "seed=0,1", "hydra.sweep.subdir=one", "run_dir=sweep"]) == 1
    said = capsys.readouterr().err
    assert "two jobs of this line have the folder sweep/one" in said
    assert "seed=0" in said
    assert "seed=1" in said
    assert "two jobs of this line" in str(Sweep("sweep").launches()[0]["error"])
    assert len(job("sweep", "one").history) == 1


def test_the_command_of_a_stamp_can_be_given_to_a_shell_again(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["eval", "-m", "seed=range(2)", 'objective="a b"']
    monkeypatch.setattr(sys, "argv", ["searchqa", *words])
    assert shlex.split(run_stamp({}, seed=0, threads=1)["command"]) == ["searchqa", *words]


def test_another_file_of_an_algorithm_beside_it_leaves_a_finished_job_finished(tmp_path: Path) -> None:
    settings = {"seed": 0, "plugins": [], "algo": {"name": "grpo"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "summary.json").write_text("{}")
    assert is_finished(tmp_path, OmegaConf.create({**settings, "plugins": ["mine.py"]}))
    assert not is_finished(tmp_path, OmegaConf.create({**settings, "seed": 1}))


def test_a_finished_job_that_a_command_calls_out_of_date_is_refused_and_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    lists(0)
    line = [*JOB, "seed=0", "run_dir=sweep"]
    assert main(["eval", "-m", *line]) == 0
    before = Path("sweep/0/summary.json").stat().st_mtime_ns
    words = ["-m", *line]
    with pytest.raises(SweepFailedError, match="0: failed: the file has changed"):
        run_app("eval", _never, words, current=_changed)
    assert job("sweep", "0").state() == FINISHED
    assert Path("sweep/0/summary.json").stat().st_mtime_ns == before
    run_app("eval", _never, words, current=_unchanged)
    assert "is finished: nothing to do" in capsys.readouterr().out


def _never(config: Any, folder: Path) -> None:
    raise AssertionError(f"{folder} is done again")


def _changed(config: Any, folder: Path) -> str | None:
    return "the file has changed; choose another run_dir."


def _unchanged(config: Any, folder: Path) -> str | None:
    return None


@pytest.mark.slow
def test_a_search_space_in_a_file_is_looked_through_without_running_it(capsys: pytest.CaptureFixture[str]) -> None:
    """The example of docs/sweeps.md."""
    page = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")
    example = page.partition("```yaml\n")[2].partition("```")[0]
    Path("mine/ablation").mkdir(parents=True)
    Path("mine/ablation/tuning.yaml").write_text(example)
    line = ["train", "-m", "hydra/sweeper=optuna", "--config-dir", "mine", "ablation=tuning", "hydra.sweeper.n_trials=2", "dry_run=true"]
    assert main(line) == 0
    rates = [float(rate) for rate in re.findall(r"^  learning_rate: ([\d.e-]+)$", capsys.readouterr().out, re.MULTILINE)]
    given = {0.002, 0.0005}  # of the warm-up and of fine-tuning, and of the algorithm where nothing is looked for
    assert len(set(rates) - given) == 2
    assert not Path("runs").exists()


# -- reports -----------------------------------------------------------------------------------------------------------------------------


def made_sweep(folder: Path) -> None:
    """A sweep of two benchmark jobs of which one diverged, one that failed with markup in its error, and one that was not begun."""
    names = {"grpo/sparse/seed-0": 0.5, "ppo/sparse/seed-0": 0.0}
    sweep = Sweep(folder)
    plan = [["algorithm=grpo", "seed=0"], ["algorithm=ppo", "seed=0"], ["algorithm=mine", "seed=0"], ["algorithm=mine", "seed=1"]]
    sweep.add_launch("one", "bench", ["suite=world-v1"], "joblib", plan)
    for (name, last), words in zip(names.items(), plan, strict=False):
        sweep.begin(name, words, "one", retry=True, done=lambda record: False)
        (folder / name).mkdir(parents=True)
        points = [{"share": share, "score": last * share, "em": last * share} for share in (0.0, 0.5, 1.0)]
        score = {"points": points, "status": "finished" if last else "diverged"}
        (folder / name / "score.json").write_text(json.dumps(score))
        (folder / name / "report.html").write_text("")
        sweep.carry_out(name, lambda: None)

    def fails() -> float:
        raise ValueError("<script>alert(1)</script>")

    sweep.begin("mine/sparse/seed-0", plan[2], "one", retry=True, done=lambda record: False)
    sweep.carry_out("mine/sparse/seed-0", fails)
    sweep.end_launch("one")


def test_the_report_of_a_benchmark_has_scores_errors_and_what_was_not_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_sweep(tmp_path / "bench")
    assert main(["report", "multirun", str(tmp_path / "bench"), "--markdown"]) == 0
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines() if row.startswith("|")]
    assert rows[0] == ["job", "state", "tries", "s", "score", "best", "EM", "note"]
    told = {row[0]: [row[1], row[2], *row[4:]] for row in rows[2:]}
    assert told == {
        "algorithm=grpo seed=0": ["finished", "1", "0.500", "0.500", "0.500", "–"],
        "algorithm=ppo seed=0": ["finished", "1", "0.000", "0.000", "0.000", "diverged"],
        "algorithm=mine seed=0": ["failed", "1", "–", "–", "–", "–"],
        "algorithm=mine seed=1": ["not begun", "0", "–", "–", "–", "–"],
    }
    page = (tmp_path / "bench" / "multirun.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 2  # in the table, in what happened, and in the trace
    assert 'href="grpo/sparse/seed-0/report.html"' in page
    assert "data:image/png;base64," in page


def test_the_report_leaves_out_what_cannot_be_read_and_is_printed_also_where_no_page_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    made_sweep(tmp_path / "bench")
    (tmp_path / "bench" / "grpo/sparse/seed-0/score.json").write_text('{"points": []}')
    sweep = Sweep(tmp_path / "bench")
    sweep.record_file("mine/sparse/seed-0").write_text("[]")
    (tmp_path / "bench" / "multirun.html").mkdir()
    assert main(["report", "multirun", str(tmp_path / "bench"), "--markdown"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"\| algorithm=grpo seed=0 \| finished \|.*unreadable", told)
    assert re.search(r"\| algorithm=ppo seed=0 \| finished \|.*diverged", told)
    assert "mine__sparse__seed-0.json is not the record of a job" in told
    assert "The page was not written" in caplog.text
    (tmp_path / "bench" / "multirun.html").rmdir()
    assert main(["report", "multirun", str(tmp_path / "bench")]) == 0
    assert "mine__sparse__seed-0.json is not the record of a job" in (tmp_path / "bench" / "multirun.html").read_text()


def test_what_a_line_says_of_its_plugins_and_logs_tells_no_job_from_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = begun(tmp_path)
    for seed in (0, 1):
        words = [f"seed={seed}", f"plugins=[{seed}.py]", f"wandb=w{seed}", f"dashboard=d{seed}"]
        sweep.begin(f"seed-{seed}", words, "one", retry=True, done=lambda record: False)
    assert main(["report", "multirun", str(tmp_path), "--markdown"]) == 0
    assert "| seed=0 |" in capsys.readouterr().out


def test_the_report_of_training_runs_has_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = begun(tmp_path / "sweep", line=("-m",))
    sweep.begin("seed-0", ["seed=0"], "one", retry=True, done=lambda record: False)
    folder = tmp_path / "sweep" / "seed-0"
    folder.mkdir()
    measures = {"hops=2/sampled/em": 0.25, "hops=2/greedy/em": 0.5, "hops=2/sampled/searches": 1.5}
    after = {name: value + 0.25 for name, value in measures.items()}
    summary = {"kind": "train", "titles": {"hops=2/sampled/em": "EM"}, "measures": {"before": measures, "after": after}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text(
        '{"phase": "train", "step": 1, "charts/em": 0.5}\n{"phase": "train", "step": 2, "charts/em": 1.0}\n'
    )
    sweep.carry_out("seed-0", lambda: 0.5)
    assert main(["report", "multirun", str(tmp_path / "sweep"), "--markdown"]) == 0
    header, _, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        "job",
        "state",
        "tries",
        "s",
        "EM before",
        "EM after",
        "greedy",
        "searches",
        "objective",
    ]
    assert [cell.strip() for cell in row.split("|")[5:-1]] == ["0.250", "0.500", "0.750", "1.750", "0.500"]
    assert "Learning curves" in (tmp_path / "sweep" / "multirun.html").read_text()


def test_the_report_needs_a_sweep_with_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "multirun", str(tmp_path)]) == 1
    assert "is not the folder of a sweep that kept records" in capsys.readouterr().err
    assert main(["report", "multirun"]) == 2
    assert main(["report", "multirun", "--help"]) == 0
    assert "usage: searchqa report multirun" in capsys.readouterr().out


# -- launchers ---------------------------------------------------------------------------------------------------------------------------

WHAT_IT_SEES = """
import json, os, sys
from pathlib import Path
import numpy, torch
from threadpoolctl import threadpool_info
seen = {"pools": sorted({pool["num_threads"] for pool in threadpool_info()}), "torch": torch.get_num_threads(), "omp": os.environ.get("OMP_NUM_THREADS")}
Path(f"seen-{os.getpid()}.json").write_text(json.dumps(seen))
"""
SMOKE = ("recipe=smoke", "env.num_worlds=8", "start=shipped", "evaluation.questions=4", "algo.steps=1", "env.max_turns=3")


@pytest.mark.slow
@posix
@pytest.mark.parametrize("launcher", [("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), ("hydra/launcher=submitit_local",)])
def test_a_worker_that_is_killed_takes_no_job_with_it_for_good(launcher: tuple[str, ...]) -> None:
    """joblib ends all its workers when one is killed, and submitit stops to wait for the others: the line goes on all the same."""
    seeds = range(12) if "joblib" in launcher[0] else range(4)
    lists(*seeds)
    Path("ids-3.jsonl").write_text('{"id": "nowhere"}\n')
    stuck(1)
    line = ["eval", "-m", *JOB, f"seed=range({len(seeds)})", "run_dir=sweep", *launcher]
    process = searchqa(*line)
    wait_until(lambda: is_running("sweep", "seed-1"))
    killed = job("sweep", "seed-1").history[-1].pid
    assert killed != process.pid
    lists(1)
    os.kill(killed, signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode == 1
    assert "seed-3: failed: ids-3.jsonl asks for the question 'nowhere'" in said
    assert states("sweep") == {f"seed-{seed}": FAILED if seed == 3 else FINISHED for seed in seeds}
    assert [attempt.status for attempt in job("sweep", "seed-1").history] == [KILLED, FINISHED]
    lists(3)
    process = searchqa(*line)
    process.communicate()
    assert process.returncode == 0
    assert set(states("sweep").values()) == {FINISHED}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), ("hydra/launcher=submitit_local",)])
def test_every_process_of_a_sweep_has_the_threads_it_was_given(launcher: tuple[str, ...]) -> None:
    Path("look.py").write_text(WHAT_IT_SEES)
    line = [
        sys.executable,
        "-m",
        "searchqa_agents.cli",
        "train",
        "-m",
        *SMOKE,
        "plugins=[look.py]",
        "seed=0,1",
        "threads=1",
        "run_dir=sweep",
        *launcher,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    own = {record.history[-1].pid for record in Sweep("sweep").jobs()}
    seen = [json.loads(Path(f"seen-{pid}.json").read_text()) for pid in own]
    assert len(own) == 2
    assert seen == [{"pools": [1], "torch": 1, "omp": "1"}] * 2


@pytest.mark.slow
def test_a_search_with_real_training_is_told_what_each_trial_was_worth() -> None:
    words = [*SMOKE, "algo.learning_rate=tag(log,interval(1e-4,1e-3))", "evaluation.split=dev", "threads=1", "hydra.sweeper.n_trials=3"]
    assert main(["train", "-m", "hydra/sweeper=optuna", *words, "hydra.sweeper.n_jobs=1", "run_dir=sweep"]) == 0
    found = yaml.safe_load(Path("sweep/optimization_results.yaml").read_text())
    values = [one.value for one in Sweep("sweep").jobs()]
    assert len(values) == 3
    assert found["best_value"] == max(value for value in values if value is not None)
    assert 1e-4 <= found["best_params"]["algo.learning_rate"] <= 1e-3
