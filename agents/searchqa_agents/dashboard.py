"""A live picture of a training in a terminal: progress, curves, alarms, and a sample episode now and then.

It has the terminal's other screen while it runs, so that it does not flicker or scroll; what was said meanwhile is printed when it ends. Text of a policy or
of a corpus may be hostile: it reaches the terminal as plain characters only (:mod:`searchqa_agents.episode_text`), never as markup or control sequences.
"""

from __future__ import annotations

import io
import logging
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from searchqa_agents.episode_text import head_of, plain_text, verdict
from searchqa_agents.launch import launched
from searchqa_agents.progress import Advance, clock, shown_on
from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    from searchqa_agents.trajectory import Trajectory

SETTINGS = ("auto", "off")
SMALLEST = (60, 16)
"""Columns and lines below which there are bars instead."""
FRAMES_PER_SECOND = 2
SECONDS_PER_EPISODE = 8.0
"""A sample stays so long, to be read."""
KEPT_LINES = 500
"""Of what was said, so many of the last are printed at the end."""

CURVES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "train": (
        ("exact match", ("charts/em",)),
        ("reward", ("charts/episodic_return",)),
        ("searches", ("charts/searches",)),
        ("entropy", ("charts/entropy",)),
        ("KL", ("losses/kl", "losses/approx_kl")),
    ),
}
"""What is drawn of a phase: a title, and the metrics of which the first that is there is taken. Of other phases: their losses."""
PHASES = ("warmup", "sft", "train")
_BLOCKS, _PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_COLOURS = {"right": "bold green", "partly": "yellow", "wrong": "bold red", "no answer": "bold red", "lost": "bold red"}
_PROMPT, _POLICY, _ENVIRONMENT = "dim", "bold cyan", "green"


def check_setting(value: str) -> None:
    """Raise ``ConfigurationError`` for a value of ``dashboard`` that there is not."""
    if value not in SETTINGS:
        raise ConfigurationError(f"dashboard must be one of {list(SETTINGS)}; got {value!r}.")


def terminal() -> Console | None:
    """The terminal that a dashboard can have; None for a file, a pipe, a terminal that is dumb or too small, or one that several processes write to."""
    stream = sys.stderr
    if not stream.isatty() or launched():
        return None
    console = Console(file=stream)
    fits = console.size.width >= SMALLEST[0] and console.size.height >= SMALLEST[1]
    return console if console.is_terminal and not console.is_dumb_terminal and fits else None


class Dashboard:
    """What is shown; a watcher of a run's folder, and a display of progress.

    Parameters
    ----------
    title
        The run's name.
    console
        The terminal.
    lines
        Of ``metrics.jsonl``, of a run that goes on: its curves go on too.
    seconds
        How long the run has taken so far.
    """

    def __init__(self, title: str, console: Console, lines: Sequence[Mapping[str, Any]] = (), seconds: float = 0.0) -> None:
        self.title = plain_text(title)
        self.console = console
        self._lock = threading.RLock()
        self._started = time.monotonic() - seconds
        self._curves: dict[str, dict[str, list[float]]] = {}
        self._latest: dict[str, Any] = {}
        self._phase = ""
        self._measured: dict[str, float] = {}
        self._task: tuple[str, int, int, str, float] | None = None  # description, done, total, note, when it began
        self._messages: deque[str] = deque(maxlen=3)
        self._kept: deque[str] = deque(maxlen=KEPT_LINES)
        self._episode: tuple[int, Trajectory] | None = None
        self._shown_since = -math.inf
        self._last: RenderableType = Text("")
        for line in lines:
            self.log(line["phase"], line["step"], line)
        self._live = Live(
            get_renderable=self.render,
            console=console,
            screen=True,
            refresh_per_second=FRAMES_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    # -- what it is told -----------------------------------------------------------------------------------------------------------------

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """See :class:`searchqa_agents.runs.Watcher`."""
        with self._lock:
            if phase not in PHASES:
                sampled = [float(value) for name, value in values.items() if name.endswith("sampled/em")]
                if sampled:
                    self._measured[phase] = sampled[0]
                return
            self._phase, self._latest = phase, {**values, "step": step}
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._curves.setdefault(phase, {}).setdefault(name, []).append(float(value))

    def episode(self, phase: str, step: int, trajectory: Trajectory, *, kept: bool) -> None:
        """See :class:`searchqa_agents.runs.Watcher`."""
        with self._lock:
            if time.monotonic() - self._shown_since >= SECONDS_PER_EPISODE:
                self._episode, self._shown_since = (step, trajectory), time.monotonic()

    def finished(self, summary: Mapping[str, Any], page: Path | None) -> None:
        """Nothing: the table at the end is printed below."""

    def close(self, failed: bool) -> None:
        """Nothing: leaving the context ends it."""

    def say(self, text: str) -> None:
        """Show a line, and print it once the dashboard has ended."""
        with self._lock:
            for line in text.rstrip("\n").split("\n"):
                if line.strip():
                    self._messages.append(plain_text(line))
                    self._kept.append(plain_text(line))

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """See :func:`searchqa_agents.progress.progress`."""
        outer, began = self._task, time.monotonic()
        done, last_note = 0, ""

        def advance(now: int, note: str) -> None:
            nonlocal done, last_note
            done, last_note = now, note
            with self._lock:
                self._task = (description, now, total, note, began)

        with self._lock:
            self._task = (description, 0, total, "", began)
        try:
            yield Advance(advance, self.say)
        finally:
            with self._lock:
                self._task = outer
                if done:
                    note = f", {last_note}" if last_note else ""
                    self._kept.append(plain_text(f"{description}: {done}/{total}{note} ({time.monotonic() - began:.1f} s)"))

    # -- the terminal --------------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Dashboard:
        self._restore = _take_output(self.say)
        self._before_term = _on_termination(self._end)
        self._live.start()
        self.console.file.write("\x1b[?7l")  # a character that is wider than it is said to be must not begin a new line
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._live.refresh()  # also what ended between two frames has been seen
        finally:
            self._end()
            if self._before_term is not None:
                signal.signal(signal.SIGTERM, self._before_term)
            self._restore()
            for message in self._kept:
                self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _end(self) -> None:
        self.console.file.write("\x1b[?7h")
        self._live.stop()

    # -- the picture ---------------------------------------------------------------------------------------------------------------------

    def render(self) -> RenderableType:
        """The whole screen as it is now."""
        if not self._lock.acquire(timeout=0.5):  # held by a thread that a signal has interrupted, and that waits for this one
            return self._last
        try:
            width, height = self.console.size
            curves, numbers = self._curve_rows(), self._numbers()
            wide = width >= 76
            high = max(len(curves), len(numbers) if wide else 0, 5) + 2
            messages = list(self._messages)[-(3 if height >= 24 else 1) :]
            layout = Layout()
            rows = [Layout(self._head(width), size=2)]
            left = Layout(self._curve_table(curves, width - 26 if wide else width))
            middle = Layout(size=high)
            middle.split_row(*([left, Layout(_number_table(numbers), size=26)] if wide else [left]))
            rows.append(middle)
            if messages:
                text = Text("\n".join(messages), no_wrap=True, overflow="ellipsis", style="yellow")
                rows.append(Layout(text, size=len(messages)))
            room = height - 2 - high - len(messages)
            if room >= 4:
                rows.append(Layout(self._episode_panel(width, room), size=room))
            layout.split_column(*rows)
            self._last = layout
            return layout
        finally:
            self._lock.release()

    def _head(self, width: int) -> RenderableType:
        title = Text(self.title, style="bold", no_wrap=True, overflow="ellipsis")
        title.append(f"  {clock(time.monotonic() - self._started)}", style="dim")
        if self._task is None:
            return Group(title, Text(""))
        description, done, total, note, began = self._task
        seconds = time.monotonic() - began
        left = f"{clock(seconds / done * (total - done))} left" if 0 < done < total else clock(seconds)
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True, max_width=width // 3)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        bar = ProgressBar(total=max(total, 1), completed=done)
        grid.add_row(Text(plain_text(description), overflow="ellipsis"), bar, Text(f"{done}/{total}  {left}  {plain_text(note)}"))
        return Group(title, grid)

    def _curve_rows(self) -> list[tuple[str, list[float]]]:
        own = self._curves.get(self._phase, {})
        rows = []
        for title, names in CURVES.get(self._phase, ()):
            found = next((own[name] for name in names if name in own), None)
            if found is not None:
                rows.append((title, found))
        if not rows:
            rows = [(name.removeprefix("losses/").replace("_", " "), values) for name, values in own.items() if name.startswith("losses/")]
        return rows[:6]

    def _curve_table(self, rows: Sequence[tuple[str, list[float]]], width: int) -> RenderableType:
        encoding = str(getattr(self.console.file, "encoding", None) or "utf-8").lower()
        blocks = _BLOCKS if encoding.startswith("utf") else _PLAIN_BLOCKS
        text = Text(no_wrap=True, overflow="crop")
        for title, values in rows:
            text.append(f"{title[:12]:<13}")
            text.append(sparkline(values, max(width - 4 - 13 - 9, 8), blocks), style="cyan")
            latest = f"{values[-1]:.3g}"
            text.append(f" {latest if len(latest) <= 8 else f'{values[-1]:.1e}':>8}\n")
        return Panel(text, title=self._phase or "waiting for the first step", title_align="left", padding=(0, 1))

    def _numbers(self) -> list[tuple[str, str]]:
        latest = self._latest
        seconds = sum(latest.get(f"time/{part}", 0.0) for part in ("rollout", "data", "update"))
        rows: list[tuple[str, str]] = [("step", str(latest.get("step", "-")))]
        if seconds and "charts/tokens" in latest:
            rows.append(("tokens/s", f"{latest['charts/tokens'] / seconds:,.0f}"))
        if seconds:
            rows.append(("seconds a step", f"{seconds:.3g}"))
        if "charts/learning_rate" in latest:
            rows.append(("learning rate", f"{latest['charts/learning_rate']:.2g}"))
        rows.append(("memory, peak", memory_text()))
        return rows + [(f"EM {name}"[:14], f"{value:.3f}") for name, value in list(self._measured.items())[-1:]]

    def _episode_panel(self, width: int, room: int) -> RenderableType:
        if self._episode is None:
            return Panel(Text("A sample episode is shown here once there is one.", style="dim"), title="episode", title_align="left")
        step, trajectory = self._episode
        lines = episode_lines(trajectory, width - 4, room - 2, self.console)
        return Panel(Group(*lines), title=f"an episode of step {step}", title_align="left", padding=(0, 1))


def sparkline(values: Sequence[float], width: int, blocks: str = _BLOCKS) -> str:
    """A curve in one line: the mean of each of ``width`` parts of the values, from the lowest to the highest of them; a gap where none is finite."""
    if not values:
        return " " * width
    count = min(width, len(values))
    edges = [round(part * len(values) / count) for part in range(count + 1)]
    means: list[float | None] = []
    for start, end in pairwise(edges):
        finite = [value for value in values[start:end] if math.isfinite(value)]
        means.append(math.fsum(finite) / len(finite) if finite else None)
    known = [mean for mean in means if mean is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    drawn = ""
    for mean in means:
        share = 0.0 if mean is None or high == low else (mean - low) / (high - low)
        drawn += " " if mean is None else blocks[min(int(share * len(blocks)), len(blocks) - 1)]
    return drawn.ljust(width)


def _number_table(rows: Sequence[tuple[str, str]]) -> RenderableType:
    text = Text(no_wrap=True, overflow="crop")
    for name, value in rows:
        text.append(f"{name:<14}", style="dim").append(f"{value:>8}\n")
    return Panel(text, padding=(0, 1))


def memory_text() -> str:
    """The most memory of this process so far, and of the GPU where torch uses one."""
    parts = []
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        parts.append(f"{peak / 1e9:.2f}G")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        parts.append(f"{torch.cuda.max_memory_allocated() / 1e9:.1f}G")
    return "+".join(parts) or "-"


def episode_lines(trajectory: Trajectory, width: int, room: int, console: Console) -> list[Text]:
    """An episode in at most ``room`` lines: how it ended, the question, and the turns, coloured by who wrote them.

    Where the whole does not fit, replies are cut first, then segments, then turns in the middle are left out.
    """
    head = [
        _cut(Text(head_of(trajectory), style=_COLOURS[verdict(trajectory)]), width, 1, console),
        _cut(Text(f"question: {plain_text(trajectory.question)}", style=_PROMPT), width, 1, console),
    ]
    fixed = [line for lines in head for line in lines]
    left = max(room - len(fixed), 0)
    for segment_lines, reply_lines in ((6, 4), (4, 2), (2, 1), (1, 1)):
        turns = [_turn_lines(trajectory, place, width, segment_lines, reply_lines, console) for place in range(len(trajectory.turns))]
        if sum(map(len, turns)) <= left:
            return fixed + [line for lines in turns for line in lines]
    body = [line for lines in turns for line in lines]
    if len(body) > left > 0:
        before = left // 2
        body = [*body[:before], Text("...", style=_PROMPT), *body[len(body) - (left - before - 1) :]] if left > 2 else body[:left]
    return (fixed + body)[:room]


def _turn_lines(trajectory: Trajectory, place: int, width: int, segment_lines: int, reply_lines: int, console: Console) -> list[Text]:
    turn = trajectory.turns[place]
    lines = _cut(Text(f"{place + 1} {plain_text(turn.segment.strip())}", style=_POLICY), width, segment_lines, console)
    if turn.observation.strip():
        lines += _cut(Text(f"  {plain_text(turn.observation.strip())}", style=_ENVIRONMENT), width, reply_lines, console)
    return lines


def _cut(text: Text, width: int, most: int, console: Console) -> list[Text]:
    """The first lines of a text that is broken at a width; the last ends in dots where there are more."""
    text.truncate((most + 1) * width)  # no need to break what cannot be shown
    lines = list(text.wrap(console, width))
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    last.truncate(max(width - 3, 0))
    last.append("...")
    return lines[:most]


class _Said(io.TextIOBase):
    """A stream whose lines go to the dashboard, in the place of the terminal that the dashboard has."""

    def __init__(self, say: Callable[[str], None], stream: TextIO) -> None:
        self._say = say
        self._stream = stream
        self._rest = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            self._say(line)
        return len(text)


def _take_output(say: Callable[[str], None]) -> Callable[[], None]:
    """Send what is printed and logged to the terminal to ``say``; returns what ends that."""
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    taken = {name: _Said(say, stream) for name, stream in streams.items() if stream.isatty()}
    handlers = [
        (handler, handler.stream)
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and any(handler.stream is streams[name] for name in taken)
    ]
    for handler, stream in handlers:
        handler.setStream(next(said for name, said in taken.items() if streams[name] is stream))
    for name, said in taken.items():
        setattr(sys, name, said)

    def restore() -> None:
        for name, said in taken.items():
            if getattr(sys, name) is said:
                setattr(sys, name, streams[name])
        for handler, stream in handlers:
            handler.setStream(stream)

    return restore


def _on_termination(end: Callable[[], None]) -> Any:
    """Give the terminal back before SIGTERM ends the process; returns what was to happen before, or None where signals cannot be handled."""
    if threading.current_thread() is not threading.main_thread():
        return None
    before = signal.getsignal(signal.SIGTERM)

    def ended(number: int, frame: FrameType | None) -> None:
        end()
        signal.signal(number, before if before is not None else signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, ended)
    return before


@contextmanager
def on_terminal(dashboard: Dashboard) -> Iterator[Dashboard]:
    """Show a dashboard, with all progress within."""
    with dashboard, shown_on(dashboard):
        yield dashboard
