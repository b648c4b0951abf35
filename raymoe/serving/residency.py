"""What rests in fast memory, up to a byte budget: the weights of the clusters in use, the others where they came from.

`wanted` decides, `Residency` does it. The use of a key is a moving average of what the router chose in recent
steps; from it every few steps is decided what should be resident, and a thread loads that ahead of its use.

A key's size is the bytes of its value in the compute type. They are counted for what is kept and for what is
being loaded to be kept; what `load` needs beside its result, and values handed out but not kept, come on top.
Evicting drops the table's reference: a caller that still computes with the value keeps it alive until it is done.

For a GPU, `load` puts the weights on the device, say from pinned host memory, and the budget is of its memory.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Set
from contextlib import suppress
from ctypes import CDLL
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from raymoe.config import check_field

V = TypeVar("V")
_log = logging.getLogger(__name__)


def wanted(
    sizes: Mapping[int, int],
    use: Mapping[int, float],
    resident: Collection[int],
    budget: int,
    margin: float,
    keep: Set[int] = frozenset(),
) -> set[int]:
    """The keys that should be resident: the most used for their bytes first, each that still fits into `budget`.

    sizes: bytes (1 or more) of each key that may be chosen. use: rows per step. What is resident counts
    (1 + margin) times, so a newcomer must beat it by that, and goes first among equals. `keep`, which must fit,
    stays whatever its use. Asked again with its own answer as `resident`, the answer is the same.
    """
    chosen = set(keep)
    free = budget - sum(sizes[key] for key in chosen)

    def rank(key: int) -> tuple[float, bool, int]:
        inside = key in resident
        return -use[key] / sizes[key] * (1 + margin if inside else 1), not inside, key

    for key in sorted(sizes.keys() - chosen, key=rank):
        if sizes[key] <= free:
            chosen.add(key)
            free -= sizes[key]
    return chosen


@dataclass(frozen=True)
class ResidencySettings:
    half_life: float = 256.0
    """Steps after which a row counts half."""
    interval: int = 16
    """Steps from one decision to the next."""
    margin: float = 0.25
    """By how much a newcomer's use must exceed that of what it replaces, so that equals do not take turns."""
    min_steps: int = 64
    """Steps for which what was loaded stays, while it is used."""
    floor: float = 1e-3
    """Average rows per step below which a key is unused."""
    idle_steps: int | None = None
    """Unused keys without a row for so many steps give their memory back though nobody else wants it. None: never."""
    backoff_s: float = 1.0
    """Seconds from a failed load to the next one ahead of use; twice as many after each further failure."""
    backoff_max_s: float = 60.0
    """At most."""

    def __post_init__(self) -> None:
        require = partial(check_field, self)
        require("half_life", "greater than 0", self.half_life > 0)
        require("interval", "1 to 500 half-lives", 1 <= self.interval <= 500 * self.half_life)  # weights are floats
        for name in ("margin", "min_steps", "floor", "backoff_s"):
            require(name, "0 or more", getattr(self, name) >= 0)
        require("idle_steps", "0 or more, or None", self.idle_steps is None or self.idle_steps >= 0)
        require("backoff_max_s", "at least backoff_s", self.backoff_max_s >= self.backoff_s)


@dataclass(frozen=True)
class ResidencyStats:
    """Counts since the start, and what is resident now."""

    hits: int
    """Calls of `get` and `need` that found the value."""
    misses: int
    loads: int
    """That succeeded: ahead of use, for `need`, or at the start."""
    failed: int
    evictions: int
    stall_s: float
    """Seconds that callers waited in `need`, of all threads together."""
    resident_bytes: int
    resident: tuple[int, ...]
    """Keys, in order."""


class _Flight(Generic[V]):
    """A load under way, for all who wait for it."""

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
    """Give memory that was freed back to the system; the C library keeps it else. Does nothing where that is not glibc."""
    with suppress(OSError, AttributeError):
        CDLL(None).malloc_trim(0)


class Residency(Generic[V]):
    """Values by key (a cluster's id -> what computes it) up to a byte budget; the others are loaded when asked for.

    sizes: bytes of each key's value. load: key -> value, never None; it is called without a lock, from the threads
    that call `need` and from one of its own. budget: bytes, 0 keeps nothing; None loads everything now, and raises
    what a load raises. Raises ValueError for sizes below 1 or a budget below 0. To be closed, or used in a `with`.
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
        self._decay = 0.5 ** (1 / self._settings.half_life)

        self._changed = threading.Condition()  # guards all that follows
        self._values: dict[int, V] = {}
        self._flights: dict[int, _Flight[V]] = {}
        self._taken = 0  # bytes of values, and of flights that will be kept
        self._dropped: list[V] = []  # evicted; freed outside of the lock, which takes its time
        self._failing: dict[int, _Failing] = {}
        self._use = dict.fromkeys(self._sizes, 0.0)
        self._recent = dict.fromkeys(self._sizes, 0.0)  # weighted rows since `_use` was brought up to date
        self._weight = 1.0  # of a row of this step there
        self._last = dict.fromkeys(self._sizes, 0)  # step of the last row, or soon after
        self._since: dict[int, int] = {}  # step of arrival
        self._target: set[int] = set()  # what is not to be evicted
        self._queue: list[int] = []  # what is to be loaded, most used first
        self._step = self._due = 0
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
        """The value if it is resident; never waits for a load."""
        with self._changed:
            value = self._values.get(key)
            if value is None:
                self._misses += 1
            else:
                self._hits += 1
            return value

    def need(self, key: int) -> V:
        """The value, loaded now, or by whoever loads it already, unless it is resident.

        It is kept if it fits, where need be in the place of what is used less. Otherwise the caller has the only
        reference: one that goes through layers holds it for its step. Raises KeyError for an unknown key, and what
        the load raises: OSError or ValueError for files that are gone or damaged.
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
            flight = self._flights.get(key)
            ours = flight is None
            if flight is None:
                flight = self._begin(key, self._admit(key))
            dropped = self._take_dropped()
        dropped.clear()
        try:
            if ours:
                self._fly(flight)
            else:
                with self._changed:
                    self._changed.wait_for(lambda: flight.done)
        finally:
            with self._changed:
                self._stall_s += self._clock() - started
        if flight.error is not None:
            try:
                raise flight.error
            finally:
                del flight  # as in `_fly`
        assert flight.value is not None
        return flight.value

    def observe(self, rows: Mapping[int, int]) -> None:
        """Rows of each key in one step, of all layers together. Raises KeyError for an unknown key."""
        with self._changed:
            if self._closed:
                return
            self._step += 1
            self._weight /= self._decay
            recent, weight = self._recent, self._weight
            for key, count in rows.items():
                recent[key] += weight * count
            if self._step >= self._due:
                self._decide()

    def settle(self, timeout: float | None = None) -> bool:
        """Wait until all that was decided is loaded, or has failed; False if that takes more than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._closed or not (self._working or self._queue or self._flights or self._dropped), timeout
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
        """End the thread, after the load that it is in, and let everything go. Then `get` finds nothing and `need` keeps nothing."""
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

    # Decisions, under the lock

    def _average(self) -> None:
        """Bring the use up to this step. In between only the rows are noted, later ones with more weight."""
        past = 1 / self._weight
        for key, rows in self._recent.items():
            self._use[key] = past * (self._use[key] + (1 - self._decay) * rows)
            if rows:
                self._last[key] = self._step
                self._recent[key] = 0.0
        self._weight = 1.0

    def _decide(self) -> None:
        """What should be resident from now on."""
        settings = self._settings
        self._due = self._step + settings.interval
        self._average()
        idle: set[int] = set()
        if settings.idle_steps is not None:
            before = self._step - settings.idle_steps
            idle = {key for key, use in self._use.items() if use < settings.floor and self._last[key] < before}
            for key in idle & self._values.keys():
                self._evict(key)
        now = self._clock()
        resting = {key for key, failing in self._failing.items() if now < failing.retry_at}
        coming = {flight.key for flight in self._flights.values() if flight.kept}
        held = self._values.keys() | coming
        choice = {key: size for key, size in self._sizes.items() if key in held or key not in idle | resting}
        self._target = wanted(choice, self._use, held, self._budget, settings.margin, coming | self._young())
        self._queue = sorted(self._target - held, key=self._heat, reverse=True)
        if self._queue or self._dropped:
            self._changed.notify_all()

    def _admit(self, key: int) -> bool:
        """Whether `key`, which is being asked for, is to be kept; then there is room for it."""
        self._average()
        coming = {flight.key for flight in self._flights.values() if flight.kept}
        held = self._values.keys() | coming
        choice = {each: self._sizes[each] for each in held | {key}}
        plan = wanted(choice, self._use, held, self._budget, self._settings.margin, coming | self._young())
        if key not in plan or not self._make_room(key, plan):
            return False
        self._target.add(key)
        return True

    def _young(self) -> set[int]:
        """What arrived lately and is used."""
        oldest = self._step - self._settings.min_steps
        return {key for key in self._values if self._since[key] > oldest and self._use[key] >= self._settings.floor}

    def _heat(self, key: int) -> float:
        return self._use[key] / self._sizes[key]

    def _make_room(self, key: int, plan: Set[int]) -> bool:
        """Evict what is not in `plan`, the least used first, until `key` fits; nothing if it cannot."""
        missing = self._taken + self._sizes[key] - self._budget
        victims = []
        for victim in sorted(self._values.keys() - plan, key=self._heat):
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

    def _begin(self, key: int, kept: bool) -> _Flight[V]:
        """Under the lock, after room was made."""
        flight = self._flights[key] = _Flight(key, kept)
        if kept:
            self._taken += self._sizes[key]
        return flight

    def _fly(self, flight: _Flight[V]) -> None:
        """Load, without the lock. What goes wrong is in the flight afterwards."""
        key = flight.key
        try:
            flight.value = self._load(key)
        except BaseException as error:  # whatever it is, those who wait must hear of it
            flight.error = error
        with self._changed:
            del self._flights[key]
            if flight.error is None:
                assert flight.value is not None
                self._loads += 1
                self._failing.pop(key, None)
            else:
                self._failed += 1
                self._put_off(key)
            if flight.kept and flight.error is None and not self._closed:
                self._values[key] = flight.value  # type: ignore[assignment]
                self._since[key] = self._step
            elif flight.kept:
                self._taken -= self._sizes[key]
            flight.done = True
            self._changed.notify_all()
        # An error holds this frame and its callers': were the flight still in them, only a collection would free
        # what a failed load had read.
        del flight

    def _put_off(self, key: int) -> None:
        settings, failing = self._settings, self._failing.get(key)
        if failing is None:
            failing = self._failing[key] = _Failing(settings.backoff_s, 0.0)
        else:
            failing.delay = min(2 * failing.delay, settings.backoff_max_s)
        failing.retry_at = self._clock() + failing.delay

    def _run(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """One thing to do for the thread; False at the end. A function, so that it holds no value while it waits."""
        with self._changed:
            self._working = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or self._queue or self._dropped)
            if self._closed:
                return False
            self._working = True
            flight = self._next()
            dropped = self._take_dropped()
        dropped.clear()
        if flight is not None:
            self._fly(flight)
            if flight.error is not None:
                self._report(flight.key, flight.error)
        del flight  # as in `_fly`
        trim()
        return True

    def _next(self) -> _Flight[V] | None:
        """The next load that there is room for; the others wait for the next decision."""
        while self._queue:
            key = self._queue.pop(0)
            if key not in self._values and key not in self._flights and self._make_room(key, self._target):
                return self._begin(key, kept=True)
        return None

    def _report(self, key: int, error: BaseException) -> None:
        with self._changed:
            failing = self._failing.get(key)
            if failing is None or failing.logged:  # loaded since, or known
                return
            failing.logged = True
        _log.warning("%s could not be loaded ahead of its use, and is tried again later: %s", key, repr(error))
