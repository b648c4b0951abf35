"""HTML elements of a report: lists of facts, tables and sections. All text is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

LONG = 60
"""Characters of a fact beyond which it takes a whole row."""


def terms(facts: Mapping[str, str]) -> str:
    """Return a definition list of facts; empty for no facts."""
    items = (
        f"<div{_row(value)}><dt>{html.escape(term)}</dt><dd>{html.escape(value)}</dd></div>"
        for term, value in facts.items()
    )
    return f"<dl>{''.join(items)}</dl>" if facts else ""


def _row(value: str) -> str:
    return ' class="long"' if len(value) > LONG else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of text cells."""
    columns = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{columns}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>" if text else ""


def details(summary: str, content: str, *, is_open: bool = False, wide: bool = False) -> str:
    """Return a section that the reader can open and close. `content` is HTML."""
    opened, style = " open" if is_open else "", ' class="wide"' if wide else ""
    return f"<details{style}{opened}><summary>{html.escape(summary)}</summary>{content}</details>"


def section(title: str, figures: Sequence[str], lead: str = "", content: str = "") -> str:
    """Return a section, or nothing if it has neither figures nor `content` (HTML before the figures)."""
    if not any(figures) and not content:
        return ""
    drawn = f'<div class="figures">{"".join(figures)}</div>' if any(figures) else ""
    return f"<section><h2>{html.escape(title)}</h2>{paragraph(lead)}{content}{drawn}</section>"
