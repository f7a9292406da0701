"""Run the notebooks from top to bottom and keep their outputs in them, so that they can be read where nothing is run.

Each runs with this Python, on one thread, in an empty folder of its own that is deleted afterwards. What would differ from run to run without meaning
anything (times of execution, versions, numbers of processes) is left out, so that running them again changes little.

    python scripts/run_notebooks.py                        all of them, in place
    python scripts/run_notebooks.py --quick --out FOLDER   short runs, written elsewhere
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
SECONDS_A_CELL = 1200


def executed(notebook: Any, *, quick: bool = False) -> Any:
    """A copy of a notebook with the outputs of a fresh run.

    Parameters
    ----------
    notebook
        An ``nbformat`` notebook of version 4.
    quick
        Set ``SEARCHQA_QUICK=1``, by which the notebooks take fewer training steps.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        At the first cell that fails.
    """
    copy = nbformat.from_dict(notebook)
    with tempfile.TemporaryDirectory(prefix="searchqa-notebook-") as folder:
        # no folders of kernels: "python3" is then the Python that runs this, never one that is installed for the user
        manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        work = Path(folder) / "work"
        work.mkdir()
        if os.name == "posix":  # sockets in the folder, which nobody else can reach, rather than ports
            manager.transport, manager.ip = "ipc", str(Path(folder) / "kernel")
        client = NotebookClient(
            copy,
            km=manager,
            timeout=SECONDS_A_CELL,
            resources={"metadata": {"path": str(work)}},
            coalesce_streams=True,
            record_timing=False,
        )
        client.execute(env=kernel_environment(Path(folder), quick), cleanup_kc=True)
    return cleaned(copy)


def kernel_environment(folder: Path, quick: bool) -> dict[str, str]:
    """The variables of a kernel: this Python's commands first, one thread, and nothing of the user's own settings of IPython."""
    own = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(folder / "ipython"),
        "SEARCHQA_CACHE": str(folder / "cache"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONWARNINGS": "ignore:IProgress not found",  # of tqdm, where Jupyter's widgets are not installed
        "NO_COLOR": "1",
        "COLUMNS": "120",
        "SEARCHQA_QUICK": "1" if quick else "",
    }
    dropped = {"SEARCHQA_DEBUG", "FORCE_COLOR", "PYTEST_CURRENT_TEST"}
    return {key: value for key, value in os.environ.items() if key not in dropped} | own


def cleaned(notebook: Any) -> Any:
    """The notebook without what differs from machine to machine: of its metadata only the language, of its cells only tags."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
        }
    )
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"cell-{number:02d}"
        cell.metadata = nbformat.from_dict({"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {})
        for output in cell.get("outputs", []):
            if output.output_type in ("display_data", "execute_result"):
                output.metadata = nbformat.from_dict({})
    return notebook


def main(argv: Sequence[str] | None = None) -> int:
    """Run the notebooks that the line names. Returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(description="Run the notebooks and keep their outputs in them.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="files; default: all")
    parser.add_argument("--quick", action="store_true", help="short runs (SEARCHQA_QUICK=1)")
    parser.add_argument("--out", type=Path, help="folder to write to; default: in place, which --quick does not do")
    given = parser.parse_args(argv)
    if given.quick and given.out is None:
        parser.error("--quick needs --out FOLDER: the outputs that are kept are those of whole runs")
    failed = 0
    for path in given.notebooks or sorted(FOLDER.glob("*.ipynb")):
        started = time.perf_counter()
        try:
            notebook = executed(nbformat.read(path, as_version=4), quick=given.quick)
        except CellExecutionError as error:
            sys.stderr.write(f"{path.name}: {error}\n")
            failed = 1
            continue
        target = path if given.out is None else given.out / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
        sys.stdout.write(f"{path.name}: {time.perf_counter() - started:.0f} s\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
