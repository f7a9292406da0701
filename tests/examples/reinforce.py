"""REINFORCE (Williams 1992) on whole episodes, their mean reward as baseline, written against Gymnasium and a policy alone.

python tests/examples/reinforce.py --seed 0
"""

import gymnasium as gym
import numpy as np
import torch

import searchqa_envs  # noqa: F401, registers the ids
from searchqa_agents.language_model import Sampling
from searchqa_agents.loading import shipped_checkpoint
from searchqa_agents.policy import Policy


def train(seed: int = 0, updates: int = 20, num_envs: int = 128, learning_rate: float = 5e-4, **env_arguments: object) -> Policy:
    """The shipped policy after so many updates, each on one episode of every environment."""
    venv = gym.make_vec("SearchQA-World-v0", num_envs=num_envs, hops=2, **env_arguments)
    policy = Policy.load(shipped_checkpoint(), venv.unwrapped.tokenizer)
    sampling = Sampling(venv.unwrapped.max_segment_tokens, venv.unwrapped.dialect.closers)
    optimiser = torch.optim.AdamW(policy.model.parameters(), lr=learning_rate)
    rng = np.random.default_rng(seed)
    for update in range(updates):
        observations, infos = venv.reset(seed=int(rng.integers(2**31)))
        session = policy.start(rng.integers(2**62, size=num_envs).tolist(), sampling)
        token_ids, masks, rewards, going = [], [], [], list(range(num_envs))
        while going:
            segments = session.generate(going, [observations[i] for i in going], [{}] * len(going))
            actions = [np.empty(0, dtype=np.int32)] * num_envs  # an ended environment begins anew; what it plays then is not looked at
            for i, segment in zip(going, segments, strict=True):
                actions[i] = segment.ids
            observations, reward, terminated, truncated, infos = venv.step(tuple(actions))
            for i in [i for i in going if terminated[i] or truncated[i]]:
                going.remove(i)
                if infos["backend_error"][i] is None:  # an episode that lost its search back end teaches nothing
                    token_ids.append(observations[i])  # int32[T]
                    masks.append(infos["turn_record"][i].loss_mask)  # int8[T], 1 for the tokens that the policy sampled
                    rewards.append(reward[i])
        print(f"update {update}: {len(rewards)} episodes, mean reward {sum(rewards) / max(len(rewards), 1):.3f}", flush=True)
        if rewards:
            advantages = torch.tensor(rewards, dtype=torch.float32) - float(np.mean(rewards))  # [episodes]
            lengths = torch.tensor([int(mask.sum()) for mask in masks])
            logprobs = policy.evaluate(token_ids, masks).logprob  # [sampled tokens], episode after episode
            loss = -(advantages.repeat_interleave(lengths) * logprobs).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
            optimiser.step()
    return policy


if __name__ == "__main__":
    from measure import run

    run(train)
