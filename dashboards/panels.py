"""What the dashboards show: for each, its variables and rows of panels.

In an expression `@loss` is the metric `raymoe_loss` with the dashboard's own matchers; `@api.x` is the one of two
metrics `raymoe_x` that the api exports. `build.py` looks both up in `raymoe.metrics`.
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
    """Comes before the help texts of the metrics in the panel's description."""
    kind: str = "lines"
    """`lines`, `bars`, `stack` or `stat`: the last value alone."""
    width: int = 8
    """Of 24."""


@dataclass(frozen=True)
class Dashboard:
    title: str
    description: str
    label: str
    """What is chosen, beside job and instance: runs or applications."""
    known_by: tuple[str, ...]
    """Metrics whose series list the jobs; those of the first list the values of `label`."""
    rows: dict[str, tuple[Panel, ...]]
    marks: str = ""
    """An expression that is above 0 when something to mark in all panels happened."""
    every: str = ".+"
    """What the variable `label` matches when all are chosen."""


def stat(title: str, unit: str, expr: str, legend: str = "{{run}}", note: str = "") -> Panel:
    return Panel(title, unit, ((expr, legend),), note, "stat", 4)


def one(title: str, unit: str, expr: str, legend: str = "{{run}}", note: str = "", **how: object) -> Panel:
    return Panel(title, unit, ((expr, legend),), note, **how)  # type: ignore[arg-type]


def percentiles(title: str, name: str, by: str, legend: str, note: str = "", at: tuple[int, ...] = (50, 95, 99)) -> Panel:  # fmt: skip
    """Of a histogram in seconds."""
    rate = f"sum by (le, {by}) (rate(@{name}_bucket[$__rate_interval]))"
    queries = tuple((f"histogram_quantile({p / 100:g}, {rate})", f"{legend} p{p}") for p in at)
    return Panel(title, "s", queries, note)


def per_second(name: str, by: str, how: str = "sum") -> str:
    return f"{how} by ({by}) (rate(@{name}[$__rate_interval]))"


def events(name: str, by: str = "run", how: str = "max", window: str = "$__rate_interval") -> str:
    return f"{how} by ({by}) (increase(@{name}[{window}]))"


SINCE = "In the time shown."
SHARES = one(
    "Clusters' shares of the tokens", "percentunit", "max by (run, cluster) (@cluster_load_share)",
    "{{run}} cluster {{cluster}}", "One share near 1 is a collapsed router, one at 0 a dead cluster.", kind="stack",
)  # fmt: skip
BEHIND = "max by (run) (@training_step) - max by (run) (@checkpoint_last_step)"
APPLIED = "max by (run) (changes(@assignment_version[$__rate_interval])) > 0"

TRAINING = Dashboard(
    "raymoe training",
    "Whether a run learns, whether its experts are balanced, and what is slow.",
    "run",
    ("training_step",),
    {
        "Now": (
            stat("Step", "none", "max by (run) (@training_step)"),
            stat("Loss now", "none", "max by (run) (@training_loss)"),
            stat("Speed now", "cps", "max by (run) (@tokens_per_second)"),
            stat("Steps skipped", "none", events("skipped_steps_total", window="$__range"), note=SINCE),
            stat("Steps not yet in a checkpoint", "none", BEHIND),
            stat("Workers that answer", "none", 'sum by (run) (@up{run!=""})'),
        ),
        "Is it learning?": (
            Panel(
                "Loss", "none",
                (("max by (run) (@training_loss) != 0", "{{run}} training"),
                 ("max by (run) (@validation_loss) != 0", "{{run}} validation")),
                "0, before a loss is known, is left out.", width=12,
            ),
            one("Learning rate", "sci", "max by (run) (@learning_rate)", width=6),
            one("Gradient norm", "none", "max by (run) (@gradient_norm)", width=6),
            one("Skipped steps", "none", events("skipped_steps_total"), kind="bars", width=12),
            one("Tokens seen", "none", events("tokens_total", window="$__range"), note=SINCE, width=12),
        ),
        "Is it balanced?": (
            one("Load's coefficient of variation", "none", "max by (run, level) (@load_cv)", "{{run}} {{level}}"),
            one("Load's maximum over the mean", "percentunit", "max by (run, level) (@load_max_violation)", "{{run}} {{level}}"),
            SHARES,
        ),
        "Does it stay up?": (
            one("Worker groups so far", "none", "max by (run) (@worker_group_attempt)", note="One more after each restart: a change of the workers' number, or a failure.", width=12),
            one("Steps redone by the last restart", "none", "max by (run) (@redone_steps)", width=12),
        ),
        "What is slow?": (
            Panel(
                "Step time", "s",
                (("max by (run) (rate(@step_seconds_sum[$__rate_interval]) / rate(@step_seconds_count[$__rate_interval]))", "{{run}} mean"),
                 ("histogram_quantile(0.95, sum by (le, run) (rate(@step_seconds_bucket[$__rate_interval])))", "{{run}} p95")),
            ),
            one("Tokens per second", "cps", "max by (run) (@tokens_per_second)"),
            one("Sent by expert parallelism", "Bps", per_second("all_to_all_bytes_total", "run", "max")),
            percentiles("Time to write a checkpoint", "checkpoint_seconds", "run", "{{run}}", at=(50, 95)),
            one("Steps since the newest checkpoint", "none", BEHIND),
            one("Checkpoints that failed", "none", events("checkpoint_failures_total"), kind="bars"),
            one("Memory of the workers", "bytes", "max by (run, worker) (@resident_bytes)", "{{run}} worker {{worker}}"),
            one("Time that workers compute by themselves", "s", "max by (run, worker) (@worker_compute_seconds)", "{{run}} worker {{worker}}", "The others wait for the slowest in each step."),
            one("Slowness of workers", "none", "max by (run, worker) (@worker_slowness_ratio)", "{{run}} worker {{worker}}", "Above 2 in two records in a row, a worker is named in the run's events."),
        ),
    },
    APPLIED,
)  # fmt: skip

CLUSTERING = Dashboard(
    "raymoe clustering",
    "What regrouping did to a run's experts, what it cost and what it gained.",
    "run",
    ("training_step",),
    {
        "Now": (
            stat("Assignment's version", "none", "max by (run) (@assignment_version)"),
            stat("Age of the last plan", "dtdurations", "time() - max by (run) (@regroup_last_plan_timestamp_seconds > 0)", note="Nothing before the first."),
            stat("Statistics are behind by", "none", "max by (run) (@regroup_statistics_lag_steps)"),
            stat("Plans applied", "none", events('regroup_plans_total{outcome="applied"}', window="$__range"), note=SINCE),
            stat("Experts that moved", "none", events("regroup_moves_total", window="$__range"), note=SINCE),
            stat("Clusterer lost its statistics", "none", events("regroup_clusterer_restarts_total", window="$__range"), note=SINCE),
        ),
        "What did it do?": (
            one("Plans by outcome", "none", events("regroup_plans_total", "run, outcome"), "{{run}} {{outcome}}", kind="bars"),
            one("Refusals by reason", "none", events("regroup_refusals_total", "run, reason"), "{{run}} {{reason}}", kind="bars"),
            one("Experts moved", "none", events("regroup_moves_total"), kind="bars"),
        ),
        "What did it gain?": (
            Panel(
                "Gain expected and seen", "none",
                (("max by (run) (@regroup_gain_expected)", "{{run}} expected"),
                 ("max by (run) (@regroup_gain_seen)", "{{run}} seen")),
            ),
            one("Load between clusters", "none", 'max by (run) (@load_cv{level="clusters"})'),
            SHARES,
        ),
        "What did it cost?": (
            percentiles("Pause for a plan", "regroup_pause_seconds", "run", "{{run}}", at=(50, 95)),
            one("Share of the time paused", "percentunit", per_second("regroup_pause_seconds_sum", "run", "max")),
            one("Sent to apply plans", "bytes", events("regroup_bytes_total"), kind="bars"),
        ),
        "Does the clusterer keep up?": (
            one("Lag of the statistics", "none", "max by (run) (@regroup_statistics_lag_steps)", note="In steps."),
            Panel(
                "Messages not taken one by one", "none",
                ((events("regroup_messages_merged_total", how="sum"), "{{run}} merged"),
                 (events("regroup_messages_lost_total", how="sum"), "{{run}} lost"),
                 (events("regroup_messages_refused_total"), "{{run}} refused")),
                "Merged ones cost nothing: messages carry totals.", "bars",
            ),
            one("Clusterer's restarts", "none", events("regroup_clusterer_restarts_total"), kind="bars"),
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
REPLICAS = "max by (application, deployment) (@ray_serve_autoscaling_target_replicas)"
HEALTHY = "sum by (application, deployment) (max by (application, deployment, replica) (@ray_serve_deployment_replica_healthy))"

SERVING = Dashboard(
    "raymoe serving",
    "What users feel, and what clusters of experts and their replicas do for it.",
    "application",
    ("num_requests_waiting", "ray_serve_deployment_replica_healthy"),
    {
        "Now": (
            stat("Answers under way", "none", "sum by (application) (@api.num_requests_running)", APPLICATION),
            stat("Requests waiting", "none", "sum by (application) (@num_requests_waiting)", APPLICATION),
            stat("First token, p95", "s", f"histogram_quantile(0.95, {per_second('time_to_first_token_seconds_bucket', 'le, application')})", APPLICATION),
            stat("Tokens written per second", "cps", per_second("generation_tokens_total", "application"), APPLICATION),
            stat("Answers that failed", "percentunit", FAILED, APPLICATION, SINCE),
            stat("Answers resumed", "none", events("request_resumes_total", "application", "sum", "$__range"), APPLICATION, SINCE),
        ),
        "What do users feel?": (
            percentiles("Time to first token", "time_to_first_token_seconds", "application", APPLICATION),
            percentiles("Time between tokens", "inter_token_latency_seconds", "application", APPLICATION),
            percentiles("Time to the whole answer", "e2e_request_latency_seconds", "application", APPLICATION),
            one("Answers by how they ended", "reqps", per_second("request_success_total", "application, finished_reason"), "{{application}} {{finished_reason}}", kind="stack"),
            one("Requests turned away, by reason", "reqps", per_second("requests_rejected_total", "application, reason"), "{{application}} {{reason}}", kind="stack"),
            one("Resumes", "none", events("request_resumes_total", "application", "sum"), APPLICATION, kind="bars"),
            Panel(
                "Requests running and waiting", "none",
                (("sum by (application) (@trunk.num_requests_running)", "{{application}} computed"),
                 ("sum by (application) (@num_requests_waiting)", "{{application}} waiting"),
                 ("sum by (application) (@api.num_requests_running)", "{{application}} at the api")),
            ),
            Panel(
                "Tokens read and written per second", "cps",
                ((per_second("prompt_tokens_total", "application"), "{{application}} prompts"),
                 (per_second("generation_tokens_total", "application"), "{{application}} answers")),
            ),
            one("KV cache in use", "percentunit", "max by (application, instance) (@kv_cache_usage_perc)", "{{application}} {{instance}}", note="Of each trunk."),
        ),
        "What do the clusters do?": (
            one("Rows by cluster and place", "cps", per_second("cluster_rows_total", "application, cluster, place"), "{{application}} cluster {{cluster}} {{place}}", kind="stack"),
            one("Rows computed by replicas", "cps", per_second("cluster_replica_rows_total", BY_CLUSTER), CLUSTER),
            one("Imbalance", "none", "max by (application) (@cluster_imbalance_ratio)", APPLICATION),
            percentiles("Time of a call to a replica", "cluster_call_seconds", BY_CLUSTER, CLUSTER, "As the trunk sees it.", (50, 99)),
            percentiles("Time that a replica computes", "cluster_compute_seconds", BY_CLUSTER, CLUSTER, "The rest of a call's time is the way there and back.", (50, 99)),
            one("Calls retried", "cps", per_second("cluster_call_retries_total", BY_CLUSTER), CLUSTER),
            one("Replicas connected", "none", "min by (application, cluster) (@cluster_replicas_connected)", CLUSTER, "Of the trunk that has the fewest."),
            one("Trunks that hold the cluster", "none", "sum by (application, cluster) (@cluster_resident)", CLUSTER),
            one("Weights in replicas", "bytes", "sum by (application, cluster) (@cluster_resident_bytes)", CLUSTER, "Of all replicas of a cluster together."),
        ),
        "Does offloading keep up?": (
            Panel(
                "Uses of clusters that were resident", "cps",
                ((per_second("offload_hits_total", "application"), "{{application}} hits"),
                 (per_second("offload_misses_total", "application"), "{{application}} misses")),
            ),
            Panel(
                "Loads and evictions", "cps",
                ((per_second("offload_loads_total", "application"), "{{application}} loaded"),
                 (per_second("offload_failed_loads_total", "application"), "{{application}} failed"),
                 (per_second("offload_evictions_total", "application"), "{{application}} evicted")),
            ),
            one("Share of the time stalled", "percentunit", per_second("offload_stall_seconds_total", "application, instance"), "{{application}} {{instance}}", note="Steps of all threads of a trunk together: may be above 1."),
            one("Weights resident in trunks", "bytes", "max by (application, instance) (@offload_resident_bytes)", "{{application}} {{instance}}", width=24),
        ),
        "Does Ray Serve keep the replicas up?": (
            one("Replicas wanted", "none", REPLICAS, DEPLOYMENT),
            one("Replicas that are healthy", "none", HEALTHY, DEPLOYMENT),
            one("Processes that answer", "none", 'sum by (application, deployment) (@up{deployment!=""})', DEPLOYMENT, "Those that raymoe lists for Prometheus."),
        ),
    },
    every=".*",
)  # fmt: skip

DASHBOARDS = {"training": TRAINING, "clustering": CLUSTERING, "serving": SERVING}
