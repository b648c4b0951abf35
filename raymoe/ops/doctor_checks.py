"""Verdicts on what commonly fails before a long run: observations of the nodes in, checks with advice out.

Pure functions. An observation is the dict of one node that `raymoe.ops.doctor.Probe.observe` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]
Node = dict[str, Any]
GB = 1e9


@dataclass(frozen=True)
class Check:
    """One line of the doctor's output."""

    status: Status
    name: str
    seen: str
    advice: str = ""
    """What to do. Empty for status `ok`."""

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.name:<11} {self.seen}" + (f"  -> {self.advice}" if self.advice else "")


def exit_status(checks: Iterable[Check]) -> int:
    """Return 1 if any check failed, else 0."""
    return int(any(check.status == "fail" for check in checks))


def size(count: float) -> str:
    """Return a number of bytes as text."""
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.0f} MB"


def minimum(
    name: str, nodes: list[Node], key: str, warn: float, fail: float, advice: str, show: Callable[[Any], str] = size
) -> Check:
    """Judge the node with the smallest value of `key`: below `fail` it fails, below `warn` it is a warning."""
    node = min(nodes, key=lambda n: n[key])
    value = node[key]
    status: Status = "fail" if value < fail else "warn" if value < warn else "ok"
    seen = f"{show(value)} on {node['node']}" + ("" if len(nodes) == 1 else ", the minimum of all nodes")
    return Check(status, name, seen, "" if status == "ok" else advice)


def values_of(nodes: list[Node], key: str) -> str:
    """Return the one value that all nodes have, or each value with its nodes, separated by semicolons."""
    values = sorted({str(n[key]) for n in nodes})
    if len(values) == 1:
        return values[0]
    return "; ".join(f"{v} on {', '.join(n['node'] for n in nodes if str(n[key]) == v)}" for v in values)


def reached(expected: list[str], failures: dict[str, str]) -> Check:
    """Judge whether each node ran its probe; `failures` maps a node to the reason."""
    if not failures:
        return Check("ok", "nodes", f"{len(expected)} responded")
    seen = "; ".join(f"{node}: {reason}" for node, reason in failures.items())
    return Check("fail", "nodes", seen, "read `ray status` and the node's logs; install raymoe on each node")


def versions(nodes: list[Node]) -> Check:
    """Judge whether all nodes have the same versions."""
    parts = {key: values_of(nodes, key) for key in ("python", "ray", "torch", "raymoe")}
    seen = ", ".join(f"{key} {value}" for key, value in parts.items())
    if any(";" in value for value in parts.values()):
        return Check("fail", "versions", seen, "set up all nodes from one image, or with `make setup` of one checkout")
    return Check("ok", "versions", seen)


def lock(nodes: list[Node]) -> Check:
    """Judge each node's packages against uv.lock beside raymoe; `off_lock` is None without that file."""
    off = {n["node"]: n["off_lock"] for n in nodes if n["off_lock"]}
    if off:
        seen = "; ".join(f"{', '.join(packages)} on {node}" for node, packages in off.items())
        return Check("warn", "lock", f"differs from uv.lock: {seen}", "make setup")
    if all(n["off_lock"] is None for n in nodes):
        return Check("ok", "lock", "no uv.lock beside raymoe: installed as a package")
    return Check("ok", "lock", "packages match uv.lock")


def ports(nodes: list[Node]) -> Check:
    """Judge whether each node reaches Ray's ports on the others, and whether Serve's port is free or Serve's."""
    closed = [f"{n['node']} cannot reach {target}" for n in nodes for target in n["unreachable"]]
    if closed:
        advice = "open all ports between the nodes (security group, NetworkPolicy, firewall)"
        return Check("fail", "ports", "; ".join(closed[:4]), advice)
    taken = [n["node"] for n in nodes if n["serve_port"] == "taken"]
    if taken:
        seen = f"8000 is taken on {', '.join(taken)} by another program than Serve"
        return Check("warn", "ports", seen, "free the port before `make serve`, or set http_options.port")
    return Check("ok", "ports", "Ray's ports are open between all nodes; 8000 is free or Serve's")


def shm(nodes: list[Node]) -> Check:
    """Judge the shared memory, which holds Ray's object store."""
    advice = "docker run --shm-size=2g, or an emptyDir with medium: Memory at /dev/shm; Ray's object store is on disk instead"
    return minimum("shm", nodes, "shm", 1 * GB, 0, advice)


def open_files(nodes: list[Node]) -> Check:
    """Judge the limit of open files."""
    return minimum("open files", nodes, "open_files", 8192, 1024, "ulimit -n 65536 before `ray start`", str)


def root(nodes: list[Node]) -> Check:
    """Judge whether every node can write run.root (`root_error`) and reads the files of the others (`markers`)."""
    broken = [f"{n['node']}: {n['root_error']}" for n in nodes if n["root_error"]]
    if broken:
        advice = "choose a folder that every node can write: run.root=… or RAYMOE_HOME"
        return Check("fail", "run.root", "; ".join(broken), advice)
    names = {n["node"] for n in nodes}
    blind = [
        f"{n['node']} does not see the files of {', '.join(sorted(names - set(n['markers'])))}"
        for n in nodes
        if names - set(n["markers"])
    ]
    path = values_of(nodes, "root")
    if blind:
        advice = "mount one file system (NFS, EFS) there on all nodes"
        return Check("fail", "run.root", f"{path}: {'; '.join(blind)}", advice)
    shared = f" and is shared by {len(nodes)} nodes" if len(nodes) > 1 else ""
    return Check("ok", "run.root", f"{path} can be written{shared}")


def disk(nodes: list[Node]) -> Check:
    """Judge the free space under run.root, and the use of the disk of Ray's session."""
    full = [f"{n['node']}: {n['temp_used']:.0%} of {n['temp']}" for n in nodes if n["temp_used"] > 0.95]
    if full:
        advice = "free space there: Ray places no work on a node whose disk is over 95 % full"
        return Check("fail", "disk", "; ".join(full), advice)
    return minimum("disk", nodes, "root_free", 20 * GB, 2 * GB, "free space under run.root, or lower checkpoint.keep")


def memory(nodes: list[Node]) -> Check:
    """Judge the available memory."""
    advice = "a worker needs 1 GB before the model: end other processes, or use larger nodes"
    return minimum("memory", nodes, "memory", 4 * GB, 1.5 * GB, advice)


def clock(offsets: dict[str, float]) -> Check:
    """Judge the difference of the clocks. `offsets`: seconds by which each node's clock is ahead of this one's."""
    skew = max(offsets.values()) - min(offsets.values())
    status: Status = "fail" if skew > 5 else "warn" if skew > 0.5 else "ok"
    advice = "" if status == "ok" else "run chrony or systemd-timesyncd on all nodes"
    return Check(status, "clock", f"{skew * 1e3:.0f} ms between the nodes", advice)


def gpus(nodes: list[Node], in_ray: float) -> Check:
    """Judge the GPUs that torch can use on each node against the number that Ray has."""
    usable = sum(n["gpus"] for n in nodes)
    if not in_ray and not usable:
        return Check("ok", "gpu", "none: training runs on CPUs with gloo")
    seen = f"{in_ray:g} in Ray, {usable} usable by torch, NCCL {values_of(nodes, 'nccl') or 'none'}"
    if usable < in_ray:
        without = ", ".join(n["node"] for n in nodes if not n["gpus"]) or "all nodes"
        return Check("fail", "gpu", seen, f"install a torch with CUDA (make setup) and the driver on {without}")
    if usable > in_ray:
        return Check("warn", "gpu", seen, "start Ray with --num-gpus, or these GPUs stay idle")
    if any(n["gpus"] and not n["nccl"] for n in nodes):
        return Check("fail", "gpu", seen, "this torch has no NCCL: make setup, or set train.gpu=no")
    return Check("ok", "gpu", seen)


def authentication(nodes: list[Node]) -> Check:
    """Judge Ray's authentication mode."""
    mode = values_of(nodes, "auth")
    if ";" in mode:
        return Check("fail", "auth", mode, "set RAY_AUTH_MODE to the same value on all nodes")
    if mode != "token" and len(nodes) > 1:
        seen = f"{mode}: any client that reaches Ray's ports can run code"
        return Check("warn", "auth", seen, "RAY_AUTH_MODE=token and `ray get-auth-token --generate`, on all nodes")
    return Check("ok", "auth", mode)


def bytecode(nodes: list[Node]) -> Check:
    """Judge whether the packages are compiled to bytecode."""
    without = [n["node"] for n in nodes if not n["compiled"]]
    if without:
        seen = f"not compiled on {', '.join(without)}: each process starts twice as slowly"
        return Check("warn", "bytecode", seen, "make setup, or python -m compileall -q -j 0 SITE-PACKAGES")
    return Check("ok", "bytecode", "compiled")


def compiler(nodes: list[Node]) -> Check:
    """Judge whether a C compiler is there, for the optional native kernels."""
    without = [n["node"] for n in nodes if not n["compiler"]]
    if without:
        seen = f"no C compiler on {', '.join(without)}: serving computes without the native kernels"
        return Check("warn", "compiler", seen, "apt-get install gcc (optional, faster)")
    return Check("ok", "compiler", values_of(nodes, "compiler"))


def collective(found: Node | str, backend: str = "gloo") -> Check:
    """Judge an all-to-all between workers: {world, nodes, latency_ms, mb_per_s}, or the reason why it did not run."""
    if isinstance(found, str):
        busy = found.startswith("no room")
        advice = "wait until the cluster is idle, or add nodes" if busy else (
            "open all ports between nodes; set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the interface that joins them"
        )  # fmt: skip
        return Check("warn" if busy else "fail", backend, found, advice)
    seen = (
        f"all-to-all of {found['world']} workers on {found['nodes']} node{'s' * (found['nodes'] > 1)}: "
        f"{found['latency_ms']:.1f} ms, {found['mb_per_s']:.0f} MB/s each"
    )
    slow = found["latency_ms"] > 20 or found["mb_per_s"] < 50
    advice = "place the nodes in one zone, or use fewer workers" if slow else ""
    return Check("warn" if slow else "ok", backend, seen, advice)


def check_nodes(nodes: list[Node]) -> list[Check]:
    """Return the checks that need only the observations of the nodes."""
    checks = (versions, lock, ports, open_files, shm, memory, root, disk, authentication, bytecode, compiler)
    return [check(nodes) for check in checks]
