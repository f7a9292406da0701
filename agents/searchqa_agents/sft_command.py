"""``searchqa sft``: the supervised checkpoint that reinforcement learning starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from searchqa_agents.hydra_app import check_config, run_app, write_config
from searchqa_agents.settings import WarmStartSettings, register, register_training

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(line: Sequence[str]) -> int:
    """Run ``searchqa sft <line>``."""
    register()
    register_training()
    return run_app("sft", run, line)


def run(config: DictConfig, path: Path) -> None:
    """One warm start, into the run folder ``path``; its policy lies in ``model/`` there."""
    from omegaconf import OmegaConf
    from rich.console import Console

    from searchqa_agents.loading import make_venv
    from searchqa_agents.report import lost_episodes, lost_line, write_picture
    from searchqa_agents.runs import RunFolder, list_checkpoints, run_stamp
    from searchqa_agents.training_run import Training, check_start, prepare
    from searchqa_agents.watching import watched_run

    settings = cast(WarmStartSettings, OmegaConf.to_object(config))
    console = Console()
    if settings.dry_run:
        check_config(Path(settings.run_dir), config)
        missing = check_start(settings)
        console.print(OmegaConf.to_yaml(config, resolve=True), markup=False, highlight=False)
        first = f"download {missing}, then run " if missing is not None else "run "
        console.print(f"Would {first}induction warm-up and fine-tuning, and write {settings.run_dir}.", markup=False, soft_wrap=True)
        return
    prepare(settings)
    with RunFolder(path, settings.keep_last, "sft") as folder, folder.telling_way_on():
        check_config(folder.path, config)
        if not list_checkpoints(folder.path):
            write_config(folder, config)
        venv = make_venv(settings.env, settings.num_envs)
        folder.write_stamp(run_stamp(venv.unwrapped.stamp(), seed=settings.seed, threads=settings.threads))
        write_config(folder, config)
        training = Training(settings, folder, venv)
        with watched_run(settings, folder):
            training.run_warmup()
            training.run_sft()
        venv.close()
        model = folder.path / "model"
        training.policy.save(model)
        write_picture(folder.path)
        lost = lost_episodes(folder.metrics(), {})
    if lost:
        console.print(lost_line(lost), style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Policy: {model}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"`searchqa train start={model}` trains it further.", markup=False, highlight=False, soft_wrap=True)
