"""Exchanges of experts against the definition of the objective."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.clustering.exchange import improve, objective, random_swaps
from tests.support.similar_experts import points

seeds = st.integers(0, 2**32 - 1)


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return random similarities, clusters of 5, 4 and 3 experts, and loads."""
    generator = np.random.default_rng(seed)
    S_EE = points(seed) @ points(seed).T / 4
    return S_EE, generator.permutation([0] * 5 + [1] * 4 + [2] * 3), generator.gamma(1.0, size=12)


def by_definition(S_EE: np.ndarray, assignment_E: np.ndarray, load_E: np.ndarray, load_weight: float) -> float:
    total = 0.0
    for c in range(3):
        members = np.flatnonzero(assignment_E == c)
        total += sum(S_EE[i, j] for i in members for j in members) / len(members)
    loads = np.array([load_E[assignment_E == c].sum() for c in range(3)])
    return total / len(S_EE) - load_weight * (loads.std() / loads.mean()) ** 2


@settings(deadline=None, max_examples=50)
@given(seeds, st.floats(0, 1), st.integers(1, 12), st.booleans())
def test_gain_is_the_increase_of_the_objective(seed: int, load_weight: float, max_moves: int, force: bool) -> None:
    S_EE, before_E, load_E = problem(seed)
    proposal_E = np.roll(before_E, 1)
    after_E, gain = improve(
        S_EE, before_E, load_E, proposal_E=proposal_E, max_moves=max_moves, load_weight=load_weight, n_clusters=3,
        force=force,
    )  # fmt: skip
    rise = by_definition(S_EE, after_E, load_E, load_weight) - by_definition(S_EE, before_E, load_E, load_weight)
    assert gain == pytest.approx(rise, abs=1e-9)
    assert objective(S_EE, after_E, load_E, load_weight, 3) == pytest.approx(
        by_definition(S_EE, after_E, load_E, load_weight), abs=1e-9
    )
    np.testing.assert_array_equal(np.bincount(after_E), [5, 4, 3])
    moved = (after_E != before_E).sum()
    assert moved <= max_moves and (force or gain >= 0)
    if force:
        assert moved >= min(max_moves, 6) // 2 * 2


@settings(deadline=None, max_examples=50)
@given(seeds, st.floats(0, 1), st.booleans())
def test_first_swap_is_the_best_of_all_swaps(seed: int, load_weight: float, force: bool) -> None:
    S_EE, before_E, load_E = problem(seed)
    start = by_definition(S_EE, before_E, load_E, load_weight)
    best = -np.inf
    for i, j in itertools.combinations(range(12), 2):
        if before_E[i] != before_E[j]:
            swapped_E = before_E.copy()
            swapped_E[[i, j]] = before_E[[j, i]]
            best = max(best, by_definition(S_EE, swapped_E, load_E, load_weight) - start)
    after_E, gain = improve(
        S_EE, before_E, load_E, proposal_E=before_E, max_moves=2, load_weight=load_weight, n_clusters=3, force=force
    )
    assert gain == pytest.approx(best if force else max(best, 0), abs=1e-9)


def test_a_cycle_gains_where_every_swap_loses() -> None:
    """Each of three experts fits the next one's cluster and repels the third."""
    family = np.eye(3)
    before_E = np.repeat([0, 1, 2], 4)
    Z_EX = family[before_E].copy()
    for c in range(3):
        Z_EX[4 * c] = family[(c + 1) % 3] - 2 * family[(c + 2) % 3]
    truth_E = before_E.copy()
    truth_E[[0, 4, 8]] = [1, 2, 0]
    S_EE, load_E = Z_EX @ Z_EX.T, np.ones(12)

    def improved(proposal_E: np.ndarray, max_moves: int) -> tuple[np.ndarray, float]:
        return improve(
            S_EE, before_E, load_E, proposal_E=proposal_E, max_moves=max_moves, load_weight=0.1, n_clusters=3
        )

    after_E, gain = improved(before_E, 12)
    np.testing.assert_array_equal(after_E, before_E)
    assert gain == 0
    np.testing.assert_array_equal(improved(truth_E, 2)[0], before_E)
    after_E, gain = improved(truth_E, 3)
    np.testing.assert_array_equal(after_E, truth_E)
    assert gain > 0.1


@pytest.mark.parametrize(("load_weight", "moved"), [(0.0, 2), (0.1, 2), (10.0, 0)])
def test_load_term_prevents_an_unbalanced_swap(load_weight: float, moved: int) -> None:
    """Experts 0 and 4 fit each other's clusters, but the swap moves the loaded expert 4 to the loaded cluster."""
    family_E, before_E = np.array([1, 0, 0, 0, 0, 1, 1, 1]), np.repeat([0, 1], 4)
    S_EE = (family_E[:, None] == family_E).astype(float)
    load_E = np.array([1.0, 2, 2, 2, 4, 1, 1, 1])
    after_E, _ = improve(
        S_EE, before_E, load_E, proposal_E=family_E, max_moves=4, load_weight=load_weight, n_clusters=2
    )
    assert (after_E != before_E).sum() == moved


@settings(deadline=None, max_examples=50)
@given(seeds, st.permutations([0] * 5 + [1] * 4 + [2] * 3), st.integers(1, 14))
def test_random_swaps_keep_sizes_and_move_each_expert_at_most_once(seed: int, before: list[int], most: int) -> None:
    after_E = random_swaps(before, most, np.random.default_rng(seed))
    moved = int((after_E != before).sum())
    np.testing.assert_array_equal(np.bincount(after_E), [5, 4, 3])
    assert moved <= most and moved % 2 == 0
    # Swaps end early only where all others are in one cluster.
    assert moved == most // 2 * 2 or len(set(np.array(before)[after_E == before])) <= 1
    np.testing.assert_array_equal(random_swaps(before, most, np.random.default_rng(seed)), after_E)


def test_random_swaps_reach_all_pairs() -> None:
    before_E = np.repeat([0, 1], 3)
    found = {tuple(random_swaps(before_E, 2, np.random.default_rng(seed))) for seed in range(200)}
    assert len(found) == 9
