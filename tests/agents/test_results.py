"""The store of results: every form gives the same rows, equal rows give equal bytes, and nothing damaged is read as if it were whole."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from searchqa_agents.results import (
    JUDGEMENTS_FILE,
    PARQUET_FILE,
    SCORES_FILE,
    STAMP_FILE,
    TIMES_FILE,
    joined_stamp,
    json_line,
    read_results,
    row_key,
    split_stamp,
    write_results,
)
from searchqa_agents.runs import RunFolderError, StorageError
from searchqa_envs.errors import ConfigurationError

STAMPS = {"nq": {"dataset": "nq", "top_k": 3, "retriever": {"name": "bm25", "k1": 0.9}}}


def made(question_id="q1", sample=0, set_name="nq", **changes):
    values = {
        "schema_version": 1,
        "set": set_name,
        "id": question_id,
        "sample": sample,
        "question": "Who?",
        "golden_answers": ["Ada", "Ada L."],
        "answer": "Ada",
        "groups": {"type": "bridge", "hops": 2},
        "metrics": {"em": 1.0, "f1": 1 / 3, "searches": 1.0, "turns": 2.0},
        "turns": [
            {"action": "search", "content": "ada", "passages": [["p1", "Ada"], ["p2", "Bob"]], "title_recall": 0.5},
            {"action": "answer", "content": "Ada", "passages": []},
        ],
        "terminated": True,
        "truncated": False,
        "retokenized": False,
    }
    return values | changes


def times_of(rows):
    return [
        {"set": one["set"], "id": one["id"], "sample": one["sample"], "seconds": {"model": i + 0.1, "search": 1 / 3}}
        for i, one in enumerate(rows)
    ]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "my-run"
    path.mkdir()
    return path


@pytest.fixture
def written(folder):
    rows = [made("q1"), made("q2", answer=None, groups={}), made("q2", 1)]
    write_results(folder, rows, times_of(rows), STAMPS)
    return folder


def forms(folder):
    return [read_results(path) for path in (folder, folder / SCORES_FILE, folder / PARQUET_FILE)]


# -- what is written is read ------------------------------------------------------------------------------------------------------------------


def test_all_forms_give_what_was_written(written):
    rows = [made("q1"), made("q2", answer=None, groups={}), made("q2", 1)]
    for results in forms(written):
        assert results.name == "my-run"
        assert results.rows == rows
        assert results.times == times_of(rows)
        assert results.stamps == STAMPS
        assert [list(one) for one in results.rows] == [list(made())] * 3


def test_rows_stay_in_their_order_and_times_follow_it(folder):
    rows = [made("z", set_name="nq"), made("a", 1, "nq"), made("a", 0, "nq"), made("b", set_name="bamboogle")]
    write_results(folder, rows, times_of(rows)[::-1], {"bamboogle": {}, "nq": {}})
    for results in forms(folder):
        assert [row_key(one) for one in results.rows] == [row_key(one) for one in rows] == [row_key(one) for one in results.times]
        assert results.times == times_of(rows)
        assert list(results.stamps) == ["nq", "bamboogle"]
    lines = [json.loads(line) for line in (folder / TIMES_FILE).read_text().splitlines()]
    assert lines == times_of(rows)


def test_equal_rows_give_equal_bytes_in_whatever_order_their_keys_are(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    rows = [made(str(i), metrics={f"m{k}": k / 7 for k in range(9)}, groups={"type": "a", "hops": 1, "level": "b"}) for i in range(5)]

    def turned(value):
        return {key: turned(own) for key, own in reversed(value.items())} if isinstance(value, dict) else value

    write_results(folder, rows, times_of(rows), STAMPS)
    write_results(other, [turned(one) | {"metrics": turned(one["metrics"])} for one in rows], [], STAMPS)
    assert (folder / SCORES_FILE).read_bytes() == (other / SCORES_FILE).read_bytes()
    from_lines = read_results(folder)
    write_results(other, from_lines.rows, from_lines.times, from_lines.stamps)
    for name in (SCORES_FILE, TIMES_FILE, STAMP_FILE):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def test_scores_hold_no_times(written):
    assert b"seconds" not in (written / SCORES_FILE).read_bytes()


HOSTILE = [
    "\ud800",
    "a\udfff b",
    "\x00\x01\x1f\x7f\x80\x85",
    "line\nbreak\r\nand\u2028others\u2029",
    '"quotes" \\ud800 {"a": 1}',
    "\U0001f600 ‮ ﷽ \ufeff\ufffe",
    "",
    " ",
    "x" * 1_000_000,
    "é" * 1_000_000 + "\ud800",
]


def test_hostile_texts_come_back_from_every_form(folder):
    rows = []
    for i, text in enumerate(HOSTILE):
        turns = [{"action": "search", "content": text, "passages": [[text, text]], "title_recall": 0.0}]
        rows.append(made(f"{i} {text[:50]}", answer=text, question=text, golden_answers=[text, "x"], groups={"type": text}, turns=turns))
    write_results(folder, rows, times_of(rows), STAMPS)
    for results in forms(folder):
        assert results.rows == rows
        assert results.times == times_of(rows)
    (folder / SCORES_FILE).read_text(encoding="utf-8")  # valid UTF-8, also for other programs
    assert (folder / SCORES_FILE).read_bytes().count(b"\n") == len(rows)


def test_two_surrogates_that_make_a_pair_are_read_as_the_character_from_every_form(folder):
    write_results(folder, [made(answer="\ud83d\ude00")], [], STAMPS)
    assert [results.rows[0]["answer"] for results in forms(folder)] == ["\U0001f600"] * 3


def test_what_parquet_columns_cannot_hold_comes_back_too(folder):
    rows = [
        made("a", groups={"hops": "two", "level": 3, "type": "x"}),
        made("b", groups={"hops": 2**70}),
        made("c", turns=[{"action": "search", "content": "x", "passages": [], "later": [1, {"a": None}]}]),
        made("d", turns=[{"passages": []}]),
        made("e", later="a key of a later version"),
        made("f", groups={"hops": True, "other": "y"}),
    ]
    write_results(folder, rows, [], STAMPS)
    for results in forms(folder):
        assert results.rows == rows
        assert results.rows[5]["groups"]["hops"] is True


def test_a_metric_may_have_the_name_of_a_column(folder):
    metrics = {"turns": 2.0, "id": 1.0, "set": 0.5, "seconds_model": 9.0, "metric_id": 4.0, "exact_json": 3.0, "": 1.0}
    rows = [made("a", metrics=metrics), made("b", metrics={})]
    write_results(folder, rows, times_of(rows), STAMPS)
    assert [results.rows for results in forms(folder)] == [rows] * 3
    assert [results.times for results in forms(folder)] == [times_of(rows)] * 3


def test_times_may_be_unknown_or_have_no_parts(folder):
    rows = [made("a"), made("b")]
    write_results(folder, rows, [], STAMPS)
    assert [results.times for results in forms(folder)] == [[]] * 3
    times = [{"set": "nq", "id": "a", "sample": 0, "seconds": {}}, {"set": "nq", "id": "b", "sample": 0, "seconds": {"model": 1.0}}]
    write_results(folder, rows, times, STAMPS)
    assert [results.times for results in forms(folder)] == [times] * 3


texts = st.text(st.characters(codec=None, exclude_categories=()), max_size=6)
numbers = st.floats(allow_nan=False, allow_infinity=False)
passages = st.lists(st.tuples(texts, texts).map(list), max_size=2)
turns = st.fixed_dictionaries({"action": texts, "content": texts, "passages": passages}, optional={"title_recall": numbers})
rows_drawn = st.builds(
    made,
    question_id=texts,
    question=texts,
    sample=st.integers(0, 5),
    golden_answers=st.lists(texts, max_size=3),
    answer=st.none() | texts,
    groups=st.dictionaries(st.sampled_from(["type", "hops", "level", "other"]), texts | st.integers()),
    metrics=st.dictionaries(texts, numbers, max_size=4),
    turns=st.lists(turns, max_size=3),
    terminated=st.booleans(),
)


@given(rows=st.lists(rows_drawn, min_size=1, max_size=4, unique_by=lambda one: (json.loads(json_line(one))["id"], one["sample"])))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_rows_are_equal_in_all_forms(folder, rows):
    write_results(folder, rows, [], STAMPS)
    expected = [json.loads(json_line(one)) for one in rows]  # two surrogates that make a pair are the character
    assert [results.rows for results in forms(folder)] == [expected] * 3


def test_a_parquet_file_goes_alone(written, tmp_path):
    shutil.copy(written / PARQUET_FILE, tmp_path / "best.parquet")
    alone, whole = read_results(tmp_path / "best.parquet"), read_results(written)
    assert alone.name == "best"
    assert (alone.rows, alone.times, alone.stamps) == (whole.rows, whole.times, whole.stamps)
    (written / SCORES_FILE).unlink()
    assert read_results(written) == whole


def test_parquet_is_flat_for_other_programs(written):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(written / PARQUET_FILE)
    columns = table.to_pydict()
    assert columns["em"] == [1.0] * 3
    assert columns["answer"] == ["Ada", None, "Ada"]
    assert columns["golden_answers"] == [["Ada", "Ada L."]] * 3
    assert columns["hops"] == [2, None, 2]
    assert columns["seconds_search"] == [1 / 3] * 3
    assert columns["exact_json"] == [None] * 3
    about = json.loads(table.schema.metadata[b"searchqa_results"])
    assert (about["schema_version"], about["stamp"]) == (1, STAMPS["nq"])


def test_more_rows_than_a_row_group_holds(folder, monkeypatch):
    monkeypatch.setattr("searchqa_agents.results._ROWS_AT_A_TIME", 3)
    rows = [made(str(i), answer=str(i)) for i in range(10)]
    write_results(folder, rows, times_of(rows), STAMPS)
    assert [results.rows for results in forms(folder)] == [rows] * 3
    assert [results.times for results in forms(folder)] == [times_of(rows)] * 3


# -- stamps -----------------------------------------------------------------------------------------------------------------------------------


def test_the_stamp_of_one_set_is_flat_and_of_several_what_they_share_with_each_whole():
    assert joined_stamp({"nq": {"a": 1}}) == {"a": 1}
    stamps = {"nq": {"dataset": "nq", "top_k": 3, "only": 1}, "hotpotqa": {"dataset": "hotpotqa", "top_k": 3}}
    joined = joined_stamp(stamps)
    assert joined == {"top_k": 3, "sets": stamps}
    assert split_stamp(joined, ["hotpotqa", "nq"]) == stamps
    assert split_stamp({"a": 1}, ["nq"]) == {"nq": {"a": 1}}
    with pytest.raises(ConfigurationError, match="none of nq, hotpotqa"):
        split_stamp({"a": 1}, ["nq", "hotpotqa"])
    with pytest.raises(ConfigurationError, match="none of popqa"):
        split_stamp(joined, ["nq", "popqa"])


def test_a_set_without_a_stamp_is_not_written(folder):
    with pytest.raises(ConfigurationError, match="none of hotpotqa"):
        write_results(folder, [made(), made(set_name="hotpotqa")], [], STAMPS)
    assert list(folder.iterdir()) == []


def test_scores_without_their_stamp_are_not_read(written):
    (written / STAMP_FILE).unlink()
    with pytest.raises(RunFolderError, match="is not there"):
        read_results(written)
    assert read_results(written / PARQUET_FILE).stamps == STAMPS
    (written / STAMP_FILE).write_text('{"sets": {"hotpotqa": {}}}')
    with pytest.raises(RunFolderError, match=r"none of nq.*stamp\.json of the run beside it"):
        read_results(written)
    for damaged in ("", "[]", '{"sets": 1}'):
        (written / STAMP_FILE).write_text(damaged)
        with pytest.raises(RunFolderError, match=r"stamp\.json"):
            read_results(written)


# -- what cannot be written -------------------------------------------------------------------------------------------------------------------


def test_bad_rows_are_not_written(folder):
    for rows, times, message in (
        ([], [], "no row of scores"),
        ([made("a"), made("a")], [], r"rows 1 and 2 are both sample 0 of question 'a' of nq"),
        ([made("a")], times_of([made("b")]), "1 have no times and 1 no scores"),
        ([made("a")], times_of([made("a"), made("a")]), "rows 1 and 2"),
        ([made("a", metrics={"em": float("nan")})], [], "em must be a finite number; got float nan"),
        ([made("a", sample=True)], [], "sample cannot be bool True"),
    ):
        with pytest.raises(RunFolderError, match=message):
            write_results(folder, rows, times, STAMPS)
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_gone_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match=r"could not be written to .*gone.*resume"):
        write_results(tmp_path / "gone", [made()], [], STAMPS)


def test_a_write_that_fails_leaves_the_former_files_whole(written, monkeypatch):
    before = {path.name: path.read_bytes() for path in written.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("searchqa_agents.runs.os.replace", full)
    with pytest.raises(StorageError, match="No space left"):
        write_results(written, [made("other")], [], STAMPS)
    assert {path.name: path.read_bytes() for path in written.iterdir()} == before


def test_without_pyarrow_the_extra_is_named(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert len(read_results(written).rows) == 3
    with pytest.raises(ConfigurationError, match=r"pip install 'searchqa-gym\[agents\]'"):
        read_results(written / PARQUET_FILE)
    with pytest.raises(ConfigurationError, match=r"pip install 'searchqa-gym\[agents\]'"):
        write_results(written, [made()], [], STAMPS)


def test_numbers_that_json_does_not_have_are_no_line():
    with pytest.raises(ValueError, match="JSON compliant"):
        json_line({"a": float("inf")})


# -- what cannot be read ----------------------------------------------------------------------------------------------------------------------


def test_a_folder_without_results_names_the_way_on(tmp_path):
    with pytest.raises(RunFolderError, match="searchqa eval resume="):
        read_results(tmp_path)
    with pytest.raises(RunFolderError, match="is not there"):
        read_results(tmp_path / SCORES_FILE)
    with pytest.raises(RunFolderError, match="is not there"):
        read_results(tmp_path / PARQUET_FILE)


def replaced(written, number, line):
    lines = (written / SCORES_FILE).read_bytes().split(b"\n")
    lines[number - 1] = line if isinstance(line, bytes) else json_line(line).rstrip("\n").encode()
    (written / SCORES_FILE).write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "must be an object; got list"),
        (b"null", "must be an object"),
        (made(schema_version=2), "schema_version is 2; this version of searchqa-gym reads 1"),
        (made(schema_version=None), "schema_version is None"),
        ({"schema_version": 1, "id": "q"}, "has no set, sample, question"),
        (made(answer=3), "answer cannot be int 3"),
        (made(sample=0.5), "sample cannot be float"),
        (made(golden_answers="Ada"), "golden_answers cannot be str"),
        (made(golden_answers=[1]), "golden_answers must be texts"),
        (made(metrics={"em": "1"}), "metric em must be a finite number; got str '1'"),
        (made(metrics={"em": None}), "metric em"),
        (made(metrics={"em": True}), "metric em"),
        (made(metrics={"em": 10**400}), "metric em"),
        (json.dumps(made(metrics={"em": float("nan")})).encode(), "metric em"),
        (made(turns=["x"]), "a turn must be an object"),
        (made(turns=[{"passages": [["only an id"]]}]), "pairs of id and title"),
        (made(turns=[{"action": "search"}]), "a turn must be"),
        (made(turns=[{"passages": [], "title_recall": None}]), "title_recall must be a finite number; got NoneType"),
        (made(groups={"type": ["a"]}), "the group type must be a text or a whole number; got list"),
        (made("q1"), "both sample 0 of question 'q1'"),
    ],
)
def test_a_damaged_row_is_named_by_file_and_line(written, line, message):
    replaced(written, 2, line)
    with pytest.raises(RunFolderError, match=message) as caught:
        read_results(written)
    assert "scores.jsonl" in str(caught.value)
    assert "2" in str(caught.value)


def test_scores_that_are_cut_off_anywhere_are_refused(written):
    content = (written / SCORES_FILE).read_bytes()
    ends = [i for i, byte in enumerate(content) if byte == 10]
    for length in (0, 1, ends[0], ends[0] + 1, ends[1] + 1, ends[1] + 9, len(content) - 2, len(content) - 1):
        (written / SCORES_FILE).write_bytes(content[:length])
        with pytest.raises(RunFolderError, match=r"scores.jsonl"):
            read_results(written)


def test_damaged_times_are_refused(written):
    for line, message in (
        ("{}\n", "set, id and sample"),
        ('{"set": "nq", "id": "q1", "sample": 0, "seconds": {"model": "1"}}\n', "seconds must be numbers"),
        ('{"set": "nq", "id": "q1", "sample": 0, "seconds": {"model": 1}}\n', "2 have no times"),
    ):
        (written / TIMES_FILE).write_text(line)
        with pytest.raises(RunFolderError, match=message):
            read_results(written)
    (written / TIMES_FILE).unlink()
    assert read_results(written).times == []


def refusal(path):
    """The message with which a file is refused, or None and what was read."""
    try:
        return None, read_results(path)
    except RunFolderError as error:
        return str(error), None


def test_parquet_that_is_cut_off_or_changed_anywhere_is_refused_or_says_the_same(written):
    path = written / PARQUET_FILE
    content, whole = path.read_bytes(), read_results(path)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    rng = random.Random(0)
    for place in [0, 4, footer, len(content) - 8, len(content) - 1, *(rng.randrange(len(content)) for _ in range(150))]:
        path.write_bytes(content[:place])
        assert str(path) in refusal(path)[0]
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        message, results = refusal(path)  # another error would end the test
        assert message is not None or place >= footer or results.rows == whole.rows


def rewritten(written, change):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(written / PARQUET_FILE)
    parquet.write_table(change(table, pyarrow), written / PARQUET_FILE)
    return written / PARQUET_FILE


def about(table, **changes):
    told = json.loads(table.schema.metadata[b"searchqa_results"]) | changes
    return table.replace_schema_metadata({"searchqa_results": json.dumps(told)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table, _: table.drop_columns(["answer", "em"]), "has no column answer, em"),
        (lambda table, _: table.replace_schema_metadata({}), "no searchqa_results: it is not a results.parquet"),
        (lambda table, _: table.replace_schema_metadata({"searchqa_results": "{"}), "metadata are damaged"),
        (lambda table, _: table.replace_schema_metadata({"searchqa_results": "[]"}), "metadata are damaged"),
        (lambda table, _: table.replace_schema_metadata({"searchqa_results": '{"schema_version": 1}'}), "metadata are damaged"),
        (lambda table, _: about(table, schema_version=7), "schema_version is 7"),
        (lambda table, _: about(table, stamp=None), "metadata are damaged"),
        (lambda table, _: about(table, metrics={"em": "gone"}), "has no column gone"),
        (lambda table, _: table.slice(0, 0), "no row"),
        (lambda table, pa: table.set_column(2, "sample", pa.array(["0", "0", "1"])), "column sample must hold int64, not string"),
        (lambda table, pa: table.set_column(1, "id", pa.array([None, "q2", "q2"])), "row 1: id cannot be NoneType"),
        (lambda table, pa: table.set_column(table.schema.get_field_index("em"), "em", pa.array(["1"] * 3)), "metric em must be a finite"),
        (lambda table, pa: table.set_column(table.schema.get_field_index("exact_json"), "exact_json", pa.array(["{", None, None])), "row 1"),
        (lambda table, pa: pa.concat_tables([table, table]), "rows 1 and 4"),
    ],
)  # fmt: skip
def test_parquet_that_another_program_changed_is_refused(written, change, message):
    path = rewritten(written, change)
    with pytest.raises(RunFolderError, match=message) as caught:
        read_results(path)
    assert str(path) in str(caught.value)


# -- judgements -------------------------------------------------------------------------------------------------------------------------------


def judged(question, correct, sample=0, **more):
    return json_line({"set": "nq", "id": question, "sample": sample, "correct": correct, **more})


def test_judgements_are_the_metric_judge_in_every_form(written):
    lines = [judged("q2", True), judged("q1", False), judged("q2", False, 1), judged("q1", True, verdict="yes")]
    (written / JUDGEMENTS_FILE).write_text("".join(lines))
    for results in forms(written):
        assert [one["metrics"]["judge"] for one in results.rows] == [1.0, 1.0, 0.0]  # the later of two counts


def test_answers_that_are_not_judged_yet_have_no_judge_and_it_is_said(written, caplog):
    (written / JUDGEMENTS_FILE).write_text(judged("q1", True) + judged("q2", True)[:-7])  # a judge was stopped while writing
    for results in forms(written):
        assert ["judge" in one["metrics"] for one in results.rows] == [True, False, False]
    assert "1 of 3 answers are judged" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (judged("q1", 1), "correct must be true or false; got int 1"),
        (judged("q9", True), "question 'q9' of nq was judged, but has no scores"),
        ("[]\n", "set, id and sample"),
        ("{\n", "line 1: not JSON"),
    ],
)
def test_bad_judgements_are_refused(written, line, message):
    (written / JUDGEMENTS_FILE).write_text(line)
    with pytest.raises(RunFolderError, match=message):
        read_results(written)


def test_the_benchmark_runs():
    path = Path(__file__).parents[1] / "benchmarks" / "bench_results.py"
    done = subprocess.run([sys.executable, path, "--rows", "60", "--samples", "2"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "summarise, with intervals and groups" in done.stdout
