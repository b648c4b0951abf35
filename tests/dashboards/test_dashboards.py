"""Dashboards and alerts: generated files are current, metrics exist, and a real Prometheus evaluates them."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge

from raymoe.metrics import (
    FINISHES,
    REFUSALS,
    REJECTIONS,
    ApiMetrics,
    ClusterMetrics,
    TrainingMetrics,
    TrunkMetrics,
    serve,
)
from raymoe.serving.residency import ResidencyStats
from raymoe.storage.scrape_targets import write_targets
from tests.test_metrics import applied, plan_record, record, routing

ROOT = Path(__file__).parents[2] / "dashboards"
NAMES = ("training", "clustering", "serving")
BOARDS = {name: json.loads((ROOT / f"{name}.json").read_text()) for name in NAMES}
GRAPHS = [(name, p) for name, board in BOARDS.items() for p in board["panels"] if p["type"] != "row"]
RULES = [rule for group in yaml.safe_load((ROOT / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
PANEL_EXPRESSIONS = [target["expr"] for _, panel in GRAPHS for target in panel["targets"]]
MARKS = [mark["expr"] for board in BOARDS.values() for mark in board["annotations"]["list"]]
VARIABLES = [v for board in BOARDS.values() for v in board["templating"]["list"] if v["type"] == "query"]

FOUND_BY = {"job", "instance", "run", "worker", "application", "deployment", "replica", "alertname"}
"""Labels of the scrape targets, in addition to the labels of the metrics."""

LEFT_OUT: dict[str, str] = {}
"""Metrics that no panel and no alert uses, with the reason."""

OTHERS = {"up", "ray_serve_autoscaling_target_replicas", "ray_serve_deployment_replica_healthy"}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"dashboards_{name}", ROOT / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


watch = load("watch")


class Processes:
    """Metrics of a run with two workers and of an application with two clusters, with values as in production."""

    def __init__(self) -> None:
        self.registries = {name: CollectorRegistry() for name in ("0", "1", "api", "trunk", "cluster 0", "cluster 1")}
        of = self.registries
        self.workers = [TrainingMetrics(of[w], run="first", worker=w) for w in ("0", "1")]
        self.api, self.trunk = ApiMetrics(of["api"], model="small"), TrunkMetrics(of["trunk"], clusters=2)
        self.clusters = [ClusterMetrics(of[f"cluster {c}"], cluster=str(c)) for c in (0, 1)]

    def feed(self, i: int) -> None:
        """Observe the i-th of several equal intervals of time, from 1."""
        for worker in self.workers:
            for one in self.records(i):
                worker.observe(one)
        for one in (plan_record("made", plan={}, seconds=0.1), plan_record("no_plan", reason="nothing to gain"),
                    plan_record("status", lag_steps=12, refused_messages=i)):  # fmt: skip
            self.workers[0].observe(one)  # only rank 0 receives them
        self.serve(i)

    def records(self, i: int) -> Iterator[dict[str, Any]]:
        yield record(10 * i, loss=5 - math.log(i), version=i, skipped_steps=i)
        yield {"kind": "validation", "step": 10 * i, "loss": 4.0, **routing()}
        yield {"kind": "event", "step": 10 * i, "name": "checkpoint_completed", "checkpoint": 10 * i, "seconds": 0.4}
        yield {"kind": "event", "step": 10 * i, "name": "checkpoint_failed", "checkpoint": 10 * i, "seconds": 9.0}
        yield applied(3, 5000, 40.0, 0.25)
        yield plan_record("gain_measured", version=i, gain=0.125)
        yield plan_record("refused", reason=f"{REFUSALS[i % len(REFUSALS)]}: 1", plan=None)
        yield plan_record("messages", merged=2 * i, lost=i)
        yield plan_record("clusterer_restarted")

    def serve(self, i: int) -> None:
        api, rows = self.api, {0: 300 * i, 1: 100 * i}
        for histogram in (api.time_to_first_token, api.inter_token_latency, api.e2e_request_latency):
            histogram.observe(0.03 * i)
        api.prompt_tokens.inc(100)
        api.generation_tokens.inc(50)
        api.requests_running.set(3)
        api.resumes.inc()
        for how, why in itertools.zip_longest(FINISHES, REJECTIONS):
            for counter in (api.finished.get(how), api.rejected.get(why)):
                if counter:
                    counter.inc()
        stats = ResidencyStats(50 * i, 5 * i, 5 * i, i, 4 * i, 0.1 * i, 2**20, (0,))
        self.trunk.update(
            running=2,
            waiting=1,
            kv_usage=0.5,
            rows=rows,
            remote_rows={1: 100 * i},
            connected={0: 1, 1: 2},
            residency=stats,
        )
        for c, cluster in enumerate(self.clusters):
            self.trunk.observe_call(c, "call", 0.002)
            self.trunk.observe_call(c, "retry", 0.0)
            cluster.rows.inc(100)
            cluster.compute_seconds.observe(0.001)
            cluster.resident_bytes.set(2**20)


def exported() -> dict[str, set[str]]:
    """Return the name of each series and its labels, after at least one event of each kind."""
    processes = Processes()
    processes.feed(1)
    labels: dict[str, set[str]] = {}
    for registry in processes.registries.values():
        for sample in (sample for metric in registry.collect() for sample in metric.samples):
            if not sample.name.endswith("_created"):
                labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


EXPORTED = exported()


def metrics_in(expression: str) -> set[str]:
    """Return the identifiers that are not functions, keywords, labels, strings or numbers."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(?:by|on|without|ignoring) \([^)]*\)|\boffset \w+', " ", expression)
    return set(re.findall(r"\b[a-z]\w*\b(?! *\()", bare)) - {"and", "or", "unless", "by", "on"}


def family(series: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", series)


def test_committed_files_are_the_output_of_the_build(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "build.py", tmp_path], check=True, timeout=60)
    written = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    kept = {file.relative_to(ROOT): file.read_bytes() for ext in ("json", "yml") for file in ROOT.rglob(f"*.{ext}")}
    kept.pop(Path("alerts_test.yml"))
    assert sorted(map(str, written)) == sorted(map(str, kept))
    assert not [str(name) for name in written if written[name] != kept[name]], "stale: run python dashboards/build.py"


def test_a_metric_that_is_not_declared_stops_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    build = load("build")
    assert build.expand("max(@training_loss) > 0", ["a"])[0] == "max(raymoe_training_loss{a}) > 0"
    with pytest.raises(KeyError, match="raymoe_training_losses is not declared"):
        build.expand("max(@training_losses)", [])
    with pytest.raises(ValueError, match="select one of them, as @api"):
        build.expand("max(@num_requests_running)", [])
    assert build.expand("@api.num_requests_running", [])[0] == 'raymoe_num_requests_running{model_name!=""}'
    assert build.expand("@trunk.num_requests_running", [])[0] == 'raymoe_num_requests_running{model_name=""}'


def test_every_metric_is_in_a_panel_or_an_alert() -> None:
    seen = {family(name) for e in [*PANEL_EXPRESSIONS, *(rule["expr"] for rule in RULES)] for name in metrics_in(e)}
    assert {family(name) for name in EXPORTED} - seen == LEFT_OUT.keys()


@pytest.mark.parametrize("expression", sorted({*PANEL_EXPRESSIONS, *MARKS, *(rule["expr"] for rule in RULES)}))
def test_expressions_use_series_and_labels_that_exist(expression: str) -> None:
    names = metrics_in(expression)
    assert names and names <= EXPORTED.keys() | OTHERS
    assert all(expression.count(a) == expression.count(b) for a, b in ("()", "{}", "[]"))
    allowed = FOUND_BY.union(*(EXPORTED.get(name, set()) for name in names))
    grouped = re.findall(r"\b(?:by|on) \(([^)]*)\)", expression)
    matched = re.findall(r"(\w+)[=!]~?\"", expression)
    assert {label.strip() for labels in grouped for label in labels.split(",")} | set(matched) <= allowed


@pytest.mark.parametrize(("name", "panel"), GRAPHS, ids=lambda value: value["title"] if isinstance(value, dict) else value)  # fmt: skip
def test_panels_satisfy_the_dashboard_linter(name: str, panel: dict[str, Any]) -> None:
    """Rules of grafana/dashboard-linter."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert panel["title"] and panel["description"].endswith(".") and panel["datasource"] == source
    assert panel["fieldConfig"]["defaults"]["unit"] in {
        "none", "percentunit", "sci", "s", "dtdurations", "bytes", "Bps", "cps", "reqps",
    }  # fmt: skip
    assert panel["targets"] and len({t["refId"] for t in panel["targets"]}) == len(panel["targets"])
    for target in panel["targets"]:
        expression = target["expr"]
        assert target["datasource"] == source and target["legendFormat"]
        selectors = re.findall(r"\b(?:raymoe_|ray_serve_|up\b)\w*(\{[^}]*\})?", expression)
        own = "application" if name == "serving" else "run"
        for matcher in ('job=~"$job"', 'instance=~"$instance"', f'{own}=~"${own}"'):
            assert selectors and all(matcher in selector for selector in selectors)
        for function, window in re.findall(r"(\w+)\((?:raymoe_|ray_)\w+\{[^}]*\}\[([^\]]*)\]", expression):
            assert window == "$__rate_interval" or (function, window) == ("increase", "$__range")
        for function in re.findall(r"(\w*)\(?raymoe_\w+_total\{", expression):
            assert function in ("rate", "increase")
        assert ("_bucket" in expression) == ("histogram_quantile" in expression)


@pytest.mark.parametrize("name", NAMES)
def test_dashboards_satisfy_the_dashboard_linter(name: str) -> None:
    board = BOARDS[name]
    assert board["editable"] is False and board["uid"] == f"raymoe-{name}"
    source, *queries = board["templating"]["list"]
    assert (source["name"], source["label"], source["query"]) == ("datasource", "Data source", "prometheus")
    assert [v["name"] for v in queries] == ["job", "application" if name == "serving" else "run", "instance"]
    for variable in queries:
        assert variable["datasource"]["uid"] == "${datasource}" and variable["multi"] and variable["includeAll"]
        assert variable["label"] == variable["name"].capitalize() and variable["refresh"] == 2
        assert variable["allValue"] == (".*" if variable["name"] == "application" else ".+")
    titles = [panel["title"] for panel in board["panels"]]
    assert len(set(titles)) == len(titles) == len({panel["id"] for panel in board["panels"]})
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in board["panels"]):
        cells = set(itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])))  # fmt: skip
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells


def test_every_alert_has_a_summary_a_severity_and_a_test() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert rule["alert"].startswith("Raymoe") and rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"].endswith(".") and rule["for"]
    tests = {test["name"]: test["promql_expr_test"] for test in yaml.safe_load((ROOT / "alerts_test.yml").read_text())["tests"]}  # fmt: skip
    assert list(tests) == names
    for name, checks in tests.items():
        assert all(f'alertname="{name}"' in check["expr"] for check in checks)
        assert {bool(check["exp_samples"]) for check in checks} == {True, False}


def test_provisioning_files_parse() -> None:
    (source,) = yaml.safe_load((ROOT / "provisioning/datasources/raymoe.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((ROOT / "provisioning/dashboards/raymoe.yml").read_text())["providers"]
    assert source["type"] == "prometheus" and provider["type"] == "file" and provider["options"]["path"]
    config = yaml.safe_load((ROOT / "prometheus.yml").read_text())
    assert config["rule_files"] == ["alerts.yml"]
    assert [job["job_name"] for job in config["scrape_configs"]] == ["raymoe", "ray"]


def targets(root: Path, name: str) -> Path:
    (root / name).mkdir(parents=True, exist_ok=True)
    return root / name / "prometheus_targets.json"


def test_links_follow_the_runs_of_the_root(tmp_path: Path) -> None:
    root, links = tmp_path / "root", tmp_path / "work" / "targets"
    for name in ("first", "second", "serving/app"):
        write_targets(targets(root, name), [("127.0.0.1", 1, {"run": name})])
    (root / "exports").mkdir()
    watch.link(root, links)
    assert {link.name for link in links.iterdir()} == {"first.json", "second.json", "serving-app.json"}
    write_targets(targets(root, "first"), [])
    targets(root, "second").unlink()
    watch.link(root, links)
    assert {link.name: json.loads(link.read_text()) == [] for link in links.iterdir()} == {
        "first.json": True, "serving-app.json": False,
    }  # fmt: skip


def test_links_follow_the_ray_sessions_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    lists = {name: tmp_path / name / watch.RAY_TARGETS for name in ("ray", "raymoe-ray-abc/ray", "other/ray")}
    for file in lists.values():
        file.parent.mkdir(parents=True)
        file.write_text("[]")

    def linked() -> set[Path]:
        watch.link_ray(tmp_path / "rays")
        return {link.resolve() for link in (tmp_path / "rays").iterdir() if link.resolve().is_relative_to(tmp_path)}

    assert linked() == {lists["ray"], lists["raymoe-ray-abc/ray"]}
    lists["ray"].unlink()
    assert linked() == {lists["raymoe-ray-abc/ray"]}


def test_the_config_is_for_the_given_root(tmp_path: Path) -> None:
    write_targets(targets(tmp_path / "root", "first"), [])
    config = yaml.safe_load(watch.configure(tmp_path, tmp_path / "root", Path("/else/where.json")).read_text())
    own, rays = config["scrape_configs"]
    assert config["rule_files"] == [str(ROOT.resolve() / "alerts.yml")] and config["global"]["scrape_interval"] == "10s"
    assert own["file_sd_configs"][0]["files"] == ["targets/*.json"] and (tmp_path / "targets/first.json").is_symlink()
    assert rays["file_sd_configs"][0]["files"] == ["/else/where.json"]


def test_prometheus_is_found_on_path_and_in_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, tools = tmp_path / "system", tmp_path / "tools"
    monkeypatch.setenv("PATH", str(system))
    with pytest.raises(
        FileNotFoundError, match=r"run `python dashboards/install_prometheus.py`.*prometheus.io/download"
    ):
        watch.programs(tools)
    for folder in (tools, system):
        folder.mkdir()
        for name in watch.PROGRAMS:
            (folder / name).write_text("#!/bin/sh\nexit 1\n")
            (folder / name).chmod(0o755)
        assert watch.programs(tools) == (folder / "prometheus", folder / "promtool")


def test_watch_ends_with_the_install_command(tmp_path: Path) -> None:
    """It downloads nothing by itself."""
    code = f"import sys, pathlib; sys.path.insert(0, {str(ROOT)!r}); import watch; watch.programs.__defaults__ = (pathlib.Path('none'),); sys.exit(watch.main())"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, "--root", tmp_path], env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("watch.py: prometheus and promtool are neither on PATH")
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_install_requires_apt_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install = load("install_prometheus")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="install Prometheus from https://prometheus.io/download"):
        install.install(tmp_path / "tools")
    installed = tmp_path / "done" / "usr" / "bin"
    installed.mkdir(parents=True)
    for name in install.PROGRAMS:
        (installed / name).touch()
    assert install.install(tmp_path / "done") == installed  # no download


# With a real Prometheus.


@pytest.fixture(scope="module")
def programs() -> tuple[Path, Path]:
    try:
        return watch.programs()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ask(port: int, path: str, **query: str) -> Any:
    """Return `data` of a response of Prometheus' API, or None while Prometheus starts."""
    url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)["data"]
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return None
        raise AssertionError(f"{query}: {error.read().decode()}") from None
    except OSError:
        return None


def until(found: Callable[[], Any], what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Repeat `found` until its result is true. Fails with the message of `what` after a deadline."""
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)
    return result


def concrete(expression: str, interval: str = "5s") -> str:
    """Return the query that Grafana sends when all values of the variables are selected."""
    values = {"$__rate_interval": interval, "$__range": "60s", '"$application"': '".*"'}
    for variable, value in values.items():
        expression = expression.replace(variable, value)
    return re.sub(r'"\$\w+"', '".+"', expression)


@pytest.mark.soak
def test_config_and_rules_are_valid_and_alerts_fire_as_tested(programs: tuple[Path, Path], tmp_path: Path) -> None:
    config = watch.configure(tmp_path, tmp_path, tmp_path / "ray.json")
    for command in (
        ["check", "config", str(ROOT / "prometheus.yml")], ["check", "config", str(config)],
        ["check", "rules", str(ROOT / "alerts.yml")], ["test", "rules", str(ROOT / "alerts_test.yml")],
    ):  # fmt: skip
        done = subprocess.run([programs[1], *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.soak
def test_every_panel_has_data(programs: tuple[Path, Path], port: int, tmp_path: Path) -> None:
    """Scrape real metrics of raymoe and two stand-ins for metrics of Ray Serve."""
    processes, root = Processes(), tmp_path / "root"
    ports = {name: serve(registry) for name, registry in processes.registries.items()}
    of_run = [("127.0.0.1", ports[w], {"run": "first", "worker": w}) for w in ("0", "1")]
    of_app = [("127.0.0.1", ports[d], {"application": "app", "deployment": d, "replica": d}) for d in ports if d not in "01"]  # fmt: skip
    write_targets(targets(root, "first"), of_run)
    write_targets(targets(root, "serving/app"), of_app)
    rays = CollectorRegistry()
    for name, labels in (("target_replicas", ["application", "deployment"]),
                         ("replica_healthy", ["application", "deployment", "replica"])):  # fmt: skip
        full = f"ray_serve_{'autoscaling' if name == 'target_replicas' else 'deployment'}_{name}"
        Gauge(full, "A metric of Ray.", labels, registry=rays).labels("app", *labels[1:]).set(1)
    (tmp_path / "ray.json").write_text(json.dumps([{"labels": {"job": "ray"}, "targets": [f"127.0.0.1:{serve(rays)}"]}]))  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        config = watch.configure(tmp_path / "work", root, tmp_path / "ray.json", every="1s")
        prometheus = watch.start(programs[0], config, port, log.fileno())
    try:
        missing = dict.fromkeys(concrete(e) for e in (*PANEL_EXPRESSIONS, *MARKS))
        stretch = itertools.count(1)

        def answered() -> bool:
            processes.feed(next(stretch))
            now = time.time()
            for expression in list(missing):
                data = ask(port, "query_range", query=expression, start=str(now - 15), end=str(now), step="1")
                if data and any(value != "NaN" for series in data["result"] for _, value in series["values"]):
                    del missing[expression]
            return not missing

        until(answered, lambda: f"no data for {list(missing)}\n{(tmp_path / 'log').read_text()}")
        active = ask(port, "targets")["activeTargets"]
        assert len(active) == 7 and {target["health"] for target in active} == {"up"}
        for variable in VARIABLES:
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
            assert ask(port, f"label/{label}/values", **{"match[]": concrete(selector)}), variable
        assert ask(port, "label/exported_run/values") == []  # targets and metrics have the same labels
        rules = lambda: [rule for group in ask(port, "rules")["groups"] for rule in group["rules"]]  # noqa: E731
        until(lambda: all(rule["health"] == "ok" for rule in rules()), lambda: [r for r in rules() if r["health"] != "ok"])  # fmt: skip
        # These two have no wait time, and the records above contain their events.
        early = {"Run first skips steps", "Run first could not write a checkpoint"}
        firing = lambda: {a["annotations"]["summary"] for rule in rules() for a in rule["alerts"] if a["state"] == "firing"}  # noqa: E731  # fmt: skip
        until(lambda: early <= firing(), lambda: f"{early} are not all in {firing()}")
    finally:
        prometheus.terminate()
        assert prometheus.wait(timeout=30) == 0


@pytest.mark.soak
def test_watch_follows_runs_that_start_and_end_and_stops_its_prometheus(
    programs: tuple[Path, Path], port: int, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    command = [sys.executable, ROOT / "watch.py", "--root", root, "--port", str(port), "--ray", tmp_path / "ray.json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and f"http://127.0.0.1:{port}" in process.stdout.readline()
        until(lambda: ask(port, "targets"), lambda: "Prometheus does not answer")
        registry = CollectorRegistry()
        TrainingMetrics(registry, run="late", worker="0").observe(record(10))
        write_targets(targets(root, "late"), [("127.0.0.1", serve(registry), {"run": "late", "worker": "0"})])
        until(lambda: ask(port, "query", query='raymoe_training_step{run="late"} == 10')["result"], lambda: "no series")
        targets(root, "late").unlink()  # as a run that ends by itself does
        until(lambda: not ask(port, "query", query='up{run="late"}')["result"], lambda: "the target is still scraped")
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    assert ask(port, "targets") is None  # no process listens on the port
