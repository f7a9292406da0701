"""Many environments in one, with one retriever call per step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from searchqa_envs.configuration import build_rules
from searchqa_envs.env import token_spaces
from searchqa_envs.episode import Step
from searchqa_envs.errors import ConfigurationError, EpisodeStateError
from searchqa_envs.rendering import render_episode
from searchqa_envs.rules import HasRules, positive_integer
from searchqa_envs.slot import EpisodeSlot

Observations = tuple[NDArray[np.int32], ...]
SubsetStep = tuple[Observations, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], tuple[dict[str, Any], ...]]


class SearchQAVectorEnv(HasRules, VectorEnv[Observations, Sequence[ArrayLike], NDArray[np.float64]]):
    """``num_envs`` places where :class:`SearchQAEnv`'s episodes are played; same arguments, identical episodes.

    Observations and actions are tuples of 1-D integer arrays. All searches of a step go to the retriever in one call, equal ones once.
    ``step_at`` and ``reset_at`` act on any subset, so that a rollout need not wait for the slowest; ``step`` is ``step_at`` of all, with the
    infos in Gymnasium's form (a dict of arrays with masks ``_key``) instead of one dict per environment.

    autoreset_mode
        ``NEXT_STEP`` (Gymnasium's default): the step after an end resets, whatever its action. ``SAME_STEP``: an ended environment is reset at
        once, ``final_obs`` and ``final_info`` are in its info. ``DISABLED``: the caller resets, with ``reset(options={"reset_mask": bool[N]})`` or
        ``reset_at``; the right mode for group rollouts.

    ``reset`` options: ``question_id`` or ``index`` (one value for all, or ``num_envs`` values: those outside the mask are ignored, None draws the
    next), and ``reset_mask``.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium declares it as an instance variable
        "render_modes": ["ansi"],
        "render_fps": 1,
    }

    def __init__(
        self,
        dataset: str,
        *,
        num_envs: int = 1,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        **arguments: Any,
    ) -> None:
        if render_mode not in (None, "ansi"):
            raise ConfigurationError(f"render_mode of the vector environment must be 'ansi' or None; got {render_mode!r}.")
        self.num_envs = positive_integer("num_envs", num_envs)
        self.render_mode = render_mode
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.rules = build_rules(dataset, **arguments)
        self._slots = [EpisodeSlot(self.rules) for _ in range(self.num_envs)]
        self._generators = [seeding.np_random(None)[0] for _ in range(self.num_envs)]
        self.single_observation_space, self.single_action_space = token_spaces(self.rules)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    # -- subsets -------------------------------------------------------------------------------------------------------------------------

    def reset_at(
        self, indices: Sequence[int], *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observations, tuple[dict[str, Any], ...]]:
        """Begin episodes in some environments.

        Parameters
        ----------
        indices
            Which environments, each at most once.
        seed
            One seed per index, or one integer: environment ``i`` then gets ``seed + i``.
        options
            ``question_id`` or ``index``: one value per index (None draws the next of the environment's order).

        Returns
        -------
        observations, infos
            One entry per index, in order.
        """
        slots = self._checked_indices(indices)
        seeds = self._seeds(seed, slots)
        chosen = _options_per_environment(options, len(slots))
        for i, one_options in zip(slots, chosen, strict=True):
            self._slots[i].chosen_index(one_options)  # a bad choice is an error before any environment is reset
        openings = []
        for i, one_seed, one_options in zip(slots, seeds, chosen, strict=True):
            if one_seed is not None:
                self._generators[i] = seeding.np_random(one_seed)[0]
            openings.append(self._slots[i].reset(self._generators[i], fresh_order=one_seed is not None, options=one_options))
        return tuple(observation for observation, _ in openings), tuple(info for _, info in openings)

    def step_at(self, indices: Sequence[int], segments: Sequence[ArrayLike]) -> SubsetStep:
        """Step some environments, with one retriever call for all of them.

        Returns observations (tuple of int32[T]), rewards float64[n], terminated bool[n], truncated bool[n] and infos (tuple of dicts), one entry per
        index, in order. If one segment is not valid, ``InvalidSegmentError`` is raised and no environment has moved.
        """
        slots = self._checked_indices(indices)
        if len(segments) != len(slots):
            raise ConfigurationError(f"step_at needs one segment per index; got {len(segments)} segments for {len(slots)} indices.")
        episodes = [self._slots[i].current() for i in slots]
        restarts = [episode.done for episode in episodes]
        if self.autoreset_mode is not AutoresetMode.NEXT_STEP and any(restarts):
            ended = [i for i, restart in zip(slots, restarts, strict=True) if restart]
            raise EpisodeStateError(
                f"The episodes of environments {ended} have ended; reset them with reset_at or a reset_mask before the next step."
            )
        checked = [None if restart else self.rules.check_segment(segment) for restart, segment in zip(restarts, segments, strict=True)]
        requests = [None if ids is None else episode.submit(ids) for episode, ids in zip(episodes, checked, strict=True)]
        asked = [request for request in requests if request is not None]
        answers, error, seconds = self.rules.search(asked) if asked else ([], None, 0.0)
        hits = iter(answers if answers is not None else [None] * len(asked))
        results: list[Step] = []
        for i, episode, ids, request in zip(slots, episodes, checked, requests, strict=True):
            if ids is None:
                observation, info = self._slots[i].reset(self._generators[i], fresh_order=False, options=None)
                results.append((observation, 0.0, False, False, info))
            elif request is None:
                results.append(episode.resolve())
            else:
                results.append(episode.resolve(next(hits), error, seconds / len(asked)))
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            results = [self._restarted(i, result) for i, result in zip(slots, results, strict=True)]
        observations, rewards, terminated, truncated, infos = zip(*results, strict=True) if results else ((), (), (), (), ())
        return (
            tuple(observations),
            np.array(rewards, dtype=np.float64),
            np.array(terminated, dtype=np.bool_),
            np.array(truncated, dtype=np.bool_),
            tuple(infos),
        )

    def _restarted(self, i: int, result: Step) -> Step:
        observation, reward, terminated, truncated, info = result
        if not (terminated or truncated):
            return result
        opening, opening_info = self._slots[i].reset(self._generators[i], fresh_order=False, options=None)
        return opening, reward, terminated, truncated, {"final_obs": observation, "final_info": info, **opening_info}

    def _checked_indices(self, indices: Sequence[int]) -> list[int]:
        listed = [int(i) for i in indices]
        if len(set(listed)) != len(listed) or any(not 0 <= i < self.num_envs for i in listed):
            raise ConfigurationError(f"indices must be different numbers in [0, {self.num_envs}); got {listed}.")
        return listed

    def _seeds(self, seed: int | Sequence[int | None] | None, slots: Sequence[int]) -> list[int | None]:
        if seed is None:
            return [None] * len(slots)
        if isinstance(seed, (int, np.integer)):
            return [int(seed) + i for i in slots]
        if len(seed) != len(slots):
            raise ConfigurationError(f"seed must be one integer or one per environment; got {len(seed)} for {len(slots)}.")
        return list(seed)

    # -- Gymnasium's interface -----------------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Begin episodes in all environments, or in those of ``options["reset_mask"]``; the observations of the others are kept."""
        given = dict(options or {})
        mask = _reset_mask(given.pop("reset_mask", None), self.num_envs)
        slots = [i for i in range(self.num_envs) if mask[i]]
        for name, values in given.items():
            if name in ("question_id", "index") and not isinstance(values, (str, int, np.integer)):
                if len(values) != self.num_envs:
                    raise ConfigurationError(f"options[{name!r}] must have {self.num_envs} values, one per environment; got {len(values)}.")
                given[name] = [values[i] for i in slots]
        seeds = self._seeds(seed, range(self.num_envs))
        _, opened = self.reset_at(slots, seed=[seeds[i] for i in slots], options=given)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i, info in zip(slots, opened, strict=True):
            infos[i] = info
        return tuple(slot.current().context for slot in self._slots), columns(infos)

    def step(  # type: ignore[override] # Gymnasium gives both flags the type of the rewards
        self, actions: Iterable[ArrayLike]
    ) -> tuple[Observations, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Step all environments; infos in Gymnasium's form."""
        observations, rewards, terminated, truncated, infos = self.step_at(range(self.num_envs), list(actions))
        return observations, rewards, terminated, truncated, columns(infos)

    def get_state_at(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """States as ``SearchQAEnv.get_state`` gives them, one per index."""
        return [self._slots[i].get_state(self._generators[i]) for i in self._checked_indices(indices)]

    def set_state_at(self, indices: Sequence[int], states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from states of this or of the single environment; one state may be put into many places (a fork)."""
        for i, state in zip(self._checked_indices(indices), states, strict=True):
            self._slots[i].set_state(self._generators[i], state)

    def get_state(self) -> dict[str, Any]:
        """The states of all environments."""
        return {"environments": self.get_state_at(range(self.num_envs))}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`get_state`."""
        if len(state["environments"]) != self.num_envs:
            raise EpisodeStateError(
                f"This state holds {len(state['environments'])} environments; this vector environment has {self.num_envs}."
            )
        self.set_state_at(range(self.num_envs), state["environments"])

    def render(self) -> tuple[str, ...] | None:
        """The episodes so far as text, in mode "ansi"."""
        if self.render_mode is None:
            return None
        return tuple(render_episode(slot.current().view(), colour=False) for slot in self._slots)


def _autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    if isinstance(mode, AutoresetMode):
        return mode
    for known in AutoresetMode:
        if str(mode).upper() in (known.name, known.value.upper()):
            return known
    raise ConfigurationError(f"autoreset_mode must be one of {[known.name for known in AutoresetMode]}; got {mode!r}.")


def _reset_mask(mask: Any, num_envs: int) -> NDArray[np.bool_]:
    if mask is None:
        return np.ones(num_envs, dtype=np.bool_)
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (num_envs,) or not mask.any():
        raise ConfigurationError(f"options['reset_mask'] must be a bool array of shape ({num_envs},) with at least one True; got {mask!r}.")
    return mask


def _options_per_environment(options: Mapping[str, Any] | None, count: int) -> list[dict[str, Any] | None]:
    if not options:
        return [None] * count
    spread = {name: [values] * count if isinstance(values, (str, int, np.integer)) else values for name, values in options.items()}
    for name, values in spread.items():
        if len(values) != count:
            raise ConfigurationError(f"options[{name!r}] must be one value, or one per environment, {count} here; got {len(values)}.")
    return [{name: values[i] for name, values in spread.items() if values[i] is not None} for i in range(count)]


def columns(infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One dict of arrays with masks from one dict per environment, in the form of Gymnasium's own vector environments."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for info in infos for key in info):
        present = np.array([key in info for info in infos], dtype=np.bool_)
        values = [info.get(key) for info in infos]
        first = values[int(present.argmax())]
        column: Any
        if isinstance(first, dict):
            column = columns([value or {} for value in values])
        elif type(first) in (int, float, bool):
            dtype = float if any(type(value) is float for value in values) else type(first)
            column = np.array([value if here else 0 for value, here in zip(values, present, strict=True)], dtype=dtype)
        else:
            column = np.full(len(infos), None, dtype=object)
            for i, value in enumerate(values):
                column[i] = value
        merged[key], merged[f"_{key}"] = column, present
    return merged
