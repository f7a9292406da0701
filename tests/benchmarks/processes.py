"""Parts of a benchmark in processes of their own, so that the peak memory of each can be told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"), "1")


def peak_memory() -> int:
    """Bytes that this process has had in memory at most so far, mapped files included (VmHWM of Linux)."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this benchmark needs Linux")


class OwnMemory:
    """The peak of what this process has in memory of its own, without mapped files, which the system can take back: looked at every 20 ms."""

    def __init__(self) -> None:
        self.peak = _status("RssAnon")
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, _status("RssAnon"))
            time.sleep(0.02)


def disk(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class Worker:
    """This script in another process, which answers each line of JSON by a line of JSON."""

    def __init__(self, script: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ONE_THREAD},
        )
        self._name = " ".join(arguments)

    def ask(self, question: Any = None) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise SystemExit(f"the process {self._name} ended with code {self._process.wait()}; its messages are above")

    def stop(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def answer(value: Any) -> None:
    """What a worker says."""
    print("answer " + json.dumps(value), flush=True)


def in_process(script: str, *arguments: str) -> Any:
    """One answer of a worker."""
    worker = Worker(script, *arguments)
    try:
        return worker.ask()
    finally:
        worker.stop()


class Results:
    """Numbers by name, in a file, so that a benchmark that was stopped goes on where it was."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self._values: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def get(self, name: str, script: str, *arguments: str) -> Any:
        """The stored value, else that of a process."""
        if name not in self._values:
            self.put(name, self._measure(name, script, *arguments))
        return self._values[name]

    def _measure(self, name: str, script: str, *arguments: str) -> Any:
        started = time.perf_counter()
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        value = in_process(script, *arguments)
        print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        return value

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def put(self, name: str, value: Any) -> None:
        self._values[name] = value
        part = self._file.with_name(self._file.name + ".part")
        part.write_text(json.dumps(self._values, indent=1))
        os.replace(part, self._file)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]
