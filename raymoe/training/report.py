"""A run on one page: `report.html`, made from `config.json` and `metrics.jsonl` in the run's folder alone.

The page needs no network, no script and no display. matplotlib draws SVG into it whose colours are CSS
variables, so that the plots follow the reader's light or dark mode as the text does.
"""

from __future__ import annotations

import html
import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

Record = dict[str, Any]
LEVELS = ("experts", "clusters", "workers")

INK, GRID = "#010203", "#040506"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#997700", "#56b4e9", "#882255", "#777777")
"""Stand-ins in the SVG for the style sheet's colours, which the colour-blind can tell apart."""
VARIABLES = {INK: "--ink", GRID: "--grid"} | {colour: f"--s{i}" for i, colour in enumerate(SERIES)}
DASHES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX*"
BALANCE = LinearSegmentedColormap.from_list("balance", ["#00517f", "#7fb2d6", "#eeece8", "#eba06a", "#a03c00"])
SHARE = LinearSegmentedColormap.from_list("share", ["#eef3f7", "#5b9bc8", "#003d66"])
MARKED_EVENTS = 12
"""Events of one sort that a plot shows at most: the latest."""


def write_report(run: Path) -> Path:
    """Write `report.html` into the folder of a run, by atomic rename; returns its path.

    Raises FileNotFoundError without a config.json, ValueError for one, or for metrics, that cannot be read.
    """
    page = _page(_read_config(run / "config.json"), read_records(run / "metrics.jsonl"))
    path, partial = run / "report.html", run / ".report.html.partial"
    try:
        partial.write_text(page, encoding="utf-8", errors="replace")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


# Out of the run's files


def _read_config(path: Path) -> Record:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a report is made from the folder of a run")
    try:
        about = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): restore it, or write the report of another run") from None
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
        raise ValueError(f"{path} has no object 'config': a report is made from the folder of a run")
    return about


def read_records(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`; none where there is no file yet.

    A last line that a killed worker left unfinished is passed over. Any other that is not a record raises ValueError.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and "kind" in record and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines):
            raise ValueError(f"{path}, line {number}: not a JSON object with a 'kind' and a 'step'; remove the line")
    return records


def _number(value: Any) -> float:
    """`value`, or NaN for null and all else that is not a finite number."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def _column(records: Iterable[Record], *keys: str | int) -> np.ndarray:
    """The number under nested `keys` in each record, NaN where there is none. Shape [records]."""

    def find(value: Any) -> float:
        for key in keys:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return math.nan
        return _number(value)

    return np.array([find(record) for record in records])


def _last(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else math.nan


def _show(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


# Plots


def _label(text: str) -> str:
    """`text` for a plot: one line, not too long, never read as mathematics nor, for its `_`, as hidden."""
    text = " ".join(text.encode(errors="replace").decode().split())
    text = (text if len(text) <= 28 else text[:27] + "…").replace("$", r"\$")
    return "\u200b" + text if text.startswith("_") else text


def _figure(title: str, caption: str, draw: Callable[[Axes], str], height: float = 3.1) -> str:
    """A plot as an HTML figure. `draw` fills the axes and returns in words what they show."""
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": title}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
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
    return (
        f'<figure><h3>{html.escape(title)}</h3><svg {drawn[1]} role="img" aria-label="{html.escape(words)}">{body}</svg>'
        + (f"<figcaption>{html.escape(caption)}</figcaption></figure>" if caption else "</figure>")
    )


def _lines(
    title: str, caption: str, unit: str, lines: Mapping[str, tuple[np.ndarray, np.ndarray]], *,
    form: str = ".4g", from_zero: bool = False, decorate: Callable[[Axes], object] = lambda axes: None,
) -> str:  # fmt: skip
    """Lines by name, each of (steps, values). Nothing where none has a value."""
    lines = {name: line for name, line in lines.items() if np.isfinite(line[1]).any()}
    if not lines:
        return ""

    def draw(axes: Axes) -> str:
        for i, (name, (steps, values)) in enumerate(lines.items()):
            axes.plot(
                steps, values, label=_label(name), color=SERIES[i % len(SERIES)], linewidth=1.6, markersize=4,
                linestyle=DASHES[i // len(SERIES) % len(DASHES)], marker=MARKERS[i % len(MARKERS)] if len(steps) <= 25 else "",
            )  # fmt: skip
        decorate(axes)
        axes.grid(color=GRID, linewidth=0.6)
        axes.set(xlabel="step", ylabel=unit)
        _step_axis(axes)
        axes.set_xlim(left=0)
        if from_zero:
            top = max(float(np.nanmax(values)) for _, values in lines.values())
            axes.set_ylim(0, 1.08 * top if top > 0 else 1)
        if form == ",.0f":
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        labels = axes.get_legend_handles_labels()[1]
        if len(labels) > 1:
            columns = max(1, min(5, 75 // (7 + max(map(len, labels)))))
            figure = axes.get_figure(root=True)
            assert figure is not None
            figure.set_figheight(figure.get_figheight() + 0.17 * ((len(labels) - 1) // columns))
            figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, fontsize=9)
        return f"{title}, at the end: " + ", ".join(f"{n} {_show(_last(v), form)}" for n, (_, v) in lines.items())

    return _figure(title, caption, draw)


def _step_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _mark_events(axes: Axes, events: Sequence[Record]) -> None:
    """Checkpoints as ticks at the foot, all other events as lines, one colour for each sort."""
    checkpoints = [event["step"] for event in events if event.get("what") == "checkpoint"]
    if checkpoints:
        at_foot = axes.get_xaxis_transform()
        axes.plot(
            checkpoints, [0.015] * len(checkpoints), "|", color=INK, transform=at_foot, label="checkpoint", markersize=7
        )
    others = sorted({str(event.get("what")) for event in events} - {"checkpoint"})
    for i, what in enumerate(others):
        steps = [event["step"] for event in events if str(event.get("what")) == what][-MARKED_EVENTS:]
        style: dict[str, Any] = {
            "color": SERIES[(2 + i) % len(SERIES)],
            "linestyle": DASHES[1 + i % 3],
            "linewidth": 1.3,
        }
        for n, step in enumerate(steps):
            axes.axvline(step, label=None if n else _label(what), **style)


def _load_map(title: str, steps: np.ndarray, share_TG: np.ndarray, clusters: Sequence[int] | None) -> str:
    """Load over time relative to an even share; with `clusters`, the groups are experts, sorted by theirs."""
    groups = share_TG.shape[1]
    order = np.argsort(clusters, kind="stable") if clusters else np.arange(groups)
    load_GT = (share_TG * groups).T[order]
    edges = np.concatenate([[max(0.0, steps[0] - (steps[1] - steps[0] if len(steps) > 1 else steps[0]))], steps])

    def draw(axes: Axes) -> str:
        mesh = axes.pcolormesh(edges, np.arange(groups + 1), load_GT, cmap=BALANCE, vmin=0, vmax=2, rasterized=True)
        axes.invert_yaxis()
        axes.set(xlabel="step")
        _step_axis(axes)
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
        end = ", ".join(f"{g} {_show(x, '.2f')}" for g, x in zip(order, load_GT[:, -1], strict=True))
        return f"{title}, load relative to an even share at the end: {end}"

    return _figure(title, "", draw)


def _domain_map(title: str, domains: Sequence[str], share_GC: np.ndarray, top: float) -> str:
    """Which clusters serve a domain's tokens: rows sum to 1."""
    n_domains, n_clusters = share_GC.shape

    def draw(axes: Axes) -> str:
        axes.pcolormesh(share_GC, cmap=SHARE, vmin=0, vmax=top, edgecolor="#ffffff", linewidth=0.8)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.set_yticks(np.arange(n_domains) + 0.5, [_label(domain) for domain in domains])
        axes.set_xticks(np.arange(n_clusters) + 0.5, [str(c) for c in range(n_clusters)])
        axes.set_xlabel("cluster")
        size = 9 if n_clusters <= 8 else 6
        for (g, c), share in np.ndenumerate(share_GC):
            dark = share > 0.65 * top
            axes.text(
                c + 0.5, g + 0.5, _show(share, ".0%"), ha="center", va="center", fontsize=size,
                color="#ffffff" if dark else "#111111",
            )  # fmt: skip
        rows = (f"{d}: " + ", ".join(_show(s, ".0%") for s in row) for d, row in zip(domains, share_GC, strict=True))
        return f"{title}, share of each domain's tokens by cluster. " + "; ".join(rows)

    return _figure(title, "", draw, height=0.9 + 0.36 * n_domains)


# The page


def _page(about: Record, records: Sequence[Record]) -> str:
    trains, validations, events = ([r for r in records if r["kind"] == k] for k in ("train", "validation", "event"))
    assignments = [r["assignment"] for r in records if r["kind"] == "assignment"]
    name = html.escape(str(about["config"].get("run", {}).get("name") or "run"))
    facts = "".join(
        f"<div><dt>{html.escape(term)}</dt><dd>{html.escape(value)}</dd></div>"
        for term, value in _facts(about, trains, validations, events).items()
    )
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name} · raymoe</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<header><p>raymoe training run</p><h1>{name}</h1><dl>{facts}</dl></header><main>"
        + ("" if trains else "<p>No training step has been recorded yet.</p>")
        + _loss(trains, validations, events)
        + _schedule(trains)
        + _balance(trains)
        + _loads(trains, "clusters", None)
        + _loads(trains, "experts", assignments[-1] if assignments else None)
        + _domains(validations)
        + _cost(trains)
        + _event_table(events)
        + _config_list(about["config"])
        + "</main></body></html>\n"
    )


def _section(title: str, figures: Sequence[str], lead: str = "") -> str:
    """Nothing where there is no figure."""
    if not any(figures):
        return ""
    lead = f"<p>{html.escape(lead)}</p>" if lead else ""
    return f'<section><h2>{title}</h2>{lead}<div class="figures">{"".join(figures)}</div></section>'


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
        if not math.isnan(_number(count)):
            facts[f"Parameters {what}".strip()] = format(count, ",")
    if trains:
        last = trains[-1]
        stopped = ", stopped" if events and events[-1].get("what") == "stopped" else ""
        facts["Steps"] = f"{last['step']:,} of {_show(_number(train.get('steps')), ',.0f')}{stopped}"
        facts["Tokens"] = _show(_number(last.get("tokens")), ",.0f")
        facts["Workers"] = str(len(last.get("rss_mb") or []) or "–")
        facts["Training loss"] = _show(_last(_column(trains, "loss")), ".4f")
    if validations:
        last, losses = validations[-1], _column(validations, "loss")
        read = "whole set" if last.get("whole") else f"{last.get('windows', '–')} windows"
        facts["Validation loss"] = f"{_show(_number(last.get('loss')), '.4f')}, {read}"
        facts["Perplexity"] = _show(_number(last.get("perplexity")), ",.2f")
        if np.isfinite(losses).any():
            best = int(np.nanargmin(losses))
            facts["Best validation"] = f"{losses[best]:.4f} at {validations[best]['step']:,}"
        cv = {level: _last(_column(validations, "load_cv", level)) for level in LEVELS}
        facts |= {f"Load CV, {level}": f"{value:.3f}" for level, value in cv.items() if not math.isnan(value)}
    versions = about.get("versions")
    return facts | {what: str(version) for what, version in (versions if isinstance(versions, dict) else {}).items()}


def _loss(trains: Sequence[Record], validations: Sequence[Record], events: Sequence[Record]) -> str:
    steps = _column(validations, "step")
    losses = {
        "training": (_column(trains, "step"), _column(trains, "loss")),
        "validation": (steps, _column(validations, "loss")),
    }
    names = dict.fromkeys(domain for record in validations for domain in record.get("domains") or {})
    domains = {name: (steps, _column(validations, "domains", name)) for name in names}
    both = _lines(
        "Training and validation loss", "Training is the mean since the record before.", "nats / token", losses,
        form=".4f", decorate=lambda axes: _mark_events(axes, events),
    )  # fmt: skip
    return _section("Loss", [both, _lines("Validation loss by domain", "", "nats / token", domains, form=".4f")])


def _schedule(trains: Sequence[Record]) -> str:
    steps = _column(trains, "step")
    rate, norm = {"rate": (steps, _column(trains, "lr"))}, {"norm": (steps, _column(trains, "grad_norm"))}
    return _section(
        "Schedule and gradients",
        [
            _lines("Learning rate", "", "rate", rate, from_zero=True),
            _lines("Gradient norm", "Over all parameters, before clipping.", "norm", norm, from_zero=True),
        ],
    )


def _balance(trains: Sequence[Record]) -> str:
    def by_level(field: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {level: (_column(trains, "step"), _column(trains, field, level)) for level in LEVELS}

    cv, violation = "Standard deviation / mean of the load.", "Largest load / mean load - 1."
    return _section(
        "Balance of the load",
        [
            _lines("Coefficient of variation", cv, "CV", by_level("load_cv"), form=".3f", from_zero=True),
            _lines("Maximum violation", violation, "MaxVio", by_level("load_max_vio"), form=".3f", from_zero=True),
        ],
        "Measured in each layer since the record before, then averaged over layers. 0 is even.",
    )


def _loads(trains: Sequence[Record], of: str, assignment: Sequence[Sequence[int]] | None) -> str:
    """A map for each layer of the shares in `load_clusters` or `load_experts`."""
    clustered = any(record.get("load_clusters") for record in trains)
    trains = [record for record in trains if record.get(f"load_{of}")]
    lead, figures = "Relative to an even share, since the record before.", []
    if assignment and clustered:
        lead += " Experts are sorted by cluster."
    for layer, shares in enumerate(trains[-1][f"load_{of}"] if trains else []):
        share_TG = np.stack([_column(trains, f"load_{of}", layer, group) for group in range(len(shares))], axis=-1)
        clusters = assignment[layer] if assignment and clustered else None
        figures.append(_load_map(f"{of.capitalize()} of layer {layer}", _column(trains, "step"), share_TG, clusters))
    return _section(f"Load of {of}", figures, lead)


def _domains(validations: Sequence[Record]) -> str:
    """From the last validation that read the whole set, else from the last."""
    served = [record for record in validations if record.get("cluster_by_domain")]
    if not served:
        return ""
    record = next((r for r in reversed(served) if r.get("whole")), served[-1])
    counts_LGC = np.array(record["cluster_by_domain"], dtype=float)
    totals = counts_LGC.sum(-1, keepdims=True)
    share_LGC = np.divide(counts_LGC, totals, out=np.full_like(counts_LGC, np.nan), where=totals > 0)
    top = max(0.01, float(np.nanmax(share_LGC, initial=0.01)))
    figures = [
        _domain_map(f"Layer {i}", list(record["domains"]), share_GC, top) for i, share_GC in enumerate(share_LGC)
    ]
    read = "the whole validation set" if record.get("whole") else f"{record.get('windows', 'some')} validation windows"
    lead = f"Share of each domain's tokens by cluster, on {read} at step {record['step']:,}."
    return _section("Which domains each cluster serves", figures, lead)


def _cost(trains: Sequence[Record]) -> str:
    steps = _column(trains, "step")
    workers = max((len(record.get("rss_mb") or []) for record in trains), default=0)
    speed = {"tokens/s": (steps, _column(trains, "tokens_per_s"))}
    memory = {f"worker {w}": (steps, _column(trains, "rss_mb", w)) for w in range(workers)}
    sent = {"bytes": (steps, _column(trains, "a2a_bytes_per_token"))}
    return _section(
        "Speed, memory and communication",
        [
            _lines("Speed", "All workers together.", "tokens / s", speed, form=",.0f", from_zero=True),
            _lines("Memory", "Resident memory of each worker.", "MiB", memory, form=",.0f", from_zero=True),
            _lines("All-to-all", "Bytes that expert parallelism sends, for each token trained on.", "bytes / token", sent,
                   form=",.0f", from_zero=True),
        ],
    )  # fmt: skip


def _event_table(events: Sequence[Record]) -> str:
    def details(event: Record) -> str:
        rest = {key: value for key, value in event.items() if key not in ("kind", "step", "what")}
        return ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in rest.items()
        )

    rows = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in (f"{e['step']:,}", str(e.get("what")), details(e)))
        + "</tr>"
        for e in events
    )
    head = '<tr><th scope="col">step</th><th scope="col">what</th><th scope="col">details</th></tr>'
    return f"<details><summary>Events ({len(events)})</summary><table>{head}{rows}</table></details>" if events else ""


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
"""
