"""The jobs as a user runs them: submitted to a real head, killed, stopped, resumed, exported and evaluated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from raymoe.ops.ray_head import Head, free_ports, head
from tests.support.paths import REPO_ROOT
from tests.support.waiting import until

QUICK = [
    "train.global_batch=8", "train.grain=4", "model.context=64", "train.warmup=5", "train.log_every=1",
    "train.validate_every=10", "train.validate_windows=8", "model.vocabulary=512",
]  # fmt: skip


@pytest.fixture(scope="module")
def ray() -> Iterator[Head]:
    with head(cpus=4) as running:
        yield running


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of real text, small enough to prepare at once: source files of this repository."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "code.txt").write_text(
        "\n".join(p.read_text() for p in sorted((REPO_ROOT / "raymoe" / "model").glob("*.py")))
    )
    (folder / "tests.txt").write_text(
        "\n".join(p.read_text() for p in sorted((REPO_ROOT / "tests" / "storage").glob("test_*.py")))
    )
    return folder


def submit(ray: Head, *command: str, name: str = "", wait: bool = True) -> subprocess.CompletedProcess:
    line = ray.submit("python", *command, working_dir=REPO_ROOT, submission_id=name)
    if not wait:
        line.insert(3, "--no-wait")
    return subprocess.run(line, env=ray.environment, capture_output=True, text=True, timeout=240)


def records(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    if not (run / "metrics.jsonl").exists():
        return []
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    return [r for r in map(json.loads, lines) if kind in (None, r["kind"])]


def steps(run: Path) -> list[int]:
    return [r["step"] for r in records(run, "train")]


@pytest.mark.ray
def test_a_run_is_submitted_exported_and_evaluated(ray: Head, text: Path, tmp_path: Path) -> None:
    root = [f"run.root={tmp_path}", f"data.path={text}"]
    done = submit(ray, "jobs/train.py", "tiny", "run.name=first", "train.steps=20", *root, *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "first"
    assert str(run / "report.html") in done.stdout and "step 20/20" in done.stdout
    assert steps(run) == list(range(1, 21))
    assert json.loads((run / "config.json").read_text())["config"]["run"]["name"] == "first"
    page = (run / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert records(run, "train")[-1]["a2a_bytes_per_token"] > 0

    again = submit(ray, "jobs/train.py", "tiny", "run.name=first", *root)
    assert again.returncode != 0 and "train.resume=first" in again.stdout

    def job(name: str, *arguments: str) -> subprocess.CompletedProcess:
        line = [sys.executable, str(REPO_ROOT / "jobs" / name), *arguments, "--root", str(tmp_path)]
        return subprocess.run(line, capture_output=True, text=True, timeout=240)

    exported = job("export.py", "first")
    assert exported.returncode == 0, exported.stderr
    assert "clustered, FP16 + INT4" in exported.stdout and "INT4 private experts" in exported.stdout
    assert job("export.py", "first").returncode == 2
    results = {}
    for name in ("first", str(tmp_path / "exports" / "first")):
        assert job("evaluate.py", name, "--json", str(tmp_path / "out.json")).returncode == 0
        results[name] = json.loads((tmp_path / "out.json").read_text())
    generated = job("generate.py", "first", "import ", "def ", "--max-tokens", "8", "--temperature", "0")
    assert generated.returncode == 0 and generated.stdout.startswith("import ") and "\n\ndef " in generated.stdout, (
        generated.stderr
    )
    assert job("generate.py", "second", "x").returncode == 2
    full, packed = results.values()
    assert packed["token_perplexity"] == pytest.approx(full["token_perplexity"], rel=5e-3)
    assert packed["tokens"] == full["tokens"] > 0
    # The run measured the same windows with two workers in bfloat16.
    assert records(run, "validation")[-1]["loss"] == pytest.approx(full["loss"], rel=2e-2)
    assert job("evaluate.py", "first", "--data", str(text / "code.txt")).returncode == 0
    missing = job("evaluate.py", "first", "--data", "/no/such/file.txt")
    assert missing.returncode == 2 and "no such file" in missing.stderr
    assert job("evaluate.py", "second").returncode == 2
    for shard in (run / "checkpoints").rglob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])
    damaged = job("export.py", "first", "--to", str(tmp_path / "never"))
    assert damaged.returncode == 2 and "no valid checkpoint" in damaged.stderr and "bytes" in damaged.stderr
    assert not (tmp_path / "never").exists()


def workers_of(run: Path) -> list[psutil.Process]:
    """Return the processes that listen on the run's Prometheus targets: its workers and no others on this machine."""
    return listening_on(ports_of(run))


def ports_of(run: Path) -> set[int]:
    targets = json.loads((run / "prometheus_targets.json").read_text())
    return {int(t["targets"][0].rsplit(":", 1)[1]) for t in targets}


def listening_on(ports: set[int]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            listening = {c.laddr.port for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        except psutil.Error:
            continue
        if listening & ports:
            found.append(process)
    return found


@pytest.mark.ray
def test_a_killed_worker_a_stop_and_a_resume_lose_nothing(ray: Head, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "long"
    root = [f"run.root={tmp_path}", f"data.path={text}", "checkpoint.every=5", *QUICK]
    started = submit(
        ray, "jobs/train.py", "tiny", "run.name=long", "train.steps=100000", *root, name="long", wait=False
    )
    assert started.returncode == 0, started.stdout + started.stderr
    until(lambda: any(r.get("name") == "checkpoint_completed" for r in records(run, "event")), "a checkpoint")
    for target in json.loads((run / "prometheus_targets.json").read_text()):
        with urllib.request.urlopen(f"http://{target['targets'][0]}/metrics", timeout=10) as answer:
            assert 'raymoe_training_step{run="long"' in answer.read().decode()

    assert len(workers_of(run)) == 2
    victim = workers_of(run)[0]
    victim.send_signal(signal.SIGKILL)
    resumed = until(lambda: [r for r in records(run, "event") if r["name"] == "resumed"], "the restart")[-1]
    assert resumed["step"] >= 5
    until(lambda: steps(run) and steps(run)[-1] >= resumed["step"] + 10, "ten more steps")

    owned = json.loads((tmp_path / ".long.lock").read_text())
    line = [sys.executable, str(REPO_ROOT / "jobs" / "train.py"), "tiny", "train.resume=long", f"run.root={tmp_path}"]
    second = subprocess.run(line, env=ray.environment, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2 and f"in use by process {owned['pid']}" in second.stderr, second.stderr

    ports = ports_of(run)
    command = [str(Path(sys.executable).with_name("ray")), "job", "stop", "--address", ray.dashboard, "long"]
    subprocess.run(command, env=ray.environment, check=True, capture_output=True, timeout=180)
    until(lambda: [r for r in records(run, "event") if r["name"] == "stopped"], "the stop")
    until(lambda: not listening_on(ports), "the workers to leave")
    until(lambda: not ports_of(run), "the scrape targets to be removed")
    last = steps(run)[-1]
    assert steps(run) == list(range(1, last + 1))  # each step once, although some were repeated
    assert (run / "checkpoints" / f"step_{last:08d}" / "manifest.json").exists()

    resume = ["train.resume=long", f"run.root={tmp_path}", "train.workers=1", f"train.steps={last + 3}"]
    done = submit(ray, "jobs/train.py", "tiny", *resume)
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps(run) == list(range(1, last + 4))
    assert [r["step"] for r in records(run, "event") if r["name"] == "resumed"][-1] == last


@pytest.mark.soak
def test_regrouping_survives_its_clusterer_and_training_does_not_wait(ray: Head, text: Path, tmp_path: Path) -> None:
    """Plans are applied; a killed clusterer restarts; a stopped clusterer delays no step."""
    run = tmp_path / "regrouped"
    often = ["burn_in=10", "period=10", "plan_lag=4", "overlap=4", "stats_every=2", "min_gain=0", "force=10"]
    options = [f"run.root={tmp_path}", f"data.path={text}", *QUICK, *(f"regroup.{value}" for value in often)]
    begun = submit(
        ray, "jobs/train.py", "tiny", "run.name=regrouped", "train.steps=100000", *options, name="regrouped", wait=False
    )
    assert begun.returncode == 0, begun.stderr

    def plans(*what: str) -> list[dict[str, Any]]:
        path = run / "plans.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [r for r in map(json.loads, lines) if r["name"] in what]

    def clusterer() -> psutil.Process | None:
        return next((p for p in ray.processes("Clusterer") if p.status() != psutil.STATUS_ZOMBIE), None)

    first = until(lambda: plans("applied"), "a plan")[0]
    assert first["plan"]["forced"] is True and first["moves"] == 8 and first["bytes"] > 0
    assert first["probe_after"] == pytest.approx(first["probe_before"], rel=1e-3)  # bfloat16
    old = clusterer()
    assert old is not None
    old.send_signal(signal.SIGKILL)
    until(lambda: plans("clusterer_restarted"), "the clusterer's restart")
    since = plans("clusterer_restarted")[0]["step"]
    until(lambda: [r for r in plans("made", "no_plan") if r["step"] > since], "decisions after the restart")
    frozen = until(clusterer, "the new clusterer")
    assert frozen.pid != old.pid
    frozen.send_signal(signal.SIGSTOP)
    try:
        at = steps(run)[-1]
        until(lambda: steps(run)[-1] >= at + 40, "forty steps without the clusterer")
        assert not [r for r in plans("made", "no_plan") if r["step"] > at + 20]
    finally:
        frozen.send_signal(signal.SIGCONT)
    at = steps(run)[-1]
    until(lambda: [r for r in plans("made", "no_plan", "refused") if r["step"] > at], "decisions after the thaw")

    command = [str(Path(sys.executable).with_name("ray")), "job", "stop", "--address", ray.dashboard, "regrouped"]
    subprocess.run(command, env=ray.environment, check=True, capture_output=True, timeout=180)
    until(lambda: [r for r in records(run, "event") if r["name"] == "stopped"], "the stop")
    until(lambda: clusterer() is None, "the clusterer's end")
    assert not [r for r in records(run, "event") if r["name"] == "resumed"]
    assert "Regrouping" in until(
        lambda: (run / "report.html").exists() and (run / "report.html").read_text(), "the report"
    )


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_stopped_plain_run_writes_a_checkpoint_and_names_the_way_on(
    number: signal.Signals, text: Path, tmp_path: Path
) -> None:
    """Without a head a local Ray starts. Ctrl-C, or the end of the terminal for all of its processes, stops the run."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
        "RAY_ADDRESS": "local",
        "RAY_AUTH_MODE": "disabled",
    }
    line = [sys.executable, str(REPO_ROOT / "jobs" / "train.py"), "tiny", "run.name=plain", f"run.root={tmp_path}"]
    process = subprocess.Popen(
        [*line, f"data.path={text}", "train.steps=100000", *QUICK],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    run = tmp_path / "plain"
    try:
        until(lambda: len(steps(run)) >= 2 or process.poll() is not None, "two steps")
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:  # a local Ray ends with its driver
            process.kill()
            process.communicate()
    assert process.returncode == 128 + number, output
    assert "train.resume=plain" in output
    last = steps(run)[-1]
    assert (run / "checkpoints" / f"step_{last:08d}" / "manifest.json").exists()
    assert (run / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "train.stepz=3"], "did you mean 'train.steps'"),
        (["tiny", "train.resume=nothing"], "no run to resume"),
        (["tiny", "train.workers=8,2"], "MIN at most MAX"),
        (["huge"], "unknown preset 'huge'"),
    ],
)
def test_a_bad_command_is_refused_before_anything_starts(arguments: list[str], message: str, tmp_path: Path) -> None:
    line = [sys.executable, str(REPO_ROOT / "jobs" / "train.py"), *arguments, f"run.root={tmp_path}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.soak
def test_an_unreachable_store_is_refused_before_the_run_is_created(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    store = f"s3://bucket/runs?endpoint_override=127.0.0.1:{port}&scheme=http&region=none"
    given = ["tiny", "run.name=x", f"run.root={tmp_path}", f"checkpoint.storage={store}", "train.workers=1"]
    environment = os.environ | {"RAY_ADDRESS": "local", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    line = [sys.executable, str(REPO_ROOT / "jobs" / "train.py"), *given]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and f"127.0.0.1:{port}" in done.stderr, done.stderr
    assert not (tmp_path / "x").exists()
