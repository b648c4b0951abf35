"""Expert-parallel dispatch: one row per (token, group) to the group's owner, and its answer back.

The same interface as `raymoe.model.dispatch.LocalDispatch`, plus the exchange. Every rank takes part in
every exchange, with zero rows if it has none.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raymoe.model.dispatch import Compute, sort_by
from raymoe.parallel.groups import Placement


@dataclass
class Meter:
    """Bytes that left this process in all-to-alls, forward and backward, row counts included."""

    sent_bytes: int = 0
    waited_s: float = 0.0
    """Time in all-to-alls, most of which is waiting for others. On a GPU they are only begun in it."""

    def take(self) -> int:
        """Bytes since the last call; the time begins anew, too."""
        sent, self.sent_bytes, self.waited_s = self.sent_bytes, 0, 0.0
        return sent


def _exchange(rows: Tensor, send: list[int], receive: list[int], meter: Meter) -> Tensor:
    """rows [Σ send, …] in order of destination -> [Σ receive, …] in order of source."""
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    started = time.perf_counter()
    dist.all_to_all_single(out, rows.contiguous(), receive, send)
    meter.waited_s += time.perf_counter() - started
    stays = send[dist.get_rank()]
    meter.sent_bytes += (rows.shape[0] - stays) * rows[:1].numel() * rows.element_size() if rows.shape[0] else 0
    return out


class _Exchange(torch.autograd.Function):
    """The exchange, whose gradient is the exchange the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], meter: Meter) -> Tensor:
        ctx.layout = (send, receive, meter)
        return _exchange(rows, send, receive, meter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        send, receive, meter = ctx.layout
        return _exchange(grads[0], receive, send, meter), None, None, None


class AllToAllDispatch:
    """Groups live where `placement` says; rows cross by `all_to_all_single`."""

    def __init__(self, placement: Placement, rank: int, meter: Meter) -> None:
        self.local_groups = placement.groups_of(rank)
        self.meter = meter
        serving = placement.serving(rank)
        # Rows are sent sorted by slot: by serving rank, then by the order in which that rank holds its groups.
        self._held_by = [placement.groups_of(r) for r in range(placement.world)]
        slots = [(r, g) for r, groups in enumerate(self._held_by) for g in groups]
        slot_of = {pair: i for i, pair in enumerate(slots)}
        self._slot_of_group = torch.tensor([slot_of[r, g] for g, r in enumerate(serving)])
        self._n_slots = len(slots)
        self._slots_per_rank = [len(groups) for groups in self._held_by]

    def __call__(self, rows: Tensor, group: Tensor, compute: Compute) -> Tensor:
        tokens, per_token = group.shape
        order, inverse, counts = sort_by(self._slot_of_group.to(group.device)[group.flatten()], self._n_slots)
        world, held = len(self._held_by), len(self.local_groups)
        incoming = _exchange(counts, self._slots_per_rank, [held] * world, self.meter).view(world, held)
        send = [sum(part.tolist()) for part in counts.split(self._slots_per_rank)]
        receive = incoming.sum(1).tolist()
        arrived = _Exchange.apply(rows.index_select(0, order // per_token), send, receive, self.meter)
        # From (source, group) order to (group, source) order, so that each group's rows are consecutive.
        by_group, by_source, _ = sort_by(
            torch.arange(held, device=rows.device).repeat(world).repeat_interleave(incoming.flatten()), held
        )
        answers = compute(arrived.index_select(0, by_group), incoming.sum(0).tolist())
        returned = _Exchange.apply(answers.index_select(0, by_source), receive, send, self.meter)
        return returned.index_select(0, inverse).view(tokens, per_token, rows.shape[1])
