"""Which file of an artifact each logical tensor rests in, and in how many bits: from shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from raymoe.config import ModelSection
from raymoe.model.expert_math import RESIDUALS
from raymoe.model.quantize import packed_shapes
from raymoe.model.transformer import Transformer
from raymoe.storage.manifest import StoredTensor

TRUNK = "trunk.safetensors"
Encoding = Literal["float32", "float16", "int4"]
Part = Literal["trunk", "bases", "residuals", "routers"]
_BYTES = {"F32": 4, "F16": 2, "U8": 1}
_NAMES = {"float32": "F32", "float16": "F16"}
ENCODING: dict[Part, Encoding] = {"trunk": "float16", "bases": "float16", "residuals": "int4", "routers": "float32"}


@dataclass(frozen=True)
class Place:
    """Where and how a logical tensor rests."""

    key: str
    shape: tuple[int, ...]
    file: str
    part: Part
    encoding: Encoding

    @property
    def axis(self) -> int:
        """The long axis of a residual factor: its input's, or its output's."""
        return 0 if self.key.endswith("_in") else 1

    def stored(self) -> dict[str, StoredTensor]:
        """The tensors that the file holds for it."""
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
        """At rest, without the file's header."""
        return sum(_BYTES[stored.dtype] * math.prod(stored.shape) for stored in self.stored().values())


def cluster_file(c: int) -> str:
    """The file of cluster c, relative to the artifact."""
    return f"clusters/cluster_{c:03d}.safetensors"


def layout(model: ModelSection, assignment: Sequence[Sequence[int]]) -> list[Place]:
    """Where every logical tensor of `model` rests. assignment [layers][E]: a cluster's file holds its experts."""
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
        if leaf in RESIDUALS:
            part = "residuals"
        elif leaf in ("router", "bias") or key.endswith("router.weight"):
            part = "routers"
        places.append(Place(key, shape, file, part, "float32" if leaf.endswith("norm") else ENCODING[part]))
    return places
