"""Configs: presets, strict overrides, round trips, and messages that name the field, the value and what is allowed."""

from __future__ import annotations

import json

import pytest

from raymoe.config import PRESETS, Config, ModelSection, describe, from_dict, override, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name: str) -> None:
    config = preset(name)
    assert config.preset == name
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_overrides_apply_and_leave_the_rest() -> None:
    config = override(preset("tiny"), ["train.steps=7", "model.tied_head=false", "train.lr=1e-4", "data.path=a=b"])
    assert (config.train.steps, config.model.tied_head, config.train.lr, config.data.path) == (7, False, 1e-4, "a=b")
    assert config.model.layers == preset("tiny").model.layers


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("train.step=7", "did you mean 'train.steps'"),
        ("steps=7", "write section.field=value"),
        ("train.steps", "write section.field=value"),
        ("train.steps=0", "train.steps=0 is not allowed: must be greater than 0"),
        ("train.steps=many", "expected int"),
        ("train.steps=1.5", "expected int"),
        ("train.lr=nan", "must be finite"),
        ("train.precision=float16", "one of float32, bfloat16"),
        ("model.experts=mixed", "one of clustered, flat, dense"),
        ("model.tied_head=maybe", "true or false"),
        ("model.heads=3", "multiple of 2 x heads"),
        ("model.n_clusters=99", "at most n_experts"),
        ("model.experts_per_token=9", "smallest cluster"),
        ("train.grain=5", "multiple of train.grain"),
        ("train.workers=8,2", "MIN at most MAX"),
        ("train.workers=2,", "expected int"),
        ("run.name=../up", "run.name"),
        ("checkpoint.keep=1", "at least 2"),
        ("data.validation_share=0.9", "between 0 and 0.5"),
    ],
)
def test_a_bad_override_names_the_field_and_the_remedy(item: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(preset("tiny"), [item])


@pytest.mark.parametrize(
    "change",
    [{"extra": {}}, {"train": {"stepz": 1}}, {"train": {"steps": "1"}}, {"model": {"experts": "x"}}, {"train": 3}],
)
def test_a_saved_config_is_checked_as_strictly(change: dict) -> None:
    with pytest.raises(ValueError):
        from_dict(preset("tiny").to_dict() | change)
    with pytest.raises(ValueError):
        from_dict([])


def test_overrides_are_checked_together() -> None:
    """Two values that are only right with each other may come in any order."""
    config = override(preset("tiny"), ["model.n_experts=64", "model.n_clusters=32"])
    assert (config.model.n_experts, config.model.n_clusters) == (64, 32)
    assert override(preset("tiny"), ["model.n_clusters=32", "model.n_experts=64"]).model == config.model


def test_default_assignment_is_even_for_any_sizes() -> None:
    row = ModelSection(n_experts=10, n_clusters=4).default_assignment()[0]
    counts = [row.count(c) for c in range(4)]
    assert sum(counts) == 10 and max(counts) - min(counts) <= 1 and list(row) == sorted(row)


def test_flat_defaults_to_the_auxiliary_loss_and_clustered_to_none() -> None:
    tiny = preset("tiny")
    assert tiny.aux_loss == 0
    assert override(tiny, ["model.experts=flat"]).aux_loss == 0.01
    assert override(tiny, ["model.experts=flat", "train.aux_loss=0"]).aux_loss == 0


def test_help_explains_every_field() -> None:
    text = describe(Config())
    for name in ("train.clip", "model.residual_width", "data.path", "run.root", "checkpoint.keep"):
        assert name in text
    assert "norm of the gradient" in text


def test_a_range_of_workers() -> None:
    elastic = override(preset("tiny"), ["train.workers=2,8"])
    assert (elastic.train.workers, elastic.train.max_workers, elastic.train.elastic) == (2, 8, True)
    assert from_dict(elastic.to_dict()) == elastic
    fixed = override(elastic, ["train.workers=4"])
    assert (fixed.train.workers, fixed.train.elastic) == (4, False)
    assert not override(preset("tiny"), ["train.workers=3,3"]).train.elastic
