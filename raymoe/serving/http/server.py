"""The OpenAI API over HTTP, for any `Service` that answers requests: routes, errors, streams, and who may ask.

An HTTP request may ask for several answers. They are made together and end together: if one is refused before
anything is sent, none is given, and when the client leaves, all are given up.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from importlib import metadata
from typing import Any, Protocol, TypeVar, cast

from fastapi import APIRouter, Depends, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage
from tokenizers import Tokenizer

from raymoe.config import check_field
from raymoe.data.tokens import END_OF_TEXT, vocabulary_size
from raymoe.metrics import ApiMetrics
from raymoe.serving.engine.engine import QueueFull
from raymoe.serving.engine.request import Increment
from raymoe.serving.engine.request import Request as Asked
from raymoe.serving.http import protocol
from raymoe.serving.http.protocol import BadRequest, Reply

logger = logging.getLogger(__name__)
B = TypeVar("B", bound=BaseModel)


class Unavailable(Exception):
    """Nobody can take the request now: try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Service(Protocol):
    """Who answers."""

    name: str
    """Of the model."""
    created: int
    """Unix time."""
    tokenizer: Tokenizer
    length: int
    """Tokens of prompt and answer, at most."""
    chat_template: str | None
    """Jinja text. None: a plain one."""

    def generate(self, request: Asked) -> AsyncIterator[Increment]:
        """An async generator. Before its first increment it may raise QueueFull, Unavailable, or ValueError for a
        request that can never be served. Closing it gives the request up; it is closed after its last increment too.
        """
        ...

    def ready(self) -> bool: ...


@dataclass(frozen=True)
class ApiSettings:
    """Raises ValueError with the field, the value and what is allowed."""

    api_key: str | None = field(default=None, repr=False)
    """What clients of /v1 send as `Authorization: Bearer …`. None: nobody is asked."""
    max_body_bytes: int = 8 << 20
    """Of a request."""
    max_answers: int = 64
    """Of a request: prompts times n."""
    retry_after_s: float = 1.0
    """When to try again after finding the queue full."""
    tell_request_ids: bool = True
    """Whether answers say their X-Request-Id. False: a proxy before this does, as Serve's."""

    def __post_init__(self) -> None:
        require = partial(check_field, self)
        if self.api_key is not None and not _visible(self.api_key.encode()):
            raise ValueError("api_key is not allowed: visible ASCII characters, at least one")
        require("max_body_bytes", "1 or more", self.max_body_bytes >= 1)
        require("max_answers", "1 or more", self.max_answers >= 1)
        require("retry_after_s", "greater than 0 and finite", 0 < self.retry_after_s < math.inf)


def create_app(service: Service, settings: ApiSettings, metrics: ApiMetrics) -> FastAPI:
    """Raises ValueError for a chat template that is none."""
    api = _Api(service, settings, metrics)
    app = FastAPI(title="raymoe", openapi_url=None, redirect_slashes=False)

    def add(router: APIRouter | FastAPI, method: str, path: str, endpoint: Callable[..., Any]) -> None:
        router.add_api_route(path, endpoint, methods=[method], response_model=None)

    v1 = APIRouter(prefix="/v1", dependencies=[Depends(api.authorise)])
    add(v1, "POST", "/completions", api.completions)
    add(v1, "POST", "/chat/completions", api.chat)
    add(v1, "GET", "/models", api.models)
    add(v1, "GET", "/models/{model:path}", api.model)
    app.include_router(v1)
    add(app, "POST", "/tokenize", api.tokenize)
    add(app, "POST", "/detokenize", api.detokenize)
    add(app, "GET", "/tokenizer_info", api.tokenizer_info)
    add(app, "GET", "/health", api.health)
    add(app, "GET", "/ready", api.ready)
    add(app, "GET", "/version", api.version)
    add(app, "GET", "/metrics", api.prometheus)
    for kind in (BadRequest, QueueFull, Unavailable, _Broken, Exception):
        app.add_exception_handler(kind, api.refuse)
    app.add_exception_handler(HTTPException, api.no_route)
    app.add_exception_handler(ClientDisconnect, api.gone)
    app.add_middleware(_RequestIds, tell=settings.tell_request_ids)
    return app


class _Api:
    def __init__(self, service: Service, settings: ApiSettings, metrics: ApiMetrics) -> None:
        self.service, self.settings, self.metrics = service, settings, metrics
        self.codec = protocol.Codec(service.tokenizer)
        self.template = protocol.ChatTemplate(service.chat_template, self.codec)
        self._key = None if settings.api_key is None else sha256(f"Bearer {settings.api_key}".encode()).digest()

    # Answers

    async def completions(self, request: Request) -> Response:
        def read(content: bytes) -> Reply:
            body = self._parse(content, protocol.CompletionBody)
            requests = protocol.completion_requests(body, self.codec, self.service.length, self.settings.max_answers)
            return protocol.CompletionReply(request.state.request_id, self.service.name, body, requests, self.codec)

        return await self._answer(request, read)

    async def chat(self, request: Request) -> Response:
        def read(content: bytes) -> Reply:
            body = self._parse(content, protocol.ChatBody)
            requests = protocol.chat_requests(body, self.template, self.service.length, self.settings.max_answers)
            return protocol.ChatReply(request.state.request_id, self.service.name, body, requests, self.codec)

        return await self._answer(request, read)

    async def _answer(self, request: Request, read: Callable[[bytes], Reply]) -> Response:
        arrived = time.perf_counter()
        reply = await asyncio.to_thread(read, await self._read(request))  # a long text takes a while
        if reply.stream:
            return _EventStream(self._events(reply, arrived))

        async def collect() -> None:
            async with aclosing(self._increments(reply.requests, arrived)) as increments:
                async for i, increment in increments:
                    reply.add(i, increment)

        return _json(reply.whole()) if await _while_connected(request.receive, collect()) else await self.gone()

    async def _events(self, reply: Reply, arrived: float) -> AsyncGenerator[bytes]:
        """What it raises before its first event is the response."""
        begun = False
        try:
            async with aclosing(self._increments(reply.requests, arrived)) as increments:
                async for i, increment in increments:
                    for chunk in reply.chunks(i, increment):
                        begun = True
                        yield protocol.event(chunk)
        except Exception as error:
            if not begun:
                raise
            yield protocol.event(self._failure(error).body)
            return
        if reply.include_usage:
            yield protocol.event(reply.usage_chunk())
        yield protocol.DONE

    async def _increments(self, requests: Sequence[Asked], arrived: float) -> AsyncGenerator[tuple[int, Increment]]:
        """(answer, increment) as they come. The end of this, whatever brings it, is the end of all answers."""
        metrics, running, last = self.metrics, set(range(len(requests))), {}
        come: asyncio.Queue[tuple[int, Increment | Exception]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(i, request, come)) for i, request in enumerate(requests)]
        metrics.requests_running.inc(len(running))
        how: str | None = "abort"
        try:
            while running:
                i, increment = await come.get()
                if isinstance(increment, Exception):
                    how = "error" if last else None  # one that never began was rejected
                    raise increment
                now = time.perf_counter()
                if i in last:
                    metrics.inter_token_latency.observe(now - last[i])
                else:
                    metrics.time_to_first_token.observe(now - arrived)
                    metrics.prompt_tokens.inc(increment.usage.prompt_tokens)
                last[i] = now
                metrics.generation_tokens.inc(increment.token is not None)
                if increment.finish:
                    running.remove(i)
                    metrics.requests_running.dec()
                    metrics.finished[increment.finish].inc()
                    metrics.e2e_request_latency.observe(now - arrived)
                yield i, increment
        finally:
            metrics.requests_running.dec(len(running))
            if how:
                metrics.finished[how].inc(len(running))
            await _end(*tasks)

    async def _pump(self, i: int, request: Asked, to: asyncio.Queue[tuple[int, Increment | Exception]]) -> None:
        begun = False
        try:
            answer = cast("AsyncGenerator[Increment]", self.service.generate(request))
            async with aclosing(answer):
                async for increment in answer:
                    if increment.finish == "abort":
                        raise Unavailable("the engine has given the answer up")
                    begun = True
                    to.put_nowait((i, increment))
                    if increment.finish:
                        return
            raise RuntimeError("an answer ended before its end")
        except (BadRequest, QueueFull, Unavailable) as error:
            to.put_nowait((i, error))
        except Exception as error:
            if isinstance(error, ValueError) and not begun:
                to.put_nowait((i, BadRequest(str(error))))
            else:
                logger.exception("an answer failed")
                to.put_nowait((i, _Broken()))

    # What a request must be

    async def authorise(self, request: Request) -> None:
        if self._key is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1")
        scheme, _, key = given.partition(b" ")
        digest = sha256(b"Bearer " + key.strip()).digest()
        if not (hmac.compare_digest(digest, self._key) and scheme.lower() == b"bearer"):
            raise BadRequest(
                "The API key is missing or wrong: send Authorization: Bearer KEY",
                code="invalid_api_key",
                status=401,
                reason="unauthorized",
            )

    async def _read(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise BadRequest("Content-Type must be application/json", status=415)
        most, parts, size = self.settings.max_body_bytes, [], 0
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 15 or int(declared) > most):
            raise self._too_large()
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise self._too_large()
            parts.append(part)
        return b"".join(parts)

    def _too_large(self) -> BadRequest:
        message = f"The body is too large: at most {self.settings.max_body_bytes} bytes"
        return BadRequest(message, status=413, reason="too_long")

    def _parse(self, content: bytes, kind: type[B]) -> B:
        body = protocol.parse(content, kind)
        name = getattr(body, "model", None)
        if name is not None:
            self._known(name)
        return body

    def _known(self, model: str) -> None:
        if model != self.service.name:
            raise BadRequest(
                f"The model {_brief(model)!r} does not exist: {self.service.name!r} does",
                "model",
                code="model_not_found",
                status=404,
                reason="unknown_model",
            )

    # What goes wrong

    def _failure(self, error: Exception) -> _Failure:
        if isinstance(error, BadRequest):
            body = protocol.error_body(str(error), "invalid_request_error", error.param, error.code)
            return _Failure(error.status, body, error.reason)
        if isinstance(error, QueueFull):
            body = protocol.error_body(f"The server is full: {error}", "server_error", code="queue_full")
            return _Failure(503, body, "full", self.settings.retry_after_s)
        if isinstance(error, Unavailable):
            body = protocol.error_body(f"Unavailable: {error}", "server_error", code="unavailable")
            return _Failure(503, body, "unavailable", error.retry_after_s)
        if not isinstance(error, _Broken):
            logger.error("a request failed", exc_info=error)
        return _Failure(500, protocol.error_body("Internal server error", "server_error"))

    async def refuse(self, request: Request, error: Exception) -> Response:
        failure = self._failure(error)
        if failure.reason:
            self.metrics.rejected[failure.reason].inc()
        headers = {_RequestIds.HEADER: request.state.request_id} if self.settings.tell_request_ids else {}
        if failure.retry_after_s is not None:
            headers["Retry-After"] = str(math.ceil(failure.retry_after_s))
        if failure.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return _json(failure.body, failure.status, headers)

    async def no_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {_brief(request.scope['path'])}"
        return _json(protocol.error_body(message, "invalid_request_error"), error.status_code, error.headers)

    async def gone(self, *_: Any) -> Response:
        """For a client that is no longer there: nginx's status for it, which nobody reads."""
        return Response(status_code=499)

    # Everything else

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._card()]})

    async def model(self, model: str) -> Response:
        self._known(model)
        return _json(self._card())

    def _card(self) -> dict[str, Any]:
        name, created = self.service.name, self.service.created
        permission = {
            "id": f"modelperm-{name}",
            "object": "model_permission",
            "created": created,
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
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "raymoe",
            "root": name,
            "parent": None,
            "max_model_len": self.service.length,
            "permission": [permission],
        }

    async def tokenize(self, request: Request) -> Response:
        content = await self._read(request)

        def read() -> list[int]:
            body = self._parse(content, protocol.TokenizeBody)
            if (body.prompt is None) == (body.messages is None):
                raise BadRequest("give a prompt or messages", "prompt")
            if body.messages is not None:
                return list(self.template.tokens(body.messages, self.service.length))
            return self.codec.encode(body.prompt or "", bool(body.add_special_tokens))

        tokens = await asyncio.to_thread(read)
        return _json({"count": len(tokens), "max_model_len": self.service.length, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        content = await self._read(request)

        def read() -> str:
            tokens = self._parse(content, protocol.DetokenizeBody).tokens
            return self.service.tokenizer.decode(tokens, skip_special_tokens=False)

        return _json({"prompt": await asyncio.to_thread(read)})

    async def tokenizer_info(self, request: Request) -> Response:
        """Texts begin and end with the same token, as in training."""
        return _json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": END_OF_TEXT,
                "eos_token": END_OF_TEXT,
                "pad_token": END_OF_TEXT,
                "chat_template": self.template.text,
                "model_max_length": self.service.length,
                "vocab_size": vocabulary_size(self.service.tokenizer),
            }
        )

    async def health(self, request: Request) -> Response:
        return Response()

    async def ready(self, request: Request) -> Response:
        if not self.service.ready():
            body = protocol.error_body("Not ready", "server_error", code="unavailable")
            return _json(body, 503, {"Retry-After": str(math.ceil(self.settings.retry_after_s))})
        return Response()

    async def version(self, request: Request) -> Response:
        return _json({"version": metadata.version("raymoe")})

    async def prometheus(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)


class _Broken(Exception):
    """The service failed; its log has been told why."""


@dataclass(frozen=True)
class _Failure:
    status: int
    body: dict[str, Any]
    reason: str | None = None
    retry_after_s: float | None = None


class _EventStream(Response):
    """Events as they come. What the first raises is left to raise: nothing is sent before it."""

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = await anext(events)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class _RequestIds:
    """Names each request as its client does, if that is a name, and may `tell` the client."""

    HEADER = "X-Request-Id"

    def __init__(self, app: ASGIApp, tell: bool) -> None:
        self._app, self._tell = app, tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = next((value for key, value in scope["headers"] if key == b"x-request-id"), b"")
        name = given if len(given) <= 128 and _visible(given) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = name.decode()

        async def named(message: AsgiMessage) -> None:
            if self._tell and message["type"] == "http.response.start":
                headers = [(k, v) for k, v in message["headers"] if k != b"x-request-id"]
                message = {**message, "headers": [*headers, (b"x-request-id", name)]}
            await send(message)

        await self._app(scope, receive, named)


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Do `work`, or as much of it as there is time for until the client leaves: False then. What it raises is raised.

    The request's body must have been read.
    """

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.create_task(work), asyncio.create_task(wait())
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        return working.done()
    finally:
        await _end(working, gone)


async def _end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _json(value: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(protocol.to_json(value), status, headers, media_type="application/json")


def _visible(text: bytes) -> bool:
    return bool(text) and all(33 <= byte <= 126 for byte in text)


def _brief(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"
