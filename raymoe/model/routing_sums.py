"""Sums over rows that measure routing: choices forced by the selection bias, probability of the choices, entropy.

A choice is forced if its group is not among the k groups of the highest probability: without the selection bias,
the router would not have chosen it. The sums are additive over batches and ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raymoe.model.router import Choice

LEVELS = ("clusters", "experts")
"""Levels of routing (H): stage 1 chooses clusters, stage 2 and the flat router choose experts."""

QUANTITIES = ("rows", "entropy", "choices", "forced", "probability")
"""The sums of a router (Q)."""

Measures = dict[str, dict[str, list[float | None] | None]]
"""Name of a measure -> level -> value by layer. None: a layer without a value, or a level that the model lacks."""


@torch.no_grad()
def routing_sums(choice: Choice) -> Tensor:
    """Return the sums of one router over its rows: [Q] float64.

    The entropy of a row is divided by ln G, so that it is between 0 and 1. A router of fewer than two groups has
    no choice, and its rows do not count. Equal probabilities count as not forced.
    """
    index_TK, probability_TG = choice.index_TK, choice.probability_TG
    rows, groups = probability_TG.shape
    if groups < 2:
        return probability_TG.new_zeros(len(QUANTITIES), dtype=torch.float64)
    chosen_TK = probability_TG.gather(-1, index_TK)
    lowest_T1 = probability_TG.topk(index_TK.shape[1], dim=-1).values[:, -1:]
    entropy = torch.special.entr(probability_TG).sum(dtype=torch.float64) / math.log(groups)
    counts = [torch.full_like(entropy, count) for count in (rows, index_TK.numel())]
    forced, probability = (chosen_TK < lowest_T1).sum(), chosen_TK.sum(dtype=torch.float64)
    return torch.stack([counts[0], entropy, counts[1], forced.double(), probability])


def routing_measures(sums_HLQ: Tensor) -> Measures:
    """Return the measures by level and layer: forced share, mean probability of the choices, mean entropy.

    A layer without rows has None, and so has a level without rows in any layer.
    """
    rows_HL, entropy_HL, choices_HL, forced_HL, probability_HL = sums_HLQ.unbind(-1)
    means = {
        "bias_forced_share": forced_HL / choices_HL,
        "chosen_probability": probability_HL / choices_HL,
        "router_entropy": entropy_HL / rows_HL,
    }
    measured = dict(zip(LEVELS, rows_HL.any(-1).tolist(), strict=True))
    known = lambda mean_L: [None if math.isnan(x) else x for x in mean_L.tolist()]  # noqa: E731
    return {
        name: {level: known(mean_HL[i]) if measured[level] else None for i, level in enumerate(LEVELS)}
        for name, mean_HL in means.items()
    }
