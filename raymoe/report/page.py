"""A run on one page: `report.html`, made from what its folder records of it alone.

That is `config.json`, `metrics.jsonl`, `plans.jsonl` where clusters were regrouped, and `serving.jsonl` where
somebody recorded what became of the replicas that served it.

The page needs no network, no script and no display.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from raymoe.report.plots import Line, Record, column, domain_maps, last, lines_plot, load_maps, number, over_steps, show
from raymoe.report.regroup_plots import Decision, decisions, flows, purity_plot, remap_losses, similarities

LEVELS = ("experts", "clusters", "workers")
OPEN_ROWS = 20
"""Decisions up to which their table stands open."""


def render(about: Record, records: Sequence[Record], plans: Sequence[Record], serving: Sequence[Record]) -> str:
    trains, validations, events = ([r for r in records if r["kind"] == k] for k in ("train", "validation", "event"))
    assignments = [r for r in records if r["kind"] == "assignment"]
    name = html.escape(str(about["config"].get("run", {}).get("name") or "run"))
    facts = _terms(_facts(about, trains, validations, events))
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name} · raymoe</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<header><p>raymoe training run</p><h1>{name}</h1>{facts}</header><main>"
        + ("" if trains else "<p>No training step has been recorded yet.</p>")
        + _loss(trains, validations, events)
        + _schedule(trains)
        + _balance(trains)
        + _loads(trains, [r["assignment"] for r in assignments])
        + _domains(validations)
        + _regrouping(plans, assignments, trains, validations)
        + _cost(trains)
        + _served(serving)
        + _event_table(events)
        + _config_list(about["config"])
        + "</main></body></html>\n"
    )


def _facts(
    about: Record, trains: Sequence[Record], validations: Sequence[Record], events: Sequence[Record]
) -> dict[str, str]:
    """What a reader wants to know first."""
    config = about["config"]
    model, train = config.get("model", {}), config.get("train", {})
    groups = {
        "clustered": f", {model.get('n_experts')} in {model.get('n_clusters')} clusters",
        "flat": f", {model.get('n_experts')}",
    }
    kind = str(model.get("experts", "–"))
    facts = {"Preset": str(config.get("preset", "–")), "Experts in a layer": kind + groups.get(kind, "")}
    parameters = about.get("parameters")
    for what, count in (parameters if isinstance(parameters, dict) else {"": parameters}).items():
        if not math.isnan(number(count)):
            facts[f"Parameters {what}".strip()] = format(count, ",")
    if trains:
        end = trains[-1]
        stopped = ", stopped" if events and events[-1].get("name") == "stopped" else ""
        facts["Steps"] = f"{end['step']:,} of {show(train.get('steps'), ',.0f')}{stopped}"
        facts["Tokens"] = show(end.get("tokens"), ",.0f")
        facts["Workers"] = str(len(end.get("rss_mb") or []) or "–")
        facts["Training loss"] = show(last(column(trains, "loss")), ".4f")
    if validations:
        end, losses = validations[-1], column(validations, "loss")
        read = "whole set" if end.get("whole") else f"{end.get('windows', '–')} windows"
        facts["Validation loss"] = f"{show(end.get('loss'), '.4f')}, {read}"
        facts["Perplexity"] = show(end.get("perplexity"), ",.2f")
        if np.isfinite(losses).any():
            best = int(np.nanargmin(losses))
            facts["Best validation"] = f"{losses[best]:.4f} at {validations[best]['step']:,}"
        cv = {level: last(column(validations, "load_cv", level)) for level in LEVELS}
        facts |= {f"Load CV, {level}": f"{value:.3f}" for level, value in cv.items() if not math.isnan(value)}
    versions = about.get("versions")
    return facts | {what: str(version) for what, version in (versions if isinstance(versions, dict) else {}).items()}


def _terms(facts: Mapping[str, str]) -> str:
    items = (f"<div><dt>{html.escape(term)}</dt><dd>{html.escape(value)}</dd></div>" for term, value in facts.items())
    return f"<dl>{''.join(items)}</dl>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    columns = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{columns}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _section(title: str, figures: Sequence[str], lead: str = "", more: str = "") -> str:
    """Nothing where there is no figure and nothing `more`, which is HTML to stand before them."""
    if not any(figures) and not more:
        return ""
    lead = f"<p>{html.escape(lead)}</p>" if lead else ""
    return f'<section><h2>{title}</h2>{lead}{more}<div class="figures">{"".join(figures)}</div></section>'


def _loss(trains: Sequence[Record], validations: Sequence[Record], events: Sequence[Record]) -> str:
    unit, caption = "nats / token", "Training is the mean since the record before."
    losses = {"training": over_steps(trains, "loss"), "validation": over_steps(validations, "loss")}
    names = dict.fromkeys(domain for record in validations for domain in record.get("domains") or {})
    domains = {name: over_steps(validations, "domains", name) for name in names}
    figures = [
        lines_plot("Training and validation loss", caption, unit, losses, form=".4f", events=events),
        lines_plot("Validation loss by domain", "", unit, domains, form=".4f"),
    ]
    return _section("Loss", figures)


def _schedule(trains: Sequence[Record]) -> str:
    rate, norm = {"rate": over_steps(trains, "lr")}, {"norm": over_steps(trains, "grad_norm")}
    figures = [
        lines_plot("Learning rate", "", "rate", rate, from_zero=True),
        lines_plot("Gradient norm", "Over all parameters, before clipping.", "norm", norm, from_zero=True),
    ]
    return _section("Schedule and gradients", figures)


def _balance(trains: Sequence[Record]) -> str:
    def plot(title: str, caption: str, unit: str, field: str) -> str:
        lines = {level: over_steps(trains, field, level) for level in LEVELS}
        return lines_plot(title, caption, unit, lines, form=".3f", from_zero=True)

    figures = [
        plot("Coefficient of variation", "Standard deviation / mean of the load.", "CV", "load_cv"),
        plot("Maximum violation", "Largest load / mean load - 1.", "MaxVio", "load_max_vio"),
    ]
    lead = "Measured in each layer since the record before, then averaged over layers. 0 is even."
    return _section("Balance of the load", figures, lead)


def _loads(trains: Sequence[Record], assignments: Sequence[list[list[int]]]) -> str:
    clusters = load_maps(trains, "clusters")
    assignment_LE = assignments[-1] if assignments and clusters else None  # without clusters it means nothing
    experts = load_maps(trains, "experts", assignment_LE)
    lead = "Relative to an even share, since the record before."
    order = " Experts are sorted by cluster." if assignment_LE else ""
    return _section("Load of clusters", clusters, lead) + _section("Load of experts", experts, lead + order)


def _domains(validations: Sequence[Record]) -> str:
    """From the last validation that read the whole set, else from the last."""
    served = [record for record in validations if record.get("cluster_by_domain")]
    if not served:
        return ""
    record = next((r for r in reversed(served) if r.get("whole")), served[-1])
    read = "the whole validation set" if record.get("whole") else f"{record.get('windows', 'some')} validation windows"
    lead = f"Share of each domain's tokens by cluster, on {read} at step {record['step']:,}."
    return _section("Which domains each cluster serves", domain_maps(record), lead)


def _regrouping(
    plans: Sequence[Record], assignments: Sequence[Record], trains: Sequence[Record], validations: Sequence[Record]
) -> str:
    plans = [record for record in plans if record["kind"] == "plan"]
    if not plans:
        return ""
    rows = decisions(plans)
    applied = [row for row in rows if row.outcome == "applied"]
    recorded = [record["step"] for record in (*assignments, *trains, *validations)]
    marked = [row for row in applied if 0 <= row.step <= max(recorded, default=-1)]
    membership, left_out = flows(assignments, max(recorded, default=0))
    lead = f"Membership is drawn for the layers that change most, {left_out} more are left out." if left_out else ""
    figures = [
        *membership,
        *similarities(rows),
        purity_plot(validations, marked),
        remap_losses(trains, marked),
    ]
    return _section("Regrouping", figures, lead, _terms(_plan_facts(plans, applied, trains)) + _plan_table(rows))


def _plan_facts(plans: Sequence[Record], applied: Sequence[Decision], trains: Sequence[Record]) -> dict[str, str]:
    facts = {
        f"Plans {what}": f"{sum(r.get('name') == what for r in plans):,}" for what in ("made", "applied", "refused")
    }
    gains = [row.gain_seen for row in applied if not math.isnan(row.gain_seen)]
    if gains:
        rose = sum(gain > 0 for gain in gains)
        facts["Gain seen positive"] = f"{rose / len(gains):.0%}, {rose} of {len(gains)}"
    pauses = [row.pause_ms for row in applied if not math.isnan(row.pause_ms)]
    if pauses:
        pause, step = float(np.median(pauses)), column(trains, "step_ms")
        steps = pause / float(np.nanmedian(step)) if np.isfinite(step).any() else math.nan
        facts["Median pause"] = f"{pause:,.0f} ms, {show(steps, '.2f')} steps"
    restarts = sum(record.get("name") == "clusterer_restarted" for record in plans)
    return facts | ({"Clusterer restarts": f"{restarts:,}"} if restarts else {})


def _plan_table(rows: Sequence[Decision]) -> str:
    if not rows:
        return ""
    columns = {
        "version": ("version", ".0f"), "moves": ("moves", ",.0f"), "bytes": ("bytes", ",.0f"),
        "pause ms": ("pause_ms", ",.1f"), "gain expected": ("gain_expected", ".4f"), "gain seen": ("gain_seen", ".4f"),
        "probe before": ("probe_before", ".4f"), "probe after": ("probe_after", ".4f"),
        "probe after overlap": ("probe_settled", ".4f"),
    }  # fmt: skip

    def row(decision: Decision) -> tuple[str, ...]:
        numbers = (show(getattr(decision, field), form) for field, form in columns.values())
        return f"{decision.step:,}", decision.outcome, *numbers, decision.reason

    table = _table(("step", "outcome", *columns, "reason"), map(row, rows))
    opened = " open" if len(rows) <= OPEN_ROWS else ""
    return f'<details class="wide"{opened}><summary>Plans and decisions ({len(rows)})</summary>{table}</details>'


def _cost(trains: Sequence[Record]) -> str:
    def plot(title: str, caption: str, unit: str, lines: dict[str, Line]) -> str:
        return lines_plot(title, caption, unit, lines, form=",.0f", from_zero=True)

    workers = max((len(record.get("rss_mb") or []) for record in trains), default=0)
    memory = {f"worker {w}": over_steps(trains, "rss_mb", w) for w in range(workers)}
    sent = {"bytes": over_steps(trains, "a2a_bytes_per_token")}
    of_sent = "Bytes that expert parallelism sends, for each token trained on."
    figures = [
        plot("Speed", "All workers together.", "tokens / s", {"tokens/s": over_steps(trains, "tokens_per_s")}),
        plot("Memory", "Resident memory of each worker.", "MiB", memory),
        plot("All-to-all", of_sent, "bytes / token", sent),
    ]
    return _section("Speed, memory and communication", figures)


def _served(serving: Sequence[Record]) -> str:
    """Replicas of each cluster over the seconds of a load."""
    seconds = column(serving, "seconds")

    def plot(title: str, caption: str, of: str) -> str:
        names = dict.fromkeys(name for record in serving for name in record.get(of) or {})
        lines = {name: (seconds, column(serving, of, name)) for name in names}
        return lines_plot(title, caption, "replicas", lines, form=".0f", from_zero=True, over="seconds")

    figures = [
        plot("Replicas that each cluster should have", "Decided from its own load.", "targets"),
        plot("Replicas that run", "A new one loads its weights first.", "running"),
    ]
    return _section("Serving under a skewed load", figures)


def _event_table(events: Sequence[Record]) -> str:
    if not events:
        return ""

    def row(event: Record) -> tuple[str, ...]:
        rest = {key: value for key, value in event.items() if key not in ("kind", "step", "name")}
        details = (
            f"{key} {format(value, '.4g') if isinstance(value, float) else value}" for key, value in rest.items()
        )
        return f"{event['step']:,}", str(event.get("name")), ", ".join(details)

    table = _table(("step", "what", "details"), map(row, events))
    return f"<details><summary>Events ({len(events)})</summary>{table}</details>"


def _config_list(config: Record) -> str:
    """Every field as the override that sets it."""
    sections = {name: fields for name, fields in config.items() if isinstance(fields, dict)}
    lines = "\n".join(f"{name}.{field}={value}" for name, fields in sections.items() for field, value in fields.items())
    return f"<details><summary>Config</summary><pre>{html.escape(lines)}</pre></details>"


STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #ffffff; --ink: #1d2430; --soft: #576071; --grid: #dce0e7;
  --s0: #0072b2; --s1: #d55e00; --s2: #008a64; --s3: #aa4499; --s4: #8a6d00; --s5: #2f8fc4; --s6: #882255; --s7: #6b6b6b; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1d2128; --ink: #e6e9ee; --soft: #a3acba;
  --grid: #3a414d; --s0: #58a9e0; --s1: #f08a3c; --s2: #33c39a; --s3: #dd8fc4; --s4: #d9bd4a; --s5: #9bd3f5;
  --s6: #d97a9f; --s7: #a8a8a8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
header p { margin: 1rem 0 0; color: var(--soft); }
h1 { margin: 0 0 1rem; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.25rem 0 .75rem; font-size: 1.3rem; }
section > p { margin: -.5rem 0 .75rem; color: var(--soft); }
h3 { margin: 0 0 .5rem; font-size: 1rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem 1.25rem; margin: 0;
  padding: 1rem; background: var(--card); border-radius: .6rem; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: 1rem; background: var(--card); border-radius: .6rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { margin-top: .4rem; color: var(--soft); font-size: .875rem; }
details { margin-top: 1rem; padding: .75rem 1rem; background: var(--card); border-radius: .6rem; }
summary { cursor: pointer; font-weight: 600; }
table { width: 100%; margin-top: .5rem; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--grid); text-align: left; vertical-align: top; }
th, td:not(:last-child) { font-variant-numeric: tabular-nums; white-space: nowrap; }
td:last-child { width: 100%; }
pre { overflow-x: auto; font-size: .85rem; }
.wide { margin-bottom: 1rem; overflow-x: auto; }
.wide th { vertical-align: bottom; white-space: normal; overflow-wrap: normal; }
.wide td:last-child { min-width: 12rem; }
"""
