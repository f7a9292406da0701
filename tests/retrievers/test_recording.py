"""Recorded and Replay: the first answer holds, outages too, kills lose nothing, hostile files are errors."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_retrievers import (
    Cached,
    Corpus,
    Hit,
    NoRetriever,
    Passage,
    RandomRetriever,
    RetrieverError,
    RetrieverUnavailable,
    SearchRequest,
    build_retriever,
    default_cache_key,
)
from searchqa_retrievers.recording import Recorded, Replay, fields_of
from searchqa_retrievers.testing import HOSTILE_QUERIES, LostBackEndContract, RetrieverContract
from searchqa_retrievers.types import SERVER_NOT_REACHED

TEXTS = st.text(st.characters(exclude_categories=()), max_size=12)
CORPUS = Corpus.from_passages([("1", "River", "Thames"), ("2", "City", "London")])


class Fickle:
    """Answers with how often it was called; fails while ``fail`` is set."""

    name = "fickle"

    def __init__(self, version=1):
        self.version = version
        self.calls = []
        self.fail = None
        self.progress = None

    def search(self, requests):
        self.calls.append([request.query for request in requests])
        if self.fail is not None:
            raise self.fail
        text = f"call {len(self.calls)} {self.progress}"
        return [[Hit(Passage(str(i), request.query, text), 1 / (3 + i)) for i in range(min(request.top_k, 5))] for request in requests]

    def cache_key(self, request):
        return default_cache_key(request)

    def stamp(self):
        return {"retriever": self.name, "version": self.version}


class Steady(Fickle):
    """The same answers whenever it is called."""

    def search(self, requests):
        self.calls.clear()
        return super().search(requests)


class Following(Fickle):
    def set_progress(self, step, total):
        self.progress = (step, total)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "runs" / "record.jsonl"


def ask(retriever, *queries, top_k=1):
    return retriever.search([SearchRequest(query, top_k) for query in queries])


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


class TestRecorded(RetrieverContract):
    @pytest.fixture(autouse=True)
    def a_file(self, file):
        self.file = file

    def make_retriever(self):
        return Recorded(Steady(), self.file)


class TestRecordedLostBackEnd(LostBackEndContract):
    @pytest.fixture(autouse=True)
    def a_file(self, file):
        self.file = file

    def make_lost_retriever(self):
        inner = Fickle()
        inner.fail = RetrieverUnavailable("gone")
        return Recorded(inner, self.file)


class TestReplay(RetrieverContract):
    """Of a recording that has all that the contract asks."""

    @pytest.fixture(autouse=True)
    def a_file(self, file):
        recorded = Recorded(Steady(), file)
        for top_k in (1, 2, 3, 4, 5, 10, 10_000):
            ask(recorded, *self.queries, top_k=top_k)
        ask(recorded, *HOSTILE_QUERIES, top_k=3)
        self.file = file

    def make_retriever(self):
        return Replay(self.file)


class TestReplayOfNothing(LostBackEndContract):
    @pytest.fixture(autouse=True)
    def a_file(self, file):
        Recorded(Fickle(), file)
        self.file = file

    def make_lost_retriever(self):
        return Replay(self.file)


# -- recording -----------------------------------------------------------------------------------------------------------------------------


def test_the_first_answer_of_a_key_holds_for_the_run(file):
    inner = Fickle()
    recorded = Recorded(inner, file)
    first = ask(recorded, "a", "b", "a")
    assert ask(recorded, "b", "c", "a") == [first[1], ask(recorded, "c")[0], first[0]]
    assert inner.calls == [["a", "b"], ["c"]]
    assert recorded.counters() == {"search/record_hits": 3}
    assert [line.get("query") for line in lines(file)] == [None, "a", "b", "c"]


def test_requests_that_the_retriever_holds_equal_have_one_answer_and_a_line_each(file):
    class Blind(Fickle):
        def cache_key(self, request):
            return (request.query.lower(), request.top_k)

    inner = Blind()
    recorded = Recorded(inner, file)
    first = ask(recorded, "Who")
    assert ask(recorded, "who") == ask(recorded, "WHO") == first
    assert inner.calls == [["Who"]]
    assert len(lines(file)) == 4
    assert ask(Replay(file), "who", "WHO", "Who") == first * 3


def test_a_replay_answers_exactly_without_the_back_end(file):
    inner = Fickle()
    answers = ask(Recorded(inner, file), "a", "b\ud800", top_k=3)
    replay = Replay(file)
    assert ask(replay, "b\ud800", "a", "b\ud800", top_k=3) == [answers[1], answers[0], answers[1]]
    assert (replay.name, replay.stamp(), replay.needs_gold) == ("fickle", {"retriever": "fickle", "version": 1}, False)
    assert len(inner.calls) == 1
    assert replay.counters() == {"search/record_hits": 3}


def test_a_request_that_is_not_in_the_recording_is_a_lost_back_end(file):
    ask(Recorded(Fickle(), file), "a")
    replay = Replay(file)
    for request in (SearchRequest("b", 1), SearchRequest("a", 2), SearchRequest("a", 1, filters={"x": "y"})):
        with pytest.raises(RetrieverUnavailable, match=r"record\.jsonl has no answer to '[ab]' \(top_k [12]\)"):
            replay.search([SearchRequest("a", 1), request])
    assert len(replay.search([SearchRequest("a", 1, seed=4, turn=2, question_id="q")])[0]) == 1


def test_only_the_fields_that_keys_depend_on_tell_requests_apart(file):
    class Simulator(Fickle):
        def cache_key(self, request):
            return (default_cache_key(request), request.question_id, request.turn, request.seed)

    assert fields_of(NoRetriever()) == ()
    assert fields_of(RandomRetriever(CORPUS)) == ("seed",)
    assert fields_of(Simulator()) == ("question_id", "turn", "seed")
    recorded = Recorded(Simulator(), file)
    request = SearchRequest("a", 1, question_id="q")
    answers = recorded.search([request]) + recorded.search([replace(request, seed=1)])
    assert answers[0] != answers[1]
    assert Replay(file).search([replace(request, seed=1), request]) == [answers[1], answers[0]]


def test_a_key_that_depends_on_more_than_it_showed_is_an_error(file):
    class Sly(Fickle):
        def cache_key(self, request):
            return (request.query, request.top_k, request.seed if request.query == "sly" else 0)

    recorded = Recorded(Sly(), file)
    recorded.search([SearchRequest("sly", 1, seed=1)])
    with pytest.raises(RetrieverError, match="cannot tell two requests apart"):
        recorded.search([SearchRequest("sly", 1, seed=2)])


def test_progress_is_part_of_the_key_of_a_retriever_that_follows_it(file):
    recorded = Cached(Recorded(Following(), file))
    texts = {}
    for step in (1, 2):
        recorded.set_progress(step, 9)
        texts[step] = ask(recorded, "a")
    assert texts[1] != texts[2]
    replay = Cached(Replay(file))
    for step in (2, 1):
        replay.set_progress(step, 9)
        assert ask(replay, "a") == texts[step]
    replay.set_progress(3, 9)
    with pytest.raises(RetrieverUnavailable):
        ask(replay, "a")


@pytest.mark.parametrize("error", [RetrieverUnavailable("gone for 30 s"), ConnectionResetError("reset"), RuntimeError("broken")])
def test_an_outage_is_replayed_as_often_as_it_was_with_its_message(file, error):
    inner = Fickle()
    recorded = Recorded(inner, file)
    ask(recorded, "a")
    inner.fail = error
    messages = []
    for queries in (["b"], ["a", "c"], ["b"]):
        with pytest.raises(RetrieverUnavailable) as lost:
            ask(recorded, *queries)
        messages.append(str(lost.value))
    inner.fail = None
    answers = ask(recorded, "a", "b", "c")
    replay = Replay(file)
    for message, queries in zip(messages, (["b"], ["a", "c"], ["b"]), strict=True):
        with pytest.raises(RetrieverUnavailable) as lost:
            ask(replay, *queries)
        assert str(lost.value) == message
    assert ask(replay, "a", "b", "c") == answers


def test_an_error_that_is_no_outage_is_not_recorded(file):
    inner = Fickle()
    inner.fail = RetrieverError("top_k must be at least 1")
    with pytest.raises(RetrieverError, match="top_k"):
        ask(Recorded(inner, file), "a")
    assert len(lines(file)) == 1


def test_a_resumed_run_appends(file):
    first = ask(Recorded(Fickle(), file), "a")
    inner = Fickle()
    recorded = Recorded(inner, file)
    assert ask(recorded, "a", "b")[0] == first[0]
    assert inner.calls == [["b"]]
    assert [line.get("query") for line in lines(file)] == [None, "a", "b"]


def test_several_retrievers_in_one_recording_share_no_answers(file):
    answers = {}
    for version in (1, 2):
        answers[version] = [ask(Recorded(Fickle(version), file), "a"), ask(Recorded(Fickle(version), file), "a", "b")]
    outage = Fickle(2)
    outage.fail = RetrieverUnavailable("gone")
    with pytest.raises(RetrieverUnavailable):
        ask(Recorded(outage, file), "c")
    assert len(lines(file)) == 2 + 2 * 2 + 1
    for version in (2, 1):
        replay = Replay(file, {"version": version})
        assert [ask(replay, "a"), ask(replay, "a", "b")] == answers[version]
        assert replay.stamp() == {"retriever": "fickle", "version": version}
    with pytest.raises(RetrieverUnavailable, match="no answer"):
        ask(Replay(file, {"version": 1}), "c")
    for stamp in (None, {"retriever": "fickle"}, {"version": 3}):
        with pytest.raises(RetrieverError, match=r"must have one retriever.*Say by `stamp`.*\"version\": 2"):
            Replay(file, stamp)


def test_copies(file):
    recorded = Recorded(Fickle(), file)
    answers = ask(recorded, "a")
    replay = Replay(file)
    assert copy.deepcopy(recorded) is recorded
    assert copy.deepcopy(replay) is replay
    assert ask(pickle.loads(pickle.dumps(recorded)), "a") == ask(pickle.loads(pickle.dumps(replay)), "a") == answers


@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS, st.floats(allow_nan=False)), max_size=3), TEXTS)
def test_any_answer_comes_back_exactly(tmp_path_factory, rows, query):
    file = tmp_path_factory.mktemp("exact") / "record.jsonl"
    hits = [Hit(Passage(*row[:3]), row[3]) for row in rows]

    class Fixed(Fickle):
        def search(self, requests):
            return [list(hits) for _ in requests]

    Recorded(Fixed(), file).search([SearchRequest(query, 3)])
    again = Replay(file).search([SearchRequest(query, 3)])[0]
    assert again == hits
    assert [hit.score.hex() for hit in again] == [hit.score.hex() for hit in hits]


# -- several writers, and kills ------------------------------------------------------------------------------------------------------------

WRITING = """
import sys, time
from searchqa_retrievers import Hit, Passage, SearchRequest, from_function
from searchqa_retrievers.recording import Recorded
file, own, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
recorded = Recorded(from_function(lambda queries, k: [[("1", own, "text " * 200, 1.0)] for _ in queries], name="f"), file)
print("ready", flush=True)
titles = []
for number in range(count):
    titles.append(recorded.search([SearchRequest(str(number), 1)])[0][0].passage.title)
print(" ".join(titles), flush=True)
"""


def start(file, own, count):
    words = [sys.executable, "-c", WRITING, str(file), own, str(count)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_write_one_recording_and_agree_on_the_first_answers(file):
    processes = [start(file, own, 150) for own in ("one", "two")]
    titles = []
    for process in processes:
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        titles.append(said.split()[1:])
    assert titles[0] == titles[1]
    assert len(titles[0]) == 150
    assert [line["query"] for line in lines(file)[1:]] == [str(number) for number in range(150)]


def test_a_killed_writer_leaves_at_most_half_a_line_which_is_repaired(file):
    process = start(file, "one", 1_000_000)
    assert process.stdout.readline() == "ready\n"
    while file.stat().st_size < 100_000:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    whole = file.read_bytes()
    count = whole.count(b"\n") - 1
    file.write_bytes(whole[: whole.rfind(b"\n") + 1] + b'{"key": "half a li')
    assert len(Replay(file)) == count
    said, errors = start(file, "two", count + 3).communicate(timeout=60)
    assert said.split()[1:] == ["one"] * count + ["two"] * 3, errors
    assert len(lines(file)) == 1 + count + 3


def test_threads_write_one_recording(file):
    recorded = Recorded(Fickle(), file)
    answers = []

    def work():
        answers.append([ask(recorded, str(number), str(number + 1)) for number in range(40)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [answers[0]] * 4
    assert sorted(int(line["query"]) for line in lines(file)[1:]) == list(range(41))
    assert [ask(Replay(file), str(number), str(number + 1)) for number in range(40)] == answers[0]


# -- files that are not what they should be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "these are there: none"),
        (b'{"format": "searchqa-recording"', "these are there: none"),
        (b"[1, 2]\n", "line 1"),
        (b"null\n", "line 1"),
        (b'{"id": "1", "contents": "a corpus"}\n', "line 1"),
        (b'{"format": "searchqa-recording", "version": 2}\n', "line 1.*version 1"),
        (b'{"format": "searchqa-recording", "version": 1, "name": "f", "stamp": {}, "fields": ["__class__"]}\n', "line 1"),
        (b"\xff\xfe\x00\n", "line 1"),
    ],
)
def test_a_file_that_is_no_recording_is_an_error(tmp_path, content, message):
    file = tmp_path / "file.jsonl"
    file.write_bytes(content)
    with pytest.raises(RetrieverError, match=message):
        Replay(file)


@pytest.mark.parametrize(
    "bad",
    [
        b"half a line\n",
        b'{"key": "k"}\n',
        b'{"key": "k", "cache_key": "c", "hits": [["1", "t", "x", "high"]]}\n',
        b'{"key": "k", "cache_key": "c", "hits": [["1", "t", {"utf8": "zz"}, 1.0]]}\n',
        b'{"key": "k", "cache_key": "c", "hits": {"1": 2}}\n',
        b"3\n",
    ],
)
def test_a_bad_line_is_an_error_that_names_it(file, bad):
    recorded = Recorded(Fickle(), file)
    ask(recorded, "a")
    with file.open("ab") as opened:
        opened.write(bad)
    for use in (lambda: Replay(file), lambda: Recorded(Fickle(), file), lambda: ask(recorded, "b")):
        with pytest.raises(RetrieverError, match=r"line 3: not a line of a recording.*Remove the line"):
            use()


def test_places_that_cannot_be_written_or_read_are_errors(tmp_path):
    for place in (tmp_path, "/proc/record.jsonl", "/dev/null/record.jsonl"):
        with pytest.raises(RetrieverError, match="cannot be written"):
            Recorded(Fickle(), place)
    with pytest.raises(RetrieverError, match="cannot be read"):
        Replay(tmp_path / "nothing.jsonl")


LIMITED = """
import resource, sys
from searchqa_retrievers import RetrieverError, RetrieverUnavailable, SearchRequest, from_function
from searchqa_retrievers.recording import Recorded
recorded = Recorded(from_function(lambda queries, k: [[(query, "", "text " * 400, 1.0)] for query in queries], name="f"), sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    for number in range(300):
        recorded.search([SearchRequest(str(number), 1)])
except RetrieverUnavailable:
    print("an outage")
except RetrieverError as error:
    print(number, error)
"""


def test_a_full_disk_stops_the_run_and_leaves_whole_lines(file):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(file)], capture_output=True, text=True, timeout=60, check=True)
    assert "cannot be written" in done.stdout
    assert "Make room" in done.stdout
    recorded = int(done.stdout.split()[0])
    assert recorded > 5
    assert len(Replay(file)) == recorded
    assert file.read_bytes().endswith(b"\n")


def test_a_configuration_records_and_replays(file):
    config = {"name": "random", "seed": 3, "record": str(file)}
    requests = [SearchRequest("river", 2, seed=seed) for seed in (1, 2, 1)]
    answers = build_retriever(config, CORPUS).search(requests)

    def no_corpus():
        raise AssertionError("read")

    assert build_retriever({"name": "replay", "file": str(file)}, no_corpus).search(requests) == answers
    with pytest.raises(RetrieverError, match="no option path; it has file, stamp"):
        build_retriever({"name": "replay", "path": str(file)}, CORPUS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_share_the_recording(file):
    recorded = Recorded(Fickle(), file)
    ask(recorded, "a")
    child = os.fork()
    if child == 0:
        ask(recorded, "b")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ask(recorded, "c", "b")
    assert [line.get("query") for line in lines(file)] == [None, "a", "b", "c"]


# -- keys coarser than requests -------------------------------------------------------------------------------------------------------------


class Casefolding(Fickle):
    def cache_key(self, request):
        return (request.query.casefold(), request.top_k)


def coarse_retrievers():
    corpus = Corpus.from_passages([Passage("1", "Paris", "capital of France"), Passage("2", "Rome", "capital of Italy")])
    plain, named = SearchRequest("capital", 1), SearchRequest("capital", 1, filters={"source": "wiki"})
    titled = [SearchRequest("capital", 1, filters={"title": title}) for title in ("ROME", "rome", "Rome!")]
    sources = {"name": "sources", "sources": {"wiki": "bm25", "noise": "random"}, "default": "wiki"}
    yield "casefold", lambda: Casefolding(), [SearchRequest("Paris", 1), SearchRequest("PARIS", 1)]
    yield "sources", lambda: build_retriever({**sources, "cache_entries": 0}, corpus), [plain, named]
    yield "filtered", lambda: build_retriever({"name": "filtered", "retriever": "bm25", "cache_entries": 0}, corpus), titled


class Asked:
    """Passes all on, and writes down what it was asked."""

    def __init__(self, inner):
        self.inner, self.asked = inner, []

    def search(self, requests):
        self.asked += requests
        return self.inner.search(requests)

    def __getattr__(self, name):
        return getattr(self.inner, name)


@pytest.mark.parametrize(("make", "requests"), [case[1:] for case in coarse_retrievers()], ids=[case[0] for case in coarse_retrievers()])
@pytest.mark.parametrize("at_once", [False, True])
def test_requests_with_one_key_are_asked_once_and_all_replayed(file, make, requests, at_once):
    inner = Asked(make())
    assert len({inner.cache_key(request) for request in requests}) == 1
    retriever = Cached(Recorded(inner, file))
    for _ in range(2):
        answers = retriever.search(requests) if at_once else [retriever.search([request])[0] for request in requests]
    assert inner.asked == requests[:1]
    assert answers == [answers[0]] * len(requests)
    replay = Cached(Replay(file))
    assert [replay.search([request])[0] for request in requests] == answers
    assert len({retriever.cache_key(request) for request in requests}) == len(requests)


def test_a_lost_call_is_replayed_for_each_of_the_requests_that_share_a_key(file):
    inner = Casefolding()
    inner.fail = RetrieverUnavailable("gone")
    recorded = Recorded(inner, file)
    with pytest.raises(RetrieverUnavailable):
        ask(recorded, "Paris", "PARIS")
    inner.fail = None
    answers = ask(recorded, "Paris", "PARIS")
    assert inner.calls == [["Paris"], ["Paris"]]
    replay = Replay(file)
    with pytest.raises(RetrieverUnavailable, match="gone"):
        ask(replay, "Paris", "PARIS")
    assert ask(replay, "Paris", "PARIS") == answers


def test_threads_that_miss_one_key_at_once_ask_once(file):
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Casefolding):
        def search(self, requests):
            begun.set()
            assert go_on.wait(20)
            return super().search(requests)

    inner = Slow()
    recorded = Recorded(inner, file)
    answers = {}
    threads = [threading.Thread(target=lambda query=query: answers.update({query: ask(recorded, query)})) for query in ("Paris", "PARIS")]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    threads[1].join(0.2)  # it waits for the first
    go_on.set()
    for thread in threads:
        thread.join()
    assert inner.calls == [["Paris"]]
    assert answers["Paris"] == answers["PARIS"]
    assert ask(Replay(file), "PARIS") == answers["Paris"]


# -- a server that is not there yet ---------------------------------------------------------------------------------------------------------


class Client(Fickle):
    """Of a server that may be down."""

    server = SERVER_NOT_REACHED

    def stamp(self):
        return {"retriever": "round", "inner": [{"url": "u", "server": self.server}]}


def test_nothing_is_recorded_before_it_is_known_whose_answers_they_are(file):
    client = Client()
    recorded = Recorded(client, file)
    for queries in (["a"], ["a", "b", "a"]):
        with pytest.raises(RetrieverUnavailable, match="could not be asked what it searches"):
            ask(recorded, *queries)
    assert lines(file) == []
    assert client.calls == []
    assert recorded.search([]) == []
    client.server = {"corpus_sha256": "1"}
    answers = ask(recorded, "a", "b")
    assert [line.get("query") for line in lines(file)] == [None, "a", "a", "b", "a", "b"]
    replay = Replay(file)
    for queries in (["a"], ["a", "b"]):  # as often as it was
        with pytest.raises(RetrieverUnavailable, match="could not be asked"):
            ask(replay, *queries)
    assert ask(replay, "a", "b") == answers


def test_a_recording_that_is_reopened_without_the_server_goes_on_when_it_is_back(file):
    first = Client()
    first.server = {"corpus_sha256": "1"}
    answer = ask(Recorded(first, file), "a")
    client = Client()
    recorded = Recorded(client, file)
    with pytest.raises(RetrieverUnavailable):
        ask(recorded, "a")
    client.server = first.server
    assert ask(recorded, "a") == answer
    assert client.calls == []
    ask(recorded, "b")
    client.server = SERVER_NOT_REACHED
    ask(recorded, "c")  # what is known is kept
    assert sum("format" in line for line in lines(file)) == 1
    assert len(Replay(file)) == 3


def test_a_server_that_does_not_tell_is_recorded(file):
    client = Client()
    client.server = None
    answer = ask(Recorded(client, file), "a")
    assert ask(Replay(file), "a") == answer


# -- faults, forks, choice of a retriever -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [NotImplementedError("to do"), RecursionError("too deep")])
def test_a_fault_of_a_program_is_no_outage(file, error):
    inner = Fickle()
    inner.fail = error
    with pytest.raises(type(error)):
        ask(Recorded(inner, file), "a")
    assert len(lines(file)) == 1


def test_the_trace_of_an_error_that_counts_as_an_outage_is_logged_once(file, caplog):
    inner = Fickle()
    inner.fail = RuntimeError("perhaps a fault")
    recorded = Recorded(inner, file)
    for _ in range(2):
        with pytest.raises(RetrieverUnavailable):
            ask(recorded, "a")
    assert caplog.text.count("Traceback") == 1
    assert "RuntimeError: perhaps a fault" in caplog.text


def test_one_of_several_stamps_must_fit(file):
    answers = [ask(Recorded(Fickle(version), file), "a") for version in (1, 2)]
    stamps = [{"version": 2}, {"worlds": "elsewhere"}]
    assert ask(Replay(file, stamps), "a") == answers[1]
    assert ask(pickle.loads(pickle.dumps(Replay(file, stamps))), "a") == answers[1]
    assert ask(build_retriever({"name": "replay", "file": str(file), "stamp": stamps}, CORPUS), "a") == answers[1]
    for wrong in ([{"version": 1}, {"version": 2}], [{"version": 3}, {"worlds": 1}]):
        with pytest.raises(RetrieverError, match=r"must have one retriever with stamp .* or .*but it has [20]"):
            Replay(file, wrong)


def test_a_recording_of_another_version_says_so(file):
    request = SearchRequest("a", 1)
    recorded = Recorded(Fickle(), file)
    recorded.search([request])

    class Newer(Fickle):
        def cache_key(self, request):
            return ("2", default_cache_key(request))

    with pytest.raises(RetrieverError, match="another version of the retriever or of this package"):
        Recorded(Newer(), file).search([request])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_processes_forked_during_searches_read_their_own_places(file):
    recorded = Recorded(Fickle(), file)
    queries = [str(number) for number in range(30)]
    answers = ask(recorded, *queries, top_k=5)
    replay = Replay(file)
    replay._lock.acquire()
    process = os.fork()
    if process == 0:
        signal.alarm(20)
        right = all(ask(one, *queries, top_k=5) == answers for _ in range(20) for one in (replay, recorded))
        os._exit(0 if right else 1)
    replay._lock.release()
    assert all(ask(replay, *queries, top_k=5) == answers for _ in range(20))
    assert os.waitpid(process, 0)[1] == 0
