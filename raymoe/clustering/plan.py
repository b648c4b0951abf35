"""A plan: which experts change clusters. Made, validated and compared by pure functions; applied elsewhere."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from raymoe.clustering.kmeans import align, balanced_kmeans, embed
from raymoe.clustering.similarity import NotSampled, similarity
from raymoe.clustering.statistics import Statistics
from raymoe.config import RegroupSection

Clusters = Sequence[int] | np.ndarray
"""assignment_E of a layer."""
Assignment = Sequence[Clusters] | np.ndarray
"""assignment_LE of a model."""

ROUNDING = 1e-12
"""Gains up to this are none."""


@dataclass(frozen=True)
class RemapPlan:
    """The next assignment, and the step from which it holds on all ranks or on none."""

    version: int
    made_at_step: int
    """Last step of the statistics that it was made from."""
    effective_step: int
    assignment: tuple[tuple[int, ...], ...]
    reason: str
    expected_gain: float
    """Mean rise of the objective over the layers that change."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `from_dict` is the inverse."""
        return {**vars(self), "assignment": [list(layer) for layer in self.assignment]}

    @classmethod
    def from_dict(cls, data: object) -> RemapPlan:
        """A plan of plain data, from outside. ValueError, and none other, names what is wrong."""
        if not isinstance(data, dict):
            raise ValueError(f"a plan is a dict, not {type(data).__name__}")
        names = {item.name for item in fields(cls)}
        if data.keys() != names:
            raise ValueError(f"fields {reprlib.repr(sorted(map(str, data)))}, expected {', '.join(sorted(names))}")
        for name in ("version", "made_at_step", "effective_step"):
            if not _is_natural(data[name]):
                raise ValueError(f"{name}={reprlib.repr(data[name])}: must be an int, 0 or more")
        if data["effective_step"] < data["made_at_step"]:
            raise ValueError("effective_step is before made_at_step")
        if type(data["reason"]) is not str:
            raise ValueError(f"reason={reprlib.repr(data['reason'])}: must be a string")
        if type(data["expected_gain"]) is not float or not math.isfinite(data["expected_gain"]):
            raise ValueError(f"expected_gain={reprlib.repr(data['expected_gain'])}: must be a finite float")
        layers = data["assignment"]
        if not _is_list(layers) or not all(map(_is_list, layers)):
            raise ValueError("assignment must be a list of layers, each a list of clusters")
        if len({len(layer) for layer in layers}) > 1:
            raise ValueError("assignment has layers of different lengths")
        if not all(_is_natural(cluster) for layer in layers for cluster in layer):
            raise ValueError("assignment must hold ints, 0 or more")
        return cls(**{**data, "assignment": tuple(map(tuple, layers))})


def _is_natural(value: object) -> bool:
    """An int that float64 holds exactly: plans cross between ranks as floats."""
    return type(value) is int and 0 <= value < 1 << 53


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0


class Move(NamedTuple):
    layer: int
    expert: int
    source: int
    target: int


def moves(old: Assignment, new: Assignment) -> list[Move]:
    """What changes from one assignment_LE to another, by layer and expert. ValueError for different shapes."""
    return [
        Move(layer, expert, int(source), int(target))
        for layer, (before_E, after_E) in enumerate(zip(old, new, strict=True))
        for expert, (source, target) in enumerate(zip(before_E, after_E, strict=True))
        if source != target
    ]


def validate(
    plan: RemapPlan,
    *,
    version: int,
    assignment: Assignment,
    step: int,
    n_clusters: int,
    max_moves: int,
    min_members: int,
) -> str | None:
    """Why a plan is refused at `step` (the next to be done) under an assignment of `version`; None if it is not.

    The words before the colon are a stable key. A cluster keeps at least `min_members` experts, and a
    layer moves at most `max_moves`.
    """
    try:
        RemapPlan.from_dict(vars(plan) if isinstance(plan, RemapPlan) else plan)
        if not isinstance(plan, RemapPlan):
            raise ValueError(f"a {type(plan).__name__} is not a RemapPlan")
    except ValueError as error:
        return f"malformed: {error}"
    if plan.version <= version:
        return f"already applied: version {plan.version}, in force is {version}"
    if plan.version > version + 1:
        return f"stale: version {plan.version} follows {plan.version - 1}, in force is {version}"
    if plan.effective_step < step:
        return f"late: takes effect at step {plan.effective_step}, this is step {step}"
    shape, known = (len(plan.assignment), len(plan.assignment[0])), (len(assignment), len(assignment[0]))
    if shape != known:
        return f"unknown experts: the plan has {shape[0]} layers of {shape[1]}, the model {known[0]} of {known[1]}"
    highest = max(map(max, plan.assignment))
    if highest >= n_clusters:
        return f"unknown clusters: {highest}, of {n_clusters} a layer"
    for layer, clusters in enumerate(plan.assignment):
        for cluster in range(n_clusters):
            if (members := clusters.count(cluster)) < min_members:
                return f"sizes: cluster {cluster} of layer {layer} would have {members} experts, K={min_members} need as many"
    moved = [move.layer for move in moves(assignment, plan.assignment)]
    if not moved:
        return "nothing moves"
    most = max(moved, key=moved.count)
    if moved.count(most) > max_moves:
        return f"too many moves: {moved.count(most)} in layer {most}, at most {max_moves}"
    return None


def objective(
    S_EE: np.ndarray, assignment_E: Clusters, load_E: np.ndarray, load_weight: float, n_clusters: int
) -> float:
    """J = (1/E) Σ_c Σ_{i,j in c} S_ij / n_c − load_weight x squared CV of the clusters' loads.

    With S = Z Zᵀ the first term is that share of Z's sum of squares which k-means lowers distances by.
    Without any load there is no second.
    """
    member_EC = np.asarray(assignment_E)[:, None] == np.arange(n_clusters)
    within_C = ((S_EE @ member_EC) * member_EC).sum(0) / np.maximum(member_EC.sum(0), 1)
    share_C = _shares(load_E) @ member_EC
    cv_squared = n_clusters * share_C @ share_C - 1 if share_C.any() else 0.0
    return float(within_C.sum() / len(S_EE) - load_weight * cv_squared)


def _shares(load_E: np.ndarray) -> np.ndarray:
    total = load_E.sum()
    return load_E / total if total > 0 else np.zeros(len(load_E))


def improve(
    S_EE: np.ndarray,
    assignment_E: Clusters,
    load_E: np.ndarray,
    *,
    proposal_E: Clusters,
    max_moves: int,
    load_weight: float,
    n_clusters: int,
    force: bool = False,
) -> tuple[np.ndarray, float]:
    """A better assignment_E with clusters of the same sizes, and the rise of the objective.

    Greedy: at each turn the exchange with the highest gain per expert moved, while one gains and the cap
    allows; of swaps between any two clusters, and of 3-cycles of experts that the proposal would move. An
    expert moves once at most. Forced, it takes the best swaps up to the cap, whatever they lose.
    """
    before_E = np.asarray(assignment_E)
    after_E, total = before_E.copy(), 0.0
    while (left := max_moves - int((after_E != before_E).sum())) >= 2:
        gain_EE = _exchange_gains(S_EE, after_E, load_E, load_weight, n_clusters)
        moved_E = after_E != before_E
        gain_EE[moved_E] = gain_EE[:, moved_E] = -np.inf
        gain, experts = _best_swap(gain_EE)
        if left >= 3 and not force:
            cycle_gain, cycle = _best_cycle(gain_EE, np.flatnonzero((np.asarray(proposal_E) != before_E) & ~moved_E))
            if cycle_gain / 3 > gain / 2:
                gain, experts = cycle_gain, cycle
        if gain == -np.inf or (gain <= ROUNDING and not force):
            break
        after_E[experts] = after_E[np.roll(experts, -1)]
        total += gain
    return after_E, total


def _exchange_gains(
    S_EE: np.ndarray, assignment_E: np.ndarray, load_E: np.ndarray, load_weight: float, n_clusters: int
) -> np.ndarray:
    """gain_EE[i, j]: rise of j's cluster's part of the objective when i takes j's place; −inf within a cluster.

    The objective is a sum over clusters, so that a swap or a cycle gains the sum along its path.
    """
    member_EC = assignment_E[:, None] == np.arange(n_clusters)
    to_EC = S_EE @ member_EC
    own_E = np.take_along_axis(to_EC, assignment_E[:, None], 1)[:, 0]
    square_E = S_EE.diagonal()
    rise_EE = 2 * (to_EC[:, assignment_E] - own_E - S_EE) + square_E[:, None] + square_E
    share_E = _shares(load_E)
    share_C = share_E @ member_EC
    change_EE = share_E[:, None] - share_E
    load_EE = n_clusters * change_EE * (2 * share_C[assignment_E] + change_EE)
    gain_EE = rise_EE / (len(S_EE) * member_EC.sum(0)[assignment_E]) - load_weight * load_EE
    gain_EE[assignment_E[:, None] == assignment_E] = -np.inf
    return gain_EE


def _best_swap(gain_EE: np.ndarray) -> tuple[float, np.ndarray]:
    swap_EE = gain_EE + gain_EE.T
    experts = np.unravel_index(swap_EE.argmax(), swap_EE.shape)
    return float(swap_EE[experts]), np.array(experts)


def _best_cycle(gain_EE: np.ndarray, among: np.ndarray) -> tuple[float, np.ndarray]:
    """Three experts of three clusters, each to take the next one's place; (−inf, none) where there are none."""
    best, experts = -np.inf, among[:0]
    gain_UU = gain_EE[np.ix_(among, among)]
    for first in range(len(among) - 2):
        rest = slice(first + 1, None)
        cycle_UU = gain_UU[first, rest, None] + gain_UU[rest, rest] + gain_UU[rest, first]
        if cycle_UU.max() > best:
            second, third = np.unravel_index(cycle_UU.argmax(), cycle_UU.shape)
            best = float(cycle_UU[second, third])
            experts = among[[first, first + 1 + second, first + 1 + third]]
    return best, experts


@dataclass(frozen=True)
class NoPlan:
    """No plan, and why."""

    made_at_step: int
    reason: str
    expected_gain: float


def make(
    stats: Statistics,
    assignment: Assignment,
    *,
    regroup: RegroupSection,
    n_clusters: int,
    seed: int,
    force: bool = False,
) -> RemapPlan | NoPlan:
    """The plan that follows assignment_LE, under which `stats` were gathered; a function of its arguments.

    Balanced k-means proposes; swaps and cycles improve (arXiv 2510.02345, section 3.1: every T=100 steps
    after a burn-in of 200, with α=0.7, δ=0.01). A layer keeps its clusters unless it gains `min_gain`.
    Forced, every layer moves what costs least.
    """
    try:
        S_LEE = similarity(stats, regroup.similarity, regroup.alpha)
    except NotSampled as error:
        return NoPlan(stats.step, f"not sampled: {error}", 0.0)
    planned: list[tuple[int, ...]] = []
    gains: list[float] = []
    for S_EE, load_E, current in zip(S_LEE, stats.count_LE, assignment, strict=True):
        before_E = np.asarray(current)
        sizes_C = np.bincount(before_E, minlength=n_clusters)
        proposal_E = align(balanced_kmeans(embed(S_EE), sizes_C, before_E, seed), before_E, n_clusters)
        after_E, gain = improve(
            S_EE,
            before_E,
            load_E,
            proposal_E=proposal_E,
            max_moves=regroup.max_moves,
            load_weight=regroup.load_weight,
            n_clusters=n_clusters,
            force=force,
        )
        gains.append(gain)
        planned.append(tuple((after_E if force or gain >= regroup.min_gain else before_E).tolist()))
    moved = moves(assignment, planned)
    changed = sorted({move.layer for move in moved})
    if not changed:
        best = max(gains)
        return NoPlan(
            stats.step, f"nothing to gain: best layer gains {best:.3g} of min_gain {regroup.min_gain:g}", best
        )
    gain = float(np.mean([gains[layer] for layer in changed]))
    return RemapPlan(
        version=stats.version + 1,
        made_at_step=stats.step,
        effective_step=stats.step + regroup.plan_lag,
        assignment=tuple(planned),
        reason="forced" if force else f"gain {gain:.3g} by {len(moved)} moves in {len(changed)} layers",
        expected_gain=gain,
    )


def measured_gain(
    stats: Statistics, before: Assignment, after: Assignment, *, regroup: RegroupSection, n_clusters: int
) -> float:
    """What a plan gained by statistics gathered since: mean rise of the objective over the layers it changed.

    0 where it changed none. Raises NotSampled.
    """
    S_LEE = similarity(stats, regroup.similarity, regroup.alpha)
    rises: list[float] = []
    for layer in sorted({move.layer for move in moves(before, after)}):
        was, now = (
            objective(S_LEE[layer], clusters[layer], stats.count_LE[layer], regroup.load_weight, n_clusters)
            for clusters in (before, after)
        )
        rises.append(now - was)
    return float(np.mean(rises)) if rises else 0.0


def purity(counts_GC: np.ndarray) -> float:
    """Share of rows that are of their cluster's commonest domain, from counts by domain G and cluster; 0 without rows."""
    total = counts_GC.sum()
    return float(counts_GC.max(0).sum() / total) if total else 0.0
