"""Answers a second of a local simulated search engine, beside plain ``generate()`` of transformers on the same prompts and model.

    python tests/benchmarks/bench_simulator.py --batch 64

On one thread, with a tiny random model and the world's tokenizer and prompt. In ``whole`` nearly all texts have ``--tokens`` tokens; in ``ragged``
1 in 80 tokens is an end of sequence, so that texts end at different times, as those of a real simulator do. Seconds are of the processor,
the median of ``--repeats``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from searchqa_envs.tokenizers import build_tokenizer
from searchqa_envs.tokenizers.huggingface import RECORD_FILE
from searchqa_retrievers import Corpus, SearchRequest, build_retriever
from searchqa_retrievers.simulation_prompts import PROMPTS


def tiny_model(folder: Path, layers: int, hidden: int, ends: int) -> LlamaForCausalLM:
    """A random Llama, also saved in ``folder``; ``ends``: how many ids end a text."""
    tokenizer = build_tokenizer("world")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = [tokenizer.eos_id, *range(300, 300 + ends)]
    model.save_pretrained(folder)
    (folder / RECORD_FILE).write_text(json.dumps({"name": tokenizer.name, "vocab_size": tokenizer.vocab_size}))
    return model


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median, of the processor, after one more that is not counted."""
    work()
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return statistics.median(taken)


def generate(model: LlamaForCausalLM, prompts: list[list[int]], tokens: int) -> None:
    """One batch by transformers' own loop, at the same temperature."""
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)  # [B, T]
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    with torch.inference_mode():
        model.generate(ids, attention_mask=mask, do_sample=True, temperature=0.8, top_k=0, top_p=1.0, max_new_tokens=tokens)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    requests = [
        SearchRequest(
            f"what is Tuki 's star {'Moso ' * (number % 7)}?", 5, f"q{number}", "what is Tuki 's star ?", golden_answers=("Moso",)
        )
        for number in range(arguments.batch)
    ]
    tokenizer = build_tokenizer("world")
    written = [PROMPTS["world"].write(False, 5, one.query, one.question or "", one.golden_answers[0]) for one in requests]
    prompts = [tokenizer.encode(text) for text in written]
    print(f"{'texts':<8} {'simulated, answers/s':>22} {'generate(), answers/s':>22}")
    for kind, ends in (("whole", 0), ("ragged", 7)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = tiny_model(folder, arguments.layers, arguments.hidden, ends)
            config = {"name": "simulated", "checkpoint": name, "prompt": "world", "max_tokens": arguments.tokens, "cache_entries": 0}
            retriever = build_retriever({**config, "batch_size": arguments.batch}, Corpus.from_passages([]))
            ours = seconds(lambda retriever=retriever: retriever.search(requests), arguments.repeats)  # type: ignore[misc] # bound here
            theirs = seconds(lambda model=model: generate(model, prompts, arguments.tokens), arguments.repeats)  # type: ignore[misc] # bound here
        print(f"{kind:<8} {arguments.batch / ours:>22.1f} {arguments.batch / theirs:>22.1f}")


if __name__ == "__main__":
    main()
