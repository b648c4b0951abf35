"""Replicas as plain classes, without Serve."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from raymoe.serving import discovery, replicas
from raymoe.serving.discovery import ClusterDiscovery, Discovery, Endpoint, ScrapeTargets, addresses
from raymoe.serving.engine.native import kernel_name
from raymoe.serving.replicas import ClusterReplica, TrunkReplica
from raymoe.serving.settings import ServeSettings
from raymoe.serving.transport.rows import RowConnection, row_identity
from raymoe.storage.artifact import CorruptArtifact
from raymoe.storage.artifact_layout import TRUNK, cluster_file
from tests.support.served import MODEL, artifact

SECRET = bytes(range(32))


@pytest.fixture(autouse=True)
def no_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of metrics come from Serve, which does not run here."""

    def start_metrics(host: str, registry: CollectorRegistry) -> discovery.ScrapeTarget:
        return host, 0, {}

    monkeypatch.setattr(replicas, "start_metrics", start_metrics)


def flip(path: Path) -> None:
    """Change a byte in the middle of the tensors."""
    content = bytearray(path.read_bytes())
    content[-len(content) // 4] ^= 0xFF
    path.write_bytes(content)


def test_a_cluster_replica_serves_its_cluster(tmp_path: Path) -> None:
    made = artifact(tmp_path)
    replica = ClusterReplica(ServeSettings(), str(made.folder), SECRET, 1)
    endpoint = replica.endpoint()
    assert endpoint.digest == made.digest.hex() and endpoint.address
    identity = row_identity(made.digest, 1, torch.float32, kernel_name())
    connection = RowConnection(endpoint.address, identity, MODEL.d_model, torch.float32, 5.0, SECRET)
    connection.send(0, torch.ones(3, MODEL.d_model))
    assert connection.receive().shape == (3, MODEL.d_model)
    stats = replica.record_autoscaling_stats()
    assert stats["busy"] > 0 and stats["latency_s"] > 0
    connection.close()
    replica.__del__()


def test_a_replica_does_not_serve_a_damaged_cluster(tmp_path: Path) -> None:
    """Each process verifies the files that it reads: a checksum that another process verified proves nothing here."""
    made = artifact(tmp_path)
    flip(made.folder / cluster_file(1))
    with pytest.raises(CorruptArtifact, match="cluster_001"):
        ClusterReplica(ServeSettings(), str(made.folder), SECRET, 1)
    ClusterReplica(ServeSettings(), str(made.folder), SECRET, 0).__del__()


class Unfinished(TrunkReplica):
    """A trunk whose start fails: it has nothing to drain."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize("file", [TRUNK, cluster_file(2)])
def test_a_trunk_does_not_serve_a_damaged_file(tmp_path: Path, file: str) -> None:
    made = artifact(tmp_path)
    flip(made.folder / file)

    async def start() -> None:
        replica: Any = object.__new__(Unfinished)
        await TrunkReplica.__init__(replica, ServeSettings(), str(made.folder), SECRET, [])

    with pytest.raises(CorruptArtifact, match=Path(file).stem):
        asyncio.run(start())


# Discovery


class Handle:
    """A deployment handle. `found`: endpoints of its replicas, or an exception."""

    def __init__(self, found: Sequence[Any] | Exception) -> None:
        self.found = found

    def broadcast(self, name: str) -> SimpleNamespace:
        async def results_async(**_: Any) -> Sequence[Any]:
            if isinstance(self.found, Exception):
                raise self.found
            return self.found

        assert name == "endpoint"
        return SimpleNamespace(results_async=results_async)


def endpoint(port: int, digest: str = "d") -> Endpoint:
    return Endpoint(("127.0.0.1", port + 1, {"deployment": "x"}), ("127.0.0.1", port), digest)


def test_addresses_are_those_of_the_same_artifact() -> None:
    api = Endpoint(("127.0.0.1", 1, {}))
    assert addresses([endpoint(1), endpoint(2, "other"), api], "d") == [("127.0.0.1", 1)]


def test_a_cluster_that_serve_cannot_list_keeps_its_addresses() -> None:
    handles: Any = [Handle([endpoint(1)]), Handle([endpoint(2), RuntimeError("a replica that fails")])]
    seen: list[Any] = []

    async def test() -> None:
        clusters = ClusterDiscovery(handles, "d", seen.append)
        await clusters.poll()
        handles[0].found, handles[1].found = TimeoutError(), []
        await clusters.poll()

    asyncio.run(test())
    assert seen == [{0: [("127.0.0.1", 1)], 1: [("127.0.0.1", 2)]}, {0: [("127.0.0.1", 1)], 1: []}]


def test_a_discovery_that_has_stopped_is_unhealthy() -> None:
    async def test() -> None:
        async def poll() -> bool:
            raise OSError("broken")

        stopping = Discovery(poll)
        stopping.check()
        await asyncio.wait([stopping._task])
        with pytest.raises(RuntimeError, match="replica discovery has stopped; Serve restarts this replica"):
            stopping.check()

    asyncio.run(test())


def test_scrape_targets_are_written_when_all_replicas_are_known(tmp_path: Path) -> None:
    handles: Any = [Handle([endpoint(1)]), Handle(TimeoutError())]
    targets = ScrapeTargets(str(tmp_path), "app", handles)
    asyncio.run(targets.write())
    assert not targets.path.exists()
    handles[1].found = [endpoint(5)]
    asyncio.run(targets.write())
    assert "127.0.0.1:2" in targets.path.read_text() and "127.0.0.1:6" in targets.path.read_text()
    targets.remove()
    targets.remove()
    assert not targets.path.exists()
