"""Critics: which state a value is of, what they begin as, folders."""

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from searchqa_agents.critic import Critic
from searchqa_agents.policy import Policy
from searchqa_envs.tokenizers.byte import ByteTokenizer

torch.set_num_threads(1)
TOKENIZER = ByteTokenizer()
IDS = [np.arange(10, 20, dtype=np.int32), np.arange(40, 45, dtype=np.int32)]
MASKS = [np.array([0, 0, 1, 1, 0, 0, 1, 1, 1, 0], dtype=np.int8), np.array([0, 1, 0, 0, 1], dtype=np.int8)]


def make_policy(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=TOKENIZER.pad_id, eos_token_id=TOKENIZER.eos_id, initializer_range=0.2,
        )  # fmt: skip
        return Policy(Qwen2ForCausalLM(config).to(dtype), TOKENIZER)


def trained_head(head):
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("packed", [False, True])
def test_a_value_is_of_the_state_before_its_token(packed):
    policy = make_policy()
    critic = Critic.of_policy(policy)
    trained_head(critic.value_head)
    with torch.no_grad():
        values = critic(*policy.lay_out(IDS, MASKS, packed=packed)[:3])
        expected = []
        for row, mask in zip(IDS, MASKS, strict=True):
            for position in np.flatnonzero(mask):  # only what stands before the token is read
                hidden = policy.model.model(input_ids=torch.from_numpy(row[None, :position].astype(np.int64)), use_cache=False)
                expected.append(critic.value_head(hidden.last_hidden_state[0, -1])[0])
    assert torch.allclose(values, torch.stack(expected), atol=1e-5)


def test_both_kinds_begin_with_zero_values_in_float32_and_agree_with_one_head():
    policy = make_policy(torch.bfloat16)
    critic, head = Critic.of_policy(policy), policy.add_value_head()
    forward = policy.lay_out(IDS, MASKS, packed=False)
    for values in (critic(*forward[:3]), policy.evaluate(IDS, MASKS).value):
        assert values.dtype == torch.float32
        assert (values == 0).all()
    trained_head(head)
    critic.value_head.load_state_dict(head.state_dict())
    assert torch.equal(critic(*forward[:3]), policy.evaluate(IDS, MASKS, max_tokens=None).value)
    assert policy.add_value_head() is head


def test_a_separate_critic_shares_no_weight_with_the_policy():
    policy = make_policy()
    critic = Critic.of_policy(policy)
    own = {parameter.data_ptr() for parameter in policy.scorer.parameters()}
    assert all(parameter.data_ptr() not in own and parameter.requires_grad for parameter in critic.parameters())
    trained_head(critic.value_head)
    critic(*policy.lay_out(IDS, MASKS, packed=False)[:3]).sum().backward()
    assert all(parameter.grad is None for parameter in policy.scorer.parameters())
    assert all(parameter.grad is not None for parameter in critic.parameters())


def test_a_saved_critic_loads_with_the_same_values(tmp_path):
    policy = make_policy()
    critic = Critic.of_policy(policy)
    trained_head(critic.value_head)
    critic.save(tmp_path)
    forward = policy.lay_out(IDS, MASKS, packed=False)
    assert torch.equal(Critic.load(tmp_path)(*forward[:3]), critic(*forward[:3]))
