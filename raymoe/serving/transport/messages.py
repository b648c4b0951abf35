"""Messages between an api and a trunk, and their encoding: a 4-byte length, then JSON.

The handshake carries the version of these messages (`handshake.MAGIC`): both sides of a connection have the same.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from raymoe.serving.engine.request import Increment, Request

MAX_MESSAGE_BYTES = 64 << 20
LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Submit:
    """Start a request. `key`: unique among the active requests of the stream."""

    key: int
    request: Request
    type: Literal["submit"] = "submit"


@dataclass(frozen=True)
class Cancel:
    """End a request."""

    key: int
    type: Literal["cancel"] = "cancel"


@dataclass(frozen=True)
class Increments:
    """The increments of one step to all completions of the stream."""

    increments: tuple[Increment, ...]
    type: Literal["increments"] = "increments"


@dataclass(frozen=True)
class Rejection:
    """A request that the engine did not accept. `full`: another engine may."""

    key: int
    full: bool
    reason: str
    type: Literal["rejection"] = "rejection"


@dataclass(frozen=True)
class Heartbeat:
    """Sent at a fixed interval, so that silence means failure."""

    type: Literal["heartbeat"] = "heartbeat"


ToTrunk = Submit | Cancel
ToApi = Increments | Rejection | Heartbeat

_CONFIG = ConfigDict(ser_json_inf_nan="constants")  # a log-probability may be -inf
_TO_TRUNK: TypeAdapter[ToTrunk] = TypeAdapter(Annotated[ToTrunk, Field(discriminator="type")], config=_CONFIG)
_TO_API: TypeAdapter[ToApi] = TypeAdapter(Annotated[ToApi, Field(discriminator="type")], config=_CONFIG)
_REQUEST = TypeAdapter(Request)


def check_request(request: Request) -> None:
    """Raises ValueError with the field for a request whose values have wrong types."""
    try:
        _REQUEST.validate_json(_REQUEST.dump_json(request, warnings="none"), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"{field}={first['input']!r} is not allowed: {first['msg']}") from None


def encode_to_trunk(message: ToTrunk) -> bytes:
    return _framed(_TO_TRUNK.dump_json(message))


def encode_to_api(message: ToApi) -> bytes:
    return _framed(_TO_API.dump_json(message))


def decode_to_trunk(content: bytes) -> ToTrunk:
    """Raises ValueError."""
    return _TO_TRUNK.validate_json(content, strict=True)


def decode_to_api(content: bytes) -> ToApi:
    """Raises ValueError."""
    return _TO_API.validate_json(content, strict=True)


def _framed(content: bytes) -> bytes:
    return LENGTH.pack(len(content)) + content


async def read_message(reader: asyncio.StreamReader) -> bytes | None:
    """Return the content of the next message, None at the end of the stream.

    Raises ValueError for a message above `MAX_MESSAGE_BYTES`, ConnectionResetError for one that ends early.
    """
    try:
        (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        if size > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {size} bytes: at most {MAX_MESSAGE_BYTES}")
        return await reader.readexactly(size)
    except asyncio.IncompleteReadError as error:
        if error.partial or error.expected != LENGTH.size:
            raise ConnectionResetError("the connection closed in the middle of a message") from None
        return None
