"""The demo as a stranger runs it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raymoe.ops.ray_head import free_ports
from tests.dashboards.test_dashboards import PANEL_EXPRESSIONS, ask, concrete, watch
from tests.support.paths import REPO_ROOT


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[int]:
    """The port of one over what will run, as `make watch` starts it."""
    try:
        watch.programs()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    (port,) = free_ports(1)
    command = [sys.executable, REPO_ROOT / "dashboards" / "watch.py", "--root", tmp_path, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and f"http://127.0.0.1:{port}" in process.stdout.readline()
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143


def unanswered(port: int, since: float) -> list[str]:
    """Queries of panels that had nothing to show since then."""
    now, missing = time.time(), []
    for expression in dict.fromkeys(concrete(e, "40s") for e in PANEL_EXPRESSIONS):
        data = ask(port, "query_range", query=expression, start=str(since), end=str(now), step="10")
        if not data or all(value == "NaN" for series in data["result"] for _, value in series["values"]):
            missing.append(expression)
    return missing


@pytest.mark.soak
def test_the_demo_ends_with_its_tables_and_every_panel_shows_something(prometheus: int, tmp_path: Path) -> None:
    began, started = time.time(), time.monotonic()
    line = [sys.executable, str(REPO_ROOT / "jobs" / "demo.py"), "--root", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert unanswered(prometheus, began) == []
    print(done.stdout[-3000:], f"{time.monotonic() - started:.0f} s")
    table = done.stdout[done.stdout.index("parameters") :]
    perplexity = {}
    for label in (
        "clustered",
        "clustered, exported INT4",
        "flat",
        "bases alone (width 0)",
        "flat, same size (E=C, K=1)",
    ):
        row = re.search(rf"^{re.escape(label)}\s+([\d,]+)\s+([\d,]+)\s+([\d.]+)", table, re.MULTILINE)
        assert row, f"no row {label!r} in\n{table}"
        perplexity[label] = float(row[3])
    assert perplexity["clustered, exported INT4"] == pytest.approx(perplexity["clustered"], rel=0.02)
    assert all(2 < value < 1000 for value in perplexity.values())
    plans = done.stdout[done.stdout.index("regrouping of") :]
    forced = re.search(
        r"^\s+\d+\s+applied\s+8\s+[\d,]+\s+[\d,]+ .* ([\d.]+)\s+([\d.]+)\s+[\d.]+\s+forced$", plans, re.MULTILINE
    )
    assert forced, f"no forced plan in\n{plans}"
    assert float(forced[2]) == pytest.approx(float(forced[1]), rel=1e-3)  # bfloat16
    report = Path(re.findall(r"^report\s+(\S+)$", done.stdout, re.MULTILINE)[-1])
    assert report.stat().st_size > 50_000
    manifest = Path(re.findall(r"^artifact (\S+)$", done.stdout, re.MULTILINE)[-1]) / "manifest.json"
    metrics = json.loads(manifest.read_text())["metrics"]
    assert metrics["perplexity"]["int4"] <= metrics["perplexity"]["full"] * 1.005
