"""Sizes of a model: all parameters, and those that process one token."""

from __future__ import annotations

import pytest

from raymoe.config import ModelSection, override, preset
from raymoe.training.run_summary import active_parameters, parameters

PAPER_FORM = (
    "expert_kind=residual", "gate=softmax", "n_experts=32", "n_clusters=4", "experts_per_token=2", "residual_width=8",
)  # fmt: skip


def model(*changes: str) -> ModelSection:
    return override(preset("screen"), [f"model.{item}" for item in (*PAPER_FORM, *changes)]).model


D, F, W, LAYERS = 128, 256, 8, 2
FFN = 3 * D * F


def outside() -> int:
    """Return the parameters outside of the feed-forward layers."""
    return parameters(model("experts=dense", "experts_per_token=1")) - LAYERS * FFN


@pytest.mark.parametrize(
    ("changes", "active"),
    [
        (["experts=dense", "experts_per_token=6"], 6 * FFN),
        (["experts=flat"], 2 * FFN + 32 * D),
        (["experts=flat", "n_experts=128", "d_expert=64", "experts_per_token=8"], 2 * FFN + 128 * D),
        (["residual_width=0"], FFN + 4 * D),
        ([], FFN + 2 * 3 * W * (D + F) + 4 * D + 8 * D),
        (["clusters_per_token=2"], 2 * (FFN + 2 * 3 * W * (D + F) + 8 * D) + 4 * D),
        (["expert_kind=private", "expert_width=64", "n_experts=24", "n_clusters=2", "experts_per_token=8"], 2 * FFN + 2 * D + 12 * D),
        (["expert_kind=private", "expert_width=64", "base_width=128"], FFN // 2 + 2 * FFN // 4 + 4 * D + 8 * D),
    ],
)  # fmt: skip
def test_active_parameters_are_the_chosen_experts_and_all_routers_that_score(changes: list[str], active: int) -> None:
    assert active_parameters(model(*changes)) == outside() + LAYERS * active


def test_a_dense_model_is_all_active() -> None:
    dense = model("experts=dense")
    assert active_parameters(dense) == parameters(dense)
