"""Metrics of serving: the API, the trunks and the cluster replicas of an application."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from raymoe.metrics.registry import Metrics

FINISHES = ("stop", "length", "abort", "error")
"""Values of the label `finished_reason`: how completions end."""

REJECTIONS = ("full", "unavailable", "too_long", "malformed", "unauthorized", "unknown_model")
"""Values of the label `reason`: why HTTP requests are rejected before the first token."""

PLACES = ("resident", "remote")
"""Values of the label `place`: where rows of a cluster are computed."""

CALL_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

# Buckets of vLLM, so that its dashboards can be compared with ours.
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
INTER_TOKEN_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip


class TrunkMetrics(Metrics):
    """Metrics of a trunk. The label `cluster` is the number of a cluster, for all layers together."""

    def __init__(self, registry: CollectorRegistry, *, clusters: int) -> None:
        super().__init__(registry, {})
        declare, totals = self._declare, self._declare_totals
        self.running = declare(Gauge, "num_requests_running", "Requests that the engine computes.")
        self.waiting = declare(Gauge, "num_requests_waiting", "Requests in the queue of the engine.")
        self.kv_usage = declare(Gauge, "kv_cache_usage_perc", "Fraction of the KV cache in use, 0 to 1.")
        self.cluster_rows = totals(
            "cluster_rows", "Rows of a cluster, by the place of computation: resident or remote.", "cluster", "place"
        )
        self.cluster_call_seconds = declare(
            Histogram, "cluster_call_seconds", "Time from a call to a cluster replica to its response.", "cluster",
            buckets=CALL_SECONDS,
        )  # fmt: skip
        self.cluster_retries = declare(
            Counter, "cluster_call_retries", "Calls without a response from a replica, computed elsewhere.", "cluster"
        )
        self.cluster_connected = declare(
            Gauge, "cluster_replicas_connected", "Replicas of a cluster to which this trunk is connected.", "cluster"
        )
        self.cluster_resident = declare(Gauge, "cluster_resident", "Whether a cluster is resident: 1 or 0.", "cluster")
        self.resident_bytes = declare(Gauge, "offload_resident_bytes", "Size of the resident clusters' weights.")
        self.hits = totals("offload_hits", "Uses of clusters that were resident.")
        self.misses = totals("offload_misses", "Uses of clusters that were not resident.")
        self.loads = totals("offload_loads", "Clusters loaded.")
        self.failed_loads = totals("offload_failed_loads", "Cluster loads that failed.")
        self.evictions = totals("offload_evictions", "Clusters evicted from memory.")
        self.stall = totals("offload_stall_seconds", "Time that steps waited for a cluster load.")
        for c in map(str, range(clusters)):  # without an initial 0, `increase` misses the first event of a series
            self.cluster_call_seconds.labels(c)
            self.cluster_retries.labels(c)
            for place in PLACES:
                self.cluster_rows.set(0, c, place)

    def observe_call(self, cluster: int, what: str, seconds: float) -> None:
        """Record a call to a cluster replica. what: `call` for a response, `retry` for none."""
        if what == "call":
            self.cluster_call_seconds.labels(str(cluster)).observe(seconds)
        else:
            self.cluster_retries.labels(str(cluster)).inc()

    def update(
        self, *, running: int, waiting: int, kv_usage: float, rows: Mapping[int, int], remote_rows: Mapping[int, int],
        connected: Mapping[int, int], residency: Any,
    ) -> None:  # fmt: skip
        """Set gauges and totals.

        rows, remote_rows: total by cluster, and the part of it that replicas computed. connected: replicas by cluster.
        residency: a `ResidencyStats`.
        """
        self.running.set(running)
        self.waiting.set(waiting)
        self.kv_usage.set(kv_usage)
        for c, n in rows.items():
            remote = remote_rows.get(c, 0)
            self.cluster_rows.set(remote, str(c), "remote")
            self.cluster_rows.set(n - remote, str(c), "resident")
        for c, n in connected.items():
            self.cluster_connected.labels(str(c)).set(n)
            self.cluster_resident.labels(str(c)).set(c in residency.resident)
        self.resident_bytes.set(residency.resident_bytes)
        self.hits.set(residency.hits)
        self.misses.set(residency.misses)
        self.loads.set(residency.loads)
        self.failed_loads.set(residency.failed)
        self.evictions.set(residency.evictions)
        self.stall.set(residency.stall_s)


class ClusterMetrics(Metrics):
    """Metrics of a cluster replica. All of them carry the label `cluster`."""

    def __init__(self, registry: CollectorRegistry, *, cluster: str) -> None:
        super().__init__(registry, {"cluster": cluster})
        declare = self._declare
        self.rows = declare(Counter, "cluster_replica_rows", "Rows that this replica computed.")
        self.compute_seconds = declare(
            Histogram, "cluster_compute_seconds", "Time to compute a call.", buckets=CALL_SECONDS
        )
        self.resident_bytes = declare(Gauge, "cluster_resident_bytes", "Size of the cluster's weights in this replica.")


class ApiMetrics(Metrics):
    """Metrics of an HTTP server, with the suffixes of vLLM's metrics. All of them carry the label `model_name`.

    An HTTP request for several choices counts as several requests, from the first token of each.
    """

    def __init__(self, registry: CollectorRegistry, *, model: str) -> None:
        super().__init__(registry, {"model_name": model})
        declare = self._declare
        self.time_to_first_token = declare(
            Histogram, "time_to_first_token_seconds",
            "Time from the arrival of a request to the first token of a completion.", buckets=FIRST_TOKEN_SECONDS,
        )  # fmt: skip
        self.inter_token_latency = declare(
            Histogram, "inter_token_latency_seconds", "Time between two tokens of a completion.",
            buckets=INTER_TOKEN_SECONDS,
        )  # fmt: skip
        self.e2e_request_latency = declare(
            Histogram, "e2e_request_latency_seconds", "Time from the arrival of a request to the end of a completion.",
            buckets=REQUEST_SECONDS,
        )  # fmt: skip
        self.prompt_tokens = declare(Counter, "prompt_tokens", "Prompt tokens of completions that started.")
        self.generation_tokens = declare(Counter, "generation_tokens", "Tokens of completions.")
        self.requests_running = declare(
            Gauge, "num_requests_running", "Completions that this API replica waits for or streams."
        )
        self.resumes = declare(
            Counter, "request_resumes", "Times that another trunk resumed a completion after a trunk was lost."
        )
        finished = declare(Counter, "request_success", "Completions that ended, by finish reason.", "finished_reason")
        rejected = declare(Counter, "requests_rejected", "HTTP requests rejected, by reason.", "reason")
        self.finished = {how: finished.labels(**self._own, finished_reason=how) for how in FINISHES}
        self.rejected = {why: rejected.labels(**self._own, reason=why) for why in REJECTIONS}
