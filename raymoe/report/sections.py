"""Sections of a report on training, evaluation and serving. Each returns nothing if no record has its data."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from raymoe.report.elements import details, paragraph, section, table
from raymoe.report.facts import LEVELS, bits_per_byte, training_seconds
from raymoe.report.plots import Line, Record, column, domain_maps, lines_plot, load_maps, over_steps


def loss_section(
    about: Record, trains: Sequence[Record], validations: Sequence[Record], events: Sequence[Record]
) -> str:
    unit, caption = "nats / token", "The training loss is the mean since the previous record."
    losses = {"training": over_steps(trains, "loss"), "validation": over_steps(validations, "loss")}
    names = dict.fromkeys(domain for record in validations for domain in _keys(record.get("domains")))
    domains = {name: over_steps(validations, "domains", name) for name in names}
    bits = {"validation": (column(validations, "step"), np.array([bits_per_byte(about, r) for r in validations]))}
    millions, tokens = over_tokens(trains, losses)
    unit_of_time, time = over_time(trains, losses)
    figures = [
        lines_plot("Loss", caption, unit, losses, form=".4f", events=events),
        lines_plot("Validation loss by domain", "", unit, domains, form=".4f"),
        lines_plot("Loss over tokens", "", unit, tokens, form=".4f", over=millions),
        lines_plot(
            "Loss over training time", "Time of training steps, without validation, checkpoints and restarts.",
            unit, time, form=".4f", over=unit_of_time,
        ),
        lines_plot("Validation in bits per byte", "Comparable between tokenizers.", "bits / byte", bits, form=".4f"),
    ]  # fmt: skip
    return section("Loss", figures)


def over_tokens(trains: Sequence[Record], losses: dict[str, Line]) -> tuple[str, dict[str, Line]]:
    """Return the unit of the axis, and the lines over training tokens instead of steps."""
    tokens = column(trains, "tokens")
    scale, unit = (1e6, "million tokens") if np.nanmax(tokens, initial=0.0) >= 1e6 else (1.0, "tokens")
    return unit, _over(trains, tokens / scale, losses)


def over_time(trains: Sequence[Record], losses: dict[str, Line]) -> tuple[str, dict[str, Line]]:
    """Return the unit of the axis, and the lines over the time of training steps instead of steps."""
    seconds = training_seconds(trains)
    total = float(seconds[-1]) if len(seconds) else 0.0
    scale, unit = (3600.0, "hours") if total >= 3600 else (60.0, "minutes")
    return unit, _over(trains, seconds / scale, losses)


def _over(trains: Sequence[Record], position: np.ndarray, losses: dict[str, Line]) -> dict[str, Line]:
    """Replace steps by positions that training records give for their steps, interpolated linearly."""
    steps = column(trains, "step")
    known = np.isfinite(position)
    if known.sum() < 2 or not position[known].max() > 0:
        return {}
    order = np.argsort(steps[known], kind="stable")
    at, values = np.append(0.0, steps[known][order]), np.append(0.0, position[known][order])
    return {name: (np.interp(line[0], at, values), line[1]) for name, line in losses.items()}


def schedule_section(trains: Sequence[Record]) -> str:
    rate, norm = {"rate": over_steps(trains, "lr")}, {"norm": over_steps(trains, "grad_norm")}
    names = dict.fromkeys(domain for record in trains for domain in _keys(record.get("epochs")))
    epochs = {name: over_steps(trains, "epochs", name) for name in names}
    figures = [
        lines_plot("Learning rate", "", "learning rate", rate, from_zero=True),
        lines_plot("Gradient norm", "Of all parameters, before clipping.", "norm", norm, from_zero=True),
        lines_plot(
            "Epochs of each domain", "Visits of its windows, with train.mixture.", "epochs", epochs, from_zero=True
        ),
    ]
    return section("Schedule and gradients", figures)


def balance_section(trains: Sequence[Record]) -> str:
    def plot(title: str, caption: str, unit: str, field: str) -> str:
        lines = {level: over_steps(trains, field, level) for level in LEVELS}
        return lines_plot(title, caption, unit, lines, form=".3f", from_zero=True)

    figures = [
        plot("Coefficient of variation", "Standard deviation of the load / mean load.", "CV", "load_cv"),
        plot("Maximum violation", "Largest load / mean load − 1.", "MaxVio", "load_max_vio"),
    ]
    lead = "The load of each layer since the previous record, averaged over layers. 0 is perfect balance."
    return section("Load balance", figures, lead)


def load_sections(trains: Sequence[Record], assignments: Sequence[Any]) -> str:
    clusters = load_maps(trains, "clusters")
    assignment_LE = assignments[-1] if assignments and clusters else None  # flat experts have no clusters
    experts = load_maps(trains, "experts", assignment_LE)
    lead = "Load relative to an even share, since the previous record."
    order = " Experts are sorted by cluster." if assignment_LE else ""
    return section("Load of clusters", clusters, lead) + section("Load of experts", experts, lead + order)


def domain_section(validations: Sequence[Record]) -> str:
    """Draw the last validation of the whole set, or the last validation if none read the whole set."""
    routed = [record for record in validations if record.get("cluster_by_domain")]
    if not routed:
        return ""
    record = next((r for r in reversed(routed) if r.get("whole")), routed[-1])
    text = "the whole validation set" if record.get("whole") else f"{record.get('windows', '–')} validation windows"
    lead = f"Share of each domain's tokens by cluster, on {text} at step {record['step']:,}."
    return section("Domains by cluster", domain_maps(record), lead)


def cost_section(trains: Sequence[Record]) -> str:
    def plot(title: str, caption: str, unit: str, lines: dict[str, Line]) -> str:
        return lines_plot(title, caption, unit, lines, form=",.0f", from_zero=True)

    workers = max((len(record.get("rss_mb") or []) for record in trains), default=0)
    memory = {f"worker {w}": over_steps(trains, "rss_mb", w) for w in range(workers)}
    figures = [
        plot("Speed", "All workers together.", "tokens / s", {"tokens/s": over_steps(trains, "tokens_per_s")}),
        plot("Step time", "Mean over workers and steps since the previous record. On GPUs, communication is the time of launches.", "ms", step_times(trains)),
        plot("Memory", "Resident memory of each worker.", "MiB", memory),
        plot(
            "All-to-all", "Bytes that expert parallelism sends per training token.", "bytes / token",
            {"bytes": over_steps(trains, "a2a_bytes_per_token")},
        ),
    ]  # fmt: skip
    return section("Speed, memory and communication", figures)


def step_times(trains: Sequence[Record]) -> dict[str, Line]:
    """Split the step time into computation, communication (with waits for other workers) and the rest, in ms."""
    steps, total = over_steps(trains, "step_ms")
    compute, communication = _mean_of(trains, "compute_ms"), _mean_of(trains, "communication_ms")
    lines = {"step": (steps, total), "forward and backward": (steps, compute)}
    if np.isfinite(communication).any():
        lines["communication and waits"] = steps, communication
        lines["rest"] = steps, total - compute - communication
    else:
        lines["communication and rest"] = steps, total - compute
    return lines


def _mean_of(records: Sequence[Record], field: str) -> np.ndarray:
    """Return the mean over workers of a field in each record; NaN without it."""
    workers = max((len(_list(record.get(field))) for record in records), default=0)
    by_worker_WT = np.array([column(records, field, worker) for worker in range(workers)]).reshape(
        workers, len(records)
    )
    known_T = np.isfinite(by_worker_WT).sum(0)
    return np.divide(np.nansum(by_worker_WT, 0), known_T, out=np.full(len(records), np.nan), where=known_T > 0)


def comparison_section(comparison: Record | None) -> str:
    """Render the table of a comparison: `title`, `head`, `rows` and `note`."""
    head, rows = (_list(comparison.get(key)) for key in ("head", "rows")) if comparison else ([], [])
    if comparison is None or not head or not rows:
        return ""
    cells = [[str(cell) for cell in _list(row)] for row in rows]
    note = paragraph(str(comparison.get("note") or ""))
    content = f'<div class="card wide">{table([str(name) for name in head], cells)}</div>{note}'
    return section("Comparison", [], str(comparison.get("title") or ""), content)


def serving_section(serving: Sequence[Record]) -> str:
    """Draw the replicas of each cluster over the seconds of a load."""
    seconds = column(serving, "seconds")

    def plot(title: str, caption: str, field: str) -> str:
        names = dict.fromkeys(name for record in serving for name in _keys(record.get(field)))
        lines = {name: (seconds, column(serving, field, name)) for name in names}
        return lines_plot(title, caption, "replicas", lines, form=".0f", from_zero=True, over="seconds")

    figures = [
        plot("Target replicas of each cluster", "Decided from the load of the cluster.", "targets"),
        plot("Running replicas of each cluster", "A new replica loads its weights first.", "running"),
    ]
    return section("Serving under a skewed load", figures)


def event_table(events: Sequence[Record]) -> str:
    if not events:
        return ""

    def row(event: Record) -> tuple[str, ...]:
        rest = {key: value for key, value in event.items() if key not in ("kind", "step", "name")}
        fields = (f"{key} {format(value, '.4g') if isinstance(value, float) else value}" for key, value in rest.items())
        return f"{event['step']:,}", str(event.get("name")), ", ".join(fields)

    return details(f"Events ({len(events)})", table(("step", "event", "details"), map(row, events)))


def config_list(config: Record) -> str:
    """List every field as the override that sets it."""
    fields = {name: part for name, part in config.items() if isinstance(part, dict)}
    lines = "\n".join(f"{name}.{field}={value}" for name, part in fields.items() for field, value in part.items())
    return details("Config", f"<pre>{html.escape(lines)}</pre>")


def _keys(value: object) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
