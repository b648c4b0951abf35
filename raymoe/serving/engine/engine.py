"""Continuous batching: requests join and leave the batch at every step.

A step has a budget of tokens. Each decoding request takes one token of it; requests in prefill share the rest evenly,
so that a long prompt does not delay the others. A request is admitted when the blocks of its whole length are free:
nothing is ever preempted. All methods belong to one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from tokenizers import Tokenizer
from torch import Tensor

from raymoe.config import check_field
from raymoe.data.tokens import END_OF_TEXT, vocabulary_size
from raymoe.serving.engine.kv_cache import KVCache
from raymoe.serving.engine.request import Echo, Finish, Increment, Request, Usage
from raymoe.serving.engine.sampling import Draw, LogProb, choose, logprobs
from raymoe.serving.engine.text import Detokenizer, StopStrings
from raymoe.serving.engine.trunk import Segment, Trunk


class QueueFull(Exception):
    """The queue has `max_queued` requests. Retry later, or on another engine."""


@dataclass(frozen=True)
class EngineSettings:
    kv_bytes: int = 256 << 20
    """Bytes of the KV cache."""
    block: int = 16
    """Tokens in a block of the KV cache."""
    max_running: int = 32
    """Requests in the batch, at most."""
    max_queued: int = 128
    """Requests in the queue, at most."""
    step_tokens: int = 128
    """Tokens of all requests in one step. More tokens process prompts faster and delay the other requests more."""

    def __post_init__(self) -> None:
        require = partial(check_field, self)
        for name in ("kv_bytes", "block", "max_running"):
            require(name, "must be greater than 0", getattr(self, name) > 0)
        require("max_queued", "must be 0 or more", self.max_queued >= 0)
        least = f"at least max_running={self.max_running}, a token for each"
        require("step_tokens", least, self.step_tokens >= self.max_running)


class _Running:
    """The state of an active request."""

    def __init__(self, key: Hashable, request: Request, tokenizer: Tokenizer) -> None:
        self.key, self.request = key, request
        self.tokens = [*request.prompt, *request.resumed]
        self.computed = 0
        """Tokens whose keys and values are in the cache."""
        self.detokenizer = Detokenizer(tokenizer, request.prompt)
        self.stops = StopStrings(request.sampling.stop)
        for i, token in enumerate(request.resumed):
            self._read(self.detokenizer.push(token), i + 1)
        self.prompt_logprobs: list[LogProb | None] = [None]
        self.echo = request.echo

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def completion(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def usage(self) -> Usage:
        prompt = len(self.request.prompt)
        return Usage(prompt, len(self.tokens) - prompt)

    @property
    def wants_prompt(self) -> bool:
        """Whether log-probabilities of prompt tokens remain to be computed."""
        return self.request.echo and self.request.logprobs is not None and self.computed < len(self.request.prompt) - 1

    def may_end(self, count: int) -> bool:
        """Whether something other than max_tokens may end the completion at its token number `count`."""
        return count > self.request.min_tokens

    def _read(self, text: str, count: int) -> str:
        """Return the text that can be released when `text` follows with token number `count`."""
        return self.stops.push(text) if self.may_end(count) else text

    def extend(self, token: int) -> str:
        """Append a token. Return the text that can be released."""
        self.tokens.append(token)
        return self._read(self.detokenizer.push(token), len(self.tokens) - len(self.request.prompt))

    def end_text(self) -> str:
        """Return all text that was held back."""
        return self._read(self.detokenizer.flush(), len(self.tokens) - len(self.request.prompt)) + self.stops.flush()


class Engine:
    """Generates the completions of many requests, a step at a time. Callers choose the requests' keys."""

    def __init__(self, trunk: Trunk, tokenizer: Tokenizer, settings: EngineSettings | None = None) -> None:
        self.trunk, self.tokenizer = trunk, tokenizer
        self.settings = settings or EngineSettings()
        self.cache = KVCache(trunk.model, self.settings.kv_bytes, trunk.dtype, self.settings.block)
        self.end = tokenizer.token_to_id(END_OF_TEXT)
        self.vocabulary = min(trunk.model.vocabulary, vocabulary_size(tokenizer))
        """Number of token ids. Larger ids pad the embedding: they are refused in requests and never sampled."""
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def keys(self) -> list[Hashable]:
        """Keys of all active requests: running, then waiting."""
        return [state.key for state in (*self._running, *self._waiting)]

    def submit(self, key: Hashable, request: Request) -> None:
        """Queue a request. Its increments carry `key`.

        Raises QueueFull, and ValueError for a request that can never be served or a key that is active.
        """
        if key in self.keys:
            raise ValueError(f"key {key!r} is active: wait until its request ends, or use another key")
        self._check(request)
        if self.waiting >= self.settings.max_queued and (self.waiting or not self._fits(request)):
            raise QueueFull(f"{self.running} requests are running and {self.waiting} are waiting")
        self._waiting.append(_Running(key, request, self.tokenizer))
        self._admit()

    def _check(self, request: Request) -> None:
        def require(valid: bool, message: str) -> None:
            if not valid:
                raise ValueError(message)

        biased = [token for token, _ in request.sampling.logit_bias]
        tokens = [*request.prompt, *request.resumed, *request.stop_token_ids, *biased]
        require(bool(request.prompt), "the prompt is empty: at least one token")
        bad = next((t for t in tokens if not 0 <= t < self.vocabulary), None)
        require(bad is None, f"token {bad} is not in the vocabulary of {self.vocabulary}")
        require(request.max_tokens >= 0, f"max_tokens={request.max_tokens} is not allowed: 0 or more")
        require(
            0 <= request.min_tokens <= request.max_tokens,
            f"min_tokens={request.min_tokens} is not allowed: 0 to max_tokens={request.max_tokens}",
        )
        require(
            not request.resumed or len(request.resumed) < request.max_tokens,
            f"max_tokens={request.max_tokens} leaves nothing to add to {len(request.resumed)} resumed tokens",
        )
        require(
            request.logprobs is None or request.logprobs >= 0, f"logprobs={request.logprobs} is not allowed: 0 or more"
        )
        limit = min(self.trunk.length, self.cache.capacity)
        require(
            request.length <= limit,
            f"a prompt of {len(request.prompt)} tokens and max_tokens={request.max_tokens} "
            f"make {request.length}: at most {limit}",
        )

    def cancel(self, key: Hashable) -> Increment | None:
        """End a request and free its blocks. Return its last increment, or None if no such request is active."""
        for place in (self._running, self._waiting):
            for state in place:
                if state.key == key:
                    if place is self._running:
                        self.cache.release(key)
                    place.remove(state)
                    self._admit()
                    return Increment(key, None, "", state.usage, finish="abort")
        return None

    def step(self) -> list[Increment]:
        """Compute one step. Return its increments in the order of admission; an empty list if there is no request.

        An exception of the clusters passes through and changes nothing: the step can be retried.
        """
        self._admit()
        if not self._running:
            return []
        segments, wanted, row = [], [], 0
        shares = self._shares()
        for state in self._running:
            n = shares[state.key]
            segments.append(Segment(state.key, state.computed, state.tokens[state.computed : state.computed + n]))
            if state.wants_prompt:
                wanted.append(range(row, row + n))
            else:
                wanted.append(range(row + n - 1, row + n) if n == state.pending else range(0))
            row += n
        rows = torch.tensor([row for span in wanted for row in span], dtype=torch.int64)
        logits = self.trunk(segments, self.cache, rows)
        parts = logits.split([len(span) for span in wanted])
        ready: list[tuple[_Running, Tensor]] = []
        for state, segment, part in zip(self._running, segments, parts, strict=True):
            if state.wants_prompt:
                self._read_prompt(state, part)
            state.computed += len(segment.tokens)
            if not state.pending:
                ready.append((state, part[-1]))
        increments = self._sample(ready) if ready else []
        ended = {increment.key for increment in increments if increment.finish}
        for key in ended:
            self.cache.release(key)
        self._running = [state for state in self._running if state.key not in ended]
        return increments

    def _fits(self, request: Request) -> bool:
        return self.running < self.settings.max_running and self.cache.fits(request.length)

    def _admit(self) -> None:
        """Admit requests in order of arrival. A request that waits for blocks blocks those behind it."""
        while self._waiting and self._fits(self._waiting[0].request):
            state = self._waiting.popleft()
            self.cache.allocate(state.key, state.request.length)
            self._running.append(state)

    def _shares(self) -> dict[Hashable, int]:
        """Return the tokens of each running request in the next step: an even share, at least one."""
        left, shares = self.settings.step_tokens, dict[Hashable, int]()
        order = sorted(self._running, key=lambda state: state.pending)
        for i, state in enumerate(order):
            shares[state.key] = min(state.pending, left // (len(order) - i))
            left -= shares[state.key]
        return shares

    def _read_prompt(self, state: _Running, logits_NV: Tensor) -> None:
        """Collect log-probabilities of the prompt tokens that follow the rows just computed."""
        following = state.request.prompt[state.computed + 1 : state.computed + 1 + logits_NV.shape[0]]
        top = [state.request.logprobs or 0] * len(following)
        state.prompt_logprobs += logprobs(logits_NV[: len(following)], torch.tensor(following), top, self.vocabulary)

    def _sample(self, ready: Sequence[tuple[_Running, Tensor]]) -> list[Increment]:
        """Sample the next token of each request whose tokens are all computed."""
        logits = torch.stack([last for _, last in ready])
        tokens = choose(logits, [self._draw(state) for state, _ in ready], self.vocabulary)
        reported = [i for i, (state, _) in enumerate(ready) if state.request.logprobs is not None]
        found: dict[int, LogProb] = {}
        if reported:
            top = [ready[i][0].request.logprobs or 0 for i in reported]
            chosen = logprobs(logits[reported], tokens[reported], top, self.vocabulary)
            found = dict(zip(reported, chosen, strict=True))
        return [
            self._extend(state, token, found.get(i))
            for i, ((state, _), token) in enumerate(zip(ready, tokens.tolist(), strict=True))
        ]

    def _draw(self, state: _Running) -> Draw:
        request, completion = state.request, state.completion
        early = not request.ignore_eos and not state.may_end(len(completion) + 1)
        return Draw(request.sampling, request.prompt, completion, banned=self.end if early else None)

    def _extend(self, state: _Running, token: int, logprob: LogProb | None) -> Increment:
        request, echo = state.request, self._echo(state)
        if request.max_tokens == 0:
            return Increment(state.key, None, "", state.usage, echo=echo, finish="length")
        finish: Finish | None = None
        count = len(state.completion) + 1
        ends = token in request.stop_token_ids or (token == self.end and not request.ignore_eos)
        if ends and state.may_end(count):
            state.tokens.append(token)
            finish, text = "stop", state.end_text()
        else:
            text = state.extend(token)
            if state.stops.found:
                finish = "stop"
            elif count >= request.max_tokens:
                finish, text = "length", text + state.end_text()
                finish = "stop" if state.stops.found else finish
        return Increment(state.key, token, text, state.usage, logprob, echo, finish)

    def _echo(self, state: _Running) -> Echo | None:
        if not state.echo:
            return None
        state.echo = False
        text = self.tokenizer.decode(list(state.request.prompt), skip_special_tokens=False)
        return Echo(text, tuple(state.prompt_logprobs) if state.request.logprobs is not None else None)
