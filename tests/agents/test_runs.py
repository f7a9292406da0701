"""A run's folder keeps what was earned: torn lines, killed writers, old checkpoints, resumed training."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from searchqa_agents.cli import main
from searchqa_agents.runs import RunFolder, RunFolderError, StorageError, git_commit, list_checkpoints, read_metrics, run_stamp


def fill(text: str):
    return lambda folder: (folder / "weights").write_text(text)


def test_lines_are_appended_in_order_and_survive_reopening(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        folder.log("grpo", 1, {"charts/em": 0.25})
        folder.log("grpo", 2, {"charts/em": 0.5})
    with RunFolder(tmp_path / "run") as folder:
        folder.log("grpo", 3, {"charts/em": 0.75})
        lines = folder.metrics()
    assert [(line["phase"], line["step"], line["charts/em"]) for line in lines] == [("grpo", 1, 0.25), ("grpo", 2, 0.5), ("grpo", 3, 0.75)]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunFolder(tmp_path) as folder:
        folder.log("sft", 1, {"losses/sft_loss": 2.5})
        folder.log("sft", 2, {"losses/sft_loss": 1.5})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "sft"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("losses/sft_loss")] == [(1, 2.5), (2, 1.5)]


def test_a_torn_last_line_is_dropped_with_a_warning_and_the_others_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RunFolder(tmp_path) as folder:
        folder.log("grpo", 1, {"charts/em": 0.25})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "grpo", "st')
    with caplog.at_level(logging.WARNING), RunFolder(tmp_path) as folder:
        folder.log("grpo", 2, {"charts/em": 0.5})
        assert [line["step"] for line in folder.metrics()] == [1, 2]
    assert "unfinished last line" in caplog.text


def test_a_bad_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(RunFolderError, match="line 2"):
        read_metrics(tmp_path)


def test_a_full_disk_is_an_error_and_costs_no_earlier_line(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.log("grpo", 1, {"charts/em": 0.25})
        (tmp_path / "metrics.jsonl").rename(tmp_path / "kept")
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(StorageError, match="No space left"):
            folder.log("grpo", 2, {"charts/em": 0.5})
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "kept").rename(tmp_path / "metrics.jsonl")
        assert [line["step"] for line in folder.metrics()] == [1]


def test_a_checkpoint_that_fails_leaves_the_earlier_one_and_no_rest(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with RunFolder(tmp_path) as folder:
        folder.save_checkpoint("grpo", 5, fill("five"))
        with pytest.raises(StorageError, match="No space left"):
            folder.save_checkpoint("grpo", 5, fails)
        with pytest.raises(
            StorageError, match=rf"The last good checkpoint is {folder.path}/checkpoints/grpo-000005: `searchqa train resume="
        ):
            folder.save_checkpoint("grpo", 10, fails)
    [checkpoint] = list_checkpoints(tmp_path)
    assert (checkpoint.path / "weights").read_text() == "five"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["grpo-000005"]


def test_what_a_killed_writer_left_is_no_checkpoint_and_is_removed(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.save_checkpoint("grpo", 5, fill("five"))
    partial = tmp_path / "checkpoints" / ".partial-grpo-000010"
    partial.mkdir()
    (partial / "weights").write_text("half")
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [5]
    with RunFolder(tmp_path):
        assert not partial.exists()


def test_a_checkpoint_that_was_being_replaced_when_its_writer_was_killed_is_the_old_one(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        saved = folder.save_checkpoint("grpo", 5, fill("old"))
    saved.path.rename(saved.path.with_name(".partial-replaced-grpo-000005"))
    (tmp_path / ".partial-77-metrics.jsonl").write_text("half")
    with RunFolder(tmp_path):
        [checkpoint] = list_checkpoints(tmp_path)
    assert (checkpoint.path / "weights").read_text() == "old"
    assert not list(tmp_path.glob(".partial-*"))


def test_the_last_two_the_best_and_the_kept_checkpoints_stay(tmp_path: Path) -> None:
    with RunFolder(tmp_path, keep_last=2) as folder:
        folder.save_checkpoint("sft", 350, fill("sft"), keep=True)
        for step, score in ((5, 0.2), (10, 0.9), (15, 0.5), (20, 0.6), (25, 0.7)):
            folder.save_checkpoint("grpo", step, fill(str(step)), score=score)
    assert [(checkpoint.phase, checkpoint.step) for checkpoint in list_checkpoints(tmp_path)] == [
        ("sft", 350),
        ("grpo", 10),
        ("grpo", 20),
        ("grpo", 25),
    ]


def test_a_checkpoint_whose_removal_was_cut_short_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, **options: object) -> None:
        (path / "weights").unlink()
        raise KeyboardInterrupt

    with RunFolder(tmp_path, keep_last=1) as folder:
        folder.save_checkpoint("grpo", 5, fill("five"))
        monkeypatch.setattr("searchqa_agents.runs.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.save_checkpoint("grpo", 10, fill("ten"))
    monkeypatch.undo()
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [10]
    with RunFolder(tmp_path):
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["grpo-000010"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.save_checkpoint("grpo", 5, fill("old"))
        folder.save_checkpoint("grpo", 5, fill("new"))
    [checkpoint] = list_checkpoints(tmp_path)
    assert (checkpoint.path / "weights").read_text() == "new"


def test_rewinding_drops_exactly_the_lines_behind_the_checkpoint(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.log("grpo", 1, {})
        folder.log("grpo", 2, {})
        checkpoint = folder.save_checkpoint("grpo", 2, fill("two"))
        folder.log("grpo", 3, {})
        folder.rewind(checkpoint)
        assert [line["step"] for line in folder.metrics()] == [1, 2]
        folder.log("grpo", 3, {})
        assert [line["step"] for line in folder.metrics()] == [1, 2, 3]
        folder.rewind(None)
        assert folder.metrics() == []


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    with RunFolder(tmp_path), pytest.raises(RunFolderError, match="in use"):
        RunFolder(tmp_path)
    RunFolder(tmp_path).close()


def test_the_stamp_has_what_a_number_needs() -> None:
    stamp = run_stamp({"dataset": "world", "corpus_sha256": "c0ffee", "top_k": 1}, seed=3, threads=2)
    assert {"dataset": "world", "corpus_sha256": "c0ffee", "top_k": 1, "seed": 3, "threads": 2}.items() <= stamp.items()
    assert stamp["packages"].keys() >= {"searchqa-gym", "gymnasium", "numpy", "torch"}
    assert stamp["commit"] == git_commit()
    json.dumps(stamp)


# -- training runs -----------------------------------------------------------------------------------------------------------------------

SMOKE = ("train", "recipe=smoke", "threads=1", "env.num_worlds=20")


def without_times(folder: Path) -> list[dict[str, float]]:
    return [
        {key: value for key, value in line.items() if not key.startswith(("time/", "search/")) and key != "seconds"}
        for line in read_metrics(folder)
    ]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*SMOKE, f"run_dir={path}"]) == 0
    return path


def test_a_training_run_leaves_everything_it_should(whole_run: Path) -> None:
    names = {path.name for path in whole_run.iterdir()}
    assert names >= {"config.yaml", "stamp.json", "metrics.jsonl", "tensorboard", "checkpoints", "trajectories", "summary.json"}
    assert (whole_run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "before" in (whole_run / "report.html").read_text()
    phases = [(line["phase"], line["step"]) for line in read_metrics(whole_run)]
    assert phases == [
        ("warmup", 1),
        ("warmup", 2),
        *(("sft", i) for i in (1, 2, 3, 4)),
        ("before", 0),
        ("train", 1),
        ("train", 2),
        ("after", 0),
    ]
    summary = json.loads((whole_run / "summary.json").read_text())
    titles = [row[0] for row in summary["rows"]]
    assert "2-hop exact match, sampled (T=1)" in titles
    assert "2-hop exact match, sampled, retriever off" in titles
    assert summary["algorithm"] == "grpo"
    trained = [line for line in read_metrics(whole_run) if line["phase"] == "train"]
    assert summary["tokens"] == sum(line["charts/tokens"] for line in trained) > 0
    assert summary["seconds_training"] == pytest.approx(sum(line["time/rollout"] + line["time/update"] for line in trained), abs=1e-3)


@pytest.mark.parametrize("killed_at", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(8, marks=pytest.mark.slow), 9])
def test_a_run_that_was_stopped_goes_on_to_the_same_end(
    whole_run: Path, tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at any line of its metrics, resumed: the same lines (times apart), none lost, none twice, and the same weights."""
    from safetensors.numpy import load_file

    original, count = RunFolder.log, 0

    def log(self: RunFolder, phase: str, step: int, values: dict[str, float]) -> None:
        nonlocal count
        count += 1
        if count == killed_at + 1:
            raise KeyboardInterrupt
        original(self, phase, step, values)

    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", log)
        assert main([*SMOKE, f"run_dir={path}"]) == 130
    assert main(["train", f"resume={path}"]) == 0
    assert without_times(path) == without_times(whole_run)
    ours, theirs = (load_file(run / "checkpoints" / "train-000002" / "model.safetensors") for run in (path, whole_run))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_folder_of_another_seed_is_refused(whole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMOKE, f"run_dir={whole_run}", "seed=1"]) == 1
    assert "another seed" in capsys.readouterr().err
    assert main(["train", f"resume={whole_run}", "evaluation.questions=7"]) == 1  # after would not be measured as before was
    assert "another evaluation" in capsys.readouterr().err


@pytest.mark.parametrize("begun", ["finished", "stopped"])
def test_other_settings_of_the_training_are_not_told_as_those_of_a_run_that_had_not_them(
    begun: str, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    if begun == "stopped":
        (run / "summary.json").unlink()
    config = (run / "config.yaml").read_bytes()
    assert main([*SMOKE, "algo.learning_rate=1e-5", "algo.mask_environment=false", f"run_dir={run}"]) == 1
    said = capsys.readouterr().err
    assert "another algo.learning_rate and another algo.mask_environment" in said or (
        "another algo.mask_environment and another algo.learning_rate" in said
    )
    assert f"resume={run}" in said
    assert main([*SMOKE, "dry_run=true", "sft.learning_rate=1e-5", f"run_dir={run}"]) == 1
    assert "another sft.learning_rate" in capsys.readouterr().err
    resumed = main(["train", f"resume={run}", "algo.learning_rate=1e-5", "dry_run=true"])
    assert resumed == (1 if begun == "finished" else 0)  # nothing is left to train with it
    assert main([*SMOKE, "algo.steps=1", "dry_run=true", f"run_dir={run}"]) == (1 if begun == "finished" else 0)
    assert main(["train", f"resume={run}", "algo.learning_rate=1e-5", "algo.steps=9", "dry_run=true"]) == 0
    assert (run / "config.yaml").read_bytes() == config


def test_the_stamp_has_the_whole_command(whole_run: Path) -> None:
    assert json.loads((whole_run / "stamp.json").read_text())["command"].startswith("searchqa train recipe=smoke")


def test_a_checkpoint_of_a_run_can_be_evaluated_and_started_from(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = whole_run / "checkpoints" / "sft-000004"
    words = ["agent=lm", f"agent.checkpoint={checkpoint}", "questions=4", "env.num_worlds=1", f"run_dir={tmp_path / 'eval'}"]
    assert main(["eval", *words]) == 0
    assert "exact match" in capsys.readouterr().out
    assert main([*SMOKE, f"start={checkpoint}", f"run_dir={tmp_path / 'train'}"]) == 0
    assert {line["phase"] for line in read_metrics(tmp_path / "train")} == {"before", "train", "after"}


def test_report_of_two_runs_prints_mean_and_interval(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    assert main([*SMOKE, "seed=1", f"run_dir={other}"]) == 0
    assert "induction warm-up (at most): " in capsys.readouterr().err  # of max_steps, before which it mostly ends
    assert main(["report", str(whole_run), str(other)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Mean over 2 runs (seeds 0, 1)" in said
    assert "95% interval" in said
    assert re.search(r"2-hop exact match, greedy, after │ \d\.\d{3} │ -?\d\.\d{3} to \d\.\d{3} │", said), said


SFT = (
    *("sft", "threads=1", "env.num_worlds=20", "env.max_turns=2", "env.max_segment_tokens=12", "sft.steps=3", "sft.batch_size=4"),
    *("model.hidden_size=32", "model.num_heads=2", "model.feed_forward_size=64"),
    *("warmup.target_loss=100.0", "warmup.max_steps=4", "warmup.check_every=2", "warmup.batch_size=4"),
)


def test_two_fine_tunings_give_the_same_bytes_and_nothing_but_the_model(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for name in ("a", "b"):
            assert main([*SFT, f"run_dir={tmp_path / name}"]) == 0
    finally:
        os.umask(before)
    folders = [tmp_path / name / "model" for name in ("a", "b")]
    names = ["config.json", "generation_config.json", "model.safetensors", "searchqa_tokenizer.json"]
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == names
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in folder.iterdir())
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


@pytest.mark.slow
def test_two_fine_tunings_in_processes_of_their_own_give_the_same_bytes(tmp_path: Path) -> None:
    """With the full model, as `make checkpoint` runs it, only shorter."""
    words = ["warmup.max_steps=40", "warmup.target_loss=100.0", "warmup.check_every=20", "sft.steps=20", "threads=1", "seed=3"]
    for name in ("a", "b"):
        code = "import sys; from searchqa_agents.cli import main; sys.exit(main(sys.argv[1:]))"
        subprocess.run([sys.executable, "-c", code, "sft", *words, f"run_dir={tmp_path / name}"], check=True, timeout=600)
    ours, theirs = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert ours == theirs
