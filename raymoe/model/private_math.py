"""The arithmetic of private experts, forward and backward: narrow SwiGLU networks of one cluster, side by side.

The matrices of a cluster's experts lie side by side, so that all experts of all rows are three wide products, and
experts that a row did not choose have a gate of zero:

    a = X gateᵀ     b = X upᵀ     h = silu(a) * b * (gate of the column's expert)     y = h down

This computes n/K times the chosen products and moves no row, which is faster than sorted (row, expert) pairs only
up to `WIDEST` (measured by `jobs/benchmark.py layer`). Beyond it, the chosen pairs are computed expert by expert.

Suffixes: R rows of a cluster, e its n experts, W their width, X = n·W columns, N (row, expert) pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.model.expert_math import Pairs, Span, add_times, bucket, padded, sum_pairs, times, weight_gradient

WIDEST = 1.25
"""Largest ratio of experts to chosen experts for which wide products are used."""


class PrivateFFN(torch.autograd.Function):
    """The gated sum of each row's private experts, for rows sorted by cluster.

    x [R, D]; row_parts: the rows of each local cluster; expert_parts: the experts of each cluster; pairs: the choices
    of each cluster. tensors: for each cluster its gates [R_c, K_c] float32; gate, up and down [e, W, D], stacked over
    the experts of all clusters. Returns [R, D] in the type of x.
    """

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, row_parts: list[Span], pairs: list[Pairs], expert_parts: list[Span], *tensors: Tensor
    ) -> Tensor:
        gates, weights = tensors[: len(pairs)], tensors[len(pairs) :]
        stacks = [weight.to(x_RD.dtype) for weight in weights]
        y_RD = torch.empty_like(x_RD)
        saved: list[Tensor] = []
        for p, gate_RK, rows, experts in zip(pairs, gates, row_parts, expert_parts, strict=True):
            if rows[0] == rows[1] or not p.k:
                y_RD[slice(*rows)] = 0
                continue
            own = [stack[slice(*experts)] for stack in stacks]
            rows_RD = padded(x_RD[slice(*rows)], bucket(rows[1] - rows[0], x_RD))
            compute = _forward_wide if is_wide(p, experts) else _forward_pairs
            out_RD, kept = compute(rows_RD, gate_RK.to(x_RD.dtype), p, own)
            y_RD[slice(*rows)] = out_RD[: rows[1] - rows[0]]
            saved += kept
        ctx.layout = row_parts, pairs, expert_parts, [w.dtype for w in weights], [gate.dtype for gate in gates]
        ctx.save_for_backward(*stacks, *saved)
        return y_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        row_parts, pairs, expert_parts, types, gate_types = ctx.layout
        stacks, saved = ctx.saved_tensors[:3], iter(ctx.saved_tensors[3:])
        dy_RD = grads[0].contiguous()
        dx_RD = torch.empty_like(dy_RD)
        d_stacks = [torch.zeros_like(stack, dtype=dtype) for stack, dtype in zip(stacks, types, strict=True)]
        d_gates: list[Tensor] = []
        for p, gate_type, rows, experts in zip(pairs, gate_types, row_parts, expert_parts, strict=True):
            n = rows[1] - rows[0]
            if n == 0 or not p.k:
                dx_RD[slice(*rows)] = 0
                d_gates.append(dy_RD.new_zeros(n, p.k, dtype=gate_type))
                continue
            own, d_own = ([stack[slice(*experts)] for stack in group] for group in (stacks, d_stacks))
            dy_c_RD = padded(dy_RD[slice(*rows)], bucket(n, dy_RD))
            if is_wide(p, experts):
                dx_c_RD, d_gate_RK = _backward_wide(dy_c_RD, [next(saved) for _ in range(5)], own, d_own)
            else:
                dx_c_RD, d_gate_RK = _backward_pairs(dy_c_RD, [next(saved) for _ in range(4)], p, own, d_own)
            dx_RD[slice(*rows)] = dx_c_RD[:n]
            d_gates.append(d_gate_RK[:n].to(gate_type))
        return (dx_RD, None, None, None, *d_gates, *d_stacks)


def is_wide(pairs: Pairs, experts: Span) -> bool:
    """Return whether a cluster computes all its experts for all rows."""
    return experts[1] - experts[0] <= WIDEST * pairs.k


def _forward_wide(rows_RD: Tensor, gate_RK: Tensor, pairs: Pairs, own: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs [R, D] and the tensors for the backward."""
    n, w, _ = own[0].shape
    gate_XD, up_XD, down_XD = (weight.flatten(0, 1) for weight in own)
    index_RK = padded(pairs.expert_RK, rows_RD.shape[0])
    gate_Re = rows_RD.new_zeros(rows_RD.shape[0], n).scatter_(1, index_RK, padded(gate_RK, rows_RD.shape[0]))
    a_RX, b_RX = rows_RD @ gate_XD.t(), rows_RD @ up_XD.t()
    h_RX = F.silu(a_RX).mul_(b_RX)
    h_RX.view(-1, n, w).mul_(gate_Re.unsqueeze(2))
    return h_RX @ down_XD, [rows_RD, a_RX, b_RX, gate_Re, index_RK]


def _backward_wide(dy_RD: Tensor, saved: list[Tensor], own: list[Tensor], d_own: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Set the gradients of the experts; return those of the rows [R, D] and of the gates [R, K]."""
    rows_RD, a_RX, b_RX, gate_Re, index_RK = saved
    n, w, _ = own[0].shape
    gate_XD, up_XD, down_XD = (weight.flatten(0, 1) for weight in own)
    d_gate_XD, d_up_XD, d_down_XD = (grad.flatten(0, 1) for grad in d_own)
    wide = lambda t_RX: t_RX.view(-1, n, w)  # noqa: E731
    dh_RX = dy_RD @ down_XD.t()
    active_RX = F.silu(a_RX)
    h_RX = active_RX * b_RX
    d_gate_Re = torch.linalg.vecdot(wide(dh_RX), wide(h_RX))
    wide(h_RX).mul_(gate_Re.unsqueeze(2))
    d_down_XD.copy_(h_RX.t() @ dy_RD)
    wide(dh_RX).mul_(gate_Re.unsqueeze(2))
    db_RX = active_RX.mul_(dh_RX)
    da_RX = torch.ops.aten.silu_backward(dh_RX.mul_(b_RX), a_RX)
    d_gate_XD.copy_(da_RX.t() @ rows_RD)
    d_up_XD.copy_(db_RX.t() @ rows_RD)
    return (da_RX @ gate_XD).addmm_(db_RX, up_XD), d_gate_Re.gather(1, index_RK)


def _forward_pairs(rows_RD: Tensor, gate_RK: Tensor, pairs: Pairs, own: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs [R, D] and the tensors for the backward."""
    gate_eWD, up_eWD, down_eWD = own
    rows_ND = rows_RD.index_select(0, pairs.row_N)
    a_NW = times(rows_ND, gate_eWD, pairs.parts, transpose=True)
    b_NW = times(rows_ND, up_eWD, pairs.parts, transpose=True)
    out_ND = times(F.silu(a_NW).mul_(b_NW), down_eWD, pairs.parts)
    return sum_pairs(out_ND, pairs.position_RK, padded(gate_RK, rows_RD.shape[0])), [
        rows_ND, a_NW, b_NW, pairs.spread(gate_RK),
    ]  # fmt: skip


def _backward_pairs(
    dy_RD: Tensor, saved: list[Tensor], pairs: Pairs, own: list[Tensor], d_own: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Set the gradients of the experts; return those of the rows [R, D] and of the gates [R, K]."""
    rows_ND, a_NW, b_NW, gate_N1 = saved
    gate_eWD, up_eWD, down_eWD = own
    dy_ND = dy_RD.index_select(0, pairs.row_N)
    dh_NW = times(dy_ND, down_eWD, pairs.parts, transpose=True)
    active_NW = F.silu(a_NW)
    h_NW = active_NW * b_NW
    d_gate_N = (dh_NW * h_NW).sum(1, dtype=torch.promote_types(dy_RD.dtype, torch.float32))
    weight_gradient(d_own[2], h_NW.mul_(gate_N1), dy_ND, pairs.parts)
    db_NW = active_NW.mul_(dh_NW.mul_(gate_N1))
    da_NW = torch.ops.aten.silu_backward(dh_NW.mul_(b_NW), a_NW)
    weight_gradient(d_own[0], da_NW, rows_ND, pairs.parts)
    weight_gradient(d_own[1], db_NW, rows_ND, pairs.parts)
    dx_ND = times(da_NW, gate_eWD, pairs.parts)
    add_times(dx_ND, db_NW, up_eWD, pairs.parts)
    return sum_pairs(dx_ND, pairs.position_RK), d_gate_N[pairs.real_N].view(-1, pairs.k)
