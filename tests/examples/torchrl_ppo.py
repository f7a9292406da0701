"""TorchRL's PPO, unmodified, on whole segments: its collector, its GAE and its ``ClipPPOLoss`` train a policy of ours.

An action is a segment, an observation the context, both padded (``PaddedTokens``). Our policy stands behind TorchRL's interface as a distribution over
segments (:class:`SegmentDistribution`). Its ``log_prob`` gives a number for each token, so that ``ClipPPOLoss`` clips the ratio of each token, with the
advantage of the segment that it stands in.

pip install torchrl; python tests/examples/torchrl_ppo.py --seed 0
"""

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.collectors import Collector
from torchrl.data import Binary
from torchrl.envs import GymWrapper, SerialEnv
from torchrl.envs.gym_like import BaseInfoDictReader
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import searchqa_envs  # noqa: F401, registers the ids
from searchqa_agents.language_model import Sampling
from searchqa_agents.loading import shipped_checkpoint
from searchqa_agents.policy import Policy
from searchqa_envs.wrappers import PaddedTokens


@dataclass
class Args:
    seed: int = 0
    """of questions, samples and minibatches"""
    num_envs: int = 64
    """environments that are stepped together"""
    num_steps: int = 4
    """segments that each environment plays in a rollout"""
    num_updates: int = 10
    """rollouts, each followed by its updates"""
    max_context_tokens: int = 128
    """the length of all observations"""
    learning_rate: float = 1e-4
    """of AdamW"""
    gae_lambda: float = 1.0
    """of generalised advantage estimation, per segment; the discount is 1"""
    update_epochs: int = 2
    """passes over each rollout"""
    num_minibatches: int = 2
    """updates in each pass"""
    clip_epsilon: float = 0.2
    """ratios of tokens are clipped to 1 - this and 1 + this"""
    critic_coeff: float = 0.1
    """weight of the critic's loss; the policy's is a mean over all L places of an action, those of padding included, and so is a few times smaller"""


class SegmentDistribution(Distribution):
    """What the policy writes next: a distribution over int64[B, L], segments padded on the right.

    ``log_prob`` is float32[B, L], one number per token and 0 for padding, and not their sum.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012, torch declares it so

    def __init__(self, input_ids: Tensor, attention_mask: Tensor, *, policy: Policy, sampling: Sampling, rng: np.random.Generator) -> None:
        self.contexts = unpadded(input_ids, attention_mask)
        self.policy, self.sampling, self.rng = policy, sampling, rng
        self.drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(input_ids.shape[:-1], torch.Size([sampling.max_new_tokens]), validate_args=False)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008, torch's signature
        """int64[B, L]."""
        rows = range(len(self.contexts))
        session = self.policy.start(self.rng.integers(2**62, size=len(rows)).tolist(), self.sampling)
        segments = session.generate(rows, self.contexts, [{}] * len(rows))
        shape = (len(rows), self.sampling.max_new_tokens)
        ids, logprobs = torch.full(shape, self.policy.tokenizer.pad_id), torch.zeros(shape)
        for row, segment in enumerate(segments):
            ids[row, : len(segment.ids)] = torch.from_numpy(segment.ids)
            logprobs[row, : len(segment.ids)] = torch.from_numpy(segment.logprobs)
        ids, logprobs = (tensor.view(*self.batch_shape, -1) for tensor in (ids, logprobs))
        self.drawn = ids, logprobs
        return ids

    def log_prob(self, value: Tensor) -> Tensor:
        """float32[B, L] of int64[B, L]."""
        if self.drawn is not None and value is self.drawn[0]:
            return self.drawn[1]  # known from sampling
        actions = value.flatten(0, -2)
        written = actions != self.policy.tokenizer.pad_id  # bool[B, L]; a policy never samples padding
        segments = [row[here].numpy().astype(np.int32) for row, here in zip(actions, written, strict=True)]
        token_ids = [np.concatenate(pair) for pair in zip(self.contexts, segments, strict=True)]
        masks = [np.repeat([np.int8(0), np.int8(1)], [len(c), len(s)]) for c, s in zip(self.contexts, segments, strict=True)]
        logprobs = torch.zeros(actions.shape).masked_scatter(written, self.policy.evaluate(token_ids, masks).logprob)
        return logprobs.view(value.shape)


class Critic(nn.Module):
    """The value of a context, by a head on the policy's trunk."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        policy.add_value_head()
        self.scorer, self.policy = policy.scorer, policy

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int32[B, C] and int8[B, C] to float32[B, 1]."""
        # a policy gives the value of the state in which a token is chosen, so that there must be one; any will do
        token_ids = [np.append(context, np.int32(self.policy.tokenizer.eos_id)) for context in unpadded(input_ids, attention_mask)]
        masks = [np.append(np.zeros(len(ids) - 1, dtype=np.int8), np.int8(1)) for ids in token_ids]
        return self.policy.evaluate(token_ids, masks).value.view(*input_ids.shape[:-1], 1)


class Lost(BaseInfoDictReader):
    """Whether the search back end was lost, as ``lost``: of ``info``, TorchRL keeps what has a tensor's type and is asked for."""

    info_spec = {"lost": Binary(1, dtype=torch.bool)}  # noqa: RUF012, TorchRL declares it so

    def __call__(self, info: dict[str, Any], tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set("lost", torch.tensor([info.get("backend_error") is not None]))


def unpadded(input_ids: Tensor, attention_mask: Tensor) -> list[NDArray[np.int32]]:
    """The contexts int32[T] of int[..., C], padded on the left."""
    rows = zip(input_ids.flatten(0, -2).numpy(), attention_mask.flatten(0, -2).numpy() == 1, strict=True)
    return [ids[here] for ids, here in rows]


def kept(batch: TensorDictBase) -> TensorDictBase:
    """The steps of a rollout [N, T] as one dimension, without those of an episode that lost its search back end."""
    episodes = batch["collector", "traj_ids"]  # [N, T]
    lost = episodes[batch["next", "lost"][..., 0]]
    return batch[~torch.isin(episodes, lost)]


def actor_and_critic(
    policy: Policy, sampling: Sampling, rng: np.random.Generator
) -> tuple[ProbabilisticTensorDictSequential, TensorDictModule]:
    """The policy as TorchRL's modules, which read observations and write ``action``, ``action_log_prob`` and ``state_value``."""
    keys = ["input_ids", "attention_mask"]
    actor = ProbabilisticTensorDictModule(
        in_keys=keys,
        out_keys=["action"],
        distribution_class=SegmentDistribution,
        distribution_kwargs={"policy": policy, "sampling": sampling, "rng": rng},
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
    )
    return ProbabilisticTensorDictSequential(actor), TensorDictModule(Critic(policy), in_keys=keys, out_keys=["state_value"])


def train(args: Args, **env_arguments: object) -> Policy:
    """The shipped policy after training."""
    torch.manual_seed(args.seed)
    first = gym.make("SearchQA-World-v0", hops=2, max_context_tokens=args.max_context_tokens, **env_arguments).unwrapped
    policy = Policy.load(shipped_checkpoint(), first.tokenizer)
    sampling = Sampling(first.max_segment_tokens, first.dialect.closers)
    actor, critic = actor_and_critic(policy, sampling, np.random.default_rng(args.seed))

    def make_env() -> GymWrapper:
        env = PaddedTokens(gym.make("SearchQA-World-v0", hops=2, max_context_tokens=args.max_context_tokens, **env_arguments))
        return GymWrapper(env, categorical_action_encoding=True).set_info_dict_reader(Lost())

    envs = SerialEnv(args.num_envs, make_env)
    envs.set_seed(args.seed)
    frames = args.num_envs * args.num_steps
    collector = Collector(
        envs, actor, frames_per_batch=frames, total_frames=frames * args.num_updates, auto_register_policy_transforms=False
    )
    # no vmap and not functional: the policy lays out ragged sequences in NumPy, and holds its parameters itself
    gae = GAE(gamma=1.0, lmbda=args.gae_lambda, value_network=critic, deactivate_vmap=True)
    loss_module = ClipPPOLoss(
        actor, critic, clip_epsilon=args.clip_epsilon, critic_coeff=args.critic_coeff, entropy_bonus=False, functional=False
    )
    optimizer = torch.optim.AdamW(policy.scorer.parameters(), lr=args.learning_rate, weight_decay=0.0)
    for update, batch in enumerate(collector):
        with torch.no_grad():
            gae(batch)
        steps = kept(batch)
        returns = steps["next", "reward"][steps["next", "done"]]
        print(f"update {update}: {len(returns)} episodes, mean return {returns.sum() / max(len(returns), 1):.3f}", flush=True)
        if len(steps) == 0:
            continue
        advantage = steps["advantage"]  # [steps, 1]
        steps["advantage"] = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
        for _ in range(args.update_epochs):
            for minibatch in torch.randperm(len(steps)).chunk(args.num_minibatches):
                losses = loss_module(steps[minibatch])
                optimizer.zero_grad()
                (losses["loss_objective"] + losses["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(policy.scorer.parameters(), 1.0)
                optimizer.step()
    collector.shutdown()
    return policy


if __name__ == "__main__":
    from measure import run

    run(lambda seed: train(Args(seed=seed)))
