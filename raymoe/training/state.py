"""What a run must not lose: captured into checkpoints off the critical path, restored on any world size."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from raymoe.config import Config
from raymoe.parallel.remap import Membership
from raymoe.parallel.sharded import Sharded
from raymoe.storage.checkpoint import (
    BackgroundWriter,
    Checkpoint,
    CorruptCheckpoint,
    newest,
    prune,
    step_folder,
    write_manifest,
)
from raymoe.storage.manifest import MANIFEST
from raymoe.storage.run_folder import RunFolder
from raymoe.training.journal import acknowledged
from raymoe.training.optimizer import Optimizer

log = logging.getLogger(__name__)


@dataclass
class Position:
    """Where a run stands. `step` counts optimizer steps done, skipped ones included."""

    step: int = 0
    updates: int = 0
    tokens: int = 0
    skipped: int = 0
    version: int = 0
    """Of the assignment: the plans applied."""
    membership: Membership = Membership((), ())
    overlap_from: int = 0
    """The step from which the ghosts of the membership fade, where it has any."""
    folded: bool = True
    """Whether experts are in clusters: false until the burn-in of a run that starts dense has ended."""
    forced: bool = False
    """Whether the plan that `regroup.force` asks for was applied."""
    validation: dict[int, float] = field(default_factory=dict)
    """Validation loss by step."""

    def meta(self, config: Config) -> dict[str, Any]:
        return {
            "updates": self.updates,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "version": self.version,
            "assignment": self.membership.assignment,
            "ghosts": [sorted(row.items()) for row in self.membership.ghosts],
            "overlap_from": self.overlap_from,
            "folded": self.folded,
            "forced": self.forced,
            "validation": {str(step): loss for step, loss in self.validation.items() if math.isfinite(loss)},
            "config": self.config_now(config).to_dict(),
        }

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Position:
        """Raises CorruptCheckpoint when it says of no position."""
        meta = checkpoint.meta
        try:
            membership = Membership(tuple(map(tuple, meta["assignment"])), tuple(dict(row) for row in meta["ghosts"]))
            counts = [meta[name] for name in ("updates", "tokens", "skipped", "version", "overlap_from")]
            if not all(type(count) is int and count >= 0 for count in counts):
                raise ValueError("its counts are not integers from 0 up")
            validation = {int(step): float(loss) for step, loss in meta["validation"].items()}
            updates, tokens, skipped, version, overlap_from = counts
            return cls(
                checkpoint.step, updates, tokens, skipped, version, membership, overlap_from, bool(meta["folded"]),
                bool(meta["forced"]), validation,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CorruptCheckpoint(checkpoint.folder / MANIFEST, f"does not describe a run: {error!r}") from None

    @classmethod
    def start(cls, config: Config) -> Position:
        """Before the first step."""
        membership = Membership(config.model.default_assignment(), ({},) * config.model.layers)
        return cls(membership=membership, folded=config.regroup.start == "factored")

    def config_now(self, config: Config) -> Config:
        """The run's config as its model stands: flat until it is folded."""
        if self.folded:
            return config
        return replace(
            config, model=replace(config.model, experts="flat"), regroup=replace(config.regroup, start="factored")
        )


class LostCheckpoints(OSError):
    """A run has completed checkpoints and none can be read: to begin anew would be to lose them."""


def find(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The run's newest checkpoint whose checksums hold, the same on all ranks, and what was passed over. A collective.

    Raises LostCheckpoints when there is none although there should be.
    """
    answer: list[Any] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        checkpoint, skipped = newest(RunFolder(run).checkpoints)
        lost = -1 if checkpoint else acknowledged(RunFolder(run).metrics)
        answer = [(checkpoint and str(checkpoint.folder), skipped, lost)]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    path, skipped, lost = answer[0]
    if lost >= 0:
        raise LostCheckpoints(
            f"{run / 'checkpoints'} has no checkpoint that can be read, and the run has completed one of step {lost}: "
            f"bring the folder back and resume, or start a new run ({'; '.join(skipped) or 'it is empty or not there'})"
        )
    return (Checkpoint.open(Path(path), verify=False) if path else None), skipped


def restore(checkpoint: Checkpoint, sharded: Sharded, optimizer: Optimizer) -> None:
    """Read exactly what this rank holds: weights, biases and moments, by logical key."""
    views = sharded.transformer.logical() | optimizer.logical()
    tensors = checkpoint.read(views)
    for key, view in views.items():
        if tensors[key].shape != view.shape:
            raise ValueError(
                f"{checkpoint.folder}: {key!r} has shape {list(tensors[key].shape)}, this config needs {list(view.shape)}"
            )
        view.copy_(tensors[key])
    optimizer.restore(checkpoint.meta["updates"])


@dataclass
class Begun:
    """A checkpoint that is being made."""

    folder: Path
    step: int
    meta: dict[str, Any]
    started: float
    written: bool = False
    """Whether every rank's file is there, so that it can be sealed."""


class Checkpointer:
    """Writes checkpoints in the background; agreement rides on the step's own collective.

    At a checkpoint each rank copies what it owns and goes on. `pending` is 1 while its file is being written; once
    the sum over ranks is 0, rank 0 seals the checkpoint with its manifest and prunes, on its writing thread too, and
    is pending until that is done.
    """

    def __init__(self, folder: Path, config: Config, sharded: Sharded, optimizer: Optimizer) -> None:
        self.folder, self.config = folder, config
        self.sharded, self.optimizer = sharded, optimizer
        self.writer = BackgroundWriter()
        self._begun: Begun | None = None
        self.last_sealed = -1
        self.in_use: Callable[[], Collection[int]] = tuple
        """Steps of checkpoints that somebody reads, which stay."""
        self._covered_until = time.monotonic()
        """What was done after this second would be lost."""
        self._seconds = 0.0

    def begin(self, position: Position, extra: Mapping[str, Tensor]) -> None:
        """Start writing a checkpoint of this position. `extra`: further tensors by key, of this rank."""
        started = time.perf_counter()
        views = self.sharded.transformer.logical()
        owned = {key: views[key] for key in self.sharded.owned()}
        moments = self.optimizer.logical()
        owned |= {key: view for key, view in moments.items() if key.split(".", 2)[2] in owned}
        folder = step_folder(self.folder, position.step)
        self.writer.write(folder, self.sharded.rank, self.sharded.world, owned | dict(extra))
        self._begun = Begun(folder, position.step, position.meta(self.config), started)

    @property
    def due(self) -> bool:
        """Whether the next one must begin now for no more than `checkpoint.max_loss_s` to be lost at any time."""
        bound = self.config.checkpoint.max_loss_s
        if not bound or self.unsealed:
            return False
        return time.monotonic() - self._covered_until + self._seconds >= bound

    @property
    def pending(self) -> bool:
        return self._begun is not None and not self.writer.done()

    @property
    def unsealed(self) -> bool:
        """Whether a checkpoint was begun that is not complete yet. The same on all ranks."""
        return self._begun is not None

    @property
    def failure(self) -> str:
        """Why this rank could not do its part, or nothing."""
        return str(self.writer.error) or repr(self.writer.error) if self.writer.error else ""

    def settle(self, failed: bool) -> dict[str, Any] | None:
        """Called on all ranks once none is pending: what became of the checkpoint, or None while rank 0 has to seal it."""
        begun = self._begun
        assert begun is not None
        if not failed and not begun.written:
            begun.written = True
            if self.sharded.rank == 0:
                self.writer.submit(self._seal, begun)
            return None
        self._begun = None
        self.writer.error = None
        self._seconds = time.perf_counter() - begun.started
        if not failed:
            self.last_sealed = begun.step
        self._covered_until = time.monotonic() - self._seconds  # after a failed one too: the next in its own time
        name = "checkpoint_failed" if failed else "checkpoint_completed"
        return {"name": name, "checkpoint": begun.step, "seconds": self._seconds}

    def _seal(self, begun: Begun) -> None:
        """Write the manifest; keep the newest checkpoints and, of those that are still there, the best on validation."""
        write_manifest(begun.folder, step=begun.step, world=self.sharded.world, meta=begun.meta)
        losses = {int(step): loss for step, loss in begun.meta["validation"].items()}
        there = {step: loss for step, loss in losses.items() if step_folder(self.folder, step).is_dir()}
        best = min(there, key=there.__getitem__, default=None)
        try:
            prune(self.folder, self.config.checkpoint.keep, {best, *self.in_use()})
        except OSError as error:  # the checkpoint is complete; the next one's pruning tries again
            log.warning("old checkpoints in %s could not be removed: %s", self.folder, error)

    def finish(self) -> None:
        """Wait for this rank's part."""
        self.writer.wait()
