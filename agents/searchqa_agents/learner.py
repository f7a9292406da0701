"""The training step: batches to log-probabilities and values, losses to new weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from searchqa_agents.algorithm import AlgorithmConfig
from searchqa_agents.batch import Batch, select
from searchqa_agents.critic import Critic
from searchqa_agents.lora import adapters_off, has_lora
from searchqa_agents.micro_batches import evaluated_length, length_sorted_batches, packed_batches
from searchqa_agents.optimisation import AdamW, Optimiser, random_state, set_random_state
from searchqa_agents.parallel import Parallel
from searchqa_agents.policy import Policy, TokenStats
from searchqa_envs.errors import ConfigurationError


class Learner:
    """A policy, its critic and its reference, and what an algorithm does with them.

    One update::

        batch = learner.annotate(batch)  # and then the algorithm's advantages
        for part in (micro_batches := learner.micro_batches(batch)):  # indices into the batch
            stats = learner.evaluate(select(batch, part), last=part is micro_batches[-1])
            learner.backward(loss of stats)
        metrics = learner.update(step)

    Parameters
    ----------
    policy
        It is trained in place.
    config
        Read, not kept up: settings cannot change during a run.
    has_critic
        Whether values are needed; ``config.critic`` says of which kind. A shared critic is a value head on the policy's trunk, a separate one has a
        trunk that begins as a copy of the policy's. Both begin with the value 0 everywhere and have the critic's learning rate and clipping.
    parallel
        The other processes.
    """

    def __init__(self, policy: Policy, config: AlgorithmConfig, *, has_critic: bool = False, parallel: Parallel | None = None) -> None:
        self.policy = policy
        self.config = config
        self.parallel = parallel or Parallel()
        self.parallel.broadcast_weights(policy.scorer)
        self.critic: nn.Module | None = None
        self._reference: Policy | None = None
        self._lora = has_lora(policy.model)
        if config.kl_coef and not self._lora:
            self._reference = copy.deepcopy(policy)
            self._reference.scorer.requires_grad_(False)
            if self.parallel.sharded:
                self._reference.scorer = self.parallel.wrap(self._reference.scorer)
        if has_critic and config.critic == "separate":
            self.critic = self.parallel.wrap(Critic.of_policy(policy))
        elif has_critic:
            policy.add_value_head()
        self.scorer = self.parallel.wrap(copy.deepcopy(policy).scorer if self.parallel.sharded else policy.scorer)
        self._trained = copy.copy(policy)
        self._trained.scorer = self.scorer
        settings = AdamW(
            learning_rate=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            warmup_steps=config.warmup_steps if config.warmup_ratio is None else int(config.warmup_ratio * config.steps),
            final_fraction=config.final_fraction,
            total_steps=config.steps if config.schedule_steps is None else config.schedule_steps,
            max_grad_norm=config.max_grad_norm,
            schedule=config.schedule,
        )
        of_critic: dict[str, Any] = {}
        if config.critic_learning_rate is not None:
            of_critic["learning_rate"] = config.critic_learning_rate
        if config.critic_warmup_ratio is not None:
            of_critic["warmup_steps"] = int(config.critic_warmup_ratio * config.steps)
        own, critics = _parameters(self.scorer), {} if self.critic is None else _parameters(self.critic)
        critics |= {name: own.pop(name) for name in list(own) if name.startswith("value_head.")}
        self._optimiser = Optimiser(own, settings)
        self._critic_optimiser = Optimiser(critics, settings._replace(**of_critic)) if critics else None
        self._losses: list[Tensor] = []
        self._autocast = torch.bfloat16 if config.precision == "bfloat16" else None
        self._packed = config.packing == "always" or (config.packing == "auto" and _has_variable_length_kernel(policy))

    @torch.no_grad()
    def annotate(self, batch: Batch) -> Batch:
        """The batch with all that the settings ask for and that must be evaluated before the first update; all processes together.

        - ``old_logprobs`` evaluated anew, with ``recompute_logprobs`` or where top-p or top-k cut the sampling distribution; then
          ``sampling_logprobs`` are those of what really sampled, for :func:`~searchqa_agents.losses.truncated_importance`.
        - ``old_logprobs`` of environment tokens that count as the policy's (``mask_environment=False``); nothing sampled them, so that their
          ``sampling_logprobs`` are the same.
        - ``reference_logprobs`` with ``kl_coef``: those of the policy as it was given, which is a copy, or under LoRA the policy without its adapters.
        - ``values`` with a critic.
        """
        anew = self.config.recompute_logprobs or batch.sampling_logprobs is not None
        unmasked = not self.config.mask_environment
        has_values, has_reference = self._critic_optimiser is not None, bool(self.config.kl_coef)
        if not (anew or unmasked or has_values or has_reference):
            return batch
        own: dict[int, tuple[Tensor | None, ...]] = {}
        for indices in self.micro_batches(batch):
            part = select(batch, indices)
            values = logprobs = reference = None
            if anew or unmasked or (has_values and self.critic is None):
                stats = self.evaluate(part)
                logprobs, values = stats.logprob, stats.value
            elif self.critic is not None:
                values = self._values(self.critic, part)
            if has_reference:
                with adapters_off(self.scorer) if self._reference is None else contextlib.nullcontext():
                    reference = self._evaluate(self._reference or self._trained, part).logprob
            counts = torch.bincount(part.sequence_ids, minlength=len(indices)).tolist()
            columns = [[None] * len(indices) if c is None else torch.split(c.cpu(), counts) for c in (logprobs, reference, values)]
            own.update(zip(indices, zip(*columns, strict=True), strict=True))
        everyones: dict[int, tuple[Tensor | None, ...]] = {i: row for rows in self.parallel.gather([own]) for i, row in rows.items()}
        rows = [everyones[i] for i in range(len(batch.token_ids))]

        def flat(column: int) -> Tensor:
            return torch.cat([batch.weights[:0], *(tensor for row in rows if (tensor := row[column]) is not None)])

        if anew:
            sampled_with = batch.old_logprobs if batch.sampling_logprobs is None else batch.sampling_logprobs
            batch = batch._replace(sampling_logprobs=sampled_with, old_logprobs=flat(0).masked_fill(~batch.policy_mask, 0.0))
        if unmasked:
            evaluated, sampling = flat(0), batch.sampling_logprobs
            batch = batch._replace(
                old_logprobs=torch.where(batch.old_logprobs.isnan(), evaluated, batch.old_logprobs),
                sampling_logprobs=None if sampling is None else torch.where(sampling.isnan(), evaluated, sampling),
            )
        if has_reference:
            batch = batch._replace(reference_logprobs=flat(1))
        return batch._replace(values=flat(2)) if has_values else batch

    def evaluate(self, part: Batch, *, last: bool = True) -> TokenStats:
        """Log-probabilities, entropies and values (with a critic) of a part's tokens, in one forward pass; with gradient unless it is switched off.

        ``last``: whether the update follows this part's backward pass; several processes then sum their gradients.
        """
        for module in (self.scorer, self.critic):
            if module is not None and torch.is_grad_enabled():
                self.parallel.before_forward(module, last=last)
        stats = self._evaluate(self._trained, part)
        if self.critic is None:
            return stats
        return stats._replace(value=self._values(self.critic, part))

    def _values(self, critic: nn.Module, part: Batch) -> Tensor:
        forward = self.policy.lay_out(part.token_ids, part.token_masks, packed=self._packed)
        with self._precision():
            values: Tensor = critic(forward.input_ids, forward.position_ids, forward.chosen, self.config.gradient_checkpointing)
        return values

    def _evaluate(self, policy: Policy, part: Batch) -> TokenStats:
        with self._precision():
            return policy.evaluate(
                part.token_ids,
                part.token_masks,
                temperature=self.config.temperature or 1.0,
                entropy_gradient=self.config.entropy_coef != 0,
                gradient_checkpointing=self.config.gradient_checkpointing,
                packed=self._packed,
                max_tokens=None,
            )

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.policy.device.type, dtype=self._autocast, enabled=self._autocast is not None)

    def micro_batches(self, batch: Batch) -> list[list[int]]:
        """Indices of the batch's trajectories in micro-batches of at most ``max_tokens`` tokens: this process's share of them.

        Every process has equally many; some may be empty, and those must be evaluated too.
        """
        lengths = [evaluated_length(mask) for mask in batch.token_masks]

        def batched(indices: list[int]) -> list[list[int]]:
            own = [lengths[i] for i in indices]
            if self._packed:
                parts = packed_batches(own, self.config.max_tokens)
            else:
                parts = length_sorted_batches(own, self.config.max_tokens, pass_cost=256 if self.policy.device.type == "cpu" else 4096)
            return [[indices[i] for i in part] for part in parts]

        return self.parallel.micro_batches(lengths, batched)

    def backward(self, loss: Tensor) -> None:
        """Add a part's gradients to those of the parts before."""
        self._losses.append(loss.detach())
        self.parallel.backward(loss)

    def update(self, step: int, scheduled: float | None = None) -> dict[str, float]:
        """Clip the gradients and change the weights with the learning rates of ``step``, or of where the schedules stand, if that is elsewhere.

        Returns
        -------
        dict
            ``grad_norm`` before clipping, and ``critic_grad_norm`` with a critic.

        Raises
        ------
        TrainingDivergedError
            If the loss or a gradient is not finite; then no weight has changed.
        """
        own = torch.stack(self._losses).sum() if self._losses else torch.zeros(())
        loss = torch.tensor(self.parallel.summed({"loss": float(own)})["loss"])  # so that all processes stop, or none
        self._losses = []
        optimisers = {"grad_norm": self._optimiser, "critic_grad_norm": self._critic_optimiser}
        norms = {name: (one, one.finite_norm(step, loss)) for name, one in optimisers.items() if one is not None}
        for one, norm in norms.values():
            one.apply(step if scheduled is None else scheduled, norm)
        return {name: float(norm) for name, (_, norm) in norms.items()}

    def discard(self) -> None:
        """Forget the gradients of an update that is not to be made."""
        self._losses = []
        for one in (self._optimiser, self._critic_optimiser):
            if one is not None:
                one.adamw.zero_grad(set_to_none=True)

    def learning_rate(self, step: float) -> float:
        """The policy's learning rate of a step, counted from 0."""
        return self._optimiser.learning_rate(step)

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """The time of annotations and updates: where processes shard the model, ``policy`` has no weights meanwhile, and new ones afterwards."""
        self.parallel.drop_weights(self.policy.scorer)
        yield
        self.parallel.gather_weights(self.scorer, self.policy.scorer)

    def state_dict(self, steps_done: int) -> dict[str, Any]:
        """All that a run needs to go on, as tensors and plain values that ``torch.load(weights_only=True)`` reads; all processes together.

        ``model`` is what :meth:`Policy.load_weights` takes: the weights of ``policy.model``, under LoRA those of the adapters.
        """
        weights = self._changing(self.scorer)
        state: dict[str, Any] = {
            "steps_done": steps_done,
            "model": _under("model.", weights),
            "optimiser": self.parallel.optimiser_state(self._optimiser.adamw),
            "random": random_state(),
        }
        if self._critic_optimiser is not None:
            critic = _under("value_head.", weights) if self.critic is None else self._changing(self.critic)
            state["critic"] = {"model": critic, "optimiser": self.parallel.optimiser_state(self._critic_optimiser.adamw)}
        if self._reference is not None:
            state["reference"] = _under("model.", self.parallel.module_state(self._reference.scorer))
        return state

    def _changing(self, module: nn.Module) -> dict[str, Tensor]:
        """The state of a module, under LoRA without the weights that never change."""
        trained = {name for name, parameter in _parameters(module).items() if parameter.requires_grad} if self._lora else None
        return self.parallel.module_state(module, trained)

    def load_state_dict(self, state: Mapping[str, Any]) -> int:
        """Continue from what :meth:`state_dict` made; returns the number of steps done.

        Raises
        ------
        ConfigurationError
            If the state has another critic, or a reference where these settings have none, or the other way round.
        """
        self._check_parts(state)
        weights = _beneath("model.", state["model"])
        if self._critic_optimiser is not None:
            if self.critic is None:
                weights |= _beneath("value_head.", state["critic"]["model"])
            else:
                self.parallel.load_module(self.critic, state["critic"]["model"], strict=not self._lora)
            self.parallel.load_optimiser(self._critic_optimiser.adamw, state["critic"]["optimiser"])
        self.parallel.load_module(self.scorer, weights, strict=not self._lora)
        self.parallel.gather_weights(self.scorer, self.policy.scorer)
        self.parallel.load_optimiser(self._optimiser.adamw, state["optimiser"])
        if self._reference is not None:
            self.parallel.load_module(self._reference.scorer, _beneath("model.", state["reference"]))
        set_random_state(state["random"])
        return int(state["steps_done"])

    def _check_parts(self, state: Mapping[str, Any]) -> None:
        own = "none" if self._critic_optimiser is None else "shared" if self.critic is None else "separate"
        critic = state.get("critic")
        saved = "none" if critic is None else "separate" if any(name.startswith("trunk.") for name in critic["model"]) else "shared"
        reference = (self._reference is not None, "reference" in state)
        if own != saved or reference[0] != reference[1]:
            raise ConfigurationError(
                f"A run goes on with the parts that it began with; these settings have critic {own!r} and "
                f"{'a' if reference[0] else 'no'} reference model, the state has critic {saved!r} and {'a' if reference[1] else 'no'} reference "
                "model. Resume with the same algo, algo.critic, and algo.kl_coef above 0 or not as before, or start a new run."
            )


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix("module."): parameter for name, parameter in module.named_parameters()}  # DDP's prefix


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _beneath(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def _has_variable_length_kernel(policy: Policy) -> bool:
    implementation: str = getattr(policy.model.config, "_attn_implementation", None) or ""
    return policy.device.type == "cuda" and "flash" in implementation
