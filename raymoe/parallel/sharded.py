"""One rank's shard of a model: the whole trunk, and the groups that its placement assigns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from raymoe.config import ModelSection
from raymoe.model.experts import Ghosts
from raymoe.model.transformer import Transformer
from raymoe.parallel.all_to_all import AllToAllDispatch, Meter
from raymoe.parallel.groups import Placement, placements


@dataclass
class Sharded:
    """A model shard of one rank."""

    transformer: Transformer
    rank: int
    world: int
    meter: Meter
    placements: list[Placement]
    """One per layer; empty for a dense model."""
    replicas: dist.ProcessGroup | None
    """The ranks that own the same groups as this rank; None if there are no others."""

    @property
    def primary(self) -> bool:
        """Whether this rank is the primary owner of its groups; each group has one."""
        return all(p.owners[g][0] == self.rank for p in self.placements for g in p.groups_of(self.rank))

    def owned(self) -> list[str]:
        """Return the logical keys that this rank writes: its groups if it is their primary, and its part of the trunk."""
        keys = [(key, index) for key, _, index, _ in self.transformer.slices()]
        trunk = [key for key, index in keys if index is None]
        groups = [key for key, index in keys if index is not None]
        return trunk[self.rank :: self.world] + (groups if self.primary else [])


def shard(model: ModelSection, assignment: Sequence[Sequence[int]], ghosts: Sequence[Ghosts] | None = None) -> Sharded:
    """Build this rank's model shard (uninitialized). Collective where groups have replicas."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    meter = Meter()
    if world == 1 or model.experts == "dense":
        return Sharded(Transformer(model, assignment, ghosts=ghosts), rank, world, meter, [], None)
    placed = placements(model, assignment, world)
    transformer = Transformer(model, assignment, [AllToAllDispatch(p, rank, meter) for p in placed], ghosts)
    n_groups = len(placed[0].owners)
    replicas: dist.ProcessGroup | None = None
    if world > n_groups:
        for slot in range(n_groups):  # new_group is collective over all ranks
            ranks = list(range(slot, world, n_groups))
            group = dist.new_group(ranks)
            if rank in ranks and len(ranks) > 1 and isinstance(group, dist.ProcessGroup):
                replicas = group
    return Sharded(transformer, rank, world, meter, placed, replicas)
