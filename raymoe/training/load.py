"""How evenly a run's rows fall on clusters, experts and workers, and what happened since the last record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raymoe.model.experts import by_expert


@dataclass
class RoutingLoad:
    """Rows by cluster [L, C], by member [L, n·E] and by worker [L, ranks] since the last reading, over all ranks."""

    clusters: Tensor
    members: Tensor
    """Of experts, then of their ghosts where the model can have any."""
    workers: Tensor
    n_experts: int

    @property
    def experts(self) -> Tensor:
        """Rows by expert [L, E], a ghost's among its expert's."""
        return by_expert(self.members, self.n_experts)

    def __add__(self, other: RoutingLoad) -> RoutingLoad:
        return RoutingLoad(
            self.clusters + other.clusters, self.members + other.members, self.workers + other.workers, self.n_experts
        )

    def measures(self, of: Callable[[np.ndarray], float]) -> dict[str, float | None]:
        levels = {"experts": self.experts, "clusters": self.clusters, "workers": self.workers}
        return {name: of(counts.numpy()) if counts.numel() else None for name, counts in levels.items()}

    @staticmethod
    def shares(counts: Tensor) -> list[list[float]]:
        return (counts / counts.sum(-1, keepdim=True).clamp(min=1)).tolist() if counts.numel() else []


class Window:
    """What happened since the last train record."""

    def __init__(self) -> None:
        self.steps = self.tokens = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.norm = 0.0
        self.sent_bytes = 0.0
        self.compute_s = 0.0
        """Of this rank's own, between collectives."""
        self.grains = 0
        """That this rank had."""
        self.tokens_hash = 0
        self.load = RoutingLoad(torch.zeros(0), torch.zeros(0), torch.zeros(0), 1)

    def add(
        self,
        loss: float | None,
        norm: float,
        load: RoutingLoad,
        sent_bytes: float,
        tokens: int,
        seconds: float,
        tokens_hash: int,
    ) -> None:
        self.steps += 1
        self.tokens_hash += tokens_hash
        self.seconds += seconds
        self.tokens += tokens
        self.norm = norm
        self.sent_bytes += sent_bytes
        if loss is not None:
            self.losses.append(loss)
        first = self.steps == 1
        self.load = load if first else self.load + load

    @property
    def mean_loss(self) -> float:
        return sum(self.losses) / len(self.losses) if self.losses else float("nan")
