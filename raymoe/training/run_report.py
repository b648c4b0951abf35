"""Write `report.html` of a run from the records in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raymoe.report.page import render
from raymoe.storage.files import CorruptFile, read_json, replace_file
from raymoe.storage.run_folder import RunFolder, read_records


def write_report(run: Path) -> Path:
    """Write `report.html` into the folder of a run, by atomic rename; return its path.

    Raises FileNotFoundError if config.json is missing, ValueError if it cannot be read.
    """
    folder = RunFolder(run)
    about = _read_config(folder.config)
    if folder.metrics.is_file():
        about["ended"] = folder.metrics.stat().st_mtime
    records = [read_records(path) for path in (folder.metrics, folder.plans, folder.serving)]
    page = render(about, *records, comparison=_read_comparison(folder.comparison))
    replace_file(folder.report, page)
    return folder.report


def _read_comparison(path: Path) -> dict[str, Any] | None:
    """Return the comparison; None for a missing or damaged file, without which the report is still complete."""
    try:
        return read_json(path) if path.is_file() else None
    except CorruptFile:
        return None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name the folder of a run")
    try:
        about = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); restore the file") from None
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
        raise ValueError(f"{path} has no object 'config'; name the folder of a run")
    return about
