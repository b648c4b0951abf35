"""Measures of routing: forced choices, probability of the choices and entropy, against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.config import ModelSection
from raymoe.model.dispatch import LocalDispatch
from raymoe.model.experts import ClusteredExperts, FlatExperts
from raymoe.model.observation import Observation
from raymoe.model.router import route
from raymoe.model.routing_sums import QUANTITIES, routing_measures, routing_sums


def sums_of(logits_TG: torch.Tensor, bias_G: torch.Tensor, k: int) -> dict[str, float]:
    """The sums of a router that scores its rows with these logits."""
    groups = logits_TG.shape[1]
    choice = route(logits_TG, torch.eye(groups, dtype=logits_TG.dtype), bias_G, k, gate="all")
    return dict(zip(QUANTITIES, routing_sums(choice).tolist(), strict=True))


def test_a_bias_forces_a_known_share_of_the_choices() -> None:
    """Groups 0 and 1 lead; a bias of 2 lifts group 3 over group 1 in the first and third row, not in the second."""
    logits = torch.log(torch.tensor([[4.0, 2, 1, 1], [5.0, 2.75, 0.125, 0.125], [4.0, 2, 1, 1]], dtype=torch.float64))
    bias = torch.tensor([0.0, 0.0, 0.0, 2.0]).double()
    found = sums_of(logits, bias, 2)
    assert (found["rows"], found["choices"], found["forced"]) == (3, 6, 2)
    assert found["probability"] == pytest.approx((4 + 1 + 5 + 2.75 + 4 + 1) / 8)
    row = (0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)) / math.log(4)
    other = sum(-p * math.log(p) for p in (0.625, 0.34375, 0.015625, 0.015625)) / math.log(4)
    assert found["entropy"] == pytest.approx(2 * row + other)
    assert sums_of(logits, torch.zeros(4).double(), 2)["forced"] == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 7), st.integers(0, 9), st.data())
def test_sums_equal_a_plain_loop(groups: int, rows: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, groups))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    logits = torch.randn(rows, groups, generator=generator, dtype=torch.float64)
    bias = torch.randn(groups, generator=generator, dtype=torch.float64)
    forced, probability, entropy = 0, 0.0, 0.0
    for row in logits:
        best = set(sorted(range(groups), key=lambda g: -row[g])[:k])
        chosen = sorted(range(groups), key=lambda g: -(row + bias)[g])[:k]
        weights = [math.exp(x) for x in row]
        forced += sum(g not in best for g in chosen)
        probability += sum(weights[g] for g in chosen) / sum(weights)
        entropy -= sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights) / math.log(groups)
    expected = {
        "rows": rows, "entropy": entropy, "choices": rows * k, "forced": forced, "probability": probability,
    }  # fmt: skip
    assert sums_of(logits, bias, k) == pytest.approx(expected)


def test_equal_probabilities_are_not_forced_and_have_an_entropy_of_one() -> None:
    found = sums_of(torch.zeros(5, 3), torch.tensor([0.0, 0.0, 1.0]), 1)
    assert found == pytest.approx({"rows": 5, "entropy": 5, "choices": 5, "forced": 0, "probability": 5 / 3})


def test_groups_that_take_no_part_add_no_entropy() -> None:
    fade = torch.tensor([0.0, 0.0, -math.inf])
    choice = route(torch.zeros(4, 3), torch.eye(3), torch.zeros(3), 3, gate="selected", fade_G=fade)
    rows, entropy, choices, forced, probability = routing_sums(choice).tolist()
    assert (rows, choices, forced, probability) == (4, 12, 0, 4)
    assert entropy == pytest.approx(4 * math.log(2) / math.log(3))


@pytest.mark.parametrize("groups", [0, 1])
def test_a_router_without_a_choice_does_not_count(groups: int) -> None:
    choice = route(torch.ones(4, 2), torch.ones(groups, 2), torch.zeros(groups), groups, gate="selected")
    assert routing_sums(choice).tolist() == [0, 0, 0, 0, 0]


def model(**changes: int | str) -> ModelSection:
    sizes = dict(layers=2, d_model=6, heads=1, kv_heads=1, d_expert=4, n_experts=7, n_clusters=3, residual_width=2)
    return ModelSection(**(sizes | {"experts_per_token": 2, **changes}))  # type: ignore[arg-type]


def test_both_levels_of_a_layer_are_observed() -> None:
    """A cluster of one expert has no choice at stage 2, and its rows count at stage 1 alone."""
    section = model()
    layer = ClusteredExperts(section, [0, 0, 0, 0, 1, 1, 2], LocalDispatch(3))
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    layer.router.bias[2], layer.expert_bias[3] = 2.0, 100.0
    rows = torch.randn(50, 6, generator=generator)
    seen = Observation(section, routing=True)
    layer(rows, seen.layers[0])
    found = seen.routing_sums()
    load = seen.layers[0].cluster_load_C
    assert load is not None and load.min() > 0
    counts = dict(zip(QUANTITIES, found[1, 0].tolist(), strict=True))
    assert found[0, 0, 0] == 50 and counts["rows"] == 50 - load[2] and counts["choices"] == 2 * counts["rows"]
    assert 0 < counts["forced"] < load[0]  # of each row of cluster 0, the choice of expert 3 or none
    assert not found[:, 1].any()  # the other layer did not run
    measures = routing_measures(found)
    shares = measures["bias_forced_share"]["experts"]
    assert shares is not None and shares[0] == pytest.approx(counts["forced"] / counts["choices"]) and shares[1] is None
    assert {level: bias.tolist() for level, bias in layer.selection_biases().items()} == {
        "clusters": [0, 0, 2], "experts": [0, 0, 0, 100, 0, 0, 0],
    }  # fmt: skip


def test_a_flat_layer_is_observed_as_experts_and_nothing_without_a_request() -> None:
    section = model(experts="flat", n_clusters=1)
    layer = FlatExperts(section, LocalDispatch(7))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    asked, unasked = Observation(section, routing=True), Observation(section)
    for seen in (asked, unasked):
        layer(torch.randn(20, 6), seen.layers[1])
    measures = routing_measures(asked.routing_sums())
    assert measures["bias_forced_share"] == {"clusters": None, "experts": [None, 0.0]}
    assert not unasked.routing_sums().any()


def test_a_ghost_has_no_place_in_the_selection_biases() -> None:
    layer = ClusteredExperts(model(), [1, 0, 0, 0, 1, 1, 2], LocalDispatch(3), ghosts={0: 0})
    layer.expert_bias[:] = torch.tensor([float(-1 if m.ghost else m.expert) for m in layer.local_members])
    assert layer.selection_biases()["experts"].tolist() == [0, 1, 2, 3, 4, 5, 6]
