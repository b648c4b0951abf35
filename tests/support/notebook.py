"""The examples page, jobs/examples.ipynb, as a script."""

from __future__ import annotations

import json

from tests.support.paths import REPO_ROOT

EXAMPLES = REPO_ROOT / "jobs" / "examples.ipynb"


def code_of_examples() -> str:
    """Return the code cells of the page in order, as one Python script."""
    cells = json.loads(EXAMPLES.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code") + "\n"
