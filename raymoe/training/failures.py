"""Consecutive failures of a run, kept in its folder, and the decision whether it restarts."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from raymoe.storage.checkpoint import newest_step
from raymoe.storage.files import replace_file
from raymoe.storage.run_folder import RunFolder


class TooManyFailures(RuntimeError):
    """A run exceeded `train.max_failures`, or failed in a way that a restart cannot mend. The message has the error."""


class Unrecoverable(RuntimeError):
    """A failure of a worker that a restart cannot mend. The run ends with this message."""


def stop_reason(run: Path, allowed: int) -> str:
    """Return why the run must not restart: more than `allowed` consecutive failures at one checkpoint. Empty if it may."""
    record = _read(run)
    if "unrecoverable" in record:
        return str(record["unrecoverable"])
    if record.get("in_a_row", 0) <= allowed:
        return ""
    return (
        f"{record['in_a_row']} failures in a row after the checkpoint of step {record['step']}; "
        f"the last error: {record['error']}"
    )


def record_failure(run: Path, error: Exception) -> None:
    """Count one more failure: consecutive to those before it unless a newer checkpoint exists."""
    step, before = newest_step(RunFolder(run).checkpoints), _read(run)
    if "unrecoverable" in before:
        return
    in_a_row = before.get("in_a_row", 0) + 1 if before.get("step") == step else 1
    _write(run, {"in_a_row": in_a_row, "step": step, "error": summarize(error)})


def record_unrecoverable(run: Path, error: Unrecoverable) -> None:
    """Record that the run must end; the next worker group returns before it trains."""
    _write(run, {"unrecoverable": str(error)})


def summarize(error: Exception) -> str:
    """Return the last line of each worker's error, each distinct line once."""
    causes = getattr(error, "worker_failures", None) or {0: error}
    lines = dict.fromkeys(str(cause).strip().splitlines()[-1] for cause in causes.values() if str(cause).strip())
    return "; ".join(lines)[:2000] or type(error).__name__


def _read(run: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(RunFolder(run).failures.read_text())
        if isinstance(record, dict):
            return record
    return {}


def _write(run: Path, record: dict[str, Any]) -> None:
    replace_file(RunFolder(run).failures, json.dumps(record))
