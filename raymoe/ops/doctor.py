"""Examination of a Ray cluster: one probe on each node, then an all-to-all between workers.

The verdicts are in `doctor_checks`.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import statistics
import time
import urllib.request
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.exceptions
import torch
import torch.distributed as dist
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

import raymoe
from raymoe.ops import doctor_checks as checks
from raymoe.ops.doctor_checks import Check
from raymoe.ops.ray_internals import authentication_mode, session_folder

NODE_TIMEOUT_S = 60.0
"""Seconds within which a node must respond."""
SHARED_TIMEOUT_S = 10.0
"""Seconds until a new file must be visible on every node: NFS caches the content of folders for some seconds."""
LOCKED = ("ray", "torch", "numpy", "pyarrow", "safetensors")


class Probe:
    """Actor that observes its node; one on each node."""

    def __init__(self, node: str, root: str, token: str) -> None:
        self.node, self.root, self.token = node, Path(root), token

    def now(self) -> float:
        """Return this node's time in seconds since the epoch."""
        return time.time()

    def observe(self, peers: list[tuple[str, int]]) -> dict[str, Any]:
        """Return the observation of this node; `peers` are the (address, port) pairs that it must reach."""
        shared = Path("/dev/shm")
        temp = session_folder()
        return {
            "node": self.node,
            "python": platform.python_version(), "ray": ray.__version__, "torch": torch.__version__,
            "raymoe": raymoe.__version__,
            "off_lock": off_lock(Path(raymoe.__file__).parent.parent / "uv.lock"),
            "unreachable": [f"{host}:{port}" for host, port in peers if not reachable(host, port)],
            "serve_port": serve_port(8000),
            "shm": shutil.disk_usage(shared).total if shared.exists() else 2e9,  # macOS has none and needs none
            "open_files": min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 30) % (1 << 31),
            "memory": available_memory(),
            "root": str(self.root), "root_error": self.write_marker(), "root_free": free_space(self.root),
            "temp": str(temp), "temp_used": used_share(temp),
            "auth": authentication_mode(),
            "compiled": all(Path(importlib.util.cache_from_source(str(m.__file__))).exists() for m in (torch, ray)),
            "compiler": shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or "",
            "gpus": torch.cuda.device_count(), "nccl": nccl(),
        }  # fmt: skip

    def write_marker(self) -> str:
        """Write this node's marker file into run.root; return the error, empty on success."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.marker(self.node).write_text(self.node)
        except OSError as error:
            return f"{self.root}: {error.strerror}"
        return ""

    def marker(self, node: str) -> Path:
        """Return the path of a node's marker file."""
        return self.root / f".doctor-{self.token}-{node}"

    def markers(self, nodes: list[str]) -> list[str]:
        """Return the `nodes` whose markers are visible here, at the latest after SHARED_TIMEOUT_S."""
        deadline = time.monotonic() + SHARED_TIMEOUT_S
        while True:
            seen = [n for n in nodes if self.marker(n).exists()]
            if len(seen) == len(nodes) or time.monotonic() > deadline:
                return seen
            with contextlib.suppress(OSError):  # `write_marker` has reported a missing folder
                os.listdir(self.root)  # makes an NFS client read the folder again
            time.sleep(0.1)

    def clean(self) -> None:
        """Remove the marker, and run.root if it was empty."""
        with contextlib.suppress(OSError):
            self.marker(self.node).unlink()
            self.root.rmdir()  # fails unless the folder is empty


def off_lock(path: Path) -> list[str] | None:
    """Return the packages whose installed version differs from uv.lock; None without that file."""
    if not path.is_file():
        return None
    locked: dict[str, set[str]] = {}  # several versions for several Pythons
    for name, version in re.findall(r'^name = "([^"]+)"\nversion = "([^"]+)"', path.read_text(), re.MULTILINE):
        locked.setdefault(name, set()).add(version)
    found = {name: importlib.metadata.version(name).split("+")[0] for name in LOCKED}
    return [
        f"{name} {found[name]} for {' or '.join(sorted(locked[name]))}"
        for name in LOCKED
        if name in locked and found[name] not in locked[name]
    ]


def reachable(host: str, port: int) -> bool:
    """Return whether a TCP connection opens within 3 s."""
    try:
        with socket.create_connection((host, port), timeout=3):
            return True
    except OSError:
        return False


def serve_port(port: int) -> str:
    """Return the state of the HTTP port of Serve: `free`, `serve` or `taken`."""
    try:
        with socket.create_server(("127.0.0.1", port)):
            return "free"
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return "free"
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/healthz", timeout=2) as response:
            return "serve" if response.status == 200 else "taken"
    except (OSError, ValueError):
        return "taken"


def available_memory() -> float:
    """Return the available memory in bytes, within the limit of the container."""
    available = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            available = min(available, float(limit) - float(Path("/sys/fs/cgroup/memory.current").read_text()))
    return available


def free_space(folder: Path) -> float:
    """Return the free bytes on the disk of `folder`, or of its nearest parent that exists."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return float(shutil.disk_usage(existing).free)


def used_share(folder: Path) -> float:
    """Return the used share of the disk of `folder`, from 0 to 1."""
    usage = shutil.disk_usage(folder if folder.exists() else "/")
    return usage.used / usage.total


def nccl() -> str:
    """Return the version of NCCL that torch can use; empty without one."""
    if not torch.cuda.is_available() or not dist.is_nccl_available():
        return ""
    from torch.cuda import nccl as library

    return ".".join(map(str, library.version()))


def rendezvous() -> tuple[str, int]:
    """Return an address of this worker's node, and a free port there."""
    host = ray.util.get_node_ip_address()
    with socket.create_server((host, 0)) as bound:
        return host, bound.getsockname()[1]


def exchange(rank: int, world: int, host: str, port: int, backend: str) -> tuple[str, float, float]:
    """Run all-to-alls as training does; return the node, the median ms of small ones and the MB/s of large ones."""
    device = "cuda" if backend == "nccl" else "cpu"
    address = f"tcp://{host}:{port}"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    try:

        def median(numbers: int, times: int) -> float:
            sent, received = torch.ones(world * numbers, device=device), torch.empty(world * numbers, device=device)
            durations = []
            for _ in range(times):
                dist.barrier()
                started = time.perf_counter()
                dist.all_to_all_single(received, sent)
                if device == "cuda":
                    torch.cuda.synchronize()
                durations.append(time.perf_counter() - started)
            assert bool((received == 1).all())
            return statistics.median(durations)

        median(256, 3)
        latency = median(256, 30)
        numbers = 1 << 20
        speed = (world - 1) * numbers * 4 / median(numbers, 7) / 1e6
    finally:
        dist.destroy_process_group()
    return ray.get_runtime_context().get_node_id(), latency * 1e3, speed


def collective(world: int, backend: str) -> dict[str, Any] | str:
    """Measure an all-to-all of `world` workers spread over the nodes; return its cost, or the reason why it did not run."""
    bundle = {"CPU": 1.0} | ({"GPU": 1.0} if backend == "nccl" else {})
    group = placement_group([bundle] * world, strategy="SPREAD")
    try:
        if not group.wait(15):
            return f"no room for {world} workers"

        def place(i: int) -> dict[str, Any]:
            strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=i)
            return {"num_cpus": 1, "num_gpus": bundle.get("GPU", 0), "scheduling_strategy": strategy, "max_retries": 0}

        host, port = ray.get(ray.remote(rendezvous).options(**place(0)).remote(), timeout=NODE_TIMEOUT_S)
        task: Any = ray.remote(exchange)
        results = [task.options(**place(rank)).remote(rank, world, host, port, backend) for rank in range(world)]
        nodes, latencies, speeds = zip(*ray.get(results, timeout=2 * NODE_TIMEOUT_S), strict=True)
        return {"world": world, "nodes": len(set(nodes)), "latency_ms": max(latencies), "mb_per_s": min(speeds)}
    except ray.exceptions.GetTimeoutError:
        return f"{world} workers did not find each other in {2 * NODE_TIMEOUT_S:.0f} s"
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[-1]
    finally:
        remove_placement_group(group)


def offset(probe: Any) -> float:
    """Return the seconds by which a node's clock is ahead, from the fastest of five calls."""
    best, ahead = float("inf"), 0.0
    for _ in range(5):
        before = time.time()
        remote: Any = ray.get(probe.now.remote(), timeout=NODE_TIMEOUT_S)
        after = time.time()
        if after - before < best:
            best, ahead = after - before, remote - (before + after) / 2
    return ahead


def examine(root: str) -> list[Check]:
    """Return all checks of the Ray that this process is connected to. `root`: run.root of the run to come."""
    alive = [n for n in ray.nodes() if n["Alive"]]
    probes = start_probes(alive, root)
    nodes, failures = observe(probes, alive)
    found = [checks.reached(list(probes), failures)]
    if nodes:
        responding = {n["node"]: probes[n["node"]] for n in nodes}
        seen = ray.get([p.markers.remote(list(responding)) for p in responding.values()], timeout=NODE_TIMEOUT_S)
        for node, markers in zip(nodes, seen, strict=True):
            node["markers"] = markers
        found += checks.check_nodes(nodes)
        found.append(checks.clock({node: offset(probe) for node, probe in responding.items()}))
        in_ray = ray.cluster_resources().get("GPU", 0)
        found.append(checks.gpus(nodes, in_ray))
        ray.get([probe.clean.remote() for probe in responding.values()], timeout=NODE_TIMEOUT_S)
        workers = sum(1 for n in alive if n["Resources"].get("CPU", 0) >= 1)
        found.append(checks.collective(collective(max(2, workers), "gloo")))
        if in_ray >= 2:
            found.append(checks.collective(collective(int(in_ray), "nccl"), "nccl"))
    for probe in probes.values():
        ray.kill(probe)
    return found


def start_probes(alive: list[dict[str, Any]], root: str) -> dict[str, Any]:
    """Start a probe on each node; return the actors by the node's address, with its id where addresses repeat."""
    addresses = [n["NodeManagerAddress"] for n in alive]
    unique = len(set(addresses)) == len(addresses)
    token = uuid.uuid4().hex[:8]
    actor: Any = ray.remote(Probe)
    probes: dict[str, Any] = {}
    for n in alive:
        name = n["NodeManagerAddress"] if unique else f"{n['NodeManagerAddress']}-{n['NodeID'][-6:]}"
        strategy = NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)
        probes[name] = actor.options(num_cpus=0, scheduling_strategy=strategy).remote(name, root, token)
    return probes


def observe(probes: dict[str, Any], alive: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the observations of the nodes that respond within NODE_TIMEOUT_S, and the reasons of the others."""
    ports = [(n["NodeManagerAddress"], n[key]) for n in alive for key in ("NodeManagerPort", "ObjectManagerPort")]
    calls = {node: probe.observe.remote(ports) for node, probe in probes.items()}
    nodes, failures = [], {}
    deadline = time.monotonic() + NODE_TIMEOUT_S
    for node, call in calls.items():
        try:
            nodes.append(ray.get(call, timeout=max(1.0, deadline - time.monotonic())))
        except ray.exceptions.GetTimeoutError:
            failures[node] = f"no response within {NODE_TIMEOUT_S:.0f} s"
        except ray.exceptions.RayError as error:
            failures[node] = str(error).strip().splitlines()[-1]
    return nodes, failures
