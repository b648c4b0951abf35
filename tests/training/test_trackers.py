"""Trackers: each package in its offline mode, and a run that continues without a failed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymoe.config import override, preset
from raymoe.training import trackers
from raymoe.training.trackers import PACKAGES, require_tracker, scalars, start_tracker
from tests.training.test_loop import config, losses, records, train


def test_scalars_are_the_finite_numbers_of_a_record() -> None:
    record = {"loss": 2.5, "grad_norm": float("nan"), "step": 3, "load_cv": {"experts": 0.5, "clusters": None}}
    assert scalars("train", record) == {"train/loss": 2.5, "train/load_cv/experts": 0.5}
    assert scalars("validation", {"loss": 1, "domains": {"wiki": 2.0, "web": None}}) == {
        "validation/loss": 1.0,
        "validation/domains/wiki": 2.0,
    }


@pytest.mark.parametrize("name", list(PACKAGES))
def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=rf"train\.tracker={name} .* `pip install raymoe\[{name}\]`"):
        require_tracker(name)
    require_tracker("")
    with pytest.raises(ValueError, match=r"train\.tracker"):
        override(preset("tiny"), ["train.tracker=nothing"])


class Recorded:
    """A tracker that keeps what it receives and fails at a step."""

    def __init__(self, fails_at: int = -1) -> None:
        self.values: dict[int, dict[str, float]] = {}
        self.fails_at, self.closed = fails_at, False

    def log(self, step: int, values: Any) -> None:
        if step == self.fails_at:
            raise ConnectionError("the service is not reachable")
        self.values.setdefault(step, {}).update(values)

    def close(self) -> None:
        self.closed = True


def test_a_tracker_receives_train_and_validation_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Recorded()
    monkeypatch.setattr("raymoe.training.run_log.start_tracker", lambda *_: one)
    train(0, 1, str(tmp_path), ("train.steps=3", "train.validate_every=2"))
    assert [values["train/loss"] for values in one.values.values()] == losses(tmp_path) and one.closed
    assert [step for step, values in one.values.items() if "validation/loss" in values] == [2, 3]


def test_a_tracker_that_fails_costs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Recorded(fails_at=2)
    monkeypatch.setattr("raymoe.training.run_log.start_tracker", lambda *_: one)
    assert train(0, 1, str(tmp_path), ("train.steps=4",))["step"] == 4
    (event,) = (event for event in records(tmp_path, "event") if event["name"] == "tracker_failed")
    assert event["step"] == 2 and "not reachable" in event["reason"] and set(one.values) == {1}


def logged(name: str, run: Path) -> None:
    """Log steps 1 to 3, resume after step 2, and log steps 3 and 4."""
    settings = override(config(), [f"train.tracker={name}", "run.name=tracked"])
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        one = start_tracker(settings, run, start)
        assert one is not None
        for step in steps:
            one.log(step, {"train/loss": 10.0 * step + start})
        one.close()


@pytest.mark.soak
def test_tensorboard_event_files_have_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    logged("tensorboard", tmp_path)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(1, 10), (2, 20), (3, 32), (4, 42)]


@pytest.mark.soak
def test_mlflow_continues_one_run_in_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    logged("mlflow", tmp_path)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("raymoe").experiment_id])
    assert run.info.run_name == "tracked" and run.info.status == "FINISHED"
    assert {metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")} == {1, 2, 3, 4}


@pytest.mark.soak
def test_wandb_offline_continues_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged("wandb", tmp_path)
    assert len(list(tmp_path.glob("wandb/offline-run-*-tracked/run-tracked.wandb"))) == 2
    summaries = [line.split()[-1] for line in capfd.readouterr().err.splitlines() if "train/loss " in line]
    assert "30" in summaries and summaries[-1] == "42"
