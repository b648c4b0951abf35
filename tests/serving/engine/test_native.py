"""The native kernels against torch's operators, which compute the same where there is no compiler."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raymoe.serving.engine import native
from raymoe.serving.engine.cluster import Cluster, LocalClusters, compute_clusters
from raymoe.serving.engine.kv_cache import KVCache
from raymoe.serving.engine.trunk import Segment, Trunk
from raymoe.storage.artifact import Artifact
from tests.support import served

PRIVATE = {"expert_kind": "private", "expert_width": 20}
WITH_BASE = PRIVATE | {"base_width": 24}
MODELS = [
    {}, {"residual_width": 0}, {"experts_per_token": 1}, {"residual_width": 5, "d_expert": 30}, PRIVATE, WITH_BASE,
    PRIVATE | {"experts_per_token": 1, "expert_width": 16},
]  # fmt: skip
GATES = [
    {"clusters_per_token": p, "gate": gate, "expert_kind": kind}
    for p, gate, kind in ((1, "biased", "private"), (2, "biased", "residual"), (1, "sigmoid", "residual"), (2, "sigmoid", "private"))
]  # fmt: skip
NEAR = {torch.float32: 2e-5, torch.bfloat16: 3e-2}

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and a process that has loaded nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear()
    yield tmp_path / "raymoe"
    native._library.cache_clear()


def near(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(a.float(), b.float(), atol=NEAR[dtype] * b.float().abs().max().item(), rtol=0)


def both(
    monkeypatch: pytest.MonkeyPatch, artifact: Artifact, dtype: torch.dtype
) -> tuple[LocalClusters, LocalClusters]:
    """The clusters with native kernels, and with torch's operators."""
    ours = LocalClusters(artifact, range(artifact.model.n_clusters), dtype)
    with monkeypatch.context() as without:
        without.setenv("RAYMOE_NATIVE", "0")
        return ours, LocalClusters(artifact, range(artifact.model.n_clusters), dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", MODELS)
def test_cluster_outputs_equal_those_of_torch(monkeypatch, tmp_path, changes: dict, dtype: torch.dtype) -> None:
    artifact = served.artifact(tmp_path, replace(served.MODEL, **changes))
    ours, theirs = both(monkeypatch, artifact, dtype)
    generator = torch.Generator().manual_seed(0)
    for sizes in ((1, 64, 3), (5, 2, 33), (17, 1, 9)):  # clusters have unequal numbers of experts
        rows = {c: torch.randn(n, artifact.model.d_model, generator=generator).to(dtype) for c, n in enumerate(sizes)}
        for layer in range(artifact.model.layers):
            outputs, expected = ours(layer, rows), theirs(layer, rows)
            for c in rows:
                assert outputs[c].dtype == dtype
                near(outputs[c], expected[c], dtype)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("changes", [{}, PRIVATE, WITH_BASE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_of_a_row_does_not_depend_on_the_other_rows(
    monkeypatch, tmp_path, dtype: torch.dtype, changes: dict, compiled: bool
) -> None:
    monkeypatch.setenv("RAYMOE_NATIVE", str(int(compiled)))
    artifact = served.artifact(tmp_path, replace(served.MODEL, **changes))
    held = LocalClusters(artifact, range(3), dtype).clusters
    rows = torch.randn(64, artifact.model.d_model, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = held[0, 2](rows)
    for i in range(64):
        assert torch.equal(held[0, 2](rows[i : i + 1])[0], whole[i])
    for n in range(2, 20):
        assert torch.equal(compute_clusters([held[0, 1], held[0, 2]], [rows[:3], rows[n : 2 * n]])[1], whole[n : 2 * n])


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("changes", [{}, PRIVATE])
def test_a_cluster_without_experts_returns_zeros(monkeypatch, tmp_path, changes: dict, compiled: bool) -> None:
    monkeypatch.setenv("RAYMOE_NATIVE", str(int(compiled)))
    monkeypatch.setattr(served, "UNEVEN", [[0, 2, 2, 0, 2, 0, 2], [1] * 7])
    held = LocalClusters(served.artifact(tmp_path, replace(served.MODEL, **changes)), range(3), torch.float32).clusters
    rows = torch.randn(4, served.MODEL.d_model)
    empty, some = compute_clusters([held[0, 1], held[0, 2]], [rows, rows])
    assert torch.equal(empty, torch.zeros_like(rows)) and some.abs().min() > 0


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
def test_a_private_cluster_without_experts_returns_its_base(monkeypatch, tmp_path, compiled: bool) -> None:
    monkeypatch.setenv("RAYMOE_NATIVE", str(int(compiled)))
    monkeypatch.setattr(served, "UNEVEN", [[0, 2, 2, 0, 2, 0, 2], [1] * 7])
    artifact = served.artifact(tmp_path, replace(served.MODEL, **WITH_BASE))
    held, tensors = LocalClusters(artifact, range(3), torch.float32).clusters, artifact.tensors()
    gate, up, down = (tensors[f"layers.0.clusters.1.base_{name}"] for name in ("gate", "up", "down"))
    rows = torch.randn(4, served.MODEL.d_model)
    near(held[0, 1](rows), (torch.nn.functional.silu(rows @ gate) * (rows @ up)) @ down, torch.float32)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [*MODELS, *GATES, {"clusters_per_token": 2, "gate_scale": 1.5, "tied_head": False}])
def test_logits_are_those_of_torch(monkeypatch, tmp_path, changes: dict, dtype: torch.dtype) -> None:
    artifact = served.artifact(tmp_path, replace(served.MODEL, **changes))
    ours, theirs = both(monkeypatch, artifact, dtype)
    trunk = Trunk(artifact, ours, dtype, 128)
    monkeypatch.setenv("RAYMOE_NATIVE", "0")
    reference = Trunk(artifact, theirs, dtype, 128)
    assert trunk.native and not reference.native
    tokens = torch.randint(artifact.model.vocabulary, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = []
    for made in (trunk, reference):
        cache = KVCache(artifact.model, 1 << 20, dtype, 4)
        cache.allocate(0, 60)
        first = made([Segment(0, 0, tokens[:59])], cache, torch.arange(59))
        logits.append(torch.cat((first, made([Segment(0, 59, tokens[59:])], cache, torch.arange(1)))))
    if dtype == torch.float32:
        near(*logits, dtype)
    else:  # where rounding changes a choice of experts, all of a row differs
        error = (logits[0] - logits[1]).norm(dim=1) / logits[1].norm(dim=1)
        assert error.median() < NEAR[dtype]


@pytest.mark.parametrize(
    ("i", "j", "dtype"),
    [(3, 5, torch.float32), (7, 33, torch.bfloat16), (8, 16, torch.bfloat16)],
)
def test_panels_are_the_weight(i: int, j: int, dtype: torch.dtype) -> None:
    weight = torch.randn(2, i, j).to(dtype)
    laid = native.panels(weight, dtype)
    for e in range(2):
        for k in range(i):
            for column in range(j):
                at = laid[e, column // 16]
                found = at[k, column % 16] if dtype == torch.float32 else at[k // 2, column % 16, k % 2]
                assert found == weight[e, k, column]
    assert laid.float().abs().sum().item() == pytest.approx(
        weight.float().abs().sum().item(), rel=1e-5
    )  # the rest is zero


def test_without_a_compiler_torch_computes(monkeypatch, tmp_path, caplog, cold: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    artifact = served.artifact(tmp_path / "served")
    cluster = Cluster(artifact.model, artifact.cluster(0), 0, 0, torch.float32)
    assert cluster.native is None and cluster(torch.randn(2, artifact.model.d_model)).isfinite().all()
    assert len(caplog.records) == 1 and "no C compiler" in caplog.text


def test_a_failing_compiler_is_logged_once(monkeypatch, caplog, cold: Path) -> None:
    monkeypatch.setenv("CC", "false")
    assert native.library() is None and native.library() is None
    assert len(caplog.records) == 1 and "false failed" in caplog.text and not list(cold.iterdir())


@needs_compiler
def test_the_kernel_name_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch, cold: Path) -> None:
    """Two builds of one source are equal; another target, or torch, is another kernel."""
    name = native.kernel_name()
    for library in cold.glob("*.so"):
        library.unlink()
    native._library.cache_clear()
    assert native.kernel_name() == name and name.startswith("native-")
    if platform.machine() == "x86_64":
        monkeypatch.setenv("CC", "cc -march=x86-64-v2")
        assert native.kernel_name().startswith("native-") and native.kernel_name() != name
    monkeypatch.setenv("RAYMOE_NATIVE", "0")
    assert native.kernel_name().startswith("torch-")


def test_a_user_without_a_home_computes_with_torch(monkeypatch: pytest.MonkeyPatch, cold: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert native.library() is None


def test_a_folder_that_others_can_write_is_not_trusted(caplog, cold: Path) -> None:
    cold.mkdir()
    cold.chmod(0o777)
    assert native.library() is None and "others can write to" in caplog.text


@needs_compiler
@pytest.mark.parametrize("damage", [lambda content: content[:-99], lambda content: b"", lambda content: b"x" + content])
def test_a_damaged_library_is_built_again(cold: Path, damage) -> None:
    assert native.library()
    (built,) = cold.iterdir()
    assert cold.stat().st_mode & 0o777 == 0o700
    content = built.read_bytes()
    built.unlink()  # the one that is loaded stays as it is
    built.write_bytes(damage(content))
    native._library.cache_clear()
    assert native.library()
    (again,) = cold.iterdir()
    assert again == built and native._is_whole(again)
