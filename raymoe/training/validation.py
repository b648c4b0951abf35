"""Validation during training: the loss by domain, and a probe on a few windows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raymoe.evaluation import load_cv, load_max_vio
from raymoe.model.loss import linear_cross_entropy
from raymoe.model.observation import Loads, Observation
from raymoe.model.transformer import Transformer
from raymoe.training.grains import Grains
from raymoe.training.load import RoutingLoad

PROBE_WINDOWS = 4
"""Windows of a probe: few, so that the three probes of a plan cost less than a step."""


@dataclass(frozen=True)
class Validation:
    """Result over all windows and ranks."""

    loss: float
    """Nats per token."""
    domains: dict[str, float | None]
    """Loss by domain; None for a domain without windows."""
    cluster_by_domain: list[list[list[float]]]
    """Tokens by layer, domain and cluster; empty for a model without clusters."""
    windows: int


@torch.no_grad()
def validate(model: Transformer, grains: Grains, limit: int | None) -> tuple[Validation, Loads, Tensor]:
    """Return the loss over `limit` evenly spread validation windows (None: all). Collective.

    Also return this rank's loads and its sums of routing [H, L, Q] over all windows.
    """
    corpus, section = grains.corpus, model.model
    domains = len(corpus.domains)
    sums = torch.zeros(domains, 2, dtype=torch.float64)
    serving = torch.zeros(section.layers, domains, section.n_clusters, dtype=torch.float64)
    loads, routing_HLQ = Loads.zeros(section), Observation(section).routing_sums()
    for _, batch in grains.validation(limit):
        seen = Observation(section, routing=True)
        inputs, targets = grains.tensors(batch)
        mask = torch.from_numpy(batch.mask).to(grains.device)
        with grains.autocast():
            hidden = model.hidden(inputs, seen=seen)
            for i, domain in enumerate(batch.domain.tolist()):
                counts = mask[i]
                nll = linear_cross_entropy(hidden[i][counts], model.head_weight, targets[i][counts])
                sums[domain] += torch.tensor([nll.item(), counts.sum().item()], dtype=torch.float64)
        loads, routing_HLQ = loads + seen.loads(), routing_HLQ + seen.routing_sums()
        for layer, choice_TP in enumerate(seen.choices_TP):
            domain_B = torch.from_numpy(batch.domain)
            serving[layer] += clusters_by_domain(choice_TP.cpu(), domain_B, mask.cpu(), domains, section.n_clusters)
    if grains.world > 1:
        both = torch.cat([sums.flatten(), serving.flatten()]).to(grains.device)
        dist.all_reduce(both)
        a, b = both.cpu().split([sums.numel(), serving.numel()])
        sums, serving = a.view_as(sums), b.view_as(serving)
    per_domain = [nll / count if count else None for nll, count in sums.tolist()]
    found = Validation(
        loss=(sums[:, 0].sum() / sums[:, 1].sum()).item(),
        domains=dict(zip(corpus.domains, per_domain, strict=True)),
        cluster_by_domain=serving.tolist() if section.experts == "clustered" else [],
        windows=corpus.validation_windows(section.context, limit),
    )
    return found, loads, routing_HLQ


def clusters_by_domain(choice_TP: Tensor, domain_B: Tensor, mask_BS: Tensor, n_domains: int, n_clusters: int) -> Tensor:
    """Count the clusters that the tokens in the mask are routed to: [domains, C] int64."""
    domain_N = domain_B[:, None].expand(mask_BS.shape)[mask_BS]
    pair_NP = domain_N[:, None] * n_clusters + choice_TP[mask_BS.flatten()]
    return torch.bincount(pair_NP.flatten(), minlength=n_domains * n_clusters).view(n_domains, n_clusters)


def validation_record(found: Validation, load: RoutingLoad) -> dict[str, Any]:
    """Return the fields of a validation record."""
    return {
        **vars(found),
        "perplexity": math.exp(min(found.loss, 700.0)),
        "load_cv": load.measures(load_cv),
        "load_max_vio": load.measures(load_max_vio),
    }


def probe(model: Transformer, grains: Grains) -> float:
    """Return the loss on the same PROBE_WINDOWS validation windows each time. Collective."""
    return validate(model, grains, PROBE_WINDOWS)[0].loss
