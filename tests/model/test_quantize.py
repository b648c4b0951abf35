"""INT4 quantization: the error bound, exact cases, and balanced factors with an unchanged product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.model.quantize import GROUP, balance, dequantize, packed_shapes, quantize

EPS = 2.0**-11  # relative rounding error of float16
TINY = 2.0**-25  # absolute rounding error of its subnormal values


def groups_of(x: torch.Tensor, axis: int, group: int) -> list[torch.Tensor]:
    return list(x.movedim(axis, -1).split(group, -1))


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    length=st.integers(1, 100),
    axis=st.integers(0, 2),
    group=st.sampled_from([2, 8, 32]),
    size=st.sampled_from([1e-7, 1e-3, 1.0, 1e4]),
    offset=st.sampled_from([0.0, 1.0, -300.0]),
    tails=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_round_trip_stays_within_half_a_step(
    shape: list[int], length: int, axis: int, group: int, size: float, offset: float, tails: bool, seed: int
) -> None:
    axis = min(axis, len(shape))
    shape.insert(axis, length)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = ((x.sign() * x.abs() ** 3 if tails else x) * size).clamp(-6e4, 6e4) + offset
    q = quantize(x, axis, group)
    packed, grid = packed_shapes(tuple(x.shape), axis, group)
    assert (q.packed.shape, q.scale.shape, q.minimum.shape) == (packed, grid, grid)
    assert (q.packed.dtype, q.scale.dtype, q.minimum.dtype) == (torch.uint8, torch.float16, torch.float16)
    again = dequantize(q)
    assert again.shape == x.shape and again.dtype == torch.float32 and again.is_contiguous()
    for values, decoded in zip(groups_of(x, axis, group), groups_of(again, axis, group), strict=True):
        low, high = values.amin(-1), values.amax(-1)
        step = (high - low) / 15
        rounding = EPS * (low.abs() + 2 * step) + 15 * (EPS * step + TINY) + EPS * EPS * (high.abs() + low.abs())
        assert ((values - decoded).abs().amax(-1) <= step / 2 + rounding).all()


def test_values_on_the_grid_are_exact() -> None:
    codes = torch.stack([torch.randperm(16) for _ in range(12)]).flatten().view(6, 32)  # every group spans 0…15
    x = 0.25 * codes.float() - 1.5
    assert torch.equal(dequantize(quantize(x, 1)), x)
    assert torch.equal(dequantize(quantize(x.t(), 0)), x.t())


@pytest.mark.parametrize("value", [0.0, 1.0, -65504.0, 65504.0, 0.5])
@pytest.mark.parametrize("length", [1, 31, 32, 33])
def test_constants_are_exact(value: float, length: int) -> None:
    x = torch.full((3, length), value)
    assert torch.equal(dequantize(quantize(x, 1)), x)


def test_the_whole_range_of_float16_is_quantized() -> None:
    x = torch.linspace(-65504, 65504, 32)[None]
    assert (dequantize(quantize(x, 1)) - x).abs().max() <= 131008 / 30 + 131008 * 2 * EPS


def test_codes_compensate_for_the_rounded_minimum() -> None:
    generator = torch.Generator().manual_seed(0)
    low = 1000 + 20 * torch.rand(500, 1, generator=generator)  # float16 has a spacing of 0.5 here, the grid of 1
    x = low + 15 * torch.rand(500, GROUP, generator=generator)
    assert (dequantize(quantize(x, 1)) - x).square().mean() < 0.065  # 0.077 if codes are relative to the exact minimum


def test_groups_are_independent() -> None:
    x = torch.randn(2, 3 * GROUP)
    louder = x.clone()
    louder[0, :GROUP] *= 1000
    a, b = dequantize(quantize(x, 1)), dequantize(quantize(louder, 1))
    assert torch.equal(a[0, GROUP:], b[0, GROUP:]) and torch.equal(a[1], b[1])
    assert not torch.equal(a[0, :GROUP], b[0, :GROUP])


def test_a_short_last_group_equals_that_group_alone() -> None:
    x = torch.randn(4, GROUP + 7)
    alone = dequantize(quantize(x[:, GROUP:], 1))
    assert torch.equal(dequantize(quantize(x, 1))[:, GROUP:], alone)


def test_clipping_reduces_the_squared_error() -> None:
    groups = torch.randn(2000, GROUP, generator=torch.Generator().manual_seed(0))
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / 15
    plain = low + ((groups - low) / step).round() * step
    ours = dequantize(quantize(groups, 1))
    assert (ours - groups).square().sum() < 0.88 * (plain - groups).square().sum()


def test_two_values_share_a_byte() -> None:
    x = torch.arange(16.0)[None]
    assert quantize(x, 1, group=16).packed.tolist() == [[i | (i + 1) << 4 for i in range(0, 16, 2)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dequantize_returns_the_requested_type(dtype: torch.dtype) -> None:
    q = quantize(torch.randn(5, 40, dtype=dtype), 1)
    assert torch.equal(dequantize(q, dtype), dequantize(q).to(dtype))


@pytest.mark.parametrize(
    ("x", "group", "message"),
    [
        (torch.tensor([1.0, float("nan")]), 32, "not finite"),
        (torch.tensor([1.0, float("-inf")]), 32, "not finite"),
        (torch.tensor([1.0, 65505.0]), 32, "beyond ±65504"),
        (torch.tensor([1.0, -1e9]), 32, "beyond ±65504"),
        (torch.ones(4), 3, "group=3"),
        (torch.ones(4), 0, "group=0"),
    ],
)
def test_values_and_groups_that_cannot_be_quantized_are_rejected(x: torch.Tensor, group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(x, 0, group)


# Balancing


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    m=st.integers(1, 40),
    width=st.integers(1, 12),
    n=st.integers(1, 40),
    skew=st.sampled_from([1e-4, 1.0, 1e4]),
    rank=st.integers(0, 12),
    seed=st.integers(0, 2**31),
)
def test_balanced_factors_have_the_same_product(
    lead: list[int], m: int, width: int, n: int, skew: float, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(*lead, m, width, generator=generator) * skew
    second = torch.randn(*lead, width, n, generator=generator) / skew
    first[..., rank:] = 0  # rank-deficient, down to rank 0
    a, b = balance(first, second)
    assert a.shape == first.shape and b.shape == second.shape and a.dtype == first.dtype
    want = first.double() @ second.double()
    torch.testing.assert_close(a.double() @ b.double(), want, rtol=1e-5, atol=1e-6 * float(want.abs().max() + 1e-30))
    # √Σ on each side: columns of the first and rows of the second are orthogonal and have equal norms
    gram_a, gram_b = a.double().mT @ a.double(), b.double() @ b.double().mT
    scale = float(gram_a.abs().max() + 1e-30)
    torch.testing.assert_close(gram_a, gram_b, rtol=1e-4, atol=1e-5 * scale)
    off = gram_a - torch.diag_embed(gram_a.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() <= 1e-5 * scale


def test_balancing_reduces_the_error_of_factors_that_nearly_cancel() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = 1 + 0.1 * torch.randn(4, 4, generator=generator)  # the columns of the first factor are nearly equal
    first = torch.randn(64, 4, generator=generator) @ mix
    second = torch.linalg.inv(mix) @ torch.randn(4, 96, generator=generator)
    want = first @ second

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((dequantize(quantize(a, 0)) @ dequantize(quantize(b, 1)) - want).norm() / want.norm())

    assert error(*balance(first, second)) < 0.15
    assert error(first, second) > 3 * error(*balance(first, second))
