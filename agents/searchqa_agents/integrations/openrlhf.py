"""OpenRLHF (0.11): an agent executor that plays our episodes. OpenRLHF samples and trains; prompt, loss mask and reward are the environment's.

How to use it: write rows (``searchqa data rows hotpotqa --split train --engine openrlhf --out train.jsonl``), and a file for
``--train.agent_func_path``::

    from searchqa_agents.integrations.openrlhf import agent_executor

    AgentExecutor = agent_executor(env={"retriever": "bm25", "reward": "em"})

with ``--data.input_key input --data.label_key label``. The label says which question of which environment; the input is there for OpenRLHF to log.

It replaces OpenRLHF's ``MultiTurnAgentExecutor``, which hands texts to and fro and encodes what the environment says: there ids behind a closing tag
stay in the context, and a reply whose first ids would merge with the policy's last ones is another one than the environment wrote. Here ids are those
that the engine sampled and the environment wrote, and ``action_ranges`` covers exactly the former.

A lost search back end: OpenRLHF has no way to leave one sample out (a row without actions divides by zero in its KL), so after ``retries`` more tries
``EpisodeLostError`` stops the run, which goes on from its checkpoint. It is never trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from typing import Any

from searchqa_agents.integrations import engine_module
from searchqa_agents.integrations.episode_pool import EpisodePool, shared_pool
from searchqa_agents.integrations.played_episode import Generated, PlayedEpisode, play_episode
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers.huggingface import HuggingFaceTokenizer

_REQUIREMENT = "openrlhf >=0.11,<0.12, in an environment of its own (scripts/engines_environment.sh makes one that is enough for tests)"
_AgentExecutorBase: Any = engine_module("openrlhf.utils.agent", "openrlhf", _REQUIREMENT).AgentExecutorBase


class SearchQAAgentExecutor(_AgentExecutorBase):  # type: ignore[misc]
    """One episode of a SearchQA environment for each sample.

    Parameters
    ----------
    env
        Arguments of the environment (``retriever``, ``dialect``, ``reward``, budgets, ...) except which one it is and its split, which labels name.
        Default ``tokenizer``: the model's own; default ``max_context_tokens``: OpenRLHF's ``max_length``.
    num_envs
        Places in the process's vector environment: so many episodes go on at a time, the others wait for a place.
    retries
        How often an episode that was lost is played again before the run stops.
    """

    def __init__(self, *, env: Mapping[str, Any] | None = None, num_envs: int = 512, retries: int = 3) -> None:
        self.env = dict(env or {})
        if misplaced := sorted(set(self.env) & {"id", "split"}):
            raise ConfigurationError(f"Labels name the environment and its split; {misplaced} must not be in env.")
        self.num_envs = num_envs
        self.retries = retries

    async def execute(
        self, prompt: str, label: str, sampling_params: Any, max_length: int, hf_tokenizer: Any, llm_engine: Any, images: Any = None
    ) -> dict[str, Any]:
        """Play the label's question; the response in OpenRLHF's form. Raises ``EpisodeLostError`` if it is lost every time."""
        where = json.loads(label)
        pool = self._pool(where, max_length, hf_tokenizer)
        wants_logprobs = sampling_params.logprobs is not None

        async def generate(context: list[int]) -> Generated:
            parameters = deepcopy(sampling_params)
            parameters.max_tokens = pool.venv.max_segment_tokens
            parameters.stop = list(pool.venv.dialect.closers)
            parameters.stop_token_ids = [pool.venv.tokenizer.eos_id]
            parameters.include_stop_str_in_output = True
            request = await llm_engine.generate(context, parameters, multi_modal_data=None)
            output = request.outputs[0]
            ids = list(output.token_ids)
            logprobs = None
            if wants_logprobs:
                logprobs = [float(of_token[token].logprob) for token, of_token in zip(ids, output.logprobs or [], strict=False)]
            return Generated(ids, logprobs, aborted=output.finish_reason == "abort")

        played = await play_episode(pool, where["question_id"], generate, retries=self.retries)
        return _response(prompt, label, images, played)

    def _pool(self, where: Mapping[str, Any], max_length: int, hf_tokenizer: Any) -> EpisodePool:
        arguments = {"max_context_tokens": max_length, "split": where["split"]} | self.env
        if arguments["max_context_tokens"] > max_length:
            raise ConfigurationError(
                f"max_context_tokens must be at most OpenRLHF's max_length, {max_length}, behind which it cuts; got {arguments['max_context_tokens']}."
            )
        if arguments.get("tokenizer") is None:
            arguments["tokenizer"] = _tokenizer(hf_tokenizer)
        return shared_pool(where["env_id"], self.num_envs, **arguments)


def agent_executor(**settings: Any) -> type[SearchQAAgentExecutor]:
    """The class that OpenRLHF's agent file must define, with these settings (see :class:`SearchQAAgentExecutor`)."""

    class AgentExecutor(SearchQAAgentExecutor):
        def __init__(self) -> None:
            super().__init__(**settings)

    return AgentExecutor


def _response(prompt: str, label: str, images: Any, played: PlayedEpisode) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "label": label,
        "images": images,
        "mm_train_inputs": None,
        "reward": played.reward,
        "scores": played.reward,
        "observation_tokens": played.token_ids.tolist(),
        "action_ranges": played.action_ranges,
        "rollout_log_probs": None if played.logprobs is None else played.logprobs.tolist(),
        "truncated": played.truncated,
        "extra_logs": {name: played.info["metrics"][name] for name in ("em", "f1", "searches", "invalid_turns")},
    }


@lru_cache(maxsize=8)
def _tokenizer(tokenizer: Any) -> HuggingFaceTokenizer:
    """The environment's view of the model's tokenizer, made once."""
    return HuggingFaceTokenizer(tokenizer)
