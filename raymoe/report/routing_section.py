"""Routing in a report: forced choices, probability of the choices, entropy and selection biases of each router."""

from __future__ import annotations

from collections.abc import Sequence

from raymoe.report.elements import details, section, table
from raymoe.report.plots import Line, Record, find, lines_plot, over_steps, show

ROUTERS = ("clusters", "experts")
"""Levels at which a router chooses."""

PLOTS = {
    "bias_forced_share": (
        "Forced choices", "Choices that the selection bias forces: the group is not among the top k without it.",
        "fraction of choices",
    ),
    "chosen_probability": (
        "Probability of the chosen groups", "Mean of the softmax over all groups, without selection bias.",
        "probability",
    ),
    "router_entropy": (
        "Router entropy", "Mean entropy of the softmax / entropy of equal probabilities.", "entropy / ln G",
    ),
}  # fmt: skip
"""Measure -> title, caption and unit of its plot."""

SHOWN_LINES = 16
"""Largest number of lines of a plot. Of more routers, evenly spaced layers are drawn."""
OPEN_ROWS = 16


def routing_section(trains: Sequence[Record], validations: Sequence[Record]) -> str:
    """Draw each measure over steps by layer and level, and list the last validation. Nothing without measures."""
    figures = [
        lines_plot(title, caption, unit, _lines(trains, measure), form=".3f", from_zero=True)
        for measure, (title, caption, unit) in PLOTS.items()
    ]
    measured = [record for record in validations if _routers([record])]
    content = _table(measured[-1]) if measured else ""
    return section("Routing", figures, "Each point is the last step before a record.", content)


def _routers(records: Sequence[Record]) -> list[tuple[str, int]]:
    """Return the (level, layer) of each router that the records measure."""
    measures = [record.get(measure) for record in records for measure in PLOTS]
    found = []
    for level in ROUTERS:
        by_layer = [values for m in measures if isinstance(m, dict) and isinstance(values := m.get(level), list)]
        found += [(level, layer) for layer in range(max(map(len, by_layer), default=0))]
    return found


def _lines(trains: Sequence[Record], measure: str) -> dict[str, Line]:
    routers = _routers(trains)
    layers = sorted({layer for _, layer in routers})
    most = max(1, SHOWN_LINES // max(1, len({level for level, _ in routers})))
    shown = {layers[i * len(layers) // most] for i in range(most)} if len(layers) > most else set(layers)
    return {
        f"layer {layer} {level}": over_steps(trains, measure, level, layer)
        for level, layer in routers
        if layer in shown
    }


def _table(validation: Record) -> str:
    head = ("router", "forced", "probability", "entropy", "bias min", "bias max", "bias std")
    fields = {
        "bias_forced_share": ".1%", "chosen_probability": ".3f", "router_entropy": ".3f",
        "selection_bias_min": "+.3f", "selection_bias_max": "+.3f", "selection_bias_std": ".3f",
    }  # fmt: skip
    rows = [
        (f"layer {i} {level}", *(show(find(validation, name, level, i), form) for name, form in fields.items()))
        for level, i in _routers([validation])
    ]
    title = f"Routers at the validation of step {validation['step']:,}"
    return details(title, table(head, rows), is_open=len(rows) <= OPEN_ROWS, wide=True)
