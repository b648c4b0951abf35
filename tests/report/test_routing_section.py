"""Routing in a report: plots by layer and level, a table of the last validation, and damaged or older records."""

from __future__ import annotations

import re
from typing import Any

import pytest

from raymoe.report.routing_section import SHOWN_LINES, routing_section

Record = dict[str, Any]


def measures(layers: int, clustered: bool = True, **changes: Any) -> Record:
    """Measures by level, with a different value for each layer and level."""

    def by_level(scale: float) -> Record:
        values = [scale * (layer + 1) / (layers + 1) for layer in range(layers)]
        return {"clusters": values if clustered else None, "experts": [value / 2 for value in values]}

    return {
        "bias_forced_share": by_level(0.6), "chosen_probability": by_level(0.9), "router_entropy": by_level(1.0),
        "selection_bias_min": by_level(-1.5), "selection_bias_max": by_level(3.0), "selection_bias_std": by_level(1.2),
    } | changes  # fmt: skip


def section(layers: int = 2, **changes: Any) -> str:
    trains = [{"kind": "train", "step": step, **measures(layers, **changes)} for step in (10, 20)]
    return routing_section(trains, [{"kind": "validation", "step": 20, **measures(layers, **changes)}])


def labels(page: str) -> dict[str, str]:
    """The description of each plot by title."""
    return dict(re.findall(r'<h3>(.*?)</h3><svg[^>]*aria-label="(.*?)"', page))


def test_each_measure_has_a_line_for_each_layer_and_level() -> None:
    found = labels(section())
    assert list(found) == ["Forced choices", "Probability of the chosen groups", "Router entropy"]
    assert found["Forced choices"].split("last values: ")[1] == (
        "layer 0 clusters 0.200, layer 1 clusters 0.400, layer 0 experts 0.100, layer 1 experts 0.200"
    )
    assert "layer 1 experts 0.333" in found["Router entropy"]


def test_the_table_has_the_last_validation() -> None:
    page = section()
    assert "Routers at the validation of step 20" in page
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", page)[1:]]
    assert [row[0] for row in rows] == ["layer 0 clusters", "layer 1 clusters", "layer 0 experts", "layer 1 experts"]
    assert rows[1] == ["layer 1 clusters", "40.0%", "0.600", "0.667", "-1.000", "+2.000", "0.800"]


def test_a_model_without_clusters_has_experts_alone() -> None:
    page = section(clustered=False)
    assert "layer 1 experts" in page and "clusters" not in page


def test_many_layers_are_drawn_in_part_and_listed_in_full() -> None:
    page = section(layers=40)
    for words in labels(page).values():
        drawn = re.findall(r"layer (\d+) (\w+)", words)
        assert len(drawn) == SHOWN_LINES and {level for _, level in drawn} == {"clusters", "experts"}
    assert page.count("<tr>") == 1 + 80


def test_records_without_measures_have_no_section() -> None:
    assert routing_section([{"step": 10, "loss": 4.0}], [{"step": 10, "loss": 4.0}]) == ""
    assert routing_section([], []) == ""
    none = {name: {"clusters": None, "experts": None} for name in measures(1)}
    assert routing_section([{"step": 10, **none}], [{"step": 10, **none}]) == ""


def test_older_records_before_newer_ones_are_left_out() -> None:
    page = routing_section([{"step": 10, "loss": 4.0}, {"step": 20, **measures(1)}], [])
    assert "layer 0 clusters 0.300" in labels(page)["Forced choices"] and "<table" not in page


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [None], {"clusters": "x"}, {"clusters": [None, "<b>", 1e999]}])
def test_damaged_measures_make_a_page(value: Any) -> None:
    page = section(bias_forced_share=value)
    assert "Router entropy" in labels(page) and "<b>" not in page
