"""The row transport: exact rows, refusals, hostile clients and bounded memory."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack, closing

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raymoe.serving.transport.handshake import MAX_PENDING, NO_SECRET, ConnectionLost, client_exchange, run
from raymoe.serving.transport.rows import REQUEST, Compute, RowConnection, RowServer, row_identity
from tests.support.waiting import until

DIGEST = bytes(range(32))
LOOPBACK = ("127.0.0.1", 0)


def identity(
    digest: bytes = DIGEST, c: int = 1, dtype: torch.dtype = torch.float32, kernel: str = "k"
) -> dict[str, str]:
    return dict(row_identity(digest, c, dtype, kernel))


def echo(layer: int, x_RD: Tensor) -> Tensor:
    return x_RD


def server(
    compute: Compute = echo, dtype: torch.dtype = torch.float32, width: int = 8, secret: bytes = NO_SECRET,
    handshake_timeout_s: float = 5.0,
) -> RowServer:  # fmt: skip
    return RowServer(compute, identity(dtype=dtype), width, dtype, LOOPBACK, secret, handshake_timeout_s)


def connect(to: RowServer, theirs: dict[str, str] | None = None, secret: bytes = NO_SECRET) -> RowConnection:
    own = theirs or identity(dtype=to.dtype)
    return RowConnection(("127.0.0.1", to.port), own, to.width, to.dtype, 5.0, secret)


def works(to: RowServer) -> bool:
    with closing(connect(to)) as connection:
        connection.send(0, torch.ones(2, to.width))
        return torch.equal(connection.receive(), torch.ones(2, to.width))


def test_rows_cross_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with closing(server(lambda layer, x_RD: x_RD + layer, dtype)) as to, closing(connect(to)) as connection:
            for n in (1, 3, 1000):
                x_RD = torch.randn(n, 8).to(dtype)
                connection.send(2, x_RD)
                assert torch.equal(connection.receive(), x_RD + 2)


def test_rows_above_the_first_buffer_cross_bit_for_bit() -> None:
    with closing(server(width=512)) as to, closing(connect(to)) as connection:
        x_RD = torch.randn(3001, 512)  # 6 MB
        connection.send(0, x_RD)
        assert torch.equal(connection.receive(), x_RD)


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (identity(bytes(32)), "its artifact is 000102.*, not 000000"),
        (identity(c=0), "its cluster is 1, not 0"),
        (identity(dtype=torch.bfloat16), "its type is float32, not bfloat16"),
        (identity(kernel="other"), "its kernel is k, not other"),
    ],
)
def test_what_would_change_the_outputs_is_refused(theirs: dict[str, str], reason: str) -> None:
    with closing(server()) as to, pytest.raises(ConnectionLost, match=reason):
        connect(to, theirs)


def test_a_client_without_the_secret_is_refused() -> None:
    secret = bytes(range(1, 33))
    with closing(server(secret=secret)) as to:
        for wrong in (NO_SECRET, secret[::-1]):
            with pytest.raises(ConnectionLost, match="it belongs to another application$"):
                connect(to, secret=wrong)
        with closing(connect(to, secret=secret)) as connection:
            connection.send(0, torch.ones(2, 8))
            assert torch.equal(connection.receive(), torch.ones(2, 8))


def test_an_exception_in_a_call_is_reported_and_the_server_continues() -> None:
    def compute(layer: int, x_RD: Tensor) -> Tensor:
        if layer:
            raise ValueError(f"there is no layer {layer}")
        return x_RD

    with closing(server(compute)) as to:
        with closing(connect(to)) as connection:
            connection.send(1, torch.ones(1, 8))
            with pytest.raises(ConnectionLost, match="there is no layer 1"):
                connection.receive()
        assert works(to)


def authenticated(to: RowServer) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", to.port), 5.0)
    run(client_exchange(NO_SECRET, to.port, identity()), connection)
    return connection


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=60), st.booleans(), st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1))
def test_invalid_bytes_end_only_their_own_connection(garbage: bytes, known: bool, layer: int, n: int) -> None:
    with closing(server()) as to:
        if known:
            with authenticated(to) as hostile:
                hostile.sendall(REQUEST.pack(layer, n) + garbage)
        else:
            with socket.create_connection(("127.0.0.1", to.port), 5.0) as hostile:
                hostile.sendall(garbage)
        assert works(to)


def test_a_frame_that_is_too_large_is_refused() -> None:
    with closing(server()) as to, closing(connect(to)) as connection:
        connection._socket.sendall(REQUEST.pack(0, 1 << 17))
        connection._sent = 1 << 17
        with pytest.raises(ConnectionLost, match="131072 rows"):
            connection.receive()


def test_announced_rows_take_no_memory_until_they_arrive() -> None:
    """20 headers announce 256 MB each, and 100 bytes of them arrive."""
    process = psutil.Process()
    with closing(server(width=1024)) as to, ExitStack() as stack:
        before = process.memory_info().rss
        for _ in range(20):
            hostile = stack.enter_context(authenticated(to))
            hostile.sendall(REQUEST.pack(0, 1 << 16) + bytes(100))
        with closing(connect(to)) as connection:  # its rows follow theirs, so theirs were read
            connection.send(0, torch.ones(2, 1024))
            connection.receive()
        assert process.memory_info().rss - before < 100 << 20


def test_silent_connections_do_not_lock_others_out() -> None:
    """More connections than may be pending send nothing; the oldest are closed for those that come."""
    with closing(server(handshake_timeout_s=60)) as to, ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", to.port), 5.0)) for _ in range(MAX_PENDING + 20)
        ]
        assert works(to)
        assert silent[0].recv(1) == b""
        until(lambda: len(to._open) <= MAX_PENDING)


def test_a_connection_that_does_not_complete_the_handshake_is_closed() -> None:
    with (
        closing(server(handshake_timeout_s=0.1)) as to,
        socket.create_connection(("127.0.0.1", to.port), 5.0) as silent,
    ):
        assert silent.recv(1) == b""


def test_a_server_continues_after_it_could_not_accept() -> None:
    with closing(server()) as to:
        accept, failed = to._listener.accept, threading.Event()

        def fail() -> tuple[socket.socket, object]:
            if not failed.is_set():
                failed.set()
                raise OSError(24, "Too many open files")
            return accept()

        listener = type("Listener", (), {"accept": staticmethod(fail), "__getattr__": lambda self, n: getattr(of, n)})
        of, to._listener = to._listener, listener()
        for _ in range(2):  # the call that already waits accepts the first one
            connect(to).close()
        assert failed.is_set()
