"""Similarity of the experts of a layer: a weighted sum of two cosines, or the correlation of their choices."""

from __future__ import annotations

import numpy as np

from raymoe.clustering.statistics import Statistics

NEEDED = {
    "counterfactual": ("residual", "answer"),
    "paper": ("residual", "answer", "weight"),
    "coactivation": ("coactivation",),
}
"""Grams that are gathered for each `regroup.similarity`. Those of `counterfactual` are gathered for `paper`, too, so
that a resumed run can use it at once."""


class NotSampled(ValueError):
    """A gram that the similarity requires is not sampled in every layer yet."""


def similarity(stats: Statistics, kind: str, alpha: float) -> np.ndarray:
    """Return the similarity of experts S_LEE: alpha x parameter term + (1 − alpha) x activation term.

    `paper` (arXiv 2510.02345, equation 1): cosines of whole weights, and of mean routed inputs.
    `counterfactual`: cosines of residuals, and of residual outputs on a shared sample of tokens, without their
    mean. Neither term contains the base, so the similarity does not confirm the current clusters.
    `coactivation`: `coactivation(gram)`, without `alpha`.

    S is positive semidefinite up to rounding with a diagonal of exactly 1. A zero vector (an expert without
    rows, a residual at zero) has similarity 0 to all others. Raises NotSampled.
    """
    if kind == "coactivation":
        return coactivation(_sampled(stats, "coactivation"))
    if kind == "counterfactual":
        parameters_LEE = cosine(_sampled(stats, "residual"))
        output_LEE = _sampled(stats, "answer")
        centered_LEE = output_LEE - output_LEE.mean(1, keepdims=True)
        centered_LEE -= centered_LEE.mean(2, keepdims=True)
        # The centered rest of equal outputs is rounding error.
        activations_LEE = cosine(centered_LEE, 1e-12 * _squares(output_LEE).max(1))
    elif kind == "paper":
        parameters_LEE = cosine(_sampled(stats, "weight"))
        # The cosine of sums equals the cosine of means: counts cancel.
        activations_LEE = cosine(stats.input_sum_LED @ stats.input_sum_LED.swapaxes(1, 2))
    else:
        raise ValueError(f"similarity={kind!r} is not allowed: one of {', '.join(NEEDED)}")
    return alpha * parameters_LEE + (1 - alpha) * activations_LEE


def coactivation(count_LEE: np.ndarray) -> np.ndarray:
    """Return the correlation of the choices of experts, shrunk by the share of its variance that sampling explains.

    count_LEE: the tokens that take both experts; each token takes the same number of experts. The count that two
    independent experts would have is subtracted, and the rest is divided by that of the expert with itself: the cosine
    of centered indicators, from -1 (never together) to 1 (always together).

    Correlations of independent experts scatter by 1/√tokens, and a planner that takes the largest would expect a gain
    from noise. The factor 1 - (1/tokens) / variance is near 0 for noise and near 1 for groups. It needs no second
    sample.
    """
    n_experts = count_LEE.shape[1]
    taken_LE = _squares(count_LEE)
    # Each of `tokens` takes k experts: the diagonal sums to k x tokens, and the matrix to k² x tokens.
    tokens_L = taken_LE.sum(1) ** 2 / count_LEE.sum((1, 2))
    centered_LEE = count_LEE - taken_LE[:, :, None] * taken_LE[:, None, :] / tokens_L[:, None, None]
    # An expert that all tokens take, or none, has a centered indicator of zero, up to rounding.
    floor_L = 1e-9 * tokens_L
    S_LEE = cosine(centered_LEE, floor_L)
    pairs = ~np.eye(n_experts, dtype=bool)
    is_vector_LE = _squares(centered_LEE) > floor_L[:, None]
    known_L = (is_vector_LE[:, :, None] & is_vector_LE[:, None, :])[:, pairs].mean(1)
    variance_L = S_LEE[:, pairs].var(1)
    kept_L = 1 - known_L / (tokens_L * np.maximum(variance_L, np.finfo(float).tiny))
    S_LEE *= np.where(pairs, np.clip(kept_L, 0, 1)[:, None, None], 1)
    return S_LEE


def _sampled(stats: Statistics, name: str) -> np.ndarray:
    """Return the gram `name`. A layer is sampled if a square on its diagonal is positive."""
    if name not in stats.gram:
        raise NotSampled(f"no {name} gram yet")
    gram_LEE = stats.gram[name]
    missing = np.flatnonzero(~(_squares(gram_LEE) > 0).any(1))
    if missing.size:
        raise NotSampled(f"no {name} gram yet in layers {', '.join(map(str, missing))}")
    return gram_LEE


def _squares(gram_LEE: np.ndarray) -> np.ndarray:
    return gram_LEE.diagonal(axis1=1, axis2=2)


def cosine(gram_LEE: np.ndarray, floor_L: np.ndarray | float = 0.0) -> np.ndarray:
    """Convert inner products to cosines. A vector whose square is at most `floor_L` counts as zero."""
    squares_LE = _squares(gram_LEE)
    is_vector_LE = squares_LE > np.reshape(floor_L, (-1, 1))
    inverse_LE = np.where(is_vector_LE, 1 / np.sqrt(np.where(is_vector_LE, squares_LE, 1)), 0)
    cosine_LEE = gram_LEE * inverse_LE[:, :, None] * inverse_LE[:, None, :]
    cosine_LEE = np.clip((cosine_LEE + cosine_LEE.swapaxes(1, 2)) / 2, -1, 1)
    experts = np.arange(gram_LEE.shape[1])
    cosine_LEE[:, experts, experts] = 1
    return cosine_LEE
