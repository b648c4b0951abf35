"""The planner restores swapped experts, and plans nothing on noise."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.clustering.plan import RemapPlan, moves, validate
from raymoe.clustering.planner import NoPlan, NoPlanReason, make_plan, measured_gain
from raymoe.clustering.statistics import Statistics
from raymoe.config import RegroupSection
from tests.support.similar_experts import clustered, families, gram, statistics_of, with_swaps

seeds = st.integers(0, 2**32 - 1)


SHAPES = [(2, 16, 4), (4, 32, 4), (2, 18, 4)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("layers", "experts", "clusters"), SHAPES)
def test_swapped_experts_are_restored(layers: int, experts: int, clusters: int, seed: int) -> None:
    stats, truth_LE = clustered(seed, layers, experts, clusters)
    before_LE = with_swaps(truth_LE, seed)
    plan = make_plan(stats, before_LE, regroup=RegroupSection(), n_clusters=clusters, seed=0)
    assert isinstance(plan, RemapPlan)
    np.testing.assert_array_equal(plan.assignment, truth_LE)
    assert (plan.version, plan.made_at_step, plan.effective_step) == (4, 200, 220)
    assert not plan.forced and len(moves(before_LE, plan.assignment)) == 2 * layers
    measured = measured_gain(stats, before_LE, plan.assignment, regroup=RegroupSection(), n_clusters=clusters)
    assert measured == pytest.approx(plan.expected_gain, abs=1e-9)
    assert validate(
        plan, version=3, assignment=before_LE, step=220, n_clusters=clusters, max_moves=4, min_members=2
    ) is None  # fmt: skip


def test_only_layers_that_gain_change() -> None:
    stats, truth_LE = clustered(0, 3, 16, 4)
    before_LE = truth_LE.copy()
    before_LE[1] = with_swaps(truth_LE[1:2], 0)[0]
    plan = make_plan(stats, before_LE, regroup=RegroupSection(), n_clusters=4, seed=0)
    assert isinstance(plan, RemapPlan) and len(moves(before_LE, plan.assignment)) == 2
    assert {move.layer for move in moves(before_LE, plan.assignment)} == {1}


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_for_a_correct_assignment(seed: int) -> None:
    stats, truth_LE = clustered(seed, 4, 32, 4)
    result = make_plan(stats, truth_LE, regroup=RegroupSection(), n_clusters=4, seed=0)
    assert result == NoPlan(200, NoPlanReason.NOTHING_TO_GAIN, "the best layer gains 0 of min_gain 0.01", 0.0)


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_on_noise(seed: int) -> None:
    """Residuals are independent, so some swap gains a little by chance."""
    generator = np.random.default_rng(seed)
    stats = statistics_of({name: gram(generator.standard_normal((4, 32, 4000))) for name in ("residual", "answer")})
    assignment = np.tile(np.arange(32) % 4, (4, 1))
    result = make_plan(stats, assignment, regroup=RegroupSection(), n_clusters=4, seed=0)
    assert isinstance(result, NoPlan) and result.reason is NoPlanReason.NOTHING_TO_GAIN
    assert 0 < result.expected_gain < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_paper_similarity_confirms_the_current_assignment(seed: int) -> None:
    """Bases dominate residuals and inputs follow the assignment, so injected swaps stay undetected.

    The counterfactual similarity restores the same swaps; it is the default for this reason.
    """
    stats, truth_LE = clustered(seed, 2, 16, 4)
    before_LE = with_swaps(truth_LE, seed)
    generator = np.random.default_rng(seed)
    residuals, _ = families(seed, 2, 16, 4)
    bases_LCX, routed_LCD = generator.standard_normal((2, 4, 400)), generator.standard_normal((2, 4, 64))
    weights = 5 * np.take_along_axis(bases_LCX, before_LE[:, :, None], 1) + residuals
    inputs = np.take_along_axis(routed_LCD, before_LE[:, :, None], 1) + 0.3 * generator.standard_normal((2, 16, 64))
    stats = dataclasses.replace(stats, gram=stats.gram | {"weight": gram(weights)}, input_sum_LED=inputs)
    restored = make_plan(stats, before_LE, regroup=RegroupSection(), n_clusters=4, seed=0)
    assert isinstance(restored, RemapPlan)
    np.testing.assert_array_equal(restored.assignment, truth_LE)
    for assignment in (before_LE, truth_LE):
        weights_stay = np.array_equal(assignment, before_LE)
        plan = make_plan(stats, assignment, regroup=RegroupSection(similarity="paper"), n_clusters=4, seed=0)
        assert isinstance(plan, NoPlan) == weights_stay


def test_forced_plan_moves_experts_in_every_layer() -> None:
    stats, truth_LE = clustered(0, 4, 32, 4)
    for max_moves in (2, 3, 4):
        plan = make_plan(stats, truth_LE, regroup=RegroupSection(max_moves=max_moves), n_clusters=4, seed=0, force=True)
        assert isinstance(plan, RemapPlan) and plan.forced and plan.expected_gain < 0
        per_layer = np.bincount([move.layer for move in moves(truth_LE, plan.assignment)])
        assert per_layer.tolist() == [max_moves // 2 * 2] * 4


def test_no_plan_without_samples() -> None:
    result = make_plan(
        Statistics.empty(1, 2, 4, 3, 0.05), [[0, 0, 1, 1]] * 2, regroup=RegroupSection(), n_clusters=2, seed=0
    )
    assert result == NoPlan(0, NoPlanReason.NOT_SAMPLED, "no residual gram yet", 0.0)


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_make_plan_is_deterministic_and_its_plans_are_valid(seed: int) -> None:
    generator = np.random.default_rng(seed)
    stats = statistics_of(
        {name: gram(generator.standard_normal((2, 12, 5))) for name in ("residual", "answer")},
        count_LE=generator.gamma(1.0, size=(2, 12)),
    )
    assignment = np.stack([generator.permutation(np.arange(12) % 3) for _ in range(2)])
    first, second = (
        make_plan(stats, assignment, regroup=RegroupSection(min_gain=0.0), n_clusters=3, seed=seed) for _ in range(2)
    )
    assert first == second
    if isinstance(first, RemapPlan):
        assert RemapPlan.from_dict(json.loads(json.dumps(first.to_dict()))) == first
        assert first.expected_gain > 0
        options: Any = {"version": 3, "assignment": assignment, "step": 1, "n_clusters": 3, "min_members": 4}
        assert validate(first, max_moves=4, **options) is None


def test_measured_gain_without_changes_is_zero() -> None:
    stats, truth_LE = clustered(0, 2, 16, 4)
    assert measured_gain(stats, truth_LE, truth_LE, regroup=RegroupSection(), n_clusters=4) == 0
