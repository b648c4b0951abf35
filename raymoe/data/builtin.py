"""The built-in corpus: real text in labelled domains from what is already installed, so that nothing is downloaded.

Files are read as text and parsed, never imported or run. The same lock gives the same corpus.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from itertools import filterfalse
from pathlib import Path

VERSION = 3
"""Raised when what is gathered changes."""

PACKAGES = (
    "torch",
    "ray",
    "numpy",
    "pyarrow",
    "datasets",
    "scipy",
    "matplotlib",
    "fsspec",
    "pandas",
    "huggingface_hub",
)
"""Distributions that the lock brings on every machine; their docstrings and source are read."""

CAPS = {
    "reference": 1_500_000,
    "docstrings": 3_500_000,
    "source": 3_500_000,
    "packages": 3_000_000,
    "licences": 1_500_000,
}
"""Most bytes of each domain."""

LEAST = 8_000_000
"""Bytes below which the corpus would be too small to learn from."""


def fingerprint() -> str:
    """What the corpus depends on: Python, the packages' versions and this file's rules."""
    versions = [f"{name}={_version(name)}" for name in PACKAGES]
    return f"builtin-{VERSION} python={sys.version_info[:3]} " + " ".join(versions)


def documents() -> Iterator[tuple[str, str]]:
    """(domain, text), without repeats, capped by domain. Raises ValueError if too little is installed."""
    sources = {
        "reference": _reference(),
        "docstrings": _docstrings(),
        "source": _source(),
        "packages": _packages(),
        "licences": _licences(),
    }
    seen: set[bytes] = set()
    found = dict.fromkeys(sources, 0)
    for domain, texts in sources.items():
        for text in texts:
            text = text.strip()
            digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
            if len(text) < 80 or digest in seen:
                continue
            if found[domain] + len(text) > CAPS[domain]:
                break
            seen.add(digest)
            found[domain] += len(text)
            yield domain, text
    if sum(found.values()) < LEAST:
        raise ValueError(
            f"the built-in corpus has only {sum(found.values()) / 1e6:.1f} MB ({found}): this Python lacks its standard "
            "library's sources or the locked packages; name a file or folder with data.path"
        )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


@cache
def _standard_library() -> tuple[Path, ...]:
    """Modules in order, without those that the build of this Python wrote."""
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "pydoc_data"}
    found: list[Path] = []
    for folder, folders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("config-"))
        chosen = (n for n in sorted(names) if n.endswith(".py") and not n.startswith("_sysconfigdata"))
        found += (Path(folder, name) for name in chosen)
    return tuple(found)


def _documented(path: Path) -> bool:
    """Whether a file gives its docstrings; the others give their source, so that no text is in two domains."""
    return hashlib.sha256("/".join(path.parts[-2:]).encode()).digest()[0] % 2 == 0


@cache
def _installed(name: str) -> tuple[Path, ...]:
    """Files of a distribution, in order."""
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        return ()
    skipped = {"test", "tests", "testing"}
    return tuple(Path(str(file.locate())) for file in sorted(files, key=str) if skipped.isdisjoint(file.parts))


def _modules(name: str) -> Iterator[Path]:
    return (path for path in _installed(name) if path.suffix == ".py")


def _parse(path: Path) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(_read(path))
        except (SyntaxError, ValueError):
            return None


def _docstrings_of(path: Path) -> str:
    """The docstrings of a module in its order, each under the name it documents."""
    parts: list[str] = []

    def visit(node: ast.stmt | ast.Module) -> None:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 40:
                parts.append(f"{getattr(node, 'name', path.stem)}\n{text}")
        for statement in getattr(node, "body", ()):
            visit(statement)

    if module := _parse(path):
        visit(module)
    return "\n\n".join(parts)


def _reference() -> Iterator[str]:
    """The language reference that `help()` shows, and the modules' own introductions."""
    topics = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    module = _parse(topics)
    for node in ast.walk(module) if module else ():
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def _docstrings() -> Iterator[str]:
    for name in PACKAGES:
        budget = CAPS["docstrings"] // len(PACKAGES)
        for path in filter(_documented, _modules(name)):
            text = _docstrings_of(path)
            if len(text) > budget:
                break
            budget -= len(text)
            yield text
    yield from map(_docstrings_of, filter(_documented, _standard_library()))


def _source() -> Iterator[str]:
    yield from map(_read, filterfalse(_documented, _standard_library()))


def _packages() -> Iterator[str]:
    for name in PACKAGES:
        budget = CAPS["packages"] // len(PACKAGES)
        for path in filterfalse(_documented, _modules(name)):
            text = _read(path)
            if len(text) > budget:
                break
            budget -= len(text)
            yield text


def _licences() -> Iterator[str]:
    """Licence and notice files of the same distributions."""
    words = ("licen", "notice", "copying", "authors", "copyright")
    plain = ("", ".txt", ".md", ".rst", ".apache", ".bsd")
    for path in (path for name in PACKAGES for path in _installed(name)):
        if any(word in path.name.lower() for word in words) and path.suffix.lower() in plain:
            yield _read(path)
