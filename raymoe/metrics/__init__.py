"""Prometheus metrics, each declared once: prefix `raymoe_`, base units, and at most a label `cluster`, never `expert`.

Each process has its own registry. Metrics of a whole run have the same value at all workers of the run: aggregate
them with `max by (run)`, not with `sum`.
"""

from raymoe.metrics.registry import serve
from raymoe.metrics.serving import FINISHES, REJECTIONS, ApiMetrics, ClusterMetrics, TrunkMetrics
from raymoe.metrics.training import PLAN_OUTCOMES, REFUSALS, TrainingMetrics

__all__ = [
    "FINISHES",
    "PLAN_OUTCOMES",
    "REFUSALS",
    "REJECTIONS",
    "ApiMetrics",
    "ClusterMetrics",
    "TrainingMetrics",
    "TrunkMetrics",
    "serve",
]
