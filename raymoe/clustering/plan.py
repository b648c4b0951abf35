"""Regrouping plans: the experts that change clusters, as a frozen value, and its validation."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, NamedTuple

import numpy as np

Clusters = Sequence[int] | np.ndarray
"""assignment_E of one layer: the cluster of each expert."""
Assignment = Sequence[Clusters] | np.ndarray
"""assignment_LE of a model."""


class RefusalReason(Enum):
    """Reason for which workers refuse a plan. Values are labels of the metric `raymoe_regroup_refusals_total`."""

    MALFORMED = "malformed"
    ALREADY_APPLIED = "already applied"
    STALE = "stale"
    LATE = "late"
    BUSY = "busy"
    SIZES = "sizes"
    NOTHING_MOVES = "nothing moves"
    TOO_MANY_MOVES = "too many moves"
    UNKNOWN_EXPERTS = "unknown experts"
    UNKNOWN_CLUSTERS = "unknown clusters"


@dataclass(frozen=True)
class Refusal:
    """The reason for which a plan is refused, and the values that caused it."""

    reason: RefusalReason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}" if self.detail else self.reason.value


@dataclass(frozen=True)
class RemapPlan:
    """The next assignment, and the step before which all ranks apply it."""

    version: int
    made_at_step: int
    """Last step of the statistics from which the plan was made."""
    effective_step: int
    assignment: tuple[tuple[int, ...], ...]
    expected_gain: float
    """Mean increase of the objective over the layers that change."""
    forced: bool = False
    """Whether `regroup.force` required this plan, regardless of its gain."""

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON; `from_dict` is the inverse."""
        return {**vars(self), "assignment": [list(layer) for layer in self.assignment]}

    @classmethod
    def from_dict(cls, data: object) -> RemapPlan:
        """Build a plan from untrusted plain data. ValueError, and no other exception, names the wrong field.

        Plans of version 0.1 have a text `reason` instead of `forced`; a forced plan has the reason "forced".
        """
        if not isinstance(data, dict):
            raise ValueError(f"a plan must be a dict, not {type(data).__name__}")
        plain: dict[Any, Any] = dict(data)
        if "reason" in plain and "forced" not in plain:
            reason = plain.pop("reason")
            if type(reason) is not str:
                raise ValueError(f"reason={reprlib.repr(reason)}: must be a string")
            plain["forced"] = reason == "forced"
        names = {item.name for item in fields(cls)}
        if plain.keys() != names:
            raise ValueError(f"fields {reprlib.repr(sorted(map(str, plain)))}, expected {', '.join(sorted(names))}")
        _check_numbers(plain)
        _check_assignment(plain["assignment"])
        return cls(**{**plain, "assignment": tuple(map(tuple, plain["assignment"]))})


def _check_numbers(data: dict[str, Any]) -> None:
    for name in ("version", "made_at_step", "effective_step"):
        if not _is_natural(data[name]):
            raise ValueError(f"{name}={reprlib.repr(data[name])}: must be an int, 0 or more")
    if data["effective_step"] < data["made_at_step"]:
        raise ValueError("effective_step is before made_at_step")
    if type(data["expected_gain"]) is not float or not math.isfinite(data["expected_gain"]):
        raise ValueError(f"expected_gain={reprlib.repr(data['expected_gain'])}: must be a finite float")
    if type(data["forced"]) is not bool:
        raise ValueError(f"forced={reprlib.repr(data['forced'])}: must be a bool")


def _check_assignment(layers: Any) -> None:
    if not _is_list(layers) or not all(map(_is_list, layers)):
        raise ValueError("assignment must be a list of layers, each a list of clusters")
    if len({len(layer) for layer in layers}) > 1:
        raise ValueError("assignment has layers of different lengths")
    if not all(_is_natural(cluster) for layer in layers for cluster in layer):
        raise ValueError("assignment must contain ints, 0 or more")


def _is_natural(value: object) -> bool:
    """Whether `value` is an int that float64 represents exactly: ranks exchange plans as floats."""
    return type(value) is int and 0 <= value < 1 << 53


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0


class Move(NamedTuple):
    """One expert that changes clusters."""

    layer: int
    expert: int
    source: int
    target: int


def moves(old: Assignment, new: Assignment) -> list[Move]:
    """List the moves from one assignment_LE to another, by layer and expert. ValueError for different shapes."""
    return [
        Move(layer, expert, int(source), int(target))
        for layer, (before_E, after_E) in enumerate(zip(old, new, strict=True))
        for expert, (source, target) in enumerate(zip(before_E, after_E, strict=True))
        if source != target
    ]


def validate(
    plan: object,
    *,
    version: int,
    assignment: Assignment,
    step: int,
    n_clusters: int,
    max_moves: int,
    min_members: int,
) -> Refusal | None:
    """Return the refusal of a plan, or None for a valid plan.

    `version` and `assignment` are current, `step` is the next step. A cluster keeps at least `min_members`
    experts, and a layer moves at most `max_moves`.
    """
    try:
        if not isinstance(plan, RemapPlan):
            raise ValueError(f"{type(plan).__name__} is not a RemapPlan")
        RemapPlan.from_dict(vars(plan))
    except ValueError as error:
        return Refusal(RefusalReason.MALFORMED, str(error))
    return (
        _check_time(plan, version, step)
        or _check_shape(plan, assignment, n_clusters)
        or _check_sizes(plan, n_clusters, min_members)
        or _check_moves(plan, assignment, max_moves)
    )


def _check_time(plan: RemapPlan, version: int, step: int) -> Refusal | None:
    if plan.version <= version:
        return Refusal(RefusalReason.ALREADY_APPLIED, f"version {plan.version}, the current version is {version}")
    if plan.version > version + 1:
        return Refusal(
            RefusalReason.STALE,
            f"version {plan.version} follows {plan.version - 1}, the current version is {version}",
        )
    if plan.effective_step < step:
        return Refusal(RefusalReason.LATE, f"effective at step {plan.effective_step}, the next step is {step}")
    return None


def _check_shape(plan: RemapPlan, assignment: Assignment, n_clusters: int) -> Refusal | None:
    shape, known = (len(plan.assignment), len(plan.assignment[0])), (len(assignment), len(assignment[0]))
    if shape != known:
        return Refusal(
            RefusalReason.UNKNOWN_EXPERTS,
            f"the plan has {shape[0]} layers of {shape[1]} experts, the model {known[0]} of {known[1]}",
        )
    highest = max(map(max, plan.assignment))
    if highest >= n_clusters:
        return Refusal(RefusalReason.UNKNOWN_CLUSTERS, f"cluster {highest}, a layer has {n_clusters}")
    return None


def _check_sizes(plan: RemapPlan, n_clusters: int, min_members: int) -> Refusal | None:
    for layer, clusters in enumerate(plan.assignment):
        for cluster in range(n_clusters):
            if (members := clusters.count(cluster)) < min_members:
                return Refusal(
                    RefusalReason.SIZES,
                    f"cluster {cluster} of layer {layer} would have {members} experts, K={min_members} is the least",
                )
    return None


def _check_moves(plan: RemapPlan, assignment: Assignment, max_moves: int) -> Refusal | None:
    moved = [move.layer for move in moves(assignment, plan.assignment)]
    if not moved:
        return Refusal(RefusalReason.NOTHING_MOVES)
    most = max(moved, key=moved.count)
    if moved.count(most) > max_moves:
        return Refusal(RefusalReason.TOO_MANY_MOVES, f"{moved.count(most)} in layer {most}, at most {max_moves}")
    return None
