"""What each process of test_parallel.py does; the test does the same in one process, by the same functions."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

import searchqa_envs  # noqa: F401  # registers the ids
from searchqa_agents.algorithm import get_algorithm
from searchqa_agents.batch import make_batch
from searchqa_agents.learner import Learner
from searchqa_agents.lora import add_lora
from searchqa_agents.models import make_tiny_model
from searchqa_agents.optimisation import TrainingDivergedError
from searchqa_agents.parallel import ProcessGroup, processes, whole
from searchqa_agents.policy import Policy
from searchqa_agents.rollout import rollout
from searchqa_agents.trainer import backward, totals_of, train

SMALL = {"steps": 2, "questions_per_step": 3, "group_size": 2, "num_worlds": 1, "learning_rate": 1e-3, "max_tokens": 128}
CASES = {
    "grpo": ("grpo", {"kl_coef": 0.1, "entropy_coef": 0.01}),
    "ppo-separate": ("ppo", {"critic": "separate", "critic_learning_rate": 2e-3}),
    "ppo-shared": ("ppo", {"critic": "shared", "num_minibatches": 2, "gradient_checkpointing": True}),
    "ppo-lora": ("ppo", {"kl_coef": 0.1}),
    "gigpo": ("grpo", {"credit": "turn"}),
    "gspo": ("gspo", {}),
    "raft": ("raft", {}),
    "reinforce": ("reinforce", {}),
    "reinforce_plus_plus": ("reinforce_plus_plus", {"baseline": "group"}),
    "rloo": ("rloo", {}),
}
RUNS = ("grpo", "ppo-lora")
"""those of which a whole run is compared too"""
KINDS = ("ddp", "fsdp2")


def make_env():
    return gym.make_vec(
        "SearchQA-World-v0", num_envs=4, autoreset_mode="DISABLED", max_segment_tokens=8, max_turns=3, reward=searches_and_length
    )


def searches_and_length(episode):
    """Differs between episodes of a policy with random weights."""
    return {"searches": float(episode.searches), "length": 0.01 * sum(len(turn.segment) for turn in episode.turns)}


class TagLover(Policy):
    """Writes many tags, so that there are searches and answers without training."""

    def __init__(self, model, tokenizer):
        super().__init__(model, tokenizer)
        self.bonus = torch.zeros(tokenizer.vocab_size)
        self.bonus[[tokenizer.encode(tag)[0] for tag in ("<search>", "</search>", "<answer>", "</answer>")]] = 4.0

    def logits(self, hidden):
        return super().logits(hidden) + self.bonus


def make_policy(seed=0):
    tokenizer = make_env().unwrapped.tokenizer
    shape = {"hidden_size": 32, "feed_forward_size": 48, "initializer_range": 0.1}
    return TagLover(make_tiny_model(tokenizer.vocab_size, seed, pad_id=tokenizer.pad_id, eos_id=tokenizer.eos_id, **shape), tokenizer)


def policy_of(case):
    policy = make_policy()
    if case.endswith("-lora"):
        add_lora(policy, rank=2)
    return policy


def make_learner(case, parallel):
    name, changed = CASES[case]
    algorithm = get_algorithm(name)
    config = algorithm.config(**{**SMALL, **changed})
    return algorithm, config, Learner(policy_of(case), config, has_critic=algorithm.critic, parallel=parallel)


def one_update(case, parallel):
    """The gradients of one update on a fixed batch, and what the batch was annotated with."""
    trajectories = rollout(make_env(), make_policy(), [0, 1, 2], group_size=3, seed=5)
    algorithm, config, learner = make_learner(case, parallel)
    for module in (learner.scorer, learner.critic):
        if module is not None:
            fill_zeros(module, parallel)
    with learner.updating():
        batch = learner.annotate(make_batch(trajectories, [i // 3 for i in range(9)]))
        batch = algorithm.advantages(batch, config)
        totals = totals_of(batch, 0)
        metrics = parallel.summed(backward(learner, algorithm, batch, totals, config))
        gradients = {
            f"{which}.{name.removeprefix('module.')}": whole(parameter.grad).clone()
            for which, module in (("scorer", learner.scorer), ("critic", learner.critic))
            if module is not None
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        metrics |= learner.update(0)
    return {"gradients": gradients, "metrics": metrics, "values": batch.values, "reference": batch.reference_logprobs}


def fill_zeros(module, parallel):
    """New value heads and adapters are 0, so that nothing behind them would have a gradient."""
    state = {name.removeprefix("module."): whole(tensor).clone() for name, tensor in module.state_dict().items()}
    for name, tensor in state.items():
        if name == "value_head.weight" or "lora_B" in name:
            state[name] = torch.linspace(-0.2, 0.2, tensor.numel()).reshape(tensor.shape)
    parallel.load_module(module, state)


def two_steps(case, parallel, state=None):
    """Trajectories, metrics, checkpoints and final weights of a short training run."""
    name, changed = CASES[case]
    policy, trajectories, metrics, states = policy_of(case), [], [], {}
    train(
        policy,
        make_env(),
        name,
        get_algorithm(name).config(**{**SMALL, **changed}, checkpoint_every=1),
        on_rollout=lambda step, played: trajectories.append(played),
        on_step=lambda step, values: metrics.append(values),
        on_checkpoint=lambda step, saved: states.update({step: saved, f"policy-{step}": weights(policy)}),
        state=state,
        parallel=parallel,
    )
    return {
        "trajectories": [[t.to_json() | {"seconds": None} for t in played] for played in trajectories],
        "metrics": metrics,
        "states": states,
        "weights": weights(policy),
    }


def weights(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()])


def losses_that_diverge_in_one_process(parallel):
    """What an update says of a loss that is not a number in process 1 alone, and the weights after it."""
    _, _, learner = make_learner("grpo", parallel)
    trajectories = rollout(make_env(), make_policy(), [0, 1], group_size=1, seed=5)
    with learner.updating():
        stats = learner.evaluate(make_batch(trajectories, [0, 1]))
        learner.backward(stats.logprob.sum() * (float("nan") if parallel.rank == 1 else 1.0))
        try:
            learner.update(0)
            said = None
        except TrainingDivergedError as error:
            said = str(error)
    return {"said": said, "weights": weights(learner.policy)}


def shared_micro_batches(parallel):
    """For some lengths: every process's micro-batches of at most three sequences."""
    rng = np.random.default_rng(0)
    cases = [rng.integers(1, 50, size=size).tolist() for size in range(12)]

    def batched(indices):
        return [indices[start : start + 3] for start in range(0, len(indices), 3)]

    return [parallel.gather([parallel.micro_batches(lengths, batched)]) for lengths in cases]


def compare(folder):
    """Everything that the tests compare, in both forms; each process writes what it found."""
    states = torch.load(folder / "states.pt", weights_only=True)  # of one process, by case
    with processes() as group:
        found = {"shares": group.gather(group.share(range(7))), "sum": group.summed({"a": 1.0, str(group.rank): 2.0})}
        found["micro_batches"] = shared_micro_batches(group)
        for kind in KINDS:
            parallel = ProcessGroup(kind, torch.device("cpu"))
            found[kind] = {"diverged": losses_that_diverge_in_one_process(parallel)}
            for case in CASES:
                found[kind][case] = {"update": one_update(case, parallel)}
            for case in RUNS:
                found[kind][case] |= {
                    "run": two_steps(case, parallel),
                    "continued": two_steps(case, parallel, states[case])["weights"],
                }
        torch.save(found, folder / f"process{group.rank}.pt")


def die(folder):
    """Process 1 is killed while process 0 waits for it."""
    with processes("ddp") as parallel:
        if parallel.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        parallel.gather([1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"compare": compare, "die": die}[sys.argv[1]](Path(sys.argv[2]))
