"""Records of a run: to this worker's metrics and, from rank 0, to the run's folder and the tracker."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from raymoe.config import Config
from raymoe.metrics import TrainingMetrics
from raymoe.storage.checkpoint import Checkpoint
from raymoe.storage.run_folder import RunFolder
from raymoe.training.journal import Journal
from raymoe.training.state import Position
from raymoe.training.trackers import Tracker, scalars, start_tracker


class RunLog:
    """Writes records at the current step of `position`."""

    def __init__(self, config: Config, run: Path, metrics: TrainingMetrics, position: Position, rank: int) -> None:
        """Rank 0 removes the records after the position's step."""
        self.metrics, self.position = metrics, position
        self.journal = Journal(RunFolder(run).metrics, position.step) if rank == 0 else None
        self.plans = Journal(RunFolder(run).plans, position.step) if rank == 0 else None
        self.tracker: Tracker | None = None
        if rank == 0:
            try:
                self.tracker = start_tracker(config, run, position.step)
            except Exception as error:  # of a third-party service, which must not end the training
                self._disable(error)

    @property
    def redone_steps(self) -> int:
        """Steps after the restored one that were recorded before. Rank 0 counts them."""
        return self.journal.redone if self.journal else 0

    def record(self, kind: str, **fields: Any) -> None:
        """Write one record to the metrics and to `metrics.jsonl`."""
        record = {**fields, "kind": kind, "step": self.position.step}
        self.metrics.observe(record)
        if self.journal:
            self.journal.write(record)
        if self.tracker and kind in ("train", "validation"):
            self._track(self.tracker, kind, record)

    def event(self, *, name: str, **fields: Any) -> None:
        """Write one record of kind `event`."""
        self.record("event", name=name, **fields)

    def plan(self, name: str, **fields: Any) -> None:
        """Write one record of regrouping to the metrics and to `plans.jsonl`."""
        record = {**fields, "kind": "plan", "step": self.position.step, "name": name}
        self.metrics.observe(record)
        if self.plans and name not in ("messages", "status"):
            self.plans.write({**record, "time": time.time()})
        if name in ("applied", "folded"):
            self.assignment(ahead=True)

    def assignment(self, **fields: Any) -> None:
        """Record the current assignment of experts to clusters."""
        position = self.position
        self.record("assignment", **fields, version=position.version, assignment=position.membership.assignment)

    def started(self, *, attempt: int, workers: int, checkpoint: Checkpoint | None, skipped: list[str]) -> None:
        """Record how this worker group starts: skipped checkpoints, then resumed or restarted if it is not the first.

        A worker group may be lost before the first checkpoint, and then the next one restarts from step 0: with random
        weights, or with those of the checkpoint of step 0 (`train.init`).
        """
        if checkpoint and not checkpoint.step:
            if attempt == 1:
                origin = checkpoint.meta["init"]
                self.event(name="initialized", source=origin["folder"], source_step=origin["step"])
            checkpoint = None
        for reason in skipped:
            self.event(name="checkpoint_skipped", reason=reason)
        if checkpoint or attempt > 1:
            self.event(
                name="resumed" if checkpoint else "restarted",
                attempt=attempt,
                workers=workers,
                redone_steps=self.redone_steps,
                skipped_steps=self.position.skipped,
                **({"checkpoint": str(checkpoint.folder)} if checkpoint else {}),
            )
        if not checkpoint:
            self.assignment()

    def close(self) -> None:
        """Complete the tracker's run."""
        if self.tracker:
            try:
                self.tracker.close()
            except Exception as error:  # of a third-party service
                self._disable(error)

    def _track(self, tracker: Tracker, kind: str, record: dict[str, Any]) -> None:
        try:
            tracker.log(self.position.step, scalars(kind, record))
        except Exception as error:  # of a third-party service, which must not end the training
            self._disable(error)

    def _disable(self, error: Exception) -> None:
        self.tracker = None
        self.event(name="tracker_failed", reason=f"{type(error).__name__}: {error}")
