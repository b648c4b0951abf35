"""The state that a run restores: its position, its newest checkpoint, and the identity of its data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from raymoe.config import Config
from raymoe.data.corpus import Corpus
from raymoe.parallel.remap import Membership
from raymoe.parallel.sharded import Sharded
from raymoe.storage.checkpoint import Checkpoint, CorruptCheckpoint, newest
from raymoe.storage.manifest import MANIFEST
from raymoe.storage.run_folder import RunFolder
from raymoe.training.failures import Unrecoverable
from raymoe.training.journal import last_recorded_checkpoint
from raymoe.training.optimizer import Optimizer


class LostCheckpoints(OSError):
    """No completed checkpoint can be read. A restart from step 0 would discard them."""


@dataclass
class Position:
    """Progress of a run, without its tensors. `step` counts optimizer steps, including skipped ones."""

    step: int = 0
    updates: int = 0
    tokens: int = 0
    skipped: int = 0
    version: int = 0
    """Version of the assignment: the number of plans applied."""
    membership: Membership = Membership((), ())
    overlap_from: int = 0
    """Step at which the ghosts of the membership start to fade, if it has ghosts."""
    folded: bool = True
    """Whether experts are in clusters. False during the burn-in of a run that starts dense."""
    forced: bool = False
    """Whether the plan of `regroup.force` was applied."""
    validation: dict[int, float] = field(default_factory=dict)
    """Validation loss by step."""

    def meta(self, config: Config) -> dict[str, Any]:
        """Return the fields that a checkpoint's manifest stores. `of` reads them back."""
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
        """Return the position that a checkpoint stores. Raises CorruptCheckpoint if it stores none."""
        meta = checkpoint.meta
        try:
            membership = Membership(tuple(map(tuple, meta["assignment"])), tuple(dict(row) for row in meta["ghosts"]))
            counts = [meta[name] for name in ("updates", "tokens", "skipped", "version", "overlap_from")]
            if not all(type(count) is int and count >= 0 for count in counts):
                raise ValueError("its counts are not integers of at least 0")
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
        """Return the position before the first step."""
        membership = Membership(config.model.default_assignment(), ({},) * config.model.layers)
        return cls(membership=membership, folded=config.regroup.start == "factored")

    def config_now(self, config: Config) -> Config:
        """Return the config of the model at this position: flat experts until the run is folded."""
        if self.folded:
            return config
        return replace(
            config, model=replace(config.model, experts="flat"), regroup=replace(config.regroup, start="factored")
        )


# Identity of the data


@dataclass(frozen=True)
class DataIdentity:
    """Fingerprints of a run's corpus and tokenizer. Checkpoints store them."""

    corpus: str
    tokenizer: str

    @classmethod
    def of(cls, corpus: Corpus) -> DataIdentity:
        return cls(corpus.fingerprint, corpus.tokenizer_fingerprint)

    def meta(self) -> dict[str, str]:
        return {"corpus": self.corpus, "tokenizer": self.tokenizer}

    def require_same(self, meta: dict[str, Any]) -> None:
        """Raise Unrecoverable if the checkpoint with this `meta` was trained on other data.

        A checkpoint of version 0.1 stores no fingerprints and is accepted.
        """
        stored = meta.get("data")
        if not isinstance(stored, dict):
            return
        for name, own in self.meta().items():
            if stored.get(name, own) != own:
                raise Unrecoverable(
                    f"the run's checkpoint was trained with {name} {stored[name]}, and this launch has {name} {own}: "
                    "restore the text and the tokenizer, or the prepared corpus of the run, or start a new run"
                )


# Restoring


def find_checkpoint(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the run's newest valid checkpoint, the same on all ranks, and the reasons for skipping newer ones. Collective.

    Raises LostCheckpoints if the run has completed checkpoints and none is valid.
    """
    found: list[Any] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        checkpoint, skipped = newest(RunFolder(run).checkpoints)
        lost = -1 if checkpoint else last_recorded_checkpoint(RunFolder(run).metrics)
        found = [(checkpoint and str(checkpoint.folder), skipped, lost)]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    path, skipped, lost = found[0]
    if lost >= 0:
        raise LostCheckpoints(
            f"{RunFolder(run).checkpoints} has no valid checkpoint, and the run completed the checkpoint of step {lost}: "
            f"bring the folder back and resume, or start a new run ({'; '.join(skipped) or 'the folder is empty or missing'})"
        )
    return (Checkpoint.open(Path(path), verify=False) if path else None), skipped


def require_initial_weights(config: Config, checkpoint: Checkpoint | None, run: Path) -> None:
    """Raise Unrecoverable if a run that starts from stored weights has lost them: random weights are not those."""
    if config.train.init and checkpoint is None:
        raise Unrecoverable(
            f"{RunFolder(run).checkpoints} has no valid checkpoint, not even the one of step 0 with the weights of "
            f"train.init={config.train.init}: bring the folder back and resume, or start a new run"
        )


def restore(checkpoint: Checkpoint, sharded: Sharded, optimizer: Optimizer) -> None:
    """Read this rank's weights, selection biases and moments by logical key. Initial weights (step 0) have no moments.

    Raises ValueError if a tensor has another shape than the config requires.
    """
    views = sharded.transformer.logical() | (optimizer.logical() if checkpoint.step else {})
    tensors = checkpoint.read(views)
    for key, view in views.items():
        if tensors[key].shape != view.shape:
            raise ValueError(
                f"{checkpoint.folder}: {key!r} has shape {list(tensors[key].shape)}, this config needs {list(view.shape)}"
            )
        view.copy_(tensors[key])
    optimizer.restore(checkpoint.meta["updates"])
