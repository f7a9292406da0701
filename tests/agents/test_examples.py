"""The living examples: each trains, reproducibly, only on tokens that the policy sampled, and (slow) learns."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import searchqa_envs  # noqa: F401, registers the ids
from searchqa_agents.advantages import gae
from searchqa_agents.loading import shipped_checkpoint
from searchqa_agents.losses import clipped_policy_loss
from searchqa_agents.policy import Policy
from searchqa_envs.wrappers import PaddedTokens, TokenLevel
from searchqa_retrievers import RetrieverUnavailable

FOLDER = Path(__file__).resolve().parents[1] / "examples"
NAMES = ["reinforce", "ppo", "token_level", "torchrl_ppo"]
SMALL = {
    "ppo": {"num_envs": 6, "num_steps": 3, "num_updates": 2},
    "token_level": {"num_envs": 4, "num_steps": 24, "num_updates": 2},
    "torchrl_ppo": {"num_envs": 6, "num_steps": 3, "num_updates": 2},
}


def load(name):
    if name == "torchrl_ppo":
        pytest.importorskip("torchrl", reason="this example needs TorchRL: pip install torchrl")
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(name, seed=0, **env_arguments):
    """The weights after two small updates, as one vector."""
    module = load(name)
    if name == "reinforce":
        policy = module.train(seed, updates=2, num_envs=8, **env_arguments)
    else:
        policy = module.train(module.Args(seed=seed, **SMALL[name]), **env_arguments)
    return weights(policy)


def weights(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()])


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shipped(venv):
    return Policy.load(shipped_checkpoint(), venv.unwrapped.tokenizer)


class Down:
    """A search back end that never answers."""

    def __deepcopy__(self, memo):
        return self

    def search(self, requests):
        raise RetrieverUnavailable("the search server is gone")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("trl_grpo", {"updates": 1, "questions": 4, "group_size": 4}),
        ("sb3_train", {"algorithm": "ppo", "timesteps": 24, "n_envs": 6, "n_steps": 4, "batch_size": 12}),
        ("sb3_train", {"algorithm": "a2c", "timesteps": 24, "n_envs": 6, "n_steps": 4}),
    ],
)
def test_an_example_of_a_library_trains(name, arguments, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    policy = load(name).train(**arguments)
    after = weights(getattr(policy, "language_model", policy))
    assert torch.isfinite(after).all()
    assert not torch.equal(after, weights(shipped(gym.make("SearchQA-World-v0"))))


def test_the_skyrl_example_answers_its_question(capsys):
    assert load("skyrl_env").main() == 1.0
    assert "<information>" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_training_changes_the_weights_and_is_a_function_of_the_seed(name):
    before = weights(shipped(gym.make("SearchQA-World-v0")))
    after = trained(name)
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
    assert torch.equal(after, trained(name))
    assert not torch.equal(after, trained(name, seed=1))


@pytest.mark.parametrize("name", NAMES)
def test_episodes_that_lost_their_search_back_end_are_not_learned_from(name, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("an update was made, with nothing to learn from"))
    after = trained(name, retriever=Down())
    assert torch.equal(after, weights(shipped(gym.make("SearchQA-World-v0"))))


def make_parts(seed=0, **arguments):
    """One rollout of the PPO example, and what it was made with."""
    module = load("ppo")
    args = module.Args(seed=seed, num_envs=6, num_steps=3)
    venv = gym.make_vec("SearchQA-World-v0", num_envs=6, autoreset_mode="SAME_STEP", hops=2, **arguments)
    policy = shipped(venv)
    policy.add_value_head()
    return module, policy, module.Rollout(venv, policy, args)


def test_ppo_has_the_logprobs_of_exactly_the_tokens_sampled_in_a_rollout():
    _, policy, rollout = make_parts()
    sampled = 0
    for _ in range(3):  # episodes go on from one rollout to the next
        parts, _ = rollout.collect()
        stats = policy.evaluate([part.token_ids for part in parts], [part.mask for part in parts])
        assert np.abs(np.concatenate([part.logprobs for part in parts]) - stats.logprob.detach().numpy()).max() < 1e-4
        assert any(not part.done for part in parts)
        sampled += sum(int(part.mask.sum()) for part in parts)
        texts = [policy.tokenizer.decode(part.token_ids[part.mask == 1].tolist()) for part in parts]
        assert not any("<information>" in text or "what is" in text for text in texts)
        assert sum(text.count("</search>") + text.count("</answer>") for text in texts) == 18  # 6 environments, 3 segments each
    assert sampled > 0


def test_ppo_writes_cleanrls_metrics_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module = load("ppo")
    module.train(module.Args(num_envs=6, num_steps=3, num_updates=2, tensorboard_dir=tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"charts/episodic_return", "charts/SPS", "losses/approx_kl", "losses/clipfrac"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("losses/policy_loss")] == [18, 36]  # environment steps


def test_ppo_estimates_the_advantages_of_the_library():
    module, _, rollout = make_parts(seed=3)
    parts, _ = rollout.collect()
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(sum(len(part.logprobs) for part in parts), generator=generator)
    last_values = torch.tensor([0.0 if part.done else 0.7 for part in parts])
    sequence_ids = torch.tensor([number for number, part in enumerate(parts) for _ in part.logprobs])
    rewards = torch.cat([torch.tensor([0.0] * (len(part.logprobs) - 1) + [part.reward]) for part in parts])
    expected = gae(rewards, values, sequence_ids, 0.99, 0.9, bootstrap_values=last_values).advantages
    torch.testing.assert_close(module.gae(parts, values, last_values, 0.99, 0.9), expected)


def test_ppo_takes_over_the_critics_value_where_an_episode_goes_on():
    module, policy, rollout = make_parts()
    torch.nn.init.normal_(policy.scorer.value_head.weight, generator=torch.Generator().manual_seed(0))
    parts, _ = rollout.collect()
    going_on = [number for number, part in enumerate(parts) if not part.done]
    values = module.next_values(policy, parts)
    # the next rollout of the same policy evaluates those states: each is where its first token is chosen
    following, _ = rollout.collect()
    for number in going_on:
        [after] = [part for part in following if np.array_equal(part.token_ids[: len(parts[number].token_ids)], parts[number].token_ids)]
        first = policy.evaluate([after.token_ids], [after.mask]).value[0]
        assert values[number] == pytest.approx(float(first.detach()), abs=1e-4)
    assert going_on
    assert all(values[number] == 0 for number in range(len(parts)) if parts[number].done)


def turns_of_an_episode(env, policy, seed):
    """Of each turn: the padded observation, the context in it, and the segment that the policy wrote."""
    session = policy.start([seed], load("ppo").Sampling(env.unwrapped.max_segment_tokens, env.unwrapped.dialect.closers))
    observation, info = env.reset(seed=seed)
    turns, ended = [], False
    while not ended:
        context = observation["input_ids"][observation["attention_mask"] == 1]
        [segment] = session.generate([0], [context], [info])
        turns.append((observation, context, segment))
        action = np.zeros(env.action_space.shape, dtype=np.int64)
        action[: len(segment.ids)] = segment.ids
        observation, _, terminated, truncated, info = env.step(action)
        ended = terminated or truncated
    return turns


def test_the_token_level_agent_has_the_policys_logprobs_whatever_the_padding():
    module = load("token_level")
    env = PaddedTokens(TokenLevel(gym.make("SearchQA-World-v0", hops=2, max_context_tokens=128)))
    policy = shipped(env)
    agent = module.Agent(policy.model, policy.tokenizer.pad_id)
    torch.manual_seed(0)
    observation, _ = env.reset(seed=0)
    observations, actions, ended = [], [], False
    while not ended:
        observations.append({name: torch.from_numpy(array) for name, array in observation.items()})
        with torch.no_grad():
            distribution, _ = agent(**{name: tensor[None] for name, tensor in observations[-1].items()})
        actions.append(distribution.sample()[0])
        observation, _, terminated, truncated, info = env.step(int(actions[-1]))
        ended = terminated or truncated
    context, mask = observation["input_ids"][observation["attention_mask"] == 1], info["turn_record"].loss_mask
    expected = policy.evaluate([context], [mask]).logprob  # [tokens], of the whole episode at once
    batch = {name: torch.stack([one[name] for one in observations]) for name in observation}
    distribution, _ = agent(**batch)  # of contexts of all lengths, so that most of them are padded
    assert len(actions) == int(mask.sum()) > 10
    assert (distribution.log_prob(torch.stack(actions)) - expected).abs().max() < 1e-4
    assert distribution.probs[:, policy.tokenizer.pad_id].max() == 0


def test_torchrls_distribution_gives_the_same_logprobs_when_sampled_and_when_evaluated():
    module = load("torchrl_ppo")
    env = PaddedTokens(gym.make("SearchQA-World-v0", hops=2, max_context_tokens=128))
    policy = shipped(env)
    turns = next(turns for seed in range(20) if len(turns := turns_of_an_episode(env, policy, seed)) > 2)
    batch = [torch.from_numpy(np.stack([turn[0][name] for turn in turns])) for name in ("input_ids", "attention_mask")]
    sampling = module.Sampling(env.unwrapped.max_segment_tokens, env.unwrapped.dialect.closers)
    distribution = module.SegmentDistribution(*batch, policy=policy, sampling=sampling, rng=np.random.default_rng(0))
    actions = distribution.sample()
    assert actions.shape == (len(turns), sampling.max_new_tokens)
    evaluated = distribution.log_prob(actions.clone())  # a copy, so that it is evaluated and not remembered
    assert (distribution.log_prob(actions) - evaluated).abs().max() < 1e-4
    assert (evaluated[actions == policy.tokenizer.pad_id] == 0).all()
    evaluated.sum().backward()
    assert policy.model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_torchrls_loss_clips_the_ratio_of_each_token():
    module = load("torchrl_ppo")
    from tensordict import TensorDict

    env = PaddedTokens(gym.make("SearchQA-World-v0", hops=2, max_context_tokens=128))
    policy = shipped(env)
    turns = [turn for seed in range(3) for turn in turns_of_an_episode(env, policy, seed)]
    names = ("input_ids", "attention_mask")
    batch = TensorDict({name: torch.from_numpy(np.stack([turn[0][name] for turn in turns])) for name in names}, [len(turns)])
    sampling = module.Sampling(env.unwrapped.max_segment_tokens, env.unwrapped.dialect.closers)
    actor, critic = module.actor_and_critic(policy, sampling, np.random.default_rng(0))
    actor(batch)
    written = batch["action"] != policy.tokenizer.pad_id  # bool[B, L]
    generator = torch.Generator().manual_seed(0)
    shift = torch.where(written, torch.randn(written.shape, generator=generator), torch.tensor(0.0))  # as if the policy had changed since
    advantage = torch.randn(len(turns), 1, generator=generator)
    batch["action_log_prob"], batch["advantage"] = batch["action_log_prob"] - shift, advantage
    batch["value_target"] = torch.zeros(len(turns), 1)
    loss = module.ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_bonus=False, functional=False)(batch)["loss_objective"]
    tokens = advantage.expand(written.shape)[written]
    expected = clipped_policy_loss(shift[written], torch.zeros_like(tokens), tokens, float(written.numel()), clip_coef=0.2).loss
    expected = expected - advantage.expand(written.shape)[~written].sum() / written.numel()  # padding: a constant
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-5)


def test_torchrls_rollout_leaves_out_all_steps_of_a_lost_episode():
    module = load("torchrl_ppo")
    from tensordict import TensorDict

    lost = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)[..., None]
    traj_ids = torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]])
    batch = TensorDict({"collector": {"traj_ids": traj_ids}, "next": {"lost": lost}, "number": torch.arange(8).view(2, 4)}, [2, 4])
    assert module.kept(batch)["number"].tolist() == [2, 3, 4, 5]


def test_each_example_reads_in_one_go_and_uses_no_training_of_ours():
    assert len((FOLDER / "reinforce.py").read_text().splitlines()) <= 60
    for name in NAMES:
        text = (FOLDER / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 250
        ours = {line.split()[1] for line in text.splitlines() if line.strip().startswith("from searchqa")}
        allowed = {"searchqa_agents.language_model", "searchqa_agents.loading", "searchqa_agents.policy", "searchqa_envs.wrappers"}
        assert ours <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_each_example_learns(name, seed):
    load(name)  # skips where its library is not installed
    line = [sys.executable, str(FOLDER / f"{name}.py"), "--seed", str(seed)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["em_before"] == pytest.approx(0.336, abs=0.001)
    assert result["em_after"] > result["em_before"] + 0.3
