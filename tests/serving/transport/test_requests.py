"""Request streams: typed messages, refusals, hostile peers and heartbeats."""

from __future__ import annotations

import asyncio
import json
import math
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.serving.engine.request import Increment, Request, Usage
from raymoe.serving.engine.sampling import LogProb
from raymoe.serving.engine.thread import EngineThread
from raymoe.serving.transport.handshake import (
    CHALLENGE,
    HELLO,
    MAGIC,
    MAX_PENDING,
    NO_SECRET,
    Address,
    ConnectionLost,
    run_async,
    server_exchange,
)
from raymoe.serving.transport.messages import (
    Heartbeat,
    Increments,
    Rejection,
    Submit,
    check_request,
    decode_to_api,
    decode_to_trunk,
    encode_to_api,
    encode_to_trunk,
)
from raymoe.serving.transport.requests import RequestStream, request_identity
from raymoe.serving.transport.trunk_pool import TrunkPool
from raymoe.storage.artifact import Artifact
from tests.support.served import artifact
from tests.support.trunks import DIGEST, OneTrunk, alone, collect, engine, eventually, request, same, together


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifact(tmp_path_factory.mktemp("streams"))


def test_messages_are_decoded_as_they_were_sent(served: Artifact) -> None:
    messages = [Rejection(3, True, "full"), Heartbeat()]
    for n in range(4):
        asked = request(n)
        assert decode_to_trunk(encode_to_trunk(Submit(n, asked))[4:]) == Submit(n, asked)
        check_request(asked)
        messages.append(Increments(tuple(replace(i, key=n) for i in alone(served, asked))))
    least = Increment(1, 2, "Ü🙂\n", Usage(1, 1), LogProb(5, -math.inf, ((5, -math.inf), (7, -0.1))))
    for message in [*messages, Increments((least,))]:
        assert decode_to_api(encode_to_api(message)[4:]) == message


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=80)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda x: st.dictionaries(
            st.sampled_from(["type", "key", "request", "increments", "full", "reason", "prompt"]),
            x | st.sampled_from(["submit", "cancel", "increments", "rejection"]),
            max_size=4,
        ),
    ).map(lambda x: json.dumps(x).encode())
)
def test_arbitrary_messages_are_decoded_or_raise_a_value_error(content: bytes) -> None:
    for decode in (decode_to_api, decode_to_trunk):
        with suppress(ValueError):
            decode(content)


def test_an_invalid_request_is_rejected_and_ends_nothing_else(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        trunks = TrunkPool(DIGEST)
        await trunks.update([trunk.address])
        for invalid, field in (
            (Request(("a",)), "prompt.0='a'"),
            (request(0, stop_token_ids=(None,)), "stop_token_ids.0"),
        ):  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=field):
                await collect(trunks, invalid)
        stream = await RequestStream.connect(trunk.address, DIGEST, 5)
        running = stream.generate(request(0, max_tokens=60))
        received = [await anext(running)]
        stream._writer.write(encode_to_trunk(Submit(2, request(0))))
        await eventually(lambda: (2, 2) in trunk.engine.keys)
        stream._writer.write(encode_to_trunk(Submit(2, request(0))))  # a key that is active
        received += [increment async for increment in running]
        same(received, alone(served, request(0, max_tokens=60)))
        same(await collect(trunks, request(0)), alone(served, request(0)))
        trunks.close()
        stream.close()
        await trunk.close()

    together(test)


@pytest.mark.parametrize("content", [b"{}", b"[]", b"\xff", b'{"type":"cancel","key":"1"}', b"[" * 100_000, None])
def test_an_invalid_message_ends_its_stream_alone(served: Artifact, content: bytes | None) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        trunks = TrunkPool(DIGEST)
        await trunks.update([trunk.address])
        stream = await RequestStream.connect(trunk.address, DIGEST, 5)
        size = 0xFFFFFFFF if content is None else len(content)
        stream._writer.write(struct.pack("<I", size) + (content or b""))
        await eventually(lambda: stream.lost)
        same(await collect(trunks, request(0)), alone(served, request(0)))
        trunks.close()
        await trunk.close()

    together(test)


@asynccontextmanager
async def posing(after: bytes, before: bytes = b"") -> AsyncIterator[Address]:
    """A server that sends `before`, or that completes the handshake as a trunk does and then sends `after`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            if before:
                writer.write(before)
            else:
                await run_async(server_exchange(NO_SECRET, address[1], request_identity(DIGEST, "k")), reader, writer)
                writer.write(after)
                if len(after) == 1:
                    writer.write_eof()
            while await reader.read(1000):
                pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()[:2]
    yield address
    server.close()


@pytest.mark.parametrize(
    "before", [b"[]\n", b"raymoe 2" * 20, b"raymoe 3" + bytes(64), b"HTTP/1.1 400 Bad Request", b"x" * 9999]
)
def test_a_server_that_is_no_trunk_is_not_used(before: bytes) -> None:
    async def test() -> None:
        async with posing(b"", before) as address:
            with pytest.raises(ConnectionLost):
                await RequestStream.connect(address, DIGEST, 0.2)

    together(test)


@pytest.mark.parametrize("after", [struct.pack("<I", 2) + b"[]", struct.pack("<I", 0xFFFFFFFF), b"\1"])
def test_an_invalid_message_of_a_trunk_loses_it(after: bytes) -> None:
    async def test() -> None:
        async with posing(after) as address:
            stream = await RequestStream.connect(address, DIGEST, 5)
            with pytest.raises(ConnectionLost, match="ValidationError|at most|middle of a message|was lost"):
                await asyncio.wait_for(anext(stream.generate(request(0))), 5)

    together(test)


def test_a_trunk_without_heartbeat_is_lost(served: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr("raymoe.serving.transport.requests.HEARTBEAT_TIMEOUT_S", 0.2)
        monkeypatch.setattr("raymoe.serving.transport.requests.HEARTBEAT_S", 0.05)
        living = await OneTrunk(served).start()
        async with posing(b"") as silent:
            trunks = TrunkPool(DIGEST)
            await trunks.update([silent])
            task = asyncio.create_task(collect(trunks, request(0)))
            await asyncio.sleep(0)
            await trunks.update([living.address])
            same(await task, alone(served, request(0)))
            trunks.close()
        await living.close()

    together(test)


@pytest.mark.parametrize(
    "sent", [b"", b"\xff\n", b"[]\n", b"raymoe 2" + bytes(32), b"raymoe 3" + bytes(66), b"x" * 9999]
)
def test_a_client_that_is_no_api_is_refused(served: Artifact, sent: bytes) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        reader, writer = await asyncio.open_connection(*trunk.address)
        writer.write(sent)
        writer.write_eof()
        with suppress(ConnectionResetError):
            assert DIGEST.encode() not in await reader.read()
        writer.close()
        with pytest.raises(ConnectionLost, match="its artifact is d{64}, not e{64}"):
            await RequestStream.connect(trunk.address, "e" * 64, 5)
        trunks = TrunkPool(DIGEST)
        await trunks.update([trunk.address])
        same(await collect(trunks, request(0)), alone(served, request(0)))
        trunks.close()
        await trunk.close()

    together(test)


def test_an_api_without_the_secret_is_refused(served: Artifact) -> None:
    """It reaches the port and knows the artifact's digest."""

    async def test() -> None:
        secret = bytes(range(32))
        trunk = await OneTrunk(served, secret=secret).start()
        for wrong in (NO_SECRET, secret[::-1]):
            with pytest.raises(ConnectionLost, match="it belongs to another application$"):
                await RequestStream.connect(trunk.address, DIGEST, 5, wrong)
        assert not trunk.engine.keys
        trunks = TrunkPool(DIGEST, secret=secret)
        await trunks.update([trunk.address])
        same(await collect(trunks, request(0)), alone(served, request(0)))
        trunks.close()
        await trunk.close()

    together(test)


def test_silent_connections_do_not_lock_others_out(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        silent = [await asyncio.open_connection(*trunk.address) for _ in range(MAX_PENDING + 10)]
        stream = await RequestStream.connect(trunk.address, DIGEST, 5)
        with suppress(ConnectionResetError):
            assert await silent[0][0].read() == b""
        assert not stream.lost
        stream.close()
        for _, writer in silent:
            writer.close()
        await trunk.close()

    together(test)


def test_a_flood_before_authentication_is_cut_off(served: Artifact) -> None:
    """A trunk reads no further than the handshake, and closes the connection when it fails."""

    async def test() -> None:
        trunk = await OneTrunk(served).start()
        reader, writer = await asyncio.open_connection(*trunk.address)
        writer.write(HELLO.pack(MAGIC, bytes(32)) + b"\0" * 32)  # a part of the response, which keeps it waiting
        await reader.readexactly(CHALLENGE.size)
        writer.transport.set_write_buffer_limits(0)
        sent = 0
        with suppress(TimeoutError, ConnectionResetError):
            async with asyncio.timeout(0.5):
                while sent < 256 << 20:
                    writer.write(bytes(1 << 20))
                    sent += 1 << 20
                    await writer.drain()
        assert sent < 64 << 20
        writer.close()
        await trunk.close()

    together(test)


def test_a_lost_api_frees_the_engine(served: Artifact) -> None:
    async def test() -> None:
        trunk = await OneTrunk(served).start()
        stream = await RequestStream.connect(trunk.address, DIGEST, 5)
        answer = stream.generate(request(0, max_tokens=100))
        await anext(answer)
        cancel, canceled = trunk.engine.cancel, list[object]()
        step = trunk.engine.step
        trunk.engine.step = lambda: (time.sleep(0.02), step())[1]  # type: ignore[method-assign]  # 2 s for the rest
        trunk.engine.cancel = lambda key: (canceled.append(key), cancel(key))[1]  # type: ignore[method-assign]
        stream._writer.transport.abort()
        await eventually(lambda: trunk.engine_thread.idle)
        assert canceled == [(1, 1)]
        with pytest.raises(ConnectionLost):
            while True:
                await anext(answer)
        cancel, canceled = trunk.engine.cancel, list[object]()
        step = trunk.engine.step
        trunk.engine.step = lambda: (time.sleep(0.02), step())[1]  # type: ignore[method-assign]  # 2 s for the rest
        trunk.engine.cancel = lambda key: (canceled.append(key), cancel(key))[1]  # type: ignore[method-assign]
        await trunk.close()

    together(test)


def test_an_engine_failure_is_recorded(served: Artifact) -> None:
    broken = engine(served)

    def fail() -> list[Increment]:
        raise OSError("the artifact is gone")

    broken.step = fail  # type: ignore[method-assign]
    engine_thread = EngineThread(broken, lambda given: None)
    engine_thread.submit(1, request(0))
    engine_thread._thread.join(10)
    assert isinstance(engine_thread.failed, OSError)
