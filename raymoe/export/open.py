"""Runs and artifacts opened by name, and their whole model in one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from raymoe.config import Config, expand, from_dict
from raymoe.data.corpus import TOKENIZER, Corpus, Text
from raymoe.data.prepare import prepare, read_text
from raymoe.data.tokens import END_OF_TEXT, load_tokenizer
from raymoe.model.transformer import Transformer
from raymoe.storage.artifact import Artifact
from raymoe.storage.artifact_layout import check_assignment
from raymoe.storage.checkpoint import Checkpoint, CorruptCheckpoint, newest, step_folder
from raymoe.storage.files import read_json
from raymoe.storage.manifest import MANIFEST
from raymoe.storage.run_folder import RunFolder, artifact_folder, run_folder


@dataclass
class StoredModel:
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

    def model(self, residuals: Literal["full", "int4", "zero"] | None = None) -> Transformer:
        """Return the whole model in float32. Experts of a checkpoint are full, those of an artifact INT4 or zero.

        `residuals` applies to residuals and to private experts.

        A checkpoint that was written during an overlap is read without its ghosts, as after the overlap.
        Raises ValueError for residuals that the source does not have.
        """
        transformer = Transformer(self.config.model, self.assignment)
        if isinstance(self.source, Artifact):
            if residuals == "full":
                raise ValueError(
                    f"artifact {self.folder} has no full residuals or private experts: evaluate the run instead"
                )
            transformer.load_logical(self.source.tensors(residuals or "int4"))
        else:
            if residuals not in (None, "full"):
                raise ValueError(
                    f"run {self.name!r} has full residuals or private experts: export it to evaluate {residuals} ones"
                )
            transformer.load_logical(self.source.read(list(transformer.logical())))
        return transformer.eval()

    def text(self, path: str | None, text_field: str = "text") -> tuple[dict[str, Text], int]:
        """Return the text of a `data.path` by domain, and the id of end-of-text.

        The default is the validation set of the run. Raises ValueError or FileNotFoundError.
        """
        if path is None:
            corpus = Corpus.open(self.corpus or prepare(self.config))
            return corpus.validation_text(), corpus.end_of_text
        tokenizer = load_tokenizer(self.tokenizer.read_bytes(), str(self.tokenizer), self.config.model.vocabulary)
        section = replace(self.config.data, path=path, text_field=text_field, domain_field="")
        return read_text(section, tokenizer), tokenizer.token_to_id(END_OF_TEXT) or 0


def open_run(root: str, name: str, step: int | None = None) -> tuple[StoredModel, list[str]]:
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
    corpus = _corpus_of(about, checkpoint.meta, config)
    return (
        StoredModel(
            name, folder.path, config, assignment, version, corpus / TOKENIZER, checkpoint, checkpoint.step, corpus
        ),
        skipped,
    )


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


def open_artifact(folder: Path) -> StoredModel:
    """Open an artifact and verify all its checksums. Raises CorruptArtifact."""
    artifact = Artifact.open(folder)
    config, assignment = from_dict(artifact.config), tuple(map(tuple, artifact.assignment))
    return StoredModel(
        folder.name, folder, config, assignment, artifact.version, artifact.tokenizer_path, artifact, None, None
    )


def open_any(root: str, name: str, step: int | None = None) -> tuple[StoredModel, list[str]]:
    """Open the artifact in the folder `name`, else the run `name`, else the export of a run that was removed."""
    folder = expand(name)
    if (folder / MANIFEST).is_file():
        return open_artifact(folder.resolve()), []
    export = artifact_folder(root, name)
    if not run_folder(root, name).is_dir() and (export / MANIFEST).is_file():
        return open_artifact(export), []
    return open_run(root, name, step)
