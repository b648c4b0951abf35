"""Damaged records in a run's JSONL files: a resume skips them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.storage.run_folder import RunFolder, read_records
from raymoe.training.journal import Journal, last_recorded_checkpoint
from tests.training.test_loop import losses, records, train

DAMAGED = [
    '{"kind": "train", "step": null}',
    '{"kind": "train", "step": 1e999}',
    '{"kind": "train", "step": "7"}',
    '{"kind": "train", "step": true}',
    '{"kind": "train", "step": [4]}',
    '{"kind": "train", "step": -3}',
    '{"kind": "train", "step": ' + "9" * 300 + "}",
    '{"kind": "train"}',
    '{"kind": "train", "step": 5',
    "[]", "null", "7", '"step"', "[" * 5000, "\x00", "",
]  # fmt: skip


def test_a_run_with_damaged_records_resumes(tmp_path: Path) -> None:
    train(0, 1, str(tmp_path), ("train.steps=12",))
    path = RunFolder(tmp_path).metrics
    path.write_text("\n".join(DAMAGED) + "\n" + path.read_text() + "\n".join(DAMAGED))
    train(0, 1, str(tmp_path), ("train.steps=14",))
    assert [r["step"] for r in records(tmp_path, "train")] == list(range(1, 15)) and len(losses(tmp_path)) == 14


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_record_is_removed_and_others_stay(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [{"kind": "train", "step": step} for step in range(1, 8)]
    path.write_text("\n".join([line, *map(json.dumps, good), line]) + "\n")
    journal = Journal(path, 5)
    assert read_records(path) == good[:5] and journal.redone == 2


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = {
    "kind": st.just("train") | VALUES,
    "name": st.sampled_from(["checkpoint_completed", "resumed"]) | VALUES,
    "step": st.integers(0, 9) | VALUES,
    "checkpoint": st.integers(0, 9) | VALUES,
    "ahead": VALUES,
    "what": st.just("checkpoint") | VALUES,
}
RECORDS = st.fixed_dictionaries({}, optional=FIELDS)


@settings(max_examples=100, deadline=None)
@given(lines=st.lists(RECORDS.map(json.dumps) | VALUES.map(json.dumps) | st.text(max_size=20), max_size=8))
def test_any_lines_are_read(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "metrics.jsonl"
    path.write_text("\n".join(lines), errors="replace")
    assert last_recorded_checkpoint(path) >= -1 or True
    journal = Journal(path, 5)
    kept: list[dict[str, Any]] = read_records(path)
    assert all(0 <= record["step"] <= 5 for record in kept) and 0 <= journal.redone < 2**53
    journal.write({"kind": "train", "step": 6})
    assert read_records(path)[-1]["step"] == 6


def test_the_last_recorded_checkpoint_is_one_with_an_integer_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_recorded_checkpoint(path) == -1
    events: list[dict[str, Any]] = [
        {"step": 4, "name": "checkpoint_completed", "checkpoint": 3},
        {"step": 5, "name": "checkpoint_completed", "checkpoint": None},
        {"step": 5, "name": ["checkpoint_completed"], "checkpoint": 5},
    ]
    path.write_text("\n".join(map(json.dumps, events)))
    assert last_recorded_checkpoint(path) == 3
    path.write_text(json.dumps({"step": 9, "what": "checkpoint", "checkpoint": 8}))  # of version 0.1
    assert last_recorded_checkpoint(path) == 8
