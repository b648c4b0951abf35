"""A Ray head of our own: which processes belong to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from raymoe.ops.ray_head import Head
from tests.support.waiting import until

PARENT = """
import subprocess, sys
child = subprocess.Popen(["bash", "-c", "exec -a ray::Clusterer sleep 600"])
sys.stdin.readline()
child.kill()
child.wait()
"""


def test_processes_of_another_head_are_not_found(tmp_path: Path) -> None:
    """Two heads have an actor of the same name."""
    heads = [Head("", {}, tmp_path / name) for name in ("mine", "theirs")]
    parents = [
        subprocess.Popen([sys.executable, "-c", PARENT, str(head.folder)], stdin=subprocess.PIPE) for head in heads
    ]
    try:
        found = [until(lambda head=head: head.processes("Clusterer"), "the actor") for head in heads]
        assert [[p.parent().pid for p in processes] for processes in found] == [[p.pid] for p in parents]
        assert not heads[0].processes("TrainController")
    finally:
        for parent in parents:
            parent.communicate(b"\n", timeout=30)
