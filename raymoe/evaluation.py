"""Measures of a model: perplexity and bits per byte from a function of tokens to logits, and balance of loads.

This module depends on neither models nor data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Perplexity


@dataclass(frozen=True)
class Perplexity:
    """The likelihood of a text, and the conditions of the measurement."""

    nll: float
    """Total negative log-likelihood, in nats."""
    tokens: int
    bytes: int
    """UTF-8 bytes of the text; 0 if unknown."""
    context: int
    """Largest number of tokens that condition a prediction."""
    stride: int
    """Tokens between the starts of two windows. Below `context` they overlap."""

    @property
    def loss(self) -> float:
        """Mean over tokens, in nats."""
        return self.nll / self.tokens

    @property
    def token_perplexity(self) -> float:
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """NLL in bits per UTF-8 byte of text: comparable between tokenizers. NaN if the size is unknown."""
        return self.nll / math.log(2) / self.bytes if self.bytes else math.nan

    @classmethod
    def merge(cls, parts: Iterable[Perplexity]) -> Perplexity:
        """Merge the results of several streams. Raises ValueError for none, or if context or stride differ."""
        parts = list(parts)
        if len({(part.context, part.stride) for part in parts}) != 1:
            raise ValueError(
                f"cannot merge {len(parts)} perplexities: give at least one, all of one context and stride"
            )
        nll = math.fsum(part.nll for part in parts)
        tokens = sum(part.tokens for part in parts)
        n_bytes = sum(part.bytes for part in parts) if all(part.bytes for part in parts) else 0
        return cls(nll, tokens, n_bytes, parts[0].context, parts[0].stride)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else x * math.inf  # beyond float64; NaN stays NaN


class Window(NamedTuple):
    """Targets [start, stop) of a stream, of which those from `first_scored` count."""

    start: int
    stop: int
    first_scored: int


def windows(n_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Cover a stream such that each token is scored once; the last window may be partial.

    A scored token has at least `context - stride` tokens of the stream before it in its window, except
    in the first window. Raises ValueError unless 1 <= stride <= context.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} is not allowed: between 1 and context={context}")
    scored = 0
    for start in range(0, n_tokens, stride):
        if scored == n_tokens:
            return
        stop = min(start + context, n_tokens)
        yield Window(start, stop, scored)
        scored = stop


@torch.no_grad()
def perplexity(
    logits: Callable[[Tensor], Tensor],
    stream: np.ndarray,
    *,
    n_bytes: int,
    context: int,
    first: int,
    stride: int | None = None,
    batch: int = 8,
    progress: Callable[[int], Any] | None = None,
    counted: np.ndarray | None = None,
) -> Perplexity:
    """Perplexity of `stream`, an array of token ids [N], under `logits`: int64 CPU tokens [B, S] -> [B, S, V].

    Every token of the stream is a target once; its first is predicted from `first`, the end-of-text id.
    counted [N]: not 0 for the targets that count; all by default. The others are read as context only.
    n_bytes: UTF-8 bytes of the text that counts, 0 if unknown. `stride` defaults to `context`. Log-softmax in float32,
    sums in float64. `progress` is called with the number of tokens scored since its last call. Raises ValueError for a
    stream without a target that counts, or a bad stride.
    """
    if not len(stream):
        raise ValueError("cannot measure perplexity on an empty stream: give a text of at least one token")
    stride = context if stride is None else stride
    counted = np.ones(len(stream), dtype=bool) if counted is None else counted.astype(bool)
    if not counted.any():
        raise ValueError("cannot measure perplexity without a target that counts: give a text with answers")
    nll = 0.0
    # Only windows of equal length share a batch, so that nothing is padded.
    for length, equal in groupby(windows(len(stream), context, stride), lambda window: window.stop - window.start):
        while part := list(islice(equal, batch)):
            at_BS = np.array([window.start for window in part])[:, None] + np.arange(length)
            scored_BS = at_BS >= np.array([window.first_scored for window in part])[:, None]
            inputs_BS = np.where(at_BS == 0, first, stream[at_BS - 1].astype(np.int64))
            out_BSV = logits(torch.from_numpy(inputs_BS))
            targets_BS = torch.from_numpy(stream[at_BS].astype(np.int64)).to(out_BSV.device)
            nll_T = F.cross_entropy(out_BSV.float().flatten(0, 1), targets_BS.flatten(), reduction="none")
            counted_T = torch.from_numpy(scored_BS & counted[at_BS]).flatten()
            nll += nll_T.cpu()[counted_T].double().sum().item()
            if progress:
                progress(int(scored_BS.sum()))
    return Perplexity(nll, int(counted.sum()), n_bytes, context, stride)


# Load: counts [groups] of one layer, or [layers, groups] to average over layers. A layer without load counts as 0.


def load_cv(counts: np.ndarray) -> float:
    """Coefficient of variation: population std / mean."""
    return _over_layers(counts, lambda share: share.std() * share.size)


def load_max_vio(counts: np.ndarray) -> float:
    """Maximum violation: max / mean - 1."""
    return _over_layers(counts, lambda share: share.max() * share.size - 1)


def load_variance(counts: np.ndarray) -> float:
    """Variance of the fraction of the load."""
    return _over_layers(counts, lambda share: share.var())


def _over_layers(counts: np.ndarray, measure: Callable[[np.ndarray], float]) -> float:
    """Mean over layers of a measure of the shares of load, whose mean is 1 / groups."""
    layers = np.atleast_2d(np.asarray(counts, dtype=np.float64))
    return float(np.mean([measure(layer / layer.sum()) if layer.sum() else 0.0 for layer in layers]))
