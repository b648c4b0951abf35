"""The folder of a run: one reader of its records, which upgrades old ones and skips damaged ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.storage.files import replace_file
from raymoe.storage.run_folder import RENAMED, RunFolder, find_artifact, parse_record, read_records, serving_targets

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def test_damaged_lines_are_skipped_and_the_others_keep_their_order(tmp_path: Path) -> None:
    good = [{"kind": "train", "step": step, "loss": 1.5} for step in range(3)]
    damaged = ["[1]", "[" * 100_000, '{"kind": "tr', "3", "null", '{"step": "x"}', '{"step": null}', '{"step": true}']
    text = "\n".join([json.dumps(good[0]), *damaged, json.dumps(good[1]), "", json.dumps(good[2])])
    (tmp_path / "r.jsonl").write_bytes(text.encode() + b"\n\xff\xfe\n")
    assert read_records(tmp_path / "r.jsonl") == good
    assert read_records(tmp_path / "absent.jsonl") == []


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30) | JSON.map(json.dumps))
def test_any_line_is_a_record_or_none(line: str) -> None:
    record = parse_record(line)
    assert record is None or type(record["step"]) is int


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4), st.integers(-(2**40), 2**40))
def test_a_record_is_read_as_it_was_written(fields: dict[str, Any], step: int) -> None:
    fields = {key: value for key, value in fields.items() if key not in ("what", "name")}
    text = json.dumps(fields | {"step": step})
    record = parse_record(text)
    assert json.dumps(record) == json.dumps(json.loads(text))


@pytest.mark.parametrize("old", RENAMED)
def test_events_of_version_0_1_get_their_present_names(old: str) -> None:
    record = parse_record(json.dumps({"kind": "event", "step": 1, "what": old, "seconds": 2}))
    assert record == {"kind": "event", "step": 1, "name": RENAMED[old], "seconds": 2}


def test_unknown_old_names_are_kept() -> None:
    assert parse_record('{"step": 1, "what": "applied"}') == {"step": 1, "name": "applied"}
    assert parse_record('{"step": 1, "what": 3}') == {"step": 1, "name": "3"}


def test_no_two_files_of_a_run_have_one_name(tmp_path: Path) -> None:
    names = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    paths = [getattr(RunFolder(tmp_path / "run"), name) for name in names]
    assert len(set(paths)) == len(paths) > 10
    assert serving_targets(str(tmp_path), "app").name == RunFolder(tmp_path).targets.name


def test_an_artifact_is_found_by_folder_by_run_and_by_age(tmp_path: Path) -> None:
    for age, name in enumerate(["old", "new", ".hidden.partial"]):
        folder = tmp_path / "exports" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        os.utime(folder / "manifest.json", (age, age))
    root = str(tmp_path)
    assert find_artifact(root, "newest").name == "new"
    assert find_artifact(root, "old") == find_artifact(root, str(tmp_path / "exports" / "old"))
    with pytest.raises(FileNotFoundError, match="artifact='none'"):
        find_artifact(root, "none")
    with pytest.raises(FileNotFoundError, match="raymoe export"):
        find_artifact(str(tmp_path / "empty"), "newest")


def test_a_failed_replacement_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f"
    replace_file(file, "one \ud800")
    assert file.read_text() == "one ?"

    def failing(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no space"):
        replace_file(file, "two")
    assert file.read_text() == "one ?" and list(tmp_path.iterdir()) == [file]
