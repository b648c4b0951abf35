"""Evaluation of a whole model on a text: perplexity by domain, load of clusters and experts, coactivation, speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymoe.data.corpus import Text
from raymoe.evaluation import Perplexity, load_cv, load_max_vio, load_variance, perplexity
from raymoe.model.experts import by_expert
from raymoe.model.observation import Loads, Observation
from raymoe.model.routing_sums import Measures, routing_measures
from raymoe.model.transformer import Transformer


@dataclass(frozen=True)
class Judgement:
    """Result of an evaluation."""

    domains: dict[str, Perplexity]
    clusters: np.ndarray
    """[L, C]: choices of each cluster by layer; empty for a model without clusters."""
    experts: np.ndarray
    """[L, E]: choices of each expert by layer; empty for a model without experts."""
    coactivation: np.ndarray
    """[L-1, C, C]: tokens that chose cluster a in a layer and cluster b in the next."""
    routing: Measures
    """Forced share, probability of the choices and entropy of each router (`routing_measures`)."""
    seconds: float

    @property
    def whole(self) -> Perplexity:
        """Perplexity of all domains together."""
        return Perplexity.merge(self.domains.values())


def judge(
    model: Transformer,
    texts: Mapping[str, Text],
    *,
    end_of_text: int,
    context: int | None = None,
    stride: int | None = None,
    batch: int = 16,
    precision: str = "float32",
    progress: Callable[[int], Any] | None = None,
) -> Judgement:
    """Predict every token of each domain's text once.

    `progress` receives the tokens scored since its last call. Raises ValueError for an empty text or a bad stride.
    """
    n_layers = model.model.layers
    n_clusters = model.model.n_clusters if model.model.experts == "clustered" else 0
    coactivation = np.zeros((n_layers - 1, n_clusters, n_clusters), dtype=np.int64)

    loads, routing_HLQ = Loads.zeros(model.model), Observation(model.model).routing_sums()

    def logits(tokens_BS: Tensor) -> Tensor:
        nonlocal loads, routing_HLQ
        seen = Observation(model.model, routing=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            out = model(tokens_BS, seen=seen)
        loads, routing_HLQ = loads + seen.loads(), routing_HLQ + seen.routing_sums()
        chosen = [choice_TP[:, 0] for choice_TP in seen.choices_TP]
        for layer, (a, b) in enumerate(pairwise(chosen)):
            pairs = torch.bincount(a * n_clusters + b, minlength=n_clusters**2)
            coactivation[layer] += pairs.view(n_clusters, n_clusters).numpy()
        return out

    started = time.perf_counter()
    domains = {
        domain: perplexity(
            logits, text.tokens, n_bytes=text.bytes, context=context or model.model.context, stride=stride,
            batch=batch, first=end_of_text, progress=progress, counted=text.counted,
        )
        for domain, text in texts.items()
    }  # fmt: skip
    seconds = time.perf_counter() - started
    experts = by_expert(loads.members_LM, model.model.n_experts)
    routing = routing_measures(routing_HLQ)
    return Judgement(domains, loads.clusters_LC.numpy(), experts.numpy(), coactivation, routing, seconds)


def load_measures(counts: np.ndarray) -> dict[str, float] | None:
    """Return the CV, MaxVio and variance of the load fraction, averaged over layers; None if `counts` is empty."""
    if not counts.size:
        return None
    return {"cv": load_cv(counts), "max_vio": load_max_vio(counts), "variance": load_variance(counts)}
