"""The router whose choices the selection bias forces most, as a line of a summary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def most_forced(measures: Mapping[str, Any]) -> str:
    """Return the layer and level with the largest forced share; empty without a router. See `routing_measures`."""
    levels: Mapping[str, Sequence[float | None] | None] = measures.get("bias_forced_share") or {}
    shares = [
        (share, layer, level)
        for level, values in levels.items()
        for layer, share in enumerate(values or ())
        if share is not None
    ]
    if not shares:
        return ""
    share, layer, level = max(shares, key=lambda found: found[0])
    return f"the selection bias forces at most {share:.1%} of the choices of a router: layer {layer}, {level}"


def most_forced_of_run(records: Iterable[Mapping[str, Any]]) -> str:
    """Return `most_forced` of the last validation that measured routing, with its step; empty without one."""
    found = ""
    for record in records:
        if record.get("kind") == "validation" and (text := most_forced(record)):
            found = f"{text} (validation of step {record['step']})"
    return found
