"""Metrics of a training worker, from the records of its run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from raymoe.metrics.registry import Metrics, to_number

PLAN_OUTCOMES = ("made", "applied", "refused", "no_plan")
"""Values of the label `outcome`: the results of planning."""

REFUSALS = (
    "malformed", "already applied", "stale", "late", "busy", "sizes", "nothing moves", "too many moves",
    "unknown experts", "unknown clusters", "other",
)  # fmt: skip
"""Values of the label `reason`: why plans are refused."""

STEP_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PAUSE_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
CHECKPOINT_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class TrainingMetrics(Metrics):
    """Metrics of a training worker. All of them carry the labels `run` and `worker`, its rank."""

    def __init__(self, registry: CollectorRegistry, *, run: str, worker: str) -> None:
        super().__init__(registry, {"run": run, "worker": worker})
        self._rank = int(worker)
        self._last_step = 0
        self._last_skipped = 0
        self._declare_progress()
        self._declare_balance()
        self._declare_routing()
        self._declare_workers()
        self._declare_regrouping()

    def _declare_progress(self) -> None:
        declare = self._declare
        self.step = declare(Gauge, "training_step", "Optimizer steps completed.")
        self.loss = declare(Gauge, "training_loss", "Mean training loss since the last record, nats per token.")
        self.validation_loss = declare(Gauge, "validation_loss", "Loss of the last validation, nats per token.")
        self.learning_rate = declare(Gauge, "learning_rate", "Learning rate of the last step.")
        self.gradient_norm = declare(Gauge, "gradient_norm", "Global gradient norm of the last step, before clipping.")
        self.tokens = declare(Counter, "tokens", "Tokens that the run trained on.")
        self.tokens_per_second = declare(Gauge, "tokens_per_second", "Tokens per second of the run.")
        self.step_seconds = declare(
            Histogram, "step_seconds", "Mean time of a step, observed once a record.", buckets=STEP_SECONDS
        )
        self.all_to_all_bytes = declare(
            Counter, "all_to_all_bytes", "Bytes sent between workers by expert parallelism."
        )
        self.skipped_steps = declare(Counter, "skipped_steps", "Steps without a finite loss and gradient.")
        self.checkpoint_seconds = declare(
            Histogram, "checkpoint_seconds", "Time from the start of a checkpoint to its manifest.",
            buckets=CHECKPOINT_SECONDS,
        )  # fmt: skip
        self.checkpoint_last_step = declare(Gauge, "checkpoint_last_step", "Step of the newest checkpoint.")
        self.checkpoint_failures = declare(Counter, "checkpoint_failures", "Checkpoints that could not be written.")

    def _declare_balance(self) -> None:
        declare = self._declare
        self.load_cv = declare(
            Gauge, "load_cv", "Coefficient of variation of the load (std / mean), averaged over layers.", "level"
        )
        self.load_max_violation = declare(
            Gauge, "load_max_violation", "Largest load relative to the mean (max / mean - 1), averaged over layers.",
            "level",
        )  # fmt: skip
        self.cluster_load_share = declare(
            Gauge, "cluster_load_share", "Fraction of the tokens that a cluster gets, averaged over layers.", "cluster"
        )
        self.assignment_version = declare(Gauge, "assignment_version", "Version of the current assignment.")

    def _declare_routing(self) -> None:
        declare, labels = self._declare, ("split", "level", "layer")
        self.bias_forced_share = declare(
            Gauge, "bias_forced_share",
            "Fraction of the choices of a router that its selection bias forces, in the last logged step or validation.",
            *labels,
        )  # fmt: skip
        self.chosen_probability = declare(
            Gauge, "chosen_probability", "Mean probability of the chosen groups, without selection bias.", *labels
        )
        self.router_entropy = declare(
            Gauge, "router_entropy", "Mean entropy of a router, relative to that of equal probabilities.", *labels
        )
        self.selection_bias = declare(
            Gauge, "selection_bias", "Selection biases of a router in logits: min, max or std.",
            "statistic", "level", "layer",
        )  # fmt: skip

    def _declare_workers(self) -> None:
        declare = self._declare
        self.attempt = declare(
            Gauge, "worker_group_attempt", "Worker groups that the run has started, including the current one."
        )
        self.attempt.set(1)
        self.redone_steps = declare(Gauge, "redone_steps", "Steps that the last restart had to repeat.")
        self.resident_bytes = declare(Gauge, "resident_bytes", "Resident memory of the worker.")
        self.worker_compute_seconds = declare(
            Gauge, "worker_compute_seconds", "Mean time of a step without communication, on a CPU."
        )
        self.worker_slowness = declare(
            Gauge, "worker_slowness_ratio", "Compute time of the worker relative to the median of the other workers."
        )
        self.worker_slowness.set(math.nan)

    def _declare_regrouping(self) -> None:
        declare = self._declare
        self.regroup_plans = declare(
            Counter, "regroup_plans", "Plans made, applied and refused, and searches that found no plan.", "outcome"
        )
        self.regroup_refusals = declare(Counter, "regroup_refusals", "Plans refused, by reason.", "reason")
        self.regroup_moves = declare(Counter, "regroup_moves", "Experts that plans moved to another cluster.")
        self.regroup_bytes = declare(Counter, "regroup_bytes", "Bytes that all workers sent to apply plans.")
        self.regroup_pause_seconds = declare(
            Histogram, "regroup_pause_seconds", "Time for which applying a plan stopped training.",
            buckets=PAUSE_SECONDS,
        )  # fmt: skip
        self.regroup_last_plan = declare(
            Gauge, "regroup_last_plan_timestamp_seconds", "Unix time at which the last plan was applied; 0 before it."
        )
        self.regroup_lag = declare(
            Gauge, "regroup_statistics_lag_steps", "Steps by which the clusterer's statistics lag; NaN if unknown."
        )
        self.regroup_gain_expected = declare(
            Gauge, "regroup_gain_expected", "Increase of the objective that the last applied plan predicted."
        )
        self.regroup_gain_measured = declare(
            Gauge, "regroup_gain_measured", "Increase of the objective that was measured after a plan was applied."
        )
        self.regroup_clusterer_restarts = declare(
            Counter, "regroup_clusterer_restarts", "Times that the clusterer restarted and lost its statistics."
        )
        totals = self._declare_totals
        self.regroup_messages_merged = totals(
            "regroup_messages_merged", "Statistics of this worker that were merged into its next message."
        )
        self.regroup_messages_lost = totals(
            "regroup_messages_lost", "Messages of this worker that the clusterer did not receive."
        )
        self.regroup_messages_refused = totals(
            "regroup_messages_refused", "Messages that the clusterer refused as malformed."
        )
        for gauge in (self.regroup_lag, self.regroup_gain_expected, self.regroup_gain_measured):
            gauge.set(math.nan)  # unknown, and NaN at workers other than 0, so that `max` ignores them
        for outcome in PLAN_OUTCOMES:  # without an initial 0, `increase` misses the first event of a series
            self.regroup_plans.labels(**self._own, outcome=outcome)
        for reason in REFUSALS:
            self.regroup_refusals.labels(**self._own, reason=reason)

    def observe(self, record: Mapping[str, Any]) -> None:
        """Update the metrics from a record of `metrics.jsonl` or `plans.jsonl`. Other kinds of records are ignored.

        Counters count the events of this process. An event `resumed` sets the step from which they count.
        """
        if record["kind"] == "train":
            self._observe_train(record)
        elif record["kind"] == "validation":
            self.validation_loss.set(to_number(record["loss"]))
            self._observe_routing(record)
        elif record["kind"] == "event":
            self._observe_event(record)
        elif record["kind"] == "plan":
            self._observe_plan(record)

    def _observe_train(self, record: Mapping[str, Any]) -> None:
        seconds = record["step_ms"] / 1000
        steps = max(0, record["step"] - self._last_step)
        tokens = steps * record["tokens_per_s"] * seconds
        self._last_step = record["step"]
        self.step.set(record["step"])
        self.loss.set(to_number(record["loss"]))
        self.learning_rate.set(record["lr"])
        self.gradient_norm.set(to_number(record["grad_norm"]))
        self.tokens.inc(round(tokens))
        self.tokens_per_second.set(record["tokens_per_s"])
        self.step_seconds.observe(seconds)
        self.all_to_all_bytes.inc(round(tokens * record["a2a_bytes_per_token"]))
        self.skipped_steps.inc(max(0, record["skipped_steps"] - self._last_skipped))
        self._last_skipped = record["skipped_steps"]
        self._set_labeled(self.load_cv, "level", record["load_cv"])
        self._set_labeled(self.load_max_violation, "level", record["load_max_vio"])
        self._observe_routing(record)
        layers = record["load_clusters"]
        shares = {str(c): math.fsum(column) / len(layers) for c, column in enumerate(zip(*layers, strict=True))}
        self._set_labeled(self.cluster_load_share, "cluster", shares)
        self.assignment_version.set(record["version"])
        self.resident_bytes.set(record["rss_mb"][self._rank] * 2**20)
        self.worker_compute_seconds.set(record["compute_ms"][self._rank] / 1000)
        self.worker_slowness.set(to_number(record["slowness"][self._rank]))

    def _observe_routing(self, record: Mapping[str, Any]) -> None:
        split = "training" if record["kind"] == "train" else "validation"
        for name, gauge in (
            ("bias_forced_share", self.bias_forced_share),
            ("chosen_probability", self.chosen_probability),
            ("router_entropy", self.router_entropy),
        ):
            self._set_by_layer(gauge, record.get(name), split=split)
        for statistic in ("min", "max", "std"):
            self._set_by_layer(self.selection_bias, record.get(f"selection_bias_{statistic}"), statistic=statistic)

    def _set_by_layer(
        self, gauge: Gauge, levels: Mapping[str, Sequence[float | None] | None] | None, **labels: str
    ) -> None:
        for level, values in (levels or {}).items():
            for layer, number in enumerate(values or ()):
                gauge.labels(**self._own, **labels, level=level, layer=str(layer)).set(to_number(number))

    def _set_labeled(self, gauge: Gauge, label: str, values: Mapping[str, float | None]) -> None:
        for value, number in values.items():
            if number is not None:
                gauge.labels(**self._own, **{label: value}).set(number)

    def _observe_event(self, record: Mapping[str, Any]) -> None:
        if record["name"] in ("resumed", "restarted"):
            self._last_step = record["step"]
            self._last_skipped = record.get("skipped_steps", 0)
            self.attempt.set(record["attempt"])
            self.redone_steps.set(record["redone_steps"])
        elif record["name"] == "checkpoint_completed":
            self.checkpoint_seconds.observe(record["seconds"])
            self.checkpoint_last_step.set(record["checkpoint"])
        elif record["name"] == "checkpoint_failed":
            self.checkpoint_failures.inc()

    def _observe_plan(self, record: Mapping[str, Any]) -> None:
        """Values from the clusterer are not trusted: a value that is not a number sets NaN and counts nothing."""
        name = record["name"]
        if name in PLAN_OUTCOMES:
            self.regroup_plans.labels(**self._own, outcome=name).inc()
        if name == "applied":
            self.regroup_moves.inc(record["moves"])
            self.regroup_bytes.inc(record["bytes"])
            self.regroup_pause_seconds.observe(record["pause_ms"] / 1000)
            self.regroup_last_plan.set_to_current_time()
            self.regroup_gain_expected.set(to_number(record["plan"]["expected_gain"]))
        elif name == "refused":
            key = record["reason"].split(":")[0]
            self.regroup_refusals.labels(**self._own, reason=key if key in REFUSALS else "other").inc()
        elif name == "gain_measured":
            self.regroup_gain_measured.set(to_number(record["gain"]))
        elif name == "messages":
            self.regroup_messages_merged.set(record["merged"])
            self.regroup_messages_lost.set(record["lost"])
        elif name == "status":
            self.regroup_lag.set(to_number(record["lag_steps"]))
            self.regroup_messages_refused.set(record["refused_messages"])
        elif name == "clusterer_restarted":
            self.regroup_clusterer_restarts.inc()
