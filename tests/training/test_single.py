"""Runs of one worker in this process: to the end, stopped and resumed, and with regrouping."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raymoe.config import Config, override, preset
from raymoe.data.corpus import Corpus
from raymoe.data.prepare import prepare
from raymoe.storage.run_folder import RunFolder, read_records
from raymoe.storage.run_lock import RunInUse, own_run
from raymoe.training.loop import Trainer
from raymoe.training.single import train_here
from tests.training.test_loop import SMALL

TEXT = "".join(f"{i} sheep and {i * i % 97} goats graze on hill {i % 13}.\n" for i in range(1500))


def config(root: Path, *changes: str) -> Config:
    (root / "text.txt").write_text(TEXT)
    own = [
        "model.vocabulary=300",
        f"run.root={root}",
        "run.name=first",
        f"data.path={root / 'text.txt'}",
        "train.steps=12",
    ]
    every = ["checkpoint.every=4", "train.validate_every=4", "regroup.mode=off", "train.workers=1", "train.threads=1"]
    return override(preset("tiny"), [*SMALL, *own, *every, *changes])


def corpus(of: Config) -> Corpus:
    return Corpus.open(prepare(of, progress=False))


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_records(RunFolder(run).metrics) if r["kind"] == "train"]


def test_a_run_leaves_what_an_ordinary_run_leaves(tmp_path: Path) -> None:
    settings = config(tmp_path)
    outcome = train_here(settings, tmp_path / "first", corpus(settings))
    folder = RunFolder(tmp_path / "first")
    assert outcome == json.loads(folder.outcome.read_text())
    assert (outcome["step"], outcome["stopped"]) == (12, False) and 50 < outcome["peak_rss_mb"] < 1e5
    assert [r["step"] for r in read_records(folder.metrics) if r["kind"] == "validation"] == [4, 8, 12]
    assert all(path.exists() for path in (folder.report, folder.config_yaml, folder.checkpoints / "step_00000012"))
    assert not folder.lock.exists()


def test_a_stopped_run_resumes_and_equals_an_undisturbed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)
    text = corpus(settings)
    train_here(settings, tmp_path / "whole", text)
    step = Trainer.train_step

    def stopping(trainer: Trainer):
        if trainer.position.step == 5:
            RunFolder(tmp_path / "first").stop_request.touch()
        return step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", stopping)
        assert train_here(settings, tmp_path / "first", text)["stopped"]
    assert losses(tmp_path / "first")[-1][0] == 6
    assert train_here(settings, tmp_path / "first", text)["step"] == 12
    assert losses(tmp_path / "first") == losses(tmp_path / "whole")
    assert train_here(settings, tmp_path / "first", text)["step"] == 12, "a finished run has no step left"


def test_a_request_before_the_first_step_stops_it(tmp_path: Path) -> None:
    settings = config(tmp_path)
    (tmp_path / "stop").touch()
    assert train_here(settings, tmp_path / "first", corpus(settings), tmp_path / "stop")["stopped"]
    assert losses(tmp_path / "first") == [] and not RunFolder(tmp_path / "first").outcome.exists()


def test_a_run_in_use_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with own_run(tmp_path / "first"), pytest.raises(RunInUse):
        train_here(settings, tmp_path / "first", corpus(settings))


def test_experts_regroup_without_an_actor(tmp_path: Path) -> None:
    regroup = [
        "mode=lockstep",
        "burn_in=4",
        "period=6",
        "plan_lag=2",
        "stats_every=1",
        "overlap=2",
        "force=4",
        "sample=16",
    ]
    settings = config(tmp_path, *(f"regroup.{item}" for item in regroup), "train.steps=16")
    train_here(settings, tmp_path / "first", corpus(settings))
    assert "applied" in [r["name"] for r in read_records(RunFolder(tmp_path / "first").plans)]
