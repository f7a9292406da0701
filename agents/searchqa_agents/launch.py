"""Which process of a ``torchrun`` launch this is, from its environment variables; nothing heavy is imported."""

from __future__ import annotations

import os
from typing import NamedTuple


class Place(NamedTuple):
    """Process ``rank`` of ``world_size``; ``local_rank`` counts the processes of this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def launched() -> bool:
    """Whether ``torchrun`` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def place() -> Place:
    """This process's place in the launch; the only one where there is none."""
    if not launched():
        return Place()
    return Place(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
