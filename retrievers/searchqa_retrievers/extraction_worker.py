"""Finds the text of pages in processes of their own, which can be ended: a page of 2 MB can keep an HTML parser busy for minutes.

``python -m searchqa_retrievers.extraction_worker`` is such a process. It writes a dot when its libraries are loaded; then it reads pages from standard input
and writes texts to standard output, each as UTF-8 after its length in bytes (8 bytes, big-endian). After the length of a text comes one more byte: 1 where it
is a text, 0 where it is the reason why there is none. It gets no environment variables of its parent but the search paths, so no keys.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import struct
import sys
from typing import BinaryIO

from searchqa_retrievers.readable_text import UnreadablePage, text_of_html

logger = logging.getLogger(__name__)

EXTRACTION_SECONDS = 10.0
"""Longest time for one page."""
START_SECONDS = 60.0
"""Longest time for a process to load its libraries."""
WORKERS = 2
MOST_PAGES = 500
"""A process is replaced after so many pages, should a library have kept something of them."""

_READY = b"."
_LENGTH = struct.Struct(">Q")
_ANSWER = struct.Struct(">Q?")


class Extractor:
    """The processes, started when first needed. Lives in one event loop."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(WORKERS)
        self._idle: list[_Worker] = []

    async def text_of_html(self, page: str) -> str:
        """See :func:`~searchqa_retrievers.readable_text.text_of_html`; :class:`UnreadablePage` also where it takes too long."""
        async with self._free:
            worker = self._idle.pop() if self._idle else _Worker(await _start())
            reusable = False
            try:
                async with asyncio.timeout(START_SECONDS):
                    await worker.be_ready()
                async with asyncio.timeout(EXTRACTION_SECONDS):
                    text = await worker.text_of_html(page)
                reusable = worker.pages < MOST_PAGES
            except UnreadablePage:
                reusable = worker.pages < MOST_PAGES
                raise
            except TimeoutError:
                raise UnreadablePage("its text was not found in time") from None
            except (EOFError, OSError) as error:
                logger.warning("the process %d, which looked for the text of a page, was lost", worker.process.pid)
                raise UnreadablePage(f"the process that looked for its text was lost: {error}") from error
            finally:
                if reusable:
                    self._idle.append(worker)
                else:
                    worker.end()
            return text

    async def close(self) -> None:
        """End the idle processes; those at work end with their task."""
        for worker in self._idle:
            worker.end()
            await worker.process.wait()
        self._idle.clear()


class _Worker:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.pages = 0
        self._ready = False

    async def be_ready(self) -> None:
        if not self._ready:
            assert self.process.stdout is not None
            await self.process.stdout.readexactly(len(_READY))
            self._ready = True

    async def text_of_html(self, page: str) -> str:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        self.pages += 1
        body = page.encode("utf-8", "replace")
        stdin.write(_LENGTH.pack(len(body)) + body)
        await stdin.drain()
        length, found = _ANSWER.unpack(await stdout.readexactly(_ANSWER.size))
        text = (await stdout.readexactly(length)).decode()
        if not found:
            raise UnreadablePage(text)
        return text

    def end(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self.process.returncode is None and (self.process.stdout is None or not self.process.stdout.at_eof()):
            self.process.kill()


async def _start() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", __name__),  # -P: no module of the folder that a run happens to be in
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ.get("PATH", ""), "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C is for the one who started the search
    )


def serve(pages: BinaryIO, texts: BinaryIO) -> None:
    """Say that the libraries are loaded, and answer pages until there are no more."""
    import trafilatura  # noqa: F401

    texts.write(_READY)
    texts.flush()
    while len(head := pages.read(_LENGTH.size)) == _LENGTH.size:
        page = pages.read(_LENGTH.unpack(head)[0]).decode()
        if hasattr(signal, "alarm"):
            signal.alarm(int(2 * EXTRACTION_SECONDS))  # ends this process, even inside a parser, should the one that asked be gone
        try:
            text, found = text_of_html(page), True
        except UnreadablePage as error:
            text, found = str(error), False
        body = text.encode("utf-8", "replace")
        texts.write(_ANSWER.pack(len(body), found) + body)
        texts.flush()
        if hasattr(signal, "alarm"):
            signal.alarm(0)


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
