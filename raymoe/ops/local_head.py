"""The Ray head of `make head` and `make serve` on this machine: start it in the background, and stop it.

    python -m raymoe.ops.local_head start    start a head, unless one responds on the dashboard's port
    python -m raymoe.ops.local_head folder   print the head's temporary folder
    python -m raymoe.ops.local_head stop     stop the head that `start` or `make head` started, and what runs on it

The head uses a temporary folder of its own, by which `stop` finds its processes: it never stops another Ray.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from raymoe.ops.ray_head import ENVIRONMENT, authorization, responds

DASHBOARD = "http://127.0.0.1:8265"
STOP_S = 10.0
"""Seconds that processes may take to end before they are killed."""


def folder() -> Path:
    """Return the temporary folder of this user's head. Short: Ray creates sockets in it."""
    return Path(tempfile.gettempdir()) / f"raymoe-head-{os.getuid()}"


def start(dashboard: str = DASHBOARD) -> bool:
    """Start a head that keeps running, unless one responds at `dashboard`. Returns whether it was started.

    Raises RuntimeError if `dashboard` is on another machine, or if Ray does not start.
    """
    environment = ENVIRONMENT | os.environ
    if responds(f"{dashboard}/api/version", authorization(environment)):
        return False
    url = urlsplit(dashboard)
    if url.hostname not in ("127.0.0.1", "localhost"):
        raise RuntimeError(f"no Ray responds at {dashboard}: start it there; --start only starts one on this machine")
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", f"--dashboard-port={url.port or 8265}",
        f"--temp-dir={folder()}",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"Ray did not start:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    return True


def processes() -> list[psutil.Process]:
    """Return the head's own processes: those of this user whose command line names its folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "uids"]):
        line, uids = process.info["cmdline"] or [], process.info["uids"]
        if uids and uids.real == os.getuid() and any(str(folder()) in word for word in line):
            found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def stop() -> int:
    """Stop the head and its workers. Returns the number of processes that were stopped."""
    ours = processes()
    workers = {child for process in ours for child in _children(process)}
    everything = {*ours, *workers}
    for process in everything:
        _signal(process, kill=False)
    _, alive = psutil.wait_procs(list(everything), timeout=STOP_S)
    for process in alive:
        _signal(process, kill=True)
    psutil.wait_procs(alive, timeout=STOP_S)
    if everything:
        shutil.rmtree(folder(), ignore_errors=True)
    return len(everything)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _signal(process: psutil.Process, *, kill: bool) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill() if kill else process.terminate()


def main() -> int:
    if sys.argv[1:] == ["start"]:
        started = start()
        print(f"{'started a Ray head' if started else 'a Ray head is running'}: {DASHBOARD}")
        return 0
    if sys.argv[1:] == ["folder"]:
        print(folder())
        return 0
    if sys.argv[1:] == ["stop"]:
        stopped = stop()
        print(
            f"stopped {stopped} processes of the Ray head" if stopped else "no Ray head of make head or make serve runs"
        )
        return 0
    print(f"usage: python -m {__spec__.name} start|stop|folder", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
