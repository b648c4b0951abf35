"""What Prometheus warns of. In an expression `@loss` is the metric `raymoe_loss`, looked up as in `panels.py`.

Each rule has a test in `alerts_test.yml`: fires where it should, after its wait, and nowhere else.
Durations suit runs of hours and days; a run of minutes ends before most of these can fire.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Alert:
    name: str
    severity: str
    """`critical`: act now. `warning`: look today. `info`: worth knowing."""
    wait: str
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
        "The mean loss since the last record is not a number. The run ends by itself after steps without a finite one in a row; lower train.lr, or resume from an earlier checkpoint.",
    ),
    Alert(
        "RaymoeStepsSkipped", "warning", "0m",
        "max by (run) (increase(@skipped_steps_total[10m])) > 3",
        f"{RUN} skips steps",
        f"{VALUE} steps in 10 minutes had no finite loss or gradient and changed nothing.",
    ),
    Alert(
        "RaymoeTrainingStalled", "critical", "1m",
        "max by (run) (changes(@training_step[15m])) == 0 and max by (run) (@training_step offset 15m) >= 0",
        f"{RUN} makes no steps",
        "Its workers answer, but no step has been recorded for 15 minutes.",
    ),
    Alert(
        "RaymoeRouterCollapse", "critical", "10m",
        """max by (run, cluster) (@cluster_load_share) > 0.9
        and on (run) count by (run) (max by (run, cluster) (@cluster_load_share)) > 1""",
        "The router of run {{ $labels.run }} has collapsed",
        f"Cluster {{{{ $labels.cluster }}}} takes {PERCENT} of the tokens.",
    ),
    Alert(
        "RaymoeExpertsCollapse", "critical", "10m",
        'max by (run) (@load_cv{level="experts"}) > 2',
        "Few experts of run {{ $labels.run }} do all the work",
        f"The coefficient of variation of their load is {VALUE}; at 2 it is as if a fifth of them worked.",
    ),
    Alert(
        "RaymoeLoadImbalance", "warning", "15m",
        'max by (run) (@load_max_violation{level="workers"}) > 0.5',
        "Workers of run {{ $labels.run }} are unevenly loaded",
        f"The busiest worker computes {PERCENT} more than the mean, and the others wait for it in each step.",
    ),
    Alert(
        "RaymoeSlowWorker", "warning", "10m",
        "max by (run, worker) (@worker_slowness_ratio) > 2",
        "Worker {{ $labels.worker }} of run {{ $labels.run }} is slow",
        f"It computes {VALUE} times as long as the others, which wait for it in each step: look at its node.",
    ),
    Alert(
        "RaymoeRestartsOften", "warning", "0m",
        "delta(max by (run) (@worker_group_attempt)[30m:1m]) > 3",
        f"{RUN} restarts again and again",
        "Its workers were started more than three times in half an hour: see failures.json and the events in metrics.jsonl.",
    ),
    Alert(
        "RaymoeDeadCluster", "warning", "10m",
        "max by (run, cluster) (@cluster_load_share) < 0.001",
        "Cluster {{ $labels.cluster }} of run {{ $labels.run }} is dead",
        f"It takes {PERCENT} of the tokens, and its experts learn nothing.",
    ),
    Alert(
        "RaymoeCheckpointOld", "warning", "5m",
        """max by (run) (increase(@checkpoint_seconds_count[1h])) == 0
        and delta(max by (run) (@training_step > 0)[1h:1m]) > 0
        and max by (run) (@training_step offset 1h) >= 0""",
        f"{RUN} writes no checkpoints",
        "It trained for an hour without a new one: all that would be lost. Look for failures, or lower checkpoint.every.",
    ),
    Alert(
        "RaymoeCheckpointFailed", "critical", "0m",
        "max by (run) (increase(@checkpoint_failures_total[30m])) > 0",
        f"{RUN} could not write a checkpoint",
        "Training goes on and the next one is tried in its turn; see whether the disk under run.root is full.",
    ),
)  # fmt: skip

CLUSTERING = (
    Alert(
        "RaymoeStatisticsLate", "warning", "10m",
        "max by (run) (@regroup_statistics_lag_steps) > 100",
        "The clusterer of run {{ $labels.run }} cannot keep up",
        f"Its statistics are {VALUE} steps behind; plans made from them come late and are refused. Raise regroup.stats_every, or give it a CPU of its own.",
    ),
    Alert(
        "RaymoeRegroupingStalled", "warning", "0m",
        """max by (run) (increase(@regroup_plans_total{outcome=~"made|no_plan"}[1h])) == 0
        and max by (run) (max_over_time(@regroup_plans_total{outcome=~"made|no_plan"}[1d])) > 0
        and delta(max by (run) (@training_step > 0)[1h:1m]) > 600""",
        f"{RUN} no longer looks for plans",
        "It used to, and has trained for more than 600 steps in the last hour without looking for one. The clusterer may be gone: see it in Ray's list of actors.",
    ),
    Alert(
        "RaymoePlansNotApplied", "warning", "0m",
        """max by (run) (increase(@regroup_plans_total{outcome="made"}[1h])) > 2
        and max by (run) (increase(@regroup_plans_total{outcome="applied"}[1h])) == 0
        and time() - max by (run) (@regroup_last_plan_timestamp_seconds) > 3600""",
        f"{RUN} makes plans but applies none",
        f"{VALUE} plans in the last hour, and the last one applied is older. raymoe_regroup_refusals_total says why.",
    ),
    Alert(
        "RaymoeClustererRestarts", "warning", "0m",
        "max by (run) (increase(@regroup_clusterer_restarts_total[1h])) > 2",
        "The clusterer of run {{ $labels.run }} restarts again and again",
        f"It lost its statistics {VALUE} times in an hour. Training goes on; regrouping waits for new ones each time.",
    ),
)  # fmt: skip

SERVING = (
    Alert(
        "RaymoeQueueLong", "warning", "5m",
        """sum by (application) (@num_requests_waiting) > 8
        and sum by (application) (@num_requests_waiting) > sum by (application) (@trunk.num_requests_running)""",
        f"{APPLICATION} has a long queue",
        f"{VALUE} requests wait, more than are computed. Add trunks, or replicas of the busiest clusters.",
    ),
    Alert(
        "RaymoeErrors", "critical", "5m",
        """sum by (application) (rate(@request_success_total{finished_reason="error"}[5m]))
        / sum by (application) (rate(@request_success_total[5m])) > 0.01""",
        f"{APPLICATION} fails requests",
        f"{PERCENT} of the answers ended in an error.",
    ),
    Alert(
        "RaymoeRejections", "warning", "5m",
        """sum by (application) (rate(@requests_rejected_total{reason=~"full|unavailable"}[5m]))
        / (sum by (application) (rate(@requests_rejected_total[5m]))
            + sum by (application) (rate(@request_success_total[5m]))) > 0.05""",
        f"{APPLICATION} turns requests away",
        f"{PERCENT} of the requests found it full or without a trunk.",
    ),
    Alert(
        "RaymoeClusterRetries", "warning", "5m",
        """sum by (application, cluster) (rate(@cluster_call_retries_total[5m]))
        / (sum by (application, cluster) (rate(@cluster_call_retries_total[5m]))
            + sum by (application, cluster) (rate(@cluster_call_seconds_count[5m]))) > 0.01""",
        "Replicas of cluster {{ $labels.cluster }} of {{ $labels.application }} do not answer",
        f"{PERCENT} of the calls were computed elsewhere. Answers are right but slower.",
    ),
    Alert(
        "RaymoeClusterLoadsFailed", "critical", "0m",
        "sum by (application) (increase(@offload_failed_loads_total[10m])) > 0",
        f"{APPLICATION} cannot load clusters",
        f"{VALUE} loads failed in 10 minutes. See whether the artifact is there and whole, and whether memory is left.",
    ),
    Alert(
        "RaymoeServingImbalance", "info", "30m",
        "max by (application) (@cluster_imbalance_ratio) > 2",
        "Clusters of {{ $labels.application }} are unevenly used",
        "The busiest gets more than three times the mean of rows. Its replicas are the ones to add.",
    ),
    Alert(
        "RaymoeUnusedCluster", "info", "0m",
        """sum by (application, cluster) (increase(@cluster_rows_total[1h])) == 0
        and on (application) sum by (application) (increase(@cluster_rows_total[1h])) > 10000""",
        "Cluster {{ $labels.cluster }} of {{ $labels.application }} is not used",
        "It got no row in an hour in which the others got many: a dead cluster, or requests that have no need of it.",
    ),
)  # fmt: skip

PROCESSES = (
    Alert(
        "RaymoeTargetDown", "critical", "2m",
        '@up{job="raymoe"} == 0 and on (run, application) max by (run, application) (@up{job="raymoe"}) == 1',
        "{{ $labels.instance }} does not answer",
        "A process of {{ $labels.run }}{{ $labels.application }} cannot be scraped while others of it can.",
    ),
    Alert(
        "RaymoeGone", "warning", "2m",
        """max by (run, application) (@up{job="raymoe"}) == 0
        and max by (run, application) (max_over_time(@up{job="raymoe"}[15m])) == 1""",
        "{{ $labels.run }}{{ $labels.application }} is gone",
        "None of its processes answers any more: it was ended, or it died. This alert ends by itself.",
    ),
)  # fmt: skip

GROUPS = {"training": TRAINING, "clustering": CLUSTERING, "serving": SERVING, "processes": PROCESSES}
