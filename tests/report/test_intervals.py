"""Statistics of compared runs, against scipy's functions on samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from raymoe.report.intervals import Interval, at_quarter, markdown, paired_ratio, summarize, table_rows

VALUES = st.lists(st.floats(1, 1e4), min_size=2, max_size=8)


@settings(deadline=None)
@given(VALUES)
def test_the_interval_is_that_of_a_t_test(values: list[float]) -> None:
    found = Interval.of(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=max(stats.sem(values), 1e-300))
    assert found.n == len(values)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-9, abs=1e-9)


def test_the_interval_ignores_missing_values_and_needs_two() -> None:
    assert Interval.of([3.0, math.nan, 5.0]).show(".1f") == "4.0 ±12.7"
    assert Interval.of([3.0]).show(".1f") == "3.0" and math.isnan(Interval.of([3.0]).half)
    assert Interval.of([math.nan]).show(".1f") == "–"
    assert Interval.of([3.0]).to_dict() == {"mean": 3.0, "half_width": None, "n": 1}


def test_a_ratio_is_paired_by_seed() -> None:
    """Variation that both have in common cancels: unpaired, the interval of this sample would contain 1."""
    reference = {0: 100.0, 1: 200.0, 2: 400.0}
    ratio = paired_ratio({0: 90.0, 1: 182.0, 2: 356.0, 7: 5.0}, reference)
    expected = stats.ttest_1samp([0.9, 0.91, 0.89], 0).confidence_interval(0.95)
    assert ratio.n == 3 and ratio.mean == pytest.approx(0.9)
    assert (ratio.mean - ratio.half, ratio.mean + ratio.half) == pytest.approx(tuple(expected))
    assert paired_ratio({5: 1.0}, reference).n == 0


def result(variant: str, seed: int, perplexity: float, **more: object) -> dict:
    curve = [{"step": step, "perplexity": perplexity * (5 - step / 25)} for step in (25, 50, 75, 100)]
    return {
        "variant": variant, "seed": seed, "steps": 100, "finished": True, "perplexity": perplexity, "curve": curve,
        "bits_per_byte": 1.0, "load_cv": {"experts": None, "clusters": 0.3}, "seconds": 10.0, "tokens_per_s": 1e3,
        "peak_rss_mb": 100.0, "parameters": 2_000_000, "active_parameters": 1_000_000, "lr": 1e-3,
    } | more  # fmt: skip


def test_a_quarter_is_the_nearest_validation_and_the_last_one_the_whole_set() -> None:
    run = result("a", 0, 10.0)
    assert [at_quarter(run, q) for q in (1, 2, 3, 4)] == [40, 30, 20, 10.0]
    assert at_quarter(run | {"curve": [{"step": 30, "perplexity": 7.0}]}, 1) == 7.0
    assert math.isnan(at_quarter(run | {"curve": [{"step": 38, "perplexity": 7.0}]}, 1)), "more than an eighth off"
    assert math.isnan(at_quarter(run | {"finished": False}, 4)), "not measured on the whole set"


def test_a_summary_has_the_runs_of_a_variant_and_its_ratio() -> None:
    runs = [result("a", 0, 10.0), result("b", 0, 9.0), result("a", 1, 20.0), result("b", 1, 18.2), result("b", 2, 1.0, finished=False)]  # fmt: skip
    a, b = summarize(runs, {"a": "A", "b": "B", "c": "no runs"}, "a")
    assert (a.label, a.seeds, a.quarters[3].mean, a.ratio.mean, a.ratio.half) == ("A", (0, 1), 15.0, 1.0, 0.0)
    assert b.ratio.mean == pytest.approx(0.905) and (b.ratio.n, b.runs, b.finished) == (2, 3, 2)
    assert b.quarters[3].n == 2 and b.load_cv.mean == pytest.approx(0.3), "of clusters, without experts"
    row = table_rows([b])[0]
    assert row[:4] == ("B", "2.00", "1.00", "0.001") and row[-1] == "2/3"
    assert row[7].startswith("13.60 ±") and row[9].startswith("0.9050 ±")


def test_markdown_is_a_table_of_github() -> None:
    assert markdown(("model", "x"), [("a|b", "1")]).splitlines() == [
        "| model |   x |",
        "|-------|----:|",
        r"| a\|b  |   1 |",
    ]
