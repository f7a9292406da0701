"""From labelled searches to what a simulator is trained on: the very prompt that the retriever sends, and the documents as the completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from searchqa_agents.simulator.rows import LABELS, Label, RowsError, SearchRow
from searchqa_agents.trajectory import Trajectory
from searchqa_envs.tokenizers.base import Tokenizer
from searchqa_retrievers.simulation_prompts import SimulationPrompt
from searchqa_retrievers.text_model_tokenizers import TextTokenizer
from searchqa_retrievers.types import Passage


class SimulatorExample(NamedTuple):
    """One search as a simulator sees it, and what it should write."""

    row_id: str
    quality: Label
    prompt: str
    completion: str


def make_examples(
    rows: Sequence[SearchRow], prompt: SimulationPrompt, *, documents: int, titles: bool = False, notes: bool = False
) -> list[SimulatorExample]:
    """For each search and quality, the first ``documents`` documents of that label, fewer where there are fewer; none, no example.

    Parameters
    ----------
    rows
        Labelled ones.
    prompt
        The retriever's; its ``top_k`` is the number of documents of the example.
    documents
        Most documents of an example.
    titles
        ``Doc 1(Title: Mako) text`` instead of ``Doc 1: text``.
    notes
        Begin useful documents with a line that says what is looked for, where a row knows it. The retriever leaves out what stands before the first
        document; a tiny model that first copies from the question what it is about to tell learns it in far fewer steps.
    """
    if documents < 1:
        raise RowsError(f"documents must be at least 1; got {documents}.")
    examples = []
    for row in rows:
        for quality in LABELS:
            chosen = row.labelled(quality)[:documents]
            if chosen:
                written = prompt.write(quality == "noisy", len(chosen), row.query, row.question, row.golden_answer)
                note = f" {row.note}\n" if notes and row.note and quality == "useful" else ""
                examples.append(SimulatorExample(row.id, quality, written, note + written_documents(chosen, titles=titles)))
    return examples


def written_documents(documents: Sequence[Passage], *, titles: bool) -> str:
    """The documents as a simulator writes them; a line break within one becomes a blank."""
    lines = []
    for number, document in enumerate(documents, start=1):
        text = " ".join(document.text.split("\n"))
        head = f"Doc {number}(Title: {document.title})" if titles and document.title else f"Doc {number}:"
        lines.append(f"{head} {text}")
    return "\n".join(lines)


def encoded_examples(
    examples: Sequence[SimulatorExample], prompt_tokenizer: TextTokenizer, tokenizer: Tokenizer, *, max_tokens: int
) -> tuple[list[Trajectory], int]:
    """The examples as sequences whose loss is on the completion and its end of sequence; and how many were too long and left out.

    Parameters
    ----------
    prompt_tokenizer
        What the retriever encodes prompts with, chat template included.
    tokenizer
        Encodes completions as plain text, with the same ids.
    max_tokens
        Longest sequence.

    Raises
    ------
    RowsError
        Every example is too long.
    """
    sequences = []
    for example in examples:
        told = prompt_tokenizer.encode(example.prompt)
        written = [*tokenizer.encode(example.completion), prompt_tokenizer.eos_id]
        if len(told) + len(written) <= max_tokens:
            ids = np.array([*told, *written], dtype=np.int32)
            mask = np.zeros(len(ids), dtype=np.int8)
            mask[len(told) :] = 1
            sequences.append(
                Trajectory(
                    token_ids=ids,
                    loss_mask=mask,
                    logprobs=None,
                    turns=(),
                    prompt=example.prompt,
                    reward=0.0,
                    question_id=example.row_id,
                    question="",
                    golden_answers=(),
                    answer=None,
                    terminated=True,
                    truncated=False,
                )
            )
    if not sequences:
        raise RowsError(
            f"None of {len(examples)} examples has at most max_tokens={max_tokens} tokens. Raise max_tokens, or lower documents."
        )
    return sequences, len(examples) - len(sequences)
