"""Cross-entropy of a linear head in chunks, without the whole [T, V] logits; the forward computes the gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raymoe.model.expert_math import compute_dtype

CHUNK = 512
"""Rows per chunk: its float32 logits stay in the cache for vocabularies of about ten thousand."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, dtype: torch.dtype, needs_grad: bool
    ) -> Tensor:
        # Suffix r: rows of a chunk. low: the type of the products.
        low_hidden_TD, low_weight_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
        d_hidden_TD = torch.empty_like(low_hidden_TD) if needs_grad else None
        d_weight_VD = torch.zeros_like(weight_VD) if needs_grad else None
        for start in range(0, hidden_TD.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            rows_rD, target_r1 = low_hidden_TD[part], target_T[part, None]
            logits_rV = (rows_rD @ low_weight_VD.t()).to(wide)
            log_p_rV = logits_rV.log_softmax(-1)
            total -= log_p_rV.gather(1, target_r1).sum(dtype=torch.float64)
            if d_hidden_TD is not None and d_weight_VD is not None:
                d_logits_rV = log_p_rV.exp_()
                d_logits_rV.scatter_add_(1, target_r1, d_logits_rV.new_full(target_r1.shape, -1.0))
                low_d_logits_rV = d_logits_rV.to(dtype)
                torch.mm(low_d_logits_rV, low_weight_VD, out=d_hidden_TD[part])
                d_weight_VD += low_d_logits_rV.t() @ rows_rD
        if d_hidden_TD is not None:
            ctx.save_for_backward(d_hidden_TD, d_weight_VD)
            ctx.hidden_dtype = hidden_TD.dtype
        return total.to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        d_hidden_TD, d_weight_VD = ctx.saved_tensors
        d_weight_VD = (d_weight_VD * grads[0]).to(d_weight_VD.dtype)
        return (d_hidden_TD * grads[0]).to(ctx.hidden_dtype), d_weight_VD, None, None, None


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Return Σ_t −log softmax(hidden_t · weightᵀ)[target_t], a scalar in float32 (float64 for float64 inputs).

    The products run in the autocast type, the softmax in float32, the sum in float64.
    """
    needs_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, target_T, compute_dtype(hidden_TD), needs_grad)
