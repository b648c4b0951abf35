"""The feed-forward layers: clustered experts, and the baselines behind the same interface.

Each layer maps x_TD to y_TD and stores nothing between forwards: a caller that needs loads, choices or
inputs passes a `LayerObservation`. A layer has the stacked weights of its dispatcher's local groups.
`logical()` names every slice by a key that does not depend on the process that has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymoe.config import ModelSection
from raymoe.model.dispatch import Dispatch
from raymoe.model.expert_math import ClusteredFFN, FlatFFN, Pairs, compute_dtype, spans
from raymoe.model.leaves import BASES, base_leaves, member_leaves
from raymoe.model.observation import LayerObservation
from raymoe.model.private_math import PrivateFFN
from raymoe.model.router import Choice, Router, layer_gate, move_bias, route


class Slice(NamedTuple):
    """The location of a logical tensor: a parameter or buffer of a module, and an index into it."""

    key: str
    name: str
    index: int | None
    """None: the whole tensor."""
    fan_in: int
    """Number of inputs that one output sums over; 0: initialized to zeros."""


class Member(NamedTuple):
    """An expert in its cluster, or the ghost of a moving expert in the cluster that it leaves."""

    expert: int
    ghost: bool = False

    @property
    def key(self) -> str:
        return f"{'ghosts' if self.ghost else 'experts'}.{self.expert}"


Ghosts = Mapping[int, int]
"""Ghosts of one layer: moving expert -> the cluster that it leaves."""


def members(assignment: Sequence[int], ghosts: Ghosts, c: int) -> list[Member]:
    """Return the members of cluster c: its experts, then the ghosts of the experts that leave it."""
    experts = [Member(e) for e, owner in enumerate(assignment) if owner == c]
    return experts + [Member(e, ghost=True) for e, owner in sorted(ghosts.items()) if owner == c]


def by_expert(load: Tensor, n_experts: int) -> Tensor:
    """Convert loads of members [..., n·E] (experts, then their ghosts) to loads of experts [..., E]."""
    return load.view(*load.shape[:-1], -1, n_experts).sum(-2) if load.numel() else load


class ClusteredExperts(nn.Module):
    """Clusters of experts with two-stage routing (paper sections 3.1 and 3.2).

    A cluster has a base, experts or both (`model.leaves`). Residual experts change the base, private experts add their
    outputs to that of the base.

    assignment [E]: the cluster of each expert. ghosts: the moving experts. The clusters in
    `dispatch.local_groups` are in this process, with their members, router rows and biases. A cluster
    with fewer than K members uses them all. A cluster without members outputs zeros, or with private experts the output
    of its base.
    """

    expert_bias: Tensor

    def __init__(
        self, model: ModelSection, assignment: Sequence[int], dispatch: Dispatch, ghosts: Ghosts | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.dispatch = dispatch
        self.router = Router(model.d_model, model.n_clusters, model.clusters_per_token, layer_gate(model))
        self.ghosts = dict(ghosts or {})
        self.members = [members(assignment, self.ghosts, c) for c in dispatch.local_groups]
        """The members of each local cluster."""
        self.local_members = [member for cluster in self.members for member in cluster]
        self.base_names, self.member_names = tuple(base_leaves(model)), tuple(member_leaves(model))
        c, e = len(dispatch.local_groups), len(self.local_members)
        for name, leaf in base_leaves(model).items():
            self.register_parameter(name, nn.Parameter(torch.empty(c, *leaf.shape)))
        for name, leaf in member_leaves(model).items():
            self.register_parameter(name, nn.Parameter(torch.empty(e, *leaf.shape)))
        if model.has_members:
            self.expert_router = nn.Parameter(torch.empty(e, model.d_model))
            self.register_buffer("expert_bias", torch.zeros(e))
        self.expert_parts = spans([len(cluster) for cluster in self.members])
        """The range of each local cluster in the stacked members."""
        self.share_e = torch.ones(e, device="cpu")
        """The wanted load of each local member relative to an even load. On the CPU, where the counts are."""
        self.fade_e: Tensor | None = None
        """ln(share) of each local member while experts move."""

    def set_progress(self, progress: float) -> None:
        """Set the progress of this layer's moves, from 0 to 1: ghosts fade out while moving experts fade in.

        ln(s) is added to the logit of a member with share s. At progress 0 the layer computes its function
        from before the move, at 1 its function after the move.
        """
        shares = [
            1.0 - progress if member.ghost else progress if member.expert in self.ghosts else 1.0
            for member in self.local_members
        ]
        self.share_e = torch.tensor(shares)
        fades = [math.log(share) if share > 0 else -math.inf for share in shares]
        moving = any(share < 1 for share in shares)
        self.fade_e = torch.tensor(fades, device=self.router.bias.device) if moving else None

    def forward(self, x_TD: Tensor, seen: LayerObservation | None = None) -> Tensor:
        rows_TD = x_TD.to(compute_dtype(x_TD))
        choice = self.router(rows_TD)
        if seen:
            seen.record_inputs(rows_TD)
            seen.record_clusters(choice, self.model.n_clusters)
        outputs_TPD = self.dispatch(rows_TD, choice.index_TK, partial(self.compute, seen=seen))
        weight_TP = choice.weight_TK * self.model.gate_scale
        return torch.einsum("tp,tpd->td", weight_TP, outputs_TPD.to(weight_TP.dtype))

    def compute(self, rows_RD: Tensor, counts: list[int], seen: LayerObservation | None = None) -> Tensor:
        """Compute the outputs [R, D] of the local clusters. Rows are sorted by cluster, `counts` rows each."""
        if seen:
            seen.record_computed(rows_RD.shape[0])
        parts = spans(counts)
        bases = [getattr(self, name) for name in self.base_names]
        if not self.model.has_members:
            return ClusteredFFN.apply(rows_RD, parts, [None] * len(parts), self.expert_parts, *bases)
        choices = [self._choose(rows_RD[slice(*part)], c) for c, part in enumerate(parts)]
        sizes = [len(cluster) for cluster in self.members]
        pairs = [Pairs(choice.index_TK, size, rows_RD) for choice, size in zip(choices, sizes, strict=True)]
        if seen:
            places = [self._load_index(cluster) for cluster in self.members]
            seen.record_members(places, [p.counts for p in pairs], 2 * self.model.n_experts)
            seen.record_routed([rows_RD[slice(*part)] for part in parts], choices, sizes)
        tensors = [c.weight_TK for c in choices] + [getattr(self, name) for name in self.member_names]
        if self.model.expert_kind == "residual":
            tensors[len(choices) : len(choices)] = bases
            return ClusteredFFN.apply(rows_RD, parts, pairs, self.expert_parts, *tensors)
        y_RD = PrivateFFN.apply(rows_RD, parts, pairs, self.expert_parts, *tensors)
        if bases:
            y_RD = y_RD + ClusteredFFN.apply(rows_RD, parts, [None] * len(parts), self.expert_parts, *bases)
        return y_RD

    def _choose(self, rows_RD: Tensor, c: int) -> Choice:
        """Stage 2, at the owner of the cluster: choose the top K members."""
        part = slice(*self.expert_parts[c])
        k = min(self.model.experts_per_token, len(self.members[c]))
        fade_e = None if self.fade_e is None else self.fade_e[part]
        return route(rows_RD, self.expert_router[part], self.expert_bias[part], k, gate="selected", fade_G=fade_e)

    def _load_index(self, cluster: list[Member]) -> list[int]:
        """Return the places of a cluster's members in loads [2E]: experts, then ghosts."""
        return [member.expert + self.model.n_experts * member.ghost for member in cluster]

    @torch.no_grad()
    def member_outputs(self, rows_ND: Tensor) -> Tensor:
        """Return what each local member adds to its base's output, [e, N, D] float32, regardless of routing."""
        rows_ND = rows_ND.float()
        weights = {name: getattr(self, name).float() for name in (*self.base_names, *self.member_names)}
        if self.model.expert_kind == "private":
            gate_eWD, up_eWD, down_eWD = (weights[name] for name in self.member_names)
            return (F.silu(rows_ND @ gate_eWD.mT) * (rows_ND @ up_eWD.mT)) @ down_eWD
        out_eND = rows_ND.new_empty(len(self.local_members), *rows_ND.shape)
        for c, (start, stop) in enumerate(self.expert_parts):
            base_gate_DF, base_up_DF, base_down_FD = (weights[name][c] for name in BASES)
            a_NF, b_NF = rows_ND @ base_gate_DF, rows_ND @ base_up_DF
            base_NF = F.silu(a_NF) * b_NF
            for e in range(start, stop):
                gate_in, gate_out, up_in, up_out, down_in, down_out = (weights[name][e] for name in self.member_names)
                h_NF = F.silu(a_NF + (rows_ND @ gate_in) @ gate_out) * (b_NF + (rows_ND @ up_in) @ up_out)
                out_eND[e] = (h_NF - base_NF) @ base_down_FD + (h_NF @ down_in) @ down_out
        return out_eND

    def logical(self) -> Iterator[Slice]:
        yield Slice("router.weight", "router.weight", None, self.model.d_model)
        yield Slice("router.bias", "router.bias", None, 0)
        for i, c in enumerate(self.dispatch.local_groups):
            for name, leaf in base_leaves(self.model).items():
                yield Slice(f"clusters.{c}.{name}", name, i, leaf.fan_in)
        if not self.model.has_members:
            return
        for i, member in enumerate(self.local_members):
            for name, leaf in member_leaves(self.model).items():
                yield Slice(f"{member.key}.{name}", name, i, leaf.fan_in)
            yield Slice(f"{member.key}.router", "expert_router", i, self.model.d_model)
            yield Slice(f"{member.key}.bias", "expert_bias", i, 0)

    def balance(self, cluster_load_C: Tensor, member_load_M: Tensor, rate: float) -> None:
        """Move the selection biases of both levels by the global loads of a step (M = 2E: experts, then ghosts)."""
        move_bias(self.router.bias, cluster_load_C, rate)
        if self.model.has_members:
            for part, cluster in zip(self.expert_parts, self.members, strict=True):
                load_e = member_load_M[self._load_index(cluster)]
                move_bias(self.expert_bias[slice(*part)], load_e, rate, self.share_e[slice(*part)])

    def selection_biases(self) -> dict[str, Tensor]:
        """Return the selection biases by level: clusters [C], experts [E] with NaN where another process has them."""
        biases = {"clusters": self.router.bias}
        if self.model.has_members:
            biases["experts"] = self.router.bias.new_full((self.model.n_experts,), math.nan)
            at = [(i, member.expert) for i, member in enumerate(self.local_members) if not member.ghost]
            local, experts = [i for i, _ in at], [expert for _, expert in at]
            biases["experts"][experts] = self.expert_bias[local]
        return biases


class FlatExperts(nn.Module):
    """E independent experts with softmax top-K over all of them and grouped products: the standard MoE layer."""

    def __init__(self, model: ModelSection, dispatch: Dispatch) -> None:
        super().__init__()
        d, f, e = model.d_model, model.d_expert, len(dispatch.local_groups)
        self.model = model
        self.dispatch = dispatch
        self.router = Router(d, model.n_experts, model.experts_per_token, layer_gate(model))
        self.gate = nn.Parameter(torch.empty(e, d, f))
        self.up = nn.Parameter(torch.empty(e, d, f))
        self.down = nn.Parameter(torch.empty(e, f, d))

    def forward(self, x_TD: Tensor, seen: LayerObservation | None = None) -> Tensor:
        rows_TD = x_TD.to(compute_dtype(x_TD))
        choice = self.router(rows_TD)
        if seen:
            seen.record_inputs(rows_TD)
            seen.record_experts(choice, self.model.n_experts)
        outputs_TKD = self.dispatch(rows_TD, choice.index_TK, partial(self.compute, seen=seen))
        return torch.einsum("tk,tkd->td", choice.weight_TK, outputs_TKD.to(choice.weight_TK.dtype))

    def compute(self, rows_ND: Tensor, counts: list[int], seen: LayerObservation | None = None) -> Tensor:
        """Compute the outputs [N, D] of the local experts. Rows are sorted by expert, `counts` rows each."""
        if seen:
            seen.record_computed(rows_ND.shape[0])
        return FlatFFN.apply(rows_ND, counts, self.gate, self.up, self.down)

    def logical(self) -> Iterator[Slice]:
        d, f = self.model.d_model, self.model.d_expert
        yield Slice("router.weight", "router.weight", None, d)
        yield Slice("router.bias", "router.bias", None, 0)
        for i, e in enumerate(self.dispatch.local_groups):
            yield Slice(f"experts.{e}.gate", "gate", i, d)
            yield Slice(f"experts.{e}.up", "up", i, d)
            yield Slice(f"experts.{e}.down", "down", i, f)

    def balance(self, cluster_load_C: Tensor, member_load_M: Tensor, rate: float) -> None:
        """Move the selection biases by the global loads of the experts."""
        move_bias(self.router.bias, member_load_M, rate)

    def selection_biases(self) -> dict[str, Tensor]:
        """Return the selection biases of the experts, [E]."""
        return {"experts": self.router.bias}


class DenseFFN(nn.Module):
    """One SwiGLU with the active width of K experts."""

    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        d, f = model.d_model, model.d_expert * model.experts_per_token
        self.d_model, self.hidden = d, f
        self.gate = nn.Parameter(torch.empty(d, f))
        self.up = nn.Parameter(torch.empty(d, f))
        self.down = nn.Parameter(torch.empty(f, d))

    def forward(self, x_TD: Tensor, seen: LayerObservation | None = None) -> Tensor:
        return (F.silu(x_TD @ self.gate) * (x_TD @ self.up)) @ self.down

    def logical(self) -> Iterator[Slice]:
        yield Slice("ffn.gate", "gate", None, self.d_model)
        yield Slice("ffn.up", "up", None, self.d_model)
        yield Slice("ffn.down", "down", None, self.hidden)

    def balance(self, cluster_load_C: Tensor, member_load_M: Tensor, rate: float) -> None:
        """Do nothing: a dense layer has no router."""

    def selection_biases(self) -> dict[str, Tensor]:
        """Return nothing: a dense layer has no router."""
        return {}


FFN = ClusteredExperts | FlatExperts | DenseFFN
