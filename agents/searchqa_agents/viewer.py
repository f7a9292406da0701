"""Trajectories and curves as one HTML page that needs nothing from outside itself.

Text of a corpus or a policy may be hostile: it is embedded as JSON that cannot end its script element, put into the page as text only, and the
page's content security policy forbids every request, and every script but the page's own.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from searchqa_agents.curves import Panel
from searchqa_agents.page_data import finite, packed
from searchqa_agents.trajectory import Trajectory
from searchqa_envs.tokenizers.base import Tokenizer


def build_page(
    sets: Mapping[str, Sequence[Trajectory]],
    tokenizer: Tokenizer | Mapping[str, Tokenizer | None] | None,
    *,
    title: str,
    subtitle: str = "",
    table: tuple[Sequence[str], Sequence[Sequence[str]]] = ((), ()),
    stamp: Mapping[str, Any] | None = None,
    picture: bytes | None = None,
    notes: Sequence[str] = (),
    curves: Sequence[Panel] = (),
) -> str:
    """The page.

    Parameters
    ----------
    sets
        Trajectories by the name of their set, such as "before" and "after"; a question that is in several can be seen side by side.
    tokenizer
        The one that the trajectories were made with, or that of each set, for the text of single tokens; None shows texts whole, without log-probabilities.
    table
        Names of the columns, and rows of cells, shown at the top.
    picture
        A PNG shown at the top.
    notes
        Lines under the table.
    curves
        Drawn by the page beside the table, with their values under the pointer.
    """
    tokenizers = tokenizer if isinstance(tokenizer, Mapping) else dict.fromkeys(sets, tokenizer)
    data = {
        "title": title,
        "subtitle": subtitle,
        "stamp": dict(stamp or {}),
        "table": {"columns": list(table[0]), "rows": [list(row) for row in table[1]]},
        "notes": list(notes),
        "picture": base64.b64encode(picture).decode("ascii") if picture else None,
        "curves": [panel._asdict() for panel in curves],
        "sets": list(sets),
    }
    style = _own("viewer.css")
    script = _own("viewer_curves.js") + _own("viewer.js")
    filled = {
        "TITLE": html.escape(title.encode("utf-8", "replace").decode()),
        "STYLE": style,
        "STYLE_HASH": _hash(style),
        "SCRIPT": script,
        "SCRIPT_HASH": _hash(script),
        "DATA": embedded_json(data),
        **{name.upper(): compressed(part) for name, part in packed(sets, tokenizers).items()},
    }
    return re.sub("__([A-Z_]+?)__", lambda found: filled[found.group(1)], _own("viewer.html"))


def _own(name: str) -> str:
    return files("searchqa_agents").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names what it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def embedded_json(value: Any) -> str:
    """JSON in ASCII without ``<``, ``>`` or ``&``, so that no text in it can end the element it stands in."""
    text = json.dumps(finite(value), separators=(",", ":"), default=str, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def compressed(part: bytes) -> str:
    """Base64 of gzip, the same for the same bytes."""
    return base64.b64encode(gzip.compress(part, compresslevel=6, mtime=0)).decode("ascii")
