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
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, dtype: torch.dtype, learn: bool) -> Tensor:
        narrow_hidden, narrow_weight = hidden.to(dtype), weight.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        d_hidden = torch.empty_like(narrow_hidden) if learn else None
        d_weight = torch.zeros_like(weight) if learn else None
        for start in range(0, hidden.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            rows, goal = narrow_hidden[part], target[part, None]
            logits = (rows @ narrow_weight.t()).to(wide)
            log_p = logits.log_softmax(-1)
            total -= log_p.gather(1, goal).sum(dtype=torch.float64)
            if d_hidden is not None and d_weight is not None:
                d_logits = log_p.exp_()
                d_logits.scatter_add_(1, goal, d_logits.new_full(goal.shape, -1.0))
                narrow = d_logits.to(dtype)
                torch.mm(narrow, narrow_weight, out=d_hidden[part])
                d_weight += narrow.t() @ rows
        if d_hidden is not None:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.hidden_dtype = hidden.dtype
        return total.to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        d_hidden, d_weight = ctx.saved_tensors
        return (d_hidden * grads[0]).to(ctx.hidden_dtype), (d_weight * grads[0]).to(d_weight.dtype), None, None, None


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Return Σ_t −log softmax(hidden_t · weightᵀ)[target_t], a scalar in float32 (float64 for float64 inputs).

    The products run in the autocast type, the softmax in float32, the sum in float64.
    """
    learn = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, target_T, compute_dtype(hidden_TD), learn)
