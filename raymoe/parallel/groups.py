"""Placement of groups (clusters, or experts of the flat baseline) on ranks. Pure integers.

Any world size works: fewer ranks than groups, more ranks, or a number that divides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from raymoe.config import ModelSection


@dataclass(frozen=True)
class Placement:
    """owners[g]: the ranks that own group g, the primary first. Every rank owns at least one group."""

    owners: tuple[tuple[int, ...], ...]
    world: int

    def groups_of(self, rank: int) -> tuple[int, ...]:
        """Return the groups that `rank` owns, ascending."""
        return tuple(g for g, ranks in enumerate(self.owners) if rank in ranks)

    def serving(self, source: int) -> tuple[int, ...]:
        """Return, for each group, the rank that serves rows of rank `source`: `source` if it owns the group, else a replica."""
        return tuple(source if source in ranks else ranks[source % len(ranks)] for ranks in self.owners)


def place(loads: Sequence[float], world: int) -> Placement:
    """Spread groups over ranks with equal numbers (within one) and similar loads per rank.

    loads: expected load of each group. With more ranks than groups, rank r is a replica for group
    slot r mod G; the heaviest groups take the slots with the most replicas. Deterministic.
    """
    if world < 1 or not loads:
        raise ValueError(f"cannot place {len(loads)} groups on {world} ranks: both must be at least 1")
    heaviest = sorted(range(len(loads)), key=lambda g: (-loads[g], g))
    owners: list[tuple[int, ...]] = [()] * len(loads)
    if world >= len(loads):
        for slot, g in enumerate(heaviest):
            owners[g] = tuple(range(slot, world, len(loads)))
        return Placement(tuple(owners), world)
    room = [len(loads) // world + (rank < len(loads) % world) for rank in range(world)]
    carried = [0.0] * world
    for g in heaviest:
        rank = min((r for r in range(world) if room[r]), key=lambda r: (carried[r], r))
        owners[g] = (rank,)
        room[rank] -= 1
        carried[rank] += loads[g]
    return Placement(tuple(owners), world)


WORTH_A_SWAP = 0.05
"""Smallest relative decrease of the heaviest rank's load for which two groups are swapped."""


def rebalance(placement: Placement, loads: Sequence[float], swaps: int = 1) -> Placement:
    """Swap at most `swaps` pairs of groups; each swap decreases the load of the heaviest rank.

    loads: load of each group. Ranks keep their numbers of groups and replicas. Deterministic.
    """
    owners = list(placement.owners)

    def heaviest() -> float:
        carried = [0.0] * placement.world
        for ranks, load in zip(owners, loads, strict=True):
            for rank in ranks:
                carried[rank] += load / len(ranks)
        return max(carried)

    for _ in range(swaps):
        now = heaviest()
        best, pair = now * (1 - WORTH_A_SWAP), None
        for a, b in combinations(range(len(owners)), 2):
            owners[a], owners[b] = owners[b], owners[a]
            if (then := heaviest()) < best:
                best, pair = then, (a, b)
            owners[a], owners[b] = owners[b], owners[a]
        if pair is None:
            break
        a, b = pair
        owners[a], owners[b] = owners[b], owners[a]
    return Placement(tuple(owners), placement.world)


def placements(model: ModelSection, assignment: Sequence[Sequence[int]], world: int) -> list[Placement]:
    """Return one placement per layer: clusters by their number of experts, flat experts evenly."""
    if model.experts != "clustered":
        return [place([1.0] * model.n_experts, world)] * model.layers
    return [place([float(row.count(c)) for c in range(model.n_clusters)], world) for row in map(list, assignment)]


def loads_by_rank(placed: Sequence[Placement], loads: np.ndarray) -> np.ndarray:
    """Convert loads by group [L, G] to loads by rank [L, world]; replicas share a group's load evenly."""
    if not loads.size:
        return np.zeros(0)
    ranks = np.zeros((len(placed), placed[0].world))
    for layer, placement in enumerate(placed):
        for group, owners in enumerate(placement.owners):
            ranks[layer, list(owners)] += loads[layer, group] / len(owners)
    return ranks
