"""The trunks of an application, as an api uses them: each request runs on one of them.

When a trunk fails, its requests resume on another one from their tokens so far. Sampling is a function of
(seed, position), so the completion does not change; the client sees a delay. A trunk whose kernel differs computes
logits that may differ in the last bits, so a request resumes there only if no trunk has the same kernel.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from raymoe.serving.engine.engine import QueueFull
from raymoe.serving.engine.request import Increment, Request
from raymoe.serving.transport.handshake import NO_SECRET, Address, ConnectionLost
from raymoe.serving.transport.requests import RequestStream

log = logging.getLogger(__name__)

MAX_FAILURES = 5
"""Consecutive trunk failures, without a new token, after which a request is aborted: it may cause them."""
CONNECT_TIMEOUT_S = 5.0
RETRY_S = 0.05
"""Seconds until a request that must not be rejected tries full trunks again."""


class NoTrunkAvailable(Exception):
    """No trunk became available within the wait timeout, or the request's trunks keep failing."""


@dataclass
class _Progress:
    """A request's state across trunks."""

    request: Request
    deadline: float
    tokens: list[int] = field(default_factory=list)
    echoed: bool = False
    started: bool = False
    """An increment has been yielded."""
    accepted: bool = False
    """A trunk had accepted it or failed with it: it is not rejected for want of room any more."""
    failures: int = 0
    """Consecutive trunk failures without a new token."""
    kernel: str | None = None
    """Kernel of the trunk that generated the latest tokens."""
    full: set[RequestStream] = field(default_factory=set)
    """Trunks whose queues were full."""

    def remaining(self) -> Request:
        """Return the request for the next trunk."""
        return replace(self.request, resumed=tuple(self.tokens), echo=self.request.echo and not self.echoed)

    def record(self, increment: Increment, kernel: str | None) -> None:
        self.started = self.accepted = True
        self.failures, self.kernel = 0, kernel
        self.echoed = self.echoed or increment.echo is not None
        if increment.token is not None:
            self.tokens.append(increment.token)


class TrunkPool:
    """Streams to all trunks. All methods belong to one event loop.

    `wait_timeout_s`: seconds that a request waits while there is no trunk. `max_waiting`: requests that may wait so.
    `resumed`: called for each request that resumes on another trunk.
    """

    def __init__(
        self,
        digest: str,
        *,
        wait_timeout_s: float = 60.0,
        max_waiting: int = 256,
        resumed: Callable[[], None] = lambda: None,
        secret: bytes = NO_SECRET,
    ) -> None:
        self.digest, self.wait_timeout_s, self.max_waiting, self.resumed = digest, wait_timeout_s, max_waiting, resumed
        self._secret = secret
        self._streams: dict[Address, RequestStream] = {}
        self._listed: set[Address] = set()
        self._connecting: set[Address] = set()
        self._changed = asyncio.Condition()
        self._waiting = 0

    @property
    def ready(self) -> bool:
        return bool(self._live())

    def _live(self) -> list[RequestStream]:
        return [stream for stream in self._streams.values() if not stream.lost]

    async def update(self, addresses: Iterable[Address]) -> None:
        """Set the addresses of all trunks. Connects to those that are new or were lost.

        A trunk that is no longer listed is about to end. It keeps its requests until it closes them, and gets new
        ones only while no other trunk has room.
        """
        self._listed = set(addresses)
        self._streams = {a: s for a, s in self._streams.items() if not s.lost}
        new = self._listed - self._streams.keys() - self._connecting
        await asyncio.gather(*(self._connect(address) for address in new))

    async def _connect(self, address: Address) -> None:
        self._connecting.add(address)
        try:
            stream = await RequestStream.connect(address, self.digest, CONNECT_TIMEOUT_S, self._secret)
        except ConnectionLost as error:
            log.info("%s", error)
            return
        finally:
            self._connecting.discard(address)
        async with self._changed:
            self._streams[address] = stream
            self._changed.notify_all()

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    async def generate(self, request: Request) -> AsyncGenerator[Increment, None]:
        """Yield the request's increments, across failures of trunks. Leaving the iteration early cancels it.

        Raises QueueFull or ValueError (it can never be served) before the first increment, NoTrunkAvailable at any
        time. A request that a failed trunk had accepted is not rejected when the others are full: it waits.
        """
        progress = _Progress(request, self._deadline(), list(request.resumed))
        while True:
            stream = await self._choose(progress)
            try:
                async with aclosing(stream.generate(progress.remaining())) as increments:
                    async for increment in increments:
                        progress.record(increment, stream.identity.get("kernel"))
                        yield increment
                        if increment.finish:
                            return
            except ConnectionLost as error:
                log.warning("trunk %s", error)
                self._record_failure(progress)
            except QueueFull:
                progress.full.add(stream)
                if progress.full >= set(self._live()):
                    if not progress.accepted:
                        raise
                    progress.full.clear()
                    await asyncio.sleep(RETRY_S)

    def _record_failure(self, progress: _Progress) -> None:
        if progress.started:
            self.resumed()
        progress.accepted, progress.failures = True, progress.failures + 1
        if progress.failures == MAX_FAILURES:
            raise NoTrunkAvailable(f"{MAX_FAILURES} trunks failed while they had this request") from None
        progress.deadline = self._deadline()

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.wait_timeout_s

    async def _choose(self, progress: _Progress) -> RequestStream:
        """Return the best trunk that is not full; wait for one until the deadline.

        A trunk with the same kernel as before comes first, then one that is still listed, then the least busy one.
        """
        if not progress.accepted and not self._live() and self._waiting >= self.max_waiting:
            raise NoTrunkAvailable(f"there is no trunk, and {self._waiting} requests wait for one")
        self._waiting += 1
        try:
            async with asyncio.timeout_at(progress.deadline), self._changed:
                await self._changed.wait_for(lambda: self._live())
        except TimeoutError:
            raise NoTrunkAvailable(f"no trunk became available within {self.wait_timeout_s:g} s") from None
        finally:
            self._waiting -= 1
        live = self._live()

        def order(stream: RequestStream) -> tuple[bool, bool, int]:
            other_kernel = progress.kernel is not None and stream.identity.get("kernel") != progress.kernel
            return other_kernel, stream.address not in self._listed, stream.active

        return min([s for s in live if s not in progress.full] or live, key=order)
