"""Trajectories as flat tensors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from searchqa_agents.advantages import segment_index
from searchqa_agents.batch import TOKEN_FIELDS, anchor_states, make_batch, select, to_device


def test_a_batch_holds_the_policys_tokens_in_order(episode):
    a = episode([1, 2], [3, 4], [5, 6], [7], reward=1.0, logprobs=[-0.1, -0.2, -0.3])
    b = episode([1], [8], [9], reward=0.25, logprobs=[-0.4])
    batch = make_batch([a, b], [7, 7])
    assert batch.sequence_ids.tolist() == [0, 0, 0, 1]
    assert batch.segment_ids.tolist() == [0, 0, 1, 0]
    assert batch.old_logprobs.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4])
    assert batch.policy_mask.all()
    assert batch.rewards.tolist() == [1.0, 0.25]
    assert batch.group_ids.tolist() == [7, 7]
    assert batch.weights.tolist() == [1, 1, 1, 1]
    assert batch.sampling_logprobs is None
    assert [ids[mask == 1].tolist() for ids, mask in zip(batch.token_ids, batch.token_masks, strict=True)] == [[3, 4, 7], [8]]


def test_environment_tokens_belong_to_the_turn_that_they_answer(episode):
    a = episode([1, 2], [3, 4], [5, 6], [7], logprobs=[-0.1, -0.2, -0.3])
    b = episode([1], [8], [9])
    batch = make_batch([a, b], [0, 1], environment_tokens=True)
    assert batch.sequence_ids.tolist() == [0, 0, 0, 0, 0, 1, 1]  # all but the prompts
    assert batch.segment_ids.tolist() == [0, 0, 0, 0, 1, 0, 0]
    assert batch.policy_mask.tolist() == [True, True, False, False, True, True, False]
    assert batch.old_logprobs.tolist() == pytest.approx([-0.1, -0.2, 0, 0, -0.3, np.log(0.5), 0])


def test_log_probabilities_of_a_truncated_distribution_come_along(episode):
    a = episode([1], [3, 4])
    batch = make_batch([episode([1], [3, 4], sampling_logprobs=np.array([0, -0.5, -0.25], np.float32))], [0])
    assert batch.sampling_logprobs.tolist() == [-0.5, -0.25]
    assert make_batch([a], [0]).sampling_logprobs is None


def test_where_the_sampler_knew_only_what_really_sampled_old_log_probabilities_are_left_to_be_evaluated(episode):
    cut = np.array([0, -0.5, 0, -0.25], np.float32)
    only = replace(episode([1], [3], [9], [4], sampling_logprobs=cut), logprobs=None)
    batch = make_batch([only, episode([1], [5], logprobs=[-0.75])], [0, 1], environment_tokens=True)
    assert batch.sampling_logprobs.tolist() == [-0.5, 0, -0.25, -0.75]
    assert batch.old_logprobs.isnan().tolist() == [True, False, True, False]


def test_trajectories_without_log_probabilities_are_refused(episode):
    with pytest.raises(ValueError, match="Use a backend with returns_logprobs"):
        make_batch([replace(episode([1], [2]), logprobs=None)], [0])


def test_no_trajectory_is_an_empty_batch():
    batch = make_batch([], [])
    assert len(batch.rewards) == len(batch.sequence_ids) == len(batch.policy_mask) == 0
    assert len(select(batch, []).weights) == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 5), st.booleans(), st.data())
def test_a_selection_is_the_batch_of_the_selected(random_episodes, count, environment_tokens, data):
    episodes = random_episodes(count, 50)
    chosen = data.draw(st.lists(st.integers(0, count - 1), unique=True)) if count else []
    whole = make_batch(episodes, range(count), environment_tokens=environment_tokens)
    whole = whole._replace(values=2 * whole.old_logprobs)
    part, direct = select(whole, chosen), make_batch([episodes[i] for i in chosen], chosen, environment_tokens=environment_tokens)
    direct = direct._replace(values=2 * direct.old_logprobs)
    for name, value in part._asdict().items():
        expected = getattr(direct, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected), name
        else:
            assert value is expected is None or all(map(np.array_equal, value, expected)), name
    for name in TOKEN_FIELDS:
        assert getattr(part, name) is None or len(getattr(part, name)) == len(part.sequence_ids)


def test_the_anchor_state_is_the_environments_last_text(episode):
    def state(*ids):
        return np.array(ids, np.int32).tobytes()

    a = episode([1, 2], [3, 4], [5, 6], [7], [8], [9])
    b = episode([1, 2], [3], [5, 6], [7, 7])
    c = episode([1, 2], [4])
    batch = make_batch([a, b, c], [0, 0, 0])
    assert anchor_states(batch) == [state(1, 2), state(5, 6), state(8), state(1, 2), state(5, 6), state(1, 2)]
    _, first = segment_index(batch.sequence_ids, batch.segment_ids)
    assert len(first) == len(anchor_states(batch))


def test_on_another_device_only_tensors_have_moved(episode):
    batch = make_batch([episode([1], [2])], [0])
    moved = to_device(batch, torch.device("meta"))
    assert moved.weights.device.type == moved.group_ids.device.type == "meta"
    assert moved.values is None
    assert moved.token_ids is batch.token_ids
