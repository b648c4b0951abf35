"""Generation for one HTTP request: submits the requests of its choices and merges their increments.

The choices of a request start together and end together. If one is rejected before anything is sent, the HTTP
request fails. When the client disconnects, all of them are cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Protocol, cast

from tokenizers import Tokenizer

from raymoe.metrics import ApiMetrics
from raymoe.serving.engine.engine import QueueFull
from raymoe.serving.engine.request import Increment, Request
from raymoe.serving.http.connections import cancel
from raymoe.serving.http.errors import ClientError, InternalError, Unavailable

log = logging.getLogger(__name__)


class Service(Protocol):
    """The model behind the API."""

    name: str
    """Name of the model."""
    created: int
    """Unix time."""
    tokenizer: Tokenizer
    length: int
    """Maximum tokens of prompt and completion together."""
    chat_template: str | None
    """Jinja text. None: the default template."""

    def generate(self, request: Request) -> AsyncIterator[Increment]:
        """Return an async generator of the completion.

        Raises before its first increment: QueueFull, Unavailable, or ValueError for a request that can never be
        served. Closing the generator cancels the request; it is closed after its last increment, too.
        """
        ...

    def ready(self) -> bool: ...


async def generate(
    service: Service, requests: Sequence[Request], metrics: ApiMetrics, arrived: float
) -> AsyncGenerator[tuple[int, Increment]]:
    """Yield (index of the request, increment) in order of arrival. Ends all requests when it is closed.

    arrived: time of the HTTP request by `time.perf_counter`. Raises the first error of any request.
    """
    running, last_token = set(range(len(requests))), {}
    received: asyncio.Queue[tuple[int, Increment | Exception]] = asyncio.Queue()
    tasks = [asyncio.create_task(_forward(service, i, request, received)) for i, request in enumerate(requests)]
    metrics.requests_running.inc(len(running))
    outcome: str | None = "abort"
    try:
        while running:
            i, increment = await received.get()
            if isinstance(increment, Exception):
                outcome = "error" if last_token else None  # before the first token it is a rejection
                raise increment
            now = time.perf_counter()
            _count(metrics, increment, now, arrived, last_token.get(i))
            last_token[i] = now
            if increment.finish:
                running.remove(i)
            yield i, increment
    finally:
        metrics.requests_running.dec(len(running))
        if outcome:
            metrics.finished[outcome].inc(len(running))
        await cancel(*tasks)


def _count(metrics: ApiMetrics, increment: Increment, now: float, arrived: float, previous: float | None) -> None:
    """Record an increment. previous: time of the request's previous increment, None for its first."""
    if previous is None:
        metrics.time_to_first_token.observe(now - arrived)
        metrics.prompt_tokens.inc(increment.usage.prompt_tokens)
    else:
        metrics.inter_token_latency.observe(now - previous)
    metrics.generation_tokens.inc(increment.token is not None)
    if increment.finish:
        metrics.requests_running.dec()
        metrics.finished[increment.finish].inc()
        metrics.e2e_request_latency.observe(now - arrived)


async def _forward(
    service: Service, i: int, request: Request, to: asyncio.Queue[tuple[int, Increment | Exception]]
) -> None:
    """Put the increments of request `i` into a queue, or the exception that ends it."""
    started = False
    try:
        completion = cast("AsyncGenerator[Increment]", service.generate(request))
        async with aclosing(completion):
            async for increment in completion:
                if increment.finish == "abort":
                    raise Unavailable("the engine aborted the request")
                started = True
                to.put_nowait((i, increment))
                if increment.finish:
                    return
        raise RuntimeError("the service ended a completion without a finish reason")
    except (ClientError, QueueFull, Unavailable) as error:
        to.put_nowait((i, error))
    except Exception as error:
        if isinstance(error, ValueError) and not started:
            to.put_nowait((i, ClientError(str(error))))
        else:
            log.exception("generation failed")
            to.put_nowait((i, InternalError()))
