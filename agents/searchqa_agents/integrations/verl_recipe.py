"""``searchqa recipe verl``: a training configuration as what verl (0.9) needs to run it: overrides, agent loops, rows, and a script.

What verl cannot do is refused (:class:`NotInVerlError`); what it does in another way is listed (:attr:`VerlRecipe.differences`). Nothing here
imports verl; that verl accepts what is written is tested with its own configuration.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from searchqa_agents.settings import EnvSettings, TrainSettings, changed_arguments, env_arguments, register, register_training
from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

ESTIMATORS = {"ppo": "gae", "grpo": "grpo", "reinforce_plus_plus": "reinforce_plus_plus"}
"""Our algorithms that verl has too, and its names for them; with ``baseline=group`` the last is ``reinforce_plus_plus_baseline``."""
KL_ESTIMATORS = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}
LOSS_MEANS = {"token-mean": "token-mean", "sequence-mean": "seq-mean-token-mean"}
PROMPT_LENGTH = 2048
"""Search-R1's ``data.max_start_length``; a longer prompt is an error in our agent loop, never cut."""
NO_DUAL_CLIP = 1e6
"""verl clips losses of negative advantages a second time, at this ratio; neither we nor the published systems do."""
CONSTANT_ENOUGH = 0.01
"""A schedule that ends long after the training is constant in verl where the learning rate falls by less than this share."""
TRAIN_LOOP, EVALUATION_LOOP = "searchqa", "searchqa-evaluation"
TRAIN_ROWS, EVALUATION_ROWS, LOOPS_FILE, SCRIPT_FILE, CONFIG_FILE = (
    "train.parquet",
    "test.parquet",
    "agent_loops.yaml",
    "train.sh",
    "config.yaml",
)

_SCRIPT = """\
#!/usr/bin/env bash
# {title}, by verl 0.9. Written by `searchqa recipe verl`; config.yaml has the configuration that it was made of.
# PYTHON names the Python of an environment with verl and this project; overrides on the line win:
#   PYTHON=.venv-engines/bin/python GPUS=8 {script} trainer.save_freq=50
# Never run on a GPU by us: composed and checked by verl's own validation only. What verl does in another way:
{differences}
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
here=${{here//\\'/\\\\\\'}} # as Hydra's grammar wants it between quotes
exec "${{PYTHON:-python3}}" -m verl.trainer.main_ppo \\
{overrides} \\
    "data.train_files='$here/{train}'" "data.val_files='$here/{test}'" \\
    "actor_rollout_ref.rollout.agent.agent_loop_config_path='$here/{loops}'" \\
    "actor_rollout_ref.rollout.name=${{ROLLOUT:-vllm}}" \\
    "actor_rollout_ref.rollout.tensor_model_parallel_size=${{TENSOR_PARALLEL:-1}}" \\
    "actor_rollout_ref.rollout.gpu_memory_utilization=${{GPU_MEMORY:-0.6}}" \\
    "actor_rollout_ref.rollout.agent.num_workers=${{AGENT_WORKERS:-8}}" \\
    "actor_rollout_ref.actor.fsdp_config.param_offload=${{OFFLOAD:-False}}" \\
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload=${{OFFLOAD:-False}}" \\
    "actor_rollout_ref.ref.fsdp_config.param_offload=${{OFFLOAD:-False}}" \\
    "trainer.nnodes=${{NODES:-1}}" "trainer.n_gpus_per_node=${{GPUS:-8}}" \\
    "$@"
"""


class NotInVerlError(ConfigurationError):
    """verl cannot do what a configuration says."""


@dataclass(frozen=True)
class Rows:
    """Questions as rows for verl.

    Attributes
    ----------
    agent_name
        The agent loop that plays them.
    env
        The environment they are of, its split included.
    count
        How many; None: all.
    seed
        Drawn by it, as our own evaluation draws; None: the first.
    ids_file
        File with the ids of the questions to take; None: any.
    """

    agent_name: str
    env: EnvSettings
    count: int | None = None
    seed: int | None = None
    ids_file: str | None = None


@dataclass(frozen=True)
class VerlRecipe:
    """What verl needs.

    Attributes
    ----------
    overrides
        verl's keys and values, over its ``ppo_trainer``. Paths and machines are the script's.
    agent_loops
        Content of the file of agent loops: that of training, and that of evaluation.
    train, test
        The rows.
    differences
        What verl does in another way than the native trainer, a sentence each.
    """

    overrides: Mapping[str, Any]
    agent_loops: Sequence[Mapping[str, Any]]
    train: Rows
    test: Rows
    differences: Sequence[str] = field(default_factory=list)


def verl_recipe(settings: TrainSettings) -> VerlRecipe:
    """The recipe of a training configuration. Raises :class:`NotInVerlError`, naming the key, for what verl cannot do."""
    from searchqa_agents.stages import algorithm_of
    from searchqa_agents.training_run import held_out_split

    name, config = algorithm_of(settings)
    _refuse(settings, name, config)
    notes = [
        "Questions come in verl's own order, and samples from the inference engine's generators; its log-probabilities are evaluated anew by the trainer.",
        "Evaluation is greedy, on the same questions; here it is sampled too, and with the search engine switched off.",
    ]
    overrides = {
        **_algorithm(name, config, notes),
        **_optimiser("actor_rollout_ref.actor", config, config.learning_rate, config.warmup_ratio, notes),
        **_batches(config, notes),
        **_lengths(settings, config),
        **_model(settings, config),
        **_trainer(settings, config),
    }
    if name == "ppo":
        overrides |= _critic(settings, config, notes)
    changed = changed_arguments("evaluation.env", settings.evaluation.env, settings.env)
    environments = {TRAIN_LOOP: _loop_arguments(settings.env), EVALUATION_LOOP: _loop_arguments(settings.env, **changed)}
    loops = [
        {"name": loop, "_target_": "searchqa_agents.integrations.verl.SearchQAAgentLoop", "num_envs": 512, "retries": 1, "env": env}
        for loop, env in environments.items()
    ]
    measured = type(settings.env)(**{**vars(settings.env), **changed, "split": settings.evaluation.split or held_out_split(settings.env)})
    count = config.steps * config.questions_per_step if _dataset(settings.env) == "world" else None
    train = Rows(TRAIN_LOOP, settings.env, count, ids_file=settings.questions)
    return VerlRecipe(
        overrides, loops, train, Rows(EVALUATION_LOOP, measured, settings.evaluation.questions, settings.evaluation.seed), notes
    )


def _refuse(settings: TrainSettings, name: str, config: Any) -> None:
    """Raise for the first thing that verl cannot do."""
    if name not in ESTIMATORS:
        raise NotInVerlError(
            f"verl has no estimator like algo={name}; it can run algo={', algo='.join(sorted(ESTIMATORS))}. The native trainer runs it."
        )
    constant = settings.start in ("nothing", "shipped", "random")
    refusals = [
        (
            settings.stages is not None,
            "stages",
            "one run has one stage. Make a recipe of each stage, as recipe=published/r1_searcher_paper_stage1 and _stage2 (or r1_searcher_llama_...) are "
            "of R1-Searcher's, the second with start=<checkpoint of the first>",
        ),
        (constant, f"start={settings.start}", "verl loads a published model. Give llm=..., start=<hub name> or start=<folder of a model>"),
        (not config.mask_environment, "algo.mask_environment=false", "its agent loops learn from sampled tokens only"),
        (getattr(config, "credit", "token") == "turn", "algo.credit=turn", "its advantages are of tokens"),
        (config.dynamic_sampling > 1, "algo.dynamic_sampling", "our agent loop does not filter groups"),
        (config.max_kl is not None, "algo.max_kl", "it makes all updates of a rollout"),
        (config.token_weighting not in LOSS_MEANS, f"algo.token_weighting={config.token_weighting}", f"it can be {', '.join(LOSS_MEANS)}"),
        (getattr(config, "clip_coef_high", None) is not None and name != "grpo", "algo.clip_coef_high", "leave it out"),
        (name == "ppo" and not getattr(config, "whiten", True), "algo.whiten=false", "its GAE is always whitened"),
        (name == "ppo" and config.critic == "shared", "algo.critic=shared", "its critic is a model of its own: algo.critic=separate"),
        (getattr(config, "baseline", "none") == "group" and config.gamma != 1, "algo.gamma", "with the group's baseline it must be 1"),
        (config.schedule == "linear" and config.final_fraction != 1, "algo.schedule=linear", "it has cosine and constant"),
        (config.beta1 is None or config.beta2 is None, "algo.beta1, algo.beta2", "AdamW needs both"),
        (
            bool(config.kl_coef) and config.kl_in == "loss" and config.kl_estimator not in KL_ESTIMATORS,
            "algo.kl_estimator",
            "use k1, k2 or k3",
        ),
    ]
    for refused, key, reason in refusals:
        if refused:
            raise NotInVerlError(f"verl cannot do {key}: {reason}.")


def _algorithm(name: str, config: Any, notes: list[str]) -> dict[str, Any]:
    """Estimator, clipping, KL and entropy."""
    actor = "actor_rollout_ref.actor"
    in_loss, in_reward = (bool(config.kl_coef) and config.kl_in == where for where in ("loss", "reward"))
    group_baseline = getattr(config, "baseline", "none") == "group"
    high = getattr(config, "clip_coef_high", None)
    overrides = {
        "algorithm.adv_estimator": ESTIMATORS[name] + ("_baseline" if group_baseline else ""),
        "algorithm.gamma": 1.0 if name == "grpo" else config.gamma,
        "algorithm.lam": getattr(config, "lam", 1.0),
        "algorithm.norm_adv_by_std_in_grpo": getattr(config, "normalise_std", True),
        "algorithm.use_kl_in_reward": in_reward,
        f"{actor}.use_kl_loss": in_loss,
        f"{actor}.clip_ratio": config.clip_coef,
        f"{actor}.clip_ratio_low": config.clip_coef,
        f"{actor}.clip_ratio_high": config.clip_coef if high is None else high,
        f"{actor}.clip_ratio_c": NO_DUAL_CLIP,
        f"{actor}.entropy_coeff": config.entropy_coef,
        f"{actor}.loss_agg_mode": LOSS_MEANS[config.token_weighting],
        "actor_rollout_ref.rollout.n": config.group_size,
        "actor_rollout_ref.rollout.temperature": config.temperature,
        "actor_rollout_ref.rollout.top_p": config.top_p,
        "actor_rollout_ref.rollout.top_k": config.top_k or -1,
        "actor_rollout_ref.rollout.calculate_log_probs": True,
    }
    if in_loss:
        overrides |= {f"{actor}.kl_loss_coef": config.kl_coef, f"{actor}.kl_loss_type": KL_ESTIMATORS[config.kl_estimator]}
    if in_reward:
        overrides |= {
            "algorithm.kl_penalty": KL_ESTIMATORS[config.kl_estimator],
            "algorithm.kl_ctrl.type": "fixed",
            "algorithm.kl_ctrl.kl_coef": config.kl_coef,
        }
    if config.top_p < 1 or config.top_k:  # as ours: truncated importance weights, of each token
        overrides |= {
            "algorithm.rollout_correction.rollout_is": "token",
            "algorithm.rollout_correction.rollout_is_threshold": config.importance_cap,
        }
    clamp = 10.0 if config.kl_estimator == "k3" else None
    if config.kl_coef and config.kl_clamp != clamp:
        notes.append(f"KL: the estimate of a token is clamped to {clamp}, here to {config.kl_clamp}.")
    if group_baseline and in_reward:
        notes.append(
            "KL: penalties are part of the reward that the group's mean is taken of; here they are subtracted token by token after it."
        )
    if config.reward_clip is not None:
        notes.append(f"Rewards are not clipped; here to {-config.reward_clip} and {config.reward_clip}.")
    if getattr(config, "environment_tokens", False):
        notes.append(
            "Critic, GAE and whitening leave environment tokens out; here they see them (algo.environment_tokens), as in Search-R1."
        )
    return overrides


def _optimiser(key: str, config: Any, rate: float, warmup_ratio: float | None, notes: list[str]) -> dict[str, Any]:
    overrides: dict[str, Any] = {
        f"{key}.optim.lr": rate,
        f"{key}.optim.betas": [config.beta1, config.beta2],
        f"{key}.optim.weight_decay": config.weight_decay,
        f"{key}.optim.clip_grad": config.max_grad_norm,
        f"{key}.grad_clip": config.max_grad_norm,
        f"{key}.optim.lr_scheduler_type": "constant",
    }
    if warmup_ratio is not None:
        overrides[f"{key}.optim.lr_warmup_steps_ratio"] = warmup_ratio
    elif config.warmup_steps:
        overrides[f"{key}.optim.lr_warmup_steps"] = config.warmup_steps
    if warmup_ratio or config.warmup_steps:
        _note(notes, "Learning rates: the warm-up begins at 0 in the first step, here at one step of it.")
    if config.schedule == "cosine":
        overrides |= _cosine(key, config, notes)
    return overrides


def _cosine(key: str, config: Any, notes: list[str]) -> dict[str, Any]:
    """verl's cosine ends with the training; one that ends long after it is as good as constant."""
    from searchqa_agents.optimisation import AdamW, learning_rate

    total = config.schedule_steps or config.steps
    if total == config.steps:
        return {
            f"{key}.optim.lr_scheduler_type": "cosine",
            f"{key}.optim.min_lr_ratio": config.final_fraction,
            f"{key}.optim.num_cycles": 0.5,
        }
    warmup = config.warmup_steps if config.warmup_ratio is None else int(config.warmup_ratio * config.steps)
    adamw = AdamW(
        1.0, (config.beta1, config.beta2), config.weight_decay, warmup, config.final_fraction, total, config.max_grad_norm, "cosine"
    )
    fall = 1 - learning_rate(adamw, config.steps)
    if fall >= CONSTANT_ENOUGH:
        raise NotInVerlError(
            f"verl cannot do algo.schedule_steps={total} with algo.steps={config.steps}: its cosine ends with the training, and in this one the learning "
            f"rate falls by {fall:.1%}. Leave algo.schedule_steps out, or take algo.schedule=constant."
        )
    _note(notes, f"Learning rates are constant; here they fall by {fall:.2g} of the peak along a cosine over {total} steps.")
    return {}


def _note(notes: list[str], said: str) -> None:
    if said not in notes:
        notes.append(said)


def _batches(config: Any, notes: list[str]) -> dict[str, Any]:
    """A mini-batch is whole groups in verl, all of one size."""
    prompts = config.questions_per_step
    updates = min((n for n in range(1, prompts + 1) if prompts % n == 0), key=lambda n: (abs(n - config.num_minibatches), n))
    if updates != config.num_minibatches:
        notes.append(f"Updates per rollout: {updates} of {prompts // updates} whole groups each; here {config.num_minibatches}.")
    return {
        "data.train_batch_size": prompts,
        "actor_rollout_ref.actor.ppo_mini_batch_size": prompts // updates,
        "actor_rollout_ref.actor.ppo_epochs": config.update_epochs,
        "data.seed": config.seed,
        "actor_rollout_ref.rollout.seed": config.seed,
        "actor_rollout_ref.actor.data_loader_seed": config.seed,
    }


def _lengths(settings: TrainSettings, config: Any) -> dict[str, Any]:
    """``max_context_tokens`` counts the prompt, so that a response of as many tokens is never cut."""
    from searchqa_envs.configuration import TOKEN_BUDGETS

    response = settings.env.max_context_tokens or TOKEN_BUDGETS[settings.env.dialect or "search-r1"][2]
    longest = PROMPT_LENGTH + response
    return {
        "data.max_prompt_length": PROMPT_LENGTH,
        "data.max_response_length": response,
        "actor_rollout_ref.rollout.max_model_len": longest,
        "actor_rollout_ref.actor.use_dynamic_bsz": True,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": max(config.max_tokens, longest),
    }


def _model(settings: TrainSettings, config: Any) -> dict[str, Any]:
    from searchqa_agents.loading import checkpoint_path
    from searchqa_agents.training_run import lora_arguments

    half = settings.dtype == "bfloat16"
    overrides: dict[str, Any] = {
        "actor_rollout_ref.model.path": _absolute(str(checkpoint_path(settings.start))),
        "actor_rollout_ref.model.use_remove_padding": True,
        "actor_rollout_ref.model.enable_gradient_checkpointing": config.gradient_checkpointing,
        "actor_rollout_ref.actor.fsdp_config.model_dtype": "bf16" if half else "fp32",
        "actor_rollout_ref.actor.fsdp_config.dtype": "bfloat16" if half or config.precision == "bfloat16" else "float32",
    }
    lora = lora_arguments(settings)
    if lora:
        overrides |= {
            "actor_rollout_ref.model.lora_rank": lora.get("rank", 16),
            "actor_rollout_ref.model.lora_alpha": lora.get("alpha", 32),
            "actor_rollout_ref.model.target_modules": lora.get("target_modules", "all-linear"),
            "actor_rollout_ref.rollout.load_format": "safetensors",  # adapters are sent to an engine that holds the base weights
        }
    return overrides


def _trainer(settings: TrainSettings, config: Any) -> dict[str, Any]:
    every = config.checkpoint_every or config.steps
    return {
        "actor_rollout_ref.rollout.skip_tokenizer_init": False,  # closing tags are found in texts
        "actor_rollout_ref.rollout.agent.default_agent_loop": TRAIN_LOOP,
        "trainer.use_v1": True,
        "trainer.v1.trainer_mode": "sync",
        "trainer.v1.sampler.sync_refill_failed_groups": False,
        "trainer.total_training_steps": config.steps,
        "trainer.total_epochs": config.steps,  # never the bound
        "trainer.save_freq": every,
        "trainer.test_freq": every,
        "trainer.val_before_train": True,
        "trainer.project_name": "searchqa",
        "trainer.experiment_name": settings.name,
        "trainer.logger": ["console", "tensorboard"],
    }


def _critic(settings: TrainSettings, config: Any, notes: list[str]) -> dict[str, Any]:
    from searchqa_agents.loading import checkpoint_path

    rate = config.learning_rate if config.critic_learning_rate is None else config.critic_learning_rate
    ratio = config.warmup_ratio if config.critic_warmup_ratio is None else config.critic_warmup_ratio
    batches, lengths = _batches(config, []), _lengths(settings, config)
    return {
        **_optimiser("critic", config, rate, ratio, notes),
        "critic.model.path": _absolute(str(checkpoint_path(settings.start))),
        "critic.model.enable_gradient_checkpointing": config.gradient_checkpointing,
        "critic.model.use_remove_padding": True,
        "critic.ppo_mini_batch_size": batches["actor_rollout_ref.actor.ppo_mini_batch_size"],
        "critic.ppo_epochs": config.update_epochs,
        "critic.ppo_max_token_len_per_gpu": lengths["actor_rollout_ref.actor.ppo_max_token_len_per_gpu"],
        "critic.cliprange_value": 1e9 if config.value_clip_coef is None else config.value_clip_coef,
        "trainer.critic_warmup": config.critic_warmup,
    }


def _dataset(env: EnvSettings) -> str:
    """Hydra name of the set that an environment plays."""
    import gymnasium as gym

    import searchqa_envs  # noqa: F401, registers the ids

    return str(gym.spec(env.id).kwargs["dataset"])


def _loop_arguments(env: EnvSettings, **changed: Any) -> dict[str, Any]:
    """Arguments of an environment for an agent loop, whose process runs elsewhere: paths are made absolute."""
    arguments = {name: value for name, value in env_arguments(env, **changed).items() if name != "split"}
    for name in ("questions", "corpus", "data_dir", "tokenizer"):
        below_data_dir = name in ("questions", "corpus") and "data_dir" in arguments
        if isinstance(arguments.get(name), str) and not below_data_dir:
            arguments[name] = _absolute(arguments[name])
    return arguments


def _absolute(name: str) -> str:
    """The absolute path of a file or folder that is here; any other name as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def rows_of(rows: Rows) -> Iterator[dict[str, Any]]:
    """The rows themselves; reads (and where needed downloads) the questions."""
    from searchqa_agents.integrations.rows import question_rows
    from searchqa_agents.question_lists import read_question_ids
    from searchqa_agents.rollout import draw_questions
    from searchqa_envs.configuration import CUSTOM_OPTIONS, WORLD_OPTIONS, build_source

    arguments, dataset = env_arguments(rows.env), _dataset(rows.env)
    options = {name: arguments[name] for name in {"world": WORLD_OPTIONS, "custom": CUSTOM_OPTIONS}.get(dataset, ()) if name in arguments}
    split, data_dir = arguments.get("split"), arguments.get("data_dir")
    chosen: set[int] | None = None
    source = build_source(dataset, split, data_dir, options)
    count = len(source) if rows.count is None else min(rows.count, len(source))
    if rows.seed is not None:
        chosen = set(draw_questions(source, count, seed=rows.seed))
        count = max(chosen) + 1
    found = question_rows(
        dataset,
        split,
        "verl",
        dialect=arguments.get("dialect", "search-r1"),
        agent_name=rows.agent_name,
        count=count,
        data_dir=data_dir,
        options=options,
    )
    ids = None if rows.ids_file is None else set(read_question_ids(rows.ids_file))
    for row in found:
        where = row["extra_info"]
        if (chosen is None or where["index"] in chosen) and (ids is None or where["question_id"] in ids):
            yield row


def words(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as words of verl's command line."""
    return [f"{key}={_text(value)}" for key, value in overrides.items()]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[\w./:@+-]+", value):  # Hydra's grammar reads other characters as its own
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return repr(value) if isinstance(value, float) else str(value)


def write_recipe(recipe: VerlRecipe, folder: Path, title: str, config: str) -> None:
    """Write script, agent loops and configuration into ``folder``; rows are written by :func:`rows_of`. Files that are there are replaced."""
    from omegaconf import OmegaConf

    folder.mkdir(parents=True, exist_ok=True)
    overrides = " \\\n".join(f"    {shlex.quote(word)}" for word in words(recipe.overrides))
    script = folder / SCRIPT_FILE
    text = _SCRIPT.format(
        title=title,
        script=SCRIPT_FILE,
        differences="\n".join(f"# - {said}" for said in recipe.differences),
        overrides=overrides,
        train=TRAIN_ROWS,
        test=EVALUATION_ROWS,
        loops=LOOPS_FILE,
    )
    script.write_text(text, encoding="utf-8")
    script.chmod(0o755)
    loops = OmegaConf.to_yaml(OmegaConf.create(list(recipe.agent_loops)))
    (folder / LOOPS_FILE).write_text(f"# How verl's rows are played. Written by `searchqa recipe verl`.\n{loops}", encoding="utf-8")
    (folder / CONFIG_FILE).write_text(config, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``searchqa recipe <argv>``."""
    from searchqa_agents.hydra_app import run_app

    parser = argparse.ArgumentParser(prog="searchqa recipe", add_help=False)
    parser.add_argument("engine", choices=["verl"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", action="store_true")
    try:
        arguments, line = parser.parse_known_args(argv)
    except SystemExit as stop:  # argparse has already said why
        return stop.code if isinstance(stop.code, int) else 2
    if {"-m", "--multirun"} & set(line):
        raise ConfigurationError("A recipe is of one run: leave out -m.")
    if arguments.rows and arguments.out is None:
        raise ConfigurationError("--rows writes rows into the folder of --out: give --out FOLDER.")
    register()
    return run_app("train", _Writer(arguments.out, arguments.rows), [*line, "dry_run=true"], before=lambda _: register_training())


class _Writer:
    """The task that Hydra calls with the composed configuration."""

    def __init__(self, out: Path | None, rows: bool) -> None:
        self.out = out
        self.rows = rows

    def __call__(self, config: DictConfig, path: Path) -> None:
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf
        from rich.console import Console

        settings = cast(TrainSettings, OmegaConf.to_object(config))
        recipe = verl_recipe(settings)
        console = Console()
        title = str(HydraConfig.get().runtime.choices["recipe"])
        if self.out is None:
            for word in words(recipe.overrides):
                _say(console, word)
        else:
            write_recipe(recipe, self.out, title, OmegaConf.to_yaml(config, resolve=True))
            for name, rows in {TRAIN_ROWS: recipe.train, EVALUATION_ROWS: recipe.test}.items() if self.rows else ():
                self._write(console, self.out / name, rows)
        _say(console, "What verl does in another way than the native trainer:")
        for said in recipe.differences:
            _say(console, f"- {said}")
        if self.out is not None:
            missing = "" if self.rows else "; the rows are not there yet: the same line with --rows writes them"
            _say(console, f"Script: {self.out / SCRIPT_FILE}{missing}")

    def _write(self, console: Console, path: Path, rows: Rows) -> None:
        from searchqa_agents.integrations.rows import write_rows

        count = write_rows(rows_of(rows), path)
        _say(console, f"{count:,} rows: {path}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
