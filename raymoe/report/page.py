"""The report of a run: one HTML page from its records. It requires no network, no script and no display."""

from __future__ import annotations

import html
from collections.abc import Sequence

from raymoe.report.elements import paragraph, section, terms
from raymoe.report.facts import environment_facts, result_facts
from raymoe.report.plots import Record
from raymoe.report.regroup_section import regroup_section
from raymoe.report.routing_section import routing_section
from raymoe.report.sections import (
    balance_section,
    comparison_section,
    config_list,
    cost_section,
    domain_section,
    event_table,
    load_sections,
    loss_section,
    schedule_section,
    serving_section,
)
from raymoe.report.style import STYLE


def render(
    about: Record,
    metrics: Sequence[Record],
    plans: Sequence[Record],
    serving: Sequence[Record],
    comparison: Record | None = None,
) -> str:
    """Return the page of a run.

    `about` is its config.json, `metrics`, `plans` and `serving` are the records of its JSONL files, and
    `comparison` is a table with `title`, `head`, `rows` and `note`.
    """
    kinds = ("train", "validation", "event", "assignment")
    trains, validations, events, assignments = ([r for r in metrics if r.get("kind") == kind] for kind in kinds)
    config = about["config"]
    run = config.get("run")
    name = html.escape(str((run.get("name") if isinstance(run, dict) else "") or "run"))
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name} · raymoe</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<header><p>raymoe training run</p><h1>{name}</h1>"
        f"{terms(result_facts(about, trains, validations, events))}</header><main>"
        + ("" if trains else paragraph("No training step is recorded yet."))
        + comparison_section(comparison)
        + loss_section(about, trains, validations, events)
        + schedule_section(trains)
        + balance_section(trains)
        + load_sections(trains, [r.get("assignment") for r in assignments])
        + routing_section(trains, validations)
        + domain_section(validations)
        + regroup_section(plans, assignments, trains, validations)
        + cost_section(trains)
        + serving_section(serving)
        + section("Environment", [], content=terms(environment_facts(about, trains)))
        + event_table(events)
        + config_list(config)
        + "</main></body></html>\n"
    )
