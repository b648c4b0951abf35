"""The parts that all commands share: the parser, the message of a refusal, and the names of other commands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REFUSED = 2
"""Exit status of a command that refuses its arguments or input before it starts to work."""


def new_parser(description: str | None, program: str | None) -> argparse.ArgumentParser:
    """Return an empty parser. `program` is the name in usage and errors; None: the name of the started file."""
    return argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def refuse(program: str, error: object) -> int:
    """Print `program: error` on stderr, and return the exit status REFUSED."""
    print(f"{program}: {error}", file=sys.stderr)
    return REFUSED


def check_folder(option: str, file: Path | None) -> None:
    """Raise FileNotFoundError if an option names a file to write in a folder that does not exist."""
    if file is not None and not (folder := file.absolute().parent).is_dir():
        raise FileNotFoundError(f"{option}: the folder {folder} does not exist: create it")


def sibling(program: str, command: str) -> str:
    """Return the command line of another command, started as `program` was: by `raymoe` or from a checkout."""
    return f"raymoe {command}" if program.startswith("raymoe") else f"python jobs/{command}.py"
