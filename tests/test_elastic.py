"""A run whose workers come and go: nodes join and leave, workers are killed, and the losses are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from waiting import until

from raymoe.config import Config, from_dict
from raymoe.data import Corpus
from raymoe.metrics import TrainingMetrics
from raymoe.training.loop import Trainer

HOUSE = Path(__file__).resolve().parent.parent
STEPS = 900
CONFIG = [
    "tiny", f"train.steps={STEPS}", "train.precision=float32", "train.log_every=1", "train.validate_every=300",
    "train.validate_windows=32", "model.context=64", "model.vocabulary=512", "train.threads=1", "regroup.mode=off",
    "train.resize_every_s=2", "checkpoint.every=1000", "checkpoint.max_loss_s=4", "checkpoint.keep=99",
]  # fmt: skip


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without CPUs that sees within a second that a node is dead."""
    import ray
    from ray.cluster_utils import Cluster

    Path("/tmp/ray").mkdir(exist_ok=True)
    health = {
        "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4,
        "health_check_timeout_ms": 1000,
    }  # fmt: skip
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": health, "object_store_memory": 150_000_000}
    running = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield running
    finally:
        ray.shutdown()
        running.shutdown()


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def starts(run: Path) -> list[dict[str, Any]]:
    return [r for r in records(run, "event") if r["what"] == "resumed"]


def step(run: Path) -> int:
    return max((r["step"] for r in records(run, "train")), default=0)


def one_worker(run: Path) -> int:
    """The pid of a worker: who answers the last of the run's Prometheus targets."""
    import psutil

    port = int(json.loads((run / "prometheus_targets.json").read_text())[-1]["targets"][0].rsplit(":", 1)[1])
    for process in psutil.process_iter():
        try:
            if any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in process.net_connections("inet")):
                return process.pid
        except psutil.Error:
            continue
    raise AssertionError(f"nobody listens on {port}")


@pytest.mark.soak
def test_workers_come_and_go_and_the_losses_are_those_of_an_undisturbed_run(cluster: Any, tmp_path: Path) -> None:
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": cluster.address}
    command = [sys.executable, "jobs/train.py", *CONFIG, f"run.root={tmp_path}"]
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100_000_000) for _ in range(2)]
    run, log = tmp_path / "elastic", tmp_path / "elastic.log"
    with log.open("w") as output:
        driver = subprocess.Popen(
            [*command, "run.name=elastic", "train.workers=1,3"],
            cwd=HOUSE,
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:

        def wait(condition: Callable[[], Any], what: str) -> None:
            def alive() -> Any:
                assert driver.poll() is None, f"the run ended before {what}: {log.read_text()[-3000:]}"
                return condition()

            until(alive, what, seconds=120)

        def change(act: Callable[[], Any], workers: int) -> None:
            """20 steps on, something happens; then the run goes on with so many workers."""
            before, at = len(starts(run)), step(run)
            wait(lambda: step(run) >= at + 20, f"step {at + 20}")
            act()
            wait(lambda: len(starts(run)) > before and starts(run)[-1]["workers"] == workers, f"{workers} workers")

        wait(lambda: step(run) > 0, "the first step")
        change(lambda: nodes.append(cluster.add_node(num_cpus=1, object_store_memory=100_000_000)), 3)
        change(lambda: os.kill(one_worker(run), signal.SIGKILL), 3)
        change(lambda: [cluster.remove_node(nodes.pop(), allow_graceful=False) for _ in range(2)], 1)
        change(lambda: nodes.append(cluster.add_node(num_cpus=1, object_store_memory=100_000_000)), 2)
        change(lambda: os.kill(one_worker(run), signal.SIGKILL), 2)
        assert driver.wait(300) == 0, log.read_text()[-3000:]
    finally:
        if driver.poll() is None:
            driver.kill()
    quiet = subprocess.run(
        [*command, "run.name=quiet", "train.workers=2"],
        cwd=HOUSE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert quiet.returncode == 0, quiet.stdout + quiet.stderr

    mine, other = records(run, "train"), records(tmp_path / "quiet", "train")
    assert [r["step"] for r in mine] == list(range(1, STEPS + 1))  # each step once
    assert [r["tokens_hash"] for r in mine] == [r["tokens_hash"] for r in other]
    events = starts(run)
    grown = [e for e in events if e["workers"] != 1 and e["redone_steps"] <= 3]
    assert len(grown) >= 2, events  # a resize that was foreseen cost next to nothing
    for first in range(0, STEPS, 50):
        pair = [statistics.fmean(r["loss"] for r in side[first : first + 50]) for side in (mine, other)]
        assert pair[0] == pytest.approx(pair[1], abs=2e-3), first
    losses = [records(side, "validation")[-1]["loss"] for side in (run, tmp_path / "quiet")]
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)
    for event in events:
        alone = continued_alone(run, event["step"], tmp_path / f"alone{event['step']}")
        assert alone == pytest.approx([r["loss"] for r in mine[event["step"] :][: len(alone)]], rel=1e-5)


def continued_alone(run: Path, at: int, folder: Path) -> list[float]:
    """The losses of 20 steps of one process from the checkpoint of step `at`."""
    name = f"step_{at:08d}"
    shutil.copytree(run / "checkpoints" / name, folder / "checkpoints" / name)
    about = json.loads((run / "config.json").read_text())
    config: Config = from_dict(about["config"])
    torch.set_num_threads(1)
    trainer = Trainer(
        config, Corpus.open(Path(about["corpus"])), folder, TrainingMetrics(CollectorRegistry(), run="alone", worker="0"),
        torch.device("cpu"),
    )  # fmt: skip
    for _ in range(min(20, STEPS - at)):
        trainer.advance()
        trainer.report(trainer.window)
        trainer.window = type(trainer.window)()
    return [r["loss"] for r in records(folder, "train")]
