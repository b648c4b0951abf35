"""The artifact: a folder with everything that evaluation and serving need of a trained model.

    manifest.json                       format_version, config, assignment, version, metrics, files, tensors, int4
    trunk.safetensors                   embeddings and attention in float16; norms, routers, biases in float32
    clusters/cluster_000.safetensors    cluster 0 of every layer: bases in float16, residual factors or private
                                        experts in INT4 (`KEY.packed`, `.scale`, `.minimum`), its experts' router
                                        rows in float32
    tokenizer.json
    chat_template.jinja                 of a model that was trained on conversations

A flat model stores its experts in cluster_000 in float16; a dense model has a trunk only. Bases in float16 and
residuals in INT4 are the paper's heterogeneous precision; private experts rest in INT4 too.
`storage.artifact_writing` writes this format.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer
from torch import Tensor

from raymoe.config import ModelSection, from_dict
from raymoe.data.document import CHAT_TEMPLATE_FILE
from raymoe.data.tokens import load_tokenizer
from raymoe.storage.artifact_encoding import Residuals, decode_tensors
from raymoe.storage.artifact_layout import TRUNK, Place, check_assignment, cluster_file, int4_entries, layout
from raymoe.storage.files import CorruptFile
from raymoe.storage.manifest import MANIFEST, Manifest, require_same

FORMAT_VERSION = 1
TOKENIZER = "tokenizer.json"


class CorruptArtifact(CorruptFile):
    """An incomplete, damaged or foreign artifact."""


@dataclass(frozen=True)
class Artifact:
    """An artifact whose manifest agrees with its files and its config."""

    folder: Path
    config: dict[str, Any]
    model: ModelSection
    assignment: list[list[int]]
    """[layers][E]: cluster of each expert."""
    version: int
    """Version of the assignment."""
    metrics: dict[str, Any]
    manifest: Manifest = field(repr=False)
    places: list[Place] = field(repr=False)

    @classmethod
    def open(cls, folder: Path, verify: Literal["all", "on_read"] = "all") -> Artifact:
        """Open an artifact, checking the manifest against the config and the files' sizes and headers.

        verify: `all` verifies every checksum now. `on_read` verifies the checksum of each file before its content
        is first used, for a process that reads a part of the artifact. Raises CorruptArtifact.
        """
        manifest = Manifest.open(folder, version=FORMAT_VERSION, error=CorruptArtifact, verify=verify)
        config, assignment = manifest.get("config", dict), manifest.get("assignment", list)
        try:
            model = from_dict(config).model
            check_assignment(model, assignment)
            if model.layers > len(manifest.tensors):  # bounds the cost of `layout` by the size of the manifest
                raise ValueError(f"{model.layers} layers and {len(manifest.tensors)} tensors")
            places = layout(model, assignment)
        except (ValueError, TypeError, RuntimeError, OverflowError) as cause:
            raise CorruptArtifact(folder / MANIFEST, f"describes no model: {cause}") from cause
        expected = {key: stored for place in places for key, stored in place.stored().items()}
        require_same(manifest.tensors, expected, folder, CorruptArtifact)
        if manifest.get("int4", dict) != int4_entries(places):
            raise CorruptArtifact(folder / MANIFEST, "has INT4 entries that differ from those of its config")
        if TOKENIZER not in manifest.get("files", dict):
            raise CorruptArtifact(folder / MANIFEST, f"does not name {TOKENIZER}")
        version, metrics = manifest.get("version", int), manifest.get("metrics", dict)
        return cls(folder, config, model, assignment, version, metrics, manifest, places)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the manifest, which contains the checksums of all files: identifies the artifact."""
        return hashlib.sha256(json.dumps(self.manifest.content, sort_keys=True).encode()).digest()

    @property
    def tokenizer_path(self) -> Path:
        """Path of the tokenizer, whose checksum is verified."""
        self.manifest.verify(TOKENIZER)
        return self.folder / TOKENIZER

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that the model was trained with. Raises CorruptArtifact, or ValueError if it is invalid."""
        return load_tokenizer(self.tokenizer_path.read_bytes(), str(self.tokenizer_path), self.model.vocabulary)

    def chat_template(self) -> str | None:
        """Return the chat template, whose checksum is verified if the manifest lists it; None without one."""
        path = self.folder / CHAT_TEMPLATE_FILE
        if CHAT_TEMPLATE_FILE in self.manifest.get("files", dict):
            self.manifest.verify(CHAT_TEMPLATE_FILE)
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def tensors(self, residuals: Residuals = "int4") -> dict[str, Tensor]:
        """Return every logical tensor in float32. `zero` replaces residuals or private experts by zeros.

        Raises ValueError for `zero` if the model has no bases.
        """
        return decode_tensors(self.places, residuals, self.manifest.read)

    def trunk(self) -> dict[str, Tensor]:
        """Return the logical tensors outside of the clusters, in float32."""
        places = [place for place in self.places if place.file == TRUNK]
        return decode_tensors(places, "int4", self.manifest.read)

    def cluster(self, c: int) -> dict[str, Tensor]:
        """Return the logical tensors of cluster c in every layer, in float32. Raises ValueError if c does not exist."""
        places = [place for place in self.places if place.file == cluster_file(c)]
        if not places:
            raise ValueError(f"{self.folder} has no cluster {c}")
        return decode_tensors(places, "int4", self.manifest.read)
