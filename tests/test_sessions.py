"""Requests at trunks over the wire: the same answers as an engine gives, whichever trunks die on the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
import torch
from served import MODEL, artifact, tokenizer

from raymoe.serving.clusters import LocalClusters
from raymoe.serving.driver import Driver
from raymoe.serving.engine import Engine, EngineSettings, QueueFull
from raymoe.serving.forward import Trunk
from raymoe.serving.frames import Address, Lost
from raymoe.serving.request import Increment, Request
from raymoe.serving.sampling import Sampling
from raymoe.serving.sessions import Session, SessionServer, decode_increment, decode_request, encode_increment
from raymoe.serving.trunks import NoTrunk, Trunks
from raymoe.storage.export import Artifact

DIGEST = "d" * 64
SETTINGS = EngineSettings(kv_bytes=1 << 20, max_running=4, max_queued=2, step_tokens=32)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifact(tmp_path_factory.mktemp("sessions"))


def engine(served: Artifact, settings: EngineSettings = SETTINGS) -> Engine:
    clusters = LocalClusters(served, range(MODEL.n_clusters), torch.float32)
    return Engine(Trunk(served, clusters, torch.float32, MODEL.context), tokenizer(), settings)


class OneTrunk:
    """An engine behind a port. `after`: dies by itself once it has given so many increments."""

    def __init__(self, served: Artifact, after: int | None = None, settings: EngineSettings = SETTINGS) -> None:
        self.engine, self.after, self.given = engine(served, settings), after, 0

    async def start(self) -> OneTrunk:
        self.server = SessionServer(DIGEST)
        self.driver = Driver(self.engine, self.deliver)
        await self.server.start(("127.0.0.1", 0), self.driver)
        return self

    @property
    def address(self) -> Address:
        return ("127.0.0.1", self.server.port)

    def deliver(self, given: Any) -> None:
        self.given += len(given)
        if self.after is not None and self.given >= self.after:
            self.server._loop.call_soon_threadsafe(self.die)
        else:
            self.server.deliver(given)

    def die(self) -> None:
        """As a killed process does: nothing is finished, connections are cut."""
        self.server._server.close()
        for writer in tuple(self.server._writers.values()):
            writer.transport.abort()

    async def close(self) -> None:
        await self.server.close()
        await asyncio.to_thread(self.driver.close)


def together(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


async def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
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
    one.submit(asked)
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


async def collect(trunks: Trunks, asked: Request) -> list[Increment]:
    return [increment async for increment in trunks.generate(asked)]


def test_what_crosses_the_wire_is_what_was_sent(served: Artifact) -> None:
    import json
    from dataclasses import asdict

    for n in range(4):
        asked = request(n)
        assert decode_request(json.loads(json.dumps(asdict(asked)))) == asked
        for increment in alone(served, asked):
            again = decode_increment(json.loads(json.dumps(encode_increment(7, increment))))
            assert again == replace(increment, request=7)


def test_answers_are_the_engines(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        trunks = Trunks(DIGEST)
        await trunks.update([trunk.address])
        answers = await asyncio.gather(*(collect(trunks, request(n)) for n in range(4)))
        for n, got in enumerate(answers):
            same(got, alone(served, request(n)))
        trunks.close()
        await trunk.close()

    together(test)


@pytest.mark.parametrize("after", [1, 2, 9, 33, 60])
def test_a_dead_trunk_changes_no_answer(served: Artifact, after: int) -> None:
    async def test() -> None:
        dying, living = await OneTrunk(served, after).start(), await OneTrunk(served).start()
        resumed: list[int] = []
        trunks = Trunks(DIGEST, resumed=lambda: resumed.append(1))
        await trunks.update([dying.address])
        tasks = [asyncio.create_task(collect(trunks, request(n))) for n in range(4)]
        await eventually(lambda: dying.given >= after)
        await trunks.update([dying.address, living.address])
        for n, task in enumerate(tasks):
            same(await task, alone(served, request(n)))
        assert after < 20 or resumed
        trunks.close()
        for trunk in (dying, living):
            await trunk.close()

    together(test)


def test_requests_wait_for_a_trunk_to_come(served: Artifact) -> None:
    async def test() -> None:
        trunks = Trunks(DIGEST)
        task = asyncio.create_task(collect(trunks, request(0)))
        await asyncio.sleep(0)
        assert not trunks.ready and not task.done()
        trunk = await OneTrunk(served).start()
        await trunks.update([trunk.address])
        same(await task, alone(served, request(0)))
        trunks.close()
        await trunk.close()

    together(test)


def test_patience_ends(served: Artifact) -> None:
    async def test() -> None:
        with pytest.raises(NoTrunk, match="no trunk came within 0.05 s"):
            await collect(Trunks(DIGEST, patience_s=0.05), request(0))
        waits = Trunks(DIGEST, patience_s=5, max_waiting=1)
        task = asyncio.create_task(collect(waits, request(0)))
        await asyncio.sleep(0)
        with pytest.raises(NoTrunk, match="1 requests wait"):
            await collect(waits, request(1))
        task.cancel()

    together(test)


def test_full_trunks_refuse_and_keep_their_promises(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        trunks = Trunks(DIGEST)
        await trunks.update([trunk.address])
        tasks = [asyncio.create_task(collect(trunks, request(0, max_tokens=60))) for _ in range(6)]
        await eventually(lambda: trunk.engine.waiting == 2)
        with pytest.raises(QueueFull, match="4 requests are running and 2 are waiting"):
            await collect(trunks, request(1))
        another = await OneTrunk(served).start()
        await trunks.update([trunk.address, another.address])
        same(await collect(trunks, request(1)), alone(served, request(1)))
        for task in tasks:
            same(await task, alone(served, request(0, max_tokens=60)))
        trunks.close()
        for one in (trunk, another):
            await one.close()

    together(test)


def test_a_resumed_request_waits_where_a_new_one_is_refused(served: Artifact) -> None:
    async def test() -> None:
        small = replace(SETTINGS, max_running=1, max_queued=0)
        dying = await OneTrunk(served, after=12).start()
        busy = await OneTrunk(served, settings=small).start()
        trunks = Trunks(DIGEST)
        await trunks.update([busy.address])
        occupied = asyncio.create_task(collect(trunks, request(0, max_tokens=80)))
        await eventually(lambda: busy.engine.running == 1)
        await trunks.update([busy.address, dying.address])
        same(await collect(trunks, request(1)), alone(served, request(1)))
        await occupied
        trunks.close()
        for one in (dying, busy):
            await one.close()

    together(test)


def test_a_request_that_can_never_be_served_is_refused(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        trunks = Trunks(DIGEST)
        await trunks.update([trunk.address])
        with pytest.raises(ValueError, match="at most 128"):
            await collect(trunks, request(0, max_tokens=1000))
        assert trunk.driver.idle
        trunks.close()
        await trunk.close()

    together(test)


def test_leaving_early_frees_the_engine(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        trunks = Trunks(DIGEST)
        await trunks.update([trunk.address])
        async with aclosing(trunks.generate(request(0, max_tokens=100))) as answer:
            async for _ in answer:
                break
        await eventually(lambda: trunk.driver.idle)
        task = asyncio.create_task(collect(trunks, request(0, max_tokens=100)))
        await eventually(lambda: not trunk.driver.idle)
        task.cancel()
        await eventually(lambda: trunk.driver.idle)
        assert trunk.given < 150 and trunk.engine.cache.free == trunk.engine.cache.capacity
        trunks.close()
        await trunk.close()

    together(test)


def test_a_dead_api_frees_the_engine(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        session = await Session.connect(trunk.address, DIGEST, 5)
        answer = session.ask(request(0, max_tokens=100))
        await anext(answer)
        session._writer.transport.abort()
        await eventually(lambda: trunk.driver.idle)
        with pytest.raises(Lost):
            while True:
                await anext(answer)
        await trunk.close()

    together(test)


def test_a_silent_trunk_counts_as_dead(served: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr("raymoe.serving.sessions.SILENCE", 0.2)
        silent = await asyncio.start_server(lambda reader, writer: writer.write(b'{"raymoe": 1}\n'), "127.0.0.1", 0)
        living = await OneTrunk(served).start()
        monkeypatch.setattr("raymoe.serving.sessions.BEAT", 0.05)
        trunks = Trunks(DIGEST)
        await trunks.update([silent.sockets[0].getsockname()[:2]])
        task = asyncio.create_task(collect(trunks, request(0)))
        await asyncio.sleep(0)
        await trunks.update([living.address])
        same(await task, alone(served, request(0)))
        trunks.close()
        silent.close()
        await living.close()

    together(test)


@pytest.mark.parametrize("line", [b"", b"\xff\n", b"[]\n", b'{"raymoe": 2}\n', b'{"raymoe": 1, "digest": "x"}\n'])
def test_strangers_are_refused(served: Artifact, line: bytes) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        reader, writer = await asyncio.open_connection(*trunk.address)
        writer.write(line)
        writer.write_eof()
        assert b'"raymoe":1' not in await reader.read()
        with pytest.raises(Lost, match="this trunk serves artifact"):
            await Session.connect(trunk.address, "e" * 64, 5)
        trunks = Trunks(DIGEST)
        await trunks.update([trunk.address])
        same(await collect(trunks, request(0)), alone(served, request(0)))
        trunks.close()
        await trunk.close()

    together(test)


def test_a_driver_whose_engine_fails_says_so(served: Artifact) -> None:
    broken = engine(served)

    def fail() -> list[Increment]:
        raise OSError("the artifact is gone")

    broken.step = fail  # type: ignore[method-assign]
    driver = Driver(broken, lambda given: None)
    driver.submit(1, request(0))
    driver._thread.join(10)
    assert isinstance(driver.failed, OSError)
