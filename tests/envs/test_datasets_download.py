"""Downloads, with the real client against a server on the loopback that speaks the hub's protocol.

What depends on settings that the client reads once, when imported, runs in a process of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

from searchqa_agents.data_command import main
from searchqa_envs.datasets import load_source
from searchqa_envs.errors import DataNotFoundError

REPO = "RUC-NLPIR/FlashRAG_datasets"
OLD, NEW = "a" * 40, "b" * 40
CHUNK = 10 * 1024 * 1024  # the client keeps what it received in pieces of this size


def rows(*ids: str, padding: int = 0) -> bytes:
    lines = [{"id": identifier, "question": "q" * (1 + padding), "golden_answers": ["a"], "metadata": {}} for identifier in ids]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@dataclass
class Hub:
    """What the server has and does: files by commit, and the faults to commit."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    main: str = OLD
    large: set[str] = field(default_factory=set)  # paths that are kept as LFS files
    break_after: dict[str, int] = field(default_factory=dict)  # path: bytes sent before the connection breaks, once
    always_break: bool = False
    corrupt: set[str] = field(default_factory=set)  # paths whose bytes differ from their checksum
    declared_size: int | None = None
    status: int | None = None  # answer everything with it
    html: bool = False
    log: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    url: str = ""

    def blob(self, content: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """The requests are in the hub's log."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.log.append((self.command, path, self.headers.get("Range")))
        if hub.status is not None:
            self.reply(hub.status, {}, b'{"error": "no"}', body)
        elif hub.html:
            self.reply(200, {"Content-Type": "text/html"}, b"<html>Please log in</html>", body)
        elif path.startswith(f"/api/datasets/{REPO}/tree/"):
            self.tree(path.removeprefix(f"/api/datasets/{REPO}/tree/"), body)
        elif path.startswith(f"/api/datasets/{REPO}"):
            revision = path.removeprefix(f"/api/datasets/{REPO}").removeprefix("/revision/") or "main"
            commit = hub.main if revision == "main" else revision
            if commit in hub.commits:
                self.reply(200, {}, json.dumps({"id": REPO, "sha": commit, "siblings": []}).encode(), body)
            else:
                self.reply(404, {"X-Error-Code": "RevisionNotFound"}, b"{}", body)
        elif path.startswith(f"/datasets/{REPO}/resolve/"):
            commit, _, name = path.removeprefix(f"/datasets/{REPO}/resolve/").partition("/")
            self.file(commit, name, body)
        else:
            self.reply(404, {"X-Error-Code": "RepoNotFound"}, b"{}", body)

    def tree(self, rest: str, body: bool) -> None:
        commit, _, folder = rest.partition("/")
        items = []
        for path, content in self.hub.commits[commit].items():
            if path.rpartition("/")[0] != folder:
                continue
            size = self.hub.declared_size or len(content)
            item: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": self.hub.blob(content)}
            if path in self.hub.large:
                item["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
            items.append(item)
        self.reply(200, {}, json.dumps(items).encode(), body)

    def file(self, commit: str, name: str, body: bool) -> None:
        content = self.hub.commits[commit].get(name)
        if content is None:
            self.reply(404, {"X-Error-Code": "EntryNotFound"}, b"{}", body)
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{self.hub.blob(content)}"', "Accept-Ranges": "bytes"}
        if name in self.hub.large:
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
        if name in self.hub.corrupt:
            content = content[:-1] + b"!"
        start = 0
        requested = self.headers.get("Range")
        if requested:
            start = int(requested.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = content[start:]
        cut = self.hub.break_after.get(name)
        if body and cut is not None:
            if not self.hub.always_break:
                del self.hub.break_after[name]
            self.reply(206 if requested else 200, headers, part, body, send=0 if self.hub.always_break and requested else cut)
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.reply(206 if requested else 200, headers, part, body)

    def reply(self, status: int, headers: dict[str, str], content: bytes, body: bool, send: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:send])


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub with two commits of nq; the newer one has more questions."""
    hub = Hub(
        commits={
            OLD: {
                "nq/dev.jsonl": rows("dev_0"),
                "nq/train.jsonl": rows("train_0", "train_1"),
                "README.md": b"x",
                "popqa/test.jsonl": rows("t"),
            },
            NEW: {"nq/dev.jsonl": rows("dev_0", "dev_1"), "nq/test.jsonl": rows("test_0")},
        },
        large={"nq/train.jsonl"},
    )
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def run(tmp_path: Path, endpoint: str, code: str, stderr: int = subprocess.PIPE, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SEARCHQA_"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "SEARCHQA_CACHE": str(tmp_path / "cache"), "NO_PROXY": "*"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment, timeout=60, check=False
    )


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Command:
    """``searchqa data`` in this process, with the hub and the cache of this test."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd
        monkeypatch.setenv("SEARCHQA_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("SEARCHQA_DATA", raising=False)

    def __call__(self, endpoint: str, *arguments: str) -> Done:
        self.monkeypatch.setenv("HF_ENDPOINT", endpoint)
        return Done(main(arguments), *self.capfd.readouterr())


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capfd)


def record(tmp_path: Path, name: str = "nq") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "cache" / "data" / name / "searchqa-data.json").read_text())
    return found


def gets(hub: Hub, name: str) -> list[str | None]:
    return [requested for method, path, requested in hub.log if method == "GET" and path.endswith(f"/{name}")]


LOAD = "from searchqa_envs.datasets import load_source; s = load_source('nq'); print(s.split, [q.id for q in s], s.stamp()['revision'])"


def test_an_absent_set_is_downloaded_and_its_revision_recorded(hub: Hub, tmp_path: Path) -> None:
    done = run(tmp_path, hub.url, LOAD)
    assert done.stdout.strip() == f"train ['train_0', 'train_1'] {OLD}", done.stderr
    train, dev = hub.commits[OLD]["nq/train.jsonl"], hub.commits[OLD]["nq/dev.jsonl"]
    assert record(tmp_path) == {
        "repo": REPO,
        "revision": OLD,
        "complete": True,
        "files": {
            "dev.jsonl": {"sha256": hashlib.sha256(dev).hexdigest(), "size": len(dev)},
            "train.jsonl": {"sha256": hashlib.sha256(train).hexdigest(), "size": len(train)},
        },
    }
    assert not list((tmp_path / "cache" / "data" / ".partial").glob("*"))
    hub.log.clear()
    done = run(tmp_path, hub.url, LOAD)
    assert done.stdout.strip() == f"train ['train_0', 'train_1'] {OLD}"
    assert hub.log == []  # what is here is not asked for again


def test_the_recorded_revision_is_used_again_until_another_is_asked_for(hub: Hub, command: Command, tmp_path: Path) -> None:
    assert command(hub.url, "download", "nq").returncode == 0
    hub.main = NEW
    again = command(hub.url, "download", "nq", "--force")
    assert f"{REPO} at {OLD}" in again.stdout, again.stderr
    newer = command(hub.url, "download", "nq", "--revision", "main")
    assert f"{REPO} at {NEW}" in newer.stdout, newer.stderr
    assert sorted(record(tmp_path)["files"]) == ["dev.jsonl", "test.jsonl"]
    assert sorted(path.name for path in (tmp_path / "cache" / "data" / "nq").glob("*.jsonl")) == ["dev.jsonl", "test.jsonl"]
    assert command(hub.url, "verify", "nq").returncode == 0


def test_a_connection_that_breaks_mid_file_is_resumed_where_it_broke(hub: Hub, command: Command, tmp_path: Path) -> None:
    content = rows(*map(str, range(20)), padding=CHUNK // 10)
    hub.commits[OLD]["nq/train.jsonl"] = content
    hub.break_after["nq/train.jsonl"] = CHUNK + 100_000
    done = command(hub.url, "download", "nq")
    assert done.returncode == 0, done.stderr
    first, second = gets(hub, "nq/train.jsonl")
    assert first is None
    assert second == f"bytes={CHUNK}-"
    assert (tmp_path / "cache" / "data" / "nq" / "train.jsonl").read_bytes() == content


def test_a_download_cut_short_is_not_taken_for_a_set_and_goes_on_later(hub: Hub, command: Command, tmp_path: Path) -> None:
    hub.status = None
    hub.corrupt.add("nq/train.jsonl")
    failed = command(hub.url, "download", "nq")
    assert failed.returncode == 1
    assert "train.jsonl" in failed.stderr
    assert "must have the sha256" in failed.stderr
    folder = tmp_path / "cache" / "data" / "nq"
    assert [path.name for path in folder.iterdir()] == ["searchqa-data.json"]
    assert record(tmp_path)["complete"] is False
    with pytest.raises(DataNotFoundError, match="must have the sha256"):
        load_source("nq")
    hub.corrupt.clear()
    hub.main = NEW  # the download that goes on is still of the revision it began with
    hub.log.clear()
    assert command(hub.url, "download", "nq").returncode == 0
    assert record(tmp_path)["revision"] == OLD
    assert gets(hub, "nq/dev.jsonl") == []  # that one had arrived
    assert gets(hub, "nq/train.jsonl") == [None]


@pytest.mark.parametrize(("name", "kind"), [("nq/train.jsonl", "sha256"), ("nq/dev.jsonl", "git blob sha1")])
def test_a_wrong_checksum_is_refused_for_large_and_small_files(hub: Hub, command: Command, tmp_path: Path, name: str, kind: str) -> None:
    hub.corrupt.add(name)
    done = command(hub.url, "download", "nq")
    assert done.returncode == 1
    assert f"{name} of {REPO} at {OLD} must have the {kind}" in done.stderr
    assert "run the download again" in done.stderr
    assert not list((tmp_path / "cache" / "data" / ".partial").rglob(Path(name).name))


def test_a_failed_renewal_leaves_the_finished_download_as_it_was(hub: Hub, command: Command, tmp_path: Path) -> None:
    assert command(hub.url, "download", "nq").returncode == 0
    before = record(tmp_path)
    hub.main, hub.corrupt = NEW, {"nq/dev.jsonl"}
    assert command(hub.url, "download", "nq", "--revision", NEW).returncode == 1
    assert record(tmp_path) == before
    assert load_source("nq").stamp()["revision"] == OLD


@pytest.mark.parametrize(
    ("status", "part"),
    [
        (401, "refuses RUC-NLPIR/FlashRAG_datasets (401)"),
        (403, "(403). Ask for access"),
        (404, "(404). Check HF_ENDPOINT"),
        (418, "failed with status 418"),
    ],
)
def test_refusals_of_the_hub_are_typed_and_name_the_way_out(hub: Hub, command: Command, tmp_path: Path, status: int, part: str) -> None:
    hub.status = status
    done = command(hub.url, "download", "nq")
    assert done.returncode == 1
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cache" / "data" / "nq").exists()


def test_a_dead_server_a_login_page_and_offline_mode(hub: Hub, command: Command, tmp_path: Path) -> None:
    dead = command("http://127.0.0.1:9", "download", "nq")
    assert (dead.returncode, "Traceback" in dead.stderr) == (1, False)
    assert "http://127.0.0.1:9 cannot be reached" in dead.stderr
    hub.html = True
    page = command(hub.url, "download", "nq")
    assert "does not answer as the hub does" in page.stderr
    hub.log.clear()
    loaded = run(tmp_path, hub.url, LOAD, HF_HUB_OFFLINE="1")
    assert "DataNotFoundError" in loaded.stderr
    assert "HF_HUB_OFFLINE is set" in loaded.stderr
    assert hub.log == []
    assert "SearchQA-World-v0 is embedded" in loaded.stderr


def test_people_see_a_progress_bar(hub: Hub, tmp_path: Path) -> None:
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    try:
        run(tmp_path, hub.url, LOAD, stderr=writer)
        assert b"train.jsonl" in os.read(reader, 100_000)
    finally:
        os.close(reader)
        os.close(writer)


def test_unknown_revisions_and_repositories_that_changed(hub: Hub, command: Command, tmp_path: Path) -> None:
    done = command(hub.url, "download", "nq", "--revision", "v9")
    assert f"{REPO} has no revision 'v9'" in done.stderr
    done = command(hub.url, "download", "triviaqa")
    assert f"{REPO} at {OLD} has no files like triviaqa/*.jsonl" in done.stderr
    done = command(hub.url, "download", "squad")
    assert (done.returncode, "one of hotpotqa" in done.stderr) == (2, True)


def test_a_disk_too_small_is_said_before_the_download(hub: Hub, command: Command, tmp_path: Path) -> None:
    hub.declared_size = 10**18
    done = command(hub.url, "download", "nq")
    assert done.returncode == 1
    assert "nq needs 2,000,000,000.0 GB more" in done.stderr
    assert gets(hub, "nq/train.jsonl") == []


def test_a_disk_that_fills_up_is_a_typed_error(hub: Hub, command: Command, tmp_path: Path) -> None:
    hub.commits[OLD]["nq/train.jsonl"] = rows(*map(str, range(200)), padding=1000)
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from searchqa_agents.data_command import main\nsys.exit(main(['download', 'nq']))"
    )
    done = run(tmp_path, hub.url, code)
    assert done.returncode == 1, done.stderr
    assert "the disk is full" in done.stderr
    assert not (tmp_path / "cache" / "data" / "nq" / "train.jsonl").exists()
    assert command(hub.url, "download", "nq").returncode == 0


def test_files_of_ones_own_are_not_overwritten(hub: Hub, command: Command, tmp_path: Path) -> None:
    own = tmp_path / "data" / "nq"
    own.mkdir(parents=True)
    (own / "questions.jsonl").write_bytes(rows("mine"))
    done = command(hub.url, "download", "nq", "--data-dir", str(tmp_path / "data"))
    assert "has files that were not downloaded" in done.stderr
    assert (own / "questions.jsonl").read_bytes() == rows("mine")


def test_changed_files_are_found_by_verify_and_mended_by_force(hub: Hub, command: Command, tmp_path: Path) -> None:
    assert command(hub.url, "download", "nq").returncode == 0
    path = tmp_path / "cache" / "data" / "nq" / "dev.jsonl"
    path.write_bytes(rows("dev_9"))
    found = command(hub.url, "verify", "nq")
    assert found.returncode == 1
    assert "dev.jsonl: must have the sha256" in found.stdout
    assert command(hub.url, "download", "nq", "--force").returncode == 0
    assert command(hub.url, "verify", "nq").returncode == 0


@pytest.mark.slow
def test_a_server_that_always_breaks_off_ends_in_a_typed_error(hub: Hub, tmp_path: Path) -> None:
    hub.commits[OLD]["nq/train.jsonl"] = rows(*map(str, range(200)), padding=1000)
    hub.break_after["nq/train.jsonl"] = 1000
    hub.always_break = True
    done = run(tmp_path, hub.url, "import sys; from searchqa_agents.data_command import main; sys.exit(main(['download', 'nq']))")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "the connection broke" in done.stderr
    assert not (tmp_path / "cache" / "data" / "nq" / "train.jsonl").exists()
    assert len(gets(hub, "nq/train.jsonl")) > 2
