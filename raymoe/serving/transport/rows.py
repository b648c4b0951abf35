"""Rows over the wire: raw tensors on persistent TCP connections, the way from a trunk to the clusters' replicas.

A connection opens with a greeting (magic, the application's secret, digest of the artifact, cluster, compute type),
which the server accepts or refuses with a reason: an address may have become another's. Without the secret it says
nothing of what it computes. Then the client sends (layer, rows) and gets as many
rows back, in order. Nothing that arrives is ever run or unpickled, and no frame is larger than the limit.
"""

from __future__ import annotations

import hmac
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

MAGIC = b"raymoe 2"
GREETING = struct.Struct("<8s32s32sI8s")
"""Magic, secret, digest, cluster, compute type."""
NO_SECRET = bytes(32)
"""Of processes that are not an application's."""
REQUEST = struct.Struct("<HI")
"""Layer, number of rows."""
REPLY = struct.Struct("<BI")
"""Status, number of rows or bytes of the reason."""
DONE, REFUSED = 0, 1
MAX_ROWS = 1 << 16
MAX_REASON = 1000
"""Bytes of a reason."""
TIMEVAL = struct.Struct("@ll")
"""How the kernel is told seconds and microseconds."""

T = TypeVar("T")
Address = tuple[str, int]
Compute = Callable[[int, Tensor], Tensor]
"""(layer, rows [R, D]) -> answers [R, D] in the rows' type. Raises ValueError for a layer that is not there."""


class ConnectionLost(ConnectionError):
    """The other side is gone, silent for too long, or refuses: ask another."""


def type_name(dtype: torch.dtype) -> bytes:
    return str(dtype).removeprefix("torch.").encode()


def _bytes(rows: Tensor) -> memoryview:
    return rows.contiguous().view(torch.uint8).numpy().data.cast("B")


class RowConnection:
    """The client's end: `send` a call, do something else, `receive` its answer; or lose the connection.

    Raises ConnectionLost, also from the constructor, and is then closed. `timeout` in seconds, of each of them.
    """

    def __init__(
        self,
        address: Address,
        digest: bytes,
        cluster: int,
        width: int,
        dtype: torch.dtype,
        timeout: float,
        secret: bytes = NO_SECRET,
    ) -> None:
        self.address, self.width, self.dtype, self._timeout = address, width, dtype, timeout
        try:
            self._socket = socket.create_connection(address, timeout)
        except OSError as error:
            raise ConnectionLost(f"{address[0]}:{address[1]} cannot be reached: {error}") from None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(None)  # the kernel's timeouts instead of Python's, which cost two more system calls
        self._set(socket.SO_SNDTIMEO, timeout)
        self._set(socket.SO_RCVTIMEO, timeout)
        self._patience = timeout
        self._sent = 0
        self._do(self._socket.sendall, GREETING.pack(MAGIC, secret, digest, cluster, type_name(dtype)))
        self.receive()

    def close(self) -> None:
        self._socket.close()

    def _set(self, which: int, seconds: float) -> None:
        value = TIMEVAL.pack(*divmod(max(1, round(1e6 * seconds)), 1_000_000))  # 0 would be for ever
        self._do(self._socket.setsockopt, socket.SOL_SOCKET, which, value)

    def _do(self, work: Callable[..., T], *arguments: object) -> T:
        try:
            return work(*arguments)
        except BlockingIOError:
            raise self._lost("TimeoutError: timed out") from None
        except OSError as error:
            raise self._lost(f"{type(error).__name__}: {error}") from None

    def _lost(self, reason: str) -> ConnectionLost:
        self.close()
        return ConnectionLost(f"{self.address[0]}:{self.address[1]} was lost: {reason}")

    def send(self, layer: int, rows: Tensor) -> None:
        """Ask for the answers to rows [R, D]."""
        self._sent = rows.shape[0]
        frame = b"".join((REQUEST.pack(layer, self._sent), _bytes(rows)))
        if self._do(self._socket.send, frame) < len(frame):  # a blocking call is only short when its time is over
            raise self._lost("TimeoutError: timed out")

    def receive(self, timeout: float | None = None) -> Tensor:
        """The answers [R, D] to what was sent; within so many seconds, by default as many as for anything else.

        A tenth of the default more or less does not count.
        """
        timeout = self._timeout if timeout is None else max(timeout, self._timeout / 10)  # others may have hung before
        if abs(timeout - self._patience) > self._timeout / 10:
            self._set(socket.SO_RCVTIMEO, timeout)
            self._patience = timeout
        header, answers = bytearray(REPLY.size), torch.empty((self._sent, self.width), dtype=self.dtype)
        body = _bytes(answers) if self._sent else memoryview(b"")
        got = self._do(self._socket.recvmsg_into, [header, body] if body else [header], 0, socket.MSG_WAITALL)[0]
        if got < len(header):
            raise self._lost("it closed the connection, or timed out")
        status, n = REPLY.unpack(header)
        if status != DONE:
            reason = bytes(body[: got - len(header)])
            while len(reason) < min(n, MAX_REASON) and (more := self._do(self._socket.recv, MAX_REASON)):
                reason += more
            raise self._lost(f"it refused: {reason.decode(errors='replace')}")
        if n != self._sent:
            raise self._lost(f"it answered {n} rows to {self._sent}")
        if got < len(header) + len(body):
            raise self._lost("it closed the connection or timed out in the middle of an answer")
        return answers


class RowServer:
    """The clusters' end: answers every connection from a thread of its own, `compute` one call at a time.

    `address`: the host to bind and a port, 0 for a free one. `digest`: of the artifact whose cluster it computes.
    `secret`: 32 bytes that every greeting must hold.
    """

    def __init__(
        self,
        compute: Compute,
        digest: bytes,
        cluster: int,
        width: int,
        dtype: torch.dtype,
        address: Address,
        secret: bytes = NO_SECRET,
    ) -> None:
        self._secret = secret
        self.compute, self.digest, self.cluster, self.width, self.dtype = compute, digest, cluster, width, dtype
        self._listener = socket.create_server(address, backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = False
        threading.Thread(target=self._accept, name="frames", daemon=True).start()

    def close(self) -> None:
        """Stop answering; calls in flight are cut, which their senders notice."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in tuple(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed, or too many files are open: that may pass
                time.sleep(0.1)
                continue
            self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), name="frames", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a trunk's machine may vanish
            connection.settimeout(10)
            if reason := self._greet(connection):
                self._refuse(connection, reason)
                return
            connection.sendall(REPLY.pack(DONE, 0))
            connection.settimeout(None)
            with torch.inference_mode():
                while self._answer(connection):
                    pass
        except OSError:
            pass  # whoever asked is gone, and asks another or computes by itself
        finally:
            self._open.discard(connection)
            connection.close()

    def _greet(self, connection: socket.socket) -> str:
        """What is wrong with the greeting."""
        magic, secret, digest, cluster, dtype = GREETING.unpack(_read(connection, GREETING.size))
        if magic != MAGIC:
            return "this is not how raymoe greets"
        if not hmac.compare_digest(secret, self._secret):
            return "it is of another application"
        if digest != self.digest:
            return f"it computes artifact {self.digest.hex()[:12]}, not {digest.hex()[:12]}"
        if cluster != self.cluster:
            return f"it computes cluster {self.cluster}, not {cluster}"
        if dtype.rstrip(b"\0") != type_name(self.dtype):
            return f"it computes in {type_name(self.dtype).decode()}"
        return ""

    def _answer(self, connection: socket.socket) -> bool:
        """Serve one call; False when the connection is over."""
        first = connection.recv(REQUEST.size)
        if not first:
            return False
        layer, n = REQUEST.unpack(first + _read(connection, REQUEST.size - len(first)))
        if not 0 < n <= MAX_ROWS:
            self._refuse(connection, f"{n} rows: 1 to {MAX_ROWS}")
            return False
        buffer = _read(connection, n * self.width * self.dtype.itemsize)
        rows = torch.frombuffer(buffer, dtype=self.dtype).view(n, self.width)
        try:
            with self._lock:
                answers = self.compute(layer, rows)
        except Exception as error:  # whatever it is, the caller computes elsewhere and says why
            self._refuse(connection, f"{type(error).__name__}: {error}")
            return False
        connection.sendall(b"".join((REPLY.pack(DONE, n), _bytes(answers))))
        return True

    @staticmethod
    def _refuse(connection: socket.socket, reason: str) -> None:
        text = reason.encode()[:MAX_REASON]
        connection.sendall(REPLY.pack(REFUSED, len(text)) + text)


def _read(connection: socket.socket, n: int) -> bytearray:
    buffer = bytearray(n)
    view = memoryview(buffer)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise ConnectionResetError("the connection was closed in the middle of a frame")
        view = view[got:]
    return buffer
