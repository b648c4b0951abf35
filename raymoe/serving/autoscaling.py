"""How many replicas each cluster should have: loads in, numbers out. Nothing here looks at a clock or starts anything.

ClusterDemand is measured in busy replicas: three replicas that compute half of the time are 1.5. A cluster gets so
many that each is busy for `target` of the time. It rises at once, falls when the highest load of a whole
cool-down would let it, and sleeps after `idle_s` without a row. What all wish is cut to a byte budget.
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
    """Share of the time that a replica should be busy."""
    minimum: int = 0
    """Replicas of each cluster at least. 0: an idle cluster has none."""
    maximum: int = 4
    """Replicas of each cluster at most."""
    tolerance: float = 0.15
    """Change nothing while the load is within this share of what the replicas are for."""
    up_cooldown_s: float = 5.0
    """Seconds from one raise to the next. Waking from none neither waits nor counts."""
    down_cooldown_s: float = 60.0
    """Seconds from any change to a cut, and of the loads that a cut looks back on."""
    idle_s: float = 300.0
    """Seconds without a row until the last replica goes."""
    saturated: float = 0.95
    """Busy share from which the load is more than can be seen."""
    surge: float = 4.0
    """Then the replicas are multiplied by this."""
    latency_s: float = math.inf
    """A call should not take longer; replicas that do, and are at least half as busy as they should be, are too few."""
    budget_bytes: int | None = None
    """Of all replicas of all clusters together. None: as many as there are."""

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
    """What a cluster did since the last decision."""

    replicas: int
    """That answered."""
    rows_per_s: float
    """Asked of the cluster, whoever computed them."""
    busy: float
    """Mean share of the time that its replicas were computing."""
    latency_s: float = 0.0
    """Of a call."""


@dataclass(frozen=True)
class ClusterState:
    """What the policy remembers of a cluster; `desired` is its decision."""

    desired: int
    active_at: float
    """When it last had rows."""
    raised_at: float = -math.inf
    lowered_at: float = -math.inf
    rows_per_busy_s: float = 0.0
    """What one replica computes in a busy second. 0: not known yet."""
    recent: tuple[tuple[float, float], ...] = ()
    """(time, busy replicas) of the last cool-down."""


def start(policy: Policy, replica_bytes: Sequence[int], now: float) -> tuple[ClusterState, ...]:
    """The state before the first decision: the minimum of each cluster. replica_bytes [C]: memory of a replica.

    Raises ValueError when the budget does not hold the minimum.
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
    """The next state of every cluster. `now` in seconds of any clock that does not go back; no load: not known."""
    seen = [_observe(policy, s, load, now) for s, load in zip(states, loads, strict=True)]
    wishes = [s.desired if load is None else _wish(policy, s, now) for s, load in zip(seen, loads, strict=True)]
    granted = _within_budget(policy, replica_bytes, seen, wishes)
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
    """The state with this load remembered."""
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
    """Busy replicas that the load asks for, at most the maximum."""
    if load.rows_per_s <= 0:
        return 0.0
    fine = load.replicas * policy.target
    if load.replicas == 0:
        demand = load.rows_per_s / speed if speed else policy.target
    elif load.busy >= policy.saturated:
        demand = fine * policy.surge
    elif load.latency_s > policy.latency_s and load.busy >= policy.target / 2:
        demand = max(load.replicas * load.busy, fine * min(policy.surge, load.latency_s / policy.latency_s))
    else:
        demand = load.replicas * load.busy
    return min(demand, policy.maximum)


def _wish(policy: Policy, state: ClusterState, now: float) -> int:
    """Replicas that the cluster should have if there were enough for all."""
    desired, demand = state.desired, state.recent[-1][1]
    asleep = policy.minimum == 0 and now - state.active_at >= policy.idle_s
    least = 0 if asleep or (desired == 0 and demand == 0) else max(1, policy.minimum)
    if demand > desired * policy.target * (1 + policy.tolerance):
        if desired and now - state.raised_at < policy.up_cooldown_s:
            return desired
        return min(max(_ceil(demand / policy.target), desired, least), policy.maximum)
    if now - max(state.raised_at, state.lowered_at) < policy.down_cooldown_s:
        return desired
    peak = max(demand for _, demand in state.recent)
    return max(min(_ceil(peak / (policy.target * (1 - policy.tolerance))), desired), least)


def _ceil(x: float) -> int:
    """Without a replica for a rounding error."""
    return math.ceil(x - 1e-9)


def _within_budget(
    policy: Policy, replica_bytes: Sequence[int], states: Sequence[ClusterState], wishes: Sequence[int]
) -> list[int]:
    """The wishes cut to the budget: the minimum for all, one for each that has work, then where a replica bears most.

    (The last by D'Hondt's divisors. A replica that is there counts a tolerance more than one that would be
    started, so that clusters of equal load do not take it from each other.)
    """
    if policy.budget_bytes is None:
        return list(wishes)
    granted = [min(policy.minimum, wish) for wish in wishes]
    left = policy.budget_bytes - sum(n * size for n, size in zip(granted, replica_bytes, strict=True))
    peaks = [max((demand for _, demand in s.recent), default=0.0) for s in states]

    def claim(c: int) -> tuple[bool, float, int]:
        present = 1 + policy.tolerance if granted[c] < states[c].desired else 1
        return granted[c] == 0, present * peaks[c] / (granted[c] + 1), -c

    while open_to := [c for c, wish in enumerate(wishes) if granted[c] < wish and replica_bytes[c] <= left]:
        c = max(open_to, key=claim)
        granted[c] += 1
        left -= replica_bytes[c]
    return granted
