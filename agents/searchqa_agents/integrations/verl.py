"""verl (0.9): an agent loop that plays our episodes. verl samples and trains; prompt, loss mask and reward are the environment's.

How to use it: write rows (``searchqa data rows hotpotqa --split train --out train.parquet``) and name the file of agent loops to verl:
``actor_rollout_ref.rollout.agent.agent_loop_config_path=<searchqa_agents>/integrations/verl_agent_loops.yaml``. ``scripts/verl`` has the whole command.
A row says which question of which environment, and by which agent loop (``agent_name``) it is played; the file says how it is played.

What is exact: ids are those that the server sampled and the environment wrote, nothing is encoded twice and verl's chat template is not used; the
mask is 1 exactly on sampled ids; each log-probability is the server's for the id at its place; the reward stands on the last id.

A lost search back end (or a server that broke off a segment) is no sample. The episode is played again ``retries`` times; then

- verl's trainer (``trainer.use_v1=true``, the default) is told by an error, and drops it: the other samples of the group are trained on, and their
  baseline is that of those that are left (``sync``), or the whole group is replaced (asynchronous modes). Where nothing is left of a whole batch,
  ``sync`` stops the run. ``trainer.v1.sampler.sync_refill_failed_groups=true`` would replace groups of which nothing is left, for as long as it takes:
  with a back end that is gone for good, for ever.
- verl's older trainer (``trainer.use_v1=false``) cannot leave a sample out. It gets one whose ``response_mask`` is 0 throughout, so that none of its
  tokens is in a loss; its reward of 0 does count in the baseline of its group (GRPO, RLOO) and in validation (``lost`` says how many there were).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from uuid import uuid4

from searchqa_agents.integrations import engine_module
from searchqa_agents.integrations.episode_pool import EpisodePool, shared_pool
from searchqa_agents.integrations.played_episode import EpisodeLostError, Generated, PlayedEpisode, play_episode
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.tokenizers.huggingface import HuggingFaceTokenizer

_REQUIREMENT = (
    "verl >=0.9,<0.10, in an environment of its own, for it needs an older transformers (scripts/engines_environment.sh makes one)"
)
_engine: Any = engine_module("verl.experimental.agent_loop.agent_loop", "verl", _REQUIREMENT)
_AgentLoopBase: Any = _engine.AgentLoopBase

_GIVEN_BY_VERL = {"tools", "name"}
"""What verl's worker passes beside the arguments of ``AgentLoopBase``: its tools, and the entry's own name."""
_METRICS = ("em", "f1", "cover_em", "sub_em", "searches", "invalid_turns")
"""Those that every episode has; how many supporting titles were found is not known for every question."""


class SearchQAAgentLoop(_AgentLoopBase):  # type: ignore[misc]
    """One episode of a SearchQA environment for each row.

    It gets its name from the file of agent loops. verl's decorator ``register`` would put a nameless set of defaults in the place of the file's entry
    when this module is imported, which is after the file was read.

    Parameters
    ----------
    env
        Arguments of the environment (``retriever``, ``dialect``, ``reward``, budgets, ...) except which one it is and its split, which rows name. Default
        ``tokenizer``: the model's own. ``max_context_tokens`` counts the prompt; where it exceeds ``rollout.response_length``, responses may be cut.
    num_envs
        Places in the process's vector environment: so many episodes go on at a time, the others wait for a place.
    retries
        How often an episode that was lost is played again.
    **engine
        What verl gives to every agent loop.
    """

    def __init__(self, *, env: Mapping[str, Any] | None = None, num_envs: int = 512, retries: int = 1, **engine: Any) -> None:
        known = set(inspect.signature(_AgentLoopBase.__init__).parameters) | _GIVEN_BY_VERL
        if unknown := sorted(set(engine) - known):
            raise ConfigurationError(f"An agent loop takes env, num_envs and retries; got {unknown}. Correct its entry in the YAML file.")
        super().__init__(**engine)
        if self.rollout_config.get("enable_rollout_routing_replay", False):
            raise ConfigurationError("rollout.enable_rollout_routing_replay is not supported: segments are cut. Set it to false.")
        self.env = _plain(env or {})
        if misplaced := sorted(set(self.env) & {"id", "split"}):
            raise ConfigurationError(f"Rows name the environment and its split; {misplaced} must not be in the agent loop's env.")
        self.num_envs = num_envs
        self.retries = retries

    async def run(self, sampling_params: dict[str, Any], *, extra_info: Mapping[str, Any], priority: int = 0, **row: Any) -> Any:
        """Play the row's question; ``AgentLoopOutput`` in verl's form. Raises ``EpisodeLostError`` where the trainer can drop a sample."""
        pool = self._pool(extra_info)
        self._set_progress(pool, row.get("global_steps"))
        steps: list[int] = []
        sampling = self._sampling(sampling_params, pool)
        wants_logprobs = bool(sampling_params.get("logprobs"))
        full_determinism = self.rollout_config.get("full_determinism", False)
        request_id = f"det-{int(priority)}" if full_determinism else uuid4().hex  # the same for all turns: they go to the same server
        preempted: list[int] = []

        async def generate(context: list[int]) -> Generated:
            # servers pop from their parameters, and the members of a group share theirs
            output = await self.server_manager.generate(
                request_id=request_id, prompt_ids=context, sampling_params=dict(sampling), priority=int(priority)
            )
            versions = (output.extra_fields.get(name) for name in ("min_global_steps", "max_global_steps"))
            steps.extend(version for version in versions if version is not None)
            if output.num_preempted is not None:
                preempted.append(output.num_preempted)
            logprobs = (output.log_probs or []) if wants_logprobs else None
            return Generated(output.token_ids, logprobs, aborted=output.stop_reason in ("aborted", "abort"))

        try:
            played = await play_episode(pool, extra_info["question_id"], generate, retries=self.retries)
        except EpisodeLostError:
            if "session_id" in row:  # given by the trainer's worker, which leaves out the session of an agent loop that raises
                raise
            return await self._nothing(pool, extra_info["question_id"], wants_logprobs)
        return self._output(pool, played, steps, sum(preempted) if preempted else -1)

    def _pool(self, extra_info: Mapping[str, Any]) -> EpisodePool:
        arguments = {"max_context_tokens": self.rollout_config.response_length, "split": extra_info["split"]} | self.env
        if arguments.get("tokenizer") is None:
            arguments["tokenizer"] = _tokenizer(self.tokenizer)
        return shared_pool(extra_info["env_id"], self.num_envs, **arguments)

    def _set_progress(self, pool: EpisodePool, step: Any) -> None:
        """Feed schedules of reward and retriever, from 1 on as ours does. The older trainer does not tell its step: schedules stay at their beginning."""
        if step is None:
            return
        trainer = self.config.trainer
        total = trainer.total_training_steps
        if total is None:  # the trainer has written what it made of the epochs here, in updates
            mode = trainer.v1.get(trainer.v1.trainer_mode) or {}
            total = self.config.actor_rollout_ref.actor.optim.total_training_steps // mode.get("parameter_sync_step", 1)
        progress = (int(step), max(int(total), 0))
        if pool.venv.rules.progress != progress:
            pool.venv.set_progress(*progress)

    def _sampling(self, sampling_params: Mapping[str, Any], pool: EpisodePool) -> dict[str, Any]:
        """What verl samples with, and where a segment ends. A server that cannot stop there writes on, and what is too much is cut."""
        venv = pool.venv
        sampling = {**sampling_params, "max_tokens": venv.max_segment_tokens, "stop_token_ids": [venv.tokenizer.eos_id]}
        engine = self.rollout_config.name
        if engine == "vllm":
            sampling |= {"stop": list(venv.dialect.closers), "include_stop_str_in_output": True}
        elif engine == "sglang" and not self.rollout_config.skip_tokenizer_init:  # without a tokenizer it knows no texts
            sampling |= {"stop": list(venv.dialect.closers), "no_stop_trim": True}
        return sampling

    def _output(self, pool: EpisodePool, played: PlayedEpisode, steps: list[int], num_preempted: int) -> Any:
        longest = self.rollout_config.prompt_length
        start, end = played.prompt_length, played.prompt_length + self.rollout_config.response_length
        if start > longest:
            raise ConfigurationError(f"The prompt has {start} ids, data.max_prompt_length is {longest}. Raise data.max_prompt_length.")
        response_ids, response_mask = played.token_ids[start:end].tolist(), played.loss_mask[start:end].tolist()
        logprobs = None if played.logprobs is None else played.logprobs[start:end].tolist()
        if not response_ids:  # an empty segment that ended the episode: verl needs an id to put the reward on
            response_ids, response_mask = [pool.venv.tokenizer.eos_id], [0]
            logprobs = None if logprobs is None else [0.0]
        metrics = {"generate_sequences": played.seconds["model"], "tool_calls": played.seconds["environment"]}
        return _engine.AgentLoopOutput(
            prompt_ids=played.token_ids[:start].tolist(),
            response_ids=response_ids,
            response_mask=response_mask,
            response_logprobs=logprobs,
            reward_score=played.reward,
            num_turns=2 * played.segments,  # the prompt or a reply, and a segment
            metrics=_engine.AgentLoopMetrics(**metrics, num_preempted=num_preempted),
            extra_fields=_extra_fields(pool, played.info, steps),
        )

    async def _nothing(self, pool: EpisodePool, question_id: str, with_logprobs: bool) -> Any:
        """A sample of which no token enters a loss, for the trainer that cannot leave one out."""
        async with pool.episode({"question_id": question_id}) as episode:
            prompt_ids = episode.observation.tolist()
        return _engine.AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=[pool.venv.tokenizer.eos_id],
            response_mask=[0],
            response_logprobs=[0.0] if with_logprobs else None,
            reward_score=0.0,
            num_turns=0,
            metrics=_engine.AgentLoopMetrics(),
            extra_fields=_extra_fields(pool, None, []),
        )


def _extra_fields(pool: EpisodePool, info: Mapping[str, Any] | None, steps: list[int]) -> dict[str, Any]:
    """Metrics and terms of the reward, for verl's logs; ``info`` is None for a lost episode. verl wants the same names in every row."""
    metrics = {name: float(info["metrics"][name]) if info else 0.0 for name in _METRICS}
    terms = {f"reward_{name}": float(info["reward_terms"].get(name, 0.0)) if info else 0.0 for name in pool.venv.rules.reward.terms or ()}
    return {
        "reward_extra_info": {**metrics, **terms, "lost": float(info is None)},
        "turn_scores": [],
        "tool_rewards": [],
        "min_global_steps": min(steps, default=None),
        "max_global_steps": max(steps, default=None),
    }


def _plain(env: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of what Hydra passes, which is its own kind of mapping."""
    from omegaconf import DictConfig, OmegaConf

    plain: Any = OmegaConf.to_container(env, resolve=True) if isinstance(env, DictConfig) else env
    return dict(plain)


@lru_cache(maxsize=8)
def _tokenizer(tokenizer: Any) -> HuggingFaceTokenizer:
    """The environment's view of verl's tokenizer: making it takes seconds, and verl makes an agent loop for every sample."""
    return HuggingFaceTokenizer(tokenizer)
