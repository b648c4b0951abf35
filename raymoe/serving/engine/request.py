"""The engine's input and output as plain values."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from raymoe.serving.engine.sampling import LogProb, Sampling

Finish = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    prompt: tuple[int, ...]
    """Token ids."""
    max_tokens: int = 16
    """Most tokens to generate. 0: only process the prompt."""
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None
    """Number of the most likely tokens to report at each position. None: no log-probabilities."""
    echo: bool = False
    """Report the prompt too, with log-probabilities if `logprobs` is set."""
    ignore_eos: bool = False
    """Treat the end-of-text token as any other token."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion. Their text is not part of it."""
    min_tokens: int = 0
    """Tokens before which only `max_tokens` ends the completion: end-of-text is not sampled (unless `ignore_eos`),
    and stop tokens and stop strings have no effect."""
    resumed: tuple[int, ...] = ()
    """Tokens that another engine has generated for this request. Their text is not reported again."""

    @property
    def length(self) -> int:
        """Most tokens of prompt and completion."""
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True)
class Usage:
    """Token counts of a request so far."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Echo:
    """The prompt as reported with `Request.echo`."""

    text: str
    logprobs: tuple[LogProb | None, ...] | None
    """One for each token of the prompt. The first has None: nothing precedes it."""


@dataclass(frozen=True)
class Increment:
    """What a step adds to a completion."""

    key: Hashable
    """The caller's key of the request."""
    token: int | None
    text: str
    """Text that later tokens cannot change: an incomplete character or stop string is held back."""
    usage: Usage
    logprob: LogProb | None = None
    echo: Echo | None = None
    """Only in the first increment."""
    finish: Finish | None = None
