"""The experts' arithmetic, forward and backward, as one autograd function per layer.

All K experts of a row share a cluster, so the base products are done once per row, and the down
projection, being linear, once per row after the sum over experts:

    a = X base_gate                  b = X base_up                       once per row
    h_k = silu(a + (X gate_in_k) gate_out_k) * (b + (X up_in_k) up_out_k)
    y = (Σ_k g_k h_k) base_down + Σ_k g_k (h_k down_in_k) down_out_k

An exact identity with the sum over independent experts (tests compare both in float64). The work goes
cluster by cluster so that intermediates stay in cache, and expert by expert into slices of buffers
that exist once, so that nothing is padded and no weight gradient is zero-filled per expert.
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


def _times(rows: Tensor, weights: Tensor, parts: list[Span], out_width: int, *, transpose: bool = False) -> Tensor:
    """Each part of `rows` times its own matrix: rows [n, I], weights [e, I, J] (or [e, J, I] transposed) -> [n, J]."""
    out = rows.new_empty(rows.shape[0], out_width)
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


class Pairs:
    """The (row, expert) pairs of one cluster, sorted by expert.

    expert [n, K]: each row's experts, numbered within the cluster; size: experts in the cluster.
    """

    def __init__(self, expert: Tensor, size: int) -> None:
        n, self.k = expert.shape
        flat = expert.flatten()
        order = torch.argsort(flat, stable=True)
        self.row = order // max(self.k, 1)
        """[N] int64: the row of each pair."""
        position = torch.empty_like(order)
        position[order] = torch.arange(order.numel(), device=order.device)
        self.position = position.view(n, self.k)
        """[n, K] int64: where each row's pairs stand."""
        self.order = order
        self.counts: list[int] = torch.bincount(flat, minlength=size).tolist()
        self.parts = spans(self.counts)


RESIDUALS = ("gate_in", "gate_out", "up_in", "up_out", "down_in", "down_out")


class ClusteredFFN(torch.autograd.Function):
    """Rows sorted by cluster -> the gated sum of each row's experts.

    x [R, D]; gates: for each cluster [n_c, K_c] float32; base_* [c, ·, ·]; residual factors [e, ·, ·]
    with the experts of a cluster consecutive. Returns [R, D] in x's type.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, row_parts: list[Span], pairs: list[Pairs | None], expert_parts: list[Span], *tensors: Tensor
    ) -> Tensor:
        n_gates = sum(p is not None for p in pairs)
        gates, weights = tensors[:n_gates], tensors[n_gates:]
        base_gate, base_up, base_down, *residuals = (w.to(x.dtype) for w in weights)
        y = torch.empty_like(x)
        saved: list[Tensor] = []
        for c, (start, stop) in enumerate(row_parts):
            rows, p = x[start:stop], pairs[c]
            if stop == start or (p is not None and p.k == 0):
                y[start:stop] = 0
                continue
            a, b = rows @ base_gate[c], rows @ base_up[c]
            if p is None:  # no experts beyond the base
                hidden = F.silu(a) * b
                torch.mm(hidden, base_down[c], out=y[start:stop])
                saved += [a, b]
                continue
            first, last = expert_parts[c]
            gate_in, gate_out, up_in, up_out, down_in, down_out = (r[first:last] for r in residuals)
            width = gate_in.shape[2]
            gate = gates[c].to(x.dtype)
            pair_rows = rows.index_select(0, p.row)
            narrow_gate = _times(pair_rows, gate_in, p.parts, width)
            narrow_up = _times(pair_rows, up_in, p.parts, width)
            a, b = a.index_select(0, p.row), b.index_select(0, p.row)
            _add_times(a, narrow_gate, gate_out, p.parts)
            _add_times(b, narrow_up, up_out, p.parts)
            h = F.silu(a).mul_(b)
            hidden = _sum_pairs(h, p.position, gate)
            narrow_down = _times(h, down_in, p.parts, width)
            answer = _times(narrow_down, down_out, p.parts, x.shape[1])
            torch.addmm(_sum_pairs(answer, p.position, gate), hidden, base_down[c], out=y[start:stop])
            saved += [a, b, hidden, narrow_gate, narrow_up, narrow_down, gate]
        ctx.layout = (row_parts, pairs, expert_parts, [w.dtype for w in weights], [g.dtype for g in gates])
        ctx.save_for_backward(x, base_gate, base_up, base_down, *residuals, *saved)
        ctx.n_residuals = len(residuals)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dy = grads[0].contiguous()
        row_parts, pairs, expert_parts, weight_types, gate_types = ctx.layout
        x, base_gate, base_up, base_down, *rest = ctx.saved_tensors
        residuals, rest = rest[: ctx.n_residuals], iter(rest[ctx.n_residuals :])
        weights = (base_gate, base_up, base_down, *residuals)
        d_weights = [torch.zeros_like(w, dtype=t) for w, t in zip(weights, weight_types, strict=True)]
        d_base_gate, d_base_up, d_base_down, *d_residuals = d_weights
        d_gates: list[Tensor] = []
        wide = torch.promote_types(x.dtype, torch.float32)
        dx = torch.empty_like(x)
        for c, (start, stop) in enumerate(row_parts):
            p = pairs[c]
            if stop == start or (p is not None and p.k == 0):
                dx[start:stop] = 0
                if p is not None:
                    d_gates.append(x.new_zeros(p.position.shape, dtype=gate_types[c]))
                continue
            rows, dy_rows = x[start:stop], dy[start:stop]
            if p is None:
                a, b = next(rest), next(rest)
                active = F.silu(a)
                d_base_down[c] = (active * b).t() @ dy_rows
                dh = dy_rows @ base_down[c].t()
                db = dh * active
                da = torch.ops.aten.silu_backward(dh.mul_(b), a)
                dx_rows = torch.mm(da, base_gate[c].t(), out=dx[start:stop])
            else:
                a, b, hidden, narrow_gate, narrow_up, narrow_down, gate = (next(rest) for _ in range(7))
                first, last = expert_parts[c]
                gate_in, gate_out, up_in, up_out, down_in, down_out = (r[first:last] for r in residuals)
                dg_in, dg_out, du_in, du_out, dd_in, dd_out = (d[first:last] for d in d_residuals)
                width = gate_in.shape[2]
                pair_gate = gate.flatten().index_select(0, p.order).unsqueeze(1)
                active = F.silu(a)
                h = active * b
                # Down: through the base once per row, through the residual once per pair.
                d_base_down[c] = hidden.t() @ dy_rows
                d_hidden = (dy_rows @ base_down[c].t()).index_select(0, p.row)
                dy_pairs = dy_rows.index_select(0, p.row)
                d_narrow = _times(dy_pairs, down_out, p.parts, width, transpose=True)
                d_pair_gate = (d_hidden * h).sum(1, dtype=wide) + (d_narrow * narrow_down).sum(1, dtype=wide)
                _weight_gradient(dd_out, narrow_down * pair_gate, dy_pairs, p.parts)
                d_narrow *= pair_gate
                _weight_gradient(dd_in, h, d_narrow, p.parts)
                dh = d_hidden.mul_(pair_gate)
                _add_times(dh, d_narrow, down_in, p.parts, transpose=True)
                # Gate and up.
                db_pairs = active.mul_(dh)
                da_pairs = torch.ops.aten.silu_backward(dh.mul_(b), a)
                _weight_gradient(dg_out, narrow_gate, da_pairs, p.parts)
                _weight_gradient(du_out, narrow_up, db_pairs, p.parts)
                d_narrow_gate = _times(da_pairs, gate_out, p.parts, width, transpose=True)
                d_narrow_up = _times(db_pairs, up_out, p.parts, width, transpose=True)
                pair_rows = rows.index_select(0, p.row)
                _weight_gradient(dg_in, pair_rows, d_narrow_gate, p.parts)
                _weight_gradient(du_in, pair_rows, d_narrow_up, p.parts)
                dx_pairs = _times(d_narrow_gate, gate_in, p.parts, x.shape[1], transpose=True)
                _add_times(dx_pairs, d_narrow_up, up_in, p.parts, transpose=True)
                da, db = _sum_pairs(da_pairs, p.position), _sum_pairs(db_pairs, p.position)
                d_gates.append(d_pair_gate.index_select(0, p.position.flatten()).view_as(p.position).to(gate_types[c]))
                dx_rows = torch.addmm(_sum_pairs(dx_pairs, p.position), da, base_gate[c].t(), out=dx[start:stop])
            dx_rows.addmm_(db, base_up[c].t())
            d_base_gate[c] = rows.t() @ da
            d_base_up[c] = rows.t() @ db
        return (dx, None, None, None, *d_gates, *d_weights)


class FlatFFN(torch.autograd.Function):
    """Independent SwiGLU experts, the baseline: rows [R, D] sorted by expert, gate/up [e, D, F], down [e, F, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: list[Span], *weights: Tensor) -> Tensor:
        gate, up, down = (w.to(x.dtype) for w in weights)
        a = _times(x, gate, parts, gate.shape[2])
        b = _times(x, up, parts, up.shape[2])
        y = _times(F.silu(a).mul_(b), down, parts, x.shape[1])
        ctx.layout = (parts, [w.dtype for w in weights])
        ctx.save_for_backward(x, gate, up, down, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dy = grads[0].contiguous()
        parts, types = ctx.layout
        x, gate, up, down, a, b = ctx.saved_tensors
        d_gate, d_up, d_down = (torch.zeros_like(w, dtype=t) for w, t in zip((gate, up, down), types, strict=True))
        active = F.silu(a)
        _weight_gradient(d_down, active * b, dy, parts)
        dh = _times(dy, down, parts, a.shape[1], transpose=True)
        db = active.mul_(dh)
        da = torch.ops.aten.silu_backward(dh.mul_(b), a)
        _weight_gradient(d_gate, x, da, parts)
        _weight_gradient(d_up, x, db, parts)
        dx = _times(da, gate, parts, x.shape[1], transpose=True)
        _add_times(dx, db, up, parts, transpose=True)
        return dx, None, d_gate, d_up, d_down
