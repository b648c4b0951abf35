"""Puts an application on a running Ray, replaces it without a failed request, and looks at it: the operator's side.

Talks to Ray's dashboard as the `serve` command does, so it works from any machine that can reach it.
"""

from __future__ import annotations

import http.client
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from raymoe.serving.autoscaling import start
from raymoe.serving.engine.cluster import cluster_sizes
from raymoe.serving.serve_policy import Scaler
from raymoe.serving.settings import from_dict
from raymoe.storage.artifact import Artifact

Config = dict[str, Any]
"""A Serve config with one application, as in services/raymoe.yaml."""


def pinned(config: Config, artifact: str | None = None, root: str | None = None) -> Config:
    """The config with its artifact decided: by its folder, in an application that is named after its digest.

    So a later export changes nothing of what was deployed, and two artifacts are two applications.
    Raises ValueError, FileNotFoundError or CorruptArtifact.
    """
    try:
        (application,) = config["applications"]
        args = dict(application.get("args") or {})
    except (KeyError, TypeError, ValueError):
        raise ValueError("the config must have exactly one application under `applications`") from None
    args |= {key: value for key, value in (("artifact", artifact), ("root", root)) if value}
    if "root" in args:
        args["root"] = str(Path(args["root"]).expanduser().resolve())  # of here: replicas have folders of their own
    settings = from_dict(args)
    folder = settings.folder()
    opened = Artifact.open(folder)
    policy = application.get("autoscaling_policy") or {}
    if policy.get("policy_function") == f"{Scaler.__module__}:{Scaler.__name__}":
        scaler = Scaler(**policy.get("policy_kwargs") or {})
        sizes = list(cluster_sizes(opened, settings.dtype).values())
        start(scaler.between(settings.min_replicas, settings.max_replicas), sizes, 0.0)  # the budget holds the least
    name = f"{application['name']}-{opened.digest.hex()[:8]}"
    args |= {"artifact": str(folder), "name": settings.name or folder.name}
    return config | {"applications": [application | {"name": name, "args": args}]}


class Rollout:
    """An application of a pinned config on the Ray behind `dashboard` (its address). `timeout` in seconds, of each step.

    Raises RuntimeError when something does not happen in time, or fails; ConnectionError when Ray is not there.
    """

    def __init__(self, dashboard: str, config: Config, timeout: float = 300.0) -> None:
        self.client = ServeSubmissionClient(dashboard)
        self.config, self.timeout = config, timeout
        (self.application,) = config["applications"]
        self.name: str = self.application["name"]
        options = config.get("http_options", {})
        host = options.get("host", "127.0.0.1")
        self.base = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{options.get('port', 8000)}"

    # What there is

    def applications(self) -> dict[str, Any]:
        """What Serve says of each."""
        return self.client.get_serve_details().get("applications", {})

    def deployments(self) -> dict[str, Any]:
        """What Serve says of each deployment of the application."""
        return self.applications().get(self.name, {}).get("deployments", {})

    def pids(self, deployment: str) -> list[int]:
        """Processes of a deployment's running replicas."""
        replicas = self.deployments().get(deployment, {}).get("replicas", [])
        return [r["pid"] for r in replicas if r["state"] == "RUNNING" and r["pid"]]

    def targets(self) -> dict[str, int]:
        """How many replicas each deployment should have."""
        return {name: d["target_num_replicas"] for name, d in self.deployments().items()}

    def running(self) -> dict[str, int]:
        """How many replicas of each deployment run."""
        return {
            name: sum(r["state"] == "RUNNING" for r in d.get("replicas", [])) for name, d in self.deployments().items()
        }

    def get(self, path: str) -> str | None:
        """What the server answers to a GET; None when it does not, or not with 200."""
        try:
            with urllib.request.urlopen(self.base + path, timeout=5) as answer:
                return answer.read().decode()
        except (OSError, http.client.HTTPException):
            return None

    def ready(self, prefix: str = "") -> bool:
        return (
            self.applications().get(self.name, {}).get("status") == "RUNNING"
            and self.get(f"{prefix}/ready") is not None
        )

    # What to do

    def up(self) -> None:
        """Serve the application at `/`: new, or beside what is there, which it then replaces without a failed request.

        Until the switch a failure changes nothing. What an update left that did not come to its end is removed.
        Applications of other code stay as they are.
        """
        there = self.applications()
        configs = [
            app["deployed_app_config"]
            for name, app in there.items()
            if name != self.name and app.get("deployed_app_config")
        ]
        others = [app for app in configs if app["import_path"] != self.application["import_path"]]
        old = [app for app in configs if app not in others]
        alone = self.application | {"route_prefix": "/"}
        if not old:
            self._deploy([*others, alone])
            self.wait(self.ready, "to be ready")
            return
        routes = {app["name"]: there[app["name"]].get("route_prefix") for app in old}
        answering = [name for name, route in routes.items() if route and self._answers(route.rstrip("/"))]
        if there.get(self.name, {}).get("route_prefix") != "/":
            aside = f"/{self.name}"
            try:
                self._deploy([*others, *old, self.application | {"route_prefix": aside}])
                self.wait(lambda: self.ready(aside), "to be ready")
            except RuntimeError:
                self._deploy([*others, *old])
                raise
        moved = [app | {"route_prefix": f"/{app['name']}"} for app in old]
        self._deploy([*others, *moved, alone])
        self.wait(lambda: self.ready() and all(self._answers(f"/{name}") for name in answering), "to have /")
        self.wait(lambda: all(self._drained(name) for name in answering), "to be the only one that is asked")
        self._deploy([*others, alone])
        self.wait(lambda: not routes.keys() & self.applications().keys(), "to be alone")

    def down(self) -> None:
        """Take everything off that Serve serves."""
        self.client.delete_applications()
        self.wait(lambda: not self.applications(), "to be gone")

    def wait(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.timeout
        while not done():
            app = self.applications().get(self.name, {})
            if app.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise RuntimeError(f"application {self.name} failed: {app.get('message') or self._messages(app)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {self.timeout:g} s for application {self.name} {what}")
            time.sleep(0.25)

    @staticmethod
    def _messages(app: dict[str, Any]) -> str:
        return "; ".join(d["message"] for d in app.get("deployments", {}).values() if d.get("message"))

    def _deploy(self, applications: list[dict[str, Any]]) -> None:
        self.client.deploy_applications(self.config | {"applications": applications})

    def _answers(self, prefix: str) -> bool:
        return self.get(f"{prefix}/health") is not None

    def _drained(self, application: str) -> bool:
        metrics = self.get(f"/{application}/metrics") or ""
        lines = [line for line in metrics.splitlines() if line.startswith("raymoe_num_requests_running{")]
        return bool(lines) and all(float(line.rpartition(" ")[2]) == 0 for line in lines)
