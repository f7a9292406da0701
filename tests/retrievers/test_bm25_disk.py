"""DiskBM25Retriever: the scores of the index in memory bit for bit, a fixed order, and an index that is never left broken."""

import gzip
import json
import logging
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_retrievers import BM25Retriever, Corpus, RetrieverError, SearchRequest
from searchqa_retrievers import bm25_disk as module
from searchqa_retrievers.analysis import ANALYZER_VERSION
from searchqa_retrievers.bm25 import BM25_PRESETS
from searchqa_retrievers.bm25_disk import DiskBM25Retriever
from searchqa_retrievers.stored_folder import DamagedIndexError
from searchqa_retrievers.testing import RetrieverContract

VOCABULARY = ["river", "rivers", "city", "naïve", "mountain", "lake", "the", "of", "who", "2001", "alpha", "beta", "gamma", "delta"]
SCORINGS = [(1.5, 0.75, "lucene"), (0.9, 0.4, "lucene"), (1.2, 0.0, "robertson"), (0.0, 1.0, "atire"), (2, 1, "robertson")]


def made_up_corpus(passages, seed=0):
    generator = random.Random(seed)
    return Corpus.from_passages((f"p{i}", f"Title {i % 7}", " ".join(generator.choices(VOCABULARY, k=i % 12))) for i in range(passages))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("indexes")


class TestDiskBM25(RetrieverContract):
    queries = ("river city", "mountain", "rivers of the 2001 lake", "unknownword")

    @pytest.fixture(autouse=True)
    def _cache(self, cache):
        self.cache = cache

    def make_retriever(self):
        return DiskBM25Retriever(made_up_corpus(100), cache_dir=self.cache)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(VOCABULARY), max_size=12).map(" ".join), max_size=25),
    st.lists(st.sampled_from([*VOCABULARY, "unknown"]), max_size=8).map(" ".join),
    st.integers(1, 40),
    st.sampled_from(SCORINGS),
)
def test_where_every_match_is_a_candidate_answers_are_those_of_memory(tmp_path_factory, texts, query, top_k, scoring):
    k1, b, method = scoring
    corpus = Corpus.from_passages((str(number), "of the", text) for number, text in enumerate(texts))
    options = {"k1": k1, "b": b, "method": method}
    request = [SearchRequest(query, top_k)]
    disk = DiskBM25Retriever(corpus, cache_dir=tmp_path_factory.mktemp("any"), **options)
    assert disk.search(request) == BM25Retriever(corpus, **options).search(request)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_scores_and_order_are_those_of_memory_with_few_candidates_too(cache, scoring):
    corpus = made_up_corpus(4000)
    options = dict(zip(("k1", "b", "method"), scoring, strict=True))
    generator = random.Random(1)
    requests = [SearchRequest(" ".join(generator.choices(VOCABULARY, k=4)), 10) for _ in range(30)]
    everything = BM25Retriever(corpus, **options).search([SearchRequest(request.query, 4000) for request in requests])
    disk = DiskBM25Retriever(corpus, cache_dir=cache, **options, rescore_factor=4).search(requests)
    for hits, expected in zip(disk, everything, strict=True):
        scores = {hit.passage.id: hit.score for hit in expected}
        assert len(hits) == 10
        assert all(hit.score == scores[hit.passage.id] for hit in hits)
        assert hits == sorted(hits, key=lambda hit: (-hit.score, hit.passage.id))


def test_equal_passages_come_in_the_order_of_their_ids(cache):
    corpus = Corpus.from_passages((str(number), "Same", "river" if number % 3 else "river bank") for number in range(3000))
    disk = DiskBM25Retriever(corpus, cache_dir=cache, rescore_factor=1)
    expected = BM25Retriever(corpus)
    for query in ("river", "bank", "river bank", "bank river river"):
        assert disk.search([SearchRequest(query, 40)]) == expected.search([SearchRequest(query, 40)])


def test_a_heap_that_fills_up_makes_segments_and_no_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_HEAP_BYTES", 15_000_000)  # the least that tantivy takes
    words = np.random.default_rng(0).zipf(1.2, size=(9000, 40)) % 300_000
    corpus = Corpus.from_passages((str(number), "", " ".join(f"w{word}" for word in row)) for number, row in enumerate(words.tolist()))
    disk = DiskBM25Retriever(corpus, cache_dir=tmp_path)
    assert disk._index.searcher.num_segments > 1
    generator = random.Random(0)
    requests = [SearchRequest(" ".join(generator.sample(corpus.texts[place].split(), 6)), 10) for place in range(0, 9000, 90)]
    assert disk.search(requests) == BM25Retriever(corpus, cache_dir=tmp_path).search(requests)


def test_repeated_terms_count_each_time(cache):
    corpus = made_up_corpus(100)
    requests = [SearchRequest(query, 5) for query in ("river lake", "river river lake", "lake river river river")]
    answers = DiskBM25Retriever(corpus, cache_dir=cache).search(requests)
    assert answers == BM25Retriever(corpus).search(requests)
    assert answers[0] != answers[1]


def test_no_character_of_a_query_has_a_meaning(cache):
    corpus = Corpus.from_passages([("1", "River", "and city"), ("2", "Lake", "terms position"), ("3", "Wild", "star\x01\x00")])
    queries = [
        "river AND (city OR",
        "+river -lake",
        "terms:lake",
        "river*",
        "ri*er~2",
        '"river city"',
        "[river TO lake]",
        "\x01\x00\x7f river\n",
    ]
    requests = [SearchRequest(query, 3) for query in [*queries, "/.*/", "\\", "*:*", "star", "river " * 100_000, "x" * 100_000]]
    assert DiskBM25Retriever(corpus, cache_dir=cache).search(requests) == BM25Retriever(corpus).search(requests)


def test_long_words_and_long_queries_are_read_as_in_memory(cache):
    long = "é" * 40_000  # longer than any term that tantivy takes
    corpus = Corpus.from_passages([("1", "", long), ("2", "", "x" * 300), ("3", "", "x" * 301), ("4", "", "end")])
    requests = [SearchRequest(query, 4) for query in ("x" * 300, "x" * 301, long, "pad " * 4096 + "end", "pad " * 4000 + "end")]
    answers = DiskBM25Retriever(corpus, cache_dir=cache, stemmer=None).search(requests)
    assert answers == BM25Retriever(corpus, stemmer=None).search(requests)
    assert [[hit.passage.id for hit in hits] for hits in answers] == [["2"], ["3"], [], [], ["4"]]


def test_words_of_every_script_are_found_as_in_memory(cache):
    generator = random.Random(0)
    letters = [*map(chr, range(0x20, 0x2000)), *"ﬁİßſ_\u2028\u3000\xa0\x85\xad\u0301\ud800", *map(chr, range(0x4E00, 0x4E40)), "𝟘", "𐐀"]
    texts = ["".join(generator.choice(letters) if generator.random() < 0.75 else " " for _ in range(number)) for number in range(150)]
    corpus = Corpus.from_passages((str(number), "", text) for number, text in enumerate(texts))
    requests = [SearchRequest(text[generator.randrange(len(text) + 1) :], 5) for text in texts]
    assert DiskBM25Retriever(corpus, cache_dir=cache).search(requests) == BM25Retriever(corpus).search(requests)


@pytest.mark.parametrize("rows", [[], [("1", "", "")], [("1", "the", "of")]])
def test_corpora_without_terms_answer_nothing(cache, rows):
    assert DiskBM25Retriever(Corpus.from_passages(rows), cache_dir=cache).search([SearchRequest("river the", 3)]) == [[]]


def test_one_index_serves_every_k1_b_and_method(tmp_path, monkeypatch):
    builds = []
    build = module._build
    monkeypatch.setattr(module, "_build", lambda *args: builds.append(1) or build(*args))
    corpus = made_up_corpus(50)
    for k1, b, method in SCORINGS:
        DiskBM25Retriever(corpus, k1, b, method, cache_dir=tmp_path)
    assert len(builds) == 1
    DiskBM25Retriever(corpus, stemmer=None, cache_dir=tmp_path)
    DiskBM25Retriever(corpus, stopwords=["river"], cache_dir=tmp_path)
    DiskBM25Retriever(made_up_corpus(51), cache_dir=tmp_path)
    assert len(builds) == 4


def index_files(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and not file.name.endswith(".lock"))


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_index_is_built_again_with_a_warning(tmp_path, caplog, damage):
    corpus, requests = made_up_corpus(60), [SearchRequest("river lake", 5)]
    expected = DiskBM25Retriever(corpus, cache_dir=tmp_path).search(requests)
    [folder] = [entry for entry in (tmp_path / "bm25-disk").iterdir() if entry.is_dir()]
    names = index_files(folder)
    assert {name.rsplit(".", 1)[-1] for name in names} >= {"json", "term", "idx", "fast", "fieldnorm"}
    for kind in (".idx", ".term", ".fieldnorm", ".fast", "index/meta.json", "/../meta.json"):
        file = folder / "meta.json" if kind.endswith("/../meta.json") else next(f for f in folder.rglob("*") if str(f).endswith(kind))
        content = bytearray(file.read_bytes())
        file.unlink()  # not changed in place: the last index still has it mapped
        if damage == "cut":
            file.write_bytes(content[: len(content) // 2])
        elif damage == "flipped":
            content[len(content) // 2] ^= 0x40
            file.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert DiskBM25Retriever(corpus, cache_dir=tmp_path).search(requests) == expected
        assert "damaged" in caplog.text


def test_opening_writes_nothing_where_the_folder_is_read_only(tmp_path, monkeypatch):
    corpus, requests = made_up_corpus(60), [SearchRequest("river lake", 5)]
    expected = DiskBM25Retriever(corpus, cache_dir=tmp_path / "built").search(requests)
    # A copy: a thread of the engine that built the index may still make its lock there.
    folder = shutil.copytree(tmp_path / "built", tmp_path / "copied", ignore=shutil.ignore_patterns("*.lock", ".*.lock"))
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)
    assert DiskBM25Retriever(corpus, cache_dir=folder).search(requests) == expected
    assert sorted(folder.rglob("*")) == before


BUILD = """
import sys, time
from searchqa_retrievers import Corpus
from searchqa_retrievers.bm25_disk import DiskBM25Retriever

class Slow(Corpus):
    def contents(self, index):
        if index == 15 and float(sys.argv[2]):
            print("building", flush=True)
            time.sleep(float(sys.argv[2]))
        return super().contents(index)

ids = sorted(str(number) for number in range(20))
corpus = Slow(ids, ["River"] * 20, ids)
corpus.sha256
index = DiskBM25Retriever(corpus, cache_dir=sys.argv[1])
print("done", len(index.corpus), flush=True)
"""


def start(folder, seconds):
    return subprocess.Popen([sys.executable, "-c", BUILD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True)


def test_a_killed_build_loses_only_itself(tmp_path):
    process = start(tmp_path, 60)
    try:
        assert process.stdout.readline() == "building\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert list(tmp_path.rglob("*.part-*"))
    process = start(tmp_path, 0)
    assert process.communicate()[0] == "done 20\n"
    assert not list(tmp_path.rglob("*.part-*"))


@pytest.mark.parametrize("large", [False, True])
def test_damaged_terms_are_built_again_or_an_error_when_they_are_read(tmp_path, monkeypatch, large):
    if large:  # too much to be read at every opening
        monkeypatch.setattr(module, "_VERIFIED_BYTES", 0)
    corpus = Corpus.from_passages((f"{n}", "", f"river number{n}") for n in range(3))
    DiskBM25Retriever(corpus, cache_dir=tmp_path)
    [file] = tmp_path.rglob("terms.bin")
    content = file.read_bytes()
    file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    retriever = DiskBM25Retriever(corpus, cache_dir=tmp_path)
    assert [hit.passage.id for hit in retriever.search([SearchRequest("number1", 1)])[0]] == ["1"]
    if large:
        with pytest.raises(DamagedIndexError, match=f"passage 2 in {re.escape(str(file))} .* delete that folder"):
            retriever.search([SearchRequest("number2", 1)])
    else:
        assert [hit.passage.id for hit in retriever.search([SearchRequest("number2", 1)])[0]] == ["2"]


def test_long_queries_have_the_scores_of_the_index_in_memory(tmp_path):
    generator = random.Random(0)
    words = [f"word{number}" for number in range(60)]
    corpus = Corpus.from_passages((f"{n}", "", " ".join(generator.choices(words, k=30))) for n in range(40))
    assert len(words) > module._FEW_TERMS
    request = [SearchRequest(" ".join([*words, *words[::2], "unknown" * 100]), 40)]
    assert DiskBM25Retriever(corpus, cache_dir=tmp_path).search(request) == BM25Retriever(corpus).search(request)


def test_indexes_can_be_read_by_others(tmp_path):
    DiskBM25Retriever(made_up_corpus(5), cache_dir=tmp_path)
    (tmp_path / "made").mkdir()
    [folder] = [entry for entry in (tmp_path / "bm25-disk").iterdir() if entry.is_dir()]
    assert folder.stat().st_mode == (tmp_path / "made").stat().st_mode


def test_a_k1_far_from_tantivys_is_warned_of(tmp_path, caplog):
    DiskBM25Retriever(made_up_corpus(5), k1=0.9, b=0.4, cache_dir=tmp_path)
    assert not caplog.records
    DiskBM25Retriever(made_up_corpus(5), k1=3.0, cache_dir=tmp_path)
    assert "rescore_factor" in caplog.text


def test_queries_of_equal_terms_are_searched_once_in_a_call(tmp_path, monkeypatch):
    retriever = DiskBM25Retriever(Corpus.from_passages((f"{n}", "", f"river number{n}") for n in range(3)), cache_dir=tmp_path)
    searched = []
    search = retriever._search
    monkeypatch.setattr(retriever, "_search", lambda terms, top_k: searched.append(terms) or search(terms, top_k))
    answers = retriever.search([SearchRequest(query, 2) for query in ("The River, number1", "rivers number1!", "number1 river")])
    assert searched == [
        ("river", "number1"),
        ("number1", "river"),
    ]  # the order of terms counts, since it can change the last bit of a score
    assert answers[0] == answers[1]
    assert answers[0] is not answers[1]


def test_processes_that_start_together_build_once(tmp_path):
    first, second = start(tmp_path, 0.5), start(tmp_path, 0.5)
    try:
        outputs = [first.stdout.read(), second.stdout.read()]
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    # The sample that the estimate is made from asks for every passage of so small a corpus, then the build does.
    assert sorted(output.count("building") for output in outputs) == [0, 2]
    assert all(output.endswith("done 20\n") for output in outputs)


def test_no_room_no_writable_folder_and_no_tantivy_are_errors_that_name_the_way_out(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(RetrieverError, match="SEARCHQA_CACHE"):
        DiskBM25Retriever(made_up_corpus(5), cache_dir=blocked)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(RetrieverError, match=r"0\.00 GB are free; set SEARCHQA_CACHE"):
        DiskBM25Retriever(made_up_corpus(5), cache_dir=tmp_path)
    assert not [entry for entry in (tmp_path / "bm25-disk").iterdir() if entry.is_dir()]
    monkeypatch.setitem(sys.modules, "tantivy", None)
    with pytest.raises(RetrieverError, match=r"pip install 'searchqa-gym\[disk\]'"):
        DiskBM25Retriever(made_up_corpus(5), cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"), [({"k1": -1}, "k1"), ({"b": 2}, "b must"), ({"method": "x"}, "lucene"), ({"rescore_factor": 0}, "0")]
)
def test_wrong_settings_are_errors(cache, options, message):
    with pytest.raises(RetrieverError, match=message):
        DiskBM25Retriever(made_up_corpus(5), cache_dir=cache, **options)


def test_wrong_requests_are_errors(cache):
    retriever = DiskBM25Retriever(made_up_corpus(5), cache_dir=cache)
    with pytest.raises(RetrieverError, match="top_k must be at least 1"):
        retriever.search([SearchRequest("river", 0)])
    with pytest.raises(RetrieverError, match="filters"):
        retriever.search([SearchRequest("river", 1, filters={"lang": "en"})])


def test_pickled_copies_answer_the_same(cache):
    retriever = DiskBM25Retriever(made_up_corpus(80), k1=0.9, b=0.4, cache_dir=cache, rescore_factor=3)
    copy = pickle.loads(pickle.dumps(retriever))
    assert copy.search([SearchRequest("river lake", 5)]) == retriever.search([SearchRequest("river lake", 5)])
    assert copy.stamp() == retriever.stamp()


def test_stamp_has_what_a_result_depends_on(cache):
    import tantivy

    corpus = made_up_corpus(5)
    assert DiskBM25Retriever(corpus, stopwords=["of"], cache_dir=cache).stamp() == {
        "retriever": "bm25",
        "backend": "disk",
        "rescore_factor": 8,
        "tantivy": tantivy.__version__,
        "k1": 1.5,
        "b": 0.75,
        "method": "lucene",
        "analyzer": {"version": ANALYZER_VERSION, "stopwords": ("of",), "stemmer": "english"},
        "corpus_sha256": corpus.sha256,
        "passages": 5,
    }


def test_threads_share_one_retriever(cache):
    retriever = DiskBM25Retriever(made_up_corpus(2000), cache_dir=cache)
    generator = random.Random(3)
    requests = [SearchRequest(" ".join(generator.choices(VOCABULARY, k=3)), 5) for _ in range(40)]
    expected = retriever.search(requests)
    answers = [None] * 4

    def work(slot):
        answers[slot] = [retriever.search([request])[0] for request in requests]

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 4


def test_needs_grow_with_the_corpus_and_cover_what_is_written(tmp_path):
    corpus = Corpus.from_passages(
        (f"{n}", "", " ".join(f"w{x}" for x in np.random.default_rng(n).integers(0, 2000, 60))) for n in range(2000)
    )
    DiskBM25Retriever(corpus, cache_dir=tmp_path)
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    small, large = module.estimate(2000, 60), module.estimate(4000, 60)
    assert written <= small.disk < large.disk
    assert small.building > 0


@pytest.mark.data
@pytest.mark.parametrize("preset", sorted(BM25_PRESETS))
def test_real_questions_find_what_the_index_in_memory_finds(cache, preset):
    folder = Path(os.environ["SEARCHQA_DATA"]) / "hotpotqa"
    corpus = Corpus.from_jsonl(folder / "corpus.jsonl.gz")
    with gzip.open(folder / "questions.jsonl.gz", "rt", encoding="utf-8") as lines:
        questions = [json.loads(line)["question"] for line in lines]
    memory = BM25Retriever(corpus, cache_dir=cache, **BM25_PRESETS[preset])
    disk = DiskBM25Retriever(corpus, cache_dir=cache, **BM25_PRESETS[preset])
    for top_k in (3, 10):
        requests = [SearchRequest(question, top_k) for question in questions]
        assert disk.search(requests) == memory.search(requests)
