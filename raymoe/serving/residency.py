"""Resident values within a byte budget: the weights of the most used clusters. Others are loaded on demand.

`residency_policy.py` decides from recent use, every few steps, which keys should be resident; a thread loads them
ahead of their use.

A key's size is the bytes of its value in the compute type. The budget covers resident values and loads that will be
kept. Temporary memory of `load`, and values that callers hold but the table does not, are not counted. Eviction drops
the table's reference: a caller that still computes with the value keeps it alive.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from ctypes import CDLL
from dataclasses import dataclass
from typing import Generic, TypeVar

from raymoe.serving.residency_policy import ResidencySettings, Use, wanted

V = TypeVar("V")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResidencyStats:
    """Counts since the start, and the resident keys."""

    hits: int
    """Calls of `get` and `need` that found a resident value."""
    misses: int
    """Calls that did not."""
    loads: int
    """Successful loads: ahead of use, for `need`, or at the start."""
    failed: int
    """Failed loads."""
    evictions: int
    stall_s: float
    """Seconds that callers waited in `need`, summed over threads."""
    resident_bytes: int
    resident: tuple[int, ...]
    """Keys in ascending order."""


class _Load(Generic[V]):
    """A load in progress, which any number of callers may wait for. `kept`: its value becomes resident."""

    def __init__(self, key: int, kept: bool) -> None:
        self.key, self.kept, self.done = key, kept, False
        self.value: V | None = None
        self.error: BaseException | None = None


@dataclass
class _Failing:
    """A key whose last load failed."""

    delay: float
    retry_at: float
    logged: bool = False


def trim() -> None:
    """Return freed memory to the system, which glibc otherwise keeps. Does nothing with other C libraries."""
    with suppress(OSError, AttributeError):
        CDLL(None).malloc_trim(0)


class Residency(Generic[V]):
    """Values by key (cluster id -> its weights) within a byte budget. Other values are loaded on demand.

    sizes: bytes of each key's value. load: key -> value, never None; called without a lock, from the threads that
    call `need` and from the loader thread. budget: bytes; 0 keeps nothing, None loads every key now and passes on
    the exceptions of loads. Raises ValueError for sizes below 1 or a budget below 0. Close it, or use it in a `with`.
    """

    def __init__(
        self,
        sizes: Mapping[int, int],
        load: Callable[[int], V],
        budget: int | None,
        *,
        settings: ResidencySettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for key, size in sizes.items():
            if size < 1:
                raise ValueError(f"sizes[{key}]={size} is not allowed: 1 byte or more")
        if budget is not None and budget < 0:
            raise ValueError(f"budget={budget} is not allowed: 0 bytes or more, or None for all")
        self._sizes, self._load, self._clock = dict(sizes), load, clock
        self._budget = sum(sizes.values()) if budget is None else budget
        self._settings = settings or ResidencySettings()

        self._changed = threading.Condition()  # guards everything below
        self._values: dict[int, V] = {}
        self._loading: dict[int, _Load[V]] = {}
        self._taken = 0  # bytes of values, and of loads that will be kept
        self._dropped: list[V] = []  # evicted; freed outside of the lock, because freeing is slow
        self._failing: dict[int, _Failing] = {}
        self._use = Use(self._sizes, self._settings.half_life)
        self._since: dict[int, int] = {}  # step of each load
        self._target: set[int] = set()  # keys that should be resident
        self._queue: list[int] = []  # keys to load, most used first
        self._due = 0  # step of the next decision
        self._hits = self._misses = self._loads = self._failed = self._evictions = 0
        self._stall_s = 0.0
        self._closed = self._working = False

        if budget is None:
            for key in sorted(self._sizes):
                self._values[key] = load(key)
                self._since[key] = 0
                self._loads += 1
            self._taken, self._target = self._budget, set(self._sizes)
        self._thread = threading.Thread(target=self._run, name="residency-loader", daemon=True)
        self._thread.start()

    def get(self, key: int) -> V | None:
        """Return the value if it is resident, else None. Never waits for a load."""
        with self._changed:
            value = self._values.get(key)
            if value is None:
                self._misses += 1
            else:
                self._hits += 1
            return value

    def need(self, key: int) -> V:
        """Return the value; load it, or wait for a load in progress, unless it is resident.

        The value becomes resident if it fits, in place of less used ones if necessary. Otherwise the caller has the
        only reference and keeps it for as long as it computes. Raises KeyError for an unknown key, and the exception
        of the load: OSError or ValueError for missing or damaged files.
        """
        with self._changed:
            value = self._values.get(key)
            if value is not None:
                self._hits += 1
                return value
            if key not in self._sizes:
                raise KeyError(key)
            started = self._clock()
            self._misses += 1
            pending = self._loading.get(key)
            ours = pending is None
            if pending is None:
                pending = self._begin(key, self._admit(key))
            dropped = self._take_dropped()
        dropped.clear()
        try:
            if ours:
                self._run_load(pending)
            else:
                with self._changed:
                    self._changed.wait_for(lambda: pending.done)
        finally:
            with self._changed:
                self._stall_s += self._clock() - started
        if pending.error is not None:
            try:
                raise pending.error
            finally:
                del pending  # as in `_run_load`
        assert pending.value is not None
        return pending.value

    def observe(self, rows: Mapping[int, int]) -> None:
        """Record the rows of each key in one step, summed over layers. Raises KeyError for an unknown key."""
        with self._changed:
            if self._closed:
                return
            self._use.observe(rows)
            if self._use.step >= self._due:
                self._decide()

    def wait_for_loads(self, timeout: float | None = None) -> bool:
        """Wait until every decided load has ended. Return False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._closed or not (self._working or self._queue or self._loading or self._dropped), timeout
            )

    def stats(self) -> ResidencyStats:
        with self._changed:
            return ResidencyStats(
                self._hits,
                self._misses,
                self._loads,
                self._failed,
                self._evictions,
                self._stall_s,
                sum(self._sizes[key] for key in self._values),
                tuple(sorted(self._values)),
            )

    def close(self) -> None:
        """End the loader thread after its current load and drop all values. Afterwards nothing becomes resident."""
        with self._changed:
            self._closed = True
            self._taken -= sum(self._sizes[key] for key in self._values)
            self._values.clear()
            self._queue.clear()
            self._dropped.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Residency[V]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Decisions. The caller has the lock.

    def _decide(self) -> None:
        """Decide which keys should be resident: evict the idle ones and queue loads."""
        settings = self._settings
        self._due = self._use.step + settings.interval
        self._use.update()
        idle: set[int] = set()
        if settings.idle_steps is not None:
            idle = self._use.idle(settings.floor, settings.idle_steps)
            for key in idle & self._values.keys():
                self._evict(key)
        now = self._clock()
        waiting = {key for key, failing in self._failing.items() if now < failing.retry_at}
        held = self._values.keys() | self._coming()
        candidates = {key: size for key, size in self._sizes.items() if key in held or key not in idle | waiting}
        self._target = self._wanted(candidates, held)
        self._queue = sorted(self._target - held, key=self._use_per_byte, reverse=True)
        if self._queue or self._dropped:
            self._changed.notify_all()

    def _wanted(self, candidates: Mapping[int, int], held: Set[int]) -> set[int]:
        keep = self._coming() | self._young()
        return wanted(candidates, self._use.average, held, self._budget, self._settings.margin, keep)

    def _coming(self) -> set[int]:
        """Return the keys whose loads will be kept."""
        return {pending.key for pending in self._loading.values() if pending.kept}

    def _admit(self, key: int) -> bool:
        """Decide whether a key that a caller needs becomes resident, and make room for it."""
        self._use.update()
        held = self._values.keys() | self._coming()
        plan = self._wanted({each: self._sizes[each] for each in held | {key}}, held)
        if key not in plan or not self._make_room(key, plan):
            return False
        self._target.add(key)
        return True

    def _young(self) -> set[int]:
        """Return the used keys that were loaded less than `min_steps` ago."""
        oldest, use = self._use.step - self._settings.min_steps, self._use.average
        return {key for key in self._values if self._since[key] > oldest and use[key] >= self._settings.floor}

    def _use_per_byte(self, key: int) -> float:
        return self._use.average[key] / self._sizes[key]

    def _make_room(self, key: int, plan: Set[int]) -> bool:
        """Evict keys outside `plan`, the least used first, until `key` fits. Evict none if it cannot fit."""
        missing = self._taken + self._sizes[key] - self._budget
        victims = []
        for victim in sorted(self._values.keys() - plan, key=self._use_per_byte):
            if missing <= 0:
                break
            victims.append(victim)
            missing -= self._sizes[victim]
        if missing > 0:
            return False
        for victim in victims:
            self._evict(victim)
        return True

    def _evict(self, key: int) -> None:
        self._dropped.append(self._values.pop(key))
        self._taken -= self._sizes[key]
        self._evictions += 1

    def _take_dropped(self) -> list[V]:
        dropped, self._dropped = self._dropped, []
        return dropped

    # Loads

    def _begin(self, key: int, kept: bool) -> _Load[V]:
        """Register a load. The caller has the lock and has made room."""
        pending = self._loading[key] = _Load(key, kept)
        if kept:
            self._taken += self._sizes[key]
        return pending

    def _run_load(self, pending: _Load[V]) -> None:
        """Load without the lock. An exception is stored in `pending.error`."""
        key = pending.key
        try:
            pending.value = self._load(key)
        except BaseException as error:  # passed on to every caller that waits
            pending.error = error
        with self._changed:
            del self._loading[key]
            if pending.error is None:
                assert pending.value is not None
                self._loads += 1
                self._failing.pop(key, None)
            else:
                self._failed += 1
                self._delay(key)
            if pending.kept and pending.error is None and not self._closed:
                self._values[key] = pending.value  # type: ignore[assignment]
                self._since[key] = self._use.step
            elif pending.kept:
                self._taken -= self._sizes[key]
            pending.done = True
            self._changed.notify_all()
        # The exception's traceback refers to this frame and its callers. If they still referred to `pending`, the
        # memory of a failed load would be freed only by the garbage collector.
        del pending

    def _delay(self, key: int) -> None:
        """Set when the loader tries a failed key again. The caller has the lock."""
        settings, failing = self._settings, self._failing.get(key)
        if failing is None:
            failing = self._failing[key] = _Failing(settings.backoff_s, 0.0)
        else:
            failing.delay = min(2 * failing.delay, settings.backoff_max_s)
        failing.retry_at = self._clock() + failing.delay

    def _run(self) -> None:
        while self._run_once():
            pass

    def _run_once(self) -> bool:
        """Do one load or free evicted values. Return False after `close`.

        A function of its own, so that the thread refers to no value while it waits.
        """
        with self._changed:
            self._working = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or self._queue or self._dropped)
            if self._closed:
                return False
            self._working = True
            pending = self._next()
            dropped = self._take_dropped()
        dropped.clear()
        if pending is not None:
            self._run_load(pending)
            if pending.error is not None:
                self._report(pending.key, pending.error)
        del pending  # as in `_run_load`
        trim()
        return True

    def _next(self) -> _Load[V] | None:
        """Return the next load that fits. Others wait for the next decision."""
        while self._queue:
            key = self._queue.pop(0)
            if key not in self._values and key not in self._loading and self._make_room(key, self._target):
                return self._begin(key, kept=True)
        return None

    def _report(self, key: int, error: BaseException) -> None:
        """Log the first failure of a key."""
        with self._changed:
            failing = self._failing.get(key)
            if failing is None or failing.logged:  # it has been loaded since, or is logged
                return
            failing.logged = True
        _log.warning("loading %s ahead of its use failed; retrying later: %s", key, repr(error))
