"""The stamps of an evaluation, and which of them may stand in one folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchqa_agents.hydra_app import AGENT_MECHANICS
from searchqa_agents.runs import OtherSearchError, run_stamp, stamp_differences
from searchqa_agents.settings import AgentSettings, BaselineSettings, EvalSettings, LMAgentSettings
from searchqa_retrievers.types import SERVER_NOT_REACHED

if TYPE_CHECKING:
    pass

from searchqa_agents.eval_plan import SetPlan

logger = logging.getLogger(__name__)

SCORING_VERSION = 1
"""Of how answers are scored. Raised with every change of a normaliser or a measure that can change a number."""
OWN_TO_A_LIST = frozenset({"samples", "questions_played", "question_list", "name"})
"""Parts of a stamp that may change when a run goes on with more questions or samples."""


def set_stamp(settings: EvalSettings, plan: SetPlan, base: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The flat stamp of a set's numbers; ``weights`` are those of :func:`weights_stamp`."""
    from searchqa_agents.loading import agent_stamp, agent_temperature

    stamp = run_stamp(base.stamp(), seed=settings.seed, threads=settings.threads)
    agent = {**agent_stamp(settings.agent, base.tokenizer, base.source.name), **weights}
    stamp |= {"agent": agent, "temperature": agent_temperature(settings.agent)} | list_stamp(settings, plan)
    stamp["scoring_version"] = SCORING_VERSION
    if base.rules.needs_gold:
        stamp["told_the_answer"] = True
    plain: dict[str, Any] = json.loads(json.dumps(stamp, default=str))
    return plain


def list_stamp(settings: EvalSettings, plan: SetPlan) -> dict[str, Any]:
    """The parts of a stamp that say which episodes were played."""
    from searchqa_agents.question_lists import ids_stamp

    listed = {"kind": plan.kind, **ids_stamp(plan.ids)}
    return {"samples": settings.samples, "questions_played": len(plan.ids), "question_list": listed}


def weights_stamp(settings: EvalSettings) -> dict[str, Any]:
    """Of a model that is loaded here, the type of its numbers, and where its weights are files of this machine their sha256. Nothing of other agents.

    A folder can hold other weights later, and in another type a model writes other tokens.
    """
    from searchqa_agents.loading import checkpoint_path, measuring_dtype

    model = _model_of(settings)
    if not isinstance(model, LMAgentSettings):
        return {}
    folder = checkpoint_path(model.checkpoint)
    dtype = measuring_dtype(settings.dtype, settings.device, model.checkpoint)
    return {"dtype": dtype} | ({"weights_sha256": folder_sha256(folder)} if isinstance(folder, Path) else {})


def folder_sha256(folder: Path) -> str:
    """Of a model's weights and configuration."""
    digest = hashlib.sha256()
    for file in sorted(path for pattern in ("*.safetensors", "*.bin", "*config.json") for path in folder.glob(pattern)):
        with file.open("rb") as opened:
            digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _model_of(settings: EvalSettings) -> AgentSettings:
    return settings.agent.lm if isinstance(settings.agent, BaselineSettings) else settings.agent


def check_stamp(path: Path, name: str, begun: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a set that was begun with another agent, data, search engine or other rules; other package versions are a warning.

    Raises
    ------
    OtherSearchError
        Naming each difference.
    """
    for before in begun:
        unplaced, unplaced_now = _unplaced(before), _unplaced(now)
        different = [
            (key, old, new)
            for key, old, new in stamp_differences(unplaced, unplaced_now)
            if SERVER_NOT_REACHED not in (old, new)
            and key.partition(".")[0] not in OWN_TO_A_LIST
            and not (key.startswith("agent.") and key.rpartition(".")[2] in AGENT_MECHANICS)
        ]
        if before.get("seed") != now.get("seed"):
            different.append(("seed", before.get("seed"), now.get("seed")))
        if different:
            listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in different)
            raise OtherSearchError(
                f"{path} holds answers on {name} that were made with another agent, search engine, corpus or data, and its numbers would mix both: {listed}. "
                "Bring back what was there and resume, or begin a new run in another run_dir."
            )
    if begun:
        versions = [{"searchqa_gym": one.get("searchqa_gym"), **one.get("packages", {})} for one in (begun[-1], now)]
        changed = [key for key in versions[1] if versions[0].get(key) not in (None, versions[1][key])]
        if changed:
            listed = ", ".join(f"{key} was {versions[0][key]}, is {versions[1][key]}" for key in changed)
            logger.warning("%s goes on with other package versions: %s.", path, listed)
        before_at, now_at = _untold(begun[-1]), _untold(now)
        if before_at != now_at:
            logger.warning(
                "%s goes on with the search server %s, before %s; it does not say what it searches, so make sure that it is the same.",
                path,
                ", ".join(sorted(now_at)),
                ", ".join(sorted(before_at)),
            )


def _unplaced(stamp: Any) -> Any:
    """A stamp without where its search servers are: what they say that they search is in it."""
    if isinstance(stamp, Mapping):
        left_out = ("url",) if stamp.get("retriever") == "http" else ()
        return {name: _unplaced(own) for name, own in stamp.items() if name not in left_out}
    return [_unplaced(own) for own in stamp] if isinstance(stamp, list) else stamp


def _untold(stamp: Any) -> set[str]:
    """The addresses of search servers that do not say what they search."""
    if isinstance(stamp, Mapping):
        own = {str(stamp.get("url"))} if stamp.get("retriever") == "http" and stamp.get("server") is None else set()
        return own.union(*map(_untold, stamp.values()))
    return set().union(*map(_untold, stamp)) if isinstance(stamp, list) else set()
