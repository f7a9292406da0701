"""``searchqa eval``: play the questions of a data set with an agent and measure it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from searchqa_agents.hydra_app import check_config, run_app, write_config
from searchqa_agents.settings import LANGUAGE_MODELS, BaselineSettings, EvalSettings, check_at_least, register

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from searchqa_agents.evaluate import Evaluation


def main(line: Sequence[str]) -> int:
    """Run ``searchqa eval <line>``."""
    register()
    return run_app("eval", run, line)


def run(config: DictConfig, path: Path) -> None:
    """One evaluation, into the run folder ``path``."""
    from omegaconf import OmegaConf
    from rich.console import Console

    settings = cast(EvalSettings, OmegaConf.to_object(config))
    console = Console()
    if settings.dry_run:
        check_config(Path(settings.run_dir), config)
        missing = check_start(settings)
        console.print(OmegaConf.to_yaml(config, resolve=True), markup=False, highlight=False)
        first = f"download {missing}, " if missing is not None else ""
        console.print(f"Would {first}play {_plan(settings)} and write {settings.run_dir}.", markup=False, soft_wrap=True)
        return
    evaluate_run(settings, config, path, console)


def _plan(settings: EvalSettings) -> str:
    count = "all questions" if settings.questions is None else f"{settings.questions} questions"
    return f"{count} of {settings.env.id} with the agent {settings.agent.kind}, {settings.samples} episode(s) each"


def check_start(settings: EvalSettings) -> str | None:
    """Raise what a real start would, writing nothing. Returns the data set that would have to be downloaded first, if any."""
    from searchqa_agents.loading import build_agent, missing_data
    from searchqa_agents.rollout import rollout

    _check(settings)
    missing = missing_data(settings.env)
    if missing is None:
        venv = _make_venv(settings)
        agent = build_agent(settings.agent, venv, settings.device, settings.dtype)
        if not isinstance(settings.agent, (*LANGUAGE_MODELS, BaselineSettings)):
            rollout(venv, agent, [0])
        venv.close()
    return missing


def _check(settings: EvalSettings) -> None:
    """What can be checked before any data is loaded."""
    from searchqa_agents.loading import check_agent

    check_at_least(1, questions=settings.questions, samples=settings.samples, num_envs=settings.num_envs)
    check_at_least(0, save=settings.save)
    check_agent(settings.agent, settings.env)


def _make_venv(settings: EvalSettings) -> Any:
    from searchqa_agents.loading import agent_env, make_venv

    env = settings.env
    split = env.split or ("test" if env.id.startswith("SearchQA-World") else None)
    return make_venv(env, settings.num_envs, split=split, **agent_env(settings.agent, env))


def evaluate_run(settings: EvalSettings, config: DictConfig, path: Path, console: Any) -> Evaluation:
    """Evaluate, print the table, and write the run's files."""
    from searchqa_agents.evaluate import TOLD_THE_ANSWER, evaluate
    from searchqa_agents.loading import agent_stamp, build_agent
    from searchqa_agents.lost_back_end import check_measured
    from searchqa_agents.progress import progress
    from searchqa_agents.report import search_line, write_page
    from searchqa_agents.runs import RunFolder, read_searches, run_stamp
    from searchqa_agents.table import show, stamp_line

    _check(settings)
    with RunFolder(path, command="eval") as folder, folder.telling_way_on():
        write_config(folder, config)
        venv = _make_venv(settings)
        base: Any = venv.unwrapped
        total = len(base.source) if settings.questions is None else min(settings.questions, len(base.source))
        stamp = run_stamp(base.stamp(), seed=settings.seed, threads=settings.threads)
        agent = build_agent(settings.agent, venv, settings.device, settings.dtype)
        stamp |= {"agent": agent_stamp(settings.agent, agent), "samples": settings.samples, "questions_played": total}
        if base.rules.needs_gold:
            stamp["told_the_answer"] = True
            console.print(TOLD_THE_ANSWER, style="bold", soft_wrap=True)
        folder.write_json("stamp.json", stamp)
        folder.write_tokenizer(base.tokenizer)
        temperature = settings.agent.temperature if isinstance(settings.agent, LANGUAGE_MODELS) else 0.0
        with progress(settings.name, total * settings.samples) as advance:
            evaluation = evaluate(
                venv,
                agent,
                range(total),
                temperature=temperature,
                samples=settings.samples,
                seed=settings.seed,
                stamp=stamp,
                on_done=lambda done: advance(done, ""),
            )
            advance(total * settings.samples, f"em {evaluation.metrics.get('em', 0.0):.3f}")
        folder.log_searches("eval", 0, base.search_counters().sums)
        searches = read_searches(folder.path)
        venv.close()
        check_measured(evaluation.trajectories, "the evaluation")
        columns, rows = result_rows(evaluation)
        folder.write_json(
            "summary.json",
            {"kind": "eval", "name": settings.name, "columns": columns, "rows": rows, "metrics": evaluation.metrics}
            | {"intervals": evaluation.intervals, "groups": evaluation.groups, "search": searches},
        )
        kept = evaluation.trajectories[: settings.save]
        if kept:
            folder.write_trajectories("eval", kept)
        write_page(folder.path, {"eval": kept})
        show(console, settings.name, columns, rows, stamp_line(stamp))
        console.print(search_line(searches.get("total", {})), markup=False, highlight=False, soft_wrap=True)
        lost = int(evaluation.metrics["backend_errors"])
        if lost:
            console.print(
                f"The search back end was lost in {lost} episodes, which are left out of the means.", style="bold", soft_wrap=True
            )
        console.print(f"Page: {folder.path / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    return evaluation


def result_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table; measures that the data set does not define are left out."""
    from searchqa_agents.table import METRIC_TITLES, number

    groups = list(evaluation.groups) if len(evaluation.groups) > 1 else []
    columns = ["", "mean", "95% interval", *(group.replace("=", " ") for group in groups)]
    rows = []
    for name, title in METRIC_TITLES.items():
        if name not in evaluation.metrics:
            continue
        low, high = evaluation.intervals[name]
        rows.append(
            [title, number(evaluation.metrics[name]), f"{low:.3f} to {high:.3f}"]
            + [number(evaluation.groups[group].get(name)) for group in groups]
        )
    counts = [str(int(evaluation.groups[group]["questions"])) for group in groups]
    rows.append(["questions", str(int(evaluation.metrics["questions"])), "", *counts])
    if evaluation.metrics["backend_errors"]:
        lost = [str(int(evaluation.groups[group]["backend_errors"])) for group in groups]
        rows.append(["episodes that lost the search back end, left out", str(int(evaluation.metrics["backend_errors"])), "", *lost])
    return columns, rows
