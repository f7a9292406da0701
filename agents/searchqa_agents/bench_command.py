"""``searchqa bench``: algorithms on the tasks of a suite, a job for each seed."""

from __future__ import annotations

import json
import re
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
    return run_app("bench", run, translated(line), before=_register, multirun=True, current=outdated)


def translated(line: Sequence[str]) -> list[str]:
    """``algorithm=`` as Hydra's group ``algo=``. A Python file among its values is loaded, and stands for the algorithm that it registers."""
    from searchqa_agents.cli import UsageError

    given = [word for word in line if word.partition("=")[0] in (ALGORITHM, "algo") and "=" in word]
    if len(given) > 1:
        together = ",".join(word.partition("=")[2] for word in given)
        raise UsageError(f"Give all algorithms in one word: {ALGORITHM}={together}; got {' '.join(given)}.")
    if not given:
        return list(line)
    names = [name.strip().strip("'\"") for name in given[0].partition("=")[2].split(",")]
    files = list(dict.fromkeys(str(Path(name).expanduser().resolve()) for name in names if name.endswith(".py")))
    chosen = [registered_by(name) if name.endswith(".py") else name for name in names]
    words = [f"algo={','.join(dict.fromkeys(chosen))}" if word is given[0] else word for word in line]
    if files:
        from searchqa_agents.plugins import plugins_on

        plugins = [_quoted(plugin) for plugin in dict.fromkeys([*plugins_on(words), *files])]
        words = [word for word in words if not word.startswith("plugins=")]
        words.append(f"plugins=[{','.join(plugins)}]")
    return words


def _quoted(text: str) -> str:
    """As Hydra reads it back, whatever is in it; plain where it can be."""
    if re.fullmatch(r"[\w./-]+", text):
        return text
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def registered_by(plugin: str) -> str:
    """The name of the one algorithm that a file registers."""
    from searchqa_agents.settings import register_training

    register_training()
    from searchqa_agents.algorithm import ALGORITHMS
    from searchqa_agents.plugins import load_plugins

    before, place = set(ALGORITHMS), str(Path(plugin).expanduser().resolve())
    load_plugins([plugin])
    names = sorted(set(ALGORITHMS) - before) or sorted(_loaded.get(place, ()))
    if len(names) != 1:
        raise ConfigurationError(
            f"{plugin} registers {'no algorithm' if not names else ' and '.join(names)}; algorithm=FILE.py takes a file that registers one. "
            f"For several: plugins=[{plugin}] algorithm=<name>,<name>."
        )
    _loaded[place] = names
    return names[0]


_loaded: dict[str, list[str]] = {}
"""What files have registered in this process, where they are loaded once."""


def _register(line: Sequence[str]) -> None:
    from hydra.core.config_store import ConfigStore

    from searchqa_agents.bench.sb3_job import SB3PPOConfig
    from searchqa_agents.bench.task import BenchSettings
    from searchqa_agents.plugins import register_with_plugins
    from searchqa_agents.settings import structured

    register_with_plugins(line)
    store = ConfigStore.instance()
    store.store(name="bench_types", node=BenchSettings)
    store.store(group="algo", name="sb3_ppo", node=structured(SB3PPOConfig, name="sb3_ppo"))


def outdated(config: DictConfig, path: Path) -> str | None:
    """Why the result in a folder is not that of this line, though all settings are alike: the file of the algorithm has changed."""
    from searchqa_agents.bench.job import file_sha256

    try:
        before = json.loads((path / "stamp.json").read_text(encoding="utf-8")).get("plugins", {})
    except (OSError, ValueError):
        return None
    for plugin in config.plugins:
        file = Path(plugin).expanduser()
        if file.is_file() and before.get(file.name, file_sha256(file)) != file_sha256(file):
            return f"{file.name} has changed since {path} was begun: give another run_dir, or remove the folder."
    return None


def run(config: DictConfig, path: Path) -> float:
    """One job, into the run folder ``path``; returns its score when the budget is spent."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    from rich.console import Console

    from searchqa_agents.bench.job import algorithm_of, check_task, run_job
    from searchqa_agents.bench.results import SCORE_FILE, read_run
    from searchqa_agents.bench.task import BenchSettings
    from searchqa_agents.plugins import load_plugins
    from searchqa_agents.runs import RunFolder, RunFolderError

    load_plugins(config.plugins)  # this may be another process than the one that read the line
    settings = cast(BenchSettings, OmegaConf.to_object(config))
    hydra_config = HydraConfig.get()
    label = str(hydra_config.runtime.choices["algo"])
    console = Console()
    says = [word.lstrip("+").partition("=")[0] for word in hydra_config.overrides.task]
    if settings.dry_run:
        check_config(path, config)
        check_task(settings)
        algorithm_of(settings, says)
        job = f"{label} on {settings.task.name} of {settings.suite}, seed {settings.seed}"
        console.print(f"Would train {job}: {settings.task.budget} policy tokens from {settings.task.start}.", markup=False, soft_wrap=True)
        return 0.0
    reason = outdated(config, path)
    if reason is not None:
        raise RunFolderError(reason)
    if is_finished(path, config) and (path / SCORE_FILE).is_file():
        console.print(f"{path} is finished: nothing to do.", markup=False, soft_wrap=True)
        return read_run(path).points[-1].score
    with RunFolder(path, settings.keep_last, command="bench") as folder:
        check_config(path, config)
        if not (path / "config.yaml").exists():
            write_config(folder, config)
        result = run_job(settings, folder, label, says, begun=lambda: write_config(folder, config))
    last = result.points[-1]
    console.print(
        f"{label}, {settings.task.name}, seed {settings.seed}: score {last.score:.3f} (exact match {last.em:.3f}) after {last.policy_tokens:,} policy "
        f"tokens, {last.cpu_seconds:.0f} s of the processor; {result.status}.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return last.score
