"""Alignment of cluster ids across layers, so that most tokens keep their cluster's id from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


def align_clusters(coactivation: np.ndarray) -> list[list[int]]:
    """Return new cluster ids [layers][C].

    coactivation [layers-1, C, C]: tokens that visited cluster a of a layer and cluster b of the next. Layer 0
    keeps its ids. Each next layer takes the permutation that keeps most tokens on one id (linear assignment).
    """
    if coactivation.ndim != 3 or coactivation.shape[1] != coactivation.shape[2]:
        raise ValueError(f"coactivation has shape {coactivation.shape}: expected [layers-1, C, C]")
    from scipy.optimize import linear_sum_assignment  # late import: 35 MB, needed by export alone

    new_ids = [list(range(coactivation.shape[1]))]
    for counts in coactivation:
        sources, targets = linear_sum_assignment(counts, maximize=True)
        ids = [0] * len(sources)
        for a, b in zip(sources, targets, strict=True):
            ids[b] = new_ids[-1][a]
        new_ids.append(ids)
    return new_ids


def relabel_clusters(
    tensors: Mapping[str, Tensor], assignment: Sequence[Sequence[int]], new_ids: Sequence[Sequence[int]]
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Return the same clustered model with cluster c of layer l renamed to new_ids[l][c].

    Raises ValueError unless each layer's ids are a permutation.
    """
    for layer, ids in enumerate(new_ids):
        if sorted(ids) != list(range(len(ids))) or max(assignment[layer]) >= len(ids):
            raise ValueError(f"the new ids of layer {layer} are not a permutation of its clusters: {ids}")
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if parts[0] == "layers" and parts[2] == "clusters":
            parts[3] = str(new_ids[int(parts[1])][int(parts[3])])
        elif parts[0] == "layers" and parts[2] == "router":
            tensor = tensor[torch.tensor(new_ids[int(parts[1])]).argsort()]  # argsort: new id -> old id
        renamed[".".join(parts)] = tensor
    return renamed, [[ids[c] for c in row] for ids, row in zip(new_ids, assignment, strict=True)]


def kept_share(coactivation: np.ndarray, new_ids: Sequence[Sequence[int]]) -> float:
    """Return the share of layer transitions in which a token keeps its cluster's id."""
    kept = sum(
        counts[a, b]
        for counts, (ids, next_ids) in zip(coactivation, pairwise(new_ids), strict=True)
        for a in range(len(ids))
        for b in range(len(ids))
        if ids[a] == next_ids[b]
    )
    return float(kept / coactivation.sum()) if coactivation.sum() else 1.0
