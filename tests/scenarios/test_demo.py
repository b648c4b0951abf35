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

from raymoe.commands.demo_compare import VARIANTS
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
    command += ["--interval", "3s"]  # a plan is applied seconds after a worker's start
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


LINES = 60
"""Two screens."""


@pytest.mark.soak
def test_the_demo_prints_its_stages_its_table_and_every_panel_shows_data(prometheus: int, tmp_path: Path) -> None:
    began, started = time.time(), time.monotonic()
    line = [sys.executable, str(REPO_ROOT / "jobs" / "demo.py"), "--root", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=1500)
    logs = "".join(log.read_text(errors="replace")[-2000:] for log in tmp_path.glob("*/logs/*.log"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:] + logs
    (tmp_path / "output.txt").write_text(done.stdout)
    assert unanswered(prometheus, began) == []
    print(done.stdout, f"{time.monotonic() - started:.0f} s")
    lines = done.stdout.replace(str(tmp_path), "ROOT").splitlines()
    assert len(lines) <= LINES and max(map(len, lines)) <= 160
    stages = re.findall(r"^\[(\d)/6\] .*\s\d+ s$", done.stdout, re.MULTILINE)
    assert stages == list("123456")
    assert re.search(
        r"worker killed \(SIGKILL\) after step \d+; training resumed from the checkpoint of step \d+", done.stdout
    )
    plan = re.search(r"8 experts change clusters, .* held-out loss ([\d.]+) before, ([\d.]+) after", done.stdout)
    assert plan, done.stdout
    assert float(plan[2]) == pytest.approx(float(plan[1]), rel=1e-3)  # bfloat16
    assert re.search(r"\d+ requests, 0 failed; [\d,]+ tokens/s", done.stdout)
    for label in (variant.label for variant in VARIANTS.values()):
        row = re.search(rf"^{re.escape(label)}\s+([\d.]+)\s+([\d.]+)\s+([\d.]+) ±([\d.]+)", done.stdout, re.MULTILINE)
        assert row and 2 < float(row[3]) < 1000, f"no row {label!r} in\n{done.stdout}"
    assert "Reading: " in done.stdout
    report = Path(re.findall(r"^\s+report\s+(\S+)$", done.stdout, re.MULTILINE)[-1])
    assert report.stat().st_size > 50_000 and "same order, learning rate and balancing" in report.read_text()
    manifest = Path(re.findall(r"^\s+artifact\s+(\S+)$", done.stdout, re.MULTILINE)[-1]) / "manifest.json"
    metrics = json.loads(manifest.read_text())["metrics"]
    assert metrics["perplexity"]["int4"] <= metrics["perplexity"]["full"] * 1.005
