"""Which workers are slow: those that compute long by themselves, not those that wait for them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

SLOW = 2.0
"""Times what others need, from which a worker is named as slow."""
REPORTS = 2
"""Train records in a row in which it must be."""


def ratios(compute: Sequence[float], grains: Sequence[float]) -> list[float | None]:
    """Each worker's own compute time for a grain, of the median of the others'.

    compute: seconds, or any unit. None for a worker that had no grains, or has no other one to be compared with.
    """
    each = {rank: time / n for rank, (time, n) in enumerate(zip(compute, grains, strict=True)) if n}
    found: list[float | None] = [None] * len(compute)
    for rank, time in each.items():
        others = [other for r, other in each.items() if r != rank]
        if others and median(others) > 0:
            found[rank] = time / median(others)
    return found


class Stragglers:
    """Remembers who was slow, so that each is named once."""

    def __init__(self) -> None:
        self._times: dict[int, int] = {}

    def named(self, found: Sequence[float | None]) -> list[int]:
        """The workers that are slow now, have been for `REPORTS` records, and had not been before."""
        self._times = {rank: self._times.get(rank, 0) + 1 for rank, ratio in enumerate(found) if (ratio or 0) >= SLOW}
        return [rank for rank, times in self._times.items() if times == REPORTS]
