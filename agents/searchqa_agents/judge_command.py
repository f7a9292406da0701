"""``searchqa eval judge``: have a language model judge the answers of a finished evaluation, or of a file; goes on where it stopped."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from searchqa_agents.answer_rows import STANDARD_INPUT, AnswerRow, read_answers
from searchqa_agents.judge import (
    KEY_VARIABLE,
    PROMPTS,
    Candidate,
    JudgeError,
    JudgePrompt,
    JudgeSettings,
    Patience,
    Verdict,
    check_endpoint,
    judge,
)
from searchqa_agents.results import JUDGEMENTS_FILE, SCORES_FILE, Key, json_line
from searchqa_agents.runs import RunFolderError, replace_file
from searchqa_agents.score_command import bootstrap_interval, mean
from searchqa_envs.errors import ConfigurationError, MalformedRowError
from searchqa_envs.scoring import is_unanswered

logger = logging.getLogger(__name__)

SETTINGS_FILE = "judge.json"
"""Beside the judgements: who judged, in which words."""
KEPT_REPLY = 200
"""Characters of a judge's reply that are kept."""

_DESCRIPTION = f"""Ask a language model of each answer whether it is right: R1-Searcher's LLM-as-judge (ACC_L), which published GPT-4o-mini's verdicts.

FOLDER is the run folder of a finished `searchqa eval`: verdicts go to its {JUDGEMENTS_FILE}, and its tables and pages show them as `judge`.
FILE has rows as `searchqa eval score` reads them, with the question: verdicts go to FILE.{JUDGEMENTS_FILE}.
Each verdict is written at once; the same line again asks what is missing. No answer is wrong without being asked. Who judged is kept beside the verdicts
in {SETTINGS_FILE}, and another judge is refused; the same at another address is not. The key, if the endpoint wants one, is read from ${KEY_VARIABLE}."""

_EPILOG = f"""prompts:
  r1-searcher            the published words; the answer as a JSON string that cannot pass for the prompt
  r1-searcher-verbatim   the published prompt byte for byte, in which an answer may write what it likes
  FILE                   your own, with {{question}}, {{golden_answer}} and {{prediction}}, each put in as JSON

examples:
  {KEY_VARIABLE}=... searchqa eval judge runs/mine --url https://api.openai.com/v1 --model gpt-4o-mini
  searchqa eval judge outputs/hotpotqa.jsonl --url http://127.0.0.1:8000/v1 --model qwen --concurrency 64"""


def main(line: Sequence[str]) -> int:
    """Run ``searchqa eval judge <line>``."""
    try:
        arguments = _parser().parse_args(line)
    except SystemExit as stop:  # argparse has already said why
        return stop.code if isinstance(stop.code, int) else 2
    settings = JudgeSettings(
        arguments.url,
        arguments.model,
        read_prompt(arguments.prompt),
        arguments.temperature,
        arguments.max_tokens,
        arguments.tries,
        extra=_extra(arguments.extra),
    )
    patience = Patience(
        arguments.concurrency,
        arguments.timeout,
        arguments.deadline,
        arguments.retries,
        arguments.requests_per_second,
        tuple(arguments.allow_host),
    )
    path = Path(arguments.path)
    if path.name == SCORES_FILE and (path.parent / "config.yaml").is_file():  # a run's scores stand for the run
        path = path.parent
    candidates = read_candidates(str(path))
    verdicts = judge_file(candidates, settings, patience, judgements_path(path))
    if path.is_dir():
        from searchqa_agents.eval_report import refresh

        refresh(path)
    sets = _figures_by_set(candidates, verdicts)
    result = {**_figures(candidates, verdicts), "model": settings.model, "prompt": settings.prompt.name}
    if len(sets) > 1:
        result["sets"] = sets
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        _show(arguments.path, result)
    return 0


def read_prompt(name: str) -> JudgePrompt:
    """One of :data:`~searchqa_agents.judge.PROMPTS`, or a file's."""
    if name in PROMPTS:
        return PROMPTS[name]
    file = Path(name)
    if not file.is_file():
        raise ConfigurationError(f"--prompt must be one of {', '.join(PROMPTS)}, or a file; got {name!r}.")
    return JudgePrompt(file.name, "a file", file.read_text(encoding="utf-8"))


def read_candidates(path: str) -> list[Candidate]:
    """The answers of a run folder or a file, each under its own set, question and sample; rows of other code are named by file and line.

    Raises
    ------
    RunFolderError
        The folder has no scores.
    MalformedRowError
        A row cannot be read, has no question, or names an episode that an earlier row names.
    """
    if path == STANDARD_INPUT:
        raise ConfigurationError("Judgements are kept beside the file they are of, so the standard input cannot be judged; name a file.")
    file = Path(path)
    if file.is_dir():
        file /= SCORES_FILE
        if not file.is_file():
            raise RunFolderError(
                f"{path} holds no {SCORES_FILE}; it is not the folder of a finished `searchqa eval`. Finish it first, or name a file."
            )
    candidates: dict[Key, Candidate] = {}
    for row in read_answers(str(file)):
        candidate = _candidate(row, file)
        if candidate.key in candidates:
            raise MalformedRowError(
                f"{file}, line {row.line}: sample {candidate.key[2]} of question {candidate.key[1]!r} of {candidate.key[0]} is there twice."
            )
        candidates[candidate.key] = candidate
    if not candidates:
        raise MalformedRowError(f"{file} holds no rows, so that there is nothing to judge.")
    return list(candidates.values())


def _candidate(row: AnswerRow, file: Path) -> Candidate:
    if not row.question or not row.question.strip():
        raise MalformedRowError(f"{file}, line {row.line}: a judge needs the question; the row has none.")
    return Candidate(row.key or (file.name, str(row.line), 0), row.question, row.golden_answers, row.prediction)


def judgements_path(path: Path) -> Path:
    """Where the judgements of a run folder or a file are kept."""
    return path / JUDGEMENTS_FILE if path.is_dir() else path.with_name(f"{path.name}.{JUDGEMENTS_FILE}")


def judge_file(candidates: Sequence[Candidate], settings: JudgeSettings, patience: Patience, file: Path) -> dict[Key, bool]:
    """Judge what is not judged yet, appending each verdict to ``file`` at once; all verdicts.

    Raises
    ------
    JudgeError
        The file holds judgements of another judge or of other answers, another process writes it, or some answers got no verdict.
    RetrieverError
        An endpoint refuses the key or the address.
    """
    from searchqa_agents.progress import progress

    check_endpoint(settings, patience)
    with _locked(file):
        known = _known(candidates, settings, file)
        left = [candidate for candidate in candidates if candidate.key not in known]
        if known and left:
            logger.warning("Going on after %d judgements.", len(known))
        right = sum(known.values())
        with progress("judge", len(candidates)) as advance:

            def keep(judged: Sequence[Candidate], verdict: Verdict) -> None:
                nonlocal right
                if not known:
                    _write_settings(settings, file)
                right += verdict.correct * len(judged)
                known.update((candidate.key, verdict.correct) for candidate in judged)
                with file.open("ab") as opened:
                    opened.write("".join(json_line(_row(candidate, verdict)) for candidate in judged).encode())
                advance(len(known), f"right {right / len(known):.3f}")

            try:
                judge(left, settings, patience, keep)
            except JudgeError as error:
                raise JudgeError(
                    f"{error} {len(known)} of {len(candidates)} verdicts are kept in {file}; the same line again asks for the others."
                ) from error
    return known


def _row(candidate: Candidate, verdict: Verdict) -> dict[str, Any]:
    set_name, question_id, sample = candidate.key
    reply = verdict.reply if verdict.reply is None or len(verdict.reply) <= KEPT_REPLY else f"{verdict.reply[:KEPT_REPLY]}…"
    return {
        "set": set_name,
        "id": question_id,
        "sample": sample,
        "correct": verdict.correct,
        "reply": reply,
        "tries": verdict.tries,
        "of": candidate.digest(),
    }


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(file.with_name(f".{file.name}.lock"), timeout=0)
    try:
        with lock:
            yield
    except Timeout as error:
        raise JudgeError(f"{file} is being written by another process; wait for it.") from error


def _known(candidates: Sequence[Candidate], settings: JudgeSettings, file: Path) -> dict[Key, bool]:
    """The verdicts of earlier calls, once it is sure that this judge gave them on these answers. An unfinished last line is cut off."""
    beside = settings_path(file)
    content = file.read_bytes() if file.exists() else b""
    if content and not beside.is_file():
        raise JudgeError(
            f"{file} holds judgements, but {beside} is not there, so that it is not known whose. Remove the file to judge again."
        )
    if not content:
        return {}
    before, now = json.loads(beside.read_text(encoding="utf-8")), settings.stamp()
    _check_judge(before, now, file)
    _warn_of_another_address(before, now)
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        logger.warning("%s: dropped an unfinished last line of %d bytes.", file, len(content) - len(whole))
        with file.open("rb+") as opened:
            opened.truncate(len(whole))
    digests = {candidate.key: candidate.digest() for candidate in candidates}
    known = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            key = (row["set"], row["id"], row["sample"])
            correct, digest = row["correct"], row["of"]
        except (ValueError, KeyError, TypeError) as error:
            raise JudgeError(f"{file}, line {number}: not a judgement ({error!r}). Remove the line and judge again.") from error
        if digests.get(key) != digest or not isinstance(correct, bool):
            raise JudgeError(
                f"{file}, line {number}: a judgement of another answer than question {key[1]!r} of {key[0]} has now, sample {key[2]}. "
                "The answers have changed since; remove the file to judge again."
            )
        known[key] = correct
    return known


def _write_settings(settings: JudgeSettings, file: Path) -> None:
    text = json.dumps(settings.stamp(), indent=2) + "\n"
    replace_file(settings_path(file), lambda partial: partial.write_text(text, encoding="utf-8"))


def settings_path(judgements: Path) -> Path:
    """Where it is kept who judged."""
    return judgements.with_name(judgements.name.removesuffix(JUDGEMENTS_FILE) + SETTINGS_FILE)


def _check_judge(before: Mapping[str, Any], now: Mapping[str, Any], file: Path) -> None:
    different = [key for key in now if key != "url" and before.get(key) != now[key]]
    if different:
        told = "; ".join(f"{key} was {_short(before.get(key))}, is {_short(now[key])}" for key in different)
        raise JudgeError(
            f"{file} holds the verdicts of another judge: {told}. Numbers of two judges do not mix; ask the same, or remove {file.name} and "
            f"{settings_path(file).name} to judge again."
        )


def _warn_of_another_address(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if before.get("url") != now["url"]:
        logger.warning("The verdicts so far are from %s; %s is taken for the same judge.", before.get("url"), now["url"])


def _short(value: Any) -> str:
    return str(value["name"]) if isinstance(value, Mapping) and "name" in value else f"{value!r:.80}"


def _figures(candidates: Sequence[Candidate], verdicts: Mapping[Key, bool]) -> dict[str, Any]:
    """The mean over questions, samples of a question averaged first."""
    questions: defaultdict[tuple[str, str], list[bool]] = defaultdict(list)
    for candidate in candidates:
        questions[candidate.key[:2]].append(verdicts[candidate.key])
    values = Counter(sum(rights) / len(rights) for rights in questions.values())
    return {
        "n": len(candidates),
        "questions": len(questions),
        "unanswered": sum(is_unanswered(candidate.prediction) for candidate in candidates),
        "judge": mean(values),
        "interval": list(bootstrap_interval(values)),
    }


def _figures_by_set(candidates: Sequence[Candidate], verdicts: Mapping[Key, bool]) -> dict[str, Any]:
    """The figures of each set, in the order in which they come."""
    sets: defaultdict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        sets[candidate.key[0]].append(candidate)
    return {name: _figures(of_set, verdicts) for name, of_set in sets.items()}


def _extra(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigurationError(f"--extra must be a JSON object; got {text!r} ({error}).") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"--extra must be a JSON object; got {text!r}.")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="searchqa eval judge", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="FOLDER_OR_FILE", help="a finished run's folder, or a file of rows")
    parser.add_argument("--url", required=True, help="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True, help="name sent along; the published figures are gpt-4o-mini's")
    parser.add_argument("--prompt", default="r1-searcher", help="r1-searcher (default), r1-searcher-verbatim, or a file")
    parser.add_argument("--temperature", type=float, default=0.0, help="default 0")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a reply; default 1024")
    parser.add_argument(
        "--tries", type=int, default=3, help="how often an answer is put to the judge until the reply is True or False; default 3"
    )
    parser.add_argument("--extra", metavar="JSON", help="further fields of the request's body")
    parser.add_argument("--concurrency", type=int, default=16, help="requests under way at once; default 16")
    parser.add_argument("--requests-per-second", type=float, help="at most so many; default: no limit")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds of one request; default 120")
    parser.add_argument("--deadline", type=float, default=600.0, help="seconds of one reply with all repetitions; default 600")
    parser.add_argument("--retries", type=int, default=5, help="repetitions of a failed request; default 5")
    parser.add_argument("--allow-host", action="append", default=[], metavar="HOST", help="host to which the key may go over plain http")
    parser.add_argument("--json", action="store_true", help="print one JSON object: n, judge, interval, ...")
    return parser


def _show(name: str, result: Mapping[str, Any]) -> None:
    from rich.console import Console

    from searchqa_agents.table import legible

    console = legible(Console())
    for called, figures in {name: result, **result.get("sets", {})}.items():
        low, high = figures["interval"]
        text = (
            f"{called}: judge {figures['judge']:.4f} (95% interval {low:.3f}–{high:.3f}) over {figures['questions']} questions; "
            f"{figures['unanswered']} of {figures['n']} answers are none"
        )
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    said = f"Judged by {result['model']} with the prompt {result['prompt']}."
    console.print(said, markup=False, highlight=False, soft_wrap=True)
