"""What a training run would do, need and cost, found without a weight: the plan that ``searchqa train ... dry_run=true`` prints.

Weights are on the meta device, so that a model of any size takes seconds. What a real start would refuse is an error here too. What only this
machine lacks (memory, a server, a download) is a warning, since one plans here for another machine.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from searchqa_agents.loading import RANDOM, checkpoint_path, chosen_dtype, make_venv, missing_data, published_set
from searchqa_agents.plan_machine import Machine, planned_machine
from searchqa_agents.plan_memory import (
    Memory,
    Shape,
    Work,
    advice,
    cache_bytes_per_token,
    disk,
    flops,
    host_copies,
    human,
    measure_shape,
    memory,
)
from searchqa_agents.settings import EnvSettings, TrainSettings
from searchqa_envs.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedConfig

    from searchqa_agents.stages import Stage
    from searchqa_envs.rules import Rules

MEASURED_QUESTIONS = 200
"""Prompts that are measured for the longest, spread over all questions."""
STAND_IN = "In which year was the director of the film that won the prize for the best picture of the year before born?"
"""A question for prompts where the data is not at hand."""
BYTES_PER_TOKEN = 4
"""Of English text, where the model's tokenizer is not at hand."""
COLLECTION_ROWS = {"nq_hotpotqa_train": {"train": 169_615, "test": 51_713}}
"""Published numbers of questions of merged sets (Search-R1's)."""
PROBE_SECONDS = 1.0
"""How long a server is waited for."""


@dataclass
class Plan:
    """Sections of (what, value) rows, the memory of each phase by part, and what is wrong with them."""

    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    memories: dict[str, Memory] = field(default_factory=dict)
    """by stage; one without a name where there are no stages"""
    limit: float = 0.0
    """bytes for one process"""
    missing: str | None = None
    """what would be downloaded first"""
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """what a real start would stop at"""

    def add(self, section: str, what: str, value: str) -> None:
        """One more row."""
        self.sections.setdefault(section, []).append((what, value))


def make_plan(settings: TrainSettings) -> Plan:
    """The plan of a run. Raises what a real start would raise before its first step, as far as that can be known; writes nothing.

    ``settings`` are prepared as by a real start (tokenizer and held-out split are filled in).
    """
    from searchqa_agents.stages import stages_of
    from searchqa_agents.training_run import lora_arguments, prepare

    prepare(settings)
    plan = Plan()
    stages = stages_of(settings)
    tokenizer, measured = tokenizer_at_hand(settings.env.tokenizer)
    rules: list[Rules] = []
    try:
        plan.missing = missing_data(settings.env)
        rules = checked_rules(settings, tokenizer)
    except DataError as error:  # what is wrong with it is said behind the rest of the plan
        plan.errors.append(str(error))
    _data(plan, settings, stages, rules[0] if rules else None)
    config = model_config(settings, rules[0].tokenizer if rules and measured else None)
    lora = lora_arguments(settings)
    shape = measure_shape(config, lora)
    _model(plan, settings, shape, config)
    machine = planned_machine(plan, settings)
    budgets = []
    for number, stage in enumerate(stages):
        own = rules[number] if rules else None
        budgets.append(_context(plan, stage, settings, own, measured, shape))
    _memory(plan, settings, stages, budgets, shape, machine, (config, lora))
    _work(plan, settings, stages, budgets, shape, machine)
    _written(plan, settings, stages, shape, machine)
    return plan


# -- data and searches ---------------------------------------------------------------------------------------------------------------------


def tokenizer_at_hand(name: str | None) -> tuple[Any, bool]:
    """What to make environments with, and whether that is the run's own tokenizer: one that would have to be downloaded is stood in for by bytes."""
    if name is None or name in ("byte", "world") or Path(name).expanduser().exists():
        return name, True
    from huggingface_hub import try_to_load_from_cache

    return (name, True) if isinstance(try_to_load_from_cache(name, "tokenizer.json"), str) else ("byte", False)


def checked_rules(settings: TrainSettings, tokenizer: Any) -> list[Rules]:
    """The rules of each stage's environment, checked as a real start does; empty where the data is not here.

    No index is built and no simulator loaded: over real passages the retrievers' configurations are checked, and nothing is searched with.
    """
    from searchqa_agents.stages import stages_of
    from searchqa_agents.training_run import check_phases

    for retriever in _retrievers(settings):
        _check_retriever(retriever)
    if missing_data(settings.env) is not None:
        return []
    planned = copy.deepcopy(settings)
    planned.env.tokenizer = tokenizer
    if tokenizer != settings.env.tokenizer:  # budgets follow from the kind of tokenizer
        _token_budgets(planned.env)
    if _without_searches(settings):
        planned.env = _searchless(planned.env)
        planned.evaluation.env = _without(planned.evaluation.env)
        if planned.stages is not None:
            planned.stages = [{**row, "env": _without(row.get("env"))} for row in planned.stages]
    venv = make_venv(planned.env, 1)
    check_phases(planned, venv)
    found: list[Rules] = []
    for stage in stages_of(planned):
        stage_venv = make_venv(stage.env, 1) if stage.changed else venv
        found.append(stage_venv.unwrapped.rules)
    return found


def _token_budgets(env: EnvSettings) -> None:
    from searchqa_envs.configuration import TOKEN_BUDGETS

    segment, observation, context = TOKEN_BUDGETS.get(env.dialect or "search-r1", TOKEN_BUDGETS["search-r1"])
    env.max_segment_tokens = env.max_segment_tokens or segment
    env.max_observation_tokens = env.max_observation_tokens or observation
    env.max_context_tokens = env.max_context_tokens or context


def _without_searches(settings: TrainSettings) -> bool:
    """Whether the retriever cannot be made in a moment: over real passages, or by loading a model."""
    if settings.env.id != "SearchQA-World-v0":
        return True
    return any(not isinstance(retriever, str) for retriever in _retrievers(settings))


def _searchless(env: EnvSettings) -> EnvSettings:
    env.retriever, env.search_controls = "none", None
    return env


def _without(changed: Any) -> Any:
    return {key: value for key, value in (changed or {}).items() if key not in ("retriever", "search_controls")}


def _retrievers(settings: TrainSettings) -> list[Any]:
    """What is searched with, in training, in its stages, and when it is measured; the same one once."""
    rows: list[Any] = [settings.env.retriever, (settings.evaluation.env or {}).get("retriever")]
    rows += [(row.get("env") or {}).get("retriever") for row in settings.stages or []]
    found: list[Any] = []
    for row in rows:
        if row is not None and row not in found:
            found.append(row)
    return found


def _check_retriever(retriever: Any) -> None:
    from searchqa_agents.index_needs import check_config

    if isinstance(retriever, str):
        retriever = {"name": retriever}
    if isinstance(retriever, Mapping):
        check_config(retriever)
        _check_simulators(retriever)


def _check_simulators(retriever: Mapping[str, Any]) -> None:
    """Raise what a simulator in the configuration, however deep, would raise before its model is loaded."""
    from searchqa_retrievers import simulated
    from searchqa_retrievers.build import COMMON_OPTIONS, split_options
    from searchqa_retrievers.curriculum import Curriculum
    from searchqa_retrievers.options import check_options
    from searchqa_retrievers.simulation_prompts import simulation_prompt

    inner = [retriever.get("retriever"), *(retriever.get("retrievers") or ()), *(retriever.get("sources") or {}).values()]
    for one in inner:
        if isinstance(one, Mapping):
            _check_simulators(one)
    if retriever.get("name") != "simulated":
        return
    options, _ = split_options(retriever)
    del options["name"]
    check_options("simulated", simulated.make, options, COMMON_OPTIONS)
    Curriculum.of(options.get("noise"))
    simulation_prompt(options.get("prompt", "sft"))
    url, checkpoint = options.get("url"), options.get("checkpoint")
    if (url is None) == (checkpoint is None):
        raise ConfigurationError(
            "A simulator is either behind an endpoint, url, or a model of transformers, checkpoint: give one of the two."
        )
    if checkpoint == "shipped":
        raise ConfigurationError(
            "A simulator's checkpoint is a folder or a hub name; ${shipped_simulator:} is the one that comes with the package."
        )
    if checkpoint is not None:
        checkpoint_path(str(checkpoint))


def addresses(retriever: Any) -> Iterator[str]:
    """The addresses of the servers that a retriever's configuration names, however deep."""
    if isinstance(retriever, Mapping):
        for key, value in retriever.items():
            if key in ("url", "urls"):
                given = [value] if isinstance(value, str) else value or []
                yield from (url for url in given if isinstance(url, str))
            else:
                yield from addresses(value)
    elif isinstance(retriever, Sequence) and not isinstance(retriever, str):
        for value in retriever:
            yield from addresses(value)


def reachable(url: str) -> bool:
    """Whether anything answers over HTTP there within :data:`PROBE_SECONDS`; what it answers does not matter."""
    import httpx2

    address = httpx2.URL(url if "://" in url else f"http://{url}")
    try:
        with httpx2.Client(timeout=PROBE_SECONDS, trust_env=False) as client:
            client.get(address.copy_with(path="/health", query=None))
    except httpx2.HTTPError:
        return False
    return True


def _data(plan: Plan, settings: TrainSettings, stages: Sequence[Stage], rules: Rules | None) -> None:
    from searchqa_envs.datasets import DATASETS

    env = settings.env
    dataset = published_set(env)
    name = dataset or plan.missing or getattr(env, "questions", None) or env.id
    if rules is not None:
        plan.add("Data", str(name), f"{len(rules.source):,} questions of split {rules.source.stamp().get('split', env.split or 'train')}")
    elif plan.missing is None:
        plan.add("Data", str(name), "cannot be read, see below")
    else:
        rows: Mapping[str, int] = DATASETS[dataset].sizes if dataset else COLLECTION_ROWS.get(str(plan.missing), {})
        sizes = ", ".join(f"{split} {count:,}" for split, count in rows.items()) or "of a number that is not known here"
        plan.add("Data", str(name), f"not on this machine: a real start downloads it; questions: {sizes}")
        plan.warnings.append(
            f"{plan.missing} is not on this machine; `searchqa data download {plan.missing}` fetches it before a run waits for it."
        )
    for stage in stages:
        if stage.ids:
            plan.add("Data", f"{stage.questions}{f' (stage {stage.name})' if stage.name else ''}", f"{len(stage.ids):,} of them, in epochs")
    plan.add("Data", "measured on", f"split {settings.evaluation.split}")
    asked = _retrievers(settings) or ["bm25"]
    for retriever in asked:
        described = (
            retriever if isinstance(retriever, str) else retriever.get("name") if isinstance(retriever, Mapping) else repr(retriever)
        )
        urls = list(dict.fromkeys(addresses(retriever)))
        answers = {url: reachable(url) for url in urls}
        said = ", ".join(f"{url} {'answers' if there else 'does not answer'}" for url, there in answers.items())
        if not urls:
            own = dataset is not None or env.id == "SearchQA-Custom-v0"
            local = described in ("bm25", "dense", "hybrid", "rerank", "milvus", "filtered")
            said = (
                "in this process; `searchqa index` with the same words tells and builds its index" if own and local else "in this process"
            )
        plan.add("Data", f"searched with {described}", said)
        for url, there in answers.items():
            if not there:
                plan.warnings.append(f"No server answers at {url} (waited {PROBE_SECONDS:g} s). It has to before training begins.")


# -- model ---------------------------------------------------------------------------------------------------------------------------------


def model_config(settings: TrainSettings, tokenizer: Any = None) -> PreTrainedConfig:
    """The configuration of the model that training begins with, and no weights.

    A folder's own; of a name on the hub the shape that is known here, else what the hub, or its cache, has. ``tokenizer``: where given, what a
    real start checks of both is checked.
    """
    import torch
    from transformers import AutoConfig

    from searchqa_agents.model_shapes import shape_config, shape_name
    from searchqa_agents.models import make_tiny_model
    from searchqa_agents.tokenizer_files import check_record

    start = settings.start
    if start == "nothing":
        vocab_size = tokenizer.vocab_size if tokenizer is not None else 512
        with torch.device("meta"):
            tiny = make_tiny_model(vocab_size, settings.seed, pad_id=0, eos_id=0, device="meta", **vars(settings.model))
        return tiny.config
    if start == RANDOM:
        cut = settings.random
        config = shape_config(cut.like, num_hidden_layers=cut.num_hidden_layers, vocab_size=cut.vocab_size)
    elif isinstance(path := checkpoint_path(start), Path):
        if tokenizer is not None:
            check_record(path, tokenizer)
        config = AutoConfig.from_pretrained(path)
    elif (known := shape_name(path)) is not None:
        config = shape_config(known)
    else:
        try:
            config = AutoConfig.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"The model {path!r} has no shape that is known here, and its configuration was not found on the hub or in its cache: {error}"
            ) from error
    if tokenizer is not None and config.vocab_size < tokenizer.vocab_size:
        raise ConfigurationError(
            f"The model must know every id of the tokenizer; it has {config.vocab_size} ids, tokenizer {tokenizer.name!r} has "
            f"{tokenizer.vocab_size}. Choose the model's own tokenizer, or with start=random a larger random.vocab_size."
        )
    return config


def _model(plan: Plan, settings: TrainSettings, shape: Shape, config: PreTrainedConfig) -> None:
    start = f"random weights like {settings.random.like}" if settings.start == RANDOM else settings.start
    plan.add("Model", "start", "nothing: a tiny model" if settings.start == "nothing" else start)
    plan.add("Model", "parameters", f"{shape.parameters:,} ({config.model_type}, {shape.layers} layers of {shape.hidden})")
    plan.add("Model", "trained", f"{shape.trained:,}" + (f": adapters of rank {shape.rank}" if shape.rank else ""))
    plan.add("Model", "types", f"weights {settings.dtype}, arithmetic of updates {getattr(settings.algo, 'precision', 'float32')}")
    if settings.dtype == "float32" and shape.parameters > 5e8:
        plan.warnings.append(
            "Weights are float32, so that rollouts compute and keep their attention cache in float32 too; only updates follow algo.precision."
        )


# -- context -------------------------------------------------------------------------------------------------------------------------------


class Budget(NamedTuple):
    """Tokens of an episode."""

    prompt: int
    """the longest prompt"""
    longest: int
    """an episode, at most"""
    sampled: int
    """of them written by the policy, at most"""
    turns: int


def _context(plan: Plan, stage: Stage, settings: TrainSettings, rules: Rules | None, measured: bool, shape: Shape) -> Budget:
    section = f"Context{f', stage {stage.name}' if stage.name else ''}"
    if rules is None:
        segment, observation, context, turns, prompt = _assumed(stage.env)
    else:
        segment, observation, context = rules.max_segment_tokens, rules.max_observation_tokens, rules.max_context_tokens
        turns, prompt = rules.max_turns, longest_prompt(rules)
    if not measured or rules is None:
        prompt = -(-prompt // BYTES_PER_TOKEN) if not measured else prompt
    how = "longest of those measured" if measured and rules is not None else "about: the tokenizer or the data is not on this machine"
    whole = prompt + turns * segment + (turns - 1) * observation
    room = context - prompt - segment
    plan.add(section, "budget", f"{context:,} tokens, {turns} turns of {segment:,} with {observation:,} of environment text between")
    plan.add(section, "prompt", f"{prompt:,} tokens ({how})")
    if room < 0:
        plan.errors.append(
            f"{section}: a prompt of {prompt:,} tokens and one segment of {segment:,} exceed max_context_tokens={context:,}. Raise env.max_context_tokens "
            "or lower env.max_segment_tokens."
        )
    fits = 1 + max(0, room) // (segment + observation)
    said = f"{whole:,} tokens if every turn is as long as it may be"
    if whole > context:
        said += (
            f": more than the budget, which holds {min(fits, turns)} such turns. Passages are then cut (never their tags), and an episode without room for "
            "another segment is truncated and rewarded as it is"
        )
    plan.add(section, "longest episode", said)
    if whole > context and (stage.env.dialect or "search-r1") == "search-r1" and context <= 4596 and observation == 500:
        plan.add(
            section,
            "as published",
            "Search-R1's own sum, 2,048 + 3 x 500 + 4 x 500 = 5,548, exceeds its 4,096 too; it cuts from the left there",
        )
    if context > shape.max_positions:
        plan.warnings.append(
            f"{section}: env.max_context_tokens={context:,} is more than the {shape.max_positions:,} positions that the model was made for."
        )
    longest = min(whole, context)
    return Budget(prompt, max(longest, 2), max(1, min(turns * segment, longest - prompt)), turns)


def longest_prompt(rules: Rules) -> int:
    """Tokens of the longest prompt among :data:`MEASURED_QUESTIONS`, spread over all."""
    size = len(rules.source)
    places = range(0, size, -(-size // MEASURED_QUESTIONS))
    return max(len(rules.encode(rules.prompt_text(rules.source[index]))) for index in places)


def _assumed(env: EnvSettings) -> tuple[int, int, int, int, int]:
    """Segment, observation and context budget, turns, and the prompt of :data:`STAND_IN` in bytes, where no environment can be made."""
    from searchqa_envs.configuration import BYTE_BUDGETS, TOKEN_BUDGETS
    from searchqa_envs.dialects import get_dialect

    dialect = get_dialect(env.dialect or "search-r1")
    embedded = env.tokenizer in (None, "byte", "world")
    segment, observation, context = BYTE_BUDGETS if embedded else TOKEN_BUDGETS.get(dialect.name, TOKEN_BUDGETS["search-r1"])
    prompt = dialect.render_question(env.prompt or "published", STAND_IN)
    return (
        env.max_segment_tokens or segment,
        env.max_observation_tokens or observation,
        env.max_context_tokens or context,
        env.max_turns or 5,
        len(prompt.encode()),
    )


# -- memory --------------------------------------------------------------------------------------------------------------------------------


def _works(settings: TrainSettings, stage: Stage, budget: Budget, shape: Shape, machine: Machine) -> Work:
    """What one process has to hold in a stage."""
    import torch

    from searchqa_agents.algorithm import ALGORITHMS

    config = stage.config
    algorithm = ALGORITHMS.get(stage.algorithm)
    episodes = -(-config.questions_per_step * config.group_size // machine.processes)
    return Work(
        shape,
        4 if chosen_dtype(settings.dtype) == torch.float32 else 2,
        getattr(config, "precision", "float32") == "bfloat16",
        machine.kind,
        processes=machine.processes,
        sharded=machine.sharded,
        reference=bool(getattr(config, "kl_coef", 0.0)) and not shape.rank,
        critic=config.critic if algorithm is not None and algorithm.critic else None,
        checkpointing=getattr(config, "gradient_checkpointing", False),
        max_tokens=config.max_tokens,
        context=budget.longest,
        prompt=budget.prompt,
        slots=min(settings.num_envs, max(1, episodes)),
        sequences=-(-episodes // getattr(config, "num_minibatches", 1)),
    )


def _memory(
    plan: Plan, settings: TrainSettings, stages: Sequence[Stage], budgets: Sequence[Budget], shape: Shape, machine: Machine,
    model: tuple[PreTrainedConfig, Mapping[str, Any]],
) -> None:  # fmt: skip
    config, lora = model
    with_lora = None if lora else partial(measure_shape, config, {"rank": 16})
    for stage, budget in zip(stages, budgets, strict=True):
        work = _works(settings, stage, budget, shape, machine)
        found = plan.memories[stage.name] = memory(work)
        if found.peak <= machine.memory:
            continue
        changes, least = advice(work, machine.memory, with_lora)
        of = f" in stage {stage.name}" if stage.name else ""
        worst = max(found.peaks, key=found.peaks.__getitem__)
        said = f"Does not fit: {human(found.peak)}{of} ({worst}) of {human(machine.memory)} per process."
        if least.peak <= machine.memory:
            said += f" It would ({human(least.peak)}) with: {' '.join(changes)}"
        else:
            tried = f" With {' '.join(changes)} it is {human(least.peak)}." if changes else ""
            said += f"{tried} More processes (parallel=fsdp2), a smaller model, or a shorter context are needed."
        plan.warnings.append(said)


# -- work ----------------------------------------------------------------------------------------------------------------------------------


def _work(plan: Plan, settings: TrainSettings, stages: Sequence[Stage], budgets: Sequence[Budget], shape: Shape, machine: Machine) -> None:
    seconds, prices = 0.0, 0.0
    for stage, budget in zip(stages, budgets, strict=True):
        work, config = _works(settings, stage, budget, shape, machine), stage.config
        section = f"Work{f', stage {stage.name}' if stage.name else ''}"
        episodes = config.questions_per_step * config.group_size
        rounds = getattr(config, "dynamic_sampling", 1)
        updates = getattr(config, "num_minibatches", 1) * getattr(config, "update_epochs", 1)
        until = f", or once {stage.search_rate:.0%} of episodes search" if stage.search_rate is not None else ""
        plan.add(section, "steps", f"{config.steps:,}{f' at most{until}' if until else ''}")
        again = f", up to {rounds} times" if rounds > 1 else ""
        plan.add(section, "each step", f"{config.questions_per_step:,} questions x {config.group_size} = {episodes:,} episodes{again}")
        plan.add(
            section, "updates", f"{updates} per step, of {math.ceil(episodes / getattr(config, 'num_minibatches', 1)):,} sequences each"
        )
        plays = stage.algorithm != "sft"
        if plays:
            calls = episodes * rounds * config.steps * (budget.turns - 1)
            prices += calls * _price(stage.env.retriever)
            plan.add(section, "searches", f"{calls:,} at most")
        plan.add(section, "tokens", f"{episodes * rounds * config.steps * budget.longest:,} at most, all episodes at their longest")
        play, learn, operations = _step_seconds(work, config, stage.algorithm, budget, episodes, machine)
        play *= rounds if plays else 0
        plan.add(section, "operations", f"{operations * config.steps:.3g} FLOP at most")
        plan.add(
            section,
            "projected",
            f"{_duration(play + learn)} a step (play {_duration(play)}, learn {_duration(learn)}), {_duration((play + learn) * config.steps)} in all, at most",
        )
        seconds += (play + learn) * config.steps
    measured, times = _measured_episodes(settings), 1 + len(stages)
    plan.add("Work", "measured", f"{measured:,} episodes, {times} times")
    changed = settings.evaluation.env or {}
    turns = changed.get("max_turns", budgets[0].turns)
    prices += times * measured * (turns - 1) * _price(changed.get("retriever", settings.env.retriever))
    plan.add(
        "Work",
        "projection",
        f"{_duration(seconds)} without evaluations and searches: every episode at its longest, {machine.utilisation:.0%} of the peak, decoding bound by memory",
    )
    if prices:
        plan.add("Work", "price of searches", f"{prices:,.2f} at most, evaluations included, where no cache answers")


def _step_seconds(work: Work, config: Any, algorithm: str, budget: Budget, episodes: int, machine: Machine) -> tuple[float, float, float]:
    """Seconds of playing and of learning in one step, and operations of both, all processes together."""
    read, scored, update = flops(work, budget.sampled)
    own = episodes / machine.processes
    trunks = 2 if work.critic == "separate" else 1
    epochs = getattr(config, "update_epochs", 1)
    anew = getattr(config, "recompute_logprobs", False) or getattr(config, "top_p", 1.0) < 1 or getattr(config, "top_k", 0) > 0
    passes = int(anew) + int(bool(getattr(config, "kl_coef", 0.0))) + int(work.critic is not None)
    learning = passes * scored + epochs * trunks * update
    learn = own * learning / (machine.update * machine.utilisation)
    # each decoding step reads all weights once, and the attention cache of every episode under way, half full in the mean
    waves = max(1.0, own / work.slots)
    per_step = work.shape.parameters * work.weight_bytes + work.slots * (budget.longest / 2) * cache_bytes_per_token(work)
    decode = waves * budget.sampled * per_step / machine.bandwidth
    play = own * read / (machine.read * machine.utilisation) + decode
    playing = 0.0 if algorithm == "sft" else read + 2.0 * work.shape.output * budget.sampled
    return play, learn, episodes * (playing + learning)


def _measured_episodes(settings: TrainSettings) -> int:
    """Episodes of one evaluation: sampled and greedy for each number of hops, and once without the retriever."""
    hops: Any = getattr(settings.env, "hops", None) if settings.env.id == "SearchQA-World-v0" else 1
    groups = 2 if hops is None else len(hops) if isinstance(hops, Sequence) else 1
    return int(settings.evaluation.questions * (2 * groups + 1))


def _price(retriever: Any) -> float:
    return float(retriever.get("price") or 0.0) if isinstance(retriever, Mapping) else 0.0


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


# -- what is written -----------------------------------------------------------------------------------------------------------------------


def _written(plan: Plan, settings: TrainSettings, stages: Sequence[Stage], shape: Shape, machine: Machine) -> None:
    folder = Path(settings.run_dir)
    budget = Budget(1, 2, 1, 1)
    works = [_works(settings, stage, budget, shape, machine) for stage in stages]
    one = max(disk(work) for work in works)
    kept = settings.keep_last + 2  # the best one, and the one that is being written
    plan.add("Written", str(folder), "config.yaml, metrics.jsonl, searches.jsonl, trajectories, checkpoints, report.html")
    plan.add("Written", "checkpoints", f"{human(one)} each, up to {kept} at a time: {human(kept * one)}")
    copies = max(host_copies(work) for work in works)
    if copies:
        plan.add("Written", "while saving", f"{human(copies)} of the first machine's main memory")
    parent = next(parent for parent in [folder, *folder.absolute().parents] if parent.is_dir())
    free = shutil.disk_usage(parent).free
    if kept * one > free:
        plan.warnings.append(
            f"Checkpoints need {human(kept * one)}, and {human(free)} are free here: lower keep_last={settings.keep_last}, or choose another run_dir."
        )


def show_plan(console: Console, plan: Plan) -> None:
    """Tables of what is planned, then warnings and errors."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text("Plan"), title_justify="left", show_header=False)
    for section, rows in plan.sections.items():
        table.add_section()
        for number, (what, value) in enumerate(rows):
            table.add_row(Text(section if not number else ""), Text(what), Text(value))
    console.print(table)
    for name, found in plan.memories.items():
        of = f", stage {name}" if name else ""
        memory_table = Table(title=Text(f"Memory of one process{of}, estimated"), title_justify="left")
        memory_table.add_column("")
        for phase in found.peaks:
            memory_table.add_column(phase, justify="right")
        parts = dict.fromkeys(part for phase in found for part in phase)
        for part in parts:
            if any(phase.get(part) for phase in found):
                memory_table.add_row(part, *(human(phase[part]) if phase.get(part) else "" for phase in found))
        memory_table.add_section()
        memory_table.add_row("sum", *(human(peak) for peak in found.peaks.values()))
        console.print(memory_table)
        fits = "fits" if found.peak <= plan.limit else "does not fit"
        console.print(f"{human(found.peak)} at most: {fits} {human(plan.limit)}.", markup=False, highlight=False)
    for word, lines in (("Warning", plan.warnings), ("Error", plan.errors)):
        for line in lines:
            console.print(f"{word}: {line}", style="bold", markup=False, highlight=False, soft_wrap=True)
