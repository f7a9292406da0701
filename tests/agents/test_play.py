"""A person as the agent: real standard input through the real command."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest

from searchqa_agents.play import printable, segment_of
from searchqa_envs.dialects import get_dialect

CONSOLE = Path(sysconfig.get_path("scripts")) / "searchqa"


def play(stdin: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CONSOLE, "play", "env.split=test", *words], input=stdin, capture_output=True, text=True, timeout=120)


def test_an_episode_from_question_to_reward() -> None:
    from searchqa_envs.world import WorldSource

    question = next(q for q in (WorldSource(split="test")[i] for i in range(48)) if q.metadata["hops"] == 2)
    first, second = (link["query"] for link in question.metadata["chain"])
    lines = f"search: {first}\nwhat now?\n<search>{second}</search>\n\nANSWER: {question.golden_answers[0]}\n"
    done = play(lines, "--question-id", question.id)
    assert done.returncode == 0, done.stderr
    assert question.question in done.stdout
    assert f"[1] {first}" in done.stdout
    assert f"[1] {second}" in done.stdout
    assert "neither a search nor an answer" in done.stdout
    assert "reward terms: em 1" in done.stdout
    assert done.stdout.rstrip().endswith("reward: 1")


def test_end_of_input_leaves_politely() -> None:
    done = play("search: nothing in particular\n", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert "You left" in done.stdout
    assert "reward:" not in done.stdout


def test_an_episode_that_ends_without_an_answer_says_so() -> None:
    done = play("search: x\n", "--seed", "3", "env.max_turns=1")
    assert done.returncode == 0, done.stderr
    assert "not carried out" in done.stdout
    assert "ended without an answer" in done.stdout
    assert "Your answer" not in done.stdout
    assert "Golden answers: " in done.stdout


@pytest.mark.parametrize(
    ("dialect", "line", "segment"),
    [
        ("search-r1", "search: a b", "<search>a b</search>"),
        ("search-r1", "Answer:x", "<answer>x</answer>"),
        ("r1-searcher", "search: a", "<|begin_of_query|>a<|end_of_query|>"),
        ("search-r1", "<think>t</think><search>q</search>", "<think>t</think><search>q</search>"),
        ("search-r1", "research: a", "research: a"),  # only at the beginning of the line
    ],
)
def test_what_a_line_means(dialect: str, line: str, segment: str) -> None:
    assert segment_of(line, get_dialect(dialect)) == segment


def test_control_characters_never_reach_the_terminal() -> None:
    assert printable("a\x1b[31mb\x9bc\u202e\td\n") == "a�[31mb�c��d\n"
