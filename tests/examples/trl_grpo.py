"""TRL's GRPOTrainer, unmodified, trains the shipped policy: python tests/examples/trl_grpo.py --seed 0"""

import tempfile

import gymnasium as gym
from measure import run
from trl import GRPOConfig, GRPOTrainer

from searchqa_agents.integrations.trl import embedded_processing_class, environment_reward, make_rollout_func, question_rows
from searchqa_agents.loading import shipped_checkpoint
from searchqa_agents.policy import Policy
from searchqa_agents.rollout import draw_questions


def train(seed: int = 0, updates: int = 15, questions: int = 32, group_size: int = 8, learning_rate: float = 3e-4) -> Policy:
    """The shipped policy after so many updates, each on ``group_size`` episodes of every question."""
    venv = gym.make_vec("SearchQA-World-v0", num_envs=questions * group_size, autoreset_mode="DISABLED", hops=2)
    policy = Policy.load(shipped_checkpoint(), venv.unwrapped.tokenizer)
    drawn = draw_questions(venv.unwrapped.source, updates * questions, seed=seed, num_worlds=updates * 8)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=policy.model,
            reward_funcs=environment_reward,
            args=GRPOConfig(
                output_dir=folder,
                max_steps=updates,
                num_generations=group_size,
                per_device_train_batch_size=questions * group_size // 4,
                gradient_accumulation_steps=4,
                learning_rate=learning_rate,
                lr_scheduler_type="constant",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                seed=seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=5,
            ),
            train_dataset=question_rows(venv, drawn),
            processing_class=embedded_processing_class(venv.unwrapped.tokenizer),
            rollout_func=make_rollout_func(venv),
        )
        trainer.train()
    return Policy(policy.model, venv.unwrapped.tokenizer)


if __name__ == "__main__":
    run(train)
