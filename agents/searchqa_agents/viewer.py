"""Trajectories as one HTML page that needs nothing from outside itself.

Text of a corpus or a policy may be hostile: it is embedded as JSON that cannot end its script element, put into the page as text only, and the
page's content security policy forbids every request.
"""

from __future__ import annotations

import base64
import codecs
import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from searchqa_agents.trajectory import Trajectory
from searchqa_envs.tokenizers.base import Tokenizer


def build_page(
    sets: Mapping[str, Sequence[Trajectory]],
    tokenizer: Tokenizer | None,
    *,
    title: str,
    subtitle: str = "",
    table: tuple[Sequence[str], Sequence[Sequence[str]]] = ((), ()),
    stamp: Mapping[str, Any] | None = None,
    picture: bytes | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page.

    Parameters
    ----------
    sets
        Trajectories by the name of their set, such as "before" and "after"; a question that is in several is shown side by side.
    tokenizer
        The one that the trajectories were made with, for the text of single tokens; None shows segments whole, without log-probabilities.
    table
        Names of the columns, and rows of cells, shown at the top.
    picture
        A PNG shown at the top.
    notes
        Lines under the table.
    """
    items = [item_of(trajectory, tokenizer, name) for name, trajectories in sets.items() for trajectory in trajectories]
    data = {
        "title": title,
        "subtitle": subtitle,
        "stamp": dict(stamp or {}),
        "table": {"columns": list(table[0]), "rows": [list(row) for row in table[1]]},
        "notes": list(notes),
        "picture": base64.b64encode(picture).decode("ascii") if picture else None,
        "sets": list(sets),
        "items": [{**item, "place": place} for place, item in enumerate(items)],
    }
    template = files("searchqa_agents").joinpath("viewer.html").read_text(encoding="utf-8")
    head, rest = template.split("__TITLE__")
    middle, end = rest.split("__DATA__")
    return head + html.escape(title) + middle + embedded_json(data) + end


def embedded_json(value: Any) -> str:
    """JSON in ASCII without ``<``, ``>`` or ``&``, so that no text in it can end the element it stands in."""
    text = json.dumps(_finite(value), separators=(",", ":"), default=str, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """With None for numbers that JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def item_of(trajectory: Trajectory, tokenizer: Tokenizer | None, set_name: str) -> dict[str, Any]:
    """What the page shows of a trajectory. ``turns[i]["tokens"]`` are ``[text, log-prob or null, loss mask]``."""
    return {
        "set": set_name,
        "id": trajectory.question_id,
        "question": trajectory.question,
        "gold": list(trajectory.golden_answers),
        "answer": trajectory.answer,
        "outcome": outcome(trajectory),
        "ending": trajectory.backend_error or ("truncated" if trajectory.truncated else "terminated"),
        "searches": int(trajectory.metrics.get("searches", sum(turn.action == "search" for turn in trajectory.turns))),
        "length": len(trajectory.token_ids),
        "reward": trajectory.reward,
        "terms": dict(trajectory.reward_terms),
        "metrics": dict(trajectory.metrics),
        "prompt": trajectory.prompt,
        "turns": [
            {
                "action": turn.action,
                "content": turn.content,
                "tokens": _tokens(trajectory, turn.start, turn.segment_end, turn.segment, tokenizer),
                "reply": turn.observation,
            }
            for turn in trajectory.turns
        ],
    }


def outcome(trajectory: Trajectory) -> str:
    """ "correct" (exact match), "partly" (F1 above 0), "wrong", "none" (no answer) or "lost" (the search back end)."""
    if trajectory.backend_error is not None:
        return "lost"
    if trajectory.answer is None:
        return "none"
    if trajectory.metrics.get("em", 0.0) >= 1.0:
        return "correct"
    return "partly" if trajectory.metrics.get("f1", 0.0) > 0 else "wrong"


def _tokens(trajectory: Trajectory, start: int, end: int, text: str, tokenizer: Tokenizer | None) -> list[list[Any]]:
    mask = trajectory.loss_mask[start:end].tolist()
    if tokenizer is None or (trajectory.logprobs is None and all(mask)):
        return [[text, None, 1]]
    logprobs = [None] * len(mask) if trajectory.logprobs is None else [round(float(x), 4) for x in trajectory.logprobs[start:end]]
    ids = trajectory.token_ids[start:end].tolist()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character's text is shown at the token that completes it
    tokens = []
    for place, (one, piece, logprob, own) in enumerate(zip(ids, tokenizer.pieces(ids), logprobs, mask, strict=True)):
        shown = decoder.decode(piece, final=place == len(ids) - 1)
        if one == tokenizer.eos_id:
            shown += "⏹"
        tokens.append([shown, logprob if own else None, own])
    return tokens
