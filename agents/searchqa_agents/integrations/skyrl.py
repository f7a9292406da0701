"""Our environments as a text environment of SkyRL (``skyrl-gym``).

The environment must be known in the process that makes it, SkyRL's entry point task::

    @ray.remote(num_cpus=1)
    def entrypoint(config):
        from searchqa_agents.integrations.skyrl import register

        register("SearchQA-HotpotQA-v0", tokenizer="Qwen/Qwen2.5-3B-Instruct")
        BasePPOExp(config).run()

and rows of its data name ``env_class: searchqa`` and a ``question_id`` (:func:`question_rows`). These settings of SkyRL belong to it:

- ``environment.env_class=searchqa generator.batched=false``
- ``generator.use_conversation_multi_turn=false``: environment text goes on in the same message, as in Search-R1. With ``true`` it becomes a user's message,
  wrapped in the chat template.
- ``generator.sampling_params.stop='["</search>", "</answer>"]'`` (the dialect's closing tags), and the same for ``eval_sampling_params``. What stands behind
  a closing tag is not read here, but SkyRL trains on it.
- ``generator.max_turns``: SkyRL hands it to the environment. Its default is 1. An argument ``max_turns`` of ours wins.

What is exact, tried with the generator of skyrl 0.3.0 and a made-up engine: SkyRL keeps the ids that it sampled (mask 1) and encodes environment text by itself
(mask 0). With the policy's tokenizer as ``tokenizer``, prompt and environment text are the ids that our environment has for them; but without
``use_conversation_multi_turn`` SkyRL ends every episode with an end of sequence that nobody sampled, of mask 1 and log-probability 0, which carries the
reward. Segments pass as text: the environment's own ids of them, by which it counts its budgets, may differ from those sampled.

Not to be had: SkyRL drops no sample, so an episode whose search back end stays lost is an error that ends its run (go on from its last checkpoint). It tells
environments nothing of its progress: schedules of reward and retriever stay at their beginning. Each search is a call of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gymnasium.utils import seeding

from searchqa_agents.integrations import engine_module
from searchqa_agents.integrations.episode_pool import shared_pool
from searchqa_agents.integrations.played_episode import EpisodeLostError
from searchqa_envs.episode import Step
from searchqa_envs.errors import ConfigurationError, InvalidSegmentError
from searchqa_envs.questions import Question, question_of
from searchqa_envs.rules import Rules
from searchqa_envs.slot import EpisodeSlot
from searchqa_retrievers.types import SearchRequest

_REQUIREMENT = ("skyrl", "skyrl-gym 0.4")
_base: Any = engine_module("skyrl_gym.envs.base_text_env", *_REQUIREMENT)

Messages = list[dict[str, str]]
ENV_CLASS = "searchqa"


def register(env_id: str, *, name: str = ENV_CLASS, retries: int = 1, **arguments: Any) -> None:
    """Make ``skyrl_gym.make(name)`` known in this process.

    Parameters
    ----------
    env_id, arguments
        As for ``gymnasium.make``. SkyRL's ``env_config``, where it has one of this name, goes over them.
    retries
        How often a failed search is asked again before :class:`EpisodeLostError`.
    """
    kwargs = {"env_id": env_id, "retries": retries, "arguments": arguments}
    engine_module("skyrl_gym", *_REQUIREMENT).register(id=name, entry_point=f"{__name__}:{SearchQATextEnv.__name__}", kwargs=kwargs)


def question_rows(
    env_id: str, chosen: Sequence[int | str] | None = None, *, name: str = ENV_CLASS, **arguments: Any
) -> Iterator[dict[str, Any]]:
    """Rows for a Parquet or JSON lines file that SkyRL's ``data.train_data`` or ``data.val_data`` names.

    Each has the prompt that the environment will show (SkyRL leaves out rows by its length), its environment, split and question.

    Parameters
    ----------
    env_id, name, arguments
        See :func:`register`.
    chosen
        Indices or ids of questions; default: all.
    """
    rules = _shared_rules(env_id, arguments)
    source = rules.source
    for one in range(len(source)) if chosen is None else chosen:
        question = question_of(source, one)
        yield {
            "prompt": [{"role": "user", "content": _prompt(rules, question)}],
            "env_class": name,
            "data_source": source.name,
            "env_id": env_id,
            "split": str(source.stamp()["split"]),
            "question_id": question.id,
        }


class SearchQATextEnv(_base.BaseTextEnv):  # type: ignore[misc]  # skyrl-gym is not typed
    """One episode of one of our environments, text in and text out. Data, index and tokenizer are shared by all of a process.

    Parameters
    ----------
    env_config
        Arguments of the environment, over ``arguments``.
    extras
        The row: ``question_id``; ``env_id`` and ``split`` if it names them, so that rows for validation can be of another split; SkyRL's ``max_turns``.
    env_id, retries, arguments
        See :func:`register`.
    """

    def __init__(
        self,
        env_config: Mapping[str, Any] | None = None,
        extras: Mapping[str, Any] | None = None,
        *,
        env_id: str,
        retries: int = 1,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        row = dict(extras or {})
        if not isinstance(row.get("question_id"), str):
            raise ConfigurationError(
                f"A row must have the id of its question as question_id; got {sorted(row)}. Make rows with question_rows."
            )
        given = {**_chosen(row, "max_turns"), **(arguments or {}), **(env_config or {}), **_chosen(row, "split")}
        self._rules = _shared_rules(row.get("env_id", env_id), given)
        self._slot = EpisodeSlot(self._rules)
        self._question_id: str = row["question_id"]
        self._retries = retries
        self._metrics: dict[str, float] = {}
        self.max_turns = self._rules.max_turns

    @property
    def question(self) -> Question:
        """The question being played. Raises ``EpisodeStateError`` before :meth:`init`."""
        return self._slot.current().question

    def init(self, prompt: Messages) -> tuple[Messages, dict[str, Any]]:
        """Begin the episode: the environment's own prompt as a user's message, behind system messages that the row's prompt has."""
        generator, _ = seeding.np_random(None)
        _, info = self._slot.reset(generator, fresh_order=True, options={"question_id": self._question_id})
        self.turns, self._metrics = 0, {}
        system = [message for message in prompt if message["role"] == "system"]
        text = _prompt(self._rules, self.question)
        return [*system, {"role": "user", "content": text}], {name: info[name] for name in ("question_id", "question")}

    def step(self, action: str) -> dict[str, Any]:
        """Take a segment of text.

        ``observations`` is the environment's reply as a user's message, nothing at the end; ``reward`` is 0.0 before the end. ``metadata`` has ``action``,
        ``query`` and ``turn``, at the end ``answer``, ``reward_terms`` and ``truncated`` too.

        Raises
        ------
        EpisodeLostError
            If the search back end is lost. The episode is as it was: the same step can be taken again.
        """
        if not isinstance(action, str):
            raise InvalidSegmentError(f"An action is text; got {type(action).__name__}.")
        episode = self._slot.current()
        request = episode.submit(self._rules.check_segment(self._rules.encode(action)))
        _, reward, terminated, truncated, info = episode.resolve() if request is None else self._searched(request)
        self.turns = info["turn"]
        done = terminated or truncated
        metadata = {name: info[name] for name in ("action", "query", "turn")}
        if done:
            self._metrics = {"reward": reward, **info["metrics"], "answered": float(info["answer"] is not None)}
            metadata |= {"answer": info["answer"], "reward_terms": info["reward_terms"], "truncated": truncated}
        reply = self._rules.tokenizer.decode(info["turn_record"].env_tokens.tolist())
        observations = [] if done else [{"role": "user", "content": reply}]
        return {"observations": observations, "reward": reward, "done": done, "metadata": metadata, "postprocessed_action": None}

    def _searched(self, request: SearchRequest) -> Step:
        for _ in range(self._retries + 1):
            answers, error, seconds = self._rules.search([request])
            if answers is not None:
                return self._slot.current().resolve(answers[0], None, seconds)
        raise EpisodeLostError(
            f"The search back end was lost, {self._retries + 1} times: {error}. SkyRL cannot leave out a sample, and one with an outage in it "
            "must not be trained on. Repair the back end, or give its retriever a longer budget, and resume SkyRL's run."
        )

    def get_metrics(self) -> dict[str, float]:
        """Reward, metrics, and whether there was an answer; nothing before the end (SkyRL may break an episode off for its length)."""
        return dict(self._metrics)


def _shared_rules(env_id: str, arguments: Mapping[str, Any]) -> Rules:
    return shared_pool(env_id, 1, **arguments).venv.rules


def _chosen(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {} if row.get(name) is None else {name: row[name]}


def _prompt(rules: Rules, question: Question) -> str:
    """The prompt without a chat template, which SkyRL puts round it."""
    text = rules.dialect.render_question(rules.prompt, rules.defused(question.question))
    return text + rules.dialect.last_turn_text if rules.forced_answer and rules.max_turns == 1 else text
