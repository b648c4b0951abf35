"""Statistics merge in any order, and malformed statistics are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from raymoe.clustering.statistics import Statistics, check, merge

seeds = st.integers(0, 2**32 - 1)


def gathered(events: list[tuple[int, int, int, int]], step: int) -> Statistics:
    """Return statistics by definition: sums over (step, layer, expert, seed of the input), decayed to `step`."""
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
def test_merge_equals_the_statistics_of_the_union(parts: list[tuple[list, int]], random: Any) -> None:
    """The result is independent of order, grouping and the steps to which parts were decayed."""
    merged = [gathered(part, max((event[0] for event in part), default=0) + later) for part, later in parts]
    union = gathered([event for part, _ in parts for event in part], max(stats.step for stats in merged))
    while len(merged) > 1:
        a, b = (merged.pop(random.randrange(len(merged))) for _ in range(2))
        merged.append(merge(a, b))
    assert_same(merged[0], union)


@settings(deadline=None, max_examples=30)
@given(st.tuples(events, events, events), st.tuples(*[st.integers(0, 2)] * 3))
def test_merge_is_associative_and_commutative_across_versions(parts: Any, versions: Any) -> None:
    a, b, c = (
        dataclasses.replace(gathered(part, 310), version=version) for part, version in zip(parts, versions, strict=True)
    )
    assert_same(merge(a, b), merge(b, a))
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))


def test_merge_keeps_the_newer_version_only() -> None:
    old, new = gathered([(9, 0, 0, 1)], 300), dataclasses.replace(gathered([(5, 1, 1, 1)], 10), version=2)
    assert merge(old, new) is merge(new, old) is new


def test_merge_refuses_other_shapes_and_betas() -> None:
    a = Statistics.empty(1, 2, 3, 4, 0.05)
    with pytest.raises(ValueError, match="shapes"):
        merge(a, Statistics.empty(1, 2, 3, 5, 0.05))
    with pytest.raises(ValueError, match=r"beta 0.05 and 0.1"):
        merge(a, Statistics.empty(1, 2, 3, 4, 0.1))


def test_statistics_do_not_decay_to_an_earlier_step() -> None:
    with pytest.raises(ValueError, match="step 7"):
        Statistics.empty(1, 2, 3, 4, 0.05, step=7).decayed_to(6)


def test_safetensors_round_trip() -> None:
    stats = gathered([(3, 0, 1, 5), (9, 1, 2, 6)], 12)
    assert_same(Statistics.from_arrays(load(save(stats.arrays()))), stats)
    arrays = stats.arrays()
    del arrays["count"]
    with pytest.raises(ValueError, match="'count' is missing"):
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
def test_check_names_the_malformed_field(change: dict[str, Any], reason: str) -> None:
    check(GOOD, 2, 3, 4)
    with pytest.raises(ValueError, match=reason):
        check(dataclasses.replace(GOOD, **change), 2, 3, 4)


def test_check_refuses_other_types() -> None:
    with pytest.raises(ValueError, match="dict is not Statistics"):
        check({}, 2, 3, 4)  # type: ignore[arg-type]
