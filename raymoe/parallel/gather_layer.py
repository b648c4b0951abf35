"""Collection of all experts of a layer on one rank: layer l goes to rank l mod world."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from raymoe.model.experts import members
from raymoe.parallel.sharded import Sharded


def primary_groups(sharded: Sharded, rank: int, layer: int) -> list[int]:
    """Return the groups of a layer (clusters, or experts of a flat model) whose primary owner is this rank."""
    model = sharded.transformer.model
    if not sharded.placements:
        return list(range(model.n_clusters if model.experts == "clustered" else model.n_experts))
    placement = sharded.placements[layer]
    return [g for g in placement.groups_of(rank) if placement.owners[g][0] == rank]


def experts_of(clusters: Sequence[int], assignment: Sequence[int]) -> list[int]:
    """Return the experts of these clusters, in the order of a rank's stacked members."""
    return [member.expert for c in clusters for member in members(assignment, {}, c)]


def collect(
    sharded: Sharded, parcel: Callable[[int], Sequence[Tensor]], volume: Callable[[int, int], int], like: Tensor
) -> dict[int, list[Tensor]]:
    """Return, for each layer of this rank, the flat tensors of every rank, by rank. One all-to-all.

    parcel(layer): this rank's tensors of a layer. volume(rank, layer): the number of their elements.
    """
    world, n_layers = sharded.world, sharded.transformer.model.layers
    mine = range(sharded.rank, n_layers, world)
    sent = [t.flatten() for rank in range(world) for layer in range(rank, n_layers, world) for t in parcel(layer)]
    buffer = torch.cat(sent) if sent else like.new_empty(0)
    if world > 1:
        send = [sum(volume(sharded.rank, i) for i in range(rank, n_layers, world)) for rank in range(world)]
        receive = [sum(volume(rank, i) for i in mine) for rank in range(world)]
        arrived = like.new_empty(sum(receive))
        dist.all_to_all_single(arrived, buffer, receive, send)
        buffer = arrived
    parts = iter(buffer.split([volume(rank, i) for rank in range(world) for i in mine]))
    out: dict[int, list[Tensor]] = {i: [] for i in mine}
    for _ in range(world):
        for i in mine:
            out[i].append(next(parts))
    return out
