"""Gymnasium environments for multi-turn search question answering. Importing this package registers the ids.

>>> import gymnasium as gym, searchqa_envs
>>> env = gym.make("SearchQA-World-v0")
"""

from pathlib import Path
from typing import Any

import gymnasium as gym

from searchqa_retrievers.text_model_tokenizers import TextTokenizer, register_tokenizer_loader

_IDS = {
    "SearchQA-World-v0": "world",
    "SearchQA-HotpotQA-v0": "hotpotqa",
    "SearchQA-2WikiMultiHopQA-v0": "2wikimultihopqa",
    "SearchQA-MuSiQue-v0": "musique",
    "SearchQA-Bamboogle-v0": "bamboogle",
    "SearchQA-NQ-v0": "nq",
    "SearchQA-TriviaQA-v0": "triviaqa",
    "SearchQA-PopQA-v0": "popqa",
    "SearchQA-Custom-v0": "custom",
}

ENV_IDS = tuple(_IDS)

for _id, _dataset in _IDS.items():
    if _id not in gym.registry:
        gym.register(
            id=_id,
            entry_point="searchqa_envs.env:SearchQAEnv",
            vector_entry_point="searchqa_envs.vector:SearchQAVectorEnv",
            kwargs={"dataset": _dataset},
        )


def _embedded_tokenizer(folder: Path) -> TextTokenizer | None:
    """For simulated search engines, whose package knows no tokenizers of environments."""
    from searchqa_envs.tokenizers.of_checkpoints import embedded_tokenizer

    return embedded_tokenizer(folder)


register_tokenizer_loader(_embedded_tokenizer)

__all__ = ["ENV_IDS", "SearchQAEnv", "SearchQAVectorEnv"]


def __getattr__(name: str) -> Any:
    if name == "SearchQAEnv":
        from searchqa_envs.env import SearchQAEnv

        return SearchQAEnv
    if name == "SearchQAVectorEnv":
        from searchqa_envs.vector import SearchQAVectorEnv

        return SearchQAVectorEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
