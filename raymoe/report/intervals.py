"""Statistics of compared runs: means with intervals over seeds, and paired ratios. Pure functions of results.

A result is a record of one run (`raymoe.commands.runs.results.run_result`) with its `variant` and `seed`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from raymoe.report.plots import Record, find

CONFIDENCE = 0.95
QUARTERS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with the half width of its 95 % interval (Student t)."""

    mean: float
    half: float
    """NaN for fewer than two values."""
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Interval:
        """Return the interval of the finite values; NaN without one."""
        known = np.array([v for v in values if math.isfinite(v)], dtype=float)
        n = len(known)
        if not n:
            return cls(math.nan, math.nan, 0)
        half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * known.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
        return cls(float(known.mean()), float(half), n)

    def show(self, form: str) -> str:
        """Return `62.10 ±0.41`; without the interval for one value, and a dash for none."""
        if not self.n:
            return "–"
        return format(self.mean, form) + (f" ±{format(self.half, form)}" if math.isfinite(self.half) else "")

    def to_dict(self) -> Record:
        return {"mean": _json(self.mean), "half_width": _json(self.half), "n": self.n}


def paired_ratio(values: Mapping[int, float], reference: Mapping[int, float]) -> Interval:
    """Return the interval of value / reference over the seeds that both have. Runs of one seed see the same batches."""
    return Interval.of(values[seed] / reference[seed] for seed in sorted(values.keys() & reference.keys()))


def at_quarter(result: Record, quarter: int) -> float:
    """Return the perplexity of a run at a quarter of its steps: at the nearest validation, if it is near.

    The last quarter is the validation after the last step. NaN without a validation within an eighth of the steps.
    """
    steps = find(result, "steps")
    if quarter == 4:
        return find(result, "perplexity") if result.get("finished") else math.nan
    target = steps * quarter / 4
    near = [point for point in result.get("curve") or () if abs(find(point, "step") - target) <= steps / 8]
    nearest = min(near, key=lambda point: abs(find(point, "step") - target), default=None)
    return find(nearest, "perplexity")


@dataclass(frozen=True)
class Summary:
    """The runs of one variant."""

    name: str
    label: str
    seeds: tuple[int, ...]
    quarters: tuple[Interval, ...]
    """Perplexity at each quarter of the steps."""
    bits_per_byte: Interval
    ratio: Interval
    """Final perplexity / that of the reference, paired by seed."""
    load_cv: Interval
    """Of experts, else of clusters."""
    seconds: Interval
    tokens_per_s: Interval
    peak_rss_mb: Interval
    parameters: float
    active_parameters: float
    lr: float
    runs: int
    finished: int

    def to_dict(self) -> Record:
        """Return JSON values."""
        return {name: _json(value) for name, value in vars(self).items()}


def _json(value: Any) -> Any:
    if isinstance(value, Interval):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summarize(results: Sequence[Record], labels: Mapping[str, str], reference: str) -> list[Summary]:
    """Return a summary of each variant, in the order of `labels`."""
    by_variant = {name: [r for r in results if r["variant"] == name] for name in labels}
    base = _final(by_variant.get(reference, []))
    return [_summary(name, labels[name], found, base) for name, found in by_variant.items() if found]


def _final(results: Iterable[Record]) -> dict[int, float]:
    return {r["seed"]: at_quarter(r, 4) for r in results}


def _summary(name: str, label: str, results: Sequence[Record], base: Mapping[int, float]) -> Summary:
    finished = [r for r in results if r.get("finished")]

    def over(*keys: str) -> Interval:
        return Interval.of(find(r, *keys) for r in finished)

    cv = over("load_cv", "experts")
    return Summary(
        name=name, label=label, seeds=tuple(sorted(r["seed"] for r in results)),
        quarters=tuple(Interval.of(at_quarter(r, q) for r in results) for q in QUARTERS),
        bits_per_byte=over("bits_per_byte"), ratio=paired_ratio(_final(finished), base),
        load_cv=cv if cv.n else over("load_cv", "clusters"), seconds=over("seconds"),
        tokens_per_s=over("tokens_per_s"), peak_rss_mb=over("peak_rss_mb"),
        parameters=find(results[0], "parameters"), active_parameters=find(results[0], "active_parameters"),
        lr=find(results[0], "lr"), runs=len(results), finished=len(finished),
    )  # fmt: skip


HEAD = (
    "model", "parameters, M", "active, M", "lr", "1/4", "2/4", "3/4", "perplexity", "bits/byte", "ratio", "load CV",
    "time, s", "tokens/s", "peak, MiB", "runs",
)  # fmt: skip


def table_rows(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """Return the cells under HEAD."""
    return [
        (
            s.label, f"{s.parameters / 1e6:.2f}", f"{s.active_parameters / 1e6:.2f}", f"{s.lr:g}",
            *(q.show(".2f") for q in s.quarters), s.bits_per_byte.show(".4f"), s.ratio.show(".4f"),
            s.load_cv.show(".2f") if s.load_cv.n else "–", s.seconds.show(",.0f"), s.tokens_per_s.show(",.0f"),
            s.peak_rss_mb.show(",.0f"), f"{s.finished}/{s.runs}" if s.finished < s.runs else str(s.runs),
        )
        for s in summaries
    ]  # fmt: skip


def note(reference: str) -> str:
    """Return the conditions of the table."""
    return (
        "perplexity: per token, whole validation set; 1/4 to 3/4: on train.validate_windows windows, at that share of the "
        f"steps; ±: half of the {CONFIDENCE:.0%} interval over seeds (Student t); ratio: perplexity / that of {reference}, "
        "paired by seed; active: parameters that process a token; time: of training steps; load CV: of experts (else "
        "clusters), 0 is even"
    )


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in GitHub's Markdown, with aligned columns."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *rest = zip(row, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in rest)]) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])
