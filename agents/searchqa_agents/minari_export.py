"""Episodes as a Minari data set: a step per segment, in the arrays of fixed shape of ``PaddedTokens``, with the environment that plays them again.

Minari's storage knows Gymnasium's fundamental spaces only. An observation is ``{"input_ids": int32[C], "attention_mask": int8[C]}``, the context so far,
padded on the left to ``C = max_context_tokens``; an action is ``int64[L]`` of a ``MultiDiscrete``, the segment, padded on the right to
``L = max_segment_tokens``. Infos of a step: ``question_id``, ``turn``, ``kind`` (search, answer, invalid), ``content`` (the query or answer) and, where a
language model sampled, ``logprobs`` float32[L] of the action that led there; those of the reset stand first, as Minari's collector writes them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import searchqa_envs  # noqa: F401, registers the ids
from searchqa_agents.parquet_export import Episode, plain
from searchqa_agents.runs import stamp_differences
from searchqa_agents.trajectory import Trajectory
from searchqa_envs.errors import ConfigurationError
from searchqa_envs.rewards import PRESETS
from searchqa_envs.wrappers import PaddedTokens

DATASET_ID = re.compile(r"(?:[-_\w][-_\w/]*/)?[-_\w]+-v\d+")
OF_THE_ENVIRONMENT = (
    "split",
    "top_k",
    "dialect",
    "prompt",
    "forced_answer",
    "max_turns",
    "max_segment_tokens",
    "max_observation_tokens",
    "max_context_tokens",
)
OF_THE_WORLD = ("preset", "world_seed", "num_worlds", "style")
"""Parts of a stamp that are arguments of the environment under the same name."""


class Place(NamedTuple):
    """Where a data set goes: its id, and the folder of its files."""

    dataset_id: str
    folder: Path


def place_of(name: str) -> Place:
    """Where ``--to minari NAME`` writes: an id such as ``searchqa/world-v0`` beneath Minari's own root (``$MINARI_DATASETS_PATH``), or a folder.

    A word that begins with ``/``, ``./``, ``../`` or ``~`` is a folder: its name is the data set's, its parent the root that
    ``MINARI_DATASETS_PATH`` must name to load it.

    Raises
    ------
    ConfigurationError
        For a name that Minari would not take, or one that is there already.
    """
    is_folder = name.startswith(("/", "./", "../", "~"))
    path = Path(name).expanduser().absolute()  # Minari loses its way with a relative one
    dataset_id = path.name if is_folder else name
    if DATASET_ID.fullmatch(dataset_id) is None:
        raise ConfigurationError(
            f"A Minari data set is called [namespace/]name-vN, in letters, digits, - and _, such as searchqa/world-v0; got {name!r}. A folder begins with "
            "./ or /, and its name is the data set's: ./datasets/world-v0"
        )
    if is_folder:
        folder = path
    else:
        _minari()
        from minari.storage import get_dataset_path

        folder = Path(get_dataset_path(dataset_id))
    if folder.exists():
        raise ConfigurationError(f"{folder} is there already. Remove it, or count up the version in the name: ...-v1.")
    return Place(dataset_id, folder)


class Plan:
    """What a first reading of the episodes tells: the environment that they were all played in.

    Parameters
    ----------
    config
        ``config.yaml`` of the run.
    tokenizer
        What ``env.tokenizer`` is; None: the environment's own, where the stamp says that it was that.
    """

    def __init__(self, config: Mapping[str, Any], tokenizer: str | None) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.hops: set[int] = set()
        self.stamp: dict[str, Any] | None = None
        self.first = ""

    def add(self, episode: Episode) -> None:
        """Take a look at an episode. Raises ``ConfigurationError`` if it was played in another environment than those before."""
        stamp = dict(episode.trajectory.stamp)
        if not {"dataset", "tokenizer"} <= set(stamp):
            raise ConfigurationError(
                f"{episode.run}/{episode.file}, line {episode.line + 1}: the episode's stamp does not say which environment it was played in. Export to "
                "parquet, which needs none."
            )
        self.hops.update(stamp.get("hops") or ())
        if self.stamp is None:
            self.stamp, self.first = stamp, f"{episode.run}/{episode.file}"
        elif different := stamp_differences(_played_in(self.stamp), _played_in(stamp)):
            told = ", ".join(f"{key} {old!r} and {new!r}" for key, old, new in different[:3])
            raise ConfigurationError(
                f"A Minari data set has one environment; {self.first} and {episode.run}/{episode.file} were played in two ({told}). Choose files by "
                "name: --only 'rollouts-*' (training), --only before, --only after; or export to parquet, which takes any."
            )

    def make(self) -> gym.Env[Any, Any]:
        """The environment, wrapped in ``PaddedTokens``. Raises ``ConfigurationError`` if what can be made is not what the episodes were played in."""
        if self.stamp is None:
            raise ConfigurationError("There is no episode to export.")
        arguments = env_arguments_of(self.config, self.stamp, sorted(self.hops))
        if self.tokenizer is not None:
            arguments["tokenizer"] = self.tokenizer
        env = PaddedTokens(gym.make(self.config["env"]["id"], **arguments))
        own: Any = env.unwrapped
        if different := stamp_differences(_played_in(self.stamp), _played_in(own.stamp())):
            told = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in different[:3])
            way = "Name it: --tokenizer NAME_OR_FOLDER. " if any(key == "tokenizer" for key, _, _ in different) else ""
            raise ConfigurationError(
                f"The environment of {self.first} cannot be made as it was: {told}. {way}Bring back what was there, or export to parquet, "
                "which needs no environment."
            )
        return env


def _played_in(stamp: Mapping[str, Any]) -> dict[str, Any]:
    """What of a stamp says how an episode was played; a question's hops only say which were drawn."""
    kept = (
        *OF_THE_ENVIRONMENT,
        *OF_THE_WORLD,
        "dataset",
        "revision",
        "corpus_sha256",
        "retriever",
        "reward",
        "tokenizer",
        "entities",
        "search_controls",
    )
    return {name: stamp[name] for name in kept if name in stamp}


def env_arguments_of(config: Mapping[str, Any], stamp: Mapping[str, Any], hops: list[int]) -> dict[str, Any]:
    """What the environment of an episode is made with: ``env`` of the run's configuration, and what its stamp says beyond that."""
    env = {str(name): value for name, value in config["env"].items() if name != "id" and value is not None}
    if "measured" in stamp:
        env |= {name: value for name, value in (config.get("evaluation") or {}).get("env", {}).items() if value is not None}
    names = OF_THE_ENVIRONMENT + (OF_THE_WORLD if stamp.get("dataset") == "world" else ())
    env |= {name: stamp[name] for name in names if stamp.get(name) is not None}
    reward = (stamp.get("reward") or {}).get("name")
    if not isinstance(env.get("reward"), Mapping) and reward in PRESETS:
        env["reward"] = reward
    if stamp.get("dataset") == "world" and hops:
        env["hops"] = hops
    return env


def why_left_out(trajectory: Trajectory, pad_id: int, length: int) -> str | None:
    """The reason that an episode cannot be a Minari episode; None if it can."""
    if not trajectory.turns:
        return "without a turn"
    for turn in trajectory.turns:
        segment = trajectory.token_ids[turn.start : turn.segment_end]
        if len(segment) > length:
            return "with a segment longer than the action"
        if len(segment) and segment[-1] == pad_id:
            return "with a segment that ends in the padding id"
    return None


def write_minari(
    place: Place, plan: Plan, episodes: Iterator[Episode], left_out: Counter[str], *, algorithm: str | None = None
) -> tuple[int, int]:
    """Write the data set, in one go under its name; of each episode, only a few numbers stay in memory.

    Parameters
    ----------
    left_out
        Is told how many episodes were left out, by reason.
    algorithm
        What Minari notes as the algorithm that made the data.

    Returns
    -------
    tuple of int
        Episodes and steps written.
    """
    minari = _minari()
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    env = plan.make()
    inner: Any = env.unwrapped
    pad_id, length, segment = inner.tokenizer.pad_id, inner.rules.max_context_tokens, inner.max_segment_tokens
    env.close()
    assert env.spec is not None
    assert plan.stamp is not None
    partial = place.folder.with_name(f".partial-{os.getpid()}-{place.folder.name}")
    steps = 0
    about: list[dict[str, Any]] = []

    def buffers() -> Iterator[EpisodeBuffer]:
        nonlocal steps
        for episode in episodes:
            reason = why_left_out(episode.trajectory, pad_id, segment)
            if reason is not None:
                left_out[reason] += 1
                continue
            steps += len(episode.trajectory.turns)
            about.append(_about(episode))
            yield EpisodeBuffer(**_buffer(episode.trajectory, pad_id, length, segment))

    try:
        (partial / "data").mkdir(parents=True)
        storage = MinariStorage.new(
            partial / "data", observation_space=env.observation_space, action_space=env.action_space, env_spec=env.spec, data_format="hdf5"
        )
        storage.update_metadata(
            {
                "dataset_id": place.dataset_id,
                "minari_version": minari.__version__,
                "algorithm_name": algorithm or "unknown",
                "author": {"searchqa-gym"},
                "description": "Episodes of multi-turn search question answering, a step per segment, as padded token ids.",
                "requirements": [f"searchqa-gym=={version('searchqa-gym')}"],
                "searchqa_stamp": json.dumps(plan.stamp, ensure_ascii=True, default=str),
            }
        )
        storage.update_episodes(buffers())
        if not about:
            raise ConfigurationError(f"No episode is left to export; left out: {dict(left_out)}.")
        storage.update_episode_metadata(about)
        os.replace(partial, place.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _note_namespace(place)
    return len(about), steps


def _note_namespace(place: Place) -> None:
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.namespace import create_namespace, list_local_namespaces
    from minari.storage import get_dataset_path

    namespace = parse_dataset_id(place.dataset_id)[0]
    ours = Path(get_dataset_path(place.dataset_id)) == place.folder
    if namespace is not None and ours and namespace not in list_local_namespaces():
        create_namespace(namespace)


def _buffer(trajectory: Trajectory, pad_id: int, length: int, segment_length: int) -> dict[str, Any]:
    turns, ids = trajectory.turns, trajectory.token_ids
    contexts = [ids[: turns[0].start], *(ids[: turn.end] for turn in turns)]
    input_ids = np.full((len(contexts), length), pad_id, dtype=np.int32)
    attention_mask = np.zeros((len(contexts), length), dtype=np.int8)
    for row, context in enumerate(contexts):
        input_ids[row, length - len(context) :] = context
        attention_mask[row, length - len(context) :] = 1
    actions = np.full((len(turns), segment_length), pad_id, dtype=np.int64)
    for row, turn in enumerate(turns):
        actions[row, : turn.segment_end - turn.start] = ids[turn.start : turn.segment_end]
    last = len(turns) - 1
    infos: dict[str, Any] = {
        "question_id": [_text(trajectory.question_id)] * len(contexts),
        "turn": list(range(len(contexts))),
        "kind": ["reset", *(_text(turn.action) for turn in turns)],
        "content": ["", *(_text(turn.content) for turn in turns)],
    }
    if trajectory.logprobs is not None:
        infos["logprobs"] = _logprobs(trajectory, segment_length)
    return {
        "options": {"question_id": _text(trajectory.question_id)},
        "observations": {"input_ids": input_ids, "attention_mask": attention_mask},
        "actions": actions,
        "rewards": np.array([trajectory.reward if row == last else 0.0 for row in range(len(turns))], dtype=np.float64),
        "terminations": np.array([trajectory.terminated and row == last for row in range(len(turns))]),
        "truncations": np.array([trajectory.truncated and row == last for row in range(len(turns))]),
        "infos": infos,
    }


def _logprobs(trajectory: Trajectory, segment_length: int) -> NDArray[np.float32]:
    assert trajectory.logprobs is not None
    rows = np.zeros((len(trajectory.turns) + 1, segment_length), dtype=np.float32)
    for row, turn in enumerate(trajectory.turns, start=1):
        rows[row, : turn.segment_end - turn.start] = trajectory.logprobs[turn.start : turn.segment_end]
    return rows


def _about(episode: Episode) -> dict[str, Any]:
    """What Minari keeps of the whole episode; a slash in a name makes a group of it."""
    t = episode.trajectory
    numbers = {f"{group}/{name}": float(value) for group in ("metrics", "reward_terms") for name, value in getattr(t, group).items()}
    place = {"run": _text(episode.run), "file": _text(episode.file), "line": episode.line}
    step = {"train_step": int(t.stamp["train_step"])} if "train_step" in t.stamp else {}
    return {**place, **step, "retokenized": bool(t.retokenized), **numbers}


def _text(text: str) -> str:
    """Text that HDF5 can hold: without NUL."""
    return plain(text).replace("\x00", "\N{SYMBOL FOR NULL}")


def _minari() -> Any:
    try:
        import h5py  # noqa: F401, Minari asks for it only once it writes
        import minari
    except ImportError as error:
        raise ConfigurationError(f"Minari data sets need minari and h5py ({error}): pip install 'searchqa-gym[minari]'.") from error
    return minari
