"""What goes into the engine and what comes out of it: plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from raymoe.serving.engine.sampling import LogProb, Sampling

Finish = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    max_tokens: int = 16
    """Of the answer. 0: only read the prompt."""
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None
    """How many of the most likely tokens to report with each; None: no log-probabilities."""
    echo: bool = False
    """Report the prompt too, with log-probabilities where they are asked for."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, and whose text is not part of it."""
    min_tokens: int = 0
    """Of the answer, before anything but `max_tokens` ends it: until then end-of-text is not chosen (unless it is
    ignored), and a stop token or a stop string is text like any other."""
    resumed: tuple[int, ...] = ()
    """The answer's tokens that another engine has made; their text is not given again."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer, at most."""
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Echo:
    text: str
    logprobs: tuple[LogProb | None, ...] | None
    """Of each token of the prompt; nothing precedes the first."""


@dataclass(frozen=True)
class Increment:
    """What a step adds to an answer."""

    request: int
    token: int | None
    text: str
    """What can be said for sure: a part of a character or of a stop string is held back."""
    usage: Usage
    logprob: LogProb | None = None
    echo: Echo | None = None
    """With the first increment."""
    finish: Finish | None = None
