"""Check what commonly goes wrong before a long run, and say what to do about it.

    raymoe doctor
    raymoe doctor --root /mnt/raymoe --json doctor.json
    ray job submit --working-dir . -- python jobs/doctor.py

Each node of the Ray that is running is asked, one line a check: `ok|warn|fail  name  what was seen  -> what to do`.
Without a running Ray a local one is started, and ended. Exit status: 0 nothing failed, 1 something did, 2 refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from raymoe.commands.entry import new_parser
from raymoe.config import default_root, override, preset


def parser(program: str | None = None) -> argparse.ArgumentParser:
    parse = new_parser(__doc__, program)
    parse.add_argument("--root", default=default_root(), help="run.root of the run to come (default: %(default)s)")
    parse.add_argument("--json", type=Path, help="write the checks to this file, too")
    return parse


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    parse = parser(program)
    arguments = parse.parse_args(words)
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        print(f"{parse.prog}: there is no folder {arguments.json.absolute().parent} for --json", file=sys.stderr)
        return 2
    try:
        override(preset("tiny"), [f"run.root={arguments.root}"])
    except ValueError as error:
        print(f"{parse.prog}: {error}", file=sys.stderr)
        return 2
    from raymoe.ops.ray_connection import connect, find_ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        target = find_ray(os.environ)
        print(f"ray         {target}", flush=True)
        print(f"ray         {connect(target, cpus=2, name='doctor')}", flush=True)
    except (ValueError, ConnectionError) as error:
        print(f"{parse.prog}: {error}", file=sys.stderr)
        return 2
    from raymoe.ops.doctor import examine
    from raymoe.ops.doctor_checks import exit_status

    found = examine(str(Path(arguments.root).expanduser().absolute()))
    for check in found:
        print(check)
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(check) for check in found], indent=1) + "\n")
    return exit_status(found)


if __name__ == "__main__":
    sys.exit(main())
