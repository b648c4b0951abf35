"""A cluster in this process: rows in, rows out.

The interface of the trunk is `ClusterCompute`: one call with the rows of all active clusters of a layer. The callee
selects the experts (stage 2), so that a call carries rows only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.config import ModelSection
from raymoe.model.dispatch import sort_by
from raymoe.model.expert_math import padded
from raymoe.model.leaves import BASES, PRIVATE, base_leaves, member_leaves
from raymoe.model.router import route
from raymoe.serving.engine import native
from raymoe.storage.artifact import Artifact
from raymoe.storage.artifact_layout import cluster_file

ClusterCompute = Callable[[int, Mapping[int, Tensor]], Mapping[int, Tensor]]
"""(layer, active cluster -> rows [R, D]) -> cluster -> outputs [R, D], in the type of the rows. One call has all active
clusters of a layer. Calls are pure: another process may repeat them."""


def few_sizes(rows: int) -> int:
    """Round `rows` up to 4, 6, 8, 12, 16, 24, ...: products have few shapes, and a row does not depend on its neighbors."""
    power = 1 << max(2, (rows - 1).bit_length())
    return power * 3 // 4 if power > 4 and rows <= power * 3 // 4 else power


class Product:
    """rows [n, I] -> rows @ weight [n, J], for a weight [I, J] whose layout is prepared once.

    oneDNN's own layout takes half the time of a plain product of few rows, which prepares the layout in each call.
    Without oneDNN, the plain product is used.
    """

    def __init__(self, weight: Tensor) -> None:
        self.packed = self.packs(weight.dtype)
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), few_sizes(16))
        self.weight = weight

    @staticmethod
    def packs(dtype: torch.dtype) -> bool:
        """Whether oneDNN supports packed products of this type on this machine."""
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

    With native kernels, `native` holds the weights. Otherwise the factors of all experts are concatenated: `wide_in`
    [D, 2F + 2*e*W] has both bases and all first factors, `down` [F + e*W, D] the base and all last factors. Between
    them, `wide_out` [2, e*W, F] and `down_in` [F, e*W] apply to (row, expert) pairs. Narrow values of experts that a
    row did not select are zeroed: for the few rows of a step this is faster than a loop over experts, which training
    uses.

    The base and private experts are one wide network: `wide_in` [D, 2(F + e*W)] has the gates, then the ups, and
    `down` [F + e*W, D] the rest. Hidden values of experts that a row did not select are zeroed.
    """

    def __init__(
        self, model: ModelSection, tensors: Mapping[str, Tensor], layer: int, c: int, dtype: torch.dtype
    ) -> None:
        prefix = f"layers.{layer}.experts."
        ids = sorted({int(key[len(prefix) :].split(".")[0]) for key in tensors if key.startswith(prefix)})
        self.private = model.expert_kind == "private"
        self.w = model.private_width if self.private else model.residual_width
        self.f, self.e, self.k = model.cluster_base_width, len(ids), min(model.experts_per_token, len(ids))

        def stack(name: str) -> Tensor:
            return torch.stack([tensors[f"{prefix}{e}.{name}"] for e in ids])

        base = {name: tensors[f"layers.{layer}.clusters.{c}.{name}"] for name in base_leaves(model)}
        names = ("router", "bias", *member_leaves(model)) if self.e else ()
        members = {name: stack(name) for name in names}
        self.native = None
        if native.library():
            self.native = native.Experts(model, base, members, dtype)
            return
        if members:
            self.router, self.bias = members["router"].t().contiguous(), members["bias"]
        (self._lay_out_private if self.private else self._lay_out_residuals)(base, members, dtype)

    def _lay_out_residuals(self, base: Mapping[str, Tensor], members: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        wide_in, down = [base["base_gate"], base["base_up"]], [base["base_down"]]
        if members:
            first = torch.stack((members["gate_in"], members["up_in"]))  # [2, e, D, W]
            wide_in.append(first.permute(2, 0, 1, 3).flatten(1))
            second = torch.stack((members["gate_out"], members["up_out"]))  # [2, e, W, F]
            self.wide_out = second.flatten(1, 2).to(dtype)
            self.down_in = members["down_in"].transpose(0, 1).flatten(1).to(dtype)
            down.append(members["down_out"].flatten(0, 1))
        self.wide_in, self.down = Product(torch.cat(wide_in, 1).to(dtype)), Product(torch.cat(down).to(dtype))

    def _lay_out_private(self, base: Mapping[str, Tensor], members: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        gates, ups, downs = ([base[name]] if base else [] for name in BASES)
        if members:
            gate, up, down = (members[name].flatten(0, 1) for name in PRIVATE)  # [e*W, D]
            gates, ups, downs = [*gates, gate.t()], [*ups, up.t()], [*downs, down]
        if downs:
            self.wide_in = Product(torch.cat([*gates, *ups], 1).to(dtype))
            self.down = Product(torch.cat(downs).to(dtype))

    @property
    def bytes(self) -> int:
        """Size of the tensors in bytes, padding included."""
        if self.native:
            return self.native.bytes
        weights = [value.weight if isinstance(value, Product) else value for value in vars(self).values()]
        return sum(
            torch.ops.mkldnn._nbytes(weight) if weight.is_mkldnn else weight.nbytes
            for weight in weights
            if isinstance(weight, Tensor)
        )

    def __call__(self, x: Tensor) -> Tensor:
        return compute_clusters([self], [x])[0]

    def compute_private(self, x: Tensor) -> Tensor:
        """Return the base's and private experts' output for rows x [R, D] without native kernels; zeros without both."""
        if not self.f and not self.e:
            return torch.zeros_like(x)
        rows = padded(x, few_sizes(x.shape[0]))
        a, b = self.wide_in(rows).chunk(2, 1)
        hidden = F.silu(a).mul_(b)
        if self.e:
            choice = route(rows, self.router.t(), self.bias, self.k, gate="selected")
            weights = hidden.new_zeros(rows.shape[0], self.e)
            weights.scatter_(1, choice.index_TK, choice.weight_TK.to(hidden.dtype))
            hidden[:, self.f :].unflatten(1, (self.e, self.w)).mul_(weights.unsqueeze(2))
        return self.down(hidden)[: x.shape[0]]


def compute_clusters(clusters: Sequence[Cluster], rows: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of clusters of one layer for their rows [R, D], bit-equal to separate calls.

    With few rows, small operations take more time than products. Only products run cluster by cluster; the operations
    between them run once for the rows of all clusters. A cluster with fewer experts than another leaves columns unused.
    Without native kernels, clusters of private experts are computed one by one.
    """
    if clusters[0].native:
        return native.compute_clusters([c.native for c in clusters if c.native], rows)
    if clusters[0].private:
        return [c.compute_private(part) for c, part in zip(clusters, rows, strict=True)]
    parts = [padded(part, few_sizes(part.shape[0])) for part in rows]
    if not clusters[0].w:
        hidden = [c.wide_in(part).chunk(2, 1) for c, part in zip(clusters, parts, strict=True)]
        outputs = [c.down(F.silu(gate).mul_(up)) for c, (gate, up) in zip(clusters, hidden, strict=True)]
        return [y[: x.shape[0]] for y, x in zip(outputs, rows, strict=True)]
    if not all(c.e for c in clusters):
        able = [i for i, c in enumerate(clusters) if c.e]
        found = compute_clusters([clusters[i] for i in able], [rows[i] for i in able]) if able else []
        outputs = {i: y for i, y in zip(able, found, strict=True)}
        return [outputs[i] if i in outputs else torch.zeros_like(x) for i, x in enumerate(rows)]

    sizes = [part.shape[0] for part in parts]
    n, k, e, w, f = sum(sizes), max(c.k for c in clusters), max(c.e for c in clusters), clusters[0].w, clusters[0].f
    spans = [slice(*span) for span in pairwise(accumulate(sizes, initial=0))]
    pair_spans = [slice(k * span.start, k * span.stop) for span in spans]

    # Stage 2. Unused columns have a score of minus infinity, hence no weight.
    logits = _level([p.to(c.router.dtype) @ c.router for c, p in zip(clusters, parts, strict=True)], e, -torch.inf)
    bias = _level([c.bias.expand(size, c.e) for c, size in zip(clusters, sizes, strict=True)], e, -torch.inf)
    index = bias.add_(logits).topk(k).indices
    weight = logits.gather(1, index).softmax(1) if k > 1 else logits.softmax(1).gather(1, index)
    gate_NK1 = weight.to(parts[0].dtype).unsqueeze(2)
    chosen_NKE = gate_NK1.new_zeros(n, k, e).scatter_(2, index.unsqueeze(2), 1.0)

    # Gate and up: bases once per row, residuals once per (row, expert).
    first = [c.wide_in(p) for c, p in zip(clusters, parts, strict=True)]
    narrow = _level([v[:, 2 * f :].view(-1, 2, c.e * w) for c, v in zip(clusters, first, strict=True)], e * w)
    pairs = narrow.new_empty(2, n, k, e, w)
    torch.mul(narrow.view(n, 2, 1, e, w).transpose(0, 1), chosen_NKE.unsqueeze(3), out=pairs)
    pairs = pairs.view(2, n * k, e * w)
    wide = torch.cat([v[:, : 2 * f] for v in first]).view(n, 2, 1, f).transpose(0, 1)
    wide = wide.expand(2, n, k, f).reshape(2, n * k, f)
    for c, span in zip(clusters, pair_spans, strict=True):
        wide[:, span].baddbmm_(pairs[:, span, : c.e * w], c.wide_out)
    h = F.silu(wide[0]).mul_(wide[1])

    # The down projection is linear: once per row, after the sum over its experts.
    back = _level([h[span] @ c.down_in for c, span in zip(clusters, pair_spans, strict=True)], e * w)
    back = back.view(n, k, e, w).mul_((chosen_NKE * gate_NK1).unsqueeze(3)).sum(1)
    hidden = torch.cat(((h.view(n, k, f) * gate_NK1).sum(1), back.view(n, e * w)), 1)
    outputs = [c.down(hidden[span, : f + c.e * w]) for c, span in zip(clusters, spans, strict=True)]
    return [y[: x.shape[0]] for y, x in zip(outputs, rows, strict=True)]


def _level(parts: Sequence[Tensor], width: int, value: float = 0.0) -> Tensor:
    """Concatenate the rows of all parts, padded with `value` to `width` columns."""
    return torch.cat([p if p.shape[-1] == width else F.pad(p, (0, width - p.shape[-1]), value=value) for p in parts])


class LocalClusters:
    """`ClusterCompute` over clusters in this process, converted once to the compute type."""

    def __init__(self, artifact: Artifact, clusters: Iterable[int], dtype: torch.dtype) -> None:
        self.clusters: dict[tuple[int, int], Cluster] = {}
        for c in clusters:
            tensors = artifact.cluster(c)
            for layer in range(artifact.model.layers):
                self.clusters[layer, c] = Cluster(artifact.model, tensors, layer, c, dtype)

    def __call__(self, layer: int, rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        outputs = compute_clusters([self.clusters[layer, c] for c in rows], list(rows.values()))
        return dict(zip(rows, outputs, strict=True))


def cluster_sizes(artifact: Artifact, dtype: torch.dtype) -> dict[int, int]:
    """Return the bytes of each cluster over all layers as `Cluster` stores it in the compute type. Reads no weight.

    Layers with equally many experts take equally many bytes. One of each is built from uninitialized memory, since
    only oneDNN defines its padding.
    """
    numbers = {cluster_file(c): c for c in range(artifact.model.n_clusters)}
    shapes: defaultdict[tuple[int, int], dict[str, tuple[int, ...]]] = defaultdict(dict)
    for place in artifact.places:
        if place.file in numbers:
            shapes[int(place.key.split(".")[1]), numbers[place.file]][place.key] = place.shape
    sizes, known = dict.fromkeys(numbers.values(), 0), dict[int, int]()
    for (layer, c), held in shapes.items():
        if len(held) not in known:
            empty = {key: torch.empty(shape) for key, shape in held.items()}
            known[len(held)] = Cluster(artifact.model, empty, layer, c, dtype).bytes
        sizes[c] += known[len(held)]
    return sizes


def by_cluster(
    rows: Tensor, group_TP: Tensor, groups: int, compute: Callable[[Mapping[int, Tensor]], Mapping[int, Tensor]]
) -> Tensor:
    """rows [T, D], group [T, P] -> [T, P, D]: the output of each of the P groups of each row."""
    order, inverse, counts = sort_by(group_TP.flatten(), groups)
    parts = rows.index_select(0, order // group_TP.shape[1]).split(counts.tolist())
    active = {c: part for c, part in enumerate(parts) if part.shape[0]}
    outputs_by_group = compute(active)
    return torch.cat([outputs_by_group[c] for c in active]).index_select(0, inverse).view(*group_TP.shape, -1)
