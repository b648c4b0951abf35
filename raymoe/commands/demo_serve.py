"""The demo's serving stage: serve an export with nothing resident, send a skewed load, and record the replicas."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymoe.commands.load import load, pieces, summary
from raymoe.ops.ray_head import Head, free_ports
from raymoe.serving.default_config import default_config
from raymoe.serving.rollout import Rollout, pinned
from raymoe.storage.run_folder import RunFolder, read_records

LOAD_S = 30.0
DOMAIN = "licences"
PROMPT = "This licence applies to"
SCALING = {"target": 0.04, "up_cooldown_s": 4.0, "down_cooldown_s": 16.0}
"""A replica counts as busy from 4 % of its time, so that the load of one machine makes clusters scale. A replica is
kept for at least 16 s: its start takes 10 s."""


@dataclass(frozen=True)
class Served:
    """What the load measured."""

    base: str
    ready_s: float
    completion: str
    requests: int
    failed: int
    tokens_per_s: float
    first_token_s: tuple[float, float]
    """Median and 99th percentile, in seconds."""
    replicas: dict[str, tuple[int, int, int]]
    """Deployment of a cluster -> target before the load, highest target, target after it."""

    def lines(self) -> list[str]:
        median, p99 = self.first_token_s
        targets = ", ".join(f"{c} {' -> '.join(map(str, n))}" for c, n in sorted(self.replicas.items()))
        return [
            f"{self.base}/v1 answered after {self.ready_s:.0f} s: {PROMPT!r} -> {self.completion[:60]!r}",
            f"{self.requests} requests, {self.failed} failed; {self.tokens_per_s:,.0f} tokens/s, first token after "
            f"{median:.2f} s (99th percentile {p99:.2f} s)",
            f"replicas before, most, after the load: {targets}",
        ]


def complete(base: str, prompt: str) -> str:
    """Return the text of one streamed completion. Leaves `model` out: one model is served."""
    body = {"prompt": prompt, "max_tokens": 48, "temperature": 0.8, "seed": 1, "stream": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{base}/v1/completions", json.dumps(body).encode(), headers)
    text = ""
    with urllib.request.urlopen(request, timeout=60) as response:
        for line in response:
            if line.startswith(b"data: {"):
                text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
    return text


def is_cluster(deployment: str) -> bool:
    return deployment.startswith("cluster-")


@contextmanager
def recorded(rollout: Rollout, path: Path):
    """Record the replicas of each cluster twice a second while the block runs, and once after it."""
    over, started = threading.Event(), time.monotonic()

    def record(file: Any) -> None:
        seconds = time.monotonic() - started
        try:
            counts = {"targets": rollout.targets(), "running": rollout.running()}
        except (OSError, RuntimeError):  # the dashboard is busy: the next poll reads it
            return
        counts = {kind: {name: n for name, n in of.items() if is_cluster(name)} for kind, of in counts.items()}
        file.write(json.dumps({"kind": "replicas", "step": round(1000 * seconds), "seconds": seconds, **counts}) + "\n")

    def poll() -> None:
        with path.open("w") as file:
            while not over.wait(0.5):
                record(file)
            record(file)

    watcher = threading.Thread(target=poll, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def serve_and_load(ray: Head, root: str, artifact: Path, run: Path, update: Callable[[str], None]) -> Served:
    """Serve `artifact`, complete one prompt, send the load, wait until replicas have fallen, and take it down."""
    config = default_config()
    (config["http_options"]["port"],) = free_ports(1)
    (application,) = config["applications"]
    application["args"] |= {"resident_bytes": 0, "min_replicas": 1, "max_replicas": 2}
    application["autoscaling_policy"]["policy_kwargs"] |= SCALING
    rollout = Rollout(ray.dashboard, pinned(config, str(artifact), root))
    started = time.monotonic()
    update("replicas start")
    rollout.up()
    rollout.wait(lambda: rollout.running() == rollout.targets(), "to have all of its replicas")
    ready_s = time.monotonic() - started
    completion = complete(rollout.base, PROMPT)
    prompts = pieces("builtin", domain=DOMAIN, share=0.8, words=16, count=400, seed=0)
    body = {"max_tokens": 32, "temperature": 0, "ignore_eos": True}
    draw = random.Random(0)
    records = RunFolder(run).serving
    with recorded(rollout, records):
        update(f"load for {LOAD_S:.0f} s")
        responses = asyncio.run(
            load(
                rollout.base,
                prompts,
                streams=16,
                seconds=LOAD_S,
                body=body,
                pick=lambda n: draw.randrange(len(prompts)),
            )
        )
        update("the load is over: wait until the replicas fall")
        rollout.wait(
            lambda: all(n == 1 for name, n in rollout.targets().items() if is_cluster(name)),
            "to have its replicas fall again",
        )
    rollout.down()
    targets = [r["targets"] for r in read_records(records)]
    replicas = {c: (targets[0][c], max(t[c] for t in targets), targets[-1][c]) for c in targets[0]}
    found = summary(responses)
    first = (found["p50_ttft_s"] or 0.0, found["p99_ttft_s"] or 0.0)
    return Served(
        rollout.base,
        ready_s,
        completion,
        found["requests"],
        found["failed"],
        found["output_throughput"],
        first,
        replicas,
    )
