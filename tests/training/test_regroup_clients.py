"""Clients of the clusterer, and the encoding of offers, without Ray and without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.clustering.plan import RemapPlan
from raymoe.training.regroup.clients import ReplayClient, read_applied_plans
from raymoe.training.regroup.clusterer import PlanMade
from raymoe.training.regroup.offers import decode, encode

PLAN = RemapPlan(1, 100, 120, ((0, 0, 1, 1), (1, 0, 0, 1)), 0.02, forced=True)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def applied(plan: Any) -> dict[str, Any]:
    return {"kind": "plan", "step": 120, "name": "applied", "plan": plan}


def test_replay_returns_all_applied_plans_with_the_first_poll(tmp_path: Path) -> None:
    made = {"kind": "plan", "step": 110, "name": "made", "plan": PLAN.to_dict()}
    client = ReplayClient(write(tmp_path / "plans.jsonl", made, applied(PLAN.to_dict()), '{"kind": "pl'))
    status = client.poll(1)
    assert status and status.decisions == (PlanMade(PLAN, 0.0, None),)
    assert client.poll(1) is None


def test_replay_reads_records_of_version_0_1(tmp_path: Path) -> None:
    """They name the event in `what`, and a forced plan in `reason`."""
    old = {k: v for k, v in PLAN.to_dict().items() if k != "forced"} | {"reason": "forced"}
    record = {"kind": "plan", "step": 120, "what": "applied", "plan": old}
    assert read_applied_plans(write(tmp_path / "plans.jsonl", record)) == [PLAN]


def test_replay_of_an_empty_file_has_no_plans(tmp_path: Path) -> None:
    assert ReplayClient(write(tmp_path / "plans.jsonl")).poll(1) is None


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["a text"], "no records of plans"),
        ([{"kind": "train", "step": 1}], "no records of plans"),
        ([applied({"version": 1})], "malformed plan"),
        ([applied(PLAN.to_dict()), applied("garbage")], "malformed plan"),
    ],
)
def test_replay_refuses_files_without_plans(tmp_path: Path, lines: list[Any], fault: str) -> None:
    path = write(tmp_path / "other.jsonl", *lines)
    with pytest.raises(ValueError, match=rf"regroup\.replay={path}: .*{fault}.*name the plans\.jsonl of a run"):
        ReplayClient(path)


def test_replay_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        ReplayClient(tmp_path / "plans.jsonl")


natural = st.integers(0, (1 << 53) - 1)


@given(
    st.builds(
        RemapPlan, natural, natural, natural, st.lists(st.tuples(natural, natural, natural), min_size=2, max_size=2).map(tuple),
        st.floats(allow_nan=False, allow_infinity=False), forced=st.booleans(),
    )
)  # fmt: skip
def test_offers_round_trip_in_float64(plan: RemapPlan) -> None:
    values = [a + b for a, b in zip(encode(plan, 2, 3), encode(None, 2, 3), strict=True)]  # the all-reduce
    assert decode(values, 2, 3) == plan
    assert decode(encode(None, 2, 3), 2, 3) is None
