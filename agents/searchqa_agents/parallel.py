"""One process or several: what the trainer asks of the processes beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Parallel:
    """A run in this process alone. The forms for several processes share its methods.

    Every process holds the whole batch as numbers, computes the same advantages from it, and evaluates its own share of the micro-batches with
    the whole minibatch's totals; gradients are *sums* over the processes.
    """

    rank = 0
    world_size = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list that all of them hold: every ``world_size``-th item."""
        return list(items)[self.rank :: self.world_size]

    def gather(self, items: Sequence[T]) -> list[T]:
        """The whole list from the parts that :meth:`share` would give; the same in every process."""
        return list(items)
