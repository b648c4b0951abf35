"""A private Ray head on this machine, with free ports and its own folder, which ends with its context."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # a head ends after its work
    "RAY_JOB_STOP_WAIT_TIME_S": "120",  # `ray job stop` waits this long for the last checkpoint
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment of a head. Values that are set already win."""


def wants_token(environment: Mapping[str, str]) -> bool:
    """Return whether Ray requires a token in this environment."""
    return environment.get("RAY_AUTH_MODE", "").lower() == "token"


def authorization(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the header that Ray's dashboard requires, with the token from where Ray itself reads it.

    Raises RuntimeError if a token is required and none is found.
    """
    if not wants_token(environment):
        return {}
    token = environment.get("RAY_AUTH_TOKEN", "")
    file = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        token = token.strip() or file.read_text().strip()
    except OSError as error:
        raise RuntimeError(
            f"RAY_AUTH_MODE=token and {file} cannot be read ({error.strerror}): create it with `ray get-auth-token "
            "--generate`, or set RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
        ) from None
    return {"Authorization": f"Bearer {token}"}


def free_ports(count: int) -> list[int]:
    """Return ports that are free now, outside the range that Ray gives to its workers (10002 to 19999)."""
    sockets, ports = [], []
    while len(ports) < count:
        bound = socket.create_server(("127.0.0.1", 0))
        sockets.append(bound)
        if not 10000 <= bound.getsockname()[1] <= 20000:
            ports.append(bound.getsockname()[1])
    for bound in sockets:
        bound.close()
    return ports


@dataclass(frozen=True)
class Head:
    """A running head: its dashboard, the environment for commands that use it, and its folder."""

    dashboard: str
    environment: dict[str, str]
    folder: Path

    def submit(self, *command: str, working_dir: Path | None, submission_id: str = "") -> list[str]:
        """Return the command line that submits `command` as a job and follows its log.

        Without `working_dir` the job runs in the working directory of the head.
        """
        name = ["--submission-id", submission_id] if submission_id else []
        address = ["--address", self.dashboard]
        folder = ["--working-dir", str(working_dir)] if working_dir else []
        return [str(Path(sys.executable).with_name("ray")), "job", "submit", *address, *name, *folder, "--", *command]

    def processes(self, name: str) -> list[psutil.Process]:
        """Return the processes of this head whose title, set by Ray, starts with `ray::` and `name`."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            try:
                own = any(str(self.folder) in " ".join(parent.cmdline()) for parent in process.parents())
            except psutil.Error:
                continue
            if own and " ".join(process.info["cmdline"] or []).startswith(f"ray::{name}"):
                found.append(process)
        return found


@contextmanager
def head(cpus: int, environment: dict[str, str] | None = None) -> Iterator[Head]:
    """Start a head with `cpus` CPUs; yield it when its dashboard responds, and end it on exit.

    Raises RuntimeError with the log if the head does not start. While it runs, SIGTERM raises SystemExit in this
    process, so that the head ends too.
    """
    gcs, dashboard, agent, listen, metrics, scaler, board = free_ports(7)
    folder = Path(tempfile.mkdtemp(prefix="raymoe-ray-"))
    variables = ENVIRONMENT | {"AUTOSCALER_METRIC_PORT": str(scaler), "DASHBOARD_METRIC_PORT": str(board)}
    variables = variables | {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | (environment or {})
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", "")])
    headers = authorization(variables)
    log = folder / "head.log"
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-grpc-port={agent}",
        f"--dashboard-agent-listen-port={listen}", f"--metrics-export-port={metrics}", f"--num-cpus={cpus}",
        f"--temp-dir={folder / 'ray'}", "--object-store-memory=300000000", "--include-dashboard=true",
    ]  # fmt: skip
    handles_sigterm = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if handles_sigterm:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with log.open("w") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=output, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while not ("Ray runtime started" in log.read_text() and responds(f"{address}/api/jobs/", headers)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Ray head did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield Head(address, variables | {"RAY_ADDRESS": f"127.0.0.1:{gcs}"}, folder)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for _ in range(20):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)  # a process of Ray that is ending has written again
        if handles_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def responds(url: str, headers: Mapping[str, str]) -> bool:
    """Return whether a GET has status 200."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers)), timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
