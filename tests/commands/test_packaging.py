"""The package: versions, the console script, and files that the wheel must have."""

from __future__ import annotations

import json
import re
import tomllib

import yaml

import raymoe
from raymoe.serving.default_config import default_config
from tests.support.notebook import EXAMPLES, code_of_examples
from tests.support.paths import REPO_ROOT

PROJECT = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())


def test_the_version_is_the_packages() -> None:
    assert PROJECT["project"]["version"] == raymoe.__version__


def test_the_console_script_is_the_command_line() -> None:
    assert PROJECT["project"]["scripts"] == {"raymoe": "raymoe.__main__:main"}


def test_torch_is_new_enough_for_ranks_without_grains() -> None:
    """torch 2.9 fails in the backward pass of a rank that has 0 rows."""
    (requirement,) = (line for line in PROJECT["project"]["dependencies"] if line.startswith("torch"))
    lower = re.fullmatch(r"torch>=(\d+)\.(\d+)", requirement)
    assert lower and (int(lower[1]), int(lower[2])) >= (2, 10)
    locked = re.search(r'^name = "torch"\nversion = "(\d+)\.(\d+)', (REPO_ROOT / "uv.lock").read_text(), re.MULTILINE)
    assert locked and (int(locked[1]), int(locked[2])) >= (2, 10)
    assert f'{{ name = "torch", specifier = ">={lower[1]}.{lower[2]}" }}' in (REPO_ROOT / "uv.lock").read_text()


def test_the_default_serve_config_is_that_of_the_file() -> None:
    """`raymoe serve` works from a wheel, `serve deploy services/raymoe.yaml` from a checkout."""
    assert default_config() == yaml.safe_load((REPO_ROOT / "services" / "raymoe.yaml").read_text())


def test_every_file_that_is_not_python_is_package_data() -> None:
    files = [p for p in (REPO_ROOT / "raymoe").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for file in files:
        package = ".".join(file.parent.relative_to(REPO_ROOT).parts)
        assert any(file.match(pattern) for pattern in data.get(package, [])), file
    assert files


def test_the_page_of_examples_compiles_and_has_no_outputs() -> None:
    """The wheel's test runs the page."""
    compile(code_of_examples(), str(EXAMPLES), "exec")
    cells = json.loads(EXAMPLES.read_text())["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")
