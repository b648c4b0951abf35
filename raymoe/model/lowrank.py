"""Factorization of a matrix into two narrow factors by truncated SVD, optionally weighted by inputs."""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING, POWER_ITERATIONS = 16, 4
RIDGE = 1e-2
"""Weight of a direction without inputs, relative to the mean square of the inputs."""


def factor(target: Tensor, width: int, inputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return first [m, W] and second [W, n] with first @ second ≈ target [m, n]; both share the singular values.

    The factors minimize the squared error of the matrix; with `inputs` [rows, m], that of inputs @ target.
    The randomized SVD has a fixed seed, so that replicas are equal bit for bit (paper section 3.2).
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
    """Return the leading `kept` singular triples: u [m, kept], s [kept], v [n, kept]."""
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
