"""Shapes of the matrices of a cluster's base and of its experts, by kind of expert."""

from __future__ import annotations

from typing import NamedTuple

from raymoe.config import ModelSection

BASES = ("base_gate", "base_up", "base_down")
RESIDUALS = ("gate_in", "gate_out", "up_in", "up_out", "down_in", "down_out")
PRIVATE = ("private_gate", "private_up", "private_down")
"""Matrices of a private expert, each [W, D]: a row of each belongs to one hidden unit. So the matrices of consecutive
experts are one matrix [n·W, D] without a copy."""


class Leaf(NamedTuple):
    """A matrix of a base or an expert."""

    shape: tuple[int, int]
    fan_in: int
    """Number of inputs that one output sums over."""


def base_leaves(model: ModelSection) -> dict[str, Leaf]:
    """Return the matrices of a cluster's base by name; none without a base."""
    d, f = model.d_model, model.cluster_base_width
    if not f:
        return {}
    return dict(zip(BASES, (Leaf((d, f), d), Leaf((d, f), d), Leaf((f, d), f)), strict=True))


def member_leaves(model: ModelSection) -> dict[str, Leaf]:
    """Return the matrices of an expert of a cluster by name; none where an expert is its base."""
    d, f = model.d_model, model.d_expert
    if model.expert_kind == "private":
        w = model.private_width
        return dict(zip(PRIVATE, (Leaf((w, d), d), Leaf((w, d), d), Leaf((w, d), w)), strict=True))
    w = model.residual_width
    shapes = ((d, w), (w, f), (d, w), (w, f), (f, w), (w, d)) if w else ()
    return {name: Leaf(shape, shape[0]) for name, shape in zip(RESIDUALS, shapes, strict=False)}
