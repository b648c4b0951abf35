"""The trunks as an api sees them: every request at one of them, and at another one when its own dies.

A request goes on elsewhere from its tokens so far: what is sampled is a function of (seed, position), so the
answer does not change, and whoever reads it notices only the time that it took.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace

from raymoe.serving.engine.engine import QueueFull
from raymoe.serving.engine.request import Increment, Request
from raymoe.serving.transport.requests import RequestStream
from raymoe.serving.transport.rows import NO_SECRET, Address, ConnectionLost

log = logging.getLogger(__name__)


MAX_FAILURES = 5
"""So many trunks may die under a request, one after the other and without a token of it, before it is given up: it
may be what kills them."""


class NoTrunkAvailable(Exception):
    """No trunk came for as long as a request may wait, or none survives it."""


class TrunkPool:
    """All methods belong to one event loop. `resumed` is called for each request that goes on elsewhere."""

    def __init__(
        self,
        digest: str,
        *,
        wait_timeout_s: float = 60.0,
        max_waiting: int = 256,
        resumed: Callable[[], None] = lambda: None,
        secret: bytes = NO_SECRET,
    ) -> None:
        self._secret = secret
        self.digest, self.wait_timeout_s, self.max_waiting, self.resumed = digest, wait_timeout_s, max_waiting, resumed
        self._sessions: dict[Address, RequestStream] = {}
        self._named: set[Address] = set()
        self._connecting: set[Address] = set()
        self._changed = asyncio.Condition()
        self._waiting = 0

    @property
    def ready(self) -> bool:
        return bool(self._live())

    def _live(self) -> list[RequestStream]:
        return [session for session in self._sessions.values() if not session.lost]

    async def update(self, addresses: Iterable[Address]) -> None:
        """The trunks that there are now: connect to those that are new, or were lost.

        One that is no longer named is about to end: it keeps its requests until it closes them, and gets new ones
        only while no other one has room.
        """
        self._named = set(addresses)
        self._sessions = {a: s for a, s in self._sessions.items() if not s.lost}
        new = self._named - self._sessions.keys() - self._connecting
        await asyncio.gather(*(self._connect(address) for address in new))

    async def _connect(self, address: Address) -> None:
        self._connecting.add(address)
        try:
            session = await RequestStream.connect(address, self.digest, timeout=5.0, secret=self._secret)
        except ConnectionLost as error:
            log.info("%s", error)
            return
        finally:
            self._connecting.discard(address)
        async with self._changed:
            self._sessions[address] = session
            self._changed.notify_all()

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()

    async def generate(self, request: Request) -> AsyncGenerator[Increment, None]:
        """The answer as it comes, whatever happens to the trunks. Leaving the iteration early ends the request.

        Raises before the first part: QueueFull, ValueError (it can never be served). NoTrunkAvailable at any time. One that a
        trunk had when it died is not refused for want of room: it waits.
        """
        tokens, said, started, taken, lives = list(request.resumed), False, False, False, MAX_FAILURES
        full: set[RequestStream] = set()
        deadline = self._now() + self.wait_timeout_s
        while True:
            session = await self._choose(full, deadline, taken)
            rest = replace(request, resumed=tuple(tokens), echo=request.echo and not said)
            try:
                async with aclosing(session.ask(rest)) as answer:
                    async for increment in answer:
                        started, taken, said, lives = True, True, said or increment.echo is not None, MAX_FAILURES
                        if increment.token is not None:
                            tokens.append(increment.token)
                        yield increment
                        if increment.finish:
                            return
            except ConnectionLost as error:
                log.warning("trunk %s", error)
                if started:
                    self.resumed()
                taken, lives = True, lives - 1
                if not lives:
                    raise NoTrunkAvailable(f"{MAX_FAILURES} trunks died while they had this request") from None
                deadline = self._now() + self.wait_timeout_s
            except QueueFull:
                full.add(session)
                if full >= set(self._live()):
                    if not taken:
                        raise
                    full.clear()
                    await asyncio.sleep(0.05)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def _choose(self, full: set[RequestStream], deadline: float, taken: bool) -> RequestStream:
        """The trunk that answers fewest requests, of those that are not full; waits for one until the deadline."""
        if not taken and not self._live() and self._waiting >= self.max_waiting:
            raise NoTrunkAvailable(f"no trunk is there, and {self._waiting} requests wait for one")
        self._waiting += 1
        try:
            async with asyncio.timeout_at(deadline), self._changed:
                await self._changed.wait_for(lambda: self._live())
        except TimeoutError:
            raise NoTrunkAvailable(f"no trunk came within {self.wait_timeout_s:g} s") from None
        finally:
            self._waiting -= 1
        live = self._live()
        return min([s for s in live if s not in full] or live, key=lambda s: (s.address not in self._named, s.active))
