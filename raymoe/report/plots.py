"""Plots of a report: records in, HTML figures with SVG out.

Colors in an SVG are CSS variables, so a plot follows the light or dark mode of the page. The `aria-label` of an
SVG describes the plot in words.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from itertools import pairwise
from operator import getitem
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

Record = dict[str, Any]
Line = tuple[np.ndarray, np.ndarray]
"""Steps and values, both [records]."""

INK, GRID = "#010203", "#040506"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#997700", "#56b4e9", "#882255", "#777777")
"""Placeholders in the SVG for the colors of the style sheet, which are distinct for color-blind readers."""
VARIABLES = {INK: "--ink", GRID: "--grid"} | {color: f"--s{i}" for i, color in enumerate(SERIES)}
DASHES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX*"
BALANCE = LinearSegmentedColormap.from_list("balance", ["#00517f", "#7fb2d6", "#eeece8", "#eba06a", "#a03c00"])
SHARE = LinearSegmentedColormap.from_list("share", ["#eef3f7", "#5b9bc8", "#003d66"])
MARKED_EVENTS = 12
"""Largest number of events of one name in a plot; the latest are drawn."""


# Numbers from records


def number(value: Any) -> float:
    """Return `value` as a float; NaN for null and everything else that is not a finite number."""
    try:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan
    except OverflowError:  # an integer beyond the range of float
        return math.nan


def find(record: Any, *keys: str | int) -> float:
    """Return the number under nested `keys`; NaN without a number."""
    try:
        return number(reduce(getitem, keys, record))
    except (KeyError, IndexError, TypeError):
        return math.nan


def column(records: Iterable[Record], *keys: str | int) -> np.ndarray:
    """Return the number under nested `keys` of each record, NaN without a number. Shape [records]."""
    return np.array([find(record, *keys) for record in records])


def over_steps(records: Sequence[Record], *keys: str | int) -> Line:
    """Return the steps and the column under `keys`."""
    return column(records, "step"), column(records, *keys)


def last(values: np.ndarray) -> float:
    """Return the last finite value; NaN without a number."""
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else math.nan


def show(value: Any, form: str) -> str:
    """Format a number as `form`; a dash for everything that is not a finite number."""
    value = number(value)
    return "–" if math.isnan(value) else format(value, form)


# The plots


def lines_plot(
    title: str, caption: str, unit: str, lines: Mapping[str, Line], *,
    form: str = ".4g", from_zero: bool = False, events: Sequence[Record] = (), since: str = "", over: str = "step",
) -> str:  # fmt: skip
    """Plot lines by name, and mark events. Returns nothing if no line has a value.

    The axis shows steps, or the quantity `over`, or the steps `since` an event.
    """
    lines = {name: line for name, line in lines.items() if np.isfinite(line[1]).any()}
    if not lines:
        return ""

    def draw(axes: Axes) -> str:
        for i, (name, (steps, values)) in enumerate(lines.items()):
            axes.plot(
                steps, values, label=plot_label(name), color=SERIES[i % len(SERIES)], linewidth=1.6, markersize=4,
                linestyle=DASHES[i // len(SERIES) % len(DASHES)], marker=MARKERS[i % len(MARKERS)] if len(steps) <= 25 else "",
            )  # fmt: skip
        _mark_events(axes, events)
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_ylabel(unit)
        number_axis(axes, over)
        if since:
            axes.set_xlabel(f"steps since {since}")
            axes.axvline(0, color=INK, linewidth=1)
        else:
            axes.set_xlim(left=0)
        if from_zero:
            top = max(float(np.nanmax(values)) for _, values in lines.values())
            axes.set_ylim(0, 1.08 * top if top > 0 else 1)
        if form == ",.0f":
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        legend(axes)
        return f"{title}, last values: " + ", ".join(f"{n} {show(last(v), form)}" for n, (_, v) in lines.items())

    return plot_figure(title, caption, draw)


def load_maps(trains: Sequence[Record], of: str, assignment_LE: Sequence[Sequence[int]] | None = None) -> list[str]:
    """Draw the load of the clusters or experts of each layer over steps, relative to an even share.

    `of` is "clusters" or "experts". With an assignment, experts are sorted by cluster. Returns no figure if no
    record has loads.
    """
    trains = [record for record in trains if record.get(f"load_{of}")]
    figures = []
    for layer, shares in enumerate(trains[-1][f"load_{of}"] if trains else []):
        share_TG = np.stack([column(trains, f"load_{of}", layer, group) for group in range(len(shares))], axis=-1)
        clusters = assignment_LE[layer] if assignment_LE else None
        figures.append(_load_map(f"{of.capitalize()} of layer {layer}", column(trains, "step"), share_TG, clusters))
    return figures


def domain_maps(validation: Record) -> list[str]:
    """Draw for each layer the share of each domain's tokens by cluster; rows sum to 1."""
    counts_LGC = np.array(validation["cluster_by_domain"], dtype=float)
    totals = counts_LGC.sum(-1, keepdims=True)
    share_LGC = np.divide(counts_LGC, totals, out=np.full_like(counts_LGC, np.nan), where=totals > 0)
    top = max(0.01, float(np.nanmax(share_LGC, initial=0.01)))
    domains = list(validation["domains"])
    return [_domain_map(f"Layer {layer}", domains, share_GC, top) for layer, share_GC in enumerate(share_LGC)]


def _load_map(title: str, steps: np.ndarray, share_TG: np.ndarray, clusters: Sequence[int] | None) -> str:
    groups = share_TG.shape[1]
    order = np.argsort(clusters, kind="stable") if clusters else np.arange(groups)
    load_GT = (share_TG * groups).T[order]
    before = steps[0] - (steps[1] - steps[0]) if len(steps) > 1 else 0.0
    edges = np.concatenate([[max(0.0, before)], steps])

    def draw(axes: Axes) -> str:
        mesh = axes.pcolormesh(edges, np.arange(groups + 1), load_GT, cmap=BALANCE, vmin=0, vmax=2, rasterized=True)
        axes.invert_yaxis()
        number_axis(axes)
        if clusters:
            members = np.asarray(clusters)[order]
            borders = [0, *(np.flatnonzero(np.diff(members)) + 1), groups]
            axes.hlines(borders[1:-1], edges[0], edges[-1], color="#222222", linewidth=1.2)
            middles = [(a + b) / 2 for a, b in pairwise(borders)]
            axes.set_yticks(middles, [f"cluster {members[a]}" for a in borders[:-1]])
        else:
            every = -(-groups // 16)
            axes.set_ylabel(title.split()[0].lower())
            axes.set_yticks(np.arange(0, groups, every) + 0.5, [str(g) for g in range(0, groups, every)])
        bar = axes.figure.colorbar(mesh, ax=axes, extend="max", ticks=[0, 1, 2], label="load / even share", aspect=30)
        bar.outline.set_visible(False)
        end = ", ".join(f"{g} {show(x, '.2f')}" for g, x in zip(order, load_GT[:, -1], strict=True))
        return f"{title}, last load relative to an even share: {end}"

    return plot_figure(title, "", draw)


def _domain_map(title: str, domains: Sequence[str], share_GC: np.ndarray, top: float) -> str:
    n_domains, n_clusters = share_GC.shape

    def draw(axes: Axes) -> str:
        axes.pcolormesh(share_GC, cmap=SHARE, vmin=0, vmax=top, edgecolor="#ffffff", linewidth=0.8)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.set_yticks(np.arange(n_domains) + 0.5, [plot_label(domain) for domain in domains])
        axes.set_xticks(np.arange(n_clusters) + 0.5, [str(c) for c in range(n_clusters)])
        axes.set_xlabel("cluster")
        size = 9 if n_clusters <= 8 else 6
        for (g, c), share in np.ndenumerate(share_GC):
            ink = "#ffffff" if share > 0.65 * top else "#111111"
            axes.text(c + 0.5, g + 0.5, show(share, ".0%"), ha="center", va="center", fontsize=size, color=ink)
        rows = (f"{d}: " + ", ".join(show(s, ".0%") for s in row) for d, row in zip(domains, share_GC, strict=True))
        return f"{title}, share of each domain's tokens by cluster. " + "; ".join(rows)

    return plot_figure(title, "", draw, height=0.9 + 0.36 * n_domains)


# Common parts of plots


def plot_figure(title: str, caption: str, draw: Callable[[Axes], str], height: float = 3.1) -> str:
    """Return a plot as an HTML figure. `draw` fills the axes and returns a description in words."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the fonts of the browser have the glyph
        figure = Figure(figsize=(6.2, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GRID)
        words = draw(axes)
        for each in figure.axes:  # includes color bars
            each.tick_params(colors=INK, length=0)
            each.xaxis.label.set_color(INK)
            each.yaxis.label.set_color(INK)
        file = io.StringIO()
        unnamed = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, dpi=160, metadata=unnamed)
    drawn = re.search(r'<svg[^>]* (viewBox="[^"]*")[^>]*>(.*)</svg>', file.getvalue(), re.DOTALL)
    assert drawn is not None
    body = re.sub(r"<defs>\s*<style.*?</defs>", "", drawn[2], flags=re.DOTALL)  # would apply to the whole page
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")  # ids that repeat in each plot
    body = re.sub(f": ({'|'.join(VARIABLES)})", lambda color: f": var({VARIABLES[color[1]]})", body)
    caption = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    svg = f'<svg {drawn[1]} role="img" aria-label="{html.escape(words)}">{body}</svg>'
    return f"<figure><h3>{html.escape(title)}</h3>{svg}{caption}</figure>"


def plot_label(text: str) -> str:
    """Return `text` as a label of matplotlib: one short line, without mathematics, visible despite a leading `_`."""
    text = " ".join(text.encode(errors="replace").decode().split())
    text = (text if len(text) <= 28 else text[:27] + "…").replace("$", r"\$")
    return "\u200b" + text if text.startswith("_") else text


def number_axis(axes: Axes, label: str = "step") -> None:
    """Set the label and the ticks of the x axis. Steps and seconds have integer ticks."""
    is_integer = label in ("step", "seconds", "tokens")
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=is_integer))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}" if is_integer else "{x:,.4g}"))


def legend(axes: Axes) -> None:
    """Place a legend above the axes and increase the figure by its rows. A single line has no legend."""
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) > 1:
        columns = max(1, min(5, 75 // (7 + max(map(len, labels)))))
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.set_figheight(figure.get_figheight() + 0.17 * ((len(labels) - 1) // columns))
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, fontsize=9)


def _mark_events(axes: Axes, events: Sequence[Record]) -> None:
    """Mark checkpoints as ticks at the bottom, and other events as vertical lines with one color per name."""
    steps: dict[str, list[int]] = {}
    for event in events:
        steps.setdefault(str(event.get("name")), []).append(event["step"])
    if checkpoints := steps.pop("checkpoint_completed", []):
        bottom, height = axes.get_xaxis_transform(), [0.015] * len(checkpoints)
        axes.plot(checkpoints, height, "|", color=INK, transform=bottom, label="checkpoint", markersize=7)
    for i, name in enumerate(sorted(steps)):
        color, dashes = SERIES[(2 + i) % len(SERIES)], DASHES[1 + i % 3]
        for n, step in enumerate(steps[name][-MARKED_EVENTS:]):
            axes.axvline(
                step,
                label=None if n else plot_label(name.replace("_", " ")),
                color=color,
                linestyle=dashes,
                linewidth=1.3,
            )
