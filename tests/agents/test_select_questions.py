"""Data selection: what is counted, that it goes on after a kill, and which questions are kept."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import gymnasium as gym
import pytest
from hypothesis import given
from hypothesis import strategies as st

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents import select_questions
from searchqa_agents.cli import main
from searchqa_agents.lost_back_end import LostBackEndError
from searchqa_agents.scripted import ScriptedAgent
from searchqa_agents.select_command import read_rounds
from searchqa_agents.select_questions import (
    METRICS,
    Count,
    Counts,
    DifficultyRule,
    Quota,
    check_sets,
    count_table,
    difficulty_rows,
    parse_keep,
    play_until_right,
    select,
)
from searchqa_envs.errors import ConfigurationError
from searchqa_retrievers import RetrieverUnavailable

QUICK = DifficultyRule(attempts=6, medium_from=2, hard_from=4)
PUBLISHED = DifficultyRule()


def world(num_envs=4, **arguments):
    return gym.make_vec("SearchQA-World-v0", num_envs=num_envs, autoreset_mode="DISABLED", num_worlds=1, **arguments)


class RightAt:
    """A script that is right at a given attempt on each question, and counts how often it was asked."""

    def __init__(self, needed, search=False):
        self.needed, self.search, self.played = needed, search, Counter()

    def __call__(self, task):
        self.played[task.question.id] += 1
        right = self.played[task.question.id] == self.needed[task.question.id]
        if self.search:
            yield task.search(task.question.id)
        yield task.answer(task.question.golden_answers[0] if right else "surely not")


def gambler(task):
    """Right one time in three, by the episode's own randomness."""
    yield task.answer(task.question.golden_answers[0] if task.rng.random() < 1 / 3 else "surely not")


def ids_of(venv, count):
    return [venv.unwrapped.source[index].id for index in range(count)]


def test_a_question_is_played_until_it_is_right_and_graded_by_the_published_rule():
    venv = world()
    ids = ids_of(venv, 7)
    script = RightAt(dict(zip(ids, [1, 9, 10, 20, 21, 3, 99], strict=True)))
    counts = Counts(PUBLISHED)
    play_until_right(venv, ScriptedAgent.for_env(script, venv), range(7), counts, per_round=3)
    rows = difficulty_rows(venv.unwrapped.source, range(7), counts)
    assert [row["id"] for row in rows] == ids
    assert [(row["attempts"], row["right"]) for row in rows] == [
        (1, True), (9, True), (10, True), (20, True), (20, False), (3, True), (20, False),
    ]  # fmt: skip
    assert [row["difficulty"] for row in rows] == ["easy", "easy", "medium", "medium", "hard", "easy", "hard"]
    assert [script.played[question_id] for question_id in ids] == [1, 9, 10, 20, 20, 3, 20]
    assert {row["set"] for row in rows} == {"world"}
    assert all(row["type"] for row in rows)


@pytest.mark.parametrize(("attempts", "difficulty"), [(1, "easy"), (9, "easy"), (10, "medium"), (20, "medium"), (21, "hard"), (30, "hard")])
def test_the_number_of_attempts_decides_by_the_thresholds(attempts, difficulty):
    rule = DifficultyRule(attempts=30)
    assert rule.difficulty(Count(attempts, True)) == difficulty
    assert rule.difficulty(Count(30, False)) == "hard"
    assert rule.difficulty(Count(attempts=0, right=False, lost=3)) == "unknown"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attempts": 19}, "attempts must be at least hard_from - 1 = 20"),
        ({"medium_from": 0}, "medium_from must be at least 1"),
        ({"medium_from": 21}, "below hard_from"),
        ({"metric": "emm"}, r"metric must be one of \['em', .*; got 'emm'\. Did you mean em\?"),
    ],
)
def test_a_rule_that_cannot_tell_difficulties_apart_is_refused(settings, said):
    with pytest.raises(ConfigurationError, match=said):
        DifficultyRule(**settings)


@pytest.mark.parametrize(("num_envs", "per_round"), [(1, 1), (4, 5), (3, 100)])
def test_what_a_question_counts_depends_on_nothing_but_the_seed(num_envs, per_round):
    def counted(num_envs, per_round, questions, seed=3):
        venv = world(num_envs)
        counts = Counts(PUBLISHED)
        play_until_right(venv, ScriptedAgent.for_env(gambler, venv), questions, counts, per_round=per_round, seed=seed)
        return counts.by_id

    whole = counted(8, 8, range(12))
    assert counted(num_envs, per_round, range(12)) == whole
    assert len({count.attempts for count in whole.values()}) > 2
    alone = counted(num_envs, per_round, [5])
    assert alone.items() <= whole.items()
    assert counted(8, 8, range(12), seed=4) != whole


def test_a_metric_and_its_threshold_say_what_is_right():
    venv = world()
    agent = ScriptedAgent.for_env(lambda task: iter([task.answer(f"perhaps {task.question.golden_answers[0]}")]), venv)
    found = {}
    for metric, right_at in (("em", 1.0), ("cover_em", 1.0), ("f1", 0.5), ("reward", 0.0)):
        counts = Counts(DifficultyRule(2, 1, 3, metric, right_at))
        play_until_right(venv, agent, [0], counts)
        found[metric] = counts.by_id[ids_of(venv, 1)[0]]
    assert found == {"em": Count(2, False), "cover_em": Count(1, True), "f1": Count(1, True), "reward": Count(1, True)}
    with pytest.raises(ConfigurationError, match=r"metric must be one of \['em', .* got 'elegance'"):
        play_until_right(venv, agent, [0], Counts(DifficultyRule(metric="elegance")))


class Flaky:
    """A retriever that fails the first so many times that it is asked each of some queries."""

    name = "flaky"

    def __init__(self, fails):
        self.left = Counter(fails)

    def search(self, requests):
        if any(self.left[request.query] > 0 for request in requests):
            self.left.subtract(request.query for request in requests)
            raise RetrieverUnavailable("gone for a moment")
        return [[] for _ in requests]

    def cache_key(self, request):
        return request.query, request.top_k

    def __deepcopy__(self, memo):
        return self


def test_an_attempt_that_lost_its_back_end_is_no_attempt():
    def played(fails, num_envs=1):
        venv = world(num_envs, retriever=Flaky(fails))
        ids = ids_of(venv, 4)
        script = RightAt(dict(zip(ids, [1, 2, 3, 9], strict=True)), search=True)
        first, counts, rounds = dict(script.needed), Counts(QUICK), []
        # a lost attempt is one that the script, other than a policy with its seed, has to be told about
        for question_id, times in fails.items():
            script.played[question_id] -= times
        play_until_right(
            venv, ScriptedAgent.for_env(script, venv), range(4), counts, on_round=lambda outcomes, done: rounds.append(outcomes)
        )
        assert first == script.needed
        return ids, counts.by_id, rounds

    ids, expected, _ = played({})
    _, counts, rounds = played({ids[1]: 2})
    assert counts == expected
    assert [outcomes[ids[1]] for outcomes in rounds if ids[1] in outcomes] == ["lost", "lost", "wrong", "right"]


def test_a_question_that_is_always_lost_while_others_are_answered_is_of_unknown_difficulty_and_never_kept():
    venv = world(1)
    ids = ids_of(venv, 3)
    venv = world(1, retriever=Flaky({ids[0]: 10**6}))
    script = RightAt(dict.fromkeys(ids, 5), search=True)
    counts = Counts(QUICK)
    play_until_right(venv, ScriptedAgent.for_env(script, venv), range(3), counts)
    rows = difficulty_rows(venv.unwrapped.source, range(3), counts)
    assert [row["difficulty"] for row in rows] == ["unknown", "hard", "hard"]
    assert script.played[ids[0]] == 3
    assert [row["id"] for row in select(rows, parse_keep({"easy": None, "medium": None, "hard": None}))] == ids[1:]
    assert ["world", "unknown", "1", "none", "0"] in count_table(rows, [], parse_keep(None))[1]


def test_a_question_that_was_always_lost_is_tried_again_when_the_selection_goes_on():
    venv = world(1)
    ids = ids_of(venv, 2)
    counts = Counts(QUICK, [{ids[0]: "wrong", ids[1]: "right"}, *[{ids[0]: "lost"}] * 3])
    assert counts.finished(ids[0])
    counts.forget_lost()
    assert counts[ids[0]] == Count(1, False)
    play_until_right(venv, ScriptedAgent.for_env(RightAt(dict.fromkeys(ids, 1)), venv), range(2), counts)
    assert (counts[ids[0]], counts[ids[1]]) == (Count(2, True), Count(1, True))


def test_the_metrics_that_can_decide_are_those_that_episodes_have():
    venv = world(1)
    agent = ScriptedAgent.for_env(RightAt(dict.fromkeys(ids_of(venv, 1), 1)), venv)
    (played,) = select_questions.rollout(venv, agent, [0])
    known = [name for name in METRICS if not name.startswith("title_recall")]
    assert [name for name in METRICS if name in played.metrics] in (known, list(METRICS))
    assert set(played.metrics) <= set(METRICS)


def test_a_back_end_that_is_gone_ends_it_after_some_rounds_of_which_none_counts():
    venv = world(2)
    ids = ids_of(venv, 3)
    venv = world(2, retriever=Flaky(dict.fromkeys(ids, 10**6)))
    agent = ScriptedAgent.for_env(RightAt(dict.fromkeys(ids, 1), search=True), venv)
    counts, rounds = Counts(QUICK), []
    with pytest.raises(LostBackEndError, match="3 rollouts in a row"):
        play_until_right(venv, agent, range(3), counts, on_round=lambda outcomes, done: rounds.append(outcomes))
    assert (rounds, counts.by_id) == ([], {})


def test_finished_questions_are_not_played_again_and_the_rest_goes_on_where_it_was():
    rounds = []
    venv = world()

    def keep_round(outcomes, done):
        rounds.append((dict(outcomes), done))

    whole = Counts(PUBLISHED)
    play_until_right(venv, ScriptedAgent.for_env(gambler, venv), range(10), whole, per_round=4, on_round=keep_round)
    assert rounds[-1][1] == 10
    for cut in (1, len(rounds) // 2, len(rounds)):
        later = []
        counts = Counts(PUBLISHED, [outcomes for outcomes, _ in rounds[:cut]])
        agent = ScriptedAgent.for_env(gambler, venv)
        play_until_right(venv, agent, range(10), counts, per_round=4, on_round=lambda outcomes, done, to=later: to.append((outcomes, done)))
        assert later == rounds[cut:]
        assert counts.by_id == whole.by_id


# -- which to keep -----------------------------------------------------------------------------------------------------------------------


def rows_of(*counted):
    """Rows of sets and difficulties: ("hotpotqa", "easy", 3), ..."""
    return [{"id": f"{name}-{level}-{i}", "set": name, "difficulty": level} for name, level, count in counted for i in range(count)]


ROWS = rows_of(("hotpotqa", "easy", 9), ("hotpotqa", "medium", 40), ("hotpotqa", "hard", 30), ("2wiki", "medium", 20), ("2wiki", "hard", 5))


def test_by_default_every_medium_and_hard_question_is_kept_in_order():
    assert select(ROWS, parse_keep(None)) == [row for row in ROWS if row["difficulty"] != "easy"]


def test_quotas_by_set_compose_a_stage_and_a_set_with_too_few_gives_what_it_has():
    quotas = parse_keep({"hotpotqa": {"medium": 13, "hard": 4}, "2wiki": {"hard": 50, "medium": 0}})
    kept = select(ROWS, quotas)
    assert Counter((row["set"], row["difficulty"]) for row in kept) == {
        ("hotpotqa", "medium"): 13, ("hotpotqa", "hard"): 4, ("2wiki", "hard"): 5,
    }  # fmt: skip
    columns, table = count_table(ROWS, kept, quotas)
    assert columns == ["set", "difficulty", "questions", "asked for", "kept"]
    assert ["2wiki", "hard", "5", "50", "5"] in table
    assert ["hotpotqa", "easy", "9", "none", "0"] in table


def test_without_sets_a_quota_is_of_all_sets_together():
    kept = select(ROWS, parse_keep({"medium": 30}))
    assert len(kept) == 30
    assert {row["set"] for row in kept} == {"hotpotqa", "2wiki"}


@given(seed=st.integers(0, 2**31), small=st.integers(0, 40), more=st.integers(0, 40))
def test_which_are_kept_is_a_function_of_the_seed_and_a_smaller_quota_keeps_some_of_the_same(seed, small, more):
    few = select(ROWS, [Quota("hotpotqa", "medium", small)], seed)
    many = select(ROWS, [Quota("hotpotqa", "medium", small + more)], seed)
    assert few == select(ROWS, [Quota("hotpotqa", "medium", small)], seed)
    assert len(few) == small
    assert len(many) == min(40, small + more)
    assert {row["id"] for row in few} <= {row["id"] for row in many}
    assert [ROWS.index(row) for row in few] == sorted(ROWS.index(row) for row in few)


def test_another_seed_keeps_others():
    assert len({tuple(row["id"] for row in select(ROWS, parse_keep({"medium": 5}), seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    "keep",
    [
        {},
        [],
        "medium",
        {"middling": 3},
        {"medium": -1},
        {"medium": 1.5},
        {"medium": True},
        {"hotpotqa": {"medium": 1}, "hard": 2},
        {"hotpotqa": {}},
    ],
)
def test_a_keep_that_says_nothing_clear_is_refused(keep):
    with pytest.raises(ConfigurationError, match="keep must give"):
        parse_keep(keep)


def test_a_quota_of_a_set_that_there_is_not_is_refused_before_anything_is_played():
    source = world().unwrapped.source
    check_sets(parse_keep({"world": {"hard": 1}}), source, range(3))
    with pytest.raises(ConfigurationError, match=r"keep names \['wrld'\]; the sets of these questions are \['world'\]"):
        check_sets(parse_keep({"wrld": {"hard": 1}}), source, range(3))


# -- the command -------------------------------------------------------------------------------------------------------------------------

LINE = [
    "agent=oracle", "agent.kind=lazy_oracle", "env.num_worlds=2", "questions=60", "per_round=8", "threads=1",
    "medium_from=2", "hard_from=4", "attempts=3",
]  # fmt: skip
RESULTS = ("attempts.jsonl", "difficulty.jsonl", "selected.jsonl", "selection.json")


def bytes_of(folder):
    return {name: (folder / name).read_bytes() for name in RESULTS}


def run(*words):
    return main(["data", "select", *map(str, words)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(*LINE, f"run_dir={folder}") == 0
    return folder


def test_the_command_writes_a_row_for_each_question_and_the_selected_ones(finished, capsys):
    rows = [json.loads(line) for line in (finished / "difficulty.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"easy-train-0-{i // 48}-{i % 48}" for i in range(60)]
    selected = [json.loads(line) for line in (finished / "selected.jsonl").read_text().splitlines()]
    assert selected == [row for row in rows if row["difficulty"] in ("medium", "hard")]
    assert {row["difficulty"] for row in rows} == {"easy", "medium", "hard"}
    stamp = json.loads((finished / "stamp.json").read_text())
    assert stamp["rule"] == {"attempts": 3, "medium_from": 2, "hard_from": 4, "metric": "em", "right_at": 1.0}
    assert (stamp["agent"]["kind"], stamp["dataset"], stamp["split"]) == ("lazy_oracle", "world", "train")


def test_a_killed_selection_goes_on_to_the_same_bytes(finished, tmp_path):
    """kill -9 in the middle, and a half-written line besides."""
    folder = tmp_path / "run"
    code = (
        "import time, sys, searchqa_agents.select_questions as s; real = s.rollout\n"
        "def slow(*a, **k): time.sleep(0.2); return real(*a, **k)\n"
        "s.rollout = slow; from searchqa_agents.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "data", "select", *LINE, f"run_dir={folder}"], stdout=log, stderr=log, start_new_session=True
        )
        attempts = folder / "attempts.jsonl"
        for _ in range(600):
            if attempts.is_file() and attempts.read_bytes().count(b"\n") >= 3:
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    before = attempts.read_bytes()
    assert 3 <= before.count(b"\n") < (finished / "attempts.jsonl").read_bytes().count(b"\n")
    assert not (folder / "selected.jsonl").exists()
    with attempts.open("ab") as file:
        file.write(b'{"easy-train-0-0-1": "ri')
    assert run(f"resume={folder}") == 0
    assert attempts.read_bytes().startswith(before)
    assert bytes_of(folder) == bytes_of(finished)


def test_with_another_keep_a_finished_folder_only_selects_anew(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert run(*LINE, f"run_dir={folder}") == 0
    monkeypatch.setattr("searchqa_agents.loading.build_agent", None)  # nothing is loaded or played
    assert run(f"resume={folder}", "keep={world: {easy: 2, hard: 1}}", "hard_from=3") == 0
    selected = [json.loads(line) for line in (folder / "selected.jsonl").read_text().splitlines()]
    assert sorted(row["difficulty"] for row in selected) == ["easy", "easy", "hard"]
    assert (folder / "attempts.jsonl").read_bytes() == (finished / "attempts.jsonl").read_bytes()


def test_a_finished_folder_goes_on_with_more_questions_and_plays_only_those(tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    assert run(*LINE, "questions=20", f"run_dir={folder}") == 0
    before = (folder / "attempts.jsonl").read_bytes()
    assert run(f"resume={folder}", "questions=30") == 0
    assert run(*LINE, "questions=30", f"run_dir={whole}") == 0
    assert (folder / "attempts.jsonl").read_bytes().startswith(before)
    for name in ("difficulty.jsonl", "selected.jsonl", "selection.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["attempts=5"], "attempts was 3, is 5"),
        (["metric=f1"], "metric was em, is f1"),
        (["seed=1"], "another seed"),
        (["env.top_k=2"], "another env"),
    ],
)
def test_a_folder_of_other_attempts_is_refused(finished, words, said, capsys):
    before = bytes_of(finished)
    assert run(*LINE, f"run_dir={finished}", *words) == 1
    assert said in capsys.readouterr().err
    assert bytes_of(finished) == before


def test_other_data_behind_the_same_words_is_refused(finished, tmp_path, capsys):
    stamp = finished / "stamp.json"
    kept = stamp.read_text()
    try:
        stamp.write_text(kept.replace(json.loads(kept)["corpus_sha256"], "0" * 64))
        assert run(f"resume={finished}") == 1
        assert "cannot go on with other data" in capsys.readouterr().err
    finally:
        stamp.write_text(kept)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["agent=lm", "agent.temperature=0"], "agent.temperature must be above 0"),
        (["questions=0"], "questions must be at least 1"),
        (["keep={middling: 3}"], "keep must give"),
        (["metric=emm"], "metric must be one of"),
        (["attempts=3"], "attempts must be at least"),
        (["agent=oracle", "env=hotpotqa"], "gold chain"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("dry_run=true", *words) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_names_files_groups_and_keys(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("selected.jsonl", "agent=direct|lm", "env=2wikimultihopqa", "medium_from=10", "hard_from=21"))
    assert main(["data", "--help"]) == 0
    assert "select" in capsys.readouterr().out


def test_merged_sets_have_quotas_of_their_own(tmp_path):
    """As the published stages are composed: one list of several sets, whose ids are those of the merged set."""
    for name in ("hotpotqa", "2wiki"):
        lines = [{"id": str(i), "question": f"what is {name} {i}?", "golden_answers": ["x"]} for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = [f"{name}={tmp_path / name}.jsonl" for name in ("hotpotqa", "2wiki")]
    assert main(["data", "merge", *parts, "--no-corpus", "--out", str(tmp_path / "merged")]) == 0
    (tmp_path / "corpus.jsonl").write_text('{"id": "1", "title": "T", "text": "t"}\n')
    words = ["env=custom", f"env.questions={tmp_path}/merged/questions.jsonl.gz", f"env.corpus={tmp_path}/corpus.jsonl", "agent=direct"]
    keep = "keep={hotpotqa: {hard: 2}, 2wiki: {hard: null}}"
    assert run(*words, keep, "attempts=1", "medium_from=1", "hard_from=2", "questions=null", f"run_dir={tmp_path}/run", "threads=1") == 0
    selected = [json.loads(line) for line in (tmp_path / "run" / "selected.jsonl").read_text().splitlines()]
    assert Counter(row["set"] for row in selected) == {"hotpotqa": 2, "2wiki": 9}
    assert all(row["id"] == f"{row['set']}/{row['id'].partition('/')[2]}" for row in selected)
    assert sum(len(outcomes) for outcomes in read_rounds(tmp_path / "run" / "attempts.jsonl")) == 18


@pytest.mark.data
def test_real_questions_are_graded(tmp_path):
    words = [
        "env=hotpotqa",
        "env.split=all",
        "agent=search_once",
        "questions=40",
        "attempts=1",
        "medium_from=1",
        "hard_from=2",
        "threads=1",
    ]
    assert run(*words, "metric=cover_em", f"run_dir={tmp_path}/run", "keep={hotpotqa: {hard: 10}}") == 0
    selected = [json.loads(line) for line in (tmp_path / "run" / "selected.jsonl").read_text().splitlines()]
    assert len(selected) == 10
    assert {row["difficulty"] for row in selected} == {"hard"}


def test_a_baseline_is_played_too_and_a_greedy_one_refused(tmp_path, capsys):
    line = [word for word in LINE if not word.startswith(("agent", "questions="))] + [
        "agent=baseline/direct",
        "questions=2",
        f"run_dir={tmp_path}/run",
    ]
    assert run(*line) == 1
    assert "greedy" in capsys.readouterr().err
    assert run(*line, "agent.lm.temperature=1", "agent.options.max_tokens=4") == 0
    assert len((tmp_path / "run" / "difficulty.jsonl").read_text().splitlines()) == 2
