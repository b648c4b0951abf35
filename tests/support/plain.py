"""Reference computations as loops over tokens and experts, to compare the fused layers with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.model.experts import ClusteredExperts, FlatExperts


def clustered(
    layer: ClusteredExperts, x_TD: Tensor, cluster_TP: Tensor, experts: dict[tuple[int, int], list[int]]
) -> Tensor:
    """Compute the paper's section 3 token by token. experts[(token, cluster)] lists the selected logical experts."""
    out = []
    p_TC = cluster_weights(layer, x_TD, cluster_TP)
    place = {member: i for i, member in enumerate(layer.local_members)}
    for t in range(x_TD.shape[0]):
        total = x_TD[t] * 0
        for c in cluster_TP[t].tolist():
            x = x_TD[t]
            y = torch.zeros_like(x)
            if layer.base_names and layer.model.expert_kind == "private" or not layer.model.has_members:
                y = (F.silu(x @ layer.base_gate[c]) * (x @ layer.base_up[c])) @ layer.base_down[c]
            chosen = experts.get((t, c), [])
            if not chosen:
                total = total + p_TC[t, c] * y
                continue
            rows = [place[e] for e in chosen]
            if len(rows) == 1:
                members = [place[e] for e in layer.members[layer.dispatch.local_groups.index(c)]]
                every = torch.stack([layer.expert_router[i] @ x for i in members]).softmax(0)
                weights = every[members.index(rows[0])][None]
            else:
                weights = torch.stack([layer.expert_router[i] @ x for i in rows]).softmax(0)
            for g, i in zip(weights, rows, strict=True):
                if layer.model.expert_kind == "private":
                    h = F.silu(layer.private_gate[i] @ x) * (layer.private_up[i] @ x)
                    y = y + g * (h @ layer.private_down[i])
                    continue
                gate = layer.base_gate[c] + layer.gate_in[i] @ layer.gate_out[i]
                up = layer.base_up[c] + layer.up_in[i] @ layer.up_out[i]
                down = layer.base_down[c] + layer.down_in[i] @ layer.down_out[i]
                y = y + g * ((F.silu(x @ gate) * (x @ up)) @ down)
            total = total + p_TC[t, c] * y
        out.append(layer.model.gate_scale * total)
    return torch.stack(out) if out else x_TD * 0


def cluster_weights(layer: ClusteredExperts, x_TD: Tensor, cluster_TP: Tensor) -> Tensor:
    """Return the weights of all clusters [T, C]; those of clusters that are not chosen are unused."""
    logits_TC = x_TD @ layer.router.weight.t()
    if layer.model.gate == "softmax":
        return logits_TC.softmax(-1)
    if layer.model.gate == "biased":
        return (logits_TC + layer.router.bias).softmax(-1)
    chosen_TC = torch.zeros_like(logits_TC).scatter(1, cluster_TP, 1.0)
    total_T1 = (logits_TC.sigmoid() * chosen_TC).sum(-1, keepdim=True)
    return logits_TC.sigmoid() / total_T1 if cluster_TP.shape[1] > 1 else logits_TC.sigmoid()


def clustered_selection(layer: ClusteredExperts, x_TD: Tensor) -> tuple[Tensor, dict[tuple[int, int], list[int]]]:
    """Return the selection of both stages (cluster_TP, experts) by sorting the scores of each token."""
    scores = x_TD @ layer.router.weight.t() + layer.router.bias
    cluster_TP = scores.argsort(dim=-1, descending=True, stable=True)[:, : layer.model.clusters_per_token]
    experts: dict[tuple[int, int], list[int]] = {}
    if layer.model.has_members:
        place = {member: i for i, member in enumerate(layer.local_members)}
        for t, row in enumerate(cluster_TP.tolist()):
            for c in row:
                members = layer.members[layer.dispatch.local_groups.index(c)]
                score = {
                    e: (layer.expert_router[place[e]] @ x_TD[t] + layer.expert_bias[place[e]]).item() for e in members
                }
                experts[(t, c)] = sorted(members, key=lambda e: -score[e])[: layer.model.experts_per_token]
    return cluster_TP, experts


def flat(layer: FlatExperts, x_TD: Tensor) -> Tensor:
    """Compute softmax top-K over independent experts, token by token."""
    out = []
    k = layer.model.experts_per_token
    for x in x_TD:
        logits = layer.router.weight @ x
        chosen = (logits + layer.router.bias).argsort(descending=True)[:k]
        weights = logits[chosen].softmax(0) if k > 1 else logits.softmax(0)[chosen]
        out.append(
            sum(
                g * ((F.silu(x @ layer.gate[e]) * (x @ layer.up[e])) @ layer.down[e])
                for g, e in zip(weights, chosen, strict=False)
            )
        )
    return torch.stack(out) if out else x_TD * 0
