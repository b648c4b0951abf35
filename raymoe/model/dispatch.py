"""Dispatch of rows to their groups and back, where every group is in this process.

A group is what a trunk router chooses: a cluster, or an expert of the flat baseline. The
expert-parallel dispatcher (`raymoe.parallel.all_to_all`) has the same interface and adds the exchange.
`P` is the number of groups per token, `N` = T·P the number of (row, group) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Compute = Callable[[Tensor, list[int]], Tensor]
"""Rows [N, D] sorted by local group and the number of rows of each group -> rows [N, D]."""


class Dispatch(Protocol):
    """Sends each row to the owners of its groups and returns the outputs in the order of the rows."""

    local_groups: tuple[int, ...]
    """Groups whose weights are in this process, in the order of the counts of `Compute`."""

    def __call__(self, x_TD: Tensor, group_TP: Tensor, compute: Compute) -> Tensor:
        """Return [T, P, D]: for each row the output of each of its groups (group_TP: int64)."""
        ...


def sort_by(key_N: Tensor, n_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a stable order of the keys [N], its inverse [N], and the count of each key [n_keys]."""
    order_N = torch.argsort(key_N, stable=True)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return order_N, inverse_N, torch.bincount(key_N, minlength=n_keys)


class LocalDispatch:
    """A dispatcher for which all groups are local."""

    def __init__(self, n_groups: int) -> None:
        self.local_groups = tuple(range(n_groups))

    def __call__(self, x_TD: Tensor, group_TP: Tensor, compute: Compute) -> Tensor:
        tokens, per_token = group_TP.shape
        order_N, inverse_N, counts_G = sort_by(group_TP.flatten(), len(self.local_groups))
        outputs_ND = compute(x_TD.index_select(0, order_N // per_token), counts_G.tolist())
        return outputs_ND.index_select(0, inverse_N).view(tokens, per_token, x_TD.shape[1])
