"""Definitions of the dashboards: variables, rows and panels.

In an expression, `@loss` stands for the metric `raymoe_loss` with the matchers of the dashboard. `@api.x` selects the
metric `raymoe_x` of the API where several processes export that name. `build.py` resolves both in `raymoe.metrics`.
"""

from __future__ import annotations

from dataclasses import dataclass

Query = tuple[str, str]
"""An expression and the legend of its series."""


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    queries: tuple[Query, ...]
    note: str = ""
    """First sentences of the panel's description; the help texts of its metrics follow."""
    kind: str = "lines"
    """`lines`, `bars`, `stack`, or `stat` for the last value alone."""
    width: int = 8
    """Columns out of 24."""


@dataclass(frozen=True)
class Dashboard:
    title: str
    description: str
    label: str
    """Label that a variable selects, beside job and instance: `run` or `application`."""
    discovered_by: tuple[str, ...]
    """Metrics whose series provide the values of `job`. The first one also provides the values of `label`."""
    rows: dict[str, tuple[Panel, ...]]
    annotation: str = ""
    """Expression that is above 0 at times to mark in all panels."""
    all_value: str = ".+"
    """Matcher of the variable `label` when all values are selected."""


def stat(title: str, unit: str, expr: str, legend: str = "{{run}}", note: str = "") -> Panel:
    return Panel(title, unit, ((expr, legend),), note, "stat", 4)


def one(title: str, unit: str, expr: str, legend: str = "{{run}}", note: str = "", **how: object) -> Panel:
    return Panel(title, unit, ((expr, legend),), note, **how)  # type: ignore[arg-type]


def percentiles(title: str, name: str, by: str, legend: str, note: str = "", at: tuple[int, ...] = (50, 95, 99)) -> Panel:  # fmt: skip
    """Return a panel with percentiles of a histogram in seconds."""
    rate = f"sum by (le, {by}) (rate(@{name}_bucket[$__rate_interval]))"
    queries = tuple((f"histogram_quantile({p / 100:g}, {rate})", f"{legend} p{p}") for p in at)
    return Panel(title, "s", queries, note)


def per_second(name: str, by: str, how: str = "sum") -> str:
    return f"{how} by ({by}) (rate(@{name}[$__rate_interval]))"


def events(name: str, by: str = "run", how: str = "max", window: str = "$__rate_interval") -> str:
    return f"{how} by ({by}) (increase(@{name}[{window}]))"


SINCE = "Within the selected time range."
SHARES = one(
    "Token share by cluster", "percentunit", "max by (run, cluster) (@cluster_load_share)",
    "{{run}} cluster {{cluster}}", "A share near 1 indicates a collapsed router, a share of 0 a dead cluster.", kind="stack",
)  # fmt: skip
BY_LEVEL = "{{run}} {{split}} {{level}}"
UNSAVED = "max by (run) (@training_step) - max by (run) (@checkpoint_last_step)"
APPLIED = "max by (run) (changes(@assignment_version[$__rate_interval])) > 0"

TRAINING = Dashboard(
    "raymoe training",
    "Learning, expert balance, restarts and speed of training runs.",
    "run",
    ("training_step",),
    {
        "Overview": (
            stat("Step", "none", "max by (run) (@training_step)"),
            stat("Training loss", "none", "max by (run) (@training_loss)"),
            stat("Throughput", "cps", "max by (run) (@tokens_per_second)"),
            stat("Skipped steps in range", "none", events("skipped_steps_total", window="$__range"), note=SINCE),
            stat("Steps since last checkpoint", "none", UNSAVED),
            stat("Workers up", "none", 'sum by (run) (@up{run!=""})'),
        ),
        "Learning": (
            Panel(
                "Loss", "none",
                (("max by (run) (@training_loss) != 0", "{{run}} training"),
                 ("max by (run) (@validation_loss) != 0", "{{run}} validation")),
                "Values of 0, before the first loss is known, are omitted.", width=12,
            ),
            one("Learning rate", "sci", "max by (run) (@learning_rate)", width=6),
            one("Gradient norm", "none", "max by (run) (@gradient_norm)", width=6),
            one("Skipped steps", "none", events("skipped_steps_total"), kind="bars", width=12),
            one("Training tokens in range", "none", events("tokens_total", window="$__range"), note=SINCE, width=12),
        ),
        "Load balance": (
            one("Load: coefficient of variation", "none", "max by (run, level) (@load_cv)", "{{run}} {{level}}"),
            one("Load: maximum over mean", "percentunit", "max by (run, level) (@load_max_violation)", "{{run}} {{level}}"),
            SHARES,
        ),
        "Routing": (
            one("Choices forced by the selection bias", "percentunit", "max by (run, split, level) (@bias_forced_share)", BY_LEVEL, "The layer with the largest fraction.", width=6),
            one("Probability of the choices", "percentunit", "min by (run, split, level) (@chosen_probability)", BY_LEVEL, "The layer with the smallest value.", width=6),
            one("Router entropy", "percentunit", "avg by (run, split, level) (@router_entropy)", BY_LEVEL, "Averaged over layers. 100 % is an equal probability of all groups.", width=6),
            Panel(
                "Selection biases", "none",
                (('max by (run, level) (@selection_bias{statistic="max"})', "{{run}} {{level}} max"),
                 ('min by (run, level) (@selection_bias{statistic="min"})', "{{run}} {{level}} min")),
                "The largest and the smallest bias of all layers.", width=6,
            ),
        ),
        "Restarts": (
            one("Worker groups started", "none", "max by (run) (@worker_group_attempt)", note="Increases with each restart, after a failure or a change of the number of workers.", width=12),
            one("Steps repeated after the last restart", "none", "max by (run) (@redone_steps)", width=12),
        ),
        "Performance": (
            Panel(
                "Step time", "s",
                (("max by (run) (rate(@step_seconds_sum[$__rate_interval]) / rate(@step_seconds_count[$__rate_interval]))", "{{run}} mean"),
                 ("histogram_quantile(0.95, sum by (le, run) (rate(@step_seconds_bucket[$__rate_interval])))", "{{run}} p95")),
            ),
            one("Tokens per second", "cps", "max by (run) (@tokens_per_second)"),
            one("Expert parallelism: bytes sent", "Bps", per_second("all_to_all_bytes_total", "run", "max")),
            percentiles("Checkpoint duration", "checkpoint_seconds", "run", "{{run}}", at=(50, 95)),
            one("Steps since the newest checkpoint", "none", UNSAVED),
            one("Failed checkpoints", "none", events("checkpoint_failures_total"), kind="bars"),
            one("Worker memory", "bytes", "max by (run, worker) (@resident_bytes)", "{{run}} worker {{worker}}"),
            one("Worker compute time per step", "s", "max by (run, worker) (@worker_compute_seconds)", "{{run}} worker {{worker}}", "In each step all workers wait for the slowest one."),
            one("Worker slowness", "none", "max by (run, worker) (@worker_slowness_ratio)", "{{run}} worker {{worker}}", "A worker with more than 2 in two successive records is reported as a straggler in the run's events."),
        ),
    },
    APPLIED,
)  # fmt: skip

CLUSTERING = Dashboard(
    "raymoe clustering",
    "Plans of regrouping, their gain and their cost.",
    "run",
    ("training_step",),
    {
        "Overview": (
            stat("Assignment version", "none", "max by (run) (@assignment_version)"),
            stat("Time since the last plan", "dtdurations", "time() - max by (run) (@regroup_last_plan_timestamp_seconds > 0)", note="Empty before the first plan."),
            stat("Statistics lag", "none", "max by (run) (@regroup_statistics_lag_steps)", note="In steps."),
            stat("Plans applied in range", "none", events('regroup_plans_total{outcome="applied"}', window="$__range"), note=SINCE),
            stat("Experts moved in range", "none", events("regroup_moves_total", window="$__range"), note=SINCE),
            stat("Clusterer restarts in range", "none", events("regroup_clusterer_restarts_total", window="$__range"), note=SINCE),
        ),
        "Plans": (
            one("Plans by outcome", "none", events("regroup_plans_total", "run, outcome"), "{{run}} {{outcome}}", kind="bars"),
            one("Refusals by reason", "none", events("regroup_refusals_total", "run, reason"), "{{run}} {{reason}}", kind="bars"),
            one("Experts moved", "none", events("regroup_moves_total"), kind="bars"),
        ),
        "Gain": (
            Panel(
                "Expected and measured gain", "none",
                (("max by (run) (@regroup_gain_expected)", "{{run}} expected"),
                 ("max by (run) (@regroup_gain_measured)", "{{run}} measured")),
            ),
            one("Load variation between clusters", "none", 'max by (run) (@load_cv{level="clusters"})'),
            SHARES,
        ),
        "Cost": (
            percentiles("Pause to apply a plan", "regroup_pause_seconds", "run", "{{run}}", at=(50, 95)),
            one("Fraction of time paused", "percentunit", per_second("regroup_pause_seconds_sum", "run", "max")),
            one("Bytes sent to apply plans", "bytes", events("regroup_bytes_total"), kind="bars"),
        ),
        "Clusterer": (
            one("Statistics lag by run", "none", "max by (run) (@regroup_statistics_lag_steps)", note="In steps."),
            Panel(
                "Messages merged, lost and refused", "none",
                ((events("regroup_messages_merged_total", how="sum"), "{{run}} merged"),
                 (events("regroup_messages_lost_total", how="sum"), "{{run}} lost"),
                 (events("regroup_messages_refused_total"), "{{run}} refused")),
                "Merged messages lose no data, because messages carry totals.", "bars",
            ),
            one("Clusterer restarts", "none", events("regroup_clusterer_restarts_total"), kind="bars"),
        ),
    },
    APPLIED,
)  # fmt: skip

APPLICATION = "{{application}}"
CLUSTER = "{{application}} cluster {{cluster}}"
DEPLOYMENT = "{{application}} {{deployment}}"
BY_CLUSTER = "application, cluster"
FAILED = " / ".join(
    events(of, "application", "sum", "$__range")
    for of in ('request_success_total{finished_reason="error"}', "request_success_total")
)
ROWS = "sum by (application, cluster) (rate(@cluster_rows_total[$__rate_interval]))"
IMBALANCE = f"max by (application) ({ROWS}) / avg by (application) ({ROWS}) - 1"
REPLICAS = "max by (application, deployment) (@ray_serve_autoscaling_target_replicas)"
HEALTHY = "sum by (application, deployment) (max by (application, deployment, replica) (@ray_serve_deployment_replica_healthy))"

SERVING = Dashboard(
    "raymoe serving",
    "Latency, throughput and errors of the API, and load of clusters and their replicas.",
    "application",
    ("num_requests_waiting", "ray_serve_deployment_replica_healthy"),
    {
        "Overview": (
            stat("Requests in progress", "none", "sum by (application) (@api.num_requests_running)", APPLICATION),
            stat("Requests in queue", "none", "sum by (application) (@num_requests_waiting)", APPLICATION),
            stat("Time to first token, p95", "s", f"histogram_quantile(0.95, {per_second('time_to_first_token_seconds_bucket', 'le, application')})", APPLICATION),
            stat("Output tokens per second", "cps", per_second("generation_tokens_total", "application"), APPLICATION),
            stat("Failed completions", "percentunit", FAILED, APPLICATION, SINCE),
            stat("Resumed completions", "none", events("request_resumes_total", "application", "sum", "$__range"), APPLICATION, SINCE),
        ),
        "Latency and throughput": (
            percentiles("Time to first token", "time_to_first_token_seconds", "application", APPLICATION),
            percentiles("Inter-token latency", "inter_token_latency_seconds", "application", APPLICATION),
            percentiles("End-to-end request latency", "e2e_request_latency_seconds", "application", APPLICATION),
            one("Completions by finish reason", "reqps", per_second("request_success_total", "application, finished_reason"), "{{application}} {{finished_reason}}", kind="stack"),
            one("Rejected requests by reason", "reqps", per_second("requests_rejected_total", "application, reason"), "{{application}} {{reason}}", kind="stack"),
            one("Completions resumed by another trunk", "none", events("request_resumes_total", "application", "sum"), APPLICATION, kind="bars"),
            Panel(
                "Requests running and waiting", "none",
                (("sum by (application) (@trunk.num_requests_running)", "{{application}} running"),
                 ("sum by (application) (@num_requests_waiting)", "{{application}} waiting"),
                 ("sum by (application) (@api.num_requests_running)", "{{application}} at the API")),
            ),
            Panel(
                "Prompt and output tokens per second", "cps",
                ((per_second("prompt_tokens_total", "application"), "{{application}} prompt"),
                 (per_second("generation_tokens_total", "application"), "{{application}} output")),
            ),
            one("KV cache usage", "percentunit", "max by (application, instance) (@kv_cache_usage_perc)", "{{application}} {{instance}}", note="One series for each trunk."),
        ),
        "Clusters": (
            one("Rows by cluster and place", "cps", per_second("cluster_rows_total", "application, cluster, place"), "{{application}} cluster {{cluster}} {{place}}", kind="stack"),
            one("Rows computed by cluster replicas", "cps", per_second("cluster_replica_rows_total", BY_CLUSTER), CLUSTER),
            one("Cluster imbalance", "none", IMBALANCE, APPLICATION, "Rows of the busiest cluster relative to the mean of all clusters, minus 1."),
            percentiles("Replica call latency", "cluster_call_seconds", BY_CLUSTER, CLUSTER, "Measured at the trunk.", (50, 99)),
            percentiles("Replica compute time", "cluster_compute_seconds", BY_CLUSTER, CLUSTER, "The rest of a call's latency is transport.", (50, 99)),
            one("Retried calls", "cps", per_second("cluster_call_retries_total", BY_CLUSTER), CLUSTER),
            one("Connected replicas", "none", "min by (application, cluster) (@cluster_replicas_connected)", CLUSTER, "Minimum over the trunks."),
            one("Trunks with the cluster resident", "none", "sum by (application, cluster) (@cluster_resident)", CLUSTER),
            one("Weights in cluster replicas", "bytes", "sum by (application, cluster) (@cluster_resident_bytes)", CLUSTER, "Sum over all replicas of a cluster."),
        ),
        "Offloading": (
            Panel(
                "Residency hits and misses", "cps",
                ((per_second("offload_hits_total", "application"), "{{application}} hits"),
                 (per_second("offload_misses_total", "application"), "{{application}} misses")),
            ),
            Panel(
                "Cluster loads and evictions", "cps",
                ((per_second("offload_loads_total", "application"), "{{application}} loaded"),
                 (per_second("offload_failed_loads_total", "application"), "{{application}} failed"),
                 (per_second("offload_evictions_total", "application"), "{{application}} evicted")),
            ),
            one("Fraction of time stalled", "percentunit", per_second("offload_stall_seconds_total", "application, instance"), "{{application}} {{instance}}", note="Sum over all threads of a trunk, so that it may exceed 1."),
            one("Resident weights in trunks", "bytes", "max by (application, instance) (@offload_resident_bytes)", "{{application}} {{instance}}", width=24),
        ),
        "Ray Serve replicas": (
            one("Target replicas", "none", REPLICAS, DEPLOYMENT),
            one("Healthy replicas", "none", HEALTHY, DEPLOYMENT),
            one("Processes up", "none", 'sum by (application, deployment) (@up{deployment!=""})', DEPLOYMENT, "Scrape targets that raymoe lists for Prometheus."),
        ),
    },
    all_value=".*",
)  # fmt: skip

DASHBOARDS = {"training": TRAINING, "clustering": CLUSTERING, "serving": SERVING}
