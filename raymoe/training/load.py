"""Counts of rows by cluster, expert and worker, and their distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from raymoe.model.experts import by_expert


@dataclass
class RoutingLoad:
    """Rows by cluster [L, C], by member [L, n*E] and by worker [L, ranks], summed over ranks.

    A level that the model does not have is empty.
    """

    clusters: Tensor
    members: Tensor
    """Rows of the E experts, followed by those of their ghosts if the model can have ghosts."""
    workers: Tensor
    n_experts: int

    @property
    def experts(self) -> Tensor:
        """Rows by expert [L, E]. Rows of a ghost count for its expert."""
        return by_expert(self.members, self.n_experts) if self.members.numel() else self.members

    def __add__(self, other: RoutingLoad) -> RoutingLoad:
        """Return the sum by level. A model that was folded between the two has other levels, and other members."""
        same = self.members.shape == other.members.shape
        members = (self.members, other.members) if same else (self.experts, other.experts)
        return RoutingLoad(
            _sum(self.clusters, other.clusters), _sum(*members), _sum(self.workers, other.workers), other.n_experts
        )

    def measures(self, measure: Callable[[np.ndarray], float]) -> dict[str, float | None]:
        """Return `measure` of the rows of each level, None for an empty level."""
        levels = {"experts": self.experts, "clusters": self.clusters, "workers": self.workers}
        return {name: measure(counts.numpy()) if counts.numel() else None for name, counts in levels.items()}


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return a + b if a.numel() and b.numel() else a if a.numel() else b


def shares(counts: Tensor) -> list[list[float]]:
    """Return each count as a share of its layer's sum; an empty list for an empty level."""
    return (counts / counts.sum(-1, keepdim=True).clamp(min=1)).tolist() if counts.numel() else []
