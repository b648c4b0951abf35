"""Conversion of engine increments to OpenAI responses: whole JSON objects and chunks of a stream."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raymoe.serving.engine.request import Increment, Request, Usage
from raymoe.serving.engine.sampling import LogProb
from raymoe.serving.engine.text import Detokenizer
from raymoe.serving.http.bodies import GenerationBody, StreamOptions
from raymoe.serving.http.prompts import Codec

MIN_LOGPROB = -9999.0
"""Smallest log-probability in a response. JSON has no infinity."""

STREAM_END = b"data: [DONE]\n\n"


def to_json(value: Any) -> bytes:
    """Encode as ASCII, so that every text of a client can be encoded."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def to_event(value: Mapping[str, Any]) -> bytes:
    """Encode as a server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


class Choice:
    """The part of one choice that the engine has produced so far."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.text: list[str] = []
        self.logprobs: dict[str, list[Any]] = {}
        self.usage: Usage | None = None
        self.finish: str | None = None
        self.detokenizer: Detokenizer | None = None
        self.characters = 0
        """Characters of the text that tokens have completed."""


class Reply(ABC):
    """The response to one HTTP request, built from the increments of its choices in any order.

    `add` and `whole` build one JSON object; `chunks` and `usage_chunk` build a stream.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, name: str, model: str, body: GenerationBody, requests: Sequence[Request], codec: Codec) -> None:
        self.requests, self.stream = requests, bool(body.stream)
        options = body.stream_options or StreamOptions()
        self.include_usage = bool(options.include_usage)
        self._continuous = self.include_usage and bool(options.continuous_usage_stats)
        self._head = {"id": f"{self.prefix}-{name}", "created": int(time.time()), "model": model}
        self._choices = [Choice(request) for request in requests]
        self._prompt_tokens = sum(len(request.prompt) for request in requests[:: body.n or 1])
        self._codec = codec

    @abstractmethod
    def _content(self, text: str) -> dict[str, Any]:
        """Return the fields that hold a choice's text in a whole response."""

    @abstractmethod
    def _delta(self, text: str) -> dict[str, Any]:
        """Return the fields that hold a choice's new text in a chunk."""

    @abstractmethod
    def _logprobs(self, choice: Choice, increment: Increment) -> dict[str, list[Any]]:
        """Return lists that continue the lists of earlier increments."""

    def _first(self, i: int) -> list[dict[str, Any]]:
        """Return chunks that precede the text of choice `i`."""
        return []

    def add(self, i: int, increment: Increment) -> None:
        """Append an increment to choice `i`, for `whole`."""
        choice = self._choices[i]
        choice.text.append(_text(increment))
        if choice.request.logprobs is not None:
            for key, values in self._logprobs(choice, increment).items():
                choice.logprobs.setdefault(key, []).extend(values)
        choice.usage, choice.finish = increment.usage, increment.finish

    def whole(self) -> dict[str, Any]:
        choices = [
            {"index": i, **self._content("".join(c.text)), "logprobs": c.logprobs or None, "finish_reason": c.finish}
            for i, c in enumerate(self._choices)
        ]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": self._usage()}

    def chunks(self, i: int, increment: Increment) -> list[dict[str, Any]]:
        """Return the stream's chunks for an increment of choice `i`."""
        choice = self._choices[i]
        first = self._first(i) if choice.usage is None else []
        choice.usage = increment.usage
        logprobs = self._logprobs(choice, increment) if choice.request.logprobs is not None else None
        chunks = [*first, self._chunk(i, self._delta(_text(increment)), logprobs, increment.finish)]
        if self._continuous:
            for chunk in chunks:
                chunk["usage"] = _usage([increment.usage], increment.usage.prompt_tokens)
        return chunks

    def _chunk(self, i: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": i, **delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "object": self.chunk_object, "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last chunk of a stream with `include_usage`."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        """Count a prompt once, regardless of its number of choices."""
        return _usage([choice.usage for choice in self._choices if choice.usage], self._prompt_tokens)


class CompletionReply(Reply):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _content

    def _logprobs(self, choice: Choice, increment: Increment) -> dict[str, list[Any]]:
        """`text_offset` is the number of characters before the characters that a token completes."""
        out: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        prompt, echo = choice.request.prompt, increment.echo
        if echo and echo.logprobs is not None:
            detokenizer, at = Detokenizer(self._codec.tokenizer), 0
            for token, logprob in zip(prompt, echo.logprobs, strict=True):
                self._entry(out, token, logprob, at)
                at += len(detokenizer.push(token))
            choice.characters = len(echo.text)
        if increment.token is not None:
            choice.detokenizer = choice.detokenizer or Detokenizer(self._codec.tokenizer, prompt)
            self._entry(out, increment.token, increment.logprob, choice.characters)
            choice.characters += len(choice.detokenizer.push(increment.token))
        return out

    def _entry(self, out: dict[str, list[Any]], token: int, logprob: LogProb | None, offset: int) -> None:
        out["tokens"].append(self._codec.text(token))
        out["text_offset"].append(offset)
        out["token_logprobs"].append(_finite(logprob.logprob) if logprob else None)
        out["top_logprobs"].append(self._top(logprob) if logprob else None)

    def _top(self, logprob: LogProb) -> dict[str, float]:
        """Return the best log-probability by text. Tokens that are parts of a character may share a text."""
        top: dict[str, float] = {}
        for token, value in ((logprob.token, logprob.logprob), *logprob.top):
            text = self._codec.text(token)
            top[text] = max(_finite(value), top.get(text, MIN_LOGPROB))
        return top


class ChatReply(Reply):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def _first(self, i: int) -> list[dict[str, Any]]:
        return [self._chunk(i, {"delta": {"role": "assistant", "content": ""}})]

    def _logprobs(self, choice: Choice, increment: Increment) -> dict[str, list[Any]]:
        logprob = increment.logprob
        if logprob is None:
            return {"content": []}
        top = [self._token(token, value) for token, value in logprob.top]
        return {"content": [{**self._token(logprob.token, logprob.logprob), "top_logprobs": top}]}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._codec.text(token), "logprob": _finite(logprob), "bytes": self._codec.bytes(token)}


def _text(increment: Increment) -> str:
    return (increment.echo.text if increment.echo else "") + increment.text


def _usage(usages: Iterable[Usage], prompt_tokens: int) -> dict[str, int]:
    """Add up the completion tokens of several choices, whose prompts have `prompt_tokens` in all."""
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "total_tokens": total, "completion_tokens": completion_tokens}


def _finite(logprob: float) -> float:
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB
