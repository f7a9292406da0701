"""Runs that differ in a setting, beside each other: grouped into variants, kept as one small file of results, and told as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchqa_agents.runs import OWN_TO_A_RUN, RunFolderError, read_metrics, replace_file
from searchqa_agents.table import number

if TYPE_CHECKING:
    from searchqa_agents.report import Run

OF_NO_MATTER = frozenset(
    {"seed", "name", "run_dir", "threads", "device", "dry_run", "plugins", "keep_last", "rollouts_every", "max_lost_rollouts", "plan"}
    | {"processes", "shard", "wandb", "dashboard", "retry", "objective"}
)
"""Parts of a configuration that change no result, or only by chance."""

CURVES = {"em": "charts/em", "searches": "charts/searches", "search_rate": "charts/search_rate", "reward": "charts/episodic_return"}
"""What is kept of every step, by its name in ``metrics.jsonl``."""

ENVIRONMENT = frozenset(
    {"retriever", "top_k", "max_turns", "max_context_tokens", "max_segment_tokens", "max_observation_tokens", "tokenizer", "dialect"}
    | {"prompt", "reward", "reward_weights", "forced_answer", "search_controls"}
)
"""Arguments of an environment that change how a question is played or judged; all others change which questions there are."""

SHARES = frozenset({"em", "f1", "cover_em", "search_rate", "answered", "title_recall_all", "title_recall_any", "title_recall_mean"})
"""Measures that lie between 0 and 1."""

SCHEMA = 1


@dataclass(frozen=True)
class Outcome:
    """What one run contributes to a comparison."""

    variant: str
    seed: int
    before: dict[str, float]
    """measures of held-out questions by keys such as ``hops=2/sampled/em``"""
    after: dict[str, float]
    curves: dict[str, list[float]]
    """``step`` and, where the run has them, those of :data:`CURVES`: a number for each step"""
    tokens: float
    """all that were sampled and read while training"""
    seconds: float
    """of rollouts and updates"""
    between: dict[str, dict[str, float]] = field(default_factory=dict)
    """measures between the stages of a run, by names such as ``after retrieval``"""

    def measured(self, key: str) -> dict[str, float]:
        """One measure by when it was taken, in order: ``before``, between stages, ``after``; NaN where it was not."""
        whens = {"before": self.before, **self.between, "after": self.after}
        return {when: values.get(key, math.nan) for when, values in whens.items()}

    def points(self, curve: str) -> list[tuple[int, float]]:
        """Pairs of step and value, without those that are NaN; empty for a curve that the run does not have."""
        pairs = zip(self.curves["step"], self.curves.get(curve, ()), strict=False)
        return [(int(step), value) for step, value in pairs if not math.isnan(value)]

    def while_training(self) -> float:
        """Mean exact match on training questions over all steps; NaN where there is none, as in supervised fine-tuning."""
        return _mean(self.curves.get("em", []))


@dataclass(frozen=True)
class Comparison:
    """Runs by variant. The first variant is the one that the others are compared with; with a single one, its seeds are beside each other."""

    by: str
    """what the variants are: ``algorithm``, or ``variant``"""
    settings: dict[str, dict[str, Any]]
    """for each variant, in order, the settings in which it differs from others"""
    measure: str
    """what runs are judged by, such as ``hops=2/sampled``"""
    outcomes: list[Outcome]
    stamp: dict[str, Any] = field(default_factory=dict)
    """what the stamps of all runs have in common"""
    command: str = ""
    """the line that began the runs, where one line did"""
    titles: dict[str, str] = field(default_factory=dict)
    """of the measures, such as ``hops=2/sampled/em``"""
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    """for each variant the arguments of the environment of its evaluation in which it differs from others; empty where all were measured alike"""

    def of(self, variant: str) -> list[Outcome]:
        """A variant's runs, by seed."""
        return sorted((one for one in self.outcomes if one.variant == variant), key=lambda one: one.seed)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration makes a difference between runs, beside the seed; flat, such as ``algo.steps``.

    Null and a key that is not there are the same, and so are 1 and 1.0: neither is a difference.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in OF_NO_MATTER:
            continue
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": part for name, part in value.items() if name != "seed" or key not in ("algo", "warmup", "sft")}
        else:
            flat[key] = value
    plain: dict[str, Any] = _plain(flat)
    return plain


def _plain(value: Any) -> Any:
    """A value so that equal settings are equal JSON: without nulls in mappings, whole numbers as integers."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def compared(runs: Sequence[Run], command: str = "", single: bool = False) -> Comparison | None:
    """Training runs by variant, in their order; None where they cannot be compared.

    They can where they were measured on the same questions, and differ in some setting beside the seed. Variants are called by the runs' names
    where these were given and say the same, otherwise by what differs. How the questions were played may differ, as with another ``top_k``:
    that is kept in :attr:`Comparison.measured`.

    Parameters
    ----------
    runs
        Finished runs.
    command
        The line that began them.
    single
        Take a single variant too, with nothing to compare it with.

    Raises
    ------
    RunFolderError
        If two runs of one variant have the same seed.
    """
    from searchqa_agents.plots import headline

    if any(run.summary["kind"] != "train" for run in runs):
        return None
    settings = [settings_of(run.config) for run in runs]
    played = [_environment_measured(one) for one in settings]
    asked = {json.dumps({key: own[key] for key in own if key not in ENVIRONMENT}, sort_keys=True) for own in played}
    measures = {headline(run.summary["measures"]) for run in runs}
    keys = [json.dumps([run.summary["algorithm"], one], sort_keys=True) for run, one in zip(runs, settings, strict=True)]
    if len(asked) > 1 or len(measures) > 1 or None in measures or (len(set(keys)) < 2 and not single):
        return None
    _check_seeds(runs, keys)
    differing = [_differing(i, runs, settings) for i in range(len(runs))]
    labels = _labels(runs, keys, differing)
    if len(set(labels)) < len(set(keys)):
        return None
    outcomes = [_outcome(run, label) for run, label in zip(runs, labels, strict=True)]
    only_algorithm = len(set(keys)) > 1 and all(set(own) <= {"algo"} for own in differing)
    otherwise = [key for key in {key: None for own in played for key in own} if any(own.get(key) != played[0].get(key) for own in played)]
    return Comparison(
        by="algorithm" if only_algorithm else "variant",
        settings=dict(zip(labels, differing, strict=True)),
        measure=str(measures.pop()),
        outcomes=outcomes,
        stamp=_common([run.stamp for run in runs]),
        command=command,
        titles={key: title for run in runs for key, title in run.summary.get("titles", {}).items()},
        measured={label: {key: own.get(key) for key in otherwise} for label, own in zip(labels, played, strict=True)} if otherwise else {},
    )


def _environment_measured(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Which questions were measured on and how they were played: ``env``, over it ``evaluation.env``, over it the rest of ``evaluation``."""
    own = {key.removeprefix("env."): value for key, value in settings.items() if key.startswith("env.") and key != "env.split"}
    own |= settings.get("evaluation.env", {})
    return own | {key: settings.get(f"evaluation.{key}") for key in ("split", "questions", "seed")}


def _check_seeds(runs: Sequence[Run], keys: Sequence[str]) -> None:
    seen: dict[tuple[str, int], Path] = {}
    for run, key in zip(runs, keys, strict=True):
        seed = int(run.summary["seed"])
        if (key, seed) in seen:
            raise RunFolderError(
                f"{seen[key, seed]} and {run.path} have the same settings and the same seed, {seed}: they are not independent, and would count "
                "twice. Name the folders to report without one of them, or run it with another seed."
            )
        seen[key, seed] = run.path


def _differing(i: int, runs: Sequence[Run], settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings in which run ``i`` differs from others. Those of algorithms are compared within the same algorithm only: each has its own."""
    algorithms = [run.summary["algorithm"] for run in runs]
    found: dict[str, Any] = {"algo": algorithms[i]} if len(set(algorithms)) > 1 else {}
    for key in {key: None for one in (settings[i], *settings) for key in one}:
        others = [own for own, name in zip(settings, algorithms, strict=True) if not key.startswith("algo.") or name == algorithms[i]]
        if any(other.get(key) != settings[i].get(key) for other in others):
            found[key] = settings[i].get(key)
    return found


def _labels(runs: Sequence[Run], keys: Sequence[str], differing: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [run.name for run in runs]
    given = not any(
        name.startswith("train-") and name.endswith(f"-{run.summary['algorithm']}") for name, run in zip(names, runs, strict=True)
    )
    if given and len(set(names)) == len(set(keys)) == len(set(zip(names, keys, strict=True))):
        return names
    if len(set(keys)) == 1:
        return [str(run.summary["algorithm"]) for run in runs]
    all_keys = {key for own in differing for key in own}
    last = [key.rpartition(".")[2] for key in all_keys]
    short = {key: part if last.count(part) == 1 else key for key, part in zip(all_keys, last, strict=True)}
    return [
        " ".join(_shown(value) if key == "algo" else f"{short[key]}={_shown(value)}" for key, value in own.items()) for own in differing
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _common(stamps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = OWN_TO_A_RUN - {"commit", "searchqa_gym"}
    return {key: value for key, value in stamps[0].items() if key not in own and all(stamp.get(key) == value for stamp in stamps)}


def _outcome(run: Run, variant: str) -> Outcome:
    lines = [line for line in read_metrics(run.path) if line["phase"] == "train"]
    curves: dict[str, list[float]] = {"step": []}
    steps = [line for line in lines if CURVES["em"] in line]
    if steps:
        curves["step"] = [int(line["step"]) for line in steps]
        curves |= {
            name: [round(float(line[key]), 5) for line in steps] for name, key in CURVES.items() if all(key in line for line in steps)
        }
    summary = run.summary
    between = {when: dict(values) for when, values in summary["measures"].items() if when not in ("before", "after")}
    before, after = (dict(summary["measures"].get(when, {})) for when in ("before", "after"))
    tokens, seconds = float(summary["tokens"]), float(summary["seconds_training"])
    return Outcome(variant, int(summary["seed"]), before, after, curves, tokens, seconds, between)


# -- one file of results ---------------------------------------------------------------------------------------------------------------------


def write_results(file: Path, comparison: Comparison) -> None:
    """Write a comparison as JSON, one run on a line, so that it can be kept, read and drawn where the runs' folders are not."""
    values = asdict(comparison)
    runs = [json.dumps(outcome) for outcome in values.pop("outcomes")]
    head = json.dumps({"schema": SCHEMA, **values}, indent=1)
    text = head.removesuffix("\n}") + ',\n "outcomes": [\n  ' + ",\n  ".join(runs) + "\n ]\n}\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_results(file: Path) -> Comparison:
    """A comparison from its file. Raises ``RunFolderError``, which names the file and the field, for a file that holds none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return _comparison(values)
    except OSError as error:
        raise RunFolderError(f"{file} cannot be read ({error.strerror}). `searchqa report FOLDER --save {file}` writes it.") from error
    except ValueError as error:
        raise RunFolderError(f"{file} holds no results of `searchqa report FOLDER --save FILE.json`: {error}") from error


def _comparison(values: Any) -> Comparison:
    """Of the fields of a file; raises ``ValueError`` that names the field."""
    given = _fields("the file", values, Comparison, also={"schema"})
    if given.pop("schema") != SCHEMA:
        raise ValueError(f"schema is {values['schema']!r}, not {SCHEMA}")
    for key, kind in (
        ("by", str),
        ("measure", str),
        ("command", str),
        ("stamp", dict),
        ("titles", dict),
        ("settings", dict),
        ("measured", dict),
    ):
        _check(key, given.get(key, kind()), kind)
    for key in ("settings", "measured"):
        for name, own in given.get(key, {}).items():
            _check(f"{key}[{name!r}]", own, dict)
    outcomes: list[Outcome] = []
    for i, own in enumerate(_check("outcomes", given.pop("outcomes"), list)):
        outcome = _read_outcome(f"outcomes[{i}]", own)
        if outcome.variant not in given["settings"]:
            raise ValueError(f"outcomes[{i}].variant is {outcome.variant!r}, which settings does not have")
        if any((one.variant, one.seed) == (outcome.variant, outcome.seed) for one in outcomes):
            raise ValueError(f"outcomes[{i}].seed is {outcome.seed} a second time in variant {outcome.variant!r}")
        outcomes.append(outcome)
    without = [name for name in given["settings"] if all(one.variant != name for one in outcomes)]
    if without or not outcomes:
        raise ValueError(f"outcomes has no run of variant {without[0]!r}" if without else "outcomes is empty")
    return Comparison(outcomes=outcomes, **given)


def _read_outcome(where: str, values: Any) -> Outcome:
    given = _fields(where, values, Outcome)
    _check(f"{where}.variant", given["variant"], str)
    _check(f"{where}.seed", given["seed"], int)
    for key in ("tokens", "seconds"):
        given[key] = _check_number(f"{where}.{key}", given[key])
    for key, own in (
        *((key, given[key]) for key in ("before", "after")),
        *_check(f"{where}.between", given.get("between", {}), dict).items(),
    ):
        measures = _check(f"{where}.{key}", own, dict)
        checked = {name: _check_number(f"{where}.{key}[{name!r}]", value) for name, value in measures.items()}
        (given if key in ("before", "after") else given["between"])[key] = checked
    curves = _check(f"{where}.curves", given["curves"], dict)
    steps = len(_check(f"{where}.curves['step']", curves.get("step"), list))
    for name, points in curves.items():
        if len(_check(f"{where}.curves[{name!r}]", points, list)) != steps:
            raise ValueError(f"{where}.curves[{name!r}] has {len(points)} points, not the {steps} of step")
        curves[name] = [_check_number(f"{where}.curves[{name!r}][{i}]", value) for i, value in enumerate(points)]
        if name == "step" and any(math.isnan(value) for value in curves[name]):
            raise ValueError(f"{where}.curves['step'] has a step without a number")
    return Outcome(**given)


def _fields(where: str, values: Any, kind: type[Comparison | Outcome], also: Set[str] = frozenset()) -> dict[str, Any]:
    """A copy of the fields of a data class, none missing and none unknown."""
    given = dict(_check(where, values, dict))
    needed = {one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING} | also
    unknown = given.keys() - {one.name for one in fields(kind)} - also
    if missing := sorted(needed - given.keys()):
        raise ValueError(f"{where} has no field {missing[0]!r}")
    if unknown:
        raise ValueError(f"{where} has an unknown field {min(unknown)!r}")
    return given


def _check(where: str, value: Any, kind: type[Any]) -> Any:
    names = {str: "text", int: "a whole number", list: "a list", dict: "a mapping"}
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where} must be {names[kind]}, got {value!r:.80}")
    return value


def _check_number(where: str, value: Any) -> float:
    """A finite number, or NaN for null and NaN: a value that is missing."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise ValueError(f"{where} must be a finite number, or null where it is missing, got {value!r:.80}")
    return value


# -- table -----------------------------------------------------------------------------------------------------------------------------------


def comparison_table(comparison: Comparison) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: for each variant means over its runs with intervals, each run's value, and paired differences from the first variant.

    Of a single variant: for each measure, before, between stages and after, the mean over its runs, the interval, and each run's value.
    """
    variants = list(comparison.settings)
    if len(variants) == 1:
        return _table_of_one(comparison, variants[0])
    seeds = sorted({one.seed for one in comparison.outcomes})
    key = comparison.measure
    hops = f"{key.partition('/')[0].removeprefix('hops=')}-hop " if key.startswith("hops=") else ""
    asked = f"{hops}held-out questions, sampled; mean and each run (seeds {', '.join(map(str, seeds))})"
    title = f"By {comparison.by}: {asked}; differences are from the first, seed by seed"
    changed = [name for name in ("search_rate", "reward") if any(f"{key}/{name}" in one.after for one in comparison.outcomes)]
    stages = list({when: None for one in comparison.outcomes for when in one.between})
    columns = [comparison.by, "EM before", *(f"EM {_one_line(when)}" for when in stages), "EM after", "95% interval", "difference"]
    columns += ["EM while training", "difference while training", "searches", *(name.replace("_", " ") for name in changed)]
    columns += ["tokens", "seconds"]
    first = comparison.of(variants[0])
    rows = []
    for variant in variants:
        own = comparison.of(variant)
        em = [one.measured(f"{key}/em") for one in own]
        after = [one["after"] for one in em]
        tokens, seconds = _mean([one.tokens for one in own]), _mean([one.seconds for one in own])
        rows.append(
            [
                _one_line(variant),
                mean_of_known([one["before"] for one in em]),
                *("" if all(when not in one for one in em) else mean_of_known([one.get(when, math.nan) for one in em]) for when in stages),
                mean_of_known(after),
                interval_text(after, 0.0, 1.0),
                "" if variant == variants[0] else difference_text(*_paired(first, own, lambda one: one.measured(f"{key}/em")["after"])),
                mean_of_known([one.while_training() for one in own], each=False),
                "" if variant == variants[0] else difference_text(*_paired(first, own, Outcome.while_training)),
                *(_course(own, f"{key}/{name}") for name in ("searches", *changed)),
                "–" if math.isnan(tokens) else f"{tokens / 1e6:.2f} M",
                "–" if math.isnan(seconds) else f"{seconds:.0f}",
            ]
        )
    return title, columns, rows


def _table_of_one(comparison: Comparison, variant: str) -> tuple[str, list[str], list[list[str]]]:
    own = comparison.of(variant)
    titles = comparison.titles or {key: key for one in own for key in one.after}
    columns = ["", "mean", "95% interval", *(f"seed {one.seed}" for one in own)]
    rows = []
    for key, title in titles.items():
        measured = [one.measured(key) for one in own]
        for when in {when: None for one in measured for when in one}:
            values = [one.get(when, math.nan) for one in measured]
            if not all(map(math.isnan, values)):
                rows.append(seed_row(f"{title}, {when}", values, share=key.rpartition("/")[2] in SHARES))
    rows.append(seed_row("tokens of training, millions", [one.tokens / 1e6 for one in own]))
    rows.append(seed_row("seconds of training", [one.seconds for one in own]))
    return f"{_one_line(variant)}: held-out questions, mean over {len(own)} runs", columns, rows


def seed_row(title: str, values: Sequence[float], share: bool = False) -> list[str]:
    """A row of what each seed gave: title, mean, 95% interval (of a ``share`` cut to what that can be), each value; dashes for NaN."""
    interval = interval_text(values, *((0.0, 1.0) if share else ()))
    return [
        _one_line(title),
        mean_of_known(values, each=False),
        interval,
        *("–" if math.isnan(value) else number(value) for value in values),
    ]


def notes(comparison: Comparison) -> list[str]:
    """Sentences that belong beneath the table: in what the variants were measured differently."""
    told = []
    played = {variant: {key: value for key, value in own.items() if key != "reward"} for variant, own in comparison.measured.items()}
    if any(played.values()):
        own = "; ".join(
            f"{_one_line(variant)}: {', '.join(f'{key}={_one_line(_shown(value))}' for key, value in one.items())}"
            for variant, one in played.items()
        )
        told.append(f"The variants differ in how they were measured too, not in training alone ({own}).")
    if any("reward" in own for own in comparison.measured.values()):
        told.append("Each variant's reward is its own: the rewards of two variants cannot be compared.")
    return told


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _paired(first: Sequence[Outcome], other: Sequence[Outcome], value: Any) -> tuple[dict[int, float], dict[int, float]]:
    return {one.seed: value(one) for one in first}, {one.seed: value(one) for one in other}


def paired_difference(first: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float | None] | None:
    """Mean of ``other`` minus ``first`` over the seeds that both have, and the half-width of its 95% interval; None without such seeds."""
    differences = [other[seed] - first[seed] for seed in sorted(first.keys() & other.keys()) if not math.isnan(other[seed] - first[seed])]
    return mean_and_interval(differences) if differences else None


def difference_text(first: Mapping[int, float], other: Mapping[int, float]) -> str:
    """A paired difference for a table: ``+0.021 (-0.003 to +0.045)``, with the number of seeds where it is not from all of ``other``."""
    found = paired_difference(first, other)
    if found is None:
        return "–"
    mean, half = found
    used = sum(not math.isnan(first.get(seed, math.nan) - value) for seed, value in other.items())
    text = f"{mean:+.3f}" if half is None else f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"
    return text + _seeds_used(used, len(other))


def mean_of_known(values: Sequence[float], each: bool = True) -> str:
    """The mean of the values that are not NaN, how many these are where some are, and each value where they differ: ``0.940 (0.938 – 0.942), 2 of 3 seeds``."""
    known = _known(values)
    if not known:
        return "–"
    shown = f" ({' '.join('–' if math.isnan(value) else number(value) for value in values)})"
    return (
        number(_mean(known)) + (shown if each and len({str(value) for value in values}) > 1 else "") + _seeds_used(len(known), len(values))
    )


def _seeds_used(used: int, count: int) -> str:
    return "" if used == count else f", {used} of {count} seeds"


def interval_text(values: Sequence[float], lowest: float = -math.inf, highest: float = math.inf) -> str:
    """The 95% interval of the mean of the values that are not NaN, for a table, cut to what they can be; a dash for fewer than two."""
    known = _known(values)
    mean, half = mean_and_interval(known) if known else (math.nan, None)
    return "–" if half is None else f"{max(mean - half, lowest):.3f} to {min(mean + half, highest):.3f}"


def _course(own: Sequence[Outcome], key: str) -> str:
    """Means before, between stages and after."""
    measured = [one.measured(key) for one in own]
    means = [_mean([one.get(when, math.nan) for one in measured]) for when in {when: None for one in measured for when in one}]
    return " → ".join("–" if math.isnan(value) else f"{value:.2f}" for value in means)


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _mean(values: Sequence[float]) -> float:
    """Of the values that are not NaN; NaN where there are none."""
    known = _known(values)
    return math.fsum(known) / len(known) if known else math.nan


T_975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95% interval (Student's t, runs as independent draws); None for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    quantile = T_975[len(values) - 2] if len(values) - 2 < len(T_975) else 1.96
    return mean, quantile * math.sqrt(variance / len(values))


# -- picture ---------------------------------------------------------------------------------------------------------------------------------


def draw_comparison(file: Path, comparison: Comparison) -> Path:
    """Draw learning curves and held-out results by variant, as PNG."""
    from searchqa_agents.plots import comparison as drawn

    key = comparison.measure
    curves = {
        name: {variant: [points for one in comparison.of(variant) if (points := one.points(name))] for variant in comparison.settings}
        for name in ("em", "searches")
    }
    results = {
        variant: [(one.before.get(f"{key}/em", math.nan), one.after.get(f"{key}/em", math.nan)) for one in comparison.of(variant)]
        for variant in comparison.settings
    }
    known = {variant: _known([after for _, after in values]) for variant, values in results.items()}
    intervals = {variant: mean_and_interval(values) if values else (math.nan, None) for variant, values in known.items()}
    picture = drawn(curves, results, intervals, key)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda partial: partial.write_bytes(picture))
    return file
