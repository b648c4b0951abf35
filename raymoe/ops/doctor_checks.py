"""What goes wrong before a long run, as pure functions: what was seen on the nodes in, verdicts with advice out.

An observation is a dict as `raymoe.ops.doctor.Probe` gives it, one for each node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]
Node = dict[str, Any]
GB = 1e9
RANK = {"ok": 0, "warn": 1, "fail": 2}


@dataclass(frozen=True)
class Check:
    status: Status
    name: str
    seen: str
    advice: str = ""
    """What to do. Empty when all is well."""

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.name:<11} {self.seen}" + (f"  -> {self.advice}" if self.advice else "")


def exit_status(checks: Iterable[Check]) -> int:
    """1 when any failed."""
    return int(any(check.status == "fail" for check in checks))


def size(count: float) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.0f} MB"


def least(
    name: str, nodes: list[Node], key: str, warn: float, fail: float, advice: str, show: Callable[[Any], str] = size
) -> Check:
    """The node that has the least of something decides."""
    node = min(nodes, key=lambda n: n[key])
    value = node[key]
    status: Status = "fail" if value < fail else "warn" if value < warn else "ok"
    return Check(status, name, f"{show(value)} on {node['node']}" + ("" if len(nodes) == 1 else ", the least"), "" if status == "ok" else advice)  # fmt: skip


def alike(nodes: list[Node], key: str) -> str:
    """The one value that all nodes have, or who has which."""
    values = sorted({str(n[key]) for n in nodes})
    if len(values) == 1:
        return values[0]
    return "; ".join(f"{v} on {', '.join(n['node'] for n in nodes if str(n[key]) == v)}" for v in values)


def reached(expected: list[str], failures: dict[str, str]) -> Check:
    """Whether each node ran what it was asked to run; `failures` says of a node why not."""
    if not failures:
        return Check("ok", "nodes", f"{len(expected)} answered")
    seen = "; ".join(f"{node}: {why}" for node, why in failures.items())
    return Check(
        "fail", "nodes", seen, "look at `ray status` and the node's logs; raymoe must be installed on each node"
    )


def versions(nodes: list[Node]) -> Check:
    parts = {key: alike(nodes, key) for key in ("python", "ray", "torch", "raymoe")}
    seen = ", ".join(f"{key} {value}" for key, value in parts.items())
    if any(";" in value for value in parts.values()):
        return Check("fail", "versions", seen, "set up all nodes from one image, or with `make setup` of one checkout")
    return Check("ok", "versions", seen)


def lock(nodes: list[Node]) -> Check:
    """Each node's packages against uv.lock beside raymoe; `off_lock` is None where there is no such file."""
    off = {n["node"]: n["off_lock"] for n in nodes if n["off_lock"]}
    if off:
        seen = "; ".join(f"{', '.join(what)} on {node}" for node, what in off.items())
        return Check("warn", "lock", f"other than locked: {seen}", "make setup")
    if all(n["off_lock"] is None for n in nodes):
        return Check("ok", "lock", "no uv.lock beside raymoe: installed as a package")
    return Check("ok", "lock", "packages are those of uv.lock")


def ports(nodes: list[Node]) -> Check:
    """Whether each node reaches Ray's ports on the others, and Serve's port is free or answers."""
    closed = [f"{n['node']} cannot reach {target}" for n in nodes for target in n["unreachable"]]
    if closed:
        return Check("fail", "ports", "; ".join(closed[:4]), "open all ports between the nodes (security group, NetworkPolicy, firewall)")  # fmt: skip
    taken = [n["node"] for n in nodes if n["serve_port"] == "taken"]
    if taken:
        return Check("warn", "ports", f"8000 is taken on {', '.join(taken)}, and not by Serve", "free it before `make serve`, or set http_options.port")  # fmt: skip
    return Check("ok", "ports", "Ray's ports reach from each node to each, 8000 is free or Serve's")


def shm(nodes: list[Node]) -> Check:
    advice = "docker run --shm-size=2g, or an emptyDir with medium: Memory at /dev/shm: Ray's object store falls back to the disk"  # fmt: skip
    return least("shm", nodes, "shm", 1 * GB, 0, advice)


def open_files(nodes: list[Node]) -> Check:
    return least("open files", nodes, "open_files", 8192, 1024, "ulimit -n 65536 before `ray start`", str)


def root(nodes: list[Node]) -> Check:
    """`root_error` of a node, or the `markers` of nodes that it saw in run.root."""
    broken = [f"{n['node']}: {n['root_error']}" for n in nodes if n["root_error"]]
    if broken:
        return Check("fail", "run.root", "; ".join(broken), "choose a folder that every node can write: run.root=… or RAYMOE_HOME")  # fmt: skip
    names = {n["node"] for n in nodes}
    blind = [f"{n['node']} does not see what {', '.join(sorted(names - set(n['markers'])))} wrote" for n in nodes if names - set(n["markers"])]  # fmt: skip
    path = alike(nodes, "root")
    if blind:
        return Check("fail", "run.root", f"{path}: {'; '.join(blind)}", "mount one file system (NFS, EFS) there on all nodes")  # fmt: skip
    return Check("ok", "run.root", f"{path} can be written" + (f" and is shared by {len(nodes)} nodes" if len(nodes) > 1 else ""))  # fmt: skip


def disk(nodes: list[Node]) -> Check:
    full = [f"{n['node']}: {n['temp_used']:.0%} of {n['temp']}" for n in nodes if n["temp_used"] > 0.95]
    if full:
        return Check("fail", "disk", "; ".join(full), "free space there: Ray stops placing work on a disk over 95 %")
    return least("disk", nodes, "root_free", 20 * GB, 2 * GB, "free space under run.root, or lower checkpoint.keep")


def memory(nodes: list[Node]) -> Check:
    return least("memory", nodes, "memory", 4 * GB, 1.5 * GB, "a worker takes 1 GB before the model: end others, or take larger nodes")  # fmt: skip


def clock(offsets: dict[str, float]) -> Check:
    """Seconds by which each node's clock is ahead of this one's."""
    skew = max(offsets.values()) - min(offsets.values())
    status: Status = "fail" if skew > 5 else "warn" if skew > 0.5 else "ok"
    advice = "" if status == "ok" else "run chrony or systemd-timesyncd on all nodes"
    return Check(status, "clock", f"{skew * 1e3:.0f} ms between the nodes", advice)


def gpus(nodes: list[Node], in_ray: float) -> Check:
    """`gpus` that torch can use on each node, beside those that Ray counts."""
    usable = sum(n["gpus"] for n in nodes)
    if not in_ray and not usable:
        return Check("ok", "gpu", "none: training on CPUs with gloo")
    seen = f"{in_ray:g} in Ray, {usable} that torch can use, NCCL {alike(nodes, 'nccl') or 'none'}"
    if usable < in_ray:
        without = ", ".join(n["node"] for n in nodes if not n["gpus"])
        return Check("fail", "gpu", seen, f"install a torch with CUDA (make setup) and the driver on {without or 'all nodes'}")  # fmt: skip
    if usable > in_ray:
        return Check("warn", "gpu", seen, "start Ray with --num-gpus, else these stay idle")
    if any(n["gpus"] and not n["nccl"] for n in nodes):
        return Check("fail", "gpu", seen, "this torch has no NCCL: make setup, or train.gpu=no")
    return Check("ok", "gpu", seen)


def authentication(nodes: list[Node]) -> Check:
    mode = alike(nodes, "auth")
    if ";" in mode:
        return Check("fail", "auth", mode, "set RAY_AUTH_MODE to the same on all nodes")
    if mode != "token" and len(nodes) > 1:
        return Check("warn", "auth", f"{mode}: whoever reaches Ray's ports runs code", "RAY_AUTH_MODE=token and `ray get-auth-token --generate`, on all nodes")  # fmt: skip
    return Check("ok", "auth", mode)


def bytecode(nodes: list[Node]) -> Check:
    without = [n["node"] for n in nodes if not n["compiled"]]
    if without:
        return Check("warn", "bytecode", f"not compiled on {', '.join(without)}: each process starts twice as slowly", "make setup, or python -m compileall -q -j 0 SITE-PACKAGES")  # fmt: skip
    return Check("ok", "bytecode", "compiled")


def compiler(nodes: list[Node]) -> Check:
    without = [n["node"] for n in nodes if not n["compiler"]]
    if without:
        return Check("warn", "compiler", f"no C compiler on {', '.join(without)}", "apt-get install gcc: optional, what it builds is faster")  # fmt: skip
    return Check("ok", "compiler", alike(nodes, "compiler"))


def collective(found: Node | str, backend: str = "gloo") -> Check:
    """An all-to-all between workers: {world, nodes, latency_ms, mb_per_s}, or why there was none."""
    if isinstance(found, str):
        busy = found.startswith("no room")
        advice = "wait for the cluster to be idle, or add nodes" if busy else (
            "open all ports between nodes; GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the interface that joins them"
        )  # fmt: skip
        return Check("warn" if busy else "fail", backend, found, advice)
    seen = (
        f"all-to-all of {found['world']} workers on {found['nodes']} node{'s' * (found['nodes'] > 1)}: "
        f"{found['latency_ms']:.1f} ms, {found['mb_per_s']:.0f} MB/s each"
    )
    slow = found["latency_ms"] > 20 or found["mb_per_s"] < 50
    return Check("warn" if slow else "ok", backend, seen, "place the nodes in one zone, or use fewer workers" if slow else "")  # fmt: skip


def on_nodes(nodes: list[Node]) -> list[Check]:
    """What can be said from the nodes' observations alone."""
    of_each = (versions, lock, ports, open_files, shm, memory, root, disk, authentication, bytecode, compiler)
    return [check(nodes) for check in of_each]
