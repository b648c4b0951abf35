"""Check a Ray cluster for what commonly fails before a long run, with the remedy.

    raymoe doctor
    raymoe doctor --root /mnt/raymoe --json doctor.json
    ray job submit --working-dir . -- python jobs/doctor.py

Prints one line per check of all nodes: `ok|warn|fail  name  observation  -> remedy`. Uses the Ray at RAY_ADDRESS,
else the one on this machine, else a local one that ends with the command; takes about half a minute.
Exit status: 0 no check failed, 1 a check failed, 2 refused (bad argument, or no Ray at RAY_ADDRESS).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from raymoe.commands.entry import check_folder, new_parser, refuse
from raymoe.config import default_root, override, preset


def parser(program: str | None = None) -> argparse.ArgumentParser:
    parse = new_parser(__doc__, program)
    parse.add_argument("--root", default=default_root(), help="run.root to check (default: %(default)s)")
    parse.add_argument("--json", type=Path, help="also write the checks to this JSON file")
    return parse


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    parse = parser(program)
    arguments = parse.parse_args(words)
    try:
        check_folder("--json", arguments.json)
        override(preset("tiny"), [f"run.root={arguments.root}"])
    except (ValueError, OSError) as error:
        return refuse(parse.prog, error)
    from raymoe.ops.ray_connection import connect, find_ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        target = find_ray(os.environ)
        print(f"ray         {target}", flush=True)
        print(f"ray         {connect(target, cpus=2, name='doctor')}", flush=True)
    except (ValueError, ConnectionError) as error:
        return refuse(parse.prog, error)
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
