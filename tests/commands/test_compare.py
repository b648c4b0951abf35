"""`raymoe compare`: runs by name or folder, the table, the page, and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raymoe.commands.compare import main
from raymoe.config import override, preset
from tests.support.recorded_runs import record_run


def test_runs_are_found_by_name_or_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("experiments/e/flat-seed0", 0), ("flat-seed1", 1), ("ours", 0)):
        lr = "1e-3" if name == "ours" else "2e-3"
        changes = [f"run.seed={seed}", "train.steps=8", f"train.lr={lr}"]
        record_run(override(preset("tiny"), changes), folder=tmp_path / name, perplexity=10.0 * (seed + 1))
    words = ["experiments/e/flat-seed0", "flat-seed1", str(tmp_path / "ours"), "--root", str(tmp_path)]
    assert main([*words, "--out", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert "| flat " in out and "| ours " in out and "15.00 ±63.53" in out
    assert "<h1>flat, ours</h1>" in (tmp_path / "page.html").read_text()
    assert main([*words, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [s["label"] for s in results["summaries"]] == ["flat", "ours"]
    assert results["summaries"][1]["ratio"] == {"mean": 1.0, "half_width": None, "n": 1}


def test_an_unknown_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nothing", "--root", str(tmp_path)]) == 2
    assert "run 'nothing': neither a folder with a config.json nor a run under" in capsys.readouterr().err
    assert main(["nothing", "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert f"--out: the folder {tmp_path / 'no'} does not exist" in capsys.readouterr().err
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    assert main(["damaged", "--root", str(tmp_path)]) == 2
    assert "is not valid JSON" in capsys.readouterr().err
    (tmp_path / "damaged" / "config.json").write_text("{}")
    assert main(["damaged", "--root", str(tmp_path)]) == 2
    assert f"{tmp_path / 'damaged' / 'config.json'}: a config must be a JSON object" in capsys.readouterr().err
