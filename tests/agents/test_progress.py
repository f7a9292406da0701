"""Progress: what a terminal shows at the end, and what a log file gets."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from searchqa_agents import progress as module
from searchqa_agents.progress import progress


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)


def last_frame(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip("\n\x1b[?25h").rpartition("\r")[2].rpartition("\x1b[2K")[2]


def test_work_that_ends_early_is_shown_as_complete_and_fits_the_terminal() -> None:
    console = terminal()
    with progress("induction warm-up", 2000, console) as advance:
        advance(1, "")
        advance(600, "warmup loss [0.386]")
    shown = last_frame(console)
    assert "600/600" in shown
    assert "2000" not in shown
    assert shown.rstrip().endswith("warmup loss [0.386]")
    assert len(shown) <= 80


def test_work_that_is_stopped_stays_as_it_was() -> None:
    console = terminal()

    def work() -> None:
        with progress("GRPO", 30, console) as advance:
            advance(7, "em 0.500")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert " 7/30" in last_frame(console)


@pytest.mark.parametrize("total", [0, 5])
def test_work_that_never_advances_leaves_nothing(total: int) -> None:
    console = terminal()
    with progress("skipped", total, console):
        pass
    assert "skipped" not in last_frame(console)


def test_a_log_gets_a_line_at_the_end_and_not_one_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=20)
    with progress("fine-tuning on demonstrations", 3, console) as advance:
        for done in (1, 2, 3):
            advance(done, f"loss [{done}]")
    [line] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert line.startswith("fine-tuning on demonstrations: 3/3, loss [3] (")
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    with progress("each", 2, console) as advance:
        advance(1, "")
        advance(2, "")
    assert console.file.getvalue().splitlines()[1:] == ["each: 1/2, 00:00 left", "each: 2/2"]  # type: ignore[attr-defined]


def test_a_log_tells_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=20)
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with progress("questions", 400, console) as advance:
        clock[0] += 60
        advance(100, "em 0.5")
        clock[0] += 60
        advance(300, "em 0.4")
        advance(400, "em 0.3")
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "questions: 100/400, em 0.5, 03:00 left",
        "questions: 300/400, em 0.4, 00:40 left",
        "questions: 400/400, em 0.3 (120.0 s)",
    ]


def test_a_line_that_is_said_stands_by_itself_above_the_bar_and_in_a_log() -> None:
    for console in (terminal(), Console(file=io.StringIO(), width=20)):
        with progress("work", 3, console) as advance:
            advance(1, "")
            advance.say("Warning: [entropy] fell from 1 to 0.1, and so on and on")
            advance(3, "")
        assert "Warning: [entropy] fell from 1 to 0.1, and so on and on\n" in console.file.getvalue()  # type: ignore[attr-defined]
