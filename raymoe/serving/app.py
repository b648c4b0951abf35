"""The application: one api, trunks behind it, and a deployment for each cluster.

    serve deploy services/raymoe.yaml        serve run services/raymoe.yaml        serve status / serve shutdown

Its `args` are the fields of `ServeSettings`.
"""

from __future__ import annotations

import secrets
import warnings
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from raymoe.serving.replicas import Api, ClusterReplica, TrunkReplica
from raymoe.serving.serve_policy import LOOK_BACK_S, METRICS_INTERVAL_S, PREFIX
from raymoe.serving.settings import from_dict
from raymoe.storage.artifact import Artifact

HEALTH = {"health_check_period_s": 1.0, "health_check_timeout_s": 5.0}


def _scaled(least: int, most: int) -> AutoscalingConfig:
    """Between these as the application's policy says, at once: the delays are the policy's own.

    Without a number of initial replicas it starts with the least, and a redeployment keeps those that there are.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of metrics_interval_s, which is what counts all the same
        return AutoscalingConfig(
            min_replicas=least, max_replicas=most, upscale_delay_s=0, downscale_delay_s=0,
            downscale_to_zero_delay_s=0, metrics_interval_s=METRICS_INTERVAL_S, look_back_period_s=LOOK_BACK_S,
        )  # fmt: skip


def build(args: dict[str, Any]) -> Application:
    """The application of one artifact. Raises ValueError, FileNotFoundError or CorruptArtifact before it starts."""
    settings = from_dict(args)
    folder = settings.folder()
    model = Artifact.open(folder).model
    if model.experts != "clustered":
        raise ValueError(f"{folder} has experts={model.experts!r}: only clustered experts can be served")
    cpus: dict[str, Any] = {"num_cpus": settings.cpus}
    secret = secrets.token_bytes(32)  # by which the processes of this application know each other
    clusters = [
        serve.deployment(ClusterReplica)
        .options(
            name=f"{PREFIX}{c}", ray_actor_options=cpus, graceful_shutdown_timeout_s=5,
            autoscaling_config=_scaled(settings.min_replicas, settings.max_replicas), **HEALTH,
        )
        .bind(settings, str(folder), secret, c)
        for c in range(model.n_clusters)
    ]  # fmt: skip
    trunk = (
        serve.deployment(TrunkReplica)
        .options(
            name="trunk", ray_actor_options=cpus, max_ongoing_requests=1000, max_surge_percent=100,
            graceful_shutdown_timeout_s=settings.drain_s + 5,
            autoscaling_config=_scaled(settings.trunks, settings.trunks), **HEALTH,
        )
        .bind(settings, str(folder), secret, clusters)
    )  # fmt: skip
    api = serve.deployment(serve.ingress()(Api)).options(
        name="api", ray_actor_options={"num_cpus": 0}, num_replicas=settings.apis, max_ongoing_requests=1000,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=settings.drain_s, **HEALTH,
    )  # fmt: skip
    return api.bind(settings, str(folder), secret, trunk, clusters)
