"""Simulated search on a real OpenAI-compatible server: ``transformers serve`` with a tiny model that has learnt its documents by heart."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from searchqa_retrievers import Corpus, SearchRequest, build_retriever

pytestmark = pytest.mark.slow

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{% if message.content is string %}{{ message.content }}{% else %}"
    "{{ message.content[0].text }}{% endif %}[end]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
PLANTS = ("oak", "elm", "fir")
PROMPT = "{quality} {query}"


def documents(plant, quality):
    return f"Doc 1: {quality} {plant} is tall. Doc 2: {plant} grows."


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Bytes, a chat template, and a Llama trained until it repeats the documents."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    controls = ["[end]", "[pad]", "[user]", "[assistant]", "[system]"]
    backend = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(controls)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[end]", pad_token="[pad]", chat_template=CHAT_TEMPLATE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
            )
        )  # fmt: skip
    chats = [
        f"[system][end][user]{quality} {plant}[end][assistant]{documents(plant, quality)}[end]"
        for plant in PLANTS
        for quality in ("useful", "noisy")
    ]
    batch = tokenizer(chats, return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, ids in zip(labels, batch["input_ids"], strict=True):
        row[: ids.tolist().index(tokenizer.convert_tokens_to_ids("[assistant]")) + 1] = -100
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for _ in range(300):
        loss = model(**batch, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss < 0.01:
            break
    assert loss < 0.05
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("probability", "quality"), [(0, "useful"), (1, "noisy")])
def test_a_server_and_a_local_model_give_the_documents_that_were_learnt(server, model_folder, probability, quality):
    options = {
        "name": "simulated",
        "prompt": PROMPT,
        "max_tokens": 80,
        "temperature": 0,
        "noise": {"start": probability, "end": probability},
    }
    nothing = Corpus.from_passages([])
    there = build_retriever({**options, "url": server, "model": str(model_folder)}, nothing)
    here = build_retriever({**options, "checkpoint": str(model_folder)}, nothing)
    requests = [SearchRequest(plant, top_k) for plant in PLANTS for top_k in (1, 2)]
    answers = there.search(requests)
    there.close()
    assert [[hit.passage.text for hit in hits] for hits in answers] == [
        [f"{quality} {request.query} is tall.", f"{request.query} grows."][: request.top_k] for request in requests
    ]
    assert here.search(requests) == answers
