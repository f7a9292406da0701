"""What an index takes."""

from __future__ import annotations

from typing import NamedTuple


class Needs(NamedTuple):
    """What an index takes, in bytes, as known before anything is built."""

    disk: int
    memory: int
    """resident while searching"""
    building: int
    """resident at most while it is built"""
