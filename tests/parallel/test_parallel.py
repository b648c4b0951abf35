"""Several gloo processes have the loss, gradients and clipped gradients of one process, for any world size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from raymoe.config import ModelSection
from raymoe.model.observation import Loads, Observation
from raymoe.parallel.gradients import Gradients
from raymoe.parallel.groups import place
from raymoe.parallel.sharded import shard
from tests.support import processes

SIZES: dict[str, Any] = dict(
    layers=2, d_model=16, d_expert=12, n_experts=12, n_clusters=4, experts_per_token=2, residual_width=3,
    heads=2, kv_heads=1, vocabulary=29, context=8,
)  # fmt: skip
MODELS = {
    "clustered": ModelSection(**SIZES),
    "two clusters per token": ModelSection(**SIZES, clusters_per_token=2),
    "bases alone": ModelSection(**(SIZES | {"residual_width": 0})),
    "flat": ModelSection(**SIZES, experts="flat"),
    "flat, E=C, K=1": ModelSection(**(SIZES | {"n_experts": 4, "experts_per_token": 1}), experts="flat"),
    "dense": ModelSection(**SIZES, experts="dense"),
}
UNEVEN = ((0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3), (3, 3, 2, 2, 2, 1, 1, 1, 1, 0, 0, 3))


def one_step(rank: int, world: int, name: str, grains: int) -> dict[str, Any]:
    """Return loss, gradients, norm and clipped gradients of a global batch of `grains` grains, by logical key."""
    model = MODELS[name]
    sharded = shard(model, UNEVEN if model.experts == "clustered" else model.default_assignment())
    sharded.transformer.double().initialize(seed=1)
    with torch.no_grad():  # large router logits, so that rounding changes no choice
        for key, view in sharded.transformer.logical().items():
            if "router" in key and view.dim():
                view.mul_(50)
    gradients = Gradients(sharded)
    gradients.zero()
    tokens = torch.randint(29, (grains, 2, 9), generator=torch.Generator().manual_seed(0))
    loss = torch.zeros((), dtype=torch.float64)
    loads = Loads.zeros(model)
    for turn in range(-(-grains // world)):
        index = turn * world + rank
        batch = tokens[index] if index < grains else tokens[:0].flatten(0, 1)
        seen = Observation(model)
        logits = sharded.transformer(batch[:, :-1], seen=seen)
        loads = loads + seen.loads()
        part = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum") / (grains * 16)
        part.backward()
        loss += part.detach()
    if world > 1:
        torch.distributed.all_reduce(loss)
    gradients.reduce()
    by_name = {n: p.grad for n, p in sharded.transformer.named_parameters() if p.grad is not None}
    before = {k: v.clone() for k, v in sharded.transformer.logical(by_name).items()}
    norm = gradients.clip(0.01)
    after = {k: v.clone() for k, v in sharded.transformer.logical(by_name).items()}
    load = (loads.clusters_LC, loads.members_LM)
    return dict(loss=loss.item(), norm=norm, before=before, after=after, load=load, sent=sharded.meter.take(),
                owned=sharded.owned(), held=list(sharded.transformer.logical()))  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("world", [2, 3, 5])
def test_several_processes_equal_one(name: str, world: int, tmp_path: Path) -> None:
    grains = 4
    expected = one_step(0, 1, name, grains)
    results = processes.run(world, one_step, name, grains, folder=tmp_path)
    assert expected["norm"] > 0.01  # so that clipping does something
    seen: set[str] = set()
    for result in results:
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-12)
        assert result["norm"] == pytest.approx(expected["norm"], rel=1e-10)
        for stage in ("before", "after"):
            for key, grad in result[stage].items():
                torch.testing.assert_close(
                    grad, expected[stage][key], rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}"
                )
        seen |= set(result["before"])
    assert seen == set(expected["before"])
    for level, load in enumerate(expected["load"]):
        assert torch.equal(sum(result["load"][level] for result in results), load)
    owned = [key for result in results for key in result["owned"]]
    assert sorted(owned) == sorted(expected["held"])  # every key is written by exactly one rank
    crossing = sum(result["sent"] for result in results)
    assert (crossing > 0) == (name != "dense")


def initial(rank: int, world: int, name: str) -> dict[str, torch.Tensor]:
    sharded = shard(MODELS[name], MODELS[name].default_assignment())
    sharded.transformer.initialize(seed=3)
    return {k: v.clone() for k, v in sharded.transformer.logical().items()}


@pytest.mark.dist
def test_initial_weights_do_not_depend_on_the_world(tmp_path: Path) -> None:
    expected = initial(0, 1, "clustered")
    for result in processes.run(3, initial, "clustered", folder=tmp_path):
        for key, value in result.items():
            assert torch.equal(value, expected[key]), key


def exact_bytes(rank: int, world: int) -> tuple[int, int]:
    """Return the metered bytes of one forward and backward, and the expected bytes from the rows sent between ranks."""
    model = MODELS["clustered"]
    sharded = shard(model, model.default_assignment())
    sharded.transformer.initialize(seed=5)
    layer = sharded.transformer.ffns[0]
    rows = torch.randn(20, 16, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    layer(rows).sum().backward()
    choice = layer.router(rows).index_TK.flatten()
    remote = sum(rank not in sharded.placements[0].owners[g] for g in choice.tolist())
    owned_by_others = sum(len(sharded.placements[0].groups_of(r)) for r in range(world) if r != rank)
    # This rank sends x and dy of its remote rows. The owner sends y and dx back, and its meter counts them.
    back = torch.zeros(world, dtype=torch.int64)
    for g in choice.tolist():
        owner = sharded.placements[0].owners[g][0]
        back[owner] += owner != rank
    torch.distributed.all_reduce(back)
    return sharded.meter.take(), (2 * remote + 2 * int(back[rank])) * 16 * 4 + owned_by_others * 8


@pytest.mark.dist
def test_bytes_between_ranks_are_counted_exactly(tmp_path: Path) -> None:
    for counted, expected in processes.run(2, exact_bytes, folder=tmp_path):
        assert counted == expected > 0


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=12), st.integers(1, 20))
def test_placement_serves_every_group_on_every_world(loads: list[float], world: int) -> None:
    placement = place(loads, world)
    held = [placement.groups_of(rank) for rank in range(world)]
    assert set().union(*held) == set(range(len(loads)))
    assert all(held) and max(map(len, held)) - min(map(len, held)) <= 1
    for rank in range(world):
        for group, owner in enumerate(placement.serving(rank)):
            assert owner in placement.owners[group]
            assert owner == rank or rank not in placement.owners[group]


def test_placement_balances_uneven_loads() -> None:
    placement = place([4.0, 1.0, 1.0, 4.0], 2)
    assert sorted(sum(4.0 if g in (0, 3) else 1.0 for g in placement.groups_of(r)) for r in (0, 1)) == [5.0, 5.0]
