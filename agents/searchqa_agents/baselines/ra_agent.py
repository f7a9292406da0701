r"""RA-Agent: the model searches and fetches pages in the midst of its reasoning, and what comes back is inserted as it is.

The "RAgent" baseline of "Search-o1: Agentic Search-Enhanced Large Reasoning Models" (arXiv 2501.05366), after its code
(github.com/sunnynexus/Search-o1, ``scripts/run_rag_agent.py, prompts.py``; MIT licence; read in the copy xiaowu0162/Search-o1 at 0f22810,
``prompts.py`` at 5b8bf28), from which the prompts and messages are quoted. How ours differs:

- A search result is a passage of the corpus: its title, a made-up URL (:func:`url_of`), and a snippet (:func:`~.search_o1.snippet_of`). A URL's page
  is the text of all passages with that URL that the searches have found so far. There is no other page to fetch, so that any other URL gets a message,
  and counts as one fetched, as a failed fetch does there.
- The answer is read as in :mod:`~searchqa_agents.baselines.search_o1`, from the model's own words alone, and tags in what is inserted are defused.
- What the last call asks for is not executed, since nothing would read its result.

As there, nothing is inserted for a query or a URL that was asked for before: the model just goes on.

Fetches need no retrieval and are no turns of the environment; they count in a budget of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from searchqa_agents.baselines.base import Baseline
from searchqa_agents.baselines.search_o1 import (
    BEGIN_QUERY,
    BEGIN_RESULT,
    END_QUERY,
    END_RESULT,
    QUESTION,
    SEARCH_LIMIT,
    TAGS,
    CallSettings,
    asked,
    between,
    check_options,
    fill,
    hops_of,
    last_box,
    snippet_of,
)
from searchqa_agents.scripted import Ask, Info, Reply, Script, Task
from searchqa_envs.dialects import neutralise
from searchqa_retrievers.types import Passage

BEGIN_URL, END_URL = "<|begin_url|>", "<|end_url|>"
BEGIN_PAGE, END_PAGE = "<|begin_full_page|>", "<|end_full_page|>"
ALL_TAGS = (*TAGS, BEGIN_URL, END_URL, BEGIN_PAGE, END_PAGE)
FETCH_LIMIT = "The maximum number of URL fetches has been reached. You are not allowed to fetch more URLs."
UNSEEN_URL = "Error: this is not a URL of your search results."

INSTRUCTION = """You are a reasoning assistant with the ability to perform web searches and retrieve webpage content to help you answer \
the user’s question accurately. You have special tools:

- To perform a search: write <|begin_search_query|> your query here <|end_search_query|>.
Then, the system will call the web search API with your query and return the search results to you in the format \
<|begin_search_result|> ...search results... <|end_search_result|>.
  The search results will contain a list of webpages with titles, URLs, and snippets (but not full content).

- After receiving the search results, if you need more detailed information from one or more specific URLs, write \
<|begin_url|> url1, url2, ... <|end_url|>.
  The system will fetch the full page content of those URLs and return it to you as <|begin_full_page|> ...full page content... <|end_full_page|>.

You can repeat the search process multiple times if necessary. The maximum number of search attempts is limited to {max_searches}.
You can fetch up to {max_urls} URLs for detailed information.

Once you have all the information you need, continue your reasoning.

Example:
{example}
(System returns full page content)

Assistant:
<|begin_full_page|> ...full page content... <|end_full_page|>

Now the assistant has enough info and can continue reasoning.

Remember:
- Use <|begin_search_query|> to request a web search and end with <|end_search_query|>.
- Use <|begin_url|> to request full page content and end with <|end_url|>.
- When done retrieving information, continue your reasoning.

"""
"""``get_singleqa_rag_agent_instruction`` and ``get_multiqa_rag_agent_instruction``, which differ in the example alone."""
_RETURNED = """(System returns search results)

Assistant:
<|begin_search_result|> ...search results without full page... <|end_search_result|>
"""
EXAMPLES: Mapping[str, str] = {
    "single": f"""Question: "Who got the first Nobel Prize in Physics?"
Assistant thinking steps:
- I need to find out who was awarded the first Nobel Prize in Physics.

Assistant:
<|begin_search_query|>first Nobel Prize in Physics winner<|end_search_query|>

{_RETURNED}
Assistant thinks: The search results mention several URLs. I want full details from one of them.

Assistant:
<|begin_url|>http://example.com/first_nobel_physics.html<|end_url|>
""",
    "multi": f"""Question: "Alice David is the voice of Lara Croft in a video game developed by which company?"
Assistant thinking steps:
- I need to find out who voices Lara Croft in the video game.
- Then, I need to determine which company developed that video game.

Assistant:
<|begin_search_query|>voice actor of Lara Croft<|end_search_query|>

{_RETURNED}
Assistant thinks: The search results provide names of voice actors for Lara Croft. I need to confirm if Alice David is one of them.

Assistant:
<|begin_search_query|>Alice David Lara Croft voice<|end_search_query|>

{_RETURNED}
Assistant thinks: The search results indicate that Alice David is the voice of Lara Croft in a specific video game. \
Now, I need to find out which company developed that game.

Assistant:
<|begin_search_query|>video game developed by Alice David Lara Croft<|end_search_query|>

{_RETURNED}
Assistant thinks: The search results mention the company that developed the video game featuring Alice David as Lara Croft.

Assistant:
<|begin_url|>http://example.com/lara_croft_voice_actor.html, http://example.com/game_developer.html<|end_url|>
""",
}


@dataclass(frozen=True)
class RaAgentConfig(CallSettings):
    """Settings of RA-Agent; the defaults are those of ``run_rag_agent.py`` for question answering. ``env.top_k`` is 10 there."""

    hops: Literal["set", "single", "multi"] = "set"
    """which instruction: single (there for NQ and TriviaQA) or multi (HotpotQA, 2WikiMultiHopQA, MuSiQue, Bamboogle); set: that of the question's set,
    single for PopQA too, which was not measured there"""
    max_searches: int = 5
    """most searches"""
    max_urls: int = 5
    """most URLs fetched"""
    max_turns: int = 10
    """most calls that continue the reasoning, whether they search, fetch or neither"""
    page_chars: int = 8_000
    """longest page (``extract_text_from_url``)"""
    snippet_chars: int = 300
    """length of a snippet (ours: there the search engine makes them)"""
    backoff: bool = False
    r"""without \boxed{} in the end: ask once more without any search, as the repository's README says its published figures were made"""

    def __post_init__(self) -> None:
        check_options(self, max_searches=0, max_urls=0, max_turns=1, page_chars=1, snippet_chars=1, max_tokens=1)


def ra_agent(config: RaAgentConfig) -> Script:
    """The script of RA-Agent."""

    def script(task: Task) -> Generator[str | Ask, Any, None]:
        max_searches = min(config.max_searches, task.max_turns - 1)  # the answer is a turn too
        question = fill(QUESTION, question=task.question.question)
        limits = {"max_searches": str(max_searches), "max_urls": str(config.max_urls)}
        prompt = fill(INSTRUCTION, example=EXAMPLES[hops_of(config.hops, task.set_name)], **limits) + question
        reasoning = ""  # the model's reply with what came back inserted into it
        parts: list[str] = []  # what of it the model wrote
        searched: set[str] = set()
        fetched: set[str] = set()
        seen: dict[str, list[Passage]] = {}  # passages found so far, by their URL
        before = result = ""  # what of the reasoning may be shortened should the prompt grow too long
        thought = ""  # what the model wrote since its last search
        for turn in range(1, config.max_turns + 1):
            reply: Reply = yield asked(config, prompt, reasoning, stop=(END_QUERY, END_URL), documents=(before, result))
            parts.append(reply.text)
            query = between(reply, BEGIN_QUERY, END_QUERY)
            request = "" if query else between(reply, BEGIN_URL, END_URL)
            if not (query or request) or turn == config.max_turns:
                thought += reply.text
                break
            before = reasoning + reply.text.partition(BEGIN_QUERY if query else BEGIN_URL)[0]
            reasoning += reply.text + (END_QUERY if query else END_URL)
            if query and len(searched) < max_searches and query not in searched:
                searched.add(query)
                info: Info = yield task.segment("search", query, thought + reply.text.partition(BEGIN_QUERY)[0])
                thought = ""
                passages: Sequence[Passage] = info["turn_record"].passages
                for passage in passages:
                    pages = seen.setdefault(url_of(passage), [])
                    pages += [passage] * (passage not in pages)
                result = f"{BEGIN_RESULT}\n{search_results(passages, query, config)}"
                reasoning += f"\n{result}\n{END_RESULT}\n"
                continue
            thought += reply.text + (END_QUERY if query else END_URL)
            result = ""
            if query and len(searched) >= max_searches:
                reasoning += f"\n{BEGIN_RESULT}\n{SEARCH_LIMIT}\n{END_RESULT}\n"
            if request:
                urls = [url for url in urls_of(request) if url not in fetched][: config.max_urls - len(fetched)]
                fetched.update(urls)
                if urls:
                    result = f"{BEGIN_PAGE}\n{full_pages(urls, seen, config)}"
                    reasoning += f"\n{result}\n{END_PAGE}\n"
                if len(fetched) >= config.max_urls:
                    reasoning += f"\n{BEGIN_PAGE}\n{FETCH_LIMIT}\n{END_PAGE}\n"
        answer = last_box(parts)
        if not answer and config.backoff:
            reply = yield asked(config, question)
            answer = last_box([reply.text])
        yield task.segment("answer", answer, thought)

    return script


BASELINES = (
    Baseline(
        name="ra_agent",
        summary="RA-Agent: searches and fetches pages in the midst of reasoning, which are inserted as they are",
        config=RaAgentConfig,
        make=ra_agent,
        turns=lambda config, set_name: config.max_searches + 1,
        resolved=lambda config, set_name: replace(config, hops=hops_of(config.hops, set_name)),
    ),
)


def url_of(passage: Passage) -> str:
    """A made-up URL that all passages of a title share: ``wiki/Ed_Wood_(film)``. A passage without a title has its id there."""
    name = "_".join(passage.title.split() or [passage.id])
    return "wiki/" + re.sub(r"[%,<>|\"`\x00-\x1f]", lambda character: f"%{ord(character.group()):02X}", name)


def urls_of(request: str) -> list[str]:
    """The URLs of a request, which commas or line breaks separate, each once and as :func:`url_of` writes them."""
    urls = [url.strip(' \t<>"`') for url in re.split(r"[,\n]", request)]
    return list(dict.fromkeys(url.replace(" ", "_") for url in urls if url)) or [request]


def search_results(passages: Sequence[Passage], query: str, config: RaAgentConfig) -> str:
    """Passages as a search engine lists pages."""
    listed = [
        {"id": number, "title": passage.title, "url": url_of(passage), "snippet": snippet_of(passage.text, query, config.snippet_chars)}
        for number, passage in enumerate(passages, start=1)
    ]
    return neutralise(json.dumps(listed, ensure_ascii=False, indent=2), ALL_TAGS)


def full_pages(urls: Sequence[str], seen: dict[str, list[Passage]], config: RaAgentConfig) -> str:
    """The page of each URL; a message for one that no search has shown."""
    pages = {url: "\n".join(passage.text for passage in seen[url])[: config.page_chars] if url in seen else UNSEEN_URL for url in urls}
    return neutralise(json.dumps(pages, ensure_ascii=False, indent=2), ALL_TAGS)
