"""The row transport: raw tensors over persistent TCP connections, from a trunk to the replicas of clusters.

After the handshake the client sends (layer, rows) and receives as many rows, in order. The transport never executes
or unpickles received data, and it allocates memory only for bytes that have arrived.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

from raymoe.serving.transport.handshake import (
    HANDSHAKE_TIMEOUT_S,
    NO_SECRET,
    Address,
    ConnectionLost,
    HandshakeFailed,
    Identity,
    PendingConnections,
    client_exchange,
    run,
    server_exchange,
)

REQUEST = struct.Struct("<HI")
"""Layer, number of rows."""
REPLY = struct.Struct("<BI")
"""Status, number of rows or bytes of the reason."""
DONE, REFUSED = 0, 1
MAX_ROWS = 1 << 16
"""Rows of a call."""
MAX_REASON = 1000
"""Bytes of a reason."""
READ_BYTES = 1 << 20
"""Bytes that a server allocates before the first of them arrives."""
TIMEVAL = struct.Struct("@ll")
"""Seconds and microseconds in the kernel's format."""

T = TypeVar("T")
Compute = Callable[[int, Tensor], Tensor]
"""(layer, rows x_RD) -> outputs y_RD in the type of the rows. Raises ValueError for an unknown layer."""


def row_identity(digest: bytes, cluster: int, dtype: torch.dtype, kernel: str) -> Identity:
    """Return what determines the bits of a cluster's outputs: both sides of a connection must agree on all of it."""
    return {
        "protocol": "rows",
        "artifact": digest.hex(),
        "cluster": str(cluster),
        "type": str(dtype).removeprefix("torch."),
        "kernel": kernel,
    }


def _bytes(rows_RD: Tensor) -> memoryview:
    return rows_RD.contiguous().view(torch.uint8).numpy().data.cast("B")


class RowConnection:
    """The client's end: `send` a call, then `receive` its outputs.

    `width`: columns of the rows. `timeout`: seconds for the handshake, and for each `send` and `receive`. Every
    method, the constructor included, raises ConnectionLost; the connection is then closed.
    """

    def __init__(
        self,
        address: Address,
        identity: Identity,
        width: int,
        dtype: torch.dtype,
        timeout: float,
        secret: bytes = NO_SECRET,
    ) -> None:
        self.address, self.width, self.dtype, self._timeout = address, width, dtype, timeout
        started = time.monotonic()
        try:
            self._socket = socket.create_connection(address, timeout)
        except OSError as error:
            raise ConnectionLost(f"{address[0]}:{address[1]} cannot be reached: {error}") from None
        left = timeout - (time.monotonic() - started)
        self._do(run, client_exchange(secret, address[1], identity), self._socket, left)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(None)  # the kernel's timeouts: Python's cost two more system calls each
        self._set_timeout(socket.SO_SNDTIMEO, timeout)
        self._set_timeout(socket.SO_RCVTIMEO, timeout)
        self._receive_timeout = timeout
        self._sent = 0

    def close(self) -> None:
        self._socket.close()

    def _set_timeout(self, option: int, seconds: float) -> None:
        value = TIMEVAL.pack(*divmod(max(1, round(1e6 * seconds)), 1_000_000))  # 0 would disable the timeout
        self._do(self._socket.setsockopt, socket.SOL_SOCKET, option, value)

    def _do(self, work: Callable[..., T], *arguments: object) -> T:
        try:
            return work(*arguments)
        except HandshakeFailed as error:
            raise self._lost(str(error)) from None
        except BlockingIOError:
            raise self._lost("TimeoutError: timed out") from None
        except OSError as error:
            raise self._lost(f"{type(error).__name__}: {error}") from None

    def _lost(self, reason: str) -> ConnectionLost:
        self.close()
        return ConnectionLost(f"{self.address[0]}:{self.address[1]} was lost: {reason}")

    def send(self, layer: int, rows_RD: Tensor) -> None:
        """Request the outputs of rows."""
        self._sent = rows_RD.shape[0]
        frame = b"".join((REQUEST.pack(layer, self._sent), _bytes(rows_RD)))
        if self._do(self._socket.send, frame) < len(frame):  # a blocking call is only short after its timeout
            raise self._lost("TimeoutError: timed out")

    def receive(self, timeout: float | None = None) -> Tensor:
        """Return the outputs y_RD of the rows that were sent.

        `timeout` in seconds, at least a tenth of the connection's, which is the default. A change by less than a
        tenth of the connection's timeout is ignored: it would cost a system call.
        """
        timeout = self._timeout if timeout is None else max(timeout, self._timeout / 10)  # others may have hung before
        if abs(timeout - self._receive_timeout) > self._timeout / 10:
            self._set_timeout(socket.SO_RCVTIMEO, timeout)
            self._receive_timeout = timeout
        header, y_RD = bytearray(REPLY.size), torch.empty((self._sent, self.width), dtype=self.dtype)
        body = _bytes(y_RD)
        got = self._do(self._socket.recvmsg_into, [header, body], 0, socket.MSG_WAITALL)[0]
        if got < len(header):
            raise self._lost("it closed the connection, or timed out")
        status, n = REPLY.unpack(header)
        if status != DONE:
            reason = bytes(body[: got - len(header)])
            while len(reason) < min(n, MAX_REASON) and (more := self._do(self._socket.recv, MAX_REASON)):
                reason += more
            raise self._lost(f"it refused: {reason.decode(errors='replace')}")
        if n != self._sent:
            raise self._lost(f"it returned {n} rows for {self._sent}")
        if got < len(header) + len(body):
            raise self._lost("it closed the connection or timed out in the middle of the outputs")
        return y_RD


class RowServer:
    """The cluster's end: serves each connection from its own thread, and runs `compute` one call at a time.

    `address`: the host to bind and a port, 0 for a free one. `secret`: the application's, 32 bytes.
    `handshake_timeout_s`: seconds for a client's whole handshake.
    """

    def __init__(
        self,
        compute: Compute,
        identity: Identity,
        width: int,
        dtype: torch.dtype,
        address: Address,
        secret: bytes = NO_SECRET,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
    ) -> None:
        self.compute, self.identity, self.width, self.dtype = compute, identity, width, dtype
        self._secret, self._handshake_timeout_s = secret, handshake_timeout_s
        self._listener = socket.create_server(address, backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._pending = PendingConnections()
        self._closed = False
        threading.Thread(target=self._accept, name="row-server", daemon=True).start()

    def close(self) -> None:
        """Stop serving. Calls in flight are cut; their clients use another process."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in tuple(self._open):
            _shut(connection)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed, or out of file descriptors, which may pass
                time.sleep(0.1)
                continue
            self._open.add(connection)
            self._pending.add(connection, lambda connection=connection: _shut(connection))
            threading.Thread(target=self._serve, args=(connection,), name="row-server", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a trunk's machine may fail
            run(server_exchange(self._secret, self.port, self.identity), connection, self._handshake_timeout_s)
            self._pending.remove(connection)
            connection.settimeout(None)
            with torch.inference_mode():
                while self._serve_call(connection):
                    pass
        except (OSError, HandshakeFailed):
            pass  # the client is gone, or is not of this application
        finally:
            self._pending.remove(connection)
            self._open.discard(connection)
            connection.close()

    def _serve_call(self, connection: socket.socket) -> bool:
        """Serve one call. Return False when the connection has ended."""
        first = connection.recv(REQUEST.size)
        if not first:
            return False
        layer, n = REQUEST.unpack(first + read_exactly(connection, REQUEST.size - len(first)))
        if not 0 < n <= MAX_ROWS:
            self._refuse(connection, f"{n} rows: 1 to {MAX_ROWS}")
            return False
        buffer = read_exactly(connection, n * self.width * self.dtype.itemsize)
        x_RD = torch.frombuffer(buffer, dtype=self.dtype).view(n, self.width)
        try:
            with self._lock:
                y_RD = self.compute(layer, x_RD)
        except Exception as error:  # the client computes the rows elsewhere and logs the reason
            self._refuse(connection, f"{type(error).__name__}: {error}")
            return False
        connection.sendall(b"".join((REPLY.pack(DONE, n), _bytes(y_RD))))
        return True

    @staticmethod
    def _refuse(connection: socket.socket, reason: str) -> None:
        text = reason.encode()[:MAX_REASON]
        connection.sendall(REPLY.pack(REFUSED, len(text)) + text)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def read_exactly(connection: socket.socket, n: int) -> bytearray:
    """Read n bytes. The buffer starts at `READ_BYTES` and doubles as bytes arrive: an announcement costs no memory.

    Raises ConnectionResetError when the connection ends before.
    """
    buffer, filled = bytearray(min(n, READ_BYTES)), 0
    while filled < n:
        if filled == len(buffer):
            buffer += bytes(min(len(buffer), n - len(buffer)))
        with memoryview(buffer) as view:
            got = connection.recv_into(view[filled:])
        if not got:
            raise ConnectionResetError("the connection closed in the middle of a frame")
        filled += got
    return buffer
