"""The checkpoint of the last step: retries on a full disk, the check of free space, and one owner through a fold."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from raymoe.config import Config, override
from raymoe.metrics import TrainingMetrics
from raymoe.storage.checkpoint import newest
from raymoe.storage.run_folder import RunFolder
from raymoe.training import checkpointing
from raymoe.training.checkpointing import MAX_RETRY_S, free_bytes
from raymoe.training.failures import Unrecoverable
from raymoe.training.loop import Trainer
from tests.support.presets import RESIDUAL
from tests.support.synthetic import Synthetic
from tests.training.test_loop import config, losses, records, train


class ManualClock:
    """A clock that only sleeping moves. `on_sleep` runs with the time after each sleep."""

    def __init__(self, on_sleep: Callable[[float], None] = lambda now: None) -> None:
        self.now, self.on_sleep = 0.0, on_sleep

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float, /) -> None:
        self.now += seconds
        self.on_sleep(self.now)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A disk whose checkpoints fail with ENOSPC while `full` is set."""
    state, replace = SimpleNamespace(full=False), os.replace

    def refuse(source: Any, target: Any) -> None:
        if state.full and "checkpoints" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return state


def trainer(run: Path, *changes: str, clock: Any = None, settings: Config | None = None) -> Trainer:
    metrics = TrainingMetrics(CollectorRegistry(), run="test", worker="0")
    settings = settings or config(*changes)
    return Trainer(settings, Synthetic(31), run, metrics, torch.device("cpu"), clock=clock or ManualClock())  # type: ignore[arg-type]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in records(run, "event") if event["name"] == name]


def test_a_full_disk_at_the_last_checkpoint_is_waited_for_and_nothing_is_trained_again(
    tmp_path: Path, disk: SimpleNamespace
) -> None:
    def free_the_disk(now: float) -> None:
        disk.full = now < 20

    disk.full, clock = True, ManualClock(free_the_disk)
    outcome = train(0, 1, str(tmp_path), ("train.steps=6",), clock=clock)
    assert outcome["step"] == 6 and 20 <= clock.now < 60
    found, _ = newest(RunFolder(tmp_path).checkpoints)
    assert found and found.step == 6
    weights = found.read(key for key in found.keys if key in outcome["held"])
    assert all(torch.equal(weights[key], outcome["held"][key]) for key in weights) and weights
    retries = events(tmp_path, "checkpoint_retry")
    assert [retry["retry_in_s"] for retry in retries] == [1, 2, 4, 8, 16]
    assert "needs" in retries[0]["reason"] and "bytes free" in retries[0]["reason"]
    assert all("No space left" in event["reason"] for event in events(tmp_path, "checkpoint_failed"))
    assert len(losses(tmp_path)) == 6


def test_a_last_checkpoint_that_cannot_be_written_is_a_permanent_failure_after_the_wait(
    tmp_path: Path, disk: SimpleNamespace
) -> None:
    disk.full, clock = True, ManualClock()
    with pytest.raises(Unrecoverable, match=r"step 6 could not be written under .* needs [\d,]+ bytes, .* free"):
        train(0, 1, str(tmp_path), ("train.steps=6", "checkpoint.final_wait_s=200"), clock=clock)
    assert 200 <= clock.now < 200 + MAX_RETRY_S
    assert len(losses(tmp_path)) == 6


def test_a_file_in_place_of_the_checkpoints_folder_fails_the_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(Unrecoverable, match=r"the checkpoint of step 6 could not be written under .*resume"):
        train(0, 1, str(tmp_path), ("train.steps=6", "checkpoint.final_wait_s=0"))
    assert len(losses(tmp_path)) == 6


def test_too_little_free_space_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(tmp_path, "train.steps=6")
    one.checkpoints.write(one.position, {})
    one.checkpoints.wait_for_checkpoint()
    (shard,) = tmp_path.glob("checkpoints/*/*.safetensors")
    size = one.checkpoints._size()
    header = int.from_bytes(shard.read_bytes()[:8], "little")
    assert size == shard.stat().st_size - 8 - header
    shutil.rmtree(tmp_path / "checkpoints")
    one.checkpoints.free_bytes = lambda _: 3 * size - 1
    with pytest.raises(Unrecoverable) as caught:
        one.train()
    for number in (3 * size, size, 3 * size - 1):
        assert f"{number:,} bytes" in str(caught.value)
    assert not losses(tmp_path)
    one.checkpoints.free_bytes = lambda _: 3 * size
    assert one.train()["step"] == 6


def test_a_resumed_run_needs_less_room_by_the_checkpoints_that_it_has(tmp_path: Path) -> None:
    train(0, 1, str(tmp_path), ("train.steps=12",))
    one = trainer(tmp_path, "train.steps=14")
    size = one.checkpoints._size()
    one.checkpoints.free_bytes = lambda _: size
    assert one.train()["step"] == 14


def test_free_bytes_of_a_folder_that_does_not_exist_is_that_of_its_parent(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_one_object_owns_the_checkpoints_of_a_run_that_is_folded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint in progress at the fold is of the flat model and completes; pruning and mirroring continue."""
    made: list[Any] = []
    real = checkpointing.BackgroundWriter.__init__
    monkeypatch.setattr(checkpointing.BackgroundWriter, "__init__", lambda self: (made.append(self), real(self))[0])
    settings = override(
        config(
            *RESIDUAL,
            "regroup.start=dense",
            "regroup.burn_in=10",
            "train.steps=20",
            "checkpoint.every=5",
            "checkpoint.keep=9",
        ),
        [f"checkpoint.storage=file://{tmp_path}/store", "run.name=run"],
    )
    (tmp_path / "run").mkdir()
    one = trainer(tmp_path / "run", settings=settings)
    owner = one.checkpoints
    one.train()
    assert one.checkpoints is owner and len(made) == 1
    assert [event["checkpoint"] for event in events(tmp_path / "run", "checkpoint_completed")] == [5, 10, 15, 20]
    for step, kind in ((10, "experts.0.gate"), (15, "clusters.0.base_gate")):
        manifest = (tmp_path / "run" / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text()
        assert f'"layers.0.{kind}"' in manifest
        assert (tmp_path / "store" / "run" / "checkpoints" / f"step_{step:08d}" / "manifest.json").exists()
