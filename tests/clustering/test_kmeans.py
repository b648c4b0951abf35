"""Balanced k-means keeps sizes and finds families."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.clustering.kmeans import align, balanced_kmeans, embed
from tests.support.similar_experts import points

seeds = st.integers(0, 2**32 - 1)


def explained(Z_EX: np.ndarray, assignment_E: np.ndarray) -> float:
    return sum(
        float((Z_EX[assignment_E == c].sum(0) ** 2).sum()) / (assignment_E == c).sum() for c in set(assignment_E)
    )


@given(seeds)
def test_embedding_reproduces_the_inner_products(seed: int) -> None:
    S_EE = points(seed) @ points(seed).T
    Z_EX = embed(S_EE)
    np.testing.assert_allclose(Z_EX @ Z_EX.T, S_EE, atol=1e-9)
    assert Z_EX.shape == (12, 4)


@settings(deadline=None)
@given(seeds, st.permutations([0] * 5 + [1] * 4 + [2] * 3), st.booleans())
def test_kmeans_keeps_sizes_improves_its_start_and_is_idempotent(seed: int, start: list[int], warm: bool) -> None:
    Z_EX = points(seed)
    found_E = balanced_kmeans(Z_EX, [5, 4, 3], start if warm else None, seed)
    np.testing.assert_array_equal(np.bincount(found_E), [5, 4, 3])
    if warm:
        assert explained(Z_EX, found_E) >= explained(Z_EX, np.array(start)) - 1e-9
    again_E = balanced_kmeans(Z_EX, [5, 4, 3], found_E, seed)
    assert explained(Z_EX, again_E) == pytest.approx(explained(Z_EX, found_E), abs=1e-9)
    np.testing.assert_array_equal(found_E, balanced_kmeans(Z_EX, [5, 4, 3], start if warm else None, seed))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("experts", "clusters"), [(16, 4), (32, 4), (64, 8)])
def test_kmeans_plus_plus_finds_families(seed: int, experts: int, clusters: int) -> None:
    family_E = np.random.default_rng(seed).permutation(np.arange(experts) % clusters)
    S_EE = 0.3 * (family_E[:, None] == family_E) + 0.7 * np.eye(experts)
    found_E = balanced_kmeans(embed(S_EE), [experts // clusters] * clusters, None, seed)
    np.testing.assert_array_equal(align(found_E, family_E, clusters), family_E)


def test_coinciding_points_get_the_requested_sizes() -> None:
    np.testing.assert_array_equal(np.bincount(balanced_kmeans(np.zeros((6, 1)), [2, 2, 2], None, 0)), [2, 2, 2])


def test_sizes_must_sum_to_the_points() -> None:
    with pytest.raises(ValueError, match=r"sizes \[3, 3\] sum to 6, expected 12"):
        balanced_kmeans(points(0), [3, 3], None, 0)


def test_align_keeps_cluster_ids() -> None:
    np.testing.assert_array_equal(align([2, 2, 0, 0, 1, 1], [0, 0, 1, 2, 2, 2], 3), [0, 0, 1, 1, 2, 2])
