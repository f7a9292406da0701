"""The dashboard: what it shows fits, nothing in an episode steers the terminal, and the terminal is given back, however a training ends."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from searchqa_agents import dashboard as module
from searchqa_agents.dashboard import Dashboard, on_terminal, sparkline
from searchqa_agents.episode_text import episode_text, plain_text, sample_of
from searchqa_agents.progress import progress
from searchqa_agents.trajectory import Trajectory, TurnSpan
from searchqa_agents.watching import check_watching
from searchqa_envs.errors import ConfigurationError

HOSTILE = "\x1b[2J\x1b]0;title\x07[bold red]x[/bold red]\x9b31m\u202eabc\u2066\r\x00\ud800 :smile: \\[b]"
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def made(episode: Any, *segments: str, reply: str = "a passage", **changes: Any) -> Trajectory:
    runs = [[3 + number] for number in range(2 * len(segments))]
    base = episode([1, 2], *runs)
    turns = tuple(
        TurnSpan(span.start, span.segment_end, span.end, "search", "", segment, reply)
        for span, segment in zip(base.turns, segments, strict=True)
    )
    return episode([1, 2], *runs, **{"turns": turns, "question": "who?", "golden_answers": ("Lisbon",), **changes})


def terminal(width: int = 80, height: int = 24) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system="truecolor", legacy_windows=False)


def frame(dashboard: Dashboard) -> list[str]:
    """The screen's lines, without colours."""
    console = dashboard.console
    with console.capture() as captured:
        console.print(dashboard.render(), end="")
    return ESCAPE.sub("", captured.get()).split("\n")


def filled(console: Console, episode: Any) -> Dashboard:
    dashboard = Dashboard("my run", console)
    for step in range(1, 31):
        values = {
            "charts/em": step / 30,
            "charts/episodic_return": 0.5,
            "charts/searches": 1.5,
            "charts/entropy": 2 - step / 30,
            "losses/approx_kl": 1e-3,
        }
        dashboard.log(
            "train", step, {**values, "charts/tokens": 900.0, "charts/learning_rate": 1e-4, "time/rollout": 0.5, "time/update": 0.1}
        )
    dashboard.log("before", 0, {"hops=2/sampled/em": 0.25})
    dashboard.say("Warning: entropy fell")
    dashboard.episode("train", 30, made(episode, "<search> where", "<answer> Porto", answer="Porto"), kept=False)
    return dashboard


def test_everything_is_on_a_screen_of_80_columns_and_24_lines(episode: Any) -> None:
    dashboard = filled(terminal(), episode)
    with dashboard.task("GRPO", 40) as advance:
        advance(30, "em 1.000")
        lines = frame(dashboard)
    assert [len(line) for line in lines if line] == [80] * 24
    text = "\n".join(lines)
    for shown in (
        "my run",
        "GRPO",
        "30/40",
        "left",
        "em 1.000",
        "exact match",
        "reward",
        "searches",
        "entropy",
        "KL",
        "1,500",
        "EM before",
        "0.250",
    ):
        assert shown in text
    assert "Warning: entropy fell" in text
    assert "wrong; answer: Porto; wanted: Lisbon; reward 0" in text
    assert "1 <search> where" in text
    assert "  a passage" in text


@pytest.mark.parametrize(("width", "height"), [(60, 16), (80, 24), (200, 60)])
def test_any_size_is_filled_and_none_overflows(width: int, height: int, episode: Any) -> None:
    lines = frame(filled(terminal(width, height), episode))
    assert [len(line) for line in lines if line] == [width] * height


def test_who_wrote_what_has_its_own_colour(episode: Any) -> None:
    dashboard = filled(terminal(), episode)
    with dashboard.console.capture() as captured:
        dashboard.console.print(dashboard.render(), end="")
    raw = captured.get()
    assert re.search(r"\x1b\[1;36m1 <search> where", raw)
    assert re.search(r"\x1b\[32m +a passage", raw)
    assert re.search(r"\x1b\[1;31mwrong; answer", raw)


def test_hostile_text_reaches_the_terminal_as_plain_characters(episode: Any) -> None:
    dashboard = Dashboard(HOSTILE, terminal())
    dashboard.say(f"Warning: {HOSTILE}")
    odd = made(episode, HOSTILE, HOSTILE, reply=HOSTILE, question=HOSTILE, golden_answers=(HOSTILE,), answer=HOSTILE)
    dashboard.episode("train", 1, odd, kept=False)
    with dashboard.task(HOSTILE, 3) as advance:
        advance(1, HOSTILE)
        with dashboard.console.capture() as captured:
            dashboard.console.print(dashboard.render(), end="")
    raw = captured.get()
    assert set(re.findall(r"\x1b[^m]*m", raw)) == set(re.findall(r"\x1b\[[0-9;]*m", raw))
    rest = re.sub(r"\x1b\[[0-9;]*m", "", raw)
    assert not [character for character in rest if not character.isprintable() and character != "\n"]
    assert "[bold red]x[/bold red]" in rest
    assert ":smile:" in rest
    assert "\\[b]" in plain_text(HOSTILE)
    assert episode_text(odd).isprintable() is False
    assert all(character.isprintable() or character == "\n" for character in episode_text(odd))


def test_a_long_episode_is_cut_to_its_room_and_keeps_its_end(episode: Any) -> None:
    console = terminal()
    long = made(episode, *(f"turn{number} " + "word " * 100 for number in range(12)), reply="passage " * 400)
    for room in (0, 1, 2, 3, 5, 9, 30):
        lines = module.episode_lines(long, 76, room, console)
        assert len(lines) <= room
        assert all(line.cell_len <= 76 for line in lines)
    text = "\n".join(line.plain for line in module.episode_lines(long, 76, 9, console))
    assert "turn0" in text
    assert "..." in text


def test_a_sample_stays_to_be_read_and_lost_episodes_are_no_samples(episode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    dashboard = Dashboard("run", terminal())
    for step, now in ((1, 100.0), (2, 101.0), (3, 109.0)):
        clock[0] = now
        dashboard.episode("train", step, made(episode, "x"), kept=False)
        title = next(line for line in frame(dashboard) if "an episode of step" in line)
        assert f"step {1 if step < 3 else 3}" in title
    lost = episode([1], [2], backend_error="gone")
    good = made(episode, "x")
    assert sample_of([lost], 1) is None
    assert sample_of([lost, good], 7) is good
    assert [sample_of([good, lost, long := made(episode, "y")], number) for number in (0, 1, 2)] == [good, long, good]


def test_a_sparkline_is_the_means_of_its_parts() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 10, 10], 2) == "▁█"
    assert sparkline([5, 5], 4) == "▁▁  "
    assert sparkline([1, math.nan, 2], 3) == "▁ █"
    assert sparkline([], 3) == "   "
    assert sparkline([math.nan], 2) == "  "


def test_curves_of_a_run_that_goes_on_begin_where_they_were() -> None:
    lines = [{"phase": "sft", "step": step, "seconds": 1.0, "losses/sft_loss": 5.0 - step} for step in (1, 2, 3)]
    assert "sft loss" in "\n".join(frame(Dashboard("run", terminal(), lines)))


def test_what_is_said_meanwhile_is_printed_at_the_end_and_output_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Screen()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    console = Console(file=stream, force_terminal=True, width=80, height=24, legacy_windows=False)
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with on_terminal(Dashboard("run", console)), progress("work", 3) as advance:
            advance(2, "em 0.5")
            logging.getLogger("other").warning("A warning [of] a library")
            print("printed to stderr", file=sys.stderr)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    shown, ended, after = stream.getvalue().rpartition("\x1b[?1049l")
    assert ended
    assert "\x1b[?1049h" in shown
    assert shown.count("\x1b[?7l") == shown.count("\x1b[?7h") == 1
    assert [ESCAPE.sub("", line) for line in after.splitlines()][-3:] == [
        "A warning [of] a library",
        "printed to stderr",
        after.splitlines()[-1],
    ]
    assert after.splitlines()[-1].startswith("work: 2/3, em 0.5 (")
    assert sys.stderr is stream
    assert handler.stream is stream
    assert signal.getsignal(signal.SIGTERM) is before


def test_where_there_is_no_terminal_there_is_no_dashboard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert module.terminal() is None


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"dashboard must be one of \['auto', 'off'\]; got 'on'"):
        check_watching(SimpleNamespace(name="run", dashboard="on", wandb=None))


# -- in a real terminal -----------------------------------------------------------------------------------------------------------------------


def in_terminal(line: list[str], until: Callable[[bytes], int | None] = lambda seen: None) -> tuple[int, str]:
    """Run a command in a terminal of 80 columns and 24 lines; ``until`` may name a signal to send. Returns its exit status and all that it wrote."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, "-m", "searchqa_agents.cli", *line],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    seen, sent, deadline = b"", False, time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    part = os.read(ours, 65536)
                except OSError:  # Linux: the other end is closed
                    part = b""
                if not part:
                    break
                seen += part
            elif process.poll() is not None:
                break
            number = None if sent else until(seen)
            if number is not None:
                process.send_signal(number)
                sent = True
        return process.wait(30), seen.decode("utf-8")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)


def test_a_training_in_a_terminal_shows_a_sample_and_gives_the_terminal_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    status, seen = in_terminal(["train", "recipe=smoke", f"run_dir={folder}", "threads=1", "evaluation.questions=2"])
    assert status == 0, seen[-2000:]
    assert seen.count("\x1b[?1049h") == seen.count("\x1b[?1049l") == 1
    assert seen.count("\x1b[?25h") >= seen.count("\x1b[?25l")
    screen, _, after = seen.partition("\x1b[?1049l")
    frames = [ESCAPE.sub("", one).replace("\r", "") for one in screen.partition("\x1b[?1049h")[2].split("\x1b[H")]
    assert any("an episode of step 1" in one and "wanted:" in one and "exact match" in one for one in frames)
    assert all(len(line) <= 80 for one in frames for line in one.split("\n"))
    assert "GRPO: 2/2" in after
    assert "held-out questions" in ESCAPE.sub("", after)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["phase"] == "train"] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_stopped_gives_the_terminal_back(tmp_path: Path, number: int) -> None:
    line = ["train", "recipe=smoke", f"run_dir={tmp_path / 'run'}", "threads=1", "algo.steps=100000", "algo.checkpoint_every=50"]
    status, seen = in_terminal(line, lambda seen: number if b"an episode of step" in seen else None)
    assert status == (130 if number == signal.SIGINT else -signal.SIGTERM)
    assert seen.count("\x1b[?1049h") == seen.count("\x1b[?1049l") == 1
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l")
    assert seen.rfind("\x1b[?7h") > seen.rfind("\x1b[?7l")
    if number == signal.SIGINT:
        assert "goes on from the last checkpoint" in seen.partition("\x1b[?1049l")[2]
