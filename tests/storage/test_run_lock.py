"""One live process owns a run; the lock of a dead owner is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from raymoe.storage.run_folder import RunFolder
from raymoe.storage.run_lock import HEARTBEAT_TIMEOUT_S, Owner, RunInUse, own_run
from tests.support.paths import REPO_ROOT


def leave_lock(run: Path, owner: Owner, age: float = 0.0) -> None:
    """Write the lock of `owner` with its last heartbeat `age` seconds ago."""
    lock = RunFolder(run).lock
    lock.write_text(json.dumps(asdict(owner)))
    os.utime(lock, (time.time() - age,) * 2)


def test_a_second_owner_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    with own_run(tmp_path / "first"):
        named = rf"first is in use by process {os.getpid()} on .*choose another run.name"
        with pytest.raises(RunInUse, match=named), own_run(tmp_path / "first"):
            pass
        with own_run(tmp_path / "second"):
            pass
    with own_run(tmp_path / "first"):
        pass
    assert not list(tmp_path.iterdir())


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    run, mine = tmp_path / "first", Owner.current()
    for dead in (replace(mine, pid=ended_process()), replace(mine, process_started=mine.process_started - 100)):
        leave_lock(run, dead)
        with own_run(run):
            assert json.loads(RunFolder(run).lock.read_text())["pid"] == os.getpid()


def test_an_owner_on_another_machine_is_dead_after_the_heartbeat_timeout(tmp_path: Path) -> None:
    run = tmp_path / "first"
    other = replace(Owner.current(), host="elsewhere", namespace="another boot", pid=1)
    leave_lock(run, other, age=HEARTBEAT_TIMEOUT_S / 2)
    with pytest.raises(RunInUse, match=r"on elsewhere.*last heartbeat 30 s ago.*released after 60 s"), own_run(run):
        pass
    leave_lock(run, other, age=HEARTBEAT_TIMEOUT_S + 5)
    with own_run(run):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_a_damaged_lock_is_respected_until_the_timeout(content: str, tmp_path: Path) -> None:
    lock = RunFolder(tmp_path / "first").lock
    lock.write_text(content)
    with pytest.raises(RunInUse, match="cannot be read"), own_run(tmp_path / "first"):
        pass
    os.utime(lock, (time.time() - HEARTBEAT_TIMEOUT_S - 5,) * 2)
    with own_run(tmp_path / "first"):
        pass


COMPETE = """
import sys
from pathlib import Path
from raymoe.storage.run_lock import RunInUse, own_run
print("ready", flush=True)
sys.stdin.readline()
try:
    with own_run(Path(sys.argv[1])):
        print("owner", flush=True)
        sys.stdin.readline()
except RunInUse:
    print("refused", flush=True)
"""


@pytest.mark.parametrize("stale", [False, True])
def test_of_several_processes_at_once_one_owns_the_run(stale: bool, tmp_path: Path) -> None:
    run = tmp_path / "first"
    if stale:
        leave_lock(run, replace(Owner.current(), pid=ended_process()))
    line = [sys.executable, "-c", COMPETE, str(run)]
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    several = [
        subprocess.Popen(line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(5)
    ]
    try:
        for process in several:
            assert process.stdout and process.stdout.readline() == "ready\n"
        for process in several:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        results = [process.stdout.readline().strip() for process in several if process.stdout]
        assert sorted(results) == ["owner", *["refused"] * 4]
    finally:
        for process in several:
            process.communicate("\n", timeout=30)
    assert not list(tmp_path.iterdir())
