"""Progress of a command with several stages: one line per stage with its seconds, and the time left while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

LOG_EVERY_S = 10.0
"""Seconds between two progress lines in a log (a stream that is not a terminal)."""
REDRAW_EVERY_S = 0.2
"""Seconds between two updates of the progress line on a terminal."""


class StageLines:
    """Callable (stage, units done, units in total) that prints the progress of consecutive stages."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = stream or sys.stderr
        self.clock = clock
        self.stage = ""
        self.started = self.printed = clock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = self.clock()
        if stage != self.stage:
            self.stage, self.started, self.printed = stage, now, now
        terminal = self.stream.isatty()
        if done >= total:
            self._write(f"{stage:32}{now - self.started:>8.1f} s", end="\n")
            self.stage = ""
        elif now - self.printed >= (REDRAW_EVERY_S if terminal else LOG_EVERY_S):
            left = (now - self.started) * (total - done) / done if done else None
            text = f"{stage:32}{done / total:>8.0%}" + (f"   {left:.0f} s left" if left is not None else "")
            self._write(text, end="" if terminal else "\n")
            self.printed = now

    def _write(self, text: str, end: str) -> None:
        if self.stream.isatty():
            text = f"\r\033[K{text}"
        print(text, end=end, file=self.stream, flush=True)
