"""Fields of configs by `section.field`, to compare runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLACE = ("run.name", "run.root", "data.cache", "train.resume", "train.metrics_host", "train.tracker")
"""Fields that do not change the result of a run."""


def result_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that change the result of a run, by `section.field`. `config`: of `Config.to_dict`."""
    sections = {name: fields for name, fields in config.items() if isinstance(fields, Mapping)}
    found = {f"{name}.{key}": value for name, fields in sections.items() for key, value in fields.items()}
    return {key: value for key, value in found.items() if key not in PLACE}
