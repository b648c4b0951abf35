"""The page of compared runs: one HTML page from `results.json`. It requires no network, no script and no display."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

from raymoe.config.fields import result_fields
from raymoe.report.comparison_plots import grid_plot, legend_labels, pareto_plot
from raymoe.report.elements import details, paragraph, section, table, terms
from raymoe.report.intervals import HEAD, QUARTERS, Summary, at_quarter, note, paired_ratio, summarize, table_rows
from raymoe.report.plots import Line, Record, find, lines_plot, show
from raymoe.report.style import STYLE


def render_comparison(results: Record) -> str:
    """Return the page of `results`, the content of `results.json`."""
    labels, reference, runs = results["labels"], results["reference"], results["runs"]
    summaries = summarize(runs, labels, reference)
    name = html.escape(results["title"] or results["name"])
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name} · raymoe</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<header><p>raymoe comparison of runs</p><h1>{name}</h1>{terms(_facts(results))}</header><main>"
        + ("" if summaries else paragraph("No run has results yet."))
        + _failures(results)
        + _result(summaries, labels.get(reference, reference))
        + _curves(runs, labels, reference)
        + _pareto(summaries, legend_labels(labels))
        + _sweep(results)
        + _variants(runs, labels)
        + _runs(runs, labels)
        + (details("Definition", f"<pre>{html.escape(results['file'])}</pre>") if results["file"] else "")
        + "</main></body></html>\n"
    )


def _facts(results: Record) -> dict[str, str]:
    runs = results["runs"]
    finished = sum(bool(r.get("finished")) for r in runs)
    tokens = {r["steps"] * r["tokens_per_step"] for r in runs}
    facts = {
        "Runs": f"{finished} of {results['expected_runs']} finished",
        "Variants": str(len(results["labels"])),
        "Seeds": ", ".join(map(str, results["seeds"])),
        "Tokens of a run": " or ".join(f"{n:,}" for n in sorted(tokens)),
        "Written": str(results["written"]),
        "Commits": ", ".join(sorted({_commit(r) for r in runs})),
        "Machines": "; ".join(sorted({_machine(r) for r in runs})),
        "Corpora": ", ".join(sorted({str(r.get("corpus")) for r in runs})),
        "Overrides": " ".join(results["overrides"]),
    }
    return {term: value for term, value in facts.items() if value}


def _commit(run: Record) -> str:
    commit = str(run.get("commit") or "unknown")
    return commit[:12] + ("+" if commit.endswith("+") and len(commit) > 12 else "")


def _machine(run: Record) -> str:
    machine = run["machine"]
    return f"{machine.get('processor', 'unknown')}, {machine.get('cores', '–')} cores"


def _failures(results: Record) -> str:
    rows = [(f["name"], f["log"], f["error"]) for f in results["failed"]]
    return section("Failed runs", [], content=table(("run", "log", "error"), rows)) if rows else ""


def _result(summaries: Sequence[Summary], reference: str) -> str:
    if not summaries:
        return ""
    content = f'<div class="card wide">{table(HEAD, table_rows(summaries))}</div>'
    return section("Result", [], note(reference), content)


def _curves(runs: Sequence[Record], labels: Mapping[str, str], reference: str) -> str:
    labels = legend_labels(labels)
    by_label = {label: [r for r in runs if r["variant"] == name] for name, label in labels.items()}
    ratios = {label: _ratio_line(found, by_label[labels[reference]]) for label, found in by_label.items()}
    figures = [
        lines_plot(
            "Perplexity over tokens", "Mean over seeds; the last point is the whole validation set.", "perplexity",
            {label: mean_line(found, "tokens") for label, found in by_label.items()}, over="tokens",
        ),
        lines_plot(
            "Perplexity over training time", "Seconds of training steps, mean over seeds.", "perplexity",
            {label: mean_line(found, "seconds") for label, found in by_label.items()}, over="seconds",
        ),
        lines_plot(
            f"Ratio to {labels[reference]}", "Mean over seeds of the ratio of perplexities; below 1 is better.",
            "ratio of perplexities", ratios, over="tokens",
        ),
    ]  # fmt: skip
    return section("Curves", figures)


def mean_line(results: Sequence[Record], over: str) -> Line:
    """Return the mean perplexity of runs over the mean of `over`, at each step at which all of them were validated."""
    points = [{p["step"]: p for p in r.get("curve") or ()} for r in results]
    steps = sorted(set.intersection(*map(set, points))) if points else []
    return (
        np.array([np.mean([find(of[step], over) for of in points]) for step in steps]),
        np.array([np.mean([find(of[step], "perplexity") for of in points]) for step in steps]),
    )


def _ratio_line(results: Sequence[Record], reference: Sequence[Record]) -> Line:
    """Return the ratio of perplexities at each quarter, over tokens."""
    ratios = [
        paired_ratio({r["seed"]: at_quarter(r, q) for r in results}, {r["seed"]: at_quarter(r, q) for r in reference})
        for q in QUARTERS
    ]
    tokens = find(results[0], "steps") * find(results[0], "tokens_per_step") if results else math.nan
    return np.array([tokens * q / 4 for q in QUARTERS]), np.array([r.mean for r in ratios])


def _pareto(summaries: Sequence[Summary], short: Mapping[str, str]) -> str:
    lead = (
        "Lower left is better. The line is the Pareto frontier. A "
        "training step takes about 6 floating-point operations per token and active parameter, without attention scores."
    )
    figures = [
        pareto_plot("Perplexity over parameters", "parameters, M", summaries, short, lambda s: s.parameters / 1e6),
        pareto_plot("Perplexity over active parameters", "active parameters, M", summaries, short, lambda s: s.active_parameters / 1e6),
        pareto_plot("Perplexity over training time", "training time, s", summaries, short, lambda s: s.seconds.mean),
    ]  # fmt: skip
    return section("Quality and cost", figures, lead if any(figures) else "")


def _sweep(results: Record) -> str:
    sweep = results["sweep"]
    if not sweep or not sweep["runs"]:
        return ""
    score, labels = sweep["select"], results["labels"]
    rows = []
    for name, label in labels.items():
        for run in (r for r in sweep["runs"] if r["variant"] == name):
            settings = ", ".join(f"{key}={value}" for key, value in run["settings"].items())
            chosen = "chosen" if sweep["chosen"].get(name) == run["settings"] else ""
            rows.append((label, settings, str(run["steps"]), show(find(run, score), ".4f"), chosen))
    share = f"the last {sweep['tune_share']:.0%} of each domain's training text"
    lead = f"Settings are chosen by {score.replace('_', ' ')} on the tuning split: {share}, seed {sweep['seed']}."
    if sweep["at_edge"]:
        lead += f" Chosen at an end of the grid, where a larger grid may have a better value: {'; '.join(sweep['at_edge'])}."
    figures = [grid_plot(key, sweep["runs"], legend_labels(labels), score) for key in sweep["grid"]]
    content = table(("model", "settings", "steps", score.replace("_", " "), ""), rows)
    return section("Choice of settings", figures, lead, f'<div class="card wide">{content}</div>')


def _variants(runs: Sequence[Record], labels: Mapping[str, str]) -> str:
    """Return a table of the fields in which the variants differ."""
    configs = {name: next((r["config"] for r in runs if r["variant"] == name), {}) for name in labels}
    fields = {name: result_fields(config) for name, config in configs.items()}
    fields = {name: found for name, found in fields.items() if found}
    keys = [
        key for key in next(iter(fields.values()), {})
        if key != "run.seed" and len({str(found.get(key)) for found in fields.values()}) > 1
    ]  # fmt: skip
    rows = [(labels[name], *(str(found.get(key)) for key in keys)) for name, found in fields.items()]
    return details("Fields in which the variants differ", table(("model", *keys), rows), wide=True) if keys else ""


def _runs(runs: Sequence[Record], labels: Mapping[str, str]) -> str:
    rows = [
        (
            labels[r["variant"]], str(r["seed"]), f"{r['step']:,} of {r['steps']:,}", show(r["perplexity"], ".3f"),
            show(r["bits_per_byte"], ".4f"), show(r["seconds"], ",.0f"), show(r["tokens_per_s"], ",.0f"),
            show(r["skipped_steps"], ".0f"), _commit(r), r["folder"],
        )
        for r in runs
    ]  # fmt: skip
    head = ("model", "seed", "steps", "perplexity", "bits/byte", "time, s", "tokens/s", "skipped", "commit", "folder")
    return details("Runs", table(head, rows), wide=True) if rows else ""
