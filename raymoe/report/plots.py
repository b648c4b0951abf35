"""The plots of a run's report: records in, HTML figures out, each an SVG.

The colours in an SVG are CSS variables, so that a plot follows the page's light or dark mode as the text does.
An SVG says in words (`aria-label`) what it shows.
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
"""Stand-ins in the SVG for the style sheet's colours, which the colour-blind can tell apart."""
VARIABLES = {INK: "--ink", GRID: "--grid"} | {colour: f"--s{i}" for i, colour in enumerate(SERIES)}
DASHES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX*"
BALANCE = LinearSegmentedColormap.from_list("balance", ["#00517f", "#7fb2d6", "#eeece8", "#eba06a", "#a03c00"])
SHARE = LinearSegmentedColormap.from_list("share", ["#eef3f7", "#5b9bc8", "#003d66"])
MARKED_EVENTS = 12
"""Events of one sort that a plot shows at most: the latest."""


# Numbers out of records


def number(value: Any) -> float:
    """`value`, or NaN for null and all else that is not a finite number."""
    try:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan
    except OverflowError:  # an integer that no float can hold
        return math.nan


def find(record: Any, *keys: str | int) -> float:
    """The number under nested `keys`, NaN where there is none."""
    try:
        return number(reduce(getitem, keys, record))
    except (KeyError, IndexError, TypeError):
        return math.nan


def column(records: Iterable[Record], *keys: str | int) -> np.ndarray:
    """The number under nested `keys` in each record, NaN where there is none. Shape [records]."""
    return np.array([find(record, *keys) for record in records])


def over_steps(records: Sequence[Record], *keys: str | int) -> Line:
    """The column under `keys`, over the steps."""
    return column(records, "step"), column(records, *keys)


def last(values: np.ndarray) -> float:
    """The last that is known, NaN where none is."""
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else math.nan


def show(value: Any, form: str) -> str:
    """`value` in the format `form`, a dash for what is not a finite number."""
    value = number(value)
    return "–" if math.isnan(value) else format(value, form)


# The plots


def lines_plot(
    title: str, caption: str, unit: str, lines: Mapping[str, Line], *,
    form: str = ".4g", from_zero: bool = False, events: Sequence[Record] = (), since: str = "", over: str = "step",
) -> str:  # fmt: skip
    """Lines by name over steps (or what else `over` says), or over steps `since` something; events are marked.

    Nothing where no line has a value.
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
        step_axis(axes, over)
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
        _legend(axes)
        return f"{title}, at the end: " + ", ".join(f"{n} {show(last(v), form)}" for n, (_, v) in lines.items())

    return plot_figure(title, caption, draw)


def load_maps(trains: Sequence[Record], of: str, assignment_LE: Sequence[Sequence[int]] | None = None) -> list[str]:
    """For each layer, the load of its `of` ("clusters" or "experts") over time, relative to an even share.

    With an assignment, experts are sorted by their cluster. None where no record has loads.
    """
    trains = [record for record in trains if record.get(f"load_{of}")]
    figures = []
    for layer, shares in enumerate(trains[-1][f"load_{of}"] if trains else []):
        share_TG = np.stack([column(trains, f"load_{of}", layer, group) for group in range(len(shares))], axis=-1)
        clusters = assignment_LE[layer] if assignment_LE else None
        figures.append(_load_map(f"{of.capitalize()} of layer {layer}", column(trains, "step"), share_TG, clusters))
    return figures


def domain_maps(validation: Record) -> list[str]:
    """For each layer, which clusters serve a domain's tokens: rows sum to 1."""
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
        step_axis(axes)
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
        return f"{title}, load relative to an even share at the end: {end}"

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


# What the plots have in common


def plot_figure(title: str, caption: str, draw: Callable[[Axes], str], height: float = 3.1) -> str:
    """A plot as an HTML figure. `draw` fills the axes and returns in words what they show."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts will have it
        figure = Figure(figsize=(6.2, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GRID)
        words = draw(axes)
        for each in figure.axes:  # a colour bar's too
            each.tick_params(colors=INK, length=0)
            each.xaxis.label.set_color(INK)
            each.yaxis.label.set_color(INK)
        file = io.StringIO()
        unnamed = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, dpi=160, metadata=unnamed)
    drawn = re.search(r'<svg[^>]* (viewBox="[^"]*")[^>]*>(.*)</svg>', file.getvalue(), re.DOTALL)
    assert drawn is not None
    body = re.sub(r"<defs>\s*<style.*?</defs>", "", drawn[2], flags=re.DOTALL)  # would style the whole page
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")  # ids that repeat in each plot
    body = re.sub(f": ({'|'.join(VARIABLES)})", lambda colour: f": var({VARIABLES[colour[1]]})", body)
    caption = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    svg = f'<svg {drawn[1]} role="img" aria-label="{html.escape(words)}">{body}</svg>'
    return f"<figure><h3>{html.escape(title)}</h3>{svg}{caption}</figure>"


def plot_label(text: str) -> str:
    """`text` for a plot: one line, not too long, never read as mathematics nor, for its `_`, as hidden."""
    text = " ".join(text.encode(errors="replace").decode().split())
    text = (text if len(text) <= 28 else text[:27] + "…").replace("$", r"\$")
    return "\u200b" + text if text.startswith("_") else text


def step_axis(axes: Axes, label: str = "step") -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _legend(axes: Axes) -> None:
    """Above the axes, the figure growing by its rows; none for one line alone."""
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) > 1:
        columns = max(1, min(5, 75 // (7 + max(map(len, labels)))))
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.set_figheight(figure.get_figheight() + 0.17 * ((len(labels) - 1) // columns))
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, fontsize=9)


def _mark_events(axes: Axes, events: Sequence[Record]) -> None:
    """Checkpoints as ticks at the foot, all other events as lines, one colour for each sort."""
    steps: dict[str, list[int]] = {}
    for event in events:
        steps.setdefault(str(event.get("name")), []).append(event["step"])
    if checkpoints := steps.pop("checkpoint", []):
        foot, height = axes.get_xaxis_transform(), [0.015] * len(checkpoints)
        axes.plot(checkpoints, height, "|", color=INK, transform=foot, label="checkpoint", markersize=7)
    for i, what in enumerate(sorted(steps)):
        colour, dashes = SERIES[(2 + i) % len(SERIES)], DASHES[1 + i % 3]
        for n, step in enumerate(steps[what][-MARKED_EVENTS:]):
            axes.axvline(step, label=None if n else plot_label(what), color=colour, linestyle=dashes, linewidth=1.3)
