"""Four-bit residuals: balance the two factors of a product, then store two values per byte.

A residual is first @ second, [I, W] and [W, J]. Both are quantized along their long axis (D or F),
never along W: columns of different weight must not share a scale (the paper's heterogeneous precision).

Shape suffixes of this file: `X` all other axes, `Y` the quantized axis, `Q` groups, `G` values of a
group, `Z` packed bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32
"""Values that share a scale and a minimum."""
_BITS = 4
_FLOAT16_MAX = 65504.0
_CLIPS = (0.0, 1 / 90, 2 / 90, 3 / 90)
"""Shares of a group's range that may be cut off at either end; at most half a step of the uncut grid (1/30)."""


def balance(first_XIW: Tensor, second_XWJ: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors with the same product that share the singular values: U√Σ and √ΣVᵀ.

    first [..., I, W], second [..., W, J]; leading dimensions are batched. The SVD is of a [W, W] core.
    """
    # Lower case: the smaller of W and the other size, at which a reduced factorization ends.
    width = first_XIW.shape[-1]
    q_XIi, r_XiW = torch.linalg.qr(first_XIW.double())
    q_XJj, r_XjW = torch.linalg.qr(second_XWJ.double().mT)
    u_Xik, s_Xk, vh_Xkj = torch.linalg.svd(r_XiW @ r_XjW.mT, full_matrices=False)
    root_Xk = s_Xk.sqrt()
    missing = width - s_Xk.shape[-1]  # above 0 if W exceeds I or J
    left_XIW = F.pad((q_XIi @ u_Xik) * root_Xk[..., None, :], (0, missing))
    right_XWJ = F.pad((root_Xk[..., None] * vh_Xkj) @ q_XJj.mT, (0, 0, 0, missing))
    return left_XIW.to(first_XIW.dtype), right_XWJ.to(second_XWJ.dtype)


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
    """Shape of x. The last group is padded if `group` does not divide the axis."""
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
        raise ValueError(f"group={group} is not allowed: values are packed in pairs; use an even number above 0")
    if not x.isfinite().all():
        raise ValueError("cannot quantize values that are not finite: check the weights for NaN")
    if x.numel() and x.abs().max() > _FLOAT16_MAX:
        raise ValueError(
            f"cannot quantize values beyond ±{_FLOAT16_MAX:.0f}: a group's minimum is a float16; check the weights for overflow"
        )
    x_XQG = _grouped(x, axis, group)
    minimum_XQ1, scale_XQ1, codes_XQG = _best_grid(x_XQG, _BITS)
    pairs_XZ2 = codes_XQG.to(torch.uint8).flatten(-2).unflatten(-1, (-1, 2))
    packed_XZ = pairs_XZ2[..., 0] | (pairs_XZ2[..., 1] << 4)
    return Int4(packed_XZ, scale_XQ1.squeeze(-1).half(), minimum_XQ1.squeeze(-1).half(), tuple(x.shape), axis, group)


def dequantize(q: Int4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values of `q`, in the shape of x."""
    codes_XQG = torch.stack((q.packed & 15, q.packed >> 4), -1).flatten(-2).unflatten(-1, (-1, q.group))
    x_XQG = q.minimum.float()[..., None] + codes_XQG * q.scale.float()[..., None]
    return x_XQG.flatten(-2)[..., : q.shape[q.axis]].movedim(-1, q.axis).to(dtype).contiguous()


def rounded(x: Tensor, axis: int, bits: int, group: int = GROUP) -> Tensor:
    """Return x as a grid of `bits` bits represents it, rounded with the same care as by `quantize`.

    For comparisons of what fewer bits cost: an artifact stores four.
    """
    minimum_XQ1, scale_XQ1, codes_XQG = _best_grid(_grouped(x, axis, group), bits)
    x_XY = (minimum_XQ1 + codes_XQG * scale_XQ1).flatten(-2)[..., : x.shape[axis]]
    return x_XY.movedim(-1, axis).to(x.dtype).contiguous()


def _grouped(x: Tensor, axis: int, group: int) -> Tensor:
    """Return x as [X, Q, G], with the quantized axis last and its last group padded."""
    x_XY = x.detach().float().movedim(axis, -1)
    padding = -x_XY.shape[-1] % group
    if padding:  # repeats a value of the last group, so that its range is unchanged
        x_XY = torch.cat((x_XY, x_XY[..., -1:].expand(*x_XY.shape[:-1], padding)), -1)
    return x_XY.unflatten(-1, (-1, group))


def _best_grid(x_XQG: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (minimum, scale, codes) of least squared error in each group, among grids that clip the ends."""
    low_XQ1, high_XQ1 = x_XQG.amin(-1, keepdim=True), x_XQG.amax(-1, keepdim=True)
    range_XQ1 = high_XQ1 - low_XQ1
    best = _grid(x_XQG, low_XQ1, high_XQ1, bits)
    error_XQ1 = _squared_error(x_XQG, *best)
    for below, above in product(_CLIPS, _CLIPS):
        candidate = _grid(x_XQG, low_XQ1 + below * range_XQ1, high_XQ1 - above * range_XQ1, bits)
        candidate_error_XQ1 = _squared_error(x_XQG, *candidate)
        better_XQ1 = candidate_error_XQ1 < error_XQ1
        minimum_XQ1, scale_XQ1, codes_XQG = (
            torch.where(better_XQ1, new, old) for new, old in zip(candidate, best, strict=True)
        )
        best = minimum_XQ1, scale_XQ1, codes_XQG
        error_XQ1 = torch.minimum(error_XQ1, candidate_error_XQ1)
    return best


def _grid(x_XQG: Tensor, low_XQ1: Tensor, high_XQ1: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (minimum, scale, codes) for the ends of the grid; minimum and scale are rounded to float16."""
    minimum_XQ1 = low_XQ1.half().float()
    levels = 2**bits - 1
    scale_XQ1 = ((high_XQ1 - minimum_XQ1).clamp(min=0) / levels).half().float()
    codes_XQG = ((x_XQG - minimum_XQ1) / torch.where(scale_XQ1 > 0, scale_XQ1, torch.inf)).round().clamp(0, levels)
    return minimum_XQ1, scale_XQ1, codes_XQG


def _squared_error(x_XQG: Tensor, minimum_XQ1: Tensor, scale_XQ1: Tensor, codes_XQG: Tensor) -> Tensor:
    return (minimum_XQ1 + codes_XQG * scale_XQ1 - x_XQG).square().sum(-1, keepdim=True)
