"""The feed-forward layers: clustered experts, and the baselines behind the same interface.

Each maps x_TD to y_TD and keeps integer loads for balancing: `cluster_load` and `expert_load` count
choices, `served` the rows computed in this process. A layer holds the weights of the groups that its
dispatcher says are here, stacked; `logical()` names every slice by a key that does not depend on where
it is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymoe.config import ModelSection
from raymoe.model.dispatch import Dispatch
from raymoe.model.expert_math import RESIDUALS, ClusteredFFN, FlatFFN, Pairs, compute_dtype, spans
from raymoe.model.router import Choice, Router, auxiliary_loss, move_bias, route


class Slice(NamedTuple):
    """Where a logical tensor lives: parameter or buffer `name` of a module, at `index` (None: all of it)."""

    key: str
    name: str
    index: int | None
    fan_in: int
    """Inputs that one output sums over; 0: starts as zeros."""


class Member(NamedTuple):
    """An expert in its cluster, or the ghost of a moving one in the cluster that it leaves."""

    expert: int
    ghost: bool = False

    @property
    def key(self) -> str:
        return f"{'ghosts' if self.ghost else 'experts'}.{self.expert}"


Ghosts = Mapping[int, int]
"""Of a layer: moving expert -> the cluster that it leaves."""


def members(assignment: Sequence[int], ghosts: Ghosts, c: int) -> list[Member]:
    """Who is in cluster c: its experts, then the ghosts of those that leave it."""
    stay = [Member(e) for e, owner in enumerate(assignment) if owner == c]
    return stay + [Member(e, ghost=True) for e, owner in sorted(ghosts.items()) if owner == c]


def by_expert(load: Tensor, n_experts: int) -> Tensor:
    """Loads of members [..., n·E] (experts, then their ghosts where there can be any) as loads of experts [..., E]."""
    return load.view(*load.shape[:-1], -1, n_experts).sum(-2) if load.numel() else load


class ClusteredExperts(nn.Module):
    """Clusters of experts with two-stage routing (paper sections 3.1 and 3.2).

    assignment [E]: the cluster of each expert; ghosts: the experts on the move. The clusters in
    `dispatch.local_groups` are in this process, with their members, router rows and biases. A cluster that has
    fewer than K members uses them all; one that has none answers with zeros and should not be chosen.
    """

    cluster_load: Tensor
    expert_load: Tensor
    expert_bias: Tensor

    def __init__(
        self, model: ModelSection, assignment: Sequence[int], dispatch: Dispatch, ghosts: Ghosts | None = None
    ) -> None:
        super().__init__()
        d, f, w = model.d_model, model.d_expert, model.residual_width
        self.model = model
        self.dispatch = dispatch
        self.router = Router(d, model.n_clusters, model.clusters_per_token, over_selected=False)
        self.ghosts = dict(ghosts or {})
        self.members = [members(assignment, self.ghosts, c) for c in dispatch.local_groups]
        """The members of each held cluster."""
        self.local_members = [member for cluster in self.members for member in cluster]
        c, e = len(dispatch.local_groups), len(self.local_members)
        self.base_gate = nn.Parameter(torch.empty(c, d, f))
        self.base_up = nn.Parameter(torch.empty(c, d, f))
        self.base_down = nn.Parameter(torch.empty(c, f, d))
        if w:
            self.gate_in, self.gate_out = nn.Parameter(torch.empty(e, d, w)), nn.Parameter(torch.empty(e, w, f))
            self.up_in, self.up_out = nn.Parameter(torch.empty(e, d, w)), nn.Parameter(torch.empty(e, w, f))
            self.down_in, self.down_out = nn.Parameter(torch.empty(e, f, w)), nn.Parameter(torch.empty(e, w, d))
            self.expert_router = nn.Parameter(torch.empty(e, d))
            self.register_buffer("expert_bias", torch.zeros(e))
        self.expert_parts = spans([len(cluster) for cluster in self.members])
        self.register_buffer("cluster_load", torch.zeros(model.n_clusters, dtype=torch.int64), persistent=False)
        self.register_buffer("expert_load", torch.zeros(2 * model.n_experts, dtype=torch.int64), persistent=False)
        """Of experts, then of their ghosts."""
        self.share = torch.ones(e, device="cpu")
        """[e]: parts of a full load that the members should have; on the CPU, like the counts it is used with."""
        self.fade: Tensor | None = None
        self.served = 0
        self.choice_TP = torch.empty(0, dtype=torch.int64)
        """The clusters that the last rows chose."""
        self.auxiliary: Tensor | None = None
        self.input_sum: Tensor | None = None
        """[e, D] float32: where the inputs of each held member are summed, when somebody watches."""
        self.sampled_rows: Tensor | None = None
        """Positions of the rows that the next forward keeps in `samples`."""
        self.samples: list[Tensor] = []

    def set_progress(self, progress: float) -> None:
        """How far the move of this layer's moving experts has come, 0 to 1: ghosts fade out as they fade in.

        A member that has the share s of its full part has ln(s) added to its logit: at 0 it is never used,
        so that the layer computes what it did before the move, at 1 what it will do after it.
        """
        shares = [
            1.0 - progress if member.ghost else progress if member.expert in self.ghosts else 1.0
            for member in self.local_members
        ]
        self.share = torch.tensor(shares)
        fades = [math.log(share) if share > 0 else -math.inf for share in shares]
        moving = any(share < 1 for share in shares)
        self.fade = torch.tensor(fades, device=self.base_gate.device) if moving else None

    def forward(self, x_TD: Tensor, *, auxiliary: bool = False) -> Tensor:
        rows = x_TD.to(compute_dtype(x_TD))
        if self.sampled_rows is not None:
            self.samples.append(rows.detach()[self.sampled_rows])
        choice = self.router(rows)
        self.choice_TP = choice.index
        self.auxiliary = auxiliary_loss(choice, self.model.n_clusters) if auxiliary else None
        self.cluster_load += torch.bincount(choice.index.flatten(), minlength=self.model.n_clusters)
        answers = self.dispatch(rows, choice.index, self.compute)
        return torch.einsum("tp,tpd->td", choice.weight * self.model.gate_scale, answers.to(choice.weight.dtype))

    def compute(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by held cluster, `counts` each -> what those clusters say. Rows in, rows out."""
        self.served += rows.shape[0]
        parts = spans(counts)
        weights = [self.base_gate, self.base_up, self.base_down]
        if not self.model.residual_width:
            return ClusteredFFN.apply(rows, parts, [None] * len(parts), self.expert_parts, *weights)
        choices = [self._choose(rows[slice(*part)], c) for c, part in enumerate(parts)]
        pairs = [Pairs(choice.index, len(cluster), rows) for choice, cluster in zip(choices, self.members, strict=True)]
        for p, cluster in zip(pairs, self.members, strict=True):
            self.expert_load[self._load_index(cluster)] += torch.tensor(
                p.counts, dtype=torch.int64, device=self.expert_load.device
            )
        if self.input_sum is not None:
            for c, (part, experts) in enumerate(zip(parts, self.expert_parts, strict=True)):
                routed = rows.new_zeros(part[1] - part[0], experts[1] - experts[0])
                routed.scatter_(1, choices[c].index, 1.0)
                self.input_sum[slice(*experts)] += routed.t() @ rows[slice(*part)].detach()
        weights += [getattr(self, name) for name in RESIDUALS]
        return ClusteredFFN.apply(rows, parts, pairs, self.expert_parts, *[c.weight for c in choices], *weights)

    def _choose(self, rows: Tensor, c: int) -> Choice:
        """Stage 2, at the owner: the top K of the cluster's members."""
        part = slice(*self.expert_parts[c])
        k = min(self.model.experts_per_token, len(self.members[c]))
        fade = None if self.fade is None else self.fade[part]
        return route(rows, self.expert_router[part], self.expert_bias[part], k, over_selected=True, fade=fade)

    def _load_index(self, cluster: list[Member]) -> list[int]:
        return [member.expert + self.model.n_experts * member.ghost for member in cluster]

    @torch.no_grad()
    def residual_outputs(self, rows_ND: Tensor) -> Tensor:
        """What each held member adds to its base's answer on the same rows, routed to it or not: [e, N, D] float32."""
        rows = rows_ND.float()
        out = rows.new_empty(len(self.local_members), *rows.shape)
        for c, (start, stop) in enumerate(self.expert_parts):
            a, b = rows @ self.base_gate[c].float(), rows @ self.base_up[c].float()
            base = F.silu(a) * b
            for e in range(start, stop):
                gate = a + (rows @ self.gate_in[e].float()) @ self.gate_out[e].float()
                up = b + (rows @ self.up_in[e].float()) @ self.up_out[e].float()
                h = F.silu(gate) * up
                residual = (h @ self.down_in[e].float()) @ self.down_out[e].float()
                out[e] = (h - base) @ self.base_down[c].float() + residual
        return out

    def logical(self) -> Iterator[Slice]:
        d, f, w = self.model.d_model, self.model.d_expert, self.model.residual_width
        yield Slice("router.weight", "router.weight", None, d)
        yield Slice("router.bias", "router.bias", None, 0)
        for i, c in enumerate(self.dispatch.local_groups):
            yield Slice(f"clusters.{c}.base_gate", "base_gate", i, d)
            yield Slice(f"clusters.{c}.base_up", "base_up", i, d)
            yield Slice(f"clusters.{c}.base_down", "base_down", i, f)
        if not w:
            return
        fan_in = dict(zip(RESIDUALS, (d, w, d, w, f, w), strict=True))
        for i, member in enumerate(self.local_members):
            for name in RESIDUALS:
                yield Slice(f"{member.key}.{name}", name, i, fan_in[name])
            yield Slice(f"{member.key}.router", "expert_router", i, d)
            yield Slice(f"{member.key}.bias", "expert_bias", i, 0)

    def balance(self, cluster_load: Tensor, expert_load: Tensor, rate: float) -> None:
        """Move the selection biases of both levels by this step's global counts [C], [2E] (experts, then ghosts)."""
        move_bias(self.router.bias, cluster_load, rate)
        if self.model.residual_width:
            for part, cluster in zip(self.expert_parts, self.members, strict=True):
                loads = expert_load[self._load_index(cluster)]
                move_bias(self.expert_bias[slice(*part)], loads, rate, self.share[slice(*part)])


class FlatExperts(nn.Module):
    """E independent experts, softmax top-K over all of them, grouped products: the standard MoE layer."""

    expert_load: Tensor

    def __init__(self, model: ModelSection, dispatch: Dispatch) -> None:
        super().__init__()
        d, f, e = model.d_model, model.d_expert, len(dispatch.local_groups)
        self.model = model
        self.dispatch = dispatch
        self.router = Router(d, model.n_experts, model.experts_per_token, over_selected=True)
        self.gate = nn.Parameter(torch.empty(e, d, f))
        self.up = nn.Parameter(torch.empty(e, d, f))
        self.down = nn.Parameter(torch.empty(e, f, d))
        self.register_buffer("expert_load", torch.zeros(model.n_experts, dtype=torch.int64), persistent=False)
        self.served = 0
        self.auxiliary: Tensor | None = None
        self.sampled_rows: Tensor | None = None
        """Positions of the rows that the next forward keeps in `samples`."""
        self.samples: list[Tensor] = []

    def forward(self, x_TD: Tensor, *, auxiliary: bool = False) -> Tensor:
        rows = x_TD.to(compute_dtype(x_TD))
        if self.sampled_rows is not None:
            self.samples.append(rows.detach()[self.sampled_rows])
        choice = self.router(rows)
        self.auxiliary = auxiliary_loss(choice, self.model.n_experts) if auxiliary else None
        self.expert_load += torch.bincount(choice.index.flatten(), minlength=self.model.n_experts)
        answers = self.dispatch(rows, choice.index, self.compute)
        return torch.einsum("tk,tkd->td", choice.weight, answers.to(choice.weight.dtype))

    def compute(self, rows: Tensor, counts: list[int]) -> Tensor:
        self.served += rows.shape[0]
        return FlatFFN.apply(rows, counts, self.gate, self.up, self.down)

    def logical(self) -> Iterator[Slice]:
        d, f = self.model.d_model, self.model.d_expert
        yield Slice("router.weight", "router.weight", None, d)
        yield Slice("router.bias", "router.bias", None, 0)
        for i, e in enumerate(self.dispatch.local_groups):
            yield Slice(f"experts.{e}.gate", "gate", i, d)
            yield Slice(f"experts.{e}.up", "up", i, d)
            yield Slice(f"experts.{e}.down", "down", i, f)

    def balance(self, cluster_load: Tensor, expert_load: Tensor, rate: float) -> None:
        move_bias(self.router.bias, expert_load, rate)


class DenseFFN(nn.Module):
    """One SwiGLU of the same active width as K experts."""

    auxiliary: Tensor | None = None

    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        d, f = model.d_model, model.d_expert * model.experts_per_token
        self.d_model, self.hidden = d, f
        self.gate = nn.Parameter(torch.empty(d, f))
        self.up = nn.Parameter(torch.empty(d, f))
        self.down = nn.Parameter(torch.empty(f, d))

    def forward(self, x_TD: Tensor, *, auxiliary: bool = False) -> Tensor:
        return (F.silu(x_TD @ self.gate) * (x_TD @ self.up)) @ self.down

    def logical(self) -> Iterator[Slice]:
        yield Slice("ffn.gate", "gate", None, self.d_model)
        yield Slice("ffn.up", "up", None, self.d_model)
        yield Slice("ffn.down", "down", None, self.hidden)

    def balance(self, cluster_load: Tensor, expert_load: Tensor, rate: float) -> None:
        """Nothing to balance."""


FFN = ClusteredExperts | FlatExperts | DenseFFN
