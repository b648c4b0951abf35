"""Greedy exchange of experts between the clusters of one layer."""

from __future__ import annotations

import numpy as np

from raymoe.clustering.plan import Clusters

ROUNDING = 1e-12
"""Gains up to this value count as zero."""


def objective(
    S_EE: np.ndarray, assignment_E: Clusters, load_E: np.ndarray, load_weight: float, n_clusters: int
) -> float:
    """Return J = (1/E) Σ_c Σ_{i,j in c} S_ij / n_c − load_weight x squared CV of the clusters' loads.

    With S = Z Zᵀ the first term is the share of the sum of squares of Z that k-means explains. Without load
    the second term is 0.
    """
    member_EC = np.asarray(assignment_E)[:, None] == np.arange(n_clusters)
    within_C = ((S_EE @ member_EC) * member_EC).sum(0) / np.maximum(member_EC.sum(0), 1)
    share_C = _shares(load_E) @ member_EC
    cv_squared = n_clusters * share_C @ share_C - 1 if share_C.any() else 0.0
    return float(within_C.sum() / len(S_EE) - load_weight * cv_squared)


def _shares(load_E: np.ndarray) -> np.ndarray:
    total = load_E.sum()
    return load_E / total if total > 0 else np.zeros(len(load_E))


def improve(
    S_EE: np.ndarray,
    assignment_E: Clusters,
    load_E: np.ndarray,
    *,
    proposal_E: Clusters,
    max_moves: int,
    load_weight: float,
    n_clusters: int,
    force: bool = False,
) -> tuple[np.ndarray, float]:
    """Return an improved assignment_E with the same cluster sizes, and the increase of the objective.

    Greedy: each turn takes the exchange with the highest gain per moved expert, until none gains or
    `max_moves` is reached. Candidates are all swaps between two clusters, and 3-cycles of experts that the
    proposal moves. An expert moves at most once. With `force`, the best swaps are taken up to `max_moves`,
    even at a loss.
    """
    before_E = np.asarray(assignment_E)
    after_E, total = before_E.copy(), 0.0
    while (left := max_moves - int((after_E != before_E).sum())) >= 2:
        gain_EE = _exchange_gains(S_EE, after_E, load_E, load_weight, n_clusters)
        moved_E = after_E != before_E
        gain_EE[moved_E] = gain_EE[:, moved_E] = -np.inf
        gain, experts = _best_swap(gain_EE)
        if left >= 3 and not force:
            cycle_gain, cycle = _best_cycle(gain_EE, np.flatnonzero((np.asarray(proposal_E) != before_E) & ~moved_E))
            if cycle_gain / 3 > gain / 2:
                gain, experts = cycle_gain, cycle
        if gain == -np.inf or (gain <= ROUNDING and not force):
            break
        after_E[experts] = after_E[np.roll(experts, -1)]
        total += gain
    return after_E, total


def random_swaps(assignment_E: Clusters, max_moves: int, generator: np.random.Generator) -> np.ndarray:
    """Return an assignment_E with the same cluster sizes after swaps of random experts of different clusters.

    An expert moves at most once. Swaps end at `max_moves`, or when all experts that did not move are in one cluster.
    """
    before_E = np.asarray(assignment_E)
    after_E = before_E.copy()
    for _ in range(max_moves // 2):
        stays_E = after_E == before_E
        pairs = np.argwhere(stays_E[:, None] & stays_E & (before_E[:, None] < before_E))
        if not len(pairs):
            break
        pair = pairs[generator.integers(len(pairs))]
        after_E[pair] = after_E[pair[::-1]]
    return after_E


def _exchange_gains(
    S_EE: np.ndarray, assignment_E: np.ndarray, load_E: np.ndarray, load_weight: float, n_clusters: int
) -> np.ndarray:
    """Return gain_EE[i, j]: increase of the term of j's cluster if i replaces j; −inf within a cluster.

    The objective is a sum over clusters, so a swap or a cycle gains the sum along its path.
    """
    member_EC = assignment_E[:, None] == np.arange(n_clusters)
    to_EC = S_EE @ member_EC
    own_E = np.take_along_axis(to_EC, assignment_E[:, None], 1)[:, 0]
    square_E = S_EE.diagonal()
    rise_EE = 2 * (to_EC[:, assignment_E] - own_E - S_EE) + square_E[:, None] + square_E
    share_E = _shares(load_E)
    share_C = share_E @ member_EC
    change_EE = share_E[:, None] - share_E
    load_EE = n_clusters * change_EE * (2 * share_C[assignment_E] + change_EE)
    gain_EE = rise_EE / (len(S_EE) * member_EC.sum(0)[assignment_E]) - load_weight * load_EE
    gain_EE[assignment_E[:, None] == assignment_E] = -np.inf
    return gain_EE


def _best_swap(gain_EE: np.ndarray) -> tuple[float, np.ndarray]:
    swap_EE = gain_EE + gain_EE.T
    experts = np.unravel_index(swap_EE.argmax(), swap_EE.shape)
    return float(swap_EE[experts]), np.array(experts)


def _best_cycle(gain_EE: np.ndarray, among: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the gain and the experts of the best 3-cycle; (−inf, empty) if there is no 3-cycle.

    The three experts are in three clusters. Each takes the place of the next.
    """
    best, experts = -np.inf, among[:0]
    gain_UU = gain_EE[np.ix_(among, among)]
    for first in range(len(among) - 2):
        rest = slice(first + 1, None)
        cycle_UU = gain_UU[first, rest, None] + gain_UU[rest, rest] + gain_UU[rest, first]
        if cycle_UU.max() > best:
            second, third = np.unravel_index(cycle_UU.argmax(), cycle_UU.shape)
            best = float(cycle_UU[second, third])
            experts = among[[first, first + 1 + second, first + 1 + third]]
    return best, experts
