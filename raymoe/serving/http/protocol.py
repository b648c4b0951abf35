"""The OpenAI shapes: what clients send becomes requests, and what the engine gives becomes what they read.

Neither HTTP nor waiting is here. Fields have the names and defaults of OpenAI and vLLM; null is the default
everywhere, and a field that nobody here knows is ignored.
"""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Tokenizer, decoders

from raymoe.data.tokens import END_OF_TEXT
from raymoe.serving.engine.request import Increment, Request, Usage
from raymoe.serving.engine.sampling import Detokenizer, LogProb, Sampling

STOPS = 16
"""Stop strings of a request, at most."""
STOP_CHARACTERS = 256
"""Of a stop string, at most: every token is compared with all of its beginnings."""
TOP_LOGPROBS = 20
"""Alternatives reported with each token, at most."""
LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""

DEFAULT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
"""For a model that has not been taught to chat."""

UNSUPPORTED = (
    "allowed_token_ids", "audio", "bad_words", "chat_template", "continue_final_message", "documents", "functions",
    "guided_choice", "guided_grammar", "guided_json", "guided_regex", "prompt_embeds", "structured_outputs",
    "suffix", "tools", "use_beam_search",
)  # fmt: skip
"""Fields that would change the answer, and are refused rather than ignored unless they are empty."""


class BadRequest(ValueError):
    """What a client has to change, and what the error's body says beside it."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        code: str | None = None,
        status: int = 400,
        reason: str = "malformed",
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status
        self.reason = reason
        """One of `metrics.REJECTIONS`."""


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def to_json(value: Any) -> bytes:
    """ASCII alone, so that no text of a client's can fail to be encoded."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def event(value: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


# What clients send

B = TypeVar("B", bound=BaseModel)
Small = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Small], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Options(_Body):
    """What completions and chat have in common."""

    n: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_tokens: Small | None = None
    stop: str | Texts | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """-1 and 0: all."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop_token_ids: Ids | None = None
    min_tokens: Small | None = None
    ignore_eos: bool | None = None


class CompletionBody(Options):
    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)] | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None


class Part(BaseModel):
    model_config = ConfigDict(strict=True)

    type: str
    text: str | None = None


class Message(BaseModel):
    model_config = ConfigDict(strict=True)

    role: str
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    tool_calls: Any = None


Messages = Annotated[list[Message], Field(fail_fast=True)]


class ChatBody(Options):
    messages: Messages
    max_completion_tokens: Small | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    response_format: Any = None


class TokenizeBody(_Body):
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """null: no, as prompts are read."""


class DetokenizeBody(_Body):
    tokens: Ids


UNIONS = {
    "prompt": "a text, a list of texts, a list of token ids or a list of such lists",
    "stop": "a text or a list of texts",
    "content": "a text or a list of parts",
}
"""What fields are that may be several things."""


def parse(content: bytes, kind: type[B]) -> B:
    """The JSON of a request's body. Raises BadRequest."""
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = [str(step) for step in first["loc"]]
        union = next((name for name in UNIONS if name in where[:-1]), None)
        if first["type"] == "json_invalid" or not where:
            raise BadRequest(f"The body is not a JSON object that can be read: {first['msg']}") from None
        what = f"must be {UNIONS[union]}" if union else first["msg"]
        named = where[: where.index(union) + 1] if union else where
        raise BadRequest(f"{'.'.join(named)}: {what}", where[0]) from None
    for name in UNSUPPORTED:
        if (body.model_extra or {}).get(name):
            raise BadRequest(f"{name} is not supported", name)
    return body


# Tokens


class Codec:
    """The tokenizer as the API needs it: texts to tokens, and what a single token is to a reader."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        end = tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            raise ValueError(f"the tokenizer has no {END_OF_TEXT}")
        self.end: int = end
        self._longest = max(len(token.encode()) for token in tokenizer.get_vocab())
        self._alphabet = _byte_alphabet() if isinstance(tokenizer.decoder, decoders.ByteLevel) else {}
        self._texts: dict[int, str] = {}

    def encode(self, text: str, special: bool = False) -> list[int]:
        """As training reads texts, unless `special`: without tokens that the tokenizer would put around it."""
        return self.tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids

    def check(self, text: str, length: int, param: str) -> None:
        """Raises BadRequest for a text that is certainly of more than `length` tokens: to count them takes long."""
        least = len(text.encode()) // self._longest
        if least > length:
            raise _too_long(length, f"{param} has at least {least} tokens", param)

    def text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token], skip_special_tokens=False)
        return self._texts[token]

    def bytes(self, token: int) -> list[int]:
        """A character may need those of several tokens."""
        try:
            return [self._alphabet[character] for character in self.tokenizer.id_to_token(token) or ""]
        except KeyError:
            return list(self.text(token).encode())


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE spells bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(other)}


# Requests


def completion_requests(body: CompletionBody, codec: Codec, length: int, most: int) -> list[Request]:
    """A request for each answer, prompt by prompt. `length`: tokens of prompt and answer; `most`: answers.

    The answers to one prompt differ by their seeds, and none depends on the prompts beside it. Raises BadRequest.
    """
    n = body.n or 1
    _check(body, n)
    if body.best_of is not None and body.best_of != n:
        raise BadRequest(f"best_of={body.best_of} is not supported: must be n={n}", "best_of")
    given = body.prompt
    if not given:
        raise BadRequest(f"prompt is empty: give at least one token ([{codec.end}] is where a text begins)", "prompt")
    prompts: list[Any] = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    _bound(len(prompts), n, most)
    requests: list[Request] = []
    for prompt in prompts:
        tokens = _tokens(prompt, codec, length)
        max_tokens = _max_tokens(len(tokens), body.max_tokens, 16, length, "prompt")
        requests += [
            Request(
                prompt=tokens,
                max_tokens=max_tokens,
                sampling=_sampling(body, i),
                logprobs=body.logprobs,
                echo=bool(body.echo),
                **_ends(body, max_tokens),
            )
            for i in range(n)
        ]
    return requests


def _tokens(prompt: str | list[int], codec: Codec, length: int) -> tuple[int, ...]:
    if not prompt:
        raise BadRequest("prompt: one of the prompts is empty", "prompt")
    if isinstance(prompt, str):
        codec.check(prompt, length, "prompt")
        prompt = codec.encode(prompt)
    return tuple(prompt)


def chat_requests(body: ChatBody, template: ChatTemplate, length: int, most: int) -> list[Request]:
    """A request for each answer. Raises BadRequest."""
    n = body.n or 1
    _check(body, n)
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs=true", "top_logprobs")
    form = body.response_format
    if form and not (isinstance(form, dict) and form.get("type") == "text"):
        raise BadRequest("response_format is not supported, other than of type text", "response_format")
    _bound(1, n, most)
    prompt = template.tokens(body.messages, length)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    max_tokens = _max_tokens(len(prompt), asked, length, length, "messages")
    return [
        Request(
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=_sampling(body, i),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            **_ends(body, max_tokens),
        )
        for i in range(n)
    ]


def _ends(body: Options, max_tokens: int) -> dict[str, Any]:
    """What ends an answer beside its stop strings."""
    least = body.min_tokens or 0
    if least > max_tokens:
        raise BadRequest(f"min_tokens={least} is not allowed: at most max_tokens={max_tokens}", "min_tokens")
    stops = tuple(body.stop_token_ids or ())
    return {"ignore_eos": bool(body.ignore_eos), "stop_token_ids": stops, "min_tokens": least}


def _bias(body: Options) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items())
    except ValueError:
        raise BadRequest("logit_bias: its keys are token ids", "logit_bias") from None


def _check(body: Options, n: int) -> None:
    stops = _stops(body)
    if len(stops) > STOPS:
        raise BadRequest(f"stop has {len(stops)} texts: at most {STOPS}", "stop")
    if not all(0 < len(stop) <= STOP_CHARACTERS for stop in stops):
        raise BadRequest(f"stop: a text has 1 to {STOP_CHARACTERS} characters", "stop")
    if body.stream_options and not body.stream:
        raise BadRequest("stream_options needs stream=true", "stream_options")


def _bound(prompts: int, n: int, most: int) -> None:
    if prompts * n > most:
        raise BadRequest(f"{prompts} prompts and n={n} make {prompts * n} answers: at most {most}", "n")


def _stops(body: Options) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _max_tokens(prompt: int, asked: int | None, default: int, length: int, param: str) -> int:
    rest = length - prompt
    tokens = max(1, min(default, rest)) if asked is None else asked
    if tokens > rest:
        what = f"you requested {prompt + tokens} tokens ({prompt} in the {param}, {tokens} for the answer)"
        raise _too_long(length, what, param)
    return tokens


def _too_long(length: int, what: str, param: str) -> BadRequest:
    message = f"This model's maximum context length is {length} tokens. However, {what}."
    return BadRequest(message, param, code="context_length_exceeded", reason="too_long")


SAMPLING = (
    "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
)  # fmt: skip


def _sampling(body: Options, index: int) -> Sampling:
    given = {name: value for name in SAMPLING if (value := getattr(body, name)) is not None}
    seed = secrets.randbits(63) if body.seed is None else (body.seed + index) % 2**64
    bias = _bias(body)
    try:
        return Sampling(**given, top_k=max(0, body.top_k or 0), seed=seed, stop=_stops(body), logit_bias=bias)
    except ValueError as error:
        raise BadRequest(str(error), str(error).partition("=")[0]) from None


class ChatTemplate:
    """Messages to the tokens of a prompt, by a Jinja template that can neither run code nor change anything.

    `text` is what Hugging Face calls a chat template; None: DEFAULT_TEMPLATE. The end-of-text token is only where
    the template has it: a message that spells it is text. Raises ValueError if it is no template.
    """

    def __init__(self, text: str | None, codec: Codec) -> None:
        self.text = DEFAULT_TEMPLATE if text is None else text
        self._codec = codec
        self._mark = f"\ue000{secrets.token_hex(16)}\ue000"  # stands for the token, and no client can guess it
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(self.text.replace(END_OF_TEXT, self._mark))
        except TemplateError as error:
            raise ValueError(f"chat_template is not a template: {error}") from None

    def tokens(self, messages: Sequence[Message], length: int) -> tuple[int, ...]:
        """`length`: a context that they may be refused for not fitting. Raises BadRequest."""
        if not messages:
            raise BadRequest("messages is empty: give at least one", "messages")
        plain = [{"role": message.role, "content": _content(message)} for message in messages]
        try:
            text = self._template.render(
                messages=plain, add_generation_prompt=True, eos_token=self._mark, bos_token=self._mark
            )
        except Exception as error:  # a template is data: whatever it does with these messages
            raise BadRequest(f"The chat template does not take these messages: {error}", "messages") from None
        parts = text.split(self._mark)
        self._codec.check("".join(parts), length, "messages")
        tokens = self._codec.encode(parts[0])
        for part in parts[1:]:
            tokens += [self._codec.end, *self._codec.encode(part)]
        if not tokens:
            raise BadRequest("The chat template makes an empty prompt of these messages", "messages")
        return tuple(tokens)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _content(message: Message) -> str:
    if message.tool_calls:
        raise BadRequest("messages: tool_calls is not supported", "messages")
    if not isinstance(message.content, list):
        return message.content or ""
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise BadRequest('messages: parts of content must be {"type": "text", "text": …}', "messages")
    return "\n".join(part.text or "" for part in message.content)


# What clients read


def _usage(usages: Iterable[Usage], prompts: int) -> dict[str, int]:
    """Of several answers, whose prompts have so many tokens together."""
    answers = sum(usage.completion_tokens for usage in usages)
    return {"prompt_tokens": prompts, "total_tokens": prompts + answers, "completion_tokens": answers}


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


class _Answer:
    """One answer as far as it has come."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.text: list[str] = []
        self.logprobs: dict[str, list[Any]] = {}
        self.usage: Usage | None = None
        self.finish: str | None = None
        self.reader: Detokenizer | None = None
        self.read = 0
        """Characters of its text that tokens have completed."""


class Reply(ABC):
    """The response to one HTTP request: increments in, in any order of answers, and a whole or chunks out."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, name: str, model: str, body: Options, requests: Sequence[Request], codec: Codec) -> None:
        self.requests, self.stream = requests, bool(body.stream)
        options = body.stream_options or StreamOptions()
        self.include_usage = bool(options.include_usage)
        self._continuous = self.include_usage and bool(options.continuous_usage_stats)
        self._head = {"id": f"{self.prefix}-{name}", "created": int(time.time()), "model": model}
        self._answers = [_Answer(request) for request in requests]
        self._prompts = sum(len(request.prompt) for request in requests[:: body.n or 1])
        self._codec = codec

    @abstractmethod
    def _choice(self, text: str) -> dict[str, Any]:
        """An answer's text in a whole."""

    @abstractmethod
    def _delta(self, text: str) -> dict[str, Any]:
        """And in a chunk."""

    @abstractmethod
    def _logprobs(self, answer: _Answer, increment: Increment) -> dict[str, list[Any]]:
        """Lists that continue those of the increments before."""

    def _first(self, i: int) -> list[dict[str, Any]]:
        """Chunks before those of answer `i`."""
        return []

    def add(self, i: int, increment: Increment) -> None:
        """Take in an increment of answer `i`, for `whole`."""
        answer = self._answers[i]
        answer.text.append(_text(increment))
        if answer.request.logprobs is not None:
            for key, values in self._logprobs(answer, increment).items():
                answer.logprobs.setdefault(key, []).extend(values)
        answer.usage, answer.finish = increment.usage, increment.finish

    def whole(self) -> dict[str, Any]:
        choices = [
            {"index": i, **self._choice("".join(a.text)), "logprobs": a.logprobs or None, "finish_reason": a.finish}
            for i, a in enumerate(self._answers)
        ]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": self._usage()}

    def chunks(self, i: int, increment: Increment) -> list[dict[str, Any]]:
        """What a stream says of an increment of answer `i`."""
        answer = self._answers[i]
        first = self._first(i) if answer.usage is None else []
        answer.usage = increment.usage
        logprobs = self._logprobs(answer, increment) if answer.request.logprobs is not None else None
        chunks = [*first, self._chunk(i, self._delta(_text(increment)), logprobs, increment.finish)]
        if self._continuous:
            for chunk in chunks:
                chunk["usage"] = _usage([increment.usage], increment.usage.prompt_tokens)
        return chunks

    def _chunk(self, i: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": i, **delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "object": self.chunk_object, "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream that asks for it."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        """A prompt counts once, however many answers it has."""
        return _usage([answer.usage for answer in self._answers if answer.usage], self._prompts)


class CompletionReply(Reply):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _choice

    def _logprobs(self, answer: _Answer, increment: Increment) -> dict[str, list[Any]]:
        """`text_offset`: characters before those that a token completes."""
        out: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        prompt, echo = answer.request.prompt, increment.echo
        if echo and echo.logprobs is not None:
            reader, at = Detokenizer(self._codec.tokenizer), 0
            for token, logprob in zip(prompt, echo.logprobs, strict=True):
                self._entry(out, token, logprob, at)
                at += len(reader.push(token))
            answer.read = len(echo.text)
        if increment.token is not None:
            answer.reader = answer.reader or Detokenizer(self._codec.tokenizer, prompt)
            self._entry(out, increment.token, increment.logprob, answer.read)
            answer.read += len(answer.reader.push(increment.token))
        return out

    def _entry(self, out: dict[str, list[Any]], token: int, logprob: LogProb | None, offset: int) -> None:
        out["tokens"].append(self._codec.text(token))
        out["text_offset"].append(offset)
        out["token_logprobs"].append(_finite(logprob.logprob) if logprob else None)
        out["top_logprobs"].append(self._top(logprob) if logprob else None)

    def _top(self, logprob: LogProb) -> dict[str, float]:
        """By text; parts of characters may share one, which then has the best of them."""
        top: dict[str, float] = {}
        for token, value in ((logprob.token, logprob.logprob), *logprob.top):
            text = self._codec.text(token)
            top[text] = max(_finite(value), top.get(text, LEAST_LOGPROB))
        return top


class ChatReply(Reply):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def _first(self, i: int) -> list[dict[str, Any]]:
        return [self._chunk(i, {"delta": {"role": "assistant", "content": ""}})]

    def _logprobs(self, answer: _Answer, increment: Increment) -> dict[str, list[Any]]:
        logprob = increment.logprob
        if logprob is None:
            return {"content": []}
        top = [self._token(token, value) for token, value in logprob.top]
        return {"content": [{**self._token(logprob.token, logprob.logprob), "top_logprobs": top}]}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._codec.text(token), "logprob": _finite(logprob), "bytes": self._codec.bytes(token)}


def _text(increment: Increment) -> str:
    return (increment.echo.text if increment.echo else "") + increment.text
