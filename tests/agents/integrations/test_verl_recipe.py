"""`searchqa recipe verl`: what it writes says what the configuration says, verl's own configuration accepts it, and the rest is refused or listed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from pyarrow import parquet
from transformers import LlamaConfig

from searchqa_agents.cli import main
from searchqa_agents.integrations import verl_recipe as module
from searchqa_agents.rollout import draw_questions
from searchqa_envs.configuration import build_rules, build_source

QUESTIONS = [{"id": f"q{number}", "question": f"Question {number}?", "golden_answers": [f"answer {number}"]} for number in range(12)]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the script that is written needs bash")


@pytest.fixture(autouse=True)
def _no_hydra_left():
    yield
    GlobalHydra.instance().clear()


@pytest.fixture(scope="module")
def model_folder(byte_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer.save_pretrained(folder)
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def write_recipe(folder, *words):
    assert main(["recipe", "verl", "--out", str(folder), *words]) == 0
    return folder


def overrides_of(folder, *arguments, **variables):
    """The overrides with which the written script starts verl."""
    stub = folder / "python"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), **variables}
    done = subprocess.run(
        ["bash", str(folder / "train.sh"), *arguments], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    first, second, *overrides = done.stdout.splitlines()
    assert (first, second) == ("-m", "verl.trainer.main_ppo")
    return overrides


ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
EXPECTED = {
    "search_r1_ppo": {
        "algorithm.adv_estimator": "gae",
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_penalty": "kl",
        "algorithm.kl_ctrl.kl_coef": 0.001,
        f"{ACTOR}.use_kl_loss": False,
        f"{ACTOR}.optim.lr": 1e-6,
        f"{ACTOR}.optim.lr_warmup_steps_ratio": 0.285,
        f"{ACTOR}.ppo_mini_batch_size": 256,
        "critic.optim.lr": 1e-5,
        "critic.optim.lr_warmup_steps_ratio": 0.015,
        "critic.cliprange_value": 0.5,
        "critic.ppo_mini_batch_size": 256,
        f"{ROLLOUT}.n": 1,
        f"{ROLLOUT}.top_p": 1.0,
        "algorithm.rollout_correction.rollout_is": None,
        "trainer.total_training_steps": 1005,
    },
    "search_r1_grpo_v0_3": {
        "algorithm.adv_estimator": "grpo",
        "algorithm.norm_adv_by_std_in_grpo": True,
        "algorithm.use_kl_in_reward": False,
        f"{ACTOR}.use_kl_loss": True,
        f"{ACTOR}.kl_loss_coef": 0.001,
        f"{ACTOR}.kl_loss_type": "low_var_kl",
        f"{ACTOR}.optim.lr": 5e-7,
        f"{ACTOR}.entropy_coeff": 0.001,
        f"{ACTOR}.ppo_mini_batch_size": 64,  # 8 updates of 64 x 5 sequences; 10 of 51.2 x 5 cannot be
        f"{ROLLOUT}.n": 5,
        f"{ROLLOUT}.top_p": 0.95,
        f"{ROLLOUT}.top_k": -1,
        "algorithm.rollout_correction.rollout_is": "token",
        "algorithm.rollout_correction.rollout_is_threshold": 2.0,
        "data.max_response_length": 4596,
        "data.train_batch_size": 512,
    },
    "zerosearch_grpo": {
        "algorithm.adv_estimator": "grpo",
        f"{ACTOR}.optim.lr_warmup_steps_ratio": 0.95,
        f"{ACTOR}.ppo_mini_batch_size": 32,
        "data.train_batch_size": 64,
        "trainer.total_training_steps": 203,
        "trainer.save_freq": 50,
    },
    "zerosearch_reinforce_plus_plus": {
        "algorithm.adv_estimator": "reinforce_plus_plus",
        "algorithm.use_kl_in_reward": True,
        f"{ACTOR}.use_kl_loss": False,
        f"{ROLLOUT}.n": 5,
    },
    "r1_searcher_qwen": {
        "algorithm.adv_estimator": "reinforce_plus_plus_baseline",
        "algorithm.use_kl_in_reward": False,
        f"{ACTOR}.use_kl_loss": False,
        f"{ACTOR}.optim.betas": [0.9, 0.95],
        f"{ACTOR}.optim.weight_decay": 0.0,
        f"{ACTOR}.optim.lr": 2e-6,
        f"{ACTOR}.optim.lr_scheduler_type": "constant",
        f"{ACTOR}.entropy_coeff": 0.0,
        f"{ACTOR}.ppo_mini_batch_size": 16,
        f"{ROLLOUT}.n": 16,
        f"{ROLLOUT}.max_model_len": 2048 + 13824,
    },
    "r1_searcher_llama_stage1": {
        "algorithm.adv_estimator": "grpo",
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_ctrl.kl_coef": 1e-4,
        f"{ACTOR}.use_kl_loss": False,
        f"{ACTOR}.ppo_mini_batch_size": 5,  # 3 updates; 4 of 3.75 groups cannot be
    },
}
ALWAYS = {
    f"{ACTOR}.clip_ratio": 0.2,
    f"{ACTOR}.clip_ratio_low": 0.2,
    f"{ACTOR}.clip_ratio_high": 0.2,
    f"{ACTOR}.clip_ratio_c": 1e6,
    f"{ACTOR}.optim.clip_grad": 1.0,
    f"{ACTOR}.loss_agg_mode": "token-mean",
    f"{ACTOR}.ppo_epochs": 1,
    f"{ACTOR}.fsdp_config.model_dtype": "fp32",
    f"{ACTOR}.fsdp_config.dtype": "bfloat16",
    "actor_rollout_ref.model.enable_gradient_checkpointing": True,
    f"{ROLLOUT}.temperature": 1.0,
    f"{ROLLOUT}.calculate_log_probs": True,
    f"{ROLLOUT}.skip_tokenizer_init": False,
    f"{ROLLOUT}.agent.default_agent_loop": "searchqa",
    "data.max_prompt_length": 2048,
    "trainer.use_v1": True,
}


@pytest.mark.parametrize("recipe", EXPECTED)
def test_verls_own_configuration_accepts_a_recipe_and_has_its_values(recipe, model_folder, tmp_path):
    pytest.importorskip("verl", reason="needs verl, which needs an environment of its own: make test-engines")
    import verl.trainer.config
    from hydra import compose, initialize_config_dir
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    folder = write_recipe(tmp_path / "recipe", f"recipe=published/{recipe}", f"start={model_folder}")
    overrides = overrides_of(folder, NODES="1", GPUS="4")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(Path(verl.trainer.config.__file__).parent), version_base=None):
        config = compose("ppo_trainer", overrides=overrides)  # raises for a key that is not there
    validate_config(config, need_reference_policy(config), need_critic(config))
    assert need_critic(config) == ("ppo" in recipe)
    for key, value in {**ALWAYS, **EXPECTED[recipe]}.items():
        assert OmegaConf.select(config, key) == value, key
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    assert config.actor_rollout_ref.model.path == str(model_folder)
    assert actor.ppo_max_token_len_per_gpu >= rollout.max_model_len == rollout.prompt_length + rollout.response_length
    assert config.data.train_batch_size % actor.ppo_mini_batch_size == 0
    assert config.data.train_files == str(folder / "train.parquet")
    assert Path(rollout.agent.agent_loop_config_path) == folder / "agent_loops.yaml"


def test_adapters_are_verls_adapters(model_folder, tmp_path):
    folder = write_recipe(tmp_path / "recipe", "recipe=published/search_r1_grpo_lora", f"start={model_folder}")
    overrides = overrides_of(folder)
    wanted = {"lora_rank=32", "lora_alpha=64", "target_modules=all-linear"}
    assert {f"actor_rollout_ref.model.{word}" for word in wanted} <= set(overrides)
    assert f"{ACTOR}.fsdp_config.model_dtype=bf16" in overrides


@pytest.mark.parametrize("recipe", ["search_r1_grpo_v0_3", "zerosearch_ppo", "r1_searcher_qwen"])
def test_the_agent_loops_play_the_configured_environment_and_evaluation_its_own(recipe, model_folder, tmp_path):
    folder = write_recipe(tmp_path / "recipe", f"recipe=published/{recipe}", f"start={model_folder}")
    train, evaluation = OmegaConf.to_container(OmegaConf.load(folder / "agent_loops.yaml"))
    assert (train["name"], evaluation["name"]) == ("searchqa", "searchqa-evaluation")
    rules = [build_rules("custom", **{**loop["env"], "questions": QUESTIONS}) for loop in (train, evaluation)]
    response = next(word for word in overrides_of(folder) if word.startswith("data.max_response_length="))
    assert all(one.max_context_tokens <= int(response.partition("=")[2]) for one in rules)
    top_k = {"search_r1_grpo_v0_3": (3, 3), "zerosearch_ppo": (5, 5), "r1_searcher_qwen": (3, 5)}
    assert tuple(one.top_k for one in rules) == top_k[recipe]
    simulated = tuple(bool(getattr(one.retriever, "needs_gold", False)) for one in rules)
    assert simulated == ((True, False) if recipe == "zerosearch_ppo" else (False, False))
    if recipe == "search_r1_grpo_v0_3":
        assert train["env"]["reward"] == {"name": "search_r1_format", "structure_score": 0.2, "final_score": 0.1, "retrieval_score": 0.0}


def test_rows_are_the_training_questions_and_the_evaluations_own_draw(model_folder, tmp_path):
    train, test = (tmp_path / f"{name}.jsonl" for name in ("mine", "held_out"))
    for path in (train, test):
        path.write_text("".join(json.dumps({**row, "id": f"{path.stem}-{row['id']}"}) + "\n" for row in QUESTIONS))
    chosen = tmp_path / "chosen.jsonl"
    chosen.write_text('{"id": "mine-q3"}\n{"id": "mine-q7"}\n')
    folder = write_recipe(
        tmp_path / "recipe",
        "--rows",
        "recipe=published/r1_searcher_qwen",
        f"start={model_folder}",
        f"env.questions={train}",
        f"questions={chosen}",
        f"evaluation.env.questions={test}",
        "evaluation.questions=5",
    )
    rows = parquet.read_table(folder / "train.parquet").to_pylist()
    assert {row["extra_info"]["question_id"] for row in rows} == {"mine-q3", "mine-q7"}
    assert {row["agent_name"] for row in rows} == {"searchqa"}
    assert rows[0]["prompt"][0]["content"].endswith("Assistant: <think>")  # the dialect's prompt
    held_out = parquet.read_table(folder / "test.parquet").to_pylist()
    source = build_source("custom", "all", None, {"questions": str(test)})
    assert {row["extra_info"]["index"] for row in held_out} == set(draw_questions(source, 5, seed=1000))
    assert {row["agent_name"] for row in held_out} == {"searchqa-evaluation"}
    [train_loop, evaluation_loop] = OmegaConf.load(folder / "agent_loops.yaml")
    assert (train_loop.env.questions, evaluation_loop.env.questions) == (str(train), str(test))


def test_verls_data_set_and_worker_play_what_was_written(model_folder, byte_tokenizer, tmp_path):
    engine = pytest.importorskip(
        "verl.experimental.agent_loop.agent_loop", reason="needs verl, which needs an environment of its own: make test-engines"
    )
    import verl.trainer.config
    from hydra import compose, initialize_config_dir
    from verl.protocol import DataProto
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
    from verl.workers.rollout.llm_server import LLMServerClient
    from verl.workers.rollout.replica import TokenOutput

    class SameAnswer(LLMServerClient):
        """In the place of verl's client: answers every question alike."""

        def __init__(self):
            pass

        async def generate(self, request_id, *, prompt_ids, sampling_params, **kwargs):
            ids = byte_tokenizer.encode(" easy </think>\n\n<answer> answer 3 </answer>", add_special_tokens=False)
            return TokenOutput(token_ids=ids, log_probs=[-1.0] * len(ids), stop_reason="completed")

    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    folder = write_recipe(
        tmp_path / "recipe",
        "--rows",
        "recipe=published/r1_searcher_qwen",
        f"start={model_folder}",
        f"env.questions={questions}",
        f"evaluation.env.questions={questions}",
        "env.retriever=none",
        "env.max_context_tokens=4000",
        "evaluation.questions=3",
    )
    overrides = overrides_of(folder)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(Path(verl.trainer.config.__file__).parent), version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    worker = engine.AgentLoopWorker(config, SameAnswer())
    for file, count in ((config.data.train_files, 12), (config.data.val_files, 3)):
        dataset = RLHFDataset(file, byte_tokenizer, config.data)
        rows = [dataset[index] for index in range(len(dataset))]
        output = asyncio.run(worker.generate_sequences(DataProto.from_single_dict(collate_fn(rows))))
        asked = [row["extra_info"]["question_id"] for row in rows]
        assert len(asked) == count
        rewards = dict(zip(asked, output.batch["rm_scores"].sum(-1).tolist(), strict=True))
        assert rewards == {question: 1.0 if question == "q3" else 0.5 for question in asked}  # R1-Searcher's F1 with "answer 3"


REFUSED = [
    (["recipe=published/r1_searcher_llama"], "stages: one run has one stage"),
    (["recipe=published/zerosearch_reinforce"], "no estimator like algo=reinforce"),
    (["recipe=published/search_r1_grpo", "algo.mask_environment=false"], "algo.mask_environment=false"),
    (["recipe=published/search_r1_grpo", "algo.dynamic_sampling=3"], "algo.dynamic_sampling"),
    (["recipe=published/search_r1_grpo", "algo.credit=turn"], "algo.credit=turn"),
    (["recipe=published/search_r1_grpo", "algo.schedule=linear"], "algo.schedule=linear"),
    (["recipe=published/search_r1_grpo", "algo.max_kl=0.1"], "algo.max_kl"),
    (["recipe=published/search_r1_grpo", "algo.token_weighting=constant-length", "algo.constant_length=100"], "algo.token_weighting"),
    (["recipe=published/search_r1_ppo", "algo.whiten=false"], "algo.whiten=false"),
    (["recipe=published/search_r1_ppo", "algo.critic=shared"], "algo.critic=shared"),
    (["recipe=published/r1_searcher_qwen", "algo.schedule_steps=200"], "its cosine ends with the training"),
    (["recipe=main"], "start=nothing: verl loads a published model"),
    (["recipe=published/search_r1_grpo", "--rows"], "give --out FOLDER"),
    (["recipe=published/search_r1_grpo", "-m", "seed=0,1"], "leave out -m"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_what_verl_cannot_do_is_refused_by_its_key(words, said, capsys):
    assert main(["recipe", "verl", *words]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_cosine_over_the_training_is_verls_cosine(model_folder, tmp_path):
    folder = write_recipe(tmp_path / "recipe", "recipe=published/r1_searcher_qwen", "algo.schedule_steps=null", f"start={model_folder}")
    overrides = overrides_of(folder)
    assert f"{ACTOR}.optim.lr_scheduler_type=constant" not in overrides
    assert {f"{ACTOR}.optim.lr_scheduler_type=cosine", f"{ACTOR}.optim.min_lr_ratio=0.1"} <= set(overrides)


def test_what_verl_does_in_another_way_is_said_and_stands_in_the_script(model_folder, tmp_path, capsys):
    folder = write_recipe(tmp_path / "recipe", "recipe=published/search_r1_grpo", f"start={model_folder}")
    said = capsys.readouterr().out
    assert "Updates per rollout: 8 of 64 whole groups each; here 10." in said
    assert "Updates per rollout: 8 of 64 whole groups each; here 10." in (folder / "train.sh").read_text()
    assert "the same line with --rows writes them" in said
    assert main(["recipe", "verl", "recipe=published/search_r1_ppo"]) == 0
    assert "algo.environment_tokens" in capsys.readouterr().out


def test_without_a_folder_the_overrides_are_printed_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipe", "verl", "recipe=published/search_r1_grpo", "llm=qwen2.5-3b", "algo.learning_rate=3e-6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"actor_rollout_ref.model.path=Qwen/Qwen2.5-3B", f"{ACTOR}.optim.lr=3e-06"} <= set(lines)
    assert list(tmp_path.iterdir()) == []


def test_variables_and_words_on_the_scripts_line_win_and_odd_paths_survive(model_folder, tmp_path):
    folder = write_recipe(tmp_path / "it's a recipe", "recipe=published/search_r1_grpo", f"start={model_folder}", r"name='my run, \'it\''")
    overrides = overrides_of(folder, "trainer.save_freq=7", GPUS="2", ROLLOUT="sglang")
    assert overrides[-1] == "trainer.save_freq=7"
    values = {parsed.key_or_group: parsed.value() for parsed in OverridesParser.create().parse_overrides(overrides)}
    assert (values["trainer.n_gpus_per_node"], values[f"{ROLLOUT}.name"], values["trainer.experiment_name"]) == (
        2,
        "sglang",
        "my run, 'it'",
    )
    assert values["data.train_files"] == str(folder / "train.parquet")
    assert values[f"{ROLLOUT}.agent.agent_loop_config_path"] == str(folder / "agent_loops.yaml")


def test_the_module_needs_no_verl():
    code = "import sys; import searchqa_agents.integrations.verl_recipe; sys.exit('verl' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
    assert module.VerlRecipe.__doc__
