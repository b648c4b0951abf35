"""The autoscaling policy as Serve calls it: one decision for all clusters of an application.

A Serve config names it as the application's `autoscaling_policy`: one decision sees the load of every deployment, and
can respect a byte budget over all of them. Serve's own signals, requests and queues, are not used: clusters are not
called through Serve.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from raymoe.serving.autoscaling import ClusterDemand, ClusterState, Policy, decide

PREFIX = "cluster-"
"""Prefix of the names of the clusters' deployments. The cluster's id follows it."""
METRICS_INTERVAL_S = 0.5
"""Seconds between reports of a replica."""
LOOK_BACK_S = 2.0
"""Seconds over which Serve averages reports."""


class Scaler:
    """Serve's controller calls it about ten times per second with the contexts of all deployments.

    interval_s: seconds between decisions; calls in between return the last one. policy: fields of `Policy` except
    minimum and maximum, which come from the deployments. Raises ValueError for unknown or invalid fields. Serve's
    controller only logs that and continues without a policy, so `rollout.pinned` validates it before a deployment.
    """

    def __init__(self, interval_s: float = LOOK_BACK_S, clock: Callable[[], float] = time.monotonic, **policy: Any):
        known = sorted({field.name for field in fields(Policy)} - {"minimum", "maximum"})
        for name in policy:
            if name not in known:
                raise ValueError(f"policy_kwargs has an unknown key {name!r}: interval_s, {', '.join(known)}")
        self.interval_s, self.clock, self._policy = interval_s, clock, Policy(**policy)
        self._states: dict[int, ClusterState] = {}
        self._decided = -float("inf")

    def between(self, minimum: int, maximum: int) -> Policy:
        """Return the policy for deployments with these limits of replicas. Raises ValueError."""
        return replace(self._policy, minimum=minimum, maximum=maximum)

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        clusters = {
            int(key.name.removeprefix(PREFIX)): key for key in sorted(contexts, key=str) if key.name.startswith(PREFIX)
        }
        now = self.clock()
        if now - self._decided >= self.interval_s and clusters:
            self._decided = now
            self._decide(contexts, clusters, now)
        return {key: self._states[c].desired for c, key in clusters.items() if c in self._states}, {}

    def _decide(self, contexts: Mapping[Any, Any], clusters: Mapping[int, Any], now: float) -> None:
        reports: list[Mapping[str, Mapping[Any, float]]] = [
            context.aggregated_metrics for key, context in contexts.items() if not key.name.startswith(PREFIX)
        ]

        def from_trunks(name: str) -> list[float]:
            return [value for report in reports for value in report.get(name, {}).values()]

        loads: list[ClusterDemand | None] = []
        sizes: list[int] = []
        states: list[ClusterState] = []
        config = None
        for c, key in clusters.items():
            context = contexts[key]
            config = context.config
            rows, size = from_trunks(f"remote_{c}"), from_trunks(f"bytes_{c}")
            sizes.append(int(max(size, default=0)))
            states.append(self._states.get(c) or ClusterState(context.target_num_replicas, now))
            own = context.aggregated_metrics
            busy, latency = list(own.get("busy", {}).values()), list(own.get("latency_s", {}).values())
            loads.append(
                ClusterDemand(len(busy), sum(rows), statistics.fmean(busy or [0.0]), statistics.fmean(latency or [0.0]))
                if rows
                else None  # no trunk has reported yet
            )
        assert config is not None
        policy = self.between(config.min_replicas, config.max_replicas)
        self._states = dict(zip(clusters, decide(policy, sizes, states, loads, now), strict=True))
