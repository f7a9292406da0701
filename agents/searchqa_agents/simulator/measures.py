"""What a simulator's documents are like: whether they hold the answer, are about the query, look like real pages, and differ by quality."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from searchqa_agents.simulator.rows import Label, SearchRow
from searchqa_envs.normalise import normalise_squad
from searchqa_retrievers.types import Passage

MEASURES: Mapping[str, str] = {
    "answer_last": "answer in it, last search",
    "answer_earlier": "answer in it, earlier search",
    "answer_other": "answer in it, another name",
    "about_query": "about the query",
    "whole": "as many as asked for",
    "real_form": "form of a real page",
    "words": "words in a document",
    "distinct": "different documents",
    "overlap": "words shared with the other",
}
"""Each measure with its title; shares of documents, but for ``words`` (mean), ``whole`` (of searches), ``distinct`` (different texts in all) and
``overlap`` (Jaccard index of the sets of words written for the same search in both qualities, mean)."""
_NAME = re.compile(r"\b[A-Z][\w'-]*")
_NUMBER = re.compile(r"\d+")


class Written(NamedTuple):
    """The documents for one search."""

    row: SearchRow
    quality: Label
    documents: Sequence[Passage]
    other: bool = False
    """the query was another name (:func:`other_names`), in the place of the row's own"""


def other_names(rows: Sequence[SearchRow], seed: int) -> dict[str, Passage]:
    """By row, a page drawn from those of the same world whose name has nothing to do with the row's question.

    It is none that was found for the question, its title stands neither in the question nor among its queries, supporting titles and golden
    answers. The world is what ``question_id`` has before its last hyphen; rows without a hyphen there are all of one. A row without such a page
    is absent.
    """
    pages: dict[str, dict[str, Passage]] = {}
    related: dict[str, set[str]] = {}
    for row in rows:
        found = pages.setdefault(_world(row), {})
        found.update((document.title, document) for document in row.documents if normalise_squad(document.title))
        names = related.setdefault(row.question_id, set())
        names |= {normalise_squad(name) for name in (row.query, *row.supporting_titles, *row.golden_answers)}
        names |= {normalise_squad(document.title) for document in row.documents}
    drawn = {}
    for row in rows:
        question = f" {normalise_squad(row.question)} "
        candidates = [
            title
            for title in sorted(pages[_world(row)])
            if normalise_squad(title) not in related[row.question_id] and f" {normalise_squad(title)} " not in question
        ]
        if candidates:
            drawn[row.id] = pages[_world(row)][random.Random(f"{seed} {row.id}").choice(candidates)]
    return drawn


def _world(row: SearchRow) -> str:
    return row.question_id.rpartition("-")[0]


def page_form(text: str) -> str:
    """A text with every capitalised word as ``N`` and every number as ``0``: what is left of a page without its facts."""
    return _NUMBER.sub("0", _NAME.sub("N", " ".join(text.split())))


def holds_answer(document: Passage, golden_answers: Sequence[str]) -> bool:
    """Whether a golden answer stands in the title or text as whole words, both in their normal form."""
    text = f" {normalise_squad(f'{document.title} {document.text}')} "
    return any(f" {normalise_squad(answer)} " in text for answer in golden_answers if normalise_squad(answer))


def about_query(document: Passage, query: str) -> bool:
    """Whether the title is the query, or the text begins with it, in their normal forms."""
    wanted = normalise_squad(query)
    return bool(wanted) and (normalise_squad(document.title) == wanted or f"{normalise_squad(document.text)} ".startswith(f"{wanted} "))


def measure_documents(written: Sequence[Written], top_k: int | None, real_forms: frozenset[str]) -> dict[Label, dict[str, float]]:
    """For each quality the :data:`MEASURES`; one without anything to measure is absent.

    Parameters
    ----------
    written
        Each search once for each quality.
    top_k
        Documents that were asked for at each search; None: any number is whole.
    real_forms
        :func:`page_form` of real pages.
    """
    found: dict[Label, dict[str, float]] = {}
    others = [one for one in written if one.other]
    written = [one for one in written if not one.other]
    words = {(one.row.id, one.quality): {word for d in one.documents for word in normalise_squad(d.text).split()} for one in written}
    for quality in dict.fromkeys(one.quality for one in written):
        own = [one for one in written if one.quality == quality]
        other: Label = "noisy" if quality == "useful" else "useful"
        documents = [(one.row, document) for one in own for document in one.documents]
        pairs = [(words[one.row.id, quality], words[one.row.id, other]) for one in own if (one.row.id, other) in words]
        shares: dict[str, list[float]] = {
            "answer_last": [float(holds_answer(d, row.golden_answers)) for row, d in documents if row.last],
            "answer_earlier": [float(holds_answer(d, row.golden_answers)) for row, d in documents if not row.last],
            "answer_other": [float(holds_answer(d, o.row.golden_answers)) for o in others if o.quality == quality for d in o.documents],
            "about_query": [float(about_query(d, row.query)) for row, d in documents],
            "whole": [] if top_k is None else [float(len(one.documents) == top_k) for one in own],
            "real_form": [float(page_form(d.text) in real_forms) for _, d in documents],
            "words": [float(len(d.text.split())) for _, d in documents],
            "overlap": [len(a & b) / len(a | b) for a, b in pairs if a | b],
        }
        means = {name: sum(values) / len(values) for name, values in shares.items() if values}
        if documents:
            means["distinct"] = len({d.text for _, d in documents}) / len(documents)
        found[quality] = {name: means[name] for name in MEASURES if name in means} | {"documents": float(len(documents))}
    return found
