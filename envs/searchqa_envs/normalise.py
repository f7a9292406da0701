"""How the three systems normalise an answer before they compare it.

Published scores depend on which one is used, so metrics and rewards name theirs.
"""

from __future__ import annotations

import re
import string
from functools import lru_cache

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_DELETE_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))
_BLANK_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation + "‘’´`"), " ")
_KEPT_FORMS = 1 << 13
"""Golden answers come back; a file of long answers that are seen once must not fill the memory."""


@lru_cache(maxsize=_KEPT_FORMS)
def normalise_squad(text: str) -> str:
    """Search-R1, ZeroSearch and SQuAD: lower case, ASCII punctuation deleted, a/an/the blanked, blanks collapsed.

    Punctuation is deleted, so "U.S." becomes "us" and "Twenty-One" becomes "twentyone".
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETE_PUNCTUATION)).split())


@lru_cache(maxsize=_KEPT_FORMS)
def normalise_r1_searcher(text: str) -> str:
    """R1-Searcher: underscores and punctuation (also ‘ ’ ´ `) become blanks, lower case, articles blanked, blanks collapsed.

    Punctuation becomes a blank, so "U.S." becomes "u s". A whole text "True" or "False" becomes "yes" or "no".
    """
    text = {"True": "yes", "False": "no"}.get(text, text)
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_BLANK_PUNCTUATION)).split())
