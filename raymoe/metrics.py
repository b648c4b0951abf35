"""Every Prometheus metric declared once: `raymoe_` names, base units, a label `cluster` but never one for experts.

A worker has a registry of its own. What is true of the whole run is exported alike by all of its
workers: take `max by (run)` of it, not the sum. Prometheus finds workers through a file of targets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.metrics import MetricWrapperBase

M = TypeVar("M", bound=MetricWrapperBase)

LEVELS = ("experts", "clusters", "workers")
"""Where load is measured: values of the label `level`."""

PLAN_OUTCOMES = ("made", "applied", "refused", "no_plan")
"""What became of plans, or of looking for one: values of the label `outcome`."""

REFUSALS = (
    "malformed", "already applied", "stale", "late", "busy", "sizes", "nothing moves", "too many moves",
    "unknown experts", "unknown clusters", "other",
)  # fmt: skip
"""Why plans are refused: values of the label `reason`."""

STEP_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PAUSE_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
CALL_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
CHECKPOINT_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

FINISHES = ("stop", "length", "abort", "error")
"""How answers end: values of the label `finished_reason`."""

REJECTIONS = ("full", "unavailable", "too_long", "malformed", "unauthorized", "unknown_model")
"""Why HTTP requests are turned away before an answer begins: values of the label `reason`."""

# Those of vLLM, so that its dashboards and ours can be laid side by side.
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
INTER_TOKEN_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip


class _Metrics:
    """Metrics of one process in a registry; all carry the labels `own`."""

    def __init__(self, registry: CollectorRegistry, own: Mapping[str, str]) -> None:
        self.registry = registry
        self._own = dict(own)

    def _declare(self, kind: type[M], name: str, help: str, *labels: str, **options: Any) -> M:
        """A metric of this process; one with `labels` of its own is still to be given them, beside `_own`."""
        names = (*self._own, *labels)
        metric = kind(name, help, names, namespace="raymoe", registry=self.registry, **options)
        return metric if labels or not self._own else metric.labels(**self._own)


class TrainingMetrics(_Metrics):
    """What a training worker exports. All carry the labels `run` and `worker`, its rank."""

    def __init__(self, registry: CollectorRegistry, *, run: str, worker: str) -> None:
        super().__init__(registry, {"run": run, "worker": worker})
        self._rank = int(worker)
        self._seen_step = 0
        self._seen_skipped = 0
        self._totals = _Totals()
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
        self.attempt = declare(Gauge, "worker_group_attempt", "Worker groups that the run has had, this one included.")
        self.attempt.set(1)
        self.redone_steps = declare(Gauge, "redone_steps", "Steps that the last restart had to do again.")
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
        self.worker_compute_seconds = declare(
            Gauge, "worker_compute_seconds", "Mean time of a step that the worker computes by itself, on a CPU."
        )
        self.worker_slowness = declare(
            Gauge, "worker_slowness_ratio", "The worker's own time for a micro-batch, of the median of the others'."
        )
        self.worker_slowness.set(math.nan)
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
        self.worker_compute_seconds.set(record["compute_ms"][self._rank] / 1000)
        self.worker_slowness.set(_number(record["slowness"][self._rank]))

    def _event(self, record: Mapping[str, Any]) -> None:
        if record["name"] in ("resumed", "restarted"):
            self._seen_step = record["step"]
            self._seen_skipped = record.get("skipped_steps", 0)
            self.attempt.set(record["attempt"])
            self.redone_steps.set(record["redone_steps"])
        elif record["name"] == "checkpoint_completed":
            self.checkpoint_seconds.observe(record["seconds"])
            self.checkpoint_last_step.set(record["checkpoint"])
        elif record["name"] == "checkpoint_failed":
            self.checkpoint_failures.inc()

    def _plan(self, record: Mapping[str, Any]) -> None:
        """What the clusterer said is not trusted: what is no number sets NaN and counts nothing."""
        name = record["name"]
        if name in PLAN_OUTCOMES:
            self.regroup_plans.labels(**self._own, outcome=name).inc()
        if name == "applied":
            self.regroup_moves.inc(record["moves"])
            self.regroup_bytes.inc(record["bytes"])
            self.regroup_pause_seconds.observe(record["pause_ms"] / 1000)
            self.regroup_last_plan.set_to_current_time()
            self.regroup_gain_expected.set(_number(record["plan"]["expected_gain"]))
        elif name == "refused":
            key = record["reason"].split(":")[0]
            self.regroup_refusals.labels(**self._own, reason=key if key in REFUSALS else "other").inc()
        elif name == "gain_measured":
            self.regroup_gain_seen.set(_number(record["gain"]))
        elif name == "messages":
            self._totals.grow(self.regroup_messages_merged, record["merged"])
            self._totals.grow(self.regroup_messages_lost, record["lost"])
        elif name == "status":
            self.regroup_lag.set(_number(record["lag_steps"]))
            self._totals.grow(self.regroup_messages_refused, record["refused_messages"])
        elif name == "clusterer_restarted":
            self.regroup_clusterer_restarts.inc()


class TrunkMetrics(_Metrics):
    """What a trunk of a serving application exports. The label `cluster` is a cluster of all layers."""

    PLACES = ("resident", "away")
    """Whether rows were of a cluster that was resident or of another: values of the label `place`."""

    def __init__(
        self, registry: CollectorRegistry, *, clusters: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(registry, {})
        declare, self._totals, self._recent = self._declare, _Totals(), _Recent(clock)
        self.running = declare(Gauge, "num_requests_running", "Requests that are computed.")
        self.waiting = declare(Gauge, "num_requests_waiting", "Requests that wait to be computed.")
        self.kv_usage = declare(Gauge, "kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.")
        self.cluster_rows = declare(
            Counter, "cluster_rows", "Rows of a cluster, computed here or at replicas.", "cluster", "place"
        )
        self.cluster_call_seconds = declare(
            Histogram, "cluster_call_seconds", "Time from a call to a replica to its answer.", "cluster", buckets=CALL_SECONDS
        )  # fmt: skip
        self.cluster_retries = declare(
            Counter, "cluster_call_retries", "Calls that a replica did not answer, computed elsewhere.", "cluster"
        )
        self.cluster_connected = declare(
            Gauge, "cluster_replicas_connected", "Replicas of a cluster that this trunk can ask.", "cluster"
        )
        self.cluster_resident = declare(Gauge, "cluster_resident", "Whether a cluster is resident: 1 or 0.", "cluster")
        self.imbalance = declare(
            Gauge, "cluster_imbalance_ratio", "Of clusters by rows of the last minutes: (max - mean) / mean."
        )
        self.resident_bytes = declare(Gauge, "offload_resident_bytes", "Weights of clusters that are resident.")
        self.hits = declare(Counter, "offload_hits", "Uses of a cluster that was resident.")
        self.misses = declare(Counter, "offload_misses", "Uses of a cluster that was not.")
        self.loads = declare(Counter, "offload_loads", "Clusters loaded.")
        self.failed_loads = declare(Counter, "offload_failed_loads", "Loads that failed.")
        self.evictions = declare(Counter, "offload_evictions", "Clusters whose memory was given back.")
        self.stall = declare(Counter, "offload_stall_seconds", "Time that steps waited for a load.")
        for c in map(str, range(clusters)):  # a series that is not there before its first event hides that event
            self.cluster_call_seconds.labels(c)
            self.cluster_retries.labels(c)
            for place in self.PLACES:
                self.cluster_rows.labels(c, place)

    def observe_call(self, cluster: int, what: str, seconds: float) -> None:
        """A `call` that was answered, or a `retry`: one that was not."""
        if what == "call":
            self.cluster_call_seconds.labels(str(cluster)).observe(seconds)
        else:
            self.cluster_retries.labels(str(cluster)).inc()

    def update(
        self, *, running: int, waiting: int, kv_usage: float, rows: Mapping[int, int], away: Mapping[int, int],
        connected: Mapping[int, int], residency: Any,
    ) -> None:  # fmt: skip
        """Take in the totals so far. residency: a `ResidencyStats`."""
        self.running.set(running)
        self.waiting.set(waiting)
        self.kv_usage.set(kv_usage)
        for c, n in rows.items():
            self._totals.grow(self.cluster_rows.labels(str(c), "away"), away.get(c, 0))
            self._totals.grow(self.cluster_rows.labels(str(c), "resident"), n - away.get(c, 0))
        for c, n in connected.items():
            self.cluster_connected.labels(str(c)).set(n)
            self.cluster_resident.labels(str(c)).set(c in residency.resident)
        recent = self._recent.of(rows)
        mean = sum(recent.values()) / max(1, len(connected))
        if mean:
            self.imbalance.set(max(recent.values()) / mean - 1)
        self.resident_bytes.set(residency.resident_bytes)
        for counter, total in (
            (self.hits, residency.hits), (self.misses, residency.misses), (self.loads, residency.loads),
            (self.failed_loads, residency.failed), (self.evictions, residency.evictions), (self.stall, residency.stall_s),
        ):  # fmt: skip
            self._totals.grow(counter, total)


class ClusterMetrics(_Metrics):
    """What a replica of a cluster exports. All carry the label `cluster`."""

    def __init__(self, registry: CollectorRegistry, *, cluster: str) -> None:
        super().__init__(registry, {"cluster": cluster})
        declare = self._declare
        self.rows = declare(Counter, "cluster_replica_rows", "Rows that this replica computed.")
        self.compute_seconds = declare(
            Histogram, "cluster_compute_seconds", "Time to compute a call.", buckets=CALL_SECONDS
        )
        self.resident_bytes = declare(Gauge, "cluster_resident_bytes", "Weights of the cluster in this replica.")


class ApiMetrics(_Metrics):
    """What a process that answers HTTP requests exports, under vLLM's suffixes. All carry the label `model_name`.

    An HTTP request that asks for several answers counts as several requests, once they are begun.
    """

    def __init__(self, registry: CollectorRegistry, *, model: str) -> None:
        super().__init__(registry, {"model_name": model})
        declare = self._declare
        self.time_to_first_token = declare(
            Histogram,
            "time_to_first_token_seconds",
            "Time from a request's arrival to the first token of an answer.",
            buckets=FIRST_TOKEN_SECONDS,
        )
        self.inter_token_latency = declare(
            Histogram,
            "inter_token_latency_seconds",
            "Time from a token of an answer to its next.",
            buckets=INTER_TOKEN_SECONDS,
        )
        self.e2e_request_latency = declare(
            Histogram,
            "e2e_request_latency_seconds",
            "Time from a request's arrival to the end of an answer.",
            buckets=REQUEST_SECONDS,
        )
        self.prompt_tokens = declare(Counter, "prompt_tokens", "Tokens of prompts whose answers began.")
        self.generation_tokens = declare(Counter, "generation_tokens", "Tokens of answers.")
        self.requests_running = declare(
            Gauge, "num_requests_running", "Answers that this process waits for or passes on."
        )
        self.resumes = declare(
            Counter, "request_resumes", "Times that an answer went on elsewhere after its engine was lost."
        )
        finished = declare(Counter, "request_success", "Answers that ended, by how.", "finished_reason")
        rejected = declare(Counter, "requests_rejected", "HTTP requests turned away, by why.", "reason")
        self.finished = {how: finished.labels(**self._own, finished_reason=how) for how in FINISHES}
        self.rejected = {why: rejected.labels(**self._own, reason=why) for why in REJECTIONS}


class _Recent:
    """Totals that others count, where what is older counts less."""

    HALF_LIFE_S = 60.0

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._at = clock, clock()
        self._seen: dict[int, int] = {}
        self._recent: dict[int, float] = {}

    def of(self, totals: Mapping[int, int]) -> dict[int, float]:
        now = self._clock()
        fade = 0.5 ** ((now - self._at) / self.HALF_LIFE_S)
        self._recent = {c: fade * self._recent.get(c, 0) + n - self._seen.get(c, 0) for c, n in totals.items()}
        self._at, self._seen = now, dict(totals)
        return self._recent


class _Totals:
    """Counters that follow totals which others count."""

    def __init__(self) -> None:
        self._seen: dict[Counter, float] = {}

    def grow(self, counter: Counter, total: Any) -> None:
        """Count what `total` has grown by since it was last given; a smaller one has begun anew from 0."""
        total, seen = _number(total), self._seen.get(counter, 0.0)
        if 0 <= total < math.inf:
            counter.inc(total - seen if total >= seen else total)
            self._seen[counter] = total


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
