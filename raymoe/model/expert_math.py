"""The experts' arithmetic, forward and backward, as one autograd function per layer.

All K experts of a row share a cluster. The base products are done once per row; the down projection
is linear, so it is done once per row after the sum over experts:

    a = X base_gate                  b = X base_up                       once per row
    h_k = silu(a + (X gate_in_k) gate_out_k) * (b + (X up_in_k) up_out_k)
    y = (Σ_k g_k h_k) base_down + Σ_k g_k (h_k down_in_k) down_out_k

This is an exact identity with the sum over independent experts (tests compare both in float64). The work
goes cluster by cluster so that intermediates stay in the cache, and expert by expert into slices of
preallocated buffers, so that no weight gradient is zero-filled per expert.

On a CPU, oneDNN compiles a bfloat16 product for each new shape, which costs more than the product. There,
row counts are padded to a few sizes (`bucket`). Padding rows have weight zero and add nothing to any sum.

Suffixes: R rows of a cluster, N (row, expert) pairs sorted by expert, c and e local clusters and members.
`2` marks gate and up side by side: `wide_2NF`, `narrow_N2W`. Both R and N count the padding.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Span = tuple[int, int]


def spans(counts: list[int]) -> list[Span]:
    """Return the half-open ranges of consecutive groups of these sizes."""
    ends = list(accumulate(counts, initial=0))
    return list(zip(ends, ends[1:], strict=False))


def compute_dtype(x_TD: Tensor) -> torch.dtype:
    """Return the autocast type where autocast is on, else the type of x."""
    kind = x_TD.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_TD.dtype


def times(rows_NI: Tensor, weights_eIJ: Tensor, parts: list[Span], *, transpose: bool = False) -> Tensor:
    """Multiply each part of the rows by its own matrix: [N, J]. With `transpose` the weights are [e, J, I]."""
    out_NJ = rows_NI.new_empty(rows_NI.shape[0], weights_eIJ.shape[1 if transpose else 2])
    for e, (start, stop) in enumerate(parts):
        if stop > start:
            weight_IJ = weights_eIJ[e].t() if transpose else weights_eIJ[e]
            torch.mm(rows_NI[start:stop], weight_IJ, out=out_NJ[start:stop])
    return out_NJ


def add_times(
    out_NJ: Tensor, rows_NI: Tensor, weights_eIJ: Tensor, parts: list[Span], *, transpose: bool = False
) -> None:
    """Add the products of `times`, in place."""
    for e, (start, stop) in enumerate(parts):
        if stop > start:
            out_NJ[start:stop].addmm_(rows_NI[start:stop], weights_eIJ[e].t() if transpose else weights_eIJ[e])


def weight_gradient(grad_eIJ: Tensor, left_NI: Tensor, right_NJ: Tensor, parts: list[Span]) -> None:
    """Set grad[e] = left_eᵀ right_e for each part. The gradient may have a wider type."""
    for e, (start, stop) in enumerate(parts):
        if stop > start:
            grad_eIJ[e] = left_NI[start:stop].t() @ right_NJ[start:stop]


def sum_pairs(values_NJ: Tensor, position_RK: Tensor, weight_RK: Tensor | None = None) -> Tensor:
    """Sum pairs back to rows: Σ_k weight[r, k] · values[position[r, k]], [R, J]."""
    return F.embedding_bag(position_RK, values_NJ, mode="sum", per_sample_weights=weight_RK)


def bucket(rows: int, x_TD: Tensor) -> int:
    """Round a row count up to three significant bits where products are compiled by shape; else return it."""
    if x_TD.device.type != "cpu" or x_TD.dtype != torch.bfloat16 or rows == 0:
        return rows
    step = max(8, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


def padded(rows_RD: Tensor, size: int) -> Tensor:
    """Append zero rows up to `size`."""
    return rows_RD if rows_RD.shape[0] == size else F.pad(rows_RD, (0, 0, 0, size - rows_RD.shape[0]))


class Pairs:
    """The (row, expert) pairs of one cluster, sorted by expert, each expert's part padded to its bucket.

    expert_RK: the experts of each row, numbered within the cluster. size: experts in the cluster. x_RD: the
    rows of the computation. Padding pairs refer to row 0; padding rows refer to pair 0.
    """

    def __init__(self, expert_RK: Tensor, size: int, x_RD: Tensor) -> None:
        n, self.k = expert_RK.shape
        self.expert_RK = expert_RK
        flat_N = expert_RK.flatten()
        counts_e = torch.bincount(flat_N, minlength=size)
        self.counts: list[int] = counts_e.tolist()
        sizes = [bucket(count, x_RD) for count in self.counts]
        self.parts = spans(sizes)
        order_N = torch.argsort(flat_N, stable=True)
        starts_e = torch.tensor([0, *sizes[:-1]], device=flat_N.device).cumsum(0)
        shift_e = starts_e - (counts_e.cumsum(0) - counts_e)
        position_N = torch.empty_like(order_N)
        position_N[order_N] = torch.arange(n * self.k, device=flat_N.device) + shift_e[flat_N[order_N]]
        self.position_RK = padded(position_N.view(n, self.k), bucket(n, x_RD))
        """int64: the positions of each row's pairs; padded."""
        self.row_N = torch.zeros(sum(sizes), dtype=torch.int64, device=flat_N.device)
        """int64: the row of each pair; padded."""
        self.row_N[position_N] = torch.arange(n * self.k, device=flat_N.device) // max(self.k, 1)
        self.real_N = position_N
        """int64: the positions of the pairs that are no padding, in the order of the rows."""

    def spread(self, gate_RK: Tensor) -> Tensor:
        """Return the value of each pair, [N, 1], zero for padding."""
        out_N1 = gate_RK.new_zeros(self.row_N.shape[0], 1)
        out_N1[self.real_N, 0] = gate_RK.flatten()
        return out_N1


class _Bases(NamedTuple):
    """The base of one cluster, or its gradient."""

    gate_DF: Tensor
    up_DF: Tensor
    down_FD: Tensor


class _Residuals(NamedTuple):
    """Residual factors of a cluster's members, or their gradients: gate and up joined, one product does both."""

    narrow_in_eD2W: Tensor
    wide_out_e2WF: Tensor
    down_in_eFW: Tensor
    down_out_eWD: Tensor

    @classmethod
    def join(cls, factors: tuple[Tensor, ...], dtype: torch.dtype) -> _Residuals:
        """Join factors in the order of `RESIDUALS`."""
        gate_in, gate_out, up_in, up_out, down_in, down_out = (factor.to(dtype) for factor in factors)
        return cls(torch.cat((gate_in, up_in), 2), torch.stack((gate_out, up_out), 1), down_in, down_out)

    def part(self) -> list[Tensor]:
        """Return the factors in the order of `RESIDUALS`."""
        gate_in, up_in = self.narrow_in_eD2W.chunk(2, 2)
        gate_out, up_out = self.wide_out_e2WF.unbind(1)
        return [gate_in, gate_out, up_in, up_out, self.down_in_eFW, self.down_out_eWD]

    def of(self, members: Span) -> _Residuals:
        """Return views of a range of members."""
        return _Residuals(*(factor[slice(*members)] for factor in self))


def _split(narrow_N2W: Tensor) -> Tensor:
    """Return [2, N, W] as a view: the part of the gate and the part of up."""
    return narrow_N2W.view(narrow_N2W.shape[0], 2, -1).transpose(0, 1)


def _base_products(rows_RD: Tensor, bases: _Bases) -> Tensor:
    """Return the base products of gate and up, [2, R, F]."""
    wide_2RF = rows_RD.new_empty(2, rows_RD.shape[0], bases.gate_DF.shape[1])
    torch.mm(rows_RD, bases.gate_DF, out=wide_2RF[0])
    torch.mm(rows_RD, bases.up_DF, out=wide_2RF[1])
    return wide_2RF


def _forward_base(rows_RD: Tensor, bases: _Bases) -> tuple[Tensor, list[Tensor]]:
    """Compute a cluster without residuals. Returns the output [R, D] and the tensors for the backward."""
    wide_2RF = _base_products(rows_RD, bases)
    return F.silu(wide_2RF[0]).mul_(wide_2RF[1]) @ bases.down_FD, [rows_RD, wide_2RF]


def _forward_members(
    rows_RD: Tensor, gate_RK: Tensor, pairs: Pairs, bases: _Bases, residuals: _Residuals
) -> tuple[Tensor, list[Tensor]]:
    """Compute a cluster with residuals. Returns the output [R, D] and the tensors for the backward."""
    parts = pairs.parts
    wide_2RF = _base_products(rows_RD, bases)
    padded_gate_RK = padded(gate_RK, rows_RD.shape[0])
    narrow_N2W = times(rows_RD.index_select(0, pairs.row_N), residuals.narrow_in_eD2W, parts)
    wide_2NF = wide_2RF.index_select(1, pairs.row_N)
    narrow_2NW = _split(narrow_N2W)
    for e, (first, last) in enumerate(parts):
        if last > first:
            wide_2NF[:, first:last].baddbmm_(narrow_2NW[:, first:last], residuals.wide_out_e2WF[e])
    h_NF = F.silu(wide_2NF[0]).mul_(wide_2NF[1])
    hidden_RF = sum_pairs(h_NF, pairs.position_RK, padded_gate_RK)
    down_NW = times(h_NF, residuals.down_in_eFW, parts)
    y_RD = sum_pairs(times(down_NW, residuals.down_out_eWD, parts), pairs.position_RK, padded_gate_RK)
    y_RD.addmm_(hidden_RF, bases.down_FD)
    return y_RD, [rows_RD, wide_2NF, hidden_RF, narrow_N2W, down_NW, pairs.spread(gate_RK)]


def _backward_base(dy_RD: Tensor, saved: list[Tensor], bases: _Bases, d_bases: _Bases) -> Tensor:
    """Set the gradient of a base and return that of the rows, [R, D]."""
    rows_RD, wide_2RF = saved
    active_RF = F.silu(wide_2RF[0])
    d_bases.down_FD.copy_((active_RF * wide_2RF[1]).t() @ dy_RD)
    dh_RF = dy_RD @ bases.down_FD.t()
    d_gate_RF = torch.ops.aten.silu_backward(dh_RF * wide_2RF[1], wide_2RF[0])
    d_up_RF = active_RF.mul_(dh_RF)
    dx_RD = d_gate_RF @ bases.gate_DF.t()
    dx_RD.addmm_(d_up_RF, bases.up_DF.t())
    d_bases.gate_DF.copy_(rows_RD.t() @ d_gate_RF)
    d_bases.up_DF.copy_(rows_RD.t() @ d_up_RF)
    return dx_RD


def _backward_members(
    dy_RD: Tensor,
    saved: list[Tensor],
    pairs: Pairs,
    bases: _Bases,
    residuals: _Residuals,
    d_bases: _Bases,
    d_residuals: _Residuals,
) -> tuple[Tensor, Tensor]:
    """Set the gradients of a base and its residuals; return those of the rows [R, D] and of the gates [R, K]."""
    rows_RD, wide_2NF, hidden_RF, narrow_N2W, down_NW, gate_N1 = saved
    parts, wider = pairs.parts, torch.promote_types(dy_RD.dtype, torch.float32)
    active_NF = F.silu(wide_2NF[0])
    h_NF = active_NF * wide_2NF[1]
    # Down: through the base once per row, through the residual once per pair.
    d_bases.down_FD.copy_(hidden_RF.t() @ dy_RD)
    dh_NF = (dy_RD @ bases.down_FD.t()).index_select(0, pairs.row_N)
    dy_ND = dy_RD.index_select(0, pairs.row_N)
    d_down_NW = times(dy_ND, residuals.down_out_eWD, parts, transpose=True)
    d_gate_N = (dh_NF * h_NF).sum(1, dtype=wider) + (d_down_NW * down_NW).sum(1, dtype=wider)
    weight_gradient(d_residuals.down_out_eWD, down_NW * gate_N1, dy_ND, parts)
    d_down_NW *= gate_N1
    weight_gradient(d_residuals.down_in_eFW, h_NF, d_down_NW, parts)
    dh_NF *= gate_N1
    add_times(dh_NF, d_down_NW, residuals.down_in_eFW, parts, transpose=True)
    # Gate and up together.
    d_wide_2NF = torch.empty_like(wide_2NF)
    torch.mul(active_NF, dh_NF, out=d_wide_2NF[1])
    d_wide_2NF[0] = torch.ops.aten.silu_backward(dh_NF.mul_(wide_2NF[1]), wide_2NF[0])
    narrow_2NW = _split(narrow_N2W)
    d_narrow_2NW = torch.empty_like(narrow_2NW)
    for e, (first, last) in enumerate(parts):
        if last > first:
            d_residuals.wide_out_e2WF[e] = narrow_2NW[:, first:last].transpose(1, 2) @ d_wide_2NF[:, first:last]
            d_narrow_2NW[:, first:last] = d_wide_2NF[:, first:last] @ residuals.wide_out_e2WF[e].transpose(1, 2)
    d_narrow_N2W = d_narrow_2NW.transpose(0, 1).reshape(narrow_N2W.shape)
    weight_gradient(d_residuals.narrow_in_eD2W, rows_RD.index_select(0, pairs.row_N), d_narrow_N2W, parts)
    dx_RD = sum_pairs(times(d_narrow_N2W, residuals.narrow_in_eD2W, parts, transpose=True), pairs.position_RK)
    d_gate_RF, d_up_RF = (sum_pairs(d_NF, pairs.position_RK) for d_NF in d_wide_2NF)
    dx_RD.addmm_(d_gate_RF, bases.gate_DF.t())
    dx_RD.addmm_(d_up_RF, bases.up_DF.t())
    d_bases.gate_DF.copy_(rows_RD.t() @ d_gate_RF)
    d_bases.up_DF.copy_(rows_RD.t() @ d_up_RF)
    return dx_RD, d_gate_N[pairs.real_N].view(-1, pairs.k)


class ClusteredFFN(torch.autograd.Function):
    """The gated sum of each row's experts, for rows sorted by cluster.

    x [R, D]; row_parts: the rows of each local cluster; pairs: None for a cluster without residuals;
    expert_parts: the members of each cluster. tensors: for each cluster with pairs its gates [R_c, K_c]
    float32; the bases gate and up [c, D, F] and down [c, F, D]; the residual factors in the order of
    `RESIDUALS`, stacked over members. Returns [R, D] in the type of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        row_parts: list[Span],
        pairs: list[Pairs | None],
        expert_parts: list[Span],
        *tensors: Tensor,
    ) -> Tensor:
        n_gates = sum(p is not None for p in pairs)
        gates, weights = tensors[:n_gates], tensors[n_gates:]
        bases = _Bases(*(weight.to(x_RD.dtype) for weight in weights[:3]))
        residuals = _Residuals.join(weights[3:], x_RD.dtype) if n_gates else None
        y_RD = torch.empty_like(x_RD)
        saved: list[Tensor] = []
        for c, (start, stop) in enumerate(row_parts):
            p = pairs[c]
            if stop == start or (p is not None and p.k == 0):
                y_RD[start:stop] = 0
                continue
            rows_RD = padded(x_RD[start:stop], bucket(stop - start, x_RD))
            base = _Bases(*(weight[c] for weight in bases))
            if p is None or residuals is None:
                out_RD, kept = _forward_base(rows_RD, base)
            else:
                gate_RK = gates[c].to(x_RD.dtype)
                out_RD, kept = _forward_members(rows_RD, gate_RK, p, base, residuals.of(expert_parts[c]))
            y_RD[start:stop] = out_RD[: stop - start]
            saved += kept
        ctx.layout = (row_parts, pairs, expert_parts, weights[0].dtype, [gate.dtype for gate in gates])
        ctx.save_for_backward(*bases, *(residuals or ()), *saved)
        return y_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dy_RD = grads[0].contiguous()
        row_parts, pairs, expert_parts, weight_dtype, gate_dtypes = ctx.layout
        bases, rest = _Bases(*ctx.saved_tensors[:3]), ctx.saved_tensors[3:]
        residuals = _Residuals(*rest[:4]) if gate_dtypes else None
        saved = iter(rest[4 if residuals else 0 :])
        d_bases = _Bases(*(torch.zeros_like(weight, dtype=weight_dtype) for weight in bases))
        d_residuals = _Residuals(*(torch.zeros_like(w, dtype=weight_dtype) for w in residuals)) if residuals else None
        d_gates: list[Tensor] = []
        dx_RD = torch.empty_like(dy_RD)
        for c, (start, stop) in enumerate(row_parts):
            p = pairs[c]
            if stop == start or (p is not None and p.k == 0):
                dx_RD[start:stop] = 0
                if p is not None:
                    d_gates.append(dy_RD.new_zeros(stop - start, p.k, dtype=gate_dtypes[c]))
                continue
            kept = [next(saved) for _ in range(2 if p is None else 6)]
            dy_c_RD = padded(dy_RD[start:stop], kept[0].shape[0])
            base, d_base = (_Bases(*(weight[c] for weight in both)) for both in (bases, d_bases))
            if p is None or residuals is None or d_residuals is None:
                dx_c_RD = _backward_base(dy_c_RD, kept, base, d_base)
            else:
                members = expert_parts[c]
                dx_c_RD, d_gate_RK = _backward_members(
                    dy_c_RD, kept, p, base, residuals.of(members), d_base, d_residuals.of(members)
                )
                d_gates.append(d_gate_RK.to(gate_dtypes[c]))
            dx_RD[start:stop] = dx_c_RD[: stop - start]
        return (dx_RD, None, None, None, *d_gates, *d_bases, *(d_residuals.part() if d_residuals else ()))


class FlatFFN(torch.autograd.Function):
    """Independent SwiGLU experts, the baseline.

    Rows [N, D] are sorted by expert, `counts` rows each. weights: gate and up [e, D, F], down [e, F, D].
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
        gate_eDF, up_eDF, down_eFD = (weight.to(x_ND.dtype) for weight in weights)
        expert_N1 = torch.repeat_interleave(torch.tensor(counts, device=x_ND.device)).unsqueeze(1)
        p = Pairs(expert_N1, len(counts), x_ND)
        rows_ND = x_ND.index_select(0, p.row_N) if x_ND.shape[0] else x_ND
        a_NF, b_NF = times(rows_ND, gate_eDF, p.parts), times(rows_ND, up_eDF, p.parts)
        y_ND = times(F.silu(a_NF).mul_(b_NF), down_eFD, p.parts)
        ctx.layout = (p, [weight.dtype for weight in weights])
        ctx.save_for_backward(rows_ND, gate_eDF, up_eDF, down_eFD, a_NF, b_NF)
        return y_ND.index_select(0, p.real_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        p, types = ctx.layout
        rows_ND, gate_eDF, up_eDF, down_eFD, a_NF, b_NF = ctx.saved_tensors
        dy_ND = rows_ND.new_zeros(rows_ND.shape).index_copy_(0, p.real_N, grads[0])
        d_gate_eDF, d_up_eDF, d_down_eFD = (
            torch.zeros_like(weight, dtype=dtype)
            for weight, dtype in zip((gate_eDF, up_eDF, down_eFD), types, strict=True)
        )
        active_NF = F.silu(a_NF)
        weight_gradient(d_down_eFD, active_NF * b_NF, dy_ND, p.parts)
        dh_NF = times(dy_ND, down_eFD, p.parts, transpose=True)
        db_NF = active_NF.mul_(dh_NF)
        da_NF = torch.ops.aten.silu_backward(dh_NF.mul_(b_NF), a_NF)
        weight_gradient(d_gate_eDF, rows_ND, da_NF, p.parts)
        weight_gradient(d_up_eDF, rows_ND, db_NF, p.parts)
        dx_ND = times(da_NF, gate_eDF, p.parts, transpose=True)
        add_times(dx_ND, db_NF, up_eDF, p.parts, transpose=True)
        return dx_ND.index_select(0, p.real_N), None, d_gate_eDF, d_up_eDF, d_down_eFD
