"""Writing an artifact: staged in a hidden folder beside the target, and published by one rename."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from raymoe.config import from_dict
from raymoe.data.document import CHAT_TEMPLATE_FILE
from raymoe.storage.artifact import FORMAT_VERSION, TOKENIZER
from raymoe.storage.artifact_encoding import encode_tensors
from raymoe.storage.artifact_layout import Place, check_assignment, int4_entries, layout
from raymoe.storage.files import durable_write, sync, write_json
from raymoe.storage.manifest import MANIFEST, describe_file, write_tensors


@dataclass(frozen=True)
class StagedArtifact:
    """A complete artifact in a hidden folder. `publish` moves it to its target."""

    folder: Path
    """Can be opened with `Artifact.open`."""
    target: Path
    manifest: dict[str, Any]

    def publish(self, metrics: dict[str, Any]) -> None:
        """Add `metrics` to the manifest and rename the folder to the target.

        Raises FileExistsError if the target exists, ValueError if `metrics` is not JSON.
        """
        write_json(self.folder / MANIFEST, self.manifest | {"metrics": metrics})
        sync(self.folder)
        if self.target.exists():
            raise FileExistsError(f"{self.target} appeared while it was being written: remove it, or use another name")
        self.folder.rename(self.target)
        sync(self.target.parent)


@contextmanager
def stage_artifact(
    target: Path,
    *,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    assignment: Sequence[Sequence[int]],
    version: int,
    tokenizer: Path,
    chat_template: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[StagedArtifact]:
    """Write the artifact of a model's logical tensors beside `target`; remove it at the end unless it was published.

    config: `Config.to_dict()`. assignment [layers][E] with its version. `progress` receives (files written, files).
    Raises FileExistsError if `target` exists, ValueError if tensors and config disagree or a value does not fit its
    encoding, OSError if the disk is too small.
    """
    model = from_dict(config).model
    check_assignment(model, assignment)
    places = layout(model, assignment)
    _check_tensors(places, tensors)
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists: remove it, or export under another name")
    if not tokenizer.is_file():
        raise FileNotFoundError(f"{tokenizer} is missing: an artifact contains the tokenizer of its model")
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_space(target.parent, sum(place.bytes + 1024 for place in places) + tokenizer.stat().st_size)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        (partial / "clusters").mkdir(parents=True)
        manifest = {
            "format_version": FORMAT_VERSION,
            "config": config,
            "assignment": [list(row) for row in assignment],
            "version": version,
            "metrics": {},
            "files": _write_files(partial, places, tensors, tokenizer, chat_template, progress),
            "tensors": {key: stored._asdict() for place in places for key, stored in place.stored().items()},
            "int4": int4_entries(places),
        }
        write_json(partial / MANIFEST, manifest)
        yield StagedArtifact(partial, target, manifest)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_artifact(target: Path, *, metrics: dict[str, Any], **contents: Any) -> Path:
    """Write and publish an artifact; returns `target`. Arguments and errors are those of `stage_artifact`."""
    with stage_artifact(target, **contents) as staged:
        staged.publish(metrics)
    return target


def _write_files(
    folder: Path,
    places: Sequence[Place],
    tensors: Mapping[str, Tensor],
    tokenizer: Path,
    chat_template: Path | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Write all files but the manifest. Returns their manifest entries."""
    entries: dict[str, Any] = {}
    names = sorted({place.file for place in places})
    for i, name in enumerate(names):
        if progress:
            progress(i, len(names))
        stored = encode_tensors([place for place in places if place.file == name], tensors)
        entries[name] = write_tensors(folder / name, stored)
    copies = {TOKENIZER: tokenizer} | ({CHAT_TEMPLATE_FILE: chat_template} if chat_template else {})
    for name, source in copies.items():
        with durable_write(folder / name) as copy:
            shutil.copyfile(source, copy)
        entries[name] = describe_file(folder / name)
    if progress:
        progress(len(names), len(names))
    return entries


def _check_tensors(places: Sequence[Place], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless `tensors` are exactly those of `places`, with their shapes and finite values."""
    for place in places:
        if place.key not in tensors:
            raise ValueError(f"the weights lack {place.key!r}, which the config requires")
        if tuple(tensors[place.key].shape) != place.shape:
            raise ValueError(
                f"{place.key!r} has shape {list(tensors[place.key].shape)}; the config requires {list(place.shape)}"
            )
        if not tensors[place.key].isfinite().all():
            raise ValueError(f"{place.key!r} has values that are not finite: export an earlier checkpoint")
    unknown = tensors.keys() - {place.key for place in places}
    if unknown:
        raise ValueError(f"{min(unknown)!r} is not a tensor of the model that the config describes")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"the artifact needs {needed / 1e6:,.1f} MB and {folder} has {free / 1e6:,.1f} MB free: free some space"
        )
