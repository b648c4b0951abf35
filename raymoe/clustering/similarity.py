"""How alike a layer's experts are: two cosines, fused."""

from __future__ import annotations

import numpy as np

from raymoe.clustering.statistics import Statistics


class NotSampled(ValueError):
    """A gram that the similarity needs has not been gathered in every layer yet."""


def similarity(stats: Statistics, kind: str, alpha: float) -> np.ndarray:
    """Similarity of experts, S_LEE: alpha x a term of parameters + (1 − alpha) x a term of activations.

    `paper` (arXiv 2510.02345, equation 1): of whole weights, and of mean routed inputs.
    `counterfactual`: of residuals, and of their answers to tokens that all experts saw, less the mean
    answer. No base is in either, so that it does not confirm the present clusters.

    Positive semidefinite to rounding, diagonals exactly 1; a zero vector (an expert without rows, an
    untouched residual) is like no other. Raises NotSampled.
    """
    if kind == "counterfactual":
        parameters_LEE = cosine(_sampled(stats, "residual"))
        answer_LEE = _sampled(stats, "answer")
        centred_LEE = answer_LEE - answer_LEE.mean(1, keepdims=True)
        centred_LEE -= centred_LEE.mean(2, keepdims=True)
        # What centring leaves of equal answers is rounding, not an answer.
        activations_LEE = cosine(centred_LEE, 1e-12 * _squares(answer_LEE).max(1))
    elif kind == "paper":
        parameters_LEE = cosine(_sampled(stats, "weight"))
        # The cosine of sums is that of means: counts cancel.
        activations_LEE = cosine(stats.input_sum_LED @ stats.input_sum_LED.swapaxes(1, 2))
    else:
        raise ValueError(f"similarity={kind!r} is not allowed: counterfactual or paper")
    return alpha * parameters_LEE + (1 - alpha) * activations_LEE


def _sampled(stats: Statistics, name: str) -> np.ndarray:
    """The gram of that name; a layer is sampled once some square on its diagonal is positive."""
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
    """Inner products as cosines; vectors whose square is at most the floor count as zero."""
    squares_LE = _squares(gram_LEE)
    is_vector_LE = squares_LE > np.reshape(floor_L, (-1, 1))
    inverse_LE = np.where(is_vector_LE, 1 / np.sqrt(np.where(is_vector_LE, squares_LE, 1)), 0)
    cosine_LEE = gram_LEE * inverse_LE[:, :, None] * inverse_LE[:, None, :]
    cosine_LEE = np.clip((cosine_LEE + cosine_LEE.swapaxes(1, 2)) / 2, -1, 1)
    experts = np.arange(gram_LEE.shape[1])
    cosine_LEE[:, experts, experts] = 1
    return cosine_LEE
