"""What a cluster does for the trunk, rows in and rows out, when its weights are in this process.

The trunk only knows `ClusterCompute`: one call with the rows of all active clusters of a layer. Whoever
answers chooses the experts (stage 2), so that a call carries rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.config import ModelSection
from raymoe.model.dispatch import sort_by
from raymoe.model.fused import padded
from raymoe.model.router import route
from raymoe.storage.export import Artifact

ClusterCompute = Callable[[int, Mapping[int, Tensor]], Mapping[int, Tensor]]
"""(layer, active cluster -> rows [R, D]) -> cluster -> answers [R, D], in the rows' type. All active clusters
of a layer come in one call, which is pure: it may be made again, elsewhere."""


def few_sizes(rows: int) -> int:
    """`rows` rounded up to 4, 6, 8, 12, 16, 24, …: a product has few shapes, and a row's does not depend on its neighbours."""
    power = 1 << max(2, (rows - 1).bit_length())
    return power * 3 // 4 if power > 4 and rows <= power * 3 // 4 else power


class Product:
    """rows [n, I] -> rows @ weight [n, J], for a weight [I, J] that is laid out for it once.

    oneDNN's own layout takes half the time of a plain product of few rows, which lays the weight out anew each
    time. Where there is none the plain product does.
    """

    def __init__(self, weight: Tensor) -> None:
        self.packed = self.packs(weight.dtype)
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), few_sizes(16))
        self.weight = weight

    @staticmethod
    def packs(dtype: torch.dtype) -> bool:
        """Whether this machine's oneDNN has such products."""
        return torch.backends.mkldnn.is_available() and (
            dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )

    def __call__(self, rows: Tensor) -> Tensor:
        n = rows.shape[0]
        rows = padded(rows, few_sizes(n))
        if not self.packed:
            return (rows @ self.weight)[:n]
        return torch.ops.mkldnn._linear_pointwise(rows, self.weight, None, "none", [], "")[:n]


class Cluster:
    """One cluster of one layer in the compute type: (x [R, D]) -> [R, D].

    The factors of all its experts rest side by side: `wide_in` [D, 2F + e·2W] is both bases and every first
    factor, `down` [F + e·W, D] the base and every last one. Between them, `wide_out` [2, e·W, F] and `down_in`
    [F, e·W] are for (row, expert) pairs. Narrow values of experts that a row did not choose are zeroed: for the
    rows of a step that takes less time than going expert by expert, as training does with its thousands.
    """

    def __init__(
        self, model: ModelSection, tensors: Mapping[str, Tensor], layer: int, c: int, dtype: torch.dtype
    ) -> None:
        prefix = f"layers.{layer}.experts."
        ids = sorted({int(key[len(prefix) :].split(".")[0]) for key in tensors if key.startswith(prefix)})
        self.f, self.w, self.e = model.d_expert, model.residual_width, len(ids)
        self.k = min(model.experts_per_token, self.e)
        base = f"layers.{layer}.clusters.{c}.base_"
        wide_in, down = [tensors[base + "gate"], tensors[base + "up"]], [tensors[base + "down"]]
        if self.w and self.e:

            def stack(name: str) -> Tensor:
                return torch.stack([tensors[f"{prefix}{e}.{name}"] for e in ids])

            self.router, self.bias = stack("router"), stack("bias")
            first = torch.stack((stack("gate_in"), stack("up_in")), 1)  # [e, 2, D, W]
            wide_in.append(first.permute(2, 0, 1, 3).flatten(1))
            second = torch.stack((stack("gate_out"), stack("up_out")))  # [2, e, W, F]
            self.wide_out = second.flatten(1, 2).to(dtype)
            self.down_in = stack("down_in").transpose(0, 1).flatten(1).to(dtype)
            down.append(stack("down_out").flatten(0, 1))
        self.wide_in, self.down = Product(torch.cat(wide_in, 1).to(dtype)), Product(torch.cat(down).to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        rows = padded(x, few_sizes(x.shape[0]))
        r, k, e, w, f = rows.shape[0], self.k, self.e, self.w, self.f
        if not w:
            gate, up = self.wide_in(rows).chunk(2, 1)
            return self.down(F.silu(gate).mul_(up))[: x.shape[0]]
        if not e:
            return torch.zeros_like(x)
        choice = route(rows, self.router, self.bias, k, over_selected=True)
        gate_RK, chosen_RKE = choice.weight.to(x.dtype), F.one_hot(choice.index, e).to(x.dtype)
        wide, narrow = self.wide_in(rows).split((2 * f, 2 * e * w), 1)
        pairs = narrow.view(r, 1, e, 2, w) * chosen_RKE[..., None, None]
        pairs = pairs.permute(3, 0, 1, 2, 4).reshape(2, r * k, e * w)
        gate, up = wide.view(r, 2, f).transpose(0, 1).repeat_interleave(k, 1).baddbmm_(pairs, self.wide_out)
        h = F.silu(gate).mul_(up)
        hidden = (gate_RK.unsqueeze(1) @ h.view(r, k, f)).squeeze(1)
        back = (h @ self.down_in).view(r, k, e, w) * (chosen_RKE * gate_RK[..., None])[..., None]
        return self.down(torch.cat((hidden, back.sum(1).flatten(1)), 1))[: x.shape[0]]


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


def by_cluster(
    rows: Tensor, group_TP: Tensor, groups: int, compute: Callable[[Mapping[int, Tensor]], Mapping[int, Tensor]]
) -> Tensor:
    """rows [T, D], group [T, P] -> [T, P, D]: for each row the answer of each of its P groups."""
    order, inverse, counts = sort_by(group_TP.flatten(), groups)
    parts = rows.index_select(0, order // group_TP.shape[1]).split(counts.tolist())
    active = {c: part for c, part in enumerate(parts) if part.shape[0]}
    answered = compute(active)
    return torch.cat([answered[c] for c in active]).index_select(0, inverse).view(*group_TP.shape, -1)
