"""Finding runs and artifacts by name, and making one whole model of what they hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from raymoe.config import Config, expand, from_dict
from raymoe.data.corpus import Corpus, Text, prepare, read_text
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
    """A model at rest: of a run's checkpoint or of an artifact."""

    name: str
    folder: Path
    config: Config
    assignment: tuple[tuple[int, ...], ...]
    version: int
    tokenizer: Path
    source: Checkpoint | Artifact
    step: int | None
    """Of the checkpoint; None for an artifact."""
    corpus: Path | None
    """Folder of the corpus that a run was trained on."""

    def model(self, residuals: Literal["full", "int4", "zero"] | None = None) -> Transformer:
        """The whole model in this process, float32. A checkpoint's residuals are full, an artifact's INT4 or zero.

        A checkpoint in the middle of an overlap is read without its ghosts, as it would be after it.
        """
        transformer = Transformer(self.config.model, self.assignment)
        if isinstance(self.source, Artifact):
            if residuals == "full":
                raise ValueError(f"{self.folder} holds no full residuals: evaluate the run itself for those")
            transformer.load_logical(self.source.tensors(residuals or "int4"))
        else:
            if residuals not in (None, "full"):
                raise ValueError(f"the residuals of run {self.name!r} are full: export it to evaluate {residuals} ones")
            transformer.load_logical(self.source.read(list(transformer.logical())))
        return transformer.eval()

    def text(self, path: str | None, text_field: str = "text") -> tuple[dict[str, Text], int]:
        """All of a data.path by domain (by default the validation set it was trained with), and its end-of-text id."""
        if path is None:
            corpus = Corpus.open(self.corpus or prepare(self.config))
            return corpus.validation_text(), corpus.end_of_text
        tokenizer = load_tokenizer(self.tokenizer.read_bytes(), str(self.tokenizer), self.config.model.vocabulary)
        section = replace(self.config.data, path=path, text_field=text_field, domain_field="")
        return read_text(section, tokenizer), tokenizer.token_to_id(END_OF_TEXT) or 0


def open_run(root: str, name: str, step: int | None = None) -> tuple[StoredModel, list[str]]:
    """The newest valid checkpoint of a run (or that of `step`), and what was passed over.

    Raises FileNotFoundError where there is no such run or no checkpoint, CorruptCheckpoint for a bad `step`, CorruptFile
    for a config.json that is none.
    """
    folder = run_folder(root, name)
    config_file = RunFolder(folder).config
    if not config_file.is_file():
        raise FileNotFoundError(f"there is no run {name!r}: {config_file} does not exist (run.root={root})")
    about = read_json(config_file)
    if step is None:
        checkpoint, skipped = newest(RunFolder(folder).checkpoints)
    else:
        checkpoint, skipped = Checkpoint.open(step_folder(RunFolder(folder).checkpoints, step)), []
    if checkpoint is None:
        raise FileNotFoundError(
            f"{folder / 'checkpoints'} holds no valid checkpoint: " + ("; ".join(skipped) or "it is empty")
        )
    try:
        config, assignment = from_dict(checkpoint.meta["config"]), tuple(map(tuple, checkpoint.meta["assignment"]))
        version = int(checkpoint.meta["version"])
        check_assignment(config.model, assignment)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CorruptCheckpoint(checkpoint.folder / MANIFEST, f"does not describe a run: {error}") from None
    corpus = Path(str(about.get("corpus")).replace("\0", ""))
    if not (corpus / "tokenizer.json").is_file():  # the cache was cleared: the same text makes the same corpus
        corpus = prepare(config)
    tokenizer = corpus / "tokenizer.json"
    return StoredModel(
        name, folder, config, assignment, version, tokenizer, checkpoint, checkpoint.step, corpus
    ), skipped


def open_artifact(folder: Path) -> StoredModel:
    """A verified artifact. Raises CorruptArtifact."""
    artifact = Artifact.open(folder)
    config, assignment = from_dict(artifact.config), tuple(map(tuple, artifact.assignment))
    return StoredModel(
        folder.name, folder, config, assignment, artifact.version, artifact.tokenizer_path, artifact, None, None
    )


def open_any(root: str, name: str, step: int | None = None) -> tuple[StoredModel, list[str]]:
    """`name` as a folder that is an artifact, else as a run, else as the export of a run that is gone."""
    folder = expand(name)
    if (folder / MANIFEST).is_file():
        return open_artifact(folder.resolve()), []
    export = artifact_folder(root, name)
    if not run_folder(root, name).is_dir() and (export / MANIFEST).is_file():
        return open_artifact(export), []
    return open_run(root, name, step)
