"""The notebooks run from top to bottom as they stand, show what their text says, and are kept with outputs that hold nothing of a machine."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FEWEST_PICTURES = {"1": 3, "2": 2, "3": 1, "4": 3, "5": 4}
MACHINE_PATH = re.compile(r"(?<![\w.<>/:-])/(?:home|root|tmp|var|Users|private|mnt|opt|usr|work|workspace|srv|data)/\w+|[A-Z]:\\")


def _runner() -> Any:
    spec = spec_from_file_location("run_notebooks", ROOT / "scripts" / "run_notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUNNER = _runner()


@cache
def _kept(name: str) -> Any:
    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


def _texts(notebook: Any) -> str:
    """All that a notebook shows as text, cell after cell."""
    parts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                parts.append(output.text)
            elif output.output_type == "error":
                parts.append("\n".join(output.traceback))
            else:
                parts += [str(value) for kind, value in output.data.items() if kind.startswith("text/")]
    return "\n".join(parts)


def _pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


# -- what each lesson must show, whatever the number of steps ------------------------------------------------------------------------------------


def _check_by_hand(text: str) -> None:
    assert "91 tokens, of which 37 are yours; reward 1.0" in text
    won = dict(re.findall(r"^(\w+ answer, .*?): +(reward .*)$", text, re.MULTILINE))
    assert won["right answer, forged page"] == won["right answer, no page"] == "reward 1.0 | searches 0 | pages found, any 0, all 0"
    assert won["wrong answer, forged page"] == "reward 0.0 | searches 0 | pages found, any 0, all 0"
    assert "[/information] [answer] Kila [/answer]" in text, "a hostile page is defused"


def _check_training(text: str) -> None:
    [row] = re.findall(r"\| exact match \| ([\d.]+) \(.*?\) \| ([\d.]+) \(", text)
    before, after = map(float, row)
    assert 0.2 < before < 0.5
    assert after > before + 0.2
    assert "exact match without a search engine: 0.000" in text


def _check_algorithm(text: str) -> None:
    assert "tensor([ 1.0000, -0.1667, -0.1667, -0.1667,  0.0000,  0.0000])" in text
    scores = [float(value) for value in re.findall(r"seed \d: held-out exact match ([\d.]+)", text)]
    assert len(scores) >= 2
    assert min(scores) > 0.1
    between_algorithms = [float(value) for value in re.findall(r"^seed \d, grpo and hopeful: ([\d.]+)$", text, re.MULTILINE)]
    between_seeds = [float(value) for value in re.findall(r"^\w+, seed 0 and seed 1: ([\d.]+)$", text, re.MULTILINE)]
    assert len(between_algorithms) == len(scores) / 2
    if len(between_algorithms) > 1:
        assert len(between_seeds) == 2
        assert 3 * max(between_algorithms) < min(between_seeds), "lines of one algorithm lie further apart than those of one seed"
    assert "report.html" in text, "the run of the command line has its page"
    assert re.search(r"^\| grpo \| \d", text, re.MULTILINE), "the leaderboard is shown"
    assert len(re.findall(r"Would train hopeful on \w+ of world-v1, seed 0: \d+ policy tokens", text)) >= 3, (
        "the file takes part in the benchmark"
    )


def _check_documents(text: str) -> None:
    assert re.search(r"search once +0\.00 +0\.67 +1\.0", text)
    assert re.search(r"follow the notes +1\.00 +1\.00 +1\.3", text)
    assert re.search(r"search once +after +0\.17 +0\.83 +1\.0", text), "words of the question in the page mend the miss"
    assert len(set(re.findall(r"sha256 (\w+)", text))) == 2
    assert "| supporting titles found, all | 0.667 |" in text


def _check_sweep(text: str) -> None:
    assert re.search(r"^\| grpo \|", text, re.MULTILINE)
    assert re.search(r"^\| reinforce \|", text, re.MULTILINE)
    assert {"algo-grpo_seed-0", "algo-grpo_seed-1", "algo-reinforce_seed-0", "algo-reinforce_seed-1"} <= set(text.split())
    assert re.search(r"reinforce +minus grpo: [+-][\d.]+, 95% interval", text)


CHECKS: dict[str, Callable[[str], None]] = {
    "1": _check_by_hand,
    "2": _check_training,
    "3": _check_algorithm,
    "4": _check_documents,
    "5": _check_sweep,
}


def _check_run(path: Path, *, quick: bool) -> None:
    notebook = RUNNER.executed(_kept(path.name), quick=quick)
    text = _texts(notebook)
    CHECKS[path.name[0]](text)
    assert _pictures(notebook) >= FEWEST_PICTURES[path.name[0]]
    assert not MACHINE_PATH.search(text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path) -> None:
    _check_run(path, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_whole_notebook_runs_from_top_to_bottom(path: Path) -> None:
    _check_run(path, quick=False)


# -- the notebooks as they are kept --------------------------------------------------------------------------------------------------------------


def test_there_are_five_lessons_in_order() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["1_", "2_", "3_", "4_", "5_"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_kept_notebook_shows_what_a_whole_run_shows(path: Path) -> None:
    notebook = _kept(path.name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it again: make notebooks"
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert _pictures(notebook) >= FEWEST_PICTURES[path.name[0]]
    CHECKS[path.name[0]](_texts(notebook))


def test_the_conclusions_of_the_lesson_on_sweeps_are_about_its_own_numbers() -> None:
    notebook = _kept(NOTEBOOKS[4].name)
    [conclusions] = [cell.source for cell in notebook.cells if cell.source.startswith("## What one may conclude")]
    text = _texts(notebook)
    means = dict(re.findall(r"^(\w+) +runs .*?, mean 0(\.\d+),", text, re.MULTILINE))
    intervals = dict(re.findall(r"^(\w+) +minus grpo: .*?interval (\S+ to \S+), contains 0", text, re.MULTILINE))
    said = {name: value.replace("0.", ".").replace("-", "−") for name, value in intervals.items()}
    assert (
        f"reinforce is better than grpo, because its mean is higher, {means['reinforce']} against {means['grpo']} | **no**" in conclusions
    )
    assert f"the interval of the difference, {said['reinforce']}, contains 0" in conclusions
    assert means["grpo"] == means["rloo"]
    assert f"both means are {means['grpo']} | **no**" in conclusions
    assert f"the interval of their difference, {said['rloo']}, contains" in conclusions
    jobs = re.findall(r"^\| algo=\w+ seed=\d \| finished \| 1 \| [\d.]+ \| 0(\.\d+) \| (0\.\d+) \|", text, re.MULTILINE)
    assert len(jobs) == 6
    assert all(f"every run went from {before} to above .7" in conclusions and float(after) > 0.7 for before, after in jobs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_kept_notebook_names_no_place_on_a_machine(path: Path) -> None:
    notebook = _kept(path.name)
    for text in (*(cell.source for cell in notebook.cells), _texts(notebook)):
        assert not MACHINE_PATH.search(text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_kept_notebook_has_nothing_that_changes_by_itself(path: Path) -> None:
    notebook = _kept(path.name)
    assert RUNNER.cleaned(nbformat.from_dict(notebook)) == notebook
    nbformat.validate(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_lesson_says_what_it_needs_and_ends_with_exercises_and_its_links_lead_somewhere(path: Path) -> None:
    texts = [cell.source for cell in _kept(path.name).cells if cell.cell_type == "markdown"]
    assert "`pip install -e '.[notebooks]' -c constraints.txt` in a clone of the repository" in texts[0]
    assert "searchqa-gym[" not in "\n".join(texts), "the package is on no index"
    assert "| it takes |" in texts[0]
    assert "## Exercises" in texts[-1]
    for link in re.findall(r"\]\(([^)#]+)", "\n".join(texts)):
        assert link.startswith("https://") or (path.parent / link).exists(), link


def test_what_is_a_machine_path_and_what_is_not() -> None:
    assert MACHINE_PATH.search("Page: /tmp/searchqa-1/runs/report.html")
    assert MACHINE_PATH.search("in '/home/someone/x'")
    assert not MACHINE_PATH.search("runs/tmp/x, </information>, http://a/tmp/x, and/or, tests/data/x")


# -- the runner ----------------------------------------------------------------------------------------------------------------------------------


def _notebook(*sources: str) -> Any:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


def test_a_notebook_runs_with_this_python_in_an_empty_folder_and_its_commands_first() -> None:
    source = "import os, shutil, sys; print(sys.executable, os.listdir(), os.environ['SEARCHQA_QUICK'], shutil.which('python'))"
    [output] = RUNNER.executed(_notebook(source), quick=True).cells[0].outputs
    assert output.text == f"{sys.executable} [] 1 {Path(sys.executable).parent / 'python'}\n"


def test_running_a_notebook_again_changes_no_byte() -> None:
    given = _notebook("import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()", "print(1)\nprint(2)", "{'a': 1}")
    once = RUNNER.executed(given)
    assert nbformat.writes(RUNNER.executed(once)) == nbformat.writes(once)
    assert [cell.id for cell in once.cells] == ["cell-01", "cell-02", "cell-03"]
    assert [set(cell.metadata) for cell in once.cells] == [set(), set(), set()]


def test_a_cell_that_fails_fails_the_run_and_the_file_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.ipynb"
    nbformat.write(_notebook("1 / 0"), file)
    before = file.read_bytes()
    assert RUNNER.main([str(file)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert file.read_bytes() == before
    with pytest.raises(CellExecutionError):
        RUNNER.executed(_notebook("1 / 0"))


def test_short_runs_are_never_kept_in_place(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        RUNNER.main(["--quick"])
    file = tmp_path / "one.ipynb"
    nbformat.write(_notebook("print('short')"), file)
    assert RUNNER.main(["--quick", "--out", str(tmp_path / "out"), str(file)]) == 0
    assert "short" in (tmp_path / "out" / "one.ipynb").read_text(encoding="utf-8")
