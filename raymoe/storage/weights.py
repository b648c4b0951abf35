"""Stored weights of a whole model: the checkpoint of a run, or an artifact, with what is needed to read them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from raymoe.config import Config, expand, from_dict
from raymoe.data.corpus import TOKENIZER, Corpus
from raymoe.data.document import CHAT_TEMPLATE_FILE
from raymoe.data.prepare import prepare
from raymoe.storage.artifact import Artifact
from raymoe.storage.artifact_encoding import decode_tensors
from raymoe.storage.artifact_layout import Place, check_assignment, layout
from raymoe.storage.checkpoint import Checkpoint, CorruptCheckpoint, newest, step_folder
from raymoe.storage.files import read_json
from raymoe.storage.manifest import MANIFEST
from raymoe.storage.run_folder import RunFolder, find_model, run_folder


@dataclass
class StoredWeights:
    """A model on disk: a checkpoint of a run, or an artifact."""

    name: str
    folder: Path
    config: Config
    assignment: tuple[tuple[int, ...], ...]
    """[layers][E]: cluster of each expert."""
    version: int
    """Version of the assignment."""
    tokenizer: Path
    source: Checkpoint | Artifact
    step: int | None
    """Step of the checkpoint; None for an artifact."""
    corpus: Path | None
    """Corpus folder of the run; None for an artifact."""

    @property
    def chat_template(self) -> Path | None:
        """Template of the conversations that the model was trained on; None without one."""
        path = self.folder / CHAT_TEMPLATE_FILE
        return path if path.is_file() else None

    @property
    def places(self) -> list[Place]:
        """Places of the logical tensors: the weights and selection biases, without ghosts and moments."""
        return layout(self.config.model, self.assignment)

    def parts(self) -> list[list[Place]]:
        """Return the places of the tensors by the file that stores them. `read` of a part opens one file."""
        files: defaultdict[str, list[Place]] = defaultdict(list)
        for place in self.places:
            stored = self.source.manifest.tensors.get(place.key) if isinstance(self.source, Checkpoint) else None
            files[stored.file if stored else place.file].append(place)
        return [places for _, places in sorted(files.items())]

    def read(self, places: list[Place]) -> dict[str, Tensor]:
        """Return these logical tensors in float32. The residuals of an artifact are those of its INT4 factors.

        Raises ValueError for a tensor that is missing or has another shape than the config requires.
        """
        if isinstance(self.source, Artifact):
            return decode_tensors(places, "int4", self.source.manifest.read)
        tensors = self.source.read([place.key for place in places])
        for place in places:
            if tuple(tensors[place.key].shape) != place.shape:
                found = list(tensors[place.key].shape)
                raise CorruptCheckpoint(
                    self.source.folder / MANIFEST, f"{place.key!r} has shape {found}, its config needs {place.shape}"
                )
        return tensors

    def about(self) -> dict[str, Any]:
        """Return the origin of the weights as JSON: folder, kind, run and step."""
        kind = "artifact" if isinstance(self.source, Artifact) else "run"
        metrics = self.source.metrics if isinstance(self.source, Artifact) else {"run": self.name, "step": self.step}
        return {"folder": str(self.folder), "kind": kind, "run": metrics.get("run"), "step": metrics.get("step")}


def open_checkpoint(root: str, name: str, step: int | None = None) -> tuple[StoredWeights, list[str]]:
    """Open the newest valid checkpoint of a run, or the checkpoint of `step`. Also returns why others were skipped.

    Raises FileNotFoundError without such a run or checkpoint, CorruptCheckpoint for a damaged `step`, CorruptFile for
    a damaged config.json, ValueError if the run's corpus is gone and cannot be rebuilt.
    """
    folder = RunFolder(run_folder(root, name))
    if not folder.config.is_file():
        raise FileNotFoundError(f"there is no run {name!r}: {folder.config} does not exist (run.root={root})")
    about = read_json(folder.config)
    if step is None:
        checkpoint, skipped = newest(folder.checkpoints)
    else:
        checkpoint, skipped = Checkpoint.open(step_folder(folder.checkpoints, step)), []
    if checkpoint is None:
        raise FileNotFoundError(
            f"{folder.checkpoints} holds no valid checkpoint: " + ("; ".join(skipped) or "it is empty")
        )
    try:
        config, assignment = from_dict(checkpoint.meta["config"]), tuple(map(tuple, checkpoint.meta["assignment"]))
        version = int(checkpoint.meta["version"])
        check_assignment(config.model, assignment)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CorruptCheckpoint(checkpoint.folder / MANIFEST, f"does not describe a run: {error}") from None
    corpus = _corpus_of(about, checkpoint.meta, with_files_in(config, folder.path))
    stored = StoredWeights(
        name, folder.path, config, assignment, version, corpus / TOKENIZER, checkpoint, checkpoint.step, corpus
    )
    return stored, skipped


def with_files_in(config: Config, folder: Path) -> Config:
    """Return `config` with the tokenizer and the chat template in `folder` in place of paths that no longer exist."""
    data = config.data
    for field, name in (("tokenizer", TOKENIZER), ("chat_template", CHAT_TEMPLATE_FILE)):
        path = getattr(data, field)
        if path and not expand(path).is_file() and (folder / name).is_file():
            data = replace(data, **{field: str(folder / name)})
    return replace(config, data=data)


def _corpus_of(about: Mapping[str, Any], meta: Mapping[str, Any], config: Config) -> Path:
    """Return the corpus folder of a run. Prepares it again if the cache was cleared.

    Raises ValueError if the text or the tokenizer differs from that of the checkpoint.
    """
    folder = Path(str(about.get("corpus")).replace("\0", ""))
    rebuilt = not (folder / TOKENIZER).is_file()
    if rebuilt:
        folder = prepare(config)
    corpus = Corpus.open(folder)
    stored = meta.get("data")
    expected = stored if isinstance(stored, dict) else {}
    if rebuilt and not expected and isinstance(about.get("corpus"), str):
        expected = {"corpus": Path(about["corpus"]).name}  # a corpus folder is named by its fingerprint
    for kind, found in (("corpus", corpus.fingerprint), ("tokenizer", corpus.tokenizer_fingerprint)):
        if expected.get(kind, found) != found:
            raise ValueError(
                f"the checkpoint was trained with {kind} {expected[kind]}, and data.path={config.data.path} now gives "
                f"{kind} {found} ({folder}): restore the text, or the folder {about.get('corpus')}"
            )
    return folder


def open_artifact(folder: Path) -> StoredWeights:
    """Open an artifact and verify all its checksums. Raises CorruptArtifact."""
    artifact = Artifact.open(folder)
    config, assignment = from_dict(artifact.config), tuple(map(tuple, artifact.assignment))
    return StoredWeights(
        folder.name, folder, config, assignment, artifact.version, artifact.tokenizer_path, artifact, None, None
    )


def open_weights(root: str, name: str, step: int | None = None) -> tuple[StoredWeights, list[str]]:
    """Open the model that `find_model` finds. Also returns why newer checkpoints were skipped."""
    folder, is_artifact = find_model(root, name)
    return (open_artifact(folder), []) if is_artifact else open_checkpoint(root, name, step)
