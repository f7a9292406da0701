"""Baselines that are trained: R1 without search, SFT on questions and golden answers, rejection sampling; each as the lines of its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents.cli import main
from searchqa_agents.collected import collect
from searchqa_agents.demonstrations import demonstrate
from searchqa_agents.rollout import rollout
from searchqa_agents.trajectory import append_trajectories, load_trajectories
from searchqa_envs.dialects import get_dialect
from searchqa_retrievers.types import SearchRequest

R1_TEMPLATE = (
    "Answer the given question. You should first have a reasoning process in mind and then provides the answer. Show your reasoning in <think> "
    "</think> tags and return the final answer in <answer> </answer> tags, for example <answer> Beijing </answer>. Question: {question}\n"
)
SMALL = ["recipe=smoke", "threads=1", "start=shipped", "evaluation.questions=8", "device=cpu"]


def stamp_of(run: Path) -> dict[str, Any]:
    stamp: dict[str, Any] = json.loads((run / "stamp.json").read_text())
    return stamp


def said_without_checkpoint(agent: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["eval", f"agent=baseline/{agent}", "env=world", "questions=1"]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("agent", ["r1", "sft", "rejection_sampling", "zero_shot"])
def test_a_trained_baseline_asks_for_its_checkpoint(agent: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "checkpoint" in said_without_checkpoint(agent, capsys)


@pytest.mark.parametrize("agent", ["r1", "sft"])
def test_without_search_there_is_one_answer_to_the_published_template(agent: str, small_data: Path, tmp_path: Path) -> None:
    line = ["eval", f"agent=baseline/{agent}", "agent.checkpoint=shipped", "env=nq", f"env.data_dir={small_data}", "save=null", "threads=1"]
    assert main([*line, "env.max_segment_tokens=12", f"run_dir={tmp_path / 'run'}", "device=cpu"]) == 0
    stamp = stamp_of(tmp_path / "run")
    assert (stamp["prompt"], stamp["max_turns"], stamp["agent"]["temperature"]) == ("no_search", 1, 0)
    assert "none" in stamp["retriever"].values()
    trajectories = load_trajectories(tmp_path / "run" / "trajectories" / "eval.jsonl.gz")
    assert len(trajectories) == 5
    for trajectory in trajectories:
        question = trajectory.question if trajectory.question.endswith("?") else f"{trajectory.question}?"
        assert trajectory.prompt == R1_TEMPLATE.replace("{question}", question)
        assert len(trajectory.turns) == 1


@pytest.mark.parametrize(
    ("dialect", "prompt", "written"),
    [
        ("search-r1", "no_search", "<answer>{answer}</answer>"),
        ("zerosearch", "no_search", "<answer>{answer}</answer>"),
        ("r1-searcher", "published", "</think><answer>{answer}</answer>"),  # its prompt leaves a thought open
        ("search-r1", "bare", "<answer>{answer}</answer>"),
    ],
)
def test_golden_answers_are_demonstrated_and_nothing_else_is_learned(dialect: str, prompt: str, written: str, small_data: Path) -> None:
    venv = gym.make_vec(
        "SearchQA-NQ-v0", num_envs=3, autoreset_mode="DISABLED", data_dir=str(small_data), retriever="none", dialect=dialect, prompt=prompt
    )
    base: Any = venv.unwrapped
    for place, trajectory in enumerate(demonstrate(venv, "answer", range(5))):
        gold = base.source[place].golden_answers[0]
        assert (trajectory.answer, trajectory.metrics["em"], trajectory.terminated) == (gold, 1.0, True)
        learned = [int(token) for token, mask in zip(trajectory.token_ids, trajectory.loss_mask, strict=True) if mask]
        assert base.tokenizer.decode(learned) == written.format(answer=gold)
        before = base.tokenizer.decode(trajectory.token_ids[: len(trajectory.token_ids) - len(learned)].tolist())
        assert before == get_dialect(dialect).render_question(prompt, base.source[place].question)  # one turn, nothing from a search


def test_sft_learns_answers_of_training_questions_and_is_evaluated_on_others(tmp_path: Path) -> None:
    run, measured = tmp_path / "run", tmp_path / "measured"
    world = ["env=world", "env.prompt=bare", "env.num_worlds=20"]
    train = [
        "train",
        *SMALL,
        *world,
        "+published=search_r1_sft",
        "algo=sft",
        "algo.steps=6",
        "algo.questions_per_step=16",
        "algo.group_size=1",
    ]
    assert main([*train, "algo.learning_rate=2e-3", f"run_dir={run}"]) == 0
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["losses/sft_loss"] for line in steps if line["phase"] == "train"]
    assert len(losses) == 6
    assert losses[-1] < losses[0] / 2  # the shipped model searches first
    line = ["eval", "agent=baseline/sft", f"agent.checkpoint={run / 'checkpoints' / 'train-000006'}", *world, "questions=16", "save=null"]
    assert main([*line, "threads=1", "device=cpu", f"run_dir={measured}"]) == 0
    trained, tested = stamp_of(run), stamp_of(measured)
    assert (trained["split"], tested["split"]) == ("train", "test")  # made of other worlds, see tests of the world
    played = load_trajectories(measured / "trajectories" / "eval.jsonl.gz")
    assert [turn.action for trajectory in played for turn in trajectory.turns] == ["answer"] * 16

    collected = tmp_path / "held-out"  # the guard of collected trajectories, for this baseline's: what was evaluated on is refused
    (collected / "trajectories").mkdir(parents=True)
    (measured / "trajectories" / "eval.jsonl.gz").rename(collected / "trajectories" / "eval.jsonl.gz")
    refused = ["train", *SMALL, *world, "+published=search_r1_sft", "algo=sft", f"algo.trajectories={collected}", "algo.keep=all"]
    assert main([*refused, "dry_run=true", f"run_dir={tmp_path / 'refused'}"]) == 1


def test_rejection_sampling_collects_learns_and_is_evaluated(tmp_path: Path) -> None:
    collected, run, measured = tmp_path / "collected", tmp_path / "run", tmp_path / "measured"
    world = ["env=world", "env.num_worlds=20"]
    collecting = [
        "eval",
        "+published=search_r1_rejection_sampling",
        "agent=lm",
        "agent.checkpoint=shipped",
        *world,
        "questions=8",
        "save=null",
    ]
    assert main([*collecting, "threads=1", "device=cpu", f"run_dir={collected}"]) == 0
    episodes = load_trajectories(collected / "trajectories" / "eval.jsonl.gz")
    assert len(episodes) == 5 * 8
    right = [episode for episode in episodes if episode.metrics["em"] == 1]
    kept = collect(collected)
    assert [episode.token_ids.tolist() for episode in kept.trajectories] == [episode.token_ids.tolist() for episode in right]
    for episode in right:  # observations are masked, whatever the policy wrote is not
        learned = [mask for turn in episode.turns for mask in episode.loss_mask[turn.start : turn.segment_end]]
        observed = [mask for turn in episode.turns for mask in episode.loss_mask[turn.segment_end : turn.end]]
        assert set(learned) == {1}
        assert set(observed) <= {0}
    assert any(turn.action == "search" for episode in right for turn in episode.turns)

    train = ["train", *SMALL, *world, "algo=sft", f"algo.trajectories={collected}", "algo.epochs=1", "algo.questions_per_step=16"]
    assert main([*train, "algo.group_size=1", f"run_dir={run}"]) == 0
    [checkpoint] = sorted((run / "checkpoints").glob("train-*"))[-1:]
    line = ["eval", "agent=baseline/rejection_sampling", f"agent.checkpoint={checkpoint}", *world, "questions=8", "threads=1", "device=cpu"]
    assert main([*line, f"run_dir={measured}"]) == 0
    assert stamp_of(measured)["split"] == "test"


# -- the defining steps on real questions and passages, with a scripted language model ------------------------------------------------------


def hotpotqa(**arguments: Any) -> tuple[Any, list[int]]:
    """Environments of HotpotQA's training questions, and which of these are asked."""
    venv = gym.make_vec("SearchQA-HotpotQA-v0", num_envs=4, autoreset_mode="DISABLED", split="train", **arguments)
    return venv, [0, 1, 2]


@pytest.mark.data
def test_r1_reasons_and_answers_real_questions_without_any_passage(scripted_lm: Any) -> None:
    venv, questions = hotpotqa(prompt="no_search", retriever="none", max_turns=1)
    base: Any = venv.unwrapped
    golds = {base.source[i].question: base.source[i].golden_answers[0] for i in questions}
    texts = iter(["<think>I know.</think><answer> {gold} </answer>", "<search> {gold} </search>", "<answer>something else</answer>"])

    def says(prompt: str) -> str:
        [gold] = [gold for question, gold in golds.items() if question in prompt]
        return next(texts).format(gold=gold)

    lm = scripted_lm.ScriptedLM(base.tokenizer, says)
    right, searched, wrong = rollout(venv, lm, questions)
    for trajectory, prompt in zip((right, searched, wrong), lm.prompts, strict=True):
        question = trajectory.question if trajectory.question.endswith("?") else f"{trajectory.question}?"
        assert prompt == trajectory.prompt == R1_TEMPLATE.replace("{question}", question)
        assert [(len(trajectory.turns), turn.passages, turn.observation) for turn in trajectory.turns] == [(1, (), "")]
        assert trajectory.metrics["searches"] == 0
    assert [trajectory.metrics["em"] for trajectory in (right, searched, wrong)] == [1, 0, 0]
    assert searched.answer is None  # what it asks for is not looked up


@pytest.mark.data
def test_sft_learns_the_golden_answers_of_real_questions_alone() -> None:
    venv, questions = hotpotqa(prompt="no_search", retriever="none", max_turns=1)
    base: Any = venv.unwrapped
    for place, trajectory in zip(questions, demonstrate(venv, "answer", questions), strict=True):
        question = base.source[place]
        asked = question.question if question.question.endswith("?") else f"{question.question}?"
        learned = trajectory.token_ids[trajectory.loss_mask == 1].tolist()
        assert base.tokenizer.decode(learned) == f"<answer>{question.golden_answers[0]}</answer>"
        assert base.tokenizer.decode(trajectory.token_ids[trajectory.loss_mask == 0].tolist()) == R1_TEMPLATE.replace("{question}", asked)


@pytest.mark.data
def test_rejection_sampling_keeps_right_candidates_with_real_passages_masked(scripted_lm: Any, tmp_path: Path) -> None:
    venv, questions = hotpotqa(retriever="bm25", top_k=3, max_turns=3)
    base: Any = venv.unwrapped
    asked = {base.source[i].question: base.source[i] for i in questions}
    answered = dict.fromkeys(asked, 0)

    def says(prompt: str) -> str:
        [text] = [text for text in asked if text in prompt]
        question = asked[text]
        if "<information>" not in prompt.partition(text)[2]:
            return f"<think>I look it up.</think><search> {question.supporting_titles[0]} </search>"
        answered[text] += 1
        return f"<answer> {question.golden_answers[0] if answered[text] in (2, 5) else 'no idea'} </answer>"

    candidates = rollout(venv, scripted_lm.ScriptedLM(base.tokenizer, says), questions, group_size=5, stamp=base.stamp())
    assert [trajectory.question for trajectory in candidates] == [text for text in asked for _ in range(5)]
    (tmp_path / "trajectories").mkdir()
    append_trajectories(tmp_path / "trajectories" / "eval.jsonl.gz", candidates)

    kept, retriever = collect(tmp_path).trajectories, base.source.build_retriever({"name": "bm25"})
    assert sorted(trajectory.question for trajectory in kept) == sorted(text for text in asked for _ in range(2))
    for trajectory in kept:
        question = asked[trajectory.question]
        search, answer = trajectory.turns
        assert search.content == question.supporting_titles[0]
        [hits] = retriever.search([SearchRequest(search.content, 3)])
        assert search.passages == tuple((hit.passage.id, hit.passage.title) for hit in hits)
        assert all(hit.passage.title in search.observation for hit in hits)
        learned = base.tokenizer.decode(trajectory.token_ids[trajectory.loss_mask == 1].tolist())
        assert learned == search.segment + answer.segment
        assert "<information>" not in learned
