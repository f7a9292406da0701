"""PPO (Schulman et al. 2017, arXiv 1707.06347) over the tokens that a policy samples, in one file: Gymnasium, torch and a policy.

As CleanRL's ``ppo.py``: every environment plays a fixed number of steps, episodes go on from one rollout to the next, and the critic's value stands in
for what comes after the last step. What is different here: an environment's step is a segment of many tokens, so that ratios, values and advantages are
those of tokens; the text that the environment writes between two segments is read, but has no value, no advantage and no loss.

python tests/examples/ppo.py --seed 0
"""

import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

import searchqa_envs  # noqa: F401, registers the ids
from searchqa_agents.language_model import Sampling
from searchqa_agents.loading import shipped_checkpoint
from searchqa_agents.policy import Policy


@dataclass
class Args:
    seed: int = 0
    """of questions, samples and minibatches"""
    num_envs: int = 64
    """environments in the vector environment"""
    num_steps: int = 4
    """segments that each environment plays in a rollout"""
    num_updates: int = 20
    """rollouts, each followed by its updates"""
    learning_rate: float = 1e-4
    """of AdamW at the beginning"""
    anneal_lr: bool = True
    """lower the learning rate to 0 by the last update"""
    gamma: float = 1.0
    """discount per token"""
    gae_lambda: float = 1.0
    """of generalised advantage estimation, per token: 1 is the return minus the value"""
    num_minibatches: int = 2
    """updates in each pass over a rollout"""
    update_epochs: int = 2
    """passes over each rollout"""
    norm_adv: bool = True
    """shift and scale the advantages of each minibatch to mean 0 and variance 1"""
    clip_coef: float = 0.2
    """the surrogate clipping coefficient"""
    clip_vloss: bool = True
    """clip the critic's values to within clip_coef of those of the rollout"""
    ent_coef: float = 0.0
    """coefficient of the entropy"""
    vf_coef: float = 0.1
    """coefficient of the critic's loss; the critic shares the policy's trunk"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    target_kl: float | None = None
    """stop the updates of a rollout beyond this divergence"""
    tensorboard_dir: Path | None = None
    """where to write the metrics for TensorBoard; None: nowhere"""


@dataclass
class Part:
    """What a rollout holds of one episode: T ids of context, N of them sampled in this rollout."""

    token_ids: NDArray[np.int32]
    """[T], the context as the environment last showed it"""
    mask: NDArray[np.int8]
    """[T], 1 for the N tokens sampled in this rollout; 0 for prompt, environment text, and what an earlier rollout sampled"""
    logprobs: NDArray[np.float32]
    """[N], when they were sampled"""
    reward: float
    """after the last of them; all others have reward 0"""
    done: bool
    """whether the episode ended there"""


class Rollout:
    """The environments under way, from one rollout to the next."""

    def __init__(self, venv: gym.vector.VectorEnv, policy: Policy, args: Args) -> None:
        self.venv, self.policy, self.args = venv, policy, args
        self.sampling = Sampling(venv.unwrapped.max_segment_tokens, venv.unwrapped.dialect.closers)
        self.rng = np.random.default_rng(args.seed)
        self.observations, _ = venv.reset(seed=int(self.rng.integers(2**31)))

    def collect(self) -> tuple[list[Part], list[float]]:
        """The parts of all episodes that the next ``num_steps`` steps hold, and the returns of those that ended."""
        num_envs, num_steps = self.args.num_envs, self.args.num_steps
        parts: list[Part] = []
        episodic_returns: list[float] = []
        # a session keeps the attention cache between turns, so it lives as long as the weights stay the same; a row of it is an episode
        session = self.policy.start(self.rng.integers(2**62, size=num_envs * num_steps).tolist(), self.sampling)
        rows = list(range(num_envs))
        begins = [len(observation) for observation in self.observations]  # where what is sampled in this rollout begins
        logprobs: list[list[NDArray[np.float32]]] = [[] for _ in rows]
        for step in range(num_steps):
            segments = session.generate(rows, self.observations, [{}] * num_envs)
            self.observations, rewards, terminated, truncated, infos = self.venv.step(tuple(segment.ids for segment in segments))
            done = terminated | truncated
            for i in range(num_envs):
                ended = infos["final_info"] if done[i] else infos
                context = infos["final_obs"][i] if done[i] else self.observations[i]
                record = ended["turn_record"][i]
                # what follows a closing tag is no part of the action: the environment dropped it
                logprobs[i].append(segments[i].logprobs[: record.segment_tokens_used])
                if not done[i] and step < num_steps - 1:
                    continue
                if ended["backend_error"][i] is None:  # what was sampled before the search back end was lost is left out
                    mask = record.loss_mask.copy()
                    mask[: begins[i]] = 0
                    parts.append(Part(context, mask, np.concatenate(logprobs[i]), float(rewards[i]), bool(done[i])))
                    if done[i]:
                        episodic_returns.append(float(rewards[i]))
                session.release([rows[i]])
                rows[i] += num_envs  # the next episode in this place has another seed
                begins[i], logprobs[i] = len(self.observations[i]), []
        return parts, episodic_returns


@torch.no_grad()
def next_values(policy: Policy, parts: list[Part]) -> torch.Tensor:
    """The critic's value after each part, float32[parts]: 0 where the episode ended, else that of the state in which its next token is chosen."""
    values = torch.zeros(len(parts))
    going_on = [number for number, part in enumerate(parts) if not part.done]
    if going_on:
        token_ids = [np.append(parts[number].token_ids, np.int32(policy.tokenizer.eos_id)) for number in going_on]  # any token would do
        masks = [np.append(np.zeros_like(parts[number].mask), np.int8(1)) for number in going_on]
        values[going_on] = policy.evaluate(token_ids, masks).value
    return values


def gae(parts: list[Part], values: torch.Tensor, last_values: torch.Tensor, gamma: float, gae_lambda: float) -> torch.Tensor:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16) over the sampled tokens: float32[tokens]."""
    advantages = torch.zeros_like(values)
    end = 0
    for part, next_value in zip(parts, last_values, strict=True):
        start, end = end, end + len(part.logprobs)
        reward, last_advantage = part.reward, torch.tensor(0.0)
        for t in reversed(range(start, end)):
            delta = reward + gamma * next_value - values[t]
            advantages[t] = last_advantage = delta + gamma * gae_lambda * last_advantage
            reward, next_value = 0.0, values[t]
    return advantages


def train(args: Args, **env_arguments: object) -> Policy:
    """The shipped policy after training."""
    venv = gym.make_vec("SearchQA-World-v0", num_envs=args.num_envs, autoreset_mode="SAME_STEP", hops=2, **env_arguments)
    policy = Policy.load(shipped_checkpoint(), venv.unwrapped.tokenizer)
    policy.add_value_head()
    optimizer = torch.optim.AdamW(policy.scorer.parameters(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0)
    rollout = Rollout(venv, policy, args)
    writer = None
    if args.tensorboard_dir is not None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(args.tensorboard_dir))
    started = time.perf_counter()
    for update in range(args.num_updates):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1 - update / args.num_updates) * args.learning_rate

        # 1. play
        parts, episodic_returns = rollout.collect()
        if not parts:
            print(f"update {update}: 0 episodes, the search back end does not answer", flush=True)
            continue

        # 2. advantages of all N sampled tokens, one part after the other
        token_ids, masks = [part.token_ids for part in parts], [part.mask for part in parts]
        old_logprobs = torch.from_numpy(np.concatenate([part.logprobs for part in parts]))  # [N]
        with torch.no_grad():
            values = policy.evaluate(token_ids, masks).value  # [N]
            advantages = gae(parts, values, next_values(policy, parts), args.gamma, args.gae_lambda)  # [N]
        returns = advantages + values
        tokens = np.split(np.arange(len(values)), np.cumsum([len(part.logprobs) for part in parts])[:-1])  # of each part

        # 3. update: minibatches of whole parts, because the tokens of one share their forward pass
        clipfracs = []
        for _ in range(args.update_epochs):
            for minibatch in np.array_split(rollout.rng.permutation(len(parts)), min(args.num_minibatches, len(parts))):
                indices = torch.from_numpy(np.concatenate([tokens[number] for number in minibatch]))  # [M]
                stats = policy.evaluate(
                    [token_ids[n] for n in minibatch], [masks[n] for n in minibatch], entropy_gradient=args.ent_coef > 0
                )
                logratio = stats.logprob - old_logprobs[indices]
                ratio = logratio.exp()
                with torch.no_grad():
                    old_approx_kl = (-logratio).mean()
                    approx_kl = ((ratio - 1) - logratio).mean()  # http://joschu.net/blog/kl-approx.html
                    clipfracs.append(((ratio - 1).abs() > args.clip_coef).float().mean().item())

                mb_advantages = advantages[indices]
                if args.norm_adv:
                    mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = torch.max(-mb_advantages * ratio, -mb_advantages * clipped_ratio).mean()

                v_loss = (stats.value - returns[indices]) ** 2
                if args.clip_vloss:
                    v_clipped = values[indices] + (stats.value - values[indices]).clamp(-args.clip_coef, args.clip_coef)
                    v_loss = torch.max(v_loss, (v_clipped - returns[indices]) ** 2)
                v_loss = 0.5 * v_loss.mean()

                entropy_loss = stats.entropy.mean()
                loss = pg_loss - args.ent_coef * entropy_loss + args.vf_coef * v_loss
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(policy.scorer.parameters(), args.max_grad_norm)
                optimizer.step()
            if args.target_kl is not None and approx_kl > args.target_kl:
                break

        # 4. tell
        explained_variance = 1 - ((returns - values).var() / returns.var().clamp(min=1e-8)).item()
        metrics = {
            "charts/episodic_return": float(np.mean(episodic_returns)) if episodic_returns else None,
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/SPS": (update + 1) * args.num_steps * args.num_envs / (time.perf_counter() - started),
            "losses/value_loss": v_loss.item(),
            "losses/policy_loss": pg_loss.item(),
            "losses/entropy": entropy_loss.item(),
            "losses/old_approx_kl": old_approx_kl.item(),
            "losses/approx_kl": approx_kl.item(),
            "losses/clipfrac": float(np.mean(clipfracs)),
            "losses/explained_variance": explained_variance,
        }
        known = {name: value for name, value in metrics.items() if value is not None}  # no episode may have ended
        if writer is not None:
            for name, value in known.items():
                writer.add_scalar(name, value, (update + 1) * args.num_steps * args.num_envs)
        print(f"update {update}: " + ", ".join(f"{name.split('/')[1]} {value:.4g}" for name, value in known.items()), flush=True)
    if writer is not None:
        writer.close()
    venv.close()
    return policy


if __name__ == "__main__":
    from measure import run

    run(lambda seed: train(Args(seed=seed)))
