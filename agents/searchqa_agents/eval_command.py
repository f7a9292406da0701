"""``searchqa eval``: play the questions of data sets with an agent and measure it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from searchqa_agents.hydra_app import OVERRIDES_FILE, check_config, keep_config, run_app
from searchqa_agents.settings import LANGUAGE_MODELS, BaselineSettings, EvalSettings, check_at_least, register
from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from searchqa_agents.answers import Part
    from searchqa_agents.eval_plan import SetPlan
    from searchqa_agents.eval_run import EvalFolder
    from searchqa_agents.runs import RunFolder

logger = logging.getLogger(__name__)

GROWS = ("sets", "questions", "samples")
"""Settings with which a run may go on by ``resume=``: what is played already counts as far as it is asked for."""
CONFIG_FILES = ("config.yaml", OVERRIDES_FILE)
SECONDS_FOR_ANOTHER_PART = 20.0
"""How long a part waits for another one that is just beginning in the same folder."""


def main(line: Sequence[str]) -> int:
    """Run ``searchqa eval <line>``."""
    register()
    return run_app("eval", run, _with_environment(list(line)))


def _with_environment(line: list[str]) -> list[str]:
    """With ``sets=`` and no environment, that of one of the published sets takes the place of the world."""
    given = {word.lstrip("+").partition("=")[0]: word.partition("=")[2] for word in line}
    if given.get("sets", "null") not in ("", "null") and not {"env", "resume"} & set(given):
        return [*line, "env=nq"]
    return line


def run(config: DictConfig, path: Path) -> None:
    """One evaluation, or a part of one, into the run folder ``path``."""
    from omegaconf import OmegaConf
    from rich.console import Console

    settings = cast(EvalSettings, OmegaConf.to_object(config))
    console = Console()
    part = _check(settings)
    if part is not None and not _has_folder():
        raise ConfigurationError(
            f"shard={settings.shard} plays a part of a run in one folder with the others, and without run_dir= each would have a folder of its own. "
            "Give all of them the same run_dir=..."
        )
    if settings.dry_run:
        _check_folder(Path(settings.run_dir), config)
        plan = check_start(settings)
        console.print(OmegaConf.to_yaml(config, resolve=True), markup=False, highlight=False)
        console.print(f"Would {plan}, and write {settings.run_dir}.", markup=False, soft_wrap=True)
        return
    try:
        if part is None:
            evaluate_run(settings, config, path, console)
        else:
            evaluate_part(settings, part, config, path, console)
    except KeyboardInterrupt:
        from searchqa_agents.answers import way_on

        console.print(way_on(path, part), markup=False, highlight=False, soft_wrap=True)
        raise


def _has_folder() -> bool:
    """Whether the line names the run's folder."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    return hydra.mode == RunMode.MULTIRUN or any(word.startswith("run_dir=") for word in hydra.overrides.task)


def _check(settings: EvalSettings) -> Part | None:
    """What can be checked before any data is loaded. Returns the part that is to be played, None for the whole."""
    from searchqa_agents.answers import parse_part
    from searchqa_agents.eval_plan import set_environments, set_names
    from searchqa_agents.loading import check_agent
    from searchqa_agents.question_lists import check_choice, choice_of

    check_at_least(1, samples=settings.samples, num_envs=settings.num_envs, processes=settings.processes)
    check_at_least(0, save=settings.save)
    part = parse_part(settings.shard)
    if part is not None and settings.processes > 1:
        raise ConfigurationError(
            f"shard={settings.shard} is played by one process, and processes is {settings.processes}. Give one of them: processes starts the parts by itself."
        )
    names = set_names(settings.sets)
    if names is not None:
        for name in names:
            choice_of(settings.questions, name, [other for other in names if other != name])
    elif isinstance(settings.questions, str | int | None):
        check_choice(settings.questions)
    for env in set_environments(settings):
        check_agent(settings.agent, env)
    return part


def check_start(settings: EvalSettings) -> str:
    """Raise what a real start would, writing nothing. Returns what it would do, in words."""
    from searchqa_agents.answers import read_answers
    from searchqa_agents.eval_plan import missing_episodes, plan_sets, set_environments, told
    from searchqa_agents.eval_run import Players
    from searchqa_agents.loading import missing_data
    from searchqa_agents.rollout import rollout

    environments = set_environments(settings)
    downloads = [name for name in map(missing_data, environments) if name is not None]
    if downloads:
        count = "all questions" if settings.questions is None else f"questions={settings.questions}"
        ids = ", ".join(env.id for env in environments)
        return f"download {', '.join(downloads)}, play {count} of {ids} with the agent {settings.agent.kind}, {settings.samples} episode(s) each"
    plans = plan_sets(settings)
    _say_notes(plans)
    players = Players(settings)
    for plan in plans:
        venv, agent = players.make(plan.env)
        if not isinstance(settings.agent, (*LANGUAGE_MODELS, BaselineSettings)):
            rollout(venv, agent, [plan.indices[0]])
        venv.close()
    missing = missing_episodes(plans, settings.samples, read_answers(Path(settings.run_dir), whole=False).rows)
    left = sum(len(one.episodes) for one in missing)
    total = settings.samples * sum(len(plan.indices) for plan in plans)
    answered = f", of which {total - left:,} are answered already," if left < total else ""
    return f"play {told(plans, settings.samples)}{answered} with the agent {settings.agent.kind}"


def _check_folder(path: Path, config: DictConfig) -> None:
    """Refuse the folder of another run. One in which an evaluation was begun and no episode has ended may take any line."""
    from searchqa_agents.answers import FOLDER, any_answer, running_parts

    if any_answer(path) or running_parts(path) or not (path / FOLDER).is_dir():
        check_config(path, config, grows=GROWS, moves=True)


def _planned(settings: EvalSettings) -> list[SetPlan]:
    """What is to be played, once all is found that can be without an environment: questions, checkpoint and tokenizer."""
    from searchqa_agents.eval_plan import plan_sets
    from searchqa_agents.eval_run import given_tokenizer

    plans = plan_sets(settings)
    given_tokenizer(settings)
    return plans


@contextmanager
def _unplayed_lines_undone(folder: RunFolder) -> Iterator[None]:
    """After an error, bring back the configuration of a run that has answers, where none was added under the new one."""
    from searchqa_agents.answers import count_answers

    before = count_answers(folder.path)
    files = {name: (folder.path / name).read_text(encoding="utf-8") for name in CONFIG_FILES if before and (folder.path / name).is_file()}
    try:
        yield
    except BaseException:
        if files and count_answers(folder.path) == before:
            for name, text in files.items():
                folder.write_text(name, text)
        raise


def _say_notes(plans: Sequence[SetPlan]) -> None:
    for plan in plans:
        if plan.note:
            logger.warning("%s", plan.note)


def evaluate_run(settings: EvalSettings, config: DictConfig, path: Path, console: Any) -> dict[str, Any]:
    """Play what is missing, write the run's files, and print the table. Returns the summary."""
    from searchqa_agents.answers import Journal, Part, read_answers, running_parts
    from searchqa_agents.eval_plan import missing_episodes
    from searchqa_agents.eval_processes import play_in_processes
    from searchqa_agents.eval_run import EvalFolder, play, telling_what_is_kept, write_all
    from searchqa_agents.progress import progress
    from searchqa_agents.runs import RunFolderError

    with EvalFolder(path) as folder:
        running = running_parts(path)
        if running:
            raise RunFolderError(
                f"{path} is in use: other processes play its parts {', '.join(running)}. Wait for them, then start this line again: it plays what is still "
                "missing and writes the results."
            )
        _check_folder(path, config)
        plans = _planned(settings)
        _say_notes(plans)
        total = settings.samples * sum(len(plan.indices) for plan in plans)
        left = sum(len(one.episodes) for one in missing_episodes(plans, settings.samples, read_answers(path, whole=False).rows))
        with _unplayed_lines_undone(folder):
            keep_config(folder, config)
            if left < total:
                console.print(f"{total - left:,} of {total:,} episodes are answered already.", highlight=False, soft_wrap=True)
            if left:
                with telling_what_is_kept(path), progress(settings.name, left) as advance:
                    if settings.processes > 1:
                        play_in_processes(settings, path, advance)
                    else:
                        with Journal(path, Part()) as journal:
                            play(settings, journal, plans, advance)
        return write_all(settings, folder, plans, read_answers(path), console)


def evaluate_part(settings: EvalSettings, part: Part, config: DictConfig, path: Path, console: Any) -> None:
    """Play what is missing of a part. Other processes may play other parts in the same folder at the same time."""
    from searchqa_agents.answers import Journal, read_answers
    from searchqa_agents.eval_plan import missing_episodes
    from searchqa_agents.eval_run import play, telling_what_is_kept
    from searchqa_agents.progress import progress

    _check_folder(path, config)
    plans = _planned(settings)
    with _begun(path) as folder:
        _check_folder(path, config)
        journal = Journal(path, part)  # before the folder is free for others
        try:
            keep_config(folder, config)
        except BaseException:
            journal.close()
            raise
    with journal:
        _say_notes(plans)
        left = sum(len(one.episodes) for one in missing_episodes(plans, settings.samples, read_answers(path, whole=False).rows, part))
        with telling_what_is_kept(path, part), progress(f"{settings.name} {part.number}/{part.of}", left) as advance:
            play(settings, journal, plans, advance)
    others = sum(len(one.episodes) for one in missing_episodes(plans, settings.samples, read_answers(path, whole=False).rows))
    then = f"`searchqa eval resume={path}`"
    if others:
        said = f"{others:,} episodes of other parts are missing. Once they are played, {then} writes the results; before, it plays them itself."
    else:
        said = f"Nothing is missing: {then} writes the results."
    console.print(f"Part {part.number}/{part.of} is played. {said}", markup=False, highlight=False, soft_wrap=True)


def _begun(path: Path) -> EvalFolder:
    """The run's folder, once no other part is just writing its configuration there."""
    import time

    from searchqa_agents.eval_run import EvalFolder
    from searchqa_agents.runs import RunFolderError

    deadline = time.monotonic() + SECONDS_FOR_ANOTHER_PART
    while True:
        try:
            return EvalFolder(path)
        except RunFolderError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
