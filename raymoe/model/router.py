"""Routing: the choice of clusters and experts, their weights, and the biases that balance both.

Scores are float32 even under autocast. A selection bias is added to the logits for selection, so balancing
adds no gradient (paper section 3.2; auxiliary-loss-free balancing). Only the gate `biased` uses it in weights.
G is the number of groups that a router chooses from: C clusters or E experts. K is the number of
choices per row; at stage 1 the rest of the code calls it P.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymoe.config import ModelSection

Gate = Literal["all", "selected", "biased", "sigmoid"]
"""Weights of chosen groups. `all`, `selected`: the softmax of the logits over all groups, or over the chosen ones.
`biased`: the softmax over all groups of logits plus selection biases. `sigmoid`: of the logits, normalized over several
chosen groups."""


class Choice(NamedTuple):
    """The choice of a router for each row."""

    index_TK: Tensor
    """int64: the chosen groups, best first."""
    weight_TK: Tensor
    """float32: their weights, differentiable."""
    probability_TG: Tensor
    """float32: the softmax over all groups."""


def select(logits_TG: Tensor, bias_G: Tensor, k: int) -> Tensor:
    """Return the k groups of each row with the highest logits + bias: [T, k] int64, without gradient."""
    scores_TG = logits_TG.detach() + bias_G
    if k == 1:
        return scores_TG.argmax(-1, keepdim=True)
    return scores_TG.topk(k, dim=-1).indices


def route(
    x_TD: Tensor, weight_GD: Tensor, bias_G: Tensor, k: int, *, gate: Gate, fade_G: Tensor | None = None
) -> Choice:
    """Score rows against router rows, choose k groups per row and weight them by `gate`.

    `fade_G` is added to the logits, for weights too: a group with -inf takes no part.
    """
    with torch.autocast(x_TD.device.type, enabled=False):
        logits_TG = x_TD.to(weight_GD.dtype) @ weight_GD.t()
    if fade_G is not None:
        logits_TG = logits_TG + fade_G
    index_TK = select(logits_TG, bias_G, k)
    probability_TG = logits_TG.softmax(-1)
    return Choice(index_TK, _weights(logits_TG, probability_TG, bias_G, index_TK, gate), probability_TG)


def _weights(logits_TG: Tensor, probability_TG: Tensor, bias_G: Tensor, index_TK: Tensor, gate: Gate) -> Tensor:
    """Return the weights [T, K] of the chosen groups. A softmax over one choice would be constant: it is over all."""
    if gate == "biased":
        return (logits_TG + bias_G).softmax(-1).gather(-1, index_TK)
    if gate == "sigmoid":
        chosen_TK = logits_TG.gather(-1, index_TK)
        # The softmax of log sigmoid is sigmoid / sum, also where every sigmoid is 0 in float32.
        return F.logsigmoid(chosen_TK).softmax(-1) if index_TK.shape[-1] > 1 else chosen_TK.sigmoid()
    if gate == "selected" and index_TK.shape[-1] > 1:
        return logits_TG.gather(-1, index_TK).softmax(-1)
    return probability_TG.gather(-1, index_TK)


def joint_scores(
    x_TD: Tensor,
    cluster_weight_CD: Tensor,
    cluster_bias_C: Tensor,
    expert_weight_ED: Tensor,
    expert_bias_E: Tensor,
    cluster_E: Tensor,
) -> Tensor:
    """Return the scores [T, E] by which a row would select among the experts of all clusters.

    The score is ln p(cluster) + ln p(expert | cluster), up to a constant per row; both probabilities are softmaxes of
    logits plus selection biases. A logit of stage 2 alone is no score: the softmax of a cluster does not change when a
    constant is added to its members' logits, so the logits of two clusters have no common scale. The two logarithms have
    one: their sum is the probability of an expert in the two-stage choice. Biases are part of it, since they are part
    of the selection: without them, a few experts would take all rows.

    cluster_E: the cluster of each expert.
    """
    first_TC = x_TD.to(cluster_weight_CD.dtype) @ cluster_weight_CD.t() + cluster_bias_C
    second_TE = x_TD.to(expert_weight_ED.dtype) @ expert_weight_ED.t() + expert_bias_E
    member_CE = torch.arange(len(cluster_bias_C), device=cluster_E.device)[:, None] == cluster_E
    every_TC = second_TE[:, None].masked_fill(~member_CE, -torch.inf).logsumexp(-1)
    return second_TE + (first_TC - every_TC)[:, cluster_E]


def move_bias(bias_G: Tensor, counts_G: Tensor, rate: float, share_G: Tensor | None = None) -> None:
    """Move selection biases one step toward equal load, in place.

    bias_G: float32. counts_G: integers, summed over ranks and micro-batches. share_G: the wanted load of
    each group relative to an even load; ones by default. The step is proportional to the relative
    deficit and at most `rate` logits; the mean of the biases stays zero.
    """
    if counts_G.numel() < 2 or not counts_G.any():
        return
    share_G = torch.ones_like(counts_G, dtype=torch.float64) if share_G is None else share_G.double()
    mean = counts_G.double().sum() / share_G.sum()
    deficit_G = ((mean * share_G - counts_G.double()) / mean).clamp(-1.0, 1.0)
    bias_G += (rate * deficit_G).to(bias_G)
    bias_G -= bias_G.mean()


def auxiliary_loss(choice: Choice, n_groups: int) -> Tensor:
    """Return Switch's load loss, summed over rows: T · G · Σ_g f_g · P̄_g.

    f_g is the share of the choices that fall on group g, P̄_g its mean probability.
    """
    rows = choice.index_TK.shape[0]
    if rows == 0:
        return choice.probability_TG.sum()
    share_G = torch.bincount(choice.index_TK.flatten(), minlength=n_groups).to(choice.probability_TG.dtype)
    share_G = share_G / choice.index_TK.numel()
    return n_groups * (share_G * choice.probability_TG.sum(0)).sum()


def layer_gate(model: ModelSection) -> Gate:
    """Return the gate of a layer's first router: over clusters, or over flat experts (`model.gate`)."""
    if model.gate == "softmax":
        return "selected" if model.experts == "flat" else "all"
    return model.gate


class Router(nn.Module):
    """A linear router with a selection bias: stage 1 over clusters, or the flat router over experts."""

    bias: Tensor

    def __init__(self, d_model: int, n_groups: int, k: int, gate: Gate) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_groups, d_model))
        self.register_buffer("bias", torch.zeros(n_groups))
        self.k = k
        self.gate: Gate = gate

    def forward(self, x_TD: Tensor) -> Choice:
        return route(x_TD, self.weight, self.bias, self.k, gate=self.gate)
