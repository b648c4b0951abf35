"""Fold of independent experts into clusters by similarity: a mean base each, and residuals by truncated SVD.

The method is the paper's (arXiv 2510.02345, sections 3.1 and 3.2), for experts with a common initialization.
Shape suffixes of this file besides the usual ones: `N` samples, `X` all values of an expert, `I` and `J` the sizes of a
matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from raymoe.clustering.exchange import improve
from raymoe.clustering.kmeans import balanced_kmeans, embed
from raymoe.clustering.similarity import cosine
from raymoe.config import ModelSection
from raymoe.model.experts import FlatExperts
from raymoe.model.lowrank import factor
from raymoe.parallel.gather_layer import collect, primary_groups
from raymoe.parallel.sharded import Sharded

MATRICES = ("gate", "up", "down")


@torch.no_grad()
def fold(
    sharded: Sharded,
    moments: Mapping[str, Mapping[str, Tensor]],
    samples_LND: Tensor,
    *,
    clustered: ModelSection,
    alpha: float,
    seed: int,
) -> tuple[tuple[tuple[int, ...], ...], dict[str, Tensor]]:
    """Return the assignment [L][E] and all tensors of the clustered model by logical key, with their moments.

    sharded: a flat model; moments by kind and parameter name; samples_LND [L, N, D]: inputs of its
    layers, the same on all ranks. Balanced k-means over `alpha` · cos(W_i − mean, W_j − mean) + the rest ·
    cos of the outputs on the samples, mean removed. The moments of a base are the sum of its experts' (its
    gradient is the sum of theirs); those of residuals and of the stage-1 router start at zero. Collective.
    """
    model = sharded.transformer.model
    d, f = model.d_model, model.d_expert
    ffns = sharded.transformer.ffns_of(FlatExperts)
    kinds = list(moments)
    sizes = {"gate": (d, f), "up": (d, f), "down": (f, d)}
    sizes |= {f"{kind}.{name}": sizes[name] for kind in kinds for name in MATRICES}
    per_expert = sum(torch.Size(size).numel() for size in sizes.values())

    def local_experts(layer: int) -> list[Tensor]:
        ffn = ffns[layer]
        at = [ffn.dispatch.local_groups.index(e) for e in primary_groups(sharded, sharded.rank, layer)]
        stacks = {name: getattr(ffn, name).detach() for name in MATRICES}
        for kind in kinds:
            stacks |= {f"{kind}.{name}": moments[kind][f"layers.{layer}.ffn.{name}"] for name in MATRICES}
        return [stacks[name][i].float() for i in at for name in sizes]

    parts = collect(
        sharded, local_experts, lambda rank, i: per_expert * len(primary_groups(sharded, rank, i)), samples_LND
    )
    assignment: list[tuple[int, ...]] = []
    out: dict[str, Tensor] = {}
    trunk = {key for key, _, index, _ in sharded.transformer.slices() if index is None}
    for key in trunk - {f"layers.{i}.router.{leaf}" for i in range(model.layers) for leaf in ("weight", "bias")}:
        out[key] = sharded.transformer.logical()[key]
        for kind in kinds:
            out[f"moments.{kind}.{key}"] = sharded.transformer.logical(moments[kind])[key]
    for layer, ffn in enumerate(ffns):
        prefix = f"layers.{layer}."
        folded: dict[str, Tensor] = {}
        if layer in parts:
            stacked = _stack(sharded, layer, parts[layer], sizes)
            folded = _layer(stacked, ffn, samples_LND[layer], clustered, alpha, seed)
        folded = _broadcast(folded, layer % sharded.world, ffn, clustered, kinds)
        assignment.append(tuple(folded.pop("assignment").long().tolist()))
        for key, value in folded.items():
            kind, dot, rest = key.partition("|")
            out[f"moments.{kind}.{prefix}{rest}" if dot else prefix + key] = value
        _routers(
            out, prefix, ffn, {k: moments[k][f"{prefix}ffn.router.weight"] for k in kinds}, assignment[-1], clustered
        )
    return tuple(assignment), out


def _stack(
    sharded: Sharded, layer: int, parts: Sequence[Tensor], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, Tensor]:
    """Return a layer's matrices and moments by name, stacked over the experts, from the flat parts of all ranks."""
    counts = [torch.Size(size).numel() for size in sizes.values()]
    experts: dict[int, dict[str, Tensor]] = {}
    for rank, part in enumerate(parts):
        for e, flat in zip(primary_groups(sharded, rank, layer), part.split(sum(counts)), strict=True):
            views = zip(sizes.items(), flat.split(counts), strict=True)
            experts[e] = {name: values.view(size) for (name, size), values in views}
    return {name: torch.stack([experts[e][name] for e in range(len(experts))]) for name in sizes}


def _layer(
    stacked: Mapping[str, Tensor],
    ffn: FlatExperts,
    samples_ND: Tensor,
    clustered: ModelSection,
    alpha: float,
    seed: int,
) -> dict[str, Tensor]:
    """Return a layer's assignment, bases and residuals with moments (`m|KEY`), from the experts' stacks [E, …]."""
    n_experts, n_clusters = clustered.n_experts, clustered.n_clusters
    x_ND = samples_ND.to(stacked["gate"])
    hidden_ENF = F.silu(x_ND @ stacked["gate"]) * (x_ND @ stacked["up"])
    outputs_EX = (hidden_ENF @ stacked["down"]).flatten(1)
    weights_EX = torch.cat([stacked[name].flatten(1) for name in MATRICES], 1)
    # The common initialization is in all weights and carries no information: remove the mean.
    weights_EX, outputs_EX = weights_EX - weights_EX.mean(0), outputs_EX - outputs_EX.mean(0)
    S_EE = alpha * _cosine(weights_EX) + (1 - alpha) * _cosine(outputs_EX)
    sizes_C = np.bincount(np.arange(n_experts) * n_clusters // n_experts, minlength=n_clusters)
    found_E = balanced_kmeans(embed(S_EE), sizes_C, None, seed)
    load_E = np.zeros(n_experts)
    found_E, _ = improve(
        S_EE, found_E, load_E, proposal_E=found_E, max_moves=n_experts, load_weight=0.0, n_clusters=n_clusters
    )
    assignment_E = torch.from_numpy(np.asarray(found_E)).to(x_ND.device)
    out = {"assignment": assignment_E.to(x_ND)}
    # The weights of the flat layer sum to 1, those of clusters to p(cluster | x): scale the down projections.
    router_CD = _mean_router(ffn.router.weight.detach(), assignment_E, n_clusters)
    scale = 1 / (
        clustered.gate_scale
        * (x_ND @ router_CD.t()).softmax(-1).topk(clustered.clusters_per_token).values.sum(-1).mean()
    )
    for name in MATRICES:
        factor_of = scale if name == "down" else 1.0
        for c in range(n_clusters):
            member_E = assignment_E == c
            base_IJ = stacked[name][member_E].mean(0)
            out[f"clusters.{c}.base_{name}"] = base_IJ * factor_of
            for kind, power in (("m", 1), ("v", 2)):
                out[f"{kind}|clusters.{c}.base_{name}"] = stacked[f"{kind}.{name}"][member_E].sum(0) / factor_of**power
            for e in member_E.nonzero().flatten().tolist():
                first_IW, second_WJ = factor((stacked[name][e] - base_IJ) * factor_of, clustered.residual_width)
                out[f"experts.{e}.{name}_in"], out[f"experts.{e}.{name}_out"] = first_IW, second_WJ
                for kind in ("m", "v"):
                    out[f"{kind}|experts.{e}.{name}_in"] = torch.zeros_like(first_IW)
                    out[f"{kind}|experts.{e}.{name}_out"] = torch.zeros_like(second_WJ)
    return out


def _cosine(vectors_EX: Tensor) -> np.ndarray:
    """Return the cosines [E, E] of the vectors, in float64."""
    return cosine((vectors_EX @ vectors_EX.t()).double().cpu().numpy()[None])[0]


def _mean_router(weight_ED: Tensor, assignment_E: Tensor, n_clusters: int) -> Tensor:
    """Return u_c [C, D], the mean row of each cluster's experts: a softmax over clusters approximates their mass."""
    one_hot_EC = F.one_hot(assignment_E, n_clusters).to(weight_ED)
    return one_hot_EC.t() @ weight_ED / one_hot_EC.sum(0)[:, None].clamp(min=1)


def _broadcast(
    folded: Mapping[str, Tensor], source: int, ffn: FlatExperts, clustered: ModelSection, kinds: list[str]
) -> dict[str, Tensor]:
    """Broadcast the folded layer of rank `source`. Collective."""
    d, f, w = clustered.d_model, clustered.d_expert, clustered.residual_width
    shapes: dict[str, tuple[int, ...]] = {"assignment": (clustered.n_experts,)}
    for name, (m, n) in zip(MATRICES, ((d, f), (d, f), (f, d)), strict=True):
        own = {f"clusters.{c}.base_{name}": (m, n) for c in range(clustered.n_clusters)}
        own |= {f"experts.{e}.{name}_in": (m, w) for e in range(clustered.n_experts)}
        own |= {f"experts.{e}.{name}_out": (w, n) for e in range(clustered.n_experts)}
        shapes |= own | {f"{kind}|{key}": shape for kind in kinds for key, shape in own.items()}
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    flat = ffn.gate.detach().new_empty(sum(sizes))
    if folded:
        torch.cat([folded[key].flatten() for key in shapes], out=flat)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(flat, source)
    return {key: part.view(shapes[key]) for key, part in zip(shapes, flat.split(sizes), strict=True)}


def _routers(
    out: dict[str, Tensor],
    prefix: str,
    ffn: FlatExperts,
    moments: Mapping[str, Tensor],
    assignment: tuple[int, ...],
    clustered: ModelSection,
) -> None:
    """Set the routers of both stages from the flat router: experts keep their rows, clusters get the mean."""
    weight_ED, bias_E = ffn.router.weight.detach(), ffn.router.bias
    cluster_E = torch.tensor(assignment, device=weight_ED.device)
    mean_CD = _mean_router(weight_ED, cluster_E, clustered.n_clusters)
    mean_bias_C = _mean_router(bias_E[:, None], cluster_E, clustered.n_clusters)[:, 0]
    out[f"{prefix}router.weight"], out[f"{prefix}router.bias"] = mean_CD, mean_bias_C
    for kind, rows_ED in moments.items():
        out[f"moments.{kind}.{prefix}router.weight"] = torch.zeros_like(mean_CD)
        out |= {f"moments.{kind}.{prefix}experts.{e}.router": rows_ED[e] for e in range(clustered.n_experts)}
    out |= {f"{prefix}experts.{e}.router": weight_ED[e] for e in range(clustered.n_experts)}
    out |= {f"{prefix}experts.{e}.bias": bias_E[e] - mean_bias_C[cluster_E[e]] for e in range(clustered.n_experts)}
