"""Supervised fine-tuning and the warm-up: exact gradients, schedules, determinism, and resuming bit for bit."""

import copy
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents.cli import main
from searchqa_agents.demonstrations import demonstrate, fresh_demonstrations, recorded_demonstrations
from searchqa_agents.models import make_tiny_model
from searchqa_agents.optimisation import AdamW, Optimiser
from searchqa_agents.policy import Policy
from searchqa_agents.settings import EnvSettings
from searchqa_agents.sft import SFTConfig, train_sft
from searchqa_agents.training_run import held_out_split
from searchqa_agents.warmup import WarmupConfig, WarmupError, copying_losses, repeated_chunks, train_warmup
from searchqa_envs.errors import ConfigurationError

SFT = SFTConfig(steps=4, batch_size=8, num_worlds=1, warmup_steps=1)


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
    model = make_tiny_model(
        tokenizer.vocab_size,
        seed,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        hidden_size=32,
        feed_forward_size=48,
        initializer_range=0.1,
    )
    return TagLover(model, tokenizer)


def weights(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()]).clone()


# -- SFT --------------------------------------------------------------------------------------------------------------------------------------


def run_sft(config, state=None, policy=None, batches=None):
    policy = policy or make_policy()
    metrics, states = {}, {}
    batches = batches or fresh_demonstrations(
        make_env(max_segment_tokens=48), "lazy_oracle", batch_size=config.batch_size, seed=config.seed, num_worlds=config.num_worlds
    )
    train_sft(
        policy,
        batches,
        config,
        state=state,
        on_step=lambda step, values: metrics.update({step: values}),
        on_checkpoint=lambda step, saved: states.update({step: saved}),
    )
    return policy, metrics, states


def test_two_and_two_steps_of_sft_are_four_steps_bit_for_bit():
    whole, _, states = run_sft(replace(SFT, checkpoint_every=2))
    again, _, _ = run_sft(SFT)
    resumed, _, _ = run_sft(SFT, state=states[2], policy=make_policy(seed=5))
    assert torch.equal(weights(whole), weights(again))
    assert torch.equal(weights(whole), weights(resumed))


def test_sft_loss_is_the_mean_over_policy_tokens_and_falls():
    batch = fresh_demonstrations(make_env(max_segment_tokens=48), "oracle", batch_size=6, seed=1)(0)
    policy = make_policy()
    with torch.no_grad():
        expected = -policy.evaluate([t.token_ids for t in batch], [t.loss_mask for t in batch]).logprob.mean().item()
    _, metrics, _ = run_sft(replace(SFT, steps=30, learning_rate=1e-2), policy=policy, batches=lambda step: batch)
    assert metrics[1]["losses/sft_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics[30]["losses/sft_loss"] < 0.5 * expected
    assert metrics[1]["charts/tokens"] == sum(t.loss_mask.sum() for t in batch)


def test_sft_micro_batches_change_nothing_but_rounding():
    batch = fresh_demonstrations(make_env(max_segment_tokens=48), "oracle", batch_size=6, seed=1)(0)
    losses = [run_sft(replace(SFT, steps=3, max_tokens=n), batches=lambda step: batch)[1][3]["losses/sft_loss"] for n in (50, 10_000)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_retokenized_trajectories_are_refused():
    batch = [replace(t, retokenized=True) for t in fresh_demonstrations(make_env(), "direct", batch_size=2, seed=1)(0)]
    with pytest.raises(ConfigurationError, match="encoded anew"):
        run_sft(SFT, batches=lambda step: batch)


def test_fresh_demonstrations_are_new_each_step_and_a_function_of_the_seed():
    venv = make_env(max_segment_tokens=48)
    a, b, other = (fresh_demonstrations(venv, "lazy_oracle", batch_size=6, seed=seed) for seed in (1, 1, 2))
    assert a(3) == b(3)
    assert {t.question_id for t in a(3)}.isdisjoint(t.question_id for t in a(4))
    assert {t.question_id for t in a(3)} != {t.question_id for t in other(3)}


def test_recorded_demonstrations_go_round_all_before_any_comes_again():
    recorded = demonstrate(make_env(max_segment_tokens=48), "oracle", [0, 1, 2, 3, 4])
    batches = recorded_demonstrations(recorded, batch_size=3, seed=0)
    seen = [t.question_id for step in range(5) for t in batches(step)]
    for epoch in range(3):
        assert sorted(seen[5 * epoch : 5 * epoch + 5]) == sorted(t.question_id for t in recorded)
    assert seen[:5] != seen[5:10]
    assert batches(2) == recorded_demonstrations(recorded, batch_size=3, seed=0)(2)


# -- warm-up and optimiser --------------------------------------------------------------------------------------------------------------------


def test_a_warm_up_that_does_not_get_there_says_so():
    with pytest.raises(WarmupError, match=r"After max_steps=3 steps the copying losses are \d.*not both below target_loss=0.1"):
        train_warmup(make_policy(), WarmupConfig(max_steps=3, batch_size=4))


def test_the_warm_up_ends_at_its_target_and_resumes():
    config = WarmupConfig(max_steps=100, check_every=5, batch_size=8, checkpoint_every=5)
    policy, states = make_policy(), {}
    config.target_loss = max(copying_losses(policy, config, seed=0)) - 0.3
    config.shuffle_below = config.target_loss + 0.1  # both kinds of sequences have their turn
    steps = train_warmup(policy, config, on_checkpoint=lambda step, state: states.update({step: copy.deepcopy(state)}))
    assert 5 < steps < 100
    assert max(copying_losses(policy, config, seed=1)) < config.target_loss + 0.1
    resumed = make_policy(seed=4)
    assert train_warmup(resumed, config, state=states[5]) == steps
    assert torch.equal(weights(policy), weights(resumed))


def test_repeated_chunks_come_again_in_other_orders_and_the_mask_is_what_can_be_known():
    ids, masks = repeated_chunks(np.random.default_rng(0), np.arange(5, 90, dtype=np.int32), 50, num_chunks=4, chunk_length=3, copies=2)
    orders = set()
    for row, mask in zip(ids, masks, strict=True):
        first, *copies = row.reshape(3, 4, 3).tolist()
        assert all(sorted(copy_) == sorted(first) for copy_ in copies)
        orders.add(tuple(first.index(chunk) for chunk in copies[0]))
        assert mask.tolist() == [0] * 12 + [0, 1, 1] * 8
    assert len(orders) > 10
    assert set(np.concatenate(ids).tolist()) == set(range(5, 90))


def test_the_learning_rate_rises_and_falls_linearly():
    settings = AdamW(
        learning_rate=1.0, betas=(0.9, 0.98), weight_decay=0, warmup_steps=4, final_fraction=0.2, total_steps=12, max_grad_norm=1
    )
    optimiser = Optimiser(dict(make_policy().model.named_parameters()), settings)
    assert [optimiser.learning_rate(step) for step in (0, 1, 3, 4, 8, 12, 99)] == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.6, 0.2, 0.2])


def test_a_frozen_policy_cannot_be_trained():
    policy = make_policy()
    policy.model.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="no trainable parameters"):
        run_sft(SFT, policy=policy)


@pytest.mark.parametrize(
    ("env_id", "split"),
    [("SearchQA-World-v0", "test"), ("SearchQA-NQ-v0", "test"), ("SearchQA-HotpotQA-v0", "dev"), ("SearchQA-Custom-v0", "test")],
)
def test_training_is_measured_on_the_split_that_a_set_holds_out(env_id, split):
    assert held_out_split(EnvSettings(id=env_id)) == split


@pytest.mark.data
def test_training_on_real_questions_runs(tmp_path):
    line = "env=hotpotqa env.tokenizer=world recipe=smoke start=shipped threads=1 evaluation.questions=4 algo=ppo"
    assert main(["train", *line.split(), f"run_dir={tmp_path / 'run'}"]) == 0
    assert '"measured_on": "dev"' in (tmp_path / "run" / "stamp.json").read_text()
