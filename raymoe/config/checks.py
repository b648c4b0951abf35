"""Checks of single values, and the wording of their errors."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

LARGEST = 1 << 53
"""Largest magnitude of a number in a config: float64 represents every integer up to it."""


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise ValueError with the field, its value and the allowed values, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}={value!r} is not allowed: {allowed}")


def check_field(owner: object, name: str, allowed: str, within: bool) -> None:
    """Raise ValueError with the field `name` of `owner`, its value and the `allowed` values, unless `within` is true."""
    require(within, name, getattr(owner, name), allowed)


def check_positive(section: object, prefix: str, *names: str) -> None:
    """Raise ValueError unless all named fields of `section` are greater than 0."""
    for name in names:
        value = getattr(section, name)
        require(value > 0, f"{prefix}.{name}", value, "must be greater than 0")


def check_number(name: str, value: float) -> None:
    """Raise ValueError for a number that is not finite, or too large to be exact in float64."""
    require(math.isfinite(value), name, value, "must be finite")
    require(abs(value) <= LARGEST, name, value, "at most 2^53")


def hint(key: str, known: Iterable[str]) -> str:
    """Return `: did you mean 'x'?` for the known key nearest to `key`, or an empty string."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.4)
    return f": did you mean {near[0]!r}?" if near else ""
