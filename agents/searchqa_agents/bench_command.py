"""``searchqa bench``: algorithms on the tasks of a suite, a job for each seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from searchqa_agents.hydra_app import check_config, is_finished, run_app, write_config
from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    from omegaconf import DictConfig

ALGORITHM = "algorithm"
"""What the line calls the group ``algo``."""


def main(line: Sequence[str]) -> int:
    """Run ``searchqa bench <line>``."""
    from searchqa_agents.settings import register

    register()
    return run_app("bench", run, translated(line), before=_register, multirun=True)


def translated(line: Sequence[str]) -> list[str]:
    """``algorithm=`` as Hydra's group ``algo=``. A Python file among its values is loaded, and stands for the algorithm that it registers."""
    words: list[str] = []
    plugins: list[str] = []
    for word in line:
        key, equals, value = word.partition("=")
        if key != ALGORITHM or not equals:
            words.append(word)
            continue
        names = [name.strip().strip("'\"") for name in value.split(",")]
        files = [name for name in names if name.endswith(".py")]
        words.append(f"algo={','.join(registered_by(name) if name in files else name for name in names)}")
        plugins += files
    if plugins:
        from searchqa_agents.plugins import plugins_on

        plugins = [*plugins_on(words), *(str(Path(plugin).expanduser().resolve()) for plugin in plugins)]
        words = [word for word in words if not word.startswith("plugins=")]
        words.append(f"plugins=[{','.join(dict.fromkeys(plugins))}]")
    return words


def registered_by(plugin: str) -> str:
    """The name of the one algorithm that a file registers."""
    from searchqa_agents.settings import register_training

    register_training()
    from searchqa_agents.algorithm import ALGORITHMS
    from searchqa_agents.plugins import load_plugins

    before = set(ALGORITHMS)
    load_plugins([plugin])
    names = sorted(set(ALGORITHMS) - before) or sorted(_loaded.get(plugin, ()))
    if len(names) != 1:
        raise ConfigurationError(
            f"{plugin} registers {'no algorithm' if not names else ' and '.join(names)}; algorithm=FILE.py takes a file that registers one. "
            f"For several: plugins=[{plugin}] algorithm=<name>,<name>."
        )
    _loaded[plugin] = names
    return names[0]


_loaded: dict[str, list[str]] = {}
"""What files have registered in this process, where they are loaded once."""


def _register(line: Sequence[str]) -> None:
    from hydra.core.config_store import ConfigStore

    from searchqa_agents.bench.sb3_job import SB3PPOConfig
    from searchqa_agents.bench.task import BenchSettings
    from searchqa_agents.plugins import load_plugins, plugins_on
    from searchqa_agents.settings import register_training, structured

    register_training()
    plugins = plugins_on(line)
    if plugins:
        load_plugins(plugins)
        register_training()  # their settings too
    store = ConfigStore.instance()
    store.store(name="bench_types", node=BenchSettings)
    store.store(group="algo", name="sb3_ppo", node=structured(SB3PPOConfig, name="sb3_ppo"))


def run(config: DictConfig, path: Path) -> float:
    """One job, into the run folder ``path``; returns its score when the budget is spent."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    from rich.console import Console

    from searchqa_agents.bench.job import run_job
    from searchqa_agents.bench.results import SCORE_FILE, read_run
    from searchqa_agents.bench.task import BenchSettings
    from searchqa_agents.plugins import load_plugins
    from searchqa_agents.runs import RunFolder

    load_plugins(config.plugins)  # this may be another process than the one that read the line
    settings = cast(BenchSettings, OmegaConf.to_object(config))
    hydra_config = HydraConfig.get()
    label = str(hydra_config.runtime.choices["algo"])
    console = Console()
    if settings.dry_run:
        check_config(path, config)
        job = f"{label} on {settings.task.name} of {settings.suite}, seed {settings.seed}"
        console.print(f"Would train {job}: {settings.task.budget} policy tokens from {settings.task.start}.", markup=False, soft_wrap=True)
        return 0.0
    if is_finished(path, config) and (path / SCORE_FILE).is_file():
        console.print(f"{path} is finished: nothing to do.", markup=False, soft_wrap=True)
        return read_run(path).points[-1].score
    says = [word.lstrip("+").partition("=")[0] for word in hydra_config.overrides.task]
    with RunFolder(path, settings.keep_last, command="bench") as folder, folder.telling_way_on():
        write_config(folder, config)
        result = run_job(settings, folder, label, says)
    last = result.points[-1]
    console.print(
        f"{label}, {settings.task.name}, seed {settings.seed}: score {last.score:.3f} (exact match {last.em:.3f}) after {last.policy_tokens:,} policy "
        f"tokens, {last.cpu_seconds:.0f} s of the processor; {result.status}.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return last.score
