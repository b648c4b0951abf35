"""Every private API of Ray that raymoe uses, for Ray 2.60. An update of Ray starts with this file."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback as ControllerCallback
from ray.train.v2._internal.execution.controller.state import TrainControllerStateType as TrainState

__all__ = [
    "ControllerCallback",
    "TrainState",
    "authentication_mode",
    "discover_address",
    "refresh_cluster_resources",
    "serve_http_host",
    "session_folder",
    "train_state",
]


def train_state(state: Any) -> TrainState:
    """Return the kind of a state of Ray Train's controller."""
    return state._state_type


def session_folder() -> Path:
    """Return the temporary folder of the Ray session of this process; `/tmp` without one."""
    from ray._private import worker

    return Path(worker._global_node.get_temp_dir_path() if worker._global_node else "/tmp")


def authentication_mode() -> str:
    """Return `token` or `disabled`, as Ray itself reads it from the environment."""
    from ray import _raylet

    raylet: Any = _raylet
    return "token" if raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN else "disabled"


def discover_address() -> str:
    """Return the GCS address that `ray.init("auto")` would join on this machine; empty without one."""
    from ray._private import services

    try:
        addresses = services.find_gcs_addresses()
        return services.find_bootstrap_address(None) or next(iter(addresses), "")
    except Exception:  # a private function; without it a local Ray starts
        return ""


def refresh_cluster_resources() -> None:
    """Make Ray's coordinator of resources read the cluster now instead of every 20 s.

    Does nothing without a Ray: `get_actor` would start one.
    """
    if not ray.is_initialized():
        return
    with contextlib.suppress(Exception):  # the actor is optional, and Ray may be shutting down
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(coordinator.get_reserved_resources.remote("raymoe", recompute=True), timeout=2)


def serve_http_host() -> str | None:
    """Return the host on which Serve's HTTP proxies listen; None in a process without a Ray that runs Serve."""
    if not ray.is_initialized():
        return None
    from ray.serve import context

    client = context._get_global_client(raise_if_no_controller_running=False)
    return client.http_config.host if client else None
