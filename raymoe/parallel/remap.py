"""Application of a change of clusters: experts, their moments, router rows and biases move to their new cluster.

A unit moves as a whole: `clusters.c` (the bases of a cluster), `experts.e` or `ghosts.e`, with all tensors
under that prefix and their moments. The memberships and placements determine which rank has which unit
before and after, so all ranks compute the same exchange; it is one all-to-all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from raymoe.model.dispatch import Dispatch, LocalDispatch
from raymoe.model.experts import ClusteredExperts, Ghosts, Slice, members
from raymoe.model.leaves import base_leaves, member_leaves
from raymoe.model.lowrank import factor
from raymoe.parallel.all_to_all import AllToAllDispatch
from raymoe.parallel.groups import Placement
from raymoe.parallel.sharded import Sharded

Refit = Literal["keep", "svd", "weighted"]
Moments = dict[str, dict[str, Tensor]]
"""Moments by kind ("m", "v") and parameter name, in the shapes of the parameters."""


@dataclass(frozen=True)
class Membership:
    """The members of the clusters of every layer: assignment [L][E], and the ghosts of moving experts."""

    assignment: tuple[tuple[int, ...], ...]
    ghosts: tuple[Ghosts, ...]


def moved(before: Membership, assignment: Sequence[Sequence[int]]) -> Membership:
    """Return the membership in which every expert whose cluster changes leaves a ghost in its old cluster."""
    ghosts = tuple(
        {e: old for e, (old, new) in enumerate(zip(was, row, strict=True)) if old != new}
        for was, row in zip(before.assignment, assignment, strict=True)
    )
    return Membership(tuple(map(tuple, assignment)), ghosts)


def units(assignment: Sequence[int], ghosts: Ghosts, clusters: Sequence[int]) -> list[str]:
    """Return the units of these clusters of a layer."""
    return [f"clusters.{c}" for c in clusters] + [
        member.key for c in clusters for member in members(assignment, ghosts, c)
    ]


@dataclass(frozen=True)
class LayerChange:
    """One layer before and after: the units that each rank needs, and the ranks that have them."""

    before: tuple[Sequence[int], Ghosts, Placement]
    after: tuple[Sequence[int], Ghosts, Placement]

    def source(self, unit: str) -> str:
        """Return the unit before the change that `unit` continues: a new ghost continues its expert."""
        kind, index = unit.split(".")
        e = int(index)
        is_new = kind == "ghosts" and self.before[1].get(e) != self.after[1][e]
        return f"experts.{e}" if is_new else unit

    def movers(self) -> dict[int, tuple[int, int]]:
        """Return expert -> (old cluster, new cluster)."""
        pairs = zip(self.before[0], self.after[0], strict=True)
        return {e: (old, new) for e, (old, new) in enumerate(pairs) if old != new}

    def missing(self, rank: int, refit: Refit) -> list[str]:
        """Return the units before the change that a rank needs and lacks; `bases.c` is a cluster without its moments."""
        local = set(units(*self.before[:2], self.before[2].groups_of(rank)))
        mine = self.after[2].groups_of(rank)
        wanted = [self.source(unit) for unit in units(*self.after[:2], mine)]
        if refit != "keep":
            wanted += [f"bases.{old}" for old, new in self.movers().values() if new in mine]
        have = local | {unit.replace("clusters", "bases") for unit in local}
        return [unit for unit in dict.fromkeys(wanted) if unit not in have]

    def sender(self, unit: str) -> int:
        """Return the rank that sends a unit: the primary owner of the cluster that contains it."""
        kind, index = unit.split(".")
        cluster = int(index)
        if kind == "experts":
            cluster = self.before[0][cluster]
        elif kind == "ghosts":
            cluster = self.before[1][cluster]
        return self.before[2].owners[cluster][0]


class Stacks:
    """The stacked tensors of one layer in this process, by unit: parameters, biases and moments."""

    def __init__(self, ffn: ClusteredExperts, prefix: str, moments: Moments) -> None:
        self.ffn, self.prefix, self.moments = ffn, prefix, moments
        # A cluster without a base is a unit without tensors.
        self.slices: dict[str, list[Slice]] = {f"clusters.{c}": [] for c in ffn.dispatch.local_groups}
        for item in ffn.logical():
            if item.index is not None:
                self.slices.setdefault(".".join(item.key.split(".")[:2]), []).append(item)

    def unit(self, unit: str) -> dict[str, Tensor]:
        """Return views of all tensors of a unit: `base_gate`, `m.base_gate`, …"""
        weights_only = unit.startswith("bases.")
        out: dict[str, Tensor] = {}
        for item in self.slices[unit.replace("bases", "clusters")]:
            leaf = item.key.rsplit(".", 1)[-1]
            out[leaf] = getattr(self.ffn, item.name).detach()[item.index]
            for kind, stacks in self.moments.items():
                if not weights_only and self.prefix + item.name in stacks:
                    out[f"{kind}.{leaf}"] = stacks[self.prefix + item.name][item.index]
        return out


def shapes(ffn: ClusteredExperts, unit: str, kinds: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `Stacks.unit`, also for a unit of another rank."""
    is_base = unit.startswith(("bases", "clusters"))
    leaves = base_leaves(ffn.model) if is_base else member_leaves(ffn.model)
    learned: dict[str, tuple[int, ...]] = {name: leaf.shape for name, leaf in leaves.items()}
    if is_base:
        kinds, others = [] if unit.startswith("bases") else kinds, {}
    else:
        learned["router"], others = (ffn.model.d_model,), {"bias": ()}
    return learned | others | {f"{kind}.{leaf}": shape for leaf, shape in learned.items() for kind in kinds}


def remap(
    sharded: Sharded,
    before: Membership,
    after: Membership,
    placed: Sequence[Placement],
    moments: Moments,
    *,
    refit: Refit = "keep",
    inputs: Sequence[Tensor] | None = None,
) -> tuple[Moments, int]:
    """Change a clustered model in place to another membership and placement. Collective.

    placed: the new placement of each layer (ignored in a world of one). moments: by kind ("m", "v"), of
    every parameter. Returns the moments of the new parameters and the bytes that this rank sent. Units
    that move stay equal bit for bit, and parameters that do not change stay the same objects. A
    re-fitted residual starts with m = 0 and v = the mean of the other members of its new cluster.
    inputs: for each layer the rows [N, D] that weight a re-fit; those routed to the new cluster count.
    """
    changes = _changes(sharded, before, after, placed)
    stacks = {i: Stacks(_ffn(sharded, i), f"layers.{i}.ffn.", moments) for i in changes}
    arrived, sent = _exchange(sharded, changes, stacks, refit)
    moments = {kind: dict(tensors) for kind, tensors in moments.items()}
    for layer, change in changes.items():
        old = _ffn(sharded, layer)
        new = _rebuild(sharded, old, change)
        same_clusters = new.dispatch.local_groups == old.dispatch.local_groups
        kept = new.base_names if same_clusters else ()
        for name in kept:
            setattr(new, name, getattr(old, name))
        built = Stacks(new, f"layers.{layer}.ffn.", moments)
        for name, p in new.named_parameters(recurse=False):
            if name not in kept:
                for tensors in moments.values():
                    tensors[built.prefix + name] = torch.zeros_like(p)

        def source(unit: str, layer: int = layer) -> dict[str, Tensor]:
            return arrived[layer, unit] if (layer, unit) in arrived else stacks[layer].unit(unit)

        _fill(built, change, source, keep_bases=same_clusters)
        if refit != "keep":
            rows_ND = inputs[layer] if inputs is not None and refit == "weighted" else None
            for e, (left, joined) in change.movers().items():
                if joined in new.dispatch.local_groups:
                    _refit(built, e, source(f"bases.{left}"), joined, rows_ND)
        sharded.transformer.layers[layer].ffn = new  # type: ignore[union-attr]
    if sharded.placements:
        sharded.placements[:] = placed
    return moments, sent


def _changes(
    sharded: Sharded, before: Membership, after: Membership, placed: Sequence[Placement]
) -> dict[int, LayerChange]:
    """Return the layers that change."""
    n_layers = len(before.assignment)
    whole = Placement(tuple((0,) for _ in range(sharded.transformer.model.n_clusters)), 1)
    old = sharded.placements or [whole] * n_layers
    new = placed if sharded.placements else old
    changes = {
        i: LayerChange((before.assignment[i], before.ghosts[i], old[i]), (after.assignment[i], after.ghosts[i], new[i]))
        for i in range(n_layers)
    }
    return {i: change for i, change in changes.items() if change.before != change.after}


def _rebuild(sharded: Sharded, old: ClusteredExperts, change: LayerChange) -> ClusteredExperts:
    """Build the layer after a change: the router is the old one, all other weights are uninitialized."""
    assignment, ghosts, placement = change.after
    dispatch: Dispatch = LocalDispatch(old.model.n_clusters)
    if sharded.placements:
        dispatch = AllToAllDispatch(placement, sharded.rank, sharded.meter)
    with torch.device(old.router.weight.device):
        new = ClusteredExperts(old.model, assignment, dispatch, ghosts).to(old.router.weight.dtype)
    new.router = old.router
    return new


@torch.no_grad()
def _fill(built: Stacks, change: LayerChange, source: Callable[[str], dict[str, Tensor]], *, keep_bases: bool) -> None:
    """Copy every unit of the new layer from the unit that it continues."""
    for unit in built.slices:
        if not (keep_bases and unit.startswith("clusters.")):
            target = built.unit(unit)
            for leaf, value in source(change.source(unit)).items():
                target[leaf].copy_(value)


def _ffn(sharded: Sharded, layer: int) -> ClusteredExperts:
    return sharded.transformer.ffns_of(ClusteredExperts)[layer]


def _exchange(
    sharded: Sharded, changes: Mapping[int, LayerChange], stacks: Mapping[int, Stacks], refit: Refit
) -> tuple[dict[tuple[int, str], dict[str, Tensor]], int]:
    """Receive the units that this rank lacks; return them and the bytes sent. One all-to-all."""
    if sharded.world == 1 or not changes:
        return {}, 0
    ranks = range(sharded.world)
    # crossing[source][destination]: (layer, unit) in the same order on both ranks
    crossing: list[list[list[tuple[int, str]]]] = [[[] for _ in ranks] for _ in ranks]
    for layer, change in changes.items():
        for rank in ranks:
            for unit in change.missing(rank, refit):
                crossing[change.sender(unit.replace("bases", "clusters"))][rank].append((layer, unit))
    ffn = next(iter(stacks.values())).ffn
    kinds = list(next(iter(stacks.values())).moments)
    like = ffn.router.weight.detach()
    size = lambda pairs: sum(  # noqa: E731
        torch.Size(shape).numel() for _, unit in pairs for shape in shapes(ffn, unit, kinds).values()
    )
    outgoing = [
        stacks[layer].unit(unit)[leaf].flatten().to(like.dtype)
        for rank in ranks
        for layer, unit in crossing[sharded.rank][rank]
        for leaf in shapes(ffn, unit, kinds)
    ]
    send = [size(crossing[sharded.rank][rank]) for rank in ranks]
    receive = [size(crossing[rank][sharded.rank]) for rank in ranks]
    buffer = like.new_empty(sum(receive))
    dist.all_to_all_single(buffer, torch.cat(outgoing) if outgoing else like.new_empty(0), receive, send)
    arrived: dict[tuple[int, str], dict[str, Tensor]] = {}
    start = 0
    for rank in ranks:
        for layer, unit in crossing[rank][sharded.rank]:
            tensors = arrived.setdefault((layer, unit), {})
            for leaf, shape in shapes(ffn, unit, kinds).items():
                count = torch.Size(shape).numel()
                tensors[leaf] = buffer[start : start + count].view(shape)
                start += count
    return arrived, sum(send) * like.element_size()


@torch.no_grad()
def _refit(built: Stacks, e: int, left: Mapping[str, Tensor], joined: int, rows_ND: Tensor | None) -> None:
    """Set the residual of expert e that, added to its new base, keeps its old function best."""
    ffn = built.ffn
    mine, base = built.unit(f"experts.{e}"), built.unit(f"clusters.{joined}")
    if rows_ND is not None:
        scores_NC = rows_ND @ ffn.router.weight.detach().t() + ffn.router.bias
        rows_ND = rows_ND[(scores_NC.topk(ffn.router.k).indices == joined).any(-1)]
    cluster = ffn.members[ffn.dispatch.local_groups.index(joined)]
    others = [built.unit(m.key) for m in cluster if not (m.expert in ffn.ghosts and not m.ghost)]
    for name in ("gate", "up", "down"):
        first, second = f"{name}_in", f"{name}_out"
        whole = left[f"base_{name}"] + mine[first] @ mine[second]
        pair = factor(whole - base[f"base_{name}"], mine[first].shape[1], rows_ND if name != "down" else None)
        for leaf, value in zip((first, second), pair, strict=True):
            mine[leaf].copy_(value)
            for kind in built.moments:
                mean = torch.stack([tensors[f"{kind}.{leaf}"] for tensors in others]).mean(0) if others else 0.0
                mine[f"{kind}.{leaf}"].copy_(torch.as_tensor(mean if kind == "v" else 0.0).expand_as(mine[leaf]))
