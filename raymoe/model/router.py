"""Routing: which cluster, which experts, with what weight, and the biases that keep both balanced.

Scores are float32 even under autocast. A selection bias is added to the logits when choosing and
never to the weights, so balancing adds no gradient (paper section 3.2; auxiliary-loss-free balancing).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Choice(NamedTuple):
    """What a router chose for each row."""

    index: Tensor
    """[rows, k] int64: the chosen groups, best first."""
    weight: Tensor
    """[rows, k] float32: their weights, differentiable."""
    probability: Tensor
    """[rows, groups] float32: the softmax over all groups."""


def select(logits: Tensor, bias: Tensor, k: int) -> Tensor:
    """The k groups of each row with the highest logits + bias: [rows, k] int64, without gradient."""
    scores = logits.detach() + bias
    if k == 1:
        return scores.argmax(-1, keepdim=True)
    return scores.topk(k, dim=-1).indices


def route(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, *, over_selected: bool, fade: Tensor | None = None
) -> Choice:
    """Score rows against router rows and choose k.

    x [rows, D], weight [groups, D], bias [groups]. The weight of a chosen group is its softmax over
    the k selected (`over_selected`), or over all groups. With k=1 it is always over all: a softmax
    over one choice is constant and would leave the router without a gradient. `fade` [groups] is added
    to the logits, for weights too: a group with -inf has no part in anything.
    """
    with torch.autocast(x.device.type, enabled=False):
        logits = x.to(weight.dtype) @ weight.t()
    if fade is not None:
        logits = logits + fade
    index = select(logits, bias, k)
    probability = logits.softmax(-1)
    chosen = logits.gather(-1, index).softmax(-1) if over_selected and k > 1 else probability.gather(-1, index)
    return Choice(index, chosen, probability)


def move_bias(bias: Tensor, counts: Tensor, rate: float, share: Tensor | None = None) -> None:
    """Move selection biases one step towards equal load, in place.

    bias [groups] float32; counts [groups] integers summed over ranks and micro-batches. The step is
    in proportion to the relative deficit, at most `rate` logits, and the biases' mean stays zero.
    `share` [groups]: parts of an even load that are wanted instead.
    """
    if counts.numel() < 2 or not counts.any():
        return
    share = torch.ones_like(counts, dtype=torch.float64) if share is None else share.double()
    mean = counts.double().sum() / share.sum()
    deficit = ((mean * share - counts.double()) / mean).clamp(-1.0, 1.0)
    bias += (rate * deficit).to(bias)
    bias -= bias.mean()


def auxiliary_loss(choice: Choice, groups: int) -> Tensor:
    """Switch's load loss, summed over rows: rows · E · Σ_e f_e · P̄_e (f: share of choices, P̄: mean probability)."""
    rows = choice.index.shape[0]
    if rows == 0:
        return choice.probability.sum()
    share = torch.bincount(choice.index.flatten(), minlength=groups).to(choice.probability.dtype)
    share = share / choice.index.numel()
    return groups * (share * choice.probability.sum(0)).sum()


class Router(nn.Module):
    """A linear router with a selection bias over `groups`: stage 1 over clusters, or the flat router over experts."""

    bias: Tensor

    def __init__(self, d_model: int, groups: int, k: int, *, over_selected: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, d_model))
        self.register_buffer("bias", torch.zeros(groups))
        self.k = k
        self.over_selected = over_selected

    def forward(self, x_TD: Tensor) -> Choice:
        return route(x_TD, self.weight, self.bias, self.k, over_selected=self.over_selected)
