"""Inner products of all experts of a layer, wherever they are held: of their residuals, their answers, their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymoe.model.expert_math import RESIDUALS
from raymoe.model.experts import ClusteredExperts, Member
from raymoe.parallel.gather_layer import collect, experts_of, primary_groups
from raymoe.parallel.remap import BASES, shapes
from raymoe.parallel.sharded import Sharded

PRODUCTS = (("gate_in", "gate_out", "base_gate"), ("up_in", "up_out", "base_up"), ("down_in", "down_out", "base_down"))


@torch.no_grad()
def grams(
    sharded: Sharded, assignment: Sequence[Sequence[int]], samples_LND: Tensor, *, weights: bool
) -> dict[str, np.ndarray]:
    """`residual` and `answer` [L, E, E] float64, and `weight` if asked for; layers of other ranks are zero. A collective.

    residual: of the products of the factors, gate, up and down together, exact without forming them.
    answer: of what experts add to their bases' answers on the rows `samples_LND` [L, N, D], per row.
    weight: of whole matrices, base and residual together (paper equation 1).
    """
    model = sharded.transformer.model
    n_layers, n = model.layers, samples_LND.shape[1]
    ffns = sharded.transformer.ffns_of(ClusteredExperts)

    def held(rank: int, layer: int) -> tuple[list[int], list[int]]:
        """The clusters of a layer that a rank speaks for, and their experts."""
        clusters = primary_groups(sharded, rank, layer)
        return clusters, experts_of(clusters, assignment[layer])

    def parcel(layer: int) -> list[Tensor]:
        """What this rank sends of a layer: for each expert answers and factors, for each cluster bases."""
        ffn = ffns[layer]
        clusters, experts = held(sharded.rank, layer)
        if not experts:
            return []
        at = [ffn.local_members.index(Member(e)) for e in experts]
        answers = ffn.residual_outputs(samples_LND[layer])[at]
        tensors = [answers, *(getattr(ffn, name).detach()[at] for name in RESIDUALS)]
        if weights:
            bases = [ffn.dispatch.local_groups.index(c) for c in clusters]
            tensors += [getattr(ffn, name).detach()[bases] for name in BASES]
        return [t.float() for t in tensors]

    sizes = shapes(ffns[0], "experts.0", ()) | shapes(ffns[0], "clusters.0", ())
    sizes = {"answer": (n, model.d_model)} | {name: sizes[name] for name in (*RESIDUALS, *(BASES if weights else ()))}

    def volume(rank: int, layer: int) -> int:
        clusters, experts = held(rank, layer)
        return sum(
            (len(clusters) if name in BASES else len(experts)) * torch.Size(size).numel()
            for name, size in sizes.items()
        )

    whole: dict[int, dict[str, Tensor]] = {}
    for layer, parts in collect(sharded, parcel, volume, samples_LND).items():
        whole[layer] = {
            name: samples_LND.new_zeros(model.n_clusters if name in BASES else model.n_experts, *size)
            for name, size in sizes.items()
        }
        for rank, part in enumerate(parts):
            clusters, experts = held(rank, layer)
            start = 0
            for name, size in sizes.items():
                index = clusters if name in BASES else experts
                count = len(index) * torch.Size(size).numel()
                whole[layer][name][index] = part[start : start + count].view(len(index), *size)
                start += count
    shape = (n_layers, model.n_experts, model.n_experts)
    out: dict[str, Any] = {name: np.zeros(shape) for name in ("residual", "answer", *(["weight"] if weights else []))}
    for layer, tensors in whole.items():
        answers = tensors["answer"].flatten(1)
        out["answer"][layer] = (answers @ answers.t()).double().cpu().numpy() / n
        residual = sum(_products(tensors[a], tensors[b]) for a, b, _ in PRODUCTS)
        assert isinstance(residual, Tensor)
        out["residual"][layer] = residual.double().cpu().numpy()
        if weights:
            out["weight"][layer] = _with_bases(tensors, residual, assignment[layer]).double().cpu().numpy()
    return out


def _products(first: Tensor, second: Tensor) -> Tensor:
    """<first_i second_i, first_j second_j> for factors [E, m, W] and [E, W, n]: [E, E]."""
    n_experts, m, width = first.shape
    tall = first.permute(0, 2, 1).reshape(-1, m)
    wide = second.reshape(n_experts * width, -1)
    pairs = (tall @ tall.t()) * (wide @ wide.t())
    return pairs.view(n_experts, width, n_experts, width).sum((1, 3))


def _with_bases(tensors: Mapping[str, Tensor], residual: Tensor, assignment: Sequence[int]) -> Tensor:
    """<B_i + R_i, B_j + R_j> over the three matrices: [E, E]."""
    cluster = torch.tensor(assignment, device=residual.device)
    out = residual.clone()
    for first, second, base in PRODUCTS:
        flat = tensors[base].flatten(1)
        out += (flat @ flat.t())[cluster][:, cluster]
        # <B_c, first_j second_j> = Σ (B_c second_jᵀ) ∘ first_j
        cross = torch.stack(
            [(b @ tensors[second].transpose(1, 2)).mul_(tensors[first]).sum((1, 2)) for b in tensors[base]]
        )
        out += cross[cluster] + cross[cluster].t()
    return out
