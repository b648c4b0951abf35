"""The artifact: tensors are read back within the bound of their encoding, and damaged or forged artifacts are refused.

`python -m tests.storage.test_artifact` regenerates the golden artifact; do so only with a new format_version.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raymoe.config import ModelSection, preset
from raymoe.model.leaves import PRIVATE, RESIDUALS
from raymoe.model.transformer import Transformer
from raymoe.storage import manifest as manifest_module
from raymoe.storage.artifact import Artifact, CorruptArtifact
from raymoe.storage.artifact_layout import sizes
from raymoe.storage.artifact_writing import stage_artifact, write_artifact
from raymoe.storage.manifest import describe_file
from tests.support.paths import GOLDEN

CLUSTERED = ModelSection(
    layers=2, d_model=32, d_expert=48, n_experts=7, n_clusters=3, experts_per_token=2, residual_width=4,
    heads=2, kv_heads=1, vocabulary=64, context=16,
)  # fmt: skip
KINDS = {
    "clustered": CLUSTERED,
    "bases": replace(CLUSTERED, residual_width=0),
    "untied": replace(CLUSTERED, tied_head=False),
    "flat": replace(CLUSTERED, experts="flat"),
    "dense": replace(CLUSTERED, experts="dense"),
    "private": replace(CLUSTERED, expert_kind="private", expert_width=10),
    "private with a base": replace(CLUSTERED, expert_kind="private", base_width=24, gate="sigmoid"),
}
UNEVEN = [[0, 2, 2, 1, 2, 0, 1], [2, 2, 2, 1, 0, 1, 0]]


def build(model: ModelSection, seed: int = 0) -> Transformer:
    transformer = Transformer(model, UNEVEN)
    transformer.initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in transformer.logical().items():
        if key.endswith("bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return transformer


def logits(transformer: Transformer) -> Tensor:
    tokens = torch.arange(64).view(4, 16)
    with torch.no_grad():
        return transformer(tokens)


def loaded(artifact: Artifact, residuals: Any = "int4") -> Transformer:
    transformer = Transformer(artifact.model, artifact.assignment)
    transformer.load_logical(artifact.tensors(residuals))
    return transformer


def arguments(tmp_path: Path, model: ModelSection = CLUSTERED) -> dict[str, Any]:
    """Arguments of `write_artifact` besides the target."""
    tokenizer = tmp_path / "tokens.json"
    tokenizer.write_text('{"version": "1.0"}')
    return dict(
        config={"preset": "test", "model": asdict(model)},
        tensors=build(model).logical(),
        assignment=UNEVEN,
        version=5,
        tokenizer=tokenizer,
        metrics={"perplexity": 12.5},
    )


def export(tmp_path: Path, model: ModelSection = CLUSTERED, name: str = "a", **changes: Any) -> Path:
    return write_artifact(tmp_path / name, **(arguments(tmp_path, model) | changes))


def refused(folder: Path, file: str, reason: str) -> None:
    with pytest.raises(CorruptArtifact, match=reason) as caught:
        Artifact.open(folder)
    assert caught.value.file == folder / file


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# Round trips


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_read_back_within_the_bound_of_their_encoding(tmp_path: Path, kind: str) -> None:
    model = KINDS[kind]
    artifact = Artifact.open(export(tmp_path, model))
    assert artifact.model == model and artifact.config == {"preset": "test", "model": asdict(model)}
    assert (artifact.assignment, artifact.version, artifact.metrics) == (UNEVEN, 5, {"perplexity": 12.5})
    assert artifact.tokenizer_path.read_text() == '{"version": "1.0"}'
    original, read = build(model).logical(), artifact.tensors()
    assert set(read) == set(original)
    for key, tensor in original.items():
        assert read[key].dtype == torch.float32 and read[key].shape == tensor.shape
        leaf = key.rsplit(".", 1)[-1]
        if "router" in key or "norm" in key or leaf == "bias":
            assert torch.equal(read[key], tensor), key
        elif leaf in PRIVATE:
            assert (read[key] - tensor).norm() < 0.1 * tensor.norm(), key
        elif leaf not in RESIDUALS:
            assert torch.equal(read[key], tensor.half().float()), key
        elif leaf.endswith("_in"):
            second = key[:-3] + "_out"
            got, want = read[key] @ read[second], tensor @ original[second]
            assert (got - want).norm() < 0.15 * want.norm(), key
    assert torch.equal(logits(loaded(artifact)), logits(loaded(Artifact.open(artifact.folder))))
    before, after = logits(build(model)), logits(loaded(artifact))
    assert (after - before).norm() < 0.1 * before.norm()


def test_a_row_of_a_private_expert_has_scales_of_its_own(tmp_path: Path) -> None:
    """Groups run along D, so that a hidden unit with large weights adds no error to another."""
    tensors = build(KINDS["private"]).logical()
    key = "layers.0.experts.0.private_down"
    tensors[key][3] *= 1000
    read = Artifact.open(export(tmp_path, KINDS["private"], tensors=tensors)).tensors()
    assert ((read[key] - tensors[key]).norm(dim=1) < 0.1 * tensors[key].norm(dim=1)).all()


def test_residuals_are_balanced_before_they_are_quantized(tmp_path: Path) -> None:
    tensors = build(CLUSTERED).logical()
    tensors["layers.0.experts.0.gate_in"] *= 1000
    tensors["layers.0.experts.0.gate_out"] /= 1000
    read = Artifact.open(export(tmp_path, tensors=tensors)).tensors()
    first, second = (read[f"layers.0.experts.0.gate_{side}"] for side in ("in", "out"))
    torch.testing.assert_close(first.norm(dim=0), second.norm(dim=1), rtol=0.1, atol=0.0)


def test_zeroed_residuals_are_zero_and_nothing_else_is(tmp_path: Path) -> None:
    artifact = Artifact.open(export(tmp_path))
    whole, bare = artifact.tensors(), artifact.tensors("zero")
    assert set(whole) == set(bare)
    for key in whole:
        if key.rsplit(".", 1)[-1] in RESIDUALS:
            assert bare[key].shape == whole[key].shape and not bare[key].any() and whole[key].any()
        else:
            assert torch.equal(bare[key], whole[key])
    assert not torch.equal(logits(loaded(artifact, "zero")), logits(loaded(artifact)))


def test_zeroed_private_experts_leave_the_base(tmp_path: Path) -> None:
    artifact = Artifact.open(export(tmp_path, KINDS["private with a base"]))
    whole, bare = artifact.tensors(), artifact.tensors("zero")
    for key in whole:
        assert torch.equal(bare[key], torch.zeros_like(whole[key]) if ".private_" in key else whole[key]), key


@pytest.mark.parametrize("kind", ["private", "dense"])
def test_zero_needs_bases(tmp_path: Path, kind: str) -> None:
    artifact = Artifact.open(export(tmp_path, KINDS[kind]))
    with pytest.raises(ValueError, match="residuals=zero needs a model with bases"):
        artifact.tensors("zero")


def test_a_cluster_is_read_alone(tmp_path: Path) -> None:
    artifact = Artifact.open(export(tmp_path))
    everything = artifact.tensors()
    for path in artifact.folder.rglob("*.safetensors"):
        if path.name != "cluster_001.safetensors":
            path.unlink()
    cluster = artifact.cluster(1)
    experts = {(layer, e) for layer in range(2) for e, c in enumerate(UNEVEN[layer]) if c == 1}
    parts = (*RESIDUALS, "router", "bias")
    wanted = {f"layers.{layer}.experts.{e}.{part}" for (layer, e), part in itertools.product(experts, parts)}
    wanted |= {f"layers.{layer}.clusters.1.base_{part}" for layer in range(2) for part in ("gate", "up", "down")}
    assert set(cluster) == wanted
    for key, tensor in cluster.items():
        assert torch.equal(tensor, everything[key])
    with pytest.raises(ValueError, match="no cluster 3"):
        artifact.cluster(3)
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        artifact.tensors()


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_hold_the_bytes_that_are_counted(tmp_path: Path, kind: str) -> None:
    artifact = Artifact.open(export(tmp_path, KINDS[kind]))
    parts: Counter[str] = Counter()
    for place in artifact.places:
        parts[place.part] += place.bytes
    content = 0
    for path in artifact.folder.rglob("*.safetensors"):
        header = int.from_bytes(path.read_bytes()[:8], "little")
        content += path.stat().st_size - 8 - header
    assert sum(parts.values()) == content
    assert (parts["experts"] > 0) == (kind in ("clustered", "untied", "private", "private with a base"))
    assert (parts["bases"] > 0) == (kind not in ("dense", "private"))
    if kind in ("clustered", "private", "private with a base"):
        assert sizes(KINDS[kind])["clustered_int4"]["bytes"] == content
    if kind == "flat":
        assert sizes(CLUSTERED)["flat_float16"]["bytes"] == content


def test_the_paper_size_shrinks_as_promised() -> None:
    table = sizes(preset("paper").model)
    flat, clustered, exported = (table[name] for name in ("flat_float16", "clustered_float16", "clustered_int4"))
    assert 0.9e9 < flat["parameters"] < 1.0e9
    assert flat["expert_parameters"] == 12 * 32 * 3 * 768 * 1024
    assert clustered["parameters"] <= 0.22 * flat["parameters"]
    assert exported["parameters"] == clustered["parameters"]
    assert exported["expert_bytes"] <= 0.15 * flat["expert_bytes"]
    assert exported["expert_bytes"] < clustered["expert_bytes"] and exported["bytes"] < clustered["bytes"]


def test_sizes_count_what_a_model_has() -> None:
    table = sizes(KINDS["dense"])
    for name, kind in (("flat_float16", "flat"), ("clustered_float16", "clustered")):
        assert table[name]["parameters"] == sum(p.numel() for p in Transformer(KINDS[kind]).parameters())


@pytest.mark.parametrize("kind", ["private", "private with a base"])
def test_private_experts_are_compared_with_a_flat_model_of_their_width(kind: str) -> None:
    model = KINDS[kind]
    table, units = sizes(model), 7 * model.private_width + 3 * model.cluster_base_width
    routers = 2 * 7 * 32  # stage 2
    assert table["flat_float16"]["expert_parameters"] == 2 * 7 * 3 * 32 * model.private_width
    assert table["clustered_int4"]["expert_parameters"] == 2 * 3 * 32 * units + routers
    assert table["clustered_int4"]["expert_bytes"] < table["clustered_float16"]["expert_bytes"]


def test_sizes_do_not_depend_on_the_experts_of_a_token() -> None:
    """Flat models may choose more experts than a cluster would have."""
    assert sizes(replace(KINDS["flat"], experts_per_token=6)) == sizes(KINDS["flat"])


# Staging


def test_a_staged_artifact_is_readable_before_it_is_published(tmp_path: Path) -> None:
    """The file that is judged is the file that is published: only its metrics are added."""
    given = arguments(tmp_path)
    metrics = given.pop("metrics")
    with stage_artifact(tmp_path / "a", **given) as staged:
        before = Artifact.open(staged.folder)
        assert before.metrics == {} and not (tmp_path / "a").exists()
        tensors = before.tensors()
        staged.publish(metrics)
    after = Artifact.open(tmp_path / "a")
    assert after.metrics == metrics
    assert after.manifest.content["files"] == before.manifest.content["files"]
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in after.tensors().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "tokens.json"]


def test_a_staged_artifact_that_is_not_published_is_removed(tmp_path: Path) -> None:
    given = arguments(tmp_path)
    del given["metrics"]
    with pytest.raises(KeyboardInterrupt), stage_artifact(tmp_path / "a", **given):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.json"]


# What is refused when writing


def test_an_existing_target_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(FileExistsError, match="exists: remove it"):
        export(tmp_path)
    assert list((tmp_path / "a").iterdir()) == []
    (tmp_path / "b").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        export(tmp_path, name="b")


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda given: given["tensors"].pop(key)


def swap(key: str, tensor: Tensor) -> Callable[[dict[str, Any]], Any]:
    return lambda given: given["tensors"].update({key: tensor})


def test_a_target_that_appears_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(FileExistsError, match="appeared while"):
        patch.setattr(os, "fsync", lambda _: (tmp_path / "a").mkdir(exist_ok=True))
        export(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "tokens.json"]
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("layers.1.experts.3.up_out"), "lack 'layers.1.experts.3.up_out'"),
        (swap("final_norm", torch.ones(3)), r"'final_norm' has shape \[3\]; the config requires \[32\]"),
        (swap("extra", torch.ones(3)), "'extra' is not a tensor of the model"),
        (swap("embedding", torch.full((64, 32), 7e4)), "'embedding' has values beyond float16"),
        (swap("embedding", torch.full((64, 32), torch.nan)), "'embedding' has values that are not finite"),
        (swap("layers.0.experts.0.gate_in", torch.full((32, 4), 1e12)), "gate_in' cannot be exported: .* beyond"),
        (lambda given: given.update(assignment=[[0] * 7]), "the assignment is not a cluster id below 3"),
        (lambda given: given.update(assignment=[[0] * 7, [3] * 7]), "the assignment is not a cluster id below 3"),
        (lambda given: given.update(metrics={"loss": float("nan")}), "content of manifest.json is not JSON"),
        (lambda given: given.update(config={"model": {"layers": "2"}}), "model.layers='2'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    given = arguments(tmp_path)
    change(given)
    with pytest.raises(ValueError, match=words):
        write_artifact(tmp_path / "a", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.json"]


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.json is missing"):
        export(tmp_path, tokenizer=tmp_path / "nothing.json")


def test_too_small_a_disk_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000))
    with pytest.raises(OSError, match=r"needs 0\.\d MB and .* has 0\.1 MB free"):
        export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.json"]


@pytest.mark.parametrize("call", [1, 4, 8, 12])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    calls = itertools.count(1)

    def fills_up(_: int) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device") as caught:
        patch.setattr(os, "fsync", fills_up)
        export(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.json"]
    Artifact.open(export(tmp_path))


# What is refused when reading


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "file",
    ["trunk.safetensors", "clusters/cluster_000.safetensors", "clusters/cluster_002.safetensors", "tokenizer.json"],
)
def test_damaged_files_are_refused(tmp_path: Path, file: str) -> None:
    folder = export(tmp_path)
    whole = (folder / file).read_bytes()
    flip(folder / file)
    refused(folder, file, "sha256")
    (folder / file).write_bytes(whole[:-1])
    refused(folder, file, "bytes; the manifest lists")
    (folder / file).unlink()
    refused(folder, file, "is missing")
    (folder / file).write_bytes(whole)
    Artifact.open(folder)


READERS: dict[str, Callable[[Artifact], Any]] = {
    "trunk.safetensors": lambda artifact: artifact.trunk(),
    "clusters/cluster_000.safetensors": lambda artifact: artifact.cluster(0),
    "clusters/cluster_002.safetensors": lambda artifact: artifact.cluster(2),
    "tokenizer.json": lambda artifact: artifact.tokenizer_path,
}


@pytest.mark.parametrize("file", READERS)
def test_a_process_verifies_the_files_that_it_reads(tmp_path: Path, file: str) -> None:
    """`on_read`: a damaged file is refused when it is read, and the others are not hashed."""
    folder = export(tmp_path)
    flip(folder / file)
    artifact = Artifact.open(folder, "on_read")
    for other, read in READERS.items():
        if other != file:
            read(artifact)
    for read in (READERS[file], lambda artifact: (artifact.tensors(), artifact.tokenizer_path)):
        with pytest.raises(CorruptArtifact, match="sha256") as caught:
            read(artifact)
        assert caught.value.file == folder / file


def test_a_process_hashes_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, hashed = export(tmp_path), Counter[str]()
    sha256 = manifest_module._sha256
    monkeypatch.setattr(manifest_module, "_sha256", lambda path: hashed.update([path.name]) or sha256(path))
    artifact = Artifact.open(folder, "on_read")
    assert not hashed
    for _ in range(3):
        artifact.cluster(1)
    assert hashed == {"cluster_001.safetensors": 1}
    Artifact.open(folder).tensors()
    assert set(hashed.values()) == {1, 2} and hashed["cluster_001.safetensors"] == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(format_version=99), "format_version 99, which is not supported"),
        (lambda m: m.pop("config"), "'config' is missing"),
        (lambda m: m["config"]["model"].update(layers=-1), "describes no model: model.layers=-1"),
        (lambda m: m["config"]["model"].update(n_layers=1), "describes no model: unknown key"),
        (lambda m: m["config"]["model"].update(d_model=2**62), "describes no model"),
        (lambda m: m["config"]["model"].update(vocabulary=10**30), "describes no model"),
        (lambda m: m["config"]["model"].update(layers=10**12), "describes no model: the assignment"),
        (lambda m: m["assignment"][0].append(0), "describes no model: the assignment"),
        (lambda m: m["assignment"][1].__setitem__(0, 3), "describes no model: the assignment"),
        (lambda m: m["assignment"][1].__setitem__(0, -1), "describes no model: the assignment"),
        (lambda m: m.update(assignment=[0, 1]), "describes no model: the assignment"),
        (lambda m: m.update(assignment={}), "'assignment' is missing, or not of type list"),
        (lambda m: m.update(version="1"), "'version' is missing, or not of type int"),
        (lambda m: m.update(metrics=None), "'metrics' is missing"),
        (lambda m: m.pop("int4"), "'int4' is missing"),
        (lambda m: m["int4"]["layers.0.experts.0.up_in"].update(group=16), "has INT4 entries"),
        (lambda m: m["files"].pop("tokenizer.json"), "does not name tokenizer.json"),
        (lambda m: m["files"].update({"../tokens.json": m["files"]["tokenizer.json"]}), "only plain names"),
        (lambda m: m["files"].update({"clusters/../x": {"bytes": 0, "sha256": ""}}), "only plain names"),
    ],
)
def test_manifests_that_make_no_sense_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    folder = export(tmp_path)
    edit(folder, change)
    refused(folder, "manifest.json", reason)


def test_an_expert_in_another_cluster_than_in_the_manifest_is_refused(tmp_path: Path) -> None:
    folder = export(tmp_path)
    edit(folder, lambda m: m["assignment"][0].__setitem__(0, 1))
    with pytest.raises(CorruptArtifact, match="layers.0.experts.0.* expected .* in clusters/cluster_001"):
        Artifact.open(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("final_norm"), "'final_norm' is absent"),
        (lambda t: t.update(final_norm=torch.ones(31)), r"F32 \[31\].* expected F32 \[32\]"),
        (lambda t: t.update(final_norm=torch.ones(32).double()), "F64"),
        (lambda t: t.update(surplus=torch.ones(1)), "expected absent"),
    ],
)
def test_files_that_match_the_manifest_but_not_the_config_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    """Checksums and manifest agree with the file, but the file does not contain the model of the config."""
    folder = export(tmp_path)
    file = folder / "trunk.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.float64: "F64"}

    def lie(manifest: dict[str, Any]) -> None:
        manifest["files"][file.name] = describe_file(file)
        others = {key: entry for key, entry in manifest["tensors"].items() if entry["file"] != file.name}
        manifest["tensors"] = others | {
            key: {"file": file.name, "dtype": kinds[t.dtype], "shape": list(t.shape)} for key, t in tensors.items()
        }

    edit(folder, lie)
    refused(folder, "trunk.safetensors", reason)


def test_links_out_of_the_artifact_are_refused(tmp_path: Path) -> None:
    folder = export(tmp_path)
    (folder / "clusters").rename(tmp_path / "elsewhere")
    (folder / "clusters").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptArtifact, match="a link that leads out"):
        Artifact.open(folder)


def test_no_folder_is_no_artifact(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "manifest.json", "is missing")


# The published format


def golden_inputs() -> dict[str, Any]:
    model = replace(CLUSTERED, layers=1, n_experts=4, n_clusters=2)
    generator = torch.Generator().manual_seed(7)
    shapes = {key: tensor.shape for key, tensor in Transformer(model).logical().items()}
    return dict(
        config={"preset": "golden", "model": asdict(model)},
        tensors={key: torch.randn(shape, generator=generator) for key, shape in shapes.items()},
        assignment=[[1, 0, 1, 1]],
        version=3,
        tokenizer=GOLDEN / "tokenizer.json",
        metrics={"perplexity": 20.5},
    )


def summary(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    """Return the sum, the sum weighted by position, the first and the last value of each tensor."""
    flat = {key: tensor.double().flatten() for key, tensor in sorted(tensors.items())}
    return {
        key: [x.sum().item(), (x @ torch.linspace(0, 1, len(x), dtype=x.dtype)).item(), x[0].item(), x[-1].item()]
        for key, x in flat.items()
    }


def make_golden() -> None:
    shutil.rmtree(GOLDEN / "artifact_v1", ignore_errors=True)
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "WordLevel"}}\n')
    artifact = Artifact.open(write_artifact(GOLDEN / "artifact_v1", **golden_inputs()))
    (GOLDEN / "tokenizer.json").unlink()
    lines = (f"{json.dumps(key)}: {json.dumps(values)}" for key, values in summary(artifact.tensors()).items())
    (GOLDEN / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def test_the_first_format_is_still_read() -> None:
    artifact = Artifact.open(GOLDEN / "artifact_v1")
    assert artifact.model == replace(CLUSTERED, layers=1, n_experts=4, n_clusters=2)
    assert (artifact.assignment, artifact.version) == ([[1, 0, 1, 1]], 3)
    assert artifact.metrics == {"perplexity": 20.5}
    assert json.loads(artifact.tokenizer_path.read_text())["model"] == {"type": "WordLevel"}
    expected, read = json.loads((GOLDEN / "expected.json").read_text()), summary(artifact.tensors())
    assert set(read) == set(expected)
    for key, values in expected.items():
        assert read[key] == pytest.approx(values, rel=1e-9, abs=1e-9), key
    assert logits(loaded(artifact)).isfinite().all()


def test_the_chat_template_is_stored_and_verified(tmp_path: Path) -> None:
    assert Artifact.open(export(tmp_path)).chat_template() is None
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages }}")
    folder = export(tmp_path, name="chat", chat_template=template)
    assert Artifact.open(folder).chat_template() == "{{ messages }}"
    (folder / "chat_template.jinja").write_text("{{ message }}")
    refused(folder, "chat_template.jinja", "bytes|sha256")


if __name__ == "__main__":
    make_golden()
