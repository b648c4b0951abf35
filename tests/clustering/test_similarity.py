"""Both similarities against hand-computed values."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.clustering.similarity import NotSampled, similarity
from raymoe.clustering.statistics import GRAMS, Statistics
from tests.support.similar_experts import gram, statistics_of

seeds = st.integers(0, 2**32 - 1)
KINDS = {"counterfactual": ("residual", "answer"), "paper": ("weight",)}


def test_paper_similarity_by_hand() -> None:
    weights, inputs = np.array([[1.0, 0], [1, 1], [0, 0]]), np.array([[2.0, 0], [0, 3], [0, 0]])
    S = similarity(statistics_of({"weight": gram(weights[None])}, input_sum_LED=inputs[None]), "paper", 0.7)[0]
    r = 0.7 * np.sqrt(0.5)
    np.testing.assert_allclose(S, [[1, r, 0], [r, 1, 0], [0, 0, 1]], atol=1e-12)


def test_counterfactual_similarity_by_hand() -> None:
    """Outputs [3, 1, 2] without their mean are [1, −1, 0]: the common part does not count."""
    residuals, answers = np.eye(3), np.array([[3.0], [1], [2]])
    S = similarity(
        statistics_of({"residual": gram(residuals[None]), "answer": gram(answers[None])}), "counterfactual", 0.7
    )[0]
    np.testing.assert_allclose(S, [[1, -0.3, 0], [-0.3, 1, 0], [0, 0, 1]], atol=1e-9)


def test_equal_outputs_have_no_similarity() -> None:
    answers = np.repeat(np.random.default_rng(0).standard_normal((1, 1, 50)), 6, axis=1)
    stats = statistics_of({"residual": gram(np.eye(6)[None]), "answer": gram(answers)})
    np.testing.assert_array_equal(similarity(stats, "counterfactual", 0.7)[0], np.eye(6))


@pytest.mark.parametrize("kind", KINDS)
def test_similarity_requires_a_sample_of_every_layer(kind: str) -> None:
    full = {name: gram(np.ones((2, 4, 3))) for name in KINDS[kind]}
    similarity(statistics_of(full), kind, 0.7)
    for name in KINDS[kind]:
        partial = full[name] * np.array([1, 0])[:, None, None]
        with pytest.raises(NotSampled, match=f"no {name} gram yet in layers 1"):
            similarity(statistics_of(full | {name: partial}), kind, 0.7)
        rest = {other: value for other, value in full.items() if other != name}
        with pytest.raises(NotSampled, match=f"no {name} gram yet"):
            similarity(dataclasses.replace(statistics_of(full), gram=rest), kind, 0.7)


def test_unknown_similarity_is_refused() -> None:
    with pytest.raises(ValueError, match="counterfactual or paper"):
        similarity(Statistics.empty(1, 2, 3, 4, 0.05), "cosine", 0.7)


@settings(deadline=None, max_examples=30)
@given(seeds, st.sampled_from(sorted(KINDS)), st.floats(0, 1), st.floats(1e-6, 1e6))
def test_similarity_is_a_correlation_matrix(seed: int, kind: str, alpha: float, scale: float) -> None:
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((3, 2, 7, 4)) * generator.integers(0, 2, (3, 2, 7, 1))
    vectors[:, :, 0] = 1
    stats = statistics_of(
        {name: scale * gram(v) for name, v in zip(GRAMS, vectors, strict=True)},
        input_sum_LED=vectors[0],
    )
    S_LEE = similarity(stats, kind, alpha)
    for S_EE in S_LEE:
        np.testing.assert_array_equal(S_EE, S_EE.T)
        np.testing.assert_array_equal(np.diag(S_EE), 1)
        assert np.abs(S_EE).max() <= 1 and np.linalg.eigvalsh(S_EE)[0] > -1e-9
