"""`raymoe experiment`: refusals, and a tiny experiment end to end that fails, is interrupted, and continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymoe.commands.experiment import main
from raymoe.storage.run_folder import RunFolder, read_records
from tests.support.paths import REPO_ROOT
from tests.support.waiting import until
from tests.training.test_loop import SMALL
from tests.training.test_single import TEXT


def write(folder: Path, steps: int, **more: Any) -> Path:
    """Write an experiment on a small text; return its file."""
    (folder / "text.txt").write_text(TEXT)
    base: dict[str, Any] = {"preset": "tiny"}
    own = ["model.vocabulary=300", f"data.path={folder / 'text.txt'}", f"run.root={folder}", f"train.steps={steps}"]
    every = ["checkpoint.every=10", "regroup.mode=off", "train.log_every=1"]
    for item in (*SMALL, *own, *every):
        key, _, value = item.partition("=")
        section, _, name = key.partition(".")
        if name != "validate_every":  # each quarter by default
            base.setdefault(section, {})[name] = value
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": base, **more}))
    return path


def command(path: Path, *words: str) -> list[str]:
    return [sys.executable, str(REPO_ROOT / "jobs" / "experiment.py"), str(path), *words]


ENVIRONMENT = os.environ | {"RAY_ADDRESS": "local", "PYTHONPATH": str(REPO_ROOT)}


def run(*words: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(path, *words), capture_output=True, text=True, timeout=600, env=ENVIRONMENT)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "unknown experiment 'nothing'"),
        (
            ["FILE", "--set", "train.stepz=3"],
            "mine.yaml: --set: unknown key 'train.stepz': did you mean 'train.steps'?",
        ),
        (["FILE", "--cores", "0"], "--cores 0 is not allowed"),
        (
            ["FILE", "--json", "/no/such/folder/out.json"],
            "--json: the folder /no/such/folder does not exist: create it",
        ),
        (["FILE", "--name", "a/b"], "the name 'a/b' is not allowed"),
        (["FILE", "--set", "data.path=/no/such/text"], "data.path=/no/such/text"),
    ],
)
def test_a_refusal_leaves_nothing(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, 8, variants={"a": {}})
    assert main([str(path) if word == "FILE" else word for word in words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "experiments").exists()


@pytest.mark.soak
def test_an_experiment_with_a_sweep_and_a_failing_run(tmp_path: Path) -> None:
    """The run that fails is reported with its log; the others finish, and are not trained again."""
    path = write(
        tmp_path, 24, title="tiny", seeds=[0, 1], reference="flat",
        variants={"flat": {"model": {"experts": "flat"}}, "bad": {"train": {"lr": 1e15, "warmup": 0}}},
        sweep={
            "grid": {"variants": ["flat"], "train.lr": [1e-5, 2e-2]}, "select": "perplexity", "train": {"steps": 12},
            "tune_share": 0.1,
        },
    )  # fmt: skip
    copy = tmp_path / "copy.json"
    done = run("--json", str(copy), path=path)
    folder = tmp_path / "experiments" / "mine"
    log = folder / "bad-seed0" / "log.txt"
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed    bad-seed0: failed: FloatingPointError: the loss was not finite for 20 steps in a row" in done.stdout  # fmt: skip
    assert f"log: {log}" in done.stdout and "Traceback" in log.read_text()
    results = json.loads((folder / "results.json").read_text())
    assert json.loads(copy.read_text())["runs"] == results["runs"]
    assert results["sweep"]["chosen"] == {"flat": {"train.lr": "0.02"}}, "the other one does not learn"
    tuned, plain = results["sweep"]["runs"], [r for r in results["runs"] if r["variant"] == "flat"]
    assert [(r["tune_share"], r["steps"]) for r in tuned] == [(0.1, 12)] * 2
    assert [(r["tune_share"], r["seed"], r["lr"], r["finished"]) for r in plain] == [(0.0, s, 0.02, True) for s in (0, 1)]  # fmt: skip
    assert len({r["corpus"] for r in plain}) == 1, "all seeds have one validation text"
    assert [p["step"] for p in plain[0]["curve"]] == [6, 12, 18, 24] and plain[0]["curve"][-1]["whole"]
    assert {f["name"] for f in results["failed"]} == {"bad-seed0", "bad-seed1"}
    row = next(line for line in done.stdout.splitlines() if line.startswith("| flat"))
    assert f"{sum(r['perplexity'] for r in plain) / 2:.2f} ±" in row
    page = (folder / "page.html").read_text()
    assert "<h1>tiny</h1>" in page and "Failed runs" in page and row.split("|")[8].strip() in page
    before = (folder / "flat-seed0" / "metrics.jsonl").read_bytes()
    again = run(path=path)
    assert again.returncode == 1 and "2 of 4 to train" in again.stdout, again.stdout + again.stderr
    assert "failed    bad-seed0: failed: FloatingPointError" in again.stdout, "it resumes, and fails again"
    assert (folder / "flat-seed0" / "metrics.jsonl").read_bytes() == before
    changed = run("--set", "train.warmup=1", path=path)
    assert changed.returncode == 2 and "has another config (train.warmup: 5 -> 1" in changed.stderr


def steps_of(folder: Path) -> int:
    trains = [r for r in read_records(RunFolder(folder).metrics) if r["kind"] == "train"]
    return trains[-1]["step"] if trains else 0


@pytest.mark.soak
def test_an_interrupted_experiment_continues(tmp_path: Path) -> None:
    """SIGINT leaves checkpoints; a killed run is repeated; a killed command is continued by the next one."""
    path = write(tmp_path, 600, variants={"a": {}}, seeds=[0])
    words = command(path, "--cores", "1")
    a = tmp_path / "experiments" / "mine" / "a-seed0"

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)

    def resumed() -> int:
        return sum(r.get("name") == "resumed" for r in read_records(RunFolder(a).metrics))

    first = start()
    until(lambda: steps_of(a) > 20, "20 steps", 300)
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=300)
    stopped_at = steps_of(a)
    assert first.returncode == 130 and "the same command continues" in out, out
    assert (RunFolder(a).checkpoints / f"step_{stopped_at:08d}" / "manifest.json").is_file() and 20 < stopped_at < 600

    second = start()
    until(lambda: steps_of(a) > stopped_at + 20, "more steps", 300)
    assert resumed() == 1
    os.kill(json.loads(RunFolder(a).lock.read_text())["pid"], signal.SIGKILL)  # Ray repeats the run
    until(lambda: resumed() == 2, "the repeated run", 300)
    until(lambda: steps_of(a) > stopped_at + 40, "more steps", 300)
    second.kill()
    second.communicate(timeout=300)
    pid = json.loads(RunFolder(a).lock.read_text())["pid"]
    until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the run's process", 120)

    third = subprocess.run(words, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)
    assert third.returncode == 0, third.stdout + third.stderr
    assert resumed() == 3 and steps_of(a) == 600
    trained = [r["step"] for r in read_records(RunFolder(a).metrics) if r["kind"] == "train"]
    assert trained == list(range(1, 601)), "each step once"
    fourth = subprocess.run(words, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)
    assert fourth.returncode == 0 and "to train" not in fourth.stdout
