"""The best product of two narrow factors for a full matrix: truncated SVD, weighted by the inputs where they are known."""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING, POWER_ITERATIONS = 16, 4
RIDGE = 1e-2
"""Of the inputs' mean square: what a direction without inputs still counts."""


def factor(target: Tensor, width: int, inputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """first [m, W] and second [W, n] with first @ second ≈ target [m, n], the singular values shared equally.

    The squared error is least over all matrices; with `inputs` [rows, m], that of inputs @ target is.
    By a randomised SVD from a fixed seed, so that replicas agree bit for bit. (Paper section 3.2: residuals by truncated SVD.)
    """
    a, unweight = target.float(), None
    if inputs is not None and len(inputs):
        x = inputs.float()
        square = x.t() @ x / len(x)
        square.diagonal().add_(RIDGE * square.diagonal().mean())
        unweight = torch.linalg.cholesky(square).t()  # [m, m], upper
        a = unweight @ a
    kept = min(width, *a.shape)
    u, s, v = _svd(a, kept)
    root = s.sqrt()
    first = u * root
    if unweight is not None:
        first = torch.linalg.solve_triangular(unweight, first, upper=True)
    out = target.new_zeros(target.shape[0], width), target.new_zeros(width, target.shape[1])
    out[0][:, :kept], out[1][:kept] = first.to(target), (root[:, None] * v.t()).to(target)
    return out


def _svd(a: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `kept` singular triples: u [m, kept], s [kept], v [n, kept]."""
    wide = kept + OVERSAMPLING
    if 2 * wide >= min(a.shape):
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        return u[:, :kept], s[:kept], vh[:kept].t()
    start = torch.randn(a.shape[1], wide, generator=torch.Generator().manual_seed(0)).to(a)
    basis = torch.linalg.qr(a @ start).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(a.t() @ basis).Q
        basis = torch.linalg.qr(a @ basis).Q
    u, s, vh = torch.linalg.svd(basis.t() @ a, full_matrices=False)
    return (basis @ u)[:, :kept], s[:kept], vh[:kept].t()
