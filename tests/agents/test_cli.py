"""The command line: help without loading anything, plain messages, runs configured by Hydra."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from searchqa_agents.cli import COMMANDS, HYDRA_COMMANDS, main

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
    assert "env=2wikimultihopqa|bamboogle|custom|hotpotqa|musique|nq|nq_hotpotqa|popqa|triviaqa|world" in text
    assert "agent=direct|lm|oracle|search_once" in text
    assert "samples=1" in text
    main(["train", "--help"])
    text = capsys.readouterr().out
    assert "algo.learning_rate=0.0005" in text
    assert "peak learning rate" in text
    assert "algo.value_clip_coef=0.5" in text
    assert "is algo=grpo with normalise_std=false" in text


def test_help_tells_every_registered_algorithm_and_each_of_its_own_keys(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import fields

    import searchqa_agents.algorithms  # noqa: F401, registers them
    from searchqa_agents.algorithm import ALGORITHMS, AlgorithmConfig

    main(["train", "--help"])
    text = capsys.readouterr().out
    common = {f.name for f in fields(AlgorithmConfig)}
    for name, algorithm in ALGORITHMS.items():
        if algorithm.config.__module__.startswith("searchqa_agents."):
            assert re.search(rf"^  algo={name} ", text, re.MULTILINE), name
            assert all(f"algo.{f.name}=" in text for f in fields(algorithm.config) if f.name not in common)


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
        (["train", "recipe=smoke", "algo=sft", "algo.demonstrations=search_twice"], "search_twice"),
        (["train", "recipe=smoke", "algo.name=ppo"], "write algo=ppo"),
        (["train", "recipe=smoke", "plugins=[nowhere.py]"], "There is no plugin nowhere.py"),
        (["train", "recipe=smoke", "plugins=[no_such_module]"], "There is no module no_such_module"),
        (["train", "recipe=smoke", "plugins=nowhere.py"], "plugins must be a list"),
        (["train", "recipe=smoke", "plugins=[raises.py]"], "raises.py cannot be imported: ZeroDivisionError: division by zero."),
        (["train", "recipe=smoke", "plugins=[imports.py]"], "imports.py cannot be imported: ModuleNotFoundError"),
        (["train", "recipe=smoke", "plugins=[clashes.py]"], "clashes.py registers the name 'grpo', which another algorithm has"),
        (["train", "recipe=smoke", "plugins=[hidden.py]"], "hidden.py registers the name 'dapo', which another algorithm has"),
        (["train", "recipe=smoke", "dtype=float16"], "dtype must be float32 or bfloat16"),
        (
            ["train", "recipe=smoke", "start=shipped", "lora={ranks: 3}"],
            "lora must be a mapping with some of ['rank', 'alpha', 'target_modules']",
        ),
        (["train", "recipe=smoke", "lora.rank=3"], "lora trains adapters of a checkpoint's model"),
        (["train", "recipe=smoke", "alarms.window=0"], "alarms.window must be at least 1"),
        (["train", "recipe=smoke", "keep_last=0"], "keep_last must be at least 1"),
        (["train", "recipe=smoke", "algo.group_size=0"], "group_size must be at least 1"),
        (["train", "recipe=smoke", "parallel=ddp"], "torchrun"),
    ],
)
def test_a_run_that_cannot_be_says_why_with_exit_code_1(
    line: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "imports.py").write_text("import no_such_module\n")
    clashes = "from searchqa_agents.algorithm import Algorithm, register\nfrom searchqa_agents.algorithms.grpo import *\n"
    (tmp_path / "clashes.py").write_text(clashes + "register(Algorithm('grpo', GRPOConfig, advantages, loss))\n")
    (tmp_path / "hidden.py").write_text(clashes + "register(Algorithm('dapo', GRPOConfig, advantages, loss))\n")
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
        "heavy = {'torch', 'transformers'} & set(sys.modules); assert not heavy, heavy"
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

    from hydra import compose, initialize_config_module

    from searchqa_agents.config_help import options
    from searchqa_agents.settings import register
    from searchqa_envs.configuration import CUSTOM_OPTIONS, WORLD_OPTIONS, build_rules

    register()
    common = set(inspect.signature(build_rules).parameters) - {"dataset", "options"}
    for name in options("env"):
        with initialize_config_module("searchqa_conf", version_base="1.3"):
            keys = set(compose("play", overrides=[f"env={name}"]).env) - {"id"}
        own = {"world": WORLD_OPTIONS, "custom": CUSTOM_OPTIONS, "nq_hotpotqa": CUSTOM_OPTIONS}.get(name, ())
        assert keys == common | set(own), name


def test_overrides_reach_the_environment(tmp_path: Path) -> None:
    words = ["env.top_k=2", "env.dialect=r1-searcher", "env.reward=f1", "env.max_turns=3", "env.retriever={name: bm25, k1: 0.9, b: 0.4}"]
    assert main(["eval", *WORLD, *words, "questions=2", f"run_dir={tmp_path / 'run'}"]) == 0
    stamp = json.loads((tmp_path / "run" / "stamp.json").read_text())
    assert (stamp["top_k"], stamp["dialect"], stamp["reward"]["name"], stamp["max_turns"]) == (2, "r1-searcher", "f1", 3)
    assert stamp["retriever"]["k1"] == 0.9


@pytest.mark.parametrize(
    ("word", "where", "expected"),
    [
        ("env.hops=[1,2]", ("hops",), [1, 2]),
        ("env.hops=2", ("hops",), [2]),
        ("env.retriever={name: bm25, k1: 0.7}", ("retriever", "k1"), 0.7),
        ("env.retriever.name=random", ("retriever", "retriever"), "random"),
        ("env.reward=[em, r1_searcher_stage1]", ("reward", "name"), "em+r1_searcher_stage1"),
        ("env.reward={name: search_r1_format, structure_score: 0.3}", ("reward", "parts", 0, "options", "structure_score"), 0.3),
        ("env.reward_weights={em:2}", ("reward", "weights"), {"em": 2.0}),
        ("env.reward_weights.em=2", ("reward", "weights"), {"em": 2.0}),
    ],
)
def test_lists_and_mappings_on_the_line_reach_the_environment(word: str, where: tuple[str, ...], expected: object, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["eval", *WORLD, word, "agent=direct", "questions=1", f"run_dir={run}"]) == 0
    value = json.loads((run / "stamp.json").read_text())
    for key in where:
        value = value[key]
    assert value == expected


def test_reward_weights_multiply_the_reward(tmp_path: Path) -> None:
    words = ["env.reward=search_r1_format", "env.reward_weights={em: 1.0, structure_format: 0.5}", "env.reward_weights.em=3"]
    assert (
        main(["eval", *WORLD, *words, "agent=direct", "questions=2", "env.reward_weights.structure_final=10", f"run_dir={tmp_path}"]) == 0
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["metrics"]["reward"] == pytest.approx(1.0)  # wrong, invalid, an answer: final_score 0.1, ten times


def test_play_takes_the_same_overrides() -> None:
    from searchqa_agents.play import make_env

    env = make_env(["env.num_worlds=1", "env.reward_weights.em=2", "env.hops=[2]"])
    assert env.unwrapped.rules.reward.stamp()["weights"] == {"em": 2.0}


MINE = """
from dataclasses import dataclass
from searchqa_agents.algorithm import Algorithm, AlgorithmConfig, register
from searchqa_agents.algorithms import grpo

@dataclass
class MyConfig(grpo.GRPOConfig):
    steps: int = 1
    factor: float = 1.0

def advantages(batch, config):
    batch = grpo.advantages(batch, config)
    return batch._replace(advantages=config.factor * batch.advantages)

register(Algorithm("mine", MyConfig, advantages, grpo.loss))
"""


def known_algorithms() -> dict[str, object]:
    import searchqa_agents.algorithms  # noqa: F401, registers them
    from searchqa_agents.algorithm import ALGORITHMS

    return {name: algorithm for name, algorithm in ALGORITHMS.items() if name != "mine"}


SMOKE = ("recipe=smoke", "threads=1", "env.num_worlds=8", "start=shipped", "evaluation.questions=4", "algo.steps=1", "env.max_turns=3")


def test_an_algorithm_of_ones_own_is_trained_resumed_and_has_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("searchqa_agents.algorithm.ALGORITHMS", dict(known_algorithms()))
    (tmp_path / "my_algorithm.py").write_text(MINE)
    words = ["train", *SMOKE, "plugins=[my_algorithm.py]", "algo=mine"]
    assert main([*words[:-1], "algo=mein"]) == 2
    assert "Did you mean algo=mine?" in capsys.readouterr().err
    assert main([*words, "algo.factr=2"]) == 2
    assert "algo.factor" in capsys.readouterr().err
    assert main([*words, "algo.factor=many"]) == 2
    assert "algo.factor" in capsys.readouterr().err
    assert main([*words, "algo.factor=2", "dry_run=true"]) == 0
    assert "evaluation, 1 steps of MINE, evaluation" in capsys.readouterr().out
    assert main([*words, "algo.factor=2", "run_dir=run"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["algorithm"] == "mine"
    assert main(["train", "resume=run", "algo.steps=2"]) == 0  # the plugin is known from the saved line
    assert (tmp_path / "run" / "checkpoints" / "train-000002").is_dir()


@pytest.mark.parametrize("algorithm", sorted(known_algorithms()))
def test_every_algorithm_can_be_chosen_by_its_name(algorithm: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMOKE, f"algo={algorithm}", "--cfg", "job"]) == 0
    assert f"name: {algorithm}\n" in capsys.readouterr().out


def test_the_jobs_of_a_long_sweep_are_named_by_what_differs() -> None:
    from searchqa_agents.hydra_app import _with_sweep_folders

    algorithms = "algo=" + ",".join(["sft", *sorted(known_algorithms())])
    assert len(algorithms) > 60
    assert "hydra.sweep.subdir=${hydra.job.override_dirname}" in _with_sweep_folders(["-m", algorithms, "seed=0,1"])
    assert not any("subdir" in word for word in _with_sweep_folders(["-m", "env.data_dir='a/b','c/d'"]))


def test_supervised_fine_tuning_has_the_same_measures_and_is_compared_in_a_sweep_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line for all; a run that fails stops none of the others; the same line again does what is left; the report reads the folder."""
    sweep = tmp_path / "sweep"
    line = ["train", "-m", *SMOKE, "algo=grpo,sft", "seed=0,1", f"run_dir={sweep}"]
    blocked = sweep / "algo-grpo_seed-1"
    blocked.mkdir(parents=True)
    (blocked / "config.yaml").write_text("seed: 17\n")
    assert main(line) == 1
    assert "another seed" in capsys.readouterr().err
    names = {"algo-grpo_seed-0", "algo-grpo_seed-1", "algo-sft_seed-0", "algo-sft_seed-1"}
    assert {path.name for path in sweep.iterdir() if path.is_dir()} == {*names, "jobs"}
    finished = {name: (sweep / name / "summary.json").read_text() for name in names - {blocked.name}}
    (blocked / "config.yaml").unlink()
    assert main([*line, "sft.learning_rate=1e-5"]) == 1  # finished runs would be told as trained with it
    assert "another sft.learning_rate" in capsys.readouterr().err
    shutil.rmtree(blocked)
    assert main(["train", f"resume={sweep}"]) == 0
    assert capsys.readouterr().out.count("is finished: nothing to do") == 3
    assert {name: (sweep / name / "summary.json").read_text() for name in finished} == finished
    assert main(["report", str(sweep)]) == 0
    assert "By algorithm: 2-hop held-out questions" in capsys.readouterr().out
    assert (sweep / "comparison.png").is_file()
    assert main(["report", "--markdown", str(sweep)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in table] == ["algorithm", "---", "grpo", "sft"]
    befores = {row.split("|")[2].strip() for row in table[2:]}
    assert len(befores) == 1  # both begin with the same checkpoint and are asked the same questions


@pytest.mark.slow
def test_the_joblib_launcher_trains_an_algorithm_of_ones_own_beside_ours(tmp_path: Path) -> None:
    (tmp_path / "my_algorithm.py").write_text(MINE)
    words = [*SMOKE, "plugins=[my_algorithm.py]", "algo=grpo,mine", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "run_dir=sweep"]
    done = subprocess.run([CONSOLE, "train", "-m", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    algorithms = {json.loads(file.read_text())["algorithm"] for file in tmp_path.glob("sweep/*/summary.json")}
    assert algorithms == {"grpo", "mine"}


def example_lines(command: str) -> list[list[str]]:
    texts = [COMMANDS[command].help, _top_level_help()]
    lines = [re.split(r"  +", line.strip())[0] for text in texts for line in text.splitlines() if line.startswith(f"  searchqa {command}")]
    return [shlex.split(line)[1:] for line in lines]


def _top_level_help() -> str:
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        main(["--help"])
    return written.getvalue()


@pytest.mark.parametrize("command", HYDRA_COMMANDS)
def test_every_example_of_the_help_would_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from searchqa_agents.settings import register, register_training

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEARCHQA_DATA", raising=False)
    monkeypatch.setenv("SEARCHQA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "overrides.yaml").write_text("[]\n")
    register()
    register_training()
    with initialize_config_module("searchqa_conf", version_base="1.3"):
        begun = compose("train")
        begun = {"env": begun.env, "seed": 0, "start": "nothing", "evaluation": begun.evaluation}
        OmegaConf.save(begun, tmp_path / "runs" / "mine" / "config.yaml")
    (tmp_path / "my_algorithm.py").write_text(MINE)
    monkeypatch.setattr("searchqa_agents.algorithm.ALGORITHMS", dict(known_algorithms()))
    lines = example_lines(command)
    assert len(lines) >= 2
    quick = [] if command in ("eval", "bench") else ["sft.batch_size=2", "sft.num_worlds=1"]
    for line in lines:
        here = [re.sub(r"=runs/\.\.\./.*", "=shipped", word) for word in line]
        assert main([*here, *quick, "dry_run=true", "threads=1"]) == 0, line


def test_every_example_of_play_composes() -> None:
    from hydra import compose, initialize_config_module

    from searchqa_agents.settings import register

    register()
    lines = example_lines("play")
    assert len(lines) >= 2
    for line in lines:
        with initialize_config_module("searchqa_conf", version_base="1.3"):
            compose("play", overrides=line[1:])


@pytest.mark.parametrize("word", ["questions=0", "questions=-3", "samples=0", "num_envs=0", "save=-1"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_counts_below_one_are_refused(
    word: str, dry_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *WORLD, "run_dir=run", word, f"dry_run={dry_run}"]) == 1
    key, _, value = word.partition("=")
    assert f"searchqa: {key} must be at least" in (said := capsys.readouterr().err)
    assert f"got {value}." in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["train", "env=hotpotqa"], "Use env=world, start=<checkpoint>, or demonstrations=direct or"),
        (["sft", "env=musique"], "gold chain"),
        (["eval", "env=nq", "agent=oracle"], "gold chain"),
        (["train", "start=runs/nope"], "runs/nope holds no model"),
        (["train", "start=./runs/nowhere"], "no folder ./runs/nowhere"),
        (["train", "start=shipped", "env.tokenizer=byte"], "trained with tokenizer"),
        (["train", "recipe=smoke", "evaluation.split=spring"], "spring"),
        (["train", "recipe=smoke", "evaluation.questions=0"], "evaluation.questions must be at least 1"),
        (["train", "recipe=smoke", "algo.kl_estimator=k7"], "k7"),
        (["sft", "demonstrations=search_twice"], "search_twice"),
        (["sft", "env.preset=brutal"], "brutal"),
        (["eval", "agent=lm", "agent.checkpoint=./nowhere"], "no folder ./nowhere"),
        (["eval", "env=nq", "env.data_dir=nothing", "agent=direct"], "nothing"),
        (["eval", "env=custom", "env.questions=missing.jsonl"], "missing.jsonl"),
        (["eval", "run_dir=runs/other"], "another seed"),
        (["train", "run_dir=runs/other"], "another seed"),
    ],
)
def test_a_dry_run_refuses_what_a_real_start_refuses(
    line: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEARCHQA_DATA", raising=False)
    monkeypatch.setenv("SEARCHQA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "runs" / "nope").mkdir(parents=True)
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "config.yaml").write_text("seed: 17\n")
    before = sorted(tmp_path.rglob("*"))
    for words in ([*line, "dry_run=true"], line):
        assert main(words) == 1, words
        shown = capsys.readouterr()
        assert said in shown.err
        assert "Would" not in shown.out
        if "dry_run=true" in words:
            assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_downloads_nothing_and_says_what_a_real_one_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEARCHQA_DATA", raising=False)
    monkeypatch.setenv("SEARCHQA_CACHE", str(tmp_path / "cache"))
    assert main(["train", "env=hotpotqa", "start=shipped", "dry_run=true"]) == 0
    assert "Would download hotpotqa, then run" in capsys.readouterr().out


@pytest.mark.parametrize("line", [["eval", "env=world", "agent=lm"], ["train", "recipe=smoke"], ["sft"]])
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
    found = [json.loads((sweep / f"agent-{name}" / "summary.json").read_text())["metrics"]["em"] for name in ("direct", "oracle")]
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


@pytest.mark.parametrize("package", ["torch", "hydra"])
def test_a_package_of_the_extra_that_is_missing_is_named_with_the_way_out(package):
    code = f"import sys; sys.modules[{package!r}] = None; from searchqa_agents import cli; sys.exit(cli.main(['train', 'start=shipped']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith(f"This needs {package}, which is not installed: pip install 'searchqa-gym[agents]'.\n")


def test_a_device_that_is_not_there_is_named_before_anything_is_loaded(capsys):
    assert main(["train", "start=shipped", "device=nowhere", "dry_run=true"]) == 1
    assert "device=nowhere is not to be had here" in capsys.readouterr().err
