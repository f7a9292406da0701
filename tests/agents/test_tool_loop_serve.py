"""Calls of tools by a real model on a real server: ``transformers serve`` with a tiny Qwen2 that has learnt five conversations by heart."""

import json

import gymnasium as gym
import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents.completion_server import CompletionServerLM
from searchqa_agents.rollout import rollout
from searchqa_agents.scripted import ScriptedAgent
from searchqa_agents.tool_loop import TOOLS, ToolLoop

QUESTIONS = 5
# Calls and results as in the chat template of Qwen2.5 (the format of Hermes), which the server reads back into tool calls.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.tool_calls %}
{{- '<|im_start|>assistant' }}
{%- for call in message.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- if message.role == 'system' %}{% for tool in tools or [] %}{{ '\\n' + tool.function.name }}{% endfor %}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""


def arguments(small_data):
    folder = small_data / "hotpotqa"
    files = {"questions": str(folder / "questions.jsonl"), "corpus": str(folder / "corpus.jsonl.gz")}
    return {**files, "top_k": 1, "max_observation_tokens": 400, "max_segment_tokens": 120, "max_context_tokens": 2000}


def calling(name, argument, text):
    function = {"name": name, "arguments": json.dumps({argument: text})}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}


@pytest.fixture(scope="module")
def conversations(small_data):
    """What ``search_once`` does, as messages."""
    loop = ToolLoop(gym.make("SearchQA-Custom-v0", **arguments(small_data)))
    conversations = []
    for question in range(QUESTIONS):
        messages = loop.reset(options={"index": question})
        messages += loop.step(calling("search", "query", loop.info["question"]))[0]
        messages += loop.step(calling("answer", "answer", loop.info["turn_record"].passages[0].title))[0]
        conversations.append(messages[:-1])
    return conversations


def written(ids, tokenizer):
    """Labels int64[T]: the ids of the assistant's messages with their ends, -100 elsewhere."""
    opening = tokenizer.encode("<|im_start|>assistant\n")
    labels, inside = torch.full_like(ids, -100), False
    for place in range(len(ids)):
        if inside:
            labels[place] = ids[place]
            inside = ids[place] != tokenizer.eos_token_id
        else:
            inside = ids[place + 1 - len(opening) : place + 1].tolist() == opening
    return labels


@pytest.fixture(scope="module")
def model_folder(conversations, tmp_path_factory):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([json.dumps(message, ensure_ascii=False) for messages in conversations for message in messages], trainer)
    config = Qwen2Config(
        vocab_size=backend.get_vocab_size(), hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, eos_token_id=backend.token_to_id("<|im_end|>"),
        pad_token_id=backend.token_to_id("<|endoftext|>"), bos_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("served")
    config.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)  # as the server reads it: with Qwen2's own way of splitting text
    texts = []
    for messages in conversations:
        read = json.loads(json.dumps(messages))
        for message in read:
            for call in message.get("tool_calls", []):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        texts.append(tokenizer.apply_chat_template(read, tools=TOOLS, tokenize=False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = torch.stack([written(ids, tokenizer) for ids in batch["input_ids"]])
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for _ in range(300):
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
        if losses.max() < 0.1:  # every single token is sure: one that is not would decide a query
            break
        optimiser.zero_grad()
        (losses.sum() / (labels != -100).sum()).backward()
        optimiser.step()
    assert losses.max() < 0.5
    model.save_pretrained(folder)
    return folder


def test_a_served_model_calls_the_tools_as_it_has_learnt(server, model_folder, small_data):
    """Evaluated through the server, its episodes are those of ``search_once``, id by id."""
    venv = gym.make_vec("SearchQA-Custom-v0", num_envs=QUESTIONS, autoreset_mode="DISABLED", **arguments(small_data))
    lm = CompletionServerLM(server, venv.unwrapped.tokenizer, venv.unwrapped.dialect, protocol="tools", model=str(model_folder), retries=0)
    trajectories = rollout(venv, lm, list(range(QUESTIONS)), temperature=0)
    lm.close()
    scripted = rollout(venv, ScriptedAgent.for_env("search_once", venv), list(range(QUESTIONS)))
    for trajectory, script in zip(trajectories, scripted, strict=True):
        assert [turn.action for turn in trajectory.turns] == ["search", "answer"]
        assert (trajectory.token_ids == script.token_ids).all()
        assert trajectory.retokenized


def test_the_openai_client_drives_a_served_model(server, model_folder, conversations, small_data):
    loop = ToolLoop(gym.make("SearchQA-Custom-v0", **arguments(small_data)))
    messages, ended = loop.reset(options={"index": 1}), False
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        while not ended:
            [choice] = client.chat.completions.create(
                model=str(model_folder), messages=messages, tools=loop.tools, temperature=0, max_tokens=120
            ).choices
            new_messages, _, terminated, truncated, info = loop.step(choice.message, choice.finish_reason)
            messages += new_messages
            ended = terminated or truncated
    assert info["answer"] == json.loads(conversations[1][-1]["tool_calls"][0]["function"]["arguments"])["answer"]
    assert info["metrics"]["searches"] == 1
