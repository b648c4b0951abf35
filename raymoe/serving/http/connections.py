"""HTTP connections: event streams, detection of clients that disconnect, and request ids."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class EventStream(Response):
    """Sends events as they arrive. An error of the first event is raised before anything is sent."""

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await run_while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = await anext(events)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class RequestIds:
    """Middleware that assigns each request an id: the client's X-Request-Id if it is valid, else a new one.

    send: add the id to the response. Set it to False behind a proxy that does.
    """

    HEADER = "X-Request-Id"

    def __init__(self, app: ASGIApp, send: bool) -> None:
        self._app, self._send = app, send

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = next((value for key, value in scope["headers"] if key == b"x-request-id"), b"")
        request_id = given if len(given) <= 128 and is_visible_ascii(given) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        async def send_with_id(message: Message) -> None:
            if self._send and message["type"] == "http.response.start":
                headers = [(k, v) for k, v in message["headers"] if k != b"x-request-id"]
                message = {**message, "headers": [*headers, (b"x-request-id", request_id)]}
            await send(message)

        await self._app(scope, receive, send_with_id)


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Run `work` until it ends or the client disconnects. Returns False after a disconnect; raises errors of `work`.

    The request's body must have been read before the call.
    """

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, disconnected = asyncio.create_task(work), asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait((working, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        return working.done()
    finally:
        await cancel(working, disconnected)


async def cancel(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks and wait for their end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def is_visible_ascii(text: bytes) -> bool:
    """Whether `text` has at least one character and only visible ASCII characters."""
    return bool(text) and all(33 <= byte <= 126 for byte in text)
