"""Make the pictures of pages in the docs: train small runs with fixed seeds, open their pages in a headless browser, and photograph them.

    python scripts/screenshots.py [--runs runs/screenshots] [--out docs]

Runs that are finished are not played again; remove the folder of runs to begin anew. About four minutes on two cores.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from rich.console import Console

from searchqa_agents.trajectory import load_trajectories

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLOURS = 256
"""A page has few; a picture of so many is half as large."""
MOST_BYTES = 200_000
"""of one picture"""
ROLLOUTS = "rollouts-000005"
SUITE = "world-v1"
CONSOLE = Console()


class Shot(NamedTuple):
    """A picture: its file under the docs, the page, what the address adds, its size in pixels, and what the pointer is on."""

    file: str
    page: Path
    fragment: str
    size: tuple[int, int]
    scheme: str = "light"
    hover: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/screenshots"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        raise SystemExit(f"The pictures need a browser: one of {', '.join(BROWSERS)} on the path.")
    take(executable, shots(options.runs), options.out)


def shots(runs: Path) -> list[Shot]:
    """Make the runs and their pages; the pictures to take of them."""
    run, sweep = runs / "grpo", runs / "sweep"
    searchqa("train", "start=shipped", "seed=0", "threads=1", "algo.steps=20", f"run_dir={run}")
    searchqa("report", str(run))
    page, better = run / "report.html", weighed(run / "trajectories" / f"{ROLLOUTS}.jsonl.gz")
    found = [
        Shot("page.png", page, "", (1280, 1240)),
        Shot("screenshots/curves_dark.png", page, "", (1280, 640), "dark", ".curve svg >> nth=1"),
        Shot("screenshots/side_by_side.png", page, "#only=changed&colour=logprob&at=before.0", (1280, 800)),
        Shot(
            "screenshots/advantage.png", page, f"#set={ROLLOUTS}&colour=advantage&{better}", (1280, 800), "light", ".policy span >> nth=2"
        ),
    ]
    searchqa(
        "train",
        "-m",
        "algo=grpo,ppo",
        "seed=0,1",
        "start=shipped",
        "threads=1",
        "algo.steps=10",
        "evaluation.questions=64",
        f"run_dir={sweep}",
    )
    searchqa("report", "multirun", str(sweep))
    found.append(Shot("screenshots/multirun.png", sweep / "multirun.html", "", (1280, 1000)))
    searchqa("bench", "leaderboard", "--suite", SUITE, "--out", str(runs / "leaderboard"))
    found.append(Shot("screenshots/bench_compare.png", runs / "leaderboard" / "report.html", "", (1280, 1100)))
    return found


def searchqa(*words: str) -> None:
    """Run a command line."""
    CONSOLE.print("searchqa", *words, markup=False, highlight=False, soft_wrap=True)
    subprocess.run([sys.executable, "-m", "searchqa_agents.cli", *words], check=True, stdout=subprocess.DEVNULL)


def weighed(file: Path) -> str:
    """The part of an address that shows two samples of one question beside each other, one with an advantage above zero and one below."""
    signs: dict[str, dict[bool, tuple[int, int]]] = {}
    counts: dict[str, int] = {}
    for number, one in enumerate(load_trajectories(file)):
        place = counts[one.question_id] = counts.get(one.question_id, -1) + 1
        if one.advantages is not None and one.advantages.any() and len(one.turns) > 1:
            found = signs.setdefault(one.question_id, {})
            found.setdefault(bool(one.advantages.sum() > 0), (number, place))
            if len(found) == 2:
                return f"at={ROLLOUTS}.{found[True][0]}&right={ROLLOUTS}.{found[False][1]}"
    raise SystemExit(f"{file} has no question with advantages above and below zero: nothing to show.")


def take(executable: str, found: list[Shot], out: Path) -> None:
    """Photograph the pages."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        for shot in found:
            page = browser.new_page(viewport={"width": shot.size[0], "height": shot.size[1]}, color_scheme=shot.scheme)
            page.goto(shot.page.resolve().as_uri() + shot.fragment)
            page.wait_for_load_state()
            prepare(page, shot)
            picture = small(page.screenshot())
            if len(picture) > MOST_BYTES:
                raise SystemExit(f"{shot.file} has {len(picture):,} bytes, more than {MOST_BYTES:,}: make it smaller.")
            file = out / shot.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture)
            CONSOLE.print(f"{file}: {len(picture):,} bytes", markup=False, highlight=False, soft_wrap=True)
            page.close()
        browser.close()


def prepare(page: Any, shot: Shot) -> None:
    """Wait until the page of a run has drawn its trajectories, and point at what the picture is about."""
    if page.locator("#browser").count():
        page.wait_for_selector("html[data-ready]")
        if shot.fragment:
            page.evaluate("document.getElementById('browser').scrollIntoView()")
    if shot.hover:
        page.hover(shot.hover)
    page.wait_for_timeout(300)


def small(picture: bytes) -> bytes:
    """The same PNG with fewer colours: the most frequent half of them as they are, such as backgrounds, the others near enough."""
    image = Image.open(BytesIO(picture)).convert("RGB")
    counts = sorted(image.getcolors(image.width * image.height) or [], reverse=True)
    exact = [colour for _, colour in counts[: COLOURS // 2]]
    near = image.quantize(COLOURS - len(exact), method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for colour in exact for value in colour] + near)
    file = BytesIO()
    image.quantize(palette=palette, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    main()
