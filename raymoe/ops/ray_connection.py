"""Find the Ray that a command must use, fail within seconds if it does not respond, and join it or start one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import psutil
import ray
from ray.job_config import JobConfig

TCP_TIMEOUT_S = 5.0
GRPC_TIMEOUT_S = 10.0
"""Seconds within which an open port must complete a gRPC handshake to count as a Ray."""


@dataclass(frozen=True)
class RayTarget:
    """The Ray to use."""

    address: str
    """`host:port` of a running GCS. Empty: start a local Ray."""
    source: str = ""
    """Where the address comes from."""

    def __str__(self) -> str:
        if not self.address:
            return "none is running: a local one starts for this command"
        return f"joining {self.address} ({self.source}); RAY_ADDRESS=local starts a separate Ray instead"


@dataclass(frozen=True)
class RayConnection:
    """The Ray that this process is connected to."""

    target: RayTarget
    owner: str
    """User that started the Ray on this machine; empty if unknown."""
    nodes: int
    cpus: float
    gpus: float

    def __str__(self) -> str:
        owner = f", started by user {self.owner}" if self.owner else ""
        nodes = f"{self.nodes} node{'s' * (self.nodes != 1)}"
        return f"{self.target.address or 'local'}: {nodes}, {self.cpus:g} CPUs, {self.gpus:g} GPUs{owner}"


def current_ray() -> RayTarget | None:
    """Return the Ray that this process is connected to already."""
    if not ray.is_initialized():
        return None
    return RayTarget(ray.get_runtime_context().gcs_address, "connected already")


def find_ray(environment: Mapping[str, str]) -> RayTarget:
    """Return the Ray that RAY_ADDRESS names, else the one on this machine, else a local one to start.

    Raises ValueError for an address of another kind, and ConnectionError within seconds if no Ray listens there.
    """
    given = environment.get("RAY_ADDRESS", "").strip()
    if given == "local":
        return RayTarget("")
    if given in ("", "auto"):
        from raymoe.ops.ray_internals import discover_address  # imports torch

        address = discover_address()
        try:
            if address:
                check_listening(address)
        except ConnectionError:  # the record of a Ray that has ended
            address = ""
        return RayTarget(address, "running on this machine" if address else "")
    address = gcs_address(given)
    try:
        check_listening(address)
    except ConnectionError as error:
        raise ConnectionError(
            f"no Ray listens at RAY_ADDRESS={given} ({error}): correct the address, or unset RAY_ADDRESS to start a local Ray"
        ) from None
    return RayTarget(address, "RAY_ADDRESS")


def gcs_address(text: str) -> str:
    """Return `host:port` of a GCS address. Raises ValueError for a dashboard, Ray Client or malformed address."""
    scheme, separator, _ = text.partition("://")
    if separator and scheme in ("http", "https"):
        raise ValueError(
            f"RAY_ADDRESS={text} is the address of a dashboard: use the GCS address (HOST:6379), or submit the command "
            f"with `RAY_API_SERVER_ADDRESS={text} ray job submit`"
        )
    if separator:
        raise ValueError(f"RAY_ADDRESS={text} is not allowed: use HOST:PORT of the GCS, `auto` or `local`")
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.netloc != text:
        raise ValueError(f"RAY_ADDRESS={text} is not allowed: use HOST:PORT of the GCS, `auto` or `local`")
    return text


def check_listening(address: str) -> None:
    """Raise ConnectionError with the reason unless a gRPC server, as the GCS is one, responds at `address`."""
    parts = urlsplit(f"//{address}")
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=TCP_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(error.strerror or str(error)) from None
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # the handshake needs the cluster's certificates
    import grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:  # as Ray connects
        try:
            grpc.channel_ready_future(channel).result(timeout=GRPC_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            raise ConnectionError("the server on this port is not a Ray GCS") from None


def connect(target: RayTarget, cpus: int, name: str = "") -> RayConnection:
    """Connect this process to `target`; a local Ray has at least `cpus` CPUs.

    `name` is shown with the job in Ray's dashboard. A process that is connected already stays as it is.
    Raises ConnectionError if Ray refuses the connection.
    """
    if not ray.is_initialized():
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if name and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # a submitted job has a name already
            options["job_config"] = JobConfig(metadata={"job_name": name})
        try:
            if target.address:
                ray.init(address=target.address, **options)
            else:
                with _hangup_ignored():
                    ray.init("local", num_cpus=max(os.cpu_count() or 1, cpus), include_dashboard=False, **options)
        except Exception as error:  # a Ray that does not start in time raises a plain Exception
            where = f"Ray at {target.address} refused the connection" if target.address else "Ray did not start"
            raise ConnectionError(f"{where}: {' '.join(str(error).split())[:1000]}") from None
    alive = [node for node in ray.nodes() if node["Alive"]]
    resources = ray.cluster_resources()
    owner = _owner(target.address) if target.address else ""
    return RayConnection(target, owner, len(alive), resources.get("CPU", 0), resources.get("GPU", 0))


@contextmanager
def _hangup_ignored() -> Iterator[None]:
    """Processes that start here inherit that SIGHUP is ignored: a closed terminal must not end Ray before the run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _owner(address: str) -> str:
    """Return the user of the GCS process on this machine that listens on the port of `address`; empty if none does."""
    port = str(urlsplit(f"//{address}").port)
    for process in psutil.process_iter(["name", "cmdline", "username"]):
        with contextlib.suppress(psutil.Error):
            line = process.info["cmdline"] or []
            if "gcs_server" in (process.info["name"] or "") and any(word.endswith(f"port={port}") for word in line):
                return process.info["username"] or ""
    return ""
