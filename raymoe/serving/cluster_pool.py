"""The clusters as a trunk sees them: some resident in its process, the others at replicas, all computable here.

One call carries the rows of all active clusters of a layer. Those that are resident are computed here while the
others' rows are on their way. What a replica does not answer (it died, it is slow, it serves another artifact)
another one is asked for, and if there is none the cluster is loaded and computed here: calls are pure, so the
answer is the same whoever gives it, and no step ever fails for a replica.
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
from raymoe.serving.residency import Residency, trim
from raymoe.serving.transport.rows import NO_SECRET, Address, ConnectionLost, RowConnection
from raymoe.storage.artifact import Artifact

log = logging.getLogger(__name__)

Observe = Callable[[int, str, float], None]
"""(cluster, what, seconds): a `call`, or a `retry` of one that was lost."""


@dataclass(frozen=True)
class ClusterPoolSettings:
    resident_bytes: int | None = None
    """Weights of clusters that this process keeps. None: all, nothing leaves the process; 0: none."""
    split_rows: int = 256
    """Rows of a call from which it is split over a cluster's replicas."""
    call_timeout_s: float = 1.0
    """A replica that takes longer is given up: the call goes elsewhere."""

    def __post_init__(self) -> None:
        require = partial(check_field, self)
        require("resident_bytes", "0 or more, or all", self.resident_bytes is None or self.resident_bytes >= 0)
        require("split_rows", "at least 1", self.split_rows >= 1)
        require("call_timeout_s", "greater than 0", self.call_timeout_s > 0)


class ClusterPool:
    """`ClusterCompute` over residents, replicas and, as the last resort, the artifact itself.

    One thread calls; `update` may come from another.
    """

    def __init__(
        self,
        artifact: Artifact,
        dtype: torch.dtype,
        settings: ClusterPoolSettings,
        observe: Observe = lambda *_: None,
        secret: bytes = NO_SECRET,
    ) -> None:
        self.artifact, self.dtype, self.settings, self.observe = artifact, dtype, settings, observe
        self.sizes = cluster_sizes(artifact, dtype)
        self.residency = Residency(self.sizes, self._load, settings.resident_bytes)
        self.replicas = Replicas(artifact.digest, artifact.model.d_model, dtype, settings.call_timeout_s, secret)
        self.rows: Counter[int] = Counter(dict.fromkeys(self.sizes, 0))
        """Rows of each cluster so far."""
        self.remote_rows: Counter[int] = Counter(dict.fromkeys(self.sizes, 0))
        """Those of them that were of a cluster that was not resident: what replicas are wanted for."""
        self._step: Counter[int] = Counter()
        self._borrowed: dict[int, dict[int, Cluster]] = {}
        """Clusters beyond the budget that no replica computes now."""

    def update(self, addresses: Mapping[int, Sequence[Address]]) -> None:
        """The replicas of each cluster that there are now."""
        self.replicas.update(addresses)

    def close(self) -> None:
        self.residency.close()
        self.replicas.close()

    def _load(self, c: int) -> dict[int, Cluster]:
        tensors = self.artifact.cluster(c)
        return {i: Cluster(self.artifact.model, tensors, i, c, self.dtype) for i in range(self.artifact.model.layers)}

    def __call__(self, layer: int, rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        if layer == 0 and self._step:
            self.residency.observe(self._step)
            self._step = Counter()
        answers: dict[int, Tensor] = {}
        here: list[tuple[int, dict[int, Cluster]]] = []
        asked: list[tuple[int, list[_Call]]] = []
        for c, part in rows.items():
            self._step[c] += part.shape[0]
            self.rows[c] += part.shape[0]
            cluster = self.residency.get(c)
            if cluster is None:
                self.remote_rows[c] += part.shape[0]
                if calls := self._send(layer, c, part):
                    asked.append((c, calls))
                    continue
                cluster = self._borrow(c)
            here.append((c, cluster))
        if here:
            said = compute_clusters([cluster[layer] for _, cluster in here], [rows[c] for c, _ in here])
            answers |= dict(zip((c for c, _ in here), said, strict=True))
        for c, calls in asked:
            answers[c] = self._receive(layer, c, calls)
        return answers

    def _send(self, layer: int, c: int, rows: Tensor) -> list[_Call]:
        """Rows on their way to replicas of cluster c, split when they are many; none when there is no replica."""
        connections = self.replicas.take(c, -(-rows.shape[0] // self.settings.split_rows))
        if not connections:
            return []
        parts = rows.tensor_split(len(connections)) if len(connections) > 1 else (rows,)
        return [self._ask(layer, c, part, connection) for part, connection in zip(parts, connections, strict=True)]

    def _ask(self, layer: int, c: int, rows: Tensor, connection: RowConnection) -> _Call:
        started = time.perf_counter()
        try:
            connection.send(layer, rows)
        except ConnectionLost as error:
            self._lose(c, connection, error)
            return _Call(rows, None, started)
        return _Call(rows, connection, started)

    def _receive(self, layer: int, c: int, calls: Sequence[_Call]) -> Tensor:
        parts: list[Tensor] = []
        for call in calls:
            last = call.started + 2 * self.settings.call_timeout_s  # replicas may all be slow, and be back at once
            said = self._answer(c, call)
            while said is None:
                spare = self.replicas.take(c, 1) if time.perf_counter() < last else []
                if not spare:
                    said = self._borrow(c)[layer](call.rows)
                else:
                    call = self._ask(layer, c, call.rows, spare[0])
                    said = self._answer(c, call)
            parts.append(said)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _answer(self, c: int, call: _Call) -> Tensor | None:
        if call.connection is None:
            return None
        try:  # all of a layer have been asked at once, so that hung ones are waited for together
            said = call.connection.receive(self.settings.call_timeout_s - (time.perf_counter() - call.started))
        except ConnectionLost as error:
            self._lose(c, call.connection, error)
            return None
        self.replicas.give_back(c, call.connection, answered=True)
        if self._borrowed.pop(c, None):
            trim()
        self.observe(c, "call", time.perf_counter() - call.started)
        return said

    def _lose(self, c: int, connection: RowConnection, error: ConnectionLost) -> None:
        log.warning("cluster %d: %s", c, error)
        self.replicas.lose(c, connection)
        self.observe(c, "retry", 0.0)

    def _borrow(self, c: int) -> dict[int, Cluster]:
        """The cluster in this process, beyond the budget, until a replica answers."""
        if c not in self._borrowed:
            self._borrowed[c] = self.residency.need(c)
        return self._borrowed[c]


@dataclass(frozen=True)
class _Call:
    rows: Tensor
    connection: RowConnection | None
    started: float


class Replicas:
    """Connections to the replicas of every cluster, made and made again by a thread of their own.

    Who calls never waits for a connection: it takes those that are ready. One that was lost is tried again after
    `PAUSE` seconds, and twice as many each time until it answers, for as long as `update` names its address.
    """

    PAUSE, LONGEST_PAUSE = 1.0, 60.0

    def __init__(self, digest: bytes, width: int, dtype: torch.dtype, timeout: float, secret: bytes) -> None:
        self._greeting = digest, width, dtype, timeout, secret
        self._changed = threading.Condition()
        self._wanted: dict[Address, int] = {}
        self._ready: dict[int, list[RowConnection]] = {}
        self._known: set[Address] = set()
        """Connected, or in use."""
        self._not_before: dict[Address, float] = {}
        self._pauses: dict[Address, float] = {}
        """The last ones, of those that have not answered since."""
        self._closed = False
        self._thread = threading.Thread(target=self._connect, name="replicas", daemon=True)
        self._thread.start()

    def take(self, c: int, n: int) -> list[RowConnection]:
        """At most n connections to different replicas of cluster c, those first that rested longest; give them back."""
        with self._changed:
            ready = self._ready.get(c, [])
            taken, self._ready[c] = ready[:n], ready[n:]
            return taken

    def give_back(self, c: int, connection: RowConnection, answered: bool = False) -> None:
        with self._changed:
            if answered:
                self._pauses.pop(connection.address, None)
            if self._wanted.get(connection.address) == c:
                self._ready.setdefault(c, []).append(connection)
                return
            self._known.discard(connection.address)
        connection.close()

    def lose(self, c: int, connection: RowConnection) -> None:
        with self._changed:
            self._put_off(connection.address)
            self._changed.notify()

    def _put_off(self, address: Address) -> None:
        """Under the lock."""
        pause = min(2 * self._pauses.get(address, self.PAUSE / 2), self.LONGEST_PAUSE)
        self._known.discard(address)
        self._pauses[address], self._not_before[address] = pause, time.monotonic() + pause

    def count(self, c: int) -> int:
        """Replicas of cluster c that could be asked now."""
        with self._changed:
            return len(self._ready.get(c, []))

    def update(self, addresses: Mapping[int, Sequence[Address]]) -> None:
        with self._changed:
            self._wanted = {address: c for c, of_c in addresses.items() for address in of_c}
            gone = [x for c, of_c in self._ready.items() for x in of_c if self._wanted.get(x.address) != c]
            self._ready = {c: [x for x in of_c if self._wanted.get(x.address) == c] for c, of_c in self._ready.items()}
            self._known -= {connection.address for connection in gone}
            self._not_before = {a: t for a, t in self._not_before.items() if a in self._wanted}
            self._pauses = {a: s for a, s in self._pauses.items() if a in self._wanted}
            self._changed.notify()
        for connection in gone:
            connection.close()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._wanted = {}
            self._changed.notify()
        self.update({})
        self._thread.join()

    def _connect(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                missing = [a for a in self._wanted if a not in self._known]
                due = [a for a in missing if self._not_before.get(a, now) <= now]
                if not due:
                    waits = [self._not_before[a] - now for a in missing]
                    self._changed.wait(min(waits, default=None))
                    continue
                address = min(due, key=lambda a: self._not_before.get(a, 0.0))  # new ones first: others may be dead
                c = self._wanted[address]
                self._known.add(address)
            digest, width, dtype, timeout, secret = self._greeting
            try:
                connection = RowConnection(address, digest, c, width, dtype, timeout, secret)
            except ConnectionLost as error:
                log.warning("cluster %d: %s", c, error)
                with self._changed:
                    self._put_off(address)
                continue
            self.give_back(c, connection)
