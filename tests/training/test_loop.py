"""The loop over gloo processes: any number of ranks continues a checkpoint of any other, with every tensor equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from raymoe.config import Config, override, preset
from raymoe.metrics import TrainingMetrics
from raymoe.storage.checkpoint import newest
from raymoe.training.loop import MAX_SKIPPED, Trainer
from raymoe.training.optimizer import decays, learning_rate
from raymoe.training.progress import describe
from tests.support import processes
from tests.support.presets import RESIDUAL
from tests.support.synthetic import Synthetic

SMALL = [
    "model.layers=2", "model.d_model=16", "model.d_expert=12", "model.n_experts=10", "model.n_clusters=4",
    "model.experts_per_token=2", "model.residual_width=3", "model.heads=2", "model.kv_heads=1", "model.vocabulary=31", "model.context=8",
    "train.global_batch=8", "train.grain=2", "train.precision=float32", "train.warmup=5", "train.steps=40",
    "train.log_every=1", "train.validate_every=10", "train.validate_windows=6", "checkpoint.every=10",
    "train.bias_rate=0.1", "train.lr=2e-2",
]  # fmt: skip


def config(*changes: str) -> Config:
    return override(preset("tiny"), [*SMALL, *changes])


def train(rank: int, world: int, run: str, changes: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """Train from the newest checkpoint of `run` to the last step. Return the outcome and this rank's tensors."""
    metrics = TrainingMetrics(CollectorRegistry(), run="test", worker=str(rank))
    settings = config(*changes)
    trainer = Trainer(
        settings, Synthetic(settings.model.vocabulary), Path(run), metrics, torch.device("cpu"), **options
    )  # type: ignore[arg-type]
    outcome = trainer.train()
    held = trainer.model.logical() | trainer.optimizer.logical()
    return {"held": {k: v.clone() for k, v in held.items()}, **outcome}


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in records(run, "train")]


def copy_at(run: Path, target: Path, step: int) -> Path:
    """A copy of a run as it stood when it had just written the checkpoint of `step`."""
    import shutil

    shutil.copytree(run / "checkpoints" / f"step_{step:08d}", target / "checkpoints" / f"step_{step:08d}")
    shutil.copy(run / "metrics.jsonl", target)
    return target


KEEP = ("checkpoint.keep=9",)
KINDS = {"private": (), "residual": RESIDUAL, "flat": ("model.experts=flat", "model.gate=softmax")}


@pytest.mark.dist
@pytest.mark.parametrize("kind", KINDS)
def test_saved_on_two_continued_on_one_and_three(kind: str, tmp_path: Path) -> None:
    changes = (*KEEP, *KINDS[kind])
    two = tmp_path / "two"
    two.mkdir()
    results = processes.run(2, train, str(two), changes, folder=tmp_path)
    final = {key: value for result in results for key, value in result["held"].items()}
    reference = losses(two)
    sent = [r["a2a_bytes_per_token"] for r in records(two, "train")]
    # One row per chosen group out and back, forward and backward, float32, about half of them across; validation is not in it.
    groups = 2 if kind == "flat" else 1
    assert all(0.2 < b / (2 * groups * 4 * 16 * 4) < 0.9 for b in sent)
    assert len(reference) == 40 and reference[-1] < reference[0] - 0.3
    for world in (1, 3):
        resumed = copy_at(two, tmp_path / f"world{world}", 20)
        if world == 1:
            others = [train(0, 1, str(resumed), changes)]
        else:
            others = processes.run(world, train, str(resumed), changes, folder=tmp_path)
        assert [r["step"] for r in records(resumed, "train")] == list(range(1, 41))  # each step once
        for a, b in zip(losses(resumed)[20:], reference[20:], strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        seen: set[str] = set()
        for result in others:
            for key, value in result["held"].items():
                torch.testing.assert_close(value, final[key], rtol=2e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")
            seen |= set(result["held"])
        assert seen == set(final)


@pytest.mark.dist
@pytest.mark.parametrize("changes", [KINDS["private"], KINDS["residual"]], ids=["private", "residual"])
def test_every_expert_and_moment_survives_every_layout(changes: tuple[str, ...], tmp_path: Path) -> None:
    """Weights, biases and both moments of each logical tensor, bit for bit, through saves on 2, 3, 5 and 1."""
    run = tmp_path / "run"
    run.mkdir()
    expected: dict[str, torch.Tensor] = {}
    for world, steps in ((2, 5), (3, 10), (5, 15), (1, 20)):
        checkpoint, skipped = newest(run / "checkpoints")
        if checkpoint:
            stored = checkpoint.read(key for key in checkpoint.keys if not key.startswith("statistics."))
            assert set(stored) == set(expected) and not skipped
            for key, value in expected.items():  # what was in memory is what was stored
                assert torch.equal(stored[key], value), key
        # A run of zero further steps shows what this world restores.
        if checkpoint:
            again = processes.run(world, restored, str(run), changes, folder=tmp_path)
            for result in again:
                for key, value in result.items():
                    assert torch.equal(value, expected[key]), f"{key} on {world}"
            assert set().union(*again) == set(expected)
        results = processes.run(
            world, train, str(run), (*KEEP, *changes, "checkpoint.every=5", f"train.steps={steps}"), folder=tmp_path
        )
        expected = {key: value for result in results for key, value in result["held"].items()}
    moments = [k for k in expected if k.startswith("moments.")]
    assert len(moments) == 2 * len([k for k in expected if not k.startswith("moments.") and not k.endswith("bias")])


def restored(rank: int, world: int, run: str, changes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    metrics = TrainingMetrics(CollectorRegistry(), run="test", worker=str(rank))
    trainer = Trainer(config(*KEEP, *changes), Synthetic(31), Path(run), metrics, torch.device("cpu"))  # type: ignore[arg-type]
    held = trainer.model.logical() | trainer.optimizer.logical()
    return {k: v.clone() for k, v in held.items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_same_seed_same_run_bit_for_bit(precision: str, tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        train(0, 1, str(tmp_path / name), (f"train.precision={precision}",))
        runs.append(losses(tmp_path / name))
    assert runs[0] == runs[1] and len(runs[0]) == 40
    (tmp_path / "c").mkdir()
    train(0, 1, str(tmp_path / "c"), (f"train.precision={precision}", "run.seed=1"))
    assert losses(tmp_path / "c") != runs[0]


def test_records_have_what_a_reader_relies_on(tmp_path: Path) -> None:
    train(0, 1, str(tmp_path), ())
    first, last = records(tmp_path, "train")[0], records(tmp_path, "train")[-1]
    for name in ("loss", "lr", "tokens_per_s", "step_ms", "a2a_bytes_per_token", "version", "rss_mb", "grad_norm"):
        assert name in first
    assert set(first["load_cv"]) == set(first["load_max_vio"]) == {"experts", "clusters", "workers"}
    assert [len(row) for row in first["load_experts"]] == [10, 10]
    for row in (*last["load_experts"], *last["load_clusters"]):
        assert sum(row) == pytest.approx(1)
    validation = records(tmp_path, "validation")
    assert [v["step"] for v in validation] == [10, 20, 30, 40] and validation[-1]["whole"]
    assert set(validation[0]["domains"]) == {"up", "down"}
    assert [r["assignment"] for r in records(tmp_path, "assignment")] == [
        [list(row) for row in config().model.default_assignment()]
    ]
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    best = min(validation, key=lambda v: v["loss"])["step"]
    assert set(kept) == {"step_00000030", "step_00000040", f"step_{best:08d}"}


def test_a_corrupt_newest_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path: Path) -> None:
    train(0, 1, str(tmp_path), ())
    expected = losses(tmp_path)
    shard = next((tmp_path / "checkpoints" / "step_00000040").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    train(0, 1, str(tmp_path), ())
    assert losses(tmp_path) == expected
    events = records(tmp_path, "event")
    assert any(e["name"] == "resumed" and e["step"] == 30 for e in events)
    assert any(e["name"] == "checkpoint_skipped" and "step_00000040" in e["reason"] for e in events)


def test_a_run_killed_before_its_first_checkpoint_restarts_and_records_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    train(0, 1, str(tmp_path / "whole"), ())
    run = tmp_path / "killed"
    run.mkdir()
    real = Trainer.forward_backward

    def killed(self: Trainer, step: int) -> Any:
        if self.position.step == 5:
            raise KeyboardInterrupt
        return real(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "forward_backward", killed)
        with pytest.raises(KeyboardInterrupt):
            train(0, 1, str(run), ())
    train(0, 1, str(run), ())
    first = records(run, "event")[0]
    assert (first["name"], first["step"], first["attempt"]) == ("restarted", 0, 2)
    assert first["redone_steps"] == 5
    assert describe(first) == "restarted attempt 2, workers 1, redone steps 5, skipped steps 0"
    assert losses(run) == losses(tmp_path / "whole")


def test_a_stop_checkpoints_at_the_next_step_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    train(0, 1, str(tmp_path / "whole"), ())
    run = tmp_path / "stopped"
    run.mkdir()
    (run / "stop").touch()
    outcome = train(0, 1, str(run), ())
    assert outcome["stopped"] and outcome["step"] == 1
    (run / "stop").unlink()
    assert not train(0, 1, str(run), ())["stopped"]
    assert losses(run) == losses(tmp_path / "whole")


def test_a_step_without_a_finite_loss_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Trainer.forward_backward, []

    def poisoned(self: Trainer, step: int) -> Any:
        calls.append(step)
        if step in (3, 4):
            with torch.no_grad():
                self.model.final_norm.mul_(float("nan"))
        result = real(self, step)
        if step in (3, 4):
            with torch.no_grad():
                self.model.final_norm.fill_(1.0)
        return result

    monkeypatch.setattr(Trainer, "forward_backward", poisoned)
    outcome = train(0, 1, str(tmp_path), ("train.steps=8",))
    assert outcome["skipped"] == 2
    assert [r["step"] for r in records(tmp_path, "event") if r["name"] == "step_skipped"] == [4, 5]
    assert records(tmp_path, "train")[-1]["skipped_steps"] == 2
    assert all(v.isfinite().all() for v in outcome["held"].values())
    monkeypatch.setattr(Trainer, "forward_backward", lambda self, step: (float("nan"), *real(self, step)[1:]))
    with pytest.raises(FloatingPointError, match=f"{MAX_SKIPPED} steps in a row"):
        (tmp_path / "lost").mkdir()
        train(0, 1, str(tmp_path / "lost"), ())


def test_a_full_disk_at_a_checkpoint_is_reported_and_earlier_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    real, fail = os.fsync, {"on": False}

    def full(descriptor: int) -> None:
        if fail["on"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    step = Trainer.forward_backward

    def watched(self: Trainer, number: int) -> Any:
        fail["on"] = 15 <= number < 25
        return step(self, number)

    monkeypatch.setattr(Trainer, "forward_backward", watched)
    train(0, 1, str(tmp_path), ("train.steps=30", *KEEP))
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if (p / "manifest.json").exists())
    assert names == ["step_00000010", "step_00000030"]
    failed = [r for r in records(tmp_path, "event") if r["name"] == "checkpoint_failed"]
    assert failed and "No space left" in failed[0]["reason"]


def test_schedule_and_decay() -> None:
    section = config("train.warmup=10", "train.steps=100", "train.lr=1", "train.final_lr=0.1").train
    rates = [learning_rate(section, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False)) and rates[-1] == pytest.approx(
        0.1, abs=0.01
    )
    from raymoe.model.transformer import Transformer

    named = dict(Transformer(config(*RESIDUAL).model).named_parameters())
    spared = {name.rsplit(".", 1)[-1] for name, p in named.items() if not decays(name, p)}
    assert spared == {
        "final_norm",
        "attention_norm",
        "ffn_norm",
        "gate_in",
        "gate_out",
        "up_in",
        "up_out",
        "down_in",
        "down_out",
    }


def test_a_mixture_changes_the_shares_and_records_the_epochs(tmp_path: Path) -> None:
    from raymoe.data.corpus import Corpus as Prepared
    from tests.data.test_corpus import prepared, prose

    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "early.txt").write_text(prose("abcdef", 300))
    (tmp_path / "text" / "late.txt").write_text(prose("uvwxyz", 60))
    corpus: Prepared = prepared(tmp_path / "text", tmp_path / "cache")
    settings = config("model.vocabulary=300", "model.context=16", "train.steps=30", "train.mixture=late:3,early:1")
    (tmp_path / "run").mkdir()
    metrics = TrainingMetrics(CollectorRegistry(), run="test", worker="0")
    trainer = Trainer(settings, corpus, tmp_path / "run", metrics, torch.device("cpu"))
    late = sum((trainer.grains.read(step, range(8)).domain == 1).sum() for step in range(30))
    assert late == pytest.approx(180, abs=1.5)
    trainer.train()
    epochs = [r["epochs"] for r in records(tmp_path / "run", "train")]
    windows = (len(corpus.stream("train", "late")) - 1) // 16
    assert epochs[-1]["late"] == late / windows and set(epochs[0]) == {"early", "late"}
