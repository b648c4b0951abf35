"""Layout of an artifact: the file, shape and encoding of each logical tensor, and the resulting sizes.

Everything here follows from shapes alone; no tensor is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from raymoe.config import ModelSection
from raymoe.model.leaves import PRIVATE, RESIDUALS
from raymoe.model.quantize import GROUP, packed_shapes
from raymoe.model.transformer import Transformer
from raymoe.storage.manifest import StoredTensor

TRUNK = "trunk.safetensors"
Encoding = Literal["float32", "float16", "int4"]
Part = Literal["trunk", "bases", "experts", "routers"]
"""`experts`: residual factors and private experts. The experts of a flat model are `bases`."""
_BYTES = {"F32": 4, "F16": 2, "U8": 1}
_NAMES = {"float32": "F32", "float16": "F16"}
ENCODING: dict[Part, Encoding] = {"trunk": "float16", "bases": "float16", "experts": "int4", "routers": "float32"}


@dataclass(frozen=True)
class Place:
    """File, part and encoding of a logical tensor."""

    key: str
    shape: tuple[int, ...]
    file: str
    part: Part
    encoding: Encoding

    @property
    def axis(self) -> int:
        """Quantized axis of an expert's matrix: D of a private expert, the long axis D or F of a residual factor."""
        return 0 if self.key.endswith("_in") else 1

    def stored(self) -> dict[str, StoredTensor]:
        """Return the tensors of the file that encode this logical tensor."""
        if self.encoding != "int4":
            return {self.key: StoredTensor(self.file, _NAMES[self.encoding], self.shape)}
        packed, grid = packed_shapes(self.shape, self.axis)
        return {
            f"{self.key}.packed": StoredTensor(self.file, "U8", packed),
            f"{self.key}.scale": StoredTensor(self.file, "F16", grid),
            f"{self.key}.minimum": StoredTensor(self.file, "F16", grid),
        }

    @property
    def bytes(self) -> int:
        """Bytes on disk, without the header of the file."""
        return sum(_BYTES[stored.dtype] * math.prod(stored.shape) for stored in self.stored().values())


def cluster_file(c: int) -> str:
    """Return the file name of cluster c, relative to the artifact's folder."""
    return f"clusters/cluster_{c:03d}.safetensors"


def layout(model: ModelSection, assignment: Sequence[Sequence[int]]) -> list[Place]:
    """Return the place of every logical tensor of `model`.

    assignment [layers][E]: cluster of each expert. The file of a cluster holds its bases and its experts.
    """
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in Transformer(model, assignment).logical().items()}
    places = []
    for key, shape in shapes.items():
        leaf = key.rsplit(".", 1)[-1]
        file, part = TRUNK, "trunk"
        group = re.match(r"layers\.(\d+)\.(clusters|experts)\.(\d+)\.", key)
        if group:
            layer, index = int(group[1]), int(group[3])
            if group[2] == "experts":
                index = assignment[layer][index] if model.experts == "clustered" else 0
            file, part = cluster_file(index), "bases"
        if leaf in RESIDUALS or leaf in PRIVATE:
            part = "experts"
        elif leaf in ("router", "bias") or key.endswith("router.weight"):
            part = "routers"
        places.append(Place(key, shape, file, part, "float32" if leaf.endswith("norm") else ENCODING[part]))
    return places


def int4_entries(places: Sequence[Place]) -> dict[str, Any]:
    """Return the manifest's `int4` field: shape, quantized axis and group size of each INT4 tensor."""
    return {
        place.key: {"shape": list(place.shape), "axis": place.axis, "group": GROUP}
        for place in places
        if place.encoding == "int4"
    }


def check_assignment(model: ModelSection, assignment: Any) -> None:
    """Raise ValueError unless `assignment` is [layers][E] of cluster ids."""
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


def sizes(model: ModelSection) -> dict[str, dict[str, int]]:
    """Return parameters and bytes on disk of `model` in four forms.

    `flat_float16`, `flat_int4` (every expert in INT4), `clustered_float16`, `clustered_int4` (the artifact).
    Each has `parameters`, `bytes`, and `expert_parameters`, `expert_bytes` of the experts alone: bases, residuals or
    private experts, and their router rows. The flat model has as many experts, of the width of an expert of `model`.
    """
    narrow = model.experts == "clustered" and model.expert_kind == "private"
    width = model.private_width if narrow else model.d_expert
    # One expert per token: sizes do not depend on it, and each number of clusters allows it.
    flat = replace(model, experts="flat", d_expert=width, experts_per_token=1)
    clustered = replace(model, experts="clustered", experts_per_token=1, clusters_per_token=1)
    return {
        "flat_float16": _size(flat),
        "flat_int4": _size(flat, bases="int4"),
        "clustered_float16": _size(clustered, experts="float16"),
        "clustered_int4": _size(clustered),
    }


def _size(model: ModelSection, **changed: Encoding) -> dict[str, int]:
    """Return the sizes of `model` with other encodings for some parts."""
    encodings = ENCODING | changed
    places = [
        replace(place, encoding=encodings[place.part]) if place.part in changed else place
        for place in layout(model, model.default_assignment())
    ]
    experts = [place for place in places if place.file != TRUNK]
    return {
        "parameters": _parameters(places),
        "bytes": sum(place.bytes for place in places),
        "expert_parameters": _parameters(experts),
        "expert_bytes": sum(place.bytes for place in experts),
    }


def _parameters(places: list[Place]) -> int:
    return sum(math.prod(place.shape) for place in places if not place.key.endswith(".bias"))
