"""The clusterer: merges the statistics of all workers, plans outside the training path, and returns its decisions.

A plain class; the driver starts it as an actor. Each message carries all statistics of its worker and the
assignment. A lost message or a restarted actor therefore loses only the measured gain of the last plan.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from raymoe.clustering.plan import Assignment, RemapPlan, moves
from raymoe.clustering.planner import NoPlan, NoPlanReason, make_plan, measured_gain
from raymoe.clustering.similarity import NotSampled, similarity
from raymoe.clustering.statistics import Statistics, check, merge
from raymoe.config import from_dict

MAX_DECISIONS = 64
"""Decisions kept until rank 0 polls; older ones are dropped."""

MAX_SIMILARITY_EXPERTS = 64
"""Largest number of experts in a layer for which plans carry a similarity matrix."""


@dataclass(frozen=True)
class Message:
    """Statistics of one worker, sent every `regroup.stats_every` steps."""

    attempt: int
    """Number of the worker group. A later group restarted from a checkpoint."""
    rank: int
    world: int
    assignment: tuple[tuple[int, ...], ...]
    """Assignment of the statistics' version."""
    forced: bool
    """Whether the plan that `regroup.force` requires was applied."""
    statistics: Statistics
    """All statistics that this worker gathered under the assignment."""


@dataclass(frozen=True)
class PlanMade:
    """Decision: a new plan."""

    plan: RemapPlan
    seconds: float
    similarity: dict[str, Any] | None
    """Similarity matrix of one layer for the report (see `Clusterer._similarity_record`)."""


@dataclass(frozen=True)
class NoPlanMade:
    """Decision: no plan for this period."""

    no_plan: NoPlan
    seconds: float | None


@dataclass(frozen=True)
class GainMeasured:
    """Gain of an applied plan, measured on statistics since."""

    version: int
    gain: float
    similarity: dict[str, Any] | None


Decision = PlanMade | NoPlanMade | GainMeasured


@dataclass(frozen=True)
class ClustererStatus:
    """The clusterer's response to a poll of rank 0."""

    incarnation: int
    """Identifies the process: a new incarnation has lost its statistics."""
    step: int
    """Latest step that every worker has reported, -1 before one."""
    decisions: tuple[Decision, ...]
    """Decisions since the last poll."""
    refused_messages: int
    """Number of malformed messages."""


class Clusterer:
    """Makes plans from statistics. `config` is the configuration of a run, as a dict."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = from_dict(config)
        self._incarnation = time.time_ns()
        self._refused = 0
        self._reset(-1)

    def _reset(self, attempt: int) -> None:
        self._attempt = attempt
        self._by_rank: dict[int, Statistics] = {}
        self._last: Message | None = None
        self._planned_at = -1
        self._decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self._before: dict[int, Assignment] = {}
        """Assignment before each plan of which the gain is not measured yet, by version."""

    def observe(self, message: Message) -> None:
        """Receive a message. Malformed messages are counted; messages of an earlier attempt are dropped."""
        model = self.config.model
        try:
            if not isinstance(message, Message):
                raise ValueError(f"{type(message).__name__} is not a message")
            check(message.statistics, model.layers, model.n_experts, model.d_model)
        except ValueError:
            self._refused += 1
            return
        if message.attempt < self._attempt:
            return
        if message.attempt > self._attempt:
            self._reset(message.attempt)
        known, new = self._by_rank.get(message.rank), message.statistics
        if known is None or (new.version, new.step) >= (known.version, known.step):
            self._by_rank[message.rank] = new
        if self._last is None or message.statistics.version >= self._last.statistics.version:
            self._last = message
        self._plan_if_due(self._last)

    def _reported_step(self, world: int) -> int:
        """Return the latest step that all ranks have reported under the newest version, -1 before one."""
        newest = max(s.version for s in self._by_rank.values())
        steps = [s.step for s in self._by_rank.values() if s.version == newest]
        return min(steps) if len(steps) == world else -1

    def _plan_if_due(self, last: Message) -> None:
        reported = self._reported_step(last.world)
        at = reported - reported % self.config.period
        if reported < 0 or at < self.config.regroup.burn_in or at <= self._planned_at:
            return
        self._planned_at = at
        try:
            self._plan(last, at)
        except Exception as error:  # training continues, and its records contain the reason
            detail = f"{type(error).__name__}: {error}"
            self._decisions.append(NoPlanMade(NoPlan(reported, NoPlanReason.FAILED, detail, 0.0), None))

    def _plan(self, last: Message, at: int) -> None:
        """Decide on the statistics of the period that ended at step `at`."""
        regroup, n_clusters = self.config.regroup, self.config.model.n_clusters
        stats = self._by_rank[0]
        for rank in range(1, last.world):  # in rank order, so that sums do not depend on the order of arrival
            stats = merge(stats, self._by_rank[rank])
        self._measure_gain(stats, last.assignment)
        started = time.perf_counter()
        made = make_plan(
            stats, last.assignment, regroup=regroup, n_clusters=n_clusters, seed=self.config.run.seed,
            force=self.must_force(at, last),
        )  # fmt: skip
        seconds = time.perf_counter() - started
        if isinstance(made, RemapPlan):
            self._before[made.version] = last.assignment
            shown = self._similarity_record(stats, last.assignment, made.assignment)
            self._decisions.append(PlanMade(made, seconds, shown))
        else:
            self._decisions.append(NoPlanMade(made, seconds))

    def must_force(self, at: int, last: Message) -> bool:
        """Return whether the plan of the period that ended at step `at` is the one that `regroup.force` requires."""
        return 0 < self.config.regroup.force <= at and not last.forced

    def _measure_gain(self, stats: Statistics, assignment: Assignment) -> None:
        before = self._before.pop(stats.version, None)
        if before is None:
            return
        regroup, n_clusters = self.config.regroup, self.config.model.n_clusters
        try:
            gain = measured_gain(stats, before, assignment, regroup=regroup, n_clusters=n_clusters)
            shown = self._similarity_record(stats, before, assignment)
        except NotSampled:
            return  # an interruption cut the first period after the plan short
        self._decisions.append(GainMeasured(stats.version, gain, shown))

    def _similarity_record(self, stats: Statistics, before: Assignment, after: Assignment) -> dict[str, Any] | None:
        """Return the similarity matrix of the layer that changes most, for the report.

        None for layers with more than `MAX_SIMILARITY_EXPERTS` experts.
        """
        if self.config.model.n_experts > MAX_SIMILARITY_EXPERTS:
            return None
        changed = [move.layer for move in moves(before, after)]
        layer = max(changed, key=changed.count)
        regroup = self.config.regroup
        matrix_EE = similarity(stats, regroup.similarity, regroup.alpha)[layer]
        return {
            "layer": layer,
            "matrix": matrix_EE.round(3).tolist(),
            "before": list(before[layer]),
            "after": list(after[layer]),
        }

    def poll(self, attempt: int) -> ClustererStatus:
        """Return the decisions since the last poll. A poll of another attempt gets no decisions."""
        decisions = tuple(self._decisions) if attempt == self._attempt else ()
        if attempt == self._attempt:
            self._decisions.clear()
        step = self._reported_step(self._last.world) if self._last else -1
        return ClustererStatus(self._incarnation, step, decisions, self._refused)
