"""Finding runs and artifacts by name, and making one whole model of what they hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raymoe.config import Config, ModelSection, default_root, from_dict
from raymoe.model.transformer import Transformer
from raymoe.storage.checkpoint import Checkpoint, newest
from raymoe.storage.export import Artifact


def run_folder(root: str, name: str) -> Path:
    """Where the run `name` lives."""
    return Path(root).expanduser().resolve() / name


def artifact_folder(root: str, name: str) -> Path:
    """Where the export of run `name` goes."""
    return Path(root).expanduser().resolve() / "exports" / name


@dataclass
class Stored:
    """A model at rest: of a run's checkpoint or of an artifact."""

    name: str
    folder: Path
    config: Config
    assignment: tuple[tuple[int, ...], ...]
    version: int
    tokenizer: Path
    source: Checkpoint | Artifact
    corpus: Path | None
    """Folder of the corpus it was trained on, where that is known."""

    def model(self, residuals: Literal["full", "int4", "zero"] = "full") -> Transformer:
        """The whole model in this process, float32. An artifact's residuals are INT4 or zero."""
        transformer = Transformer(self.config.model, self.assignment)
        if isinstance(self.source, Artifact):
            transformer.load_logical(self.source.tensors("zero" if residuals == "zero" else "int4"))
        else:
            transformer.load_logical(self.source.read(list(transformer.logical())))
        return transformer.eval()


def open_run(root: str, name: str, step: int | None = None) -> tuple[Stored, list[str]]:
    """The newest valid checkpoint of a run (or that of `step`), and what was passed over.

    Raises FileNotFoundError where there is no such run or no checkpoint, CorruptCheckpoint for a bad `step`.
    """
    folder = run_folder(root, name)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"there is no run {name!r}: {config_file} does not exist (run.root={root})")
    about: dict[str, Any] = json.loads(config_file.read_text())
    if step is None:
        checkpoint, skipped = newest(folder / "checkpoints")
    else:
        checkpoint, skipped = Checkpoint.open(folder / "checkpoints" / f"step_{step:08d}"), []
    if checkpoint is None:
        raise FileNotFoundError(
            f"{folder / 'checkpoints'} holds no valid checkpoint: " + ("; ".join(skipped) or "it is empty")
        )
    corpus = Path(about["corpus"])
    stored = Stored(
        name, folder, from_dict(checkpoint.meta["config"]), tuple(map(tuple, checkpoint.meta["assignment"])),
        checkpoint.meta["version"], corpus / "tokenizer.json", checkpoint, corpus,
    )  # fmt: skip
    return stored, skipped


def open_artifact(folder: Path) -> Stored:
    """A verified artifact. Raises CorruptArtifact."""
    artifact = Artifact.open(folder)
    config = from_dict(artifact.config)
    assignment = tuple(map(tuple, artifact.assignment))
    return Stored(folder.name, folder, config, assignment, artifact.version, artifact.tokenizer_path, artifact, None)


def open_any(root: str, name: str) -> tuple[Stored, list[str]]:
    """A folder that is an artifact, else a run of that name, else an export of that name."""
    for folder in (Path(name), artifact_folder(root, name)):
        if (folder / "manifest.json").is_file() and (folder == Path(name) or not (run_folder(root, name)).is_dir()):
            return open_artifact(folder), []
    return open_run(root, name)


__all__ = [
    "Stored",
    "artifact_folder",
    "open_any",
    "open_artifact",
    "open_run",
    "run_folder",
    "ModelSection",
    "default_root",
]
