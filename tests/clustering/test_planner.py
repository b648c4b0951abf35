"""The planner restores swapped experts, and plans nothing on noise."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.clustering.plan import RemapPlan, moves, validate
from raymoe.clustering.planner import NoPlan, NoPlanReason, make_plan, measured_gain
from raymoe.clustering.statistics import Statistics
from raymoe.config import RegroupSection
from raymoe.model.router import joint_scores
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


def test_a_forced_plan_of_kind_best_ignores_min_gain_but_needs_a_gain() -> None:
    stats, truth_LE = clustered(0, 3, 16, 4)
    before_LE = truth_LE.copy()
    before_LE[1] = with_swaps(truth_LE[1:2], 0)[0]
    strict = RegroupSection(min_gain=0.9, force=1, force_kind="best")
    assert isinstance(make_plan(stats, before_LE, regroup=strict, n_clusters=4, seed=0), NoPlan)
    plan = make_plan(stats, before_LE, regroup=strict, n_clusters=4, seed=0, force=True)
    assert isinstance(plan, RemapPlan) and plan.forced and plan.expected_gain > 0
    np.testing.assert_array_equal(plan.assignment, truth_LE)
    none = make_plan(stats, truth_LE, regroup=strict, n_clusters=4, seed=0, force=True)
    assert none == NoPlan(200, NoPlanReason.NOTHING_TO_GAIN, "the best layer gains 0 of min_gain 0", 0.0)


def test_a_forced_plan_of_kind_random_reports_its_loss() -> None:
    stats, truth_LE = clustered(0, 4, 32, 4)
    regroup = RegroupSection(max_moves=4, force=1, force_kind="random")
    plans = [make_plan(stats, truth_LE, regroup=regroup, n_clusters=4, seed=seed, force=True) for seed in (0, 0, 1)]
    first, again, other = plans
    assert isinstance(first, RemapPlan) and isinstance(other, RemapPlan)
    assert first == again and first.assignment != other.assignment and first.forced
    assert np.bincount([move.layer for move in moves(truth_LE, first.assignment)]).tolist() == [4] * 4
    mildest = make_plan(stats, truth_LE, regroup=RegroupSection(), n_clusters=4, seed=0, force=True)
    assert isinstance(mildest, RemapPlan) and first.expected_gain < mildest.expected_gain < 0
    measured = measured_gain(stats, truth_LE, first.assignment, regroup=regroup, n_clusters=4)
    assert measured == pytest.approx(first.expected_gain, abs=1e-9)


# Co-activation

COACTIVATION = RegroupSection(similarity="coactivation")


def made_up(seed: int, cluster_LE: np.ndarray, family_LE: np.ndarray, k: int, noise: float) -> Statistics:
    """Return counts of tokens of the same number of families, with routers in which experts of a family fit its tokens.

    A cluster's row of stage 1 is the mean of its experts' rows, as training would approach. Logits of each cluster have
    an offset of their own, which does not change the two-stage choice.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = []
    for cluster_E, family_E in zip(map(torch.tensor, cluster_LE), map(torch.tensor, family_LE), strict=True):
        n = int(family_E.max()) + 1
        direction_GD = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0][:n]
        x_TD = 4 * direction_GD.repeat(512 // n, 1) + noise * torch.randn(512 // n * n, 24, generator=generator)
        rows_ED = direction_GD[family_E] + 0.1 * torch.randn(len(family_E), 24, generator=generator)
        one_hot_CE = (cluster_E == torch.arange(n)[:, None]).float()
        first_CD = one_hot_CE @ rows_ED / one_hot_CE.sum(1, keepdim=True)
        offset_C = 3 * torch.randn(n, generator=generator)
        scores_TE = joint_scores(x_TD, first_CD, torch.zeros(n), rows_ED, offset_C[cluster_E], cluster_E)
        taken_TE = torch.zeros_like(scores_TE).scatter(1, scores_TE.topk(k).indices, 1.0)
        counts.append((taken_TE.t() @ taken_TE).double().numpy())
    return statistics_of({"coactivation": np.stack(counts)})


def purity(cluster_LE: np.ndarray, family_LE: np.ndarray) -> float:
    """Return the share of experts in the most frequent family of their cluster, the mean over layers."""
    shares = []
    for cluster_E, family_E in zip(cluster_LE, family_LE, strict=True):
        most = [np.bincount(family_E[cluster_E == c]).max() for c in np.unique(cluster_E)]
        shares.append(sum(most) / len(family_E))
    return float(np.mean(shares))


@pytest.mark.parametrize("noise", [0.9, 1.1])
@pytest.mark.parametrize(("experts", "clusters"), [(16, 4), (24, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_experts_that_are_wanted_together_come_together(seed: int, experts: int, clusters: int, noise: float) -> None:
    """From random clusters, plans end at the families or near them (a local optimum). A token takes half a family or more."""
    generator = np.random.default_rng(seed)
    family_LE, cluster_LE = (
        np.stack([generator.permutation(np.arange(experts) % clusters) for _ in range(2)]) for _ in range(2)
    )
    for period in range(20):
        stats = made_up(seed + period, cluster_LE, family_LE, 4, noise)
        plan = make_plan(stats, cluster_LE, regroup=COACTIVATION, n_clusters=clusters, seed=0)
        if isinstance(plan, NoPlan):
            break
        assert plan.expected_gain > 0
        cluster_LE = np.array(plan.assignment)
    assert purity(cluster_LE, family_LE) >= 0.9


@pytest.mark.parametrize("seed", range(8))
def test_no_plan_by_coactivation_on_noise(seed: int) -> None:
    """256 tokens take random experts. Without shrinkage, four moves seem to gain more than `min_gain`."""
    generator = np.random.default_rng(seed)
    taken_LTE = generator.random((4, 256, 32)).argsort(-1) < 4
    stats = statistics_of({"coactivation": gram(taken_LTE.swapaxes(1, 2).astype(float))})
    assignment = np.tile(np.arange(32) % 4, (4, 1))
    result = make_plan(stats, assignment, regroup=COACTIVATION, n_clusters=4, seed=0)
    assert isinstance(result, NoPlan) and result.expected_gain < 0.01


def test_most_of_the_gain_that_a_plan_by_coactivation_expects_is_found_on_other_tokens() -> None:
    """A planner takes the largest of many noisy gains. Two samples of 256 tokens show what remains of them."""
    expected, measured = [], []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        family_E, before = generator.permutation(np.arange(32) % 4), [np.arange(32) % 4]
        halves = []
        for _ in range(2):
            wish_T = generator.integers(4, size=256)
            scores_TE = 3.0 * (wish_T[:, None] == family_E) + generator.gumbel(size=(256, 32))
            taken_TE = (scores_TE.argsort(1).argsort(1) >= 28).astype(float)
            halves.append(statistics_of({"coactivation": gram(taken_TE.T[None])}))
        plan = make_plan(halves[0], before, regroup=COACTIVATION, n_clusters=4, seed=0)
        assert isinstance(plan, RemapPlan)
        expected.append(plan.expected_gain)
        measured.append(measured_gain(halves[1], before, plan.assignment, regroup=COACTIVATION, n_clusters=4))
    assert min(measured) > 0 and 0.75 < np.mean(measured) / np.mean(expected) < 1


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
