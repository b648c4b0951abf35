"""The demo's table and its sentence: both follow from the records."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymoe.commands.demo_compare import VARIANTS, comparison
from raymoe.commands.demo_tables import Table, reading, spread
from raymoe.commands.runs.definition import planned
from raymoe.config import Config
from tests.support.presets import residual_tiny


def records(**perplexity: tuple[float, float]) -> list[dict]:
    values = dict.fromkeys(VARIANTS, (300.0, 300.0)) | perplexity
    return [{"variant": name, "seed": s, "perplexity": v} for name, of in values.items() for s, v in enumerate(of)]


@pytest.mark.parametrize(
    ("perplexity", "expected"),
    [
        ({"flat": (200.0, 202.0), "clustered": (240.0, 244.0)}, "flat has the lowest perplexity, 41.0 below clustered; that is more than the range of either between seeds (4.0)"),
        ({"clustered": (200.0, 210.0), "flat": (208.0, 208.0)}, "clustered has the lowest perplexity, 3.0 below flat; that is no more than"),
        ({"flat_same_size": (250.0, 290.0), "clustered": (280.0, 280.0)}, "flat, same size has the lowest perplexity, 10.0 below clustered; that is no more than"),
    ],
)  # fmt: skip
def test_the_sentence_names_the_best_model_and_compares_the_gap_with_the_spread(
    perplexity: dict, expected: str
) -> None:
    assert expected in reading(records(**perplexity))


def test_spread_is_the_mean_and_half_the_range() -> None:
    assert spread([1.0, 2.0]) == "1.5 ±0.5" and spread([1000.0, 3000.0], ",.0f") == "2,000 ±1,000"


def test_a_table_aligns_its_columns() -> None:
    text = str(Table("T", ("model", "x"), (("a", "1"), ("long name", "22")), "note"))
    assert "a           1\nlong name  22" in text


def config(name: str, seed: int = 0) -> Config:
    runs = planned(comparison(Path("/runs"), 160), {})
    return next(run.config for run in runs if (run.variant, run.seed) == (name, seed))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_models_of_the_comparison_differ_in_the_model_only(name: str) -> None:
    ours, clustered = config(name, 1), config("clustered", 1)
    assert (ours.train, ours.data, ours.checkpoint) == (clustered.train, clustered.data, clustered.checkpoint)
    assert ours.aux_loss == 0 and not ours.regroups


def test_three_models_have_one_size_and_two_have_the_active_width_of_flat() -> None:
    import torch

    from raymoe.model.transformer import Transformer

    def parameters(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in Transformer(config(name).model).parameters())

    for name in ("flat_same_size", "paper"):
        assert parameters(name) == pytest.approx(parameters("clustered"), rel=0.001), name
    clustered, same, flat = (config(name).model for name in ("clustered", "flat_same_size", "flat"))
    active = flat.experts_per_token * flat.d_expert
    assert same.experts_per_token * same.d_expert == active
    assert clustered.experts_per_token * clustered.private_width == active
    assert (flat.n_experts, flat.d_expert, flat.gate, same.gate) == (16, 256, "softmax", "softmax")


def test_the_paper_form_of_the_demo_has_bases_and_residuals() -> None:
    assert config("paper").model == residual_tiny().model
