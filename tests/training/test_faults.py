"""Faults are reported, cost at most the steps since the newest checkpoint, and leave no rank waiting."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from prometheus_client import CollectorRegistry

from raymoe.config import override, preset
from raymoe.metrics import TrainingMetrics
from raymoe.model.transformer import Transformer
from raymoe.parallel.gradients import Gradients
from raymoe.storage import checkpoint as checkpoint_module
from raymoe.storage.files import write_json
from raymoe.training.journal import Journal
from raymoe.training.loop import Trainer
from raymoe.training.regroup import apply as regroup
from raymoe.training.regroup.clients import ReplayClient
from raymoe.training.run_report import write_report
from raymoe.training.state import LostCheckpoints
from raymoe.training.stragglers import REPORTS, Stragglers, ratios
from tests.storage.test_checkpoint import small_files
from tests.support import processes
from tests.support.synthetic import Synthetic
from tests.training.test_loop import SMALL, losses, records, train

VICTIM = 1
STEPS = 20
"""Of a run, with checkpoints at 8 and 16 and a plan that takes effect at 14."""

PLAN = {
    "version": 1, "made_at_step": 8, "effective_step": 14, "reason": "", "expected_gain": 0.1,
    "assignment": [[1, 0, 0, 0, 1, 2, 2, 2, 3, 3], [0, 0, 0, 1, 1, 2, 2, 3, 2, 3]],
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process wrote outlives it; only a machine's end would not leave it."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


# Workers that die, or stop


def trainer(rank: int, run: str, *changes: str) -> Trainer:
    """In a process of its own."""
    os.fsync = lambda _: None
    plans = Path(run).parent / "plans.jsonl"
    plan = ["regroup.mode=replay", f"regroup.replay={plans}", "regroup.overlap=3"]
    often = [f"train.steps={STEPS}", "checkpoint.every=8", "checkpoint.keep=9", "train.validate_every=100"]
    settings = override(preset("tiny"), [*SMALL, *often, *plan, *changes])
    metrics = TrainingMetrics(CollectorRegistry(), run="test", worker=str(rank))
    corpus: Any = Synthetic(settings.model.vocabulary)
    return Trainer(settings, corpus, Path(run), metrics, torch.device("cpu"), ReplayClient(plans))


def whole(rank: int, world: int, run: str) -> Any:
    return trainer(rank, run).train()


def stricken(rank: int, world: int, run: str, fault: str) -> Any:
    """As `whole`, and the victim ends itself, by a signal, in the middle of something."""
    if rank == VICTIM:
        STRIKES[fault]()
    return whole(rank, world, run)


def end(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


NOW = {"step": -1}


def at_step(owner: Any, name: str, step: int, strike: Callable[[], None]) -> None:
    """Strike when `owner.name` is called in this step."""
    real_step, real = Trainer.forward_backward, getattr(owner, name)

    def noted(self: Trainer, number: int) -> Any:
        NOW["step"] = number
        return real_step(self, number)

    def struck(*arguments: Any, **options: Any) -> Any:
        if NOW["step"] == step:
            strike()
        return real(*arguments, **options)

    Trainer.forward_backward = noted  # type: ignore[method-assign]
    setattr(owner, name, struck)


def at_checkpoint(step: int) -> None:
    """Strike when half of this rank's file is on the disk."""
    real = checkpoint_module.write_tensors

    def torn(path: Path, tensors: Any) -> Any:
        if path.parent.name == f"step_{step:08d}":
            path.with_name(f".{path.name}.partial").write_bytes(bytes(100))
            end()
        return real(path, tensors)

    checkpoint_module.write_tensors = torn


STRIKES: dict[str, Callable[[], None]] = {
    "in its forward": lambda: at_step(Transformer, "hidden", 13, end),
    "in the all-to-all": lambda: at_step(dist, "all_to_all_single", 13, end),
    "in a remap": lambda: setattr(regroup, "remap", lambda *_, **__: end()),
    "writing its checkpoint": lambda: at_checkpoint(16),
    "stopped": lambda: at_step(Transformer, "hidden", 13, lambda: end(signal.SIGSTOP)),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(begun(tmp_path_factory.mktemp("undisturbed"), whole))


def begun(folder: Path, function: Callable[..., Any]) -> Path:
    (folder / "run").mkdir(exist_ok=True)
    (folder / "plans.jsonl").write_text(json.dumps({"kind": "plan", "step": 1, "name": "applied", "plan": PLAN}) + "\n")
    processes.run(2, function, str(folder / "run"), folder=folder)
    return folder / "run"


QUICK = ("in its forward", "stopped")
"""Those that every run of the tests has time for."""


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=pytest.mark.dist if fault in QUICK else pytest.mark.soak) for fault in STRIKES]
)
def test_a_lost_worker_ends_the_others_and_a_restart_loses_nothing(
    fault: str, undisturbed: list[float], tmp_path: Path
) -> None:
    """Three workers, of which one is killed or hangs; two continue from the newest complete checkpoint."""
    run, timeout = tmp_path / "run", 4.0 if fault == "stopped" else 10.0
    run.mkdir()
    (tmp_path / "plans.jsonl").write_text(
        json.dumps({"kind": "plan", "step": 1, "name": "applied", "plan": PLAN}) + "\n"
    )
    made = processes.outcomes(
        3, stricken, str(run), fault, folder=tmp_path, timeout_s=timeout, wait_s=60,
        absent=VICTIM if fault == "stopped" else None,
    )  # fmt: skip
    assert made[VICTIM].error == ("absent" if fault == "stopped" else "died: exit code -9")
    for rank in (0, 2):
        assert "RuntimeError" in made[rank].error or "DistBackendError" in made[rank].error, made[rank].error
        assert made[rank].seconds < timeout + 10  # one may learn of it by its own timeout
    begun(tmp_path, whole)
    (resumed,) = (event for event in records(run, "event") if event["name"] == "resumed")
    assert resumed["step"] == 8
    assert [record["step"] for record in records(run, "train")] == list(range(1, STEPS + 1))
    assert losses(run) == pytest.approx(undisturbed, rel=1e-4)
    skipped = [event for event in records(run, "event") if event["name"] == "checkpoint_skipped"]
    assert bool(skipped) == (fault == "writing its checkpoint")


# A worker that is slow


def slowed(rank: int, world: int, run: str) -> tuple[float, float]:
    """One worker computes slowly; return its gauges."""
    if rank == VICTIM:
        real = Transformer.hidden

        def late(self: Transformer, *arguments: Any, **options: Any) -> Any:
            time.sleep(0.1)
            return real(self, *arguments, **options)

        Transformer.hidden = late  # type: ignore[method-assign]
    one = trainer(rank, run, "train.steps=12", "train.log_every=4")
    one.train()
    value = one.metrics.registry.get_sample_value
    labels = {"run": "test", "worker": str(rank)}
    ratio, seconds = (value(f"raymoe_worker_{name}", labels) for name in ("slowness_ratio", "compute_seconds"))
    assert ratio is not None and seconds is not None
    return ratio, seconds


@pytest.mark.dist
def test_a_straggler_is_named(tmp_path: Path) -> None:
    """All take as long for a step, since they wait for it."""
    run = begun(tmp_path, slowed)
    named = [event for event in records(run, "event") if event["name"] == "straggler"]
    assert [event["worker"] for event in named] == [VICTIM] and named[0]["factor"] > 2
    assert [event["step"] for event in named] == [4 * REPORTS]
    last = records(run, "train")[-1]
    assert last["slowness"][VICTIM] > 2 > last["slowness"][0]
    assert last["compute_ms"][VICTIM] > 200 and last["compute_ms"][0] < last["step_ms"] / 2


@pytest.mark.parametrize(
    ("compute", "grains", "expected"),
    [
        ([1.0], [4], [None]),
        ([1.0, 3.0], [2, 2], [1 / 3, 3.0]),
        ([2.0, 1.0, 1.0], [2, 1, 1], [1.0, 1.0, 1.0]),  # who has more to do is not slow
        ([1.0, 1.0, 0.1], [1, 1, 0], [1.0, 1.0, None]),
        ([1.0, 1.0, 9.0, 1.0], [1, 1, 1, 1], [1.0, 1.0, 9.0, 1.0]),
        ([0.0, 1.0], [1, 1], [0.0, None]),
    ],
)
def test_slowness_is_of_the_others_median(
    compute: list[float], grains: list[int], expected: list[float | None]
) -> None:
    assert ratios(compute, grains) == expected


def test_a_worker_is_named_once_until_it_was_as_fast_as_others() -> None:
    slow = Stragglers()
    seen = [slow.update([1.0, ratio]) for ratio in (3, 3, 3, 1, 3, None, 2, 2, 2)]
    assert seen == [[], [1], [], [], [], [], [], [1], []]


# Disks that are full, and folders that may not be written


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_a_checkpoint_that_cannot_be_written_is_reported_and_the_next_one_is(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def refuse(source: Any, target: Any) -> None:
        if "step_00000020" in str(target):
            raise OSError(code, os.strerror(code))
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    train(0, 1, str(tmp_path), ("train.steps=30", "checkpoint.keep=9"))
    assert len(losses(tmp_path)) == 30
    failed = [event for event in records(tmp_path, "event") if event["name"] == "checkpoint_failed"]
    assert [event["checkpoint"] for event in failed] == [20] and os.strerror(code) in failed[0]["reason"]
    assert [p.parent.name for p in sorted(tmp_path.glob("checkpoints/*/manifest.json"))] == [
        "step_00000010", "step_00000030",
    ]  # fmt: skip


def test_a_disk_that_finalizes_slowly_delays_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_step, real_manifest, later = Trainer.forward_backward, checkpoint_module.write_manifest, threading.Event()

    def step(self: Trainer, number: int) -> Any:
        if number == 16:
            later.set()
        return real_step(self, number)

    def manifest(*arguments: Any, **named: Any) -> Any:
        assert later.wait(60), "training waits"
        return real_manifest(*arguments, **named)

    monkeypatch.setattr(Trainer, "forward_backward", step)
    monkeypatch.setattr("raymoe.training.checkpointing.write_manifest", manifest)
    train(0, 1, str(tmp_path), ("train.steps=20",))
    assert [r["checkpoint"] for r in records(tmp_path, "event") if r["name"] == "checkpoint_completed"] == [10, 20]


def test_a_shard_that_disappears_during_finalization_costs_that_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint_module.read_json

    def read(path: Path, *arguments: Any) -> Any:
        if "step_00000010" in str(path) and path.name.startswith("rank"):
            path.unlink()
        return real(path, *arguments)

    monkeypatch.setattr(checkpoint_module, "read_json", read)
    train(0, 1, str(tmp_path), ("train.steps=20",))
    completed = {r["checkpoint"]: r for r in records(tmp_path, "event") if r["name"].startswith("checkpoint")}
    assert completed[10]["name"] == "checkpoint_failed" and "rank_0000_of_0001.json" in completed[10]["reason"]
    assert completed[20]["name"] == "checkpoint_completed"


@pytest.mark.parametrize("harm", ["gone", "damaged"])
def test_a_run_whose_checkpoints_are_lost_does_not_restart_from_step_0(harm: str, tmp_path: Path) -> None:
    train(0, 1, str(tmp_path), ("train.steps=12", "checkpoint.keep=9"))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    if harm == "gone":
        (tmp_path / "checkpoints").rename(tmp_path / "moved")
    for shard in tmp_path.glob("checkpoints/*/*.safetensors"):
        shard.write_bytes(b"x")
    with pytest.raises(
        LostCheckpoints, match=r"completed the checkpoint of step 12: bring the folder back and resume, or start a new"
    ):
        train(0, 1, str(tmp_path), ("train.steps=14",))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    if harm == "gone":
        (tmp_path / "moved").rename(tmp_path / "checkpoints")
        train(0, 1, str(tmp_path), ("train.steps=14",))
        assert len(losses(tmp_path)) == 14


def test_what_a_run_resumed_from_is_missed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of its completion is of a later step and is cut on the resume."""
    real = Trainer.forward_backward

    def dies(self: Trainer, step: int) -> Any:
        if step == 15:
            raise RuntimeError("here it dies")
        return real(self, step)

    monkeypatch.setattr(Trainer, "forward_backward", dies)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="here it dies"):
            train(0, 1, str(tmp_path), ("train.steps=20",))
    assert not [r for r in records(tmp_path, "event") if r["name"] == "checkpoint_completed"]
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    with pytest.raises(LostCheckpoints, match="completed the checkpoint of step 10"):
        train(0, 1, str(tmp_path), ("train.steps=20",))


def test_old_checkpoints_that_cannot_be_removed_do_not_spoil_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: Any) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr("raymoe.storage.checkpoint.shutil.rmtree", busy)
    train(0, 1, str(tmp_path), ("train.steps=40", "checkpoint.keep=2"))
    assert [r["checkpoint"] for r in records(tmp_path, "event") if r["name"] == "checkpoint_completed"] == [
        10,
        20,
        30,
        40,
    ]


def test_a_journal_on_a_full_disk_loses_no_record_and_tears_no_line(tmp_path: Path, capsys: Any) -> None:
    journal, path = Journal(tmp_path / "metrics.jsonl", 0), tmp_path / "metrics.jsonl"
    made = [{"kind": "train", "step": step, "text": "x" * 50} for step in range(40)]
    for record in made[:10]:
        journal.write(record)
    with small_files(path.stat().st_size + 30):  # the next line does not fit
        for record in made[10:20]:
            journal.write(record)
        assert [json.loads(line) for line in path.read_text().splitlines()] == made[:10]
    assert "cannot write (File too large); keeping records in memory" in capsys.readouterr().err
    for record in made[20:]:
        journal.write(record)
    assert [json.loads(line) for line in path.read_text().splitlines()] == made


def test_a_report_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"config": {}}))
    before = write_report(tmp_path).read_text()
    with small_files(100), pytest.raises(OSError):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "report.html"]


def test_an_export_that_cannot_be_written_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from jobs import export as job
    from raymoe.export import export as compress

    monkeypatch.setattr(sys, "argv", ["export.py", "first", "--root", str(tmp_path), "--threads", "1"])
    monkeypatch.setattr(compress, "export", lambda *_, **__: write_json(tmp_path / "manifest.json", {"a": "x" * 999}))
    with small_files(100):
        assert job.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("export.py: ") and "cannot write" in error and "free space and permissions" in error
    assert not list(tmp_path.iterdir())


# Numbers that are none


def test_gradients_that_are_not_finite_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Gradients.reduce, []

    def poisoned(self: Gradients) -> None:
        real(self)
        calls.append(1)
        if len(calls) in (4, 5):
            self.buffer.fill_(float("inf") if len(calls) == 4 else float("nan"))

    monkeypatch.setattr(Gradients, "reduce", poisoned)
    outcome = train(0, 1, str(tmp_path), ("train.steps=8",))
    assert outcome["skipped"] == 2 and len(losses(tmp_path)) == 8
    assert [r["step"] for r in records(tmp_path, "event") if r["name"] == "step_skipped"] == [4, 5]
    assert all(value.isfinite().all() for value in outcome["held"].values())
