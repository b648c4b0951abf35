"""The run's JSONL files: one record per line, each step once."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from raymoe.storage.files import replace_file
from raymoe.storage.run_folder import RunFolder, parse_record, read_records

MAX_STEP = 2**53
"""Upper bound of a step. A record with a larger one is damaged."""


def finite(value: Any) -> Any:
    """Replace numbers that JSON cannot represent (NaN, infinity) by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def next_attempt(run: Path) -> int:
    """Increment the number of worker groups that this run has had, and return it. Collective."""
    attempt = [0]
    if not dist.is_initialized() or dist.get_rank() == 0:
        path = RunFolder(run).attempt
        with contextlib.suppress(OSError, ValueError):  # the first attempt has no file
            attempt = [int(path.read_text())]
        attempt[0] += 1
        replace_file(path, f"{attempt[0]}\n")
    if dist.is_initialized():
        dist.broadcast_object_list(attempt)
    return attempt[0]


def last_recorded_checkpoint(path: Path) -> int:
    """Return the step of the last checkpoint that `path` records as completed or resumed from; -1 without one.

    A resume removes the record of the completion of its checkpoint, which was written some steps later.
    """
    found = -1
    for record in read_records(path):
        step = {"checkpoint_completed": record.get("checkpoint"), "resumed": record["step"]}.get(
            str(record.get("name"))
        )
        found = step if type(step) is int else found
    return found


class Journal:
    """Appends records to a JSONL file. A restart removes the records after the restored step.

    A record with `ahead` describes an event between its step and the next. The checkpoint of its step was taken
    before that event.
    """

    def __init__(self, path: Path, step: int) -> None:
        """Keep the records of `path` up to `step`. Damaged lines are removed."""
        kept: list[str] = []
        self.redone = 0
        """Steps after `step` that were recorded before. The run repeats them."""
        for line in path.read_text(errors="replace").split("\n") if path.exists() else []:
            record = parse_record(line)
            if record is None or not 0 <= record["step"] < MAX_STEP:
                continue
            at = record["step"]
            if at > step or (at == step and record.get("ahead")):
                self.redone = max(self.redone, at - step) if record.get("kind") == "train" else self.redone
            else:
                kept.append(line)
        replace_file(path, "".join(line + "\n" for line in kept))
        self._path = path
        self._backlog = ""

    def write(self, record: dict[str, Any]) -> None:
        """Append a record. If the disk is full, keep it in memory and write it together with the next one."""
        self._backlog += json.dumps(finite(record)) + "\n"
        try:
            with self._path.open("ab", buffering=0) as file:
                end, rest = file.tell(), self._backlog.encode()
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(end)  # half a line would damage the next one
                    raise
        except OSError as error:
            print(f"{self._path}: cannot write ({error.strerror}); keeping records in memory", file=sys.stderr)
            return
        self._backlog = ""
