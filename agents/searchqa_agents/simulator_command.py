"""``searchqa simulator``: make a simulated search engine: collect searches, label documents, train on them, look at what it writes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from omegaconf import MISSING

from searchqa_agents.hydra_app import check_config, run_app, write_config
from searchqa_agents.runs import OWN_TO_A_RUN, RunFolder, RunFolderError, replace_file, run_stamp, stamp_differences
from searchqa_agents.settings import (
    LANGUAGE_MODELS,
    AgentSettings,
    EnvSettings,
    LMAgentSettings,
    ModelSettings,
    RunSettings,
    check_at_least,
    register,
)
from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from searchqa_agents.simulator.rows import Label, SearchRow

logger = logging.getLogger(__name__)

PLAYED_FILE = "played.json"
VERDICTS_FILE = "verdicts.jsonl"
RECORD_FILE = "simulator.json"
"""Beside a simulator's weights: what it was trained on, and how."""
AGAIN_TEMPERATURE = 0.7
"""Least temperature of a judge that is asked again: at 0 it would say the same."""
SHIPPED = "shipped"

HELP = """usage: searchqa simulator STEP [key=value ...]

ZeroSearch's simulated search engine, made in four steps. Each has a run folder of its own with what the next one reads.

  collect    play episodes with a real search engine; rows.jsonl has each search with its documents
  label      label each document useful or noisy: by=outcome, by=titles, or by=judge, a language model behind an endpoint
  train      tune a language model to write useful or noisy documents for a query; model/ is for retriever={name: simulated, checkpoint: .../model}
  evaluate   what it writes: whether the answer is in it, whether it is about the query, how useful and noisy documents differ

Examples, the simulator of the generated world that comes with the package:
  searchqa simulator collect env.top_k=3 run_dir=runs/collected
  searchqa simulator label rows=runs/collected by=titles run_dir=runs/labelled
  searchqa simulator train rows=runs/labelled run_dir=runs/simulator
  searchqa simulator collect env.split=test env.top_k=3 questions=400 run_dir=runs/held-out
  searchqa simulator label rows=runs/held-out by=titles run_dir=runs/held-out-labelled
  searchqa simulator evaluate rows=runs/held-out-labelled simulator.checkpoint=runs/simulator/model
  searchqa train recipe=zerosearch env.retriever.checkpoint=runs/simulator/model

`searchqa simulator STEP --help` tells more. What was stopped or killed goes on with the same line and the same run_dir."""


@dataclass
class CollectSettings(RunSettings):
    """``searchqa simulator collect``."""

    env: EnvSettings = MISSING
    agent: AgentSettings = MISSING
    questions: int | None = MISSING
    num_worlds: int | None = MISSING
    samples: int = MISSING
    metric: str = MISSING
    right_at: float = MISSING
    num_envs: int = MISSING
    per_round: int = MISSING
    max_lost_rollouts: int = MISSING


@dataclass
class JudgeSettings:
    """An endpoint that is asked for verdicts."""

    url: Any = None
    model: str = MISSING
    temperature: float = MISSING
    tries: int = MISSING
    max_tokens: int = MISSING
    timeout: float = MISSING
    deadline: float = MISSING
    retries: int = MISSING
    concurrency: int = MISSING
    batch_size: int = MISSING


@dataclass
class LabelSettings(RunSettings):
    """``searchqa simulator label``."""

    rows: str = MISSING
    by: str = MISSING
    judge: JudgeSettings = field(default_factory=JudgeSettings)


@dataclass
class SimulatorTrainSettings(RunSettings):
    """``searchqa simulator train``. ``warmup`` and ``sft`` are a ``WarmupConfig`` and an ``SFTConfig``."""

    rows: str = MISSING
    start: str = MISSING
    prompt: str = MISSING
    documents: int = MISSING
    titles: bool = MISSING
    notes: bool = MISSING
    system: str | None = MISSING
    max_tokens: int = MISSING
    model: ModelSettings = field(default_factory=ModelSettings)
    warmup: Any = MISSING
    sft: Any = MISSING
    keep_last: int = MISSING


@dataclass
class SimulatorEvaluateSettings(RunSettings):
    """``searchqa simulator evaluate``."""

    rows: str = MISSING
    simulator: Any = MISSING
    searches: int | None = MISSING
    top_k: int = MISSING
    per_round: int = MISSING
    examples: int = MISSING


class Step(NamedTuple):
    """One of the four: its settings, what it does, and whether its configuration has the environment's or the trainer's types."""

    settings: type
    run: Callable[[Any, DictConfig, Path, Console], None]
    would: str
    training: bool = False


def main(line: Sequence[str]) -> int:
    """Run ``searchqa simulator <line>``."""
    if not line or line[0] in ("-h", "--help"):
        sys.stdout.write(HELP + "\n")
        return 0
    name = line[0]
    if name not in STEPS:
        from searchqa_agents.cli import UsageError

        raise UsageError(f"searchqa simulator has the steps {', '.join(STEPS)}; got {name!r}. See `searchqa simulator --help`.")
    if any(word in ("-h", "--help") for word in line[1:]):
        sys.stdout.write(help_text(name) + "\n")
        return 0
    from hydra.core.config_store import ConfigStore

    register()
    ConfigStore.instance().store(name=f"simulator_{name}_types", node=STEPS[name].settings)
    if STEPS[name].training:
        _register_training()
    return run_app(f"simulator_{name}", _Task(name), line[1:])


def _register_training() -> None:
    from hydra.core.config_store import ConfigStore

    from searchqa_agents.settings import structured
    from searchqa_agents.sft import SFTConfig
    from searchqa_agents.warmup import WarmupConfig

    store = ConfigStore.instance()
    store.store(group="warmup", name="types", node=structured(WarmupConfig))
    store.store(group="sft", name="types", node=structured(SFTConfig))


def help_text(name: str) -> str:
    """What ``searchqa simulator <name> --help`` shows: the configuration files, whose comments say what each key is; loads nothing heavy."""
    from searchqa_agents.config_help import conf_dir, groups_text

    texts = [HELP]
    if name == "collect":
        texts.append(groups_text("eval"))
    texts.append((conf_dir() / f"simulator_{name}.yaml").read_text(encoding="utf-8").partition("\nhydra:")[0].strip())
    texts.append((conf_dir() / "run.yaml").read_text(encoding="utf-8").partition("\nhydra:")[0].strip())
    return "\n\n".join(texts)


class _Task:
    """A step as a Hydra task; a class, so that launchers can send it to other processes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, config: DictConfig, path: Path) -> None:
        from omegaconf import OmegaConf
        from rich.console import Console

        step = STEPS[self.name]
        settings = OmegaConf.to_object(config)
        console = Console()
        if cast(RunSettings, settings).dry_run:
            check_config(Path(cast(RunSettings, settings).run_dir), config)
            console.print(OmegaConf.to_yaml(config, resolve=True), markup=False, highlight=False)
            run_dir = cast(RunSettings, settings).run_dir
            console.print(f"Would {step.would}, and write {run_dir}.", markup=False, soft_wrap=True)
            return
        step.run(settings, config, path, console)


def shipped_simulator() -> Path:
    """The simulator of the generated world that comes with the package."""
    path = Path(str(files("searchqa_agents"))) / "checkpoints" / "world-simulator"
    if not path.is_dir():
        raise ConfigurationError(f"This installation has no shipped simulator ({path} is missing); make one: searchqa simulator --help.")
    return path


# -- collect -----------------------------------------------------------------------------------------------------------------------------


def collect(settings: CollectSettings, config: DictConfig, path: Path, console: Console) -> None:
    """Play what is not played yet, a round at a time; ``played.json`` says how far the rows are whole."""
    from searchqa_agents.loading import build_agent, check_script, checkpoint_tokenizer, make_venv
    from searchqa_agents.lost_back_end import LostRollouts, is_lost
    from searchqa_agents.progress import progress
    from searchqa_agents.rollout import draw_questions, episode_seed
    from searchqa_agents.simulator.collect import collect_searches
    from searchqa_agents.simulator.rows import ROWS_FILE, row_lines

    check_at_least(1, questions=settings.questions, samples=settings.samples, num_envs=settings.num_envs, per_round=settings.per_round)
    check_at_least(1, num_worlds=settings.num_worlds, max_lost_rollouts=settings.max_lost_rollouts)
    temperature = 0.0
    tokenizer = settings.env.tokenizer
    if isinstance(settings.agent, LANGUAGE_MODELS):
        temperature = settings.agent.temperature
        if tokenizer is None and isinstance(settings.agent, LMAgentSettings):
            tokenizer = checkpoint_tokenizer(settings.agent.checkpoint)
    else:
        check_script("agent.kind", settings.agent.kind, settings.env)
    with RunFolder(path, command="simulator collect") as folder, folder.telling_way_on():
        venv = make_venv(settings.env, settings.num_envs, tokenizer=tokenizer)
        source = venv.unwrapped.source
        stamp = run_stamp(venv.unwrapped.stamp(), seed=settings.seed, threads=settings.threads) | {"agent": vars(settings.agent)}
        plan = {name: getattr(settings, name) for name in ("questions", "num_worlds", "samples", "metric", "right_at", "per_round")}
        stamp = json.loads(json.dumps(stamp | {"collected": plan}, default=str))
        played = _played(folder, stamp)
        write_config(folder, config)
        folder.write_json("stamp.json", stamp)
        total = len(source) if settings.questions is None else min(settings.questions, len(source))
        chosen = draw_questions(source, total, seed=settings.seed, num_worlds=settings.num_worlds)
        agent = build_agent(settings.agent, venv, settings.device, settings.dtype)
        lasting = {key: value for key, value in stamp.items() if key not in OWN_TO_A_RUN}
        digest = hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()[:12]
        lost = LostRollouts(settings.max_lost_rollouts, settings.max_lost_rollouts)
        with progress(settings.name, total) as advance, (path / ROWS_FILE).open("ab") as file:
            while played.questions < total:
                part = chosen[played.questions : played.questions + settings.per_round]
                rows, trajectories = collect_searches(
                    venv,
                    agent,
                    part,
                    samples=settings.samples,
                    seed=episode_seed(settings.seed, played.questions),
                    temperature=temperature,
                    metric=settings.metric,
                    right_at=settings.right_at,
                    stamp=digest,
                )
                lost.add(trajectories)
                lost.check()
                if is_lost(trajectories):
                    continue  # the same questions again
                file.write(row_lines(rows).encode())
                file.flush()
                os.fsync(file.fileno())
                played = Played(
                    played.questions + len(part), file.tell(), played.rows + len(rows), played.right + sum(row.right for row in rows)
                )
                folder.write_json(PLAYED_FILE, played._asdict())
                advance(played.questions, f"{played.rows} searches")
        folder.log_searches("collect", 0, venv.unwrapped.search_counters().sums)
        venv.close()
    share = played.right / played.rows if played.rows else 0.0
    _say(console, f"{played.rows} searches of {total} questions, {share:.1%} of them in episodes that were right: {path / ROWS_FILE}")
    _say(console, f"Next: searchqa simulator label rows={path} by=outcome (or titles, or judge)")


class Played(NamedTuple):
    """How far a collection is: questions played, bytes of whole rows, rows, and rows of right episodes."""

    questions: int = 0
    bytes: int = 0
    rows: int = 0
    right: int = 0


def _played(folder: RunFolder, stamp: Mapping[str, Any]) -> Played:
    """Where the folder's collection stands; rows of an unfinished round are cut off."""
    from searchqa_agents.simulator.rows import ROWS_FILE

    note, rows = folder.path / PLAYED_FILE, folder.path / ROWS_FILE
    if not note.is_file():
        rows.unlink(missing_ok=True)
        return Played()
    before = json.loads((folder.path / "stamp.json").read_text(encoding="utf-8"))
    different = stamp_differences(before, stamp)
    if different:
        told = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in different)
        raise RunFolderError(
            f"{folder.path} holds searches that were collected otherwise: {told}. Choose another run_dir, or remove the folder."
        )
    played = Played(**json.loads(note.read_text(encoding="utf-8")))
    with rows.open("rb+") as file:
        file.truncate(played.bytes)
    logger.warning("Going on after %d questions.", played.questions)
    return played


# -- label -------------------------------------------------------------------------------------------------------------------------------


def label(settings: LabelSettings, config: DictConfig, path: Path, console: Console) -> None:
    """Label all rows of a collection."""
    from searchqa_agents.simulator.labels import RULES, label_by_outcome, label_by_titles, label_counts
    from searchqa_agents.simulator.rows import ROWS_FILE, iterate_rows, row_lines

    if settings.by not in RULES:
        raise ConfigurationError(f"by must be one of {', '.join(RULES)}; got {settings.by!r}.")
    if settings.by == "judge" and not settings.judge.url:
        raise ConfigurationError("by=judge needs an endpoint: judge.url=http://127.0.0.1:6001/v1")
    rows = list(iterate_rows(settings.rows))
    with RunFolder(path, command="simulator label") as folder, folder.telling_way_on():
        write_config(folder, config)
        if settings.by == "judge":
            labelled = _judged(settings, rows, folder)
        else:
            rule = label_by_outcome if settings.by == "outcome" else label_by_titles
            labelled = [rule(row) for row in rows]
        folder.write_text(ROWS_FILE, row_lines(labelled))
        counts = label_counts(labelled)
        folder.write_json("labels.json", {"by": settings.by, "rows": len(labelled), **counts})
    _say(console, f"{len(labelled)} searches; documents: {', '.join(f'{count} {name}' for name, count in counts.items())}.")
    _say(console, f"Next: searchqa simulator train rows={path}")


def _judged(settings: LabelSettings, rows: Sequence[SearchRow], folder: RunFolder) -> list[SearchRow]:
    from searchqa_agents.progress import progress
    from searchqa_agents.simulator.labels import Judge, verdict_lines
    from searchqa_retrievers.simulated_endpoint import TextEndpoint

    judge = settings.judge
    urls = [judge.url] if isinstance(judge.url, str) else list(judge.url)
    writer, again = (
        TextEndpoint(
            urls,
            judge.model,
            temperature=temperature,
            timeout=judge.timeout,
            deadline=judge.deadline,
            retries=judge.retries,
            concurrency=judge.concurrency,
        )
        for temperature in (judge.temperature, max(judge.temperature, AGAIN_TEMPERATURE))
    )
    file = folder.path / VERDICTS_FILE
    known = _verdicts(file)
    if known:
        logger.warning("Going on after %d verdicts.", len(known))
    done = len(known)
    documents = sum(len(row.documents) for row in rows)
    try:
        with progress(settings.name, documents) as advance, file.open("a", encoding="utf-8") as opened:

            def on_verdicts(verdicts: Mapping[str, Label | None]) -> None:
                nonlocal done
                opened.write(verdict_lines(verdicts))
                opened.flush()
                os.fsync(opened.fileno())
                done += len(verdicts)
                advance(done, f"{sum(verdict == 'useful' for verdict in verdicts.values())} of {len(verdicts)} useful")

            asker = Judge(
                writer,
                tries=judge.tries,
                again=again,
                judge={"url": sorted(urls), "model": judge.model},
                known=known,
                on_verdicts=on_verdicts,
                batch_size=judge.batch_size,
                max_tokens=judge.max_tokens,
            )
            return asker.label(rows)
    finally:
        writer.close()
        again.close()


def _verdicts(file: Path) -> dict[str, Label | None]:
    """The verdicts that a stopped labelling left; its unfinished last line is cut off. Those that were given up are asked for again."""
    if not file.is_file():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        replace_file(file, lambda partial: partial.write_bytes(whole))
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise RunFolderError(f"{file} has a line that is not JSON ({error}). Remove the file to begin again.") from error
    return {line["key"]: line["verdict"] for line in lines if line["verdict"] is not None}


# -- train -------------------------------------------------------------------------------------------------------------------------------


def train(settings: SimulatorTrainSettings, config: DictConfig, path: Path, console: Console) -> None:
    """Tune a model on labelled rows; ``model/`` holds what the retriever loads."""
    from searchqa_agents.loading import checkpoint_path, checkpoint_tokenizer, chosen_device, chosen_dtype
    from searchqa_agents.models import make_tiny_model
    from searchqa_agents.policy import Policy
    from searchqa_agents.settings import built
    from searchqa_agents.sft import SFTConfig
    from searchqa_agents.simulator.examples import encoded_examples, make_examples
    from searchqa_agents.simulator.rows import labelled_rows, rows_sha256
    from searchqa_agents.simulator.training import train_simulator
    from searchqa_agents.warmup import WarmupConfig
    from searchqa_envs.tokenizers import build_tokenizer
    from searchqa_retrievers.simulation_prompts import simulation_prompt
    from searchqa_retrievers.text_model_tokenizers import load_text_tokenizer

    sft, warmup = built(SFTConfig, settings.sft), built(WarmupConfig, settings.warmup)
    check_at_least(1, keep_last=settings.keep_last, documents=settings.documents, max_tokens=settings.max_tokens)
    prompt = simulation_prompt(settings.prompt)
    rows = labelled_rows(settings.rows)
    examples = make_examples(rows, prompt, documents=settings.documents, titles=settings.titles, notes=settings.notes)
    new = settings.start == "nothing"
    tokenizer = build_tokenizer("world" if new else checkpoint_tokenizer(settings.start))
    asked: Any = tokenizer if new else load_text_tokenizer(str(checkpoint_path(settings.start)), settings.system)
    sequences, too_long = encoded_examples(examples, asked, tokenizer, max_tokens=settings.max_tokens)
    device, dtype = chosen_device(settings.device), chosen_dtype(settings.dtype)
    with RunFolder(path, settings.keep_last, "simulator train") as folder:
        check_config(path, config)
        _check_rows(path, settings.rows)
        write_config(folder, config)
        qualities = {quality: sum(example.quality == quality for example in examples) for quality in ("useful", "noisy")}
        record: dict[str, Any] = {"prompt": prompt.name, "prompt_sha256": prompt.sha256, "rows_sha256": rows_sha256(settings.rows)}
        record |= {"searches": len(rows), **qualities, "too_long": too_long}
        folder.write_json("stamp.json", run_stamp(record, seed=settings.seed, threads=settings.threads))
        _say(console, f"{qualities['useful']} useful and {qualities['noisy']} noisy examples; {too_long} too long and left out.")
        if new:
            ids = {"pad_id": tokenizer.pad_id, "eos_id": tokenizer.eos_id}
            shape: dict[str, Any] = vars(settings.model)
            model = make_tiny_model(tokenizer.vocab_size, settings.seed, **ids, dtype=dtype, device=device, **shape)
            policy = Policy(model, tokenizer)
        else:
            policy = Policy.load(checkpoint_path(settings.start), tokenizer, dtype=dtype, device=device)
        train_simulator(folder, policy, sequences, sft, warmup if new else None)
        policy.save(path / "model")
        used = {
            name: getattr(settings, name) for name in ("start", "documents", "titles", "notes", "system", "max_tokens", "dtype", "seed")
        }
        used |= {"sft": asdict(sft)} | ({"model": vars(settings.model), "warmup": asdict(warmup)} if new else {})
        used["start"] = used["start"] if "/" not in settings.start or not Path(settings.start).is_dir() else Path(settings.start).name
        (path / "model" / RECORD_FILE).write_text(json.dumps({**record, "settings": used}, indent=2) + "\n", encoding="utf-8")
    shown = settings.prompt if len(settings.prompt) < 20 else "..."
    _say(console, f"Simulator: {path / 'model'}")
    _say(console, f"Next: searchqa train env.retriever='{{name: simulated, checkpoint: {path / 'model'}, prompt: {shown}}}' ...")


def _check_rows(path: Path, rows: str) -> None:
    """Refuse to go on in a folder that was begun on other rows, of whatever name. Nothing that was trained, nothing to mix."""
    from searchqa_agents.runs import list_checkpoints
    from searchqa_agents.simulator.rows import rows_sha256

    stamp = path / "stamp.json"
    if not stamp.is_file() or not list_checkpoints(path):
        return
    before = json.loads(stamp.read_text(encoding="utf-8")).get("rows_sha256")
    if before not in (None, rows_sha256(rows)):
        raise RunFolderError(f"{path} was trained on other rows than {rows} has now; choose another run_dir, or remove the folder.")


# -- evaluate ----------------------------------------------------------------------------------------------------------------------------


def evaluate(settings: SimulatorEvaluateSettings, config: DictConfig, path: Path, console: Console) -> None:
    """Have documents written for the searches of labelled rows, in both qualities, and measure them beside the real ones."""
    from searchqa_agents.progress import progress
    from searchqa_agents.simulator.measures import MEASURES, Written, measure_documents, other_names, page_form
    from searchqa_agents.simulator.rows import LABELS, labelled_rows
    from searchqa_agents.table import number, show

    check_at_least(1, top_k=settings.top_k, searches=settings.searches, per_round=settings.per_round)
    check_at_least(0, examples=settings.examples)
    all_rows = labelled_rows(settings.rows)
    rows = all_rows[: settings.searches]
    retrievers = {"useful": _simulator(settings, 0.0), "noisy": _simulator(settings, 1.0)}
    with RunFolder(path, command="simulator evaluate") as folder:
        write_config(folder, config)
        written: list[Written] = []
        others = other_names(all_rows, settings.seed)
        asked = [(row, row.query, False) for row in rows]
        asked += [(row, others[row.id].title, True) for row in rows if row.id in others]
        with progress(settings.name, 2 * len(asked)) as advance:
            for quality in LABELS:
                for start in range(0, len(asked), settings.per_round):
                    part = asked[start : start + settings.per_round]
                    found = retrievers[quality].search([_request(row, query, settings.top_k, settings.seed) for row, query, _ in part])
                    written += [
                        Written(row, quality, [hit.passage for hit in hits], other)
                        for (row, _, other), hits in zip(part, found, strict=True)
                    ]
                    advance(len(written), quality)
        forms = frozenset(page_form(document.text) for row in all_rows for document in row.documents)
        real = [Written(row, quality, row.labelled(quality)[: settings.top_k]) for row in rows for quality in LABELS]
        real += [Written(row, "useful", [others[row.id]], True) for row in rows if row.id in others]
        measured = {
            "simulated": measure_documents(written, settings.top_k, forms),
            "real": measure_documents([one for one in real if one.documents], None, forms),
        }
        stamp = run_stamp({"simulator": retrievers["useful"].stamp()}, seed=settings.seed, threads=settings.threads)
        columns = [f"{len(rows)} searches", *(f"{prefix}{quality}" for prefix in ("", "real ") for quality in LABELS)]
        table = [
            [title, *(number(measured[who].get(quality, {}).get(name)) for who in measured for quality in LABELS)]
            for name, title in MEASURES.items()
        ]
        shown = [
            {"query": one.row.query, "question": one.row.question, "answer": one.row.golden_answer, "quality": one.quality}
            | {"documents": [document.text for document in one.documents]}
            for place in range(settings.examples)
            for one in [one for one in written if not one.other][place :: len(rows)]
        ]
        folder.write_json("stamp.json", stamp)
        folder.write_json("summary.json", {"searches": len(rows), "measures": measured, "examples": shown})
        for retriever in retrievers.values():
            retriever.close()
    for one in shown:
        _say(console, f"{one['question']} ({one['answer']}) query {one['query']!r}, {one['quality']}: {' / '.join(one['documents'])}")
    show(console, settings.name, columns, table)
    _say(console, f"Summary: {path / 'summary.json'}")


def _simulator(settings: SimulatorEvaluateSettings, noise: float) -> Any:
    """The retriever, whose documents are always useful or always noisy."""
    from omegaconf import OmegaConf

    import searchqa_envs  # noqa: F401, brings the tokenizers of our own checkpoints
    from searchqa_retrievers import Corpus, build_retriever

    given: Any = settings.simulator
    if OmegaConf.is_config(given):
        given = OmegaConf.to_container(given)
    options: dict[str, Any] = {str(key): value for key, value in given.items()}
    if "noise" in options or options.get("name", "simulated") != "simulated":
        raise ConfigurationError("simulator takes the options of the retriever `simulated` without noise, which is 0 and 1 here.")
    options = {key: value for key, value in options.items() if value is not None}
    if "url" in options:
        options.pop("checkpoint", None)
    elif options.get("checkpoint") == SHIPPED:
        options["checkpoint"] = str(shipped_simulator())
    config = {**options, "name": "simulated", "noise": {"start": noise, "end": noise}}
    return build_retriever(config, lambda: Corpus.from_passages([]), cache_entries=0)


def _request(row: SearchRow, query: str, top_k: int, seed: int) -> Any:
    from searchqa_retrievers import SearchRequest

    return SearchRequest(
        query,
        top_k,
        question_id=row.question_id,
        question=row.question,
        turn=row.turn,
        seed=seed,
        golden_answers=row.golden_answers,
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


STEPS = {
    "collect": Step(CollectSettings, collect, "play episodes with a real search engine"),
    "label": Step(LabelSettings, label, "label documents"),
    "train": Step(SimulatorTrainSettings, train, "tune a simulator", training=True),
    "evaluate": Step(SimulatorEvaluateSettings, evaluate, "have documents written and measure them"),
}
