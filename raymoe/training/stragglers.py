"""Stragglers: workers whose own compute time is long. Time spent waiting for other workers does not count."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

SLOW = 2.0
"""Ratio to the median of the other workers at which a worker is a straggler."""
REPORTS = 2
"""Consecutive train records with at least that ratio, after which the worker is reported."""


def ratios(compute: Sequence[float], grains: Sequence[float]) -> list[float | None]:
    """Return each worker's compute time per grain, divided by the median of the others.

    compute: time by worker, in any unit. None for a worker without grains, or without others to compare with.
    """
    each = {rank: time / n for rank, (time, n) in enumerate(zip(compute, grains, strict=True)) if n}
    found: list[float | None] = [None] * len(compute)
    for rank, time in each.items():
        others = [other for r, other in each.items() if r != rank]
        if others and median(others) > 0:
            found[rank] = time / median(others)
    return found


class Stragglers:
    """Reports each straggler once, until it has been as fast as the others again."""

    def __init__(self) -> None:
        self._records: dict[int, int] = {}
        """Consecutive records in which a worker was slow."""

    def update(self, found: Sequence[float | None]) -> list[int]:
        """Add the ratios of one train record. Return the workers that are stragglers from this record on."""
        self._records = {
            rank: self._records.get(rank, 0) + 1 for rank, ratio in enumerate(found) if (ratio or 0) >= SLOW
        }
        return [rank for rank, records in self._records.items() if records == REPORTS]
