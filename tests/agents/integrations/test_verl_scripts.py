"""The launch scripts: every override that they give exists in verl's own configuration, and passes verl's own checks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = [
    ROOT / "scripts" / "verl" / "train.sh",
    ROOT / "scripts" / "verl" / "several_machines.sh",
    ROOT / "scripts" / "engines_environment.sh",
]
ALGORITHMS = ("ppo", "grpo", "reinforce_plus_plus")
pytestmark = pytest.mark.skipif(not SCRIPTS[0].exists() or shutil.which("bash") is None, reason="needs bash and the repository's scripts")


def launched(tmp_path, *arguments, **variables):
    """The overrides with which a script starts verl."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/bash\nif [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), **variables}
    done = subprocess.run(["bash", str(SCRIPTS[0]), *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    first, second, *overrides = done.stdout.splitlines()
    assert (first, second) == ("-m", "verl.trainer.main_ppo")
    return overrides


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_bash(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_variables_and_overrides_on_the_line_win(algorithm, tmp_path):
    overrides = launched(tmp_path, algorithm, "trainer.save_freq=7", MODEL="Qwen/Qwen2.5-7B", ACTOR_LR="3e-6", NODES="4")
    assert overrides[-1] == "trainer.save_freq=7"
    assert {"actor_rollout_ref.model.path=Qwen/Qwen2.5-7B", "actor_rollout_ref.actor.optim.lr=3e-6", "trainer.nnodes=4"} <= set(overrides)
    [loops] = [override for override in overrides if "agent_loop_config_path" in override]
    assert Path(loops.partition("=")[2]).is_file()


def test_an_unknown_algorithm_is_refused():
    done = subprocess.run(
        ["bash", str(SCRIPTS[0]), "dpo"], env={**os.environ, "AGENT_LOOPS": "x"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "must be ppo, grpo or reinforce_plus_plus" in done.stderr


def several_machines(tmp_path, **variables):
    """What one machine does, with Ray and verl replaced by stubs: its end, and the calls of ``ray`` and ``python``."""
    calls = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    for name in ("ray", "python"):
        stub = tmp_path / "bin" / name
        stub.write_text(f'#!/bin/bash\necho {name} "$@" >> {calls}\n[ "$1" != status ]\n')
        stub.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": "python", "AGENT_LOOPS": "loops.yaml", "HOME": str(tmp_path), **variables}
    environment = {name: value for name, value in environment.items() if value is not None}
    done = subprocess.run(["bash", str(SCRIPTS[1]), "grpo"], env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done, calls.read_text().splitlines() if calls.exists() else []


TWO = {"NODES": "2", "HEAD": "first", "RAY_AUTH_TOKEN": "0" * 64, "RAY_AUTH_MODE": None}


def test_the_first_machine_waits_for_the_others_and_trains_on_all(tmp_path):
    done, calls = several_machines(tmp_path, NODE_RANK="0", **TWO)
    assert done.returncode == 0, done.stderr
    assert calls[0] == "ray start --head --port=6379 --num-gpus=8"
    assert calls[1] == "python - 2 600"
    assert calls[2].startswith("python -m verl.trainer.main_ppo")
    assert " trainer.nnodes=2 " in calls[2]
    assert calls[3:] == ["ray stop"]


def test_another_machine_joins_and_leaves_when_the_first_has_gone(tmp_path):
    done, calls = several_machines(tmp_path, NODE_RANK="1", **TWO)
    assert done.returncode == 0, done.stderr
    assert calls == ["ray start --address=first:6379 --num-gpus=8", "ray status --address=first:6379", "ray stop"]


def test_machines_without_a_common_token_do_not_start(tmp_path):
    done, calls = several_machines(tmp_path, NODE_RANK="0", **{**TWO, "RAY_AUTH_TOKEN": None})
    assert done.returncode == 2
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert not calls


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_verl_accepts_what_the_script_gives(algorithm, byte_tokenizer, tmp_path):
    pytest.importorskip("verl", reason="needs verl, which needs an environment of its own: make test-engines")
    import verl.trainer.config
    from hydra import compose, initialize_config_dir
    from transformers import LlamaConfig
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    byte_tokenizer.save_pretrained(tmp_path / "model")
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "model")
    overrides = launched(tmp_path, algorithm, MODEL=str(tmp_path / "model"), NODES="2")
    with initialize_config_dir(str(Path(verl.trainer.config.__file__).parent), version_base=None):
        config = compose("ppo_trainer", overrides=overrides)  # raises for a key that is not there
    validate_config(config, need_reference_policy(config), need_critic(config))
    assert need_critic(config) == (algorithm == "ppo")
    assert need_reference_policy(config)
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    assert config.algorithm.adv_estimator == {"ppo": "gae"}.get(algorithm, algorithm)
    assert (config.algorithm.use_kl_in_reward, actor.use_kl_loss) == (algorithm != "grpo", algorithm == "grpo")
    assert config.data.train_batch_size % actor.ppo_mini_batch_size == 0
    assert rollout.max_model_len == rollout.prompt_length + rollout.response_length


def test_no_response_is_cut_with_the_scripts_lengths_and_every_agent_loop_can_be_made(tmp_path):
    from omegaconf import OmegaConf

    import searchqa_agents
    from searchqa_envs.configuration import build_rules

    entries = OmegaConf.to_container(OmegaConf.load(Path(searchqa_agents.__file__).parent / "integrations" / "verl_agent_loops.yaml"))
    assert [entry["name"] for entry in entries] == ["searchqa", "searchqa-r1-searcher", "searchqa-zerosearch"]
    [length] = [int(o.partition("=")[2]) for o in launched(tmp_path, "ppo") if o.startswith("data.max_response_length=")]
    for entry in entries:
        assert entry["_target_"] == "searchqa_agents.integrations.verl.SearchQAAgentLoop"
        questions, corpus = [{"id": "q", "question": "Q?", "golden_answers": ["A"]}], [{"id": "p", "contents": '"T"\ntext'}]
        rules = build_rules("custom", questions=questions, corpus=corpus, **entry["env"])
        assert rules.max_context_tokens <= length
