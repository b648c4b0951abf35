"""Configs: presets, overrides, JSON and YAML round trips, and errors with the field, the value and the allowed values."""

from __future__ import annotations

import contextlib
import json
import re
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import event, given, settings
from hypothesis import strategies as st

from raymoe.config import (
    PRESETS,
    Config,
    ModelSection,
    default_root,
    describe,
    expand,
    from_dict,
    from_yaml,
    override,
    preset,
    repeatable_yaml,
)
from raymoe.config.overrides import KEYS, hints
from raymoe.config.yaml_text import ADDED
from tests.support.presets import residual_tiny


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name: str) -> None:
    config = preset(name)
    assert config.preset == name
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", ["tiny", "screen", "small"])
def test_presets_have_private_experts_with_the_active_width_of_two_flat_experts(name: str) -> None:
    model = preset(name).model
    assert (model.expert_kind, model.gate, model.n_clusters, model.clusters_per_token) == ("private", "sigmoid", 2, 1)
    assert model.experts_per_token * model.private_width == 2 * model.d_expert


def test_the_preset_paper_has_the_papers_form() -> None:
    model = preset("paper").model
    assert (model.expert_kind, model.gate, model.residual_width) == ("residual", "softmax", 16)
    assert (model.n_experts, model.n_clusters, model.experts_per_token, model.clusters_per_token) == (32, 4, 2, 1)


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
        ("model.experts_per_token=12", "smallest cluster"),
        ("train.grain=5", "multiple of train.grain"),
        ("train.workers=8,2", "MIN at most MAX"),
        ("train.workers=2,", "expected int"),
        ("run.name=../up", "run.name"),
        ("checkpoint.keep=1", "at least 2"),
        ("data.validation_share=0.9", "between 0 and 0.5"),
        ("regroup.similarity=cosine", "one of counterfactual, paper, coactivation"),
        ("regroup.force_kind=random", "has an effect with regroup.force only"),
        ("data.tune_share=0.5", "0, or between 0 and 0.5"),
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


def test_private_experts_are_not_refitted_or_folded() -> None:
    private = preset("tiny")
    assert private.model.expert_kind == "private" and private.model.cluster_base_width == 0
    for refit in ("svd", "weighted"):
        with pytest.raises(ValueError, match=f"regroup.refit='{refit}' is not allowed: private experts do not depend"):
            override(private, [f"regroup.refit={refit}"])
    with pytest.raises(
        ValueError, match="regroup.start='dense' is not allowed: needs clustered experts with residuals"
    ):
        override(private, ["regroup.start=dense"])
    with pytest.raises(ValueError, match="needs clustered experts with residuals, model.gate=softmax"):
        residual_tiny("regroup.start=dense", "model.gate=sigmoid")
    assert override(private, ["regroup.force=3", "regroup.force_kind=random"]).regroup.force_kind == "random"


def test_a_config_without_the_kind_of_its_experts_has_residuals() -> None:
    old = residual_tiny().to_dict()
    for field in ("expert_kind", "expert_width", "base_width", "gate"):  # version 0.1 had none of them
        del old["model"][field]
    assert from_dict(old) == residual_tiny()


def test_a_config_without_the_kind_of_a_forced_plan_forces_the_mildest() -> None:
    old = override(preset("tiny"), ["regroup.force=200"]).to_dict()
    del old["regroup"]["force_kind"]
    assert from_dict(old).regroup.force_kind == "mildest"


def test_overrides_are_checked_together() -> None:
    """Two values that are only right with each other may come in any order."""
    config = override(preset("tiny"), ["model.n_experts=256", "model.n_clusters=32"])
    assert (config.model.n_experts, config.model.n_clusters) == (256, 32)
    assert override(preset("tiny"), ["model.n_clusters=32", "model.n_experts=256"]).model == config.model


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


def test_an_unset_auxiliary_loss_of_an_old_config_stays_unset() -> None:
    old = preset("tiny").to_dict()
    old["train"]["aux_loss"] = -1.0  # as version 0.1 wrote it
    assert from_dict(old) == preset("tiny")
    assert override(preset("tiny"), ["train.aux_loss=0.02", "train.aux_loss=none"]) == preset("tiny")
    with pytest.raises(ValueError, match="must be 0 or more, or none"):
        override(preset("tiny"), ["train.aux_loss=-1"])
    with pytest.raises(ValueError, match="expected float or none"):
        override(preset("tiny"), ["train.aux_loss=often"])


def test_every_field_has_a_description_that_ends_in_a_sentence() -> None:
    text = describe(Config())
    paragraphs = re.split(r"^  (?=\w+\.\w+=)", text, flags=re.MULTILINE)[1:]
    assert [paragraph.partition("=")[0] for paragraph in paragraphs] == list(KEYS)
    assert all(len(paragraph.split()) >= 4 and paragraph.rstrip().endswith(".") for paragraph in paragraphs)


# YAML


def values(name: str) -> st.SearchStrategy[str]:
    """Draw values of a field as text, valid by type."""
    section, _, field = name.partition(".")
    kind = hints(section)[field]
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if kind is str:
        return st.text(max_size=20)
    if kind is bool:
        return st.sampled_from(["true", "false"])
    numbers = st.integers(0, 1 << 20).map(str)
    return numbers if kind is int else st.floats(0, 1e6, allow_nan=False).map(repr) | numbers | st.just("none")


@given(st.dictionaries(st.sampled_from(KEYS), st.integers(), max_size=6).flatmap(
    lambda chosen: st.tuples(*(values(key).map(lambda v, k=key: f"{k}={v}") for key in chosen))
))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_yaml_is_the_inverse_of_to_yaml(assignments: tuple[str, ...]) -> None:
    try:
        config = override(preset("tiny"), assignments)
    except ValueError:
        return  # the values do not fit each other
    event("accepted")
    assert from_yaml(config.to_yaml()) == config
    repeated = from_yaml(repeatable_yaml(config))
    assert (repeated.run.name, repeated.train.resume) == ("", "")
    assert (repeated.model, repeated.data, repeated.regroup) == (config.model, config.data, config.regroup)


def test_yaml_of_a_run_of_version_0_1_keeps_its_model() -> None:
    config = residual_tiny("model.layers=3")
    old = yaml.safe_load(config.to_yaml())
    for key in ADDED:
        del old["model"][key.partition(".")[2]]
    assert from_yaml(yaml.safe_dump(old)) == config
    assert from_yaml("preset: tiny\nmodel: {layers: 3}") == override(preset("tiny"), ["model.layers=3"])


@pytest.mark.parametrize(
    "item",
    [
        "train.workers=2,8",
        "regroup.mode=off",
        "train.gpu=no",
        "data.path=null",
        "run.name=1e3",
        "data.path=~/a: b # c",
        "train.aux_loss=0.5",
    ],
)
def test_yaml_keeps_values_that_yaml_reads_as_something_else(item: str) -> None:
    config = override(preset("tiny"), [item])
    assert from_yaml(config.to_yaml()) == config


def test_yaml_scalars_are_read_by_the_type_of_their_field() -> None:
    text = "preset: tiny\ntrain: {gpu: no, lr: 3e-4, aux_loss: null}\nregroup: {mode: off}\nrun: {name:, seed: 7}\n"
    config = from_yaml(text)
    assert config == override(
        preset("tiny"), ["train.gpu=no", "train.lr=0.0003", "regroup.mode=off", "run.seed=7", "train.aux_loss=none"]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping"),
        ("tiny", "must be a mapping"),
        ("[1, 2]", "must be a mapping"),
        ("model: 3", "model must be a mapping"),
        ("model: {layer: 6}", "unknown key 'model.layer': did you mean 'model.layers'"),
        ("modle: {layers: 6}", "unknown config section 'modle': did you mean 'model'"),
        ("model: {layers: 6, layers: 7}", "has the key 'layers' twice"),
        ("model: {layers: 6}\nmodel: {layers: 6}", "has the key 'model' twice"),
        ("model: {layers: [6]}", "model.layers must be one value"),
        ("model: {layers: many}", "expected int"),
        ("model: {layers: 1.5}", "expected int"),
        ("model: {layers: null}", "expected int"),
        ("model: {layers: 0}", "must be greater than 0"),
        ("model: {tied_head: maybe}", "true or false"),
        ("train: {lr: .nan}", "expected float"),
        ("train: {lr: nan}", "must be finite"),
        ("preset: huge", "unknown preset 'huge'"),
        ("preset: [tiny]", "preset must be one value"),
        ("? [a]\n: b", "must be one value"),
        ("run: &x {name: a}\ndata: *x", "line 1 of the YAML config has an anchor or alias"),
        ("<<: {preset: tiny}", "unknown config section '<<'"),
        ("data: {path: !!python/object/apply:os.system [ls]}", "has the tag"),
        ("preset: tiny\n---\npreset: tiny", "single document"),
        ("a: b: c", "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("[" * 50000, "nested too deeply"),
        ("{a: " * 9000 + "1" + "}" * 9000, "nested too deeply"),
        ("# " + "x" * (1 << 16), "larger than 64 KiB"),
    ],
)  # fmt: skip
def test_a_bad_yaml_config_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_yaml(text)


def test_an_alias_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    with pytest.raises(ValueError, match="anchor or alias"):
        from_yaml("\n".join(lines))


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_config_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        from_yaml(text)


def test_expand_names_the_remedy_where_there_is_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="set RAYMOE_HOME or HOME"):
        expand("~no_such_user_of_this_machine/runs")
    assert expand("/mnt/raymoe") == Path("/mnt/raymoe")
    monkeypatch.setenv("RAYMOE_HOME", "/mnt/raymoe")
    assert default_root() == "/mnt/raymoe"
