"""Perplexity equals a loop over tokens and known cross-entropies; load metrics follow their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raymoe.evaluation import Perplexity, load_cv, load_max_vio, load_variance, perplexity, windows

VOCABULARY = 11
FIRST = 10


def stream(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).astype(np.uint16)


TABLE = torch.randn(5, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))


def causal_logits(tokens: Tensor) -> Tensor:
    """Return logits that depend on the last five tokens of the window, and so on the start of the window."""
    out = TABLE[0][tokens]
    for back in range(1, 5):
        out[:, back:] += TABLE[back][tokens[:, : max(0, tokens.shape[1] - back)]]
    return out


def brute_force(text: np.ndarray, context: int, stride: int) -> float:
    """Return the total NLL by a loop over tokens, each with the context in its window."""
    whole = [FIRST, *text.tolist()]
    total = 0.0
    for i in range(len(text)):
        # The first window that reaches token i, which is predicted from whole[..i].
        window = max(0, -(-(i + 1 - context) // stride))
        inputs = torch.tensor([whole[window * stride : i + 1]])
        total -= causal_logits(inputs)[0, -1].double().log_softmax(-1)[whole[i + 1]].item()
    return total


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 90), context=st.integers(1, 24), data=st.data())
def test_each_target_counts_once_with_enough_context(n: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    covered: list[int] = []
    for i, (start, stop, first_scored) in enumerate(windows(n, context, stride)):
        assert start == i * stride and start <= first_scored < stop <= min(start + context, n)
        assert i == 0 or first_scored - start >= context - stride
        covered += range(first_scored, stop)
    assert covered == list(range(n))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), context=st.integers(1, 12), batch=st.integers(1, 5), data=st.data())
def test_equals_a_loop_over_tokens(n: int, context: int, batch: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    text = stream(n, seed=n)
    found = perplexity(causal_logits, text, n_bytes=7, context=context, stride=stride, batch=batch, first=FIRST)
    assert found.nll == pytest.approx(brute_force(text, context, stride), rel=1e-6)
    assert (found.tokens, found.bytes, found.context, found.stride) == (n, 7, context, stride)


def test_uniform_logits_have_the_perplexity_of_the_vocabulary() -> None:
    found = perplexity(lambda t: torch.zeros(*t.shape, 50), stream(1000), n_bytes=250, context=64, first=0)
    assert found.loss == pytest.approx(math.log(50), rel=1e-6)
    assert found.token_perplexity == pytest.approx(50, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(4 * math.log2(50), rel=1e-5)  # four tokens per byte


def test_a_known_distribution_has_its_cross_entropy() -> None:
    """The logits are log p, so the loss is the mean of -log p over the text for any windows."""
    p = torch.arange(1.0, VOCABULARY + 1) / sum(range(1, VOCABULARY + 1))
    text = stream(777)
    expected = -p.double().log()[torch.from_numpy(text.astype(np.int64))].mean().item()
    for stride in (3, 16):
        found = perplexity(
            lambda t: p.log().expand(*t.shape, -1), text, n_bytes=1, context=16, stride=stride, first=FIRST
        )
        assert found.loss == pytest.approx(expected, rel=1e-6)


def test_inputs_are_the_stream_shifted_by_one_after_end_of_text() -> None:
    seen: list[list[int]] = []

    def logits(tokens: Tensor) -> Tensor:
        assert tokens.dtype == torch.int64 and not torch.is_grad_enabled()
        seen.extend(tokens.tolist())
        return torch.zeros(*tokens.shape, VOCABULARY)

    perplexity(logits, np.arange(7, dtype=np.uint16), n_bytes=1, context=3, first=FIRST)
    assert seen == [[FIRST, 0, 1], [2, 3, 4], [5]]


def test_windows_of_equal_length_share_a_batch_and_a_partial_window_has_its_own() -> None:
    shapes: list[tuple[int, ...]] = []
    scored: list[int] = []

    def logits(tokens: Tensor) -> Tensor:
        shapes.append(tuple(tokens.shape))
        return torch.zeros(*tokens.shape, VOCABULARY)

    perplexity(logits, stream(29), n_bytes=1, context=5, batch=3, first=FIRST, progress=scored.append)
    assert shapes == [(3, 5), (2, 5), (1, 4)]
    assert scored == [15, 10, 4]


def test_bfloat16_logits_are_summed_in_float64() -> None:
    """With 100,000 equal terms, a float32 sum drifts and a bfloat16 sum stops increasing."""
    found = perplexity(
        lambda t: torch.zeros(*t.shape, 3, dtype=torch.bfloat16),
        np.zeros(100_000, np.uint32), n_bytes=1, context=1000, first=0,
    )  # fmt: skip
    assert found.nll == pytest.approx(100_000 * float(np.log(np.float32(3))), rel=1e-7)


def test_merged_perplexity_equals_that_of_all_streams() -> None:
    texts = [stream(n, seed=n) for n in (5, 64, 33)]
    parts = [perplexity(causal_logits, text, n_bytes=len(text), context=8, first=FIRST) for text in texts]
    merged = Perplexity.merge(parts)
    assert (merged.tokens, merged.bytes, merged.context, merged.stride) == (102, 102, 8, 8)
    assert merged.nll == pytest.approx(sum(brute_force(text, 8, 8) for text in texts), rel=1e-6)
    assert merged.loss == pytest.approx(sum(p.loss * p.tokens for p in parts) / 102)


def test_merging_rejects_different_windows() -> None:
    with pytest.raises(ValueError, match="cannot merge 2 perplexities"):
        Perplexity.merge([Perplexity(1.0, 1, 1, 8, 8), Perplexity(1.0, 1, 1, 8, 4)])
    with pytest.raises(ValueError, match="cannot merge 0"):
        Perplexity.merge([])


def test_overflow_is_infinite_and_missing_bytes_give_nan() -> None:
    assert Perplexity(nll=1e6, tokens=10, bytes=10, context=1, stride=1).token_perplexity == math.inf
    assert math.isnan(Perplexity(nll=1.0, tokens=1, bytes=0, context=1, stride=1).bits_per_byte)
    assert math.isnan(Perplexity(nll=math.nan, tokens=1, bytes=1, context=1, stride=1).bits_per_byte)


@pytest.mark.parametrize("stride", [0, 9, -1])
def test_a_stride_that_would_skip_tokens_is_rejected(stride: int) -> None:
    with pytest.raises(ValueError, match=rf"stride={stride} is not allowed: between 1 and context=8"):
        perplexity(causal_logits, stream(20), n_bytes=1, context=8, stride=stride, first=FIRST)


def test_an_empty_stream_is_rejected() -> None:
    with pytest.raises(ValueError, match="empty stream"):
        perplexity(causal_logits, stream(0), n_bytes=0, context=8, first=FIRST)


@pytest.mark.parametrize(
    ("counts", "cv", "max_vio", "variance"),
    [
        ([5, 5, 5, 5], 0.0, 0.0, 0.0),
        ([4, 0, 0, 0], math.sqrt(3), 3.0, 3 / 16),
        ([3, 1], 0.5, 0.5, 1 / 16),
        ([0, 0, 0], 0.0, 0.0, 0.0),
        ([[3, 1], [2, 2]], 0.25, 0.25, 1 / 32),
        ([[0, 0], [4, 0]], 0.5, 0.5, 1 / 8),
    ],
)
def test_measures_of_load(counts: list, cv: float, max_vio: float, variance: float) -> None:
    array = np.array(counts)
    assert load_cv(array) == pytest.approx(cv)
    assert load_max_vio(array) == pytest.approx(max_vio)
    assert load_variance(array) == pytest.approx(variance)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=40).filter(any))
def test_measures_follow_their_definitions(counts: list[int]) -> None:
    array = np.array(counts)
    share = array / array.sum()
    assert load_cv(array) == pytest.approx(np.std(counts) / np.mean(counts), abs=1e-9)
    assert load_max_vio(array) == pytest.approx(max(counts) / np.mean(counts) - 1, abs=1e-9)
    assert load_variance(array) == pytest.approx(np.mean((share - share.mean()) ** 2), abs=1e-12)
    assert load_cv(7 * array) == pytest.approx(load_cv(array)) and isinstance(load_cv(array), float)


def test_only_counted_targets_are_scored_and_all_are_context() -> None:
    text = stream(50)
    counted = np.arange(50) % 3 == 1
    nll = [
        perplexity(causal_logits, text, n_bytes=1, context=8, first=FIRST, counted=np.arange(50) == i).nll
        for i in range(50)
    ]
    found = perplexity(causal_logits, text, n_bytes=1, context=8, first=FIRST, counted=counted, batch=3)
    assert found.tokens == counted.sum() and found.nll == pytest.approx(np.array(nll)[counted].sum(), rel=1e-6)
    assert sum(nll) == pytest.approx(perplexity(causal_logits, text, n_bytes=1, context=8, first=FIRST).nll, rel=1e-6)
    with pytest.raises(ValueError, match="without a target that counts"):
        perplexity(causal_logits, text, n_bytes=1, context=8, first=FIRST, counted=np.zeros(50, dtype=bool))
