"""The number of replicas of each cluster, as a pure function of its load: no clock, no side effects.

Load is measured in busy replicas: three replicas that compute half of the time are a load of 1.5. A cluster receives
as many replicas as keep each busy for `target` of the time. It scales up at once, down when the peak load of a whole
cool-down permits it, and to zero after `idle_s` without a row. A byte budget limits all clusters together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from raymoe.config import check_field


@dataclass(frozen=True)
class Policy:
    target: float = 0.6
    """Share of time that a replica should be busy."""
    minimum: int = 0
    """Minimum replicas of each cluster. 0: an idle cluster scales to zero."""
    maximum: int = 4
    """Maximum replicas of each cluster."""
    tolerance: float = 0.15
    """Relative deviation from the load at which replicas are busy for `target`, within which nothing changes."""
    up_cooldown_s: float = 5.0
    """Seconds between two scale-ups. Scaling up from zero neither waits nor counts."""
    down_cooldown_s: float = 60.0
    """Seconds between any change and a scale-down, and the window of loads whose peak a scale-down must serve."""
    idle_s: float = 300.0
    """Seconds without a row until a cluster scales to zero."""
    saturated: float = 0.95
    """Busy share above which the load is larger than can be measured."""
    surge: float = 4.0
    """Factor by which replicas grow then."""
    latency_s: float = math.inf
    """Target for the latency of a call, in seconds. A cluster above it, whose replicas are at least half as busy as
    `target`, scales up."""
    budget_bytes: int | None = None
    """Memory of all replicas of all clusters together. None: no limit."""

    def __post_init__(self) -> None:
        require = partial(check_field, self)
        require("target", "greater than 0, less than saturated", 0 < self.target < self.saturated)
        require("saturated", "at most 1", self.saturated <= 1)
        require("minimum", "0 or more", self.minimum >= 0)
        require("maximum", "at least 1 and the minimum", self.maximum >= max(1, self.minimum))
        require("tolerance", "0 to less than 1", 0 <= self.tolerance < 1)
        require("surge", "greater than 1", self.surge > 1)
        require("latency_s", "greater than 0", self.latency_s > 0)
        for name in ("up_cooldown_s", "down_cooldown_s", "idle_s"):
            require(name, "0 or more", getattr(self, name) >= 0)


@dataclass(frozen=True)
class ClusterDemand:
    """Load of a cluster since the last decision."""

    replicas: int
    """Replicas that reported."""
    rows_per_s: float
    """Rows routed to the cluster while it was not resident, wherever they were computed."""
    busy: float
    """Mean share of time that its replicas were computing."""
    latency_s: float = 0.0
    """Mean latency of a call."""


@dataclass(frozen=True)
class ClusterState:
    """State of the policy for one cluster. Times are in seconds of the caller's clock."""

    desired: int
    """The decision: number of replicas."""
    active_at: float
    """Time of the last rows."""
    raised_at: float = -math.inf
    """Time of the last scale-up."""
    lowered_at: float = -math.inf
    """Time of the last scale-down."""
    rows_per_busy_s: float = 0.0
    """Rows that one replica computes in a busy second. 0: unknown."""
    recent: tuple[tuple[float, float], ...] = ()
    """(time, load in busy replicas) within the last cool-down."""


def start(policy: Policy, replica_bytes: Sequence[int], now: float) -> tuple[ClusterState, ...]:
    """Return the state before the first decision: the minimum of each cluster.

    replica_bytes [C]: memory of a replica. Raises ValueError when the budget is too small for the minimum.
    """
    least = policy.minimum * sum(replica_bytes)
    if policy.budget_bytes is not None and least > policy.budget_bytes:
        raise ValueError(
            f"budget_bytes={policy.budget_bytes:,} is not allowed: "
            f"{policy.minimum} replicas of {len(replica_bytes)} clusters take {least:,}"
        )
    return tuple(ClusterState(policy.minimum, now) for _ in replica_bytes)


def decide(
    policy: Policy,
    replica_bytes: Sequence[int],
    states: Sequence[ClusterState],
    loads: Sequence[ClusterDemand | None],
    now: float,
) -> tuple[ClusterState, ...]:
    """Return the next state of every cluster.

    loads [C]: None where unknown. now: seconds of a monotonic clock.
    """
    seen = [_observe(policy, s, load, now) for s, load in zip(states, loads, strict=True)]
    requested = [s.desired if load is None else _request(policy, s, now) for s, load in zip(seen, loads, strict=True)]
    granted = _within_budget(policy, replica_bytes, seen, requested)
    return tuple(
        replace(
            s,
            desired=n,
            raised_at=now if n > s.desired > 0 else s.raised_at,
            lowered_at=now if n < s.desired else s.lowered_at,
        )
        for s, n in zip(seen, granted, strict=True)
    )


def _observe(policy: Policy, state: ClusterState, load: ClusterDemand | None, now: float) -> ClusterState:
    """Return the state with this load recorded."""
    if load is None:
        return state
    speed = state.rows_per_busy_s
    busy = load.replicas * load.busy
    if busy > 0 and load.rows_per_s > 0:
        speed = load.rows_per_s / busy
    recent = [(at, demand) for at, demand in state.recent if at > now - policy.down_cooldown_s]
    return replace(
        state,
        active_at=now if load.rows_per_s > 0 else state.active_at,
        rows_per_busy_s=speed,
        recent=(*recent, (now, _demand(policy, load, speed))),
    )


def _demand(policy: Policy, load: ClusterDemand, speed: float) -> float:
    """Return the load in busy replicas, at most the maximum."""
    if load.rows_per_s <= 0:
        return 0.0
    balanced = load.replicas * policy.target
    if load.replicas == 0:
        demand = load.rows_per_s / speed if speed else policy.target
    elif load.busy >= policy.saturated:
        demand = balanced * policy.surge
    elif load.latency_s > policy.latency_s and load.busy >= policy.target / 2:
        demand = max(load.replicas * load.busy, balanced * min(policy.surge, load.latency_s / policy.latency_s))
    else:
        demand = load.replicas * load.busy
    return min(demand, policy.maximum)


def _request(policy: Policy, state: ClusterState, now: float) -> int:
    """Return the replicas that the cluster needs, regardless of the budget."""
    desired, demand = state.desired, state.recent[-1][1]
    idle = policy.minimum == 0 and now - state.active_at >= policy.idle_s
    least = 0 if idle or (desired == 0 and demand == 0) else max(1, policy.minimum)
    if demand > desired * policy.target * (1 + policy.tolerance):
        if desired and now - state.raised_at < policy.up_cooldown_s:
            return desired
        return min(max(_ceil(demand / policy.target), desired, least), policy.maximum)
    if now - max(state.raised_at, state.lowered_at) < policy.down_cooldown_s:
        return desired
    peak = max(demand for _, demand in state.recent)
    return max(min(_ceil(peak / (policy.target * (1 - policy.tolerance))), desired), least)


def _ceil(x: float) -> int:
    """Round up, ignoring rounding errors."""
    return math.ceil(x - 1e-9)


def _within_budget(
    policy: Policy, replica_bytes: Sequence[int], states: Sequence[ClusterState], requested: Sequence[int]
) -> list[int]:
    """Reduce the requested replicas to the budget: the minimum of all, then one for each loaded cluster, then by load.

    The last are divided by D'Hondt's method. A running replica counts more than a new one, by the tolerance, so that
    clusters of equal load do not alternate.
    """
    if policy.budget_bytes is None:
        return list(requested)
    granted = [min(policy.minimum, request) for request in requested]
    left = policy.budget_bytes - sum(n * size for n, size in zip(granted, replica_bytes, strict=True))
    peaks = [max((demand for _, demand in s.recent), default=0.0) for s in states]

    def priority(c: int) -> tuple[bool, float, int]:
        present = 1 + policy.tolerance if granted[c] < states[c].desired else 1
        return granted[c] == 0, present * peaks[c] / (granted[c] + 1), -c

    while candidates := [c for c, request in enumerate(requested) if granted[c] < request and replica_bytes[c] <= left]:
        c = max(candidates, key=priority)
        granted[c] += 1
        left -= replica_bytes[c]
    return granted
