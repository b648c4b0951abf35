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

from raymoe.serving.engine.cluster import LocalClusters
from raymoe.serving.engine.engine import Engine, EngineSettings, QueueFull
from raymoe.serving.engine.request import Increment, Request
from raymoe.serving.engine.sampling import Sampling
from raymoe.serving.engine.thread import EngineThread
from raymoe.serving.engine.trunk import Trunk
from raymoe.serving.transport.requests import (
    RequestServer,
    RequestStream,
    decode_increment,
    decode_request,
    encode_increment,
)
from raymoe.serving.transport.rows import NO_SECRET, Address, ConnectionLost
from raymoe.serving.transport.trunk_pool import NoTrunkAvailable, TrunkPool
from raymoe.storage.artifact import Artifact
from tests.support.served import MODEL, artifact, tokenizer

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

    def __init__(
        self,
        served: Artifact,
        after: int | None = None,
        settings: EngineSettings = SETTINGS,
        secret: bytes = NO_SECRET,
    ) -> None:
        self.secret = secret
        self.engine, self.after, self.given = engine(served, settings), after, 0

    async def start(self) -> OneTrunk:
        self.server = RequestServer(DIGEST, self.secret)
        self.engine_thread = EngineThread(self.engine, self.deliver)
        await self.server.start(("127.0.0.1", 0), self.engine_thread)
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
        await asyncio.to_thread(self.engine_thread.close)


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


async def collect(trunks: TrunkPool, asked: Request) -> list[Increment]:
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
        trunks = TrunkPool(DIGEST)
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
        trunks = TrunkPool(DIGEST, resumed=lambda: resumed.append(1))
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
        trunks = TrunkPool(DIGEST)
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
        with pytest.raises(NoTrunkAvailable, match="no trunk came within 0.05 s"):
            await collect(TrunkPool(DIGEST, wait_timeout_s=0.05), request(0))
        waits = TrunkPool(DIGEST, wait_timeout_s=5, max_waiting=1)
        task = asyncio.create_task(collect(waits, request(0)))
        await asyncio.sleep(0)
        with pytest.raises(NoTrunkAvailable, match="1 requests wait"):
            await collect(waits, request(1))
        task.cancel()

    together(test)


def test_full_trunks_refuse_and_keep_their_promises(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        trunks = TrunkPool(DIGEST)
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
        trunks = TrunkPool(DIGEST)
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


def test_what_a_trunk_had_is_not_refused_for_want_of_room(served: Artifact) -> None:
    """Neither while none is there, nor by one that is full, whether or not an answer has begun."""

    async def test() -> None:
        one = replace(SETTINGS, max_running=1)
        dying = await OneTrunk(served, settings=one).start()
        trunks = TrunkPool(DIGEST, max_waiting=0)
        await trunks.update([dying.address])
        tasks = [asyncio.create_task(collect(trunks, request(0, max_tokens=100))) for _ in range(3)]
        await eventually(lambda: dying.engine.waiting == 2 and dying.given)
        dying.die()
        await eventually(lambda: not trunks.ready)
        with pytest.raises(NoTrunkAvailable, match="3 requests wait"):
            await collect(trunks, request(1))
        busy = await OneTrunk(served, settings=replace(one, max_queued=0)).start()
        await trunks.update([busy.address])
        for task in tasks:
            same(await task, alone(served, request(0, max_tokens=100)))
        trunks.close()
        for trunk in (dying, busy):
            await trunk.close()

    together(test)


def test_a_trunk_that_is_about_to_end_gets_no_new_requests(served: Artifact) -> None:
    async def test() -> None:
        ending, staying = await OneTrunk(served).start(), await OneTrunk(served).start()
        trunks = TrunkPool(DIGEST)
        await trunks.update([ending.address])
        first = asyncio.create_task(collect(trunks, request(0, max_tokens=60)))
        await eventually(lambda: ending.engine.running == 1)
        await trunks.update([staying.address])
        rest = [asyncio.create_task(collect(trunks, request(0))) for _ in range(4)]
        for task in rest:
            same(await task, alone(served, request(0)))
        assert ending.engine_thread._numbers.keys() <= {(1, 1)} and staying.given == 4 * 24
        same(await first, alone(served, request(0, max_tokens=60)))
        await trunks.update([])  # the last one is better than none
        same(await collect(trunks, request(1)), alone(served, request(1)))
        trunks.close()
        for trunk in (ending, staying):
            await trunk.close()

    together(test)


def test_a_trunk_whose_engine_has_ended_lets_its_requests_go(served: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr("raymoe.serving.transport.requests.HEARTBEAT_S", 0.02)
        broken, living = await OneTrunk(served).start(), await OneTrunk(served).start()
        trunks = TrunkPool(DIGEST)
        await trunks.update([broken.address])
        step, steps = broken.engine.step, iter(range(5))

        def fail() -> list[Increment]:
            if next(steps, None) is None:
                raise OSError("the artifact is gone")
            return step()

        broken.engine.step = fail  # type: ignore[method-assign]
        task = asyncio.create_task(collect(trunks, request(0)))
        await eventually(lambda: broken.engine_thread.failed)
        await trunks.update([broken.address, living.address])
        same(await task, alone(served, request(0)))
        with pytest.raises(ConnectionLost, match="engine has ended"):
            await RequestStream.connect(broken.address, DIGEST, 5)
        trunks.close()
        for trunk in (broken, living):
            await trunk.close()

    together(test)


def test_a_request_that_kills_trunks_does_not_kill_them_all(served: Artifact) -> None:
    async def test() -> None:
        made = [await OneTrunk(served, after=1).start() for _ in range(6)]
        trunks = TrunkPool(DIGEST)
        await trunks.update([trunk.address for trunk in made])
        with pytest.raises(NoTrunkAvailable, match="5 trunks died"):
            await collect(trunks, request(0))
        assert len(trunks._live()) == 1
        trunks.close()
        for trunk in made:
            await trunk.close()

    together(test)


def test_an_odd_request_is_refused_and_ends_nothing_else(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        trunks = TrunkPool(DIGEST)
        await trunks.update([trunk.address])
        for odd in (Request(("a",)), request(0, stop_token_ids=(None,))):  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="TypeError"):
                await collect(trunks, odd)
        session = await RequestStream.connect(trunk.address, DIGEST, 5)
        for _ in range(2):  # the same number twice
            session._writer.write(b'{"submit": 1, "request": {"prompt": [1], "max_tokens": 90, "sampling": {}}}\n')
        await eventually(lambda: session.lost)
        same(await collect(trunks, request(0)), alone(served, request(0)))
        trunks.close()
        await trunk.close()

    together(test)


@pytest.mark.parametrize("line", [b"[]\n", b"5\n", b'{"raymoe": 3}\n', b"\xff\n", b"[" * 100_000 + b"\n", b""])
def test_what_is_no_trunk_is_left(served: Artifact, line: bytes) -> None:
    async def test() -> None:
        left = asyncio.Event()

        async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(line)
            while await reader.read(1000):
                pass
            left.set()

        server = await asyncio.start_server(stranger, "127.0.0.1", 0)
        with pytest.raises(ConnectionLost):
            await RequestStream.connect(server.sockets[0].getsockname()[:2], DIGEST, 0.2)
        await asyncio.wait_for(left.wait(), 5)
        server.close()

    together(test)


def test_a_trunk_that_says_odd_things_is_lost(served: Artifact) -> None:
    async def test() -> None:
        async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(b'{"raymoe": 2}\n')
            await reader.readline()
            writer.write(b'{"given": [[]]}\n')

        server = await asyncio.start_server(odd, "127.0.0.1", 0)
        session = await RequestStream.connect(server.sockets[0].getsockname()[:2], DIGEST, 5)
        with pytest.raises(ConnectionLost, match="IndexError"):
            await asyncio.wait_for(anext(session.ask(request(0))), 5)
        server.close()

    together(test)


def test_a_request_that_can_never_be_served_is_refused(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        trunks = TrunkPool(DIGEST)
        await trunks.update([trunk.address])
        with pytest.raises(ValueError, match="at most 128"):
            await collect(trunks, request(0, max_tokens=1000))
        assert trunk.engine_thread.idle
        trunks.close()
        await trunk.close()

    together(test)


def test_leaving_early_frees_the_engine(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        trunks = TrunkPool(DIGEST)
        await trunks.update([trunk.address])
        async with aclosing(trunks.generate(request(0, max_tokens=100))) as answer:
            async for _ in answer:
                break
        await eventually(lambda: trunk.engine_thread.idle)
        task = asyncio.create_task(collect(trunks, request(0, max_tokens=100)))
        await eventually(lambda: not trunk.engine_thread.idle)
        task.cancel()
        await eventually(lambda: trunk.engine_thread.idle)
        assert trunk.given < 150 and trunk.engine.cache.free == trunk.engine.cache.capacity
        trunks.close()
        await trunk.close()

    together(test)


def test_a_dead_api_frees_the_engine(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        session = await RequestStream.connect(trunk.address, DIGEST, 5)
        answer = session.ask(request(0, max_tokens=100))
        await anext(answer)
        session._writer.transport.abort()
        await eventually(lambda: trunk.engine_thread.idle)
        with pytest.raises(ConnectionLost):
            while True:
                await anext(answer)
        await trunk.close()

    together(test)


def test_a_silent_trunk_counts_as_dead(served: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr("raymoe.serving.transport.requests.HEARTBEAT_TIMEOUT_S", 0.2)
        silent = await asyncio.start_server(lambda reader, writer: writer.write(b'{"raymoe": 2}\n'), "127.0.0.1", 0)
        living = await OneTrunk(served).start()
        monkeypatch.setattr("raymoe.serving.transport.requests.HEARTBEAT_S", 0.05)
        trunks = TrunkPool(DIGEST)
        await trunks.update([silent.sockets[0].getsockname()[:2]])
        task = asyncio.create_task(collect(trunks, request(0)))
        await asyncio.sleep(0)
        await trunks.update([living.address])
        same(await task, alone(served, request(0)))
        trunks.close()
        silent.close()
        await living.close()

    together(test)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\n",
        b"[]\n",
        b'{"raymoe": 3}\n',
        b'{"raymoe": 2, "digest": "x"}\n',
        b'{"raymoe": 2, "secret": 1}\n',
        b"x" * 9999,
    ],
)
def test_strangers_are_refused(served: Artifact, line: bytes) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        reader, writer = await asyncio.open_connection(*trunk.address)
        writer.write(line)
        writer.write_eof()
        assert b'"raymoe":2' not in await reader.read()
        with pytest.raises(ConnectionLost, match="this trunk serves artifact"):
            await RequestStream.connect(trunk.address, "e" * 64, 5)
        trunks = TrunkPool(DIGEST)
        await trunks.update([trunk.address])
        same(await collect(trunks, request(0)), alone(served, request(0)))
        trunks.close()
        await trunk.close()

    together(test)


def test_who_does_not_know_the_secret_is_refused_and_told_nothing(served: Artifact) -> None:
    """Whoever reaches the port and knows the artifact's digest is no api all the same."""

    async def test() -> None:
        secret = bytes(range(32))
        trunk = await OneTrunk(served, secret=secret).start()
        for wrong in (NO_SECRET, secret[::-1]):
            with pytest.raises(ConnectionLost) as caught:
                await RequestStream.connect(trunk.address, DIGEST, 5, wrong)
            assert str(caught.value).endswith("refused: this trunk is of another application")
        reader, writer = await asyncio.open_connection(*trunk.address)
        writer.write(b'{"raymoe": 2, "digest": "%b"}\n{"submit": 1, "request": {}}\n' % DIGEST.encode())
        assert await reader.read() == b"" and not trunk.engine_thread._numbers
        writer.close()
        trunks = TrunkPool(DIGEST, secret=secret)
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
    engine_thread = EngineThread(broken, lambda given: None)
    engine_thread.submit(1, request(0))
    engine_thread._thread.join(10)
    assert isinstance(engine_thread.failed, OSError)
