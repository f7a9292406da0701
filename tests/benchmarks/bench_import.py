"""Import time of searchqa_envs over that of gymnasium: python tests/benchmarks/bench_import.py

Fresh interpreters in turn; the ratio of the medians, and what each loads.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from statistics import median

CODE = "import time; t = time.perf_counter(); import {module}; t = time.perf_counter() - t; import sys; print(t, len(sys.modules), 'torch' in sys.modules)"


def measure(module: str) -> tuple[float, int, bool]:
    """Seconds, modules loaded, and whether torch is among them."""
    printed = subprocess.run([sys.executable, "-c", CODE.format(module=module)], capture_output=True, text=True, check=True).stdout.split()
    return float(printed[0]), int(printed[1]), printed[2] == "True"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    modules = ("gymnasium", "searchqa_envs")
    measured = {module: [] for module in modules}
    for _ in range(repeats):
        for module in modules:
            measured[module].append(measure(module))
    for module in modules:
        seconds = median(entry[0] for entry in measured[module])
        print(f"{module:>14}: {1000 * seconds:7.1f} ms, {measured[module][0][1]} modules, torch loaded: {measured[module][0][2]}")
    ratio = median(e[0] for e in measured["searchqa_envs"]) / median(e[0] for e in measured["gymnasium"])
    print(f"ratio {ratio:.2f} (aim: at most 1.5)")


if __name__ == "__main__":
    main()
