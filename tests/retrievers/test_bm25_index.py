"""The stored index: built once, opened memory-mapped, never left broken, and replaceable by memory where nothing can be stored."""

import logging
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from searchqa_retrievers import BM25Retriever, Corpus, SearchRequest, cache_root
from searchqa_retrievers import bm25 as bm25_module
from searchqa_retrievers.analysis import Analyzer
from searchqa_retrievers.bm25_index import build_index, estimate, index_key, open_or_build

REQUESTS = [SearchRequest("river 17", 3), SearchRequest("lake 4000 4001", 5)]


@pytest.fixture(scope="module")
def corpus():
    return Corpus.from_passages((str(number), "River" if number % 3 else "Lake", f"{number} {number % 97}") for number in range(5500))


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory):
    return BM25Retriever(corpus, cache_dir=tmp_path_factory.mktemp("expected")).search(REQUESTS)


@pytest.fixture
def builds(monkeypatch):
    """The number of index builds, as the length of a list."""
    calls = []
    monkeypatch.setattr(bm25_module, "build_index", lambda *args, **kwargs: calls.append(1) or build_index(*args, **kwargs))
    return calls


def folders(path):
    return sorted(entry.name for entry in (path / "bm25").iterdir() if entry.is_dir())


def test_second_start_opens_the_stored_index(corpus, expected, builds, tmp_path):
    for _ in range(2):
        retriever = BM25Retriever(corpus, cache_dir=tmp_path)
        assert retriever.search(REQUESTS) == expected
        assert isinstance(retriever.index.data.base, np.memmap)
    assert len(builds) == 1


def test_opening_takes_no_lock_so_that_a_read_only_folder_will_do(corpus, expected, builds, tmp_path, monkeypatch):
    BM25Retriever(corpus, cache_dir=tmp_path)

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr("filelock.FileLock", refuse)
    retriever = BM25Retriever(corpus, cache_dir=tmp_path)
    assert isinstance(retriever.index.data.base, np.memmap)
    assert retriever.search(REQUESTS) == expected
    assert len(builds) == 1


def test_environment_variable_names_the_cache(corpus, monkeypatch, tmp_path):
    monkeypatch.setenv("SEARCHQA_CACHE", str(tmp_path / "here"))
    assert cache_root() == tmp_path / "here"
    BM25Retriever(corpus)
    assert len(folders(tmp_path / "here")) == 1
    monkeypatch.delenv("SEARCHQA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_root().name == "searchqa"


def test_every_setting_and_the_corpus_have_their_own_index(corpus, tmp_path):
    other = Corpus.from_passages([*list(corpus)[:-1], ("x", "Other", "")])
    variants = [{}, {"k1": 0.9}, {"b": 0.4}, {"method": "atire"}, {"stopwords": None}, {"stopwords": ["river"]}, {"stemmer": "porter"}]
    for settings in variants:
        BM25Retriever(corpus, cache_dir=tmp_path, **settings)
    BM25Retriever(other, cache_dir=tmp_path)
    assert len(folders(tmp_path)) == len(variants) + 1
    assert index_key(corpus, {"k1": 1.5}) == index_key(Corpus.from_passages(reversed(list(corpus))), {"k1": 1.5})


def flip_byte(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["data.npy", "indices.npy", "indptr.npy", "terms.txt", "meta.json"])
@pytest.mark.parametrize(
    "damage",
    [lambda file: file.unlink(), lambda file: file.write_bytes(b""), lambda file: os.truncate(file, file.stat().st_size // 2), flip_byte],
    ids=["missing", "empty", "cut", "flipped"],
)
def test_damaged_index_is_built_again_with_a_warning(corpus, expected, builds, tmp_path, caplog, name, damage):
    BM25Retriever(corpus, cache_dir=tmp_path)
    [folder] = folders(tmp_path)
    damage(tmp_path / "bm25" / folder / name)
    with caplog.at_level(logging.WARNING):
        assert BM25Retriever(corpus, cache_dir=tmp_path).search(REQUESTS) == expected
    assert "damaged" in caplog.text
    assert len(builds) == 2
    assert BM25Retriever(corpus, cache_dir=tmp_path).search(REQUESTS) == expected
    assert len(builds) == 2


def test_unusable_folder_keeps_the_index_in_memory_with_a_warning(corpus, expected, builds, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert BM25Retriever(corpus, cache_dir=blocked).search(REQUESTS) == expected
    assert "stays in memory" in caplog.text
    assert len(builds) == 1


def test_full_disk_keeps_the_index_in_memory_and_leaves_nothing(corpus, expected, builds, tmp_path, caplog, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with caplog.at_level(logging.WARNING):
        assert BM25Retriever(corpus, cache_dir=tmp_path).search(REQUESTS) == expected
    assert "No space left" in caplog.text
    assert len(builds) == 1
    assert folders(tmp_path) == []


def test_needs_grow_with_the_corpus_and_cover_what_is_written(corpus, tmp_path):
    BM25Retriever(corpus, cache_dir=tmp_path)
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    needs, more = estimate(len(corpus), 3), estimate(2 * len(corpus), 3)
    assert written <= needs.disk < more.disk
    assert needs.memory < needs.building < more.building


BUILD = """
import sys, time
from pathlib import Path
from searchqa_retrievers import Corpus
from searchqa_retrievers.analysis import Analyzer
from searchqa_retrievers import bm25_index

corpus = Corpus.from_passages((str(i), "River", str(i)) for i in range(20))
store = bm25_index.np.save

def slow_save(path, array):
    store(path, array)
    if "indices" in str(path):
        print("writing", flush=True)
        time.sleep(float(sys.argv[2]))

bm25_index.np.save = slow_save

def build():
    print("building", flush=True)
    return bm25_index.build_index(corpus, Analyzer(), k1=1.5, b=0.75, method="lucene")

index = bm25_index.open_or_build(Path(sys.argv[1]), build)
print("done", index.num_passages, flush=True)
"""


def start(folder, seconds):
    return subprocess.Popen([sys.executable, "-c", BUILD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True)


def test_killed_build_leaves_nothing_broken(tmp_path):
    folder = tmp_path / "index"
    process = start(folder, 60)
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["building\n", "writing\n"]
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not folder.exists()
    assert list(tmp_path.glob("index.part-*"))
    small = Corpus.from_passages((str(i), "River", str(i)) for i in range(20))
    index = open_or_build(folder, lambda: build_index(small, Analyzer(), k1=1.5, b=0.75, method="lucene"))
    assert index.num_passages == 20
    assert folder.is_dir()
    assert not list(tmp_path.glob("index.part-*"))


def test_processes_that_start_together_build_once(tmp_path):
    folder = tmp_path / "index"
    first = start(folder, 1)
    try:
        assert first.stdout.readline() == "building\n"
        second = start(folder, 1)
        try:
            # read, not communicate: readline may hold more than its line back in the buffer
            outputs = [first.stdout.read(), second.stdout.read()]
        finally:
            second.kill()
            second.communicate()
    finally:
        first.kill()
        first.communicate()
    assert outputs == ["writing\ndone 20\n", "done 20\n"]


def test_compiled_code_needs_no_writable_folder(tmp_path):
    """A copy of the package where numba can write neither beside the source nor in the user's cache."""
    package = tmp_path / "searchqa_retrievers"
    shutil.copytree(
        os.path.dirname(bm25_module.__file__), package, ignore=shutil.ignore_patterns("__pycache__"), copy_function=shutil.copyfile
    )
    (package / "__pycache__").write_text("a file where the folder should be")
    (tmp_path / "home").write_text("a file where the folder should be")
    code = (
        "import logging; logging.basicConfig(level='INFO')\n"
        "import searchqa_retrievers.bm25_kernel as kernel\n"
        f"assert kernel.__file__.startswith({str(tmp_path)!r})\n"
        "assert callable(kernel.compiled_search())\n"
    )
    home = str(tmp_path / "home")
    environment = {"PYTHONPATH": str(tmp_path), "HOME": home, "XDG_CACHE_HOME": home, "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "compiled in every process" in result.stderr


def test_progress_bar_goes_to_a_terminal_on_stderr_only(corpus, tmp_path, capfd, monkeypatch):
    from searchqa_retrievers import bm25_index

    monkeypatch.setattr(bm25_index, "_PROGRESS_PASSAGES", 1)
    BM25Retriever(corpus, cache_dir=tmp_path / "piped")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    BM25Retriever(corpus, cache_dir=tmp_path / "terminal")
    out, err = capfd.readouterr()
    assert out == ""
    assert "Indexing passages" in err
    BM25Retriever(corpus, cache_dir=tmp_path / "quiet", show_progress=False)
    assert capfd.readouterr() == ("", "")
