"""Baselines from the command line: their configuration, its errors before any data is loaded, what a run records, and baselines of one's own."""

import json
import textwrap
from dataclasses import asdict

import pytest
from omegaconf import OmegaConf

from searchqa_agents.baselines.base import BASELINES, get_baseline
from searchqa_agents.cli import main
from searchqa_agents.config_help import conf_dir, options
from searchqa_agents.loading import agent_env, agent_stamp, agent_temperature, check_agent, chosen_dtype, measuring_dtype
from searchqa_agents.settings import AgentSettings, BaselineSettings, EnvSettings, LMAgentSettings, ServerAgentSettings, WorldSettings
from searchqa_agents.trajectory import load_trajectories
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers import ByteTokenizer


def server(protocol="chat"):
    return ServerAgentSettings("server", "http://127.0.0.1:1", protocol, None, 0.0, None, 4, 1.0, 0, 1.0)


def baseline(method="rag", lm=None, **options):
    return BaselineSettings("baseline", method, options, lm or server())


@pytest.fixture
def line(tmp_path, small_data):
    """The beginning of a line, with a run folder of its own and made-up data."""
    return ["eval", "env=hotpotqa", "env.split=all", f"env.data_dir={small_data}", f"run_dir={tmp_path / 'run'}"]


@pytest.mark.parametrize("name", BASELINES)
def test_the_file_of_a_baseline_lists_its_options_with_their_defaults(name):
    written = OmegaConf.to_object(OmegaConf.load(conf_dir() / "agent" / "baseline" / f"{name}.yaml"))
    found = get_baseline(name)
    assert found.name == name
    assert (written["kind"], written["method"]) == ("baseline", name)
    assert written["options"] == asdict(found.config())
    assert found.turns(found.config(), "nq") >= 1


def test_help_lists_the_baselines(capsys):
    assert main(["eval", "--help"]) == 0
    shown = capsys.readouterr().out
    assert set(BASELINES) <= set(options("agent/baseline"))
    assert all(f"baseline/{name}" in shown for name in BASELINES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["agent.method=rga"], "got 'rga'. Did you mean rag?"),
        (["agent.method=nowhere.at_all:mine"], "there is no module nowhere.at_all"),
        (["agent.method=searchqa_agents.baselines.direct:mine"], "has no baseline 'mine' in its tuple BASELINES"),
        (["agent.options.templat=flashrag"], "agent.options.templat is not an option of baseline rag. Did you mean template?"),
        (["agent.options.template=flash"], "template must be one of ['search-r1', 'flashrag']; got 'flash'"),
        (["agent.options.max_tokens=many"], "agent.options.max_tokens cannot be: Value 'many'"),
        (["agent.options={max_token: 3}"], "agent.options.max_token is not an option of baseline rag. Did you mean max_tokens?"),
        (["agent@agent.lm=tools"], "agent.lm cannot be 'tools'. Use agent@agent.lm=lm"),
        (["agent@agent.lm=server", "agent.lm.protocol=tools"], "agent.lm cannot be 'tools'"),
    ],
)
def test_what_cannot_be_is_found_before_any_data_is_looked_for(line, capsys, words, message):
    line[3] = "env.data_dir=/nowhere/at/all"
    assert main([*line, "agent=baseline/rag", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_script_is_no_language_model():
    with pytest.raises(ConfigurationError, match=r"agent.lm cannot be 'oracle'"):
        check_agent(BaselineSettings("baseline", "direct", None, AgentSettings("oracle")), EnvSettings("SearchQA-HotpotQA-v0"))


def test_a_dry_run_asks_nobody(line, capsys):
    assert main([*line, "agent=baseline/rag", "agent@agent.lm=server", "agent.lm.url=http://127.0.0.1:1", "dry_run=true"]) == 0
    assert "Would play" in capsys.readouterr().out


def test_turns_and_context_that_are_not_given_are_what_the_baseline_needs():
    hotpotqa = "SearchQA-HotpotQA-v0"
    assert agent_env(baseline("direct"), EnvSettings(hotpotqa)) == {"max_turns": 1, "max_context_tokens": 4096 + 4096}
    assert agent_env(baseline("rag"), EnvSettings(hotpotqa)) == {"max_turns": 2, "max_context_tokens": 4096 + 2 * 4096}
    given = EnvSettings(hotpotqa, max_turns=5, max_segment_tokens=100, max_observation_tokens=50)
    assert agent_env(baseline("rag"), given) == {"max_context_tokens": 4096 + 5 * 150}
    assert agent_env(baseline("rag"), EnvSettings(hotpotqa, max_turns=3, max_context_tokens=9000)) == {}
    shipped = LMAgentSettings("lm", "shipped", 0.0)
    assert agent_env(baseline("rag", shipped), EnvSettings(hotpotqa))["tokenizer"] == agent_env(shipped, EnvSettings(hotpotqa))["tokenizer"]
    assert "tokenizer" not in agent_env(baseline("rag", shipped), EnvSettings(hotpotqa, tokenizer="byte"))
    assert agent_env(server(), EnvSettings(hotpotqa)) == {}
    assert agent_env(AgentSettings("oracle"), WorldSettings("SearchQA-World-v0")) == {}


def test_the_stamp_has_every_option_and_how_prompts_go_out():
    stamp = agent_stamp(baseline("rag", template="flashrag"), ByteTokenizer())
    assert stamp["options"] == {"template": "flashrag", "max_tokens": None, "max_prompt_tokens": 2048}
    assert (stamp["method"], stamp["prompts"], stamp["top_k_sent"]) == ("rag", "messages", False)
    assert stamp["lm"]["protocol"] == "chat"
    assert agent_stamp(baseline("rag", server("vllm")), ByteTokenizer())["prompts"] == "text"
    json.dumps(stamp)


@pytest.mark.parametrize(
    ("env", "set_name", "hops", "searches"),
    [("NQ", "nq", "single", 5), ("PopQA", "popqa", "single", 5), ("HotpotQA", "hotpotqa", "multi", 10)],
)
def test_equal_play_has_an_equal_stamp_and_its_number_of_turns(env, set_name, hops, searches):
    by_set, said = baseline("search_o1"), baseline("search_o1", hops=hops, max_searches=searches)
    settings = EnvSettings(f"SearchQA-{env}-v0")
    assert agent_env(by_set, settings) == agent_env(said, settings)
    assert agent_env(by_set, settings)["max_turns"] == searches + 1
    assert agent_stamp(by_set, ByteTokenizer(), set_name) == agent_stamp(said, ByteTokenizer(), set_name)
    assert agent_stamp(by_set, ByteTokenizer(), set_name)["options"]["max_searches"] == searches
    assert agent_stamp(baseline("ra_agent"), ByteTokenizer(), set_name)["options"]["hops"] == hops


def test_a_baselines_own_temperature_is_that_of_the_stamp():
    assert agent_temperature(baseline("search_o1")) == 0.7
    assert agent_temperature(baseline("search_o1", temperature=None)) == server().temperature
    assert agent_temperature(baseline("rag")) == server().temperature


def test_a_model_that_is_given_to_the_baseline_itself_is_an_error_that_says_where_it_stands(line, capsys):
    assert main([*line, "agent=baseline/rag", "agent.checkpoint=x"]) != 0
    assert "agent.lm.checkpoint" in capsys.readouterr().err


def test_a_missing_value_is_named_with_its_whole_key(line, capsys):
    assert main([*line, "agent=baseline/zero_shot"]) != 0
    assert "agent.checkpoint has no value; give one: agent.checkpoint=..." in capsys.readouterr().err


def test_a_question_that_the_server_refuses_is_scored_like_all_others_also_in_a_resumed_run(scripted_lm, line, tmp_path):
    def refuses(body):
        return (400, "this content is not allowed") if "Marie Curie?" in body["messages"][-1]["content"] else None

    with scripted_lm.serving_lm(lambda prompt: "<answer>Paris</answer>", refuses=refuses) as (url, _):
        words = ["agent=baseline/rag", "agent@agent.lm=server", f"agent.lm.url={url}", "agent.lm.protocol=chat"]
        assert main([*line, *words, "questions=1"]) == 0  # nothing else was asked that worked
        assert main(["eval", f"resume={tmp_path / 'run'}", "questions=null"]) == 0
    rows = [json.loads(row) for row in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["", "", "Paris", "Paris", "Paris"]
    assert [row["metrics"]["failed_calls"] for row in rows] == [1, 1, 0, 0, 0]
    assert [row["metrics"]["answered"] for row in rows] == [0, 0, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ra_agent", "search_o1"])
def test_a_small_model_plays_what_is_made_for_long_replies(line, tmp_path, name):
    assert main([*line, f"agent=baseline/{name}", "questions=1", "agent.options.max_turns=2"]) == 0
    [row] = (tmp_path / "run" / "scores.jsonl").read_text().splitlines()
    assert json.loads(row)["metrics"]["failed_calls"] == 0


def test_a_run_through_a_chat_server(scripted_lm, line, tmp_path):
    def answer(prompt):
        return "<think>It says so.</think><answer>Vistula</answer>" if "Marie Curie?" in prompt else "<answer>Paris</answer>"

    with scripted_lm.serving_lm(answer) as (url, bodies):
        words = [
            "agent=baseline/rag",
            "agent@agent.lm=server",
            f"agent.lm.url={url}",
            "agent.lm.protocol=chat",
            "agent.lm.model=some/model",
        ]
        assert main([*line, *words, "env.top_k=1"]) == 0
    assert {body["model"] for body in bodies} == {"some/model"}
    assert {body["temperature"] for body in bodies} == {0.0}
    assert len(bodies) == 5
    run = tmp_path / "run"
    stamp = json.loads((run / "stamp.json").read_text())
    assert (stamp["max_turns"], stamp["agent"]["method"], stamp["agent"]["lm"]["model"]) == (2, "rag", "some/model")
    rows = [json.loads(row) for row in (run / "scores.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["Vistula", "Vistula", "Paris", "Paris", "Paris"]
    assert all(row["metrics"]["model_calls"] == 1 and row["metrics"]["prompt_tokens"] > 0 for row in rows)
    assert all(row["turns"][0]["content"] == row["question"] for row in rows)


@pytest.mark.parametrize("name", ["direct", "cot", "rag"])
def test_a_run_with_the_shipped_model_whatever_it_says(line, tmp_path, name):
    assert main([*line, f"agent=baseline/{name}", "agent.options.max_tokens=8", "questions=2"]) == 0
    [first, _] = load_trajectories(next((tmp_path / "run").glob("**/trajectories/**/*.jsonl*")))
    assert first.usage["calls"] == 1
    assert 1 <= first.usage["generated_tokens"] <= 8
    assert first.terminated


def test_a_baseline_of_ones_own(line, tmp_path, monkeypatch, scripted_lm):
    (tmp_path / "my_baselines.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass

            from searchqa_agents.baselines.base import Baseline
            from searchqa_agents.scripted import Ask


            @dataclass(frozen=True)
            class Config:
                words: int = 10


            def keywords(config):
                def script(task):
                    reply = yield Ask((("user", f"Keywords to search for: {task.question.question}"),), config.words)
                    info = yield task.segment("search", reply.text)
                    title = info["turn_record"].passages[0].title
                    yield task.segment("answer", title, thought=f"I searched for {reply.text}.")

                return script


            BASELINES = (Baseline("keywords", "searches for keywords", Config, keywords, turns=lambda config, set_name: 2),)
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    with scripted_lm.serving_lm(lambda prompt: "Vistula") as (url, bodies):
        words = ["agent=baseline/direct", "agent.method=my_baselines:keywords", "agent.options={words: 3}"]
        assert main([*line, *words, "agent@agent.lm=server", f"agent.lm.url={url}", "agent.lm.protocol=completions", "questions=1"]) == 0
    assert [(body["prompt"], body["max_tokens"]) for body in bodies] == [
        ("Keywords to search for: On which river lies the birthplace of Marie Curie?", 3)
    ]
    [row] = [json.loads(row) for row in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert row["answer"] == "Vistula"
    assert row["turns"][0]["content"] == "Vistula"


def test_a_small_model_on_a_cpu_is_measured_in_float64_unless_the_line_says_otherwise(tmp_path):
    assert measuring_dtype("auto", "cpu", "shipped") == "float64"
    assert measuring_dtype("float32", "cpu", "shipped") == "float32"
    assert measuring_dtype("auto", "cuda", "shipped") == "float32"
    assert measuring_dtype("auto", "cpu", "owner/model") == "float32"
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(201 << 20)
    assert measuring_dtype("auto", "cpu", str(tmp_path)) == "float32"
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")  # the weights beside it are not all
    assert measuring_dtype("auto", "cpu", str(tmp_path)) == "float32"
    assert chosen_dtype("float64", measuring=True).itemsize == 8
    for measuring in (False, True):
        with pytest.raises(ConfigurationError, match="dtype must be float32"):
            chosen_dtype("float16" if measuring else "float64", measuring=measuring)
