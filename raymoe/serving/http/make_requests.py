"""Conversion of validated bodies to engine requests: one request for each choice of the response."""

from __future__ import annotations

import secrets
from typing import Any

from raymoe.serving.engine.request import Request
from raymoe.serving.engine.sampling import Sampling
from raymoe.serving.http.bodies import ChatBody, CompletionBody, GenerationBody, check_options
from raymoe.serving.http.errors import ClientError
from raymoe.serving.http.prompts import ChatTemplate, Codec, check_context

DEFAULT_MAX_TOKENS = 16
"""Tokens of a completion whose request does not set max_tokens. A chat completion uses the rest of the context."""

SAMPLING_FIELDS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
)  # fmt: skip


def completion_requests(body: CompletionBody, codec: Codec, length: int, max_choices: int) -> list[Request]:
    """Return a request for each choice, ordered by prompt. Raises ClientError.

    length: maximum tokens of prompt and completion together. The choices of one prompt differ in their seeds.
    No choice depends on the other prompts of the body.
    """
    check_options(body)
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise ClientError(f"best_of={body.best_of} is not supported: must be n={n}", "best_of")
    prompts = _prompts(body, codec)
    _check_choices(len(prompts), n, max_choices)
    requests: list[Request] = []
    for prompt in prompts:
        tokens = _prompt_tokens(prompt, codec, length)
        max_tokens = _max_tokens(len(tokens), body.max_tokens, DEFAULT_MAX_TOKENS, length, "prompt")
        requests += [
            Request(
                prompt=tokens,
                max_tokens=max_tokens,
                sampling=_sampling(body, i, codec),
                logprobs=body.logprobs,
                echo=bool(body.echo),
                **_end_conditions(body, max_tokens, codec),
            )
            for i in range(n)
        ]
    return requests


def chat_requests(body: ChatBody, template: ChatTemplate, codec: Codec, length: int, max_choices: int) -> list[Request]:
    """Return a request for each choice. Raises ClientError."""
    check_options(body)
    n = body.n or 1
    if body.top_logprobs and not body.logprobs:
        raise ClientError("top_logprobs requires logprobs=true", "top_logprobs")
    form = body.response_format
    if form and not (isinstance(form, dict) and form.get("type") == "text"):
        raise ClientError("response_format is not supported, other than of type text", "response_format")
    _check_choices(1, n, max_choices)
    prompt = template.tokens(body.messages, length)
    requested = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    max_tokens = _max_tokens(len(prompt), requested, length, length, "messages")
    return [
        Request(
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=_sampling(body, i, codec),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            **_end_conditions(body, max_tokens, codec),
        )
        for i in range(n)
    ]


def _prompts(body: CompletionBody, codec: Codec) -> list[Any]:
    """Return the prompts of a body, each a string or a list of token ids."""
    prompt = body.prompt
    if not prompt:
        message = f"prompt is empty: send at least one token ([{codec.end}] marks the start of a text)"
        raise ClientError(message, "prompt")
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def _prompt_tokens(prompt: str | list[int], codec: Codec, length: int) -> tuple[int, ...]:
    if not prompt:
        raise ClientError("prompt: one of the prompts is empty", "prompt")
    if isinstance(prompt, str):
        codec.check_length(prompt, length, "prompt")
        return tuple(codec.encode(prompt))
    codec.check_ids(prompt, "prompt")
    return tuple(prompt)


def _check_choices(prompts: int, n: int, max_choices: int) -> None:
    if prompts * n > max_choices:
        message = f"{prompts} prompts with n={n} require {prompts * n} completions: at most {max_choices}"
        raise ClientError(message, "n")


def _max_tokens(prompt_tokens: int, requested: int | None, default: int, length: int, field: str) -> int:
    rest = length - prompt_tokens
    tokens = max(1, min(default, rest)) if requested is None else requested
    check_context(prompt_tokens, tokens, length, field)
    return tokens


def _end_conditions(body: GenerationBody, max_tokens: int, codec: Codec) -> dict[str, Any]:
    """Fields of a Request that end a completion, other than stop strings."""
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise ClientError(f"min_tokens={min_tokens} is not allowed: at most max_tokens={max_tokens}", "min_tokens")
    stop_ids = tuple(body.stop_token_ids or ())
    codec.check_ids(stop_ids, "stop_token_ids")
    return {"ignore_eos": bool(body.ignore_eos), "stop_token_ids": stop_ids, "min_tokens": min_tokens}


def _logit_bias(body: GenerationBody, codec: Codec) -> tuple[tuple[int, float], ...]:
    try:
        bias = tuple((int(token), value) for token, value in (body.logit_bias or {}).items())
    except ValueError:
        raise ClientError("logit_bias: the keys must be token ids", "logit_bias") from None
    codec.check_ids((token for token, _ in bias), "logit_bias")
    return bias


def _sampling(body: GenerationBody, index: int, codec: Codec) -> Sampling:
    """Return the sampling of a prompt's choice number `index`. Without a seed the choice gets a random one."""
    given = {name: value for name in SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
    seed = secrets.randbits(63) if body.seed is None else (body.seed + index) % 2**64
    bias = _logit_bias(body, codec)
    try:
        return Sampling(**given, top_k=max(0, body.top_k or 0), seed=seed, stop=body.stops, logit_bias=bias)
    except ValueError as error:
        raise ClientError(str(error), str(error).partition("=")[0]) from None
