"""Statistics merge in any order, and the planner mends what is planted, and nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from raymoe.clustering.kmeans import align, balanced_kmeans, embed
from raymoe.clustering.plan import (
    Move,
    NoPlan,
    RemapPlan,
    improve,
    make,
    measured_gain,
    moves,
    objective,
    purity,
    validate,
)
from raymoe.clustering.similarity import NotSampled, similarity
from raymoe.clustering.statistics import GRAMS, Statistics, check, merge
from raymoe.config import RegroupSection

seeds = st.integers(0, 2**32 - 1)
KINDS = {"counterfactual": ("residual", "answer"), "paper": ("weight",)}


def gram(vectors_LEX: np.ndarray) -> np.ndarray:
    return vectors_LEX @ vectors_LEX.swapaxes(1, 2)


def tell(grams: dict[str, np.ndarray], count_LE: Any = None, input_sum_LED: Any = None, **meta: Any) -> Statistics:
    """Statistics that say just this; uniform load unless told."""
    layers, experts, _ = next(iter(grams.values())).shape
    empty = Statistics.empty(3, layers, experts, 2 if input_sum_LED is None else input_sum_LED.shape[2], 0.05, step=200)
    return dataclasses.replace(
        empty,
        gram=grams,
        count_LE=np.ones((layers, experts)) if count_LE is None else count_LE,
        input_sum_LED=empty.input_sum_LED if input_sum_LED is None else input_sum_LED,
        **meta,
    )


# Statistics


def gathered(events: list[tuple[int, int, int, int]], step: int) -> Statistics:
    """The definition: sums over (step, layer, expert, seed of the input), decayed to `step`."""
    stats = Statistics.empty(1, 2, 3, 4, 0.05, step)
    grams = {"residual": np.zeros((2, 3, 3))} if events else {}
    for at, layer, expert, seed in events:
        weight = 0.95 ** (step - at)
        x_D, a_EX = (np.random.default_rng(seed).standard_normal(shape) for shape in (4, (3, 5)))
        stats.rows_LE[layer, expert] += 1
        stats.count_LE[layer, expert] += weight
        stats.input_sum_LED[layer, expert] += weight * x_D
        grams["residual"][layer] += weight * (a_EX @ a_EX.T)
    return dataclasses.replace(stats, gram=grams, sampled=len(events))


def assert_same(a: Statistics, b: Statistics) -> None:
    assert (a.version, a.step, a.beta, a.sampled) == (b.version, b.step, b.beta, b.sampled)
    np.testing.assert_array_equal(a.rows_LE, b.rows_LE)
    np.testing.assert_allclose(a.count_LE, b.count_LE, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(a.input_sum_LED, b.input_sum_LED, rtol=1e-9, atol=1e-9)
    assert a.gram.keys() == b.gram.keys()
    for name in a.gram:
        np.testing.assert_allclose(a.gram[name], b.gram[name], rtol=1e-9, atol=1e-9)


events = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 1), st.integers(0, 2), seeds), max_size=12)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(events, st.integers(0, 20)), min_size=1, max_size=4), st.randoms())
def test_merged_parts_are_the_statistics_of_the_union(parts: list[tuple[list, int]], random: Any) -> None:
    """Whatever the order, the grouping, and the steps that parts were decayed to."""
    told = [gathered(part, max((event[0] for event in part), default=0) + later) for part, later in parts]
    union = gathered([event for part, _ in parts for event in part], max(stats.step for stats in told))
    while len(told) > 1:
        a, b = (told.pop(random.randrange(len(told))) for _ in range(2))
        told.append(merge(a, b))
    assert_same(told[0], union)


@settings(deadline=None, max_examples=30)
@given(st.tuples(events, events, events), st.tuples(*[st.integers(0, 2)] * 3))
def test_merge_is_associative_and_commutative_across_versions_too(parts: Any, versions: Any) -> None:
    a, b, c = (
        dataclasses.replace(gathered(part, 310), version=version) for part, version in zip(parts, versions, strict=True)
    )
    assert_same(merge(a, b), merge(b, a))
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))


def test_a_newer_version_voids_the_older() -> None:
    old, new = gathered([(9, 0, 0, 1)], 300), dataclasses.replace(gathered([(5, 1, 1, 1)], 10), version=2)
    assert merge(old, new) is merge(new, old) is new


def test_what_does_not_merge() -> None:
    a = Statistics.empty(1, 2, 3, 4, 0.05)
    with pytest.raises(ValueError, match="shapes"):
        merge(a, Statistics.empty(1, 2, 3, 5, 0.05))
    with pytest.raises(ValueError, match=r"beta 0.05 and 0.1"):
        merge(a, Statistics.empty(1, 2, 3, 4, 0.1))


def test_the_past_cannot_be_seen_again() -> None:
    with pytest.raises(ValueError, match="up to step 7"):
        Statistics.empty(1, 2, 3, 4, 0.05, step=7).decayed_to(6)


def test_statistics_survive_safetensors() -> None:
    stats = gathered([(3, 0, 1, 5), (9, 1, 2, 6)], 12)
    assert_same(Statistics.from_arrays(load(save(stats.arrays()))), stats)
    arrays = stats.arrays()
    del arrays["count"]
    with pytest.raises(ValueError, match="without 'count'"):
        Statistics.from_arrays(arrays)


GOOD = gathered([(3, 0, 1, 5)], 12)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 1.0}, "version=1.0"),
        ({"version": True}, "version=True"),
        ({"step": -1}, "step=-1"),
        ({"sampled": -3}, "sampled=-3"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"rows_LE": GOOD.count_LE}, r"rows_LE is float64\[2, 3\], expected int64\[2, 3\]"),
        ({"rows_LE": GOOD.rows_LE - 1}, "rows_LE has negative counts"),
        ({"count_LE": -GOOD.count_LE}, "count_LE has negative counts"),
        ({"count_LE": GOOD.count_LE * np.nan}, "count_LE has values that are not finite"),
        ({"count_LE": GOOD.count_LE.tolist()}, "count_LE is list"),
        ({"count_LE": GOOD.count_LE.astype(object)}, "count_LE is object"),
        ({"input_sum_LED": GOOD.input_sum_LED[:, :, :2]}, "input_sum_LED is"),
        ({"input_sum_LED": GOOD.input_sum_LED + np.inf}, "input_sum_LED has values that are not finite"),
        ({"gram": {"other": GOOD.gram["residual"]}}, "gram must be a dict with keys among"),
        ({"gram": [1]}, "gram must be a dict"),
        ({"gram": {"answer": np.zeros((2, 3, 4))}}, "gram 'answer' is"),
        ({"gram": {"answer": -GOOD.gram["residual"]}}, "gram 'answer' has negative squares"),
    ],
)
def test_garbage_is_named(change: dict[str, Any], reason: str) -> None:
    check(GOOD, 2, 3, 4)
    with pytest.raises(ValueError, match=reason):
        check(dataclasses.replace(GOOD, **change), 2, 3, 4)


def test_a_stranger_is_no_statistics() -> None:
    with pytest.raises(ValueError, match="dict is not statistics"):
        check({}, 2, 3, 4)  # type: ignore[arg-type]


# Similarity


def test_equation_1_by_hand() -> None:
    weights, inputs = np.array([[1.0, 0], [1, 1], [0, 0]]), np.array([[2.0, 0], [0, 3], [0, 0]])
    S = similarity(tell({"weight": gram(weights[None])}, input_sum_LED=inputs[None]), "paper", 0.7)[0]
    r = 0.7 * np.sqrt(0.5)
    np.testing.assert_allclose(S, [[1, r, 0], [r, 1, 0], [0, 0, 1]], atol=1e-12)


def test_counterfactual_by_hand() -> None:
    """Answers [3, 1, 2] less their mean are [1, −1, 0]: what all experts say alike says nothing."""
    residuals, answers = np.eye(3), np.array([[3.0], [1], [2]])
    S = similarity(tell({"residual": gram(residuals[None]), "answer": gram(answers[None])}), "counterfactual", 0.7)[0]
    np.testing.assert_allclose(S, [[1, -0.3, 0], [-0.3, 1, 0], [0, 0, 1]], atol=1e-9)


def test_equal_answers_are_alike_in_nothing() -> None:
    answers = np.repeat(np.random.default_rng(0).standard_normal((1, 1, 50)), 6, axis=1)
    stats = tell({"residual": gram(np.eye(6)[None]), "answer": gram(answers)})
    np.testing.assert_array_equal(similarity(stats, "counterfactual", 0.7)[0], np.eye(6))


@pytest.mark.parametrize("kind", KINDS)
def test_similarity_waits_for_every_layer(kind: str) -> None:
    full = {name: gram(np.ones((2, 4, 3))) for name in KINDS[kind]}
    similarity(tell(full), kind, 0.7)
    for name in KINDS[kind]:
        partial = full[name] * np.array([1, 0])[:, None, None]
        with pytest.raises(NotSampled, match=f"no {name} gram yet in layers 1"):
            similarity(tell(full | {name: partial}), kind, 0.7)
        rest = {other: value for other, value in full.items() if other != name}
        with pytest.raises(NotSampled, match=f"no {name} gram yet"):
            similarity(dataclasses.replace(tell(full), gram=rest), kind, 0.7)


def test_an_unknown_similarity() -> None:
    with pytest.raises(ValueError, match="counterfactual or paper"):
        similarity(GOOD, "cosine", 0.7)


@settings(deadline=None, max_examples=30)
@given(seeds, st.sampled_from(sorted(KINDS)), st.floats(0, 1), st.floats(1e-6, 1e6))
def test_similarity_is_a_correlation_matrix(seed: int, kind: str, alpha: float, scale: float) -> None:
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((3, 2, 7, 4)) * generator.integers(0, 2, (3, 2, 7, 1))
    vectors[:, :, 0] = 1
    stats = tell(
        {name: scale * gram(v) for name, v in zip(GRAMS, vectors, strict=True)},
        input_sum_LED=vectors[0],
    )
    S_LEE = similarity(stats, kind, alpha)
    for S_EE in S_LEE:
        np.testing.assert_array_equal(S_EE, S_EE.T)
        np.testing.assert_array_equal(np.diag(S_EE), 1)
        assert np.abs(S_EE).max() <= 1 and np.linalg.eigvalsh(S_EE)[0] > -1e-9


# k-means


def points(seed: int, experts: int = 12, dims: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((experts, dims))


def explained(Z_EX: np.ndarray, assignment_E: np.ndarray) -> float:
    return sum(
        float((Z_EX[assignment_E == c].sum(0) ** 2).sum()) / (assignment_E == c).sum() for c in set(assignment_E)
    )


@given(seeds)
def test_the_embedding_has_the_products(seed: int) -> None:
    S_EE = points(seed) @ points(seed).T
    Z_EX = embed(S_EE)
    np.testing.assert_allclose(Z_EX @ Z_EX.T, S_EE, atol=1e-9)
    assert Z_EX.shape == (12, 4)


@settings(deadline=None)
@given(seeds, st.permutations([0] * 5 + [1] * 4 + [2] * 3), st.booleans())
def test_k_means_never_falls_keeps_sizes_and_stays(seed: int, start: list[int], warm: bool) -> None:
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
def test_k_means_plus_plus_finds_families(seed: int, experts: int, clusters: int) -> None:
    family_E = np.random.default_rng(seed).permutation(np.arange(experts) % clusters)
    S_EE = 0.3 * (family_E[:, None] == family_E) + 0.7 * np.eye(experts)
    found_E = balanced_kmeans(embed(S_EE), [experts // clusters] * clusters, None, seed)
    np.testing.assert_array_equal(align(found_E, family_E, clusters), family_E)


def test_points_that_coincide_are_clustered_too() -> None:
    np.testing.assert_array_equal(np.bincount(balanced_kmeans(np.zeros((6, 1)), [2, 2, 2], None, 0)), [2, 2, 2])


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"clusters of \[3, 3\] do not hold 12"):
        balanced_kmeans(points(0), [3, 3], None, 0)


def test_align_keeps_names() -> None:
    np.testing.assert_array_equal(align([2, 2, 0, 0, 1, 1], [0, 0, 1, 2, 2, 2], 3), [0, 0, 1, 1, 2, 2])


# Improving a layer


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Similarities, clusters of 5, 4 and 3, loads."""
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
def test_the_gain_is_the_rise_of_the_objective(seed: int, load_weight: float, max_moves: int, force: bool) -> None:
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
def test_the_first_swap_is_the_best_of_all(seed: int, load_weight: float, force: bool) -> None:
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


def test_a_cycle_that_no_swap_begins() -> None:
    """Each of three experts fits the next one's cluster and repels the third: every swap hurts, the cycle gains."""
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
def test_load_stands_in_the_way(load_weight: float, moved: int) -> None:
    """Experts 0 and 4 fit each other's clusters, but 4 is busy and its place is among the busy."""
    family_E, before_E = np.array([1, 0, 0, 0, 0, 1, 1, 1]), np.repeat([0, 1], 4)
    S_EE = (family_E[:, None] == family_E).astype(float)
    load_E = np.array([1.0, 2, 2, 2, 4, 1, 1, 1])
    after_E, _ = improve(
        S_EE, before_E, load_E, proposal_E=family_E, max_moves=4, load_weight=load_weight, n_clusters=2
    )
    assert (after_E != before_E).sum() == moved


# Plans


def families(seed: int, layers: int, experts: int, clusters: int, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(vectors_LEX, family_LE): experts of a family share a direction; cos within is 1 / (1 + noise²)."""
    generator = np.random.default_rng(seed)
    family_LE = np.stack([generator.permutation(np.arange(experts) % clusters) for _ in range(layers)])
    direction_LCX = generator.standard_normal((layers, clusters, 400))
    shared_LEX = np.take_along_axis(direction_LCX, family_LE[:, :, None], 1)
    return shared_LEX + noise * generator.standard_normal((layers, experts, 400)), family_LE


def with_swaps(family_LE: np.ndarray, seed: int) -> np.ndarray:
    """The same with two experts of different clusters swapped in each layer."""
    generator, swapped_LE = np.random.default_rng(seed), family_LE.copy()
    for row in swapped_LE:
        i, j = (generator.choice(np.flatnonzero(row == c)) for c in generator.choice(row.max() + 1, 2, replace=False))
        row[i], row[j] = row[j], row[i]
    return swapped_LE


def clustered(seed: int, layers: int, experts: int, clusters: int) -> tuple[Statistics, np.ndarray]:
    """Statistics of residuals in families, whose answers tell them apart too under a common mean."""
    residuals, family_LE = families(seed, layers, experts, clusters)
    answers = residuals @ np.random.default_rng(seed).standard_normal((400, 300)) / 20 + 3
    return tell({"residual": gram(residuals), "answer": gram(answers)}), family_LE


SHAPES = [(2, 16, 4), (4, 32, 4), (2, 18, 4)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("layers", "experts", "clusters"), SHAPES)
def test_planted_swaps_are_restored(layers: int, experts: int, clusters: int, seed: int) -> None:
    stats, truth_LE = clustered(seed, layers, experts, clusters)
    before_LE = with_swaps(truth_LE, seed)
    plan = make(stats, before_LE, regroup=RegroupSection(), n_clusters=clusters, seed=0)
    assert isinstance(plan, RemapPlan)
    np.testing.assert_array_equal(plan.assignment, truth_LE)
    assert (plan.version, plan.made_at_step, plan.effective_step) == (4, 200, 220)
    assert plan.reason == f"gain {plan.expected_gain:.3g} by {2 * layers} moves in {layers} layers"
    seen = measured_gain(stats, before_LE, plan.assignment, regroup=RegroupSection(), n_clusters=clusters)
    assert seen == pytest.approx(plan.expected_gain, abs=1e-9)
    assert validate(
        plan, version=3, assignment=before_LE, step=220, n_clusters=clusters, max_moves=4, min_members=2
    ) is None  # fmt: skip


def test_only_layers_that_gain_change() -> None:
    stats, truth_LE = clustered(0, 3, 16, 4)
    before_LE = truth_LE.copy()
    before_LE[1] = with_swaps(truth_LE[1:2], 0)[0]
    plan = make(stats, before_LE, regroup=RegroupSection(), n_clusters=4, seed=0)
    assert isinstance(plan, RemapPlan) and "2 moves in 1 layers" in plan.reason
    assert {move.layer for move in moves(before_LE, plan.assignment)} == {1}


@pytest.mark.parametrize("seed", range(4))
def test_what_is_right_stays(seed: int) -> None:
    stats, truth_LE = clustered(seed, 4, 32, 4)
    refusal = make(stats, truth_LE, regroup=RegroupSection(), n_clusters=4, seed=0)
    assert refusal == NoPlan(200, "nothing to gain: best layer gains 0 of min_gain 0.01", 0.0)


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_nothing_to_gain(seed: int) -> None:
    """Independent residuals: some swap always gains a little, by chance."""
    generator = np.random.default_rng(seed)
    stats = tell({name: gram(generator.standard_normal((4, 32, 4000))) for name in ("residual", "answer")})
    assignment = np.tile(np.arange(32) % 4, (4, 1))
    refusal = make(stats, assignment, regroup=RegroupSection(), n_clusters=4, seed=0)
    assert isinstance(refusal, NoPlan) and refusal.reason.startswith("nothing to gain: best layer gains 0.00")
    assert 0 < refusal.expected_gain < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_the_paper_s_similarity_confirms_whatever_is(seed: int) -> None:
    """Factored experts: bases dwarf residuals and inputs are the cluster's, so that planted swaps stay unseen.

    The counterfactual similarity restores the same swaps. This is why it is the default.
    """
    stats, truth_LE = clustered(seed, 2, 16, 4)
    before_LE = with_swaps(truth_LE, seed)
    generator = np.random.default_rng(seed)
    residuals, _ = families(seed, 2, 16, 4)
    bases_LCX, routed_LCD = generator.standard_normal((2, 4, 400)), generator.standard_normal((2, 4, 64))
    weights = 5 * np.take_along_axis(bases_LCX, before_LE[:, :, None], 1) + residuals
    inputs = np.take_along_axis(routed_LCD, before_LE[:, :, None], 1) + 0.3 * generator.standard_normal((2, 16, 64))
    stats = dataclasses.replace(stats, gram=stats.gram | {"weight": gram(weights)}, input_sum_LED=inputs)
    restored = make(stats, before_LE, regroup=RegroupSection(), n_clusters=4, seed=0)
    assert isinstance(restored, RemapPlan)
    np.testing.assert_array_equal(restored.assignment, truth_LE)
    for assignment in (before_LE, truth_LE):
        weights_stay = np.array_equal(assignment, before_LE)
        plan = make(stats, assignment, regroup=RegroupSection(similarity="paper"), n_clusters=4, seed=0)
        assert isinstance(plan, NoPlan) == weights_stay


def test_a_forced_plan_moves_in_every_layer() -> None:
    stats, truth_LE = clustered(0, 4, 32, 4)
    for max_moves in (2, 3, 4):
        plan = make(stats, truth_LE, regroup=RegroupSection(max_moves=max_moves), n_clusters=4, seed=0, force=True)
        assert isinstance(plan, RemapPlan) and plan.reason == "forced" and plan.expected_gain < 0
        per_layer = np.bincount([move.layer for move in moves(truth_LE, plan.assignment)])
        assert per_layer.tolist() == [max_moves // 2 * 2] * 4


def test_without_samples_there_is_no_plan() -> None:
    refusal = make(
        Statistics.empty(1, 2, 4, 3, 0.05), [[0, 0, 1, 1]] * 2, regroup=RegroupSection(), n_clusters=2, seed=0
    )
    assert refusal == NoPlan(0, "not sampled: no residual gram yet", 0.0)


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_make_is_a_function(seed: int) -> None:
    generator = np.random.default_rng(seed)
    stats = tell(
        {name: gram(generator.standard_normal((2, 12, 5))) for name in ("residual", "answer")},
        count_LE=generator.gamma(1.0, size=(2, 12)),
    )
    assignment = np.stack([generator.permutation(np.arange(12) % 3) for _ in range(2)])
    first, second = (
        make(stats, assignment, regroup=RegroupSection(min_gain=0.0), n_clusters=3, seed=seed) for _ in range(2)
    )
    assert first == second
    if isinstance(first, RemapPlan):
        assert RemapPlan.from_dict(json.loads(json.dumps(first.to_dict()))) == first
        assert first.expected_gain > 0
        options: Any = {"version": 3, "assignment": assignment, "step": 1, "n_clusters": 3, "min_members": 4}
        assert validate(first, max_moves=4, **options) is None


PLAN = RemapPlan(5, 100, 120, ((0, 0, 1, 1), (1, 0, 0, 1)), "gain", 0.02)
IN_FORCE = ((0, 0, 1, 1), (0, 0, 1, 1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"effective_step": 119}, "late: takes effect at step 119, this is step 120"),
        ({"version": True}, "malformed: version=True: must be an int, 0 or more"),
        ({"version": 4}, "already applied: version 4, in force is 4"),
        ({"version": 6}, "stale: version 6 follows 5, in force is 4"),
        ({"version": "5"}, "malformed: version='5': must be an int, 0 or more"),
        ({"made_at_step": 130}, "malformed: effective_step is before made_at_step"),
        ({"reason": None}, "malformed: reason=None: must be a string"),
        ({"expected_gain": float("nan")}, "malformed: expected_gain=nan: must be a finite float"),
        ({"expected_gain": 10**400}, "malformed: expected_gain="),
        ({"assignment": 3}, "malformed: assignment must be a list of layers, each a list of clusters"),
        ({"assignment": ((), ())}, "malformed: assignment must be a list of layers, each a list of clusters"),
        ({"assignment": ((0, 1, 1), (0, 0, 1, 1))}, "malformed: assignment has layers of different lengths"),
        ({"assignment": ((0, 0, 1, -1), (0, 0, 1, 1))}, "malformed: assignment must hold ints, 0 or more"),
        ({"assignment": ((0, 0, 1, 1.0), (0, 0, 1, 1))}, "malformed: assignment must hold ints, 0 or more"),
        ({"assignment": ((0, 0, 1), (0, 1, 1))}, "unknown experts: the plan has 2 layers of 3, the model 2 of 4"),
        ({"assignment": ((0, 0, 1, 1),)}, "unknown experts: the plan has 1 layers of 4, the model 2 of 4"),
        ({"assignment": ((0, 0, 1, 1), (0, 0, 7, 1))}, "unknown clusters: 7, of 2 a layer"),
        ({"assignment": ((0, 0, 1, 1), (0, 0, 0, 1))}, "sizes: cluster 1 of layer 1 would have 1 experts, K=2 need as many"),
        ({"assignment": ((0, 0, 1, 1), (1, 1, 0, 0))}, "too many moves: 4 in layer 1, at most 3"),
        ({"assignment": IN_FORCE}, "nothing moves"),
    ],
)  # fmt: skip
def test_every_reason_to_refuse(change: dict[str, Any], reason: str | None) -> None:
    plan = dataclasses.replace(PLAN, **change)
    found = validate(plan, version=4, assignment=IN_FORCE, step=120, n_clusters=2, max_moves=3, min_members=2)
    assert found == reason or (reason is not None and found is not None and found.startswith(reason))


@pytest.mark.parametrize("stranger", [None, 3, "plan", PLAN.to_dict(), NoPlan(1, "no", 0.0)])
def test_a_stranger_is_malformed(stranger: Any) -> None:
    found = validate(stranger, version=4, assignment=IN_FORCE, step=120, n_clusters=2, max_moves=3, min_members=2)
    assert found is not None and found.startswith("malformed: ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
fields = st.fixed_dictionaries({name: json_values for name in PLAN.to_dict()})


@settings(deadline=None, max_examples=200)
@given(json_values | fields | st.tuples(st.sampled_from(sorted(PLAN.to_dict())), json_values))
def test_no_json_raises_anything_but_value_error(data: Any) -> None:
    """Arbitrary JSON, plans of arbitrary fields, and a good plan with one arbitrary field."""
    if isinstance(data, tuple):
        data = PLAN.to_dict() | {data[0]: data[1]}
    try:
        plan = RemapPlan.from_dict(data)
    except ValueError as error:
        assert str(error)
    else:
        assert json.loads(json.dumps(plan.to_dict())) == data


def test_moves_name_what_changes() -> None:
    assert moves(IN_FORCE, PLAN.assignment) == [Move(1, 0, 0, 1), Move(1, 2, 1, 0)]
    assert moves(np.array(IN_FORCE), IN_FORCE) == []
    with pytest.raises(ValueError):
        moves(IN_FORCE, PLAN.assignment[:1])


def test_purity_by_hand() -> None:
    assert purity(np.array([[6, 0], [2, 2]])) == 0.8
    assert purity(np.zeros((2, 2))) == 0


def test_nothing_changed_gains_nothing() -> None:
    stats, truth_LE = clustered(0, 2, 16, 4)
    assert measured_gain(stats, truth_LE, truth_LE, regroup=RegroupSection(), n_clusters=4) == 0
