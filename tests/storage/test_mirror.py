"""Runs at a URI: complete checkpoints are restored, incomplete ones skipped, and a failing store costs no training."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.config import override, preset
from raymoe.ops.ray_head import free_ports, responds
from raymoe.storage.checkpoint import newest, step_folder, write_manifest, write_shard
from raymoe.storage.mirror import BackgroundMirror, Mirror
from raymoe.training.resolve import resolve
from tests.support.waiting import until


def checkpoint(run: Path, step: int) -> None:
    folder = step_folder(run / "checkpoints", step)
    for rank in range(2):
        write_shard(folder, rank, 2, {f"{rank}": torch.full((3,), float(step))})
    write_manifest(folder, step=step, world=2, meta={})


def a_run(folder: Path, *steps: int) -> Path:
    run = folder / "first"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"config": preset("tiny").to_dict()}))
    (run / "metrics.jsonl").write_text("{}\n")
    for name in ("tokenizer.json", "chat_template.jinja"):  # without them, a run from initial weights cannot resume
        (run / name).write_text(name)
    for step in steps:
        checkpoint(run, step)
    return run


def goes_there_and_comes_back(uri: str, folder: Path) -> None:
    run, mirror = a_run(folder / "here", 10, 20, 30), Mirror(uri, "first")
    with pytest.raises(FileNotFoundError, match="has no run named first"):
        Mirror(uri, "first").pull(folder / "there" / "first")
    for step in (10, 20, 30):
        mirror.push(run, step, keep=2)
    assert mirror.steps() == [30, 20]
    back = folder / "back" / "first"
    back.parent.mkdir()
    assert mirror.pull(back) == []
    found, skipped = newest(back / "checkpoints")
    assert found and found.step == 30 and not skipped
    assert torch.equal(found.read(["1"])["1"], torch.full((3,), 30.0))
    assert (back / "metrics.jsonl").read_text() == "{}\n"
    assert all((back / name).read_text() == name for name in ("tokenizer.json", "chat_template.jinja"))

    shard = "rank_0001_of_0002.safetensors"
    with mirror.files.open_output_stream(f"{mirror.base}/checkpoints/step_00000030/{shard}") as stream:
        stream.write(b"damaged")
    again = folder / "again" / "first"
    again.parent.mkdir()
    (reason,) = mirror.pull(again)
    assert "step 30" in reason and shard in reason
    older, _ = newest(again / "checkpoints")
    assert older and older.step == 20
    assert [p.name for p in again.parent.iterdir()] == ["first"]

    with mirror.files.open_output_stream(f"{mirror.base}/checkpoints/step_00000020/{shard}") as stream:
        stream.write(b"damaged")
    none = folder / "none" / "first"
    none.parent.mkdir()
    with pytest.raises(FileNotFoundError, match=rf"no valid checkpoint of first: .*{shard} of step 30"):
        mirror.pull(none)
    assert not list(none.parent.iterdir())


def test_a_folder(tmp_path: Path) -> None:
    goes_there_and_comes_back(f"file://{tmp_path}/store", tmp_path)


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An S3 server on loopback with one bucket."""
    (port,) = free_ports(1)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    server = subprocess.Popen(
        [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(lambda: responds(f"http://127.0.0.1:{port}/moto-api/", {}), "the object store")
        options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        files = Mirror(f"s3://runs?{options}&allow_bucket_creation=true", "x").files
        files.create_dir("runs")
        yield f"s3://runs/team?{options}"
    finally:
        server.kill()
        server.wait()


@pytest.mark.soak
def test_an_object_store(object_store: str, tmp_path: Path) -> None:
    goes_there_and_comes_back(object_store, tmp_path)


def test_a_run_is_resumed_from_its_storage(tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    Mirror(store, "first").push(a_run(tmp_path / "here", 10), 10, keep=2)
    root = tmp_path / "elsewhere"
    root.mkdir()
    given = [f"run.root={root}", "train.resume=first", f"checkpoint.storage={store}"]
    assert resolve(preset("tiny"), given).run.name == "first"
    found, _ = newest(root / "first" / "checkpoints")
    assert found and found.step == 10
    with pytest.raises(FileNotFoundError, match="named second"):
        resolve(preset("tiny"), [*given, "train.resume=second"])


def test_a_store_that_fails_is_reported_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    background = BackgroundMirror(Mirror(f"file://{tmp_path}/store", "first"), a_run(tmp_path / "here", 10, 20), 2)
    real = Mirror.push

    def push(self: Mirror, run: Path, step: int | None, keep: int) -> None:
        if step == 10:
            raise OSError("no route to the store")
        real(self, run, step, keep)

    monkeypatch.setattr(Mirror, "push", push)
    background.push(10)
    background.push(20)
    assert background.failures(wait=True) == [(10, "no route to the store")]
    assert background.failures(wait=True) == [] and background.mirror.steps() == [20]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://key:secret@bucket/x", "environment"),
        ("s3://bucket/x?access_key=1&secret_key=2", "environment"),
        ("nowhere://x", "not allowed"),
        ("relative/folder", "not allowed"),
    ],
)
def test_a_bad_uri_is_refused(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mirror(uri, "first")


def test_the_copies_of_a_run(tmp_path: Path) -> None:
    """Of a real run: those of `checkpoint.every` and the last, not those that only bound the loss."""
    from tests.training.test_elastic import trainer

    (tmp_path / "run").mkdir()
    store: Any = f"file://{tmp_path}/store"
    trainer(tmp_path / "run", f"checkpoint.storage={store}", "checkpoint.every=5", "run.name=first").train()
    assert Mirror(store, "first").steps() == [12, 10, 5]
    assert override(preset("tiny"), [f"checkpoint.storage={store}"]).checkpoint.storage == store


def test_a_checkpoint_stays_until_a_slow_store_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raymoe.training.loop import Trainer
    from tests.training.test_elastic import trainer

    gate, real_push, real_step = threading.Event(), Mirror.push, Trainer.forward_backward

    def push(self: Mirror, run: Path, step: int | None, keep: int) -> None:
        assert gate.wait(60)
        real_push(self, run, step, keep)

    def step(self: Trainer, number: int) -> Any:
        self.checkpoints.writer.wait()
        if number == 11:  # by now the newest two are of steps far beyond 5
            gate.set()
        return real_step(self, number)

    monkeypatch.setattr(Mirror, "push", push)
    monkeypatch.setattr(Trainer, "forward_backward", step)
    (tmp_path / "run").mkdir()
    given = ["checkpoint.every=5", "checkpoint.max_loss_s=1e-9", "checkpoint.keep=2", "run.name=first"]
    trainer(tmp_path / "run", f"checkpoint.storage=file://{tmp_path}/store", *given).train()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    events = [r for r in map(json.loads, lines) if r["kind"] == "event"]
    assert not [e for e in events if e["name"] == "copy_failed"]
    assert sum(e["name"] == "checkpoint_completed" for e in events) > 5
    assert Mirror(f"file://{tmp_path}/store", "first").steps() == [12, 10]  # 5 came, and went for newer ones
