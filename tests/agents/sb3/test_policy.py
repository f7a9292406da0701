"""The policy under Stable-Baselines3: one evaluation path, bounded memory, and algorithms that run unmodified."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env as make_single_envs
from stable_baselines3.common.evaluation import evaluate_policy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import searchqa_envs  # noqa: F401, registers the ids
from searchqa_agents.cli import main
from searchqa_agents.models import make_tiny_model
from searchqa_agents.policy import Policy
from searchqa_agents.sb3 import EpisodeMetricsCallback, ProgressCallback, SearchQAPolicy, make_vec_env
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.spaces import PaddedContext
from searchqa_envs.tokenizers import build_tokenizer
from searchqa_envs.wrappers import PaddedTokens, TokenLevel

torch.set_num_threads(1)

WORLD = {"hops": 2, "num_worlds": 3, "max_context_tokens": 512}


def make_env(n_envs=4, level="segment", **arguments):
    return make_vec_env("SearchQA-World-v0", n_envs, level=level, **{**WORLD, **arguments})


def make_policy(env, **settings):
    return SearchQAPolicy(env.observation_space, env.action_space, lambda progress: 1e-3, **settings)


def tensors(observation):
    return {name: torch.as_tensor(column) for name, column in observation.items()}


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.policy.named_parameters()}


def played(env, policy, steps=3):
    """Observations and actions of some steps of the policy, one after the other."""
    observation, observations, actions = env.reset(), [], []
    for _ in range(steps):
        with torch.no_grad():
            action = policy(tensors(observation))[0]
        observations.append(tensors(observation))
        actions.append(action)
        observation = env.step(action.numpy())[0]
    return {name: torch.cat([one[name] for one in observations]) for name in observations[0]}, torch.cat(actions)


# -- one evaluation path -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["segment", "token"])
@pytest.mark.parametrize("settings", [{}, {"logprob_reduction": "sum"}, {"temperature": 0.7, "max_tokens": 300}])
def test_rollout_and_evaluation_agree(level, settings):
    env = make_env(8, level)
    policy = make_policy(env, **settings)
    torch.nn.init.normal_(policy.scorer.value_head.weight, std=0.1)
    observation = env.reset()
    torch.manual_seed(0)
    for _ in range(4):
        obs = tensors(observation)
        with torch.no_grad():
            actions, values, logprobs = policy(obs)
            # as a buffer gives actions back
            again_values, again_logprobs, entropies = policy.evaluate_actions(obs, actions.float() if level == "segment" else actions)
            predicted = policy.predict_values(obs)
        assert actions.shape == ((8, 48) if level == "segment" else (8,))
        assert values.shape == again_values.shape == predicted.shape == (8, 1)
        torch.testing.assert_close(logprobs, again_logprobs, atol=1e-4, rtol=0)
        torch.testing.assert_close(values, again_values, atol=1e-5, rtol=0)
        torch.testing.assert_close(values, predicted, atol=1e-5, rtol=0)
        assert values.std() > 0
        assert (entropies > -1e-4).all()
        if level == "token":
            with torch.no_grad():
                distribution = policy.get_distribution(obs)
            torch.testing.assert_close(distribution.log_prob(actions), logprobs, atol=1e-4, rtol=0)
            torch.testing.assert_close(distribution.entropy(), entropies, atol=1e-4, rtol=0)
        observation = env.step(actions.numpy())[0]


def test_a_segment_is_reduced_over_its_own_tokens():
    """Against the tokens' log-probabilities and entropies of ``Policy.evaluate``, one row at a time."""
    env = make_env()
    policies = {reduction: make_policy(env, logprob_reduction=reduction) for reduction in ("mean", "sum")}
    torch.manual_seed(1)
    obs, actions = played(env, policies["mean"], steps=1)
    results = {reduction: policy.evaluate_actions(obs, actions) for reduction, policy in policies.items()}
    policy = policies["mean"].language_model
    for row in range(4):
        context = obs["input_ids"][row][obs["attention_mask"][row] == 1].numpy()
        segment = actions[row][actions[row] != policy.tokenizer.pad_id].numpy()
        mask = np.repeat(np.array([0, 1], dtype=np.int8), [len(context), len(segment)])
        stats = policy.evaluate([np.concatenate([context, segment]).astype(np.int32)], [mask])
        for reduction in ("mean", "sum"):
            _, logprobs, entropies = results[reduction]
            torch.testing.assert_close(logprobs[row], getattr(stats.logprob, reduction)(), atol=1e-5, rtol=0)
            torch.testing.assert_close(entropies[row], getattr(stats.entropy, reduction)(), atol=1e-5, rtol=0)


def test_an_empty_segment_has_a_value_and_no_gradient_on_the_policy():
    env = make_env(2)
    policy = make_policy(env, detach_value=True)
    obs = tensors(env.reset())
    empty = torch.full((2, 48), env.observation_space.pad_id)
    values, logprobs, entropies = policy.evaluate_actions(obs, empty)
    torch.testing.assert_close(values, policy.predict_values(obs))
    assert (logprobs.tolist(), entropies.tolist()) == ([0.0, 0.0], [0.0, 0.0])
    logprobs.sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in policy.parameters())


def test_deterministic_actions_are_evaluated_at_the_policys_temperature():
    env = make_env(2)
    policy = make_policy(env, temperature=0.5)
    obs = tensors(env.reset())
    state = torch.get_rng_state()
    with torch.no_grad():
        actions, _, logprobs = policy(obs, deterministic=True)
        torch.testing.assert_close(logprobs, policy.evaluate_actions(obs, actions)[1], atol=1e-4, rtol=0)
        assert torch.equal(policy(obs, deterministic=True)[0], actions)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("detached", [False, True])
def test_the_values_gradient_stays_out_of_the_trunk_when_asked(detached):
    env = make_env(2)
    policy = make_policy(env, detach_value=detached)
    torch.nn.init.normal_(policy.scorer.value_head.weight)
    obs, actions = played(env, policy, steps=1)
    for values in (policy.predict_values(obs), policy.evaluate_actions(obs, actions)[0]):
        policy.zero_grad()
        values.sum().backward()
        reached = {name for name, parameter in policy.named_parameters() if parameter.grad is not None and parameter.grad.any()}
        assert {"scorer.value_head.weight", "scorer.value_head.bias"} <= reached
        assert (len(reached) == 2) is detached


# -- memory --------------------------------------------------------------------------------------------------------------------------------


def kept_bytes(evaluate):
    """Bytes that a forward pass keeps for its backward pass, weights left out."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = evaluate()
    total = sum(kept.values())
    del result
    return total


@pytest.mark.parametrize("which", ["evaluate_actions", "predict_values"])
def test_memory_does_not_grow_with_the_minibatch(which):
    env = make_env(8)
    policy = make_policy(env, max_tokens=2048)
    obs, actions = played(env, policy)

    def keeps(times):
        repeated = {name: column.repeat(times, 1) for name, column in obs.items()}
        if which == "predict_values":
            return kept_bytes(lambda: policy.predict_values(repeated))
        return kept_bytes(lambda: policy.evaluate_actions(repeated, actions.repeat(times, 1)))

    rows = len(actions)
    assert keeps(16) <= 16 * 16 * rows  # a few numbers for each row
    assert keeps(32) <= 16 * 32 * rows
    policy.settings["max_tokens"] = 10**9
    assert keeps(4) > 4 * 100_000 * rows  # what one forward pass keeps


@pytest.mark.parametrize("settings", [{"max_tokens": 300}, {"max_tokens": 300, "gradient_checkpointing": True}])
def test_gradients_are_those_of_one_forward_pass(settings):
    env = make_env(8)
    obs, actions = played(env, make_policy(env))
    gradients = []
    for own in ({}, settings):
        policy = make_policy(env, logprob_reduction="sum", **own)
        torch.nn.init.constant_(policy.scorer.value_head.weight, 0.1)
        values, logprobs, entropies = policy.evaluate_actions(obs, actions)
        (values.square().mean() + logprobs.mean() + entropies.mean() + policy.predict_values(obs).mean()).backward()
        gradients.append({name: parameter.grad for name, parameter in policy.named_parameters()})
    assert all(gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-4)


# -- algorithms ----------------------------------------------------------------------------------------------------------------------------

SMALL = {
    "ppo": (PPO, {"n_steps": 4, "batch_size": 8, "n_epochs": 2}),
    "a2c": (A2C, {"n_steps": 4}),
}


@pytest.mark.parametrize("name", SMALL)
def test_algorithms_train_with_no_policy_arguments_and_the_same_seed_gives_the_same_weights(name):
    algorithm, settings = SMALL[name]

    def trained(seed):
        model = algorithm(SearchQAPolicy, make_env(), gamma=1.0, seed=seed, **settings)
        before = parameters(model)
        model.learn(32)
        after = parameters(model)
        assert any(not torch.equal(before[key], after[key]) for key in before)
        return after

    first, second, other = trained(1), trained(1), trained(2)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_callbacks_logs_and_files_of_stable_baselines3(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    env = make_env(monitor_dir=tmp_path / "monitor")
    model = PPO(SearchQAPolicy, env, n_steps=4, batch_size=16, n_epochs=1, gamma=1.0, tensorboard_log=str(tmp_path / "board"))
    held_out = make_env(2, split="dev")
    evaluation = EvalCallback(held_out, n_eval_episodes=4, eval_freq=4, best_model_save_path=str(tmp_path / "best"), verbose=0)
    metrics = EpisodeMetricsCallback()
    checkpoints = CheckpointCallback(save_freq=4, save_path=str(tmp_path / "checkpoints"))
    model.learn(32, callback=[ProgressCallback(), metrics, evaluation, checkpoints])
    assert env.get_attr("rules")[0].progress == (16, 32)  # before the last rollout
    board = EventAccumulator(str(next((tmp_path / "board").iterdir()))).Reload()
    assert {"rollout/em", "rollout/searches", "rollout/backend_errors", "eval/mean_reward", "train/approx_kl"} <= set(
        board.Tags()["scalars"]
    )
    assert len(list((tmp_path / "checkpoints").glob("*.zip"))) == 2
    assert (tmp_path / "monitor" / "monitor.csv").is_file()
    assert metrics.backend_errors == 0
    mean_reward, _ = evaluate_policy(PPO.load(tmp_path / "best" / "best_model"), held_out, n_eval_episodes=4)
    assert 0 <= mean_reward <= 1


def test_lost_searches_are_counted_and_do_not_stop_training():
    class Flaky:
        def __init__(self, inner):
            self.inner, self.calls = inner, 0

        def search(self, requests):
            self.calls += 1
            if self.calls % 2:
                raise ConnectionError("gone")
            return self.inner.search(requests)

    inner = make_env(1).get_attr("rules")[0].retriever
    env = make_env(retriever=Flaky(inner))
    metrics = EpisodeMetricsCallback()
    PPO(SearchQAPolicy, env, n_steps=4, batch_size=16, n_epochs=1, gamma=1.0).learn(16, callback=metrics)
    assert metrics.backend_errors == env.backend_errors > 0


def test_stable_baselines3s_own_vector_environment_works_too():
    env = make_single_envs("SearchQA-World-v0", 2, wrapper_class=PaddedTokens, env_kwargs=WORLD)
    model = PPO(SearchQAPolicy, env, n_steps=4, batch_size=8, n_epochs=1, gamma=1.0)
    model.learn(8, callback=[ProgressCallback(), EpisodeMetricsCallback()])
    assert env.env_method("get_wrapper_attr", "rules")[1].progress == (0, 8)
    single = PaddedTokens(gym.make("SearchQA-World-v0", **WORLD))
    A2C(SearchQAPolicy, single, n_steps=2).learn(2)
    observation, _ = single.reset(seed=0)
    action, _ = model.predict(observation)
    assert action.shape == (48,)
    assert single.action_space.contains(action)
    tokens = PaddedTokens(TokenLevel(gym.make("SearchQA-World-v0", **WORLD)))
    model = A2C(SearchQAPolicy, tokens, n_steps=4).learn(4)
    action, _ = model.predict(tokens.reset(seed=0)[0])
    assert tokens.action_space.contains(action)


@pytest.mark.slow
def test_trpo_keeps_to_its_trust_region_and_moves_the_whole_model():
    env = make_env(2, "token", max_segment_tokens=4, max_observation_tokens=16)
    settings = {"n_steps": 12, "batch_size": 24, "n_critic_updates": 1, "cg_max_steps": 4}
    model = TRPO(SearchQAPolicy, env, gamma=1.0, seed=0, policy_kwargs={"detach_value": True}, **settings)
    torch.nn.init.normal_(model.policy.scorer.value_head.weight, std=0.1)  # else no advantage differs before the first reward
    before = parameters(model)
    model.learn(24)
    logged = model.logger.name_to_value
    assert 0 < logged["train/kl_divergence_loss"] <= 0.01
    assert logged["train/is_line_search_success"] == 1
    still = {name for name, value in parameters(model).items() if torch.equal(value, before[name])}
    assert still == set()


def test_the_distribution_is_twice_differentiable():
    env = make_env(2, "token")
    policy = make_policy(env)
    distribution = policy.get_distribution(tensors(env.reset()))
    weight = policy.language_model.model.get_input_embeddings().weight
    (first,) = torch.autograd.grad(distribution.entropy().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    assert second.abs().sum() > 0


def test_adapters_alone_are_trained():
    pytest.importorskip("peft")
    env = make_env()
    model = PPO(SearchQAPolicy, env, n_steps=4, batch_size=16, n_epochs=1, gamma=1.0, policy_kwargs={"lora": {"rank": 2}})
    torch.nn.init.normal_(model.policy.scorer.value_head.weight, std=0.1)  # so that there are advantages without a reward
    before = parameters(model)
    model.learn(16)
    changed = {name for name, value in parameters(model).items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".lora_" in name or "value_head" in name for name in changed)


# -- saving --------------------------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_policies_act_identically(tmp_path, monkeypatch):
    env = make_env(2, seed=4)
    settings = {"temperature": 3.0}  # flat, so that samples differ
    model = PPO(SearchQAPolicy, env, n_steps=4, batch_size=8, n_epochs=1, gamma=1.0, learning_rate=1e-3, seed=0, policy_kwargs=settings)
    model.learn(8)
    model.save(tmp_path / "model.zip")
    model.policy.save(tmp_path / "policy.pt")
    model.policy.export(tmp_path / "folder")
    with torch.no_grad():
        model.policy.scorer.value_head.weight += 0.5  # a policy that is loaded must not have what this one has now
    observation = env.reset()
    exported = Policy.load(tmp_path / "folder", build_tokenizer("world"))
    weights = model.policy.language_model.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in exported.model.state_dict().items())

    def acts(policy):
        torch.manual_seed(9)
        return [policy.predict(observation, deterministic=deterministic)[0] for deterministic in (True, False, False)]

    expected = acts(model.policy)
    assert not np.array_equal(expected[1], expected[2])
    again = PPO.load(tmp_path / "model.zip", env=env)
    for loaded in (again.policy, SearchQAPolicy.load(tmp_path / "policy.pt")):
        for own, other in zip(expected, acts(loaded), strict=True):
            np.testing.assert_array_equal(own, other)
    assert not torch.equal(again.policy.scorer.value_head.weight, model.policy.scorer.value_head.weight)
    again.learn(8)
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        PPO.load(tmp_path / "model.zip", env=make_env(max_context_tokens=600))

    monkeypatch.chdir(tmp_path)
    line = f"eval env=world env.hops=2 agent=lm agent.checkpoint={tmp_path / 'folder'} questions=1 num_envs=1 threads=1 run_dir=run"
    assert main(line.split()) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())


# -- what cannot be ------------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_said():
    env = make_env(1)
    plain = gym.make("SearchQA-World-v0", **WORLD).observation_space
    schedule = float
    with pytest.raises(ConfigurationError, match=r"got the observation space TokenSequence.*make_vec_env"):
        SearchQAPolicy(plain, env.action_space, schedule)
    with pytest.raises(ConfigurationError, match="MultiDiscrete or Discrete; got Box"):
        SearchQAPolicy(env.observation_space, spaces.Box(0, 1), schedule)
    with pytest.raises(ConfigurationError, match="MultiDiscrete or Discrete"):
        SearchQAPolicy(env.observation_space, spaces.MultiDiscrete([3, 4]), schedule)
    with pytest.raises(ConfigurationError, match=r"exact up to 16777216 ids; this vocabulary has 16777217"):
        SearchQAPolicy(env.observation_space, spaces.Discrete(2**24 + 1), schedule)
    with pytest.raises(ConfigurationError, match=r"made with tokenizer 'world.*the environment's is 'byte.*tokenizer='world'"):
        make_policy(make_env(1, tokenizer="byte", max_segment_tokens=64, max_context_tokens=2048, max_observation_tokens=512))
    for settings, said in (
        ({"temperature": 0.0}, "temperature must be above 0; got 0.0"),
        ({"logprob_reduction": "max"}, "'mean' or 'sum'; got 'max'"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1; got 0"),
        ({"use_sde": True}, "use_sde"),
        ({"dtype": "int8"}, "dtype must be float32 or bfloat16; got 'int8'"),
        ({"checkpoint": "nowhere"}, "no folder nowhere"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            make_policy(env, **settings)
    policy = make_policy(env)
    obs = tensors(env.reset())
    with pytest.raises(ConfigurationError, match='level="token"'):
        policy.get_distribution(obs)
    with pytest.raises(ConfigurationError, match="norm_obs=False"):
        policy.predict_values({**obs, "input_ids": obs["input_ids"].float()})


def test_padded_contexts_of_two_tokenizers_differ():
    left, right = (PaddedContext(300, 8, tokenizer=name, pad_id=0, closers=()) for name in ("a", "b"))
    assert left != right
    assert left == PaddedContext(300, 8, tokenizer="a", pad_id=0, closers=())


def test_a_missing_library_is_named():
    code = "import sys; sys.modules['stable_baselines3'] = None; import searchqa_agents.sb3"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert "EngineNotFoundError: This adapter needs Stable-Baselines3" in done.stderr
    assert "pip install 'searchqa-gym[sb3]'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "a2c"])
def test_the_example_learns(algorithm):
    script = Path(__file__).parents[2] / "examples" / "sb3_train.py"
    line = [sys.executable, str(script), "--algorithm", algorithm, "--seed", "20", "--split", "dev", "--timesteps", "5120"]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=900)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["em_after"] > result["em_before"] + 0.3


def only_valid(episode):
    return {"valid": float(episode.turns[0].action.kind != "invalid")}


@pytest.mark.slow
def test_trpo_learns_to_write_what_can_be_read():
    """Sampled at temperature 2.5 the shipped policy rarely closes its tags; contexts stay short, because TRPO's cost grows with them."""
    arguments = {"max_turns": 1, "max_segment_tokens": 8, "num_worlds": 50, "hops": 2, "reward": only_valid}
    env, held_out = (make_vec_env("SearchQA-World-v0", 8, level="token", **arguments) for _ in range(2))
    settings = {"n_steps": 16, "batch_size": 64, "n_critic_updates": 5, "cg_max_steps": 5, "line_search_max_iter": 15, "target_kl": 0.05}
    policy = {"temperature": 2.5, "detach_value": True}
    model = TRPO(SearchQAPolicy, env, gamma=1.0, gae_lambda=1.0, seed=20, policy_kwargs=policy, **settings)
    before, _ = evaluate_policy(model, held_out, n_eval_episodes=200, deterministic=False)
    model.learn(24 * 128)
    after, _ = evaluate_policy(model, held_out, n_eval_episodes=200, deterministic=False)
    assert after > before + 0.12


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_a_model_with_its_own_tokenizer_trains_is_saved_and_loaded(dtype, tolerance, tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["[end]", "[pad]"], initial_alphabet=alphabet, show_progress=False)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[end]", pad_token="[pad]").save_pretrained(tmp_path / "model")
    shape = {"hidden_size": 16, "num_heads": 2, "feed_forward_size": 16}
    make_tiny_model(300, 0, pad_id=1, eos_id=0, **shape).save_pretrained(tmp_path / "model")
    env = make_env(tokenizer=str(tmp_path / "model"), max_segment_tokens=12, max_observation_tokens=64)
    settings = {"checkpoint": str(tmp_path / "model"), "dtype": dtype}
    model = PPO(SearchQAPolicy, env, n_steps=4, batch_size=8, gamma=1.0, seed=0, policy_kwargs=settings).learn(16)
    observations, actions = played(env, model.policy)
    values, logprobs, _ = model.policy.evaluate_actions(observations, actions)
    model.save(tmp_path / "ppo.zip")
    loaded = PPO.load(tmp_path / "ppo.zip", env=env)
    again = loaded.policy.evaluate_actions(observations, actions)
    assert torch.equal(values, again[0])
    assert torch.equal(logprobs, again[1])
    observation = env.reset()
    torch.manual_seed(0)
    acted, _, of_rollout = model.policy(tensors(observation))
    assert (of_rollout - model.policy.evaluate_actions(tensors(observation), acted)[1]).abs().max() < tolerance
