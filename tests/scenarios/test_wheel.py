"""The wheel in a fresh environment, outside the checkout: the command line, and the page of examples."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.notebook import code_of_examples
from tests.support.paths import REPO_ROOT

pytestmark = pytest.mark.soak

SMALL = ["train.workers=1", "train.steps=4", "train.log_every=2", "train.validate_windows=8"]


class Environment:
    """A virtual environment with raymoe's wheel. Its other packages are those of this environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "runs"
        self.work = folder / "work"
        self.work.mkdir()
        self.bin = folder / "env" / "bin"
        subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
        (wheel,) = self.build().glob("*.whl")
        pip = [self.bin / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
        subprocess.run(pip, check=True)
        # A folder in a .pth file is a path only: its own .pth files, and so the editable raymoe, are not processed.
        shared = sysconfig.get_paths()["purelib"]
        (site,) = (folder / "env" / "lib").glob("python*/site-packages")
        (site / "shared.pth").write_text(f"{shared}\n")

    def build(self) -> Path:
        """Build the wheel from a copy of the sources, and return its folder."""
        source, target = self.folder / "source", self.folder / "dist"
        source.mkdir()
        shutil.copytree(REPO_ROOT / "raymoe", source / "raymoe", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(REPO_ROOT / name, source)
        code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, target], cwd=source, check=True, capture_output=True)
        return target

    def run(self, *command: str, status: int = 0) -> str:
        """Run a program of the environment outside the checkout; return its output."""
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS", "VIRTUAL_ENV")}
        environment |= {"RAYMOE_HOME": str(self.root), "RAY_ADDRESS": "local"}
        done = subprocess.run(
            [self.bin / command[0], *command[1:]], cwd=self.work, env=environment, capture_output=True, text=True,
            timeout=600,
        )  # fmt: skip
        assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("wheel"))


def test_the_package_is_the_wheels_and_complete(environment: Environment) -> None:
    code = "import raymoe, pathlib; print(pathlib.Path(raymoe.__file__).parent)"
    package = Path(environment.run("python", "-c", code).strip())
    assert package.is_relative_to(environment.folder / "env")
    ours = {p.relative_to(REPO_ROOT / "raymoe") for p in (REPO_ROOT / "raymoe").rglob("*") if p.is_file()}
    missing = {p for p in ours if not (package / p).exists() and "__pycache__" not in p.parts}
    assert not missing


def test_help_and_refusals(environment: Environment) -> None:
    assert "commands:" in environment.run("raymoe", "--help")
    assert environment.run("raymoe", "--version").startswith("raymoe ")
    assert "did you mean 'train.steps'?" in environment.run("raymoe", "train", "tiny", "train.step=3", status=2)


def test_train_repeat_export_and_generate(environment: Environment) -> None:
    """Each command starts from the files of the command before it."""
    output = environment.run("raymoe", "train", "tiny", "run.name=first", *SMALL)
    assert "next    raymoe export first" in output
    config = environment.root / "first" / "config.yaml"
    again = environment.run("raymoe", "train", "--config", str(config), "run.name=again", "train.steps=2")
    assert "next    raymoe export again" in again
    saved = (environment.root / "again" / "config.yaml").read_text()
    assert saved.replace("steps: 2\n", "steps: 4\n") == config.read_text()
    assert "raymoe evaluate" in environment.run("raymoe", "export", "first", "--tokens", "2000")
    text = environment.run("raymoe", "generate", "first", "This license", "--max-tokens", "4", "--temperature", "0")
    assert text.startswith("This license")
    refused = environment.run("raymoe", "generate", "first", "word " * 1000, status=2)
    assert refused.startswith("raymoe generate: This model's maximum context length is 128 tokens.")


def test_the_page_of_examples_runs(environment: Environment) -> None:
    script = environment.work / "examples.py"
    script.write_text(code_of_examples())
    assert "maximum context length" in environment.run("python", str(script))
