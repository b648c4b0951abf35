"""The clusters of a model, as a trunk computes them: resident in its process, at replicas, or loaded for a call.

One call has the rows of all active clusters of a layer. The trunk computes resident clusters while the rows of the
others are on their way. When a replica fails, times out or refuses, another replica computes its rows, and without
one the trunk loads the cluster and computes them. Calls are pure and the handshake admits only replicas with the
trunk's kernel, so outputs do not depend on where they are computed, and a failed replica never fails a step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from raymoe.config import check_field
from raymoe.serving.engine.cluster import Cluster, cluster_sizes, compute_clusters
from raymoe.serving.engine.native import kernel_name
from raymoe.serving.residency import Residency, trim
from raymoe.serving.transport.handshake import NO_SECRET, Address, ConnectionLost
from raymoe.serving.transport.rows import RowConnection, row_identity
from raymoe.storage.artifact import Artifact

log = logging.getLogger(__name__)

Observe = Callable[[int, str, float], None]
"""(cluster, "call" or "retry", seconds): a completed call, or a call that was lost and is retried."""


@dataclass(frozen=True)
class ClusterPoolSettings:
    resident_bytes: int | None = None
    """Bytes of cluster weights that the trunk's process keeps. None: all clusters; 0: none."""
    split_rows: int = 256
    """Rows above which a call is split over the replicas of its cluster."""
    call_timeout_s: float = 1.0
    """Seconds after which a call to a replica is retried elsewhere."""

    def __post_init__(self) -> None:
        require = partial(check_field, self)
        require("resident_bytes", "0 or more, or all", self.resident_bytes is None or self.resident_bytes >= 0)
        require("split_rows", "at least 1", self.split_rows >= 1)
        require("call_timeout_s", "greater than 0", self.call_timeout_s > 0)


class ClusterPool:
    """`ClusterCompute` over resident clusters, replicas and, as the last resort, the artifact.

    One thread calls it; `update` may come from another. `kernel`: see `engine.native.kernel_name`.
    """

    def __init__(
        self,
        artifact: Artifact,
        dtype: torch.dtype,
        settings: ClusterPoolSettings,
        observe: Observe = lambda *_: None,
        secret: bytes = NO_SECRET,
        kernel: str | None = None,
    ) -> None:
        self.artifact, self.dtype, self.settings, self.observe = artifact, dtype, settings, observe
        self.sizes = cluster_sizes(artifact, dtype)
        """Bytes of each cluster in the compute type."""
        self.residency = Residency(self.sizes, self._load, settings.resident_bytes)
        digest, width, kernel = artifact.digest, artifact.model.d_model, kernel or kernel_name()

        def connect(address: Address, c: int) -> RowConnection:
            identity = row_identity(digest, c, dtype, kernel)
            return RowConnection(address, identity, width, dtype, settings.call_timeout_s, secret)

        self.connections = RowConnections(connect)
        self.rows: Counter[int] = Counter(dict.fromkeys(self.sizes, 0))
        """Rows of each cluster so far."""
        self.remote_rows: Counter[int] = Counter(dict.fromkeys(self.sizes, 0))
        """Those of them whose cluster was not resident: the load that replicas serve."""
        self._step_rows: Counter[int] = Counter()
        self._borrowed: dict[int, dict[int, Cluster]] = {}
        """Clusters loaded beyond the budget because no replica computes them now."""

    def update(self, addresses: Mapping[int, Sequence[Address]]) -> None:
        """Set the addresses of all replicas of each cluster."""
        self.connections.update(addresses)

    def close(self) -> None:
        self.residency.close()
        self.connections.close()

    def _load(self, c: int) -> dict[int, Cluster]:
        tensors = self.artifact.cluster(c)
        return {i: Cluster(self.artifact.model, tensors, i, c, self.dtype) for i in range(self.artifact.model.layers)}

    def __call__(self, layer: int, rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return the outputs y_RD of each cluster's rows x_RD."""
        if layer == 0 and self._step_rows:
            self.residency.observe(self._step_rows)
            self._step_rows = Counter()
        local: list[tuple[int, dict[int, Cluster]]] = []
        remote: list[tuple[int, list[_Call]]] = []
        for c, x_RD in rows.items():
            self._step_rows[c] += x_RD.shape[0]
            self.rows[c] += x_RD.shape[0]
            cluster = self.residency.get(c)
            if cluster is None:
                self.remote_rows[c] += x_RD.shape[0]
                if calls := self._send(layer, c, x_RD):
                    remote.append((c, calls))
                    continue
                cluster = self._borrow(c)
            local.append((c, cluster))
        outputs: dict[int, Tensor] = {}
        if local:
            computed = compute_clusters([cluster[layer] for _, cluster in local], [rows[c] for c, _ in local])
            outputs |= dict(zip((c for c, _ in local), computed, strict=True))
        for c, calls in remote:
            outputs[c] = self._receive(layer, c, calls)
        return outputs

    def _send(self, layer: int, c: int, x_RD: Tensor) -> list[_Call]:
        """Send rows to replicas of cluster c. Return no call when there is no replica."""
        connections = self.connections.take(c, -(-x_RD.shape[0] // self.settings.split_rows))
        if not connections:
            return []
        parts = x_RD.tensor_split(len(connections)) if len(connections) > 1 else (x_RD,)
        return [self._send_to(connection, layer, c, part) for part, connection in zip(parts, connections, strict=True)]

    def _send_to(self, connection: RowConnection, layer: int, c: int, x_RD: Tensor) -> _Call:
        started = time.perf_counter()
        try:
            connection.send(layer, x_RD)
        except ConnectionLost as error:
            self._lose(c, connection, error)
            return _Call(x_RD, None, started)
        return _Call(x_RD, connection, started)

    def _receive(self, layer: int, c: int, calls: Sequence[_Call]) -> Tensor:
        """Return the outputs of calls, retried on other replicas, then computed here."""
        parts: list[Tensor] = []
        for call in calls:
            deadline = call.started + 2 * self.settings.call_timeout_s  # slow replicas may reconnect at once, each time
            y_RD = self._receive_call(c, call)
            while y_RD is None:
                spare = self.connections.take(c, 1) if time.perf_counter() < deadline else []
                if not spare:
                    y_RD = self._borrow(c)[layer](call.x_RD)
                else:
                    call = self._send_to(spare[0], layer, c, call.x_RD)
                    y_RD = self._receive_call(c, call)
            parts.append(y_RD)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _receive_call(self, c: int, call: _Call) -> Tensor | None:
        if call.connection is None:
            return None
        left = self.settings.call_timeout_s - (time.perf_counter() - call.started)  # one timeout for a layer's calls
        try:
            y_RD = call.connection.receive(left)
        except ConnectionLost as error:
            self._lose(c, call.connection, error)
            return None
        self.connections.give_back(c, call.connection, succeeded=True)
        if self._borrowed.pop(c, None):
            trim()
        self.observe(c, "call", time.perf_counter() - call.started)
        return y_RD

    def _lose(self, c: int, connection: RowConnection, error: ConnectionLost) -> None:
        log.warning("cluster %d: %s", c, error)
        self.connections.lose(connection)
        self.observe(c, "retry", 0.0)

    def _borrow(self, c: int) -> dict[int, Cluster]:
        """Return the cluster, loaded beyond the budget until a replica computes it again."""
        if c not in self._borrowed:
            self._borrowed[c] = self.residency.need(c)
        return self._borrowed[c]


@dataclass(frozen=True)
class _Call:
    x_RD: Tensor
    connection: RowConnection | None
    """None: sending failed."""
    started: float


class RowConnections:
    """Connections to the replicas of all clusters. A thread connects, and reconnects with exponential backoff.

    Callers take connections that are ready and never wait for one. The first delay after a failure is `RETRY_S`; it
    doubles with each further failure, up to `MAX_RETRY_S`, until a call succeeds.
    """

    RETRY_S, MAX_RETRY_S = 1.0, 60.0

    def __init__(self, connect: Callable[[Address, int], RowConnection]) -> None:
        self._connect = connect
        self._changed = threading.Condition()
        self._listed: dict[Address, int] = {}
        """The cluster of each replica."""
        self._ready: dict[int, list[RowConnection]] = {}
        self._known: set[Address] = set()
        """Addresses that are connected, or in use."""
        self._retry_at: dict[Address, float] = {}
        self._delays: dict[Address, float] = {}
        """The last delay of each address that has not succeeded since."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="row-connections", daemon=True)
        self._thread.start()

    def take(self, c: int, n: int) -> list[RowConnection]:
        """Take up to n connections to different replicas of cluster c, the longest unused first. Give them back."""
        with self._changed:
            ready = self._ready.get(c, [])
            taken, self._ready[c] = ready[:n], ready[n:]
            return taken

    def give_back(self, c: int, connection: RowConnection, succeeded: bool = False) -> None:
        with self._changed:
            if succeeded:
                self._delays.pop(connection.address, None)
            if self._listed.get(connection.address) == c:
                self._ready.setdefault(c, []).append(connection)
                return
            self._known.discard(connection.address)
        connection.close()

    def lose(self, connection: RowConnection) -> None:
        """Give back a connection that failed."""
        with self._changed:
            self._delay(connection.address)
            self._changed.notify()

    def _delay(self, address: Address) -> None:
        """Set when to reconnect. The caller has the lock."""
        delay = min(2 * self._delays.get(address, self.RETRY_S / 2), self.MAX_RETRY_S)
        self._known.discard(address)
        self._delays[address], self._retry_at[address] = delay, time.monotonic() + delay

    def count(self, c: int) -> int:
        """Return the number of connections to cluster c that are ready."""
        with self._changed:
            return len(self._ready.get(c, []))

    def update(self, addresses: Mapping[int, Sequence[Address]]) -> None:
        with self._changed:
            self._listed = {address: c for c, of_c in addresses.items() for address in of_c}
            gone = [x for c, of_c in self._ready.items() for x in of_c if self._listed.get(x.address) != c]
            self._ready = {c: [x for x in of_c if self._listed.get(x.address) == c] for c, of_c in self._ready.items()}
            self._known -= {connection.address for connection in gone}
            self._retry_at = {a: t for a, t in self._retry_at.items() if a in self._listed}
            self._delays = {a: s for a, s in self._delays.items() if a in self._listed}
            self._changed.notify()
        for connection in gone:
            connection.close()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._listed = {}
            self._changed.notify()
        self.update({})
        self._thread.join()

    def _run(self) -> None:
        while (target := self._next()) is not None:
            address, c = target
            try:
                connection = self._connect(address, c)
            except ConnectionLost as error:
                log.warning("cluster %d: replica not used: %s", c, error)
                with self._changed:
                    self._delay(address)
                continue
            self.give_back(c, connection)

    def _next(self) -> tuple[Address, int] | None:
        """Wait for an address to connect to, and return it with its cluster; None after `close`."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                missing = [a for a in self._listed if a not in self._known]
                due = [a for a in missing if self._retry_at.get(a, now) <= now]
                if due:
                    address = min(due, key=lambda a: self._retry_at.get(a, 0.0))  # new ones first
                    self._known.add(address)
                    return address, self._listed[address]
                self._changed.wait(min((self._retry_at[a] - now for a in missing), default=None))
        return None
