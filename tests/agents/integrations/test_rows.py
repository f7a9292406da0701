"""Rows for training engines: every question once, under the id by which the environment finds it."""

from __future__ import annotations

import json

import gymnasium as gym
import pytest
from pyarrow import parquet

import searchqa_envs  # noqa: F401, registers the ids
from searchqa_agents.cli import main
from searchqa_agents.integrations.rows import question_rows
from searchqa_envs.errors import ConfigurationError


def test_verl_rows_have_every_question_of_the_split_and_the_environment_finds_each(small_data, tmp_path):
    out = tmp_path / "rows.parquet"
    assert main(["data", "rows", "hotpotqa", "--split", "train", "--data-dir", str(small_data), "--out", str(out)]) == 0
    rows = parquet.read_table(out).to_pylist()
    env = gym.make("SearchQA-HotpotQA-v0", split="train", data_dir=small_data).unwrapped
    assert [row["extra_info"]["question_id"] for row in rows] == [question.id for question in env.source]
    for index, row in enumerate(rows):
        assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info", "agent_name"}
        where = row["extra_info"]
        assert (where["env_id"], where["split"], where["index"]) == ("SearchQA-HotpotQA-v0", "train", index)
        _, info = env.reset(options={"question_id": where["question_id"]})
        [message] = row["prompt"]
        assert message["role"] == "user"
        assert info["question"] in message["content"]
        assert "<search> query </search>" in message["content"]
        assert row["reward_model"] == {"style": "rule", "ground_truth": {"target": list(env.source[index].golden_answers)}}
        assert row["agent_name"] == "searchqa"


def test_openrlhf_rows_carry_the_place_of_the_question_in_the_label(tmp_path):
    out = tmp_path / "rows.jsonl"
    options = ["--option", "preset=medium", "--option", "hops=2", "--split", "dev", "--count", "4"]
    assert main(["data", "rows", "world", *options, "--engine", "openrlhf", "--dialect", "bare", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 4
    env = gym.make("SearchQA-World-v0", split="dev", preset="medium", hops=2).unwrapped
    for row in rows:
        where = json.loads(row["label"])
        _, info = env.reset(options={"question_id": where["question_id"]})
        assert row["input"] == f"{info['question']}\n"
        assert (where["env_id"], where["split"], row["datasource"]) == ("SearchQA-World-v0", "dev", "world")


def test_a_set_of_ones_own(small_data, tmp_path):
    questions = small_data / "nq" / "questions.jsonl"
    rows = list(question_rows("custom", "all", "verl", options={"questions": str(questions)}))
    assert len(rows) == len(questions.read_text().splitlines())
    assert {row["extra_info"]["env_id"] for row in rows} == {"SearchQA-Custom-v0"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["world", "--engine", "ray"], "engine must be one of"),
        (["worlds"], "dataset must be one of"),
        (["world", "--dialect", "klingon"], "klingon"),
        (["world", "--count", "0"], "count must be at least 1"),
        (["world", "--option", "preset"], "--option must be KEY=VALUE"),
        (["hotpotqa", "--option", "preset=easy"], "unexpected argument 'preset'"),
    ],
)
def test_what_cannot_be_is_a_typed_error_and_writes_nothing(arguments, message, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert main(["data", "rows", *arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_the_ending_says_the_format(tmp_path):
    assert main(["data", "rows", "world", "--count", "2", "--out", str(tmp_path / "rows.csv")]) == 2
    with pytest.raises(ConfigurationError, match="engine"):
        question_rows("world", None, "nothing")
