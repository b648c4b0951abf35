"""Serve's interface to the autoscaling policy: one decision for all clusters of an application.

Named in a Serve config as the application's `autoscaling_policy`, so that one decision sees the load of every
deployment and a byte budget over all of them can be kept. Requests and queues, by which Serve scales by itself,
play no part: clusters are not called through Serve.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from raymoe.serving.autoscaling import ClusterDemand, ClusterState, Policy, decide

PREFIX = "cluster-"
"""Names of the clusters' deployments: with the cluster's number behind."""
METRICS_INTERVAL_S = 0.5
LOOK_BACK_S = 2.0
"""How often replicas report, and over what Serve averages."""


class Scaler:
    """Called by Serve's controller about ten times a second with the contexts of all deployments.

    `interval_s`: from one decision to the next; between them the last one stands. The rest are fields of
    `Policy`, without minimum and maximum, which are those of the deployments. Raises ValueError for what is not
    allowed; Serve's controller only logs that, and goes on without a policy, so it is asked before it is deployed.
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
        """The policy for deployments of so many replicas. Raises ValueError."""
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

        def of_trunks(name: str) -> list[float]:
            return [value for report in reports for value in report.get(name, {}).values()]

        loads: list[ClusterDemand | None] = []
        sizes: list[int] = []
        states: list[ClusterState] = []
        config = None
        for c, key in clusters.items():
            context = contexts[key]
            config = context.config
            asked, size = of_trunks(f"remote_{c}"), of_trunks(f"bytes_{c}")
            sizes.append(int(max(size, default=0)))
            states.append(self._states.get(c) or ClusterState(context.target_num_replicas, now))
            own = context.aggregated_metrics
            busy, latency = list(own.get("busy", {}).values()), list(own.get("latency_s", {}).values())
            loads.append(
                ClusterDemand(
                    len(busy), sum(asked), statistics.fmean(busy or [0.0]), statistics.fmean(latency or [0.0])
                )
                if asked
                else None  # no trunk has said anything yet
            )
        assert config is not None
        policy = self.between(config.min_replicas, config.max_replicas)
        self._states = dict(zip(clusters, decide(policy, sizes, states, loads, now), strict=True))
