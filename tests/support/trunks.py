"""Trunks without Serve: engines behind request servers in one event loop, and requests to compare."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import torch

from raymoe.serving.engine.cluster import LocalClusters
from raymoe.serving.engine.engine import Engine, EngineSettings
from raymoe.serving.engine.request import Increment, Request
from raymoe.serving.engine.sampling import Sampling
from raymoe.serving.engine.thread import EngineThread
from raymoe.serving.engine.trunk import Trunk
from raymoe.serving.transport.handshake import NO_SECRET, Address
from raymoe.serving.transport.requests import RequestServer, request_identity
from raymoe.serving.transport.trunk_pool import TrunkPool
from raymoe.storage.artifact import Artifact
from tests.support.served import MODEL, tokenizer

DIGEST = "d" * 64
SETTINGS = EngineSettings(kv_bytes=1 << 20, max_running=4, max_queued=2, step_tokens=32)


def engine(served: Artifact, settings: EngineSettings = SETTINGS) -> Engine:
    clusters = LocalClusters(served, range(MODEL.n_clusters), torch.float32)
    return Engine(Trunk(served, clusters, torch.float32, MODEL.context), tokenizer(), settings)


class OneTrunk:
    """An engine behind a port. `after`: number of delivered increments after which its connections are cut."""

    def __init__(
        self,
        served: Artifact,
        after: int | None = None,
        settings: EngineSettings = SETTINGS,
        secret: bytes = NO_SECRET,
        kernel: str = "k",
    ) -> None:
        self.secret, self.kernel = secret, kernel
        self.engine, self.after, self.delivered = engine(served, settings), after, 0

    async def start(self) -> OneTrunk:
        self.server = RequestServer(request_identity(DIGEST, self.kernel), self.secret)
        self.engine_thread = EngineThread(self.engine, self.deliver)
        await self.server.start(("127.0.0.1", 0), self.engine_thread)
        return self

    @property
    def address(self) -> Address:
        return ("127.0.0.1", self.server.port)

    def deliver(self, results: Any) -> None:
        self.delivered += len(results)
        if self.after is not None and self.delivered >= self.after:
            self.server._loop.call_soon_threadsafe(self.die)
        else:
            self.server.deliver(results)

    def die(self) -> None:
        """Cut all connections, as a killed process does."""
        self.server._server.close()
        for writer in tuple(self.server._writers.values()):
            writer.transport.abort()

    async def close(self) -> None:
        await self.server.close()
        await asyncio.to_thread(self.engine_thread.close)


def together(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


async def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition is still false after 10 s"
        await asyncio.sleep(0.005)


def request(n: int, **changes: Any) -> Request:
    ids = tuple(tokenizer().encode("The cat sat on the mat, the dog").ids[: n + 3])
    kinds = [
        Request(ids, 24, Sampling(temperature=0), ignore_eos=True),
        Request(ids, 20, Sampling(temperature=1.0, top_p=0.9, seed=n), logprobs=2, ignore_eos=True),
        Request(ids, 12, Sampling(seed=n, repetition_penalty=1.2), logprobs=0, echo=True),
        Request(ids, 30, Sampling(seed=n, stop=("the", "at"), frequency_penalty=0.3)),
    ]
    return replace(kinds[n % 4], **changes)


def alone(served: Artifact, asked: Request) -> list[Increment]:
    one = engine(served)
    one.submit("alone", asked)
    increments: list[Increment] = []
    while not one.idle:
        increments += one.step()
    return increments


def same(got: list[Increment], expected: list[Increment]) -> None:
    assert [i.token for i in got] == [i.token for i in expected]
    assert "".join(i.text for i in got) == "".join(i.text for i in expected)
    assert [i.finish for i in got] == [i.finish for i in expected]
    assert [i.usage for i in got] == [i.usage for i in expected]
    assert [i.logprob for i in got] == [i.logprob for i in expected]
    assert [i.echo for i in got] == [i.echo for i in expected]


async def collect(trunks: TrunkPool, asked: Request) -> list[Increment]:
    return [increment async for increment in trunks.generate(asked)]
