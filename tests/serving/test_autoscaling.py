"""The autoscaling policy on traces of load, with an injected clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.serving.autoscaling import ClusterDemand, ClusterState, Policy, decide, start

INTERVAL = 5.0
POLICY = Policy(maximum=8, down_cooldown_s=30, idle_s=60, up_cooldown_s=INTERVAL)
ROWS_PER_S = 1000.0
"""Rows per second of one busy replica."""


def load(offered: float, replicas: int) -> ClusterDemand:
    """Return the demand that is measured when `replicas` receive a load of `offered` busy replicas."""
    done = min(offered, replicas) if replicas else offered
    return ClusterDemand(replicas, done * ROWS_PER_S, done / replicas if replicas else 0.0)


def follow(
    policy: Policy,
    traces: Sequence[Callable[[float], float]],
    seconds: float,
    sizes: Sequence[int] = (),
    lag: int = 0,
) -> list[list[int]]:
    """Return the desired replicas [decision][cluster]. traces: time -> offered load. Replicas are ready `lag` decisions later."""
    sizes = sizes or [1] * len(traces)
    states, history = start(policy, sizes, 0.0), []
    for i in range(1, int(seconds / INTERVAL) + 1):
        now = i * INTERVAL
        ready = history[-1 - lag] if len(history) > lag else [policy.minimum] * len(traces)
        loads = [load(trace(now), n) for trace, n in zip(traces, ready, strict=True)]
        states = decide(policy, sizes, states, loads, now)
        history.append([s.desired for s in states])
    return history


def turns(counts: list[int]) -> int:
    """Count the changes of direction."""
    moves = [b > a for a, b in pairwise(counts) if a != b]
    return sum(a != b for a, b in pairwise(moves))


def column(history: list[list[int]], c: int = 0) -> list[int]:
    return [row[c] for row in history]


def test_a_step_of_load_causes_one_change_each_way() -> None:
    counts = column(follow(POLICY, [lambda t: 2.4 if 50 < t <= 200 else 0.3], 400))
    assert counts[8] == 1
    assert counts[10] == counts[39] == 4  # 2.4 busy at 0.6
    assert counts[-1] == 1 and turns(counts) == 1


def test_a_hot_cluster_reaches_its_maximum_in_two_decisions_and_the_others_stay() -> None:
    hot, cold = (lambda t: 20.0 if 60 < t <= 150 else 0.2), (lambda t: 0.2)
    history = follow(POLICY, [cold, hot, cold], 300)
    at = int(60 / INTERVAL)  # the first decision that sees the heat
    assert history[at - 1] == [1, 1, 1] and history[at + 1][1] == POLICY.maximum
    assert column(history, 1)[-1] == 1 and turns(column(history, 1)) == 1
    assert {*column(history, 0)[1:], *column(history, 2)[1:]} == {1}


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_a_ramp_is_followed_monotonically(lag: int) -> None:
    counts = column(follow(POLICY, [lambda t: 0.3 + t / 100], 400, lag=lag))
    assert counts[-1] == 7 and turns(counts) == 0  # 4.3 busy at 0.6, within the tolerance
    down = column(follow(POLICY, [lambda t: max(0.3, 4.3 - t / 100)], 600, lag=lag))
    assert down[-1] == 1 and turns(down) <= 1


def test_a_spike_causes_one_change_each_way() -> None:
    counts = column(follow(POLICY, [lambda t: 5.0 if t == 100 else 0.3], 300))
    assert turns(counts) == 1 and counts[-1] == 1
    assert counts.index(max(counts)) == int(100 / INTERVAL) - 1
    assert sum(n > 1 for n in counts) <= POLICY.down_cooldown_s / INTERVAL + 1


def test_a_daily_cycle_causes_one_rise_and_one_fall() -> None:
    counts = column(follow(POLICY, [lambda t: 1.9 - 1.6 * math.cos(2 * math.pi * t / 1200)], 2400))
    assert turns(counts) == 3 and max(counts) in (6, 7) and min(counts[1:]) == 1


@pytest.mark.parametrize("period", [10, 20, 40])
def test_an_alternating_load_keeps_the_replicas_of_its_peak(period: int) -> None:
    counts = column(follow(POLICY, [lambda t: 1.8 if t % period < period / 2 else 0.1], 400))
    assert turns(counts) <= 1 and len(set(counts[10:])) == 1


def test_noise_inside_the_tolerance_changes_nothing() -> None:
    counts = column(follow(POLICY, [lambda t: 1.2 * (1 + 0.12 * math.sin(t))], 600))
    assert turns(counts) <= 1 and len(set(counts[20:])) == 1


def test_an_idle_cluster_scales_to_zero_after_its_delay_and_from_zero_at_once() -> None:
    def trace(t: float) -> float:
        return 1.5 if t <= 50 or t > 300 else 0.0

    counts = column(follow(POLICY, [trace], 340))
    asleep = counts.index(0) * INTERVAL + INTERVAL
    assert 50 + POLICY.idle_s <= asleep <= 50 + POLICY.idle_s + POLICY.down_cooldown_s + INTERVAL
    assert counts[int(300 / INTERVAL) - 1] == 0
    assert counts[int(300 / INTERVAL)] == 3  # the speed of a replica is remembered: 1.5 / 0.6


def test_a_minimum_above_zero_is_kept() -> None:
    assert set(column(follow(Policy(minimum=2, idle_s=10, down_cooldown_s=10), [lambda t: 0.0], 200))) == {2}


def test_a_cluster_without_rows_gets_no_replica() -> None:
    assert set(column(follow(POLICY, [lambda t: 0.0], 200))) == {0}


def test_slow_calls_scale_up_only_busy_replicas() -> None:
    policy = Policy(latency_s=0.01, maximum=8)
    before = (ClusterState(desired=2, active_at=0.0),)
    busy, idle = ClusterDemand(2, 100, 0.5, latency_s=0.03), ClusterDemand(2, 100, 0.1, latency_s=0.03)
    assert decide(policy, [1], before, [busy], 100.0)[0].desired == 6
    assert decide(policy, [1], before, [idle], 100.0)[0].desired == 1


def test_cooldowns_apply_in_both_directions() -> None:
    raised = (ClusterState(desired=2, active_at=100.0, raised_at=100.0),)
    full, calm = load(2, 2), load(0.1, 2)
    policy = Policy(up_cooldown_s=10, down_cooldown_s=30)
    assert decide(policy, [1], raised, [full], 109.0)[0].desired == 2
    assert decide(policy, [1], raised, [full], 110.0)[0].desired == 4
    assert decide(policy, [1], raised, [calm], 129.0)[0].desired == 2
    assert decide(policy, [1], raised, [calm], 130.0)[0].desired == 1


def test_a_cluster_with_unknown_load_keeps_its_replicas() -> None:
    before = (ClusterState(desired=3, active_at=0.0),)
    assert decide(POLICY, [1], before, [None], 1000.0) == before


def test_a_small_budget_gives_each_cluster_one_replica_then_the_busiest_more() -> None:
    policy = Policy(maximum=8, budget_bytes=60)
    history = follow(policy, [lambda t: 4.0, lambda t: 2.0, lambda t: 0.1], 100, sizes=[10, 10, 10])
    assert history[-1] == [3, 2, 1]
    assert all(sum(row) <= 6 for row in history)
    even = follow(policy, [lambda t: 3 + 0.1 * math.sin(t), lambda t: 3 + 0.1 * math.cos(t)], 600, sizes=[20, 20])
    assert {tuple(row) for row in even[3:]} == {(2, 1)}  # the third does not alternate


def test_invalid_values_are_refused_with_their_field() -> None:
    for name, value in {"target": 0, "maximum": 0, "minimum": -1, "tolerance": 1, "surge": 1, "idle_s": -1}.items():
        with pytest.raises(ValueError, match=f"{name}={value}"):
            Policy(**{name: value})
    with pytest.raises(ValueError, match="budget_bytes=9"):
        start(Policy(minimum=1, budget_bytes=9), [5, 5], 0.0)


LOADS = st.builds(ClusterDemand, st.integers(0, 8), st.floats(0, 1e6), st.floats(0, 1), st.floats(0, 1))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_decisions_are_within_bounds_and_reproducible(data: st.DataObject) -> None:
    clusters = data.draw(st.integers(1, 4))
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=clusters, max_size=clusters))
    minimum = data.draw(st.integers(0, 2))
    budget = minimum * sum(sizes) + data.draw(st.integers(0, 200))
    policy = Policy(minimum=minimum, maximum=6, budget_bytes=budget, latency_s=0.5, down_cooldown_s=20, idle_s=30)
    states, now = start(policy, sizes, 0.0), 0.0
    for _ in range(data.draw(st.integers(1, 12))):
        now += data.draw(st.floats(0.1, 50))
        loads = data.draw(st.lists(st.none() | LOADS, min_size=clusters, max_size=clusters))
        following = decide(policy, sizes, states, loads, now)
        assert following == decide(policy, sizes, states, loads, now)
        states = following
        assert all(minimum <= s.desired <= policy.maximum for s in states)
        assert sum(s.desired * size for s, size in zip(states, sizes, strict=True)) <= budget
