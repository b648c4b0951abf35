"""Runs and artifacts opened by name, and their whole model in one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from raymoe.data.corpus import Corpus, Text
from raymoe.data.prepare import prepare, read_text
from raymoe.data.tokens import END_OF_TEXT, load_tokenizer
from raymoe.model.transformer import Transformer
from raymoe.storage import weights
from raymoe.storage.artifact import Artifact
from raymoe.storage.weights import StoredWeights


@dataclass
class StoredModel(StoredWeights):
    """A model on disk that can be built in this process."""

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
                    f"artifact {self.folder} does not hold the experts in full precision: evaluate the run instead"
                )
            transformer.load_logical(self.source.tensors(residuals or "int4"))
        else:
            if residuals not in (None, "full"):
                raise ValueError(
                    f"residuals={residuals} needs an artifact, and run {self.name!r} holds its experts as trained: export it first"
                )
            transformer.load_logical(self.source.read(list(transformer.logical())))
        return transformer.eval()

    def text(
        self, path: str | None, text_field: str = "text", form: Literal["text", "chat"] = "text"
    ) -> tuple[dict[str, Text], int]:
        """Return the text of a `data.path` by domain, and the id of end-of-text. form: its `data.format`.

        The default is the validation set of the run. Raises ValueError or FileNotFoundError.
        """
        if path is None:
            corpus = Corpus.open(self.corpus or prepare(weights.with_files_in(self.config, self.folder)))
            return corpus.validation_text(), corpus.end_of_text
        tokenizer = load_tokenizer(self.tokenizer.read_bytes(), str(self.tokenizer), self.config.model.vocabulary)
        template = str(self.chat_template) if form == "chat" and self.chat_template else ""
        section = replace(
            self.config.data, path=path, text_field=text_field, format=form, chat_template=template, domain_field=""
        )
        return read_text(section, tokenizer), tokenizer.token_to_id(END_OF_TEXT) or 0


def open_run(root: str, name: str, step: int | None = None) -> tuple[StoredModel, list[str]]:
    """Open the newest valid checkpoint of a run, or the checkpoint of `step`: see `open_checkpoint`."""
    found, skipped = weights.open_checkpoint(root, name, step)
    return StoredModel(**vars(found)), skipped


def open_artifact(folder: Path) -> StoredModel:
    """Open an artifact and verify all its checksums. Raises CorruptArtifact."""
    return StoredModel(**vars(weights.open_artifact(folder)))


def open_any(root: str, name: str, step: int | None = None) -> tuple[StoredModel, list[str]]:
    """Open the artifact in the folder `name`, else the run `name`, else the export of a run that was removed."""
    found, skipped = weights.open_weights(root, name, step)
    return StoredModel(**vars(found)), skipped
