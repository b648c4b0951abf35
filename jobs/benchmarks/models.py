"""The models that benchmarks compare. Each is set explicitly: presets may change, the figures' meaning may not."""

from __future__ import annotations

from dataclasses import replace

from raymoe.config import Config, ModelSection, override, preset

RESIDUAL = (
    "model.expert_kind=residual", "model.gate=softmax", "model.router_std=0.02", "model.n_clusters=4",
    "model.experts_per_token=2",
)  # fmt: skip
SIZES = {
    "tiny": ("model.n_experts=16", "model.residual_width=8"),
    "small": ("model.n_experts=32", "model.residual_width=16"),
    "paper": (),
}


def paper_form(name: str, changes: tuple[str, ...] | list[str] = ()) -> Config:
    """Return a preset with bases and residuals as in the paper, 4 clusters and top 2, with `changes`."""
    return override(preset(name), [*RESIDUAL, *SIZES[name], *changes])


def private_model(model: ModelSection) -> ModelSection:
    """Return 24 private experts of F/4 in 2 clusters, 8 active: the active width of two flat experts."""
    return replace(model, expert_kind="private", n_experts=24, n_clusters=2, experts_per_token=8, gate="sigmoid")
