"""The loop around an algorithm: play, estimate advantages, update, and again.

Everything random is a function of ``(config.seed, step)``, so that a run that continues from a checkpoint is the run without the stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from searchqa_agents.algorithm import Algorithm, AlgorithmConfig, Totals, check_settings, get_algorithm
from searchqa_agents.batch import Batch, make_batch, select, to_device, with_advantages, without_mask
from searchqa_agents.language_model import LanguageModel
from searchqa_agents.learner import Learner
from searchqa_agents.losses import kl_estimate, token_weights, truncated_importance
from searchqa_agents.lost_back_end import MAX_LOST_ROLLOUTS, LostRollouts, is_lost
from searchqa_agents.optimisation import OnCheckpoint, OnStep, trainable
from searchqa_agents.parallel import Parallel, shared_rollout
from searchqa_agents.policy import Policy
from searchqa_agents.question_lists import epoch_questions, extra_questions
from searchqa_agents.rollout import draw_questions, episode_seed
from searchqa_agents.trajectory import Trajectory
from searchqa_retrievers.counted import counted_since, search_figures

OnRollout = Callable[[int, Sequence[Trajectory]], None]
"""Called after every rollout with the number of steps done before it and its trajectories, which have their advantages."""


Until = Callable[[int, Mapping[str, float]], bool]
"""Asked after every step with the number of steps done and :func:`rollout_metrics` whether the training ends with it."""
OnSearch = Callable[[int, Mapping[str, float]], None]
"""Called after every rollout with the number of steps done before it and what its searches were: sums, see ``searchqa_retrievers.counted``."""
SEARCH_FIGURES = (
    "search/searches",
    "search/duplicate_fraction",
    "search/hit_fraction",
    "search/disk_hit_fraction",
    "search/p50_ms",
    "search/p99_ms",
    "search/seconds",
    "search/backend_calls",
    "search/money",
    "search/noisy_fraction",
    "search/noise",
)
"""What is logged of a rollout's searches."""


def train(
    policy: Policy,
    venv: VectorEnv[Any, Any, Any],
    algorithm: str | Algorithm[Any],
    config: AlgorithmConfig,
    *,
    on_step: OnStep | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    on_rollout: OnRollout | None = None,
    on_search: OnSearch | None = None,
    state: Mapping[str, Any] | None = None,
    stamp: Mapping[str, Any] | None = None,
    parallel: Parallel | None = None,
    sampler: LanguageModel | None = None,
    max_lost_rollouts: int = MAX_LOST_ROLLOUTS,
    questions: Sequence[int] | None = None,
    until: Until | None = None,
) -> None:
    """Train ``policy`` in place on the questions of ``venv``.

    Parameters
    ----------
    algorithm
        The name of a registered algorithm, or one of your own; ``config`` is an instance of its ``config``.
    on_step, on_checkpoint, on_rollout, on_search
        Called in every process; in one that is not ``parallel.main`` they should write nothing.
    state
        From ``on_checkpoint``: continues that run identically.
    stamp
        Stored with each trajectory.
    parallel
        The processes that train together; default: this one alone.
    sampler
        What plays the episodes where it is not ``policy`` itself, such as a :class:`~searchqa_agents.completion_server.CompletionServerLM` whose
        weights you keep up with the policy's (from ``on_step``). With ``config.recompute_logprobs`` losses are weighted for the difference.
    max_lost_rollouts
        So many rollouts in a row without an answered search, or all that are left, end the training; 0: it is never ended. Until the back end
        answers again there is no checkpoint, except at the end, so that these steps are taken again by who goes on from the last one.
    questions
        Indices of the questions to train on, taken in epochs (:func:`~searchqa_agents.question_lists.epoch_questions`; further rounds of
        ``dynamic_sampling`` draw at random from the list), ``range(len(source))`` for all; None: drawn at random from all of ``venv``.
    until
        Ends the training after a step for which it is true, as if that were the last of ``config.steps``; schedules are over ``config.steps`` all
        the same. It is told nothing but metrics of the rollout, so that all processes agree.

    Raises
    ------
    LostBackEndError
        See ``max_lost_rollouts``; in all processes at the same step.

    Notes
    -----
    Metrics, beside those of :func:`rollout_metrics`:

    - Means over the step's updates: ``losses/policy_loss``, ``losses/approx_kl`` (k3 of the policy that sampled against the one being updated, nats
      per token; trajectories without advantage may count as 0), ``losses/grad_norm``, and with the algorithm ``losses/clipfrac``, ``losses/kl``,
      ``losses/entropy``, ``losses/value_loss``, ``losses/value_clipfrac``, ``losses/critic_grad_norm``.
    - Of the rollout: ``charts/groups_with_spread`` (share of groups whose rewards differ), ``charts/trained_share`` (of all episodes: those learned
      from, with an advantage), ``charts/explained_variance`` (of the returns, by the critic).
    - Of the rollout's searches: :data:`SEARCH_FIGURES`, of all processes together; explained in ``searchqa_retrievers.counted``.
    - Of the step: ``charts/updates`` (fewer than planned after an early stop on KL), ``charts/learning_rate``, ``time/rollout``, ``time/update``.
    - Since the training began: ``charts/policy_tokens``, sampled by the policy.
    """
    chosen = get_algorithm(algorithm) if isinstance(algorithm, str) else algorithm
    check_settings(chosen, config)
    parallel = parallel or Parallel()
    learner = Learner(policy, config, has_critic=chosen.critic, parallel=parallel)
    first = 0 if state is None else learner.load_state_dict(state)
    spent = 0 if state is None else int(state.get("policy_tokens", 0))
    lost = LostRollouts(max_lost_rollouts, config.steps - first)
    base: Any = venv.unwrapped
    for step in range(first, config.steps):
        if config.token_budget is not None and spent >= config.token_budget:
            break
        # 1. play a group of episodes on each question
        started = time.perf_counter()
        if config.token_budget is None:
            scheduled: float = step
            base.set_progress(step + 1, config.steps)  # counted from 1, as ZeroSearch's curriculum does
        else:
            scheduled = config.steps * spent / config.token_budget
            base.set_progress(spent + 1, config.token_budget)
        counted = base.search_counters().sums
        played, kept, spread = _play(venv, sampler or policy, config, step, {**(stamp or {}), "train_step": step}, parallel, questions)
        spent += sum(int(trajectory.loss_mask.sum()) for trajectory in played)
        lost.add(played)
        searched = parallel.summed(counted_since(base.search_counters().sums, counted))
        if on_search is not None:
            on_search(step, searched)
        rollout_seconds = time.perf_counter() - started
        metrics = {**rollout_metrics(played), **search_metrics(searched), "charts/groups_with_spread": spread}
        metrics["charts/policy_tokens"] = float(spent)

        with learner.updating():
            # 2. what is learned from them: every process has the whole batch as numbers
            group_ids = [number for number, group in enumerate(kept) for _ in group]
            everything = chosen.environment_tokens(config) or not config.mask_environment
            batch = make_batch([t for group in kept for t in group], group_ids, environment_tokens=everything)
            if config.reward_clip is not None:
                batch = batch._replace(rewards=batch.rewards.clamp(-config.reward_clip, config.reward_clip))
            if not config.mask_environment:
                batch = without_mask(batch)
            if batch.token_ids:
                batch = learner.annotate(batch)
                if batch.sampling_logprobs is not None:
                    importance = truncated_importance(batch.old_logprobs, batch.sampling_logprobs, config.importance_cap)
                    batch = batch._replace(weights=batch.weights * importance)
                batch = chosen.advantages(batch, config)
            if on_rollout is not None:
                on_rollout(step, with_advantages(played, batch))

            # 3. update
            metrics["charts/trained_share"] = len(with_advantage(batch)) / max(len(played), 1)
            metrics |= batch_metrics(batch, config) | _update(learner, chosen, batch, config, step, scheduled, parallel)

        done = step + 1
        ended = (until is not None and until(done, metrics)) or done == config.steps
        ended = ended or (config.token_budget is not None and spent >= config.token_budget)
        if on_step is not None:
            seconds = {"time/rollout": rollout_seconds, "time/update": time.perf_counter() - started - rollout_seconds}
            on_step(done, {**metrics, "charts/learning_rate": learner.learning_rate(scheduled), **seconds})
        lost.check()
        due = config.checkpoint_every and done % config.checkpoint_every == 0 and not lost.in_a_row
        if on_checkpoint is not None and (ended or due):
            on_checkpoint(done, {**learner.state_dict(done), "policy_tokens": spent})
        if ended:
            break


def _play(
    venv: VectorEnv[Any, Any, Any],
    sampler: LanguageModel,
    config: AlgorithmConfig,
    step: int,
    stamp: Mapping[str, Any],
    parallel: Parallel,
    listed: Sequence[int] | None = None,
) -> tuple[list[Trajectory], list[list[Trajectory]], float]:
    """All trajectories of a step, the groups to train on, and the share of all groups whose rewards differ.

    With dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) groups whose rewards are all alike are left out, and other questions are
    played in their place, in at most ``dynamic_sampling`` rounds, until one of them is lost.
    """
    source = venv.unwrapped.source  # type: ignore[attr-defined]
    groups: list[list[Trajectory]] = []
    asked: set[int] = set()
    for number in range(config.dynamic_sampling):
        count, seed = config.questions_per_step, episode_seed(config.seed, step, 2 * number)
        if listed is None:
            drawn = draw_questions(source, count, seed=seed, num_worlds=config.num_worlds)
        elif number == 0:
            drawn = epoch_questions(listed, count, seed=config.seed, step=step)
        else:
            drawn = extra_questions(listed, count, seed=seed)
        questions = [question for question in drawn if question not in asked]
        asked |= set(questions)
        trajectories = shared_rollout(
            parallel,
            venv,
            sampler,
            questions,
            group_size=config.group_size,
            seed=episode_seed(config.seed, step, 2 * number + 1),
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            stamp=stamp,
        )
        groups += [trajectories[start : start + config.group_size] for start in range(0, len(trajectories), config.group_size)]
        kept = [[t for t in trainable(group) if t.loss_mask.any()] for group in groups]
        if config.group_size > 1:  # of a group that lost its search back end there may be one left, with nothing to compare it with
            kept = [group for group in kept if len(group) > 1]
        differing = [group for group in kept if len({t.reward for t in group}) > 1]
        if len(differing) >= config.questions_per_step or is_lost(trajectories):  # more rounds would wait for a back end that is gone
            break
    if config.dynamic_sampling > 1:
        kept = differing[: config.questions_per_step]
    return [t for group in groups for t in group], kept, len(differing) / max(len(groups), 1)


def _update(
    learner: Learner,
    algorithm: Algorithm[Any],
    batch: Batch,
    config: AlgorithmConfig,
    step: int,
    scheduled: float,
    parallel: Parallel,
) -> dict[str, float]:
    """All updates of one rollout; each is the exact gradient of its minibatch, whatever its micro-batches and processes."""
    # a trajectory without advantage has no gradient in the policy's loss: it counts in the means, but need not be evaluated
    evaluate_all = (
        algorithm.critic
        or not algorithm.silent_without_advantage
        or config.entropy_coef != 0
        or (config.kl_coef != 0 and config.kl_in == "loss")
        or config.max_kl is not None
    )
    sums = dict.fromkeys(("policy_loss", "approx_kl", "grad_norm"), 0.0)
    updates = 0
    for minibatch in minibatches(batch, config, step):
        totals = totals_of(minibatch, step)
        evaluated = minibatch if evaluate_all else select(minibatch, with_advantage(minibatch))
        if not evaluated.token_ids:
            continue
        shares = parallel.summed(backward(learner, algorithm, evaluated, totals, config))
        if config.max_kl is not None and shares["approx_kl"] > config.max_kl:
            learner.discard()
            break
        for name, value in {**shares, **learner.update(step, scheduled)}.items():
            sums[name] = sums.get(name, 0.0) + value
        updates += 1
    return {**{f"losses/{name}": total / max(updates, 1) for name, total in sums.items()}, "charts/updates": float(updates)}


def minibatches(batch: Batch, config: AlgorithmConfig, step: int) -> Iterator[Batch]:
    """``update_epochs`` times the batch, each time in ``num_minibatches`` parts of whole trajectories; their weights make the mean asked for."""
    for epoch in range(config.update_epochs):
        order = np.random.default_rng([config.seed, step, epoch]).permutation(len(batch.token_ids))
        for sequences in np.array_split(order, config.num_minibatches):
            part = select(batch, sorted(sequences.tolist()))
            means = token_weights(part.sequence_ids, config.token_weighting, length=config.constant_length, mask=part.policy_mask)
            yield part._replace(weights=part.weights * means)


def backward(learner: Learner, algorithm: Algorithm[Any], minibatch: Batch, totals: Totals, config: AlgorithmConfig) -> dict[str, float]:
    """Add the gradient of this process's micro-batches of a minibatch; returns their share of its loss terms."""
    shares: dict[str, Tensor] = {}
    micro_batches = learner.micro_batches(minibatch)
    for number, sequences in enumerate(micro_batches):
        part = select(minibatch, sequences)
        stats = learner.evaluate(part, last=number == len(micro_batches) - 1)
        part = to_device(part, stats.logprob.device)
        terms = algorithm.loss(stats, part, totals, config)
        learner.backward(terms.loss)
        with torch.no_grad():
            approx_kl = kl_estimate(part.old_logprobs, stats.logprob, "k3")[part.policy_mask].sum() / totals.tokens
            for name, value in {**terms.metrics, "approx_kl": approx_kl}.items():
                shares[name] = shares[name] + value if name in shares else value
    return {name: float(value) for name, value in shares.items()}


def with_advantage(batch: Batch) -> list[int]:
    """The trajectories with an advantage other than 0 somewhere."""
    if batch.advantages is None:
        return []
    return sorted(set(batch.sequence_ids[(batch.advantages != 0) & batch.policy_mask].tolist()))


def totals_of(minibatch: Batch, step: int) -> Totals:
    """What the losses of a whole minibatch are divided by."""
    turns = torch.stack([minibatch.sequence_ids, minibatch.segment_ids])[:, minibatch.policy_mask]
    return Totals(
        tokens=int(minibatch.policy_mask.sum()),
        sequences=len(minibatch.token_ids),
        segments=torch.unique(turns, dim=1).shape[1],
        evaluated=len(minibatch.policy_mask),
        step=step,
    )


def batch_metrics(batch: Batch, config: AlgorithmConfig) -> dict[str, float]:
    """``losses/kl`` from the reference where it counts in the reward (mean over policy tokens), and ``charts/explained_variance``."""
    metrics: dict[str, float] = {}
    mask = batch.policy_mask
    if batch.reference_logprobs is not None and config.kl_in == "reward":
        old, reference = batch.old_logprobs[mask], batch.reference_logprobs[mask]
        metrics["losses/kl"] = float(kl_estimate(old, reference, config.kl_estimator, clamp=config.kl_clamp).mean())
    if batch.values is not None and batch.returns is not None:
        returns, errors = batch.returns[mask], (batch.returns - batch.values)[mask]
        if len(returns) > 1 and float(returns.var()) > 0:
            metrics["charts/explained_variance"] = 1 - float(errors.var() / returns.var())
    return metrics


def search_metrics(searched: Mapping[str, float]) -> dict[str, float]:
    """What is logged of the searches between two readings of their counters; figures without any data are left out."""
    figures = search_figures(searched)
    return {name: figures[name] for name in SEARCH_FIGURES if name in figures}


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """What a rollout says about the policy.

    ``charts/episodic_return, charts/em, charts/f1, charts/searches, charts/invalid_turns`` are means over the episodes whose search back end
    answered, ``charts/search_rate`` the share of them with at least one search that was executed, ``charts/reward_std`` the standard deviation of
    their rewards; ``charts/backend_errors`` counts the others. ``charts/sampled_tokens`` is a mean over episodes, ``charts/tokens`` the sum of all
    tokens sampled and read. ``charts/entropy`` is minus the mean log-probability of the sampled tokens, without top-p and top-k an unbiased
    estimate of the entropy per token. ``time/model, time/search, time/environment`` are
    seconds, summed over the episodes.
    """
    whole = [t for t in trajectories if t.backend_error is None]
    metrics: dict[str, float] = {
        "charts/backend_errors": float(len(trajectories) - len(whole)),
        "charts/tokens": float(sum(len(t.token_ids) for t in trajectories)),
    }
    if whole:
        rewards = [t.reward for t in whole]
        metrics["charts/episodic_return"] = float(np.mean(rewards))
        metrics["charts/reward_std"] = float(np.std(rewards))
        metrics["charts/sampled_tokens"] = float(np.mean([t.loss_mask.sum() for t in whole]))
        for name in ("em", "f1", "searches", "invalid_turns"):
            values = [t.metrics[name] for t in whole if name in t.metrics]
            if values:
                metrics[f"charts/{name}"] = float(np.mean(values))
        searched = [t.metrics["searches"] > 0 for t in whole if "searches" in t.metrics]
        if searched:
            metrics["charts/search_rate"] = float(np.mean(searched))
        logprobs = [t.logprobs[t.loss_mask == 1] for t in whole if t.logprobs is not None]
        if logprobs:
            metrics["charts/entropy"] = float(-np.concatenate(logprobs).mean())
    for part in ("model", "search", "environment"):
        metrics[f"time/{part}"] = sum(t.seconds.get(part, 0.0) for t in trajectories)
    return metrics
