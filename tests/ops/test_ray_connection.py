"""The Ray that a command uses: found, refused within seconds, or started."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from http.server import HTTPServer, SimpleHTTPRequestHandler

import grpc
import pytest

from raymoe.ops import ray_connection
from raymoe.ops.ray_connection import RayConnection, RayTarget, connect, find_ray, gcs_address


@pytest.fixture
def gcs() -> Iterator[str]:
    """The address of a gRPC server."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is bound and refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.mark.parametrize("text", ["10.0.0.1:6379", "localhost:6379", "[::1]:6379", "head.example.com:6379"])
def test_a_gcs_address_is_accepted(text: str) -> None:
    assert gcs_address(text) == text


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("http://127.0.0.1:8265", "RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 ray job submit"),
        ("https://head:8265", "dashboard"),
        ("ray://head:10001", "HOST:PORT"),
        ("localhost", "HOST:PORT"),
        (":6379", "HOST:PORT"),
        ("head:", "HOST:PORT"),
        ("head:port", "HOST:PORT"),
        ("head:99999", "HOST:PORT"),
        ("head:6379/path", "HOST:PORT"),
        ("[::1:6379", "HOST:PORT"),
    ],
)
def test_an_address_of_another_kind_is_refused_with_the_remedy(text: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=r"RAY_ADDRESS=") as caught:
        find_ray({"RAY_ADDRESS": text})
    assert remedy in str(caught.value) and text in str(caught.value)


def test_an_address_where_nothing_listens_is_refused_within_seconds(closed_port: int) -> None:
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"no Ray listens at RAY_ADDRESS=127.0.0.1:{closed_port} .*unset"):
        find_ray({"RAY_ADDRESS": f"127.0.0.1:{closed_port}"})
    assert time.monotonic() - started < 10


def test_a_server_that_is_no_gcs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_connection, "GRPC_TIMEOUT_S", 0.5)
    server = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ConnectionError, match="not a Ray GCS"):
            find_ray({"RAY_ADDRESS": f"127.0.0.1:{server.server_port}"})
    finally:
        server.shutdown()
        server.server_close()


def test_a_proxy_of_the_environment_is_not_used(gcs: str, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray connects directly, too."""
    monkeypatch.setattr(ray_connection, "GRPC_TIMEOUT_S", 3.0)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for name in ("grpc_proxy", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port}")
    assert find_ray({"RAY_ADDRESS": gcs}).address == gcs


def test_the_address_and_its_source_are_shown(gcs: str) -> None:
    target = find_ray({"RAY_ADDRESS": f" {gcs} "})
    assert target == RayTarget(gcs, "RAY_ADDRESS")
    assert f"joining {gcs} (RAY_ADDRESS); RAY_ADDRESS=local starts" in str(target)
    assert str(RayConnection(target, "alice", 2, 8.0, 0.0)) == f"{gcs}: 2 nodes, 8 CPUs, 0 GPUs, started by user alice"


def test_a_ray_on_this_machine_is_found_and_the_record_of_an_ended_one_is_not(
    gcs: str, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = "raymoe.ops.ray_internals.discover_address"
    monkeypatch.setattr(where, lambda: gcs)
    assert find_ray({}) == find_ray({"RAY_ADDRESS": "auto"}) == RayTarget(gcs, "running on this machine")
    assert find_ray({"RAY_ADDRESS": "local"}) == RayTarget("")
    monkeypatch.setattr(where, lambda: f"127.0.0.1:{closed_port}")
    assert find_ray({}) == RayTarget("") and "local one starts" in str(find_ray({}))
    monkeypatch.setattr(where, lambda: "")
    assert find_ray({}) == RayTarget("")


def test_a_ray_that_does_not_start_in_time_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray raises it

    monkeypatch.setattr(ray_connection.ray, "init", init)
    with pytest.raises(ConnectionError, match=r"Ray did not start: The current node timed out during startup\."):
        connect(RayTarget(""), 1)


def test_a_local_ray_ignores_the_hangup_of_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    during = []

    def init(*_: object, **__: object) -> None:
        during.append(signal.getsignal(signal.SIGHUP))
        raise RuntimeError("Version mismatch:\n  ray 1")

    monkeypatch.setattr(ray_connection.ray, "init", init)
    before = signal.getsignal(signal.SIGHUP)
    with pytest.raises(ConnectionError, match="did not start: Version mismatch: ray 1"):
        connect(RayTarget(""), 1)
    with pytest.raises(ConnectionError, match=r"Ray at 10\.0\.0\.1:6379 refused the connection: Version mismatch"):
        connect(RayTarget("10.0.0.1:6379", "RAY_ADDRESS"), 1)
    assert during == [signal.SIG_IGN, before] and signal.getsignal(signal.SIGHUP) == before
