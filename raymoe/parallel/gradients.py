"""Gradients over ranks: an all-reduce with SUM, and a clip by one norm that counts every weight once.

The loss is a sum divided by the global number of tokens, so the all-reduce is the gradient of the
whole batch for any world size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from raymoe.parallel.sharded import Sharded


class Gradients:
    """The gradients of a sharded model.

    The gradients of the trunk are views of one buffer, so their reduction is one collective without
    copies. The gradients of a group already contain the rows of every rank, because dispatch sends those
    rows to the owner; they are summed only over the replicas of the group.
    """

    def __init__(self, sharded: Sharded) -> None:
        self.sharded = sharded
        self.refresh()

    def refresh(self) -> None:
        """Collect the parameters again, after a remap replaced some."""
        sharded = self.sharded
        parameters = dict(sharded.transformer.named_parameters())
        stacked = {name for _, name, index, _ in sharded.transformer.slices() if index is not None}
        self.trunk = [p for name, p in parameters.items() if name not in stacked]
        self.experts = [p for name, p in parameters.items() if name in stacked]
        self.buffer = self.trunk[0].new_zeros(sum(p.numel() for p in self.trunk))

    def zero(self) -> None:
        """Set all gradients to zero."""
        self.buffer.zero_()
        start = 0
        for p in self.trunk:
            p.grad = self.buffer[start : start + p.numel()].view_as(p)
            start += p.numel()
        for p in self.experts:
            p.grad = None

    def _expert_grads(self) -> list[Tensor]:
        for p in self.experts:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.experts if p.grad is not None]

    def reduce(self) -> None:
        """Sum the trunk over all ranks and each group over its replicas. Collective."""
        if self.sharded.world == 1:
            return
        dist.all_reduce(self.buffer)
        if self.sharded.replicas is not None and self.experts:
            grads = self._expert_grads()
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat, group=self.sharded.replicas)
            for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(part.view_as(g))

    def clip(self, limit: float) -> float:
        """Scale all gradients to a global norm of at most `limit`; return the norm before. Collective.

        The norm counts the trunk once and each group once, regardless of replicas. A norm that is not
        finite scales nothing.
        """
        grads = self._expert_grads()
        square = torch.zeros((), dtype=torch.float64, device=self.buffer.device)
        if self.sharded.primary:
            for g in grads:
                square += torch.linalg.vector_norm(g).double() ** 2
        if self.sharded.world > 1:
            dist.all_reduce(square)
        square += torch.linalg.vector_norm(self.buffer).double() ** 2
        norm = square.sqrt().item()
        if limit < norm < float("inf"):
            for g in (self.buffer, *grads):
                g.mul_(limit / norm)
        return norm
