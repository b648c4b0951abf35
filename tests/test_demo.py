"""The demo as a stranger runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent


@pytest.mark.soak
def test_the_demo_ends_with_its_tables(tmp_path: Path) -> None:
    started = time.monotonic()
    line = [sys.executable, str(HOUSE / "jobs" / "demo.py"), "--root", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
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
