"""``evaluation.env``: training is measured in another environment than it is done in."""

import json

import pytest

from searchqa_agents.cli import main
from searchqa_agents.loading import checkpoint_path
from searchqa_agents.runs import read_metrics
from searchqa_agents.settings import EnvSettings, WorldSettings, changed_arguments
from searchqa_agents.trajectory import load_trajectories
from searchqa_envs.errors import ConfigurationError

SMOKE = ["train", "recipe=smoke", "start=shipped", "threads=1", "env.num_worlds=8", "evaluation.questions=4", "algo.steps=1"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"top_kay": 3}, "top_kay is not an argument"),
        ({"split": "dev"}, "write evaluation.split"),
        ({"id": "SearchQA-NQ-v0"}, "one environment"),
        ({"tokenizer": "byte"}, "one tokenizer"),
        ([1], "must be a mapping"),
    ],
)
def test_what_cannot_differ_is_an_error_with_its_reason(changed, said):
    with pytest.raises(ConfigurationError, match=said):
        changed_arguments("evaluation.env", changed, EnvSettings("SearchQA-NQ-v0"), other_keys={"split": "write evaluation.split"})


def test_arguments_are_those_of_the_environment_that_is_trained_in():
    assert changed_arguments("evaluation.env", {"preset": "easy"}, WorldSettings("SearchQA-World-v0")) == {"preset": "easy"}
    with pytest.raises(ConfigurationError, match=r"evaluation.env.preset is not an argument of SearchQA-NQ-v0. It can change \["):
        changed_arguments("evaluation.env", {"preset": "easy"}, EnvSettings("SearchQA-NQ-v0"))
    assert changed_arguments("evaluation.env", None, EnvSettings("SearchQA-NQ-v0")) == {}


@pytest.mark.parametrize("words", [["evaluation.env.topk=3"], ["evaluation.env={retriever: {name: googel}}"]])
def test_a_wrong_line_is_refused_before_the_first_step(words, tmp_path, capsys):
    assert main([*SMOKE, *words, f"run_dir={tmp_path / 'run'}"]) == 1
    assert words[0].rpartition("googel")[1] or "evaluation.env.topk" in (said := capsys.readouterr().err), said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def lines_of_told(text):
    return " ".join(text.split()).count("told the golden answers")


def test_numbers_of_a_search_engine_that_is_told_the_answer_say_so(tmp_path, capsys):
    told = f"{{name: simulated, checkpoint: '{checkpoint_path('shipped')}', prompt: world, max_tokens: 8}}"
    play = ["eval", "agent=search_once", "env=world", "questions=2", "threads=1"]
    for name, retriever, expected in (("told", told, True), ("real", "bm25", None)):
        run = tmp_path / name
        assert main([*play, f"env.retriever={retriever}", f"run_dir={run}"]) == 0
        assert json.loads((run / "stamp.json").read_text()).get("told_the_answer") is expected
        assert lines_of_told("".join(capsys.readouterr())) == (1 if expected else 0)
        run = tmp_path / f"{name}-training"
        assert main([*SMOKE, "env.retriever=bm25", f"evaluation.env={{retriever: {retriever}}}", f"run_dir={run}"]) == 0
        assert lines_of_told("".join(capsys.readouterr())) == (2 if expected else 0)  # before and after
        for when in ("before", "after"):
            played = load_trajectories(run / "trajectories" / f"{when}.jsonl.gz")
            assert {t.stamp.get("told_the_answer") for t in played} == {expected}


def test_a_run_is_trained_with_one_retriever_and_measured_with_another(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["env.retriever=random", "evaluation.env={retriever: bm25}", "evaluation.env.top_k=2", "rollouts_every=1"]
    assert main([*SMOKE, *words, f"run_dir={run}"]) == 0

    def stamps(name):
        return [t.stamp for t in load_trajectories(run / "trajectories" / f"{name}.jsonl.gz")]

    for when in ("before", "after"):
        assert {(stamp["retriever"]["retriever"], stamp["top_k"], stamp["split"]) for stamp in stamps(when)} == {("bm25", 2, "test")}
    assert {(stamp["retriever"]["retriever"], stamp["top_k"]) for stamp in stamps("rollouts-000001")} == {("random", 1)}
    stamp = json.loads((run / "stamp.json").read_text())
    assert (stamp["retriever"]["retriever"], stamp["measured_on"], stamp["measured_with"]) == (
        "random",
        "test",
        {"retriever": "bm25", "top_k": 2},
    )
    assert any("hops=2/off/em" in line for line in read_metrics(run))
    assert main(["train", f"resume={run}", "evaluation.env.top_k=3"]) == 1  # after would not be measured as before was
    assert "another evaluation" in capsys.readouterr().err


def test_the_line_below_the_table_says_what_was_measured_with() -> None:
    from searchqa_agents.table import stamp_line

    stamp = {
        "retriever": {"retriever": "simulated"},
        "reward": "zerosearch_f1",
        "measured_with": {"retriever": {"name": "bm25", "k1": 1}, "top_k": 2},
    }
    assert stamp_line(stamp) == "measured with retriever bm25 top_k 2, retriever simulated, reward zerosearch_f1"
    assert stamp_line({"retriever": "bm25", "measured_with": {}}) == "retriever bm25"
