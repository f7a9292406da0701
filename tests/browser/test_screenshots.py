"""The pictures of pages in the docs: those that pages show are there, small, and made by a command that works."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from searchqa_agents.trajectory import Trajectory, TurnSpan, append_trajectories
from searchqa_agents.viewer import build_page
from searchqa_envs.tokenizers import build_tokenizer

ROOT = Path(__file__).parents[2]
BYTE = build_tokenizer("byte")


@pytest.fixture(scope="module")
def screenshots() -> Any:
    spec = importlib.util.spec_from_file_location("screenshots", ROOT / "scripts" / "screenshots.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trajectory(name: str, advantage: float | None) -> Trajectory:
    ids = np.array(BYTE.encode("Who?\n<search>Ada</search>\n<answer>Ada</answer>"), dtype=np.int32)
    start, end = len(BYTE.encode("Who?\n")), len(BYTE.encode("Who?\n<search>Ada</search>\n"))
    mask = (np.arange(len(ids)) >= start).astype(np.int8)
    mask[end - 1] = 0
    return Trajectory(
        token_ids=ids,
        loss_mask=mask,
        logprobs=(-0.5 * mask).astype(np.float32),
        advantages=None if advantage is None else (advantage * mask).astype(np.float32),
        turns=(
            TurnSpan(start, end - 1, end, "search", "Ada", "<search>Ada</search>", "\n"),
            TurnSpan(end, len(ids), len(ids), "answer", "Ada", "<answer>Ada</answer>", ""),
        ),
        prompt="Who?\n",
        reward=1.0,
        question_id=name,
        question="Who?",
        golden_answers=("Ada",),
        answer="Ada",
        terminated=True,
        truncated=False,
    )


def test_the_picture_of_advantages_is_of_two_samples_of_a_question_that_differ_in_sign(screenshots: Any, tmp_path: Path) -> None:
    file = tmp_path / "rollouts.jsonl.gz"
    append_trajectories(
        file, [trajectory("a", 1.0), trajectory("a", 1.0), trajectory("b", -1.0), trajectory("b", 0.0), trajectory("b", 2.0)]
    )
    assert screenshots.weighed(file) == f"at={screenshots.ROLLOUTS}.4&right={screenshots.ROLLOUTS}.0"
    append_trajectories(tmp_path / "other.jsonl", [trajectory("a", 1.0), trajectory("a", None)])
    with pytest.raises(SystemExit, match="no question with advantages above and below zero"):
        screenshots.weighed(tmp_path / "other.jsonl")


def test_a_picture_is_taken_of_what_the_address_says(screenshots: Any, executable: str, tmp_path: Path) -> None:
    from PIL import Image

    page = tmp_path / "report.html"
    page.write_text(build_page({"r": [trajectory("a", 1.0), trajectory("a", -1.0)]}, BYTE, title="t"), encoding="utf-8")
    shots = [screenshots.Shot(f"{n}.png", page, f"#beside=no&colour=advantage&at=r.{n}", (900, 600)) for n in (0, 1)]
    screenshots.take(executable, shots, tmp_path)
    colours = []
    for shot in shots:
        with Image.open(tmp_path / shot.file) as image:
            assert image.size == (900, 600)
            colours.append({colour for _, colour in image.convert("RGB").getcolors(900 * 600)})
    blue, orange = (
        sum(1 for red, _, own in colours[0] - colours[1] if own > red + 40),
        sum(1 for red, _, own in colours[1] - colours[0] if red > own + 40),
    )
    assert blue
    assert orange


def test_the_pictures_that_the_docs_show_are_there_and_small(screenshots: Any) -> None:
    page = (ROOT / "docs" / "report_page.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", page)
    assert len(shown) >= 3
    assert all((ROOT / "docs" / name).is_file() for name in shown)
    sizes = [file.stat().st_size for file in [ROOT / "docs" / "page.png", *(ROOT / "docs" / "screenshots").glob("*.png")]]
    assert max(sizes) <= screenshots.MOST_BYTES
    assert sum(sizes) < 1_000_000
