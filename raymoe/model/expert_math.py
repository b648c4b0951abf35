"""The experts' arithmetic, forward and backward, as one autograd function per layer.

All K experts of a row share a cluster, so the base products are done once per row, and the down
projection, being linear, once per row after the sum over experts:

    a = X base_gate                  b = X base_up                       once per row
    h_k = silu(a + (X gate_in_k) gate_out_k) * (b + (X up_in_k) up_out_k)
    y = (Σ_k g_k h_k) base_down + Σ_k g_k (h_k down_in_k) down_out_k

An exact identity with the sum over independent experts (tests compare both in float64). The work goes
cluster by cluster so that intermediates stay in cache, and expert by expert into slices of buffers
that exist once, so that no weight gradient is zero-filled per expert.

On a CPU, oneDNN compiles a bfloat16 product for each new shape, which costs more than the product: there
parts are padded to a few sizes (`bucket`). Padding rows have weight zero, so they add nothing to any sum.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Span = tuple[int, int]


def spans(counts: list[int]) -> list[Span]:
    """Half-open ranges of consecutive groups of these sizes."""
    ends = list(accumulate(counts, initial=0))
    return list(zip(ends, ends[1:], strict=False))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The autocast type where autocast is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _times(rows: Tensor, weights: Tensor, parts: list[Span], *, transpose: bool = False) -> Tensor:
    """Each part of `rows` times its own matrix: rows [n, I], weights [e, I, J] (or [e, J, I] transposed) -> [n, J]."""
    out = rows.new_empty(rows.shape[0], weights.shape[1 if transpose else 2])
    for e, (start, stop) in enumerate(parts):
        if stop > start:
            torch.mm(rows[start:stop], weights[e].t() if transpose else weights[e], out=out[start:stop])
    return out


def _add_times(out: Tensor, rows: Tensor, weights: Tensor, parts: list[Span], *, transpose: bool = False) -> None:
    """out += each part of `rows` times its own matrix, in place."""
    for e, (start, stop) in enumerate(parts):
        if stop > start:
            out[start:stop].addmm_(rows[start:stop], weights[e].t() if transpose else weights[e])


def _weight_gradient(grad: Tensor, left: Tensor, right: Tensor, parts: list[Span]) -> None:
    """grad[e] = left_eᵀ right_e for each part; grad [e, I, J] may be of a wider type."""
    for e, (start, stop) in enumerate(parts):
        if stop > start:
            grad[e] = left[start:stop].t() @ right[start:stop]


def _sum_pairs(values: Tensor, position: Tensor, weight: Tensor | None = None) -> Tensor:
    """Σ_k weight[n, k] · values[position[n, k]]: pairs [N, J] back to rows [n, J]."""
    return F.embedding_bag(position, values, mode="sum", per_sample_weights=weight)


def bucket(rows: int, x: Tensor) -> int:
    """`rows` rounded up to three significant bits where products are compiled by shape, else as it is."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or rows == 0:
        return rows
    step = max(8, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


def padded(rows: Tensor, size: int) -> Tensor:
    """`rows` [n, ·] with zero rows up to `size`."""
    return rows if rows.shape[0] == size else F.pad(rows, (0, 0, 0, size - rows.shape[0]))


class Pairs:
    """The (row, expert) pairs of one cluster, sorted by expert, each expert's part padded to its bucket.

    expert [n, K]: each row's experts, numbered within the cluster; size: experts in the cluster; x: the
    rows that will be computed with. Pairs that pad belong to row 0; rows that pad have pair 0.
    """

    def __init__(self, expert: Tensor, size: int, x: Tensor) -> None:
        n, self.k = expert.shape
        flat = expert.flatten()
        counts = torch.bincount(flat, minlength=size)
        self.counts: list[int] = counts.tolist()
        sizes = [bucket(count, x) for count in self.counts]
        self.parts = spans(sizes)
        order = torch.argsort(flat, stable=True)
        shift = torch.tensor([0, *sizes[:-1]], device=flat.device).cumsum(0) - (counts.cumsum(0) - counts)
        position = torch.empty_like(order)
        position[order] = torch.arange(n * self.k, device=flat.device) + shift[flat[order]]
        self.position = padded(position.view(n, self.k), bucket(n, x))
        """[n padded, K] int64: where each row's pairs stand."""
        self.row = torch.zeros(sum(sizes), dtype=torch.int64, device=flat.device)
        """[N padded] int64: the row of each pair."""
        self.row[position] = torch.arange(n * self.k, device=flat.device) // max(self.k, 1)
        self.real = position

    def spread(self, gate_nK: Tensor) -> Tensor:
        """[n, K] -> [N padded, 1]: each pair's own value, zero where it pads."""
        out = gate_nK.new_zeros(self.row.shape[0], 1)
        out[self.real, 0] = gate_nK.flatten()
        return out


RESIDUALS = ("gate_in", "gate_out", "up_in", "up_out", "down_in", "down_out")


class ClusteredFFN(torch.autograd.Function):
    """Rows sorted by cluster -> the gated sum of each row's experts.

    x [R, D]; gates: for each cluster [n_c, K_c] float32; base_* [c, ·, ·]; residual factors [e, ·, ·]
    with the experts of a cluster consecutive. Returns [R, D] in x's type.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row_parts: list[Span],
        pairs: list[Pairs | None],
        expert_parts: list[Span],
        *tensors: Tensor,
    ) -> Tensor:
        n_gates = sum(p is not None for p in pairs)
        gates, weights = tensors[:n_gates], tensors[n_gates:]
        base_gate, base_up, base_down = (w.to(x.dtype) for w in weights[:3])
        residuals = _joined(*weights[3:], dtype=x.dtype) if n_gates else []
        y = torch.empty_like(x)
        saved: list[Tensor] = []
        for c, (start, stop) in enumerate(row_parts):
            rows, p = x[start:stop], pairs[c]
            if stop == start or (p is not None and p.k == 0):
                y[start:stop] = 0
                continue
            rows = padded(rows, bucket(stop - start, x))
            wide = x.new_empty(2, rows.shape[0], base_gate.shape[2])  # gate and up
            torch.mm(rows, base_gate[c], out=wide[0])
            torch.mm(rows, base_up[c], out=wide[1])
            if p is None:  # no experts beyond the base
                y[start:stop] = (F.silu(wide[0]).mul_(wide[1]) @ base_down[c])[: stop - start]
                saved += [rows, wide]
                continue
            narrow_in, wide_out, down_in, down_out = (r[slice(*expert_parts[c])] for r in residuals)
            gate = padded(gates[c].to(x.dtype), rows.shape[0])
            narrow = _times(rows.index_select(0, p.row), narrow_in, p.parts)
            wide = wide.index_select(1, p.row)
            both = _split(narrow)
            for e, (first, last) in enumerate(p.parts):
                if last > first:
                    wide[:, first:last].baddbmm_(both[:, first:last], wide_out[e])
            h = F.silu(wide[0]).mul_(wide[1])
            hidden = _sum_pairs(h, p.position, gate)
            narrow_down = _times(h, down_in, p.parts)
            answer = _sum_pairs(_times(narrow_down, down_out, p.parts), p.position, gate)
            y[start:stop] = answer.addmm_(hidden, base_down[c])[: stop - start]
            saved += [rows, wide, hidden, narrow, narrow_down, p.spread(gates[c].to(x.dtype))]
        ctx.layout = (row_parts, pairs, expert_parts, weights[0].dtype, [g.dtype for g in gates])
        ctx.save_for_backward(base_gate, base_up, base_down, *residuals, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dy = grads[0].contiguous()
        row_parts, pairs, expert_parts, weight_dtype, gate_dtypes = ctx.layout
        base_gate, base_up, base_down, *rest = ctx.saved_tensors
        residuals = rest[: 4 if gate_dtypes else 0]
        saved = iter(rest[len(residuals) :])
        wider = torch.promote_types(dy.dtype, torch.float32)
        d_bases = [torch.zeros_like(w, dtype=weight_dtype) for w in (base_gate, base_up, base_down)]
        d_residuals = [torch.zeros_like(w, dtype=weight_dtype) for w in residuals]
        d_gates: list[Tensor] = []
        dx = torch.empty_like(dy)
        for c, (start, stop) in enumerate(row_parts):
            p = pairs[c]
            if stop == start or (p is not None and p.k == 0):
                dx[start:stop] = 0
                if p is not None:
                    d_gates.append(dy.new_zeros(stop - start, p.k, dtype=gate_dtypes[c]))
                continue
            rows, wide = next(saved), next(saved)
            dy_rows = padded(dy[start:stop], rows.shape[0])
            active = F.silu(wide[0])
            h = active * wide[1]
            if p is None:
                d_bases[2][c] = h.t() @ dy_rows
                dh = dy_rows @ base_down[c].t()
                d_gate, d_up = torch.ops.aten.silu_backward(dh * wide[1], wide[0]), active.mul_(dh)
                dx_rows = d_gate @ base_gate[c].t()
            else:
                hidden, narrow, narrow_down, pair_gate = (next(saved) for _ in range(4))
                narrow_in, wide_out, down_in, down_out = (r[slice(*expert_parts[c])] for r in residuals)
                d_narrow_in, d_wide_out, d_down_in, d_down_out = (d[slice(*expert_parts[c])] for d in d_residuals)
                # Down: through the base once per row, through the residual once per pair.
                d_bases[2][c] = hidden.t() @ dy_rows
                dh = (dy_rows @ base_down[c].t()).index_select(0, p.row)
                dy_pairs = dy_rows.index_select(0, p.row)
                d_narrow_down = _times(dy_pairs, down_out, p.parts, transpose=True)
                d_pair_gate = (dh * h).sum(1, dtype=wider) + (d_narrow_down * narrow_down).sum(1, dtype=wider)
                d_gates.append(d_pair_gate[p.real].view(-1, p.k).to(gate_dtypes[c]))
                _weight_gradient(d_down_out, narrow_down * pair_gate, dy_pairs, p.parts)
                d_narrow_down *= pair_gate
                _weight_gradient(d_down_in, h, d_narrow_down, p.parts)
                dh *= pair_gate
                _add_times(dh, d_narrow_down, down_in, p.parts, transpose=True)
                # Gate and up together: [2, N, ·].
                d_wide = torch.empty_like(wide)
                torch.mul(active, dh, out=d_wide[1])
                d_wide[0] = torch.ops.aten.silu_backward(dh.mul_(wide[1]), wide[0])
                both, d_both = _split(narrow), torch.empty_like(_split(narrow))
                for e, (first, last) in enumerate(p.parts):
                    if last > first:
                        d_wide_out[e] = both[:, first:last].transpose(1, 2) @ d_wide[:, first:last]
                        d_both[:, first:last] = d_wide[:, first:last] @ wide_out[e].transpose(1, 2)
                d_narrow = d_both.transpose(0, 1).reshape(narrow.shape)
                _weight_gradient(d_narrow_in, rows.index_select(0, p.row), d_narrow, p.parts)
                dx_rows = _sum_pairs(_times(d_narrow, narrow_in, p.parts, transpose=True), p.position)
                d_gate, d_up = (_sum_pairs(d, p.position) for d in d_wide)
                dx_rows.addmm_(d_gate, base_gate[c].t())
            dx[start:stop] = dx_rows.addmm_(d_up, base_up[c].t())[: stop - start]
            d_bases[0][c] = rows.t() @ d_gate
            d_bases[1][c] = rows.t() @ d_up
        return (dx, None, None, None, *d_gates, *d_bases, *_parted(*d_residuals))


def _joined(
    gate_in: Tensor,
    gate_out: Tensor,
    up_in: Tensor,
    up_out: Tensor,
    down_in: Tensor,
    down_out: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The residual factors as the products use them: gate and up side by side, so that one product does both."""
    narrow_in = torch.cat((gate_in.to(dtype), up_in.to(dtype)), 2)  # [e, D, 2W]
    wide_out = torch.stack((gate_out.to(dtype), up_out.to(dtype)), 1)  # [e, 2, W, F]
    return [narrow_in, wide_out, down_in.to(dtype), down_out.to(dtype)]


def _parted(*joined: Tensor) -> list[Tensor]:
    """The inverse of `_joined`, in the order of `RESIDUALS`."""
    if not joined:
        return []
    narrow_in, wide_out, down_in, down_out = joined
    gate_in, up_in = narrow_in.chunk(2, 2)
    gate_out, up_out = wide_out.unbind(1)
    return [gate_in, gate_out, up_in, up_out, down_in, down_out]


def _split(narrow: Tensor) -> Tensor:
    """[N, 2W] -> [2, N, W] as a view: the gate's part and the up's."""
    return narrow.view(narrow.shape[0], 2, -1).transpose(0, 1)


class FlatFFN(torch.autograd.Function):
    """Independent SwiGLU experts, the baseline: rows [R, D] sorted by expert, `counts` each; gate/up [e, D, F], down [e, F, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
        gate, up, down = (w.to(x.dtype) for w in weights)
        expert = torch.repeat_interleave(torch.tensor(counts, device=x.device)).unsqueeze(1)
        p = Pairs(expert, len(counts), x)
        rows = x.index_select(0, p.row) if x.shape[0] else x
        a, b = _times(rows, gate, p.parts), _times(rows, up, p.parts)
        y = _times(F.silu(a).mul_(b), down, p.parts)
        ctx.layout = (p, [w.dtype for w in weights])
        ctx.save_for_backward(rows, gate, up, down, a, b)
        return y.index_select(0, p.real)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        p, types = ctx.layout
        rows, gate, up, down, a, b = ctx.saved_tensors
        dy = rows.new_zeros(rows.shape).index_copy_(0, p.real, grads[0])
        d_gate, d_up, d_down = (torch.zeros_like(w, dtype=t) for w, t in zip((gate, up, down), types, strict=True))
        active = F.silu(a)
        _weight_gradient(d_down, active * b, dy, p.parts)
        dh = _times(dy, down, p.parts, transpose=True)
        db = active.mul_(dh)
        da = torch.ops.aten.silu_backward(dh.mul_(b), a)
        _weight_gradient(d_gate, rows, da, p.parts)
        _weight_gradient(d_up, rows, db, p.parts)
        dx = _times(da, gate, p.parts, transpose=True)
        _add_times(dx, db, up, p.parts, transpose=True)
        return dx.index_select(0, p.real), None, d_gate, d_up, d_down
