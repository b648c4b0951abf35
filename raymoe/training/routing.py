"""Measures of routing over all ranks: forced choices, probability of the choices, entropy and selection biases."""

from __future__ import annotations

import torch
from torch import Tensor

from raymoe.model.observation import Observation
from raymoe.model.routing_sums import LEVELS, Measures, routing_measures
from raymoe.model.transformer import Transformer
from raymoe.training.step_report import all_reduce_sum


def routing_record(model: Transformer, sums_HLQ: Tensor | None, device: torch.device) -> Measures:
    """Return the fields of a record that describe routing, by level and layer. Collective.

    sums_HLQ: the sums of routing that this rank observed. None on all ranks: not observed, and only the selection
    biases have values.
    """
    if sums_HLQ is None:
        sums_HLQ = Observation(model.model).routing_sums()
    return routing_measures(all_reduce_sum(sums_HLQ, device)) | bias_ranges(model, device)


def bias_ranges(model: Transformer, device: torch.device) -> Measures:
    """Return the minimum, maximum and standard deviation of the selection biases in logits. Collective."""
    found: Measures = {f"selection_bias_{name}": {} for name in ("min", "max", "std")}
    layers = [ffn.selection_biases() for ffn in model.ffns]
    for level in LEVELS:
        values: list[list[float | None] | None] = [None, None, None]
        if level in layers[0]:
            own_LG = torch.stack([layer[level] for layer in layers]).double().cpu()
            is_local_LG = ~own_LG.isnan()
            total_LG, ranks_LG = all_reduce_sum(torch.stack([own_LG.nan_to_num(0.0), is_local_LG.double()]), device)
            bias_LG = total_LG / ranks_LG  # ranks that have the same group have equal biases
            values = [x_L.tolist() for x_L in (bias_LG.amin(-1), bias_LG.amax(-1), bias_LG.std(-1, correction=0))]
        for measure, value in zip(found.values(), values, strict=True):
            measure[level] = value
    return found
