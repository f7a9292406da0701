"""Progress on long work: a bar in a terminal, otherwise a line every so often."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

SECONDS_BETWEEN_LINES = 15.0

Advance = Callable[[int, str], None]


@contextmanager
def progress(description: str, total: int | None, console: Console | None = None) -> Iterator[Advance]:
    """Show how far some work is.

    Yields ``advance(done, note)``: ``done`` is the number of units finished so far (not the increment), ``note`` a few words such as "em 0.52".
    Where the output is not a terminal, a line is written at most every 15 seconds, and one at the end.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        with _lines(description, total, console) as advance:
            yield advance
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(compact=True), TextColumn("{task.fields[note]}"), console=console) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(done: int, note: str) -> None:
            bar.update(task, completed=done, note=note)

        yield advance


@contextmanager
def _lines(description: str, total: int | None, console: Console) -> Iterator[Advance]:
    started = last = time.monotonic()
    shown = latest = ""
    of = "" if total is None else f"/{total}"

    def advance(done: int, note: str) -> None:
        nonlocal last, shown, latest
        latest = f"{description}: {done}{of}" + (f", {note}" if note else "")
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last, shown = time.monotonic(), latest
            console.print(latest, highlight=False, markup=False, soft_wrap=True)

    yield advance
    if latest and latest != shown:
        console.print(f"{latest} ({time.monotonic() - started:.1f} s)", highlight=False, markup=False, soft_wrap=True)
