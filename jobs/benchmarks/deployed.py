"""Serving on a real Ray Serve: parts `http`, `planes` and `memory` of `jobs/benchmark.py serve`.

`http`: applications of one artifact with all, half and none of the clusters resident, one at a time and alternating,
so that idle processes do not affect the others. `planes`: round trips of rows between replicas, by transport.
`memory`: resident memory of a trunk.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine import report, spread

REPO_ROOT = Path(__file__).resolve().parents[2]
NEW = 64
"""Tokens of a completion."""
RESIDENT = ("all", "half", "none")


# Residency over HTTP


def applications(artifact: str, root: str) -> dict[str, dict[str, Any]]:
    """Return Serve configs of the artifact by residency. A cluster that is not resident scales to one replica."""
    import torch
    import yaml

    from raymoe.ops.ray_head import free_ports
    from raymoe.serving.engine.cluster import cluster_sizes
    from raymoe.serving.rollout import pinned
    from raymoe.storage.artifact import Artifact

    config = pinned(yaml.safe_load((REPO_ROOT / "services" / "raymoe.yaml").read_text()), artifact, root)
    (config["http_options"]["port"],) = free_ports(1)
    (template,) = config["applications"]
    whole = sum(cluster_sizes(Artifact.open(Path(template["args"]["artifact"])), torch.float32).values())
    made = {}
    for name, resident in zip(RESIDENT, ("all", round(0.55 * whole), 0), strict=True):
        args = template["args"] | {"resident_bytes": resident, "max_replicas": 1}
        made[name] = config | {"applications": [template | {"name": name, "args": args}]}
    return made


def http(artifact: str, root: str, text: str, domain: str, rounds: int) -> dict[str, Any]:
    """Measure tokens/s and latency by residency at 16 streams, most prompts from one domain, and by streams for `all`."""
    import psutil

    from raymoe.commands.load import load, pieces, summary
    from raymoe.ops.ray_head import head
    from raymoe.serving.rollout import Rollout

    configs = applications(artifact, root)
    prompts = pieces(text, domain=domain, share=0.8, words=40, count=400, seed=0)
    draw = random.Random(0)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in RESIDENT}
    by_streams: dict[int, list[dict[str, Any]]] = {streams: [] for streams in (1, 8, 32)}
    memory: dict[str, list[int]] = {}
    cold: dict[str, list[tuple[float, float]]] = {name: [] for name in RESIDENT}

    def run(rollout: Rollout, streams: int, requests: int) -> dict[str, Any]:
        body = {"model": rollout.application["args"]["name"], "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        pick = lambda n: draw.randrange(len(prompts))  # noqa: E731
        completions = asyncio.run(load(rollout.base, prompts, streams=streams, requests=requests, body=body, pick=pick))
        made = summary(completions)
        if made["failed"]:
            raise RuntimeError(f"{made['failed']} of {len(completions)} requests failed: {made['errors']}")
        return made

    with head(max(2, os.cpu_count() or 1)) as ray:
        for i in range(rounds):
            for name in RESIDENT[:: -1 if i % 2 else 1]:
                rollout = Rollout(ray.dashboard, configs[name])
                rollout.up()
                started = time.monotonic()
                first = run(rollout, 1, 1)["p50_ttft_s"]
                run(rollout, 16, 48)  # hot clusters become resident, others scale to one replica
                rollout.wait(lambda r=rollout, n=name: _whole(r, n), "to have its replicas")
                cold[name].append((first, time.monotonic() - started))
                run(rollout, 16, 48)  # longer than a trunk takes to discover them
                rows[name] += [run(rollout, 16, 48) for _ in range(2)]
                if name == "all":
                    for streams, made in by_streams.items():
                        made.append(run(rollout, streams, 3 * streams))
                memory[name] = [psutil.Process(pid).memory_info().rss for pid in rollout.pids("trunk")]
                rollout.down()
    result: dict[str, Any] = {
        "16 streams": {name: _latencies(made) for name, made in rows.items()},
        "all": {str(streams): _latencies(made) for streams, made in by_streams.items()},
        "memory": memory,
        "cold": {name: {"first_token_s": spread([f for f, _ in pairs]), "replicas_s": spread([r for _, r in pairs])}
                 for name, pairs in cold.items()},
    }  # fmt: skip
    base = result["16 streams"]["all"]["tokens_per_s"]["median"]
    for name, row in result["16 streams"].items():
        row["of_all"] = row["tokens_per_s"]["median"] / base
        _report(f"resident {name:5} 16 streams", row, f"  {row['of_all']:.2f} of all")
    for streams, row in result["all"].items():
        _report(f"resident all   {streams:>2} streams", row)
    row = result["cold"]["none"]
    report(f"http  resident none, no replica yet: first token of the first request after {row['first_token_s']['median']:.2f} s, "
        f"all clusters have a replica {row['replicas_s']['median']:.1f} s after it was sent, under 16 streams")  # fmt: skip
    return result


def _whole(rollout: Any, resident: str) -> bool:
    """Whether the clusters that are not resident have a replica."""
    targets = rollout.targets()
    wanted = [n > 0 for name, n in targets.items() if name.startswith("cluster-")]
    least = {"all": 0, "half": 1, "none": len(wanted)}[resident]
    return sum(wanted) >= least and rollout.running() == targets


def _latencies(made: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = ("p50_ttft_s", "p99_ttft_s", "p50_itl_s", "p99_itl_s")
    return {"tokens_per_s": spread([m["output_throughput"] for m in made])} | {
        name: statistics.median(m[name] for m in made) for name in names
    }


def _report(label: str, row: dict[str, Any], more: str = "") -> None:
    speed = row["tokens_per_s"]
    report(f"http  {label}  {speed['median']:6.0f} tokens/s [{speed['min']:.0f}, {speed['max']:.0f}]  first token p50 {row['p50_ttft_s']:.2f} s, "
        f"p99 {row['p99_ttft_s']:.2f} s; between tokens p50 {1000 * row['p50_itl_s']:.0f} ms, p99 {1000 * row['p99_itl_s']:.0f} ms{more}")  # fmt: skip


# Data planes


class Echo:
    """Returns its input, by every transport that is measured."""

    def __init__(self, width: int) -> None:
        import torch

        from raymoe.serving.transport.rows import RowServer, row_identity

        identity = row_identity(bytes(32), 0, torch.float32, "echo")
        self.server = RowServer(lambda layer, rows: rows, identity, width, torch.float32, ("127.0.0.1", 0))
        self.zmq_port = 0
        try:
            import zmq  # pyright: ignore
        except ImportError:
            return
        import threading

        socket = zmq.Context.instance().socket(zmq.REP)
        self.zmq_port = socket.bind_to_random_port("tcp://127.0.0.1")

        def serve() -> None:
            while True:
                socket.send(socket.recv(copy=False), copy=False)

        threading.Thread(target=serve, daemon=True).start()

    def ports(self) -> tuple[int, int]:
        return self.server.port, self.zmq_port

    def echo(self, rows: Any) -> Any:
        return rows


class Caller:
    """Measures round trips to an Echo from inside a replica, alternating transports."""

    def __init__(self, echo: Any, actor: Any) -> None:
        self.echo, self.actor = echo, actor

    async def measure(self, rows: int, width: int, rounds: int) -> dict[str, list[float]]:
        import numpy as np
        import torch

        from raymoe.serving.transport.rows import RowConnection, row_identity

        port, zmq_port = await self.echo.ports.remote()
        identity = row_identity(bytes(32), 0, torch.float32, "echo")
        connection = RowConnection(("127.0.0.1", port), identity, width, torch.float32, 5.0)
        array = np.random.default_rng(0).standard_normal((rows, width), dtype=np.float32)
        tensor = torch.from_numpy(array)
        by_value = self.echo.options(_by_reference=False)

        async def rows_over_tcp() -> None:
            connection.send(0, tensor)
            connection.receive()

        async def reference() -> None:
            await self.echo.echo.remote(array)

        async def value() -> None:
            await by_value.echo.remote(array)

        async def direct() -> None:
            await self.actor.echo.remote(array)

        ways: dict[str, Callable[[], Any]] = {
            "row transport": rows_over_tcp, "actor call": direct, "Serve handle, by value": value,
            "Serve handle, by reference": reference,
        }  # fmt: skip
        if zmq_port:
            import zmq  # pyright: ignore

            socket = zmq.Context.instance().socket(zmq.REQ)
            socket.connect(f"tcp://127.0.0.1:{zmq_port}")

            async def zeromq() -> None:
                socket.send(array, copy=False)
                socket.recv(copy=False)

            ways["ZeroMQ"] = zeromq
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(rounds + 10):
            for name, way in ways.items():
                for _ in range(5):
                    started = time.perf_counter()
                    await way()
                    if i >= 10:
                        seconds[name].append(time.perf_counter() - started)
        return seconds


def planes(rounds: int, width: int = 256) -> dict[str, Any]:
    """Measure round trips of 16 rows (a decoding step of 16 streams) and 128 (a step with prompts); D=256, float32."""
    import ray
    from ray import serve

    from raymoe.ops.ray_head import free_ports, head

    result: dict[str, Any] = {}
    with head(max(2, os.cpu_count() or 1)) as running:
        os.environ |= {key: running.environment[key] for key in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": str(REPO_ROOT / "jobs")}},
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": free_ports(1)[0]})
            options = {"ray_actor_options": {"num_cpus": 0}}
            echo = serve.deployment(Echo).options(name="echo", **options).bind(width)
            actor = ray.remote(num_cpus=0)(Echo).remote(width)
            handle = serve.run(serve.deployment(Caller).options(name="caller", **options).bind(echo, actor), name="planes", route_prefix=None)  # fmt: skip
            for rows in (16, 128):
                seconds = handle.measure.remote(rows, width, rounds).result()
                result[str(rows)] = {}
                for name, values in sorted(seconds.items(), key=lambda item: statistics.median(item[1])):
                    ordered = sorted(values)
                    row = {"p50_us": 1e6 * statistics.median(values), "p99_us": 1e6 * ordered[int(0.99 * len(ordered))]}
                    result[str(rows)][name] = row
                    report(
                        f"planes  {rows:>3} rows  {name:27} p50 {row['p50_us']:7.0f} us  p99 {row['p99_us']:7.0f} us"
                    )
            serve.shutdown()
        finally:
            ray.shutdown()
    return result


# Memory


def empty(*more: str) -> int:
    """Return the resident bytes of a process that imports torch and `more`, and multiplies once."""
    code = "; ".join((
        *(f"import {module}" for module in ("torch", "psutil", *more)), "torch.set_num_threads(1)",
        "torch.ones(8, 8) @ torch.ones(8, 8)", "print(psutil.Process().memory_info().rss)",
    ))  # fmt: skip
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def memory(artifact: str, root: str, measured: dict[str, list[int]]) -> dict[str, Any]:
    """Compare the resident memory of a trunk with all clusters to its weights in the compute type and KV budget."""
    import torch

    from raymoe.serving.engine.cluster import cluster_sizes
    from raymoe.serving.settings import ServeSettings
    from raymoe.storage.artifact import Artifact

    settings = ServeSettings(artifact=artifact, root=root)
    opened = Artifact.open(settings.folder())
    weights = sum(cluster_sizes(opened, torch.float32).values()) + sum(t.numel() * 4 for t in opened.trunk().values())
    torch_alone, with_serve, trunk = empty(), empty("ray.serve"), max(measured["all"])
    allowed = 1.1 * (weights + settings.kv_bytes)
    report(f"memory  a trunk {trunk / 2**20:.0f} MiB, {(trunk - torch_alone) / 2**20:.0f} more than an empty torch process, "
        f"{(trunk - with_serve) / 2**20:.0f} more than one that has imported Ray Serve too; "
        f"weights {weights / 2**20:.0f} + KV budget {settings.kv_bytes / 2**20:.0f}, times 1.1: {allowed / 2**20:.0f} MiB")  # fmt: skip
    for name, rss in measured.items():
        report(f"memory  trunk with {name:4} resident: {max(rss) / 2**20:.0f} MiB")
    return {
        "trunk": trunk,
        "empty": torch_alone,
        "empty with Serve": with_serve,
        "weights": weights,
        "kv_bytes": settings.kv_bytes,
        "allowed": allowed,
    } | {f"trunk {name}": max(rss) for name, rss in measured.items()}
