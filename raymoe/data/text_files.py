"""Plain and gzip-compressed text files: opened as UTF-8, with errors that name the encoding and the conversion."""

from __future__ import annotations

import codecs
import gzip
import io
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

GZIP = ".gz"
HEAD = 4096
"""Bytes of a file that are tested for an encoding other than UTF-8."""
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose little-endian mark is a prefix of this one
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order marks of other encodings. The names make iconv read and drop the mark."""


def inner_name(file: Path) -> str:
    """Return the name of a file without .gz."""
    return file.name[: -len(GZIP)] if file.suffix.lower() == GZIP else file.name


def open_text(file: Path) -> TextIO:
    """Open a text file, decompressed if its name ends in .gz, without a UTF-8 byte order mark.

    Raises ValueError, with the command that converts it, for UTF-16 and UTF-32.
    """
    binary = _open_binary(file)
    try:
        if found := foreign_encoding(binary.read(HEAD)):
            encoding, evidence = found
            raise ValueError(
                f"{file} is {encoding} ({evidence}), not UTF-8: convert it with: {conversion(file, encoding)}"
            )
        binary.seek(0)
    except BaseException:
        binary.close()
        raise
    return io.TextIOWrapper(binary, encoding="utf-8-sig", newline="\n")


def _open_binary(file: Path) -> BinaryIO:
    return gzip.open(file, "rb") if file.suffix.lower() == GZIP else file.open("rb")  # type: ignore[return-value]


def foreign_encoding(head: bytes) -> tuple[str, str] | None:
    """Return (encoding for iconv, evidence) if the first bytes of a text are UTF-16 or UTF-32; None otherwise."""
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding, f"byte order mark {mark.hex(' ').upper()}"
    even, odd = head[0::2], head[1::2]
    if len(odd) >= 4:  # every second byte of ASCII text is 0 in UTF-16
        for encoding, low, high in (("UTF-16LE", even, odd), ("UTF-16BE", odd, even)):
            if high.count(0) > 0.4 * len(high) and not low.count(0):
                return encoding, "every second byte is 0, without a byte order mark"
    return None


def conversion(file: Path, encoding: str) -> str:
    """Return the shell command that writes a UTF-8 copy beside `file`."""
    source = shlex.quote(str(file))
    target = shlex.quote(str(file.with_name(f"utf8-{inner_name(file)}")))
    if file.suffix.lower() == GZIP:
        return f"gzip -dc {source} | iconv -f {encoding} -t UTF-8 > {target}"
    return f"iconv -f {encoding} -t UTF-8 {source} > {target}"


@contextmanager
def decoding_errors(file: Path) -> Iterator[None]:
    """Turn errors of decoding or decompressing `file` into ValueErrors with a remedy."""
    try:
        yield
    except UnicodeDecodeError:
        raise ValueError(
            f"{file} is not UTF-8 at byte {_first_bad_byte(file)}: convert it. If it is Latin-1: {conversion(file, 'LATIN1')}"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is not a readable gzip file ({error}): copy or download it again") from None


def _first_bad_byte(file: Path) -> int:
    """Return the position in the decompressed file of the first byte that is not UTF-8."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    with _open_binary(file) as binary:
        while block := binary.read(1 << 20):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return position - pending + error.start
            position += len(block)
    return position - len(decoder.getstate()[0])
