"""The reference of all fields, from the docstrings in `sections.py`: the second half of `raymoe train --help`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap

from raymoe.config.sections import SECTIONS, Config


def describe(config: Config) -> str:
    """Return every field as an override with its value in `config`, followed by its description."""
    lines: list[str] = []
    for section, kind in SECTIONS.items():
        docs = _field_docs(kind)
        for item in dataclasses.fields(kind):
            value = getattr(getattr(config, section), item.name)
            lines.append(f"  {section}.{item.name}={'none' if value is None else value}")
            lines.extend(textwrap.wrap(docs[item.name], 96, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


def _field_docs(section: type) -> dict[str, str]:
    """Return the docstring under each field of a section, read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs
