"""PPO over single tokens: ``TokenLevel`` makes the environment an ordinary one with ``Discrete`` actions, and this algorithm knows nothing of segments.

An observation is the context so far, padded on the left to one length; an action is the next token. Values, ratios and advantages are those of any
discrete-action algorithm. The price: there is no attention cache between two calls, so that every token reads its whole context again, and the
buffer holds a context for each token. It is for teaching, and for algorithms that exist only for discrete actions.

python tests/examples/token_level.py --seed 0
"""

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical

import searchqa_envs  # noqa: F401, registers the ids
from searchqa_agents.loading import shipped_checkpoint
from searchqa_agents.policy import Policy
from searchqa_envs.wrappers import PaddedTokens, TokenLevel


@dataclass
class Args:
    seed: int = 0
    """of questions, samples and minibatches"""
    num_envs: int = 64
    """environments in the vector environment"""
    num_steps: int = 64
    """tokens that each environment plays in a rollout"""
    num_updates: int = 5
    """rollouts, each followed by its updates"""
    max_context_tokens: int = 128
    """the length of all observations"""
    learning_rate: float = 3e-4
    """of AdamW at the beginning; it falls to 0"""
    gae_lambda: float = 1.0
    """of generalised advantage estimation; the discount is 1"""
    update_epochs: int = 1
    """passes over each rollout"""
    num_minibatches: int = 4
    """updates in each pass"""
    clip_coef: float = 0.2
    """the surrogate clipping coefficient"""
    vf_coef: float = 0.1
    """coefficient of the critic's loss"""


class Agent(nn.Module):
    """Observation in, action distribution and value out."""

    def __init__(self, model: nn.Module, pad_id: int) -> None:
        super().__init__()
        self.model, self.pad_id = model, pad_id
        self.critic = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.critic.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Categorical, Tensor]:
        """int[B, C] and int[B, C], padded on the left, to a distribution over V tokens and float32[B]."""
        first = int(attention_mask.any(0).int().argmax())  # columns that are padding in all rows need not be read
        ids, mask = input_ids[:, first:].long(), attention_mask[:, first:].long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # a row's first token stands at position 0, wherever its padding ends
        hidden = self.model.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state[:, -1]
        logits = self.model.lm_head(hidden).float()
        logits[:, self.pad_id] = -1e9  # padding is no action; finite, because an entropy multiplies it with its probability 0
        return Categorical(logits=logits), self.critic(hidden)[:, 0]


def train(args: Args, **env_arguments: object) -> Policy:
    """The shipped policy after training."""
    torch.manual_seed(args.seed)

    def make_env() -> gym.Env:
        return PaddedTokens(TokenLevel(gym.make("SearchQA-World-v0", hops=2, max_context_tokens=args.max_context_tokens, **env_arguments)))

    envs = SyncVectorEnv([make_env] * args.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    tokenizer = envs.envs[0].unwrapped.tokenizer
    policy = Policy.load(shipped_checkpoint(), tokenizer)  # from here on only its model is used
    agent = Agent(policy.model, tokenizer.pad_id)
    optimizer = torch.optim.AdamW(agent.parameters(), lr=args.learning_rate, weight_decay=0.0)
    shape = (args.num_steps, args.num_envs)
    observations = {name: np.zeros((*shape, *space.shape), space.dtype) for name, space in envs.single_observation_space.items()}
    actions, logprobs, values, rewards, dones, kept = (torch.zeros(shape) for _ in range(6))
    next_observation, _ = envs.reset(seed=args.seed)
    for update in range(args.num_updates):
        optimizer.param_groups[0]["lr"] = (1 - update / args.num_updates) * args.learning_rate
        kept[:], returns = 1.0, []
        begins = [0] * args.num_envs  # the step of this rollout in which each episode under way began
        for step in range(args.num_steps):
            for name, array in next_observation.items():
                observations[name][step] = array
            with torch.no_grad():
                distribution, values[step] = agent(*(torch.from_numpy(next_observation[name]) for name in ("input_ids", "attention_mask")))
                action = distribution.sample()  # [num_envs]
                actions[step], logprobs[step] = action, distribution.log_prob(action)
            next_observation, reward, terminated, truncated, infos = envs.step(action.numpy())
            rewards[step], dones[step] = torch.from_numpy(reward), torch.from_numpy(terminated | truncated)
            for i in np.flatnonzero(terminated | truncated):
                if infos["final_info"]["backend_error"][i] is not None:  # an episode that lost its search back end teaches nothing
                    kept[begins[i] : step + 1, i] = 0.0
                else:
                    returns.append(reward[i])
                begins[i] = step + 1

        with torch.no_grad():
            _, next_value = agent(*(torch.from_numpy(next_observation[name]) for name in ("input_ids", "attention_mask")))
        advantages, last_advantage = torch.zeros(shape), torch.zeros(args.num_envs)
        for step in reversed(range(args.num_steps)):
            delta = rewards[step] + (1 - dones[step]) * next_value - values[step]
            advantages[step] = last_advantage = delta + args.gae_lambda * (1 - dones[step]) * last_advantage
            next_value = values[step]

        input_ids, attention_mask = (torch.from_numpy(observations[name]).flatten(0, 1) for name in ("input_ids", "attention_mask"))
        flat = {name: tensor.flatten() for name, tensor in {"action": actions, "logprob": logprobs, "advantage": advantages}.items()}
        flat_returns, steps = (advantages + values).flatten(), kept.flatten().nonzero()[:, 0]
        for _ in range(args.update_epochs if len(steps) else 0):
            for minibatch in steps[torch.randperm(len(steps))].chunk(args.num_minibatches):
                distribution, value = agent(input_ids[minibatch], attention_mask[minibatch])
                ratio = (distribution.log_prob(flat["action"][minibatch]) - flat["logprob"][minibatch]).exp()
                advantage = flat["advantage"][minibatch]
                advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                policy_loss = torch.max(-advantage * ratio, -advantage * clipped).mean()
                loss = policy_loss + args.vf_coef * 0.5 * (value - flat_returns[minibatch]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
                optimizer.step()
        print(f"update {update}: {len(returns)} episodes, mean return {np.mean(returns or [0]):.3f}", flush=True)
    envs.close()
    return policy


if __name__ == "__main__":
    from measure import run

    run(lambda seed: train(Args(seed=seed)))
