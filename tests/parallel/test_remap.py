"""A remap preserves all weights and moments: any sequence of plans, saves and worlds equals a one-process reference."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raymoe.config import ModelSection, preset
from raymoe.model.experts import ClusteredExperts
from raymoe.model.leaves import RESIDUALS
from raymoe.model.lowrank import factor
from raymoe.model.transformer import Transformer
from raymoe.parallel.gradients import Gradients
from raymoe.parallel.gram import grams
from raymoe.parallel.groups import Placement, place, rebalance
from raymoe.parallel.remap import Membership, moved, remap
from raymoe.parallel.sharded import Sharded, shard
from raymoe.storage.checkpoint import Checkpoint, write_manifest, write_shard
from raymoe.training.optimizer import Optimizer
from tests.support import processes

MODEL = ModelSection(
    layers=2, d_model=16, d_expert=12, n_experts=10, n_clusters=4, experts_per_token=2, residual_width=3,
    heads=2, kv_heads=1, vocabulary=29, context=8,
)  # fmt: skip
MODELS = {
    "residual": MODEL,
    "private": replace(MODEL, expert_kind="private", expert_width=5, clusters_per_token=2),
    "private with bases": replace(MODEL, expert_kind="private", expert_width=5, base_width=7, gate="biased"),
}
START = Membership(((0, 0, 0, 1, 1, 1, 2, 2, 3, 3), (3, 2, 1, 0, 3, 2, 1, 0, 0, 0)), ({}, {}))
TOKENS = torch.randint(29, (3, 8), generator=torch.Generator().manual_seed(0))


def fade(transformer: Transformer, progress: float) -> None:
    for ffn in transformer.ffns_of(ClusteredExperts):
        ffn.set_progress(progress)


def swapped(before: Membership, seed: int, swaps: int = 2) -> Membership:
    """Return the membership after random swaps of experts between clusters in each layer."""
    chance = random.Random(seed)
    rows = [list(row) for row in before.assignment]
    for row in rows:
        for _ in range(swaps):
            a, b = chance.sample(range(len(row)), 2)
            row[a], row[b] = row[b], row[a]
    return moved(before, rows)


def fresh(sharded: Sharded) -> Optimizer:
    """Set distinct weights, biases and moments; return the optimizer."""
    optimizer = Optimizer(sharded.transformer, preset("tiny").train)
    sharded.transformer.initialize(3)
    with torch.no_grad():
        for key, view in (sharded.transformer.logical() | optimizer.logical()).items():
            if key.startswith("moments.") or key.endswith("bias"):
                view.copy_(0.1 * torch.rand(view.shape, generator=torch.Generator().manual_seed(hash_of(key))))
            elif "router" in key:
                view.mul_(50)  # so that tokens spread over the clusters
    return optimizer


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode()[-7:], "little")


@pytest.mark.parametrize("visits", [1, 2])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    ("kind", "refit"),
    [("residual", "keep"), ("residual", "svd"), ("residual", "weighted"), ("private", "keep"), ("private with bases", "keep")],
)  # fmt: skip
def test_logits_are_unchanged_when_a_plan_is_applied_and_when_its_ghosts_are_removed(
    k: int, visits: int, kind: str, refit: Any
) -> None:
    sharded = shard(replace(MODELS[kind], experts_per_token=k, clusters_per_token=visits), START.assignment)
    optimizer = fresh(sharded)
    before = sharded.transformer(TOKENS)
    after = swapped(START, 5)
    inputs = [torch.randn(64, 16)] * 2
    moments, _ = remap(sharded, START, after, [], optimizer.moments(), refit=refit, inputs=inputs)
    assert all(
        ffn.share_e.device.type == "cpu" for ffn in sharded.transformer.ffns_of(ClusteredExperts)
    )  # as the counts are
    fade(sharded.transformer, 0.0)
    torch.testing.assert_close(sharded.transformer(TOKENS), before, rtol=1e-5, atol=1e-6)
    fade(sharded.transformer, 0.5)
    assert not torch.allclose(sharded.transformer(TOKENS), before, rtol=1e-5, atol=1e-6)
    fade(sharded.transformer, 1.0)
    faded = sharded.transformer(TOKENS)
    remap(sharded, after, Membership(after.assignment, ({}, {})), [], moments)
    assert torch.allclose(sharded.transformer(TOKENS), faded, rtol=1e-5, atol=1e-6)


def test_a_refitted_residual_is_the_best_approximation_of_its_width() -> None:
    sharded = shard(MODEL, START.assignment)
    optimizer = fresh(sharded)
    old = {key: view.clone() for key, view in (sharded.transformer.logical() | optimizer.logical()).items()}
    after = moved(START, [[1, 0, 0, 0, 1, 1, 2, 2, 3, 3], list(START.assignment[1])])
    moments, _ = remap(sharded, START, after, [], optimizer.moments(), refit="svd")
    optimizer.adopt(sharded.transformer, moments, 7)
    new = sharded.transformer.logical() | optimizer.logical()
    for name in ("gate", "up", "down"):
        at = lambda e, part, name=name: f"layers.0.experts.{e}.{name}_{part}"  # noqa: E731
        base = lambda c, name=name: old[f"layers.0.clusters.{c}.base_{name}"]  # noqa: E731
        target = base(0) + old[at(0, "in")] @ old[at(0, "out")] - base(1)
        u, s, vh = torch.linalg.svd(target)
        best = u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
        torch.testing.assert_close(new[at(0, "in")] @ new[at(0, "out")], best, rtol=1e-4, atol=1e-5)
        for part in ("in", "out"):
            assert not new[f"moments.m.{at(0, part)}"].any()
            mean = torch.stack([old[f"moments.v.{at(e, part)}"] for e in (3, 4, 5)]).mean(0)
            torch.testing.assert_close(new[f"moments.v.{at(0, part)}"], mean)
    assert torch.equal(new["moments.m.layers.0.experts.0.router"], old["moments.m.layers.0.experts.0.router"])
    assert torch.equal(new["layers.0.ghosts.0.gate_in"], old["layers.0.experts.0.gate_in"])


def test_factors_weighted_by_inputs_have_a_smaller_error_on_them() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(60, 50, generator=generator)
    inputs = torch.randn(500, 60, generator=generator) * torch.linspace(0.05, 3, 60)
    plain, weighted = factor(target, 4), factor(target, 4, inputs)
    error = lambda pair: (inputs @ (target - pair[0] @ pair[1])).norm()  # noqa: E731
    assert error(weighted) < 0.98 * error(plain)
    u, s, vh = torch.linalg.svd(target)
    torch.testing.assert_close(plain[0] @ plain[1], u[:, :4] @ torch.diag(s[:4]) @ vh[:4], rtol=2e-2, atol=2e-2)
    wide = factor(target, 70)
    torch.testing.assert_close(wide[0] @ wide[1], target, rtol=1e-3, atol=1e-3)


# Any sequence, any world


def reference(model: ModelSection, steps: list[tuple[str, int]]) -> tuple[dict[str, Tensor], Membership]:
    """Return weights and moments by logical key after the same sequence, computed with dictionaries."""
    sharded = shard(model, START.assignment)
    optimizer = fresh(sharded)
    state = {k: v.clone() for k, v in (sharded.transformer.logical() | optimizer.logical()).items()}
    membership = START
    for what, seed in steps:
        if what == "plan":
            membership = swapped(membership, seed)
            state = {k: v for k, v in state.items() if ".ghosts." not in k}
            for layer, ghosts in enumerate(membership.ghosts):
                for e in ghosts:
                    mark = f"layers.{layer}.experts.{e}."
                    for key in [k for k in state if mark in k]:
                        state[key.replace(".experts.", ".ghosts.")] = state[key]
        elif what == "drop":
            membership = Membership(membership.assignment, ({}, {}))
            state = {k: v for k, v in state.items() if ".ghosts." not in k}
    return state, membership


def run_steps(
    rank: int, world: int, model: ModelSection, folder: str, before: Any, steps: list[tuple[str, int]]
) -> tuple[Any, Any]:
    """Load or initialize on `world` processes, apply the steps and save; return the local tensors and the membership."""
    membership, number = before
    sharded = shard(model, membership.assignment, membership.ghosts)
    optimizer = Optimizer(sharded.transformer, preset("tiny").train)
    gradients = Gradients(sharded)
    if number:
        checkpoint = Checkpoint.open(Path(folder) / str(number))
        views = sharded.transformer.logical() | optimizer.logical()
        with torch.no_grad():
            for key, value in checkpoint.read(views).items():
                views[key].copy_(value)
    else:
        optimizer = fresh(sharded)
    kept = {name: p for name, p in sharded.transformer.named_parameters() if "ffn" not in name or "router.w" in name}
    for what, seed in steps:
        chance = random.Random(seed)
        after = swapped(membership, seed) if what == "plan" else Membership(membership.assignment, ({}, {}))
        loads = [[chance.random() for _ in range(4)] for _ in range(2)]
        placed = [rebalance(p, row, swaps=2) for p, row in zip(sharded.placements, loads, strict=False)]
        moments, _ = remap(sharded, membership, after, placed, optimizer.moments())
        optimizer.adopt(sharded.transformer, moments, 1)
        gradients.refresh()
        membership = after
    # The optimizer and the gradients refer to the current parameters of the model.
    held = dict(sharded.transformer.named_parameters())
    for parameters in (optimizer.parameters.values(), [*gradients.trunk, *gradients.experts]):
        assert {id(p) for p in parameters} == {id(p) for p in held.values()}
    assert all(held[name] is p for name, p in kept.items())
    views = sharded.transformer.logical()
    owned = {key: views[key] for key in sharded.owned()}
    owned |= {key: view for key, view in optimizer.logical().items() if key.split(".", 2)[2] in owned}
    write_shard(Path(folder) / str(number + 1), rank, world, owned)
    return {k: v.clone() for k, v in (views | optimizer.logical()).items()}, membership


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kind", "seed"),
    [*(("residual", seed) for seed in range(4)), *((kind, seed) for kind in list(MODELS)[1:] for seed in range(2))],
)
def test_any_sequence_of_plans_saves_and_worlds_equals_the_reference(kind: str, seed: int, tmp_path: Path) -> None:
    model = MODELS[kind]
    chance = random.Random(seed)
    store = tmp_path / "stores"
    store.mkdir()
    script: list[tuple[str, int]] = []
    membership, moving = START, False
    for number, world in enumerate(chance.sample([1, 2, 3, 4, 5], 3)):
        steps: list[tuple[str, int]] = []
        for _ in range(chance.randint(1, 3)):
            moving = not moving or chance.random() < 0.3  # also a plan while the ghosts of another exist
            steps.append(("plan", chance.randrange(10**6)) if moving else ("drop", 0))
        script += steps
        results = processes.run(world, run_steps, model, str(tmp_path), (membership, number), steps, folder=store)
        write_manifest(tmp_path / str(number + 1), step=number, world=world, meta={})
        expected, membership = reference(model, script)
        seen: set[str] = set()
        for held, reached in results:
            assert reached == membership
            assert all(torch.equal(value, expected[key]) for key, value in held.items()), "a tensor changed"
            seen |= held.keys()
        assert seen == expected.keys()
        stored = Checkpoint.open(tmp_path / str(number + 1))
        assert set(stored.keys) == expected.keys()


def traffic(rank: int, world: int, movers: int) -> int:
    sharded = shard(MODEL, START.assignment)
    optimizer = fresh(sharded)
    rows = [list(row) for row in START.assignment]
    pairs = [(0, 3), (6, 8)][:movers]  # between the clusters of different ranks
    for a, b in pairs:
        rows[0][a], rows[0][b] = rows[0][b], rows[0][a]
    _, sent = remap(sharded, START, moved(START, rows), sharded.placements, optimizer.moments())
    return sent


@pytest.mark.dist
def test_traffic_is_proportional_to_the_moved_experts(tmp_path: Path) -> None:
    expert = 3 * (3 * 3 * (16 + 12) + 16) + 1  # factors and router row, each with two moments, and a bias
    for movers, crossing in ((0, 0), (1, 2), (2, 4)):
        sent = sum(processes.run(2, traffic, movers, folder=tmp_path))
        assert sent <= crossing * expert * 4 and (sent > 0) == (movers > 0)


# Placement


def test_rebalance_swaps_only_for_a_sufficient_gain() -> None:
    even = place([1.0] * 4, 2)
    assert rebalance(even, [1.0, 1.02, 0.98, 1.0], swaps=3) == even
    heavy = Placement(((0,), (0,), (1,), (1,)), 2)
    better = rebalance(heavy, [5.0, 4.0, 1.0, 2.0])
    assert better != heavy
    carried = [sum([5.0, 4.0, 1.0, 2.0][g] for g in better.groups_of(rank)) for rank in range(2)]
    assert max(carried) == 6.0  # 5 + 1 and 4 + 2, after one swap
    assert sum(a != b for a, b in zip(heavy.owners, better.owners, strict=True)) == 2
    replicated = place([1.0, 1.0, 1.0], 5)
    lighter = rebalance(replicated, [1.0, 1.0, 6.0])
    assert sorted(map(len, lighter.owners)) == [1, 2, 2] and len(lighter.owners[2]) == 2


# Statistics over ranks


def gathered(rank: int, world: int) -> dict[str, np.ndarray]:
    sharded = shard(MODEL, START.assignment)
    sharded.transformer.initialize(3)
    samples = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
    return grams(sharded, START.assignment, samples, ("residual", "answer", "weight"))


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2, 5])
def test_grams_are_inner_products_on_any_number_of_processes(world: int, tmp_path: Path) -> None:
    parts = processes.run(world, gathered, folder=tmp_path) if world > 1 else [gathered(0, 1)]
    whole = Transformer(MODEL, START.assignment)
    whole.initialize(3)
    view = whole.logical()
    samples = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
    for layer in range(2):
        residuals, weights, answers = [], [], []
        for e, c in enumerate(START.assignment[layer]):
            factors = [view[f"layers.{layer}.experts.{e}.{name}"].double() for name in RESIDUALS]
            products = [factors[i] @ factors[i + 1] for i in (0, 2, 4)]
            bases = [view[f"layers.{layer}.clusters.{c}.base_{name}"].double() for name in ("gate", "up", "down")]
            full = [b + p for b, p in zip(bases, products, strict=True)]
            x = samples[layer].double()
            ffn = lambda m, x=x: (torch.nn.functional.silu(x @ m[0]) * (x @ m[1])) @ m[2]  # noqa: E731
            residuals.append(torch.cat([p.flatten() for p in products]))
            weights.append(torch.cat([w.flatten() for w in full]))
            answers.append((ffn(full) - ffn(bases)).flatten())
        for name, vectors in (("residual", residuals), ("weight", weights), ("answer", answers)):
            stacked = torch.stack(vectors)
            expected = (stacked @ stacked.t()) / (7 if name == "answer" else 1)
            total = sum(part[name][layer] for part in parts)
            np.testing.assert_allclose(total, expected.numpy(), rtol=2e-4, atol=1e-6)


def wanted(rank: int, world: int, kind: str, ghosts: bool) -> np.ndarray:
    sharded = shard(MODELS[kind], START.assignment, swapped(START, 3).ghosts if ghosts else None)
    fresh(sharded)
    samples = torch.randn(2, 60, 16, generator=torch.Generator().manual_seed(1))
    return grams(sharded, START.assignment, samples, ("coactivation",))["coactivation"]


@pytest.mark.dist
@pytest.mark.parametrize("kind", MODELS)
def test_coactivation_counts_the_choices_of_each_sample_on_any_number_of_processes(kind: str, tmp_path: Path) -> None:
    """Compare with a loop over samples in float64. Ghosts take no part."""
    model = MODELS[kind]
    sharded = shard(model, START.assignment)
    fresh(sharded)
    view = {key: tensor.double() for key, tensor in sharded.transformer.logical().items()}
    samples = torch.randn(2, 60, 16, generator=torch.Generator().manual_seed(1)).double()
    expected = np.zeros((2, 10, 10))
    for layer, assignment in enumerate(START.assignment):
        for x in samples[layer]:
            first = (view[f"layers.{layer}.router.weight"] @ x + view[f"layers.{layer}.router.bias"]).softmax(0)
            at = f"layers.{layer}.experts"
            second = [float(view[f"{at}.{e}.router"] @ x + view[f"{at}.{e}.bias"]) for e in range(10)]
            score = []
            for e, c in enumerate(assignment):
                mates = torch.tensor([second[other] for other in range(10) if assignment[other] == c])
                score.append(float(first[c] * (second[e] - mates.logsumexp(0)).exp()))
            taken = np.argsort(score)[-model.clusters_per_token * model.experts_per_token :]
            expected[layer][np.ix_(taken, taken)] += 1
    np.testing.assert_array_equal(wanted(0, 1, kind, False), expected)
    np.testing.assert_array_equal(wanted(0, 1, kind, True), expected)
    for world in (2, 5):
        parts = processes.run(world, wanted, kind, False, folder=tmp_path)
        np.testing.assert_array_equal(sum(parts), expected)


def test_coactivation_of_a_diverged_model_is_not_finite() -> None:
    sharded = shard(MODEL, START.assignment)
    fresh(sharded)
    samples = torch.ones(2, 5, 16)
    samples[1, 3, 2] = torch.nan
    found = grams(sharded, START.assignment, samples, ("coactivation",))["coactivation"]
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).any()
