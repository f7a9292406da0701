"""``searchqa train``: warm start, reinforcement learning, and what it changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from searchqa_agents.hydra_app import check_config, run_app, write_config
from searchqa_agents.settings import TrainSettings, register, register_training

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console


def main(line: Sequence[str]) -> int:
    """Run ``searchqa train <line>``."""
    register()
    register_training()
    return run_app("train", run, line)


def run(config: DictConfig, path: Path) -> None:
    """One training run, into the run folder ``path``."""
    from omegaconf import OmegaConf
    from rich.console import Console

    from searchqa_agents.training_run import check_start

    settings = cast(TrainSettings, OmegaConf.to_object(config))
    console = Console()
    if settings.dry_run:
        check_config(Path(settings.run_dir), config)
        missing = check_start(settings)
        console.print(OmegaConf.to_yaml(config, resolve=True), markup=False, highlight=False)
        first = f"download {missing}, then run " if missing is not None else "run "
        warm_start = "induction warm-up, fine-tuning, " if settings.start == "nothing" else f"from {settings.start}: "
        console.print(f"Would {first}{warm_start}evaluation, GRPO, evaluation, and write {settings.run_dir}.", markup=False, soft_wrap=True)
        return
    try:
        train(settings, config, path, console)
    except KeyboardInterrupt:
        console.print(f"Stopped. `searchqa train resume={path}` goes on from the last checkpoint.", markup=False, soft_wrap=True)
        raise


def train(settings: TrainSettings, config: DictConfig, path: Path, console: Console) -> None:
    """All phases, then the table, the picture and the page."""
    from searchqa_agents.loading import make_venv
    from searchqa_agents.report import write_page, write_picture
    from searchqa_agents.runs import RunFolder, run_stamp
    from searchqa_agents.table import show, stamp_line
    from searchqa_agents.training_run import Training, prepare, table_of

    prepare(settings)
    with RunFolder(path) as folder:
        write_config(folder, config)
        venv = make_venv(settings.env, settings.num_envs)
        stamp = run_stamp(venv.unwrapped.stamp(), seed=settings.seed, threads=settings.threads)
        stamp["measured_on"] = settings.evaluation.split
        folder.write_json("stamp.json", stamp)
        folder.write_tokenizer(venv.unwrapped.tokenizer)
        training = Training(settings, folder, venv)
        if settings.start == "nothing":
            training.run_warmup()
            training.run_sft()
        measures = {"before": training.measure(settings, "before", stamp)}
        training.run_grpo(settings, stamp)
        measures["after"] = training.measure(settings, "after", stamp)
        venv.close()
        titles, columns, rows = table_of(measures)
        summary = {"kind": "train", "name": settings.name, "seed": settings.seed, "seconds": folder.seconds}
        folder.write_json("summary.json", {**summary, "columns": columns, "rows": rows, "titles": titles, "measures": measures})
        picture = write_picture(folder.path)
        page = write_page(folder.path)
        show(console, f"{settings.name}: {settings.evaluation.questions} questions each", columns, rows, stamp_line(stamp))
        for title, file in (("Checkpoint", training.saved), ("Picture", picture), ("Page", page)):
            console.print(f"{title}: {file}", markup=False, highlight=False, soft_wrap=True)
