"""The fold of independent experts finds families and preserves functions, on any number of processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.config import ModelSection, override, preset
from raymoe.model.leaves import RESIDUALS
from raymoe.model.transformer import Transformer
from raymoe.parallel.fold import fold
from raymoe.parallel.sharded import shard
from raymoe.training.optimizer import Optimizer
from tests.support import processes
from tests.support.presets import RESIDUAL
from tests.training.test_loop import copy_at, losses, records
from tests.training.test_regroup import fresh, plans, train

CLUSTERED = ModelSection(
    layers=3, d_model=16, d_expert=12, n_experts=8, n_clusters=4, experts_per_token=2, residual_width=12,
    heads=2, kv_heads=1, vocabulary=29, context=8,
)  # fmt: skip
FLAT = replace(CLUSTERED, experts="flat")
FAMILY = [[0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3, 0, 1, 2, 3], [3, 1, 1, 0, 2, 0, 3, 2]]


def folded(rank: int, world: int, width: int) -> dict[str, Any]:
    """Fold a flat model. Each expert is the common initialization plus an offset of its family plus a small one of its own."""
    sharded = shard(FLAT, FLAT.default_assignment())
    optimizer = Optimizer(sharded.transformer, preset("tiny").train)
    sharded.transformer.initialize(3, common=True)
    with torch.no_grad():
        for key, view in (sharded.transformer.logical() | optimizer.logical()).items():
            if ".experts." not in key or "bias" in key:
                continue
            layer, e = int(key.split("layers.")[1].split(".")[0]), int(key.split("experts.")[1].split(".")[0])
            draw = lambda name, key=key, view=view: torch.randn(  # noqa: E731
                view.shape, generator=torch.Generator().manual_seed(abs(hash_of(f"{key.rsplit('.', 1)[-1]}{name}")))
            )
            if key.startswith("moments."):
                view.copy_(draw(f"{key}").abs())
            else:
                view.add_(0.1 * draw(f"{layer} family {FAMILY[layer][e]}") + 0.03 * draw(f"{layer} {e}"))
    samples = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    flat = {k: v.clone() for k, v in (sharded.transformer.logical() | optimizer.logical()).items()}
    assignment, tensors = fold(
        sharded, optimizer.moments(), samples, clustered=replace(CLUSTERED, residual_width=width), alpha=0.7, seed=0
    )
    return {"assignment": assignment, "tensors": {k: v.clone() for k, v in tensors.items()}, "flat": flat}


def hash_of(text: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")


def same_families(found: Any) -> bool:
    pairs = lambda row: {(i, j) for i in range(8) for j in range(8) if row[i] == row[j]}  # noqa: E731
    return all(pairs(row) == pairs(family) for row, family in zip(found, FAMILY, strict=True))


def test_families_become_clusters_and_full_width_residuals_reproduce_experts() -> None:
    result = folded(0, 1, 12)
    tensors, flat, assignment = result["tensors"], result["flat"], result["assignment"]
    assert same_families(assignment)
    model = Transformer(CLUSTERED, assignment)
    model.load_logical(tensors)  # every key, every shape
    for layer, row in enumerate(assignment):
        scales = set()
        for e, c in enumerate(row):
            at = f"layers.{layer}.experts.{e}."
            for name in ("gate", "up", "down"):
                base = tensors[f"layers.{layer}.clusters.{c}.base_{name}"]
                whole = base + tensors[f"{at}{name}_in"] @ tensors[f"{at}{name}_out"]
                if name == "down":  # scaled by one factor per layer, which offsets p(cluster | x)
                    scales.add(round((whole.norm() / flat[f"{at}down"].norm()).item(), 3))
                    whole = whole * (flat[f"{at}down"].norm() / whole.norm())
                torch.testing.assert_close(whole, flat[f"{at}{name}"], rtol=1e-3, atol=1e-4)
            assert torch.equal(tensors[f"{at}router"], flat[f"layers.{layer}.router.weight"][e])
            assert torch.equal(tensors[f"moments.v.{at}router"], flat[f"moments.v.layers.{layer}.router.weight"][e])
        assert len(scales) == 1 and 1 <= scales.pop() <= 4
        for c in range(4):
            of_c = [flat[f"moments.v.layers.{layer}.experts.{e}.gate"] for e in range(8) if row[e] == c]
            total = tensors[f"moments.v.layers.{layer}.clusters.{c}.base_gate"]
            torch.testing.assert_close(total, torch.stack(of_c).sum(0))


def test_a_narrow_residual_reduces_the_distance_of_base_and_expert() -> None:
    result = folded(0, 1, 6)
    tensors, flat = result["tensors"], result["flat"]
    for e, c in enumerate(result["assignment"][0]):
        base = tensors[f"layers.0.clusters.{c}.base_gate"]
        whole = base + tensors[f"layers.0.experts.{e}.gate_in"] @ tensors[f"layers.0.experts.{e}.gate_out"]
        target = flat[f"layers.0.experts.{e}.gate"]
        assert (whole - target).norm() < 0.6 * (base - target).norm()


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_the_fold_is_the_same_on_any_world(world: int, tmp_path: Path) -> None:
    expected = folded(0, 1, 6)
    for result in processes.run(world, folded, 6, folder=tmp_path):
        assert result["assignment"] == expected["assignment"]
        for key, value in result["tensors"].items():  # groups are complete on all ranks, the trunk is local
            product = key.rsplit(".", 1)[-1] not in RESIDUALS  # the signs of factors are not unique
            if product:
                torch.testing.assert_close(value, expected["tensors"][key], rtol=1e-4, atol=1e-5)
        assert result["tensors"].keys() == expected["tensors"].keys()


DENSE = ("regroup.start=dense", "regroup.force=0", "train.steps=30")


@pytest.mark.dist
def test_a_dense_start_folds_once_and_resumes_before_or_after_the_fold(tmp_path: Path) -> None:
    run = fresh(tmp_path / "run")
    results = processes.run(2, train, str(run), DENSE, folder=tmp_path)
    (record,) = plans(run, "folded")
    assert record["step"] == 10
    assert record["probe_after"] == pytest.approx(record["probe_before"], rel=0.02)
    assert results[0]["membership"] == results[1]["membership"]
    assert any("clusters." in key for key in results[0]["tensors"])
    for step, folds in ((5, [10]), (15, [])):
        resumed = copy_at(run, tmp_path / f"from{step}", step)
        train(0, 1, str(resumed), DENSE)
        assert [r["step"] for r in plans(resumed, "folded")] == folds
        assert losses(resumed)[step : step + 4] == pytest.approx(losses(run)[step : step + 4], rel=1e-5)
        assert len(losses(resumed)) == 30
    meta = json.loads((run / "checkpoints" / "step_00000005" / "manifest.json").read_text())["meta"]
    assert meta["config"]["model"]["experts"] == "flat" and not meta["folded"]
    assert records(run, "assignment")[-1]["assignment"] == [list(row) for row in results[0]["membership"].assignment]


def test_a_dense_start_needs_a_burn_in_within_the_run() -> None:
    with pytest.raises(ValueError, match="regroup.burn_in=200 is not allowed"):
        override(preset("small"), [*RESIDUAL, "regroup.start=dense", "train.steps=200"])
    with pytest.raises(ValueError, match="regroup.start='dense' is not allowed"):
        override(preset("small"), [*RESIDUAL, "regroup.start=dense", "model.experts=flat"])
