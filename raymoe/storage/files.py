"""Durable and atomic writes, and bounded reads, of small files."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

JSON_LIMIT = 64 << 20
"""Maximum size in bytes of a JSON file that is read or written."""


class CorruptFile(ValueError):
    """`file` is not what it should be, for the `reason` given."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


# Writing


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def durable_write(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` once it is on the disk; on failure it is removed.

    Raises OSError with the cause's errno, naming `path`.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.chmod(0o644)  # safetensors writes for the owner alone; another user may serve
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        code = _errno(error)
        raise OSError(
            code, f"cannot write {path} ({os.strerror(code)}): check the folder's free space and permissions"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _errno(error: OSError | SafetensorError) -> int:
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    code = re.search(r"os error (\d+)", str(error))  # safetensors has no errno of its own
    return int(code[1]) if code else errno.EIO


def replace_file(path: Path, content: str) -> None:
    """Replace a small file atomically: a reader sees the old or the new content. Not synced to disk."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(content)
    os.replace(temporary, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` durably. Raises ValueError when it is not JSON (NaN and infinity are not)."""
    try:
        text = json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name} cannot hold what it was given: {error}") from error
    if len(text) > JSON_LIMIT:
        raise ValueError(f"{path.name} would be larger than {JSON_LIMIT >> 20} MiB")
    with durable_write(path) as partial:
        partial.write_bytes(text)


# Reading


def read_json(path: Path, error: type[CorruptFile] = CorruptFile) -> dict[str, Any]:
    """The JSON object in a file of bounded size, whose objects name each key once."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            raise ValueError("a key occurs twice")
        return value

    try:
        with path.open("rb") as file:
            text = file.read(JSON_LIMIT + 1)
    except OSError as cause:
        raise error(path, f"cannot be read: {cause.strerror}") from cause
    if len(text) > JSON_LIMIT:
        raise error(path, f"is larger than {JSON_LIMIT >> 20} MiB")
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as cause:
        raise error(path, f"is not valid JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise error(path, "is not a JSON object")
    return value
