"""Four-bit residuals: balance the two factors of a product, then store two values per byte.

A residual is first @ second, [m, W] and [W, n]. Both are quantized along their long axis (D or F),
never along W: columns of different weight must not share a scale (the paper's heterogeneous precision).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32
"""Values that share a scale and a minimum."""
_LEVELS = 15
_FLOAT16_MAX = 65504.0
_CLIPS = (0.0, 1 / 90, 2 / 90, 3 / 90)
"""Shares of a group's range that may be cut off at either end; at most half a step of the uncut grid (1/30)."""


def balance(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors with the same product that share the singular values: U√Σ and √ΣVᵀ.

    first [..., m, W], second [..., W, n]; leading dimensions are batched. The SVD is of a [W, W] core.
    """
    width = first.shape[-1]
    q_first, r_first = torch.linalg.qr(first.double())
    q_second, r_second = torch.linalg.qr(second.double().mT)
    u, s, vh = torch.linalg.svd(r_first @ r_second.mT, full_matrices=False)
    root = s.sqrt()
    missing = width - s.shape[-1]  # where W exceeds m or n
    left = F.pad((q_first @ u) * root[..., None, :], (0, missing))
    right = F.pad((root[..., None] * vh) @ q_second.mT, (0, 0, 0, missing))
    return left.to(first.dtype), right.to(second.dtype)


@dataclass(frozen=True)
class Int4:
    """x ≈ minimum + q · scale in groups along `axis`, q in 0…15. Fields hold x with `axis` moved last."""

    packed: Tensor
    """uint8 [..., groups · group/2]: value 2i in the low half of byte i, 2i+1 in the high half."""
    scale: Tensor
    """float16 [..., groups]"""
    minimum: Tensor
    """float16 [..., groups]"""
    shape: tuple[int, ...]
    """Of x. The last group is padded when `group` does not divide the axis."""
    axis: int
    group: int = GROUP


def packed_shapes(shape: tuple[int, ...], axis: int, group: int = GROUP) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of `Int4.packed` and of its scale and minimum, for an x of this shape."""
    others = tuple(size for i, size in enumerate(shape) if i != axis)
    groups = -(-shape[axis] // group)
    return (*others, groups * group // 2), (*others, groups)


def quantize(x: Tensor, axis: int, group: int = GROUP) -> Int4:
    """Quantize x to four bits, grouped along `axis` (0 or more).

    Each group has the grid of least squared error among a few that clip its ends slightly, so that
    |x − x'| ≤ range/30 (half a step of the uncut grid) + float16's rounding of minimum and scale.
    Raises ValueError for values that are not finite or beyond float16, and for an odd group.
    """
    if group < 2 or group % 2:
        raise ValueError(f"group={group} is not allowed: values are packed in pairs, so an even number above 0")
    if not x.isfinite().all():
        raise ValueError("cannot quantize values that are not finite: check the weights for NaN")
    if x.numel() and x.abs().max() > _FLOAT16_MAX:
        raise ValueError(f"cannot quantize values beyond ±{_FLOAT16_MAX:.0f}: a group's minimum is a float16")
    lines = x.detach().float().movedim(axis, -1)
    padding = -lines.shape[-1] % group
    if padding:  # repeats a value of the last group, so its range stays
        lines = torch.cat((lines, lines[..., -1:].expand(*lines.shape[:-1], padding)), -1)
    groups = lines.unflatten(-1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)

    minimum, scale, codes = _grid(groups, low, high)
    error = _squared_error(groups, minimum, scale, codes)
    for below, above in product(_CLIPS, _CLIPS):
        span = high - low
        candidate = _grid(groups, low + below * span, high - above * span)
        challenger = _squared_error(groups, *candidate)
        better = challenger < error
        minimum, scale, codes = (
            torch.where(better, new, old) for new, old in zip(candidate, (minimum, scale, codes), strict=True)
        )
        error = torch.minimum(error, challenger)
    pairs = codes.to(torch.uint8).flatten(-2).unflatten(-1, (-1, 2))
    packed = pairs[..., 0] | (pairs[..., 1] << 4)
    return Int4(packed, scale.squeeze(-1).half(), minimum.squeeze(-1).half(), tuple(x.shape), axis, group)


def dequantize(q: Int4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values of `q`, in the shape of x."""
    codes = torch.stack((q.packed & 15, q.packed >> 4), -1).flatten(-2).unflatten(-1, (-1, q.group))
    groups = q.minimum.float()[..., None] + codes * q.scale.float()[..., None]
    return groups.flatten(-2)[..., : q.shape[q.axis]].movedim(-1, q.axis).to(dtype).contiguous()


def _grid(groups: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (minimum, scale, codes) for the ends of the grid; minimum and scale are rounded to float16."""
    minimum = low.half().float()
    scale = ((high - minimum).clamp(min=0) / _LEVELS).half().float()
    codes = ((groups - minimum) / torch.where(scale > 0, scale, torch.inf)).round().clamp(0, _LEVELS)
    return minimum, scale, codes


def _squared_error(groups: Tensor, minimum: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    return (minimum + codes * scale - groups).square().sum(-1, keepdim=True)
