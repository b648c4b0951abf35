"""Request streams: typed messages on one persistent connection between an api and a trunk.

A connection that ends takes its requests with it. A trunk without a heartbeat for `HEARTBEAT_TIMEOUT_S` is treated
as dead. Handshake and messages are in `handshake.py` and `messages.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Hashable, Sequence
from contextlib import suppress
from dataclasses import replace

from raymoe.serving.engine.engine import QueueFull
from raymoe.serving.engine.request import Increment, Request
from raymoe.serving.engine.thread import EngineThread, Rejected
from raymoe.serving.transport.handshake import (
    HANDSHAKE_TIMEOUT_S,
    NO_SECRET,
    Address,
    ConnectionLost,
    HandshakeFailed,
    Identity,
    PendingConnections,
    client_exchange,
    run_async,
    server_exchange,
)
from raymoe.serving.transport.messages import (
    Cancel,
    Heartbeat,
    Increments,
    Rejection,
    Submit,
    ToApi,
    check_request,
    decode_to_api,
    decode_to_trunk,
    encode_to_api,
    encode_to_trunk,
    read_message,
)

BUFFER_BYTES = 1 << 16
"""Bytes that a connection buffers beside the message that is being read."""
HEARTBEAT_S = 1.0
"""Seconds between heartbeats."""
HEARTBEAT_TIMEOUT_S = 10.0
"""Seconds without a message after which a trunk is treated as dead."""
MAX_UNREAD_BYTES = 64 << 20
"""Bytes that may wait for an api to read them. Beyond it the connection is closed."""


def request_identity(digest: str, kernel: str = "") -> dict[str, str]:
    """Return the identity of a trunk or of an api, which has no `kernel`: it accepts trunks with any."""
    identity = {"protocol": "requests", "artifact": digest}
    return identity | {"kernel": kernel} if kernel else identity


class RequestServer:
    """The trunk's end: takes requests of any number of apis for an engine. All methods belong to one event loop.

    A request's key in the engine is (number of its stream, its key in the stream).
    """

    def __init__(self, identity: Identity, secret: bytes = NO_SECRET) -> None:
        self.identity, self._secret = identity, secret
        self.port = 0
        self.engine_thread: EngineThread | None = None
        self._loop = asyncio.get_running_loop()
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._pending = PendingConnections()
        self._number = 0

    async def start(self, address: Address, engine_thread: EngineThread) -> None:
        self.engine_thread = engine_thread
        self._server = await asyncio.start_server(self._serve, *address, limit=BUFFER_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        for writer in tuple(self._writers.values()):
            writer.close()

    def deliver(self, results: Sequence[Increment | Rejected]) -> None:
        """Send results to their apis. Called in the engine's thread."""
        with suppress(RuntimeError):  # the event loop has ended, and all connections with it
            self._loop.call_soon_threadsafe(self._send_results, results)

    def _send_results(self, results: Sequence[Increment | Rejected]) -> None:
        by_stream: dict[int, list[Increment]] = {}
        for result in results:
            stream, key = result.key  # type: ignore[misc]
            if isinstance(result, Rejected):
                self._send(stream, Rejection(key, result.full, result.reason))
            else:
                by_stream.setdefault(stream, []).append(replace(result, key=key))
        for stream, increments in by_stream.items():
            self._send(stream, Increments(tuple(increments)))

    def _send(self, stream: int, message: ToApi) -> None:
        writer = self._writers.get(stream)
        if writer is None:  # it ended, and its requests are being canceled
            return
        if writer.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            writer.transport.abort()
        else:
            writer.write(encode_to_api(message))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._number += 1
        stream = self._number
        self._pending.add(stream, writer.transport.abort)
        try:
            await run_async(
                server_exchange(self._secret, self.port, self.identity, self._refusal), reader, writer,
                HANDSHAKE_TIMEOUT_S,
            )  # fmt: skip
            self._pending.remove(stream)
            self._writers[stream] = writer
            await self._receive(stream, reader)
        except (OSError, ValueError, HandshakeFailed):
            pass  # the client is gone, or is not of this application
        finally:
            self._pending.remove(stream)
            writer.close()

    def _refusal(self) -> str | None:
        assert self.engine_thread is not None
        return None if self.engine_thread.failed is None else "its engine has failed"

    async def _receive(self, stream: int, reader: asyncio.StreamReader) -> None:
        assert self.engine_thread is not None
        heartbeat = asyncio.create_task(self._send_heartbeats(stream))
        try:
            while content := await read_message(reader):
                message = decode_to_trunk(content)
                if isinstance(message, Submit):
                    self.engine_thread.submit((stream, message.key), message.request)
                else:
                    self.engine_thread.cancel((stream, message.key))
        finally:
            heartbeat.cancel()
            del self._writers[stream]
            self.engine_thread.cancel_all(lambda key: _stream_of(key) == stream)

    async def _send_heartbeats(self, stream: int) -> None:
        assert self.engine_thread is not None
        while self.engine_thread.failed is None:
            self._send(stream, Heartbeat())
            await asyncio.sleep(HEARTBEAT_S)
        self._writers[stream].close()  # its requests are resumed on another trunk


def _stream_of(key: Hashable) -> int | None:
    return key[0] if isinstance(key, tuple) else None


class RequestStream:
    """The api's end: a connection to one trunk. `identity`: the trunk's. `lost`: the connection has ended."""

    def __init__(
        self, address: Address, identity: Identity, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.address, self.identity = address, identity
        self.lost = False
        self._reader, self._writer = reader, writer
        self._results: dict[int, asyncio.Queue[Increment | Rejection | ConnectionLost]] = {}
        self._number = 0
        self._task = asyncio.create_task(self._receive())

    @classmethod
    async def connect(cls, address: Address, digest: str, timeout: float, secret: bytes = NO_SECRET) -> RequestStream:
        """Connect within `timeout` seconds to a trunk of the artifact. Raises ConnectionLost."""
        writer = None
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_connection(*address, limit=BUFFER_BYTES)
                exchange = client_exchange(secret, address[1], request_identity(digest))
                return cls(address, await run_async(exchange, reader, writer, timeout), reader, writer)
        except HandshakeFailed as error:
            reason = f"was not used: {error}"
        except (OSError, TimeoutError) as error:
            reason = f"cannot be reached: {type(error).__name__}: {error}"
        if writer is not None:
            writer.transport.abort()
        raise ConnectionLost(f"{address[0]}:{address[1]} {reason}")

    @property
    def active(self) -> int:
        """Number of requests on this stream."""
        return len(self._results)

    def close(self) -> None:
        self._task.cancel()
        self._end("it was closed")

    async def generate(self, request: Request) -> AsyncGenerator[Increment, None]:
        """Yield the request's increments. Leaving the iteration early cancels the request.

        Raises QueueFull or ValueError before the first increment, ConnectionLost at any time.
        """
        if self.lost:
            raise ConnectionLost("the connection was lost")
        check_request(request)
        self._number += 1
        key, ended = self._number, False
        results = self._results[key] = asyncio.Queue()
        try:
            self._writer.write(encode_to_trunk(Submit(key, request)))
            while not ended:
                result = await results.get()
                ended = not isinstance(result, Increment) or result.finish is not None
                if isinstance(result, ConnectionLost):
                    raise result
                if isinstance(result, Rejection):
                    raise QueueFull(result.reason) if result.full else ValueError(result.reason)
                yield result
        finally:
            del self._results[key]
            if not ended and not self.lost:
                self._writer.write(encode_to_trunk(Cancel(key)))

    async def _receive(self) -> None:
        reason = "it closed the connection"
        try:
            while content := await asyncio.wait_for(read_message(self._reader), HEARTBEAT_TIMEOUT_S):
                self._dispatch(decode_to_api(content))
        except TimeoutError:
            reason = f"no heartbeat for {HEARTBEAT_TIMEOUT_S:g} s"
        except Exception as error:  # the connection broke, or the message is invalid
            reason = f"{type(error).__name__}: {error}"
        self._end(reason)

    def _dispatch(self, message: ToApi) -> None:
        if isinstance(message, Increments):
            for increment in message.increments:
                if results := self._results.get(increment.key):  # type: ignore[arg-type]
                    results.put_nowait(increment)
        elif isinstance(message, Rejection) and (results := self._results.get(message.key)):
            results.put_nowait(message)

    def _end(self, reason: str) -> None:
        self.lost = True
        self._writer.transport.abort()
        for results in self._results.values():
            results.put_nowait(ConnectionLost(f"{self.address[0]}:{self.address[1]} was lost: {reason}"))
