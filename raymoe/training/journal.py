"""A run's own record: `metrics.jsonl`, one JSON object a line, and where its folder keeps what."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from raymoe.storage.files import replace_file
from raymoe.storage.run_folder import RunFolder


def finite(value: Any) -> Any:
    """`value` with numbers that JSON cannot hold as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def next_attempt(run: Path) -> int:
    """The number of this worker group in a run's folder, the same on all of its ranks: one more each time. A collective."""
    told = [0]
    if not dist.is_initialized() or dist.get_rank() == 0:
        path = RunFolder(run).attempt
        with contextlib.suppress(OSError, ValueError):  # there is none yet
            told = [int(path.read_text())]
        told[0] += 1
        replace_file(path, f"{told[0]}\n")
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]


def acknowledged(path: Path) -> int:
    """Step of the last checkpoint that a record in `path` says is complete, or was resumed from; -1 where none is.

    A resume cuts the record that its checkpoint was complete, which was made some steps later.
    """
    step = -1
    for line in path.read_text(errors="replace").split("\n") if path.exists() else []:
        with contextlib.suppress(ValueError, AttributeError, KeyError, RecursionError):
            record = json.loads(line)
            if record.get("name") == "checkpoint_completed":
                step = record["checkpoint"]
            elif record.get("name") == "resumed":
                step = record["step"]
    return step


class Journal:
    """Appends records; on a restart cuts back to the restored step, so that each step stands there once.

    A record with `ahead` is of what happens between its step and the next: a checkpoint of its step was taken before.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept: list[str] = []
        self.redone = 0
        """Steps that were on record after `step`: they are done again."""
        if path.exists():
            for line in path.read_text(errors="replace").split("\n"):
                try:
                    record = json.loads(line)
                    at = record.get("step", 0)
                except (ValueError, AttributeError, RecursionError):
                    continue  # what a killed worker left behind, or a bad disk
                if not isinstance(at, int) or at > step or (at == step and record.get("ahead")):
                    self._cut(record, step)
                    continue
                kept.append(line)
        replace_file(path, "".join(line + "\n" for line in kept))
        self._path = path
        self._backlog = ""

    def _cut(self, record: dict[str, Any], step: int) -> None:
        if record.get("kind") == "train":
            self.redone = max(self.redone, record["step"] - step)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. On a full disk it is kept and written with a later one; training goes on."""
        self._backlog += json.dumps(finite(record)) + "\n"
        try:
            with self._path.open("ab", buffering=0) as file:
                end, rest = file.tell(), self._backlog.encode()
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(end)  # half a line would spoil the next one
                    raise
        except OSError as error:
            print(f"{self._path}: cannot write ({error.strerror}); keeping records in memory", file=sys.stderr)
            return
        self._backlog = ""
