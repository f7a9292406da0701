"""A language model as a policy of Stable-Baselines3."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint as recomputed

from searchqa_agents.language_model import IntArray, Sampling, Segment
from searchqa_agents.loading import checkpoint_path, checkpoint_tokenizer, chosen_dtype
from searchqa_agents.lora import add_lora
from searchqa_agents.micro_batches import length_sorted_batches
from searchqa_agents.policy import Policy, last_hidden_states, values_of
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.rules import positive_integer
from searchqa_envs.spaces import PaddedContext
from searchqa_envs.tokenizers import build_tokenizer

Reduction = Literal["mean", "sum"]

_EXACT_IDS = 2**24
"""Stable-Baselines3's buffers give actions back as float32, in which larger ids are not exact."""


class SearchQAPolicy(ActorCriticPolicy):
    """A language model that writes a segment (``MultiDiscrete``) or a token (``Discrete``) per step, with a value head on its trunk.

    It replaces all that ``ActorCriticPolicy`` makes from spaces: segments are sampled with an attention cache, log-probabilities and entropies are those
    of :meth:`searchqa_agents.policy.Policy.evaluate`, and the value of a state is read at the last token of the context. What is sampled is a
    function of the weights and of torch's global generator, which an algorithm's ``seed`` sets.

    Parameters
    ----------
    observation_space, action_space
        Of ``make_vec_env``, or of an environment under ``PaddedTokens``.
    checkpoint
        ``shipped``, a folder, or a name on the hub; it is needed again when a saved algorithm or policy is loaded. Its tokenizer must be the
        environment's.
    temperature
        Sampled and evaluated with; deterministic actions are those of temperature 0.
    logprob_reduction
        Stable-Baselines3 knows one probability per step, and so PPO has one ratio per segment. ``sum`` is the segment's log-probability: the ratio of
        a long segment leaves the clip range after one small update. ``mean`` is its mean over the tokens, as GSPO's ratio (arXiv 2507.18071,
        equation 7) is over a response. Entropies are reduced likewise. For one token both are the same.
    max_tokens
        Size of a forward pass. What needs more is evaluated in parts, each computed again in the backward pass, so that memory does not grow with the
        minibatch.
    gradient_checkpointing
        Keep only the layers' inputs within a part too.
    detach_value
        Keep the values' gradient out of the trunk.
    lora
        Train low-rank adapters: arguments of :func:`~searchqa_agents.lora.add_lora`, such as ``{"rank": 16}``.
    dtype
        ``float32`` or ``bfloat16``.
    optimizer_class, optimizer_kwargs
        As of any policy of Stable-Baselines3.

    Raises
    ------
    ConfigurationError
        If the spaces are not ours, the tokenizers differ, or an argument has an impossible value.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Callable[[float], float],
        use_sde: bool = False,
        *,
        checkpoint: str | os.PathLike[str] = "shipped",
        temperature: float = 1.0,
        logprob_reduction: Reduction = "mean",
        max_tokens: int = 16_384,
        gradient_checkpointing: bool = False,
        detach_value: bool = False,
        lora: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        space = _checked_spaces(observation_space, action_space)
        if use_sde:
            raise ConfigurationError("use_sde is for continuous actions, and tokens are discrete; leave it False.")
        if not isinstance(temperature, float | int) or not temperature > 0:
            raise ConfigurationError(
                f"temperature must be above 0; got {temperature!r}. predict(..., deterministic=True) is temperature 0."
            )
        if logprob_reduction not in ("mean", "sum"):
            raise ConfigurationError(f"logprob_reduction must be 'mean' or 'sum'; got {logprob_reduction!r}.")
        BasePolicy.__init__(  # and not ActorCriticPolicy's, which would make networks of its own
            self, observation_space, action_space, optimizer_class=optimizer_class, optimizer_kwargs=optimizer_kwargs
        )
        checkpoint = os.fspath(checkpoint)
        tokenizer = build_tokenizer(checkpoint_tokenizer(checkpoint))
        if tokenizer.name != space.tokenizer:
            raise ConfigurationError(
                f"The checkpoint {checkpoint} was made with tokenizer {tokenizer.name!r}; the environment's is {space.tokenizer!r}. Make the "
                f"environment with tokenizer={checkpoint_tokenizer(checkpoint)!r}."
            )
        self.settings: dict[str, Any] = {
            "checkpoint": checkpoint,
            "temperature": temperature,
            "logprob_reduction": logprob_reduction,
            "max_tokens": positive_integer("max_tokens", max_tokens),
            "gradient_checkpointing": gradient_checkpointing,
            "detach_value": detach_value,
            "lora": None if lora is None else dict(lora),
            "dtype": dtype,
        }
        self.language_model = Policy.load(checkpoint_path(checkpoint), tokenizer, dtype=chosen_dtype(dtype))
        if lora is not None:
            add_lora(self.language_model, **lora)
        # under the scorer its name holds "value", by which sb3-contrib's TRPO tells the critic from the actor
        value_head = self.language_model.add_value_head(detached=detach_value)
        self.scorer = self.language_model.scorer
        self._value_head = [value_head]  # in a list, so that it is registered once, under the scorer
        self._whole_segments = isinstance(action_space, spaces.MultiDiscrete)
        length = len(action_space.nvec) if isinstance(action_space, spaces.MultiDiscrete) else 1
        self._sampling = {
            temperature: Sampling(length, space.closers, temperature),
            0.0: Sampling(length, space.closers, 0.0),
        }
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.optimizer = optimizer_class(trained, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]  # every optimizer has lr

    # -- acting --------------------------------------------------------------------------------------------------------------------------

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Act: actions int64[B, L] or int64[B], values float32[B, 1], log-probabilities float32[B]."""
        contexts = self._contexts(obs)
        segments = self._write(contexts, deterministic)
        actions = self._actions([segment.ids for segment in segments])
        if deterministic:  # sampled with another temperature than it is evaluated with
            values, logprobs, _ = self.evaluate_actions(obs, actions)
            return actions, values, logprobs
        reduced = np.mean if self.settings["logprob_reduction"] == "mean" else np.sum
        of_segments = [float(reduced(segment.logprobs)) for segment in segments if segment.logprobs is not None]
        return actions, self._values(contexts), torch.tensor(of_segments, device=self.device)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        segments = self._write(self._contexts(observation), deterministic)
        return self._actions([segment.ids for segment in segments])

    def _write(self, contexts: Sequence[IntArray], deterministic: bool) -> list[Segment]:
        """One segment for each context."""
        seeds = [0] * len(contexts) if deterministic else torch.randint(2**63 - 1, (len(contexts),)).tolist()
        sampling = self._sampling[0.0 if deterministic else self.settings["temperature"]]
        session = self.language_model.start(seeds, sampling)
        return session.generate(range(len(contexts)), contexts, [{}] * len(contexts))

    def set_training_mode(self, mode: bool) -> None:
        """Nothing to do: dropout is off always, because it would make sampled and evaluated log-probabilities differ."""

    # -- evaluating ----------------------------------------------------------------------------------------------------------------------

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values float32[B, 1], and log-probabilities and entropies float32[B] as ``logprob_reduction`` says; an empty segment has 0 of both."""
        contexts, segments = self._contexts(obs), self._segments(actions)
        any_token = np.array([self.language_model.tokenizer.eos_id], dtype=np.int32)  # an empty segment's, to read the value before it
        parts = [(context, segment if len(segment) else any_token) for context, segment in zip(contexts, segments, strict=True)]
        token_ids = [np.concatenate(part) for part in parts]
        masks = [np.repeat(np.array([0, 1], dtype=np.int8), [len(context), len(written)]) for context, written in parts]

        def evaluate(batch: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
            stats = self.language_model.evaluate(
                [token_ids[i] for i in batch],
                [masks[i] for i in batch],
                temperature=self.settings["temperature"],
                entropy_gradient=True,
                gradient_checkpointing=self.settings["gradient_checkpointing"],
                max_tokens=None,
            )
            assert stats.value is not None
            counts = torch.tensor([len(parts[i][1]) for i in batch], device=stats.value.device)
            written = torch.tensor([len(segments[i]) for i in batch], device=stats.value.device)
            row = torch.repeat_interleave(torch.arange(len(batch), device=counts.device), counts)
            divisor = written.clamp(min=1) if self.settings["logprob_reduction"] == "mean" else torch.ones_like(written)

            def reduced(of_tokens: Tensor) -> Tensor:
                kept = of_tokens.masked_fill(written[row] == 0, 0.0)
                return of_tokens.new_zeros(len(batch)).index_add(0, row, kept) / divisor

            return stats.value[counts.cumsum(0) - counts], reduced(stats.logprob), reduced(stats.entropy)

        values, logprobs, entropies = self._in_parts(list(map(len, token_ids)), evaluate)
        return values[:, None], logprobs, entropies

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """Values float32[B, 1]."""
        return self._values(self._contexts(obs))

    def get_distribution(self, obs: PyTorchObs) -> CategoricalDistribution:
        """The distribution of the next token, twice differentiable. Raises ``ConfigurationError`` where actions are whole segments.

        All observations are evaluated at once, and attention is computed in plain form: fused kernels have no second derivative.
        """
        if self._whole_segments:
            raise ConfigurationError(
                "Only single tokens have a distribution that can be written down; these actions are whole segments. Use "
                'make_vec_env(..., level="token"), or PaddedTokens(TokenLevel(env)).'
            )
        with sdpa_kernel(SDPBackend.MATH):
            logits = self.language_model.logits(self._last_states(self._contexts(obs)))
        size = int(self.action_space.n)  # type: ignore[attr-defined]  # Discrete
        return CategoricalDistribution(size).proba_distribution(logits[:, :size] / self.settings["temperature"])

    def _values(self, contexts: Sequence[IntArray]) -> Tensor:
        def values(batch: Sequence[int]) -> tuple[Tensor]:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.settings["detach_value"]):
                hidden = self._last_states([contexts[i] for i in batch])
            return (values_of(self._value_head[0], hidden),)

        return self._in_parts(list(map(len, contexts)), values)[0][:, None]

    def _last_states(self, contexts: Sequence[IntArray]) -> Tensor:
        """Hidden states [B, D] at the contexts' ends."""
        model = self.language_model
        any_token = np.int32(model.tokenizer.eos_id)
        masks = [np.append(np.zeros(len(context), dtype=np.int8), np.int8(1)) for context in contexts]
        batch = model.lay_out([np.append(context, any_token) for context in contexts], masks, packed=False)
        decoder: Any = model.model.get_decoder()  # type: ignore[no-untyped-call]
        checkpointing = self.settings["gradient_checkpointing"]
        return last_hidden_states(decoder, batch.input_ids, batch.position_ids, gradient_checkpointing=checkpointing)[batch.chosen]

    def _in_parts(self, lengths: Sequence[int], evaluate: Callable[[Sequence[int]], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """``evaluate`` of the rows with these lengths, ``max_tokens`` at a time; each of its tensors has one entry per row."""
        limit = self.settings["max_tokens"]
        parts = length_sorted_batches(lengths, limit)
        padded = sum(len(part) * max(lengths[i] for i in part) for part in parts)
        recompute = padded > limit and torch.is_grad_enabled()
        results = [
            recomputed(evaluate, part, use_reentrant=False, preserve_rng_state=False) if recompute else evaluate(part) for part in parts
        ]
        order = torch.tensor([i for part in parts for i in part]).argsort().to(self.device)
        return tuple(torch.cat(column)[order] for column in zip(*results, strict=True))

    # -- arrays of Stable-Baselines3 -----------------------------------------------------------------------------------------------------

    def _contexts(self, obs: PyTorchObs) -> list[IntArray]:
        assert isinstance(obs, Mapping)  # the space is one
        if obs["input_ids"].is_floating_point():
            raise ConfigurationError("Token ids must stay whole numbers; got floats. Under VecNormalize, set norm_obs=False.")
        ids = obs["input_ids"].to("cpu", torch.int32).numpy()
        lengths = obs["attention_mask"].sum(1).tolist()
        return [row[len(row) - length :].copy() for row, length in zip(ids, lengths, strict=True)]

    def _segments(self, actions: Tensor) -> list[IntArray]:
        rows = actions.to("cpu", torch.int64).numpy().astype(np.int32).reshape(len(actions), -1)
        if not self._whole_segments:
            return list(rows)
        written = rows != self.language_model.tokenizer.pad_id
        ends = np.where(written.any(1), rows.shape[1] - written[:, ::-1].argmax(1), 0)
        return [row[:end] for row, end in zip(rows, ends, strict=True)]

    def _actions(self, segments: Sequence[IntArray]) -> Tensor:
        shape = (len(segments), *(self.action_space.shape or ()))
        actions: NDArray[np.int64] = np.full(shape, self.language_model.tokenizer.pad_id, dtype=np.int64)
        for i, segment in enumerate(segments):
            if self._whole_segments:
                actions[i, : len(segment)] = segment
            else:
                actions[i] = segment[0]
        return torch.from_numpy(actions).to(self.device)

    # -- saving --------------------------------------------------------------------------------------------------------------------------

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write the language model as a folder of transformers, with its tokenizer: a checkpoint for ``searchqa eval`` and ``searchqa train``."""
        self.language_model.save(path)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            **self.settings,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }


def _checked_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> PaddedContext:
    if not isinstance(observation_space, PaddedContext):
        raise ConfigurationError(
            f"SearchQAPolicy reads the contexts of PaddedTokens; got the observation space {type(observation_space).__name__}. Use "
            "searchqa_agents.sb3.make_vec_env(id, n_envs), or PaddedTokens(gym.make(id))."
        )
    whole = isinstance(action_space, spaces.MultiDiscrete) and action_space.nvec.ndim == 1 and len(set(action_space.nvec.tolist())) == 1
    if not (whole or isinstance(action_space, spaces.Discrete)):
        raise ConfigurationError(f"Actions must be those of PaddedTokens, MultiDiscrete or Discrete; got {action_space!r}.")
    size = int(action_space.nvec[0] if isinstance(action_space, spaces.MultiDiscrete) else action_space.n)  # type: ignore[attr-defined]
    if size > _EXACT_IDS:
        raise ConfigurationError(
            f"Stable-Baselines3 keeps actions as float32, exact up to {_EXACT_IDS} ids; this vocabulary has {size}. Use an algorithm of searchqa train."
        )
    return observation_space
