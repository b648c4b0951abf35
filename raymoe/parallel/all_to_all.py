"""Expert-parallel dispatch: one row per (token, group) crosses to the group's owner, and its output returns.

The interface is that of `raymoe.model.dispatch.LocalDispatch`; this dispatcher adds the exchange. Every
rank takes part in every exchange, with zero rows if it has none. `M` is the number of rows that arrive.
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
    """Bytes that this process sends in all-to-alls, forward and backward, row counts included."""

    sent_bytes: int = 0
    waited_s: float = 0.0
    """Seconds in all-to-alls, mostly waits for other ranks. On a GPU only the launch is measured."""

    def take(self) -> int:
        """Return the bytes since the last call, and set bytes and seconds to zero."""
        sent, self.sent_bytes, self.waited_s = self.sent_bytes, 0, 0.0
        return sent


def _exchange(rows_N: Tensor, send: list[int], receive: list[int], meter: Meter) -> Tensor:
    """Exchange rows [Σ send, …], ordered by destination, for rows [Σ receive, …], ordered by source."""
    out_M = rows_N.new_empty(sum(receive), *rows_N.shape[1:])
    started = time.perf_counter()
    dist.all_to_all_single(out_M, rows_N.contiguous(), receive, send)
    meter.waited_s += time.perf_counter() - started
    n_sent = rows_N.shape[0] - send[dist.get_rank()]
    meter.sent_bytes += n_sent * rows_N[:1].numel() * rows_N.element_size() if rows_N.shape[0] else 0
    return out_M


class _Exchange(torch.autograd.Function):
    """The exchange. Its gradient is the exchange in the opposite direction."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, send: list[int], receive: list[int], meter: Meter) -> Tensor:
        ctx.layout = (send, receive, meter)
        return _exchange(rows_ND, send, receive, meter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        send, receive, meter = ctx.layout
        return _exchange(grads[0], receive, send, meter), None, None, None


class AllToAllDispatch:
    """A dispatcher for groups that `placement` assigns to ranks. Rows cross by `all_to_all_single`."""

    def __init__(self, placement: Placement, rank: int, meter: Meter) -> None:
        self.local_groups = placement.groups_of(rank)
        self.meter = meter
        serving = placement.serving(rank)
        # Rows are sent sorted by slot: by serving rank, then by that rank's order of its groups.
        self._groups_of = [placement.groups_of(r) for r in range(placement.world)]
        slots = [(r, g) for r, groups in enumerate(self._groups_of) for g in groups]
        slot_of = {pair: i for i, pair in enumerate(slots)}
        self._slot_G = torch.tensor([slot_of[r, g] for g, r in enumerate(serving)])
        self._n_slots = len(slots)
        self._slots_per_rank = [len(groups) for groups in self._groups_of]

    def __call__(self, x_TD: Tensor, group_TP: Tensor, compute: Compute) -> Tensor:
        tokens, per_token = group_TP.shape
        slot_N = self._slot_G.to(group_TP.device)[group_TP.flatten()]
        order_N, inverse_N, counts_S = sort_by(slot_N, self._n_slots)
        world, n_local = len(self._groups_of), len(self.local_groups)
        # incoming[r, g]: rows from rank r for local group g.
        incoming_Rg = _exchange(counts_S, self._slots_per_rank, [n_local] * world, self.meter).view(world, n_local)
        send = [sum(part.tolist()) for part in counts_S.split(self._slots_per_rank)]
        receive = incoming_Rg.sum(1).tolist()
        arrived_MD = _Exchange.apply(x_TD.index_select(0, order_N // per_token), send, receive, self.meter)
        # From (source, group) order to (group, source) order, so that the rows of a group are consecutive.
        group_M = torch.arange(n_local, device=x_TD.device).repeat(world).repeat_interleave(incoming_Rg.flatten())
        by_group_M, by_source_M, _ = sort_by(group_M, n_local)
        outputs_MD = compute(arrived_MD.index_select(0, by_group_M), incoming_Rg.sum(0).tolist())
        returned_ND = _Exchange.apply(outputs_MD.index_select(0, by_source_M), receive, send, self.meter)
        return returned_ND.index_select(0, inverse_N).view(tokens, per_token, x_TD.shape[1])
