"""From logits to a token.

A token is a function of the logits, the request's tokens so far and (seed, position): a request that continues in
another process continues with the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from raymoe.config import check_field


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a request. Raises ValueError with the field, its value and the allowed values."""

    temperature: float = 1.0
    """0: the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens. 0: all."""
    top_p: float = 1.0
    """Then keep the most likely tokens that together reach this share of the remaining mass. 0: the most likely token."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the probability of the most likely token."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens in the prompt or completion."""
    frequency_penalty: float = 0.0
    """Subtracted from a logit for each occurrence of its token in the completion."""
    presence_penalty: float = 0.0
    """Subtracted from a logit if its token is in the completion."""
    seed: int = 0
    """64 bits. Completions of one prompt differ by their seed."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion and are not part of it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, bias): added to the logit after the penalties."""

    def __post_init__(self) -> None:
        require = partial(check_field, self)
        require("temperature", "0 to 100", 0 <= self.temperature <= 100)
        require("top_k", "0 (all) or more", self.top_k >= 0)
        require("top_p", "0 to 1", 0 <= self.top_p <= 1)
        require("min_p", "0 to 1", 0 <= self.min_p <= 1)
        require("repetition_penalty", "0.01 to 100", 0.01 <= self.repetition_penalty <= 100)
        require("frequency_penalty", "-2 to 2", -2 <= self.frequency_penalty <= 2)
        require("presence_penalty", "-2 to 2", -2 <= self.presence_penalty <= 2)
        require("seed", "0 to 2^64-1", 0 <= self.seed < 2**64)
        require("stop", "non-empty strings", all(self.stop))
        require(
            "logit_bias",
            "tokens, each once, with -100 to 100",
            all(token >= 0 and -100 <= bias <= 100 for token, bias in self.logit_bias)
            and len({token for token, _ in self.logit_bias}) == len(self.logit_bias),
        )

    @property
    def penalized(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is chosen."""
        return self.temperature == 0 or self.top_p == 0

    @property
    def truncated(self) -> bool:
        """Whether top_k or top_p excludes tokens."""
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True)
class Draw:
    """Parameters and tokens of the request behind one row of logits."""

    sampling: Sampling
    prompt: Sequence[int]
    completion: Sequence[int]
    banned: int | None = None
    """A token that is excluded."""

    @property
    def changed(self) -> bool:
        """Whether the logits are modified before the choice."""
        return self.sampling.penalized or bool(self.sampling.logit_bias) or self.banned is not None

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.completion)


def choose(logits_BV: Tensor, draws: Sequence[Draw], vocabulary: int | None = None) -> Tensor:
    """Return the next token of each row, [B] int64. logits_BV: float32, not modified.

    vocabulary: number of tokens of the tokenizer; ids beyond it pad the embedding and are never chosen.
    """
    logits_BV = logits_BV[:, :vocabulary]
    changed = [i for i, draw in enumerate(draws) if draw.changed]
    if changed:
        logits_BV = logits_BV.clone()
        for i in changed:
            change(logits_BV[i], draws[i])
    tokens = logits_BV.argmax(-1)
    random = [i for i, draw in enumerate(draws) if not draw.sampling.greedy]
    if random:
        chosen = [draws[i] for i in random]
        weights = eligible(logits_BV[random], [draw.sampling for draw in chosen]).numpy()
        tokens[random] = torch.tensor(
            [pick(row, draw.sampling.seed, draw.position) for row, draw in zip(weights, chosen, strict=True)]
        )
    return tokens


def change(logits_V: Tensor, draw: Draw) -> None:
    """Apply penalties, biases and the excluded token in place."""
    if draw.sampling.penalized:
        penalize(logits_V, draw)
    if draw.sampling.logit_bias:
        tokens, bias = zip(*draw.sampling.logit_bias, strict=True)
        logits_V[torch.tensor(tokens)] += torch.tensor(bias, dtype=logits_V.dtype)
    if draw.banned is not None:
        logits_V[draw.banned] = -torch.inf


def penalize(logits_V: Tensor, draw: Draw) -> None:
    """Apply the penalties in place."""
    sampling = draw.sampling
    count = torch.bincount(torch.tensor(draw.completion, dtype=torch.int64), minlength=logits_V.shape[0])
    if sampling.repetition_penalty != 1:
        seen = count > 0
        seen[torch.tensor(draw.prompt, dtype=torch.int64)] = True
        scale = torch.where(logits_V > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
        logits_V *= torch.where(seen, scale, 1.0)
    logits_V -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)


def eligible(logits_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Return sampling weights [B, V], zero for excluded tokens.

    Temperature first, then min_p, top_k and top_p. Tokens as likely as the last kept token are kept too.
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)[:, None]

    scaled = logits_BV / column([max(s.temperature, 1e-6) for s in samplings])
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp_()
    least = column([s.min_p for s in samplings])
    rows = [i for i, s in enumerate(samplings) if s.truncated]
    if rows:
        least[rows] = torch.maximum(least[rows], _least(weights[rows], [samplings[i] for i in rows]))
    return torch.where(weights >= least, weights, 0.0)


CANDIDATES = 128
"""Tokens that are sorted first: sufficient in most cases, in a tenth of the time of sorting the vocabulary."""


def _least(weights_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Return the smallest weight [B, 1] that top_k and top_p keep. Weights are relative to the largest."""
    vocabulary = weights_BV.shape[1]
    k = torch.tensor([min(s.top_k or vocabulary, vocabulary) for s in samplings])[:, None]
    p = torch.tensor([s.top_p for s in samplings], dtype=torch.float64)[:, None]
    floor = torch.tensor([s.min_p for s in samplings])[:, None]
    whole = torch.where(weights_BV >= floor, weights_BV, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    for width in (min(CANDIDATES, vocabulary), vocabulary):
        best = weights_BV.topk(width).values
        allowed = torch.where((torch.arange(width) < k) & (best >= floor), best, 0.0).double()
        mass = torch.where(k < vocabulary, allowed.sum(-1, keepdim=True), whole)
        kept = (allowed > 0) & (allowed.cumsum(-1) - allowed < p * mass)
        if ((k <= width) | ((k == vocabulary) & ~kept[:, -1:])).all():
            break
    return best.gather(-1, kept.sum(-1, keepdim=True) - 1)


def noise(seed: int, position: int, tokens: np.ndarray) -> np.ndarray:
    """Return uniform numbers in (0, 1) for tokens [n] at a position, [n] float64 (SplitMix64's mixing function)."""

    def mix(z: np.ndarray) -> np.ndarray:
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    key = mix(mix(np.array([seed], dtype=np.uint64)) ^ np.uint64(position))
    return ((mix(key ^ tokens.astype(np.uint64)) >> np.uint64(32)) + 0.5) / 2**32


def pick(weights_V: np.ndarray, seed: int, position: int) -> int:
    """Draw a token in proportion to its weight, by the Gumbel-max trick.

    Each token has its own noise: rounding, or a token at the edge of eligibility, changes the result only if that
    token is about to be drawn.
    """
    tokens = weights_V.nonzero()[0]
    if not tokens.size:  # all weights are NaN
        return int(weights_V.argmax())
    scores = weights_V[tokens] / -np.log(noise(seed, position, tokens))
    return int(tokens[scores.argmax()])


@dataclass(frozen=True)
class LogProb:
    """Log-probability of a token and of the most likely tokens, before penalties, biases and temperature."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprobs(logits_BV: Tensor, tokens_B: Tensor, top: Sequence[int], vocabulary: int | None = None) -> list[LogProb]:
    """Return the log-probability of each row's token and of its `top` most likely tokens, best first.

    vocabulary: number of tokens of the tokenizer; the most likely tokens are among these.
    """
    table = logits_BV.log_softmax(-1)
    chosen = table.gather(-1, tokens_B[:, None]).squeeze(-1).tolist()
    table = table[:, :vocabulary]
    most = min(max(top, default=0), table.shape[1])
    values, indices = (t.tolist() for t in table.topk(most))
    return [
        LogProb(token, value, tuple(zip(i[:n], v[:n], strict=True)))
        for token, value, n, i, v in zip(tokens_B.tolist(), chosen, top, indices, values, strict=True)
    ]
