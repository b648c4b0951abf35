"""Rows to the groups that serve them and back, when every group is in this process.

A group is what a router of the trunk chooses: a cluster, or an expert of the flat baseline. The
expert-parallel dispatcher (`raymoe.parallel.all_to_all`) has the same interface and adds the exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Compute = Callable[[Tensor, list[int]], Tensor]
"""Rows sorted by held group [n, D] and how many belong to each, to rows [n, D]."""


class Dispatch(Protocol):
    """Sends each row to its group's owner and returns the answers in the rows' order."""

    local_groups: tuple[int, ...]
    """Groups whose weights are in this process, in the order of `Compute`'s counts."""

    def __call__(self, rows: Tensor, group: Tensor, compute: Compute) -> Tensor:
        """rows [T, D], group [T, P] int64 -> [T, P, D]: for each row the answer of each of its P groups."""
        ...


def sort_by(key: Tensor, n_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """A stable order of `key` [n], its inverse, and how often each key occurs [n_keys]."""
    order = torch.argsort(key, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return order, inverse, torch.bincount(key, minlength=n_keys)


class LocalDispatch:
    """All groups are here."""

    def __init__(self, groups: int) -> None:
        self.local_groups = tuple(range(groups))

    def __call__(self, rows: Tensor, group: Tensor, compute: Compute) -> Tensor:
        tokens, per_token = group.shape
        order, inverse, counts = sort_by(group.flatten(), len(self.local_groups))
        answers = compute(rows.index_select(0, order // per_token), counts.tolist())
        return answers.index_select(0, inverse).view(tokens, per_token, rows.shape[1])
