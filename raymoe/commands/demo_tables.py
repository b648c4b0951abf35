"""The demo's result: a table of the compared models with units and spread, and one sentence that reads it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymoe.commands.demo_compare import VARIANTS
from raymoe.config import preset
from raymoe.report.regroup_plots import decisions

Record = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A titled table of text cells."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True)))  # fmt: skip
            return "  ".join([first, *rest])

        rule = "-" * len(line(self.head))
        return "\n".join([self.title, rule, line(self.head), rule, *map(line, self.rows), rule, self.note])

    def to_dict(self) -> Record:
        return {
            "title": self.title,
            "head": list(self.head),
            "rows": [list(row) for row in self.rows],
            "note": self.note,
        }


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Return the mean and half the range: `245.4 ±1.2`."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.fmean(values):{form}} ±{half:{form}}"


def by_model(records: Sequence[Record]) -> dict[str, list[Record]]:
    return {name: [r for r in records if r["variant"] == name] for name in VARIANTS}


def comparison(records: Sequence[Record], artifact: Path, evaluation: Path, steps: int) -> Table:
    """Return the table of the compared models and the export.

    records: the results of the runs of `demo_compare`. evaluation: the JSON that `raymoe evaluate` wrote for `artifact`.
    """
    from raymoe.export.open import open_artifact
    from raymoe.storage.artifact_layout import sizes

    tiny = preset("tiny")
    rows = []
    for name, found in by_model(records).items():
        of = found[0]
        cv = of["load_cv"]["experts"]
        rows.append((
            VARIANTS[name].label, f"{of['parameters'] / 1e6:.2f}", f"{2 * of['parameters'] / 1e6:.2f}",
            spread([r["perplexity"] for r in found]), spread([r["tokens_per_s"] for r in found], ",.0f"),
            "-" if cv is None else f"{cv:.2f}",
        ))  # fmt: skip
    judged = json.loads(evaluation.read_text())
    size = sizes(open_artifact(artifact).config.model)["clustered_int4"]
    exported = (
        "the run above, exported", f"{size['parameters'] / 1e6:.2f}", f"{size['bytes'] / 1e6:.2f}",
        f"{judged['token_perplexity']:.1f}", "-", "-",
    )  # fmt: skip
    tokens = steps * tiny.train.global_batch * tiny.model.context
    return Table(
        f"Result: {tokens / 1e6:.1f} million training tokens each, same order, learning rate and balancing",
        ("model", "parameters, M", "at rest, MB", "perplexity", "tokens/s", "load CV"),
        (*rows, exported),
        f"perplexity: per token, whole validation set, mean ± half the range of {len(records) // len(VARIANTS)} seeds; at rest: float16, the export "
        "FP16 + INT4;\ntokens/s: training, one thread, 2 models at a time; load CV: of experts, 0 is even",
    )  # fmt: skip


def reading(records: Sequence[Record]) -> str:
    """Return one sentence that compares `clustered` with the best model of the table, with its spread."""
    values = {name: [r["perplexity"] for r in found] for name, found in by_model(records).items()}
    means = {name: statistics.fmean(v) for name, v in values.items()}
    best = min(means, key=means.__getitem__)
    if best == "clustered":
        other = min((n for n in means if n != best), key=means.__getitem__)
        gap = means[other] - means[best]
        text = f"clustered has the lowest perplexity, {gap:.1f} below {VARIANTS[other].label}"
    else:
        other, gap = "clustered", means["clustered"] - means[best]
        text = f"{VARIANTS[best].label} has the lowest perplexity, {gap:.1f} below clustered"
    widest = max(max(values[name]) - min(values[name]) for name in (best, other))
    verdict = "more" if gap > widest else "no more"
    return f"Reading: {text}; that is {verdict} than the range of either between seeds ({widest:.1f})."


def plan_line(plans: Sequence[Record]) -> str:
    """Return one line on the first applied plan of a run."""
    applied = [d for d in decisions(list(plans)) if d.outcome == "applied"]
    if not applied:
        return "no plan was applied"
    plan = applied[0]
    return (
        f"plan applied before step {plan.step + 1}: {plan.moves:.0f} experts change clusters, {plan.bytes / 1000:,.0f} kB "
        f"moved, pause {plan.pause_ms:.0f} ms; held-out loss {plan.probe_before:.3f} before, {plan.probe_after:.3f} after"
    )
