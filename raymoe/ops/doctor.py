"""Looks at every node of a Ray cluster: one probe a node, then an all-to-all between workers. Judged in `checks`."""

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
from ray._private import worker as ray_worker
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

import raymoe
from raymoe.ops import doctor_checks as checks
from raymoe.ops.doctor_checks import Check

PATIENCE_S = 60.0
"""How long a node has to answer."""
SHARED_S = 10.0
"""How long a file may take to be seen by other nodes: NFS keeps what it knows of a folder for some seconds."""
LOCKED = ("ray", "torch", "numpy", "pyarrow", "safetensors")


class Probe:
    """An actor, one on each node."""

    def __init__(self, node: str, root: str, token: str) -> None:
        self.node, self.root, self.token = node, Path(root), token

    def now(self) -> float:
        return time.time()

    def observe(self, peers: list[tuple[str, int]]) -> dict[str, Any]:
        """All that this node can say by itself, and which (address, port) of `peers` it cannot reach."""
        shared = Path("/dev/shm")
        temp = Path(ray_worker._global_node.get_temp_dir_path() if ray_worker._global_node else "/tmp")
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
            "root": str(self.root), "root_error": self.write(), "root_free": free(self.root),
            "temp": str(temp), "temp_used": used(temp),
            "auth": authentication(),
            "compiled": all(Path(importlib.util.cache_from_source(str(m.__file__))).exists() for m in (torch, ray)),
            "compiler": shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or "",
            "gpus": torch.cuda.device_count(), "nccl": nccl(),
        }  # fmt: skip

    def write(self) -> str:
        """Leave this node's marker in run.root; the error, or nothing."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.marker(self.node).write_text(self.node)
        except OSError as error:
            return f"{self.root}: {error.strerror}"
        return ""

    def marker(self, node: str) -> Path:
        return self.root / f".doctor-{self.token}-{node}"

    def markers(self, nodes: list[str]) -> list[str]:
        """Whose markers are seen here, when all are or after a while."""
        deadline = time.monotonic() + SHARED_S
        while True:
            seen = [n for n in nodes if self.marker(n).exists()]
            if len(seen) == len(nodes) or time.monotonic() > deadline:
                return seen
            with contextlib.suppress(OSError):  # where there is none, `write` has said so
                os.listdir(self.root)  # makes NFS look again
            time.sleep(0.1)

    def clean(self) -> None:
        with contextlib.suppress(OSError):
            self.marker(self.node).unlink()
            self.root.rmdir()  # only when it is empty: as it was


def off_lock(path: Path) -> list[str] | None:
    """Packages that are installed in another version than uv.lock says; None without such a file."""
    if not path.is_file():
        return None
    locked: dict[str, set[str]] = {}  # a package may be there twice, for several Pythons
    for name, version in re.findall(r'^name = "([^"]+)"\nversion = "([^"]+)"', path.read_text(), re.MULTILINE):
        locked.setdefault(name, set()).add(version)
    found = {name: importlib.metadata.version(name).split("+")[0] for name in LOCKED}
    return [
        f"{name} {found[name]} for {' or '.join(sorted(locked[name]))}"
        for name in LOCKED
        if name in locked and found[name] not in locked[name]
    ]


def reachable(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=3):
            return True
    except OSError:
        return False


def serve_port(port: int) -> str:
    """`free`, `serve` or `taken`."""
    try:
        with socket.create_server(("127.0.0.1", port)):
            return "free"
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return "free"
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/healthz", timeout=2) as answer:
            return "serve" if answer.status == 200 else "taken"
    except (OSError, ValueError):
        return "taken"


def available_memory() -> float:
    """Bytes that are free here, within the container's limit."""
    free_here = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        most = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if most != "max":
            free_here = min(free_here, float(most) - float(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free_here


def free(folder: Path) -> float:
    """Bytes on the disk of the folder, or of what there is of its parents."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return float(shutil.disk_usage(there).free)


def used(folder: Path) -> float:
    usage = shutil.disk_usage(folder if folder.exists() else "/")
    return usage.used / usage.total


def authentication() -> str:
    from ray import _raylet

    known: Any = _raylet

    return "token" if known.get_authentication_mode() == known.AuthenticationMode.TOKEN else "disabled"


def nccl() -> str:
    if not torch.cuda.is_available() or not dist.is_nccl_available():
        return ""
    from torch.cuda import nccl as library

    return ".".join(map(str, library.version()))


def rendezvous() -> tuple[str, int]:
    """An address of this worker's node, and a port that is free there."""
    host = ray.util.get_node_ip_address()
    with socket.create_server((host, 0)) as held:
        return host, held.getsockname()[1]


def exchange(rank: int, world: int, host: str, port: int, backend: str) -> tuple[str, float, float]:
    """All-to-alls as training makes them: the node, and the median milliseconds of small and MB/s of large ones."""
    device = "cuda" if backend == "nccl" else "cpu"
    address = f"tcp://{host}:{port}"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    try:

        def median(numbers: int, times: int) -> float:
            mine, theirs = torch.ones(world * numbers, device=device), torch.empty(world * numbers, device=device)
            took = []
            for _ in range(times):
                dist.barrier()
                began = time.perf_counter()
                dist.all_to_all_single(theirs, mine)
                if device == "cuda":
                    torch.cuda.synchronize()
                took.append(time.perf_counter() - began)
            assert bool((theirs == 1).all())
            return statistics.median(took)

        median(256, 3)
        latency = median(256, 30)
        numbers = 1 << 20
        speed = (world - 1) * numbers * 4 / median(numbers, 7) / 1e6
    finally:
        dist.destroy_process_group()
    return ray.get_runtime_context().get_node_id(), latency * 1e3, speed


def collective(world: int, backend: str) -> dict[str, Any] | str:
    """What an all-to-all over a placement group of `world` workers, spread over nodes, costs; or why there was none."""
    bundle = {"CPU": 1.0} | ({"GPU": 1.0} if backend == "nccl" else {})
    group = placement_group([bundle] * world, strategy="SPREAD")
    try:
        if not group.wait(15):
            return f"no room for {world} workers"

        def place(i: int) -> dict[str, Any]:
            strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=i)
            return {"num_cpus": 1, "num_gpus": bundle.get("GPU", 0), "scheduling_strategy": strategy, "max_retries": 0}

        host, port = ray.get(ray.remote(rendezvous).options(**place(0)).remote(), timeout=PATIENCE_S)
        task: Any = ray.remote(exchange)
        answers = [task.options(**place(rank)).remote(rank, world, host, port, backend) for rank in range(world)]
        nodes, latencies, speeds = zip(*ray.get(answers, timeout=2 * PATIENCE_S), strict=True)
        return {"world": world, "nodes": len(set(nodes)), "latency_ms": max(latencies), "mb_per_s": min(speeds)}
    except ray.exceptions.GetTimeoutError:
        return f"{world} workers did not find each other in {2 * PATIENCE_S:.0f} s"
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[-1]
    finally:
        remove_placement_group(group)


def offset(probe: Any) -> float:
    """Seconds by which a node's clock is ahead, from the quickest of some answers."""
    best, ahead = float("inf"), 0.0
    for _ in range(5):
        before = time.time()
        there: Any = ray.get(probe.now.remote(), timeout=PATIENCE_S)
        after = time.time()
        if after - before < best:
            best, ahead = after - before, there - (before + after) / 2
    return ahead


def examine(root: str) -> list[Check]:
    """All checks on the Ray that this process is connected to."""
    alive = [n for n in ray.nodes() if n["Alive"]]
    by_address = len({n["NodeManagerAddress"] for n in alive}) == len(alive)
    names = {n["NodeID"]: n["NodeManagerAddress"] if by_address else f"{n['NodeManagerAddress']}-{n['NodeID'][-6:]}" for n in alive}  # fmt: skip
    token = uuid.uuid4().hex[:8]
    actor: Any = ray.remote(Probe)
    probes: dict[str, Any] = {
        names[n["NodeID"]]: actor.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)
        ).remote(names[n["NodeID"]], root, token)
        for n in alive
    }
    ports = [(n["NodeManagerAddress"], n[key]) for n in alive for key in ("NodeManagerPort", "ObjectManagerPort")]
    asked = {node: probe.observe.remote(ports) for node, probe in probes.items()}
    nodes, failures = [], {}
    deadline = time.monotonic() + PATIENCE_S
    for node, answer in asked.items():
        try:
            nodes.append(ray.get(answer, timeout=max(1.0, deadline - time.monotonic())))
        except ray.exceptions.GetTimeoutError:
            failures[node] = f"no answer in {PATIENCE_S:.0f} s"
        except ray.exceptions.RayError as error:
            failures[node] = str(error).strip().splitlines()[-1]
    found = [checks.reached(list(probes), failures)]
    if nodes:
        well = {n["node"]: probes[n["node"]] for n in nodes}
        seen = ray.get([probe.markers.remote(list(well)) for probe in well.values()], timeout=PATIENCE_S)
        for node, markers in zip(nodes, seen, strict=True):
            node["markers"] = markers
        found += checks.on_nodes(nodes)
        found.append(checks.clock({node: offset(probe) for node, probe in well.items()}))
        in_ray = ray.cluster_resources().get("GPU", 0)
        found.append(checks.gpus(nodes, in_ray))
        ray.get([probe.clean.remote() for probe in well.values()], timeout=PATIENCE_S)
        workers = sum(1 for n in alive if n["Resources"].get("CPU", 0) >= 1)
        found.append(checks.collective(collective(max(2, workers), "gloo")))
        if in_ray >= 2:
            found.append(checks.collective(collective(int(in_ray), "nccl"), "nccl"))
    for probe in probes.values():
        ray.kill(probe)
    return found
