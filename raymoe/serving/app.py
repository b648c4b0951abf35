"""The Serve application: an api, trunks behind it, and a deployment for each cluster.

    serve deploy services/raymoe.yaml        serve run services/raymoe.yaml        serve status / serve shutdown

Its `args` are the fields of `ServeSettings`.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import warnings
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from raymoe.serving.http.server import ApiSettings
from raymoe.serving.replicas import Api, ClusterReplica, TrunkReplica
from raymoe.serving.serve_policy import LOOK_BACK_S, METRICS_INTERVAL_S, PREFIX
from raymoe.serving.settings import ServeSettings, from_dict
from raymoe.storage.artifact import Artifact

HEALTH = {"health_check_period_s": 1.0, "health_check_timeout_s": 5.0}
API_KEY = "RAYMOE_API_KEY"
"""Environment variable with the key that guards /v1. It is read where the application is built."""


def _scaled(least: int, most: int) -> AutoscalingConfig:
    """Return Serve's configuration for replicas that the application's policy scales. The policy has its own delays.

    Without `initial_replicas` a new deployment starts with `least`, and a redeployment keeps its replicas.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of metrics_interval_s, which Serve still uses
        return AutoscalingConfig(
            min_replicas=least, max_replicas=most, upscale_delay_s=0, downscale_delay_s=0,
            downscale_to_zero_delay_s=0, metrics_interval_s=METRICS_INTERVAL_S, look_back_period_s=LOOK_BACK_S,
        )  # fmt: skip


def build(args: dict[str, Any]) -> Application:
    """Build the application of one artifact. Raises ValueError, FileNotFoundError or CorruptArtifact."""
    from raymoe.ops.ray_internals import serve_http_host  # late: it imports all of ray.train

    settings = from_dict(args)
    folder = settings.folder()
    model = Artifact.open(folder).model
    if model.experts != "clustered":
        raise ValueError(f"{folder} has experts={model.experts!r}: only clustered experts can be served")
    api = api_settings(settings, os.environ.get(API_KEY), serve_http_host())
    secret = secrets.token_bytes(32)  # authenticates the application's processes to each other
    cpus: dict[str, Any] = {"num_cpus": settings.cpus}
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
    return (
        serve.deployment(serve.ingress()(Api))
        .options(
            name="api", ray_actor_options={"num_cpus": 0}, num_replicas=settings.apis, max_ongoing_requests=1000,
            max_surge_percent=100, graceful_shutdown_timeout_s=settings.drain_s, **HEALTH,
        )
        .bind(settings, api, str(folder), secret, trunk, clusters)
    )  # fmt: skip


def api_settings(settings: ServeSettings, key: str | None, host: str | None) -> ApiSettings:
    """Return the HTTP server's settings. key: of clients. host: of Serve's proxies, None if unknown.

    Raises ValueError for a host that others can reach, without a key and without `allow_unauthenticated`.
    """
    if not key and host is not None and not _is_loopback(host) and not settings.allow_unauthenticated:
        raise ValueError(
            f"http_options.host={host} serves /v1 to other machines without a key: set {API_KEY} where Ray starts, "
            "or allow_unauthenticated: true in args"
        )
    return ApiSettings(api_key=key or None, send_request_ids=False)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
