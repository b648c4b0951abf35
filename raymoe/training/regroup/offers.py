"""Offers of plans: checks of what the clusterer sends to rank 0, and the encoding for the all-reduce of a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raymoe.clustering.plan import Refusal, RefusalReason, RemapPlan
from raymoe.config import Config
from raymoe.training.regroup.clusterer import ClustererStatus, GainMeasured, NoPlanMade, PlanMade

HEADER = 6
"""Floats of an offer before the assignment: 1 for an offer, version, steps made and effective, gain, forced."""


def encode(plan: RemapPlan | None, layers: int, experts: int) -> list[float]:
    """Return a plan as floats, all zeros for None. Ranks without an offer add zeros to the all-reduce."""
    if plan is None:
        return [0.0] * (HEADER + layers * experts)
    header = 1, plan.version, plan.made_at_step, plan.effective_step, plan.expected_gain, plan.forced
    return [*map(float, header), *(float(cluster) for row in plan.assignment for cluster in row)]


def decode(values: Sequence[float], layers: int, experts: int) -> RemapPlan | None:
    """Return the plan that `encode` encoded. Integers below 2^53 are exact in float64."""
    offered, version, made_at_step, effective_step, expected_gain, forced = values[:HEADER]
    if not offered:
        return None
    assignment_LE = np.array(values[HEADER:]).astype(np.int64).reshape(layers, experts)
    return RemapPlan(
        int(version), int(made_at_step), int(effective_step), tuple(map(tuple, assignment_LE.tolist())),
        expected_gain, forced=bool(forced),
    )  # fmt: skip


def check_status(status: object) -> ClustererStatus:
    """Return `status`, or raise ValueError for an object that is not a status of the clusterer."""
    if not isinstance(status, ClustererStatus):
        raise ValueError(f"{type(status).__name__} is not a status")
    if type(status.step) is not int or type(status.incarnation) is not int:
        raise ValueError("step and incarnation must be ints")
    for decision in status.decisions:
        if not isinstance(decision, PlanMade | NoPlanMade | GainMeasured):
            raise ValueError(f"{type(decision).__name__} is not a decision")
    return status


def check_offer(plan: object, config: Config, step: int) -> Refusal | None:
    """Return the refusal of a plan that rank 0 received after `step`, or None.

    Only what needs no agreement between ranks is checked: all ranks validate the offer again.
    """
    model, lag = config.model, config.regroup.plan_lag
    try:
        if not isinstance(plan, RemapPlan):
            raise ValueError(f"{type(plan).__name__} is not a RemapPlan")
        RemapPlan.from_dict(vars(plan))
        if (shape := (len(plan.assignment), len(plan.assignment[0]))) != (model.layers, model.n_experts):
            raise ValueError(f"an assignment of {shape[0]} layers of {shape[1]} experts")
        if config.regroup.mode != "replay" and plan.effective_step != plan.made_at_step + lag:
            raise ValueError(f"effective_step is not plan_lag={lag} after made_at_step")
        if config.regroup.mode != "replay" and plan.made_at_step > step:
            raise ValueError(f"made_at_step={plan.made_at_step} is after the current step {step}")
    except ValueError as error:
        return Refusal(RefusalReason.MALFORMED, str(error))
    return None
