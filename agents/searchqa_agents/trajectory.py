"""One episode as tokens, and its JSON Lines file."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1


class TrajectoryFileError(ValueError):
    """A line of a trajectory file cannot be read; the message names file, line and cause."""


class TurnSpan(NamedTuple):
    """Where one turn lies in ``token_ids``, and what it says.

    The segment is ``[start, segment_end)``, the environment's reply ``[segment_end, end)``. ``segment``, ``observation`` and ``content`` (the
    query or the answer) are text for people and viewers. ``passages`` are the id and title of each passage that the turn retrieved, best first.
    """

    start: int
    segment_end: int
    end: int
    action: str
    content: str
    segment: str
    observation: str
    passages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One finished episode.

    Attributes
    ----------
    token_ids
        int32[T]: prompt, then segments and environment text in turn, exactly as the policy saw and sampled them.
    loss_mask
        int8[T]: 1 for tokens the policy sampled, 0 for prompt and environment text.
    logprobs
        float32[T]: log-probability of each sampled token under the full softmax at the sampling temperature (at temperature 0: of the plain
        softmax), 0 where the mask is 0. None where the agent gives none.
    sampling_logprobs
        float32[T]: the same under the truncated distribution, when top-p or top-k cut it; else None.
    advantages
        float32[T]: the advantage with which an update weighed each sampled token, 0 where the mask is 0 and in episodes that nothing was
        learned from. None outside of training.
    reward, reward_terms, metrics
        As the environment gave them at the end; terms and metrics are empty when the search back end was lost.
    retokenized
        True when the agent gave text that had to be encoded, so that these are not the ids it sampled. Trainers refuse such trajectories.
    seconds
        Time by part: ``model``, ``search``, ``environment``. A batched call's time is shared equally by its episodes. And from the episode's reset to its end,
        in :func:`~searchqa_agents.rollout.rollout`: ``wall``, which is no part, and longer where others were played beside it. Not part of equality.
    stamp
        What a number needs to be comparable: data set, retriever, dialect, seed, ...
    usage
        What the agent's language model did for the episode beyond the recorded tokens: ``calls``, ``prompt_tokens``, ``generated_tokens``. Empty for
        an agent whose tokens are all recorded.
    """

    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.int8]
    logprobs: NDArray[np.float32] | None
    turns: tuple[TurnSpan, ...]
    prompt: str
    reward: float
    question_id: str
    question: str
    golden_answers: tuple[str, ...]
    answer: str | None
    terminated: bool
    truncated: bool
    reward_terms: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    sampling_logprobs: NDArray[np.float32] | None = None
    backend_error: str | None = None
    retokenized: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    stamp: Mapping[str, Any] = field(default_factory=dict)
    usage: Mapping[str, float] = field(default_factory=dict)
    advantages: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        for name in ("loss_mask", "logprobs", "sampling_logprobs", "advantages"):
            array = getattr(self, name)
            if array is not None and array.shape != (length,):
                raise ValueError(f"{name} must have one entry per token, shape ({length},); got {array.shape}.")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trajectory):
            return NotImplemented
        return all(_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name != "seconds")

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"Trajectory(question_id={self.question_id!r}, token_ids=int32[{len(self.token_ids)}], sampled={int(self.loss_mask.sum())}, "
            f"turns={len(self.turns)}, reward={self.reward:g}, answer={self.answer!r}, terminated={self.terminated}, "
            f"truncated={self.truncated}, backend_error={self.backend_error!r})"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values that JSON can hold; log-probabilities and advantages are kept for sampled tokens only, with all digits of float32.

        Without advantages there is no such key, so that earlier versions read the line too.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {
            "schema_version": SCHEMA_VERSION,
            "token_ids": self.token_ids.tolist(),
            "loss_mask": self.loss_mask.tolist(),
            "logprobs": self._sampled(self.logprobs),
            "sampling_logprobs": self._sampled(self.sampling_logprobs),
            "turns": [turn._asdict() for turn in self.turns],
            "golden_answers": list(self.golden_answers),
        }
        values |= {name: dict(values[name]) for name in ("reward_terms", "metrics", "seconds", "stamp", "usage")}
        if self.advantages is None:
            del values["advantages"]
        else:
            values["advantages"] = self._sampled(self.advantages)
        return values

    def _sampled(self, array: NDArray[np.float32] | None) -> list[float] | None:
        return None if array is None else [float(f"{value:.9g}") for value in array[self.loss_mask == 1]]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Trajectory:
        """The trajectory that :meth:`to_json` wrote; raises ``ValueError``, ``KeyError`` or ``TypeError`` for anything else."""
        values = dict(values)
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version must be {SCHEMA_VERSION}; got {version!r}")
        loss_mask = np.array(values["loss_mask"], dtype=np.int8)

        def spread(sampled: list[float] | None) -> NDArray[np.float32] | None:
            if sampled is None:
                return None
            array = np.zeros(len(loss_mask), dtype=np.float32)
            array[loss_mask == 1] = sampled
            return array

        values |= {
            "token_ids": np.array(values["token_ids"], dtype=np.int32),
            "loss_mask": loss_mask,
            "logprobs": spread(values["logprobs"]),
            "sampling_logprobs": spread(values["sampling_logprobs"]),
            "advantages": spread(values.get("advantages")),
            "turns": tuple(_turn(turn) for turn in values["turns"]),
            "golden_answers": tuple(values["golden_answers"]),
        }
        return cls(**values)


def _turn(values: Mapping[str, Any]) -> TurnSpan:
    passages = values.get("passages", ())  # files of earlier versions have none
    return TurnSpan(**{**values, "passages": tuple((str(name), str(title)) for name, title in passages)})


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and bool(a == b)


def append_trajectories(path: str | os.PathLike[str], trajectories: Iterable[Trajectory]) -> None:
    """Append one JSON line per trajectory; gzip where the name ends in ``.gz``.

    A last line that an interrupted run left unfinished is removed first, so that a resumed run's file stays readable. (In a ``.gz`` file each
    call writes one gzip member; an interrupted member is reported by :func:`load_trajectories` instead.)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(trajectory.to_json(), ensure_ascii=False) + "\n" for trajectory in trajectories)
    if path.suffix == ".gz":
        with gzip.open(path, "at", encoding="utf-8") as file:
            file.write(text)
        return
    _remove_unfinished_line(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def _remove_unfinished_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            logger.warning("%s: removed an unfinished last line of %d bytes.", path, len(content) - complete)
            file.truncate(complete)


def iterate_trajectories(path: str | os.PathLike[str]) -> Iterator[Trajectory]:
    """The trajectories of a file, one by one; raises ``TrajectoryFileError`` at a line that is not one."""
    path = Path(path)
    number = 1
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for line in file:
                yield Trajectory.from_json(json.loads(line))
                number += 1
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, gzip.BadGzipFile) as error:
        raise TrajectoryFileError(
            f"{path}, line {number}: not a trajectory of schema version {SCHEMA_VERSION}: {type(error).__name__}: {error}. "
            "Remove the line or write the file again."
        ) from error


def load_trajectories(path: str | os.PathLike[str]) -> list[Trajectory]:
    """All trajectories of a file."""
    return list(iterate_trajectories(path))
