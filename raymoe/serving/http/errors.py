"""Errors of the HTTP API, and the OpenAI-format response that reports each of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from raymoe.serving.engine.engine import QueueFull

log = logging.getLogger(__name__)


class ClientError(ValueError):
    """A request that the client must change (HTTP 4xx)."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        code: str | None = None,
        status: int = 400,
        reason: str = "malformed",
    ) -> None:
        """param: field of the body that is invalid. reason: one of `metrics.REJECTIONS`."""
        super().__init__(message)
        self.param, self.code, self.status, self.reason = param, code, status, reason


class Unavailable(Exception):
    """The service cannot process the request now; a client may retry after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class InternalError(Exception):
    """The service failed, and the cause is already in the log."""


@dataclass(frozen=True)
class ErrorResponse:
    """Status and JSON body of an error."""

    status: int
    body: dict[str, Any]
    reason: str | None = None
    """Label of `requests_rejected_total`. None: the error is not counted as a rejection."""
    retry_after_s: float | None = None


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Exception, queue_retry_s: float) -> ErrorResponse:
    """Convert an exception to a response. Logs exceptions that are not part of the API.

    queue_retry_s: value of Retry-After when the queue is full.
    """
    if isinstance(error, ClientError):
        body = error_body(str(error), "invalid_request_error", error.param, error.code)
        return ErrorResponse(error.status, body, error.reason)
    if isinstance(error, QueueFull):
        body = error_body(f"The server is full: {error}", "server_error", code="queue_full")
        return ErrorResponse(503, body, "full", queue_retry_s)
    if isinstance(error, Unavailable):
        body = error_body(f"Unavailable: {error}", "server_error", code="unavailable")
        return ErrorResponse(503, body, "unavailable", error.retry_after_s)
    if not isinstance(error, InternalError):
        log.error("a request failed", exc_info=error)
    return ErrorResponse(500, error_body("Internal server error", "server_error"))


def shorten(text: str) -> str:
    """Return at most 200 characters of a client's text, for an error message."""
    return text if len(text) <= 200 else f"{text[:200]}…"
