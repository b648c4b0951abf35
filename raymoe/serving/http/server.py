"""The HTTP server: routes of the OpenAI-compatible API, authorization and error responses, over any `Service`."""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from importlib import metadata
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from raymoe.config import check_field
from raymoe.data.tokens import END_OF_TEXT
from raymoe.metrics import ApiMetrics
from raymoe.serving.engine.engine import QueueFull
from raymoe.serving.http.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    parse,
    read_body,
)
from raymoe.serving.http.connections import EventStream, RequestIds, is_visible_ascii, run_while_connected
from raymoe.serving.http.errors import (
    ClientError,
    InternalError,
    Unavailable,
    error_body,
    error_response,
    shorten,
)
from raymoe.serving.http.generation import Service, generate
from raymoe.serving.http.make_requests import chat_requests, completion_requests
from raymoe.serving.http.prompts import ChatTemplate, Codec
from raymoe.serving.http.replies import STREAM_END, ChatReply, CompletionReply, Reply, to_event, to_json

B = TypeVar("B", bound=Body)


@dataclass(frozen=True)
class ApiSettings:
    """Settings of the HTTP server. Raises ValueError with the field, its value and the allowed values."""

    api_key: str | None = field(default=None, repr=False)
    """Key that clients of /v1 send as `Authorization: Bearer KEY`. None: /v1 is open."""
    max_body_bytes: int = 8 << 20
    """Maximum size of a request's body."""
    max_choices: int = 64
    """Maximum number of choices of a request: prompts times n."""
    retry_after_s: float = 1.0
    """Value of Retry-After when the queue is full or no trunk is ready."""
    send_request_ids: bool = True
    """Whether responses have an X-Request-Id. Set it to False behind a proxy that adds it, such as Ray Serve's."""

    def __post_init__(self) -> None:
        require = partial(check_field, self)
        if self.api_key is not None and not is_visible_ascii(self.api_key.encode()):
            raise ValueError("api_key is not allowed: visible ASCII characters, at least one")
        require("max_body_bytes", "1 or more", self.max_body_bytes >= 1)
        require("max_choices", "1 or more", self.max_choices >= 1)
        require("retry_after_s", "greater than 0 and finite", 0 < self.retry_after_s < math.inf)


def create_app(service: Service, settings: ApiSettings, metrics: ApiMetrics) -> FastAPI:
    """Build the ASGI application. Raises ValueError for an invalid chat template."""
    api = _Api(service, settings, metrics)
    app = FastAPI(title="raymoe", openapi_url=None, redirect_slashes=False)

    def get(router: APIRouter | FastAPI, path: str, endpoint: Callable[..., Any]) -> None:
        router.add_api_route(path, endpoint, methods=["GET", "HEAD"], response_model=None)

    def post(router: APIRouter | FastAPI, path: str, endpoint: Callable[..., Any]) -> None:
        router.add_api_route(path, endpoint, methods=["POST"], response_model=None)

    v1 = APIRouter(prefix="/v1", dependencies=[Depends(api.authorize)])
    post(v1, "/completions", api.completions)
    post(v1, "/chat/completions", api.chat)
    get(v1, "/models", api.models)
    get(v1, "/models/{model:path}", api.model)
    app.include_router(v1)
    post(app, "/tokenize", api.tokenize)
    post(app, "/detokenize", api.detokenize)
    get(app, "/tokenizer_info", api.tokenizer_info)
    get(app, "/health", api.health)
    get(app, "/ready", api.ready)
    get(app, "/version", api.version)
    get(app, "/metrics", api.prometheus)
    for kind in (ClientError, QueueFull, Unavailable, InternalError, Exception):
        app.add_exception_handler(kind, api.handle_error)
    app.add_exception_handler(HTTPException, api.handle_no_route)
    app.add_exception_handler(ClientDisconnect, api.handle_disconnect)
    app.add_middleware(RequestIds, send=settings.send_request_ids)
    return app


class _Api:
    """Endpoints and exception handlers of the application."""

    def __init__(self, service: Service, settings: ApiSettings, metrics: ApiMetrics) -> None:
        self.service, self.settings, self.metrics = service, settings, metrics
        self.codec = Codec(service.tokenizer)
        self.template = ChatTemplate(service.chat_template, self.codec)
        self._key = None if settings.api_key is None else sha256(f"Bearer {settings.api_key}".encode()).digest()

    # Generation

    async def completions(self, request: Request) -> Response:
        def read(content: bytes) -> Reply:
            body = self._parse(content, CompletionBody)
            requests = completion_requests(body, self.codec, self.service.length, self.settings.max_choices)
            return CompletionReply(request.state.request_id, self.service.name, body, requests, self.codec)

        return await self._respond(request, read)

    async def chat(self, request: Request) -> Response:
        def read(content: bytes) -> Reply:
            body = self._parse(content, ChatBody)
            length, max_choices = self.service.length, self.settings.max_choices
            requests = chat_requests(body, self.template, self.codec, length, max_choices)
            return ChatReply(request.state.request_id, self.service.name, body, requests, self.codec)

        return await self._respond(request, read)

    async def _respond(self, request: Request, read: Callable[[bytes], Reply]) -> Response:
        arrived = time.perf_counter()
        content = await read_body(request, self.settings.max_body_bytes)
        reply = await asyncio.to_thread(read, content)  # a long text takes time to tokenize
        if reply.stream:
            return EventStream(self._events(reply, arrived))

        async def collect() -> None:
            async with aclosing(generate(self.service, reply.requests, self.metrics, arrived)) as increments:
                async for i, increment in increments:
                    reply.add(i, increment)

        connected = await run_while_connected(request.receive, collect())
        return _json(reply.whole()) if connected else await self.handle_disconnect()

    async def _events(self, reply: Reply, arrived: float) -> AsyncGenerator[bytes]:
        """Yield the events of a stream. An error after the first event becomes the last event."""
        started = False
        try:
            async with aclosing(generate(self.service, reply.requests, self.metrics, arrived)) as increments:
                async for i, increment in increments:
                    for chunk in reply.chunks(i, increment):
                        started = True
                        yield to_event(chunk)
        except Exception as error:
            if not started:
                raise
            yield to_event(error_response(error, self.settings.retry_after_s).body)
            return
        if reply.include_usage:
            yield to_event(reply.usage_chunk())
        yield STREAM_END

    # Checks

    async def authorize(self, request: Request) -> None:
        """Raise ClientError with status 401 unless the request has the API key."""
        if self._key is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1")
        scheme, _, key = given.partition(b" ")
        digest = sha256(b"Bearer " + key.strip()).digest()
        if not (hmac.compare_digest(digest, self._key) and scheme.lower() == b"bearer"):
            raise ClientError(
                "The API key is missing or wrong: send Authorization: Bearer KEY",
                code="invalid_api_key",
                status=401,
                reason="unauthorized",
            )

    def _parse(self, content: bytes, kind: type[B]) -> B:
        body = parse(content, kind)
        if body.model is not None:
            self._check_model(body.model)
        return body

    def _check_model(self, model: str) -> None:
        if model != self.service.name:
            raise ClientError(
                f"The model {shorten(model)!r} does not exist. Use {self.service.name!r}, or leave out model.",
                "model",
                code="model_not_found",
                status=404,
                reason="unknown_model",
            )

    # Errors

    async def handle_error(self, request: Request, error: Exception) -> Response:
        response = error_response(error, self.settings.retry_after_s)
        if response.reason:
            self.metrics.rejected[response.reason].inc()
        headers = {RequestIds.HEADER: request.state.request_id} if self.settings.send_request_ids else {}
        if response.retry_after_s is not None:
            headers["Retry-After"] = str(math.ceil(response.retry_after_s))
        if response.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return _json(response.body, response.status, headers)

    async def handle_no_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {shorten(request.scope['path'])}"
        return _json(error_body(message, "invalid_request_error"), error.status_code, error.headers)

    async def handle_disconnect(self, *_: Any) -> Response:
        """Return nginx's status for a client that disconnected. The response is not sent."""
        return Response(status_code=499)

    # Other endpoints

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [_model_card(self.service)]})

    async def model(self, model: str) -> Response:
        self._check_model(model)
        return _json(_model_card(self.service))

    async def tokenize(self, request: Request) -> Response:
        content = await read_body(request, self.settings.max_body_bytes)

        def read() -> list[int]:
            body = self._parse(content, TokenizeBody)
            if (body.prompt is None) == (body.messages is None):
                raise ClientError("send either prompt or messages", "prompt")
            if body.messages is not None:
                return list(self.template.tokens(body.messages, self.service.length))
            return self.codec.encode(body.prompt or "", bool(body.add_special_tokens))

        tokens = await asyncio.to_thread(read)
        return _json({"count": len(tokens), "max_model_len": self.service.length, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        content = await read_body(request, self.settings.max_body_bytes)

        def read() -> str:
            tokens = self._parse(content, DetokenizeBody).tokens
            self.codec.check_ids(tokens, "tokens")
            return self.service.tokenizer.decode(tokens, skip_special_tokens=False)

        return _json({"prompt": await asyncio.to_thread(read)})

    async def tokenizer_info(self, request: Request) -> Response:
        """Texts start and end with the same token, as in training."""
        return _json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": END_OF_TEXT,
                "eos_token": END_OF_TEXT,
                "pad_token": END_OF_TEXT,
                "chat_template": self.template.text,
                "model_max_length": self.service.length,
                "vocab_size": self.codec.size,
            }
        )

    async def health(self, request: Request) -> Response:
        return Response()

    async def ready(self, request: Request) -> Response:
        if not self.service.ready():
            body = error_body("Not ready", "server_error", code="unavailable")
            return _json(body, 503, {"Retry-After": str(math.ceil(self.settings.retry_after_s))})
        return Response()

    async def version(self, request: Request) -> Response:
        return _json({"version": metadata.version("raymoe")})

    async def prometheus(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _model_card(service: Service) -> dict[str, Any]:
    """Describe the model as OpenAI and vLLM do."""
    permission = {
        "id": f"modelperm-{service.name}",
        "object": "model_permission",
        "created": service.created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "raymoe",
        "root": service.name,
        "parent": None,
        "max_model_len": service.length,
        "permission": [permission],
    }


def _json(value: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")
