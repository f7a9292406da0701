"""The whole programs in the README and in docs/bring_your_own.md run as they stand, and learn; the README names all that there is."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from searchqa_envs import ENV_IDS
from searchqa_envs.world import PRESETS

ROOT = Path(__file__).resolve().parents[2]


def programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


PROGRAMS = programs("docs/bring_your_own.md")


def run(*words: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def trained(folder: Path, *words: str) -> str:
    (folder / "cispo.py").write_text(PROGRAMS[0], encoding="utf-8")
    line = "plugins=[cispo.py] algo=cispo start=shipped threads=1 run_dir=run"
    return run("-m", "searchqa_agents.cli", "train", *line.split(), *words, folder=folder)


def test_the_first_program_of_the_readme_runs_and_prints_what_it_says(tmp_path: Path) -> None:
    first = programs("README.md")[0]
    (tmp_path / "first.py").write_text(first, encoding="utf-8")
    printed = run("first.py", folder=tmp_path).strip()
    assert f'print(reward, info["turn_record"].loss_mask.sum(), len(observation))  # {printed}: ' in first


def test_the_readme_names_all_environments_algorithms_presets_and_extras() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    algorithms = [file.stem for file in (ROOT / "conf" / "searchqa_conf" / "algo").glob("*.yaml")]
    for section, names in (("Environments", ENV_IDS), ("Algorithms, and your own", algorithms), ("Install", extras)):
        text = readme.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        assert not [name for name in names if f"`{name}`" not in text]
    [world] = [line for line in readme.splitlines() if line.startswith("| `SearchQA-World-v0` |")]
    assert re.findall(r"(\w+) \(", world) == list(PRESETS)


def test_every_trap_names_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "systems" / "traps.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", page, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 35))
    there = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))
    }
    for number, tests in rows:
        named = set(re.findall(r"`(\w+)`", tests))
        assert named <= there, f"trap {number}"
        assert named or number in ("27", "28"), f"trap {number}"


def test_the_page_begins_with_both_programs_and_the_registered_one_is_short() -> None:
    assert PROGRAMS[0].startswith('"""CISPO')
    assert PROGRAMS[1].startswith("import gymnasium")
    assert len(PROGRAMS[0].splitlines()) < 60


def test_the_registered_algorithm_trains(tmp_path: Path) -> None:
    trained(tmp_path, "recipe=smoke", "algo.steps=2")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert "losses/policy_loss" in lines
    assert (tmp_path / "run" / "summary.json").is_file()


def test_the_loop_of_ones_own_runs(tmp_path: Path) -> None:
    (tmp_path / "own_loop.py").write_text(PROGRAMS[1].replace("range(20)", "range(1)"), encoding="utf-8")
    assert "exact match" in run("own_loop.py", folder=tmp_path)


def test_the_stable_baselines3_program_is_the_same_on_both_pages_and_runs(tmp_path: Path) -> None:
    [program] = [text for text in PROGRAMS if "SearchQAPolicy" in text]
    assert program in programs("README.md")
    (tmp_path / "sb3.py").write_text(program.replace("learn(5120", "learn(512"), encoding="utf-8")
    assert "rollout/" in run("sb3.py", folder=tmp_path)
    assert (tmp_path / "ppo.zip").is_file()
    assert (tmp_path / "checkpoint" / "config.json").is_file()


@pytest.mark.slow
def test_the_registered_algorithm_learns(tmp_path: Path) -> None:
    import json

    trained(tmp_path)
    measures = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["measures"]
    assert measures["after"]["hops=2/sampled/em"] > measures["before"]["hops=2/sampled/em"] + 0.3


@pytest.mark.slow
def test_the_loop_of_ones_own_learns(tmp_path: Path) -> None:
    (tmp_path / "own_loop.py").write_text(PROGRAMS[1], encoding="utf-8")
    found = [float(text) for text in re.findall(r"exact match ([\d.]+)", run("own_loop.py", folder=tmp_path))]
    assert sum(found[-5:]) / 5 > found[0] + 0.3
