"""The home directory of runs, also for a user without a name or a home directory (containers of OpenShift)."""

from __future__ import annotations

import os
from pathlib import Path


def default_root() -> str:
    """Return `$RAYMOE_HOME`, else `raymoe` in the home directory; `~/raymoe` if that directory is unknown."""
    if root := os.environ.get("RAYMOE_HOME"):
        return root
    try:
        return str(Path.home() / "raymoe")
    except RuntimeError:
        return "~/raymoe"  # --help shows it, and `expand` refuses it


def expand(path: str | Path) -> Path:
    """Return `path` with `~` expanded. Raises ValueError if the home directory is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{path} needs a home directory, and this user has none: set RAYMOE_HOME or HOME, or give an absolute path"
        ) from None
