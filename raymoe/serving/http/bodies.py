"""Validation of HTTP bodies: media type, size, JSON, and the fields of each endpoint.

Fields have the names and defaults of OpenAI and vLLM. Null selects the default. Unknown fields are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from raymoe.serving.http.errors import ClientError

MAX_STOPS = 16
"""Maximum number of stop strings in a request."""
MAX_STOP_CHARACTERS = 256
"""Maximum length of a stop string. Each new token is compared with all prefixes of the stop strings."""
MAX_TOP_LOGPROBS = 20
"""Maximum number of alternatives reported with each token."""

UNSUPPORTED = (
    "allowed_token_ids", "audio", "bad_words", "chat_template", "continue_final_message", "documents", "functions",
    "guided_choice", "guided_grammar", "guided_json", "guided_regex", "prompt_embeds", "structured_outputs",
    "suffix", "tools", "use_beam_search",
)  # fmt: skip
"""Fields that would change the output. A request is rejected when one of them is not empty."""

UNIONS = {
    "prompt": "a string, a list of strings, a list of token ids or a list of such lists",
    "stop": "a string or a list of strings",
    "content": "a string or a list of parts",
}
"""Fields of several types, with the text that an error shows for them."""

B = TypeVar("B", bound=BaseModel)
NonNegative = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[NonNegative], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


class Body(BaseModel):
    """Fields that all bodies share."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str | None = None
    """Name of the served model. None: the model that is served."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Body):
    """Fields that completions and chat completions share."""

    n: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_tokens: NonNegative | None = None
    stop: str | Texts | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    """0: the most likely token, as `temperature=0`."""
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """-1 and 0: all tokens."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop_token_ids: Ids | None = None
    min_tokens: NonNegative | None = None
    ignore_eos: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(GenerationBody):
    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)] | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


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


class ChatBody(GenerationBody):
    messages: Messages
    max_completion_tokens: NonNegative | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: Any = None


class TokenizeBody(Body):
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """null: false, as for prompts."""


class DetokenizeBody(Body):
    tokens: Ids


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read a JSON request's content.

    Raises ClientError with status 415 for another media type and 413 for more than `max_bytes` bytes.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ClientError("Content-Type must be application/json", status=415)
    too_large = ClientError(f"The body is too large: at most {max_bytes} bytes", status=413, reason="too_long")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 15 or int(declared) > max_bytes):
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def parse(content: bytes, kind: type[B]) -> B:
    """Validate JSON `content` as a body of type `kind`. Raises ClientError with the invalid field."""
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        raise _validation_error(error) from None
    for name in UNSUPPORTED:
        if (body.model_extra or {}).get(name):
            raise ClientError(f"{name} is not supported", name)
    return body


def _validation_error(error: ValidationError) -> ClientError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(step) for step in first["loc"]]
    if first["type"] == "json_invalid" or not path:
        return ClientError(f"The body is not a valid JSON object: {first['msg']}")
    union = next((name for name in UNIONS if name in path[:-1]), None)
    if union is None:
        return ClientError(f"{'.'.join(path)}: {first['msg']}", path[0])
    return ClientError(f"{'.'.join(path[: path.index(union) + 1])}: must be {UNIONS[union]}", path[0])


def check_options(body: GenerationBody) -> None:
    """Raise ClientError for stop strings and stream options that cannot be served."""
    if len(body.stops) > MAX_STOPS:
        raise ClientError(f"stop has {len(body.stops)} strings: at most {MAX_STOPS}", "stop")
    if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in body.stops):
        raise ClientError(f"stop: a string has 1 to {MAX_STOP_CHARACTERS} characters", "stop")
    if body.stream_options and not body.stream:
        raise ClientError("stream_options requires stream=true", "stream_options")
