"""README.md: its commands parse, its files exist, its words are those of the glossary, and CI runs the tests."""

from __future__ import annotations

import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import pytest

import raymoe
from raymoe.__main__ import COMMANDS
from raymoe.config import override, preset
from tests.support.paths import REPO_ROOT


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (REPO_ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def module_of(path: str) -> ModuleType:
    """Return the module with the parser of `jobs/X.py` or the folder `jobs/X`."""
    assert (REPO_ROOT / path).exists()
    name = Path(path).stem
    if (REPO_ROOT / path).is_dir():
        return import_module(f"jobs.{name}.__main__")
    return import_module(f"raymoe.commands.{name}" if name in COMMANDS else f"jobs.{name}")


def parses(module: ModuleType, words: list[str]) -> None:
    """Assert that the module's parser takes the words, and that overrides of a run are valid."""
    arguments = module.parser().parse_args(words)
    if module.__name__ == "raymoe.commands.train":
        override(preset(arguments.preset or "small"), arguments.overrides)


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 8
    assert {"make demo", "make test"} <= set(commands())


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_readme_is_one_that_works(line: str) -> None:
    words = shlex.split(line)
    if "--" in words:
        assert words[:3] == ["ray", "job", "submit"]
        words = words[words.index("--") + 1 :]
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (REPO_ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[0] in ("python", ".venv/bin/python"):
        module = module_of(words[1])
        if "--help" in words:
            assert "--help" in module.parser().format_help()
            return
        parses(module, words[2:])
    elif words[0] in ("raymoe", ".venv/bin/raymoe"):
        assert words[1] in ("--help", *COMMANDS)
        if "--help" not in words:
            parses(module_of(f"jobs/{words[1]}.py"), words[2:])
    elif words[0] == "serve":
        assert words[1:] in (["status"], ["shutdown"]) or (
            words[1] in ("deploy", "run") and (REPO_ROOT / words[2]).is_file()
        )
    elif words[0] == "curl":
        assert re.search(
            rf'"{urlsplit(words[1]).path.removeprefix("/v1")}"',
            (REPO_ROOT / "raymoe/serving/http/server.py").read_text(),
        )
        assert "prompt" in json.loads(words[words.index("-d") + 1])
    elif words[:2] == ["ray", "get-auth-token"]:
        assert words[2:] == ["--generate"]
    elif words[0] == "kubectl":
        assert words[1:3] == ["apply", "-f"] and (REPO_ROOT / words[3]).is_file()
    elif words[0] == "docker":
        assert words[1] == "build" and (REPO_ROOT / words[-1] / "Dockerfile").is_file()
    elif words[0] == "ray" and words[1] in ("up", "exec"):
        assert (REPO_ROOT / words[2]).is_file()
        assert all((REPO_ROOT / script).is_file() for script in re.findall(r"python (\S+)", " ".join(words[3:])))
    elif words[:2] == ["ray", "job"]:
        assert words[2] in ("stop", "logs", "status")
    else:
        assert words[0] in ("git", "cd", "export", "source"), f"nothing checks {line!r}"


def test_links_and_files_exist() -> None:
    text = (REPO_ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)
    files = re.findall(r"`((?:raymoe|jobs|services|dashboards|tests)/[\w./]*)`", text)
    assert len(links) > 1 and len(files) > 15
    assert [path for path in [*links, *files] if not (REPO_ROOT / path).exists()] == []


def test_the_words_are_those_of_the_glossary() -> None:
    glossary = (raymoe.__doc__ or "").partition("Glossary\n")[2].partition("\n\n")[0]
    words = dict(re.findall(r"^    (\w+)\s{2,}(.+)$", glossary, re.MULTILINE))
    table = (REPO_ROOT / "README.md").read_text().partition("## Words")[2]
    rows = dict(re.findall(r"^\| (\w+) \| (.+) \|$", table, re.MULTILINE))
    rows.pop("word")
    assert len(words) > 10 and rows == words


def test_ci_runs_check_test_and_soak() -> None:
    script = (REPO_ROOT / ".ci" / "run").read_text()
    assert all(f"make {target}" in script for target in ("check", "test", "soak"))
