"""The clustering actor: merges the workers' statistics, plans off the training path, answers when asked.

A plain class; the driver makes it an actor. Each message carries all that its worker has gathered, and the
assignment: one that was lost, or an actor that has to start again, costs nothing but the gain seen of the last plan.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from raymoe.clustering.plan import Assignment, RemapPlan, make, measured_gain, moves
from raymoe.clustering.similarity import NotSampled, similarity
from raymoe.clustering.statistics import Statistics, check, merge
from raymoe.config import from_dict

HISTORY = 64
"""Decisions kept for a worker that asks late; older ones are dropped."""

PICTURED = 64
"""Experts in a layer up to which plans carry a similarity matrix."""


@dataclass(frozen=True)
class Message:
    """From a worker to the clusterer, every `regroup.stats_every` steps."""

    attempt: int
    """Number of the worker group; a later one is of a run that went back to a checkpoint."""
    rank: int
    world: int
    assignment: tuple[tuple[int, ...], ...]
    """Of the statistics' version."""
    forced: bool
    """Whether the plan that `regroup.force` asks for was applied."""
    statistics: Statistics
    """All that this worker has gathered under the assignment."""


@dataclass(frozen=True)
class ClustererStatus:
    """From the clusterer to rank 0, each time it asks."""

    incarnation: int
    """Of the actor: another one has lost what it was told."""
    step: int
    """Last step of which every worker has told."""
    decisions: tuple[dict[str, Any], ...]
    """Since the last answer: plans, refusals and gains seen, as `kind` and fields."""
    refused_messages: int
    """Messages that were not what they should be."""


class Clusterer:
    """Plans from statistics. `config` is a run's, as a dict."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = from_dict(config)
        self._incarnation = time.time_ns()
        self._refused = 0
        self._begin(-1)

    def _begin(self, attempt: int) -> None:
        self._attempt = attempt
        self._by_rank: dict[int, Statistics] = {}
        self._last: Message | None = None
        self._planned_at = -1
        self._decisions: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self._before: dict[int, Assignment] = {}

    def observe(self, message: Message) -> None:
        """Take in a message. One that is malformed is counted; one of an earlier attempt is dropped."""
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
            self._begin(message.attempt)
        known, new = self._by_rank.get(message.rank), message.statistics
        if known is None or (new.version, new.step) >= (known.version, known.step):
            self._by_rank[message.rank] = new
        if self._last is None or message.statistics.version >= self._last.statistics.version:
            self._last = message
        self._plan_if_due(self._last)

    def _heard(self, world: int) -> int:
        """The last step of which all ranks have told under the newest version, −1 if there is none."""
        newest = max(s.version for s in self._by_rank.values())
        steps = [s.step for s in self._by_rank.values() if s.version == newest]
        return min(steps) if len(steps) == world else -1

    def _plan_if_due(self, last: Message) -> None:
        heard = self._heard(last.world)
        at = heard - heard % self.config.period
        if heard < 0 or at < self.config.regroup.burn_in or at <= self._planned_at:
            return
        self._planned_at = at
        try:
            self._plan(last, at)
        except Exception as error:  # whatever it is, training goes on and its record says why there was no plan
            reason = f"failed: {type(error).__name__}: {error}"
            self._decide("none", made_at_step=heard, reason=reason, expected_gain=0.0)

    def _plan(self, last: Message, at: int) -> None:
        """Decide on the statistics of the period that ended at step `at`."""
        regroup = self.config.regroup
        whole = self._by_rank[0]
        for rank in range(1, last.world):  # in order, so that sums do not depend on who was first
            whole = merge(whole, self._by_rank[rank])
        n_clusters = self.config.model.n_clusters
        if before := self._before.pop(whole.version, None):
            try:
                gain = measured_gain(whole, before, last.assignment, regroup=regroup, n_clusters=n_clusters)
                shown = self._picture(whole, before, last.assignment)
                self._decide("seen", version=whole.version, gain=gain, similarity=shown)
            except NotSampled:
                pass  # the first period after a plan was cut short
        force = 0 < regroup.force <= at and not last.forced
        started = time.perf_counter()
        made = make(
            whole, last.assignment, regroup=regroup, n_clusters=n_clusters, seed=self.config.run.seed, force=force
        )
        seconds = time.perf_counter() - started
        if isinstance(made, RemapPlan):
            self._before[made.version] = last.assignment
            shown = self._picture(whole, last.assignment, made.assignment)
            self._decide("plan", plan=made.to_dict(), seconds=seconds, similarity=shown)
        else:
            self._decide("none", **vars(made), seconds=seconds)

    def _picture(self, stats: Statistics, before: Assignment, after: Assignment) -> dict[str, Any] | None:
        """The similarity of the layer that changes most, for the report; None for more experts than a plot shows."""
        if self.config.model.n_experts > PICTURED:
            return None
        changed = [move.layer for move in moves(before, after)]
        layer = max(changed, key=changed.count)
        regroup = self.config.regroup
        matrix = similarity(stats, regroup.similarity, regroup.alpha)[layer]
        return {
            "layer": layer,
            "matrix": matrix.round(3).tolist(),
            "before": list(before[layer]),
            "after": list(after[layer]),
        }

    def _decide(self, kind: str, **fields: Any) -> None:
        self._decisions.append({"kind": kind, **fields})

    def poll(self, attempt: int) -> ClustererStatus:
        """What was decided since the last answer."""
        decisions = tuple(self._decisions) if attempt == self._attempt else ()
        if attempt == self._attempt:
            self._decisions.clear()
        step = self._heard(self._last.world) if self._last else -1
        return ClustererStatus(self._incarnation, step, decisions, self._refused)
