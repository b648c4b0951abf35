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
    """A file is missing, damaged or in another format; `reason` describes the difference."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


# Writing


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def durable_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write. It is flushed to disk and renamed to `path`; on failure it is removed.

    Raises OSError with the errno of the cause and the name of `path`.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.chmod(0o644)  # safetensors grants access to the owner only; another user may serve the file
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
    code = re.search(r"os error (\d+)", str(error))  # a SafetensorError has no errno
    return int(code[1]) if code else errno.EIO


def replace_file(path: Path, content: str) -> None:
    """Replace a small file atomically: a reader sees the old or the new content. Does not flush it to disk.

    Characters that UTF-8 cannot encode become `?`. On failure the old content stays.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(content, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` durably. Raises ValueError if it is not JSON; NaN and infinity are not."""
    try:
        text = json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"the content of {path.name} is not JSON: {error}") from error
    if len(text) > JSON_LIMIT:
        raise ValueError(f"{path.name} would be larger than {JSON_LIMIT >> 20} MiB")
    with durable_write(path) as partial:
        partial.write_bytes(text)


# Reading


def read_json(path: Path, error: type[CorruptFile] = CorruptFile) -> dict[str, Any]:
    """Return the JSON object in a file of at most JSON_LIMIT bytes. Raises `error`; a repeated key is an error."""

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
