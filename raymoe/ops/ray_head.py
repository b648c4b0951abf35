"""A Ray head of our own on this machine: free ports, its own folder, waited for, and ended by pid."""

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
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # a head is ended when its work is over
    "RAY_JOB_STOP_WAIT_TIME_S": "120",  # `ray job stop` waits this long for the last checkpoint
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What a head for raymoe sets. Values that the caller has set win."""


def wants_token(environment: Mapping[str, str]) -> bool:
    """Whether the Ray of this environment asks for a token."""
    return environment.get("RAY_AUTH_MODE", "").lower() == "token"


def authorisation(environment: Mapping[str, str]) -> dict[str, str]:
    """The header that Ray's dashboard asks for in this environment, from where Ray itself takes the token.

    Raises RuntimeError when there is none.
    """
    if not wants_token(environment):
        return {}
    token = environment.get("RAY_AUTH_TOKEN", "")
    file = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        token = token.strip() or file.read_text().strip()
    except OSError as error:
        raise RuntimeError(
            f"RAY_AUTH_MODE=token and {file} cannot be read ({error.strerror}): make one with `ray get-auth-token "
            "--generate`, or set RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
        ) from None
    return {"Authorization": f"Bearer {token}"}


def free_ports(count: int) -> list[int]:
    """Ports that are free now, outside of the range that Ray gives to its workers (10002 to 19999)."""
    sockets, ports = [], []
    while len(ports) < count:
        held = socket.create_server(("127.0.0.1", 0))
        sockets.append(held)
        if not 10000 <= held.getsockname()[1] <= 20000:
            ports.append(held.getsockname()[1])
    for held in sockets:
        held.close()
    return ports


@dataclass(frozen=True)
class Head:
    """A running head: where jobs are submitted, and the environment for commands that use it."""

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
        """Of this head, by the name that Ray gives them."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            try:
                ours = any(str(self.folder) in " ".join(parent.cmdline()) for parent in process.parents())
            except psutil.Error:
                continue
            if ours and " ".join(process.info["cmdline"] or []).startswith(f"ray::{name}"):
                found.append(process)
        return found


@contextmanager
def head(cpus: int, environment: dict[str, str] | None = None) -> Iterator[Head]:
    """Start a head with `cpus` CPUs; yields when it has started and its dashboard answers.

    Raises RuntimeError with its log if it does not. Until it has ended, SIGTERM ends this process in order.
    """
    gcs, dashboard, agent, listen, metrics, scaler, board = free_ports(7)
    folder = Path(tempfile.mkdtemp(prefix="raymoe-ray-"))
    variables = ENVIRONMENT | {"AUTOSCALER_METRIC_PORT": str(scaler), "DASHBOARD_METRIC_PORT": str(board)}
    variables = variables | {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | (environment or {})
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", "")])
    headers = authorisation(variables)
    log = folder / "head.log"
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-grpc-port={agent}",
        f"--dashboard-agent-listen-port={listen}", f"--metrics-export-port={metrics}", f"--num-cpus={cpus}",
        f"--temp-dir={folder / 'ray'}", "--object-store-memory=300000000", "--include-dashboard=true",
    ]  # fmt: skip
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    with log.open("w") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=output, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while not ("Ray runtime started" in log.read_text() and answers(f"{address}/api/jobs/", headers)):
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
            time.sleep(0.1)  # a process of Ray's that is about to end has written once more
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def answers(url: str, headers: Mapping[str, str]) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers)), timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
