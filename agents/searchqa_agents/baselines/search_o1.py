r"""Search-o1: the model searches in the midst of its reasoning, and a second call of it reads what was found and hands on what helps.

After "Search-o1: Agentic Search-Enhanced Large Reasoning Models" (arXiv 2501.05366) and its code (github.com/sunnynexus/Search-o1, ``scripts/``:
``run_search_o1.py, prompts.py, bing_search.py, evaluate.py``; MIT licence; read in the copy xiaowu0162/Search-o1 at 29cad59, ``prompts.py`` at 5b8bf28),
from which the prompts and messages are quoted. How ours differs:

- A web page is a passage of the corpus. Its snippet, which there comes from the search engine, is made here: see :func:`snippet_of`.
- The answer is the last balanced ``\boxed{...}`` that the model itself wrote; there, a regular expression looks line by line, through inserted results too.
- What is inserted loses the brackets of its tags, and its line breaks become blanks; there they are deleted, which glues words together. An empty
  extract is reported as nothing helpful.
- Of the steps before, the reading call sees the last four; there the fourth is always an empty string, so that it sees three.
- A search that the last call asks for is not executed, since nothing would read its result.
- The reading call has no repetition penalty (there: 1.05). Sentences end at ``.!?`` and a blank (there: by NLTK's model of English).
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from searchqa_agents.baselines.base import Baseline
from searchqa_agents.scripted import Ask, Info, Reply, Script, Task
from searchqa_envs.dialects import neutralise
from searchqa_envs.errors import ConfigurationError
from searchqa_retrievers.types import Passage

BEGIN_QUERY, END_QUERY = "<|begin_search_query|>", "<|end_search_query|>"
BEGIN_RESULT, END_RESULT = "<|begin_search_result|>", "<|end_search_result|>"
TAGS = (BEGIN_QUERY, END_QUERY, BEGIN_RESULT, END_RESULT)
SEARCH_LIMIT = "The maximum search limit is exceeded. You are not allowed to search."
REPEATED_QUERY = "You have searched this query. Please refer to previous results."
FINAL_INFORMATION = "**Final Information**"
NOTHING_HELPFUL = "No helpful information found."

INSTRUCTION = """You are a reasoning assistant with the ability to perform web searches to help you answer the user's question accurately. \
You have special tools:

- To perform a search: write <|begin_search_query|> your query here <|end_search_query|>.
Then, the system will search and analyze relevant web pages, then provide you with helpful information in the format \
<|begin_search_result|> ...search results... <|end_search_result|>.

You can repeat the search process multiple times if necessary. The maximum number of search attempts is limited to {max_searches}.

Once you have all the information you need, continue your reasoning.

Example:
{example}
Remember:
- Use <|begin_search_query|> to request a web search and end with <|end_search_query|>.
- When done searching, continue your reasoning.

"""
"""``get_singleqa_search_o1_instruction`` and ``get_multiqa_search_o1_instruction``, which differ in the example alone."""
# The example of "multi" is a question of HotpotQA's dev set (5a80071f5542992bc0c4a684), that of "single" is one of NQ: how to take it apart and what to
# search for stand in the prompt, the answer does not. Kept, since the text must be the published one.
EXAMPLES: Mapping[str, str] = {
    "single": """Question: "Who got the first Nobel Prize in Physics?"
Assistant thinking steps:
- I need to find out who was awarded the first Nobel Prize in Physics.

Assistant:
<|begin_search_query|>first Nobel Prize in Physics winner<|end_search_query|>

(System returns processed information from relevant web pages)

Assistant continues reasoning with the new information...
""",
    "multi": """Question: "Alice David is the voice of Lara Croft in a video game developed by which company?"
Assistant thinking steps:
- I need to find out who voices Lara Croft in the video game.
- Then, I need to determine which company developed that video game.

Assistant:
<|begin_search_query|>Alice David Lara Croft voice<|end_search_query|>

(System returns processed information from relevant web pages)

Assistant thinks: The search results indicate that Alice David is the voice of Lara Croft in a specific video game. \
Now, I need to find out which company developed that game.

Assistant:
<|begin_search_query|>video game developed by Alice David Lara Croft<|end_search_query|>

(System returns processed information from relevant web pages)

Assistant continues reasoning with the new information...
""",
}
QUESTION = r"""Please answer the following question. You should think step by step to solve it.

Provide your final answer in the format \boxed{YOUR_ANSWER}.

Question:
{question}

"""
"""``get_task_instruction_openqa``, as it is for all models but QwQ."""
READING = """**Task Instruction:**

You are tasked with reading and analyzing web pages based on the following inputs: **Previous Reasoning Steps**, **Current Search Query**, \
and **Searched Web Pages**. Your objective is to extract relevant and helpful information for **Current Search Query** from the **Searched Web Pages** \
and seamlessly integrate this information into the **Previous Reasoning Steps** to continue reasoning for the original question.

**Guidelines:**

1. **Analyze the Searched Web Pages:**
- Carefully review the content of each searched web page.
- Identify factual information that is relevant to the **Current Search Query** and can aid in the reasoning process for the original question.

2. **Extract Relevant Information:**
- Select the information from the Searched Web Pages that directly contributes to advancing the **Previous Reasoning Steps**.
- Ensure that the extracted information is accurate and relevant.

3. **Output Format:**
- **If the web pages provide helpful information for current search query:** Present the information beginning with `**Final Information**` as shown below.
**Final Information**

[Helpful information]

- **If the web pages do not provide any helpful information for current search query:** Output the following text.

**Final Information**

No helpful information found.

**Inputs:**
- **Previous Reasoning Steps:**\x20\x20
{steps}

- **Current Search Query:**\x20\x20
{query}

- **Searched Web Pages:**\x20\x20
{pages}

Now you should analyze each web page and find helpful information based on the current search query "{query}" and previous reasoning steps.
"""
"""``get_webpage_to_reasonchain_instruction``."""


@dataclass(frozen=True)
class CallSettings:
    """How the language model is asked."""

    max_tokens: int = 8_192
    """longest reply of each call"""
    temperature: float | None = 0.7
    """0 takes the most likely token; null, for this and the next two: the language model's own"""
    top_p: float | None = 0.8
    """keep the most likely tokens up to this probability mass"""
    top_k: int | None = 20
    """keep this many of the most likely tokens; not the number of passages, which is ``env.top_k``"""


@dataclass(frozen=True)
class SearchO1Config(CallSettings):
    """Settings of Search-o1; the defaults are those of ``run_search_o1.py`` for question answering. ``env.top_k`` is 10 there."""

    hops: Literal["set", "single", "multi"] = "set"
    """which instruction: single (there for NQ and TriviaQA) or multi (HotpotQA, 2WikiMultiHopQA, MuSiQue, Bamboogle); set: that of the question's set,
    single for PopQA too, which was not measured there"""
    max_searches: int | None = None
    """most searches; null: 5 for single, 10 for multi"""
    max_turns: int = 15
    """most calls that continue the reasoning, whether they search or not"""
    page_chars: int = 50_000
    """what of a page is looked at"""
    context_chars: int = 3_000
    """what is shown of a page on either side of the sentence that fits its snippet best; twice as much from the page's beginning where none fits"""
    snippet_chars: int = 300
    """length of a snippet (ours: there the search engine makes them)"""
    backoff: bool = False
    r"""without \boxed{} in the end: ask once more without any search, as the repository's README says its published figures were made"""

    def __post_init__(self) -> None:
        check_options(self, max_searches=0, max_turns=1, page_chars=1, context_chars=0, snippet_chars=1, max_tokens=1)

    def searches(self, hops: str) -> int:
        """Most searches."""
        if self.max_searches is not None:
            return self.max_searches
        return 5 if hops == "single" else 10


def search_o1(config: SearchO1Config) -> Script:
    """The script of Search-o1."""

    def script(task: Task) -> Generator[str | Ask, Any, None]:
        hops = hops_of(config.hops, task.set_name)
        max_searches = min(config.searches(hops), task.max_turns - 1)  # the answer is a turn too
        question = fill(QUESTION, question=task.question.question)
        prompt = fill(INSTRUCTION, max_searches=str(max_searches), example=EXAMPLES[hops]) + question
        reasoning = ""  # the model's reply with the results inserted into it
        parts: list[str] = []  # what of it the model wrote
        searched: set[str] = set()
        before = result = ""  # what of it may be shortened should the prompt grow too long
        thought = ""  # what the model wrote since its last search
        for turn in range(1, config.max_turns + 1):
            reply: Reply = yield asked(config, prompt, reasoning, stop=(END_QUERY,), documents=(before, result))
            parts.append(reply.text)
            query = between(reply, BEGIN_QUERY, END_QUERY)
            if not query or turn == config.max_turns:
                thought += reply.text
                break
            before = reasoning + reply.text.partition(BEGIN_QUERY)[0]
            reasoning += reply.text + END_QUERY
            if len(searched) >= max_searches or query in searched:
                message = SEARCH_LIMIT if len(searched) >= max_searches else REPEATED_QUERY
                reasoning += f"\n{BEGIN_RESULT}\n{message}\n{END_RESULT}\n"
                thought += reply.text + END_QUERY
                result = ""
                continue
            searched.add(query)
            info: Info = yield task.segment("search", query, thought + reply.text.partition(BEGIN_QUERY)[0])
            thought = ""
            pages = [web_page(i, passage, query, config) for i, passage in enumerate(info["turn_record"].passages, start=1)]
            steps = previous_steps(reasoning)
            request = fill(READING, steps=steps, query=query, pages="".join(pages))
            reading: Reply = yield asked(config, request, documents=(*reversed(pages), steps))
            result = f"{BEGIN_RESULT}{final_information(reading.text)}"
            reasoning += f"\n\n{result}{END_RESULT}\n\n"
        answer = last_box(parts)
        if not answer and config.backoff:
            reply = yield asked(config, question)
            answer = last_box([reply.text])
        yield task.segment("answer", answer, thought)

    return script


def resolved(config: SearchO1Config, set_name: str) -> SearchO1Config:
    """The configuration with the instruction and the most searches of a set."""
    hops = hops_of(config.hops, set_name)
    return replace(config, hops=hops, max_searches=config.searches(hops))


BASELINES = (
    Baseline(
        name="search_o1",
        summary="Search-o1: searches in the midst of reasoning, and a call that reads what was found",
        config=SearchO1Config,
        make=search_o1,
        turns=lambda config, set_name: config.searches(hops_of(config.hops, set_name)) + 1,
        resolved=resolved,
    ),
)


# -- what is asked of the model, and what it wrote ---------------------------------------------------------------------------------------


def check_options(config: Any, **least: int) -> None:
    """Raise ``ConfigurationError`` for ``hops`` that are neither single nor multi, or a number below its least value."""
    if config.hops not in ("set", *EXAMPLES):
        raise ConfigurationError(f"options.hops must be one of {['set', *sorted(EXAMPLES)]}; got {config.hops!r}.")
    for name, lowest in least.items():
        value = getattr(config, name)
        if value is not None and value < lowest:
            raise ConfigurationError(f"options.{name} must be at least {lowest}; got {value}.")


def hops_of(hops: Literal["set", "single", "multi"], set_name: str) -> Literal["single", "multi"]:
    """Which instruction a question of a set is asked with."""
    if hops == "set":
        return "single" if set_name in ("nq", "triviaqa", "popqa") else "multi"
    return hops


def asked(config: CallSettings, prompt: str, reply: str = "", stop: tuple[str, ...] = (), documents: tuple[str, ...] = ()) -> Ask:
    """A call with this prompt, whose reply goes on with ``reply``. Short documents are not worth shortening, and may stand elsewhere too."""
    return Ask(
        messages=(("user", prompt), ("assistant", reply)) if reply else (("user", prompt),),
        max_tokens=config.max_tokens,
        stop=stop,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        documents=tuple(document for document in documents if len(document) > 200),
    )


def fill(template: str, **values: str) -> str:
    """The template with its fields filled in, in one go: braces inside the values stay as they are."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda field: values[field.group()[1:-1]], template)


def between(reply: Reply, begin: str, end: str) -> str:
    """What stands behind ``begin`` in a reply that ended with ``end``; empty where it did not.

    Some servers do not tell which stop string ended a reply. Then it ended with ``end`` if one line, without an answer, follows ``begin``.
    """
    text = reply.text.partition(begin)[2].strip()
    ended = reply.stop == end or (not reply.stop_known and reply.finished and "\n" not in text and r"\boxed{" not in text)
    return text if ended else ""


def last_box(parts: Sequence[str]) -> str:
    """The answer in the last part that has one; empty without any."""
    return next((box for part in reversed(parts) if (box := boxed(part)) is not None), "")


_BRACES = re.compile(r"\\boxed\{|\\text\{|\\[\\{}]|[{}]")


def boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` whose braces balance, and in it of the last ``\text{...}``, without parentheses around; None without one."""
    box = _last_group(text, r"\boxed{")
    if box is None:
        return None
    inner = _last_group(box, r"\text{")
    return (box if inner is None else inner).strip("() \n\t")


def _last_group(text: str, opener: str) -> str | None:
    opened: list[tuple[str, int]] = []
    last, content = -1, None
    for brace in _BRACES.finditer(text):
        mark = brace.group()
        if mark.endswith("{") and mark != r"\{":
            opened.append((mark, brace.end()))
        elif mark == "}" and opened:
            kind, start = opened.pop()
            if kind == opener and start > last:
                last, content = start, text[start : brace.start()]
    return content


# -- the call that reads -----------------------------------------------------------------------------------------------------------------


def previous_steps(reasoning: str) -> str:
    """The lines of the reasoning as numbered steps. Of more than five: the first, the last four, those with a search or a result, and ... for gaps."""
    steps = [f"Step {number}: {line}" for number, line in enumerate(reasoning.replace("\n\n", "\n").split("\n"), start=1)]
    kept: list[str] = []
    for place, step in enumerate(steps):
        if len(steps) <= 5 or place == 0 or place >= len(steps) - 4 or BEGIN_QUERY in step or BEGIN_RESULT in step:
            kept.append(step)
        elif kept[-1] != "...":
            kept.append("...")
    return "\n\n".join(kept)


def final_information(reading: str) -> str:
    """What of a reading call's reply is inserted into the reasoning: one line, without tags."""
    _, marker, information = reading.rpartition(FINAL_INFORMATION)
    information = " ".join(information.strip("`\n ").split("\n")) if marker else ""
    return neutralise(information, TAGS) or NOTHING_HELPFUL


def web_page(number: int, passage: Passage, query: str, config: SearchO1Config) -> str:
    """A passage as the reading call sees it."""
    text = passage.text[: config.page_chars]
    snippet = snippet_of(text, query, config.snippet_chars)
    context = context_around(text, snippet, config.context_chars)
    page = {"id": number, "title": passage.title, "snippet": snippet, "context": context}
    return neutralise(f"**Web Page {number}:**\n{json.dumps(page, ensure_ascii=False, indent=2)}\n", TAGS)


def snippet_of(page: str, query: str, length: int) -> str:
    """What a search engine would show of a page: ``length`` characters from the sentence on that fits the query best; from the beginning if none does."""
    words = _words(query)
    best = max(_sentences(page), key=lambda place: _f1(words, _words(page[place.start : place.stop])), default=slice(0, 0))
    return page[best.start : best.start + length].strip()


def context_around(page: str, snippet: str, characters: int) -> str:
    """The page's sentence that fits the snippet best, by an F1 of words above 0.2, and so many characters on either side (``extract_snippet_with_context``).

    Where no sentence fits: twice as many characters from the beginning.
    """
    words = _words(snippet)
    best, best_f1 = None, 0.2
    for place in _sentences(page):
        f1 = _f1(words, _words(page[place.start : place.stop]))
        if f1 > best_f1:
            best, best_f1 = place, f1
    return page[: 2 * characters] if best is None else page[max(0, best.start - characters) : best.stop + characters]


def _sentences(page: str) -> Iterator[slice]:
    start = 0
    for end in re.finditer(r"(?<=[.!?])\s+", page):
        yield slice(start, end.start())
        start = end.end()
    if start < len(page):
        yield slice(start, len(page))


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> set[str]:
    return set(text.lower().translate(_NO_PUNCTUATION).split())


def _f1(words: set[str], others: set[str]) -> float:
    """F1 of two sets of words: twice what they share by the sum of their sizes."""
    return 2 * len(words & others) / (len(words) + len(others)) if words and others else 0.0
