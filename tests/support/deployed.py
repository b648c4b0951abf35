"""The shipped Serve config on a free port, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from raymoe.ops.ray_head import Head, free_ports
from raymoe.serving.rollout import Config, Rollout
from tests.support.paths import REPO_ROOT
from tests.support.waiting import until


def config(args: dict[str, Any], policy: dict[str, Any] | None = None) -> Config:
    made = yaml.safe_load((REPO_ROOT / "services" / "raymoe.yaml").read_text())
    (made["http_options"]["port"],) = free_ports(1)
    (application,) = made["applications"]
    application["args"] = args
    application["autoscaling_policy"]["policy_kwargs"] |= policy or {}
    return made


def serve(head: Head, *arguments: str) -> str:
    """Run a `serve` command and return its output."""
    command = [str(Path(sys.executable).with_name("serve")), *arguments, "-a", head.dashboard]
    done = subprocess.run(command, env=head.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def deploy(head: Head, folder: Path, config: Config) -> Rollout:
    """Run `serve deploy` and wait until the application is ready and all of its replicas run."""
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    serve(head, "deploy", str(file))
    rollout = Rollout(head.dashboard, config)
    rollout.wait(lambda: rollout.ready() and rollout.running() == rollout.targets(), "to be ready")
    return rollout


def kill(rollout: Rollout, deployment: str) -> int:
    """SIGKILL one running replica of a deployment and return its pid."""
    pid = until(lambda: rollout.pids(deployment), f"a replica of {deployment}")[0]
    os.kill(pid, signal.SIGKILL)
    return pid


def get(rollout: Rollout, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(rollout.base + path, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def post(rollout: Rollout, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(rollout.base + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
