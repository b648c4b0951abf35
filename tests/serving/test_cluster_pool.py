"""Clusters at replicas: outputs are equal to those of this process, also when replicas fail."""

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
from raymoe.serving.engine.native import kernel_name
from raymoe.serving.transport.handshake import Address
from raymoe.serving.transport.rows import RowServer, row_identity
from raymoe.storage.artifact import Artifact
from tests.support.served import MODEL, artifact
from tests.support.waiting import until

LOOPBACK = ("127.0.0.1", 0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifact(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def local(served: Artifact) -> LocalClusters:
    return LocalClusters(served, range(MODEL.n_clusters), torch.float32)


class Replica:
    """A cluster's replica in this process with injected faults. `go`: calls wait for it. `fail`: calls raise."""

    def __init__(self, artifact: Artifact, c: int, digest: bytes | None = None, kernel: str = "") -> None:
        tensors = artifact.cluster(c)
        self.layers = [Cluster(MODEL, tensors, i, c, torch.float32) for i in range(MODEL.layers)]
        self.go = threading.Event()
        self.go.set()
        self.calls = 0
        self.fail = False
        identity = row_identity(digest or artifact.digest, c, torch.float32, kernel or kernel_name())
        self.server = RowServer(self.compute, identity, MODEL.d_model, torch.float32, LOOPBACK)
        self.address: Address = ("127.0.0.1", self.server.port)

    def compute(self, layer: int, rows: Tensor) -> Tensor:
        self.go.wait()
        self.calls += 1
        if self.fail:
            raise ValueError("injected")
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
    until(lambda: all(pool.connections.count(c) == 2 for c in range(MODEL.n_clusters)))
    return pool


def rows(seed: int, sizes: dict[int, int]) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {c: torch.randn(n, MODEL.d_model, generator=generator) for c, n in sizes.items() if n}


def same(pool: ClusterPool, local: LocalClusters, rows: dict[int, Tensor]) -> None:
    with torch.inference_mode():
        for layer in range(MODEL.layers):
            outputs, expected = pool(layer, rows), local(layer, rows)
            assert outputs.keys() == expected.keys()
            for c in expected:
                assert torch.equal(outputs[c], expected[c])


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any),
    st.integers(0, 2**31),
    st.sampled_from([1, 3, 256]),
    st.sampled_from([None, 0, 1]),
)
def test_outputs_do_not_depend_on_where_they_are_computed(
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
def test_a_failed_replica_costs_only_time(
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


def test_a_recovered_replica_is_used_again(
    served: Artifact, local: LocalClusters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymoe.serving.cluster_pool.RowConnections.RETRY_S", 0.01)
    with (
        closing(ClusterPool(served, torch.float32, ClusterPoolSettings(0))) as pool,
        closing(Replica(served, 0)) as replica,
    ):
        same(pool, local, rows(0, {0: 5}))  # no replica: the cluster is loaded and computed here
        assert pool.residency.stats().loads == 1 and not replica.calls
        pool.update({0: [replica.address]})
        until(lambda: pool.connections.count(0) == 1)
        same(pool, local, rows(1, {0: 5}))
        assert replica.calls == MODEL.layers and not pool._borrowed
        replica.fail = True
        same(pool, local, rows(2, {0: 5}))
        replica.fail = False
        until(lambda: pool.connections.count(0) == 1)
        before = replica.calls
        same(pool, local, rows(3, {0: 5}))
        assert replica.calls == before + MODEL.layers


def test_slow_replicas_that_always_reconnect_are_abandoned(
    served: Artifact, local: LocalClusters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They complete each handshake at once, and each call too late."""
    monkeypatch.setattr("raymoe.serving.cluster_pool.RowConnections.RETRY_S", 0.0)
    slow = [Replica(served, 0) for _ in range(2)]
    with closing(ClusterPool(served, torch.float32, ClusterPoolSettings(0, call_timeout_s=0.1))) as pool:
        pool.update({0: [r.address for r in slow]})
        until(lambda: pool.connections.count(0) == 2)
        for replica in slow:
            replica.go.clear()
        started = time.monotonic()
        same(pool, local, rows(0, {0: 5}))
        assert time.monotonic() - started < 5 and pool.residency.stats().loads
    for replica in slow:
        replica.close()


def test_an_address_that_now_serves_another_cluster_is_not_used(served: Artifact, local: LocalClusters) -> None:
    with (
        closing(ClusterPool(served, torch.float32, ClusterPoolSettings(0))) as pool,
        closing(Replica(served, 1)) as other,
    ):
        pool.update({0: [other.address]})
        until(lambda: other.address in pool.connections._retry_at)
        same(pool, local, rows(0, {0: 5}))
        assert not other.calls
        pool.update({1: [other.address]})
        until(lambda: pool.connections.count(1) == 1)
        pool.update({0: [other.address]})
        assert pool.connections.count(0) == pool.connections.count(1) == 0
        pool.update({1: [other.address]})
        until(lambda: pool.connections.count(1) == 1)


def test_dead_addresses_do_not_delay_new_ones(served: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped processes accept a connection and send nothing."""
    monkeypatch.setattr("raymoe.serving.cluster_pool.RowConnections.RETRY_S", 0.05)
    silent = [socket.create_server(LOOPBACK) for _ in range(3)]
    settings = ClusterPoolSettings(0, call_timeout_s=0.05)
    with closing(ClusterPool(served, torch.float32, settings)) as pool, closing(Replica(served, 0)) as replica:
        dead: list[Address] = [s.getsockname() for s in silent]
        pool.update({0: dead})
        until(lambda: len(pool.connections._retry_at) == 3)
        pool.update({0: [*dead, replica.address]})
        until(lambda: pool.connections.count(0) == 1)
    for each in silent:
        each.close()


def test_replicas_of_another_artifact_are_not_used(served: Artifact, local: LocalClusters) -> None:
    with (
        closing(ClusterPool(served, torch.float32, ClusterPoolSettings(0))) as pool,
        closing(Replica(served, 0, digest=bytes(32))) as stranger,
    ):
        pool.update({0: [stranger.address]})
        until(lambda: stranger.address in pool.connections._retry_at)
        same(pool, local, rows(0, {0: 5}))
        assert not stranger.calls


def test_replicas_with_another_kernel_are_not_used(served: Artifact, local: LocalClusters) -> None:
    """Their outputs may differ in the last bits: a retry must not mix both in one completion."""
    with (
        closing(ClusterPool(served, torch.float32, ClusterPoolSettings(0))) as pool,
        closing(Replica(served, 0, kernel="torch-0-DEFAULT")) as other,
        closing(Replica(served, 0)) as equal,
    ):
        pool.update({0: [other.address, equal.address]})
        until(lambda: other.address in pool.connections._retry_at and pool.connections.count(0) == 1)
        for seed in range(3):
            same(pool, local, rows(seed, {0: 5}))
        assert not other.calls and equal.calls == 3 * MODEL.layers


def test_replicas_that_are_no_longer_listed_are_disconnected(served: Artifact, replicas: list[Replica]) -> None:
    with closing(ClusterPool(served, torch.float32, ClusterPoolSettings(0))) as pool:
        connected(pool, replicas)
        pool.update({0: [replicas[1].address]})
        until(lambda: [pool.connections.count(c) for c in range(3)] == [1, 0, 0])
        pool(0, rows(0, {0: 5, 2: 1}))
        assert [r.calls for r in replicas] == [0, 1, 0, 0, 0, 0]


def test_rows_of_clusters_that_are_not_resident_are_counted(served: Artifact, replicas: list[Replica]) -> None:
    sizes = ClusterPool(served, torch.float32, ClusterPoolSettings(0)).sizes
    with closing(ClusterPool(served, torch.float32, ClusterPoolSettings(sizes[0]))) as pool:
        connected(pool, replicas)
        for _ in range(400):
            pool(0, rows(0, {0: 50, 1: 1}))
        pool.residency.wait_for_loads(10)
        assert pool.residency.get(0) is not None
        before = pool.remote_rows[0]
        pool(0, rows(0, {0: 50, 1: 1}))
        assert pool.remote_rows[0] == before and pool.remote_rows[1] == pool.rows[1] == 401


@pytest.mark.parametrize("bad", [{"resident_bytes": -1}, {"split_rows": 0}, {"call_timeout_s": 0.0}])
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=.*is not allowed"):
        ClusterPoolSettings(**bad)  # type: ignore[arg-type]


def test_a_late_reply_is_not_taken_for_the_next_one(served: Artifact, local: LocalClusters) -> None:
    """After a timeout the connection is closed, so its late reply is not read."""
    with (
        closing(ClusterPool(served, torch.float32, ClusterPoolSettings(0, call_timeout_s=0.2))) as pool,
        closing(Replica(served, 0)) as replica,
    ):
        pool.update({0: [replica.address]})
        until(lambda: pool.connections.count(0) == 1)
        replica.go.clear()
        same(pool, local, rows(0, {0: 5}))
        replica.go.set()
        for seed in range(5):
            same(pool, local, rows(seed, {0: 5}))
