"""Inner products of all experts of a layer, over all ranks: of their residuals, outputs, weights and choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from raymoe.model.experts import ClusteredExperts, Member
from raymoe.model.leaves import BASES, base_leaves, member_leaves
from raymoe.model.router import joint_scores
from raymoe.parallel.gather_layer import collect, experts_of, primary_groups
from raymoe.parallel.sharded import Sharded

PRODUCTS = (("gate_in", "gate_out", "base_gate"), ("up_in", "up_out", "base_up"), ("down_in", "down_out", "base_down"))


@torch.no_grad()
def grams(
    sharded: Sharded, assignment: Sequence[Sequence[int]], samples_LND: Tensor, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the grams `names` [L, E, E] float64 (`raymoe.clustering.statistics.GRAMS`). Collective.

    residual: of the residuals' products (gate, up and down together), computed from the factors; of private experts,
    of their matrices.
    answer: of what experts add to the outputs of their bases on the samples, per row.
    weight: of whole matrices, base plus residual (paper equation 1); of private experts as `residual`.
    coactivation: the samples that would take both experts, if each took the P·K experts with the best `joint_scores`
    of all: as many as it takes in its P clusters. NaN for all experts where scores are not finite.
    A rank computes the layers that `collect` gives it; the other layers are zero.
    """
    model = sharded.transformer.model
    out = {name: np.zeros((model.layers, model.n_experts, model.n_experts)) for name in names}
    for layer, tensors in _gather(sharded, assignment, samples_LND, names).items():
        found = _layer_grams(sharded, layer, assignment[layer], tensors, samples_LND[layer], names)
        for name, gram_EE in found.items():
            out[name][layer] = gram_EE.double().cpu().numpy()
    return out


def _layer_grams(
    sharded: Sharded,
    layer: int,
    assignment: Sequence[int],
    tensors: Mapping[str, Tensor],
    samples_ND: Tensor,
    names: Sequence[str],
) -> dict[str, Tensor]:
    """Return the grams of a layer from the tensors of all its experts."""
    model = sharded.transformer.model
    out: dict[str, Tensor] = {}
    if "answer" in names:
        outputs_EM = tensors["answer"].flatten(1)
        out["answer"] = (outputs_EM @ outputs_EM.t()).double() / len(samples_ND)
    if "residual" in names or "weight" in names:
        if model.expert_kind == "private":
            matrices_EM = torch.cat([tensors[name].flatten(1) for name in member_leaves(model)], 1)
            own_EE = matrices_EM @ matrices_EM.t()
        else:
            gate_EE, up_EE, down_EE = (_products(tensors[first], tensors[second]) for first, second, _ in PRODUCTS)
            own_EE = gate_EE + up_EE + down_EE
        has_bases = "weight" in names and model.expert_kind == "residual"
        whole_EE = _with_bases(tensors, own_EE, assignment) if has_bases else own_EE
        out |= {"residual": own_EE, "weight": whole_EE}
    if "coactivation" in names:
        router = sharded.transformer.ffns_of(ClusteredExperts)[layer].router
        cluster_E = torch.tensor(assignment, device=samples_ND.device)
        scores_NE = joint_scores(
            samples_ND, router.weight, router.bias, tensors["expert_router"], tensors["expert_bias"], cluster_E
        )
        k = min(model.clusters_per_token * model.experts_per_token, model.n_experts)
        # 0 · score: the count of a diverged model is NaN, which the recorder drops.
        taken_NE = (0 * scores_NE).scatter_add_(1, scores_NE.topk(k).indices, torch.ones_like(scores_NE))
        out["coactivation"] = taken_NE.t() @ taken_NE
    return {name: out[name] for name in names}


def _gather(
    sharded: Sharded, assignment: Sequence[Sequence[int]], samples_LND: Tensor, names: Sequence[str]
) -> dict[int, dict[str, Tensor]]:
    """Return, for each layer of this rank, the tensors that the grams need of experts [E, …] and bases [C, …]. Collective."""
    model, ffns = sharded.transformer.model, sharded.transformer.ffns_of(ClusteredExperts)
    bases: dict[str, tuple[int, ...]] = {}
    own: dict[str, tuple[int, ...]] = {}
    if "residual" in names or "weight" in names:
        own |= {name: leaf.shape for name, leaf in member_leaves(model).items()}
    if "weight" in names and model.expert_kind == "residual":
        bases |= {name: leaf.shape for name, leaf in base_leaves(model).items()}
    if "coactivation" in names:
        own |= {"expert_router": (model.d_model,), "expert_bias": ()}
    outputs = {"answer": tuple(samples_LND.shape[1:])} if "answer" in names else {}
    sizes = outputs | own | bases

    def index(rank: int, layer: int, name: str) -> list[int]:
        """Return the clusters, or the experts, whose tensors a rank sends."""
        clusters = primary_groups(sharded, rank, layer)
        return clusters if name in BASES else experts_of(clusters, assignment[layer])

    def parcel(layer: int) -> list[Tensor]:
        ffn = ffns[layer]
        members = [ffn.local_members.index(Member(e)) for e in index(sharded.rank, layer, "answer")]
        if not members:
            return []
        tensors = [ffn.member_outputs(samples_LND[layer])[members]] if outputs else []
        tensors += [getattr(ffn, name).detach()[members] for name in own]
        clusters = [ffn.dispatch.local_groups.index(c) for c in primary_groups(sharded, sharded.rank, layer)]
        tensors += [getattr(ffn, name).detach()[clusters] for name in bases]
        return [tensor.float() for tensor in tensors]

    def count(rank: int, layer: int, name: str) -> int:
        return len(index(rank, layer, name)) * torch.Size(sizes[name]).numel()

    def volume(rank: int, layer: int) -> int:
        return sum(count(rank, layer, name) for name in sizes)

    out: dict[int, dict[str, Tensor]] = {}
    for layer, parts in collect(sharded, parcel, volume, samples_LND).items():
        out[layer] = {
            name: samples_LND.new_zeros(model.n_clusters if name in BASES else model.n_experts, *size)
            for name, size in sizes.items()
        }
        for rank, part in enumerate(parts):
            numbers = part.split([count(rank, layer, name) for name in sizes])
            for (name, size), flat in zip(sizes.items(), numbers, strict=True):
                out[layer][name][index(rank, layer, name)] = flat.view(-1, *size)
    return out


def _products(first_EMW: Tensor, second_EWN: Tensor) -> Tensor:
    """Return <first_i second_i, first_j second_j> for factors [E, m, W] and [E, W, n]: [E, E]."""
    n_experts, m, width = first_EMW.shape
    tall = first_EMW.permute(0, 2, 1).reshape(-1, m)
    wide = second_EWN.reshape(n_experts * width, -1)
    pairs = (tall @ tall.t()) * (wide @ wide.t())
    return pairs.view(n_experts, width, n_experts, width).sum((1, 3))


def _with_bases(tensors: Mapping[str, Tensor], residual_EE: Tensor, assignment: Sequence[int]) -> Tensor:
    """Return <B_i + R_i, B_j + R_j> over the three matrices: [E, E]."""
    cluster_E = torch.tensor(assignment, device=residual_EE.device)
    out_EE = residual_EE.clone()
    for first, second, base in PRODUCTS:
        flat_CM = tensors[base].flatten(1)
        out_EE += (flat_CM @ flat_CM.t())[cluster_E][:, cluster_E]
        # <B_c, first_j second_j> = Σ (B_c second_jᵀ) ∘ first_j
        cross_CE = torch.stack(
            [(b @ tensors[second].transpose(1, 2)).mul_(tensors[first]).sum((1, 2)) for b in tensors[base]]
        )
        out_EE += cross_CE[cluster_E] + cross_CE[cluster_E].t()
    return out_EE
