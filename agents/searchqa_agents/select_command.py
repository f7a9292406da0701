"""``searchqa data select``: count how many attempts an agent needs on each question, and write down which to train on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import MISSING

from searchqa_agents.hydra_app import check_config, run_app, write_config
from searchqa_agents.runs import RunFolder, RunFolderError, run_stamp, stamp_differences
from searchqa_agents.settings import AgentSettings, EnvSettings, RunSettings, check_at_least, register
from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from searchqa_agents.select_questions import Counts, DifficultyRule

logger = logging.getLogger(__name__)

ATTEMPTS_FILE = "attempts.jsonl"
"""One line for each round: the outcome of an attempt on each of its questions, by id."""
DIFFICULTY_FILE = "difficulty.jsonl"
SELECTED_FILE = "selected.jsonl"

HELP = """usage: searchqa data select [key=value ...]

Plays each question until it is right, at most attempts times, and counts. Writes difficulty.jsonl (every question), selected.jsonl (those to
train on: `searchqa train questions=.../selected.jsonl`) and stamp.json into the run's folder. An attempt whose search back end was lost does not count.
What was stopped or killed goes on with resume=; with another keep= it only selects anew.

Examples:
  searchqa data select agent.checkpoint=shipped questions=500
  searchqa data select env=hotpotqa agent=server agent.url=http://localhost:8000 env.tokenizer=owner/model metric=cover_em 'keep={medium:200}'
  searchqa data select env=custom env.questions=merged/questions.jsonl.gz env.corpus=merged/corpus.jsonl.gz questions=null \\
      'keep={hotpotqa:{medium:2561,hard:2000},2wikimultihopqa:{medium:1087,hard:2500}}'
  searchqa data select resume=runs/..."""


@dataclass
class SelectSettings(RunSettings):
    """``searchqa data select``."""

    env: EnvSettings = MISSING
    agent: AgentSettings = MISSING
    questions: int | None = MISSING
    attempts: int = MISSING
    medium_from: int = MISSING
    hard_from: int = MISSING
    metric: str = MISSING
    right_at: float = MISSING
    keep: Any = MISSING
    num_envs: int = MISSING
    per_round: int = MISSING
    max_lost_rollouts: int = MISSING


def main(line: Sequence[str]) -> int:
    """Run ``searchqa data select <line>``."""
    from hydra.core.config_store import ConfigStore

    register()
    ConfigStore.instance().store(name="select_types", node=SelectSettings)
    return run_app("select", run, line)


def help_text() -> str:
    """What ``searchqa data select --help`` shows; loads nothing heavy."""
    from searchqa_agents.config_help import groups_text, keys_text

    return f"{HELP}\n\n{groups_text('select')}\n\n{keys_text('select')}"


def run(config: DictConfig, path: Path) -> None:
    """One selection, into the run folder ``path``."""
    from omegaconf import OmegaConf
    from rich.console import Console

    settings = cast(SelectSettings, OmegaConf.to_object(config))
    console = Console()
    rule = _checked(settings)
    if settings.dry_run:
        check_config(Path(settings.run_dir), config, free=("questions",))
        _check_begun(Path(settings.run_dir), config)
        missing = _check_start(settings)
        console.print(OmegaConf.to_yaml(config, resolve=True), markup=False, highlight=False)
        first = f"download {missing}, " if missing is not None else ""
        count = "all questions" if settings.questions is None else f"{settings.questions} questions"
        said = f"Would {first}play {count} of {settings.env.id} with the agent {settings.agent.kind} until each is right, at most {rule.attempts} times, "
        console.print(f"{said}and write {settings.run_dir}.", markup=False, soft_wrap=True)
        return
    select_run(settings, rule, config, path, console)


def _checked(settings: SelectSettings) -> DifficultyRule:
    """What can be checked before any data is loaded."""
    from searchqa_agents.loading import agent_temperature, check_agent
    from searchqa_agents.select_questions import DifficultyRule, parse_keep

    check_at_least(1, questions=settings.questions, num_envs=settings.num_envs, per_round=settings.per_round)
    check_at_least(0, max_lost_rollouts=settings.max_lost_rollouts)
    parse_keep(settings.keep)
    check_agent(settings.agent, settings.env)
    if agent_temperature(settings.agent) == 0:
        raise ConfigurationError("agent.temperature must be above 0: greedy attempts on a question are all the same; got 0.")
    return DifficultyRule(settings.attempts, settings.medium_from, settings.hard_from, settings.metric, settings.right_at)


def _check_start(settings: SelectSettings) -> str | None:
    """Raise what a real start would, writing nothing. Returns the data set that would have to be downloaded first, if any."""
    from searchqa_agents.loading import build_agent, missing_data

    missing = missing_data(settings.env)
    if missing is None:
        venv = _make_venv(settings)
        build_agent(settings.agent, venv, settings.device, settings.dtype)
        venv.close()
    return missing


def _make_venv(settings: SelectSettings) -> Any:
    from searchqa_agents.loading import agent_env, make_venv

    return make_venv(settings.env, settings.num_envs, **agent_env(settings.agent, settings.env))


def select_run(settings: SelectSettings, rule: DifficultyRule, config: DictConfig, path: Path, console: Any) -> None:
    """Play what is not played yet, then write the run's files and print the table."""
    from searchqa_agents.loading import agent_stamp
    from searchqa_agents.select_questions import Counts, check_sets, count_table, difficulty_rows, parse_keep, select
    from searchqa_agents.table import show, stamp_line

    with RunFolder(path, command="data select") as folder:
        _check_begun(folder.path, config)
        write_config(folder, config, free=("questions",))
        venv = _make_venv(settings)
        base: Any = venv.unwrapped
        stamp = run_stamp(base.stamp(), seed=settings.seed, threads=settings.threads)
        stamp |= {"agent": agent_stamp(settings.agent, base.tokenizer, base.source.name), "rule": vars(rule)}
        earlier = read_rounds(folder.path / ATTEMPTS_FILE)
        if earlier:
            _check_stamp(folder.path, stamp)
            logger.warning("Going on after %d rounds.", len(earlier))
        folder.write_json("stamp.json", stamp)
        total = len(base.source) if settings.questions is None else min(settings.questions, len(base.source))
        quotas = parse_keep(settings.keep)
        check_sets(quotas, base.source, range(total))
        counts = Counts(rule, earlier)
        counts.forget_lost()
        if not all(counts.finished(base.source[index].id) for index in range(total)):
            _play(settings, folder, venv, total, counts)
        folder.log_searches("select", 0, base.search_counters().sums)
        rows = difficulty_rows(base.source, range(total), counts)
        venv.close()
        folder.write_text(DIFFICULTY_FILE, _lines(rows))
        kept = select(rows, quotas, settings.seed)
        selected = folder.write_text(SELECTED_FILE, _lines(kept))
        columns, table = count_table(rows, kept, quotas)
        folder.write_json("selection.json", {"columns": columns, "rows": table, "questions": len(rows), "kept": len(kept)})
        show(console, f"{settings.name}: {len(kept)} of {len(rows)} questions kept", columns, table, stamp_line(stamp))
        console.print(f"Selected: {selected}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"`searchqa train questions={selected}` trains on them.", markup=False, highlight=False, soft_wrap=True)


def _play(settings: SelectSettings, folder: RunFolder, venv: Any, total: int, counts: Counts) -> None:
    """Play what is not finished, and append each round to the record as it ends."""
    from searchqa_agents.loading import agent_temperature, build_agent
    from searchqa_agents.lost_back_end import LostBackEndError
    from searchqa_agents.progress import progress
    from searchqa_agents.select_questions import RIGHT, play_until_right
    from searchqa_retrievers.types import RetrieverError

    agent = build_agent(settings.agent, venv, settings.device, settings.dtype)
    temperature = agent_temperature(settings.agent) or 0.0
    with progress(settings.name, total) as advance, (folder.path / ATTEMPTS_FILE).open("a", encoding="utf-8") as file:

        def on_round(outcomes: Mapping[str, str], finished: int) -> None:
            file.write(json.dumps(outcomes, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            advance(finished, f"{len(outcomes)} attempts, {sum(outcome == RIGHT for outcome in outcomes.values())} right")

        try:
            play_until_right(
                venv,
                agent,
                range(total),
                counts,
                per_round=settings.per_round,
                seed=settings.seed,
                temperature=temperature,
                max_lost_rollouts=settings.max_lost_rollouts,
                on_round=on_round,
            )
        except (RetrieverError, LostBackEndError) as error:
            way_on = f"What was played is kept: `searchqa data select resume={folder.path}` goes on."
            raise type(error)(f"{str(error).rstrip('. ')}. {way_on}") from error


def read_rounds(file: Path) -> list[dict[str, str]]:
    """The rounds of an ``attempts.jsonl``; a last line that a killed process left unfinished is cut off."""
    if not file.exists():
        return []
    content = file.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        with file.open("rb+") as opened:
            opened.truncate(complete)
    try:
        return [json.loads(line) for line in content[:complete].splitlines()]
    except ValueError as error:
        raise RunFolderError(f"{file} has a line that is not JSON ({error}). Remove the folder to begin again.") from error


def _check_begun(path: Path, config: DictConfig) -> None:
    """Refuse a folder whose attempts were counted by another rule."""
    from omegaconf import OmegaConf

    begun = path / "config.yaml"
    if begun.is_file() and (path / ATTEMPTS_FILE).is_file():
        before: Any = OmegaConf.load(begun)
        different = [key for key in ("attempts", "metric", "right_at") if before.get(key) != config.get(key)]
        if different:
            told = "; ".join(f"{key} was {before.get(key)}, is {config.get(key)}" for key in different)
            raise RunFolderError(
                f"{path} holds attempts that were counted otherwise: {told}. Choose another run_dir, or remove the folder."
            )


def _check_stamp(path: Path, stamp: Mapping[str, Any]) -> None:
    """Refuse to go on with another search engine, corpus or data than the attempts were made with."""
    file = path / "stamp.json"
    if file.is_file():
        now = json.loads(json.dumps(stamp, default=str))
        different = [d for d in stamp_differences(json.loads(file.read_text(encoding="utf-8")), now) if not d[0].startswith("rule.")]
        if different:
            told = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in different)
            raise RunFolderError(f"{path} cannot go on with other data, another search engine or corpus: {told}. Choose another run_dir.")


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
