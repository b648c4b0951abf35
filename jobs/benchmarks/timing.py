"""Interleaved timing: a speed is a ratio between sides that run in turn in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(sides: dict[str, Callable[[], None]], rounds: int, warmup: int = 3) -> dict[str, dict[str, float]]:
    """Return the median, minimum and maximum milliseconds of each side. The sides run in turn after warm-up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            if turn >= warmup:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t)} for name, t in times.items()}
