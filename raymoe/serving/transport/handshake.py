"""The handshake that opens every connection between processes of an application: rows and request streams alike.

    client -> server   MAGIC, client nonce
    server -> client   MAGIC, server nonce, server proof
    client -> server   client proof, length, client identity (JSON)
    server -> client   length, verdict (JSON): the server's identity, or the reason of a refusal

A proof is the HMAC-SHA256 of both nonces under the application's secret, so that the secret never crosses the
connection. The proofs of client and server differ, so neither can be replayed as the other. They cover the server's
port: a process that took over a port cannot forward the handshake to a server that listens on another one.
A client sends its identity only to a server that has proved the secret, and a server reveals its identity only to
such a client. Rows and requests are not encrypted afterwards.

`client_exchange` and `server_exchange` describe the protocol without a socket. `run` drives them over a blocking
socket, `run_async` over an asyncio stream.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

Address = tuple[str, int]
Identity = Mapping[str, str]
"""What a process computes: field name -> value. Both sides of a connection must agree on the client's fields."""

MAGIC = b"raymoe 3"
"""Name and version of the handshake and of all messages after it."""
NO_SECRET = bytes(32)
"""Secret of processes outside an application: tests and benchmarks."""
NONCE_BYTES = 32
HELLO = struct.Struct(f"<8s{NONCE_BYTES}s")
CHALLENGE = struct.Struct(f"<8s{NONCE_BYTES}s32s")
RESPONSE = struct.Struct("<32sH")
LENGTH = struct.Struct("<H")
MAX_JSON_BYTES = 4096
"""Size limit of an identity or a verdict."""
HANDSHAKE_TIMEOUT_S = 5.0
"""Seconds within which the whole handshake must complete."""
MAX_PENDING = 64
"""Connections of one server that may be in the handshake at the same time."""

REMEDIES = {"kernel": ": give all nodes the same compiler, and CC with the same -march if their processors differ"}
"""What to do about a field in which client and server differ."""

Exchange = Generator[tuple[bytes, int], bytes, Identity]
"""Yields (bytes to send, number of bytes to read next), receives the bytes read, returns the peer's identity."""


class ConnectionLost(ConnectionError):
    """The other process ended, timed out or refused. The caller uses another process."""


class HandshakeFailed(Exception):
    """`reason`: sent to a peer that has proved the secret. `reply`: the last bytes for the peer, possibly none."""

    def __init__(self, reason: str, reply: bytes = b"") -> None:
        super().__init__(reason)
        self.reply = reply


def proof(
    secret: bytes, role: str, client_nonce: bytes, server_nonce: bytes, port: int, identity: bytes = b""
) -> bytes:
    """Return the HMAC-SHA256 by which `role` ("client" or "server") proves that it has the secret."""
    content = b"".join((role.encode(), struct.pack("<H", port), client_nonce, server_nonce, identity))
    return hmac.digest(secret, MAGIC + content, "sha256")


def client_exchange(secret: bytes, port: int, identity: Identity) -> Exchange:
    """Open a connection to the server at `port`. Raises HandshakeFailed."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    magic, server_nonce, server_proof = CHALLENGE.unpack((yield HELLO.pack(MAGIC, nonce), CHALLENGE.size))
    if magic != MAGIC:
        raise HandshakeFailed("it is not a raymoe server of this version; check the address")
    if not hmac.compare_digest(server_proof, proof(secret, "server", nonce, server_nonce, port)):
        raise HandshakeFailed("it belongs to another application")
    content = json.dumps(dict(identity)).encode()
    own_proof = proof(secret, "client", nonce, server_nonce, port, content)
    (size,) = LENGTH.unpack((yield RESPONSE.pack(own_proof, len(content)) + content, LENGTH.size))
    verdict = _read_json((yield b"", _checked(size)))
    if "refused" in verdict:
        raise HandshakeFailed(f"it refused the connection: {verdict['refused']}")
    return verdict


def server_exchange(
    secret: bytes, port: int, identity: Identity, refusal: Callable[[], str | None] = lambda: None
) -> Exchange:
    """Accept a connection. `refusal`: a reason to refuse an authenticated client now. Raises HandshakeFailed."""
    magic, nonce = HELLO.unpack((yield b"", HELLO.size))
    if magic != MAGIC:
        raise HandshakeFailed("the client is not a raymoe process of this version")
    server_nonce = secrets.token_bytes(NONCE_BYTES)
    challenge = CHALLENGE.pack(MAGIC, server_nonce, proof(secret, "server", nonce, server_nonce, port))
    client_proof, size = RESPONSE.unpack((yield challenge, RESPONSE.size))
    content = yield b"", _checked(size)
    if not hmac.compare_digest(client_proof, proof(secret, "client", nonce, server_nonce, port, content)):
        raise HandshakeFailed("the client belongs to another application")
    theirs = _read_json(content)
    reason = refusal() or mismatch(identity, theirs)
    if reason:
        raise HandshakeFailed(reason, _framed({"refused": reason}))
    yield _framed(dict(identity)), 0
    return theirs


def mismatch(server: Identity, client: Identity) -> str | None:
    """Return the first field in which the client differs, as a reason for it."""
    for name, value in client.items():
        if server.get(name) != value:
            return f"its {name} is {_brief(server.get(name))}, not {_brief(value)}{REMEDIES.get(name, '')}"
    return None


def _brief(value: str | None) -> str:
    return "undefined" if value is None else value[:64]


def _checked(size: int) -> int:
    if size > MAX_JSON_BYTES:
        raise HandshakeFailed(f"{size} bytes of identity: at most {MAX_JSON_BYTES}")
    return size


def _framed(value: dict[str, str]) -> bytes:
    content = json.dumps(value).encode()
    return LENGTH.pack(len(content)) + content


def _read_json(content: bytes) -> dict[str, str]:
    try:
        value: Any = json.loads(content)
    except (ValueError, RecursionError):
        raise HandshakeFailed("its identity is not JSON") from None
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise HandshakeFailed("its identity is not a JSON object of strings")
    return value


# Drivers


def run(exchange: Exchange, connection: socket.socket, timeout: float = HANDSHAKE_TIMEOUT_S) -> Identity:
    """Drive an exchange over a blocking socket. `timeout`: seconds for all of it.

    Raises HandshakeFailed, and OSError (TimeoutError included).
    """
    deadline = time.monotonic() + timeout
    received: Any = None
    while True:
        try:
            data, wanted = exchange.send(received)
        except StopIteration as done:
            return done.value
        except HandshakeFailed as error:
            if error.reply:
                _before(connection, deadline)
                connection.sendall(error.reply)
            raise
        if data:
            _before(connection, deadline)
            connection.sendall(data)
        received = b""
        while len(received) < wanted:
            _before(connection, deadline)
            if not (part := connection.recv(wanted - len(received))):
                raise ConnectionResetError("the connection closed during the handshake")
            received += part


def _before(connection: socket.socket, deadline: float) -> None:
    """Limit the socket's next operation to what is left until the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the handshake timed out")
    connection.settimeout(left)


async def run_async(
    exchange: Exchange,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    timeout: float = HANDSHAKE_TIMEOUT_S,
) -> Identity:
    """Drive an exchange over an asyncio stream; see `run`."""
    async with asyncio.timeout(timeout):
        received: Any = None
        while True:
            try:
                data, wanted = exchange.send(received)
            except StopIteration as done:
                return done.value
            except HandshakeFailed as error:
                writer.write(error.reply)
                raise
            writer.write(data)
            try:
                received = await reader.readexactly(wanted)
            except asyncio.IncompleteReadError:
                raise ConnectionResetError("the connection closed during the handshake") from None


class PendingConnections:
    """Connections of a server that are in the handshake: at most `limit`. A new one closes the oldest.

    So clients that connect and send nothing cannot keep others out, nor take more than `limit` sockets.
    """

    def __init__(self, limit: int = MAX_PENDING) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._close: dict[object, Callable[[], object]] = {}

    def add(self, connection: object, close: Callable[[], object]) -> None:
        with self._lock:
            oldest = next(iter(self._close)) if len(self._close) >= self._limit else None
            evict = None if oldest is None else self._close.pop(oldest)
            self._close[connection] = close
        if evict:
            evict()

    def remove(self, connection: object) -> None:
        with self._lock:
            self._close.pop(connection, None)
