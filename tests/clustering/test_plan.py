"""Plans are validated, and untrusted plain data raises ValueError only."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.clustering.plan import Move, Refusal, RefusalReason, RemapPlan, moves, validate
from raymoe.metrics import REFUSALS

PLAN = RemapPlan(5, 100, 120, ((0, 0, 1, 1), (1, 0, 0, 1)), 0.02)
CURRENT = ((0, 0, 1, 1), (0, 0, 1, 1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"effective_step": 119}, "late: effective at step 119, the next step is 120"),
        ({"version": True}, "malformed: version=True: must be an int, 0 or more"),
        ({"version": 4}, "already applied: version 4, the current version is 4"),
        ({"version": 6}, "stale: version 6 follows 5, the current version is 4"),
        ({"version": "5"}, "malformed: version='5': must be an int, 0 or more"),
        ({"made_at_step": 130}, "malformed: effective_step is before made_at_step"),
        ({"forced": 1}, "malformed: forced=1: must be a bool"),
        ({"expected_gain": float("nan")}, "malformed: expected_gain=nan: must be a finite float"),
        ({"expected_gain": 10**400}, "malformed: expected_gain="),
        ({"assignment": 3}, "malformed: assignment must be a list of layers, each a list of clusters"),
        ({"assignment": ((), ())}, "malformed: assignment must be a list of layers, each a list of clusters"),
        ({"assignment": ((0, 1, 1), (0, 0, 1, 1))}, "malformed: assignment has layers of different lengths"),
        ({"assignment": ((0, 0, 1, -1), (0, 0, 1, 1))}, "malformed: assignment must contain ints, 0 or more"),
        ({"assignment": ((0, 0, 1, 1.0), (0, 0, 1, 1))}, "malformed: assignment must contain ints, 0 or more"),
        ({"assignment": ((0, 0, 1), (0, 1, 1))}, "unknown experts: the plan has 2 layers of 3 experts, the model 2 of 4"),
        ({"assignment": ((0, 0, 1, 1),)}, "unknown experts: the plan has 1 layers of 4 experts, the model 2 of 4"),
        ({"assignment": ((0, 0, 1, 1), (0, 0, 7, 1))}, "unknown clusters: cluster 7, a layer has 2"),
        ({"assignment": ((0, 0, 1, 1), (0, 0, 0, 1))}, "sizes: cluster 1 of layer 1 would have 1 experts, K=2 is the least"),
        ({"assignment": ((0, 0, 1, 1), (1, 1, 0, 0))}, "too many moves: 4 in layer 1, at most 3"),
        ({"assignment": CURRENT}, "nothing moves"),
    ],
)  # fmt: skip
def test_validate_returns_every_refusal(change: dict[str, Any], reason: str | None) -> None:
    plan = dataclasses.replace(PLAN, **change)
    found = validate(plan, version=4, assignment=CURRENT, step=120, n_clusters=2, max_moves=3, min_members=2)
    assert (found is None) == (reason is None) and str(found).startswith(str(reason))


@pytest.mark.parametrize("other", [None, 3, "plan", PLAN.to_dict()])
def test_validate_refuses_other_types(other: Any) -> None:
    found = validate(other, version=4, assignment=CURRENT, step=120, n_clusters=2, max_moves=3, min_members=2)
    assert found and found.reason is RefusalReason.MALFORMED


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
fields = st.fixed_dictionaries({name: json_values for name in PLAN.to_dict()})


@settings(deadline=None, max_examples=200)
@given(json_values | fields | st.tuples(st.sampled_from(sorted(PLAN.to_dict())), json_values))
def test_plain_data_is_a_plan_or_raises_value_error(data: Any) -> None:
    """Arbitrary JSON, plans with arbitrary fields, and a valid plan with one arbitrary field."""
    if isinstance(data, tuple):
        data = PLAN.to_dict() | {data[0]: data[1]}
    try:
        plan = RemapPlan.from_dict(data)
    except ValueError as error:
        assert str(error)
    else:
        assert json.loads(json.dumps(plan.to_dict())) == data


def test_moves_lists_the_changes() -> None:
    assert moves(CURRENT, PLAN.assignment) == [Move(1, 0, 0, 1), Move(1, 2, 1, 0)]
    assert moves(np.array(CURRENT), CURRENT) == []
    with pytest.raises(ValueError):
        moves(CURRENT, PLAN.assignment[:1])


@pytest.mark.parametrize(
    ("reason", "forced"), [("forced", True), ("gain 0.02 by 2 moves in 1 layers", False), ("", False)]
)
def test_plans_of_version_0_1_are_read(reason: str, forced: bool) -> None:
    """They contain a text `reason` instead of the bool `forced`."""
    old = {k: v for k, v in PLAN.to_dict().items() if k != "forced"} | {"reason": reason}
    assert RemapPlan.from_dict(old) == dataclasses.replace(PLAN, forced=forced)
    with pytest.raises(ValueError, match="reason=3"):
        RemapPlan.from_dict(old | {"reason": 3})


def test_refusal_reasons_are_the_labels_of_the_metric() -> None:
    assert {reason.value for reason in RefusalReason} == set(REFUSALS) - {"other"}
    assert str(Refusal(RefusalReason.NOTHING_MOVES)) == "nothing moves"
