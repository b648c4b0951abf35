"""Overrides `section.field=value`: text to typed values, applied to a config."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from raymoe.config.checks import check_number, hint, require
from raymoe.config.sections import SECTIONS, Config

UNSET = ("none", "null", "~", "")
"""Values that leave an optional field unset."""

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

KEYS = tuple(f"{section}.{field.name}" for section, kind in SECTIONS.items() for field in dataclasses.fields(kind))
"""All keys that an override may set."""


def override(config: Config, assignments: Iterable[str]) -> Config:
    """Return `config` with each `section.field=value` applied. Values are checked after all are applied.

    Raises ValueError for an unknown key, a value of the wrong type, or a value out of range.
    """
    changes: dict[str, dict[str, Any]] = {}
    for item in assignments:
        key, equals, text = item.partition("=")
        section, dot, name = key.partition(".")
        if not equals or not dot:
            raise ValueError(f"{item!r} is not an override: write section.field=value, for example train.steps=100")
        check_key(key)
        values = changes.setdefault(section, {})
        if key == "train.workers":
            text, both, most = text.partition(",")
            values["max_workers"] = _parse(key, int, most) if both else 0
        values[name] = _parse(key, hints(section)[name], text)
    sections: dict[str, Any] = {s: replace(getattr(config, s), **values) for s, values in changes.items()}
    return replace(config, **sections)


def check_key(key: str) -> None:
    """Raise ValueError for an unknown `section.field`, with the nearest known key."""
    if key not in KEYS:
        raise ValueError(f"unknown key {key!r}" + hint(key, KEYS))


def from_dict(data: Any) -> Config:
    """Return the config that `Config.to_dict` has turned into `data`.

    Raises ValueError for an unknown section or key, and for a value of the wrong type.
    """
    if not isinstance(data, dict):
        raise ValueError("a config must be a JSON object")
    sections: dict[str, Any] = {}
    for section, values in data.items():
        if section == "preset":
            require(type(values) is str, "preset", values, "expected str")
            sections["preset"] = values
            continue
        if section not in SECTIONS or not isinstance(values, dict):
            raise ValueError(f"unknown config section {section!r}")
        values = upgrade(section, values)
        for name, value in values.items():
            check_key(f"{section}.{name}")
            _check_type(f"{section}.{name}", hints(section)[name], value)
        sections[section] = SECTIONS[section](**values)
    return Config(**sections)


def upgrade(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a section with those of version 0.1 replaced: a negative `train.aux_loss` was unset."""
    old = values.get("aux_loss")
    if section == "train" and isinstance(old, (int, float)) and old < 0:
        return values | {"aux_loss": None}
    return values


def hints(section: str) -> dict[str, Any]:
    """Return the type of each field of a section."""
    return typing.get_type_hints(SECTIONS[section])


def _optional(kind: Any) -> tuple[Any, bool]:
    """Return the type without None, and whether None is allowed."""
    if not isinstance(kind, types.UnionType):
        return kind, False
    (inner,) = (part for part in typing.get_args(kind) if part is not type(None))
    return inner, True


def _parse(name: str, kind: Any, text: str) -> Any:
    """Return `text` as a value of the annotated type `kind`. Raises ValueError with the name of the field."""
    kind, optional = _optional(kind)
    if optional and text.lower() in UNSET:
        return None
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        require(text in allowed, name, text, f"one of {', '.join(allowed)}")
        return text
    if kind is bool:
        require(text.lower() in BOOLEANS, name, text, "true or false")
        return BOOLEANS[text.lower()]
    if kind is str:
        return text
    try:
        value = kind(text)
    except ValueError:
        expected = kind.__name__ + (" or none" if optional else "")
        raise ValueError(f"{name}={text!r} is not allowed: expected {expected}") from None
    check_number(name, value)
    return value


def _check_type(name: str, kind: Any, value: object) -> None:
    """Raise ValueError unless `value`, read from JSON, has the annotated type `kind`."""
    kind, optional = _optional(kind)
    if optional and value is None:
        return
    if typing.get_origin(kind) is Literal:
        require(value in typing.get_args(kind), name, value, f"one of {', '.join(typing.get_args(kind))}")
    elif kind is float:
        require(type(value) in (int, float), name, value, "expected float")
    else:
        require(type(value) is kind, name, value, f"expected {kind.__name__}")
    if isinstance(value, (int, float)):
        check_number(name, value)
