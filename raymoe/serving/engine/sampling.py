"""From logits to a token, and from tokens to text that stops where it was asked to.

Everything about a token is a function of the logits, the request's tokens so far and (seed, position), so
that a request that goes on elsewhere goes on with the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from raymoe.config import check_field


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen. Raises ValueError with the field, the value and what is allowed."""

    temperature: float = 1.0
    """0: the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens. 0: all."""
    top_p: float = 1.0
    """Then the most likely ones that together reach this share of what is left. 0: the most likely token."""
    min_p: float = 0.0
    """Keep tokens at least this likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divides a positive logit, and multiplies a negative one, of tokens seen in prompt or answer."""
    frequency_penalty: float = 0.0
    """Taken off a logit for each time that its token is in the answer."""
    presence_penalty: float = 0.0
    """Taken off a logit when its token is in the answer."""
    seed: int = 0
    """64 bits; the caller draws one for each answer that should differ."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit after the penalties)."""

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
        require("stop", "texts that are not empty", all(self.stop))
        require(
            "logit_bias",
            "tokens, each once, with -100 to 100",
            all(token >= 0 and -100 <= bias <= 100 for token, bias in self.logit_bias)
            and len({token for token, _ in self.logit_bias}) == len(self.logit_bias),
        )

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is chosen."""
        return self.temperature == 0 or self.top_p == 0

    @property
    def cut(self) -> bool:
        """Whether not all tokens are eligible."""
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True)
class Draw:
    """One row of logits to choose a token from."""

    sampling: Sampling
    prompt: Sequence[int]
    answer: Sequence[int]
    banned: int | None = None
    """A token that must not be chosen."""

    @property
    def changed(self) -> bool:
        """Whether the choice is from other logits than the model's."""
        return self.sampling.penalised or bool(self.sampling.logit_bias) or self.banned is not None

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.answer)


def choose(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The next token of each row: [B] int64. Logits are float32 and not changed."""
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
    """Apply penalties, biases and the ban in place."""
    if draw.sampling.penalised:
        penalise(logits_V, draw)
    if draw.sampling.logit_bias:
        tokens, bias = zip(*draw.sampling.logit_bias, strict=True)
        logits_V[torch.tensor(tokens)] += torch.tensor(bias, dtype=logits_V.dtype)
    if draw.banned is not None:
        logits_V[draw.banned] = -torch.inf


def penalise(logits_V: Tensor, draw: Draw) -> None:
    """Apply the draw's penalties in place."""
    sampling = draw.sampling
    count = torch.bincount(torch.tensor(draw.answer, dtype=torch.int64), minlength=logits_V.shape[0])
    if sampling.repetition_penalty != 1:
        seen = count > 0
        seen[torch.tensor(draw.prompt, dtype=torch.int64)] = True
        scale = torch.where(logits_V > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
        logits_V *= torch.where(seen, scale, 1.0)
    logits_V -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)


def eligible(logits_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Weights [B, V] in proportion to which tokens are drawn, zero where they may not be.

    Temperature first, then min_p, top_k and top_p; tokens as likely as the last that fits are kept too.
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)[:, None]

    scaled = logits_BV / column([max(s.temperature, 1e-6) for s in samplings])
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp_()
    least = column([s.min_p for s in samplings])
    cut = [i for i, s in enumerate(samplings) if s.cut]
    if cut:
        least[cut] = torch.maximum(least[cut], _least(weights[cut], [samplings[i] for i in cut]))
    return torch.where(weights >= least, weights, 0.0)


CANDIDATES = 128
"""Tokens that are sorted first: enough for most cuts, and a tenth of the time of sorting a vocabulary."""


def _least(weights_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """The smallest weight [B, 1] that top_k and top_p keep; weights are relative to the largest."""
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
    """Uniform numbers in (0, 1) for some tokens [n] at a position: [n] float64. (SplitMix64's mixing function.)"""

    def mix(z: np.ndarray) -> np.ndarray:
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    key = mix(mix(np.array([seed], dtype=np.uint64)) ^ np.uint64(position))
    return ((mix(key ^ tokens.astype(np.uint64)) >> np.uint64(32)) + 0.5) / 2**32


def pick(weights_V: np.ndarray, seed: int, position: int) -> int:
    """A token, drawn in proportion to its weight.

    By a race (Gumbel's trick): every token has noise of its own, so that rounding, or a token that is only
    just eligible, changes nothing unless it is about to win.
    """
    tokens = weights_V.nonzero()[0]
    if not tokens.size:  # nothing was a number
        return int(weights_V.argmax())
    scores = weights_V[tokens] / -np.log(noise(seed, position, tokens))
    return int(tokens[scores.argmax()])


@dataclass(frozen=True)
class LogProb:
    """A token's log-probability by the model alone (before penalties, biases and temperature), beside the most likely ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprobs(logits_BV: Tensor, tokens_B: Tensor, top: Sequence[int]) -> list[LogProb]:
    """Of each row's token, with its `top` most likely tokens, best first."""
    table = logits_BV.log_softmax(-1)
    chosen = table.gather(-1, tokens_B[:, None]).squeeze(-1).tolist()
    most = min(max(top, default=0), table.shape[1])
    values, indices = (t.tolist() for t in table.topk(most))
    return [
        LogProb(token, value, tuple(zip(i[:n], v[:n], strict=True)))
        for token, value, n, i, v in zip(tokens_B.tolist(), chosen, top, indices, values, strict=True)
    ]


class Detokenizer:
    """Text token by token: what `push` and `flush` return joins to the text of all tokens.

    `context`: tokens before the first, whose text is not returned. A character whose bytes are not all
    there yet is held back.
    """

    WINDOW = 12
    """Tokens that are decoded again with each new one, at most about: a token's text depends on its neighbours."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._window = list(context[-self.WINDOW :])
        self._given = len(self._whole(self._decode(self._window)))

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    @staticmethod
    def _whole(text: str) -> str:
        """Without a last character that may be incomplete."""
        return text[:-1] if text.endswith("\ufffd") else text

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        whole = self._whole(text)
        new = whole[self._given :]
        self._given = max(self._given, len(whole))
        if len(self._window) > self.WINDOW:
            self._forget(text)
        return new

    def _forget(self, text: str) -> None:
        """Keep the last half of the window, unless that would change its text: the next token moves the cut."""
        rest = self._window[-self.WINDOW // 2 :]
        tail = self._decode(rest)
        dropped = len(text) - len(tail)
        if text.endswith(tail) and dropped <= self._given:
            self._window, self._given = rest, self._given - dropped

    def flush(self) -> str:
        """What was held back."""
        text = self._decode(self._window)
        new = text[self._given :]
        self._given = len(text)
        return new


class StopStrings:
    """Releases text until a stop string is found: all that precedes it, and never a part of it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found = False
        self._held = ""

    def push(self, text: str) -> str:
        """The text that can be released now that `text` follows."""
        text = self._held + text
        first = min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=-1)
        if first >= 0:
            self.found, self._held = True, ""
            return text[:first]
        held = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        held, self._held = self._held, ""
        return held
