"""DenseIndex: exact against a sort of all products; its files survive a kill and are never taken for what they are not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_retrievers import Corpus, RetrieverError
from searchqa_retrievers import dense_index as module
from searchqa_retrievers.bm25_index import DamagedIndexError
from searchqa_retrievers.dense_index import BLOCK, DenseIndex, damaged_blocks, index_folder, open_or_build

faiss = pytest.importorskip("faiss", reason="dense search needs faiss-cpu")


class NumberEncoder:
    """A vector drawn from the text's own hash: quick, and without weights."""

    dimension = 16
    fingerprint = "number"
    dtype = "float32"

    def __init__(self, stop_after=None, pause=0.0):
        self.texts = 0
        self.stop_after = stop_after
        self.pause = pause

    def encode_passages(self, texts):
        if self.stop_after is not None and self.texts >= self.stop_after:
            raise KeyboardInterrupt
        time.sleep(self.pause)
        self.texts += len(texts)
        return unit(np.stack([np.random.default_rng(list(text.encode())).standard_normal(self.dimension) for text in texts]))

    def stamp(self):
        return {"fingerprint": self.fingerprint}


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def passages(count):
    return Corpus.from_passages((f"{number:05}", "", f"text {number}") for number in range(count))


def expected(vectors, query, top_k):
    """All passages, sorted by (product descending, position ascending); the products in float64, rounded to float32."""
    products = (vectors.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
    order = sorted(range(len(vectors)), key=lambda i: (-products[i], i))[:top_k]
    return order, [float(products[i]) for i in order]


@pytest.fixture(scope="module")
def corpus():
    return passages(3 * BLOCK + 100)


@pytest.fixture(scope="module")
def reference(corpus):
    return NumberEncoder().encode_passages([corpus.contents(i) for i in range(len(corpus))])


@given(
    n=st.integers(1, 300),
    dimension=st.integers(1, 24),
    copies=st.integers(1, 60),
    top_k=st.integers(1, 320),
    storage=st.sampled_from(["float32", "float16"]),
    scan_rows=st.sampled_from([7, 64, 1 << 16]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=30, deadline=None)
def test_search_is_a_sort_of_all_products_by_score_then_position(n, dimension, copies, top_k, storage, scan_rows, seed):
    """With many equal vectors, so that ties reach over the edge of the candidates and of the blocks."""
    generator = np.random.default_rng(seed)
    different = unit(generator.standard_normal((-(-n // copies), dimension)))
    vectors = different[generator.integers(0, len(different), n)].astype(storage)
    queries = unit(generator.standard_normal((3, dimension)))
    before, module._SCAN_ROWS = module._SCAN_ROWS, scan_rows
    try:
        found = DenseIndex(vectors).search(queries, top_k)
        alone = [DenseIndex(vectors).search(query[None], top_k)[0] for query in queries]
    finally:
        module._SCAN_ROWS = before
    for query, (positions, scores) in zip(queries, found, strict=True):
        order, products = expected(vectors, query, top_k)
        np.testing.assert_allclose(scores, products, rtol=0, atol=1.2e-7)
        assert positions == sorted(positions, key=lambda p: (-scores[positions.index(p)], p))
        # Equal vectors have equal scores, so the lower position comes first and is never the one left out.
        twins = [(p, q) for p in order for q in order if p < q and np.array_equal(vectors[p], vectors[q])]
        place = {position: rank for rank, position in enumerate(positions)}
        assert all(p in place and place[p] < place[q] for p, q in twins if q in place)
    assert alone == found


def test_products_are_those_of_faiss_flat_and_of_a_matrix_product(reference):
    queries = unit(np.random.default_rng(1).standard_normal((40, 16)))
    found = DenseIndex(reference).search(queries, 10)
    flat = faiss.IndexFlatIP(16)
    flat.add(reference)
    products, positions = flat.search(queries, 10)
    assert [row for row, _ in found] == positions.tolist()
    np.testing.assert_allclose([scores for _, scores in found], products, atol=1e-6)
    np.testing.assert_allclose([scores for _, scores in found], -np.sort(-(queries @ reference.T), axis=1)[:, :10], atol=1e-6)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_vectors_are_stored_once_and_opened_memory_mapped(corpus, reference, tmp_path, storage):
    encoder = NumberEncoder()
    for _ in range(2):
        vectors = open_or_build(tmp_path / "index", corpus, encoder, storage)
        assert isinstance(vectors.base, np.memmap)
        assert not vectors.flags.writeable
        assert np.array_equal(vectors, reference.astype(storage))
    assert encoder.texts == len(corpus)
    assert sorted(entry.name for entry in (tmp_path / "index").iterdir()) == ["manifest.json", "vectors.npy"]
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert (manifest["passages"], manifest["dimension"], manifest["corpus_sha256"]) == (len(corpus), 16, corpus.sha256)


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_an_interrupted_build_goes_on_where_it_stopped(corpus, reference, tmp_path, blocks):
    with pytest.raises(KeyboardInterrupt):
        open_or_build(tmp_path / "index", corpus, NumberEncoder(stop_after=blocks * BLOCK), "float32")
    assert not (tmp_path / "index" / "manifest.json").exists()
    encoder = NumberEncoder()
    assert np.array_equal(open_or_build(tmp_path / "index", corpus, encoder, "float32"), reference)
    assert encoder.texts == len(corpus) - blocks * BLOCK


def test_a_build_may_be_interrupted_many_times(corpus, reference, tmp_path):
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            open_or_build(tmp_path / "index", corpus, NumberEncoder(stop_after=BLOCK), "float32")
    encoder = NumberEncoder()
    assert np.array_equal(open_or_build(tmp_path / "index", corpus, encoder, "float32"), reference)
    assert encoder.texts == len(corpus) - 3 * BLOCK


KILLED = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
spec = spec_from_file_location("tests_of_dense_index", sys.argv[1])
tests = module_from_spec(spec)
spec.loader.exec_module(tests)
tests.open_or_build(Path(sys.argv[2]), tests.passages(3 * tests.BLOCK + 100), tests.NumberEncoder(pause=0.5), "float32")
"""


def test_a_killed_build_goes_on_where_it_stopped(corpus, reference, tmp_path):
    folder = tmp_path / "index"
    process = subprocess.Popen([sys.executable, "-c", KILLED, __file__, str(folder)])
    try:
        record = folder / "progress.jsonl"
        for _ in range(1200):
            if record.exists() and record.read_text().count("\n") >= 2:
                break
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (folder / "manifest.json").exists()
    encoder = NumberEncoder()
    assert np.array_equal(open_or_build(folder, corpus, encoder, "float32"), reference)
    assert 0 < encoder.texts <= len(corpus) - BLOCK


@pytest.mark.parametrize("harm", ["half a line", "changed vectors", "no vectors", "short vectors", "empty record"])
def test_only_blocks_that_are_on_the_disk_as_recorded_are_kept(corpus, reference, tmp_path, harm):
    folder = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        open_or_build(folder, corpus, NumberEncoder(stop_after=2 * BLOCK), "float32")
    record, file = folder / "progress.jsonl", folder / "vectors.npy"
    kept = 0
    if harm == "half a line":
        record.write_text(record.read_text()[:-3])
        kept = 1
    elif harm == "changed vectors":
        vectors = np.load(file, mmap_mode="r+")
        vectors[BLOCK + 5, 3] += 1
        vectors.flush()
        kept = 1
    elif harm == "no vectors":
        file.unlink()
    elif harm == "short vectors":
        os.truncate(file, 5000)
    else:
        record.write_text("")
    encoder = NumberEncoder()
    assert np.array_equal(open_or_build(folder, corpus, encoder, "float32"), reference)
    assert encoder.texts == len(corpus) - kept * BLOCK


def test_a_build_is_not_continued_in_another_dtype(corpus, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        open_or_build(tmp_path / "index", corpus, NumberEncoder(stop_after=BLOCK), "float32")
    other = NumberEncoder()
    other.dtype = "bfloat16"
    with pytest.raises(RetrieverError, match="begun with the encoder in float32, not bfloat16"):
        open_or_build(tmp_path / "index", corpus, other, "float32")


def test_one_of_several_threads_builds(corpus, reference, tmp_path):
    encoder = NumberEncoder()
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(open_or_build(tmp_path / "index", corpus, encoder, "float32"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert encoder.texts == len(corpus)
    assert len(results) == 3
    assert all(np.array_equal(vectors, reference) for vectors in results)


@pytest.mark.parametrize("harm", ["flipped bit", "truncated", "no vectors", "manifest of another", "manifest cut off", "other encoder"])
def test_a_wrong_or_damaged_index_is_refused_with_a_way_out(tmp_path, harm):
    corpus, folder, encoder = passages(50), tmp_path / "index", NumberEncoder()
    open_or_build(folder, corpus, encoder, "float32")
    file, manifest = folder / "vectors.npy", folder / "manifest.json"
    if harm == "flipped bit":
        content = bytearray(file.read_bytes())
        content[-7] ^= 1
        file.write_bytes(content)
    elif harm == "truncated":
        os.truncate(file, file.stat().st_size - 64)
    elif harm == "no vectors":
        file.unlink()
    elif harm == "manifest of another":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "corpus_sha256": "0"}))
    elif harm == "manifest cut off":
        manifest.write_text(manifest.read_text()[:40])
    else:
        encoder.fingerprint = "another"
    with pytest.raises(DamagedIndexError, match=r"cannot be used: .*delete the folder to build it again"):
        open_or_build(folder, corpus, encoder, "float32")


def test_a_full_disk_is_seen_before_the_build(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    encoder = NumberEncoder()
    with pytest.raises(RetrieverError, match="GB are free"):
        open_or_build(tmp_path / "index", corpus, encoder, "float32")
    assert encoder.texts == 0


def test_a_folder_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RetrieverError, match="cannot be written to"):
        open_or_build(tmp_path / "file" / "index", corpus, NumberEncoder(), "float32")


def test_an_empty_corpus_is_refused(tmp_path):
    with pytest.raises(RetrieverError, match="at least one passage"):
        open_or_build(tmp_path / "index", Corpus.from_passages([]), NumberEncoder(), "float32")


def test_corpus_encoder_and_storage_have_folders_of_their_own(tmp_path):
    other = NumberEncoder()
    other.fingerprint = "another"
    folders = [
        index_folder(tmp_path, corpus, encoder, storage)
        for corpus in (passages(3), passages(4))
        for encoder in (NumberEncoder(), other)
        for storage in ("float32", "float16")
    ]
    assert len(set(folders)) == 8
    assert index_folder(tmp_path, passages(3), NumberEncoder(), "float32") == folders[0]


def test_verification_names_every_damaged_block(corpus, tmp_path):
    folder = tmp_path / "index"
    vectors = open_or_build(folder, corpus, NumberEncoder(), "float32")
    assert damaged_blocks(folder) == []
    offset = vectors.base.offset
    content = bytearray((folder / "vectors.npy").read_bytes())
    for row in (0, 2 * BLOCK + 1):
        content[offset + row * vectors.itemsize * vectors.shape[1]] ^= 1
    (folder / "vectors.npy").write_bytes(content)
    assert damaged_blocks(folder) == [f"vectors.npy has a wrong checksum in the block from passage {start} on" for start in (0, 2 * BLOCK)]
    os.truncate(folder / "vectors.npy", 5000)
    assert len(damaged_blocks(folder)) == 1
    (folder / "vectors.npy").unlink()
    assert damaged_blocks(folder) == ["vectors.npy is missing"]
