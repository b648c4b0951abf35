"""Every Prometheus metric declared once: `raymoe_` names, base units, a label `cluster` but never one for experts.

A worker has a registry of its own. What is true of the whole run is exported alike by all of its
workers: take `max by (run)` of it, not the sum. Prometheus finds workers through a file of targets.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.metrics import MetricWrapperBase

M = TypeVar("M", bound=MetricWrapperBase)

LEVELS = ("experts", "clusters", "workers")
"""Where load is measured: values of the label `level`."""

PLAN_OUTCOMES = ("made", "applied", "refused", "none")
"""What became of plans, or of looking for one: values of the label `outcome`."""

REFUSALS = (
    "malformed", "already applied", "stale", "late", "busy", "sizes", "nothing moves", "too many moves",
    "unknown experts", "unknown clusters", "other",
)  # fmt: skip
"""Why plans are refused: values of the label `reason`."""

STEP_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PAUSE_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
CHECKPOINT_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class TrainingMetrics:
    """What a training worker exports. All carry the labels `run` and `worker`, its rank."""

    def __init__(self, registry: CollectorRegistry, *, run: str, worker: str) -> None:
        self._own = {"run": run, "worker": worker}
        self._registry = registry
        self._rank = int(worker)
        self._seen_step = 0
        self._seen_skipped = 0
        self._totals: dict[Counter, float] = {}
        declare = self._declare
        self.step = declare(Gauge, "training_step", "Optimizer steps done.")
        self.loss = declare(Gauge, "training_loss", "Mean training loss since the last record, nats per token.")
        self.validation_loss = declare(Gauge, "validation_loss", "Loss of the last validation, nats per token.")
        self.learning_rate = declare(Gauge, "learning_rate", "Learning rate of the last step.")
        self.gradient_norm = declare(Gauge, "gradient_norm", "Global gradient norm of the last step, before clipping.")
        self.tokens = declare(Counter, "tokens", "Tokens that the run trained on.")
        self.tokens_per_second = declare(Gauge, "tokens_per_second", "Tokens per second of the run.")
        self.step_seconds = declare(
            Histogram, "step_seconds", "Mean time of a step, once a record.", buckets=STEP_SECONDS
        )
        self.all_to_all_bytes = declare(
            Counter, "all_to_all_bytes", "Bytes sent between workers by expert parallelism."
        )
        self.skipped_steps = declare(Counter, "skipped_steps", "Steps without a finite loss and gradient.")
        self.load_cv = declare(Gauge, "load_cv", "Load's std / mean, averaged over layers.", "level")
        self.load_max_violation = declare(
            Gauge, "load_max_violation", "Load's max / mean - 1, averaged over layers.", "level"
        )
        self.cluster_load_share = declare(
            Gauge, "cluster_load_share", "A cluster's share of the tokens, averaged over layers.", "cluster"
        )
        self.assignment_version = declare(Gauge, "assignment_version", "Version of the assignment in force.")
        self.checkpoint_seconds = declare(
            Histogram,
            "checkpoint_seconds",
            "Time from a checkpoint's begin to its manifest.",
            buckets=CHECKPOINT_SECONDS,
        )
        self.checkpoint_last_step = declare(Gauge, "checkpoint_last_step", "Step of the newest checkpoint.")
        self.checkpoint_failures = declare(Counter, "checkpoint_failures", "Checkpoints that could not be written.")
        self.resident_bytes = declare(Gauge, "resident_bytes", "Resident memory of the worker.")
        self.regroup_plans = declare(
            Counter, "regroup_plans", "Plans made, applied and refused; none where one was looked for.", "outcome"
        )
        self.regroup_refusals = declare(Counter, "regroup_refusals", "Plans refused, by reason.", "reason")
        self.regroup_moves = declare(Counter, "regroup_moves", "Experts that plans moved to another cluster.")
        self.regroup_bytes = declare(Counter, "regroup_bytes", "Bytes that all workers sent to apply plans.")
        self.regroup_pause_seconds = declare(
            Histogram, "regroup_pause_seconds", "Time that applying a plan stopped training.", buckets=PAUSE_SECONDS
        )
        self.regroup_last_plan = declare(
            Gauge, "regroup_last_plan_timestamp_seconds", "When the last plan was applied, Unix time; 0 before one."
        )
        self.regroup_lag = declare(
            Gauge, "regroup_statistics_lag_steps", "Steps by which the clusterer's statistics are behind; NaN if none."
        )
        self.regroup_gain_expected = declare(
            Gauge, "regroup_gain_expected", "Rise of the objective that the last applied plan expected."
        )
        self.regroup_gain_seen = declare(
            Gauge, "regroup_gain_seen", "Rise of the objective by an applied plan, from statistics since."
        )
        self.regroup_messages_merged = declare(
            Counter, "regroup_messages_merged", "Statistics of this worker merged into its next message."
        )
        self.regroup_messages_lost = declare(
            Counter, "regroup_messages_lost", "Messages of this worker that the clusterer did not take."
        )
        self.regroup_messages_refused = declare(
            Counter, "regroup_messages_refused", "Messages that the clusterer refused as malformed."
        )
        self.regroup_clusterer_restarts = declare(
            Counter, "regroup_clusterer_restarts", "Times that a clusterer answered which had lost its statistics."
        )
        for gauge in (self.regroup_lag, self.regroup_gain_expected, self.regroup_gain_seen):
            gauge.set(math.nan)  # nothing yet, and at workers other than 0, so that `max` takes no 0 of theirs
        for outcome in PLAN_OUTCOMES:  # a series that is not there before its first event hides that event
            self.regroup_plans.labels(**self._own, outcome=outcome)
        for reason in REFUSALS:
            self.regroup_refusals.labels(**self._own, reason=reason)

    def _declare(self, kind: type[M], name: str, help: str, *labels: str, **options: Any) -> M:
        """A metric of this worker; one with `labels` of its own is still to be given them, by `_labelled`."""
        names = (*self._own, *labels)
        metric = kind(name, help, names, namespace="raymoe", registry=self._registry, **options)
        return metric if labels else metric.labels(**self._own)

    def _labelled(self, gauge: Gauge, label: str, values: Mapping[str, float | None]) -> None:
        for value, number in values.items():
            if number is not None:
                gauge.labels(**self._own, **{label: value}).set(number)

    def observe(self, record: Mapping[str, Any]) -> None:
        """Take in a record of `metrics.jsonl`. Kinds other than train, validation, event and plan are ignored.

        Counters count what this process saw: an event `resumed` sets the step from which they do.
        """
        if record["kind"] == "train":
            self._train(record)
        elif record["kind"] == "validation":
            self.validation_loss.set(_number(record["loss"]))
        elif record["kind"] == "event":
            self._event(record)
        elif record["kind"] == "plan":
            self._plan(record)

    def _train(self, record: Mapping[str, Any]) -> None:
        seconds = record["step_ms"] / 1000
        steps = max(0, record["step"] - self._seen_step)
        tokens = steps * record["tokens_per_s"] * seconds
        self._seen_step = record["step"]
        self.step.set(record["step"])
        self.loss.set(_number(record["loss"]))
        self.learning_rate.set(record["lr"])
        self.gradient_norm.set(_number(record["grad_norm"]))
        self.tokens.inc(round(tokens))
        self.tokens_per_second.set(record["tokens_per_s"])
        self.step_seconds.observe(seconds)
        self.all_to_all_bytes.inc(round(tokens * record["a2a_bytes_per_token"]))
        self.skipped_steps.inc(max(0, record["skipped_steps"] - self._seen_skipped))
        self._seen_skipped = record["skipped_steps"]
        self._labelled(self.load_cv, "level", record["load_cv"])
        self._labelled(self.load_max_violation, "level", record["load_max_vio"])
        layers = record["load_clusters"]
        shares = {str(c): math.fsum(column) / len(layers) for c, column in enumerate(zip(*layers, strict=True))}
        self._labelled(self.cluster_load_share, "cluster", shares)
        self.assignment_version.set(record["version"])
        self.resident_bytes.set(record["rss_mb"][self._rank] * 2**20)

    def _event(self, record: Mapping[str, Any]) -> None:
        if record["what"] == "resumed":
            self._seen_step = record["step"]
            self._seen_skipped = record.get("skipped_steps", 0)
        elif record["what"] == "checkpoint":
            self.checkpoint_seconds.observe(record["seconds"])
            self.checkpoint_last_step.set(record["checkpoint"])
        elif record["what"] == "checkpoint failed":
            self.checkpoint_failures.inc()

    def _plan(self, record: Mapping[str, Any]) -> None:
        """What the clusterer said is not trusted: what is no number sets NaN and counts nothing."""
        what = record["what"]
        if what in PLAN_OUTCOMES:
            self.regroup_plans.labels(**self._own, outcome=what).inc()
        if what == "applied":
            self.regroup_moves.inc(record["moves"])
            self.regroup_bytes.inc(record["bytes"])
            self.regroup_pause_seconds.observe(record["pause_ms"] / 1000)
            self.regroup_last_plan.set_to_current_time()
            self.regroup_gain_expected.set(_number(record["plan"]["expected_gain"]))
        elif what == "refused":
            key = record["reason"].split(":")[0]
            self.regroup_refusals.labels(**self._own, reason=key if key in REFUSALS else "other").inc()
        elif what == "seen":
            self.regroup_gain_seen.set(_number(record["gain"]))
        elif what == "messages":
            self._grow(self.regroup_messages_merged, record["merged"])
            self._grow(self.regroup_messages_lost, record["lost"])
        elif what == "status":
            self.regroup_lag.set(_number(record["lag_steps"]))
            self._grow(self.regroup_messages_refused, record["refused_messages"])
        elif what == "clusterer restarted":
            self.regroup_clusterer_restarts.inc()

    def _grow(self, counter: Counter, total: Any) -> None:
        """Count what `total` has grown by since it was last given; a smaller one has begun anew from 0."""
        total, seen = _number(total), self._totals.get(counter, 0.0)
        if 0 <= total < math.inf:
            counter.inc(total - seen if total >= seen else total)
            self._totals[counter] = total


def _number(value: Any) -> float:
    """NaN for JSON's null, a loss that was not finite, and for all else that is no number."""
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan


def serve(registry: CollectorRegistry, host: str = "127.0.0.1") -> int:
    """Answer Prometheus on a free port of `host` from a daemon thread; returns the port."""
    server, _ = start_http_server(0, addr=host, registry=registry)
    return server.server_port


def write_targets(path: Path, targets: Iterable[tuple[str, int, Mapping[str, str]]]) -> None:
    """Write (host, port, labels) of each worker for Prometheus's file-based discovery, by atomic rename."""
    entries = [
        {"targets": [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"], "labels": {"job": "raymoe", **labels}}
        for host, port, labels in targets
    ]
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(entries, indent=1))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
