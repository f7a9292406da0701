"""LoRA: what is trained, the reference without the adapters, the merged folder, the state."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from searchqa_agents.algorithm import AlgorithmConfig
from searchqa_agents.batch import Batch
from searchqa_agents.critic import Critic
from searchqa_agents.learner import Learner
from searchqa_agents.lora import adapters_off, add_lora, has_lora
from searchqa_agents.policy import Policy
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers.byte import ByteTokenizer

torch.set_num_threads(1)
TOKENIZER = ByteTokenizer()
SHAPE = {
    "vocab_size": TOKENIZER.vocab_size,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": TOKENIZER.pad_id,
    "eos_token_id": TOKENIZER.eos_id,
    "initializer_range": 0.2,
}


def make_policy(kind="llama"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "llama":
            return Policy(LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)), TOKENIZER)
        return Policy(Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=False)), TOKENIZER)


def make_batch(count=5) -> Batch:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 256, rng.integers(8, 30)).astype(np.int32) for _ in range(count)]
    masks = [np.r_[0, rng.integers(0, 2, len(row) - 2), 1].astype(np.int8) for row in ids]
    counts = torch.tensor([int(mask.sum()) for mask in masks])
    total = int(counts.sum())
    return Batch(
        token_ids=ids, token_masks=masks, rewards=torch.zeros(count), group_ids=torch.zeros(count, dtype=torch.int64),
        sequence_ids=torch.arange(count).repeat_interleave(counts), segment_ids=torch.zeros(total, dtype=torch.int64),
        policy_mask=torch.ones(total, dtype=torch.bool), old_logprobs=torch.zeros(total), weights=torch.ones(total),
    )  # fmt: skip


def train(learner, batch, steps):
    for step in steps:
        stats = learner.evaluate(batch)
        loss = -stats.logprob.mean() + (0 if stats.value is None else (stats.value - 1).square().mean())
        learner.backward(loss)
        learner.update(step)


def logprobs(policy, batch):
    with torch.no_grad():
        return policy.evaluate(batch.token_ids, batch.token_masks).logprob


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_only_adapters_are_trained_and_without_them_the_model_is_the_base(kind):
    policy, batch = make_policy(kind), make_batch()
    base = logprobs(policy, batch)
    before = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    add_lora(policy, rank=4)
    assert torch.equal(logprobs(policy, batch), base)
    learner = Learner(policy, AlgorithmConfig(kl_coef=0.1, learning_rate=1e-2))
    assert learner._reference is None  # no copy
    train(learner, batch, range(3))
    trained = logprobs(policy, batch)
    assert (trained - base).abs().max() > 0.05
    with adapters_off(policy.model):
        assert torch.equal(logprobs(policy, batch), base)
    assert torch.equal(learner.annotate(batch).reference_logprobs, base)
    assert torch.equal(logprobs(policy, batch), trained)  # they are on again
    after = {name.replace(".base_layer", ""): p for name, p in policy.model.named_parameters() if ".lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in policy.model.named_parameters())
    assert all(parameter.dtype == torch.float32 for parameter in policy.model.parameters())


@pytest.mark.parametrize(("kind", "targets"), [("llama", "all-linear"), ("qwen2", "all-linear"), ("qwen2", ["q_proj", "lm_head"])])
def test_the_saved_folder_is_a_plain_model_with_the_adapters_merged(kind, targets, tmp_path):
    policy, batch = make_policy(kind), make_batch()
    add_lora(policy, rank=4, target_modules=targets)
    train(Learner(policy, AlgorithmConfig(learning_rate=1e-2)), batch, range(3))
    trained = logprobs(policy, batch)
    policy.save(tmp_path)
    loaded = Policy.load(tmp_path, TOKENIZER)
    assert not has_lora(loaded.model)
    assert not any("lora" in name or "base_layer" in name for name in loaded.model.state_dict())
    assert torch.allclose(logprobs(loaded, batch), trained, atol=1e-5)
    assert loaded.model.config.tie_word_embeddings == (kind == "llama")
    assert torch.equal(logprobs(policy, batch), trained)  # the live model is as it was
    assert has_lora(policy.model)
    stats = policy.evaluate(batch.token_ids, batch.token_masks)
    stats.logprob.sum().backward()
    assert all(p.grad is not None for name, p in policy.model.named_parameters() if ".lora_" in name)


@pytest.mark.parametrize("critic", [None, "shared", "separate"])
def test_the_state_holds_adapters_only_and_continues_bit_for_bit(critic, tmp_path):
    batch, config = make_batch(), AlgorithmConfig(learning_rate=1e-2, kl_coef=0.1, critic=critic or "separate", steps=4)

    def make():
        policy = make_policy()
        add_lora(policy, rank=2, seed=1)
        return Learner(policy, config, has_critic=critic is not None)

    first, whole = make(), make()
    train(whole, batch, range(4))
    train(first, batch, range(2))
    torch.save(first.state_dict(2), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert "reference" not in state
    assert all(".lora_" in name for name in state["model"])
    second = make()
    second.load_state_dict(state)
    train(second, batch, range(2, 4))
    assert torch.equal(logprobs(whole.policy, batch), logprobs(second.policy, batch))
    other = make().policy
    other.load_weights(state["model"])
    assert torch.equal(logprobs(other, batch), logprobs(first.policy, batch))
    with pytest.raises(ConfigurationError, match="LoRA settings"):
        make_policy().load_weights(state["model"])


def test_a_critic_of_a_policy_with_adapters_saves_a_plain_trunk(tmp_path):
    policy, batch = make_policy(), make_batch()
    add_lora(policy, rank=2)
    learner = Learner(policy, AlgorithmConfig(learning_rate=1e-2), has_critic=True)
    train(learner, batch, range(3))
    learner.critic.save(tmp_path)
    forward = policy.lay_out(batch.token_ids, batch.token_masks, packed=False)
    with torch.no_grad():
        values = [critic(*forward[:3]) for critic in (learner.critic, Critic.load(tmp_path))]
    assert values[0].std() > 0
    assert torch.allclose(values[0], values[1], atol=1e-5)


def test_gradient_checkpointing_reaches_the_adapters():
    policy, batch = make_policy(), make_batch()
    add_lora(policy, rank=2)
    results = []
    for checkpointing in (False, True):
        policy.model.zero_grad()
        policy.evaluate(batch.token_ids, batch.token_masks, gradient_checkpointing=checkpointing).logprob.sum().backward()
        results.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]))
    assert torch.allclose(results[0], results[1], atol=1e-6)
    assert results[0].abs().max() > 0


def test_the_seed_determines_the_adapters_and_the_global_generator_is_left_alone():
    states = []
    before = torch.random.get_rng_state()
    for seed in (0, 0, 1):
        policy = make_policy()
        add_lora(policy, rank=2, seed=seed)
        states.append(policy.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_adapters_of_a_bfloat16_model_learn_in_small_steps(tmp_path):
    policy, batch = make_policy(), make_batch()
    policy.model.bfloat16()
    before = {name: parameter.clone() for name, parameter in policy.model.named_parameters()}
    add_lora(policy, rank=2)
    trained = {name: parameter for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    first = {name: parameter.detach().clone() for name, parameter in trained.items()}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    train(Learner(policy, AlgorithmConfig(learning_rate=1e-6)), batch, range(2))
    matrices = [name for name in trained if "lora_A" in name]  # the first step moves B alone
    assert all((trained[name] != first[name]).float().mean() > 0.5 for name in matrices)
    others = {name.replace(".base_layer.", "."): p for name, p in policy.model.named_parameters() if name not in trained}
    assert all(torch.equal(others[name], tensor) for name, tensor in before.items())
    policy.save(tmp_path)
    assert Policy.load(tmp_path, TOKENIZER, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_what_cannot_be_adapted_is_refused():
    policy = make_policy()
    for targets in (["lm_head"], ["q_proj", "embed_tokens"], ".*lm_head"):
        with pytest.raises(ConfigurationError, match="shares its weight"):
            add_lora(policy, target_modules=targets)
    with pytest.raises(ConfigurationError, match="target_modules must name linear layers"):
        add_lora(make_policy(), target_modules=["nowhere"])
    add_lora(policy)
    with pytest.raises(ConfigurationError, match="already"):
        add_lora(policy)
