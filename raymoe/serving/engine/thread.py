"""A thread that runs an engine: requests in from any thread, the increments of each step out in one batch."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

from raymoe.serving.engine.engine import Engine, QueueFull
from raymoe.serving.engine.request import Increment, Request

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rejected:
    """A request that the engine did not accept."""

    key: Hashable
    full: bool
    """True: the queue was full, and another engine may accept it. False: the request is invalid."""
    reason: str


Deliver = Callable[[Sequence["Increment | Rejected"]], None]
"""Called in the engine's thread with the increments of a step, or with a rejection."""


class EngineThread:
    """Runs an engine in its own thread. `submit` and `cancel` never wait.

    `failed`: the exception that ended the thread, if one did. `stepped`: monotonic time of the last completed step.
    """

    def __init__(self, engine: Engine, deliver: Deliver) -> None:
        self.engine, self.deliver = engine, deliver
        self.failed: Exception | None = None
        self.stepped = time.monotonic()
        self._commands: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, key: Hashable, request: Request) -> None:
        """Start a request under a key that no other active request has."""
        self._commands.put(partial(self._submit, key, request))

    def cancel(self, key: Hashable) -> None:
        """End a request if it is active. An increment that is already on its way is still delivered."""
        self._commands.put(partial(self.engine.cancel, key))

    def cancel_all(self, matches: Callable[[Hashable], bool]) -> None:
        """End all active requests with matching keys."""
        self._commands.put(partial(self._cancel_all, matches))

    @property
    def idle(self) -> bool:
        """Whether no request is queued or active."""
        return not self._commands.unfinished_tasks and self.engine.idle

    def close(self) -> None:
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._run_commands():
                if increments := self.engine.step():
                    self.deliver(increments)
                self.stepped = time.monotonic()
        except Exception as error:
            log.exception("the engine failed")
            self.failed = error

    def _run_commands(self) -> bool:
        """Run the queued commands; wait for one while the engine is idle. Return False after `close`."""
        while True:
            try:
                command = self._commands.get(block=self.engine.idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            self._commands.task_done()

    def _submit(self, key: Hashable, request: Request) -> None:
        try:
            self.engine.submit(key, request)
        except QueueFull as error:
            self.deliver([Rejected(key, True, str(error))])
        except ValueError as error:
            self.deliver([Rejected(key, False, str(error))])
        except Exception as error:  # an invalid request must not end the others, here and at the next engine
            log.exception("a request could not be started")
            self.deliver([Rejected(key, False, f"{type(error).__name__}: {error}")])

    def _cancel_all(self, matches: Callable[[Hashable], bool]) -> None:
        for key in self.engine.keys:
            if matches(key):
                self.engine.cancel(key)
