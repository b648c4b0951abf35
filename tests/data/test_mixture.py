"""Mixtures: shares follow the weights at every length, and a domain repeats only when all of its windows were visited."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.config import override, preset
from raymoe.config.mixture import parse_mixture
from raymoe.data.corpus import Corpus
from raymoe.data.mixture import BLOCK, Mixture, apportion
from tests.data.test_corpus import CONTEXT, corpus, prepared, prose  # noqa: F401 - a fixture


def rows(text: Corpus, count: int, weights: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and domains of the first `count` sequences."""
    batch = text.batch(seed=0, step=0, global_batch=count, context=CONTEXT, rows=range(count), mixture=weights)
    return batch.tokens, batch.domain


@pytest.mark.parametrize("weights", [{"early": 1, "late": 1}, {"early": 1, "late": 3}, {"late": 0.5}])
@pytest.mark.parametrize("count", [24, 500, BLOCK + 700])
def test_the_shares_of_tokens_are_the_weights(corpus: Corpus, weights: dict[str, float], count: int) -> None:  # noqa: F811
    """`early` has three times the text of `late`."""
    _, domain = rows(corpus, count, weights)
    total = sum(weights.values())
    for i, name in enumerate(corpus.domains):
        assert (domain == i).sum() == pytest.approx(count * weights.get(name, 0) / total, abs=1.5)


def test_a_domain_repeats_in_another_order_when_it_has_run_out(corpus: Corpus) -> None:  # noqa: F811
    weights, size = {"late": 1.0, "early": 1.0}, (len(corpus.stream("train", "late")) - 1) // CONTEXT
    mixture = corpus.mixture(weights, seed=4, context=CONTEXT)
    late = corpus.domains.index("late")
    visited = [window for domain, window in map(mixture.at, range(5 * size)) if domain == late]
    first, second = visited[:size], visited[size : 2 * size]
    assert sorted(first) == sorted(second) == list(range(size)) and first != second
    epochs = mixture.epochs(5 * size)
    assert epochs["late"] == pytest.approx(len(visited) / size) and set(epochs) == {"early", "late"}


@settings(max_examples=40, deadline=None)
@given(step=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 24), max_size=4), seed=st.integers(0, 3))
def test_rows_do_not_depend_on_the_rank(corpus: Corpus, step: int, cuts: list[int], seed: int) -> None:  # noqa: F811
    options = {
        "seed": seed,
        "step": step,
        "global_batch": 24,
        "context": CONTEXT,
        "mixture": {"early": 2.0, "late": 1.0},
    }
    whole = corpus.batch(rows=range(24), **options)
    edges = [0, *sorted(cuts), 24]
    parts = [corpus.batch(rows=range(a, b), **options) for a, b in zip(edges, edges[1:], strict=False)]
    assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)
    for tokens, domain in zip(whole.tokens, whole.domain, strict=True):
        stream = corpus.stream("train", corpus.domains[domain])
        assert any(
            np.array_equal(stream[s : s + CONTEXT + 1], tokens) for s in range(0, len(stream) - CONTEXT, CONTEXT)
        )


def test_without_a_mixture_the_order_is_that_of_version_0_1(corpus: Corpus) -> None:  # noqa: F811
    total = corpus.windows(CONTEXT)
    bounds = [0, (len(corpus.stream("train", "early")) - 1) // CONTEXT]
    batch = corpus.batch(seed=7, step=5, global_batch=8, context=CONTEXT, rows=range(8), mixture={})
    for i, at in enumerate(range(40, 48)):
        window = np.random.default_rng([7, 0]).permutation(total)[at]
        domain = int(window >= bounds[1])
        start = (window - bounds[domain]) * CONTEXT
        assert np.array_equal(
            batch.tokens[i], corpus.stream("train", corpus.domains[domain])[start : start + CONTEXT + 1]
        )


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9), total=st.integers(1, 5000))
def test_slots_add_up_and_are_within_one_of_the_exact_share(weights: list[float], total: int) -> None:
    found = apportion(np.array(weights), total)
    assert found.sum() == total and (abs(found - np.array(weights) / sum(weights) * total) < 1).all()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"middle": 1.0}, "names the domain 'middle', and the text has early, late, none"),
        ({"early": 1.0, "none": 1.0}, "'none' is shorter than one window"),
        ({"early": 1e6, "late": 1.0}, "share of 'late' is below 1/4096"),
    ],
)
def test_a_mixture_that_the_text_does_not_allow_is_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(weights, {"early": 50, "late": 9, "none": 0}, 0)


def test_huge_weights_are_relative() -> None:
    assert Mixture({"a": 1e308, "b": 1e308}, {"a": 5, "b": 5}, 0).slots_M.tolist() == [BLOCK // 2] * 2


def test_a_mixture_is_written_as_names_and_weights() -> None:
    assert parse_mixture("wiki:2, domains/legal:1,a:b:0.5") == {"wiki": 2, "domains/legal": 1, "a:b": 0.5}
    assert parse_mixture("") == {} and override(preset("tiny"), ["train.mixture=a:1"]).train.mixture == "a:1"


@pytest.mark.parametrize(
    "text", ["wiki", "wiki:", ":1", "wiki:0", "wiki:-1", "wiki:inf", "wiki:nan", "a:1,,b:1", "a:x"]
)
def test_a_bad_mixture_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="train.mixture=.* is not allowed: DOMAIN:WEIGHT"):
        override(preset("tiny"), [f"train.mixture={text}"])


def test_a_domain_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="a occurs twice"):
        override(preset("tiny"), ["train.mixture=a:1,a:2"])


def test_every_domain_of_a_seed_has_its_own_order(corpus: Corpus) -> None:  # noqa: F811
    orders = {
        tuple(corpus.mixture({"early": 1.0, "late": 1.0}, seed=seed, context=CONTEXT).at(n) for n in range(50))
        for seed in range(3)
    }
    assert len(orders) == 3 and all(len(Counter(order)) == 50 for order in orders)
