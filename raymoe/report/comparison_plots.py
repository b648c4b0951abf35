"""Plots of compared runs: perplexity over a cost with the Pareto frontier, and the scores of a sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, StrMethodFormatter

from raymoe.report.intervals import Summary
from raymoe.report.plots import DASHES, GRID, INK, MARKERS, SERIES, Record, find, legend, plot_figure, plot_label, show

LEGEND = 28
"""Characters of a label in a legend (`plots.plot_label`)."""


def legend_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return distinct labels of at most LEGEND characters by variant. A long one keeps its start and its end."""
    found: dict[str, str] = {}
    for n, (name, label) in enumerate(labels.items(), 1):
        short = label if len(label) <= LEGEND else f"{label[:12]}…{label[13 - LEGEND :]}"
        found[name] = short if short not in found.values() else f"{n}: {short[: LEGEND - 5]}"
    return found


def pareto_plot(
    title: str, unit: str, summaries: Sequence[Summary], labels: Mapping[str, str], cost: Callable[[Summary], float]
) -> str:
    """Plot the final perplexity of each variant over a cost; nothing without two variants.

    A variant keeps its color and marker in all plots of a page.
    """
    points = [
        (i, s, cost(s)) for i, s in enumerate(summaries) if s.quarters[-1].n and math.isfinite(cost(s)) and cost(s) > 0
    ]
    if len(points) < 2:
        return ""

    def draw(axes: Axes) -> str:
        for i, s, x in points:
            final = s.quarters[-1]
            axes.errorbar(
                x, final.mean, yerr=final.half if math.isfinite(final.half) else None, label=plot_label(labels[s.name]),
                color=SERIES[i % len(SERIES)], marker=marker(i), linestyle="", markersize=7,
                fillstyle=("full", "none")[i // len(SERIES) % 2], elinewidth=1, capsize=3,
            )  # fmt: skip
        best = frontier([(x, s.quarters[-1].mean) for _, s, x in points])
        axes.plot(*zip(*best, strict=True), color=INK, linewidth=1, linestyle=":", zorder=0)
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_xlabel(unit)
        axes.set_ylabel("perplexity")
        costs = [x for _, _, x in points]
        if max(costs) > 4 * min(costs):
            log_axis(axes, sorted(costs))
        legend(axes)
        return f"{title}: " + "; ".join(
            f"{s.label} {show(x, '.4g')}, {s.quarters[-1].show('.2f')}" for _, s, x in points
        )

    return plot_figure(title, "", draw, height=3.6)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto frontier of points (cost, score), by cost. Lower is better in both."""
    best, found = math.inf, []
    for x, y in sorted(points):
        if y < best:
            best = y
            found.append((x, y))
    return found


def grid_plot(key: str, runs: Sequence[Record], labels: Mapping[str, str], score: str) -> str:
    """Plot the score over the values of a field by variant: the best score of each value. Nothing without two numbers."""
    lines: dict[str, dict[float, float]] = {}
    for run in runs:
        x, y = number_of(run["settings"].get(key)), find(run, score)
        if math.isfinite(x) and math.isfinite(y):
            line = lines.setdefault(run["variant"], {})
            line[x] = min(y, line.get(x, math.inf))
    values = sorted({x for line in lines.values() for x in line})
    if len(values) < 2:
        return ""

    def draw(axes: Axes) -> str:
        for i, name in enumerate(labels):
            if name in lines:
                xs = sorted(lines[name])
                axes.plot(
                    xs, [lines[name][x] for x in xs], label=plot_label(labels[name]), color=SERIES[i % len(SERIES)],
                    marker=marker(i), linestyle=DASHES[i // len(SERIES) % len(DASHES)], linewidth=1.6, markersize=5,
                )  # fmt: skip
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_xlabel(key)
        axes.set_ylabel(score.replace("_", " "))
        if values[0] > 0:
            log_axis(axes, values)
        legend(axes)
        best = (
            f"{labels[n]} {min(line.values()):.4g} at {min(line, key=line.__getitem__):g}" for n, line in lines.items()
        )
        return f"Lowest {score} by {key}: " + ", ".join(best)

    return plot_figure(f"Sweep of {key}", "On the tuning split.", draw)


def log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Make the x axis logarithmic, with ticks at (about six of) the values."""
    axes.set_xscale("log")
    every = -(-len(values) // 6)
    axes.set_xticks(list(values)[::every])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))


def marker(i: int) -> str:
    """Return the marker of variant i."""
    return MARKERS[i % len(MARKERS)]


def number_of(text: object) -> float:
    """Return a number in text; NaN without one."""
    try:
        return float(str(text))
    except ValueError:
        return math.nan
