"""How large and how quick the report page is with many trajectories, in a headless browser: built, opened, filtered, scrolled.

    python tests/benchmarks/bench_page.py [--trajectories 5000] [--files FILE ...]

Made-up trajectories by default: of the length of the generated world's, and of that of episodes on Wikipedia (up to 4 searches, 3 passages of 100 words).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from searchqa_agents.trajectory import Trajectory, TurnSpan, load_trajectories
from searchqa_agents.viewer import build_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TIMED = """(act) => new Promise((done) => {
  const start = performance.now();
  (0, act)();
  document.body.offsetHeight;
  const own = performance.now() - start;
  requestAnimationFrame(() => requestAnimationFrame(() => done([own, performance.now() - start])));
})"""
ACTS = {
    "filter: wrong": "() => [...document.querySelectorAll('#quick button')][0].click()",
    "filter: wrong and invalid": "() => [...document.querySelectorAll('#quick button')][2].click()",
    "filter: none again": "() => [0, 2].forEach((i) => [...document.querySelectorAll('#quick button')][i].click())",
    "filter: longest": "() => [...document.querySelectorAll('#quick button')][6].click()",
    "filter: longest, off": "() => [...document.querySelectorAll('#quick button')][6].click()",
    "filter: one set": "() => { const s = document.getElementById('set'); s.selectedIndex = 1; s.dispatchEvent(new Event('change')); }",
    "filter: all sets": "() => { const s = document.getElementById('set'); s.selectedIndex = 0; s.dispatchEvent(new Event('change')); }",
    "find, the first time": "() => { const f = document.getElementById('find'); f.value = 'ba'; f.dispatchEvent(new Event('input')); }",
    "find, one more letter": "() => { const f = document.getElementById('find'); f.value = 'bak'; f.dispatchEvent(new Event('input')); }",
    "find, nothing there": "() => { const f = document.getElementById('find'); f.value = 'qqqq'; f.dispatchEvent(new Event('input')); }",
    "find, cleared": "() => { const f = document.getElementById('find'); f.value = ''; f.dispatchEvent(new Event('input')); }",
    "sort: longest": "() => { const s = document.getElementById('sort'); s.value = 'long'; s.dispatchEvent(new Event('change')); }",
    "next trajectory (j)": "() => dispatchEvent(new KeyboardEvent('keydown', {key: 'j'}))",
    "scroll to the end": "() => { document.getElementById('list').scrollTop = 1e9; }",
}


class Words:
    """A tokenizer whose tokens are words, for trajectories that are made up as ids."""

    name, eos_id, pad_id, reserved = "words", -1, -2, ()

    def __init__(self, rng: np.random.Generator, words: int = 30_000) -> None:
        syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
        self._pieces = [(" " + "".join(rng.choice(syllables, size=1 + i % 3))).encode() for i in range(words)]
        self.vocab_size = words

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError("made-up trajectories begin as ids")

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces(ids)).decode()

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        return [self._pieces[i] for i in ids]


def made_up(
    number: int, prompt: int, segment: int, passages: int, words: int, searches: int, seed: int = 0
) -> tuple[list[Trajectory], Words]:
    """Trajectories with up to so many searches, each of which brings so many passages of so many words, with log-probabilities and advantages."""
    rng = np.random.default_rng(seed)
    tokenizer = Words(rng)
    likely = 1 / np.arange(1, tokenizer.vocab_size + 1)
    sampled_words = rng.choice(tokenizer.vocab_size, size=2_000_000, p=likely / likely.sum()).astype(np.int32)

    def some(count: int) -> np.ndarray:
        start = int(rng.integers(len(sampled_words) - count))
        return sampled_words[start : start + count]

    library = [some(words) for _ in range(20_000)]
    instructions, trajectories = some(prompt), []
    for i in range(number):
        question = some(12)
        ids, mask, turns = [instructions, question], [np.zeros(prompt + 12, np.int8)], []
        place = prompt + 12
        played = int(rng.integers(searches + 1))
        for turn in range(played + 1):
            own = some(segment)
            reply = np.concatenate([library[j] for j in rng.integers(len(library), size=passages)]) if turn < played else own[:0]
            ids += [own, reply]
            mask += [np.ones(segment, np.int8), np.zeros(len(reply), np.int8)]
            end = place + segment + len(reply)
            action = "answer" if turn == played else "invalid" if rng.random() < 0.05 else "search"
            turns.append(
                TurnSpan(place, place + segment, end, action, tokenizer.decode(own[-4:]), tokenizer.decode(own), tokenizer.decode(reply))
            )
            place = end
        flat = np.concatenate(mask)
        right = bool(rng.random() < 0.4)
        trajectories.append(
            Trajectory(
                token_ids=np.concatenate(ids).astype(np.int32),
                loss_mask=flat,
                logprobs=(-rng.exponential(0.3, len(flat)) * flat).astype(np.float32),
                advantages=(rng.normal(size=len(flat)) * flat).astype(np.float32),
                turns=tuple(turns),
                prompt=tokenizer.decode(np.concatenate([instructions, question])),
                reward=float(right),
                question_id=f"q{i % (number // 2)}",
                question=tokenizer.decode(question).strip(),
                golden_answers=(tokenizer.decode(some(2)).strip(),),
                answer=tokenizer.decode(some(2)).strip(),
                terminated=True,
                truncated=False,
                reward_terms={"em": float(right)},
                metrics={"em": float(right), "f1": float(right), "searches": float(played), "invalid_turns": 0.0},
            )
        )
    return trajectories, tokenizer


def measure(title: str, trajectories: list[Trajectory], tokenizer: Words | None, executable: str) -> None:
    """Build, open and use a page, and print what each took."""
    from playwright.sync_api import sync_playwright

    half = len(trajectories) // 2
    start = time.perf_counter()
    text = build_page({"before": trajectories[:half], "after": trajectories[half:]}, tokenizer, title=title)
    built = time.perf_counter() - start
    tokens = sum(len(one.token_ids) for one in trajectories)
    print(f"\n{title}: {len(trajectories):,} trajectories, {tokens:,} tokens")
    print(f"  {'page':<28}{len(text.encode()) / 1e6:>9.2f} MB   built in {built:.1f} s")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "page.html"
        file.write_text(text, encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]")
        opened = page.evaluate("performance.getEntriesByName('shown')[0].startTime")
        print(f"  {'opened, until all is shown':<28}{opened:>9.0f} ms")
        for name, act in ACTS.items():
            own, painted = page.evaluate(f"({TIMED})({act})")
            print(f"  {name:<28}{own:>9.1f} ms   until painted {painted:.0f} ms   {page.inner_text('#count')}")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=5000)
    parser.add_argument(
        "--files", nargs="*", type=Path, default=[], help="trajectory files to measure instead, shown without single tokens"
    )
    options = parser.parse_args()
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        raise SystemExit(f"bench_page needs a browser: one of {', '.join(BROWSERS)} on the path.")
    if options.files:
        measure("files", [one for file in options.files for one in load_trajectories(file)], None, executable)
        return
    world, words = made_up(options.trajectories, prompt=8, segment=8, passages=1, words=22, searches=3)
    measure("like the generated world", world, words, executable)
    wikipedia, words = made_up(options.trajectories, prompt=150, segment=60, passages=3, words=130, searches=4)
    measure("like Wikipedia", wikipedia, words, executable)


if __name__ == "__main__":
    main()
