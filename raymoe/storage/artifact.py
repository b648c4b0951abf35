"""The artifact: all that evaluation and serving need of a trained model, in a folder that is whole or absent.

    manifest.json                       format_version, config, assignment, version, metrics, files, tensors, int4
    trunk.safetensors                   embeddings and attention in float16; norms, routers, biases in float32
    clusters/cluster_000.safetensors    cluster 0 of every layer: bases in float16, residual factors in INT4
                                        (`KEY.packed`, `.scale`, `.minimum`), its experts' router rows in float32
    tokenizer.json

A flat model's experts rest in cluster_000 in float16, a dense model has a trunk only. This is the paper's heterogeneous precision.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from raymoe.config import Config, ModelSection, from_dict
from raymoe.data.tokens import load_tokenizer
from raymoe.model.quantize import GROUP, Int4, balance, dequantize, quantize
from raymoe.storage.artifact_layout import ENCODING, TRUNK, Encoding, Part, Place, cluster_file, layout
from raymoe.storage.files import CorruptFile, durable_write, sync, write_json
from raymoe.storage.manifest import MANIFEST, Manifest, describe_file, require_same, write_tensors

FORMAT_VERSION = 1
Residuals = Literal["int4", "zero"]
TOKENIZER = "tokenizer.json"


class CorruptArtifact(CorruptFile):
    """An artifact that is incomplete, damaged or not ours: `file` and `reason` say what was found."""


def sizes(model: ModelSection) -> dict[str, dict[str, int]]:
    """Parameters and bytes at rest of `model` in three forms, from shapes alone.

    `flat_float16`, `clustered_float16`, `clustered_int4`; each with `parameters`, `bytes` and, of the experts
    (bases, residuals and their router rows) alone, `expert_parameters`, `expert_bytes`.
    """

    def summary(model: ModelSection, residuals: Encoding) -> dict[str, int]:
        places = [
            replace(place, encoding=residuals) if place.part == "residuals" else place
            for place in layout(model, model.default_assignment())
        ]
        experts = [place for place in places if place.file != TRUNK]

        def parameters(places: list[Place]) -> int:
            return sum(math.prod(place.shape) for place in places if not place.key.endswith(".bias"))

        return {
            "parameters": parameters(places),
            "bytes": sum(place.bytes for place in places),
            "expert_parameters": parameters(experts),
            "expert_bytes": sum(place.bytes for place in experts),
        }

    clustered = replace(model, experts="clustered")
    return {
        "flat_float16": summary(replace(model, experts="flat"), "float16"),
        "clustered_float16": summary(clustered, "float16"),
        "clustered_int4": summary(clustered, "int4"),
    }


# Names of clusters


def align_clusters(coactivation: np.ndarray) -> list[list[int]]:
    """New ids [layers][C] under which a token's cluster keeps its number from layer to layer.

    coactivation [layers−1, C, C]: tokens that visited cluster a of a layer and cluster b of the next. Layer 0
    keeps its ids; each next layer takes the assignment that keeps most tokens on the same id.
    """
    if coactivation.ndim != 3 or coactivation.shape[1] != coactivation.shape[2]:
        raise ValueError(f"coactivation has the shape {coactivation.shape}: expected [layers-1, C, C]")
    from scipy.optimize import linear_sum_assignment  # late: 35 MB that those who only read have no use for

    relabel = [list(range(coactivation.shape[1]))]
    for counts in coactivation:
        here, following = linear_sum_assignment(counts, maximize=True)
        ids = [0] * len(here)
        for a, b in zip(here, following, strict=True):
            ids[b] = relabel[-1][a]
        relabel.append(ids)
    return relabel


def _relabelled(
    tensors: Mapping[str, Tensor], assignment: Sequence[Sequence[int]], relabel: Sequence[Sequence[int]]
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """The same model with cluster c of layer l called relabel[l][c]."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if parts[0] == "layers" and parts[2] == "clusters":
            parts[3] = str(relabel[int(parts[1])][int(parts[3])])
        elif parts[0] == "layers" and parts[2] == "router":
            order = torch.tensor(relabel[int(parts[1])]).argsort()  # new id -> old id
            tensor = tensor[order]
        renamed[".".join(parts)] = tensor
    return renamed, [[ids[c] for c in row] for ids, row in zip(relabel, assignment, strict=True)]


# Writing


def write_artifact(
    target: Path,
    *,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    assignment: Sequence[Sequence[int]],
    version: int,
    tokenizer: Path,
    metrics: dict[str, Any],
    relabel: Sequence[Sequence[int]] | None = None,
) -> Path:
    """Write the artifact `target` from a model's logical tensors; returns `target`.

    config: `Config.to_dict()`. assignment [layers][E] and its version. relabel [layers][C]: new cluster ids
    (`align_clusters`). Everything is written beside `target` and renamed at the end, or removed on failure.
    Raises FileExistsError when `target` exists, ValueError when tensors and config disagree or a value does
    not fit its encoding, OSError when the disk is too small.
    """
    model = from_dict(config).model
    check_assignment(model, assignment)
    places = layout(model, assignment)
    _check_tensors(places, tensors)
    if relabel is not None:
        _check_relabel(model, relabel)
        tensors, assignment = _relabelled(tensors, assignment, relabel)
        places = layout(model, assignment)
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists: remove it, or export under another name")
    if not tokenizer.is_file():
        raise FileNotFoundError(f"{tokenizer} is missing: an artifact needs the tokenizer that the model learnt with")
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_space(target.parent, sum(place.bytes + 1024 for place in places) + tokenizer.stat().st_size)

    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        (partial / "clusters").mkdir(parents=True)
        files: dict[str, Any] = {}
        for file in sorted({place.file for place in places}):
            files[file] = write_tensors(partial / file, _encode([p for p in places if p.file == file], tensors))
        with durable_write(partial / TOKENIZER) as copy:
            shutil.copyfile(tokenizer, copy)
        files[TOKENIZER] = describe_file(partial / TOKENIZER)
        manifest = {
            "format_version": FORMAT_VERSION,
            "config": config,
            "assignment": [list(row) for row in assignment],
            "version": version,
            "metrics": metrics,
            "files": files,
            "tensors": {key: stored._asdict() for place in places for key, stored in place.stored().items()},
            "int4": _int4_entries(places),
        }
        write_json(partial / MANIFEST, manifest)
        sync(partial)
        if target.exists():
            raise FileExistsError(f"{target} appeared while it was being written: remove it, or use another name")
        partial.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _encode(places: list[Place], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors of one file."""
    stored: dict[str, Tensor] = {}
    balanced: dict[str, Tensor] = {}
    for place in places:
        if place.encoding == "int4":
            if place.key not in balanced:
                stem = place.key.rpartition("_")[0]
                first, second = f"{stem}_in", f"{stem}_out"
                balanced[first], balanced[second] = balance(tensors[first].float(), tensors[second].float())
            try:
                q = quantize(balanced[place.key], place.axis)
            except ValueError as error:
                raise ValueError(f"{place.key!r} cannot be exported: {error}") from error
            stored |= {f"{place.key}.{name}": getattr(q, name) for name in ("packed", "scale", "minimum")}
        else:
            stored[place.key] = tensors[place.key].detach().to(getattr(torch, place.encoding))
            if not stored[place.key].isfinite().all():
                raise ValueError(f"{place.key!r} has values beyond float16's ±65504: it cannot be exported")
    return stored


def _int4_entries(places: list[Place]) -> dict[str, Any]:
    """How to read each quantised tensor back."""
    return {
        place.key: {"shape": list(place.shape), "axis": place.axis, "group": GROUP}
        for place in places
        if place.encoding == "int4"
    }


def check_assignment(model: ModelSection, assignment: Any) -> None:
    """Raises ValueError unless it is [layers][E] cluster ids."""
    whole = isinstance(assignment, Sequence) and len(assignment) == model.layers
    if not whole or not all(
        isinstance(row, Sequence)
        and len(row) == model.n_experts
        and all(type(c) is int and 0 <= c < model.n_clusters for c in row)
        for row in assignment
    ):
        raise ValueError(
            f"the assignment is not a cluster id below {model.n_clusters} "
            f"for each of {model.layers} layers and {model.n_experts} experts"
        )


def _check_relabel(model: ModelSection, relabel: Sequence[Sequence[int]]) -> None:
    ids = list(range(model.n_clusters))
    if model.experts != "clustered" or len(relabel) != model.layers or any(sorted(row) != ids for row in relabel):
        raise ValueError(
            f"relabel is not a permutation of {model.n_clusters} clusters for each of {model.layers} layers"
        )


def _check_tensors(places: list[Place], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless `tensors` are the model's: all of them, in their shapes, finite, and no other."""
    for place in places:
        if place.key not in tensors:
            raise ValueError(f"the weights lack {place.key!r}, which the config asks for")
        if tuple(tensors[place.key].shape) != place.shape:
            raise ValueError(
                f"{place.key!r} has shape {list(tensors[place.key].shape)}; the config asks for {list(place.shape)}"
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
            f"the artifact needs {needed / 1e6:,.1f} MB and {folder} has {free / 1e6:,.1f} MB free: make room first"
        )


# Reading


@dataclass(frozen=True)
class Artifact:
    """An artifact whose manifest was checked against its files and its config."""

    folder: Path
    config: dict[str, Any]
    model: ModelSection
    assignment: list[list[int]]
    version: int
    metrics: dict[str, Any]
    manifest: Manifest = field(repr=False)
    places: list[Place] = field(repr=False)

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> Artifact:
        """Raises CorruptArtifact. `verify=False` trusts the checksums, and still checks sizes, keys and shapes."""
        manifest = Manifest.open(folder, version=FORMAT_VERSION, error=CorruptArtifact, verify=verify)
        config, assignment = manifest.get("config", dict), manifest.get("assignment", list)
        try:
            model = from_dict(config).model
            check_assignment(model, assignment)
            if model.layers > len(manifest.tensors):  # what it costs to look at is bounded by what is there
                raise ValueError(f"{model.layers} layers and {len(manifest.tensors)} tensors")
            places = layout(model, assignment)
        except (ValueError, TypeError, RuntimeError, OverflowError) as cause:
            raise CorruptArtifact(folder / MANIFEST, f"describes no model: {cause}") from cause
        expected = {key: stored for place in places for key, stored in place.stored().items()}
        require_same(manifest.tensors, expected, folder, CorruptArtifact)
        if manifest.get("int4", dict) != _int4_entries(places):
            raise CorruptArtifact(folder / MANIFEST, "describes its INT4 tensors as its config does not")
        if TOKENIZER not in manifest.get("files", dict):
            raise CorruptArtifact(folder / MANIFEST, f"does not name {TOKENIZER}")
        version, metrics = manifest.get("version", int), manifest.get("metrics", dict)
        return cls(folder, config, model, assignment, version, metrics, manifest, places)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the manifest, which has the checksums of everything else: says which artifact this is."""
        return hashlib.sha256(json.dumps(self.manifest.content, sort_keys=True).encode()).digest()

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / TOKENIZER

    def tokenizer(self) -> Tokenizer:
        """The one that the model learnt with. Raises ValueError when the file is none, or too large for the model."""
        return load_tokenizer(self.tokenizer_path.read_bytes(), str(self.tokenizer_path), self.model.vocabulary)

    def tensors(self, residuals: Residuals = "int4") -> dict[str, Tensor]:
        """Every logical tensor in float32. `zero`: the residuals as zeros, to see what they are worth."""
        return self._decode(self.places, residuals)

    def trunk(self) -> dict[str, Tensor]:
        """The logical tensors that are of no cluster, in float32."""
        return self._decode([place for place in self.places if place.file == TRUNK], "int4")

    def cluster(self, c: int) -> dict[str, Tensor]:
        """The logical tensors of cluster c in every layer, in float32. Raises ValueError when there is none."""
        places = [place for place in self.places if place.file == cluster_file(c)]
        if not places:
            raise ValueError(f"{self.folder} has no cluster {c}")
        return self._decode(places, "int4")

    def bytes_by_part(self) -> dict[Part, int]:
        """Bytes at rest of the trunk, the bases (or flat experts), the residuals, and the routers with their biases."""
        total: dict[Part, int] = dict.fromkeys(ENCODING, 0)
        for place in self.places:
            total[place.part] += place.bytes
        return total

    def _decode(self, places: list[Place], residuals: Residuals) -> dict[str, Tensor]:
        return _decode(places, residuals, self.manifest.read)


def as_exported(
    config: Config, tensors: Mapping[str, Tensor], assignment: Sequence[Sequence[int]], residuals: Residuals = "int4"
) -> dict[str, Tensor]:
    """The logical tensors as `Artifact.tensors` would give them back, without writing anything."""
    places = layout(config.model, assignment)
    stored = _encode(places, tensors)
    return _decode(places, residuals, lambda keys: {key: stored[key] for key in keys})


def _decode(
    places: list[Place], residuals: Residuals, read: Callable[[Iterable[str]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Float32 tensors, reading only what is asked for."""
    zeroed = {place.key for place in places if place.encoding == "int4" and residuals == "zero"}
    stored = read(key for place in places if place.key not in zeroed for key in place.stored())
    tensors: dict[str, Tensor] = {}
    for place in places:
        if place.key in zeroed:
            tensors[place.key] = torch.zeros(place.shape)
        elif place.encoding == "int4":
            packed, scale, minimum = (stored[f"{place.key}.{name}"] for name in ("packed", "scale", "minimum"))
            tensors[place.key] = dequantize(Int4(packed, scale, minimum, place.shape, place.axis))
        else:
            tensors[place.key] = stored[place.key].float()
    return tensors
