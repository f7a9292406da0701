"""Result files of the benchmark: what is written is read back, and what is malformed is told by file and field."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_agents.bench import results
from searchqa_agents.bench.results import (
    SHARES,
    BenchResultError,
    Entry,
    Point,
    ScoreRun,
    collect,
    common_part,
    entry_of_text,
    entry_text,
    merged,
    normalised_score,
    read_entry,
    read_run,
    runs_under,
    shipped,
    unfinished_under,
    without_common_part,
    write_entry,
    write_run,
)

REFERENCES = {"no_search": 0.1, "oracle": 0.9}


def run_of(task="sparse", seed=0, algorithm="grpo", ems=(0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.7), **changes):
    points = tuple(
        Point(
            share, int(share * 8000), int(share * 4000), int(share * 80), share * 10, share * 9, em, 1.0, normalised_score(em, REFERENCES)
        )
        for share, em in zip(SHARES, ems, strict=True)
    )
    stamp = {
        "data": {"preset": task, "worlds": 4},
        "packages": {"torch": "2.13.0"},
        "seed": seed,
        "command": "searchqa bench suite=world-v1",
    }
    run = ScoreRun("world-v1", task, 1, algorithm, seed, 8000, REFERENCES, points, {"learning_rate": 5e-4, "seed": seed}, stamp, "finished")
    return replace(run, **changes)


def sweep(folder, runs, unfinished=()):
    """A folder as a sweep leaves it."""
    jobs = [(run.algorithm, run.task, run.seed, run) for run in runs] + [(*job, None) for job in unfinished]
    for algorithm, task, seed, run in jobs:
        job = folder / algorithm / task / f"seed-{seed}"
        job.mkdir(parents=True)
        (job / "config.yaml").write_text("algorithm: {}\n")
        if run is not None:
            write_run(job, run)
    return folder


def entry_of(runs):
    return Entry(runs[0].algorithm, runs[0].suite, tuple(runs), "searchqa bench", common_part([run.stamp for run in runs]), "GRPO")


def changed(path: Path, change) -> Path:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return path


# -- one run ---------------------------------------------------------------------------------------------------------------------------------


def test_a_run_is_read_back_as_it_was_written(tmp_path):
    run = run_of()
    path = write_run(tmp_path, run)
    assert path == tmp_path / "score.json"
    assert read_run(tmp_path) == read_run(path)
    read = read_run(tmp_path)
    assert replace(read, points=run.points) == run
    assert [point.share for point in read.points] == [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1]
    assert [point.score for point in read.points] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.75])
    assert [file.name for file in tmp_path.iterdir()] == ["score.json"]


def test_floats_are_rounded_and_settings_are_not(tmp_path):
    third = replace(run_of().points[1], em=1 / 3, score=normalised_score(1 / 3, REFERENCES), seconds=1 / 3)
    run = run_of(settings={"learning_rate": 1 / 3})
    write_run(tmp_path, replace(run, points=(run.points[0], third, *run.points[2:])))
    read = read_run(tmp_path)
    assert (read.points[1].em, read.points[1].seconds) == (0.333333, 0.333)
    assert read.settings == {"learning_rate": 1 / 3}


def test_the_points_after_a_divergence_count_zero(tmp_path):
    filled = [replace(point, em=0.0, score=0.0) if point.share > 0.5 else point for point in run_of().points]
    write_run(tmp_path, run_of(points=tuple(filled), status="diverged"))
    assert [point.score for point in read_run(tmp_path).points[5:]] == [0, 0, 0, 0]


def put(*keys_and_value):
    *keys, last, new = keys_and_value

    def change(value):
        for key in keys:
            value = value[key]
        value[last] = new

    return change


def drop(*keys):
    def change(value):
        for key in keys[:-1]:
            value = value[key]
        del value[keys[-1]]

    return change


MALFORMED = [
    # change, the field that the message names, and what it says
    (put("schema", 2), "schema", "the version of searchqa-gym that wrote it"),
    (drop("schema"), "schema", "missing"),
    (put("extra", 1), "extra", "not known"),
    (drop("task"), "task", "missing"),
    (put("task", 3), "task", "a string"),
    (put("task_version", 0), "task_version", "at least 1"),
    (put("seed", True), "seed", "a whole number"),
    (put("seed", 1.0), "seed", "a whole number"),
    (put("seed", -1), "seed", "at least 0"),
    (put("budget", "8000"), "budget", "a whole number"),
    (put("settings", []), "settings", "an object"),
    (put("settings", {"a": {"b": [1, math.nan]}}), "settings.a.b[1]", "finite"),
    (put("stamp", {"a": math.inf}), "stamp.a", "finite"),
    (put("status", "killed"), "status", "finished, diverged"),
    (put("references", "oracle", 0.1), "references: oracle", "above no_search"),
    (drop("references", "oracle"), "references: oracle", "missing"),
    (put("references", "guess", 0.5), "references: guess", "not known"),
    (put("points", {}), "points", "a list"),
    (drop("points", 8), "points", "0, 1/8, ..., 1"),
    (put("points", 3, "share", 0.4), "points", "0, 1/8, ..., 1"),
    (put("points", 3, 7), "points[3]", "JSON object"),
    (put("points", 3, "em", math.nan), "points[3]: em", "finite"),
    (put("points", 3, "em", 1.5), "points[3]: em", "between 0 and 1"),
    (put("points", 3, "score", math.inf), "points[3]: score", "finite"),
    (put("points", 3, "score", 10**400), "points[3]: score", "finite"),
    (put("points", 3, "score", None), "points[3]: score", "a number"),
    (put("points", 3, "score", 0.9), "points[3].score", "0.375"),
    (put("points", 3, "searches", -1), "points[3]: searches", "at least 0"),
    (put("points", 3, "loss", 0.0), "points[3]: loss", "not known"),
    (drop("points", 3, "steps"), "points[3]: steps", "missing"),
    (put("points", 3, "policy_tokens", 1.5), "points[3]: policy_tokens", "a whole number"),
    (put("points", 3, "policy_tokens", 7999), "points.policy_tokens", "cannot fall"),
    (put("points", 8, "cpu_seconds", 0.0), "points.cpu_seconds", "cannot fall"),
]


@pytest.mark.parametrize(("change", "field", "rule"), MALFORMED, ids=[f"{field}-{rule}" for _, field, rule in MALFORMED])
def test_a_malformed_run_is_told_by_file_and_field(tmp_path, change, field, rule):
    path = changed(write_run(tmp_path, run_of()), change)
    with pytest.raises(BenchResultError) as told:
        read_run(tmp_path)
    assert str(told.value).startswith(f"{path}: {field}")
    assert rule in str(told.value)


def test_a_score_of_zero_without_a_divergence_is_checked_like_any_other(tmp_path):
    changed(write_run(tmp_path, run_of()), lambda value: value["points"][3].update(em=0.0, score=0.0))
    with pytest.raises(BenchResultError, match=r"points\[3\]\.score.*-0\.125"):
        read_run(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_told(tmp_path, content):
    (tmp_path / "score.json").write_bytes(content)
    with pytest.raises(BenchResultError, match=r"score\.json"):
        read_run(tmp_path)


def test_a_run_without_a_result_is_told_as_unfinished(tmp_path):
    with pytest.raises(BenchResultError, match=r"score\.json: there is no such file: the run is not finished"):
        read_run(tmp_path)


def test_a_run_that_could_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(BenchResultError, match="as it would be written: status"):
        write_run(tmp_path, run_of(status="killed"))
    with pytest.raises(BenchResultError, match="plain values"):
        write_run(tmp_path, run_of(settings={"path": tmp_path}))
    assert not list(tmp_path.iterdir())


# -- entries ---------------------------------------------------------------------------------------------------------------------------------


def test_runs_of_a_sweep_are_collected_by_algorithm(tmp_path):
    own = [run_of(task, seed) for task in ("deep", "sparse") for seed in (0, 1)]
    folder = sweep(tmp_path / "world-v1", [*own, run_of(algorithm="ppo")], unfinished=[("grpo", "sparse", 2), ("ppo", "deep", 0)])
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text("")
    assert len(runs_under(folder)) == 5
    assert unfinished_under(folder) == [folder / "grpo/sparse/seed-2", folder / "ppo/deep/seed-0"]
    entry = collect(folder, "grpo")
    assert [(run.task, run.seed) for run in entry.runs] == [("deep", 0), ("deep", 1), ("sparse", 0), ("sparse", 1)]
    assert (entry.algorithm, entry.suite, entry.label, entry.command) == ("grpo", "world-v1", "grpo", "searchqa bench suite=world-v1")
    assert entry.stamp == {"data": {"worlds": 4}, "packages": {"torch": "2.13.0"}, "command": "searchqa bench suite=world-v1"}
    assert entry.unfinished == (folder / "grpo/sparse/seed-2",)
    assert (entry.tasks, entry.seeds) == (("deep", "sparse"), (0, 1))
    assert collect(folder / "grpo", "grpo") == entry


def test_runs_that_several_lines_made_tell_all_of_them(tmp_path):
    runs = [run_of(seed=seed, stamp={"command": f"searchqa bench seed={seed}"}) for seed in (0, 1)]
    assert collect(sweep(tmp_path, runs), "grpo").command == "searchqa bench seed=0 && searchqa bench seed=1"
    assert collect(tmp_path, "grpo", command="mine", label="Mine").command == "mine"


def test_an_algorithm_without_a_finished_run_is_told(tmp_path):
    sweep(tmp_path, [run_of()], unfinished=[("mine", "sparse", 0)])
    with pytest.raises(BenchResultError, match=r"no finished run of the algorithm 'mine'.*1 unfinished"):
        collect(tmp_path, "mine")
    with pytest.raises(BenchResultError, match="it has grpo"):
        collect(tmp_path / "grpo", "other")
    with pytest.raises(BenchResultError, match="no folder"):
        collect(tmp_path / "nowhere", "grpo")


OTHERS = [
    (run_of(suite="world-v2", seed=1), "suite"),
    (run_of(task_version=2, seed=1), "task_version"),
    (run_of(budget=9000, seed=1), "budget"),
    (run_of(references={"no_search": 0.1, "oracle": 0.90001}, seed=1), "references.oracle"),
    (run_of(), "seed"),
]


@pytest.mark.parametrize(("other", "field"), OTHERS, ids=[field for _, field in OTHERS])
def test_runs_that_do_not_belong_together_are_told_with_both_files(tmp_path, other, field):
    write_run(tmp_path, run_of())
    second = tmp_path / "second"
    second.mkdir()
    write_run(second, other)
    (tmp_path / "first").mkdir()
    (tmp_path / "score.json").rename(tmp_path / "first" / "score.json")
    with pytest.raises(BenchResultError, match=rf"second/score\.json: {field}: .*first/score\.json"):
        collect(tmp_path, "grpo")


def test_tasks_may_have_budgets_and_versions_of_their_own(tmp_path):
    sweep(tmp_path, [run_of(), run_of(task="deep", budget=9000, task_version=3)])
    assert [run.budget for run in collect(tmp_path, "grpo").runs] == [9000, 8000]


def test_an_entry_is_read_back_as_it_was_written(tmp_path):
    runs = [run_of(task, seed) for task in ("deep", "sparse", "easy") for seed in range(5)]
    path = tmp_path / "grpo.json"
    write_entry(path, entry_of(runs))
    entry = read_entry(path)
    assert [(run.task, run.seed) for run in entry.runs] == sorted((run.task, run.seed) for run in runs)
    for run in runs:
        (read,) = [one for one in entry.runs if (one.task, one.seed) == (run.task, run.seed)]
        assert replace(read, points=run.points) == run
        assert [point.score for point in read.points] == pytest.approx([point.score for point in run.points], abs=1e-6)
    assert (entry.label, entry.command, entry.stamp) == ("GRPO", "searchqa bench", entry_of(runs).stamp)
    assert entry_text(entry) == path.read_text()


def test_a_results_file_is_small_and_has_a_line_for_each_run(tmp_path):
    settings = {f"setting_{number}": number / 3 for number in range(40)}
    stamp = {"data": {f"key_{number}": "value" * 4 for number in range(60)}}
    ems = [(step * 0.0937123) % 1 for step in range(9)]
    runs = [run_of(task, seed, ems=ems, settings=settings, stamp=stamp) for task in ("a", "b", "c") for seed in range(5)]
    path = tmp_path / "grpo.json"
    write_entry(path, entry_of(runs))
    lines = path.read_text().splitlines()
    starts = [json.loads(line.rstrip(",")) for line in lines if line.startswith('{"task"')]
    assert [(run["task"], run["seed"], run["settings"], run["stamp"]) for run in starts] == [
        (task, seed, {}, {}) for task in ("a", "b", "c") for seed in range(5)
    ]
    assert path.stat().st_size < 40_000


def test_a_run_less_is_a_line_less():
    runs = [run_of(seed=seed) for seed in range(4)]
    longer, shorter = (set(entry_text(entry_of(own)).splitlines()) for own in (runs, [*runs[:1], *runs[2:]]))
    assert len(longer - shorter) == 1
    assert shorter < longer


ENTRY_MALFORMED = [
    (put("schema", 0), "schema"),
    (put("note", ""), "note"),
    (drop("label"), "label"),
    (put("runs", []), "runs"),
    (put("runs", 1, "suite", "world-v1"), r"runs\[1\]: suite"),
    (drop("runs", 1, "stamp"), r"runs\[1\]: stamp"),
    (put("runs", 1, "points", 0, "em", "high"), r"runs\[1\]: points\[0\]: em"),
    (put("runs", 1, "budget", 5), r"runs\[1\]: budget"),
    (put("runs", 1, "seed", 0), r"runs\[1\]: seed"),
    (put("stamp", {"a": math.nan}), r"stamp\.a"),
]


@pytest.mark.parametrize(("change", "field"), ENTRY_MALFORMED, ids=[field for _, field in ENTRY_MALFORMED])
def test_a_malformed_results_file_is_told_by_file_and_field(tmp_path, change, field):
    path = tmp_path / "grpo.json"
    write_entry(path, entry_of([run_of(seed=seed) for seed in (0, 1)]))
    with pytest.raises(BenchResultError, match=rf"grpo\.json: {field}: "):
        read_entry(changed(path, change))


def test_an_entry_of_several_algorithms_is_not_written(tmp_path):
    with pytest.raises(BenchResultError, match=r"runs\[1\]"):
        write_entry(tmp_path / "grpo.json", entry_of([run_of(), run_of(seed=1, algorithm="ppo")]))
    assert not list(tmp_path.iterdir())


def test_an_entry_replaces_a_file_only_when_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "grpo.json"
    write_entry(path, entry_of([run_of()]))
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(OSError, match="gone"):
        write_entry(path, entry_of([run_of(), run_of(seed=1)]))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["grpo.json"]


def test_the_shipped_entries_of_a_suite_are_found_by_algorithm(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "LEADERBOARD", tmp_path)
    (tmp_path / "world-v1").mkdir()
    for algorithm in ("ppo", "grpo"):
        write_entry(tmp_path / "world-v1" / f"{algorithm}.json", entry_of([run_of(algorithm=algorithm)]))
    assert {name: entry.algorithm for name, entry in shipped("world-v1").items()} == {"grpo": "grpo", "ppo": "ppo"}
    assert shipped("world-v9") == {}
    (tmp_path / "world-v1" / "ppo.json").rename(tmp_path / "world-v1" / "mine.json")
    with pytest.raises(BenchResultError, match=r"mine\.json: suite, algorithm"):
        shipped("world-v1")


# -- what mappings have in common ------------------------------------------------------------------------------------------------------------


def test_the_common_part_is_told_apart_at_every_depth():
    first = {"a": {"x": 1, "y": 2}, "b": True, "c": [1], "d": {"x": 1}}
    second = {"a": {"x": 1, "y": 3}, "b": 1, "c": [1], "d": {"x": 2}}
    common = common_part([first, second])
    assert common == {"a": {"x": 1}, "c": [1]}
    assert without_common_part(first, common) == {"a": {"y": 2}, "b": True, "d": {"x": 1}}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, 1.0]) | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
MAPPINGS = st.lists(st.dictionaries(st.sampled_from("abc"), JSON, max_size=3), min_size=1, max_size=3)


@given(MAPPINGS)
def test_mappings_without_their_common_part_and_with_it_again_are_the_same(mappings):
    common = common_part(mappings)
    again = [merged(common, without_common_part(mapping, common)) for mapping in mappings]
    assert [json.dumps(one, sort_keys=True) for one in again] == [json.dumps(one, sort_keys=True) for one in mappings]


@given(MAPPINGS, st.text())
def test_any_stamp_and_command_survives_a_results_file(stamps, command):
    runs = tuple(run_of(seed=seed, stamp=stamp) for seed, stamp in enumerate(stamps))
    text = entry_text(Entry("grpo", "world-v1", runs, command, {}, "GRPO"))
    read = entry_of_text(text, "text")
    assert read.command == command
    assert [json.dumps(run.stamp, sort_keys=True) for run in read.runs] == [json.dumps(stamp, sort_keys=True) for stamp in stamps]
    assert entry_text(read) == text
