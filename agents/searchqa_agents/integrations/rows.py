"""Questions as the rows that verl and OpenRLHF read (TRL's and SkyRL's adapters make their own).

A row carries where its question is found (environment, split, id), so that the engine's rollout plays it in the environment, whose own prompt, reward
and golden answers then count. The prompt in a row is there for the engine's logs and length filters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from searchqa_envs import ENV_IDS
from searchqa_envs.configuration import build_source
from searchqa_envs.dialects import get_dialect
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.questions import Question

ENGINES = ("verl", "openrlhf")


def question_rows(
    dataset: str,
    split: str | None,
    engine: str,
    *,
    dialect: str = "search-r1",
    agent_name: str = "searchqa",
    count: int | None = None,
    data_dir: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of a set's questions.

    Parameters
    ----------
    dataset
        Hydra name of the set.
    split
        Which questions; None is the set's default. Written into the rows, so that the environment is made with the same.
    engine
        One of :data:`ENGINES`.
    dialect
        Whose published prompt stands in the rows; ``bare`` is the question alone.
    agent_name
        verl: the agent loop that plays these rows.
    count
        Only the first so many questions; the world must be given one.
    options
        What the world or a set of your own takes beside (``preset``, ``questions``, ...). The environment must be given the same.

    Raises
    ------
    ConfigurationError
        For an unknown set, engine, dialect or option.
    """
    if engine not in ENGINES:
        raise ConfigurationError(f"engine must be one of {list(ENGINES)}; got {engine!r}.")
    if count is not None and count < 1:
        raise ConfigurationError(f"count must be at least 1; got {count}.")
    prompt, system = ("bare", get_dialect("search-r1")) if dialect == "bare" else ("published", get_dialect(dialect))
    if dataset == "world" and count is None:
        raise ConfigurationError("A generated world has millions of questions; say how many: --count 10000.")
    source = build_source(dataset, split, data_dir, options or {})
    env_id = next(name for name in ENV_IDS if name.lower() == f"searchqa-{dataset}-v0")
    place = {"env_id": env_id, "split": str(source.stamp()["split"])}
    questions = (source[index] for index in range(len(source) if count is None else min(count, len(source))))
    return (
        _ROWS[engine](
            source.name,
            question,
            system.render_question(prompt, question.question),
            {**place, "question_id": question.id, "index": index},
            agent_name,
        )
        for index, question in enumerate(questions)
    )


def _verl(name: str, question: Question, prompt: str, where: dict[str, Any], agent_name: str) -> dict[str, Any]:
    """The columns of Search-R1's rows, which verl's ``RLHFDataset`` reads, and ``agent_name``."""
    return {
        "data_source": name,
        "prompt": [{"role": "user", "content": prompt}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": list(question.golden_answers)}},
        "extra_info": where,
        "agent_name": agent_name,
    }


def _openrlhf(name: str, question: Question, prompt: str, where: dict[str, Any], agent_name: str) -> dict[str, Any]:
    return {"input": prompt, "label": json.dumps(where), "datasource": name}


_ROWS = {"verl": _verl, "openrlhf": _openrlhf}


def write_rows(rows: Iterator[dict[str, Any]], path: Path) -> int:
    """Write rows to a ``.parquet``, ``.jsonl`` or ``.json`` file (lines, both); how many there were.

    Raises ``ConfigurationError`` for another ending, or where Parquet is asked for and pyarrow is not installed.
    """
    if path.suffix not in (".parquet", ".jsonl", ".json"):
        raise ConfigurationError(f"Rows are written to a .parquet or .jsonl file; got {path.name!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        return _write_parquet(rows, path)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path) -> int:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigurationError(
            "Parquet files need pyarrow: pip install 'searchqa-gym[data]'. Or write .jsonl, which verl reads too."
        ) from error
    listed: Sequence[dict[str, Any]] = list(rows)
    parquet.write_table(pyarrow.Table.from_pylist(listed), path)
    return len(listed)
