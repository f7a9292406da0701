"""Published recipes take their first steps with random weights of a published width: the code path of the real thing, cut where it is only large."""

from __future__ import annotations

import json
import math
import os
import resource
import zlib
from pathlib import Path
from typing import Any

import pytest

from searchqa_agents.cli import main
from searchqa_agents.loading import shipped_checkpoint
from searchqa_agents.runs import read_metrics
from searchqa_envs.rewards import PRESETS, Preset

ROWS = [
    {"id": f"q{i}", "question": f"Who built bridge number {i}?", "golden_answers": [f"Builder {i}"], "metadata": {"split": split}}
    for i, split in enumerate(("train", "train", "test", "test"))
]
PASSAGES = [{"id": f"p{i}", "title": f"Bridge {i}", "text": f"Bridge number {i} was built by Builder {i}."} for i in range(4)]

SMALL = (
    "start=random", "parallel=auto", "threads=1", "num_envs=4", "algo.steps=1", "algo.questions_per_step=1", "algo.group_size=2",
    "algo.num_minibatches=1", "algo.checkpoint_every=0", "evaluation.questions=1", "rollouts_every=1", "env.max_segment_tokens=8", "env.max_turns=2",
    "env.max_context_tokens=4000", "algo.entropy_coef=0",
)  # fmt: skip
"""What a recipe is cut to. Without an entropy bonus, and with a policy that is its own reference, advantages alone make a gradient."""
SIMULATOR = (
    f"env.retriever.checkpoint={shipped_checkpoint()}", "env.retriever.url=null", "env.retriever.max_tokens=20", "evaluation.env.retriever=bm25",
)  # fmt: skip
"""A local model in the place of ZeroSearch's server."""
NARROW = ("random.like=qwen2.5-0.5b", "random.num_hidden_layers=1", "random.vocab_size=300")


def spread(episode: Any) -> dict[str, float]:
    """A number of its own for each text, between 0 and 1: random weights are never right, and rewards that are all alike teach nothing."""
    return {"spread": zlib.crc32("".join(turn.segment for turn in episode.turns).encode()) / 2**32}


@pytest.fixture(autouse=True)
def spread_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "spread", Preset(spread, ("spread",)))


@pytest.fixture
def own_questions(tmp_path: Path) -> tuple[str, ...]:
    """Overrides that replace a recipe's data and servers by a few rows of ours."""
    for name, rows in (("questions", ROWS), ("corpus", PASSAGES)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions, corpus = tmp_path / "questions.jsonl", tmp_path / "corpus.jsonl"
    return (f"env.questions={questions}", f"env.corpus={corpus}", "env.split=train", "evaluation.split=test", "env.retriever=bm25")


def first_step(folder: Path, *line: str) -> dict[str, float]:
    """Run a line to its end; the metrics of its last step. Every step is finite and is an update by advantages."""
    assert main(["train", *line, f"run_dir={folder}"]) == 0
    lines = [row for row in read_metrics(folder) if row["phase"] == "train"]
    assert all(math.isfinite(value) for row in lines for value in row.values() if isinstance(value, float))
    for row in lines:
        assert row["charts/updates"] == 1
        assert row["charts/reward_std"] > 0
        assert row["charts/trained_share"] > 0
        assert row["losses/grad_norm"] > 0
    assert (folder / "summary.json").is_file()
    return lines[-1]


def rewards_of(recipe: str) -> str:
    """The recipe's own reward and :func:`spread`."""
    own = {"search": "em", "zerosearch": "zerosearch_f1", "r1": "r1_searcher_stage2_llama"}[recipe.partition("_")[0]]
    return f"env.reward=[{own},spread]"


@pytest.mark.parametrize(
    "recipe",
    [
        "search_r1_ppo",
        "search_r1_grpo_lora",
        pytest.param("zerosearch_grpo", marks=pytest.mark.slow),
        pytest.param("search_r1_grpo", marks=pytest.mark.slow),
        pytest.param("zerosearch_ppo", marks=pytest.mark.slow),
        pytest.param("zerosearch_reinforce", marks=pytest.mark.slow),
    ],
)
def test_published_recipes_update_a_model_of_published_width(recipe: str, own_questions: tuple[str, ...], tmp_path: Path) -> None:
    words = [*own_questions[:-1], *SIMULATOR] if recipe.startswith("zerosearch") else own_questions
    step = first_step(tmp_path / "run", f"recipe=published/{recipe}", *SMALL, *NARROW, *words, rewards_of(recipe))
    assert (tmp_path / "run" / "checkpoints" / "train-000001" / "model.safetensors").is_file()
    if "ppo" in recipe:
        assert step["losses/critic_grad_norm"] > 0


def test_both_stages_of_r1_searcher_are_taken_by_a_model_of_published_width(own_questions: tuple[str, ...], tmp_path: Path) -> None:
    questions, corpus, *others = own_questions
    stages = (
        "stages=[{name: stage1, env: {reward: [r1_searcher_stage1_llama, spread]}, algo: {name: grpo}, until: {steps: 1}}, {name: stage2}]"
    )
    step = first_step(
        tmp_path / "run",
        "recipe=published/r1_searcher_llama",
        *SMALL,
        *NARROW,
        questions,
        corpus,
        *others,
        stages,
        f"++evaluation.env.questions={tmp_path / 'questions.jsonl'}",
        rewards_of("r1_searcher_llama"),
    )
    assert step["charts/stage"] == 2


# -- at the real width, on real questions ----------------------------------------------------------------------------------------------------

WIDE = [
    ("search_r1_ppo", "qwen2.5-3b", ("random.num_hidden_layers=2",)),
    ("search_r1_grpo", "qwen2.5-3b", ("random.num_hidden_layers=2",)),
    ("search_r1_grpo", "llama-3.2-3b", ("random.num_hidden_layers=1",)),
    ("zerosearch_grpo", "llama-3.2-3b", ("random.num_hidden_layers=1",)),
    ("r1_searcher_qwen", "qwen2.5-3b", ("random.num_hidden_layers=1",)),
    ("search_r1_grpo_lora", "qwen2.5-7b", ("random.num_hidden_layers=2", "dtype=bfloat16")),
    ("search_r1_grpo_lora", "llama-3.1-8b", ("random.num_hidden_layers=2", "dtype=bfloat16")),
]


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(("recipe", "like", "more"), WIDE)
def test_real_widths_take_a_step_on_real_questions(recipe: str, like: str, more: tuple[str, ...], tmp_path: Path) -> None:
    retriever = SIMULATOR if recipe.startswith("zerosearch") else ("env.retriever=bm25",)
    data = Path(os.environ["SEARCHQA_DATA"]) / "hotpotqa"
    questions, corpus = (next(data.glob(f"{name}.jsonl*")) for name in ("questions", "corpus"))
    environment = (f"env.questions={questions}", f"env.corpus={corpus}", "env.split=train", "evaluation.split=dev")
    line = [f"recipe=published/{recipe}", *SMALL, f"random.like={like}", "random.vocab_size=512", *environment, *retriever, *more]
    if recipe.startswith("r1_searcher"):
        line += [f"evaluation.env.questions={questions}"]
    first_step(tmp_path / "run", *line, rewards_of(recipe))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 16e6  # KiB
