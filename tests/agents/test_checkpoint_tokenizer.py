"""A policy's folder holds its tokenizer: evaluation, training and pages need nothing else."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from searchqa_agents.cli import main
from searchqa_agents.models import make_tiny_model
from searchqa_agents.policy import Policy
from searchqa_agents.report import page_tokenizer, write_page
from searchqa_agents.tokenizer_files import saved_tokenizer
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers import build_tokenizer
from searchqa_envs.tokenizers.byte import ByteTokenizer
from searchqa_envs.tokenizers.huggingface import HuggingFaceTokenizer

TEXT = " Tōkyō \U0001f642 <search> searching for a director </search>\n"


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|pad|>", "<|other|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["searching for the director of a film, the search for a director"] * 20, trainer)
    return tokenizer


def source(kind: str) -> object:
    if kind == "tokenizers":
        return byte_level_bpe()
    return PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(), eos_token="<|endoftext|>", name_or_path="someone/tiny")


def saved_policy(folder: Path, tokenizer: HuggingFaceTokenizer) -> Policy:
    shape = {"hidden_size": 16, "num_heads": 2, "feed_forward_size": 16}
    policy = Policy(make_tiny_model(tokenizer.vocab_size, 0, pad_id=tokenizer.pad_id, eos_id=tokenizer.eos_id, **shape), tokenizer)
    policy.save(folder)
    return policy


@pytest.mark.parametrize("kind", ["tokenizers", "transformers"])
def test_the_tokenizer_of_a_policy_s_folder_is_the_one_it_was_made_with(kind: str, tmp_path: Path) -> None:
    made = HuggingFaceTokenizer(source(kind), pad_token="<|other|>")
    saved_policy(tmp_path, made)
    loaded = build_tokenizer(saved_tokenizer(tmp_path))
    assert (loaded.name, loaded.vocab_size, loaded.reserved) == (made.name, made.vocab_size, made.reserved)
    assert (loaded.pad_id, loaded.eos_id) == (made.pad_id, made.eos_id)
    assert loaded.encode(TEXT) == made.encode(TEXT)
    assert len(made.encode(TEXT)) < len(TEXT.encode())  # merges are there
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert Policy.load(tmp_path, loaded).tokenizer is loaded
    with pytest.raises(ConfigurationError, match="trained with tokenizer"):
        Policy.load(tmp_path, ByteTokenizer())


@pytest.mark.parametrize("kind", ["tokenizers", "transformers"])
def test_a_checkpoint_is_evaluated_with_its_own_tokenizer_and_its_page_shows_tokens(kind: str, tmp_path: Path) -> None:
    made = HuggingFaceTokenizer(source(kind))
    saved_policy(tmp_path / "policy", made)
    run = tmp_path / "run"
    short = ["env.num_worlds=1", "env.max_turns=2", "env.max_segment_tokens=6", "questions=4", "threads=1"]
    assert main(["eval", "agent=lm", f"agent.checkpoint={tmp_path / 'policy'}", "env=world", *short, f"run_dir={run}"]) == 0
    stamp = json.loads((run / "stamp.json").read_text())
    assert stamp["tokenizer"] == made.name
    page = (run / "report.html").read_text()
    (tmp_path / "policy").rename(tmp_path / "moved")  # the run's folder is enough
    found = page_tokenizer(run, stamp)
    assert found is not None
    assert found.name == made.name
    assert write_page(run).read_text() == page
    cuts = re.search('id="cuts">([^<]*)<', page)
    assert cuts is not None
    assert gzip.decompress(base64.b64decode(cuts[1]))  # texts are cut into tokens


def test_training_goes_on_with_the_tokenizer_of_the_checkpoint_it_starts_from(tmp_path: Path) -> None:
    made = HuggingFaceTokenizer(source("transformers"))
    saved_policy(tmp_path / "policy", made)
    run = tmp_path / "run"
    assert main(["train", "recipe=smoke", f"start={tmp_path / 'policy'}", "env.num_worlds=20", "threads=1", f"run_dir={run}"]) == 0
    checkpoint = run / "checkpoints" / "train-000002"
    assert build_tokenizer(saved_tokenizer(checkpoint)).name == made.name
    assert page_tokenizer(run, json.loads((run / "stamp.json").read_text())) is not None


def test_a_folder_that_only_names_an_unknown_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "searchqa_tokenizer.json").write_text(json.dumps({"name": "tiny@0123", "vocab_size": 5}))
    with pytest.raises(ConfigurationError, match=r"'tiny@0123', which is not in the folder. Name it: env.tokenizer="):
        saved_tokenizer(tmp_path)
