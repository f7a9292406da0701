"""The tags, prompts, passage formats and rules of the published systems.

Prompt templates, wrappers and tags are those of the released code, kept to the letter (their slips of grammar too):
Search-R1 (arXiv 2503.09516, repository PeterGriffinJin/Search-R1), R1-Searcher (arXiv 2503.05592, repository RUCAIBox/R1-Searcher) and
ZeroSearch (arXiv 2505.04588, repository Alibaba-NLP/ZeroSearch). One deviation: ZeroSearch's documents have a blank between title and text, where its
Google engine runs them together and its Wikipedia engine has no title.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from searchqa_envs.episode_types import Action, ControlledSearch
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.search_controls import SearchControls
from searchqa_retrievers.types import Passage

SEARCH_R1_PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get new information. "
    "After reasoning, if you find you lack some knowledge, you can call a search engine by <search> query </search> and it will return the "
    "top searched results between <information> and </information>. You can search as many times as your want. "
    "If you find no further external knowledge needed, you can directly provide the answer inside <answer> and </answer>, "
    "without detailed illustrations. For example, <answer> Beijing </answer>. Question: {question}\n"
)
R1_NO_SEARCH_PROMPT = (
    "Answer the given question. You should first have a reasoning process in mind and then provides the answer. "
    "Show your reasoning in <think> </think> tags and return the final answer in <answer> </answer> tags, "
    "for example <answer> Beijing </answer>. Question: {question}\n"
)
R1_SEARCHER_PROMPT = (
    "The User asks a question, and the Assistant solves it.\n"
    "The Assistant first thinks about the reasoning process in the mind and then provides the User with the final answer.\n"
    "The output format of reasoning process and final answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    'i.e., "<think> reasoning process here </think>\n\n<answer> final answer here </answer>".\n'
    "During the thinking process, **the Assistant can perform searching** for uncertain knowledge if necessary with the format of "
    '"<|begin_of_query|> search query (only list keywords, such as **"keyword_1 keyword_2 ..."**)<|end_of_query|>". '
    "**A query must involve only a single triple**.\n"
    "Then, the search system will provide the Assistant with the retrieval information with the format of "
    '"<|begin_of_documents|> ...search results... <|end_of_documents|>".\n\n'
    "User:{question}\nAssistant: <think>"
)
R1_SEARCHER_CHAT_PROMPT = (
    "You are a helpful assistant.\n"
    "Given a question, you should answer it by first thinking about the reasoning process in the mind and then providing the final answer.\n"
    "The output format of reasoning process and final answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    'i.e., "<think> reasoning process here </think>\n\n<answer> final answer here </answer>".\n'
    "During the thinking process, **you can perform searching for uncertain knowledge** if necessary with the format of "
    '"<|begin_of_query|> search query (only list keywords, such as **"keyword_1 keyword_2 ..."**)<|end_of_query|>". '
    "**A query must involve only a single triple**.\n"
    "Then, the search system will provide you with the retrieval information with the format of "
    '"<|begin_of_documents|> ...search results... <|end_of_documents|>".\n\n'
    "User:{question}\nAssistant: <think>"
)
SEARCH_R1_INVALID = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. "
    "If I want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"
)
SEARCH_R1_LAST_TURN = "\nThis is my last turn. I should put the final answer between <answer> and </answer> now.\n"
R1_SEARCHER_LAST_TURN = "\n\nNo search is left. The final answer must be given inside <answer> and </answer> now.\n\n"

BARE_PROMPT = "{question}\n"


@dataclass(frozen=True)
class Dialect:
    """One system's way of writing turns.

    ``prompts`` maps a name to a template with ``{question}``; ``published`` is the system's own, ``bare`` the question alone.
    ``opener`` says which opening tag before the first closing tag begins its content: the first (Search-R1's regular expression) or the last
    (R1-Searcher's split). ``invalid_text`` is the reply to a segment that is no action; None ends the episode instead.
    ``chat`` says whether the tokenizer's chat template, where it has one, is put round the published prompt; ``system_prompts`` are the prompts that
    go into it in parts, see :meth:`messages`. ``empty_query_is_invalid``: an empty query
    is no action (R1-Searcher); Search-R1 searches for it. ``controls``, which no published system has, is what a search may say beside its
    query; a sentence about it then stands in the published prompt before ``question_label``.
    """

    name: str
    search_open: str
    search_close: str
    information_open: str
    information_close: str
    document: str
    invalid_text: str | None
    last_turn_text: str
    prompts: dict[str, str]
    answer_open: str = "<answer>"
    answer_close: str = "</answer>"
    think_open: str = "<think>"
    think_close: str = "</think>"
    before_documents: str = ""
    opener: Literal["first", "last"] = "first"
    question_mark: bool = True
    quoted_titles: bool = False
    prompt_opens_think: bool = False
    chat: bool = True
    system_prompts: tuple[str, ...] = ()
    answer_label: str = "\nAssistant: "
    empty_query_is_invalid: bool = False
    question_label: str = "Question: "
    controls: SearchControls | None = None
    tags: tuple[str, ...] = field(init=False)
    _document_parts: tuple[str, str, str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pairs = (
            (self.think_open, self.think_close),
            (self.search_open, self.search_close),
            (self.information_open, self.information_close),
            (self.answer_open, self.answer_close),
        )
        object.__setattr__(self, "tags", tuple(tag for pair in pairs for tag in pair))
        parts = re.fullmatch(r"(.*)\{i\}(.*)\{title\}(.*)\{text\}(.*)", self.document, re.DOTALL)
        if parts is None:
            raise ConfigurationError(f"Dialect.document must hold {{i}}, {{title}} and {{text}}, in this order; got {self.document!r}.")
        object.__setattr__(self, "_document_parts", parts.groups())

    def __deepcopy__(self, memo: object) -> Dialect:
        return self

    @property
    def closers(self) -> tuple[str, str]:
        """The two tags that end a segment."""
        return (self.search_close, self.answer_close)

    def template(self, prompt: str) -> str:
        """The prompt template called ``prompt``, or ``prompt`` itself when it holds ``{question}``."""
        if prompt in self.prompts:
            return self.prompts[prompt]
        if "{question}" in prompt:
            return prompt
        raise ConfigurationError(
            f"prompt must be one of {sorted(self.prompts)} or a template with {{question}} in it; got {prompt!r} for dialect {self.name!r}."
        )

    def render_question(self, prompt: str, question: str) -> str:
        """The text of the prompt, before any chat template. Search-R1 strips the question and makes it end in a question mark."""
        template = self.template(prompt)
        if self.controls is not None and (prompt == "published" or prompt in self.system_prompts):
            template = self._told(template, self.controls)
        if self.question_mark and template != BARE_PROMPT:
            question = question.strip()
            if not question.endswith("?"):
                question += "?"
        return template.replace("{question}", question)

    def messages(self, text: str) -> tuple[str, str, str]:
        """The parts of a prompt of ``system_prompts`` in a chat template: the system's message, the user's, and what the reply begins with."""
        rules, _, rest = text.partition(self.question_label)
        question, _, opening = rest.rpartition(self.answer_label)
        return rules, question, opening

    def _told(self, template: str, controls: SearchControls) -> str:
        """The template with the sentence about controls behind its instructions."""
        place = template.index("{question}")
        label = template.rfind(self.question_label, 0, place)
        head, tail = (template[:label], template[label:]) if label >= 0 else (template[:place], template[place:])
        blank = "" if tail[:1].isspace() else " "
        return f"{head.rstrip()} {controls.sentence(self.search_open, self.search_close)}{blank}{tail}"

    def parse(self, text: str) -> Action:
        """The action of a segment's text: its first closing tag decides, and counts only behind its own opening tag."""
        search_end = text.find(self.search_close)
        answer_end = text.find(self.answer_close)
        if search_end < 0 and answer_end < 0:
            return Action("invalid", "")
        if answer_end < 0 or 0 <= search_end < answer_end:
            return self._content(text, "search", self.search_open, search_end)
        return self._content(text, "answer", self.answer_open, answer_end)

    def _content(self, text: str, kind: Literal["search", "answer"], opening: str, end: int) -> Action:
        start = text.find(opening, 0, end) if self.opener == "first" else text.rfind(opening, 0, end)
        if start < 0:
            return Action("invalid", "")
        content = text[start + len(opening) : end].strip()
        stated = None
        if kind == "search" and self.controls is not None:
            understood = self.controls.parse(content)
            if understood is None:
                return Action("invalid", "")
            content, stated = understood
        if kind == "search" and not content and self.empty_query_is_invalid:
            return Action("invalid", "")
        return Action(kind, content) if stated is None else ControlledSearch(content, stated)

    def document_text(self, number: int, passage: Passage, quoted_titles: bool) -> str:
        """One passage as the policy sees it, ``number`` counted from 1."""
        title = f'"{passage.title}"' if quoted_titles and passage.title else passage.title
        before, between, after, end = self._document_parts
        return f"{before}{number}{between}{title}{after if title else after.lstrip(' ')}{passage.text}{end}"


SEARCH_R1 = Dialect(
    name="search-r1",
    search_open="<search>",
    search_close="</search>",
    information_open="<information>",
    information_close="</information>",
    document="Doc {i}(Title: {title}) {text}\n",
    invalid_text=SEARCH_R1_INVALID,
    last_turn_text=SEARCH_R1_LAST_TURN,
    prompts={"published": SEARCH_R1_PROMPT, "no_search": R1_NO_SEARCH_PROMPT, "bare": BARE_PROMPT},
    quoted_titles=True,  # a title is the first line of `contents`, which carries its own double quotes
)
ZEROSEARCH = Dialect(
    name="zerosearch",
    search_open="<search>",
    search_close="</search>",
    information_open="<information>",
    information_close="</information>",
    document="Doc {i}: {title} {text}\n",
    invalid_text=SEARCH_R1_INVALID,
    last_turn_text=SEARCH_R1_LAST_TURN,
    prompts={"published": SEARCH_R1_PROMPT, "no_search": R1_NO_SEARCH_PROMPT, "bare": BARE_PROMPT},
)
R1_SEARCHER = Dialect(
    name="r1-searcher",
    search_open="<|begin_of_query|>",
    search_close="<|end_of_query|>",
    information_open="<|begin_of_documents|>",
    information_close="<|end_of_documents|>",
    document="({i}){title} {text}\n",
    before_documents="\n",
    invalid_text=None,
    last_turn_text=R1_SEARCHER_LAST_TURN,
    prompts={"published": R1_SEARCHER_PROMPT, "chat": R1_SEARCHER_CHAT_PROMPT, "bare": BARE_PROMPT},
    opener="last",
    question_mark=False,
    prompt_opens_think=True,
    chat=False,
    system_prompts=("chat",),
    empty_query_is_invalid=True,
    question_label="\n\nUser:",
)
DIALECTS = {dialect.name: dialect for dialect in (SEARCH_R1, R1_SEARCHER, ZEROSEARCH)}


def get_dialect(dialect: str | Dialect) -> Dialect:
    """The dialect of that name; a ``Dialect`` of your own is from then on known by its name, so that rewards find it, without controls."""
    if isinstance(dialect, Dialect):
        plain = dialect if dialect.controls is None else replace(dialect, controls=None)
        if DIALECTS.setdefault(dialect.name, plain) != plain:
            raise ConfigurationError(f"another dialect is already called {dialect.name!r}; give yours a name of its own.")
        return dialect
    if dialect in DIALECTS:
        return DIALECTS[dialect]
    raise ConfigurationError(f"dialect must be one of {sorted(DIALECTS)} or a Dialect; got {dialect!r}.")


@lru_cache(maxsize=256)
def _reserved_pattern(reserved: tuple[str, ...]) -> tuple[re.Pattern[str], tuple[str, ...]]:
    pattern = re.compile("|".join(re.escape(text) for text in sorted(reserved, key=len, reverse=True)))
    return pattern, tuple({text[0] for text in reserved})


def _defused(match: re.Match[str]) -> str:
    tag = match.group()
    return f"({tag[1:-1]})" if tag.startswith("[") else f"[{tag[1:-1]}]"


def reserved_strings(tags: Sequence[str], control_tokens: Iterable[str]) -> tuple[str, ...]:
    """The strings that must not reach a policy from outside: tags, and control tokens that look like markup (not, say, runs of blanks)."""
    markup = {text for text in control_tokens if len(text) > 2 and not text[0].isalnum() and not text.isspace() and not text[-1].isalnum()}
    return tuple(sorted({*tags, *markup}))


def neutralise(text: str, reserved: tuple[str, ...]) -> str:
    """Replace the outer brackets of every reserved string: ``<answer>`` becomes ``[answer]``. Repeats until none is left."""
    pattern, first_characters = _reserved_pattern(reserved)
    if not any(character in text for character in first_characters):
        return text
    for _ in range(4):
        text, count = pattern.subn(_defused, text)
        if not count:
            return text
    return pattern.sub("", text)  # nested so deep that it can only be an attack
