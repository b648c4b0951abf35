"""Requests over the wire: lines of JSON on one persistent connection between an api and a trunk.

    api -> trunk   {"raymoe": 2, "secret": "…", "digest": "…"}       the greeting
                   {"submit": 7, "request": {…}}    {"cancel": 7}
    trunk -> api   {"raymoe": 2}                                     or {"error": "…"}, and the end
                   {"given": [[7, token, text, …], …]}               what one step added to all answers of this api
                   {"refused": 7, "full": true, "reason": "…"}       {"beat": 1} when there is nothing else to say

The secret is the application's own: a trunk answers its apis alone, which ask clients for their key. A connection that
ends takes its requests with it. A trunk that is silent for `HEARTBEAT_TIMEOUT_S` seconds counts as dead.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from raymoe.serving.engine.engine import QueueFull
from raymoe.serving.engine.request import Echo, Increment, Request, Usage
from raymoe.serving.engine.sampling import LogProb, Sampling
from raymoe.serving.engine.thread import Delivery, EngineThread, Rejected
from raymoe.serving.transport.rows import NO_SECRET, Address, ConnectionLost

LINE_LIMIT = 64 << 20
GREETING_LIMIT = 4096
"""Bytes of a greeting: whoever has not shown the secret is not read further."""
VERSION = 2
HEARTBEAT_S = 1.0
"""Seconds between signs of life."""
HEARTBEAT_TIMEOUT_S = 10.0
"""Seconds without one after which the other side counts as dead."""
BACKLOG = 64 << 20
"""Bytes that wait for an api at most; one that does not read them is cut off."""


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _tupled(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def decode_request(value: dict[str, Any]) -> Request:
    fields = {name: _tupled(field) for name, field in value.items() if name != "sampling"}
    sampling = Sampling(**{name: _tupled(field) for name, field in value["sampling"].items()})
    return Request(**fields, sampling=sampling)


def encode_increment(key: int, increment: Increment) -> list[Any]:
    logprob = asdict(increment.logprob) if increment.logprob else None
    echo = asdict(increment.echo) if increment.echo else None
    usage = increment.usage
    return [
        key, increment.token, increment.text, usage.prompt_tokens, usage.completion_tokens, increment.finish, logprob, echo,
    ]  # fmt: skip


def _logprob(value: dict[str, Any] | None) -> LogProb | None:
    return LogProb(value["token"], value["logprob"], _tupled(value["top"])) if value else None


def decode_increment(value: list[Any]) -> Increment:
    key, token, text, prompt, completion, finish, logprob, echo = value
    echoed = None
    if echo:
        of_prompt = echo["logprobs"]
        echoed = Echo(echo["text"], None if of_prompt is None else tuple(map(_logprob, of_prompt)))
    return Increment(key, token, text, Usage(prompt, completion), _logprob(logprob), echoed, finish)


async def _greeting(reader: asyncio.StreamReader) -> bytes:
    """The first line, which must be short. Raises ValueError for one that is not."""
    line = b""
    while not line.endswith(b"\n"):
        if len(line) > GREETING_LIMIT:
            raise ValueError("this is no greeting")
        if not (byte := await reader.read(1)):
            break
        line += byte
    return line


# The trunk's end


class RequestServer:
    """Takes requests for a engine_thread from any number of apis. All methods belong to one event loop."""

    def __init__(self, digest: str, secret: bytes = NO_SECRET) -> None:
        self.digest, self._secret = digest, secret
        self.port = 0
        self.engine_thread: EngineThread | None = None
        self._loop = asyncio.get_running_loop()
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._keys: dict[int, set[int]] = {}
        self._number = 0

    async def start(self, address: Address, engine_thread: EngineThread) -> None:
        self.engine_thread = engine_thread
        self._server = await asyncio.start_server(self._serve, *address, limit=LINE_LIMIT)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        for writer in tuple(self._writers.values()):
            writer.close()

    def deliver(self, given: Sequence[Delivery]) -> None:
        """The engine_thread's `Deliver`, from its thread."""
        with suppress(RuntimeError):  # the loop has ended, and all connections with it
            self._loop.call_soon_threadsafe(self._write, given)

    def _write(self, given: Sequence[Delivery]) -> None:
        steps: dict[int, list[Any]] = {}
        for (session, key), what in given:  # type: ignore[misc]
            if key not in self._keys.get(session, ()):
                continue
            if isinstance(what, Rejected):
                self._keys[session].discard(key)
                self._tell(session, {"refused": key, "full": what.full, "reason": what.reason})
                continue
            if what.finish:
                self._keys[session].discard(key)
            steps.setdefault(session, []).append(encode_increment(key, what))
        for session, increments in steps.items():
            self._tell(session, {"given": increments})

    def _tell(self, session: int, value: dict[str, Any]) -> None:
        writer = self._writers[session]
        if writer.transport.get_write_buffer_size() > BACKLOG:
            writer.transport.abort()
        else:
            writer.write(_line(value))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self.engine_thread is not None
        self._number += 1
        session = self._number
        beat = None
        try:
            greeting = json.loads(await asyncio.wait_for(_greeting(reader), HEARTBEAT_TIMEOUT_S))
            secret = bytes.fromhex(greeting["secret"])
            if greeting["raymoe"] != VERSION or not hmac.compare_digest(secret, self._secret):
                writer.write(_line({"error": "this trunk is of another application"}))
                return
            if self.engine_thread.failed is not None:
                writer.write(_line({"error": "this trunk's engine has ended"}))
                return
            if greeting["digest"] != self.digest:
                writer.write(_line({"error": f"this trunk serves artifact {self.digest[:12]}"}))
                return
            writer.write(_line({"raymoe": VERSION}))
            self._writers[session], self._keys[session] = writer, set()
            beat = asyncio.create_task(self._beat(session))
            while line := await reader.readline():
                message = json.loads(line)
                if "submit" in message:
                    key = message["submit"]
                    if key in self._keys[session]:
                        raise ValueError(f"{key} has been submitted and has not ended")
                    self._keys[session].add(key)
                    self.engine_thread.submit((session, key), decode_request(message["request"]))
                elif "cancel" in message and message["cancel"] in self._keys[session]:
                    self._keys[session].discard(message["cancel"])
                    self.engine_thread.cancel((session, message["cancel"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, TimeoutError, RecursionError):
            pass  # not one of ours, or gone
        finally:
            if beat:
                beat.cancel()
            self._writers.pop(session, None)
            for key in self._keys.pop(session, ()):
                self.engine_thread.cancel((session, key))
            writer.close()

    async def _beat(self, session: int) -> None:
        assert self.engine_thread is not None
        while self.engine_thread.failed is None:
            self._tell(session, {"beat": 1})
            await asyncio.sleep(HEARTBEAT_S)
        self._writers[session].close()  # its requests go on elsewhere


# The api's end


class RequestStream:
    """A connection to one trunk. Raises ConnectionLost once it is gone."""

    def __init__(self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.address = address
        self.lost = False
        self._reader, self._writer = reader, writer
        self._answers: dict[int, asyncio.Queue[Increment | Rejected | ConnectionLost]] = {}
        self._number = 0
        self._task = asyncio.create_task(self._listen())

    @classmethod
    async def connect(cls, address: Address, digest: str, timeout: float, secret: bytes = NO_SECRET) -> RequestStream:
        """Raises ConnectionLost."""
        writer = None
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_connection(*address, limit=LINE_LIMIT)
                writer.write(_line({"raymoe": VERSION, "secret": secret.hex(), "digest": digest}))
                answer = json.loads(await reader.readline() or b"{}")
            if answer.get("raymoe") == VERSION:
                return cls(address, reader, writer)
            reason = f"refused: {answer.get('error', 'no answer')}"
        except (OSError, ValueError, AttributeError, TimeoutError, RecursionError) as error:
            reason = f"cannot be reached: {type(error).__name__}: {error}"
        if writer is not None:
            writer.transport.abort()
        raise ConnectionLost(f"{address[0]}:{address[1]} {reason}")

    @property
    def active(self) -> int:
        """Requests that it answers now."""
        return len(self._answers)

    def close(self) -> None:
        self._task.cancel()
        self._end("it was closed")

    async def ask(self, request: Request) -> AsyncGenerator[Increment, None]:
        """The answer as it comes. Raises QueueFull or ValueError before its first part, ConnectionLost at any time.

        Leaving the iteration early ends the request.
        """
        if self.lost:
            raise ConnectionLost("it was lost")
        self._number += 1
        key, over = self._number, False
        answer = self._answers[key] = asyncio.Queue()
        try:
            self._writer.write(_line({"submit": key, "request": asdict(request)}))
            while not over:
                what = await answer.get()
                if isinstance(what, ConnectionLost):
                    over = True
                    raise what
                if isinstance(what, Rejected):
                    over = True
                    raise QueueFull(what.reason) if what.full else ValueError(what.reason)
                over = what.finish is not None
                yield what
        finally:
            del self._answers[key]
            if not over and not self.lost:
                self._writer.write(_line({"cancel": key}))

    async def _listen(self) -> None:
        reason = "it closed the connection"
        try:
            while line := await asyncio.wait_for(self._reader.readline(), HEARTBEAT_TIMEOUT_S):
                self._take(json.loads(line))
        except TimeoutError:
            reason = f"it was silent for {HEARTBEAT_TIMEOUT_S:g} s"
        except Exception as error:  # gone, or nothing that a trunk says
            reason = f"{type(error).__name__}: {error}"
        self._end(reason)

    def _take(self, message: dict[str, Any]) -> None:
        for value in message.get("given", ()):
            if answer := self._answers.get(value[0]):
                answer.put_nowait(decode_increment(value))
        if "refused" in message and (answer := self._answers.get(message["refused"])):
            answer.put_nowait(Rejected(message["full"], message["reason"]))

    def _end(self, reason: str) -> None:
        self.lost = True
        self._writer.transport.abort()
        for answer in self._answers.values():
            answer.put_nowait(ConnectionLost(f"{self.address[0]}:{self.address[1]} was lost: {reason}"))
