"""Untrusted input is read correctly or refused with the error of its reader.

No other exception, no code from data, no memory beyond the size of the input, no file outside of the folder.
The tests of each room cover single violations; these tests generate arbitrary ones.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymoe.config import SECTIONS, Config, from_dict, override, preset
from raymoe.data.corpus import Corpus
from raymoe.data.sources import Document, documents
from raymoe.data.tokens import encode, load_tokenizer, train_tokenizer
from raymoe.export.open import open_run
from raymoe.storage.artifact import Artifact, CorruptArtifact
from raymoe.storage.checkpoint import Checkpoint, CorruptCheckpoint
from raymoe.storage.files import CorruptFile
from raymoe.storage.manifest import describe_file
from raymoe.training.journal import Journal
from raymoe.training.regroup.clients import ReplayClient
from raymoe.training.resolve import resolve
from tests.data.test_corpus import prepared, prose
from tests.storage.test_checkpoint import save
from tests.support.served import artifact
from tests.training.test_loop import config, train

MEMORY = 6 << 30
"""Bytes of address space that reading untrusted input may add. A malformed `Precompiled` normalizer makes tokenizers
reserve 4 GiB, which it never touches."""

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

NUMBERS = [0, -1, 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63, 2**64, 10**12, 10**400, -(10**30), 0.5, 1e308]
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(NUMBERS), st.text(max_size=8),
    st.sampled_from(["../x", "/etc/passwd", "\0", "\ud800", "a/../../b", "x" * 5000, "~", "."]),
    st.recursive(st.none(), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=5),
)  # fmt: skip


@contextmanager
def little_memory() -> Iterator[None]:
    """Limit the address space: a larger allocation raises MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return paths to the values inside a JSON value, the first 12 of each object."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())[:12]
    return [at, *(path for key, inner in items for path in paths(inner, (*at, key)))]


@st.composite
def changed(draw: st.DrawFn, value: Any, most: int = 2) -> Any:
    """Draw the value with a few fields replaced or removed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from([p for p in paths(value) if p] or [()]))
        if not path:
            break
        inside = value
        for key in path[:-1]:
            inside = inside[key]
        if isinstance(inside, dict) and draw(st.integers(0, 3)) == 0:
            del inside[path[-1]]
        else:
            inside[path[-1]] = draw(ODD)
    return value


def only(error: type[Exception] | tuple[type[Exception], ...], read: Callable[[], Any]) -> str:
    """Return the message of the `error` that `read` raises; empty if it raises nothing. Other exceptions pass."""
    with little_memory():
        try:
            read()
        except error as refusal:
            return str(refusal)
    return ""


BOMBS = ["[" * 200_000, '{"a":' * 200_000, "9" * 5000, '{"a": 1' + "0" * 5000 + "}", "\ufeff{}", "NaN", "[]", "", "\0", '"x"', "null", '{"a": 1, "a": 2}']  # fmt: skip
"""Texts that are not a JSON object, or that exhaust a parser."""


# Safetensors


def safetensors(header: Any, content: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


X = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
FORGED = {
    "no header": b"",
    "a header that is cut": safetensors({"x": X})[:20],
    "a header longer than the file": safetensors({"x": X}, length=1 << 20),
    "a header of 16 EiB": safetensors({"x": X}, length=2**64 - 1),
    "a header that is shorter than it is": safetensors({"x": X}, length=10),
    "tensors that overlap": safetensors({"x": X, "y": X}),
    "tensors with a gap": safetensors({"x": {**X, "shape": [2], "data_offsets": [56, 64]}}),
    "a shape beyond the bytes": safetensors({"x": {**X, "shape": [2**20, 2**20]}}),
    "a shape that overflows": safetensors({"x": {**X, "shape": [2**62, 2**62, 4]}}),
    "a shape that overflows to the bytes": safetensors({"x": {**X, "shape": [2**63, 2, 16]}}),
    "offsets that run backwards": safetensors({"x": {**X, "data_offsets": [64, 0]}}),
    "offsets beyond the file": safetensors({"x": {**X, "shape": [32], "data_offsets": [0, 128]}}),
    "offsets below 0": safetensors({"x": {**X, "data_offsets": [-64, 0]}}),
    "an unknown dtype": safetensors({"x": {**X, "dtype": "pickle"}}),
    "a header that is not JSON": safetensors(b"\x80\x04." + b" " * 40),
    "a header of brackets": safetensors(b"[" * 100_000),
    "content after the last tensor": safetensors({"x": X}, bytes(65)),
}


def forge(folder: Path, content: bytes) -> None:
    """Write a checkpoint with one file of this content and a manifest with its size and checksum."""
    folder.mkdir(parents=True)
    (folder / "x.safetensors").write_bytes(content)
    entry = {"file": "x.safetensors", "dtype": "F32", "shape": [4, 4]}
    manifest = {"format_version": 2, "step": 1, "world": 1, "meta": {}, "tensors": {"x": entry}}
    files = {"x.safetensors": describe_file(folder / "x.safetensors")}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": files}))


@pytest.mark.parametrize("content", FORGED.values(), ids=FORGED)
def test_forged_tensors_are_refused(content: bytes, tmp_path: Path) -> None:
    forge(tmp_path / "good", safetensors({"x": X}))
    assert torch.equal(Checkpoint.open(tmp_path / "good").read(["x"])["x"], torch.zeros(4, 4))
    forge(tmp_path / "bad", content)
    assert "x.safetensors" in only(CorruptCheckpoint, lambda: Checkpoint.open(tmp_path / "bad").read(["x"]))


@FEW
@given(header=changed({"x": X, "y": {**X, "data_offsets": [64, 128]}}, 3), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_header_is_read_or_refused(header: Any, length: int | None, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    forge(tmp_path / "c", safetensors(header, bytes(128), length))
    only(CorruptCheckpoint, lambda: Checkpoint.open(tmp_path / "c").read(["x"]))


# Manifests


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoint") / "c")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact(tmp_path_factory.mktemp("artifact")).folder


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A pipe outside of the folder. Opening it blocks, so a reader that follows a path to it hangs the test."""
    os.mkfifo(tmp_path / "outside")
    yield tmp_path / "outside"


def with_manifest(folder: Path, at: Path, text: str) -> Path:
    """Return a copy of a folder with another manifest."""
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(folder, at, copy_function=os.link, ignore=shutil.ignore_patterns("manifest.json"))
    (at / "manifest.json").write_text(text, errors="surrogatepass")
    return at


KINDS = pytest.mark.parametrize(("kind", "error"), [("checkpoint", CorruptCheckpoint), ("exported", CorruptArtifact)])


def opener(kind: str, folder: Path) -> Callable[[], Any]:
    if kind == "checkpoint":
        return lambda: Checkpoint.open(folder).read(Checkpoint.open(folder).keys)
    return lambda: (Artifact.open(folder).tensors(), Artifact.open(folder).digest)


@KINDS
@FEW
@given(data=st.data())
def test_any_manifest_is_read_or_refused(
    kind: str, error: type[CorruptFile], data: st.DataObject, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    manifest = data.draw(changed(json.loads((folder / "manifest.json").read_text())))
    copied = with_manifest(folder, tmp_path / "c", json.dumps(manifest))
    only(error, opener(kind, copied))


@KINDS
@pytest.mark.parametrize("text", BOMBS, ids=range(len(BOMBS)))
def test_bombs_are_no_manifests(
    kind: str, error: type[CorruptFile], text: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    copied = with_manifest(request.getfixturevalue(kind), tmp_path / "c", text)
    assert "manifest.json" in only(error, opener(kind, copied))


@KINDS
@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "link", "{root}/outside"])
def test_no_manifest_leads_to_another_file(
    kind: str, error: type[CorruptFile], name: str, outside: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    manifest = json.loads((folder / "manifest.json").read_text())
    name = name.format(root=tmp_path)
    manifest["files"][name] = {"bytes": 0, "sha256": "0" * 64}
    copied = with_manifest(folder, tmp_path / "c", json.dumps(manifest))
    (copied / "link").symlink_to(outside)
    assert only(error, opener(kind, copied))


def test_an_artifact_of_a_billion_layers_or_a_boundless_context_costs_nothing(exported: Path, tmp_path: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    for field, value in (
        ("context", 10**9),
        ("rope_theta", float("inf")),
        ("gate_scale", float("nan")),
        ("heads", 10**9),
    ):
        lying = copy.deepcopy(manifest)
        lying["config"]["model"][field] = value
        assert field in only(
            CorruptArtifact, opener("exported", with_manifest(exported, tmp_path / "c", json.dumps(lying)))
        )
    lying = copy.deepcopy(manifest)
    lying["config"]["model"] |= {"layers": 100_000, "n_experts": 1, "n_clusters": 1, "experts_per_token": 1}
    lying["assignment"] = [[0]] * 100_000
    refusal = only(CorruptArtifact, opener("exported", with_manifest(exported, tmp_path / "c", json.dumps(lying))))
    assert "100000 layers" in refusal


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    folder.mkdir()
    train(0, 1, str(folder), ("train.steps=2",))
    about = {"config": config("train.steps=2", "run.name=first").to_dict(), "corpus": str(folder / "nowhere")}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def resume(root: Path) -> Config:
    return resolve(preset("tiny"), [f"run.root={root}", "train.resume=first"])


@FEW
@given(data=st.data())
def test_any_config_of_a_run_is_taken_or_refused(data: st.DataObject, run: Path, tmp_path: Path) -> None:
    about = json.loads((run / "config.json").read_text())
    (tmp_path / "first").mkdir(exist_ok=True)
    (tmp_path / "first" / "config.json").write_text(json.dumps(data.draw(changed(about))))
    only(ValueError, lambda: resume(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError)):  # there is no checkpoint
        open_run(str(tmp_path), "first")


@pytest.mark.parametrize("text", BOMBS, ids=range(len(BOMBS)))
def test_bombs_are_no_configs(text: str, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.json").write_text(text)
    for read in (lambda: resume(tmp_path), lambda: open_run(str(tmp_path), "first")):
        assert only((ValueError, FileNotFoundError), read)  # one with a mark before it is an object without a run


META: list[Callable[[dict[str, Any]], Any]] = [
    lambda m: m.clear(),
    lambda m: m.pop("ghosts"),
    lambda m: m.update(assignment=3),
    lambda m: m.update(updates="many"),
    lambda m: m.update(tokens=-1),
    lambda m: m.update(validation={"x": 1.0}),
    lambda m: m.update(validation=[1]),
    lambda m: m.update(validation={"1": 10**400}),
]


@pytest.mark.parametrize("change", META, ids=range(len(META)))
def test_a_checkpoint_without_a_valid_position_is_refused_before_training_resumes(
    change: Callable[[dict[str, Any]], Any], run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "first"
    shutil.copytree(run, folder)
    (path,) = folder.glob("checkpoints/*/manifest.json")
    manifest = json.loads(path.read_text())
    change(manifest["meta"])
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json: does not describe a run"):
        train(0, 1, str(folder), ("train.steps=3",))


def test_an_assignment_beyond_the_model_is_refused(run: Path, tmp_path: Path) -> None:
    for assignment in ([[99] * 10] * 2, [[-1] * 10] * 2, [[0] * 10], [["0"] * 10] * 2, [[0] * 10**5] * 2):
        shutil.rmtree(tmp_path / "first", ignore_errors=True)
        shutil.copytree(run, tmp_path / "first")
        (path,) = (tmp_path / "first").glob("checkpoints/*/manifest.json")
        manifest = json.loads(path.read_text())
        manifest["meta"]["assignment"] = assignment
        path.write_text(json.dumps(manifest))
        with pytest.raises(CorruptCheckpoint, match="does not describe a run"):
            open_run(str(tmp_path), "first")


KEYS = st.sampled_from([f"{s}.{name}" for s, kind in SECTIONS.items() for name in kind.__dataclass_fields__])


@FEW
@given(
    st.lists(st.tuples(KEYS | st.text(max_size=12), ODD | st.text(max_size=12)), max_size=4),
    st.sampled_from(["=", "", "=="]),
)
def test_any_override_is_applied_or_refused(items: list[tuple[str, Any]], between: str) -> None:
    made: list[Config] = []
    only(ValueError, lambda: made.append(override(preset("tiny"), [f"{k}{between}{v}" for k, v in items])))
    for one in made:
        assert from_dict(json.loads(json.dumps(one.to_dict(), allow_nan=False))) == one


# Plans and journals


@FEW
@given(data=st.data())
def test_any_file_of_plans_is_replayed_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    plan = {
        "version": 1,
        "made_at_step": 1,
        "effective_step": 2,
        "assignment": [[0, 1]],
        "reason": "",
        "expected_gain": 0.5,
    }
    good = {"kind": "plan", "name": "applied", "step": 1, "plan": plan}
    lines = data.draw(
        st.lists(changed(good).map(json.dumps) | st.sampled_from(BOMBS) | st.text(max_size=9), max_size=3)
    )
    (tmp_path / "plans.jsonl").write_text("\n".join([json.dumps(good), *lines]), errors="surrogatepass")
    refusal = only(ValueError, lambda: ReplayClient(tmp_path / "plans.jsonl").poll(1))
    assert not refusal or "malformed plan" in refusal


def test_a_pipe_is_no_file_of_plans(outside: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ReplayClient(outside)


def test_a_journal_drops_damaged_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"kind": "train", "step": step}) for step in range(1, 5)]
    bad = ["[1]", "[" * 100_000, '{"kind": "tr', "3", "null", "9" * 5000, '{"step": "x"}', '{"step": null}']
    content = "\n".join(line for pair in zip(good * 2, bad, strict=True) for line in pair).encode() + b"\n\xff\xfe\n"
    path.write_bytes(content)
    Journal(path, 3)
    assert path.read_text().splitlines() == [*good[:3]] * 2


# Data


class Runs:
    """Unpickled, it leaves a file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (open, (self.file, "w"))


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
@pytest.mark.parametrize("name", ["arrow.py_extension_type", "ARROW:extension:name"])
def test_no_table_runs_code(kind: str, name: str, tmp_path: Path) -> None:
    """Arrow once unpickled the metadata of an extension type."""
    payload = pickle.dumps(Runs(str(tmp_path / "ran")))
    marks = {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": payload}
    field = pa.field("text", pa.string(), metadata=marks)
    schema = pa.schema([field], metadata={b"pandas": payload, b"huggingface": payload})
    table = pa.table([pa.array(["a text"])], schema=schema)
    file = tmp_path / f"d.{kind}"
    if kind == "parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(str(file), schema) as writer:
            writer.write_table(table)
    only(ValueError, lambda: list(documents(replace(preset("tiny").data, path=str(file)))))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["jsonl", "json", "txt", "txt.gz", "jsonl.gz", "arrow", "parquet"])
@FEW
@given(data=st.data())
def test_any_bytes_are_text_or_refused(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    file = tmp_path / f"d.{kind}"
    row = changed({"text": "a text", "kind": "x"}).map(json.dumps)
    lines = st.lists(row | st.sampled_from(BOMBS), max_size=3).map(
        lambda lines: "\n".join(lines).encode(errors="surrogatepass")
    )
    if kind in ("arrow", "parquet"):
        magic = b"PAR1" if kind == "parquet" else b"ARROW1\0\0"
        content = data.draw(st.binary(max_size=60) | st.binary(max_size=60).map(lambda b: magic + b + b"PAR1"))
    else:
        content = data.draw(st.binary(max_size=60) | lines)
    if kind.endswith(".gz") and data.draw(st.booleans()):
        content = gzip.compress(content)[: data.draw(st.none() | st.integers(0, 60))]
    file.write_bytes(content)
    section = replace(preset("tiny").data, path=str(file), domain_field="kind" if kind.startswith("json") else "")
    refusal = only(ValueError, lambda: list(documents(section)))
    assert not refusal or str(file) in refusal


# Corpora and tokenizers


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "early.txt").write_text(prose("abcdef", 300))
    return prepared(folder, tmp_path_factory.mktemp("cache")).folder


def read_corpus(folder: Path) -> None:
    corpus = Corpus.open(folder)
    for split in ("train", "validation"):
        for domain in corpus.domains:
            corpus.stream(split, domain)[:10].tolist()


@FEW
@given(data=st.data())
def test_any_corpus_is_read_or_refused(data: st.DataObject, corpus: Path, tmp_path: Path) -> None:
    about = data.draw(changed(json.loads((corpus / "corpus.json").read_text())))
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    shutil.copytree(corpus, tmp_path / "c", copy_function=os.link, ignore=shutil.ignore_patterns("corpus.json"))
    (tmp_path / "c" / "corpus.json").write_text(json.dumps(about))
    only(ValueError, lambda: read_corpus(tmp_path / "c"))


def test_a_corpus_reads_no_file_of_another_folder(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "c")
    shutil.copy(corpus / "train-000.arrow", tmp_path / "elsewhere.arrow")
    about = json.loads((corpus / "corpus.json").read_text())
    size = (tmp_path / "elsewhere.arrow").stat().st_size
    for name in ("../elsewhere.arrow", str(tmp_path / "elsewhere.arrow")):
        about["splits"]["train"]["early"]["file"] = name
        for files in (about["files"], about["files"] | {name: size}):
            (tmp_path / "c" / "corpus.json").write_text(json.dumps(about | {"files": files}))
            assert "not a complete corpus" in only(ValueError, lambda: read_corpus(tmp_path / "c"))


TEXTS = [Document("d", None, text) for text in ("the cat (x)", "日本 <|endoftext|>", "", "\0\n")]
GOOD = json.loads(train_tokenizer([prose("abcdef", 50)], 300).to_str())
PARTS = [
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Precompiled", "precompiled_charsmap": "////fwAAAAA="},
    {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"},
    {"type": "Replace", "pattern": {"Regex": "("}, "content": "x"},
    {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
    {"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "x"},
    {"type": "WordLevel", "vocab": {}, "unk_token": "x"},
    {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 5},
    {"type": "Unigram", "vocab": []},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
]


@settings(FEW, max_examples=200)
@given(data=st.data())
def test_any_tokenizer_is_taken_or_refused(data: st.DataObject) -> None:
    """Its Rust code panics at some, which is no Exception."""
    made = copy.deepcopy(GOOD)
    for name in data.draw(
        st.lists(st.sampled_from(["normalizer", "pre_tokenizer", "model", "post_processor", "decoder"]), max_size=2)
    ):
        made[name] = data.draw(st.sampled_from(PARTS))
    made = data.draw(changed(made)) if data.draw(st.booleans()) else made

    def read() -> None:
        tokenizer = load_tokenizer(json.dumps(made).encode(), "t", 300)
        encode(tokenizer, TEXTS)

    only(ValueError, read)


@pytest.mark.parametrize("text", BOMBS, ids=range(len(BOMBS)))
def test_bombs_are_no_tokenizers(text: str) -> None:
    assert "not a tokenizer.json" in only(ValueError, lambda: load_tokenizer(text.encode(), "t", 300))
