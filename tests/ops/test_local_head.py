"""The head of `make serve`: its processes are found by its folder, and no others are stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from raymoe.ops import local_head

SLEEP = "import signal, sys; print(flush=True); signal.pause()"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(local_head, "folder", lambda: tmp_path / "head")
    (tmp_path / "head").mkdir()
    return tmp_path / "head"


def start(*words: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", SLEEP, *words], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline()
    return process


def test_stop_ends_the_processes_of_the_folder_and_no_others(folder: Path) -> None:
    ours, other = start(f"--temp-dir={folder}"), start("--temp-dir=/tmp/another")
    try:
        assert [p.pid for p in local_head.processes()] == [ours.pid]
        assert local_head.stop() == 1
        assert not psutil.pid_exists(ours.pid) and other.poll() is None
        assert not folder.exists() and local_head.stop() == 0
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


def test_stop_kills_a_process_that_ignores_the_signal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_head, "STOP_S", 0.2)
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline()
    assert local_head.stop() == 1 and not psutil.pid_exists(process.pid)


def test_a_head_on_another_machine_is_not_started() -> None:
    with pytest.raises(RuntimeError, match="no Ray responds at http://192.0.2.1:1"):
        local_head.start("http://192.0.2.1:1")
