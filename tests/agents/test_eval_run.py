"""Evaluations: whatever happens on the way, every episode is played once, none is left out, and the scores are the same bytes."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchqa_agents.answers import Journal, Part, parse_part, read_answers, running_parts
from searchqa_agents.cli import main
from searchqa_agents.eval_plan import PUBLISHED_ORDER, SetPlan, missing_episodes, set_names
from searchqa_agents.eval_stamps import check_stamp
from searchqa_agents.question_lists import choice_of, chosen_questions
from searchqa_agents.runs import OtherSearchError, RunFolderError
from searchqa_agents.settings import EnvSettings
from searchqa_agents.trajectory import load_trajectories
from searchqa_envs.datasets import load_custom
from searchqa_envs.errors import ConfigurationError

LAZY = ("env=world", "env.num_worlds=4", "agent=oracle", "agent.kind=lazy_oracle", "samples=2", "threads=1")
"""An agent of chance: its answers depend on each episode's seed."""
TINY = ("env=world", "env.num_worlds=1", "env.max_turns=3", "questions=12", "agent=lm", "samples=2", "threads=1")
"""The shipped checkpoint, at temperature 1."""
ALONE = {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def pages() -> None:
    """A test that has this writes picture and page in this process too; those that start a process write them there."""


@pytest.fixture(autouse=True)
def _without_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Picture and page take most of the time of a small evaluation, and have tests of their own."""
    if "pages" not in request.fixturenames:
        monkeypatch.setattr("searchqa_agents.eval_report._draw", lambda folder, summary: folder)
        monkeypatch.setattr("searchqa_agents.report.write_page", lambda folder, trajectories=None: folder)


def evaluate(*words: str) -> None:
    assert main(["eval", *map(str, words)]) == 0


def begun(*words: object, **options: object) -> subprocess.Popen[str]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "searchqa_agents.cli", "eval", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | ALONE, **options)  # type: ignore[call-overload, no-any-return]


def lines_of(run: Path) -> int:
    return sum(file.read_bytes().count(b'{"row"') for file in (run / "answers").glob("*.jsonl"))


def scores(run: Path) -> bytes:
    return (run / "scores.jsonl").read_bytes()


def wait_for_lines(process: subprocess.Popen[str], run: Path, count: int) -> None:
    while not (run / "answers").is_dir() or lines_of(run) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def killed(count: int, *words: object, run: Path) -> int:
    """Kill an evaluation once so many episodes are played; how many were."""
    process = begun(*words, f"run_dir={run}", "num_envs=2")
    wait_for_lines(process, run, count)
    process.kill()
    process.communicate()
    return lines_of(run)


# -- the same bytes --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("plain") / "run"
    evaluate(*LAZY, f"run_dir={run}")
    return run


def test_a_killed_and_resumed_run_has_the_scores_of_a_plain_one_and_repeats_nothing(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    played = killed(100, *LAZY, run=run)
    assert 100 <= played < 384
    journal = (run / "answers" / "all.jsonl").read_bytes()
    whole = journal[: journal.rfind(b"\n") + 1]
    with (run / "answers" / "all.jsonl").open("ab") as file:
        file.write(b'{"row": {"schema_version": 1, "set": "wor')  # as a kill in the middle of a write leaves it
    assert not (run / "scores.jsonl").exists()
    evaluate(f"resume={run}", "num_envs=32")
    assert f"{played} of 384 episodes are answered already" in capsys.readouterr().out
    assert scores(run) == scores(plain)
    assert (run / "answers" / "all.jsonl").read_bytes().startswith(whole)
    assert lines_of(run) == 384
    page = [load_trajectories(folder / "trajectories" / "eval.jsonl.gz") for folder in (plain, run)]
    assert len(page[0]) == 200
    assert [t.question_id for t in page[0]] == [t.question_id for t in page[1]]
    assert all((a.token_ids == b.token_ids).all() for a, b in zip(*page, strict=True))


def test_scores_hold_every_episode_in_order_and_chance_is_in_them(plain: Path) -> None:
    rows = [json.loads(line) for line in scores(plain).splitlines()]
    assert [(row["id"], row["sample"]) for row in rows] == [
        (f"easy-test-0-{world}-{place}", sample) for world in range(4) for place in range(48) for sample in range(2)
    ]
    assert 0 < sum(row["metrics"]["em"] for row in rows) < 384
    pairs = [(a["metrics"]["em"], b["metrics"]["em"]) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    assert any(a != b for a, b in pairs)
    assert not any("seconds" in row for row in rows)
    stamp = json.loads((plain / "stamp.json").read_text())
    assert (stamp["samples"], stamp["temperature"], stamp["questions_played"], stamp["question_list"]["kind"]) == (2, None, 192, "all")


def test_two_processes_give_the_scores_of_one(plain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    evaluate(*LAZY, f"run_dir={run}", "processes=2", "num_envs=5")
    assert scores(run) == scores(plain)
    assert [file.name for file in sorted((run / "answers").glob("*.jsonl"))] == ["0-of-2.jsonl", "1-of-2.jsonl"]
    assert lines_of(run) == 384
    searches = [json.loads((folder / "summary.json").read_text())["search"]["total"]["search/searches"] for folder in (plain, run)]
    assert searches[0] == searches[1]


@pytest.mark.slow
def test_parts_started_by_hand_at_the_same_time_are_merged_by_the_line_without_a_part(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    parts = [begun(*LAZY, f"run_dir={run}", f"shard={number}/2", "num_envs=8") for number in range(2)]
    said = [part.communicate()[0] for part in parts]
    assert [part.returncode for part in parts] == [0, 0], said
    assert any("Nothing is missing" in one for one in said)
    assert not (run / "scores.jsonl").exists()
    assert "shard" not in (run / "overrides.yaml").read_text()
    evaluate(f"resume={run}")
    assert "384 of 384 episodes are answered already" in capsys.readouterr().out
    assert scores(run) == scores(plain)


@pytest.mark.slow
def test_a_killed_run_can_be_finished_in_parts(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    killed(50, *LAZY, run=run)
    evaluate(f"resume={run}", "shard=2/3")
    assert "episodes of other parts are missing" in capsys.readouterr().out
    evaluate(f"resume={run}")
    assert scores(run) == scores(plain)
    assert lines_of(run) == 384


@pytest.mark.slow
def test_a_killed_parent_takes_its_processes_along_and_loses_nothing(plain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = begun(*LAZY, f"run_dir={run}", "processes=2", "num_envs=1", start_new_session=True)
    wait_for_lines(process, run, 30)
    process.kill()
    process.communicate()  # ends when no process holds its output any more
    assert 30 <= lines_of(run) < 384
    assert not running_parts(run)
    evaluate(f"resume={run}")
    assert scores(run) == scores(plain)


@pytest.mark.slow
def test_an_interrupt_ends_all_processes_and_tells_the_way_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = begun(*LAZY, "samples=40", f"run_dir={run}", "processes=2", "num_envs=1", start_new_session=True)
    wait_for_lines(process, run, 30)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to all of them
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "Traceback" not in said
    assert f"`searchqa eval resume={run}` goes on" in " ".join(said.split())
    assert not running_parts(run)


def test_the_shipped_checkpoint_at_temperature_1_gives_the_same_scores_after_a_stop_and_in_other_batches(tmp_path: Path) -> None:
    whole, stopped, part = (tmp_path / name for name in ("whole", "stopped", "part"))
    evaluate(*TINY, f"run_dir={whole}")
    assert len({json.loads(line)["answer"] for line in scores(whole).splitlines()}) > 5
    shutil.copytree(whole, stopped)
    for file in ("scores.jsonl", "times.jsonl", "results.parquet", "summary.json"):
        (stopped / file).unlink()
    journal = stopped / "answers" / "all.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:1] + lines[12:20]) + lines[10][:70])
    evaluate(f"resume={stopped}", "num_envs=7")
    assert scores(stopped) == scores(whole)
    assert lines_of(stopped) == 24
    (tmp_path / "ids.jsonl").write_text('{"id": "easy-test-0-0-10"}\n{"id": "easy-test-0-0-7"}\n')
    evaluate(*TINY, f"questions={tmp_path / 'ids.jsonl'}", f"run_dir={part}", "num_envs=1")
    rows = [line for line in scores(whole).splitlines() if json.loads(line)["id"] in ("easy-test-0-0-7", "easy-test-0-0-10")]
    assert scores(part).splitlines() == rows


@pytest.mark.slow
def test_the_shipped_checkpoint_killed_resumed_and_in_two_processes_has_the_scores_of_a_plain_run(tmp_path: Path) -> None:
    evaluate(*TINY, f"run_dir={tmp_path / 'plain'}")
    assert killed(4, *TINY, run=tmp_path / "killed") < 24
    evaluate(f"resume={tmp_path / 'killed'}")
    evaluate(*TINY, f"run_dir={tmp_path / 'two'}", "processes=2")
    assert scores(tmp_path / "killed") == scores(tmp_path / "two") == scores(tmp_path / "plain")


@pytest.mark.data
def test_real_questions_killed_resumed_in_parts_and_plain_have_the_same_scores(tmp_path: Path) -> None:
    words = ("sets=[bamboogle,hotpotqa]", "questions=fixed-60", "agent=search_once", "threads=1")
    evaluate(*words, f"run_dir={tmp_path / 'plain'}")
    assert killed(20, *words, run=tmp_path / "killed") < 120
    evaluate(f"resume={tmp_path / 'killed'}")
    evaluate(*words, f"run_dir={tmp_path / 'two'}", "processes=2")
    assert scores(tmp_path / "killed") == scores(tmp_path / "two") == scores(tmp_path / "plain")
    rows = [json.loads(line) for line in scores(tmp_path / "plain").splitlines()]
    assert [row["set"] for row in rows] == ["bamboogle"] * 60 + ["hotpotqa"] * 60
    stamps = json.loads((tmp_path / "plain" / "stamp.json").read_text())["sets"]
    assert {name: stamp["split"] for name, stamp in stamps.items()} == {"bamboogle": "test", "hotpotqa": "dev"}


@pytest.mark.data
def test_the_shipped_checkpoint_on_real_questions_has_the_same_scores_in_any_batches(tmp_path: Path) -> None:
    words = (
        "env=hotpotqa",
        "env.split=dev",
        "env.max_turns=2",
        "env.max_segment_tokens=12",
        "env.prompt=bare",
        "agent=lm",
        "questions=8",
        "threads=1",
    )
    for num_envs in (1, 5):
        evaluate(*words, f"run_dir={tmp_path / str(num_envs)}", f"num_envs={num_envs}")
    assert scores(tmp_path / "1") == scores(tmp_path / "5")


# -- several sets ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made-up files of three sets: one without its published split, and one that names none."""
    root = tmp_path / "data"
    for name, splits in (("nq", [None] * 4), ("hotpotqa", ["train", "dev", "dev", "train", "dev"]), ("popqa", ["test"] * 3)):
        (root / name).mkdir(parents=True)
        rows = [
            {
                "id": f"{name}_{i}",
                "question": f"Who is {name}{i}?",
                "golden_answers": [f"{name}{i}"],
                "metadata": {"split": split} if split else {},
            }
            for i, split in enumerate(splits)
        ]
        with gzip.open(root / name / "questions.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        corpus = [{"id": f"{name}-p{i}", "title": f"{name}{i}", "text": f"{name}{i} is who."} for i in range(len(splits))]
        (root / name / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    monkeypatch.setenv("SEARCHQA_DATA", str(root))
    monkeypatch.setenv("SEARCHQA_CACHE", str(tmp_path / "cache"))
    return root


def test_several_sets_are_played_by_one_command_each_with_the_split_that_results_are_published_on(
    data: Path, pages: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    evaluate("sets=[popqa,nq,hotpotqa]", "agent=search_once", "save=2", f"run_dir={run}")
    said = capsys.readouterr()
    assert "10/10" in said.err
    rows = [json.loads(line) for line in scores(run).splitlines()]
    assert [row["id"] for row in rows] == [
        *(f"popqa_{i}" for i in range(3)), *(f"nq_{i}" for i in range(4)), *(f"hotpotqa_{i}" for i in (1, 2, 4)),
    ]  # fmt: skip
    assert [row["set"] for row in rows] == ["popqa"] * 3 + ["nq"] * 4 + ["hotpotqa"] * 3
    assert all(row["metrics"]["em"] == 1.0 for row in rows)
    stamp = json.loads((run / "stamp.json").read_text())
    assert stamp["top_k"] == 3
    assert [(name, own["split"], own["questions_played"]) for name, own in stamp["sets"].items()] == [
        ("popqa", "test", 3), ("nq", "all", 4), ("hotpotqa", "dev", 3),
    ]  # fmt: skip
    assert "nq: the files have no rows of the split 'test'" in (run / "run.log").read_text()
    assert "hotpotqa: the files" not in (run / "run.log").read_text()
    for name in ("popqa", "nq", "hotpotqa"):
        assert len(load_trajectories(run / "trajectories" / f"{name}.jsonl.gz")) == 2
    assert (run / "report.html").is_file()
    config = (run / "config.yaml").read_text()
    assert "name: eval-popqa-nq-hotpotqa-search_once" in config


def test_a_split_that_is_given_holds_for_all_sets(data: Path, tmp_path: Path) -> None:
    evaluate("sets=[hotpotqa,popqa]", "env.split=all", "agent=direct", f"run_dir={tmp_path / 'run'}")
    assert len(scores(tmp_path / "run").splitlines()) == 8


@pytest.mark.parametrize("name", ["hotpotqa", "nq", "popqa"])
def test_one_environment_of_a_published_set_is_played_as_the_set_is(name: str, data: Path, tmp_path: Path) -> None:
    evaluate(f"env={name}", "agent=search_once", f"run_dir={tmp_path / 'env'}")
    evaluate(f"sets=[{name}]", "agent=search_once", f"run_dir={tmp_path / 'sets'}")
    assert scores(tmp_path / "env") == scores(tmp_path / "sets")
    splits = [json.loads((tmp_path / run / "stamp.json").read_text())["split"] for run in ("env", "sets")]
    assert splits == [{"hotpotqa": "dev", "nq": "all", "popqa": "test"}[name]] * 2
    log = tmp_path / "env" / "run.log"
    assert (log.is_file() and "no rows of the split 'test'" in log.read_text()) == (name == "nq")


def test_each_set_can_have_a_list_of_its_own(data: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text('{"id": "nq_3"}\n{"id": "nq_1"}\n')
    lists = f"questions={{nq: '{tmp_path / 'ids.jsonl'}', popqa: fixed-2, hotpotqa: 1}}"
    evaluate("sets=[nq,popqa,hotpotqa]", lists, "agent=direct", f"run_dir={tmp_path / 'run'}")
    ids = [json.loads(line)["id"] for line in scores(tmp_path / "run").splitlines()]
    assert ids[:2] == ["nq_1", "nq_3"]
    assert [name.split("_")[0] for name in ids] == ["nq"] * 2 + ["popqa"] * 2 + ["hotpotqa"]
    stamps = json.loads((tmp_path / "run" / "stamp.json").read_text())["sets"]
    assert [stamps[name]["question_list"]["kind"] for name in ("nq", "popqa", "hotpotqa")] == ["file", "fixed", "first"]


def test_one_language_model_plays_all_sets_and_each_set_as_it_does_alone(data: Path, tmp_path: Path) -> None:
    words = ("agent=baseline/rag", "agent.lm.checkpoint=shipped", "agent.lm.temperature=1", "agent.options.max_tokens=4", "threads=1")
    evaluate("sets=[nq,popqa]", *words, f"run_dir={tmp_path / 'both'}")
    evaluate("env=popqa", *words, f"run_dir={tmp_path / 'alone'}")
    both = scores(tmp_path / "both").splitlines()
    assert [json.loads(line)["set"] for line in both] == ["nq"] * 4 + ["popqa"] * 3
    assert both[4:] == scores(tmp_path / "alone").splitlines()
    stamp = json.loads((tmp_path / "both" / "stamp.json").read_text())
    agent = stamp["agent"]
    assert (stamp["temperature"], agent["method"], agent["dtype"], len(agent["weights_sha256"])) == (1.0, "rag", "float64", 64)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sets=all", "env=world"], "Leave env= out, or give one of theirs"),
        (["sets=[nq,hotpot]"], "got 'hotpot'. Did you mean hotpotqa?"),
        (["sets=[nq,nq]"], "got nq twice"),
        (["sets=[]"], "sets must be all, or a list"),
        (["sets=[nq,popqa]", "questions=ids.jsonl"], "questions=ids.jsonl is a list of one set"),
        (["sets=[nq,popqa]", "questions={nq: 3}"], "it does not name popqa"),
        (["sets=[nq]", "questions={nq: 3, musique: 2}"], "it names musique, which is not played"),
        (["questions=fixed-0"], "questions must be at least 1; got 0"),
        (["questions=true"], "questions must be null (all), a number"),
        (["questions=nowhere.jsonl"], "The list of questions nowhere.jsonl cannot be read"),
        (["shard=2/2"], "shard must be a part and the number of parts"),
        (["shard=0/2", "processes=2"], "is played by one process"),
        (["processes=0"], "processes must be at least 1"),
        (["sets=all", "agent=oracle"], "gold chain"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(
    words: list[str], said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = [] if any(word.startswith("agent=") for word in words) else ["agent=search_once"]
    dry_run = len(said) % 2 == 0  # either is checked before anything else
    assert main(["eval", *words, *agent, f"run_dir={tmp_path / 'run'}", f"dry_run={dry_run}"]) == 1
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_says_what_would_be_played_and_what_is_answered_already(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ("sets=[nq,popqa]", "agent=search_once", f"run_dir={run}")
    evaluate(*words, "dry_run=true")
    assert (
        "Would play 7 episodes: 1 on each of the questions (4 of nq (all), 3 of popqa (test)) with the agent search_once, and write"
        in " ".join(capsys.readouterr().out.split())
    )
    assert not run.exists()
    evaluate(*words)
    evaluate(f"resume={run}", "samples=2", "dry_run=true")
    assert "14 episodes: 2 on each of the questions (4 of nq (all), 3 of popqa (test)), of which 7 are answered already, with" in " ".join(
        capsys.readouterr().out.split()
    )


# -- going on --------------------------------------------------------------------------------------------------------------------------------


def test_a_run_grows_by_resume_and_plays_only_what_is_new(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    evaluate("sets=[nq]", "questions=fixed-2", "agent=search_once", f"run_dir={run}")
    assert main(["eval", "sets=[nq,popqa]", "agent=search_once", f"run_dir={run}"]) == 1
    assert f"another questions and another sets; go on with resume={run}" in capsys.readouterr().err
    evaluate(f"resume={run}", "sets=[nq,popqa]", "questions=null", "samples=2")
    assert "2 of 14 episodes are answered already" in capsys.readouterr().out
    evaluate("sets=[nq,popqa]", "samples=2", "agent=search_once", f"run_dir={whole}")
    assert scores(run) == scores(whole)
    assert lines_of(run) == 14
    evaluate(f"resume={run}", "sets=[popqa]", "questions=1", "samples=1")  # fewer: nothing is played, and nothing lost
    assert [json.loads(line)["id"] for line in scores(run).splitlines()] == ["popqa_0"]
    assert lines_of(run) == 14


def files_of(run: Path) -> dict[str, bytes]:
    """All files of a run but the log and the locks."""
    return {
        str(file.relative_to(run)): file.read_bytes()
        for file in run.rglob("*")
        if file.is_file() and file.suffix not in (".log", ".lock") and file.name != ".lock" and ".hydra" not in file.parts
    }


@pytest.mark.parametrize(
    "words",
    [
        ["questions=typo.jsonl"],
        ["sets=[nq,musique]", "shard=0/2"],  # there are no files of it
    ],
)
def test_a_refused_line_leaves_the_folder_as_it_was(words: list[str], data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    evaluate("sets=[nq]", "questions=2", "agent=search_once", f"env.data_dir={data}", f"run_dir={run}")
    before = files_of(run)
    assert main(["eval", f"resume={run}", *words]) == 1
    assert files_of(run) == before


def test_a_line_that_is_refused_by_the_first_set_leaves_the_configuration_and_the_results(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    evaluate("sets=[nq]", "questions=2", "agent=search_once", f"run_dir={run}")
    before = files_of(run)
    with gzip.open(data / "nq" / "questions.jsonl.gz", "at") as file:  # other data, which only the environment's stamp tells
        file.write(json.dumps({"id": "nq_9", "question": "?", "golden_answers": ["x"]}) + "\n")
    assert main(["eval", f"resume={run}", "questions=3"]) == 1
    assert files_of(run) == before


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        (["env.split=nowhere"], []),
        (["env.max_context_tokens=100"], []),
        (["env.max_context_tokens=100"], ["shard=0/1"]),
        (["agent=lm", "agent.checkpoint=./nowhere"], []),
    ],
)
def test_a_first_line_that_fails_leaves_its_folder_to_the_corrected_one(
    wrong: list[str], part: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    agent = [] if "agent=lm" in wrong else ["agent=baseline/direct", "agent.lm.checkpoint=shipped"]
    assert main(["eval", "sets=[popqa]", *agent, *wrong, *part, f"run_dir={run}"]) == 1
    assert "What was played is kept" not in capsys.readouterr().err
    evaluate("sets=[popqa]", "agent=search_once", "seed=3", f"run_dir={run}")
    assert len(scores(run).splitlines()) == 3
    assert main(["eval", "sets=[popqa]", "agent=search_once", f"run_dir={run}"]) == 1


def test_a_folder_of_another_command_is_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("seed: 5\n")
    assert main(["eval", "env=world", f"run_dir={tmp_path}"]) == 1
    assert "another env and another seed" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == "seed: 5\n"


def test_a_run_that_grows_and_is_stopped_does_not_look_finished(
    data: Path, pages: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    evaluate("sets=[nq]", "questions=2", "agent=search_once", f"run_dir={run}")
    with monkeypatch.context() as stopped:
        stopped.setattr(Journal, "begin", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["eval", f"resume={run}", "samples=2"]) == 130
    for name in ("scores.jsonl", "times.jsonl", "results.parquet", "stamp.json", "summary.json", "report.html", "scores.png"):
        assert not (run / name).exists(), name
    capsys.readouterr()
    assert main(["report", str(run)]) != 0
    assert not (run / "summary.json").exists()
    evaluate(f"resume={run}")
    assert len(scores(run).splitlines()) == 2


def test_files_of_sets_that_are_not_shown_any_more_are_removed(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for words, left in (("sets=[nq,popqa]", ["nq", "popqa"]), ("sets=[popqa]", ["eval"]), ("save=0", [])):
        evaluate(*(["agent=search_once", words, f"run_dir={run}"] if left == ["nq", "popqa"] else [f"resume={run}", words]))
        assert sorted(file.name for file in (run / "trajectories").glob("*")) == [f"{name}.jsonl.gz" for name in left]


def test_searches_are_counted_while_they_are_made_and_told_of_the_sets_that_are_shown(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr("searchqa_agents.eval_run.SECONDS_BETWEEN_COUNTS", 0.0)

    def searches() -> float:
        found: float = json.loads((run / "summary.json").read_text())["search"]["total"]["search/searches"]
        return found

    evaluate("sets=[nq,popqa]", "samples=2", "num_envs=1", "agent=search_once", f"run_dir={run}")
    lines = [json.loads(line) for line in (run / "answers" / "all.jsonl").read_bytes().splitlines()]
    assert [line["set"] for line in lines if "searches" in line] == ["nq"] * 8 + ["popqa"] * 6
    assert searches() == 14
    evaluate(f"resume={run}", "sets=[popqa]")
    assert searches() == 6
    assert "as far as it was counted" not in capsys.readouterr().out
    evaluate(f"resume={run}", "sets=[popqa]", "samples=1")
    assert "These episodes have 3 searches. What searching cost is told as far as it was counted, of 6" in capsys.readouterr().out


def test_judgements_stay_with_a_run_that_grows(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    evaluate("sets=[nq]", "questions=2", "agent=search_once", f"run_dir={run}")
    (run / "judgements.jsonl").write_text('{"set": "nq", "id": "nq_0", "sample": 0, "correct": false}\n')
    evaluate(f"resume={run}", "questions=3")
    assert json.loads((run / "summary.json").read_text())["metrics"]["judge"] == 0.0
    assert b"judge" not in scores(run)


def test_a_finished_run_started_again_writes_the_same_files(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    evaluate("sets=[nq]", "agent=search_once", f"run_dir={run}")
    files = {name: (run / name).read_bytes() for name in ("scores.jsonl", "times.jsonl", "stamp.json", "searches.jsonl")}
    evaluate("sets=[nq]", "agent=search_once", f"run_dir={run}", "threads=1", "save=1", "num_envs=3")
    assert files == {name: (run / name).read_bytes() for name in files}


@pytest.mark.parametrize("change", ["agent=direct", pytest.param("seed=1", marks=pytest.mark.slow), "env.top_k=1"])
def test_another_agent_seed_or_search_is_refused_in_the_folder_and_in_a_journal_that_was_brought_there(
    change: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    words = ["sets=[nq]", "agent=search_once", "questions=2"]
    evaluate(*words, f"run_dir={one}")
    capsys.readouterr()
    assert main(["eval", *words, change, f"run_dir={one}"]) == 1
    key = change.split("=")[0].split(".")[0]
    assert f"holds a run with another {key}" in capsys.readouterr().err
    changed = [word for word in words if not word.startswith(f"{change.split('=')[0]}=")]
    evaluate(*changed, change, f"run_dir={other}")
    shutil.copytree(one / "answers", other / "answers", dirs_exist_ok=True)
    capsys.readouterr()
    assert main(["eval", f"resume={other}", "questions=3"]) == 1
    assert "holds answers on nq that were made with another agent, search engine, corpus or data" in (said := capsys.readouterr().err)
    assert change.split("=")[0].split(".")[-1] in said


def test_other_weights_in_the_same_folder_are_another_agent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from searchqa_agents.loading import shipped_checkpoint

    shutil.copytree(shipped_checkpoint(), tmp_path / "model")
    words = [
        "env=world",
        "env.max_turns=2",
        "agent=lm",
        f"agent.checkpoint={tmp_path / 'model'}",
        "threads=1",
        f"run_dir={tmp_path / 'run'}",
    ]
    evaluate(*words, "questions=2")
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the sign or exponent of the last number
    weights.write_bytes(content)
    capsys.readouterr()
    assert main(["eval", f"resume={tmp_path / 'run'}", "questions=3"]) == 1
    assert "agent.weights_sha256 was" in capsys.readouterr().err


def test_where_a_server_is_and_how_it_is_asked_may_change(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from searchqa_agents.hydra_app import check_config

    agent = {"kind": "server", "url": "http://a", "timeout": 1.0, "temperature": 1.0}
    baseline = {"kind": "baseline", "method": "rag", "lm": agent}
    for before in (agent, baseline):
        (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml({"agent": before}))
        moved = agent | {"url": "http://b", "timeout": 9.0}
        check_config(tmp_path, OmegaConf.create({"agent": moved if before is agent else baseline | {"lm": moved}}))
        hotter = agent | {"temperature": 0.5}
        with pytest.raises(RunFolderError, match="another agent"):
            check_config(tmp_path, OmegaConf.create({"agent": hotter if before is agent else baseline | {"lm": hotter}}))


def test_a_full_disk_stops_the_run_with_the_way_on_and_loses_nothing(plain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # of each file: a write beyond it is cut off, then refused

    process = begun(*LAZY, "save=0", f"run_dir={run}", preexec_fn=limited)
    said = " ".join(process.communicate()[0].split())
    assert process.returncode == 1
    assert f"Make room first. What was played is kept: `searchqa eval resume={run}` goes on." in said
    assert 20 < lines_of(run) < 384
    assert (run / "answers" / "all.jsonl").read_bytes().endswith(b"\n")  # no half line, behind which what searching cost would be appended
    evaluate(f"resume={run}", "save=0")
    assert scores(run) == scores(plain)


def test_a_server_that_is_gone_stops_the_run_with_the_way_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    server = ("agent=server", "agent.url=http://127.0.0.1:9", "agent.retries=0", "agent.deadline=1")
    for processes in (1, 2):
        assert main(["eval", "env=world", "questions=3", *server, f"run_dir={run}", f"processes={processes}"]) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "did not answer" in said
        assert f"No episode has ended yet: `searchqa eval resume={run}` begins again" in said


def test_a_damaged_journal_is_an_error_that_names_the_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    evaluate("sets=[nq]", "agent=search_once", f"run_dir={run}")
    journal = run / "answers" / "all.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    for damage, said in (
        (b'{"row": {"set\n', "not JSON"),
        (b'{"row": 3}\n', "not a line of a journal"),
        (b'{"rows": 3}\n', "not a line of a journal"),
    ):
        journal.write_bytes(lines[0] + lines[1] + damage + lines[3])
        assert main(["eval", f"resume={run}"]) == 1
        assert f"{journal}, line 3: {said}" in capsys.readouterr().err
    journal.write_bytes(lines[0] + lines[1].replace(b'"schema_version": 1', b'"schema_version": 9'))
    assert main(["eval", f"resume={run}"]) == 1
    assert "the scores have schema version 9" in capsys.readouterr().err


# -- locks -----------------------------------------------------------------------------------------------------------------------------------


def test_a_part_is_played_by_one_process_and_a_whole_run_waits_for_none(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["eval", "sets=[nq]", "agent=search_once", f"run_dir={run}"]
    with Journal(run, Part(0, 2)):
        assert running_parts(run) == ["0-of-2"]
        with pytest.raises(RunFolderError, match=r"another process plays part 0/2"):
            Journal(run, Part(0, 2))
        assert main([*words, "shard=0/2"]) == 1
        assert "another process plays part 0/2" in capsys.readouterr().err
        assert main(words) == 1
        assert "other processes play its parts 0-of-2" in capsys.readouterr().err
        assert main([*words, "shard=1/2"]) == 0
    assert not running_parts(run)
    assert main(words) == 0


def test_a_part_needs_the_folder_that_it_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "env=world", "shard=0/2"]) == 1
    assert "Give all of them the same run_dir=" in capsys.readouterr().err


def test_a_part_does_not_begin_beside_a_whole_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from searchqa_agents.eval_run import EvalFolder

    monkeypatch.setattr("searchqa_agents.eval_command.SECONDS_FOR_ANOTHER_PART", 0.3)
    with EvalFolder(tmp_path / "run"):
        assert main(["eval", "sets=[nq]", "agent=search_once", "shard=0/2", f"run_dir={tmp_path / 'run'}"]) == 1
    assert "is in use by another running process" in capsys.readouterr().err


# -- which questions -------------------------------------------------------------------------------------------------------------------------


def source_of(ids: list[str]) -> object:
    return load_custom([{"id": name, "question": "?", "golden_answers": ["a"]} for name in ids])


def test_a_fixed_list_is_the_smallest_hashes_of_set_and_id() -> None:
    # sha256 of "custom/a" begins with 92…, of custom/b, custom/c, custom/d as `printf custom/b | sha256sum` says
    import hashlib

    order = sorted("abcd", key=lambda name: hashlib.sha256(f"custom/{name}".encode()).hexdigest())
    source = source_of(list("abcd"))
    for count in range(1, 4):
        indices, kind = chosen_questions(f"fixed-{count}", source)
        assert (sorted(order[:count]), kind) == (["abcd"[index] for index in indices], "fixed")


@given(st.lists(st.text("abcdefgh", min_size=1), min_size=1, unique=True), st.randoms())
def test_fixed_lists_depend_on_ids_alone_and_contain_each_other(ids: list[str], random: object) -> None:
    shuffled = list(ids)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    chosen: set[str] = set()
    for count in range(1, len(ids) + 2):
        one, other = ({names[index] for index in chosen_questions(f"fixed-{count}", source_of(names))[0]} for names in (ids, shuffled))
        assert one == other
        assert len(one) == min(count, len(ids))
        assert chosen <= one
        chosen = one


def test_choices_of_questions() -> None:
    source = source_of(list("abc"))
    assert chosen_questions(None, source) == ([0, 1, 2], "all")
    assert chosen_questions(2, source) == ([0, 1], "first")
    assert chosen_questions(9, source) == ([0, 1, 2], "all")
    assert chosen_questions("fixed-9", source) == ([0, 1, 2], "all")
    assert choice_of({"nq": 3, "popqa": None}, "popqa", ["nq"]) is None
    with pytest.raises(ConfigurationError, match=r"questions\.nq must be at least 1; got 0"):
        choice_of({"nq": 0}, "nq")


def test_names_of_sets_and_of_parts() -> None:
    assert set_names(None) is None
    assert set_names("all") == PUBLISHED_ORDER
    assert set_names("nq") == ("nq",)
    assert set_names(["popqa", "nq"]) == ("popqa", "nq")
    assert parse_part("1/3") == Part(1, 3)
    assert parse_part(None) is None
    for wrong in ("3/3", "1", "-1/2", "a/b", "/2"):
        with pytest.raises(ConfigurationError, match="shard must be a part"):
            parse_part(wrong)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 4), st.data())
def test_parts_share_all_that_is_missing_between_them(sizes: list[int], samples: int, of: int, data: st.DataObject) -> None:
    plans, place = [], 0
    for number, size in enumerate(sizes):
        plans.append(SetPlan(f"s{number}", EnvSettings(), tuple(range(size)), tuple(f"q{i}" for i in range(size)), "all", place))
        place += size
    everything = [(plan.name, name, sample) for plan in plans for name in plan.ids for sample in range(samples)]
    played = dict.fromkeys(data.draw(st.sets(st.sampled_from(everything))))
    found = [
        (one.plan.name, one.plan.ids[number], sample)
        for part in range(of)
        for one in missing_episodes(plans, samples, played, Part(part, of))
        for number, sample in one.episodes
    ]
    assert sorted(found) == sorted(set(everything) - set(played))


def test_what_a_journal_kept_is_read_back_with_any_text(tmp_path: Path) -> None:
    row = {"schema_version": 1, "set": "nq", "id": "q \ud800\u2028", "sample": 0, "answer": "\udcff"}
    with Journal(tmp_path, Part()) as journal:
        journal.begin("popqa", {"seed": 0})  # nothing is played with it
        journal.begin("nq", {"seed": 0, "path": tmp_path})
        journal.add(row, {"set": "nq", "id": "q \ud800\u2028", "sample": 0, "seconds": {"model": 0.5}})
        journal.add_searches("nq", {"search/searches": 2.0})
        journal.add_searches("nq", {"search/searches": 0.0})
    answers = read_answers(tmp_path)
    assert list(answers.rows.values()) == [row]
    assert answers.stamps == {"nq": [{"seed": 0, "path": str(tmp_path)}]}
    assert answers.searches == [("nq", {"search/searches": 2.0})]
    keys = read_answers(tmp_path, whole=False)
    assert list(keys.rows) == list(answers.rows)
    assert not any(keys.rows.values())
    assert not any(keys.times.values())
    assert keys.stamps == answers.stamps


def test_a_line_that_is_interrupted_is_taken_back(tmp_path: Path) -> None:
    class Interrupted(io.FileIO):
        def write(self, content: object) -> int:
            super().write(bytes(content)[:9])  # type: ignore[call-overload]
            raise KeyboardInterrupt

    with Journal(tmp_path, Part()) as journal:
        journal.begin("nq", {})
        whole = journal._answers
        journal._answers = Interrupted(tmp_path / "answers" / "all.jsonl", "a+")
        with pytest.raises(KeyboardInterrupt):
            journal.begin("popqa", {})
        journal._answers.close()
        journal._answers = whole
        journal.add_searches("nq", {"search/searches": 1.0})  # as at the end of what was interrupted
    assert (tmp_path / "answers" / "all.jsonl").read_bytes().count(b"\n") == 2
    assert read_answers(tmp_path).searches == [("nq", {"search/searches": 1.0})]


def test_a_server_that_does_not_say_what_it_searches_may_move_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def stamp(url: str, server: object = None, name: str = "http") -> dict[str, object]:
        return {"retriever": {"retriever": "cached", "inner": [{"retriever": name, "url": url, "server": server}]}}

    check_stamp(Path("run"), "nq", [stamp("a")], stamp("a"))
    check_stamp(Path("run"), "nq", [stamp("a", {"k1": 1})], stamp("b", {"k1": 1}))
    assert not caplog.records
    check_stamp(Path("run"), "nq", [stamp("a")], stamp("b"))
    assert "the search server b, before a; it does not say what it searches" in caplog.text
    with pytest.raises(OtherSearchError, match="k1 was 1, is 2"):
        check_stamp(Path("run"), "nq", [stamp("a", {"k1": 1})], stamp("b", {"k1": 2}))
    with pytest.raises(OtherSearchError, match="url was 'a', is 'b'"):
        check_stamp(Path("run"), "nq", [stamp("a", name="mine")], stamp("b", name="mine"))
