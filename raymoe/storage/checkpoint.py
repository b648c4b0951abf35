"""Checkpoints: one safetensors file per rank with logical keys, and a manifest that completes them.

    <checkpoints>/step_00000200/rank_0000_of_0002.safetensors   tensors of a rank
                                rank_0000_of_0002.json          its contents, until the manifest lists them
                                manifest.json                   written last; a checkpoint without it is incomplete

Keys are logical, so any number of ranks can read a checkpoint: each rank reads the keys that it needs.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterable, KeysView, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from raymoe.storage.files import CorruptFile, read_json, write_json
from raymoe.storage.manifest import MANIFEST, Manifest, header, write_tensors

FORMAT_VERSION = 2


class CorruptCheckpoint(CorruptFile):
    """A checkpoint that is incomplete, damaged or in another format. `file` and `reason` describe the damage."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint of `step`."""
    return checkpoints / f"step_{step:08d}"


def _shard(folder: Path, rank: int, world: int) -> Path:
    return folder / f"rank_{rank:04d}_of_{world:04d}.safetensors"


def write_shard(folder: Path, rank: int, world: int, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's tensors, then the sidecar file that `write_manifest` reads.

    Raises OSError, for example for a full disk. No partial file remains under a final name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _shard(folder, rank, world)
    sidecar = path.with_suffix(".json")
    sidecar.unlink(missing_ok=True)  # an earlier attempt's sidecar describes another file
    claim = write_tensors(path, tensors)
    write_json(sidecar, {"file": path.name, **claim, "tensors": header(path)})


def write_manifest(folder: Path, *, step: int, world: int, meta: dict[str, Any]) -> Path:
    """Complete a checkpoint: merge the sidecar files of all ranks, after each rank has written its shard.

    `meta` is any JSON object. The sidecar files, and files of earlier attempts, are removed.
    Raises FileNotFoundError if a rank's shard is missing, ValueError if two ranks wrote the same key.
    """
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for rank in range(world):
        path = _shard(folder, rank, world)
        sidecar = path.with_suffix(".json")
        if not (sidecar.is_file() and path.is_file()):
            raise FileNotFoundError(
                f"{path} is missing: rank {rank} of {world} has not written its part of step {step}"
            )
        claim = read_json(sidecar, CorruptCheckpoint)
        files[path.name] = {"bytes": claim["bytes"], "sha256": claim["sha256"]}
        for key, (dtype, shape) in claim["tensors"].items():
            if key in tensors:
                raise ValueError(
                    f"{folder}: {key!r} is in {tensors[key]['file']} and in {path.name}: one rank owns a key"
                )
            tensors[key] = {"file": path.name, "dtype": dtype, "shape": shape}
    manifest = folder / MANIFEST
    content = {"format_version": FORMAT_VERSION, "step": step, "world": world, "meta": meta}
    write_json(manifest, content | {"files": files, "tensors": tensors})
    for leftover in (*folder.glob("rank_*"), *folder.glob(".rank_*")):
        if leftover.name not in files:
            with suppress(OSError):  # the checkpoint is complete even if old files remain
                leftover.unlink()
    return manifest


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest agrees with its files."""

    folder: Path
    step: int
    world: int
    """Number of ranks that wrote it. Any number can read it."""
    meta: dict[str, Any]
    manifest: Manifest = field(repr=False)

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> Checkpoint:
        """Raises CorruptCheckpoint. `verify=False` skips the checksums, but checks sizes, keys and shapes."""
        manifest = Manifest.open(
            folder, version=FORMAT_VERSION, error=CorruptCheckpoint, verify="all" if verify else "none"
        )
        step, world = manifest.get("step", int), manifest.get("world", int)
        if step < 0 or world < 1:
            raise CorruptCheckpoint(folder / MANIFEST, f"has step {step} and world {world}: below 0 and below 1")
        return cls(folder, step, world, manifest.get("meta", dict), manifest)

    @property
    def keys(self) -> KeysView[str]:
        return self.manifest.tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.manifest.tensors[key].shape

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return these tensors on the CPU. Raises ValueError for a key that the checkpoint lacks."""
        return self.manifest.read(keys)


def _folders(checkpoints: Path) -> list[tuple[int, Path]]:
    """Return steps and their folders, newest first."""
    names = ((re.fullmatch(r"step_(\d{8,})", path.name), path) for path in checkpoints.glob("step_*"))
    return sorted(((int(name[1]), path) for name, path in names if name and path.is_dir()), reverse=True)


def newest(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint with valid checksums, and the reason for each newer one that was skipped."""
    skipped: list[str] = []
    for _, folder in _folders(checkpoints):
        if not (folder / MANIFEST).exists():
            skipped.append(f"{folder}: has no {MANIFEST}, so it was never completed")
            continue
        try:
            return Checkpoint.open(folder), skipped
        except CorruptCheckpoint as error:
            skipped.append(str(error))
    return None, skipped


def complete_steps(checkpoints: Path) -> list[int]:
    """Return the steps of the checkpoints that were completed, newest first, without reading them."""
    return [step for step, folder in _folders(checkpoints) if (folder / MANIFEST).exists()]


def newest_step(checkpoints: Path) -> int:
    """Return the step of the newest checkpoint that was completed, without reading it; -1 without one."""
    return next(iter(complete_steps(checkpoints)), -1)


def prune(checkpoints: Path, keep: int, stay: Collection[int | None]) -> list[Path]:
    """Remove all but the newest `keep` complete checkpoints and those of the steps `stay`. Return the removed folders.

    Incomplete folders older than the newest complete checkpoint are removed too. A newer one may be in progress.
    Raises ValueError if `keep` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} is not allowed: the newest checkpoint always stays")
    kept = 0
    removed: list[Path] = []
    for step, folder in _folders(checkpoints):
        try:
            Checkpoint.open(folder, verify=False)
        except CorruptCheckpoint:
            surplus = kept > 0
        else:
            surplus = kept >= keep
            kept += 1
        if surplus and step not in stay:
            (folder / MANIFEST).unlink(missing_ok=True)  # first: after an interruption the checkpoint is incomplete
            shutil.rmtree(folder)
            removed.append(folder)
    return removed


class BackgroundWriter:
    """Writes a rank's part of checkpoints on one thread. Training waits only for a copy in memory."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        """Exception of the last job, for example OSError for a full disk. Set before `done` becomes true."""
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._job: Future[None] | None = None

    def write(self, folder: Path, rank: int, world: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors now and write them later (`write_shard`).

        Waits for the job in flight first, so that at most one copy exists.
        """
        self.wait()
        copies = {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
        self.submit(write_shard, folder, rank, world, copies)

    def submit(self, job: Callable[..., Any], *arguments: Any) -> None:
        """Run job(*arguments) after the job in flight. Clears the error of an earlier job."""
        self.wait()
        self.error = None
        self._job = self._pool.submit(self._run, job, *arguments)

    def _run(self, job: Callable[..., Any], *arguments: Any) -> None:
        try:
            job(*arguments)
        except Exception as error:
            self.error = error

    def done(self) -> bool:
        """Return whether no job is in flight."""
        return self._job is None or self._job.done()

    def wait(self) -> None:
        """Wait until no job is in flight. Never raises: see `error`."""
        if self._job is not None:
            self._job.result()

    def close(self) -> None:
        """Wait for the job in flight and end the thread."""
        self._pool.shutdown()
