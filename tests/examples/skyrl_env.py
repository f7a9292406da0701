"""What SkyRL does with a row of our questions, without SkyRL's trainer: python tests/examples/skyrl_env.py"""

from __future__ import annotations

import skyrl_gym

from searchqa_agents.integrations.skyrl import question_rows, register


def main() -> float:
    """Play an episode on the first two-hop question of the generated world by its gold chain; the reward."""
    register("SearchQA-World-v0", hops=2)  # in SkyRL: inside the Ray task of the entry point
    row = next(question_rows("SearchQA-World-v0", [0], hops=2))  # in SkyRL: a row of the Parquet file
    prompt, env_class = row.pop("prompt"), row.pop("env_class")
    with skyrl_gym.make(env_class, env_config={}, extras=row) as env:
        conversation, _ = env.init(prompt)
        question = env.question
        turns = [f"<search> {hop['query']} </search>" for hop in question.metadata["chain"]] + [
            f"<answer> {question.golden_answers[0]} </answer>"
        ]
        for action in turns:
            output = env.step(action)
            conversation += [{"role": "assistant", "content": action}, *output["observations"]]
        for message in conversation:
            print(f"{message['role']:9}  {message['content'].strip()}")
        print(f"reward {output['reward']:g}, metrics {env.get_metrics()}")
        return float(output["reward"])


if __name__ == "__main__":
    main()
