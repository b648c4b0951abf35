"""The life of a checkpoint: requested, written by all ranks, finalized by rank 0, and mirrored.

Training does not wait. Each rank copies its tensors and writes them in the background; flags that ride on the
all-reduce of each step (`StepReport`) inform all ranks at the same step that every rank has written. Rank 0 then writes the
manifest and prunes, in the background too.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from raymoe.config import Config
from raymoe.parallel.sharded import Sharded
from raymoe.storage.checkpoint import BackgroundWriter, complete_steps, prune, step_folder, write_manifest
from raymoe.storage.mirror import BackgroundMirror, Mirror
from raymoe.storage.run_folder import RunFolder
from raymoe.training.failures import Unrecoverable
from raymoe.training.optimizer import Optimizer
from raymoe.training.state import DataIdentity, Position
from raymoe.training.step_report import all_reduce_sum, any_rank, rank_and_world

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 1.0
MAX_RETRY_S = 60.0
"""Delays between attempts to write the last checkpoint: they double from the first to the maximum."""


class Clock(Protocol):
    """The functions of `time` that checkpointing uses."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


def free_bytes(folder: Path) -> int:
    """Return the free space of the disk of `folder`, or of its nearest parent that exists."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return shutil.disk_usage(existing).free


@dataclass
class Write:
    """A checkpoint that is not complete yet."""

    folder: Path
    step: int
    meta: dict[str, Any]
    started: float
    finalizing: bool = False
    """Every rank has written its file; rank 0 writes the manifest."""


class Checkpointing:
    """Writes the checkpoints of a run. One object serves a worker for its whole life; `attach` changes the model.

    `log` takes an event's name and fields.
    """

    def __init__(
        self,
        config: Config,
        run: Path,
        data: DataIdentity,
        device: torch.device,
        log: Callable[..., None],
        *,
        last_completed: int = -1,
        clock: Clock = time,
        free_bytes: Callable[[Path], int] = free_bytes,
    ) -> None:
        self.config, self.data, self.device, self.log = config, data, device, log
        self.paths, self.folder = RunFolder(run), RunFolder(run).checkpoints
        self.clock, self.free_bytes = clock, free_bytes
        self.rank, self.world = rank_and_world()
        self.writer = BackgroundWriter()
        self.mirror: BackgroundMirror | None = None
        if config.checkpoint.storage and self.rank == 0:
            self.mirror = BackgroundMirror(
                Mirror(config.checkpoint.storage, config.run.name), run, config.checkpoint.keep
            )
        self.last_completed = last_completed
        """Step of the newest complete checkpoint of this worker group; -1 without one."""
        self._current: Write | None = None
        self._covered_until = clock.monotonic()
        """Training after this time is in no checkpoint."""
        self._seconds = 0.0
        """Duration of the last checkpoint."""

    def attach(self, sharded: Sharded, optimizer: Optimizer) -> None:
        """Use the tensors of this model from the next checkpoint on."""
        assert self._current is None, "a checkpoint of the previous model is in progress"
        self.sharded, self.optimizer = sharded, optimizer

    # Flags of a step's report.

    @property
    def requested(self) -> bool:
        """Whether the driver requests a checkpoint. Only rank 0 reads the request."""
        return self.rank == 0 and self.paths.checkpoint_request.exists()

    @property
    def due(self) -> bool:
        """Whether a checkpoint must start now to respect `checkpoint.max_loss_s`. Only rank 0 measures."""
        bound = self.config.checkpoint.max_loss_s
        if self.rank or not bound or self.in_progress:
            return False
        return self.clock.monotonic() - self._covered_until + self._seconds >= bound

    @property
    def writing(self) -> bool:
        """Whether this rank has not finished its part of the checkpoint in progress."""
        return self._current is not None and not self.writer.done()

    @property
    def failure(self) -> str:
        """Why this rank could not do its part of the checkpoint in progress; empty if it could."""
        return str(self.writer.error) or repr(self.writer.error) if self.writer.error else ""

    @property
    def in_progress(self) -> bool:
        """Whether a checkpoint is not complete yet. The same on all ranks."""
        return self._current is not None

    # Write, finalize, complete.

    def write(self, position: Position, extra: Mapping[str, Tensor]) -> None:
        """Start a checkpoint of this position, after the one in progress is complete. Collective.

        extra: further tensors of this rank by key.
        """
        self.wait_for_checkpoint()
        started = self.clock.monotonic()
        folder = step_folder(self.folder, position.step)
        self.writer.write(folder, self.rank, self.world, self._owned_tensors() | dict(extra))
        meta = position.meta(self.config) | {"data": self.data.meta()}
        self._current = Write(folder, position.step, meta, started)

    def _owned_tensors(self) -> dict[str, Tensor]:
        """Return views of the weights, biases and moments that this rank writes, by logical key."""
        views = self.sharded.transformer.logical()
        owned = {key: views[key] for key in self.sharded.owned()}
        moments = self.optimizer.logical()
        return owned | {key: view for key, view in moments.items() if key.split(".", 2)[2] in owned}

    def update(self, *, writing: bool, failed: bool) -> None:
        """Finalize or complete the checkpoint in progress, once no rank is writing. Collective.

        writing, failed: the flags of all ranks (`StepReport`).
        """
        current = self._current
        if current is None or writing:
            return
        if failed or current.finalizing:
            self._complete(current, failed)
            return
        current.finalizing = True
        if self.rank == 0:
            self.writer.submit(self._finalize, current)

    def _finalize(self, current: Write) -> None:
        """Write the manifest. Keep the newest checkpoints, the best on validation, and those being mirrored."""
        write_manifest(current.folder, step=current.step, world=self.world, meta=current.meta)
        losses = {int(step): loss for step, loss in current.meta["validation"].items()}
        present = {step: loss for step, loss in losses.items() if step_folder(self.folder, step).is_dir()}
        best = min(present, key=present.__getitem__, default=None)
        try:
            prune(
                self.folder, self.config.checkpoint.keep, {best, *(self.mirror.pending_steps() if self.mirror else ())}
            )
        except OSError as error:  # this checkpoint is complete, and the next one prunes again
            logger.warning("old checkpoints in %s could not be removed: %s", self.folder, error)

    def _complete(self, current: Write, failed: bool) -> None:
        """Record the outcome of a checkpoint, and mirror it if it succeeded. Collective."""
        event: dict[str, Any] = {"name": "checkpoint_failed" if failed else "checkpoint_completed"}
        if failed:
            reasons: list[Any] = [self.failure]
            if self.world > 1:
                reasons = [None] * self.world
                dist.all_gather_object(reasons, self.failure)
            event["reason"] = "; ".join(reason for reason in reasons if reason)
        self._current, self.writer.error = None, None
        self._seconds = self.clock.monotonic() - current.started
        self._covered_until = (
            self.clock.monotonic() - self._seconds
        )  # after a failure too: the next one has its own time
        self.log(**event, checkpoint=current.step, seconds=self._seconds)
        if failed:
            return
        self.last_completed = current.step
        if self.mirror:
            self._log_mirror_failures(self.mirror.failures())
            if current.step % self.config.checkpoint.every == 0:
                self.mirror.push(current.step)

    def wait_for_checkpoint(self) -> None:
        """Wait until no checkpoint is in progress. Collective."""
        while self.in_progress:
            self.writer.wait()
            self.update(writing=False, failed=any_rank(bool(self.failure), self.device))

    def fulfill_request(self) -> None:
        """Complete the requested checkpoint before the next step: the driver is about to end the workers. Collective."""
        self.wait_for_checkpoint()
        if self.rank == 0:
            self.paths.checkpoint_request.unlink(missing_ok=True)

    # Disk space, and the end of a run.

    def check_space(self) -> None:
        """Raise Unrecoverable if the disk has no room for the checkpoints that the run keeps. Collective."""
        size = self._size()
        complete = [step for step in complete_steps(self.folder) if step]  # initial weights (step 0) have no moments
        missing = max(1, self.config.checkpoint.keep + 1 - len(complete))
        needed, free = missing * size, self.free_bytes(self.folder)
        if any_rank(self.rank == 0 and free < needed, self.device):
            raise Unrecoverable(
                f"{self.folder} needs {needed:,} bytes for {missing} checkpoints of {size:,} bytes each, and its disk has "
                f"{free:,} bytes free: free disk space, lower checkpoint.keep, or set run.root to another disk"
            )

    def _size(self) -> int:
        """Return the bytes of a checkpoint: the tensors of all ranks, without statistics. Collective."""
        own = sum(tensor.numel() * tensor.element_size() for tensor in self._owned_tensors().values())
        return int(all_reduce_sum(torch.tensor(float(own), dtype=torch.float64), self.device))

    def finish(self, position: Position, extra: Callable[[], Mapping[str, Tensor]]) -> None:
        """Ensure that the last checkpoint is complete, and mirrored if the run has a mirror. Collective.

        The weights stay in memory while a failed checkpoint is retried, with increasing delays, for
        `checkpoint.final_wait_s`. `extra`: returns the further tensors, see `write`. Raises Unrecoverable if the
        checkpoint cannot be written, OSError if it cannot be mirrored.
        """
        self.wait_for_checkpoint()
        delay, waited, size = FIRST_RETRY_S, 0.0, self._size()
        while self.last_completed != position.step:
            state = f"needs {size:,} bytes, and its disk has {self.free_bytes(self.folder):,} bytes free"
            if waited >= self.config.checkpoint.final_wait_s:
                raise Unrecoverable(
                    f"the checkpoint of step {position.step} could not be written under {self.folder} within "
                    f"{waited:.0f} s: it {state}. Free disk space or repair the folder, and resume: the run repeats the "
                    f"steps after its newest complete checkpoint (step {max(0, self.last_completed)})"
                )
            self.log(name="checkpoint_retry", checkpoint=position.step, reason=f"it {state}", retry_in_s=delay)
            self._sleep(delay)
            delay, waited = min(2 * delay, MAX_RETRY_S), waited + delay
            self.write(position, extra())
            self.wait_for_checkpoint()
        if self.mirror:
            self._finish_mirror(self.mirror, position.step)

    def _sleep(self, seconds: float) -> None:
        deadline = self.clock.monotonic() + seconds
        while (left := deadline - self.clock.monotonic()) > 0:
            self.clock.sleep(min(1.0, left))

    def _finish_mirror(self, mirror: BackgroundMirror, step: int) -> None:
        if step != mirror.newest:
            mirror.push(step)
        failures = mirror.failures(wait=True)
        self._log_mirror_failures(failures)
        if reason := dict(failures).get(step):
            raise OSError(f"the checkpoint of step {step} is in {self.folder}, but not at checkpoint.storage: {reason}")

    def _log_mirror_failures(self, failures: list[tuple[int, str]]) -> None:
        for step, reason in failures:
            self.log(name="copy_failed", checkpoint=step, reason=reason)
