"""What a language model is told so that it answers a query as a search engine would, usefully or noisily."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from searchqa_retrievers.types import RetrieverError

FIELDS = ("query", "question", "answer", "count", "quality", "Quality")
"""What a template may have in braces; ``Quality`` is ``quality`` with a capital letter."""
MOST_QUERY_CHARACTERS = 1_000
"""A longer query is cut, so that a policy's endless one fits into a model's context."""

_SFT = """You are the Google search engine.
Given a query, you need to generate {count} {quality} documents for the query.

The user is trying to answer the question: "{question}" whose answer is {answer}.
Each document should contain about 30 words, and these documents should contain {quality} information.

Query: {query}
{Quality} Output:
"""

_DEMONSTRATED_QUERY = "When was the George Washington Bridge opened?"
_USEFUL = (
    "The George Washington Bridge opened to traffic on October 25, 1931, eight months ahead of schedule. The suspension bridge crosses the Hudson "
    "River between Upper Manhattan in New York City and Fort Lee, New Jersey.",
    "Ground for the George Washington Bridge was broken in 1927. Four years later, in October 1931, it was dedicated and opened, and its main span "
    "of 3,500 feet was then the longest in the world.",
    "Othmar Ammann was the chief engineer of the George Washington Bridge, which the Port Authority opened in 1931. Its architect was Cass Gilbert; "
    "the stone cladding that he planned was never added to the steel towers.",
    "When the George Washington Bridge opened in 1931 it had six lanes. Two more were added in 1946, and a lower level with six lanes was opened on "
    "August 29, 1962, which makes fourteen lanes in all.",
    "More than five million vehicles used the George Washington Bridge in the year after its opening on October 25, 1931. Today it carries over one "
    "hundred million a year and is among the busiest bridges in the world.",
)
_NOISY = (
    "Many visitors like to walk across the George Washington Bridge on a clear day. The path offers fine views of the river and the skyline, and there "
    "are several cafes nearby where one can rest afterwards.",
    "Bridges have been opened with ceremonies since ancient times. Ribbons are cut, speeches are held, and bands play. Crowds often come from far away "
    "to be among the first who cross a new bridge.",
    "George Washington was the first president of the United States. Streets, schools, universities and a state are named after him, and his portrait "
    "can be seen on coins and banknotes of the country.",
    "The Little Red Lighthouse stands on a small point of land by the Hudson River. A well-known book for children tells its story, and volunteers "
    "open it to the public a few times each year.",
    "Suspension bridges hang their deck on cables that run over tall towers. Engineers must take wind, weight and temperature into account, and the "
    "painting and inspection of the steel never really comes to an end.",
)
_PROMPTED = """You are the Google search engine.
Given a query, you need to generate {count} {quality} documents for the query.
Each document should contain about 30 words, and these documents should contain {quality} information.

Here is an example.

Query: """

_WORLD = " {quality} {count}<answer> {answer}</answer>Question: {question}<search> {query}</search><information>"

_FIELD = re.compile(r"\{(\w+)\}")
_UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True)
class SimulationPrompt:
    """The prompt of a simulator in its two forms.

    Attributes
    ----------
    name : str
        ``sft``, ``prompted``, ``world``, or ``template`` for a user's own.
    useful, noisy : str
        Templates with some of :data:`FIELDS` in braces.
    examples : tuple of tuple of str
        Documents of the demonstration that stands at ``{examples}``, useful and noisy ones; as many as are asked for, where there are enough.
    words : tuple of str
        What ``{quality}`` says in the useful and in the noisy form.
    digits : bool
        Whether ``{count}`` is a number in digits, and not a word.
    """

    name: str
    useful: str
    noisy: str
    examples: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    words: tuple[str, str] = ("useful", "noisy")
    digits: bool = False

    @property
    def fields(self) -> frozenset[str]:
        """The names in braces, of both forms."""
        return frozenset(_FIELD.findall(self.useful + self.noisy))

    @property
    def sha256(self) -> str:
        """Hash of all that makes the text of a prompt."""
        parts = [self.useful, self.noisy, self.examples, self.words, self.digits, MOST_QUERY_CHARACTERS]
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def write(self, noisy: bool, top_k: int, query: str, question: str, answer: str) -> str:
        """The prompt. Lone surrogates, which no tokenizer takes, become "?"."""
        quality = self.words[noisy]
        shown = "\n".join(f"Doc {number}: {text}" for number, text in enumerate(self.examples[noisy][:top_k], start=1))
        values: Mapping[str, str] = {
            "query": query[:MOST_QUERY_CHARACTERS],
            "question": question,
            "answer": answer,
            "count": str(top_k) if self.digits else number_word(top_k),
            "quality": quality,
            "Quality": quality.capitalize(),
            "examples": shown,
        }
        text = _FIELD.sub(lambda match: values[match[1]], self.noisy if noisy else self.useful)
        return text.encode("utf-8", "replace").decode()


_TOLD = 'The user is trying to answer the question: "{question}" whose answer is {answer}.\n'
_DEMONSTRATED = f"{_PROMPTED}{_DEMONSTRATED_QUERY}\n{{Quality}} Output:\n{{examples}}\n\nNow it is your turn.\n"
_ASKED = "\nQuery: {query}\n{Quality} Output:\n"

PROMPTS: Mapping[str, SimulationPrompt] = {
    "sft": SimulationPrompt("sft", _SFT, _SFT),
    "prompted": SimulationPrompt("prompted", f"{_DEMONSTRATED}{_TOLD}{_ASKED}", f"{_DEMONSTRATED}{_ASKED}", (_USEFUL, _NOISY)),
    "world": SimulationPrompt("world", _WORLD, _WORLD, words=("yes", "no"), digits=True),
}
"""``sft``: the published prompt of ZeroSearch's tuned simulators, to the letter for five documents. ``prompted``: the published form for a model that
was not tuned, with one demonstration, and with question and answer in the useful form only; the demonstration's words are our own. ``world``: a few
tokens for a tiny model on the generated world, of marks and words that its tokenizer has; yes is useful."""


def simulation_prompt(prompt: str) -> SimulationPrompt:
    """The prompt of a name of :data:`PROMPTS`, or of a template, a text with ``{query}`` and any others of :data:`FIELDS`.

    Raises
    ------
    RetrieverError
        It is neither, or the template has other names in braces.
    """
    if prompt in PROMPTS:
        return PROMPTS[prompt]
    names = set(_FIELD.findall(prompt))
    if "query" not in names:
        raise RetrieverError(f"prompt must be one of {', '.join(PROMPTS)}, or a template with {{query}} in it, got {prompt!r:.200}")
    unknown = sorted(names - set(FIELDS))
    if unknown:
        raise RetrieverError(f"a prompt's template has no field {', '.join(unknown)}; it may have {', '.join(FIELDS)}")
    return SimulationPrompt("template", prompt, prompt)


def number_word(number: int) -> str:
    """A whole number of at least 0 in words up to ninety-nine, beyond in digits."""
    if number < len(_UNITS):
        return _UNITS[number]
    if number > 99:
        return str(number)
    tens, unit = _TENS[number // 10 - 2], number % 10
    return f"{tens}-{_UNITS[unit]}" if unit else tens
