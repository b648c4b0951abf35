"""The preset `tiny` in the paper's form, for tests of bases, residuals, folds and several experts of the width F."""

from __future__ import annotations

from raymoe.config import Config, override, preset

RESIDUAL = (
    "model.expert_kind=residual", "model.gate=softmax", "model.n_experts=16", "model.n_clusters=4",
    "model.experts_per_token=2", "model.residual_width=8", "model.router_std=0.02",
)  # fmt: skip
"""Overrides that change `tiny` to the paper's form."""


def residual_tiny(*changes: str) -> Config:
    """Return the preset `tiny` in the paper's form, with `changes`."""
    return override(preset("tiny"), [*RESIDUAL, *changes])
