"""Weights & Biases gets the numbers of metrics.jsonl, read back from its own files; TensorBoard too; and neither can end a training."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from searchqa_agents import wandb_log
from searchqa_agents.cli import main
from searchqa_agents.runs import RunFolder
from searchqa_agents.wandb_log import WandbLog, WandbSettings, run_id, wandb_settings
from searchqa_envs.errors import ConfigurationError

BLOCK = 32768


def records(file: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: W&B's header of 7 bytes, then the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, data = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        if place + 7 + length > len(content):
            return  # it is being written
        data += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = Record()
            record.ParseFromString(data)
            data = b""
            yield record


def whole(file: Path) -> list[Any]:
    """The records of a run that has ended: W&B's own process writes the last of them a moment later."""
    for _ in range(300):
        found = list(records(file))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{file} was not finished")


def history(file: Path) -> list[dict[str, Any]]:
    """What was logged, in order, of values that are no files."""
    lines = [record.history.item for record in whole(file) if record.WhichOneof("record_type") == "history"]
    return [{item.nested_key[0]: json.loads(item.value_json) for item in line if len(item.nested_key) == 1} for line in lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny training that logged to W&B, without a network."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    line = [
        "recipe=smoke",
        f"run_dir={folder}",
        "threads=1",
        "evaluation.questions=2",
        "rollouts_every=2",
        "wandb.mode=offline",
        "wandb.tags=[small]",
    ]
    assert main(["train", *line]) == 0
    return folder


def wandb_file(folder: Path) -> Path:
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    return file


def test_wandb_has_the_numbers_of_the_metrics_file(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in history(wandb_file(run)) if any(name.endswith("/seconds") for name in line)]
    assert {line["phase"] for line in lines} == {"warmup", "sft", "before", "train", "after"}
    assert len(logged) == len(lines)
    for line, values in zip(lines, logged, strict=True):
        phase = line.pop("phase")
        assert {f"{phase}/{name}": value for name, value in line.items()} == {
            name: value for name, value in values.items() if name.startswith(f"{phase}/")
        }
    steps = [line["_step"] for line in history(wandb_file(run))]
    assert steps == sorted(set(steps))


def test_each_phase_has_its_own_steps_and_the_run_its_settings_samples_table_and_page(run: Path) -> None:
    found = whole(wandb_file(run))
    metrics = {
        record.metric.glob_name or record.metric.name: record.metric.step_metric
        for record in found
        if record.WhichOneof("record_type") == "metric"
    }
    assert metrics["train/*"] == "train/step"
    assert metrics["sft/*"] == "sft/step"
    [begun] = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["algo"]["steps"] == 2
    assert config["stamp"] == json.loads((run / "stamp.json").read_text())
    assert (begun.run_id, begun.project, begun.display_name, list(begun.tags)) == (run_id(run), "searchqa-gym", "mine", ["small"])
    tables = {file.name.split("_")[0]: json.loads(file.read_text()) for file in run.glob("wandb/*/files/media/table/**/*.json")}
    assert tables["summary"]["columns"] == ["held-out questions", "before", "after"]
    assert tables["summary"]["data"] == json.loads((run / "summary.json").read_text())["rows"]
    assert tables["samples"]["columns"][:3] == ["step", "question", "golden answers"]
    assert tables["samples"]["data"][0][0] == 2
    artifacts = {record.artifact.name for record in found if record.WhichOneof("record_type") == "artifact"}
    assert f"report-{run_id(run)}" in artifacts


def test_tensorboard_has_every_phase_the_settings_a_sample_and_what_was_measured(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for folder in (run / "tensorboard").iterdir():
        found[folder.name] = EventAccumulator(str(folder), size_guidance={"tensors": 0})
        found[folder.name].Reload()
    assert set(found) == {"warmup", "sft", "before", "train", "after", "run"}
    for phase, events in found.items():
        own = [line for line in lines if line["phase"] == phase]
        for name in events.Tags()["scalars"] if own else ():
            expected = {line["step"]: line[name] for line in own if name in line}
            assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(expected)
    [sample] = found["train"].Tensors("sample episode/text_summary")
    text = sample.tensor_proto.string_val[0].decode()
    assert sample.step == 2
    assert text.startswith("    question: ")
    assert "[policy, turn 1]" in text
    texts = {
        name: found["run"].Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("config.yaml", "stamp.json", "summary")
    }
    assert "    seed: 0" in texts["config.yaml"]
    assert "before | after" in texts["summary"]
    measured = {name.removeprefix("measured/") for name in found["run"].Tags()["scalars"]}
    assert measured == set(json.loads((run / "after.json").read_text()))
    assert "_hparams_/session_start_info" in found["run"].summary_metadata


def begun_folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.yaml").write_text("seed: 0\n")
    (path / "stamp.json").write_text('{"seed": 0}\n')
    return path


def test_a_run_that_goes_on_keeps_its_id_and_its_steps_go_up(tmp_path: Path) -> None:
    folder = begun_folder(tmp_path / "run")
    for number in range(2):
        if number:
            time.sleep(1.1)  # W&B names its folders by the second
        log = WandbLog(folder, WandbSettings(mode="offline", group="mine"), group="sweep")
        for step in (1, 2):  # the second time: steps taken again
            log.log("train", step, {"charts/em": 0.1 * step + number})
        log.close(failed=number == 0)
    first, second = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert first.name == second.name == f"run-{run_id(folder)}.wandb"
    steps = [[line["_step"] for line in history(file)] for file in (first, second)]
    assert steps[0] == [0, 1]
    assert min(steps[1]) > max(steps[0])
    assert [line["train/step"] for line in history(second)] == [1, 2]
    [begun] = [record.run for record in whole(first) if record.WhichOneof("record_type") == "run"]
    assert begun.run_group == "mine"
    assert not list(folder.glob(".partial*"))


def test_a_failure_of_wandb_is_one_warning_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import wandb

    with RunFolder(tmp_path / "run") as folder:
        begun_folder(folder.path)
        folder.watchers.append(WandbLog(folder.path, WandbSettings(mode="offline")))
        folder.log("train", 1, {"charts/em": 0.1})
        wandb.teardown()  # as if its process had died
        with caplog.at_level(logging.WARNING):
            folder.log("train", 2, {"charts/em": 0.2})
            folder.log("train", 3, {"charts/em": 0.3})
    assert [line["step"] for line in folder.metrics()] == [1, 2, 3]
    assert sum("the run goes on" in record.message for record in caplog.records) == 1


def test_a_server_that_does_not_answer_leaves_a_run_with_files_and_a_warning(tmp_path: Path) -> None:
    folder = begun_folder(tmp_path / "run")
    code = (
        "import logging, sys; from pathlib import Path; from searchqa_agents.wandb_log import WandbLog, WandbSettings\n"
        "logging.basicConfig(level='WARNING')\n"
        f"log = WandbLog(Path({str(folder)!r}), WandbSettings(timeout=1))\n"
        "log.log('train', 1, {'charts/em': 0.5}); log.close(False); print('went on', flush=True)\n"
        "import os; os._exit(0)"
    )
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        environment = {
            **os.environ,
            "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "WANDB_API_KEY": "a" * 40,
            "WANDB_ERROR_REPORTING": "false",
        }
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "went on"
    assert "cannot be reached" in done.stderr
    assert wandb_file(folder).is_file()  # W&B's own process is left in the middle: how much of it is written differs


def test_a_missing_key_is_an_error_before_the_run(tmp_path: Path) -> None:
    folder = begun_folder(tmp_path / "run")
    code = (
        "from pathlib import Path; from searchqa_agents.wandb_log import WandbLog, WandbSettings\n"
        f"WandbLog(Path({str(folder)!r}), WandbSettings(timeout=1))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "none"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert "ConfigurationError: W&B: No API key configured" in done.stderr
    assert "wandb.mode=offline" in done.stderr


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("yes", "true, null, or a mapping"),
        ({"projct": "x"}, "wandb.projct is not known"),
        ({"mode": "sometimes"}, "wandb.mode must be one of"),
        ({"tags": "one"}, "wandb.tags must be a list"),
        ({"project": ""}, "wandb.project must be a word"),
        ({"project": None}, "wandb.project must be a word"),
        ({"timeout": 0}, "wandb.timeout must be"),
        ({"report": "no"}, "wandb.report must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(value: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        wandb_settings(value)


def test_settings_that_can_be() -> None:
    assert wandb_settings(None) is None
    assert wandb_settings(False) is None
    assert wandb_settings(True) == WandbSettings()
    assert wandb_settings({"project": "p", "mode": "offline", "tags": ["a"]}) == WandbSettings("p", mode="offline", tags=["a"])


def test_a_missing_library_is_named_before_the_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wandb_log.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'searchqa-gym\[wandb\]'"):
        wandb_settings(True)


def test_wandb_is_loaded_only_when_asked_for() -> None:
    code = "import sys, searchqa_agents.watching; print(sorted({'wandb', 'minari', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
