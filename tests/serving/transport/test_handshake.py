"""The handshake of both transports: mutual proof of the secret, one deadline, bounded resources."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.serving.transport.handshake import (
    CHALLENGE,
    HELLO,
    LENGTH,
    MAGIC,
    MAX_JSON_BYTES,
    NONCE_BYTES,
    RESPONSE,
    Exchange,
    HandshakeFailed,
    Identity,
    PendingConnections,
    client_exchange,
    proof,
    run,
    run_async,
    server_exchange,
)

SECRET, OTHER = bytes(range(32)), bytes(range(1, 33))
IDENTITY = {"protocol": "rows", "cluster": "1", "kernel": "native-1"}


def together(client: Exchange, server: Exchange) -> tuple[Identity, Identity, list[bytes]]:
    """Run both sides without a socket. Return what each learned of its peer, and all bytes that crossed."""
    crossed: list[bytes] = []
    results: dict[str, Identity] = {}
    buffers = {"client": b"", "server": b""}
    sides = {"client": client, "server": server}
    wants: dict[str, int | None] = {"client": None, "server": None}
    while len(results) < 2:
        for name, side in sides.items():
            peer = "server" if name == "client" else "client"
            while name not in results and (wants[name] is None or len(buffers[name]) >= (wants[name] or 0)):
                size = wants[name]
                received = None if size is None else buffers[name][:size]
                buffers[name] = buffers[name][size or 0 :]
                try:
                    data, wants[name] = side.send(received)  # type: ignore[arg-type]
                    buffers[peer] += data
                    crossed.append(data)
                except StopIteration as done:
                    results[name] = done.value
    return results["client"], results["server"], crossed


def test_both_sides_learn_who_the_other_is_and_the_secret_does_not_cross() -> None:
    wanted = {"protocol": "rows", "cluster": "1"}
    theirs, ours, crossed = together(client_exchange(SECRET, 80, wanted), server_exchange(SECRET, 80, IDENTITY))
    assert theirs == IDENTITY and ours == wanted
    everything = b"".join(crossed)
    assert SECRET not in everything and SECRET.hex().encode() not in everything
    again = together(client_exchange(SECRET, 80, wanted), server_exchange(SECRET, 80, IDENTITY))[2]
    assert not {part[8:] for part in crossed if len(part) > 64} & {part[8:] for part in again}  # nothing repeats


@pytest.mark.parametrize(("client", "server", "port"), [(SECRET, OTHER, 80), (OTHER, SECRET, 80), (SECRET, SECRET, 81)])
def test_a_client_sends_no_identity_to_a_server_without_proof(client: bytes, server: bytes, port: int) -> None:
    """A server on a reused port learns a random number; one that forwards it elsewhere fails too (another port)."""
    crossed: list[bytes] = []
    asking, serving = client_exchange(client, 80, IDENTITY), server_exchange(server, port, IDENTITY)
    hello, _ = next(asking)
    next(serving)
    challenge, _ = serving.send(hello)
    with pytest.raises(HandshakeFailed, match="another application"):
        crossed.append(asking.send(challenge)[0])
    assert crossed == [] and hello[:8] == MAGIC and len(hello) == HELLO.size


def test_a_server_reveals_nothing_to_a_client_without_proof() -> None:
    serving = server_exchange(SECRET, 80, IDENTITY)
    next(serving)
    nonce = bytes(NONCE_BYTES)
    challenge, size = serving.send(HELLO.pack(MAGIC, nonce))
    server_nonce, server_proof = CHALLENGE.unpack(challenge)[1:]
    content = json.dumps(IDENTITY).encode()
    # The server's own proof does not serve as the client's.
    assert server_proof != proof(SECRET, "client", nonce, server_nonce, 80)
    assert serving.send(RESPONSE.pack(server_proof, len(content))) == (b"", len(content)) and size == RESPONSE.size
    with pytest.raises(HandshakeFailed, match="another application") as caught:
        serving.send(content)
    assert caught.value.reply == b""


def test_a_proof_covers_the_identity() -> None:
    serving, asking = server_exchange(SECRET, 80, IDENTITY), client_exchange(SECRET, 80, {"cluster": "1"})
    next(serving)
    response, _ = asking.send(serving.send(next(asking)[0])[0])
    serving.send(response[: RESPONSE.size])
    with pytest.raises(HandshakeFailed, match="another application"):
        serving.send(response[RESPONSE.size :].replace(b"1", b"2"))


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"protocol": "requests"}, "its protocol is rows, not requests"),
        ({"cluster": "0", "kernel": "native-1"}, "its cluster is 1, not 0"),
        ({"kernel": "torch-2"}, "its kernel is native-1, not torch-2"),
        ({"type": "float32"}, "its type is undefined, not float32"),
    ],
)
def test_a_different_identity_is_refused_with_both_values(wanted: dict[str, str], reason: str) -> None:
    with served(lambda connection, port: run(server_exchange(SECRET, port, IDENTITY), connection)) as port:
        with socket.create_connection(("127.0.0.1", port), 5) as connection, pytest.raises(HandshakeFailed) as caught:
            run(client_exchange(SECRET, port, wanted), connection)
        assert reason in str(caught.value)


class served:
    """A server that runs `work` for each connection in a thread. Yields its port."""

    def __init__(self, work: Callable[[socket.socket, int], object]) -> None:
        self.work, self.listener = work, socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]

    def __enter__(self) -> int:
        threading.Thread(target=self.accept, daemon=True).start()
        return self.port

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                with connection, suppress(OSError, HandshakeFailed):
                    self.work(connection, self.port)


def test_asyncio_and_sockets_agree() -> None:
    async def connect(port: int) -> Identity:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        identity = await run_async(client_exchange(SECRET, port, {"cluster": "1"}), reader, writer)
        writer.close()
        return identity

    with served(lambda connection, port: run(server_exchange(SECRET, port, IDENTITY), connection)) as port:
        assert asyncio.run(connect(port)) == IDENTITY


def drip(connection: socket.socket, _: int) -> None:
    """Send a byte at a time, each within any timeout of one read."""
    with suppress(OSError):
        while True:
            connection.sendall(b"r")
            time.sleep(0.02)


def test_one_deadline_covers_the_whole_handshake() -> None:
    with served(drip) as port, socket.create_connection(("127.0.0.1", port), 5) as connection:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            run(client_exchange(SECRET, port, {}), connection, timeout=0.2)
        assert time.monotonic() - started < 2

    async def connect(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with pytest.raises(TimeoutError):
            await run_async(client_exchange(SECRET, port, {}), reader, writer, timeout=0.2)
        writer.close()

    with served(drip) as port:
        asyncio.run(asyncio.wait_for(connect(port), 5))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=100), max_size=4), st.booleans())
def test_arbitrary_bytes_only_fail_the_handshake(parts: list[bytes], server: bool) -> None:
    exchange = server_exchange(SECRET, 80, IDENTITY) if server else client_exchange(SECRET, 80, IDENTITY)
    stream = b"".join(parts) + bytes(2 * MAX_JSON_BYTES)
    with suppress(HandshakeFailed):
        _, wanted = next(exchange)
        while True:
            assert wanted <= MAX_JSON_BYTES
            _, wanted = exchange.send(stream[:wanted])
            stream = stream[wanted:]


@pytest.mark.parametrize("content", [b"[]", b"5", b'{"a": 1}', b"\xff", b"[" * 4000, b"", b"null"])
def test_an_invalid_identity_is_refused(content: bytes) -> None:
    serving = server_exchange(SECRET, 80, IDENTITY)
    next(serving)
    nonce = bytes(NONCE_BYTES)
    server_nonce = CHALLENGE.unpack(serving.send(HELLO.pack(MAGIC, nonce))[0])[1]
    serving.send(RESPONSE.pack(proof(SECRET, "client", nonce, server_nonce, 80, content), len(content)))
    with pytest.raises(HandshakeFailed, match="identity is not"):
        serving.send(content)


def test_a_long_identity_is_refused_before_it_is_read() -> None:
    serving = server_exchange(SECRET, 80, IDENTITY)
    next(serving)
    serving.send(HELLO.pack(MAGIC, bytes(NONCE_BYTES)))
    with pytest.raises(HandshakeFailed, match=f"at most {MAX_JSON_BYTES}"):
        serving.send(RESPONSE.pack(bytes(32), MAX_JSON_BYTES + 1))
    assert LENGTH.size == 2


def test_a_new_connection_closes_the_oldest_that_is_pending() -> None:
    closed: list[int] = []
    pending = PendingConnections(limit=2)
    for i in range(3):
        pending.add(i, lambda i=i: closed.append(i))
    assert closed == [0]
    pending.remove(1)  # its handshake is complete
    for i in range(3, 5):
        pending.add(i, lambda i=i: closed.append(i))
    assert closed == [0, 2]
    pending.remove(99)
