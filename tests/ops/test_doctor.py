"""The doctor's verdicts from made-up observations, and one real cluster on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymoe.commands.doctor import main
from raymoe.ops import doctor_checks as checks
from raymoe.ops.doctor_checks import Check, exit_status
from tests.support.paths import REPO_ROOT


def node(name: str = "a", **changes: Any) -> dict[str, Any]:
    """The observation of a node without a problem."""
    fine = {
        "node": name, "python": "3.11.2", "ray": "2.60.0", "torch": "2.15.0", "raymoe": "0.1.0", "off_lock": [],
        "unreachable": [], "serve_port": "free", "shm": 8e9, "open_files": 65536, "memory": 16e9, "root": "/mnt/raymoe",
        "root_error": "", "root_free": 100e9, "temp": "/tmp/ray", "temp_used": 0.5, "auth": "token", "compiled": True,
        "compiler": "/usr/bin/cc", "gpus": 0, "nccl": "", "markers": ["a", "b"],
    }  # fmt: skip
    return fine | changes


def test_nodes_without_a_problem_get_no_advice() -> None:
    found = checks.check_nodes([node("a"), node("b")])
    assert {(c.status, c.advice) for c in found} == {("ok", "")}
    assert exit_status(found) == 0
    assert len({c.name for c in found}) == len(found)


@pytest.mark.parametrize(
    ("check", "changes", "status", "seen"),
    [
        (checks.versions, {"torch": "2.14.0"}, "fail", "2.14.0 on b"),
        (checks.versions, {"python": "3.12.1"}, "fail", "3.11.2 on a"),
        (checks.lock, {"off_lock": ["numpy 1 for 2"]}, "warn", "numpy 1 for 2 on b"),
        (checks.ports, {"unreachable": ["10.0.0.1:6379"]}, "fail", "b cannot reach 10.0.0.1:6379"),
        (checks.ports, {"serve_port": "taken"}, "warn", "8000 is taken on b"),
        (checks.ports, {"serve_port": "serve"}, "ok", "Serve's"),
        (checks.shm, {"shm": 64e6}, "warn", "64 MB on b"),
        (checks.open_files, {"open_files": 1024}, "warn", "1024 on b"),
        (checks.open_files, {"open_files": 256}, "fail", "256 on b"),
        (checks.memory, {"memory": 3e9}, "warn", "3.0 GB on b"),
        (checks.memory, {"memory": 1e9}, "fail", "1.0 GB on b"),
        (checks.root, {"root_error": "/mnt/raymoe: Permission denied"}, "fail", "b: /mnt/raymoe: Permission denied"),
        (checks.root, {"markers": ["b"]}, "fail", "b does not see the files of a"),
        (checks.disk, {"root_free": 10e9}, "warn", "10.0 GB on b"),
        (checks.disk, {"root_free": 1e9}, "fail", "1.0 GB on b"),
        (checks.disk, {"temp_used": 0.97}, "fail", "97% of /tmp/ray"),
        (checks.authentication, {"auth": "disabled"}, "fail", "disabled on b"),
        (checks.bytecode, {"compiled": False}, "warn", "not compiled on b"),
        (checks.compiler, {"compiler": ""}, "warn", "no C compiler on b"),
    ],
)  # fmt: skip
def test_a_node_with_a_problem_is_named_with_the_remedy(
    check: Callable[[list[dict[str, Any]]], Check], changes: dict[str, Any], status: str, seen: str
) -> None:
    found = check([node("a"), node("b", **changes)])
    assert found.status == status and seen in found.seen
    assert bool(found.advice) == (status != "ok")
    assert exit_status([found]) == (status == "fail")
    assert (" -> " in str(found)) == (status != "ok") and str(found).startswith(f"{status:<4}  {found.name}")


def test_a_ray_without_token_is_a_warning_on_several_nodes() -> None:
    assert checks.authentication([node("a", auth="disabled")]).status == "ok"
    assert checks.authentication([node("a", auth="disabled"), node("b", auth="disabled")]).status == "warn"


@pytest.mark.parametrize(("skew", "status"), [(0.1, "ok"), (-0.9, "warn"), (9.0, "fail")])
def test_the_difference_of_clocks_is_judged(skew: float, status: str) -> None:
    assert checks.clock({"a": 0.0, "b": skew}).status == status


@pytest.mark.parametrize(
    ("gpus", "nccl", "in_ray", "status"),
    [(0, "", 0, "ok"), (1, "2.27", 2, "ok"), (0, "", 2, "fail"), (1, "2.27", 0, "warn"), (1, "", 2, "fail")],
)
def test_the_gpus_of_ray_and_torch_are_compared(gpus: int, nccl: str, in_ray: float, status: str) -> None:
    assert checks.gpus([node("a", gpus=gpus, nccl=nccl), node("b", gpus=gpus, nccl=nccl)], in_ray).status == status


def test_missing_nodes_and_slow_collectives_are_judged() -> None:
    assert checks.reached(["a", "b"], {}).status == "ok"
    assert checks.reached(["a", "b"], {"b": "no response"}).seen == "b: no response"
    quick = {"world": 2, "nodes": 2, "latency_ms": 0.5, "mb_per_s": 900.0}
    assert checks.collective(quick).status == "ok"
    assert checks.collective(quick | {"latency_ms": 30.0}).status == "warn"
    assert checks.collective(quick | {"mb_per_s": 9.0}).status == "warn"
    assert checks.collective("no room for 2 workers").status == "warn"
    refused = checks.collective("Connection refused", "nccl")
    assert refused.status == "fail" and refused.name == "nccl" and "NCCL_SOCKET_IFNAME" in refused.advice


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    line = [sys.executable, str(REPO_ROOT / "jobs" / "doctor.py"), *arguments]
    return subprocess.run(line, env=os.environ | environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "address of a dashboard"),
        ("127.0.0.1", "HOST:PORT"),
        ("127.0.0.1:1", "no Ray listens"),
    ],
)
def test_an_address_without_a_ray_is_refused(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert main(["--root", str(tmp_path)], "doctor") == 2
    error = capsys.readouterr().err
    assert error.startswith("doctor: ") and message in error and address in error and len(error.splitlines()) == 1


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--json", str(tmp_path / "no" / "x.json")], "doctor") == 2
    assert f"{tmp_path / 'no'} does not exist" in capsys.readouterr().err


@pytest.mark.soak
def test_the_doctor_checks_several_nodes(tmp_path: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    Path("/tmp/ray").mkdir(exist_ok=True)
    little = {"object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **little})
    try:
        cluster.add_node(num_cpus=1, **little)
        cluster.add_node(num_cpus=1, **little)
        there = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
        done = doctor("--root", str(tmp_path / "runs"), "--json", str(tmp_path / "found.json"), **there)
        found = {c["name"]: c for c in json.loads((tmp_path / "found.json").read_text())}
        assert found["nodes"]["seen"] == "3 responded", done.stdout + done.stderr
        assert "shared by 3 nodes" in found["run.root"]["seen"]
        assert "all-to-all of 2 workers on 2 nodes" in found["gloo"]["seen"]
        assert found["auth"]["status"] == "warn" and found["clock"]["status"] == "ok"
        failed = [name for name, c in found.items() if c["status"] == "fail"]
        assert set(failed) <= {"disk", "memory"} and done.returncode == bool(failed), done.stdout
        assert not (tmp_path / "runs").exists()  # as it was
        (tmp_path / "file").write_text("")
        broken = doctor("--root", str(tmp_path / "file" / "runs"), **there)
        assert broken.returncode == 1 and "fail  run.root" in broken.stdout, broken.stdout + broken.stderr
    finally:
        ray.shutdown()
        cluster.shutdown()
