"""Regrouping in a report: decisions from the records of plans, and figures of their effect on the clusters.

Records contain untrusted data of the clusterer: every value is checked, and malformed values are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from raymoe.report.plots import (
    BALANCE,
    GRID,
    INK,
    MARKED_EVENTS,
    SERIES,
    Line,
    Record,
    column,
    find,
    lines_plot,
    number_axis,
    over_steps,
    plot_figure,
    show,
)

SHOWN_LAYERS, SHOWN_PLANS = 8, 8
SHOWN_CLUSTERS = 1024
"""Cluster ids from this value on are malformed."""


@dataclass(frozen=True)
class Picture:
    """Similarity of the experts of a layer, and their clusters."""

    layer: int
    similarity_EE: np.ndarray
    clusters_E: np.ndarray


@dataclass
class Decision:
    """A plan and its outcome, or the reason for no plan. Unknown numbers are NaN."""

    step: int = 0
    outcome: str = ""
    version: float = math.nan
    moves: float = math.nan
    bytes: float = math.nan
    pause_ms: float = math.nan
    expected_gain: float = math.nan
    measured_gain: float = math.nan
    probe_before: float = math.nan
    probe_after: float = math.nan
    probe_after_overlap: float = math.nan
    """Probe loss at the end of the overlap."""
    reason: str = ""
    before: Picture | None = None
    after: Picture | None = None


# From records


def decisions(plans: Sequence[Record]) -> list[Decision]:
    """Return one decision per plan, in the order of the first record of each plan."""
    rows: list[Decision] = []
    waiting: dict[tuple[float, float], Decision] = {}
    applied: dict[float, Decision] = {}
    for record in plans:
        name, plan = record.get("name"), record.get("plan")
        key = find(plan, "version"), find(plan, "made_at_step")
        if name in ("made", "no_plan", "folded", "clusterer_restarted"):
            row = Decision(reason=_reason(record) or _reason(plan))
            row.expected_gain = find(plan if name == "made" else record, "expected_gain")
            row.before = _picture(record.get("similarity"), "before")
            rows.append(row)
            if name == "made":
                if isinstance(kind := record.get("force_kind"), str):
                    row.reason = f"forced: {kind}"
                waiting[key] = row
        elif name in ("applied", "refused"):
            if (row := waiting.pop(key, None)) is None:
                rows.append(row := Decision(expected_gain=find(plan, "expected_gain")))
            row.reason = _reason(record) or row.reason or _reason(plan)
            if name == "applied":
                applied[key[0]] = row
                for field in ("moves", "bytes", "pause_ms", "probe_before", "probe_after"):
                    setattr(row, field, find(record, field))
        else:
            row = applied.get(find(record, "version"))
            if row and name == "gain_measured":
                row.measured_gain, row.after = find(record, "gain"), _picture(record.get("similarity"), "after")
            elif row and name == "overlap_ended":
                row.probe_after_overlap = find(record, "probe")
            continue
        row.step, row.outcome, row.version = record["step"], str(name), key[0]
    return rows


def _reason(record: Any) -> str:
    """Return the reason and the detail of a record or a plan. Plans of version 0.1 have a text as reason."""
    if not isinstance(record, dict):
        return ""
    if record.get("forced") is True:
        return "forced"
    return ": ".join(part for key in ("reason", "detail") if isinstance(part := record.get(key), str) and part)


def _picture(shown: Any, clusters: str) -> Picture | None:
    layer = find(shown, "layer")
    try:
        similarity_EE, clusters_E = np.array(shown["matrix"], dtype=float), _clusters(shown[clusters])
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    if math.isnan(layer) or clusters_E is None or similarity_EE.shape != 2 * clusters_E.shape:
        return None
    similarity_EE = np.where(np.isfinite(similarity_EE), similarity_EE.clip(-1, 1), np.nan)
    np.fill_diagonal(similarity_EE, np.nan)  # the similarity of an expert to itself is always 1
    return Picture(int(layer), similarity_EE, clusters_E) if np.isfinite(similarity_EE).any() else None


def _clusters(value: Any) -> np.ndarray | None:
    """Return `value` as an array of cluster ids; None for anything else."""
    try:
        array = np.array(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return (
        array
        if array.dtype.kind == "i" and 0 <= array.min(initial=0) <= array.max(initial=0) < SHOWN_CLUSTERS
        else None
    )


# Figures


def flows(assignments: Sequence[Record], end: float) -> tuple[list[str], int]:
    """Draw the cluster of each expert over steps up to `end`, by layer; also return the number of layers left out.

    At most `SHOWN_LAYERS` layers are drawn, those that change most. No layer is drawn if no expert moved.
    """
    known = [(record, _clusters(record.get("assignment"))) for record in assignments]
    kept = [(r, a) for r, a in known if a is not None and a.ndim == 2 and a.size]
    kept = [(r, a) for r, a in kept if a.shape == kept[0][1].shape]
    if len(kept) < 2:
        return [], 0
    steps_V, versions_V = column([r for r, _ in kept], "step"), column([r for r, _ in kept], "version")
    clusters_VLE = np.stack([a for _, a in kept])
    moved_L = (np.diff(clusters_VLE, axis=0) != 0).sum((0, 2))
    layers = sorted(np.argsort(-moved_L, kind="stable")[:SHOWN_LAYERS].tolist())
    drawn = [
        _flow(f"Membership in layer {layer}", steps_V, versions_V, clusters_VLE[:, layer], max(end, steps_V[-1]))
        for layer in layers
        if moved_L.any()
    ]
    return drawn, len(moved_L) - len(drawn) if drawn else 0


def _slots(clusters_VE: np.ndarray, base_C: np.ndarray, size_C: np.ndarray) -> np.ndarray:
    """Return the row of each expert at each version: it keeps its row until it moves, and then takes a free row."""
    slot_VE = np.empty_like(clusters_VE)
    for version, clusters_E in enumerate(clusters_VE):
        stays_E = clusters_E == clusters_VE[version - 1] if version else np.zeros(len(clusters_E), dtype=bool)
        last_E = slot_VE[version - 1] if version else np.arange(len(clusters_E))
        slot_VE[version] = last_E
        for cluster, (base, size) in enumerate(zip(base_C, size_C, strict=True)):
            new = np.flatnonzero((clusters_E == cluster) & ~stays_E)
            free = np.setdiff1d(np.arange(base, base + size), last_E[(clusters_E == cluster) & stays_E])
            slot_VE[version, new[np.argsort(last_E[new])]] = free[: len(new)]
    return slot_VE


def _ribbon(steps_V: np.ndarray, half_V: np.ndarray, end: float, y_V: np.ndarray, height: float) -> Path:
    """Return the outline of a ribbon at height `y_V`, which bends around the steps at which `y_V` changes."""
    points, codes = [(steps_V[0], y_V[0])], [Path.MOVETO]
    for step, half, (before, after) in zip(steps_V[1:], half_V, pairwise(y_V), strict=True):
        if before != after:
            points += [(step - half, before), (step, before), (step, after), (step + half, after)]
            codes += [Path.LINETO, *3 * [Path.CURVE4]]
    edge = np.array([*points, (end, y_V[-1])])
    codes += [Path.LINETO]
    outline = np.concatenate([edge, edge[::-1] + (0, height)])
    return Path(outline, [*codes, Path.LINETO, *codes[:0:-1]])


def _flow(title: str, steps_V: np.ndarray, versions_V: np.ndarray, clusters_VE: np.ndarray, end: float) -> str:
    n_clusters, n_experts = int(clusters_VE.max()) + 1, clusters_VE.shape[1]
    size_C = np.array([(clusters_VE == c).sum(1).max() for c in range(n_clusters)])
    gap = 1 + int(size_C.sum()) // (5 * n_clusters)
    base_C = np.concatenate([[0], (size_C + gap).cumsum()[:-1]])
    slot_VE = _slots(clusters_VE, base_C, size_C)
    span = end - steps_V[0] or 1.0
    changed_V = 1 + np.flatnonzero((np.diff(clusters_VE, axis=0) != 0).any(1))
    half_V = np.minimum(0.07 * span, 0.45 * np.minimum(np.diff(steps_V), np.diff([*steps_V[1:], end])))

    def draw(axes: Axes) -> str:
        for base, size in zip(base_C, size_C, strict=True):
            axes.axhspan(base - 0.2, base + size + 0.2, facecolor=GRID, alpha=0.6, linewidth=0)
        for expert, slot_V in enumerate(slot_VE.T):
            moves, home = (np.diff(slot_V) != 0).any(), clusters_VE[0, expert]
            path = _ribbon(steps_V, half_V, end, slot_V + 0.07, 0.86)
            color, opacity = SERIES[home % len(SERIES)], 0.95 if moves else 0.55
            axes.add_patch(PathPatch(path, color=color, alpha=opacity, linewidth=0.4, zorder=2 + moves))
        marked, changes = -math.inf, []
        for v in changed_V[-MARKED_EVENTS:]:
            step, version, old, new = float(steps_V[v]), show(versions_V[v], ".0f"), clusters_VE[v - 1], clusters_VE[v]
            moved = ", ".join(f"{e} from {old[e]} to {new[e]}" for e in np.flatnonzero(old != new))
            changes.append(f"version {version} at step {step:,.0f}: {moved}")
            axes.axvline(step, color=INK, linewidth=0.8, linestyle=":", zorder=4)
            if step - marked > 0.06 * span:
                axes.annotate(
                    f"v{version}", (step, 1), xycoords=("data", "axes fraction"), xytext=(0, 2),
                    textcoords="offset points", ha="center", color=INK, fontsize=9,
                )  # fmt: skip
                marked = step
        axes.spines["left"].set_visible(False)
        axes.set_yticks(base_C + size_C / 2, [f"cluster {c}" for c in range(n_clusters)])
        number_axis(axes)
        axes.set_xlim(steps_V[0], steps_V[0] + span)
        axes.set_ylim(base_C[-1] + size_C[-1] + 0.5, -0.5)
        return f"{title}, experts that change clusters. {'; '.join(changes) or 'No expert moves.'}"

    caption = "Each ribbon is an expert in the color of its first cluster. It bends where a plan moves the expert."
    return plot_figure(title, caption, draw, height=min(8.0, max(3.1, 0.5 + 0.06 * n_experts + 0.12 * n_clusters)))


def similarities(rows: Sequence[Decision]) -> list[str]:
    """Draw the similarity before and after the latest applied plan with both records, on one scale."""
    for row in reversed(rows):
        if row.outcome == "applied" and row.before and row.after:
            shown = row.before, row.after
            top = max(float(np.nanmax(abs(picture.similarity_EE))) for picture in shown) or 1.0
            titles = ("Similarity before plan", "Similarity after plan")
            of = f"{show(row.version, '.0f')}, layer"
            return [_similarity(f"{t} {of} {p.layer}", p, top) for t, p in zip(titles, shown, strict=True)]
    return []


def _similarity(title: str, picture: Picture, top: float) -> str:
    order = np.argsort(picture.clusters_E, kind="stable")
    members, matrix_EE = picture.clusters_E[order], picture.similarity_EE[np.ix_(order, order)]
    inside, across = (show(value, ".3f") for value in mean_similarity(picture))
    caption = f"Mean inside clusters {inside}, across clusters {across}."

    def draw(axes: Axes) -> str:
        mesh = axes.pcolormesh(matrix_EE, cmap=BALANCE, vmin=-top, vmax=top, rasterized=True)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        borders = [0, *(np.flatnonzero(np.diff(members)) + 1), len(members)]
        for border in borders[1:-1]:
            axes.axhline(border, color="#222222", linewidth=1.2)
            axes.axvline(border, color="#222222", linewidth=1.2)
        middles = [(a + b) / 2 for a, b in pairwise(borders)]
        names = [str(members[a]) for a in borders[:-1]]
        axes.set_xticks(middles, names)
        axes.set_yticks(middles, names)
        axes.set_xlabel("experts by cluster")
        axes.set_ylabel("experts by cluster")
        bar = axes.figure.colorbar(mesh, ax=axes, label="similarity", aspect=30)
        bar.outline.set_visible(False)
        return f"{title}. {caption} Experts by cluster: {', '.join(map(str, order))}"

    return plot_figure(title, caption, draw, height=4.3)


def mean_similarity(picture: Picture) -> tuple[float, float]:
    """Return the mean similarity inside clusters and across clusters, without the diagonal."""
    inside_EE = picture.clusters_E[:, None] == picture.clusters_E
    return _mean(picture.similarity_EE[inside_EE]), _mean(picture.similarity_EE[~inside_EE])


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


def purity_plot(validations: Sequence[Record], applied: Sequence[Decision]) -> str:
    """Draw the share of the most frequent domain in the tokens of a cluster, over steps."""
    served = [record for record in validations if record.get("cluster_by_domain")]
    counts_V = [np.array(record["cluster_by_domain"], dtype=float) for record in served]
    steps = column(served, "step")
    lines = {
        "clusters": (steps, np.array([np.mean([purity(c_GC) for c_GC in c_LGC]) for c_LGC in counts_V])),
        "all tokens": (
            steps,
            np.array([np.mean([purity(c.sum(-1, keepdims=True)) for c in c_LGC]) for c_LGC in counts_V]),
        ),
    }
    marks = [{"name": "plan applied", "step": row.step} for row in applied]
    caption = "Share of the most frequent domain in the tokens of each cluster and in all tokens, averaged over layers."
    return lines_plot("Domain purity of clusters", caption, "purity", lines, form=".3f", events=marks)


def purity(counts_GC: np.ndarray) -> float:
    """Return the share of rows that belong to the most frequent domain of their cluster; 0 without rows.

    `counts_GC` counts rows by domain G and cluster C.
    """
    total = counts_GC.sum()
    return float(counts_GC.max(0).sum() / total) if total else 0.0


def remap_losses(trains: Sequence[Record], applied: Sequence[Decision]) -> str:
    """Draw the training loss around the latest plans, relative to the last record before each plan."""
    steps, losses = over_steps(trains, "loss")
    cadence = float(np.median(np.diff(steps))) if len(steps) > 1 else 0.0
    first, final = -max(50.0, 3 * cadence), max(200.0, 6 * cadence)
    lines: dict[str, Line] = {}
    for row in applied[-SHOWN_PLANS:]:
        since = steps - row.step
        before = losses[(since <= 0) & np.isfinite(losses)]
        near = (since >= first) & (since <= final)
        if before.size and (since[near] > 0).any():
            lines[f"plan {show(row.version, '.0f')} at {row.step:,}"] = since[near], losses[near] - before[-1]
    caption = "Difference to the last record before the plan. A record is the mean since the previous record."
    unit = "nats / token"
    return lines_plot("Training loss around plans", caption, unit, lines, form="+.4f", since="the plan took effect")
