"""Generate the files that provision Grafana and Prometheus: `python dashboards/build.py [FOLDER]`.

Panels (`panels.py`) and alerts (`alerts.py`) refer to metrics by name. The build looks up exported names and help
texts in `raymoe.metrics`, and fails for a metric that is not declared. The generated files are committed, and a test
compares them with the output of the build.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from alerts import GROUPS
from panels import DASHBOARDS, Dashboard, Panel
from prometheus_client import CollectorRegistry

from raymoe.metrics import ApiMetrics, ClusterMetrics, TrainingMetrics, TrunkMetrics

HERE = Path(__file__).resolve().parent

EXTERNAL = {
    "up": "Whether Prometheus could scrape the process: 1 or 0.",
    "ray_serve_autoscaling_target_replicas": "Ray Serve: target number of replicas.",
    "ray_serve_deployment_replica_healthy": "Ray Serve: whether a replica is healthy: 1 or 0.",
}
"""Metrics that raymoe does not declare, with their help texts."""

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
METRIC = re.compile(r"@(?:(\w+)\.)?(\w+)(?:\{([^}]*)\})?")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


class Family(NamedTuple):
    help: str
    labels: frozenset[str]
    """Labels of the series that exist before the first event."""


def declared() -> dict[str, dict[str, Family]]:
    """Return exported name -> exporting process (training, trunk, cluster, api) -> family."""
    registries = {who: CollectorRegistry() for who in ("training", "trunk", "cluster", "api")}
    TrainingMetrics(registries["training"], run="", worker="0")
    TrunkMetrics(registries["trunk"], clusters=1)
    ClusterMetrics(registries["cluster"], cluster="0")
    ApiMetrics(registries["api"], model="")
    found: dict[str, dict[str, Family]] = {}
    for who, registry in registries.items():
        for metric in registry.collect():
            family = Family(metric.documentation, frozenset(name for s in metric.samples for name in s.labels))
            for suffix in SUFFIXES[metric.type]:
                found.setdefault(metric.name + suffix, {})[who] = family
    return found


DECLARED = declared()


def look_up(who: str | None, name: str) -> tuple[str, str, list[str]]:
    """Return the exported name of `name`, its help text, and matchers that exclude other processes' metrics.

    Raises KeyError for a metric that is not declared, and ValueError for a name that several processes export.
    """
    if name in EXTERNAL:
        return name, EXTERNAL[name], []
    name = f"raymoe_{name}"
    if name not in DECLARED:
        raise KeyError(f"{name} is not declared in raymoe.metrics")
    families = DECLARED[name]
    if who is None and len(families) > 1:
        raise ValueError(
            f"{name} is exported by {' and '.join(families)}: select one of them, as @{min(families)}.{name}"
        )
    own = families[who] if who else next(iter(families.values()))
    others = frozenset().union(*(f.labels for f in families.values() if f is not own)) if len(families) > 1 else own.labels  # fmt: skip
    apart = [f'{label}!=""' for label in sorted(own.labels - others)] + [f'{label}=""' for label in sorted(others - own.labels)]  # fmt: skip
    return name, own.help, apart


def expand(expr: str, matchers: list[str]) -> tuple[str, list[str]]:
    """Return `expr` in PromQL, with `matchers` on each metric, and the help texts of its metrics."""
    helps: list[str] = []

    def metric(found: re.Match[str]) -> str:
        name, text, apart = look_up(found[1], found[2])
        if text not in helps:
            helps.append(text)
        inside = ", ".join([*matchers, *apart, *([found[3]] if found[3] else [])])
        return f"{name}{{{inside}}}" if inside else name

    return METRIC.sub(metric, expr), helps


def matchers(dashboard: Dashboard) -> list[str]:
    return [f'{label}=~"${label}"' for label in ("job", "instance", dashboard.label)]


def panel(of: Dashboard, panel: Panel, place: dict[str, int], number: int) -> dict[str, Any]:
    targets, helps = [], []
    for i, (expr, legend) in enumerate(panel.queries):
        expanded, texts = expand(expr, matchers(of))
        helps += [text for text in texts if text not in helps]
        targets.append({"datasource": SOURCE, "expr": expanded, "legendFormat": legend, "refId": chr(ord("A") + i)})
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "stat":
        kind = "stat"
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "graphMode": "area"}
    else:
        kind = "timeseries"
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}  # fmt: skip
        defaults["custom"] = {
            "drawStyle": "bars" if panel.kind == "bars" else "line",
            "fillOpacity": {"lines": 0, "bars": 60, "stack": 30}[panel.kind],
            "stacking": {"mode": "normal" if panel.kind == "stack" else "none"},
        }
    return {
        "id": number, "type": kind, "title": panel.title, "description": " ".join([panel.note, *helps]).strip(),
        "datasource": SOURCE, "gridPos": place, "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options, "targets": targets,
    }  # fmt: skip


def panels(of: Dashboard) -> list[dict[str, Any]]:
    """Place rows below each other, and the panels of a row from left to right."""
    placed: list[dict[str, Any]] = []
    y = 0
    for title, row in of.rows.items():
        placed.append({
            "id": len(placed) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
        })  # fmt: skip
        x, y = 0, y + 1
        height = 4 if row[0].kind == "stat" else 8
        for one in row:
            if x + one.width > 24:
                x, y = 0, y + height
            placed.append(panel(of, one, {"x": x, "y": y, "w": one.width, "h": height}, len(placed) + 1))
            x += one.width
        y += height
    return placed


def variables(of: Dashboard) -> list[dict[str, Any]]:
    discovered_by = [look_up(None, name)[0] for name in of.discovered_by]
    jobs = "|".join(discovered_by)

    def variable(label: str, query: str, all_value: str) -> dict[str, Any]:
        return {
            "name": label, "label": label.capitalize(), "type": "query", "datasource": SOURCE, "definition": query,
            "query": {"query": query, "refId": f"values of {label}"}, "refresh": 2, "sort": 1, "multi": True,
            "includeAll": True, "allValue": all_value, "current": {"text": ["All"], "value": ["$__all"]},
        }  # fmt: skip

    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1},
        variable("job", f'label_values({{__name__=~"{jobs}"}}, job)', ".+"),
        variable(of.label, f'label_values({discovered_by[0]}{{job=~"$job"}}, {of.label})', of.all_value),
        variable("instance", f'label_values(up{{job=~"$job", {of.label}=~"${of.label}"}}, instance)', ".+"),
    ]


def dashboard(name: str, of: Dashboard) -> dict[str, Any]:
    annotations = []
    if of.annotation:
        annotations.append({
            "name": "Plans applied", "datasource": SOURCE, "enable": True, "iconColor": "purple",
            "expr": expand(of.annotation, matchers(of))[0], "titleFormat": "{{run}}: a plan was applied",
        })  # fmt: skip
    return {
        "uid": f"raymoe-{name}", "title": of.title, "tags": ["raymoe"],
        "description": f"{of.description} Generated by dashboards/build.py.",
        "schemaVersion": 39, "editable": False, "graphTooltip": 1, "refresh": "30s", "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "links": [{"type": "dashboards", "title": "raymoe", "tags": ["raymoe"], "asDropdown": True, "keepTime": True,
                   "includeVars": True}],
        "annotations": {"list": annotations}, "templating": {"list": variables(of)}, "panels": panels(of),
    }  # fmt: skip


def alerts() -> dict[str, Any]:
    groups = []
    for name, rules in GROUPS.items():
        written = [
            {
                "alert": rule.name, "expr": expand(" ".join(rule.expr.split()), [])[0], "for": rule.wait,
                "labels": {"severity": rule.severity},
                "annotations": {"summary": rule.summary, "description": rule.description},
            }
            for rule in rules
        ]  # fmt: skip
        groups.append({"name": f"raymoe-{name}", "rules": written})
    return {"groups": groups}


PROMETHEUS = {
    "global": {"scrape_interval": "10s", "evaluation_interval": "30s"},
    "rule_files": ["alerts.yml"],
    "scrape_configs": [
        # The labels of the metrics are more specific than the labels of the target, which are a subset of them.
        {"job_name": "raymoe", "honor_labels": True,
         "file_sd_configs": [{"files": ["targets/*.json"], "refresh_interval": "10s"}]},
        {"job_name": "ray",
         "file_sd_configs": [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"], "refresh_interval": "30s"}]},
    ],
}  # fmt: skip

DATA_SOURCES = {
    "apiVersion": 1,
    "datasources": [
        {"name": "raymoe", "uid": "raymoe", "type": "prometheus", "access": "proxy", "url": "http://127.0.0.1:9090",
         "jsonData": {"timeInterval": "10s"}}
    ],
}  # fmt: skip

PROVIDERS = {
    "apiVersion": 1,
    "providers": [
        {"name": "raymoe", "folder": "raymoe", "type": "file", "disableDeletion": True, "allowUiUpdates": False,
         "options": {"path": "${RAYMOE_DASHBOARDS}"}}
    ],
}  # fmt: skip

LINKS = (
    "The folder `targets` beside this file has a link for each run and application. `make watch` maintains the links:\n"
    "targets/NAME.json -> run.root/NAME/prometheus_targets.json,\n"
    "targets/serving-APPLICATION.json -> run.root/serving/APPLICATION/prometheus_targets.json.\n"
    "The job `ray` reads the file that Ray writes to its default --temp-dir."
)


def document(content: dict[str, Any], about: str = "") -> str:
    comment = "".join(f"# {line}\n" for line in ["Generated by dashboards/build.py.", *about.splitlines()])
    return comment + yaml.safe_dump(content, sort_keys=False, width=110, allow_unicode=True)


def build(folder: Path) -> None:
    """Write all files to `folder`. Raises KeyError for a metric that is not declared."""
    files = {f"{name}.json": json.dumps(dashboard(name, of), indent=1) + "\n" for name, of in DASHBOARDS.items()}
    files["alerts.yml"] = document(alerts())
    files["prometheus.yml"] = document(PROMETHEUS, LINKS)
    files["provisioning/datasources/raymoe.yml"] = document(DATA_SOURCES)
    files["provisioning/dashboards/raymoe.yml"] = document(
        PROVIDERS, "The environment variable RAYMOE_DASHBOARDS of Grafana must name the folder of the dashboards."
    )
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
