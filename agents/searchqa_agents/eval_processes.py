"""Plays an evaluation's parts in processes of their own, which end with the one that started them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from searchqa_agents.answers import Journal, Part
from searchqa_agents.settings import EvalSettings, LMAgentSettings
from searchqa_envs.errors import SearchQAError

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_MESSAGES = 0.2
SECONDS_TO_END = 10.0


class ProcessError(SearchQAError):
    """A process that plays a part has ended without a word."""


def play_in_processes(settings: EvalSettings, path: Path, advance: Callable[[int, str], object]) -> int:
    """Play what is missing in ``settings.processes`` processes, each a part; returns how many episodes were played.

    The first process that fails ends the others, and its error is raised; so does an interrupt. What they have played is in their journals.
    """
    context = multiprocessing.get_context("spawn")  # a fork would share the state of torch and of open connections
    count = settings.processes
    processes: list[Any] = []
    receivers: list[Connection] = []
    done = [0] * count
    try:
        for number in range(count):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_play_part, args=(settings, path, Part(number, count), sys.argv, sender), name=f"part {number}/{count}"
            )
            process.start()
            sender.close()  # so that the end of the process is the end of what it says
            processes.append(process)
            receivers.append(receiver)
        open_ones = list(range(count))
        while open_ones:
            for ready in wait([receivers[number] for number in open_ones]):
                number = next(one for one in open_ones if receivers[one] is ready)
                try:
                    said = receivers[number].recv()
                except EOFError:
                    processes[number].join(SECONDS_TO_END)
                    raise ProcessError(
                        f"The process that plays part {number}/{count} has ended (exit code {processes[number].exitcode}); the system may have killed "
                        "it for its memory. Fewer processes, or a smaller num_envs, need less."
                    ) from None
                if isinstance(said, BaseException):
                    raise said
                if said is None:
                    open_ones.remove(number)
                    continue
                done[number], note = said
                advance(sum(done), note)
        return sum(done)
    finally:
        _end(processes)
        for receiver in receivers:
            receiver.close()


def _end(processes: Sequence[Any]) -> None:
    """Nothing is lost by it: an episode is kept as soon as it has ended."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(SECONDS_TO_END)
        if process.is_alive():
            process.kill()
            process.join()


def _play_part(settings: EvalSettings, path: Path, part: Part, argv: list[str], sender: Connection) -> None:
    """What such a process does: it says (episodes played, a few words) now and then, None at its end, or the error that ended it."""
    from searchqa_agents.eval_plan import plan_sets
    from searchqa_agents.eval_run import play
    from searchqa_agents.threads import set_threads

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt of the terminal is told to the first process, which ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = argv  # for the stamp
    set_threads(settings.threads)
    settings.device = _own_device(settings, part)
    last = 0.0

    def advance(played: int, note: str) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_MESSAGES:
            last = time.monotonic()
            sender.send((played, note))

    try:
        with Journal(path, part) as journal:
            sender.send((play(settings, journal, plan_sets(settings), advance), ""))
        sender.send(None)
    except Exception as error:  # noqa: BLE001  # of any kind: the first process raises it
        sender.send(_sendable(error))
    sender.close()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)  # at once, whatever the main thread waits for: all that has ended is in the journal


def _own_device(settings: EvalSettings, part: Part) -> str:
    """``device=auto`` is a GPU of its own for each process where there are several, and a model to put there."""
    from searchqa_agents.loading import chosen_device

    agent = settings.agent
    if settings.device != "auto" or not any(isinstance(one, LMAgentSettings) for one in (agent, getattr(agent, "lm", None))):
        return settings.device
    device = chosen_device(settings.device)
    if device == "cuda":
        import torch

        return f"cuda:{part.number % torch.cuda.device_count()}"
    return device


def _sendable(error: Exception) -> Exception:
    """The error itself, or one that says the same where it cannot go from one process to another."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # noqa: BLE001  # whatever its class does
        return ProcessError(f"{type(error).__name__}: {error}")
