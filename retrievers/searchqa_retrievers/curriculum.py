"""ZeroSearch's curriculum: how likely a simulated answer is a noisy one, over the steps of training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from searchqa_retrievers.types import RetrieverError


@dataclass(frozen=True)
class Curriculum:
    """Probability of a noisy answer: ``p_i = p_s + (b^(i/m) - 1) / (b - 1) * (p_e - p_s)`` at step ``i`` of ``m`` (ZeroSearch, section 3.4).

    ``Curriculum(p, p)`` is fixed noise. The published settings are ``Curriculum(0, 0.5)``, and by policy: Qwen-7B ``Curriculum(0, 0.75)``, Qwen-3B
    ``Curriculum(0, 0.25)``, Llama-3B ``Curriculum(0.25, 0.5)``.

    Attributes
    ----------
    start, end : float
        Probability before the first step, and at the last one, in [0, 1].
    base : float
        Above 0. Above 1 the probability rises slowly first, 1 is a straight line.

    Raises
    ------
    RetrieverError
        A value is out of its range.
    """

    start: float = 0.0
    end: float = 0.0
    base: float = 4.0

    def __post_init__(self) -> None:
        values = asdict(self)
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise RetrieverError(f"{name} of the noise must be a number, got {value!r:.80}")
        if not 0 <= self.start <= 1 or not 0 <= self.end <= 1 or self.base <= 0:
            raise RetrieverError(f"noise needs probabilities 0 <= start, end <= 1 and a base above 0, got {values}")

    @classmethod
    def of(cls, noise: Mapping[str, float] | None) -> Curriculum:
        """From a configuration, some of ``{start, end, base}``. Raises :class:`RetrieverError` for any other key."""
        unknown = sorted(set(noise or {}) - {"start", "end", "base"})
        if unknown:
            raise RetrieverError(f"noise has no key {', '.join(map(str, unknown))}; it has start, end and base")
        return cls(**(noise or {}))

    @property
    def fixed(self) -> bool:
        """Whether the probability is the same at all steps."""
        return self.start == self.end

    def probability(self, step: int, total: int) -> float:
        """The probability at ``step`` (from 1) of ``total``.

        Before the first step, ``(0, 0)`` or any step 0, it is ``start``, which is also what the formula gives; beyond the last one it stays at ``end``.

        Raises
        ------
        RetrieverError
            The step is negative, or the total is not known, where the noise is not fixed.
        """
        if step == 0 or self.fixed:
            return float(self.start)
        if step < 0 or total < 1:
            raise RetrieverError(
                f"a curriculum needs the step and the number of all steps, got {step} of {total}; give a fixed number of steps, or fixed noise "
                "(start = end)"
            )
        share = min(step / total, 1.0)
        risen = share if self.base == 1 else (self.base**share - 1) / (self.base - 1)
        return float(self.start + risen * (self.end - self.start))
