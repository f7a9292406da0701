"""TRL's ``GRPOTrainer`` on our environments: a ``rollout_func`` that plays episodes, and a reward function that hands over what they earned.

::

    venv = gym.make_vec("SearchQA-HotpotQA-v0", num_envs=64, autoreset_mode="DISABLED", tokenizer=tokenizer)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=environment_reward,
        args=GRPOConfig(...),
        train_dataset=question_rows(venv),
        processing_class=tokenizer,                 # the environment's; embedded_processing_class(venv.tokenizer) for one of ours
        rollout_func=make_rollout_func(venv),
    )

Ids that were sampled are trained on as they are, ``env_mask`` is 1 for them alone, and all searches of a step are one call to the retriever.

For chat models that call tools instead of writing tags there is :class:`SearchTools`, for TRL's ``environment_factory``.

What TRL (1.16) makes of it:

- Only a row's prompt reaches ``rollout_func``, already repeated for every member of its group. So a prompt names its question (:func:`question_rows`), and
  the tokens of the real prompt come from the environment.
- ``max_completion_length`` cuts nothing here; the environment's budgets do. The loss ``dr_grpo`` divides by it, nothing else.
- TRL takes a completion that does not end in end of sequence for truncated, and ours end in a closing tag. So its metrics ``completions/clipped_ratio`` and
  ``.../*_terminated_length`` mean nothing here, and ``mask_truncated_completions`` is done by us: episodes that the environment truncated are not trained on.
- The log-probabilities returned are used only by the importance correction of ``use_vllm`` and by ``off_policy_mask_threshold``. A ``sampler`` of other
  weights than the trainer's is therefore not corrected for, unless one of them is on.
- A reward of None in every reward function leaves a row out of its group's mean and standard deviation and out of the logged rewards, and its advantage
  is 0. An ``env_mask`` of zeros leaves its tokens out of the loss and of the normaliser of ``dapo`` (the default), ``cispo``, ``vespo`` and ``bnpo``; ``grpo``,
  ``dr_grpo``, ``sapo`` and ``luspo`` still count the row in the number of rows they divide by. That is what happens to an episode that lost its search
  back end. TRL logs a long warning for it; reward functions of your own must return None where ``backend_error`` is not None.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from torch import Tensor

from searchqa_agents.integrations import engine_module
from searchqa_agents.integrations.episode_pool import shared_pool
from searchqa_agents.language_model import LanguageModel
from searchqa_agents.rollout import episode_seed, rollout
from searchqa_agents.trajectory import Trajectory
from searchqa_agents.transformers_lm import BANNED, TransformersLM
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.questions import question_of
from searchqa_envs.slot import EpisodeSlot
from searchqa_envs.tokenizers.base import Tokenizer
from searchqa_envs.tokenizers.table import TableTokenizer
from searchqa_envs.vector import SearchQAVectorEnv

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

QUESTION_ID = "question_id: "
"""What a row's prompt begins with; the id follows, to the end."""


def question_rows(venv: Any, questions: Sequence[int | str] | None = None) -> Any:
    """The ``datasets.Dataset`` for ``train_dataset`` or ``eval_dataset``: a row per question, ``prompt`` (names it) and ``question`` (for people).

    Parameters
    ----------
    venv
        The environment whose questions these are.
    questions
        Indices or ids, such as ``draw_questions`` gives; default: all. Generated worlds have millions.
    """
    source = venv.unwrapped.source
    chosen = range(len(source)) if questions is None else questions
    asked = [question_of(source, one) for one in chosen]
    rows = [{"prompt": QUESTION_ID + question.id, "question": question.question} for question in asked]
    return engine_module("datasets", "trl", "datasets").Dataset.from_list(rows)


def make_rollout_func(
    venv: Any, *, eval_venv: Any = None, sampler: LanguageModel | None = None, retries: int = 1
) -> Callable[[list[str], Any], dict[str, Any]]:
    """What ``GRPOTrainer(rollout_func=...)`` takes.

    Samples are functions of the trainer's ``seed``, its step, the process, the row, and how many rollouts this step has had; temperature, top-p and
    top-k are the trainer's. ``set_progress`` is called before each rollout. The model samples in evaluation mode, and is as it was afterwards: its
    dropout must be 0 (``disable_dropout=True``), or the log-probabilities that are trained are not those that were sampled from.

    Parameters
    ----------
    venv
        A vector environment with ``autoreset_mode="DISABLED"``; its tokenizer is the model's.
    eval_venv
        The one that ``eval_dataset`` is about; default: ``venv``.
    sampler
        What plays instead of the trainer's own model: any :class:`LanguageModel` that gives ids and log-probabilities, such as a ``CompletionServerLM``.
        Keeping its weights up to date is the caller's.
    retries
        How often episodes that lost their search back end are played again (with their own seed, so that nothing is selected).

    Raises
    ------
    ConfigurationError
        Here for a sampler without ids; in the rollout for a prompt that names no question, another tokenizer, settings of the trainer that cannot be
        honoured (``min_p``, ``repetition_penalty``, ``generation_kwargs``), and for FSDP without a sampler.
    """
    if sampler is not None and not (sampler.returns_ids and sampler.returns_logprobs):
        raise ConfigurationError(
            f"TRL trains on sampled ids with their log-probabilities; {type(sampler).__name__} does not give them. Use a backend that does."
        )
    if retries < 0:
        raise ConfigurationError(f"retries must be at least 0; got {retries}.")
    engine_module("trl", "trl", "trl 1.16")
    for given in (venv,) if eval_venv is None else (venv, eval_venv):
        base = getattr(given, "unwrapped", given)
        if not isinstance(base, SearchQAVectorEnv) or base.autoreset_mode is not AutoresetMode.DISABLED:
            raise ConfigurationError(
                f"make_rollout_func takes a vector environment of ours whose autoreset_mode is DISABLED; got {given!r}. "
                'Make one: gym.make_vec(id, num_envs=..., autoreset_mode="DISABLED").'
            )
    rollouts: Counter[tuple[int, ...]] = Counter()

    def rollout_func(prompts: list[str], trainer: Any) -> dict[str, Any]:
        training = bool(trainer.model.training)
        stage = venv if training or eval_venv is None else eval_venv
        questions = [_question_id(prompt) for prompt in prompts]
        moment = (trainer.args.seed, trainer.accelerator.process_index, trainer.state.global_step, int(training))
        seed = episode_seed(*moment, rollouts[moment])
        rollouts[moment] += 1
        stage.unwrapped.set_progress(trainer.state.global_step, max(trainer.state.max_steps, 0))
        sampling = {"temperature": trainer.temperature, "top_p": trainer.top_p, "top_k": trainer.top_k}
        _check_trainer(trainer, stage.unwrapped, questions[0])
        with _trainers_model(trainer, stage.unwrapped.tokenizer) if sampler is None else nullcontext(sampler) as model:
            trajectories = _play(stage, model, questions, retries, seed=seed, **sampling)
        return _columns(trajectories, stage.unwrapped.tokenizer.eos_id, drop_truncated=trainer.mask_truncated_completions)

    return rollout_func


def environment_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    environment_reward: Sequence[float],
    backend_error: Sequence[str | None],
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """What ``GRPOTrainer(reward_funcs=...)`` takes: what the environment gave, None where the search back end was lost.

    Exact match, F1 and searches of the batch go to TRL's log as ``environment/em`` and so on, the share of lost episodes as ``environment/lost``.
    """
    if log_metric is not None:
        for name in ("em", "f1", "searches"):
            values = [value for value in columns.get(name, ()) if value is not None]
            if values:
                log_metric(f"environment/{name}", float(np.mean(values)))
        log_metric("environment/lost", float(np.mean([error is not None for error in backend_error])))
    return [None if error is not None else reward for reward, error in zip(environment_reward, backend_error, strict=True)]


def embedded_processing_class(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers for TRL's ``processing_class`` from one of ours (``world``, ``byte``): the same ids, the same text of them.

    For padding, end of sequence and the text of completions, all that TRL needs with a ``rollout_func``. It cannot encode as ours does.
    """
    if not isinstance(tokenizer, TableTokenizer):
        raise ConfigurationError(
            f"{tokenizer!r} is not one of the embedded tokenizers. Give TRL the transformers tokenizer that it was made from."
        )
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = bytes_to_unicode()  # type: ignore[no-untyped-call]  # a printable character for each byte, which the decoder turns back
    names = {tokenizer.pad_id: "<pad>", tokenizer.eos_id: "<eos>"}
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    words = {names.get(token) or "".join(alphabet[byte] for byte in piece): token for token, piece in enumerate(pieces)}
    backend = Backend(models.WordLevel(words, unk_token="<pad>"))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


class SearchTools:
    """One episode as tools, for chat models whose template can call them: ``GRPOTrainer(environment_factory=partial(SearchTools, env_id), ...)``.

    A row needs ``prompt``, a conversation that ends in a user's message, to which the question is appended, and ``question_id``. TRL's way, not ours: the
    model's own template, each search a call of its own, one rollout after another; the environment cannot end a rollout, and does not see the last
    message, so that an answer is a tool too. An episode that loses its search back end gets no further pages and the reward None, so that it moves nothing.

    Parameters
    ----------
    env_id, arguments
        As for ``gymnasium.make``. Data and index are shared by all of a process.
    """

    def __init__(self, env_id: str, **arguments: Any) -> None:
        self._rules = shared_pool(env_id, 1, **arguments).venv.rules
        self._slot = EpisodeSlot(self._rules)
        self._reward: float | None = 0.0

    def reset(self, question_id: str, **row: Any) -> str:
        """Begin an episode; the question."""
        generator, _ = seeding.np_random(None)
        _, info = self._slot.reset(generator, fresh_order=True, options={"question_id": question_id})
        self._reward = 0.0
        return self._rules.defused(info["question"])

    def search(self, query: str) -> str:
        """Search for pages.

        Args:
            query: What to search for.

        Returns:
            The pages found.
        """
        tags = self._rules.dialect
        return self._step(f"{tags.search_open} {self._rules.defused(str(query))} {tags.search_close}")

    def answer(self, text: str) -> str:
        """Give the final answer to the question. It can be given once.

        Args:
            text: The answer, in a few words.

        Returns:
            Nothing.
        """
        tags = self._rules.dialect
        return self._step(f"{tags.answer_open} {self._rules.defused(text)} {tags.answer_close}")

    def get_reward(self) -> float | None:
        """What the environment gave; 0.0 without an end, None where the search back end was lost."""
        return self._reward

    def _step(self, text: str) -> str:
        episode = self._slot.current()
        if episode.done:
            return ""
        request = episode.submit(self._rules.check_segment(self._rules.encode(text)))
        answers, error, seconds = self._rules.search([request]) if request is not None else (None, None, 0.0)
        _, reward, terminated, truncated, info = episode.resolve(answers[0] if answers else None, error, seconds)
        if terminated or truncated:
            self._reward = None if error is not None else reward
        return self._rules.tokenizer.decode(info["turn_record"].env_tokens.tolist()).strip()


class _TrainersLM(TransformersLM):
    """Samples from the softmax that TRL differentiates: padding is an id like others. Ids that the environment does not know stay banned."""

    def logits(self, hidden: Tensor) -> Tensor:
        output_layer: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        logits: Tensor = output_layer(hidden).float()
        logits[..., self.tokenizer.vocab_size :] = BANNED
        return logits


@contextmanager
def _trainers_model(trainer: Any, tokenizer: Tokenizer) -> Iterator[LanguageModel]:
    """The trainer's model, unwrapped and in evaluation mode, under the trainer's autocast."""
    if trainer.is_fsdp_enabled:
        raise ConfigurationError(
            "Sampling from the trainer's model needs whole weights in each process, and under FSDP they are sharded. "
            "Use DDP or DeepSpeed, or give make_rollout_func a sampler."
        )
    unwrap = engine_module("trl.models", "trl", "trl 1.16").unwrap_model_for_generation
    whole = unwrap(
        trainer.model_wrapped,
        trainer.accelerator,
        gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
        gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
    )
    with whole as model, trainer.accelerator.autocast():
        modes = [(module, module.training) for module in model.modules()]
        try:
            yield _TrainersLM(model, tokenizer)
        finally:
            for module, mode in modes:
                module.training = mode


def _check_trainer(trainer: Any, env: Any, question_id: str) -> None:
    """Raise where the trainer's settings cannot be honoured, or its tokenizer is not the environment's."""
    neutral: dict[str, tuple[Any, ...]] = {"min_p": (None, 0.0), "repetition_penalty": (1.0,), "generation_kwargs": (None, {})}
    for name, allowed in neutral.items():
        value = getattr(trainer.args, name)
        if value not in allowed:
            raise ConfigurationError(
                f"{name} must be {allowed[0]} with our rollout_func, which cannot honour it; got {value!r}. Leave it out."
            )
    theirs, ours = trainer.processing_class, env.tokenizer
    ids = ours.encode(env.source[env.source.index_of(question_id)].question)
    if theirs.eos_token_id != ours.eos_id or theirs.decode(ids, skip_special_tokens=False) != ours.decode(ids):
        raise ConfigurationError(
            f"processing_class must be the environment's tokenizer, {ours.name!r}; a question's ids, or end of sequence ({theirs.eos_token_id} and "
            f"{ours.eos_id}), mean different things to them. Make the environment with the model's own tokenizer, or use embedded_processing_class."
        )


def _question_id(prompt: Any) -> str:
    if not isinstance(prompt, str) or not prompt.startswith(QUESTION_ID):
        raise ConfigurationError(
            f"A row's prompt must be {QUESTION_ID!r} and the id of a question; got {prompt!r}. Make the data set with question_rows."
        )
    return prompt.removeprefix(QUESTION_ID)


def _play(venv: Any, model: LanguageModel, questions: Sequence[str], retries: int, **settings: Any) -> list[Trajectory]:
    """One episode for each question; those that lost their search back end are played again."""
    trajectories = rollout(venv, model, questions, **settings)
    for attempt in range(retries + 1):
        lost = [place for place, trajectory in enumerate(trajectories) if trajectory.backend_error is not None]
        if not lost:
            break
        error = trajectories[lost[0]].backend_error
        if attempt == retries:
            logger.warning("%d of %d episodes lost their search back end and are not trained on: %s", len(lost), len(questions), error)
            break
        again = rollout(venv, model, [questions[place] for place in lost], places=lost, **settings)
        for place, trajectory in zip(lost, again, strict=True):
            trajectories[place] = trajectory
    return trajectories


def _columns(trajectories: Sequence[Trajectory], eos_id: int, *, drop_truncated: bool) -> dict[str, Any]:
    """TRL's lists, one entry per trajectory: its keys, then columns for reward functions."""
    columns: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
    for trajectory in trajectories:
        if trajectory.retokenized or trajectory.logprobs is None:
            raise ConfigurationError(
                "TRL trains on sampled ids with their log-probabilities; the sampler gave none. Use a backend that does."
            )
        start = trajectory.turns[0].start
        dropped = trajectory.backend_error is not None or (drop_truncated and trajectory.truncated)
        behaviour = trajectory.logprobs if trajectory.sampling_logprobs is None else trajectory.sampling_logprobs
        ids, logprobs = trajectory.token_ids[start:].tolist(), behaviour[start:].tolist()
        mask = [0] * len(ids) if dropped else trajectory.loss_mask[start:].tolist()
        if drop_truncated or not ids:  # else TRL's own rule would drop them all; and it cannot hold an empty completion
            ids, logprobs, mask = [*ids, eos_id], [*logprobs, 0.0], [*mask, 0]
        columns["prompt_ids"].append(trajectory.token_ids[:start].tolist())
        columns["completion_ids"].append(ids)
        columns["logprobs"].append(logprobs)
        columns["env_mask"].append(mask)
    columns["environment_reward"] = [trajectory.reward for trajectory in trajectories]
    columns["backend_error"] = [trajectory.backend_error for trajectory in trajectories]
    for name in sorted({name for trajectory in trajectories for name in trajectory.metrics}):
        columns[name] = [trajectory.metrics.get(name) for trajectory in trajectories]
    return columns
