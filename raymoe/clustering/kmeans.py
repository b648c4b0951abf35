"""Balanced k-means: clusters of given sizes, started from the current clusters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

RESTARTS = 32
"""Number of k-means++ starts; the best result is returned."""


def embed(S_EE: np.ndarray) -> np.ndarray:
    """Return points Z_EX with Z Zᵀ = S, or the nearest positive semidefinite matrix; X is its numerical rank."""
    values, vectors_EX = np.linalg.eigh((S_EE + S_EE.T) / 2)
    kept = values > len(values) * np.finfo(values.dtype).eps * max(values[-1], 0)
    return vectors_EX[:, kept] * np.sqrt(values[kept])


def balanced_kmeans(
    Z_EX: np.ndarray, sizes_C: Sequence[int] | np.ndarray, start: Sequence[int] | np.ndarray | None, seed: int
) -> np.ndarray:
    """Return assignment_E, the cluster of each point, with `sizes_C` points per cluster.

    Performs Lloyd's steps, each with the optimal assignment of these sizes, from the centroids of `start`. If
    `start` is None, it starts from k-means++ with `seed`. Ends when a step no longer reduces the squared
    distances to centroids. ValueError if the sizes do not sum to the number of points.
    """
    sizes_C = np.asarray(sizes_C)
    if sizes_C.sum() != len(Z_EX):
        raise ValueError(f"sizes {sizes_C.tolist()} sum to {sizes_C.sum()}, expected {len(Z_EX)}")
    if start is not None:
        return _lloyd(Z_EX, _centroids(Z_EX, np.asarray(start), len(sizes_C)), sizes_C)
    generator = np.random.default_rng(seed)
    found = [_lloyd(Z_EX, _plus_plus(Z_EX, len(sizes_C), generator), sizes_C) for _ in range(RESTARTS)]
    return max(found, key=lambda assignment_E: _explained(Z_EX, assignment_E, len(sizes_C)))


def align(proposal: Sequence[int] | np.ndarray, current: Sequence[int] | np.ndarray, n_clusters: int) -> np.ndarray:
    """Rename the clusters of `proposal` so that they share as many experts as possible with `current`."""
    overlap_CC = np.zeros((n_clusters, n_clusters), np.int64)
    np.add.at(overlap_CC, (np.asarray(proposal), np.asarray(current)), 1)
    _, names_C = linear_sum_assignment(overlap_CC, maximize=True)
    return names_C[np.asarray(proposal)]


def _lloyd(Z_EX: np.ndarray, centroids_CX: np.ndarray, sizes_C: np.ndarray) -> np.ndarray:
    slots_E = np.repeat(np.arange(len(sizes_C)), sizes_C)
    found_E, explained = slots_E, -np.inf
    while True:
        distance_EC = (centroids_CX**2).sum(1) - 2 * Z_EX @ centroids_CX.T
        assignment_E = slots_E[linear_sum_assignment(distance_EC[:, slots_E])[1]]
        now = _explained(Z_EX, assignment_E, len(sizes_C))
        if now <= explained + 1e-12:
            return found_E
        found_E, explained = assignment_E, now
        centroids_CX = _centroids(Z_EX, assignment_E, len(sizes_C))


def _centroids(Z_EX: np.ndarray, assignment_E: np.ndarray, n_clusters: int) -> np.ndarray:
    member_CE = np.arange(n_clusters)[:, None] == assignment_E
    return member_CE @ Z_EX / np.maximum(member_CE.sum(1, keepdims=True), 1)


def _explained(Z_EX: np.ndarray, assignment_E: np.ndarray, n_clusters: int) -> float:
    """Return the explained sum of squares: the total minus the squared distances to centroids."""
    sizes_C = np.bincount(assignment_E, minlength=n_clusters)
    return float(sizes_C @ (_centroids(Z_EX, assignment_E, n_clusters) ** 2).sum(1))


def _plus_plus(Z_EX: np.ndarray, n_clusters: int, generator: np.random.Generator) -> np.ndarray:
    """Return initial centroids_CX: points drawn in proportion to the squared distance to the nearest one (k-means++)."""
    chosen = [int(generator.integers(len(Z_EX)))]
    nearest_E = np.full(len(Z_EX), np.inf)
    while len(chosen) < n_clusters:
        nearest_E = np.minimum(nearest_E, ((Z_EX - Z_EX[chosen[-1]]) ** 2).sum(1))
        total = nearest_E.sum()
        chosen.append(int(generator.choice(len(Z_EX), p=nearest_E / total if total > 0 else None)))
    return Z_EX[chosen]
