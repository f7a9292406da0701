"""Episodes for engines whose rollouts are coroutines: each plays its own, and steps that wait at the same time are one call."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from searchqa_envs.errors import EpisodeStateError
from searchqa_envs.vector import SearchQAVectorEnv


class PooledEpisode:
    """One episode in a place of an :class:`EpisodePool`.

    Attributes
    ----------
    observation, info, reward, ended, truncated
        As the environment last gave them: int32[T], its dict, the reward of that step, whether the episode has ended, and whether by a budget.
    """

    def __init__(self, pool: EpisodePool, place: int) -> None:
        self._pool = pool
        self._place = place
        self.observation: NDArray[np.int32] = np.empty(0, dtype=np.int32)
        self.info: dict[str, Any] = {}
        self.reward = 0.0
        self.ended = False
        self.truncated = False

    async def step(self, segment: ArrayLike) -> None:
        """Take a segment. Raises ``InvalidSegmentError`` for anything but ids of the vocabulary; the episode is then left as it was."""
        checked = self._pool.venv.rules.check_segment(segment)
        self.observation, reward, terminated, truncated, self.info = await self._pool.ask(_Call(self._place, checked, None, None))
        self.reward, self.truncated = float(reward), bool(truncated)
        self.ended = bool(terminated or truncated)


class _Call(NamedTuple):
    """A step with ``segment``, or without one a reset."""

    place: int
    segment: NDArray[np.int32] | None
    options: Mapping[str, Any] | None
    seed: int | None


class EpisodePool:
    """The places of a vector environment, lent to coroutines of one event loop at a time.

    Calls that wait at the same moment become one ``reset_at`` and one ``step_at``, so that the retriever is asked once for all; they run in a thread, so
    that the event loop goes on. Where all places are taken, :meth:`episode` waits.

    Parameters
    ----------
    venv
        A vector environment with ``autoreset_mode="DISABLED"``; nothing else may step it.
    """

    def __init__(self, venv: SearchQAVectorEnv) -> None:
        self.venv = venv
        self._free = list(range(venv.num_envs))
        self._queue: deque[asyncio.Future[None]] = deque()
        self._pending: list[tuple[_Call, asyncio.Future[Any]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextlib.asynccontextmanager
    async def episode(self, options: Mapping[str, Any] | None = None, *, seed: int | None = None) -> AsyncIterator[PooledEpisode]:
        """Begin an episode; ``options`` and ``seed`` as in the environment's ``reset``. Its place is free again behind the ``async with``.

        Raises
        ------
        EpisodeStateError
            While episodes go on in another event loop.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and not self._loop.is_closed() and len(self._free) < self.venv.num_envs:
                raise EpisodeStateError(
                    "An episode pool serves one event loop at a time, and episodes of another one go on. Make a pool for each, each with its own "
                    "vector environment."
                )
            self._loop = loop
        place = await self._take_place()
        try:
            episode = PooledEpisode(self, place)
            episode.observation, episode.info = await self.ask(_Call(place, None, options, seed))
            yield episode
        finally:
            self._free.append(place)
            self._wake_one()

    async def _take_place(self) -> int:
        while not self._free:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._wake_one()  # the place offered to this coroutine goes to the next one
                raise
        return self._free.pop()

    def _wake_one(self) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done() and not turn.get_loop().is_closed():
                turn.set_result(None)
                return

    async def ask(self, call: _Call) -> Any:
        """The environment's answer to one call."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._pending.append((call, answer))
        if self._worker is None or self._worker.done() or self._worker.get_loop() is not loop:
            self._worker = loop.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        """Answer what is pending, all of it at once, until nothing is."""
        await asyncio.sleep(0)  # whatever is ready to ask, asks first
        while self._pending:
            waiting = [(call, answer) for call, answer in self._pending if not answer.done()]
            self._pending = []
            for group in ([one for one in waiting if one[0].segment is None], [one for one in waiting if one[0].segment is not None]):
                if group:
                    await self._answer(group)

    async def _answer(self, group: list[tuple[_Call, asyncio.Future[Any]]]) -> None:
        calls = [call for call, _ in group]
        try:
            answers = await asyncio.to_thread(self._reset if calls[0].segment is None else self._step, calls)
        except Exception as error:  # noqa: BLE001, handed to those who asked
            if len(group) > 1 and calls[0].segment is None:  # one bad question must not end the others' episodes
                for one in group:
                    await self._answer([one])
                return
            answers = [error] * len(group)
        for answer, (_, future) in zip(answers, group, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _reset(self, calls: list[_Call]) -> list[Any]:
        names = {name for call in calls for name in call.options or {}}
        options = {name: [(call.options or {}).get(name) for call in calls] for name in names}
        observations, infos = self.venv.reset_at([call.place for call in calls], seed=[call.seed for call in calls], options=options)
        return list(zip(observations, infos, strict=True))

    def _step(self, calls: list[_Call]) -> list[Any]:
        segments = [call.segment for call in calls if call.segment is not None]
        return list(zip(*self.venv.step_at([call.place for call in calls], segments), strict=True))


_pools: dict[str, EpisodePool] = {}


def shared_pool(env_id: str, num_envs: int = 256, **arguments: Any) -> EpisodePool:
    """The pool of this process for an environment with these arguments: data, index and tokenizer are loaded once, however many ask."""
    import gymnasium as gym

    import searchqa_envs  # noqa: F401, registers the ids

    key = repr((env_id, num_envs, sorted(arguments.items())))
    if key not in _pools:
        venv: Any = gym.make_vec(env_id, num_envs=num_envs, autoreset_mode="DISABLED", **arguments).unwrapped
        _pools[key] = EpisodePool(venv)
    return _pools[key]
