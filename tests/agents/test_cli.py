"""The command line: help without loading anything, plain messages, runs configured by Hydra."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from searchqa_agents.cli import COMMANDS, main

CONSOLE = Path(sysconfig.get_path("scripts")) / "searchqa"
WORLD = ("env=world", "env.num_worlds=2", "threads=1")


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from searchqa_agents import cli; assert cli.main(['--help']) == 0; assert cli.main(['eval', '--help']) == 0; "
        "heavy = {'torch', 'hydra', 'numpy', 'transformers', 'gymnasium'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"searchqa {command}" in capsys.readouterr().out


def test_help_tells_groups_and_keys_of_the_yaml_files(capsys: pytest.CaptureFixture[str]) -> None:
    main(["eval", "--help"])
    text = capsys.readouterr().out
    assert "env=2wikimultihopqa|bamboogle|custom|hotpotqa|musique|nq|popqa|triviaqa|world" in text
    assert "agent=direct|lm|oracle|search_once" in text
    assert "samples=1" in text
    main(["train", "--help"])
    text = capsys.readouterr().out
    assert "algo.learning_rate=0.0005" in text
    assert "peak learning rate" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert version("searchqa-gym") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["evl"], ["no command 'evl'", "Did you mean eval"]),
        (["eval", "env.topk=5"], ["'env.topk'", "env.top_k"]),
        (["eval", "questons=5"], ["'questons'", "questions"]),
        (["eval", "env=hotpot"], ["env=hotpot", "env=hotpotqa"]),
        (["eval", "env.top_k=many"], ["env.top_k", "many"]),
        (["eval", "env=hotpotqa", "env.preset=easy"], ["env.preset", "another choice of env"]),
        (["eval", "env.top_k"], ["env.top_k"]),
        (["train", "algo.lr=0.1"], ["algo.lr", "algo.learning_rate"]),
        (["train", "algo.learning_rate=fast"], ["algo.learning_rate", "fast"]),
        (["play", "--qestion-id", "5"], ["searchqa play --help"]),
        (["play", "seed=3"], ["env=NAME"]),
        (["report"], ["report needs"]),
    ],
)
def test_a_wrong_line_is_explained_with_exit_code_2(
    line: list[str], said: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in said), error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["eval", "env=custom", "env.questions=missing.jsonl"], "missing.jsonl"),
        (["eval", "agent=lm", "agent.checkpoint=./nowhere"], "no folder ./nowhere"),
        (["eval", "env=custom", "env.questions=questions.jsonl", "agent=oracle"], "gold chain"),
        (["eval", "resume=nowhere"], "not the folder of a run"),
        (["report", "nowhere"], "not the folder of a run"),
        (["play", "--question-id", "nobody"], "nobody"),
        (["train", "recipe=smoke", "algo.kl_estimator=k7"], "k7"),
        (["train", "recipe=smoke", "evaluation.split=spring"], "spring"),
        (["train", "recipe=smoke", "demonstrations=search_twice"], "search_twice"),
    ],
)
def test_a_run_that_cannot_be_says_why_with_exit_code_1(
    line: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"id": "q1", "question": "Who?", "golden_answers": ["Ada"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "p1", "title": "Ada", "text": "A person."}) + "\n")
    if "env.questions=questions.jsonl" in line:
        line = [*line, "env.corpus=corpus.jsonl"]
    assert main(line) == 1
    error = capsys.readouterr().err
    assert error.startswith("searchqa: ")
    assert said in error
    assert "Traceback" not in error
    assert "Error executing job" not in error


def test_debug_shows_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        main(["eval", "--debug", "env=custom", "env.questions=missing.jsonl", "env.corpus=missing.jsonl"])


@pytest.mark.parametrize(
    "line", [["eval", *WORLD, "agent=oracle", "questions=4", "run_dir=run"], ["play", "env.num_worlds=1"]], ids=lambda line: line[0]
)
def test_commands_without_a_language_model_load_no_torch(line: list[str], tmp_path: Path) -> None:
    code = (
        f"import sys; from searchqa_agents.cli import main; assert main({line}) == 0; "
        "heavy = {'torch', 'transformers', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], input="answer: x", capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr


def test_eval_measures_the_oracle_at_one_and_leaves_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *WORLD, "agent=oracle", f"run_dir={tmp_path / 'run'}", "save=5"]) == 0
    said = capsys.readouterr()
    assert "exact match" in said.out
    assert "corpus" in said.out
    assert "96/96" in said.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["em"] == 1.0
    assert summary["groups"]["hops=2"]["searches"] == 2.0
    assert summary["metrics"]["title_recall_all"] == 1.0
    stamp = json.loads((tmp_path / "run" / "stamp.json").read_text())
    assert stamp["split"] == "test"
    assert stamp["seed"] == 0
    from searchqa_agents.trajectory import load_trajectories

    assert len(load_trajectories(tmp_path / "run" / "trajectories" / "eval.jsonl.gz")) == 5


def test_eval_leaves_out_what_a_set_does_not_define(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "q1", "question": "Who is Ada?", "golden_answers": ["Ada"]}) + "\n")
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": "p1", "title": "Ada", "text": "Ada is a person."}) + "\n")
    files = [f"env.questions={tmp_path / 'q.jsonl'}", f"env.corpus={tmp_path / 'c.jsonl'}"]
    assert main(["eval", "env=custom", *files, "agent=search_once", f"run_dir={tmp_path / 'run'}"]) == 0
    text = capsys.readouterr().out
    assert "supporting titles" not in text
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]["em"] == 1.0


def test_every_argument_of_the_environment_is_a_key_of_every_env_option() -> None:
    import inspect

    from omegaconf import OmegaConf

    from searchqa_agents.config_help import conf_dir, options
    from searchqa_envs.configuration import CUSTOM_OPTIONS, WORLD_OPTIONS, build_rules

    common = set(inspect.signature(build_rules).parameters) - {"dataset", "options"}
    for name in options("env"):
        keys = set(OmegaConf.load(conf_dir() / "env" / f"{name}.yaml")) - {"defaults", "id"}
        own = {"world": WORLD_OPTIONS, "custom": CUSTOM_OPTIONS}.get(name, ())
        assert keys == common | set(own), name


def test_overrides_reach_the_environment(tmp_path: Path) -> None:
    words = ["env.top_k=2", "env.dialect=r1-searcher", "env.reward=f1", "env.max_turns=3", "env.retriever={name: bm25, k1: 0.9, b: 0.4}"]
    assert main(["eval", *WORLD, *words, "questions=2", f"run_dir={tmp_path / 'run'}"]) == 0
    stamp = json.loads((tmp_path / "run" / "stamp.json").read_text())
    assert (stamp["top_k"], stamp["dialect"], stamp["reward"]["name"], stamp["max_turns"]) == (2, "r1-searcher", "f1", 3)
    assert stamp["retriever"]["k1"] == 0.9


@pytest.mark.parametrize("line", [["eval", "env=hotpotqa", "agent=search_once"], ["train", "recipe=smoke"], ["sft"]])
def test_dry_run_prints_the_configuration_and_leaves_nothing(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*line, "dry_run=true"]) == 0
    text = capsys.readouterr().out
    assert "seed: 0" in text
    assert "Would " in text
    assert not list(tmp_path.iterdir())


def test_multirun_makes_a_folder_for_each_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "-m", *WORLD, "questions=4", "agent=direct,oracle"]) == 0
    [sweep] = (tmp_path / "runs").iterdir()
    found = [json.loads((sweep / number / "summary.json").read_text())["metrics"]["em"] for number in ("0", "1")]
    assert found == [0.0, 1.0]


def test_config_dir_adds_options_of_your_own(tmp_path: Path) -> None:
    (tmp_path / "conf" / "env").mkdir(parents=True)
    (tmp_path / "conf" / "env" / "mine.yaml").write_text("defaults: [world, _self_]\nnum_worlds: 1\nhops: 2\n")
    assert main(["eval", "--config-dir", str(tmp_path / "conf"), "env=mine", f"run_dir={tmp_path / 'run'}"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]["searches"] == 2.0


def test_the_console_entry_point_ends_with_its_exit_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [CONSOLE, "eval", *WORLD, "questions=4", f"run_dir={tmp_path / 'run'}"], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "1.000" in done.stdout
    assert subprocess.run([CONSOLE, "nothing"], capture_output=True, timeout=60).returncode == 2


@pytest.mark.data
@pytest.mark.parametrize("name", ["hotpotqa", "2wikimultihopqa", "musique", "bamboogle", "nq", "triviaqa", "popqa"])
def test_search_once_plays_every_question_of_the_real_sets(name: str, tmp_path: Path) -> None:
    """And finds the supporting titles as often as plain bm25s did, where the set knows them."""
    data = Path(os.environ["SEARCHQA_DATA"])
    reference = json.loads((data / "bm25_reference.json").read_text())[name]
    with gzip.open(next((data / name).glob("questions.jsonl*")), "rt", encoding="utf-8") as file:
        rows = sum(1 for _ in file)
    assert (
        main(["eval", f"env={name}", "env.split=all", "env.top_k=3", "agent=search_once", f"run_dir={tmp_path / 'run'}", "threads=1"]) == 0
    )
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert (metrics["questions"], metrics["searches"], metrics["backend_errors"]) == (rows, 1.0, 0.0)
    for kind in ("all", "any", "mean"):
        assert metrics.get(f"title_recall_{kind}") == (
            pytest.approx(reference[f"{kind}@3"], abs=0.005) if f"{kind}@3" in reference else None
        )
