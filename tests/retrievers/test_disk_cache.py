"""DiskCached: one question for all processes, exact answers, killed claimers, hostile files, full disks."""

import copy
import json
import logging
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_retrievers import Hit, Passage, RetrieverError, RetrieverUnavailable, SearchRequest, default_cache_key
from searchqa_retrievers.disk_cache import DiskCached
from searchqa_retrievers.stored_answers import hits_from_json, hits_to_json, stable_bytes
from searchqa_retrievers.testing import LostBackEndContract, RetrieverContract
from searchqa_retrievers.types import SERVER_NOT_REACHED

TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates too
HITS = st.lists(st.builds(Hit, st.builds(Passage, TEXTS, TEXTS, TEXTS), st.floats(allow_nan=False)), max_size=4)
KEYS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS | st.binary(max_size=8),
    lambda parts: st.lists(parts, max_size=3).map(tuple) | st.frozensets(parts, max_size=3),
    max_leaves=8,
)


class Back:
    """Answers with the query and how often it was asked before; writes down what it was asked."""

    name = "back"

    def __init__(self, **settings):
        self.settings = settings
        self.calls = []
        self.fail = False
        self.progress = None

    def search(self, requests):
        self.calls.append([request.query for request in requests])
        if self.fail:
            raise RetrieverUnavailable("gone")
        text = f"{self.settings} {self.progress}"
        return [[Hit(Passage(str(i), request.query, text), 1 / (3 + i)) for i in range(min(request.top_k, 5))] for request in requests]

    def cache_key(self, request):
        return default_cache_key(request)

    def stamp(self):
        return {"retriever": self.name, **self.settings}


class Following(Back):
    def set_progress(self, step, total):
        self.progress = (step, total)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / "answers.db"


def ask(retriever, *queries, top_k=1):
    return retriever.search([SearchRequest(query, top_k) for query in queries])


def counts(cached):
    return cached.hits, cached.joins, cached.misses


class TestDiskCached(RetrieverContract):
    @pytest.fixture(autouse=True)
    def a_file(self, file):
        self.file = file

    def make_retriever(self):
        return DiskCached(Back(), self.file)


class TestDiskCachedWithoutRoom(TestDiskCached):
    def make_retriever(self):
        return DiskCached(Back(), self.file, max_entries=1)


class TestDiskCachedLostBackEnd(LostBackEndContract):
    @pytest.fixture(autouse=True)
    def a_file(self, file):
        self.file = file

    def make_lost_retriever(self):
        inner = Back()
        inner.fail = True
        return DiskCached(inner, self.file)


# -- what is shared ------------------------------------------------------------------------------------------------------------------------


def test_another_retriever_with_the_same_stamp_finds_the_answers(file):
    first, second = Back(k=1), Back(k=1)
    answers = ask(DiskCached(first, file), "a", "b", "a")
    cached = DiskCached(second, file)
    assert ask(cached, "b", "a") == [answers[1], answers[0]]
    assert (first.calls, second.calls) == ([["a", "b"]], [])
    assert counts(cached) == (2, 0, 0)


def test_other_settings_and_other_keys_never_share_answers(file):
    ask(DiskCached(Back(k=1), file), "a")
    other = Back(k=2)
    assert ask(DiskCached(other, file), "a")[0][0].passage.text == "{'k': 2} None"
    same = Back(k=1)
    cached = DiskCached(same, file)
    request = SearchRequest("a", 1)
    cached.search([replace(request, top_k=2), replace(request, filters={"x": "y"}), replace(request, seed=5)])
    assert other.calls == [["a"]]
    assert same.calls == [["a", "a"]]  # the seed is not part of this retriever's key


def test_answers_that_follow_progress_are_kept_for_each(file):
    inner = Following()
    cached = DiskCached(inner, file)
    texts = []
    for step in (1, 2, 1):
        cached.set_progress(step, 9)
        texts.append(ask(cached, "a")[0][0].passage.text)
    assert texts == ["{} (1, 9)", "{} (2, 9)", "{} (1, 9)"]
    assert len(inner.calls) == 2
    plain = Back()
    cached = DiskCached(plain, file)
    ask(cached, "a")
    cached.set_progress(3, 9)
    ask(cached, "a")
    assert len(plain.calls) == 1


def test_a_failure_is_never_stored_and_leaves_no_claim(file):
    inner, other = Back(), Back()
    cached = DiskCached(inner, file)
    inner.fail = True
    with pytest.raises(RetrieverUnavailable):
        ask(cached, "a", "b")
    assert len(cached) == 0
    assert cached._connected().execute("SELECT count(*) FROM claims").fetchall() == [(0,)]  # nobody has to wait for one to lapse
    ask(DiskCached(other, file), "a", "b")
    assert other.calls == [["a", "b"]]


def test_a_wrong_number_of_answers_is_an_error(file):
    class Short(Back):
        def search(self, requests):
            return []

    with pytest.raises(RetrieverError, match="0 answers to 2 requests"):
        ask(DiskCached(Short(), file), "a", "b")


def test_the_oldest_answers_go_first(file):
    inner = Back()
    cached = DiskCached(inner, file, max_entries=3)
    for query in "abcd":
        ask(cached, query)
    assert len(cached) == 3
    ask(cached, "b", "c", "d")
    ask(cached, "a")
    assert inner.calls == [["a"], ["b"], ["c"], ["d"], ["a"]]


def test_a_call_with_more_keys_than_fit_one_statement(file):
    inner = Back()
    cached = DiskCached(inner, file)
    queries = [str(number) for number in range(1201)]
    answers = ask(cached, *queries)
    assert ask(DiskCached(Back(), file), *queries) == answers
    assert ask(cached, *queries) == answers
    assert len(inner.calls) == 1


def test_counters_and_copies(file):
    cached = DiskCached(Back(), file, max_entries=7, lease=3.0)
    ask(cached, "a", "a", "b")
    ask(cached, "a")
    expected = {"search/disk_hits": 2, "search/disk_joins": 0, "search/disk_misses": 2, "search/disk_errors": 0}
    assert cached.counters() == expected
    assert copy.deepcopy(cached) is cached
    other = pickle.loads(pickle.dumps(cached))
    assert (other.max_entries, other.lease, len(other)) == (7, 3.0, 2)
    cached.close()
    ask(other, "a")


# -- bytes ---------------------------------------------------------------------------------------------------------------------------------


@given(HITS)
def test_hits_come_back_exactly(hits):
    text = json.dumps(hits_to_json(hits))
    again = hits_from_json(json.loads(text.encode("ascii")))
    assert again == hits
    assert [hit.score.hex() for hit in again] == [hit.score.hex() for hit in hits]  # minus zero too
    assert all(isinstance(hit, Hit) and isinstance(hit.passage, Passage) for hit in again)


@given(KEYS, KEYS)
def test_bytes_of_keys_are_equal_only_for_equal_keys(first, second):
    assert stable_bytes(first) == stable_bytes(copy.deepcopy(first))
    if stable_bytes(first) == stable_bytes(second):
        assert first == second


def test_bytes_of_keys_are_the_same_in_another_process():
    key = ("q", 3, None, ("x", frozenset({"a", "b"})), 1.5, True, "\ud800")
    script = "from searchqa_retrievers.stored_answers import stable_bytes; print(stable_bytes(KEY).hex())".replace("KEY", repr(key))
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert said.stdout.strip() == stable_bytes(key).hex()


def test_surrogates_that_stand_beside_each_other_stay_two(file):
    class Odd(Back):
        def search(self, requests):
            return [
                [Hit(Passage("\ud83d\ude00", "\U0001f600", "\udfff\x00"), float("inf")), Hit(Passage("", "", ""), -0.0)] for _ in requests
            ]

    first = ask(DiskCached(Odd(), file), "a", "\ud83d\ude00", "\U0001f600")
    cached = DiskCached(Odd(), file)
    assert ask(cached, "a", "\ud83d\ude00", "\U0001f600") == first
    assert cached.misses == 0
    assert len(first[0][0].passage.id) == 2


def test_a_key_of_another_type_is_an_error(file):
    class Keyed(Back):
        def cache_key(self, request):
            return (request.query, object())

    with pytest.raises(RetrieverError, match=r"need cache keys of None, numbers.*got object"):
        ask(DiskCached(Keyed(), file), "a")


# -- threads and processes -----------------------------------------------------------------------------------------------------------------


class CountingServer:
    """A real HTTP server that answers ``/?q=...`` slowly, and counts the questions."""

    def __init__(self, seconds=0.01):
        asked = self.asked = []
        self.begun = threading.Event()
        self.go = threading.Event()
        self.go.set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                (query,) = parse_qs(urlsplit(self.path).query)["q"]
                asked.append(query)
                server.begun.set()
                server.go.wait(30)
                time.sleep(seconds)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(f"answer to {query}".encode())

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.go.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


ASKING = """
import random, sys, threading
from urllib.parse import urlencode
from urllib.request import urlopen
from searchqa_retrievers import Hit, Passage, SearchRequest, default_cache_key
from searchqa_retrievers.disk_cache import DiskCached

url, file, seed, rounds, threads, lease, patience = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), *map(float, sys.argv[6:])

class Web:
    name = "web"
    def search(self, requests):
        found = []
        for request in requests:
            with urlopen(url + "?" + urlencode({"q": request.query}), timeout=60) as answer:
                found.append([Hit(Passage("1", "", answer.read().decode()), 0.1)])
        return found
    def cache_key(self, request):
        return default_cache_key(request)
    def stamp(self):
        return {"retriever": "web"}

cached = DiskCached(Web(), file, lease=lease, patience=patience)
print("ready", flush=True)
wrong = []
def work(number):
    draw = random.Random(100 * seed + number)
    for _ in range(rounds):
        queries = [str(draw.randrange(30)) for _ in range(draw.randrange(1, 5))]
        answers = cached.search([SearchRequest(query, 1) for query in queries])
        wrong.extend(query for query, hits in zip(queries, answers) if hits != [Hit(Passage("1", "", "answer to " + query), 0.1)])
workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
for worker in workers: worker.start()
for worker in workers: worker.join()
print("wrong", len(wrong), "asked", cached.misses, "requests", cached.hits + cached.joins + cached.misses)
"""


def start(server, file, seed=0, rounds=20, threads=3, lease=30.0, patience=60.0):
    words = [sys.executable, "-c", ASKING, server.url, str(file), *map(str, (seed, rounds, threads, lease, patience))]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process):
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return said.split()


def test_processes_and_their_threads_ask_each_distinct_question_once(file):
    with CountingServer() as server:
        processes = [start(server, file, seed) for seed in range(3)]
        said = [end(process) for process in processes]
    assert len(server.asked) == len(set(server.asked)) == 30
    assert [words[2] for words in said] == ["0"] * 3  # no wrong answer
    assert sum(int(words[4]) for words in said) == 30


def test_a_claim_of_a_killed_process_lapses(file):
    with CountingServer() as server:
        server.go.clear()
        killed = start(server, file, seed=1, rounds=1, threads=1, lease=1.0)
        assert server.begun.wait(30)
        killed.kill()
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL
        server.go.set()
        said = end(start(server, file, seed=1, rounds=1, threads=1, lease=20.0))
    assert said[1:3] == ["wrong", "0"]
    assert int(said[4]) >= 1


def test_who_waits_for_a_process_that_is_too_slow_asks_itself(file):
    with CountingServer() as server:
        server.go.clear()
        slow = start(server, file, seed=1, rounds=1, threads=1)
        assert server.begun.wait(30)
        before = len(server.asked)
        impatient = start(server, file, seed=1, rounds=1, threads=1, patience=0.3)
        deadline = time.monotonic() + 30
        while len(server.asked) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(server.asked) > before
        server.go.set()
        assert end(impatient)[2] == end(slow)[2] == "0"


def test_the_claim_of_a_process_that_is_slow_but_alive_is_renewed(file):
    with CountingServer() as server:
        server.go.clear()
        slow = start(server, file, seed=1, rounds=1, threads=1, lease=0.3)
        assert server.begun.wait(30)
        other = start(server, file, seed=1, rounds=1, threads=1, lease=0.3)
        assert other.stdout.readline() == "ready\n"
        time.sleep(1.2)
        asked = len(server.asked)
        server.go.set()
        said = [end(slow), end(other)]
    assert asked == 1
    assert len(server.asked) == len(set(server.asked))
    assert said[0][2] == "0"
    assert said[1][:2] == ["wrong", "0"]


def test_threads_that_miss_the_same_key_at_once_ask_once(file):
    class Slow(Back):
        def search(self, requests):
            began.set()
            assert go.wait(20)
            return super().search(requests)

    began, go = threading.Event(), threading.Event()
    inner = Slow()
    cached, other = DiskCached(inner, file), DiskCached(inner, file)  # two objects are as two processes
    answers = []
    threads = [threading.Thread(target=lambda one=one: answers.append(ask(one, "a", "a"))) for one in (cached, cached, cached, other)]
    threads[0].start()
    assert began.wait(20)
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.05)
    go.set()
    for thread in threads:
        thread.join()
    assert inner.calls == [["a"]]
    assert answers == [answers[0]] * 4
    assert cached.misses + other.misses == 1
    assert cached.hits + cached.joins + other.hits + other.joins == 7


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_share_the_file_and_outlive_each_other(file):
    """Each opens the file again, so that the one that ends first does not take the other's answers with it."""
    cached = DiskCached(Back(), file)
    ask(cached, "a")
    begin, ended = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.read(begin[0], 1)
        ask(cached, "a", "b")
        os.write(ended[1], b"x")
        os.read(begin[0], 1)
        for number in range(200):
            ask(cached, f"late {number}")
        os._exit(0 if counts(cached) == (1, 0, 202) else 1)
    ask(cached, "c")
    os.write(begin[1], b"x")
    os.read(ended[0], 1)
    cached.close()  # as when the parent ends
    os.write(begin[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    inner = Back()
    again = DiskCached(inner, file)
    ask(again, "a", "b", "c", *[f"late {number}" for number in range(200)])
    assert inner.calls == []
    assert again._connected().execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# -- files that are not what they should be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"not a database, but long enough to have a header " * 10, b"SQLite format 3\x00" + b"\xff" * 4096])
def test_a_file_that_is_no_database_is_an_error(tmp_path, content):
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    with pytest.raises(RetrieverError, match=r"notes\.txt cannot be used.*Give a file"):
        DiskCached(Back(), file)
    assert file.read_bytes() == content


def test_the_database_of_another_application_is_left_alone(tmp_path):
    file = tmp_path / "theirs.db"
    with sqlite3.connect(file) as theirs:
        theirs.execute("CREATE TABLE answers (mine TEXT)")
    theirs.close()
    with pytest.raises(RetrieverError, match="the database of another application"):
        DiskCached(Back(), file)
    with sqlite3.connect(file) as theirs:
        assert theirs.execute("SELECT name FROM sqlite_master").fetchall() == [("answers",)]
    theirs.close()


def test_a_later_version_is_an_error(file):
    DiskCached(Back(), file).close()
    with sqlite3.connect(file) as database:
        database.execute("PRAGMA user_version=9")
    database.close()
    with pytest.raises(RetrieverError, match="its version is 9"):
        DiskCached(Back(), file)


def test_places_that_cannot_be_written_are_errors(tmp_path):
    for place in (tmp_path, "/proc/cache.db", "/dev/null/cache.db"):
        with pytest.raises(RetrieverError, match="cannot be used"):
            DiskCached(Back(), place)


@pytest.mark.parametrize(
    "change",
    ["UPDATE answers SET hits = replace(hits, 'a', 'b')", "UPDATE answers SET hits = 3", "DROP TABLE answers", "DROP TABLE claims"],
)
def test_a_damaged_answer_is_never_given(file, change):
    cached = DiskCached(Back(), file)
    ask(cached, "a")
    with sqlite3.connect(file) as database:
        database.execute(change)
    database.close()
    with pytest.raises(RetrieverError, match=r"damaged.*Delete it"):
        ask(cached, "a", "b")


def test_pages_overwritten_with_rubbish_are_an_error(file):
    cached = DiskCached(Back(), file)
    ask(cached, *map(str, range(500)))
    cached.close()
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(4096)
        opened.write(os.urandom(size - 4096))
    with pytest.raises(RetrieverError, match=r"damaged|cannot be used"):
        ask(DiskCached(Back(), file), *map(str, range(500)))


# -- trouble that passes -------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_stores_nothing_more_and_says_so_once(file, caplog):
    inner = Back()
    cached = DiskCached(inner, file)
    ask(cached, "before")
    pages = cached._connected().execute("PRAGMA page_count").fetchone()[0]
    cached._connected().execute(f"PRAGMA max_page_count={pages}")
    with caplog.at_level(logging.WARNING):
        for number in range(300):
            assert ask(cached, f"{number}", top_k=5)[0][0].passage.title == str(number)
    assert len([record for record in caplog.records if "Cache file" in record.message]) == 1
    assert cached.errors > 0
    assert ask(cached, "before") == [[Hit(Passage("0", "before", "{} None"), 1 / 3)]]
    cached._connected().execute(f"PRAGMA max_page_count={pages + 100_000}")
    calls = len(inner.calls)
    ask(cached, "after")
    ask(cached, "after")
    assert len(inner.calls) == calls + 1  # there is room again


def test_a_locked_file_keeps_nobody_from_an_answer(file, caplog):
    cached = DiskCached(Back(), file)
    cached._connected().execute("PRAGMA busy_timeout=20")
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with caplog.at_level(logging.WARNING):
        assert ask(cached, "a")[0][0].passage.title == "a"
    assert "locked" in caplog.text
    holder.execute("ROLLBACK")
    holder.close()
    ask(cached, "a")
    assert len(cached) == 1


LIMITED = """
import resource, sys
from searchqa_retrievers import Hit, Passage, SearchRequest, from_function
from searchqa_retrievers.disk_cache import DiskCached
cached = DiskCached(from_function(lambda queries, k: [[(query, "", "text " * 400, 1.0)] for query in queries], name="f"), sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for number in range(300):
    assert cached.search([SearchRequest(str(number), 1)])[0][0].passage.id == str(number)
assert cached.errors > 0
print("errors", cached.errors > 0)
"""


def test_files_that_may_not_grow_are_a_full_disk(file):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Cache file") <= 1
    cached = DiskCached(Back(), file)  # and what is there is sound
    assert ask(cached, "a")[0][0].passage.title == "a"
    assert cached._connected().execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_retriever_without_a_stamp_is_an_error(file):
    class Unknown:
        def search(self, requests):
            return [[] for _ in requests]

        def cache_key(self, request):
            return default_cache_key(request)

    with pytest.raises(RetrieverError, match=r"Unknown.*stamp\(\)"):
        DiskCached(Unknown(), file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_entries": 0}, "max_entries"), ({"lease": 0}, "lease"), ({"patience": -1}, "patience"), ({"lease": 1e400}, "lease")],
)
def test_wrong_arguments_are_errors(file, arguments, message):
    with pytest.raises(RetrieverError, match=message):
        DiskCached(Back(), file, **arguments)


class Client(Back):
    """Of a server that may be down, inside a composition."""

    server = SERVER_NOT_REACHED

    def stamp(self):
        return {"retriever": "round", "inner": {"shards": [{"server": None}, {"server": self.server}]}}

    def search(self, requests):
        self.settings = self.server
        return super().search(requests)


def test_answers_are_neither_kept_nor_taken_before_it_is_known_whose_they_are(file):
    one, other = Client(), Client()
    caches = [DiskCached(one, file), DiskCached(other, file)]
    for cached in caches:
        with pytest.raises(RetrieverUnavailable, match="could not be asked what it searches"):
            ask(cached, "a")
        assert cached.search([]) == []
        assert len(cached) == 0
    assert one.calls == other.calls == []
    one.server, other.server = {"corpus_sha256": "1"}, {"corpus_sha256": "2"}
    assert [ask(cached, "a")[0][0].passage.text for cached in caches] == [f"{client.server} None" for client in (one, other)]
    one.server = SERVER_NOT_REACHED
    assert ask(caches[0], "a")[0][0].passage.text == "{'corpus_sha256': '1'} None"  # what is known is kept
    assert one.calls == [["a"]]


def test_a_retriever_that_first_finds_its_server_down_takes_the_answers_of_an_earlier_run(file):
    earlier = Client()
    earlier.server = {"corpus_sha256": "1"}
    answers = ask(DiskCached(earlier, file), "a")
    later = Client()
    cached = DiskCached(later, file)
    with pytest.raises(RetrieverUnavailable):
        ask(cached, "a")
    later.server = earlier.server
    assert ask(cached, "a") == answers
    assert later.calls == []
