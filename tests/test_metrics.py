"""Metrics of training and serving: values after records, the HTTP endpoint, and the file of scrape targets."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from raymoe.metrics import REFUSALS, TrainingMetrics, TrunkMetrics, serve
from raymoe.metrics.serving import PLACES
from raymoe.serving.residency import ResidencyStats
from raymoe.storage.scrape_targets import write_targets

WORKER = {"run": "first", "worker": "1"}
LABELS = {*WORKER, "split", "level", "layer", "statistic", "cluster", "outcome", "reason", "le"}


def record(step: int, **changes: Any) -> dict[str, Any]:
    """A train record of 1000 tokens a step, 0.5 s each."""
    levels = {"experts": 0.5, "clusters": 0.25, "workers": 0.125}
    return {
        "kind": "train", "step": step, "loss": 4.5, "lr": 0.003, "tokens_per_s": 2000.0, "step_ms": 500.0,
        "grad_norm": 0.7, "load_cv": levels, "load_max_vio": {k: 2 * v for k, v in levels.items()},
        "a2a_bytes_per_token": 96.0, "version": 3, "rss_mb": [100.0, 250.5], "skipped_steps": 0,
        "compute_ms": [100.0, 250.0], "slowness": [0.4, 2.5],
        "load_experts": [], "load_clusters": [[0.75, 0.25], [0.25, 0.75]], **(routing() | changes),
    }  # fmt: skip


def routing(forced: float = 0.25) -> dict[str, Any]:
    """The measures of the routing of two layers. A router of layer 0 has no rows."""
    both = lambda a, b: {"clusters": [a, b], "experts": [None, b]}  # noqa: E731
    return {
        "bias_forced_share": both(forced, 0.5), "chosen_probability": both(0.75, 0.5), "router_entropy": both(0.5, 0.25),
        "selection_bias_min": both(-2.0, -1.0), "selection_bias_max": both(3.0, 1.0), "selection_bias_std": both(1.5, 0.5),
    }  # fmt: skip


@pytest.fixture
def exported() -> tuple[TrainingMetrics, CollectorRegistry]:
    registry = CollectorRegistry()
    return TrainingMetrics(registry, run="first", worker="1"), registry


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"raymoe_{name}", WORKER | labels)


def test_a_train_record_sets_the_training_metrics(exported: tuple[TrainingMetrics, CollectorRegistry]) -> None:
    metrics, registry = exported
    metrics.observe(record(10))
    expected = {
        "training_step": 10, "training_loss": 4.5, "learning_rate": 0.003, "gradient_norm": 0.7,
        "tokens_total": 10_000, "tokens_per_second": 2000, "step_seconds_count": 1, "step_seconds_sum": 0.5,
        "all_to_all_bytes_total": 960_000, "skipped_steps_total": 0, "assignment_version": 3,
        "resident_bytes": 250.5 * 2**20, "worker_compute_seconds": 0.25, "worker_slowness_ratio": 2.5,
    }  # fmt: skip
    assert {name: value(registry, name) for name in expected} == expected
    assert value(registry, "load_cv", level="clusters") == 0.25
    assert value(registry, "load_max_violation", level="experts") == 1.0
    assert value(registry, "cluster_load_share", cluster="0") == 0.5  # mean over both layers
    assert value(registry, "step_seconds_bucket", le="0.25") == 0
    assert value(registry, "step_seconds_bucket", le="0.5") == 1


def test_counters_grow_by_the_steps_since_the_last_record(exported: tuple[TrainingMetrics, CollectorRegistry]) -> None:
    metrics, registry = exported
    metrics.observe(record(10))
    metrics.observe(record(14, a2a_bytes_per_token=10.0, skipped_steps=2))
    metrics.observe(record(15, skipped_steps=2))
    assert value(registry, "tokens_total") == 15_000
    assert value(registry, "all_to_all_bytes_total") == 960_000 + 40_000 + 96_000
    assert value(registry, "skipped_steps_total") == 2


def test_a_resumed_worker_counts_from_where_it_resumed(exported: tuple[TrainingMetrics, CollectorRegistry]) -> None:
    metrics, registry = exported
    metrics.observe(
        {"kind": "event", "step": 400, "name": "resumed", "skipped_steps": 5, "attempt": 3, "redone_steps": 7}
    )
    assert value(registry, "worker_group_attempt") == 3 and value(registry, "redone_steps") == 7
    metrics.observe(record(410, skipped_steps=6))
    assert value(registry, "tokens_total") == 10_000 and value(registry, "skipped_steps_total") == 1
    assert value(registry, "training_step") == 410


def test_validation_and_checkpoints(exported: tuple[TrainingMetrics, CollectorRegistry]) -> None:
    metrics, registry = exported
    metrics.observe({"kind": "validation", "step": 100, "loss": 3.25})
    metrics.observe({"kind": "event", "step": 101, "name": "checkpoint_completed", "checkpoint": 100, "seconds": 0.3})
    metrics.observe({"kind": "event", "step": 201, "name": "checkpoint_failed", "checkpoint": 200, "seconds": 9.0})
    assert value(registry, "validation_loss") == 3.25
    assert value(registry, "checkpoint_last_step") == 100
    assert value(registry, "checkpoint_seconds_count") == 1 and value(registry, "checkpoint_failures_total") == 1


def test_routing_is_exported_by_split_level_and_layer(exported: tuple[TrainingMetrics, CollectorRegistry]) -> None:
    metrics, registry = exported
    metrics.observe(record(10))
    metrics.observe({"kind": "validation", "step": 10, "loss": 3.25, **routing(forced=0.125)})
    for split, forced in (("training", 0.25), ("validation", 0.125)):
        assert value(registry, "bias_forced_share", split=split, level="clusters", layer="0") == forced
        assert value(registry, "bias_forced_share", split=split, level="experts", layer="1") == 0.5
        assert math.isnan(value(registry, "bias_forced_share", split=split, level="experts", layer="0") or 0)
        assert value(registry, "chosen_probability", split=split, level="clusters", layer="0") == 0.75
        assert value(registry, "router_entropy", split=split, level="clusters", layer="1") == 0.25
    biases = [
        value(registry, "selection_bias", statistic=s, level="clusters", layer="0") for s in ("min", "max", "std")
    ]
    assert biases == [-2.0, 3.0, 1.5]


@pytest.mark.parametrize("loss", [None, math.nan])
def test_a_loss_that_is_not_finite_is_nan(exported: tuple[TrainingMetrics, CollectorRegistry], loss: Any) -> None:
    metrics, registry = exported
    metrics.observe(record(10))
    metrics.observe(record(20, loss=loss, grad_norm=loss))
    for name in ("training_loss", "gradient_norm"):
        number = value(registry, name)
        assert number is not None and math.isnan(number)


def test_a_model_without_clusters_exports_none(exported: tuple[TrainingMetrics, CollectorRegistry]) -> None:
    metrics, registry = exported
    nothing = dict.fromkeys(("experts", "clusters", "workers"))
    measures = dict.fromkeys(routing(), {"experts": [0.5], "clusters": None})
    metrics.observe(record(10, load_cv=nothing, load_max_vio=nothing, load_clusters=[], **measures))
    assert value(registry, "router_entropy", split="training", level="experts", layer="0") == 0.5
    assert value(registry, "router_entropy", split="training", level="clusters", layer="0") is None
    assert value(registry, "load_cv", level="clusters") is None
    assert value(registry, "cluster_load_share", cluster="0") is None


def plan_record(what: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "plan", "step": 36, "name": what, **fields}


def applied(moves: int, sent: int, pause_ms: float, gain: float) -> dict[str, Any]:
    return plan_record("applied", plan={"expected_gain": gain}, moves=moves, bytes=sent, pause_ms=pause_ms)


def test_plans_are_counted_with_their_cost_and_gain(exported: tuple[TrainingMetrics, CollectorRegistry]) -> None:
    metrics, registry = exported
    for name in ("gain_expected", "gain_measured", "statistics_lag_steps"):
        assert math.isnan(value(registry, f"regroup_{name}") or 0)  # unknown is NaN, not 0
    assert value(registry, "regroup_last_plan_timestamp_seconds") == 0
    assert [value(registry, "regroup_plans_total", outcome=o) for o in ("made", "applied", "refused", "no_plan")] == [
        0
    ] * 4
    metrics.observe(plan_record("made", plan={"expected_gain": 0.5}, seconds=0.1, similarity=None))
    metrics.observe(applied(8, 1000, 40.0, 0.5))
    metrics.observe(applied(4, 500, 200.0, 0.25))
    metrics.observe(plan_record("no_plan", reason="nothing to gain: x", expected_gain=0.001))
    metrics.observe(plan_record("gain_measured", version=2, gain=-0.125))
    metrics.observe(plan_record("overlap_ended", version=2, probe=4.0))
    metrics.observe(plan_record("clusterer_restarted"))
    expected = {
        "moves_total": 12, "bytes_total": 1500, "pause_seconds_count": 2, "gain_expected": 0.25, "gain_measured": -0.125,
        "clusterer_restarts_total": 1,
    }  # fmt: skip
    assert {name: value(registry, f"regroup_{name}") for name in expected} == expected
    assert value(registry, "regroup_pause_seconds_sum") == pytest.approx(0.24)
    assert [value(registry, "regroup_plans_total", outcome=o) for o in ("made", "applied", "refused", "no_plan")] == [
        1,
        2,
        0,
        1,
    ]


def test_the_last_plan_has_a_timestamp(
    exported: tuple[TrainingMetrics, CollectorRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, registry = exported
    monkeypatch.setattr("time.time", lambda: 1234.5)
    metrics.observe(plan_record("refused", reason="late: 1", plan=None))
    assert value(registry, "regroup_last_plan_timestamp_seconds") == 0
    metrics.observe(applied(8, 1000, 40.0, 0.5))
    assert value(registry, "regroup_last_plan_timestamp_seconds") == 1234.5


def test_refusals_are_counted_by_reason(
    exported: tuple[TrainingMetrics, CollectorRegistry],
) -> None:
    metrics, registry = exported
    for reason in ("late: by 3", "late: by 4", "nothing moves", "malformed: late", "my own: 1", "", "Late: 1"):
        metrics.observe(plan_record("refused", reason=reason, plan=None))
    counts = {reason: value(registry, "regroup_refusals_total", reason=reason) for reason in REFUSALS}
    assert counts == dict.fromkeys(REFUSALS, 0) | {"late": 2, "nothing moves": 1, "malformed": 1, "other": 3}
    assert value(registry, "regroup_plans_total", outcome="refused") == 7


def test_totals_of_messages_are_exported_as_counters(exported: tuple[TrainingMetrics, CollectorRegistry]) -> None:
    """A total that decreases is a counter reset, which `rate` and `increase` of Prometheus account for."""
    metrics, registry = exported
    assert value(registry, "regroup_messages_merged_total") == value(registry, "regroup_messages_lost_total") == 0
    for merged, lost in ((2, 0), (5, 1), (5, 1), (1, 0), (4, 3)):
        metrics.observe(plan_record("messages", merged=merged, lost=lost))
        assert value(registry, "regroup_messages_merged_total") == merged
        assert value(registry, "regroup_messages_lost_total") == lost
    for refused, lag in ((3, 7), (1, None)):
        metrics.observe(plan_record("status", lag_steps=lag, refused_messages=refused))
    assert value(registry, "regroup_messages_refused_total") == 1
    assert math.isnan(value(registry, "regroup_statistics_lag_steps") or 0)
    metrics.observe(plan_record("status", lag_steps=4, refused_messages=1))
    assert value(registry, "regroup_statistics_lag_steps") == 4


@pytest.mark.parametrize("garbage", [None, "5", [1], {}, -1, math.nan, math.inf, 10**400])
def test_invalid_values_of_a_clusterer_count_nothing(
    exported: tuple[TrainingMetrics, CollectorRegistry], garbage: Any
) -> None:
    metrics, registry = exported
    metrics.observe(plan_record("status", lag_steps=3, refused_messages=2))
    metrics.observe(plan_record("status", lag_steps=garbage, refused_messages=garbage))
    metrics.observe(plan_record("gain_measured", version=1, gain=garbage))
    assert value(registry, "regroup_messages_refused_total") == 2


def test_other_kinds_of_records_change_nothing(exported: tuple[TrainingMetrics, CollectorRegistry]) -> None:
    metrics, registry = exported
    before = [sample for metric in registry.collect() for sample in metric.samples if "_created" not in sample.name]
    metrics.observe({"kind": "assignment", "step": 0})
    metrics.observe({"kind": "event", "step": 3, "name": "stopped"})
    metrics.observe({"kind": "plan", "step": 3, "name": "overlap_ended", "version": 1, "probe": 4.0})
    assert str(before) == str(
        [s for metric in registry.collect() for s in metric.samples if "_created" not in s.name]
    )  # NaN is unequal to itself


def test_every_metric_follows_the_conventions(exported: tuple[TrainingMetrics, CollectorRegistry]) -> None:
    """Each has the prefix, a help text and the labels of its worker. No label has a value for each expert."""
    metrics, registry = exported
    metrics.observe(record(10))
    families = list(registry.collect())
    assert len(families) == 39
    for family in families:
        assert family.name.startswith("raymoe_") and family.documentation.endswith(".")
        assert not family.name.endswith(("_ms", "_mb", "_mib"))  # base units
        for sample in family.samples:
            assert WORKER.items() <= sample.labels.items()
            assert sample.labels.keys() <= LABELS


def test_a_trunk_exports_its_totals() -> None:
    registry = CollectorRegistry()
    trunk = TrunkMetrics(registry, clusters=2)

    def rows(cluster: str, place: str) -> float | None:
        return registry.get_sample_value("raymoe_cluster_rows_total", {"cluster": cluster, "place": place})

    assert [rows(c, place) for c in "01" for place in PLACES] == [0] * 4  # `increase` needs the first 0
    for total in (100, 300):
        stats = ResidencyStats(50, 5, 4, 3, 2, 0.5, 2**20, (1,))
        trunk.update(
            running=2, waiting=1, kv_usage=0.25, rows={0: total, 1: 10}, remote_rows={0: total // 2},
            connected={0: 2, 1: 0}, residency=stats,
        )  # fmt: skip
        assert [rows(c, place) for c in "01" for place in PLACES] == [total / 2, total / 2, 10, 0]
    totals = {name: registry.get_sample_value(f"raymoe_offload_{name}_total") for name in ("hits", "misses", "loads", "failed_loads", "evictions", "stall_seconds")}  # fmt: skip
    assert totals == {"hits": 50, "misses": 5, "loads": 4, "failed_loads": 3, "evictions": 2, "stall_seconds": 0.5}
    assert registry.get_sample_value("raymoe_cluster_resident", {"cluster": "1"}) == 1
    assert registry.get_sample_value("raymoe_cluster_replicas_connected", {"cluster": "0"}) == 2


def test_registries_do_not_share() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    TrainingMetrics(first, run="first", worker="1").observe(record(10))
    TrainingMetrics(second, run="first", worker="1")
    assert value(first, "training_step") == 10 and value(second, "training_step") == 0


def test_prometheus_finds_and_scrapes_a_worker(
    exported: tuple[TrainingMetrics, CollectorRegistry], tmp_path: Path
) -> None:
    metrics, registry = exported
    port = serve(registry)
    path = tmp_path / "targets.json"
    write_targets(path, [("127.0.0.1", port, WORKER), ("fd00::1", 9, {"run": "first", "worker": "2"})])
    entries = json.loads(path.read_text())
    assert entries == [
        {"targets": [f"127.0.0.1:{port}"], "labels": {"job": "raymoe", "run": "first", "worker": "1"}},
        {"targets": ["[fd00::1]:9"], "labels": {"job": "raymoe", "run": "first", "worker": "2"}},
    ]
    metrics.observe(record(10))
    with urllib.request.urlopen(f"http://{entries[0]['targets'][0]}/metrics", timeout=10) as response:
        families = {family.name: family for family in text_string_to_metric_families(response.read().decode())}
    (sample,) = [s for s in families["raymoe_tokens"].samples if s.name == "raymoe_tokens_total"]
    assert sample.value == 10_000 and sample.labels == WORKER


def test_two_registries_are_served_on_two_ports() -> None:
    assert serve(CollectorRegistry()) != serve(CollectorRegistry())


def test_targets_are_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "targets.json"
    write_targets(path, [("127.0.0.1", 1, {})])

    def refuse(*_: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="read-only"):
        write_targets(path, [])
    assert json.loads(path.read_text())[0]["targets"] == ["127.0.0.1:1"] and list(tmp_path.iterdir()) == [path]


def test_importing_metrics_is_light() -> None:
    code = "import sys, raymoe.metrics; sys.exit(bool({'torch', 'ray', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
