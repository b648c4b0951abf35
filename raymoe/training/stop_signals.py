"""Orderly stop of a run by SIGINT, SIGTERM or SIGHUP."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_on_signal(stop_request: Path) -> Iterator[list[int]]:
    """Create the file `stop_request` at the first signal; yield the list of signals received.

    A second signal has its previous effect. A signal that the process ignores, as under `nohup`, stays ignored.
    Outside the main thread no signal is handled.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, previous in before.items():
            signal.signal(number, previous)

    def handler(number: int, frame: Any) -> None:
        received.append(number)
        stop_request.touch()
        with contextlib.suppress(OSError):  # the terminal may be closed
            name = signal.Signals(number).name
            print(f"\n{name}: the workers write a checkpoint at the next step and leave", file=sys.stderr, flush=True)
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        restore()
