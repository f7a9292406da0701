"""Progress on long work: a bar in a terminal, otherwise a line every so often."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

SECONDS_BETWEEN_LINES = 15.0
DESCRIPTION_WIDTH = 29
"""Shorter descriptions are padded, so that the bars of a run's phases stand below each other."""


class Advance:
    """``advance(done, note)``: how many units are finished so far (not the increment), and a few words such as "em 0.52"; ``say`` adds a line."""

    def __init__(self, show: Callable[[int, str], None], console: Console | Callable[[str], None]) -> None:
        self._show = show
        self._console = console

    def __call__(self, done: int, note: str) -> None:
        self._show(done, note)

    def say(self, text: str) -> None:
        """Write a line above the bar, or among the other lines."""
        if isinstance(self._console, Console):
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            self._console(text)


class Display(Protocol):
    """What shows progress in the place of bars and lines, while it is in :func:`shown_on`."""

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """As :func:`progress`."""


_display: ContextVar[Display | None] = ContextVar("display", default=None)


@contextmanager
def shown_on(display: Display) -> Iterator[None]:
    """Let a display show all progress that is begun within."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


@contextmanager
def progress(description: str, total: int, console: Console | None = None) -> Iterator[Advance]:
    """Show how far some work is. Work that never advances is not shown; work that ends before ``total`` is shown as complete.

    Yields an :class:`Advance`. Where the output is not a terminal, a line is written at most every 15 seconds, with the time left, and one at the end.
    """
    display = _display.get()
    if display is not None and console is None:
        with display.task(description, total) as advance:
            yield advance
        return
    console = console or Console(stderr=True)
    with (_bar if console.is_terminal else _lines)(description, total, console) as advance:
        yield advance


@contextmanager
def _bar(description: str, total: int, console: Console) -> Iterator[Advance]:
    columns = (
        SpinnerColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.description}"),
        BarColumn(None, table_column=Column(max_width=24)),  # the only column that gives way on a narrow terminal
        _Figures(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(f"{escape(description):<{DESCRIPTION_WIDTH}}", total=total, note="")

        def advance(done: int, note: str) -> None:
            bar.update(task, completed=done, note=note)

        yield Advance(advance, bar.console)
        done = bar.tasks[0].completed
        bar.update(task, total=done, visible=done > 0)


class _Figures(ProgressColumn):
    """Such as "12/200  16:40 left  em 0.52"; at the end the time that it took."""

    def get_table_column(self) -> Column:
        return Column(no_wrap=True)

    def render(self, task: Task) -> Text:
        done, total = int(task.completed), int(task.total or 0)
        time_shown = clock(task.elapsed or 0) if task.finished or not task.time_remaining else f"{clock(task.time_remaining)} left"
        return Text(f"{done:>{len(str(total))}}/{total}  {time_shown}  {task.fields['note']}")


def clock(seconds: float) -> str:
    """Such as "03:20", or "1:03:20"."""
    return str(timedelta(seconds=int(seconds))).removeprefix("0:")


@contextmanager
def _lines(description: str, total: int, console: Console) -> Iterator[Advance]:
    started = last = time.monotonic()
    shown = latest = ""

    def advance(done: int, note: str) -> None:
        nonlocal last, shown, latest
        latest = f"{description}: {done}/{total}" + (f", {note}" if note else "")
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last, shown = now, latest
            left = f", {clock((now - started) / done * (total - done))} left" if 0 < done < total else ""
            console.print(f"{latest}{left}", highlight=False, markup=False, soft_wrap=True)

    yield Advance(advance, console)
    if latest and latest != shown:
        console.print(f"{latest} ({time.monotonic() - started:.1f} s)", highlight=False, markup=False, soft_wrap=True)
