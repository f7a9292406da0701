"""Stages in one run: what each is made of, when it ends, and that a run which is stopped anywhere goes on to the same bytes."""

import gzip
import json
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from searchqa_agents.algorithm import AlgorithmConfig
from searchqa_agents.cli import main
from searchqa_agents.question_lists import epoch_questions, extra_questions, indices_of, read_question_ids
from searchqa_agents.runs import RunFolder, list_checkpoints, read_metrics
from searchqa_agents.settings import WorldSettings, structured
from searchqa_agents.stages import SearchRate, stages_of
from searchqa_envs.errors import ConfigurationError

# -- lists of questions --------------------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 40), count=st.integers(1, 25), seed=st.integers(0, 9), epochs=st.integers(1, 4))
def test_every_question_comes_once_an_epoch_and_each_epoch_in_a_new_order(size, count, seed, epochs):
    questions = [100 + i for i in range(size)]
    steps = -(-epochs * size // count)
    drawn = [question for step in range(steps) for question in epoch_questions(questions, count, seed=seed, step=step)]
    orders = [tuple(drawn[start : start + size]) for start in range(0, epochs * size, size)]
    assert all(sorted(order) == questions for order in orders)
    if size > 12:  # by chance alone two orders of 13 are never equal
        assert len(set(orders)) == epochs


@given(size=st.integers(1, 40), count=st.integers(1, 25), step=st.integers(0, 50))
def test_the_questions_of_a_step_depend_on_seed_and_step_alone(size, count, step):
    questions = list(range(size))
    assert epoch_questions(questions, count, seed=1, step=step) == epoch_questions(questions, count, seed=1, step=step)
    if size > 12 and count > 6:
        assert epoch_questions(questions, count, seed=1, step=step) != epoch_questions(questions, count, seed=2, step=step)
    extra = extra_questions(questions, count, seed=step)
    assert set(extra) <= set(questions)
    assert len(set(extra)) == count or count > size


def test_ids_are_read_from_plain_and_packed_files(tmp_path):
    rows = [{"id": "b", "question": "?"}, {"id": "a"}]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (tmp_path / "q.jsonl").write_text(text)
    with gzip.open(tmp_path / "q.jsonl.gz", "wt") as file:
        file.write(text)
    assert read_question_ids(tmp_path / "q.jsonl") == read_question_ids(tmp_path / "q.jsonl.gz") == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no rows"),
        ('{"id": "a"}\n{"question": "?"}\n', "line 2: a row of a list of questions needs a text 'id'"),
        ('{"id": 3}\n', "needs a text 'id'"),
        ('{"id": "a"}\n{"id": "b"}\n{"id": "a"}\n', "line 3: the question 'a' is in line 1 already"),
        ("not json\n", "cannot be read"),
        ('{"id": "a"}\n{"id": "a"}\n', r"^[^:]*line 2: the question 'a' is in line 1 already; remove one of them\.$"),
        (None, "cannot be read"),
    ],
)
def test_a_list_that_is_none_is_an_error_with_its_reason(text, said, tmp_path):
    file = tmp_path / "q.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        read_question_ids(file)


@pytest.mark.parametrize(
    "damage", [lambda packed: packed[:-20], lambda packed: packed[:12] + b"\xff" * 20 + packed[32:]], ids=["cut", "damaged"]
)
def test_a_packed_list_that_is_cut_off_or_damaged_is_an_error_with_its_file(damage, tmp_path):
    file = tmp_path / "q.jsonl.gz"
    file.write_bytes(damage(gzip.compress("".join(json.dumps({"id": f"question {i * i}"}) + "\n" for i in range(200)).encode())))
    with pytest.raises(ConfigurationError, match=r"q\.jsonl\.gz cannot be read"):
        read_question_ids(file)


def test_a_list_that_is_no_path_is_refused():
    with pytest.raises(ConfigurationError, match="must be the path of a jsonl file, or null; got 5"):
        stages_of(settings([{"name": "a", "questions": 5}]))


@pytest.mark.parametrize(
    ("size", "count", "steps"),
    [(350, 64, 5), (350, 15, 23), (8148, 64, 127), (8148, 65, 125), (169_615, 512, 331)],
    ids=["R1-Searcher, stage 1", "the same of Llama", "stage 2", "the same of Llama", "Search-R1"],
)
def test_the_published_numbers_of_steps_go_once_through_the_questions(size, count, steps):
    """No question twice, and what is left out is less than a rollout, which one more step takes."""
    seen = [question for step in range(steps) for question in epoch_questions(range(size), count, seed=0, step=step)]
    assert len(set(seen)) == len(seen) > size - count
    assert set(seen) | set(epoch_questions(range(size), count, seed=0, step=steps)) == set(range(size))


def test_the_first_question_that_is_not_there_is_named():
    from searchqa_envs.world.source import WorldSource

    source = WorldSource(num_worlds=2)
    known = source[3].id
    assert indices_of([known], source, "q.jsonl") == [3]
    with pytest.raises(ConfigurationError, match=r"q.jsonl asks for the question 'nobody', which world"):
        indices_of([known, "nobody", "nothing"], source, "q.jsonl")


# -- settings ------------------------------------------------------------------------------------------------------------------------------


def settings(stages, algorithm="grpo", questions=None, **algo):
    from types import SimpleNamespace

    from searchqa_agents.algorithm import get_algorithm

    config_class = structured(get_algorithm(algorithm).config, name=algorithm)
    return SimpleNamespace(
        algo=config_class(**algo), env=WorldSettings("SearchQA-World-v0", top_k=2, reward="em"), questions=questions, stages=stages
    )


def test_without_stages_a_run_is_one_stage():
    [stage] = stages_of(settings(None, steps=7))
    assert (stage.name, stage.algorithm, stage.config.steps, stage.last, stage.measured) == ("", "grpo", 7, True, "after")


def test_a_stage_is_the_run_with_its_changes():
    one, two = stages_of(
        settings(
            [
                {"name": "one", "env": {"reward": "f1"}, "algo": {"learning_rate": "1e-3"}, "until": {"search_rate": 0.9, "over": 3}},
                {"name": "two", "algo": {"name": "ppo", "clip_coef": 0.3}},
            ],
            group_size=5,
            steps=9,
        )
    )
    assert (one.env.reward, one.env.top_k, two.env.reward) == ("f1", 2, "em")
    assert (one.config.learning_rate, one.config.steps, one.search_rate, one.over) == (1e-3, 9, 0.9, 3)
    assert (two.algorithm, two.config.group_size, two.config.clip_coef, two.config.steps) == ("ppo", 5, 0.3, 9)
    assert two.config.learning_rate == AlgorithmConfig.learning_rate  # of the run, not of the stage before
    assert (one.config.seed, one.measured, two.measured) == (0, "after one", "after")
    assert two.config.seed != one.config.seed  # other questions and samples than in the stage before


def test_the_rules_give_the_most_steps_that_a_stage_has(tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(f'{{"id": "{i}"}}\n' for i in range(20)))
    questions = str(tmp_path / "q.jsonl")
    rows = [
        {"name": "steps", "until": {"steps": 4}},
        {"name": "epochs", "until": {"epochs": 1.5}},
        {"name": "all", "questions": None, "until": {"steps": 3}},
        {"name": "rest"},
    ]
    stages = stages_of(settings(rows, questions=questions, questions_per_step=8, steps=11))
    assert [stage.config.steps for stage in stages] == [4, 4, 3, 11]  # 1.5 * 20 / 8 rounded up
    assert [len(stage.ids) for stage in stages] == [20, 20, 0, 20]


LAST = {"name": "b"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("two", "stages must be a list"),
        ([], "stages must be a list"),
        ([{"name": "a"}, LAST], r"stages.0.until says when"),
        ([{"name": "b", "until": {"steps": 1}}, LAST], "a name of its own"),
        ([{"name": "a b"}], "letters, digits"),
        ([{"nam": "a"}], "got 'nam'"),
        ([{"name": "a", "env": {"topk": 1}}], "stages.0.env.topk is not an argument"),
        ([{"name": "a", "env": {"tokenizer": "byte"}}], "one tokenizer"),
        ([{"name": "a", "algo": {"learning_rat": 1}}], "Did you mean learning_rate"),
        ([{"name": "a", "algo": {"learning_rate": "fast"}}], "stages.0.algo: Value 'fast'"),
        ([{"name": "a", "algo": {"name": "grppo"}}], "must be one of"),
        ([{"name": "a", "algo": {"steps": 0}}], "steps must be at least 1"),
        ([{"name": "a", "until": {"steps": 1, "epochs": 2}}], "{steps: N}, {epochs: X}"),
        ([{"name": "a", "until": {"steps": 0}}], "until.steps must be a whole number"),
        ([{"name": "a", "until": {"steps": True}}], "until.steps must be a whole number"),
        ([{"name": "a", "until": {"epochs": 2}}], "give questions=FILE"),
        ([{"name": "a", "algo": {"name": "sft"}, "until": {"epochs": 2}}], "give algo.epochs, and no until"),
        ([{"name": "a", "algo": {"learning_rate": -1}}], "learning_rate must be a number of at least 0; got -1"),
        ([{"name": "a", "until": {"search_rate": 1.2, "over": 3}}], "a share above 0, at most 1"),
        ([{"name": "a", "until": {"search_rate": 0.9}}], "over: N"),
        ([{"name": "a", "algo": {"name": "sft"}, "until": {"search_rate": 0.9, "over": 1}}], "plays episodes"),
        ([{"name": "a", "algo": {"name": "sft"}, "questions": "q.jsonl"}], "has demonstrations"),
    ],
)
def test_stages_that_cannot_be_are_refused_with_the_way_out(rows, said):
    with pytest.raises(ConfigurationError, match=said):
        stages_of(settings(rows))


def test_the_search_rate_is_a_mean_over_the_last_rollouts_that_had_one():
    rate = SearchRate(0.9, 2)
    seen = []
    for value in (1.0, 0.7, None, 1.0, 0.8, 1.0):
        rate.add({} if value is None else {"charts/search_rate": value})
        seen.append((rate.mean if rate.mean is None else round(rate.mean, 3), rate.reached))
    assert seen == [(None, False), (0.85, False), (0.85, False), (0.85, False), (0.9, True), (0.9, True)]


# -- runs ----------------------------------------------------------------------------------------------------------------------------------

SMOKE = (
    *("train", "recipe=smoke", "threads=1", "env.num_worlds=8", "start=shipped", "env.max_turns=3", "env.max_segment_tokens=16"),
    *("algo.questions_per_step=3", "algo.group_size=3", "algo.num_worlds=2", "evaluation.questions=4", "algo.steps=2"),
)
STAGES = (
    "stages=[{name: seek, env: {reward: r1_searcher_stage1}, algo: {steps: 4}, until: {search_rate: 0.5, over: 2}},"
    "{name: answer, algo: {name: ppo, kl_coef: 0.01, critic: shared}}]"
)
"""The shipped policy always searches: the first stage ends after the second rollout, as soon as it can."""


def lines_of(run):
    """All lines, times apart."""
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "search/")) and k != "seconds"} for line in read_metrics(run)]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main([*SMOKE, STAGES, f"run_dir={run}"]) == 0
    return run


def test_a_run_switches_once_the_policy_searches_and_says_so_everywhere(whole_run):
    lines = lines_of(whole_run)
    phases = [(line["phase"], line["step"], line.get("charts/stage"), line.get("stage")) for line in lines]
    assert phases == [
        ("before", 0, None, None),
        ("train", 1, 1, "seek"),
        ("train", 2, 1, "seek"),
        ("after-seek", 0, None, None),
        ("train", 3, 2, "answer"),
        ("train", 4, 2, "answer"),
        ("after", 0, None, None),
    ]
    trained = [line for line in lines if line["phase"] == "train"]
    assert [line["charts/learning_rate"] == trained[0]["charts/learning_rate"] for line in trained] == [True, False, True, False]
    summary = json.loads((whole_run / "summary.json").read_text())
    seek, answer = summary["stages"]
    assert (seek["name"], seek["first_step"], seek["last_step"], seek["reached"]) == ("seek", 1, 2, True)
    assert "over the last 2 rollouts, at least 0.5" in seek["reason"]
    assert (answer["name"], answer["algorithm"], answer["first_step"], answer["last_step"]) == ("answer", "ppo", 3, 4)
    assert list(summary["measures"]) == ["before", "after seek", "after"]
    assert "hops=2/sampled/searches" in summary["measures"]["after seek"]
    assert [(c.step, c.keep) for c in list_checkpoints(whole_run)] == [(2, True), (3, False), (4, False)]
    stamp = json.loads((whole_run / "stamp.json").read_text())
    assert [row["name"] for row in stamp["stages"]] == ["seek", "answer"]
    assert "r1_searcher_stage1" in json.dumps(stamp["stages"][0])
    assert "stage1" not in json.dumps(stamp["reward"])


def stop_at_line(monkeypatch, words, line):
    """Run until a line of metrics would be written, and no further."""
    original, count = RunFolder.log, 0

    def log(self, phase, step, values):
        nonlocal count
        count += 1
        if count > line:
            raise KeyboardInterrupt
        original(self, phase, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", log)
        assert main(words) == 130


def assert_same_end(run, whole):
    assert lines_of(run) == lines_of(whole)
    for name in ("train-000002", "train-000004"):
        ours, theirs = (one / "checkpoints" / name for one in (run, whole))
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes(), name
    summaries = [json.loads((one / "summary.json").read_text()) for one in (run, whole)]
    for key in ("measures", "stages", "rows", "tokens"):
        assert summaries[0][key] == summaries[1][key], key


@pytest.mark.parametrize(
    ("line", "step"),
    [pytest.param(2, 1, marks=pytest.mark.slow), (3, 2), (5, 3), pytest.param(6, 4, marks=pytest.mark.slow)],
    ids=["in stage 1", "at the switch", "in stage 2", "at the end"],
)
def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(line, step, whole_run, tmp_path, monkeypatch):
    """The global generators are disturbed in between: nothing may depend on them."""
    run = tmp_path / "run"
    stop_at_line(monkeypatch, [*SMOKE, STAGES, f"run_dir={run}"], line)
    assert list_checkpoints(run)[-1].step == step
    torch.manual_seed(99)
    assert main(["train", f"resume={run}"]) == 0
    assert_same_end(run, whole_run)


def test_a_run_stopped_in_stage_2_before_its_first_checkpoint_takes_the_switch_again(whole_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stop_at_line(monkeypatch, [*SMOKE, STAGES, f"run_dir={run}"], 4)
    assert list_checkpoints(run)[-1].step == 2
    assert main(["train", f"resume={run}"]) == 0
    assert_same_end(run, whole_run)


def test_two_runs_do_what_the_stages_of_one_do(whole_run, tmp_path):
    """The second starts from the checkpoint of the first, with the seed that the summary tells."""
    stages = json.loads((whole_run / "summary.json").read_text())["stages"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert (
        main([*SMOKE, "env.reward=r1_searcher_stage1", "algo.steps=4", STAGES.partition(",{name: answer")[0] + "]", f"run_dir={first}"])
        == 0
    )
    checkpoint = first / "checkpoints" / "train-000002"
    assert (checkpoint / "model.safetensors").read_bytes() == (
        whole_run / "checkpoints" / "train-000002" / "model.safetensors"
    ).read_bytes()
    words = [word for word in SMOKE if not word.startswith("start=")]
    changes = [f"start={checkpoint}", "algo=ppo", "algo.kl_coef=0.01", "algo.critic=shared", f"algo.seed={stages[1]['seed']}"]
    # what every algorithm can be told is the run's in a stage of another algorithm, not what algo=ppo would have
    grpo_defaults = ["algo.num_minibatches=1", "algo.critic_learning_rate=null", "algo.kl_in=loss", "algo.kl_estimator=k3"]
    assert main([*words, *changes, *grpo_defaults, f"run_dir={second}"]) == 0
    ours, theirs = (
        folder / "model.safetensors" for folder in (second / "checkpoints" / "train-000002", whole_run / "checkpoints" / "train-000004")
    )
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_rate_that_is_never_reached_ends_with_the_steps_and_a_warning(tmp_path, capsys):
    run = tmp_path / "run"
    words = "stages=[{name: seek, algo: {steps: 2}, env: {retriever: none}, until: {search_rate: 1.0, over: 3}}, {name: answer, algo: {steps: 1}}]"
    assert main([*SMOKE, words, f"run_dir={run}"]) == 0
    seek, answer = json.loads((run / "summary.json").read_text())["stages"]
    assert (seek["last_step"], seek["reached"], answer["last_step"]) == (2, False, 3)
    assert "1 was never reached; all of its 2 steps are done" in seek["reason"]
    assert f"WARNING: Stage 1 of 2, seek, ends after step 2: {seek['reason']}." in capsys.readouterr().err


def test_a_list_of_questions_is_gone_through_in_epochs(tmp_path, capsys):
    from searchqa_agents.trajectory import load_trajectories
    from searchqa_envs.world.source import WorldSource

    source = WorldSource(num_worlds=8)
    ids = [source[i].id for i in (0, 5, 9, 40)]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps({"id": name}) + "\n" for name in ids))
    run = tmp_path / "run"
    words = [
        f"questions={file}",
        "stages=[{name: some, until: {epochs: 1.5}}, {name: all, questions: null, algo: {steps: 1}}]",
        "rollouts_every=1",
    ]
    assert main([*SMOKE, *words, f"run_dir={run}"]) == 0
    played = [[t.question_id for t in load_trajectories(run / "trajectories" / f"rollouts-{step:06d}.jsonl.gz")][::3] for step in (1, 2, 3)]
    assert sorted((played[0] + played[1])[:4]) == sorted(ids)
    assert set(played[0] + played[1]) == set(ids)
    assert not set(played[2]) <= set(ids)
    file.write_text(json.dumps({"id": "nobody"}) + "\n")
    assert main([*SMOKE, *words, f"run_dir={tmp_path / 'other'}"]) == 1
    assert "asks for the question 'nobody'" in capsys.readouterr().err


@pytest.fixture
def own_set(tmp_path):
    """Ten questions of one's own, with a corpus, as words of a line."""
    rows = [{"id": f"q{i}", "question": f"what is {i}?", "golden_answers": ["x"]} for i in range(10)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "corpus.jsonl").write_text('{"id": "1", "title": "T", "text": "t"}\n')
    return [
        *(
            "train",
            "recipe=smoke",
            "threads=1",
            "start=random",
            "random.like=qwen2.5-0.5b",
            "random.num_hidden_layers=1",
            "random.vocab_size=512",
        ),
        *("env=custom", f"env.questions={tmp_path}/questions.jsonl", f"env.corpus={tmp_path}/corpus.jsonl", "env.tokenizer=byte"),
        *("evaluation.split=all", "env.split=all", "env.max_turns=1", "env.max_segment_tokens=2", "env.max_context_tokens=2048"),
        *("algo.questions_per_step=4", "algo.group_size=2", "evaluation.questions=1", "rollouts_every=1"),
    ]


def test_a_set_of_questions_is_gone_through_in_epochs_without_a_list(own_set, tmp_path):
    """A tiny policy on ten questions: two epochs in rollouts of four, each question once in each epoch."""
    from searchqa_agents.trajectory import load_trajectories

    run = tmp_path / "run"
    assert main([*own_set, "stages=[{name: all, until: {epochs: 2}}]", f"run_dir={run}"]) == 0
    files = sorted((run / "trajectories").glob("rollouts-*"))
    assert len(files) == 5
    played = [t.question_id for file in files for t in load_trajectories(file)][::2]
    assert sorted(played[:10]) == sorted(played[10:]) == sorted(f"q{i}" for i in range(10))
    assert played[:10] != played[10:]


def test_worlds_are_drawn_from_and_sets_gone_through(tmp_path):
    import gymnasium as gym

    import searchqa_envs  # noqa: F401, registers the ids
    from searchqa_agents.training_run import epoch_of

    (tmp_path / "q.jsonl").write_text('{"id": "a", "question": "?", "golden_answers": ["x"]}\n')
    (one,) = stages_of(settings(None))
    for words, expected in (
        ({"num_worlds": 2}, None),
        ({"questions": str(tmp_path / "q.jsonl"), "split": "all", "retriever": "none"}, range(1)),
    ):
        name = "SearchQA-World-v0" if "num_worlds" in words else "SearchQA-Custom-v0"
        venv = gym.make_vec(name, num_envs=1, autoreset_mode="DISABLED", **words)
        assert epoch_of(one, venv) == expected
        venv.close()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stages.0.until={search_rate: 0.95, over: 5}"], {"search_rate": 0.95, "over": 5}),
        (["stages.0.until={epochs: 1}"], {"epochs": 1}),
        (["stages.0.until={steps: 3}", "stages.0.until.steps=4"], {"steps": 4}),
    ],
)
def test_the_end_of_a_stage_of_a_published_recipe_can_be_changed_on_the_line(words, expected, capsys):
    import yaml

    assert main(["train", "recipe=published/r1_searcher_paper", *words, "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["stages"][0]["until"] == expected


def test_a_mapping_of_a_stage_on_the_line_takes_the_place_of_the_recipes(capsys):
    import yaml

    words = ["stages.1.algo={steps: 3}", "stages.0.env={reward: em}", "stages.0.env.retriever={name: none}"]
    assert main(["train", "recipe=r1_searcher", *words, "--cfg", "job"]) == 0
    first, second = yaml.safe_load(capsys.readouterr().out)["stages"]
    assert (first["env"], second["algo"]) == ({"reward": "em", "retriever": {"name": "none"}}, {"steps": 3})


def test_a_retriever_without_a_name_is_refused_with_the_key(capsys):
    assert main([*SMOKE, "env.retriever.url=http://127.0.0.1:9", "dry_run=true"]) == 1
    assert "Say which retriever they are of, such as env.retriever.name=http" in capsys.readouterr().err


def test_a_stage_has_the_runs_environment_where_it_changes_nothing_and_its_search_engine_where_only_the_reward_differs():
    from searchqa_agents.loading import make_venv
    from searchqa_agents.training_run import make_stage_venv

    rows = [
        {"name": "same", "until": {"steps": 1}},
        {"name": "paid", "env": {"reward": "f1"}, "until": {"steps": 1}},
        {"name": "other", "env": {"top_k": 1}},
    ]
    given = settings(rows)
    venv = make_venv(given.env, 2)
    same, paid, other = (make_stage_venv(stage, venv, 2) for stage in stages_of(given))
    assert same is venv
    assert paid is not venv
    assert paid.unwrapped.rules.retriever is venv.unwrapped.rules.retriever
    assert paid.unwrapped.stamp() == {**venv.unwrapped.stamp(), "reward": paid.unwrapped.stamp()["reward"]}
    assert other.unwrapped.rules.retriever is not venv.unwrapped.rules.retriever


def test_a_setting_of_a_stage_of_a_recipe_can_be_changed_on_the_line(tmp_path, capsys):
    assert main(["train", "recipe=r1_searcher", "stages.0.until.search_rate=0.7", "--cfg", "job"]) == 0
    assert "search_rate: 0.7" in capsys.readouterr().out


def test_other_stages_are_another_run(whole_run, capsys):
    assert main(["train", f"resume={whole_run}", "stages=null"]) == 1
    assert "another stages" in capsys.readouterr().err


def test_the_settings_of_one_stage_leave_those_of_the_others_alone():
    one = settings([{"name": "a", "env": {"top_k": 5}, "until": {"steps": 1}}, LAST])
    before = replace(one.env)
    stages_of(one)
    assert one.env == before


# -- what others see of stages --------------------------------------------------------------------------------------------------------------


def test_the_picture_has_a_labelled_line_where_a_stage_ends():
    from matplotlib.figure import Figure

    from searchqa_agents.plots import _searches, _success, stage_ends

    lines = [
        {"phase": "train", "step": step, "stage": name, "charts/em": 0.1 * step, "charts/searches": 1.0, "charts/search_rate": 0.2 * step}
        for step, name in ((1, "seek"), (2, "seek"), (3, "answer"), (4, "answer"))
    ]
    assert stage_ends(lines) == [(2, "seek", "answer")]
    assert stage_ends([{**line, "stage": ""} for line in lines]) == stage_ends([{"step": 1}, {"step": 2}]) == []
    measures = {when: {"sampled/em": em, "sampled/searches": 1.0} for when, em in (("before", 0.1), ("after seek", 0.3), ("after", 0.6))}
    for draw in (_success, _searches):
        axes = Figure().subplots()
        draw(axes, lines, measures)
        assert [list(line.get_xdata()) for line in axes.lines if line.get_label() == "_switch"] == [[2.5, 2.5]]
        assert {"seek", "answer"} <= {text.get_text() for text in axes.texts}
        assert [point[0] for point in axes.collections[0].get_offsets()] == [0, 2, 4]  # held-out questions, between the stages too
    assert [list(line.get_ydata()) for line in axes.lines if line.get_label() == "share of them with a search"] == [
        [line["charts/search_rate"] for line in lines]
    ]


def test_alarms_compare_a_stage_with_its_own_start():
    from searchqa_agents.alarms import AlarmConfig, Alarms

    def fed(*, told):
        alarms = Alarms(AlarmConfig(window=2, entropy_share=0.5), 4)
        for step, entropy in enumerate((1.0, 1.0, 0.3, 0.3, 0.3, 0.1, 0.1), start=1):
            if told and step in (3, 6):
                alarms.begin(4)
            alarms.update(step, {"charts/entropy": entropy})
        return [(alarm.name, alarm.step) for alarm in alarms.raised]

    assert fed(told=False) == [("entropy", 4)]  # 0.3 is the mean of steps 3 and 4
    assert fed(told=True) == []


def test_an_alarm_is_raised_again_in_another_stage():
    from searchqa_agents.alarms import AlarmConfig, Alarms

    alarms = Alarms(AlarmConfig(window=1), 4)
    for step in (1, 2, 3, 4):
        if step == 3:
            alarms.begin(4)
        alarms.update(step, {"charts/searches": 0.0})
    assert [(alarm.name, alarm.step) for alarm in alarms.raised] == [("no searches", 1), ("no searches", 3)]


# -- the demonstrations of R1-Searcher in the small -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["bare", "{question}\n<think>"])
def test_the_shy_oracle_writes_r1_searchers_format_and_searches_as_often_as_it_is_told(prompt):
    import gymnasium as gym

    from searchqa_agents.demonstrations import demonstrate
    from searchqa_agents.scripted import shy_oracle

    venv = gym.make_vec(
        "SearchQA-World-v0", num_envs=32, autoreset_mode="DISABLED", num_worlds=4,
        dialect="r1-searcher", prompt=prompt, reward=["r1_searcher_stage1", "em"],
    )  # fmt: skip
    questions = list(range(60))
    certain = demonstrate(venv, shy_oracle(shy=0.0, lazy=0.0), questions)
    assert {(t.metrics["em"], t.reward_terms["structure_format"], t.reward_terms["retrieval_used"]) for t in certain} == {(1.0, 0.5, 0.5)}
    shy = demonstrate(venv, shy_oracle(shy=1.0), questions)
    assert {(t.metrics["em"], t.reward_terms["structure_format"], t.reward_terms["retrieval_used"]) for t in shy} == {(0.0, 0.5, 0.0)}
    some = demonstrate(venv, "shy_oracle", questions)
    assert 0.1 < sum(t.metrics["searches"] > 0 for t in some) / 60 < 0.5  # 0.3 is told
    assert all(t.reward_terms["structure_format"] == 0.5 for t in some)


@pytest.mark.parametrize("words", [["recipe=r1_searcher"], ["recipe=search_r1"], ["recipe=search_r1", "algo=grpo"]])
def test_the_small_recipes_are_complete(words, tmp_path, capsys):
    assert main(["train", *words, "dry_run=true", "threads=1", "env.num_worlds=8", f"run_dir={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert ("name: grpo" in out) == ("algo=grpo" in words)
    assert ("name: ppo" in out) == (words == ["recipe=search_r1"])


def test_further_rounds_of_a_step_draw_from_the_list_and_leave_its_epochs_alone(monkeypatch):
    from types import SimpleNamespace

    from searchqa_agents.parallel import Parallel
    from searchqa_agents.trainer import _play

    asked = []
    monkeypatch.setattr(
        "searchqa_agents.trainer.shared_rollout", lambda parallel, venv, sampler, questions, **rest: asked.append(questions) or []
    )
    listed = list(range(50, 70))
    config = AlgorithmConfig(questions_per_step=5, group_size=2, dynamic_sampling=3)
    venv = SimpleNamespace(unwrapped=SimpleNamespace(source=None))
    for step in range(4):
        _play(venv, None, config, step, {}, Parallel(), listed)
    first, further = asked[::3], asked[1::3] + asked[2::3]
    assert sorted(question for questions in first for question in questions) == listed  # an epoch, whatever the further rounds took
    assert all(set(questions) <= set(listed) for questions in further)
    for step in range(4):
        questions = [question for part in asked[3 * step : 3 * step + 3] for question in part]
        assert len(set(questions)) == len(questions)  # none twice in a step
    again = asked[:3]
    asked.clear()
    _play(venv, None, config, 0, {}, Parallel(), listed)
    assert asked == again
