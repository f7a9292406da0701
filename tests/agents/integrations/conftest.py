"""What stands behind an engine's ``generate`` in the tests of its adapter: a real model, and a real tokenizer of somebody else's kind."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import searchqa_envs  # noqa: F401, registers the ids
from searchqa_agents.language_model import Sampling, Segment, Session
from searchqa_agents.loading import shipped_checkpoint
from searchqa_agents.models import load_model
from searchqa_agents.rollout import episode_seed, rollout
from searchqa_agents.transformers_lm import BANNED, sample
from searchqa_envs.tokenizers import build_tokenizer
from searchqa_retrievers import Hit, Passage, RetrieverUnavailable


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A byte-level BPE tokenizer of transformers with a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["[end]", "[pad]"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["<search> what </search> <answer> the river </answer> <information> Doc 1(Title: river)"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="[end]",
        pad_token="[pad]",
        chat_template="{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}[assistant] ",
    )


class WrittenAtLength(Session):
    """Segments of a real model that does not stop at closing tags. A token's noise is a function of the episode's seed and the token's position."""

    def __init__(self, model, tokenizer, seeds, max_new_tokens):
        self.model, self.tokenizer, self.seeds, self.max_new_tokens = model, tokenizer, seeds, max_new_tokens
        self.written = []

    def submit(self, rows, contexts, infos):
        self.written += [(row, self.segment(self.seeds[row], context.tolist())) for row, context in zip(rows, contexts, strict=True)]

    def collect(self):
        written, self.written = self.written, []
        return written

    @torch.inference_mode()
    def segment(self, seed, context):
        ids, logprobs, fed, cache = [], [], context, None
        while len(ids) < self.max_new_tokens and self.tokenizer.eos_id not in ids:
            output = self.model(input_ids=torch.tensor([fed]), past_key_values=cache, use_cache=True)
            logits, cache = output.logits[:, -1].float(), output.past_key_values
            logits[:, self.tokenizer.pad_id] = BANNED
            position = torch.tensor([len(context) + len(ids)])
            token, logprob, _ = sample(logits, torch.tensor([seed]), position, Sampling(self.max_new_tokens, stop=()))
            fed = token.tolist()
            ids += fed
            logprobs += logprob.tolist()
        return Segment(np.array(ids, dtype=np.int32), np.array(logprobs, dtype=np.float32))


class ShippedPolicy:
    """The checkpoint that comes with the package, for ``rollout``, and for an engine's ``generate`` on the same episodes."""

    returns_ids = returns_logprobs = True

    def __init__(self):
        self.model = load_model(shipped_checkpoint())
        self.tokenizer = build_tokenizer("world")

    def start(self, seeds, sampling):
        return WrittenAtLength(self.model, self.tokenizer, seeds, sampling.max_new_tokens)

    def play(self, count, **env):
        """Episodes on the first questions of the dev worlds; a function of context and ``max_tokens`` then writes the same segments again."""
        venv = gym.make_vec("SearchQA-World-v0", num_envs=count, autoreset_mode="DISABLED", split="dev", tokenizer="world", **env)
        trajectories = rollout(venv, self, list(range(count)), seed=3)
        prompts = {tuple(t.token_ids[: t.turns[0].start].tolist()): episode_seed(3, place, 0) for place, t in enumerate(trajectories)}

        def write(context, max_tokens):
            [seed] = [seed for prompt, seed in prompts.items() if tuple(context[: len(prompt)]) == prompt]
            segment = WrittenAtLength(self.model, self.tokenizer, [seed], max_tokens).segment(seed, list(context))
            return segment.ids.tolist(), segment.logprobs.tolist()

        return trajectories, write


@pytest.fixture(scope="session")
def shipped_policy():
    torch.set_num_threads(1)
    return ShippedPolicy()


class Pages:
    """A retriever with one page for everything, which is lost in the calls named; it notes the queries of each call."""

    def __init__(self, text="a page", lost_calls=()):
        self.page = Passage("1", "Title", text)
        self.lost_calls = lost_calls
        self.calls = []

    def __deepcopy__(self, memo):
        return self

    def search(self, requests):
        self.calls.append(sorted(request.query for request in requests))
        if len(self.calls) in self.lost_calls:
            raise RetrieverUnavailable("the back end does not answer")
        return [[Hit(self.page, 1.0)] for _ in requests]


@pytest.fixture(scope="session")
def pages():
    return Pages
