"""Write a run's `report.html` from the records in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raymoe.report.page import render
from raymoe.storage.files import replace_file
from raymoe.storage.run_folder import RunFolder, read_records


def write_report(run: Path) -> Path:
    """Write `report.html` into the folder of a run, by atomic rename; return its path.

    Raises FileNotFoundError if config.json is missing, ValueError if it cannot be read.
    """
    folder = RunFolder(run)
    page = render(_read_config(folder.config), *map(read_records, (folder.metrics, folder.plans, folder.serving)))
    replace_file(folder.report, page)
    return folder.report


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a report is made from the folder of a run")
    try:
        about = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): restore it, or write the report of another run") from None
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
        raise ValueError(f"{path} has no object 'config': a report is made from the folder of a run")
    return about
