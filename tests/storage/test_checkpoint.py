"""Checkpoints: what one world size wrote another reads, and nothing damaged or hostile is believed."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from raymoe.storage import files
from raymoe.storage import manifest as manifest_module
from raymoe.storage.checkpoint import (
    BackgroundWriter,
    Checkpoint,
    CorruptCheckpoint,
    newest,
    prune,
    step_folder,
    write_manifest,
    write_shard,
)

META = {"version": 3, "assignment": [[0, 1], [1, 0]], "loss": 1.5}


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layers.0.experts.{e}.gate_in": torch.randn(8, 2, generator=generator) for e in range(5)}
    tensors |= {f"moments.m.{key}": torch.randn(8, 2, generator=generator) for key in list(tensors)}
    return tensors | {"layers.0.experts.0.bias": torch.tensor(0.25), "step_sums": torch.arange(3)}


def save(folder: Path, step: int = 200, world: int = 2, seed: int = 0, meta: dict[str, Any] | None = None) -> Path:
    tensors = weights(seed)
    keys = sorted(tensors)
    for rank in range(world):
        write_shard(folder, rank, world, {key: tensors[key] for key in keys[rank::world]})
    write_manifest(folder, step=step, world=world, meta=META if meta is None else meta)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest's JSON in place."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(folder: Path, file: str, reason: str, verify: bool = True) -> None:
    with pytest.raises(CorruptCheckpoint, match=reason) as caught:
        Checkpoint.open(folder, verify)
    assert caught.value.file == folder / file
    assert str(folder / file) in str(caught.value) and caught.value.reason in str(caught.value)


# Round trips


@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_any_reader_gets_the_keys_it_names(tmp_path: Path, world: int) -> None:
    expected = weights()
    checkpoint = Checkpoint.open(save(tmp_path / "c", world=world))
    assert (checkpoint.step, checkpoint.world, checkpoint.meta) == (200, world, META)
    assert set(checkpoint.keys) == set(expected)
    some = sorted(expected)[1::2]
    read = checkpoint.read(some)
    assert set(read) == set(some)
    for key in some:
        assert torch.equal(read[key], expected[key]) and read[key].dtype == expected[key].dtype
        assert checkpoint.shape(key) == tuple(expected[key].shape)
    with pytest.raises(ValueError, match="no tensor 'nope'"):
        checkpoint.read(["nope"])


def test_what_was_read_is_apart_from_the_files(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", world=1)
    checkpoint = Checkpoint.open(folder)
    first, second = checkpoint.read(checkpoint.keys), checkpoint.read(checkpoint.keys)
    for tensor in first.values():
        tensor.zero_()
    Checkpoint.open(folder)
    (path,) = folder.glob("*.safetensors")
    with path.open("r+b") as file:  # in place
        file.write(b"\0" * path.stat().st_size)
    for key, tensor in second.items():
        assert torch.equal(tensor, weights()[key])


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
    transposed=st.booleans(),
)
def test_every_dtype_and_layout_survives(
    tmp_path_factory: Any, shape: list[int], dtype: torch.dtype, transposed: bool
) -> None:
    folder = tmp_path_factory.mktemp("c")
    x = (torch.randn(shape) * 3).to(dtype)
    x = x.mT if transposed and x.ndim >= 2 else x
    write_shard(folder, 0, 1, {"x": x})
    write_manifest(folder, step=0, world=1, meta={})
    read = Checkpoint.open(folder).read(["x"])["x"]
    assert read.dtype == dtype and torch.equal(read, x)


def test_the_finished_folder_holds_the_manifest_and_the_shards(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_shard(folder, 3, 4, {"other": torch.zeros(2)})  # an earlier attempt, on four ranks
    (folder / ".rank_0000_of_0002.safetensors.partial").write_bytes(b"torn")
    save(folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["manifest.json", "rank_0000_of_0002.safetensors", "rank_0001_of_0002.safetensors"]
    for name in names:
        assert (folder / name).stat().st_mode & 0o444 == 0o444


def test_a_manifest_needs_every_rank(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, 2, {"a": torch.zeros(2)})
    with pytest.raises(FileNotFoundError, match="rank 1 of 2"):
        write_manifest(tmp_path, step=1, world=2, meta={})
    assert not (tmp_path / "manifest.json").exists()


def test_a_key_belongs_to_one_rank(tmp_path: Path) -> None:
    for rank in range(2):
        write_shard(tmp_path, rank, 2, {"a": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"'a' is in rank_0000_of_0002.* and in rank_0001"):
        write_manifest(tmp_path, step=1, world=2, meta={})
    assert not (tmp_path / "manifest.json").exists()


def test_a_shard_being_rewritten_is_not_described_by_its_old_sidecar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path, 0, 1, {"a": torch.zeros(2)})
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", full_disk)
        write_shard(tmp_path, 0, 1, {"a": torch.ones(2)})
    with pytest.raises(FileNotFoundError):
        write_manifest(tmp_path, step=1, world=1, meta={})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.zeros(1)])
def test_meta_must_be_json(tmp_path: Path, value: object) -> None:
    write_shard(tmp_path, 0, 1, {"a": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"content of manifest\.json is not JSON"):
        write_manifest(tmp_path, step=1, world=1, meta={"loss": value})
    assert not (tmp_path / "manifest.json").exists()


# Damage


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    name = "rank_0001_of_0002.safetensors"

    def damaged(label: str, damage: Callable[[Path], Any]) -> Path:
        folder = save(tmp_path / label)
        damage(folder / name)
        return folder

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-3] ^= 0x10
        path.write_bytes(data)

    refused(damaged("gone", Path.unlink), name, "is missing")
    refused(damaged("short", lambda p: p.write_bytes(p.read_bytes()[:-1])), name, "bytes; the manifest lists")
    refused(damaged("long", lambda p: p.write_bytes(p.read_bytes() + b"x")), name, "bytes; the manifest lists")
    refused(damaged("flipped", flip), name, "sha256")
    Checkpoint.open(damaged("trusted", flip), verify=False)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_goes_unseen(tmp_path_factory: Any, data: st.DataObject) -> None:
    folder = save(tmp_path_factory.mktemp("c"))
    path = folder / "rank_0000_of_0002.safetensors"
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpoint):
        Checkpoint.open(folder)


def test_unreadable_manifests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "c")
    path = folder / "manifest.json"
    whole = path.read_text()
    for text, reason in [
        (whole[:-5], "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ("\ud800".encode("utf-8", "surrogatepass"), "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("1" * 10_000, "not valid JSON"),
        (whole.replace('"step":', '"step": 1, "step":'), "occurs twice"),
    ]:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(folder, "manifest.json", reason)
    path.unlink()
    refused(folder, "manifest.json", "missing")
    os.mkfifo(path)  # opening one would block indefinitely
    refused(folder, "manifest.json", "not a regular file")
    path.unlink()
    path.write_text(whole)
    monkeypatch.setattr(files, "JSON_LIMIT", 100)
    refused(folder, "manifest.json", "larger than")


SHARD = "rank_0000_of_0002.safetensors"


def first(content: dict[str, Any]) -> dict[str, Any]:
    return next(iter(content["tensors"].values()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(format_version=1), "format_version 1, which is not supported"),
        (lambda m: m.update(format_version=True), "'format_version' is missing, or not of type int"),
        (lambda m: m.pop("format_version"), "'format_version' is missing"),
        (lambda m: m.update(step="7"), "'step' is missing, or not of type int"),
        (lambda m: m.update(step=-1), "step -1"),
        (lambda m: m.update(world=0), "world 0"),
        (lambda m: m.update(meta=[]), "'meta' is missing, or not of type dict"),
        (lambda m: m.update(files=[SHARD]), "'files' is missing, or not of type dict"),
        (lambda m: m.update(tensors=None), "'tensors' is missing, or not of type dict"),
        (lambda m: m["files"].update({SHARD: 3}), "the entry of file"),
        (lambda m: m["files"][SHARD].update(bytes="9"), "the bytes of file"),
        (lambda m: m["files"][SHARD].pop("sha256"), "the sha256 of file"),
        (lambda m: first(m).update(shape=[-8, 2]), "integers from 0 up"),
        (lambda m: first(m).update(shape=[8.0, 2]), "integers from 0 up"),
        (lambda m: first(m).update(shape=16), "the shape of tensor"),
        (lambda m: first(m).pop("dtype"), "the dtype of tensor"),
        (lambda m: first(m).update(file="rank_0009_of_0002.safetensors"), "not among the files"),
        (lambda m: m["tensors"].update(x=4), "the entry of tensor 'x'"),
    ],
)
def test_malformed_manifests_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], reason: str) -> None:
    folder = save(tmp_path / "c")
    edit(folder, change)
    refused(folder, "manifest.json", reason)


@pytest.mark.parametrize(
    ("change", "file", "reason"),
    [
        (lambda m: first(m).update(shape=[2, 8]), SHARD, "expected F32"),
        (lambda m: first(m).update(dtype="F16"), SHARD, "expected F16"),
        (lambda m: first(m).update(file="rank_0001_of_0002.safetensors"), SHARD, "expected"),
        (lambda m: m["tensors"].update(ghost=first(m)), SHARD, "'ghost' is absent"),
        (lambda m: m["tensors"].pop("step_sums"), "rank_0001_of_0002.safetensors", "expected absent"),
        (lambda m: m["files"][SHARD].update(bytes=-1), SHARD, "the manifest lists -1"),
        (lambda m: m["files"][SHARD].update(sha256="0" * 64), SHARD, "sha256"),
    ],
)
def test_claims_that_the_files_contradict_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], file: str, reason: str
) -> None:
    folder = save(tmp_path / "c")
    edit(folder, change)
    refused(folder, file, reason)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/../../outside", "a\\b", "", ".hidden", "a\n", "a//b", "\0"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "c")
    (tmp_path / "outside").write_bytes(b"secret")
    edit(folder, lambda m: m["files"].update({name: {"bytes": 6, "sha256": "0" * 64}}))
    refused(folder, "manifest.json", "only plain names inside the folder")


def test_links_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "c")
    (folder / SHARD).rename(tmp_path / "outside")
    (folder / SHARD).symlink_to(tmp_path / "outside")
    refused(folder, SHARD, "a link that leads out")
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(SHARD)
    refused(folder, SHARD, "missing, or is not a regular file")
    moved = save(tmp_path / "real")
    (tmp_path / "link").symlink_to(moved)
    Checkpoint.open(tmp_path / "link")


def test_a_key_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "c")
    other = folder / "rank_0001_of_0002.safetensors"
    tensors = load_file(other)
    tensors["layers.0.experts.0.bias"] = torch.tensor(9.0)
    save_file(tensors, other)
    edit(folder, lambda m: m["files"][other.name].update(manifest_module.describe_file(other)))
    with pytest.raises(CorruptCheckpoint, match="holds 'layers.0.experts.0.bias', and so does"):
        Checkpoint.open(folder)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "c")
    for content in (b"", b"x" * 200, b"\xff" * 200, (folder / SHARD).read_bytes()[:-8]):
        (folder / SHARD).write_bytes(content)
        edit(folder, lambda m: m["files"][SHARD].update(manifest_module.describe_file(folder / SHARD)))
        refused(folder, SHARD, "cannot be read as safetensors")


def test_an_error_crosses_a_process_boundary() -> None:
    error = CorruptCheckpoint(Path("a"), "b")
    assert str(copy.copy(error)) == "a: b"  # copy rebuilds an exception as sending it does


# Choosing and removing


def test_newest_skips_invalid_checkpoints_with_reasons(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") == (None, [])
    for step in (100, 200, 300, 400):
        save(step_folder(tmp_path, step), step)
    write_shard(step_folder(tmp_path, 500), 0, 2, {"a": torch.zeros(1)})
    shard = step_folder(tmp_path, 400) / SHARD
    shard.write_bytes(shard.read_bytes()[:-1])
    edit(step_folder(tmp_path, 300), lambda m: m["files"][SHARD].update(sha256="0" * 64))
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_00000900").write_text("a file")
    checkpoint, skipped = newest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 200
    assert len(skipped) == 3
    for line, words in zip(skipped, ("step_00000500", "step_00000400", "step_00000300"), strict=True):
        assert words in line
    for line, words in zip(skipped, ("never completed", "bytes", "sha256"), strict=True):
        assert words in line


def test_newest_goes_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(step_folder(tmp_path, step), step)
    checkpoint, _ = newest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 100_000_000


@settings(max_examples=30, deadline=None)
@given(
    complete=st.lists(st.booleans(), min_size=1, max_size=7), keep=st.integers(1, 3), best=st.none() | st.integers(0, 6)
)
def test_prune_keeps_the_newest_and_the_best(
    tmp_path_factory: Any, complete: list[bool], keep: int, best: int | None
) -> None:
    root = tmp_path_factory.mktemp("c")
    for step, whole in enumerate(complete):
        write_shard(step_folder(root, step), 0, 1, {"a": torch.zeros(1)})
        if whole:
            write_manifest(step_folder(root, step), step=step, world=1, meta={})
    steps = [step for step, whole in enumerate(complete) if whole]
    in_flight = [step for step, whole in enumerate(complete) if not whole and step > max(steps, default=-1)]
    stays = set(steps[-keep:]) | set(in_flight) | ({best} & set(range(len(complete))))
    removed = prune(root, keep, {best})
    left = {int(path.name[5:]) for path in root.iterdir()}
    assert left == stays
    assert {int(path.name[5:]) for path in removed} == set(range(len(complete))) - stays


def test_a_shard_that_disappears_while_it_is_opened_is_an_unreadable_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path, 0, 1, {"x": torch.ones(1)})
    write_manifest(tmp_path, step=1, world=1, meta={})

    def fails(path: Path, *_: Any) -> None:
        if gone:
            path.unlink()
        raise RuntimeError("unable to open file")  # torch's message, which makes it open the file again

    monkeypatch.setattr("raymoe.storage.manifest.safe_open", fails)
    gone = False
    with pytest.raises(
        RuntimeError, match="unable to open file"
    ):  # for example no memory: the checkpoint is not damaged
        Checkpoint.open(tmp_path)
    gone = True
    with pytest.raises(CorruptCheckpoint, match=r"rank_0000_of_0001\.safetensors: cannot be read"):
        Checkpoint.open(tmp_path)


def test_prune_keeps_at_least_one(tmp_path: Path) -> None:
    save(step_folder(tmp_path, 1), 1)
    with pytest.raises(ValueError, match="keep=0"):
        prune(tmp_path, 0, ())
    assert step_folder(tmp_path, 1).is_dir()


# Full disks and the background


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """The kernel refuses to let a file grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_earlier_checkpoints_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(step_folder(tmp_path, 100), 100)
    later = step_folder(tmp_path, 200)
    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match="cannot write .*No space left.*free space") as caught,
    ):
        patch.setattr(os, "fsync", full_disk)
        write_shard(later, 0, 2, weights())
    assert caught.value.errno == errno.ENOSPC
    assert list(later.iterdir()) == []
    checkpoint, skipped = newest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 100 and len(skipped) == 1


def test_a_write_that_the_kernel_refuses_is_an_oserror_and_leaves_nothing(tmp_path: Path) -> None:
    with small_files(50_000), pytest.raises(OSError, match=r"cannot write .*rank_0000_of_0001\.safetensors") as caught:
        write_shard(tmp_path, 0, 1, {"big": torch.zeros(100_000)})
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_cannot_be_written_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path, 0, 1, {"a": torch.zeros(2)})
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"manifest\.json"):
        patch.setattr(os, "replace", full_disk)
        write_manifest(tmp_path, step=1, world=1, meta={})
    assert not list(tmp_path.glob("*manifest*")) + list(tmp_path.glob(".*"))
    write_manifest(tmp_path, step=1, world=1, meta={})  # the shards are still there
    assert Checkpoint.open(tmp_path).step == 1


@pytest.fixture
def writer() -> Iterator[BackgroundWriter]:
    writer = BackgroundWriter()
    yield writer
    writer.close()


def test_the_background_writes_what_was_there_at_first(
    tmp_path: Path, writer: BackgroundWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, sync = threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        assert gate.wait(10)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    assert writer.done() and writer.error is None
    x = torch.ones(4)
    writer.write(tmp_path, 0, 1, {"x": x})
    x.zero_()
    assert not writer.done()
    with pytest.raises(FileNotFoundError):
        write_manifest(tmp_path, step=1, world=1, meta={})
    gate.set()
    writer.wait()
    assert writer.done() and writer.error is None
    write_manifest(tmp_path, step=1, world=1, meta={})
    assert torch.equal(Checkpoint.open(tmp_path).read(["x"])["x"], torch.ones(4))


def test_a_second_write_waits_for_the_first(
    tmp_path: Path, writer: BackgroundWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, sync = threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        assert gate.wait(10)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    writer.write(tmp_path / "a", 0, 1, {"x": torch.ones(1)})
    second = threading.Thread(target=lambda: writer.write(tmp_path / "b", 0, 1, {"x": torch.ones(1)}), daemon=True)
    second.start()
    second.join(0.05)
    assert second.is_alive() and not (tmp_path / "b").exists()
    gate.set()
    second.join(10)
    assert not second.is_alive()
    assert (tmp_path / "a" / "rank_0000_of_0001.json").is_file()
    writer.wait()
    assert (tmp_path / "b" / "rank_0000_of_0001.json").is_file()


def test_the_background_keeps_its_error_until_the_next_write(
    tmp_path: Path, writer: BackgroundWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        writer.write(tmp_path, 0, 1, {"x": torch.ones(1)})
        writer.wait()
    assert writer.done()
    assert isinstance(writer.error, OSError) and writer.error.errno == errno.ENOSPC
    writer.write(tmp_path, 0, 1, {"x": torch.ones(1)})
    writer.wait()
    assert writer.error is None
    write_manifest(tmp_path, step=1, world=1, meta={})
    assert Checkpoint.open(tmp_path).step == 1
