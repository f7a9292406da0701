"""A baseline says the same with a model in this process and behind a real OpenAI-compatible server: ``transformers serve`` with a tiny model."""

import gymnasium as gym
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents.baselines.base import get_baseline
from searchqa_agents.baselines.direct import ZERO_SHOT_SYSTEM
from searchqa_agents.completion_server import CompletionServerLM
from searchqa_agents.policy import Policy
from searchqa_agents.rollout import rollout
from searchqa_agents.scripted import Ask, ScriptedAgent
from searchqa_agents.writer import Writer, as_text
from searchqa_envs.datasets import load_source
from searchqa_envs.tokenizers import build_tokenizer

pytestmark = pytest.mark.slow
CHAT_TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}[end]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def messages_of(question):
    return (("system", ZERO_SHOT_SYSTEM), ("user", f"Question: {question.question}"))


def says(question):
    return f"{question.golden_answers[0]}. So it is."


@pytest.fixture(scope="module")
def questions(small_data):
    source = load_source("hotpotqa", split="all", data_dir=small_data)
    return [source[index] for index in range(len(source))]


@pytest.fixture(scope="module")
def model_folder(questions, tmp_path_factory):
    """A byte-level BPE tokenizer with a chat template, and a Llama trained until it answers five questions, in the template and as text."""
    chats = ["".join(f"[{role}]{text}[end]" for role, text in (*messages_of(q), ("assistant", says(q)))) for q in questions]
    plain = [f"{as_text(messages_of(q))}{says(q)}[end]" for q in questions]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["[end]", "[pad]", "[user]", "[assistant]", "[system]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        chats, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[end]", pad_token="[pad]", chat_template=CHAT_TEMPLATE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
            )
        )  # fmt: skip
    batch = tokenizer(chats + plain, return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for _ in range(150):
        loss = model(**batch, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return build_tokenizer(str(model_folder))


@pytest.fixture
def here(model_folder, tokenizer):
    return Writer(Policy.load(model_folder, tokenizer), tokenizer, temperature=0.0)


@pytest.fixture(params=["chat", "completions"])
def there(request, server, model_folder, tokenizer):
    lm = CompletionServerLM(server, tokenizer, "search-r1", protocol=request.param, model=str(model_folder), concurrency=1)
    yield Writer(lm, tokenizer, temperature=0.0)
    lm.close()


def answers(small_data, tokenizer, writer):
    venv = gym.make_vec(
        "SearchQA-HotpotQA-v0",
        num_envs=5,
        autoreset_mode="DISABLED",
        data_dir=small_data,
        split="all",
        tokenizer=tokenizer,
        max_context_tokens=9000,
    )
    baseline = get_baseline("direct")
    episodes = rollout(venv, ScriptedAgent.for_env(baseline.make(baseline.configured({"max_tokens": 40})), venv, writer), range(5))
    return [episode.answer for episode in episodes]


def test_direct_answers_alike(small_data, tokenizer, questions, here, there):
    learnt = [says(question) for question in questions]
    assert answers(small_data, tokenizer, here) == learnt
    assert answers(small_data, tokenizer, there) == learnt


def test_stop_strings_and_lengths_alike(questions, here, there):
    for max_tokens, stop in ((40, (". So",)), (40, ("is", ".")), (3, ()), (40, ("nowhere",))):
        asks = [Ask(messages_of(question), max_tokens, stop) for question in questions]
        ours, theirs = here.write(asks, range(5)), there.write(asks, range(5))
        assert [reply.text for reply in theirs] == [reply.text for reply in ours]
        assert [reply.finished for reply in theirs] == [reply.finished for reply in ours]
        assert {reply.stop for reply in theirs} <= {None, *stop}
