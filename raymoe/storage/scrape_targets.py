"""Scrape targets for Prometheus' file discovery."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_targets(path: Path, targets: Iterable[tuple[str, int, Mapping[str, str]]]) -> None:
    """Write (host, port, labels) of each worker for Prometheus's file-based discovery, by atomic rename."""
    entries = [
        {"targets": [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"], "labels": {"job": "raymoe", **labels}}
        for host, port, labels in targets
    ]
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(entries, indent=1))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
