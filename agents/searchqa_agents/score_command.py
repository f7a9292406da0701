"""``searchqa eval score``: score answers that other code, or an earlier run, has written to a file."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from searchqa_agents.answer_rows import STANDARD_INPUT, AnswerRow, read_answers
from searchqa_agents.judge import read_verdict
from searchqa_envs.errors import MalformedRowError
from searchqa_envs.scoring import HEADLINE, MEASURES, PUBLISHED_AS, STYLES, is_unanswered, score

RESAMPLES = 2_000
"""Of the bootstrap."""
NO_GROUP = "(none)"
RECORDED_VERDICT = "gpt4o_output"
"""Where R1-Searcher's output files keep what the judge said of an answer."""

_DESCRIPTION = """Score answers from a file as a published system's own evaluation does. Each line of the file is a JSON object:

  question                    not needed here
  answer or golden_answers    a string or a list; the best golden answer counts
  prediction or pred_ans      the answer given; null, blank or not there: no answer, which scores 0 and is counted
                              (not there in any row: an error)

So are R1-Searcher's output files; the judge's verdicts that they keep (gpt4o_output, its ACC_L) are told as well: the share of all rows that are True.
Lines of scores.jsonl of `searchqa eval` can be scored too; samples of a question are averaged first.
No row is dropped: a line that cannot be read is an error that names it."""

_EPILOG = """styles, and what their tables show:
  search-r1      SQuAD's normal form (punctuation deleted); em
  r1-searcher    its own normal form (punctuation becomes a blank, True is yes); cover_em, as ACC_R
  zerosearch     SQuAD's normal form; sub_em, which its released code calls EM

examples:
  searchqa eval score outputs/hotpotqa.jsonl --style r1-searcher
  searchqa eval score runs/mine/scores.jsonl --style zerosearch --by groups.type
  zcat outputs.jsonl.gz | searchqa eval score - --style search-r1 --json"""


class Figures:
    """Sums of scores, in little memory however many rows there are: of each measure, how often each value came.

    Samples of one question of our own runs count as their mean.
    """

    def __init__(self) -> None:
        self.rows = self.unanswered = 0
        self._recorded: Counter[bool | None] = Counter()
        self._values: dict[str, Counter[float]] = {name: Counter() for name in MEASURES}
        self._samples: defaultdict[tuple[str, str], list[tuple[float, ...]]] = defaultdict(list)

    def add(self, row: AnswerRow, scores: Mapping[str, float]) -> None:
        """Count an answer."""
        self.rows += 1
        self.unanswered += is_unanswered(row.prediction)
        if RECORDED_VERDICT in row.row:
            self._recorded[read_verdict(str(row.row[RECORDED_VERDICT]))] += 1
        if row.key is not None:
            self._samples[row.key[:2]].append(tuple(scores[name] for name in MEASURES))
            return
        for name in MEASURES:
            self._values[name][scores[name]] += 1

    def values(self, name: str) -> Counter[float]:
        """How often each value of a measure came, one for each question."""
        place = MEASURES.index(name)
        return self._values[name] + Counter(math.fsum(one[place] for one in rows) / len(rows) for rows in self._samples.values())

    def as_json(self) -> dict[str, Any]:
        """``n`` (rows), ``questions``, ``unanswered``, the mean of each measure over questions, and its 95% interval.

        ``recorded_judge`` where rows have a verdict: of all rows (``n``) the share that is True (``judge``), as R1-Searcher's script counts, how many verdicts
        are neither True nor False (``unreadable``), and how many rows have none (``missing``).
        """
        values = {name: self.values(name) for name in MEASURES}
        figures = {
            "n": self.rows,
            "questions": values["em"].total(),
            "unanswered": self.unanswered,
            **{name: mean(counts) for name, counts in values.items()},
            "intervals": {name: list(bootstrap_interval(counts)) for name, counts in values.items()},
        }
        if self._recorded:
            figures["recorded_judge"] = {
                "n": self.rows,
                "judge": self._recorded[True] / self.rows,
                "unreadable": self._recorded[None],
                "missing": self.rows - self._recorded.total(),
            }
        return figures


def mean(counts: Mapping[float, int]) -> float:
    """The mean of values that came so often."""
    return math.fsum(value * count for value, count in counts.items()) / sum(counts.values())


class Interval(NamedTuple):
    """A 95% interval."""

    low: float
    high: float


def bootstrap_interval(counts: Mapping[float, int], seed: int = 0) -> Interval:
    """The percentile bootstrap's 95% interval of the mean of values that came so often.

    Drawing n values with replacement is drawing how often each distinct value comes, a multinomial, which takes no longer for more rows.
    """
    values = np.array(sorted(counts))
    often = np.array([counts[value] for value in values.tolist()])
    total = int(often.sum())
    means = np.random.default_rng(seed).multinomial(total, often / total, size=RESAMPLES) @ values / total
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return Interval(low, high)


def score_rows(rows: Iterable[AnswerRow], style: str, by: str | None = None) -> tuple[Figures, dict[str, Figures]]:
    """The figures of all rows, and of each group of them by the value of the field ``by`` (dots lead into objects)."""
    everything, groups = Figures(), dict[str, Figures]()
    for row in rows:
        scores = score(row.prediction, row.golden_answers, style)
        everything.add(row, scores)
        if by is not None:
            groups.setdefault(_group(row.row, by), Figures()).add(row, scores)
    return everything, groups


def _group(row: Mapping[str, Any], by: str) -> str:
    value: Any = row
    for part in [by] if by in row else by.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return NO_GROUP if value is None else value if isinstance(value, str) else json.dumps(value)


def main(line: Sequence[str]) -> int:
    """Run ``searchqa eval score <line>``."""
    try:
        arguments = _parser().parse_args(line)
    except SystemExit as stop:  # argparse has already said why
        return stop.code if isinstance(stop.code, int) else 2
    everything, groups = score_rows(read_answers(arguments.file), arguments.style, arguments.by)
    name = "standard input" if arguments.file == STANDARD_INPUT else arguments.file
    if not everything.rows:
        raise MalformedRowError(f"{name} holds no rows, so that there is nothing to score.")
    result: dict[str, Any] = {"style": arguments.style, "headline": HEADLINE[arguments.style], **everything.as_json()}
    if arguments.by is not None:
        result |= {"by": arguments.by, "groups": {group: groups[group].as_json() for group in sorted(groups)}}
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        _show(name, result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="searchqa eval score", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help=".jsonl or .jsonl.gz; - reads the standard input")
    parser.add_argument("--style", required=True, choices=STYLES, help="whose normal form and rules")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else: n, em, f1, cover_em, sub_em, ...")
    parser.add_argument("--by", metavar="KEY", help="also for each value of this field of the rows, such as type or metadata.level")
    return parser


def _show(name: str, result: Mapping[str, Any]) -> None:
    from rich.console import Console

    from searchqa_agents.table import legible, show

    console = legible(Console())
    style, headline = result["style"], result["headline"]
    counted = f"{result['n']} answers, {result['unanswered']} of them none"
    if result["questions"] != result["n"]:
        counted += f", to {result['questions']} questions"
    rows = [[measure, f"{result[measure]:.4f}", _interval(result["intervals"][measure])] for measure in MEASURES]
    console.print(f"{name}: {counted}", markup=False, highlight=False, soft_wrap=True)
    show(console, f"style {style}", ["measure", "mean", "95% interval"], rows)
    recorded = result.get("recorded_judge")
    if recorded is not None:
        verdicts = (
            f"recorded verdicts ({RECORDED_VERDICT}): {recorded['judge']:.4f} of all {recorded['n']} rows are True; {recorded['unreadable']} are "
            f"unreadable and {recorded['missing']} missing, and count as not right"
        )
        console.print(verdicts, markup=False, highlight=False, soft_wrap=True)
    if "groups" in result:
        columns = [result["by"], "n", "none", *MEASURES]
        group_rows = [
            [
                _printable(group),
                str(one["n"]),
                str(one["unanswered"]),
                *(f"{one[measure]:.4f}\n{_interval(one['intervals'][measure])}" for measure in MEASURES),
            ]
            for group, one in result["groups"].items()
        ]
        show(console, f"by {result['by']}", columns, group_rows)
    said = f"{style} shows {headline} in its tables, as {PUBLISHED_AS[style]}. Intervals: bootstrap over questions."
    console.print(said, markup=False, highlight=False, soft_wrap=True)


def _interval(interval: Sequence[float]) -> str:
    return f"{interval[0]:.3f}–{interval[1]:.3f}"


def _printable(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can name and no terminal can show."""
    return text.encode("utf-8", "replace").decode()
