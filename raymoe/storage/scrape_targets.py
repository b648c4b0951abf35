"""Scrape targets for Prometheus' file-based service discovery."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from raymoe.storage.files import replace_file


def write_targets(path: Path, targets: Iterable[tuple[str, int, Mapping[str, str]]]) -> None:
    """Write (host, port, labels) of each scraped process, by atomic rename. IPv6 addresses get brackets."""
    entries = [
        {"targets": [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"], "labels": {"job": "raymoe", **labels}}
        for host, port, labels in targets
    ]
    replace_file(path, json.dumps(entries, indent=1))
