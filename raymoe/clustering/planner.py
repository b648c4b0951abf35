"""The planner: statistics in, a regrouping plan out. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from raymoe.clustering.exchange import improve, objective, random_swaps
from raymoe.clustering.kmeans import align, balanced_kmeans, embed
from raymoe.clustering.plan import Assignment, Clusters, RemapPlan, moves
from raymoe.clustering.similarity import NotSampled, similarity
from raymoe.clustering.statistics import Statistics
from raymoe.config import RegroupSection


class NoPlanReason(Enum):
    """Reason for which a period ends without a plan."""

    NOTHING_TO_GAIN = "nothing to gain"
    NOT_SAMPLED = "not sampled"
    FAILED = "failed"


@dataclass(frozen=True)
class NoPlan:
    """The planner's result for a period without a plan. No plan is refused."""

    made_at_step: int
    reason: NoPlanReason
    detail: str
    expected_gain: float
    """Gain of the best layer, below `regroup.min_gain`."""


def make_plan(
    stats: Statistics,
    assignment: Assignment,
    *,
    regroup: RegroupSection,
    n_clusters: int,
    seed: int,
    force: bool = False,
) -> RemapPlan | NoPlan:
    """Return the plan that follows assignment_LE, under which `stats` were gathered.

    Deterministic in its arguments. Balanced k-means proposes; swaps and cycles improve (arXiv 2510.02345,
    section 3.1: every T=100 steps after a burn-in of 200, with α=0.7, δ=0.01). A layer keeps its clusters if
    it gains less than `min_gain`. With `force`, the plan is of the kind `regroup.force_kind`.
    """
    try:
        S_LEE = similarity(stats, regroup.similarity, regroup.alpha)
    except NotSampled as error:
        return NoPlan(stats.step, NoPlanReason.NOT_SAMPLED, str(error), 0.0)
    planned: list[tuple[int, ...]] = []
    gains: list[float] = []
    for layer, (S_EE, load_E, before_E) in enumerate(zip(S_LEE, stats.count_LE, assignment, strict=True)):
        if force and regroup.force_kind == "random":
            generator = np.random.default_rng([seed, stats.version, layer])
            after_E = random_swaps(before_E, regroup.max_moves, generator)
            gain = _gain(S_EE, load_E, before_E, after_E, regroup, n_clusters)
        else:
            mildest = force and regroup.force_kind == "mildest"
            after_E, gain = _improve_layer(S_EE, load_E, before_E, regroup, n_clusters, seed, mildest)
        gains.append(gain)
        kept_E = after_E if force or gain >= regroup.min_gain else np.asarray(before_E)
        planned.append(tuple(kept_E.tolist()))
    changed = sorted({move.layer for move in moves(assignment, planned)})
    if not changed:
        least = 0 if force else regroup.min_gain
        detail = f"the best layer gains {max(gains):.3g} of min_gain {least:g}"
        return NoPlan(stats.step, NoPlanReason.NOTHING_TO_GAIN, detail, max(gains))
    return RemapPlan(
        version=stats.version + 1,
        made_at_step=stats.step,
        effective_step=stats.step + regroup.plan_lag,
        assignment=tuple(planned),
        expected_gain=float(np.mean([gains[layer] for layer in changed])),
        forced=force,
    )


def _improve_layer(
    S_EE: np.ndarray,
    load_E: np.ndarray,
    assignment_E: Clusters,
    regroup: RegroupSection,
    n_clusters: int,
    seed: int,
    force: bool,
) -> tuple[np.ndarray, float]:
    before_E = np.asarray(assignment_E)
    sizes_C = np.bincount(before_E, minlength=n_clusters)
    proposal_E = align(balanced_kmeans(embed(S_EE), sizes_C, before_E, seed), before_E, n_clusters)
    return improve(
        S_EE, before_E, load_E, proposal_E=proposal_E, max_moves=regroup.max_moves,
        load_weight=regroup.load_weight, n_clusters=n_clusters, force=force,
    )  # fmt: skip


def _gain(
    S_EE: np.ndarray,
    load_E: np.ndarray,
    before_E: Clusters,
    after_E: Clusters,
    regroup: RegroupSection,
    n_clusters: int,
) -> float:
    was, now = (objective(S_EE, clusters, load_E, regroup.load_weight, n_clusters) for clusters in (before_E, after_E))
    return now - was


def measured_gain(
    stats: Statistics, before: Assignment, after: Assignment, *, regroup: RegroupSection, n_clusters: int
) -> float:
    """Return the gain of an applied plan, by statistics gathered since: the mean over the layers that changed.

    0 if no layer changed. Raises NotSampled.
    """
    S_LEE = similarity(stats, regroup.similarity, regroup.alpha)
    gains = [
        _gain(S_LEE[layer], stats.count_LE[layer], before[layer], after[layer], regroup, n_clusters)
        for layer in sorted({move.layer for move in moves(before, after)})
    ]
    return float(np.mean(gains)) if gains else 0.0
