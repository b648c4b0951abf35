"""Kills of a served model's processes under load: `serve` of `jobs/chaos`, which is the command."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parents[2]
PROMPTS = 48
TOKENS = 32


@dataclass
class Kill:
    victim: str
    pids: list[int]
    at: float
    """Of the load's clock."""
    recovered_s: float | None = None
    """Until as many other replicas ran as should."""
    impact: dict[str, Any] = field(default_factory=dict)


class Watch:
    """Looks at Serve a few times a second and notes when each kill was made good."""

    def __init__(self, rollout: Any) -> None:
        self.rollout, self.kills = rollout, list[Kill]()
        self.started = time.perf_counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def now(self) -> float:
        return time.perf_counter() - self.started

    def kill(self, victim: str, pids: Sequence[int]) -> None:
        self.kills.append(Kill(victim, list(pids), self.now()))
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _look(self) -> None:
        while not self._over.wait(0.25):
            for kill in [k for k in self.kills if k.recovered_s is None]:
                try:
                    pids = self.rollout.pids(kill.victim)
                    whole = len(pids) >= self.rollout.targets()[kill.victim] and not set(pids) & set(kill.pids)
                except (OSError, RuntimeError, KeyError):
                    continue
                if whole:
                    kill.recovered_s = self.now() - kill.at

    def end(self, patience_s: float) -> None:
        deadline = self.now() + patience_s
        while any(k.recovered_s is None for k in self.kills) and self.now() < deadline:
            time.sleep(0.25)
        self._over.set()
        self._thread.join()


async def disturbed(watch: Watch, loading: Any, schedule: Sequence[tuple[float, str, int]]) -> Any:
    """Return the completions of a load during which the schedule's (second, deployment, replicas) are killed."""
    task = asyncio.create_task(loading)
    watch.started = time.perf_counter()
    for at, victim, count in schedule:
        await asyncio.sleep(0)
        while watch.now() < at:
            await asyncio.sleep(min(1.0, at - watch.now()))
        pids = await asyncio.to_thread(watch.rollout.pids, victim)
        if pids:
            watch.kill(victim, pids[:count])
    return await task


def draw(clusters: int, kills: int, seconds: float, seed: int) -> list[tuple[float, str, int]]:
    """(second, deployment, replicas): about a third trunks, one whole cluster, the rest single replicas."""
    chance = random.Random(seed)
    schedule = []
    for i in range(kills):
        cluster = f"cluster-{chance.randrange(clusters)}"
        victim = "trunk" if i % 3 == 1 else cluster
        schedule.append((seconds * (i + 0.5) / kills, victim, 99 if i == kills // 2 and victim != "trunk" else 1))
    if not any(count > 1 for _, _, count in schedule):
        at, _, _ = schedule[-1]
        schedule[-1] = (at, f"cluster-{chance.randrange(clusters)}", 99)
    return schedule


def impact_of(completions: Sequence[Any], since: float, until: float) -> dict[str, Any]:
    """Return the number of requests in progress in an interval, how many of them failed, and the longest duration."""
    in_progress = [a for a in completions if a.started < until and a.ended > since]
    return {
        "requests": len(in_progress),
        "failed": sum(bool(a.error) for a in in_progress),
        "longest_s": max((a.ended - a.started for a in in_progress), default=0.0),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    import yaml

    from raymoe.commands.load import load, pieces, summary
    from raymoe.ops.ray_head import free_ports, head
    from raymoe.serving.rollout import Rollout, pinned
    from raymoe.storage.artifact import Artifact

    config = yaml.safe_load((REPO_ROOT / "services" / "raymoe.yaml").read_text())
    config["applications"][0]["args"] |= {"resident_bytes": 0, "trunks": 2, "min_replicas": 2, "max_replicas": 3}
    (config["http_options"]["port"],) = free_ports(1)
    config = pinned(config, arguments.artifact, arguments.root)
    args = config["applications"][0]["args"]
    clusters = Artifact.open(Path(args["artifact"])).model.n_clusters
    prompts = pieces("builtin", domain=None, share=0, words=12, count=PROMPTS, seed=arguments.seed)
    body = {"model": args["name"], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    with head(max(2, os.cpu_count() or 1)) as ray:
        rollout = Rollout(ray.dashboard, config)
        rollout.up()
        rollout.wait(lambda: rollout.running() == rollout.targets(), "to have all of its replicas")
        print("serving; first the undisturbed load", flush=True)

        def under_load(**how: Any) -> Any:
            return load(rollout.base, prompts, streams=arguments.streams, body=body, **how)

        calm = asyncio.run(under_load(requests=PROMPTS))
        expected = {a.prompt: a.text for a in calm}
        result: dict[str, Any] = {"undisturbed": summary(calm)}

        def disturb(name: str, schedule: Sequence[tuple[float, str, int]], seconds: float) -> None:
            watch = Watch(rollout)
            completions = asyncio.run(disturbed(watch, under_load(seconds=seconds), schedule))
            watch.end(120)
            for kill in watch.kills:
                kill.impact = impact_of(
                    completions, kill.at, kill.at + (120 if kill.recovered_s is None else kill.recovered_s)
                )
            result[name] = summary(completions) | {
                "changed": sum(not a.error and a.text != expected[a.prompt] for a in completions),
                "kills": [vars(k) for k in watch.kills],
            }

        disturb("replicas", draw(clusters, arguments.kills, arguments.seconds, arguments.seed), arguments.seconds)
        if arguments.control_plane:
            for name, process in (("controller", "ServeController"), ("proxy", "ProxyActor")):
                (pid,) = (found.pid for found in ray.processes(process))
                killer = threading.Timer(5.0, os.kill, (pid, signal.SIGKILL))
                started = time.perf_counter()
                killer.start()
                completions = asyncio.run(under_load(seconds=75.0))
                killer.join()
                failed = [a for a in completions if a.error]
                result[name] = summary(completions) | {
                    "changed": sum(not a.error and a.text != expected[a.prompt] for a in completions),
                    "failing_s": max((a.ended for a in failed), default=0.0)
                    - min((a.ended for a in failed), default=0.0),
                    "seconds": time.perf_counter() - started,
                }
        rollout.down()
    return result


def show(result: dict[str, Any]) -> None:
    print(
        f"{'':14}{'requests':>9}{'failed':>8}{'changed':>9}{'tokens/s':>10}{'TTFT p50':>10}{'p99':>8}{'ITL p99':>9}{'whole p99':>11}"
    )
    for name, row in result.items():
        number = lambda key: "-" if row[key] is None else f"{row[key]:.2f}"  # noqa: B023, E731
        print(
            f"{name:14}{row['requests']:>9}{row['failed']:>8}{row.get('changed', 0):>9}{row['output_throughput']:>10.0f}"
            f"{number('p50_ttft_s'):>10}{number('p99_ttft_s'):>8}{number('p99_itl_s'):>9}{number('p99_e2el_s'):>11}"
        )
    for kill in result["replicas"]["kills"]:
        recovered = "never" if kill["recovered_s"] is None else f"{kill['recovered_s']:.1f} s"
        print(
            f"  {kill['at']:6.1f} s  SIGKILL {len(kill['pids'])} of {kill['victim']:10} whole again after {recovered}; "
            f"{kill['impact']['requests']} requests in progress, the longest took {kill['impact']['longest_s']:.1f} s"
        )
    for name in ("controller", "proxy"):
        if name in result and result[name]["failed"]:
            print(f"  {name}: failed over {result[name]['failing_s']:.1f} s: {result[name]['errors']}")


def survived(result: dict[str, Any]) -> bool:
    """Whether no request failed, but for those behind a killed proxy, and none was answered otherwise."""
    failed = any(row["failed"] for name, row in result.items() if name != "proxy")
    return not failed and not any(row.get("changed") for row in result.values())
