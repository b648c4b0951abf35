"""Similarities against hand-computed values."""

from __future__ import annotations

import dataclasses
import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.clustering.similarity import NEEDED, NotSampled, similarity
from raymoe.clustering.statistics import GRAMS, Statistics
from raymoe.config import RegroupSection
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


@pytest.mark.parametrize(("kind", "names"), [*KINDS.items(), ("coactivation", ("coactivation",))])
def test_similarity_requires_a_sample_of_every_layer(kind: str, names: tuple[str, ...]) -> None:
    full = {name: gram(np.ones((2, 4, 3))) for name in names}
    similarity(statistics_of(full), kind, 0.7)
    for name in names:
        partial = full[name] * np.array([1, 0])[:, None, None]
        with pytest.raises(NotSampled, match=f"no {name} gram yet in layers 1"):
            similarity(statistics_of(full | {name: partial}), kind, 0.7)
        rest = {other: value for other, value in full.items() if other != name}
        with pytest.raises(NotSampled, match=f"no {name} gram yet"):
            similarity(dataclasses.replace(statistics_of(full), gram=rest), kind, 0.7)


def test_unknown_similarity_is_refused() -> None:
    with pytest.raises(ValueError, match="one of counterfactual, paper, coactivation"):
        similarity(Statistics.empty(1, 2, 3, 4, 0.05), "cosine", 0.7)


@settings(deadline=None, max_examples=30)
@given(seeds, st.sampled_from(sorted(KINDS)), st.floats(0, 1), st.floats(1e-6, 1e6))
def test_similarity_is_a_correlation_matrix(seed: int, kind: str, alpha: float, scale: float) -> None:
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((3, 2, 7, 4)) * generator.integers(0, 2, (3, 2, 7, 1))
    vectors[:, :, 0] = 1
    stats = statistics_of(
        {name: scale * gram(v) for name, v in zip(GRAMS, vectors, strict=False)},
        input_sum_LED=vectors[0],
    )
    S_LEE = similarity(stats, kind, alpha)
    for S_EE in S_LEE:
        np.testing.assert_array_equal(S_EE, S_EE.T)
        np.testing.assert_array_equal(np.diag(S_EE), 1)
        assert np.abs(S_EE).max() <= 1 and np.linalg.eigvalsh(S_EE)[0] > -1e-9


def test_every_similarity_of_the_config_names_its_grams() -> None:
    assert list(NEEDED) == list(typing.get_args(typing.get_type_hints(RegroupSection)["similarity"]))
    assert {name for names in NEEDED.values() for name in names} == set(GRAMS)


# Co-activation


def counts(taken_TE: np.ndarray) -> np.ndarray:
    return gram(taken_TE.T.astype(float)[None])


def test_coactivation_by_hand() -> None:
    """Tokens take experts 0 and 1, or 2 and 3, a hundred times each; the counts by chance are 50."""
    taken_TE = np.repeat([[1, 1, 0, 0], [0, 0, 1, 1]], 100, axis=0)
    S = similarity(statistics_of({"coactivation": counts(taken_TE)}), "coactivation", 0.7)[0]
    # Off the diagonal: 4 values of 1 and 8 of -1, so their variance is 8/9, and 1/200 of it is noise.
    kept = 1 - 9 / 8 / 200
    np.testing.assert_allclose(S, np.where(np.eye(4), 1, kept * np.kron(2 * np.eye(2) - 1, np.ones((2, 2)))))


def choices(seed: int, tokens: int, experts: int, k: int) -> np.ndarray:
    """Return the indicators of random choices of k experts, with a random popularity of each expert."""
    generator = np.random.default_rng(seed)
    scores_TE = generator.gumbel(size=(tokens, experts)) + 0.5 * generator.standard_normal(experts)
    return (scores_TE.argsort(1).argsort(1) >= experts - k).astype(float)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 5), st.integers(2, 300))
def test_coactivation_is_a_correlation_of_choices_times_a_factor(seed: int, k: int, tokens: int) -> None:
    taken_TE = choices(seed, tokens, 6, k)
    S = similarity(statistics_of({"coactivation": counts(taken_TE)}), "coactivation", 0.3)[0]
    np.testing.assert_array_equal(np.diag(S), 1)
    np.testing.assert_array_equal(S, S.T)
    assert np.abs(S).max() <= 1 and np.linalg.eigvalsh(S)[0] > -1e-9
    if ((taken_TE.mean(0) > 0) & (taken_TE.mean(0) < 1)).all():
        plain, rest = np.corrcoef(taken_TE.T), ~np.eye(6, dtype=bool)
        factor = max(0.0, 1 - 1 / tokens / plain[rest].var()) if plain[rest].var() > 1e-12 else 0.0
        np.testing.assert_allclose(S[rest], factor * plain[rest], atol=1e-9)


def test_experts_that_all_tokens_take_or_none_have_no_similarity() -> None:
    taken_TE = np.concatenate([np.ones((50, 1)), np.zeros((50, 1)), choices(0, 50, 6, 2)], axis=1)
    S = similarity(statistics_of({"coactivation": counts(taken_TE)}), "coactivation", 0.7)[0]
    np.testing.assert_array_equal(S[:2], np.eye(8)[:2])
