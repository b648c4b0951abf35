"""Rollouts: deploy an application on a running Ray, and replace it without a failed request.

Uses Ray's dashboard as the `serve` command does, so it works from any machine that can reach it.
"""

from __future__ import annotations

import http.client
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from raymoe.serving.autoscaling import start
from raymoe.serving.engine.cluster import cluster_sizes
from raymoe.serving.serve_policy import Scaler
from raymoe.serving.settings import from_dict
from raymoe.storage.artifact import Artifact

Config = dict[str, Any]
"""A Serve config with one application, as in services/raymoe.yaml."""
DEFAULT_HOST, DEFAULT_PORT = "0.0.0.0", 8000
"""Serve's values for `http_options` that a config lacks."""


def pinned(config: Config, artifact: str | None = None, root: str | None = None) -> Config:
    """Return the config with the artifact's folder in it, and an application named for the artifact.

    A later export then does not change what was deployed, and two artifacts are two applications. The name has the
    export's name and the artifact's digest: it identifies the export in Ray's dashboard.
    Raises ValueError, FileNotFoundError or CorruptArtifact.
    """
    try:
        (application,) = config["applications"]
        args = dict(application.get("args") or {})
    except (KeyError, TypeError, ValueError):
        raise ValueError("the config must have exactly one application under `applications`") from None
    args |= {key: value for key, value in (("artifact", artifact), ("root", root)) if value}
    if "root" in args:
        args["root"] = str(Path(args["root"]).expanduser().resolve())  # replicas have other working directories
    settings = from_dict(args)
    folder = settings.folder()
    opened = Artifact.open(folder)
    policy = application.get("autoscaling_policy") or {}
    if policy.get("policy_function") == f"{Scaler.__module__}:{Scaler.__name__}":
        scaler = Scaler(**policy.get("policy_kwargs") or {})
        sizes = list(cluster_sizes(opened, settings.dtype).values())
        start(scaler.between(settings.min_replicas, settings.max_replicas), sizes, 0.0)  # checks the byte budget
    export = re.sub(r"[^\w.-]+", "-", folder.name)
    name = f"{application['name']}-{export}-{opened.digest.hex()[:8]}"
    args |= {"artifact": str(folder), "name": settings.name or folder.name}
    return config | {"applications": [application | {"name": name, "args": args}]}


class Rollout:
    """The application of a pinned config on the Ray whose dashboard has the address `dashboard`.

    `timeout`: seconds of each step. Raises RuntimeError for a step that fails or exceeds it, ConnectionError when no
    Ray responds at the address.
    """

    def __init__(self, dashboard: str, config: Config, timeout: float = 300.0) -> None:
        self.client = ServeSubmissionClient(dashboard)
        self.dashboard, self.config, self.timeout = dashboard, config, timeout
        (self.application,) = config["applications"]
        self.name: str = self.application["name"]
        self.host, self.port = _host_and_port(config.get("http_options"))
        self.base = f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"

    # State

    def details(self) -> dict[str, Any]:
        """Return the state of Serve."""
        return self.client.get_serve_details()

    def applications(self) -> dict[str, Any]:
        """Return the state of each application."""
        return self.details().get("applications", {})

    def deployments(self) -> dict[str, Any]:
        """Return the state of each deployment of this application."""
        return self.applications().get(self.name, {}).get("deployments", {})

    def pids(self, deployment: str) -> list[int]:
        """Return the process ids of a deployment's running replicas."""
        replicas = self.deployments().get(deployment, {}).get("replicas", [])
        return [r["pid"] for r in replicas if r["state"] == "RUNNING" and r["pid"]]

    def targets(self) -> dict[str, int]:
        """Return the desired number of replicas of each deployment."""
        return {name: d["target_num_replicas"] for name, d in self.deployments().items()}

    def running(self) -> dict[str, int]:
        """Return the number of running replicas of each deployment."""
        return {
            name: sum(r["state"] == "RUNNING" for r in d.get("replicas", [])) for name, d in self.deployments().items()
        }

    def get(self, path: str) -> str | None:
        """Return the body of a GET; None without a response of status 200."""
        try:
            with urllib.request.urlopen(self.base + path, timeout=5) as response:
                return response.read().decode()
        except (OSError, http.client.HTTPException):
            return None

    def ready(self, prefix: str = "") -> bool:
        return (
            self.applications().get(self.name, {}).get("status") == "RUNNING"
            and self.get(f"{prefix}/ready") is not None
        )

    # Actions

    def up(self) -> None:
        """Serve the application at `/`. It replaces raymoe's other applications without a failed request.

        Until the switch a failure changes nothing. Remains of an interrupted rollout are removed. Applications of
        other code stay as they are.
        """
        self.check_http_options()
        present = self.applications()
        configs = [
            app["deployed_app_config"]
            for name, app in present.items()
            if name != self.name and app.get("deployed_app_config")
        ]
        others = [app for app in configs if app["import_path"] != self.application["import_path"]]
        old = [app for app in configs if app not in others]
        at_root = self.application | {"route_prefix": "/"}
        if not old:
            self._deploy([*others, at_root])
            self.wait(self.ready, "to be ready")
            return
        if present.get(self.name, {}).get("route_prefix") != "/":
            self._start_aside([*others, *old])
        routes = {app["name"]: present[app["name"]].get("route_prefix") for app in old}
        serving = [name for name, route in routes.items() if route and self._is_healthy(route.rstrip("/"))]
        moved = [app | {"route_prefix": f"/{app['name']}"} for app in old]
        self._deploy([*others, *moved, at_root])
        self.wait(lambda: self.ready() and all(self._is_healthy(f"/{name}") for name in serving), "to receive /")
        self.wait(lambda: all(self._is_drained(name) for name in serving), "to receive all requests")
        self._deploy([*others, at_root])
        self.wait(lambda: not routes.keys() & self.applications().keys(), "to replace the others")

    def _start_aside(self, present: list[dict[str, Any]]) -> None:
        """Start the application beside those that are present, at a route of its own. Undo it on failure."""
        aside = f"/{self.name}"
        try:
            self._deploy([*present, self.application | {"route_prefix": aside}])
            self.wait(lambda: self.ready(aside), "to be ready")
        except RuntimeError:
            self._deploy(present)
            raise

    def check_http_options(self) -> None:
        """Raises RuntimeError when Serve runs on another host or port: both are fixed when Serve starts."""
        details = self.details()
        if not details.get("controller_info") or not details.get("http_options"):
            return  # Serve does not run, and starts with the config's options
        host, port = _host_and_port(details["http_options"])
        if (host, port) != (self.host, self.port):
            names = ", ".join(sorted(details.get("applications", {}))) or "no application"
            raise RuntimeError(
                f"Serve already listens on {host}:{port} and serves {names}; the config has "
                f"{self.host}:{self.port}. Serve's http_options are fixed when it starts: set them to {host}:{port} in "
                f"the config, or end everything that Serve serves with `serve shutdown -a {self.dashboard}` and retry"
            )

    def down(self) -> None:
        """End Serve and everything that it serves."""
        self.client.delete_applications()
        self.wait(lambda: not self.applications(), "to end")

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Wait for a condition. Raises RuntimeError after `timeout` seconds, or when the application fails."""
        deadline = time.monotonic() + self.timeout
        while not done():
            app = self.applications().get(self.name, {})
            if app.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise RuntimeError(f"application {self.name} failed: {app.get('message') or _messages(app)}")
            if time.monotonic() > deadline:
                status = app.get("status", "absent")
                raise RuntimeError(
                    f"application {self.name} took more than {self.timeout:g} s {what} (status {status}): see "
                    f"`serve status -a {self.dashboard}`, or set a longer --timeout"
                )
            time.sleep(0.25)

    def _deploy(self, applications: list[dict[str, Any]]) -> None:
        self.client.deploy_applications(self.config | {"applications": applications})

    def _is_healthy(self, prefix: str) -> bool:
        return self.get(f"{prefix}/health") is not None

    def _is_drained(self, application: str) -> bool:
        """Whether an application runs no request."""
        running = [
            sample.value
            for family in text_string_to_metric_families(self.get(f"/{application}/metrics") or "")
            if family.name == "raymoe_num_requests_running"
            for sample in family.samples
        ]
        return bool(running) and not any(running)


def _host_and_port(options: dict[str, Any] | None) -> tuple[str, int]:
    options = options or {}
    return options.get("host") or DEFAULT_HOST, options.get("port") or DEFAULT_PORT


def _messages(app: dict[str, Any]) -> str:
    return "; ".join(d["message"] for d in app.get("deployments", {}).values() if d.get("message"))
