"""Measurements between two train records, and the record made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from raymoe.evaluation import load_cv, load_max_vio
from raymoe.training.load import RoutingLoad, shares
from raymoe.training.step_report import all_reduce_sum, rank_and_world
from raymoe.training.stragglers import ratios


@dataclass
class Window:
    """Measurements since the last train record. All-reduced sums, except those of this rank."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """Losses of steps that were not skipped."""
    grad_norm: float = 0.0
    sent_bytes: float = 0.0
    tokens_hash: int = 0
    load: RoutingLoad | None = None
    compute_s: float = 0.0
    """Compute time of this rank, without collectives."""
    communication_s: float = 0.0
    """Time of this rank in collectives of training steps, with waits for other ranks. On a GPU, the time of launches."""
    grains: int = 0
    """Grains of this rank."""
    routing_HLQ: Tensor | None = None
    """Sums of routing in the last step, on this rank; None if that step did not observe them."""

    def add(
        self, *, loss: float, finite: bool, grad_norm: float, load: RoutingLoad, sent_bytes: float, tokens: int,
        seconds: float, tokens_hash: int,
    ) -> None:  # fmt: skip
        """Add one step."""
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds
        self.grad_norm = grad_norm
        self.sent_bytes += sent_bytes
        self.tokens_hash += tokens_hash
        self.load = load if self.load is None else self.load + load
        if finite:
            self.losses.append(loss)

    def add_routing(self, sums_HLQ: Tensor) -> None:
        """Add the sums of routing of one grain."""
        self.routing_HLQ = sums_HLQ if self.routing_HLQ is None else self.routing_HLQ + sums_HLQ

    @property
    def mean_loss(self) -> float:
        return sum(self.losses) / len(self.losses) if self.losses else math.nan

    def record(self, device: torch.device) -> dict[str, Any]:
        """Return the fields of a train record that this window measured. Collective."""
        assert self.load is not None
        own = (psutil.Process().memory_info().rss, self.compute_s, self.communication_s, self.grains)
        rss, compute, communication, grains = _by_worker(own, device)
        return {
            "loss": self.mean_loss,
            "grad_norm": self.grad_norm,
            "tokens_per_s": self.tokens / self.seconds,
            "step_ms": 1000 * self.seconds / self.steps,
            "load_cv": self.load.measures(load_cv),
            "load_max_vio": self.load.measures(load_max_vio),
            "a2a_bytes_per_token": self.sent_bytes / self.tokens,
            "tokens_hash": self.tokens_hash,
            "rss_mb": [round(b / 2**20, 1) for b in rss],
            "compute_ms": [round(1000 * s / self.steps, 3) for s in compute],
            "communication_ms": [round(1000 * s / self.steps, 3) for s in communication],
            "slowness": ratios(compute, grains),
            "load_experts": shares(self.load.experts),
            "load_clusters": shares(self.load.clusters),
        }


def _by_worker(own: Sequence[float], device: torch.device) -> list[list[float]]:
    """Return each of this rank's numbers as a list by rank. Collective."""
    rank, world = rank_and_world()
    numbers = torch.zeros(len(own), world, dtype=torch.float64)
    numbers[:, rank] = torch.tensor(own, dtype=torch.float64)
    return all_reduce_sum(numbers, device).tolist()
