"""Published forms of corpora: rows in their documented formats become passages, and errors name file, line and field."""

import bz2
import csv
import gzip
import io
import json
import sys
import tarfile

import pytest

from searchqa_retrievers import Corpus, CorpusError, Passage
from searchqa_retrievers.corpus_formats import FORMATS, corpus_files, read_passages
from searchqa_retrievers.stored_corpus import open_corpus


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def passages(path, **options):
    return [row.passage for row in read_passages(path, **options)]


# A page in the form of kilt_knowledgesource.json, with the fields that its README shows.
KILT_PAGE = {
    "_id": "290",
    "wikipedia_id": "290",
    "wikipedia_title": "A",
    "text": [
        "A\n",
        "A (named a, plural As) is the first letter.\n",
        "Section::::History.\n",
        "The earliest   ancestor is aleph.\n",
        "BULLET::::- one\n",
    ],
    "anchors": [{"text": "letter", "paragraph_id": 1}],
    "categories": "ISO basic Latin letters",
    "history": {"revid": 908},
}
# Rows of enwiki-20171001-pages-meta-current-withlinks-abstracts, and of the whole pages, as hotpotqa.github.io/wiki-readme.html shows them.
ABSTRACT = {
    "id": "12",
    "url": "https://en.wikipedia.org/wiki?curid=12",
    "title": "Anarchism",
    "text": ["Anarchism is a political philosophy.", " It holds that ..."],
    "charoffset": [[[0, 9]]],
    "text_with_links": ['<a href="x">Anarchism</a> ...'],
}
PAGE = {
    "id": 12,
    "url": "https://en.wikipedia.org/wiki?curid=12",
    "title": "Anarchism",
    "text": [["Anarchism"], ['Anarchism is a <a href="political%20philosophy">political philosophy</a>.', " It is old."], [], ["Second."]],
}


def test_search_r1s_wiki_18(tmp_path):
    path = tmp_path / "wiki-18.jsonl"
    path.write_bytes(lines({"id": "0", "contents": '"Aaron"\nAaron is a prophet.'}, {"id": "1", "contents": '"Aaron"\nHis brother ...'}))
    assert passages(path) == [Passage("0", "Aaron", "Aaron is a prophet."), Passage("1", "Aaron", "His brother ...")]


def test_kilt_pages_are_cut_into_passages(tmp_path):
    words = [f"w{number}" for number in range(250)]
    long = {**KILT_PAGE, "_id": "7", "wikipedia_title": "Long", "text": ["Long\n", " ".join(words[:130]) + "\n", " ".join(words[130:])]}
    empty = {**KILT_PAGE, "_id": "8", "wikipedia_title": "Empty", "text": ["Empty\n"]}
    path = tmp_path / "kilt_knowledgesource.json"
    path.write_bytes(lines(KILT_PAGE, long, empty))
    assert passages(path) == [
        Passage("290-0", "A", "A (named a, plural As) is the first letter. History. The earliest ancestor is aleph. one"),
        Passage("7-0", "Long", " ".join(words[:100])),
        Passage("7-1", "Long", " ".join(words[100:200])),
        Passage("7-2", "Long", " ".join(words[200:])),
    ]


@pytest.mark.parametrize("columns", [["id", "text", "title"], ["id", "title", "text"], None])
def test_tables_of_dpr_and_kilt(tmp_path, columns):
    rows = [("1", 'Aaron said "let my\tpeople go".', "Aaron"), ("2", "Second\nline", "Moses")]
    path = tmp_path / "psgs_w100.tsv.gz"
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t")
    if columns:
        writer.writerow(columns)
    for id_, body, title in rows:
        values = {"id": id_, "text": body, "title": title}
        writer.writerow([values[column] for column in columns or ("id", "text", "title")])
    path.write_bytes(gzip.compress(text.getvalue().encode()))
    assert passages(path) == [Passage(id_, title, body) for id_, body, title in rows]


def test_hotpotqas_abstracts_and_pages(tmp_path):
    path = tmp_path / "wiki_00.bz2"
    path.write_bytes(bz2.compress(lines(ABSTRACT)))
    assert passages(path) == [Passage("12", "Anarchism", "Anarchism is a political philosophy. It holds that ...")]
    path.write_bytes(bz2.compress(lines(PAGE)))
    assert passages(path) == [Passage("12", "Anarchism", "Anarchism is a political philosophy. It is old.\nSecond.")]


def hotpotqa_files():
    return {f"abstracts/{folder}/wiki_0{n}.bz2": {**ABSTRACT, "id": f"{folder}{n}"} for folder in ("AA", "AB") for n in range(2)}


@pytest.mark.parametrize("compression", ["", "bz2", "gz"])
def test_hotpotqas_archive_and_the_folder_it_unpacks_to(tmp_path, compression):
    path = tmp_path / ("abstracts.tar" + (f".{compression}" if compression else ""))
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, row in hotpotqa_files().items():
            content = bz2.compress(lines(row))
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    ids = ["AA0", "AA1", "AB0", "AB1"]
    assert [passage.id for passage in passages(path)] == ids
    assert [passage.id for passage in passages(tmp_path / "abstracts", format="hotpotqa")] == ids
    stored = open_corpus(path, stored=True, cache_dir=tmp_path / "cache")
    assert list(stored.ids) == ids
    assert stored.sha256 == open_corpus(tmp_path / "abstracts").sha256


def test_any_json_lines_by_the_names_of_their_fields(tmp_path):
    path = tmp_path / "any.jsonl"
    path.write_bytes(lines({"docid": 3, "heading": "H", "body": "B", "text": ["x"]}, {"docid": "4", "heading": "", "body": ""}))
    fields = {"id": "docid", "title": "heading", "text": "body"}
    assert passages(path, fields=fields) == [Passage("3", "H", "B"), Passage("4", "", "")]
    assert list(open_corpus(path, fields=fields)) == [Passage("3", "H", "B"), Passage("4", "", "")]
    assert passages(path, fields={"id": "docid", "contents": "body"}) == [Passage("3", "", "B"), Passage("4", "", "")]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (lines(KILT_PAGE, {**KILT_PAGE, "_id": None}), {}, "line 2, field '_id'"),
        (lines(KILT_PAGE, {**KILT_PAGE, "wikipedia_title": None}), {}, "line 2, field 'wikipedia_title'"),
        (lines(KILT_PAGE, {**KILT_PAGE, "text": "x"}), {}, "line 2, field 'text'"),
        (lines(KILT_PAGE, "", {**KILT_PAGE, "text": [1]}), {}, "line 3, field 'text'"),
        (lines(ABSTRACT, {**ABSTRACT, "id": ""}), {}, "line 2, field 'id'"),
        (lines(ABSTRACT, {"id": "1", "text": ["x"]}), {}, "line 2, field 'title'"),
        (lines(ABSTRACT, {**ABSTRACT, "text": "x"}), {}, "line 2, field 'text'"),
        (lines(ABSTRACT, {**ABSTRACT, "text": [["x", 3]]}), {}, "line 2, field 'text'"),
        (b"id\ttext\ttitle\n1\tx\n", {}, "line 2: must have 3 columns.*has 2"),
        (b"1\tx\ty\n\tx\ty\n", {}, "line 2, field 'id'"),
        (b"1\tx\ty\n2\t\xff\ty\n", {}, "line 2: not UTF-8"),
        (
            lines({"docid": 1, "body": "x"}, {"docid": 2}),
            {"fields": {"id": "docid", "text": "body"}},
            "line 2, field 'body': missing.*'docid'",
        ),
        (lines({"docid": 1}), {"fields": {"id": "docid"}}, "'id' and 'text'"),
        (lines({"docid": 1}), {"fields": {"id": "docid", "txt": "x"}}, "'txt'"),
        (b"1\tx\ty\n", {"format": "tsv", "fields": {"id": "id", "text": "x"}}, "JSON lines only.*'tsv'"),
        (b"", {"format": "parquet"}, "auto or one of jsonl, kilt, hotpotqa, tsv, got 'parquet'"),
        (b"plain words\n", {}, "line 1: not a JSON object"),
        (lines("[" * 100_000), {"format": "jsonl"}, "line 1: not a JSON object"),
    ],
)
def test_malformed_files_are_named_by_line_and_field(tmp_path, content, options, message):
    path = tmp_path / "corpus"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        passages(path, **options)


def test_a_place_in_an_archive_is_named(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        content = bz2.compress(lines(ABSTRACT, "x"))
        member = tarfile.TarInfo("AA/wiki_00.bz2")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    with pytest.raises(CorpusError, match=r"a\.tar, member AA/wiki_00\.bz2, line 2"):
        passages(path)


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.jsonl.bz2", "c.tar.bz2", "c.tar"])
def test_broken_and_missing_files_are_errors(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(CorpusError, match="cannot read the corpus"):
        passages(path)
    path.write_bytes(b"this is no archive at all " * 50)
    with pytest.raises(CorpusError, match="cannot read the corpus"):
        passages(path)


def test_an_empty_folder_is_an_error_and_an_empty_file_a_corpus_without_passages(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="no files"):
        corpus_files(tmp_path / "empty")
    (tmp_path / "c.jsonl").write_bytes(b"\n\n")
    assert passages(tmp_path / "c.jsonl") == []
    assert len(open_corpus(tmp_path / "c.jsonl", stored=True, cache_dir=tmp_path)) == 0


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="this Python reads it")
def test_a_compression_that_python_lacks_is_an_error(tmp_path):
    (tmp_path / "c.jsonl.zst").write_bytes(b"(\xb5/\xfd")
    with pytest.raises(CorpusError, match="decompress the file first"):
        passages(tmp_path / "c.jsonl.zst")


def test_bytes_read_are_told_up_to_the_size_of_the_file(tmp_path):
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(lines(*({"id": str(n), "text": f"{n * 7919}"} for n in range(5000)))))
    told = []
    assert len(list(read_passages(path, advance=told.append))) == 5000
    assert len(told) == 5
    assert told == sorted(told)
    assert 0 < told[-1] <= path.stat().st_size


def test_every_format_can_be_named(tmp_path):
    rows = {"jsonl": lines({"id": "1", "text": "x"}), "kilt": lines(KILT_PAGE), "hotpotqa": lines(PAGE), "tsv": b"1\tx\ty\n"}
    assert set(rows) == set(FORMATS)
    for name, content in rows.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert passages(path, format=name) == passages(path)
        assert list(Corpus.from_rows(read_passages(path, name))) == sorted(passages(path))
