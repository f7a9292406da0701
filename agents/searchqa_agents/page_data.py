"""Trajectories as what a page holds of them: every text once, tokens as the places where a text is cut, numbers as arrays."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchqa_agents.trajectory import Trajectory
from searchqa_envs.tokenizers.base import Tokenizer

END_OF_SEQUENCE = "⏹"
_KEPT_BITS = np.uint32(0xFFFFF000)
"""Of a float32: sign, exponent, and 11 of the 23 bits behind the point. The others would fill most of a compressed page."""


def packed(sets: Mapping[str, Sequence[Trajectory]], tokenizers: Mapping[str, Tokenizer | None]) -> dict[str, bytes]:
    """The parts of a page, by name; the page's script reads them.

    Returns
    -------
    dict
        ``trajectories``: JSON of ``texts``; ``starts``, of the cuts of each text, and where the last end; ``items``, see :meth:`_Packer.add`; and
        ``advantage_scale``, the absolute advantage that only one in 50 tokens exceeds, or 0.
        ``cuts``: uint32 for each token of each text, twice its length in UTF-16 units, plus 1 where the policy sampled it. A text without cuts is shown whole.
        ``logprobs``, ``advantages``: float32 for each sampled token of each item that has them, one item behind the other, to three digits.
    """
    packer = _Packer()
    for name, trajectories in sets.items():
        for number, trajectory in enumerate(trajectories):
            packer.add(trajectory, tokenizers.get(name), name, number)
    return packer.parts()


class _Packer:
    def __init__(self) -> None:
        self._items: list[dict[str, Any]] = []
        self._texts: list[str] = []
        self._cuts: list[NDArray[np.uint32]] = []
        self._places: dict[tuple[str, bytes], int] = {}
        self._known: dict[tuple[int, bytes, bytes], int] = {}
        self._numbers: dict[str, list[NDArray[np.float32]]] = {"logprobs": [], "advantages": []}
        self._counts = {"logprobs": 0, "advantages": 0}

    def add(self, trajectory: Trajectory, tokenizer: Tokenizer | None, set_name: str, number: int) -> None:
        """Add a trajectory.

        ``prompt`` and the last two of each of ``turns`` (action, content, segment, reply) are places in ``texts``, -1 for no reply. ``logprobs`` and
        ``advantages`` are the place of the first sampled token's, -1 for none; ``peak`` is the largest absolute advantage, -1 without any.
        """
        scored = trajectory.logprobs is not None or trajectory.advantages is not None
        start = trajectory.turns[0].start if trajectory.turns else len(trajectory.token_ids)
        numbered, peak = dict.fromkeys(self._numbers, -1), -1.0
        if tokenizer is not None:
            sampled = self._sampled(trajectory)
            numbered = {name: self._number(name, getattr(trajectory, name), sampled) for name in self._numbers}
            if trajectory.advantages is not None:
                peak = float(f"{np.abs(trajectory.advantages[sampled]).max(initial=0.0):.4g}")
        turns = []
        for turn in trajectory.turns:
            whole = not scored and bool(trajectory.loss_mask[turn.start : turn.segment_end].all())
            segment = self._text(trajectory, turn.start, turn.segment_end, turn.segment, None if whole else tokenizer)
            reply = self._text(trajectory, turn.segment_end, turn.end, turn.observation, tokenizer) if turn.observation else -1
            turns.append([turn.action, turn.content, segment, reply])
        self._items.append(
            {
                "set": set_name,
                "number": number,
                "id": trajectory.question_id,
                "question": trajectory.question,
                "gold": list(trajectory.golden_answers),
                "answer": trajectory.answer,
                "outcome": outcome(trajectory),
                "ending": trajectory.backend_error or ("truncated" if trajectory.truncated else "terminated"),
                "truncated": trajectory.truncated and trajectory.backend_error is None,
                "searches": int(trajectory.metrics.get("searches", sum(turn.action == "search" for turn in trajectory.turns))),
                "length": len(trajectory.token_ids),
                "retokenized": trajectory.retokenized,
                "reward": trajectory.reward,
                "terms": dict(trajectory.reward_terms),
                "metrics": dict(trajectory.metrics),
                "prompt": self._text(trajectory, 0, start, trajectory.prompt, tokenizer),
                "turns": turns,
                **numbered,
                "peak": peak,
            }
        )

    def parts(self) -> dict[str, bytes]:
        """See :func:`packed`."""
        numbers = {name: np.concatenate([*arrays, np.zeros(0, np.float32)]) for name, arrays in self._numbers.items()}
        weighed = np.abs(numbers["advantages"][numbers["advantages"] != 0])
        starts = np.cumsum([0, *map(len, self._cuts)])
        rest = {
            "texts": self._texts,
            "starts": starts.tolist(),
            "items": self._items,
            "advantage_scale": float(np.quantile(weighed, 0.98)) if len(weighed) else 0.0,
        }
        return {
            "trajectories": json.dumps(finite(rest), separators=(",", ":"), default=str, allow_nan=False).encode("ascii"),
            "cuts": np.concatenate([*self._cuts, np.zeros(0, np.uint32)]).astype("<u4").tobytes(),
            **{name: rounded(array).astype("<f4").tobytes() for name, array in numbers.items()},
        }

    @staticmethod
    def _sampled(trajectory: Trajectory) -> NDArray[np.bool_]:
        """bool[T]: where a text of the page has a token that the policy sampled, which all lie in segments."""
        inside = np.zeros(len(trajectory.loss_mask), dtype=np.bool_)
        for turn in trajectory.turns:
            inside[turn.start : turn.segment_end] = True
        inside &= trajectory.loss_mask == 1
        return inside

    def _number(self, name: str, array: NDArray[np.float32] | None, sampled: NDArray[np.bool_]) -> int:
        if array is None:
            return -1
        place = self._counts[name]
        self._numbers[name].append(array[sampled])
        self._counts[name] += int(sampled.sum())
        return place

    def _text(self, trajectory: Trajectory, start: int, end: int, text: str, tokenizer: Tokenizer | None) -> int:
        """The place of a text that lies in ``[start, end)`` of the trajectory; without a tokenizer of ``text``, whole."""
        if tokenizer is None:
            return self._place(text, np.zeros(0, np.uint32))
        ids, mask = trajectory.token_ids[start:end], trajectory.loss_mask[start:end]
        key = (id(tokenizer), ids.tobytes(), mask.tobytes())
        if key not in self._known:
            text, lengths = cut(ids.tolist(), tokenizer)
            self._known[key] = self._place(text, 2 * lengths + mask.astype(np.uint32))
        return self._known[key]

    def _place(self, text: str, cuts: NDArray[np.uint32]) -> int:
        place = self._places.setdefault((text, cuts.tobytes()), len(self._texts))
        if place == len(self._texts):
            self._texts.append(text)
            self._cuts.append(cuts)
        return place


def outcome(trajectory: Trajectory) -> str:
    """ "correct" (exact match), "partly" (F1 above 0), "wrong", "none" (no answer) or "lost" (the search back end)."""
    if trajectory.backend_error is not None:
        return "lost"
    if trajectory.answer is None:
        return "none"
    if trajectory.metrics.get("em", 0.0) >= 1.0:
        return "correct"
    return "partly" if trajectory.metrics.get("f1", 0.0) > 0 else "wrong"


def cut(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, NDArray[np.uint32]]:
    """The text of tokens, and uint32[T]: the UTF-16 units of each, as scripts of pages count. A character of several tokens is of that which completes it."""
    pieces = tokenizer.pieces(ids)
    joined = b"".join(pieces)
    if joined.isascii() and tokenizer.eos_id not in ids:
        return joined.decode("ascii"), np.fromiter(map(len, pieces), np.uint32, len(pieces))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for place, (one, piece) in enumerate(zip(ids, pieces, strict=True)):
        text = decoder.decode(piece, final=place == len(ids) - 1)
        texts.append(text + END_OF_SEQUENCE if one == tokenizer.eos_id else text)
    return "".join(texts), np.array([len(text.encode("utf-16-le")) // 2 for text in texts], dtype=np.uint32)


def rounded(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """To 12 significant bits: off by at most one part in 4,096."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    kept = (bits + np.uint32(0x800)) & _KEPT_BITS
    return np.where(np.isfinite(array), kept.view(np.float32), array).astype(np.float32)


def finite(value: Any) -> Any:
    """Plain values for JSON, with None for numbers that it cannot say."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value
