"""Factorization of a matrix into two narrow factors by truncated SVD, optionally weighted by inputs."""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING, POWER_ITERATIONS = 16, 4
RIDGE = 1e-2
"""Weight of a direction without inputs, relative to the mean square of the inputs."""


def factor(target_IJ: Tensor, width: int, inputs_RI: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return first [I, W] and second [W, J] with first @ second ≈ target [I, J]; both share the singular values.

    The factors minimize the squared error of the matrix; with inputs [R, I], that of inputs @ target.
    The randomized SVD has a fixed seed, so that replicas are equal bit for bit (paper section 3.2).
    """
    # Suffix k: the singular values that are kept, min(W, I, J).
    a_IJ, weight_II = target_IJ.float(), None
    if inputs_RI is not None and len(inputs_RI):
        x_RI = inputs_RI.float()
        square_II = x_RI.t() @ x_RI / len(x_RI)
        square_II.diagonal().add_(RIDGE * square_II.diagonal().mean())
        weight_II = torch.linalg.cholesky(square_II).t()  # upper triangular
        a_IJ = weight_II @ a_IJ
    kept = min(width, *a_IJ.shape)
    u_Ik, s_k, v_Jk = _svd(a_IJ, kept)
    root_k = s_k.sqrt()
    first_Ik = u_Ik * root_k
    if weight_II is not None:
        first_Ik = torch.linalg.solve_triangular(weight_II, first_Ik, upper=True)
    first_IW, second_WJ = target_IJ.new_zeros(len(target_IJ), width), target_IJ.new_zeros(width, target_IJ.shape[1])
    first_IW[:, :kept], second_WJ[:kept] = first_Ik.to(target_IJ), (root_k[:, None] * v_Jk.t()).to(target_IJ)
    return first_IW, second_WJ


def _svd(a_IJ: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading `kept` singular triples: u [I, kept], s [kept], v [J, kept].

    The randomized SVD has a basis of q = kept + OVERSAMPLING vectors; small matrices have an exact SVD.
    """
    size = kept + OVERSAMPLING
    if 2 * size >= min(a_IJ.shape):
        u, s, vh = torch.linalg.svd(a_IJ, full_matrices=False)
        return u[:, :kept], s[:kept], vh[:kept].t()
    start_Jq = torch.randn(a_IJ.shape[1], size, generator=torch.Generator().manual_seed(0)).to(a_IJ)
    basis_Iq = torch.linalg.qr(a_IJ @ start_Jq).Q
    for _ in range(POWER_ITERATIONS):
        basis_Jq = torch.linalg.qr(a_IJ.t() @ basis_Iq).Q
        basis_Iq = torch.linalg.qr(a_IJ @ basis_Jq).Q
    u_qq, s_q, vh_qJ = torch.linalg.svd(basis_Iq.t() @ a_IJ, full_matrices=False)
    return (basis_Iq @ u_qq)[:, :kept], s_q[:kept], vh_qJ[:kept].t()
