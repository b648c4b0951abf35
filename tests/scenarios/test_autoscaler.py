"""Ray's autoscaler on simulated nodes: a waiting run adds nodes, uses them, and idle nodes are removed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from raymoe.ops.ray_head import free_ports, responds
from tests.support.paths import REPO_ROOT
from tests.support.waiting import until

HEAD_ID = "f" * 51 + "00000"
NODES = 2


def own_processes(folder: Path, address: str) -> list[psutil.Process]:
    """Return the processes with our folder or address in their command line; the autoscaler's have no parent."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if process.pid != os.getpid() and (str(folder) in line or address in line):
            found.append(process)
    return found


@contextlib.contextmanager
def scaled_head() -> Iterator[tuple[str, dict[str, str], Path]]:
    """Start a head without CPUs whose autoscaler adds nodes of one CPU; yield its address, environment and log."""
    gcs, dashboard, agent, listen, metrics, scaler, board = free_ports(7)
    folder = Path(tempfile.mkdtemp(prefix="raymoe-scaled-"))
    host = subprocess.run(
        [sys.executable, "-c", "import ray; print(ray.util.get_node_ip_address())"],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout.strip()  # fmt: skip
    address = f"{host}:{gcs}"
    config = {
        "cluster_name": "fake", "max_workers": NODES, "idle_timeout_minutes": 0.1, "upscaling_speed": 1.0,
        "provider": {
            "type": "external", "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address, "use_node_id_as_ip": True, "disable_node_updaters": True,
            "disable_launch_config_check": True, "foreground_node_launch": True, "launch_multiple": True,
            "head_node_id": HEAD_ID,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu": {
                "resources": {"CPU": 1, "object_store_memory": 100_000_000}, "node_config": {}, "min_workers": 0,
                "max_workers": NODES, "labels": {"raymoe/role": "cpu"},
            },
        },
        "head_node_type": "ray.head.default", "auth": {}, "docker": {}, "initialization_commands": [],
        "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": [], "file_mounts": {}, "cluster_synced_files": [],
        "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
    }  # fmt: skip
    (folder / "scaled.json").write_text(json.dumps(config))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(scaler), "DASHBOARD_METRIC_PORT": str(board),
    }  # fmt: skip
    named = {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID, "RAY_CLOUD_INSTANCE_ID": HEAD_ID}
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={gcs}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-grpc-port={agent}",
        f"--dashboard-agent-listen-port={listen}", f"--metrics-export-port={metrics}", "--num-cpus=0",
        f"--temp-dir={folder / 'ray'}", "--object-store-memory=100000000",
        f"--autoscaling-config={folder / 'scaled.json'}",
    ]  # fmt: skip
    log = folder / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(command, env=environment | named, stdout=output, stderr=output, start_new_session=True)
    try:

        def started() -> bool:
            assert head.poll() is None, log.read_text()[-3000:]
            return "Ray runtime started" in log.read_text() and responds(f"http://127.0.0.1:{dashboard}/api/jobs/", {})

        until(started, "the head")
        yield address, environment | {"RAY_ADDRESS": address}, log
    finally:
        left = own_processes(folder, address)
        head.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(40)
        for process in {*left, *own_processes(folder, address)}:
            with contextlib.suppress(psutil.Error):
                process.kill()
        head.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.soak
def test_an_elastic_run_adds_nodes_and_idle_nodes_are_removed(tmp_path: Path) -> None:
    import ray

    with scaled_head() as (address, environment, log):
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        try:

            def workers() -> int:
                return sum(n["Alive"] and n["Resources"].get("CPU", 0) > 0 for n in ray.nodes())

            assert workers() == 0
            run, output, text = tmp_path / "scaled", tmp_path / "train.log", tmp_path / "text.txt"
            text.write_text("\n".join(p.read_text() for p in sorted((REPO_ROOT / "raymoe").rglob("*.py"))))
            line = [
                sys.executable, "jobs/train.py", "tiny", "run.name=scaled", f"run.root={tmp_path}", "train.workers=1,2",
                "train.steps=200000", f"data.path={text}", "model.vocabulary=512", "regroup.mode=off", "checkpoint.every=20",
                "train.resize_every_s=2", "model.context=64", "train.global_batch=8", "train.grain=4",
            ]  # fmt: skip
            with output.open("w") as file:
                driver = subprocess.Popen(line, cwd=REPO_ROOT, env=environment, stdout=file, stderr=file)
            try:
                started = time.monotonic()

                def trains_on(number: int) -> bool:
                    assert driver.poll() is None, output.read_text()[-3000:] + log.read_text()[-2000:]
                    path = run / "metrics.jsonl"
                    records = map(json.loads, path.read_text().split("\n")[:-1]) if path.exists() else iter(())
                    return any(r["kind"] == "train" and len(r["rss_mb"]) >= number for r in records)

                until(lambda: workers() >= 1 or driver.poll() is not None, "a node")
                until(lambda: trains_on(1), "a step on it", seconds=180)
                print(f"first step after {time.monotonic() - started:.0f} s on {workers()} nodes")
                until(lambda: trains_on(NODES), "steps on all nodes", seconds=180)
                driver.send_signal(signal.SIGTERM)
                assert driver.wait(90) == 143, output.read_text()[-3000:]
            finally:
                if driver.poll() is None:
                    driver.kill()
            until(
                lambda: workers() == 0, "idle nodes to be removed", seconds=260
            )  # the request of a run expires after 180 s
        finally:
            ray.shutdown()
