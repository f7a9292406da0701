"""Stored corpora: the interface, the order and the hash of one in memory, written once, checked, and read again when the file changes."""

import copy
import gzip
import json
import logging
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_retrievers import BM25Retriever, Corpus, CorpusError, Passage, RandomRetriever, SearchRequest
from searchqa_retrievers import stored_corpus as module
from searchqa_retrievers.stored_corpus import StoredCorpus, open_corpus, sort_ids

PASSAGES = [
    Passage("b", "Berlin", "A city.\nOn the Spree."),
    Passage("a", 'The "Old" Town', "Small."),
    Passage("a10", "", "No title."),
    Passage("é", "Ünïcode 🙂", "北京"),
    Passage("\ud800", "lone surrogate", "\udfff"),
    Passage("c", "", ""),
]


def write(path, passages):
    text = "".join(json.dumps(passage._asdict()) + "\n" for passage in passages)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def pair(tmp_path):
    """The same passages stored and in memory."""
    path = write(tmp_path / "corpus.jsonl", PASSAGES)
    return open_corpus(path, stored=True, cache_dir=tmp_path / "cache"), Corpus.from_jsonl(path)


def test_it_answers_as_a_corpus_in_memory_does(pair):
    stored, memory = pair
    assert isinstance(stored, StoredCorpus)
    assert len(stored) == len(memory) == 6
    assert list(stored) == list(memory)
    for column in ("ids", "titles", "texts"):
        values, expected = getattr(stored, column), getattr(memory, column)
        assert list(values) == expected
        assert (values[0], values[-1], values[1:4], len(values)) == (expected[0], expected[-1], expected[1:4], 6)
    for index in range(-6, 6):
        assert stored[index] == memory[index]
        assert stored.contents(index) == memory.contents(index)
    for id_ in memory.ids:
        assert id_ in stored
        assert stored.by_id(id_) == memory.by_id(id_)
    for absent in ("", "a1", "zz", 3, None):
        assert absent not in stored
    assert stored.sha256 == memory.sha256


def test_what_is_not_there_is_an_error(pair):
    stored, _ = pair
    with pytest.raises(CorpusError, match="'a1'"):
        stored.by_id("a1")
    for index in (6, -7):
        for read in (lambda index: stored[index], lambda index: stored.texts[index], stored.contents):
            with pytest.raises(IndexError, match="6 passages"):
                read(index)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=20), st.text(max_size=5), st.text(max_size=30)), max_size=20, unique_by=lambda p: p[0])
)
def test_any_corpus_has_the_order_and_the_hash_of_that_in_memory(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("any")
    path = write(folder / "corpus.jsonl", [Passage(*row) for row in rows])
    stored = open_corpus(path, stored=True, cache_dir=folder / "cache")
    assert list(stored) == sorted(Passage(*row) for row in rows)
    assert stored.sha256 == Corpus.from_passages(rows).sha256


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=30), st.text("ab\0", max_size=30).map(str.encode)), max_size=30))
def test_ids_are_sorted_by_their_bytes_and_repeated_ones_found(ids):
    ends = np.cumsum([0, *map(len, ids)])
    order, repeated = sort_ids(np.frombuffer(b"".join(ids), dtype=np.uint8), ends)
    assert [ids[number] for number in order] == sorted(set(ids))
    assert all(number == ids.index(ids[number]) for number in order)
    again = [number for number, id_ in enumerate(ids) if ids.index(id_) < number]
    assert sorted(repeated.tolist(), key=lambda pair: pair[1]) == [[ids.index(ids[number]), number] for number in again]


def test_retrievers_search_it_as_they_search_memory(tmp_path):
    path = write(tmp_path / "corpus.jsonl", [Passage(str(n), f"River {n % 7}", f"lake {n % 97} {n}") for n in range(500)])
    stored, memory = open_corpus(path, stored=True, cache_dir=tmp_path), Corpus.from_jsonl(path)
    requests = [SearchRequest("river 3 lake 40", 5), SearchRequest("lake", 10)]
    assert BM25Retriever(stored).search(requests) == BM25Retriever(memory).search(requests)
    assert RandomRetriever(stored).search(requests) == RandomRetriever(memory).search(requests)


def test_copies_are_small(pair):
    stored, memory = pair
    assert copy.deepcopy(stored) is stored
    pickled = pickle.dumps(stored)
    assert len(pickled) < 400
    assert list(pickle.loads(pickled)) == list(memory)


def test_size_decides_unless_told(tmp_path, monkeypatch):
    plain, packed = write(tmp_path / "c.jsonl", PASSAGES), write(tmp_path / "c.jsonl.gz", PASSAGES)
    cache = tmp_path / "cache"
    assert not isinstance(open_corpus(plain, cache_dir=cache), StoredCorpus)
    assert not isinstance(open_corpus(packed, cache_dir=cache), StoredCorpus)
    assert not cache.exists()
    monkeypatch.setattr(module, "STORED_BYTES", plain.stat().st_size - 1)
    assert isinstance(open_corpus(plain, cache_dir=cache), StoredCorpus)
    assert not isinstance(open_corpus(plain, stored=False, cache_dir=cache), StoredCorpus)
    assert not isinstance(open_corpus(packed, cache_dir=cache), StoredCorpus)
    monkeypatch.setattr(module, "STORED_COMPRESSED_BYTES", 10)
    assert isinstance(open_corpus(packed, cache_dir=cache), StoredCorpus)
    assert open_corpus(packed, cache_dir=cache).sha256 == open_corpus(plain, stored=False).sha256


def test_a_file_is_read_once_and_again_when_it_changed(tmp_path, monkeypatch):
    reads = []
    read = module.read_passages
    monkeypatch.setattr(module, "read_passages", lambda *args: reads.append(1) or read(*args))
    path = write(tmp_path / "c.jsonl", PASSAGES)
    for _ in range(2):
        assert len(open_corpus(path, stored=True, cache_dir=tmp_path)) == 6
    assert len(reads) == 1
    write(path, PASSAGES[:2])
    assert len(open_corpus(path, stored=True, cache_dir=tmp_path)) == 2
    assert len(reads) == 2


def test_a_passage_given_twice_is_kept_once(tmp_path):
    path = write(tmp_path / "c.jsonl", [*PASSAGES, *PASSAGES])
    stored = open_corpus(path, stored=True, cache_dir=tmp_path)
    assert list(stored) == list(Corpus.from_passages(PASSAGES))
    assert stored.sha256 == Corpus.from_passages(PASSAGES).sha256


def test_two_passages_of_one_id_are_named_as_in_memory(tmp_path):
    path = write(tmp_path / "c.jsonl", [*PASSAGES, PASSAGES[1], PASSAGES[1]._replace(text="Large."), PASSAGES[0]._replace(title="Bern")])
    with pytest.raises(CorpusError) as in_memory:
        Corpus.from_jsonl(path)
    with pytest.raises(CorpusError) as stored:
        open_corpus(path, stored=True, cache_dir=tmp_path / "cache")
    assert str(stored.value) == str(in_memory.value)
    assert "line 8" in str(stored.value)
    assert not list((tmp_path / "cache" / "corpora").glob("*/"))


def test_a_boundary_between_title_and_text_counts(tmp_path):
    path = write(tmp_path / "c.jsonl", [Passage("1", "ab", "c"), Passage("1", "a", "bc")])
    with pytest.raises(CorpusError, match="line 2"):
        open_corpus(path, stored=True, cache_dir=tmp_path)


def test_malformed_rows_and_missing_files_are_errors(tmp_path):
    path = write(tmp_path / "c.jsonl", PASSAGES)
    path.write_text(path.read_text() + '{"id": "x"}\n')
    with pytest.raises(CorpusError, match="line 7, field 'contents'"):
        open_corpus(path, stored=True, cache_dir=tmp_path)
    with pytest.raises(CorpusError, match=r"missing\.jsonl"):
        open_corpus(tmp_path / "missing.jsonl", cache_dir=tmp_path)


def test_a_damaged_passage_is_never_returned(tmp_path):
    path = write(tmp_path / "c.jsonl", PASSAGES)
    stored = open_corpus(path, stored=True, cache_dir=tmp_path / "cache")
    rows = stored.folder / "rows.bin"
    rows.write_bytes(rows.read_bytes().replace(b"Berlin", b"Bermin"))
    damaged = open_corpus(path, stored=True, cache_dir=tmp_path / "cache")
    assert damaged.by_id("a") == PASSAGES[1]
    with pytest.raises(CorpusError, match=r"'b'.*damaged; delete that folder"):
        damaged.by_id("b")


@pytest.mark.parametrize("name", ["ids.bin", "starts.npy", "checksums.npy", "meta.json", "rows.bin"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_files_are_made_again(tmp_path, caplog, name, damage):
    path = write(tmp_path / "c.jsonl", PASSAGES)
    folder = open_corpus(path, stored=True, cache_dir=tmp_path / "cache").folder
    if damage == "cut":
        os.truncate(folder / name, 3)
    else:
        (folder / name).unlink()
    with caplog.at_level(logging.WARNING):
        assert list(open_corpus(path, stored=True, cache_dir=tmp_path / "cache")) == list(Corpus.from_passages(PASSAGES))
    assert "damaged" in caplog.text


def test_no_room_and_no_writable_folder_are_errors_that_name_the_ways_out(tmp_path, monkeypatch):
    path = write(tmp_path / "c.jsonl", PASSAGES)
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(CorpusError, match=r"SEARCHQA_CACHE.*stored=False"):
        open_corpus(path, stored=True, cache_dir=blocked)
    usage = type("Usage", (), {"free": 10})()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(CorpusError, match="set SEARCHQA_CACHE to a folder with room"):
        open_corpus(path, stored=True, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "corpora").glob("*/"))


STORE = """
import sys, time
from searchqa_retrievers import stored_corpus
read = stored_corpus.read_passages

def slow(*args):
    for number, row in enumerate(read(*args)):
        if number == 3:
            print("reading", flush=True)
            time.sleep(float(sys.argv[3]))
        yield row

stored_corpus.read_passages = slow
print("done", len(stored_corpus.open_corpus(sys.argv[1], stored=True, cache_dir=sys.argv[2])), flush=True)
"""


def start(path, cache, seconds):
    return subprocess.Popen([sys.executable, "-c", STORE, str(path), str(cache), str(seconds)], stdout=subprocess.PIPE, text=True)


def test_a_killed_process_loses_only_its_own_work(tmp_path):
    path, cache = write(tmp_path / "c.jsonl", PASSAGES), tmp_path / "cache"
    process = start(path, cache, 60)
    try:
        assert process.stdout.readline() == "reading\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert list(cache.rglob("*.part-*"))
    assert len(open_corpus(path, stored=True, cache_dir=cache)) == 6
    assert not list(cache.rglob("*.part-*"))


def test_processes_that_start_together_read_the_file_once(tmp_path):
    path, cache = write(tmp_path / "c.jsonl", PASSAGES), tmp_path / "cache"
    first = start(path, cache, 1)
    try:
        assert first.stdout.readline() == "reading\n"
        second = start(path, cache, 1)
        try:
            outputs = [first.stdout.read(), second.stdout.read()]
        finally:
            second.kill()
            second.communicate()
    finally:
        first.kill()
        first.communicate()
    assert outputs == ["done 6\n", "done 6\n"]


def test_progress_bar_goes_to_a_terminal_on_stderr_only(tmp_path, capfd, monkeypatch):
    path = write(tmp_path / "c.jsonl", PASSAGES)
    open_corpus(path, stored=True, cache_dir=tmp_path / "piped")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    open_corpus(path, stored=True, cache_dir=tmp_path / "terminal")
    out, err = capfd.readouterr()
    assert out == ""
    assert "Storing passages" in err
    open_corpus(path, stored=True, cache_dir=tmp_path / "quiet", show_progress=False)
    assert capfd.readouterr() == ("", "")


def test_the_need_of_disk_is_logged_before(tmp_path, caplog):
    path = write(tmp_path / "c.jsonl", PASSAGES)
    with caplog.at_level(logging.INFO, logger="searchqa_retrievers.stored_corpus"):
        open_corpus(path, stored=True, cache_dir=tmp_path)
    assert "GB of disk" in caplog.text
