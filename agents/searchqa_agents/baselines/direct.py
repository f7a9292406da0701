r"""One reply and no search (``direct``, ``cot``), or one search for the question as it stands (``rag``).

The papers name these baselines without their prompts, so the prompts are those of public code near them, to the letter (slips of grammar too):

- ``direct``: FlashRAG's ``zero_shot`` (github.com/RUC-NLPIR/FlashRAG, ``examples/methods/run_exp.py``).
- ``cot``: Search-o1's direct generation (github.com/sunnynexus/Search-o1, ``scripts/prompts.py``, ``get_task_instruction_openqa``). The answer is what stands
  in the last ``\boxed{}``, as there; ours: where there is none, what follows the last "answer is" in its line. Else the answer is empty.
- ``rag``, template ``search-r1``: Search-R1's ``scripts/data_process/nq_rag.py``. The answer is what stands in the last ``<answer>``; else it is empty.
- ``rag``, template ``flashrag``: FlashRAG's default (``flashrag/prompt/base_prompt.py``), whose reply is the answer.

The passages come from the environment, whole (``env.top_k``: Search-R1 has 3, FlashRAG 5). Where a prompt is too long, passages lose their ends, the last
passage first; FlashRAG cuts out the middle of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from searchqa_agents.baselines.base import Baseline
from searchqa_agents.scripted import Ask, Message, Reply, Script, Task
from searchqa_envs.errors import ConfigurationError
from searchqa_retrievers.types import Passage

# -- direct ----------------------------------------------------------------------------------------------------------------------------------

ZERO_SHOT_SYSTEM = "Answer the question based on your own knowledge. Only give me the answer and do not output any other words."
ZERO_SHOT_USER = "Question: {question}"


@dataclass(frozen=True)
class DirectConfig:
    """The question alone, and a short answer."""

    max_tokens: int = 32
    """longest reply (FlashRAG's general setting for all methods)"""


def direct(config: DirectConfig) -> Script:
    """Asks once; the reply is the answer."""

    def script(task: Task) -> Generator[str | Ask, Any, None]:
        messages = (("system", ZERO_SHOT_SYSTEM), ("user", ZERO_SHOT_USER.format(question=task.question.question)))
        reply: Reply = yield Ask(messages, config.max_tokens)
        yield task.segment("answer", reply.text)

    return script


# -- chain of thought ------------------------------------------------------------------------------------------------------------------------

STEP_BY_STEP = (
    "Please answer the following question. You should think step by step to solve it.\n\n"
    "Provide your final answer in the format \\boxed{YOUR_ANSWER}.\n\n"
    "Question:\n{question}\n\n"
)


@dataclass(frozen=True)
class CoTConfig:
    """Reasoning step by step, then an answer."""

    max_tokens: int = 1024
    """longest reply (ours)"""


def cot(config: CoTConfig) -> Script:
    """Asks once; the reply is the thought, and its boxed part the answer."""

    def script(task: Task) -> Generator[str | Ask, Any, None]:
        reply: Reply = yield Ask((("user", STEP_BY_STEP.replace("{question}", task.question.question)),), config.max_tokens)
        yield task.segment("answer", reasoned_answer(reply.text), thought=reply.text)

    return script


def reasoned_answer(text: str) -> str:
    r"""The last ``\boxed{...}`` with its braces in balance; else what follows the last "answer is" in its line; else nothing."""
    for start in [match.end() for match in re.finditer(r"\\boxed\s*{", text)][::-1]:
        depth = 1
        for place in range(start, len(text)):
            depth += (text[place] == "{") - (text[place] == "}")
            if depth == 0:
                return _without_text_command(text[start:place])
    said = re.findall(r"answer is:?[ \t]*([^\n]*)", text, re.IGNORECASE)
    return re.sub(r"\\(?:boxed|text)\s*{", "", said[-1]).strip(" \t*.\"'$") if said else ""  # a box that nothing closes


def _without_text_command(answer: str) -> str:
    r"""``Paris`` of ``\text{Paris}``, as Search-o1's evaluation reads it."""
    inner = re.fullmatch(r"\s*\\text\s*{(.*)}\s*", answer, re.DOTALL)
    return (inner.group(1) if inner else answer).strip()


# -- retrieval-augmented generation ----------------------------------------------------------------------------------------------------------

SEARCH_R1_RAG = (
    "Answer the given question with some potentially useful context. "
    "You should analyze the question carefully, evaluate the given context (which may or may not be useful), "
    "and then generate an accurate and well-reasoned response. "
    "You should first have a reasoning process in mind and then provides the answer. "
    "Show your reasoning in <think> </think> tags and return the final answer in <answer> </answer> tags, "
    "for example <answer> Beijing </answer>. Question: {question} Context: {context} \n"
)
FLASHRAG_SYSTEM = (
    "Answer the question based on the given document.Only give me the answer and do not output any other words."
    "\nThe following are given documents.\n\n{reference}"
)
FLASHRAG_USER = "Question: {question}"


@dataclass(frozen=True)
class RAGConfig:
    """One search for the question as it stands; what it finds stands in the prompt."""

    template: Literal["search-r1", "flashrag"] = "search-r1"
    """whose prompt, and whose reading of the reply"""
    max_tokens: int | None = None
    """longest reply; null: 500 for search-r1 (its limit for a response), 32 for flashrag"""
    max_prompt_tokens: int | None = 2048
    """longest prompt (both publish it), where the model's tokenizer is known; null: as long as its positions reach"""


def rag(config: RAGConfig) -> Script:
    """Searches once, asks once."""
    tagged = config.template == "search-r1"
    max_tokens = config.max_tokens or (500 if tagged else 32)

    def script(task: Task) -> Generator[str | Ask, Any, None]:
        question = task.question.question
        if task.max_turns < 2:
            raise ConfigurationError(f"Baseline rag searches and answers: env.max_turns must be at least 2; got {task.max_turns}.")
        info = yield task.segment("search", question)
        documents = document_texts(info["turn_record"].passages)
        if tagged:
            asked = question.strip() if question.strip().endswith("?") else f"{question.strip()}?"
            messages: tuple[Message, ...] = (("user", SEARCH_R1_RAG.format(question=asked, context="".join(documents))),)
            stop: tuple[str, ...] = ("</answer>",)
        else:
            messages = (("system", FLASHRAG_SYSTEM.format(reference="".join(documents))), ("user", FLASHRAG_USER.format(question=question)))
            stop = ()
        last_first = tuple(reversed(documents))
        reply: Reply = yield Ask(messages, max_tokens, stop, documents=last_first, max_prompt_tokens=config.max_prompt_tokens)
        thought, answer = tagged_answer(reply) if tagged else ("", reply.text)
        yield task.segment("answer", answer, thought)

    return script


def document_texts(passages: Sequence[Passage]) -> list[str]:
    """Each passage as Search-R1 and FlashRAG write it; titles are in double quotes, as in the first lines of their corpus."""
    return [
        f'Doc {number}(Title: "{passage.title}") {passage.text}\n' if passage.title else f"Doc {number}(Title: ) {passage.text}\n"
        for number, passage in enumerate(passages, start=1)
    ]


def tagged_answer(reply: Reply) -> tuple[str, str]:
    """Thought and answer of a reply that was stopped before ``</answer>``; the answer is empty where a tag is missing.

    Where the server does not tell what ended the reply, an answer that was not cut is taken for closed.
    """
    thought, tag, answer = reply.text.rpartition("<answer>")
    if not tag or (reply.stop is None and (reply.stop_known or not reply.finished)):
        thought, answer = reply.text, ""
    return thought.replace("<think>", "").replace("</think>", "").strip(), answer.strip()


BASELINES = (
    Baseline("direct", "the question alone, a short answer", DirectConfig, direct, turns=lambda config, set_name: 1),
    Baseline("cot", "reasons step by step, then answers; no search", CoTConfig, cot, turns=lambda config, set_name: 1),
    Baseline("rag", "one search for the question, the passages in the prompt", RAGConfig, rag, turns=lambda config, set_name: 2),
)
