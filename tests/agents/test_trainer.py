"""The trainer's loop: determinism, resuming bit for bit, what is trained on, when it stops, what it says."""

import io
import itertools
from collections import Counter
from dataclasses import dataclass, replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents.advantages import leave_one_out_advantages
from searchqa_agents.algorithm import Algorithm, AlgorithmConfig, clipped_loss, get_algorithm
from searchqa_agents.batch import make_batch
from searchqa_agents.models import make_tiny_model
from searchqa_agents.parallel import Parallel
from searchqa_agents.policy import Policy
from searchqa_agents.rollout import rollout
from searchqa_agents.trainer import _play, minibatches, rollout_metrics, totals_of, train
from searchqa_envs.errors import ConfigurationError
from searchqa_retrievers import RetrieverUnavailable

SMALL = {"steps": 4, "questions_per_step": 4, "group_size": 3, "num_worlds": 1, "learning_rate": 3e-3}


def make_env(num_envs=12, **arguments):
    settings = {"max_segment_tokens": 12, "max_turns": 3, **arguments}
    return gym.make_vec("SearchQA-World-v0", num_envs=num_envs, autoreset_mode="DISABLED", **settings)


class TagLover(Policy):
    """Writes many tags, so that there are searches and answers without training."""

    def __init__(self, model, tokenizer):
        super().__init__(model, tokenizer)
        self.bonus = torch.zeros(tokenizer.vocab_size)
        self.bonus[[tokenizer.encode(tag)[0] for tag in ("<search>", "</search>", "<answer>", "</answer>")]] = 4.0

    def logits(self, hidden):
        return super().logits(hidden) + self.bonus


def make_policy(seed=0) -> Policy:
    torch.set_num_threads(1)
    tokenizer = make_env(1).unwrapped.tokenizer
    shape = {"hidden_size": 32, "feed_forward_size": 48, "initializer_range": 0.1}
    return TagLover(make_tiny_model(tokenizer.vocab_size, seed, pad_id=tokenizer.pad_id, eos_id=tokenizer.eos_id, **shape), tokenizer)


def some_reward(episode):
    """Pays for each search: what a policy with random weights can learn in a few steps."""
    return {"searches": float(episode.searches)}


def no_reward(episode):
    return {"nothing": 0.0}


def another_reward_each_time():
    numbers = itertools.count()
    return lambda episode: {"number": float(next(numbers))}


def weights(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()]).clone()


def run(algorithm="grpo", *, state=None, venv=None, policy=None, reward=some_reward, **changes):
    """Policy, metrics by step, saved states by step, trajectories by step."""
    chosen = get_algorithm(algorithm) if isinstance(algorithm, str) else algorithm
    policy = policy or make_policy()
    metrics, states, played = {}, {}, {}

    def on_checkpoint(step, saved):
        states[step] = io.BytesIO()
        torch.save(saved, states[step])

    if state is not None:
        state.seek(0)
        state = torch.load(state, weights_only=True)
    train(
        policy,
        venv or make_env(reward=reward),
        algorithm,
        chosen.config(**{**SMALL, **changes}),
        state=state,
        on_step=lambda step, values: metrics.update({step: dict(values)}),
        on_checkpoint=on_checkpoint,
        on_rollout=lambda step, trajectories: played.update({step: list(trajectories)}),
        max_lost_rollouts=0,
    )
    return policy, metrics, states, played


def timeless(metrics):
    return {step: {k: v for k, v in values.items() if not k.startswith(("time/", "search/"))} for step, values in metrics.items()}


# -- resuming ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("ppo", {"kl_coef": 0.01, "environment_tokens": True}),
        ("ppo", {"critic": "shared", "credit": "turn", "critic_learning_rate": 1e-2}),
        ("grpo", {"kl_coef": 0.1, "entropy_coef": 0.01, "update_epochs": 2, "num_minibatches": 2}),
        ("grpo", {"credit": "turn", "dynamic_sampling": 2, "top_p": 0.9}),
        ("gspo", {}),
        ("reinforce", {}),
        ("reinforce_plus_plus", {"baseline": "group", "recompute_logprobs": True}),
        ("rloo", {"max_kl": 1e-3, "num_minibatches": 3}),
        ("raft", {}),
    ],
)
def test_a_resumed_run_is_the_run_without_the_stop_bit_for_bit(algorithm, changes):
    whole, metrics, states, played = run(algorithm, steps=3, checkpoint_every=1, **changes)
    assert sorted(states) == [1, 2, 3]
    resumed, later, _, played_later = run(algorithm, steps=3, state=states[1], policy=make_policy(seed=9), **changes)
    assert torch.equal(weights(whole), weights(resumed))
    assert not torch.equal(weights(whole), weights(make_policy()))
    assert played_later == {1: played[1], 2: played[2]}
    assert timeless(later) == {step: timeless(metrics)[step] for step in (2, 3)}


def test_checkpoints_come_every_so_many_steps_and_at_the_end():
    assert sorted(run(steps=3, checkpoint_every=2)[2]) == [2, 3]
    assert sorted(run(steps=2)[2]) == [2]


# -- learning ---------------------------------------------------------------------------------------------------------------------------------


def test_the_return_rises():
    _, metrics, _, _ = run(steps=10, questions_per_step=8, group_size=6, venv=make_env(48, reward=some_reward))
    returns = [values["charts/episodic_return"] for values in metrics.values()]
    assert np.mean(returns[-3:]) > np.mean(returns[:3]) + 0.25


def test_an_algorithm_of_ones_own_is_two_functions_and_settings():
    @dataclass
    class MineConfig(AlgorithmConfig):
        num_minibatches: int = 2

    def advantages(batch, config):
        return batch._replace(advantages=leave_one_out_advantages(batch.rewards, batch.group_ids)[batch.sequence_ids])

    def loss(stats, part, totals, config):
        return clipped_loss(stats, part, totals, config, clip_coef=0.3)

    mine = Algorithm("mine", MineConfig, advantages, loss)
    policy, metrics, _, _ = run(mine, steps=2)
    assert metrics[2]["charts/updates"] > 0
    assert not torch.equal(weights(policy), weights(make_policy()))


def test_size_of_micro_batches_does_not_change_the_update():
    a, b = run(steps=1)[0], run(steps=1, max_tokens=64)[0]
    assert (weights(a) - weights(make_policy())).abs().max() > 1e-4
    # Adam's first step is the gradient's sign: compare where the gradient is not all rounding
    assert torch.isclose(weights(a), weights(b), atol=1e-5).float().mean() > 0.99


def test_the_kl_term_holds_the_policy_back():
    free, held = (run(steps=4, kl_coef=coef)[1] for coef in (1e-12, 1.0))
    assert free[1]["losses/kl"] == pytest.approx(0, abs=1e-6)  # the reference is the policy as training begins
    assert held[4]["losses/kl"] < 0.5 * free[4]["losses/kl"]


# -- what is trained on -----------------------------------------------------------------------------------------------------------------------


class Lost:
    def search(self, requests):
        raise RetrieverUnavailable("gone")

    def cache_key(self, request):
        return request.query

    def __deepcopy__(self, memo):
        return self


def test_episodes_that_lost_their_search_back_end_are_not_trained_on():
    venv = make_env(reward=some_reward, retriever=Lost())
    trajectories = rollout(venv, make_policy(), [0, 1, 2, 3], group_size=3)
    lost = [t.backend_error is not None for t in trajectories]
    assert 0 < sum(lost) < len(lost)
    policy, metrics, _, _ = run(steps=1, venv=venv)
    assert metrics[1]["charts/backend_errors"] > 0
    assert metrics[1]["charts/searches"] == 0  # only the episodes without a search are left, and they are alike:
    assert metrics[1]["charts/trained_share"] == 0
    assert metrics[1]["losses/grad_norm"] == metrics[1]["charts/updates"] == 0
    assert torch.equal(weights(policy), weights(make_policy()))


def test_what_is_left_of_a_group_alone_is_not_trained_on():
    """Its reward has nothing to be compared with; an episode that is a group by itself is another matter."""
    lost = "The search back end was lost."

    def left(group_size, backend_errors):
        venv, policy = make_env(reward=some_reward), make_policy()
        found = rollout(venv, policy, [0], group_size=group_size)
        changed = [replace(t, reward=1.0, backend_error=lost if error else None) for t, error in zip(found, backend_errors, strict=True)]
        config = get_algorithm("grpo").config(**{**SMALL, "questions_per_step": 1, "group_size": group_size})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("searchqa_agents.trainer.shared_rollout", lambda *_, **__: changed)
            return [len(group) for group in _play(venv, policy, config, 0, {}, Parallel())[1]]

    assert left(3, [True, False, True]) == []
    assert left(3, [True, False, False]) == [2]
    assert left(1, [False]) == [1]


def test_another_sampler_plays_and_the_policy_learns():
    """A sampler with other weights: the losses are weighted for the difference, and the first rollout is the sampler's."""
    sampler, policy, venv, played = make_policy(seed=5), make_policy(), make_env(reward=some_reward), []
    config = get_algorithm("grpo").config(**{**SMALL, "steps": 1, "recompute_logprobs": True})
    train(policy, venv, "grpo", config, sampler=sampler, on_rollout=lambda _, trajectories: played.extend(trajectories))
    other = run(steps=1)[3][0]
    assert played != other
    assert played == run(steps=1, policy=make_policy(seed=5))[3][0]
    assert not torch.equal(weights(policy), weights(make_policy()))
    assert torch.equal(weights(sampler), weights(make_policy(seed=5)))


def test_retokenized_trajectories_are_refused():
    class TextOnly(TagLover):
        returns_ids = False

    policy = make_policy()
    policy.__class__ = TextOnly
    with pytest.raises(ConfigurationError, match="encoded anew"):
        run(policy=policy)


@pytest.mark.parametrize(("reward", "rounds"), [(another_reward_each_time(), 1), (no_reward, 3)])
def test_dynamic_sampling_plays_other_questions_until_enough_groups_differ(reward, rounds):
    policy, metrics, _, played = run(reward=reward, steps=1, questions_per_step=3, group_size=2, dynamic_sampling=3)
    questions = Counter(trajectory.question_id for trajectory in played[0])
    assert len(questions) == 3 * rounds
    assert set(questions.values()) == {2}
    assert metrics[1]["charts/groups_with_spread"] == (rounds == 1)
    assert metrics[1]["charts/updates"] == (rounds == 1)
    assert torch.equal(weights(policy), weights(make_policy())) == (rounds == 3)


def test_dynamic_sampling_asks_no_question_twice_in_a_step():
    venv = make_env(48, reward=no_reward, num_worlds=1)
    size = len(venv.unwrapped.source)
    _, _, _, played = run(venv=venv, steps=1, questions_per_step=size // 2 + 1, group_size=2, dynamic_sampling=2)
    assert set(Counter(trajectory.question_id for trajectory in played[0]).values()) == {2}


def test_dynamic_sampling_trains_only_on_groups_that_differ():
    groups = []

    def advantages(batch, config):
        groups.append([set(batch.rewards[batch.group_ids == group].tolist()) for group in batch.group_ids.unique()])
        return batch._replace(advantages=torch.ones_like(batch.old_logprobs))

    grpo = get_algorithm("grpo")
    algorithm = Algorithm("spy", grpo.config, advantages, grpo.loss)
    _, metrics, _, _ = run(algorithm, steps=3, questions_per_step=6, group_size=2, dynamic_sampling=3)
    assert 0 < metrics[1]["charts/groups_with_spread"] < 1
    assert all(len(rewards) == 2 for step in groups for rewards in step)
    assert all(0 < len(step) <= 6 for step in groups)


def test_raft_without_a_right_episode_changes_nothing():
    policy, metrics, _, _ = run("raft", steps=2, threshold=99.0)
    assert torch.equal(weights(policy), weights(make_policy()))
    assert metrics[2]["charts/trained_share"] == 0


def test_what_top_p_cut_is_corrected_by_truncated_importance_weights():
    seen = []

    def loss(stats, part, totals, config):
        seen.append(part)
        return get_algorithm("grpo").loss(stats, part, totals, config)

    grpo = get_algorithm("grpo")
    run(Algorithm("spy", grpo.config, grpo.advantages, loss), steps=1, top_p=0.5, importance_cap=1.5)
    for part in seen:
        ratio = (part.old_logprobs - part.sampling_logprobs).exp()
        assert (ratio < 1).any()  # a cut distribution gives what it keeps more probability
        torch.testing.assert_close(part.weights, ratio.clamp(max=1.5))
    seen.clear()
    run(Algorithm("spy", grpo.config, grpo.advantages, loss), steps=1)
    assert all(part.sampling_logprobs is None and bool((part.weights == 1).all()) for part in seen)


def test_recomputed_log_probabilities_equal_the_recorded_ones():
    pairs = []

    def advantages(batch, config):
        pairs.append((batch.old_logprobs, batch.sampling_logprobs))
        return batch._replace(advantages=torch.zeros_like(batch.old_logprobs))

    grpo = get_algorithm("grpo")
    run(Algorithm("spy", grpo.config, advantages, grpo.loss), steps=1, recompute_logprobs=True)
    for anew, recorded in pairs:
        assert not torch.equal(anew, recorded)
        torch.testing.assert_close(anew, recorded, atol=1e-4, rtol=0)


# -- updates ----------------------------------------------------------------------------------------------------------------------------------


def test_minibatches_hold_every_trajectory_once_in_each_pass_and_are_a_function_of_seed_and_step(random_episodes):
    batch = make_batch(random_episodes(7, 50), range(7))
    config = AlgorithmConfig(update_epochs=2, num_minibatches=3, seed=4)

    def passes(step):
        return [part.group_ids.tolist() for part in minibatches(batch, config, step)]

    parts = passes(0)
    assert len(parts) == 6
    for epoch in (parts[:3], parts[3:]):
        assert sorted(group for part in epoch for group in part) == list(range(7))
    assert parts == passes(0)
    assert parts[:3] != parts[3:]
    assert parts != passes(1)


def test_the_totals_of_a_minibatch_by_hand(episode):
    trajectories = [episode([1, 2], [3, 4], [5, 6], [7]), episode([1], [8], [9, 9, 9])]
    assert totals_of(make_batch(trajectories, [0, 1]), 5) == (4, 2, 3, 4, 5)
    assert totals_of(make_batch(trajectories, [0, 1], environment_tokens=True), 5) == (4, 2, 3, 9, 5)


def test_too_much_kl_ends_a_rollouts_updates():
    several = {"algorithm": "reinforce_plus_plus", "num_minibatches": 4, "steps": 1, "learning_rate": 3e-2}
    _, metrics, _, _ = run(**several)
    assert metrics[1]["charts/updates"] == 4
    stopped, metrics, _, _ = run(max_kl=1e-5, **several)
    assert metrics[1]["charts/updates"] == 1  # the second finds a policy that is too far away, and is not made
    assert metrics[1]["losses/approx_kl"] == pytest.approx(0, abs=1e-6)
    assert run(max_kl=1e3, **several)[1][1]["charts/updates"] == 4
    assert not torch.equal(weights(stopped), weights(make_policy()))


def test_the_schedules_are_told_how_far_training_is(monkeypatch):
    venv, told = make_env(), []
    monkeypatch.setattr(venv.unwrapped, "set_progress", lambda step, total: told.append((step, total)))
    run(venv=venv, steps=2)
    assert told == [(1, 2), (2, 2)]


# -- metrics ----------------------------------------------------------------------------------------------------------------------------------

CHARTS = (
    "backend_errors em entropy episodic_return f1 groups_with_spread invalid_turns learning_rate policy_tokens reward_std sampled_tokens search_rate "
    "searches tokens trained_share updates"
)


@pytest.mark.parametrize(
    ("algorithm", "changes", "losses", "charts"),
    [
        ("grpo", {}, "approx_kl clipfrac grad_norm policy_loss", ""),
        ("grpo", {"kl_coef": 0.1, "entropy_coef": 0.1}, "approx_kl clipfrac entropy grad_norm kl policy_loss", ""),
        (
            "ppo",
            {"kl_coef": 0.1},
            "approx_kl clipfrac critic_grad_norm grad_norm kl policy_loss value_clipfrac value_loss",
            "explained_variance",
        ),
        ("raft", {}, "approx_kl grad_norm policy_loss", ""),
    ],
)
def test_metrics_have_their_names_and_begin_on_policy(algorithm, changes, losses, charts):
    _, metrics, _, _ = run(algorithm, steps=1, **changes)
    search = "backend_calls duplicate_fraction hit_fraction money p50_ms p99_ms searches seconds"
    parts = {"charts": f"{CHARTS} {charts}", "losses": losses, "search": search, "time": "environment model rollout search update"}
    assert sorted(metrics[1]) == sorted(f"{part}/{name}" for part, names in parts.items() for name in names.split())
    assert metrics[1].get("losses/clipfrac", 0) == 0
    assert abs(metrics[1]["losses/approx_kl"]) < 1e-6
    assert abs(metrics[1]["losses/policy_loss"]) < 10


def test_rollout_metrics_by_hand(episode):
    episodes = [
        episode([1], [2, 3], reward=1.0, metrics={"em": 1.0, "searches": 2.0}, seconds={"model": 1.0}),
        episode([1], [2], [4], [2], reward=0.0, metrics={"em": 0.0, "searches": 0.0}, seconds={"model": 0.5, "search": 0.25}),
        episode([1], [2], reward=0.0, backend_error="gone"),
    ]
    assert rollout_metrics(episodes) == pytest.approx(
        {
            "charts/backend_errors": 1,
            "charts/tokens": 9,
            "charts/episodic_return": 0.5,
            "charts/reward_std": 0.5,
            "charts/sampled_tokens": 2,
            "charts/em": 0.5,
            "charts/searches": 1,
            "charts/search_rate": 0.5,
            "charts/entropy": np.log(2),
            "time/model": 1.5,
            "time/search": 0.25,
            "time/environment": 0,
        }
    )
    assert rollout_metrics(episodes[2:]).keys() == {
        "charts/backend_errors", "charts/tokens", "time/model", "time/search", "time/environment",
    }  # fmt: skip


def test_the_searches_of_a_rollout_are_summed_over_the_processes_and_told_at_once():
    class Two(Parallel):
        """As if another process had done the same."""

        def summed(self, values):
            return {name: 2 * value for name, value in values.items()}

    alone, together, told = {}, {}, {}
    for parallel, metrics in ((Parallel(), alone), (Two(), together)):
        venv = make_env(reward=some_reward)
        before = venv.unwrapped.search_counters()["search/searches"]
        told.clear()
        train(
            make_policy(),
            venv,
            "grpo",
            get_algorithm("grpo").config(**{**SMALL, "steps": 2}),
            on_step=lambda step, values, metrics=metrics: metrics.update({step: dict(values)}),
            on_search=lambda step, counters: told.update({step: counters}),
            parallel=parallel,
        )
        own = venv.unwrapped.search_counters()["search/searches"] - before
        assert sum(values["search/searches"] for values in metrics.values()) == own * (2 if metrics is together else 1) > 0
    assert alone[1]["search/searches"] * 2 == together[1]["search/searches"] == told[0]["search/searches"]
    assert alone[1]["search/duplicate_fraction"] == together[1]["search/duplicate_fraction"]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "reinforce", "reinforce_plus_plus", "rloo", "gspo", "raft"])
def test_without_the_mask_every_algorithm_learns_from_passages_too(algorithm):
    masked, unmasked = (weights(run(algorithm, steps=1, mask_environment=mask)[0]) for mask in (True, False))
    assert unmasked.isfinite().all()
    assert not torch.equal(masked, unmasked)


def test_without_the_mask_the_gradient_is_reinforces_over_all_tokens_behind_the_prompt(monkeypatch):
    seen = []
    plain = totals_of
    monkeypatch.setattr("searchqa_agents.trainer.totals_of", lambda minibatch, step: seen.append(minibatch) or plain(minibatch, step))
    run("reinforce", steps=1, mask_environment=False)
    [minibatch] = seen
    assert minibatch.policy_mask.all()
    behind = [len(ids) - int(np.flatnonzero(mask)[0]) for ids, mask in zip(minibatch.token_ids, minibatch.token_masks, strict=True)]
    assert len(minibatch.policy_mask) == sum(behind)
    assert sum(behind) > 0
    assert not minibatch.old_logprobs.isnan().any()


def test_rewards_are_clipped_before_advantages(monkeypatch):
    seen = []
    plain = totals_of
    monkeypatch.setattr("searchqa_agents.trainer.totals_of", lambda minibatch, step: seen.append(minibatch) or plain(minibatch, step))
    run("reinforce", steps=1, reward_clip=0.25)
    assert 0 < max(minibatch.rewards.max() for minibatch in seen) <= 0.25


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"critic_warmup_ratio": -0.1}, "critic_warmup_ratio"),
        ({"warmup_ratio": 0.5, "warmup_steps": 3}, "not by both"),
        ({"schedule_steps": 0}, "schedule_steps"),
        ({"reward_clip": 0.0}, "reward_clip"),
        ({"mask_environment": False, "credit": "turn"}, "mask_environment"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes, named):
    with pytest.raises(ConfigurationError, match=named):
        run("grpo", **changes)


@pytest.mark.parametrize("name", ["grpo", "raft", "ppo"])
def test_the_trajectories_of_a_rollout_are_told_with_the_advantages_that_are_learned_from(name):
    told = []
    config = get_algorithm(name).config(**{**SMALL, "steps": 1})
    train(make_policy(), make_env(reward=some_reward), name, config, on_rollout=lambda step, trajectories: told.extend(trajectories))
    assert all(one.advantages.dtype == np.float32 and not one.advantages[one.loss_mask == 0].any() for one in told)
    if name == "grpo":  # of the whole episode: (reward - mean) / (standard deviation + epsilon)
        for start in range(0, len(told), 3):
            rewards = np.array([one.reward for one in told[start : start + 3]])
            expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6) if rewards.std() else np.zeros(3)
            for one, value in zip(told[start : start + 3], expected, strict=True):
                assert one.advantages[one.loss_mask == 1] == pytest.approx(value, abs=1e-4)
    if name == "raft":
        assert all((one.advantages[one.loss_mask == 1] == float(one.reward >= 0.5)).all() for one in told)
    assert any(one.advantages.any() for one in told)


def test_a_token_budget_ends_training_with_the_rollout_that_spends_it_and_schedules_follow_its_share():
    seen = []
    config = get_algorithm("grpo").config(**{**SMALL, "steps": 1000}, token_budget=500)
    train(make_policy(), make_env(reward=some_reward), "grpo", config, on_step=lambda step, metrics: seen.append(metrics))
    spent = [metrics["charts/policy_tokens"] for metrics in seen]
    assert spent[-1] >= 500 > spent[-2]
    rates = [config.learning_rate * (0.1 + 0.9 * (1 - before / 500)) for before in [0.0, *spent[:-1]]]
    assert [metrics["charts/learning_rate"] for metrics in seen] == pytest.approx(rates)


def test_training_under_a_budget_goes_on_from_a_checkpoint_to_the_same_weights():
    config = get_algorithm("grpo").config(**{**SMALL, "steps": 1000}, token_budget=500, checkpoint_every=1)
    states = {}
    whole, rest = make_policy(), make_policy()
    train(whole, make_env(reward=some_reward), "grpo", config, on_checkpoint=lambda step, state: states.update({step: state}))
    train(rest, make_env(reward=some_reward), "grpo", config, state=states[1])
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))
    before = [parameter.clone() for parameter in rest.model.parameters()]
    train(rest, make_env(reward=some_reward), "grpo", config, state=states[max(states)])  # all of it is spent
    assert all(torch.equal(a, b) for a, b in zip(before, rest.model.parameters(), strict=True))


@pytest.mark.parametrize("changed", [{"schedule_steps": 5}, {"warmup_steps": 2}])
def test_steps_of_a_schedule_are_refused_where_the_budget_is_in_tokens(changed):
    config = get_algorithm("grpo").config(**SMALL, token_budget=500, **changed)
    with pytest.raises(ConfigurationError, match="warmup_ratio"):
        train(make_policy(), make_env(reward=some_reward), "grpo", config)
