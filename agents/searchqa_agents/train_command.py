"""``searchqa train``: warm start, training by an algorithm, and what it changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from searchqa_agents.hydra_app import check_config, is_finished, run_app, write_config
from searchqa_agents.launch import launched, place
from searchqa_agents.settings import TrainSettings, register
from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from searchqa_agents.parallel import Parallel
    from searchqa_agents.stages import Stage


def main(line: Sequence[str]) -> int:
    """Run ``searchqa train <line>``."""
    from searchqa_agents.plugins import register_with_plugins

    register()
    return run_app("train", run, line, before=register_with_plugins)


def run(config: DictConfig, path: Path) -> None:
    """One training run, into the run folder ``path``."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from rich.console import Console

    from searchqa_agents.loading import chosen_device
    from searchqa_agents.parallel import processes
    from searchqa_agents.plugins import load_plugins

    if launched() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ConfigurationError(
            "A sweep (-m) cannot run under torchrun, whose processes connect once. Start torchrun for each of its runs."
        )
    load_plugins(config.plugins)  # this may be another process than the one that read the line
    settings = cast(TrainSettings, OmegaConf.to_object(config))
    label = str(HydraConfig.get().runtime.choices["algo"])
    console = Console()
    if settings.dry_run:
        check_config(Path(settings.run_dir), config)
        if place().rank == 0:
            plan_run(settings, config, label, console)
        return
    try:
        with processes(settings.parallel, chosen_device(settings.device)) as parallel:  # type: ignore[arg-type]  # it checks the value
            train(settings, config, Path(parallel.broadcast(str(path))), label, console, parallel)
    except KeyboardInterrupt:
        if place().rank == 0:
            console.print(f"Stopped. `searchqa train resume={path}` goes on from the last checkpoint.", markup=False, soft_wrap=True)
        raise


def plan_run(settings: TrainSettings, config: DictConfig, label: str, console: Console) -> None:
    """Print the configuration and the plan of a run. Raises what a real start would."""
    from omegaconf import OmegaConf

    from searchqa_agents.plan import make_plan, show_plan
    from searchqa_agents.stages import stages_of

    plan = make_plan(settings)
    console.print(OmegaConf.to_yaml(config, resolve=True), markup=False, highlight=False)
    show_plan(console, plan)
    if plan.errors:
        raise ConfigurationError(" ".join(plan.errors))
    first = f"download {plan.missing}, then run " if plan.missing is not None else "run "
    warm_start = "induction warm-up, fine-tuning, " if settings.start == "nothing" else f"from {settings.start}: "
    steps = ", ".join(
        f"{'at most ' if stage.search_rate is not None else ''}{stage.config.steps} steps of {_variant(stage, settings, label)}"
        f"{f' ({stage.name})' if stage.name else ''}, evaluation"
        for stage in stages_of(settings)
    )
    console.print(f"Would {first}{warm_start}evaluation, {steps}, and write {settings.run_dir}.", markup=False, soft_wrap=True)


def _variant(stage: Stage, settings: TrainSettings, label: str) -> str:
    """What a stage's algorithm is called: as on the line where it is the run's own, else its name and what baseline it has."""
    baseline = getattr(stage.config, "baseline", "none")
    if stage.algorithm == settings.algo.name and baseline == getattr(settings.algo, "baseline", "none"):
        return _title(label)
    return _title(stage.algorithm) + (f" (baseline: {baseline})" if baseline != "none" else "")


def _title(label: str) -> str:
    return label.upper() if len(label) <= 4 else label


def train(settings: TrainSettings, config: DictConfig, path: Path, label: str, console: Console, parallel: Parallel) -> None:
    """All phases, then the table, the picture and the page. ``label`` is the algorithm's name on the line."""
    from searchqa_agents.loading import make_venv
    from searchqa_agents.report import lost_episodes, lost_line, search_line, totals_of_training, write_page, write_picture
    from searchqa_agents.runs import SUMMARY_FILE, RunFolder, list_checkpoints, read_searches, run_stamp
    from searchqa_agents.table import show, stamp_line
    from searchqa_agents.training_run import Training, follow, prepare, stages_stamp, table_of
    from searchqa_agents.watching import watched_run

    if parallel.broadcast(is_finished(path, config)):
        if parallel.main:
            console.print(f"{path} is finished: nothing to do. `searchqa report {path}` shows it.", markup=False, soft_wrap=True)
        return
    prepare(settings)
    if not parallel.main:
        follow(settings, parallel)
        return
    with RunFolder(path, settings.keep_last) as folder, folder.telling_way_on():
        check_config(folder.path, config)
        if not list_checkpoints(folder.path):
            write_config(folder, config)
        venv = make_venv(settings.env, settings.num_envs)
        stamp = run_stamp(venv.unwrapped.stamp(), seed=settings.seed, threads=settings.threads)
        stamp["measured_on"] = settings.evaluation.split
        if settings.evaluation.env:
            stamp["measured_with"] = dict(settings.evaluation.env)
        stamp["algorithm"] = label
        stamp |= stages_stamp(settings, stamp, venv)
        folder.write_stamp(stamp)
        write_config(folder, config)  # only now: what the folder holds stays as it is where its search engine is not this one
        folder.write_tokenizer(venv.unwrapped.tokenizer)
        training = Training(settings, folder, venv)
        with watched_run(settings, folder):
            if settings.start == "nothing":
                training.run_warmup()
                training.run_sft()
            training.lead(stamp, parallel)
            measures = {"before": training.measure(settings, "before", stamp, parallel)}
            measures |= training.run_algorithm(settings, stamp, parallel, _title(label))
        venv.close()
        titles, columns, rows = table_of(measures)
        summary: dict[str, Any] = {"kind": "train", "name": settings.name, "algorithm": label, "seed": settings.seed}
        summary |= {"seconds": folder.seconds, **totals_of_training(folder.metrics())}
        summary |= {"alarms": [alarm._asdict() for alarm in training.alarms.raised] if training.alarms is not None else []}
        if training.stages:
            summary["stages"] = training.stages
        summary["lost_episodes"] = lost = lost_episodes(folder.metrics(), measures)
        summary["search"] = searches = read_searches(folder.path)
        summary |= {"columns": columns, "rows": rows, "titles": titles, "measures": measures}
        folder.write_json(SUMMARY_FILE, summary)
        picture = write_picture(folder.path)
        page = write_page(folder.path)
        folder.finished(summary, measures["after"], page)
        show(console, f"{settings.name}: {settings.evaluation.questions} questions each", columns, rows, stamp_line(stamp))
        console.print(search_line(searches.get("total", {})), markup=False, highlight=False, soft_wrap=True)
        if lost:
            console.print(lost_line(lost), style="bold", markup=False, highlight=False, soft_wrap=True)
        for title, file in (("Checkpoint", training.saved), ("Picture", picture), ("Page", page)):
            console.print(f"{title}: {file}", markup=False, highlight=False, soft_wrap=True)
