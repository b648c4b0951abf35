"""Rows of jsonl, parquet, arrow and hub data: the columns that are read, and their conversion to documents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from raymoe.config import DataSection, expand
from raymoe.data.chat import CHAT_TEMPLATE, ChatTemplate, read_messages
from raymoe.data.document import Document

MESSAGES = "messages"
"""Column of conversations."""


def column(data: DataSection) -> str:
    """Return the column of the text or, for conversations, of the messages: `messages` unless `data.text_field` is set."""
    return MESSAGES if data.format == "chat" and data.text_field == "text" else data.text_field


def columns(present: Iterable[str], data: DataSection, place: str) -> list[str]:
    """Return the columns to read. Raises ValueError if one is missing."""
    wanted = {"data.text_field": column(data), "data.domain_field": data.domain_field}
    present = list(present)
    for option, name in wanted.items():
        if name and name not in present:
            chat = data.format == "text" and option == "data.text_field" and MESSAGES in present
            remedy = "set data.format=chat to train on conversations, or " if chat else ""
            raise ValueError(f"{place} has no {name!r}: {remedy}set {option} to one of {', '.join(map(repr, present))}")
    return list(dict.fromkeys(name for name in wanted.values() if name))


def template_text(data: DataSection) -> str:
    """Return the text of `data.chat_template`, or the default one. Raises FileNotFoundError or ValueError."""
    if not data.chat_template:
        return CHAT_TEMPLATE
    try:
        return expand(data.chat_template).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data.chat_template={data.chat_template} is not UTF-8: {error}") from None
    except OSError as error:
        raise FileNotFoundError(
            f"data.chat_template={data.chat_template} cannot be read ({error.strerror}): name a Jinja file, or leave it empty"
        ) from None


class RowReader:
    """Converts rows to documents as `data.format` requires."""

    def __init__(self, data: DataSection) -> None:
        """Raises FileNotFoundError or ValueError for a chat template that cannot be used."""
        self.data = data
        self.template: ChatTemplate | None = None
        if data.format == "chat":
            try:
                self.template = ChatTemplate(template_text(data))
            except ValueError as error:
                raise ValueError(f"data.chat_template={data.chat_template}: {error}") from None

    def document(self, row: dict[str, Any], domain: str, split: str | None, place: str) -> Document:
        """Return a row as a document. A null text is an empty document. Raises ValueError with the place."""
        name = column(self.data)
        if self.data.domain_field:
            domain = str(row[self.data.domain_field])
        if self.template:
            try:
                pieces = self.template.pieces(read_messages(row[name]))
            except ValueError as error:
                raise ValueError(f"{place}: {name!r}: {error}") from None
            document = Document(domain, split, "".join(piece.text for piece in pieces), pieces=pieces)
        else:
            text = row[name]
            if not isinstance(text, str | None):
                raise ValueError(f"{place}: {name!r} is {type(text).__name__}, not text: set data.text_field")
            document = Document(domain, split, text or "")
        try:
            document.text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place} has half a surrogate pair at character {error.start}: remove it") from None
        return document
