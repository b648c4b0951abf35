"""Drives an engine from a thread of its own: requests in from anywhere, what each step adds out in one batch."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from raymoe.serving.engine.engine import Engine, QueueFull
from raymoe.serving.engine.request import Increment, Request

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rejected:
    """A request that was not taken."""

    full: bool
    """Another engine may take it; else none can."""
    reason: str


Delivery = tuple[Hashable, "Increment | Rejected"]
Deliver = Callable[[Sequence[Delivery]], None]
"""Called in the engine's thread with (key, what became of it) of a step."""


class EngineThread:
    """`submit` and `cancel` never wait. Requests are known by keys of the caller's.

    `failed`: the exception that ended the thread, if one did; nothing is computed after it.
    """

    def __init__(self, engine: Engine, deliver: Deliver) -> None:
        self.engine, self.deliver = engine, deliver
        self.failed: Exception | None = None
        self.stepped = time.monotonic()
        self._commands: queue.SimpleQueue[tuple[Hashable, Request | None] | None] = queue.SimpleQueue()
        self._numbers: dict[Hashable, int] = {}
        self._keys: dict[int, Hashable] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, key: Hashable, request: Request) -> None:
        self._commands.put((key, request))

    def cancel(self, key: Hashable) -> None:
        """End it if it has not ended; nothing more of it is delivered."""
        self._commands.put((key, None))

    @property
    def idle(self) -> bool:
        """Whether nothing is asked or computed."""
        return self._commands.empty() and not self._keys

    def close(self) -> None:
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._obey():
                if not self.engine.idle:
                    self._give(self.engine.step())
                self.stepped = time.monotonic()
        except Exception as error:
            log.exception("the engine ended")
            self.failed = error

    def _obey(self) -> bool:
        """Carry out the commands; wait for one when there is nothing to compute. False when it is over."""
        while True:
            try:
                command = self._commands.get(block=self.engine.idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            key, request = command
            if request is not None:
                self._begin(key, request)
            elif (number := self._numbers.get(key)) is not None:
                self.engine.cancel(number)
                self._forget(key)

    def _begin(self, key: Hashable, request: Request) -> None:
        try:
            number = self.engine.submit(request)
        except QueueFull as error:
            self.deliver([(key, Rejected(True, str(error)))])
        except ValueError as error:
            self.deliver([(key, Rejected(False, str(error)))])
        except Exception as error:  # an odd request must not end the others', here and at the next engine
            log.exception("a request could not be begun")
            self.deliver([(key, Rejected(False, f"{type(error).__name__}: {error}"))])
        else:
            self._numbers[key], self._keys[number] = number, key

    def _give(self, increments: Sequence[Increment]) -> None:
        given: list[Delivery] = []
        for increment in increments:
            key = self._keys[increment.request]
            given.append((key, increment))
            if increment.finish:
                self._forget(key)
        if given:
            self.deliver(given)

    def _forget(self, key: Hashable) -> None:
        del self._keys[self._numbers.pop(key)]
