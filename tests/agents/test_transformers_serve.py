"""Real episodes on a real OpenAI-compatible server: ``transformers serve`` with a tiny model that has learnt five episodes by heart."""

from itertools import pairwise

import gymnasium as gym
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents.cli import main
from searchqa_agents.completion_server import CompletionServerLM
from searchqa_agents.rollout import rollout
from searchqa_agents.scripted import ScriptedAgent
from searchqa_agents.trajectory import load_trajectories

CHAT_TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}[end]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
QUESTIONS = 5


def environment(small_data):
    folder = small_data / "hotpotqa"
    return gym.make_vec(
        "SearchQA-Custom-v0",
        num_envs=QUESTIONS,
        autoreset_mode="DISABLED",
        questions=str(folder / "questions.jsonl"),
        corpus=str(folder / "corpus.jsonl.gz"),
        prompt="bare",
        top_k=1,
        max_observation_tokens=400,
        max_segment_tokens=120,
        max_context_tokens=2000,
    )


@pytest.fixture(scope="module")
def demonstrations(small_data):
    venv = environment(small_data)
    return rollout(venv, ScriptedAgent.for_env("search_once", venv), list(range(QUESTIONS)))


@pytest.fixture(scope="module")
def model_folder(demonstrations, tmp_path_factory):
    """A byte-level BPE tokenizer with a chat template, and a Llama trained until it repeats the demonstrations, as text and as chat."""
    plain, chats = [], []
    for t in demonstrations:
        parts = [t.prompt, *(text for turn in t.turns for text in (turn.segment, turn.observation))]
        plain.append("".join(parts) + "[end]")
        chats.append("".join(f"[{'assistant' if i % 2 else 'user'}]{part}[end]" for i, part in enumerate(parts[:-1])))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["[end]", "[pad]", "[user]", "[assistant]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(plain, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[end]", pad_token="[pad]", chat_template=CHAT_TEMPLATE)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
            )
        )  # fmt: skip
    batch = tokenizer(plain + chats, return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for _ in range(200):
        loss = model(**batch, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss < 0.02:
            break
    assert loss < 0.1
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("protocol", ["completions", "chat"])
def test_episodes_of_a_served_model_are_those_it_was_trained_on(server, model_folder, demonstrations, small_data, protocol):
    venv = environment(small_data)
    lm = CompletionServerLM(server, venv.unwrapped.tokenizer, venv.unwrapped.dialect, protocol=protocol, model=str(model_folder), retries=0)
    trajectories = rollout(venv, lm, list(range(QUESTIONS)), temperature=0)
    lm.close()
    for trajectory, demonstration in zip(trajectories, demonstrations, strict=True):
        assert [turn.action for turn in trajectory.turns] == ["search", "answer"]
        assert (trajectory.token_ids == demonstration.token_ids).all()
        assert trajectory.retokenized
        assert trajectory.logprobs is None
        assert all(a.end == b.start for a, b in pairwise(trajectory.turns))


@pytest.mark.parametrize(("agent", "protocol"), [("server", "completions"), ("baseline/zero_shot_server", "chat")])
def test_eval_from_the_command_line(server, model_folder, demonstrations, small_data, tmp_path, agent, protocol):
    folder = small_data / "hotpotqa"
    line = ["env=custom", f"env.questions={folder / 'questions.jsonl'}", f"env.corpus={folder / 'corpus.jsonl.gz'}", "env.prompt=bare"]
    budgets = ["env.top_k=1", "env.max_observation_tokens=400", "env.max_segment_tokens=120", "env.max_context_tokens=2000", "save=null"]
    served = [f"agent={agent}", f"agent.url={server}", f"agent.protocol={protocol}", f"agent.model={model_folder}", "agent.temperature=0"]
    assert main(["eval", *line, *served, *budgets, f"run_dir={tmp_path / 'run'}"]) == 0
    played = load_trajectories(tmp_path / "run" / "trajectories" / "eval.jsonl.gz")
    assert [t.token_ids.tolist() for t in played] == [t.token_ids.tolist() for t in demonstrations]
    assert all(t.answer is not None and t.turns[0].passages for t in played)
