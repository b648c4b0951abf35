"""Clusters at replicas: the same answers as in this process, whatever happens on the way."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raymoe.serving.cluster_pool import ClusterPool, ClusterPoolSettings
from raymoe.serving.engine.cluster import Cluster, LocalClusters
from raymoe.serving.transport.rows import (
    GREETING,
    MAGIC,
    NO_SECRET,
    REPLY,
    REQUEST,
    Address,
    ConnectionLost,
    RowConnection,
    RowServer,
    type_name,
)
from raymoe.storage.artifact import Artifact
from tests.support.served import MODEL, artifact
from tests.support.waiting import until

DIGEST = bytes(range(32))
LOOPBACK = ("127.0.0.1", 0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifact(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def local(served: Artifact) -> LocalClusters:
    return LocalClusters(served, range(MODEL.n_clusters), torch.float32)


class Replica:
    """A cluster's replica in this process, which can be told to misbehave."""

    def __init__(self, artifact: Artifact, c: int, digest: bytes | None = None) -> None:
        tensors = artifact.cluster(c)
        self.layers = [Cluster(MODEL, tensors, i, c, torch.float32) for i in range(MODEL.layers)]
        self.go = threading.Event()
        self.go.set()
        self.calls = 0
        self.fail = False
        self.server = RowServer(self.compute, digest or artifact.digest, c, MODEL.d_model, torch.float32, LOOPBACK)
        self.address: Address = ("127.0.0.1", self.server.port)

    def compute(self, layer: int, rows: Tensor) -> Tensor:
        self.go.wait()
        self.calls += 1
        if self.fail:
            raise ValueError("told to")
        with torch.inference_mode():
            return self.layers[layer](rows)

    def close(self) -> None:
        self.go.set()
        self.server.close()


@pytest.fixture
def replicas(served: Artifact) -> Iterator[list[Replica]]:
    """Two of each cluster."""
    made = [Replica(served, c) for c in range(MODEL.n_clusters) for _ in range(2)]
    yield made
    for replica in made:
        replica.close()


def addresses(replicas: list[Replica]) -> dict[int, list[Address]]:
    return {c: [r.address for r in replicas[2 * c : 2 * c + 2]] for c in range(MODEL.n_clusters)}


def connected(pool: ClusterPool, replicas: list[Replica]) -> ClusterPool:
    pool.update(addresses(replicas))
    until(lambda: all(pool.replicas.count(c) == 2 for c in range(MODEL.n_clusters)))
    return pool


def rows(seed: int, sizes: dict[int, int]) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {c: torch.randn(n, MODEL.d_model, generator=generator) for c, n in sizes.items() if n}


def same(pool: ClusterPool, local: LocalClusters, asked: dict[int, Tensor]) -> None:
    with torch.inference_mode():
        for layer in range(MODEL.layers):
            answers, expected = pool(layer, asked), local(layer, asked)
            assert answers.keys() == expected.keys()
            for c in expected:
                assert torch.equal(answers[c], expected[c])


# Frames


def test_rows_go_there_and_back_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with (
            closing(RowServer(lambda layer, x: x + layer, DIGEST, 1, 8, dtype, LOOPBACK)) as server,
            closing(RowConnection(("127.0.0.1", server.port), DIGEST, 1, 8, dtype, 5.0)) as connection,
        ):
            for n in (1, 3, 1000):
                x = torch.randn(n, 8).to(dtype)
                connection.send(2, x)
                assert torch.equal(connection.receive(), x + 2)


@pytest.mark.parametrize(
    ("digest", "cluster", "dtype", "reason"),
    [
        (bytes(32), 1, torch.float32, "computes artifact 000102"),
        (DIGEST, 0, torch.float32, "computes cluster 1, not 0"),
        (DIGEST, 1, torch.bfloat16, "computes in float32"),
    ],
)
def test_another_artifact_cluster_or_type_is_refused(
    digest: bytes, cluster: int, dtype: torch.dtype, reason: str
) -> None:
    with (
        closing(RowServer(lambda layer, x: x, DIGEST, 1, 8, torch.float32, LOOPBACK)) as server,
        pytest.raises(ConnectionLost, match=reason),
    ):
        RowConnection(("127.0.0.1", server.port), digest, cluster, 8, dtype, 5.0)


def test_who_does_not_know_the_secret_is_refused_and_told_nothing() -> None:
    secret = bytes(range(1, 33))
    with closing(RowServer(lambda layer, x: x, DIGEST, 1, 8, torch.float32, LOOPBACK, secret)) as server:
        address = ("127.0.0.1", server.port)
        for wrong in (NO_SECRET, secret[::-1]):
            with pytest.raises(ConnectionLost) as caught:
                RowConnection(address, bytes(32), 1, 8, torch.float32, 5.0, wrong)
            assert str(caught.value).endswith("it refused: it is of another application")
        with closing(RowConnection(address, DIGEST, 1, 8, torch.float32, 5.0, secret)) as connection:
            connection.send(0, torch.ones(2, 8))
            assert torch.equal(connection.receive(), torch.ones(2, 8))


def test_what_a_call_raises_is_told_and_the_server_lives() -> None:
    def compute(layer: int, x: Tensor) -> Tensor:
        if layer:
            raise ValueError(f"there is no layer {layer}")
        return x

    with closing(RowServer(compute, DIGEST, 1, 8, torch.float32, LOOPBACK)) as server:
        for layer in (1, 0):
            with closing(RowConnection(("127.0.0.1", server.port), DIGEST, 1, 8, torch.float32, 5.0)) as connection:
                connection.send(layer, torch.ones(1, 8))
                if layer:
                    with pytest.raises(ConnectionLost, match="there is no layer 1"):
                        connection.receive()
                else:
                    assert torch.equal(connection.receive(), torch.ones(1, 8))


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=60), st.booleans(), st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1))
def test_garbage_ends_its_own_connection_alone(garbage: bytes, greets: bool, layer: int, n: int) -> None:
    with closing(RowServer(lambda layer, x: x, DIGEST, 1, 8, torch.float32, LOOPBACK)) as server:
        with socket.create_connection(("127.0.0.1", server.port), 5.0) as hostile:
            if greets:
                hostile.sendall(GREETING.pack(MAGIC, NO_SECRET, DIGEST, 1, type_name(torch.float32)))
                assert hostile.recv(REPLY.size)
                hostile.sendall(REQUEST.pack(layer, n))
            hostile.sendall(garbage)
        with closing(RowConnection(("127.0.0.1", server.port), DIGEST, 1, 8, torch.float32, 5.0)) as connection:
            connection.send(0, torch.ones(2, 8))
            assert torch.equal(connection.receive(), torch.ones(2, 8))


def test_a_frame_that_is_too_large_is_refused() -> None:
    with (
        closing(RowServer(lambda layer, x: x, DIGEST, 1, 8, torch.float32, LOOPBACK)) as server,
        closing(RowConnection(("127.0.0.1", server.port), DIGEST, 1, 8, torch.float32, 5.0)) as connection,
    ):
        connection._socket.sendall(REQUEST.pack(0, 1 << 17))
        connection._sent = 1 << 17
        with pytest.raises(ConnectionLost, match="131072 rows"):
            connection.receive()


def test_a_server_that_could_not_accept_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(RowServer(lambda layer, x: x, DIGEST, 1, 8, torch.float32, LOOPBACK)) as server:
        accept, failed = server._listener.accept, threading.Event()

        def fail() -> tuple[socket.socket, object]:
            if not failed.is_set():
                failed.set()
                raise OSError(24, "Too many open files")
            return accept()

        listener = type("Listener", (), {"accept": staticmethod(fail), "__getattr__": lambda self, n: getattr(of, n)})
        of, server._listener = server._listener, listener()
        for _ in range(2):  # the first is accepted by the call that already waits
            RowConnection(("127.0.0.1", server.port), DIGEST, 1, 8, torch.float32, 5.0).close()
        assert failed.is_set()


# The pool


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any),
    st.integers(0, 2**31),
    st.sampled_from([1, 3, 256]),
    st.sampled_from([None, 0, 1]),
)
def test_answers_do_not_depend_on_who_computes(
    served: Artifact, local: LocalClusters, sizes: list[int], seed: int, split_rows: int, resident: int | None
) -> None:
    replicas = [Replica(served, c) for c in range(MODEL.n_clusters) for _ in range(2)]
    one = max(LocalClusters(served, [0], torch.float32).clusters[0, 0].bytes * 4, 1)
    budget = None if resident is None else resident * one
    with closing(ClusterPool(served, torch.float32, ClusterPoolSettings(budget, split_rows))) as pool:
        connected(pool, replicas)
        same(pool, local, rows(seed, dict(enumerate(sizes))))
    for replica in replicas:
        replica.close()


def test_many_rows_are_split_over_replicas(served: Artifact, local: LocalClusters, replicas: list[Replica]) -> None:
    with closing(ClusterPool(served, torch.float32, ClusterPoolSettings(0, split_rows=4))) as pool:
        connected(pool, replicas)
        same(pool, local, rows(0, {1: 9}))
        assert [r.calls for r in replicas] == [0, 0, MODEL.layers, MODEL.layers, 0, 0]


def test_calls_take_turns(served: Artifact, replicas: list[Replica]) -> None:
    with closing(ClusterPool(served, torch.float32, ClusterPoolSettings(0))) as pool:
        connected(pool, replicas)
        for _ in range(4):
            pool(0, rows(0, {0: 2}))
        assert [r.calls for r in replicas[:2]] == [2, 2]


@pytest.mark.parametrize("how", ["dies", "hangs", "fails", "both die"])
def test_a_replica_that_does_not_answer_costs_time_only(
    served: Artifact, local: LocalClusters, replicas: list[Replica], how: str
) -> None:
    seen: list[tuple[int, str]] = []
    settings = ClusterPoolSettings(0, call_timeout_s=0.3)
    with closing(ClusterPool(served, torch.float32, settings, lambda c, what, s: seen.append((c, what)))) as pool:
        connected(pool, replicas)
        first, second = replicas[:2]
        if how == "hangs":
            first.go.clear()
        elif how == "fails":
            first.fail = True
        else:
            for replica in (first, second) if how == "both die" else (first,):
                replica.server.close()
        for seed in range(3):
            same(pool, local, rows(seed, {0: 5, 1: 2}))
        assert (0, "retry") in seen and (1, "retry") not in seen
        assert pool.residency.stats().loads == (how == "both die")


def test_a_replica_that_comes_back_is_used_again(
    served: Artifact, local: LocalClusters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymoe.serving.cluster_pool.Replicas.PAUSE", 0.01)
    with (
        closing(ClusterPool(served, torch.float32, ClusterPoolSettings(0))) as pool,
        closing(Replica(served, 0)) as replica,
    ):
        same(pool, local, rows(0, {0: 5}))  # nobody there: loaded and computed here
        assert pool.residency.stats().loads == 1 and not replica.calls
        pool.update({0: [replica.address]})
        until(lambda: pool.replicas.count(0) == 1)
        same(pool, local, rows(1, {0: 5}))
        assert replica.calls == MODEL.layers and not pool._borrowed
        replica.fail = True
        same(pool, local, rows(2, {0: 5}))
        replica.fail = False
        until(lambda: pool.replicas.count(0) == 1)
        before = replica.calls
        same(pool, local, rows(3, {0: 5}))
        assert replica.calls == before + MODEL.layers


def test_replicas_that_are_all_too_slow_and_always_there_are_given_up(
    served: Artifact, local: LocalClusters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They greet at once, and answer too late, for ever."""
    monkeypatch.setattr("raymoe.serving.cluster_pool.Replicas.PAUSE", 0.0)
    slow = [Replica(served, 0) for _ in range(2)]
    with closing(ClusterPool(served, torch.float32, ClusterPoolSettings(0, call_timeout_s=0.1))) as pool:
        pool.update({0: [r.address for r in slow]})
        until(lambda: pool.replicas.count(0) == 2)
        for replica in slow:
            replica.go.clear()
        started = time.monotonic()
        same(pool, local, rows(0, {0: 5}))
        assert time.monotonic() - started < 5 and pool.residency.stats().loads
    for replica in slow:
        replica.close()


def test_an_address_that_became_another_clusters_is_not_asked(served: Artifact, local: LocalClusters) -> None:
    with (
        closing(ClusterPool(served, torch.float32, ClusterPoolSettings(0))) as pool,
        closing(Replica(served, 1)) as other,
    ):
        pool.update({0: [other.address]})
        until(lambda: other.address in pool.replicas._not_before)
        same(pool, local, rows(0, {0: 5}))
        assert not other.calls
        pool.update({1: [other.address]})
        until(lambda: pool.replicas.count(1) == 1)
        pool.update({0: [other.address]})
        assert pool.replicas.count(0) == pool.replicas.count(1) == 0
        pool.update({1: [other.address]})
        until(lambda: pool.replicas.count(1) == 1)


def test_dead_addresses_do_not_keep_new_ones_waiting(served: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of stopped processes, which take a connection and say nothing."""
    monkeypatch.setattr("raymoe.serving.cluster_pool.Replicas.PAUSE", 0.05)
    silent = [socket.create_server(LOOPBACK) for _ in range(3)]
    settings = ClusterPoolSettings(0, call_timeout_s=0.05)
    with closing(ClusterPool(served, torch.float32, settings)) as pool, closing(Replica(served, 0)) as replica:
        dead: list[Address] = [s.getsockname() for s in silent]
        pool.update({0: dead})
        until(lambda: len(pool.replicas._not_before) == 3)
        pool.update({0: [*dead, replica.address]})
        until(lambda: pool.replicas.count(0) == 1)
    for each in silent:
        each.close()


def test_replicas_of_another_artifact_are_not_asked(served: Artifact, local: LocalClusters) -> None:
    with (
        closing(ClusterPool(served, torch.float32, ClusterPoolSettings(0))) as pool,
        closing(Replica(served, 0, digest=bytes(32))) as stranger,
    ):
        pool.update({0: [stranger.address]})
        until(lambda: stranger.address in pool.replicas._not_before)
        same(pool, local, rows(0, {0: 5}))
        assert not stranger.calls


def test_replicas_that_are_no_longer_named_are_left(served: Artifact, replicas: list[Replica]) -> None:
    with closing(ClusterPool(served, torch.float32, ClusterPoolSettings(0))) as pool:
        connected(pool, replicas)
        pool.update({0: [replicas[1].address]})
        until(lambda: [pool.replicas.count(c) for c in range(3)] == [1, 0, 0])
        pool(0, rows(0, {0: 5, 2: 1}))
        assert [r.calls for r in replicas] == [0, 1, 0, 0, 0, 0]


def test_what_was_away_is_counted(served: Artifact, replicas: list[Replica]) -> None:
    sizes = ClusterPool(served, torch.float32, ClusterPoolSettings(0)).sizes
    with closing(ClusterPool(served, torch.float32, ClusterPoolSettings(sizes[0]))) as pool:
        connected(pool, replicas)
        for _ in range(400):
            pool(0, rows(0, {0: 50, 1: 1}))
        pool.residency.settle(10)
        assert pool.residency.get(0) is not None
        before = pool.remote_rows[0]
        pool(0, rows(0, {0: 50, 1: 1}))
        assert pool.remote_rows[0] == before and pool.remote_rows[1] == pool.rows[1] == 401


@pytest.mark.parametrize("bad", [{"resident_bytes": -1}, {"split_rows": 0}, {"call_timeout_s": 0.0}])
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=.*is not allowed"):
        ClusterPoolSettings(**bad)  # type: ignore[arg-type]


def test_a_call_when_a_timeout_is_near_does_not_mix_answers(served: Artifact, local: LocalClusters) -> None:
    """A late answer to an earlier call is never taken for that of the next."""
    with (
        closing(ClusterPool(served, torch.float32, ClusterPoolSettings(0, call_timeout_s=0.2))) as pool,
        closing(Replica(served, 0)) as replica,
    ):
        pool.update({0: [replica.address]})
        until(lambda: pool.replicas.count(0) == 1)
        replica.go.clear()
        same(pool, local, rows(0, {0: 5}))
        replica.go.set()
        for seed in range(5):
            same(pool, local, rows(seed, {0: 5}))
