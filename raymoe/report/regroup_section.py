"""Section of a report on regrouping: the plans, their expected and measured gain, and the change of similarity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from raymoe.report.elements import details, paragraph, section, table, terms
from raymoe.report.plots import Record, column, show
from raymoe.report.regroup_plots import (
    Decision,
    Picture,
    decisions,
    flows,
    mean_similarity,
    purity_plot,
    remap_losses,
    similarities,
)

OPEN_ROWS = 20
"""Largest number of decisions for which their table is open."""

READING = (
    "A positive measured gain does not show that a plan was useful. Experts adapt to the cluster in which they train, "
    "so random swaps were also followed by a positive measured gain. Gains of two similarities have different scales. To see whether plans help, compare the validation "
    "loss with that of a run with regroup.mode=off."
)

COLUMNS = {
    "version": ("version", ".0f"), "moves": ("moves", ",.0f"), "bytes": ("bytes", ",.0f"),
    "pause ms": ("pause_ms", ",.1f"), "expected gain": ("expected_gain", "+.4f"), "measured gain": ("measured_gain", "+.4f"),
    "probe before": ("probe_before", ".4f"), "probe after": ("probe_after", ".4f"),
    "probe after overlap": ("probe_after_overlap", ".4f"),
}  # fmt: skip


def regroup_section(
    plans: Sequence[Record], assignments: Sequence[Record], trains: Sequence[Record], validations: Sequence[Record]
) -> str:
    plans = [record for record in plans if record.get("kind") == "plan"]
    if not plans:
        return ""
    rows = decisions(plans)
    applied = [row for row in rows if row.outcome == "applied"]
    recorded = [record["step"] for record in (*assignments, *trains, *validations)]
    marked = [row for row in applied if 0 <= row.step <= max(recorded, default=-1)]
    membership, left_out = flows(assignments, max(recorded, default=0))
    lead = f"Membership is drawn for the layers that change most; {left_out} layers are left out." if left_out else ""
    figures = [*membership, *similarities(rows), purity_plot(validations, marked), remap_losses(trains, marked)]
    reading = paragraph(READING) if any(not math.isnan(row.measured_gain) for row in applied) else ""
    content = terms(plan_facts(plans, applied, trains)) + reading + _plan_table(rows)
    return section("Regrouping", figures, lead, content)


def plan_facts(plans: Sequence[Record], applied: Sequence[Decision], trains: Sequence[Record]) -> dict[str, str]:
    """Return the number of plans, their gains, the change of similarity and the pause, by title."""
    names = {"made": "Plans made", "applied": "Plans applied", "refused": "Plans refused", "no_plan": "Periods without a plan"}  # fmt: skip
    facts = {title: f"{sum(r.get('name') == name for r in plans):,}" for name, title in names.items()}
    kinds = {kind for r in plans if isinstance(kind := r.get("similarity_kind"), str)}
    if kinds:
        facts["Similarity of experts"] = ", ".join(sorted(kinds))
    measured = [row for row in applied if not math.isnan(row.measured_gain)]
    if measured:
        gains = np.array([row.measured_gain for row in measured])
        facts["Mean expected gain"] = f"{show(_mean([row.expected_gain for row in measured]), '+.4f')} of the objective"
        facts["Mean measured gain"] = f"{gains.mean():+.4f}, {len(gains)} of {len(applied)} plans measured"
        facts["Measured gain above 0"] = f"{(gains > 0).sum()} of {len(gains)} plans"
    facts |= _similarity_facts(applied)
    pauses = [row.pause_ms for row in applied if not math.isnan(row.pause_ms)]
    if pauses:
        pause, step = float(np.median(pauses)), column(trains, "step_ms")
        steps = pause / float(np.nanmedian(step)) if np.isfinite(step).any() else math.nan
        facts["Median pause without probes"] = f"{pause:,.0f} ms, {show(steps, '.2f')} steps"
    restarts = sum(record.get("name") == "clusterer_restarted" for record in plans)
    return facts | ({"Clusterer restarts": f"{restarts:,}"} if restarts else {})


def _similarity_facts(applied: Sequence[Decision]) -> dict[str, str]:
    """Return the mean similarity when a plan was made and when its gain was measured, each with its own clusters."""
    pairs = [(row.before, row.after) for row in applied if row.before and row.after]
    if not pairs:
        return {}
    inside, across = ([[_similarity(p, which) for p in pair if p] for pair in pairs] for which in (True, False))
    plans = f"{len(pairs)} plan{'s' * (len(pairs) > 1)}"
    return {
        f"Similarity {name}": f"{show(_mean(before), '.3f')} before, {show(_mean(after), '.3f')} after, {plans}"
        for name, values in (("inside clusters", inside), ("across clusters", across))
        for before, after in [tuple(zip(*values, strict=True))]
    }


def _similarity(picture: Picture, inside: bool) -> float:
    return mean_similarity(picture)[0 if inside else 1]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _plan_table(rows: Sequence[Decision]) -> str:
    if not rows:
        return ""

    def row(decision: Decision) -> tuple[str, ...]:
        numbers = (show(getattr(decision, field), form) for field, form in COLUMNS.values())
        return f"{decision.step:,}", decision.outcome, *numbers, decision.reason

    content = table(("step", "outcome", *COLUMNS, "reason"), map(row, rows))
    return details(f"Plans and decisions ({len(rows)})", content, is_open=len(rows) <= OPEN_ROWS, wide=True)
