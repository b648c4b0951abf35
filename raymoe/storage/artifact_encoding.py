"""Encodings of an artifact's tensors: float32, float16, and INT4 of private experts and balanced residual factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from raymoe.model.leaves import RESIDUALS
from raymoe.model.quantize import Int4, balance, dequantize, quantize
from raymoe.storage.artifact_layout import Place

Residuals = Literal["int4", "zero"]
"""Residuals or private experts as stored, or replaced by zeros (an ablation)."""


def encode_tensors(places: Sequence[Place], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the stored tensors of one file. Residual factors are balanced in pairs before they are quantized.

    Raises ValueError for a value that does not fit its encoding.
    """
    stored: dict[str, Tensor] = {}
    balanced: dict[str, Tensor] = {}
    for place in places:
        if place.encoding == "int4":
            if place.key.rpartition(".")[2] not in RESIDUALS:
                balanced[place.key] = tensors[place.key]
            elif place.key not in balanced:
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


def decode_tensors(
    places: Sequence[Place], residuals: Residuals, read: Callable[[Iterable[str]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the logical tensors of `places` in float32. `read` maps stored keys to tensors; zeroed ones are not read.

    Raises ValueError for `zero` if no place is that of a base: nothing would remain of private experts.
    """
    if residuals == "zero" and not any(place.part == "bases" for place in places):
        raise ValueError("residuals=zero needs a model with bases, and this model has none: use residuals=int4")
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
