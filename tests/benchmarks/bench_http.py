"""Load on a real search server: throughput, latencies, and whether every answer is the right one, also in a storm.

    python tests/benchmarks/bench_http.py --connections 1 16 64 --seconds 60
    python tests/benchmarks/bench_http.py --connections 1 16 64 --seconds 60 --storm

`searchqa serve` answers in a process of its own; client processes with up to 16 threads each share the connections of one client. Every answer is
compared with the one that the same retriever gives in this process: "mixed up" counts those that differ. A call is "lost" if it has neither an
answer nor RetrieverUnavailable within its deadline. Either makes the exit code 1.

In a storm the server, which lets few searches wait and turns the others away (503), is killed (SIGKILL) and started again all the time, and the
clients reach it through a proxy that spoils a share of the answers: late, after the client has given up; 500; 503 with Retry-After; truncated;
not of the format; no answer at all.
The proxy alone, for other tests:

    python tests/benchmarks/bench_http.py --proxy-to 8000 --share 0.3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from searchqa_retrievers import BM25Retriever, Corpus, Hit, RetrieverUnavailable, SearchRequest
from searchqa_retrievers.http_client import Http

TOP_K = 3
THREADS_OF_A_CLIENT = 16
DEADLINE = 10.0
GRACE = 5.0
"""Seconds that a busy machine may take on top of a call's deadline."""
HOST = "127.0.0.1"


# -- a proxy that spoils answers ---------------------------------------------------------------------------------------------------------------

FAULTS = ("late", "500", "503", "truncated", "wrong format", "no JSON", "hangs up")


class Proxy:
    """Passes HTTP requests on to a server, and spoils the answers to a share of the searches.

    Parameters
    ----------
    port
        The server's.
    share
        Of the searches; can be changed by ``GET /proxy?share=0.5``, which answers with what was spoilt so far.
    late
        Seconds that a late answer takes.
    """

    def __init__(self, port: int, share: float, late: float, seed: int = 0) -> None:
        self.port, self.share, self.late = port, share, late
        self.counts: Counter[str] = Counter()
        self._random = random.Random(seed)

    async def serve(self) -> None:
        server = await asyncio.start_server(self._connection, HOST, 0)
        print(f"proxy on http://{HOST}:{server.sockets[0].getsockname()[1]}", flush=True)
        async with server:
            await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                message = await _message(reader)
                if not await self._exchange(message, writer):
                    break
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _exchange(self, message: Message, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False: this connection is done."""
        words = message.head.split(b" ")
        if words[1].startswith(b"/proxy"):
            share = re.search(rb"share=([0-9.]+)", words[1])
            self.share = float(share[1]) if share else self.share
            writer.write(_reply(200, json.dumps(self.counts).encode()))
            return True
        fault = self._random.choice(FAULTS) if words[0] == b"POST" and self._random.random() < self.share else None
        if fault is not None:
            self.counts[fault] += 1
        if fault == "hangs up":
            return False
        if fault == "500":
            writer.write(_reply(500, b"boom"))
        elif fault == "503":
            writer.write(_reply(503, b'{"error": "16384 searches wait; try again"}', b"Retry-After: 1\r\n"))
        elif fault == "wrong format":
            writer.write(_reply(200, b'{"answers": [["Error: search failed"]], "error": "out of memory"}'))
        elif fault == "no JSON":
            writer.write(_reply(200, b"<html>Please log in</html>"))
        else:
            try:
                answer = await self._ask(message)
            except (OSError, asyncio.IncompleteReadError):
                self.counts["server gone"] += 1
                writer.write(_reply(502, b"the server is gone"))
                return True
            if fault == "late":
                await asyncio.sleep(self.late)
            if fault == "truncated":
                writer.write((answer.head + answer.body)[: len(answer.head) + len(answer.body) // 2])
                return False
            full = answer.head.startswith(b"HTTP/1.1 503")
            self.counts["full queue" if full else "passed on"] += words[0] == b"POST"
            writer.write(answer.head + answer.body)
        await writer.drain()
        return True

    async def _ask(self, message: Message) -> Message:
        reader, writer = await asyncio.open_connection(HOST, self.port)
        try:
            writer.write(message.head + message.body)
            return await _message(reader)
        finally:
            writer.close()


class Message(NamedTuple):
    """An HTTP request or answer whose length is in its head."""

    head: bytes
    body: bytes


async def _message(reader: asyncio.StreamReader) -> Message:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    return Message(head, await reader.readexactly(int(length[1])) if length else b"")


def _reply(status: int, body: bytes, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d -\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n%b" % (status, len(body), headers, body)


# -- processes ---------------------------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def start_server(port: int, *words: str) -> subprocess.Popen[bytes]:
    """`searchqa serve` with these words."""
    line = [sys.executable, "-m", "searchqa_agents.cli", "serve", "--port", str(port), *words]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def get(url: str) -> tuple[int, bytes]:
    """Status and body; status 0: no answer."""
    import httpx2

    try:
        reply = httpx2.get(url, timeout=5.0)
    except httpx2.RequestError:
        return 0, b""
    return reply.status_code, reply.content


def until_ready(port: int, process: subprocess.Popen[bytes], seconds: float = 120.0) -> None:
    """Wait for a server."""
    end = time.monotonic() + seconds
    while get(f"http://{HOST}:{port}/ready")[0] != 200:
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"no server on port {port}: exit code {process.poll()}")
        time.sleep(0.05)


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Kill it at the end."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def proxy(port: int, share: float, late: float) -> Iterator[str]:
    """The address of a :class:`Proxy` in a process of its own."""
    line = [sys.executable, __file__, "--proxy-to", str(port), "--share", str(share), "--late", str(late)]
    with ended(subprocess.Popen(line, stdout=subprocess.PIPE)) as process:
        assert process.stdout is not None
        yield process.stdout.readline().decode().split()[-1]


def kill_and_start_again(server: list[subprocess.Popen[bytes]], port: int, words: list[str], stop: threading.Event, every: float) -> None:
    """Until told to stop. ``server`` holds the running one, last."""
    while not stop.wait(every):
        server[-1].send_signal(signal.SIGKILL)
        server[-1].communicate()
        server.append(start_server(port, *words))
        until_ready(port, server[-1])


# -- load --------------------------------------------------------------------------------------------------------------------------------------


def made_up_corpus(size: int, seed: int = 0) -> Corpus:
    """Passages of a hundred words, whose frequencies follow Zipf's law."""
    rng = np.random.default_rng(seed)
    ranks = np.minimum(rng.zipf(1.2, (size, 100)), 50_000)
    return Corpus.from_passages((f"p{i:07d}", f"Title {i}", " ".join(f"w{rank}" for rank in row)) for i, row in enumerate(ranks))


def made_up_queries(corpus: Corpus, size: int, seed: int = 1) -> list[str]:
    """A few words of a passage each; no two are equal."""
    rng = random.Random(seed)
    queries = (" ".join(rng.sample(corpus.texts[rng.randrange(len(corpus))].split(), 4)) for _ in range(10 * size))
    return list(dict.fromkeys(queries))[:size]


class Calls(NamedTuple):
    """What one client process saw."""

    seconds: list[float]
    queries: int
    unavailable: int
    mixed_up: int
    lost: int
    counters: dict[str, float]


def ask_on(url: str, threads: int, seconds: float, expected: dict[str, list[Hit]], retries: int, seed: int) -> Calls:
    """Ask for some seconds with so many threads, which share one :class:`Http`."""
    http = Http(url, timeout=2.0, deadline=DEADLINE, retries=retries)
    queries = list(expected)
    end = time.monotonic() + seconds
    took: list[float] = []
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def ask(number: int) -> None:
        rng = random.Random(seed * 1_000 + number)
        while time.monotonic() < end:
            asked = rng.sample(queries, rng.randint(1, 4))
            started, lost, answers = time.monotonic(), False, None
            try:
                answers = http.search([SearchRequest(query, TOP_K) for query in asked])
            except RetrieverUnavailable:
                time.sleep(0.05)
            except Exception as error:  # noqa: BLE001 (whatever it is, it is neither an answer nor what a lost server must raise)
                print(f"lost: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                lost = True
            spent = time.monotonic() - started
            with lock:
                counts["lost"] += lost or spent > DEADLINE + GRACE
                if answers is not None:
                    took.append(spent)
                    counts["queries"] += len(asked)
                    counts["mixed up"] += answers != [expected[query] for query in asked]
                elif not lost:
                    counts["unavailable"] += 1

    workers = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, end + DEADLINE + GRACE - time.monotonic()))
    if not any(worker.is_alive() for worker in workers):
        http.close()
    with lock:
        counts["lost"] += sum(worker.is_alive() for worker in workers)
        return Calls(took, counts["queries"], counts["unavailable"], counts["mixed up"], counts["lost"], http.counters())


def client(results: Any, *words: Any) -> None:
    """The process of a client: puts its :class:`Calls` into ``results``."""
    results.put(ask_on(*words))
    results.close()
    results.join_thread()
    os._exit(0)  # a thread that is lost must not keep the process


def load(url: str, connections: int, seconds: float, expected: dict[str, list[Hit]], retries: int) -> Calls:
    """Ask over so many connections; the sum of what the client processes saw."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    shares = [min(THREADS_OF_A_CLIENT, connections - start) for start in range(0, connections, THREADS_OF_A_CLIENT)]
    processes = [
        context.Process(target=client, args=(results, url, threads, seconds, expected, retries, number))
        for number, threads in enumerate(shares)
    ]
    for process in processes:
        process.start()
    try:
        parts = [results.get(timeout=seconds + DEADLINE + GRACE + 60) for _ in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    counters: Counter[str] = Counter()
    for part in parts:
        counters.update(part.counters)
    took = [second for part in parts for second in part.seconds]
    return Calls(took, *(sum(part[field] for part in parts) for field in range(1, 5)), dict(counters))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each number of connections")
    parser.add_argument("--storm", action="store_true")
    parser.add_argument("--share", type=float, default=0.1, help="of the answers that a storm spoils")
    parser.add_argument("--late", type=float, default=3.0, help="seconds that a late answer takes; clients wait 2")
    parser.add_argument("--waiting", type=int, default=16, help="searches that the server lets wait, in a storm")
    parser.add_argument("--kill-every", type=float, default=10.0, help="seconds, in a storm")
    parser.add_argument("--retries", type=int, default=4, help="of the clients")
    parser.add_argument("--corpus", type=Path, help="default: a made-up one")
    parser.add_argument("--passages", type=int, default=20_000, help="of the made-up one")
    parser.add_argument("--proxy-to", type=int, metavar="PORT", help="be the proxy only")
    arguments = parser.parse_args()
    if arguments.proxy_to is not None:
        asyncio.run(Proxy(arguments.proxy_to, arguments.share, arguments.late).serve())
        return 0
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        corpus = made_up_corpus(arguments.passages) if arguments.corpus is None else Corpus.from_jsonl(arguments.corpus)
        path = arguments.corpus
        if path is None:
            path = Path(folder) / "corpus.jsonl"
            path.write_text("".join(json.dumps({"id": p.id, "title": p.title, "text": p.text}) + "\n" for p in corpus))
        queries = made_up_queries(corpus, 2_000)
        answers = BM25Retriever(corpus).search([SearchRequest(query, TOP_K) for query in queries])
        expected = dict(zip(queries, answers, strict=True))
        print(f"{len(corpus):,} passages, {len(expected):,} queries, 1 to 4 in a call, top {TOP_K}", flush=True)
        port, words = free_port(), ["--corpus", str(path), *(["--waiting", str(arguments.waiting)] if arguments.storm else [])]
        servers = [start_server(port, *words)]
        stack.callback(lambda: (servers[-1].kill(), servers[-1].communicate()))
        until_ready(port, servers[-1])
        url = f"http://{HOST}:{port}"
        if arguments.storm:
            url = stack.enter_context(proxy(port, arguments.share, arguments.late))
        wrong = 0
        for connections in arguments.connections:
            calls = under_storm(arguments, url, connections, expected, servers, port, words)
            wrong += calls.lost + calls.mixed_up
    return 1 if wrong else 0


def under_storm(
    arguments: argparse.Namespace,
    url: str,
    connections: int,
    expected: dict[str, list[Hit]],
    servers: list[subprocess.Popen[bytes]],
    port: int,
    words: list[str],
) -> Calls:
    """Load on a number of connections, in a storm if asked for; printed."""
    stop = threading.Event()
    killer = threading.Thread(target=kill_and_start_again, args=(servers, port, words, stop, arguments.kill_every))
    before, started = Counter(json.loads(get(f"{url}/proxy")[1])) if arguments.storm else Counter(), len(servers)
    if arguments.storm:
        killer.start()
    try:
        calls = load(url, connections, arguments.seconds, expected, arguments.retries)
    finally:
        stop.set()
        if arguments.storm:
            killer.join()
    p50, p99 = np.percentile(calls.seconds, [50, 99]) * 1_000 if calls.seconds else (float("nan"), float("nan"))
    print(
        f"{connections:3d} connections  {len(calls.seconds) / arguments.seconds:8,.0f} calls/s  {calls.queries / arguments.seconds:8,.0f} queries/s  "
        f"p50 {p50:7.1f} ms  p99 {p99:7.1f} ms  answered {len(calls.seconds):,}  unavailable {calls.unavailable:,}  lost {calls.lost}  "
        f"mixed up {calls.mixed_up}",
        flush=True,
    )
    if arguments.storm:
        faults = Counter(json.loads(get(f"{url}/proxy")[1]))
        faults.subtract(before)
        print(
            f"    killed {len(servers) - started}; "
            + ", ".join(f"{name} {faults[name]:,}" for name in (*FAULTS, "full queue", "server gone", "passed on"))
        )
        print("    " + ", ".join(f"{name.removeprefix('search/http_')} {value:,.0f}" for name, value in calls.counters.items()), flush=True)
    return calls


if __name__ == "__main__":
    sys.exit(main())
