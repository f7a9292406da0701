"""Episodes as Parquet tables for offline RL: one row per episode, per turn, or per token; and episodes read back from such a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np

from searchqa_agents.runs import replace_file
from searchqa_agents.trajectory import Trajectory, TurnSpan
from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    import pyarrow

TABLE_VERSION = 1
"""Of the columns."""
SCHEMA_KEY, ROWS_KEY = b"searchqa.schema_version", b"searchqa.rows"
STAMP_KEY = b"searchqa.stamp"
ROWS_PER_GROUP = 1_000
TOKENS_PER_GROUP = 500_000
"""A row group ends with the first of the two, so that writing and reading need little memory, whatever the file's size."""

Rows = Literal["episodes", "turns", "tokens"]
_ARRAYS = {"logprobs": np.float32, "sampling_logprobs": np.float32, "advantages": np.float32}
_NUMBERS = ("reward_terms", "metrics", "seconds", "usage")


class Episode(NamedTuple):
    """A trajectory and where it was found: the run's folder name, the file's name, and its line, from 0."""

    run: str
    file: str
    line: int
    trajectory: Trajectory


class TableError(ValueError):
    """A file is not a table of episodes that this version can read; the message names file and cause."""


def write_parquet(
    path: Path, episodes: Iterable[Episode], rows: Rows = "episodes", stamp: Mapping[str, Any] | None = None
) -> tuple[int, int]:
    """Write a table, in one go under its name; memory does not grow with the number of episodes.

    Parameters
    ----------
    rows
        ``episodes``: all of a trajectory, see :func:`read_parquet`. ``turns``: what an offline algorithm over segments needs: ``observation`` (the context's
        ids), ``action`` (the segment's ids), ``reply`` (the ids that the environment appended: observation, action and reply are the next observation),
        ``reward`` (at the last turn, else 0), ``terminated``, ``truncated``. ``tokens``: a row per token of the context in order, with ``loss_mask`` and the
        episode's reward at its last sampled token; the context of a token is the rows before it with the same ``episode``.
    stamp
        Of the run; kept in the file's metadata as JSON under ``searchqa.stamp``.

    Returns
    -------
    tuple of int
        Episodes and rows written.

    Raises
    ------
    ConfigurationError
        If pyarrow is not installed.
    """
    pa, pq = _pyarrow()
    metadata = {SCHEMA_KEY: str(TABLE_VERSION).encode(), ROWS_KEY: rows.encode()}
    if stamp:
        metadata[STAMP_KEY] = json.dumps(dict(stamp), ensure_ascii=True, default=str).encode()
    schema = _schema(pa, rows).with_metadata(metadata)
    counts = [0, 0]

    def write(partial: Path) -> None:
        with pq.ParquetWriter(partial, schema) as writer:
            group: list[dict[str, Any]] = []
            tokens = 0
            for episode in episodes:
                new = list(_ROWS[rows](episode, counts[0]))
                counts[0] += 1
                counts[1] += len(new)
                group += new
                tokens += len(episode.trajectory.token_ids) * (len(new) if rows == "turns" else 1)
                if len(group) >= (TOKENS_PER_GROUP if rows == "tokens" else ROWS_PER_GROUP) or tokens >= TOKENS_PER_GROUP:
                    writer.write_table(pa.Table.from_pylist(group, schema=schema))
                    group, tokens = [], 0
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, write)
    return counts[0], counts[1]


def read_parquet(path: Path) -> Iterator[Trajectory]:
    """The trajectories of a table with a row per episode, one by one; equal to those that were written.

    Raises
    ------
    TableError
        For a file that is not such a table, or one of another version.
    """
    pa, pq = _pyarrow()
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise TableError(f"{path} cannot be read as Parquet: {error}.") from error
    with file:
        metadata = file.schema_arrow.metadata or {}
        said = (metadata.get(SCHEMA_KEY, b"").decode(), metadata.get(ROWS_KEY, b"").decode())
        if said != (str(TABLE_VERSION), "episodes"):
            raise TableError(
                f"{path} must be a table of version {TABLE_VERSION} with a row per episode; it says version {said[0] or 'none'!r}, rows {said[1] or 'none'!r}. "
                "Write it again: searchqa data export ... --to parquet FILE.parquet"
            )
        for batch in file.iter_batches(batch_size=64):
            yield from (_trajectory(row) for row in batch.to_pylist())


def _trajectory(row: Mapping[str, Any]) -> Trajectory:
    values = {f.name: row[f.name] for f in fields(Trajectory) if f.name in row}
    values |= {"token_ids": np.array(row["token_ids"], dtype=np.int32), "loss_mask": np.array(row["loss_mask"], dtype=np.int8)}
    values |= {name: None if row[name] is None else np.array(row[name], dtype=kind) for name, kind in _ARRAYS.items()}
    values |= {name: dict(row[name]) for name in _NUMBERS}
    values["stamp"] = json.loads(row["stamp"])
    values["golden_answers"] = tuple(row["golden_answers"])
    values["turns"] = tuple(
        TurnSpan(**{**turn, "passages": tuple((passage["id"], passage["title"]) for passage in turn["passages"])}) for turn in row["turns"]
    )
    return Trajectory(**values)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigurationError("Parquet files need pyarrow: pip install 'searchqa-gym[data]'.") from error
    return pyarrow, pyarrow.parquet


def _schema(pa: Any, rows: Rows) -> pyarrow.Schema:
    ids, numbers = pa.list_(pa.int32()), pa.list_(pa.float32())
    origin = {"episode": pa.int64(), "run": pa.string(), "file": pa.string(), "line": pa.int64(), "question_id": pa.string()}
    ending = {"reward": pa.float64(), "terminated": pa.bool_(), "truncated": pa.bool_(), "retokenized": pa.bool_()}
    if rows == "tokens":
        own = {"position": pa.int32(), "token_id": pa.int32(), "loss_mask": pa.int8(), "turn": pa.int32()}
        return pa.schema({**origin, **own, **dict.fromkeys(_ARRAYS, pa.float32()), **ending})
    if rows == "turns":
        own = {"turn": pa.int32(), "observation": ids, "action": ids, "reply": ids, **dict.fromkeys(_ARRAYS, numbers)}
        return pa.schema({**origin, **own, "kind": pa.string(), "content": pa.string(), **ending})
    passage = pa.struct({"id": pa.string(), "title": pa.string()})
    turn = {"start": pa.int32(), "segment_end": pa.int32(), "end": pa.int32()}
    turn |= dict.fromkeys(("action", "content", "segment", "observation"), pa.string()) | {"passages": pa.list_(passage)}
    own = {"token_ids": ids, "loss_mask": pa.list_(pa.int8()), **dict.fromkeys(_ARRAYS, numbers), "turns": pa.list_(pa.struct(turn))}
    own |= {"prompt": pa.string(), "question": pa.string(), "golden_answers": pa.list_(pa.string()), "answer": pa.string()}
    own |= dict.fromkeys(_NUMBERS, pa.map_(pa.string(), pa.float64())) | {"stamp": pa.string()}
    return pa.schema({**origin, **own, **ending})


def _origin(episode: Episode, number: int) -> dict[str, Any]:
    place = {"episode": number, "run": plain(episode.run), "file": plain(episode.file), "line": episode.line}
    return {**place, "question_id": plain(episode.trajectory.question_id), "retokenized": episode.trajectory.retokenized}


def _episode_rows(episode: Episode, number: int) -> Iterator[dict[str, Any]]:
    t = episode.trajectory
    row = {**_origin(episode, number), "reward": float(t.reward), "terminated": t.terminated, "truncated": t.truncated}
    row |= {"token_ids": t.token_ids, "loss_mask": t.loss_mask, **{name: getattr(t, name) for name in _ARRAYS}}
    row["turns"] = [
        {
            "start": turn.start,
            "segment_end": turn.segment_end,
            "end": turn.end,
            **{name: plain(getattr(turn, name)) for name in ("action", "content", "segment", "observation")},
            "passages": [{"id": plain(name), "title": plain(title)} for name, title in turn.passages],
        }
        for turn in t.turns
    ]
    row |= {"prompt": plain(t.prompt), "question": plain(t.question), "golden_answers": [plain(answer) for answer in t.golden_answers]}
    row["answer"] = None if t.answer is None else plain(t.answer)
    row |= {name: [(plain(key), float(value)) for key, value in getattr(t, name).items()] for name in _NUMBERS}
    row["stamp"] = json.dumps(dict(t.stamp), ensure_ascii=True, default=str)
    yield row


def _turn_rows(episode: Episode, number: int) -> Iterator[dict[str, Any]]:
    t = episode.trajectory
    for place, turn in enumerate(t.turns):
        last = place == len(t.turns) - 1
        own = slice(turn.start, turn.segment_end)
        yield {
            **_origin(episode, number),
            "turn": place,
            "observation": t.token_ids[: turn.start],
            "action": t.token_ids[own],
            "reply": t.token_ids[turn.segment_end : turn.end],
            **{name: None if getattr(t, name) is None else getattr(t, name)[own] for name in _ARRAYS},
            "kind": plain(turn.action),
            "content": plain(turn.content),
            "reward": float(t.reward) if last else 0.0,
            "terminated": last and t.terminated,
            "truncated": last and t.truncated,
        }


def _token_rows(episode: Episode, number: int) -> Iterator[dict[str, Any]]:
    t = episode.trajectory
    sampled = np.flatnonzero(t.loss_mask)
    last = int(sampled[-1]) if len(sampled) else len(t.token_ids) - 1
    turns = np.full(len(t.token_ids), -1)
    for place, turn in enumerate(t.turns):
        turns[turn.start : turn.end] = place
    origin = _origin(episode, number)
    for position, (token, mask, turn_number) in enumerate(zip(t.token_ids.tolist(), t.loss_mask.tolist(), turns.tolist(), strict=True)):
        yield {
            **origin,
            "position": position,
            "token_id": token,
            "loss_mask": mask,
            "turn": None if turn_number < 0 else turn_number,
            **{name: float(getattr(t, name)[position]) if getattr(t, name) is not None and mask else None for name in _ARRAYS},
            "reward": float(t.reward) if position == last else 0.0,
            "terminated": position == last and t.terminated,
            "truncated": position == last and t.truncated,
        }


_ROWS = {"episodes": _episode_rows, "turns": _turn_rows, "tokens": _token_rows}
ROWS = cast(tuple[Rows, ...], tuple(_ROWS))


def plain(text: str) -> str:
    """Text that UTF-8 can say: halves of surrogate pairs become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
