"""What a cluster does for the trunk, rows in and rows out, when its weights are in this process.

The trunk only knows `ClusterCompute`: one call with the rows of all active clusters of a layer. Whoever
answers chooses the experts (stage 2), so that a call carries rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.config import ModelSection
from raymoe.model.fused import RESIDUALS, Pairs, answers, joined, padded
from raymoe.model.router import route
from raymoe.storage.export import Artifact

ClusterCompute = Callable[[int, Mapping[int, Tensor]], Mapping[int, Tensor]]
"""(layer, active cluster -> rows [R, D]) -> cluster -> answers [R, D], in the rows' type. Pure: it may be called again."""


def few_sizes(rows: int) -> int:
    """`rows` rounded up to 4, 6, 8, 12, 16, 24, …: with at least 4, a row's product does not depend on its neighbours."""
    power = 1 << max(2, (rows - 1).bit_length())
    return power * 3 // 4 if power > 4 and rows <= power * 3 // 4 else power


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [n, I] @ weight [I, J], computed in one of a few sizes."""
    return (padded(rows, few_sizes(rows.shape[0])) @ weight)[: rows.shape[0]]


class Cluster:
    """One cluster of one layer in the compute type: (x [R, D]) -> [R, D].

    Its factors rest side by side, so that few rows need few products: `wide_in` [D, 2F + e·2W] is both bases
    and all narrow factors, `wide_out` [2, e·W, F], `down_in` [F, e·W], `down` [F + e·W, D].
    """

    LOOP_ROWS = 32
    """From so many rows on, an expert at a time: it computes less, and a product's start-up no longer counts."""

    def __init__(self, model: ModelSection, tensors: Mapping[str, Tensor], layer: int, c: int, dtype: torch.dtype):
        def base(name: str) -> Tensor:
            return tensors[f"layers.{layer}.clusters.{c}.base_{name}"].to(dtype)

        prefix = f"layers.{layer}.experts."
        ids = sorted({int(key[len(prefix) :].split(".")[0]) for key in tensors if key.startswith(prefix)})
        self.d, self.f, self.w, self.e = model.d_model, model.d_expert, model.residual_width, len(ids)
        self.k = min(model.experts_per_token, self.e)
        gate, up, down = base("gate"), base("up"), base("down")
        if not self.w:
            self.wide_in, self.down = torch.cat((gate, up), 1), down
            return

        def stack(name: str) -> Tensor:
            return torch.stack([tensors[f"{prefix}{e}.{name}"] for e in ids])

        if not self.e:
            return
        self.router, self.bias = stack("router"), stack("bias")
        narrow_in, wide_out, down_in, down_out = joined(*(stack(name) for name in RESIDUALS), dtype=dtype)
        self.wide_in = torch.cat((gate, up, narrow_in.transpose(0, 1).flatten(1)), 1)
        self.wide_out = wide_out.transpose(0, 1).flatten(1, 2).contiguous()
        self.down_in = down_in.transpose(0, 1).flatten(1).contiguous()
        self.down = torch.cat((down, down_out.flatten(0, 1)))

    def __call__(self, x: Tensor) -> Tensor:
        rows = padded(x, few_sizes(x.shape[0]))
        if not self.w:
            gate, up = (rows @ self.wide_in).chunk(2, 1)
            return (F.silu(gate).mul_(up) @ self.down)[: x.shape[0]]
        if not self.e:
            return torch.zeros_like(x)
        choice = route(rows, self.router, self.bias, self.k, over_selected=True)
        compute = self._few if rows.shape[0] < self.LOOP_ROWS else self._many
        return compute(rows, choice.index, choice.weight.to(x.dtype))[: x.shape[0]]

    def _few(self, rows: Tensor, index_RK: Tensor, gate_RK: Tensor) -> Tensor:
        """All experts at once: the narrow values of those that a row did not choose are zeroed."""
        r, k, e, w, f = rows.shape[0], self.k, self.e, self.w, self.f
        chosen = F.one_hot(index_RK, e).to(rows.dtype)  # [R, K, e]
        wide, narrow = (rows @ self.wide_in).split((2 * f, 2 * e * w), 1)
        narrow = narrow.view(r, 1, e, 2, w) * chosen[..., None, None]
        pairs = narrow.permute(3, 0, 1, 2, 4).reshape(2, r * k, e * w)
        base = wide.view(r, 1, 2, f).expand(r, k, 2, f).permute(2, 0, 1, 3).reshape(2, r * k, f)
        gate, up = base.baddbmm_(pairs, self.wide_out)
        h = F.silu(gate).mul_(up)
        hidden = (gate_RK.unsqueeze(1) @ h.view(r, k, f)).squeeze(1)
        back = (h @ self.down_in).view(r, k, e, w) * (chosen * gate_RK[..., None])[..., None]
        return torch.cat((hidden, back.sum(1).flatten(1)), 1) @ self.down

    def _many(self, rows: Tensor, index_RK: Tensor, gate_RK: Tensor) -> Tensor:
        """Expert by expert, as in training."""
        e, w, f = self.e, self.w, self.f
        residuals = [
            self.wide_in[:, 2 * f :].view(self.d, e, 2 * w).transpose(0, 1),
            self.wide_out.view(2, e, w, f).transpose(0, 1),
            self.down_in.view(f, e, w).transpose(0, 1),
            self.down[f:].view(e, w, self.d),
        ]
        bases = (self.wide_in[:, :f], self.wide_in[:, f : 2 * f], self.down[:f])
        return answers(rows, bases, Pairs(index_RK, e, rows), gate_RK, residuals)[0]


class LocalClusters:
    """`ClusterCompute` over clusters held in this process, converted once to the compute type."""

    def __init__(self, artifact: Artifact, clusters: Iterable[int], dtype: torch.dtype) -> None:
        self.held: dict[tuple[int, int], Cluster] = {}
        for c in clusters:
            tensors = artifact.cluster(c)
            for layer in range(artifact.model.layers):
                self.held[layer, c] = Cluster(artifact.model, tensors, layer, c, dtype)

    def __call__(self, layer: int, rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {c: self.held[layer, c](part) for c, part in rows.items()}


def regroup(
    rows: Tensor, group_TP: Tensor, groups: int, compute: Callable[[Mapping[int, Tensor]], Mapping[int, Tensor]]
) -> Tensor:
    """rows [T, D], group [T, P] -> [T, P, D]: for each row the answer of each of its P groups."""
    order = torch.argsort(group_TP.flatten(), stable=True)
    ends = [0, *torch.bincount(group_TP.flatten(), minlength=groups).cumsum(0).tolist()]
    sorted_rows = rows.index_select(0, order // group_TP.shape[1])
    parts = {c: sorted_rows[start:stop] for c, (start, stop) in enumerate(pairwise(ends)) if stop > start}
    answered = compute(parts)
    out = torch.empty_like(sorted_rows)
    out[order] = torch.cat([answered[c] for c in parts])
    return out.view(*group_TP.shape, -1)
