"""``searchqa eval``: play the questions of a data set with an agent and measure it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from searchqa_agents.hydra_app import run_app, write_config
from searchqa_agents.settings import EvalSettings, LMAgentSettings, env_arguments, register

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
        console.print(OmegaConf.to_yaml(config, resolve=True), markup=False, highlight=False)
        console.print(f"Would play {_plan(settings)} and write {settings.run_dir}.", markup=False, soft_wrap=True)
        return
    evaluate_run(settings, config, path, console)


def _plan(settings: EvalSettings) -> str:
    count = "all questions" if settings.questions is None else f"{settings.questions} questions"
    return f"{count} of {settings.env.id} with the agent {settings.agent.kind}, {settings.samples} episode(s) each"


def evaluate_run(settings: EvalSettings, config: DictConfig, path: Path, console: Any) -> Evaluation:
    """Evaluate, print the table, and write the run's files."""
    import gymnasium as gym

    import searchqa_envs  # noqa: F401, registers the ids
    from searchqa_agents.evaluate import evaluate
    from searchqa_agents.loading import agent_tokenizer, build_agent
    from searchqa_agents.progress import progress
    from searchqa_agents.report import write_page
    from searchqa_agents.runs import RunFolder, run_stamp
    from searchqa_agents.table import show, stamp_line

    env = settings.env
    split = env.split or ("test" if env.id.startswith("SearchQA-World") else None)
    with RunFolder(path) as folder:
        write_config(folder, config)
        arguments = env_arguments(env, split=split, tokenizer=env.tokenizer or agent_tokenizer(settings.agent))
        venv = gym.make_vec(env.id, num_envs=settings.num_envs, autoreset_mode="DISABLED", **arguments)
        base: Any = venv.unwrapped
        total = len(base.source) if settings.questions is None else min(settings.questions, len(base.source))
        stamp = run_stamp(base.stamp(), seed=settings.seed, threads=settings.threads)
        stamp |= {"agent": vars(settings.agent), "samples": settings.samples, "questions_played": total}
        folder.write_json("stamp.json", stamp)
        agent = build_agent(settings.agent, venv, settings.device)
        temperature = settings.agent.temperature if isinstance(settings.agent, LMAgentSettings) else 0.0
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
        venv.close()
        columns, rows = result_rows(evaluation)
        folder.write_json(
            "summary.json",
            {"kind": "eval", "name": settings.name, "columns": columns, "rows": rows, "metrics": evaluation.metrics}
            | {"intervals": evaluation.intervals, "groups": evaluation.groups},
        )
        kept = evaluation.trajectories[: settings.save]
        if kept:
            folder.write_trajectories("eval", kept)
        write_page(folder.path, {"eval": kept})
        show(console, settings.name, columns, rows, stamp_line(stamp))
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
    return columns, rows
