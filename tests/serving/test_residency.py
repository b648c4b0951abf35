"""Residency: decisions in tables and properties, the table with fake loads, and with real clusters."""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import random
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.serving.engine.cluster import Cluster, LocalClusters, Product, cluster_sizes
from raymoe.serving.residency import Residency
from raymoe.serving.residency_policy import ResidencySettings, wanted
from raymoe.storage.artifact import Artifact, CorruptArtifact
from raymoe.storage.artifact_layout import cluster_file
from tests.support import served

LONG = 30.0
"""Seconds after which a waiting test fails."""

# The decision


@pytest.mark.parametrize(
    ("sizes", "use", "resident", "budget", "expected"),
    [
        ([1, 1, 1], [3, 2, 1], [], 2, {0, 1}),
        ([1, 1, 1], [3, 2, 1], [], 0, set()),
        ([1, 1, 1], [0, 0, 0], [], 3, {0, 1, 2}),  # room for all
        ([4, 1, 1], [8, 3, 1], [], 4, {1, 2}),  # per byte: 2, 3, 1
        ([4, 1, 1], [16, 3, 1], [], 4, {0}),
        ([3, 2, 2], [9, 5, 1], [], 4, {0}),
        ([3, 2, 1], [9, 5, 1], [], 4, {0, 2}),  # entries that do not fit are skipped
        ([5, 5], [9, 8], [], 4, set()),
        ([1, 1], [1, 1], [1], 1, {1}),  # equals: who is there stays
        ([1, 1], [1.19, 1], [1], 1, {1}),  # better, but not by the margin
        ([1, 1], [1.21, 1], [1], 1, {0}),
        ([1, 1], [0.01, 0], [1], 1, {0}),
        ([2, 1, 1], [4.9, 2, 2], [1, 2], 2, {0}),
        ([2, 1, 1], [4.7, 2, 2], [1, 2], 2, {1, 2}),
    ],
)
def test_wanted_keys(sizes: list[int], use: list[float], resident: list[int], budget: int, expected: set[int]) -> None:
    assert wanted(dict(enumerate(sizes)), dict(enumerate(use)), set(resident), budget, 0.2) == expected


def test_keys_to_keep_stay() -> None:
    assert wanted({0: 2, 1: 1, 2: 1}, {0: 0.0, 1: 5.0, 2: 4.0}, {0}, 3, 0.2, {0}) == {0, 1}


@st.composite
def situations(draw: st.DrawFn) -> tuple[dict[int, int], dict[int, float], set[int], int, float, set[int]]:
    n = draw(st.integers(1, 12))
    sizes = dict(enumerate(draw(st.lists(st.integers(1, 20), min_size=n, max_size=n))))
    rates = st.one_of(st.integers(0, 4).map(float), st.floats(0, 1e6))
    use = dict(enumerate(draw(st.lists(rates, min_size=n, max_size=n))))
    resident = draw(st.sets(st.integers(0, n - 1)))
    keep = draw(st.sets(st.sampled_from(sorted(resident)))) if resident else set()
    held = sum(sizes[key] for key in keep)
    return sizes, use, resident, held + draw(st.integers(0, 120)), draw(st.sampled_from([0.0, 0.25, 1.0])), keep


@settings(max_examples=300, deadline=None)
@given(situations())
def test_wanted_keys_fit_and_are_stable(situation: tuple) -> None:
    sizes, use, resident, budget, margin, keep = situation
    chosen = wanted(sizes, use, resident, budget, margin, keep)
    free = budget - sum(sizes[key] for key in chosen)
    assert free >= 0 and keep <= chosen <= sizes.keys()
    assert all(sizes[key] > free for key in sizes.keys() - chosen), "something fits and is left out"
    assert wanted(sizes, use, chosen, budget, margin, keep) == chosen
    # No key is left out for a larger one that is less used by the margin.
    for out in sizes.keys() - chosen:
        for inside in chosen - keep:
            if sizes[inside] >= sizes[out]:
                assert use[inside] / sizes[inside] * (1 + margin) >= use[out] / sizes[out]


# The table, with loads that are fake


class Value:
    """The value of a fake load."""

    def __init__(self, key: int) -> None:
        self.key = key


class Loads:
    """Fake loads that a test can delay and fail. They count the bytes of live values."""

    def __init__(self, sizes: Mapping[int, int]) -> None:
        self.sizes, self.lock = sizes, threading.Lock()
        self.calls: list[int] = []
        self.live = self.highest = 0
        self.gates: dict[int, threading.Event] = {}
        self.begun = {key: threading.Event() for key in sizes}
        self.errors: dict[int, BaseException] = {}
        self.cost_s, self.now = 0.0, 0.0
        self.refs: list[weakref.ref[Value]] = []

    def __call__(self, key: int) -> Value:
        with self.lock:
            self.calls.append(key)
            self.live += self.sizes[key]
            self.highest = max(self.highest, self.live)
            self.now += self.cost_s
        self.begun[key].set()
        if key in self.gates:
            assert self.gates[key].wait(LONG)
        if key in self.errors:
            self.free(key)
            raise self.errors[key]
        value = Value(key)
        weakref.finalize(value, self.free, key)
        self.refs.append(weakref.ref(value))
        return value

    def free(self, key: int) -> None:
        with self.lock:
            self.live -= self.sizes[key]

    def clock(self) -> float:
        return self.now


EAGER = ResidencySettings(half_life=4, interval=1, min_steps=0)


@contextmanager
def table(
    sizes: list[int], budget: int | None, chosen: ResidencySettings = EAGER
) -> Iterator[tuple[Residency[Value], Loads]]:
    loads = Loads(dict(enumerate(sizes)))
    with Residency(loads.sizes, loads, budget, settings=chosen, clock=loads.clock) as residency:
        yield residency, loads


def steps(residency: Residency[Value], n: int, **rows: int) -> None:
    """Observe n steps with rows of keys `k0`, `k1`, …, and wait for the loads that follow."""
    for _ in range(n):
        residency.observe({int(key[1:]): count for key, count in rows.items()})
        assert residency.wait_for_loads(LONG)


def resident(residency: Residency[Value]) -> tuple[int, ...]:
    return residency.stats().resident


def test_without_a_budget_all_is_loaded_at_the_start() -> None:
    with table([3, 4, 5], None) as (residency, loads):
        assert loads.calls == [0, 1, 2]
        assert all(residency.get(key) is residency.need(key) for key in range(3))
        steps(residency, 50, k0=1)
        stats = residency.stats()
        assert (stats.hits, stats.misses, stats.loads, stats.evictions, stats.stall_s) == (6, 0, 3, 0, 0)
        assert stats.resident_bytes == 12 and stats.resident == (0, 1, 2)


def test_without_a_budget_a_failed_load_is_raised_at_once() -> None:
    loads = Loads({0: 1, 1: 1})
    loads.errors[1] = CorruptArtifact(Path("cluster"), "damaged")
    before = threading.active_count()
    with pytest.raises(CorruptArtifact):
        Residency(loads.sizes, loads, None)
    assert threading.active_count() == before


@pytest.mark.parametrize("budget", [0, 4])
def test_a_value_that_never_fits_is_loaded_for_each_use_and_freed(budget: int) -> None:
    with table([5, 5], budget) as (residency, loads):
        steps(residency, 3, k0=1)
        for n in range(1, 4):
            value = residency.need(0)
            assert value.key == 0 and loads.live == 5
            assert residency.get(0) is None
            del value
            assert loads.live == 0 and residency.stats().loads == n
        assert residency.stats().resident_bytes == residency.stats().evictions == 0


def test_need_keeps_values_that_fit() -> None:
    with table([5, 5, 5], 10) as (residency, loads):
        assert residency.need(2) is residency.get(2) is residency.need(2)
        stats = residency.stats()
        assert (stats.hits, stats.misses, stats.loads, stats.resident) == (2, 1, 1, (2,))


def test_need_replaces_less_used_values() -> None:
    with table([5, 5, 5], 10, ResidencySettings(half_life=4, interval=100, min_steps=0)) as (residency, loads):
        steps(residency, 1, k0=9, k1=1)
        assert resident(residency) == (0, 1)
        steps(residency, 4, k0=9, k2=5)  # no decision yet
        assert residency.need(2).key == 2
        assert resident(residency) == (0, 2) and loads.refs[1]() is None and loads.live == 10
        assert residency.need(1).key == 1  # less used than both
        assert resident(residency) == (0, 2) and loads.live == 10
        assert residency.stats().evictions == 1


def test_the_most_used_keys_are_loaded_ahead() -> None:
    with table([5, 5, 5, 5], 10) as (residency, loads):
        steps(residency, 1, k3=4, k1=9, k0=1)
        assert loads.calls == [1, 3] and resident(residency) == (1, 3)
        assert residency.get(1) is not None and residency.get(0) is None
        steps(residency, 20, k0=8, k1=8)
        assert resident(residency) == (0, 1)
        assert loads.highest == loads.live == 10, "evicted first"
        assert residency.stats().stall_s == 0


def test_free_budget_is_filled_and_reused() -> None:
    with table([5, 5, 5], 10) as (residency, loads):
        steps(residency, 1, k2=1)
        assert loads.calls == [2, 0]
        steps(residency, 1, k1=1)
        assert resident(residency) == (1, 2)


@pytest.mark.parametrize(("margin", "expected"), [(0.25, range(3)), (0.0, range(100, 1000))])
def test_equally_used_keys_do_not_alternate(margin: float, expected: range) -> None:
    """Three keys in turn, room for two: the margin prevents evictions."""
    chosen = ResidencySettings(half_life=64, interval=1, min_steps=0, margin=margin)
    with table([5, 5, 5], 10, chosen) as (residency, _):
        for step in range(400):
            steps(residency, 1, **{f"k{step % 3}": 6})
        assert residency.stats().evictions in expected


def test_a_new_value_stays_for_min_steps() -> None:
    with table([5, 5], 5, ResidencySettings(half_life=1, interval=1, min_steps=10)) as (residency, _):
        steps(residency, 1, k0=1)
        steps(residency, 8, k0=1, k1=50)
        assert resident(residency) == (0,)
        steps(residency, 2, k0=1, k1=50)
        assert resident(residency) == (1,)
        steps(residency, 9, k0=50)
        assert resident(residency) == (1,)
        steps(residency, 2, k0=50)
        assert resident(residency) == (0,)


def test_a_new_value_without_use_does_not_stay() -> None:
    with table([5, 5], 5, ResidencySettings(half_life=1, interval=1, min_steps=1000)) as (residency, _):
        residency.need(0)
        steps(residency, 1, k1=1)
        assert resident(residency) == (1,)


def test_decisions_are_made_at_the_interval() -> None:
    with table([5, 5], 5, ResidencySettings(half_life=1, interval=16, min_steps=0)) as (residency, _):
        steps(residency, 1, k0=1)
        steps(residency, 15, k1=9)
        assert resident(residency) == (0,)
        steps(residency, 1, k1=9)
        assert resident(residency) == (1,)


def test_the_average_has_its_half_life() -> None:
    """After h steps without rows a key has half of its use: a key of just under half replaces it at h + 1."""
    for h in (1, 8, 64):
        with table([1, 1], 1, ResidencySettings(half_life=h, interval=1, min_steps=0, margin=0)) as (residency, _):
            steps(residency, 40 * h, k0=1000)
            quiet = 0
            while resident(residency) == (0,):
                steps(residency, 1, k1=1000)
                quiet += 1
            assert quiet in (h, h + 1)  # 2^(−n/h) against 1 − 2^(−n/h)


@pytest.mark.parametrize("budget", [10, None])
def test_idle_values_are_evicted_and_loaded_again(budget: int | None) -> None:
    chosen = ResidencySettings(half_life=1, interval=1, min_steps=0, floor=0.01, idle_steps=20)
    with table([5, 5], budget, chosen) as (residency, loads):
        steps(residency, 1, k0=1, k1=1)
        steps(residency, 19, k0=1)
        assert resident(residency) == (0, 1)
        steps(residency, 2, k0=1)
        assert resident(residency) == (0,) and loads.live == 5
        steps(residency, 30)
        assert resident(residency) == () and loads.live == 0
        steps(residency, 1, k1=1)
        assert resident(residency) == (1,)
        assert residency.stats().misses == 0


@pytest.mark.parametrize(("half_life", "every"), [(1, 18), (100, 1000)])
def test_rarely_used_keys_are_not_idle(half_life: float, every: int) -> None:
    """Rare use with an average over one step, or no recent use but much before."""
    chosen = ResidencySettings(half_life=half_life, interval=1, floor=0.01, idle_steps=20)
    with table([5], 5, chosen) as (residency, _):
        for step in range(100):
            steps(residency, 1, k0=0 if step % every else 50)
        assert residency.stats().loads == 1 and residency.stats().evictions == 0


def test_idle_values_stay_by_default() -> None:
    with table([5, 5], 10, ResidencySettings(half_life=1, interval=1)) as (residency, _):
        steps(residency, 1, k0=1)
        steps(residency, 2000)
        assert resident(residency) == (0, 1)


def test_eviction_keeps_the_values_of_callers() -> None:
    with table([5, 5], 5) as (residency, loads):
        steps(residency, 1, k0=1)
        held = residency.need(0)
        steps(residency, 20, k1=9)
        assert resident(residency) == (1,) and held.key == 0 and loads.live == 10
        del held
        assert loads.live == 5


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    budget=st.integers(0, 30),
    idle=st.sampled_from([None, 3]),
    uses=st.lists(st.tuples(st.sampled_from(["need", "get", "observe"]), st.integers(0, 5)), max_size=40),
    failing=st.sets(st.integers(0, 5), max_size=2),
)
def test_the_budget_holds_for_any_sequence(
    sizes: list[int], budget: int, idle: int | None, uses: list[tuple[str, int]], failing: set[int]
) -> None:
    chosen = ResidencySettings(half_life=3, interval=2, min_steps=3, floor=0.05, idle_steps=idle, backoff_s=0)
    with table(sizes, budget, chosen) as (residency, loads):
        loads.errors = {key: OSError("gone") for key in failing}
        for what, number in uses:
            key = number % len(sizes)
            if what == "observe":
                loads.highest = loads.live
                steps(residency, 1, **{f"k{key}": 3})
                assert loads.highest <= budget
            elif what == "get":
                value = residency.get(key)
                assert value is None or value.key == key
                del value
            elif key in failing:
                with pytest.raises(OSError, match="gone"):
                    residency.need(key)
            else:
                assert residency.need(key).key == key
            stats = residency.stats()
            assert loads.live == stats.resident_bytes == sum(sizes[key] for key in stats.resident) <= budget
            assert not failing & set(stats.resident)
        stats = residency.stats()
        assert stats.loads + stats.failed == len(loads.calls)
        assert stats.hits + stats.misses == sum(what != "observe" for what, _ in uses)
    assert loads.live == 0


# Threads


def call(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """A thread with a call, and its result or exception."""
    result: list[object] = []

    def run() -> None:
        try:
            result.append(work())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, result


def ended(thread: threading.Thread) -> bool:
    thread.join(LONG)
    return not thread.is_alive()


def test_only_need_waits_for_a_load() -> None:
    with table([5, 5, 5], 10) as (residency, loads):
        steps(residency, 1, k0=9, k1=1)
        loads.gates[2] = threading.Event()
        for _ in range(10):
            residency.observe({0: 9, 2: 9})
        assert loads.begun[2].wait(LONG)
        assert residency.get(2) is None and residency.get(0) is not None
        assert residency.need(0).key == 0
        assert residency.get(1) is None, "room was made before the load began"
        assert residency.need(1).key == 1, "another is loaded beside it, in the caller's thread"
        assert residency.stats().resident == (0,) and not residency.wait_for_loads(0)
        loads.gates[2].set()
        assert residency.wait_for_loads(LONG) and resident(residency) == (0, 2)


def test_the_least_used_value_is_evicted_first() -> None:
    with table([5, 5, 5, 5], 10) as (residency, loads):
        steps(residency, 1, k0=3, k1=2)
        gate = loads.gates[2] = threading.Event()
        for _ in range(20):
            residency.observe({2: 90, 3: 80, 0: 2, 1: 1})
        assert loads.begun[2].wait(LONG)
        assert residency.get(0) is not None and residency.get(1) is None
        gate.set()
        assert residency.wait_for_loads(LONG) and resident(residency) == (2, 3)
        assert loads.calls == [0, 1, 2, 3]


def test_a_value_needed_between_decisions_is_neither_reloaded_nor_evicted() -> None:
    with table([5, 5, 5], 10, ResidencySettings(interval=16, min_steps=0)) as (residency, loads):
        gate = loads.gates[0] = threading.Event()
        residency.observe({0: 9, 1: 2})
        assert loads.begun[0].wait(LONG)
        assert residency.need(2) is residency.get(2)
        gate.set()
        assert residency.wait_for_loads(LONG) and resident(residency) == (0, 2)
        steps(residency, 16, k0=9, k1=2)
        assert resident(residency) == (0, 1)
    with table([5, 5], 10) as (residency, loads):
        gate = loads.gates[0] = threading.Event()
        residency.observe({0: 9, 1: 2})
        assert loads.begun[0].wait(LONG)
        residency.need(1)
        gate.set()
        assert residency.wait_for_loads(LONG) and loads.calls == [0, 1]


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_callers_wait_for_a_load_in_progress(ahead: bool, fails: bool) -> None:
    """Started by the loader thread or by another caller. All of them receive its exception."""
    loads, waiting = Loads({0: 5}), threading.Event()
    gate = loads.gates[0] = threading.Event()
    if fails:
        loads.errors[0] = OSError("gone")

    def clock() -> float:
        # `need` looks at it under the lock, when it knows whom to wait for: who gets the lock next sees it waiting.
        if threading.current_thread() in followers:
            waiting.set()
        return 0.0

    followers: list[threading.Thread] = []
    with Residency(loads.sizes, loads, 5, settings=EAGER, clock=clock) as residency:
        first = None
        if ahead:
            residency.observe({0: 1})
        else:
            first = call(lambda: residency.need(0))
        assert loads.begun[0].wait(LONG)
        begin = threading.Event()
        follower, result = call(lambda: begin.wait(LONG) and residency.need(0))
        followers.append(follower)
        begin.set()
        assert waiting.wait(LONG)
        assert residency.stats().misses == (1 if ahead else 2)
        gate.set()
        assert ended(follower) and residency.wait_for_loads(LONG)
        assert loads.calls == [0]
        if fails:
            assert result == [loads.errors[0]] and residency.stats().failed == 1
        else:
            assert result == [residency.get(0)] and residency.stats().loads == 1
        assert first is None or (ended(first[0]) and first[1] == result)


def test_stall_time_is_counted() -> None:
    with table([5, 5], 5) as (residency, loads):
        loads.cost_s = 2.0
        residency.need(0)
        assert residency.stats().stall_s == 2.0
        residency.need(0)
        steps(residency, 20, k1=9)  # loaded ahead: no caller waits
        residency.need(1)
        assert loads.calls == [0, 1] and residency.stats().stall_s == 2.0


def test_concurrent_callers() -> None:
    sizes = [3, 5, 2, 7, 1, 4]
    with table(sizes, 12, ResidencySettings(half_life=8, interval=2, min_steps=2)) as (residency, loads):
        barrier = threading.Barrier(4)

        def work(seed: int) -> int:
            rng, wrong = random.Random(seed), 0
            barrier.wait(LONG)
            for _ in range(400):
                key = rng.randrange(6)
                residency.observe({key: 1 + rng.randrange(5)})
                found = residency.get(key) or residency.need(key)
                wrong += found.key != key or residency.stats().resident_bytes > 12
            return wrong

        threads = [call(partial(work, seed)) for seed in range(4)]
        assert all(ended(thread) for thread, _ in threads)
        assert [result for _, result in threads] == [[0]] * 4
        assert residency.wait_for_loads(LONG)
        assert loads.live == residency.stats().resident_bytes <= 12
        assert residency.stats().loads == len(loads.calls)


def test_close_ends_the_thread_and_drops_values() -> None:
    with table([5, 5], 10) as (residency, loads):
        thread = residency._thread
        assert thread.daemon and thread.is_alive()
        steps(residency, 1, k0=1)
        assert loads.live == 10
        residency.close()
        assert not thread.is_alive() and loads.live == 0
        residency.close()
        assert residency.get(0) is None and resident(residency) == ()
        assert residency.need(0).key == 0
        assert loads.live == 0
        residency.observe({0: 1})
        assert residency.wait_for_loads(0)


def test_close_during_a_load_keeps_nothing() -> None:
    with table([5, 5], 10) as (residency, loads):
        gates = [loads.gates.setdefault(key, threading.Event()) for key in (0, 1)]
        residency.observe({0: 1})
        assert loads.begun[0].wait(LONG)
        caller, result = call(lambda: residency.need(1))
        assert loads.begun[1].wait(LONG)
        closing, _ = call(residency.close)
        for gate in gates:
            gate.set()
        assert ended(closing) and ended(caller) and not residency._thread.is_alive()
        assert [value.key for value in result] == [1]  # type: ignore[attr-defined]
        result.clear()
        assert loads.live == 0 and sorted(loads.calls) == [0, 1]


# Failures


def test_need_raises_what_the_load_raises() -> None:
    with table([5, 5], 10) as (residency, loads):
        for error in (OSError("gone"), CorruptArtifact(Path("c"), "damaged"), KeyboardInterrupt()):
            loads.errors[0] = error
            with pytest.raises(type(error)):
                residency.need(0)
        assert residency.stats().failed == 3 and residency.stats().resident_bytes == 0
        del loads.errors[0]
        assert residency.need(0) is residency.get(0), "its room was given back"


def test_a_failed_load_ahead_is_logged_once_and_retried(caplog: pytest.LogCaptureFixture) -> None:
    chosen = ResidencySettings(half_life=4, interval=1, min_steps=0, backoff_s=1, backoff_max_s=4)
    with table([5, 5], 5, chosen) as (residency, loads), caplog.at_level(logging.WARNING):
        loads.errors[0] = SystemExit("whatever it is")
        tried = []
        for second in range(20):
            loads.now = float(second)
            before = loads.calls.count(0)
            steps(residency, 5, k0=9, k1=1)
            assert loads.calls.count(0) <= before + 1
            if loads.calls.count(0) > before:
                tried.append(second)
            assert resident(residency) == (1,), "meanwhile the room is another's"
        assert tried == [0, 1, 3, 7, 11, 15, 19]
        assert residency.stats().failed == 7 and residency._thread.is_alive()
        assert [record.message for record in caplog.records] == [
            "loading 0 ahead of its use failed; retrying later: SystemExit('whatever it is')"
        ]
        error = loads.errors.pop(0)
        loads.now = 23.0
        steps(residency, 1, k0=9, k1=1)
        assert resident(residency) == (0,)
        loads.errors[0] = error
        steps(residency, 60, k1=9)  # 0 leaves
        steps(residency, 60, k0=9)
        assert len(caplog.records) == 2, "it had worked in between"


def test_a_failed_load_frees_its_memory() -> None:
    """At once, not at the next garbage collection: the partial value may be large."""
    partly: list[weakref.ref[Value]] = []

    def load(key: int) -> Value:
        value = Value(key)
        partly.append(weakref.ref(value))
        raise OSError("gone")

    gc.collect()
    gc.disable()
    try:
        with Residency({0: 1}, load, 1, settings=EAGER) as residency:
            try:
                residency.need(0)
            except OSError as error:
                assert "load" in {entry.name for entry in traceback.extract_tb(error.__traceback__)}, (
                    "the traceback names the load"
                )
            residency._failing.clear()
            residency.observe({0: 1})
            assert residency.wait_for_loads(LONG)
            assert len(partly) == 2 and [ref() for ref in partly] == [None, None]
    finally:
        gc.enable()


def test_unknown_keys_and_invalid_settings() -> None:
    with table([1], 1) as (residency, _):
        for use in (lambda: residency.need(7), lambda: residency.observe({7: 1})):
            with pytest.raises(KeyError):
                use()
    for sizes, budget in (({0: 0}, 1), ({0: 1}, -1)):
        with pytest.raises(ValueError, match="is not allowed"):
            Residency(sizes, Value, budget)
    for name, value in (
        ("half_life", 0), ("half_life", math.nan), ("interval", 0), ("interval", 10**6), ("margin", -1), ("min_steps", -1), ("floor", -1),
        ("idle_steps", -1), ("backoff_s", -1), ("backoff_max_s", 0.5),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}={value}"):
            ResidencySettings(**{name: value})


# Real clusters


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return served.artifact(tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize("kernels", ["native", "packed", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [{}, {"residual_width": 0}, {"expert_kind": "private"}, {"expert_kind": "private", "base_width": 24}],
)
def test_sizes_are_those_of_loaded_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, changes: dict, kernels: str
) -> None:
    def choose() -> None:
        if kernels != "native":
            monkeypatch.setenv("RAYMOE_NATIVE", "0")
        if kernels == "plain":
            monkeypatch.setattr(Product, "packs", staticmethod(lambda _: False))

    choose()
    artifact = served.artifact(tmp_path, dataclasses.replace(served.MODEL, **changes))
    monkeypatch.setattr(Artifact, "cluster", None)  # the sizes need no weights
    sizes = cluster_sizes(artifact, dtype)
    monkeypatch.undo()
    choose()
    held = LocalClusters(artifact, range(3), dtype).clusters
    assert sizes == {c: sum(held[layer, c].bytes for layer in range(2)) for c in range(3)}
    if kernels == "plain" and artifact.model.has_members:
        model, experts = artifact.model, [len([e for row in served.UNEVEN for e in row if e == c]) for c in range(3)]
        d, f, w = model.d_model, model.cluster_base_width, model.residual_width
        expert = 3 * d * model.private_width if model.expert_kind == "private" else 3 * d * w + 3 * w * f
        for c, e in enumerate(experts):
            wide = 2 * d * 3 * f + e * expert  # two layers
            assert sizes[c] == wide * dtype.itemsize + e * (d + 1) * 4


def rows_of(seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1 + seed % 9, served.MODEL.d_model, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_do_not_depend_on_residency(artifact: Artifact, dtype: torch.dtype) -> None:
    sizes, whole = cluster_sizes(artifact, dtype), LocalClusters(artifact, range(3), dtype)

    def load(c: int) -> dict[int, Cluster]:
        tensors = artifact.cluster(c)
        return {layer: Cluster(artifact.model, tensors, layer, c, dtype) for layer in range(artifact.model.layers)}

    @settings(max_examples=15, deadline=None)
    @given(
        budget=st.sampled_from([None, 0, max(sizes.values()), sum(sizes.values())]),
        uses=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 99)), min_size=1, max_size=25),
    )
    def check(budget: int | None, uses: list[tuple[int, int, int]]) -> None:
        chosen = ResidencySettings(half_life=2, interval=1, min_steps=0, idle_steps=4, floor=0.1)
        with Residency(sizes, load, budget, settings=chosen) as residency:
            for c, layer, seed in uses:
                rows = rows_of(seed, dtype)
                held = residency.need(c)
                residency.observe({c: rows.shape[0]})  # it may be evicted while it computes
                assert torch.equal(held[layer](rows), whole(layer, {c: rows})[c])
            assert residency.wait_for_loads(LONG)
            assert residency.stats().resident_bytes <= (sum(sizes.values()) if budget is None else budget)

    with torch.inference_mode():
        check()


def test_a_damaged_cluster_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    artifact = served.artifact(tmp_path)
    (artifact.folder / cluster_file(1)).write_bytes(b"not this")
    sizes = cluster_sizes(artifact, torch.float32)
    with Residency(sizes, lambda c: LocalClusters(artifact, [c], torch.float32), sum(sizes.values())) as residency:
        residency.observe({0: 1, 1: 9, 2: 1})
        assert residency.wait_for_loads(LONG)
        assert residency.stats().resident == (0, 2) and residency.stats().failed == 1
        with pytest.raises(CorruptArtifact):
            residency.need(1)
    assert len(caplog.records) == 1
