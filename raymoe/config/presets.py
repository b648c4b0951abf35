"""Presets: named configs to start from."""

from __future__ import annotations

from raymoe.config.sections import CheckpointSection, Config, ModelSection, RegroupSection, TrainSection


def tiny() -> Config:
    """2 layers, D=128, private experts: the demo and the tests."""
    return Config(
        preset="tiny",
        model=ModelSection(
            layers=2, d_model=128, d_expert=256, expert_kind="private", n_experts=22, n_clusters=2,
            experts_per_token=8, gate="sigmoid", heads=4, kv_heads=2, vocabulary=2048, context=128,
        ),
        train=TrainSection(steps=160, global_batch=16, grain=8, lr=4e-3, warmup=20, validate_every=80),
        checkpoint=CheckpointSection(every=80),
        regroup=RegroupSection(burn_in=30, period=30, plan_lag=6, stats_every=3, overlap=16),
    )  # fmt: skip


def screen() -> Config:
    """As tiny, vocabulary 4,096: runs of 3 million tokens on one core, to compare models."""
    return Config(
        preset="screen",
        model=ModelSection(
            layers=2, d_model=128, d_expert=256, expert_kind="private", n_experts=24, n_clusters=2,
            experts_per_token=8, gate="sigmoid", heads=4, kv_heads=2, vocabulary=4096, context=128,
        ),
        train=TrainSection(
            workers=1, threads=1, steps=732, global_batch=32, grain=32, lr=4e-3, warmup=50, validate_every=183,
            validate_windows=256,
        ),
        checkpoint=CheckpointSection(every=183, max_loss_s=120.0),
        regroup=RegroupSection(burn_in=120, period=100, plan_lag=10, stats_every=5, overlap=32),
    )  # fmt: skip


def small() -> Config:
    """4 layers, D=256, private experts: measurements on a small machine."""
    return Config(
        preset="small",
        model=ModelSection(
            layers=4, d_model=256, d_expert=512, expert_kind="private", n_experts=24, n_clusters=2,
            experts_per_token=8, gate="sigmoid", heads=4, kv_heads=2, vocabulary=8192, context=256,
        ),
        train=TrainSection(steps=1500, global_batch=16, grain=8, lr=3e-3, warmup=100, validate_every=250),
        checkpoint=CheckpointSection(every=250),
    )  # fmt: skip


def paper() -> Config:
    """12 layers, D=768, bases and residuals: the paper's form and size, 0.95 billion parameters with flat experts."""
    return Config(
        preset="paper",
        model=ModelSection(
            layers=12, d_model=768, d_expert=1024, n_experts=32, n_clusters=4, experts_per_token=2,
            residual_width=16, heads=12, kv_heads=4, vocabulary=32768, context=512,
        ),
        train=TrainSection(
            workers=8, steps=20000, global_batch=256, grain=8, lr=6e-4, warmup=500, validate_every=1000
        ),
        checkpoint=CheckpointSection(every=500),
    )  # fmt: skip


PRESETS = {"tiny": tiny, "screen": screen, "small": small, "paper": paper}


def preset(name: str) -> Config:
    """Return the preset `name`. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: one of {', '.join(PRESETS)}")
    return PRESETS[name]()
