"""Alert rules of Prometheus. In an expression, `@loss` stands for the metric `raymoe_loss`, as in `panels.py`.

Each rule has a test in `alerts_test.yml` with series that fire it and series that do not.
The durations suit runs of hours and days. A run of minutes ends before most of the rules can fire.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Alert:
    name: str
    severity: str
    """`critical`: act now. `warning`: act today. `info`: no action required."""
    wait: str
    """Time for which the expression must hold before the alert fires."""
    expr: str
    summary: str
    description: str


RUN = "Run {{ $labels.run }}"
APPLICATION = "Application {{ $labels.application }}"
VALUE = "{{ $value | humanize }}"
PERCENT = "{{ $value | humanizePercentage }}"

TRAINING = (
    Alert(
        "RaymoeLossNotFinite", "critical", "2m",
        "max by (run) (@training_loss) != max by (run) (@training_loss)",
        f"{RUN} has no finite loss",
        "The mean loss since the last record is not a number. The run stops after several successive steps without a finite loss. Lower train.lr, or resume from an earlier checkpoint.",
    ),
    Alert(
        "RaymoeStepsSkipped", "warning", "0m",
        "max by (run) (increase(@skipped_steps_total[10m])) > 3",
        f"{RUN} skips steps",
        f"{VALUE} steps in 10 minutes had no finite loss or gradient and were skipped.",
    ),
    Alert(
        "RaymoeTrainingStalled", "critical", "1m",
        "max by (run) (changes(@training_step[15m])) == 0 and max by (run) (@training_step offset 15m) >= 0",
        f"{RUN} has stalled",
        "Its workers are up, but no step has been recorded for 15 minutes.",
    ),
    Alert(
        "RaymoeRouterCollapse", "critical", "10m",
        """max by (run, cluster) (@cluster_load_share) > 0.9
        and on (run) count by (run) (max by (run, cluster) (@cluster_load_share)) > 1""",
        "The router of run {{ $labels.run }} has collapsed",
        f"Cluster {{{{ $labels.cluster }}}} gets {PERCENT} of the tokens.",
    ),
    Alert(
        "RaymoeExpertsCollapse", "critical", "10m",
        'max by (run) (@load_cv{level="experts"}) > 2',
        "Experts of run {{ $labels.run }} have collapsed",
        f"The coefficient of variation of the expert load is {VALUE}. A value of 2 corresponds to one expert in five with load.",
    ),
    Alert(
        "RaymoeLoadImbalance", "warning", "15m",
        'max by (run) (@load_max_violation{level="workers"}) > 0.5',
        "Workers of run {{ $labels.run }} are unevenly loaded",
        f"The busiest worker computes {PERCENT} more than the mean. The other workers wait for it in each step.",
    ),
    Alert(
        "RaymoeStraggler", "warning", "10m",
        "max by (run, worker) (@worker_slowness_ratio) > 2",
        "Worker {{ $labels.worker }} of run {{ $labels.run }} is slow",
        f"It computes {VALUE} times as long as the other workers, which wait for it in each step. Check its node.",
    ),
    Alert(
        "RaymoeRestartsOften", "warning", "0m",
        "delta(max by (run) (@worker_group_attempt)[30m:1m]) > 3",
        f"{RUN} restarts repeatedly",
        "Its workers were started more than three times in 30 minutes. See failures.json and the events in metrics.jsonl.",
    ),
    Alert(
        "RaymoeDeadCluster", "warning", "10m",
        "max by (run, cluster) (@cluster_load_share) < 0.001",
        "Cluster {{ $labels.cluster }} of run {{ $labels.run }} is dead",
        f"It gets {PERCENT} of the tokens, and its experts are not trained.",
    ),
    Alert(
        "RaymoeCheckpointOld", "warning", "5m",
        """max by (run) (increase(@checkpoint_seconds_count[1h])) == 0
        and delta(max by (run) (@training_step > 0)[1h:1m]) > 0
        and max by (run) (@training_step offset 1h) >= 0""",
        f"{RUN} writes no checkpoints",
        "The run has no new checkpoint for an hour, and a failure would lose that work. Check for checkpoint failures, or lower checkpoint.every.",
    ),
    Alert(
        "RaymoeCheckpointFailed", "critical", "0m",
        "max by (run) (increase(@checkpoint_failures_total[30m])) > 0",
        f"{RUN} could not write a checkpoint",
        "Training continues until the next checkpoint. Check whether the disk under run.root is full.",
    ),
)  # fmt: skip

CLUSTERING = (
    Alert(
        "RaymoeStatisticsLate", "warning", "10m",
        "max by (run) (@regroup_statistics_lag_steps) > 100",
        "The clusterer of run {{ $labels.run }} is overloaded",
        f"Its statistics lag by {VALUE} steps, so that its plans are too late and are refused. Raise regroup.stats_every, or reserve a CPU for it.",
    ),
    Alert(
        "RaymoeRegroupingStalled", "warning", "0m",
        """max by (run) (increase(@regroup_plans_total{outcome=~"made|no_plan"}[1h])) == 0
        and max by (run) (max_over_time(@regroup_plans_total{outcome=~"made|no_plan"}[1d])) > 0
        and delta(max by (run) (@training_step > 0)[1h:1m]) > 600""",
        f"{RUN} no longer searches for plans",
        "It trained for more than 600 steps in the last hour without a search for a plan, unlike before. Check the clusterer in Ray's list of actors.",
    ),
    Alert(
        "RaymoePlansNotApplied", "warning", "0m",
        """max by (run) (increase(@regroup_plans_total{outcome="made"}[1h])) > 2
        and max by (run) (increase(@regroup_plans_total{outcome="applied"}[1h])) == 0
        and time() - max by (run) (@regroup_last_plan_timestamp_seconds) > 3600""",
        f"{RUN} makes plans but applies none",
        f"The run made {VALUE} plans in the last hour and applied none of them. See raymoe_regroup_refusals_total for the reasons.",
    ),
    Alert(
        "RaymoeClustererRestarts", "warning", "0m",
        "max by (run) (increase(@regroup_clusterer_restarts_total[1h])) > 2",
        "The clusterer of run {{ $labels.run }} restarts repeatedly",
        f"It lost its statistics {VALUE} times in an hour. Training continues; regrouping waits for new statistics each time.",
    ),
)  # fmt: skip

ROWS = "sum by (application, cluster) (rate(@cluster_rows_total[5m]))"

SERVING = (
    Alert(
        "RaymoeQueueLong", "warning", "5m",
        """sum by (application) (@num_requests_waiting) > 8
        and sum by (application) (@num_requests_waiting) > sum by (application) (@trunk.num_requests_running)""",
        f"{APPLICATION} has a long queue",
        f"{VALUE} requests wait, more than the engine computes. Add trunks, or replicas of the busiest clusters.",
    ),
    Alert(
        "RaymoeErrors", "critical", "5m",
        """sum by (application) (rate(@request_success_total{finished_reason="error"}[5m]))
        / sum by (application) (rate(@request_success_total[5m])) > 0.01""",
        f"{APPLICATION} fails requests",
        f"{PERCENT} of the completions ended in an error.",
    ),
    Alert(
        "RaymoeRejections", "warning", "5m",
        """sum by (application) (rate(@requests_rejected_total{reason=~"full|unavailable"}[5m]))
        / (sum by (application) (rate(@requests_rejected_total[5m]))
            + sum by (application) (rate(@request_success_total[5m]))) > 0.05""",
        f"{APPLICATION} rejects requests",
        f"{PERCENT} of the requests were rejected because the queue was full or no trunk was available. Add trunks.",
    ),
    Alert(
        "RaymoeClusterRetries", "warning", "5m",
        """sum by (application, cluster) (rate(@cluster_call_retries_total[5m]))
        / (sum by (application, cluster) (rate(@cluster_call_retries_total[5m]))
            + sum by (application, cluster) (rate(@cluster_call_seconds_count[5m]))) > 0.01""",
        "Replicas of cluster {{ $labels.cluster }} of {{ $labels.application }} do not respond",
        f"{PERCENT} of the calls were retried elsewhere. Completions are correct but slower.",
    ),
    Alert(
        "RaymoeClusterLoadsFailed", "critical", "0m",
        "sum by (application) (increase(@offload_failed_loads_total[10m])) > 0",
        f"{APPLICATION} cannot load clusters",
        f"{VALUE} loads failed in 10 minutes. Check that the artifact exists and is intact, and that memory is free.",
    ),
    Alert(
        "RaymoeServingImbalance", "info", "30m",
        f"max by (application) ({ROWS}) / avg by (application) ({ROWS}) - 1 > 2",
        "Clusters of {{ $labels.application }} are unevenly used",
        "The busiest cluster gets more than three times the mean number of rows. Add replicas of it.",
    ),
    Alert(
        "RaymoeUnusedCluster", "info", "0m",
        """sum by (application, cluster) (increase(@cluster_rows_total[1h])) == 0
        and on (application) sum by (application) (increase(@cluster_rows_total[1h])) > 10000""",
        "Cluster {{ $labels.cluster }} of {{ $labels.application }} is not used",
        "It got no rows in an hour in which the application computed more than 10,000. The cluster is dead, or no request needs it.",
    ),
)  # fmt: skip

PROCESSES = (
    Alert(
        "RaymoeTargetDown", "critical", "2m",
        '@up{job="raymoe"} == 0 and on (run, application) max by (run, application) (@up{job="raymoe"}) == 1',
        "{{ $labels.instance }} is down",
        "A process of {{ $labels.run }}{{ $labels.application }} cannot be scraped while others of it can.",
    ),
    Alert(
        "RaymoeGone", "warning", "2m",
        """max by (run, application) (@up{job="raymoe"}) == 0
        and max by (run, application) (max_over_time(@up{job="raymoe"}[15m])) == 1""",
        "{{ $labels.run }}{{ $labels.application }} is down",
        "None of its processes can be scraped, and it did not remove its scrape targets: it was killed, or its nodes failed. The alert resolves 15 minutes after the last successful scrape.",
    ),
)  # fmt: skip

GROUPS = {"training": TRAINING, "clustering": CLUSTERING, "serving": SERVING, "processes": PROCESSES}
