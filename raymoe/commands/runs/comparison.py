"""The results of compared runs as one JSON object, which the page and the table are made of."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raymoe.commands.runs.results import run_result
from raymoe.config.fields import result_fields
from raymoe.report.comparison_page import render_comparison
from raymoe.report.intervals import HEAD, markdown, note, summarize, table_rows
from raymoe.report.plots import Record
from raymoe.storage.files import replace_file
from raymoe.training.run_summary import commit

FORMAT = 1
"""Version of the object."""


def compared(
    name: str, runs: Sequence[Record], labels: Mapping[str, str], reference: str, *, title: str = "", file: str = "",
    overrides: Sequence[str] = (), seeds: Sequence[int] = (), expected_runs: int | None = None,
    sweep: Record | None = None, failed: Sequence[Record] = (),
) -> Record:  # fmt: skip
    """Return the content of `results.json`.

    runs: of `run_result`, with their `variant`. labels: by variant. file: text of the experiment's file. seeds:
    those of the experiment, by default those of the runs.
    """
    return {
        "format": FORMAT,
        "name": name,
        "title": title,
        "file": file,
        "overrides": list(overrides),
        "commit": commit(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "labels": dict(labels),
        "reference": reference,
        "seeds": list(seeds) or sorted({r["seed"] for r in runs}),
        "summaries": [s.to_dict() for s in summarize(runs, labels, reference)],
        "runs": list(runs),
        "expected_runs": len(runs) if expected_runs is None else expected_runs,
        "sweep": sweep,
        "failed": list(failed),
    }


def write_page(results: Record, page: Path) -> None:
    """Write the page of results. Raises OSError."""
    replace_file(page, render_comparison(results))


def result_table(results: Mapping[str, Any]) -> str:
    """Return the table in Markdown with its conditions and warnings; empty without a run."""
    summaries = summarize(results["runs"], results["labels"], results["reference"])
    if not summaries:
        return ""
    lines = [markdown(HEAD, table_rows(summaries)), "", note(results["labels"][results["reference"]])]
    return "\n".join(lines + [f"warning: {text}" for text in warnings(results)])


def warnings(results: Mapping[str, Any]) -> list[str]:
    """Return what limits the comparison: runs of different commits, corpora, machines or numbers of tokens."""
    found = []
    for what, of in (
        ("commits", lambda r: r["commit"] or "unknown"),
        ("corpora", lambda r: r["corpus"] or "unknown"),
        ("processors", lambda r: r["machine"].get("processor") or "unknown"),
        ("numbers of tokens", lambda r: f"{r['steps'] * r['tokens_per_step']:,}"),
    ):
        values = sorted({str(of(run)) for run in results["runs"]})
        if len(values) > 1:
            found.append(f"the runs have different {what}: {', '.join(values)}")
    if any(run["tune_share"] for run in results["runs"]):
        found.append("some runs were validated on a tuning split (data.tune_share), not on the validation split")
    sweep = results["sweep"] or {}
    found += [f"chosen at an end of the sweep's grid, so extend it: {text}" for text in sweep.get("at_edge", ())]
    return found


def grouped(runs: Sequence[Path]) -> tuple[list[Record], dict[str, str]]:
    """Return the results of runs with their `variant`, and the label of each variant.

    Runs whose configs differ only in `run.seed` are seeds of one variant. Its label is the name of its first run,
    without a suffix `-seedN` if there are several. Raises ValueError if a folder has no run that can be read.
    """
    results = [run_result(run) for run in runs]
    groups: dict[str, list[Record]] = {}
    for result in results:
        groups.setdefault(_identity(result["config"]), []).append(result)
    labels: dict[str, str] = {}
    for n, found in enumerate(groups.values(), 1):
        seeds = [r["seed"] for r in found]
        if len(set(seeds)) < len(seeds):
            twice = [r["folder"] for r in found if seeds.count(r["seed"]) > 1]
            raise ValueError(f"these runs have the same config and seed: {', '.join(twice)}: leave out all but one")
        name = Path(found[0]["folder"]).name
        label = re.sub(r"[-_.]?seed[-_.]?\d+$", "", name) or name if len(found) > 1 else name
        labels[f"{n}"] = label if label not in labels.values() else f"{label} ({found[0]['folder']})"
        for result in found:
            result["variant"] = f"{n}"
    return results, labels


def _identity(config: Mapping[str, Any]) -> str:
    return repr(sorted((key, value) for key, value in result_fields(config).items() if key != "run.seed"))
