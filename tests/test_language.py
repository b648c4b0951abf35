"""Words that the project does not use, and the standard terms to use instead, in code, prose and records."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import REPO_ROOT

BANNED = {
    r"greet(s|ed|ing|ings)?": "handshake",
    r"beats?": "heartbeat, or: is faster than",
    r"(say|says|said|saying)": "report, send, encode, state",
    r"(tell|tells|told|telling)": "report, send",
    r"(hear|hears|heard|hearing)": "receive, decode",
    r"pass(es|ed)? over": "skip",
    r"anew": "again, from step 0",
    r"(go|goes|going|gone|went) on": "continue, resume",
    r"(un)?seal(s|ed|ing)?": "finalize",
    r"settle[sd]?": "complete",
    r"sums? over (all )?ranks": "all-reduce",
    r"node's notice": "preemption notice",
    r"slow workers?": "straggler",
    r"fleets?": "cluster pool, Ray cluster",
    r"away": "remote, absent, removed",
    r"so many": "N",
    r"so long": "N seconds, indefinitely",
    r"for ever": "indefinitely",
    r"is none": "is invalid, does not exist",
    r"(whoever|nobody|somebody|everybody)": "any client that, no process",
    r"houses?": "repository",
    r"misdeeds?": "violations",
    r"plant(s|ed|ing)?": "inject",
    r"vouch(es|ed)?": "verify",
}
"""Pattern of whole words, in any case -> the terms to use."""

ALLOWED = {
    "raymoe/storage/run_folder.py": {"passed over", "anew", "slow worker"},  # names of events in records of version 0.1
    "raymoe/training/journal.py": {"tell"},  # of a file object
}
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".c", ".h"}
FOLDERS = ("raymoe", "jobs", "services", "dashboards", "tests")
WORDS = re.compile(
    r"(?<![A-Za-z0-9])(" + "|".join(f"(?:{word})" for word in BANNED) + r")(?![A-Za-z0-9])", re.IGNORECASE
)


def files() -> list[Path]:
    """Return the text files of the project, without golden files, generated ones and this one."""
    found = [p for f in FOLDERS for p in sorted((REPO_ROOT / f).rglob("*")) if p.suffix in SUFFIXES]
    found += [REPO_ROOT / name for name in ("README.md", "Makefile", "Dockerfile", "pyproject.toml", ".ci/run")]
    return [p for p in found if "golden" not in p.parts and p != Path(__file__).resolve()]


def banned_words(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line, word, terms to use) for each banned word. Parts of identifiers count as words."""
    for n, line in enumerate(text.splitlines(), 1):
        # `RowServer`, `row_server` -> `Row Server`, `row server`
        spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", line).replace("_", " ")
        for match in WORDS.finditer(spaced):
            if match[1].endswith("None"):  # `x is None`
                continue
            word = match[1].lower()
            terms = next(terms for pattern, terms in BANNED.items() if re.fullmatch(pattern, word))
            yield n, word, terms


@pytest.mark.parametrize("file", files(), ids=lambda path: str(path.relative_to(REPO_ROOT)))
def test_a_file_uses_standard_terms(file: Path) -> None:
    allowed = ALLOWED.get(str(file.relative_to(REPO_ROOT)), set())
    found = [
        f"line {n}: {word!r}: use {terms}"
        for n, word, terms in banned_words(file.read_text(errors="replace"))
        if word not in allowed
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("def greet(self):  # the house", ["greet", "house"]),
        ("class Greeting: for_ever = 1", ["greeting", "for ever"]),
        ("a heartbeat; essay; household; stellar; wholesale", []),
        ("It begins anew.", ["anew"]),
    ],
)
def test_banned_words_are_found(line: str, words: list[str]) -> None:
    assert [word for _, word, _ in banned_words(line)] == words
