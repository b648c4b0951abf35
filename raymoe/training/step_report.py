"""The report of each rank at a step, and the one all-reduce that sums reports and routing loads over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from raymoe.model.observation import Loads
from raymoe.training.load import RoutingLoad

SUMS = ("loss", "sent_bytes", "tokens_hash")
FLAGS = ("stop", "writing", "failed", "due", "requested")


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a rank reports at a step. Numbers add up over ranks; a flag is set when any rank sets it."""

    loss: float = 0.0
    """Sum over the rank's grains, in nats per token of the global batch."""
    sent_bytes: float = 0.0
    """Bytes that the rank sent to other ranks in the all-to-all."""
    tokens_hash: int = 0
    """Sum of the checksums of the rank's grains. It does not depend on the number of ranks."""
    stop: bool = False
    """Rank 0 found the run's `stop` file."""
    writing: bool = False
    """The rank has not finished its part of the checkpoint in progress."""
    failed: bool = False
    """The rank could not do its part of the checkpoint in progress."""
    due: bool = False
    """Rank 0: a checkpoint must start now to respect `checkpoint.max_loss_s`."""
    requested: bool = False
    """Rank 0: the driver requests a checkpoint before the next step."""
    plan: tuple[float, ...] = ()
    """Rank 0: an encoded plan that all ranks receive with this step. Zeros on other ranks."""

    def to_vector(self) -> Tensor:
        """Encode as float64 [8 + len(plan)]. Integers below 2^53 are exact."""
        numbers = [float(getattr(self, name)) for name in (*SUMS, *FLAGS)]
        return torch.tensor([*numbers, *self.plan], dtype=torch.float64)

    @classmethod
    def from_vector(cls, vector: Tensor) -> StepReport:
        """Decode a vector, or a sum of vectors, of `to_vector`."""
        values: Sequence[float] = vector.tolist()
        loss, sent_bytes, tokens_hash = values[: len(SUMS)]
        flags = {name: values[len(SUMS) + i] > 0 for i, name in enumerate(FLAGS)}
        plan = tuple(values[len(SUMS) + len(FLAGS) :])
        return cls(loss=loss, sent_bytes=sent_bytes, tokens_hash=int(tokens_hash), plan=plan, **flags)


def rank_and_world() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks: (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce_sum(values: Tensor, device: torch.device) -> Tensor:
    """Return the all-reduced sum of a float64 tensor, on the CPU. Collective."""
    if rank_and_world()[1] == 1:
        return values
    values = values.to(device)
    dist.all_reduce(values)
    return values.cpu()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on any rank. Collective."""
    return all_reduce_sum(torch.tensor(float(flag), dtype=torch.float64), device).item() > 0


def sync_stats(
    report: StepReport, loads: Loads, n_experts: int, device: torch.device
) -> tuple[RoutingLoad, StepReport]:
    """Return the all-reduced sums of a report and of the routing loads. Collective."""
    rank, world = rank_and_world()
    workers = torch.zeros(len(loads.rows_L), world, dtype=torch.float64)
    workers[:, rank] = loads.rows_L.double()
    parts = [report.to_vector(), loads.clusters_LC, loads.members_LM, workers]
    total = all_reduce_sum(torch.cat([part.double().flatten() for part in parts]), device)
    summed = total.split([part.numel() for part in parts])
    vector, *counts = (s.view(part.shape) for s, part in zip(summed, parts, strict=True))
    clusters, members, workers = counts
    return RoutingLoad(clusters, members, workers, n_experts), StepReport.from_vector(vector)
